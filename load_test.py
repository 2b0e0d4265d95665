#!/usr/bin/env python3
"""Load a metrics server, measure how it answers, and check that it kept what it acknowledged.

    python3 load_test.py [port] [clients] [requests] [interval_ms]
    python3 load_test.py 8080 50 10              50 clients send 10 requests each
    python3 load_test.py 8080 50 --duration 10   50 clients send what they can for 10 seconds
    python3 load_test.py 8080 50 --rate 5000     5,000 requests a second, whatever the server does

The hard question of a load test is not how to send fast, but who decides when the next request
is sent. There are two answers, and they measure different things.

**Closed model** (the default): each client sends, waits for the answer, then sends again. It
shows how much the server can take. It says little about latency under a given load, because a
slow server slows its own clients down: if it stops for a second, 50 clients have 50 requests
that waited a second, and the thousands that would have arrived meanwhile were never sent. The
percentiles then look fine although every user would have noticed. Gil Tene named this
*coordinated omission*: the tester and the server agree not to measure the bad second.

**Open model** (`--rate R`): real users do not wait for each other, so the send times are fixed
before the run: request k is due at k / R seconds. Its latency counts from that *intended* time,
even if no client was free to send it then; what a user would have waited is what is reported.
The service time, from the actual sending, stands beside it. Where the two differ, requests were
queueing. Requests that were sent late, or not at all, are counted.

Each process drives many clients from one thread: a selector says which sockets have an answer,
and a socket is never waited for. Whatever can be done before the clock starts (JSON, heads) is,
and an answer that equals, byte for byte, one that was already judged is not judged again.

The result is trusted only after an **audit**: the server's own counters, read before and after,
must account for every metric that it acknowledged. What is missing was lost.
"""

import argparse
import bisect
import contextlib
import errno
import gc
import heapq
import http.client
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import select
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_connections
from types import SimpleNamespace
from typing import Any, NamedTuple

clock = time.perf_counter  # the same clock in every process of one machine

TICK_S = 0.25  # how often a process tells its parent how far it is, and looks for time-outs
PROGRESS_S = 1.0
LATE_S = 0.001  # a request sent this long after its intended time is called late
GRACE_S = 1.0  # how long after the end of an open run overdue requests are still sent
CONNECT_PAUSE_S = 0.1  # a refused client does not measure how fast the kernel says no
STOP_S = 3.0  # how long an interrupted run waits for its processes
SETTLE_S = 2.0  # how long the audit waits for the server's counters to catch up
GIVE_UP_S = 10.0  # nothing but failures for this long, or three time-outs: the server is dead

MAX_ANSWER_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 16
PREPARED_METRICS = 100_000  # bounds the memory for request bodies, and the time to make them
PREPARED_BODIES = 1_000
KNOWN_ANSWERS = 1_024

ERROR_CLASSES = ("connect", "timeout", "reset", "bad_response")


# ---------------------------------------------------------------------------------------------
# 1. Options
#
# An option is one row: its name and type in this program, then its name on the command line, the
# values that it may have, its help, and its default. The command line is made from these rows.
# ---------------------------------------------------------------------------------------------


def number(kind: type, minimum: float, maximum: float = 1e9) -> Callable[[str], Any]:
    """Return an argparse type: an int or float within these bounds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {noun} from {minimum:g} to {maximum:,.0f}, not {text!r}"
            )
        return value

    return parse


def option(usage: str, parse: Callable[[str], Any], text: str, default: Any = None) -> Any:
    """Return the row of one option; `usage` is its name, and the name of the value behind it."""
    return field(default=default, metadata={"row": (usage, parse, text)})


COUNT, SECONDS = number(int, 1), number(float, 0.001)
PORT = number(int, 1, 65535)


def ports(text: str) -> tuple[int, ...]:
    """Return ports that stand between commas."""
    return tuple(map(PORT, text.split(",")))


# Half of the cores, for the server needs some too, and no more than four.
DEFAULT_PROCESSES = max(1, min(4, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class Options:
    """What the command line asked for; without a rate it is the closed model."""

    host: str = option("--host HOST", str, "default: %(default)s", "127.0.0.1")
    port: int = option("port", PORT, "default: %(default)s", 8080)
    more_ports: tuple[int, ...] = option(
        "--more-ports P,P", ports, "ports of further servers: clients take turns over all", ()
    )
    clients: int = option("clients", COUNT, "default: %(default)s", 10)
    requests: int | None = option(
        "requests",
        COUNT,
        "for each client (default: 100; without limit where --duration or --rate is given)",
    )
    interval_s: float = option(
        "interval_ms", number(float, 0), "pause of a client after an answer (default: 0)", 0.0
    )
    batch: int = option("--batch N", number(int, 1, 100_000), "metrics a request (default: 3)", 3)
    close: bool = option("--close", bool, "a new connection for each request", False)
    rate_per_s: float | None = option(
        "--rate R", SECONDS, "open model: R requests/s over all clients, at times fixed in advance"
    )
    duration_s: float | None = option(
        "--duration S", SECONDS, "end after S seconds (default with --rate and no requests: 10)"
    )
    timeout_s: float = option(
        "--timeout S", SECONDS, "seconds to wait for an answer (default: 10)", 10.0
    )
    processes: int = option(
        "--processes P",
        number(int, 1, 256),
        "processes that send (default here: %(default)s)",
        DEFAULT_PROCESSES,
    )

    @property
    def host_field(self) -> str:
        """The value of the Host header field: an IPv6 address stands in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def slots(self) -> int:
        """How many requests the open model sends in all: whichever limit comes first."""
        limits = [self.clients * self.requests] if self.requests else []
        if self.rate_per_s and self.duration_s:
            limits.append(math.ceil(self.rate_per_s * self.duration_s))
        return min(limits) if self.rate_per_s else 0


