"""All tests of MetricStream, in the order of its chapters.

Tables of cases in the domain's own words where the behaviour is known from an RFC; a real server on
a real port for everything a user does, once for each model of threads. Crashes, faults and hostile
clients meet real processes, which are ended by their own id. Nothing sleeps to wait for something:
`eventually` polls until a condition holds. What all chapters use stands first.
"""

import ast
import bisect
import contextlib
import doctest
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import types
import unicodedata
import urllib.parse
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest

import metricstream
from metricstream import (
    BatchError,
    ClientList,
    ClientListError,
    Engine,
    EventRing,
    ExecutionError,
    HTTPError,
    JSONError,
    LogError,
    Matcher,
    MatrixResult,
    MetricLog,
    QueryError,
    Request,
    RequestReader,
    Sample,
    SampleLimitError,
    Series,
    Server,
    Service,
    SlidingWindowLimiter,
    Statistics,
    StringResult,
    Timeouts,
    VectorResult,
    compile_regex,
    expand,
    format_query,
    format_value,
    parse_json,
    parse_query,
    read_batch,
)

# ---- what the tests of all chapters use ----

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "metricstream.py").read_text()
SOAK_S = float(os.environ.get("METRICSTREAM_SOAK_S", "0"))  # set by `make soak`


def scaled(short: int, soak: int) -> int:
    """A number of clients or rounds, and what it is in a soak test."""
    return soak if SOAK_S else short


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> object:
    """Poll until the condition is true, and return what it returned; fail at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (outcome := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)
    return outcome


def at_once(values: Iterable[Any] = ((),)) -> Callable[[Callable], Callable]:
    """Make tests of a scenario of real processes, which takes a folder and one of the values, or
    the parts of a tuple.

    Processes wait for each other most of the time. So the scenarios run beside the other tests,
    some at a time, and each of these tests waits for its own.
    """
    variants = [value if isinstance(value, tuple) else (value,) for value in values]

    def decorate(scenario: Callable) -> Callable:
        def test(request: pytest.FixtureRequest, outcomes: dict[str, Future]) -> None:
            if skipped := outcomes[request.node.nodeid].result():
                pytest.skip(skipped)

        def test_one(number: int, request: Any, outcomes: dict[str, Future]) -> None:
            test(request, outcomes)

        test.__doc__ = test_one.__doc__ = scenario.__doc__
        test.scenario = test_one.scenario = lambda folder, n=0: scenario(folder, *variants[n])
        names = ["-".join(str(part)[:40] for part in variant) for variant in variants]
        parametrize = pytest.mark.parametrize("number", range(len(variants)), ids=names)
        return parametrize(test_one) if variants != [()] else test

    return decorate


def play(name: str, folder: Path, *number: int) -> str:
    """Run the scenario of a test; why it was skipped, or ""."""
    try:
        globals()[name].scenario(folder, *number)
    except pytest.skip.Exception as reason:
        return str(reason)
    return ""


@pytest.fixture(scope="session", autouse=True)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future]]:
    """Starts the scenarios of the tests that are selected, before any other test; their outcomes by
    the ids of the tests.
    """
    tests = [test for test in request.session.items if hasattr(test.function, "scenario")]
    # Forks, made before there are threads: what they run need not be imported again. They leave the
    # processor to the tests beside them.
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(4, fork, initializer=os.nice, initargs=(5,))
    try:
        yield {
            test.nodeid: pool.submit(
                play, test.originalname, tmp_path_factory.mktemp("scenario"),
                *(test.callspec.params.values() if hasattr(test, "callspec") else ()),
            )
            for test in tests
        }  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def by_name(table: list) -> list:
    return [pytest.param(*row[1:], id=row[0]) for row in table]


MIB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit")
SHORT = Timeouts(head_s=0.3, body_s=0.3, answer_s=0.3, idle_s=0.3, linger_s=0.3, stop_s=2.0)


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def growth(work: Callable[[object], object], small: object, large: object, limit: float) -> float:
    """How many times as long `work` takes for `large`: the best times of up to 20 rounds.

    Noise only ever adds time, so as soon as the best times keep the limit, they have kept it.
    """
    best = [math.inf, math.inf]
    for _ in range(20):
        for index, size in enumerate((small, large)):
            started = time.thread_time()
            work(size)
            best[index] = min(best[index], time.thread_time() - started)
        if best[1] <= limit * best[0]:
            break
    return best[1] / best[0]


# ---- requests, piece by piece ----

BATCH = b'{"metrics":[{"name":"cpu","value":1}]}'
BATCH_LENGTH = b"Content-Length: %d" % len(BATCH)
BODY_LIMIT_BYTES = 1 << 20
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
FORM = "application/x-www-form-urlencoded"


def head(line: bytes, *fields: bytes, host: bytes | None = b"Host: localhost") -> bytes:
    lines = [line, *([] if host is None else [host]), *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def get(target: bytes = b"/health", *fields: bytes) -> bytes:
    return head(b"GET " + target + b" HTTP/1.1", *fields)


def post(*fields: bytes, body: bytes = BATCH, target: bytes = b"/metrics", **host: Any) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return head(b"POST " + target + b" HTTP/1.1", length, *fields, **host) + body


def framed(*fields: bytes, body: bytes = BATCH, version: bytes = b"HTTP/1.1") -> bytes:
    """A POST whose framing is what `fields` say and nothing else."""
    return head(b"POST /metrics " + version, *fields) + body


def chunked(body: bytes, coding: bytes = b"chunked") -> bytes:
    return framed(b"Transfer-Encoding: " + coding, body=body)


def in_chunks(content: bytes, size: int = 16) -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def first_chunk(line: bytes) -> bytes:
    """A chunked POST whose first chunk of five octets is announced by `line`."""
    return chunked(line + b"hello\r\n0\r\n\r\n")


def gzipped(content: bytes = BATCH, *fields: bytes) -> bytes:
    return post(b"Content-Encoding: gzip", *fields, body=content)


def form_of(**parameters: object) -> bytes:
    return urllib.parse.urlencode(parameters).encode()


def octets_of(raw: bytes) -> list[bytes]:
    return [raw[position : position + 1] for position in range(len(raw))]


def tagged_metrics(count: int, value: bytes) -> bytes:
    tags = b",".join(b'"t%d":"%b"' % (number, value) for number in range(32))
    return b'{"metrics":[%b]}' % b",".join([b'{"name":"cpu","value":1,"tags":{%b}}' % tags] * count)


# ---- a client that believes nothing, and Python's own ----


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    continued: bool = False  # `100 Continue` came before it

    @property
    def json(self) -> object:
        return json.loads(self.body)


def connect(port: int, timeout_s: float = 5) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def send_what_is_taken(connection: socket.socket, octets: bytes) -> None:
    try:
        connection.sendall(octets)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has closed: what it answered is still there to be read


def read_answer(stream: BinaryIO, to_head: bool = False) -> Answer | None:
    """The next answer, interim answers included; None at the end of the stream."""
    status_line = stream.readline(10_000)
    if not status_line:
        return None
    matched = re.fullmatch(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*\r\n", status_line)
    assert matched, f"no status line: {status_line!r}"
    status, headers = int(matched[1]), {}
    while (line := stream.readline(10_000)) != b"\r\n":
        field = re.fullmatch(rb"([!-9;-~]+): ?([ -~]*)\r\n", line)
        assert field, f"no header field: {line!r}"
        name = field[1].decode().lower()
        assert name not in headers, f"repeated: {line!r}"
        headers[name] = field[2].decode()
    if status < 200:
        assert "content-length" not in headers
        return Answer(status, headers, b"")
    length = int(headers["content-length"])
    body = b"" if to_head else stream.read(length)
    assert to_head or len(body) == length, "answer cut short"
    return Answer(status, headers, body)


def answer_on(connection: socket.socket) -> Answer:
    """The next answer on a connection on which nothing is pipelined."""
    with connection.makefile("rb") as stream:
        answer = read_answer(stream)
    assert answer is not None, "closed without an answer"
    return answer


def answer_once(port: int, raw: bytes) -> Answer:
    """The answer to a request on a connection of its own."""
    with connect(port) as connection:
        connection.sendall(raw)
        return answer_on(connection)


def exchange(port: int, raw: bytes, half_close: bool = False, timeout_s: float = 5,
             expect: int | None = 1, heads: Container[int] | None = None,
             ) -> tuple[list[Answer], bool]:  # fmt: skip
    """Send `raw`, read `expect` answers, and look whether the connection lives on.

    `expect` None, or `half_close`, reads to the end of the stream. `heads` are the indices of
    answers to HEAD. Returns the answers and whether the server closed: where it did not, it has
    answered a GET /health on the same connection; where it did, all that came is in the answers.
    """
    if heads is None:
        heads = [0] if raw.startswith(b"HEAD ") else []
    answers: list[Answer] = []
    with connect(port, timeout_s) as connection, connection.makefile("rb") as stream:

        def read_until(count: int | None) -> bool:
            continued = False
            while count is None or len(answers) < count:
                answer = read_answer(stream, len(answers) in heads)
                if answer is None:
                    return True
                if answer.status < 200:
                    assert answer.status == 100
                    continued = True
                    continue
                answers.append(answer._replace(continued=continued))
                continued = False
            return False

        send_what_is_taken(connection, raw)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        if half_close or expect is None:
            return answers, read_until(None)
        if read_until(expect):
            return answers, True
        if answers and "close" in answers[-1].headers.get("connection", ""):
            return answers, read_until(None)
        send_what_is_taken(connection, HEALTH)
        if read_until(expect + 1):
            return answers, True
        assert is_healthy(answers[-1]), f"not the answer to GET /health: {answers[-1]}"
        return answers[:-1], False


def readable(connection: socket.socket) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def is_healthy(answer: Answer) -> bool:
    """Whether ingestion is well; what the store says of itself may stand beside it."""
    health = {"status": "healthy", "service": "ingestion"}
    return answer.status == 200 and health.items() <= answer.json.items()


def assert_healthy(port: int) -> None:
    answers, closed = exchange(port, HEALTH)
    assert not closed and is_healthy(answers[0])


class Client(http.client.HTTPConnection):
    """Python's own HTTP client, with the few words the tests need."""

    def __init__(self, port: int, timeout_s: float = 10) -> None:
        super().__init__("127.0.0.1", port, timeout=timeout_s)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.request(method, path, body, headers)
        response = self.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())


# ---- a server of this process ----


class RunningServer(NamedTuple):
    port: int
    folder: Path
    server: Server
    service: Service


@contextlib.contextmanager
def running(folder: Path, *, limit: int = 0, log: MetricLog | None = None,
            wall_clock: Callable[[], float] = time.time,
            **options: object) -> Iterator[RunningServer]:  # fmt: skip
    """A server of this process on a free port, stopped at the end."""
    log = log or MetricLog(str(folder))
    service = Service(log, SlidingWindowLimiter(limit) if limit else None, Statistics(), wall_clock)
    with Server(("127.0.0.1", 0), service, **options) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield RunningServer(server.server_address[1], folder, server, service)
        finally:
            server.shutdown()
            thread.join()
            log.close()


MODELS = [pytest.param(1, id="worker"), pytest.param(0, id="thread-each")]


@pytest.fixture(scope="session", params=MODELS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A server with default settings and no rate limit, in both models of threads."""
    with running(tmp_path_factory.mktemp("data"), threads=request.param) as started:
        yield started


@pytest.fixture(params=MODELS)
def threads(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with contextlib.closing(Client(server.port)) as connection:
        yield connection


def a_service(folder: Path, limit: int = 0, **options: Any) -> Service:
    limiter = SlidingWindowLimiter(limit) if limit else None
    return Service(MetricLog(str(folder)), limiter, Statistics(), **options)


def answer_to(service: Service, octets: bytes) -> metricstream.Response:
    """The answer to one request, without a server."""
    reader = RequestReader()
    reader.feed(octets)
    request = reader.next_request()
    assert request is not None
    answer = service.answer(request, "10.0.0.7", 0.0)
    assert isinstance(answer, metricstream.Answer) and answer.response is not None
    return answer.response


def open_connections(started: RunningServer) -> int:
    return started.service.statistics.snapshot()["connections_open"]


# ---- server processes, and what they hold ----


class ServerProcess:
    """`python3 metricstream.py` as a user starts it."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, str(HERE / "metricstream.py"), "0", "--data-dir", str(folder)]
        self.process = subprocess.Popen([*command, *options], env=os.environ | environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        assert self.process.stdout
        self.startup_line = self.process.stdout.readline()
        found = re.search(r"https?://(\S+):(\d+),", self.startup_line)
        assert found, (self.startup_line, self.process.communicate(timeout=10))
        self.port = int(found[2])
        self.store_is_ready = False

    def wait_for_store(self) -> None:
        """Wait until the store has read the log."""
        if not self.store_is_ready:
            eventually(lambda: self.health().get("store") == "running")
            self.store_is_ready = True

    def health(self) -> dict:
        with contextlib.closing(Client(self.port)) as client:
            return client.ask("GET", "/health").json

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=10)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=5)
        return self.process.returncode, out, err


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(HERE / "metricstream.py"), *arguments],
                          capture_output=True, text=True, timeout=20)  # fmt: skip


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    """A server process that says all it can say."""
    folder = tmp_path_factory.mktemp("watched")
    with ServerProcess(folder, "--log-level", "debug", "--rate-limit", "0") as started:
        yield started, folder


def connections_of(started: ServerProcess) -> int:
    """How many connections the server says are open, the asking one included."""
    (answer,), _ = exchange(started.port, get(b"/metrics"))
    return answer.json["connections_open"]  # type: ignore[index]


def crowd(port: int, count: int, sent: bytes, stack: contextlib.ExitStack) -> list[socket.socket]:
    """So many connections that have sent this, until the stack closes."""
    connections = []
    for _ in range(count):
        connection = stack.enter_context(connect(port))
        connection.sendall(sent)
        connections.append(connection)
    return connections


def post_latencies(port: int, count: int, connections: int = 4) -> list[float]:
    """Post so often, in turn over kept-alive connections; each answer is 200. Seconds, ascending."""
    request, latencies = post(), []
    with contextlib.ExitStack() as stack:
        good = [stack.enter_context(connect(port, 30)) for _ in range(connections)]
        for connection in itertools.islice(itertools.cycle(good), count):
            began = time.perf_counter()
            connection.sendall(request)
            answer = connection.recv(1000)
            latencies.append(time.perf_counter() - began)
            assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"}"), answer
    return sorted(latencies)


def limit_file_size(process: subprocess.Popen, size: int) -> None:
    """Let the process write files up to this size and not beyond, as on a full disk."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def children_of(pid: int) -> list[int]:
    """The processes that come from another one, those of its children included."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [grandchild for child in found for grandchild in children_of(child)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


class Footprint(NamedTuple):
    """What a process holds now."""

    resident_bytes: int
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        status = Path(f"/proc/{pid}/status").read_text()
        numbers = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(1024 * int(numbers["VmRSS"]), int(numbers["Threads"]), files)


@contextlib.contextmanager
def leaving_nothing(pid: int) -> Iterator[Footprint]:
    """Threads and files are again what they were before, memory too but for what malloc keeps."""
    # without the interpreter lock each thread has a heap of its own, and its pages are given back late
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    spare_bytes = (16 if has_lock else 64) * MIB
    before = Footprint.of(pid)
    yield before
    with contextlib.suppress(AssertionError):  # the next line says what is left
        eventually(lambda: Footprint.of(pid)[1:] == before[1:])
    after = Footprint.of(pid)
    assert after[1:] == before[1:]
    assert after.resident_bytes - before.resident_bytes < spare_bytes


@contextlib.contextmanager
def besieged(folder: Path, threads: int, *options: str) -> Iterator[ServerProcess]:
    """A server process that is warm, and is alive and well when the siege is over."""
    arguments = ("--threads", str(threads), "--rate-limit", "0", *options)
    with ServerProcess(folder, *arguments) as started:
        files = len(os.listdir(f"/proc/{started.process.pid}/fd"))
        with contextlib.ExitStack() as stack:  # first threads, buffers and memos are no leak
            for connection in crowd(started.port, 40, post(), stack):
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        # the housekeeper, the log's, the one that writes lines, and one that works or accepts
        eventually(lambda: Footprint.of(started.process.pid)[1:] == (4, files))
        yield started
        assert_healthy(started.port)
        status, out, err = started.stop()
        assert (status, err) == (0, "") and out.startswith("stopped {") and out.count("\n") == 1, (
            out
        )


# ---- the log, and disks that fail ----

LEVELS = ["memory", "os", "disk"]
NOW_MS = 1_758_116_723_123


def lines_of(folder: Path) -> list[str]:
    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return text.splitlines()


def logged(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in lines_of(folder) if f'"name":{json.dumps(name)}' in line]


def append_and_wait(log: MetricLog, lines: bytes) -> None:
    durable = log.append(lines)
    if durable is not None:
        durable.result(10)


class Disk:
    """Stands for os.write and os.fsync: does what is planned for the next calls, hangs where it is
    held, and works otherwise.
    """

    def __init__(self, *plan: int | Exception) -> None:
        self.plan = list(plan)  # of each write: a number of bytes to take, or an error to raise
        self.syncs: list[Exception] = []  # the errors of the next calls of fsync
        self.sync_count = 0
        self.stuck = threading.Event()  # set when a call hangs
        self._held, self._lines, self._released = "", b"", threading.Event()

    def hold(self, call: str = "write", lines: bytes = b"") -> None:
        """Let these calls hang from now on; of writes only those of such lines."""
        self._released.clear()
        self._held, self._lines = call, lines

    def release(self) -> None:
        self._held = ""
        self._released.set()

    def _wait(self, call: str, octets: bytes = b"") -> None:
        if call == self._held and self._lines in octets:
            self.stuck.set()
            assert self._released.wait(30)

    def write(self, fd: int, octets: bytes) -> int:
        self._wait("write", bytes(octets))
        step = self.plan.pop(0) if self.plan else len(octets)
        if isinstance(step, Exception):
            raise step
        return os.write(fd, octets[:step])

    def fsync(self, fd: int) -> None:
        self._wait("fsync")
        self.sync_count += 1
        if self.syncs:
            raise self.syncs.pop(0)
        os.fsync(fd)


FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")


# ---- writers that know what was acknowledged ----


class Writers:
    """Clients that post batches of uniquely named metrics until they are stopped or the server is
    gone. They never send anything twice.
    """

    BATCH = 3

    def __init__(self, port: int, prefix: str, count: int = 4, pause_s: float = 0.0) -> None:
        self.acknowledged: set[str] = (
            set()
        )  # set.update holds no lock of ours: each thread adds its own
        self.statuses: Counter[int] = Counter()
        self.faults: list[Exception] = []  # answers that broke off
        self._stopped = threading.Event()
        self._pause_s = pause_s
        self._lock = threading.Lock()  # guards acknowledged and statuses
        self._threads = [threading.Thread(target=self._write, args=(port, f"{prefix}.{number}"))
                         for number in range(count)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def _write(self, port: int, prefix: str) -> None:
        with contextlib.closing(Client(port)) as client:
            for number in itertools.count():
                names = [f"{prefix}.{number}.{index}" for index in range(self.BATCH)]
                batch = {"metrics": [{"name": name, "value": number} for name in names]}
                try:
                    status = client.ask("POST", "/metrics", batch).status
                except ConnectionError:  # refused, or closed without an octet of an answer
                    return
                except (http.client.HTTPException, OSError) as error:
                    self.faults.append(error)
                    return
                with self._lock:
                    self.statuses[status] += 1
                    if status == 200:
                        self.acknowledged.update(names)
                if self._stopped.wait(self._pause_s) if self._pause_s else self._stopped.is_set():
                    return

    def join(self) -> None:
        """Wait until all have ended by themselves: the server is gone."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not self.faults

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def names_in(path: Path) -> list[str]:
    """The names of all metrics in a log of which every line must be whole."""
    octets = path.read_bytes()
    assert octets.endswith(b"\n") or not octets
    return [json.loads(line)["name"] for line in octets.splitlines()]


def assert_kept(acknowledged: set[str], folder: Path) -> None:
    """All that was acknowledged is in the log, and nothing is there twice."""
    names = names_in(folder / "metrics.jsonl")
    kept = set(names)
    assert not acknowledged - kept
    assert len(kept) == len(names)


def assert_whole_batches(folder: Path) -> None:
    batches = Counter(name.rpartition(".")[0] for name in names_in(folder / "metrics.jsonl"))
    assert set(batches.values()) <= {Writers.BATCH}


# ---- damage at random ----


def damaged(
    rng: random.Random, raw: bytes, tokens: list[bytes], other: Callable[[], bytes] = bytes
) -> bytes:
    """`raw` after one to four accidents: a flip, a cut, a repetition, another's end, or a token,
    anywhere or between two lines.
    """
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        start = rng.randrange(len(raw) + 1)
        end = min(len(raw), start + rng.choice([1, 2, 8, 40]))
        before, piece, after = raw[:start], raw[start:end], raw[end:]
        accident = rng.randrange(6)
        if accident == 0:
            piece = bytes(octet ^ (1 << rng.randrange(8)) for octet in piece)
        elif accident == 1:
            piece = b""
        elif accident == 2:
            piece *= rng.choice([2, 3, 70])
        elif accident == 3:
            another = other()
            after = another[rng.randrange(len(another) + 1) :]
        elif accident == 4:
            piece = rng.choice(tokens) + piece
        else:  # where lines begin it does most harm
            lines = raw.split(b"\r\n")
            where = rng.randrange(len(lines) + 1)
            lines[where:where] = [rng.choice(tokens).removesuffix(b"\r\n")]
            before, piece, after = b"\r\n".join(lines), b"", b""
        raw = before + piece + after
    return raw


def in_random_pieces(rng: random.Random, raw: bytes) -> list[bytes]:
    cuts = sorted(rng.choices(range(len(raw) + 1), k=rng.choice([1, 3, 10])))
    return [raw[start:end] for start, end in itertools.pairwise([0, *cuts, len(raw)])]


def random_fast_body(rng: random.Random) -> bytes:
    numbers = ["0", "-0", "-0.0", "7", "75.5", "75.50", "0.5", "-0.25", "0.00001", "1e3", "1E400", "007",
               "123456789012345678901", "9999999999.99999", "0.1234567890123", "1.0", "-5", "00", "5.",
               str(rng.randrange(10**12)), f"{rng.uniform(0, 100):.2f}", repr(rng.random())]  # fmt: skip
    names = [
        "cpu_usage",
        "a b",
        "",
        "n" * 255,
        "n" * 256,
        "a}b",
        "a{b",
        "é",
        "a\\nb",
        "a,b",
        "\x7f",
        '",',
    ]
    types = ["gauge", "counter", "histogram", "summary", "rate", ""]
    tags = ['{}', '{"host":"web1"}', '{"host": "web1", "region":"eu"}', '{"a":"1","a":"2"}', '{"a":1}',
            '{"é":"ü"}', '{"a":"\\u0041\\n"}', '{"a":"}"}', '{"a":"{"}', '{"a":"\x01"}', '{"a":"b",}', "[]",
            "{" + ",".join(f'"k{n}":"v"' for n in range(rng.choice((32, 33)))) + "}"]  # fmt: skip

    def usually(usual: str, unusual: list[str]) -> str:
        return usual if rng.random() < 0.93 else rng.choice(unusual)

    colon, comma = rng.choice([(":", ","), (": ", ", ")])

    def metric() -> str:
        name = usually("requests_total", names)
        number = rng.choice(numbers) if rng.random() < 0.5 else str(rng.randrange(100))
        fields = [f'"name"{colon}"{name}"', f'"value"{colon}{number}']
        if rng.random() < 0.8:
            fields.append(f'"type"{colon}"{usually("gauge", types)}"')
        if rng.random() < 0.8:
            fields.append(f'"tags"{colon}{usually(tags[1], tags)}')
        unusual = ['"timestamp":5', '"name":"again"', '"value":9', '"labels":{}', ""]
        if rng.random() < 0.05:
            fields.insert(rng.randrange(5), rng.choice(unusual))
        return "{" + comma.join(fields) + "}"

    metrics = comma.join(metric() for _ in range(rng.randrange(1, 4)))
    return f'{{"metrics"{colon}[{metrics}]}}'.encode()


# ==================================================================================================
# PART I. INGESTION
# ==================================================================================================


# ==================================================================================================
# HTTP
# ==================================================================================================


# ---- requests to refuse: name, octets, status (or the statuses the contract leaves open) ----

MALFORMED: list[tuple[str, bytes, int | set[int]]] = [
    # request line
    ("two spaces before the target", head(b"GET  /health HTTP/1.1"), 400),
    ("two spaces before the version", head(b"GET /health  HTTP/1.1"), 400),
    ("tab for the first space", head(b"GET\t/health HTTP/1.1"), 400),
    ("tab for the second space", head(b"GET /health\tHTTP/1.1"), 400),
    ("space before the method", head(b" GET /health HTTP/1.1"), 400),
    ("space after the version", head(b"GET /health HTTP/1.1 "), 400),
    ("word after the version", head(b"GET /health HTTP/1.1 x"), 400),
    ("space in the target", head(b"GET /he alth HTTP/1.1"), 400),
    ("no version", head(b"GET /health"), 400),
    ("no version, space left", head(b"GET /health "), 400),
    ("no target", head(b"GET HTTP/1.1"), 400),
    ("method alone", head(b"GET"), 400),
    ("no method", head(b"/health HTTP/1.1"), 400),
    ("empty lines only", b"\r\n\r\n", 400),
    ("two empty lines before the request line", b"\r\n\r\n" + HEALTH, 400),
    ("bare LF before the request line", b"\n" + HEALTH, 400),
    ("bare CR before the request line", b"\r" + HEALTH, 400),
    ("blank line with a space before the request line", b" \r\n" + HEALTH, 400),
    ("UTF-8 mark before the request line", b"\xef\xbb\xbf" + HEALTH, 400),
    ("an answer for a request", b"HTTP/1.1 200 OK\r\nHost: localhost\r\n\r\n", 400),
    ("a TLS greeting", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40, 400),
    ("JSON without HTTP", BATCH + b"\r\n\r\n", 400),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}),
    # method
    ("brace in the method", head(b"GE{T /health HTTP/1.1"), 400),
    ("quote in the method", head(b'"GET" /health HTTP/1.1'), 400),
    ("colon in the method", head(b"GET: /health HTTP/1.1"), 400),
    ("octet 0x80 in the method", head(b"G\x80T /health HTTP/1.1"), 400),
    ("NUL in the method", head(b"G\0T /health HTTP/1.1"), 400),
    ("CONNECT", head(b"CONNECT localhost:443 HTTP/1.1"), 400),
    ("CONNECT to a path", head(b"CONNECT /health HTTP/1.1"), 400),
    # version
    ("version in lower case", head(b"GET /health http/1.1"), 400),
    ("version in mixed case", head(b"GET /health Http/1.1"), 400),
    ("letter after the version", head(b"GET /health HTTP/1.1x"), 400),
    ("version without a point", head(b"GET /health HTTP/11"), 400),
    ("version with a comma", head(b"GET /health HTTP/1,1"), 400),
    ("version without a minor", head(b"GET /health HTTP/1."), 400),
    ("version without a major", head(b"GET /health HTTP/.1"), 400),
    ("version without digits", head(b"GET /health HTTP/"), 400),
    ("version of two minor digits", head(b"GET /health HTTP/1.10"), 400),
    ("version of two major digits", head(b"GET /health HTTP/01.1"), 400),
    ("version with a plus", head(b"GET /health HTTP/+1.1"), 400),
    ("version with a full-width digit", head("GET /health HTTP/１.1".encode()), 400),
    ("another protocol", head(b"GET /health HTTPS/1.1"), 400),
    ("version HTTP/2.0", head(b"GET /health HTTP/2.0"), 505),
    ("version HTTP/0.9", head(b"GET /health HTTP/0.9"), 505),
    ("version HTTP/1.2", head(b"GET /health HTTP/1.2"), 505),
    ("version HTTP/9.9", head(b"GET /health HTTP/9.9"), 505),
    # request target
    ("target of 8,001 octets", get(b"/" + b"a" * 8000), 414),
    ("target of 8,001 octets, mostly query", get(b"/health?" + b"a" * 7993), 414),
    ("target without a slash", get(b"health"), 400),
    ("target of a query", get(b"?x=1"), 400),
    ("GET *", get(b"*"), 400),
    ("POST *", framed(BATCH_LENGTH).replace(b"/metrics", b"*"), 400),
    ("OPTIONS *x", head(b"OPTIONS *x HTTP/1.1"), 400),
    ("OPTIONS **", head(b"OPTIONS ** HTTP/1.1"), 400),
    ("authority for a target", get(b"localhost:80"), 400),
    ("fragment", get(b"/health#top"), 400),
    ("fragment in the query", get(b"/health?a#b"), 400),
    ("octet 0x80 in the target", get(b"/health\x80"), 400),
    ("octet 0xA0 in the target", get(b"/\xa0"), 400),
    ("raw UTF-8 in the target", get("/é".encode()), 400),
    ("raw UTF-8 in the query", get("/health?é".encode()), 400),
    ("NUL in the target", get(b"/health\0"), 400),
    ("NUL in the query", get(b"/health?\0"), 400),
    ("control character in the target", get(b"/\x01"), 400),
    ("DEL in the target", get(b"/\x7f"), 400),
    ("vertical tab in the target", get(b"/\x0b"), 400),
    ("bare CR in the target", get(b"/\r"), 400),
    ("percent alone", get(b"/%"), 400),
    ("percent and one digit", get(b"/a%4"), 400),
    ("percent and no hex", get(b"/%zz"), 400),
    ("percent and a sign", get(b"/%+1"), 400),
    ("percent and a space code cut", get(b"/%2/"), 400),
    ("percent u", get(b"/%u0041"), 400),
    ("encoded NUL", get(b"/health%00"), 400),
    ("encoded LF", get(b"/health%0a"), 400),
    ("encoded CR LF", get(b"/health%0D%0AX:%20y"), 400),
    ("encoded escape", get(b"/%1B[0m"), 400),
    ("encoded DEL", get(b"/%7F"), 400),
    ("absolute form with a user", get(b"http://user@localhost/health"), 400),
    ("absolute form with a password", get(b"http://user:pw@localhost/health"), 400),
    ("absolute form with an empty user", get(b"http://@localhost/health"), 400),
    ("absolute form without a host", get(b"http:///health"), 400),
    ("absolute form of nothing", get(b"http://"), 400),
    ("absolute form with one slash", get(b"http:/health"), 400),
    ("absolute form with a port only", get(b"http://:80/health"), 400),
    ("absolute form with a port of letters", get(b"http://localhost:x/health"), 400),
    ("absolute form with two ports", get(b"http://localhost:1:2/health"), 400),
    ("absolute form with an open bracket", get(b"http://[::1/health"), 400),
    ("absolute form with a fragment", get(b"http://localhost/health#x"), 400),
    ("absolute form and no Host", head(b"GET http://localhost/health HTTP/1.1", host=None), 400),
    ("absolute form and two Hosts", get(b"http://localhost/health", b"Host: localhost"), 400),
    ("absolute form and an invalid Host", head(b"GET http://localhost/health HTTP/1.1",
                                               host=b"Host: a b"), 400),
    # line ends
    ("bare LF everywhere", HEALTH.replace(b"\r\n", b"\n"), 400),
    ("bare LF after the request line", HEALTH.replace(b"\r\n", b"\n", 1), 400),
    ("bare LF after a field", b"GET /health HTTP/1.1\r\nHost: localhost\n\r\n", 400),
    ("bare LF for the empty line", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n", 400),
    ("LF CR for the empty line", b"GET /health HTTP/1.1\r\nHost: localhost\n\r\r\n", 400),
    ("bare LF within a value", get(b"/health", b"X: a\nTransfer-Encoding: chunked"), 400),
    ("bare CR everywhere", HEALTH.replace(b"\r\n", b"\r") + b"\r\n\r\n", 400),
    ("bare CR after the request line", HEALTH.replace(b"\r\n", b"\r", 1), 400),
    ("bare CR within a value", get(b"/health", b"X: a\rTransfer-Encoding: chunked"), 400),
    ("bare CR at the end of a value", get(b"/health", b"X: a\r"), 400),
    ("bare CR for the first empty line", get(b"/health", b"\r"), 400),
    # header fields
    ("space before the colon", get(b"/health", b"X : a"), 400),
    ("tab before the colon", get(b"/health", b"X\t: a"), 400),
    ("space before the colon of Content-Length", framed(b"Content-Length : 38"), 400),
    ("space before the colon of Transfer-Encoding", framed(BATCH_LENGTH,
                                                           b"Transfer-Encoding : chunked"), 400),
    ("empty name", get(b"/health", b": a"), 400),
    ("colon alone", get(b"/health", b":"), 400),
    ("no colon", get(b"/health", b"X"), 400),
    ("space in the name", get(b"/health", b"X Y: a"), 400),
    ("parenthesis in the name", get(b"/health", b"X(Y): a"), 400),
    ("at sign in the name", get(b"/health", b"X@Y: a"), 400),
    ("slash in the name", get(b"/health", b"X/Y: a"), 400),
    ("quote in the name", get(b"/health", b'"X": a'), 400),
    ("bracket in the name", get(b"/health", b"X[0]: a"), 400),
    ("octet 0x80 in the name", get(b"/health", b"X\x80: a"), 400),
    ("octet 0xA0 after the name", get(b"/health", b"X\xa0: a"), 400),
    ("NUL in the name", get(b"/health", b"X\0: a"), 400),
    ("NUL in a value", get(b"/health", b"X: a\0b"), 400),
    ("control character 0x01 in a value", get(b"/health", b"X: \x01"), 400),
    ("backspace in a value", get(b"/health", b"X: a\x08"), 400),
    ("vertical tab in a value", get(b"/health", b"X:\x0ba"), 400),
    ("form feed in a value", get(b"/health", b"X: a\x0c"), 400),
    ("escape in a value", get(b"/health", b"X: \x1b[0m"), 400),
    ("DEL in a value", get(b"/health", b"X: \x7f"), 400),
    ("space before the first field", head(b"GET /health HTTP/1.1\r\n X: a"), 400),
    ("blank first field line", head(b"GET /health HTTP/1.1\r\n "), 400),
    ("folded with a space", get(b"/health", b"X: a", b" b"), 400),
    ("folded with a tab", get(b"/health", b"X: a", b"\tb"), 400),
    ("folded to a blank line", get(b"/health", b"X: a", b" "), 400),
    ("folded Transfer-Encoding", framed(b"Transfer-Encoding:", b" chunked",
                                        body=in_chunks(BATCH)), 400),
    ("folded Content-Length", framed(b"Content-Length:", b"\t38"), 400),
    ("two fields Authorization", post(b"Authorization: a", b"Authorization: b"), 400),
    ("two equal fields Authorization", post(b"Authorization: a", b"authorization: a"), 400),
    ("two fields Content-Type", post(b"Content-Type: application/json",
                                     b"Content-Type: text/plain"), 400),
    ("two equal fields Content-Type", post(*[b"Content-Type: application/json"] * 2), 400),
    ("101 fields", get(b"/health", *[b"X%d: a" % n for n in range(100)]), 431),
    ("1,000 fields", get(b"/health", *[b"X: a"] * 999), 431),
    ("header section beyond 16 KiB in one field", get(b"/health", b"X: " + b"a" * 16_500), 431),
    ("header section beyond 16 KiB in 60 fields",
     get(b"/health", *[b"X%d: " % n + b"a" * 300 for n in range(60)]), 431),
    ("header section of 200 KB", get(b"/health", b"X: " + b"a" * 200_000), 431),
    # Host
    ("no Host", head(b"GET /health HTTP/1.1", host=None), 400),
    ("no Host but another field", head(b"GET /health HTTP/1.1", b"X-Host: a", host=None), 400),
    ("two equal Hosts", get(b"/health", b"Host: localhost"), 400),
    ("two Hosts", get(b"/health", b"hOST: other.example"), 400),
    ("two Hosts in HTTP/1.0", head(b"GET /health HTTP/1.0", b"Host: other.example"), 400),
    *[(f"Host {value.decode('latin-1')!r}", head(b"GET / HTTP/1.1", host=b"Host: " + value), 400)
      for value in (b"a b", b"a,b", b"a, a", b"user@localhost", b"http://localhost", b"a/b", b"a:b",
                    b"a?b", b"a#b", b"a:80:80", b"a:-1", b"a:+80", b"a: 80", b"a:8_0", b"[::1",
                    b"::1", b"[::1]x", b"[]", b"<b>", b"a\\b", b'"a"', "a:８０".encode(), b"\xe9")],
    # Content-Length
    *[(f"Content-Length {value.decode('latin-1')!r}", framed(b"Content-Length: " + value), 400)
      for value in (b"", b"+38", b"-38", b"-0", b"3 8", b"3_8", b"0x26", b"26h", b"38.0", b"38.",
                    b"3.8e1", b"38;", b"38,", b",38", b"38, 39", b"38 39", b"'38'", b'"38"',
                    b"\xa038", b"38\xa0", b"\x0b38", b"38\0", b"thirty-eight", "３８".encode(),
                    "٣٨".encode(), b"38\xb2", b"NaN", b"None")],
    ("two Content-Lengths", framed(BATCH_LENGTH, b"Content-Length: 39"), 400),
    ("two Content-Lengths, the first shorter", framed(b"Content-Length: 5", BATCH_LENGTH), 400),
    ("three Content-Lengths, the last another", framed(BATCH_LENGTH, BATCH_LENGTH,
                                                       b"content-length: 0"), 400),
    ("two Content-Lengths, one signed", framed(BATCH_LENGTH, b"Content-Length: +38"), 400),
    ("two Content-Lengths, one empty", framed(BATCH_LENGTH, b"Content-Length:"), 400),
    ("two Content-Lengths in a GET", get(b"/health", b"Content-Length: 0", b"Content-Length: 43"),
     400),
    ("invalid Content-Length in a GET", get(b"/health", b"Content-Length: x"), 400),
    ("Content-Length of 5,000 digits", framed(b"Content-Length: " + b"9" * 5000), {400, 413}),
    ("Content-Length of 31 digits", framed(b"Content-Length: 1" + b"0" * 30), {400, 413}),
    ("Content-Length of 2**64 + 38", framed(b"Content-Length: %d" % (2**64 + 38)), {400, 413}),
    ("one octet beyond the body limit announced", framed(b"Content-Length: 1048577"), 413),
    ("a gigabyte announced", framed(b"Content-Length: 1073741824"), 413),
    ("a gigabyte announced by a GET", get(b"/health", b"Content-Length: 1073741824"), 413),
    ("a gigabyte announced to no route", framed(b"Content-Length: 1073741824")
     .replace(b"/metrics", b"/nowhere"), {404, 413}),
    ("POST without a length", framed(), 411),
    ("POST without a length or body", framed(body=b""), 411),
    ("POST without a length, to be closed", framed(b"Connection: close", body=b""), 411),
    ("POST without a length in HTTP/1.0", framed(version=b"HTTP/1.0"), {400, 411}),
    # Transfer-Encoding
    *[(f"Transfer-Encoding {value.decode('latin-1')!r}", chunked(in_chunks(BATCH), value), status)
      for value, status in [
          (b"gzip, chunked", 501), (b"identity", 501), (b"gzip", 501), (b"deflate", 501),
          (b"compress, chunked", 501), (b"identity, chunked", 501), (b"xchunked", 501),
          (b"chunkedx", 501), (b"cow", 501), (b"chunked-false", 501),
          (b"chunked, chunked", 400), (b"chunked,chunked", 400), (b"Chunked, CHUNKED", 400),
          (b"chunked, gzip", 400), (b"", 400), (b"chunked, identity", {400, 501}),
          (b"chunked;q=1", {400, 501}), (b"chun ked", {400, 501}), (b"chunked chunked", {400, 501}),
          (b'"chunked"', {400, 501}), (b"'chunked'", {400, 501}), (b",", {400, 501}),
          (b"chunked\x0b", 400), (b"\x0bchunked", 400), (b"chunked\0", 400),
          (b"\xa0chunked", {400, 501}), (b"chunked\xa0", {400, 501}), (b"chun\xe9d", {400, 501})]],
    ("two fields chunked", framed(*[b"Transfer-Encoding: chunked"] * 2, body=in_chunks(BATCH)),
     400),
    ("fields gzip and chunked", framed(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked",
                                       body=in_chunks(BATCH)), 501),
    ("fields chunked and gzip", framed(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip",
                                       body=in_chunks(BATCH)), 400),
    ("fields chunked and empty", framed(b"Transfer-Encoding: chunked", b"Transfer-Encoding:",
                                        body=in_chunks(BATCH)), 400),
    ("fields chunked and identity", framed(b"Transfer-Encoding: chunked",
                                           b"Transfer-Encoding: identity",
                                           body=in_chunks(BATCH)), {400, 501}),
    ("chunked, then Content-Length", framed(b"Transfer-Encoding: chunked", b"Content-Length: 4",
                                            body=in_chunks(BATCH)), 400),
    ("Content-Length, then chunked", framed(b"Content-Length: 4", b"Transfer-Encoding: chunked",
                                            body=in_chunks(BATCH)), 400),
    ("Content-Length 0 and chunked", framed(b"Content-Length: 0", b"Transfer-Encoding: chunked",
                                            body=b"0\r\n\r\n"), 400),
    ("Content-Length and chunked in a GET", get(b"/health", b"Content-Length: 5",
                                                b"Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("Content-Length and identity", framed(BATCH_LENGTH, b"Transfer-Encoding: identity"),
     {400, 501}),
    ("Content-Length and an empty Transfer-Encoding", framed(BATCH_LENGTH, b"Transfer-Encoding:"),
     400),
    ("chunked in HTTP/1.0", framed(b"Transfer-Encoding: chunked", body=in_chunks(BATCH),
                                   version=b"HTTP/1.0"), 400),
    ("chunked in HTTP/1.0 to be kept", framed(b"Transfer-Encoding: chunked",
                                              b"Connection: keep-alive", body=in_chunks(BATCH),
                                              version=b"HTTP/1.0"), 400),
    ("chunked and a length in HTTP/1.0", framed(BATCH_LENGTH, b"Transfer-Encoding: chunked",
                                                version=b"HTTP/1.0"), 400),
    # chunks
    *[(f"chunk size {size.decode('latin-1')!r}", first_chunk(size + b"\r\n"), 400)
      for size in (b"", b"+5", b"-5", b"-1", b"-0", b"5_0", b"0_5", b" 5", b"\t5", b"5 ", b"0x5",
                   b"x5", b"5h", b"5.", b"5,5", b"5 5", b";a=b", b'"5"', b"g", "５".encode(),
                   "٥".encode(), b"\xa05", b"5\xa0", b"5\0", b"\x005", b"5\r", b"\x0b5")],
    ("chunk size of 17 digits", first_chunk(b"00000000000000005\r\n"), {400, 413}),
    ("chunk size of 16 F", first_chunk(b"F" * 16 + b"\r\n"), {400, 413}),
    ("chunk size of 2**64 + 5", first_chunk(b"10000000000000005\r\n"), {400, 413}),
    ("chunk size of 5,000 digits", first_chunk(b"5" * 5000 + b"\r\n"), {400, 413}),
    ("chunk size of zeros without end", first_chunk(b"0" * 20_000), {400, 413, 431}),
    ("chunk one octet beyond the body limit", first_chunk(b"100001\r\n"), 413),
    ("two chunks beyond the body limit",
     chunked(b"80000\r\n" + b" " * 0x80000 + b"\r\n80001\r\n"), 413),
    ("bare LF after the chunk size", first_chunk(b"5\n"), 400),
    ("bare CR after the chunk size", first_chunk(b"5\r"), 400),
    ("LF CR after the chunk size", first_chunk(b"5\n\r"), 400),
    ("bare LF in a chunk extension", first_chunk(b"5;a\nb\r\n"), 400),
    ("bare CR in a chunk extension", first_chunk(b"5;a\rb\r\n"), 400),
    ("NUL in a chunk extension", first_chunk(b"5;a\0\r\n"), 400),
    ("chunk extension of 20,000 octets", first_chunk(b"5;" + b"a" * 20_000 + b"\r\n"),
     {400, 413, 431}),
    ("chunk extension without end", chunked(b"5;" + b"a" * 40_000), {400, 413, 431}),
    ("no CRLF after the chunk data", chunked(b"5\r\nhello0\r\n\r\n"), 400),
    ("bare LF after the chunk data", chunked(b"5\r\nhello\n0\r\n\r\n"), 400),
    ("bare CR after the chunk data", chunked(b"5\r\nhello\r0\r\n\r\n"), 400),
    ("two octets of data after the chunk data", chunked(b"5\r\nhelloXX0\r\n\r\n"), 400),
    ("chunk longer than its size", chunked(b"4\r\nhello\r\n0\r\n\r\n"), 400),
    ("chunk shorter than its size", chunked(b"6\r\nhello\r\n0\r\n\r\n"), 400),
    ("empty line between chunks", chunked(b"5\r\nhello\r\n\r\n0\r\n\r\n"), 400),
    ("bare LF after the last chunk", chunked(b"0\n\r\n"), 400),
    ("bare LF at the end of the trailers", chunked(b"0\r\n\n"), 400),
    ("bare CR at the end of the trailers", chunked(b"0\r\n\rX"), 400),
    ("bare LF after a trailer", chunked(b"0\r\nX: a\n\r\n"), 400),
    ("NUL in a trailer", chunked(b"0\r\nX: \0\r\n\r\n"), 400),
    ("trailer without a colon", chunked(b"0\r\nX\r\n\r\n"), 400),
    ("a request for a trailer", chunked(b"0\r\nGET /health HTTP/1.1\r\n\r\n"), 400),
    ("5,000 trailers", chunked(b"0\r\n" + b"X: a\r\n" * 5000 + b"\r\n"), {400, 413, 431}),
    ("trailer of 20,000 octets", chunked(b"0\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"),
     {400, 413, 431}),
    ("trailers without end", chunked(b"0\r\n" + b"X: a\r\n" * 20_000), {400, 413, 431}),
    # Expect
    *[(f"Expect {value.decode()!r}", post(b"Expect: " + value), 417)
      for value in (b"200-ok", b"100", b"100-continued", b"100-continue=1",
                    b"100-continue, x", b"x")],
    ("unknown expectation of a GET", get(b"/health", b"Expect: x"), 417),
]  # fmt: skip

# Incomplete requests that are beyond saving: the answer does not wait for the rest.
REFUSED_AT_ONCE: list[tuple[str, bytes, int | set[int]]] = [
    ("bare LF", b"GET /health HTTP/1.1\n", 400),
    ("bare LF in the first field", b"GET /health HTTP/1.1\r\nHost: localhost\n", 400),
    ("bare LF alone", b"\n", 400),
    ("bare CR", b"GET /health HTTP/1.1\rHost", 400),
    ("NUL", b"\0", 400),
    ("NUL in the target", b"GET /\0", 400),
    ("escape in a value", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \x1b", 400),
    ("DEL in a value", b"GET /health HTTP/1.1\r\nX: \x7f", 400),
    ("method without end", b"A" * 40_000, {400, 414, 431, 501}),
    ("target without end", b"GET /" + b"a" * 40_000, 414),
    ("header section without end", b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000, 431),
    ("fields without end", b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 10_000, 431),
    ("body limit passed by the announcement", framed(b"Content-Length: 1048577", body=b""), 413),
    ("coding unknown", framed(b"Transfer-Encoding: gzip", body=b""), 501),
    ("chunk size of letters", chunked(b"xyz\r\n"), 400),
    ("chunk beyond the limit", chunked(b"fffffff\r\n"), 413),
    ("chunk followed by data", chunked(b"5\r\nhelloXX"), 400),
]  # fmt: skip


# ---- odd requests to serve: name, octets, what the Request holds, status, closed afterwards ----

ODD_BUT_VALID: list[tuple[str, bytes, dict[str, object], int, bool]] = [
    # targets
    ("absolute form", get(b"http://other.example/health"),
     {"target": "http://other.example/health", "path": "/health", "host": "other.example"}, 200,
     False),
    ("absolute form in capitals", get(b"HTTP://other.example/health?x=1"),
     {"path": "/health", "query": "x=1", "host": "other.example"}, 200, False),
    ("absolute form with a port", get(b"http://localhost:8080/health"), {"path": "/health"}, 200,
     False),
    ("absolute form of an IPv6 address", get(b"http://[::1]:80/health"), {"path": "/health"}, 200,
     False),
    ("absolute form in HTTP/1.0", head(b"GET http://other.example/health HTTP/1.0", host=None),
     {"path": "/health", "host": "other.example"}, 200, True),
    ("absolute form of a POST", post(target=b"http://localhost/metrics"),
     {"path": "/metrics", "body": BATCH}, 200, False),
    ("OPTIONS *", head(b"OPTIONS * HTTP/1.1"), {"method": "OPTIONS", "target": "*"}, 200, False),
    ("encoded letter", post(target=b"/%6Detrics"), {"target": "/%6Detrics", "path": "/metrics"},
     200, False),
    ("encoded letter in lower case", post(target=b"/%6detrics"), {"path": "/metrics"}, 200, False),
    ("percent-encoding is decoded once", get(b"/%2531"), {"path": "/%31"}, 404, False),
    ("encoded metrics twice", post(target=b"/%256Detrics"), {"path": "/%6Detrics"}, 404, False),
    ("encoded UTF-8", get(b"/%C3%A9"), {"path": "/é"}, 404, False),
    ("encoded space", get(b"/a%20b"), {"path": "/a b"}, 404, False),
    ("encoded question mark", get(b"/health%3Fx"), {"path": "/health?x", "query": ""}, 404, False),
    ("encoded percent at the end", get(b"/%25"), {"path": "/%"}, 404, False),
    ("plus stays plus", get(b"/a+b"), {"path": "/a+b"}, 404, False),
    ("two slashes are a path", get(b"//health"), {"path": "//health", "host": "localhost"}, 404,
     False),
    ("dots are not resolved", get(b"/x/../health"), {"path": "/x/../health"}, 404, False),
    ("query", get(b"/health?a=b&c=%20d"), {"path": "/health", "query": "a=b&c=%20d"}, 200, False),
    ("empty query", get(b"/health?"), {"path": "/health", "query": ""}, 200, False),
    ("question mark in the query", get(b"/health??a?"), {"path": "/health", "query": "?a?"}, 200,
     False),
    ("target of 8,000 octets", get(b"/" + b"a" * 7999), {"path": "/" + "a" * 7999}, 404, False),
    ("target of 8,000 octets, mostly query", get(b"/health?" + b"a" * 7992),
     {"query": "a" * 7992}, 200, False),
    # methods
    ("method in lower case is another method", head(b"get /health HTTP/1.1"), {"method": "get"},
     405, False),
    ("method of odd characters", head(b"M-SEARCH!#$%&'*+.^_`|~1 /health HTTP/1.1"),
     {"method": "M-SEARCH!#$%&'*+.^_`|~1"}, 405, False),
    ("HEAD of /health", head(b"HEAD /health HTTP/1.1"), {"method": "HEAD"}, 200, False),
    ("HEAD of /metrics", head(b"HEAD /metrics HTTP/1.1"), {"method": "HEAD"}, 200, False),
    ("HEAD of nothing", head(b"HEAD /nowhere HTTP/1.1"), {"method": "HEAD"}, 404, False),
    ("GET with a body", get(b"/health", b"Content-Length: 5") + b"hello", {"body": b"hello"}, 200,
     False),
    ("GET with a body in chunks", get(b"/health", b"Transfer-Encoding: chunked")
     + in_chunks(SMUGGLED), {"body": SMUGGLED}, 200, False),
    ("GET with a request for a body", get(b"/health", b"Content-Length: %d" % len(SMUGGLED))
     + SMUGGLED, {"body": SMUGGLED}, 200, False),
    ("HEAD with a body", head(b"HEAD /health HTTP/1.1", b"Content-Length: 5") + b"hello",
     {"body": b"hello"}, 200, False),
    ("DELETE without a body", head(b"DELETE /metrics HTTP/1.1"), {"body": b""}, 405, False),
    # header fields
    ("empty line before the request line", b"\r\n" + HEALTH, {"path": "/health"}, 200, False),
    ("names in any case", head(b"POST /metrics HTTP/1.1", b"cOnTeNt-LeNgTh: 38", host=b"hOST: a")
     + BATCH, {"body": BATCH, "host": "a"}, 200, False),
    ("no space after the colon", head(b"GET /health HTTP/1.1", b"X:a", host=b"Host:a"),
     {"host": "a"}, 200, False),
    ("white space around a value", get(b"/health", b"X-A: \t a b\t "), {}, 200, False),
    ("tab within a value", get(b"/health", b"X-A: a\tb"), {}, 200, False),
    ("empty value", get(b"/health", b"X-A:"), {}, 200, False),
    ("octets above 0x80 in a value", get(b"/health", b"X-A: \x80\xe9\xff"), {}, 200, False),
    ("colons in a value", get(b"/health", b"X-A: a: b:"), {}, 200, False),
    ("name of odd characters", get(b"/health", b"!#$%&'*+-.^_`|~9: a"), {}, 200, False),
    ("a field again", get(b"/health", b"X-A: 1", b"X-A: 2"), {}, 200, False),
    ("100 fields", get(b"/health", *[b"X%d: a" % n for n in range(99)]), {}, 200, False),
    ("header section of 16,000 octets", get(b"/health", b"X-A: " + b"a" * 15_960), {}, 200, False),
    ("Host with a port", head(b"GET /health HTTP/1.1", host=b"Host: localhost:8080"), {}, 200,
     False),
    ("Host with an empty port", head(b"GET /health HTTP/1.1", host=b"Host: localhost:"), {}, 200,
     False),
    ("Host of an IPv4 address", head(b"GET /health HTTP/1.1", host=b"Host: 127.0.0.1:80"), {}, 200,
     False),
    ("Host of an IPv6 address", head(b"GET /health HTTP/1.1", host=b"Host: [::1]:80"), {}, 200,
     False),
    ("Host with an underscore", head(b"GET /health HTTP/1.1", host=b"Host: my_host-1"), {}, 200,
     False),
    # lengths
    ("repeated identical Content-Length", framed(*[BATCH_LENGTH] * 3), {"body": BATCH}, 200, False),
    ("Content-Length with leading zeros", framed(b"Content-Length: 00038"), {"body": BATCH}, 200,
     False),
    ("white space around Content-Length", framed(b"Content-Length: \t 38 \t"), {"body": BATCH},
     200, False),
    ("Transfer_Encoding is another field", framed(BATCH_LENGTH, b"Transfer_Encoding: chunked"),
     {"body": BATCH}, 200, False),
    ("TE is another field", framed(BATCH_LENGTH, b"TE: trailers, gzip"), {"body": BATCH}, 200,
     False),
    ("body of exactly the limit", post(body=BATCH.ljust(BODY_LIMIT_BYTES)),
     {"body": BATCH.ljust(BODY_LIMIT_BYTES)}, 200, False),
    ("chunks of exactly the limit", chunked(in_chunks(BATCH.ljust(BODY_LIMIT_BYTES), 0x40000)),
     {"body": BATCH.ljust(BODY_LIMIT_BYTES)}, 200, False),
    ("empty body", post(body=b""), {"body": b""}, 400, False),
    ("empty body in chunks", chunked(b"0\r\n\r\n"), {"body": b""}, 400, False),
    ("CHUNKED", chunked(in_chunks(BATCH), b"CHUNKED"), {"body": BATCH}, 200, False),
    ("chunked in white space", chunked(in_chunks(BATCH), b" \tChunked\t "), {"body": BATCH}, 200,
     False),
    ("chunks of one octet", chunked(in_chunks(BATCH, 1)), {"body": BATCH}, 200, False),
    ("chunk size in capitals", chunked(b"1A\r\n" + BATCH[:26] + b"\r\n0C\r\n" + BATCH[26:]
                                       + b"\r\n0\r\n\r\n"), {"body": BATCH}, 200, False),
    ("chunk size with leading zeros", chunked(b"00000026\r\n" + BATCH + b"\r\n000\r\n\r\n"),
     {"body": BATCH}, 200, False),
    ("chunk extensions", chunked(b'26;a;b=c;d="e;\\"f"\r\n' + BATCH + b"\r\n0;last\r\n\r\n"),
     {"body": BATCH}, 200, False),
    ("trailers", chunked(in_chunks(BATCH)[:-2] + b"X-Sum: 1\r\nX-Other:\r\n\r\n"), {"body": BATCH},
     200, False),
    ("framing fields as trailers", chunked(in_chunks(BATCH)[:-2] + b"Content-Length: 9\r\n"
                                           b"Transfer-Encoding: gzip\r\nHost: x\r\n\r\n"),
     {"body": BATCH, "host": "localhost"}, 200, False),
    # persistence
    ("HTTP/1.0", head(b"GET /health HTTP/1.0", host=None),
     {"version": (1, 0), "close": True, "host": ""}, 200, True),
    ("HTTP/1.0 keep-alive", head(b"GET /health HTTP/1.0", b"Connection: keep-alive"),
     {"version": (1, 0), "close": False}, 200, False),
    ("HTTP/1.0 Keep-Alive in a list", head(b"GET /health HTTP/1.0", b"Connection: x, Keep-Alive"),
     {"close": False}, 200, False),
    ("HTTP/1.0 close and keep-alive",
     head(b"GET /health HTTP/1.0", b"Connection: keep-alive, close"), {"close": True}, 200, True),
    ("HTTP/1.0 POST", framed(BATCH_LENGTH, version=b"HTTP/1.0"), {"body": BATCH, "close": True},
     200, True),
    ("HTTP/1.0 ignores the expectation", framed(BATCH_LENGTH, b"Expect: 100-continue",
                                                version=b"HTTP/1.0"), {"body": BATCH}, 200, True),
    ("HTTP/1.0 ignores an unknown expectation", framed(BATCH_LENGTH, b"Expect: x",
                                                       version=b"HTTP/1.0"), {"body": BATCH}, 200,
     True),
    ("HTTP/1.1", HEALTH, {"version": (1, 1), "close": False, "method": "GET"}, 200, False),
    ("Connection: close", get(b"/health", b"Connection: close"), {"close": True}, 200, True),
    ("Connection: CLOSE in a list", get(b"/health", b"Connection: x ,\tCLOSE"), {"close": True},
     200, True),
    ("Connection: close in a second field", get(b"/health", b"Connection: x", b"Connection: close"),
     {"close": True}, 200, True),
    ("close beats keep-alive", get(b"/health", b"Connection: keep-alive, close"), {"close": True},
     200, True),
    ("Connection: closed is no close", get(b"/health", b"Connection: closed"), {"close": False},
     200, False),
    ("Connection: keep-alive", get(b"/health", b"Connection: keep-alive"), {"close": False}, 200,
     False),
    ("POST to be closed", post(b"Connection: close"), {"body": BATCH, "close": True}, 200, True),
    ("no route, to be closed", get(b"/nowhere", b"Connection: close"), {"close": True}, 404, True),
    ("expectation in capitals", post(b"Expect: 100-CONTINUE"), {"body": BATCH}, 200, False),
]  # fmt: skip


# ---- the reader alone: octets in, requests out ----


class Outcome(NamedTuple):
    requests: list[tuple[object, ...]]
    refusal: int | None  # the status


def contents(request: Request) -> tuple[object, ...]:
    return (*request.head, request.body)


def drained(reader: RequestReader) -> Iterator[Request]:
    while (request := reader.next_request()) is not None:
        yield request


def read_in_pieces(pieces: list[bytes]) -> Outcome:
    reader = RequestReader()
    requests: list[tuple[object, ...]] = []
    try:
        for piece in pieces:
            reader.feed(piece)
            requests += map(contents, drained(reader))
    except HTTPError as error:
        assert type(error.status) is int and 400 <= error.status < 600 and str(error)
        return Outcome(requests, error.status)
    return Outcome(requests, None)


def is_among(status: int | None, statuses: int | set[int]) -> bool:
    return status in (statuses if isinstance(statuses, set) else {statuses})


@pytest.mark.parametrize("raw, statuses", by_name(MALFORMED))
def test_reader_refuses(raw, statuses):
    outcome = read_in_pieces([raw + SMUGGLED])
    assert outcome.requests == []
    assert is_among(outcome.refusal, statuses), outcome


@pytest.mark.parametrize("raw, statuses",
                         by_name([row for row in MALFORMED if len(row[1]) < 50_000]))  # fmt: skip
def test_reader_refuses_octet_by_octet(raw, statuses):
    outcome = read_in_pieces(octets_of(raw + SMUGGLED))
    assert outcome.requests == []
    assert is_among(outcome.refusal, statuses), outcome


@pytest.mark.parametrize("raw, statuses", by_name(REFUSED_AT_ONCE))
def test_reader_refuses_at_once(raw, statuses):
    outcome = read_in_pieces([raw])
    assert outcome.requests == [] and is_among(outcome.refusal, statuses), outcome


@pytest.mark.parametrize("raw", [HEALTH.replace(b"Host", b"Ho st"), chunked(b"x\r\n"), b"\n"],
                         ids=["header", "chunk", "empty line"])  # fmt: skip
def test_reader_yields_nothing_after_a_refusal(raw):
    reader = RequestReader()
    reader.feed(HEALTH + raw)
    assert reader.next_request().head.path == "/health"
    with pytest.raises(HTTPError):
        reader.next_request()
    for _ in range(3):
        try:
            reader.feed(HEALTH)
            assert reader.next_request() is None
        except HTTPError as error:
            assert error.status == 400


@pytest.mark.parametrize("raw, expected", by_name([row[:3] for row in ODD_BUT_VALID]))
def test_reader_accepts(raw, expected):
    reader = RequestReader()
    reader.feed(raw + SMUGGLED)
    request = reader.next_request()
    parts = request.head._asdict() | {"close": request.head.close, "body": request.body}
    assert {name: parts[name] for name in expected} == expected
    size = 1 if len(raw) < 50_000 else 999
    pieces = [raw[start : start + size] for start in range(0, len(raw), size)]
    assert read_in_pieces(pieces) == Outcome([contents(request)], None)


@pytest.mark.parametrize("field, name, value", [
    (b"X-A:a", "x-a", "a"), (b"x-a: \t a b\t ", "x-a", "a b"), (b"X-A: a\tb", "x-a", "a\tb"),
    (b"X-A:", "x-a", ""), (b"X-A: \t ", "x-a", ""), (b"X-A: a: b:", "x-a", "a: b:"),
    (b"ACCEPT: text/plain;q=0.5", "accept", "text/plain;q=0.5"), (b"!#$%&'*+-.^_`|~9: a",
                                                                  "!#$%&'*+-.^_`|~9", "a"),
])  # fmt: skip
def test_header_field_is_trimmed_and_named_in_lower_case(field, name, value):
    reader = RequestReader()
    reader.feed(get(b"/health", field))
    assert reader.next_request().head.headers[name] == value


def test_request_waits_for_its_last_octet():
    for raw in (HEALTH, post(), chunked(in_chunks(BATCH)), b"\r\n" + post(b"X-A: a")):
        reader = RequestReader()
        for octet in octets_of(raw[:-1]):
            reader.feed(octet)
            assert reader.next_request() is None
        reader.feed(raw[-1:])
        assert reader.next_request() is not None
        assert reader.next_request() is None


@pytest.mark.parametrize("raw", [
    chunked(b'5;a="b"\r\nhello\r\n1\r\n \r\n0005\r\nworld\r\n0;x\r\nX-Sum: 1\r\n\r\n') + HEALTH,
    post() + b"\r\n" + HEALTH,
], ids=["chunks", "length"])  # fmt: skip
def test_request_is_the_same_wherever_it_is_cut(raw):
    whole = read_in_pieces([raw])
    assert len(whole.requests) == 2 and whole.refusal is None
    for first in range(len(raw) + 1):
        assert read_in_pieces([raw[:first], raw[first:]]) == whole
        assert read_in_pieces([raw[:first], raw[first : first + 3], raw[first + 3 :]]) == whole
    assert read_in_pieces(octets_of(raw)) == whole


def test_cr_at_the_end_of_a_body_is_no_part_of_the_next_line_end():
    raw = post(body=b"x\r") + b"\n"
    whole = read_in_pieces([raw])
    assert (len(whole.requests), whole.refusal) == (1, 400)
    assert read_in_pieces([raw[:-1], raw[-1:]]) == read_in_pieces(octets_of(raw)) == whole


@pytest.mark.parametrize("pieces, count", [
    ([HEALTH * 10_000], 10_000),
    ([post() * 5_000], 5_000),
    (octets_of(post(body=b" " * 100_000)), 1),
    ([chunked(in_chunks(b" " * 100_000, 1))], 1),
    (octets_of(chunked(in_chunks(b" " * 20_000, 1))), 1),
    (octets_of(get(b"/health", b"X-A: " + b"a" * 15_000) * 5), 5),
], ids=["10,000 GETs at once", "5,000 POSTs at once", "body by octets", "chunks of an octet",
        "chunks of an octet by octets", "long heads by octets"])  # fmt: skip
def test_reader_does_not_slow_down_with_what_it_holds(pieces, count):
    outcome = read_in_pieces(pieces)
    assert (len(outcome.requests), outcome.refusal) == (count, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_head_that_was_seen_before_is_read_as_it_was_the_first_time(seed):
    rng = random.Random(seed)
    corpus = [row[1].partition(b"\r\n\r\n")[0] + b"\r\n" for row in MALFORMED + ODD_BUT_VALID]
    for section in rng.choices(corpus, k=500):
        outcomes = []
        for parse in (metricstream.parse_head, metricstream.known_head, metricstream.known_head):
            try:
                outcomes.append((*parse(section), None))
            except HTTPError as error:
                outcomes.append((error.status, str(error)))
        assert outcomes[0] == outcomes[1] == outcomes[2]


def test_an_idle_connection_holds_nothing_of_its_last_request():
    body, reader = post(body=b" " * 1_000_000), RequestReader()
    tracemalloc.start()
    try:
        reader.feed(body)
        assert reader.next_request() is not None
        assert tracemalloc.get_traced_memory()[0] < 50_000
    finally:
        tracemalloc.stop()


# ---- the same over a socket, and what only a server shows ----


def assert_says_why(answer: Answer) -> None:
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json["error"]
    assert isinstance(error, str) and error


@pytest.mark.parametrize("raw, statuses", by_name(MALFORMED))
def test_malformed_request_is_refused_and_nothing_after_it_is_answered(server, raw, statuses):
    answers, closed = exchange(server.port, raw + SMUGGLED)
    assert [is_among(answer.status, statuses) for answer in answers] == [True], answers
    assert closed and answers[0].headers["connection"] == "close"
    assert not answers[0].continued
    assert_says_why(answers[0])
    assert_healthy(server.port)


@pytest.mark.parametrize("raw, statuses", by_name(REFUSED_AT_ONCE))
def test_hopeless_request_is_refused_before_it_is_complete(server, raw, statuses):
    answers, closed = exchange(server.port, raw)
    assert [is_among(answer.status, statuses) for answer in answers] == [True], answers
    assert closed
    assert_healthy(server.port)


@pytest.mark.parametrize("raw, status, closes", by_name([(row[0], row[1], *row[3:])
                                                         for row in ODD_BUT_VALID]))  # fmt: skip
def test_odd_request_is_served(server, raw, status, closes):
    answers, closed = exchange(server.port, raw)
    assert [answer.status for answer in answers] == [status], answers
    assert closed == closes == ("close" in answers[0].headers.get("connection", ""))
    if status >= 400 and not raw.startswith(b"HEAD "):
        assert_says_why(answers[0])


@pytest.mark.parametrize("raw", by_name([row[:2] for row in ODD_BUT_VALID if row[4]]))
def test_nothing_is_answered_after_close(server, raw):
    answers, closed = exchange(server.port, raw + SMUGGLED + post())
    assert len(answers) == 1 and closed


# name, octets, status, methods that Allow must name; the connection is kept
KEPT: list[tuple[str, bytes, int, set[str]]] = [
    ("no such route", get(b"/nowhere"), 404, set()),
    ("no such route for a POST", post(target=b"/nowhere"), 404, set()),
    ("no such route for chunks", chunked(in_chunks(BATCH)).replace(b"/metrics", b"/nowhere"), 404,
     set()),
    ("route in capitals", get(b"/HEALTH"), 404, set()),
    ("route with a slash behind", get(b"/health/"), 404, set()),
    ("POST /health", post(target=b"/health"), 405, {"GET", "HEAD"}),
    ("POST /health in chunks", chunked(in_chunks(SMUGGLED)).replace(b"/metrics", b"/health"), 405,
     {"GET", "HEAD"}),
    ("PUT /metrics", post().replace(b"POST", b"PUT", 1), 405, {"GET", "HEAD", "POST"}),
    ("PATCH /metrics in chunks", chunked(in_chunks(BATCH)).replace(b"POST", b"PATCH", 1), 405,
     {"GET", "HEAD", "POST"}),
    ("DELETE /metrics", head(b"DELETE /metrics HTTP/1.1"), 405, {"GET", "HEAD", "POST"}),
    ("DELETE /health with a request for a body",
     head(b"DELETE /health HTTP/1.1", b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED, 405,
     {"GET", "HEAD"}),
    ("TRACE /health", head(b"TRACE /health HTTP/1.1"), 405, {"GET", "HEAD"}),
    ("post in lower case", post().replace(b"POST", b"post", 1), 405, {"GET", "HEAD", "POST"}),
    ("OPTIONS *", head(b"OPTIONS * HTTP/1.1"), 200, {"GET", "HEAD", "POST"}),
    ("OPTIONS /metrics", head(b"OPTIONS /metrics HTTP/1.1"), 200, {"GET", "HEAD", "POST"}),
    ("OPTIONS /health", head(b"OPTIONS /health HTTP/1.1"), 200, {"GET", "HEAD"}),
    ("OPTIONS /health with a body",
     head(b"OPTIONS /health HTTP/1.1", b"Content-Length: 5") + b"hello", 200, {"GET", "HEAD"}),
    *[(f"Content-Type {value.decode()}", post(b"Content-Type: " + value), 415, set())
      for value in (b"text/plain", b"application/x-www-form-urlencoded", b"text/json",
                    b"application/jsonx", b"application/json-seq", b"multipart/form-data")],
    *[(f"Content-Type {value.decode()}", post(b"Content-Type: " + value), 200, set())
      for value in (b"application/json", b"Application/JSON", b"application/json; charset=utf-8",
                    b"application/json;charset=UTF-8")],
    *[(f"Content-Encoding {value.decode()}", post(b"Content-Encoding: " + value), 415, set())
      for value in (b"br", b"deflate", b"zstd", b"gzipx", b"compress")],
    ("Content-Encoding identity", post(b"Content-Encoding: identity"), 200, set()),
    ("broken JSON", post(body=b'{"metrics":['), 400, set()),
    ("a request for a body", post(body=SMUGGLED), 400, set()),
    ("gzip", gzipped(gzip.compress(BATCH)), 200, set()),
    ("gzip in capitals", post(b"Content-Encoding: GZip", body=gzip.compress(BATCH)), 200, set()),
    ("gzip with a name in it",
     gzipped(b"\x1f\x8b\x08\x08\0\0\0\0\0\xffname\0" + gzip.compress(BATCH)[10:]), 200, set()),
    ("gzip in chunks", framed(b"Content-Encoding: gzip", b"Transfer-Encoding: chunked",
                              body=in_chunks(gzip.compress(BATCH), 7)), 200, set()),
    ("gzip of exactly the limit", gzipped(gzip.compress(BATCH.ljust(BODY_LIMIT_BYTES))), 200,
     set()),
    ("gzip of no gzip", gzipped(BATCH), 400, set()),
    ("gzip of nothing", gzipped(b""), 400, set()),
    ("gzip of empty text", gzipped(gzip.compress(b"")), 400, set()),
    ("gzip of broken JSON", gzipped(gzip.compress(BATCH[:-1])), 400, set()),
    ("gzip header only", gzipped(gzip.compress(BATCH)[:10]), 400, set()),
    ("gzip cut in the middle", gzipped(gzip.compress(BATCH)[:-20]), 400, set()),
    ("gzip cut in its checksum", gzipped(gzip.compress(BATCH)[:-1]), 400, set()),
    ("gzip without its checksum", gzipped(gzip.compress(BATCH)[:-8]), 400, set()),
    ("gzip with a wrong checksum", gzipped(gzip.compress(BATCH)[:-8] + b"\0" * 8), 400, set()),
    ("gzip with a wrong length", gzipped(gzip.compress(BATCH)[:-4] + b"\0" * 4), 400, set()),
    ("gzip with a wrong method", gzipped(b"\x1f\x8b\x07" + gzip.compress(BATCH)[3:]), 400, set()),
    ("gzip with garbage behind", gzipped(gzip.compress(BATCH) + b"garbage"), 400, set()),
    ("gzip with a zero behind", gzipped(gzip.compress(BATCH) + b"\0"), 400, set()),
    ("zlib for gzip", gzipped(b"x\x9c\x03\0\0\0\0\x01"), 400, set()),
]  # fmt: skip


@pytest.mark.parametrize("raw, status, allowed", by_name(KEPT))
def test_sound_framing_keeps_the_connection_whatever_the_status(server, raw, status, allowed):
    answers, closed = exchange(server.port, raw)
    assert [answer.status for answer in answers] == [status], answers
    assert not closed
    if allowed:
        assert allowed <= set(re.split(r"\s*,\s*", answers[0].headers["allow"]))
    if status >= 400:
        assert_says_why(answers[0])


def test_415_says_which_header_to_send(server):
    for raw in (post(b"Content-Type: text/plain"), post(b"Content-Encoding: br")):
        answers, _ = exchange(server.port, raw)
        assert re.search("application/json|gzip", answers[0].json["error"])


def test_answer_carries_date_type_and_length(server):
    for raw in (HEALTH, get(b"/metrics"), get(b"/nowhere"), post(), post(body=b"x")):
        answers, _ = exchange(server.port, raw)
        headers = answers[0].headers
        assert re.fullmatch(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} "
                            r"\d\d:\d\d:\d\d GMT", headers["date"])  # fmt: skip
        assert headers["content-type"].startswith("application/json")
        assert headers["content-length"] == str(len(answers[0].body))


@pytest.mark.parametrize("path", [b"/health", b"/metrics", b"/nowhere"])
def test_head_is_get_without_the_body(server, path):
    raw = head(b"HEAD " + path + b" HTTP/1.1") + get(path)
    (to_head, to_get), closed = exchange(server.port, raw, expect=2)
    assert not closed
    assert to_head.body == b"" and to_get.body
    assert to_head.status == to_get.status
    assert to_head.headers.keys() == to_get.headers.keys()
    assert to_head.headers["content-type"] == to_get.headers["content-type"]
    assert int(to_head.headers["content-length"]) > 0


PIPELINE = [
    (HEALTH, 200), (post(), 200), (get(b"/nowhere"), 404), (chunked(in_chunks(BATCH)), 200),
    (head(b"DELETE /health HTTP/1.1"), 405), (post(body=b"{}"), 400), (b"\r\n" + HEALTH, 200),
    (post(b"Content-Type: text/plain"), 415), (gzipped(gzip.compress(BATCH)), 200),
    (head(b"HEAD /health HTTP/1.1"), 200),
]  # fmt: skip


@pytest.mark.parametrize("piece_bytes", [100_000, 97, 1], ids=["at once", "in pieces", "by octets"])
def test_ten_pipelined_requests_are_answered_in_order(server, piece_bytes):
    raw = b"".join(request for request, _ in PIPELINE)
    with connect(server.port) as connection, connection.makefile("rb") as stream:
        for start in range(0, len(raw), piece_bytes):
            connection.sendall(raw[start : start + piece_bytes])
        answers = [read_answer(stream, to_head=n == 9) for n in range(10)]
        assert [answer.status for answer in answers] == [status for _, status in PIPELINE]
        connection.sendall(HEALTH)
        assert is_healthy(read_answer(stream))


def test_thousands_of_pipelined_requests_are_answered(server):
    answers, closed = exchange(server.port, get(b"/nowhere") * 500 + HEALTH * 500, expect=1000)
    assert [answer.status for answer in answers] == [404] * 500 + [200] * 500
    assert not closed


def test_what_came_before_a_malformed_request_is_answered(server):
    raw = HEALTH + post() + get(b"/health", b"X : y") + SMUGGLED
    answers, closed = exchange(server.port, raw, expect=3)
    assert [answer.status for answer in answers] == [200, 200, 400]
    assert closed


@pytest.mark.parametrize("raw", [HEALTH, post(), chunked(b"5;a\r\nhello\r\n0\r\nX: y\r\n\r\n")],
                         ids=["GET", "POST", "chunks"])  # fmt: skip
def test_request_may_arrive_octet_by_octet(server, raw):
    with connect(server.port) as connection, connection.makefile("rb") as stream:
        for octet in octets_of(raw):
            connection.sendall(octet)
        assert read_answer(stream).status == (400 if b"hello" in raw else 200)
        connection.sendall(HEALTH)
        assert is_healthy(read_answer(stream))


@pytest.mark.parametrize("make, behind", [
    (lambda: b"\0" * 10_000_000, b""), (lambda: BATCH.ljust(BODY_LIMIT_BYTES + 1), b""),
    (lambda: BATCH + b" " * 20_000_000, b"garbage"), (lambda: b"[" * 20_000_000, b""),
    (lambda: tagged_metrics(1000, b"v" * 1024), b""),
], ids=["10 MB of zeros", "one octet beyond the limit", "20 MB of spaces and garbage", "brackets",
        "a thousand metrics, 32 tags each"])  # fmt: skip
def test_gzip_that_is_too_large_is_refused(watched, make, behind):
    (started, _), content = watched, make()
    packed = gzip.compress(content, 1) + behind
    assert len(packed) < BODY_LIMIT_BYTES < len(content)
    (answer,), closed = exchange(started.port, gzipped(packed))
    assert (answer.status, closed) == (413, False)
    assert_says_why(answer)
    assert "gzip body of more than 1048576 bytes decoded" in answer.json["error"]
    assert_healthy(started.port)


# ---- Expect: 100-continue ----


@pytest.mark.parametrize("framing, body", [
    (BATCH_LENGTH, BATCH),
    (b"Transfer-Encoding: chunked", in_chunks(BATCH)),
], ids=["length", "chunks"])  # fmt: skip
def test_expectation_is_met_before_the_body_is_sent(server, framing, body):
    with connect(server.port) as connection, connection.makefile("rb") as stream:
        for _ in range(3):
            connection.sendall(framed(framing, b"Expect: 100-continue", body=b""))
            assert read_answer(stream).status == 100
            connection.sendall(body)
            assert read_answer(stream).status == 200


def test_expectation_is_met_once_when_the_head_comes_in_pieces(server):
    with connect(server.port) as connection, connection.makefile("rb") as stream:
        for octet in octets_of(framed(BATCH_LENGTH, b"Expect: 100-continue", body=b"")):
            connection.sendall(octet)
        assert read_answer(stream).status == 100
        for octet in octets_of(BATCH):
            connection.sendall(octet)
        assert read_answer(stream).status == 200
        connection.sendall(HEALTH)
        assert is_healthy(read_answer(stream))


@pytest.mark.parametrize("raw, statuses", by_name([
    ("too large", framed(b"Content-Length: 1048577", b"Expect: 100-continue", body=b""), 413),
    ("another expectation", framed(BATCH_LENGTH, b"Expect: 200-ok", body=b""), 417),
    ("two framings", framed(BATCH_LENGTH, b"Transfer-Encoding: chunked", b"Expect: 100-continue",
                            body=b""), 400),
    ("unknown coding", framed(b"Transfer-Encoding: gzip", b"Expect: 100-continue", body=b""), 501),
    ("no length", framed(b"Expect: 100-continue", body=b""), 411),
    ("no Host", framed(BATCH_LENGTH, b"Expect: 100-continue", body=b"")
     .replace(b"Host", b"X-Host"), 400),
]))  # fmt: skip
def test_body_that_will_not_be_read_is_not_asked_for(server, raw, statuses):
    answers, closed = exchange(server.port, raw)
    assert [is_among(answer.status, statuses) for answer in answers] == [True], answers
    assert closed and not answers[0].continued


def test_http_1_0_gets_no_interim_answer(server):
    raw = framed(BATCH_LENGTH, b"Expect: 100-continue", body=b"", version=b"HTTP/1.0")
    with connect(server.port) as connection, connection.makefile("rb") as stream:
        connection.sendall(raw)
        connection.sendall(BATCH)
        assert read_answer(stream).status == 200
        assert read_answer(stream) is None


# ---- ends and accidents ----


@pytest.mark.parametrize("raw", by_name([
    ("nothing", b""),
    ("request line", b"POST /metrics HTTP/1.1\r\n"),
    ("head without its empty line", post(body=b"")[:-2]),
    ("head only", framed(BATCH_LENGTH, body=b"")),
    ("body without its last octet", post()[:-1]),
    ("body without its last octet, to be closed", post(b"Connection: close")[:-1]),
    ("HTTP/1.0 body without its last octet", framed(BATCH_LENGTH, body=BATCH[:-1],
                                                    version=b"HTTP/1.0")),
    ("whole JSON shorter than its length", framed(b"Content-Length: 39")),
    ("chunks without the last chunk", chunked(in_chunks(BATCH)[:-5])),
    ("chunks without the last CRLF", chunked(in_chunks(BATCH)[:-2])),
    ("chunks without the last LF", chunked(in_chunks(BATCH)[:-1])),
    ("chunk size without CRLF", chunked(b"26")),
    ("chunk without its CRLF", chunked(b"26\r\n" + BATCH)),
    ("trailers without their end", chunked(in_chunks(BATCH)[:-2] + b"X: a\r\n")),
    ("expectation without a body", framed(BATCH_LENGTH, b"Expect: 100-continue", body=b"")),
]))  # fmt: skip
def test_truncated_request_is_never_acknowledged(server, raw):
    answers, closed = exchange(server.port, raw, half_close=True)
    assert closed
    assert [answer.status for answer in answers] in ([], [400], [408])
    assert_healthy(server.port)


@pytest.mark.parametrize("raw, statuses", [
    (HEALTH, [200]), (post(), [200]), (chunked(in_chunks(BATCH)), [200]),
    (HEALTH + post() + get(b"/nowhere"), [200, 200, 404]), (HEALTH + post()[:-1], [200]),
], ids=["GET", "POST", "chunks", "three requests", "one and a part"])  # fmt: skip
def test_whole_requests_are_answered_after_the_client_shut_its_side(server, raw, statuses):
    answers, closed = exchange(server.port, raw, half_close=True)
    assert closed
    assert [answer.status for answer in answers][: len(statuses)] == statuses
    assert all(answer.status in (400, 408) for answer in answers[len(statuses) :])


@pytest.mark.parametrize("raw, status", [
    (get(b"/health", b"X : y"), 400),
    (framed(b"Content-Length: 200000000", body=b""), 413),
    (framed(body=b""), 411),
    (get(b"/" + b"a" * 9000), 414),
    (chunked(b"x\r\n"), 400),
    (post(b"Expect: x", body=b""), 417),
    (get(b"/health", b"Connection: close"), 200),
], ids=["400", "413", "411", "414", "bad chunk", "417", "Connection: close"])  # fmt: skip
@pytest.mark.parametrize("eager", [True, False], ids=["sends on blindly", "sends on after reading"])
def test_client_that_goes_on_sending_reads_its_answer_and_no_reset(server, raw, status, eager):
    with connect(server.port) as connection, connection.makefile("rb") as stream:
        connection.sendall(raw)
        if not eager:
            assert len(stream.peek(1)) >= 1
        for _ in range(50):
            send_what_is_taken(connection, SMUGGLED * 100)  # 200 KB and more in all
        assert read_answer(stream).status == status
        assert stream.read() == b""


def test_peer_that_resets_in_the_middle_harms_nobody(server):
    for raw in (HEALTH[:-2], post()[:-1], chunked(b"26\r\n"), HEALTH, post(), b"\n"):
        connection = connect(server.port)
        connection.sendall(raw)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        assert_healthy(server.port)


def test_statistics_are_served_after_all_this(server):
    answers, closed = exchange(server.port, get(b"/metrics"))
    assert answers[0].status == 200 and not closed
    assert isinstance(answers[0].json, dict) and answers[0].json


def test_the_tables_hold_more_than_a_hundred_situations():
    assert len(MALFORMED) >= 120 and len(ODD_BUT_VALID) >= 60
    for table in (MALFORMED, REFUSED_AT_ONCE, ODD_BUT_VALID, KEPT):
        assert len({row[0] for row in table}) == len(table), "two rows of one name"


# ---- damaged requests ----

def a_request(rng: random.Random) -> bytes:
    """One or two whole requests, each sound in itself or a row of the tables."""
    if rng.random() < 0.4:
        sound, malformed = ([row[1] for row in table if len(row[1]) < 2000]
                            for table in (ODD_BUT_VALID, MALFORMED))  # fmt: skip
        last = rng.choice(sound if rng.random() < 0.8 else malformed)
        return rng.choice(sound) + last + rng.choice([b"", HEALTH, post()])
    batch = random_fast_body(rng) if rng.random() < 0.5 else BATCH
    extended = b"".join(
        b"%x ; a=b\r\n%b\r\n" % (len(piece), piece) for piece in (batch[:9], batch[9:]) if piece
    )
    sound = [
        lambda: HEALTH,
        lambda: get(b"/metrics", b"Accept: text/plain;q=0.5, */*;q=0.1"),
        lambda: get(b"http://localhost:8080/metrics?x=%41"),
        lambda: get(b"/%68ealth", b"Connection: close"),
        lambda: head(b"HEAD /health HTTP/1.0", host=None),
        lambda: head(b"GET /metrics HTTP/1.0", b"Connection: keep-alive"),
        lambda: head(b"OPTIONS * HTTP/1.1"),
        lambda: head(b"PUT /metrics HTTP/1.1", b"Content-Length: 0"),
        lambda: b"\r\n" + post(body=batch),
        lambda: post(b"Content-Type: application/json; charset=utf-8", b"Authorization: web1", body=batch),
        lambda: post(b"Expect: 100-continue", b"Origin: http://localhost", body=batch),
        lambda: gzipped(gzip.compress(batch)),
        lambda: gzipped(gzip.compress(batch[:20]) + gzip.compress(batch[20:])),
        lambda: chunked(in_chunks(batch)),
        lambda: chunked(extended + b"0;last\r\nX-Sum: 1\r\nX-Note: two\r\n\r\n"),
        lambda: framed(BATCH_LENGTH, version=b"HTTP/1.0"),
    ]  # fmt: skip
    return b"".join(rng.choice(sound)() for _ in range(rng.choice([1, 1, 2])))


HTTP_TOKENS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"%", b"%00",
    b"%0d%0a", b"#", b"?", b"\x7f", b"\x80", b"%41", b"*", b"/", b"0", b"5", b"+", b"-", b"_",
    b"chunked", b"gzip", b"Content-Length: 5\r\n", b"Expect: x\r\n", b"X: y\r\n", b"HTTP/1.0",
    b"http://a/", b"5\r\nhello\r\n", SMUGGLED,
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Content-Length: +5\r\n",
    b"Content-Length: 0\r\n", b"Content-Length: 5, 5\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Content-Length: -1\r\n", b"Content-Length: 1048577\r\n", b"Expect: 200-maybe\r\n",
    b"Host: b\r\n",
    b"Content-Encoding: gzip\r\n", b"Content-Encoding: br\r\n", b"Connection: close\r\n",
    b"Origin: null\r\n",
    b"Content-Type: text/plain\r\n", b" folded\r\n", b"no colon\r\n", b"X: \xff\x80\r\n",
    b"0\r\n\r\n", b"0\r\n",
    b"ffffffffffffffff\r\n", b"10000000000000000\r\n", b"-1\r\n", b"0x5\r\n", b"5;a=\"\n\"\r\n",
    b"HTTP/1.1",
    b"HTTP/2.0", b"HTTP/0.9", b"GET ", b"POST /metrics HTTP/1.1\r\n", b"CONNECT ", b"\x1f\x8b\x08",
    b"[::1]",
    b"a" * 9_000, b"X: " + b"a" * 17_000 + b"\r\n", b"X: a\r\n" * 101,
]  # fmt: skip


def a_damaged_request(rng: random.Random) -> bytes:
    return damaged(rng, a_request(rng), HTTP_TOKENS, lambda: a_request(rng))


# The README's table of statuses: what the reader may say, and what the service may. 408, 429, 500
# and 503 would mean more than a bad request.
READER_STATUSES = {400, 411, 413, 414, 417, 431, 501, 505}
SERVICE_STATUSES = {200, 400, 403, 404, 405, 413, 415}


@pytest.fixture
def forgetful_service(tmp_path: Path) -> Iterator[Service]:
    """A service whose log writes to nowhere."""
    log = MetricLog(str(tmp_path), write=lambda _, lines: len(lines))
    with contextlib.closing(log):
        yield Service(log, None, Statistics())


@pytest.mark.parametrize("seed", range(scaled(4, 80)))
def test_damaged_requests_are_read_the_same_in_any_pieces(forgetful_service, seed):
    """Whole, octet by octet or in between: the same requests and the same end; then an answer."""
    rng = random.Random(f"requests {seed}")
    seen: Counter[int | None] = Counter()
    refused = 0
    for _ in range(2_000):
        raw = a_damaged_request(rng)
        whole = read_in_pieces([raw])
        pieces = (
            octets_of(raw) if rng.random() < 0.03 and len(raw) < 999 else in_random_pieces(rng, raw)
        )
        cut = read_in_pieces(pieces)
        # Of several faults the first to be seen is told: that of size can be before the line ends.
        if {414, 431} & {whole.refusal, cut.refusal} and None not in (whole.refusal, cut.refusal):
            cut = cut._replace(refusal=whole.refusal)
        assert cut == whole, raw
        assert whole.refusal in READER_STATUSES | {None}, raw
        seen[whole.refusal] += 1
        refused += whole.refusal is not None
        reader = RequestReader()
        reader.feed(raw)
        for _ in whole.requests:
            answer = forgetful_service.answer(reader.next_request(), "10.0.0.7", 0.0)
            assert answer.response.status in SERVICE_STATUSES, raw
            seen[answer.response.status] += 1
    assert {None, 200, 400, 403, 404, 405, 411, 415, 417, 431} <= seen.keys(), seen
    assert seen[200] > 50 and refused > 50, "neither all sound nor all damaged"


@at_once([1, 0])
def test_damaged_requests_over_a_socket_get_an_answer_or_the_end(tmp_path, threads):
    """Nothing hangs, nothing is a fault of the server's own, and there are as many answers as the
    reader finds requests and faults.
    """
    rng = random.Random(f"socket {threads}")
    seen: Counter[int] = Counter()
    with ServerProcess(tmp_path, "--threads", str(threads), "--rate-limit", "0") as started:
        for _ in range(scaled(1_000, 30_000)):
            raw = a_damaged_request(rng)
            outcome = read_in_pieces([raw])
            heads = [
                index for index, request in enumerate(outcome.requests) if request[0] == "HEAD"
            ]
            answers, closed = exchange(
                started.port, raw, half_close=True, timeout_s=10, heads=heads
            )
            assert closed
            for answer in answers:
                assert answer.status in READER_STATUSES | SERVICE_STATUSES, raw
                seen[answer.status] += 1
            *_, last = answers or [None]
            until_close = [index for index, request in enumerate(outcome.requests, 1)
                           if request[-2] is metricstream.CLOSE]  # fmt: skip
            if until_close:
                assert len(answers) == until_close[0], raw
            elif outcome.refusal:
                assert len(answers) == len(outcome.requests) + 1, raw
            else:  # what is left of a request when the client ends it is a 400
                assert len(answers) - len(outcome.requests) in (0, 1), raw
                assert len(answers) == len(outcome.requests) or last.status == 400, raw
        assert_healthy(started.port)
        status, out, err = started.stop()
    assert (status, err) == (0, "") and "Traceback" not in out and '"500"' not in out
    assert {200, 400, 404, 405, 411, 415, 431} <= seen.keys()


# ==================================================================================================
# Rate limiting
# ==================================================================================================


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
def test_limiter_decides_as_a_list_of_all_times_would(limit):
    rng, clock = random.Random(limit), Clock()
    limiter = SlidingWindowLimiter(limit, clock=clock, stripes=4)
    allowed_at: dict[str, list[float]] = {client: [] for client in "abc"}
    verdicts: Counter[bool] = Counter()
    step_s = 0.5 ** round(math.log2(limit))  # binary fractions, so that no time is rounded
    for _ in range(5000):
        clock.now += rng.choice((0.0, 0.125, 0.25, 0.5)) * step_s
        client = rng.choice("abc")
        window = [then for then in allowed_at[client] if clock.now - then < 1.0]
        decision = limiter.decide(client)
        assert decision.allowed == (len(window) < limit)
        if decision.allowed:
            assert decision.remaining == limit - len(window) - 1
            allowed_at[client].append(clock.now)
        else:
            assert decision.remaining == 0
            assert decision.retry_after_s == window[0] + 1.0 - clock.now
        verdicts[decision.allowed] += 1
    assert verdicts[True] > 500 and verdicts[False] > 500


def test_the_wait_that_a_refusal_names_is_exact():
    clock = Clock()
    limiter = SlidingWindowLimiter(2, clock=clock)
    limiter.decide("a")
    clock.now += 0.25
    limiter.decide("a")
    wait_s = limiter.decide("a").retry_after_s
    clock.now += wait_s - 2**-20
    assert not limiter.decide("a").allowed
    clock.now += 2**-20
    assert limiter.decide("a").allowed


def test_a_refused_request_does_not_lengthen_the_wait():
    clock = Clock()
    limiter = SlidingWindowLimiter(1, clock=clock)
    limiter.decide("a")
    for _ in range(9):
        clock.now += 0.1
        assert not limiter.decide("a").allowed
    clock.now = 1001.0
    assert limiter.decide("a").allowed


def test_a_client_seen_once_costs_well_under_200_bytes():
    clients = [f"client_{number}" for number in range(60_000)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        limiter = SlidingWindowLimiter(1000, clock=Clock(), max_clients=1_000_000)
        for client in clients:
            limiter.decide(client)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert limiter.tracked == 60_000
    assert used / 60_000 < 150  # the ids are the caller's


def test_idle_clients_are_forgotten_as_others_come():
    clock = Clock()
    limiter = SlidingWindowLimiter(5, clock=clock, stripes=1)
    for number in range(50_000):
        clock.now += 0.01  # so that 100 clients are within the window
        limiter.decide(str(number))
        assert limiter.tracked <= 202  # of this window and of the one before
    assert limiter.evicted == 0


def test_beyond_the_cap_clients_that_were_not_used_lately_are_evicted():
    limiter = SlidingWindowLimiter(1, clock=Clock(), stripes=1, max_clients=4)
    for client in ("a", "b", "c", "a", "d"):  # b is the one not used for longest
        limiter.decide(client)
    assert (limiter.tracked, limiter.evicted) == (3, 1)
    assert [limiter.decide(client).allowed for client in ("a", "c", "d", "b")] == [False] * 3 + [
        True
    ]


def test_every_decision_is_flushed_once_while_32_threads_hammer():
    clock = Clock()
    limiter = SlidingWindowLimiter(
        100, clock=clock, stripes=4, max_clients=40
    )  # fewer than there are
    decided: Counter[bool] = Counter()
    counting = threading.Lock()
    hammering = threading.Barrier(33)

    def hammer(number: int) -> None:
        rng, mine = random.Random(number), Counter[bool]()
        hammering.wait()
        for _ in range(2000):
            mine[limiter.decide(f"client {rng.randrange(60)}").allowed] += 1
        with counting:
            decided.update(mine)

    flushed: Counter[bool] = Counter()

    threads = [threading.Thread(target=hammer, args=(number,), daemon=True) for number in range(32)]
    for thread in threads:
        thread.start()
    hammering.wait()
    reports = 0

    def asked(client: str, allowed: int, refused: int) -> None:
        nonlocal reports
        reports += 1
        flushed.update({True: allowed, False: refused})

    def drain() -> None:
        for tallies in limiter.drain():
            for client, (allowed, refused) in tallies.items():
                asked(client, allowed, refused)

    while any(thread.is_alive() for thread in threads):
        drain()
    for thread in threads:
        thread.join(30)
    drain()
    assert decided.total() == 32 * 2000
    assert flushed == decided and reports > 60


def test_a_report_may_ask_the_limiter_itself():
    limiter = SlidingWindowLimiter(100, stripes=1)
    limiter.decide("a")
    seen = []

    def report() -> None:
        for tallies in limiter.drain():
            seen.extend(tallies.items())
            limiter.decide("b")  # would deadlock if a lock were held

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    reporter.join(10)
    assert not reporter.is_alive() and seen == [("a", (1, 0))]


@pytest.mark.parametrize("stripes", [0, 3, 100])
def test_the_number_of_stripes_is_a_power_of_two(stripes):
    with pytest.raises(ValueError, match="power of two"):
        SlidingWindowLimiter(1, stripes=stripes)


def test_a_lowered_rate_names_the_exact_wait():
    times = iter([0.0, 0.1, 0.2, 0.3, 0.4])
    limiter = SlidingWindowLimiter(4, clock=times.__next__)
    for _ in range(4):
        assert limiter.decide("web1").allowed
    # of the four, all but one must have left the window: the third does so at 1.2
    assert limiter.decide("web1", 2) == (False, 0, pytest.approx(0.8))


def test_a_million_client_ids_are_remembered_in_bounded_memory():
    """In this process: what the limiter holds is bounded, and given back when they are idle."""
    now = [0.0]
    limiter = SlidingWindowLimiter(10, clock=lambda: now[0])
    tracemalloc.start()
    try:
        most = 0
        for number in range(scaled(110_000, 1_000_000)):
            now[0] += 1e-6  # all within the second, as fast as nobody can send
            assert limiter.decide(f"client {number}").allowed
            if number % 20_000 == 0:
                most = max(most, tracemalloc.get_traced_memory()[0])
        assert limiter.tracked <= metricstream.MAX_TRACKED_CLIENTS
        assert most < 64 * MIB
        now[0] += 2
        assert sum(allowed for tally in limiter.drain() for allowed, _ in tally.values()) > number
        assert limiter.tracked == 0
        assert tracemalloc.get_traced_memory()[0] < 2 * MIB
    finally:
        tracemalloc.stop()


@needs_proc
@at_once()
def test_client_ids_without_end_take_less_than_150_mib(tmp_path):
    options = ("--log-level", "warning", "--rate-limit", "1000")
    with ServerProcess(tmp_path, *options) as started, connect(started.port, 60) as client:
        pid = started.process.pid
        assert len(post_latencies(started.port, 100)) == 100
        before = Footprint.of(pid).resident_bytes
        most = before
        count, step = scaled(12_000, 1_000_000), 200
        with client.makefile("rb") as answers:
            for start in range(0, count, step):
                client.sendall(b"".join(post(b"Authorization: client-%d" % number)
                                        for number in range(start, start + step)))  # fmt: skip
                for _ in range(step):
                    answer = read_answer(answers, False)
                    assert answer is not None and answer.status == 200
                most = max(most, Footprint.of(pid).resident_bytes)
        assert most - before < 150 * MIB
        # Idle ids are forgotten all along; once a minute the rest of them, and the tallies too.
        # What stays are the memos and the ring, which are as large after any number of ids.
        eventually(lambda: Footprint.of(pid).resident_bytes - before < 32 * MIB, 100)
        assert started.stop()[0] == 0


def paced_posts(
    port: int, clients: int, per_second: float, duration_s: float, flood: int = 0
) -> tuple[list[int], Counter[int]]:
    """The statuses of the posts of so many clients at so many a second each, and of those of one
    more client, which posts so often in each turn.
    """
    statuses: list[int] = []
    flooded: Counter[int] = Counter()
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(port, 30)) for _ in range(clients)]
        requests = [post(b"Authorization: good-%d" % number) for number in range(clients)]
        flooder = stack.enter_context(connect(port, 30))
        answers = stack.enter_context(flooder.makefile("rb"))
        began = time.monotonic()
        for turn in range(int(per_second * duration_s)):
            threading.Event().wait(max(0.0, began + turn / per_second - time.monotonic()))
            flooder.sendall(post(b"Authorization: flood") * flood)
            for connection, request in zip(connections, requests, strict=True):
                connection.sendall(request)
            for connection in connections:
                statuses.append(answer_on(connection).status)
            for _ in range(flood):
                answer = read_answer(answers)
                assert answer is not None
                flooded[answer.status] += 1
            if time.monotonic() - began > duration_s:
                break
    return statuses, flooded


def test_one_client_at_ten_times_its_limit_takes_nothing_from_the_others(tmp_path):
    limit, others, seconds = 200, 10, 0.6
    with ServerProcess(tmp_path, "--rate-limit", str(limit), "--log-level", "warning") as started:
        quiet, _ = paced_posts(started.port, others, limit / 2, seconds)
        besieged_, flooded = paced_posts(started.port, others, limit / 2, seconds, flood=20)
        assert set(quiet) == set(besieged_) == {200}
        assert len(besieged_) > 0.8 * len(quiet) > 0, (len(besieged_), len(quiet))
        assert flooded[429] > limit and set(flooded) == {200, 429}
        statistics = answer_once(started.port, get(b"/metrics")).json
        assert statistics["rate_limited_requests"] == flooded[429]  # only the flooder's


# ==================================================================================================
# JSON
# ==================================================================================================


def nested(levels: int, inner: bytes = b"") -> bytes:
    return b"[" * levels + inner + b"]" * levels


# Every situation in which RFC 8259 leaves no choice but to accept, and this server's own choices.
ACCEPTED: list[tuple[str, bytes, object]] = [
    # literals and white space
    ("null alone", b"null", None),
    ("true alone", b"true", True),
    ("false alone", b"false", False),
    ("all literals", b"[null,true,false]", [None, True, False]),
    ("space before", b" true", True),
    ("space after", b"true ", True),
    ("newline after", b"true\n", True),
    ("each white space", b" \t\r\n[ \t\r\n1 \t\r\n, \t\r\n2 \t\r\n] \t\r\n", [1, 2]),
    ("white space in object", b'\r\n{\t"a" :\n1 ,"b"\r: 2\t}\n', {"a": 1, "b": 2}),
    # arrays
    ("empty array", b"[]", []),
    ("empty array spaced", b"[ \n ]", []),
    ("array of empty string", b'[""]', [""]),
    ("array of one", b"[1]", [1]),
    ("array of array", b"[[]   ]", [[]]),
    ("arrays side by side", b"[[],[[]],{}]", [[], [[]], {}]),
    ("mixed array", b'[null, 1, "1", {}]', [None, 1, "1", {}]),
    ("several nulls", b"[1,null,null,null,2]", [1, None, None, None, 2]),
    ("leading space in array", b"[ 1]", [1]),
    ("trailing space in array", b"[2] ", [2]),
    ("line break in array", b"[1\n]", [1]),
    ("64 levels of arrays", nested(64), json.loads(nested(64))),
    ("64 levels of objects", b'{"a":' * 63 + b"{}" + b"}" * 63,
     json.loads('{"a":' * 63 + "{}" + "}" * 63)),
    ("64 levels twice", b"[" + nested(63) + b"," + nested(63) + b"]", [json.loads(nested(63))] * 2),
    ("1000 siblings", b"[" + b"[]," * 999 + b"[]]", [[]] * 1000),
    # objects
    ("empty object", b"{}", {}),
    ("one member", b'{"a":"b"}', {"a": "b"}),
    ("two members", b'{"a":[],"b":{}}', {"a": [], "b": {}}),
    ("empty name", b'{"":0}', {"": 0}),
    ("last duplicate wins", b'{"a":"b","a":"c"}', {"a": "c"}),
    ("duplicate of same value", b'{"a":"b","a":"b"}', {"a": "b"}),
    ("duplicate by escape", b'{"a":1,"\\u0061":2}', {"a": 2}),
    ("last duplicate wins deep down", b'{"a":{"b":1},"a":{"c":2}}', {"a": {"c": 2}}),
    ("escaped NUL in name", b'{"a\\u0000b":42}', {"a\0b": 42}),
    ("extreme numbers in object", b'{"min":-1.0e+28,"max":1.0e+28}', {"min": -1e28, "max": 1e28}),
    ("long strings in object", b'{"x":[{"id":"' + b"a" * 40 + b'"}],"id":"' + b"b" * 40 + b'"}',
     {"x": [{"id": "a" * 40}], "id": "b" * 40}),
    ("object with newlines", b'{\n"a": "b"\n}', {"a": "b"}),
    ("name in Cyrillic escapes", b'{"\\u041f\\u043e":"\\u043b"}', {"По": "л"}),
    ("names that look like fields", b'{"__class__":1,"metrics":2}', {"__class__": 1, "metrics": 2}),
    # integers stay int
    ("zero", b"0", 0),
    ("minus zero", b"-0", 0),
    ("one digit", b"7", 7),
    ("negative", b"-42", -42),
    ("minus one in array", b"[-1]", [-1]),
    ("past 2**53", b"9007199254740993", 9007199254740993),
    ("past 2**64", b"100000000000000000000", 10**20),
    ("300 digits", b"9" * 300, 10**300 - 1),
    ("largest power of ten", b"1" + b"0" * 308, 10**308),
    ("negative past 2**64", b"-237462374673276894279832", -237462374673276894279832),
    # floats stay float
    ("zero with fraction", b"0.0", 0.0),
    ("minus zero with fraction", b"-0.0", -0.0),
    ("minus zero with exponent", b"-0e1", -0.0),
    ("whole float", b"1.0", 1.0),
    ("fraction", b"123.456789", 123.456789),
    ("exponent e", b"1e2", 100.0),
    ("exponent E", b"1E22", 1e22),
    ("exponent plus", b"1e+2", 100.0),
    ("exponent minus", b"1E-2", 0.01),
    ("exponent leading zero", b"1e02", 100.0),
    ("fraction and exponent", b"123.456e78", 123.456e78),
    ("zero exponent", b"0e+1", 0.0),
    ("zero exponent E", b"0E1", 0.0),
    ("close to zero", b"-0." + b"0" * 77 + b"1", -1e-78),
    ("halves round to even", b"9007199254740993.0", 9007199254740992.0),
    ("largest float", b"1.7976931348623157e308", 1.7976931348623157e308),
    ("smallest float", b"5e-324", 5e-324),
    ("underflow is zero", b"123e-10000000", 0.0),
    ("negative underflow is minus zero", b"-1e-999", -0.0),
    ("zero with huge exponent", b"0e999999", 0.0),
    ("1000 characters of number", b"0." + b"1" * 998, float("0." + "1" * 998)),
    ("number after space", b"[ 4.5]", [4.5]),
    # strings
    ("empty string", b'""', ""),
    ("blank string", b'" "', " "),
    ("plain string", b'"asd"', "asd"),
    ("every short escape", rb'"\"\\\/\b\f\n\r\t"', '"\\/\b\f\n\r\t'),
    ("escaped NUL", rb'"\u0000"', "\0"),
    ("escaped control", rb'"\u0012"', "\x12"),
    ("escaped quote", rb'"\u0022"', '"'),
    ("escaped backslash", rb'"\u005C"', "\\"),
    ("hex in either case", rb'"\uABCD\uabcd\uAbCd"', "\uabcd" * 3),
    ("backslash then u", rb'"\\u0041"', "\\u0041"),
    ("backslashes in pairs", rb'"\\\\"', "\\\\"),
    ("escape beside escape", rb'"\u0060\u012a\u12AB"', "\u0060\u012a\u12ab"),
    ("escaped surrogate pair", rb'"\uD834\uDd1e"', "\U0001d11e"),
    ("two escaped pairs", rb'"\ud83d\ude39\ud83d\udc8d"', "\U0001f639\U0001f48d"),
    ("last code point, escaped", rb'"\uDBFF\uDFFF"', "\U0010ffff"),
    ("escaped noncharacter", rb'"\uFFFF\uFDD0"', "\uffff\ufdd0"),
    ("escaped BOM inside", rb'"\uFEFF"', "\ufeff"),
    ("raw BOM inside", b'"\xef\xbb\xbf"', "\ufeff"),
    ("raw two octets", '"é"'.encode(), "é"),
    ("raw three octets", '"€𝄞"'.encode(), "€𝄞"),
    ("raw last code point", '"\U0010ffff"'.encode(), "\U0010ffff"),
    ("raw noncharacters", '"\uffff\U0001ffff"'.encode(), "\uffff\U0001ffff"),
    ("raw line separators", '"\u2028\u2029\x85"'.encode(), "\u2028\u2029\x85"),
    ("raw DEL", b'"\x7f"', "\x7f"),
    ("raw no-break space", '"\xa0"'.encode(), "\xa0"),
    ("comment is text", b'"a/*b*/c/*d//e"', "a/*b*/c/*d//e"),
    ("brackets are text", b'"]}[{,:"', "]}[{,:"),
    ("apostrophe", b'"it\'s"', "it's"),
    ("1000 opening brackets as text", b'"' + b"[" * 1000 + b'"', "[" * 1000),
    ("string in array", b'["asd" ]', ["asd"]),
    ("combining marks stay apart", '"e\u0301"'.encode(), "e\u0301"),
]  # fmt: skip

REJECTED: list[tuple[str, bytes]] = [
    # nothing, or more than one thing
    ("empty text", b""),
    ("only space", b" "),
    ("only newlines", b"\r\n\n"),
    ("two values", b"1 2"),
    ("two arrays", b"[][]"),
    ("array and bracket", b"[1]]"),
    ("object and brace", b'{"a":1}}'),
    ("value and comma", b"1,"),
    ("array and comma", b"[],"),
    ("array and letter", b"[1]x"),
    ("object and hash", b'{"a":"b"}#'),
    ("object and string", b'{"a":true} "x"'),
    ("string and letter", b'""x'),
    ("string and string", b'"a""b"'),
    ("literal twice", b"truetrue"),
    ("literal and digit", b"null1"),
    ("value and NUL", b"1\0"),
    ("NUL alone", b"\0"),
    ("NUL in array", b"[1,\x002]"),
    ("closing bracket alone", b"]"),
    ("closing brace alone", b"}"),
    ("comma alone", b","),
    ("colon alone", b":"),
    ("asterisk", b"*"),
    ("angle brackets", b"<null>"),
    ("angle bracket", b"<.>"),
    ("bare word", b"abc"),
    ("bare Cyrillic", "å".encode()),
    ("backslash alone", b"\\"),
    # literals
    ("cut null", b"nul"),
    ("cut true", b"[tru]"),
    ("cut false", b"[fals]"),
    ("one letter", b"t"),
    ("True", b"True"),
    ("NULL", b"NULL"),
    ("falsE", b"falsE"),
    ("None", b"None"),
    ("nullx", b"[nullx]"),
    ("trueish escape", rb"tr\u0075e"),
    ("undefined", b"undefined"),
    ("NaN", b"NaN"),
    ("minus NaN", b"-NaN"),
    ("nan", b"[nan]"),
    ("Infinity", b"Infinity"),
    ("minus Infinity", b"-Infinity"),
    ("plus Infinity", b"+Inf"),
    ("inf", b"inf"),
    # white space that is none
    ("form feed", b"[\x0c]"),
    ("vertical tab", b"\x0b1"),
    ("backspace", b"[\x081]"),
    ("no-break space", "[\xa01]".encode()),
    ("next line", "\x851".encode()),
    ("line separator", "[1,\u20282]".encode()),
    ("ideographic space", "\u30001".encode()),
    ("word joiner", "[\u2060]".encode()),
    ("file separator", b"\x1c1"),
    ("escaped newline", b"[\\n]"),
    ("escaped space", b"[\\u0020]"),
    # comments
    ("block comment", b"/* x */ 1"),
    ("comment after", b'{"a":"b"}/**/'),
    ("unclosed comment after", b'{"a":"b"}/**//'),
    ("slash after", b'{"a":"b"}/'),
    ("line comment", b'{"a":"b"}//'),
    ("comment in object", b'{"a":/*x*/"b"}'),
    ("hash comment", b"# x\n1"),
    # arrays
    ("unclosed array", b"["),
    ("unclosed array of one", b"[1"),
    ("unclosed array after comma", b"[1,"),
    ("unclosed array of array", b"[[]"),
    ("unclosed array over lines", b'["a",\n4\n,1,'),
    ("unclosed array of newlines", b"[1,\n1\n,1"),
    ("unclosed array of object", b"[{}"),
    ("array closed twice", b"[]]"),
    ("array closed by brace", b"[1}"),
    ("array in array closed by brace", b"[[1}]"),
    ("trailing comma", b"[1,]"),
    ("trailing comma before space", b"[1, ]"),
    ("two trailing commas", b'["",,]'),
    ("leading comma", b"[,1]"),
    ("only a comma", b"[,]"),
    ("double comma", b"[1,,2]"),
    ("comma and close without open", b"1]"),
    ("no comma", b"[1 2]"),
    ("no comma before true", b"[1 true]"),
    ("no comma before array", b"[3[4]]"),
    ("no comma between strings", b'["a" "b"]'),
    ("colon for comma", b'["a":1]'),
    ("semicolon for comma", b"[1;2]"),
    ("star for value", b"[*]"),
    ("minus for value", b"[-]"),
    ("word for value", b"[x"),
    ("parentheses", b"(1)"),
    ("vertical tab in array", b'["\x0ba"\\f]'),
    ("65 levels of arrays", nested(65)),
    ("65 levels of objects", b'{"a":' * 64 + b"{}" + b"}" * 64),
    ("65 levels in the second", b"[[]," + nested(64) + b"]"),
    ("500 levels closed", nested(500)),
    ("100000 open arrays", b"[" * 100_000),
    ("50000 open members", b'[{"":' * 50_000),
    ("65 levels under a duplicate", b'{"a":' + nested(64) + b',"a":1}'),
    # objects
    ("unclosed object", b"{"),
    ("unclosed name", b'{"a'),
    ("unclosed after name", b'{"a"'),
    ("unclosed after colon", b'{"a":'),
    ("unclosed after value", b'{"a":1'),
    ("unclosed after comma", b'{"a":1,'),
    ("unclosed value string", b'{"a":"a'),
    ("object closed by bracket", b'{"a":1]'),
    ("object of a bracket", b"{]"),
    ("object of a comma", b"{,}"),
    ("object of a colon", b"{:}"),
    ("object of a brace", b"{{}}"),
    ("object in object as name", b'{{"a":1}:2}'),
    ("array as name", b"{[]:1}"),
    ("bare name", b"{a:1}"),
    ("bare name quoted value", b'{a:"b"}'),
    ("apostrophes", b"{'a':0}"),
    ("number as name", b"{1:1}"),
    ("float as name", b"{1.5:1}"),
    ("null as name", b"{null:null}"),
    ("hundred numbers as name", b"{9999E9999:1}"),
    ("emoji as name", "{🇨🇭}".encode()),
    ("name only", b'{"a"}'),
    ("no value", b'{"a":}'),
    ("no colon", b'{"a" "b"}'),
    ("comma for colon", b'{"a",1}'),
    ("equals for colon", b'{"a"=1}'),
    ("double colon", b'{"a"::"b"}'),
    ("colon after value", b'{"a":1:2}'),
    ("no name", b'{:"b"}'),
    ("object trailing comma", b'{"a":0,}'),
    ("object many trailing commas", b'{"a":0,,,,,}'),
    ("object leading comma", b'{,"a":0}'),
    ("object double comma", b'{"a":"b",,"c":"d"}'),
    ("object no comma", b'{"a":1 "b":2}'),
    ("word after member", b'{"a":"b" c}'),
    ("lone string in object", b'{"a":"b","c"}'),
    ("string escape outside", b'{"a":"b"\\u002c"c":1}'),
    ("member with unclosed array", b'{"a":[1}'),
    ("slash in name position", b'{/"a":1}'),
    # numbers
    ("plus sign", b"+1"),
    ("double plus", b"++1234"),
    ("two minus", b"--1"),
    ("minus alone", b"-"),
    ("minus space", b"- 1"),
    ("minus letter", b"-foo"),
    ("minus plus", b"-+1"),
    ("minus one letter", b"-1x"),
    ("minus bare word", b"[-x]"),
    ("leading zero", b"012"),
    ("two zeros", b"00"),
    ("leading zero negative", b"-01"),
    ("minus two zeros", b"-00"),
    ("leading zero with fraction", b"00.5"),
    ("leading zero in array", b"[1,02]"),
    ("no fraction", b"1."),
    ("no fraction negative", b"-2."),
    ("no fraction before exponent", b"2.e3"),
    ("zero no fraction before exponent", b"0.e1"),
    ("no integer part", b".5"),
    ("no integer part negative", b"-.123"),
    ("point alone", b"."),
    ("two points", b"1.2.3"),
    ("point then minus", b"1.-1"),
    ("empty exponent", b"1e"),
    ("empty exponent E", b"1.0E"),
    ("zero empty exponent", b"0e"),
    ("exponent only plus", b"1e+"),
    ("exponent only minus", b"1.0e-"),
    ("exponent plus minus", b"0e+-1"),
    ("exponent with point", b"1e1.5"),
    ("exponent twice", b"1e2e3"),
    ("exponent equals", b"1ea"),
    ("exponent alone", b"e1"),
    ("hexadecimal", b"0x42"),
    ("hexadecimal x only", b"0x"),
    ("octal", b"0o17"),
    ("binary", b"0b1"),
    ("underscore", b"1_000"),
    ("thousands comma alone", b"1,000"),
    ("space in number", b"1 000"),
    ("suffix letter", b"1a"),
    ("suffix L", b"1L"),
    ("suffix j", b"1.5j"),
    ("sum", b"1+2"),
    ("full-width digit", "１".encode()),
    ("digit after digit in Arabic", "1٢".encode()),
    ("fraction in Devanagari", "1.२".encode()),
    ("number cut by a bad octet", b"123\xe5"),
    ("exponent cut by a bad octet", b"1e1\xe5"),
    ("minus infinity sign", "-∞".encode()),
    ("too large for a float", b"1e309"),
    ("negative too large for a float", b"-1e9999"),
    ("huge exponent", b"0.4e00669999999999999999999999999999999999999999999969999999006"),
    ("just past the largest float", b"1.7976931348623159e308"),
    ("integer too large for a float", b"1" + b"0" * 309),
    ("integer just too large for a float", str(2**1024).encode()),
    ("negative integer too large", b"-1" + b"0" * 309),
    ("1001 characters of number", b"0." + b"1" * 999),
    ("1001 characters of exponent", b"1e-" + b"0" * 997 + b"1"),
    ("5000 digits", b"1" * 5000),
    ("too large under a duplicate", b'{"a":1e999,"a":1}'),
    # strings
    ("quote alone", b'"'),
    ("unclosed string", b'"abc'),
    ("unclosed after escaped quote", b'"\\"'),
    ("unclosed after backslash", b'"\\'),
    ("unclosed string in array", b'["asd'),
    ("apostrophe string", b"'abc'"),
    ("backtick string", b"`a`"),
    ("curly quotes", "“a”".encode()),
    ("opened with escape", b'\\u0022a"'),
    ("raw newline", b'"a\nb"'),
    ("raw carriage return", b'"a\rb"'),
    ("raw tab", b'"\t"'),
    ("raw NUL", b'"a\0a"'),
    ("raw backspace", b'"\x08"'),
    ("raw escape octet", b'"\x1b"'),
    ("raw unit separator", b'"\x1f"'),
    ("raw newline in name", b'{"a\n":1}'),
    ("escaped raw newline", b'"\\\n"'),
    ("escaped raw tab", b'"\\\t"'),
    ("escaped raw NUL", b'"\\\0"'),
    ("escape x", rb'"\x00"'),
    ("escape a", rb'"\a"'),
    ("escape v", rb'"\v"'),
    ("escape e", rb'"\e"'),
    ("escape zero", rb'"\0"'),
    ("escape octal", rb'"\012"'),
    ("escape apostrophe", rb'"\'"'),
    ("escape U", rb'"\U00000041"'),
    ("escape capital N", rb'"\N"'),
    ("escape emoji", '"\\🌀"'.encode()),
    ("escape bad octet", b'"\\\xe5"'),
    ("three backslashes", rb'"\\\"'),
    ("u alone", rb'"\u"'),
    ("u one digit", rb'"\u1"'),
    ("u two digits", rb'"\u12"'),
    ("u three digits", rb'"\u123"'),
    ("u cut by the end", rb'"\u00A'),
    ("u plus", rb'"\u+123"'),
    ("u minus", rb'"\u-123"'),
    ("u space", rb'"\u 123"'),
    ("u underscore", rb'"\u1_23"'),
    ("u 0x", rb'"\u0x12"'),
    ("u not hex", rb'"\u00G0"'),
    ("u braces", rb'"\u{41}"'),
    ("u full-width digits", '"\\u００４１"'.encode()),
    ("u bad octet", b'"\\u\xe5"'),
    ("lone high surrogate", rb'"\uD800"'),
    ("lone low surrogate", rb'"\uDC00"'),
    ("last high surrogate", rb'"\uDBFF"'),
    ("last low surrogate", rb'"\uDFFF"'),
    ("high then text", rb'"\uD800abc"'),
    ("high then plain escape", rb'"\uD800\n"'),
    ("high then scalar escape", rb'"\uD800\u0041"'),
    ("high then high", rb'"\uD800\uD800"'),
    ("low then high", rb'"\uDD1E\uD834"'),
    ("pair then low", rb'"\uD834\uDD1E\uDD1E"'),
    ("high then cut u", rb'"\uD800\u"'),
    ("high then one digit", rb'"\uD800\u1"'),
    ("high then x", rb'"\uD800\u1x"'),
    ("high then escaped backslash", rb'"\uD800\\uDC00"'),
    ("lone surrogate in name", rb'{"\uDFAA":0}'),
    ("lone surrogate under a duplicate", rb'{"a":"\uD800","a":1}'),
    # octets that are no UTF-8
    ("octet alone", b"\xff"),
    ("octet in array", b"[\xff]"),
    ("octet in name", b'{"\xb9":"0"}'),
    ("octet after value", b"1\xff"),
    ("octet in string", b'"\xff"'),
    ("octet FE", b'"\xfe\xff"'),
    ("continuation alone", b'"\x81"'),
    ("Latin-1", b'"\xe9"'),
    ("Latin-1 then text", b'"\xe9abc"'),
    ("cut two octets", b'"\xc3"'),
    ("cut three octets", b'"\xe0\xff"'),
    ("cut three octets later", b'"\xe2\x82"'),
    ("cut four octets", b'"\xf0\x9d\x84"'),
    ("cut at the end of text", b'"\xe2\x82'),
    ("overlong slash", b'"\xc0\xaf"'),
    ("overlong NUL", b'"\xc0\x80"'),
    ("overlong quote", b"\xc0\xa2a\xc0\xa2"),
    ("overlong three octets", b'"\xe0\x80\xaf"'),
    ("overlong four octets", b'"\xf0\x80\x80\xaf"'),
    ("overlong five octets", b'"\xf8\x80\x80\x80\xaf"'),
    ("overlong six octets", b'"\xfc\x83\xbf\xbf\xbf\xbf"'),
    ("surrogate in UTF-8", b'"\xed\xa0\x80"'),
    ("surrogate pair in UTF-8", b'"\xed\xa0\xb4\xed\xb4\x9e"'),
    ("past U+10FFFF", b'"\xf4\x90\x80\x80"'),
    ("far past U+10FFFF", b'"\xf7\xbf\xbf\xbf"'),
    # byte order marks and other encodings
    ("BOM alone", b"\xef\xbb\xbf"),
    ("BOM first", b"\xef\xbb\xbf{}"),
    ("BOM after space", b" \xef\xbb\xbf[]"),
    ("BOM last", b"[]\xef\xbb\xbf"),
    ("cut BOM", b"\xef\xbb{}"),
    ("UTF-16 with BOM", '["é"]'.encode("utf-16")),
    ("UTF-16 LE", "[1]".encode("utf-16-le")),
    ("UTF-16 BE", "[1]".encode("utf-16-be")),
    ("UTF-32", "[1]".encode("utf-32-le")),
    ("UTF-7 quote", b"+ACI-a+ACI-"),
]  # fmt: skip

# document, line, column (or the columns between which a reader may choose), what the message says
POSITIONS: list[tuple[str | bytes, int, int | tuple[int, ...], str]] = [
    ("", 1, 1, "value"),
    ("  \n ", 2, 2, "value"),
    ("[1,]", 1, 4, "value"),
    ("[1,\n 2,\n   x]", 3, 4, "value"),
    (b"[1,\n 2,\n   x]", 3, 4, "value"),
    ("[\r\n\r\n  x]", 3, 3, "value"),
    ("[1 2]", 1, 4, "[],]|comma"),
    ("[1", 1, 3, "[],]|comma"),
    ('{"a" 1}', 1, 6, ":|colon"),
    ('{"a"}', 1, 5, ":|colon"),
    ('{"a":}', 1, 6, "value"),
    ('{"a":1,}', 1, 8, "name|string|quot"),
    ("{'a':1}", 1, 2, "name|string|quot"),
    ('{"a":1 "b":2}', 1, 8, "[,}]|comma"),
    ('{\n"a": 1,\n"b": tru\n}', 3, 6, "value"),
    ("1 2", 1, 3, "end|trailing|after"),
    ("[1]\n]", 2, 1, "end|trailing|after"),
    ("NaN", 1, 1, "value"),
    ("[1, +1]", 1, 5, "value"),
    ("[1, 01]", 1, (5, 6), "zero|number|digit|[],]"),
    ("[1.]", 1, (2, 3, 4), "digit|number|[],]"),
    ("[0, 1e999]", 1, 5, "large|range|float|big|finite"),
    ('["a\tb"]', 1, (2, 4), "control|string"),
    ('["a\\x"]', 1, (4, 5), "escape|backslash"),
    ('["a\\u12"]', 1, (4, 5, 6, 8), "escape|backslash|hex"),
    ('["é€𝄞", x]', 1, 9, "value"),
    ('["\\ud800"]', 1, (2, 3), "surrogate"),
    ('["a\ud800"]', 1, (2, 4), "surrogate|UTF-8|Unicode"),
    ('["abc', 1, (2, 6), "quot|string|\""),
    ("[" * 65, 1, (65, 66), "64|nest|deep|level"),
    ("\n\n" + "9" * 1001, 3, 1, "1000|1,000|long|digits|characters"),
    ("\ufeff[]", 1, 1, "BOM|byte order mark|value"),
    (b"\xef\xbb\xbf[]", 1, 1, "BOM|byte order mark|value"),
    (b'[\n"ab\xff"]', 2, (2, 4), "UTF-8"),
]  # fmt: skip


def exact(value: object) -> str:
    """Equal exactly where the values and all their types are: 1, 1.0, True and -0.0 differ."""
    return repr(value)


@pytest.mark.parametrize("document, value", by_name(ACCEPTED))
def test_json_is_accepted_as_octets_and_as_text(document, value):
    assert exact(parse_json(document)) == exact(value)
    assert exact(parse_json(document.decode())) == exact(value)


@pytest.mark.parametrize("document", by_name(REJECTED))
def test_json_is_rejected_with_a_place(document):
    with pytest.raises(JSONError) as refusal:
        parse_json(document)
    error = refusal.value
    assert isinstance(error, ValueError)
    assert type(error.line) is int and type(error.column) is int
    assert error.line >= 1 and error.column >= 1
    assert f"line {error.line}, column {error.column}" in str(error)
    assert len(str(error)) < 300, "a message, not an echo of the document"


REJECTED_UTF_8 = [row for row in REJECTED if row[1].decode(errors="ignore").encode() == row[1]]


@pytest.mark.parametrize("document", by_name(REJECTED_UTF_8))
def test_json_text_is_rejected_like_its_octets(document):
    with pytest.raises(JSONError) as from_octets:
        parse_json(document)
    with pytest.raises(JSONError) as from_text:
        parse_json(document.decode())
    assert str(from_text.value) == str(from_octets.value)


@pytest.mark.parametrize("text", ['"\ud800"', '"\udfff"', '{"\udc80": 1}', '["\ud834\udd1e"]',
                                  "\ud800"],
                         ids=["high", "low", "name", "pair never joined", "no string"])  # fmt: skip
def test_raw_surrogates_in_text_are_rejected(text):
    with pytest.raises(JSONError):
        parse_json(text)


@pytest.mark.parametrize("document, line, columns, expectation", POSITIONS,
                         ids=[ascii(row[0])[:24] for row in POSITIONS])  # fmt: skip
def test_json_error_says_where_and_what_was_expected(document, line, columns, expectation):
    with pytest.raises(JSONError) as refusal:
        parse_json(document)
    error = refusal.value
    assert error.line == line
    assert error.column in (columns if isinstance(columns, tuple) else (columns,))
    assert f"line {error.line}, column {error.column}" in str(error)
    assert re.search(expectation, str(error), re.IGNORECASE), str(error)


MEGABYTE = 1 << 20


@pytest.mark.parametrize("document, value", by_name([
    ("a string", b'"' + b"a" * MEGABYTE + b'"', "a" * MEGABYTE),
    ("escaped quotes", b'"' + b'\\"' * (MEGABYTE // 2) + b'"', '"' * (MEGABYTE // 2)),
    ("escaped pairs", b'"' + rb"\ud83d\ude39" * 87_381 + b'"', "\U0001f639" * 87_381),
    ("spaces and a value", b" " * MEGABYTE + b"1", 1),
    ("small numbers", b"[" + b"1," * (MEGABYTE // 8) + b"1]", [1] * (MEGABYTE // 8 + 1)),
    ("one name again and again", b"{" + b'"a":1,' * 170_000 + b'"a":2}', {"a": 2}),
]))  # fmt: skip
def test_a_megabyte_is_read(document, value):
    assert parse_json(document) == value


# ---- the standard library as a witness ----


def strict_json(document: bytes) -> object:
    """What `json.loads` says, made as strict as `parse_json`; raises ValueError."""

    def no_constant(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    def number(kind: type) -> object:
        def convert(digits: str) -> object:
            if len(digits) > 1000 or not math.isfinite(float(digits)):
                raise ValueError("number too long or too large")
            return kind(digits)

        return convert

    text = document.decode()
    try:
        value = json.loads(text, parse_constant=no_constant, parse_int=number(int),
                           parse_float=number(float))  # fmt: skip
    except RecursionError:
        raise ValueError("nested deeper than 64") from None
    a_string = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
    for literal in a_string.findall(text):
        json.loads(literal).encode()  # a lone surrogate has no UTF-8: UnicodeError, a ValueError
    depth = 0
    for bracket in re.findall(r"[][{}]", a_string.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > 64:
            raise ValueError("nested deeper than 64")
    return value


def random_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(9 if depth < 5 else 6)
    if kind == 0:
        return rng.choice([None, True, False, 0, -1, "", 0.0, -0.0])
    if kind == 1:
        return rng.randint(-(10 ** rng.randrange(1, 40)), 10 ** rng.randrange(1, 40))
    if kind == 2:
        return rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 300)
    if kind < 6:
        alphabet = 'abc "\\/\b\f\n\r\t\0\x1f\x7f\x85é€\u2028\ufeff\uffff𝄞\U0010ffff'
        return "".join(rng.choices(alphabet, k=rng.randrange(12)))
    members = [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind < 8:
        return members
    return {f"{rng.choice(['a', 'é', '𝄞', ' '])}{n}": member for n, member in enumerate(members)}


def random_json(rng: random.Random) -> tuple[object, bytes]:
    space = lambda: "".join(rng.choices(" \t\r\n", k=rng.randrange(3)))  # noqa: E731
    value = random_value(rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 3, "\t"]),
                      separators=(space() + "," + space(), space() + ":" + space()))  # fmt: skip
    return value, (space() + text + space()).encode()


@pytest.mark.parametrize("seed", range(20))
def test_what_the_standard_library_writes_is_read_back(seed):
    rng = random.Random(seed)
    for _ in range(100):
        value, document = random_json(rng)
        assert exact(parse_json(document)) == exact(value), document


JSON_FRAGMENTS = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\\u", b"\\ud83d", b"\\ude39", b"0", b"1",
    b"-", b"+", b".", b"e", b"E5", b"1e400", b"null", b"true", b"NaN", b"Infinity", b" ", b"\n",
    b"\t", b"\0", b"\x1f", b"/", b"'", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\xc2\xa0",
    b"\xff", b'"a":1', b"[[[[[[[[", b"]]]]]]]]", b"\x0c", b"_", b"x", b"00",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_damaged_documents_are_judged_as_the_standard_library_judges_them(seed):
    rng = random.Random(f"damage {seed}")
    corpus = [document for _, document, *_ in ACCEPTED + REJECTED if len(document) < 500]
    for _ in range(300):
        original = rng.choice(corpus) if rng.random() < 0.5 else random_json(rng)[1]
        document = damaged(rng, original, JSON_FRAGMENTS, lambda: random_json(rng)[1])
        try:
            expected = exact(strict_json(document))
        except ValueError:
            with pytest.raises(JSONError):
                print(f"accepted: {document!r} as {parse_json(document)!r}")
        else:
            assert exact(parse_json(document)) == expected, document


def test_the_conformance_tables_agree_with_the_standard_library():
    assert len({name for name, *_ in ACCEPTED}) == len(ACCEPTED) >= 95
    assert len({name for name, *_ in REJECTED}) == len(REJECTED) >= 190
    for name, document, value in ACCEPTED:
        assert exact(strict_json(document)) == exact(value), name
    for name, document in REJECTED:
        with pytest.raises(ValueError):
            print(f"{name}: accepted as {strict_json(document)!r}")


def test_conformance_documents_through_the_server(server):
    """None of the documents is a batch of metrics: each gets a 400 that says why, and no 5xx."""
    documents = [(name, document) for name, document, *_ in REJECTED + ACCEPTED]
    for start in range(0, len(documents), 25):
        group = documents[start : start + 25]
        pipelined = b"".join(
            b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: json conformance\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(document), document)
            for _, document in group
        )
        answers, closed = exchange(server.port, pipelined, expect=len(group))
        assert [answer.status for answer in answers] == [400] * len(group)
        assert not closed
        for (name, document), answer in zip(group, answers):
            error = json.loads(answer.body)["error"]
            if (name, document) in REJECTED:
                assert re.search(r"line \d+, column \d+", error), (name, error)


# ==================================================================================================
# Metrics
# ==================================================================================================


def batch_of(**fields: object) -> dict:
    metric = {"name": "cpu", "value": 1} | fields
    return {"metrics": [{key: value for key, value in metric.items() if value is not ...}]}


def test_a_whole_metric_becomes_a_sample():
    sent = {"name": "cpu usage é", "value": -7.5, "type": "counter", "tags": {"host": "web1"},
            "timestamp": 1_758_116_723.1234}  # fmt: skip
    assert read_batch({"metrics": [sent]}, 0) == [
        Sample("cpu usage é", -7.5, "counter", {"host": "web1"}, 1_758_116_723_123)
    ]


@pytest.mark.parametrize("timestamp, timestamp_ms", [
    (0, 0), (0.0004, 0), (1_758_116_723, 1_758_116_723_000), (1_758_116_723.123, NOW_MS),
    (7_289_654_399.999, 7_289_654_399_999), ("2025-09-17T13:45:23.123Z", NOW_MS),
    ("2025-09-17T15:45:23.123+02:00", NOW_MS), ("2025-09-17 13:45:23,123z", NOW_MS),
    ("2025-09-17T08:15:23.123-0530", NOW_MS), ("2025-09-17T13:45:23.123456789Z", NOW_MS),
    ("2025-09-17T13:45:23Z", 1_758_116_723_000), ("1970-01-01T00:00:00Z", 0),
    ("2024-02-29T00:00:00Z", 1_709_164_800_000), ("2200-12-31T23:59:59.999Z", 7_289_654_399_999),
    ("2025-09-17T13:45:22.9999Z", 1_758_116_723_000),
])  # fmt: skip
def test_timestamps_are_read_in_both_forms(timestamp, timestamp_ms):
    assert read_batch(batch_of(timestamp=timestamp), 5)[0].timestamp_ms == timestamp_ms


@pytest.mark.parametrize("timestamp", [
    -1, -0.001, 7_289_654_400, 1_758_116_723_123, True, None, [], {}, "", "now", "2025-09-17",
    "2025-09-17T13:45:23", "2025-09-17T13:45Z", "2025-13-01T00:00:00Z", "2025-02-29T00:00:00Z",
    "2025-09-17T24:00:00Z", "2025-09-17T13:60:00Z", "2025-09-17T13:45:60Z", "1969-12-31T23:59:59Z",
    "2201-01-01T00:00:00Z", "1970-01-01T00:00:00+01:00", "2025-W38-3T13:45:23Z", "1758116723",
    "2025-09-17T13:45:23.Z", "2025-09-17T13:45:23+25:00", "٢٠٢٥-09-17T13:45:23Z", 10**300,
], ids=str)  # fmt: skip
def test_timestamps_that_are_none_are_refused(timestamp):
    with pytest.raises(BatchError, match=r"metrics\[0\].timestamp: must "):
        read_batch(batch_of(timestamp=timestamp), NOW_MS)


@pytest.mark.parametrize("fields", [
    {"name": "n" * 255}, {"name": "é" * 255}, {"value": 0}, {"value": -1e308}, {"value": 10**308},
    {"type": "gauge"}, {"type": "histogram"}, {"type": "summary"}, {"tags": {}},
    {"tags": {str(number): "" for number in range(32)}}, {"tags": {"k" * 128: "v" * 1024}},
], ids=lambda fields: next(iter(fields)))  # fmt: skip
def test_the_limits_themselves_are_accepted(fields):
    assert len(read_batch(batch_of(**fields), NOW_MS)) == 1


@pytest.mark.parametrize("document, error", [
    ([], 'body must be an object with the list "metrics"'),
    ({}, 'body must be an object with the list "metrics"'),
    ({"metrics": {}}, "metrics: must be a list of 1 to 1000 metrics, not an object"),
    ({"metrics": []}, "metrics: must be a list of 1 to 1000 metrics, not 0 metrics"),
    ({"metrics": [{}] * 1001}, "metrics: must be a list of 1 to 1000 metrics, not 1001 metrics"),
    ({"metrics": [1]}, "metrics[0]: must be an object, not a number"),
    (batch_of() | {"host": "a"}, 'host: unknown field beside "metrics"'),
    (batch_of(labels={}), "metrics[0].labels: unknown field; known are name, value, type, tags, "
                          "timestamp"),
    (batch_of(name=...), "metrics[0].name: is missing"),
    (batch_of(name=""), "metrics[0].name: must be a string of 1 to 255 characters"),
    (batch_of(name="n" * 256), "metrics[0].name: must be a string of 1 to 255 characters"),
    (batch_of(name="a\nb"), "metrics[0].name: must be a string of 1 to 255 characters"),
    (batch_of(name="a\x9bb"), "metrics[0].name: must be a string of 1 to 255 characters"),
    (batch_of(name=5), "metrics[0].name: must be a string of 1 to 255 characters"),
    (batch_of(value=...), "metrics[0].value: is missing"),
    (batch_of(value="1"), "metrics[0].value: must be a finite number or null, not a string"),
    (batch_of(value=True), "metrics[0].value: must be a finite number or null, not a boolean"),
    (batch_of(type="rate"), "metrics[0].type: must be one of gauge, counter, histogram, summary"),
    (batch_of(type=[]), "metrics[0].type: must be one of gauge, counter, histogram, summary"),
    (batch_of(tags=[]), "metrics[0].tags: must be an object of strings, not an array"),
    (batch_of(tags=None), "metrics[0].tags: must be an object of strings, not null"),
    (batch_of(tags={"a": 1}), "metrics[0].tags.a: must be a string, not a number"),
    (batch_of(tags={"": "x"}), "metrics[0].tags: key '' must have 1 to 128 characters"),
    (batch_of(tags={"k" * 129: ""}), "metrics[0].tags: key 'kkk"),
    (batch_of(tags={"a": "v" * 1025}), "metrics[0].tags.a: must have at most 1024 characters"),
    (batch_of(tags={str(n): "" for n in range(33)}), "metrics[0].tags: must be at most 32, not 33"),
])  # fmt: skip
def test_a_bad_batch_says_what_is_wrong_and_where(document, error):
    with pytest.raises(BatchError) as refused:
        read_batch(document, NOW_MS)
    assert str(refused.value).startswith(error)


def test_every_reason_is_told_up_to_ten():
    good, bad = {"name": "a", "value": 1}, {"name": "", "value": "x", "type": 3}
    with pytest.raises(BatchError) as refused:
        read_batch({"metrics": [good, bad, good, bad]}, NOW_MS)
    assert [(reason.index, reason.field) for reason in refused.value.reasons] == [
        (index, field) for index in (1, 3) for field in ("name", "value", "type")
    ]
    with pytest.raises(BatchError) as refused:
        read_batch({"metrics": [bad] * 1000}, NOW_MS)
    assert len(refused.value.reasons) == 10


# ==================================================================================================
# Log
# ==================================================================================================


# ---- a body becomes lines ----


def plain_lines(body: bytes, now_ms: int) -> tuple[bytes, int] | None:
    """The lines of a body by the plain way; None where it is refused."""
    try:
        samples = read_batch(parse_json(body), now_ms)
    except (JSONError, BatchError):
        return None
    return "".join(map(metricstream.log_line, samples)).encode(), len(samples)


def fast_lines(body: bytes) -> tuple[bytes, int] | None:
    batch = metricstream.fast_batch(body, NOW_MS)
    return batch and (batch.lines, batch.count)


@pytest.mark.parametrize("seed", range(scaled(4, 40)))
def test_bodies_of_the_fast_path_become_the_same_lines_as_by_the_plain_way(seed):
    rng = random.Random(seed)
    fast = refused = 0
    for count in range(1500):
        body = random_fast_body(rng)
        if count % 2:
            body = damaged(rng, body, JSON_FRAGMENTS, lambda: random_fast_body(rng))
        lines = fast_lines(body)
        expected = plain_lines(body, NOW_MS)
        assert lines is None or lines == expected, body
        assert metricstream._line_tail.cache_info().currsize <= 4096
        fast += lines is not None
        refused += expected is None
    assert fast > 300 and refused > 300


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001])
def test_the_fast_path_keeps_the_bounds_of_a_batch(count):
    body = json.dumps({"metrics": [{"name": "a", "value": 1.5}] * count}).encode()
    assert fast_lines(body) == plain_lines(body, NOW_MS)


def test_what_the_agents_of_the_readme_send_takes_the_fast_way():
    for body in (b'{"metrics":[{"name":"cpu_usage","value":75.50,"type":"gauge","tags":{"host":"web1"}}]}',
                 json.dumps({"metrics": [{"name": "a", "value": 1.25, "tags": {"k": "v"}}] * 3}).encode()):  # fmt: skip
        assert fast_lines(body) == plain_lines(body, NOW_MS) != None  # noqa: E711


# Timestamps as JSON and what the log makes of them; None: refused. The years are 1970 to 2200.
GRAMMAR_TIMESTAMPS = {
    "0": "1970-01-01T00:00:00.000Z", "-0.0": "1970-01-01T00:00:00.000Z",
    "1758116723": "2025-09-17T13:45:23.000Z", "1758116723.123": "2025-09-17T13:45:23.123Z",
    "1.758116723e9": "2025-09-17T13:45:23.000Z", "7289654399": "2200-12-31T23:59:59.000Z",
    '"2025-09-17T13:45:23.123Z"': "2025-09-17T13:45:23.123Z",
    '"2025-09-17 15:45:23+02:00"': "2025-09-17T13:45:23.000Z",
    '"1969-12-31T23:00:00-01:00"': "1970-01-01T00:00:00.000Z",
    '"2024-02-29T00:00:00z"': "2024-02-29T00:00:00.000Z",
    "-1": None, "7289654400": None, "1758116723123": None, "1e300": None, "true": None,
    "null": None,
    '"2025-02-29T00:00:00Z"': None, '"2025-09-17T13:45:23"': None, '"1758116723"': None, '""': None,
    '"1969-12-31T23:59:59Z"': None, '"2200-12-31T23:59:59-00:01"': None, '"2025-09-17"': None,
    "[0]": None,
}  # fmt: skip


class BatchGrammar:
    """Batches written rule by rule. Now and then a rule writes something else than it should."""

    NUMBERS = ["0", "-0", "1", "-1.5", "75.50", "1e5", "1E-5", "123456789012345678901234567890",
               "-1e-400", "1e308",
               "9" * 995 + "e-900", "0." + "1" * 998, "1" * 300]  # fmt: skip
    NAMES = ["cpu", "a" * 255, "😀" * 255, "é", 'q"\\/', "\u2028", "\u202e", "{}[],:", " ", "name"]
    BAD_NAMES = ["", "a" * 256, "a\nb", "\0", "a\x7f", "\x85", "\x1b[31m"]
    ODDITIES = ["null", "true", "false", "[]", "{}", '""', '"1"', "[[1]]", "{\"a\":{}}",
                "[" * 61 + "]" * 61,
                "[" * 62 + "]" * 62, "[" * 70 + "]" * 70, "1e400", "-1e999", "NaN", "Infinity",
                "01", "+1", ".5",
                "1.", "1e", "0x1", "1_0", "0." + "1" * 999, "'a'", '"\\ud800"', '"\\x"', '"a\tb"',
                "", "nul", "\ufeff"]  # fmt: skip

    def __init__(self, rng: random.Random, oddness: float) -> None:
        self.rng, self.oddness = rng, oddness

    def odd(self) -> bool:
        return self.rng.random() < self.oddness

    def space(self) -> str:
        return self.rng.choice(" \t\r\n") * self.rng.randrange(1, 4) if self.odd() else ""

    def punctuation(self, mark: str) -> str:
        if self.rng.random() < self.oddness / 8:
            mark = self.rng.choice(["", mark * 2, ",", ":", "\x0b", "\xa0", "}", "]"])
        return self.space() + mark + self.space()

    def string(self, text: str) -> str:
        if self.odd():
            return (
                '"'
                + "".join(
                    f"\\u{unit:04X}" for unit in memoryview(text.encode("utf-16")[2:]).cast("H")
                )
                + '"'
            )
        return json.dumps(text, ensure_ascii=self.odd())

    def something(self, usual: Callable[[], str]) -> str:
        return self.rng.choice(self.ODDITIES) if self.rng.random() < self.oddness / 3 else usual()

    def members(self, members: list[tuple[str, Callable[[], str]]]) -> str:
        if self.odd():
            self.rng.shuffle(members)
        if members and self.odd():  # a name twice: the last one counts
            members.insert(0, self.rng.choice(members))
        if members and self.rng.random() < self.oddness / 6:
            members.pop(self.rng.randrange(len(members)))
        if self.rng.random() < self.oddness / 6:
            members.append((self.rng.choice(["labels", "Name", "", "metric"]), lambda: "1"))
        written = [
            self.string(name) + self.punctuation(":") + self.something(value)
            for name, value in members
        ]
        return "{" + self.space() + self.punctuation(",").join(written) + self.space() + "}"

    def name(self) -> str:
        return self.string(
            self.rng.choice(self.BAD_NAMES if self.rng.random() < self.oddness / 3 else self.NAMES)
        )

    def type(self) -> str:
        usual = ["gauge", "counter", "histogram", "summary"]
        return self.string(self.rng.choice([*usual, "Gauge", ""] if self.odd() else usual))

    def tags(self) -> str:
        count = self.rng.choice([0, 1, 1, 2, 32] if not self.odd() else [31, 33])
        keys = [f"{number}" for number in range(count)]
        if keys and self.odd():
            keys[0] = self.rng.choice(["k" * 128, "k" * 129, "", "😀" * 128, "\0\n"])
        values = ["", "web1", "😀" * 1_024, "v" * (1_025 if self.odd() else 1_024), "\n\0"]
        weights = [5, 50, 1, 1, 1]
        return self.members([
            (key, lambda: self.string(self.rng.choices(values, weights)[0])) for key in keys
        ])  # fmt: skip

    def timestamp(self) -> str:
        valid = [text for text, logged in GRAMMAR_TIMESTAMPS.items() if logged]
        return self.rng.choice(list(GRAMMAR_TIMESTAMPS) if self.odd() else valid)

    def metric(self) -> str:
        optional = [("type", self.type), ("tags", self.tags), ("timestamp", self.timestamp)]
        chosen = [member for member in optional if self.rng.random() < 0.4]
        return self.members(
            [("name", self.name), ("value", lambda: self.rng.choice(self.NUMBERS)), *chosen]
        )

    def metrics(self) -> str:
        count = self.rng.choice([0, 1, 2, 5] if self.odd() else [1, 1, 2])
        return (
            "["
            + self.punctuation(",").join(self.something(self.metric) for _ in range(count))
            + "]"
        )

    def batch(self) -> str:
        return (
            self.space()
            + self.something(lambda: self.members([("metrics", self.metrics)]))
            + self.space()
        )


def as_the_readme_has_it(body: bytes) -> list[dict] | None:
    """What the log must say of a batch, by the limits of the README; None: it must be refused."""
    is_number = lambda value: value is None or type(value) in (int, float)  # noqa: E731
    try:
        document = strict_json(body)
    except ValueError:
        return None
    if not isinstance(document, dict) or document.keys() != {"metrics"}:
        return None
    metrics = document["metrics"]
    if not isinstance(metrics, list) or not 1 <= len(metrics) <= 1_000:
        return None
    lines = []
    moments = {exact(json.loads(text)): logged for text, logged in GRAMMAR_TIMESTAMPS.items()}
    for metric in metrics:
        if not isinstance(metric, dict) or not metric.keys() <= {
            "name",
            "value",
            "type",
            "tags",
            "timestamp",
        }:
            return None
        name, tags, type_ = metric.get("name"), metric.get("tags", {}), metric.get("type", "gauge")
        if (
            not isinstance(name, str)
            or not 1 <= len(name) <= 255
            or not is_number(metric.get("value", ""))
        ):
            return None
        if any(unicodedata.category(character) == "Cc" for character in name):
            return None
        if (
            type_ not in ("gauge", "counter", "histogram", "summary")
            or not isinstance(tags, dict)
            or len(tags) > 32
        ):
            return None
        for key, value in tags.items():
            if not 1 <= len(key) <= 128 or not isinstance(value, str) or len(value) > 1_024:
                return None
        moment = "2025-09-17T13:45:23.123Z"  # NOW_MS
        if "timestamp" in metric:
            moment = moments.get(exact(metric["timestamp"]))
            if moment is None:
                return None
        line = {"timestamp": moment, "name": name, "value": metric["value"], "type": type_}
        lines.append(line | ({"tags": tags} if tags else {}))
    return lines


@pytest.mark.parametrize("seed", range(scaled(3, 80)))
def test_batches_of_a_grammar_are_judged_as_the_readme_says(seed):
    rng = random.Random(f"grammar {seed}")
    verdicts: Counter[bool] = Counter()
    for _ in range(1_000):
        body = (
            BatchGrammar(rng, rng.choice([0.02, 0.1, 0.3])).batch().encode("utf-8", "surrogatepass")
        )
        expected = as_the_readme_has_it(body)
        try:
            batch = metricstream.read_body(body, NOW_MS)
            lines, count = batch.lines, batch.count
        except (JSONError, BatchError):
            found = None
        else:
            found = [json.loads(line) for line in lines.splitlines()]
            assert count == len(found)
        assert exact(found) == exact(expected), body
        verdicts[found is None] += 1
    assert min(verdicts[True], verdicts[False]) > 200, verdicts


def metric_with(member: bytes) -> bytes:
    return b'{"metrics":[{"name":"cpu","value":1,%b}]}' % member


# name, a document of about n octets, status, part of the answer
WORST_DOCUMENTS: list[tuple[str, Callable[[int], bytes], int, str]] = [
    ("arrays, never closed", lambda n: b"[" * n, 400, "nesting deeper than 64"),
    ("arrays, closed", lambda n: b"[" * (n // 2) + b"]" * (n // 2), 400, "nesting deeper than 64"),
    ("objects", lambda n: b'{"a":' * (n // 5), 400, "nesting deeper than 64"),
    ("arrays in objects", lambda n: b'{"a":[' * (n // 6), 400, "nesting deeper than 64"),
    ("arrays in a metric", lambda n: metric_with(b'"tags":' + b"[" * n),
     400, "nesting deeper than 64"),
    ("commas", lambda n: b"[" + b"," * (n - 1), 400, "expected a value"),
    ("braces", lambda n: b"{" * n, 400, "expected a name in double quotes"),
    ("zeros", lambda n: b"0" * n, 400, "expected the end of the text, found '0'"),
    ("zeros of a fraction", lambda n: b"0." + b"0" * n, 400, "number of more than 1000 characters"),
    ("octets that are no UTF-8", lambda n: b"\xff" * n, 400, "invalid UTF-8"),
    ("arrays side by side", lambda n: b"[" + b"[]," * (n // 3), 400, "expected a value"),
    ("the deepest, again and again",
     lambda n: b"[%b]" % b",".join([b"[" * 63 + b"]" * 63] * (n // 127)), 400, "must be an object"),
    ("integer", lambda n: metric_with(b'"value":' + b"1" * n),
     400, "number of more than 1000 characters"),
    ("fraction", lambda n: metric_with(b'"value":0.' + b"1" * n),
     400, "number of more than 1000 characters"),
    ("exponent", lambda n: metric_with(b'"value":1e' + b"0" * n),
     400, "number of more than 1000 characters"),
    ("negative number alone", lambda n: b"-" + b"9" * n,
     400, "number of more than 1000 characters"),
    ("number of zeros", lambda n: metric_with(b'"value":' + b"0" * n),
     400, "expected ',' or '}', found '0'"),
    ("longest numbers", lambda n: b"[%b]" % b",".join([b"1" * 300] * (n // 301)),
     400, "must be an object"),
    ("minus signs", lambda n: b"-" * n, 400, "expected a value, found '-' at line 1, column 1"),
    ("numbers", lambda n: b"[%b0]" % (b"0," * (n // 2)), 400, "must be an object"),
    ("literals", lambda n: b"[%b" % (b"true," * (n // 5)), 400, "expected a value, found the end"),
    ("string", lambda n: b'"%b"' % (b"a" * n), 400, "must be an object"),
    ("string, never closed", lambda n: b'{"metrics":"' + b"a" * n,
     400, "found the end of the text"),
    ("string, not UTF-8 at its end", lambda n: b'"%b\xff"' % (b"a" * n), 400, "invalid UTF-8"),
    ("string beyond ASCII", lambda n: b'"%b"' % ("é".encode() * (n // 2)),
     400, "must be an object"),
    ("escapes", lambda n: b'"%b"' % (b"\\n" * (n // 2)), 400, "must be an object"),
    ("escapes in hex", lambda n: b'"%b"' % (b"\\u0041" * (n // 6)), 400, "must be an object"),
    ("surrogate pairs", lambda n: b'"%b"' % (b"\\ud83d\\ude00" * (n // 12)),
     400, "must be an object"),
    ("lone surrogate at the end", lambda n: b'"%b\\ud83d"' % (b"a" * n), 400, "lone surrogate"),
    ("backslashes", lambda n: b'"' + b"\\\\" * (n // 2), 400, "found the end of the text"),
    ("backslashes alone", lambda n: b"\\" * n, 400, "expected a value"),
    ("quotes", lambda n: b'"' * n, 400, "expected the end of the text, found '\"'"),
    ("quotes in a list", lambda n: b'["",%b' % (b'"",' * (n // 3)),
     400, "expected a value, found the end"),
    ("a name repeated", lambda n: metric_with(b",".join([b'"name":"again"'] * (n // 15))),
     200, "success"),
    ("metrics repeated",
     lambda n: b'{%b"metrics":[{"name":"a","value":1}]}' % (b'"metrics":[],' * (n // 13)),
     200, "success"),
    ("unknown fields", lambda n: metric_with(b",".join(b'"%06d":0' % i for i in range(n // 11))),
     400, "unknown field"),
    ("unknown fields outside",
     lambda n: b'{"metrics":[],%b}' % b",".join(b'"%06d":0' % i for i in range(n // 11)),
     400, "unknown field"),
    ("too many tags",
     lambda n: metric_with(b'"tags":{%b}' % b",".join(b'"%06d":""' % i for i in range(n // 12))),
     400, "must be at most 32"),
    ("bad tags",
     lambda n: metric_with(b'"tags":{%b}' % b",".join(b'"%06d":0' % i for i in range(n // 11))),
     400, "must be at most 32, not"),
    ("metrics of 32 tags each", lambda n: tagged_metrics(n // 1000, b"v" * 21),
     200, "metrics_processed"),
    ("usual metrics",
     lambda n: b'{"metrics":[%b]}' % b",".join([b'{"name":"%b","value":1}' % (b"n" * 200)] * (n // 1000)),
     200, "metrics_processed"),
    ("usual metrics, one fault at the end",
     lambda n: b'{"metrics":[%b{]}' % (b'{"name":"a","value":1},' * (n // 24)),
     400, "expected a name in double quotes"),
    ("too many metrics", lambda n: b'{"metrics":[%b0]}' % (b"0," * (n // 2)),
     400, "must be a list of 1 to 1000 metrics, not"),
    ("beginnings of a metric", lambda n: b'{"metrics":[' + b'{"name":"a","value":' * (n // 20),
     400, "nesting deeper than 64"),
    ("name", lambda n: metric_with(b'"name":"%b"' % (b"a" * n)),
     400, "must be a string of 1 to 255 characters"),
    ("name of a field", lambda n: metric_with(b'"%b":1' % (b"a" * n)), 400, "unknown field"),
    ("type", lambda n: metric_with(b'"type":"%b"' % (b"a" * n)), 400, "must be one of gauge"),
    ("value of a tag", lambda n: metric_with(b'"tags":{"a":"%b"}' % (b"a" * n)),
     400, "must have at most 1024 characters"),
    ("key of a tag", lambda n: metric_with(b'"tags":{"%b":"a"}' % (b"a" * n)),
     400, "must have 1 to 128 characters"),
    ("timestamp", lambda n: metric_with(b'"timestamp":"%b"' % (b"1" * n)),
     400, "must be Unix seconds or an ISO 8601"),
    ("spaces", lambda n: b'{"metrics":[%b{"name":"a","value":1}]}' % (b" " * n), 200, "success"),
    ("spaces alone", lambda n: b" " * n,
     400, "expected a value, found the end of the text at line 1, column"),
    ("line feeds", lambda n: b"\n" * n + b"x", 400, "expected a value, found 'x' at line"),
    ("NULs", lambda n: b"\0" * n, 400, "expected a value, found '\\x00'"),
]  # fmt: skip


@pytest.mark.parametrize("document, status, part", by_name(WORST_DOCUMENTS))
def test_the_worst_json_gets_a_clear_and_short_answer(
    watched, document, status, part
):
    started, _ = watched
    body = document(scaled(250_000, 1_000_000))
    assert 50_000 < len(body) <= BODY_LIMIT_BYTES
    (answer,), closed = exchange(started.port, post(body=body), timeout_s=30)
    assert answer.status == status and not closed
    assert part in answer.json.get("error", answer.body.decode())
    assert len(answer.body) < 3_000


@pytest.mark.parametrize("document", [pytest.param(row[1], id=row[0]) for row in WORST_DOCUMENTS])
def test_the_work_for_json_is_linear(document):
    """Four times the document is about four times the time: 16 times would be quadratic."""

    def work(body: bytes) -> None:
        with contextlib.suppress(JSONError, BatchError):
            metricstream.read_body(body, 0)

    assert growth(work, document(20_000), document(80_000), 8) <= 8


NASTY_TEXTS = {
    "line feed": "a\nb", "carriage return": "a\rb", "CRLF and a line": "\r\n{}",
    "a whole line": '"}\n{"name":"forged","value":1}\n',
    "a tally": "x: 9 allowed, 0 refused\nclient y",
    "a label": '"} 1\nforged{a="', "quote": '"', "apostrophe": "'", "backslash": "a\\",
    "a \\n": "a\\nb", "an escape": "\\u0041",
    "colour": "\x1b[31mred\x1b[0m", "title": "\x1b]0;title\x07", "C1 colour": "\x9b31mred",
    "C1 title": "\x9d0;title\x9c", "next line": "a\x85b", "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b", "script": "</script><script>alert(1)", "NUL": "a\0b",
    "DEL": "a\x7fb", "backspace": "abc\b\b\bxyz", "tab": "a\tb",
    "form feed": "\x0b\x0c\x1c\x1d\x1e",
    "override": "\u202egnp.exe", "isolate": "\u2066a\u2069", "mark": "\u200fa\u200e\u061c",
    "BOM": "\ufeffa",
    "format": "%s %d %(a)s {0} {a}", "beyond the BMP": "😀é",
}  # fmt: skip

# What a terminal obeys, what ends a line for someone, and what reorders the text around it.
UNSAFE = re.compile(
    "[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "raw"])
@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS)
def test_a_metric_is_one_line_whatever_its_texts(watched, text, ascii_only):
    started, folder = watched
    tagged = {"name": "cpu", "value": 1, "tags": {"text": text, text: "x"}}
    named = {"name": text, "value": 1}
    for metric in (tagged, named):
        already = (folder / "metrics.jsonl").read_bytes()
        body = json.dumps({"metrics": [metric]}, ensure_ascii=ascii_only).encode()
        ((answer,), closed) = exchange(started.port, post(body=body))
        new = (folder / "metrics.jsonl").read_bytes().removeprefix(already).decode()
        control = re.search("[\0-\x1f\x7f-\x9f]", metric["name"])
        assert (answer.status, closed) == (400 if control else 200, False)
        assert not UNSAFE.search(answer.body.decode())
        if control:
            assert new == ""
        else:
            assert new.endswith("\n") and not UNSAFE.search(new[:-1])
            stored = json.loads(new)
            assert {name: stored[name] for name in metric} == metric


# ---- the file ----


@pytest.mark.parametrize("durability", LEVELS)
def test_lines_are_kept_in_order_across_restarts(tmp_path, durability):
    for start in (0, 100):
        log = MetricLog(str(tmp_path), durability)
        for number in range(start, start + 100):
            append_and_wait(log, b"%d\n" % number)
            if durability != "memory":
                assert lines_of(tmp_path)[-1] == str(number)
        log.close()
        assert log.size_bytes == (tmp_path / "metrics.jsonl").stat().st_size
    assert lines_of(tmp_path) == [str(number) for number in range(200)]


@pytest.mark.parametrize("left, kept", [
    (b'{"a":1}\n{"b":', b'{"a":1}\n'), (b'{"a":1}\n', b'{"a":1}\n'), (b"", b""), (b"torn", b""),
    (b"x\n" + b"y" * 200_000, b"x\n"), (b"x\n\0\0\0", b"x\n"),
], ids=["half a line", "whole lines", "empty", "only half a line", "a long one", "zeros"])  # fmt: skip
def test_a_torn_tail_is_cut_off_and_reported(tmp_path, left, kept):
    (tmp_path / "metrics.jsonl").write_bytes(left)
    log = MetricLog(str(tmp_path))
    assert log.cut_bytes == len(left) - len(kept)
    log.append(b"next\n")
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept + b"next\n"


def test_a_second_owner_of_the_folder_is_refused(tmp_path):
    first = MetricLog(str(tmp_path))
    with pytest.raises(LogError, match="in use by another server"):
        MetricLog(str(tmp_path))
    first.close()
    MetricLog(str(tmp_path)).close()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")],
                         ids=["folder", "pipe", "device"])  # fmt: skip
def test_a_log_that_is_no_regular_file_is_refused(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(LogError, match=r"metrics\.jsonl"):
        MetricLog(str(tmp_path))
    (tmp_path / "metrics.jsonl").unlink() if not (tmp_path / "metrics.jsonl").is_dir() else None
    assert not (tmp_path / "metrics.jsonl").is_file()


@pytest.mark.parametrize("length", range(1, 12))
def test_short_writes_are_completed(tmp_path, length):
    disk = Disk(*[length] * 12)
    log = MetricLog(str(tmp_path), write=disk.write)
    log.append(b"0123456789\n")
    log.append(b"next\n")
    log.close()
    assert lines_of(tmp_path) == ["0123456789", "next"]


@pytest.mark.parametrize("error", [FULL, BROKEN], ids=["full", "broken"])
@pytest.mark.parametrize("taken", range(12))
def test_what_was_half_written_is_cut_off_again(tmp_path, taken, error):
    disk = Disk(11, *([taken] if taken else []), error)
    log = MetricLog(str(tmp_path), write=disk.write)
    log.append(b"before    \n")
    if taken < 11:
        with pytest.raises(LogError, match=error.strerror):
            log.append(b"0123456789\n")
        assert error.strerror in log.error
    else:
        log.append(b"0123456789\n")
        with pytest.raises(LogError):
            log.append(b"another\n")
    kept = ["before    "] + (["0123456789"] if taken == 11 else [])
    assert lines_of(tmp_path) == kept
    assert log.probe() == ""  # writing works again
    log.append(b"after\n")
    assert log.size_bytes == (tmp_path / "metrics.jsonl").stat().st_size
    log.close()
    assert lines_of(tmp_path) == [*kept, "after"]


def test_a_probe_tells_the_reason_for_as_long_as_it_lasts(tmp_path):
    disk = Disk(FULL, FULL, 100, FULL)
    log = MetricLog(str(tmp_path), write=disk.write)
    assert log.probe() == ""
    with pytest.raises(LogError):
        log.append(b"a\n")
    for _ in range(2):
        assert "No space left" in log.probe()
        assert lines_of(tmp_path) == []
    assert log.probe() == "" and lines_of(tmp_path) == []
    log.close()


def test_a_failed_fsync_refuses_all_who_waited_and_keeps_nothing_of_them(tmp_path):
    disk = Disk()
    log = MetricLog(str(tmp_path), "disk", fsync=disk.fsync)
    append_and_wait(log, b"safe\n")
    disk.syncs = [BROKEN]
    with pytest.raises(LogError, match="can't sync"):
        append_and_wait(log, b"unsafe\n")
    assert "can't sync" in log.error and lines_of(tmp_path) == ["safe"]
    assert log.probe() == ""
    append_and_wait(log, b"again\n")
    log.close()
    assert lines_of(tmp_path) == ["safe", "again"]


def test_only_one_thread_asks_the_kernel_whether_the_disk_works(tmp_path):
    asking: set[str] = set()
    disk = Disk()
    disk.syncs = [BROKEN, BROKEN]

    def fsync(fd: int) -> None:
        asking.add(threading.current_thread().name)
        disk.fsync(fd)

    log = MetricLog(str(tmp_path), "disk", fsync=fsync)
    with pytest.raises(LogError):
        append_and_wait(log, b"a\n")
    assert "can't sync" in log.probe()
    assert log.probe() == "" and asking == {"log"}
    log.close()
    assert lines_of(tmp_path) == []


def test_what_was_refused_is_gone_after_a_stop(tmp_path, monkeypatch):
    disk = Disk(5, 4, FULL)
    log = MetricLog(str(tmp_path), write=disk.write)
    log.append(b"good\n")
    truncate = os.ftruncate

    def broken(fd: int, size: int) -> None:
        monkeypatch.setattr(os, "ftruncate", truncate)
        raise BROKEN

    monkeypatch.setattr(os, "ftruncate", broken)
    with pytest.raises(LogError):
        log.append(b"a\nb\nc\n")
    log.close()
    assert lines_of(tmp_path) == ["good"]


def test_one_fsync_serves_all_who_wait(tmp_path):
    disk = Disk()
    disk.hold("fsync")
    log = MetricLog(str(tmp_path), "disk", fsync=disk.fsync)
    first = log.append(b"first\n")
    assert first and disk.stuck.wait(10)
    others = [log.append(b"%d\n" % number) for number in range(50)]  # none of them blocks
    assert not any(durable.done() for durable in (first, *others))
    disk.release()
    assert [durable.result(10) for durable in (first, *others)] == [None] * 51
    assert disk.sync_count == 2
    log.close()


def test_a_full_queue_refuses_rather_than_grows(tmp_path):
    disk = Disk()
    disk.hold()
    log = MetricLog(str(tmp_path), "memory", max_queued_bytes=20, write=disk.write)
    log.append(b"0123456789\n")
    assert disk.stuck.wait(10)
    log.append(b"queued\n")
    with pytest.raises(LogError, match="queue of the log is full"):
        log.append(b"too much\n")
    disk.release()
    eventually(lambda: log.size_bytes == 18)
    log.append(b"fits again\n")
    log.close()
    assert lines_of(tmp_path) == ["0123456789", "queued", "fits again"]


def test_the_writer_of_level_memory_keeps_what_the_disk_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(metricstream, "WRITE_RETRY_S", 0.01)
    disk = Disk(FULL, 3, FULL, BROKEN)
    log = MetricLog(str(tmp_path), "memory", write=disk.write)
    log.append(b"first\n")
    log.append(b"second\n")
    eventually(lambda: not disk.plan and not log.error)
    log.close()
    assert lines_of(tmp_path) == ["first", "second"]


@pytest.mark.parametrize("durability", LEVELS)
def test_a_moved_log_is_reopened_and_nothing_of_either_file_is_lost(tmp_path, durability):
    log = MetricLog(str(tmp_path), durability)
    append_and_wait(log, b'{"n":1}\n')
    os.rename(log.path, tmp_path / "moved")
    append_and_wait(log, b'{"n":2}\n')
    eventually(lambda: (tmp_path / "moved").read_bytes().count(b"\n") == 2)
    log.reopen()
    eventually(lambda: os.path.exists(log.path))
    append_and_wait(log, b'{"n":3}\n')
    log.close()
    assert (tmp_path / "moved").read_bytes() == b'{"n":1}\n{"n":2}\n'
    assert lines_of(tmp_path) == ['{"n":3}']


@pytest.mark.parametrize("durability", LEVELS)
def test_a_log_that_was_not_moved_may_be_reopened_too(tmp_path, durability):
    log = MetricLog(str(tmp_path), durability)
    for number in range(5):
        append_and_wait(log, b"%d\n" % number)
        log.reopen()
    log.close()
    assert lines_of(tmp_path) == list("01234")


@pytest.mark.parametrize("looks", [True, False], ids=["noticed", "noticed-at-the-stop"])
@pytest.mark.parametrize("durability", LEVELS)
def test_what_is_appended_to_a_deleted_log_is_found_in_a_new_one(tmp_path, durability, looks):
    log = MetricLog(str(tmp_path), durability)
    append_and_wait(log, b"before\n")
    eventually(lambda: log.size_bytes == len(b"before\n"))
    log.recreate_if_deleted()
    os.unlink(log.path)
    append_and_wait(log, b"after\n")
    eventually(lambda: log.size_bytes == len(b"before\nafter\n"))
    if looks:
        eventually(lambda: log.recreate_if_deleted() or os.path.exists(log.path))
        append_and_wait(log, b"later\n")
    log.close()
    assert lines_of(tmp_path) == ["after", "later"][: 1 + looks]


def test_a_log_that_is_copied_and_emptied_while_in_use_goes_on(tmp_path):
    log = MetricLog(str(tmp_path))
    log.append(b"copied\n" * 10)
    os.truncate(log.path, 0)
    log.recreate_if_deleted()
    log.append(b"kept\n")
    os.unlink(log.path)
    log.close()
    assert lines_of(tmp_path) == ["kept"]


def test_without_room_for_a_new_log_nothing_more_is_acknowledged(tmp_path):
    disk = Disk()
    log = MetricLog(str(tmp_path), "os", write=disk.write, fsync=disk.fsync)
    log.recreate_if_deleted()
    os.unlink(log.path)
    log.append(b"first\n")
    disk.plan = [3, FULL]  # while the new file is being filled
    log.recreate_if_deleted()
    with pytest.raises(LogError, match="No space left"):
        log.append(b"second\n")
    assert "No space left" in log.error
    log.recreate_if_deleted()
    log.append(b"third\n")
    log.close()
    assert lines_of(tmp_path) == ["first", "third"] and not log.error


def test_a_log_whose_folder_was_deleted_takes_nothing_more(tmp_path):
    log = MetricLog(str(tmp_path / "data"), "os")
    os.unlink(log.path)
    os.rmdir(tmp_path / "data")
    log.recreate_if_deleted()
    with pytest.raises(LogError, match="No such file"):
        log.append(b"line\n")
    log.close()


def test_closing_a_log_ends_it(tmp_path):
    for durability in LEVELS:
        log = MetricLog(str(tmp_path), durability)
        log.append(b"x\n")
        log.close()
        with pytest.raises(LogError, match="closed"):
            log.append(b"y\n")
        log.close()
    assert lines_of(tmp_path) == ["x"] * 3


@pytest.mark.parametrize("durability", ["os", "disk"])
@pytest.mark.parametrize("error", [FULL, BROKEN, None], ids=["ENOSPC", "EIO", "no-error"])
def test_a_write_may_stop_anywhere(tmp_path, durability, error):
    """After every possible number of octets of a batch: an error, or just a short write."""
    disk = Disk()
    log = MetricLog(str(tmp_path), durability, write=disk.write, fsync=disk.fsync)
    kept = []
    batch = b'{"name":"a","value":1}\n{"name":"b","value":2}\n'
    for length in range(len(batch) + 1):
        lines = batch.replace(b"1", b"%d" % length)
        disk.plan = [length, error] if error else [max(1, length), 1]
        if error and length < len(lines):
            with pytest.raises(LogError):
                append_and_wait(log, lines)
            assert log.probe() == "" and not disk.plan
        else:
            append_and_wait(log, lines)
            kept.append(lines)
        disk.plan = []
    log.close()
    assert Path(log.path).read_bytes() == b"".join(kept)


def test_a_fault_in_the_thread_of_the_log_costs_one_group(tmp_path, caplog):
    disk = Disk()
    disk.syncs = [RuntimeError("a fault of ours")]
    log = MetricLog(str(tmp_path), "disk", fsync=disk.fsync)
    with running(tmp_path, log=log) as started:
        failed = answer_once(started.port, post())
        assert failed.status in (500, 503) and b"internal error in the log" in failed.body
        eventually(lambda: answer_once(started.port, HEALTH).status == 200)
        assert answer_once(started.port, post()).status == 200
    assert len(lines_of(tmp_path)) == 1 and "a fault of ours" in caplog.text


# ---- crashes and full disks ----


@at_once(["os", "disk"])
def test_nothing_acknowledged_is_lost_to_kill_9(tmp_path, durability):
    rng = random.Random(f"kill -9 at level {durability}")
    acknowledged: set[str] = set()
    for round_ in range(scaled(4, 100)):
        with ServerProcess(tmp_path, "--durability", durability, "--rate-limit", "0") as started:
            writers, most = Writers(started.port, str(round_)), rng.randrange(1, 400)
            eventually(lambda w=writers, most=most: len(w.acknowledged) >= most)
            started.process.kill()
            started.process.wait()
            writers.join()
        acknowledged |= writers.acknowledged
        if rng.random() < 0.5:  # a tear in the middle of a write, which kill -9 itself seldom makes
            with open(tmp_path / "metrics.jsonl", "ab") as log:
                log.write(b'{"timestamp":"2025-09-17T13:45:23.123Z","na'[: rng.randrange(1, 43)])
    with ServerProcess(tmp_path) as started:
        assert started.stop()[0] == 0
    assert_kept(acknowledged, tmp_path)


@needs_prlimit
@at_once(LEVELS)
def test_a_disk_that_is_full_for_a_while_costs_nothing_acknowledged(tmp_path, durability):
    log = tmp_path / "metrics.jsonl"
    threads = "0" if durability == "os" else "1"
    options = ("--durability", durability, "--threads", threads, "--rate-limit", "0")
    with ServerProcess(tmp_path, *options) as started:
        with contextlib.closing(Client(started.port)) as client:
            acknowledged: set[str] = set()

            def post_batch(number: int) -> int:
                names = [f"w.{number}.{index}" for index in range(Writers.BATCH)]
                batch = {"metrics": [{"name": name, "value": 1} for name in names]}
                answer = client.ask("POST", "/metrics", batch)
                if answer.status == 200:
                    acknowledged.update(names)
                else:
                    assert answer.status == 503 and answer.headers["retry-after"] == "1"
                    assert "File too large" in answer.json["error"]
                return answer.status

            assert post_batch(0) == 200
            size = eventually(lambda: log.stat().st_size)
            # where in a line the room ends makes no difference; level memory takes 0.5 s for each
            for room in range(0, 2 * size, 29 if durability != "memory" else 200):
                end = log.stat().st_size
                limit_file_size(started.process, end + room)
                statuses = [post_batch(1000 * (room + 1) + number) for number in range(3)]
                assert durability == "memory" or statuses[-1] == 503
                health = eventually(lambda: (a := client.ask("GET", "/health")).status == 503 and a)
                assert "File too large" in str(health.body)
                limit_file_size(started.process, resource.RLIM_INFINITY)
                eventually(lambda: client.ask("GET", "/health").status == 200)
            assert post_batch(1) == 200
        status, _, err = started.stop()
    assert (status, err) == (0, "")
    assert_kept(acknowledged, tmp_path)
    assert set(names_in(log)) == acknowledged  # nothing of what was refused
    assert_whole_batches(tmp_path)


@contextlib.contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    """256 KiB of memory, mounted there; skips the test where that is not allowed."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@at_once()
def test_a_file_system_that_is_full_is_told_and_got_over(tmp_path):
    folder = tmp_path / "small"
    with small_file_system(folder):
        (folder / "filler").write_bytes(bytes(128 * 1024))
        with ServerProcess(folder, "--rate-limit", "0") as started:
            writers = Writers(started.port, "w", count=2)
            eventually(lambda: writers.statuses[503] > 10)
            (folder / "filler").unlink()
            before = len(writers.acknowledged)
            eventually(lambda: len(writers.acknowledged) > before)
            writers.stop()
            assert started.stop()[0] == 0
        assert set(writers.statuses) == {200, 503}
        assert_kept(writers.acknowledged, folder)
        assert_whole_batches(folder)


@at_once()
def test_a_log_that_may_not_be_written_is_refused_at_the_start(tmp_path):
    log = tmp_path / "small" / "metrics.jsonl"
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:  # whom modes of files do not stop
            stack.enter_context(small_file_system(log.parent))
        else:
            log.parent.mkdir()
        log.touch(0o444)
        if os.geteuid() == 0:
            subprocess.run(["mount", "-o", "remount,ro", str(log.parent)], check=True)
        ended = run("0", "--data-dir", str(log.parent))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"metricstream.py: error: can't use .*/metrics.jsonl: "
                        r"(Read-only file system|Permission denied)\n", ended.stderr)  # fmt: skip


@at_once(LEVELS)
def test_a_log_that_is_deleted_under_load_loses_nothing_acknowledged_afterwards(
    tmp_path, durability
):
    with ServerProcess(tmp_path, "--durability", durability, "--rate-limit", "0") as started:
        with contextlib.closing(Client(started.port)) as client:
            after = set()
            for count in range(200):
                if count == 100:
                    os.unlink(tmp_path / "metrics.jsonl")
                metric = {"name": f"n{count}", "value": 1}
                assert client.ask("POST", "/metrics", {"metrics": [metric]}).status == 200
                after |= {metric["name"]} if count >= 100 else set()
        assert started.stop()[0] == 0
    kept = [json.loads(line)["name"] for line in lines_of(tmp_path)]
    assert after <= set(kept) and len(set(kept)) == len(kept)


# ==================================================================================================
# Statistics
# ==================================================================================================


def test_a_reader_of_the_ring_knows_what_it_missed():
    ring = EventRing(8)
    for number in range(5):
        ring.append(number)
    events, next_, missed = ring.read()
    assert (events, next_, missed) == ([0, 1, 2, 3, 4], 5, 0)
    for number in range(5, 30):
        ring.append(number)
    assert ring.read(since=next_) == (list(range(22, 30)), 30, 17)
    assert ring.read(since=30) == ([], 30, 0)


def test_readers_of_the_ring_see_whole_events_in_order_while_writers_write():
    ring = EventRing(64)
    stop = threading.Event()

    def write(writer: int) -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            ring.append((writer, number, writer * number))

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(1, 5)]
    for thread in writers:
        thread.start()
    since = seen = missed_in_all = 0
    last: Counter[int] = Counter()
    try:
        while seen < 1_000:
            events, since, missed = ring.read(since)
            seen += len(events)
            missed_in_all += missed
            for writer, number, product in events:
                assert product == writer * number
                assert number >= last[writer]
                last[writer] = number
            assert missed >= 0 and seen + missed_in_all == since
    finally:
        stop.set()
        for thread in writers:
            thread.join()


def test_statistics_count_what_happened():
    clock = Clock()
    statistics = Statistics(clock)
    statistics.add("log_bytes", "gauge", "Size of the log file.", lambda: 7, "log_size_bytes")
    for latency_ms, status, metrics in ((1, 200, 3), (2, 200, 5), (3, 429, 0), (10, 400, 0)):
        event = metricstream.Event(clock(), "a", status, latency_ms / 1000, metrics)
        statistics.record(event, invalid=status == 400)
    clock.now += 2.0
    numbers = statistics.snapshot()
    assert numbers == {
        "metrics_received": 8, "batches_processed": 2, "validation_errors": 1,
        "rate_limited_requests": 1, "requests_total": {"200": 2, "400": 1, "429": 1},
        "latency_ms": {"p50": 2.0, "p90": 10.0, "p95": 10.0, "p99": 10.0},
        "latency_seconds_sum": 0.016, "requests_per_second": 2.0, "uptime_seconds": 2.0,
        "log_bytes": 7,
    }  # fmt: skip


def parse_exposition(text: str) -> dict[str, float]:
    """Prometheus's text format 0.0.4, of which nothing is forgiven: samples by name and labels.

    Each family is declared once, and before its samples.
    """
    declared: dict[str, str] = {}
    helped: set[str] = set()
    samples: dict[str, float] = {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if match := re.fullmatch(r"# HELP ([a-z_]+) [!-~][ -~]*\.", line):
            assert match[1] not in helped, line
            helped.add(match[1])
        elif match := re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge|summary)", line):
            assert match[1] in helped and match[1] not in declared, line
            declared[match[1]] = match[2]
        else:
            match = re.fullmatch(
                r'((metricstream_[a-z_]+?)(_sum|_count)?(?:\{[a-z]+="[ !#-\[\]-~]+"\})?) ([0-9.e+-]+)', line
            )
            assert match and match[1] not in samples, line
            family = match[2] if match[2] in declared else match[2] + (match[3] or "")
            assert family in declared, line
            assert declared[family] != "counter" or family.endswith("_total"), line
            samples[match[1]] = float(match[4])
    return samples


def test_prometheus_text_declares_each_family_once_and_before_its_samples():
    statistics = Statistics()
    statistics.record(metricstream.Event(time.time(), "a", 200, 0.001, 1))
    text = statistics.prometheus()
    assert parse_exposition(text)["metricstream_request_duration_seconds_count"] == 1
    assert "# TYPE metricstream_request_duration_seconds summary\n" in text


@pytest.mark.parametrize("client, label", [
    ("load_client_7", "load_client_7"), ("127.0.0.1", "127.0.0.1"), ("a\x9b[2Jb", "a\\u009b[2Jb"),
    ('say "x"', r"say-[0-9a-f]{8}"), ("Bearer abc.def", r"Bearer-[0-9a-f]{8}"),
    ("Basic dXNlcjpwYXNz", r"Basic-[0-9a-f]{8}"), ("k" * 100, r"long-[0-9a-f]{8}"),
])  # fmt: skip
def test_a_credential_is_never_shown(client, label):
    shown = metricstream.client_label(client)
    assert shown == label or re.fullmatch(label, shown)
    assert client.partition(" ")[2] not in shown or " " not in client


def client_ids() -> Iterator[bytes]:
    """Client ids that HTTP allows to be sent: alone, with a space (a credential), and long."""
    for text in NASTY_TEXTS.values():
        octets = re.sub(rb"[\0-\x08\x0a-\x1f\x7f]", b"", text.encode())
        raw = re.sub(rb"[\0-\x08\x0a-\x1f\x7f]", b"", text.encode("latin-1", "ignore"))
        for client in (octets, raw):
            if client:
                yield from (client, client + b" secret", b"a " + client, client * 70)


def test_each_client_id_has_a_label_of_its_own_that_no_terminal_obeys():
    clients = sorted({client.strip(b" \t").decode("latin-1") for client in client_ids()} - {""})
    labels = list(map(metricstream.client_label, clients))
    assert len(set(labels)) == len(labels)
    for client, label in zip(clients, labels):
        assert not UNSAFE.search(label), ascii(label)
        assert "secret" not in label
        if " " not in client and len(client) <= 64:
            assert json.loads(f'"{label}"') == client


def test_the_summary_of_the_limiter_is_one_line_whoever_asks():
    limiter = SlidingWindowLimiter(1, clock=Clock())
    for number in range(1000):
        for _ in range(2 + number // 998):
            limiter.decide(f"client\n{number} secret")
    summary = metricstream.limiter_summary(limiter)
    assert summary.startswith("clients: 1000 with 1000 requests allowed, 1002 refused; busiest ")
    assert len(re.findall(r"[0-9a-f]{8} 1\+[12]", summary)) == 10 and len(summary) < 1000
    assert "\n" not in summary and "secret" not in summary
    assert metricstream.limiter_summary(limiter) == ""


@at_once([1, 0])
def test_a_client_id_can_forge_nothing(tmp_path, threads):
    """Neither a line on stdout nor a member of the statistics, and no terminal obeys it."""
    clients = sorted({client.strip(b" \t") for client in client_ids()} - {b""})
    options = ("--threads", str(threads), "--log-level", "debug", "--rate-limit", "1000")
    with ServerProcess(tmp_path, *options) as started:
        raw = b"".join(post(b"Authorization: " + client) for client in clients)
        answers, closed = exchange(started.port, raw, expect=len(clients))
        assert {answer.status for answer in answers} == {200} and not closed
        (statistics, text), _ = exchange(
            started.port, get(b"/metrics") + get(b"/metrics", b"Accept: text/plain"), expect=2
        )
        numbers = strict_json(statistics.body)
        samples = parse_exposition(text.body.decode())
        assert numbers["metrics_received"] == numbers["clients_tracked"] == len(clients)
        assert samples["metricstream_metrics_received_total"] == len(clients)
        assert samples["metricstream_clients_tracked"] == len(clients)
        status, out, err = started.stop()
    assert (status, err) == (0, "")
    *tallies, stopped = out.removesuffix("\n").split("\n")
    for line in (*tallies, stopped):
        assert not UNSAFE.search(line), ascii(line)
    (summary,) = (line for line in tallies if " INFO clients: " in line)
    assert f"clients: {len(clients)} with {len(clients)} requests allowed, 0 refused" in summary
    assert not re.search("secret", out) and json.loads(stopped.removeprefix("stopped "))


# ==================================================================================================
# Service
# ==================================================================================================


def test_a_posted_metric_is_in_the_log_when_it_is_acknowledged(server, client):
    metric = {"name": "posted", "value": 75.5, "type": "counter", "tags": {"host": "web1"},
              "timestamp": "2025-09-17T13:45:23.123Z"}  # fmt: skip
    already = len(logged(server.folder, "posted"))
    answer = client.ask("POST", "/metrics", {"metrics": [metric]}, Content_Type="application/json")
    assert (answer.status, answer.json) == (200, {"success": True, "metrics_processed": 1})
    assert logged(server.folder, "posted")[already:] == [metric]


def test_a_line_of_the_log_can_be_posted_back(server, client):
    before = client.ask("POST", "/metrics", {"metrics": [{"name": "echo", "value": 1e21}]})
    line = logged(server.folder, "echo")[-1]
    again = client.ask("POST", "/metrics", {"metrics": [line]})
    assert before.status == again.status == 200
    assert logged(server.folder, "echo")[-1] == line


def test_a_bad_metric_rejects_the_whole_batch(server, client):
    good, bad = {"name": "half", "value": 1}, {"name": "half", "value": "1"}
    answer = client.ask("POST", "/metrics", {"metrics": [good, good, good, bad]})
    error = "metrics[3].value: must be a finite number or null, not a string"
    assert answer.status == 400
    assert answer.json == {
        "error": error,
        "errors": [{"index": 3, "field": "value", "message": error.partition(": ")[2]}],
    }
    assert logged(server.folder, "half") == []


def test_an_exact_number_of_requests_a_second_is_allowed(tmp_path, threads):
    with running(tmp_path, threads=threads) as started:
        clock = Clock()
        started.service.limiter = SlidingWindowLimiter(3, clock=clock)
        with contextlib.closing(Client(started.port)) as client:
            for left in (2, 1, 0):
                answer = client.ask("POST", "/metrics", BATCH, Authorization="a")
                assert answer.status == 200
                assert answer.headers["ratelimit"] == f'"default";r={left};t=1'
            refused = client.ask("POST", "/metrics", BATCH, Authorization="a")
            assert refused.status == 429 and "more than 3 requests in 1 s" in refused.json["error"]
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["ratelimit-policy"] == '"default";q=3;w=1'
            assert refused.headers["ratelimit"] == '"default";r=0;t=1'
            assert client.ask("POST", "/metrics", BATCH, Authorization="b").status == 200
            for path in ("/health", "/metrics"):  # only POST /metrics counts
                assert client.ask("GET", path, Authorization="a").status == 200
            assert client.ask("POST", "/metrics", BATCH, Authorization="a").status == 429
            clock.now += 1.0
            assert client.ask("POST", "/metrics", BATCH, Authorization="a").status == 200
        assert len(lines_of(tmp_path)) == 5


@pytest.mark.parametrize("origin, status", [
    ("http://{host}", 200), ("https://{host}", 200), ("HTTP://{host}", 200), ("null", 403),
    ("http://evil.example", 403), ("http://{host}.evil.example", 403), ("http://localhost:1", 403),
    ("{host}", 403), ("", 403),
])  # fmt: skip
def test_a_page_of_another_origin_may_not_write(server, client, origin, status):
    origin = origin.format(host=f"127.0.0.1:{server.port}")
    answer = client.ask("POST", "/metrics", BATCH, Origin=origin)
    assert answer.status == status
    assert client.ask("GET", "/health", Origin=origin).status == 200


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1:{port}", 200), ("[::1]:{port}", 200), ("localhost:{port}", 200), ("LOCALHOST", 200),
    ("metrics.lan", 200), ("Metrics.LAN:8080", 200), ("evil.example:{port}", 403), ("evil.example", 403),
    ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("metrics.lan.evil.example", 403),
])  # fmt: skip
def test_a_page_whose_name_was_made_to_resolve_to_this_machine_may_not_write(
    tmp_path, host, status
):
    service = a_service(tmp_path, allowed_hosts=["metrics.LAN"])
    fields = [b"Host: " + host.format(port=8080).encode()]
    origin = b"Origin: http://" + host.format(port=8080).encode()
    assert answer_to(service, post(origin, *fields, host=None)).status == status
    assert answer_to(service, post(*fields, host=None)).status == 200  # no browser
    service.log.close()


KEY = "k3y-of-web1"
KEY_LINE = f"web1 {hashlib.sha256(KEY.encode()).hexdigest()}"


@pytest.mark.parametrize("authorization, status", [
    (f"Bearer {KEY}", 200), (f"bearer  {KEY}", 200), (KEY, 200), (None, 401), ("Bearer", 401),
    (f"Bearer {KEY}x", 401), (f"Basic {KEY}", 401), ("web1", 401), (KEY_LINE.split()[1], 401),
    ("Bearer \u00fc", 401), (f"Bearer {KEY_LINE.split()[1]}", 401),
])  # fmt: skip
def test_only_listed_clients_may_write(tmp_path, authorization, status):
    service = a_service(tmp_path, clients=ClientList(f"# ours\n\n{KEY_LINE}\n", "list"))
    fields = [b"Authorization: " + authorization.encode("latin-1")] if authorization else []
    answer = answer_to(service, post(*fields))
    assert answer.status == status
    octets = answer.encode(metricstream.KEEP, b"Date: now\r\n")
    assert (b"\r\nWWW-Authenticate: Bearer\r\n" in octets) == (status == 401)
    assert KEY.encode() not in octets
    assert answer_to(service, get(b"/health", *fields)).status == 200
    assert answer_to(service, get(b"/metrics", *fields)).status == 200
    assert KEY not in service.statistics.prometheus() + repr(service.statistics.ring.read()[0])
    service.log.close()


def test_a_listed_client_may_have_a_rate_of_its_own(tmp_path):
    listed = "".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()} {rate}\n"
                     for name, rate in [("few", 2), ("many", 50), ("usual", ""), ("free", 0)])  # fmt: skip
    service = a_service(tmp_path, limit=5, clients=ClientList(listed, "list"))
    allowed = Counter()
    for name in ["few", "many", "usual", "free"] * 60:
        answer = answer_to(service, post(b"Authorization: " + name.encode()))
        allowed[name] += answer.status == 200
    assert allowed == {"few": 2, "many": 50, "usual": 5, "free": 60}
    assert b'"default";q=2;w=1' in answer_to(service, post(b"Authorization: few")).encode(
        b"", b"Date: now\r\n"
    )
    service.log.close()


def test_keys_are_compared_in_constant_time_whether_known_or_not(monkeypatch):
    compared = []
    monkeypatch.setattr(metricstream.hmac, "compare_digest",
                        lambda a, b: compared.append((len(a), len(b))) or a == b)  # fmt: skip
    clients = ClientList(KEY_LINE, "list")
    assert [clients.identify(key) for key in (KEY, "guess", "")] == ["web1", None, None]
    assert compared == [(32, 32)] * 3


@pytest.mark.parametrize("text, reason", [
    ("web1", "line 1: expected 'name sha256-of-key"), (f"# list\n{KEY_LINE} fast", "line 2: expected"),
    ("web1 " + "0" * 63, "line 1: expected"), ("web1 " + "g" * 64, "line 1: expected"),
    ("10.0.0.7 " + "0" * 64, "line 1: expected"), ("fe80::1 " + "0" * 64, "line 1: expected"),
    (KEY_LINE + " 1_000", "line 1: expected"), (KEY_LINE + " \u0663", "line 1: expected"),
    (f"{KEY_LINE}\nweb2 {KEY_LINE.split()[1]}", "line 2: this key stands there twice"),
    (f"web1 {KEY}", "line 1: expected"),
])  # fmt: skip
def test_a_broken_list_of_clients_is_refused_with_its_place_and_without_its_keys(text, reason):
    with pytest.raises(ClientListError) as caught:
        ClientList(text, "clients.txt")
    assert str(caught.value).startswith(f"clients.txt, {reason}") and KEY not in str(caught.value)


def test_statistics_account_for_every_request(tmp_path, threads):
    with running(tmp_path, threads=threads) as started:
        with contextlib.closing(Client(started.port)) as client:
            for body in (BATCH, BATCH, b"{", b"{}"):
                client.ask("POST", "/metrics", body)
            client.ask("GET", "/nowhere")
            numbers = client.ask("GET", "/metrics").json
        assert numbers["requests_total"] == {"200": 2, "400": 2, "404": 1}
        assert numbers["metrics_received"] == numbers["batches_processed"] == 2
        assert numbers["validation_errors"] == 2
        assert numbers["log_bytes"] == (tmp_path / "metrics.jsonl").stat().st_size
        assert numbers["connections_open"] == 1


def test_prometheus_gets_its_text_and_others_get_json(client):
    accept = (
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"
    )
    text = client.ask("GET", "/metrics", Accept=accept)
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"# TYPE metricstream_metrics_received_total counter\n" in text.body
    assert "metrics_received" in client.ask("GET", "/metrics", Accept="*/*").json


def test_level_disk_answers_after_the_sync_and_503_when_it_fails(tmp_path, threads):
    disk = Disk()
    log = MetricLog(str(tmp_path), "disk", fsync=disk.fsync)
    with running(tmp_path, log=log, threads=threads) as started:
        raw = post() * 5 + get()
        answers, closed = exchange(started.port, raw, expect=6)
        assert [answer.status for answer in answers] == [200] * 6 and not closed
        assert disk.sync_count == 5
        disk.syncs = [BROKEN]
        (refused,), closed = exchange(started.port, post())
        assert refused.status == 503 and "can't sync" in refused.json["error"] and not closed
        (accepted,), _ = exchange(started.port, post())
        assert accepted.status == 200
    assert len(lines_of(tmp_path)) == 6


def test_an_unexpected_error_costs_one_connection(tmp_path, threads, caplog):
    with running(tmp_path, threads=threads) as started:

        def fail() -> float:
            raise RuntimeError("two\nlines")

        started.service.statistics.add("broken", "gauge", "Never there.", fail)
        (answer,), closed = exchange(started.port, get(b"/metrics"))
        assert (answer.status, closed) == (500, True)
        assert "RuntimeError" not in answer.json["error"]
        assert_healthy(started.port)
        assert started.service.statistics.ring.read()[0][0].status == 500
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()
    assert "RuntimeError" in caplog.records[0].getMessage()


@pytest.mark.parametrize("text", NASTY_TEXTS.values(), ids=NASTY_TEXTS)
def test_an_error_repeats_nothing_raw(watched, text):
    """What an error quotes of a request is quoted so that no terminal obeys it."""
    started, _ = watched
    octets = text.encode()
    value = json.dumps(text, ensure_ascii=False).encode()
    metric = b'{"name":"a","value":1,%b}'
    requests = [
        get(b"/" + octets), get(b"/" + b"".join(b"%%%02x" % octet for octet in octets)),
        head(octets + b" / HTTP/1.1"), get(b"/", b"Host: " + octets), get(b"/", octets + b": a"),
        get(b"/health", b"Expect: " + octets), post(b"Origin: " + octets),
        post(b"Content-Type: " + octets), gzipped(BATCH, b"Content-Encoding: " + octets),
        framed(b"Content-Length: " + octets), chunked(octets + b"\r\n"), chunked(b"",
        coding=octets),
        post(body=octets), post(body=b"{" + value + b":1}"),
        post(body=b'{"metrics":' + value + b"}"),
        post(body=b'{"metrics":[%b]}' % (metric % (value + b":1"))),
        post(body=b'{"metrics":[%b]}' % (metric % (b'"type":' + value))),
        post(body=b'{"metrics":[%b]}' % (metric % (b'"timestamp":' + value))),
        post(body=b'{"metrics":[%b]}' % (metric % (b'"tags":{%b:1}' % value))),
        post(body=b'{"metrics":[%b]}' % (metric % (b'"tags":{%b:"a"}' % (b'"%b"' % (value[1:-1] * 129))))),
    ]  # fmt: skip
    refused = 0
    for raw in requests:
        answers, _ = exchange(started.port, raw, half_close=True)
        for answer in answers:
            assert not UNSAFE.search(answer.body.decode()), (raw, answer)
            assert isinstance(answer.json, dict)
            refused += 400 <= answer.status < 500 and "error" in answer.json
    assert refused >= 12


# ==================================================================================================
# Server
# ==================================================================================================


def test_a_server_can_be_started_and_stopped_many_times(tmp_path, threads):
    threads_before = threading.active_count()
    files_before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with running(tmp_path, threads=threads) as started:
            assert_healthy(started.port)
    assert threading.active_count() == threads_before
    assert len(os.listdir("/proc/self/fd")) == files_before


def test_accepted_sockets_send_without_delay(tmp_path):
    with running(tmp_path) as started, connect(started.port) as connection:
        connection.sendall(HEALTH)
        assert connection.recv(1000)
        (served,) = started.server.connections.open.values()
        assert served.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_does_not_arrive_in_time_is_ended(tmp_path, threads):
    """Nothing, a part of a request line, of a head, a body, a chunk, and of a second request."""
    sent = {
        b"": [], b"POST /met": [408], get()[:-2]: [408], post()[:-5]: [408],
        chunked(b"5\r\nhel"): [408], get() + b"GET": [200, 408],
    }  # fmt: skip
    with running(tmp_path, threads=threads, timeouts=SHORT) as started:
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(started.port)) for _ in sent]
            for connection, part in zip(connections, sent):
                connection.sendall(part)
            for connection, part in zip(connections, sent):
                stream = stack.enter_context(connection.makefile("rb"))
                for status in sent[part]:
                    answer = read_answer(stream)
                    assert answer and answer.status == status, part
                assert stream.read() == b"", part
        eventually(lambda: open_connections(started) == 0)


def test_an_unread_answer_is_given_up(tmp_path, threads):
    with running(tmp_path, threads=threads, timeouts=SHORT) as started:
        started.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # inherited
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", started.port))
            deaf.sendall(get(b"/metrics") * 100)
            assert_healthy(started.port)
            eventually(lambda: open_connections(started) == 0)
            received = b""
            with contextlib.suppress(ConnectionError):
                while piece := deaf.recv(65536):
                    received += piece
            assert received.count(b"HTTP/1.1 200 ") < 100


def test_beyond_the_limit_the_connection_idle_longest_makes_room(tmp_path, threads):
    with running(tmp_path, threads=threads, max_connections=3) as started:
        with contextlib.ExitStack() as stack:
            first, *others = [stack.enter_context(connect(started.port)) for _ in range(3)]

            def last_idle() -> object:
                with started.server.connections.lock:
                    return next(reversed(started.server.connections.idle.queue)).socket.getpeername()

            eventually(lambda: len(started.server.connections.idle.queue) == 3)
            for connection in (first, *others):
                connection.sendall(HEALTH)
                assert b" 200 " in connection.recv(1000)
                # the answer may leave before the connection is parked, as the last of the idle
                name = connection.getsockname()
                eventually(lambda name=name: last_idle() == name)
            assert_healthy(started.port)  # a fourth
            assert first.recv(1) == b""
            others[-1].sendall(HEALTH)
            assert b" 200 " in others[-1].recv(1000)


def test_a_worker_that_is_held_up_holds_nobody_up(tmp_path):
    disk = Disk()
    log = MetricLog(str(tmp_path), write=disk.write)
    with running(tmp_path, log=log, threads=1) as started, connect(started.port) as slow:
        assert_healthy(started.port)
        before = threading.active_count()
        disk.hold("write", b"slow")
        slow.sendall(post(body=b'{"metrics":[{"name":"slow","value":1}]}'))
        assert disk.stuck.wait(10)
        for _ in range(10):
            assert_healthy(started.port)
        assert threading.active_count() == before + 1  # it was replaced
        disk.release()
        assert b" 200 OK" in slow.recv(1000)
        eventually(lambda: threading.active_count() == before)


@pytest.mark.parametrize("hanging, durability", [("write", "os"), ("write", "disk"), ("fsync", "disk")])
def test_a_disk_that_does_not_answer_holds_up_nobody(tmp_path, threads, hanging, durability):
    """Eighty posts while it hangs: 503 for all but those that wait for it, and health says why;
    what got a 200, then or later, is in the log.
    """
    disk, clock = Disk(), Clock()
    log = MetricLog(str(tmp_path), durability, write=disk.write, fsync=disk.fsync, clock=clock)
    with running(tmp_path, log=log, threads=threads) as started, contextlib.ExitStack() as stack:
        assert answer_once(started.port, post()).status == 200
        disk.hold(hanging)
        connections = [stack.enter_context(connect(started.port)) for _ in range(80)]
        for connection in connections:
            connection.sendall(post())
        assert disk.stuck.wait(10)
        clock.now += metricstream.STALL_S
        health = eventually(lambda: (a := answer_once(started.port, HEALTH)).status == 503 and a)
        assert "does not answer" in str(health.body)
        refused = answer_once(started.port, post())
        assert refused.status == 503 and b"does not answer" in refused.body
        if durability == "os":  # at level disk, who has been written waits for the sync
            eventually(lambda: sum(map(readable, connections)) > 60)
        disk.release()
        statuses = Counter(answer_on(connection).status for connection in connections)
        assert set(statuses) <= {200, 503} and (durability == "disk" or statuses[503] > 60)
        eventually(lambda: answer_once(started.port, HEALTH).status == 200)
        assert answer_once(started.port, post()).status == 200
    assert len(lines_of(tmp_path)) == 2 + statuses[200]


def test_posts_on_parked_connections_beside_a_hung_write_stop_nobody(tmp_path):
    """A worker that takes over is replaced, too, if its first turns are held up."""
    disk = Disk()
    log = MetricLog(str(tmp_path), write=disk.write)
    with running(tmp_path, log=log, threads=1) as started, contextlib.ExitStack() as stack:
        parked = [stack.enter_context(connect(started.port)) for _ in range(7)]
        for connection in parked:
            connection.sendall(HEALTH)
            assert answer_on(connection).status == 200
        disk.hold()
        for connection in parked:
            connection.sendall(post())
        assert disk.stuck.wait(10)
        for _ in range(5):
            assert answer_once(started.port, get(b"/metrics")).status == 200
        disk.release()
        assert {answer_on(connection).status for connection in parked} <= {200, 503}


def test_latency_counts_the_wait_for_a_turn(tmp_path):
    """Many large batches at once: what the server says of their latency is what clients see."""
    body = json.dumps({"metrics": [{"name": f"m{n}", "value": n / 7} for n in range(1000)]}).encode()
    with running(tmp_path, threads=1) as started, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(started.port, 30)) for _ in range(40)]
        began = time.perf_counter()
        for connection in connections:
            connection.sendall(post(body=body))
        seen_s = 0.0
        for connection in connections:
            assert answer_on(connection).status == 200
            seen_s += time.perf_counter() - began
        statistics = answer_once(started.port, get(b"/metrics")).json
    assert isinstance(statistics, dict) and statistics["latency_seconds_sum"] > seen_s / 8


def test_a_request_that_has_arrived_is_answered_before_a_stop(tmp_path, threads):
    with running(tmp_path, threads=threads) as started, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(started.port)) for _ in range(50)]
        for connection in connections:
            connection.sendall(HEALTH)
            assert b" 200 " in connection.recv(1000)
        for connection in connections:
            connection.sendall(post())
        started.server.stop_soon()
        for connection in connections:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert len(lines_of(tmp_path)) == 50


def test_without_a_thread_to_be_had_the_server_goes_on(tmp_path, monkeypatch):
    disk, refused = Disk(), threading.Event()

    def no_thread(thread: threading.Thread) -> None:
        refused.set()
        raise RuntimeError("can't start new thread")

    with running(tmp_path, log=MetricLog(str(tmp_path), write=disk.write)) as started:
        assert_healthy(started.port)  # its worker has started
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        disk.hold()
        with connect(started.port) as connection:
            connection.sendall(post())
            assert disk.stuck.wait(10) and refused.wait(10)
            disk.release()
            assert b" 200 OK" in connection.recv(1000)
        assert_healthy(started.port)


def test_a_stuck_connection_keeps_no_room_from_others(tmp_path):
    disk = Disk()
    log = MetricLog(str(tmp_path), write=disk.write)
    with running(tmp_path, log=log, max_connections=3) as started, contextlib.ExitStack() as stack:
        slow, *idle = [stack.enter_context(connect(started.port)) for _ in range(3)]
        for connection in (slow, *idle):
            connection.sendall(HEALTH)
            assert b" 200 " in connection.recv(1000)
        disk.hold()
        slow.sendall(post())
        assert disk.stuck.wait(10)
        assert_healthy(started.port)  # a fourth: the first of the idle ones made room
        assert idle[0].recv(1) == b""
        disk.release()
        assert b" 200 OK" in slow.recv(1000)


def test_several_workers_share_the_connections(tmp_path):
    with running(tmp_path, threads=4) as started:
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                connections = [stack.enter_context(connect(started.port)) for _ in range(40)]
                for _ in range(10):
                    for connection in connections:
                        connection.sendall(post())
                    for connection in connections:
                        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert len(lines_of(tmp_path)) == 1200


@at_once(itertools.product([1, 0], LEVELS))
def test_a_stop_under_load_answers_what_is_in_flight_and_loses_nothing(
    tmp_path, threads, durability
):
    options = ("--durability", durability, "--threads", str(threads), "--rate-limit", "0")
    with ServerProcess(tmp_path, *options) as started:
        writers = Writers(started.port, "w", count=8)
        eventually(lambda: len(writers.acknowledged) > 300)
        status, out, err = started.stop()  # within 5 s
        writers.join()
    assert (status, err) == (0, "")
    statistics = json.loads(out.splitlines()[-1].removeprefix("stopped "))
    assert statistics["metrics_received"] == len(writers.acknowledged)
    assert set(writers.statuses) <= {200, 503}
    assert_kept(writers.acknowledged, tmp_path)
    assert_whole_batches(tmp_path)


@pytest.mark.parametrize("step_s", [3600, -3600], ids=["forward", "back"])
def test_a_step_of_the_clock_changes_neither_rates_nor_time_outs(
    tmp_path, threads, monkeypatch, step_s
):
    now, step = time.time, [0]
    monkeypatch.setattr(time, "time", lambda: now() + step[0])
    limit = 100
    clock = lambda: time.time()  # noqa: E731
    with running(tmp_path, limit=limit, threads=threads, wall_clock=clock) as started:
        idle, unfinished = connect(started.port), connect(started.port)
        with contextlib.closing(idle), contextlib.closing(unfinished):
            idle.sendall(HEALTH)
            assert b" 200 " in idle.recv(1000)
            unfinished.sendall(post()[:-1])
            eventually(lambda: open_connections(started) == 2)
            statuses = Counter()
            with contextlib.closing(Client(started.port)) as client:
                for number in range(3 * limit):
                    if number == limit // 2:
                        step[0] = step_s
                        started.server.expire()
                    statuses[client.ask("POST", "/metrics", BATCH).status] += 1
                numbers = json.loads(client.ask("GET", "/metrics").body)
            spent_s = numbers["uptime_seconds"]
            assert limit <= statuses[200] <= limit * (1 + spent_s) and statuses[429]
            assert 0 <= spent_s < 600 and numbers["requests_per_second"] > 0
            unfinished.sendall(post()[-1:])
            assert unfinished.recv(1000).startswith(b"HTTP/1.1 ")
            idle.sendall(HEALTH)
            assert b" 200 " in idle.recv(1000)
    stamps = [metric["timestamp"] for metric in map(json.loads, lines_of(tmp_path))]
    assert (stamps[0] < stamps[limit - 1]) == (step_s > 0)  # the log follows the clock


def test_an_unexpected_error_of_the_housekeeper_is_logged_and_the_house_kept_on(tmp_path, caplog):
    failures = [RuntimeError("no house to keep")] * 3

    def fails() -> None:
        if failures:
            raise failures.pop()

    with running(tmp_path, timeouts=SHORT, jobs=[(0.0, fails)]) as started:
        eventually(lambda: not failures)
        with connect(started.port) as idle:
            assert idle.recv(1) == b""  # it is still timed out
        assert_healthy(started.port)
    faults = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(faults) == 3 and all("no house to keep" in fault for fault in faults)
    assert not any("\n" in fault for fault in faults)


class ReplacedOnReturn:
    """An epoll that never times out, and that can mark the worker whom it wakes as replaced."""

    def __init__(self, epoll):
        self.epoll, self.waiting, self.replace_next = epoll, 0, False

    def poll(self, _: float, most: int) -> list[tuple[int, int]]:
        self.waiting += 1
        ready = self.epoll.poll(-1, most)
        self.waiting -= 1
        if self.replace_next:
            self.replace_next = False
            threading.current_thread().replaced = True
        return ready

    def __getattr__(self, name: str) -> object:
        return getattr(self.epoll, name)


@pytest.mark.skipif(not hasattr(metricstream.select, "epoll"), reason="has no epoll")
def test_what_a_worker_claimed_as_it_was_replaced_is_served(tmp_path):
    """It was left until the successor's wait timed out: a second, now and then, after a long turn."""
    with running(tmp_path, threads=1) as started, connect(started.port) as connection:
        started.server.connections.epoll = epoll = ReplacedOnReturn(started.server.connections.epoll)
        with connection.makefile("rb") as stream:
            connection.sendall(HEALTH)
            assert is_healthy(read_answer(stream))
            started.server._workers.start_one()
            eventually(lambda: epoll.waiting == 2)
            epoll.replace_next = True
            connection.sendall(HEALTH)
            assert is_healthy(read_answer(stream))
            eventually(lambda: len(started.server._workers.running) == 1)


# ---- TLS ----

# Made for these tests alone; valid until 2120 for localhost and 127.0.0.1.
TEST_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgODPGcFsskxUmCvsw
hFRbrv5WTHSGBr1pN3PLsmJ2APuhRANCAARxIu0srKMYe4+L+beRZ8dwwrxQTcJZ
cenl1uRUMnAQYUAvaClzReYLybtnwZb6c6uEoH62dQLL7qmWWFRPEQF9
-----END PRIVATE KEY-----
"""

TEST_CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBejCCASCgAwIBAgIUJ4u1KWI3IDmwCvF4G60goj+E8sgwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAx
MDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARxIu0srKMYe4+L+beRZ8dwwrxQTcJZcenl1uRUMnAQYUAvaClzReYL
ybtnwZb6c6uEoH62dQLL7qmWWFRPEQF9o04wTDAaBgNVHREEEzARgglsb2NhbGhv
c3SHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQUSkmvTKwL65D5zP+/
jzL6DXfwjbMwCgYIKoZIzj0EAwIDSAAwRQIhAN376mLg5avraaho8lrAgLaDnmFN
BHX+avxm6lQMfFteAiAYYGMYXAiTQN1RM/moEuuFgy1jdXLysuoQUgVH1CUbmA==
-----END CERTIFICATE-----
"""


def pem_files(folder: Path) -> tuple[str, str]:
    """Paths of the tests' certificate and key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    certificate.write_text(TEST_CERTIFICATE)
    key.write_text(TEST_KEY)
    return str(certificate), str(key)


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    return metricstream.tls_context(*pem_files(tmp_path))


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=TEST_CERTIFICATE)


def over_tls(port: int) -> ssl.SSLSocket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full when nobody reads
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    return trusting().wrap_socket(
        connection, server_hostname="localhost", suppress_ragged_eofs=False
    )


def test_https_serves_what_http_does(tmp_path, threads, tls):
    with running(tmp_path, threads=threads, tls=tls) as started:
        connection = http.client.HTTPSConnection("localhost", started.port, context=trusting())
        value = {"name": "big", "value": 1, "tags": {f"k{i}": "v" * 1000 for i in range(32)}}
        bodies = [BATCH, json.dumps({"metrics": [value] * 31}).encode(), BATCH]
        assert max(map(len, bodies)) > 60 * metricstream.RECEIVE_BYTES / 4
        for body in bodies:
            connection.request("POST", "/metrics", body)
            answer = connection.getresponse()
            assert (answer.status, b'"success":true' in answer.read()) == (200, True)
        connection.close()
        assert len(lines_of(tmp_path)) == 33


def test_pipelined_requests_in_one_record_are_all_answered(tmp_path, threads, tls):
    with running(tmp_path, threads=threads, tls=tls) as started, over_tls(started.port) as client:
        client.sendall(post() * 100 + get(b"/health", b"Connection: close"))
        received = b"".join(iter(lambda: client.recv(65536), b""))  # to a clean end of TLS
        assert received.count(b"HTTP/1.1 200 OK") == 101
        assert len(lines_of(tmp_path)) == 100


def test_an_encrypted_answer_that_is_not_read_waits_and_holds_up_nobody(tmp_path, threads, tls):
    with running(tmp_path, threads=threads, tls=tls) as started, contextlib.ExitStack() as stack:
        started.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # inherited
        client, asked = stack.enter_context(over_tls(started.port)), 1_000
        client.sendall(get(b"/metrics") * asked)  # the answers have many times the buffers
        with over_tls(started.port) as other:
            other.sendall(get())
            assert other.recv(65536).startswith(b"HTTP/1.1 200")
        status_line, answers, rest = b"HTTP/1.1 200 OK", 0, b""
        while answers < asked:
            rest += client.recv(1 << 20)
            answers += rest.count(status_line)
            rest = rest[rest.rfind(status_line) + 1 :]


def test_a_client_that_never_shakes_hands_blocks_nobody_and_is_ended(tmp_path, threads, tls):
    with running(tmp_path, threads=threads, tls=tls, timeouts=SHORT) as started:
        silent = [
            socket.create_connection(("127.0.0.1", started.port), timeout=10) for _ in range(50)
        ]
        for connection in silent[25:]:
            connection.sendall(b"\x16\x03\x01\x02\x00")  # the first octets of a ClientHello
        with over_tls(started.port) as client:
            client.sendall(get())
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        for connection in silent:
            assert connection.recv(1) == b""
            connection.close()
        eventually(lambda: open_connections(started) == 0)


def test_plain_http_to_a_tls_port_is_ended(tmp_path, threads, tls):
    with running(tmp_path, threads=threads, tls=tls) as started:
        with socket.create_connection(("127.0.0.1", started.port), timeout=10) as plain:
            plain.sendall(HEALTH)
            try:
                assert b"HTTP/1.1" not in plain.recv(65536)
            except ConnectionResetError as error:  # as good an end
                assert error.errno == errno.ECONNRESET
        with over_tls(started.port) as client:
            client.sendall(get())
            assert client.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_tls_older_than_1_2_is_refused(tmp_path, tls):
    assert tls.minimum_version == ssl.TLSVersion.TLSv1_2
    old = trusting()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with running(tmp_path, tls=tls) as started:
        with socket.create_connection(("127.0.0.1", started.port), timeout=10) as connection:
            with pytest.raises(ssl.SSLError):
                old.wrap_socket(connection, server_hostname="localhost")


def has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ssl.SSLEOFError:  # as good an end, without a word of TLS
        return True


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_a_stop_answers_what_is_in_flight_and_closes_what_is_idle(
    tmp_path, threads, tls, encrypted
):
    enter, options = (over_tls, {"tls": tls}) if encrypted else (connect, {})
    with running(tmp_path, threads=threads, **options) as started, contextlib.ExitStack() as stack:
        idle, busy = (stack.enter_context(enter(started.port)) for _ in range(2))
        for client in (idle, busy):
            client.sendall(HEALTH)
            assert is_healthy(answer_on(client))
        busy.sendall(framed(BATCH_LENGTH, b"Expect: 100-continue", body=b""))
        assert answer_on(busy).status == 100  # it waits for the body
        started.server.stop_soon()
        assert has_ended(idle)
        busy.sendall(BATCH)
        answer = answer_on(busy)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert has_ended(busy)
    assert len(lines_of(tmp_path)) == 1


# ---- answers of other processes ----


class Told:
    """A route `/api/…` whose answers the test writes: `ends` holds the other end of each."""

    def __init__(self, service: Service) -> None:
        self.ends: list[socket.socket] = []
        service.add_routes({"/api/*": {"GET": self.handle, "POST": self.handle}})

    def handle(self, request: Request, client: str) -> metricstream.Answer:
        ours, theirs = socket.socketpair()
        self.ends.append(ours)
        return metricstream.Answer(None, b"", metricstream.Relay(theirs))

    def end(self, index: int = -1) -> socket.socket:
        eventually(lambda: self.ends)
        return self.ends[index]


def relayed(body: bytes, status: int = 200, length: int | None = None) -> bytes:
    fields = b"Content-Type: text/plain\r\n"
    size = len(body) if length is None else length
    return metricstream.RELAY_HEAD.pack(status, len(fields), size) + fields + body


@pytest.fixture(params=["plain", "tls"])
def told(request, tmp_path, threads, tls) -> Iterator[tuple[Told, Callable[[], socket.socket]]]:
    encrypted = request.param == "tls"
    with running(tmp_path, threads=threads, **({"tls": tls} if encrypted else {})) as started:
        told = Told(started.service)

        def ask(raw: bytes = get(b"/api/x")) -> socket.socket:
            connection = over_tls(started.port) if encrypted else connect(started.port)
            connection.sendall(raw)
            return connection

        yield told, ask


def test_an_answer_of_another_process_is_passed_on_as_it_comes(told):
    told, ask = told
    with ask() as connection, told.end() as end:
        whole = relayed(b"x" * 100_000, 422)
        for piece in (whole[:5], whole[5:20], whole[20:60], whole[60:]):
            end.sendall(piece)
        answer = answer_on(connection)
        assert (answer.status, answer.headers["content-type"]) == (422, "text/plain")
        assert answer.body == b"x" * 100_000
        connection.sendall(HEALTH)
        assert answer_on(connection).status == 200


def test_the_head_alone_of_an_answer_of_another_process(told):
    told, ask = told
    with ask(head(b"HEAD /api/x HTTP/1.1")) as connection, told.end() as end:
        end.sendall(relayed(b"a body"))
        with connection.makefile("rb") as stream:
            answer = read_answer(stream, to_head=True)
        assert answer and (answer.status, answer.headers["content-length"]) == (200, "6")
        connection.sendall(HEALTH)
        assert answer_on(connection).status == 200


def test_requests_behind_one_that_waits_for_another_process_wait(told):
    told, ask = told
    with ask(get(b"/api/x") + HEALTH) as connection, told.end() as end, connection.makefile("rb") as stream:
        end.sendall(relayed(b"first"))
        first, second = read_answer(stream), read_answer(stream)
        assert first and second and first.body == b"first" and is_healthy(second)


@pytest.mark.parametrize("sent", [b"", relayed(b"", 200)[:7], relayed(b"abc", length=10)])
def test_another_process_that_ends_too_soon_is_an_error_and_never_half_an_answer(told, sent):
    told, ask = told
    with ask() as connection, told.end() as end:
        end.sendall(sent)
        end.close()
        with connection.makefile("rb") as stream:
            if b"abc" not in sent:
                answer = read_answer(stream)
                assert answer and answer.status == 503 and "retry-after" in answer.headers
            else:
                received = b""
                with contextlib.suppress(ssl.SSLEOFError):  # the end without a word of TLS
                    while piece := connection.recv(4096):
                        received += piece
                assert received.endswith(b"\r\n\r\nabc")


def test_a_client_that_leaves_tells_the_other_process(told):
    told, ask = told
    with ask() as connection:
        end = told.end()
        connection.close()
        end.settimeout(10)
        assert end.recv(1) == b""
        end.close()


# ---- hostile and clumsy clients ----


@needs_proc
@at_once([1, 0])
def test_half_closed_connections_are_answered_and_forgotten(tmp_path, threads):
    with besieged(tmp_path, threads) as started, leaving_nothing(started.process.pid):
        for sent, status in ((post(), b"200"), (post()[:-1], b"400"), (get()[:-2], b"400")):
            with contextlib.ExitStack() as stack:
                halves = crowd(started.port, scaled(200, 2000), sent, stack)
                for connection in halves:
                    connection.shutdown(socket.SHUT_WR)
                for connection in halves:
                    with connection.makefile("rb") as stream:
                        assert stream.read().startswith(b"HTTP/1.1 " + status)


@needs_proc
@at_once([1, 0])
def test_announced_bodies_that_never_come_take_no_memory(tmp_path, threads):
    with besieged(tmp_path, threads) as started, contextlib.ExitStack() as outer:
        before = outer.enter_context(leaving_nothing(started.process.pid))
        with contextlib.ExitStack() as stack:
            (too_large,) = crowd(
                started.port, 1, framed(b"Content-Length: 104857600", body=b""), stack
            )
            assert too_large.recv(1000).startswith(
                b"HTTP/1.1 413 "
            )  # without waiting for any of it
            crowd(started.port, 200, framed(b"Content-Length: 1048576", body=b"{"), stack)
            eventually(lambda: connections_of(started) >= 201)
            assert len(post_latencies(started.port, 100)) == 100
            grown = Footprint.of(started.process.pid).resident_bytes - before.resident_bytes
            assert grown < 200 * MIB / 8  # of 200 MiB that were announced


@needs_proc
@at_once([1, 0])
def test_resets_by_the_thousand_leave_no_trace(tmp_path, threads):
    with besieged(tmp_path, threads) as started, leaving_nothing(started.process.pid):
        sent = [b"GET / HT", get(), get(b"/metrics") * 100, post()[:-1], *[b""] * 16]
        for number in range(scaled(2_000, 100_000)):
            connection = connect(started.port)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            connection.sendall(sent[number % 20])
            connection.close()
        eventually(lambda: connections_of(started) == 1)


@needs_proc
@at_once([(1, 2_000), (0, 500)])
def test_idle_and_dripping_connections_by_the_thousand_cost_no_thread(tmp_path, threads, count):
    """But one each where every connection has a thread; they are served at once all the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 100:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 1_000), hard))
    with besieged(tmp_path, threads) as started, leaving_nothing(started.process.pid) as before:
        with contextlib.ExitStack() as stack:
            idle = crowd(started.port, count - 3 * (count // 10), post(), stack)
            for part in (b"", b"GET / HT", post()[:-3]):
                crowd(started.port, count // 10, part, stack)
            for connection in idle:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            eventually(lambda: connections_of(started) == count + 1)
            # the connection that asked may be open for a moment longer
            there = (before.threads + (0 if threads else count), before.files + count)
            eventually(lambda: Footprint.of(started.process.pid)[1:] == there)
            grown = Footprint.of(started.process.pid).resident_bytes - before.resident_bytes
            assert grown < count * (8 if threads else 64) * 1024
            for _ in range(20):
                assert_healthy(started.port)
            assert len(post_latencies(started.port, 100)) == 100
            idle[0].sendall(post())  # none was forgotten
            assert idle[0].recv(1000).startswith(b"HTTP/1.1 200 ")
    assert len(lines_of(tmp_path)) == 40 + len(idle) + 100 + 1


@needs_proc
@at_once([1, 0])
def test_beyond_the_limit_idle_ones_make_room_and_busy_ones_do_not(tmp_path, threads):
    with besieged(tmp_path, threads, "--max-connections", "50") as started:
        with leaving_nothing(started.process.pid):
            with contextlib.ExitStack() as stack:
                crowd(started.port, 200, b"", stack)  # four times as many: the first make room
                assert len(post_latencies(started.port, 20)) == 20
            with contextlib.ExitStack() as stack:
                crowd(started.port, 50, post()[:-1], stack)

                def turned_away() -> bool:
                    with connect(started.port) as one_more:
                        one_more.sendall(post())
                        return one_more.recv(1000).startswith(b"HTTP/1.1 503 ")

                eventually(turned_away)
                (answer,), closed = exchange(started.port, b"")
                assert (answer.status, answer.headers["retry-after"], closed) == (503, "1", True)
            eventually(lambda: not turned_away())
            assert len(post_latencies(started.port, 20)) == 20


class Dripping:
    """A client that sends its request octet by octet, and starts again when it is timed out."""

    def __init__(self, port: int, octets: bytes) -> None:
        self.port, self.octets = port, octets
        self.connection, self.rest = connect(port), iter(octets)

    def drip(self) -> None:
        try:
            self.connection.send(bytes((next(self.rest),)))
        except ConnectionError:
            self.connection.close()
            self.connection, self.rest = connect(self.port), iter(self.octets)


def drip(port: int, ready: Any, stop: Any) -> None:
    """A process of slow clients: 200 drip their heads, 200 their bodies, 200 read no answer."""
    head = b"POST /metrics HTTP/1.1\r\nHost: x\r\n"
    heads = [Dripping(port, head + b"X-Slow: " + b"a" * 1000) for _ in range(200)]
    bodies = [
        Dripping(port, head + b"Content-Length: 1000\r\n\r\n" + b" " * 999) for _ in range(200)
    ]
    deaf = []
    for _ in range(200):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(get(b"/metrics") * 400)
        deaf.append(connection)
    for turn, slow in enumerate(itertools.cycle(heads + bodies)):
        slow.drip()  # four octets a second each
        if turn == 400:
            ready.set()
        if turn % 8 == 0 and stop.wait(0.005):
            break
    for connection in deaf + [slow.connection for slow in heads + bodies]:
        connection.close()


def test_slow_clients_by_the_hundred_slow_nobody_else_down(tmp_path):
    """The p99 of good clients stays within five times the quiet one: the best of three rounds, as
    noise only ever adds to either.
    """
    spawn = multiprocessing.get_context("spawn")
    ratios = []
    with besieged(tmp_path, 1) as started:
        for _ in range(scaled(3, 10)):
            quiet = post_latencies(started.port, 500)
            ready, stop = spawn.Event(), spawn.Event()
            slow = spawn.Process(target=drip, args=(started.port, ready, stop))
            slow.start()
            try:
                assert ready.wait(30)
                assert connections_of(started) > 600
                besieged_ = post_latencies(started.port, 500)
            finally:
                stop.set()
                slow.join(30)
            assert slow.exitcode == 0
            ratios.append(besieged_[-5] / quiet[-5])
            if ratios[-1] <= 5:
                break
    assert min(ratios) <= 5, ratios


@needs_proc
@needs_prlimit
@at_once([1, 0])
def test_without_file_descriptors_the_server_neither_spins_nor_dies(tmp_path, threads):
    options = ("--log-level", "error")  # it warns of what it lacks
    with besieged(tmp_path, threads, *options) as started, contextlib.ExitStack() as stack:
        pid = started.process.pid
        crowd(started.port, 20, post()[:-1], stack)  # busy: they can't make room
        eventually(lambda: connections_of(started) == 21)
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, hard))
        waiting = crowd(started.port, 50, post(b"Connection: close"), stack)
        clock_ticks = os.sysconf("SC_CLK_TCK")

        def cpu_s() -> float:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / clock_ticks

        began, spent = time.monotonic(), cpu_s()
        assert not threading.Event().wait(1.0)  # what is measured is how it spends this second
        assert (cpu_s() - spent) / (time.monotonic() - began) < 0.5
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        for connection in waiting:  # they have waited in the backlog
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


# ---- part I alone ----


def test_part_one_alone_is_a_server(tmp_path):
    """The text of the module up to the banner of part II, executed."""
    text = (HERE / "metricstream.py").read_text().partition("# PART II. STORAGE")[0]
    part = types.ModuleType("part_one")
    sys.modules["part_one"] = part
    try:
        exec(compile(text, "part_one.py", "exec"), vars(part))
        log = part.MetricLog(str(tmp_path))
        service = part.Service(log, part.SlidingWindowLimiter(2), part.Statistics())
        with part.Server(("127.0.0.1", 0), service) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            port = server.server_address[1]
            statuses = [answer_once(port, post()).status for _ in range(3)]
            health, statistics = answer_once(port, HEALTH), answer_once(port, get(b"/metrics"))
            queries = answer_once(port, get(b"/api/v1/query"))
            server.shutdown()
            thread.join()
        log.close()
    finally:
        del sys.modules["part_one"]
    assert statuses == [200, 200, 429] and len(lines_of(tmp_path)) == 2
    assert health.json == {"status": "healthy", "service": "ingestion"}
    assert statistics.json["metrics_received"] == 2 and queries.status == 404


# ==================================================================================================
# PART II. STORAGE
# ==================================================================================================


# ---- a store, its log, and a dictionary of what was pushed ----


class StoreUnderTest:
    """A store and its log, and a plain dictionary of what was pushed."""

    SERIES = [(f"m{number}", {"host": f"h{number % 3}"}) for number in range(6)]

    def __init__(self, folder: Path, durability: str, **options: Any):
        self.folder, self.durability = folder, durability
        self.options = {"retention_s": 0} | options
        self.pushed: dict[str, dict[int, float]] = {}
        self.open()

    def open(self) -> None:
        self.log = MetricLog(str(self.folder), self.durability)
        self.files: list[tuple[int, int]] = []  # descriptors and final sizes of files to come
        self.log.on_switch.append(
            lambda number, descriptor, size: self.files.append((os.dup(descriptor), size))
        )
        self.store = metricstream.Store(str(self.folder), writes=True, **self.options)
        for _ in self.store.open():
            pass
        self.tail = metricstream.LogTail(os.dup(self.log.descriptor))
        self.log_bytes = self.log.size_bytes  # when all that was pushed is written
        self.read()

    def push(self, samples: list[Sample]) -> None:
        lines = "".join(map(metricstream.log_line, samples)).encode()
        append_and_wait(self.log, lines)
        self.log_bytes += len(lines)
        for sample in samples:
            series = self.pushed.setdefault(sample.name, {})
            series[sample.timestamp_ms] = float(sample.value)

    def read(self) -> None:
        """Have the store read the log to where it is written."""
        eventually(lambda: self.log.size_bytes == self.log_bytes)
        while not self.tail.has_reached(self.log.position.size_bytes):
            self.store.add_lines(self.tail.read(self.log.position.size_bytes))

    def cut(self) -> None:
        """Have the log begin a new file, and the store a new memtable."""
        self.read()
        path = self.store.next_segment()
        self.log.rotate(path)
        descriptor, size = eventually(lambda: self.files and self.files.pop())
        while not self.tail.has_reached(size):
            self.store.add_lines(self.tail.read(size))
        inode = os.fstat(self.tail.descriptor).st_ino
        assert self.store.segment_of(inode) == path
        os.close(self.tail.descriptor)
        self.store.freeze(path)
        self.tail, self.log_bytes = metricstream.LogTail(descriptor), 0

    def maintain(self) -> None:
        """As the store process does it: in a fork, after which the store looks at the folder."""
        for _ in self.store.work():
            pass
        pid = os.fork()
        if not pid:
            try:
                self.store.maintain()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        self.store.refresh()
        assert not self.store.needs_maintenance

    def select(self, name: str = "") -> list[Series]:
        matchers = [Matcher("__name__", "=", name)] if name else []
        return list(self.store.select(matchers, 0, NOW_MS, metricstream.Budget()))

    def close(self) -> None:
        self.log.close()
        os.close(self.tail.descriptor)

    def check(self, start_ms: int = 0, end_ms: int = metricstream.END_OF_TIME_MS - 1) -> None:
        self.read()
        matchers = [metricstream.Matcher("__name__", "=~", "m.*")]
        found = {}
        budget = metricstream.Budget()
        for labels, times, values in self.store.select(matchers, start_ms, end_ms, budget):
            assert list(times) == sorted(set(times))
            found[labels["__name__"]] = dict(zip(times, values))
        expected = {
            name: {time_ms: v for time_ms, v in series.items() if start_ms <= time_ms <= end_ms}
            for name, series in self.pushed.items()
        }
        assert found == {name: series for name, series in expected.items() if series}


def opened(folder: Path) -> metricstream.Store:
    """The store of a folder, which is only read."""
    store = metricstream.Store(str(folder))
    for _ in store.open(log=str(folder / "metrics.jsonl")):
        pass
    return store


def a_store(folder: Path, **options: Any) -> StoreUnderTest:
    return StoreUnderTest(folder, "os", **options)


def block_of(under: StoreUnderTest, *times_ms: int, name: str = "m") -> None:
    under.push([Sample(name, time_ms / 1000, "gauge", {}, time_ms) for time_ms in times_ms])
    under.cut()
    under.maintain()


# ==================================================================================================
# Regular expressions
# ==================================================================================================

ALL_KINDS = "abxyzAK_09 .-\n\tÉéßσςsſ\u212a"


@pytest.mark.parametrize("pattern, fits, fits_not", [
    (r"\pL+", "aé", "a1"), (r"\PN\p{^L}\P{^Lu}", "a1A", "1aA"), (r"[\p{Lu}\d]+", "É1", "é1"), (r"\p{Any}", "\n", ""),
    (r"\x41\x{e9}\x{10FFFF}\141\0", "Aé\U0010ffffa\0", "Aéaa\0"), (r"\a\f\t\n\r\v\.\_\-\ ", "\a\f\t\n\r\v._- ", ""),
    (r"\Qa.(\E*", "a.(((", "axx"), (r"\Qa*", "a*", "aa"), (r"a\Q\E*", "aaa", "b"), (r"\Aa\z", "a", "a\n"),
    ("(?i)É", "é", "e"), ("(?i)k", "\u212a", "x"), ("(?i)ſ+", "sSſ", "ss1"), ("(?i)σ", "ς", "s"), ("(?i)ß", "ẞ", "ss"), ("(?i)ı", "ı", "i"),
    ("(?i)[^k]", "a", "\u212a"), ("(?i)[[:word:]]", "ſ", "é"), (r"(?i)\W", "é", "ſ"), (r"(?i)\p{Lu}", "a", "1"),
    ("[[:^alpha:]]", "1", "a"), (r"[[:word:]\-[:space:]]+", "a- ", "é"), ("[^[:ascii:]]", "é", "e"), ("[]-]+", "]-", "["), ("[a-]+", "a-", "b"),
    ("[[:alpha]", ":", "]"), (r"[\]\\^-]+", r"]\^-", "a"), (r"[^\x00-\x{10FFFF}]|b", "b", "a"), (r"\s", "\f", "\v"),
    ("(?U)a+", "aa", "b"), ("(?-s).", "a", "\n"), ("(?s-s:.)|.x", "\nx", "\n"), ("(?ims-U:a.b)", "A\nB", "Axxb"), ("(?i)a(?-i)b", "Ab", "AB"),
    ("(?i:a|b)c", "Bc", "BC"), ("(a(?i)b|c)d", "aBd", "abD"), ("a(?i)b|c", "C", "A"),
    ("^+a", "a", "b"), ("^*a$?", "a", "b"), ("(^a|b$)", "b", "c"), ("a^b|ab", "ab", "a^b"), ("(?m)a$\n^b", "a\nb", "ab"), ("(?m)^^a$$\n$", "a\n", "a"),
    ("a\n^b|c", "c", "a\nb"), ("a$\nb|c", "c", "a\nb"), (r"\ba\b.\bb\b", "a b", "axb"), (r"a\Bb", "ab", "a b"), (r".*\b", "a", "a "), (r"\B", "", "a"),
    (r".*\bfoo\b.*", "a foo-b", "afoo b"), (r"é\b.*", "éa", "é-"), ("(a|)+b", "aab", "ba"), ("(|a)*", "aa", "b"), ("(a*)*b", "aab", "a"), ("((a?)+?)*", "aa", "b"),
    ("a{2,}", "aaa", "a"), ("a{0}b", "b", "ab"), ("a{1,2}{", "aa{", "aa"), ("a{,2}", "a{,2}", "aa"), ("a{01}", "a{01}", "a"), ("(?:a{2}){3}?", "a" * 6, "a" * 5),
    ("a{1000}", "a" * 1000, "a" * 999), ("(a{10}){100}", "a" * 1000, "a" * 999), ("(a?){1000}", "a" * 1000, "a" * 1001),
    ("", "", "a"), ("|a", "", "b"), ("()", "", "a"), (".*", "\n", None), (".+", "\n", ""), ("web.*", "web\n1", "we"), ("web.+", "web1", "web"),
    (".*foo", "xfoo", "foox"), (".+foo", "foofoo", "foo"), (".*foo.*", "xfoox", "fo"), (".+foo.+", "xfoofoox", "foox"), (".*foo.+", "foo1", "xfoo"),
    (r"a\|b|c", "a|b", "a"), (r"\\|a", "\\", "|"), (r"(?:a\.b|c)", "a.b", "axb"), ("^(a|b)$", "b", "c"), ("a||b", "", "c"), ("^.*$", "", None),
    ("a.c", "a\nc", "xabc"), ("[[:alpha:]_]+", "ab_", "a1"), (r"\Qa.b\E+", "a.b", "axb"), ("(?i)ABC", "abc", "abd"), ("(?<n>x)y", "xy", "x"),
    (r"a\z", "a", "a\n"), (r"\d+", "12", "\u0661"), ("[]a[]", "[", "b"), ("[^[:digit:]]", "a", "1"), ("(a+|b)c*", "aac", "abab"),
    ("(?:web|db)[0-9]{1,3}", "db12", "db"), ("(?s:.)", "\n", ""), ("((?i)PRO).*", "production", "xpro"), ("x(?i)a|B", "b", "Xa"),
    ("(web|db)*", "webdb", "w"), ("a{2}", "aa", "a"), ("(ab){3}", "ababab", "abab"), (".*a.*b.*", "xaxbx", "ba"), ("a??b", "ab", "aab"), ("(?i:a)b", "Ab", "AB"),
    # what real rules ask
    ("(v[0-9]*.[0-9]*.[0-9]*).*", "v1.22.3-gke", "1.22"), (r"^[^@]+:([^@]+)(?:@.+)?$", "repo/image:1.2@sha256:0", "image"),
    (r".+(\d+/\d+(/\d+)?).*", "eth1/2/3.1", "eth1"), (".*(.*ingester.*).*", "my-ingester-0", "my-querier-0"), ("b.*k.*w.*k.*", "bookworks", "bookshop"),
    (".*(" + "|".join(f"service-{number}-" for number in range(300)) + ").*", "x-service-299-y", "x-service-300-y"),
], ids=lambda text: repr(text)[:40])  # fmt: skip
def test_a_regular_expression_matches_what_it_matches_in_go(pattern, fits, fits_not):
    regex = compile_regex(pattern)
    assert regex.matches(fits) and (regex.groups(fits) or [])[0] == fits
    if fits_not is not None:
        assert not regex.matches(fits_not) and regex.groups(fits_not) is None


@pytest.mark.parametrize("pattern, reason", [
    ("(a", "missing closing ): `(a`"), ("a)b", "unexpected ): `a)b`"), ("x[a", "missing closing ]: `[a`"), ("[]", "missing closing ]: `[]`"),
    ("a**", "invalid nested repetition operator: `**`"), ("a+?*b", "invalid nested repetition operator: `+?*`"), ("a{2}{3}", "invalid nested repetition operator: `{2}{3}`"),
    ("*a", "missing argument to repetition operator: `*`"), ("(|+?)", "missing argument to repetition operator: `+?`"), ("(?i)?", "missing argument to repetition operator: `?`"),
    ("a{1001}", "invalid repeat count: `{1001}`"), ("a{2,1}?", "invalid repeat count: `{2,1}`"), ("(a{500}){500}", "invalid repeat count: `{500}`"),
    ("(a{2,}b|c){501}", "invalid repeat count: `{501}`"), ("a{" + "9" * 5000 + "}", "invalid repeat count"), ("(?=a)", "invalid or unsupported Perl syntax: `(?=`"),
    ("(?i-)a", "invalid or unsupported Perl syntax: `(?i-)`"), ("(?z)", "invalid or unsupported Perl syntax: `(?z`"), ("(?", "invalid or unsupported Perl syntax: `(?`"),
    ("(?P<a-b>c)", "invalid named capture: `(?P<a-b>`"), ("(?P<a", "invalid named capture: `(?P<a`"), ("(?<!a)b", "invalid named capture: `(?<!a)b`"),
    (r"\u0041", r"invalid escape sequence: `\u`"), (r"\é", r"invalid escape sequence: `\é`"), (r"(a)\1", r"invalid escape sequence: `\1`"), (r"\C", r"invalid escape sequence: `\C`"),
    (r"\Z", r"invalid escape sequence: `\Z`"), (r"\x{110000}", "invalid escape sequence"), (r"\xg0", "invalid escape sequence"), ("a\\", "trailing backslash at end of expression: ``"),
    ("[[:foo:]]", "invalid character class range: `[:foo:]`"), ("[z-a]", "invalid character class range: `z-a`"), (r"[a-\d]", r"invalid escape sequence: `\d`"),
    (r"\p{Greek}", r"invalid character class range: `\p{Greek}`"), (r"\pX", r"invalid character class range: `\pX`"), (r"\p", r"invalid character class range: `\p`"),
    ("a\udcff", "invalid UTF-8: `\udcff`"), ("(" * 1100 + ")" * 1100, "expression nests too deeply"), ("(a?b?c?){1000}", "expression too large"),
    ("a" * 400_000, "expression too large"), ("(?i)" + "[ab]" * 40_000, "expression too large"), (r"[\pL0][^\pL1]" * 200, "expression too large"),
], ids=lambda text: repr(text)[:40])  # fmt: skip
def test_a_regular_expression_is_refused_as_go_does_it(pattern, reason):
    with pytest.raises(ValueError) as failed:
        compile_regex(pattern)
    assert f"error parsing regexp: {reason}" in str(failed.value)
    assert str(failed.value).startswith(f'invalid regular expression "{pattern[:100]}')


@pytest.mark.parametrize("pattern, text, groups", [
    ("(a|ab)(c|bcd)(d*)", "abcd", ["a", "bcd", ""]), ("(a*)(a*)", "aa", ["aa", ""]), ("(a*?)(a*)", "aa", ["", "aa"]), ("(?U)(a*)(a*)", "aa", ["", "aa"]),
    ("(?U)(a*?)(a*)", "aa", ["aa", ""]), ("(a)|(b)", "b", [None, "b"]), ("(?:(a)|(b))*", "ba", ["a", "b"]), ("(a){3}", "aaa", ["a"]), ("(a){0}(b)", "b", [None, "b"]),
    ("(a|b)*?(b*)", "abb", ["a", "bb"]), ("(a*)+", "b", None), ("(a*)+", "aa", ["aa"]), ("(|a)*", "aa", ["a"]), ("(|a)+", "", [""]), ("(a?)*?(a?)", "a", [None, "a"]),
    ("(a{0,2})(a{0,2}?)(a*)", "aaaa", ["aa", "", "aa"]), ("((x)(?P<n>y)?)+", "xyx", ["x", "x", "y"]), ("^[^@]+:([^@]+)(?:@.+)?$", "i:1@s", ["1"]),
    ("(a*?)*?", "aa", ["aa"]), ("(a|(b)*){1,}", "abba", ["a", "b"]), ("(x(y(z)*)*)+", "xyzzyx", ["x", "y", "z"]), ("(a|b|c)", "b", ["b"]), (r"(.*)\b(.*)", "a-b c", ["a-b c", ""]), ("([^-]+)-(.*?)-?([0-9]*)", "web-front-12", ["web", "front", "12"]),
])  # fmt: skip
def test_groups_are_those_of_the_preferred_way(pattern, text, groups):
    assert compile_regex(pattern).groups(text) == (groups and [text, *groups])


def test_sets_of_literals_are_known_without_looking():
    assert compile_regex(r"(a|b\.c||d)").literals == {"a", "b.c", "", "d"}
    assert compile_regex("^web1$").literals == {"web1"}
    assert compile_regex("(?P<n>a)(b)").names == {"n": 1}
    for pattern in ("a.|b", "(a|b)c", "(?i)a", r"a|\d", "a*", "(a|b"):
        with contextlib.suppress(ValueError):
            assert compile_regex(pattern).literals is None


@pytest.mark.parametrize("template, text", [
    ("$1-${2}", "a-b"), ("$1x", ""), ("${1}x", "ax"), ("$n$m", "b"), ("$01$1", "a"), ("$é", ""), ("$é-", "-"), ("$$1", "$1"), ("$$$1", "$a"), ("$", "$"),
    ("a$-b", "a$-b"), ("${1", "${1"), ("${1-}", "${1-}"), ("${}", "${}"), ("$3|$9", "|"), ("$0", "ab"), ("${" + "9" * 9999 + "}", ""), ("$$$", "$$"), ("$$$$n", "$$n"), ("$1$", "a$"),
])  # fmt: skip
def test_a_template_is_expanded_as_go_does_it(template, text):
    assert expand(template, ["ab", "a", "b", None], {"n": 2}) == text


def a_pattern(rng: random.Random, depth: int) -> str:
    """A pattern that means the same to `re`, which matches no empty way twice."""
    choice = rng.random()
    if depth == 0 or choice < 0.25:
        return rng.choice(["a", "b", "x", "é", ".", r"\d", r"\w", r"\W", r"\s", "[a-y]", r"[^a\d]", r"\b", r"\B", r"\.", "^", r"\Z"])  # fmt: skip
    if choice < 0.55:
        return a_pattern(rng, depth - 1) + a_pattern(rng, depth - 1)
    if choice < 0.7:
        return f"(?:{a_pattern(rng, depth - 1)}|{a_pattern(rng, depth - 1)})"
    if choice < 0.85:
        return f"({a_pattern(rng, depth - 1)})"
    repeated = rng.choice(["a", ".", "[a-y]", "(?:ab|b)", "(x)", "(a|b)"])
    return repeated + rng.choice(
        ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,2}?", "{1,}"]
    )


@pytest.mark.parametrize("seed", range(scaled(2, 40)))
def test_generated_patterns_match_as_those_of_re_do(seed):
    rng = random.Random(f"regular expressions {seed}")
    matched = 0
    for _ in range(800):
        pattern = a_pattern(rng, 4)
        judge = re.compile(pattern, re.DOTALL | re.ASCII)
        regex = compile_regex(pattern.replace(r"\Z", r"\z"))
        for _ in range(10):
            text = "".join(rng.choices("aabbxé1 .\n", k=rng.randint(0, 6)))
            # `re` has no \B in an empty text before 3.14
            if not text and r"\B" in pattern:
                continue
            found = judge.fullmatch(text)
            assert regex.matches(text) == bool(found), (pattern, text)
            groups = [found[0], *found.groups()] if found else None
            assert regex.groups(text) == groups, (pattern, text)
            matched += bool(found)
    assert matched > 300


@pytest.mark.parametrize("pattern, part", [
    ("(.|x)*y", "x"), ("(?i)(ab|AB)*c", "aB"), ("(a{0}b|b)*c", "b"), ("(x|.){1,900}y", "x"), (".*.*.*!", "a"), ("(a+)+b", "a"), ("(a|aa)*b", "a"),
    ("(a*)*(a*)*b", "a"), (r"(\ba|\Ba|a)*b", "a a"), ("(xx|.){1,900}y", "x"), (".*a.{20}", "aab"), ("((a?b?){50}){20}c", "ab"),
])  # fmt: skip
def test_work_is_linear_in_the_text_whatever_the_pattern(pattern, part):
    def work(count: int) -> int:
        regex = metricstream.Regex(pattern)
        for _ in range(2):
            regex.matches(part * count)
            regex.groups(part * count)
        return regex.work

    assert work(1_000) <= 2.2 * work(500)
    repeated = metricstream.Regex(pattern)
    repeated.matches(part * 500)
    before = repeated.work
    repeated.matches(part * 1_000)
    assert repeated.work - before <= work(1_000)


def test_states_are_dropped_when_they_take_too_much_and_made_again(monkeypatch):
    monkeypatch.setattr(metricstream, "MAX_AUTOMATON_BYTES", 10_000)
    rng = random.Random("dropped states")
    pattern = "(.*)a(.{6,7})"
    regex, judge = metricstream.Regex(pattern), re.compile(pattern, re.DOTALL)
    for _ in range(300):
        text = "".join(rng.choices(ALL_KINDS, k=30))
        found = judge.fullmatch(text)
        assert regex.groups(text) == ([found[0], *found.groups()] if found else None)
        assert len(regex._automaton().states) < 40


def test_long_patterns_leave_no_memory_behind():
    tracemalloc.start()
    try:
        for number in range(5):
            compile_regex(f"([ab]|b{number})" * 400).matches("ab" * 50)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()


# ==================================================================================================
# Chunks
# ==================================================================================================


@pytest.mark.parametrize(
    "values",
    [
        [1.0], [-0.0, 0.0], [1.5] * 1000, [0.1 * n for n in range(1000)],
        [round(0.01 * n, 2) for n in range(1000)], [2.0**52, -(2.0**52)], [2.0**60, 1.0],
        [5e-324, 1.7976931348623157e308], [float(n * n) for n in range(2000)],
        [random.Random(1).random() for _ in range(1000)],
    ],
)  # fmt: skip
def test_values_come_back_to_the_bit(values):
    values = array("d", values)
    encoded = metricstream.encode_values(values)
    assert metricstream.decode_values(encoded).tobytes() == values.tobytes()
    assert len(encoded) <= 8 * len(values) + 13


@pytest.mark.parametrize(
    "times", [[5], [5, 6], [0, 0, 0], [NOW_MS + 15_000 * n + n % 7 for n in range(1000)], [9, 3, 7]]
)
def test_times_come_back(times):
    times = array("q", times)
    assert metricstream.decode_times(metricstream.encode_times(times)) == times


# ==================================================================================================
# Memtable
# ==================================================================================================


@pytest.mark.parametrize("line", [
    '{"timestamp":"2026-13-01T00:00:00.000Z","name":"m","value":1,"type":"gauge"}',
    '{"timestamp":"2026-01-01T00:00:0a.000Z","name":"m","value":1,"type":"gauge"}',
    '{"timestamp":"2026-01-01T00:00:00.000Z","name":"m","value":1e999,"type":"gauge"}',
    '{"timestamp":"2026-01-01T00:00:00.000Z","name":"m","value":01,"type":"gauge"}',
    '{"timestamp":"2026-01-01T00:00:00.000Z","name":"m","value":1,"type":"rate"}',
    '{"timestamp":"2026-01-01T00:00:00.000Z","name":"m","value":1,"type":"gauge","tags":{"a":1}}',
    '{"timestamp":"2026-01-01T00:00:00.000Z","name":"m\\x","value":1,"type":"gauge"}', "[]", "",
])  # fmt: skip
def test_a_line_that_is_no_metric_takes_no_other_along(line):
    good = [metricstream.log_line(Sample("m", n, "gauge", {}, 1000 * n)) for n in range(3)]
    table = metricstream.Memtable()
    assert table.add_lines(f"{good[0]}{good[1]}{line}\n{good[2]}".encode()) == 3
    assert len(table.unreadable) == 1 and len(table.index) == 1


def test_extreme_numbers_of_the_log_are_read_to_the_bit():
    values = [1.7976931348623157e308, 5e-324, -1e22, 10**300, -0.0, 123456.789]
    table = metricstream.Memtable()
    for n, value in enumerate(values):
        line = metricstream.log_line(Sample("m", value, "gauge", {}, n))
        assert table.add_lines(line.encode()) == 1
    ((_, (chunk,)),) = table.chunks([0], 0, 100, metricstream.Budget())
    assert chunk.decoded_values().tobytes() == array("d", map(float, values)).tobytes()


def test_lines_of_one_time_are_read_together(tmp_path):
    """Half a batch would become a group of its own, and its series would stand in two."""
    path = tmp_path / "log"
    batches = [
        "".join(
            metricstream.log_line(Sample(f"m{n}", time_ms, "gauge", {"host": "h"}, time_ms))
            for n in range(999)
        ).encode()
        for time_ms in range(1000, 13_000, 1000)
    ]
    path.write_bytes(b"".join(batches))
    with open(path, "rb") as file:
        tail = metricstream.LogTail(file.fileno())
        pieces = list(iter(lambda: tail.read(path.stat().st_size), b""))
    assert b"".join(pieces) == path.read_bytes() and 2 < len(pieces) < len(batches)
    whole = {b"".join(batches[start:end]) for start in range(12) for end in range(13)}
    assert set(pieces) <= whole


@at_once()
def test_a_million_samples_stay_small_in_memory(tmp_path):
    """In a process of its own: 1,000 series of 1,000 samples, as 100 clients push them; short of
    a soak, a quarter of them in a quarter of the memory.
    """
    rows = scaled(250, 1000)
    script = """
import os, sys
import metricstream as m

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

store = m.Store(sys.argv[1], writes=True, retention_s=0)
before, rows = resident(), int(sys.argv[2])
for row in range(rows):
    for client in range(100):
        tags = {"client": f"c{client}"}
        store.add_lines(b"".join(m.log_line(
            m.Sample(f"m{n}", (row * n % 997) / 100, "gauge", tags, 15000 * row + client)
        ).encode() for n in range(10)))
    for _ in store.work():
        pass
print(store.replayed, (resident() - before) >> 20)
(series,) = store.select([m.Matcher("__name__", "=", "m3"), m.Matcher("client", "=", "c9")], 0,
                         m.END_OF_TIME_MS, m.Budget())
assert list(series.values) == [(row * 3 % 997) / 100 for row in range(rows)]
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(rows)],
        capture_output=True, text=True, cwd=HERE,
    )  # fmt: skip
    assert done.stderr == ""
    pushed, mebibytes = map(int, done.stdout.split())
    assert pushed == 1_000 * rows and mebibytes < 0.06 * rows


# ==================================================================================================
# Blocks
# ==================================================================================================


def test_the_bytes_of_a_sample_are_less_than_one(tmp_path):
    """A day of four clients that each push ten series of four kinds: of 100 it would be no other."""
    rng = random.Random(1)
    store = metricstream.Store(str(tmp_path), writes=True, retention_s=0)
    counters = [0.0] * 3
    for client in range(4):
        jitter = rng.randrange(15_000)
        for row in range(5_760):
            counters = [counter + rng.randrange(100) for counter in counters]
            values = [
                *counters, float(rng.randrange(50)), float(rng.randrange(50)),
                round(20 + rng.uniform(0, 5), 2), round(rng.uniform(0, 5), 2),
                1.0, 4096.0, 0.5,
            ]  # fmt: skip
            time_ms = 15_000 * row + jitter + rng.randrange(8)
            tags = {"client": str(client)}
            samples = [Sample(f"m{n}", v, "gauge", tags, time_ms) for n, v in enumerate(values)]
            store.add_lines("".join(map(metricstream.log_line, samples)).encode())
    for _ in store.work():
        pass
    store.freeze()
    store.maintain()
    size = (tmp_path / "blocks" / "00000001-00000001.block").stat().st_size
    assert size <= 1.0 * 4 * 10 * 5_760
    found = store.select([], 0, NOW_MS, metricstream.Budget())
    assert sum(len(series.values) for series in found) == 4 * 10 * 5_760


@pytest.mark.parametrize("place", ["value", "time", "index", "meta", "end", "length"])
def test_a_damaged_block_is_set_aside_and_the_rest_is_served(place, tmp_path, caplog):
    under = a_store(tmp_path)
    block_of(under, 1000, 2000)
    block_of(under, 3000, 4000)
    under.close()
    path = tmp_path / "blocks" / "00000001-00000001.block"
    octets = bytearray(path.read_bytes())
    meta = json.loads(octets[octets.rindex(b'{"first_ms"') : octets.rindex(b"}") + 1])
    at = {
        "value": 8, "time": meta["times_at"], "index": meta["index_at"],
        "meta": octets.rindex(b"first_ms"), "end": len(octets) - 1, "length": 0,
    }[place]  # fmt: skip
    octets[at] ^= 0xFF
    path.write_bytes(octets[:-5] if place == "length" else octets)
    under = a_store(tmp_path)
    under.pushed = {"m": {3000: 3.0, 4000: 4.0}}
    under.check()
    assert under.store.damaged == [path.name + ".damaged"] and "damaged block" in caplog.text
    assert path.name in under.store.warnings[0]
    assert not path.exists() and path.with_name(path.name + ".damaged").exists()
    block_of(under, 5000)
    under.check()
    under.close()


# ==================================================================================================
# Store
# ==================================================================================================


@pytest.mark.parametrize("seed", range(scaled(9, 200)))
def test_the_store_answers_what_a_dictionary_answers(seed, tmp_path, monkeypatch):
    """Rows and single samples, late and repeated ones, across blocks and restarts."""
    rng = random.Random(seed)
    monkeypatch.setattr(metricstream, "CHUNK_SAMPLES", rng.choice((8, 64, 1024)))
    monkeypatch.setattr(metricstream, "WRITER_PAUSE_S", 0.001)
    durability = ("os", "disk", "memory")[seed % 3]
    under = StoreUnderTest(tmp_path, durability, keep_log=rng.random() < 0.3)
    now_ms = NOW_MS

    def sample(name: str, tags: dict[str, str], late_ms: int) -> Sample:
        value = rng.choice((rng.randrange(100), rng.random(), round(rng.uniform(0, 9), 2), -0.0))
        return Sample(name, value, "gauge", tags, now_ms - late_ms)

    try:
        for _ in range(rng.randrange(40, 150)):
            now_ms += rng.choice((0, 1, 15, 1000))
            step, late_ms = rng.random(), rng.choice((0, 0, 0, 5, 5000))
            if step < 0.6:
                row = under.SERIES[:4] if rng.random() < 0.7 else rng.sample(under.SERIES, 5)
                under.push([sample(*series, late_ms) for series in row])
            elif step < 0.7:
                some = rng.choices(under.SERIES, k=rng.randrange(1, 30))
                under.push([sample(*series, rng.randrange(4000)) for series in some])
            elif step < 0.75:
                under.cut()
            elif step < 0.85:
                under.maintain()
            elif step < 0.9:
                under.close()
                under.open()
            else:
                start_ms = now_ms - rng.randrange(3000)
                under.check(start_ms, start_ms + rng.randrange(3000))
        under.check()
    finally:
        under.close()


# What is killed at given steps of writing blocks: before or after each call that changes a file. A
# fork for each of the steps, in a folder of its own; what it acknowledges stands in a file beside.
DEADLY_STORE = """
import os, signal, sys, time
import metricstream as m

folder, keep_log, fatal_steps = sys.argv[1], sys.argv[2] == "keep", map(int, sys.argv[3:])
steps = fatal = 0

def step():
    global steps
    steps += 1
    if steps == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def deadly(owner, name):
    real = getattr(owner, name)
    def call(*arguments, **options):
        step()
        result = real(*arguments, **options)
        step()
        return result
    setattr(owner, name, call)

for name in ("replace", "rename", "unlink", "fsync"):
    deadly(os, name)
deadly(m.BlockWriter, "_write")

def write_blocks(folder, out):
    log = m.MetricLog(folder, "os")
    store = m.Store(folder, writes=True, retention_s=0, keep_log=keep_log)
    list(store.open())
    tail, files = m.LogTail(os.dup(log.descriptor)), []
    log.on_switch.append(lambda number, descriptor, size: files.append((os.dup(descriptor), size)))
    for number in range(12):
        samples = [m.Sample(f"m{n}", number + n / 4, "gauge", {}, 1000 * number) for n in range(3)]
        log.append("".join(map(m.log_line, samples)).encode())
        print(number, file=out, flush=True)
        if number % 2:
            path = store.next_segment()
            log.rotate(path)
            while not files:
                time.sleep(0.0001)
            descriptor, size = files.pop()
            while not tail.has_reached(size):
                store.add_lines(tail.read(size))
            store.freeze(path)
            tail = m.LogTail(descriptor)
            store.maintain()
    print("all", steps, file=out, flush=True)

for fatal in fatal_steps:
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    os.mkdir(f"{folder}/{fatal}")
    with open(f"{folder}/{fatal}.txt", "w") as out:
        write_blocks(f"{folder}/{fatal}", out)
    os._exit(0)
"""


@at_once(["keep", "retire"])
def test_kill_9_at_each_step_of_a_block_loses_nothing_and_doubles_nothing(tmp_path, keep_log):
    def run(*fatal: int) -> None:
        command = [sys.executable, "-c", DEADLY_STORE, str(tmp_path), keep_log, *map(str, fatal)]
        subprocess.run(command, cwd=HERE, check=True)

    run(0)
    *_, word, steps = (tmp_path / "0.txt").read_text().split()
    assert word == "all" and int(steps) > 100
    # each step of the first block, and of the first compaction; of the rest some
    all_fatal = [*range(1, 30), *range(30, int(steps), scaled(4, 1))]
    run(*all_fatal)
    for fatal in all_fatal:
        folder = tmp_path / str(fatal)
        acknowledged = (tmp_path / f"{fatal}.txt").read_text().split()
        assert "all" not in acknowledged
        under = a_store(folder, keep_log=keep_log == "keep")
        try:
            under.read()
            matcher, budget = Matcher("__name__", "=~", "m."), metricstream.Budget()
            found = list(under.store.select([matcher], 0, NOW_MS, budget))
            pushed = len(found[0].times_ms) if found else 0
            # a batch whose acknowledgement the end prevented may be there
            assert len(acknowledged) <= pushed <= len(acknowledged) + 1, fatal
            for series in found:
                tag = int(series.labels["__name__"][1:]) / 4
                assert list(series.times_ms) == [1000 * n for n in range(pushed)], fatal
                assert list(series.values) == [n + tag for n in range(pushed)], fatal
            in_blocks = sum(block.samples for block in under.store.blocks)
            assert in_blocks + under.store.replayed == 3 * pushed, fatal  # none was counted twice
            assert not under.store.damaged and not list(folder.glob("blocks/*.tmp"))
        finally:
            under.close()


def test_a_folder_is_read_while_a_server_changes_it(tmp_path, monkeypatch):
    """Between the listing and the reading, the log becomes a segment, a block, a merged block."""
    under = a_store(tmp_path)
    for number in range(3):
        block_of(under, 1000 * number)
    under.push([Sample("m", 9.0, "gauge", {}, 9000)])
    changes = [under.cut, under.maintain, lambda: block_of(under, 20_000)]
    replay = metricstream.Store._replay

    def changing(store: metricstream.Store, path: str, skip_inode: int) -> Iterator[str]:
        if changes:
            changes.pop(0)()
        return replay(store, path, skip_inode)

    monkeypatch.setattr(metricstream.Store, "_replay", changing)
    reader = opened(tmp_path)
    assert not changes
    (series,) = reader.select([], 0, NOW_MS, metricstream.Budget())
    assert dict(zip(series.times_ms, series.values)) == under.pushed["m"]
    under.close()


def test_blocks_are_compacted_into_larger_ones(tmp_path):
    under = a_store(tmp_path)
    for number in range(17):
        block_of(under, 1000 * number, 1000 * number + 500, 99_000)  # the last one again and again
        under.check()
    names = sorted(path.name for path in (tmp_path / "blocks").iterdir())
    numbers = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    assert len(names) < 8 and numbers[0][1] - numbers[0][0] >= 3
    assert [first for first, _ in numbers] == [1, *(last + 1 for _, last in numbers[:-1])]
    under.close()
    under = a_store(tmp_path)
    under.pushed = {
        "m": {t: t / 1000 for n in range(17) for t in (1000 * n, 1000 * n + 500, 99_000)}
    }
    under.check()
    under.close()


class TwoClocks:
    """A clock that may step, and one that can't, in seconds."""

    def __init__(self, now_s: float):
        self.now_s, self.since_s = now_s, 0.0

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds
        self.since_s += seconds

    def options(self) -> dict[str, Any]:
        return {"clock": lambda: self.now_s, "monotonic": lambda: self.since_s}


def stored_names(under: StoreUnderTest) -> list[str]:
    return sorted(series.labels["__name__"] for series in under.select())


def test_blocks_past_their_retention_are_removed(tmp_path):
    clocks = TwoClocks(10_000_000.0)
    under = a_store(tmp_path, retention_s=3600, **clocks.options())
    for age_s in (3000, 2000, 1000, 0):
        block_of(under, int(clocks.now_s - age_s) * 1000 + 1, name=f"m{age_s}")
    clocks.pass_by(1500)
    block_of(under, int(clocks.now_s * 1000), name="now")  # samples move the bound, too
    assert len(stored_names(under)) == 5  # the bound of an hour ago counts
    clocks.pass_by(2101)
    block_of(under, int(clocks.now_s * 1000), name="later")
    assert stored_names(under) == ["later", "m0", "m1000", "m2000", "now"]  # an hour ago, m2000 was young
    clocks.pass_by(3601)
    under.maintain()
    assert stored_names(under) == ["later", "now"]  # of the newest sample, now is 2,101 s old
    under.close()


def test_a_clock_that_steps_forward_and_back_removes_nothing(tmp_path):
    clocks = TwoClocks(10_000_000.0)
    under = a_store(tmp_path, retention_s=30 * 86_400, **clocks.options())
    for _ in range(3):
        block_of(under, int(clocks.now_s * 1000), name=f"m{clocks.since_s:.0f}")
        clocks.pass_by(600)
        under.maintain()
    before = stored_names(under)
    for step_s in (40 * 86_400, -40 * 86_400, 40 * 86_400):
        clocks.now_s += step_s
        block_of(under, int(clocks.now_s * 1000), name="new")  # as a push without a timestamp is
        clocks.pass_by(1200)
        under.maintain()
        assert stored_names(under) == sorted({*before, "new"})
    under.close()
    under = a_store(tmp_path, retention_s=30 * 86_400, **clocks.options())  # and after a restart
    under.maintain()
    assert stored_names(under) == sorted({*before, "new"})
    under.close()


def test_a_sample_of_the_future_alone_makes_no_other_old(tmp_path):
    """The clock and the newest sample both have to say so."""
    clocks = TwoClocks(10_000_000.0)
    under = a_store(tmp_path, retention_s=3600, **clocks.options())
    block_of(under, int(clocks.now_s * 1000), name="m")
    block_of(under, int(clocks.now_s * 1000) + 10**9, name="future")
    for _ in range(3):
        clocks.pass_by(1000)
        under.maintain()
        assert stored_names(under) == ["future", "m"]
    under.close()


def test_the_oldest_blocks_go_when_all_are_too_long(tmp_path):
    under = a_store(tmp_path, retention_bytes=4_000)
    rng = random.Random(5)
    for number in range(3):
        under.push([Sample("m", rng.random(), "gauge", {}, 1000 * number + n) for n in range(150)])
        under.cut()
    assert under.store.block_bytes == 0
    under.maintain()
    assert 0 < under.store.block_bytes <= 4_000
    (series,) = under.select()
    assert series.times_ms[0] == 1000 and series.times_ms[-1] == 2149
    under.close()


def test_what_a_block_covers_of_the_log_is_retired_or_kept_compressed(tmp_path):
    under = a_store(tmp_path, keep_log=True)
    block_of(under, 1000, 2000)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    (kept,) = tmp_path.glob("metrics-*.jsonl.gz")
    assert re.fullmatch(r"metrics-\d{8}T\d{6}Z-00000001\.jsonl\.gz", kept.name)
    lines = [json.loads(line) for line in gzip.decompress(kept.read_bytes()).splitlines()]
    assert [line["value"] for line in lines] == [1.0, 2.0]
    under.close()
    under = a_store(tmp_path)
    block_of(under, 3000)
    assert sorted(path.name for path in tmp_path.iterdir() if path != kept) == [
        "blocks", "metrics.jsonl",
    ]  # fmt: skip
    under.close()


def test_lines_of_the_log_that_are_no_metrics_are_counted_and_the_rest_is_read(tmp_path, caplog):
    line = metricstream.log_line(Sample("m", 1, "gauge", {"a": "b"}, 1000))
    strange = '{"name": "m", "value": 2, "tags": {"a": "b"}, "timestamp": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(line + "nonsense\n" + strange + '{"name":"m"}\n')
    store = opened(tmp_path)
    (series,) = store.select([], 0, NOW_MS, metricstream.Budget())
    assert dict(zip(series.times_ms, series.values)) == {1000: 1.0, 2000: 2.0}
    assert (store.replayed, store.unreadable) == (2, 2) and "not a metric" in caplog.text


# ==================================================================================================
# PART III. QUERIES
# ==================================================================================================


# ---- series in memory, given as text ----

MINUTE = 60_000
INF, NAN = math.inf, math.nan


def notated(values: str) -> Iterator[float | None]:
    """The samples of "1 2 _ 4" (_: none), "0+10x3" (0 10 20 30), "5x2" (5 5 5), "_x2"."""
    for piece in values.split():
        if match := re.fullmatch(r"_x(\d+)", piece):
            yield from [None] * int(match[1])
        elif match := re.fullmatch(r"(-?[\d.]+|NaN|[-+]?Inf)(?:([-+][\d.]+))?x(\d+)", piece):
            for index in range(int(match[3]) + 1):
                yield float(match[1]) + float(match[2] or 0) * index
        else:
            yield None if piece == "_" else float(piece)


def labels_of(series: str) -> dict[str, str]:
    name, _, pairs = series.partition("{")
    labels = dict(re.findall(r'([\w.]+)="([^"]*)"', pairs))
    return {"__name__": name, **labels} if name else labels


def as_series(labels: dict[str, str]) -> str:
    pairs = ",".join(f'{name}="{labels[name]}"' for name in sorted(labels) if name != "__name__")
    return labels.get("__name__", "") + (f"{{{pairs}}}" if pairs else "")


class Stored:
    """Series in memory, given as one line each: name, labels, values at multiples of the step."""

    def __init__(self, text: str, step_ms: int = MINUTE):
        self.series: list[Series] = []
        self.selections: list[tuple] = []
        for line in filter(None, map(str.strip, text.splitlines())):
            series, _, values = line.partition(" ")
            there = [
                (index * step_ms, value)
                for index, value in enumerate(notated(values))
                if value is not None
            ]
            self.series.append(Series(labels_of(series), array("q", [time_ms for time_ms, _ in there]),
                                      array("d", [value for _, value in there])))  # fmt: skip

    def select(
        self, matchers: Sequence[Matcher], start_ms: int, end_ms: int, budget: object = None
    ) -> Iterator[Series]:
        self.selections.append((tuple(matchers), start_ms, end_ms))
        for labels, times, values in self.series:
            if all(self.fulfils(labels.get(matcher.name, ""), matcher) for matcher in matchers):
                low, high = bisect.bisect_left(times, start_ms), bisect.bisect_right(times, end_ms)
                yield Series(labels, times[low:high], values[low:high])

    @staticmethod
    def fulfils(value: str, matcher: Matcher) -> bool:
        if matcher.op in ("=", "!="):
            return (value == matcher.value) == (matcher.op == "=")
        return bool(re.fullmatch(matcher.value, value)) == (matcher.op == "=~")


STORED = Stored("""
    requests_total{host="a",job="api"} 0+60x60
    requests_total{host="b",job="api"} 0+120x60
    requests_total{host="a",job="web"} 0+30x30 0+30x29
    temperature{host="a"} 10 20 30 40 50 60 50 40 30 20 10
    temperature{host="b"} -5x10
    limit{host="a"} 25x60
    limit{host="b"} 0x60
    host_info{host="a",os="linux",rack="1"} 1x60
    host_info{host="b",os="linux",rack="2"} 1x60
    sparse 1 _ _ _ _ _ _ 8
    odd{kind="nan"} NaNx60
    odd{kind="inf"} Infx60
    odd{kind="minus"} -Infx60
    odd{kind="one"} 1x60
    wave 1 2 2 1 3 NaN NaN 5 4 4 0
    latency_bucket{le="0.1"} 10x60
    latency_bucket{le="0.5"} 30x60
    latency_bucket{le="1"} 40x60
    latency_bucket{le="+Inf"} 40x60
    below_bucket{le="-1"} 10x60
    below_bucket{le="1"} 20x60
    below_bucket{le="+Inf"} 20x60
    cpu.usage{host.name="x"} 7x60
    first{l="1"} 1x60
    second{l="1"} 2x60
    early{l="1"} 1 1 1
    late{l="1"} _x10 2x10
    moment 951782400x60
    cancelling -2.258e220 -1.78264e219 0.76342771 1.9592258 2.3757689e217 -2.3757689e217 2.258e220 7.69805412 1.78264e219 -458.90154
    falling_bucket{le="0.5"} 40x60
    falling_bucket{le="1"} 30x60
    falling_bucket{le="+Inf"} 40x60
    holed_bucket{le="0.5"} 10x60
    holed_bucket{le="1"} NaNx60
    holed_bucket{le="+Inf"} 40x60
""")


# ==================================================================================================
# Query language
# ==================================================================================================


# ---- what can't be asked: query, line and column, why ----

REFUSED = [
    ("", "1:1", "no expression found"), ("  # nothing", "1:1", "no expression found"), ("1 +", "1:4", "expected an expression"),
    ("1\n+ + )", "2:5", "expected an expression"), ("(1", "1:3", "expected ')'"), ("foo bar", "1:5", "expected an operator"),
    ("foo{", "1:5", "expected a label name"), ("foo{a}", "1:6", "expected one of = != =~ !~"), ("foo{a=b}", "1:7", "value in quotes"),
    ("foo{a:b='c'}", "1:5", "expected a label name"), ("foo{a='b' c='d'}", "1:11", "expected ',' or '}'"), ("sum by ('') (foo)", "1:9", "invalid label name"),
    ("sum by (inf) (foo)", "1:9", "expected a label name"), ("sum by (NaN) (foo)", "1:9", "expected a label name"),
    ("sum by (without) (foo)", "1:9", "expected a label name"), ("1e1000", "1:1", "out of range"), ("0xffffffffffffffff", "1:1", "out of range"),
    ("foo[1e999]", "1:5", "out of range"), ("foo offset 1e999", "1:12", "out of range"), ("foo[0x11111111111111111111]", "1:5", "out of range"),
    ("foo[5m:1e999]", "1:8", "out of range"), ("foo[1e10]", "1:5", "out of range"), ("foo[5m:0s]", "1:8", "greater than 0"), ("300y", "1:1", "out of range"),
    ("foo[5m-5m]", "1:5", "greater than 0"), ("foo[1/0]", "1:6", "division by zero"), ("foo[5m % 0s]", "1:8", "modulo by zero"),
    ("foo[(5m]", "1:8", "expected ')'"), ("foo offset (1m", "1:15", "expected ')'"), ("foo[5m +]", "1:9", "expected a duration"),
    ("foo[0/0+0^-1-0^-1]", "1:6", "division by zero"), ("foo[2^9999]", "1:5", "out of range"), ("foo @ 1e19", "1:5", "out of bounds"),
    ("{'a',__name__='b'} @ 1 @ 2", "1:24", "multiple times"), ("foo * on (a) 5", "1:5", "only allowed between"),
    ("foo{a=~'('}", "1:8", "invalid regular expression"), ("foo{a=~'(?=x)'}", "1:8", "unsupported Perl syntax"),
    ("foo{a=~'\\\\1'}", "1:8", "invalid escape sequence"), ("foo{a=~'a++'}", "1:8", "invalid nested repetition operator"),
    ("1 + 0x" + "f" * 20, "1:5", "out of range"), ("m[" + "9" * 5000 + "y]", "1:3", "out of range"), ("{}", "1:1", "non-empty matcher"), ("{a=~'.*',b!='c'}", "1:1", "non-empty"),
    ("foo{__name__='bar'}", "1:1", 'set twice: "foo" or "bar"'), ("foo{'bar'}", "1:1", "set twice"), ("foo[5m", "1:7", "expected ']'"),
    ("foo[]", "1:5", "expected a duration"), ("foo[0m]", "1:5", "greater than 0"), ("foo[5x]", "1:6", "bad number or duration"),
    ("foo[30m1h]", "1:5", "not a duration"), ("foo[5m][5m]", "1:8", "only allowed for vector selectors"), ("foo[300y]", "1:5", "out of range"),
    ("foo[5m:1m", "1:10", "expected ']'"), ("1[5m:]", "1:1", "got scalar"), ("foo offset 1m [5m]", "1:15", "no offset modifiers"),
    ("foo @ 1 [5m]", "1:9", "no @ modifiers"), ("foo offset bar", "1:12", "expected a duration"), ("sum(foo) offset 5m", "1:10", "must be preceded by"),
    ("1 @ 5", "1:3", "must be preceded by"), ("foo @ 1 @ 2", "1:9", "multiple times"), ("foo offset 1m offset 1m", "1:15", "multiple times"),
    ("foo @ Inf", "1:5", "out of bounds"), ("foo @ start", "1:12", "expected '('"), ("'a\\q'", "1:1", "unknown escape"), ("'abc", "1:1", "unterminated string"),
    ("'\\ud800'", "1:1", "out of range"), ("1x", "1:2", "bad number"), ("foo $", "1:5", "unexpected character"), ("on", "1:1", "expected an expression"),
    ("nope(1)", "1:1", 'unknown function with name "nope"'), ("rate(foo)", "1:6", 'expected type range vector in call to function "rate", got instant vector'),
    ("abs(foo[5m])", "1:5", "expected type instant vector"), ("abs()", "1:1", 'expected 1 argument(s) in call to "abs", got 0'),
    ("time(1)", "1:1", "expected 0 argument(s)"), ("round()", "1:1", "expected at least 1"), ("round(foo, 1, 2)", "1:1", "expected at most 2"),
    ("label_join(foo, 'a', 'b', 1)", "1:27", "expected type string"), ("abs(foo,)", "1:9", "expected an expression"), ("abs(foo bar)", "1:9", "expected ',' or ')'"),
    ("sum()", "1:1", "no arguments"), ("sum(foo, bar)", "1:1", "expected 1, got 2"), ("topk(foo)", "1:1", "expected 2, got 1"), ("topk('a', foo)", "1:6", "expected type scalar"),
    ("count_values(1, foo)", "1:14", "expected type string"), ("sum(1)", "1:5", "expected type instant vector"), ("sum by foo (bar)", "1:8", "expected '('"),
    ("sum by (a b) (foo)", "1:11", "expected ',' or ')'"), ("1 == 2", "1:3", "must use BOOL"), ("1 + bool 2", "1:3", "bool modifier"), ("1 and foo", "1:3", "set operator"),
    ("foo + on (a) 1", "1:5", "only allowed between instant vectors"), ("foo or on (a) group_left bar", "1:5", 'no grouping allowed for "or"'),
    ("foo + on (a) group_left (a) bar", "1:29", "must not occur in ON and GROUP"), ("'a' + 1", "1:5", "only scalar and instant vector"), ("-'a'", "1:2", 'got "string"'),
    ("(" * 2000, "1:1", "nested too deeply"),
]  # fmt: skip


@pytest.mark.parametrize("query, place, reason", REFUSED, ids=lambda value: value[:30])
def test_a_query_that_is_wrong_is_refused_with_the_place(query, place, reason):
    with pytest.raises(QueryError) as refused:
        parse_query(query)
    assert f"{refused.value.line}:{refused.value.column}" == place
    assert str(refused.value).startswith(f"{place}: parse error: ") and reason in str(refused.value)


# ---- text ----

LONG = (
    'sum by (host_with_a_long_name, job) (rate(http_requests_total{code=~"5..",method!="GET"}[5m]))'
)


@pytest.mark.parametrize("query, formatted", [
    ("sum(x)by(a,b)", "sum by (a, b) (x)"), ("sum without()(x)", "sum without () (x)"), ("TOPK(1,x)", "topk(1, x)"),
    ("a+on(x)group_left(y)b", "a + on (x) group_left (y) b"), ("a==bool ignoring(x)b", "a == bool ignoring (x) b"),
    ("a AND b", "a and b"), ("x{b='c',a=~\"d\"}[90m]offset 36h@1.5", 'x{a=~"d",b="c"}[1h30m] @ 1.500 offset 1d12h'),
    ("rate(x[1w])[400d:]@ end()", "rate(x[1w])[400d:] @ end()"), ("x[1y:30s] offset -5m", "x[1y:30s] offset -5m"),
    ("{'cpu.usage',\"a b\"='c'}", '{"a b"="c",__name__="cpu.usage"}'), ("{__name__='x'}", '{__name__="x"}'), ("x{}", "x"),
    ("{'x','y'}", '{__name__="x",__name__="y"}'), ("x{''='a'}", 'x{""="a"}'),
    ("1e6", "1000000"), ("123456.5", "123456.5"), ("0.00001", "0.00001"), ("1e21", "1" + "0" * 21), ("- inf", "-Inf"), ("1.50", "1.5"),
    ("1.5e1_0", "15000000000"), ("5m", "5m"), ("90m + 300", "1h30m + 300"), ("-5m", "-5m"), ("0s + 1", "0s + 1"), ("1y2w3d4h5m6s7ms", "382d4h5m6s7ms"),
    ("x[300]", "x[5m]"), ("x[5m + 1m]", "x[5m + 1m]"), ("x[5m:1m*2]", "x[5m:1m * 2]"), ("x[2^3^2]", "x[2 ^ 3 ^ 2]"), ("x[-(-5m)]", "x[5m]"),
    ("x[((1m+2m))*3]", "x[(1m + 2m) * 3]"), ("x offset (5m)", "x offset 5m"), ("x offset -(5m+1m)", "x offset -(5m + 1m)"),
    ("x offset (1m)+2", "x offset 1m + 2"), ("x offset -2^2", "x offset -2s ^ 2"), ("x offset --5m", "x offset 5m"), ("x offset 0s", "x"),
    ("x @ 9007199254740993", "x @ 9007199254740992.000"),
    ("sum by (a:b, 'a b', 'inf') (x)", 'sum by (a:b, "a b", "inf") (x)'), ("x + on (a:b) y", "x + on (a:b) y"),
    ("x * on () 5", "x * 5"), ("1 * ignoring () group_left 2", "1 * 2"), ("sum by (bool, on, and, start) (x)", "sum by (bool, on, and, start) (x)"),
    ("'\\x07\\u200b\\xff\"\\U0001F600\\U000e0001'", '"\\a\\u200b\\xff\\"\U0001f600\\U000e0001"'), ("- (a)", "-(a)"),
    (f"{LONG}/{LONG}", f"  {LONG}\n/\n  {LONG}"), (f"({LONG}+1000)", f"(\n    {LONG}\n  +\n    1000\n)"),
    (f"topk(5,{LONG})", f"topk(\n  5,\n  {LONG}\n)"), (f"{LONG}  [1h:]offset 1m", f"{LONG}[1h:] offset 1m"),
    (f"histogram_quantile(0.9,-{LONG}*1000)", f"histogram_quantile(\n  0.9,\n    -{LONG}\n  *\n    1000\n)"),
], ids=lambda text: text[:30])  # fmt: skip
def test_a_query_is_laid_out_as_prometheus_does(query, formatted):
    assert format_query(query) == formatted
    assert format_query(formatted) == formatted
    assert format_query("x[0.0001]") == "x[0s]"


@pytest.mark.parametrize("query", ["abs(" * 3000 + "a" + ")" * 3000, "1" + "*1" * 9000, "-" * 9000 + "a",
                                   "a" + " or a" * 9000, "a[" + "(" * 3000 + "1" + ")" * 3000 + "]"],
                         ids=lambda text: text[:9])  # fmt: skip
def test_what_is_nested_too_deeply_is_refused_in_a_sentence(query):
    for use in (format_query, lambda text: Engine(STORED.select).instant(text, 0)):
        with pytest.raises((QueryError, ExecutionError), match="nested too deeply"):
            use(query)


def test_the_work_of_parsing_and_layout_grows_with_the_text(monkeypatch):
    """Calls counted, not time: eight times the operators are about eight times the calls."""

    def calls(operators: int) -> int:
        count = 0

        def seen(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(seen)
        try:
            format_query("1" + "*1" * operators)
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) < 10 * calls(50)


def test_values_are_printed_as_go_prints_them():
    for value, text in ((0.0, "0"), (-0.0, "-0"), (100.0, "100"), (1e-6, "0.000001"), (9.99e-7, "9.99e-07"), (1.5e17, "150000000000000000"),
                        (123456789.25, "123456789.25"), (-1e300, "-1e+300"), (INF, "+Inf"), (-INF, "-Inf"), (NAN, "NaN")):  # fmt: skip
        assert format_value(value) == text


# ==================================================================================================
# Evaluation
# ==================================================================================================

# at ten minutes: what is asked -> what is there, series by series; a scalar has none
ANSWERS: dict[str, dict[str, float] | float | str] = {
    # literals and precedence
    "1": 1, ".5": 0.5, "5.": 5, "0x1F": 31, "0755": 493, "1e3": 1000, "1_000": 1000, "5m": 300, "1h30m": 5400,
    "+Inf": INF, "-inf": -INF, "nan": NAN, "- 1": -1, "1 + 2 * 3 ^ 2": 19, "-1 ^ 2": -1, "(-1) ^ 2": 1,
    "2 ^ 3 ^ 2": 512, "2 ^ -1": 0.5, "10 - 4 - 3": 3, "7 % 4 * 2": 6, "--1": 1, "1 # one\n + 1": 2,
    "7 % -3": 1, "-7 % 3": -1, "1 / 0": INF, "-1 / 0": -INF, "0 / 0": NAN, "1 % 0": NAN, "0 ^ -1": INF,
    "(-8) ^ 0.5": NAN, "10 ^ 400": INF, "1 atan2 1": math.pi / 4, "1 < bool 2": 1, "2 <= bool 1": 0,
    "1 == bool 1": 1, "NaN == bool NaN": 0, "NaN != bool NaN": 1, "1 + 1 == bool 2": 1, "time()": 600, "pi()": math.pi,
    '"a\\n\\x41\\101\\u00e9"': "a\nAAé", "'it\\'s'": "it's", "`a\\n`": "a\\n",
    # selectors
    'temperature': {'temperature{host="a"}': 10, 'temperature{host="b"}': -5},
    'temperature{host="a"}': {'temperature{host="a"}': 10},
    "temperature{host!='a',}": {'temperature{host="b"}': -5},
    'temperature{host=~"a|x"}': {'temperature{host="a"}': 10},
    'temperature{host!~"a.*"}': {'temperature{host="b"}': -5},
    '{__name__=~"fir.*|sec.*"}': {'first{l="1"}': 1, 'second{l="1"}': 2},
    '{"cpu.usage"}': {'cpu.usage{host.name="x"}': 7},
    '{"cpu.usage","host.name"="x"}': {'cpu.usage{host.name="x"}': 7},
    'temperature{host="a"} offset 5m': {'temperature{host="a"}': 60},
    'temperature{host="a"} offset -0s': {'temperature{host="a"}': 10},
    'limit offset -10m': {'limit{host="a"}': 25, 'limit{host="b"}': 0},
    'temperature{host="a"} @ 120': {'temperature{host="a"}': 30},
    'temperature{host="a"} @ 180 offset 1m': {'temperature{host="a"}': 30},
    'temperature{host="a"} offset 1m @ 180': {'temperature{host="a"}': 30},
    'temperature{host="a"} @ end()': {'temperature{host="a"}': 10},
    "early": {},  # eight minutes old
    "sparse": {"sparse": 8}, "sparse @ 299": {"sparse": 1}, "sparse @ 300": {},  # the lookback is left-open
    "temperature[2m] @ 600": {'temperature{host="a"}': 10, 'temperature{host="b"}': -5},
    # ranges hold start < t <= end
    'count_over_time(temperature{host="b"}[5m])': {'{host="b"}': 5},
    'count_over_time(temperature{host="b"}[5m1ms])': {'{host="b"}': 6},
    'sum_over_time(temperature{host="a"}[3m])': {'{host="a"}': 60},
    'avg_over_time(temperature{host="a"}[3m] offset 5m)': {'{host="a"}': 50},
    'sum_over_time(temperature{host="a"}[2m] @ 60)': {'{host="a"}': 30},
    "min_over_time(wave[10m])": {"": 0}, "max_over_time(wave[4m] @ 360)": {"": 3},
    "min_over_time(wave[2m] @ 360)": {"": NAN}, "avg_over_time(wave[4m] @ 300)": {"": NAN},
    "last_over_time(wave[3m])": {"wave": 0}, "first_over_time(wave[4m])": {"wave": 5}, "present_over_time(wave[3m])": {"": 1},
    "stddev_over_time(temperature{host='a'}[2m])": {'{host="a"}': 5},
    "stdvar_over_time(temperature{host='a'}[2m])": {'{host="a"}': 25},
    "quantile_over_time(0.5, temperature{host='a'}[4m])": {'{host="a"}': 25},
    "quantile_over_time(-1, temperature[4m])": {'{host="a"}': -INF, '{host="b"}': -INF},
    "quantile_over_time(1.1, temperature{host='b'}[4m])": {'{host="b"}': INF},
    "changes(wave[11m])": {"": 7}, "resets(wave[11m])": {"": 3}, "changes(temperature{host='b'}[9m])": {'{host="b"}': 0},
    "absent_over_time(temperature[5m])": {},
    'absent_over_time(none{a="1",b!="2"}[5m])': {'{a="1"}': 1},
    # rates
    "rate(requests_total[5m])": {'{host="a",job="api"}': 1, '{host="b",job="api"}': 2, '{host="a",job="web"}': 0.5},
    "increase(requests_total{job='web'}[5m])": {'{host="a",job="web"}': 150},
    "rate(requests_total{job='web'}[5m] @ 2040)": {'{host="a",job="web"}': 90 / 240 * 5 / 5},
    "increase(requests_total{host='b'}[5m] @ 120)": {'{host="b",job="api"}': 240},  # not below 0
    "delta(temperature[5m])": {'{host="a"}': -50, '{host="b"}': 0},
    "delta(sparse[10m])": {},  # one sample
    "irate(requests_total{host='b'}[5m])": {'{host="b",job="api"}': 2},
    "irate(temperature{host='a'}[5m])": {'{host="a"}': 10 / 60},
    "idelta(temperature{host='a'}[5m])": {'{host="a"}': -10},
    "deriv(temperature[5m])": {'{host="a"}': -1 / 6, '{host="b"}': 0},
    "predict_linear(temperature[5m], 60)": {'{host="a"}': 0, '{host="b"}': -5},
    "holt_winters(temperature{host='a'}[5m], 0.5, 0.5)": {'{host="a"}': 10},
    "double_exponential_smoothing(temperature{host='a'}[5m], 0.5, 0.5)": {'{host="a"}': 10},
    # subqueries stand on multiples of their step
    "count_over_time(first[10m:])": {'{l="1"}': 10}, "count_over_time(first[10m:7m])": {'{l="1"}': 1},
    "max_over_time(rate(requests_total{host='b'}[2m])[4m:1m])": {'{host="b",job="api"}': 2},
    "sum_over_time(vector(time())[3m:1m])": {"": 600 + 540 + 480},
    "sum_over_time(vector(time())[3m:1m] offset 1m)": {"": 540 + 480 + 420},
    "sum_over_time(vector(time())[3m:1m] @ 240)": {"": 240 + 180 + 120},
    "min_over_time(sum(temperature)[5m:2m])": {"": 5},
    # functions of values
    "abs(temperature{host='b'})": {'{host="b"}': 5}, "-temperature{host='b'}": {'{host="b"}': 5},
    "+temperature{host='b'}": {'temperature{host="b"}': -5},
    "ceil(vector(-0.5))": {"": 0}, "floor(vector(-0.5))": {"": -1}, "round(vector(2.5))": {"": 3},
    "round(vector(-2.5))": {"": -2}, "round(vector(17), 5)": {"": 15}, "round(vector(0.123), 0.01)": {"": 0.12},
    "floor(odd{kind='inf'})": {'{kind="inf"}': INF}, "sgn(odd)": {
        '{kind="nan"}': NAN, '{kind="inf"}': 1, '{kind="minus"}': -1, '{kind="one"}': 1},
    "exp(vector(1000))": {"": INF}, "ln(vector(0))": {"": -INF}, "ln(vector(-1))": {"": NAN}, "log2(vector(8))": {"": 3},
    "log10(vector(1000))": {"": 3}, "sqrt(vector(-1))": {"": NAN}, "sqrt(vector(9))": {"": 3},
    "clamp(temperature, 0, 5)": {'{host="a"}': 5, '{host="b"}': 0}, "clamp(temperature, 5, 0)": {},
    "clamp_min(temperature, 0)": {'{host="a"}': 10, '{host="b"}': 0}, "clamp_max(temperature, NaN)": {
        '{host="a"}': NAN, '{host="b"}': NAN},
    "sin(vector(Inf))": {"": NAN}, "atanh(vector(1))": {"": INF}, "acosh(vector(0))": {"": NAN}, "sinh(vector(-1000))": {"": -INF},
    "cosh(vector(-1000))": {"": INF}, "asin(vector(2))": {"": NAN}, "tanh(vector(0))": {"": 0}, "deg(vector(pi()))": {"": 180},
    "rad(vector(180))": {"": math.pi}, "cos(vector(0)) + tan(vector(0)) + acos(vector(1)) + atan(vector(0)) + asinh(vector(0))": {"": 1},
    "timestamp(sparse)": {"": 420}, "timestamp(-sparse)": {"": 600}, "timestamp(sparse offset 3m)": {"": 420},
    "scalar(sparse) + 1": 9, "scalar(temperature)": NAN, "vector(1) + vector(2)": {"": 3},
    "absent(temperature)": {}, 'absent(none{a="1",b=~"2",c="3",c="4"})': {'{a="1"}': 1}, "absent(sum(none))": {"": 1},
    # times: 951782400 is 2000-02-29T00:00:00Z
    "year(moment)": {"": 2000}, "month(moment)": {"": 2}, "day_of_month(moment)": {"": 29}, "day_of_week(moment)": {"": 2},
    "day_of_year(moment)": {"": 60}, "days_in_month(moment)": {"": 29}, "hour(moment - 1)": {"": 23}, "minute()": {"": 10},
    "year(vector(-1))": {"": 1969}, "days_in_month(vector(-1))": {"": 31}, "hour(vector(NaN))": {"": NAN}, "year()": {"": 1970},
    # histograms
    "histogram_quantile(0.5, latency_bucket)": {"": 0.3}, "histogram_quantile(1, latency_bucket)": {"": 1},
    "histogram_quantile(0, latency_bucket)": {"": 0}, "histogram_quantile(2, latency_bucket)": {"": INF},
    "histogram_quantile(-1, latency_bucket)": {"": -INF}, "histogram_quantile(NaN, latency_bucket)": {"": NAN},
    'histogram_quantile(0.5, latency_bucket{le!="+Inf"})': {"": NAN}, "histogram_quantile(0.5, limit)": {},
    "histogram_quantile(0.5, latency_bucket * 0)": {"": NAN}, "histogram_quantile(0.25, below_bucket)": {"": -1},
    "histogram_fraction(0, 0.5, latency_bucket)": {"": 0.75}, "histogram_fraction(0.3, Inf, latency_bucket)": {"": 0.5},
    "histogram_fraction(1, 0, latency_bucket)": {"": 0}, "histogram_fraction(-Inf, 0, below_bucket)": {"": 0.75},
    "histogram_fraction(NaN, 0, below_bucket)": {"": NAN}, "histogram_fraction(-2, Inf, below_bucket)": {"": 0.5},
    # labels
    'label_replace(sparse, "a", "$1-${1}x-$2", "__name__", "(sp)arse")': {'sparse{a="sp-spx-"}': 8},
    'label_replace(sparse, "a", "${n}$$1", "__name__", "(?P<n>s).*")': {'sparse{a="s$1"}': 8},
    'label_replace(sparse, "a", "x", "__name__", "spars")': {"sparse": 8},
    'label_replace(limit{host="a"}, "host", "", "", "")': {"limit": 25},
    'label_join(host_info{host="a"}, "all", "-", "os", "rack", "none")': {'host_info{all="linux-1-",host="a",os="linux",rack="1"}': 1},
    'label_join(limit{host="a"}, "host", "")': {"limit": 25},
    # aggregation
    "sum(temperature)": {"": 5}, "sum by (job) (rate(requests_total[5m]))": {'{job="api"}': 3, '{job="web"}': 0.5},
    "sum(temperature) by (none)": {"": 5}, "sum without (host) (limit)": {"": 25}, "SUM WITHOUT () (limit)": {
        '{host="a"}': 25, '{host="b"}': 0},
    'sum by ("host.name") ({"cpu.usage"})': {'{host.name="x"}': 7}, "sum by (__name__) (limit)": {"limit": 25},
    "avg(temperature)": {"": 2.5}, "min(odd)": {"": -INF}, "max(odd)": {"": INF}, "min(odd{kind='nan'})": {"": NAN},
    "max(odd{kind!='inf'})": {"": 1}, "sum(odd{kind!='nan'})": {"": NAN}, "avg(odd{kind=~'inf|one'})": {"": INF},
    "count(odd)": {"": 4}, "group(odd)": {"": 1}, "stddev(temperature)": {"": 7.5}, "stdvar(temperature)": {"": 56.25},
    "quantile(0.5, temperature)": {"": 2.5}, "quantile(2, temperature)": {"": INF}, "quantile(NaN, temperature)": {"": NAN},
    "topk(1, temperature)": {'temperature{host="a"}': 10}, "bottomk(1, temperature)": {'temperature{host="b"}': -5},
    "topk by (job) (1, requests_total)": {'requests_total{host="b",job="api"}': 1200, 'requests_total{host="a",job="web"}': 300},
    "topk(0, temperature)": {}, "topk(2, odd{kind=~'nan|one|inf'})": {'odd{kind="inf"}': INF, 'odd{kind="one"}': 1},
    'count_values("v", limit)': {'{v="25"}': 1, '{v="0"}': 1}, 'count_values("v", vector(1e22))': {'{v="10000000000000000000000"}': 1},
    'count_values by (host) ("host", limit * 0)': {'{host="0"}': 2},
    "sum(vector(1e308) or on () vector(1))": {"": 1e308}, "avg(label_replace(vector(1.7e308), 'a', 'b', '', '') or vector(1.7e308))": {"": 1.7e308},
    "sum(none)": {}, "count(none) or vector(0)": {"": 0}, "topk(2, none)": {},
    # two vectors
    "temperature + limit": {'{host="a"}': 35, '{host="b"}': -5},
    "temperature / 0": {'{host="a"}': INF, '{host="b"}': -INF}, "100 - temperature": {'{host="a"}': 90, '{host="b"}': 105},
    "temperature > 0": {'temperature{host="a"}': 10}, "0 < temperature": {'temperature{host="a"}': 10},
    "temperature > bool 0": {'{host="a"}': 1, '{host="b"}': 0}, "0 < bool temperature": {'{host="a"}': 1, '{host="b"}': 0},
    "temperature < limit": {'temperature{host="a"}': 10, 'temperature{host="b"}': -5},
    "temperature < on (host) limit": {'{host="a"}': 10, '{host="b"}': -5},
    "requests_total * on (host) group_left limit": {
        '{host="a",job="api"}': 15000, '{host="a",job="web"}': 7500, '{host="b",job="api"}': 0},
    "limit - on (host) group_right () requests_total": {
        '{host="a",job="api"}': -575, '{host="a",job="web"}': -275, '{host="b",job="api"}': -1200},
    "limit < on (host) group_right requests_total": {
        'requests_total{host="a",job="api"}': 25, 'requests_total{host="a",job="web"}': 25, 'requests_total{host="b",job="api"}': 0},
    "temperature * on (host) group_left (os, none) host_info": {'{host="a",os="linux"}': 10, '{host="b",os="linux"}': -5},
    "host_info * ignoring (os, rack) limit": {'{host="a"}': 25, '{host="b"}': 0},
    "temperature atan2 temperature": {'{host="a"}': math.pi / 4, '{host="b"}': -3 * math.pi / 4},
    "temperature and temperature > 0": {'temperature{host="a"}': 10},
    "temperature unless temperature > 0": {'temperature{host="b"}': -5},
    "requests_total and on (host) limit > 5": {
        'requests_total{host="a",job="api"}': 600, 'requests_total{host="a",job="web"}': 300},
    "temperature or limit": {'temperature{host="a"}': 10, 'temperature{host="b"}': -5},
    "limit > 5 or temperature": {'limit{host="a"}': 25, 'temperature{host="b"}': -5},
    "first or second and none": {'first{l="1"}': 1}, "temperature unless on () vector(1)": {},
    "odd == odd": {'odd{kind="inf"}': INF, 'odd{kind="minus"}': -INF, 'odd{kind="one"}': 1}, "none + temperature": {},
    # to the letter: what Prometheus answers where one could think otherwise
    "017": 15, "08": 8, "1.5e1_0": 1.5e10, "0s": 0, "0x7fffffffffffffff": 2.0**63, "1_0.0_5": 10.05,
    "sum_over_time(temperature{host='a'}[2m + 1m])": {'{host="a"}': 60}, "sum_over_time(temperature{host='a'}[1m*3])": {'{host="a"}': 60},
    "sum_over_time(temperature{host='a'}[2^2*45])": {'{host="a"}': 60}, "temperature{host='a'} offset (5m)": {'temperature{host="a"}': 60},
    "temperature{host='a'} offset -(1m-6m)": {'temperature{host="a"}': 60}, "temperature{host='a'} offset 5m + 1": {'{host="a"}': 61},
    "limit{host='a'} offset --5m": {'limit{host="a"}': 25}, "count_over_time(first[10m:5m-(2m+1m)])": {'{l="1"}': 5},
    "sum_over_time(first[0.0001])": {}, "limit @ 1e15": {}, "limit @ 9007199254740993": {},
    "max(limit) * on () 5": {"": 125}, "2 * ignoring () 3": 6, "{'sparse','nothing'}": {}, "sparse{''='a'}": {}, "sparse{''=''}": {"sparse": 8},
    "sum by (a:b) (limit)": {"": 25}, "sum by (bool, on) (limit)": {"": 25},
    "holt_winters(temperature{host='a'}[5m], NaN, 0.5)": {'{host="a"}': NAN}, "holt_winters(sparse[5m], 0.5, 0.5)": {},
    "stdvar_over_time(odd{kind='inf'}[5m])": {'{kind="inf"}': NAN}, "stdvar_over_time((limit * 1e300)[5m:1m])": {'{host="a"}': 0, '{host="b"}': 0},
    "stddev_over_time((temperature{host='a'} * 1e307)[5m:1m])": {'{host="a"}': NAN}, "stdvar(vector(1e200) or label_replace(vector(-1e200),'a','b','',''))": {"": INF},
    "stddev(label_replace(vector(1e308),'a','b','','') or vector(-1e308))": {"": NAN}, "stddev(host_info * 0.1)": {"": 0},
    "avg_over_time((temperature{host='a'} * 9e306)[5m:1m])": {'{host="a"}': 30 * 9e306},
    "avg_over_time(cancelling[11m])": {"": 0},  # the exact one is -44.85
    "clamp(vector(NaN), Inf, Inf)": {"": INF}, "clamp(vector(NaN), -Inf, -Inf)": {"": -INF}, "clamp(vector(Inf), NaN, Inf)": {"": INF},
    "clamp(vector(1), Inf, NaN)": {"": INF}, "clamp(vector(-Inf), 1, NaN)": {"": 1}, "clamp(vector(1), NaN, 2)": {"": NAN},
    "clamp_max(vector(NaN), -Inf)": {"": -INF}, "clamp_max(vector(-Inf), NaN)": {"": -INF}, "clamp_min(vector(NaN), Inf)": {"": INF},
    "clamp_min(vector(1), NaN)": {"": NAN}, "topk(-1e30, limit)": {}, "bottomk(-Inf, limit)": {}, "topk(scalar(none), none)": {},
    'count_values without (host) ("host", limit)': {"": 2}, 'count_values without (os) ("host", limit * 0)': {'{host="0"}': 2},
    'absent(none{a="1",a=~"2"})': {"": 1}, 'absent(none{a=~"2",a="1"})': {'{a="1"}': 1}, 'absent(none{a="1",a="1"})': {"": 1}, 'absent(none{a=""})': {"": 1},
    'label_replace(sparse, "a", "$01", "__name__", "(sp)arse")': {"sparse": 8}, 'label_replace(sparse, "a", "$1é", "__name__", "(sp)arse")': {"sparse": 8},
    'label_replace(sparse, "a", "${1}é", "__name__", "(sp)arse")': {'sparse{a="spé"}': 8}, 'label_replace(sparse, "a", "$1_", "__name__", "(sp)arse")': {"sparse": 8},
    "histogram_quantile(0.5, falling_bucket)": {"": 0.25}, "histogram_fraction(0, 1, falling_bucket)": {"": 0.75},
    "histogram_quantile(0.5, holed_bucket)": {"": 1}, 'histogram_quantile(0.5, label_replace(latency_bucket, "le", "1e400", "le", "0.1"))': {"": 1 / 3},
    'histogram_quantile(0.5, label_replace(latency_bucket, "le", " 0.1", "le", "0.1"))': {"": 1 / 3},
}  # fmt: skip


def numbers_agree(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-12) or (
        found != found and expected != expected
    )


@pytest.mark.parametrize("query", ANSWERS)
def test_a_query_at_ten_minutes_answers(query):
    result, expected = Engine(STORED.select).instant(query, 10 * MINUTE), ANSWERS[query]
    if isinstance(result, MatrixResult):
        assert isinstance(expected, dict)
        assert {as_series(series.labels): series.values[-1] for series in result.series} == expected
    elif isinstance(result, VectorResult):
        found = {as_series(labels): value for labels, value in result.samples}
        assert (
            isinstance(expected, dict)
            and found.keys() == expected.keys()
            and len(found) == len(result.samples)
        )
        assert all(numbers_agree(found[series], expected[series]) for series in expected), found
    elif isinstance(result, StringResult):
        assert result.value == expected
    else:
        assert isinstance(expected, float | int) and numbers_agree(result.value, expected), result


@pytest.mark.parametrize(
    "query", [query for query in ANSWERS if not re.match(r"[\"'`]|temperature\[", query)]
)
def test_a_graph_shows_at_each_step_what_is_there_at_that_time(query):
    if "start()" in query or "end()" in query:
        pytest.skip("means the start and end of the graph")
    engine = Engine(STORED.select)
    for start_ms, end_ms, step_ms in (
        (0, 20 * MINUTE, MINUTE),
        (7 * MINUTE + 13_000, 35 * MINUTE, 97_000),
    ):
        graph: dict[str, dict[int, float]] = {}
        for series in engine.range(query, start_ms, end_ms, step_ms).series:
            assert as_series(series.labels) not in graph
            graph[as_series(series.labels)] = dict(zip(series.times_ms, series.values))
        for time_ms in range(start_ms, end_ms + 1, step_ms):
            result = engine.instant(query, time_ms)
            samples = result.samples if isinstance(result, VectorResult) else [({}, result.value)]  # type: ignore[union-attr, list-item]
            expected = {as_series(labels): value for labels, value in samples}
            found = {
                series: points[time_ms] for series, points in graph.items() if time_ms in points
            }
            assert found.keys() == expected.keys(), time_ms
            assert all(numbers_agree(found[series], expected[series]) for series in found), time_ms


@pytest.mark.parametrize("query, order", [
    ("sort(odd)", ["minus", "one", "inf", "nan"]), ("sort_desc(odd)", ["inf", "one", "minus", "nan"]),
    ("topk(3, odd)", ["inf", "one", "minus"]), ("bottomk(4, odd)", ["minus", "one", "inf", "nan"]),
])  # fmt: skip
def test_the_order_of_an_instant_vector_is_that_of_its_query(query, order):
    result = Engine(STORED.select).instant(query, 0)
    assert isinstance(result, VectorResult)
    assert [labels["kind"] for labels, _ in result.samples] == order


def test_a_range_vector_is_answered_with_its_samples():
    result = Engine(STORED.select).instant('temperature{host="a"}[3m]', 10 * MINUTE)
    labels = {"__name__": "temperature", "host": "a"}
    times = array("q", [8 * MINUTE, 9 * MINUTE, 10 * MINUTE])
    assert result == MatrixResult([Series(labels, times, array("d", [30, 20, 10]))])
    result = Engine(STORED.select).instant("early[3m:1m]", 4 * MINUTE)
    assert isinstance(result, MatrixResult) and list(result.series[0].times_ms) == [
        2 * MINUTE,
        3 * MINUTE,
        4 * MINUTE,
    ]


def test_start_and_end_are_those_of_the_graph():
    engine = Engine(STORED.select)
    for query, values in (("temperature{host='a'} @ start()", [20, 20, 20]), ("temperature{host='a'} @ end()", [40] * 3),
                          ("sum_over_time(temperature{host='a'}[2m] @ end())", [70] * 3)):  # fmt: skip
        (series,) = engine.range(query, MINUTE, 3 * MINUTE, MINUTE).series
        assert list(series.values) == values


def test_a_prediction_from_a_fixed_window_looks_ahead_from_each_step():
    (series,) = (
        Engine(STORED.select)
        .range("predict_linear(requests_total{host='b'}[5m] @ 600, 60)", 0, 2 * MINUTE, MINUTE)
        .series
    )
    assert list(series.values) == pytest.approx([120, 240, 360])


def test_series_that_take_turns_may_lose_their_names():
    engine = Engine(STORED.select)
    (series,) = engine.range('abs({__name__=~"early|late"})', 0, 20 * MINUTE, MINUTE).series
    assert list(series.values) == [1] * 7 + [2] * 11
    # a minus and functions of ranges refuse them even if they never meet
    for query in ("abs({__name__=~'first|second'})", "-{__name__=~'early|late'}",
                  "sum_over_time({__name__=~'early|late'}[1m])"):  # fmt: skip
        with pytest.raises(ExecutionError, match="same labelset"):
            engine.range(query, 0, 20 * MINUTE, MINUTE)


# ---- extrapolation, window by window: the samples, where the window ends, its increase ----


@pytest.mark.parametrize("samples, end_s, increase", [
    ("0+10x5", 300, 50.0),  # at 60 … 300 s, and one interval before the first
    ("100+10x5", 300, 50.0),
    ("5+10x5", 300, 50.0),
    ("_ _ 5 15 25 35", 300, 30 + 5),  # back to where it was 0, not to the middle of the interval
    ("_ _ 500 510 520 530", 300, 30 + 5),  # half an interval: the series begins in the window
    ("_ _ 1 11 21 31", 300, 30 + 1),
    ("500 510 520 530 _ _", 300, 20 * (120 + 60 + 30) / 120),  # ends in the window
    ("500 510 520 530 _ _", 245, 30 * (180 + 55 + 65) / 180),  # borders within 1.1 intervals
    ("500 510 520 530 _ _", 247, 30 * (180 + 53 + 30) / 180),
    ("90 100 110 4 14 24", 300, (24 - 100 + 110) * 300 / 240),  # begins again at 0
    ("5 4 3 2 1 0", 300, (0 - 4 + 4 + 3 + 2 + 1) * 300 / 240),
    ("-30+10x5", 300, 50.0),  # no zero to stop at
])  # fmt: skip
def test_increase_extrapolates_to_the_borders_of_the_window(samples, end_s, increase):
    result = Engine(Stored(f"x {samples}").select).instant("increase(x[5m])", end_s * 1000)
    assert isinstance(result, VectorResult)
    assert result.samples[0][1] == pytest.approx(increase)


# ---- what does not fit the series ----


@pytest.mark.parametrize("query, reason", [
    ("temperature * on () limit", 'found duplicate series for the match group {} on the right hand-side of the operation: '
     '[{__name__="limit", host="b"}, {__name__="limit", host="a"}];many-to-many matching not allowed: matching labels must be unique on one side'),
    ("limit * on (host) requests_total", 'for the match group {host="a"} on the right hand-side'),
    ("requests_total * on (host) group_right limit", 'for the match group {host="a"} on the left hand-side'),
    ("requests_total * on (host) limit", "multiple matches for labels: many-to-one matching must be explicit (group_left/group_right)"),
    ("{__name__=~'first|second'} * on (l) group_left first", "multiple matches for labels: grouping labels must ensure unique matches"),
    ("rate({__name__=~'first|second'}[5m])", "vector cannot contain metrics with the same labelset"),
    ("label_replace(limit, 'host', 'x', '', '')", "vector cannot contain metrics with the same labelset"),
    ("label_replace(limit, 'a', 'x', '', '(')", "invalid regular expression in label_replace(): ("),
    ("label_replace(limit, '', 'x', '', '')", "invalid destination label name in label_replace(): "),
    ("label_join(limit, 'a', 'x', '')", "invalid source label name in label_join(): "),
    ("count_values('', limit)", 'invalid label name ""'), ("topk(NaN, limit)", "Scalar value NaN overflows int64"),
    ("bottomk(1e30, limit)", "Scalar value 1e+30 overflows int64"), ("topk(Inf, limit)", "Scalar value +Inf overflows int64"),
    ("requests_total > on (host) limit * 1e9", "many-to-one matching must be explicit"),
    ("holt_winters(limit[1s], 2, 0.5)", "invalid smoothing factor. Expected: 0 < sf < 1, got: 2.000000"),
    ("holt_winters(limit[5m], 1, 0.5)", "invalid smoothing factor. Expected: 0 < sf < 1, got: 1.000000"),
    ("holt_winters(limit[5m], 0.5, 0)", "invalid trend factor. Expected: 0 < tf < 1, got: 0.000000"),
    ("limit" + " + limit" * 700, "nested too deeply"),
], ids=lambda value: value[:40])  # fmt: skip
def test_what_does_not_fit_the_series_is_an_error_of_execution(query, reason):
    with pytest.raises(ExecutionError) as failed:
        Engine(STORED.select).instant(query, 10 * MINUTE)
    assert reason in str(failed.value)


@pytest.mark.parametrize("query", ["'text'", "limit[5m]", "limit[5m:1m]"])
def test_a_graph_is_of_scalars_and_instant_vectors(query):
    with pytest.raises(QueryError, match="invalid expression type"):
        Engine(STORED.select).range(query, 0, MINUTE, MINUTE)


# ---- limits ----


@pytest.mark.parametrize("query", ["count(requests_total)", "vector(1)[2000s:1ms]", "limit * limit",
                                   "sum_over_time(limit[1h:1s])", "label_join(limit, 'a', ',', 'b')"])  # fmt: skip
def test_a_query_does_no_more_work_than_its_budget(query):
    engine = Engine(STORED.select)
    assert engine.instant(query, 0, metricstream.Budget(1e9))
    with pytest.raises(metricstream.OverBudgetError):
        engine.instant(query, 0, metricstream.Budget(5))


@pytest.mark.parametrize("query", ["limit", "sum_over_time(limit[1h])", "vector(1)", "time()", "sum_over_time(limit[1h:1s])",
                                   "max_over_time(vector(1)[100000d:1ms])"])  # fmt: skip
def test_a_query_holds_no_more_samples_than_it_may(query):
    def ask(max_samples: int) -> MatrixResult:
        return Engine(STORED.select, max_samples=max_samples).range(query, 0, 60 * MINUTE, MINUTE)

    with pytest.raises(SampleLimitError, match="would load too many samples into memory"):
        ask(60)
    assert "100000d" in query or ask(100_000).series


def test_what_is_selected_twice_is_read_once():
    stored = Stored("x 0+1x60")
    Engine(stored.select).range(
        "rate(x[5m]) / rate(x[5m]) + sum(x) / count(x) + x offset 5m", 0, 60 * MINUTE, MINUTE
    )
    matchers = (Matcher("__name__", "=", "x"),)
    start_ms, end_ms = -5 * MINUTE + 1, 60 * MINUTE
    assert stored.selections == [
        (matchers, start_ms, end_ms),
        (matchers, start_ms - 5 * MINUTE, end_ms - 5 * MINUTE),
    ]


# ==================================================================================================
# Query API
# ==================================================================================================


@pytest.fixture(scope="module")
def queried(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server with a few series at times from 0."""
    options = ("--retention", "0", "--rate-limit", "0", "--self-metrics", "0")
    with ServerProcess(tmp_path_factory.mktemp("queried"), *options) as started:
        with contextlib.closing(Client(started.port)) as client:
            for time_s in range(0, 601, 60):
                metrics = [
                    {"name": "requests_total", "value": time_s * (n + 1), "type": "counter",
                     "tags": {"host": f"web{n}", "path": '/"ü'}, "timestamp": time_s}
                    for n in range(2)
                ]  # fmt: skip
                metrics.append({"name": "cpu.usage", "value": 0.5, "timestamp": time_s})
                assert client.ask("POST", "/metrics", {"metrics": metrics}).status == 200
        yield started


def asked(started: ServerProcess, path: str, method: str = "GET", **parameters: Any) -> Any:
    """(status, the answer as JSON) of the API, its parameters in the target or as a form."""
    started.wait_for_store()
    form = urllib.parse.urlencode(parameters, doseq=True)
    with contextlib.closing(Client(started.port, 30)) as client:
        if method == "GET":
            answer = client.ask("GET", f"/api/v1/{path}?{form}")
        else:
            kind = "application/x-www-form-urlencoded"
            answer = client.ask("POST", f"/api/v1/{path}", form.encode(), Content_Type=kind)
    assert answer.headers["content-type"].startswith("application/json")
    return answer.status, answer.json


WEB = [{"__name__": "requests_total", "host": f"web{n}", "path": '/"ü'} for n in range(2)]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path, parameters, data", [
    ("query", {"query": "1+1", "time": "4"}, {"resultType": "scalar", "result": [4, "2"]}),
    ("query", {"query": "'a\\n'", "time": "4.5"}, {"resultType": "string", "result": [4.5, "a\n"]}),
    ("query", {"query": "requests_total{host='web1'}", "time": "1970-01-01T00:10:00Z"},
     {"resultType": "vector", "result": [{"metric": WEB[1], "value": [600, "1200"]}]}),
    ("query", {"query": "sum by (path) (rate(requests_total[5m]))", "time": "600"},
     {"resultType": "vector", "result": [{"metric": {"path": '/"ü'}, "value": [600, "3"]}]}),
    ("query", {"query": "requests_total[2m]", "time": "600", "limit": "1"},
     {"resultType": "matrix", "result": [
         {"metric": WEB[0], "values": [[540, "540"], [600, "600"]]}]}),
    ("query_range", {"query": '{"cpu.usage"}*2', "start": "0", "end": "120", "step": "1m"},
     {"resultType": "matrix", "result": [
         {"metric": {}, "values": [[0, "1"], [60, "1"], [120, "1"]]}]}),
    ("query_range", {"query": "nothing", "start": "0", "end": "120", "step": "0.5"},
     {"resultType": "matrix", "result": []}),
    ("series", {"match[]": ['requests_total{host=~"web."}', "{__name__='cpu.usage'}"]},
     [{"__name__": "cpu.usage"}, *WEB]),
    ("series", {"match[]": "requests_total", "limit": 1}, [WEB[0]]),
    ("series", {"match[]": "requests_total", "start": "10000"}, []),
    ("labels", {}, ["__name__", "host", "path"]),
    ("labels", {"match[]": '{__name__="cpu.usage"}'}, ["__name__"]),
    ("label/host/values", {}, ["web0", "web1"]),
    ("label/host/values", {"limit": "1", "start": "0", "end": "60"}, ["web0"]),
    ("label/__name__/values", {}, ["cpu.usage", "requests_total"]),
    ("label/none/values", {}, []),
    ("metadata", {"metric": "requests_total"},
     {"requests_total": [{"type": "counter", "help": "", "unit": ""}]}),
    ("format_query", {"query": "sum(a)by(b)"}, "sum by (b) (a)"),
    # any time of a float64, and the boundary times of Prometheus's own clients
    ("query", {"query": "nothing", "time": "-9.2e15"}, {"resultType": "vector", "result": []}),
    ("query", {"query": "nothing", "time": "1e300"}, {"resultType": "vector", "result": []}),
    ("query", {"query": "vector(1)[2m:1m]", "time": "-62167219200"}, {"resultType": "matrix", "result": [
        {"metric": {}, "values": [[-62167219260, "1"], [-62167219200, "1"]]}]}),
    ("query", {"query": "1", "time": "0000-01-01T00:00:00Z"}, {"resultType": "scalar", "result": [-62167219200, "1"]}),
    ("query", {"query": "1", "time": "9999-12-31T23:59:59.5Z"}, {"resultType": "scalar", "result": [253402300799.5, "1"]}),
    ("query", {"query": "1", "time": "1970-01-01T1:00:00+01:30"}, {"resultType": "scalar", "result": [-1800, "1"]}),
    ("query", {"query": "1", "time": "1970-01-01T00:00:00-24:60"}, {"resultType": "scalar", "result": [90000, "1"]}),
    ("labels", {"start": "-292273086-05-16T16:47:06Z", "end": "292277025-08-18T07:12:54.999999999Z"},
     ["__name__", "host", "path"]),
    ("query", {"query": "requests_total{host='web0'}", "time": "659", "lookback_delta": "1m"},
     {"resultType": "vector", "result": [{"metric": WEB[0], "value": [659, "600"]}]}),
    ("query", {"query": "requests_total", "time": "660", "lookback_delta": "60"}, {"resultType": "vector", "result": []}),
    ("query", {"query": "count(requests_total)", "time": "660", "lookback_delta": "-1"},
     {"resultType": "vector", "result": [{"metric": {}, "value": [660, "2"]}]}),
    ("query_range", {"query": "count(requests_total)", "start": "600", "end": "720", "step": "60", "lookback_delta": "1m"},
     {"resultType": "matrix", "result": [{"metric": {}, "values": [[600, "2"]]}]}),
    # an empty parameter is as if it were missing
    ("series", {"match[]": "{'cpu.usage'}", "start": "", "end": "", "limit": ""}, [{"__name__": "cpu.usage"}]),
    ("query", {"query": "nothing", "time": "", "timeout": "", "limit": "", "lookback_delta": ""},
     {"resultType": "vector", "result": []}),
    ("label/host/values", {"limit": "+1"}, ["web0"]),
    ("label/host/values", {"limit": "9223372036854775807"}, ["web0", "web1"]),
    ("label/U__host/values", {}, ["web0", "web1"]),
    ("label/U___68_ost/values", {}, ["web0", "web1"]),
    ("label/U__a_110000_/values", {}, []),
    ("query", {"query": '"\\xff\\\\udcff"', "time": "0"}, {"resultType": "string", "result": [0, "\ufffd\\udcff"]}),
    ("query", {"query": "1e-7", "time": "0"}, {"resultType": "scalar", "result": [0, "0.0000001"]}),
    ("query", {"query": "1e21", "time": "0"}, {"resultType": "scalar", "result": [0, "1" + "0" * 21]}),
    ("query", {"query": "vector(1e21)", "time": "0"},
     {"resultType": "vector", "result": [{"metric": {}, "value": [0, "1e+21"]}]}),
])  # fmt: skip
def test_the_api_answers_as_prometheus_does(queried, method, path, parameters, data):
    status, answer = asked(queried, path, method, **parameters)
    assert (status, answer) == (200, {"status": "success", "data": data})


@pytest.mark.parametrize("path, parameters, status, kind, reason", [
    ("query", {}, 400, "bad_data", '"query"'),
    ("query", {"query": "sum("}, 400, "bad_data", "1:5"),
    ("query", {"query": "up", "time": "soon"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "timeout": "x"}, 400, "bad_data", '"timeout"'),
    ("query", {"query": "up", "limit": "-1"}, 400, "bad_data", '"limit"'),
    ("query", {"query": "requests_total * on(path) requests_total", "time": "600"},
     422, "execution", "many-to-many"),
    ("query", {"query": "up", "timeout": "0"}, 503, "timeout", "timed out"),
    ("query", {"query": "up", "timeout": "-1s"}, 400, "bad_data", '"timeout"'),
    ("query", {"query": "up", "timeout": "300y"}, 400, "bad_data", '"timeout"'),
    ("query", {"query": "up", "time": "NaN"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "time": "1_0"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "time": "1e400"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "time": "2025-09-17 13:45:23Z"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "time": "2025-09-17t13:45:23z"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "time": "2025-09-17T13:45:60Z"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "time": "2025-02-29T13:45:06Z"}, 400, "bad_data", '"time"'),
    ("query", {"query": "up", "lookback_delta": "x"}, 400, "bad_data", '"lookback_delta"'),
    ("query", {"query": "up", "limit": "1.5"}, 400, "bad_data", '"limit"'),
    ("query_range", {"query": "up", "start": "", "end": "10", "step": "1"}, 400, "bad_data", '"start"'),
    ("query_range", {"query": "up", "start": "0", "end": "10", "step": "300y"}, 400, "bad_data", '"step"'),
    ("query_range", {"query": "up", "start": "0", "end": "10", "step": "Inf"}, 400, "bad_data", '"step"'),
    ("query_range", {"query": "up", "start": "0", "end": "10"}, 400, "bad_data", '"step"'),
    ("query_range", {"query": "up", "start": "9", "end": "1", "step": "1"}, 400, "bad_data", '"end"'),
    ("query_range", {"query": "up", "start": "0", "end": "1", "step": "0"}, 400, "bad_data", '"step"'),
    ("query_range", {"query": "up", "start": "0", "end": "11002", "step": "1"},
     400, "bad_data", "11,000 points"),
    ("query_range", {"query": "up[5m]", "start": "0", "end": "1", "step": "1"},
     400, "bad_data", "range vector"),
    ("series", {}, 400, "bad_data", "match[]"),
    ("series", {"match[]": "sum(a)"}, 400, "bad_data", "match[]"),
    ("format_query", {"query": "1 +"}, 400, "bad_data", "1:4"),
])  # fmt: skip
def test_errors_of_the_api_are_those_of_prometheus(queried, path, parameters, status, kind, reason):
    found, answer = asked(queried, path, **parameters)
    assert (found, answer["status"], answer["errorType"]) == (status, "error", kind)
    assert reason in answer["error"]


def test_a_long_query_is_refused_in_a_sentence(queried):
    status, answer = asked(queried, "query", "POST", query="x" * 65537)
    assert (status, answer["error"]) == (400, "the query has more than 65536 bytes")
    assert asked(queried, "query", "POST", query="x" * 65536)[0] == 200


def test_grafana_saves_tests_and_draws(queried):
    """The requests of Grafana's Prometheus data source: the health check, what it is, the names
    for its editor, and a graph.
    """
    status, answer = asked(queried, "query", "POST", query="1+1", time="1758116723.123")
    assert status == 200 and answer["data"]["result"] == [1758116723.123, "2"]
    status, answer = asked(queried, "status/buildinfo")
    assert status == 200 and answer["data"]["version"] == metricstream.__version__
    times = {"start": "0", "end": "600"}
    assert asked(queried, "labels", "POST", **times)[1]["data"]
    assert asked(queried, "label/__name__/values", **times)[1]["data"]
    assert asked(queried, "metadata", limit="5000")[1]["data"].keys() == {
        "cpu.usage",
        "requests_total",
    }
    assert (
        len(asked(queried, "series", "POST", **{"match[]": "requests_total"}, **times)[1]["data"])
        == 2
    )
    query = 'sum by(host) (increase(requests_total{host=~"web0|web1"}[2m]))'
    status, answer = asked(queried, "query_range", "POST", query=query, step="60", **times)
    hosts = [series["metric"]["host"] for series in answer["data"]["result"]]
    assert status == 200 and hosts == ["web0", "web1"]
    assert answer["data"]["result"][1]["values"][-1] == [600, "240"]


def test_other_bodies_and_paths_are_no_queries(queried):
    with contextlib.closing(Client(queried.port)) as client:
        assert (
            client.ask(
                "POST", "/api/v1/query", {"query": "up"}, Content_Type="application/json"
            ).status
            == 415
        )
        assert client.ask("GET", "/api/v1/nothing").status == 404
        assert client.ask("DELETE", "/api/v1/query").headers["allow"] == "GET, POST, HEAD, OPTIONS"
        kind = "application/x-www-form-urlencoded"
        assert client.ask("POST", "/api/v1/query", b"query=\xff", Content_Type=kind).status == 400


def test_an_answer_that_misses_data_says_so(tmp_path):
    under = a_store(tmp_path)
    try:
        block_of(under, 1000)
        under.push([Sample("m", 9.0, "gauge", {}, 9000)])
        under.read()
        (block,) = (tmp_path / "blocks").glob("*.block")
        os.truncate(block, 20)
        api = metricstream.QueryAPI(under.store)
        under.store.refresh()
        form = form_of(query="m[1h]", time=10).decode()
        status, body = api.answer("/api/v1/query", form, metricstream.Budget())
        answer = json.loads(body)
        assert status == 200 and block.name in answer["warnings"][0]
        assert answer["data"]["result"][0]["values"][-1] == [9, "9"]
    finally:
        under.close()


# ---- beside a real Prometheus ----


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where one of the programs is missing, and fail in CI, which installs them."""
    missing = [program for program in programs if shutil.which(program) is None]
    skip = bool(missing) and "CI" not in os.environ
    return pytest.mark.skipif(skip, reason=f"not installed: {', '.join(missing)}")


class PrometheusProcess:
    """An installed Prometheus over given samples, on a free port."""

    def __init__(self, folder: Path, samples: Iterable[tuple[dict[str, str], float, float]]) -> None:
        text, tsdb, config = folder / "samples.txt", folder / "tsdb", folder / "prometheus.yml"
        with text.open("w") as file:
            for labels, value, time_s in samples:
                tags = ",".join(f"{label}={json.dumps(labels[label])}" for label in labels
                                if label != "__name__")  # fmt: skip
                file.write(f"{labels['__name__']}{{{tags}}} {value!r} {time_s:.3f}\n")
            file.write("# EOF\n")
        command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(tsdb)]
        subprocess.run(command, check=True, capture_output=True)
        config.write_text("")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            ["prometheus", f"--web.listen-address=127.0.0.1:{self.port}", f"--config.file={config}",
             f"--storage.tsdb.path={tsdb}", "--storage.tsdb.retention.time=100y"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        eventually(self.is_ready, 30)

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), contextlib.closing(Client(self.port)) as client:
            return client.ask("GET", "/-/ready").status == 200
        return False

    def __enter__(self) -> "PrometheusProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


# Where queries begin and end: no sample, and no step of a subquery, is where a window begins, which
# belongs to the window in Prometheus 2 and not in 3.
DIFF_START_S, DIFF_END_S = 1_700_000_007, 1_700_007_207


def diff_samples() -> Iterator[tuple[dict[str, str], float, float]]:
    """Counters with resets, gauges with gaps, irregular times, histograms."""
    rng = random.Random(12)
    times_s = [DIFF_START_S - 600 + 15 * n + 0.123 for n in range((DIFF_END_S - DIFF_START_S) // 15)]
    rows: list[tuple[dict[str, str], list[tuple[float, float]]]] = []
    for job, instance in itertools.product("ab", range(3)):
        tags = {"job": job, "instance": f"i{instance}"}
        total, counter = 1e6, []
        for time_s in times_s:
            total = 5e5 if rng.random() < 0.01 else total + rng.randrange(100)
            counter.append((time_s, total))
        rows.append(({"__name__": "requests_total", **tags}, counter))
        level = [(time_s + rng.randrange(0, 9000) / 1000, rng.gauss(0, 100)) for time_s in times_s]
        gone = rng.randrange(len(level) - 60)
        rows.append(({"__name__": "level", **tags}, level[:gone] + level[gone + 50 :]))
        if job == "a":
            rows.append(({"__name__": "few", "instance": f"i{instance}"},
                         [(time_s, float(rng.randrange(4))) for time_s in times_s[::7]]))  # fmt: skip
        counts = [0] * 4
        buckets: list[list[tuple[float, float]]] = [[] for _ in counts]
        for time_s in times_s[::2]:
            counts = [count + rng.randrange(9) for count in counts]
            for bucket, count in zip(buckets, itertools.accumulate(counts)):
                bucket.append((time_s, float(count)))
        for le, bucket in zip(("0.1", "0.5", "1", "+Inf"), buckets):
            rows.append(({"__name__": "latency_bucket", "le": le, **tags}, bucket))
    for labels, samples in rows:
        for time_s, value in samples:
            yield labels, value, round(time_s, 3)


class QueryGenerator:
    """Queries by the grammar of PromQL, most of which make sense."""

    SELECTORS = (
        "requests_total", "level", "few", "latency_bucket", "nothing", 'level{job="a"}',
        'requests_total{job!="a"}', 'level{instance=~"i[01]"}', '{__name__=~"few|level"}',
        'few{instance!~"i.*1"}', 'requests_total{job=""}',
    )  # fmt: skip
    NUMBERS = ("0", "1", "2", "0.5", "-1", "100", "1e3", "Inf", "-Inf", "NaN", "0x1f", "3.7")
    LABELS = ("job", "instance", "le", "job, instance", "", "absent")
    OF_RANGE = (
        "absent_over_time", "avg_over_time", "changes", "count_over_time", "delta", "deriv",
        "idelta", "increase", "irate", "last_over_time", "max_over_time", "min_over_time",
        "present_over_time", "rate", "resets", "stddev_over_time", "stdvar_over_time",
        "sum_over_time",
    )  # fmt: skip
    OF_VECTOR = (
        "abs", "absent", "ceil", "exp", "floor", "ln", "log10", "log2", "sgn", "sqrt", "timestamp",
        "sort", "sort_desc", "sin", "cos", "tanh", "asinh", "deg", "rad", "day_of_week", "hour",
        "minute", "month", "days_in_month", "year", "atan",
    )  # fmt: skip
    AGGREGATIONS = ("sum", "avg", "min", "max", "count", "group", "stddev", "stdvar")

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.in_subquery = False

    def pick(self, choices: Sequence[str]) -> str:
        return self.rng.choice(choices)

    def modifiers(self) -> str:
        text = self.pick(("", "", "", "", " offset 1m", " offset -70s", " offset 10m"))
        at = f" @ {DIFF_START_S + 1200}"
        return text + self.pick(("", "", "", "", "", at, " @ end()", " @ start()"))

    def range(self, depth: int) -> str:
        window = self.pick(("30s", "1m", "5m", "20m", "1h"))
        if depth > 1 and not self.in_subquery and self.rng.random() < 0.2:
            self.in_subquery = True
            inner = self.vector(depth - 1)
            self.in_subquery = False
            return f"({inner})[{window}:{self.pick(('', '10s', '30s'))}]{self.modifiers()}"
        return f"{self.pick(self.SELECTORS)}[{window}]{self.modifiers()}"

    def scalar(self, depth: int) -> str:
        if depth <= 0 or self.rng.random() < 0.7:
            return self.pick(self.NUMBERS)
        return self.pick((
            f"scalar({self.vector(depth - 1)})", "time()", "pi()",
            f"({self.scalar(depth - 1)} {self.pick('+-*/%^')} {self.scalar(depth - 1)})",
            f"({self.scalar(depth - 1)} {self.pick(('>', '==', '<='))} bool {self.scalar(0)})",
        ))  # fmt: skip

    def matching(self) -> str:
        way = self.pick(("", "", "on", "ignoring"))
        if not way:
            return ""
        group = self.pick(("", "", "", " group_left", " group_right"))
        include = f" ({self.pick(self.LABELS)})" if group and self.rng.random() < 0.5 else ""
        return f" {way} ({self.pick(self.LABELS)}){group}{include}"

    def vector(self, depth: int) -> str:
        if depth <= 0:
            return self.pick(self.SELECTORS) + self.modifiers()
        less = depth - 1
        kind = self.rng.randrange(12)
        if kind < 2:
            return self.vector(0)
        if kind < 4:
            return f"{self.pick(self.OF_RANGE)}({self.range(depth)})"
        if kind == 4:
            return f"{self.pick(self.OF_VECTOR)}({self.vector(less)})"
        if kind == 5:
            return self.function(less)
        if kind < 8:
            clause = self.pick(("", f" by ({self.pick(self.LABELS)})",
                                f" without ({self.pick(self.LABELS)})"))  # fmt: skip
            name = self.pick((*self.AGGREGATIONS, "quantile", "count_values"))
            more = {"quantile": f"{self.scalar(1)}, ", "count_values": '"v", '}.get(name, "")
            return f"{name}{clause}({more}{self.vector(less)})"
        if kind == 8:
            op = self.pick(("+", "-", "*", "/", "%", "^", "atan2", ">", "== bool", "<=", "!="))
            sides = [self.vector(less), self.scalar(1)]
            self.rng.shuffle(sides)
            return f"({sides[0]} {op} {sides[1]})"
        if kind == 9:
            op = self.pick(("and", "or", "unless"))
            on = self.matching().split(" group")[0]
            return f"({self.vector(less)} {op}{on} {self.vector(less)})"
        if kind == 10:
            op = self.pick(("+", "-", "*", "/", "%", "^", "atan2", ">", "== bool", "<", "!="))
            return f"({self.vector(less)} {op}{self.matching()} {self.vector(less)})"
        return f"{self.pick('-+')}{self.vector(0)}"

    def function(self, depth: int) -> str:
        vector = self.vector(depth)
        return self.pick((
            f"clamp({vector}, {self.scalar(1)}, {self.scalar(1)})",
            f"clamp_min({vector}, {self.scalar(1)})", f"clamp_max({vector}, {self.scalar(1)})",
            f"round({vector}, {self.scalar(1)})", f"round({vector})",
            f"histogram_quantile({self.scalar(1)}, {vector})",
            f'histogram_quantile({self.scalar(0)}, rate(latency_bucket[5m]))',
            f"quantile_over_time({self.scalar(1)}, {self.range(depth)})",
            f"predict_linear({self.range(depth)}, {self.scalar(1)})",
            f'label_replace({vector}, "{self.pick(("job", "z"))}", "x$1", "instance", "i(.*)")',
            f'label_join({vector}, "z", "-", "job", "instance")',
            f"vector({self.scalar(depth)})", f"scalar({vector}) + {vector}",
        ))  # fmt: skip


def agree(ours: object, theirs: object) -> bool:
    """Whether two results are the same, but for the last bits of floats."""
    if isinstance(ours, str) and isinstance(theirs, str):
        try:
            a, b = float(ours), float(theirs)
        except ValueError:
            return ours == theirs
        return a == b or a != a != b != b or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(agree, ours, theirs))
    return ours == theirs


def comparable(status: int, answer: dict) -> list:
    """What is compared of an answer: the type of an error, or the result by its labels."""
    if status != 200:
        return [status, answer["errorType"]]
    kind, result = answer["data"]["resultType"], answer["data"]["result"]
    if kind in ("vector", "matrix"):
        result = sorted(
            ([sorted(row["metric"].items()), row.get("value") or row["values"]] for row in result),
            key=lambda row: row[0],
        )
        result = [[json.dumps(labels), values] for labels, values in result]
    return [kind, result]


def push(port: int, samples: Iterable[tuple[dict[str, str], float, float]]) -> None:
    metrics = (
        {"name": labels["__name__"], "value": value, "timestamp": time_s,
         "tags": {label: labels[label] for label in labels if label != "__name__"}}
        for labels, value, time_s in samples
    )  # fmt: skip
    with contextlib.closing(Client(port)) as client:
        while batch := list(itertools.islice(metrics, 1000)):
            assert client.ask("POST", "/metrics", {"metrics": batch}).status == 200


# Where answers may differ: what the query has, and why.
DOCUMENTED = (
    ("minute|hour|day|month|year", "dates of values beyond int64: NaN, or the end of a calendar"),
    ("count_values", "a value that is a label shows the last bit of a sum or a logarithm"),
    ("timestamp.*(@|offset)", "timestamp() with @ or offset: Prometheus looks at another time"),
    ("topk|bottomk", "which of equal values is the greatest is nobody's promise"),
    ("[<>=!]=|<|>", "many-to-one hidden by a comparison: refused by Prometheus since 3.14"),
)

DOCUMENTED_OF_PROMETHEUS_2 = (
    ("atan2", "atan2 keeps the name of the metric in Prometheus 2"),
    ("predict_linear.*@", "predict_linear with @ is of the first step only in Prometheus 2"),
    ("stddev|stdvar", "one value, NaN or infinite, has the variance 0 in Prometheus 2"),
    ("rate|increase", "counters near 0 are extrapolated in another way in Prometheus 2"),
)


def documented(query: str, version: str) -> str:
    """Why the answers to a query may differ; "" for no reason that is known."""
    older = DOCUMENTED_OF_PROMETHEUS_2 if version.startswith("2.") else ()
    return next((reason for has, reason in DOCUMENTED + older if re.search(has, query)), "")


@needs("prometheus", "promtool")
@at_once()
def test_generated_queries_are_answered_as_prometheus_does(tmp_path):
    """`make queries-diff` asks ten thousand."""
    number = int(os.environ.get("METRICSTREAM_QUERIES", "400"))
    (tmp_path / "metricstream").mkdir()
    options = ("--rate-limit", "0", "--retention", "0", "--self-metrics", "0")
    reasons: Counter[str] = Counter()
    with (
        PrometheusProcess(tmp_path, diff_samples()) as prometheus,
        ServerProcess(tmp_path / "metricstream", *options) as started,
        contextlib.closing(Client(started.port)) as ours,
        contextlib.closing(Client(prometheus.port)) as theirs,
    ):
        push(started.port, diff_samples())
        started.wait_for_store()
        version = theirs.ask("GET", "/api/v1/status/buildinfo").json["data"]["version"]
        generator = QueryGenerator(seed=int(os.environ.get("METRICSTREAM_SEED", "1")))
        for index in range(number):
            query = generator.vector(3) if index % 10 else generator.scalar(3)
            form: dict[str, object] = {"query": query, "time": DIFF_START_S + 3600}
            path = "query"
            if index % 3:
                path = "query_range"
                form = {"query": query, "start": DIFF_START_S, "end": DIFF_END_S, "step": 300}
            answers = [
                client.ask("POST", f"/api/v1/{path}", urllib.parse.urlencode(form).encode(),
                           Content_Type="application/x-www-form-urlencoded")
                for client in (ours, theirs)
            ]  # fmt: skip
            one, other = (comparable(answer.status, answer.json) for answer in answers)
            if not agree(one, other):
                reason = documented(query, version)
                assert reason, (path, query, one, other)
                reasons[reason] += 1
    print(f"\n{number} queries beside Prometheus {version}:")
    for reason, times in reasons.items():
        print(f"{times:6} {reason}")
    assert sum(reasons.values()) < max(10, number / 50)


@pytest.mark.skipif("METRICSTREAM_BENCH" not in os.environ, reason="a measurement: make queries")
@pytest.mark.parametrize("series", [100, 1000])
def test_queries_beside_prometheus(series, tmp_path):
    """The same six hours at 15 s in both; what they answer is compared, how long it takes printed."""
    end_s = int(time.time()) // 60 * 60
    # not at whole minutes: there Prometheus 2 takes a sample more, the one at the beginning
    times_s = range(end_s - 6 * 3600 + 7, end_s, 15)
    rng = random.Random(1)
    tags = [{"host": f"h{n % 20}", "instance": f"i{n}"} for n in range(series)]
    # far from 0, near which Prometheus 2 extrapolates in another way
    steps = [[10_000_000, *(rng.randrange(100) for _ in times_s)] for _ in tags]
    values = [list(itertools.accumulate(step)) for step in steps]
    samples = [
        ({"__name__": "m_total", **tag}, float(values[n][place]), float(time_s))
        for place, time_s in enumerate(times_s)
        for n, tag in enumerate(tags)
    ]
    (tmp_path / "metricstream").mkdir()
    with (
        PrometheusProcess(tmp_path, sorted(samples, key=lambda sample: sample[0]["instance"])) as prometheus,
        ServerProcess(tmp_path / "metricstream", "--rate-limit", "0") as started,
    ):
        push(started.port, samples)
        started.wait_for_store()

        def ask(port: int, query: str) -> tuple[float, Any]:
            form = {"query": query, "start": end_s - 6 * 3600, "end": end_s, "step": 60}
            with contextlib.closing(Client(port)) as client:
                began = time.perf_counter()
                answer = client.ask("GET", f"/api/v1/query_range?{urllib.parse.urlencode(form)}")
                took_s = time.perf_counter() - began
            result = answer.json["data"]["result"]
            return took_s, {json.dumps(row["metric"]): row["values"] for row in result}

        for query in ("sum by (host) (rate(m_total[5m]))", 'rate(m_total{instance="i7"}[5m])',
                      'm_total{instance="i7"}'):  # fmt: skip
            took: dict[int, list[float]] = {started.port: [], prometheus.port: []}
            for _ in range(5):
                (ours_s, ours), (theirs_s, theirs) = (ask(port, query) for port in took)
                took[started.port].append(ours_s)
                took[prometheus.port].append(theirs_s)
            assert ours.keys() == theirs.keys()
            for name, row in ours.items():
                assert len(row) == len(theirs[name])
                for (_, mine), (_, other) in zip(row, theirs[name]):
                    assert float(mine) == pytest.approx(float(other), rel=1e-12)
            mine, other = took.values()
            print(f"\n{series} series, {query}: first {mine[0] * 1000:.1f} ms, median "
                  f"{sorted(mine)[2] * 1000:.1f}; Prometheus {other[0] * 1000:.1f}, "
                  f"{sorted(other)[2] * 1000:.1f}")  # fmt: skip


# ==================================================================================================
# Store process
# ==================================================================================================

HEAVY = "max_over_time(max_over_time(vector(1)[9h:1s])[9h:1s])"  # takes half a minute


@at_once()
def test_a_query_ends_when_the_server_stops(tmp_path):
    with ServerProcess(tmp_path, "--rate-limit", "0") as started:
        started.wait_for_store()
        form = urllib.parse.urlencode({"query": HEAVY})
        with socket.create_connection(("127.0.0.1", started.port)) as connection:
            connection.sendall(b"GET /api/v1/query?%b HTTP/1.1\r\nHost: a\r\n\r\n" % form.encode())
            eventually(lambda: len(children_of(started.process.pid)) == 2)  # it runs
            pids = children_of(started.process.pid)
            status, _, err = started.stop()
    assert (status, err) == (0, "")
    assert not any(map(is_alive, pids))


ATTACKS = (
    'x{h=~"(.|x)*y"}', 'x{h=~"(?i)(ab|AB)*c"}', 'x{h=~"(a{0}b|b)*c"}', 'x{h=~"(x|.){1,900}y"}',
    'long{l=~".*.*.*!"}', 'label_replace(long, "z", "$1", "l", "(.|x)*y")',
    'x{h=~"(?i)' + "|".join(f"set{n}" for n in range(6000)) + '"}', 'x{h=~"' + "(a|b)?" * 9000 + '"}',
    "quantile_over_time(0.5, vector(1)[100d:1s])", "max_over_time(vector(1)[400d:1s])",
    "vector(1)[2000s:1ms]", "absent_over_time(absent(vector(1))[4000s:1ms])",
    "last_over_time((x offset -1h)[1y:2.5])", "x{" + ",".join(f'h!="{n}"' for n in range(900)) + "}",
    "a + on () b", "a * on () a", "(" * 40 + "1" + ",1" * 20_000 + ")" * 40, "1" + "*1" * 900,
    "1" + "*1" * 30_000, "(" * 900 + "1" + ")" * 900, "-" * 60_000 + "1", "a" + " or a" * 9000,
    'label_replace(a, "z", "' + "$1" * 20_000 + '", "i", "(.*)")',
    'label_join(a, "z", "' + "s" * 50_000 + '", ' + ", ".join(['"i"'] * 1000) + ")",
    "max_over_time(max_over_time(vector(1)[9h:1s])[9h:1s])", "x[1e999]", "x offset 1e999",
    "x[0x11111111111111111111]", 'label_replace(a, "z", "${' + "9" * 60 + '}", "i", ".*")', '"\\xff"',
)  # fmt: skip


@contextlib.contextmanager
def of_few_hundred_series(folder: Path) -> Iterator[ServerProcess]:
    """A server of a few hundred series, whose queries get little memory."""
    with ServerProcess(folder, "--rate-limit", "0", "--query-memory", "96MB") as started:
        now_s = time.time()
        push(started.port, (
            ({"__name__": name, "h": "x" * 24 + str(n), "i": str(n)}, n, now_s - 60)
            for name in "xa" for n in range(400)
        ))  # fmt: skip
        push(started.port, (
            ({"__name__": "long", "l": "ab." * 333 + str(n)}, 1, now_s - 60) for n in range(60)
        ))  # fmt: skip
        started.wait_for_store()
        yield started


@at_once()
def test_no_query_stops_ingestion_or_outlives_its_time_out(tmp_path):
    """Six at a time; each wait for an answer is bounded by the client's ten seconds."""

    def ask(query: str) -> Answer:
        with contextlib.closing(Client(started.port)) as client:
            form = form_of(query=query, timeout="1")
            return client.ask("POST", "/api/v1/query", form, Content_Type=FORM)

    with of_few_hundred_series(tmp_path) as started, ThreadPoolExecutor(6) as pool:
        for first in range(0, len(ATTACKS), 6):
            queries = ATTACKS[first : first + 6]
            answers = [pool.submit(ask, query) for query in queries]
            with contextlib.closing(Client(started.port)) as client:
                while wait(answers, 0.01).not_done:
                    assert client.ask("POST", "/metrics", BATCH).status == 200
                    assert client.ask("GET", "/health").status == 200
            for query, answer in zip(queries, answers):
                assert answer.result().status in (200, 400, 422, 503), (query[:60], answer.result())
                json.loads(answer.result().body.decode())
            assert asked(started, "query", query="count(x)", time=time.time() - 30)[0] == 200


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with of_few_hundred_series(tmp_path_factory.mktemp("attacked")) as started:
        yield started


@pytest.mark.parametrize("path", ["series", "labels", "label/h/values"])
def test_lists_of_series_are_bounded_by_their_time_out(attacked, path):
    matchers = ["{h=~'(.|x)*y'}", *(f"{{i!='',h!='{n}'}}" for n in range(100))]
    status, _ = asked(attacked, path, **{"match[]": matchers, "timeout": "5"})
    assert status in (200, 503)


def test_a_query_that_takes_too_much_memory_ends_with_prometheus_sentence(attacked):
    query = 'count(label_join(a, "z", "' + "s" * 9_000 + '", ' + ", ".join(['"i"'] * 60) + "))"
    status, answer = asked(attacked, "query", "POST", query=query, time=time.time() - 30)
    reason = "query processing would load too many samples into memory in query execution"
    assert (status, answer["errorType"], answer["error"]) == (422, "execution", reason)


@at_once()
def test_more_queries_than_may_wait_are_refused_and_the_rest_times_out_in_the_queue(tmp_path):
    """The time-out counts from the arrival, waiting included."""
    with of_few_hundred_series(tmp_path) as attacked:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(contextlib.closing(Client(attacked.port))) for _ in range(90)]
            form = form_of(query=HEAVY, timeout="1")
            for client in clients:
                client.request("POST", "/api/v1/query", form, {"Content-Type": FORM})
            reasons: Counter[str] = Counter()
            for client in clients:
                response = client.getresponse()
                assert response.status == 503 and response.getheader("Retry-After") == "1"
                reasons[json.loads(response.read())["error"]] += 1
        assert reasons["query timed out in query queue"] > 30
        assert reasons["64 queries wait already"] > 10
        assert asked(attacked, "query", query="count(x)", time=time.time() - 30)[0] == 200


@at_once()
def test_queries_that_nobody_waits_for_any_more_are_ended(tmp_path):
    with of_few_hundred_series(tmp_path) as attacked:
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                client = stack.enter_context(contextlib.closing(Client(attacked.port)))
                form = form_of(query=HEAVY, timeout="60")
                client.request("POST", "/api/v1/query", form, {"Content-Type": FORM})
            eventually(lambda: len(children_of(attacked.process.pid)) > 2)  # some run
        eventually(lambda: len(children_of(attacked.process.pid)) == 1)  # the store alone
        status, answer = asked(attacked, "query", query="max_over_time(vector(1)[9h:1s])", timeout="8")
        assert status == 200 and answer["data"]["result"]


@at_once()
def test_an_answer_that_nobody_reads_takes_little_of_the_front(tmp_path):
    """Answers of 8 MB leave the store in pieces, as their clients take them."""
    with of_few_hundred_series(tmp_path) as attacked:
        front = attacked.process.pid

        def resident_bytes() -> int:
            pages = int(Path(f"/proc/{front}/statm").read_text().split()[1])
            return pages * resource.getpagesize()

        before = resident_bytes()
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(attacked.port)) for _ in range(4)]
            target = urllib.parse.urlencode({"query": "vector(1)[400s:1ms]", "timeout": "60"})
            for connection in connections:
                connection.sendall(get(f"/api/v1/query?{target}".encode()))
            eventually(lambda: any(connection.recv(12, socket.MSG_DONTWAIT | socket.MSG_PEEK)
                                   for connection in connections if readable(connection)), 30)  # fmt: skip
            assert resident_bytes() - before < 8 << 20
            # who waits behind those that do not read is served all the same
            query = "count_over_time(vector(1)[9h:1s])"
            status, answer = asked(attacked, "query", query=query, timeout="25")
            assert status == 200 and answer["data"]["result"]


def test_fuzzed_queries_and_parameters_are_never_a_fault(attacked):
    """Pieces of queries put together at random; the soak asks ten thousand."""
    rng = random.Random(int(os.environ.get("METRICSTREAM_SEED", "1")))
    number = scaled(1_000, 10_000)
    pieces = [query for query, _, _ in REFUSED if len(query) < 60] + list(ANSWERS)
    words = [
        *"()[]{},:+-*/%^@#", "==", "=~", "!~", "<=", "bool", "and", "or", "unless", "on", "by", "without",
        "group_left", "ignoring", "offset", "1", "5m", "1e308", "-1", "0x7f", "NaN", "Inf", "1e999",
        "99999999999999999999", "0s", "300y", '"a"', "'('", "`x`", '"\\xff"', '"\\ud800"', "x", "long", "sum",
        "rate", "topk", "label_replace", "count_values", "start()", "end()", "é", "\x00", "__name__", "le",
        "quantile_over_time(0.5,", "absent(", "[5m:1ms]", "[1y:1s]", "histogram_quantile(",
    ]  # fmt: skip
    numbers = ["", "0", "-1", "1e308", "1e999", "NaN", "Inf", "5m", "300y", "1_0", "x", "\x00", "\ud800",
               "2025-09-17T13:45:23Z", "9223372036854775807", "-9223372036854775808", "0x10", "60"]  # fmt: skip

    def query() -> str:
        text = rng.choice(pieces)
        for _ in range(rng.randrange(4)):
            start = rng.randrange(len(text) + 1)
            end = start if rng.random() < 0.6 else rng.randrange(start, len(text) + 1)
            middle = rng.choice(words) if rng.random() < 0.7 else rng.choice(pieces)
            text = text[:start] + middle + text[end:]
        return text

    with contextlib.closing(Client(attacked.port)) as client:
        for _ in range(number):
            path = rng.choice(["query", "query", "query_range", "format_query", "series", "labels"])
            form = {"query": query(), "match[]": query(), "timeout": "0.5"}
            for name in ("time", "start", "end", "step", "limit", "timeout", "lookback_delta"):
                if rng.random() < (0.8 if name in ("start", "end", "step") else 0.1):
                    form[name] = rng.choice(numbers)
            body = urllib.parse.urlencode(form, errors="replace").encode()
            answer = client.ask("POST", f"/api/v1/{path}", body, Content_Type=FORM)
            assert answer.status in (200, 400, 422, 503), (path, form, answer)
            json.loads(answer.body.decode())


@at_once()
def test_kill_9_of_the_store_costs_queries_a_replay_and_ingestion_nothing(tmp_path):
    with ServerProcess(tmp_path, "--rate-limit", "0") as started:
        writers = Writers(started.port, "w", count=2)
        rng = random.Random(1)
        kills = scaled(2, 10)  # after each the store begins later
        for _ in range(kills):
            started.wait_for_store()
            (store,) = eventually(lambda: children_of(started.process.pid))  # type: ignore[misc]
            wanted = len(writers.acknowledged) + rng.randrange(200)
            eventually(lambda: len(writers.acknowledged) > wanted)
            os.kill(store, signal.SIGKILL)
            eventually(lambda: not is_alive(store))
            before = len(writers.acknowledged)
            eventually(lambda: len(writers.acknowledged) > before)
            started.store_is_ready = False
        writers.stop()
        assert set(writers.statuses) == {200}
        query = 'count(count by (__name__) ({__name__=~".+"}))'
        wanted_names = len({json.loads(line)["name"] for line in lines_of(tmp_path)})

        def names() -> int:
            status, answer = asked(started, "query", query=query)
            return int(answer["data"]["result"][0]["value"][1]) if status == 200 else 0

        eventually(lambda: names() >= wanted_names)
        with contextlib.closing(Client(started.port)) as client:
            assert client.ask("GET", "/metrics").json["store_restarts_total"] >= kills
        assert started.stop()[0] == 0


@at_once()
def test_kill_9_of_the_front_leaves_no_process_behind(tmp_path):
    with ServerProcess(tmp_path, "--rate-limit", "0") as started:
        started.wait_for_store()
        with contextlib.closing(Client(started.port)) as client:
            form = form_of(query=HEAVY, timeout="60")
            client.request("POST", "/api/v1/query", form, {"Content-Type": FORM})
            eventually(lambda: len(children_of(started.process.pid)) == 2)
            pids = children_of(started.process.pid)
            started.process.kill()
            started.process.wait(10)
        eventually(lambda: not any(map(is_alive, pids)))


@at_once()
def test_the_servers_own_statistics_are_series(tmp_path):
    with ServerProcess(tmp_path, "--self-metrics", "1") as started:
        with contextlib.closing(Client(started.port)) as client:
            assert client.ask("POST", "/metrics", BATCH).status == 200
        query = "metricstream_metrics_received_total"
        answer = eventually(lambda: asked(started, "query", query=query)[1]["data"]["result"])
        assert answer[0]["metric"] == {"__name__": query}
        assert started.stop()[0] == 0
    # they are in no log: a block keeps them
    matcher, budget = Matcher("__name__", "=", query), metricstream.Budget()
    assert list(opened(tmp_path).select([matcher], 0, 2**62, budget))


@at_once()
def test_a_batch_of_new_series_is_refused_while_there_is_no_room(tmp_path):
    with ServerProcess(tmp_path, "--max-series", "3", "--self-metrics", "0") as started:
        with contextlib.closing(Client(started.port)) as client:

            def push(*names: str) -> Answer:
                metrics = [{"name": name, "value": 1} for name in names]
                return client.ask("POST", "/metrics", {"metrics": metrics})

            def series_in_memory() -> int:
                return client.ask("GET", "/metrics").json["series_in_memory"]

            assert push("a", "b").status == 200
            eventually(lambda: series_in_memory() == 2)
            assert push("a", "b").status == push("c").status == 200
            eventually(lambda: series_in_memory() == 3)
            assert push("a", "b").status == push("c").status == 200
            refused = push("d")
            assert refused.status == 400 and "--max-series is 3" in refused.json["error"]
        log = (tmp_path / "metrics.jsonl").read_text()
        assert log.count("\n") == 8 and '"d"' not in log


# ==================================================================================================
# PART IV. WATCHING
# ==================================================================================================


# ==================================================================================================
# Alerting
# ==================================================================================================


def rule_file_of(text: str, name: str = "rules.yml") -> metricstream.RuleFile:
    return metricstream.read_rules(text, name, metricstream.rule_template)


class WatchedGroup:
    """A group of rules over series in memory. Its clock is what a test says."""

    def __init__(self, rules: str, fields: str = "", **context: Any) -> None:
        self.file = rule_file_of(f"groups: [{{name: g, {fields} rules: [{rules}]}}]")
        self.context = metricstream.RuleContext(**context)
        self.memory = metricstream.MemorySeries()
        self.query = metricstream.engine_query(Engine(self.memory.select))
        self.recorded: list[metricstream.Recorded] = []  # at the last evaluation
        self.told: list[list[metricstream.Alert]] = []  # for each evaluation of a rule
        self.start()

    def start(self) -> None:
        """Begin as a process does that has just been started."""
        self.group = metricstream.GroupState(self.file.groups[0], "rules.yml", self.context)

    def restart(self, now: float) -> None:
        """Crash, and start with what stood in the file."""
        kept = json.loads(json.dumps(self.group.state()))
        self.start()
        self.group.restore(kept, now)
        assert not kept

    def put(self, at: float, value: float | None, **labels: str) -> None:
        """Store a sample of the metric `m`."""
        number = self.memory.number({"__name__": "m", **labels})
        ended = metricstream.STALE if value is None else value
        self.memory.append(number, round(at * 1000), ended)

    def evaluate(self, at: float) -> None:
        self.recorded.clear()

        async def record(samples: list[metricstream.Recorded]) -> None:
            self.recorded += samples
            await self.memory.record(samples)

        metricstream._at_once(self.group.evaluate(at, self.query, record, self.told.append))

    @property
    def alerts(self) -> list[metricstream.ActiveAlert]:
        return [alert for rule in self.group.alerting for alert in rule.alerts.values()]

    def states(self) -> str:
        """The first letters of the states, in the order of the labels."""
        alerts = sorted(self.alerts, key=lambda alert: sorted(alert.labels.items()))
        return "".join(alert.state[0] for alert in alerts) or "-"


# Once a minute there is a sample of `m`, or none; then the rule is evaluated. Its states: pending,
# firing, inactive (it is resolved, and kept for a while), - (nothing is known of it).
STATES = [
    ("it fires at once without 'for'", "", "0 1 1 0 0", "- f f i i"),
    ("it is pending before it fires", "for: 2m", "0 1 1 1 1", "- p p f f"),
    ("what was only pending is forgotten", "for: 2m", "1 1 0 1 1 1", "p p - p p f"),
    ("a series without samples is no alert", "for: 1m", "1 1 stale _ _", "p f i i i"),
    ("it goes on firing for a while", "keep_firing_for: 2m", "1 0 0 0 0", "f f f i i"),
    ("a match in between extends that", "keep_firing_for: 2m", "1 0 1 0 0 0", "f f f f f i"),
    ("what is pending is not kept", "for: 2m, keep_firing_for: 5m", "1 0 0", "p - -"),
    ("a resolved alert begins anew", "for: 1m", "1 1 0 1 1", "p f i p f"),
    ("and fires at once without 'for'", "", "1 0 1 0", "f i f i"),
    ("a resolved alert is kept for 15 minutes", "", "1" + " 0" * 18, "f " + "i " * 16 + "- -"),
    ("an offset looks at what was", "", "0 1 0 0", "- f i i"),
]


@pytest.mark.parametrize(("fields", "values", "states"), [row[1:] for row in STATES],
                         ids=[row[0] for row in STATES])  # fmt: skip
def test_an_alert_goes_from_state_to_state(fields, values, states):
    group = WatchedGroup(f"{{alert: A, expr: m == 1, {fields}}}")
    seen = []
    for minute, value in enumerate(metricstream.series_values(values)):
        if value is not None:
            group.put(minute * 60, value)
        group.evaluate(minute * 60)
        seen.append(group.states())
    assert seen == states.split()


@pytest.mark.parametrize("interval", ["15s", "7s", "333ms", "1m"])
def test_for_ends_with_the_evaluation_that_is_due_then(interval):
    # times of evaluations are floats of seconds, whose differences are a little less or more
    group = WatchedGroup("{alert: A, expr: vector(1), for: 10s}", f"interval: {interval},")
    step_ms = metricstream.parse_duration_ms(interval)
    at = group.group.next_time(1_764_000_000.123)
    for number in range(40):
        group.evaluate(at)
        assert group.states() == ("f" if number * step_ms >= 10_000 else "p"), number
        assert group.recorded[0].time_ms % step_ms == group.group._offset_ms
        after = group.group.next_time(at)
        assert round((after - at) * 1000) == step_ms
        at = after


def test_groups_are_spread_over_their_interval():
    offsets = set()
    for number in range(100):
        group = metricstream.RuleGroup(f"g{number}", 60_000, 0, 0, {}, ())
        at = metricstream.GroupState(group, "f", metricstream.RuleContext()).next_time(0.0)
        assert 0 < at <= 60 and at == metricstream.GroupState(
            group, "f", metricstream.RuleContext()
        ).next_time(at - 0.001)
        offsets.add(at // 6)
    assert len(offsets) == 10


def test_what_an_alert_records():
    group = WatchedGroup("{alert: A, expr: m > 0, for: 1m, labels: {team: x}}")
    seen = []
    for minute, value in enumerate([3, 3, 0, None]):
        group.put(minute * 60 + 0.5, value, host="a")
        group.evaluate(minute * 60 + 0.5)
        seen.append([(s.labels["__name__"], s.labels.get("alertstate"), s.value, s.time_ms)
                     for s in group.recorded])  # fmt: skip
        for sample in group.recorded:
            assert (sample.labels["alertname"], sample.labels["team"]) == ("A", "x")
            assert sample.labels["host"] == "a"
    assert seen == [
        [("ALERTS", "pending", 1.0, 500), ("ALERTS_FOR_STATE", None, 0.0, 500)],
        [("ALERTS", "firing", 1.0, 60_500), ("ALERTS_FOR_STATE", None, 0.0, 60_500),
         ("ALERTS", "pending", None, 60_500)],
        [("ALERTS", "firing", None, 120_500), ("ALERTS_FOR_STATE", None, None, 120_500)],
        [],
    ]  # fmt: skip


def test_series_that_a_rule_no_longer_gives_end():
    group = WatchedGroup("{record: r, expr: m * 2, labels: {a: '', b: x}}", "query_offset: 10s,")
    group.put(0, 1, a="1", host="a")
    group.put(0, 2, a="2", host="b")
    group.evaluate(10)
    a, b = ({"__name__": "r", "b": "x", "host": host} for host in "ab")
    assert group.recorded == [(a, 2.0, 0), (b, 4.0, 0)]
    group.put(60, None, a="2", host="b")
    group.evaluate(70)
    assert group.recorded == [(a, 2.0, 60_000), (b, None, 60_000)]
    assert group.group.end_series(99) == [(a, None, 99)]


def test_a_rule_sees_what_those_before_it_recorded():
    group = WatchedGroup("{record: r, expr: m + 1}, {record: s, expr: r + 1}, {alert: A, expr: s}, "
                         '{alert: B, expr: \'ALERTS{alertname="A"}\'}')  # fmt: skip
    group.put(0, 1)
    group.evaluate(0)
    assert [alert.value for alert in group.alerts] == [3, 1]
    assert group.alerts[1].labels == {"alertname": "B", "alertstate": "firing"}


LABELS = [
    ("the series' own", "", "", {"l": "series"}),
    ("of the group before the series'", "labels: {l: group},", "", {"l": "group"}),
    ("of the rule before the group's", "labels: {l: group},", "labels: {l: rule}", {"l": "rule"}),
    ("the alert's name before all", "labels: {alertname: B},", "labels: {alertname: C}",
     {"l": "series"}),
    ("an empty one takes it away", "labels: {l: x, g: h},", "labels: {l: '', g: ''}", {}),
    ("a template sees the series", "", "labels: {l: '{{ $labels.l }}/{{ $labels.__name__ }}'}",
     {"l": "series/m"}),
    ("a template of the group", "labels: {l: '{{ $value }}'},", "", {"l": "7"}),
    ("a template that fails", "", "labels: {l: '{{ index $labels 1 }}'}",
     {"l": "<error expanding template: error executing template __alert_A: template: __alert_A:1:"
           "115: executing \"__alert_A\" at <index $labels 1>: error calling index: value has type "
           "int; should be string>"}),
]  # fmt: skip


@pytest.mark.parametrize(("of_group", "of_rule", "expected"), [row[1:] for row in LABELS],
                         ids=[row[0] for row in LABELS])  # fmt: skip
def test_labels_of_an_alert(of_group, of_rule, expected):
    group = WatchedGroup(f"{{alert: A, expr: m, {of_rule}}}", of_group)
    group.put(0, 7, l="series")
    group.evaluate(0)
    assert group.alerts[0].labels == {"alertname": "A"} | expected
    assert group.alerts[0].series == {"l": "series"}


def test_annotations_follow_the_value_and_templates_may_query():
    group = WatchedGroup(
        "{alert: A, expr: 'm{host!=\"z\"} > 0', annotations: {"
        "summary: '{{ $value }} of {{ $labels.host }} {{ $externalLabels.dc }} {{ $externalURL }}',"
        "first: '{{ with query \"m{host=\\\"z\\\"}\" }}{{ . | first | value }}{{ end }}',"
        "nested: '{{ range query \"m\" }}{{ range query (printf \"m{host=%q}\" .Labels.host) }}"
        "{{ .Value }} {{ end }}{{ end }}',"
        "wrong: '{{ query \"m +\" }}'}}",
        external_labels={"dc": "eu"}, external_url="http://x/y",
    )  # fmt: skip
    for host, value in (("a", 1), ("b", 2), ("z", 9)):
        group.put(0, value, host=host)
    group.evaluate(0)
    one, two = group.alerts
    assert one.annotations["summary"] == "1 of a eu http://x/y"
    assert one.annotations["first"] == "9" and one.annotations["nested"] == "1 2 9 "
    assert one.annotations["wrong"].startswith("<error expanding template: error executing")
    assert "found the end of the query" in one.annotations["wrong"]
    assert two.annotations["summary"] == "2 of b eu http://x/y"
    group.put(60, 5, host="a")
    group.evaluate(60)
    assert group.alerts[0].annotations["summary"] == "5 of a eu http://x/y"


def test_a_template_asks_a_bounded_number_of_times():
    nested = "{{ $n := query \"m\" }}" + "".join(
        f"{{{{ range $n }}}}{{{{ $n = query (printf \"m + %v + {depth}\" .Value) }}}}{{{{ end }}}}"
        for depth in range(8)
    )  # fmt: skip
    group = WatchedGroup(f"{{alert: A, expr: m, annotations: {{a: {json.dumps(nested)}}}}}")
    group.put(0, 1)
    group.evaluate(0)
    assert group.alerts[0].annotations["a"].endswith("nested more than 5 deep>")


FAILURES = [
    ("labels that become the same", "{alert: A, expr: m, labels: {host: x}}",
     "vector contains metrics with the same labelset after applying alert labels"),
    ("recorded labels that become the same", "{record: r, expr: m, labels: {host: x}}",
     "vector contains metrics with the same labelset after applying rule labels"),
    ("too many alerts", "{alert: A, expr: m, for: 1h}", "exceeded limit of 2 with 3 alerts"),
    ("too many series", "{record: r, expr: m}", "exceeded limit of 2 with 3 series"),
    ("a query that fails", "{alert: A, expr: m + on() m}", "many-to-many"),
    ("a string", "{record: r, expr: '\"text\"'}", "rule result is not a vector or scalar"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "reason"), [row[1:] for row in FAILURES],
                         ids=[row[0] for row in FAILURES])  # fmt: skip
def test_rules_that_fail(rule, reason):
    group = WatchedGroup(f"{rule}, {{record: after, expr: vector(1)}}", "limit: 2,")
    for host in "abc":
        group.put(0, 1, host=host)
    group.evaluate(0)
    failed, after = group.group.rules
    assert (failed.health, group.group.failures, group.group.evaluations) == ("err", 1, 2)
    assert reason in failed.last_error
    assert (after.health, group.alerts) == ("ok", [])
    assert [sample.labels for sample in group.recorded] == [{"__name__": "after"}]


def test_a_failed_evaluation_leaves_the_state_alone():
    expression = 'm{host="a"} + on() m{host=~"z.*"} > 0'
    group = WatchedGroup(f"{{alert: A, expr: '{expression}', for: 2m}}")
    group.put(0, 1, host="a")
    group.put(0, 0, host="z1")
    for minute in range(5):
        if minute == 1:
            group.put(60, 0, host="z2")  # many-to-many from now on
        if minute == 3:
            group.put(180, None, host="z2")
        group.evaluate(minute * 60)
        assert group.group.rules[0].health == ("err" if minute in (1, 2) else "ok")
        assert group.states() == ("p" if minute < 3 else "f")
        if minute in (1, 2):
            assert group.recorded == []
    assert [len(alerts) for alerts in group.told] == [0, 0, 0, 1, 1]


def test_more_alerts_than_the_limit_are_all_forgotten():
    group = WatchedGroup("{alert: A, expr: m > 0}", "limit: 2,")
    group.put(0, 1, host="a")
    group.put(0, 1, host="b")
    group.evaluate(0)
    group.put(60, 1, host="c")
    group.evaluate(60)
    assert group.states() == "-" and group.group.rules[0].health == "err"


def test_who_is_told_when():
    group = WatchedGroup(
        "{alert: A, expr: m > 5, for: 20s, labels: {a: b}}", "interval: 10s,",
        external_labels={"dc": "eu", "a": "c"}, external_url="http://x",
    )  # fmt: skip
    told = {}
    for at in range(0, 300, 10):
        group.put(at, 9 if at < 150 else 2, host="h")
        group.evaluate(at)
        if group.told[-1]:
            (told[at],) = group.told[-1]
    # it fires at 20; again each minute; at once when it is resolved
    assert list(told) == [20, 80, 140, 150, 210, 270]
    for at, alert in told.items():
        assert alert.labels == {"alertname": "A", "host": "h", "dc": "eu", "a": "b"}
        assert (alert.starts_at, alert.updated_at) == (20, at)
        # valid for two failures to come, or over
        assert alert.ends_at == (at + 240 if at < 150 else 150)
        assert alert.generator_url == "http://x/graph?g0.expr=m+%3E+5&g0.tab=1"
    assert told[140].annotations == {}
    assert told[150].annotations == {"firing_value": "9", "resolved_value": "2"}


RESOLVED_VALUES = [
    ("a comparison", "m > 5", "2"),
    ("the right side of a condition is left out", "(m > 5) and on() vector(1)", "2"),
    ("arithmetic", "m / 4 > bool 1 == 1", "0.5"),
    ("nothing is compared", "m / (m > 5)", "no value"),
    ("alternatives", "m > 5 or m > 6", "no value"),
]


@pytest.mark.parametrize(("expression", "value"), [row[1:] for row in RESOLVED_VALUES],
                         ids=[row[0] for row in RESOLVED_VALUES])  # fmt: skip
def test_a_resolved_alert_says_at_which_value(expression, value):
    group = WatchedGroup(f"{{alert: A, expr: {expression}, annotations: {{firing_value: own}}}}")
    group.put(0, 8, host="h")
    group.evaluate(0)
    group.put(60, 2, host="h")
    group.evaluate(60)
    (alert,) = group.told[-1]
    assert alert.annotations == {"firing_value": "own", "resolved_value": value}


def test_a_clock_that_is_set_back_stops_no_timer():
    group = WatchedGroup("{alert: A, expr: m > 0, for: 1m, keep_firing_for: 1m}")
    seen = []
    for at, value in ((10_000, 1), (400, 1), (460, 1), (470, 0)):
        group.memory = metricstream.MemorySeries()
        group.query = metricstream.engine_query(Engine(group.memory.select))
        group.put(at, value)
        group.evaluate(at)
        seen.append(group.states())
    assert seen == ["p", "p", "f", "f"]
    group.evaluate(300)  # while it is kept firing
    group.evaluate(360)
    assert group.states() == "i" and group.alerts[0].resolved_at == 360
    assert [len(alerts) for alerts in group.told] == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(("gap_s", "state", "active_at"), [
    pytest.param(3600, "f", 0, id="an hour: its time went on"),
    pytest.param(3601, "p", 3601, id="longer: it begins anew"),
])  # fmt: skip
def test_pending_alerts_after_a_time_without_evaluation(gap_s, state, active_at, caplog):
    group = WatchedGroup("{alert: A, expr: vector(1), for: 10m}")
    group.evaluate(0)
    group.restart(gap_s - 5)
    group.restart(gap_s)  # a crash before anything was evaluated
    group.evaluate(gap_s)
    assert group.states() == state and group.alerts[0].active_at == active_at
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if state == "f" else [
        "rule A: no evaluation for 3601 s: 1 pending alerts start again"
    ])  # fmt: skip


def test_alerts_of_rules_with_one_name_are_kept_apart():
    rules = [f"{{alert: A, expr: m == {number}, labels: {{n: {label}}}}}"
             for number, label in ((1, "x"), (2, "x"), (3, "y"))]  # fmt: skip
    group = WatchedGroup(", ".join(rules))
    for number in (1, 2, 3):
        group.put(0, number, host=str(number))
    group.evaluate(0)
    before = [list(rule.alerts) for rule in group.group.alerting]
    assert all(before) and len(group.group.state()) == 3
    group.restart(1)
    assert [list(rule.alerts) for rule in group.group.alerting] == before
    kept = group.group.state()
    other = WatchedGroup(f"{rules[2]}, {{alert: B, expr: m}}")
    other.group.restore(kept, 2)
    assert len(kept) == 2 and len(other.alerts) == 1  # those of the rules that are gone


@pytest.mark.parametrize("seed", range(40))
def test_a_restart_at_any_time_changes_nothing(seed):
    """Property: with crashes between evaluations, what is told, recorded and known is the same."""
    chance = random.Random(seed)
    rules = ("{alert: A, expr: m > 3, for: 2m, annotations: {v: '{{ $value }}'}}, "
             "{alert: B, expr: 'm{host!=\"c\"} > 6', keep_firing_for: 3m}, "
             "{alert: B, expr: m % 5 == 0, for: 1m, keep_firing_for: 1m, labels: {l: '{{ $value }}'"
             "}}, {alert: C, expr: 'm + on() m{host=~\"a|b\"}', for: 1m}")  # fmt: skip
    steady, crashing = WatchedGroup(rules), WatchedGroup(rules)
    at = 1_764_000_000.0
    for _ in range(60):
        at += chance.choice([1, 15, 60, 60, 60, 60, 300, 3000])
        for host in "abc":
            if chance.random() < 0.7:
                value = chance.choice([0, 1, 4, 5, 7, 9.5, 10, math.inf, math.nan, None])
                for group in (steady, crashing):
                    group.put(at, value, host=host)
        for _ in range(chance.choice([0, 0, 1, 2])):
            crashing.restart(at - chance.random())
        # the clock of evaluations may be set back
        now = at - chance.choice([0, 0, 0, 0, 30, 400])
        for group in (steady, crashing):
            group.evaluate(now)
        assert repr(crashing.group.state()) == repr(steady.group.state())
        assert crashing.told[-4:] == steady.told[-4:]
        assert repr(crashing.recorded) == repr(steady.recorded)


def shape_of(value: object) -> object:
    """JSON without what differs from run to run: the types of numbers and times, all keys."""
    if isinstance(value, dict):
        return {key: shape_of(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape_of(part) for part in value]
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", value):
        return "time"
    return "number" if isinstance(value, float) else value


RULES_OF_THE_API = """
groups:
- name: b
  interval: 1s
  limit: 5
  rules:
  - {record: "r:one", expr: vector(7)}
  - {record: "r:bad", expr: m + on() m, labels: {team: x}}
- name: a
  interval: 1s
  rules:
  - alert: Firing
    expr: |
      vector(1)
        > 0
    keep_firing_for: 5m
    labels: {severity: page}
    annotations: {summary: "{{ $value }}"}
  - {alert: Pending, expr: vector(1234567.5), for: 1h}
  - {alert: Inactive, expr: vector(0) > 1}
"""

# As Prometheus 2.42 answers; the labels of recording rules and the numbers of queries are as in 3.
GROUPS_OF_THE_API = [
    {
        "name": "a", "file": "rules.yml", "interval": "number", "limit": 0,
        "evaluationTime": "number", "lastEvaluation": "time",
        "rules": [
            {
                "state": "firing", "name": "Firing", "query": "vector(1) > 0",
                "duration": "number", "keepFiringFor": "number", "labels": {"severity": "page"},
                "annotations": {"summary": "{{ $value }}"},
                "alerts": [{
                    "labels": {"alertname": "Firing", "severity": "page"},
                    "annotations": {"summary": "1"}, "state": "firing", "activeAt": "time",
                    "value": "1e+00",
                }],
                "health": "ok", "evaluationTime": "number", "lastEvaluation": "time",
                "type": "alerting",
            },
            {
                "state": "pending", "name": "Pending", "query": "vector(1234567.5)",
                "duration": "number", "keepFiringFor": "number", "labels": {}, "annotations": {},
                "alerts": [{
                    "labels": {"alertname": "Pending"}, "annotations": {}, "state": "pending",
                    "activeAt": "time", "value": "1.2345675e+06",
                }],
                "health": "ok", "evaluationTime": "number", "lastEvaluation": "time",
                "type": "alerting",
            },
            {
                "state": "inactive", "name": "Inactive", "query": "vector(0) > 1",
                "duration": "number", "keepFiringFor": "number", "labels": {}, "annotations": {},
                "alerts": [], "health": "ok", "evaluationTime": "number",
                "lastEvaluation": "time", "type": "alerting",
            },
        ],
    },
    {
        "name": "b", "file": "rules.yml", "interval": "number", "limit": 5,
        "evaluationTime": "number", "lastEvaluation": "time",
        "rules": [
            {
                "name": "r:one", "query": "vector(7)", "labels": {}, "health": "ok",
                "evaluationTime": "number", "lastEvaluation": "time", "type": "recording",
            },
            {
                "name": "r:bad", "query": "m + on () m", "labels": {"team": "x"}, "health": "err",
                "lastError": "found duplicate series for the match group {} on the right hand-side "
                "of the operation: [{__name__=\"m\", host=\"b\"}, {__name__=\"m\", host=\"a\"}];"
                "many-to-many matching not allowed: matching labels must be unique on one side",
                "evaluationTime": "number", "lastEvaluation": "time", "type": "recording",
            },
        ],
    },
]  # fmt: skip


def groups_of_the_api() -> list[metricstream.GroupState]:
    context = metricstream.RuleContext()
    groups = [metricstream.GroupState(group, "rules.yml", context)
              for group in rule_file_of(RULES_OF_THE_API).groups]  # fmt: skip
    watched = WatchedGroup("")
    watched.put(0, 1, host="a")
    watched.put(0, 1, host="b")
    for watched.group in groups:
        watched.evaluate(1.5)
    return groups


def test_rules_and_alerts_are_shown_as_prometheus_shows_them():
    groups = groups_of_the_api()
    shown = metricstream.rules_json(groups, {})
    assert shape_of(shown) == {"groups": GROUPS_OF_THE_API}
    assert metricstream.parse_json(metricstream.write_json(shown).encode()) == shown
    alerts = metricstream.alerts_json(groups)
    assert alerts == [alert for rule in shown["groups"][0]["rules"] for alert in rule["alerts"]]
    assert alerts[0]["activeAt"] == "1970-01-01T00:00:01.500Z"


def test_a_rule_that_was_not_evaluated_yet():
    groups = [WatchedGroup("{record: r, expr: m}").group]
    (group,) = metricstream.rules_json(groups, {})["groups"]
    assert group["lastEvaluation"] == "0001-01-01T00:00:00Z"
    assert group["rules"][0]["health"] == "unknown"


def test_an_alert_that_is_kept_firing_says_since_when():
    group = WatchedGroup("{alert: A, expr: m > 0, keep_firing_for: 5m}")
    group.put(0, 1)
    group.evaluate(0)
    group.put(60, 0)
    group.evaluate(60)
    (alert,) = metricstream.alerts_json([group.group])
    assert alert["keepFiringSince"] == "1970-01-01T00:01:00.000Z"


RULE_QUERIES = [
    ("all", "", "a: Firing Pending Inactive; b: r:one r:bad"),
    ("alerts", "type=alert", "a: Firing Pending Inactive"),
    ("recording rules", "type=record", "b: r:one r:bad"),
    ("upper case", "type=ALERT", "a: Firing Pending Inactive"),
    ("names", "rule_name[]=Firing&rule_name[]=r:bad", "a: Firing; b: r:bad"),
    ("an unknown name", "rule_name[]=x", ""),
    ("groups", "rule_group[]=b&rule_group[]=x", "b: r:one r:bad"),
    ("files", "file[]=rules.yml&file[]=x", "a: Firing Pending Inactive; b: r:one r:bad"),
    ("an unknown file", "file[]=x", ""),
    ("labels", 'match[]={severity="page"}', "a: Firing"),
    ("labels of one or the other", 'match[]={severity="page"}&match[]={team=~".%2B",x=""}',
     "a: Firing; b: r:bad"),
    ("everything at once", 'type=record&rule_name[]=r:bad&match[]={team="x"}&file[]=rules.yml',
     "b: r:bad"),
    ("a page", "group_limit=1", "a: Firing Pending Inactive"),
    ("a page of more than there are", "group_limit=7",
     "a: Firing Pending Inactive; b: r:one r:bad"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "expected"), [row[1:] for row in RULE_QUERIES],
                         ids=[row[0] for row in RULE_QUERIES])  # fmt: skip
def test_which_rules_are_asked_for(query, expected):
    shown = metricstream.rules_json(groups_of_the_api(), urllib.parse.parse_qs(query))
    found = (f"{group['name']}: {' '.join(rule['name'] for rule in group['rules'])}"
             for group in shown["groups"])  # fmt: skip
    assert "; ".join(found) == expected


def test_pages_of_groups():
    groups = groups_of_the_api()
    first = metricstream.rules_json(groups, {"group_limit": ["1"]})
    token = first["groupNextToken"]
    rest = metricstream.rules_json(groups, {"group_limit": ["1"], "group_next_token": [token]})
    assert [group["name"] for group in first["groups"] + rest["groups"]] == ["a", "b"]
    assert "groupNextToken" not in rest


@pytest.mark.parametrize(("given", "alerts"), [("true", None), ("1", None), ("T", None),
                                               ("false", []), ("", [])])  # fmt: skip
def test_alerts_may_be_left_out(given, alerts):
    form = {"exclude_alerts": [given], "rule_name[]": ["Inactive"]}
    (group,) = metricstream.rules_json(groups_of_the_api(), form)["groups"]
    assert group["rules"][0]["alerts"] == alerts


@pytest.mark.parametrize(("query", "reason"), [
    ("type=x", 'invalid parameter "type": not supported value "x"'),
    ("match[]=x{", "parse error"),
    ("match[]=sum(x)", "is not a selector"),
    ("match[]=x[5m]", "is not a selector"),
    ("exclude_alerts=maybe", "neither true nor false"),
    ("group_limit=0", "not a positive number"),
    ("group_limit=x", "not a positive number"),
    ("group_next_token=x", "group_limit needs to be set"),
    ("group_limit=1&group_next_token=x", "invalid group_next_token"),
])  # fmt: skip
def test_mistakes_in_what_is_asked_of_rules(query, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        metricstream.rules_json(groups_of_the_api(), urllib.parse.parse_qs(query))


# ==================================================================================================
# Rule tests
# ==================================================================================================


@pytest.fixture
def unit_tests(tmp_path, capsys):
    """Run `test-rules` over files with the given texts, tests.yml first; its outcome."""

    def run(tests: str, *arguments: str, **files: str) -> tuple[int, str, str]:
        for name, text in {"tests": tests, **files}.items():
            path = tmp_path / (name.replace("__", "/") + ".yml")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        limit = sys.getrecursionlimit()
        status = metricstream.test_rules_main([str(tmp_path / "tests.yml"), *arguments])
        sys.setrecursionlimit(limit)
        out, err = capsys.readouterr()
        return status, out, err.replace(f"{tmp_path}/", "")

    return run


SERIES_VALUES = [
    ("numbers", "1 -2.5 +3 .5 1e3 -1E-2", [1, -2.5, 3, 0.5, 1000, -0.01]),
    ("steps", "1+2x3 1-2x2", [1, 3, 5, 7, 1, -1, -3]),
    ("steps of a negative number", "-2+4x3 -1-1x1", [-2, 2, 6, 10, -1, -2]),
    ("one number again and again", "7x2 0x1", [7, 7, 7, 0, 0]),
    ("no hexadecimal numbers", "0x10", [0] * 11),
    ("steps are added, each to the one before", "0+0.1x3", [0, 0.1, 0.2, 0.1 + 0.1 + 0.1]),
    ("gaps", "_ 1 _x3 _x0 2", [None, 1, None, None, None, 2]),
    ("not finite", "Inf -inf +Inf NaN", [math.inf, -math.inf, math.inf, math.nan]),
    ("ends", "1 stale 2", [1, metricstream.STALE, 2]),
    ("white space", "  1   2\n3 ", [1, 2, 3]),
    ("nothing", "", []),
]


@pytest.mark.parametrize(("text", "values"), [row[1:] for row in SERIES_VALUES],
                         ids=[row[0] for row in SERIES_VALUES])  # fmt: skip
def test_the_notation_of_series(text, values):
    def bits(values: Sequence[float | None]) -> list[bytes]:
        return [b"" if value is None else struct.pack("<d", value) for value in values]

    assert bits(metricstream.series_values(text)) == bits(values)


@pytest.mark.parametrize("text", [
    "a", "1x", "x3", "1+x3", "1+2", "1+-2x3", "1 + 2x3", "_+1x3", "stalex3", "1x-3", "1,2", "0x1f",
    "1xfff", "1x9999999999", "1x9999999 1x9999999", "{{schema:1 sum:1}}x3", "0 {{}}", "1_000",
    "--1",
])  # fmt: skip
def test_what_is_no_notation_of_series(text):
    with pytest.raises(ValueError, match="native histograms" if "{{" in text else "value"):
        metricstream.series_values(text)


RULES_ON_TEST = """
groups:
- name: one
  rules:
  - {record: r, expr: sum(m)}
  - alert: High
    expr: m > 5
    for: 1m
    labels: {severity: page}
    annotations: {summary: "{{ $labels.host }} has {{ $value }}", where: "{{ $externalURL }}"}
- name: two
  rules:
  - {record: s, expr: r * 2}
  - {record: external, expr: m, labels: {dc: eu}}
"""

GOOD_TESTS = [
    ("an expression", "promql_expr_test: [{expr: 'm + 1', eval_time: 1m, exp_samples: "
     "[{labels: '{host=\"a\"}', value: 8}, {labels: '{host=\"b\"}', value: 2}]}]"),
    ("a recorded series", "promql_expr_test: [{expr: r, eval_time: 1m, exp_samples: "
     "[{labels: r, value: 8}]}]"),
    ("a group that sees another", "promql_expr_test: [{expr: s, eval_time: 1m, exp_samples: "
     "[{labels: 's{}', value: 16}]}]"),
    ("a scalar has no labels", "promql_expr_test: [{expr: 1 + 1, exp_samples: [{value: 2}]}]"),
    ("nothing is expected", "promql_expr_test: [{expr: x, eval_time: 1m, exp_samples: []}]"),
    ("values at the start", "promql_expr_test: [{expr: r, exp_samples: [{labels: r, value: 4}]}]"),
    ("between two evaluations", "promql_expr_test: [{expr: timestamp(r), eval_time: 1m59s, "
     "exp_samples: [{value: 60}]}]"),
    ("no future is seen", "promql_expr_test: [{expr: m offset -4m, eval_time: 1m, exp_samples: "
     "[{labels: 'm{host=\"a\"}', value: 7}, {labels: 'm{host=\"b\"}', value: 1}]}]"),
    ("a subquery's step is the interval", "promql_expr_test: [{expr: 'count_over_time(r[5m:])', "
     "eval_time: 5m, exp_samples: [{value: 5}]}]"),
    ("values that are not finite",
     "promql_expr_test: [{expr: r / 0, exp_samples: [{value: .inf}]}, {expr: 0 / 0, "
     "exp_samples: [{value: .NaN}]}, {expr: '16', exp_samples: [{value: 0x10}]}]"),
    ("tiny differences", "promql_expr_test: [{expr: r, exp_samples: [{labels: r, "
     "value: 4.000000001}]}]"),
    ("pending alerts do not count", "alert_rule_test: [{eval_time: 1m, alertname: High}]"),
    ("an alert", "alert_rule_test: [{eval_time: 2m, alertname: High, exp_alerts: [{exp_labels: "
     "{severity: page, host: a}, exp_annotations: {summary: a has 7, where: 'http://x'}}]}]"),
    ("between two evaluations the state stays", "alert_rule_test: [{eval_time: 2m30s, "
     "alertname: High, exp_alerts: [{exp_labels: {severity: page, host: a}, "
     "exp_annotations: {summary: a has 7, where: 'http://x'}}]}]"),
    ("an alert that nobody defined", "alert_rule_test: [{eval_time: 2m, alertname: Low}]"),
    ("the state is recorded", "promql_expr_test: [{expr: 'ALERTS{alertstate=\"pending\"}', "
     "eval_time: 1m, exp_samples: [{labels: 'ALERTS{alertname=\"High\",alertstate=\"pending\","
     "host=\"a\",severity=\"page\"}', value: 1}]}]"),
    ("a time to start at", "start_timestamp: 1000000\npromql_expr_test: [{expr: timestamp(r), "
     "eval_time: 1m, exp_samples: [{value: 1000060}]}, {expr: time(), exp_samples: "
     "[{value: 1000000}]}]"),
    ("a date to start at", "start_timestamp: 2026-01-02T03:04:05Z\npromql_expr_test: "
     "[{expr: hour(), exp_samples: [{value: 3}]}, {expr: 'r @ 1767323105', eval_time: 5m, "
     "exp_samples: [{labels: r, value: 8}]}]\nalert_rule_test: [{eval_time: 2m, alertname: High, "
     "exp_alerts: [{exp_labels: {severity: page, host: a}, exp_annotations: {summary: a has 7, "
     "where: 'http://x'}}]}]"),
    ("no tests", ""),
]  # fmt: skip

# What makes a test of the table above fail, as (pattern, replacement).
MUTATIONS = [
    (r"value: ([.\w]+)", "value: 99"), (r"summary: a has 7", "summary: a has 8"),
    (r"host: a", "host: b"), (r"exp_samples: \[\]", "exp_samples: [{value: 1}]"),
    (r"alertname: (High|Low)}", r"alertname: \1, exp_alerts: [{}]}"),
]  # fmt: skip


def with_rules(body: str, fields: str = "") -> str:
    return f"""
rule_files: [rules.yml]
{fields}
tests:
- name: the test
  input_series:
  - {{series: 'm{{host="a"}}', values: '3 7x9'}}
  - {{series: 'm{{host="b"}}', values: 1x9}}
  external_url: http://x
{textwrap.indent(body, "  ")}
"""


@pytest.mark.parametrize("body", [row[1] for row in GOOD_TESTS], ids=[row[0] for row in GOOD_TESTS])
def test_unit_tests_of_rules_succeed_and_with_another_expectation_fail(unit_tests, body):
    status, out, err = unit_tests(with_rules(body), rules=RULES_ON_TEST)
    assert (status, err) == (0, "") and out.endswith("tests.yml\n  SUCCESS\n\n")
    for pattern, replacement in MUTATIONS:
        if re.search(pattern, body):
            wrong = with_rules(re.sub(pattern, replacement, body, count=1))
            status, _, err = unit_tests(wrong, rules=RULES_ON_TEST)
            assert status == 1 and err.startswith("  FAILED:\n    name: the test,\n")


def test_a_failure_shows_what_was_expected_and_what_came(unit_tests):
    body = """promql_expr_test: [{expr: m, eval_time: 1m, exp_samples: [
      {labels: 'm{host="a"}', value: 8}, {labels: 'm{host="b"}', value: 1}]}]
alert_rule_test: [{eval_time: 2m, alertname: High, exp_alerts: [
      {exp_labels: {severity: page, host: a}, exp_annotations: {summary: a has 7}}]}]"""
    status, out, err = unit_tests(with_rules(body), rules=RULES_ON_TEST)
    assert (status, out.count("SUCCESS")) == (1, 0)
    assert err.splitlines() == [
        "  FAILED:",
        "    name: the test,",
        "    alertname: High, time: 2m",
        "      - expected, + got:",
        '        labels      {alertname="High", host="a", severity="page"}',
        "          summary: a has 7",
        "      +   where: http://x",
        "    name: the test,",
        "    expr: m, time: 1m",
        "      - expected, + got:",
        '      - {__name__="m", host="a"} 8',
        '      + {__name__="m", host="a"} 7',
        '        {__name__="m", host="b"} 1',
        "",
    ]


FUZZY = [
    ("", 4.000000001, 0), ("", 4.00000001, 1), ("fuzzy_compare: false", 4.000000001, 1),
    ("fuzzy_compare: false", 4.0, 0), ("fuzzy_compare: true", math.nextafter(4, 5), 0),
    ("fuzzy_compare: true", 4.000000000000003, 1), ("fuzzy_compare: True", 4.0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "status"), FUZZY)
def test_how_values_are_compared(unit_tests, field, value, status):
    body = f"promql_expr_test: [{{expr: r, exp_samples: [{{labels: r, value: {value!r}}}]}}]"
    assert unit_tests(with_rules(body, field), rules=RULES_ON_TEST)[0] == status


FAULTS = [
    ("not YAML", "tests: [", "tests.yml:1:9: "),
    ("an unknown field", "test: []", "tests.yml:1:1: unknown field 'test' in a file of tests"),
    ("an unknown field of a test", "tests:\n- intervall: 1m",
     "tests.yml:2:3: unknown field 'intervall' in a test; known are name, interval"),
    ("of a series", "tests: [{input_series: [{serie: m}]}]", "1:26: unknown field 'serie'"),
    ("of an alert", "tests: [{alert_rule_test: [{alertname: A, exp_alerts: [{labels: {}}]}]}]",
     "1:57: unknown field 'labels' in an alert"),
    ("of a sample", "tests: [{promql_expr_test: [{expr: m, exp_samples: [{values: 1}]}]}]",
     "1:54: unknown field 'values' in a sample"),
    ("a field twice", "tests: []\ntests: []", "tests.yml:2:1: "),
    ("a series", "tests:\n- input_series:\n  - series: m{\n", "tests.yml:3:13: "),
    ("a selector is no series", "tests: [{input_series: [{series: 'm{a!=\"b\"}'}]}]",
     "is no series: its labels are given with ="),
    ("an offset is no series", "tests: [{input_series: [{series: m offset 5m}]}]", "is no series"),
    ("a range is no series", "tests: [{input_series: [{series: 'm[5m]'}]}]", "is no series"),
    ("no name of a series", "tests: [{input_series: [{values: 1}]}]",
     "1:25: an input series needs"),
    ("values", "tests:\n- input_series:\n  - {series: m, values: 1 2 x3}\n",
     "tests.yml:3:25: 'x3' is no value of a series"),
    ("a native histogram", "tests: [{input_series: [{series: m, values: '{{sum:1}}'}]}]",
     "1:45: native histograms are not supported"),
    ("an expected histogram", "tests: [{promql_expr_test: [{expr: m, exp_samples: [{histogram: "
     "'{{}}'}]}]}]", "native histograms are not supported"),
    ("an expression", "tests:\n- promql_expr_test:\n  - expr: sum(m\n", "tests.yml:3:"),
    ("no expression", "tests: [{promql_expr_test: [{eval_time: 1m}]}]", "needs an expression"),
    ("labels of a sample", "tests: [{promql_expr_test: [{expr: m, exp_samples: [{labels: m{}]}]}]",
     "tests.yml:1:"),
    ("a value", "tests: [{promql_expr_test: [{expr: m, exp_samples: [{value: one}]}]}]",
     "1:61: 'one' is no number"),
    ("a value in quotes", "tests: [{promql_expr_test: [{expr: m, exp_samples: [{value: '1'}]}]}]",
     "1:61: 'value' must be a number, without quotes"),
    ("an infinite value without its point", "tests: [{promql_expr_test: [{expr: m, exp_samples: "
     "[{value: Inf}]}]}]", "'Inf' is no number"),
    ("two points", "tests: [{promql_expr_test: [{expr: m, exp_samples: [{value: 1.2.3}]}]}]",
     "'1.2.3'"),
    ("no name of an alert", "tests: [{alert_rule_test: [{eval_time: 1m}]}]",
     "1:28: a test of alerts needs an alertname"),
    ("a duration", "tests: [{interval: 5}]", "tests.yml:1:20: "),
    ("an interval", "evaluation_interval: one", "tests.yml:1:22: "),
    ("a time", "tests: [{start_timestamp: yesterday}]", "tests.yml:1:27: "),
    ("fuzzy", "fuzzy_compare: perhaps", "1:16: 'fuzzy_compare' must be true or false"),
    ("a group twice", "group_eval_order: [a, b, a]", "1:26: group 'a' has its place already"),
    ("a map where a list belongs", "tests: {}", "1:8: 'tests' must be a list"),
    ("a list where text belongs", "rule_files: [[]]", "must be text"),
    ("rules with a fault", "rule_files: [rules.yml]", "rules.yml:1:46: parse error"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), [row[1:] for row in FAULTS],
                         ids=[row[0] for row in FAULTS])  # fmt: skip
def test_faults_in_files_of_tests_have_their_place(unit_tests, text, reason):
    bad_rules = "groups: [{name: a, rules: [{record: r, expr: sun(m)}]}]"
    status, out, err = unit_tests(text, rules=bad_rules)
    assert status == 1 and "SUCCESS" not in out
    assert reason in err


def test_all_faults_are_told():
    with pytest.raises(metricstream.RuleFileError) as raised:
        metricstream.read_rule_tests("a: 1\nb: 2\ntests:\n- {c: 3, interval: x}\n", "t.yml")
    assert [fault.split(" ")[0] for fault in raised.value.faults] == [
        "t.yml:1:1:", "t.yml:2:1:", "t.yml:4:4:", "t.yml:4:20:"
    ]  # fmt: skip


def test_a_file_that_can_not_be_read(unit_tests, tmp_path):
    status, out, err = unit_tests("tests: []", str(tmp_path / "missing"))
    assert status == 1 and "No such file" in err and out.count("SUCCESS") == 1


def test_rule_files_are_found_beside_the_tests(unit_tests, monkeypatch, tmp_path):
    rules = "groups: [{name: %s, rules: [{record: %s, expr: vector(1)}]}]"
    tests = """
rule_files: [sub/*.yml, ./sub/a.yml, nothing*.yml]
tests:
- promql_expr_test: [{expr: a + b, exp_samples: [{value: 2}]}]
"""
    monkeypatch.chdir("/")
    status, _, err = unit_tests(tests, sub__a=rules % ("a", "a"), sub__b=rules % ("a", "b"))
    assert (status, err) == (0, "  WARNING: no file matches nothing*.yml\n")


def test_the_order_of_groups(unit_tests):
    rules = """
groups: [{name: a, rules: [{record: r, expr: s}]}, {name: b, rules: [{record: s, expr: m}]}]
"""
    tests = """
rule_files: [rules.yml]
tests:
- input_series: [{series: m, values: 7}]
  promql_expr_test: [{expr: r, exp_samples: [{labels: r, value: 7}]}]
"""
    assert unit_tests(tests, rules=rules)[0] == 1  # it sees `s` an evaluation later
    assert unit_tests(tests + "group_eval_order: [b, a]", rules=rules)[0] == 0


def test_a_rule_that_fails_fails_the_test(unit_tests):
    body = "promql_expr_test: [{expr: '1', eval_time: 5m, exp_samples: [{value: 1}]}]"
    rules = "groups: [{name: a, rules: [{record: r, expr: m + on() m}]}]"
    status, _, err = unit_tests(with_rules(body), rules=rules)
    assert status == 1 and "rule r at 0s: found duplicate series" in err


@pytest.mark.parametrize(("arguments", "status"), [
    ((), 1), (("--run", "good"), 0), (("--run", "^bad$"), 1), (("--run", "none"), 0),
    (("--run", "none", "--run", "a."), 1), (("--run", "("), 1),
])  # fmt: skip
def test_tests_are_chosen_by_name(unit_tests, arguments, status):
    case = "promql_expr_test: [{expr: '1', exp_samples: [{value: %d}]}]"
    tests = f"tests: [{{name: very good, {case % 1}}}, {{name: bad, {case % 2}}}]"
    assert unit_tests(tests, *arguments)[0] == status


def test_external_labels_are_seen_by_templates_alone(unit_tests):
    rules = """
groups: [{name: a, rules: [{alert: A, expr: m, labels: {x: '{{ $externalLabels.dc }}'}}]}]
"""
    body = """external_labels: {dc: eu}
alert_rule_test: [{eval_time: 1m, alertname: A, exp_alerts: [
    {exp_labels: {x: eu, host: a}}, {exp_labels: {x: eu, host: b}}]}]"""
    assert unit_tests(with_rules(body), rules=rules)[0] == 0


def test_a_series_that_is_given_twice_has_the_later_values(unit_tests):
    tests = """
tests:
- input_series: [{series: m, values: 1x9}, {series: m, values: 2x9}]
  promql_expr_test: [{expr: m, eval_time: 5m, exp_samples: [{labels: m, value: 2}]}]
"""
    assert unit_tests(tests)[0] == 0


def test_a_rule_that_records_what_is_there_already_fails(unit_tests):
    rules = "groups: [{name: a, rules: [{record: m, expr: vector(1)}]}]"
    tests = """
rule_files: [rules.yml]
tests:
- input_series: [{series: m, values: 1 _ 1 1 2}]
  promql_expr_test: [{expr: 'count_over_time(m[5m])', eval_time: %s, exp_samples: [{value: 4}]}]
"""
    assert unit_tests(tests % "3m", rules=rules)[0] == 0
    status, _, err = unit_tests(tests % "4m", rules=rules)
    assert status == 1 and "rule m at 4m: duplicate sample for timestamp" in err


def test_a_test_over_days_counts_its_evaluations(unit_tests):
    rules = """
groups: [{name: a, rules: [{record: n, expr: vector(1)}, {alert: A, expr: n, for: 3d}]}]
"""
    tests = """
rule_files: [rules.yml]
tests:
- promql_expr_test: [{expr: 'count_over_time(n[3d])', eval_time: 3d, exp_samples: [{value: 4320}]}]
  alert_rule_test:
  - {eval_time: 2d23h59m59s, alertname: A}
  - {eval_time: 3d, alertname: A, exp_alerts: [{}]}
"""
    assert unit_tests(tests, rules=rules)[0] == 0


# ---- beside a real promtool ----


class RuleTestGenerator:
    """Rules, and unit tests of them that expect what our own evaluation gives.

    Prometheus 2 has closed ranges, 3 left-open ones: no sample stands where a range begins.
    """

    SELECTIONS = ("m", 'm{host="a"}', "r1", "r2", "m > 4", "m{l=~'x|'}", "-m", "m % 3", "absent(m)")
    FUNCTIONS = ("max_over_time", "min_over_time", "count_over_time", "sum_over_time",
                 "last_over_time", "changes", "resets", "present_over_time")  # fmt: skip
    TEMPLATES = ("text", "{{ $value }}", "{{ $labels.host }}", "{{ .Value | humanize }}",
                 "{{ $externalLabels.dc }}-{{ $externalURL }}", "{{ printf \"%.2f\" $value }}",
                 "{{ range query \"sum(r1)\" }}{{ .Value }},{{ end }}", "{{ $labels }}", "",
                 "{{ with query \"sum(m)\" }}{{ . | first | value }}{{ else }}none{{ end }}",
                 "{{ range query \"ALERTS\" | sortByLabel \"alertname\" }}{{ .Value }}{{ end }}",
                 )  # fmt: skip

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def expression(self) -> str:
        pick, selection = self.chance.choice, self.chance.choice(self.SELECTIONS)
        return pick([
            selection,
            f"sum({selection})",
            f"count by (host) ({selection})",
            f"{pick(self.FUNCTIONS)}({pick(['m', 'r1', 'ALERTS'])}[{pick([61, 121, 271])}s500ms])",
            f"{pick(self.FUNCTIONS)}({pick(['m', 'r1'])}[{pick([61, 121, 271])}s500ms:])",
            f"{selection} > {pick([1, 3, 7])}",
            f"{selection} unless on (host) m == 2",
            "ALERTS",
            f"timestamp({pick(['m', 'r1'])})",
            f"m offset {pick([60, -60, 30])}s",
        ])  # fmt: skip

    def rules(self) -> dict[str, Any]:
        pick = self.chance.choice
        groups = []
        for number in range(self.chance.randrange(1, 4)):
            rules: list[dict[str, Any]] = []
            for _ in range(self.chance.randrange(1, 5)):
                labels = {name: pick(["", "x", "y"]) for name in "lk" if pick([True, False])}
                if pick([True, False]):
                    rules.append({"record": pick(["r1", "r2"]), "labels": labels})
                else:
                    # a label that becomes empty keeps its template in Prometheus's ALERTS
                    if pick([True, False]):
                        labels["t"] = f"t{pick(self.TEMPLATES)}"
                    rules.append({
                        "alert": pick("AB"), "labels": labels,
                        "annotations": {"a": pick(self.TEMPLATES), "b": pick(self.TEMPLATES)},
                        "for": pick(["0s", "30s", "1m", "3m"]),
                        "keep_firing_for": pick(["0s", "0s", "1m", "2m"]),
                    })  # fmt: skip
                rules[-1]["expr"] = self.expression()
            groups.append({"name": f"g{number}", "limit": pick([0, 0, 0, 4]), "rules": rules})
        return {"groups": groups}

    def test(self) -> dict[str, Any]:
        pick = self.chance.choice
        series = [
            {"series": f'm{{host="{host}"{rest}}}', "values": " ".join(
                pick(["1", "2", "5", "7+1x3", "9-2x4", "3x2", "_", "stale", "0.25"])
                for _ in range(10)
            )}
            for host, rest in (("a", ""), ("b", ',l="x"'), ("c", ',l="y"'))
        ]  # fmt: skip
        times = sorted(f"{self.chance.randrange(0, 1000)}s" for _ in range(4))
        return {
            "interval": pick(["37s", "41s"]), "input_series": series[: self.chance.randrange(1, 4)],
            "external_labels": {"dc": "eu"}, "external_url": "http://x",
            "alert_rule_test": [
                {"eval_time": at, "alertname": name, "exp_alerts": []}
                for at in times for name in "AB"
            ],
            "promql_expr_test": [
                {"eval_time": at, "expr": self.expression(), "exp_samples": []} for at in times
            ],
        }  # fmt: skip

    def file(self, rules_name: str, rules: dict[str, Any]) -> dict[str, Any] | None:
        """A file of tests with what is to be expected; None where a rule fails."""
        order = [group["name"] for group in rules["groups"]]
        self.chance.shuffle(order)
        document: dict[str, Any] = {
            "rule_files": [rules_name], "evaluation_interval": self.chance.choice(["30s", "1m"]),
            "group_eval_order": order, "tests": [self.test()],
        }  # fmt: skip
        tests = metricstream.read_rule_tests(json.dumps(document), "tests")
        run = metricstream._RuleTestRun(tests.tests[0], tests, [rule_file_of(json.dumps(rules))])
        is_run = metricstream._at_once(self.fill_in(document, run, tests.evaluation_interval_ms))
        return document if is_run else None

    @staticmethod
    async def fill_in(document: dict[str, Any], run: Any, interval_ms: int) -> bool:
        """Set what is to be expected; whether all rules could be evaluated."""
        (test,) = document["tests"]
        samples = run._samples()
        for now_ms in range(0, run._end_ms() + 1, interval_ms):
            while samples and samples[-1][0] <= now_ms:
                time_ms, number, value = samples.pop()
                run._memory.append(number, time_ms, value)
            if await run._evaluate(now_ms):
                return False
            for case in test["alert_rule_test"]:
                if now_ms <= int(case["eval_time"][:-1]) * 1000 < now_ms + interval_ms:
                    case["exp_alerts"] = [
                        {"exp_labels": alert.labels, "exp_annotations": alert.annotations}
                        for group in run._groups for rule in group.alerting
                        if rule.rule.name == case["alertname"]
                        for alert in rule.alerts.values() if alert.state == "firing"
                    ]  # fmt: skip
        for case in test["promql_expr_test"]:
            found = await run._query(case["expr"], int(case["eval_time"][:-1]) * 1000)
            case["exp_samples"] = [
                {"labels": metricstream._series_text(labels), "value": value}
                for labels, value in found
            ]
        return True

    def mutated(self, document: dict[str, Any]) -> dict[str, Any]:
        """The file with one expectation that is wrong."""
        wrong = json.loads(json.dumps(document))
        (test,) = wrong["tests"]
        case = self.chance.choice([*test["alert_rule_test"], *test["promql_expr_test"]])
        expected = case["exp_alerts"] if "alertname" in case else case["exp_samples"]
        if not expected:
            expected.append({"value": 1} if "expr" in case else {})
        elif self.chance.random() < 0.3:
            expected.pop()
        elif "expr" in case:
            expected[0]["value"] += 1
        else:
            part = self.chance.choice(["exp_labels", "exp_annotations"])
            expected[0][part]["a"] = "something else"
        return wrong


@needs("promtool")
def test_generated_unit_tests_have_the_verdicts_of_promtool(tmp_path, capsys):
    generator = RuleTestGenerator(int(os.environ.get("METRICSTREAM_SEED", "1")))
    paths = {}
    while len(paths) < 60:
        rules, name = generator.rules(), f"rules{len(paths)}.json"
        document = generator.file(name, rules)
        if document is not None:
            (tmp_path / name).write_text(json.dumps(rules))
            for verdict, tests in ((True, document), (False, generator.mutated(document))):
                path = tmp_path / f"tests{len(paths)}.json"
                path.write_text(json.dumps(tests))
                paths[str(path)] = verdict
    command = ["promtool", "test", "rules", *paths]
    judged = subprocess.run(command, capture_output=True, text=True)
    assert metricstream.test_rules_main(list(paths)) == judged.returncode == 1
    out, err = capsys.readouterr()
    for said in (judged.stdout, out):
        verdicts = dict(re.findall(r"^Unit Testing:  (.+)\n+(?:  (SUCCESS))?", said, re.MULTILINE))
        wrong = [path for path, good in paths.items() if bool(verdicts[path]) != good]
        assert not wrong, (wrong, judged.stderr, err)


# ---- rules over what is stored ----


BACKTESTED = """
groups:
- name: g
  interval: 1m
  rules:
  - {record: load, expr: cpu * 100}
  - {alert: High, expr: load > 50, for: 2m, labels: {severity: page}}
  - {alert: Never, expr: cpu > 9}
- name: other
  rules:
  - {alert: High, expr: cpu > 0.95}
"""


def test_a_backtest_says_when_alerts_would_have_fired():
    memory = metricstream.MemorySeries()
    for second in range(0, 7200, 30):
        for host in "ab":
            high = host == "a" and (600 <= second < 1200 or second >= 6000)
            number = memory.number({"__name__": "cpu", "host": host})
            memory.append(number, second * 1000, 0.9 if high else 0.1)
        # what the rule recorded when it ran is not what it records now
        memory.append(memory.number({"__name__": "load", "host": "a"}), second * 1000, 99.0)
    file = rule_file_of(BACKTESTED)
    groups = [metricstream.GroupState(group, "rules.yml", metricstream.RuleContext())
              for group in file.groups]  # fmt: skip
    fired, failed = metricstream.backtest(groups, memory.select, 0, 7_200_000)
    assert not failed and {firing.rule for firing in fired} == {groups[0].rules[1]}
    assert {firing.labels["host"] for firing in fired} == {"a"}
    (first, last) = fired
    assert 720_000 <= first.began_ms < 780_000 and 1_200_000 <= first.ended_ms < 1_260_000
    assert 6_120_000 <= last.began_ms < 6_180_000 and last.ended_ms == 7_200_000


def test_what_is_read_ahead_is_what_would_be_read():
    chance, memory = random.Random(1), metricstream.MemorySeries()
    for minute in range(2000):
        for host in "abc":
            if chance.random() < 0.5:
                number = memory.number({"__name__": "m", "host": host})
                memory.append(number, minute * 60_000, chance.random())
    ahead, budget = metricstream._read_ahead(memory.select), metricstream.Budget()
    at_ms = 0
    while at_ms < 2000 * 60_000:
        hosts = Matcher("host", "=~", chance.choice(["a|b", ".+"]))
        matchers = (Matcher("__name__", "=", "m"), hosts)
        low_ms = max(0, at_ms - chance.choice([1, 300_000, 3_600_000]))
        plain = list(memory.select(matchers, low_ms, at_ms, budget))
        assert list(ahead(matchers, low_ms, at_ms, budget)) == plain
        at_ms += chance.choice([-60_000, 1, 60_000, 900_000])
        at_ms = max(0, at_ms)


def test_a_backtest_goes_on_after_a_rule_has_failed():
    memory = metricstream.MemorySeries()
    for host, second in (("a", 0), ("b", 0), ("a", 600)):
        number = memory.number({"__name__": "m", "host": host})
        memory.append(number, second * 1000, 1.0)
    rules = "groups: [{name: g, interval: 1m, rules: [{alert: A, expr: m + on() m}]}]"
    (group,) = rule_file_of(rules).groups
    groups = [metricstream.GroupState(group, "rules.yml", metricstream.RuleContext())]
    fired, failed = metricstream.backtest(groups, memory.select, 0, 900_000)
    assert len(fired) == 1 and 600_000 <= fired[0].began_ms < 660_000
    ((reason, times),) = failed.items()
    assert reason.startswith("A: found duplicate series") and times == 5


def test_backtest_of_a_folder(tmp_path, capsys):
    rules, bad = tmp_path / "rules.yml", tmp_path / "bad.yml"
    rules.write_text(BACKTESTED)
    bad.write_text("groups: [{name: g}, {name: g}]")
    now_ms = int(time.time() * 1000)
    under = a_store(tmp_path)
    under.push([
        Sample("cpu", 0.99 if minute < 60 else 0.1, "gauge", {"host": "a"},
               now_ms - minute * 60_000)
        for minute in range(600, 0, -1)
    ])  # fmt: skip
    under.close()
    limit = sys.getrecursionlimit()
    options = ["--data-dir", str(tmp_path), "--since", "12h"]
    assert metricstream.test_rules_main([*options, str(rules)]) == 0
    out, _ = capsys.readouterr()
    assert metricstream.test_rules_main([*options, str(bad)]) == 1
    assert metricstream.test_rules_main([*options, str(tmp_path / "missing.yml")]) == 1
    sys.setrecursionlimit(limit)
    assert "bad.yml:1:" in capsys.readouterr().err
    high, never, other = out.split("\n\n")[1:]
    assert high.startswith('High {alertname="High", host="a", severity="page"}\n  ' + "·" * 55)
    assert re.search(r"·████+\n  \d{4}-\d\d-\d\dT\d\d:\d\d:[0-9.]+Z for 5[67]m", high)
    assert never == "Never: never fires"
    assert other.startswith('High {alertname="High", host="a"}\n')


def test_the_bar_of_a_firing():
    bar = functools.partial(metricstream.firing_bar, start_ms=0, end_ms=6000)
    assert bar([]) == "·" * 60
    assert bar([(0, 6000)]) == "█" * 60
    assert bar([(0, 1), (3000, 3000), (6000, 6000)]) == f"█{'·' * 29}█{'·' * 28}█"


# ==================================================================================================
# PART VI. COMMAND LINE
# ==================================================================================================


# ==================================================================================================
# Command line
# ==================================================================================================


@at_once()
def test_the_startup_line_says_what_is_in_force(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"torn')
    with ServerProcess(tmp_path, "--rate-limit", "7", "--durability", "disk") as started:
        line = started.startup_line
        assert f"on http://127.0.0.1:{started.port}, log {tmp_path / 'metrics.jsonl'}, " in line
        assert "7 requests/s a client" in line and "durability disk" in line
        assert "cut a torn line of 6 bytes off the log" in line


@at_once()
def test_a_stdout_without_unicode_and_a_folder_with_a_line_end_break_no_line(tmp_path):
    # what is written is UTF-8 all the same
    with ServerProcess(tmp_path / "Messdaten\nü", PYTHONIOENCODING="ascii") as started:
        assert "Messdaten\\nü/metrics.jsonl, " in started.startup_line
        with contextlib.closing(Client(started.port)) as client:
            assert client.ask("POST", "/metrics", BATCH, Authorization="büro").status == 200
        status, out, err = started.stop()
    assert (status, err) == (0, "") and "busiest bü" in out


@at_once(itertools.product([signal.SIGTERM, signal.SIGINT], LEVELS))
def test_a_signal_ends_it_with_everything_on_disk(tmp_path, number, durability):
    with ServerProcess(tmp_path, "--durability", durability) as started:
        with contextlib.closing(Client(started.port)) as client:
            for _ in range(10):
                assert client.ask("POST", "/metrics", BATCH).status == 200
        status, out, err = started.stop(number)
    assert (status, err) == (0, "")
    stopped = out.splitlines()[-1]
    assert stopped.startswith("stopped {") and '"metrics_received":10,' in stopped
    assert "1 with 10 requests allowed, 0 refused; busiest 127.0.0.1 10+0" in out
    assert len(lines_of(tmp_path)) == 10


@at_once()
def test_a_reader_of_stdout_that_leaves_is_no_error(tmp_path):
    with ServerProcess(tmp_path, "--log-level", "error") as started:
        assert started.process.stdout and started.process.stderr
        started.process.stdout.close()
        started.process.terminate()
        assert started.process.wait(10) == 0
        assert started.process.stderr.read() == ""
        started.process.stdout = None


@at_once()
def test_mistakes_are_one_clear_line_and_a_status(tmp_path):
    readable = tmp_path / "file"
    readable.write_text("")
    with ServerProcess(tmp_path / "data") as started, ThreadPoolExecutor(4) as pool:
        mistakes = [
            ([str(started.port), "--data-dir", str(tmp_path / "b")], 1, "Address already in use"),
            (["0", "--data-dir", str(tmp_path / "data")], 1, "in use by another server"),
            (["0", "--data-dir", str(readable)], 1, "can't use the data folder"),
            (["0", "--data-dir", str(tmp_path), "--host", "203.0.113.1"], 1, "can't listen on"),
            (["0", "--data-dir", str(tmp_path / "c"), "--host", "no such host"], 1, "can't listen on"),
            (["65536"], 2, "not a whole number from 0 to 65535"),
            (["-1"], 2, "-1"),
            (["٨٠"], 2, "not a whole number"),
            (["0", "--rate-limit", "1.5"], 2, "not a whole number"),
            (["0", "--stripes", "12"], 2, "12 is not a power of two"),
            (["0", "--durability", "ram"], 2, "choose from"),
            (["0", "--nonsense"], 2, "--nonsense"),
            (["0", "--clients", str(tmp_path / "none")], 1, "can't read"),
            (["0", "--tls-cert", str(readable)], 2, "--tls-cert and --tls-key go together"),
            (["0", "--tls-cert", str(readable), "--tls-key", str(readable)], 1, "can't use certificate"),
            (["0", "--tls-cert", "none", "--tls-key", "none"], 1, "No such file"),
            (["--new-client", "10.0.0.7"], 2, "must be a letter and"),
        ]  # fmt: skip
        outcomes = list(pool.map(lambda mistake: run(*mistake[0]), mistakes))
        for (_, status, reason), ended in zip(mistakes, outcomes):
            assert (ended.returncode, ended.stdout) == (status, ""), ended
            assert reason in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr
            assert len(ended.stderr.splitlines()) == 1


@at_once()
def test_the_limit_on_open_files_lowers_the_connections(tmp_path):
    command = (
        f"ulimit -n 256; exec {sys.executable} {HERE / 'metricstream.py'} 0 --data-dir {tmp_path}"
    )
    process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    warning, startup = process.stdout.readline(), process.stdout.readline()
    process.terminate()
    process.communicate(timeout=10)
    assert "the limit on open files allows 192 connections, not 10000" in warning
    assert "192 connections" in startup


@at_once()
def test_version_and_help(_):
    assert run("--version").stdout == f"MetricStream {metricstream.__version__}\n"
    shown = run("--help").stdout
    for option in ("--host", "--data-dir", "--rate-limit", "--stripes", "--durability", "--threads",
                   "--max-connections", "--log-level", "--clients", "--new-client", "--allowed-host",
                   "--tls-cert", "--tls-key"):  # fmt: skip
        assert option in shown


@at_once()
def test_a_new_client_may_write_and_its_key_appears_nowhere(tmp_path):
    made = run("--new-client", "web1")
    key = made.stderr.split()[-1]
    assert made.returncode == 0 and re.fullmatch(r"web1 [0-9a-f]{64}\n", made.stdout)
    assert key not in made.stdout and run("--new-client", "web1").stderr.split()[-1] != key
    listed = tmp_path / "clients"
    listed.write_text(made.stdout)
    with ServerProcess(tmp_path, "--clients", str(listed), "--log-level", "debug") as started:
        assert "clients listed: 1" in started.startup_line
        with contextlib.closing(Client(started.port)) as client:
            for authorization, status in [
                (f"Bearer {key}", 200),
                (key, 200),
                (f"Bearer {key}x", 401),
            ]:
                answer = client.ask("POST", "/metrics", BATCH, Authorization=authorization)
                assert (answer.status, key in str(answer)) == (status, False)
            assert client.ask("POST", "/metrics", b"{", Authorization=key).status == 400
            assert key not in str(client.ask("GET", "/metrics", Authorization=key))
        command_line = Path(f"/proc/{started.process.pid}/cmdline")
        assert not command_line.exists() or key not in command_line.read_text()
        status, out, err = started.stop()
    assert (status, err) == (0, "") and key not in out
    assert "busiest web1 3+0" in out


@at_once()
def test_sighup_reads_again_what_others_have_changed(tmp_path):
    listed, (certificate, key_file) = tmp_path / "clients", pem_files(tmp_path)
    log = tmp_path / "metrics.jsonl"
    listed.write_text(KEY_LINE)
    options = ["--clients", str(listed), "--tls-cert", certificate, "--tls-key", key_file]
    with ServerProcess(tmp_path, *options) as started:
        assert started.process.stdout and "on https://" in started.startup_line

        def hang_up() -> list[str]:
            started.process.send_signal(signal.SIGHUP)
            return [started.process.stdout.readline() for _ in range(3)]

        def posted(key: str) -> int:
            with contextlib.closing(http.client.HTTPSConnection("localhost", started.port, timeout=10,
                                                                context=trusting())) as client:  # fmt: skip
                client.request("POST", "/metrics", BATCH, {"Authorization": key})
                statuses.append(client.getresponse().status)
            return statuses[-1]

        statuses: list[int] = []
        assert [posted(KEY), posted("other")] == [200, 401]
        os.rename(log, tmp_path / "moved")
        listed.write_text(f"web2 {hashlib.sha256(b'other').hexdigest()}\n")
        assert all("is opened again" in line for line in hang_up())
        assert [posted(KEY), posted("other")] == [401, 200]
        # the thread of the log does it, a moment after it is said
        eventually(lambda: posted("other") == 200 and log.exists() and lines_of(tmp_path))
        moved = (tmp_path / "moved").read_bytes()
        assert moved.count(b"\n") + len(lines_of(tmp_path)) == statuses.count(200)

        listed.write_text("web2 what?\n")  # whoever writes such a file is told, and keeps the old
        Path(certificate).write_text("no certificate")
        _, *faults = hang_up()
        assert "clients, line 1: expected" in faults[0] and "stays in force" in faults[0]
        assert "can't use certificate" in faults[1] and "stays in force" in faults[1]
        assert [posted(KEY), posted("other")] == [401, 200]
        assert started.stop()[::2] == (0, "")


@at_once()
def test_to_be_reached_from_elsewhere_without_a_list_of_clients_is_warned_of(tmp_path):
    def first_line(number: int, options: list[str]) -> str:
        folder = str(tmp_path / str(number))
        command = [sys.executable, str(HERE / "metricstream.py"), "0", "--data-dir", folder]
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
            line = process.stdout.readline()
            process.terminate()
            process.communicate(timeout=10)
        return line

    (tmp_path / "clients").write_text(KEY_LINE)
    starts = [
        ["--host", "0.0.0.0"],
        ["--host", "127.0.0.2"],
        ["--host", "0.0.0.0", "--clients", str(tmp_path / "clients")],
    ]
    with ThreadPoolExecutor() as pool:
        warned, *silent = pool.map(first_line, range(3), starts)
    assert "WARNING whoever reaches 0.0.0.0 may write: see --clients" in warned
    assert all(line.startswith("MetricStream ") for line in silent)


@at_once(["full disk", "a pipe that nobody reads"])
def test_a_stdout_that_takes_nothing_neither_stops_nor_ends_the_server(tmp_path, stdout):
    with contextlib.ExitStack() as stack:
        if stdout == "full disk":
            out = stack.enter_context(open("/dev/full", "wb"))
        else:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            out = stack.enter_context(os.fdopen(writer, "wb"))
            os.set_blocking(writer, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, b"x" * 4096)
            os.set_blocking(writer, True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, str(HERE / "metricstream.py"), str(port), "--data-dir", str(tmp_path)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
        try:

            def posted() -> bool:
                with contextlib.suppress(OSError):
                    return exchange(port, post())[0][0].status == 200
                return False

            eventually(posted)
            assert exchange(port, HEALTH)[0][0].status == 200
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=8)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0 and "Traceback" not in err, err
    assert len(lines_of(tmp_path)) == 1


@at_once()
def test_a_stop_does_not_wait_for_a_disk_that_does_not_answer(tmp_path):
    """In a process of its own: it ends with a line that says what was not synced."""
    program = f"""
import os, sys, threading
import metricstream as m
hang = lambda fd, octets: threading.Event().wait(60)
real = m.MetricLog.__init__
m.MetricLog.__init__ = lambda self, *a, **k: real(self, *a, **{{**k, "write": hang}})
m.LOG_CLOSE_S, m.STALL_S = 0.5, 0.3
sys.exit(m.main(["0", "--data-dir", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout
    try:
        port = int(re.search(r":(\d+),", process.stdout.readline())[1])  # type: ignore[index]
        with connect(port) as connection:
            connection.sendall(post())
            health = eventually(lambda: (a := answer_once(port, HEALTH)).status == 503 and a)
            assert "does not answer" in str(health.body)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1 and "disk" in (out + err).splitlines()[-1], (out, err)


def test_queries_on_the_command_line(tmp_path, capsys):
    under = a_store(tmp_path)
    block_of(under, 1000, 2000, name="in_a_block")
    under.push([Sample("in_the_log", 2.5, "gauge", {"a": 'b"'}, 2000)])

    def query(*arguments: str) -> tuple[int, str]:
        status = metricstream.main(
            ["query", *arguments, "--data-dir", str(tmp_path), "--time", "2"]
        )
        return status, capsys.readouterr().out

    try:
        assert query("in_the_log + 1") == (0, '{a="b\\""}  1970-01-01T00:00:02.000Z  3.5\n')
        status, text = query("in_a_block", "--json")
        assert status == 0 and json.loads(text)["data"]["result"] == [
            {"metric": {"__name__": "in_a_block"}, "value": [2, "2"]}
        ]
        assert query("1 + 1")[1] == "scalar  1970-01-01T00:00:02.000Z  2\n"
        assert query("in_a_block[5s]")[1].splitlines() == [
            "in_a_block  1970-01-01T00:00:01.000Z  1", "in_a_block  1970-01-01T00:00:02.000Z  2",
        ]  # fmt: skip
        assert query("sum(")[0] == 1
        assert metricstream.main(["query", "up", "--data-dir", str(tmp_path / "none")]) == 1
    finally:
        under.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks", "metrics.jsonl"]


# ---- all of it for ten minutes, with kills, full disks and hostile clients: make soak ----


def pester(port: int, rng: random.Random, held: list[socket.socket]) -> None:
    """One hostile or clumsy client; some of them stay, in `held`."""
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    deed = rng.randrange(7)
    client.sendall([
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nX-Drip: " + b"a" * rng.randrange(2000),
        post()[: rng.randrange(1, len(post()))],
        get(b"/metrics") * 500,  # and never read
        bytes(rng.randrange(256) for _ in range(300)),
        framed(b"Content-Length: 104857600"),
        post(body=b"[" * 100_000),
        HEALTH,
    ][deed])  # fmt: skip
    if rng.random() < 0.3:  # a reset
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    else:
        held.append(client)
    while len(held) > 300:
        held.pop(rng.randrange(len(held))).close()


@pytest.mark.skipif(not SOAK_S, reason="`make soak` runs it")
def test_soak(tmp_path, capsys):
    """Mixed load with kills, clean stops, a full disk and hostile clients; nothing may be lost."""
    rng = random.Random("soak")
    began, events = time.monotonic(), Counter()
    acknowledged, requests = set(), Counter()
    held: list[socket.socket] = []
    footprints: list[Footprint] = []
    pause = threading.Event()  # never set: its wait paces what happens
    while (left_s := SOAK_S - (time.monotonic() - began)) > 0:
        last = left_s < SOAK_S / 4  # one server lives long, so that its figures can be compared
        lives_s = left_s if last else min(left_s, rng.uniform(1, SOAK_S / 20))
        with ServerProcess(tmp_path, "--rate-limit", "0", "--max-connections", "500") as started:
            writers = Writers(started.port, str(events["servers"]), count=6, pause_s=0.02)
            events["servers"] += 1
            eventually(lambda w=writers: len(w.acknowledged) > 100)
            if last:
                footprints.append(Footprint.of(started.process.pid))
            ends_at = time.monotonic() + lives_s
            while time.monotonic() < ends_at:
                with contextlib.suppress(ConnectionError):  # such clients are refused and reset
                    pester(started.port, rng, held)
                events["hostile clients"] += 1
                if rng.random() < 0.005:
                    events["full disks"] += 1
                    limit_file_size(
                        started.process, (tmp_path / "metrics.jsonl").stat().st_size + 100
                    )
                    pause.wait(rng.uniform(0.1, 1))
                    limit_file_size(started.process, resource.RLIM_INFINITY)
                pause.wait(0.02)
            if last:
                for client in held:
                    client.close()
                held.clear()
                with contextlib.closing(Client(started.port)) as client:
                    most = 6 + 1  # the writers, and who asks
                    eventually(lambda c=client: json.loads(c.ask("GET", "/metrics").body)
                               ["connections_open"] <= most, 30)  # fmt: skip
                footprints.append(Footprint.of(started.process.pid))
            if last or rng.random() < 0.3:
                events["clean stops"] += 1
                assert started.stop()[::2] == (0, "")
            else:
                events["kills"] += 1
                started.process.kill()
                started.process.wait()
            writers.join()
        acknowledged |= writers.acknowledged
        requests += writers.statuses
    for client in held:
        client.close()
    damaged, kept = 0, set()
    with open(tmp_path / "metrics.jsonl", "rb") as log:
        for line in log:
            try:
                kept.add(json.loads(line)["name"])
            except ValueError:
                damaged += 1
    lost = len(acknowledged - kept)
    start, end = footprints
    with capsys.disabled():
        print(f"""
soak of {time.monotonic() - began:,.0f} s
  requests         {requests.total():,} ({requests[200]:,} answered 200, {requests[503]:,} 503)
  metrics          {len(acknowledged):,} acknowledged
  survived         {events["kills"]} kills, {events["clean stops"]} clean stops, {events["full disks"]} full disks
  hostile clients  {events["hostile clients"]:,}
  lost             {lost}
  damaged lines    {damaged}
  last server      memory {start.resident_bytes / MIB:.1f} -> {end.resident_bytes / MIB:.1f} MiB, threads {start.threads} -> {end.threads}, open files {start.files} -> {end.files}""")  # fmt: skip
    assert (lost, damaged) == (0, 0)
    assert set(requests) <= {200, 503}
    assert end.threads <= start.threads + 1 and end.files <= start.files + 1
    assert end.resident_bytes < start.resident_bytes + 64 * MIB


# ==================================================================================================
# THE MODULE AS A WHOLE
# ==================================================================================================


def test_the_tests_stand_in_the_order_of_the_chapters():
    chapters = re.findall(r"^# ((?:PART [IVX]+|\d+)\. .+)$", SOURCE, re.MULTILINE)
    titles = [re.sub(r"^\d+\. ", "", chapter) for chapter in chapters]
    banners = re.findall(r"^# =+\n# (.+)\n# =+$", Path(__file__).read_text(), re.MULTILINE)
    *tested, module, load_tester = banners
    assert (module, load_tester) == ("THE MODULE AS A WHOLE", "THE LOAD TESTER")
    assert len(tested) > 15 and tested == [title for title in titles if title in tested]


def test_only_the_standard_library_is_imported_and_json_is_not():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= sys.stdlib_module_names
    assert "json" not in imported and "socketserver" in imported


def in_annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, and those of the annotations that are written as strings."""
    for node in ast.walk(tree):
        yield node
        annotations = [getattr(node, name, None) for name in ("annotation", "returns")]
        for annotation in filter(None, annotations):
            for part in ast.walk(annotation):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    with contextlib.suppress(SyntaxError):  # the words of a Literal are no names
                        for inner in ast.walk(ast.parse(part.value, mode="eval")):
                            yield ast.copy_location(inner, part)


def names_used_below(source: str) -> tuple[dict[int, set[int]], list[str]]:
    """Which chapters each chapter uses, and the names that are used above the chapter they are of."""
    banners = [(number, int(match[1])) for number, text in enumerate(source.splitlines(), 1)
               if (match := re.match(r"# (\d+)\. ", text))]  # fmt: skip
    lines, chapters = [0, *(line for line, _ in banners)], [0, *(chapter for _, chapter in banners)]
    assert chapters == sorted(set(chapters))

    def chapter_of(line: int) -> int:
        return chapters[bisect.bisect_right(lines, line) - 1]

    tree = ast.parse(source)
    defined: dict[str, int] = {}
    for node in tree.body:
        targets = {ast.Assign: "targets", ast.AnnAssign: "target"}.get(type(node), "")
        named = getattr(node, targets) if targets else node
        for target in named if isinstance(named, list) else [named]:
            for part in ast.walk(target) if targets else [target]:
                if found := getattr(part, "id", None) or getattr(part, "name", None):
                    defined.setdefault(found, chapter_of(node.lineno))
    uses, wrong = defaultdict(set), []
    for node in in_annotations(tree):
        if isinstance(node, ast.Name) and node.id in defined:
            chapter = chapter_of(node.lineno)
            uses[chapter].add(defined[node.id])
            if defined[node.id] > chapter:
                wrong.append(f"line {node.lineno}: {node.id}")
    return uses, wrong


def test_a_chapter_uses_only_what_stands_above_it():
    uses, wrong = names_used_below(SOURCE)
    print({chapter: sorted(used - {chapter}) for chapter, used in sorted(uses.items())})
    assert not wrong
    assert len(uses) > 15 and sum(map(len, uses.values())) > 60


def test_a_name_that_is_used_above_its_chapter_is_found_wherever_it_stands():
    chapters = "# 1. One\n{}\n# 2. Two\nclass Below: pass\nbelow: int = 1\n"
    for use in ("print(Below)", "def f(x: 'Below'): pass", "def f() -> 'list[Below] | None': pass",
                "x: dict[str, 'Below']", "x: Below", "def f(): return below"):  # fmt: skip
        assert len(names_used_below(chapters.format(use))[1]) == 1, use
    assert not names_used_below(chapters.format("def f(x: 'str' = 'Below'): pass"))[1]


def test_the_examples_in_the_module_are_true():
    outcome = doctest.testmod(metricstream)
    assert outcome.attempted > 80 and outcome.failed == 0


# ---- no pattern backtracks beyond its input ----

# What makes each pattern work hardest: near matches, as (beginning, what is repeated, end). Those
# that are searched for or split at get beginnings that fail late, again and again. Patterns without
# a name stand here by their text.
LOG_TIME = "2026-01-01T00:00:00.000Z"

WORST_INPUTS: dict[str, list[tuple[str, str, str]]] = {
    "_REQUEST_LINE": [("", "A", " /"), ("GET ", "a", ""), ("GET ", "HTTP/1.1", "x"),
                      ("GET ", "a ", "HTTP/1.1")],
    "_FIELD_LINE": [("", "a", ""), ("a:", " ", "\0"), ("", "a:", "\n"), ("", ":", "\x7f")],
    "_CHUNK_SIZE": [("", "f", "g"), ("1", " ", "x"), ("1", " \t;", "\0"), ("1;", ";", "\n"),
                    ("1", "; ", "\0")],
    "_CONTENT_LENGTH": [("", "1", "x")],
    "_HOST": [("[", "0:", ""), ("[", "::1.", "]x"), ("", "a", "/"), ("", "%41", "%4"),
              ("", "a:", "1"),
              ("", "%", ""), ("a:", "1", "x"), ("", "%41a", ":x")],
    # a target has no line end, which alone could make ".*" fail
    "_ABSOLUTE_FORM": [("http://", "a", "/"), ("http://", "/?", ""), ("", "http://", ""),
                       ("http", "s", "")],
    "_BAD_PERCENT": [("", "%41", ""), ("", "a", "%"), ("", "%4a%", "")],
    "_PERCENT": [("", "%", ""), ("", "%4", ""), ("", "%41", ""), ("", "%4g", "")],
    "_CONTROL": [("", "a", ""), ("", "\xa0", "\0")],
    "_NEVER_IN_A_LINE": [("", "\r\n", ""), ("", "\r\n", "\r"), ("", "a", "\n"),
                         ("", "a\r\n", "\0")],
    "_SPACE": [("", " ", "x"), ("", " \t\r\n", "")],
    "_NUMBER": [("", "1", ""), ("-", "1", "."), ("1.", "1", "e"), ("1.", "0", "e+"),
                ("1e", "1", "."),
                ("", "1.1e1", ""), ("", "-", ""), ("", "0", "")],
    "_PLAIN_STRING": [('"', "a", ""), ('"', "a", "\\"), ("", '"', ""), ('"', "é", "\n")],
    "_UNESCAPED": [("", "a", ""), ("", "é", "\\")],
    "_UNICODE_ESCAPE": [("", "\\u", ""), ("", "\\u004", ""), ("", "\\", "")],
    "_SURROGATE": [("", "\ud7ff", ""), ("", "\ue000", "\udfff")],
    "_MUST_ESCAPE": [("", '"', ""), ("", "\0", ""), ("", "a", "\ud800"), ("", "\u2027\u202f", "")],
    "_ISO_8601": [("", "1", ""), ("2025-09-17T13:45:23.", "1", "Z"),
                  ("", "2025-09-17T13:45:23Z", "")],
    "_USUAL_METRIC": [
        ("", '{"name":"', ""), ("", '{"name": "' + "{" * 255, ""), ("", '{"name":"a","value":', ""),
        ("", '{"name":"' + "a" * 254 + '","value":-', ""), ("", '{"name":"a","value":0.000', ""),
        ("", '{"name":"a","value":' + "1" * 18 + "." + "1" * 18, ""),
        ("", '{"name":"a","value":1111111111.00000,', ""),
        ("", '{"name":"a","value":1,' + "a" * 63, ""),
        ("", '{"name":"a","value":1,' + "a" * 63 + "{" + "a" * 512, ""),
        ("", '{"name":"a","value":1,"tags":{' + "a" * 511 + "}", ""), ("{", '"name":"{', ""),
        ("", '{"name":"a","value":1},', ""), ("", "{", ""),
    ],
    "_CLIENT_NAME": [("", "a", "/")],
    "_CLIENT_LINE": [("", "a", ""), ("a", " ", "x"), ("a", " \t", "0" * 64), ("a " + "0" * 64, " ", "x"),
                     ("a ", "0", ""), ("a " + "0" * 64 + " ", "1", "")],
    f"[^{metricstream._TCHAR.decode()}]": [("", "a", ""), ("", "a", "@")],
    r"q=[01](\.[0-9]{0,3})?": [("q=0.", "0", ""), ("", "q=0", "")],
    r"[0-9]{1,10}": [("", "1", "")],
    "_REPEAT": [("{", "1", ""), ("{1,", "1", ""), ("", "{1", "")],
    "_GROUP_NAME": [("(?P<", "a", ""), ("", "(?<", "")],
    "[A-Za-z0-9_]+": [("", "a", "-")],
    "_ESCAPED": [(r"\x{", "0", ""), (r"\x{", "f", ""), ("", "\\", ""), (r"\0", "7", "")],
    "_BAD_ESCAPE": [(r"\x{", "f", ""), ("", "\\", "")],
    "_RANGE": [("-", "a", ""), ("", "-", "")],
    "_LITERAL_SET": [("", "a", "("), ("", "a|", "*"), ("(", "a|", ""), ("", "\\", ""), ("", r"\.", "."), ("(?:", "|", "")],
    "_ALTERNATIVE": [("", "a|", ""), ("", r"\||", "\\")],
    "_AROUND_LITERAL": [("", "a", "("), (".*", r"\.", ".*x"), ("", ".*", "")],
    "_BACKSLASH": [("", "\\", ""), ("", r"\.", "")],
    "_TEMPLATE_NUMBER": [("", "1", "x")],
    "_BLOCK_NAME": [("", "0", ""), ("00000000-", "0", ".block")],
    "_SEGMENT_NAME": [("metrics.", "0", ".jsonl")],
    "_LOG_LINE": [
        ("", '{"timestamp":"', ""), ('{"timestamp":"' + LOG_TIME + '","name":"', "a", ""),
        ('{"timestamp":"' + LOG_TIME + '","name":"', "\\a", ""),
        ('{"timestamp":"' + LOG_TIME + '","name":"', '\\"', ""),
        ('{"timestamp":"' + LOG_TIME + '","name":"a","value":', "1", ","),
        ('{"timestamp":"' + LOG_TIME + '","name":"a","value":1,"type":', "}", ""),
        ("", '{"timestamp":"' + LOG_TIME + '","name":"a","value":1,"type":\n', ""),
    ],
    "_TOKEN": [("", "1", "_"), ("", "1_", "_"), ("1.", "1", "_"), ("1e", "1", "x"), ("0x", "f", "_"),
               ("", "1h", "x"), ("", "1m", "1"), ("", "a", "."), ('"', "a", ""), ('"', "\\", ""),
               ("'", "\\'", ""), ("`", "a", ""), ("#", "a", "\n"), ("", " ", "x")],
    "_DURATION": [("", "1", ""), ("1y", "1", "y"), ("", "1h", "")],
    "_DURATION_PART": [("", "1", "h"), ("", "1m", ""), ("", "1ms", "1")],
    "_WORD_CHARACTER": [("", "a", "")],
    "_STRING_ESCAPE": [("", "\\", ""), ("", "\\x4", ""), ("", "\\U0000", ""), ("", "\\01", "")],
    "0[0-7]+": [("", "0", "8")],
    "PLAIN_NAME": [("", "a", ".")],
    "GO_FLOAT": [("", "1", "x"), (".", "1", "x"), ("1e", "1", "x"), ("", "inf", "")],
    "_RFC_3339": [("2025-09-17T13:45:23.", "1", "x"), ("", "2025-09-17T13:45:23Z", ""), ("", "1", "")],
    "_ESCAPED_NAME": [("U__", "a", "_"), ("U__", "_", ""), ("U__", "_a_", "_"), ("", "U__", "")],
    "_([^_]*)_": [("", "_", ""), ("", "a", "_"), ("_", "a", "")],
    "_JSON_ESCAPE": [("", "\\", ""), ("", "\\ud8", ""), ("", "\\ud800", "")],
    "_LABEL_VALUES": [("label/", "a", ""), ("label/", "/values", "/value")],
    "[-+]?[0-9]{1,19}": [("", "1", ""), ("", "-", "")],
    "([0-9]{1,15})(?:([KMGT])B|B)?": [("", "1", ""), ("1K", "B", "")],
}  # fmt: skip


@functools.cache
def uses_of_patterns() -> dict[str, tuple[re.Pattern, set[str]]]:
    """Each pattern of the module with the methods by which the module uses it."""
    names = vars(metricstream)
    used = {name: (value, set()) for name, value in names.items() if isinstance(value, re.Pattern)}
    for node in ast.walk(ast.parse((HERE / "metricstream.py").read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, method = getattr(node.func.value, "id", None), node.func.attr
        if owner == "re" and method not in ("compile", "escape"):
            text = eval(ast.unparse(node.args[0]), dict(names))
            name = text.decode() if isinstance(text, bytes) else text
            used.setdefault(name, (re.compile(text), set()))[1].add(method)
        elif owner in used:
            used[owner][1].add(method)
    return used


def test_each_pattern_has_its_worst_inputs_and_a_known_use():
    used = uses_of_patterns()
    assert used.keys() == WORST_INPUTS.keys()
    for name, (_, methods) in used.items():
        uses = {"match", "fullmatch", "search", "split", "sub", "findall", "finditer"}
        assert methods and methods <= uses, name


def of_about(size: int, beginning: str, unit: str, end: str) -> str:
    return beginning + unit * (size // len(unit)) + end


@pytest.mark.parametrize("name", WORST_INPUTS)
def test_no_pattern_backtracks_beyond_its_input(name):
    """Eight times the input is about eight times the time: 64 times would be quadratic."""
    pattern, methods = uses_of_patterns()[name]
    for method, parts in itertools.product(methods, WORST_INPUTS[name]):
        small, large = of_about(4_000, *parts), of_about(32_000, *parts)
        if isinstance(pattern.pattern, bytes):
            small, large = small.encode("latin-1"), large.encode("latin-1")
        use = getattr(pattern, method)
        work = {
            "sub": lambda text: use(text[:0], text),
            "finditer": lambda text: list(use(text)),
        }.get(method, use)
        assert growth(work, small, large, 24) <= 24, (method, parts)


def test_the_measure_of_growth_knows_a_quadratic_pattern():
    assert growth(re.compile("a*b").search, "a" * 1_000, "a" * 8_000, 24) > 24


# ==================================================================================================
# THE LOAD TESTER
# ==================================================================================================


def load(port: int, *arguments: str) -> tuple[int, dict]:
    command = [sys.executable, str(HERE / "load_test.py"), str(port), *arguments]
    ended = subprocess.run(
        [*command, "--json", "--quiet"], capture_output=True, text=True, timeout=50
    )
    assert ended.stderr == "" and ended.stdout.count("\n") == 1, ended
    return ended.returncode, json.loads(ended.stdout)


@at_once([
    ("20 15", 300), ("20 15 --close", 300), ("3 5 10", 15), ("8 5 --batch 7", 40),
    ("10 20 --processes 2", 200), ("5 --rate 200 --duration 0.5", 100),
])  # fmt: skip
def test_the_load_tester_counts_what_the_server_counts(tmp_path, arguments, total):
    with running(tmp_path) as started:
        status, figures = load(started.port, *arguments.split())
        stored = started.service.statistics.snapshot()["metrics_received"]
    assert status == 0
    assert (figures["total"], figures["successful"], figures["failed"]) == (total, total, 0)
    assert figures["success_rate"] == 1.0 and figures["lost"] == figures["unsent"] == 0
    assert figures["statuses"] == {"200": total} and set(figures["errors"].values()) == {0}
    assert stored == total * figures["options"]["batch"] == len(lines_of(tmp_path))
    assert 0 < figures["latency_ms"]["p50"] <= figures["latency_ms"]["max"]
    assert ("p99" in figures["latency_ms"]) == (total >= 100)  # only if the sample supports it
    assert ("service_time_ms" in figures) == ("--rate" in arguments)


@at_once()
def test_each_load_client_has_an_id_of_its_own(tmp_path):
    with running(tmp_path, limit=1000) as started:
        load(started.port, "6", "2")
        seen: dict[str, int] = {}
        for tallies in started.service.limiter.drain():
            seen |= {client: allowed for client, (allowed, _) in tallies.items()}
    assert sorted(seen.values()) == [2] * 6
    assert all(re.fullmatch(r"load_client_\d+", client) for client in seen)


@at_once()
def test_refusals_are_failures_of_their_own_kind(tmp_path):
    with running(tmp_path, limit=2) as started:
        status, figures = load(started.port, "4", "5")
    assert status == 1 and figures["lost"] == 0
    assert figures["successful"] < figures["total"] and figures["statuses"]["429"] >= 4
    assert figures["refused_latency_ms"]["max"] > 0


@at_once()
def test_the_load_tester_finds_out_a_server_that_forgets(tmp_path):
    with running(tmp_path) as started:
        record = started.service.statistics.record

        def forgetful(event: metricstream.Event, invalid: bool = False) -> None:
            record(event._replace(metrics=event.metrics and 2), invalid)

        started.service.statistics.record = forgetful  # type: ignore[method-assign]
        status, figures = load(started.port, "5", "4")
    assert (status, figures["success_rate"], figures["lost"]) == (1, 1.0, 20)


def test_an_acknowledgement_of_the_wrong_number_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(metricstream, "accepted", lambda metrics: metricstream.json_response(
        200, {"success": True, "metrics_processed": metrics + 1}))  # fmt: skip
    with running(tmp_path) as started:
        status, figures = load(started.port, "2", "3")
    assert (status, figures["successful"], figures["errors"]["bad_response"]) == (1, 0, 6)


def test_latency_counts_from_the_intended_time(tmp_path):
    """A server that stops for half a second delays all that was due meanwhile: no coordinated omission."""
    disk = Disk()

    def pausing_write(fd: int, octets: bytes) -> int:
        if not disk.stuck.is_set() and os.fstat(fd).st_size > 5000:
            disk.hold()
            threading.Timer(0.5, disk.release).start()  # the measuring of this wait is tested
        return disk.write(fd, octets)

    with running(tmp_path, log=MetricLog(str(tmp_path), write=pausing_write)) as started:
        status, figures = load(started.port, "1", "--rate", "200", "--duration", "1.2")
    assert status == 0 and disk.stuck.is_set()
    assert figures["latency_ms"]["p90"] > 5 * figures["service_time_ms"]["p90"]
    assert figures["late"] > 50


@at_once()
def test_a_server_that_is_not_there_is_one_clear_line(_):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
        ended = subprocess.run([sys.executable, str(HERE / "load_test.py"), port, "1", "1"],
                               capture_output=True, text=True, timeout=20)  # fmt: skip
    assert ended.returncode == 1 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and f"no server at 127.0.0.1:{port}" in ended.stderr


@at_once()
def test_an_interrupted_load_prints_what_there_is(tmp_path):
    with running(tmp_path) as started:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "load_test.py"), str(started.port), "4", "--duration", "30",
             "--json", "--quiet"], stdout=subprocess.PIPE, text=True)  # fmt: skip
        eventually(lambda: started.service.statistics.snapshot()["metrics_received"] > 100)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=10)[0]
    figures = json.loads(out)
    assert process.returncode in (1, 130)
    assert figures["interrupted"] and figures["successful"] > 0


@at_once()
def test_a_reader_that_leaves_the_load_tester_is_no_error(tmp_path):
    with running(tmp_path) as started:
        command = [sys.executable, str(HERE / "load_test.py"), str(started.port), "2", "5", "--quiet"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_the_load_tester_is_alone():
    imported = {node.module or "" for node in ast.walk(ast.parse((HERE / "load_test.py").read_text()))
                if isinstance(node, ast.ImportFrom)}  # fmt: skip
    names = {alias.name for node in ast.walk(ast.parse((HERE / "load_test.py").read_text()))
             if isinstance(node, ast.Import) for alias in node.names}  # fmt: skip
    assert {name.partition(".")[0] for name in imported | names} <= sys.stdlib_module_names