def parse_command_line() -> tuple[Options, argparse.Namespace]:
    """Return the options of the load and all arguments; a mistake ends with exit status 2."""
    cli = argparse.ArgumentParser(
        prog="load_test.py",
        description="Load a metrics server and check that it kept what it acknowledged.",
        epilog="Exit status 0 only if every request succeeded and nothing was lost.",
    )
    add = cli.add_argument
    for row in fields(Options):
        usage, parse, text = row.metadata["row"]
        name, _, value_name = usage.partition(" ")
        value = {"type": parse, "default": row.default, "help": text}
        if parse is bool:
            add(name, action="store_true", help=text)
        elif value_name:
            add(name, dest=row.name, metavar=value_name, **value)
        else:
            add(row.name, metavar=name, nargs="?", **value)
    add("--json", action="store_true", help="print one JSON object instead of the report")
    add("--quiet", action="store_true", help="show no progress")
    args = cli.parse_args()
    args.interval_s /= 1e3  # the command line has milliseconds
    if args.rate_per_s and args.interval_s:
        cli.error("interval_ms paces the closed model and --rate the open one: give one of them")
    if args.requests is None and args.duration_s is None:
        args.duration_s, args.requests = (10.0, None) if args.rate_per_s else (None, 100)
    args.processes = min(args.processes, args.clients)
    return Options(**{row.name: getattr(args, row.name) for row in fields(Options)}), args


# ---------------------------------------------------------------------------------------------
# 2. Requests
#
# A request is a head, which names the client, and a tail, which is the length and the body.
# Heads belong to clients and tails are shared, so that 10,000 clients with batches of 1,000
# metrics need no gigabyte. Joining the two takes 0.1 µs; encoding the JSON would take 4.
# ---------------------------------------------------------------------------------------------

HOSTS = ("web1", "web2", "web3", "api1", "api2", "db1", "db2", "cache1")
REGIONS = ("us-east", "us-west", "eu-west", "ap-south")


def random_metric(rng: random.Random) -> dict[str, Any]:
    """Return one metric as an agent on a host would send it."""
    tags = {"host": rng.choice(HOSTS), "region": rng.choice(REGIONS)}
    name, value, kind = rng.choice(
        (
            ("cpu_usage", round(rng.uniform(1, 99), 2), "gauge"),
            ("memory_usage", rng.randrange(1 << 28, 1 << 34), "gauge"),
            ("disk_usage", round(rng.uniform(5, 95), 1), "gauge"),
            ("requests_total", rng.randrange(1, 1_000_000), "counter"),
            ("request_duration_ms", round(rng.expovariate(1 / 40), 3), "histogram"),
        )
    )
    return {"name": name, "value": value, "type": kind, "tags": tags}


def request_tails(batch: int, seed: int) -> list[bytes]:
    """Return the ends of random requests: Content-Length, the empty line, the body."""
    rng = random.Random(seed)
    tails = []
    for _ in range(max(1, min(PREPARED_BODIES, PREPARED_METRICS // batch))):
        metrics = [random_metric(rng) for _ in range(batch)]
        body = json.dumps({"metrics": metrics}, separators=(",", ":")).encode()
        tails.append(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    return tails


def request_head(options: Options, client_number: int) -> bytes:
    """Return the beginning of every request of one client, up to its Content-Length."""
    connection = "Connection: close\r\n" if options.close else ""
    return (
        f"POST /metrics HTTP/1.1\r\nHost: {options.host_field}\r\n"
        f"Authorization: load_client_{client_number}\r\n"
        f"Content-Type: application/json\r\n{connection}"
    ).encode()


# ---------------------------------------------------------------------------------------------
# 3. Answers
#
# A tester that reads only "200" reports success for answers that were cut short. An answer is
# read here as RFC 9112 frames it, then judged: success is 200 and the right `metrics_processed`.
# ---------------------------------------------------------------------------------------------

STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")


class BadResponse(Exception):
    """The server's bytes are not a complete HTTP answer, or not the right one."""


class Answer(NamedTuple):
    """One HTTP response."""

    status: int
    body: bytes
    keep_alive: bool


def parse_head(head: bytes) -> tuple[int, int, dict[bytes, bytes]]:
    """Return minor version, status, and the header fields by name, all in lower case."""
    status_line, *field_lines = head.split(b"\r\n")
    match = STATUS_LINE.fullmatch(status_line)
    if not match:
        raise BadResponse(f"not a status line: {status_line[:60]!r}")
    header = {}
    for line in field_lines:
        name, _, value = line.partition(b":")
        header[name.lower()] = value.strip().lower()
    return int(match[1]), int(match[2]), header


def read_answer(received: bytes, ended: bool) -> Answer | None:
    """Read the answer that these bytes are, or return None where more have to come.

    `received` is all that came since the request was sent; `ended` says that the server has
    closed the connection. Raises BadResponse for what can't become an answer any more.

    >>> read_answer(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}", ended=False)
    Answer(status=200, body=b'{}', keep_alive=True)
    >>> read_answer(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{", ended=False)
    """
    head, blank_line, body = received.partition(b"\r\n\r\n")
    if len(received) > MAX_ANSWER_BYTES:
        raise BadResponse(f"longer than {MAX_ANSWER_BYTES} bytes")
    if not blank_line:
        if ended:
            raise BadResponse(f"the connection ended within the head: {received[-60:]!r}")
        return None
    minor_version, status, header = parse_head(head)
    if status < 200:  # an interim response, RFC 9110 section 15.2: the answer follows
        return read_answer(body, ended)
    if b"transfer-encoding" in header:
        raise BadResponse("a transfer coding, which this tester does not read")
    connection = header.get(b"connection", b"keep-alive" if minor_version else b"close")
    length = b"0" if status in (204, 304) else header.get(b"content-length")
    if length is None:  # RFC 9112 section 6.3: such a body ends where the connection ends
        return Answer(status, body, keep_alive=False) if ended else None
    if not length.isdigit():
        raise BadResponse(f"Content-Length is not a number: {length[:60]!r}")
    missing_bytes = int(length) - len(body)
    if missing_bytes < 0:
        raise BadResponse(f"{-missing_bytes} bytes more than its Content-Length")
    if missing_bytes > 0:
        if ended:
            raise BadResponse(f"the connection ended {missing_bytes} bytes before the body did")
        return None
    return Answer(status, body, keep_alive=not ended and b"close" not in connection)


def acknowledgement_problem(body: bytes, batch: int) -> str | None:
    """Return why the body of a 200 does not acknowledge exactly `batch` metrics, or None."""
    try:
        acknowledgement = json.loads(body)
    except ValueError:
        return f"200 with a body that is not JSON: {body[:60]!r}"
    if not isinstance(acknowledgement, dict) or acknowledgement.get("success", True) is not True:
        return f"200 without success: {body[:60]!r}"
    processed = acknowledgement.get("metrics_processed")
    if type(processed) is not int or processed != batch:
        return f"200 with metrics_processed {processed!r}, expected {batch}"
    return None


# ---------------------------------------------------------------------------------------------
# 4. Measurements
#
# A histogram holds any number of latencies in constant memory, and those of several processes
# add up exactly; percentiles of percentiles would not. Its buckets grow by 1 % each, so that a
# percentile is right within 0.5 %, at 100 µs as at 10 s (the idea of HdrHistogram and DDSketch).
# ---------------------------------------------------------------------------------------------

BUCKETS_PER_E = 100  # a latency e times as long lies 100 buckets further
PERCENTILES = {"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99.9": 999}  # in thousandths
BAR_BOUNDS_MS = [step * 10.0**decade for decade in range(-1, 5) for step in (1, 2, 5)]
BAR_WIDTH = 40


@dataclass
class LatencyHistogram:
    """How many latencies fell into each of the buckets, with their exact sum and maximum."""

    counts: Counter[int] = field(default_factory=Counter)
    total: int = 0
    sum_s: float = 0.0
    max_s: float = 0.0

    def record(self, latency_s: float) -> None:
        """Count one latency."""
        self.counts[int(math.log1p(latency_s * 1e6) * BUCKETS_PER_E)] += 1
        self.total += 1
        self.sum_s += latency_s
        self.max_s = max(self.max_s, latency_s)

    def add(self, other: "LatencyHistogram") -> None:
        """Count everything that another histogram has counted."""
        self.counts.update(other.counts)
        self.total += other.total
        self.sum_s += other.sum_s
        self.max_s = max(self.max_s, other.max_s)

    def percentile_s(self, thousandths: int) -> float:
        """Return the latency that this share of all latencies does not exceed."""
        rank = math.ceil(self.total * thousandths / 1000)
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                return min(self._middle_s(bucket), self.max_s)
        return self.max_s

    @staticmethod
    def _middle_s(bucket: int) -> float:
        return math.expm1((bucket + 0.5) / BUCKETS_PER_E) * 1e-6

    def summary_ms(self) -> dict[str, float]:
        """Return mean, percentiles and maximum; a percentile needs a latency beyond itself."""
        if not self.total:
            return {}
        summary = {"mean": self.sum_s / self.total * 1e3}
        for name, thousandths in PERCENTILES.items():
            if self.total * (1000 - thousandths) >= 1000:
                summary[name] = self.percentile_s(thousandths) * 1e3
        summary["max"] = self.max_s * 1e3
        return {name: round(value_ms, 3) for name, value_ms in summary.items()}

    def bars(self) -> Iterator[str]:
        """Yield the lines of an ASCII histogram with the bounds 0.1, 0.2, 0.5, 1, 2, 5 … ms."""
        rows = [0] * (len(BAR_BOUNDS_MS) + 1)
        for bucket, count in self.counts.items():
            rows[bisect.bisect_left(BAR_BOUNDS_MS, self._middle_s(bucket) * 1e3)] += count
        filled = [row for row, count in enumerate(rows) if count]
        for row in range(min(filled), max(filled) + 1):
            bound = f"<= {BAR_BOUNDS_MS[row]:g}" if row < len(BAR_BOUNDS_MS) else "more"
            bar = "#" * math.ceil(rows[row] / max(rows) * BAR_WIDTH)
            yield f"{bound:>14} ms {rows[row]:>12,}  {bar}".rstrip()


@dataclass
class Tally:
    """What became of the requests of one process, or of all."""

    accepted: LatencyHistogram = field(default_factory=LatencyHistogram)
    service: LatencyHistogram = field(default_factory=LatencyHistogram)  # open model only
    refused: LatencyHistogram = field(default_factory=LatencyHistogram)
    bad_statuses: Counter[int] = field(default_factory=Counter)  # of answers that were no success
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # kind of failure: the first one
    late: int = 0
    worst_lateness_s: float = 0.0
    unsent: int = 0
    unanswered: int = 0  # in transit when the run was stopped
    duration_s: float = 0.0
    gave_up: bool = False
    interrupted: bool = False
    broken_processes: int = 0  # that ended without a result

    @property
    def total(self) -> int:
        """Requests whose fate is known."""
        return self.accepted.total + self.refused.total + self.errors.total()

    def add(self, other: "Tally") -> None:
        """Count everything that another process has counted."""
        self.accepted.add(other.accepted)
        self.service.add(other.service)
        self.refused.add(other.refused)
        self.bad_statuses.update(other.bad_statuses)
        self.errors.update(other.errors)
        self.examples = other.examples | self.examples
        self.late += other.late
        self.worst_lateness_s = max(self.worst_lateness_s, other.worst_lateness_s)
        self.unsent += other.unsent
        self.unanswered += other.unanswered
        self.duration_s = max(self.duration_s, other.duration_s)
        self.gave_up = self.gave_up or other.gave_up


# ---------------------------------------------------------------------------------------------
# 5. The loop: many clients, one thread
#
# Every client is in one of two states: it waits for an answer, or it is in the heap `free`,
# ordered by the time from which it may send. The closed model sends as soon as a client is
# free; the open model needs a free client and a slot of the schedule that is due.
# ---------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """Where the servers listen, as `socket` wants it."""

    family: int
    addresses: list[Any]  # (host, port), and two numbers more for IPv6


@dataclass(slots=True, eq=False)
class Client:
    """One simulated client and its connection."""

    number: int
    head: bytes
    remaining: int  # requests that it may still send
    sock: socket.socket | None = None
    connected: bool = False
    awaiting: bool = False
    unsent: memoryview | None = None  # what the socket did not take yet
    received: bytes = b""  # an answer's beginning
    intended_s: float = 0.0
    sent_s: float = 0.0


class LoadLoop:
    """Sends the requests of one process's share of the clients and counts their answers."""

    def __init__(self, options: Options, server: Server, process: int, control: Connection):
        self.options = options
        self.server = server
        self.control = control  # anything that comes from the parent means: stop
        self.tally = Tally()
        self.tails = itertools.cycle(request_tails(options.batch, seed=process))
        numbers = range(process + 1, options.clients + 1, options.processes)
        requests = options.requests or sys.maxsize
        self.clients = [Client(n, request_head(options, n), requests) for n in numbers]
        self.rate_per_s = options.rate_per_s or 0.0
        self.open_model = self.rate_per_s > 0
        # The slots of the schedule go round all clients, so each process has those of its own.
        rounds, rest = divmod(options.slots(), options.clients)
        self.unsent_slots = rounds * len(numbers) + sum(number <= rest for number in numbers)
        self.sent_slots = 0
        self.awaiting = 0  # clients that wait for an answer
        self.selector = selectors.DefaultSelector()
        self.known_good: set[bytes] = set()
        self.seen_answers = 0
        self.failing_since_s = math.inf

    def run(self, start_s: float) -> Tally:
        """Send everything from `start_s` on and return when the last answer is in."""
        self.start_s = start_s
        self.end_s = start_s + (self.options.duration_s or math.inf)
        self.end_s += GRACE_S if self.open_model else 0
        self.free = [(start_s, client.number, client) for client in self.clients]
        self.next_tick_s = start_s
        self._send_what_is_due()
        while self.awaiting or self._next_send_s() < math.inf:
            for key, events in self._wait():
                if events & selectors.EVENT_WRITE and key.data.unsent:
                    self._transmit(key.data, key.data.unsent)
                if events & selectors.EVENT_READ and key.data.sock is key.fileobj:
                    self._receive(key.data)
            if clock() >= self.next_tick_s and not self._tick():
                break
            self._send_what_is_due()
        self._finish()
        return self.tally

    # -- when to send

    def _slot_s(self) -> float:
        """The intended time of the next request of the open model."""
        rounds, turn = divmod(self.sent_slots, len(self.clients))
        slot = rounds * self.options.clients + self.clients[turn].number - 1
        return self.start_s + slot / self.rate_per_s

    def _next_send_s(self) -> float:
        """When a free client sends the next request; infinity: none is free or nothing is left."""
        if not self.free or (self.open_model and not self.unsent_slots):
            return math.inf
        free_s = self.free[0][0]
        return max(free_s, self._slot_s()) if self.open_model else free_s

    def _send_what_is_due(self) -> None:
        now_s = clock()
        if now_s >= self.end_s:
            self.free.clear()
        while self.free and self._next_send_s() <= now_s:
            self._send(heapq.heappop(self.free)[2])

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Sleep until a socket is ready, a request is due or a tick; return ready sockets."""
        wake_s = min(self._next_send_s(), self.next_tick_s)
        timeout_s = max(wake_s - clock(), 0)
        if timeout_s > 0 and wake_s < self.next_tick_s and hasattr(self.selector, "fileno"):
            # epoll counts in whole milliseconds, too coarse for a send time. select() takes
            # microseconds and can watch the epoll object: sent 0.1 ms late instead of 1 ms.
            select.select([self.selector.fileno()], [], [], timeout_s)
            timeout_s = 0
        return self.selector.select(timeout_s)

    def _tick(self) -> bool:
        """Do what need not be done for each request; return whether to go on."""
        now_s = clock()
        self.next_tick_s = now_s + TICK_S
        timeout_s = self.options.timeout_s
        for client in self.clients:
            if client.awaiting and now_s - client.sent_s > timeout_s:
                if client.connected:
                    self._fail(client, "timeout", f"no answer within {timeout_s:g} s")
                else:
                    self._fail(client, "connect", f"no connection within {timeout_s:g} s")
        self.tally.duration_s = now_s - self.start_s
        self.control.send((False, self.tally))
        parent = multiprocessing.parent_process()
        if self.control.poll() or (parent is not None and not parent.is_alive()):
            return False
        answers = self.tally.accepted.total + self.tally.refused.total
        if answers > self.seen_answers:
            self.seen_answers, self.failing_since_s = answers, math.inf
        self.tally.gave_up = now_s - self.failing_since_s > max(GIVE_UP_S, 3 * timeout_s)
        return not self.tally.gave_up

    def _finish(self) -> None:
        now_s = clock()
        self.tally.duration_s = now_s - self.start_s
        self.tally.unanswered = self.awaiting
        if self.tally.gave_up or now_s >= self.end_s:
            self.tally.unsent = self.unsent_slots
        if self.tally.gave_up and self.options.requests and not self.open_model:
            self.tally.unsent = sum(client.remaining for client in self.clients)
        for client in self.clients:
            self._disconnect(client)
        self.selector.close()

    # -- sending

    def _send(self, client: Client) -> None:
        """Send the next request."""
        client.awaiting = True
        self.awaiting += 1
        client.remaining -= 1
        client.sent_s = client.intended_s = clock()
        if self.open_model:
            client.intended_s = self._slot_s()
            self.sent_slots += 1
            self.unsent_slots -= 1
            lateness_s = client.sent_s - client.intended_s
            if lateness_s > LATE_S:
                self.tally.late += 1
                self.tally.worst_lateness_s = max(self.tally.worst_lateness_s, lateness_s)
        request = client.head + next(self.tails)
        try:
            if client.sock is None:
                self._connect(client)
        except OSError as error:
            self._fail_with(client, error)
        else:
            self._transmit(client, request)  # a connection on loopback is often there at once

    def _connect(self, client: Client) -> None:
        """Begin to connect without waiting; raise OSError where that fails at once."""
        client.connected = False
        client.sock = socket.socket(self.server.family, socket.SOCK_STREAM)
        client.sock.setblocking(False)
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(client.sock, selectors.EVENT_READ, client)
        addresses = self.server.addresses
        error_number = client.sock.connect_ex(addresses[client.number % len(addresses)])
        if error_number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            raise OSError(error_number, os.strerror(error_number))

    def _transmit(self, client: Client, unsent: bytes | memoryview) -> None:
        """Send what the socket takes now; the rest follows when the socket is writable."""
        assert client.sock is not None
        try:
            sent_bytes = client.sock.send(unsent)
            client.connected = True
        except BlockingIOError:
            sent_bytes = 0
        except OSError as error:
            if not client.connected:
                self._fail_with(client, error)
                return
            # The server may have answered (413, say) before it hung up: let _receive see.
            sent_bytes = len(unsent)
        if sent_bytes < len(unsent):
            client.unsent = memoryview(unsent)[sent_bytes:]
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            self.selector.modify(client.sock, both, client)
        elif client.unsent is not None:
            client.unsent = None
            self.selector.modify(client.sock, selectors.EVENT_READ, client)

    def _disconnect(self, client: Client) -> None:
        if client.sock is not None:
            self.selector.unregister(client.sock)
            client.sock.close()
            client.sock = None

    # -- receiving

    def _receive(self, client: Client) -> None:
        assert client.sock is not None
        try:
            received = client.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail_with(client, error)
            return
        now_s = clock()
        # Judging an answer takes 4 µs, recognising one that was judged before 0.1 µs.
        if received in self.known_good and client.awaiting and not client.received:
            self._accept(client, now_s, keep_alive=not self.options.close)
        elif not client.awaiting or not (received or client.received):
            self._fail(client, "reset", "the connection was closed without an answer")
        else:
            self._read(client, received, now_s)

    def _read(self, client: Client, received: bytes, now_s: float) -> None:
        """Read and judge an answer, or its part, that was not seen before."""
        is_whole = not client.received
        client.received += received
        try:
            answer = read_answer(client.received, ended=not received)
        except BadResponse as problem:
            self._fail(client, "bad_response", str(problem))
            return
        if answer is None:
            return
        keep_alive = answer.keep_alive and not self.options.close
        if answer.status != 200:
            self._refuse(client, answer, now_s, keep_alive)
        elif problem_text := acknowledgement_problem(answer.body, self.options.batch):
            self.tally.bad_statuses[200] += 1
            self._fail(client, "bad_response", problem_text)
        else:
            if is_whole and keep_alive != self.options.close:
                if len(self.known_good) >= KNOWN_ANSWERS:
                    self.known_good.clear()
                self.known_good.add(received)
            self._accept(client, now_s, keep_alive)

    def _refuse(self, client: Client, answer: Answer, now_s: float, keep_alive: bool) -> None:
        self.tally.bad_statuses[answer.status] += 1
        self.tally.refused.record(now_s - client.intended_s)
        example = answer.body[:200].decode("utf-8", "replace").strip()
        self.tally.examples.setdefault(f"status {answer.status}", example)
        self._release(client, now_s, keep_alive)

    def _accept(self, client: Client, now_s: float, keep_alive: bool) -> None:
        self.tally.accepted.record(now_s - client.intended_s)
        if self.open_model:
            self.tally.service.record(now_s - client.sent_s)
        self._release(client, now_s, keep_alive)

    def _fail_with(self, client: Client, error: OSError) -> None:
        self._fail(client, "reset" if client.connected else "connect", str(error))

    def _fail(self, client: Client, error_class: str, example: str) -> None:
        if not client.awaiting:  # the server ends an idle connection, as it may
            self._disconnect(client)
            return
        now_s = clock()
        self.failing_since_s = min(self.failing_since_s, now_s)
        self.tally.errors[error_class] += 1
        self.tally.examples.setdefault(error_class, example)
        pause_s = CONNECT_PAUSE_S if error_class == "connect" else 0
        self._release(client, now_s + pause_s, keep_alive=False)

    def _release(self, client: Client, free_s: float, keep_alive: bool) -> None:
        """Let the client send again, from `free_s` on."""
        client.awaiting = False
        self.awaiting -= 1
        client.received = b""
        if not keep_alive or client.unsent is not None:
            client.unsent = None
            self._disconnect(client)
        if client.remaining:
            free_s += self.options.interval_s
            heapq.heappush(self.free, (free_s, client.number, client))


# ---------------------------------------------------------------------------------------------
# 6. Processes
#
# One interpreter sends what one core can. Each process runs a loop with its share of the
# clients (and of the open model's slots) and sends its tally to the parent at every tick. The
# parent only adds up and shows. So Ctrl-C loses nothing, not even with a process that hangs.
# ---------------------------------------------------------------------------------------------


def run_process(options: Options, server: Server, process: int, control: Connection) -> None:
    """Run one process's share: prepare, say so, wait for the start time, send the tally."""
    loop = LoadLoop(options, server, process, control)
    gc.freeze()  # what was prepared stays: no pause to look through it during the run
    try:
        control.send((False, loop.tally))
        start_s = control.recv()
        time.sleep(max(0, start_s - clock()))
        control.send((True, loop.run(start_s)))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone, and with it whoever wanted to know


class LoadRun:
    """The processes of a run, and the newest tally of each."""

    def __init__(self, options: Options, server: Server):
        # Ctrl-C reaches every process of the terminal. The parent alone reacts, and tells the
        # others, which inherit that they ignore it.
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.controls: list[Connection] = []
        self.tallies: dict[Connection, Tally] = {}
        self.unfinished: list[Connection] = []
        for number in range(options.processes):
            ours, theirs = multiprocessing.Pipe()
            multiprocessing.Process(
                target=run_process, args=(options, server, number, theirs), daemon=True
            ).start()
            theirs.close()  # so that the end of the process is seen as the end of the pipe
            self.controls.append(ours)
        signal.signal(signal.SIGINT, on_interrupt)
        self.interrupted = False
        self.broken_processes = 0

    def start(self) -> None:
        """Wait until everything is prepared, then let all processes begin at one moment."""
        prepared = [control for control in self.controls if not self._take(control)]
        start_s = clock() + 0.02
        for control in prepared:
            control.send(start_s)
            self.unfinished.append(control)

    def wait(self, timeout_s: float) -> bool:
        """Take in what comes within this time; return whether all processes are done."""
        deadline_s = clock() + timeout_s
        while self.unfinished and (left_s := deadline_s - clock()) > 0:
            for control in wait_for_connections(self.unfinished, left_s):
                assert isinstance(control, Connection)
                if self._take(control):
                    self.unfinished.remove(control)
        return not self.unfinished

    def _take(self, control: Connection) -> bool:
        """Take in one message; return whether it was the last."""
        try:
            message: tuple[bool, Tally] = control.recv()
        except (EOFError, ConnectionResetError):
            self.broken_processes += 1
            return True
        done, self.tallies[control] = message
        return done

    def stop(self) -> None:
        """End the run before its time and take in what there is."""
        for control in self.unfinished:
            with contextlib.suppress(OSError):  # it may just have ended by itself
                control.send("stop")
        self.wait(STOP_S)
        for process in multiprocessing.active_children():
            process.kill()

    def tally(self) -> Tally:
        """Return the sum over all processes, as far as they have told."""
        tally = Tally(interrupted=self.interrupted, broken_processes=self.broken_processes)
        for part in self.tallies.values():
            tally.add(part)
        return tally


class Progress:
    """One line a second on stderr; on a terminal always the same line."""

    def __init__(self) -> None:
        self.shown = (0.0, 0)  # seconds, requests
        self.start, self.end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")

    def show(self, tally: Tally) -> None:
        """Show how the last second went."""
        shown_s, shown_total = self.shown
        self.shown = (tally.duration_s, tally.total)
        rate_per_s = (tally.total - shown_total) / max(tally.duration_s - shown_s, 1e-9)
        failed = tally.total - tally.accepted.total
        line = f"{tally.duration_s:6.1f} s  {tally.total:,} requests  {rate_per_s:,.0f}/s"
        print(f"{self.start}{line}  {failed:,} failed", end=self.end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the terminal's line empty for what follows."""
        print(end=self.start, file=sys.stderr, flush=True)


def run_load(options: Options, server: Server, progress: Progress | None) -> Tally:
    """Run the whole load and return the sum; Ctrl-C ends it early."""
    run = LoadRun(options, server)
    try:
        run.start()
        while not run.wait(PROGRESS_S):
            if progress:
                progress.show(run.tally())
    except KeyboardInterrupt:
        run.interrupted = True
    if progress:
        progress.clear()
    run.stop()
    return run.tally()


# ---------------------------------------------------------------------------------------------
# 7. Audit
#
# A server that answers 200 and drops the metrics is fast. Its counters, read before and after
# the run, have to have grown by what it acknowledged. They may have grown by more: other clients
# may write at the same time, and an answer that got lost is an accepted request too.
# ---------------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """The server's own counters since its start."""

    metrics_received: int
    batches_processed: int


class Audit(NamedTuple):
    """What the counters say; `lost` and `surplus` are None where they could not be compared."""

    verdict: str
    passed: bool = False
    lost: int | None = None
    surplus: int | None = None


class NoStatistics(Exception):
    """The server could not be asked, or has no such counters."""


def fetch_statistics(options: Options) -> Statistics:
    """Read the counters of all servers, or raise NoStatistics with the reason."""
    shares = [fetch_counters(options, port) for port in (options.port, *options.more_ports)]
    return Statistics(*map(sum, zip(*shares)))


def fetch_counters(options: Options, port: int) -> Statistics:
    """Read one server's counters, or raise NoStatistics with the reason."""
    connection = http.client.HTTPConnection(options.host, port, options.timeout_s)
    header = {"Authorization": "load_audit", "Connection": "close"}
    try:
        connection.request("GET", "/metrics", headers=header)
        answer = connection.getresponse()
        counters = json.loads(answer.read(MAX_ANSWER_BYTES)) if answer.status == 200 else {}
        return Statistics(int(counters["metrics_received"]), int(counters["batches_processed"]))
    except (OSError, http.client.HTTPException) as problem:
        raise NoStatistics(f"GET /metrics failed: {problem}") from None
    except (ValueError, KeyError, TypeError):
        raise NoStatistics("GET /metrics gives no metrics_received and batches_processed") from None
    finally:
        connection.close()


def audit(options: Options, before: Statistics | None, tally: Tally) -> Audit:
    """Compare the server's counters with what it acknowledged during the run."""
    if before is None:
        return Audit("not possible: the server showed no statistics", passed=True)
    batches = tally.accepted.total
    deadline_s = clock() + SETTLE_S
    while True:
        try:
            after = fetch_statistics(options)
        except NoStatistics as problem:
            return Audit(f"not possible after the run: {problem}")
        more_batches = after.batches_processed - before.batches_processed - batches
        more_metrics = after.metrics_received - before.metrics_received - batches * options.batch
        if min(more_batches, more_metrics) >= 0 or clock() >= deadline_s:
            break
        time.sleep(0.05)
    if after.metrics_received < before.metrics_received:
        return Audit(
            "not possible: the counters went back, so the server was restarted during the run"
        )
    acknowledged = f"{batches * options.batch:,} metrics acknowledged"
    lost = max(0, -more_metrics, -more_batches * options.batch)
    if lost:
        return Audit(f"LOST {lost:,} of {acknowledged}", lost=lost, surplus=0)
    verdict = f"{acknowledged}, all accounted for"
    if more_metrics:
        verdict += f", and {more_metrics:,} more: of other clients, or whose answer did not arrive"
    return Audit(verdict, passed=True, lost=0, surplus=more_metrics)


# ---------------------------------------------------------------------------------------------
# 8. Report
# ---------------------------------------------------------------------------------------------


def describe_model(options: Options) -> str:
    """Say in one sentence how the load was made, for it decides what the figures mean."""
    connections = "a new connection for each request" if options.close else "keep-alive"
    clients = f"{options.clients:,} clients, {connections}, {options.batch:,} metrics a request"
    processes = f"{options.processes} process{'es' if options.processes > 1 else ''}"
    if options.rate_per_s is None:
        pause = f" and {options.interval_s * 1e3:g} ms have passed" if options.interval_s else ""
        how = f"Closed model: a client sends again when it is answered{pause}"
    else:
        how = f"Open model: {options.rate_per_s:,g} requests/s at times fixed in advance"
    return f"{how}\n{clients}, {processes}"


def report_figures(options: Options, tally: Tally, result: Audit) -> dict[str, Any]:
    """Return all figures of a run: `--json` prints them, `report_lines` formats them."""
    successful, total = tally.accepted.total, tally.total
    duration_s = max(tally.duration_s, 1e-9)
    statuses = tally.bad_statuses + Counter({200: successful})
    figures: dict[str, Any] = {
        "model": "closed" if options.rate_per_s is None else "open",
        "options": asdict(options),
        "duration_s": round(tally.duration_s, 3),
        "total": total,
        "successful": successful,
        "failed": total - successful,
        "success_rate": successful / total if total else None,
        "attempted_per_second": round(total / duration_s, 1),
        "accepted_per_second": round(successful / duration_s, 1),
        "metrics_per_second": round(successful * options.batch / duration_s, 1),
        "latency_ms": tally.accepted.summary_ms(),
        "refused_latency_ms": tally.refused.summary_ms(),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "errors": {name: tally.errors[name] for name in ERROR_CLASSES},
        "examples": tally.examples,
        "unsent": tally.unsent,
        "unanswered": tally.unanswered,
        "lost": result.lost,
        "surplus": result.surplus,
        "audit": result.verdict,
        "gave_up": tally.gave_up,
        "interrupted": tally.interrupted,
        "broken_processes": tally.broken_processes,
    }
    if options.rate_per_s is not None:
        figures["service_time_ms"] = tally.service.summary_ms()
        figures["late"] = tally.late
        figures["worst_lateness_ms"] = round(tally.worst_lateness_s * 1e3, 3)
    return figures


def format_statuses(statuses: dict[str, int]) -> str:
    """Format the counts by status: 429 means too fast, another 4xx means wrong."""
    remarks = {"429": " (over the rate limit)"}
    parts = [f"{status}: {count:,}{remarks.get(status, '')}" for status, count in statuses.items()]
    others = sum(statuses[status] for status in statuses if status[0] == "4" and status != "429")
    if others:
        parts.append(f"4xx other than 429: {others:,}")
    return ", ".join(parts) or "none"


def format_errors(errors: dict[str, int], examples: dict[str, str]) -> str:
    """Format the counts of errors; a line for the first failure of each kind follows."""
    counts = [f"{kind.replace('_', ' ')}: {count:,}" for kind, count in errors.items() if count]
    firsts = [f"  first {kind.replace('_', ' ')}: {text}" for kind, text in examples.items()]
    return "\n".join([", ".join(counts) or "none", *firsts])


def format_latencies(summary_ms: dict[str, float]) -> str:
    """Format latencies in milliseconds; what the sample does not support is not there."""
    return "  ".join(
        f"{name} {ms:,.3g}" if ms < 100 else f"{name} {ms:,.0f}" for name, ms in summary_ms.items()
    )


def request_rows(run: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """Yield label and text of each line about the requests."""
    yield "duration", f"{run.duration_s:.2f} s"
    yield "requests", f"{run.total:,} in all, {run.successful:,} successful, {run.failed:,} failed"
    yield "success rate", f"{run.success_rate:.2%}" if run.total else "none"
    attempted, accepted = run.attempted_per_second, run.accepted_per_second
    yield "requests/s", f"{attempted:,.0f} attempted, {accepted:,.0f} accepted"
    yield "metrics/s", f"{run.metrics_per_second:,.0f}"
    yield "statuses", format_statuses(run.statuses)
    yield "errors", format_errors(run.errors, run.examples)
    if run.model == "open":
        worst = f", the worst {run.worst_lateness_ms:,.1f} ms" if run.late else ""
        yield "sent late", f"{run.late:,} by more than {LATE_S * 1e3:g} ms{worst}"
    if run.unsent:
        why = "the run was given up" if run.gave_up else "no client was free in time"
        yield "not sent", f"{run.unsent:,}: {why}, so the latencies flatter the server"
    yield "audit", run.audit


def latency_rows(run: SimpleNamespace) -> Iterator[tuple[str, str]]:
    """Yield label and text of each line of latencies."""
    if run.model == "open":
        yield "latency ms", format_latencies(run.latency_ms) + "  (from the intended time)"
        yield "service time ms", format_latencies(run.service_time_ms) + "  (from sending)"
    else:
        yield "latency ms", format_latencies(run.latency_ms)
    if run.refused_latency_ms:
        yield "refused ms", format_latencies(run.refused_latency_ms)


def report_lines(options: Options, figures: dict[str, Any], bars: Iterator[str]) -> Iterator[str]:
    """Yield the report for people."""
    run = SimpleNamespace(**figures)
    yield describe_model(options)
    if run.interrupted:
        yield f"INTERRUPTED: what there is so far; {run.unanswered:,} requests not yet answered"
    if run.gave_up:
        yield "GAVE UP: for too long there was no answer at all"
    if run.broken_processes:
        yield f"BROKEN load processes: {run.broken_processes}; their last figures are missing"
    for rows in (request_rows, latency_rows) if run.successful else (request_rows,):
        yield ""
        yield from (f"{label:<18}{text}" for label, text in rows(run))
    if run.successful:
        yield ""
        yield from bars


# ---------------------------------------------------------------------------------------------
# 9. Start
# ---------------------------------------------------------------------------------------------


def fail(message: str) -> SystemExit:
    """Return what ends the program with one line on stderr and exit status 1."""
    return SystemExit(f"load_test.py: {message}")


def find_server(options: Options) -> Server:
    """Return the first address of the host at which something listens, for each port."""
    addresses = []
    for port in (options.port, *options.more_ports):
        try:
            with socket.create_connection((options.host, port), options.timeout_s) as probe:
                addresses.append(probe.getpeername())
                family = probe.family
        except socket.gaierror as problem:
            raise fail(f"host {options.host} is not known: {problem.strerror}") from None
        except OSError as problem:
            where = options.host_field.removesuffix(str(options.port)) + str(port)
            advice = f"start one with: python3 metricstream.py {port}"
            raise fail(f"no server at {where} ({problem}); {advice}") from None
    return Server(family, addresses)


def allow_open_files(needed: int) -> None:
    """Raise the limit of open files of this and the load processes, where there is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise fail(
            f"too many clients: {needed:,} open files needed, {hard:,} allowed "
            "(see ulimit -n); use fewer clients or more --processes"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def say(text: str) -> None:
    """Print; a reader that has left (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit


def main() -> int:
    """Run the test that the command line asks for; return the exit status."""
    options, args = parse_command_line()
    allow_open_files(options.clients // options.processes + 100)
    server = find_server(options)
    try:
        before: Statistics | None = fetch_statistics(options)
    except NoStatistics:
        before = None
    tally = run_load(options, server, None if args.quiet else Progress())
    result = audit(options, before, tally)
    figures = report_figures(options, tally, result)
    report = report_lines(options, figures, tally.accepted.bars())
    say(json.dumps(figures) if args.json else "\n".join(report))
    if tally.interrupted:
        return 130
    all_well = 0 < tally.total == tally.accepted.total and not tally.unsent
    return 0 if all_well and result.passed and not tally.broken_processes else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
