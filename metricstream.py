#!/usr/bin/env python3
"""MetricStream: one file, no dependencies. Ingest, limit, store, query, watch, forward.

    python3 metricstream.py                      serve on http://127.0.0.1:8080
    curl localhost:8080/metrics -H 'Content-Type: application/json' \\
         -d '{"metrics":[{"name":"cpu_usage","value":75.5,"tags":{"host":"web1"}}]}'
    tail metrics.jsonl                           what was acknowledged, one JSON object a line
    curl localhost:8080/api/v1/query -d 'query=cpu_usage'       ask for it, in PromQL

The way of one POST, from the socket to the disk and back, with the chapter of each step:

    14   _Workers._work                      a worker's loop
    12     Connections.claim_ready             epoll names what is readable
    13     Turns.take_turn, _serve             a turn for each: recv() once, answer whole requests
    2        RequestReader.whole_request         bytes → the Request that came alone, or
    2        RequestReader.next_request          → the next whole one, or None: wait for more
    11       Service.answer                      which client it is, and which route
    11         Service.ingest                      the pipeline: read this function first
    10           refuse_other_origins                a browser page of elsewhere? 403
    3            SlidingWindowLimiter.decide         allowed? or 429
    11           require_json                        or 415
    2            decode_content                      gzip undone, within 1 MiB
    6            read_body                           JSON → a Batch of lines, by one of two ways:
    6              fast_batch                          one regular expression for the usual shape
    4              parse_json                          else values,
    5              read_batch                          then samples, or every reason why not,
    6              log_line                            then a line for each
    11           Service.check_batch                 too many series? the store says how many more
    13     Turns.end_round                       when all that were ready have had their turn:
    11       Service.store                         the lines of up to 16 batches
    8          MetricLog.append                      write(); or LogError
    13       Turns.on_durable                      at level disk: the rest, after the sync
    2        Response.encode                       head and body in one piece
    12       Connection.flush                      send()
    12       Connections.park_all                  wait for the next request
    9        Statistics.count                      an event into the ring for each

That is part I, a complete server by itself. The log is the seam: a second process follows it, keeps
series, and answers queries (parts II and III); no query can hold up ingestion. Another evaluates
rules and tells of alerts (part IV), others send what the log holds on to a cluster (part V).

A chapter uses only chapters above it. For the flow of a request, follow the map.
`grep -nE '^# (PART|[0-9]+\\.)' metricstream.py` prints the table of contents.
"""

import argparse
import asyncio
import base64
import calendar
import contextlib
import dataclasses
import datetime
import decimal
import difflib
import email.message
import email.policy
import email.utils
import errno
import fcntl
import fractions
import functools
import gc
import glob
import gzip
import hashlib
import heapq
import hmac
import http
import http.client
import ipaddress
import itertools
import logging
import marshal
import math
import operator
import os
import queue
import random
import re
import resource
import secrets
import select
import signal
import smtplib
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.parse
import uuid
import zlib
import zoneinfo
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

__version__ = "1.0.0"

logger = logging.getLogger("metricstream")


def log_unexpected(error: BaseException) -> None:
    """Log an error that is a fault of ours: with its traceback, in one line."""
    logger.error("unexpected error: %r", "".join(traceback.format_exception(error)))


def attempt(job: Callable[[], object]) -> object:
    """Do one of several jobs. If it fails this is logged, and keeps nobody from the others."""
    try:
        return job()
    except Exception as error:
        log_unexpected(error)
        return None


# ==================================================================================================
# PART I. INGESTION
# ==================================================================================================


# ==================================================================================================
# 1. Request heads
# ==================================================================================================
#
# The problem: two parties who disagree on what a request says, or on where it ends, can be made to
# see different requests (request smuggling). The idea: the grammar of the RFCs as regular
# expressions; whatever is ambiguous is refused, never repaired. What this costs: a few clients that
# other servers tolerate are told to mend their requests.
#
# The names are those of RFC 9110 (semantics) and RFC 9112 (HTTP/1.1 on the wire).

MAX_TARGET_BYTES = 8_000
MAX_REQUEST_LINE_BYTES = MAX_TARGET_BYTES + 64  # room for method, version and two spaces
MAX_HEADER_BYTES = 16 * 1024  # also of the trailer section and of chunk extensions
MAX_HEADER_FIELDS = 100
MAX_BODY_BYTES = 1024 * 1024  # as sent, and again after gzip is undone

_TCHAR = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"
_REQUEST_LINE = re.compile(rb"([%b]{1,32}) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])" % _TCHAR)
_FIELD_LINE = re.compile(rb"([%b]+):([^\x00-\x08\x0a-\x1f\x7f]*)" % _TCHAR)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})((?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?)")
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?"
)
_ABSOLUTE_FORM = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Bytes no line may contain. A client that sends one gets its 400 at once; we do not wait for the
# rest.
_NEVER_IN_A_LINE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?=[^\n])")

_SINGLETONS = frozenset({"host", "authorization", "content-type", "origin"})

KEEP, CLOSE, KEEP_1_0 = b"", b"Connection: close\r\n", b"Connection: keep-alive\r\n"


class HTTPError(Exception):
    """A request that gets an error status.

    `status` is the code, the text of the exception the reason, and `fields` are further header
    fields of the answer as (name, value). Raised by `RequestReader` it also means that the
    connection must be closed after the answer.
    """

    def __init__(self, status: int, reason: str, *, fields: Iterable[tuple[str, str]] = ()):
        super().__init__(reason)
        self.status, self.fields = status, tuple(fields)


class Head(NamedTuple):
    """The parsed head of a request: all of it but the body."""

    method: str
    path: str  # percent-decoded, without the query
    query: str  # what follows the first "?", not decoded
    host: str  # from an absolute-form target, else from Host; "" only in HTTP/1.0
    headers: dict[str, str]  # by lower-case name; repeated fields are joined with ", "
    content_length: int | None  # 0 if there is no body; None if it is chunked
    expects_continue: bool  # until it got its `100 Continue`
    persistence: bytes  # the Connection field line of the answer: KEEP, CLOSE or KEEP_1_0


def parse_head(section: bytes) -> Head:
    """Parse the request line and header section: every line with its CRLF, without the empty line.

    >>> head = parse_head(b"POST /metrics?x=1 HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 5\\r\\n")
    >>> head.method, head.path, head.query, head.content_length, head.headers["host"]
    ('POST', '/metrics', 'x=1', 5, 'a')

    Raises HTTPError (400, 411, 413, 414, 417, 431, 501, 505). Source: RFC 9112, sections 2 to 7.
    """
    _refuse_controls(section)  # first, so that a head gets the same error in one piece or in many
    request_line, *field_lines = section.split(b"\r\n")[:-1]
    method, target, version = _parse_request_line(request_line)
    _bound("header section", len(section) - len(request_line) - 2)
    headers = _parse_fields(field_lines)
    host, path, query = _parse_target(method, target, _host_field(headers, version))
    content_length = _framing(method, version, headers)
    expectation = headers.get("expect") if version == "1.1" else None  # RFC 9110, 10.1.1
    if expectation is not None and expectation.lower() != "100-continue":
        raise HTTPError(417, f"unknown expectation {expectation[:80]!r}; known is 100-continue")
    return Head(
        method, path, query, host, headers,
        content_length, expectation is not None, _persistence(version, headers),
    )  # fmt: skip


# 0.2 µs instead of 8: clients repeat their heads, byte for byte. Only short ones are kept, so that
# strangers can't fill the memory with long ones.
MEMO_HEAD_BYTES = 1024
known_head = functools.lru_cache(maxsize=2048)(parse_head)


def _parse_request_line(line: bytes) -> tuple[str, str, str]:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        form = "'method SP request-target SP HTTP/1.1'"
        raise HTTPError(400, f"request line must be {form}, found {_shown(line)}")
    method, target, version = match.groups()
    if len(target) > MAX_TARGET_BYTES:
        raise HTTPError(414, f"request target of {len(target)} bytes; at most {MAX_TARGET_BYTES}")
    if version not in (b"1.0", b"1.1"):
        found = version.decode()
        raise HTTPError(505, f"HTTP/{found} is not spoken here; HTTP/1.1 and HTTP/1.0 are")
    return method.decode(), target.decode(), version.decode()


def _parse_target(method: str, target: str, host: str) -> tuple[str, str, str]:
    """(host, decoded path, query) of a target in origin form, absolute form or, for OPTIONS, `*`:
    RFC 9112, 3.2.
    """
    if method == "CONNECT":
        raise HTTPError(400, "CONNECT is for proxies; this is none")
    if target == "*" and method == "OPTIONS":
        return host, "*", ""
    rest = target
    if not target.startswith("/"):
        absolute = _ABSOLUTE_FORM.fullmatch(target)
        if absolute is None:
            found = _shown(target.encode())
            raise HTTPError(400, f"request target must start with '/' or 'http://', found {found}")
        host, rest = absolute.groups()
        if not _HOST.fullmatch(host):
            raise HTTPError(400, f"invalid authority {host[:80]!r} in the request target")
    if "#" in rest or _BAD_PERCENT.search(rest):
        raise HTTPError(400, "request target holds '#' or a '%' that two hex digits do not follow")
    path, _, query = rest.partition("?")
    if "%" in path:
        try:
            path = _PERCENT.sub(lambda match: bytes((int(match[1], 16),)), path.encode()).decode()
        except UnicodeDecodeError:
            raise HTTPError(400, "percent-encoded path is not UTF-8") from None
        if _CONTROL.search(path):
            raise HTTPError(400, "percent-encoded control character in the path")
    return host, path or "/", query


def _parse_fields(lines: list[bytes]) -> dict[str, str]:
    """The field lines of a header section by lower-case name: RFC 9112, 5 and RFC 9110, 5."""
    if len(lines) > MAX_HEADER_FIELDS:
        raise HTTPError(431, f"more than {MAX_HEADER_FIELDS} header fields")
    fields: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, value = _parse_field(line, f"header field {number}")
        if name not in fields:
            fields[name] = value
        elif name in _SINGLETONS:
            raise HTTPError(400, f"header field {number}: {name} is repeated")
        else:
            fields[name] = f"{fields[name]}, {value}"
    return fields


def _parse_field(line: bytes, what: str) -> tuple[str, str]:
    """(lower-case name, value) of one field line; `what` says which one it is."""
    match = _FIELD_LINE.fullmatch(line)
    if match is None:
        raise HTTPError(400, f"{what}: {_fault_in_field(line)}: {_shown(line)}")
    return match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")


def _fault_in_field(line: bytes) -> str:
    name, colon, _ = line.partition(b":")
    if line[:1] in (b" ", b"\t"):
        return "folded lines (obs-fold) are not accepted"
    if not colon:
        return "no colon"
    if name != name.rstrip(b" \t"):
        return "white space before the colon"
    if not name or re.search(rb"[^%b]" % _TCHAR, name):
        return "invalid field name"
    return "control character in the value"


def _host_field(headers: dict[str, str], version: str) -> str:
    if "host" not in headers and version == "1.0":
        return ""
    if "host" not in headers:
        raise HTTPError(400, "no Host header field; HTTP/1.1 requires one")
    if not _HOST.fullmatch(headers["host"]):
        raise HTTPError(400, f"invalid Host {headers['host'][:80]!r}")
    return headers["host"]


def _framing(method: str, version: str, headers: dict[str, str]) -> int | None:
    """The content length, None for a chunked body, or an error; there is no guess in between.
    RFC 9112, 6.
    """
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None:
            raise HTTPError(400, "Transfer-Encoding and Content-Length exclude each other")
        if version == "1.0":
            raise HTTPError(400, "Transfer-Encoding in HTTP/1.0")
        codings, shown = _list_of(coding), repr(coding[:80])
        if "" in codings or "chunked" in codings[:-1]:
            raise HTTPError(400, f"Transfer-Encoding must be chunked, once and last, found {shown}")
        if codings != ["chunked"]:
            raise HTTPError(501, f"Transfer-Encoding {shown} is not implemented; chunked is")
        return None
    if length is None:
        if method == "POST":
            raise HTTPError(411, "POST needs Content-Length or Transfer-Encoding: chunked")
        return 0
    digits, *others = set(_list_of(length))
    # int() alone would also take "+5" and "1_0", and raise above 4,300 digits
    if others or not (digits.isascii() and digits.isdigit()):
        raise HTTPError(400, f"Content-Length must be one number in digits, found {length[:80]!r}")
    digits = digits.lstrip("0") or "0"
    if len(digits) > 18 or int(digits) > MAX_BODY_BYTES:
        raise HTTPError(413, f"body of {digits[:19]} bytes; at most {MAX_BODY_BYTES}")
    return int(digits)


def _list_of(value: str) -> list[str]:
    """The members of a field value that is a list, in lower case: RFC 9110, 5.6.1."""
    return [member.strip(" \t").lower() for member in value.split(",")]


def _persistence(version: str, headers: dict[str, str]) -> bytes:
    options = _list_of(headers.get("connection", ""))
    if "close" in options or (version == "1.0" and "keep-alive" not in options):
        return CLOSE
    return KEEP if version == "1.1" else KEEP_1_0


def _bound(what: str, size_bytes: int, at_most: int = MAX_HEADER_BYTES, status: int = 431) -> None:
    if size_bytes > at_most:
        raise HTTPError(status, f"{what} of more than {at_most} bytes")


def _refuse_controls(received: bytes | bytearray, start: int = 0) -> None:
    fault = _NEVER_IN_A_LINE.search(received, start)
    if fault:
        near = bytes(received[max(0, fault.start() - 20) : fault.start() + 10])
        raise HTTPError(400, f"control character, bare LF or bare CR: {_shown(near)}")


def _shown(received: bytes) -> str:
    """Offending bytes for an error message: bounded, and with nothing in them that a terminal would
    obey.
    """
    return repr(received[:80])[1:] + ("…" if len(received) > 80 else "")


# ==================================================================================================
# 2. Requests and responses
# ==================================================================================================
#
# The problem: TCP delivers bytes, in pieces of any size, from anybody. The idea: a reader that
# knows nothing of sockets. It is fed bytes and gives back whole requests, or the one error after
# which nothing on that connection can be trusted. Responses are encoded when they are made: most
# are alike, and are sent many times. What it costs: a body is held in memory as a whole.


class Request(NamedTuple):
    """A whole request: its head, and its body with the transfer coding undone and the content
    coding not.
    """

    head: Head
    body: bytes


class RequestReader:
    """Turns bytes into requests, in whatever pieces they arrive.

    Strategy: requests are cut from the front of one buffer. Deleting the front of a bytearray
    copies nothing. `_scanned` marks what was searched already, so the work is linear in the bytes
    received, whether they come one at a time or ten requests at once.

    >>> reader = RequestReader()
    >>> for piece in b"GET /health HTTP/1.1\\r\\nHo", b"st: a\\r\\n\\r", b"\\nGET /next":
    ...     reader.feed(piece)
    ...     request = reader.next_request()
    ...     print(request and request.head.path)
    None
    None
    /health
    """

    __slots__ = ("_buffer", "_scanned", "_skipped_line", "_head", "_chunked_body", "_refusal")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0  # bytes before this were searched: a head does not end there
        self._skipped_line = False
        self._head: Head | None = None
        self._chunked_body: Iterator[bytes | None] | None = None
        self._refusal: tuple[int, str] | None = None  # nothing after it is read

    def feed(self, received: bytes) -> None:
        """Take bytes as they arrived."""
        self._buffer += received

    def next_request(self) -> Request | None:
        """The next whole request, or None when more bytes are needed.

        Raises HTTPError: the end of the connection. Whatever follows, it is raised again.
        """
        if self._refusal is not None:
            raise HTTPError(*self._refusal)
        try:
            head = self._head
            if head is None:
                if not self._buffer:  # 1 µs saved on the last look of every turn
                    return None
                head = self._head = self._read_head()
                if head is None:
                    return None
            size_bytes = head.content_length
            if size_bytes is None:
                if self._chunked_body is None:
                    self._chunked_body = _read_chunked(self._buffer)
                body = next(self._chunked_body)
            else:
                body = _cut(self._buffer, size_bytes) if size_bytes <= len(self._buffer) else None
        except HTTPError as refusal:
            # not the exception: its traceback leads back here, and a cycle keeps its body for long
            self._refusal = refusal.status, str(refusal)
            raise
        if body is None:
            return None
        self._head = self._chunked_body = None
        self._skipped_line = False
        return Request(head, body)

    def whole_request(self, received: bytes) -> Request | None:
        """The request that these bytes are, no more and no less; None: feed them.

        0.9 µs instead of 1.8 for what clients send as a rule: nothing is copied into the buffer and
        out of it again. A test gives both ways the same requests.
        """
        end = received.find(b"\r\n\r\n") + 2
        if self.in_request or self._refusal is not None or not 2 < end <= MEMO_HEAD_BYTES:
            return None
        try:
            head = known_head(received[:end])
        except HTTPError:  # it will be told in the order of what arrived
            return None
        if head.content_length != len(received) - end - 2:  # None, where it is chunked
            return None
        self._skipped_line = False
        return Request(head, received[end + 2 :])

    @property
    def in_body(self) -> bool:
        """Whether a head was read whose body is not yet complete."""
        return self._head is not None

    @property
    def in_request(self) -> bool:
        """Whether some of a request has arrived, but not all of it."""
        return self._head is not None or bool(self._buffer)

    def take_continue(self) -> bool:
        """Whether `100 Continue` is due now: true once for a request that asked for it and still
        lacks its body.
        """
        head = self._head
        if head is None or not head.expects_continue:
            return False
        self._head = head._replace(expects_continue=False)
        return True

    def _read_head(self) -> Head | None:
        # RFC 9112, 2.2: one empty line before the request line is skipped
        if self._buffer.startswith(b"\r\n") and not self._skipped_line:
            del self._buffer[:2]
            self._scanned, self._skipped_line = 0, True
        end = self._buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end < 0:
            self._check_unfinished_head()
            return None
        section = _cut(self._buffer, end + 4)[:-2]
        self._scanned = 0
        return known_head(section) if len(section) <= MEMO_HEAD_BYTES else parse_head(section)

    def _check_unfinished_head(self) -> None:
        """Refuse at once what no further byte can mend."""
        _refuse_controls(self._buffer, max(0, self._scanned - 1))
        self._scanned = len(self._buffer)
        if self._buffer.startswith(b"\r\n"):
            raise HTTPError(400, "more than one empty line before the request line")
        if len(self._buffer) <= MAX_REQUEST_LINE_BYTES:
            return
        line_bytes = self._buffer.find(b"\r\n", 0, MAX_REQUEST_LINE_BYTES + 2)
        if line_bytes < 0:
            raise HTTPError(414, f"request line of more than {MAX_REQUEST_LINE_BYTES} bytes")
        _bound("header section", len(self._buffer) - line_bytes - 4)


def _cut(buffer: bytearray, size_bytes: int) -> bytes:
    """Remove the first bytes of a buffer and return them."""
    taken = bytes(buffer[:size_bytes])
    del buffer[:size_bytes]
    return taken


def _read_chunked(buffer: bytearray) -> Iterator[bytes | None]:
    """Cut a chunked body from the front of a buffer, as it grows: yields None when more bytes are
    needed, in the end the body. RFC 9112, 7.1: `chunk-size [chunk-ext] CRLF chunk-data CRLF … 0
    CRLF trailers CRLF`.
    """
    body, ignored_bytes = bytearray(), 0  # of extensions and trailers
    while True:
        line = yield from _read_line(buffer, "chunk-size line")
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise HTTPError(400, f"chunk size must be 1 to 16 hex digits, found {_shown(line)}")
        ignored_bytes += len(match[2])
        _bound("chunk extensions and trailers", ignored_bytes)
        missing = int(match[1], 16)
        if not missing:
            break
        _bound("chunked body", len(body) + missing, MAX_BODY_BYTES, 413)
        while missing:
            piece = _cut(buffer, missing)
            body += piece
            missing -= len(piece)
            if missing:
                yield None
        while not buffer.startswith(b"\r\n"):
            if not b"\r\n".startswith(buffer[:2]):
                found = _shown(bytes(buffer[:2]))
                raise HTTPError(400, f"chunk data must end in CRLF, found {found}")
            yield None
        del buffer[:2]
    trailers = 0
    while line := (yield from _read_line(buffer, "trailer section")):
        trailers += 1
        ignored_bytes += len(line)
        _bound("chunk extensions and trailers", ignored_bytes)
        _parse_field(line, f"trailer field {trailers}")  # and drop it
        if trailers > MAX_HEADER_FIELDS:
            raise HTTPError(431, f"more than {MAX_HEADER_FIELDS} trailer fields")
    yield bytes(body)


def _read_line(buffer: bytearray, what: str) -> Generator[None, None, bytes]:
    """Cut a line, without its CRLF, from the front of a buffer; yields when more is needed."""
    scanned = 0
    while (end := buffer.find(b"\r\n", max(0, scanned - 1))) < 0:
        _refuse_controls(buffer, max(0, scanned - 1))
        scanned = len(buffer)
        _bound(what, scanned)
        yield None
    return _cut(buffer, end + 2)[:-2]


def decode_content(request: Request) -> bytes:
    """The body with its Content-Encoding undone, in memory bounded by MAX_BODY_BYTES whatever a
    bomb promises.

    Raises HTTPError: 415 for a coding other than gzip and identity, 400 for broken gzip, 413 for
    too much.
    """
    headers = request.head.headers
    if "content-encoding" not in headers:
        return request.body
    coding = headers["content-encoding"].lower()
    if coding == "identity":
        return request.body
    if coding not in ("gzip", "x-gzip"):  # RFC 9110, 8.4.1.3: the two are the same
        raise HTTPError(
            415,
            f"Content-Encoding {coding[:80]!r} is not known; send gzip or identity",
            fields=[("Accept-Encoding", "gzip, identity")],
        )
    content, body, position = bytearray(), memoryview(request.body), 0
    try:
        while position < len(body) or not position:  # RFC 1952, 2.2: one or more members
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                piece = body[position : position + 4096]  # small: what a member leaves is copied
                if not piece:
                    raise HTTPError(400, "gzip body is cut short")
                content += member.decompress(piece, MAX_BODY_BYTES + 1 - len(content))
                if len(content) > MAX_BODY_BYTES:
                    raise HTTPError(413, f"gzip body of more than {MAX_BODY_BYTES} bytes decoded")
                position += len(piece) - len(member.unused_data)
    except zlib.error as error:
        raise HTTPError(400, f"gzip body is broken: {error}") from None
    return bytes(content)


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Response:
    """An encoded response except for what changes with each sending: Date, Connection, and fields
    for one client. `metrics` is how many were stored, for statistics.

    >>> Response(200, b"{}").encode(CLOSE, b"Date: now\\r\\n", head_only=True).split(b"\\r\\n")[:3]
    [b'HTTP/1.1 200 OK', b'Date: now', b'Content-Type: application/json']
    """

    __slots__ = ("status", "metrics", "_status_line", "_fields", "_end")

    def __init__(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        fields: Iterable[tuple[str, str]] = (),
        metrics: int = 0,
    ):
        self.status = status
        self.metrics = metrics
        self._status_line = status_line(status)
        head = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        self._fields = (head + "".join(f"{name}: {value}\r\n" for name, value in fields)).encode()
        # 304 has the fields of the answer that it stands for, and no body: RFC 9110, 15.4.5.
        self._end = b"\r\n" + (body if status != 304 else b"")

    def encode(
        self, persistence: bytes, date: bytes, head_only: bool = False, more_fields: bytes = b""
    ) -> bytes:
        """The bytes to send, head and body in one. `persistence`, `date` and `more_fields` are
        field lines with their CRLF.
        """
        end = b"\r\n" if head_only else self._end
        return b"".join((self._status_line, date, self._fields, more_fields, persistence, end))


@functools.cache
def status_line(status: int) -> bytes:
    """The status line of an answer."""
    return b"HTTP/1.1 %d %b\r\n" % (status, http.HTTPStatus(status).phrase.encode())


@functools.lru_cache(maxsize=2)  # made once a second, 4 µs, rather than for each answer
def date_field(second: int) -> bytes:
    """The Date field line for a Unix time in whole seconds: RFC 9110, 5.6.7."""
    return b"Date: %b\r\n" % email.utils.formatdate(second, usegmt=True).encode()


# ==================================================================================================
# 3. Rate limiting
# ==================================================================================================
#
# The problem: one client must not use up the server for the others, and a fixed window (so many a
# calendar second) lets twice the rate through at its border. The idea: remember when each request
# was allowed; the next one is allowed if fewer than N of those times lie within the second before
# it. That is exact. What it costs: N numbers for a client at its limit. Most clients are seen once
# or seldom, so a client starts as one number and becomes a queue only when it needs one.
#
# Clients are spread over stripes by hash, each with its own lock, so two clients rarely wait for
# each other. A stripe forgets by generations: once a window, the recent clients become the older
# ones, and the older ones, which asked for nothing in all that time, are dropped as a whole.

STRIPES = 64
MAX_TRACKED_CLIENTS = 100_000


class Decision(NamedTuple):
    """The limiter's verdict on one request."""

    allowed: bool
    remaining: int  # how many more would be allowed at this moment
    retry_after_s: float  # of a refused one: the exact wait until it would be allowed


class _Stripe:
    """Some of the clients. All its fields are guarded by its lock, under which no other is taken.

    A window is the time of a client's one allowed request, or a deque of such times. Those of the
    clients that came in this generation are in `recent`, the others in `older`.
    """

    __slots__ = ("lock", "recent", "older", "generation_start", "tallies", "evicted")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.recent: dict[str, float | deque[float]] = {}
        self.older: dict[str, float | deque[float]] = {}
        self.generation_start = -math.inf
        self.tallies: dict[str, list[int]] = {}  # allowed and refused since the last drain
        self.evicted = 0


class SlidingWindowLimiter:
    """At most `limit` requests for each client in any `window_s` seconds.

    >>> limiter = SlidingWindowLimiter(3, clock=iter([0.75, 0.8, 0.9, 1.0, 1.75]).__next__)
    >>> for _ in range(5):
    ...     print(*limiter.decide("web1"))
    True 2 0.0
    True 1 0.0
    True 0 0.0
    False 0 0.75
    True 0 0.0

    A limiter that counts by calendar second would allow three more at 1.0; this one knows that
    three lie within the last second, and until when.

    `stripes` is a power of two. When more than `max_clients` come within a window, those that came
    in the older generation of their stripe are forgotten, and counted in `evicted`: they start
    afresh.
    """

    OTHERS = "(others)"  # all clients beyond the limit of the tallies are counted here

    def __init__(
        self,
        limit: int,
        window_s: float = 1.0,
        *,
        stripes: int = STRIPES,
        max_clients: int = MAX_TRACKED_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ):
        if stripes < 1 or stripes & (stripes - 1):
            raise ValueError(f"stripes must be a power of two, not {stripes}")
        self.limit, self.window_s = limit, window_s
        self._clock = clock
        self._stripes = [_Stripe() for _ in range(stripes)]
        self._mask = stripes - 1
        self._generation = max(1, max_clients // stripes // 2)  # two of them stand in a stripe

    def decide(self, client: str, own_limit: int | None = None) -> Decision:
        """Count one request of `client`, if it is allowed; `own_limit` stands for `limit` then."""
        limit = self.limit if own_limit is None else own_limit
        # str hashes are keyed: nobody can choose a stripe
        stripe = self._stripes[hash(client) & self._mask]
        with stripe.lock:
            now = self._clock()  # under the lock, so that the times of a window never run backwards
            if now - stripe.generation_start >= self.window_s:
                self._start_generation(stripe, now)
            recent = stripe.recent
            window: float | deque[float] | None
            if client in recent:
                window = recent[client]
            else:
                window = stripe.older.pop(client, None)
                if len(recent) >= self._generation:
                    recent = self._start_generation(stripe, now)
            if isinstance(window, float):  # the one request so far
                window = deque((window,)) if now - window < self.window_s else None
            used = 0
            if window is not None:
                while window and now - window[0] >= self.window_s:
                    window.popleft()
                used = len(window)
            self._tally_of(stripe.tallies, client)[0 if used < limit else 1] += 1
            if not window:
                recent[client] = now  # 24 bytes; an empty deque alone has 760
            else:
                recent[client] = window
                if used >= limit:
                    # the one that must leave first: not the oldest, if the limit has been lowered
                    return Decision(False, 0, self.window_s - (now - window[used - limit]))
                window.append(now)
            return Decision(True, limit - used - 1, 0.0)

    def _tally_of(self, tallies: dict[str, list[int]], client: str) -> list[int]:
        """[allowed, refused] of a client."""
        if client not in tallies:
            if len(tallies) >= 2 * self._generation:
                client = self.OTHERS
            return tallies.setdefault(client, [0, 0])
        return tallies[client]

    def _start_generation(self, stripe: _Stripe, now: float) -> dict[str, float | deque[float]]:
        """Begin a new generation, and forget the older one. After a whole window nobody in it was
        allowed anything that still counts; sooner, for want of room, they are evicted.
        """
        if now - stripe.generation_start < self.window_s:
            stripe.evicted += len(stripe.older)
        elif now - stripe.generation_start >= 2 * self.window_s:
            stripe.recent = {}
        stripe.older, stripe.recent, stripe.generation_start = stripe.recent, {}, now
        return stripe.recent

    def drain(self) -> Iterator[dict[str, tuple[int, int]]]:
        """For one stripe after the other: {client: (allowed, refused)} since the last drain.

        Each decision is reported exactly once: a stripe's tallies are swapped for empty ones under
        its lock. No lock is held while the caller looks at the result. Idle clients are forgotten
        on the way.
        """
        for stripe in self._stripes:
            with stripe.lock:
                tallies, stripe.tallies = stripe.tallies, {}
                now = self._clock()
                if now - stripe.generation_start >= self.window_s:
                    self._start_generation(stripe, now)
            yield {client: (allowed, refused) for client, (allowed, refused) in tallies.items()}

    @property
    def tracked(self) -> int:
        """How many clients are remembered now."""
        return sum(len(stripe.recent) + len(stripe.older) for stripe in self._stripes)

    @property
    def evicted(self) -> int:
        """How many clients were forgotten while they still mattered, for want of room."""
        return sum(stripe.evicted for stripe in self._stripes)


# ==================================================================================================
# 4. JSON
# ==================================================================================================
#
# The problem: text from strangers is to become values, exactly as RFC 8259 says or not at all. The
# idea: recursive descent. Each rule of the grammar is one function, `rule(text, position) ->
# (value, position behind it)`, and regular expressions recognise the tokens. A NUL is appended to
# the text: no rule accepts one, so no rule has to ask whether the text is over. What it costs:
# about 10 times the time of a parser written in C; a later chapter's fast path wins most of it
# back.
#
# Where the RFC leaves a choice: of duplicate names the last wins; a lone surrogate is an error;
# integers stay int; a number that no float can hold, or of more than 1,000 characters, is an error;
# so is nesting deeper than 64.

MAX_JSON_DEPTH = 64
MAX_NUMBER_LENGTH = 1000

_WHITE_SPACE = " \t\n\r"
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)((?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_PLAIN_STRING = re.compile(r'"([^"\\\x00-\x1f]*)"')
_UNESCAPED = re.compile(r'[^"\\\x00-\x1f]*')
_UNICODE_ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS = {"t": ("true", True), "f": ("false", False), "n": ("null", None)}


class JSONError(ValueError):
    """Text that is not JSON: what was expected, and where, in lines and characters from 1."""

    def __init__(self, reason: str, text: str, position: int):
        self.line = text.count("\n", 0, position) + 1
        self.column = position - text.rfind("\n", 0, position)
        super().__init__(f"{reason} at line {self.line}, column {self.column}")


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON document, given as str or as UTF-8 bytes. Raises JSONError. Source: RFC 8259.

    >>> parse_json('{"name": "cpu", "value": [1, 2.5e3, true, null]}')
    {'name': 'cpu', 'value': [1, 2500.0, True, None]}
    >>> parse_json('{"value": 01}')
    Traceback (most recent call last):
    metricstream.JSONError: expected ',' or '}', found '1' at line 1, column 12
    """
    if not isinstance(text, str):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode()
            raise JSONError("invalid UTF-8", before, len(before)) from None
    elif not text.isascii() and (lone := _SURROGATE.search(text)):
        raise JSONError("lone surrogate", text, lone.start())
    text += "\0"
    value, position = _value(text, _skip_space(text, 0), 0)
    position = _skip_space(text, position)
    if position != len(text) - 1:
        raise _expected("the end of the text", text, position)
    return value


def _expected(what: str, text: str, position: int) -> JSONError:
    found = "the end of the text" if position >= len(text) - 1 else ascii(text[position])
    return JSONError(f"expected {what}, found {found}", text, position)


def _skip_space(text: str, position: int) -> int:
    if text[position] in _WHITE_SPACE:  # 0.05 µs instead of 0.3 for a match that finds nothing
        # It matches the empty string, too.
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]
    return position


def _value(text: str, position: int, depth: int) -> tuple[Any, int]:
    first = text[position]
    if first == '"':
        return _string(text, position)
    if first in "{[":
        if depth == MAX_JSON_DEPTH:
            raise JSONError(f"nesting deeper than {MAX_JSON_DEPTH}", text, position)
        return (_object if first == "{" else _array)(text, position, depth + 1)
    if first in _LITERALS:
        word, value = _LITERALS[first]
        if text.startswith(word, position):
            return value, position + len(word)
    return _number(text, position)


def _object(text: str, position: int, depth: int) -> tuple[dict[str, Any], int]:
    members: dict[str, Any] = {}
    position = _skip_space(text, position + 1)
    if text[position] == "}":
        return members, position + 1
    while True:
        if text[position] != '"':
            raise _expected("a name in double quotes", text, position)
        name, position = _string(text, position)
        position = _skip_space(text, position)
        if text[position] != ":":
            raise _expected("':'", text, position)
        members[name], position = _value(text, _skip_space(text, position + 1), depth)
        position = _skip_space(text, position)
        if text[position] == "}":
            return members, position + 1
        if text[position] != ",":
            raise _expected("',' or '}'", text, position)
        position = _skip_space(text, position + 1)


def _array(text: str, position: int, depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    position = _skip_space(text, position + 1)
    if text[position] == "]":
        return items, position + 1
    while True:
        item, position = _value(text, position, depth)
        items.append(item)
        position = _skip_space(text, position)
        if text[position] == "]":
            return items, position + 1
        if text[position] != ",":
            raise _expected("',' or ']'", text, position)
        position = _skip_space(text, position + 1)


def _number(text: str, position: int) -> tuple[int | float, int]:
    match = _NUMBER.match(text, position)
    if match is None:
        raise _expected("a value", text, position)
    end = match.end()
    if end - position > MAX_NUMBER_LENGTH:
        raise JSONError(f"number of more than {MAX_NUMBER_LENGTH} characters", text, position)
    number = float(match[0])
    if not math.isfinite(number):
        raise JSONError("number too large for a 64-bit float", text, position)
    if not match[1]:
        return int(match[0]), end
    return number, end


def _string(text: str, position: int) -> tuple[str, int]:
    plain = _PLAIN_STRING.match(text, position)
    if plain:
        return plain[1], plain.end()
    pieces = []
    position += 1
    while True:
        # It matches the empty string, too.
        end = _UNESCAPED.match(text, position).end()  # type: ignore[union-attr]
        pieces.append(text[position:end])
        if text[end] == '"':
            return "".join(pieces), end + 1
        if text[end] != "\\":
            raise _expected("'\"' or an escape for a control character", text, end)
        piece, position = _escape(text, end)
        pieces.append(piece)


def _escape(text: str, position: int) -> tuple[str, int]:
    letter = text[position + 1]
    if letter in _ESCAPES:
        return _ESCAPES[letter], position + 2
    match = _UNICODE_ESCAPE.match(text, position)
    if match is None:
        raise _expected('an escape: one of "\\/bfnrt, or u and four hex digits', text, position + 1)
    unit, end = int(match[1], 16), match.end()
    if not 0xD800 <= unit < 0xE000:
        return chr(unit), end
    low = _UNICODE_ESCAPE.match(text, end)
    if unit >= 0xDC00 or low is None or not 0xDC00 <= int(low[1], 16) < 0xE000:
        raise JSONError("lone surrogate", text, position)
    return chr(0x10000 + ((unit - 0xD800) << 10) + int(low[1], 16) - 0xDC00), low.end()


# Escaped although RFC 8259 would allow them raw: DEL and C1 controls, which terminals obey, line
# and paragraph separators, marks that reorder the text around them, and the byte order mark.
_MUST_ESCAPE = re.compile(
    '["\\\\\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]'
)
_SHORT_ESCAPES = {value: f"\\{letter}" for letter, value in _ESCAPES.items() if value != "/"}


def write_json(value: Any) -> str:
    """The JSON text, without white space, of dict, list, tuple, str, int, float, bool or None.

    >>> write_json({"text": 'a "b"\\n', "numbers": [1, 2.5, True, None]})
    '{"text":"a \\\\"b\\\\"\\\\n","numbers":[1,2.5,true,null]}'
    """
    if isinstance(value, str):
        return write_json_string(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no JSON form")
        return repr(value)
    if isinstance(value, dict):
        members = [f"{write_json_string(name)}:{write_json(item)}" for name, item in value.items()]
        return "{" + ",".join(members) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(write_json, value)) + "]"
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_json_string(text: str) -> str:
    """A str as a JSON string that is safe in a line, a log and a terminal."""
    return '"' + _MUST_ESCAPE.sub(_escaped, text) + '"'


def _escaped(match: re.Match[str]) -> str:
    return _SHORT_ESCAPES.get(match[0]) or f"\\u{ord(match[0]):04x}"


# ==================================================================================================
# 5. Metrics
# ==================================================================================================
#
# The problem: a batch is stored whole or not at all, and a client that sent a bad one must be able
# to mend it from the answer alone. The idea: look at every metric before any is accepted, and
# collect what is wrong with its index and field. What it costs: a second walk over values that were
# just parsed.

MAX_BATCH = 1_000
MAX_NAME_LENGTH = 255
MAX_TAGS = 32
MAX_TAG_KEY_LENGTH = 128
MAX_TAG_VALUE_LENGTH = 1_024
MAX_REASONS = 10
METRIC_TYPES = ("gauge", "counter", "histogram", "summary")
METRIC_FIELDS = ("name", "value", "type", "tags", "timestamp")
UNIX_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
END_OF_TIME_MS = 7_289_654_400_000  # 2201-01-01T00:00:00Z

_UNKNOWN_FIELD = f"unknown field; known are {', '.join(METRIC_FIELDS)}"
_BAD_NAME = f"must be a string of 1 to {MAX_NAME_LENGTH} characters without control characters"
_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
_ISO_8601 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]((?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9])"
    r"(?:[.,]([0-9]{1,9}))?([Zz]|[+-](?:[01][0-9]|2[0-3]):?[0-5][0-9])"
)


class Sample(NamedTuple):
    """One measured value."""

    name: str
    value: int | float | None  # finite; None: the series has no value from here on
    type: str  # one of METRIC_TYPES
    tags: dict[str, str]
    timestamp_ms: int  # Unix time in milliseconds


class Reason(NamedTuple):
    """One thing that is wrong with a batch."""

    index: int | None  # type: ignore[assignment]  # of the metric; None: the batch is at fault
    field: str
    message: str

    def __str__(self) -> str:
        place = self.field
        if self.index is not None:
            place = f"metrics[{self.index}].{self.field}".rstrip(".")
        return f"{place}: {self.message}" if place else self.message


class BatchError(ValueError):
    """A batch that is refused: `reasons` holds the first ten, in the order of the batch."""

    def __init__(self, reasons: list[Reason]):
        super().__init__(str(reasons[0]))
        self.reasons = reasons[:MAX_REASONS]


def read_batch(document: Any, now_ms: int) -> list[Sample]:
    """Validate a parsed `{"metrics": [...]}`; samples without a timestamp get `now_ms`. Raises
    BatchError.

    >>> read_batch({"metrics": [{"name": "cpu", "value": 75.5}]}, now_ms=1758116723123)
    [Sample(name='cpu', value=75.5, type='gauge', tags={}, timestamp_ms=1758116723123)]
    >>> read_batch({"metrics": [{"name": "cpu", "value": "75.5"}]}, now_ms=0)
    Traceback (most recent call last):
    metricstream.BatchError: metrics[0].value: must be a finite number or null, not a string
    """
    if not isinstance(document, dict) or "metrics" not in document:
        raise BatchError([Reason(None, "", 'body must be an object with the list "metrics"')])
    others = [name for name in document if name != "metrics"]
    reasons = [Reason(None, _clipped(name), 'unknown field beside "metrics"') for name in others]
    metrics = document["metrics"]
    if not isinstance(metrics, list) or not 1 <= len(metrics) <= MAX_BATCH:
        found = f"{len(metrics)} metrics" if isinstance(metrics, list) else _kind(metrics)
        message = f"must be a list of 1 to {MAX_BATCH} metrics, not {found}"
        raise BatchError([*reasons, Reason(None, "metrics", message)])
    samples = []
    for index, metric in enumerate(metrics):
        try:
            samples.append(_read_metric(metric, now_ms, index))
        except BatchError as error:
            reasons += error.reasons
            if len(reasons) >= MAX_REASONS:
                break
    if reasons:
        raise BatchError(reasons)
    return samples


def _read_metric(metric: Any, now_ms: int, index: int = 0) -> Sample:
    if not isinstance(metric, dict):
        raise BatchError([Reason(index, "", f"must be an object, not {_kind(metric)}")])
    faults = [(_clipped(field), _UNKNOWN_FIELD) for field in metric if field not in METRIC_FIELDS]
    name = metric.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_LENGTH or _CONTROL.search(name):
        faults.append(("name", _BAD_NAME if "name" in metric else "is missing"))
    value = metric.get("value", "")
    # not isinstance: bool is an int to Python
    if type(value) is not float and type(value) is not int and value is not None:
        bad_value = f"must be a finite number or null, not {_kind(value)}"
        faults.append(("value", bad_value if "value" in metric else "is missing"))
    type_ = metric.get("type", "gauge")
    if type_ not in METRIC_TYPES:
        faults.append(("type", f"must be one of {', '.join(METRIC_TYPES)}"))
    tags = metric.get("tags", {})
    if "tags" in metric:
        faults += _faults_in_tags(tags)
    timestamp_ms = now_ms
    if "timestamp" in metric:
        try:
            timestamp_ms = _read_timestamp(metric["timestamp"])
        except ValueError as error:
            faults.append(("timestamp", str(error)))
    if faults:
        raise BatchError([Reason(index, field, message) for field, message in faults])
    return Sample(name, value, type_, tags, timestamp_ms)  # type: ignore[arg-type]  # checked above


def _faults_in_tags(tags: Any) -> list[tuple[str, str]]:
    if not isinstance(tags, dict):
        return [("tags", f"must be an object of strings, not {_kind(tags)}")]
    faults = []
    if len(tags) > MAX_TAGS:
        faults.append(("tags", f"must be at most {MAX_TAGS}, not {len(tags)}"))
    for key, value in tags.items():
        if not 1 <= len(key) <= MAX_TAG_KEY_LENGTH:
            shown = ascii(_clipped(key))
            faults.append(("tags", f"key {shown} must have 1 to {MAX_TAG_KEY_LENGTH} characters"))
        if not isinstance(value, str):
            faults.append((f"tags.{_clipped(key)}", f"must be a string, not {_kind(value)}"))
        elif len(value) > MAX_TAG_VALUE_LENGTH:
            reason = f"must have at most {MAX_TAG_VALUE_LENGTH} characters"
            faults.append((f"tags.{_clipped(key)}", reason))
    return faults


def read_iso_8601(text: str) -> tuple[int, int] | None:
    """The Unix second and the nanosecond in it of a date and time with a zone; None for text of
    another form. Raises ValueError where the calendar has no such date.

    >>> read_iso_8601("1970-01-02T01:00:00.25+01:00")
    (86400, 250000000)
    """
    match = _ISO_8601.fullmatch(text)
    if match is None:
        return None
    date, clock, fraction, zone = match.groups()
    try:
        moment = datetime.datetime.fromisoformat(f"{date}T{clock}{zone.upper()}")
    except ValueError:
        raise ValueError("must be a date that the calendar has") from None
    second = (moment - UNIX_EPOCH) // datetime.timedelta(seconds=1)
    return second, int((fraction or "0").ljust(9, "0"))


def _read_timestamp(timestamp: Any) -> int:
    """Unix milliseconds from Unix seconds or an ISO 8601 string with a zone. Raises ValueError."""
    if type(timestamp) is int or type(timestamp) is float:
        if not 0 <= timestamp < END_OF_TIME_MS / 1000:
            raise ValueError("must lie in the years 1970 to 2200 (Unix seconds, not milliseconds)")
        timestamp_ms = round(timestamp * 1000)
    elif isinstance(timestamp, str):
        moment = read_iso_8601(timestamp)
        if moment is None:
            raise ValueError(
                "must be Unix seconds or an ISO 8601 date and time with a zone, "
                "as 2025-09-17T13:45:23.123Z"
            )
        second, nanosecond = moment
        timestamp_ms = second * 1000 + round(nanosecond / 1e6)
    else:
        raise ValueError(f"must be a number or a string, not {_kind(timestamp)}")
    if not 0 <= timestamp_ms < END_OF_TIME_MS:
        raise ValueError("must lie in the years 1970 to 2200")
    return timestamp_ms


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    return "null" if value is None else _KINDS.get(type(value), "a number")


def _clipped(text: str) -> str:
    return text if len(text) <= 64 else text[:64] + "…"


# ==================================================================================================
# 6. Log lines
# ==================================================================================================
#
# The problem: what came as JSON is to be kept as lines that could be sent again. The idea: the
# request's text is already what the line needs, so a batch in the usual shape is checked and cut by
# one regular expression; whatever else comes takes the plain way through values and samples. What
# it costs: two paths produce the same line; a test gives both the same bodies.


@functools.lru_cache(maxsize=1024)  # 0.1 µs instead of 1.2: samples of one second come together
def _utc_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def utc_timestamp(timestamp_ms: int) -> str:
    """Unix milliseconds as ISO 8601 in UTC.

    >>> utc_timestamp(1758116723123)
    '2025-09-17T13:45:23.123Z'
    """
    second, millisecond = divmod(timestamp_ms, 1000)
    return f"{_utc_second(second)}.{millisecond:03d}Z"


def log_line(sample: Sample) -> str:
    """A sample as its line of the log.

    >>> print(log_line(Sample("up", 1, "gauge", {"a": "b"}, 0)), end="")
    {"timestamp":"1970-01-01T00:00:00.000Z","name":"up","value":1,"type":"gauge","tags":{"a":"b"}}
    """
    timestamp, name = utc_timestamp(sample.timestamp_ms), write_json_string(sample.name)
    value = "null" if sample.value is None else repr(sample.value)
    rest = f',"tags":{write_json(sample.tags)}' if sample.tags else ""
    rest = f'"type":"{sample.type}"{rest}'
    return f'{{"timestamp":"{timestamp}","name":{name},"value":{value},{rest}}}\n'


# Bodies as programs write them: no escapes, the fields in the usual order; no spaces, or those that
# json.dumps has.
_COMPACT_METRIC, _SPACED_METRIC = (
    re.compile(
        rb'\{"name":%b"([^"\\\x00-\x1f\x7f-\xff]{1,255}",%b"value":%b'
        % (space, space, space)
        # repr() gives the same digits: copy them
        + rb"(?:-?[1-9][0-9]{0,9}(?:\.[0-9]{0,4}[1-9])?|0|-?0\.[0-9]{0,3}[1-9]|null"
        # any other usual number
        rb"|(-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?)))"
        # the rest: type and tags, checked by _line_tail. One excluded byte: 0.3 µs a metric instead
        # of 0.7 for a set of two. Possessive: the worst MiB takes 40 ms and not 800.
        rb"(?=[,}])([^}]{0,576}+\}?)\}"
    )
    for space in (b"", b" ")
)


# 0.05 µs instead of 0.7: the clock gives many requests the same millisecond
@functools.lru_cache(maxsize=64)
def _line_head(now_ms: int) -> bytes:
    return b'{"timestamp":"%b","name":"' % utc_timestamp(now_ms).encode()


@functools.lru_cache(maxsize=4096)  # 0.1 µs instead of 10: clients repeat their types and tags
def _line_tail(fields: bytes) -> bytes | None:
    """The end of the line of a metric whose text ends in `fields` (type, tags); None if unusual."""
    try:
        rest = parse_json(b"{" + fields[1:] + b"}")
        if fields and not rest:  # a comma with nothing behind it
            return None
        if not rest.keys() <= {"type", "tags"}:  # a second name or value would win over the first
            return None
        sample = _read_metric({"name": "x", "value": 0} | rest, 0)
    except (JSONError, BatchError):  # the plain way will say what is wrong
        return None
    return log_line(sample).partition('"value":0')[2].encode()


class Batch(NamedTuple):
    """The log lines of one request."""

    lines: bytes
    metrics: int  # how many lines


def fast_batch(body: bytes, now_ms: int) -> Batch | None:
    """The batch of a body in its usual shape; None: take the plain way.

    One regular expression splits the body into the parts of its metrics; what stands between them
    must be commas and nothing else. 0.7 µs a metric where `parse_json`, `read_batch` and `log_line`
    take 10; a test feeds both ways the same bodies.

    >>> fast_batch(b'{"metrics":[{"name":"cpu","value":1.50}]}', 0).lines
    b'{"timestamp":"1970-01-01T00:00:00.000Z","name":"cpu","value":1.5,"type":"gauge"}\\n'
    """
    spaced = body.startswith(b'{"metrics": [')
    pieces: list[Any] = _SPACED_METRIC.split(body) if spaced else _COMPACT_METRIC.split(body)
    count, comma = len(pieces) // 4, b", " if spaced else b","
    if not 1 <= count <= MAX_BATCH or pieces[0] not in (b'{"metrics":[', b'{"metrics": ['):
        return None
    if pieces[-1] != b"]}" or pieces[4:-1:4].count(comma) != count - 1:
        return None
    # each from the name to the value, and each number that is to be written as repr() does
    starts, others, tails = pieces[1::4], pieces[2::4], list(map(_line_tail, pieces[3::4]))
    if None in tails:
        return None
    if others.count(None) != count:
        for index, text in enumerate(others):
            if text is not None:
                number = repr(float(text) if b"." in text else int(text)).encode()
                starts[index] = starts[index].removesuffix(text) + number
    if spaced:
        starts = [start.replace(b'", "value": ', b'","value":') for start in starts]
    line: list[Any] = [_line_head(now_ms)] * (3 * count)
    line[1::3] = starts
    line[2::3] = tails
    return Batch(b"".join(line), count)


def read_body(body: bytes, now_ms: int) -> Batch:
    """The batch that a body holds as JSON. Raises JSONError or BatchError."""
    usual = fast_batch(body, now_ms)
    if usual is not None:
        return usual
    samples = read_batch(parse_json(body), now_ms)
    return Batch("".join(map(log_line, samples)).encode(), len(samples))


# ==================================================================================================
# 7. Log file
# ==================================================================================================
#
# The problem: a disk may be full after half a line, fail in the middle of a write, or not answer at
# all. The idea: lines are only ever appended, all that come together or none of them: what a failed
# write left is cut off before anything else is written, and a tail torn by a crash at the next
# start. So the file holds whole lines only. Each call of the disk is timed, so that others can see
# that it hangs. What it costs: a look at the clock for each.

LOG_NAME = "metrics.jsonl"
PROBE_BLOCK = b" " * 4096  # written to see whether writing works again
STALL_S = 2.0  # a disk that takes longer for one call does not answer
NO_ANSWER = "the disk does not answer"


class LogError(Exception):
    """The log can't take or keep a batch now; nothing of it was stored."""


def _own_folder(folder: str) -> int:
    """Lock a folder itself, which leaves no file behind, and no stale lock; its descriptor."""
    try:
        os.makedirs(folder, exist_ok=True)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise LogError(f"can't use the data folder {folder}: {error.strerror}") from None
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(folder_fd)
        if isinstance(error, BlockingIOError):
            raise LogError(f"the data folder {folder} is in use by another server") from None
        raise LogError(f"can't lock the data folder {folder}: {error.strerror}") from None
    return folder_fd


class _LogFile:
    """An open file to which lines are appended, all of them or none.

    It is opened by its name, or made, in the folder `folder_fd`. To open it changes nothing in it:
    the log may have a line half written to the same file. It has no lock: the log that owns it
    calls one method at a time. Only `stall_error` may be read at any time.
    """

    def __init__(
        self,
        path: str,
        folder_fd: int,
        write: Callable[[int, Any], int],
        fsync: Callable[[int], None],
        clock: Callable[[], float],
    ):
        self._path, self._write, self._fsync, self._clock = path, write, fsync, clock
        self._call_started = 0.0  # when the call under way began; 0.0: none
        self.torn_at: int | None = None  # where it is to be cut before the next write
        self.seen_bytes = 0  # its size at the last look, when it still had a name
        self.refusal = ""  # why nothing more is appended
        # O_NONBLOCK: to open a pipe by that name must not block; for a regular file it means
        # nothing
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        self.descriptor = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            os.fsync(folder_fd)  # or a new file's name could be lost with the power
        except OSError:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        """How long it is, with what is to be cut off."""
        return os.fstat(self.descriptor).st_size

    @property
    def is_deleted(self) -> bool:
        """Whether no folder has a name for it any more."""
        return not os.fstat(self.descriptor).st_nlink

    @property
    def stall_error(self) -> str:
        """Says that the disk does not answer, or ""."""
        started = self._call_started
        return NO_ANSWER if started and self._clock() - started >= STALL_S else ""

    def append(self, lines: bytes, durably: bool = False) -> None:
        """Write all of the lines, and sync them if asked to; or none, as far as the file shows:
        then raise LogError.
        """
        if self.refusal:
            raise LogError(self.refusal)
        self._call_started = self._clock()
        written, is_kept = 0, False
        try:
            if self.torn_at is not None:
                self._cut(self.torn_at)
            written = self._write(self.descriptor, lines)
            while written < len(lines):  # a short write: the rest, or the error that stopped it
                more = self._write(self.descriptor, memoryview(lines)[written:])
                if more <= 0:
                    raise OSError(errno.EIO, "the file takes no more bytes")
                written += more
            if durably:
                self.sync()
            is_kept = True
        except OSError as error:
            raise LogError(f"can't write {self._path}: {error.strerror}") from None
        finally:
            if written and not is_kept:  # after a failed fsync nobody knows what is there
                self.torn_at = self.size_bytes - written
                self.try_to_cut()
            self._call_started = 0.0

    def sync(self) -> None:
        """Wait until the disk has all of it. Raises LogError."""
        self._call_started = self._clock()
        try:
            self._fsync(self.descriptor)
        except OSError as error:
            raise LogError(f"can't sync {self._path}: {error.strerror}") from None

    def _cut(self, size_bytes: int) -> None:
        os.ftruncate(self.descriptor, min(size_bytes, self.size_bytes))
        self.torn_at = None

    def try_to_cut(self) -> None:
        """Cut off what should not be there, if anything. If that fails, it is tried again before
        the next write.
        """
        if self.torn_at is not None:
            with contextlib.suppress(OSError):
                self._cut(self.torn_at)

    def cut_torn_line(self) -> int:
        """Cut off what follows the last line end; return how many bytes that was."""
        size = end = self.size_bytes
        while end:
            start = max(0, end - 64 * 1024)
            newline = os.pread(self.descriptor, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self.descriptor, end)
        return size - end

    def try_to_write(self) -> None:
        """Write and sync a block, and cut it off again. Raises LogError."""
        self.append(PROBE_BLOCK, durably=True)
        self.torn_at = self.size_bytes - len(PROBE_BLOCK)
        self.try_to_cut()

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.descriptor)
        self.descriptor, self._call_started = -1, 0.0


# ==================================================================================================
# 8. Log
# ==================================================================================================
#
# The problem: what was acknowledged must not be lost, and disks are slow. The idea: three levels
# say what a 200 promises: `memory` (queued for a writer thread), `os` (written: survives the death
# of the process), `disk` (synced: survives loss of power). An fsync takes as long for a thousand
# batches as for one, so at `disk` all that wait share one: group commit. What it costs: at `disk`,
# the wait.

DURABILITY_LEVELS = ("memory", "os", "disk")
MAX_QUEUED_BYTES = 64 * 1024 * 1024  # of batches that wait for the log's thread
WRITER_PAUSE_S = 0.05  # how long the writer of level memory gathers batches for one write
WRITE_RETRY_S = 0.5  # wait before the writer of level memory tries a failed write again
APPEND_WAIT_S = 0.5  # how long a batch waits for others that are being written


class Position(NamedTuple):
    """How far the log is acknowledged. Readers may read up to here. Nothing before it is taken
    back, except when somebody else empties the file.
    """

    file: int  # number of the file, from 0 at the start
    size_bytes: int


_Queued = list[tuple[bytes, "Future[None] | None"]]  # batches, and who waits for them


class _LogThread:
    """The thread of a log: it does tasks one after the other. One of them is to write the batches
    that have gathered.

    `write` stores lines, or raises LogError. `acknowledges` says that batches are acknowledged when
    they are queued: then the thread gathers a while, and what can't be written is kept, and tried
    again for ever. Otherwise each batch gets a future.
    """

    def __init__(self, write: Callable[[bytes], None], max_queued_bytes: int, acknowledges: bool):
        self._write, self._max_queued_bytes = write, max_queued_bytes
        self._acknowledges = acknowledges
        # Guards the two below. No other lock is taken under it.
        self._lock = threading.Lock()
        self._group: _Queued = []  # while it holds any, a task to write them is queued
        self._queued_bytes = 0  # in the group, or taken from it and not yet written
        self._failure = ""  # why the last group could not be written
        self._closing = threading.Event()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def enqueue(self, lines: bytes) -> "Future[None] | None":
        """Have lines written; a future that is done when they are. Raises LogError."""
        written: Future[None] | None = None if self._acknowledges else Future()
        with self._lock:
            if self._closing.is_set():
                raise LogError("the log is closed")
            if self._queued_bytes + len(lines) > self._max_queued_bytes:
                raise LogError(self._failure or "the queue of the log is full")
            if not self._group:
                self._tasks.put(self._write_group)
            self._group.append((lines, written))
            self._queued_bytes += len(lines)
        return written

    def do(self, task: Callable[[], None], timeout_s: float = 0.0) -> bool:
        """Have a task done; whether it was, in that time. What it raises is logged."""
        done = threading.Event()
        self._tasks.put(task)
        self._tasks.put(done.set)
        return done.wait(timeout_s)

    def refuse_queued(self, reason: str) -> None:
        """Refuse the batches that wait, unless they are acknowledged already."""
        if not self._acknowledges:
            self._settle(self._take_group(), LogError(reason))

    def close(self, leave: Callable[[], None], timeout_s: float) -> bool:
        """Have everything written, then `leave` called, and end; False if that takes longer."""
        with self._lock:
            self._closing.set()
        for task in (self._write_the_rest, leave, None):
            self._tasks.put(task)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        for task in iter(self._tasks.get, None):
            attempt(task)

    def _write_group(self) -> None:
        """Write what has gathered, and tell all that wait for it."""
        if self._acknowledges:
            self._closing.wait(WRITE_RETRY_S if self._failure else WRITER_PAUSE_S)
        group, failure = self._take_group(), None
        try:
            if group:
                self._write(b"".join([lines for lines, _ in group]))
        except LogError as error:
            failure = error
        self._failure = str(failure or "")
        if failure is None or not self._acknowledges:
            self._settle(group, failure)
            return
        with self._lock:
            if not self._group:
                self._tasks.put(self._write_group)
            self._group[:0] = group

    def _take_group(self) -> _Queued:
        with self._lock:
            group, self._group = self._group, []
        return group

    def _settle(self, group: _Queued, failure: LogError | None) -> None:
        """Batches are written, or refused."""
        with self._lock:
            self._queued_bytes -= sum([len(lines) for lines, _ in group])
        for _, written in group:
            if written and failure:
                written.set_exception(failure)
            elif written:
                written.set_result(None)

    def _write_the_rest(self) -> None:
        self._write_group()
        if lost := sum([len(lines) for lines, _ in self._take_group()]):
            logger.error("%d bytes of acknowledged metrics are lost: %s", lost, self._failure)


class MetricLog:
    """Appends lines to `metrics.jsonl` in a folder of which it is the only owner.

    `durability` is one of DURABILITY_LEVELS. Raises LogError where the folder can't be used, or is
    in use. `cut_bytes` says how much of a torn line was cut off at the start, `error` why the log
    can't be written now (or ""). `position` is how far the log is acknowledged; it is replaced as a
    whole. What is in `on_switch` is called with (new_number, new_descriptor, old_size) after the
    last line of the old file and before the first of the new one, with the lock held. `clock`
    measures a disk that does not answer.

    At `os` the caller of append() writes. The log's thread writes (and syncs) at the other levels,
    and changes files.

    Here the disk is full after 8 bytes of the line, and the file shows none of it:

    >>> def full_disk(descriptor, lines):
    ...     if len(lines) > 8:
    ...         return os.write(descriptor, lines[:8])
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = MetricLog(folder, write=full_disk)
    ...     try:
    ...         log.append(b'{"value":1}\\n')
    ...     except LogError as error:
    ...         print(str(error).partition(": ")[2])
    ...     print(os.path.getsize(log.path), log.close())
    No space left on device
    0 True
    """

    def __init__(
        self,
        folder: str,
        durability: str = "os",
        *,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        write: Callable[[int, Any], int] = os.write,
        fsync: Callable[[int], None] = os.fsync,
        clock: Callable[[], float] = time.monotonic,
    ):
        if durability not in DURABILITY_LEVELS:
            raise ValueError(
                f"durability must be one of {', '.join(DURABILITY_LEVELS)}, not {durability!r}"
            )
        self.durability = durability
        self.path = os.path.join(folder, LOG_NAME)
        self.error = ""
        self.on_switch: list[Callable[[int, int, int], None]] = []
        # Guards the file and its end: error, position, _file and _closed. Held across a write, so
        # that a failed write is the last thing in the file and can be cut off.
        self._lock = threading.Lock()
        self._closed = False
        self._folder_fd = _own_folder(folder)
        self._open = partial(_LogFile, self.path, self._folder_fd, write, fsync, clock)
        try:
            self._file = self._open()
            self.cut_bytes = self._file.cut_torn_line()
        except OSError as error:
            os.close(self._folder_fd)
            raise LogError(f"can't use {self.path}: {error.strerror}") from None
        self._file.seen_bytes = self._file.size_bytes
        self.position = Position(0, self._file.size_bytes)
        self._thread = _LogThread(self._write_lines, max_queued_bytes, durability == "memory")

    @property
    def size_bytes(self) -> int:
        """How long the acknowledged part of the file is."""
        return self.position.size_bytes

    @property
    def descriptor(self) -> int:
        """Of the file that is appended to now."""
        return self._file.descriptor

    # ---- lines come in

    def append(self, lines: bytes) -> "Future[None] | None":
        """Keep whole lines as the level of durability says. Raises LogError; then nothing of them
        is stored.

        Returns None if the lines are as safe as promised; at `disk`, a future that is done when
        they are, or has the LogError.
        """
        if stall_error := self._file.stall_error:
            raise LogError(stall_error)
        if self.durability != "os":
            return self._thread.enqueue(lines)
        self._write_lines(lines, APPEND_WAIT_S)
        return None

    def _write_lines(self, lines: bytes, timeout_s: float = -1) -> None:
        """Append lines to the file, if the lock is free in time."""
        if not self._lock.acquire(timeout=timeout_s):
            raise LogError(NO_ANSWER)
        try:
            if self._closed:
                raise LogError("the log is closed")
            number, size_bytes = self.position
            self._file.append(lines, self.durability == "disk")
            self.position = Position(number, size_bytes + len(lines))
            self.error = ""
        except Exception as error:
            if not isinstance(error, LogError):  # a fault of ours: it costs these lines alone
                log_unexpected(error)
                error = LogError("internal error in the log; the server's log has the details")
            self.error = str(error)
            raise error from None
        finally:
            self._lock.release()

    def probe(self) -> str:
        """Why the log can't be written, or "". While it can't, each call tries again: a write that
        is taken back, and an fsync.
        """
        # at level memory the writer retries by itself
        stall_error = self._file.stall_error
        if stall_error or not self.error or self.durability == "memory":
            return stall_error or self.error
        return self.error if self._thread.do(self._try_to_write, STALL_S) else NO_ANSWER

    def _try_to_write(self) -> None:
        """Set `error` to what is wrong now."""
        with self._lock:
            try:
                self._file.try_to_write()
                self.error = ""
            except LogError as error:
                self.error = str(error)

    # ---- files change

    def rotate(self, path: str) -> None:
        """Have the file moved to a path, and go on in a new one; `on_switch` tells when it is done.
        What goes wrong is logged, and all stays as it was.
        """
        self._thread.do(partial(self._change_file, path))

    def reopen(self) -> None:
        """Have the file opened by its name again: go on in a new one where it was moved away."""
        self._thread.do(self._change_file)

    def _change_file(self, path: str = "") -> None:
        """Move the file to `path`, if one is given, and go on in the file that has the log's name
        then.
        """
        is_moved, old = False, self._file
        try:
            if path:
                with contextlib.suppress(FileNotFoundError):  # somebody else took it away
                    os.rename(self.path, path)
                    is_moved = True
            file = self._open()
            with self._lock:
                self._switch_to(file)
        except (OSError, LogError) as error:
            if is_moved:
                os.rename(path, self.path)
            with self._lock:
                self._report(f"can't go on in a new {self.path}: {error}")
        if old is not self._file:
            self._sync_and_close(old)

    def _switch_to(self, file: _LogFile) -> None:
        """Append to a file from now on, unless it is the one of now: a line may be half written to
        that, and must not be cut. The lock is held.
        """
        old, (number, size_bytes) = self._file, self.position
        try:
            if os.path.sameopenfile(file.descriptor, old.descriptor):
                return
            old.try_to_cut()
            file.cut_torn_line()
            if old.is_deleted:  # nobody would find what was appended to it since the last look
                file.append(os.pread(old.descriptor, old.size_bytes, old.seen_bytes))
                logger.warning("%s was deleted; the server made it anew", self.path)
            for tell in self.on_switch:
                tell(number + 1, file.descriptor, size_bytes)
            self._file, file.seen_bytes = file, file.size_bytes
            self.position = Position(number + 1, file.seen_bytes)
        finally:
            if self._file is not file:
                file.close()

    def _report(self, error: str) -> None:
        """Log what goes wrong with nobody there to be told: once, not at each attempt. Where the
        file is deleted, nothing more is acknowledged until there is another. The lock is held.
        """
        if self._file.is_deleted:
            self._file.refusal = error
        if self.error != error:
            self.error = error
            logger.error("%s", error)

    def _sync_and_close(self, file: _LogFile) -> None:
        """End a file to which nothing is appended any more."""
        try:
            file.sync()
        except LogError as error:
            logger.error("%s (the file that has or had this name)", error)
        file.close()

    def recreate_if_deleted(self) -> None:
        """Where the file was deleted, have the log go on in a new one, with what was appended since
        the last look: nobody would find it in the old one. Where batches wait for a disk that does
        not answer, refuse them: they are not written yet.

        A file that was moved needs nothing: what is appended to it is still to be found. Call this
        often: what is acknowledged between a deletion and the next look is safe from everything but
        a crash.
        """
        if self._file.stall_error:
            self._thread.refuse_queued(NO_ANSWER)
        elif self._lock.acquire(blocking=False):  # the housekeeper must not wait for a slow disk
            try:
                file, (number, size_bytes) = self._file, self.position
                if self._closed:
                    return
                if file.is_deleted:
                    self._thread.do(self._change_file)
                elif file.torn_at is None:
                    file.seen_bytes, file.refusal = file.size_bytes, ""
                    if file.seen_bytes < size_bytes:  # others have emptied it
                        self.position = Position(number, file.seen_bytes)
            finally:
                self._lock.release()

    # ---- the end

    def close(self, timeout_s: float = 60.0) -> bool:
        """Write and sync everything, then give the folder back; False if the disk does not answer
        in time.
        """
        return self._thread.close(self._leave, timeout_s)

    def _leave(self) -> None:
        """What the thread does last."""
        with self._lock:
            self._closed = True
            self._file.try_to_cut()
        if self._file.is_deleted:
            self._change_file()
        self._sync_and_close(self._file)
        os.close(self._folder_fd)  # and with it the lock


# ==================================================================================================
# 9. Statistics
# ==================================================================================================
#
# The problem: to say how the server is doing without slowing it down. The idea: every request
# leaves one event in a ring of fixed size, which is overwritten from behind; readers never lock it.
# What grows for ever is only counted. What it costs: percentiles are those of the last few thousand
# requests.

RING_SIZE = 4096
# Requests per second are those of this long, or of as long as the ring remembers.
RATE_SPAN_S = 10.0
LOOK_INTERVAL_S = 0.5  # a full ring is not looked through again before
QUANTILES = (0.5, 0.9, 0.95, 0.99)


def client_label(client: str) -> str:
    """What may be shown of a client id: itself, or a short hash if it may be a credential.

    >>> client_label("load_client_7"), client_label("Bearer s3cret")
    ('load_client_7', 'Bearer-0c9ae606')
    """
    scheme, space, _ = client.partition(" ")
    shown = client
    if space or len(client) > 64:
        digest = hashlib.sha256(client.encode()).hexdigest()[:8]
        shown = f"{scheme[:16] if space else 'long'}-{digest}"
    return write_json_string(shown)[1:-1]


class Event(NamedTuple):
    """What happened to one request."""

    time: float  # at which it was answered, by time.perf_counter: no step of the clock shifts it
    status: int
    latency_s: float  # from its last byte's arrival to its answer
    metrics: int  # how many of its metrics were stored


class EventRing:
    """The last `size` events, a power of two.

    Each slot holds one immutable (sequence number, event), replaced as a whole. So a reader takes
    no lock, no writer waits for it, and it sees all of an event or none of it. A slot with another
    number than the expected one has been overwritten: so a slow reader knows what it missed.

    >>> ring = EventRing(2)
    >>> ring.extend("abc")
    >>> ring.read(since=0)
    (['b', 'c'], 3, 1)
    """

    def __init__(self, size: int = RING_SIZE):
        self._slots: list[tuple[int, Any]] = [(-1, None)] * size
        self._mask = size - 1
        # Guards the write index; nothing else is done under it but filling slots.
        self._lock = threading.Lock()
        self._end = 0  # the write index: how many events there ever were

    def extend(self, events: Iterable[Any]) -> None:
        """Put events in the places of the oldest."""
        slots, mask = self._slots, self._mask
        with self._lock:
            for numbered in enumerate(events, self._end):
                slots[numbered[0] & mask] = numbered
                self._end = numbered[0] + 1

    def read(self, since: int = 0) -> tuple[list[Any], int, int]:
        """(events from number `since` on, the number to go on from, how many of them were
        overwritten).
        """
        end, slots = self._end, self._slots
        numbers = range(max(since, end - len(slots)), end)
        seen = [(number, *slots[number & self._mask]) for number in numbers]
        events = [event for number, sequence, event in seen if sequence == number]
        return events, end, end - since - len(events)


class _Exposed(NamedTuple):
    """A number that is shown: its key in JSON, and what Prometheus's text says of it."""

    key: str
    type: str
    help: str
    own_name: str = ""  # where it is not the key
    label: str = ""  # the number is many: a dictionary by the values of this label

    @property
    def name(self) -> str:
        """What stands behind "metricstream_"; that of a counter ends in _total."""
        end = "_total" if self.type == "counter" else ""
        return self.own_name or self.key.removesuffix(end) + end


def full_name(name: str) -> str:
    """The name of a number as others see it: what Prometheus and Alertmanager have, keeps theirs.

    >>> full_name("threads"), full_name("prometheus_rule_evaluations_total")
    ('metricstream_threads', 'prometheus_rule_evaluations_total')
    """
    return name if name.startswith(("prometheus_", "alertmanager_")) else f"metricstream_{name}"


class OwnMetric(NamedTuple):
    """One number of the server's own."""

    family: str  # whose TYPE and HELP it has
    type: str
    help: str
    name: str  # behind "metricstream_", as the family's
    labels: dict[str, str]
    value: float


class Statistics:
    """Counters since the start, the ring of events, and what others add."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.ring = EventRing()
        self._added: dict[str, tuple[_Exposed, Callable[[], Any]]] = {}  # by key
        self._rows: list[Callable[[], Iterable[OwnMetric]]] = []
        self._clock = clock
        self._started = clock()
        # Answered and not counted yet; to append and to take one is atomic.
        self._noted: deque[tuple[int, float, int, bool]] = deque()
        self._lock = threading.Lock()  # guards the counters below
        self._by_status: Counter[int] = Counter()
        self._metrics = 0
        self._batches = 0
        self._invalid = 0
        self._latency_sum_s = 0.0
        self._last_look: tuple[float, int, tuple[dict[str, float], float]]
        self._last_look = -math.inf, -1, ({}, 0.0)  # when, at which end of the ring, what was found

    def note(self, status: int, started: float, metrics: int, invalid: bool = False) -> None:
        """Remember a request that is answered in this round, `invalid` if it was refused for what
        its body held. `started` is when its last byte came, by the clock.
        """
        self._noted.append((status, started, metrics, invalid))

    def count(self) -> None:
        """Count the requests that were noted: their answers are sent. The clock is looked at and
        the locks are taken once for all of a round: 0.7 µs a request instead of 1.1.
        """
        noted = []
        try:
            while self._noted:
                noted.append(self._noted.popleft())
        except IndexError:  # another thread was faster
            pass
        if not noted:
            return
        ended = self._clock()
        self.ring.extend(
            [Event(ended, status, ended - started, stored) for status, started, stored, _ in noted]
        )
        with self._lock:
            for status, started, metrics, invalid in noted:
                self._by_status[status] += 1
                self._latency_sum_s += ended - started
                if metrics:
                    self._metrics += metrics
                    self._batches += 1
                self._invalid += invalid

    def add(
        self,
        key: str,
        type_: str,
        help_: str,
        number: Callable[[], float | dict[str, float]],
        name: str = "",
        label: str = "",
    ) -> None:
        """Show one more number: under `key` in JSON, as metricstream_`name` in Prometheus's text
        (where no name is given, the key is it, of a counter with _total). With a label: numbers by
        its values.
        """
        self._added[key] = _Exposed(key, type_, help_, name, label), number

    def add_rows(self, rows: Callable[[], Iterable[OwnMetric]]) -> None:
        """Show numbers of which there are many; in Prometheus's text, not in JSON."""
        self._rows.append(rows)

    def snapshot(self) -> dict[str, Any]:
        """All numbers, as `GET /metrics` answers them."""
        with self._lock:
            by_status = dict(sorted(self._by_status.items()))
            counters = {
                "metrics_received": self._metrics,
                "batches_processed": self._batches,
                "validation_errors": self._invalid,
                "rate_limited_requests": by_status.get(429, 0),
            }
            latency_sum_s = self._latency_sum_s
        recent_ms, per_second = self._recent()
        return {
            **counters,
            "requests_total": {str(status): count for status, count in by_status.items()},
            "latency_ms": recent_ms,
            "latency_seconds_sum": round(latency_sum_s, 6),
            "requests_per_second": per_second,
            "uptime_seconds": round(self._clock() - self._started, 3),
            **{key: number() for key, (_, number) in self._added.items()},
        }

    def _recent(self) -> tuple[dict[str, float], float]:
        """(latency percentiles in ms, requests a second) of the events in the ring.

        It takes 2 ms when the ring is full, and no rate limits the requests for it. So the ring is
        looked through twice a second at most, or more often in proportion while it holds less. Two
        threads may both look at once; each replaces the whole.
        """
        now = self._clock()
        looked_at, ended, found = self._last_look
        if 0 <= now - looked_at < LOOK_INTERVAL_S * min(1.0, ended / RING_SIZE):
            return found
        events, ended, _ = self.ring.read()
        latencies = sorted(event.latency_s for event in events)
        recent = [event.time for event in events if event.time > now - RATE_SPAN_S]
        span_s = RATE_SPAN_S if len(recent) < len(events) else min(RATE_SPAN_S, now - self._started)
        if ended > RING_SIZE and recent and len(recent) == len(events):
            span_s = now - recent[0]
        recent_ms = {
            f"p{quantile * 100:g}": round(1000 * quantile_of(latencies, quantile), 3)
            for quantile in QUANTILES
        }
        found = recent_ms, round(len(recent) / max(span_s, 1e-3), 1)
        self._last_look = now, ended, found
        return found

    def own_metrics(self) -> Iterator[OwnMetric]:
        """All numbers, as Prometheus names them."""
        numbers = self.snapshot()
        for shown in (*_EXPOSED, *(shown for shown, _ in self._added.values())):
            name, value = shown.name, numbers[shown.key]
            row = partial(OwnMetric, name, shown.type, shown.help)
            if shown.label:
                for label_value, number in value.items():
                    yield row(name, {shown.label: label_value}, number)
            elif shown.key == "latency_ms":
                for quantile in QUANTILES:
                    seconds = round(value[f"p{quantile * 100:g}"] / 1000, 9)
                    yield row(name, {"quantile": str(quantile)}, seconds)
                yield row(f"{name}_sum", {}, numbers["latency_seconds_sum"])
                yield row(f"{name}_count", {}, sum(numbers["requests_total"].values()))
            else:
                yield row(name, {}, value)
        for rows in self._rows:
            yield from rows()

    def prometheus(self) -> str:
        """The same in Prometheus's text exposition format, version 0.0.4."""
        lines, family = [], ""
        for metric in self.own_metrics():
            if metric.family != family:
                family = metric.family
                lines.append(f"# HELP {full_name(family)} {metric.help}")
                lines.append(f"# TYPE {full_name(family)} {metric.type}")
            labels = ",".join(
                f"{label}={write_json_string(value)}" for label, value in metric.labels.items()
            )
            braces = f"{{{labels}}}" if labels else ""
            lines.append(f"{full_name(metric.name)}{braces} {metric.value}")
        return "\n".join(lines) + "\n"


_EXPOSED = (
    _Exposed("metrics_received", "counter", "Metrics stored."),
    _Exposed("batches_processed", "counter", "Batches stored."),
    _Exposed("validation_errors", "counter", "Requests refused for what their body held."),
    _Exposed("rate_limited_requests", "counter", "Requests refused for their client's rate."),
    _Exposed("requests_total", "counter", "Requests answered, by status code.", label="status"),
    _Exposed("latency_ms", "summary", "Time from a request's arrival to its answer.",
             "request_duration_seconds"),
    _Exposed("requests_per_second", "gauge", "Requests answered a second, lately."),
    _Exposed("uptime_seconds", "gauge", "Time since the server started."),
)  # fmt: skip


def quantile_of(ordered: list[float], quantile: float) -> float:
    """The nearest-rank quantile of an ascending list; 0.0 of an empty one.

    >>> quantile_of([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)] if ordered else 0.0


BUSIEST_CLIENTS = 10


def limiter_summary(limiter: SlidingWindowLimiter) -> str:
    """One log line about the limiter since the last call: totals and the busiest clients; "" where
    nothing was asked of it. Ids are cleaned: clients choose them.

    >>> limiter = SlidingWindowLimiter(1)
    >>> for client in "aab": _ = limiter.decide(client, 1)
    >>> limiter_summary(limiter)
    'clients: 2 with 2 requests allowed, 1 refused; busiest a 1+1, b 1+0'
    """
    allowed = refused = clients = 0
    busiest: list[tuple[int, str, int, int]] = []
    for tallies in limiter.drain():
        clients += len(tallies)
        allowed += sum(yes for yes, _ in tallies.values())
        refused += sum(no for _, no in tallies.values())
        rows = ((yes + no, client, yes, no) for client, (yes, no) in tallies.items())
        busiest = heapq.nlargest(BUSIEST_CLIENTS, (*busiest, *rows))
    if not clients:
        return ""
    shown = ", ".join(f"{client_label(client)} {yes}+{no}" for _, client, yes, no in busiest)
    return f"clients: {clients} with {allowed} requests allowed, {refused} refused; busiest {shown}"


# ==================================================================================================
# 10. Clients
# ==================================================================================================
#
# The problem: who asks decides what is allowed, and all that is known of it comes from itself. The
# idea: a client is what it calls itself in Authorization, else its address; the rate limiter counts
# by that. Where there is a list of clients, only who has a key on it may write. A browser obeys any
# page, so it may write for pages of this server alone. What it costs: without a list anybody can
# take another name, and with it a rate of its own.

MAX_CLIENT_ID_LENGTH = 128


class OwnPeer(str):
    """The peer of a connection from another process of this server: a client that is on no list,
    and that no rate limits. No header field can claim to be it, as it is known by its type.
    """


def client_id(head: Head, peer: str) -> str:
    """Who asks: the value of Authorization, else the peer's address. A very long value is known by
    its hash.
    """
    client = peer
    # Here and for routes `in` and a subscript: `dict.get` waits for a lock on CPython 3.13 without
    # the interpreter lock, 20,900 requests/s instead of 32,000.
    if "authorization" in head.headers:
        client = head.headers["authorization"] or peer
    if len(client) <= MAX_CLIENT_ID_LENGTH:
        return client
    return hashlib.sha256(client.encode()).hexdigest()


# A letter first and no colon: no address of a peer can pass for a name.
_CLIENT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_CLIENT_LINE = re.compile(
    rf"({_CLIENT_NAME.pattern})[ \t]+([0-9A-Fa-f]{{64}})(?:[ \t]+([0-9]{{1,9}}))?"
)


class ClientListError(ValueError):
    """A list of clients that can't be read: file, line and reason."""


class ClientList:
    """Who may write: names by their keys, of which only the SHA-256 is kept.

    `text` has a client a line: name, SHA-256 of the key in hex, and optionally its own rate in
    requests a second (0: none). Empty lines and those that begin with # are skipped. A name may
    stand twice, while one key follows another; the last rate counts. Raises ClientListError.

    >>> clients = ClientList(f"web1 {hashlib.sha256(b'k3y').hexdigest()} 5", "clients.txt")
    >>> clients.identify("Bearer k3y"), clients.identify("k3y"), clients.identify("guess")
    ('web1', 'web1', None)
    >>> clients.rates
    {'web1': 5}
    """

    def __init__(self, text: str, source: str):
        self.rates: dict[str, int | None] = {}
        self._by_prefix: dict[bytes, tuple[bytes, str]] = {}
        for number, line in enumerate(text.splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _CLIENT_LINE.fullmatch(line)
            if match is None:  # the line is not shown: it may hold a key
                raise ClientListError(
                    f"{source}, line {number}: expected 'name sha256-of-key [rate]'"
                )
            name, digest, rate = match[1], bytes.fromhex(match[2]), match[3]
            if digest[:8] in self._by_prefix:
                raise ClientListError(f"{source}, line {number}: this key stands there twice")
            self._by_prefix[digest[:8]] = (digest, name)
            self.rates[name] = int(rate) if rate else None

    @classmethod
    def read(cls, path: str) -> "ClientList":
        """The list in a file."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls(file.read(), path)
        except UnicodeDecodeError:
            raise ClientListError(f"{path} is not UTF-8") from None
        except OSError as error:
            raise ClientListError(f"can't read {path}: {error.strerror}") from None

    def identify(self, authorization: str) -> str | None:
        """The client whose key an Authorization value holds, bare or as `Bearer KEY`.

        The table is searched by the hash of what was sent, so what its timing could tell is of a
        hash that nobody can aim; the hash itself is compared in constant time.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":  # RFC 6750, 2.1
            key = authorization
        digest = hashlib.sha256(key.strip(" ").encode("latin-1")).digest()
        known, name = self._by_prefix.get(digest[:8], (bytes(32), None))
        return name if hmac.compare_digest(known, digest) else None


def new_client(name: str) -> tuple[str, str]:
    """(a new key, the line for the list of clients)."""
    key = secrets.token_urlsafe(32)
    return key, f"{name} {hashlib.sha256(key.encode()).hexdigest()}"


def refuse_other_origins(head: Head, allowed_hosts: Container[str]) -> None:
    """A page that a browser loaded from elsewhere must not write here: its Origin (RFC 6454) gives
    it away.

    A page may also have made its own name resolve to this machine (DNS rebinding): then Origin and
    Host agree, but Host is a name that nobody here has allowed.
    """
    if "origin" not in head.headers:
        return
    origin, host = head.headers["origin"], head.host.lower()
    if origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise HTTPError(403, f"a page of {origin[:80]!r} may not write to {head.host[:80]!r}")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name not in allowed_hosts and not _is_address(name):
        raise HTTPError(
            403, f"a page may not write here as {name[:80]!r}; --allowed-host would let it"
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


# ==================================================================================================
# 11. Service
# ==================================================================================================
#
# The problem: a request passes through six chapters, each of which may refuse it. The idea: a
# service that takes a whole request and gives a whole answer, and reads and writes no socket.
# Handlers stand in a table of routes, to which other parts may add. Errors are exceptions of the
# chapter that found them; `error_response` alone turns them into a status. What it costs: an answer
# that is not ready at once (a sync, another process) needs a second kind of answer, `Pending`.

RETRY_AFTER_S = 1  # what a client is told when the log can't be written
MAX_JOINED_BYTES = 128 * 1024  # of a batch's lines: larger ones don't wait in memory for others
INTERNAL_ERROR = "internal error; the server's log has the details"
FORM_TYPE = "application/x-www-form-urlencoded"
# What another process writes before its answer: status, length of its field lines (each with its
# CRLF) and of its body in bytes; both follow.
RELAY_HEAD = struct.Struct(">HIQ")


class Relay:
    """An answer that another process writes to a socket. To close our end sooner tells it that
    nobody waits.
    """

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self.status, self.field_lines = 0, b""
        self.body = b""  # what came of it together with the head
        self.left_bytes = -1  # bytes of the body still to pass on; -1: the head is incomplete
        self._received = b""

    def take_head(self, piece: bytes) -> bool:
        """Take some bytes of the head; whether it is here as a whole."""
        received = self._received = self._received + piece
        if len(received) < RELAY_HEAD.size:
            return False
        status, fields_bytes, body_bytes = RELAY_HEAD.unpack_from(received)
        body_at = RELAY_HEAD.size + fields_bytes
        if len(received) < body_at:
            return False
        self.status, self.left_bytes = status, body_bytes
        self.field_lines = received[RELAY_HEAD.size : body_at]
        self.body = received[body_at:]
        return True


class Answer(NamedTuple):
    """What a handler gives: a response, field lines for this client alone, and what to wait for."""

    response: "Response | None"  # None for a Relay: the other process writes the response
    more_fields: bytes = b""
    source: "bytes | Relay | None" = None  # lines for the log, or another process


Handler = Callable[[Request, str], Answer]


class Pending(NamedTuple):
    """An answer that waits for its source."""

    answer: Answer
    source: "bytes | Future[None] | Relay"  # lines that are to be written, or are being written
    head: Head
    client: str
    started: float


def unavailable(reason: str) -> HTTPError:
    """What is said when the server can't right now."""
    return HTTPError(503, reason, fields=[("Retry-After", str(RETRY_AFTER_S))])


def json_response(status: int, value: Any, fields: Iterable[tuple[str, str]] = ()) -> Response:
    """A response whose body is a value as JSON."""
    return Response(status, write_json(value).encode(), fields=fields)


@functools.lru_cache(maxsize=MAX_BATCH)  # 0.1 µs instead of 3
def accepted(metrics: int) -> Response:
    """The answer to a batch that was stored."""
    body = write_json({"success": True, "metrics_processed": metrics}).encode()
    return Response(200, body, metrics=metrics)


def error_response(error: BaseException) -> Response:
    """The answer to a request that failed. What should not have happened is logged: 500."""
    if isinstance(error, HTTPError):
        return json_response(error.status, {"error": str(error)}, error.fields)
    if isinstance(error, JSONError):
        return json_response(400, {"error": f"body is not JSON: {error}"})
    if isinstance(error, BatchError):
        errors = [reason._asdict() for reason in error.reasons]
        return json_response(400, {"error": str(error), "errors": errors})
    if isinstance(error, LogError):
        return error_response(unavailable(str(error)))
    log_unexpected(error)
    return error_response(HTTPError(500, INTERNAL_ERROR))


class Service:
    """The routes, and what they do.

    `limiter` is None where no rate is limited, `clients` where anybody may write. Pages that a
    browser loads may write under addresses, `localhost` and the names in `allowed_hosts`.
    `check_batch` is called with each batch before it goes to the log, and may raise HTTPError;
    `health_facts` give further members of the answer to `GET /health`.

    It knows nothing of sockets, so the whole way from bytes to bytes fits in a few lines. The
    second request is over the rate, and the log holds one line:

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> log, limiter = MetricLog(folder.name), SlidingWindowLimiter(1)
    >>> service, reader = Service(log, limiter, Statistics()), RequestReader()
    >>> body = b'{"metrics":[{"name":"cpu","value":1,"timestamp":0}]}'
    >>> head = f"POST /metrics HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    >>> reader.feed(2 * (head.encode() + body))
    >>> for _ in range(2):
    ...     print(service.answer(reader.next_request(), "10.0.0.7", 0.0).response.status)
    200
    429
    >>> log.close()
    True
    >>> print(open(log.path).read(), end="")
    {"timestamp":"1970-01-01T00:00:00.000Z","name":"cpu","value":1,"type":"gauge"}
    >>> folder.cleanup()
    """

    def __init__(
        self,
        log: MetricLog,
        limiter: SlidingWindowLimiter | None,
        statistics: Statistics,
        clock: Callable[[], float] = time.time,
        *,
        clients: ClientList | None = None,
        allowed_hosts: Iterable[str] = (),
    ):
        self.log, self.limiter, self.statistics = log, limiter, statistics
        self.clients = clients  # replaced as a whole when the list is read again
        self.check_batch: Callable[[Batch], None] | None = None
        self.health_facts: list[Callable[[], dict[str, Any]]] = []
        self._allowed_hosts = frozenset({"localhost", *map(str.lower, allowed_hosts)})
        self.stopping = False  # set once, when the server shuts down
        self._clock = clock
        self._routes: dict[str, dict[str, Handler]] = {}
        self._prefixes: dict[str, dict[str, Handler]] = {}
        self.add_routes(
            {
                "/metrics": {"POST": self.ingest, "GET": self.show_statistics},
                "/health": {"GET": self.show_health},
            }
        )
        add = statistics.add
        add("log_bytes", "gauge", "Size of the log file.", lambda: log.size_bytes, "log_size_bytes")
        if limiter:
            help_ = "Clients that the rate limiter remembers."
            add("clients_tracked", "gauge", help_, lambda: limiter.tracked)
            help_ = "Clients that the rate limiter forgot for want of room."
            add("clients_evicted", "counter", help_, lambda: limiter.evicted)

    def add_routes(self, routes: dict[str, dict[str, Handler]]) -> None:
        """Add paths and the handlers of their methods; a path that ends in `/*` stands for all that
        begin so. Call it before the server runs.
        """
        for path, handlers in routes.items():
            table = handlers | {"HEAD": handlers["GET"], "OPTIONS": self.show_methods}
            if path.endswith("*"):
                self._prefixes[path[:-1]] = table
            else:
                self._routes[path] = table

    def ingest(self, request: Request, client: str) -> Answer:
        """The pipeline of `POST /metrics`: allowed? → JSON → batch → log (durable) → Response."""
        refuse_other_origins(request.head, self._allowed_hosts)
        quota = self._take_quota(client)
        require_json(request.head)
        batch = read_body(decode_content(request), int(self._clock() * 1000))
        if self.check_batch is not None:
            self.check_batch(batch)
        return Answer(accepted(batch.metrics), quota, batch.lines)

    def _take_quota(self, client: str) -> bytes:
        """Count a request against its client's rate: the RateLimit field line of the answer, or
        HTTPError 401 or 429.
        """
        if isinstance(client, OwnPeer):
            return b""
        limiter, clients = self.limiter, self.clients
        own_limit = None
        if clients is not None:
            if client not in clients.rates:
                raise HTTPError(
                    401,
                    "only listed clients may write; send 'Authorization: Bearer KEY'",
                    fields=[("WWW-Authenticate", "Bearer")],
                )
            own_limit = clients.rates[client]
        if limiter is None:
            return b""
        limit = limiter.limit if own_limit is None else own_limit
        if not limit:
            return b""
        decision = limiter.decide(client, limit)
        if decision.allowed:
            return b'RateLimit: "default";r=%d;t=%d\r\n' % (
                decision.remaining,
                math.ceil(limiter.window_s),
            )
        wait_s = math.ceil(decision.retry_after_s)
        raise HTTPError(
            429,
            f"more than {limit} requests in {limiter.window_s:g} s; "
            f"the next one is allowed in {decision.retry_after_s:.3f} s",
            fields=[
                ("Retry-After", str(wait_s)),
                ("RateLimit-Policy", f'"default";q={limit};w={limiter.window_s:g}'),
                ("RateLimit", f'"default";r=0;t={wait_s}'),
            ],
        )

    def require_writer(self, head: Head, client: str) -> None:
        """Let pass who may POST metrics. Raises HTTPError."""
        refuse_other_origins(head, self._allowed_hosts)
        self._take_quota(client)

    def show_statistics(self, request: Request, client: str) -> Answer:
        """`GET /metrics`: the server's own numbers."""
        self.statistics.count()
        if prefers_text(request.head.headers.get("accept", "")):
            text = self.statistics.prometheus().encode()
            return Answer(Response(200, text, "text/plain; version=0.0.4; charset=utf-8"))
        return Answer(json_response(200, self.statistics.snapshot()))

    def show_health(self, request: Request, client: str) -> Answer:
        """`GET /health`: whether batches are accepted now, and if not, why."""
        reason = "shutting down" if self.stopping else self.log.probe()
        health: dict[str, Any] = {"status": "healthy", "service": "ingestion"}
        if reason:
            health |= {"status": "unhealthy", "error": reason}
        for facts in self.health_facts:
            health |= facts()
        retry = [("Retry-After", str(RETRY_AFTER_S))] if reason else []
        return Answer(json_response(503 if reason else 200, health, retry))

    def show_methods(self, request: Request, client: str) -> Answer:
        """`OPTIONS`: which methods a route has."""
        allowed = self._allowed_methods(request.head.path)
        return Answer(Response(200, b"", fields=[("Allow", allowed)]))

    def _allowed_methods(self, path: str) -> str:
        every = [*self._routes.values(), *self._prefixes.values()]
        routes = every if path == "*" else [self._handlers(path)]
        return ", ".join(dict.fromkeys(method for handlers in routes for method in handlers))

    def _handlers(self, path: str) -> dict[str, Handler]:
        if path in self._routes:
            return self._routes[path]
        for prefix, handlers in self._prefixes.items():
            if path.startswith(prefix):
                return handlers
        there = [*self._routes, *(f"{prefix}…" for prefix in self._prefixes)]
        raise HTTPError(404, f"no route {path[:80]!r}; there are {', '.join(there)}")

    def _handler(self, head: Head) -> Handler:
        if head.path == "*":
            return self.show_methods
        handlers = self._handlers(head.path)
        if head.method not in handlers:
            raise HTTPError(
                405,
                f"{head.path} does not take {head.method}",
                fields=[("Allow", self._allowed_methods(head.path))],
            )
        return handlers[head.method]

    def answer(
        self, request: Request, peer: str, started: float, joins: bool = False
    ) -> Answer | Pending:
        """Answer a whole request of the address `peer`, whose last byte came at `started`
        (time.perf_counter). Where it `joins` others, the caller has its lines stored with theirs,
        unless they are many.
        """
        if self.clients is None:
            client = client_id(request.head, peer)
        else:  # a name on the list, or the peer's address
            client = self.clients.identify(request.head.headers.get("authorization", "")) or peer
        try:
            answer = self._handler(request.head)(request, client)
            lines = answer.source or b""
            pending = Pending(answer, lines, request.head, client, started)
            if isinstance(lines, Relay) or (joins and 0 < len(lines) <= MAX_JOINED_BYTES):
                return pending
            durable = self.store([pending]) if lines else None
            return pending._replace(source=durable) if durable else self.settle(pending, None)
        except (HTTPError, JSONError, BatchError, LogError) as error:
            return Answer(self.refuse(error, client, started))

    def store(self, joined: Iterable[Pending]) -> "Future[None] | None":
        """Append the lines of requests to the log in one piece; see MetricLog.append."""
        lines = [pending.source for pending in joined]
        return self.log.append(b"".join(lines))  # type: ignore[arg-type]  # none of them is a relay

    def settle(self, pending: Pending, error: BaseException | None) -> Answer:
        """The answer to a request whose batch is durable, or could not be kept."""
        if error is not None:
            return Answer(self.refuse(error, pending.client, pending.started))
        response = pending.answer.response
        assert response is not None  # only a relay has none
        self._note(pending.client, response.status, pending.started, response.metrics)
        return pending.answer

    def relayed(self, pending: Pending, status: int) -> None:
        """Count an answer that came from another process."""
        self._note(pending.client, status, pending.started)

    def refuse(self, error: BaseException, client: str, started: float) -> Response:
        """The answer to what failed, or never became a request. `started` is when its last bytes
        came, or when it was given up.
        """
        response = error_response(error)
        invalid = isinstance(error, (JSONError, BatchError))
        self._note(client, response.status, started, invalid=invalid)
        return response

    def _note(
        self, client: str, status: int, started: float, metrics: int = 0, invalid: bool = False
    ) -> None:
        if not isinstance(client, OwnPeer):
            self.statistics.note(status, started, metrics, invalid)


def require_json(head: Head) -> None:
    """Content-Type may be missing, but it may not say anything else."""
    if "content-type" not in head.headers:
        return
    content_type = head.headers["content-type"]
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise HTTPError(
            415,
            f"Content-Type is {content_type[:80]!r}; send 'Content-Type: application/json'",
            fields=[("Accept", "application/json")],
        )


def prefers_text(accept: str) -> bool:
    """Whether an Accept header (RFC 9110, 12.5.1) asks for Prometheus's text rather than for JSON.

    >>> prefers_text("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3,*/*;q=0.1")
    True
    >>> prefers_text("application/json, text/plain, */*"), prefers_text("*/*")
    (False, False)
    """
    text = json = 0.0
    for part in accept.split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if re.fullmatch(r"q=[01](\.[0-9]{0,3})?", parameter):
                weight = float(parameter[2:])
        if media_type in ("text/plain", "application/openmetrics-text"):
            text = max(text, weight)
        elif media_type == "application/json":
            json = max(json, weight)
    return text > json


# ==================================================================================================
# 12. Connections
# ==================================================================================================
#
# The problem: ten thousand connections, most of them idle, some slow, some hostile, and a request
# on any of them wants its answer now. The idea: a connection with nothing to do is parked, and
# costs a file descriptor and a small object. It waits for one thing (the rest of a head, room for
# an answer, the disk), for a limited time, in the queue of those that wait for the same. `epoll`
# tells which ones have become ready. A connection belongs to one thread at a time: to the one that
# claimed it when it was parked. What it costs: what is done for a connection must be written as
# steps between two waits (`Turns`), and not as one loop.


class Timeouts(NamedTuple):
    """How long a client may take, in seconds."""

    head_s: float = 10.0  # from the first byte of a request to the end of its head
    body_s: float = 20.0  # from the end of the head to the end of the body
    answer_s: float = 10.0  # to take some of an answer that waits for it
    idle_s: float = 60.0  # between two requests
    linger_s: float = 2.0  # to read an error before the connection is closed
    stop_s: float = 2.5  # to finish its request when the server shuts down


DEFAULT_TIMEOUTS = Timeouts()
RECEIVE_BYTES = 64 * 1024
RELAY_S = 125.0  # how long an answer of another process is waited for, at each step
READ, WRITE = select.POLLIN, select.POLLOUT  # epoll gives them the same values
HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
_ONESHOT = getattr(select, "EPOLLONESHOT", 0)  # alone: report nothing


class WaitQueue:
    """Where connections wait for the same thing, for the same time at most.

    As the time-out is the same for all, their order of arrival is the order of their deadlines: to
    come and to go is constant work, and only the front has to be looked at.
    """

    __slots__ = ("events", "limit_s", "members")

    def __init__(self, events: int, limit_s: float):
        self.events, self.limit_s = events, limit_s
        self.members: OrderedDict[Connection, None] = OrderedDict()  # guarded by Connections.lock


@dataclasses.dataclass(slots=True, eq=False)
class Connection:
    """One client's connection. Its fields belong to the thread that claimed it, but for those
    marked.
    """

    socket: socket.socket
    peer: str
    fd: int = -1
    reader: RequestReader = dataclasses.field(default_factory=RequestReader)
    unsent: bytes | memoryview = b""
    ready_at: float = 0.0  # when the request of this turn had arrived, by time.perf_counter
    pending: Pending | None = None  # the answer that waits for its source
    hung_up: bool = False  # the client has closed its end
    has_buffered_requests: bool = False  # serve what stands in the reader before reading
    ending: bool = False  # nothing more is read: once all is sent, linger
    restart_timeout: bool = True  # it has made progress since it was parked
    drained_bytes: int = 0
    waits_in: WaitQueue | None = None  # guarded by Connections.lock, as the three below
    deadline: float = 0.0
    parked: bool = False  # whether it may be claimed
    armed: int = 0  # the events that epoll reports of it; 0: it is not registered
    # What only TLS changes: whether the handshake is still to be made, whether something was
    # decrypted that no recv() has asked for, and whether TLS must write before it can read.
    shaking_hands: bool = False
    tls_has_buffered: bool = False
    must_write: bool = False

    def __post_init__(self) -> None:
        self.fd = self.socket.fileno()

    @property
    def relay_fd(self) -> int:
        """The descriptor of the relay that it waits for."""
        assert self.pending is not None and isinstance(self.pending.source, Relay)
        return self.pending.source.socket.fileno()

    def receive(self) -> bytes | None:
        """What has arrived: b"" at the end, None if there is nothing now."""
        try:
            return self.socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def put(self, answer: bytes) -> None:
        """Add to what is unsent."""
        self.unsent = b"".join((self.unsent, answer)) if self.unsent else answer

    def flush(self) -> bool:
        """Send what the socket takes; whether that was all."""
        try:
            sent = self.socket.send(self.unsent, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return self._sent(sent)

    def _sent(self, count: int) -> bool:
        """So many bytes of what was unsent are sent; whether that was all."""
        self.restart_timeout = True
        self.unsent = b"" if count == len(self.unsent) else memoryview(self.unsent)[count:]
        return not self.unsent

    def end_output(self) -> None:
        """Tell the client that nothing more will come."""
        self.socket.shutdown(socket.SHUT_WR)


class _TLSConnection(Connection):
    """A connection whose bytes are encrypted (RFC 8446); its handshake is made by turns, too."""

    __slots__ = ("_tls",)

    def __init__(self, sock: socket.socket, peer: str, context: ssl.SSLContext):
        sock.setblocking(False)
        wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        super().__init__(wrapped, peer, shaking_hands=True)
        self._tls = wrapped

    def receive(self) -> bytes | None:
        self.must_write = False
        try:
            if self.shaking_hands:
                self._tls.do_handshake()
                self.shaking_hands = False
            received = self._tls.recv(RECEIVE_BYTES)
        except ssl.SSLWantReadError:
            self.tls_has_buffered = False
            return None
        except ssl.SSLWantWriteError:
            self.must_write = True
            return None
        self.tls_has_buffered = self._tls.pending() > 0  # epoll knows nothing of these
        return received

    def flush(self) -> bool:
        try:
            sent = self._tls.send(self.unsent)
        except ssl.SSLWantWriteError:
            return False
        return self._sent(sent)

    def end_output(self) -> None:
        try:
            self._tls.unwrap()  # sends close_notify: the answer was not cut off by somebody else
        except ssl.SSLError as error:  # usual: the client's own is not there yet
            logger.debug("%s: TLS ended without the client's consent: %s", self.peer, error.reason)
        socket.socket.shutdown(self._tls, socket.SHUT_WR)


class Connections:
    """The open connections of a server, and what each of them waits for.

    Without `epoll` a thread waits for each connection itself, and claims it afterwards.
    """

    def __init__(self, timeouts: Timeouts, clock: Callable[[], float], has_epoll: bool):
        self.timeouts, self._clock = timeouts, clock
        # Guards `open`, the queues, and the Connection fields marked so. No other lock is taken
        # under it.
        self.lock = threading.Lock()
        self.open: dict[int, Connection] = {}  # by file descriptor
        self.idle = WaitQueue(READ, timeouts.idle_s)
        self.own = WaitQueue(READ, math.inf)  # idle too, but of this server's own processes
        self.shaking_hands = WaitQueue(READ, timeouts.head_s)
        self.in_head = WaitQueue(READ, timeouts.head_s)
        self.in_body = WaitQueue(READ, timeouts.body_s)
        self.answering = WaitQueue(WRITE, timeouts.answer_s)
        self.lingering = WaitQueue(READ, timeouts.linger_s)
        # It has requests that were read: ready as soon as an answer can be written.
        self.ready = WaitQueue(READ | WRITE, timeouts.answer_s)
        # 0 events: epoll does not report it; the log's Future calls Turns.on_durable.
        self.committing = WaitQueue(0, math.inf)
        self.relaying = WaitQueue(HUNG_UP, RELAY_S)  # for another process
        self._relays: dict[int, Connection] = {}  # those, by the descriptors of their relays
        # Claimed, and to be given their turns; None is the listener. A deque is atomic.
        self.claimed: deque[Connection | None] = deque()
        # Claimed too, but with requests left from an earlier turn; filled under the lock.
        self._backlog: deque[Connection] = deque()
        self.epoll = select.epoll() if has_epoll else None
        self.oneshot = 0  # _ONESHOT where several workers ask epoll: each tells one of them
        self._listener_fd = -1

    def watch(self, listener_fd: int, stop_fd: int) -> None:
        """Have epoll report new connections, and the end. Level-triggered: this needs no arming,
        and a worker that is held up does not keep it from others.
        """
        if self.epoll is not None:
            self._listener_fd = listener_fd
            self.epoll.register(listener_fd, READ)
            self.epoll.register(stop_fd, READ)

    def pause_listener(self, paused: bool) -> None:
        """Have epoll report no new connections, or report them again."""
        with self.lock:  # so that the listener does not close in between
            if self.epoll is not None and self._listener_fd >= 0:
                self.epoll.modify(self._listener_fd, 0 if paused else READ)

    def forget_listener(self) -> None:
        """Have epoll report no new connections any more: the listener is about to be closed."""
        with self.lock:
            if self.epoll is not None and self._listener_fd >= 0:
                self.epoll.unregister(self._listener_fd)
            self._listener_fd = -1

    def add(self, connection: Connection) -> None:
        """Add a connection, claimed by the caller."""
        with self.lock:
            self.open[connection.fd] = connection

    def park(self, connection: Connection, queue: WaitQueue) -> None:
        """Let a connection wait, and let others claim it."""
        self.park_all([(connection, queue)])

    def park_all(self, waiting: Iterable[tuple[Connection, WaitQueue]]) -> None:
        """The same for some connections. One that epoll does not take is closed.

        Where one worker asks it, epoll is level-triggered and goes on reporting, so one that waits
        for the same as before needs no arming: 0.8 µs less a request.
        """
        refused = []
        with self.lock:
            now = self._clock()
            for connection, queue in waiting:
                if connection.waits_in is not queue or connection.restart_timeout:
                    if connection.waits_in is queue:
                        queue.members.move_to_end(connection)
                    else:
                        self._move(connection, queue)
                    connection.deadline = now + queue.limit_s
                    connection.restart_timeout = False
                connection.parked = queue is not self.committing
                # Under the lock: once claimed it can be closed, and its descriptor be another's.
                try:
                    if connection.armed != queue.events and connection.parked:
                        self._arm(connection, queue.events)
                    if queue is self.relaying:
                        self._arm_relay(connection)
                except OSError as error:
                    logger.warning("can't wait for %s: %s", connection.peer, error.strerror)
                    connection.parked = False
                    refused.append(connection)
        for connection in refused:
            self.close(connection)

    def _arm(self, connection: Connection, events: int) -> None:
        """Have epoll report these events of a connection, and no others. The lock is held."""
        if self.epoll is not None and connection.armed != events:
            arm = self.epoll.modify if connection.armed else self.epoll.register
            arm(connection.fd, events | self.oneshot)
            connection.armed = events

    def _arm_relay(self, connection: Connection) -> None:
        """Have epoll report a relay once. The lock is held."""
        if self.epoll is not None:
            relay = connection.relay_fd
            arm = self.epoll.modify if relay in self._relays else self.epoll.register
            arm(relay, READ | _ONESHOT)
            self._relays[relay] = connection

    @staticmethod
    def _move(connection: Connection, queue: WaitQueue | None) -> None:
        if connection.waits_in is not None:
            del connection.waits_in.members[connection]
        if queue is not None:
            queue.members[connection] = None
        connection.waits_in = queue

    def close(self, connection: Connection) -> None:
        """Close a claimed connection."""
        with self.lock:
            self._move(connection, None)
            self.open.pop(connection.fd, None)  # before the descriptor can be another's
        self.end_relay(connection)
        connection.socket.close()

    def end_relay(self, connection: Connection) -> None:
        """Close the relay of a connection, if it has one: its writer sees that nobody waits."""
        if connection.pending is None or not isinstance(connection.pending.source, Relay):
            return
        with self.lock:
            self._relays.pop(connection.relay_fd, None)
        connection.pending.source.socket.close()
        connection.pending = None

    # ---- claiming

    def claim(self, connection: Connection) -> bool:
        """Make a parked connection this thread's own; False if another was faster."""
        with self.lock:
            return bool(self._claim_parked([connection]))

    def claim_ready(self, most: int) -> None:
        """Wait up to a second until something is ready, and add it to `claimed`.

        A connection with pipelined requests left over goes to the backlog, of which each round
        serves one: others wait for one turn of it at most, and not for 200.
        """
        assert self.epoll is not None
        ready = self.epoll.poll(0 if self._backlog else 1.0, most)
        now = time.perf_counter()
        with self.lock:
            for fd, events in ready:
                if fd in self.open or fd in self._relays:
                    connection = self.open[fd] if fd in self.open else self._relays[fd]
                    if not connection.parked:
                        if connection.armed and fd == connection.fd:
                            self._arm(connection, _ONESHOT)  # others would be woken again and again
                    else:
                        connection.parked = False
                        connection.armed |= self.oneshot
                        connection.ready_at = now
                        connection.hung_up = fd == connection.fd and bool(events & HUNG_UP)
                        left_over = connection.waits_in is self.ready
                        (self._backlog if left_over else self.claimed).append(connection)
                elif fd == self._listener_fd:
                    self.claimed.append(None)
            if self._backlog:
                connection = self._backlog.popleft()
                connection.ready_at = now
                self.claimed.append(connection)

    def take_claimed(self) -> list[Connection]:
        """Take all that is claimed and has not had its turn: the caller is to park it again."""
        with self.lock:
            left = list(self._backlog)
            self._backlog.clear()
        while self.claimed:
            with contextlib.suppress(IndexError):  # another worker was faster
                connection = self.claimed.popleft()
                if connection is not None:  # the listener reports again by itself
                    left.append(connection)
        return left

    def claim_late(self) -> list[Connection]:
        """Claim what has waited for too long."""
        now = self._clock()
        with self.lock:
            return self._claim_parked(
                connection
                for queue in (self.idle, self.shaking_hands, self.in_head, self.in_body,
                              self.answering, self.lingering, self.relaying, self.ready)
                for connection in itertools.takewhile(lambda c: c.deadline <= now, queue.members)
            )  # fmt: skip

    def claim_idle(self) -> list[Connection]:
        """Claim all that are idle."""
        with self.lock:
            return self._claim_parked(self.idle.members)

    @staticmethod
    def _claim_parked(waiting: Iterable[Connection]) -> list[Connection]:
        """Claim those that no other thread has claimed. The lock is held."""
        ready_at = time.perf_counter()
        claimed = [connection for connection in waiting if connection.parked]
        for connection in claimed:
            connection.parked, connection.ready_at = False, ready_at
        return claimed

    def close_if_idle(self, connection: Connection) -> None:
        """Close a connection if it is still idle after its turn."""
        with self.lock:
            if not connection.parked or connection.waits_in is not self.idle:
                return
            connection.parked = False
        try:  # where a thread waits for it, this wakes it
            socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("%s was gone before the stop: %s", connection.peer, error)
        self.close(connection)

    def evict_idle(self, count: int) -> int:
        """Shut down up to `count` of the connections idle longest, so that their owners close
        them.
        """
        with self.lock:
            parked = (connection for connection in self.idle.members if connection.parked)
            idle = list(itertools.islice(parked, count))
            for connection in idle:
                self._move(connection, self.lingering)
                connection.deadline = self._clock() + self.timeouts.linger_s
                # Not TLS's own shutdown: the connection's owner is to find the end of the input. An
                # error says that it was reset in the meantime: its owner will see that too.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)
        return len(idle)


# ==================================================================================================
# 13. Turns
# ==================================================================================================
#
# The problem: a thread that waits for one client serves no other. The idea: a turn is what is done
# for a connection between two waits: read once, answer the whole requests that have come, write.
# Nothing in it waits for a client. Each step returns the queue in which the connection waits next,
# so all that can become of a connection stands in this chapter. What it costs: what a client has
# left to say is kept in its connection, not in the local variables of a loop.

LINGER_BYTES = 1024 * 1024  # how much is read and dropped after an error
REQUESTS_A_TURN = 4  # pipelined; then the others have their turn
# Batches of a round that are written to the log at once: 19.3 µs a request instead of 21.3. No more
# connections than that wait for a write that hangs.
JOINED_WRITES = 16


_Step = Callable[[Connection], WaitQueue | None]
_Waiting = TypeVar("_Waiting")


def _take(waiting: "deque[_Waiting]", most: int) -> "list[_Waiting]":
    """Some of those that wait, fewer where another worker is faster; to take one is atomic."""
    taken: list[_Waiting] = []
    try:
        while len(taken) < most:
            taken.append(waiting.popleft())
    except IndexError:
        pass
    return taken


class Turns:
    """The steps of connections. Each returns the queue to wait in, or None: close it."""

    def __init__(self, service: Service, connections: Connections):
        self._service, self._connections = service, connections
        # Not a real queue: a step returns it to say "send after this round"; the connection goes
        # to _unsent, with the step that is due then.
        self._after_round = WaitQueue(0, math.inf)
        self._unsent: deque[tuple[Connection, _Step]] = deque()  # any worker may take from it
        # The same for what is to be written to the log before it is answered.
        self._to_write = WaitQueue(0, math.inf)
        self._unwritten: deque[Connection] = deque()
        self._joins_writes = connections.epoll is not None

    def step(self, connection: Connection, action: _Step) -> None:
        """Take a step for a claimed connection; then park it, or close it."""
        queue = self._attempt(connection, action)
        if queue is None:
            self._connections.close(connection)
        elif queue is self._after_round:
            self._unsent.append((connection, self._send))
        elif queue is self._to_write:
            self._unwritten.append(connection)
        else:
            self._connections.park(connection, queue)
            if queue is self._connections.committing and self._connections.epoll is not None:
                assert connection.pending is not None  # that is what it was parked for
                durable = connection.pending.source
                assert isinstance(durable, Future)
                durable.add_done_callback(partial(self.on_durable, connection))

    def _attempt(self, connection: Connection, action: _Step) -> WaitQueue | None:
        """The queue that a step gives, whatever goes wrong in it."""
        try:
            return action(connection)
        except OSError:  # the client is gone: nobody is left to be told
            return None
        except Exception as error:  # an error of ours costs the one connection on which it showed
            if connection.ending:
                log_unexpected(error)
                return None
            return self._attempt(connection, partial(self._refuse, error=error))

    def end_round(self) -> None:
        """Write the batches that the last turns put aside, send their answers, and count them.

        Answers of one round leave together, so that a client with many connections is woken once
        and not for each: 44,900 requests/s instead of 41,000 with 50 connections.
        """
        while joined := _take(self._unwritten, JOINED_WRITES):
            self._write(joined)
        waiting = []
        for connection, action in _take(self._unsent, len(self._unsent)):
            queue = self._attempt(connection, action)
            if queue is None:
                self._connections.close(connection)
            else:
                waiting.append((connection, queue))
        if waiting:
            self._connections.park_all(waiting)
        self._service.statistics.count()

    def _write(self, joined: list[Connection]) -> None:
        """Append the batches of some connections to the log; they are answered after the round."""
        durable = error = None
        try:
            durable = self._service.store([c.pending for c in joined if c.pending is not None])
        except Exception as failure:  # settle() tells what it means
            error = failure
        if durable is None:
            answer = partial(self._answer_durable, error=error)
            self._unsent.extend((connection, answer) for connection in joined)
        else:
            for connection in joined:
                self.step(connection, partial(self._await_sync, durable=durable))

    def _await_sync(self, connection: Connection, durable: "Future[None]") -> WaitQueue:
        assert connection.pending is not None  # only then was it put aside
        connection.pending = connection.pending._replace(source=durable)
        return self._connections.committing

    def on_durable(self, connection: Connection, durable: "Future[None]") -> None:
        """Answer a request with whose batch the log is done. Runs in the log's thread."""
        self.step(connection, partial(self._answer_durable, error=durable.exception()))
        self._service.statistics.count()

    def _answer_durable(
        self, connection: Connection, error: BaseException | None
    ) -> WaitQueue | None:
        assert connection.pending is not None  # only then was this asked for
        pending, connection.pending = connection.pending, None
        self._put_response(connection, self._service.settle(pending, error), pending.head)
        return self._after_pending(connection)

    def take_turn(self, connection: Connection) -> WaitQueue | None:
        """The next step: a turn, or what is left of an earlier one."""
        if connection.waits_in is self._connections.lingering:
            return self._drain(connection)
        if connection.unsent or connection.ending:
            return self._send(connection)
        if connection.pending is not None:
            return self._relay(connection)
        if connection.has_buffered_requests:
            connection.has_buffered_requests = False
        else:
            received = connection.receive()
            if received is None:
                return self._wait(connection)
            if not received:
                if not connection.reader.in_request:
                    return None
                fault = HTTPError(400, "the connection ended in the middle of a request")
                return self._refuse(connection, fault)
            request = connection.reader.whole_request(received)
            if request is not None:
                return self._answer(connection, request) or self._finish_turn(connection)
            connection.reader.feed(received)
        return self._serve(connection)

    def _serve(self, connection: Connection) -> WaitQueue | None:
        """Answer the whole requests that have arrived, in their order."""
        reader = connection.reader
        for _ in range(REQUESTS_A_TURN):
            try:
                request = reader.next_request()
            except HTTPError as error:
                return self._refuse(connection, error)
            if request is None:
                if reader.take_continue():
                    connection.put(CONTINUE)
                break
            queue = self._answer(connection, request)
            if queue is not None:
                return queue
            if connection.ending:
                break
        else:
            connection.has_buffered_requests = reader.in_request
        return self._finish_turn(connection)

    def _answer(self, connection: Connection, request: Request) -> WaitQueue | None:
        """Answer a request; None, or the queue in which its connection waits for the answer."""
        joins = self._joins_writes and not connection.reader.in_request
        answer = self._service.answer(request, connection.peer, connection.ready_at, joins)
        if not isinstance(answer, Pending):
            self._put_response(connection, answer, request.head)
            return None
        connection.pending = answer
        if isinstance(answer.source, Relay):
            return self._send(connection) if connection.unsent else self._connections.relaying
        return self._to_write if isinstance(answer.source, bytes) else self._connections.committing

    def _finish_turn(self, connection: Connection) -> WaitQueue | None:
        if connection.unsent and self._connections.epoll is not None:
            return self._after_round
        return self._send(connection)

    def _put_response(self, connection: Connection, answer: Answer, head: Head) -> None:
        persistence = CLOSE if self._service.stopping else head.persistence
        response, more_fields, _ = answer
        assert response is not None  # only a relay has none
        connection.put(
            response.encode(persistence, self._date(), head.method == "HEAD", more_fields)
        )
        connection.restart_timeout = True
        if persistence is CLOSE:
            connection.ending = True

    @staticmethod
    def _date() -> bytes:
        """The Date field line of an answer that is sent now."""
        return date_field(int(time.time()))

    def _relay(self, connection: Connection) -> WaitQueue | None:
        """Pass on a piece of an answer that another process writes; the next one is read when the
        client has taken it.
        """
        assert connection.pending is not None  # that is when it is called
        pending, relay = connection.pending, connection.pending.source
        assert isinstance(relay, Relay)
        if connection.hung_up:
            return None
        try:
            piece = relay.socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self._connections.relaying
        except ConnectionError:
            piece = b""
        if not piece:
            if relay.left_bytes >= 0:
                return None  # the client must see that it was cut off
            self._connections.end_relay(connection)
            error = unavailable("the process that answers ended before it did")
            refusal = self._service.refuse(error, connection.peer, pending.started)
            self._put_response(connection, Answer(refusal), pending.head)
            return self._after_pending(connection)
        if relay.left_bytes < 0:
            if not relay.take_head(piece):
                return self._connections.relaying
            piece = self._put_relay_head(connection, pending, relay)
        connection.put(piece[: relay.left_bytes])
        relay.left_bytes -= len(piece)
        connection.restart_timeout = True
        if relay.left_bytes <= 0:
            self._connections.end_relay(connection)
            if self._service.stopping or pending.head.persistence is CLOSE:
                connection.ending = True
            return self._after_pending(connection)
        return self._send(connection) if connection.unsent else self._connections.relaying

    def _put_relay_head(self, connection: Connection, pending: Pending, relay: Relay) -> bytes:
        """Put the head of a relayed answer; returns what came of its body."""
        head = pending.head
        connection.put(
            b"".join((
                status_line(relay.status), self._date(), relay.field_lines,
                b"Content-Length: %d\r\n" % relay.left_bytes,
                CLOSE if self._service.stopping else head.persistence, b"\r\n",
            ))
        )  # fmt: skip
        self._service.relayed(pending, relay.status)
        if head.method == "HEAD":
            relay.left_bytes = 0
        return relay.body[: relay.left_bytes]

    def _after_pending(self, connection: Connection) -> WaitQueue | None:
        connection.has_buffered_requests = connection.reader.in_request and not connection.ending
        return self._send(connection)

    def _refuse(self, connection: Connection, error: Exception) -> WaitQueue | None:
        """Answer what can't be answered otherwise; the connection ends, but not before the client
        could read it.
        """
        response = self._service.refuse(error, connection.peer, connection.ready_at)
        connection.put(response.encode(CLOSE, self._date()))
        connection.restart_timeout = connection.ending = True
        return self._send(connection)

    def _send(self, connection: Connection) -> WaitQueue | None:
        """Send what is to be sent."""
        if connection.unsent and not connection.flush():
            return self._connections.answering
        if connection.pending is not None:
            return self._connections.relaying
        if connection.ending:
            connection.end_output()
            return self._connections.lingering
        return self._wait(connection)

    def _wait(self, connection: Connection) -> WaitQueue:
        """Where a connection waits for more of a request, or for a new one."""
        queues = self._connections
        if connection.must_write:
            return queues.answering
        if connection.shaking_hands:
            return queues.shaking_hands
        if connection.has_buffered_requests or connection.tls_has_buffered:
            return queues.ready
        if connection.reader.in_request:
            return queues.in_body if connection.reader.in_body else queues.in_head
        return queues.own if isinstance(connection.peer, OwnPeer) else queues.idle

    def _drain(self, connection: Connection) -> WaitQueue | None:
        """Lingering close: a reset, which unread bytes would cause, could destroy the answer (RFC
        9112, 9.6).
        """
        received = connection.receive()
        if received is not None:
            connection.drained_bytes += len(received)
            if not received or connection.drained_bytes > LINGER_BYTES:
                return None
        return self._connections.lingering

    def time_out(self, connection: Connection) -> WaitQueue | None:
        """What becomes of a connection that has waited for too long."""
        queues = self._connections
        if connection.waits_in in (queues.in_head, queues.in_body):
            return self._refuse(connection, HTTPError(408, "the request did not arrive in time"))
        source = connection.pending.source if connection.pending else None
        if isinstance(source, Relay) and source.left_bytes < 0:
            queues.end_relay(connection)
            return self._refuse(connection, unavailable("no answer came in time"))
        return None

    def turn_away(self, connection: Connection) -> None:
        """Tell a client that there is no room for its connection, if that needs no waiting."""
        if not connection.shaking_hands:
            error = unavailable("too many connections")
            refusal = self._service.refuse(error, connection.peer, connection.ready_at)
            try:
                connection.put(refusal.encode(CLOSE, self._date()))
                connection.receive()  # so that closing does not reset
                connection.flush()
            except OSError as failure:
                logger.debug("%s was turned away and is gone: %s", connection.peer, failure)
        connection.socket.close()


# ==================================================================================================
# 14. Workers
# ==================================================================================================
#
# The problem: under the interpreter lock every runnable thread slows the others down, so a thread
# for each connection is slow; and one thread for all stops when one turn is held up. The idea: few
# workers, which take what epoll reports, one after another, and never wait for a client. What can
# still hold a worker up is its own work, so somebody looks every 20 ms whether each worker has
# moved: one that has not is replaced, and ends when its turn does. What it costs: a thread that
# does nothing but look.

MAX_WORKERS = 64


class _Worker(threading.Thread):
    """A thread that gives turns to connections, and what the housekeeper has to know of it."""

    def __init__(self, work: Callable[["_Worker"], None]):
        super().__init__(name="worker", daemon=True)
        self._work = work
        # Each field below is written by one thread only; reading an attribute is atomic.
        self.turns = 0  # by the worker: how many it began
        self.busy = True  # by the worker: not waiting for epoll
        self.turns_seen = -1  # by the housekeeper, at its last look
        self.replaced = False  # by the housekeeper: end after this turn

    def run(self) -> None:
        self._work(self)


class _Workers:
    """A few threads over all connections. `accept` is called when the listener is ready,
    `after_wait` after each wait.
    """

    def __init__(
        self,
        connections: Connections,
        turns: Turns,
        accept: Callable[[_Worker], None],
        after_wait: Callable[[], None],
    ):
        self._connections, self._turns = connections, turns
        self._accept, self._after_wait = accept, after_wait
        self._lock = threading.Lock()  # guards `running`; nothing is locked under it
        self.running: set[_Worker] = set()
        self.most_ready = 64  # how many a worker claims at once
        self._finished = False  # set once

    def start(self, count: int) -> None:
        """Start the steady workers, which share what is ready. Raises OSError."""
        self.most_ready = 64 if count == 1 else 4
        self._connections.oneshot = 0 if count == 1 else _ONESHOT
        for _ in range(count):
            self.start_one()

    def start_one(self) -> None:
        """Start a worker. Raises OSError."""
        worker = _Worker(self._work)
        with self._lock:
            self.running.add(worker)
        try:
            worker.start()
        except RuntimeError as error:  # no thread to be had: those that there are go on
            with self._lock:
                self.running.discard(worker)
            raise OSError(errno.EAGAIN, str(error)) from None

    def _work(self, worker: _Worker) -> None:
        """Give each that is ready its turn; then see what has become ready meanwhile."""
        claimed, turns = self._connections.claimed, self._turns
        while not (self._finished or worker.replaced):
            try:
                connection = claimed.popleft()
            except IndexError:
                turns.end_round()
                worker.busy = False
                self._connections.claim_ready(self.most_ready)
                worker.turns += 1
                worker.busy = True
                self._after_wait()
                continue
            worker.turns += 1
            if connection is None:
                self._accept(worker)
            else:
                turns.step(connection, turns.take_turn)
        turns.end_round()
        # It may have been replaced while it claimed: its successor, which waits for epoll by then,
        # would look there only when the wait times out.
        for connection in self._connections.take_claimed():
            turns.step(connection, lambda connection: connection.waits_in)
        with self._lock:
            self.running.discard(worker)

    def replace_stuck(self) -> bool:
        """Start a new worker for each that is still at the turn of the last look; whether any is at
        work.
        """
        with self._lock:
            workers = list(self.running)
        for worker in workers:
            stuck = worker.busy and worker.turns == worker.turns_seen and not worker.replaced
            if stuck and len(workers) < MAX_WORKERS:
                try:
                    self.start_one()
                except OSError as error:
                    logger.warning("can't replace a worker that is held up: %s", error.strerror)
                    break
                worker.replaced = True
            worker.turns_seen = worker.turns
        return any(worker.busy for worker in workers)

    def finish(self) -> None:
        """Have all end when they have given their turns."""
        self._finished = True

    def join(self, deadline: float) -> None:
        """Wait until all have ended, or until a time of time.monotonic."""
        for worker in list(self.running):
            worker.join(max(0.0, deadline - time.monotonic()))


def steady_threads() -> int:
    """How many workers pay: one where the interpreter lock lets only one run, else one a core."""
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    return 1 if has_lock else os.cpu_count() or 1


# ==================================================================================================
# 15. Server
# ==================================================================================================
#
# The problem: while requests are served, connections come and go, some are late, files are moved,
# and at last somebody says stop. The idea: beside the workers one thread, the housekeeper, does
# what has its time: it replaces workers that are held up, ends what is late, looks after the log,
# and waits for orders. Where there is no epoll, and with `--threads 0`, it is socketserver's plain
# way: a thread for each connection, which waits for it. Both take the same turns. What it costs:
# two ways to wait.

MAX_CONNECTIONS = 10_000
SPARE_DESCRIPTORS = 64  # for the log, epoll and the like, beside the connections
TICK_S = 0.02  # a worker that takes longer than this for one turn is replaced
QUIET_TICKS = 50  # so many without work, and the housekeeper sleeps a second at a time
DECISIONS_INTERVAL_S = 60.0
ACCEPTS_A_TURN = 16


class Server(socketserver.ThreadingTCPServer):
    """Serves a `Service` on a TCP address (host, port); port 0 takes a free one, `server_address`
    says which.

    `threads` is the number of steady workers, 0 for a thread a connection; with `tls` it speaks
    HTTPS. `serve_forever` runs until `shutdown` or `stop_soon` and then finishes what is in flight;
    `server_close` gives the address back. `reload_soon` has `reload` called; `jobs` are called by
    the housekeeper, each at its interval in seconds, or once a second while nothing happens. Raises
    OSError.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # the backlog: connections that are not yet accepted

    def __init__(
        self,
        address: tuple[str, int],
        service: Service,
        *,
        threads: int | None = None,
        max_connections: int = MAX_CONNECTIONS,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        clock: Callable[[], float] = time.monotonic,
        tls: ssl.SSLContext | None = None,
        reload: Callable[["Server"], None] | None = None,
        jobs: Iterable[tuple[float, Callable[[], None]]] = (),
    ):
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.service, self.max_connections = service, max_connections
        self.threads = steady_threads() if threads is None else threads
        self.tls = tls  # replaced as a whole when the certificate is read again
        self._clock, self._reload = clock, reload
        has_epoll = bool(self.threads) and hasattr(select, "epoll")
        self.connections = Connections(timeouts, clock, has_epoll)
        self._turns = Turns(service, self.connections)
        self._workers = _Workers(
            self.connections, self._turns, self._accept, self._wake_housekeeper
        )
        shortest_s = min(limit for limit in timeouts if limit > 0)
        self._jobs = [
            (DECISIONS_INTERVAL_S, self.log_decisions),
            (min(1.0, shortest_s), self.expire),
            (0.0, self._resume_accepting),
            (0.0, service.log.recreate_if_deleted),
            *jobs,
        ]
        # Orders to the housekeeper; put() is safe in a signal handler.
        self._orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._asleep = False  # set by the housekeeper: wake it when there is work
        self._stopped = threading.Event()
        self._paused = False  # accepting, for want of file descriptors
        self._warned_at = -math.inf
        self._stop_sender, self._stop_receiver = socket.socketpair()
        try:
            super().__init__(address, socketserver.BaseRequestHandler)
        except BaseException:
            self._close_own_descriptors()
            raise
        add = service.statistics.add
        add(
            "connections_open", "gauge", "Connections open now.", lambda: len(self.connections.open)
        )
        add("threads", "gauge", "Threads of the server now.", threading.active_count)

    def server_bind(self) -> None:
        """Bind, with what accepted sockets inherit from this one."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        super().server_bind()

    # ---- accepting

    def _accept(self, worker: _Worker) -> None:
        """Take new connections, and try each at once: most have sent their request already."""
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._accept_failed(error)
                return
            worker.turns += 1
            connection = self._add_connection(sock, address)
            if connection is not None:
                self._turns.step(connection, self._turns.take_turn)

    def _add_connection(self, sock: socket.socket, address: Any) -> Connection | None:
        tls, peer = self.tls, address[0]
        try:
            connection = Connection(sock, peer) if tls is None else _TLSConnection(sock, peer, tls)
        except OSError:  # it is gone already
            sock.close()
            return None
        connection.ready_at = time.perf_counter()
        full = len(self.connections.open) >= self.max_connections
        if full and not self.connections.evict_idle(1):
            self._turns.turn_away(connection)
            return None
        self.connections.add(connection)
        return connection

    def _accept_failed(self, error: OSError) -> None:
        """Out of file descriptors, most likely: make room, and let the housekeeper try again in a
        moment.
        """
        if self.service.stopping or error.errno in (
            errno.ECONNABORTED, errno.EINTR, errno.EPROTO,
        ):  # fmt: skip
            return
        self.connections.evict_idle(ACCEPTS_A_TURN)
        self.connections.pause_listener(True)  # level-triggered, it would report without end
        self._paused = True  # set last: the housekeeper reads it, and undoes both
        now = self._clock()
        if now - self._warned_at >= 1.0:
            self._warned_at = now
            logger.warning("can't accept connections: %s", error.strerror)

    def _resume_accepting(self) -> None:
        if self._paused:
            self._paused = False
            self.connections.pause_listener(False)

    def adopt(self, sock: socket.socket, name: str) -> None:
        """Serve a connection of another process of this server: one end of a socket pair. It speaks
        plain HTTP, and idles as long as it likes.
        """
        connection = Connection(sock, OwnPeer(name))
        self.connections.add(connection)
        if self.connections.epoll is not None:
            self.connections.park(connection, self.connections.own)
        else:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    # ---- a thread a connection

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept, for socketserver; without descriptors, wait a moment rather than spin."""
        try:
            return super().get_request()
        except BlockingIOError:
            raise
        except OSError as error:
            self._accept_failed(error)
            self._stopped.wait(TICK_S)
            raise

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection to its end, in the thread that socketserver started for it."""
        connection = self._add_connection(request, client_address)
        if connection is not None:
            self._serve(connection)

    def _serve(self, connection: Connection) -> None:
        turns = self._turns
        turns.step(connection, turns.take_turn)
        self.service.statistics.count()
        while (waits_in := connection.waits_in) is not None:
            self._wake_housekeeper()
            source = connection.pending.source if connection.pending else None
            if isinstance(source, Future):
                wait_for_futures([source], TICK_S)
                if source.done():
                    turns.on_durable(connection, source)
                continue
            poll = select.poll()
            poll.register(connection.fd, waits_in.events)
            if source is not None and waits_in is self.connections.relaying:
                poll.register(connection.relay_fd, READ)
            wait_s = max(0.0, connection.deadline - self._clock())
            ready = dict(poll.poll(None if wait_s == math.inf else wait_s * 1000 + 1))
            if self.connections.claim(connection):
                connection.hung_up = bool(ready.get(connection.fd, 0) & HUNG_UP)
                turns.step(connection, turns.take_turn if ready else turns.time_out)
                self.service.statistics.count()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Called by socketserver with what got past everything else."""
        error = sys.exception()
        assert isinstance(error, Exception)  # that is when it is called
        self.service.refuse(error, client_address[0], time.perf_counter())

    # ---- from start to stop

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until told to stop, then finish what is in flight.

        The thread that calls it is the housekeeper.
        """
        try:
            self.connections.watch(self.socket.fileno(), self._stop_receiver.fileno())
            if self.connections.epoll is not None:
                self._workers.start(self.threads)
            else:
                acceptor = threading.Thread(
                    target=super().serve_forever, args=(poll_interval,), daemon=True
                )
                acceptor.start()
            self._run_housekeeper()
            self._finish()
        finally:
            self._stopped.set()

    def _run_housekeeper(self) -> None:
        started = self._clock()
        due = [started + interval_s for interval_s, _ in self._jobs]
        quiet, order = 0, ""
        while order != "stop":
            self._asleep = quiet >= QUIET_TICKS
            try:
                order = self._orders.get(timeout=1.0 if self._asleep else TICK_S)
                quiet = 0
            except queue.Empty:  # the usual case: nobody has anything to say
                order = ""
                quiet += 1
            self._asleep = False
            if order == "reload":
                attempt(self._start_reload)
            if attempt(self._workers.replace_stuck):
                quiet = 0
            now = self._clock()
            for number, (interval_s, job) in enumerate(self._jobs):
                if now >= due[number]:
                    due[number] = now + interval_s
                    attempt(job)

    def _start_reload(self) -> None:
        """Call `reload` in a thread of its own, as it may have to wait for a slow disk."""
        if self._reload is not None:
            thread = threading.Thread(target=self._reload, args=(self,), name="reload", daemon=True)
            thread.start()

    def _wake_housekeeper(self) -> None:
        """Called by every thread that gives turns: there is work, so the housekeeper must look."""
        if self._asleep:
            self._asleep = False  # one order is enough: a stop must not wait behind hundreds
            self._orders.put("work")

    def log_decisions(self) -> None:
        """Log how many requests were allowed and refused since the last time."""
        if self.service.limiter and (summary := limiter_summary(self.service.limiter)):
            logger.info("%s", summary)

    def expire(self) -> None:
        """Time out late connections; in the other model each thread does that for its own."""
        if self.connections.epoll is not None:
            for connection in self.connections.claim_late():
                self._turns.step(connection, self._turns.time_out)

    def _finish(self) -> None:
        """Stop accepting, answer what is in flight, close what is idle."""
        connections, turns = self.connections, self._turns
        self.service.stopping = True
        connections.forget_listener()
        if connections.epoll is None:
            super().shutdown()
        self.socket.close()
        deadline = time.monotonic() + connections.timeouts.stop_s
        done = connections.lingering.members, connections.own.members  # what lingers has its answer
        while len(connections.open) > sum(map(len, done)) and time.monotonic() < deadline:
            for connection in connections.claim_idle():
                turns.step(connection, turns.take_turn)  # serve what has just arrived
                connections.close_if_idle(connection)
            turns.end_round()
            self._stopped.wait(TICK_S / 4)
        self._workers.finish()
        self._stop_sender.send(b"!")  # stays unread: every worker sees it
        self._workers.join(deadline + 0.5)
        for connection in list(connections.open.values()):
            connections.close(connection)

    def stop_soon(self) -> None:
        """Ask `serve_forever` to end; returns at once, and may be called in a signal handler."""
        self._orders.put("stop")

    def reload_soon(self) -> None:
        """Ask for a call of `reload`; returns at once, and may be called in a signal handler."""
        self._orders.put("reload")

    def shutdown(self) -> None:
        """Ask `serve_forever` to end, and wait until it has."""
        self.stop_soon()
        self._stopped.wait()

    def server_close(self) -> None:
        """Give the address and all descriptors back."""
        super().server_close()
        self._close_own_descriptors()

    def _close_own_descriptors(self) -> None:
        self._stop_sender.close()
        self._stop_receiver.close()
        if self.connections.epoll is not None:
            self.connections.epoll.close()


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """How HTTPS is spoken: TLS 1.2 and newer. Raises OSError, of which ssl.SSLError is one."""

    def no_password() -> str:
        raise OSError(errno.EACCES, "the key has a password; remove it first")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(certificate, key, no_password)
    return context


def fit_connections(wanted: int) -> int:
    """How many connections the limit on open files allows, after raising it as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = wanted + SPARE_DESCRIPTORS
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(wanted, soft - SPARE_DESCRIPTORS))


# ==================================================================================================
# PART II. STORAGE
# ==================================================================================================


# ==================================================================================================
# 16. Patterns
# ==================================================================================================
#
# The text of a regular expression becomes a program for Thompson's machine: instructions that match
# a character, branch, or note a place. Where one goes on is relative to its own place. So the parts
# of a program are plain lists: a sequence is their sum, and x{1000} is 1,000 copies of x. What it
# costs: a short pattern can be a large program, so its size is bounded.
#
# Syntax and errors are those of Go's regexp/syntax, which Prometheus uses, with "s" set: a dot also
# matches a line end. Not here: classes of scripts, as \p{Greek}, of which Python has no table.

MAX_REGEX_CHARACTERS = 100_000
MAX_REGEX_SIZE = 200_000  # instructions
MAX_REGEX_REPEAT = 1_000  # copies of what is innermost in nested counted repetitions
MAX_REGEX_DEPTH = 1_000  # of groups


def _refused(reason: str, excerpt: str) -> ValueError:
    return ValueError(f"error parsing regexp: {reason}: `{excerpt}`")


# -- classes of characters --


@functools.cache
def _cases() -> dict[str, str]:
    """All letters that have cases, each with those it equals under `(?i)`; 0.1 s when first called.

    This is Unicode's simple case folding, one letter to one letter: K, k and the Kelvin sign are
    equal, s and the long s; ß is not ss. The Turkish letters without and with a dot stand alone.
    """
    equal = defaultdict[str, str](str)
    for letter in map(chr, range(0x1E944)):
        if letter not in "İı":
            lower = letter.upper().lower()
            equal[lower if len(lower) == 1 else letter.lower()] += letter
    return {letter: all_equal for all_equal in equal.values() for letter in all_equal}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Class:
    """A set of characters: those of some ranges, categories and other classes; or all but these."""

    borders: tuple[int, ...] = ()  # ascending: where a range begins, and where it has ended
    categories: tuple[str, ...] = ()  # of Unicode; "L" stands for all that begin so
    inner: Iterable["_Class"] = ()
    negated: bool = False
    any_case: bool = False

    def has(self, character: str) -> bool:
        equal = _cases().get(character, character) if self.any_case else character
        return self.negated != any(
            bisect_right(self.borders, ord(letter)) & 1
            or unicodedata.category(letter).startswith(self.categories)
            or any(inner.has(letter) for inner in self.inner)
            for letter in equal
        )


def _borders(ends: str) -> tuple[int, ...]:
    """The borders of the ranges that have these first and last characters.

    >>> _borders("09AF")
    (48, 58, 65, 71)
    """
    borders: list[int] = []
    for first, last in sorted(zip(ends[::2], ends[1::2])):
        if borders and ord(first) <= borders[-1]:
            borders[-1] = max(borders[-1], ord(last) + 1)
        else:
            borders += ord(first), ord(last) + 1
    return tuple(borders)


_ANY_CHARACTER = _Class(negated=True)
_NO_LINE_END = _Class(_borders("\n\n"), negated=True)
_NAMED_RANGES = {
    r"\d": "09", r"\s": "\t\n\f\r  ", r"\w": "09AZ__az", r"\pAny": "\0\U0010ffff",
    "[:alnum:]": "09AZaz", "[:alpha:]": "AZaz", "[:ascii:]": "\0\x7f", "[:blank:]": "\t\t  ",
    "[:cntrl:]": "\0\x1f\x7f\x7f", "[:digit:]": "09", "[:graph:]": "!~", "[:lower:]": "az",
    "[:print:]": " ~", "[:punct:]": "!/:@[`{~", "[:space:]": "\t\r  ", "[:upper:]": "AZ",
    "[:word:]": "09AZ__az", "[:xdigit:]": "09AFaf",
}  # fmt: skip
_CATEGORY = re.compile("C[cfos]?|L[lmotu]?|M[cen]?|N[dlo]?|P[cdefios]?|S[ckmo]?|Z[lps]?")
_NAMED_CLASS = re.compile(
    r"\\(?P<letter>[dDsSwW]|[pP](?:\{(?P<long>[^}]*)(?:\}|\Z)|(?P<short>.?)))"
    r"|\[:(?P<posix>.*?):\]",
    re.DOTALL,
)


@functools.cache
def _named_class(text: str, any_case: bool) -> _Class:
    r"""The class that is written as \d, \pL, \P{^Lu} or [:alpha:]. Raises ValueError."""
    match = _NAMED_CLASS.fullmatch(text)
    assert match is not None
    letter = (match["letter"] or "")[:1]
    name = match["long"] or match["short"] or match["posix"] or ""
    negated = letter.isupper() != name.startswith("^")
    name = name.removeprefix("^")
    ends = _NAMED_RANGES.get(rf"\{letter.lower()}{name}" if letter else f"[:{name}:]")
    if ends:
        return _Class(_borders(ends), negated=negated, any_case=any_case)
    if letter not in ("p", "P") or not _CATEGORY.fullmatch(name):
        raise _refused("invalid character class range", text)
    # in Go, C is without what is not assigned
    categories = ("Cc", "Cf", "Co", "Cs") if name == "C" else (name,)
    return _Class((), categories, negated=negated, any_case=any_case)


# -- programs --

_Program = list[tuple[str, Any]]  # instructions: what each does, and its argument
_CHARACTER = "character"  # matches one of a string or class, and goes on with the next instruction
_BRANCH = "branch"  # goes on at these distances, the preferred one first
_SAVE = "save"  # notes the place in the text: 2n where group n begins, 2n + 1 where it ends
_ASSERT = "assert"  # goes on if it holds between two characters


def _either(alternatives: list[_Program]) -> _Program:
    if len(alternatives) == 1:
        return alternatives[0]
    starts = list(itertools.accumulate((len(each) + 1 for each in alternatives), initial=1))
    program: _Program = [(_BRANCH, tuple(starts[:-1]))]
    for alternative in alternatives:
        program += alternative
        # from behind each alternative to the end
        program.append((_BRANCH, (starts[-1] - len(program),)))
    return program


class _Atom(NamedTuple):
    """A part of a pattern that a repetition may follow."""

    program: _Program
    nullable: bool  # whether it may match nothing
    repeats: int = 1  # the largest product of nested counts in it


def _repeated(atom: _Atom, least: int, most: int | None, lazy: bool) -> _Program:
    def branch(*distances: int) -> tuple[str, Any]:
        return _BRANCH, distances[::-1] if lazy else distances

    body = atom.program
    if most is None and least == 0 and not atom.nullable:
        return [branch(1, len(body) + 2), *body, (_BRANCH, (-len(body) - 1,))]
    if most is None:
        # x* is (x+)? here, as in Go: the loop above would prefer no x to an empty one
        program = [*body * max(least, 1), branch(-len(body), 1)]
        return program if least else [branch(1, len(program) + 1), *program]
    # x{0,3} is (x(x(x)?)?)?
    program = body * least
    for left in range(most - least, 0, -1):
        program += [branch(1, left * (len(body) + 1)), *body]
    return program


# -- syntax --

_COUNT = "(?:0|[1-9][0-9]*)"
_REPETITION = re.compile(
    rf"(?P<operator>[*+?]|\{{(?P<least>{_COUNT})(?P<range>,(?P<most>{_COUNT})?)?\}})(?P<lazy>\??)"
)
_GROUP = re.compile(
    r"\((?:(?!\?)|\?P?<(?P<name>[^>]*)>|\?(?P<set>[imsU]*)(?:-(?P<clear>[imsU]+))?(?P<end>[:)]))"
)
_BAD_FLAGS = re.compile(r"\(\?[imsU]*(?:-[imsU]*)?.?", re.DOTALL)
_ESCAPED = re.compile(
    r"\\(?:(?P<octal>0[0-7]{0,2}|[1-7][0-7]{1,2})|x\{0*(?P<hex>[0-9A-Fa-f]{1,6})\}"
    r"|x(?P<byte>[0-9A-Fa-f]{2})|(?P<control>[afnrtv])|(?P<itself>[^0-9A-Za-z\x80-\U0010ffff]))"
)
_BAD_ESCAPE = re.compile(r"\\(?:x(?:\{[0-9A-Fa-f]*.?|.{1,2})?|.)", re.DOTALL)
_IS_RANGE = re.compile(r"-[^\]]", re.DOTALL)
_CONTROLS = dict(zip("afnrtv", b"\a\f\n\r\t\v"))


def _counts(repetition: re.Match[str]) -> tuple[int, int | None]:
    """How often it repeats: at least, and at most; None: without end."""
    operator = repetition["operator"]
    if operator in "*+?":
        return int(operator == "+"), 1 if operator == "?" else None
    # five digits are too many already
    least = int(repetition["least"][:5])
    most = int(repetition["most"][:5]) if repetition["most"] else None
    most = most if repetition["range"] else least
    if max(least, most or 0) > MAX_REGEX_REPEAT or (most is not None and most < least):
        raise _refused("invalid repeat count", operator)
    return least, most


@dataclasses.dataclass(slots=True)
class _OpenGroup:
    """A group whose end has not been read yet; the outermost is the whole pattern."""

    flags: frozenset[str]  # in force before it, and after it again
    slot: int | None  # None: it captures nothing
    alternatives: list[list[_Atom]] = dataclasses.field(default_factory=lambda: [[]])

    def atom(self) -> _Atom:
        sequences: list[_Program] = []
        for atoms in self.alternatives:
            # nothing is copied: 1,000 groups in each other would cost 1 s
            sequences.append(atoms[0].program if atoms else [])
            for atom in atoms[1:]:
                sequences[-1] += atom.program
        program = _either(sequences)
        if self.slot is not None:
            program.insert(0, (_SAVE, self.slot))
            program.append((_SAVE, self.slot + 1))
        nullable = any(all(atom.nullable for atom in atoms) for atoms in self.alternatives)
        repeats = (atom.repeats for atoms in self.alternatives for atom in atoms)
        return _Atom(program, nullable, max(repeats, default=1))


class _PatternParser:
    """Reads a pattern from left to right. Nothing is recursive: no nesting exhausts the stack."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.place = 0
        self.flags = frozenset("s")
        self.groups = [_OpenGroup(self.flags, None)]
        self.names: dict[str, int] = {}
        self.captures = 1
        self.size = 0
        self.repeated = (0, 0)  # where the last repetition operator stands
        self.last_posix_end = pattern.rfind(":]")

    def parse(self) -> _Program:
        if surrogate := _SURROGATE.search(self.pattern):
            raise _refused("invalid UTF-8", self.pattern[surrogate.start() :])
        while self.place < len(self.pattern):
            self.read(self.pattern[self.place])
        if len(self.groups) > 1:
            raise _refused("missing closing )", self.pattern)
        return self.groups[0].atom().program

    def read(self, first: str) -> None:
        """Read the next atom, operator or parenthesis."""
        match first:
            case "*" | "+" | "?" | "{":
                self.read_repetition()
            case "(":
                self.open_group()
            case ")":
                self.close_group()
            case "|":
                self.place += 1
                self.grow(2)
                self.groups[-1].alternatives.append([])
            case ".":
                self.place += 1
                self.add(_CHARACTER, _ANY_CHARACTER if "s" in self.flags else _NO_LINE_END)
            case "^" | "$":
                self.place += 1
                self.add(_ASSERT, first if "m" in self.flags else {"^": "A", "$": "z"}[first])
            case "[":
                self.add(_CHARACTER, self.bracketed_class())
            case "\\":
                self.read_backslash()
            case _:
                self.add_letter(self.character())

    def grow(self, size: int) -> None:
        self.size += size
        if self.size > MAX_REGEX_SIZE:
            raise _refused("expression too large", self.pattern[:64])

    def add(self, operation: str, argument: Any) -> None:
        self.grow(1)
        atoms = self.groups[-1].alternatives[-1]
        atoms.append(_Atom([(operation, argument)], nullable=operation == _ASSERT))

    def add_letter(self, letter: str) -> None:
        self.add(_CHARACTER, _cases().get(letter, letter) if "i" in self.flags else letter)

    def read_backslash(self) -> None:
        kind = self.pattern[self.place + 1 : self.place + 2]
        if kind and kind in "AbBz":
            self.place += 2
            self.add(_ASSERT, kind)
        elif kind == "Q":
            literal, _, _ = self.pattern[self.place + 2 :].partition(r"\E")
            self.place += 4 + len(literal)
            for letter in literal:
                self.add_letter(letter)
        elif named := self.named_class():
            self.add(_CHARACTER, named)
        else:
            self.add_letter(self.character())

    def character(self) -> str:
        """The next character, which may be escaped."""
        start = self.place
        if self.pattern[start] != "\\":
            self.place += 1
            return self.pattern[start]
        match = _ESCAPED.match(self.pattern, start)
        if match:
            self.place = match.end()
            kind = match.lastgroup or ""
            base = {"octal": 8, "hex": 16, "byte": 16}.get(kind)
            code = int(match[kind], base) if base else _CONTROLS.get(match[kind], ord(match[kind]))
            if code <= sys.maxunicode:
                return chr(code)
        bad = _BAD_ESCAPE.match(self.pattern, start)
        if bad is None:
            raise _refused("trailing backslash at end of expression", "")
        raise _refused("invalid escape sequence", bad[0])

    def named_class(self) -> _Class | None:
        """The next class if it has a name."""
        match = _NAMED_CLASS.match(self.pattern, self.place)
        if match is None:
            return None
        self.place = match.end()
        return _named_class(match[0], "i" in self.flags)

    def bracketed_class(self) -> _Class:
        start = self.place
        negated = self.pattern.startswith("^", start + 1)
        self.place += 2 if negated else 1
        ends, inner = list[str](), dict[_Class, None]()
        # a bracket that comes first is one of the class
        while not (ends or inner) or not self.pattern.startswith("]", self.place):
            if self.place >= len(self.pattern):
                raise _refused("missing closing ]", self.pattern[start:])
            may_have_name = self.pattern[self.place] == "\\" or self.place < self.last_posix_end
            if may_have_name and (named := self.named_class()):
                inner[named] = None
                continue
            at = self.place
            least = most = self.character()
            if _IS_RANGE.match(self.pattern, self.place):
                self.place += 1
                most = self.character()
            if most < least:
                raise _refused("invalid character class range", self.pattern[at : self.place])
            ends += least, most
        self.place += 1
        return _Class(_borders("".join(ends)), (), tuple(inner), negated, "i" in self.flags)

    def read_repetition(self) -> None:
        match = _REPETITION.match(self.pattern, self.place)
        if match is None:
            # a brace that holds no count
            self.add_letter(self.character())
            return
        least, most = _counts(match)
        start, self.place = match.span()
        if self.repeated[1] == start > 0:
            whole = self.pattern[self.repeated[0] : self.place]
            raise _refused("invalid nested repetition operator", whole)
        self.repeated = match.span()
        atoms = self.groups[-1].alternatives[-1]
        if not atoms:
            raise _refused("missing argument to repetition operator", match[0])
        atom = atoms.pop()
        count = max(least, most or 0)
        repeats = 1 if most == 0 else atom.repeats * max(1, count)
        if count > 1 and repeats > MAX_REGEX_REPEAT:
            raise _refused("invalid repeat count", match[0])
        self.grow(max(count, 1) * (len(atom.program) + 1))
        program = _repeated(atom, least, most, bool(match["lazy"]) != ("U" in self.flags))
        atoms.append(_Atom(program, atom.nullable or least == 0, repeats))

    def open_group(self) -> None:
        match = _GROUP.match(self.pattern, self.place)
        if match is None:
            if self.pattern.startswith(("(?P<", "(?<"), self.place):
                raise _refused("invalid named capture", self.pattern[self.place :])
            bad = next(_BAD_FLAGS.finditer(self.pattern, self.place))[0]
            raise _refused("invalid or unsupported Perl syntax", bad)
        self.place = match.end()
        name, end = match.group("name", "end")
        if name is not None:
            if not re.fullmatch("[A-Za-z0-9_]+", name):
                raise _refused("invalid named capture", match[0])
            self.names.setdefault(name, self.captures)
        if end != ")":
            self.groups.append(_OpenGroup(self.flags, None if end else 2 * self.captures))
        if end:
            self.flags = (self.flags | set(match["set"])) - set(match["clear"] or "")
        else:
            self.captures += 1
        if len(self.groups) > MAX_REGEX_DEPTH + 1:
            raise _refused("expression nests too deeply", self.pattern)

    def close_group(self) -> None:
        if len(self.groups) == 1:
            raise _refused("unexpected )", self.pattern)
        self.place += 1
        self.grow(3)
        group = self.groups.pop()
        self.flags = group.flags
        self.groups[-1].alternatives[-1].append(group.atom())


# ==================================================================================================
# 17. Regular expressions
# ==================================================================================================
#
# The problem: anybody may send a regular expression. `re` tries one way through it after the other,
# and for `(a+)+b` the ways double with each character. The idea is Thompson's: follow all ways at
# once, so that a character is looked at once. What follows a character (which part of the pattern
# may match the next one) is a set of bits, and such a set is a state of an automaton that is made
# when it is first met: from then on a character costs one look into a dict. What it costs: states
# take memory. They are all dropped when they pass a bound, and made again if they are needed.
#
# The text is read from its end. A state then knows what can still succeed from its place on, and a
# walk from the beginning can choose the groups without ever trying in vain.
#
# Measured, a value of 20 characters:      here       re
#   web.*                               0.08 µs  0.08 µs
#   .*foo.*                             0.09 µs  0.09 µs
#   a|b|c                               0.02 µs  0.07 µs
#   [a-z]+[0-9]+, .*(.*ingester.*).*    0.70 µs  0.09 to 0.28 µs
#   the groups of ([a-z]+)-([a-z]+)-([0-9]+), 5 µs
# 60 values of 1,001 characters: .*.*.*! 2 ms; (x|.){1,900}y 20 ms; .{300}a.* 120 ms.
#
# Sources: Cox, Regular Expression Matching Can Be Simple And Fast (2007), Regular Expression
# Matching in the Wild (2010); the syntax page of RE2.

MAX_REGEX_EDGES = 1 << 23  # what may branch times what may match: (a?b?c?){1000}
MAX_AUTOMATON_BYTES = 1 << 20
KEPT_REGEX_CHARACTERS = 2_048  # a longer pattern is not kept for the next call

# Whether an assertion holds between two neighbours. Of each kind of characters that assertions can
# tell apart, one stands for all; nothing, for an end of the text.
_HOLDS: dict[str, Callable[[str, str], bool]] = {
    "A": lambda before, after: before == "",
    "z": lambda before, after: after == "",
    "^": lambda before, after: before in ("", "\n"),
    "$": lambda before, after: after in ("", "\n"),
    "b": lambda before, after: (before == "w") != (after == "w"),
    "B": lambda before, after: (before == "w") == (after == "w"),
}


def _neighbour(character: str) -> str:
    if character in ("", "\n"):
        return character
    return "w" if character == "_" or (character.isascii() and character.isalnum()) else "-"


def _bits(numbers: Sequence[int]) -> int:
    # one by one, 100,000 of them would cost 0.2 s
    octets = bytearray(max(numbers, default=0) // 8 + 1)
    for number in numbers:
        octets[number >> 3] |= 1 << (number & 7)
    return int.from_bytes(octets, "little")


class _Edges(NamedTuple):
    """What may follow each leaf, between two kinds of characters."""

    by_next: int  # the leaves that the next one may follow
    others: list[tuple[int, int]]  # (leaves that may follow else, all those that they may follow)


class _State(dict[str, "_State"]):
    """What a text may begin with; and, for each character that was met before it, the next state.

    An empty string stands for the beginning of the text.
    """

    __slots__ = ("ahead", "automaton", "before", "first", "walks")

    def __init__(self, automaton: "_Automaton", ahead: int, first: str) -> None:
        self.automaton = automaton
        self.ahead = ahead  # the leaves that match its first character, and all else follows
        self.first = first  # the kind of its first character
        self.before: dict[str, int] = {}  # kind of a character before it → what may match that
        self.walks: dict[tuple[int, str], tuple[int, list[int]]] = {}

    def __missing__(self, character: str) -> "_State":
        return self.automaton.step(self, character)


class _Automaton:
    """Runs a program over texts, from their ends, in time linear in their lengths.

    A leaf is an instruction that matches a character. Leaves are numbered, and sets of them are
    bits. The first one matches the beginning of a text, the last one its end.
    """

    def __init__(self, program: _Program) -> None:
        self.program = program = [(_CHARACTER, ""), *program, (_CHARACTER, "")]
        self.leaves = [place for place, (op, _) in enumerate(program) if op == _CHARACTER]
        self.number = {place: number for number, place in enumerate(self.leaves)}
        self.asserts = any(op == _ASSERT for op, _ in program)
        branches = sum(op == _BRANCH and len(distances) > 1 for op, distances in program)
        # with assertions there are edges for each kind of neighbours
        if branches * len(self.leaves) * (4 if self.asserts else 1) > MAX_REGEX_EDGES:
            raise ValueError("error parsing regexp: expression too large")
        self.letters = defaultdict[str, list[int]](list)
        self.classes = defaultdict[_Class, list[int]](list)
        for number, place in enumerate(self.leaves):
            matched = program[place][1]
            if isinstance(matched, _Class):
                self.classes[matched].append(number)
            else:
                for letter in matched:
                    self.letters[letter].append(number)
        # Kept: they are bounded by the program, and made again slowly.
        self.edges: dict[tuple[str, str], _Edges] = {}
        self.work = 0  # steps that were not remembered
        self.end = _State(self, 1 << (len(self.leaves) - 1), "")
        self.states = {(self.end.ahead, ""): self.end}
        self.forget()

    def forget(self) -> None:
        # states refer to each other: without this they would wait for the garbage collector
        for state in self.states.values():
            state.clear()
        self.states = {(self.end.ahead, ""): self.end}
        self.masks = {"": 1}
        self.size_bytes = 0

    def matches(self, text: str) -> bool:
        end = functools.reduce(operator.getitem, reversed(text), self.end)
        return end[""].ahead != 0

    def step(self, state: _State, character: str) -> _State:
        """The state after one more character, which is remembered."""
        if self.size_bytes > MAX_AUTOMATON_BYTES:
            self.forget()
        kind = _neighbour(character) if self.asserts else ""
        before = state.before.get(kind)
        if before is None:
            before = state.before[kind] = self.followed_by(state, kind)
        mask = self.masks.get(character)
        if mask is None:
            mask = self.masks[character] = self.mask(character)
        ahead = before & mask
        following = self.states.get((ahead, kind))
        if following is None:
            following = self.states[ahead, kind] = _State(self, ahead, kind)
            self.size_bytes += 600 + len(self.leaves) // 4
        state[character] = following
        self.size_bytes += 100
        self.work += 1
        return following

    def mask(self, character: str) -> int:
        """The leaves that match a character."""
        numbers = list(self.letters.get(character, ()))
        for matched, its_numbers in self.classes.items():
            if matched.has(character):
                numbers += its_numbers
        self.size_bytes += 100 + len(self.leaves) // 8
        self.work += len(self.classes)
        return _bits(numbers)

    def followed_by(self, state: _State, before: str) -> int:
        """The leaves after which one of those that are ahead may come."""
        edges = self.edges.get((before, state.first))
        if edges is None:
            edges = self.edges[before, state.first] = self.edges_between(before, state.first)
        self.work += len(edges.others)
        found = (state.ahead >> 1) & edges.by_next
        for following, leaves in edges.others:
            if following & state.ahead:
                found |= leaves
        return found

    def onward(self, place: int, before: str, after: str) -> Sequence[int]:
        """Where an instruction that is no leaf goes on."""
        op, argument = self.program[place]
        if op == _BRANCH:
            return [place + distance for distance in argument]
        return () if op == _ASSERT and not _HOLDS[argument](before, after) else (place + 1,)

    def edges_between(self, before: str, after: str) -> _Edges:
        number = self.number
        reach: dict[int, int] = {}  # by the place of an instruction that is no leaf

        def reached(place: int) -> int:
            return 1 << number[place] if place in number else reach.get(place, 0)

        inner = [place for place in range(len(self.program) - 1, -1, -1) if place not in number]
        # From the end on, all that is ahead is known. The second time also what a loop goes back
        # to; after one way back, another one reaches nothing new.
        for place in inner * 2:
            onward = [*self.onward(place, before, after)]
            if onward and onward[0] < place:
                # a loop can be left where it begins again
                onward.append(place + 1)
            targets = [reached(each) for each in onward]
            # a single one is not copied: 33,000 groups in a row would take 70 MB more
            reach[place] = functools.reduce(operator.or_, targets) if targets else 0
        by_next: list[int] = []
        others = defaultdict[int, list[int]](list)
        for leaf, place in enumerate(self.leaves[:-1]):
            if place + 1 in number:
                by_next.append(leaf)
                continue
            following, next_bit = reached(place + 1), 2 << leaf
            if following & next_bit:
                by_next.append(leaf)
                following ^= next_bit
            if following:
                others[following].append(leaf)
        self.work += 2 * len(inner) + len(self.leaves)
        return _Edges(_bits(by_next), [(leaves, _bits(them)) for leaves, them in others.items()])

    def walk(self, state: _State, leaf: int, before: str) -> tuple[int, list[int]]:
        """The preferred way from one leaf to the next that can succeed, and what it saves.

        This is the choice of a backtracking search, and of Pike's simulation: the first way, of
        all that succeed. A place that was reached on a preferred way is not looked at again.
        """
        ways: list[tuple[int, list[int]]] = [(self.leaves[leaf] + 1, [])]
        seen = set[int]()
        while True:
            place, saved = ways.pop()
            if place in seen:
                continue
            seen.add(place)
            op, argument = self.program[place]
            if op == _CHARACTER:
                if state.ahead >> self.number[place] & 1:
                    break
                continue
            if op == _SAVE:
                saved = [*saved, argument]
            ways += ((each, saved) for each in reversed(self.onward(place, before, state.first)))
        self.work += len(seen)
        self.size_bytes += 300
        found = state.walks[leaf, before] = self.number[place], saved
        return found

    def saves(self, text: str) -> dict[int, int]:
        """Where each group of a text that matches begins and ends, by slot."""
        states = list(itertools.accumulate(reversed(text), operator.getitem, initial=self.end))
        places: dict[int, int] = {}
        leaf, before = 0, ""
        for place, state in enumerate(reversed(states)):
            leaf, saved = state.walks.get((leaf, before)) or self.walk(state, leaf, before)
            before = state.first
            for slot in saved:
                places[slot] = place
        return places


_LITERAL = r"(?:[^\\.+*?()|\[\]{}^$\ud800-\udfff]|\\[^0-9A-Za-z\x80-\U0010ffff])*+"
_LITERAL_SET = re.compile(
    rf"\^?(?P<open>\((?:\?:)?)?(?P<literals>{_LITERAL}(?:\|{_LITERAL})*+)(?(open)\))\$?"
)
_AROUND_LITERAL = re.compile(rf"\^?(?P<before>\.[*+])?(?P<literal>{_LITERAL})(?P<after>\.[*+])?\$?")
_ALTERNATIVE = re.compile(rf"(?:^|\|)({_LITERAL})")
_BACKSLASH = re.compile(r"\\(.)", re.DOTALL)


def _literal_set(pattern: str) -> frozenset[str] | None:
    match = _LITERAL_SET.fullmatch(pattern)
    if match is None:
        return None
    pieces = _ALTERNATIVE.findall(match["literals"])
    return frozenset(_BACKSLASH.sub(r"\1", piece) for piece in pieces)


def _without_automaton(pattern: str) -> Callable[[str], bool] | None:
    """A test by methods of strings, for `.*`, `web.*`, `.*foo` and `.*foo.+`; else None."""
    match = _AROUND_LITERAL.fullmatch(pattern)
    if match is None:
        return None
    before, after = match.group("before", "after")
    literal = _BACKSLASH.sub(r"\1", match["literal"])
    start, end = int(before == ".+"), -1 if after == ".+" else None
    if before and after:
        return lambda text: text.find(literal, start, end) >= 0
    if before:
        return lambda text: text.endswith(literal, start)
    return lambda text: text.startswith(literal, 0, end)


class Regex:
    """A regular expression that matches whole texts; made by `compile_regex`.

    Its states are made while it matches: one thread uses it. A character costs 0.03 µs where the
    state is known, about 2 µs where it has to be made, whatever the pattern is; `work` counts what
    had to be made. Attributes: `names` of groups with their numbers; `literals`, all that can
    match if these are known without looking.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.names: dict[str, int] = {}
        self.literals = _literal_set(pattern)
        self.matches: Callable[[str], bool]
        self._captures = 0
        self._made: _Automaton | None = None
        if self.literals is not None:
            self.matches = self.literals.__contains__
        else:
            self.matches = _without_automaton(pattern) or self._automaton().matches

    def _automaton(self) -> _Automaton:
        if self._made is None:
            parser = _PatternParser(self.pattern)
            self._made = _Automaton(parser.parse())
            self.names, self._captures = parser.names, parser.captures
        return self._made

    @property
    def work(self) -> int:
        return self._made.work if self._made else 0

    def groups(self, text: str) -> list[str | None] | None:
        """The text, and what each group matched last; None if the text does not match."""
        if not self.matches(text):
            return None
        places = self._automaton().saves(text)
        slots = range(2, 2 * self._captures, 2)
        return [
            text,
            *(text[places[n] : places[n + 1]] if n + 1 in places else None for n in slots),
        ]


def compile_regex(pattern: str) -> Regex:
    """A regular expression of RE2's syntax, for whole values. Raises ValueError.

    >>> compile_regex("web[[:digit:]]+").matches("web12")
    True
    >>> compile_regex("(a+)+-(?P<rest>.*)").groups("aa-b")
    ['aa-b', 'aa', 'b']
    >>> compile_regex("(a")
    Traceback (most recent call last):
    ValueError: invalid regular expression "(a": error parsing regexp: missing closing ): `(a`
    """
    return _kept_regex(pattern) if len(pattern) <= KEPT_REGEX_CHARACTERS else _new_regex(pattern)


def _new_regex(pattern: str) -> Regex:
    try:
        if len(pattern) > MAX_REGEX_CHARACTERS:
            raise _refused("expression too large", pattern[:64])
        return Regex(pattern)
    except ValueError as error:
        raise ValueError(f'invalid regular expression "{pattern[:1024]}": {error}') from None


_kept_regex = functools.lru_cache(32)(_new_regex)

# Letters, decimal digits and "_". The numerals that are left out are no digits: $1² is ${1}².
_REFERENCE_NAME = r"[^\W\xb2\xb3\xb9\xbc-\xbe\u2070-\u2089\u2150-\u218b\u2460-\u24ff]+"
_REFERENCE = re.compile(rf"\$(?:\$|({_REFERENCE_NAME})|\{{({_REFERENCE_NAME})\}})")


def expand(template: str, groups: Sequence[str | None], names: dict[str, int]) -> str:
    """A template with what groups matched: $1, ${1}, $name, ${name}; $$ is a dollar sign.

    As Go's Regexp.Expand has it: a name is as long as it can be ($1x is ${1x}), $01 is a name, and
    what does not exist is empty.

    >>> expand("$1-${n}$$", ["ab", "a", "b"], {"n": 2})
    'a-b$'
    """

    def value(reference: re.Match[str]) -> str:
        name = reference[1] or reference[2]
        if name is None:
            return "$"
        if re.fullmatch("0|[1-9][0-9]{0,8}", name):
            number = int(name)
        else:
            number = names.get(name, len(groups))
        return groups[number] or "" if number < len(groups) else ""

    return _REFERENCE.sub(value, template)


# ==================================================================================================
# 18. Series
# ==================================================================================================
#
# A series is all samples of one metric with the same tags, and is known by its labels: the tags,
# and the name as one more label. The problem: to find ten series among a million by conditions on
# their labels. The idea is the inverted index of search engines: for each value of each label an
# ascending list of the series that have it (a posting list). Lists are intersected, the shortest
# first; all other conditions are tested only on the series that are left. What it costs: a number
# in a list for each label of each series.
#
# Whatever works for a query counts its work in a `Budget`, so that nothing takes long unnoticed.

MAX_SERIES = 1_000_000  # in memory
NAME = "__name__"  # the label that holds the name of the metric

Labels = tuple[str, ...]  # name, value, name, value …; in the order of the names

# A staleness marker: the series has no value from here on. The bits are Prometheus's.
STALE_BITS = 0x7FF0_0000_0000_0002
STALE: float = struct.unpack("<d", struct.pack("<Q", STALE_BITS))[0]


class OverBudgetError(Exception):
    """A query that takes more work than it was given."""


class Budget:
    """How much work a query may do, in units of about 0.1 µs: what a value costs in a C loop."""

    __slots__ = ("left",)

    def __init__(self, work: float = math.inf):
        self.left = work

    def spend(self, work: float) -> None:
        """Count work that was done, or is to be done. Raises OverBudgetError."""
        self.left -= work
        if self.left < 0:
            raise OverBudgetError


class Matcher(NamedTuple):
    """A condition on one label of a series; a label that is missing has the value ""."""

    name: str
    op: str  # "=", "!=", "=~" or "!~"; regular expressions match the whole value
    value: str

    def accepts(self, value: str) -> bool:
        """Whether a value of the label fulfils the condition."""
        return value in self.accepted((value,), Budget())

    def accepted(self, values: Iterable[str], budget: Budget) -> set[str]:
        """Those of some values that fulfil the condition."""
        if self.op == "=":
            return {value for value in values if value == self.value}
        if self.op == "!=":
            return {value for value in values if value != self.value}
        regex, wanted = compile_regex(self.value), self.op == "=~"
        found, worked = set(), regex.work
        for value in values:
            budget.spend(8 + len(value) + 20 * (regex.work - worked))
            worked = regex.work
            if regex.matches(value) == wanted:
                found.add(value)
        return found


class Series(NamedTuple):
    """Samples of one series, oldest first. Results share its labels: nobody changes them."""

    labels: dict[str, str]  # the name of the metric is "__name__"
    times_ms: "array[int]"
    values: "array[float]"


def series_labels(name: str, tags: dict[str, str]) -> Labels:
    """What a series is known by. A tag with an empty value is no tag; none can hide the name.

    >>> series_labels("cpu", {"host": "web1", "zone": ""})
    ('__name__', 'cpu', 'host', 'web1')
    """
    labels = {tag: value for tag, value in tags.items() if value}
    labels[NAME] = name
    return tuple(itertools.chain.from_iterable(sorted(labels.items())))


class SeriesIndex:
    """Series by number, from 0, and by what their labels hold: an inverted index.

    >>> index = SeriesIndex()
    >>> [index.number(("__name__", "cpu", "host", host)) for host in ("a", "b", "a")]
    [0, 1, 0]
    >>> index.select([Matcher("__name__", "=", "cpu"), Matcher("host", "!=", "a")], Budget())
    [1]
    """

    def __init__(self) -> None:
        self.labels: list[Labels] = []
        self._numbers: dict[Labels, int] = {}
        self._postings: dict[str, dict[str, array[int]]] = {}
        self._texts: dict[str, str] = {}  # one object for each text, however many series have it

    def __len__(self) -> int:
        return len(self.labels)

    def number(self, labels: Labels) -> int:
        """The number of the series of these labels, a new one if there is none."""
        if labels in self._numbers:
            return self._numbers[labels]
        labels = tuple(self._texts.setdefault(text, text) for text in labels)
        number = self._numbers[labels] = len(self.labels)
        for name, value in zip(labels[::2], labels[1::2]):
            values = self._postings.setdefault(name, {})
            if value in values:
                values[value].append(number)
            else:
                values[value] = array("I", (number,))
        self.labels.append(labels)
        return number

    def select(self, matchers: Sequence[Matcher], budget: Budget) -> list[int]:
        """The numbers of the series that fulfil all matchers, ascending."""
        chosen: Sequence[int] = range(len(self.labels))
        equal, others = self._sorted_by_use(matchers)
        for matcher in equal:
            posting = self._postings.get(matcher.name, {}).get(matcher.value, ())
            chosen = _intersection(chosen, posting, budget)
        for matcher in others:
            chosen = self._filtered(chosen, matcher, budget)
        return list(chosen)

    def _sorted_by_use(self, matchers: Sequence[Matcher]) -> tuple[list[Matcher], list[Matcher]]:
        """(those that are a posting list, the shortest first; all others)."""

        def length(matcher: Matcher) -> int:
            return len(self._postings.get(matcher.name, {}).get(matcher.value, ()))

        equal = [matcher for matcher in matchers if matcher.op == "=" and matcher.value]
        others = [matcher for matcher in matchers if matcher.op != "=" or not matcher.value]
        return sorted(equal, key=length), others

    def _filtered(self, chosen: Sequence[int], matcher: Matcher, budget: Budget) -> Sequence[int]:
        """Those of the chosen series that fulfil a matcher which is no posting list by itself."""
        postings = self._postings.get(matcher.name, {})
        if len(chosen) <= len(postings):  # fewer series than values: look at what the series have
            values = [self._value(number, matcher.name) for number in chosen]
            budget.spend(10 * len(values))
            accepted = matcher.accepted(set(values), budget)
            return [number for number, value in zip(chosen, values) if value in accepted]
        accepted = matcher.accepted(postings, budget)
        wanted = not matcher.accepts("")  # then a series without the label is not
        values_of_list = accepted if wanted else postings.keys() - accepted
        listed: set[int] = set()
        for value in values_of_list:
            budget.spend(5 + len(postings[value]) / 2)
            listed.update(postings[value])
        budget.spend(len(chosen) / 2)
        return [number for number in chosen if (number in listed) == wanted]

    def _value(self, number: int, name: str) -> str:
        labels = self.labels[number]
        return labels[labels[::2].index(name) * 2 + 1] if name in labels[::2] else ""


def _intersection(chosen: Sequence[int], posting: Sequence[int], budget: Budget) -> Sequence[int]:
    """What is in both; both ascend."""
    if isinstance(chosen, range):  # all series, so far
        return posting
    if len(chosen) * 16 < len(posting):
        budget.spend(5 * len(chosen))
        places = (bisect_left(posting, number) for number in chosen)
        return [n for n, at in zip(chosen, places) if at < len(posting) and posting[at] == n]
    budget.spend((len(chosen) + len(posting)) / 2)
    listed = set(posting)
    return [number for number in chosen if number in listed]


# ==================================================================================================
# 19. Chunks
# ==================================================================================================
#
# A chunk is up to 1,024 samples of one series as few bytes. The problem: series compress well, as
# values repeat or change by little, but a loop over bits is slow in Python. The idea: whole columns
# become small integers by loops in C (`map`, `array`, integers of a thousand bytes), their bytes
# are put in the order in which they are alike, and deflate does the rest. What it costs: a chunk is
# decoded as a whole even for one sample, 0.1 µs a value.
#
# Source: Pelkonen et al., Gorilla: A Fast, Scalable, In-Memory Time Series Database (2015), whose
# ideas (delta of delta, XOR) are done here by whole chunks.

CHUNK_SAMPLES = 1_024  # a chunk is sealed with so many
_WIDTHS = (("b", 7), ("h", 15), ("i", 31), ("q", 63))
_SCALES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
_PROBED = 8  # values that are looked at before all are
_CONSTANT, _DELTAS, _PLAIN, _XOR = range(4)  # how the values of a chunk are kept
_STEPS, _GRID = range(2)  # and how its times


def _little_endian(numbers: "array[Any]") -> "array[Any]":
    """The array as it is kept in files, and back."""
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers


def _deflate(raw: bytes) -> bytes:
    # Z_FILTERED: 3 to 8 % smaller than the default strategy for deltas
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED)
    return compressor.compress(raw) + compressor.flush()


def _transposed(raw: bytes, width: int) -> bytes:
    """All first bytes of the numbers, then all second ones …: what is alike stands together."""
    return b"".join(raw[place::width] for place in range(width)) if width > 1 else raw


def _pack(numbers: Sequence[int]) -> bytes:
    """Integers in the narrowest array, its bytes transposed, deflated where that helps.

    >>> list(_unpack(_pack([1, 2, 300, -4])))
    [1, 2, 300, -4]
    """
    if not numbers:
        return b"\0"
    least, most = min(numbers), max(numbers)
    code, _ = next(
        (code, bits) for code, bits in _WIDTHS if -(1 << bits) <= least and most < 1 << bits
    )
    narrow = array(code, numbers)
    raw = _transposed(_little_endian(narrow).tobytes(), narrow.itemsize)
    small = _deflate(raw)
    if len(small) < len(raw):
        return bytes((narrow.itemsize | 0x80,)) + small
    return bytes((narrow.itemsize,)) + raw


def _unpack(packed: bytes) -> "array[int]":
    width, raw = packed[0] & 0x7F, packed[1:]
    if packed[0] & 0x80:
        raw = zlib.decompress(raw, -15)
    if width > 1:
        straight = bytearray(len(raw))
        count = len(raw) // width
        for place in range(width):
            straight[place::width] = raw[place * count : (place + 1) * count]
        raw = bytes(straight)
    return _little_endian(array({0: "b", 1: "b", 2: "h", 4: "i", 8: "q"}[width], raw))


def encode_times(times_ms: "array[int]") -> bytes:
    """Ascending times as bytes: delta of delta, or distances from an even grid, whichever is
    smaller.
    """
    first, count = times_ms[0], len(times_ms)
    if count == 1:
        return struct.pack("<Bqq", _STEPS, first, 0)
    steps = list(map(operator.sub, times_ms[1:], times_ms))
    head = struct.pack("<Bqq", _STEPS, first, steps[0])
    best = head + _pack(list(map(operator.sub, steps[1:], steps)))
    period = round((times_ms[-1] - first) / (count - 1))
    grid = range(first, first + period * count, period) if period else [first] * count
    head = struct.pack("<Bqq", _GRID, first, period)
    return min(best, head + _pack(list(map(operator.sub, times_ms, grid))), key=len)


def decode_times(encoded: bytes) -> "array[int]":
    """The times that `encode_times` was given."""
    kind, first, step = struct.unpack_from("<Bqq", encoded)
    if len(encoded) == 17:
        return array("q", (first,))
    numbers = _unpack(encoded[17:])
    if kind == _GRID:
        return array("q", map(operator.add, numbers, itertools.count(first, step)))
    steps = itertools.accumulate(numbers, initial=step)
    return array("q", itertools.accumulate(steps, initial=first))


def encode_values(values: "array[float]") -> bytes:
    """Values as the fewest bytes of four ways, from which the same bits come back.

    All the same: one of them. Decimals, where that is exact: as integers of a scale, or their
    deltas, in the narrowest array. All else: each XOR its predecessor, so that what they share
    is zero; the bytes transposed, deflated. 0.3 µs a value.

    >>> len(encode_values(array("d", [0.25 * n for n in range(1000)])))
    25
    """
    values_le = _little_endian(values)
    raw = values_le.tobytes()
    if raw == raw[:8] * len(values):
        return bytes((_CONSTANT,)) + struct.pack("<I", len(values)) + raw[:8]
    scaled = _scaled(values, raw)
    if scaled is None:
        mixed = int.from_bytes(raw[8:], "little") ^ int.from_bytes(raw[:-8], "little")
        shuffled = _transposed(raw[:8] + mixed.to_bytes(len(raw) - 8, "little"), 8)
        small = _deflate(shuffled)
        if len(small) < len(shuffled):
            return bytes((_XOR | 0x80,)) + small
        return bytes((_XOR,)) + shuffled
    scale, integers = scaled
    deltas = list(map(operator.sub, integers[1:], integers))
    # what is spread less packs better: 0.21 µs a value instead of 0.29 for packing both
    if deltas and max(deltas) - min(deltas) < round((max(values) - min(values)) * scale):
        return struct.pack("<BIq", _DELTAS, scale, integers[0]) + _pack(deltas)
    return struct.pack("<BI", _PLAIN, scale) + _pack(integers)


def _scaled(values: "array[float]", raw: bytes) -> tuple[int, list[int]] | None:
    """(scale, integers) whose quotients are the values, to the bit; None: there are none."""
    probe = values[:_PROBED]
    largest = math.nan if math.isnan(sum(values)) else max(max(values), -min(values))
    for scale in _SCALES:
        if not largest * scale < 2**52:
            return None
        if all(round(value * scale) / scale == value for value in probe):
            # `map` all the way: 0.10 µs a value, 0.17 with comprehensions
            if scale == 1:
                integers = list(map(int, values))
                quotients = array("d", integers)
            else:
                integers = list(map(round, map(operator.mul, values, itertools.repeat(scale))))
                quotients = array("d", map(operator.truediv, integers, itertools.repeat(scale)))
            if _little_endian(quotients).tobytes() == raw:  # the bits: -0.0 equals 0.0
                return scale, integers
    return None


def decode_values(encoded: bytes) -> "array[float]":
    """The values that `encode_values` was given."""
    kind = encoded[0] & 0x7F
    if kind == _CONSTANT:
        (count,) = struct.unpack_from("<I", encoded, 1)
        return _little_endian(array("d", encoded[5:13] * count))
    if kind == _XOR:
        shuffled = encoded[1:]
        if encoded[0] & 0x80:
            shuffled = zlib.decompress(shuffled, -15)
        count = len(shuffled) // 8
        mixed = bytearray(len(shuffled))
        for place in range(8):
            mixed[place::8] = shuffled[place * count : (place + 1) * count]
        patterns = _little_endian(array("Q", bytes(mixed)))
        whole = array("Q", itertools.accumulate(patterns, operator.xor))
        return _little_endian(array("d", _little_endian(whole).tobytes()))
    (scale,) = struct.unpack_from("<I", encoded, 1)
    if kind == _PLAIN:
        integers = _unpack(encoded[5:]).tolist()
    else:
        (first,) = struct.unpack_from("<q", encoded, 5)
        integers = list(itertools.accumulate(_unpack(encoded[13:]), initial=first))
    if scale == 1:
        return array("d", integers)  # of a list: 24 µs for 1,024, of an iterator 50
    return array("d", [integer / scale for integer in integers])


class Chunk(NamedTuple):
    """Samples of one series, oldest first: encoded, or as they are while they are few."""

    first_ms: int
    last_ms: int
    count: int  # type: ignore[assignment]  # of samples; no tuple is searched here
    times: "bytes | array[int]"
    values: "bytes | array[float]"
    sequence: "bytes | array[int] | None" = None  # in a memtable: when each arrived, ascending

    @classmethod
    def of(
        cls, times: "array[int]", values: "array[float]", sequence: "array[int] | None" = None
    ) -> "Chunk":
        """The chunk of some samples, not encoded."""
        return cls(times[0], times[-1], len(times), times, values, sequence)

    def decoded_times(self, known: "dict[bytes, array[int]]") -> "array[int]":
        """Its times, decoded only once for all chunks that share them."""
        times = self.times
        if isinstance(times, array):
            return times
        if times not in known:
            known[times] = decode_times(times)
        return known[times]

    def decoded_values(self) -> "array[float]":
        """Its values."""
        return self.values if isinstance(self.values, array) else decode_values(self.values)

    def decoded_sequence(self) -> Iterable[int]:
        """The sequence number of each sample; 0 for all where none are known."""
        if self.sequence is None:
            return itertools.repeat(0)
        return self.sequence if isinstance(self.sequence, array) else decode_times(self.sequence)


def merge_chunks(sources: list[list[Chunk]], budget: Budget) -> list[Chunk]:
    """The chunks of one series, from the oldest source to the newest, as one list without
    overlaps, ascending. Of samples of the same time the one that was pushed last is kept.

    >>> old = Chunk.of(array("q", [1, 2, 3]), array("d", [1, 1, 1]))
    >>> new = Chunk.of(array("q", [3, 4]), array("d", [2, 2]))
    >>> merge_chunks([[old], [new]], Budget())[0].values
    array('d', [1.0, 1.0, 2.0, 2.0])
    """
    ranked = [(chunk, rank) for rank, chunks in enumerate(sources) for chunk in chunks]
    ranked.sort(key=lambda pair: pair[0].first_ms)
    whole: list[Chunk] = []
    overlapping: list[tuple[Chunk, int]] = []
    last_ms = -1
    for pair in ranked:
        if overlapping and pair[0].first_ms > last_ms:
            whole.append(_without_overlap(overlapping, budget))
            overlapping = []
        overlapping.append(pair)
        last_ms = max(last_ms, pair[0].last_ms)
    if overlapping:
        whole.append(_without_overlap(overlapping, budget))
    return whole


def _without_overlap(overlapping: list[tuple[Chunk, int]], budget: Budget) -> Chunk:
    if len(overlapping) == 1:
        return overlapping[0][0]
    budget.spend(10 * sum(chunk.count for chunk, _ in overlapping))
    known: dict[bytes, array[int]] = {}
    samples = [
        sample
        for chunk, rank in overlapping
        for sample in zip(
            chunk.decoded_times(known),
            itertools.repeat(rank),
            chunk.decoded_sequence(),
            chunk.decoded_values(),
        )
    ]
    samples.sort(key=operator.itemgetter(0, 1, 2))
    last = {time_ms: value for time_ms, _, _, value in samples}
    return Chunk.of(array("q", last), array("d", last.values()))


def concatenated(code: str, parts: Sequence[Any]) -> Any:
    """Arrays of one type code as one array; a single one is given back as it is."""
    if len(parts) == 1:
        return parts[0]
    whole = array(code)
    for part in parts:
        whole += part
    return whole


# ==================================================================================================
# 20. Memtable
# ==================================================================================================
#
# The problem: what was pushed lately changes all the time, and is asked for most. The idea: series
# that one client pushes together share their times, so a push of a hundred metrics is one row: one
# time, one sequence number, a hundred values at the end of a plain array. Rows that have become a
# thousand are sealed into chunks. Samples come in one way only, as lines of the log. One regular
# expression cuts the values out of them; what is left of a batch is, but for the time, the same
# bytes as when it came before, so it is recognized by one comparison. What it costs: 0.5 to 0.8 µs
# a line, and a series that is pushed now with these and now with those stands in several groups.

# No number of these is too large for a float.
_VALUE_FIELD = (
    rb'"value":(-?(?:[1-9][0-9]{0,300}+|0)(?:\.[0-9]++)?'
    rb"(?:e[-+]?(?:30[0-7]|[0-2]?[0-9]{1,2}))?|null)"
)
# Possessive quantifiers: a line that does not match is given up at once, 0.4 µs instead of 0.6.
_LOG_LINE = re.compile(
    rb'\{"timestamp":"([0-9T:-]{17}[0-5][0-9]\.[0-9]{3}Z)",'
    rb'"name":"([^"\\\n]++(?:\\.[^"\\\n]*+)*+)",' + _VALUE_FIELD + rb'(,"type":[^\n]*+)\n'
)
_VALUE = re.compile(_VALUE_FIELD + rb',"type":"')
_STAMP = re.compile(rb'\{"timestamp":"([0-9T:-]{17}[0-5][0-9]\.[0-9]{3}Z)"')
_STAMP_BYTES = len('{"timestamp":"2025-09-17T13:45:23.123Z"')


@functools.lru_cache(maxsize=1024)
def _minute_ms(text: bytes) -> int | None:
    try:
        return _read_timestamp(f"{text.decode()}00Z")
    except ValueError:
        return None


def _line_time_ms(text: bytes) -> int | None:
    """The time of a line in milliseconds; None: the calendar has no such."""
    minute_ms = _minute_ms(text[:17])  # 0.4 µs instead of 5 for the whole time
    return None if minute_ms is None else minute_ms + int(text[17:19] + text[20:23])


@functools.lru_cache(maxsize=1024)
def _stamp_ms(stamp: bytes) -> int:
    """The time of a line that begins so; -1: no line of the log does."""
    match = _STAMP.fullmatch(stamp)
    time_ms = _line_time_ms(match[1]) if match else None
    return -1 if time_ms is None else time_ms


def _floats(values: Iterable[bytes]) -> list[float]:
    try:
        return list(map(float, values))
    except ValueError:  # a null among them
        return [STALE if value == b"null" else float(value) for value in values]


class RowGroup:
    """The latest rows of series that are pushed together."""

    __slots__ = ("series", "times", "sequence", "values", "chunks", "ascending")

    def __init__(self, series: tuple[int, ...]):
        self.series = series
        self.times = array("q")
        self.sequence = array("q")  # a number for each row of the memtable, in order of arrival
        self.values = array("d")  # row by row
        self.chunks: list[list[Chunk]] = []  # sealed ones, each time a chunk for each series
        self.ascending = True  # whether the times ascend

    def append(self, time_ms: int, sequence: int, values: list[float]) -> None:
        """Add a row. Of rows of the same time the later one wins."""
        times = self.times
        if times and time_ms <= times[-1]:
            if time_ms == times[-1]:
                del times[-1], self.sequence[-1], self.values[-len(values) :]
            else:
                self.ascending = False
        times.append(time_ms)
        self.sequence.append(sequence)
        self.values.fromlist(values)  # 0.06 µs a value instead of 0.1

    def sort(self) -> None:
        """Bring rows into the order of their times; of the same time the last one stays."""
        if self.ascending:
            return
        width = len(self.series)
        last = {time_ms: row for row, time_ms in enumerate(self.times)}
        rows = [last[time_ms] for time_ms in sorted(last)]
        values = array("d")
        for row in rows:
            values += self.values[row * width : (row + 1) * width]
        self.sequence = array("q", [self.sequence[row] for row in rows])
        self.times, self.values, self.ascending = array("q", sorted(last)), values, True


class _Layout(NamedTuple):
    """The lines of a batch that may come again, all but their times and values."""

    text: bytes  # with b"\1" for each stamp and b"\0" for each value
    last_at: int  # where the key of the last line begins, in lines with stamps
    last_key: bytes
    width: int  # lines
    group: RowGroup
    lasts: list[int] | None  # the last line of each series, where some have several

    def row(self, values: list[float], at: int) -> list[float]:
        """The row of a batch, whose values begin there."""
        row = values[at : at + self.width]
        return row if self.lasts is None else [row[last] for last in self.lasts]


class _UnknownLine(NamedTuple):
    """A line that is in no known layout."""

    time_ms: int
    key: bytes  # the line without its stamp, with b"\0" for its value
    series: int
    value: float


def _with_values(line: bytes, values: Iterable[bytes]) -> bytes:
    for value in values:
        line = line.replace(b"\0", b'"value":%b,"type":"' % value, 1)
    return line


class Memtable:
    """Samples in memory, from lines of the log.

    >>> table = Memtable()
    >>> sample = Sample("cpu", 1.5, "gauge", {}, 1000)
    >>> table.add_lines(log_line(sample).encode())
    1
    >>> [number] = table.index.select([Matcher("__name__", "=", "cpu")], Budget())
    >>> next(table.chunks([number], 0, 9000, Budget()))[1][0].values
    array('d', [1.5])
    """

    MAX_LAYOUT_BYTES = 256 * 1024 * 1024  # that are remembered
    MAX_ALIKE = 64  # that begin with the same line
    MAX_SEEN = 65_536
    COLUMNS_A_SERIES = 4  # how often a series may stand in different groups, on average

    def __init__(self) -> None:
        self.index = SeriesIndex()
        self.types: dict[str, str] = {}
        self.first_ms, self.last_ms = END_OF_TIME_MS, -1  # the bounds of the samples' times
        self.changed_ms = END_OF_TIME_MS  # the earliest that came since somebody set it to this
        self.rows = 0  # how many there ever were
        self.unreadable: list[bytes] = []  # lines that are no metrics, until somebody takes them
        self._groups: dict[tuple[int, ...], RowGroup] = {}
        self._places: list[list[tuple[RowGroup, int]]] = []  # of each series: groups and columns
        self._columns = 0
        self._full: dict[RowGroup, None] = {}  # groups with rows to seal
        self._seen: set[int] = set()  # hashes of rows that came once
        self._layouts: dict[bytes, list[_Layout]] = {}  # by the first key, the shortest first
        self._layout_bytes = 0
        self._numbers: dict[bytes, int] = {}  # of series, by the keys of lines
        self._unknown: list[_UnknownLine] = []  # of one time, and not added yet

    # ---- lines come in

    def add_lines(self, lines: bytes) -> int:
        """Add whole lines of the log; returns how many of them were metrics."""
        unreadable_before = len(self.unreadable)
        pieces = _VALUE.split(lines.replace(b"\0", b"\1"))  # a damaged file may hold NULs
        text, value_texts = b"\0".join(pieces[::2]), pieces[1::2]
        values = _floats(value_texts)
        start = at = 0  # of the next line: in the text, and among the values
        while start < len(text):
            stamp = text[start : start + _STAMP_BYTES]
            end = text.index(b"\n", start) + 1
            key = text[start + _STAMP_BYTES : end]
            time_ms = _stamp_ms(stamp)
            if self._unknown and self._unknown[0].time_ms != time_ms:
                self._end_unknown()
            for layout in self._layouts.get(key, ()) if time_ms >= 0 else ():
                # its last line first: 0.2 µs instead of 5 for a long batch that is another one
                if not text.startswith(layout.last_key, start + layout.last_at):
                    continue
                batch = layout.text.replace(b"\1", stamp)
                if text.startswith(batch, start):
                    self._end_unknown()
                    self._push(layout.group, time_ms, layout.row(values, at))
                    start, at = start + len(batch), at + layout.width
                    break
            else:
                next_at = at + key.count(b"\0")
                series = self._numbers.get(key) if time_ms >= 0 else None
                if series is None:
                    line = _with_values(text[start:end], value_texts[at:next_at])
                    self._add_new_line(line, key)
                else:
                    self._unknown.append(_UnknownLine(time_ms, key, series, values[at]))
                start, at = end, next_at
        self._end_unknown()
        return lines.count(b"\n") - (len(self.unreadable) - unreadable_before)

    def _add_new_line(self, line: bytes, key: bytes) -> None:
        """Add a line whose key is not known, or which is not as the log writes it."""
        try:
            sample = _read_metric(parse_json(line), 0)
        except ValueError:
            self.unreadable.append(line)
            return
        series = self._number(sample)
        value = STALE if sample.value is None else float(sample.value)
        if b"\0" in key and log_line(sample).encode() == line:
            if len(self._numbers) > 2 * len(self.index) + 65_536:  # series by several texts each
                self._numbers.clear()
            self._numbers[key] = series
            self._unknown.append(_UnknownLine(sample.timestamp_ms, key, series, value))
        else:
            self._end_unknown()
            self._push(self._single(series), sample.timestamp_ms, [value])

    def _end_unknown(self) -> None:
        if self._unknown:
            unknown, self._unknown = self._unknown, []
            self._add_unknown(unknown)

    def _add_unknown(self, lines: list[_UnknownLine]) -> None:
        """Add lines of one time that may be of one batch; or of several, that begin with the same
        metric.
        """
        time_ms = lines[0].time_ms
        lasts = {line.series: at for at, line in enumerate(lines)}
        group = self._group(tuple(lasts)) if len(lines) <= MAX_BATCH else None
        if group is not None:
            self._push(group, time_ms, [lines[at].value for at in lasts.values()])
            self._remember(lines, group, list(lasts.values()))
            return
        name = lines[0].key.partition(b"\0")[0]
        starts = [at for at, line in enumerate(lines) if line.key.startswith(name)]
        if len(starts) == 1:
            starts = list(range(len(lines)))
        for start, end in itertools.pairwise([*starts, len(lines)]):
            if end - start > 1:
                self._add_unknown(lines[start:end])
            else:  # not remembered: it may be a part of a batch
                self._push(self._single(lines[start].series), time_ms, [lines[start].value])

    def _remember(self, lines: list[_UnknownLine], group: RowGroup, lasts: list[int]) -> None:
        layouts = self._layouts.setdefault(lines[0].key, [])
        text, last_key = b"".join([b"\1" + line.key for line in lines]), lines[-1].key
        known = any(layout.text == text for layout in layouts)  # it is twice in these lines
        has_room = len(layouts) < self.MAX_ALIKE and self._layout_bytes < self.MAX_LAYOUT_BYTES
        if has_room and not known:
            self._layout_bytes += len(text)
            last_at = len(text) + len(lines) * (_STAMP_BYTES - 1) - len(last_key)
            repeated = lasts if len(lasts) < len(lines) else None
            layouts.append(_Layout(text, last_at, last_key, len(lines), group, repeated))
            layouts.sort(key=lambda layout: layout.width)

    def _number(self, sample: Sample) -> int:
        number = self.index.number(series_labels(sample.name, sample.tags))
        if number == len(self._places):
            self._places.append([])
        self.types[sample.name] = sample.type
        return number

    def _group(self, series: tuple[int, ...]) -> RowGroup | None:
        """The group of these series; a new one if they are new, or come together again."""
        if series in self._groups:
            return self._groups[series]
        if len(series) > 1 and any(map(self._places.__getitem__, series)):
            key = hash(series)
            room = self.COLUMNS_A_SERIES * len(self._places) + 10 * MAX_BATCH
            if key not in self._seen or self._columns + len(series) > room:
                if len(self._seen) >= self.MAX_SEEN:
                    self._seen.clear()
                self._seen.add(key)
                return None
        group = self._groups[series] = RowGroup(series)
        self._columns += len(series)
        for column, number in enumerate(series):
            self._places[number].append((group, column))
        return group

    def _single(self, number: int) -> RowGroup:
        group = self._group((number,))
        assert group is not None  # a series may always stand alone
        return group

    def _push(self, group: RowGroup, time_ms: int, values: list[float]) -> None:
        self.rows += 1
        group.append(time_ms, self.rows, values)
        if time_ms > self.last_ms:
            self.last_ms = time_ms
        if time_ms < self.changed_ms:
            self.changed_ms = time_ms
            self.first_ms = min(self.first_ms, time_ms)
        if len(group.times) > CHUNK_SAMPLES:
            self._full[group] = None

    # ---- chunks come out

    def chunks(
        self, numbers: Iterable[int], start_ms: int, end_ms: int, budget: Budget
    ) -> Iterator[tuple[int, list[Chunk]]]:
        """For each series its chunks of a time, both ends included; they may reach beyond it."""
        bounds: dict[RowGroup, tuple[int, int, array[int], array[int]]] = {}
        for number in numbers:
            found: list[Chunk] = []
            for group, column in self._places[number]:
                for row in group.chunks:
                    chunk = row[column]
                    if chunk.first_ms <= end_ms and chunk.last_ms >= start_ms:
                        found.append(chunk)
                if group not in bounds:
                    group.sort()
                    low = bisect_left(group.times, start_ms)
                    high = bisect_right(group.times, end_ms, low)
                    budget.spend(high - low)
                    bounds[group] = low, high, group.times[low:high], group.sequence[low:high]
                low, high, times, sequence = bounds[group]
                if times:
                    width = len(group.series)
                    values = group.values[low * width + column : high * width : width]
                    found.append(Chunk.of(times, values, sequence))
                budget.spend(10 + len(group.chunks) + (high - low) / 10)
            yield number, merge_chunks([found], budget)

    @property
    def has_full_groups(self) -> bool:
        """Whether there is anything to seal."""
        return bool(self._full)

    def seal(self) -> Iterator[None]:
        """Encode the rows of full groups, a column a step; between two steps all can be read."""
        while self._full:
            group, _ = self._full.popitem()
            group.sort()
            in_steps, width = True, len(group.series)
            while len(group.times) > CHUNK_SAMPLES:  # the last row stays: it may be pushed again
                values, end = group.values, CHUNK_SAMPLES * width
                times, sequence = group.times[:CHUNK_SAMPLES], group.sequence[:CHUNK_SAMPLES]
                first_ms, last_ms = times[0], times[-1]
                kept_times, kept_sequence = encode_times(times), encode_times(sequence)
                row = []
                for column in range(width):
                    kept = encode_values(values[column:end:width])
                    chunk = Chunk(first_ms, last_ms, len(times), kept_times, kept, kept_sequence)
                    row.append(chunk)
                    if in_steps:
                        yield
                if group.values is values:
                    group.chunks.append(row)
                    del group.times[:CHUNK_SAMPLES], group.sequence[:CHUNK_SAMPLES], values[:end]
                else:  # late rows were sorted in: once more, and nothing comes between
                    in_steps = False


# ==================================================================================================
# 21. Blocks
# ==================================================================================================
#
# A memtable that is no longer pushed to becomes a block: a file that never changes. The problem: a
# crash may come between any two writes, and a disk may give back other bytes than it was given. The
# idea: a block is written under another name, synced, and renamed when it is whole; each part has a
# checksum, so that a damaged one is noticed and set aside, and never answered from. Blocks are read
# by `pread`, not mapped: a file that somebody cuts short is an error, not the end of the process.
# What it costs: an index that is read as a whole, when a block is first asked.
#
# A block, from its first byte:  values | times | index | meta | length and checksum of the meta

BLOCKS_NAME = "blocks"
_BLOCK_END = struct.Struct("<II8s")  # length and checksum of the meta, and what the file is
_BLOCK_MAGIC = b"MSBLOCK1"
_BLOCK_NAME = re.compile(r"([0-9]{8})-([0-9]{8})\.block")


class BlockError(Exception):
    """A block that is not as it was written: what is wrong with it."""


def _is_whole(chunk: Chunk) -> bool:
    return chunk.count >= CHUNK_SAMPLES // 2 and isinstance(chunk.values, bytes)


def _repacked(chunks: list[Chunk]) -> Iterator[Chunk]:
    """Chunks that are small or not encoded as fewer ones that are neither."""
    times = concatenated("q", [chunk.decoded_times({}) for chunk in chunks])
    values = concatenated("d", [chunk.decoded_values() for chunk in chunks])
    for start in range(0, len(times), CHUNK_SAMPLES):
        some = times[start : start + CHUNK_SAMPLES]
        kept = encode_values(values[start : start + CHUNK_SAMPLES])
        yield Chunk(some[0], some[-1], len(some), _encoded_times(some.tobytes()), kept)


@functools.lru_cache(maxsize=1024)  # series that were pushed together share their times
def _encoded_times(raw: bytes) -> bytes:
    return encode_times(array("q", raw))


class BlockWriter:
    """Writes a block to a temporary file; `finish` makes it durable under its name.

    As a context it leaves nothing behind where the block is not finished.
    """

    def __init__(self, path: str):
        self._path = path
        self._file = open(path + ".tmp", "wb")  # noqa: SIM115  # `__exit__` closes it
        self._offset = 0
        self._symbols: dict[str, int] = {}
        self._label_counts = array("I")
        self._label_symbols = array("I")
        self._times: dict[bytes, int] = {}  # encoded, in the order of their numbers
        self._time_rows: list[tuple[int, int, int]] = []  # first, last, count
        self._chunk_counts = array("I")
        self._chunk_times, self._chunk_sizes, self._chunk_sums = array("I"), array("I"), array("I")
        self.samples = 0

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError as error:  # a full disk: what was buffered can't be written either
            logger.debug("%s.tmp was not written to its end: %s", self._path, error)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path + ".tmp")

    def _symbol(self, text: str) -> int:
        return self._symbols.setdefault(text, len(self._symbols))

    def add(self, labels: Labels, chunks: Iterable[Chunk]) -> None:
        """Add a series and its samples: chunks without overlaps, ascending."""
        self._label_counts.append(len(labels))
        self._label_symbols.extend(map(self._symbol, labels))
        before = len(self._chunk_sizes)
        for is_whole, some in itertools.groupby(chunks, _is_whole):
            for chunk in some if is_whole else _repacked(list(some)):
                self._add_chunk(chunk)
        self._chunk_counts.append(len(self._chunk_sizes) - before)

    def _add_chunk(self, chunk: Chunk) -> None:
        assert isinstance(chunk.times, bytes) and isinstance(chunk.values, bytes)
        if chunk.times not in self._times:
            self._times[chunk.times] = len(self._times)
            self._time_rows.append((chunk.first_ms, chunk.last_ms, chunk.count))
        self._chunk_times.append(self._times[chunk.times])
        self._chunk_sizes.append(len(chunk.values))
        self._chunk_sums.append(zlib.crc32(chunk.values))
        self._write(chunk.values)
        self.samples += chunk.count

    def _write(self, part: bytes) -> None:
        self._file.write(part)
        self._offset += len(part)

    def finish(self, covers: int, types: dict[str, str]) -> None:
        """Write the rest, sync, rename. `covers`: the last segment of the log that is in it."""
        times_at = self._offset
        for encoded in self._times:
            self._write(encoded)
        index = zlib.compress(
            b"".join(struct.pack("<Q", len(raw)) + raw for raw in self._index_parts(types)), 6
        )
        index_at = self._offset
        self._write(index)
        meta = write_json(
            {
                "first_ms": min((first for first, _, _ in self._time_rows), default=0),
                "last_ms": max((last for _, last, _ in self._time_rows), default=-1),
                "series": len(self._label_counts),
                "samples": self.samples,
                "covers": covers,
                "times_at": times_at,
                "index_at": index_at,
                "index_crc32": zlib.crc32(index),
            }
        ).encode()
        self._write(meta + _BLOCK_END.pack(len(meta), zlib.crc32(meta), _BLOCK_MAGIC))
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._path + ".tmp", self._path)
        sync_folder(os.path.dirname(self._path))

    def _index_parts(self, types: dict[str, str]) -> list[bytes]:
        texts = [text.encode() for text in self._symbols]
        here = {name: kind for name, kind in types.items() if name in self._symbols}
        columns = [
            array("I", map(len, texts)),
            self._label_counts,
            self._label_symbols,
            array("I", map(self._symbols.__getitem__, here)),
            array("I", map(METRIC_TYPES.index, here.values())),
            array("I", map(len, self._times)),
            array("I", map(zlib.crc32, self._times)),
            array("q", [first for first, _, _ in self._time_rows]),
            array("q", [last for _, last, _ in self._time_rows]),
            array("I", [count for _, _, count in self._time_rows]),
            self._chunk_counts,
            self._chunk_times,
            self._chunk_sizes,
            self._chunk_sums,
        ]
        return [b"".join(texts), *(_little_endian(column).tobytes() for column in columns)]


def sync_folder(folder: str) -> None:
    """Make the names in a folder as durable as its files."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _BlockIndex:
    """What a block says of its series and chunks."""

    def __init__(self, raw: bytes, times_at: int):
        parts, position = [], 0
        while position < len(raw):
            (length,) = struct.unpack_from("<Q", raw, position)
            parts.append(raw[position + 8 : position + 8 + length])
            position += 8 + length
        text, columns = parts[0], [
            _little_endian(array(code, part)) for code, part in zip("IIIIIIIqqIIIII", parts[1:])
        ]  # fmt: skip
        lengths, label_counts, label_symbols, names, kinds, *rest = columns
        ends = list(itertools.accumulate(lengths, initial=0))
        symbols = [text[start:end].decode() for start, end in itertools.pairwise(ends)]
        self.series = SeriesIndex()
        self._series_labels = symbols, label_counts, label_symbols
        self.types = {symbols[name]: METRIC_TYPES[kind] for name, kind in zip(names, kinds)}
        time_sizes, self.time_sums, self.firsts, self.lasts, self.counts = rest[:5]
        chunk_counts, self.chunk_times, chunk_sizes, self.chunk_sums = rest[5:]
        self.time_ends = array("Q", itertools.accumulate(time_sizes, initial=times_at))
        self.value_ends = array("Q", itertools.accumulate(chunk_sizes, initial=0))
        self.chunk_ends = array("Q", itertools.accumulate(chunk_counts, initial=0))

    def add_series(self) -> Iterator[None]:
        """Fill the index of series, in short steps."""
        symbols, label_counts, label_symbols = self._series_labels
        start = 0
        for number, count in enumerate(label_counts):
            labels = label_symbols[start : start + count]
            self.series.number(tuple(map(symbols.__getitem__, labels)))
            start += count
            if number % 500 == 499:
                yield
        self._series_labels = ([], array("I"), array("I"))


# What reading a damaged block may raise, beside BlockError: its checksums are right by chance, or
# were made over what was wrong already.
_DAMAGE = (BlockError, OSError, zlib.error, struct.error, ValueError, IndexError, OverflowError)


class Block:
    """A file of series that never changes. Its index is read when it is first asked, its chunks
    each time. Raises BlockError where its end is damaged. Where other parts are, `on_damage` is
    called with (path, error), and it has no more samples to give.
    """

    def __init__(self, path: str, on_damage: Callable[[str, Exception], None]):
        self.path, self._on_damage = path, on_damage
        self.is_damaged = False
        # for its folder
        self.is_wanted, self.last_use = False, 0
        name = _BLOCK_NAME.fullmatch(os.path.basename(path))
        if name is None:
            raise BlockError("not the name of a block")
        self.first_number, self.last_number = int(name[1]), int(name[2])
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # open as long as it is served
        self.size_bytes = os.fstat(self._file.fileno()).st_size
        if self.size_bytes < _BLOCK_END.size:
            raise BlockError("too short for a block")
        end = self._read(self.size_bytes - _BLOCK_END.size, self.size_bytes)
        length, checksum, magic = _BLOCK_END.unpack(end)
        self._meta_at = self.size_bytes - _BLOCK_END.size - length
        if magic != _BLOCK_MAGIC or self._meta_at < 0:
            raise BlockError("the end is not that of a block")
        raw = self._read(self._meta_at, self._meta_at + length, checksum)
        try:
            meta = parse_json(raw)
            self.first_ms, self.last_ms = int(meta["first_ms"]), int(meta["last_ms"])
            self.samples, self.covers = int(meta["samples"]), int(meta["covers"])
            self.series_count = int(meta["series"])
            self._times_at, self._index_at = int(meta["times_at"]), int(meta["index_at"])
            self._index_crc32 = int(meta["index_crc32"])
        except (JSONError, KeyError, TypeError) as error:
            raise BlockError(f"the meta is not that of a block: {error}") from None
        self._loaded: _BlockIndex | None = None

    def close(self) -> None:
        """Give its file back."""
        self._file.close()

    @property
    def is_loaded(self) -> bool:
        """Whether its index is in memory."""
        return self._loaded is not None

    def forget_index(self) -> None:
        """Give the memory of its index back; it is read again when it is needed."""
        self._loaded = None

    def load(self) -> Iterator[None]:
        """Read its index, in short steps."""
        if self._loaded is not None or self.is_damaged:
            return
        try:
            raw = self._read(self._index_at, self._meta_at, self._index_crc32)
            index = _BlockIndex(zlib.decompress(raw), self._times_at)
            yield from index.add_series()
            self._loaded = index
        except _DAMAGE as error:
            self._fail(BlockError(f"the index can't be read: {error}"))

    def _fail(self, error: Exception) -> None:
        self.is_damaged = True
        self._on_damage(self.path, error)

    def _index(self) -> _BlockIndex | None:
        for _ in self.load():
            pass
        return self._loaded

    @property
    def index(self) -> SeriesIndex:
        """Which series are in it."""
        index = self._index()
        return index.series if index else SeriesIndex()

    @property
    def types(self) -> dict[str, str]:
        """The type of each metric."""
        index = self._index()
        return index.types if index else {}

    def chunks(
        self, numbers: Iterable[int], start_ms: int, end_ms: int, budget: Budget
    ) -> Iterator[tuple[int, list[Chunk]]]:
        """For each series its chunks of a time, both ends included; they may reach beyond it."""
        try:
            if (index := self._index()) is not None:
                yield from self._read_chunks(index, numbers, start_ms, end_ms, budget)
        except _DAMAGE as error:
            self._fail(error)
        while self.is_damaged:  # the others have none
            yield -1, []

    def _read_chunks(
        self, index: _BlockIndex, numbers: Iterable[int], start_ms: int, end_ms: int, budget: Budget
    ) -> Iterator[tuple[int, list[Chunk]]]:
        known: dict[int, bytes] = {}  # times that were read
        for number in numbers:
            chunks = []
            first, last = index.chunk_ends[number], index.chunk_ends[number + 1]
            budget.spend(10 + 2 * (last - first))
            for place in range(first, last):
                times = index.chunk_times[place]
                first_ms, last_ms = index.firsts[times], index.lasts[times]
                if last_ms < start_ms or first_ms > end_ms:
                    continue
                budget.spend(30)
                if times not in known:
                    known[times] = self._part(index.time_ends, times, index.time_sums)
                values = self._part(index.value_ends, place, index.chunk_sums)
                count = index.counts[times]
                chunks.append(Chunk(first_ms, last_ms, count, known[times], values))
            yield number, chunks

    def _part(self, ends: "array[int]", place: int, checksums: "array[int]") -> bytes:
        return self._read(ends[place], ends[place + 1], checksums[place])

    def _read(self, start: int, end: int, checksum: int | None = None) -> bytes:
        part = os.pread(self._file.fileno(), end - start, start)
        if len(part) < end - start:
            raise BlockError(f"cut short at byte {start + len(part)}")
        if checksum is not None and zlib.crc32(part) != checksum:
            raise BlockError(f"bytes {start} to {end} do not fit their checksum")
        return part


# ==================================================================================================
# 22. Following the log
# ==================================================================================================
#
# The log is files, of which only the last one grows: the front moves a file that is long or old to
# the name of a segment, and goes on in a new one. The problem: other processes read the log while
# all this happens, and must read no line twice and none before it is acknowledged. The idea: they
# are given open files, which stay the same under any name, and are told how far each one counts.
# What it costs: a file that nobody has a name for lives until its last reader has left it.

READ_BYTES = 64 * 1024  # the log is read in pieces of so many
MOST_READ_BYTES = 1024 * 1024  # or, where lines of one time are longer, of so many
_SEGMENT_NAME = re.compile(r"metrics\.([0-9]{8})\.jsonl")


def log_segments(folder: str) -> list[tuple[int, str]]:
    """The parts of the log that no longer grow: (number, path), in order."""
    found = []
    for name in os.listdir(folder):
        if match := _SEGMENT_NAME.fullmatch(name):
            found.append((int(match[1]), os.path.join(folder, name)))
    return sorted(found)


def segment_of(folder: str, descriptor: int) -> tuple[int, str]:
    """Which segment an open file is: (number, path); (0, "") if none."""
    inode = os.fstat(descriptor).st_ino
    for number, path in log_segments(folder):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == inode:
                return number, path
    return 0, ""


class Checkpoint(NamedTuple):
    """How far another reader has taken the log; stands in a file of its own. The last segment that
    it took whole, and where in the file after that, whatever its name is by now.
    """

    segment: int = 0
    offset: int = 0  # all before it is taken
    end: int = 0  # up to here it may have been taken: no answer has come yet
    check: int = 0  # CRC-32 of what stands before the end: whether it is the same file

    @classmethod
    def read(cls, path: str) -> "Checkpoint":
        """What a file says; nothing is taken where there is none, or none that makes sense."""
        try:
            with open(path, "rb") as file:
                known = parse_json(file.read())
            return cls(*(int(known[key]) for key in cls._fields))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, path: str) -> None:
        """Put it in the place of an older one. It is not synced: what a loss of power undoes is
        taken again.
        """
        new = f"{path}.{os.getpid()}.tmp"
        with open(new, "wb") as file:
            file.write(write_json(self._asdict()).encode() + b"\n")
        os.replace(new, path)


class LogTail:
    """Reads a file of the log from a position on, in pieces of so many bytes, while it grows."""

    def __init__(
        self, descriptor: int, position: int = 0, piece_bytes: int = READ_BYTES,
        most_bytes: int = MOST_READ_BYTES,
    ):  # fmt: skip
        self.descriptor, self.position = descriptor, position
        self._piece_bytes, self._most_bytes = piece_bytes, most_bytes

    def read(self, end: int) -> bytes:
        """The next whole lines before a position; b"" where there are none."""
        size = self._piece_bytes
        while True:
            piece = os.pread(self.descriptor, max(0, min(size, end - self.position)), self.position)
            whole = piece[: piece.rfind(b"\n") + 1]
            if len(piece) < size or not whole:
                break
            # Lines of one time stay together: half a batch would be a row group of its own, and
            # series in many groups are merged sample by sample: a query of 260 ms took 1,000.
            last_line = whole.rfind(b"\n", 0, -1) + 1
            stamp = whole[last_line : last_line + _STAMP_BYTES]
            begin = 0 if whole.startswith(stamp) else whole.find(b"\n" + stamp) + 1
            if begin or size >= self._most_bytes:
                whole = whole[:begin] or whole
                break
            size *= 4
        if len(piece) == size and not whole:  # a line that no metric has
            whole = piece[:-1] + b"\n"
        elif not piece and os.fstat(self.descriptor).st_size < self.position:  # it was emptied
            self.position = 0
        self.position += len(whole)
        return whole

    def has_reached(self, end: int) -> bool:
        """Whether all lines before a position were read, as far as the file has them."""
        return self.position >= end or self.position >= os.fstat(self.descriptor).st_size


class FollowedLog:
    """The log as another process follows it: file after file, each up to where it is acknowledged.

    `tail` reads the file with the number `file`, -1 before there is any. What the front says
    (`begin_file`, `acknowledge`) may come in a signal handler.
    """

    def __init__(self, piece_bytes: int = READ_BYTES, most_bytes: int = MOST_READ_BYTES):
        self.file, self.tail = -1, LogTail(-1)
        self.acknowledged = Position(-1, 0)
        self._piece_bytes, self._most_bytes = piece_bytes, most_bytes
        self._next: deque[tuple[Position, int]] = deque()  # (new file, end of the old), a file

    def begin_file(self, position: Position, descriptor: int) -> None:
        """The log goes on in another file; the old one ends at the position's size. The first file
        is acknowledged up to there.
        """
        if position.file <= self._last_file:  # it is known from the start
            os.close(descriptor)
            return
        if self._last_file < 0:
            self.acknowledge(position)
            position = position._replace(size_bytes=0)  # there is no old one
        self._next.append((position, descriptor))

    def acknowledge(self, position: Position) -> None:
        """Nothing before this position is ever taken back."""
        self.acknowledged = max(self.acknowledged, position)

    @property
    def _last_file(self) -> int:
        """The last file that was told of."""
        return self._next[-1][0].file if self._next else self.file

    @property
    def descriptors(self) -> list[int]:
        """Of the file that is read now and those after it."""
        return [self.tail.descriptor, *(descriptor for _, descriptor in list(self._next))]

    @property
    def left_bytes(self) -> int:
        """How long the file that is read now and those after it are."""
        last, acknowledged = self._last_file, self.acknowledged
        sizes = sum(position.size_bytes for position, _ in list(self._next))
        return sizes + (acknowledged.size_bytes if acknowledged.file == last else 0)

    @property
    def limit(self) -> int:
        """How far the file that is read now may be read."""
        if self._next:
            return self._next[0][0].size_bytes
        acknowledged = self.acknowledged
        return acknowledged.size_bytes if acknowledged.file == self.file else 0

    @property
    def _has_read_all(self) -> bool:
        """Whether the file that is read now was read as far as it may be."""
        return self.file < 0 or self.tail.has_reached(self.limit)

    @property
    def has_next_file(self) -> bool:
        """Whether there is another file, and the one that is read now is over."""
        return bool(self._next) and self._has_read_all

    @property
    def is_in_last_file(self) -> bool:
        """Whether the file that is read now may still grow."""
        return not self._next

    @property
    def is_caught_up(self) -> bool:
        """Whether there is nothing to be read."""
        return not self._next and self._has_read_all

    def has_read(self, position: Position) -> bool:
        """Whether all lines before a position were read."""
        if self.file != position.file:
            return self.file > position.file
        return self.tail.has_reached(position.size_bytes)

    def next_file(self) -> int:
        """Go on to the next file; returns the descriptor of the old one, which is to be closed."""
        old, (position, descriptor) = self.tail.descriptor, self._next.popleft()
        self.file = position.file
        self.tail = LogTail(descriptor, 0, self._piece_bytes, self._most_bytes)
        return old


# ==================================================================================================
# 23. Block folder
# ==================================================================================================
#
# The problem: blocks become many and old, and a process may be killed between any two steps of
# tidying them up. The idea: the names say it all. A block is named by the first and the last of the
# numbers that are in it: neighbours are compacted into one whose name covers theirs, and where both
# are found, the old ones go. Whoever has the folder open looks at it again when it has changed.
# What it costs: each sample is written again with each compaction, some four times.

MAX_BLOCK_SAMPLES = 50_000_000
MERGED_BLOCKS = 4  # so many neighbours of about the same size are compacted into one
RETENTION_S = 30 * 86_400
CLOCK_DOUBT_S = 3600.0  # a step of the clock is believed after so long
MAX_INDEXED_SERIES = 1_000_000  # of blocks whose indexes are in memory
_EVER = END_OF_TIME_MS  # no sample is so late

Source = Memtable | Block
Places = dict[Labels, list[tuple[Source, int]]]  # where series stand: sources, and their numbers


def merged_series(
    places: Places, start_ms: int, end_ms: int, budget: Budget
) -> Iterator[tuple[Labels, list[Chunk]]]:
    """Each series with its chunks of a time from all sources, without overlaps, ascending."""
    wanted: dict[Source, list[int]] = {}
    for where in places.values():
        for source, number in where:
            wanted.setdefault(source, []).append(number)
    readers = {
        source: source.chunks(numbers, start_ms, end_ms, budget)
        for source, numbers in wanted.items()
    }
    for labels, where in places.items():
        found = [next(readers[source])[1] for source, _ in where]
        if chunks := merge_chunks(found, budget):
            yield labels, chunks


class Retention:
    """What is too old to be kept: `age_s` and `size_bytes` are the most that is kept, 0 is all."""

    def __init__(
        self,
        age_s: float,
        size_bytes: int,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.age_ms, self._size_bytes = int(age_s * 1000), size_bytes
        self._clock, self._monotonic = clock, monotonic
        self._began = monotonic()
        self._bounds: deque[tuple[float, int]] = deque()  # of the last hour: when, and what

    @property
    def is_settled(self) -> bool:
        """Whether it is known how the clock stood an hour ago."""
        return self._monotonic() - self._began >= CLOCK_DOUBT_S

    def oldest_ms(self, newest_ms: int) -> int:
        """What is older is too old. That goes by the clock or by the newest sample, whichever is
        earlier; and of these bounds the least of the last hour counts: no step of a clock removes
        what was young an hour ago.
        """
        if not self.age_ms:
            return 0
        now, bounds = self._monotonic(), self._bounds
        bounds.append((now, min(int(self._clock() * 1000), newest_ms) - self.age_ms))
        while bounds[0][0] < now - CLOCK_DOUBT_S:
            bounds.popleft()
        return min(bound_ms for _, bound_ms in bounds)

    def expired(self, blocks: Sequence[Block], newest_ms: int) -> list[Block]:
        """The blocks that are too old, and the oldest if all are too long."""
        oldest_ms, room = self.oldest_ms(newest_ms), self._size_bytes
        old = [block for block in blocks if 0 <= block.last_ms < oldest_ms]
        if len(old) > 1 and not self.is_settled:
            old = []
        for block in sorted(blocks, key=lambda b: b.last_ms, reverse=True):
            room -= block.size_bytes
            if self._size_bytes and room < 0 and block not in old:
                old.append(block)
        return old


class BlockFolder:
    """The blocks of a data folder: `all` has them in the order of their numbers.

    `writes`: this process changes the folder; else it only reads. Raises OSError.
    """

    def __init__(self, folder: str, writes: bool):
        self.path, self._writes = os.path.join(folder, BLOCKS_NAME), writes
        self.all: list[Block] = []
        self.damaged: list[str] = []  # names of blocks that were set aside
        self._seen_ns = 0  # when the folder had changed at the last look
        self._uses = itertools.count(1)
        if writes:
            os.makedirs(self.path, exist_ok=True)

    # ---- what is there

    def names(self) -> list[str]:
        """Of all files in the folder."""
        return sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []

    @property
    def covers(self) -> int:
        """The last segment of the log that is in a block."""
        return max((block.covers for block in self.all), default=0)

    @property
    def last_number(self) -> int:
        """The number of the last block."""
        return max((block.last_number for block in self.all), default=0)

    @property
    def size_bytes(self) -> int:
        """How long all blocks are."""
        return sum(block.size_bytes for block in self.all)

    @property
    def is_changed(self) -> bool:
        """Whether somebody changed the folder since the last look."""
        return os.stat(self.path).st_mtime_ns != self._seen_ns

    def refresh(self, first: bool = False) -> None:
        """Look which blocks there are: others may have changed them. The first time, what a crash
        left behind is removed.
        """
        if not os.path.isdir(self.path):
            return
        self._seen_ns = os.stat(self.path).st_mtime_ns
        known = {block.path: block for block in self.all}
        self.all, self.damaged = [], []
        for name in self.names():
            path = os.path.join(self.path, name)
            if name.endswith(".tmp") and first and self._writes:
                os.unlink(path)
            elif name.endswith(".damaged"):
                self.damaged.append(name)
            elif path in known:
                self._add(known.pop(path))
            elif _BLOCK_NAME.fullmatch(name):
                try:
                    self._add(Block(path, self._set_aside))
                except FileNotFoundError:  # it was merged into another one
                    continue
                except _DAMAGE as error:
                    self._set_aside(path, error)
        for block in known.values():
            block.close()

    def _add(self, block: Block) -> None:
        """Add the next block by name. One that is in a larger one is what a crash kept from being
        removed after their compaction; of those of one first number the larger one comes last.
        """
        if self.all and block.first_number == self.all[-1].first_number:
            self._discard(self.all.pop())
        if self.all and block.last_number <= self.all[-1].last_number:
            self._discard(block)
        else:
            self.all.append(block)

    def _discard(self, block: Block) -> None:
        if self._writes:
            os.unlink(block.path)
        block.close()

    def _set_aside(self, path: str, error: Exception) -> None:
        """A damaged block is served no more, and its file gets another name."""
        logger.error("a damaged block is set aside: %s: %s", path, error)
        self.damaged.append(os.path.basename(path) + ".damaged")
        self.all = [block for block in self.all if block.path != path]
        if self._writes:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, path + ".damaged")

    # ---- indexes are read

    def index_of(self, block: Block, budget: Budget) -> SeriesIndex:
        """The index of a block. A query with a small budget does not wait until it is read."""
        block.last_use = next(self._uses)
        if not block.is_loaded and budget.left < math.inf:
            block.is_wanted = True
            raise OverBudgetError
        return block.index

    @property
    def has_wanted(self) -> bool:
        """Whether indexes are to be read."""
        return any(block.is_wanted for block in self.all)

    def load_wanted(self) -> Iterator[None]:
        """Read the indexes that were asked for, in short steps, and give those up whose last use is
        longest ago, if all are too large.
        """
        for block in [block for block in self.all if block.is_wanted]:
            yield from block.load()
            block.is_wanted = False
            room = MAX_INDEXED_SERIES - block.series_count
            for other in sorted(self.all, key=lambda b: b.last_use, reverse=True):
                if other.is_loaded and other is not block:
                    room -= other.series_count
                    if room < 0:
                        other.forget_index()

    # ---- blocks are written

    def write(
        self, sources: Sequence[Source], first: int, last: int, covers: int, oldest_ms: int
    ) -> bool:
        """Write a block of all samples of some sources that are not too old, and serve it in place
        of the blocks of these numbers; False, and all stays, where a source turns out damaged.
        """
        path = os.path.join(self.path, f"{first:08d}-{last:08d}.block")
        types: dict[str, str] = {}
        places: Places = {}
        for source in sources:
            types |= source.types
            for number, labels in enumerate(source.index.labels):
                places.setdefault(labels, []).append((source, number))
        with BlockWriter(path) as writer:
            for labels, chunks in merged_series(places, oldest_ms, _EVER, Budget()):
                writer.add(labels, chunks)
            if any(isinstance(source, Block) and source.is_damaged for source in sources):
                return False
            writer.finish(covers, types)
        others = [b for b in self.all if not first <= b.first_number <= last]
        new = Block(path, self._set_aside)
        self.all = sorted((*others, new), key=lambda b: b.first_number)
        return True

    def run_to_compact(self, most_ms: int) -> list[Block]:
        """The neighbours that are made one block next: the largest has no more samples than the
        others together, and they span no more than a time.
        """
        for start in range(len(self.all) - MERGED_BLOCKS + 1):
            run = self.all[start : start + MERGED_BLOCKS]
            samples = [block.samples for block in run]
            span_ms = max(b.last_ms for b in run) - min(b.first_ms for b in run)
            if (
                2 * max(samples) <= sum(samples)
                and sum(samples) <= MAX_BLOCK_SAMPLES
                and span_ms <= most_ms
            ):
                return run
        return []

    def compact(self, run: list[Block], oldest_ms: int) -> None:
        """Make some neighbours one block."""
        covers = max(block.covers for block in run)
        if self.write(run, run[0].first_number, run[-1].last_number, covers, oldest_ms):
            for block in run:
                os.unlink(block.path)

    def remove(self, block: Block) -> None:
        """Remove a block that is past its retention."""
        os.unlink(block.path)
        self.all.remove(block)
        logger.info("removed the block %s, past its retention", block.path)


# ==================================================================================================
# 24. Store
# ==================================================================================================
#
# The idea is that of a log-structured merge tree. Lines of the log go into a memtable. From time to
# time the log begins a new file, and the memtable a new one: the border of the files is the border
# of the memtables. The old memtable is written as a block, and then the part of the log that the
# block covers (a segment) is retired. What no block covers is read again at the start. What it
# costs: a read looks into several blocks and memtables and merges what it finds.
#
# There are no locks: whatever takes long and changes files (`maintain`) is done by a fork, which
# sees the store as it was, and the store looks at the folder again afterwards (`refresh`).
#
# Source: O'Neil et al., The Log-Structured Merge-Tree (1996).

SEGMENT_BYTES = 512 * 1024 * 1024  # the log begins a new file when it is so long
SEGMENT_AGE_S = 2 * 3600.0  # or so old


class Store:
    """All series of a data folder, on disk and in memory.

    `writes`: the store changes the folder, of which it is the only owner; else it only reads.
    `retention_s` and `retention_bytes`: older blocks, and the oldest of more bytes, are removed; 0
    keeps all. `keep_log`: what a block covers of the log is kept, compressed. `checkpoints`: files
    of others who read the log; what they have not taken of it is not removed. The log begins a new
    file after `segment_bytes` at most. Raises OSError.
    """

    def __init__(
        self,
        folder: str,
        *,
        writes: bool = False,
        retention_s: float = RETENTION_S,
        retention_bytes: int = 0,
        keep_log: bool = False,
        checkpoints: Sequence[str] = (),
        segment_bytes: int = SEGMENT_BYTES,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.folder = folder
        self.replayed = self.unreadable = 0  # lines of the log
        self.blocks = BlockFolder(folder, writes)
        self._retention = Retention(retention_s, retention_bytes, clock, monotonic)
        self._writes, self._keep_log = writes, keep_log
        self._checkpoints, self._segment_bytes = checkpoints, segment_bytes
        self._monotonic = monotonic
        self._frozen: list[tuple[int, tuple[Memtable, ...]]] = []  # by segments, in order
        self._active, self._own = Memtable(), Memtable()
        self._changed_ms = END_OF_TIME_MS  # by what is in neither of the two
        self._known_damaged = 0  # blocks
        self._since = monotonic()  # when the active one was begun
        self._next_number = 1

    # ---- the folder is read

    def open(self, log: str = "", skip_inode: int = 0) -> Iterator[str]:
        """Read blocks, the segments that no block covers, and a file of the log; yields how far it
        is. `skip_inode`: a segment that somebody else reads.

        Another process may change the folder meanwhile: then it is read once more.
        """
        while True:
            before = self._file_names()
            # before the blocks: what leaves the log is in a block
            segments = log_segments(self.folder)
            self.refresh(first=True)
            for number, path in segments:
                if number > self.blocks.covers:
                    self._next_number = max(self._next_number, number + 1)
                    yield from self._replay(path, skip_inode)
            if log:
                yield from self._replay(log, skip_inode)
            if self._writes or self._file_names() == before:
                return
            self._active = Memtable()
            self.replayed = self.unreadable = 0

    def _file_names(self) -> list[str]:
        return self.blocks.names() + [path for _, path in log_segments(self.folder)]

    def _replay(self, path: str, skip_inode: int) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino == skip_inode:
                return
            tail = LogTail(file.fileno())
            while lines := tail.read(status.st_size):
                self.add_lines(lines)
                yield (
                    f"reading {os.path.basename(path)}: {tail.position >> 20} of "
                    f"{status.st_size >> 20} MiB, {self.replayed} metrics so far"
                )

    def refresh(self, first: bool = False) -> None:
        """Look which blocks there are: others may have changed them. Frozen memtables that have
        become blocks are dropped.
        """
        self._changed_ms = 0  # samples past their retention may have gone
        self.blocks.refresh(first)
        covers = self.blocks.covers
        self._frozen = [(number, tables) for number, tables in self._frozen if number > covers]
        taken = max((Checkpoint.read(path).segment for path in self._checkpoints), default=0)
        last = max(self.blocks.last_number, covers, taken)
        self._next_number = max(self._next_number, last + 1)

    # ---- samples come

    def add_lines(self, lines: bytes) -> None:
        """Add whole lines of the log."""
        self.replayed += self._active.add_lines(lines)
        for line in self._active.unreadable:
            self.unreadable += 1
            if self.unreadable <= 10:
                logger.warning("a line of the log is not a metric: %a", line[:200])
        self._active.unreadable.clear()

    def add_own(self, lines: bytes) -> None:
        """Add lines that are not in the log, of which the last may be torn. A crash loses those
        that are in no block yet.
        """
        self._own.add_lines(lines[: lines.rfind(b"\n") + 1])

    def freeze(self, path: str = "") -> None:
        """Begin a new memtable; the old one is all of the log up to here. `path` is where the old
        file of the log is now, if it is a segment.
        """
        match = _SEGMENT_NAME.fullmatch(os.path.basename(path))
        number = int(match[1]) if match else self._next_number
        if self._own.rows or self._active.rows:
            self._frozen.append((number, (self._own, self._active)))
        self._changed_ms = self.take_changed_ms()
        self._active, self._own = Memtable(), Memtable()
        self._next_number, self._since = max(self._next_number, number + 1), self._monotonic()

    def next_segment(self) -> str:
        """Where the file of the log goes when the next one begins."""
        return os.path.join(self.folder, f"metrics.{self._next_number:08d}.jsonl")

    def is_segment_due(self, log_bytes: int) -> bool:
        """Whether the log should begin a new file."""
        age_s = self._monotonic() - self._since
        is_due = age_s >= SEGMENT_AGE_S or log_bytes >= self._segment_bytes
        return self._active.rows > 0 and is_due

    # ---- samples are asked for

    def _sources(self) -> list[Source]:
        """From the oldest to the newest."""
        frozen = [table for _, tables in self._frozen for table in tables]
        return [*self.blocks.all, *frozen, self._own, self._active]

    def _index_of(self, source: Source, budget: Budget) -> SeriesIndex:
        return self.blocks.index_of(source, budget) if isinstance(source, Block) else source.index

    def _find(
        self, matchers: Sequence[Matcher], start_ms: int, end_ms: int, budget: Budget
    ) -> Places:
        """Where the series stand that fulfil the matchers."""
        places: Places = {}
        for source in self._sources():
            if source.last_ms < start_ms or source.first_ms > end_ms:
                continue
            index = self._index_of(source, budget)
            numbers = index.select(matchers, budget)
            budget.spend(5 * len(numbers))
            for number in numbers:
                places.setdefault(index.labels[number], []).append((source, number))
        return places

    def select(
        self, matchers: Sequence[Matcher], start_ms: int, end_ms: int, budget: Budget
    ) -> Iterator[Series]:
        """The series that fulfil all matchers and have samples between two times, both ends
        included.
        """
        places = self._find(matchers, start_ms, end_ms, budget)
        known: dict[bytes, array[int]] = {}
        same: dict[tuple[int, ...], tuple[list[Any], array[int]]] = {}
        for labels, chunks in merged_series(places, start_ms, end_ms, budget):
            budget.spend(20 + sum(chunk.count for chunk in chunks))
            parts = [chunk.decoded_times(known) for chunk in chunks]
            key = tuple(map(id, parts))
            if key not in same:  # series that were pushed together share one array
                same[key] = parts, concatenated("q", parts)
            times = same[key][1]
            values = concatenated("d", [chunk.decoded_values() for chunk in chunks])
            low, high = bisect_left(times, start_ms), bisect_right(times, end_ms)
            if low < high:
                if high - low < len(times):
                    times, values = times[low:high], values[low:high]
                yield Series(dict(zip(labels[::2], labels[1::2])), times, values)

    def take_changed_ms(self) -> int:
        """The earliest time of a sample that came or went since this was asked last."""
        tables, damaged = (self._active, self._own), len(self.blocks.damaged)
        changed_ms = min(self._changed_ms, *(table.changed_ms for table in tables))
        if damaged != self._known_damaged:  # a block was set aside while it was read
            changed_ms, self._known_damaged = 0, damaged
        self._changed_ms = END_OF_TIME_MS
        for table in tables:
            table.changed_ms = END_OF_TIME_MS
        return changed_ms

    def series(
        self, selectors: Sequence[Sequence[Matcher]], start_ms: int, end_ms: int, budget: Budget
    ) -> list[dict[str, str]]:
        """The labels of all series that fulfil the matchers of any selector, and whose sources are
        of the time, in order.
        """
        found: set[Labels] = set()
        for matchers in selectors:
            found.update(self._find(matchers, start_ms, end_ms, budget))
        budget.spend(20 * len(found))
        return [dict(zip(labels[::2], labels[1::2])) for labels in sorted(found)]

    def types(self, budget: Budget) -> dict[str, str]:
        """The type of each metric: the one that was pushed last."""
        types: dict[str, str] = {}
        for source in self._sources():
            self._index_of(source, budget)
            budget.spend(len(source.types))
            types |= source.types
        return types

    @property
    def warnings(self) -> list[str]:
        """What answers have to say of samples that are missing."""
        return [
            f"a damaged block was set aside, its samples are missing: {name}"
            for name in self.blocks.damaged
        ]

    @property
    def series_in_memory(self) -> int:
        """How many series were pushed since the last segment was begun."""
        return len(self._active.index)

    # ---- the store is kept in order

    def work(self) -> Iterator[None]:
        """What is to be done beside questions, in short steps: indexes are read, rows sealed."""
        yield from self.blocks.load_wanted()
        yield from self._active.seal()

    @property
    def has_work(self) -> bool:
        """Whether `work` has anything to do."""
        return self.blocks.has_wanted or self._active.has_full_groups

    @property
    def needs_maintenance(self) -> bool:
        """Whether `maintain` has anything to do."""
        return bool(self._frozen or self._retirable() or self._run_to_compact() or self._expired())

    def maintain(self) -> None:
        """Write frozen memtables as blocks, retire the segments that they cover, compact blocks,
        remove those past their retention. Raises OSError.

        It takes long; a fork does it, and the store that goes on calls `refresh` afterwards.
        """
        for number, tables in self._frozen:
            self.blocks.write(tables, number, number, number, self._oldest_ms())
        self._frozen = []
        for path in self._retirable():
            self._retire(path)
        while run := self._run_to_compact():
            self.blocks.compact(run, self._oldest_ms())
        for block in self._expired():
            self.blocks.remove(block)

    def keep_own(self) -> None:
        """Write what is not in the log as a block. Raises OSError."""
        # Beside frozen ones, a block of this number would hide a segment.
        if self._own.rows and not self._frozen:
            number, covers = self._next_number, self.blocks.covers
            self.blocks.write([self._own], number, number, covers, self._oldest_ms())
            self._next_number += 1
            self._own = Memtable()

    def _retirable(self) -> list[str]:
        """The segments that a block covers, and that nobody else is still to read."""
        taken = (Checkpoint.read(path).segment for path in self._checkpoints)
        last = min((self.blocks.covers, *taken))
        return [path for number, path in log_segments(self.folder) if number <= last]

    def _retire(self, path: str) -> None:
        """Remove a part of the log that a block covers, or keep it compressed."""
        if self._keep_log:
            date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(os.stat(path).st_mtime))
            number = os.path.basename(path).split(".")[1]
            kept = os.path.join(self.folder, f"metrics-{date}-{number}.jsonl.gz")
            with open(path, "rb") as lines, gzip.open(kept + ".tmp", "wb", 6) as packed:
                while piece := lines.read(READ_BYTES):
                    packed.write(piece)
            with open(kept + ".tmp", "rb") as written:
                os.fsync(written.fileno())
            os.replace(kept + ".tmp", kept)
            sync_folder(self.folder)
        os.unlink(path)

    def _run_to_compact(self) -> list[Block]:
        return self.blocks.run_to_compact(self._retention.age_ms // 10 or _EVER)

    # ---- retention

    @property
    def _newest_ms(self) -> int:
        return max((source.last_ms for source in self._sources()), default=-1)

    def _oldest_ms(self) -> int:
        """What is older is not written again."""
        retention = self._retention
        return retention.oldest_ms(self._newest_ms) if retention.is_settled else 0

    def _expired(self) -> list[Block]:
        return self._retention.expired(self.blocks.all, self._newest_ms)


# ==================================================================================================
# PART III. QUERIES
# ==================================================================================================


# ==================================================================================================
# 25. Query language
# ==================================================================================================
#
# The problem: PromQL is the language that Grafana and every Prometheus client speak. The idea: text
# becomes tokens, and tokens become a small tree by recursive descent with precedence climbing,
# whose types are checked while it grows. What a function takes and returns stands here; what it
# does stands with the query functions. What it costs: a tree can't be deeper than Python's stack.
#
# The semantics are those of Prometheus 3: a range and the lookback hold start < t <= end. Not
# here: native histograms, experimental functions.
#
# The source: https://prometheus.io/docs/prometheus/latest/querying/


# (matchers, first and last time in ms, budget) -> the series that fulfil all matchers, with their
# samples between the two times, both included.
Select = Callable[[Sequence[Matcher], int, int, Budget], Iterable[Series]]

LOOKBACK_MS = 300_000  # an instant selector takes the latest sample of so long
SUBQUERY_STEP_MS = 60_000  # the step of a subquery that names none
MAX_SAMPLES = 50_000_000
MAX_DURATION_MS = 2**63 // 10**6  # 292 years, what Go's durations hold
MAX_TIME_MS = 2**63 - 2**45  # ranges and offsets fit behind it; later times are taken for this one
MAX_RECURSION = 5_000  # frames: 990 calls, or 2,400 operators in a row

SCALAR, STRING, VECTOR, RANGE = "scalar", "string", "instant vector", "range vector"


class QueryError(ValueError):
    """A query that can't be evaluated: what was expected, and where, from line and column 1."""

    kind = "bad_data"  # the errorType of Prometheus's HTTP API

    def __init__(self, reason: str, text: str, position: int):
        self.line = text.count("\n", 0, position) + 1
        self.column = position - text.rfind("\n", 0, position)
        super().__init__(f"{self.line}:{self.column}: parse error: {reason}")


class ExecutionError(Exception):
    """A query that failed while it was evaluated: what the series hold does not fit it."""

    kind = "execution"


class SampleLimitError(ExecutionError):
    """A query that would hold more samples and values than the engine allows."""

    def __init__(self) -> None:
        super().__init__(
            "query processing would load too many samples into memory in query execution"
        )


# ---- the tree: `position` is where in the text a node begins, `type` what it evaluates to ----


class Number(NamedTuple):
    """A number: `1.5`, `0x1F`, `Inf`; a duration counts in seconds."""

    value: float
    position: int
    is_duration: bool = False
    type: str = SCALAR


class Text(NamedTuple):
    """A string: `"a"`."""

    value: str
    position: int
    type: str = STRING


class Duration(NamedTuple):
    """A range, a step or an offset: `5m`, `300`, `(5m + 1m)`."""

    ms: int
    text: str  # as `format_query` writes it


class Selector(NamedTuple):
    """A selector of an instant, `up{job="a"} offset 5m @ 1000`, or of a range, `up[5m]`."""

    name: str  # of the metric, where it stands before the braces
    matchers: tuple[Matcher, ...]  # the name's is one of them
    position: int
    range: Duration | None = None  # None: of an instant
    offset: Duration | None = None
    at: int | str | None = None  # ms, or "start" or "end" of the query

    @property
    def type(self) -> str:
        return VECTOR if self.range is None else RANGE


class Subquery(NamedTuple):
    """A subquery: `rate(up[5m])[1h:1m]`."""

    expression: "Node"
    range: Duration
    step: Duration | None
    position: int
    offset: Duration | None = None
    at: int | str | None = None
    type: str = RANGE


class Paren(NamedTuple):
    """An expression in parentheses."""

    expression: "Node"
    position: int
    type: str


class Unary(NamedTuple):
    """A sign before an expression."""

    op: str
    operand: "Node"
    position: int
    type: str


class Matching(NamedTuple):
    """How the series of two sides find each other."""

    on: bool = False  # by `labels` alone, or by all labels but these and the name
    labels: tuple[str, ...] = ()
    group: str = ""  # "group_left" or "group_right": the side that may have many
    include: tuple[str, ...] = ()  # labels copied from the other side


class Binary(NamedTuple):
    """An operator between two expressions."""

    op: str
    left: "Node"
    right: "Node"
    as_bool: bool
    matching: Matching
    position: int
    type: str


class Aggregate(NamedTuple):
    """An aggregation: `topk by (host) (3, up)`."""

    op: str
    expression: "Node"
    parameter: "Node | None"
    labels: tuple[str, ...]
    without: bool
    position: int
    type: str = VECTOR


class Call(NamedTuple):
    """A function and its arguments."""

    name: str
    arguments: tuple["Node", ...]
    position: int
    type: str


Node = Number | Text | Selector | Subquery | Paren | Unary | Binary | Aggregate | Call


def _bare(node: Node) -> Node:
    while isinstance(node, Paren):
        node = node.expression
    return node


# ---- the functions: what they take and return ----


class Signature(NamedTuple):
    """The types of a function: what it takes, and what it returns."""

    arguments: tuple[str, ...] = (VECTOR,)
    required: int = 1  # how many of the arguments must be given
    returns: str = VECTOR
    variadic: bool = False  # the last argument may be repeated


_NAMES = {
    Signature(): """abs absent acos acosh asin asinh atan atanh ceil cos cosh deg exp floor ln log10
        log2 rad sgn sin sinh sort sort_desc sqrt tan tanh timestamp""",
    Signature((RANGE,)): """absent_over_time avg_over_time changes count_over_time delta deriv
        first_over_time idelta increase irate last_over_time max_over_time min_over_time
        present_over_time rate resets stddev_over_time stdvar_over_time sum_over_time""",
    # Without a vector they are of the time of the step.
    Signature((VECTOR,), 0): """day_of_month day_of_week day_of_year days_in_month hour minute
        month year""",
    Signature((VECTOR, SCALAR, SCALAR), 3): "clamp",
    Signature((VECTOR, SCALAR), 2): "clamp_max clamp_min",
    Signature((RANGE, SCALAR, SCALAR), 3): "double_exponential_smoothing holt_winters",
    Signature((SCALAR, SCALAR, VECTOR), 3): "histogram_fraction",
    Signature((SCALAR, VECTOR), 2): "histogram_quantile",
    Signature((VECTOR, STRING, STRING, STRING), 3, variadic=True): "label_join",
    Signature((VECTOR, STRING, STRING, STRING, STRING), 5): "label_replace",
    Signature((), 0, SCALAR): "pi time",
    Signature((RANGE, SCALAR), 2): "predict_linear",
    Signature((SCALAR, RANGE), 2): "quantile_over_time",
    Signature((VECTOR, SCALAR)): "round",
    Signature(returns=SCALAR): "scalar",
    Signature((SCALAR,)): "vector",
}
SIGNATURES = {name: signature for signature in _NAMES for name in _NAMES[signature].split()}


# ---- arithmetic of floats as IEEE 754 and Go have it: nothing raises ----


def _divide(a: float, b: float) -> float:
    if b:
        return a / b
    return math.copysign(math.inf, a) * math.copysign(1, b) if a and a == a else math.nan


def _modulo(a: float, b: float) -> float:
    try:
        return math.fmod(a, b)
    except ValueError:  # of infinity, or by zero
        return math.nan


def _power(a: float, b: float) -> float:
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0 and b % 2 == 1 else math.inf
    except ValueError:
        if a:
            return math.nan  # a root of a negative number
        return math.copysign(math.inf, a) if b % 2 == 1 else math.inf


ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": _divide, "%": _modulo,
    "^": _power, "atan2": math.atan2,
}  # fmt: skip
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


# ==================================================================================================
# 26. Query text
# ==================================================================================================
#
# Numbers, durations and strings as PromQL writes them, read and written; and a tree as text, on one
# line where it fits, else with a line for each part. Values have the texts that Prometheus gives
# them.

_DURATION_UNITS = {
    "y": 365 * 86_400_000, "w": 7 * 86_400_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000,
    "s": 1_000, "ms": 1,
}  # fmt: skip
_DURATION = re.compile("".join(rf"(?:([0-9]+){unit})?" for unit in _DURATION_UNITS))
GO_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|(?i:inf|infinity))|(?i:nan)"
)
PLAIN_NAME = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
MAX_LINE = 100  # format_query breaks longer lines
_NEVER_LABELS = frozenset({"inf", "nan", "without"})  # of an aggregation or a matching
_STRING_ESCAPE = re.compile(
    r"\\(?:x([0-9A-Fa-f]{2})|([0-7]{3})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL
)
_LETTER_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\",
}  # fmt: skip
_GO_ESCAPES = {'"': '\\"'} | {c: f"\\{letter}" for letter, c in _LETTER_ESCAPES.items()}


# ---- durations and numbers ----


def parse_duration_ms(text: str) -> int:
    """The milliseconds of a duration as PromQL writes it. Raises ValueError.

    >>> parse_duration_ms("1h30m"), parse_duration_ms("1w2d"), parse_duration_ms("250ms")
    (5400000, 777600000, 250)
    """
    match = _DURATION.fullmatch(text)
    if not text or match is None:
        raise ValueError(f"not a duration such as 5m or 1h30m: {text!r}")
    lengths = zip(match.groups("0"), _DURATION_UNITS.values())
    if len(text) > 100 or (ms := sum(int(n) * unit_ms for n, unit_ms in lengths)) > MAX_DURATION_MS:
        raise ValueError("duration out of range")
    return ms


def _duration_text(duration_ms: int) -> str:
    if not duration_ms:
        return "0s"
    pieces, rest = ["-"] if duration_ms < 0 else [], abs(duration_ms)
    for unit, length in _DURATION_UNITS.items():
        if rest >= length and (unit not in "wy" or rest % length == 0):
            pieces.append(f"{rest // length}{unit}")
            rest %= length
    return "".join(pieces)


def _number_of(text: str) -> float:
    """A number as Go reads it: hexadecimal by 0x, octal by a leading 0. Raises ValueError.

    >>> [_number_of(text) for text in ("1_000.5", "0x1F", "017", "08")]
    [1000.5, 31.0, 15.0, 8.0]
    """
    digits = text.replace("_", "").lower()
    if re.fullmatch("0[0-7]+", digits) and int(digits, 8) < 2**63:
        return float(int(digits, 8))
    value = int(digits, 16) if digits.startswith("0x") else float(digits)
    if math.isinf(value) or (isinstance(value, int) and value >= 2**63):
        raise ValueError(f"number out of range: {_clipped(text)}")
    return float(value)


def read_float(text: str) -> float:
    """A float as Go reads it, but for hexadecimal ones. Raises ValueError.

    >>> read_float("-1.5e3"), read_float("+Inf")
    (-1500.0, inf)
    """
    value = float(text) if GO_FLOAT.fullmatch(text) else None
    if value is None or (math.isinf(value) and text[-1].isdigit()):
        raise ValueError(f"not a number: {_clipped(text)}")
    return value


def format_value(value: float) -> str:
    """A value as Prometheus's HTTP API prints it.

    >>> [format_value(v) for v in (1.0, 0.1, 1e20, 1e21, 1e-7, math.inf, math.nan)]
    ['1', '0.1', '100000000000000000000', '1e+21', '1e-07', '+Inf', 'NaN']
    """
    text = repr(value)
    if "n" in text:
        return {"inf": "+Inf", "-inf": "-Inf"}.get(text, "NaN")
    if "e" not in text:
        return text[:-2] if text.endswith(".0") else text
    return text if not 1e-6 <= abs(value) < 1e21 else decimal_text(value)


def decimal_text(value: float) -> str:
    """The shortest decimal that reads back as the value, without an exponent."""
    if not math.isfinite(value):
        return format_value(value)
    text = f"{decimal.Decimal(repr(value)):f}"
    return text[:-2] if text.endswith(".0") else text


def exponent_text(value: float) -> str:
    """The shortest decimal with an exponent that reads back: Go's format 'e'.

    >>> exponent_text(1234567.5), exponent_text(0.5)
    ('1.2345675e+06', '5e-01')
    """
    if not math.isfinite(value):
        return format_value(value)
    digits = decimal.Decimal(repr(value)).normalize().as_tuple().digits
    return f"{value:.{len(digits) - 1}e}"


def shortest_text(value: float) -> str:
    """The shortest decimal that reads back, as Go prints a number: with an exponent from 1e+06 on
    and below 0.0001.
    """
    text = exponent_text(value)
    exponent = int(text.partition("e")[2] or 0)
    return decimal_text(value) if -4 <= exponent < 6 else text


def _number_text(node: Number) -> str:
    if node.is_duration:
        return _duration_text(round(node.value * 1000))
    return decimal_text(node.value)


# ---- strings and labels ----


def _string_value(quoted: str) -> str:
    r"""What a string in quotes or backquotes stands for. Escapes are those of Go, of which \x and
    octal ones name bytes. Raises ValueError.

    >>> _string_value(r"'\xe2\x82\xac\t'"), _string_value(r"`\t`")
    ('€\t', '\\t')
    """
    quote, inner = quoted[0], quoted[1:-1]
    if quote == "`" or "\\" not in inner:
        return inner

    def unescaped(match: re.Match[str]) -> str:
        byte, octal, short, long, letter = match.groups()
        if letter is not None:
            if letter != quote and letter not in _LETTER_ESCAPES:
                raise ValueError(f"unknown escape \\{letter}")
            return _LETTER_ESCAPES.get(letter, letter)
        code = int(byte or short or long or octal, 8 if octal else 16)
        if code > (0x10FFFF if short or long else 255) or (short and 0xD800 <= code < 0xE000):
            raise ValueError(f"escape out of range {match[0]}")
        if (byte or octal) and code > 127:
            return chr(0xDC00 + code)  # the byte, as errors="surrogateescape" has it
        return chr(code)

    value = _STRING_ESCAPE.sub(unescaped, inner).encode(errors="surrogateescape")
    return value.decode(errors="surrogateescape")


def _quoted(text: str) -> str:
    """Text in double quotes, escaped as Go does."""
    return '"' + "".join(map(_go_escaped, text)) + '"'


def _go_escaped(character: str) -> str:
    if character in _GO_ESCAPES:
        return _GO_ESCAPES[character]
    code = ord(character)
    if character.isprintable():
        return character
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:  # the latter are bytes that are not UTF-8
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _label_list(labels: Iterable[str]) -> str:
    """Labels of an aggregation or a matching, where `a:b` is one without quotes, too."""
    return ", ".join(
        label
        if PLAIN_NAME.fullmatch(label) and label.lower() not in _NEVER_LABELS
        else _quoted(label)
        for label in labels
    )


def _label_text(name: str) -> str:
    return name if PLAIN_NAME.fullmatch(name) and ":" not in name else _quoted(name)


def labels_text(labels: dict[str, str]) -> str:
    """Labels as Prometheus names a series in its errors.

    >>> labels_text({"__name__": "up", "job": "node", "host": "a"})
    '{__name__="up", host="a", job="node"}'
    """
    pairs = (f"{_label_text(label)}={_quoted(labels[label])}" for label in sorted(labels))
    return "{" + ", ".join(pairs) + "}"


# ---- trees ----


def query_text(node: Node) -> str:
    """A tree as a query on one line."""
    return _layout(node, 0)[0]


def _layout(node: Node, level: int) -> tuple[str, list[str]]:
    """(a node on one line, the lines that it is laid out in at an indentation)."""
    before, parts, between, behind = _shape(node)
    on_its_line = isinstance(node, Unary | Subquery)  # a sign or a range stays with its operand
    texts, blocks = list[str](), list[list[str]]()
    for part in parts:
        text, lines = _layout(part, level + (not on_its_line))
        texts.append(text)
        blocks.append(lines)
    text, indent = before + between.join(texts) + behind, "  " * level
    if not parts or len(text) <= MAX_LINE:
        return text, [indent + text]
    if on_its_line:
        (lines,) = blocks
        lines[0] = indent + before + lines[0].lstrip(" ")
        lines[-1] += behind
        return text, lines
    if isinstance(node, Binary):
        return text, [*blocks[0], indent + between.strip(" "), *blocks[1]]
    for lines in blocks[:-1]:
        lines[-1] += ","
    return text, [indent + before, *itertools.chain(*blocks), indent + behind]


class _Shape(NamedTuple):
    """How a node is written: some text, its parts with some text between them, some text."""

    before: str
    parts: Sequence[Node] = ()
    between: str = ""
    behind: str = ""


def _shape(node: Node) -> _Shape:
    match node:
        case Number():
            return _Shape(_number_text(node))
        case Text():
            return _Shape(_quoted(node.value))
        case Selector():
            return _Shape(_selector_text(node))
        case Subquery():
            step = node.step.text if node.step else ""
            window = f"[{node.range.text}:{step}]"
            return _Shape("", (node.expression,), behind=window + _modifiers(node))
        case Paren():
            return _Shape("(", (node.expression,), behind=")")
        case Unary():
            return _Shape(node.op, (node.operand,))
        case Binary():
            op = node.op + (" bool" if node.as_bool else "") + _matching_text(node.matching)
            return _Shape("", (node.left, node.right), f" {op} ")
        case Call():
            return _Shape(f"{node.name}(", node.arguments, ", ", ")")
        case Aggregate():
            head = node.op
            if node.without or node.labels:
                clause = "without" if node.without else "by"
                head += f" {clause} ({_label_list(node.labels)}) "
            parts = (node.parameter, node.expression) if node.parameter else (node.expression,)
            return _Shape(f"{head}(", parts, ", ", ")")


def _modifiers(node: Selector | Subquery) -> str:
    at = "" if node.at is None else f" @ {node.at}()"
    if isinstance(node.at, int):
        at = f" @ {node.at / 1000:.3f}"
    return at + (f" offset {node.offset.text}" if node.offset else "")


def _selector_text(node: Selector) -> str:
    named = (NAME, "=", node.name or None)
    pairs = sorted(
        f"{_label_text(matcher.name)}{matcher.op}{_quoted(matcher.value)}"
        for matcher in node.matchers
        if matcher != named
    )
    braces = "{" + ",".join(pairs) + "}" if pairs else ""
    window = f"[{node.range.text}]" if node.range else ""
    return node.name + braces + window + _modifiers(node)


def _matching_text(matching: Matching) -> str:
    """A matching as it stands behind an operator: ` on (host) group_left (os)`."""
    if not (matching.on or matching.labels or matching.group):
        return ""
    text = f" {'on' if matching.on else 'ignoring'} ({_label_list(matching.labels)})"
    included = f" {matching.group} ({_label_list(matching.include)})"
    return text + (included if matching.group else "")


# ==================================================================================================
# 27. Query tokens
# ==================================================================================================
#
# The words that a query is made of, and how far a parser has read them. A colon is the one that
# depends on its place: `a:b` is the name of a metric, but in `[5m:1m]` it separates two durations.

_T = TypeVar("_T")

_DIGITS = r"[0-9](?:_?[0-9])*"
_TOKEN = re.compile(
    rf"""
    (?P<space>      [ \t\r\n]+ | \#[^\n]* )
  | (?P<duration>   (?:[0-9]+(?:ms|[smhdwy]))+ )
  | (?P<number>     0[xX](?:_?[0-9a-fA-F])+
                  | (?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][+-]?{_DIGITS})? )
  | (?P<identifier> [A-Za-z_:][A-Za-z0-9_:]* )
  | (?P<string>     "(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*' | `[^`]*` )
  | (?P<operator>   [=!]~ | [=!<>]= | [-+*/%^=<>(){{}}\[\],:@] )
    """,
    re.VERBOSE,
)
_WORD_CHARACTER = re.compile(r"[A-Za-z0-9_.:]")


class Token(NamedTuple):
    """A word of a query, and where it stands."""

    kind: str  # "number", "duration", "identifier", "string", "operator" or "end"
    text: str
    position: int


def _tokens_of(text: str) -> Iterator[Token]:
    position, in_range = 0, False
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            what = "unterminated string" if text[position] in "\"'`" else "unexpected character"
            raise QueryError(f"{what}: {text[position]!r}", text, position)
        kind, token, end = match.lastgroup or "", match[0], match.end()
        if kind in ("number", "duration") and _WORD_CHARACTER.match(text, end):
            if not (in_range and text[end] == ":"):
                raise QueryError(f"bad number or duration: {text[position : end + 1]!r}", text, end)
        elif in_range and token[0] == ":":  # [5m:1m], where no name can stand
            kind, token, end = "operator", ":", position + 1
        elif token in "[]":
            in_range = token == "["
        if kind != "space":
            yield Token(kind, token, position)
        position = end
    yield Token("end", "", len(text))


class _Tokens:
    """The tokens of a query, of which `next` is the first that no rule has taken. `word` is its
    text if it is an operator or a keyword, which are written in either case, else "".
    """

    def __init__(self, text: str):
        self.text = text
        self._rest = iter(list(_tokens_of(text)))
        self.next = Token("begin", "", 0)
        self.take()

    def take(self) -> Token:
        """The next token, which is taken."""
        token, self.next = self.next, next(self._rest, self.next)
        is_word = self.next.kind in ("identifier", "operator")
        self.word = self.next.text.lower() if is_word else ""
        return token

    def accept(self, *words: str) -> str:
        """Take the next token if it is one of these words, which is given back; else ""."""
        word = self.word
        if word not in words:
            return ""
        self.take()
        return word

    def require(self, word: str, where: str) -> None:
        """Take a word that must stand here."""
        if not self.accept(word):
            raise self.expected(f"{word!r} {where}")

    def string(self) -> str:
        """Take a string, and read it."""
        token = self.take()
        try:
            return _string_value(token.text)
        except ValueError as error:
            raise self.error(str(error), token.position) from None

    def items(
        self, begin: str, end: str, rule: Callable[["_Tokens"], _T], trailing: bool = True
    ) -> tuple[_T, ...]:
        """What stands between two brackets, separated by commas; one may be `trailing`."""
        self.require(begin, "before a list")
        items: list[_T] = []
        while not self.accept(end):
            items.append(rule(self))
            if not self.accept(","):
                if self.word != end:
                    raise self.expected(f"',' or {end!r}")
            elif not trailing and self.word == end:
                raise self.expected("an expression")
        return tuple(items)

    def error(self, reason: str, position: int) -> QueryError:
        """The error for what is wrong at a place."""
        return QueryError(reason, self.text, position)

    def expected(self, what: str) -> QueryError:
        """The error for a next token that can't stand here."""
        found = self.next.text or "the end of the query"
        return self.error(f"expected {what}, found {_clipped(found)}", self.next.position)


# ==================================================================================================
# 28. Query parser
# ==================================================================================================
#
# Recursive descent with precedence climbing: each rule of the grammar is one function over the
# tokens. Types are checked while the tree grows, so that an error names the place of the part
# that is wrong. Durations may be expressions: `[5m + 1m]` is folded to a number as it is read.

_PRECEDENCE = {
    "or": 1, "and": 2, "unless": 2, "==": 3, "!=": 3, "<": 3, "<=": 3, ">": 3, ">=": 3,
    "+": 4, "-": 4, "*": 5, "/": 5, "%": 5, "atan2": 5, "^": 6,
}  # fmt: skip
_SET_OPERATORS = frozenset({"and", "or", "unless"})
_PARAMETER_TYPES = {"topk": SCALAR, "bottomk": SCALAR, "quantile": SCALAR, "count_values": STRING}
_AGGREGATIONS = frozenset(
    {"sum", "avg", "min", "max", "count", "group", "stddev", "stdvar", *_PARAMETER_TYPES}
)
_NEVER_METRICS = frozenset({"bool", "on", "ignoring", "group_left", "group_right", "atan2"})
_OPERAND = 7  # binds more tightly than any operator
_NON_FINITE = {"nan": math.nan, "inf": math.inf}


def parse_query(text: str) -> Node:
    """Parse a PromQL expression and check the types of its parts. Raises QueryError.

    >>> parse_query("1 + 2").op
    '+'
    >>> parse_query("rate(requests_total)")
    Traceback (most recent call last):
    metricstream.QueryError: 1:6: parse error: expected type range vector in call to function \
"rate", got instant vector
    """
    tokens = _Tokens(text)
    if tokens.next.kind == "end":
        raise tokens.error("no expression found in input", 0)
    try:
        node = _expression(tokens)
    except RecursionError:
        raise tokens.error("nested too deeply", 0) from None
    if tokens.next.kind != "end":
        raise tokens.expected("an operator or the end of the query")
    return node


def format_query(text: str) -> str:
    """A query as Prometheus's `/api/v1/format_query` lays it out. Raises QueryError.

    >>> format_query("sum   by(host)(rate(cpu[5m]))>1")
    'sum by (host) (rate(cpu[5m])) > 1'
    """
    try:
        return "\n".join(_layout(parse_query(text), 0)[1])
    except RecursionError:
        raise QueryError("nested too deeply", text, 0) from None


# ---- operators ----


def _expression(tokens: _Tokens, least: int = 1) -> Node:
    """Operands joined by operators that bind at least so tightly: precedence climbing."""
    left = _operand(tokens)
    while (precedence := _PRECEDENCE.get(tokens.word, 0)) >= least:
        position, op = tokens.next.position, tokens.take().text.lower()
        as_bool = bool(tokens.accept("bool"))
        matching = _matching(tokens)
        right = _expression(tokens, precedence + (op != "^"))
        types = {left.type, right.type}
        if fault := _fault_of_operation(op, types, as_bool, matching):
            raise tokens.error(fault, position)
        if SCALAR in types:
            matching = Matching()
        result = SCALAR if types == {SCALAR} else VECTOR
        left = Binary(op, left, right, as_bool, matching, left.position, result)
    return left


def _fault_of_operation(op: str, types: set[str], as_bool: bool, matching: Matching) -> str:
    """Why an operator does not fit its operands or what stands behind it; "" if it does."""
    if types - {SCALAR, VECTOR}:
        return "binary expression must contain only scalar and instant vector types"
    if as_bool and op not in COMPARE:
        return "bool modifier can only be used on comparison operators"
    if types == {SCALAR} and op in COMPARE and not as_bool:
        return "comparisons between scalars must use BOOL modifier"
    if SCALAR in types and op in _SET_OPERATORS:
        return f'set operator "{op}" not allowed in binary scalar expression'
    if SCALAR in types and matching.labels:
        return "vector matching only allowed between instant vectors"
    if op in _SET_OPERATORS and matching.group:
        return f'no grouping allowed for "{op}" operation'
    return ""


def _matching(tokens: _Tokens) -> Matching:
    on = tokens.accept("on", "ignoring")
    if not on:
        return Matching()
    labels = tokens.items("(", ")", _label_name)
    group = tokens.accept("group_left", "group_right")
    include = tokens.items("(", ")", _label_name) if group and tokens.word == "(" else ()
    if on == "on" and (both := set(labels) & set(include)):
        raise tokens.error(
            f'label "{min(both)}" must not occur in ON and GROUP clause at once',
            tokens.next.position,
        )
    return Matching(on == "on", labels, group, include)


def _operand(tokens: _Tokens) -> Node:
    position, sign = tokens.next.position, tokens.accept("+", "-")
    if not sign:
        return _modified(tokens, _primary(tokens))
    operand = _expression(tokens, _PRECEDENCE["^"])  # -1 ^ 2 is -(1 ^ 2), but -1 * 2 is (-1) * 2
    if operand.type not in (SCALAR, VECTOR):
        raise tokens.error(
            "unary expression only allowed on expressions of type scalar or instant vector, "
            f'got "{operand.type}"',
            operand.position,
        )
    if isinstance(operand, Number):
        value = -operand.value if sign == "-" else operand.value
        return operand._replace(value=value, position=position)
    return Unary(sign, operand, position, operand.type)


def _primary(tokens: _Tokens) -> Node:
    token, word = tokens.next, tokens.word
    if token.kind in ("number", "duration") or word in _NON_FINITE:
        return _number_at(tokens, "a number")
    if token.kind == "string":
        return Text(tokens.string(), token.position)
    if tokens.accept("("):
        inner = _expression(tokens)
        tokens.require(")", "or an operator")
        return Paren(inner, token.position, inner.type)
    if word == "{":
        return _selector(tokens, "", token.position)
    if token.kind != "identifier" or word in _NEVER_METRICS:
        raise tokens.expected("an expression")
    tokens.take()
    if word in _AGGREGATIONS and tokens.word in ("(", "by", "without"):
        return _aggregation(tokens, word, token.position)
    if tokens.word == "(":
        return _call(tokens, token.text, token.position)
    return _selector(tokens, token.text, token.position)


def _number_at(tokens: _Tokens, what: str) -> Number:
    """A number, or a duration in seconds; `what` is said to be expected if there is neither."""
    token, is_duration = tokens.next, tokens.next.kind == "duration"
    if not is_duration and token.kind != "number" and tokens.word not in _NON_FINITE:
        raise tokens.expected(what)
    word, text = tokens.word, tokens.take().text
    try:
        value = parse_duration_ms(text) / 1000 if is_duration else (
            _NON_FINITE.get(word) or _number_of(text)
        )  # fmt: skip
    except ValueError as error:
        raise tokens.error(str(error), token.position) from None
    return Number(value, token.position, is_duration)


# ---- what stands behind an operand: ranges, subqueries, offsets and times ----


def _modified(tokens: _Tokens, node: Node) -> Node:
    while True:
        position = tokens.next.position
        if tokens.accept("["):
            node = _range_of(tokens, node, position)
        elif what := tokens.accept("offset", "@"):
            if not isinstance(node, Selector | Subquery):
                raise tokens.error(
                    f"{what} modifier must be preceded by an instant vector selector or range "
                    "vector selector or a subquery",
                    position,
                )
            change = _with_offset if what == "offset" else _with_time
            node = change(tokens, node, position)
        else:
            return node


def _range_of(tokens: _Tokens, node: Node, position: int) -> Node:
    window = _duration_at(tokens, positive=True)
    if tokens.accept(":"):
        step = None if tokens.word == "]" else _duration_at(tokens, positive=True)
        tokens.require("]", "behind the step of a subquery")
        if node.type != VECTOR:
            raise tokens.error(
                f"subquery is only allowed on instant vector, got {node.type} instead",
                node.position,
            )
        return Subquery(node, window, step, node.position)
    tokens.require("]", "or ':' behind the range")
    if not isinstance(node, Selector) or node.range:
        raise tokens.error("ranges only allowed for vector selectors", position)
    if node.offset and node.offset.ms:
        raise tokens.error("no offset modifiers allowed before range", position)
    if node.at is not None:
        raise tokens.error("no @ modifiers allowed before range", position)
    return node._replace(range=window, offset=None)


def _with_offset(tokens: _Tokens, node: Selector | Subquery, position: int) -> Node:
    offset = _duration_at(tokens, least=_OPERAND)  # `x offset 5m + 1` adds to what x is
    if node.offset and node.offset.ms:
        raise tokens.error("offset may not be set multiple times", position)
    return node._replace(offset=None if offset.text == "0s" else offset)


def _with_time(tokens: _Tokens, node: Selector | Subquery, position: int) -> Node:
    at: int | str = tokens.accept("start", "end")
    if at:
        tokens.require("(", f"behind {at}")
        tokens.require(")", f"behind {at}(")
    else:
        sign = -1 if tokens.accept("-", "+") == "-" else 1
        seconds = sign * _number_at(tokens, "a time in seconds, start() or end()").value
        if not abs(seconds) < 2**63:
            raise tokens.error("timestamp out of bounds for @ modifier", position)
        at = max(-MAX_TIME_MS, min(round(seconds * 1000), MAX_TIME_MS))
    if node.at is not None:
        raise tokens.error("@ <timestamp> may not be set multiple times", position)
    return node._replace(at=at)


class _Seconds(NamedTuple):
    """A duration, or a part of an expression that is one."""

    value: float
    text: str
    kind: str  # "literal"; "wrapped" in parentheses, or "open"


def _duration_at(tokens: _Tokens, least: int = 1, positive: bool = False) -> Duration:
    """A duration, whose numbers count seconds, and which may be an expression.

    `least`: of operators, those that bind at least so tightly belong to it.
    """
    position = tokens.next.position
    seconds = _seconds(tokens, least)
    if positive and seconds.value <= 0:
        raise tokens.error("duration must be greater than 0", position)
    if not abs(seconds.value) * 1000 <= MAX_DURATION_MS:
        raise tokens.error("duration out of range", position)
    ms = math.trunc(round(seconds.value * 1e9) / 1e6)
    return Duration(ms, _duration_text(ms) if seconds.kind == "literal" else seconds.text)


def _seconds(tokens: _Tokens, least: int) -> _Seconds:
    if sign := tokens.accept("+", "-"):
        left = _seconds(tokens, max(least, _PRECEDENCE["^"]))
        if sign == "-":
            text = left.text[1:] if left.text[0] == "-" else f"-{left.text}"
            left = left._replace(value=-left.value, text=text)
    elif tokens.accept("("):
        left = _seconds(tokens, 1)
        tokens.require(")", "or an operator")
        if left.kind == "open":
            left = _Seconds(left.value, f"({left.text})", "wrapped")
    else:
        number = _number_at(tokens, "a duration such as 5m")
        left = _Seconds(number.value, _number_text(number), "literal")
    while (precedence := _PRECEDENCE.get(tokens.word, 0)) >= least and tokens.word in "+-*/%^":
        op = tokens.take()
        right = _seconds(tokens, precedence + (op.text != "^"))
        if op.text in "/%" and not right.value:
            what = "division" if op.text == "/" else "modulo"
            raise tokens.error(f"{what} by zero", op.position)
        value = ARITHMETIC[op.text](left.value, right.value)
        left = _Seconds(value, f"{left.text} {op.text} {right.text}", "open")
    return left


# ---- selectors ----


def _selector(tokens: _Tokens, name: str, position: int) -> Selector:
    matchers = tokens.items("{", "}", _matcher) if tokens.word == "{" else ()
    if not name and all(matcher.accepts("") for matcher in matchers):
        raise tokens.error("vector selector must contain at least one non-empty matcher", position)
    for matcher in matchers if name else ():
        if matcher.name == NAME:
            raise tokens.error(
                f'metric name must not be set twice: "{name}" or "{matcher.value}"', position
            )
    if name:
        matchers += (Matcher(NAME, "=", name),)
    return Selector(name, matchers, position)


def _matcher(tokens: _Tokens) -> Matcher:
    """A matcher, or the quoted name of a metric, which is one too."""
    is_quoted = tokens.next.kind == "string"
    name = _label_name(tokens, in_braces=True)
    op = tokens.accept("=", "!=", "=~", "!~")
    if not op:
        if is_quoted and tokens.word in (",", "}"):
            return Matcher(NAME, "=", name)
        raise tokens.expected("one of = != =~ !~")
    value = tokens.next
    if value.kind != "string":
        raise tokens.expected("a value in quotes")
    matcher = Matcher(name, op, tokens.string())
    if op in ("=~", "!~"):
        try:
            compile_regex(matcher.value)
        except ValueError as error:
            raise tokens.error(str(error), value.position) from None
    return matcher


def is_label_name(name: str) -> bool:
    """Whether a label may be called so: any UTF-8 that is not empty."""
    return bool(name) and not _SURROGATE.search(name)


def _label_name(tokens: _Tokens, in_braces: bool = False) -> str:
    token = tokens.next
    if token.kind == "string":
        name = tokens.string()
        if not is_label_name(name) and (name or not in_braces):
            raise tokens.error(f"invalid label name {token.text}", token.position)
        return name
    refused = ":" in token.text if in_braces else tokens.word in _NEVER_LABELS
    if token.kind != "identifier" or refused:
        raise tokens.expected("a label name")
    return tokens.take().text


# ---- aggregations and functions ----


def _aggregation(tokens: _Tokens, op: str, position: int) -> Node:
    clause = tokens.accept("by", "without")
    labels = tokens.items("(", ")", _label_name) if clause else ()
    arguments = tokens.items("(", ")", _expression, trailing=False)
    if not clause and (clause := tokens.accept("by", "without")):
        labels = tokens.items("(", ")", _label_name)
    types = [_PARAMETER_TYPES[op], VECTOR] if op in _PARAMETER_TYPES else [VECTOR]
    if not arguments:
        raise tokens.error("no arguments for aggregate expression provided", position)
    if len(arguments) != len(types):
        raise tokens.error(
            "wrong number of arguments for aggregate expression provided, "
            f"expected {len(types)}, got {len(arguments)}",
            position,
        )
    for expected, argument in zip(types, arguments):
        where = "aggregation expression" if expected == VECTOR else "aggregation parameter"
        _check_type(tokens, argument, expected, where)
    parameter = arguments[0] if len(types) == 2 else None
    return Aggregate(op, arguments[-1], parameter, labels, clause == "without", position)


def _call(tokens: _Tokens, name: str, position: int) -> Node:
    if name not in SIGNATURES:
        raise tokens.error(f'unknown function with name "{name}"', position)
    types, required, returns, variadic = SIGNATURES[name]
    arguments = tokens.items("(", ")", _expression, trailing=False)
    given = len(arguments)
    most = given if variadic else len(types)
    if not required <= given <= most:
        number = required if given < required else most
        bound = "" if most == required else "at least " if given < required else "at most "
        raise tokens.error(
            f'expected {bound}{number} argument(s) in call to "{name}", got {given}', position
        )
    for index, argument in enumerate(arguments):
        expected = types[min(index, len(types) - 1)]
        _check_type(tokens, argument, expected, f'call to function "{name}"')
    return Call(name, arguments, position, returns)


def _check_type(tokens: _Tokens, node: Node, expected: str, where: str) -> None:
    if node.type != expected:
        raise tokens.error(f"expected type {expected} in {where}, got {node.type}", node.position)


# ==================================================================================================
# 29. Query functions
# ==================================================================================================
#
# What the functions and aggregations of PromQL compute: floats in, a float out. They know nothing
# of series, steps or trees. Where Prometheus's way of computing shows in the last digits or beyond
# the range of floats, it is Prometheus's way. The sources: its promql/functions.go and quantile.go.


def _total(function: Callable[[float], float], pole: float = math.nan) -> Callable[[float], float]:
    """The function where `math` has it, infinity where it overflows, else the pole's value."""

    def total(value: float) -> float:
        try:
            return function(value)
        except OverflowError:
            return math.inf if function is not math.sinh else math.copysign(math.inf, value)
        except ValueError:
            return pole

    return total


def _logarithm(function: Callable[[float], float]) -> Callable[[float], float]:
    return lambda value: function(value) if value > 0 else math.nan if value else -math.inf


def _atanh(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) == 1 else _total(math.atanh)(value)


def _whole(function: Callable[[float], int]) -> Callable[[float], float]:
    return lambda value: math.copysign(function(value), value) if math.isfinite(value) else value


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value and value == value else value


# ---- values of many samples, all of them floats ----


def _sum(values: Sequence[float]) -> float:
    """The exactly rounded sum, after Shewchuk: at least as good as compensation after Neumaier,
    and in C.
    """
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # an overflow, or infinities of both signs
        return sum(values)


def _compensated(value: float, total: float, rest: float) -> tuple[float, float]:
    """(total, rest) with a value added, after Neumaier: the rest is what rounding lost."""
    new = total + value
    if math.isinf(new):
        return new, 0.0
    lost = (total - new) + value if abs(total) >= abs(value) else (value - new) + total
    return new, rest + lost


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):
        return _mean_beyond_floats(values)


def _mean_over_time(values: Sequence[float]) -> float:
    """The mean; where values of both signs cancel each other, with what Prometheus loses then."""
    mean = _mean(values)
    if abs(mean) < (max(values) - min(values)) * 1e-16:
        total = rest = 0.0
        for value in values:
            total, rest = _compensated(value, total, rest)
        mean = total / len(values) + rest / len(values)
    return mean


def _mean_beyond_floats(values: Sequence[float]) -> float:
    """The mean where a sum overflows: from there on incremental, as Prometheus has it."""
    total, rest, count = values[0], 0.0, 1
    while count < len(values) and math.isfinite(
        (added := _compensated(values[count], total, rest))[0]
    ):
        (total, rest), count = added, count + 1
    mean, rest = total / count, rest / count
    for value in values[count:]:
        count += 1
        share = (count - 1) / count
        mean, rest = _compensated(value / count, share * mean, share * rest)
    return mean + rest


def _least(values: Sequence[float]) -> float:
    least = min(values)  # `min` keeps its first item until one is less: NaN stays only in front
    return least if least == least else min((v for v in values if v == v), default=math.nan)


def _greatest(values: Sequence[float]) -> float:
    greatest = max(values)
    return (
        greatest if greatest == greatest else max((v for v in values if v == v), default=math.nan)
    )


def _variance(values: Sequence[float]) -> float:
    """By Welford's method: exactly 0 where all values are equal, NaN beyond the range of floats."""
    mean = squares = 0.0
    for count, value in enumerate(values, 1):
        delta = value - mean
        mean += delta / count
        squares += delta * (value - mean)
    return squares / len(values)


def _variance_over_time(values: Sequence[float]) -> float:
    """The same with compensated sums, as Prometheus has it for windows."""
    mean = mean_rest = squares = squares_rest = 0.0
    for count, value in enumerate(values, 1):
        delta = value - (mean + mean_rest)
        mean, mean_rest = _compensated(delta / count, mean, mean_rest)
        square = delta * (value - (mean + mean_rest))
        squares, squares_rest = _compensated(square, squares, squares_rest)
    return (squares + squares_rest) / len(values)


def _root(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan


def _quantile(values: Sequence[float], quantile: float) -> float:
    """Interpolated between the nearest ranks; NaN is less than any other value."""
    if quantile != quantile:
        return math.nan
    if not 0 <= quantile <= 1:
        return math.copysign(math.inf, quantile)
    ordered = sorted(values, key=lambda value: (value == value, value))
    rank = quantile * (len(ordered) - 1)
    below = math.floor(rank)
    weight = rank - below
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] * (1 - weight) + ordered[above] * weight


def _is_change(value: float, following: float) -> bool:
    return value != following and (value == value or following == following)


def _linear_regression(
    times_ms: Sequence[int], values: Sequence[float], origin_ms: int
) -> tuple[float, float]:
    """(slope per second, value at the origin) of the least-squares line."""
    if values.count(values[0]) == len(values):
        first = values[0]
        return (0.0, first) if math.isfinite(first) else (math.nan, math.nan)
    xs = [(time_ms - origin_ms) / 1000 for time_ms in times_ms]
    n, sum_x, sum_y = len(xs), _sum(xs), _sum(values)
    covariance = _sum([x * y for x, y in zip(xs, values)]) - sum_x * sum_y / n
    slope = _divide(covariance, _sum([x * x for x in xs]) - sum_x * sum_x / n)
    return slope, sum_y / n - slope * sum_x / n


def _smoothed(values: Sequence[float], level: float, trend: float) -> float:
    """The last value after double exponential smoothing (Holt-Winters)."""
    before, now, slope = 0.0, values[0], values[1] - values[0]
    for index, value in enumerate(values[1:]):
        if index:
            slope = trend * (now - before) + (1 - trend) * slope
        before, now = now, level * value + (1 - level) * (now + slope)
    return now


ROUNDING = 1e-12  # counts of two buckets that differ by less are the same


class Bucket(NamedTuple):
    """One bucket of a classic histogram: how many observations are at most `bound`."""

    bound: float
    observations: float


def _buckets(buckets: Iterable[Bucket]) -> list[Bucket]:
    """In the order of their bounds, those of one bound added up."""
    clean: list[Bucket] = []
    for bound, group in itertools.groupby(sorted(buckets), key=operator.itemgetter(0)):
        count = _sum([bucket.observations for bucket in group])
        clean.append(Bucket(bound, count))
    return clean


def _never_falling(buckets: list[Bucket]) -> list[Bucket]:
    """Counts that fall were rounded, or pushed at different times."""
    before = buckets[0].observations
    repaired = [buckets[0]]
    for bound, count in buckets[1:]:
        if not (count < before or abs(count - before) < ROUNDING * (abs(count) + abs(before))):
            before = count
        repaired.append(Bucket(bound, before))
    return repaired


def _histogram_quantile(buckets: list[Bucket], quantile: float) -> float:
    if quantile != quantile:
        return math.nan
    if not 0 <= quantile <= 1:
        return math.copysign(math.inf, quantile)
    if len(buckets) < 2 or buckets[-1].bound != math.inf or not buckets[-1].observations:
        return math.nan
    buckets = _never_falling(buckets)
    rank = quantile * buckets[-1].observations
    index = bisect_left(buckets[:-1], True, key=lambda bucket: bucket.observations >= rank)
    if index == len(buckets) - 1:
        return buckets[-2].bound
    end, count = buckets[index]
    if index == 0 and end <= 0:
        return end
    start, before = buckets[index - 1] if index else (0.0, 0.0)
    return start + (end - start) * _divide(rank - before, count - before)


def _histogram_fraction(buckets: list[Bucket], lower: float, upper: float) -> float:
    if not buckets or buckets[-1].bound != math.inf or lower != lower or upper != upper:
        return math.nan
    total = buckets[-1].observations
    if not total:
        return math.nan
    if lower >= upper:
        return 0.0
    ranks = [_rank(buckets, value) for value in (lower, upper)]
    low, high = (total if rank > total else rank for rank in ranks)
    return (high - low) / total


def _rank(buckets: list[Bucket], value: float) -> float:
    """How many observations are less than the value, if those of a bucket are spread evenly."""
    start, before = 0.0 if buckets[0].bound > 0 else -math.inf, 0.0
    for end, count in buckets:
        if value <= start:
            return before
        if value < end:
            share = 1.0 if start == -math.inf else (value - start) / (end - start)
            return before + (count - before) * share
        start, before = end, count
    return before


def _holt_winters(values: Sequence[float], level: float, trend: float) -> float | None:
    for what, factor in (("smoothing", level), ("trend", trend)):
        if factor <= 0 or factor >= 1:
            short = what[0] + "f"
            raise ExecutionError(
                f"invalid {what} factor. Expected: 0 < {short} < 1, got: {factor:f}"
            )
    return _smoothed(values, level, trend) if len(values) > 1 else None


def _rounded(value: float, to: float) -> float:
    inverse = _divide(1.0, to)
    scaled = value * inverse + 0.5
    return _divide(math.floor(scaled) if math.isfinite(scaled) else scaled, inverse)


def _at_least(value: float, bound: float) -> float:
    """The greater one; NaN where one is NaN, unless the other is infinite: Go's math.Max."""
    if math.inf in (value, bound):
        return math.inf
    return math.nan if value != value or bound != bound else max(value, bound)


def _at_most(value: float, bound: float) -> float:
    return -_at_least(-value, -bound)


def _clamped(value: float, least: float, most: float) -> float | None:
    return None if most < least else _at_least(_at_most(value, most), least)


# ==================================================================================================
# 30. Columns
# ==================================================================================================
#
# The problem: to evaluate a tree for hundreds of steps of a graph at once, without numpy. The idea:
# a column is the values of one series, one for each step, and a loop over a column is a loop in C
# (`map`, `zip`, `itemgetter`). Gaps are None, which no loop in C adds or compares: they are looked
# for once a column. Windows (`[5m]`) slide along a series with two indices; series that were pushed
# together have the same times, and share all that follows from them. What it costs: a query holds
# the columns of all its nodes in memory, 32 bytes a value, where a loop over the steps would hold
# one step; the sample limit bounds it.


class Column(NamedTuple):
    """The values of one series of an instant vector."""

    labels: dict[str, str]
    values: list[float | None]  # one for each step; None: absent


class _Limits:
    """How many samples and values one query may hold, and how much it may work."""

    def __init__(self, max_samples: int, budget: Budget):
        self._room = max_samples
        self.budget, self.spend = budget, budget.spend

    def hold(self, values: int) -> None:
        """Count values that the query will hold, and the work that they are."""
        self._room -= values
        if self._room < 0:
            raise SampleLimitError
        self.spend(10 + 2 * values)


# ---- columns as a whole ----


def _nameless(labels: dict[str, str]) -> dict[str, str]:
    return {label: value for label, value in labels.items() if label != NAME}


_NOT_UNIQUE = "multiple matches for labels: grouping labels must ensure unique matches"
_SAME_LABELS = "vector cannot contain metrics with the same labelset"


def _unique(columns: Iterable[Column]) -> list[Column]:
    """The columns, those of the same labels made one. Raises ExecutionError where two of them
    have a value at the same step.
    """
    unique: dict[frozenset[tuple[str, str]], Column] = {}
    for column in columns:
        key = frozenset(column.labels.items())
        if key in unique:
            column = _joined(unique[key], column, _SAME_LABELS)
        unique[key] = column
    return list(unique.values())


def _distinct(columns: Iterable[Column]) -> list[Column]:
    """The columns that have values. Raises ExecutionError where two have the same labels, even if
    they never meet.
    """
    there = [column for column in columns if not _is_empty(column.values)]
    if len({frozenset(column.labels.items()) for column in there}) < len(there):
        raise ExecutionError(_SAME_LABELS)
    return there


def _has_gaps(values: Sequence[float | None]) -> bool:
    try:
        sum(values)  # type: ignore[arg-type]  # 2 µs for 360 values; `None in values` takes 16
    except TypeError:
        return True
    return False


def _is_empty(values: list[float | None]) -> bool:
    return not values or (values[-1] is None and values.count(None) == len(values))


def _joined(one: Column, other: Column, reason: str) -> Column:
    pairs = list(zip(one.values, other.values))
    if any(a is not None and b is not None for a, b in pairs):
        raise ExecutionError(reason)
    return Column(one.labels, [b if a is None else a for a, b in pairs])


def _mapped(function: Callable[[float], float], values: list[float | None]) -> list[float | None]:
    if _has_gaps(values):
        return [None if value is None else function(value) for value in values]
    return list(map(function, values))  # type: ignore[arg-type]


def _paired(
    function: Callable[[float, float], float | None],
    left: Sequence[float | None],
    right: Sequence[float | None],
) -> list[float | None]:
    if _has_gaps(left) or _has_gaps(right):
        return [None if a is None or b is None else function(a, b) for a, b in zip(left, right)]
    if function is _divide:  # in C, unless a divisor is 0
        with contextlib.suppress(ZeroDivisionError):
            return list(map(operator.truediv, left, right))
    return list(map(function, left, right))  # type: ignore[arg-type]


def _series_of(column: Column, steps: range) -> Series:
    """A column as a series of the steps at which it has a value."""
    labels, values = column
    if not _has_gaps(values):
        return Series(labels, array("q", steps), array("d", values))  # type: ignore[arg-type]
    there = [(step, value) for step, value in zip(steps, values) if value is not None]
    return Series(
        labels, array("q", [step for step, _ in there]), array("d", [value for _, value in there])
    )


# ---- staleness markers ----

_HIGH_BYTE = 7 if sys.byteorder == "little" else 0  # of a float: sign and exponent


def _markers(values: "array[float]") -> list[bool]:
    """Which values are staleness markers; [] where none is."""
    raw = values.tobytes()
    # 3 µs for 1,440 values, where the search for all eight bytes takes 16
    if STALE_BITS >> 56 not in raw[_HIGH_BYTE::8] or struct.pack("=d", STALE) not in raw:
        return []
    return [bits == STALE_BITS for bits in array("Q", raw)]


def _without_markers(series: Series) -> Series:
    """The samples of a series that are values."""
    markers = _markers(series.values)
    if not markers:
        return series
    there = [not marker for marker in markers]
    times = array("q", itertools.compress(series.times_ms, there))
    return Series(series.labels, times, array("d", itertools.compress(series.values, there)))


# ---- windows ----


def _picker(indices: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that takes the values at some indices."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda values: [values[index] for index in indices]


class _Windows:
    """Which samples of a series each window holds; series with the same times share it."""

    def __init__(self, times_ms: Sequence[int], ends_ms: Sequence[int], range_ms: int):
        self.times_ms, self.ends_ms, self.range_ms = times_ms, ends_ms, range_ms
        self.bounds: list[tuple[int, int]] = []  # indices [first, last) of samples
        low = high = 0
        for end_ms in ends_ms:
            high = bisect_right(times_ms, end_ms, high)
            low = bisect_right(times_ms, end_ms - range_ms, low, high)
            self.bounds.append((low, high))

    @functools.cached_property
    def latest(self) -> Callable[[list[Any]], Sequence[Any]]:
        """A function that takes the last of each window, and of an empty one the very last."""
        return _picker([high - 1 if high > low else -1 for low, high in self.bounds])


class _Ranges(NamedTuple):
    """The value of a range vector: series, and where its windows end."""

    series: list[Series]
    ends_ms: Sequence[int]  # one for each step, or a single one for all (@)
    range_ms: int

    def slide(self) -> Iterator[tuple[Series, _Windows]]:
        """Each series with its windows."""
        windows: _Windows | None = None
        for series in self.series:
            # 1 µs instead of 200 to slide over 1,440 samples
            if windows is None or windows.times_ms != series.times_ms:
                windows = _Windows(series.times_ms, self.ends_ms, self.range_ms)
            yield series, windows


# ==================================================================================================
# 31. Range functions
# ==================================================================================================
#
# What functions make of the windows of a range vector. All but the values is shared by series with
# the same times, so such a function has two steps: from the windows follows a plan, a function
# which makes the results of one series from its values. What a window of many samples has in common
# with the one before it is not computed again where sums of integers, which are exact, allow it.

# The values of a series -> a result for each window.
_OfValues = Callable[[list[float]], list[float | None]]
_Plan = Callable[[_Windows], _OfValues]


# What does the same where no value is negative, NaN or infinite.
_SIMPLER: dict[Callable[..., float | None], Callable[..., float]] = {
    _greatest: max, _least: min, _mean_over_time: _mean,
}  # fmt: skip


def _window_by_window(
    function: Callable[..., float | None], rows: Iterable[tuple[float, ...]], limits: _Limits
) -> _Plan:
    """A function of the values of each window that holds any, and of its row of scalars."""

    def plan(windows: _Windows) -> _OfValues:
        pairs = list(zip(windows.bounds, rows))
        work = sum(1 + (high - low) / 2 for low, high in windows.bounds)

        def of_values(values: list[float]) -> list[float | None]:
            limits.spend(work)
            of_window = function
            if function in _SIMPLER and min(values) >= 0 and sum(values) < math.inf:
                of_window = _SIMPLER[function]
            return [
                of_window(values[low:high], *row) if high > low else None
                for (low, high), row in pairs
            ]

        return of_values

    return plan


def _counted(counts: Callable[[float, float], bool]) -> _Plan:
    """How often in each window a value and the next one are a pair that counts."""

    def plan(windows: _Windows) -> _OfValues:
        def of_values(values: list[float]) -> list[float | None]:
            pairs = itertools.starmap(counts, itertools.pairwise(values))
            before = list(itertools.accumulate(pairs, initial=0))
            return [
                float(before[high - 1] - before[low]) if high > low else None
                for low, high in windows.bounds
            ]

        return of_values

    return plan


# ---- rate, increase, delta ----


class _Extrapolation:
    """The difference of the last sample and the first of each window, extended to its borders.

    A series costs a few loops in C: with the sum after it 150 µs instead of 250 for 1,440 samples
    and 360 windows.
    """

    def __init__(self, windows: _Windows, seconds: float):
        self.seconds = seconds
        self.firsts: list[int] = []  # of the windows of two samples or more
        self.lasts: list[int] = []
        self.spans_s: list[tuple[float, float, float]] = []
        self.places: list[int] = []
        times_ms, range_ms = windows.times_ms, windows.range_ms
        for (low, high), end_ms in zip(windows.bounds, windows.ends_ms):
            if high - low < 2:
                self.places.append(-1)  # the None that stands behind the results
                continue
            self.places.append(len(self.firsts))
            self.firsts.append(low)
            self.lasts.append(high - 1)
            first_ms, last_ms = end_ms - times_ms[low], end_ms - times_ms[high - 1]
            self.spans_s.append(_span_s(first_ms, last_ms, high - low, range_ms))
        self.first_values, self.last_values = _picker(self.firsts), _picker(self.lasts)
        self.picked = _picker(self.places)
        self.factors = [self.factor(*span_s) for span_s in self.spans_s]
        # A start of less than the rise times this is so near to 0 that extrapolation would go
        # below it. One part in 1,000 more, lest rounding hide a window.
        self.near_zero = [before_s / sampled_s * 1.001 for sampled_s, before_s, _ in self.spans_s]
        self.most_near_zero = max(self.near_zero, default=0.0)

    def factor(self, sampled_s: float, before_s: float, after_s: float) -> float:
        return (sampled_s + before_s + after_s) / sampled_s / self.seconds

    def with_gaps(self, results: list[float]) -> list[float | None]:
        if len(self.firsts) == len(self.places):
            return [*results]
        return [*self.picked([*results, None])]

    def of_gauge(self, values: list[float]) -> list[float | None]:
        rises = map(operator.sub, self.last_values(values), self.first_values(values))
        return self.with_gaps(list(map(operator.mul, rises, self.factors)))

    def of_counter(self, values: list[float]) -> list[float | None]:
        """A counter that falls began again at 0, and is never extended below 0."""
        starts = self.first_values(values)
        rises = list(map(operator.sub, self.last_values(values), starts))
        if sorted(values) != values:  # 6 µs instead of 35 to see that nothing falls
            self.add_resets(values, rises)
        results = list(map(operator.mul, rises, self.factors))
        # 8 µs instead of 35: most counters are far from 0. NaN takes the long way.
        if rises and not min(starts) > max(rises) * self.most_near_zero:
            self.stop_at_zero(starts, rises, results)
        return self.with_gaps(results)

    def add_resets(self, values: list[float], rises: list[float]) -> None:
        """Add the value before each reset to the rises of the windows that it is in."""
        for at in itertools.compress(itertools.count(1), map(operator.lt, values[1:], values)):
            for index in range(bisect_left(self.lasts, at), bisect_left(self.firsts, at)):
                rises[index] += values[at - 1]

    def stop_at_zero(
        self, starts: Sequence[float], rises: list[float], results: list[float]
    ) -> None:
        """Where the start of a window is near 0, extend the window to where the counter was 0."""
        if not any(rises):  # an idle counter, often at 0
            return
        near = map(operator.le, starts, map(operator.mul, rises, self.near_zero))
        for index in itertools.compress(itertools.count(), near):
            start, rise = starts[index], rises[index]
            if rise > 0 <= start:
                sampled_s, before_s, after_s = self.spans_s[index]
                before_s = min(before_s, sampled_s * (start / rise))
                results[index] = rise * self.factor(sampled_s, before_s, after_s)


@functools.lru_cache(maxsize=1_024)  # 0.1 µs instead of 1: most windows have one shape
def _span_s(first_ms: int, last_ms: int, count: int, range_ms: int) -> tuple[float, float, float]:
    """How long a window was sampled, and how far it is extended before its samples and after.
    `first_ms`, `last_ms`: how long before its end those samples are.
    """
    sampled_s = (first_ms - last_ms) / 1000
    between_s = sampled_s / (count - 1)
    before_s, after_s = (range_ms - first_ms) / 1000, last_ms / 1000
    near_s = between_s * 1.1  # nearer to the border than a sample would be: the series goes on
    return (
        sampled_s,
        before_s if before_s < near_s else between_s / 2,
        after_s if after_s < near_s else between_s / 2,
    )


def _extrapolated(is_counter: bool, per_second: bool) -> _Plan:
    """`rate`, `increase` and `delta`."""

    def plan(windows: _Windows) -> _OfValues:
        shared = _Extrapolation(windows, windows.range_ms / 1000 if per_second else 1.0)
        return shared.of_counter if is_counter else shared.of_gauge

    return plan


def _between_last_two(per_second: bool) -> _Plan:
    """`irate` and `idelta`."""

    def plan(windows: _Windows) -> _OfValues:
        times_ms = windows.times_ms

        def of_window(values: list[float], low: int, high: int) -> float | None:
            if high - low < 2:
                return None
            before, now = values[high - 2], values[high - 1]
            if not per_second:
                return now - before
            rise = now if now < before else now - before
            return rise / ((times_ms[high - 1] - times_ms[high - 2]) / 1000)

        return lambda values: [of_window(values, low, high) for low, high in windows.bounds]

    return plan


# ---- deriv, predict_linear ----


def _integers(values: list[float]) -> tuple[list[int], float] | None:
    """(integers, unit) whose products are the values, exactly; None for NaN, infinities, and sizes
    that need long integers.
    """
    try:
        least, most = min(map(abs, filter(None, values)), default=1.0), max(map(abs, values))
        if not 2.0**-60 < least <= most < 2.0**60:
            least = 1.0 if most == 0 else math.nan
        shift = 53 - math.frexp(least)[1]
        return list(map(int, map(operator.mul, values, itertools.repeat(2.0**shift)))), 2.0**-shift
    except (ValueError, OverflowError):  # of `int`
        return None


class _Regression:
    """The least-squares line of each window: (slope per second, value at its origin).

    The sums of a window are differences of running sums, of integers, so nothing is lost: 1 ms for
    360 windows of 240 samples each, instead of 17.
    """

    def __init__(self, windows: _Windows, origins_ms: Sequence[int] | None):
        """`origins_ms`: of each window; None: at its first sample."""
        self.times_ms = times_ms = windows.times_ms
        start_ms = times_ms[0]
        self.xs = [time_ms - start_ms for time_ms in times_ms]
        sums = list(itertools.accumulate(self.xs, initial=0))
        squares = list(itertools.accumulate(map(operator.mul, self.xs, self.xs), initial=0))
        # for each window: [low, high) of its samples, the sum of x, n² times the variance of x,
        # n times how far the origin is from the mean of x, the origin
        self.windows: list[tuple[int, int, int, int, int, int] | None] = []
        for index, (low, high) in enumerate(windows.bounds):
            count, x = high - low, sums[high] - sums[low]
            if count < 2:
                self.windows.append(None)
                continue
            spread = count * (squares[high] - squares[low]) - x * x
            origin_ms = origins_ms[index] if origins_ms is not None else times_ms[low]
            far = count * (origin_ms - start_ms) - x
            self.windows.append((low, high, x, spread, far, origin_ms))

    def lines(self, values: list[float]) -> Iterator[tuple[float, float] | None]:
        """The line of each window; None where there are less than two samples."""
        exact = _integers(values)
        if exact is None:
            for window in self.windows:
                if window is None:
                    yield None
                else:
                    low, high, *_, origin_ms = window
                    yield _linear_regression(self.times_ms[low:high], values[low:high], origin_ms)
            return
        integers, unit = exact
        sums = list(itertools.accumulate(integers, initial=0))
        products = list(itertools.accumulate(map(operator.mul, self.xs, integers), initial=0))
        for window in self.windows:
            if window is None:
                yield None
                continue
            low, high, x, spread, far, _ = window
            count, y = high - low, sums[high] - sums[low]
            rise = count * (products[high] - products[low]) - x * y
            slope = rise / spread * unit * 1000
            yield slope, (y * spread + rise * far) / (count * spread) * unit


def _regression(
    limits: _Limits, origins_ms: Sequence[int] | None, ahead_s: Sequence[float] | None
) -> _Plan:
    """`predict_linear`, which looks ahead from the origin of each window; without these `deriv`."""

    def plan(windows: _Windows) -> _OfValues:
        shared = _Regression(windows, origins_ms)

        def of_values(values: list[float]) -> list[float | None]:
            limits.spend(3 * len(values))
            lines = shared.lines(values)
            if ahead_s is None:
                return [line and line[0] for line in lines]
            return [line and line[1] + line[0] * after_s for line, after_s in zip(lines, ahead_s)]

        return of_values

    return plan


# ==================================================================================================
# 32. Aggregation
# ==================================================================================================
#
# Columns become groups by their labels, and the columns of a group are aggregated row by row: what
# `zip` makes of them is the values of one step. Only rows with gaps are copied without them.

_LabelGroup = tuple[dict[str, str], list[Column]]  # the labels of the result, and its columns


def _grouped(node: Aggregate, columns: list[Column], limits: _Limits) -> list[_LabelGroup]:
    """The columns by the labels that the aggregation keeps."""
    groups: dict[object, _LabelGroup] = {}
    dropped = {NAME, *node.labels}
    for column in columns:
        labels = column.labels
        limits.spend(20 + 2 * len(column.values))
        if node.without:
            kept = {label: labels[label] for label in labels if label not in dropped}
        else:
            kept = {label: labels[label] for label in node.labels if label in labels}
        groups.setdefault(frozenset(kept.items()), (kept, []))[1].append(column)
    return list(groups.values())


def _rows(columns: list[Column], limits: _Limits) -> Iterator[Sequence[float]]:
    """The values that are there, step by step."""
    limits.spend(10 * len(columns[0].values))
    rows: Iterator[Any] = zip(*(values for _, values in columns))
    if not any(_has_gaps(values) for _, values in columns):
        return rows
    # where groups are small, `in` is cheaper than a copy: 0.1 µs a row; equal at 50 values
    return ([value for value in row if value is not None] if None in row else row for row in rows)


_AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "sum": _sum, "avg": _mean, "min": _least, "max": _greatest, "stdvar": _variance,
    "stddev": lambda values: _root(_variance(values)), "count": lambda values: float(len(values)),
    "group": lambda values: 1.0,
}  # fmt: skip


def _aggregated(
    function: Callable[..., float], groups: list[_LabelGroup],
    parameters: Sequence[Sequence[float]], limits: _Limits,
) -> list[Column]:  # fmt: skip
    """A column for each group: a function of its values at each step and of that step's scalars."""
    columns = []
    for labels, group in groups:
        rows = zip(_rows(group, limits), *parameters)
        values = [function(row, *more) if row else None for row, *more in rows]
        columns.append(Column(labels, values))
    return columns


def _extremes(
    columns: list[Column], parameter: Sequence[float], greatest: bool, limits: _Limits
) -> list[Column]:
    """The k greatest or least series of each step; NaN comes last."""
    kept: list[list[float | None]] = [[None] * len(parameter) for _ in columns]
    best = heapq.nlargest if greatest else heapq.nsmallest
    chosen: list[int] = []
    for step, row in enumerate(zip(*(column.values for column in columns))):
        limits.hold(0)
        k = int(max(0, min(parameter[step], len(columns))))
        there = [index for index, value in enumerate(row) if value is not None]
        numbers = [index for index in there if row[index] == row[index]]
        chosen = best(k, numbers, key=row.__getitem__)
        chosen += [index for index in there if row[index] != row[index]][: k - len(chosen)]
        for index in chosen:
            kept[index][step] = row[index]
    order = chosen if len(parameter) == 1 else range(len(columns))
    return [Column(columns[index].labels, kept[index]) for index in order]


def _check_counts(parameter: Iterable[float]) -> None:
    """Raise ExecutionError where a number of series is none that Go's int64 holds."""
    for count in parameter:
        if not count < 2**63:
            raise ExecutionError(f"Scalar value {format_value(count)} overflows int64")


def _value_counts(
    label: str, shown: bool, groups: list[_LabelGroup], limits: _Limits
) -> list[Column]:
    """`count_values`: how often each value is there; it becomes a label, where that is shown."""
    if not is_label_name(label):
        raise ExecutionError(f'invalid label name "{label}"')
    # Two groups may meet in one series: the value takes the place of a label of that name.
    counted: dict[frozenset[tuple[str, str]], Column] = {}
    for labels, group in groups:
        steps = len(group[0].values)
        for step, row in enumerate(_rows(group, limits)):
            for value, count in Counter(map(decimal_text, row)).items():
                labelled = {**labels, label: value} if shown else labels
                key = frozenset(labelled.items())
                if key not in counted:
                    limits.hold(steps)
                    counted[key] = Column(labelled, [None] * steps)
                counts = counted[key].values
                counts[step] = (counts[step] or 0.0) + count
    return list(counted.values())


# ==================================================================================================
# 33. Vector matching
# ==================================================================================================
#
# The operators between two vectors: series of both sides find each other by their labels, step by
# step. Columns are matched as a whole; whether a match is unique is asked of the steps.

# What two sides are matched by: the values of the labels named by `on`, or all labels left.
_Match = tuple[str, ...] | frozenset[tuple[str, str]]


def _operation(node: Binary) -> Callable[[float, float], float | None]:
    """What an operator makes of two values; None: a comparison that filters is false."""
    if node.op in ARITHMETIC:
        return ARITHMETIC[node.op]
    compare = COMPARE[node.op]
    if node.as_bool:
        return lambda a, b: float(compare(a, b))
    return lambda a, b: a if compare(a, b) else None


def _drops_name(node: Binary) -> bool:
    return node.op in ARITHMETIC or node.as_bool


def _by_match(
    columns: list[Column], matching: Matching, limits: _Limits
) -> dict[_Match, list[Column]]:
    """The columns by what they are matched by."""
    groups: dict[_Match, list[Column]] = {}
    ignored = {NAME, *matching.labels}
    limits.spend(20 * len(columns))
    for column in columns:
        labels = column.labels
        key: _Match
        if matching.on:
            key = tuple(labels.get(label, "") for label in matching.labels)
        else:
            key = frozenset(item for item in labels.items() if item[0] not in ignored)
        groups.setdefault(key, []).append(column)
    return groups


def _combined(
    node: Binary, left: list[Column], right: list[Column], limits: _Limits
) -> list[Column]:
    """`and`, `or`, `unless`: by which series are there, step by step."""
    kept, asked = (right, left) if node.op == "or" else (left, right)
    limits.spend(sum(len(column.values) for column in [*left, *right]))
    there = {
        key: [row.count(None) < len(row) for row in zip(*(c.values for c in columns))]
        for key, columns in _by_match(asked, node.matching, limits).items()
    }
    wanted = node.op == "and"
    columns = [
        Column(labels, [v if t == wanted else None for v, t in zip(values, present)])
        for key, group in _by_match(kept, node.matching, limits).items()
        for present in [there.get(key, itertools.repeat(False))]
        for labels, values in group
    ]
    return _unique(left + columns) if node.op == "or" else columns


def _matched(
    node: Binary, left: list[Column], right: list[Column], limits: _Limits
) -> list[Column]:
    """Arithmetic and comparison of two vectors, series by series."""
    matching = node.matching
    swapped = matching.group == "group_right"
    many = _by_match(right if swapped else left, matching, limits)
    ones = _by_match(left if swapped else right, matching, limits)
    _refuse_twins(ones, right if swapped else left, matching, swapped, limits)
    function = _operation(node)
    results: dict[object, Column] = {}
    for key, group in many.items():
        if not matching.group and len(group) > 1 and key in ones:
            _refuse_many(group, ones[key], limits)
        for one, other in itertools.product(group, ones.get(key, ())):
            limits.hold(len(one.values))
            labels = _result_labels(node, one.labels, other.labels)
            sides = (other.values, one.values) if swapped else (one.values, other.values)
            column = Column(labels, _paired(function, *sides))
            place = (key, frozenset(labels.items())) if matching.group else key
            if place in results:
                column = _joined(results[place], column, _NOT_UNIQUE)
            results[place] = column
    return _unique(results.values())


def _crowded(columns: list[Column], limits: _Limits) -> list[int]:
    """The indices of the steps at which more than one of the columns has a value."""
    limits.spend(2 * sum(len(column.values) for column in columns))
    rows = zip(*(column.values for column in columns))
    return [step for step, row in enumerate(rows) if row.count(None) < len(row) - 1]


def _refuse_many(many: list[Column], ones: list[Column], limits: _Limits) -> None:
    """Raise ExecutionError if, where one side has a value, the other has more than one."""
    for step in _crowded(many, limits):
        if any(column.values[step] is not None for column in ones):
            raise ExecutionError(
                "multiple matches for labels: many-to-one matching must be explicit "
                "(group_left/group_right)"
            )


def _refuse_twins(
    ones: dict[_Match, list[Column]], others: list[Column], matching: Matching, is_left: bool,
    limits: _Limits,
) -> None:  # fmt: skip
    """Raise ExecutionError if, at a step at which the other side has anything, two series of the
    side that may have one are there for the same match.
    """
    for group in ones.values():
        for step in _crowded(group, limits) if len(group) > 1 else ():
            limits.spend(len(others))
            if all(column.values[step] is None for column in others):
                continue
            one, two, *_ = (c.labels for c in group if c.values[step] is not None)
            shown = {
                label: value
                for label, value in one.items()
                if (label in matching.labels) == matching.on and label != NAME
            }
            raise ExecutionError(
                f"found duplicate series for the match group {labels_text(shown)} on the "
                f"{'left' if is_left else 'right'} hand-side of the operation: "
                f"[{labels_text(two)}, {labels_text(one)}];many-to-many matching not allowed: "
                "matching labels must be unique on one side"
            )


def _result_labels(node: Binary, many: dict[str, str], one: dict[str, str]) -> dict[str, str]:
    matching = node.matching
    labels = _nameless(many) if _drops_name(node) else dict(many)
    if not matching.group:
        labels = {
            label: value
            for label, value in labels.items()
            if (label in matching.labels) == matching.on
        }
    for label in matching.include:
        labels.pop(label, None)
        if label in one:
            labels[label] = one[label]
    return labels


# ==================================================================================================
# 34. Evaluation
# ==================================================================================================
#
# The tree is walked once: each node gives its columns, for all steps at once. A subquery is
# evaluated at steps of its own, and gives series. Functions are given to the evaluator as a table.

# How a function of PromQL makes its columns; a scalar is a single column without gaps.
_Functions = Mapping[str, Callable[..., list[Column]]]


class _Execution:
    """What all nodes of one query share."""

    def __init__(
        self, select: Select, functions: _Functions, lookback_ms: int, subquery_step_ms: int,
        limits: _Limits, start_ms: int, end_ms: int,
    ):  # fmt: skip
        self.select, self.functions = select, functions
        self.lookback_ms, self.subquery_step_ms = lookback_ms, subquery_step_ms
        self.bounds = {"start": start_ms, "end": end_ms}
        self.limits = limits
        self._selected: dict[tuple[tuple[Matcher, ...], int, int], list[Series]] = {}

    def series(self, matchers: tuple[Matcher, ...], start_ms: int, end_ms: int) -> list[Series]:
        """The selected series that have samples, staleness markers among them; what was selected
        before is not again.
        """
        key = (matchers, start_ms, end_ms)
        if key not in self._selected:
            found = []
            for series in self.select(matchers, start_ms, end_ms, self.limits.budget):
                self.limits.hold(len(series.times_ms))
                if series.times_ms:
                    found.append(series)
            self._selected[key] = found
        return self._selected[key]


class _Evaluator:
    """Evaluates nodes for all of its steps at once.

    Which method a node goes to follows from its type, which the parser has checked.
    """

    def __init__(self, execution: _Execution, steps: range):
        self.execution, self.limits = execution, execution.limits
        self.steps = steps

    # -- scalars and strings --

    def scalar(self, node: Node) -> list[float]:
        """One value for each step."""
        self.limits.hold(len(self.steps))
        if isinstance(node, Number):
            return [node.value] * len(self.steps)
        if isinstance(node, Paren):
            return self.scalar(node.expression)
        if isinstance(node, Unary):
            values = self.scalar(node.operand)
            return [-value for value in values] if node.op == "-" else values
        if isinstance(node, Binary):
            function = _operation(node)
            pairs = zip(self.scalar(node.left), self.scalar(node.right))
            return [value for a, b in pairs if (value := function(a, b)) is not None]
        assert isinstance(node, Call)
        (column,) = self.execution.functions[node.name](self, node.arguments)
        return [value for value in column.values if value is not None]

    def string(self, node: Node) -> str:
        bare = _bare(node)
        assert isinstance(bare, Text)
        return bare.value

    # -- selectors --

    def ends(self, node: Selector | Subquery) -> Sequence[int]:
        """Where a selector looks from: one time for each step, or a single one for all (@)."""
        offset, at = node.offset.ms if node.offset else 0, node.at
        if at is None:
            steps = self.steps
            return range(steps.start - offset, steps.stop - offset, steps.step)
        return [(self.execution.bounds[at] if isinstance(at, str) else at) - offset]

    def for_all_steps(self, values: list[float | None], ends: Sequence[int]) -> list[float | None]:
        return values if len(ends) == len(self.steps) else values * len(self.steps)

    def selected(self, node: Selector, of_time: bool = False) -> list[Column]:
        """The latest samples' values, or their Unix times in seconds."""
        ends, lookback_ms = self.ends(node), self.execution.lookback_ms
        columns = []
        found = self.execution.series(node.matchers, ends[0] - lookback_ms + 1, ends[-1])
        for series, windows in _Ranges(found, ends, lookback_ms).slide():
            self.limits.hold(len(self.steps))
            samples: list[float | None] = [*series.values, None]
            if of_time:
                samples = [*(time_ms / 1000 for time_ms in series.times_ms), None]
            for place in itertools.compress(itertools.count(), _markers(series.values)):
                samples[place] = None
            values = [*windows.latest(samples)]
            columns.append(Column(series.labels, self.for_all_steps(values, ends)))
        return columns

    def ranges(self, node: Node, each_step: bool = False) -> _Ranges:
        """The series of a range vector; with `each_step` it has a window for each step even where
        all are the same.
        """
        node = _bare(node)
        assert isinstance(node, Selector | Subquery)
        ends = self.ends(node)
        range_ms = node.range.ms if node.range else 0
        first_ms, last_ms = ends[0] - range_ms, ends[-1]
        if isinstance(node, Selector):
            found = self.execution.series(node.matchers, first_ms + 1, last_ms)
            series = [one for one in map(_without_markers, found) if one.times_ms]
        else:
            step_ms = (node.step.ms if node.step else 0) or self.execution.subquery_step_ms
            aligned_ms = (first_ms // step_ms + 1) * step_ms
            series = self.resampled(node.expression, range(aligned_ms, last_ms + 1, step_ms))
        if each_step and len(ends) != len(self.steps):
            ends = [ends[0]] * len(self.steps)
        return _Ranges(series, ends, range_ms)

    def of_windows(self, ranges: _Ranges, plan: _Plan, keeps_name: bool = False) -> list[Column]:
        """A column for each series of a range vector: what a function makes of its windows."""
        columns = []
        known: _Windows | None = None
        for series, windows in ranges.slide():
            self.limits.hold(len(self.steps))
            if windows is not known:
                known, of_values = windows, plan(windows)
            values = self.for_all_steps(of_values(series.values.tolist()), ranges.ends_ms)
            columns.append(
                Column(series.labels if keeps_name else _nameless(series.labels), values)
            )
        return columns if keeps_name else _distinct(columns)

    def resampled(self, node: Node, steps: range) -> list[Series]:
        """An instant vector at other steps, as series."""
        if not steps:
            return []
        self.limits.hold(len(steps))
        columns = _Evaluator(self.execution, steps).vector(node)
        return [series for column in columns if (series := _series_of(column, steps)).times_ms]

    # -- instant vectors --

    def vector(self, node: Node) -> list[Column]:
        """The columns of an instant vector."""
        if isinstance(node, Paren):
            return self.vector(node.expression)
        if isinstance(node, Selector):
            return self.selected(node)
        if isinstance(node, Aggregate):
            columns = self.aggregated(node)
        elif isinstance(node, Call):
            columns = self.execution.functions[node.name](self, node.arguments)
        elif isinstance(node, Unary):
            columns = self.vector(node.operand)
            if node.op == "-":
                columns = _distinct(
                    Column(_nameless(labels), _mapped(operator.neg, values))
                    for labels, values in columns
                )
        else:
            assert isinstance(node, Binary)
            if SCALAR in (node.left.type, node.right.type):
                columns = self.with_scalar(node)
            else:
                combine = _combined if node.op in _SET_OPERATORS else _matched
                columns = combine(
                    node, self.vector(node.left), self.vector(node.right), self.limits
                )
        self.limits.hold(len(columns) * len(self.steps))
        return columns

    def each(self, function: Callable[[float], float], columns: list[Column]) -> list[Column]:
        """Every value mapped, and the name dropped."""
        return _unique(
            Column(_nameless(labels), _mapped(function, values)) for labels, values in columns
        )

    def with_scalar(self, node: Binary) -> list[Column]:
        """A vector and a scalar: the value that a comparison lets pass is the vector's."""
        scalar_left = node.left.type == SCALAR
        scalars = self.scalar(node.left if scalar_left else node.right)
        columns = self.vector(node.right if scalar_left else node.left)
        function = _operation(node)
        if scalar_left and node.op in COMPARE and not node.as_bool:
            compare = COMPARE[node.op]
            function = lambda a, b: b if compare(a, b) else None  # noqa: E731
        changed = []
        for labels, values in columns:
            self.limits.hold(0)
            sides = (scalars, values) if scalar_left else (values, scalars)
            labels = _nameless(labels) if _drops_name(node) else labels
            changed.append(Column(labels, _paired(function, *sides)))
        return _unique(changed) if _drops_name(node) else changed

    def aggregated(self, node: Aggregate) -> list[Column]:
        groups = _grouped(node, self.vector(node.expression), self.limits)
        if node.op == "count_values":
            assert node.parameter is not None
            label = self.string(node.parameter)
            shown = not node.without or label not in {NAME, *node.labels}
            return _value_counts(label, shown, groups, self.limits)
        if node.parameter is None:
            return _aggregated(_AGGREGATES[node.op], groups, [], self.limits)
        parameter = self.scalar(node.parameter)
        if node.op == "quantile":
            return _aggregated(_quantile, groups, [parameter], self.limits)
        _check_counts(parameter if groups else [])
        return [
            column
            for _, group in groups
            for column in _extremes(group, parameter, node.op == "topk", self.limits)
        ]


_Evaluate = Callable[[_Evaluator, tuple[Node, ...]], list[Column]]


# ==================================================================================================
# 35. Functions of PromQL
# ==================================================================================================
#
# A function of PromQL takes nodes and makes columns: most evaluate their arguments and apply a
# function of values, some must look at the node itself. They stand in a table by their names.


def _per_value(function: Callable[[float], float]) -> _Evaluate:
    """A function of each value."""
    return lambda run, nodes: run.each(function, run.vector(nodes[0]))


def _per_value_and_scalars(
    function: Callable[..., float | None], defaults: tuple[float, ...] = ()
) -> _Evaluate:
    """A function of each value and of scalars, whose values may differ between steps."""

    def evaluate(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
        given = [run.scalar(node) for node in nodes[1:]]
        given += [[value] * len(run.steps) for value in defaults[len(given) :]]
        parameters = list(zip(*given))
        columns = []
        for labels, values in run.vector(nodes[0]):
            run.limits.hold(len(values))
            pairs = zip(values, parameters)
            changed = [None if value is None else function(value, *more) for value, more in pairs]
            columns.append(Column(_nameless(labels), changed))
        return _unique(columns)

    return evaluate


def _over_time(
    function: Callable[..., float | None], keeps_name: bool = False, place: int = 0
) -> _Evaluate:
    """A function of the values of each window that holds any, and of scalars; the range stands at
    `place` among the arguments.
    """

    def evaluate(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
        parameters = [run.scalar(node) for node in (*nodes[:place], *nodes[place + 1 :])]
        ranges = run.ranges(nodes[place], each_step=bool(parameters))
        rows = list(zip(*parameters)) if parameters else itertools.repeat(())
        plan = _window_by_window(function, rows, run.limits)
        return run.of_windows(ranges, plan, keeps_name)

    return evaluate


def _planned(plan: _Plan) -> _Evaluate:
    """A function of a range vector alone."""
    return lambda run, nodes: run.of_windows(run.ranges(nodes[0]), plan)


def _deriv(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    return run.of_windows(run.ranges(nodes[0]), _regression(run.limits, None, None))


def _predict_linear(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    plan = _regression(run.limits, run.steps, run.scalar(nodes[1]))
    return run.of_windows(run.ranges(nodes[0], each_step=True), plan)


# -- times --


def _of_time(part: Callable[[time.struct_time], int]) -> _Evaluate:
    """A part of the time that each value is, in Unix seconds (UTC); without a vector, of now. NaN
    for times beyond the calendar.
    """

    def of_value(value: float) -> float:
        try:
            return float(part(time.gmtime(int(value))))
        except (ValueError, OverflowError, OSError):
            return math.nan

    def evaluate(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
        if nodes:
            return run.each(of_value, run.vector(nodes[0]))
        return [Column({}, [of_value(step / 1000) for step in run.steps])]

    return evaluate


def _timestamp(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    """The time of the samples that a selector takes; of all else the time of the step."""
    inner = _bare(nodes[0])
    if isinstance(inner, Selector):
        return run.each(float, run.selected(inner, of_time=True))
    columns = [
        Column(labels, [None if v is None else step / 1000 for v, step in zip(values, run.steps)])
        for labels, values in run.vector(inner)
    ]
    return run.each(float, columns)


# -- presence, scalars, order --


def _absent(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    inner = _bare(nodes[0])
    columns = run.vector(inner)
    return [_absence(run, inner, [column.values for column in columns])]


def _absent_over_time(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    inner = _bare(nodes[0])
    ranges = run.ranges(inner)
    found = []
    for _, windows in ranges.slide():
        there = [1.0 if high > low else None for low, high in windows.bounds]
        found.append(run.for_all_steps(there, ranges.ends_ms))
    return [_absence(run, inner, found)]


def _absence(run: _Evaluator, node: Node, found: list[list[float | None]]) -> Column:
    """1 where nothing was found, with the labels that a selector asked to be equal."""
    rows: Iterable[tuple[float | None, ...]] = zip(*found) if found else ((),) * len(run.steps)
    labels: dict[str, str] = {}
    if isinstance(node, Selector):
        equal: set[str] = set()
        for matcher in node.matchers:
            labels.pop(matcher.name, None)
            if matcher.op == "=" and matcher.name not in {NAME, *equal}:
                equal.add(matcher.name)
                if matcher.value:
                    labels[matcher.name] = matcher.value
    return Column(labels, [None if any(v is not None for v in row) else 1.0 for row in rows])


def _vector(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    return [Column({}, [*run.scalar(nodes[0])])]


def _scalar(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    """The value of the only series; NaN where there is none or more than one."""
    columns = run.vector(nodes[0])
    rows = _rows(columns, run.limits) if columns else ((),) * len(run.steps)
    return [Column({}, [row[0] if len(row) == 1 else math.nan for row in rows])]


def _time(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    return [Column({}, [step / 1000 for step in run.steps])]


def _pi(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    return [Column({}, [math.pi] * len(run.steps))]


def _in_order(descending: bool) -> _Evaluate:
    """`sort` and `sort_desc`, NaN last; the series of a graph have no order."""

    def evaluate(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
        columns = run.vector(nodes[0])
        if len(run.steps) > 1:
            return columns

        def rank(column: Column) -> tuple[bool, float]:
            value = column.values[0]
            if value is None or value != value:
                return True, 0.0
            return False, -value if descending else value

        return sorted(columns, key=rank)

    return evaluate


# -- labels --


def _label_replace(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    target, template, source, pattern = map(run.string, nodes[1:])
    try:
        regex = compile_regex(pattern)
    except ValueError:
        raise ExecutionError(f"invalid regular expression in label_replace(): {pattern}") from None
    if not is_label_name(target):
        raise ExecutionError(f"invalid destination label name in label_replace(): {target}")

    def replaced(labels: dict[str, str]) -> dict[str, str]:
        value, worked = labels.get(source, ""), regex.work
        groups = regex.groups(value)
        run.limits.spend(20 + len(value) + 20 * (regex.work - worked))
        if groups is None:
            return labels
        run.limits.spend(len(template))
        return _with_label(labels, target, expand(template, groups, regex.names))

    columns = run.vector(nodes[0])
    return _unique(Column(replaced(labels), values) for labels, values in columns)


def _label_join(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
    target, separator, *sources = map(run.string, nodes[1:])
    for what, name in [("destination", target), *(("source", source) for source in sources)]:
        if not is_label_name(name):
            raise ExecutionError(f"invalid {what} label name in label_join(): {name}")

    def joined(labels: dict[str, str]) -> dict[str, str]:
        run.limits.spend(20 + len(sources) * (5 + len(separator) / 50))
        value = separator.join(labels.get(source, "") for source in sources)
        return _with_label(labels, target, value)

    columns = run.vector(nodes[0])
    return _unique(Column(joined(labels), values) for labels, values in columns)


def _with_label(labels: dict[str, str], label: str, value: str) -> dict[str, str]:
    others = {name: labels[name] for name in labels if name != label}
    return {**others, label: value} if value else others


# -- classic histograms: series of one family, each counting what is at most its label `le` --


def _of_buckets(function: Callable[..., float]) -> _Evaluate:
    def evaluate(run: _Evaluator, nodes: tuple[Node, ...]) -> list[Column]:
        parameters = list(zip(*map(run.scalar, nodes[:-1])))
        families: dict[object, tuple[dict[str, str], list[float], list[list[float | None]]]] = {}
        for labels, values in run.vector(nodes[-1]):
            try:
                bound = read_float(labels.get("le", ""))
            except ValueError:
                continue
            kept = {label: labels[label] for label in labels if label not in (NAME, "le")}
            # those of different names are different ones, of which only one may be there
            key = labels.get(NAME), frozenset(kept.items())
            family = families.setdefault(key, (kept, [], []))
            family[1].append(bound)
            family[2].append(values)
        columns = []
        for labels, bounds, counts in families.values():
            results: list[float | None] = []
            for row, more in zip(zip(*counts), parameters):
                run.limits.hold(1)
                found = [Bucket(b, c) for b, c in zip(bounds, row) if c is not None]
                results.append(function(_buckets(found), *more) if found else None)
            columns.append(Column(labels, results))
        return _unique(columns)

    return evaluate


_FUNCTIONS: dict[str, _Evaluate] = {
    "abs": _per_value(abs),
    "absent": _absent,
    "absent_over_time": _absent_over_time,
    "acos": _per_value(_total(math.acos)),
    "acosh": _per_value(_total(math.acosh)),
    "asin": _per_value(_total(math.asin)),
    "asinh": _per_value(math.asinh),
    "atan": _per_value(math.atan),
    "atanh": _per_value(_atanh),
    "avg_over_time": _over_time(_mean_over_time),
    "ceil": _per_value(_whole(math.ceil)),
    "changes": _planned(_counted(_is_change)),
    "clamp": _per_value_and_scalars(_clamped),
    "clamp_max": _per_value_and_scalars(_at_most),
    "clamp_min": _per_value_and_scalars(_at_least),
    "cos": _per_value(_total(math.cos)),
    "cosh": _per_value(_total(math.cosh)),
    "count_over_time": _over_time(lambda values: float(len(values))),
    "day_of_month": _of_time(lambda date: date.tm_mday),
    "day_of_week": _of_time(lambda date: (date.tm_wday + 1) % 7),
    "day_of_year": _of_time(lambda date: date.tm_yday),
    "days_in_month": _of_time(lambda date: calendar.monthrange(date.tm_year, date.tm_mon)[1]),
    "deg": _per_value(lambda value: value * 180 / math.pi),
    "delta": _planned(_extrapolated(is_counter=False, per_second=False)),
    "deriv": _deriv,
    "double_exponential_smoothing": _over_time(_holt_winters),
    "exp": _per_value(_total(math.exp)),
    "first_over_time": _over_time(lambda values: values[0], keeps_name=True),
    "floor": _per_value(_whole(math.floor)),
    "histogram_fraction": _of_buckets(_histogram_fraction),
    "histogram_quantile": _of_buckets(_histogram_quantile),
    "holt_winters": _over_time(_holt_winters),
    "hour": _of_time(lambda date: date.tm_hour),
    "idelta": _planned(_between_last_two(per_second=False)),
    "increase": _planned(_extrapolated(is_counter=True, per_second=False)),
    "irate": _planned(_between_last_two(per_second=True)),
    "label_join": _label_join,
    "label_replace": _label_replace,
    "last_over_time": _over_time(lambda values: values[-1], keeps_name=True),
    "ln": _per_value(_logarithm(math.log)),
    "log10": _per_value(_logarithm(math.log10)),
    "log2": _per_value(_logarithm(math.log2)),
    "max_over_time": _over_time(_greatest),
    "min_over_time": _over_time(_least),
    "minute": _of_time(lambda date: date.tm_min),
    "month": _of_time(lambda date: date.tm_mon),
    "pi": _pi,
    "predict_linear": _predict_linear,
    "present_over_time": _over_time(lambda values: 1.0),
    "quantile_over_time": _over_time(lambda values, quantile: _quantile(values, quantile), place=1),
    "rad": _per_value(lambda value: value * math.pi / 180),
    "rate": _planned(_extrapolated(is_counter=True, per_second=True)),
    "resets": _planned(_counted(operator.gt)),
    "round": _per_value_and_scalars(_rounded, (1.0,)),
    "scalar": _scalar,
    "sgn": _per_value(_sign),
    "sin": _per_value(_total(math.sin)),
    "sinh": _per_value(_total(math.sinh)),
    "sort": _in_order(descending=False),
    "sort_desc": _in_order(descending=True),
    "sqrt": _per_value(_total(math.sqrt)),
    "stddev_over_time": _over_time(lambda values: _root(_variance_over_time(values))),
    "stdvar_over_time": _over_time(_variance_over_time),
    "sum_over_time": _over_time(_sum),
    "tan": _per_value(_total(math.tan)),
    "tanh": _per_value(math.tanh),
    "time": _time,
    "timestamp": _timestamp,
    "vector": _vector,
    "year": _of_time(lambda date: date.tm_year),
}


# ==================================================================================================
# 36. Query engine
# ==================================================================================================
#
# The engine evaluates a text at one time or over a range. It needs no store, only a function that
# finds series.


class ScalarResult(NamedTuple):
    """What a scalar is at one time."""

    time_ms: int
    value: float


class StringResult(NamedTuple):
    """What a string is."""

    time_ms: int
    value: str


class VectorResult(NamedTuple):
    """The value of each series at one time."""

    time_ms: int
    samples: list[tuple[dict[str, str], float]]  # (labels, value), in the order of the query


class MatrixResult(NamedTuple):
    """Series over a time."""

    series: list[Series]  # in the order of their labels


Result = ScalarResult | StringResult | VectorResult | MatrixResult


_MAX_KNOWN_QUERY = 1_000  # characters
_parsed_query = functools.lru_cache(maxsize=256)(parse_query)


def parsed_query(text: str) -> Node:
    """What `parse_query` makes of a text. Dashboards and rules ask the same again: 0.2 ms less."""
    return _parsed_query(text) if len(text) <= _MAX_KNOWN_QUERY else parse_query(text)


class Engine:
    """Evaluates PromQL over the series that `select` finds.

    `lookback_ms`: how old the latest sample may be that an instant selector takes. `max_samples`:
    how many samples and values one query may hold. `subquery_step_ms`: of subqueries that name no
    step.

    >>> up = Series({"__name__": "up", "host": "a"}, array("q", [0, 15_000]), array("d", [0, 1]))
    >>> engine = Engine(lambda matchers, start_ms, end_ms, budget: [up])
    >>> engine.instant("up * 2", 15_000)
    VectorResult(time_ms=15000, samples=[({'host': 'a'}, 2.0)])
    >>> engine.range("up * 2", 0, 30_000, 15_000).series[0].values
    array('d', [0.0, 2.0, 2.0])
    """

    def __init__(
        self, select: Select, *, lookback_ms: int = LOOKBACK_MS, max_samples: int = MAX_SAMPLES,
        subquery_step_ms: int = SUBQUERY_STEP_MS,
    ):  # fmt: skip
        self._select = select
        self._lookback_ms = lookback_ms
        self._max_samples = max_samples
        self._subquery_step_ms = subquery_step_ms

    def instant(
        self, query: str | Node, time_ms: int, budget: Budget | None = None, lookback_ms: int = 0
    ) -> Result:
        """The value of a query, as text or parsed, at one time. `lookback_ms`: in place of the
        engine's.

        Raises QueryError, ExecutionError, SampleLimitError, OverBudgetError.
        """
        node = parsed_query(query) if isinstance(query, str) else query
        run = self._evaluator(time_ms, time_ms, 1, budget, lookback_ms)
        kind = node.type
        with _bounded_depth():
            if kind == STRING:
                return StringResult(time_ms, run.string(node))
            if kind == SCALAR:
                return ScalarResult(time_ms, run.scalar(node)[0])
            if kind == RANGE:
                ranges = run.ranges(node)
                return matrix_result(
                    Series(series.labels, series.times_ms[low:high], series.values[low:high])
                    for series, windows in ranges.slide()
                    for low, high in windows.bounds
                )
            columns = _unique(run.vector(node))
        samples = [(labels, value) for labels, (value,) in columns if value is not None]
        return VectorResult(time_ms, samples)

    def range(
        self, text: str, start_ms: int, end_ms: int, step_ms: int, budget: Budget | None = None,
        lookback_ms: int = 0,
    ) -> MatrixResult:  # fmt: skip
        """The values of a query from start to end, both included, one each step: at least one.

        Raises as `instant` does.
        """
        node = parsed_query(text)
        run = self._evaluator(start_ms, end_ms, step_ms, budget, lookback_ms)
        kind = node.type
        if kind not in (SCALAR, VECTOR):
            raise QueryError(
                f'invalid expression type "{kind}" for range query, must be scalar or instant '
                "vector",
                text,
                0,
            )
        with _bounded_depth():
            if kind == SCALAR:
                columns = [Column({}, [*run.scalar(node)])]
            else:
                columns = _unique(run.vector(node))
        return matrix_result(_series_of(column, run.steps) for column in columns)

    def _evaluator(
        self, start_ms: int, end_ms: int, step_ms: int, budget: Budget | None, lookback_ms: int
    ) -> _Evaluator:
        limits = _Limits(self._max_samples, budget or Budget())
        execution = _Execution(
            self._select, _FUNCTIONS, lookback_ms or self._lookback_ms, self._subquery_step_ms,
            limits, start_ms, end_ms,
        )  # fmt: skip
        steps = range(start_ms, end_ms + 1, step_ms)
        limits.hold(len(steps))
        return _Evaluator(execution, steps)


@contextlib.contextmanager
def _bounded_depth() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ExecutionError("query nested too deeply") from None


def matrix_result(series: Iterable[Series]) -> MatrixResult:
    """The result of the series that have samples."""
    there = [one for one in series if one.times_ms]
    return MatrixResult(sorted(there, key=lambda one: sorted(one.labels.items())))


# ==================================================================================================
# 37. Result cache
# ==================================================================================================
#
# The problem: dashboards ask the same queries again and again, each time a few steps further. The
# idea: what a query gives at a step follows from the samples up to that step, so results are kept,
# and only the steps behind them are evaluated. A sample that comes with an earlier time takes the
# results from its time on away. What it costs: memory for the results; and an error that only a
# long range has (two series that never meet lose their names) may be missed once.
#
# Queries that look at other times than those before a step (`@`, negative offsets) are not kept.
# The idea is that of VictoriaMetrics's rollup result cache, which guesses how late samples come.

CACHED_BYTES = 64 * 1024 * 1024  # of results
MAX_RESULT_BYTES = 2 * 1024 * 1024  # a result of more is not kept
_KEPT_STEPS = 11_000  # of a query

_Question = tuple[str, int, int, int]  # the query, its step, the first step modulo it, the lookback


def _depends_on_past(query: Node) -> bool:
    """Whether all that a query selects lies before its steps."""
    parts: list[Any] = [query]
    while parts:
        part = parts.pop()
        if isinstance(part, Selector | Subquery) and (
            part.at is not None or (part.offset is not None and part.offset.ms < 0)
        ):
            return False
        if isinstance(part, tuple):
            parts.extend(part)
    return True


class _Result(NamedTuple):
    """What a query gave at its steps from one time to another, both included."""

    start_ms: int
    end_ms: int  # the series may go on: what they have after it no longer holds
    series: list[Series]

    @property
    def size_bytes(self) -> int:
        """About how much memory it takes, with its question."""
        return 20_000 + sum(500 + 16 * len(series.values) for series in self.series)

    def between(self, start_ms: int, end_ms: int) -> list[Series]:
        """Its series between two times, both included."""
        found = []
        for labels, times_ms, values in self.series:
            low, high = bisect_left(times_ms, start_ms), bisect_right(times_ms, end_ms)
            found.append(Series(labels, times_ms[low:high], values[low:high]))
        return found

    def followed_by(self, series: list[Series], end_ms: int, step_ms: int) -> "_Result":
        """The result up to a later time, given the series of the steps after its own."""
        start_ms = max(self.start_ms, end_ms - _KEPT_STEPS * step_ms)
        joined: dict[frozenset[tuple[str, str]], Series] = {}
        for one in self.between(start_ms, self.end_ms) + series:
            key = frozenset(one.labels.items())
            if key in joined:
                before = joined[key]
                one = Series(one.labels, before.times_ms + one.times_ms, before.values + one.values)
            joined[key] = one
        return _Result(start_ms, end_ms, list(joined.values()))


class ResultCache:
    """Results of range queries. `changed_ms` gives the earliest time of a sample that came or went
    since it was asked last.
    """

    def __init__(self, changed_ms: Callable[[], int], max_bytes: int = CACHED_BYTES):
        self.changed_ms, self._room = changed_ms, max_bytes
        self._kept: dict[_Question, _Result] = {}  # asked longest ago first
        self._latest: _Question | None = None  # whose result came last

    def range(
        self, engine: Engine, text: str, start_ms: int, end_ms: int, step_ms: int, budget: Budget,
        lookback_ms: int = 0,
    ) -> MatrixResult:  # fmt: skip
        """What `engine.range` returns or raises for the same."""
        self.refresh()
        self._latest = None
        question = (text, step_ms, start_ms % step_ms, lookback_ms)
        known = self._kept.get(question)
        if known is None and not _depends_on_past(parsed_query(text)):
            return engine.range(text, start_ms, end_ms, step_ms, budget, lookback_ms)
        end_ms -= (end_ms - start_ms) % step_ms
        if known is None or not known.start_ms <= start_ms <= known.end_ms + step_ms:
            known = _Result(start_ms, start_ms - step_ms, [])
        behind_ms = known.end_ms + step_ms
        if behind_ms <= end_ms:
            found = engine.range(text, behind_ms, end_ms, step_ms, budget, lookback_ms)
            known = known.followed_by(found.series, end_ms, step_ms)
            self._latest = question
        self._keep(question, known)
        return matrix_result(known.between(start_ms, end_ms))

    def _keep(self, question: _Question, result: _Result) -> None:
        """Keep a result in place of an older one of the same question."""
        if question in self._kept:
            self._room += self._kept.pop(question).size_bytes
        if result.size_bytes <= MAX_RESULT_BYTES:
            self._kept[question] = result
            self._room -= result.size_bytes
        while self._room < 0:
            self._room += self._kept.pop(next(iter(self._kept))).size_bytes

    def refresh(self) -> None:
        """Forget what no longer holds."""
        changed_ms = self.changed_ms()
        for question, result in list(self._kept.items()):
            if result.end_ms >= changed_ms:
                self._kept[question] = _before(changed_ms, result, question[1])

    def exported(self) -> bytes:
        """What the last query added, for the cache of another process; b"" for nothing."""
        self.refresh()
        result = self._kept.get(self._latest) if self._latest else None
        if result is None:
            return b""
        rows = [
            (labels, times.tobytes(), values.tobytes()) for labels, times, values in result.series
        ]
        return marshal.dumps((self._latest, result.start_ms, result.end_ms, rows))

    def add(self, exported: bytes, changed_ms: int) -> None:
        """Add what another process exported, where since it began nothing changed before a time."""
        question, start_ms, end_ms, rows = marshal.loads(exported)
        series = [
            Series(labels, array("q", times_ms), array("d", values))
            for labels, times_ms, values in rows
        ]
        result = _Result(start_ms, end_ms, series)
        self._keep(question, _before(changed_ms, result, question[1]))


def _before(time_ms: int, result: _Result, step_ms: int) -> _Result:
    """A result without the steps from a time on."""
    last_ms = time_ms - 1 - (time_ms - 1 - result.start_ms) % step_ms
    return result._replace(end_ms=min(result.end_ms, last_ms))


# ==================================================================================================
# 38. Query API
# ==================================================================================================
#
# What the engine can do, as Prometheus's HTTP API offers it: Grafana and other clients speak it.

API_PREFIX = "/api/v1/"
QUERY_TIMEOUT_S = 120.0
MAX_POINTS = 11_000  # steps of a range query
MAX_PARAMETERS = 1_000
MAX_QUERY_BYTES = 64 * 1024  # they take up to 0.3 s to parse
_API_STATUS = {
    "bad_data": 400, "execution": 422, "internal": 500, "timeout": 503, "unavailable": 503,
}  # fmt: skip
_RFC_3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{1,2}):([0-9]{2}):([0-9]{2}(?:[.,][0-9]+)?)"
    r"(?:Z|([-+](?:[01][0-9]|2[0-4])):([0-5][0-9]|60))"
)
# What Prometheus's own clients write for the earliest and the latest time.
_BOUNDARY_TIMES = {
    "-292273086-05-16T16:47:06Z": -MAX_TIME_MS,
    "292277025-08-18T07:12:54.999999999Z": MAX_TIME_MS,
}
_ESCAPED_NAME = re.compile(r"U__((?:[^_]|__|_[0-9a-fA-F]{1,6}_)*)")
_LABEL_VALUES = re.compile(r"label/(.+)/values", re.DOTALL)


class APIError(Exception):
    """A request to the API that gets an error; its kind is Prometheus's errorType."""

    def __init__(self, reason: str, kind: str = "bad_data"):
        super().__init__(reason)
        self.kind = kind


def _wrong(name: str, reason: str) -> APIError:
    return APIError(f'invalid parameter "{name}": {reason}')


class _Parameters:
    """The parameters of a request, as a form has them; an empty one is as if it were missing. What
    reads one raises APIError where it is wrong.
    """

    def __init__(self, form: str):
        try:
            self._values = urllib.parse.parse_qs(form, True, max_num_fields=MAX_PARAMETERS)
        except ValueError:
            raise APIError("too many parameters") from None

    def every(self, name: str) -> list[str]:
        return self._values.get(name, [])

    def text(self, name: str) -> str:
        return self._values.get(name, [""])[0]

    def required(self, name: str) -> str:
        text = self.text(name)
        if not text:
            raise _wrong(name, "it is missing")
        if len(text.encode(errors="replace")) > MAX_QUERY_BYTES:
            raise APIError(f"the {name} has more than {MAX_QUERY_BYTES} bytes")
        return text

    def time_ms(self, name: str, missing_ms: int | None = None) -> int:
        """A time; without one that stands for a missing one, it must be there."""
        text = self.text(name)
        return missing_ms if not text and missing_ms is not None else api_time_ms(text, name)

    def seconds(self, name: str) -> float | None:
        """Seconds, or a duration such as 5m; None where it is missing."""
        text = self.text(name)
        if not text:
            return None
        try:
            if not GO_FLOAT.fullmatch(text):
                return parse_duration_ms(text) / 1000
            seconds = read_float(text)
            if abs(seconds) * 1000 <= MAX_DURATION_MS:
                return seconds
        except ValueError as error:
            logger.debug("no duration: %s", error)
        raise _wrong(name, f"cannot parse {text!a} to a valid duration")

    def limit(self) -> int | None:
        """How many results are wanted at most; None: all."""
        text = self.text("limit") or "0"
        if not re.fullmatch("[-+]?[0-9]{1,19}", text) or not 0 <= int(text) < 2**63:
            raise _wrong("limit", "not a whole number")
        return int(text) or None

    def timeout_s(self) -> float | None:
        timeout_s = self.seconds("timeout")
        if timeout_s is not None and timeout_s <= 0:
            raise APIError("query timed out in expression evaluation", "timeout")
        return timeout_s

    def lookback_ms(self) -> int:
        """The asked lookback, 0 for the usual one; the time-out is looked at, too."""
        self.timeout_s()
        return max(0, round((self.seconds("lookback_delta") or 0) * 1000))


class QueryAPI:
    """The query API over a store: https://prometheus.io/docs/prometheus/latest/querying/api/

    A query may take `timeout_s`, and work on at most `max_samples` samples and values.
    """

    def __init__(
        self, store: Store, *, timeout_s: float = QUERY_TIMEOUT_S, max_samples: int = MAX_SAMPLES,
        clock: Callable[[], float] = time.time, version: str = "",
    ):  # fmt: skip
        self._store, self._clock, self._version = store, clock, version
        self.cache = ResultCache(store.take_changed_ms)
        self._timeout_s = timeout_s
        self._engine = Engine(store.select, max_samples=max_samples)

    def answer(self, path: str, form: str, budget: Budget) -> tuple[int, bytes]:
        """(status, JSON) for a path of `has_api_route` and its parameters as a form has them.
        Raises OverBudgetError.
        """
        route = path.removeprefix(API_PREFIX)
        try:
            parameters = _Parameters(form)
            budget.spend(10 * len(form))
            if label := _LABEL_VALUES.fullmatch(route):
                data = self._label_values(_unescaped_name(label[1]), parameters, budget)
            else:
                data = _API_ROUTES[route](self, parameters, budget)
        except (APIError, QueryError, ExecutionError) as error:
            return self.error(error.kind, str(error))
        warnings = self._store.warnings
        more = f',"warnings":{write_json(warnings)}' if warnings else ""
        return 200, _utf_8(f'{{"status":"success","data":{data}{more}}}')

    @staticmethod
    def error(kind: str, reason: str) -> tuple[int, bytes]:
        """(status, JSON) of an error; `kind` is Prometheus's errorType."""
        answer = {"status": "error", "errorType": kind, "error": reason}
        return _API_STATUS[kind], _utf_8(write_json(answer))

    def timeout_s(self, form: str) -> float:
        """How long a query with these parameters may take, in seconds."""
        try:
            return min(self._timeout_s, _Parameters(form).timeout_s() or self._timeout_s)
        except APIError as error:  # the answer will say so
            logger.debug("no time-out can be read: %s", error)
        return self._timeout_s

    # ---- the routes: each gives its data as JSON

    def _query(self, form: _Parameters, budget: Budget) -> str:
        time_ms = form.time_ms("time", int(self._clock() * 1000))
        lookback_ms, limit = form.lookback_ms(), form.limit()
        result = self._engine.instant(form.required("query"), time_ms, budget, lookback_ms)
        return result_json(result, limit, budget)

    def _query_range(self, form: _Parameters, budget: Budget) -> str:
        start_ms, end_ms = form.time_ms("start"), form.time_ms("end")
        form.required("step")
        step_ms = round((form.seconds("step") or 0) * 1000)
        if end_ms < start_ms:
            raise _wrong("end", "end timestamp must not be before start time")
        if step_ms <= 0:
            raise _wrong(
                "step",
                "zero or negative query resolution step widths are not accepted. Try a positive "
                "integer",
            )
        if (end_ms - start_ms) // step_ms > MAX_POINTS:
            raise APIError(
                f"exceeded maximum resolution of {MAX_POINTS:,} points per timeseries. Try "
                "decreasing the query resolution (?step=XX)"
            )
        lookback_ms, limit, query = form.lookback_ms(), form.limit(), form.required("query")
        asked = self._engine, query, start_ms, end_ms, step_ms, budget, lookback_ms
        return result_json(self.cache.range(*asked), limit, budget)

    def _format_query(self, form: _Parameters, budget: Budget) -> str:
        query = form.required("query")
        budget.spend(len(query) ** 2 / 50)  # each level is indented more
        return write_json(format_query(query))

    def _series(self, form: _Parameters, budget: Budget) -> str:
        if not form.every("match[]"):
            raise APIError("no match[] parameter provided")
        return write_json(self._found(form, budget)[: form.limit()])

    def _labels(self, form: _Parameters, budget: Budget) -> str:
        names = {name for labels in self._found(form, budget) for name in labels}
        return write_json(sorted(names)[: form.limit()])

    def _label_values(self, label: str, form: _Parameters, budget: Budget) -> str:
        values = {labels[label] for labels in self._found(form, budget) if label in labels}
        return write_json(sorted(values)[: form.limit()])

    def _metadata(self, form: _Parameters, budget: Budget) -> str:
        types, metric = self._store.types(budget), form.text("metric")
        names = [name for name in sorted(types) if metric in ("", name)][: form.limit()]
        return write_json({name: [{"type": types[name], "help": "", "unit": ""}] for name in names})

    def _build_info(self, form: _Parameters, budget: Budget) -> str:
        facts = ("revision", "branch", "buildUser", "buildDate", "goVersion")
        return write_json({"version": self._version, **dict.fromkeys(facts, "")})

    def _found(self, form: _Parameters, budget: Budget) -> list[dict[str, str]]:
        """The labels of the series that one of the selectors finds."""
        selectors: list[Sequence[Matcher]] = []
        for text in form.every("match[]"):
            node = parse_query(text)
            if not isinstance(node, Selector) or node.range or node.offset or node.at is not None:
                raise _wrong("match[]", f"no selector: {text}")
            selectors.append(node.matchers)
        start_ms, end_ms = form.time_ms("start", 0), form.time_ms("end", END_OF_TIME_MS)
        return self._store.series(selectors or [()], start_ms, end_ms, budget)


_API_ROUTES = {
    "query": QueryAPI._query,
    "query_range": QueryAPI._query_range,
    "format_query": QueryAPI._format_query,
    "series": QueryAPI._series,
    "labels": QueryAPI._labels,
    "metadata": QueryAPI._metadata,
    "status/buildinfo": QueryAPI._build_info,
}


def has_api_route(path: str) -> bool:
    """Whether the API has a path."""
    route = path.removeprefix(API_PREFIX)
    return route != path and (route in _API_ROUTES or _LABEL_VALUES.fullmatch(route) is not None)


# ---- what parameters mean ----


def api_time_ms(text: str, name: str) -> int:
    """The time of a parameter in milliseconds. Raises APIError."""
    try:
        return _read_api_time(text)
    except ValueError:
        raise _wrong(name, f"cannot parse {text!a} to a valid timestamp") from None


def _read_api_time(text: str) -> int:
    """Unix seconds, or a time as RFC 3339 writes it, in milliseconds. Raises ValueError."""
    if text in _BOUNDARY_TIMES:
        return _BOUNDARY_TIMES[text]
    match = _RFC_3339.fullmatch(text)
    if match is None:
        seconds = read_float(text)
        if math.isnan(seconds):
            raise ValueError("no time")
        return round(max(-MAX_TIME_MS, min(seconds * 1000, MAX_TIME_MS)))
    year, month, day, hour, minute = map(int, match.groups()[:5])
    # Python's calendar begins with the year 1; it repeats itself every 400 years.
    days = datetime.date(year % 400 + 400, month, day).toordinal() + (year // 400 - 1) * 146_097
    second = float(match[6].replace(",", "."))
    datetime.time(hour, minute, int(second))  # raises ValueError
    zone_s = int(match[7] or 0) * 3600 + int(f"{(match[7] or '+')[0]}{match[8] or 0}") * 60
    whole_s = (days - 719_163) * 86_400 + hour * 3600 + minute * 60 - zone_s
    return whole_s * 1000 + round(second * 1000)


def _unescaped_name(name: str) -> str:
    """A name, which may be escaped as Prometheus's clients write UTF-8 names.

    >>> _unescaped_name("U__http_2e_code"), _unescaped_name("job")
    ('http.code', 'job')
    """
    match = _ESCAPED_NAME.fullmatch(name)
    if match is None:
        return name
    try:
        return re.sub("_([^_]*)_", lambda m: chr(int(m[1], 16)) if m[1] else "_", match[1])
    except (ValueError, OverflowError):  # no such character
        return name


# ---- results as JSON ----


_JSON_ESCAPE = re.compile(r"\\(?:u(d[89a-f][0-9a-f]{2})|.)")
_EXPONENT = re.compile('"([^"e]*e[^"]*)"')  # a number with one, as `repr` writes it


def _utf_8(json: str) -> bytes:
    """JSON as UTF-8; what is no Unicode becomes U+FFFD, as Go writes it."""
    if "\\ud" in json:  # 3 ms for 10 MB
        json = _JSON_ESCAPE.sub(lambda match: "\ufffd" if match[1] else match[0], json)
    return json.encode()


def result_json(result: Result, limit: int | None = None, budget: Budget | None = None) -> str:
    """A result as the API writes it.

    >>> result_json(ScalarResult(1500, 2.0))
    '{"resultType":"scalar","result":[1.5,"2"]}'
    """
    budget = budget or Budget()
    if isinstance(result, MatrixResult):
        return f'{{"resultType":"matrix","result":[{_matrix_json(result.series[:limit], budget)}]}}'
    time_s = _time_json(result.time_ms)
    if isinstance(result, VectorResult):
        budget.spend(40 * len(result.samples))
        kind, items = "vector", ",".join(
            f'{{"metric":{write_json(labels)},"value":[{time_s},"{format_value(value)}"]}}'
            for labels, value in result.samples[:limit]
        )  # fmt: skip
    elif isinstance(result, StringResult):
        kind, items = "string", f"{time_s},{write_json(result.value)}"
    else:
        kind, items = "scalar", f'{time_s},"{decimal_text(result.value)}"'
    return f'{{"resultType":"{kind}","result":[{items}]}}'


def _time_json(time_ms: int) -> str:
    if time_ms % 1000 == 0:
        return str(time_ms // 1000)
    return f"{time_ms / 1000:.3f}".rstrip("0").rstrip(".")


def _matrix_json(matrix: list[Series], budget: Budget) -> str:
    pieces = []
    times: array[int] | None = None
    template = ""  # of the points of all series that have the same times
    for labels, times_ms, values in matrix:
        budget.spend(20 + 4 * len(times_ms))
        if times_ms != times:
            times = times_ms
            template = "[" + ',"%r"],['.join(map(_time_json, times)) + ',"%r"]'
        points = _points_json(template, values)
        pieces.append(f'{{"metric":{write_json(labels)},"values":[{points}]}}')
    return ",".join(pieces)


def _points_json(template: str, values: "array[float]") -> str:
    """The points of a series, each value as `format_value` has it, in one call in C: 0.6 µs a
    point, or 0.2 where all are integers, instead of 1.3 and 1.
    """
    numbers = tuple(values)
    whole = all(map(float.is_integer, numbers)) and max(map(abs, numbers)) < 2**53
    if whole and struct.pack("=d", -0.0) not in values.tobytes():  # %d would lose its sign
        return template.replace("%r", "%d") % numbers
    text = (template % numbers).replace('.0"', '"')
    if "n" in text:
        text = text.replace("nan", "NaN").replace('"inf', '"+Inf').replace("-inf", "-Inf")
    if "e" in text:
        text = _EXPONENT.sub(lambda match: f'"{format_value(float(match[1]))}"', text)
    return text


# ==================================================================================================
# 39. Processes that follow the log
# ==================================================================================================
#
# The problem: whoever holds the interpreter lock stops everybody, and a query, a sealed chunk or a
# written block may hold it for long. The idea: what need not happen before a batch is acknowledged
# is done by processes of their own, which read the log as `tail -f` does, up to where it is
# acknowledged, and never beyond. The front starts each of them with a socket, and they end when it
# is closed. What it costs: the memory of an interpreter each, and the log is read once more.
#
#     front ── frames of fixed size, each with a descriptor ──► process   a question's socket, a log
#           ◄── lines of JSON: what it does, what it logs ─────
#           ◄── an answer, on the question's own socket ────── process, or its fork

STORE_STATUS_S = 1.0  # how often a process says how it is
SILENCE_S = 20.0  # one that says nothing for so long is ended, and begun anew
FOLLOWER_STOP_S = 1.0  # so long a process may take to stop
LOCK_WAIT_S = 5.0  # for a process whose front died
MAX_FORM_BYTES = 128 * 1024
MAX_UNSENT_BYTES = 1024 * 1024  # lines for a front that reads none

_FRAME = struct.Struct("<4sIqd")  # what; file of the log, bytes of it; when, by time.monotonic
_QUESTION, _POSITION, _SWITCH, _OWN, _STOP = b"ask.", b"pos.", b"file", b"own.", b"stop"
# Of a question: the bytes of its path and of its form, and whether its answer may be gzipped.
_LENGTHS = struct.Struct("<II?")
GZIP_BYTES = 4096  # less is not worth it


class Frame(NamedTuple):
    """What the front says to a process that it has started."""

    kind: bytes
    position: Position
    arrived: float  # by time.monotonic
    descriptors: list[int]


def frames(control: socket.socket) -> Iterator[Frame]:
    """The frames of the front that are there. Raises EOFError when the front is gone."""
    while True:
        try:
            octets, descriptors, _, _ = socket.recv_fds(control, _FRAME.size, 1)
        except BlockingIOError:
            return
        except ConnectionError:
            octets = b""
        if len(octets) < _FRAME.size:
            raise EOFError("the front is gone")
        kind, file, size_bytes, arrived = _FRAME.unpack(octets)
        yield Frame(kind, Position(file, size_bytes), arrived, descriptors)


class Front:
    """The front, as a process that it has started knows it."""

    def __init__(self, control: socket.socket):
        control.setblocking(False)
        self.socket = control
        self.is_gone = False
        self.unsent = b""  # lines that it has not read yet

    def frames(self) -> Iterator[Frame]:
        """Its frames that are there."""
        try:
            yield from frames(self.socket)
        except EOFError:
            self.is_gone = True

    def tell(self, **said: Any) -> None:
        """Send it a line, sooner or later."""
        if len(self.unsent) < MAX_UNSENT_BYTES:
            self.unsent += write_json(said).encode(errors="backslashreplace") + b"\n"
        self.send_unsent()

    def send_unsent(self) -> None:
        """Send what it had no room for."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self.is_gone = True

    def log(self, record: logging.LogRecord) -> bool:
        """A filter of the logger: the front logs for all processes."""
        self.tell(log=record.getMessage(), level=record.levelno)
        return False

    def leave(self) -> None:
        """What a fork does first: it has nothing to do with the front."""
        self.socket.close()
        logger.removeFilter(self.log)


class Question:
    """A request that waits for its answer."""

    __slots__ = ("socket", "position", "arrived", "path", "form", "takes_gzip", "deadline")

    def __init__(self, sock: socket.socket, position: Position, arrived: float):
        """Read a question that was written whole before its socket was sent. Raises OSError."""
        self.socket, self.position, self.arrived = sock, position, arrived
        sock.setblocking(False)
        received = b""
        path_end = whole = _LENGTHS.size
        files: list[int] = []
        while len(received) < whole:
            piece, descriptors, _, _ = socket.recv_fds(sock, MAX_FORM_BYTES, 1)
            files += descriptors
            if not piece:
                raise OSError(errno.EPIPE, "the question is not whole")
            received += piece
            path_bytes, form_bytes, self.takes_gzip = _LENGTHS.unpack_from(received)
            path_end = _LENGTHS.size + path_bytes
            whole = path_end + form_bytes
        self.path = received[_LENGTHS.size : path_end].decode()
        self.form = received[path_end:].decode()
        for descriptor in files:  # a long form
            with open(descriptor, encoding="utf-8", newline="") as file:
                self.form = file.read()
        self.deadline = arrived + QUERY_TIMEOUT_S


def _relayed(question: Question, status: int, body: bytes) -> bytes:
    """An answer as the front relays it."""
    fields = b"Content-Type: application/json; charset=utf-8\r\nVary: Accept-Encoding\r\n"
    if status == 503:
        fields += b"Retry-After: %d\r\n" % RETRY_AFTER_S
    if question.takes_gzip and len(body) > GZIP_BYTES:
        body = gzip.compress(body, 1, mtime=0)  # 40 % of the size; level 6 takes 6 times as long
        fields += b"Content-Encoding: gzip\r\n"
    return RELAY_HEAD.pack(status, len(fields), len(body)) + fields + body


_GZIP_CODING = re.compile(r"(?:^|[\s,])gzip(?![\w-]|\s*;\s*q=0(?:\.0*)?\s*(?:,|$))", re.IGNORECASE)
_LOOPBACK_HOST = re.compile(r"(?:localhost|127\.[0-9.]+|\[::1\])(?::[0-9]*)?", re.IGNORECASE)


def accepts_gzip(headers: dict[str, str]) -> bool:
    """Whether Accept-Encoding (RFC 9110, 12.5.3) names gzip.

    >>> [accepts_gzip({"accept-encoding": text}) for text in ("br, gzip", "gzip;q=0, br", "gzip2")]
    [True, False, False]
    """
    return _GZIP_CODING.search(headers.get("accept-encoding", "")) is not None


def pays_gzip(head: Head) -> bool:
    """Whether a client accepts gzip and is elsewhere, which the address that it asked for tells: on
    loopback, bytes cost less than the work.
    """
    return accepts_gzip(head.headers) and not _LOOPBACK_HOST.fullmatch(head.host)


def begin_following(arguments: list[str]) -> tuple[socket.socket, dict[str, Any]]:
    """What a process that follows the log does first: (its socket to the front, its options, which
    come as JSON on stdin, where no list of processes shows them).
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the front says when to stop
        signal.signal(number, signal.SIG_IGN)
    # Who takes batches in comes first: woken beside it, others wait for another core. Where the
    # front and the store have a load generator beside them on two cores, ingestion gains 5 to 10 %.
    os.nice(5)
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return socket.socket(fileno=int(arguments[0])), parse_json(sys.stdin.buffer.read())


@contextlib.contextmanager
def only_one(path: str, flags: int) -> Iterator[None]:
    """Be the only process that has a file or folder locked; wait a little for one whose front died.
    Raises OSError.
    """
    descriptor = os.open(path, flags, 0o644)
    deadline = time.monotonic() + LOCK_WAIT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


# ==================================================================================================
# 40. Answering in forks
# ==================================================================================================
#
# The problem: a question may take a moment or a minute, and the process that answers it has one
# thread. The idea: small questions are answered at once, within a budget of work; what takes more
# begins anew in a fork, which is a snapshot of all memory for the price of a page table. The
# operating system does the rest: a late query is killed, its memory is limited, several run on
# several cores. What it costs: 3 to 10 ms for each fork.

MAX_WAITING = 64  # questions; more get 503
INLINE_WORK = 50_000  # units of a Budget: about 5 ms
INLINE_S = 0.03  # and where the units were too cheap, so long
QUERY_MEMORY = 512 * 1024 * 1024  # bytes that a query may take, beside what the store has
SENDING_S = 5.0  # a reader may take so long while others wait
GZIP_WORK = 0.1  # units of a Budget a byte: level 1 takes 8 ns
KILL_GRACE_S = 0.5  # a fork that is late ends by itself, or so long later by a signal

Watched = tuple[int, int, Callable[[], None]]  # a descriptor, events of poll, what to call then


class Child:
    """A fork, as it is to itself: it ends when its time is over, or its parent is gone."""

    def __init__(self, said: int, deadline: float):
        self._said, self.deadline = said, deadline
        self._parent = os.getppid()
        logger.addFilter(self._log)
        signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        os.nice(5)

    def _look(self, *_: object) -> None:
        if os.getppid() != self._parent or time.monotonic() >= self.deadline:
            os._exit(1)

    def tell(self, **told: Any) -> None:
        """Send a line to the parent."""
        line = write_json(told).encode(errors="replace") + b"\n"
        while line:  # a signal may come between two parts of a long one
            line = line[os.write(self._said, line) :]

    def _log(self, record: logging.LogRecord) -> bool:
        self.tell(log=record.getMessage(), level=record.levelno)
        return False


class Fork:
    """A process for one piece of work, which has a copy of all memory, as its parent sees it.

    `work` is called with a Child and returns the exit status. What it logs goes to the front.
    Raises OSError.
    """

    def __init__(self, work: Callable[[Child], int], front: Front, deadline: float = math.inf):
        self._front, self.deadline = front, deadline
        self.sends_since = 0.0  # it has its answer: only the reader may be late now
        self.error = ""  # what it says is wrong
        self.result = b""  # what it found, for the cache
        self.changed_ms = END_OF_TIME_MS  # the earliest sample that came since it began
        self._heard = b""
        self.pipe, said = os.pipe()
        try:
            self._pid = os.fork()
        except OSError:
            os.close(self.pipe)
            os.close(said)
            raise
        if not self._pid:
            status = 1
            try:
                os.close(self.pipe)
                front.leave()
                status = work(Child(said, deadline))
            finally:  # whatever happens: a child never goes on with the loop of its parent
                os._exit(status)
        os.close(said)

    def hear(self) -> bool:
        """Hear what it says; False if it has ended."""
        said = os.read(self.pipe, 65_536)
        *lines, self._heard = (self._heard + said).split(b"\n")
        for line in lines:
            told = parse_json(line)
            if "log" in told:
                self._front.tell(**told)
            if "sending" in told:
                self.sends_since = time.monotonic()
            self.result = base64.b64decode(told.get("result", ""))
            self.error = told.get("error", self.error)
        return bool(said)

    def kill(self) -> None:
        """End it now."""
        os.kill(self._pid, signal.SIGKILL)

    def reap(self) -> int:
        """Its exit status, when it has ended."""
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


class Queries:
    """The questions of a store, from their arrival to their answers."""

    def __init__(self, api: QueryAPI, log: FollowedLog, memory: int, front: Front):
        self._api, self._log, self._memory, self._front = api, log, memory, front
        self._max_forks = max(2, os.cpu_count() or 1)
        self._waiting: deque[Question] = deque()  # for the log to be read, in order
        self._heavy: deque[Question] = deque()  # for a fork
        self._forks: dict[Question, Fork] = {}
        self._sending: dict[socket.socket, memoryview] = {}  # answers that nobody reads yet
        self._store_changed_ms, api.cache.changed_ms = api.cache.changed_ms, self._changed_ms

    def take(self, frame: Frame, progress: str) -> None:
        """Take a question; `progress`: why none can be answered yet, or ""."""
        sock = socket.socket(fileno=frame.descriptors[0])
        try:
            question = Question(sock, frame.position, frame.arrived)
        except (OSError, ValueError) as error:
            logger.debug("a question was not whole: %s", error)
            sock.close()
            return
        if progress:
            self._refuse(question, f"the store is not ready yet: {progress}")
        elif self.waiting >= MAX_WAITING:
            self._refuse(question, f"{MAX_WAITING} queries wait already")
        else:
            question.deadline = frame.arrived + self._api.timeout_s(question.form)
            self._waiting.append(question)

    @property
    def waiting(self) -> int:
        """How many wait for the log or for a fork."""
        return len(self._waiting) + len(self._heavy)

    @property
    def running(self) -> int:
        """How many are in forks."""
        return len(self._forks)

    @property
    def wait_for_log(self) -> bool:
        """Whether any waits for the log to be read, or for its turn after that."""
        return bool(self._waiting)

    @property
    def can_answer(self) -> bool:
        """Whether the log was read to the position of the next one."""
        return bool(self._waiting) and self._log.has_read(self._waiting[0].position)

    def events(self) -> Iterator[Watched]:
        """What is to be waited for."""
        # A fork that sends is heard before its reader has left, and still tells what it found.
        for question, fork in self._forks.items():
            yield fork.pipe, select.POLLIN, partial(self._hear, question)
        working = [question for question, fork in self._forks.items() if not fork.sends_since]
        for question in (*self._waiting, *self._heavy, *working):
            # no event: only that the other end is closed
            yield question.socket.fileno(), 0, partial(self._abandon, question)
        for sock in self._sending:
            yield sock.fileno(), select.POLLOUT, partial(self._send_more, sock)

    def work(self) -> None:
        """Answer one question, or pass it on to a fork; begin forks; end what is late."""
        if self.can_answer:
            self._answer(self._waiting.popleft())
        self._start_forks()
        self._end_late()

    def close(self) -> None:
        """End all forks."""
        for fork in self._forks.values():
            fork.kill()
            fork.reap()

    def _answer(self, question: Question) -> None:
        budget = Budget(INLINE_WORK)
        signal.signal(signal.SIGALRM, lambda *_: setattr(budget, "left", -1.0))
        signal.setitimer(signal.ITIMER_REAL, INLINE_S)
        try:
            status, body = self._api.answer(question.path, question.form, budget)
            budget.spend(question.takes_gzip * GZIP_WORK * len(body))
        except OverBudgetError:
            self._heavy.append(question)
        except Exception as error:
            log_unexpected(error)
            self._send(question, *self._api.error("internal", INTERNAL_ERROR))
        else:
            self._send(question, status, body)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    # ---- forks

    def _start_forks(self) -> None:
        """Begin what waits: as many work at once as there are cores; as many more may send."""
        working = sum(not fork.sends_since for fork in self._forks.values())
        room = min(self._max_forks - working, 2 * self._max_forks - len(self._forks))
        while self._heavy and room > 0:
            question = self._heavy.popleft()
            try:
                work = partial(self._answer_in_fork, question)
                self._forks[question] = Fork(work, self._front, question.deadline)
            except OSError as error:
                self._refuse(question, f"no process for a query: {error.strerror}")
            room -= 1

    def _answer_in_fork(self, question: Question, child: Child) -> int:
        """Answer a question, with as much memory as is allowed."""
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + self._memory, hard))
        try:
            status, body = self._api.answer(question.path, question.form, Budget())
        except MemoryError:
            status, body = 0, b""
        except Exception as error:
            log_unexpected(error)
            status, body = self._api.error("internal", INTERNAL_ERROR)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if not status:
            status, body = self._api.error("execution", str(SampleLimitError()))
        answer = _relayed(question, status, body)
        child.deadline = math.inf  # the rest is up to the reader; a front that goes closes it
        child.tell(sending=True)
        question.socket.setblocking(True)
        question.socket.sendall(answer)
        if result := self._api.cache.exported():
            child.tell(result=base64.b64encode(result).decode())
        return 0

    def _changed_ms(self) -> int:
        """What the store says; it holds for the results of all forks, too."""
        changed_ms = self._store_changed_ms()
        for fork in self._forks.values():
            fork.changed_ms = min(fork.changed_ms, changed_ms)
        return changed_ms

    def _hear(self, question: Question) -> None:
        fork = self._forks.get(question)
        if fork is None or fork.hear():  # it was abandoned just now, or goes on
            return
        if fork.result:
            self._api.cache.refresh()  # and with it what is known of all forks
            self._api.cache.add(fork.result, fork.changed_ms)
        del self._forks[question]
        code = fork.reap()
        if fork.sends_since:
            question.socket.close()
        elif time.monotonic() >= question.deadline:
            self._time_out(question, "in expression evaluation")
        else:
            self._refuse(question, f"the process of the query ended with status {code}")

    def _end_late(self) -> None:
        now = time.monotonic()
        behind = self._log.acknowledged.size_bytes - self._log.tail.position
        for line, where in (
            (self._waiting, f"while the store reads the log, {behind} bytes behind"),
            (self._heavy, "in query queue"),
        ):
            for question in [question for question in line if question.deadline <= now]:
                line.remove(question)
                self._time_out(question, where)
        for fork in self._forks.values():
            late = now >= fork.deadline + KILL_GRACE_S
            if fork.sends_since:  # to a slow reader: it makes room where others wait
                late = bool(self._heavy) and now >= fork.sends_since + SENDING_S
            if late:
                fork.kill()

    def _abandon(self, question: Question) -> None:
        """Nobody waits for the answer any more."""
        if question in self._forks:
            if self._forks[question].sends_since:
                return
            fork = self._forks.pop(question)
            fork.kill()
            fork.reap()
        elif question in self._waiting:
            self._waiting.remove(question)
        elif question in self._heavy:
            self._heavy.remove(question)
        else:  # it has its answer since
            return
        question.socket.close()

    # ---- answers

    def _time_out(self, question: Question, where: str) -> None:
        self._send(question, *self._api.error("timeout", f"query timed out {where}"))

    def _refuse(self, question: Question, reason: str) -> None:
        self._send(question, *self._api.error("unavailable", reason))

    def _send(self, question: Question, status: int, body: bytes) -> None:
        self._sending[question.socket] = memoryview(_relayed(question, status, body))
        self._send_more(question.socket)

    def _send_more(self, sock: socket.socket) -> None:
        try:
            self._sending[sock] = self._sending[sock][sock.send(self._sending[sock]) :]
        except BlockingIOError:
            return
        except OSError:  # nobody reads it any more
            self._sending[sock] = memoryview(b"")
        if not self._sending[sock]:
            del self._sending[sock]
            sock.close()


def _address_space() -> int:
    """The address space of this process in bytes."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no such file on this system: what a store takes as a rule
        return 1 << 30


# ==================================================================================================
# 41. Store process
# ==================================================================================================
#
# The store lives in a process of its own, with one thread and no locks. A question comes with the
# position of the log at its arrival, and is answered when the store has read so far: whoever pushed
# a sample sees it. Between questions the store seals rows and reads indexes; a fork writes blocks.
# What it costs: the log is read once more, 0.5 to 0.8 µs a line.

FAR_BEHIND_BYTES = 1024 * 1024  # of the log: then it is read without a pause
STORE_RETRY_S = 30.0  # after a failure to keep the store in order: a full disk, as a rule
OWN_METRICS_S = 15.0


class StoreOptions(NamedTuple):
    """What the store process is told at its start."""

    folder: str
    max_series: int = MAX_SERIES
    retention_s: float = RETENTION_S
    retention_bytes: int = 0
    keep_log: bool = False
    checkpoints: Sequence[str] = ()
    segment_bytes: int = SEGMENT_BYTES
    query_timeout_s: float = QUERY_TIMEOUT_S
    query_memory: int = QUERY_MEMORY
    version: str = ""


class StoreProcess:
    """The loop of the store: reads the log, answers questions, keeps the store in order."""

    def __init__(self, control: socket.socket, options: StoreOptions):
        self._options = options
        self.front = Front(control)
        self._store = Store(
            options.folder,
            writes=True,
            retention_s=options.retention_s,
            retention_bytes=options.retention_bytes,
            keep_log=options.keep_log,
            checkpoints=options.checkpoints,
            segment_bytes=options.segment_bytes,
        )
        api = QueryAPI(self._store, timeout_s=options.query_timeout_s, version=options.version)
        self._log = FollowedLog()
        self._queries = Queries(api, self._log, options.query_memory, self.front)
        self._opening: Iterator[str] | None = None
        self._began = time.monotonic()
        self._progress = "starting"  # how far the store is at its start; "" when it is ready
        self._first_position = Position(-1, 0)  # the store is ready when it has read so far
        self._work: Iterator[None] = iter(())
        self._maintenance: Fork | None = None
        self._error = ""  # why the store can't be kept in order
        self._next_status = self._next_maintenance = self._next_rotation = 0.0
        self._stopped = False

    # ---- the loop

    def run(self) -> None:
        """Work until the front says stop, or is gone."""
        while not (self._stopped or self.front.is_gone):
            self._wait(self._pause_s())
            self._read_log()
            self._queries.work()
            if not self._queries.wait_for_log:
                self._do_work()
            self._look_after_time()
        self._queries.close()
        if self._maintenance is not None:
            self._maintenance.kill()
            self._maintenance.reap()
            self._store.refresh()
        if not self._progress:
            self._store.keep_own()

    def _pause_s(self) -> float:
        """How long to wait for news before the next piece of work.

        While nobody asks and little is to be read, a moment: the front gets the processor then. Of
        posts on kept connections p99 was 4.3 ms without it, and 2.8 with it.
        """
        if not self._is_busy():
            return 0.1
        is_far_behind = self._log.limit - self._log.tail.position > FAR_BEHIND_BYTES
        return 0.0 if is_far_behind or self._progress or self._queries.wait_for_log else 0.002

    def _is_busy(self) -> bool:
        if self._progress:
            return self._opening is not None or not self._log.is_caught_up
        return (
            not self._log.is_caught_up
            or (self._store.has_work and not self.front.unsent)
            or self._queries.can_answer
        )

    def _wait(self, timeout_s: float) -> None:
        """Wait until somebody has something to say, and hear it."""
        poll, handlers = select.poll(), {}
        for descriptor, events, handler in (*self._events(), *self._queries.events()):
            poll.register(descriptor, events)
            handlers[descriptor] = handler
        for descriptor, _ in poll.poll(timeout_s * 1000):
            handlers[descriptor]()

    def _events(self) -> Iterator[Watched]:
        has_unsent = select.POLLOUT if self.front.unsent else 0
        yield self.front.socket.fileno(), select.POLLIN | has_unsent, self._hear
        if self._maintenance is not None:
            yield self._maintenance.pipe, select.POLLIN, self._hear_maintenance

    def _hear(self) -> None:
        for frame in itertools.islice(self.front.frames(), MAX_WAITING):
            if frame.kind == _QUESTION:
                self._queries.take(frame, self._progress)
            elif frame.kind == _SWITCH:
                self._log.begin_file(frame.position, frame.descriptors[0])
            elif frame.kind == _OWN:
                with open(frame.descriptors[0], "rb") as lines:
                    self._store.add_own(lines.read())
            elif frame.kind == _STOP:
                self._stopped = True
            if frame.kind in (_QUESTION, _POSITION):
                self._log.acknowledge(frame.position)
        self.front.send_unsent()

    # ---- the log is read

    def _read_log(self) -> None:
        log = self._log
        if self._opening is None and log.file < 0 and log.has_next_file:  # the first file
            log.next_file()
            self._first_position = log.acknowledged
            inode = os.fstat(log.tail.descriptor).st_ino
            self._opening = self._store.open(skip_inode=inode)
        if self._opening is not None:
            progress = next(self._opening, None)
            if progress is not None:
                self._progress = progress
                return
            self._opening = None
        if log.file < 0:
            return
        limit = log.limit
        if lines := log.tail.read(limit):
            self._store.add_lines(lines)
        elif log.has_next_file:
            self._switch()
        if self._progress:
            self._progress = f"reading the log: {log.tail.position >> 20} of {limit >> 20} MiB"
            if log.has_read(self._first_position):
                self._progress = ""
                if time.monotonic() - self._began > 1.0:
                    logger.info("the store is ready: %d metrics read", self._store.replayed)

    def _switch(self) -> None:
        """The border of the files is the border of the memtables."""
        old = self._log.next_file()
        self._store.freeze(segment_of(self._store.folder, old)[1])
        os.close(old)
        self._next_rotation = self._next_maintenance = 0.0

    # ---- the store is kept in order

    def _do_work(self) -> None:
        """A piece of work that is short beside a question."""
        end = time.monotonic() + 0.002
        while time.monotonic() < end:
            if next(self._work, self) is self:
                if not self._store.has_work:
                    return
                self._work = self._store.work()

    def _look_after_time(self) -> None:
        now = time.monotonic()
        if now < self._next_status:
            return
        self._next_status = now + STORE_STATUS_S
        self.front.tell(status=self._status())
        if self._progress:
            return
        if self._store.blocks.is_changed:
            self._store.refresh()
        if now >= self._next_rotation and self._store.is_segment_due(self._log.tail.position):
            self._next_rotation = now + STORE_RETRY_S
            self.front.tell(rotate=self._store.next_segment())
        is_due = self._maintenance is None and now >= self._next_maintenance
        if is_due and self._store.needs_maintenance:
            self._next_maintenance = now + STORE_STATUS_S
            try:
                self._maintenance = Fork(self._maintain, self.front)
            except OSError as error:
                self._say_error(f"no process for it: {error.strerror}")

    def _maintain(self, child: Child) -> int:
        """In a fork: keep the store in order."""
        try:
            self._store.maintain()
            return 0
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        except Exception as error:
            log_unexpected(error)
            reason = INTERNAL_ERROR
        child.tell(error=reason)
        return 1

    def _hear_maintenance(self) -> None:
        fork = self._maintenance
        if fork is None or fork.hear():
            return
        self._maintenance = None
        code = fork.reap()
        self._store.refresh()
        self._say_error("" if code == 0 else fork.error or f"ended with status {code}")

    def _say_error(self, error: str) -> None:
        self._error = error
        if error:
            logger.error("can't keep the store in order: %s", error)
            self._next_maintenance = time.monotonic() + STORE_RETRY_S

    def _status(self) -> dict[str, Any]:
        return {
            "progress": self._progress,
            "error": self._error,
            "room": self._options.max_series - self._store.series_in_memory,
            "series_in_memory": self._store.series_in_memory,
            "block_bytes": self._store.blocks.size_bytes,
            "blocks_damaged": len(self._store.blocks.damaged),
            "log_lines_unreadable": self._store.unreadable,
            "store_lag_bytes": max(0, self._log.limit - self._log.tail.position),
            "queries_running": self._queries.running,
            "queries_waiting": self._queries.waiting,
        }


def store_main(arguments: list[str]) -> int:
    """The store process: its argument is the descriptor of its socket to the front."""
    sys.setrecursionlimit(MAX_RECURSION)
    control, told = begin_following(arguments)
    options = StoreOptions(**told)
    process = StoreProcess(control, options)
    logger.addFilter(process.front.log)
    logger.setLevel(logging.INFO)
    with only_one(os.path.join(options.folder, BLOCKS_NAME), os.O_RDONLY | os.O_DIRECTORY):
        process.run()
    return 0


# ==================================================================================================
# 42. Store client
# ==================================================================================================
#
# The front's end of the store process. A follower is a process that follows the log; the front
# starts it, tells it how far the log is acknowledged, hears what it says, and begins it anew where
# it died. The store is one; questions are handed to it, each as one end of a socket on which the
# answer comes. Nothing here waits for a follower: a socket that is full means that it is busy.


MAX_KNOWN_LAYOUTS = 100_000


class Follower:
    """The front's end of a process that follows the log, and runs as `role` of this program.

    `name` is what it is called where it is spoken of; `hear` is called with each line that it says,
    which is a JSON object, and with its status as "ended" when it died. Of the log's files the last
    `kept_files` that the process has not left are kept open for one that is started anew, whatever
    becomes of their names. `look` and `close` are called by one thread, the others by any.
    """

    def __init__(
        self,
        log: MetricLog,
        role: str,
        name: str,
        options: dict[str, Any],
        hear: Callable[[dict[str, Any]], None],
        kept_files: int = 1,
    ):
        self._kept_files = kept_files
        self._log, self._role, self.name, self._options = log, role, name, options
        self._tell_owner = hear
        # Guards the four below. Nothing waits under it.
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # (new file, end of the old), a file; the last one is the one that is appended to
        self._files = deque([(log.position, os.dup(log.descriptor))])
        self._missed_switch = False
        # The rest belongs to the housekeeper; others only read it.
        self._received = b""
        self._heard_at = self._started_at = 0.0
        self._backoff_s = 0.0
        self._stop_by = 0.0  # when it is told to stop: how long it may take
        self.stop_s = FOLLOWER_STOP_S
        self._starts = 0
        log.on_switch.append(self._switch)

    @property
    def restarts(self) -> int:
        """How often it was started anew."""
        return max(0, self._starts - 1)

    def is_well(self) -> None:
        """It does its work: where it dies it is started anew at once."""
        self._backoff_s = 0.0

    def ask(self, head: Head, path: bytes, form: bytes, max_bytes: int = MAX_FORM_BYTES) -> Answer:
        """Hand a question over; its answer comes from the process. Raises HTTPError."""
        gzips = pays_gzip(head)
        if len(form) + len(path) > max_bytes:
            raise HTTPError(413, f"parameters of more than {max_bytes} bytes")
        mine, theirs = socket.socketpair()
        with theirs:
            try:
                mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_FORM_BYTES)
                mine.setblocking(False)
                if len(form) + len(path) <= MAX_FORM_BYTES:
                    mine.sendall(_LENGTHS.pack(len(path), len(form), gzips) + path + form)
                else:  # no socket is sure to have room for it, but a file without a name has
                    with tempfile.TemporaryFile(buffering=0) as file:
                        file.write(form)
                        file.seek(0)
                        question = _LENGTHS.pack(len(path), 0, gzips) + path
                        socket.send_fds(mine, [question], [file.fileno()])
                self.send(_QUESTION, self._log.position, theirs.fileno())
            except OSError as error:
                mine.close()
                logger.debug("%s was not asked: %s", self.name, error)
                raise unavailable(f"{self.name} does not answer") from None
        return Answer(None, source=Relay(mine))

    def send(self, kind: bytes, position: Position, descriptor: int = -1) -> None:
        """Send a frame. Raises OSError where the process takes none."""
        with self._lock:
            self._send_locked(kind, position, descriptor)

    def _send_locked(self, kind: bytes, position: Position, descriptor: int) -> None:
        if self._control is None:
            raise OSError(errno.EPIPE, f"there is no {self.name}")
        frame = _FRAME.pack(kind, position.file, position.size_bytes, time.monotonic())
        if descriptor >= 0:
            socket.send_fds(self._control, [frame], [descriptor], socket.MSG_DONTWAIT)
        else:
            self._control.send(frame, socket.MSG_DONTWAIT)

    def _switch(self, file: int, descriptor: int, final_size: int) -> None:
        """The log goes on in another file; called by the log, in the order of its lines."""
        with self._lock:
            self._files.append((Position(file, final_size), os.dup(descriptor)))
            self._close_files(len(self._files) - self._kept_files)
            if self._control is None:
                return
            try:
                self._send_locked(_SWITCH, Position(file, final_size), descriptor)
            except OSError as error:  # it begins anew, and reads what it missed
                logger.debug("%s was not told of a new file: %s", self.name, error)
                self._missed_switch = True

    def _close_files(self, count: int) -> None:
        for _ in range(count):
            os.close(self._files.popleft()[1])

    def has_left(self, file: int) -> None:
        """The process needs no file of the log before this one any more."""
        with self._lock:
            self._close_files(sum(position.file < file for position, _ in self._files))

    def look(self) -> None:
        """What the housekeeper does for the process, again and again."""
        if self._control is None:
            if time.monotonic() >= self._started_at + self._backoff_s and not self._stop_by:
                try:
                    self._start()
                except OSError as error:
                    logger.error("can't start %s: %s", self.name, error.strerror)
            return
        try:
            self.send(_POSITION, self._log.position)
        except BlockingIOError as error:
            logger.debug("%s reads no frames: %s", self.name, error)
        except OSError:
            self._end()
            return
        self._hear()
        if self._missed_switch:
            self._end()
        elif time.monotonic() - self._heard_at > SILENCE_S:
            logger.error("%s says nothing for %g s", self.name, SILENCE_S)
            self._end()

    def _start(self) -> None:
        self._started_at = self._heard_at = time.monotonic()
        self._backoff_s = min(5.0, 2 * self._backoff_s + 0.1)
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        folder, program = os.path.split(os.path.abspath(__file__))
        paths = (folder, os.environ.get("PYTHONPATH"))
        with theirs:
            # As a module its bytecode is kept: 0.15 s and 30 MiB less than to compile it again.
            process = subprocess.Popen(
                [
                    # -P: another file of this name in the current folder is not what is meant
                    *(sys.executable, "-P", "-m", program.removesuffix(".py")),
                    *(self._role, str(theirs.fileno())),
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        assert process.stdin is not None  # it is a pipe, which has room for all options
        with contextlib.suppress(BrokenPipeError), process.stdin as told:
            told.write(write_json(self._options).encode())
        self._starts += 1
        with self._lock:
            self._control, self._process = mine, process
            (first, descriptor), *others = self._files
            position = self._log.position
            size = position.size_bytes if position.file == first.file else 0
            self._send_locked(_SWITCH, Position(first.file, size), descriptor)
            for begun, descriptor in others:
                self._send_locked(_SWITCH, begun, descriptor)
            self._send_locked(_POSITION, position, -1)

    def _hear(self) -> None:
        control = self._control
        assert control is not None  # only the housekeeper ends it
        try:
            while piece := control.recv(65_536):
                self._received += piece
            self._end()
            return
        except BlockingIOError:
            pass
        except OSError:
            self._end()
            return
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._heard_at = time.monotonic()
            said = parse_json(line)
            if "log" in said:
                logger.log(said["level"], "%s", said["log"])
            else:
                self._tell_owner(said)

    def _end(self) -> None:
        """End the process; it is started anew later."""
        with self._lock:
            control, process = self._control, self._process
            self._control = self._process = None
            self._missed_switch = False
        self._received = b""
        if control is None or process is None:
            return
        control.close()
        process.kill()
        process.wait()
        if not self._stop_by:
            status = process.returncode
            logger.error("%s ended with status %d; it is started anew", self.name, status)
            self._tell_owner({"ended": status})

    def stop(self) -> None:
        """Tell the process to stop, and do not start it any more."""
        self._stop_by = time.monotonic() + self.stop_s
        with contextlib.suppress(OSError):  # where it is gone already
            self.send(_STOP, self._log.position)

    def close(self) -> None:
        """Wait until the process has stopped, as long as it may take, and end it."""
        if not self._stop_by:
            self.stop()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._stop_by - time.monotonic()))
        self._end()
        with self._lock:
            self._log.on_switch.remove(self._switch)
            self._close_files(len(self._files))


class StoreClient:
    """The front's end of the store: starts it, and asks it."""

    def __init__(self, log: MetricLog, statistics: Statistics, options: StoreOptions):
        self._log, self._statistics, self._options = log, statistics, options
        self.follower = Follower(log, "store", "the store", options._asdict(), self._hear)
        self.status: dict[str, Any] = {"progress": "starting", "error": ""}
        self._known: set[int] = set()  # layouts of batches that came while there was room
        self._expose()

    def _expose(self) -> None:
        def number(key: str) -> Callable[[], float]:
            return lambda: self.status.get(key, 0)

        add = self._statistics.add
        for key, type_, help_ in _STORE_STATISTICS:
            add(key, type_, help_, number(key.removesuffix("_total")))
        add(
            "store_restarts_total",
            "counter",
            "How often the store process died and was started anew.",
            lambda: self.follower.restarts,
        )

    def health(self) -> dict[str, Any]:
        """What `/health` says of the store."""
        if self.status.get("error"):
            return {"store": "running", "store_error": self.status["error"]}
        return {"store": self.status.get("progress") or "running"}

    def admit(self, batch: Batch) -> None:
        """Refuse series that are new while there is no room for any; HTTPError 400."""
        room = self.status.get("room", self._options.max_series)
        if room * 2 > self._options.max_series:
            return
        key = hash(tuple((name, rest) for _, name, _, rest in _LOG_LINE.findall(batch.lines)))
        if room > 0:
            if len(self._known) >= MAX_KNOWN_LAYOUTS:
                self._known.clear()
            self._known.add(key)
        elif key not in self._known:
            raise HTTPError(
                400,
                f"the batch may have new series, and there is room for none: --max-series is "
                f"{self._options.max_series}",
            )

    def ask(self, request: Request, client: str) -> Answer:
        """`/api/v1/…`: the query API, its parameters in the target or in the body as a form."""
        head = request.head
        if not has_api_route(head.path):
            raise HTTPError(404, f"no route {head.path[:80]!r}")
        form = head.query.encode()
        if head.method == "POST":
            content_type = head.headers.get("content-type", FORM_TYPE)
            if content_type.partition(";")[0].strip().lower() != FORM_TYPE:
                raise HTTPError(415, f"send 'Content-Type: {FORM_TYPE}'")
            form = b"&".join(filter(None, (decode_content(request), form)))
        try:
            form.decode()
        except UnicodeDecodeError:
            raise HTTPError(400, "the form is not UTF-8") from None
        return self.follower.ask(head, head.path.encode(), form)

    def send_own_metrics(self) -> None:
        """Store the server's own numbers as series."""
        now_ms = int(time.time() * 1000)
        lines = "".join(
            log_line(Sample(full_name(own.name), own.value, own.type, own.labels, now_ms))
            for own in self._statistics.own_metrics()
            if math.isfinite(own.value)
        )
        try:
            heard, said = os.pipe()
            try:
                os.set_blocking(said, False)
                os.write(said, lines.encode())
                self.follower.send(_OWN, self._log.position, heard)
            finally:
                os.close(said)
                os.close(heard)
        except OSError as error:
            logger.debug("the server's own statistics were not stored: %s", error)

    def _hear(self, said: dict[str, Any]) -> None:
        if "rotate" in said:
            self._log.rotate(said["rotate"])
        elif "ended" in said:
            self.status = {"progress": "it died and is started anew", "error": ""}
        else:
            self.status = said["status"]
            if not self.status["progress"]:
                self.follower.is_well()


# Key of the status, with what the text format asks for, type and help.
_STORE_STATISTICS = (
    ("series_in_memory", "gauge", "Series pushed since the last block was begun."),
    ("block_bytes", "gauge", "Size of all blocks."),
    ("blocks_damaged", "gauge", "Blocks that were set aside, as they are damaged."),
    ("log_lines_unreadable_total", "counter", "Lines of the log that are no metrics."),
    ("store_lag_bytes", "gauge", "How much of the log the store has not read yet."),
    ("queries_running", "gauge", "Queries that run in processes of their own."),
    ("queries_waiting", "gauge", "Queries that wait for the log or for a process."),
)


# ==================================================================================================
# PART IV. WATCHING
# ==================================================================================================


# ==================================================================================================
# 43. Scalars of YAML
# ==================================================================================================
#
# The problem: rule files are YAML, the standard library reads none, and all of YAML is far more
# than rule files use. The idea: recursive descent as in the JSON chapter, over the part that they
# do use. This chapter reads pieces of text: plain, quoted, and in blocks. A scalar stays text:
# whoever asks for a field knows its type, so `0x10` and `no` are never read as something else. It
# knows where each piece of it stands, as an error in a query inside a rule has a place in the file.
#
# The source: https://yaml.org/spec/1.1/

_COMMENT = r"(?:\#[^\n\0]*+)?+"

# Plain scalars: a first character that is no indicator, and no ": " or " #" behind it.
_VISIBLE = r"[^ \t\n\0]"
_PLAIN_FIRST = r"[^ \t\n\0,\[\]{}#&*!|>'\"%@`?:-]"
_PLAIN_REST = rf"(?:[ \t]*+(?:[^ \t\n\0:#]++|:(?={_VISIBLE})|(?<={_VISIBLE})\#))*+"
_FLOW_PLAIN_REST = rf"(?:[ \t]*+(?:[^ \t\n\0:#,?\[\]{{}}]++|:(?={_VISIBLE})|(?<={_VISIBLE})\#))*+"
_PLAIN_LINE = rf"(?:{_PLAIN_FIRST}|[?:-](?={_VISIBLE})){_PLAIN_REST}"
_BLOCK_PLAIN = re.compile(_PLAIN_LINE)
_BLOCK_REST = re.compile(_PLAIN_REST)  # further lines
_FLOW_PLAIN = re.compile(rf"(?:{_PLAIN_FIRST}|-(?={_VISIBLE})){_FLOW_PLAIN_REST}")
_FLOW_REST = re.compile(_FLOW_PLAIN_REST)
_NEXT_LINE = re.compile(r"[ \t]*+\n([ ]*+)([ \t]*+)")

_QUOTED_TEXT = re.compile(r"(?:[^'\"\\ \t\n\0]++|[ \t]++(?!\n))++")
_LINE_FOLD = re.compile(r"[ \t]*+\n[ \t]*+(?:\n[ \t]*+)*+")
_YAML_ESCAPE = re.compile(
    r"""
    \\(?: (?P<pair> u[dD][89abAB][0-9a-fA-F]{2} \\u[dD][c-fC-F][0-9a-fA-F]{2} )
        | x(?P<x>[0-9a-fA-F]{2}) | u(?P<u>[0-9a-fA-F]{4}) | U(?P<U>[0-9a-fA-F]{8})
        | \n[ \t]*+ (?P<breaks> (?:\n[ \t]*+)*+ )
        | (?P<letter> [0abt\tnvfre\ "'/\\N_LP] ) )
    """,
    re.VERBOSE,
)
_YAML_LETTERS = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r",
    "e": "\x1b", "N": "\x85", "_": "\xa0", "L": "\u2028", "P": "\u2029",
}  # fmt: skip
_BLOCK_HEADER = re.compile(rf"[|>](?:([+-])([1-9])?|([1-9])([+-])?)?[ \t]*+{_COMMENT}(?=[\n\0])")
_INDENTATIONS = re.compile(r"(?:\n[ ]*+)*+")
_BLOCK_LINE = re.compile(r"\n([ ]*+)([^\n\0]*+)")

_MISPLACED = {
    "\0": "the text ends where a value is expected",
    "\t": "a tab can't indent; write spaces",
    "%": "directives are not read; text that begins with '%' needs quotes",
    "!": "tags are not read; write the value without one",
    "-": "a list must begin on a line of its own",
    "?": "keys with '?' are not read",
    ":": "no key before ':'",
}


class YAMLError(ValueError):
    """Text that is not YAML, or of a kind that is not read: what is wrong, and where, in lines and
    characters from 1.
    """

    def __init__(self, reason: str, line: int, column: int):
        self.reason, self.line, self.column = reason, line, column
        super().__init__(f"{reason} at line {line}, column {column}")


class YamlScalar(NamedTuple):
    """Text, however it was written."""

    text: str
    position: int
    plain: bool  # neither quoted nor a block
    pieces: list[tuple[int, int]]  # where pieces begin in the text, and where they stand

    @property
    def is_null(self) -> bool:
        """Whether nothing is written here, or a word for it."""
        return self.plain and self.text in ("", "~", "null", "Null", "NULL")

    def position_of(self, offset: int) -> int:
        """Where a character of the text stands in the document."""
        start, position = self.pieces[max(0, bisect_right(self.pieces, (offset, math.inf)) - 1)]
        return position + offset - start


class YamlList(NamedTuple):
    """A list, in block or flow style."""

    items: "list[YamlNode]"
    position: int


class YamlMap(NamedTuple):
    """A map, in block or flow style: keys and values by the text of the key."""

    entries: "dict[str, tuple[YamlScalar, YamlNode]]"
    position: int


YamlNode = YamlScalar | YamlList | YamlMap


def _nothing(position: int) -> YamlScalar:
    return YamlScalar("", position, True, [(0, position)])


class YamlDocument:
    """The first document of a text: its root, and the places of its nodes.

    The text has a line break before it, so that every line begins behind one, and a NUL behind it,
    which no rule accepts.
    """

    def __init__(self, text: str):
        self.text = text
        self.root: YamlNode = _nothing(1)
        self.has_more = False  # whether another document follows
        # By name: the node, and how many characters it and the aliases in it stand for.
        self.anchors: dict[str, tuple[YamlNode, int]] = {}
        self.aliased = 0  # how many all aliases stand for
        self._breaks: list[int] = []

    def place(self, position: int) -> tuple[int, int]:
        """The line and column of a position, from 1."""
        if not self._breaks:
            ends = itertools.accumulate(len(line) + 1 for line in self.text.split("\n"))
            self._breaks = [end - 1 for end in ends]
        line = bisect_left(self._breaks, max(position, 1))
        return line, position - self._breaks[line - 1]

    def error(self, reason: str, position: int) -> YAMLError:
        """The error that something is wrong at a position."""
        return YAMLError(reason, *self.place(position))

    def expected(self, what: str, position: int) -> YAMLError:
        """The error that something else was expected than what stands at a position."""
        first = self.text[position]
        found = "the end of the text" if first == "\0" else ascii(first)
        return self.error(_MISPLACED["\t"] if first == "\t" else f"{what}, found {found}", position)

    def indentation(self, position: int) -> int:
        """How far a position is from the beginning of its line."""
        return position - self.text.rfind("\n", 0, position) - 1


def _scalar_of(pieces: list[tuple[str, int]], position: int, plain: bool = False) -> YamlScalar:
    """A scalar of pieces of text and their positions."""
    offsets = itertools.accumulate((len(piece) for piece, _ in pieces), initial=0)
    starts = [(offset, start) for offset, (_, start) in zip(offsets, pieces)]
    text = "".join(piece for piece, _ in pieces)
    return YamlScalar(text, position, plain, starts or [(0, position)])


def _fold(breaks: int) -> str:
    """What line breaks between two lines of text become: one a space, more of them one less."""
    return " " if breaks == 1 else "\n" * (breaks - 1)


def _plain(src: YamlDocument, position: int, indent: int, in_flow: bool) -> tuple[YamlScalar, int]:
    text = src.text
    first = _FLOW_PLAIN.match(text, position) if in_flow else _BLOCK_PLAIN.match(text, position)
    if first is None:
        letter = text[position]
        reason = f"text that begins with {letter!a} needs quotes"
        raise src.error(_MISPLACED.get(letter, reason), position)
    pieces, end = [(first[0], position)], first.end()
    while True:
        breaks, start = 0, end
        while line := _NEXT_LINE.match(text, start):
            breaks, start = breaks + 1, line.end()
            if line[2] and len(line[1]) <= indent:
                raise src.error(_MISPLACED["\t"], line.start(2))
        if not breaks or src.indentation(start) <= indent:
            break
        rest = _FLOW_REST.match(text, start) if in_flow else _BLOCK_REST.match(text, start)
        if not rest or not rest[0]:
            break
        pieces += [(_fold(breaks), end), (rest[0], start)]
        end = rest.end()
    return _scalar_of(pieces, position, plain=True), end


def _quoted_scalar(src: YamlDocument, position: int) -> tuple[YamlScalar, int]:
    start, quote = position, src.text[position]
    pieces: list[tuple[str, int]] = []
    position += 1
    while True:
        if run := _QUOTED_TEXT.match(src.text, position):
            pieces.append((run[0], position))
            position = run.end()
        letter = src.text[position]
        piece, end = letter, position + 1
        if fold := _LINE_FOLD.match(src.text, position):
            piece, end = _fold(fold[0].count("\n")), fold.end()
        elif letter == "\\" and quote == '"':
            piece, end = _yaml_escape(src, position)
        elif quote == "'" and src.text.startswith("''", position):
            end += 1
        elif letter == quote:
            return _scalar_of(pieces, start), end
        elif letter == "\0":
            raise src.error(f"no {quote} ends this text", start)
        pieces.append((piece, position))
        position = end


def _yaml_escape(src: YamlDocument, position: int) -> tuple[str, int]:
    match = _YAML_ESCAPE.match(src.text, position)
    if match is None:
        raise src.error(f"unknown escape {src.text[position : position + 2]!a}", position)
    if match["letter"]:
        return _YAML_LETTERS.get(match["letter"], match["letter"]), match.end()
    if match["breaks"] is not None:
        return match["breaks"].count("\n") * "\n", match.end()
    if match["pair"]:  # as JSON has it
        high, low = int(match["pair"][1:5], 16), int(match["pair"][7:], 16)
        return chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00), match.end()
    code = int(match["x"] or match["u"] or match["U"], 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise src.error("escape of no character", position)
    return chr(code), match.end()


def _block_scalar(src: YamlDocument, position: int, indent: int) -> tuple[YamlScalar, int]:
    """A literal or folded scalar: the lines that are indented as far as the first one is."""
    header, style = _BLOCK_HEADER.match(src.text, position), src.text[position]
    if header is None:
        reason = f"only '+' or '-', a digit and a comment can follow {style!r}"
        raise src.error(reason, position)
    chomp = header[1] or header[4] or ""
    digit = header[2] or header[3]
    width = max(indent, 0) + int(digit or 1)
    if not digit:  # that of the first line with text
        blank = _INDENTATIONS.match(src.text, header.end())
        assert blank  # it matches the empty string
        if src.text[blank.end()] == "\t":
            raise src.error(_MISPLACED["\t"], blank.end())
        width = max(width, *map(len, blank[0].split("\n")))
    pieces: list[tuple[str, int]] = []
    end, breaks, begins_blank = header.end(), 0, True
    while line := _BLOCK_LINE.match(src.text, end):
        breaks += 1
        start, stop = line.start(1) + width, line.end()
        if start < stop and start <= line.end(1):
            is_blank = src.text[start] in " \t"
            if not pieces:
                joint = "\n" * (breaks - 1)
            elif style == ">" and not is_blank and not begins_blank:
                joint = _fold(breaks)
            else:
                joint = "\n" * breaks
            pieces += [(joint, end), (src.text[start:stop], start)]
            breaks, begins_blank = 0, is_blank
        elif line[2]:
            if line[2][0] == "\t":
                raise src.error(_MISPLACED["\t"], line.start(2))
            break
        end = stop
    last = breaks if pieces else breaks - 1
    kept = {"+": last, "-": 0, "": min(last, 1) if pieces else 0}[chomp]
    return _scalar_of([*pieces, ("\n" * kept, end)], position), end


# ==================================================================================================
# 44. YAML
# ==================================================================================================
#
# Maps and lists in block and flow style, anchors, aliases and merges. What is left out (tags,
# directives, keys with `?`, tabs that indent) is an error with its place.
#
# An alias is the node itself, not a copy, and what all aliases stand for is bounded. Where YAML 1.1
# leaves a choice, it is made as libyaml and go-yaml make it, which Prometheus uses.

MAX_YAML_DEPTH = 64
MAX_ALIASED = 1_000_000  # characters that the aliases of a document stand for

_UNPRINTABLE = re.compile(
    "[^\t\n -~\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_DOCUMENT_MARKER = re.compile(r"(?<=\n)(?:---|\.\.\.)(?=[ \t\n\0])")
# Blanks and comments up to the next token. Tabs may stand behind a token, but not before one.
_UP_TO_TOKEN = re.compile(rf"[ \t]*+{_COMMENT}(?:\n(?:[ ]++\t[ \t]*+(?=\n)|[ ]*+{_COMMENT}))*+")
_UP_TO_FLOW_TOKEN = re.compile(r"(?:[ \t\n]++|\#[^\n\0]*+)*+")
_END_OF_LINE = re.compile(rf"[ \t]*+{_COMMENT}(?=[\n\0])")
_LIST_ITEM = re.compile(r"-(?=[ \t\n\0])")
_ANCHOR = re.compile(r"[&*]([A-Za-z0-9_-]++)(?=[ \t\n\0,\]}])")
_KEY = re.compile(
    rf"(?:&[A-Za-z0-9_-]++[ \t]++)?+(?:{_PLAIN_LINE}"
    r"|\"(?:[^\"\\\n\0]++|\\.)*+\"|'(?:[^'\n\0]++|'')*+')[ \t]*+:(?=[ \t\n\0])"
)
_Entries = dict[str, tuple[YamlScalar, YamlNode]]


def parse_yaml(text: str | bytes) -> YamlDocument:
    """Parse the first document of a text, given as str or as UTF-8 bytes. Raises YAMLError.

    >>> root = parse_yaml("name: up\\nrules: [a, 'b']").root
    >>> [(key.text, type(value).__name__) for key, value in root.entries.values()]
    [('name', 'YamlScalar'), ('rules', 'YamlList')]
    >>> parse_yaml("name: a: b")
    Traceback (most recent call last):
    metricstream.YAMLError: text with ': ' in it needs quotes at line 1, column 8
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            before = YamlDocument("\n" + error.object[: error.start].decode())
            raise before.error("invalid UTF-8", len(before.text)) from None
    text = "\n" + text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if unprintable := _UNPRINTABLE.search(text):
        raise YamlDocument(text).error("control character", unprintable.start())
    text += "\0"
    position = _next_token(YamlDocument(text), 0)
    begins_marked = text[position] == "-" and _DOCUMENT_MARKER.match(text, position)
    if begins_marked:
        position += len("---")
    end = _DOCUMENT_MARKER.search(text, position + 1)
    src = YamlDocument(text[: end.start()] + "\0" if end else text)
    src.has_more = bool(end and text[end.end() :].strip(" \t\n.-\0"))
    src.root, position = _block_node(src, position if begins_marked else 0, -1, 0)
    position = _next_token(src, position)
    if src.text[position] != "\0":
        raise src.expected("expected the end of the document, or another indentation", position)
    return src


def _behind_blanks(src: YamlDocument, position: int) -> int:
    return _UP_TO_TOKEN.match(src.text, position).end()  # type: ignore[union-attr]  # matches ""


def _flow_token(src: YamlDocument, position: int) -> int:
    return _UP_TO_FLOW_TOKEN.match(src.text, position).end()  # type: ignore[union-attr]  # as above


def _next_token(src: YamlDocument, position: int) -> int:
    end = _behind_blanks(src, position)
    if src.text[end] == "\t":
        raise src.error(_MISPLACED["\t"], end)
    return end


def _block_node(
    src: YamlDocument, position: int, indent: int, depth: int, compact: bool = False,
    least_list: int | None = None,
) -> tuple[YamlNode, int]:  # fmt: skip
    """What follows a key, the dash of an item, or the beginning of the document.

    It stands on the same line, or deeper than `indent`; a list may stand at `least_list`. On the
    same line it is a block map or list only if it is `compact`, as in `- a: b`.
    """
    start = _next_token(src, position)
    between = src.text[position:start]
    is_item = _LIST_ITEM.match(src.text, start)
    if "\n" in between or src.text[start] == "\0":
        least = least_list if is_item and least_list is not None else indent + 1
        if src.text[start] == "\0" or src.indentation(start) < least:
            return _nothing(position), position
        compact = True
    elif compact and "\t" in between:
        raise src.error(_MISPLACED["\t"], position + between.index("\t"))
    if depth > MAX_YAML_DEPTH:
        raise src.error(f"nesting deeper than {MAX_YAML_DEPTH}", start)
    if compact and is_item:
        return _block_list(src, start, depth + 1)
    if compact and _KEY.match(src.text, start):
        return _block_map(src, start, depth + 1)
    if src.text[start] == "&":
        return _anchored(
            src, start, lambda behind: _block_node(src, behind, indent, depth, False, least_list)
        )
    if src.text[start] in "|>":
        return _block_scalar(src, start, indent)
    node, end = _flow_node(src, start, indent, depth, False)
    if not _END_OF_LINE.match(src.text, end):
        end = _behind_blanks(src, end)
        if src.text[end] == ":":
            raise src.error("text with ': ' in it needs quotes", end)
        raise src.expected("expected the end of the line", end)
    return node, end


def _block_list(src: YamlDocument, position: int, depth: int) -> tuple[YamlList, int]:
    start, indent = position, src.indentation(position)
    items: list[YamlNode] = []
    while _LIST_ITEM.match(src.text, position) and src.indentation(position) == indent:
        item, position = _block_node(src, position + 1, indent, depth, compact=True)
        items.append(item)
        position = _next_token(src, position)
    return YamlList(items, start), position


def _block_map(src: YamlDocument, position: int, depth: int) -> tuple[YamlMap, int]:
    start, indent = position, src.indentation(position)
    entries: _Entries = {}
    while True:
        match = _KEY.match(src.text, position)
        if not match:
            if src.text[position] in "?!":
                raise src.error(_MISPLACED[src.text[position]], position)
            raise src.expected("expected a key and ':'", position)
        key, _ = _flow_node(src, position, indent, depth, False)
        value, position = _block_node(src, match.end(), indent, depth, least_list=indent)
        _with_entry(src, entries, key, value)
        position = _next_token(src, position)
        found = src.indentation(position)
        if found < indent or src.text[position] == "\0":
            return _map(src, entries, start), position
        if found > indent:
            raise src.expected("indented more than the key above, whose value is over", position)


def _with_entry(src: YamlDocument, entries: _Entries, key: YamlNode, value: YamlNode) -> _Entries:
    if not isinstance(key, YamlScalar):
        raise src.error("a key must be text; text that begins with '{' needs quotes", key.position)
    if key.text in entries:
        line, _ = src.place(entries[key.text][0].position)
        raise src.error(f"key {key.text[:80]!a} stands in line {line} already", key.position)
    entries[key.text] = key, value
    return entries


def _map(src: YamlDocument, entries: _Entries, position: int) -> YamlMap:
    """A map, with what its key `<<` merges into it: own keys win, then earlier maps."""
    if "<<" in entries and entries["<<"][0].plain:
        key, merged = entries.pop("<<")
        for source in merged.items if isinstance(merged, YamlList) else [merged]:
            if not isinstance(source, YamlMap):
                raise src.error("'<<' merges a map or a list of maps", key.position)
            for name, entry in source.entries.items():
                entries.setdefault(name, entry)
    return YamlMap(entries, position)


def _anchor(src: YamlDocument, position: int) -> tuple[str, int]:
    """The name of an anchor or an alias."""
    match = _ANCHOR.match(src.text, position)
    if match is None:
        raise src.error("a name of letters, digits, '_' and '-' must follow '&' or '*'", position)
    end = _behind_blanks(src, match.end())
    if src.text[position] == "&" and src.text[end] in "&*":
        raise src.error("an anchor can't have another anchor or an alias behind it", end)
    return match[1], match.end()


def _anchored(
    src: YamlDocument, position: int, read: Callable[[int], tuple[YamlNode, int]]
) -> tuple[YamlNode, int]:
    """What `read` finds behind an anchor, which is kept for aliases."""
    name, start = _anchor(src, position)
    before = src.aliased
    node, end = read(start)
    src.anchors[name] = node, end - start + src.aliased - before
    return node, end


def _alias(src: YamlDocument, position: int) -> tuple[YamlNode, int]:
    name, end = _anchor(src, position)
    if name not in src.anchors:
        raise src.error(f"no anchor {name!r} before this alias", position)
    node, size = src.anchors[name]
    src.aliased += size
    if src.aliased > MAX_ALIASED:
        raise src.error(f"aliases stand for more than {MAX_ALIASED} characters", position)
    return node, end


def _flow_node(
    src: YamlDocument, position: int, indent: int, depth: int, in_flow: bool
) -> tuple[YamlNode, int]:
    """A node that ends on its line or in its brackets: all but block maps, lists and scalars."""
    if depth > MAX_YAML_DEPTH:
        raise src.error(f"nesting deeper than {MAX_YAML_DEPTH}", position)
    first = src.text[position]
    if first in "\"'":
        return _quoted_scalar(src, position)
    if first == "[":
        return _flow_list(src, position, depth + 1)
    if first == "{":
        return _flow_map(src, position, depth + 1)
    if first == "*":
        return _alias(src, position)
    if first == "&":
        return _anchored(
            src, position, lambda behind: _flow_value(src, behind, indent, depth, in_flow)
        )
    return _plain(src, position, indent, in_flow)


def _flow_value(
    src: YamlDocument, position: int, indent: int, depth: int, in_flow: bool
) -> tuple[YamlNode, int]:
    """A node in brackets, or nothing before a comma or the end of them."""
    start = _flow_token(src, position)
    if src.text[start] in ",]}":
        return _nothing(position), start
    return _flow_node(src, start, indent, depth, in_flow)


def _flow_entry(
    src: YamlDocument, position: int, depth: int
) -> tuple[YamlNode, YamlNode | None, int]:
    """A node in brackets, and the value behind its colon, if it has one."""
    node, end = _flow_node(src, position, -1, depth, True)
    colon = _behind_blanks(src, end)
    if src.text[colon] != ":" or "\n" in src.text[position:colon]:
        return node, None, end
    return node, *_flow_value(src, colon + 1, -1, depth, True)


def _flow_list(src: YamlDocument, position: int, depth: int) -> tuple[YamlList, int]:
    start = position
    items: list[YamlNode] = []
    position = _flow_token(src, position + 1)
    while src.text[position] != "]":
        item, value, end = _flow_entry(src, position, depth)
        if value is not None:  # [a: b] is [{a: b}]
            item = _map(src, _with_entry(src, {}, item, value), position)
        items.append(item)
        position = _flow_comma(src, end, "]")
    return YamlList(items, start), position + 1


def _flow_map(src: YamlDocument, position: int, depth: int) -> tuple[YamlMap, int]:
    start = position
    entries: _Entries = {}
    position = _flow_token(src, position + 1)
    while src.text[position] != "}":
        key, value, end = _flow_entry(src, position, depth)
        _with_entry(src, entries, key, value or _nothing(end))
        position = _flow_comma(src, end, "}")
    return _map(src, entries, start), position + 1


def _flow_comma(src: YamlDocument, position: int, bracket: str) -> int:
    """The next token behind a comma, or the bracket."""
    position = _flow_token(src, position)
    if src.text[position] == ",":
        return _flow_token(src, position + 1)
    if src.text[position] != bracket:
        raise src.expected(f"expected ',' or {bracket!r}", position)
    return position


# ==================================================================================================
# 45. Fields
# ==================================================================================================
#
# The problem: whoever writes a file wants to know everything that is wrong with it, and where. The
# idea: a walk over the tree of nodes, which asks for fields by name and type, notes faults and goes
# on; a file with any is refused as a whole. Each kind of file has a reader derived from this one.

Fields = dict[str, YamlNode]


class FaultyFile(ValueError):
    """A file with faults, each of which is `file:line:column: reason`."""

    def __init__(self, faults: Sequence[str]):
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


def is_null(node: YamlNode) -> bool:
    """Whether nothing is written here, or a word for it."""
    return isinstance(node, YamlScalar) and node.is_null


class FieldReader:
    """Reads fields, each as a type; a fault is noted, with its position, and reading goes on.

    `name` is how messages call the file. Raises FaultyFile if the text is not YAML.
    """

    def __init__(self, text: str | bytes, name: str):
        self.name = name
        self.faults: list[tuple[int, str]] = []
        try:
            self.document = parse_yaml(text)
        except YAMLError as error:
            raise FaultyFile([f"{name}:{error.line}:{error.column}: {error.reason}"]) from None

    def fault(self, node: YamlNode, reason: str) -> None:
        """Note that something is wrong with a node."""
        self.faults.append((node.position, reason))

    def finish(self) -> None:
        """Raise FaultyFile if there are faults."""
        if self.faults:
            raise FaultyFile(self.placed(self.faults))

    def placed(self, findings: list[tuple[int, str]]) -> tuple[str, ...]:
        """Findings in the order of the file; an alias may have led to one again."""
        places = ((*self.document.place(position), why) for position, why in sorted(set(findings)))
        return tuple(f"{self.name}:{line}:{column}: {why}" for line, column, why in places)

    def fields(self, node: YamlNode | None, what: str, known: Sequence[str]) -> Fields:
        """The fields of a map; faults are what is no map, and fields of other names."""
        entries = self.entries(node, what)
        for name, (key, value) in entries.items():
            if name not in known:
                self.unknown(key, value, what, known)
        return {name: value for name, (_, value) in entries.items()}

    def unknown(self, key: YamlScalar, value: YamlNode, what: str, known: Sequence[str]) -> None:
        """What is done about an unknown field."""
        reason = f"unknown field {_clipped(key.text)!r} in {what}; known are {', '.join(known)}"
        self.fault(key, reason)

    def entries(self, node: YamlNode | None, what: str) -> _Entries:
        """The keys and values of a map, whatever they are."""
        if isinstance(node, YamlMap):
            return node.entries
        if node is not None and not is_null(node):
            self.fault(node, f"{what} must be a map")
        return {}

    def items(self, fields: Fields, name: str) -> list[YamlNode]:
        """The items of a list."""
        node = fields.get(name)
        if isinstance(node, YamlList):
            return node.items
        if node is not None and not is_null(node):
            self.fault(node, f"{name!r} must be a list")
        return []

    def scalar(self, node: YamlNode | None, what: str) -> str | None:
        """The text of a scalar, None where there is none."""
        if isinstance(node, YamlScalar):
            return None if node.is_null else node.text
        if node is not None:
            self.fault(node, f"{what!r} must be text")
        return None

    def text(self, fields: Fields, name: str) -> str:
        """A text, "" where there is none."""
        return self.scalar(fields.get(name), name) or ""

    def read(self, fields: Fields, name: str, read: Callable[[str], _T], missing: _T) -> _T:
        """A field read by a function that raises ValueError; `missing` where there is none."""
        text = self.scalar(fields.get(name), name)
        try:
            return missing if text is None else read(text)
        except ValueError as error:
            self.fault(fields[name], str(error))
            return missing

    def duration_ms(self, fields: Fields, name: str) -> int:
        """A duration, 0 where there is none."""
        return self.read(fields, name, _read_duration_ms, 0)


def _read_duration_ms(text: str) -> int:
    return 0 if text == "0" else parse_duration_ms(text)


# ==================================================================================================
# 46. Rule files
# ==================================================================================================
#
# The problem: rules are written for Prometheus, and a fault in an expression should be known before
# it is evaluated. The idea: expressions and templates are checked when the file is read. Nodes know
# their places, so a fault inside an expression has its line and column in the file.
#
# What Prometheus 3 accepts is accepted: labels and recorded names of any UTF-8, labels of groups.
#
# The source: https://prometheus.io/docs/prometheus/latest/configuration/recording_rules/

_GROUP_FIELDS = ("name", "interval", "limit", "query_offset", "labels", "rules")
_RULE_FIELDS = (
    "record", "alert", "expr", "for", "keep_firing_for", "labels", "annotations",
)  # fmt: skip
_RECORDED = re.compile(r"[^\x00-\x1f\x7f-\x9f{}]+")  # braces: an expression went astray
_ONLY_OF_ALERTS = ("for", "keep_firing_for", "annotations")


class Rule(NamedTuple):
    """A recording rule or an alerting rule."""

    name: str  # of the recorded series, or of the alert
    is_alert: bool
    expr: str
    for_ms: int
    keep_firing_for_ms: int
    labels: dict[str, str]  # of an alert, templates; so are its annotations
    annotations: dict[str, str]
    line: int


class RuleGroup(NamedTuple):
    """Rules that are evaluated together, one after the other."""

    name: str
    interval_ms: int  # 0: what the server has as its own
    limit: int  # of the results of a rule; 0: none
    query_offset_ms: int
    labels: dict[str, str]
    rules: tuple[Rule, ...]


class RuleFile(NamedTuple):
    """The groups of a rule file, and what is odd in it, as `file:line:column: reason`."""

    name: str
    groups: tuple[RuleGroup, ...]
    warnings: tuple[str, ...]


def read_rules(
    text: str | bytes, name: str, check_template: Callable[[str], object] = str
) -> RuleFile:
    """Read a rule file of Prometheus, as YAML or JSON. Raises FaultyFile, with every fault.

    `name` is how messages call the file. `check_template` is called with each label and annotation
    of an alert, and raises ValueError if it is no template.

    >>> text = "groups: [{name: a, rules: [{record: 'b', expr: sum(up)}]}]"
    >>> read_rules(text, "a.yml").groups[0].rules[0].expr
    'sum(up)'
    >>> read_rules(text.replace("sum", "sun"), "a.yml")
    Traceback (most recent call last):
    metricstream.FaultyFile: a.yml:1:48: parse error: unknown function with name "sun"
    """
    return _RuleReader(text, name, check_template).rule_file()


class _RuleReader(FieldReader):
    def __init__(self, text: str | bytes, name: str, check_template: Callable[[str], object] = str):
        super().__init__(text, name)
        self._check_template = check_template
        self._warnings: list[tuple[int, str]] = []
        self._seen: dict[object, int] = {}  # lines of groups by name, and of rules by what they set

    def rule_file(self) -> RuleFile:
        if self.document.has_more:
            self._warnings.append((1, "only the first document of this file is read"))
        root = self.fields(self.document.root, "a rule file", ("groups",))
        groups = tuple(map(self._group, self.items(root, "groups")))
        self.finish()
        return RuleFile(self.name, groups, self.placed(self._warnings))

    def _group(self, node: YamlNode) -> RuleGroup:
        fields = self.fields(node, "a group", _GROUP_FIELDS)
        name = self.text(fields, "name")
        line, _ = self.document.place(node.position)
        if not name:
            self.fault(node, "a group needs a name")
        elif name in self._seen:
            where = f"stands in line {self._seen[name]} already"
            self.fault(fields["name"], f"group {_clipped(name)!r} {where}")
        self._seen.setdefault(name, line)
        labels = self.labels(fields, "labels")
        rules = tuple(self._rule(rule, labels) for rule in self.items(fields, "rules"))
        return RuleGroup(
            name, self.duration_ms(fields, "interval"), self._whole_number(fields, "limit"),
            self.duration_ms(fields, "query_offset"), labels, rules,
        )  # fmt: skip

    def _rule(self, node: YamlNode, group_labels: dict[str, str]) -> Rule:
        fields = self.fields(node, "a rule", _RULE_FIELDS)
        record, alert = self.text(fields, "record"), self.text(fields, "alert")
        if bool(record) == bool(alert):
            self.fault(node, "a rule needs 'record' or 'alert', and not both")
        rule = Rule(
            alert or record, bool(alert), self._expression(fields, node),
            self.duration_ms(fields, "for"), self.duration_ms(fields, "keep_firing_for"),
            self.labels(fields, "labels"), self.labels(fields, "annotations"),
            self.document.place(node.position)[0],
        )  # fmt: skip
        if alert:
            for field in ("labels", "annotations"):
                self._templates(fields.get(field))
        elif record:
            self._recording(fields, rule)
        key = (rule.name, tuple(sorted({**group_labels, **rule.labels}.items())))
        if key in self._seen:
            reason = f"the rule of line {self._seen[key]} has the same name and labels"
            self._warnings.append((node.position, reason))
        self._seen.setdefault(key, rule.line)
        return rule

    def _recording(self, fields: Fields, rule: Rule) -> None:
        """What holds for recording rules alone."""
        for field, value in zip(
            _ONLY_OF_ALERTS, (rule.for_ms, rule.keep_firing_for_ms, rule.annotations)
        ):
            if value:
                self.fault(fields[field], f"a recording rule can't have {field!r}")
        if len(rule.name) > MAX_NAME_LENGTH or not _RECORDED.fullmatch(rule.name):
            reason = f"{_clipped(rule.name)!r} is no name for a metric"
            self.fault(fields["record"], reason)

    def _expression(self, fields: Fields, rule: YamlNode) -> str:
        expr = self.text(fields, "expr")
        node = fields.get("expr", rule)
        if not expr:
            self.fault(node, "a rule needs an expression, 'expr'")
        elif isinstance(node, YamlScalar):
            try:
                parse_query(expr)
            except QueryError as error:
                # inside of the expression, turned into a place in the file
                lines = expr.split("\n")[: error.line - 1]
                offset = sum(len(line) + 1 for line in lines) + error.column - 1
                reason = str(error).removeprefix(f"{error.line}:{error.column}: ")
                self.faults.append((node.position_of(offset), reason))
        return expr

    def _templates(self, node: YamlNode | None) -> None:
        for _, value in node.entries.values() if isinstance(node, YamlMap) else ():
            if isinstance(value, YamlScalar):
                try:
                    self._check_template(value.text)
                except ValueError as error:
                    self.fault(value, str(error))

    def items(self, fields: Fields, name: str) -> list[YamlNode]:
        """Those that are not null."""
        return [item for item in super().items(fields, name) if not is_null(item)]

    def _whole_number(self, fields: Fields, name: str) -> int:
        text, node = self.scalar(fields.get(name), name), fields.get(name)
        if text is None or not isinstance(node, YamlScalar):
            return 0
        try:
            number = int(_number_of(text))
        except ValueError:
            number = 2**63
        if not node.plain or abs(number) >= 2**63:
            self.fault(node, f"{name!r} must be a whole number")
        return number

    def labels(self, fields: Fields, name: str) -> dict[str, str]:
        """Labels of a group or a rule, or its annotations."""
        labels = {}
        for label, (key, value) in self.entries(fields.get(name), f"{name!r}").items():
            if not label or (label == NAME and name == "labels"):
                self.fault(key, f"{_clipped(label)!r} is no name for a label")
            labels[label] = self.scalar(value, label) or ""
        return labels


# ==================================================================================================
# 47. Values of templates
# ==================================================================================================
#
# The problem: what a template prints must not differ by a character from what Go prints. The idea:
# a template sees values of Python that stand for Go's types, and objects made for it, never an
# attribute of Python. Each type carries the name that Go has for it, so that a mistake is told in
# the words that people find when they search for it. What it costs: Go's times and layouts, written
# once more, and in the next chapter its verbs.
#
# Source: https://pkg.go.dev/time.

MAX_TEMPLATE_STEPS = 200_000  # of one execution: nodes, arguments, and every 16 characters
MAX_TEMPLATE_DEPTH = 64  # of parentheses, of blocks, and of templates that call templates
MAX_TEMPLATE_OUTPUT = 1 << 20  # characters
QUERY_STEPS = 1_000  # what a call of `query` counts for
REGEX_STEPS = 100

# Prometheus puts this in front of every template of a rule; places in its errors count it.
ALERT_VARIABLES = (
    "{{$labels := .Labels}}{{$externalLabels := .ExternalLabels}}"
    "{{$externalURL := .ExternalURL}}{{$value := .Value}}"
)


class TemplateError(ValueError):
    """A template that can't be parsed or executed: where, and why, in the words of Go."""


class TemplateFunction(NamedTuple):
    """What a template may call; the same for methods, whose first argument is the object."""

    takes: str  # names of types as Go has them; `any`, and `...any` for any number of them
    call: Callable[..., Any]
    steps: int = 1
    is_metered: bool = False  # `call` gets a function before the arguments that spends more steps


class TemplateStruct:
    """An object with fields, and methods if a subclass has some.

    A dict or a list can have methods, too, and a name of its own: a subclass has the same two
    attributes, `type_name` and `methods`.
    """

    methods: ClassVar[Mapping[str, TemplateFunction]] = {}

    def __init__(self, type_name: str, fields: Mapping[str, Any]) -> None:
        self.type_name = type_name  # as Go has it
        self.fields = fields


class _AnyMap(dict[str, Any]):
    type_name = "map[string]interface {}"


class _QueryResult(list[TemplateStruct]):
    type_name = "template.queryResult"


class _HTML(str):
    type_name = "template.HTML"


class _Byte(int):
    type_name = "uint8"


class _Month(int):
    type_name = "time.Month"
    names = calendar.month_name


class _Weekday(int):
    type_name = "time.Weekday"
    names = (calendar.day_name[6], *calendar.day_name[:6])


_TYPE_NAMES = {
    type(None): "<nil>", bool: "bool", int: "int", float: "float64", str: "string",
    dict: "map[string]string", list: "[]string",
    datetime.datetime: "time.Time", datetime.timedelta: "time.Duration",
}  # fmt: skip


def _type_name(value: Any) -> str:
    return getattr(value, "type_name", None) or _TYPE_NAMES.get(type(value), "interface {}")


def _is_true(value: Any) -> bool:
    return isinstance(value, TemplateStruct | datetime.datetime) or bool(value)


def _entry(mapping: dict[str, Any], key: str) -> Any:
    """What a map has at a key; without one the zero of its type."""
    return mapping.get(key, None if isinstance(mapping, _AnyMap) else "")


# ---- times: as Go writes and lays them out ----

_SECOND, _MICROSECOND = datetime.timedelta(seconds=1), datetime.timedelta(microseconds=1)
_LAYOUT = re.compile(
    r"January|Jan(?![a-z])|Monday|Mon(?![a-z])|MST|2006|[-Z]07(?::00(?::00)?|00(?:00)?)?"
    r"|[.,](?:0+|9+)(?![0-9])|002|01|02|03|04|05|06|15|PM|pm|__2|_2(?!006)|[12345]"
)


def _offset(time: datetime.datetime, form: str) -> str:
    """As `-0700`, `-07:00:00` and the like ask for it; with a Z in front UTC is a Z alone."""
    seconds = round((time.utcoffset() or datetime.timedelta()).total_seconds())
    if form[0] == "Z" and not seconds:
        return "Z"
    parts = abs(seconds) // 3600, abs(seconds) // 60 % 60, abs(seconds) % 60
    colon = ":" if ":" in form else ""
    shown = colon.join(f"{part:02d}" for part in parts[: (len(form) - form.count(":") - 1) // 2])
    return ("-" if seconds < 0 else "+") + shown


_LAYOUT_PARTS: dict[str, Callable[[datetime.datetime], str]] = {
    "January": lambda t: calendar.month_name[t.month],
    "Jan": lambda t: calendar.month_abbr[t.month],
    "Monday": lambda t: calendar.day_name[t.weekday()],
    "Mon": lambda t: calendar.day_abbr[t.weekday()],
    "MST": lambda t: t.tzname() or "",
    "2006": lambda t: f"{t.year:04d}",
    "002": lambda t: f"{t.timetuple().tm_yday:03d}",
    "01": lambda t: f"{t.month:02d}",
    "02": lambda t: f"{t.day:02d}",
    "03": lambda t: f"{(t.hour - 1) % 12 + 1:02d}",
    "04": lambda t: f"{t.minute:02d}",
    "05": lambda t: f"{t.second:02d}",
    "06": lambda t: f"{t.year % 100:02d}",
    "15": lambda t: f"{t.hour:02d}",
    "PM": lambda t: "PM" if t.hour >= 12 else "AM",
    "pm": lambda t: "pm" if t.hour >= 12 else "am",
    "_2": lambda t: f"{t.day:2d}",
    "__2": lambda t: f"{t.timetuple().tm_yday:3d}",
    "1": lambda t: str(t.month),
    "2": lambda t: str(t.day),
    "3": lambda t: str((t.hour - 1) % 12 + 1),
    "4": lambda t: str(t.minute),
    "5": lambda t: str(t.second),
}


def _laid_out(time: datetime.datetime, layout: str) -> str:
    def part(match: re.Match[str]) -> str:
        word = match[0]
        if word in _LAYOUT_PARTS:
            return _LAYOUT_PARTS[word](time)
        if word[0] in "-Z":
            return _offset(time, word)
        digits = f"{time.microsecond:06d}".ljust(9, "0")[: len(word) - 1]
        digits = digits.rstrip("0") if word[1] == "9" else digits
        return word[0] + digits if digits else ""

    return _LAYOUT.sub(part, layout)


def _time_text(time: datetime.datetime) -> str:
    return _laid_out(time, "2006-01-02 15:04:05.999999999 -0700 MST")


def _duration_of(nanoseconds: int) -> datetime.timedelta:
    return datetime.timedelta(microseconds=nanoseconds // 1000)


def _nanoseconds(duration: datetime.timedelta) -> int:
    return duration // _MICROSECOND * 1000


def _duration_text_of(duration: datetime.timedelta) -> str:
    """As Go writes it: 1h2m3.5s, 1.5ms.

    >>> _duration_text_of(datetime.timedelta(minutes=61, milliseconds=1500))
    '1h1m1.5s'
    """
    microseconds = abs(duration // _MICROSECOND)
    sign = "-" if duration < datetime.timedelta() else ""
    for unit, size in (("µs", 1), ("ms", 1000)):
        if 0 < microseconds < size * 1000:
            return f"{sign}{decimal_text(microseconds / size)}{unit}"
    minutes, rest = divmod(microseconds, 60_000_000)
    text = f"{decimal_text(rest / 1_000_000)}s"
    if minutes:
        text = f"{minutes // 60}h{minutes % 60}m{text}" if minutes >= 60 else f"{minutes}m{text}"
    return sign + text


_TIME_METHODS = {
    "Add": TemplateFunction("time.Duration", lambda time, duration: time + duration),
    "After": TemplateFunction("time.Time", lambda time, other: time > other),
    "Before": TemplateFunction("time.Time", lambda time, other: time < other),
    "Day": TemplateFunction("", lambda time: time.day),
    "Equal": TemplateFunction("time.Time", operator.eq),
    "Format": TemplateFunction("string", _laid_out),
    "Hour": TemplateFunction("", lambda time: time.hour),
    "IsZero": TemplateFunction("", lambda time: time.year == 1),
    "Local": TemplateFunction("", lambda time: time.astimezone()),
    "Minute": TemplateFunction("", lambda time: time.minute),
    "Month": TemplateFunction("", lambda time: _Month(time.month)),
    "Nanosecond": TemplateFunction("", lambda time: time.microsecond * 1000),
    "Second": TemplateFunction("", lambda time: time.second),
    "String": TemplateFunction("", _time_text),
    "Sub": TemplateFunction("time.Time", lambda time, other: time - other),
    "UTC": TemplateFunction("", lambda time: time.astimezone(datetime.UTC)),
    "Unix": TemplateFunction("", lambda time: (time - UNIX_EPOCH) // _SECOND),
    "UnixMilli": TemplateFunction("", lambda time: (time - UNIX_EPOCH) // (_SECOND / 1000)),
    "Weekday": TemplateFunction("", lambda time: _Weekday(time.isoweekday() % 7)),
    "Year": TemplateFunction("", lambda time: time.year),
    "YearDay": TemplateFunction("", lambda time: time.timetuple().tm_yday),
}
_DURATION_METHODS = {
    "Hours": TemplateFunction("", lambda duration: duration / datetime.timedelta(hours=1)),
    "Minutes": TemplateFunction("", lambda duration: duration / datetime.timedelta(minutes=1)),
    "Seconds": TemplateFunction("", lambda duration: duration / datetime.timedelta(seconds=1)),
    "String": TemplateFunction("", _duration_text_of),
}
_METHODS = {datetime.datetime: _TIME_METHODS, datetime.timedelta: _DURATION_METHODS}


# ==================================================================================================
# 48. Formats of templates
# ==================================================================================================
#
# What `printf` and `print` write, for every verb, flag and kind of value: Go's fmt package once
# more. A verb that is not for a value is told in the text itself, as `%!d(string=x)`.
#
# Source: https://pkg.go.dev/fmt and its print.go and format.go, whose order of events this keeps.


class _Verb(NamedTuple):
    """What stands behind a % sign."""

    letter: str
    flags: str = ""  # of "-+# 0", and those below
    width: int = 0
    precision: int | None = None


# `+` and `#` mean something else for `%v`, and must not reach the numbers within a list.
_NAMES_FIELDS, _GO_SYNTAX = "P", "S"
_OF_V = str.maketrans("+#", _NAMES_FIELDS + _GO_SYNTAX)
_AS_V = _Verb("v")
_SHOWN = _Verb("v", "*")  # what a pointer points to, without the `&` that fmt puts before it


class _Output:
    """Collects what is printed, bounded in its size and in the depth of values."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.room = MAX_TEMPLATE_OUTPUT

    def add(self, text: str) -> None:
        self.room -= len(text)
        if self.room < 0:
            raise ValueError(f"more than {MAX_TEMPLATE_OUTPUT} characters")
        self.pieces.append(text)

    def value(self, value: Any, form: _Verb = _AS_V, depth: int = 0) -> None:
        if depth > MAX_TEMPLATE_DEPTH:
            raise ValueError("value nested too deeply")
        if value is None and depth:
            self.add("interface {}(nil)" if _GO_SYNTAX in form.flags else "<nil>")
        elif form.letter == "T" and value is not None:
            self.add(_padded(_type_name(value)[: form.precision], form))
        elif isinstance(value, dict | list | TemplateStruct) and not (
            form.letter in "pw" or (depth and form.letter != "v" and _type_name(value)[0] == "*")
        ):
            self.composite(value, form, depth)
        elif (text := _scalar_text(value, form)) is not None:
            self.add(text)
        else:
            self.add(f"%!{form.letter}({_type_name(value)}")
            if value is not None:
                self.add("=")
                self.value(value, form._replace(letter="v"), depth)
            self.add(")")

    def composite(self, value: Any, form: _Verb, depth: int) -> None:
        type_name, flags = _type_name(value), form.flags
        begin, separator, end = "[", " ", "]"
        items: Iterable[tuple[Any, Any]]
        if isinstance(value, list):
            items = ((None, item) for item in value)
        elif isinstance(value, dict):
            begin, items = "map[", sorted(value.items())
        else:
            names_fields = _NAMES_FIELDS in flags or _GO_SYNTAX in flags
            items = ((name if names_fields else None, item) for name, item in value.fields.items())
            begin, end = "{", "}"
        if _GO_SYNTAX in flags:
            begin, separator, end = type_name.lstrip("*") + "{", ", ", "}"
        self.add("&" if type_name[0] == "*" and "*" not in flags else "")
        self.add(begin)
        for index, (name, item) in enumerate(items):
            self.add(separator if index else "")
            if isinstance(value, dict):
                self.value(name, form, depth + 1)
                self.add(":")
            elif name is not None:
                self.add(f"{name}:")
            self.value(item, form, depth + 1)
        self.add(end)

    def text(self) -> str:
        return "".join(self.pieces)


def _scalar_text(value: Any, form: _Verb) -> str | None:
    """A value that is not made of others; None if the verb is not for its type."""
    verb = form.letter
    if isinstance(value, datetime.datetime) and verb in "vsqxX":
        value = _time_text(value)
    elif isinstance(value, datetime.timedelta):
        value = _duration_text_of(value) if verb in "vsqxX" else _nanoseconds(value)
    elif isinstance(value, _Month | _Weekday) and verb in "vsqxX":
        value = value.names[value]
    if value is None:
        return _padded("<nil>", form) if verb in "vT" else None
    if isinstance(value, bool):
        return _padded("true" if value else "false", form) if verb in "tv" else None
    if isinstance(value, int):
        return _integer_text(value, form)
    if isinstance(value, float):
        return _float_text(value, form) if verb in "bxXeEfFgGv" else None
    return _string_text(value, form) if isinstance(value, str) else None


def _padded(text: str, form: _Verb) -> str:
    if "-" in form.flags:
        return text.ljust(form.width)
    return text.rjust(form.width, "0" if "0" in form.flags else " ")


def _without_zeros(form: _Verb) -> _Verb:
    return form._replace(flags=form.flags.replace("0", ""))


def _string_text(text: str, form: _Verb) -> str | None:
    verb, flags, _, precision = form
    if verb in "xX":
        octets = text.encode(errors="surrogateescape")[:precision]
        prefix = "0x" if "#" in flags else ""
        separator = f" {prefix}" if " " in flags else ""
        digits = prefix + separator.join(f"{octet:02x}" for octet in octets) if octets else ""
        return _padded(digits.upper() if verb == "X" else digits, form)
    text = text[:precision]
    if verb == "q" or (verb == "v" and _GO_SYNTAX in flags):
        is_raw = "#" in flags and not _NOT_RAW.search(text)
        text = f"`{text}`" if is_raw else f'"{_escaped_for(text, flags)}"'
    elif verb not in "sv":
        return None
    return _padded(text, form)


_NOT_RAW = re.compile("[`\x00-\x08\x0a-\x1f\x7f\ufeff\ud800-\udfff]")


def _escaped_for(text: str, flags: str) -> str:
    """As it stands within quotes; with `+` in ASCII alone."""
    escaped = "".join(map(_go_escaped, text))
    if "+" in flags and not escaped.isascii():
        escaped = "".join(c if c.isascii() else _code_escape(c) for c in escaped)
    return escaped


def _code_escape(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if letter < "\U00010000" else f"\\U{ord(letter):08x}"


_BASES = {"d": "d", "v": "d", "b": "b", "o": "o", "O": "o", "x": "x", "X": "X"}
_PREFIXES = {"b": "0b", "o": "0", "O": "0", "x": "0x", "X": "0X"}


def _integer_text(value: int, form: _Verb) -> str | None:
    verb, flags, width, precision = form
    if verb in "cqU":
        return _character_text(value, form)
    if verb not in _BASES:
        return None
    if precision == 0 and value == 0:
        return " " * width
    sign = "-" if value < 0 else "+" if "+" in flags else " " if " " in flags else ""
    digits = format(abs(value), _BASES[verb])
    if precision is not None:
        digits = digits.rjust(precision, "0")
    elif "0" in flags:
        digits = digits.rjust(width - len(sign), "0")
    prefix = _PREFIXES.get(verb, "") if "#" in flags else ""
    if prefix == "0" and digits.startswith("0"):
        prefix = ""
    prefix = "0o" + prefix if verb == "O" else prefix
    return _padded(sign + prefix + digits, _without_zeros(form))


def _character_text(code: int, form: _Verb) -> str:
    is_character = 0 <= code <= 0x10FFFF and not 0xD800 <= code < 0xE000
    character = chr(code) if is_character else "\ufffd"
    if form.letter == "c":
        return _padded(character, form)
    if form.letter == "q":
        inner = {"'": "\\'", '"': '"'}.get(character) or _escaped_for(character, form.flags)
        return _padded(f"'{inner}'", form)
    text = f"U+{code & 0xFFFFFFFFFFFFFFFF:0{max(4, form.precision or 0)}X}"
    if "#" in form.flags and is_character and character.isprintable():
        text += f" '{character}'"
    return _padded(text, _without_zeros(form))


def _float_text(value: float, form: _Verb) -> str:
    verb, flags, width, precision = form
    sign = "-" if math.copysign(1, value) < 0 and value == value else "+"
    if sign == "+" and "+" not in flags:
        sign = " " if " " in flags else ""
    if not math.isfinite(value):
        text = "NaN" if value != value else sign + "Inf" if sign else "+Inf"
        text = sign + text if value != value else text
        return _padded(text, _without_zeros(form))
    text = _digits_of(abs(value), "g" if verb == "v" else verb, precision)
    if "#" in flags and verb != "b":
        text = _with_point(text, verb, precision)
    if "0" in flags:
        text = text.rjust(width - len(sign), "0")
    return _padded(sign + text, _without_zeros(form))


def _digits_of(value: float, verb: str, precision: int | None) -> str:
    if verb == "b":
        exponent = max(math.frexp(value)[1] - 53, -1074)
        return f"{int(math.ldexp(value, -exponent))}p{exponent:+d}" if value else "0p-1074"
    if verb in "xX":
        text = _hexadecimal_text(value, precision)
        return text.upper() if verb == "X" else text
    if precision is None and verb in "gG":
        text = shortest_text(value)
        return text.upper() if verb == "G" else text
    return format(value, f".{6 if precision is None else precision}{verb}")


def _hexadecimal_text(value: float, precision: int | None) -> str:
    """The digits of `%x`: 0x1.8p+00."""
    mantissa, exponent = math.frexp(value)
    number, places = int(math.ldexp(mantissa, 53)), 13  # 1 and 52 bits behind the point
    if precision is not None and precision < places:
        # to even, as `round` does
        number, places = round(fractions.Fraction(number, 16 ** (13 - precision))), precision
    if number >= 2 * 16**places:
        number, exponent = number // 2, exponent + 1
    digits = f"{number:0{places + 1}x}"
    head, tail = digits[0], digits[1:].ljust(precision or 0, "0")
    tail = tail.rstrip("0") if precision is None else tail
    return f"0x{head}{'.' if tail else ''}{tail}p{exponent - 1 if value else 0:+03d}"


def _with_point(text: str, verb: str, precision: int | None) -> str:
    """With `#` a number has a point, and zeros up to its precision."""
    marks = "pP" if verb in "xX" else "eE"
    end = next((place for place, letter in enumerate(text) if letter in marks), len(text))
    number = text[:end]
    digits = (6 if precision is None else precision) if verb in "vgGx" else 0
    digits -= len(number.replace(".", "").lstrip("0"))
    if "." not in number:
        digits -= number == "0"
        number += "."
    return number + "0" * digits + text[end:]


_VERB = re.compile(
    r"""%(?P<flags>[-+#\ 0]*)
        (?P<index>\[(?:[^\]]{0,99}\])?)? (?P<width>\*|[0-9]*)
        (?:\. (?P<index2>\[(?:[^\]]{0,99}\])?)? (?P<precision>\*|[0-9]*) )?
        (?P<index3>\[(?:[^\]]{0,99}\])?)? (?P<verb>.?)""",
    re.DOTALL | re.VERBOSE,
)
_VERB_INDEX = re.compile(r"\[([0-9]{1,7})\]")
MAX_PRINTF_WIDTH = 1_000_000  # as Go's fmt has it


class _Printf:
    """One call of `printf`: which value is next, and what is wrong with the format."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values, self.index = values, 0
        self.is_reordered = False
        self.output = _Output()

    def run(self, format: str) -> str:
        place = 0
        for match in _VERB.finditer(format):
            self.output.add(format[place : match.start()])
            place = match.end()
            self.verb(match)
        self.output.add(format[place:])
        rest = self.values[self.index :]
        if rest and not self.is_reordered:
            self.output.add("%!(EXTRA ")
            for number, value in enumerate(rest):
                self.output.add(", " if number else "")
                self.output.add(_type_name(value) + ("=" if value is not None else ""))
                if value is not None:
                    self.output.value(value)
            self.output.add(")")
        return self.output.text()

    def verb(self, match: re.Match[str]) -> None:
        flags, letter = match["flags"], match["verb"]
        is_good = self.jump(match["index"])
        width = self.number(match["width"], "BADWIDTH") or 0
        if width < 0:
            flags, width = flags + "-", -width
        is_good &= not (match["index"] and match["width"].isdigit())
        is_good &= not (match["index"] and match["width"] != "*" and match["precision"] is not None)
        is_good &= self.jump(match["index2"])
        precision = self.number(match["precision"], "BADPREC")
        if precision is not None and precision < 0:
            precision = None
            self.output.add("%!(BADPREC)")
        is_good &= self.jump(match["index3"])
        if "-" in flags:
            flags = flags.replace("0", "")
        if letter == "v":
            flags = flags.translate(_OF_V)
        if not letter:
            self.output.add("%!(NOVERB)")
        elif letter == "%":
            self.output.add("%")
        elif not is_good:
            self.output.add(f"%!{letter}(BADINDEX)")
        elif self.index >= len(self.values):
            self.output.add(f"%!{letter}(MISSING)")
        else:
            form = _Verb(letter, flags, width, precision)
            self.output.value(self.values[self.index], form)
            self.index += 1

    def jump(self, index: str | None) -> bool:
        """To the value that an index such as `[2]` names; False if there is none."""
        if index is None:
            return True
        self.is_reordered = True
        match = _VERB_INDEX.fullmatch(index)
        if match and 1 <= int(match[1]) <= len(self.values):
            self.index = int(match[1]) - 1
            return True
        return False

    def number(self, text: str | None, fault: str) -> int | None:
        """A width or a precision, from the format or for `*` from the values."""
        if text is None:
            return None
        if text != "*":
            return min(int(text[:8] or 0), MAX_TEMPLATE_OUTPUT + 1)
        value = self.values[self.index] if self.index < len(self.values) else None
        self.index += self.index < len(self.values)
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and abs(value) <= MAX_PRINTF_WIDTH
        ):
            return value
        self.output.add(f"%!({fault})")
        return None


def _go_printf(format: str, *values: Any) -> str:
    return _Printf(values).run(format)


def _go_print(*values: Any, spaces: bool = False, end: str = "", form: _Verb = _AS_V) -> str:
    """All values; between two of them a space, always or if neither is a string."""
    printer = _Output()
    for index, value in enumerate(values):
        apart = not isinstance(value, str) and not isinstance(values[index - 1], str)
        printer.add(" " if index and (spaces or apart) else "")
        printer.value(value, form)
    printer.add(end)
    return printer.text()


def _printed(*values: Any) -> str:
    return _go_print(*("<no value>" if value is None else value for value in values), form=_SHOWN)


# ==================================================================================================
# 49. Functions of templates
# ==================================================================================================
#
# What every template may call: the functions that Go has. A function is a row with the types of its
# arguments, and raises ValueError for what it can't do.
#
# Source: https://pkg.go.dev/text/template and its funcs.go.


def _basic(value: Any) -> tuple[str, Any]:
    """The kind of a value that can be compared, and what to compare."""
    if isinstance(value, datetime.timedelta):
        return "int", _nanoseconds(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value
    kind = "string" if isinstance(value, str) else _type_name(value)
    return (kind if kind in ("bool", "int", "float64", "string") else ""), value


def _equal(value: Any, *others: Any) -> bool:
    if not others:
        raise ValueError("missing argument for comparison")
    kind, left = _basic(value)
    for other in others:
        other_kind, right = _basic(other)
        if kind == other_kind:
            if value is not None and isinstance(other, dict | list | TemplateStruct):
                raise ValueError(f"non-comparable type {_go_print(value)}: {_type_name(value)}")
            if left == right:
                return True
        elif value is not None and other is not None:
            raise ValueError("incompatible types for comparison")
    return False


def _less(value: Any, other: Any) -> bool:
    (kind, left), (other_kind, right) = _basic(value), _basic(other)
    if not kind or not other_kind or kind == other_kind == "bool":
        raise ValueError("invalid type for comparison")
    if kind != other_kind:
        raise ValueError("incompatible types for comparison")
    return bool(left < right)


def _less_or_equal(value: Any, other: Any) -> bool:
    return _less(value, other) or _equal(value, other)


def _bytes_of(text: str) -> bytes:
    """What Go counts and cuts: a string is bytes."""
    return text.encode(errors="surrogateescape")


def _index_of(index: object, size: int) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        what = "nil" if index is None else f"type {_type_name(index)}"
        raise ValueError(f"cannot index slice/array with {what}")
    if not 0 <= index <= size:
        raise ValueError(f"index out of range: {index}")
    return index


def _indexed(value: Any, *indexes: Any) -> Any:
    if value is None:
        raise ValueError("index of untyped nil")
    for index in indexes:
        if isinstance(value, dict):
            if not isinstance(index, str):
                what = "value is nil" if index is None else f"value has type {_type_name(index)}"
                raise ValueError(f"{what}; should be {'of type ' * (index is None)}string")
            value = _entry(value, index)
        elif isinstance(value, str | list):
            items = _bytes_of(value) if isinstance(value, str) else value
            place = _index_of(index, len(items))
            if place == len(items):
                kind = "string" if isinstance(value, str) else "slice"
                raise ValueError(f"reflect: {kind} index out of range")
            value = _Byte(items[place]) if isinstance(value, str) else items[place]
        else:
            raise ValueError(f"can't index item of type {_type_name(value)}")
    return value


def _sliced(value: Any, *indexes: Any) -> Any:
    if value is None:
        raise ValueError("slice of untyped nil")
    if len(indexes) > 3:
        raise ValueError(f"too many slice indexes: {len(indexes)}")
    if not isinstance(value, str | list):
        raise ValueError(f"can't slice item of type {_type_name(value)}")
    if isinstance(value, str) and len(indexes) == 3:
        raise ValueError("cannot 3-index slice a string")
    items = _bytes_of(value) if isinstance(value, str) else value
    bounds = [_index_of(index, len(items)) for index in indexes]
    bounds += [0, len(items)][len(bounds) :]
    for low, high in itertools.pairwise(bounds):
        if low > high:
            raise ValueError(f"invalid slice index: {low} > {high}")
    found = items[bounds[0] : bounds[1]]
    return (
        found.decode(errors="surrogateescape") if isinstance(found, bytes) else type(value)(found)
    )


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(_bytes_of(value))
    if isinstance(value, dict | list):
        return len(value)
    if value is None:
        raise ValueError("reflect: call of reflect.Value.Type on zero Value")
    raise ValueError(f"len of type {_type_name(value)}")


def _not_callable(value: Any, *_: Any) -> NoReturn:
    raise ValueError(
        "call of nil" if value is None else f"non-function of type {_type_name(value)}"
    )


_HTML_ESCAPES = str.maketrans(
    {'"': "&#34;", "'": "&#39;", "&": "&amp;", "<": "&lt;", ">": "&gt;", "\0": "\ufffd"}
)
_JS_UNSAFE = re.compile(r"[\\'\"<>&=\x00-\x1f]|[^\x00-\x7f]")
_JS_ESCAPES = {"\\": "\\\\", "'": "\\'", '"': '\\"'}


def _js_escaped(match: re.Match[str]) -> str:
    letter = match[0]
    if letter.isprintable() and not letter.isascii():
        return letter
    return _JS_ESCAPES.get(letter) or f"\\u{ord(letter):04X}"


def _query_escaped(text: str) -> str:
    return urllib.parse.quote_plus(text, errors="surrogateescape")


# A call of these ends with the first argument that decides.
_AND = TemplateFunction("any ...any", lambda *values: values[-1])
_OR = TemplateFunction("any ...any", lambda *values: values[-1])
_GO_FUNCTIONS = {
    "and": _AND,
    "or": _OR,
    "not": TemplateFunction("any", lambda value: not _is_true(value)),
    "eq": TemplateFunction("any ...any", _equal),
    "ne": TemplateFunction("any any", lambda value, other: not _equal(value, other)),
    "lt": TemplateFunction("any any", _less),
    "le": TemplateFunction("any any", _less_or_equal),
    "gt": TemplateFunction("any any", lambda value, other: not _less_or_equal(value, other)),
    "ge": TemplateFunction("any any", lambda value, other: not _less(value, other)),
    "len": TemplateFunction("any", _length),
    "index": TemplateFunction("any ...any", _indexed),
    "slice": TemplateFunction("any ...any", _sliced),
    "call": TemplateFunction("any ...any", _not_callable),
    "print": TemplateFunction("...any", _go_print),
    "printf": TemplateFunction("string ...any", _go_printf),
    "println": TemplateFunction("...any", partial(_go_print, spaces=True, end="\n")),
    "html": TemplateFunction("...any", lambda *values: _printed(*values).translate(_HTML_ESCAPES)),
    "js": TemplateFunction(
        "...any", lambda *values: _JS_UNSAFE.sub(_js_escaped, _printed(*values))
    ),
    "urlquery": TemplateFunction("...any", lambda *values: _query_escaped(_printed(*values))),
}


# ==================================================================================================
# 50. Functions of alerts
# ==================================================================================================
#
# The functions that Prometheus adds for rules, and those that Alertmanager adds for notifications.
# `query`, `externalURL` and `pathPrefix` are given for each execution, as `query` asks the store.
# Not here: `tmpl`, which Prometheus has for pages of consoles and refuses in rules.
#
# Sources: the template references of Prometheus and Alertmanager.


def _link(expression: str, tab: int) -> str:
    return f"/graph?g0.expr={_query_escaped(expression)}&g0.tab={tab}"


def _first(result: list[TemplateStruct]) -> TemplateStruct:
    if not result:
        raise ValueError("first() called on vector with no elements")
    return result[0]


def _label(name: str, sample: TemplateStruct) -> str:
    return str(sample.fields["Labels"].get(name, ""))


def _sorted_by_label(name: str, result: list[TemplateStruct]) -> list[TemplateStruct]:
    return _QueryResult(sorted(result, key=partial(_label, name)))


_UNDERSCORE = re.compile("(?<=[0-9a-fA-FxX])_(?=[0-9a-fA-F])")
_HEX_FLOAT = re.compile(
    r"[-+]?0[xX](?=\.?[0-9a-fA-F])[0-9a-fA-F]*(?:\.[0-9a-fA-F]*)?[pP][-+]?[0-9]+"
)


def _float_of(value: Any) -> float:
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str) or isinstance(value, _HTML):
        raise ValueError(f"can't convert {_type_name(value)} to float")
    try:
        number = _UNDERSCORE.sub("", value)
        return float.fromhex(number) if _HEX_FLOAT.fullmatch(number) else read_float(number)
    except (ValueError, OverflowError):
        fault = "value out of range" if GO_FLOAT.fullmatch(value) else "invalid syntax"
        raise ValueError(f"strconv.ParseFloat: parsing {_quoted(value)}: {fault}") from None


def _four_digits(value: float) -> str:
    return _float_text(value, _Verb("g", precision=4))


def _scaled_text(value: float, step: int, prefixes: Iterable[str]) -> str:
    """A number below `step`, with the prefix that stands for what it was divided by."""
    shown = ""
    for prefix in prefixes:
        if abs(value) < step:
            break
        shown, value = prefix, value / step
    return _four_digits(value) + shown


def _small_text(value: float) -> str:
    """A number below 1 as one from 1 on, with the prefix for what it was multiplied with."""
    shown = ""
    for prefix in "munpfazy" if value else "":
        if abs(value) >= 1:
            break
        shown, value = prefix, value * 1000
    return _four_digits(value) + shown


def _humanize(value: Any) -> str:
    number = _float_of(value)
    if not math.isfinite(number):
        return _four_digits(number)
    return _scaled_text(number, 1000, "kMGTPEZY") if abs(number) >= 1 else _small_text(number)


def _humanize_1024(value: Any) -> str:
    number = _float_of(value)
    if not math.isfinite(number):
        return _four_digits(number)
    return _scaled_text(number, 1024, ("ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi", "Yi"))


def _humanize_duration(value: Any) -> str:
    number = _float_of(value)
    if not math.isfinite(number):
        return _four_digits(number)
    if abs(number) < 1:
        return _small_text(number) + "s"
    sign, number = "-" if number < 0 else "", abs(number)
    minutes, seconds = divmod(int(number), 60)
    if not minutes:
        return f"{sign}{_four_digits(number)}s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{minutes}m {seconds}s"
    if days or hours:
        text = f"{hours}h {text}"
    return f"{sign}{days}d {text}" if days else sign + text


def _to_time(value: Any) -> datetime.datetime:
    number = _float_of(value)
    if not math.isfinite(number):
        raise ValueError("value is NaN or Inf")
    if not -(2**63) <= number * 1e9 < 2**63:
        fault = "cannot be represented as a nanoseconds timestamp since it overflows int64"
        raise ValueError(f"{_go_print(number)} {fault}")
    return UNIX_EPOCH + datetime.timedelta(milliseconds=int(int(number * 1e9) / 1e6))


def _humanize_timestamp(value: Any) -> str:
    number = _float_of(value)
    return _time_text(_to_time(number)) if math.isfinite(number) else _four_digits(number)


def _parse_duration(text: str) -> float:
    if text == "0":
        return 0.0
    if not text:
        raise ValueError("empty duration string")
    if not _DURATION.fullmatch(text):
        raise ValueError(f"not a valid duration string: {_quoted(text)}")
    return parse_duration_ms(text) / 1000


_HOST_PORT = re.compile(r"(?:\[(?P<bracketed>[^\[\]]*)\]|(?P<plain>[^:\[\]]*)):(?P<port>[^:\[\]]*)")


def _strip_port(text: str) -> str:
    match = _HOST_PORT.fullmatch(text)
    return (match["bracketed"] or match["plain"] or "") if match else text


def _strip_domain(text: str) -> str:
    match = _HOST_PORT.fullmatch(text)
    host = _strip_port(text)
    with contextlib.suppress(ValueError):
        # Go's ParseIP knows no zones
        ipaddress.ip_address(host.replace("%", " "))
        return text
    host = host.partition(".")[0]
    if not match or not match["port"]:
        return host
    return f"[{host}]:{match['port']}" if ":" in host else f"{host}:{match['port']}"


def _title(text: str) -> str:
    def is_separator(letter: str) -> bool:
        return not (letter.isalnum() or letter == "_") and (letter.isascii() or letter.isspace())

    before = " " + text
    return "".join(
        _one_letter(letter, str.title) if is_separator(before[place]) else letter
        for place, letter in enumerate(text)
    )


def _one_letter(letter: str, case: Callable[[str], str]) -> str:
    """In another case; Go leaves those as they are that would become several letters."""
    changed = case(letter)
    return changed if len(changed) == 1 else letter


def _in_case(case: Callable[[str], str]) -> TemplateFunction:
    return TemplateFunction("string", lambda text: "".join(_one_letter(c, case) for c in text))


def _search(pattern: str, text: str, position: int) -> list[str | None] | None:
    """The leftmost match from a position on: what stands before it, the match, and its groups.

    The letter before the position is part of what is searched, as `^` and `\\b` look at it.
    """
    before = r"(?s:.)" if position else ""
    searched = compile_regex(f"{before}(?s:(.*?))({pattern})(?s:.*)")
    groups = searched.groups(text[max(0, position - 1) :])
    return groups and groups[1:]


def _compiled(pattern: str, fault: str = "") -> Regex:
    try:
        return compile_regex(pattern)
    except ValueError as error:
        reason = str(error).removeprefix(f'invalid regular expression "{pattern[:1024]}": ')
        raise ValueError(fault + reason) from None


def _matches(pattern: str, text: str) -> bool:
    _compiled(pattern)  # an error names the pattern as it was written
    return _search(pattern, text, 0) is not None


def _replace_all(spend: Callable[[int], None], pattern: str, template: str, text: str) -> str:
    """As Go's Regexp.ReplaceAllString has it; no empty match stands right behind another one.

    Each search reads the text to its end, so each is paid for.
    """
    names = _compiled(pattern, f"regexp: Compile(`{pattern}`): ").names
    written: list[str] = []
    position, last_end = 0, 0
    while position <= len(text) and (found := _search(pattern, text, position)):
        spend((len(text) - position) >> 4)
        start = position + len(found[0] or "")
        end = start + len(found[1] or "")
        written.append(text[last_end:start])
        if end > last_end or start == 0:
            written.append(expand(template, found[1:], names))
        last_end, position = end, max(end, position + 1)
    return "".join(written) + text[last_end:]


def template_sample(labels: dict[str, str], value: float) -> TemplateStruct:
    """A sample as `query` gives it to a template."""
    return TemplateStruct("*template.sample", {"Labels": labels, "Value": value})


def query_function(
    query: Callable[[str], Sequence[tuple[dict[str, str], float]]],
) -> TemplateFunction:
    """The function `query` of a template, by a function that evaluates an expression to labels and
    values, or raises ValueError.
    """

    def asked(expression: str) -> _QueryResult:
        return _QueryResult(template_sample(*sample) for sample in query(expression))

    return TemplateFunction("string", asked, QUERY_STEPS)


_COMMON_FUNCTIONS = {
    "humanizeDuration": TemplateFunction("any", _humanize_duration),
    "match": TemplateFunction("string string", _matches, REGEX_STEPS),
    "reReplaceAll": TemplateFunction("string string string", _replace_all, REGEX_STEPS, True),
    "safeHtml": TemplateFunction("string", _HTML),
    "title": TemplateFunction("string", _title),
    "toLower": _in_case(str.lower),
    "toUpper": _in_case(str.upper),
}

RULE_FUNCTIONS = _COMMON_FUNCTIONS | {
    "args": TemplateFunction(
        "...any", lambda *values: _AnyMap((f"arg{n}", value) for n, value in enumerate(values))
    ),
    "externalURL": TemplateFunction("", str),
    "first": TemplateFunction("template.queryResult", _first),
    "graphLink": TemplateFunction("string", partial(_link, tab=0)),
    "humanize": TemplateFunction("any", _humanize),
    "humanize1024": TemplateFunction("any", _humanize_1024),
    "humanizePercentage": TemplateFunction(
        "any", lambda value: _four_digits(_float_of(value) * 100) + "%"
    ),
    "humanizeTimestamp": TemplateFunction("any", _humanize_timestamp),
    "label": TemplateFunction("string *template.sample", _label),
    "parseDuration": TemplateFunction("string", _parse_duration),
    "pathPrefix": TemplateFunction("", str),
    "query": query_function(lambda _: []),
    "sortByLabel": TemplateFunction("string template.queryResult", _sorted_by_label),
    "stripDomain": TemplateFunction("string", _strip_domain),
    "stripPort": TemplateFunction("string", _strip_port),
    "strvalue": TemplateFunction("*template.sample", partial(_label, "__value__")),
    "tableLink": TemplateFunction("string", partial(_link, tab=1)),
    "toTime": TemplateFunction("any", _to_time),
    "value": TemplateFunction("*template.sample", lambda sample: sample.fields["Value"]),
}  # fmt: skip


def _in_zone(name: str, when: datetime.datetime) -> datetime.datetime:
    try:
        return when.astimezone(zoneinfo.ZoneInfo(name))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"unknown time zone {name}") from None


def rfc3339(time: datetime.datetime) -> str:
    """A time as Go's JSON has it."""
    return _laid_out(time, "2006-01-02T15:04:05.999999999Z07:00")


def json_value(value: Any) -> Any:
    """A value of a template as `write_json` takes it."""
    if isinstance(value, TemplateStruct):
        # as the tags of these two have it
        is_tagged = value.type_name.lstrip("*") in ("template.Alert", "template.Data")
        first = str.lower if is_tagged else str
        return {
            first(name[0]) + name[1:]: json_value(field) for name, field in value.fields.items()
        }
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    if isinstance(value, datetime.datetime):
        return rfc3339(value)
    return _nanoseconds(value) if isinstance(value, datetime.timedelta) else value


# as Go's encoding/json has it, so that JSON can stand in a page
_JSON_IN_HTML = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def _to_json(value: Any) -> str:
    return write_json(json_value(value)).translate(_JSON_IN_HTML)


NOTIFICATION_FUNCTIONS = _COMMON_FUNCTIONS | {
    "date": TemplateFunction("string time.Time", lambda layout, when: _laid_out(when, layout)),
    "join": TemplateFunction("string []string", str.join),
    "safeUrl": TemplateFunction("string", _HTML),
    "since": TemplateFunction(
        "time.Time", lambda when: datetime.datetime.now(datetime.UTC) - when
    ),
    "stringSlice": TemplateFunction("...string", lambda *texts: list(texts)),
    "toJson": TemplateFunction("any", _to_json),
    "trimSpace": TemplateFunction("string", lambda text: text.strip(" \t\r\n")),
    "tz": TemplateFunction("string time.Time", _in_zone),
    "urlUnescape": TemplateFunction("string", lambda text: _HTML(urllib.parse.unquote_plus(text))),
}  # fmt: skip


# ==================================================================================================
# 51. Template items
# ==================================================================================================
#
# The problem: labels and annotations of alerts, and what is sent to a webhook, are templates of
# Go's text/template, and there are thousands of them. The idea: text becomes items, items become a
# tree, and a walk over the tree prints. What it costs: Go's grammar and its errors, letter by
# letter, since people search for them.
#
# Source: https://pkg.go.dev/text/template and its lex.go.


class _Item(NamedTuple):
    kind: str  # a keyword is its own kind, so are delimiters, operators and parentheses
    text: str
    position: int


_KEYWORDS = frozenset(
    {".", "block", "break", "continue", "define", "else", "end", "if", "range", "nil", "template",
     "with"}
)  # fmt: skip
_LEFT_TRIM = re.compile(r"-(?=[ \t\r\n])")
_CLOSE = re.compile(r"([ \t\r\n]-)?\}\}")
_ITEM = re.compile(
    r"""
    (?P<close>    (?:[ \t\r\n]-)?\}\} )
  | (?P<space>    [ \t\r\n]+?(?=[ \t\r\n]-\}\}) | [ \t\r\n]+ )
  | (?P<string>   "(?:[^"\\\n]|\\[^\n])*" | `[^`]*` )
  | (?P<char>     '(?:[^'\\\n]|\\[^\n])*' )
  | (?P<variable> \$\w* )
  | (?P<number>   (?=[-+0-9]|\.(?:[0-9]|\Z)) [-+]?
                  (?: 0[xX][0-9A-Fa-f_]*(?:\.[0-9A-Fa-f_]*)?(?:[pP][-+]?[0-9_]*)?
                    | 0[oObB][0-9_]*
                    | [0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9_]*)? ) i? )
  | (?P<field>    \.\w+ )
  | (?P<word>     \.|\w+ )
  | (?P<operator> :=|[=|()] )
  | (?P<ascii>    [!-/:-@\[-`{-~](?<![:"'`]) )
    """,
    re.VERBOSE,
)
_GLUED_TO_NUMBER = re.compile(r"[-+\w]")
_ENDS_WORD = re.compile(r"[ \t\r\n.,|:()]|\}\}|\Z")
_UNFINISHED = {
    '"': "unterminated quoted string", "`": "unterminated raw quoted string",
    "'": "unterminated character constant", ":": "expected :=",
}  # fmt: skip


def _template_items(text: str) -> Iterator[_Item]:
    """All items up to the first fault, which is the last item then."""
    position = 0
    while True:
        start = text.find("{{", position)
        if start < 0:
            break
        inside = start + 2
        trim = _LEFT_TRIM.match(text, inside)
        if plain := text[position:start].rstrip(" \t\r\n") if trim else text[position:start]:
            yield _Item("text", plain, position)
        # the space behind the dash belongs to it
        inside += 2 if trim else 0
        if text.startswith("/*", inside):
            end = text.find("*/", inside + 2) + 2
            close = _CLOSE.match(text, end)
            if end < 2 or close is None:
                fault = "unclosed comment" if end < 2 else "comment ends before closing delimiter"
                yield _Item("error", fault, inside)
                return
        else:
            yield _Item("{{", "{{", start)
            close = yield from _action_items(text, inside)
            if close is None:
                return
        position = close.end()
        if close[0] != "}}":
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
    if position < len(text):
        yield _Item("text", text[position:], position)
    yield _Item("EOF", "EOF", len(text))


def _action_items(text: str, position: int) -> Generator[_Item, None, re.Match[str] | None]:
    """The items up to `}}`, whose match is returned; None after a fault."""
    depth = 0
    while True:
        match = _ITEM.match(text, position)
        if match is None:
            fault = "unclosed action"
            if position < len(text):
                letter = text[position]
                fault = f"unrecognized character in action: {_code_point(letter)}"
                fault = _UNFINISHED.get(letter, fault)
            break
        kind, word, end = match.lastgroup or "", match[0], match.end()
        if kind == "close":
            if depth:
                fault = "unclosed left paren"
                break
            yield _Item("}}", "}}", end - 2)
            return match
        if kind in ("variable", "field", "word") and not _ENDS_WORD.match(text, end):
            fault = f"bad character {_code_point(text[end])}"
            break
        if kind == "number" and (glued := _GLUED_TO_NUMBER.match(text, end)):
            fault = f"bad number syntax: {_quoted(text[position : glued.end()])}"
            break
        if kind == "word":
            kind = word if word in _KEYWORDS else "bool" if word in _BOOLS else "function"
        yield _Item(word if kind == "operator" else kind, word, position)
        depth += (word == "(") - (word == ")")
        if depth < 0:
            fault = "unexpected right paren"
            break
        position = end
    yield _Item("error", fault, position)
    return None


_BOOLS = {"true": True, "false": False}


def _code_point(letter: str) -> str:
    return f"U+{ord(letter):04X}" + (f" '{letter}'" if letter.isprintable() else "")


def _shown_item(item: _Item) -> str:
    if item.kind in ("EOF", "error"):
        return item.text
    if item.kind in _KEYWORDS:
        return f"<{item.text}>"
    return f"{_quoted(item.text[:10])}..." if len(item.text) > 10 else _quoted(item.text)


# ---- what literals mean ----


def _unquoted(literal: str) -> str:
    try:
        # the strings of PromQL are those of Go
        return str(parse_query(literal).value)  # type: ignore[union-attr]
    except QueryError:
        raise ValueError("invalid syntax") from None


_OCTAL = re.compile("[-+]?0[0-7_]+")


def _constant_value(kind: str, text: str) -> Any:
    """What a literal means. Raises ValueError."""
    if kind in ("bool", "nil"):
        return _BOOLS.get(text)
    if kind == "number":
        return _number_value(text)
    if kind == "char" and len(text) > 3 and text[1] != "\\":
        raise ValueError(f"malformed character constant: {text}")
    value = _unquoted(text)
    if kind == "string":
        return value
    if len(value) != 1:
        raise ValueError(f"malformed character constant: {text}" if value else "invalid syntax")
    code = ord(value)
    return code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code


def _number_value(text: str) -> int | float:
    with contextlib.suppress(ValueError):
        integer = int(text, 8 if _OCTAL.fullmatch(text) else 0)
        if -(2**63) <= integer < 2**64:
            return integer
    is_hexadecimal = text.lstrip("+-")[:2] in ("0x", "0X")
    try:
        number = float.fromhex(text) if is_hexadecimal else float(text)
    except (ValueError, OverflowError):
        number = math.inf
    if not math.isfinite(number) or "_" in text:
        raise ValueError(f"illegal number syntax: {_quoted(text)}")
    if not any(mark in text for mark in ("pP" if is_hexadecimal else ".eE")):
        raise ValueError(f"integer overflow: {_quoted(text)}")
    return number


# ==================================================================================================
# 52. Template parser
# ==================================================================================================
#
# Items become a tree, and the next chapter walks over the tree. What `text` holds in a node is what
# Go calls the node in its errors. Not here: complex numbers, and functions as values.
#
# Source: https://pkg.go.dev/text/template and its parse.go.


class _Constant(NamedTuple):
    value: Any  # None is `nil`
    text: str
    position: int


class _Dot(NamedTuple):
    text: str
    position: int


class _Name(NamedTuple):
    """A function."""

    text: str
    position: int


class _Path(NamedTuple):
    """Fields of something: `.a.b`, `$x.a`, `(first .).a`; or a variable alone."""

    start: "_Name | _Pipe | str"  # a variable's name, "" is the dot
    names: tuple[str, ...]
    text: str
    position: int


class _Command(NamedTuple):
    arguments: "tuple[_Operand, ...]"
    text: str
    position: int


class _Pipe(NamedTuple):
    """Commands, each of which is the last argument of the next; a statement, too: it prints."""

    commands: tuple[_Command, ...]
    declared: tuple[str, ...]
    assigns: bool  # to variables that there are
    text: str
    position: int


_Operand = _Constant | _Dot | _Name | _Path | _Pipe


class _Block(NamedTuple):
    """`if`, `with` or `range`."""

    kind: str
    branches: "list[tuple[_Pipe, list[_Statement]]]"  # more than one: `else if`
    otherwise: "list[_Statement]"


class _Invocation(NamedTuple):
    """`template`."""

    name: str
    pipe: _Pipe | None
    text: str
    position: int


class _Leave(NamedTuple):
    """`break` or `continue`."""

    kind: str


_Statement = str | _Pipe | _Block | _Invocation | _Leave


class _TemplateParser:
    """Recursive descent; each method reads one rule of the grammar."""

    def __init__(self, text: str, functions: Container[str], name: str) -> None:
        self.text, self.functions, self.name = text, functions, name
        self.items = list(_template_items(text))
        self.index = 0
        self.seen = 0  # the item that was read last, before any that was put back
        self.action: int | None = None  # where the `{{` stands, while its start is read
        self.templates: dict[str, list[_Statement]] = {}
        self.variables = ["$"]
        self.ranges = 0  # how many surround what is read
        self.depth = 0

    # -- items --

    def fail(self, reason: str) -> NoReturn:
        line = self.text.count("\n", 0, self.items[self.seen].position) + 1
        raise TemplateError(f"template: {self.name}:{line}: {reason}")

    def unexpected(self, item: _Item, where: str) -> NoReturn:
        if item.kind != "error":
            self.fail(f"unexpected {_shown_item(item)} in {where}")
        start, started = self.action, ""
        if start is not None and "\n" in self.text[start : item.position]:
            line = self.text.count("\n", 0, start) + 1
            started = f" in action started at {self.name}:{line}"
        self.fail((item.text + started).replace(" action in action", " action"))

    def take(self) -> _Item:
        item = self.items[self.index]
        self.seen = max(self.seen, self.index)
        self.index = min(self.index + 1, len(self.items) - 1)
        return item

    def peek(self) -> _Item:
        self.seen = max(self.seen, self.index)
        return self.items[self.index]

    def skip_space(self) -> _Item:
        """The next item that is not a space; it is not taken."""
        while self.peek().kind == "space":
            self.take()
        return self.peek()

    def take_solid(self) -> _Item:
        self.skip_space()
        return self.take()

    def require(self, kind: str, where: str) -> _Item:
        item = self.take_solid()
        if item.kind != kind:
            self.unexpected(item, where)
        return item

    def value_of(self, kind: str, literal: str) -> Any:
        try:
            return _constant_value(kind, literal)
        except ValueError as error:
            self.fail(str(error))

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_TEMPLATE_DEPTH:
            self.fail("max expression depth exceeded")

    # -- statements --

    def parse(self) -> None:
        statements: list[_Statement] = []
        while self.peek().kind != "EOF":
            start = self.index
            if self.take().kind == "{{" and self.take_solid().kind == "define":
                self.define()
                continue
            self.index = start
            statement = self.statement()
            if isinstance(statement, _Leave) and statement.kind in ("end", "else"):
                self.fail(f"unexpected {{{{{statement.kind}}}}}")
            statements.append(statement)
        self.add(self.name, statements)

    def add(self, name: str, statements: list[_Statement]) -> None:
        if _is_blank(self.templates.get(name, [])):
            self.templates[name] = statements
        elif not _is_blank(statements):
            self.fail(f"template: multiple definition of template {_quoted(name)}")

    def define(self) -> None:
        name = self.value_of("string", self.require("string", "define clause").text)
        self.require("}}", "define clause")
        self.template(name, "define clause")

    def template(self, name: str, where: str) -> None:
        """The body of a template of its own, which sees no variables of what surrounds it."""
        outside = self.variables, self.ranges
        self.variables, self.ranges = ["$"], 0
        self.enter()
        statements, end = self.statements()
        self.depth -= 1
        if end != "end":
            self.fail(f"unexpected {{{{{end}}}}} in {where}")
        self.add(name, statements)
        self.variables, self.ranges = outside

    def statements(self) -> tuple[list[_Statement], str]:
        """Statements, and which of `end` and `else` ends them."""
        found: list[_Statement] = []
        while self.skip_space().kind != "EOF":
            statement = self.statement()
            if isinstance(statement, _Leave) and statement.kind in ("end", "else"):
                return found, statement.kind
            found.append(statement)
        self.fail("unexpected EOF")

    def statement(self) -> _Statement:
        item = self.take_solid()
        if item.kind == "text":
            return item.text
        if item.kind != "{{":
            self.unexpected(item, "input")
        self.action = item.position
        kind = self.skip_space().kind
        if kind in self.ACTIONS:
            self.take()
            statement = self.ACTIONS[kind](self, kind)
        else:
            statement = self.pipeline("command")
        self.action = None
        return statement

    def block(self, kind: str) -> _Statement:
        variables = len(self.variables)
        self.enter()
        branches, otherwise = [], list[_Statement]()
        while True:
            pipe = self.pipeline(kind)
            self.ranges += kind == "range"
            body, end = self.statements()
            self.ranges -= kind == "range"
            branches.append((pipe, body))
            if end == "else" and kind == "if" and self.peek().kind == "if":
                self.take()
                continue
            if end == "else":
                otherwise, end = self.statements()
                if end == "else":
                    self.fail("expected end; found {{else}}")
            break
        del self.variables[variables:]
        self.depth -= 1
        return _Block(kind, branches, otherwise)

    def leave(self, kind: str) -> _Statement:
        self.require("}}", f"{{{{{kind}}}}}")
        if not self.ranges:
            self.fail(f"{{{{{kind}}}}} outside {{{{range}}}}")
        return _Leave(kind)

    def finish(self, kind: str) -> _Statement:
        if kind == "end" or self.skip_space().kind != "if":
            self.require("}}", kind)
        return _Leave(kind)

    def invocation(self, kind: str) -> _Statement:
        where = f"{kind} clause"
        item = self.require("string", where)
        name, pipe = self.value_of("string", item.text), None
        if kind == "block" or self.skip_space().kind != "}}":
            pipe = self.pipeline(where)
        else:
            self.take()
        if kind == "block":
            self.template(name, where)
        with_pipe = f" {pipe.text}" if pipe else ""
        text = f"{{{{template {_quoted(name)}{with_pipe}}}}}"
        return _Invocation(name, pipe, text, item.position)

    # -- pipelines --

    def pipeline(self, where: str, close: str = "}}") -> _Pipe:
        position = self.skip_space().position
        declared, assigns = self.declarations(where)
        commands: list[_Command] = []
        while True:
            item = self.skip_space()
            if item.kind == close:
                self.take()
                break
            if item.kind not in self.OPERANDS:
                self.unexpected(self.take(), where)
            commands.append(self.command())
        if not commands:
            self.fail(f"missing value for {where}")
        for stage, command in enumerate(commands[1:], 2):
            if isinstance(command.arguments[0], _Constant | _Dot):
                self.fail(f"non executable command in pipeline stage {stage}")
        text = " | ".join(command.text for command in commands)
        if declared:
            text = f"{', '.join(declared)} {'=' if assigns else ':='} {text}"
        return _Pipe(tuple(commands), declared, assigns, text, position)

    def declarations(self, where: str) -> tuple[tuple[str, ...], bool]:
        declared: list[str] = []
        while True:
            start = self.index
            variable = self.skip_space()
            if variable.kind != "variable":
                break
            self.take()
            item = self.skip_space()
            if item.text not in (":=", "=", ",") or item.kind == "string":
                self.index = start
                break
            self.take()
            declared.append(variable.text)
            self.variables.append(variable.text)
            if item.text != ",":
                return tuple(declared), item.text == "="
            if where != "range" or len(declared) > 1:
                self.fail(f"too many declarations in {where}")
            if self.skip_space().kind not in ("variable", "}}", ")"):
                self.fail("range can only initialize variables")
        return tuple(declared), False

    def command(self) -> _Command:
        position = self.skip_space().position
        arguments: list[_Operand] = []
        while True:
            self.skip_space()
            operand = self.operand()
            if operand:
                arguments.append(operand)
            item = self.peek()
            if item.kind in ("}}", ")"):
                break
            self.take()
            if item.kind == "|":
                break
            if item.kind != "space":
                self.unexpected(item, "operand")
        if not arguments:
            self.fail("empty command")
        shown = (f"({a.text})" if isinstance(a, _Pipe) else a.text for a in arguments)
        return _Command(tuple(arguments), " ".join(shown), position)

    def operand(self) -> _Operand | None:
        term = self.term()
        position = self.peek().position
        names: list[str] = []
        while term and self.peek().kind == "field":
            names.append(self.take().text[1:])
        if not names or term is None:
            return term
        if isinstance(term, _Constant | _Dot):
            self.fail(f"unexpected . after term {_quoted(term.text)}")
        fields = "".join(f".{name}" for name in names)
        if isinstance(term, _Path):
            return _Path(term.start, (*term.names, *names), term.text + fields, position)
        text = f"({term.text})" if isinstance(term, _Pipe) else term.text
        return _Path(term, tuple(names), text + fields, position)

    def term(self) -> _Operand | None:
        item = self.skip_space()
        kind, text, position = item
        if kind not in self.OPERANDS:
            if kind == "error":
                self.unexpected(item, "")
            return None
        self.take()
        if kind == "function":
            if text not in self.functions and text not in _GO_FUNCTIONS:
                self.fail(f"function {_quoted(text)} not defined")
            return _Name(text, position)
        if kind == ".":
            return _Dot(text, position)
        if kind == "field":
            return _Path("", (text[1:],), text, position)
        if kind == "variable":
            if text not in self.variables:
                self.fail(f"undefined variable {_quoted(text)}")
            return _Path(text, (), text, position)
        if kind == "(":
            self.enter()
            pipe = self.pipeline("parenthesized pipeline", ")")
            self.depth -= 1
            return pipe
        return _Constant(self.value_of(kind, text), text, position)

    ACTIONS: ClassVar[dict[str, Callable[["_TemplateParser", str], _Statement]]] = {
        "if": block, "with": block, "range": block, "break": leave, "continue": leave,
        "end": finish, "else": finish, "template": invocation, "block": invocation,
    }  # fmt: skip
    OPERANDS: ClassVar[frozenset[str]] = frozenset(
        {"bool", "char", ".", "field", "function", "number", "nil", "string", "variable", "("}
    )


def _is_blank(statements: list[_Statement]) -> bool:
    return all(isinstance(statement, str) and not statement.strip() for statement in statements)


# ==================================================================================================
# 53. Templates
# ==================================================================================================
#
# A walk over the tree prints, and each step is Go's. What a label holds is printed and never read
# as a template. What it costs: about 2 µs a step. Steps, depth and output are bounded, so that no
# template holds up the others.


def parse_template(text: str, functions: Container[str], name: str = "") -> "Template":
    """Parse a template. Raises TemplateError.

    `functions`: the names of those that it may call beside the ones that Go has. A template that is
    executed again and again is parsed once.

    >>> template = parse_template("{{ .host | toUpper }}: {{ len .host }}", NOTIFICATION_FUNCTIONS)
    >>> template.execute({"host": "web1"}, NOTIFICATION_FUNCTIONS)
    'WEB1: 4'
    >>> parse_template("{{ if .host }}", NOTIFICATION_FUNCTIONS, "page")
    Traceback (most recent call last):
    metricstream.TemplateError: template: page:1: unexpected EOF
    """
    parser = _TemplateParser(text, functions, name)
    parser.parse()
    return Template(name, text, parser.templates)


class Template:
    """A parsed template, and those that it defines; made by `parse_template`."""

    def __init__(self, name: str, text: str, templates: dict[str, list[_Statement]]) -> None:
        self.name, self.text, self.templates = name, text, templates

    def execute(
        self, data: Any, functions: Mapping[str, TemplateFunction], escapes_html: bool = False
    ) -> str:
        """What the template prints. Raises TemplateError.

        `data` is what the dot means: str, bool, int, float, None, datetime and timedelta, lists and
        dicts of them, `TemplateStruct`. `functions` has those whose names the template was parsed
        with. `escapes_html`: what is printed becomes text of HTML, unless it is safe.
        """
        run = _TemplateRun(self, functions, data, escapes_html)
        try:
            run.walk(data, self.templates[self.name])
        except TemplateError as error:
            raise TemplateError(f"error executing template {self.name}: {error}") from None
        return _SURROGATE.sub("\ufffd", "".join(run.printed.pieces))


class _LeaveRange(Exception):
    pass


_NOTHING = object()  # what the first command of a pipeline gets from the one before it


class _TemplateRun:
    """One execution. The names and the order of events are those of Go's text/template/exec.go,
    because an error tells which node was visited last."""

    def __init__(
        self, template: Template, functions: Mapping[str, TemplateFunction], data: Any,
        escapes_html: bool,
    ) -> None:  # fmt: skip
        self.template, self.functions = template, functions
        self.escapes_html = escapes_html
        self.name = template.name
        self.variables: list[list[Any]] = [["$", data]]  # name and value, the innermost last
        self.node: Any = None
        self.steps, self.depth = MAX_TEMPLATE_STEPS, 0
        self.printed = _Output()

    def fail(self, reason: str) -> NoReturn:
        place = ""
        if self.node:
            before = self.template.text[: self.node.position]
            column = len(before[before.rfind("\n") + 1 :].encode(errors="replace"))
            place = f":{before.count(chr(10)) + 1}:{column}: executing {_quoted(self.name)}"
            place += f" at <{self.node.text}>"
        raise TemplateError(f"template: {self.template.name}{place}: {reason}")

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            self.fail(f"exceeded maximum number of steps ({MAX_TEMPLATE_STEPS})")

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_TEMPLATE_DEPTH:
            self.fail(f"exceeded maximum template depth ({MAX_TEMPLATE_DEPTH})")

    def show(self, value: Any) -> None:
        try:
            self.printed.value(value, _SHOWN)
        except ValueError as error:
            self.fail(str(error))

    def printable(self, value: Any) -> Any:
        """What is printed of a value; in HTML nothing of it is markup, unless it is safe."""
        if self.escapes_html and not isinstance(value, _HTML):
            return _printed(value).translate(_HTML_ESCAPES)
        return "<no value>" if value is None else value

    # -- statements --

    def walk(self, dot: Any, statements: list[_Statement]) -> None:
        for node in statements:
            self.spend()
            if isinstance(node, str):
                self.show(node)
            elif isinstance(node, _Pipe):
                value = self.pipeline(dot, node)
                if not node.declared:
                    self.show(self.printable(value))
            elif isinstance(node, _Block):
                self.block(dot, node)
            elif isinstance(node, _Invocation):
                self.invoke(dot, node)
            else:
                raise _LeaveRange(node.kind)

    def block(self, dot: Any, node: _Block) -> None:
        self.enter()
        variables = len(self.variables)
        if node.kind == "range":
            self.iterate(dot, node)
        else:
            for pipe, body in node.branches:
                value = self.pipeline(dot, pipe)
                if _is_true(value):
                    self.walk(value if node.kind == "with" else dot, body)
                    break
            else:
                self.walk(dot, node.otherwise)
        del self.variables[variables:]
        self.depth -= 1

    def iterate(self, dot: Any, node: _Block) -> None:
        ((pipe, body),) = node.branches
        value = self.pipeline(dot, pipe)
        if value is None:
            value = []
        if not isinstance(value, dict | list):
            self.fail(f"range can't iterate over {_go_print(value)}")
        rows = sorted(value.items()) if isinstance(value, dict) else list(enumerate(value))
        variables, depth = len(self.variables), self.depth
        for row in rows:
            self.spend()
            for name, part in zip(pipe.declared, row[-len(pipe.declared) :]):
                self.assign(name, part)
            try:
                self.walk(row[1], body)
            except _LeaveRange as leave:
                self.depth = depth
                if str(leave) == "break":
                    break
            del self.variables[variables:]
        if not rows:
            self.walk(dot, node.otherwise)

    def invoke(self, dot: Any, node: _Invocation) -> None:
        self.node = node
        statements = self.template.templates.get(node.name)
        if statements is None:
            self.fail(f"template {_quoted(node.name)} not defined")
        self.enter()
        value = self.pipeline(dot, node.pipe) if node.pipe else None
        outside = self.name, self.variables
        self.name, self.variables = node.name, [["$", value]]
        self.walk(value, statements)
        self.name, self.variables = outside
        self.depth -= 1

    # -- pipelines --

    def pipeline(self, dot: Any, pipe: _Pipe) -> Any:
        self.node = pipe
        value: Any = _NOTHING
        for command in pipe.commands:
            value = self.command(dot, command, value)
        for name in pipe.declared:
            if pipe.assigns:
                self.assign(name, value)
            else:
                self.variables.append([name, value])
        return value

    def variable(self, name: str) -> list[Any]:
        for variable in reversed(self.variables):
            if variable[0] == name:
                return variable
        self.fail(f"undefined variable: {name}")

    def assign(self, name: str, value: Any) -> None:
        self.variable(name)[1] = value

    def command(self, dot: Any, command: _Command, last: Any) -> Any:
        """`last` is the value of the command before it, and becomes its last argument."""
        self.spend()
        arguments = command.arguments
        first = arguments[0]
        if isinstance(first, _Path):
            return self.path(dot, first, arguments, last)
        if isinstance(first, _Name):
            return self.function(dot, first, command, arguments, last)
        if not isinstance(first, _Pipe):
            self.node = first
        self.refuse_arguments(first, arguments, last)
        if isinstance(first, _Pipe):
            return self.pipeline(dot, first)
        if isinstance(first, _Dot):
            return dot
        if first.value is None:
            self.fail("nil is not a command")
        return self.constant(first)

    def refuse_arguments(self, node: _Operand, arguments: tuple[_Operand, ...], last: Any) -> None:
        if len(arguments) > 1 or last is not _NOTHING:
            self.fail(f"can't give argument to non-function {node.text}")

    def constant(self, node: _Constant) -> Any:
        self.node = node
        if isinstance(node.value, int) and node.value >= 2**63:
            self.fail(f"{node.text} overflows int")
        return node.value

    def path(self, dot: Any, path: _Path, arguments: tuple[_Operand, ...], last: Any) -> Any:
        self.node = path
        value = dot
        if not isinstance(path.start, str):
            value = self.argument(dot, "any", path.start)
        elif path.start:
            value = self.variable(path.start)[1]
            if not path.names:
                self.refuse_arguments(path, arguments, last)
        for place, name in enumerate(path.names, 1):
            if value is None and place > 1:
                self.fail(f"nil pointer evaluating interface {{}}.{name}")
            if place < len(path.names):
                value = self.field(dot, name, path, (), _NOTHING, value)
            else:
                value = self.field(dot, name, path, arguments, last, value)
        return value

    def field(
        self, dot: Any, name: str, path: _Path, arguments: tuple[_Operand, ...], last: Any,
        value: Any,
    ) -> Any:  # fmt: skip
        if value is None:
            return None
        methods = getattr(value, "methods", None) or _METHODS.get(type(value), {})
        if name in methods:
            method = methods[name]._replace(call=partial(methods[name].call, value))
            return self.call(dot, method, path, name, arguments, last)
        has_arguments = len(arguments) > 1 or last is not _NOTHING
        if isinstance(value, TemplateStruct) and name in value.fields:
            if has_arguments:
                self.fail(f"{name} has arguments but cannot be invoked as function")
            return value.fields[name]
        if isinstance(value, dict):
            if has_arguments:
                self.fail(f"{name} is not a method but has arguments")
            return _entry(value, name)
        self.fail(f"can't evaluate field {name} in type {_type_name(value)}")

    # -- calls --

    def function(
        self, dot: Any, name: _Name, node: _Operand | _Command, arguments: tuple[_Operand, ...],
        last: Any,
    ) -> Any:  # fmt: skip
        self.node = name
        function = self.functions.get(name.text) or _GO_FUNCTIONS.get(name.text)
        if function is None:
            self.fail(f"{_quoted(name.text)} is not a defined function")
        return self.call(dot, function, node, name.text, arguments, last)

    def call(
        self, dot: Any, function: TemplateFunction, node: Any, name: str,
        arguments: tuple[_Operand, ...], last: Any,
    ) -> Any:  # fmt: skip
        types = function.takes.split()
        operands = arguments[1:]
        count = len(operands) + (last is not _NOTHING)
        if types and types[-1].startswith("..."):
            rest = types.pop()[3:]
            if count < len(types):
                least = f"want at least {len(types)} got {len(operands)}"
                self.fail(f"wrong number of args for {name}: {least}")
            types += [rest] * (count - len(types))
        if count != len(types):
            self.fail(f"wrong number of args for {name}: want {len(types)} got {count}")
        self.spend(function.steps + count)
        values: list[Any] = []
        for operand, wanted in zip(operands, types):
            values.append(self.argument(dot, wanted, operand))
            if (function is _AND or function is _OR) and _is_true(values[-1]) == (function is _OR):
                return values[-1]
        if last is not _NOTHING:
            values.append(self.checked(last, types[-1]))
        self.spend(sum(len(value) for value in values if isinstance(value, str)) >> 4)
        try:
            meter = (self.spend,) if function.is_metered else ()
            result = function.call(*meter, *values)
        except TemplateError:
            raise
        except Exception as error:
            # whatever a function can't do ends this template alone
            self.node = node
            self.fail(f"error calling {name}: {error}")
        if isinstance(result, str | list | dict):
            self.spend(len(result) >> 4)
        return result

    def argument(self, dot: Any, wanted: str, node: _Operand) -> Any:
        self.node = node
        if isinstance(node, _Constant):
            return self.literal(node, wanted)
        if isinstance(node, _Dot):
            value = dot
        elif isinstance(node, _Path):
            value = self.path(dot, node, (), _NOTHING)
        elif isinstance(node, _Pipe):
            value = self.pipeline(dot, node)
        else:
            value = self.function(dot, node, node, (), _NOTHING)
        return self.checked(value, wanted)

    def literal(self, node: _Constant, wanted: str) -> Any:
        """A constant as an argument: a number is of the type that is wanted."""
        value = node.value
        if wanted == "any":
            return self.constant(node)
        if value is None and wanted == _QueryResult.type_name:
            return _QueryResult()
        if value is None:
            self.fail(f"cannot assign nil to {wanted}")
        if wanted == "string":
            if isinstance(value, str):
                return value
            self.fail(f"expected string; found {node.text}")
        if wanted == "time.Duration":
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and value == int(value):
                return _duration_of(int(value))
            self.fail(f"expected integer; found {node.text}")
        self.fail(f"can't handle {node.text} for arg of type {wanted}")

    def checked(self, value: Any, wanted: str) -> Any:
        if wanted == "any" or _type_name(value) == wanted:
            return value
        if value is None:
            self.fail(f"invalid value; expected {wanted}")
        self.fail(f"wrong type for value; expected {wanted}; got {_type_name(value)}")


# ==================================================================================================
# 54. Alerts
# ==================================================================================================
#
# What flows between rules and those who are told: labels, samples that rules record, alerts, and
# what templates say of them. All times are numbers in plain records, so that the whole state can be
# written to a file and read again.

TEMPLATE_ROUNDS = 5  # what templates query is asked between rounds
RESEND_DELAY_S = 60.0  # a firing alert is told again so often


class LabelSet(dict[str, str]):
    """Labels that nobody changes, as a key of dicts; what names them is computed once."""

    _hash: int | None = None

    def __hash__(self) -> int:  # type: ignore[override]
        if self._hash is None:
            self._hash = hash(frozenset(self.items()))
        return self._hash

    @functools.cached_property
    def fingerprint(self) -> str:
        """The name that Alertmanager gives to labels: FNV-1a of 64 bits, in hexadecimal.

        >>> LabelSet(alertname="Down").fingerprint, LabelSet().fingerprint
        ('6accfd3d0992a914', 'cbf29ce484222325')
        """
        hashed = 0xCBF29CE484222325
        for label in sorted(self):
            for part in (label, self[label]):
                for byte in part.encode(errors="replace") + b"\xff":
                    hashed = ((hashed ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        return f"{hashed:016x}"


Vector = Sequence[tuple[dict[str, str], float]]
Query = Callable[[str, int], Awaitable[Vector]]  # an expression and a time in ms; RuleError


class RuleError(Exception):
    """A rule that could not be evaluated, and why."""


class Recorded(NamedTuple):
    """A sample that a rule stores; None as its value ends the series."""

    labels: LabelSet
    value: float | None
    time_ms: int


class Alert(NamedTuple):
    """What is told. Times are Unix seconds; annotations are changed by nobody."""

    labels: LabelSet  # alertname and all others
    annotations: dict[str, str]
    starts_at: float
    ends_at: float  # in the future while it fires
    updated_at: float
    generator_url: str = ""
    times_out: bool = False  # nobody said when it ends: it does so unless it is sent again

    def is_resolved(self, now: float) -> bool:
        """Whether it does not fire any more."""
        return self.ends_at <= now

    def merged(self, new: "Alert", now: float) -> "Alert":
        """This alert, with what is said of it now: Alertmanager's provider/mem."""
        if not (
            self.starts_at < new.ends_at < self.ends_at
            or self.starts_at < new.starts_at < self.ends_at
        ):
            return new
        older, younger = (new, self) if new.updated_at < self.updated_at else (self, new)
        ends_at = younger.ends_at
        if older.ends_at > ends_at:
            is_final = older.is_resolved(now) if younger.is_resolved(now) else not older.times_out
            ends_at = older.ends_at if is_final else ends_at
        return younger._replace(starts_at=min(self.starts_at, new.starts_at), ends_at=ends_at)


class RuleContext(NamedTuple):
    """What all rules of a server share."""

    external_labels: Mapping[str, str] = {}
    external_url: str = ""
    resend_delay_s: float = RESEND_DELAY_S


@dataclasses.dataclass
class ActiveAlert:
    """An alert of a rule. A time that has not come is None."""

    labels: LabelSet
    annotations: dict[str, str]
    value: float
    series: LabelSet  # the labels of the result that it comes from
    active_at: float
    fired_at: float | None = None
    resolved_at: float | None = None
    keep_firing_since: float | None = None
    sent_at: float | None = None

    @property
    def state(self) -> str:
        if self.resolved_at is not None:
            return "inactive"
        return "pending" if self.fired_at is None else "firing"

    def forget_future(self, now: float) -> None:
        """The clock was set back: what would lie in the future was now."""
        for name in ("active_at", "fired_at", "resolved_at", "keep_firing_since", "sent_at"):
            if (at := getattr(self, name)) is not None and at > now:
                setattr(self, name, now)

    def needs_sending(self, now: float, resend_delay_s: float) -> bool:
        if self.fired_at is None:
            return False
        if self.sent_at is None or self.sent_at + resend_delay_s <= now:
            return True
        return self.resolved_at is not None and self.resolved_at > self.sent_at

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"value": format_value(self.value)}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "ActiveAlert":
        alert = cls(**kept | {"value": read_float(kept["value"])})
        alert.labels, alert.series = LabelSet(alert.labels), LabelSet(alert.series)
        return alert


def _ms_since(then: float, now: float) -> int:
    """Milliseconds; floats of seconds differ by a little less or more."""
    return round((now - then) * 1000)


# ---- labels and annotations of a rule

ALERT_DATA = (
    "struct { Labels map[string]string; ExternalLabels map[string]string; ExternalURL string; "
    "Value float64 }"
)
_PLAIN_ACTION = re.compile(
    r"\{\{ *(?:(?:\$labels|\.Labels)\.([a-zA-Z_][a-zA-Z0-9_]*)|(\$value|\.Value)) *\}\}"
)


class RuleTemplate:
    """A label or an annotation of a rule, parsed. Raises TemplateError.

    Most only name labels and the value: those are put together from their pieces, which takes 1 µs
    instead of 30 for each of thousands of alerts.
    """

    def __init__(self, text: str, rule_name: str = ""):
        name = f"__alert_{rule_name}"
        self.parsed = parse_template(ALERT_VARIABLES + text, RULE_FUNCTIONS, name)
        # a text, the label and the value that stand behind it, the next text, and so on
        self._pieces = _PLAIN_ACTION.split(text)
        self.is_plain = not any("{{" in piece for piece in self._pieces[::3])

    def plain_text(self, labels: Mapping[str, str], value: float) -> str:
        """What a plain template prints."""
        printed = self._pieces[::3]
        for place, (label, _) in enumerate(zip(self._pieces[1::3], self._pieces[2::3])):
            printed[place] += labels.get(label, "") if label else shortest_text(value)
        return "".join(printed)


class _Expander:
    """Expands the templates of a rule at one evaluation.

    A template can't wait for a query. So what it asks is collected, answered between two
    executions, and kept for the next alert.
    """

    def __init__(self, context: RuleContext, query: Query, time_ms: int):
        self._context, self._query, self._time_ms = context, query, time_ms
        self._answers: dict[str, Vector | RuleError] = {}
        self._missing: list[str] = []
        url = context.external_url
        self._functions = RULE_FUNCTIONS | {
            "query": query_function(self._ask),
            "externalURL": TemplateFunction("", lambda: url),
            "pathPrefix": TemplateFunction("", lambda: urllib.parse.urlsplit(url).path),
        }

    def _ask(self, expression: str) -> Vector:
        if expression not in self._answers:
            self._missing.append(expression)
            return []
        answer = self._answers[expression]
        if isinstance(answer, RuleError):
            raise ValueError(str(answer))
        return answer

    async def expand(
        self, templates: dict[str, RuleTemplate], labels: Mapping[str, str], value: float
    ) -> dict[str, str]:
        """What templates say of a series."""
        return {
            name: template.plain_text(labels, value)
            if template.is_plain
            else await self._text(template.parsed, labels, value)
            for name, template in templates.items()
        }

    async def _text(self, template: Template, labels: Mapping[str, str], value: float) -> str:
        values = {
            "Labels": dict(labels), "ExternalLabels": dict(self._context.external_labels),
            "ExternalURL": self._context.external_url, "Value": value,
        }  # fmt: skip
        for _ in range(TEMPLATE_ROUNDS):
            self._missing = []
            try:
                text = template.execute(TemplateStruct(ALERT_DATA, values), self._functions)
            except TemplateError as error:
                text = f"<error expanding template: {error}>"
            if not self._missing:
                return text
            for expression in self._missing:
                try:
                    self._answers[expression] = await self._query(expression, self._time_ms)
                except RuleError as error:
                    self._answers[expression] = error
        return f"<error expanding template: queries nested more than {TEMPLATE_ROUNDS} deep>"


# ==================================================================================================
# 55. Alerting
# ==================================================================================================
#
# The problem: whether something is wrong is asked again and again, and what was found must neither
# be told twice nor be forgotten when a process dies. The idea is Prometheus's: groups of rules are
# evaluated at fixed times; a recording rule stores what its expression gives, an alerting rule
# keeps an alert for each series of it, from pending to firing to resolved. This chapter knows
# a function that evaluates a query, one that stores samples and one that takes alerts; it has no
# clock of its own, so the same code runs in a server, in unit tests of rules and over history. What
# it costs: a query for each rule and round.
#
# Sources: Prometheus's rules/alerting.go, rules/recording.go and rules/group.go.

RESOLVED_RETENTION_S = 15 * 60.0  # how long a resolved alert is told of
MAX_GAP_S = 3600.0  # pending alerts start again after a longer time without evaluation
ALERTS_A_SLICE = 50  # so many are expanded before others get their turn

_TWICE = "vector contains metrics with the same labelset after applying"


class RecordingState:
    """A recording rule, and what came of it."""

    def __init__(self, rule: Rule, labels: dict[str, str], limit: int):
        self.rule, self.labels, self.limit = rule, labels, limit
        self.query = query_text(parse_query(rule.expr))  # as the API shows it
        self.health, self.last_error = "unknown", ""
        self.evaluated_at = self.duration_s = 0.0
        self.silent_selectors: list[str] = []  # those that match no series
        self.selectors_due = 0.0  # when to look for them again, by time.monotonic
        self._returned: dict[LabelSet, None] = {}  # the series of the last evaluation

    async def evaluate(
        self, query: Query, context: RuleContext, now: float, time_ms: int
    ) -> list[Recorded]:
        """What the rule records, the ends of vanished series included. Raises RuleError."""
        samples = await self._evaluate(query, context, now, time_ms)
        before, self._returned = self._returned, dict.fromkeys(s.labels for s in samples)
        return samples + [Recorded(s, None, time_ms) for s in before if s not in self._returned]

    def end_series(self, time_ms: int) -> list[Recorded]:
        """The rule is gone: its series end."""
        return [Recorded(labels, None, time_ms) for labels in self._returned]

    async def _evaluate(
        self, query: Query, context: RuleContext, now: float, time_ms: int
    ) -> list[Recorded]:
        recorded: dict[LabelSet, Recorded] = {}
        for series, value in await query(self.rule.expr, time_ms):
            labels = {**series, NAME: self.rule.name, **self.labels}
            key = LabelSet((name, text) for name, text in labels.items() if text)
            if key in recorded:
                raise RuleError(f"{_TWICE} rule labels")
            recorded[key] = Recorded(key, value, time_ms)
        self._check_limit(len(recorded), "series")
        return list(recorded.values())

    def _check_limit(self, count: int, what: str) -> None:
        if self.limit and count > self.limit:
            raise RuleError(f"exceeded limit of {self.limit} with {count} {what}")


class AlertingState(RecordingState):
    """An alerting rule, and its alerts. `changed` is set when a restart must know of it."""

    def __init__(self, rule: Rule, labels: dict[str, str], limit: int):
        super().__init__(rule, labels, limit)
        self.alerts: dict[LabelSet, ActiveAlert] = {}
        self.changed = False
        self._labels = {name: RuleTemplate(text, rule.name) for name, text in labels.items()}
        self._annotations = {
            name: RuleTemplate(text, rule.name) for name, text in rule.annotations.items()
        }
        self._value_query = _before_comparison(rule.expr)

    @property
    def active(self) -> list[ActiveAlert]:
        """The alerts that are pending or firing."""
        return [alert for alert in self.alerts.values() if alert.resolved_at is None]

    async def _evaluate(
        self, query: Query, context: RuleContext, now: float, time_ms: int
    ) -> list[Recorded]:
        found = await self._found(query, context, now, time_ms)
        ends = any(a.fired_at is not None and a.labels not in found for a in self.active)
        values = await self._values_before_comparison(query, time_ms) if ends else {}
        # From here on nothing waits: whoever looks in between sees one evaluation or the next.
        for alert in self.alerts.values():
            alert.forget_future(now)
        for key, alert in found.items():
            known = self.alerts.get(key)
            if known is not None and known.resolved_at is None:
                known.value, known.annotations = alert.value, alert.annotations
                known.series = alert.series
            else:
                self.alerts[key] = alert
                self.changed = True
        for alert in list(self.alerts.values()):
            if alert.labels in found:
                self._go_on(alert, now)
            elif self._is_resolved_now(alert, now):
                value = values.get(alert.series)
                alert.annotations = {
                    "firing_value": format_value(alert.value),
                    "resolved_value": "no value" if value is None else format_value(value),
                } | alert.annotations
        try:
            self._check_limit(len(self.active), "alerts")
        except RuleError:
            self.alerts.clear()
            raise
        return [sample for alert in self.active for sample in self._samples(alert, time_ms)]

    async def _found(
        self, query: Query, context: RuleContext, now: float, time_ms: int
    ) -> dict[LabelSet, ActiveAlert]:
        """What the expression gives, as alerts that begin now, by their labels."""
        expander = _Expander(context, query, time_ms)
        found: dict[LabelSet, ActiveAlert] = {}
        for number, (series, value) in enumerate(await query(self.rule.expr, time_ms)):
            if number % ALERTS_A_SLICE == ALERTS_A_SLICE - 1:
                await asyncio.sleep(0)
            plain = LabelSet(item for item in series.items() if item[0] != NAME)
            labels = plain | await expander.expand(self._labels, series, value)
            labels["alertname"] = self.rule.name
            key = LabelSet((name, text) for name, text in labels.items() if text)
            if key in found:
                raise RuleError(f"{_TWICE} alert labels")
            annotations = await expander.expand(self._annotations, series, value)
            found[key] = ActiveAlert(key, annotations, value, plain, now)
        return found

    def _go_on(self, alert: ActiveAlert, now: float) -> None:
        """The expression still gives this alert."""
        alert.keep_firing_since = None
        if alert.fired_at is None and _ms_since(alert.active_at, now) >= self.rule.for_ms:
            alert.fired_at = now
            self.changed = True

    def _is_resolved_now(self, alert: ActiveAlert, now: float) -> bool:
        """Whether an alert that the expression no longer gives ends at this moment."""
        if alert.fired_at is None or (
            alert.resolved_at is not None and now - alert.resolved_at > RESOLVED_RETENTION_S
        ):
            del self.alerts[alert.labels]
            self.changed = True
        elif alert.resolved_at is None:
            if alert.keep_firing_since is None:
                alert.keep_firing_since = now
                self.changed = True
            if _ms_since(alert.keep_firing_since, now) >= self.rule.keep_firing_for_ms:
                alert.resolved_at = now
                return True
        return False

    async def _values_before_comparison(self, query: Query, time_ms: int) -> dict[LabelSet, float]:
        """What the expression compares, by series: at such values alerts are resolved."""
        try:
            found = await query(self._value_query, time_ms) if self._value_query else ()
        except RuleError as error:
            logger.debug("no value for what is resolved: %s", error)
            return {}
        return {
            LabelSet(i for i in series.items() if i[0] != NAME): value for series, value in found
        }

    @staticmethod
    def _samples(alert: ActiveAlert, time_ms: int) -> Iterator[Recorded]:
        state = {NAME: "ALERTS", "alertstate": alert.state}
        yield Recorded(LabelSet(alert.labels | state), 1.0, time_ms)
        since = float(int(alert.active_at))
        yield Recorded(LabelSet(alert.labels | {NAME: "ALERTS_FOR_STATE"}), since, time_ms)

    def to_send(self, now: float, context: RuleContext, interval_s: float) -> list[Alert]:
        """The alerts that are to be told of now; they count as told."""
        valid_s = 4 * max(interval_s, context.resend_delay_s)
        url = context.external_url + _link(self.query, tab=1)
        told = []
        for alert in self.alerts.values():
            if alert.fired_at is not None and alert.needs_sending(now, context.resend_delay_s):
                alert.sent_at = now
                ends_at = now + valid_s if alert.resolved_at is None else alert.resolved_at
                labels = LabelSet({**context.external_labels, **alert.labels})
                told.append(Alert(labels, alert.annotations, alert.fired_at, ends_at, now, url))
        self.changed |= bool(told)
        return told

    def restore(self, kept: dict[str, Any], now: float) -> None:
        """Take over what was kept of the rule."""
        self.evaluated_at = kept["evaluated_at"]
        gap_s, restarted = now - self.evaluated_at, 0
        for alert in map(ActiveAlert.from_json, kept["alerts"]):
            if alert.state == "pending" and gap_s > MAX_GAP_S:
                alert.active_at = now
                restarted += 1
            self.alerts[alert.labels] = alert
        for alert in self.active:
            self._returned |= dict.fromkeys(sample.labels for sample in self._samples(alert, 0))
        if restarted:
            logger.warning(
                "rule %s: no evaluation for %d s: %d pending alerts start again",
                self.rule.name, gap_s, restarted,
            )  # fmt: skip


def _before_comparison(expression: str) -> str:
    """What an expression compares, as text; "" where it compares nothing.

    >>> _before_comparison("sum(a) / b > 5 and on() c"), _before_comparison("vector(1)")
    ('sum(a) / b', '')
    """
    node, compares = parse_query(expression), False
    while True:
        if isinstance(node, Paren):
            node = node.expression
        elif isinstance(node, Binary) and node.op in ("and", "unless", *COMPARE):
            compares = compares or node.op in COMPARE
            node = node.left
        else:
            return query_text(node) if compares else ""


class GroupState:
    """The rules of a group, which are evaluated in order at fixed times."""

    def __init__(
        self, group: RuleGroup, file: str, context: RuleContext, default_interval_s: float = 60.0
    ):
        self.name, self.file, self.context = group.name, file, context
        self.key = f"{file};{group.name}"
        self.interval_s = group.interval_ms / 1000 or default_interval_s
        self.limit, self.query_offset_ms = group.limit, group.query_offset_ms
        self.rules: list[RecordingState] = []
        for rule in group.rules:
            kind = AlertingState if rule.is_alert else RecordingState
            self.rules.append(kind(rule, {**group.labels, **rule.labels}, group.limit))
        self.alerting = [rule for rule in self.rules if isinstance(rule, AlertingState)]
        self.evaluated_at = self.duration_s = 0.0
        self.evaluations = self.failures = self.missed = 0
        self._interval_ms = round(self.interval_s * 1000)
        digest = hashlib.sha256(self.key.encode(errors="backslashreplace")).digest()
        self._offset_ms = int.from_bytes(digest[:8]) % self._interval_ms

    def next_time(self, now: float) -> float:
        """The first time after `now` at which the group is to be evaluated: a fixed offset into its
        interval, which spreads groups evenly.
        """
        # in whole milliseconds: a time of its own, given again, must not come out once more
        now_ms = math.floor(now * 1000 + 0.001)
        return (now_ms + self._interval_ms - (now_ms - self._offset_ms) % self._interval_ms) / 1000

    async def evaluate(
        self,
        now: float,
        query: Query,
        record: Callable[[list[Recorded]], Awaitable[None]],
        tell: Callable[[list[Alert]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Evaluate all rules; each sees what those before it have recorded. A rule that fails
        leaves its alerts as they are.
        """
        began = clock()
        time_ms = round(now * 1000) - self.query_offset_ms
        for rule in self.rules:
            rule_began = clock()
            self.evaluations += 1
            try:
                await record(await rule.evaluate(query, self.context, now, time_ms))
                rule.health, rule.last_error = "ok", ""
            except RuleError as error:
                self.failures += 1
                rule.health, rule.last_error = "err", str(error)
            rule.evaluated_at, rule.duration_s = now, clock() - rule_began
            if isinstance(rule, AlertingState):
                tell(rule.to_send(now, self.context, self.interval_s))
        self.evaluated_at, self.duration_s = now, clock() - began

    # ---- what survives a crash

    def _keys(self) -> Iterator[tuple[str, AlertingState]]:
        """The alerting rules by what knows them again: name, labels, and a number among equals."""
        seen: Counter[str] = Counter()
        for rule in self.alerting:
            key = write_json([self.file, self.name, rule.rule.name, sorted(rule.labels.items())])
            seen[key] += 1
            yield f"{key}#{seen[key]}", rule

    def state(self) -> dict[str, Any]:
        """The alerts of each rule, by its key."""
        return {
            key: {
                "evaluated_at": rule.evaluated_at,
                "alerts": [alert.as_json() for alert in rule.alerts.values()],
            }
            for key, rule in self._keys()
            if rule.alerts
        }

    def restore(self, kept: dict[str, Any], now: float) -> None:
        """Take over the alerts of rules that are known again, and remove them from `kept`."""
        for key, rule in self._keys():
            if key in kept:
                rule.restore(kept.pop(key), now)

    def end_series(self, time_ms: int) -> list[Recorded]:
        """The ends of all series, for when the group is gone."""
        return [sample for rule in self.rules for sample in rule.end_series(time_ms)]


# ==================================================================================================
# 56. Rules in the API
# ==================================================================================================
#
# What the API says of rules and alerts, in Prometheus's words: groups by their files and names,
# filtered and in pages.


def selectors_of(expression: str) -> list[str]:
    """The selectors of an expression, without ranges and offsets; those of `absent` are left out,
    as they are meant to match nothing.

    >>> selectors_of("rate(a[5m]) / b{c='d'} offset 1h or absent(e)")
    ['a', 'b{c="d"}']
    """
    found: list[str] = []

    def look(node: object) -> None:
        if isinstance(node, Selector):
            found.append(query_text(node._replace(range=None, offset=None, at=None)))
        elif isinstance(node, Call) and node.name in ("absent", "absent_over_time"):
            return
        elif isinstance(node, tuple):
            for part in node:
                look(part)

    look(parse_query(expression))
    return list(dict.fromkeys(found))


def utc_time(time_s: float) -> datetime.datetime:
    """A time of an alert; those beyond the calendar are its first or last."""
    first, last = -62_135_596_800, 253_402_300_799
    return UNIX_EPOCH + datetime.timedelta(seconds=min(max(time_s, first), last))


def api_time(time_s: float) -> str:
    """A time as the APIs write it, to the millisecond; 0.0 is none, which Go writes as the year 1.

    >>> api_time(1758116723.123), api_time(0.0)
    ('2025-09-17T13:45:23.123Z', '0001-01-01T00:00:00Z')
    """
    if not time_s:
        return "0001-01-01T00:00:00Z"
    return utc_time(time_s).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _active_json(alert: ActiveAlert) -> dict[str, Any]:
    shown = {
        "labels": alert.labels, "annotations": alert.annotations, "state": alert.state,
        "activeAt": api_time(alert.active_at), "value": exponent_text(alert.value),
    }  # fmt: skip
    if alert.keep_firing_since is not None:
        shown["keepFiringSince"] = api_time(alert.keep_firing_since)
    return shown


def alerts_json(groups: Iterable[GroupState]) -> list[dict[str, Any]]:
    """All alerts that are pending or firing, as `/api/v1/alerts` has them."""
    rules = (rule for group in groups for rule in group.alerting)
    return [_active_json(alert) for rule in rules for alert in rule.active]


def _rule_json(state: RecordingState, with_alerts: bool) -> dict[str, Any]:
    rule = state.rule
    shown: dict[str, Any] = {
        "name": rule.name, "query": state.query, "labels": state.labels, "health": state.health,
        "evaluationTime": state.duration_s, "lastEvaluation": api_time(state.evaluated_at),
        "type": "recording",
    }  # fmt: skip
    if state.last_error:
        shown["lastError"] = state.last_error
    if state.silent_selectors:
        shown["selectorsWithoutSeries"] = state.silent_selectors
    if isinstance(state, AlertingState):
        states = {alert.state for alert in state.active}
        shown |= {
            "type": "alerting", "annotations": rule.annotations, "duration": rule.for_ms / 1000,
            "keepFiringFor": rule.keep_firing_for_ms / 1000,
            "state": next((s for s in ("firing", "pending") if s in states), "inactive"),
            "alerts": list(map(_active_json, state.active)) if with_alerts else None,
        }  # fmt: skip
    return shown


# as Go's strconv.ParseBool has them
_TRUE = ("1", "t", "T", "true", "TRUE", "True")
_FALSE = ("0", "f", "F", "false", "FALSE", "False")


def rules_json(groups: Iterable[GroupState], form: Mapping[str, list[str]]) -> dict[str, Any]:
    """Groups and rules as `/api/v1/rules` has them, with its parameters. Raises ValueError."""

    def only(name: str) -> str:
        return form.get(name, [""])[0]

    def is_listed(name: str, value: str) -> bool:
        return value in form.get(f"{name}[]", (value,))

    kind = only("type").lower()
    if kind not in ("", "alert", "record"):
        raise ValueError(f'invalid parameter "type": not supported value {write_json(kind)}')
    matcher_sets = [_matchers_of(text) for text in form.get("match[]", [])]
    hide_alerts = only("exclude_alerts")
    if hide_alerts not in ("", *_TRUE, *_FALSE):
        raise ValueError(f"exclude_alerts {hide_alerts[:20]!r} is neither true nor false")

    def is_wanted(state: RecordingState) -> bool:
        labels = state.labels
        return (
            (not kind or state.rule.is_alert == (kind == "alert"))
            and is_listed("rule_name", state.rule.name)
            and (not matcher_sets or any(
                all(matcher.accepts(labels.get(matcher.name, "")) for matcher in matchers)
                for matchers in matcher_sets
            ))
        )  # fmt: skip

    shown = []
    for group in sorted(groups, key=lambda group: (group.file, group.name)):
        if is_listed("rule_group", group.name) and is_listed("file", group.file):
            rules = [_rule_json(state, hide_alerts not in _TRUE)
                     for state in group.rules if is_wanted(state)]  # fmt: skip
            shown.append({
                "name": group.name, "file": group.file, "rules": rules, "limit": group.limit,
                "interval": group.interval_s, "evaluationTime": group.duration_s,
                "lastEvaluation": api_time(group.evaluated_at),
            })  # fmt: skip
    shown = [group for group in shown if group["rules"]]
    return _page_of(shown, only("group_limit"), only("group_next_token"))


def _matchers_of(text: str) -> tuple[Matcher, ...]:
    node = parse_query(text)
    if not isinstance(node, Selector) or node.range is not None:
        raise ValueError(f"{text[:200]!r} is not a selector")
    return node.matchers


def _page_of(groups: list[dict[str, Any]], limit_text: str, token: str) -> dict[str, Any]:
    """A page of groups, and the token of the next one."""
    if token and not limit_text:
        raise ValueError("group_limit needs to be set when group_next_token is")
    if not limit_text:
        return {"groups": groups}
    if not re.fullmatch(r"[1-9][0-9]{0,8}", limit_text):
        raise ValueError(f"group_limit {limit_text[:20]!r} is not a positive number")
    tokens = [
        hashlib.sha1(f"{group['file']};{group['name']}".encode()).hexdigest() for group in groups
    ]
    if token and token not in tokens:
        raise ValueError("invalid group_next_token; the groups may have changed")
    start = tokens.index(token) if token else 0
    end = start + int(limit_text)
    page: dict[str, Any] = {"groups": groups[start:end]}
    return page | ({"groupNextToken": tokens[end]} if end < len(groups) else {})


# ==================================================================================================
# 57. Rules over history
# ==================================================================================================
#
# The problem: when would a rule have fired, had it been there? The idea: evaluate rules as the
# watcher does, but with a clock that jumps from one evaluation to the next, over what the store has
# kept: a backtest. What rules record goes into memory, beside the series that are there; what they
# recorded when they ran is not looked at. What it costs: nothing where no test runs.

BAR_WIDTH = 60
READ_AHEAD_MS = 6 * 3600 * 1000  # a chunk is decoded once in so long, not at each query


class MemorySeries:
    """Series in memory, to be queried. A series grows at its end, as in Prometheus."""

    def __init__(self) -> None:
        self._index = SeriesIndex()
        self._series: list[tuple[array[int], array[float]]] = []
        self.names: set[str] = set()

    def number(self, labels: Mapping[str, str]) -> int:
        """The number of the series of these labels, a new one if there is none."""
        self.names.add(labels.get(NAME, ""))
        pairs = (pair for pair in sorted(labels.items()) if pair[1])
        number = self._index.number(tuple(part for pair in pairs for part in pair))
        if number == len(self._series):
            self._series.append((array("q"), array("d")))
        return number

    def append(self, number: int, time_ms: int, value: float) -> bool:
        """Add a sample to a series; whether that could be, or it is there already."""
        times_ms, values = self._series[number]
        if times_ms and time_ms <= times_ms[-1]:
            return time_ms == times_ms[-1] and value == values[-1]
        times_ms.append(time_ms)
        values.append(value)
        return True

    async def record(self, samples: list[Recorded]) -> None:
        """Add what a rule records. Raises RuleError where there is something else already."""
        late = False
        for labels, value, time_ms in samples:
            added = self.append(self.number(labels), time_ms, STALE if value is None else value)
            late = late or not (added or value is None)
        if late:
            raise RuleError("duplicate sample for timestamp")

    def select(
        self, matchers: Sequence[Matcher], start_ms: int, end_ms: int, budget: Budget
    ) -> Iterator[Series]:
        """The series that fulfil all matchers, with their samples between two times."""
        for number in self._index.select(matchers, budget):
            pairs = self._index.labels[number]
            labels = dict(zip(pairs[::2], pairs[1::2]))
            yield from _between(Series(labels, *self._series[number]), start_ms, end_ms)


def _between(series: Series, start_ms: int, end_ms: int) -> Iterator[Series]:
    """A series between two times, if it has samples there."""
    labels, times_ms, values = series
    low, high = bisect_left(times_ms, start_ms), bisect_right(times_ms, end_ms)
    if low < high:
        yield Series(labels, times_ms[low:high], values[low:high])


def engine_query(engine: Engine) -> Query:
    """A query function for rules over an engine."""
    parsed = functools.cache(parse_query)  # rules are asked again and again

    async def query(expression: str, time_ms: int) -> Vector:
        try:
            result = engine.instant(parsed(expression), time_ms)
        except (QueryError, ExecutionError) as error:
            raise RuleError(str(error)) from None
        if isinstance(result, VectorResult):
            return result.samples
        if isinstance(result, ScalarResult):
            return [({}, result.value)]
        raise RuleError("rule result is not a vector or scalar")

    return query


def _at_once(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine that waits for nothing: where it lets others go first, there are none."""
    while True:
        try:
            work.send(None)
        except StopIteration as end:
            result: _T = end.value
            return result


class Firing(NamedTuple):
    """A time in which an alert would have fired."""

    rule: AlertingState
    labels: LabelSet
    began_ms: int
    ended_ms: int


def _read_ahead(select: Select) -> Select:
    """A `select` for queries that go on in time: it reads some hours more, and keeps them."""
    # by the matchers and the length of the window
    kept: dict[tuple[tuple[Matcher, ...], int], tuple[int, int, list[Series]]] = {}

    def selected(
        matchers: Sequence[Matcher], low_ms: int, high_ms: int, budget: Budget
    ) -> Iterator[Series]:
        key = tuple(matchers), high_ms - low_ms
        first_ms, last_ms, found = kept.get(key, (0, -1, []))
        if not first_ms <= low_ms <= high_ms <= last_ms:
            last_ms = high_ms + READ_AHEAD_MS
            found = list(select(matchers, low_ms, last_ms, budget))
            kept[key] = low_ms, last_ms, found
        for series in found:
            yield from _between(series, low_ms, high_ms)

    return selected


def backtest(
    groups: list[GroupState], select: Select, start_ms: int, end_ms: int
) -> tuple[list[Firing], Counter[str]]:
    """Evaluate groups over stored series between two times: when alerts would have fired, in the
    order of their ends, and how often a rule would have failed and why.
    """
    memory, stored = MemorySeries(), _read_ahead(select)

    def both(
        matchers: Sequence[Matcher], low_ms: int, high_ms: int, budget: Budget
    ) -> Iterator[Series]:
        for series in stored(matchers, low_ms, high_ms, budget):
            if series.labels.get(NAME) not in memory.names:
                yield series
        yield from memory.select(matchers, low_ms, high_ms, budget)

    query = engine_query(Engine(both))
    due = [(group.next_time((start_ms - 1) / 1000), number) for number, group in enumerate(groups)]
    heapq.heapify(due)
    fired: list[Firing] = []
    failed: Counter[str] = Counter()
    firing: dict[int, dict[LabelSet, Firing]] = {}  # what goes on, by the rule's id and the labels
    while due and due[0][0] * 1000 <= end_ms:
        now, number = heapq.heappop(due)
        group, now_ms = groups[number], round(now * 1000)
        heapq.heappush(due, (group.next_time(now), number))
        _at_once(group.evaluate(now, query, memory.record, lambda alerts: None))
        failed.update(
            f"{rule.rule.name}: {rule.last_error}" for rule in group.rules if rule.health == "err"
        )
        for rule in group.alerting:
            before = firing.get(id(rule), {})
            after = firing[id(rule)] = {
                alert.labels: before.get(alert.labels, Firing(rule, alert.labels, now_ms, end_ms))
                for alert in rule.active
                if alert.fired_at is not None
            }
            fired += [
                ended._replace(ended_ms=now_ms) for key, ended in before.items() if key not in after
            ]
    return fired + [one for rest in firing.values() for one in rest.values()], failed


def firing_bar(times: Iterable[tuple[int, int]], start_ms: int, end_ms: int) -> str:
    """When something fired, at a glance.

    >>> firing_bar([(0, 30), (90, 100)], 0, 100)[::6]
    '███······█'
    """
    cells, span_ms = ["·"] * BAR_WIDTH, max(1, end_ms - start_ms)
    for began_ms, ended_ms in times:
        first = min(BAR_WIDTH - 1, (began_ms - start_ms) * BAR_WIDTH // span_ms)
        last = -((start_ms - ended_ms) * BAR_WIDTH // span_ms)
        for cell in range(first, max(first + 1, last)):
            cells[cell] = "█"
    return "".join(cells)


# ==================================================================================================
# 58. Rule tests
# ==================================================================================================
#
# The problem: a rule that was never seen to fire is a guess. The idea: evaluate it over series that
# a test file describes, and compare: promtool's unit tests. What it costs: nothing where no test
# runs.
#
# Source: https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/

TOLERANCE = 1e-9  # values that differ less, relatively, are the same
MAX_SERIES_ITEMS = 10_000_000


class AlertTest(NamedTuple):
    """Which alerts of a name are to fire at a time: their labels and annotations."""

    time_ms: int
    name: str
    expected: list[tuple[LabelSet, LabelSet]]


class ExpressionTest(NamedTuple):
    """What an expression is to give at a time."""

    time_ms: int
    expression: str
    expected: list[tuple[LabelSet, float]]


class RuleTest(NamedTuple):
    """A test: series, and what rules make of them."""

    name: str
    interval_ms: int
    start_ms: int
    series: list[tuple[dict[str, str], list[float | None]]]
    alerts: list[AlertTest]
    expressions: list[ExpressionTest]
    external_labels: dict[str, str]
    external_url: str


class RuleTestFile(NamedTuple):
    """A file of unit tests."""

    rule_files: list[str]
    evaluation_interval_ms: int
    tolerance: float  # relative
    group_order: list[str]
    tests: list[RuleTest]


# ---- reading them

_SERIES_NUMBER = (
    r"(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[iI][nN][fF]|[nN][aA][nN])"
)
_SERIES_ITEM = re.compile(
    rf"(?P<gap>_)(?:x(?P<gaps>[0-9]{{1,9}}))?|(?P<stale>stale)"
    rf"|(?P<first>[-+]?{_SERIES_NUMBER})"
    rf"(?:(?P<step>[-+]{_SERIES_NUMBER})?x(?P<times>[0-9]{{1,9}}))?"
)


def series_values(text: str) -> list[float | None]:
    """The values of a series in promtool's notation; None is a gap, STALE an end. Raises
    ValueError.

    >>> series_values("1+2x2 _ 7x1 stale -1-0.5x1")
    [1.0, 3.0, 5.0, None, 7.0, 7.0, nan, -1.0, -1.5]
    """
    if "{{" in text:
        raise ValueError("native histograms are not supported")
    values: list[float | None] = []
    for word in text.split():
        match = _SERIES_ITEM.fullmatch(word)
        if match is None:
            raise ValueError(f"{word[:50]!r} is no value of a series")
        count = int(match["gaps"] or match["times"] or 0) + (match["gaps"] is None)
        if len(values) + count > MAX_SERIES_ITEMS:
            raise ValueError(f"more than {MAX_SERIES_ITEMS} values")
        if match["first"] is None:
            values += [None if match["gap"] else STALE] * count
        else:
            value, step = read_float(match["first"]), read_float(match["step"] or "0")
            for _ in range(count):
                values.append(value)
                value += step
    return values


def metric_labels(text: str) -> dict[str, str]:
    """The labels of a series as one writes it, such as `up{job="a"}`. Raises ValueError.

    >>> metric_labels('up{job="a"}'), metric_labels("{}")
    ({'job': 'a', '__name__': 'up'}, {})
    """
    if "".join(text.split()) in ("", "{}"):
        return {}
    node = parse_query(text)
    if not isinstance(node, Selector) or node != node._replace(range=None, offset=None, at=None):
        raise ValueError(f"{text[:100]!r} is no series")
    if any(matcher.op != "=" for matcher in node.matchers):
        raise ValueError(f"{text[:100]!r} is no series: its labels are given with =")
    return {matcher.name: matcher.value for matcher in node.matchers if matcher.value}


_TEST_FILE_FIELDS = (
    "rule_files", "evaluation_interval", "group_eval_order", "tests", "fuzzy_compare",
)  # fmt: skip
_TEST_FIELDS = (
    "name", "interval", "start_timestamp", "input_series", "alert_rule_test", "promql_expr_test",
    "external_labels", "external_url",
)  # fmt: skip
# By `fuzzy_compare`, which asks for Prometheus's comparison: exact, or but for the last bit.
_TOLERANCES = {"": TOLERANCE, "false": 0.0, "true": sys.float_info.epsilon}


class _RuleTestReader(_RuleReader):
    """Reads a file of unit tests; faults are noted as those of rule files are."""

    def test_file(self) -> RuleTestFile:
        root = self.fields(self.document.root, "a file of tests", _TEST_FILE_FIELDS)
        interval_ms = self.duration_ms(root, "evaluation_interval") or 60_000
        tests = [self._test(node, interval_ms) for node in self.items(root, "tests")]
        fuzzy = self.text(root, "fuzzy_compare").lower()
        if fuzzy not in _TOLERANCES:
            self.fault(root["fuzzy_compare"], "'fuzzy_compare' must be true or false")
        files, order = (
            [self.scalar(node, name) or "" for node in self.items(root, name)]
            for name in ("rule_files", "group_eval_order")
        )
        for place, node in enumerate(self.items(root, "group_eval_order")):
            if order[place] in order[:place]:
                self.fault(node, f"group {_clipped(order[place])!r} has its place already")
        self.finish()
        return RuleTestFile(files, interval_ms, _TOLERANCES[fuzzy], order, tests)

    def _test(self, node: YamlNode, evaluation_interval_ms: int) -> RuleTest:
        fields = self.fields(node, "a test", _TEST_FIELDS)
        return RuleTest(
            self.text(fields, "name"),
            self.duration_ms(fields, "interval") or evaluation_interval_ms,
            self.read(fields, "start_timestamp", _read_api_time, 0),
            [self._series_of(row) for row in self.items(fields, "input_series")],
            [self._alert_test(row) for row in self.items(fields, "alert_rule_test")],
            [self._expression_test(row) for row in self.items(fields, "promql_expr_test")],
            self.labels(fields, "external_labels"),
            self.text(fields, "external_url"),
        )

    def _series_of(self, node: YamlNode) -> tuple[dict[str, str], list[float | None]]:
        fields = self.fields(node, "an input series", ("series", "values"))
        labels: dict[str, str] = self.read(fields, "series", metric_labels, {})
        values: list[float | None] = self.read(fields, "values", series_values, [])
        if values and not self.text(fields, "series"):
            self.fault(node, "an input series needs a name, 'series'")
        return labels, values

    def _alert_test(self, node: YamlNode) -> AlertTest:
        fields = self.fields(node, "a test of alerts", ("eval_time", "alertname", "exp_alerts"))
        name = self.text(fields, "alertname")
        if not name:
            self.fault(node, "a test of alerts needs an alertname")
        expected = []
        for row in self.items(fields, "exp_alerts"):
            alert = self.fields(row, "an alert", ("exp_labels", "exp_annotations"))
            labels = LabelSet(self.labels(alert, "exp_labels") | {"alertname": name})
            expected.append((labels, LabelSet(self.labels(alert, "exp_annotations"))))
        return AlertTest(self.duration_ms(fields, "eval_time"), name, expected)

    def _expression_test(self, node: YamlNode) -> ExpressionTest:
        fields = self.fields(node, "a test of an expression", ("expr", "eval_time", "exp_samples"))
        expected = []
        for row in self.items(fields, "exp_samples"):
            sample = self.fields(row, "a sample", ("labels", "value", "histogram"))
            if "histogram" in sample:
                self.fault(sample["histogram"], "native histograms are not supported")
            value = sample.get("value")
            if isinstance(value, YamlScalar) and not value.plain:
                self.fault(value, "'value' must be a number, without quotes")
            labels: dict[str, str] = self.read(sample, "labels", metric_labels, {})
            expected.append((LabelSet(labels), self.read(sample, "value", _yaml_float, 0.0)))
        expression = self._expression(fields, node)
        return ExpressionTest(self.duration_ms(fields, "eval_time"), expression, expected)


def _yaml_float(text: str) -> float:
    """A number as YAML writes it: `.inf`, `.NaN`, `0x1F`, `1_000` too.

    >>> _yaml_float("-.inf"), _yaml_float("0x1F"), _yaml_float("1e3")
    (-inf, 31.0, 1000.0)
    """
    with contextlib.suppress(ValueError):
        if text.lower().lstrip("-+") in (".inf", ".nan"):
            return float(text.replace(".", ""))
        if text[-1:] in "0123456789.":  # without its point, Infinity is text in YAML
            return float(text)
    with contextlib.suppress(ValueError):
        return float(int(text, 0))
    raise ValueError(f"{text[:50]!r} is no number")


def read_rule_tests(text: str | bytes, name: str) -> RuleTestFile:
    """Read a file of promtool's unit tests for rules. Raises FaultyFile, with every fault."""
    return _RuleTestReader(text, name).test_file()


# ---- running them


def run_rule_test(test: RuleTest, tests: RuleTestFile, files: list[RuleFile]) -> list[str]:
    """Run a test; what failed, each a text of several lines."""
    return _at_once(_RuleTestRun(test, tests, files).run())


class _RuleTestRun:
    """One test, while it runs."""

    def __init__(self, test: RuleTest, tests: RuleTestFile, files: list[RuleFile]):
        self._test, self._interval_ms = test, tests.evaluation_interval_ms
        self._tolerance = tests.tolerance
        context = RuleContext(test.external_labels, test.external_url)
        groups = [GroupState(group, file.name, context) for file in files for group in file.groups]
        # groups that are not listed come early, as in promtool
        ranks = {name: rank for rank, name in enumerate(tests.group_order)}
        self._groups = sorted(groups, key=lambda group: ranks.get(group.name, 0))
        self._memory = MemorySeries()
        engine = Engine(self._memory.select, subquery_step_ms=self._interval_ms)
        self._query = engine_query(engine)

    async def run(self) -> list[str]:
        """Evaluate from the start to the last time that is asked for; what failed."""
        failures: list[str] = []
        test, start_ms = self._test, self._test.start_ms
        samples = self._samples()
        for now_ms in range(0, self._end_ms() + 1, self._interval_ms):
            # rules see no sample that is still to come, not even with a negative offset
            while samples and samples[-1][0] <= start_ms + now_ms:
                time_ms, number, value = samples.pop()
                self._memory.append(number, time_ms, value)
            failures += await self._evaluate(now_ms)
            if failures:
                return failures
            for case in test.alerts:
                if now_ms <= case.time_ms < now_ms + self._interval_ms:
                    failures += _compared_alerts(case, self._groups)
        for expected in test.expressions:
            failures += await self._compared_samples(expected)
        return failures

    def _samples(self) -> list[tuple[int, int, float]]:
        """(time, number of the series, value) of what the test puts in, the latest first."""
        # whoever gives a series twice means the second one
        series = {self._memory.number(labels): values for labels, values in self._test.series}
        return sorted((
            (self._test.start_ms + place * self._test.interval_ms, number, value)
            for number, values in series.items()
            for place, value in enumerate(values)
            if value is not None
        ), key=operator.itemgetter(0), reverse=True)  # fmt: skip

    def _end_ms(self) -> int:
        times_ms = [case.time_ms for case in self._test.alerts]
        return max(times_ms + [case.time_ms for case in self._test.expressions], default=0)

    async def _evaluate(self, now_ms: int) -> list[str]:
        """Evaluate all groups; which rules could not be."""
        failures = []
        for group in self._groups:
            now = (self._test.start_ms + now_ms) / 1000
            await group.evaluate(now, self._query, self._memory.record, lambda alerts: None)
            failures += [
                f"rule {rule.rule.name} at {_duration_text(now_ms)}: {rule.last_error}"
                for rule in group.rules
                if rule.health == "err"
            ]
        return failures

    async def _compared_samples(self, case: ExpressionTest) -> list[str]:
        title = f"expr: {case.expression}, time: {_duration_text(case.time_ms)}"
        try:
            found = await self._query(case.expression, self._test.start_ms + case.time_ms)
        except RuleError as error:
            return [f"{title}\n  {error}"]
        got = [(LabelSet(labels), value) for labels, value in found]
        expected, by_labels = dict(case.expected), dict(got)
        if len(case.expected) == len(got) and expected.keys() == by_labels.keys() and all(
            self._is_close(value, by_labels[labels]) for labels, value in expected.items()
        ):  # fmt: skip
            return []
        texts = (
            sorted(f"{labels_text(labels)} {format_value(value)}" for labels, value in samples)
            for samples in (case.expected, got)
        )
        return [_difference(title, *texts)]

    def _is_close(self, expected: float, got: float) -> bool:
        return (math.isnan(expected) and math.isnan(got)) or math.isclose(
            expected, got, rel_tol=self._tolerance, abs_tol=0.0
        )


def _compared_alerts(case: AlertTest, groups: list[GroupState]) -> Iterator[str]:
    rules = (rule for group in groups for rule in group.alerting if rule.rule.name == case.name)
    got = [(alert.labels, LabelSet(alert.annotations))
           for rule in rules for alert in rule.active if alert.fired_at is not None]  # fmt: skip

    def lines(alerts: list[tuple[LabelSet, LabelSet]]) -> list[str]:
        texts = []
        for labels, annotations in sorted(alerts, key=lambda alert: sorted(alert[0].items())):
            texts.append(f"labels      {labels_text(labels)}")
            for name, text in sorted(annotations.items()):
                texts += [f"  {name}: {line}" for line in text.split("\n")]
        return texts

    if Counter(got) != Counter(case.expected):
        title = f"alertname: {case.name}, time: {_duration_text(case.time_ms)}"
        yield _difference(title, lines(case.expected), lines(got))


def _difference(title: str, expected: list[str], got: list[str]) -> str:
    """Expected and got, as a diff."""
    context = len(expected) + len(got)
    rows = list(difflib.unified_diff(expected, got, lineterm="", n=context))[3:]
    return "\n".join([title, "  - expected, + got:", *(f"  {row[0]} {row[1:]}" for row in rows)])


# ==================================================================================================
# 59. Alerts and routes
# ==================================================================================================
#
# The problem: hundreds of alerts fire at once, and each is for somebody else. The idea is that of
# Alertmanager: an alert is known by its labels, a tree of routes names its receivers, and alerts of
# a route that share some labels are told together. What it costs: nobody sees from a receiver alone
# what it gets; `amtool config routes test` says it.
#
# Source: Alertmanager's pkg/labels and dispatch/route.go.


def label_set_text(labels: Mapping[str, str]) -> str:
    """Labels as Go prints a LabelSet."""
    return "{" + ", ".join(f"{label}={_quoted(labels[label])}" for label in sorted(labels)) + "}"


# ---- matchers ----

_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_LABEL_MATCHER = re.compile(r"\s*([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(=~|=|!=|!~)(.*)", re.DOTALL)
_MATCHER_TOKEN = re.compile(r'(?:[^,"\\]|\\.|\\\Z|"(?:[^"\\]|\\.)*(?:"|\\?\Z))*', re.DOTALL)
_MATCHER_VALUE = re.compile(r'(?:[^"\\]|\\.|\\\Z)*', re.DOTALL)
_MATCHER_ESCAPE = re.compile(r'\\([n"\\])')
_kept_label_regex = functools.lru_cache(1024)(compile_regex)


def parse_matchers(text: str) -> list[Matcher]:
    """Conditions on labels, separated by commas, as amtool and configurations write them. Raises
    ValueError.

    >>> [(m.name, m.op, m.value) for m in parse_matchers('{job=api, severity =~ "page|warn"}')]
    [('job', '=', 'api'), ('severity', '=~', 'page|warn')]
    """
    text = text.removeprefix("{").removesuffix("}")
    matchers, position = [], 0
    while position <= len(text):
        token = _MATCHER_TOKEN.match(text, position)
        assert token is not None  # it matches the empty string
        position = token.end() + 1
        if token[0].strip() or position <= len(text):
            matchers.append(parse_matcher(token[0]))
    return matchers


def parse_matcher(text: str) -> Matcher:
    """One condition; its value stands in double quotes or without any. Raises ValueError."""
    match = _LABEL_MATCHER.fullmatch(text)
    if match is None:
        raise ValueError(f"bad matcher format: {_clipped(text)}")
    name, op, value = match[1], match[2], match[3].strip()
    if value.startswith('"') and (len(value) < 2 or not value.endswith('"')):
        raise ValueError(f"matcher value contains unescaped double quote: {_clipped(value)}")
    value = value[1:-1] if value.startswith('"') else value
    if not _MATCHER_VALUE.fullmatch(value):
        raise ValueError(f"matcher value contains unescaped double quote: {_clipped(value)}")
    value = _MATCHER_ESCAPE.sub(lambda escape: {"n": "\n"}.get(escape[1], escape[1]), value)
    return checked_matcher(name, op, value)


def checked_matcher(name: str, op: str, value: str) -> Matcher:
    """A condition whose regular expression compiles. Raises ValueError."""
    if op in ("=~", "!~"):
        compile_regex(value)
    return Matcher(name, op, value)


def matcher_text(matcher: Matcher) -> str:
    """A condition as Alertmanager writes it."""
    value = matcher.value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    return f'{matcher.name}{matcher.op}"{value}"'


def accepts_labels(matchers: Iterable[Matcher], labels: Mapping[str, str]) -> bool:
    """Whether labels fulfil all conditions."""
    for name, op, value in matchers:
        found = labels.get(name, "")
        is_regex = op in ("=~", "!~")
        holds = _kept_label_regex(value).matches(found) if is_regex else found == value
        if holds != (op in ("=", "=~")):
            return False
    return True


# ---- the tree of routes ----


class Route(NamedTuple):
    """A node of the tree: which alerts it is for, who is told of them, and when."""

    receiver: str
    group_by: tuple[str, ...] | None  # None: by all labels
    group_wait_s: float
    group_interval_s: float
    repeat_interval_s: float
    matchers: tuple[Matcher, ...]
    continues: bool  # its siblings may match, too
    key: str  # the conditions from the root to here
    routes: "tuple[Route, ...]" = ()

    def matching(self, labels: Mapping[str, str]) -> "list[Route]":
        """The routes that an alert takes, depth first; none if it is not for this one."""
        if not accepts_labels(self.matchers, labels):
            return []
        found: list[Route] = []
        for route in self.routes:
            deeper = route.matching(labels)
            found += deeper
            if deeper and not route.continues:
                break
        return found or [self]

    def group_labels(self, labels: dict[str, str]) -> dict[str, str]:
        """Those labels that all alerts of a group share."""
        if self.group_by is None:
            return labels
        return {label: labels[label] for label in self.group_by if label in labels}


def route_key(parent_key: str | None, matchers: Iterable[Matcher]) -> str:
    """The conditions from the root to a route."""
    own = "{" + ",".join(map(matcher_text, matchers)) + "}"
    return own if parent_key is None else f"{parent_key}/{own}"


# ==================================================================================================
# 60. Notification settings
# ==================================================================================================
#
# Who is told of what, as values: receivers, how they are reached, and what they are sent. The
# problem is that credentials are among them, which must not be shown by accident. The idea: a
# credential is an object that only shows itself when it is asked to. What it costs: whoever sends
# has to ask.

HIDDEN = "<secret>"  # what is shown of a credential
RESOLVE_TIMEOUT_S = 300.0
WEBHOOK_TIMEOUT_S = 10.0
EMAIL_TIMEOUT_S = 30.0

# What the names `email.default.…` stand for in files that were written for Alertmanager.
DEFAULT_TEMPLATES = """\
{{ define "email.default.subject" }}{{ .Status | toUpper }}\
{{ if eq .Status "firing" }} {{ len .Alerts.Firing }}{{ end }}: \
{{ range $i, $pair := .GroupLabels.SortedPairs }}{{ if $i }}, {{ end }}{{ $pair.Value }}\
{{ else }}{{ .Receiver }}{{ end }}{{ end }}\
{{ define "email.default.text" }}{{ range .Alerts }}\
{{ .Status | toUpper }} {{ .Labels.alertname }}
{{ range .Labels.SortedPairs }}  {{ .Name }} = {{ .Value }}
{{ end }}{{ range .Annotations.SortedPairs }}  {{ .Name }}: {{ .Value }}
{{ end }}  since {{ .StartsAt.UTC.Format "2006-01-02 15:04:05 MST" }}
{{ if .GeneratorURL }}  {{ .GeneratorURL }}
{{ end }}
{{ end }}Sent by {{ .ExternalURL }}
{{ end }}\
{{ define "email.default.html" }}<!DOCTYPE html>
<html><body style="font-family: sans-serif">
<h2>{{ template "email.default.subject" . }}</h2>
{{ range .Alerts }}\
<h3 style="color: {{ if eq .Status "firing" }}#b00020{{ else }}#1b7a34{{ end }}">\
{{ .Status | toUpper }} {{ .Labels.alertname }}</h3>
<table>
{{ range .Labels.SortedPairs }}<tr><td>{{ .Name }}</td><td>{{ .Value }}</td></tr>
{{ end }}{{ range .Annotations.SortedPairs }}\
<tr><td><b>{{ .Name }}</b></td><td>{{ .Value }}</td></tr>
{{ end }}</table>
<p>Since {{ .StartsAt.UTC.Format "2006-01-02 15:04:05 MST" }}</p>
{{ end }}<p>Sent by {{ .ExternalURL }}</p>
</body></html>
{{ end }}"""


class Secret:
    """A credential, or the file that holds it and is read each time. Only `reveal` shows it."""

    def __init__(self, text: str = "", path: str = ""):
        self._text, self._path = text, path

    def __repr__(self) -> str:
        return HIDDEN

    def __bool__(self) -> bool:
        return bool(self._text or self._path)

    def reveal(self) -> str:
        """The credential. Raises OSError and UnicodeDecodeError if its file can't be read."""
        if not self._path:
            return self._text
        with open(self._path, encoding="utf-8") as file:
            return file.read().strip()


class Authorization(NamedTuple):
    """How a request says who sends it: Basic with a user name, or any scheme with a secret."""

    scheme: str
    user: str
    secret: Secret


class TLSOptions(NamedTuple):
    """How servers prove who they are, and how this one does; paths of PEM files."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    insecure: bool = False


class Webhook(NamedTuple):
    """A URL that is told."""

    url: Secret
    shown: str  # the URL as it may be shown
    authorization: Authorization | None = None
    tls: TLSOptions = TLSOptions()
    send_resolved: bool = True
    timeout_s: float = WEBHOOK_TIMEOUT_S
    max_alerts: int = 0  # 0: all
    payload: Any = None  # templates in dicts and lists, or one for the whole body
    kind: str = "webhook"  # or "alertmanager": its API, which gets all alerts


class Email(NamedTuple):
    """Somebody who gets mail."""

    host: str
    port: int
    sender: Template
    to: Template
    headers: dict[str, Template]
    text: Template | None
    html: Template | None
    hello: str = "localhost"
    user: str = ""
    password: Secret = Secret()
    secret: Secret = Secret()  # for CRAM-MD5
    identity: str = ""
    require_tls: bool = True
    tls: TLSOptions = TLSOptions()
    send_resolved: bool = False
    timeout_s: float = EMAIL_TIMEOUT_S
    kind: str = "email"

    @property
    def shown(self) -> str:
        return f"{self.host}:{self.port}"


class NotifyConfig(NamedTuple):
    """Who is told of what."""

    route: Route
    receivers: dict[str, tuple[Webhook | Email, ...]]
    resolve_timeout_s: float = RESOLVE_TIMEOUT_S
    shown: str = ""  # the file without its credentials


FINAL = "not retried: "  # begins an error that would come again

StatisticRow = tuple[str, str, str, dict[str, str], float]


class Delivery(NamedTuple):
    """A notification to be sent; `deliver` sends it, in whatever process."""

    receiver: str
    number: int  # of the integration, among those of the receiver
    integration: Any  # what the configuration says of it
    group_key: str
    group_labels: dict[str, str]
    alerts: tuple[Alert, ...]
    now: float  # when it was begun, which decides what is resolved
    external_url: str
    deadline_s: float  # it takes no longer
    attempt: int

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.receiver}/{self.integration.kind}[{self.number}]"


def shown_url(url: str) -> str:
    """A URL without what may be a credential in it: user, password, path and query.

    >>> shown_url("https://user:pass@hooks.slack.com/services/T0/B0/xyz")
    'https://hooks.slack.com/<secret>'
    """
    parts = urllib.parse.urlsplit(url)
    hidden = f"/{HIDDEN}" if parts.path.strip("/") or parts.query or parts.username else parts.path
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{hidden}"


_NEVER_IN_A_URL = re.compile(r"[\x00-\x20\x7f]")


def _checked_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if not is_usable or _NEVER_IN_A_URL.search(url):
            raise ValueError
    except ValueError:
        # the URL is not repeated: it may hold a credential
        raise ValueError("must be a URL with http:// or https:// and a host") from None
    return url


def url_authorization(url: str) -> Authorization | None:
    """The user and password that a URL names."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return None
    user, password = map(urllib.parse.unquote, (parts.username, parts.password or ""))
    return Authorization("Basic", user, Secret(password))


def webhook_config(urls: Sequence[str]) -> NotifyConfig:
    """Every URL is told of every alert; groups are those of `alertname`. Raises ValueError."""
    webhooks = tuple(Webhook(Secret(_checked_url(url)), shown_url(url)) for url in urls)
    route = Route("webhook", ("alertname",), 10.0, 60.0, 4 * 3600.0, (), False, "{}")
    shown = "route:\n  receiver: webhook\n  group_by: [alertname]\n  group_wait: 10s\n"
    shown += "  group_interval: 1m\n  repeat_interval: 4h\nreceivers:\n- name: webhook\n"
    shown += "  webhook_configs:\n" + "".join(f"  - url: {hook.shown}\n" for hook in webhooks)
    return NotifyConfig(route, {"webhook": webhooks}, shown=shown)


def parse_notification_template(text: str) -> Template:
    """A template that may use the default ones by their names. Raises TemplateError."""
    return parse_template(text + DEFAULT_TEMPLATES, NOTIFICATION_FUNCTIONS)


# ==================================================================================================
# 61. Notification files
# ==================================================================================================
#
# The problem: who is told what stands in a file, and people have such files already. The idea: read
# the part of Alertmanager's own format that one machine needs, and refuse all else by name rather
# than leave somebody untold. Templates, matchers and addresses are checked when the file is read,
# and all faults are told with their places. What it costs: a field that is valid in Alertmanager
# may be refused here.
#
# Source: https://prometheus.io/docs/alerting/latest/configuration/

_SECRETS = (
    "auth_password", "auth_secret", "credentials", "password", "smtp_auth_password",
    "smtp_auth_secret",
)  # fmt: skip
_THE_FILE = "the file"  # its top is no place that needs a name
_GLOBAL_FIELDS = (
    "resolve_timeout", "http_config", "smtp_from", "smtp_smarthost", "smtp_hello",
    "smtp_auth_username", "smtp_auth_password", "smtp_auth_password_file", "smtp_auth_secret",
    "smtp_auth_identity", "smtp_require_tls",
)  # fmt: skip
_ROUTE_FIELDS = (
    "receiver", "group_by", "group_wait", "group_interval", "repeat_interval", "match", "match_re",
    "matchers", "continue", "routes",
)  # fmt: skip
_WEBHOOK_FIELDS = (
    "url", "url_file", "send_resolved", "timeout", "max_alerts", "http_config", "payload",
)  # fmt: skip
_HTTP_FIELDS = ("basic_auth", "authorization", "tls_config", "follow_redirects")
_BASIC_FIELDS = ("username", "password", "password_file")
_AUTHORIZATION_FIELDS = ("type", "credentials", "credentials_file")
_EMAIL_FIELDS = (
    "to", "from", "smarthost", "hello", "auth_username", "auth_password", "auth_password_file",
    "auth_secret", "auth_identity", "headers", "html", "text", "require_tls", "tls_config",
    "send_resolved",
)  # fmt: skip
_HEADER_NAME = re.compile(r"[!-9;-~]+")  # RFC 5322, 2.2
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _shown_config(node: YamlNode, field: str = "", indent: str = "") -> str:
    """What stands behind a key, or the dash of a list, without credentials."""
    if isinstance(node, YamlMap):
        return "".join(
            f"\n{indent}{_shown_config(key).strip()}:{_shown_config(value, name, indent + '  ')}"
            for name, (key, value) in node.entries.items()
        ) or " {}"  # fmt: skip
    if isinstance(node, YamlList):
        items = (_shown_config(item, "", indent + "  ").lstrip() for item in node.items)
        return "".join(f"\n{indent}- {item}" for item in items) or " []"
    if node.is_null:
        return " null"
    if field in _SECRETS:
        return f" {HIDDEN}"
    if field == "url":
        return f" {shown_url(node.text)}"
    return f" {node.text if node.plain and node.text.isprintable() else write_json(node.text)}"


def read_notify_config(text: str | bytes, name: str) -> NotifyConfig:
    """Read a configuration of Alertmanager, as YAML or JSON. Raises FaultyFile, with every fault.

    `name` is the path of the file; paths in the file are relative to its folder.

    >>> read_notify_config("route: {receiver: me}", "notify.yml")
    Traceback (most recent call last):
    metricstream.FaultyFile: notify.yml:1:19: no receiver has the name 'me'
    """
    return _ConfigReader(text, name).config()


class _ConfigReader(FieldReader):
    def __init__(self, text: str | bytes, name: str):
        super().__init__(text, name)
        self._globals: Fields = {}

    def config(self) -> NotifyConfig:
        root = self.fields(self.document.root, _THE_FILE, ("global", "route", "receivers"))
        self._globals = self.fields(root.get("global"), "global", _GLOBAL_FIELDS)
        receivers: dict[str, tuple[Webhook | Email, ...]] = {}
        for node in self.items(root, "receivers"):
            fields = self.fields(node, "a receiver", ("name", "webhook_configs", "email_configs"))
            name = self.text(fields, "name")
            if not name or name in receivers:
                reason = "another receiver has this name" if name else "a receiver needs a name"
                self.fault(fields.get("name", node), reason)
            webhooks = map(self._webhook, self.items(fields, "webhook_configs"))
            emails = map(self._email, self.items(fields, "email_configs"))
            receivers[name] = (*webhooks, *emails)
        if "route" not in root:
            self.fault(self.document.root, "no route is given")
        route = self._route(root.get("route"), None, receivers)
        resolve_timeout_s = self._seconds(self._globals, "resolve_timeout", RESOLVE_TIMEOUT_S)
        self.finish()
        shown = _shown_config(self.document.root).lstrip() + "\n"
        return NotifyConfig(route, receivers, resolve_timeout_s, shown)

    # ---- routes ----

    def _route(
        self, node: YamlNode | None, parent: Route | None, receivers: Container[str]
    ) -> Route:
        above = parent or Route("", (), 30.0, 300.0, 4 * 3600.0, (), False, "{}")
        fields = self.fields(node, "a route", _ROUTE_FIELDS)
        receiver = self.text(fields, "receiver") or above.receiver
        if node is not None and receiver not in receivers:
            reason = f"no receiver has the name {_clipped(receiver)!r}"
            reason = reason if receiver else "the root of the routes needs a receiver"
            self.fault(fields.get("receiver", node), reason)
        matchers = tuple(sorted(self._matchers(fields), key=lambda m: (m.name, m.value, m.op)))
        if parent is None and matchers and node is not None:
            self.fault(node, "the root of the routes must not have any matchers")
        route = Route(
            receiver, self._group_by(fields, above),
            self._seconds(fields, "group_wait", above.group_wait_s, 0),
            self._seconds(fields, "group_interval", above.group_interval_s),
            self._seconds(fields, "repeat_interval", above.repeat_interval_s),
            matchers, self._boolean(fields, "continue", False),
            route_key(parent.key if parent else None, matchers),
        )  # fmt: skip
        children = (self._route(child, route, receivers) for child in self.items(fields, "routes"))
        return route._replace(routes=tuple(children))

    def _group_by(self, fields: Fields, above: Route) -> tuple[str, ...] | None:
        if "group_by" not in fields:
            return above.group_by
        labels = [self.scalar(item, "group_by") or "" for item in self.items(fields, "group_by")]
        node = fields["group_by"]
        if len(set(labels)) < len(labels):
            self.fault(node, "a label stands in 'group_by' twice")
        if "..." in labels and len(labels) > 1:
            self.fault(node, "'...' in 'group_by' means all labels, and stands alone")
        for label in labels:
            if label != "..." and not _LABEL_NAME.fullmatch(label):
                self.fault(node, f"{_clipped(label)!r} is no name for a label")
        return None if labels == ["..."] else tuple(labels)

    def _matchers(self, fields: Fields) -> Iterator[Matcher]:
        for node in self.items(fields, "matchers"):
            try:
                yield from parse_matchers(self.scalar(node, "matchers") or "")
            except ValueError as error:
                self.fault(node, str(error))
        for field, op in (("match", "="), ("match_re", "=~")):
            for label, (key, value) in self.entries(fields.get(field), field).items():
                if not _LABEL_NAME.fullmatch(label):
                    self.fault(key, f"{_clipped(label)!r} is no name for a label")
                try:
                    yield checked_matcher(label, op, self.scalar(value, label) or "")
                except ValueError as error:
                    self.fault(value, str(error))

    # ---- receivers ----

    def _webhook(self, node: YamlNode) -> Webhook:
        fields = self.fields(node, "a webhook", _WEBHOOK_FIELDS)
        url, path = self.text(fields, "url"), self._path(fields, "url_file")
        if bool(url) == bool(path):
            self.fault(node, "a webhook needs 'url' or 'url_file', and not both")
        shown = shown_url(self.read(fields, "url", _checked_url, "")) if url else HIDDEN
        http_fields = fields if "http_config" in fields else self._globals
        authorization, tls = self._http_config(http_fields.get("http_config"))
        payload = fields.get("payload")
        return Webhook(
            Secret(url, path), shown, authorization, tls,
            self._boolean(fields, "send_resolved", True),
            self._seconds(fields, "timeout", WEBHOOK_TIMEOUT_S, 0) or WEBHOOK_TIMEOUT_S,
            self._whole_number(fields, "max_alerts"),
            None if payload is None else self._payload(payload),
        )  # fmt: skip

    def _payload(self, node: YamlNode) -> Any:
        if isinstance(node, YamlMap):
            return {name: self._payload_part(value) for name, (_, value) in node.entries.items()}
        if isinstance(node, YamlList):
            return [self._payload_part(item) for item in node.items]
        return self._template(node)

    def _payload_part(self, node: YamlNode) -> Any:
        """Inside of a structure what is no text stays what it is."""
        if isinstance(node, YamlScalar) and node.plain:
            if node.is_null or node.text in ("true", "false"):
                return _BOOLEANS.get(node.text)
            if GO_FLOAT.fullmatch(node.text):
                with contextlib.suppress(JSONError):
                    return parse_json(node.text)
        return self._payload(node)

    def _http_config(self, node: YamlNode | None) -> tuple[Authorization | None, TLSOptions]:
        fields = self.fields(node, "http_config", _HTTP_FIELDS)
        if self._boolean(fields, "follow_redirects", False):
            self.fault(fields["follow_redirects"], "redirects are not followed")
        if "basic_auth" in fields and "authorization" in fields:
            self.fault(fields["authorization"], "not beside 'basic_auth'")
        authorization = None
        if "basic_auth" in fields:
            basic = self.fields(fields["basic_auth"], "basic_auth", _BASIC_FIELDS)
            user, secret = self.text(basic, "username"), self._secret(basic, "password")
            authorization = Authorization("Basic", user, secret)
        elif "authorization" in fields:
            own = self.fields(fields["authorization"], "authorization", _AUTHORIZATION_FIELDS)
            scheme = self.text(own, "type") or "Bearer"
            if scheme.lower() == "basic":
                self.fault(own["type"], "for this type there is 'basic_auth'")
            authorization = Authorization(scheme, "", self._secret(own, "credentials"))
        return authorization, self._tls_config(fields.get("tls_config"))

    def _tls_config(self, node: YamlNode | None) -> TLSOptions:
        known = ("ca_file", "cert_file", "key_file", "insecure_skip_verify")
        fields = self.fields(node, "tls_config", known)
        return TLSOptions(
            self._path(fields, "ca_file"), self._path(fields, "cert_file"),
            self._path(fields, "key_file"), self._boolean(fields, "insecure_skip_verify", False),
        )  # fmt: skip

    def _email(self, node: YamlNode) -> Email:
        own = self.fields(node, "an email", _EMAIL_FIELDS)
        inherited = {name.removeprefix("smtp_"): value for name, value in self._globals.items()}
        given = {name.removesuffix("_file") for name in own}
        fields = own | {name: value for name, value in inherited.items()
                        if name.removesuffix("_file") not in given}  # fmt: skip
        for name in ("to", "from", "smarthost"):
            if not self.text(fields, name):
                self.fault(node, f"an email needs '{name}'")
        host, colon, port = self.text(fields, "smarthost").rpartition(":")
        if colon and not (host and port.isdecimal() and 0 < int(port[:6]) < 65536):
            self.fault(fields["smarthost"], "must be a host and a port, as mail.example.org:587")
        headers = {
            "Subject": parse_notification_template('{{ template "email.default.subject" . }}')
        }
        for name, (key, value) in self.entries(fields.get("headers"), "headers").items():
            headers[name.title()] = self._template(value)
            if not _HEADER_NAME.fullmatch(name):
                self.fault(key, f"{_clipped(name)!r} is no name for a header")
        html = parse_notification_template('{{ template "email.default.html" . }}')
        return Email(
            host.strip("[]"), int(port[:6]) if port.isdecimal() else 0,
            self._template(fields.get("from")), self._template(fields.get("to")), headers,
            self._text_template(fields, "text"),
            self._text_template(fields, "html") if "html" in fields else html,
            self.text(fields, "hello") or "localhost", self.text(fields, "auth_username"),
            self._secret(fields, "auth_password"), self._secret(fields, "auth_secret"),
            self.text(fields, "auth_identity"), self._boolean(fields, "require_tls", True),
            self._tls_config(fields.get("tls_config")),
            self._boolean(fields, "send_resolved", False),
        )  # fmt: skip

    def _text_template(self, fields: Fields, name: str) -> Template | None:
        return self._template(fields[name]) if self.text(fields, name) else None

    # ---- fields, each of a type ----

    def fields(self, node: YamlNode | None, what: str, known: Sequence[str]) -> Fields:
        """A field that is null is as good as not there."""
        fields = super().fields(node, what, known)
        return {name: value for name, value in fields.items() if not is_null(value)}

    def unknown(self, key: YamlScalar, value: YamlNode, what: str, known: Sequence[str]) -> None:
        """An empty list asks for nothing."""
        if not isinstance(value, YamlList) or value.items:
            where = "" if what == _THE_FILE else f" in {what}"
            reason = f"{_clipped(key.text)!r}{where} is not read here; known are {', '.join(known)}"
            self.fault(key, f"{reason}. For all else run Alertmanager (--alertmanager URL)")

    def _path(self, fields: Fields, name: str) -> str:
        path = self.text(fields, name)
        return os.path.join(os.path.dirname(self.name), path) if path else ""

    def _secret(self, fields: Fields, name: str) -> Secret:
        text, path = self.text(fields, name), self._path(fields, f"{name}_file")
        if text and path:
            self.fault(fields[name], f"'{name}' and '{name}_file' exclude each other")
        return Secret(text, path)

    def _boolean(self, fields: Fields, name: str, missing: bool) -> bool:
        text = self.text(fields, name).lower()
        if name in fields and text not in _BOOLEANS:
            self.fault(fields[name], f"{name!r} must be true or false")
        return _BOOLEANS.get(text, missing)

    def _whole_number(self, fields: Fields, name: str) -> int:
        text = self.text(fields, name)
        if not re.fullmatch(r"[0-9]{0,9}", text):
            self.fault(fields[name], f"{name!r} must be a whole number")
            return 0
        return int(text or 0)

    def _seconds(self, fields: Fields, name: str, missing_s: float, least_ms: int = 1) -> float:
        duration_ms = self.read(fields, name, _read_duration_ms, None)
        if duration_ms is None:
            return missing_s
        if duration_ms < least_ms:
            self.fault(fields[name], f"{name!r} must be more than zero")
        return duration_ms / 1000

    def _template(self, node: YamlNode | None) -> Template:
        try:
            return parse_notification_template(self.scalar(node, "a template") or "")
        except TemplateError as error:
            assert node is not None  # nothing is a template without faults
            self.fault(node, str(error))
            return parse_notification_template("")


# ==================================================================================================
# 62. Silences
# ==================================================================================================
#
# The problem: somebody mends what is wrong, and wants to hear no more of it until then; thousands
# of alerts and silences are compared with each other every second. The idea: the matchers of a
# silence never change, so an alert is compared with each silence once; and most silences name a
# label and its value, which leads from an alert to them. What it costs: a silence whose matchers
# are to change is ended, and another one begins, as in Alertmanager.

MAX_ALERTS = 100_000
MAX_SILENCES = 10_000
KEPT_S = 120 * 3600.0  # so long an ended silence is shown


class Silence(NamedTuple):
    """Alerts with such labels are not told for some time."""

    id: str
    matchers: tuple[Matcher, ...]
    starts_at: float
    ends_at: float
    updated_at: float
    created_by: str
    comment: str

    def state(self, now: float) -> str:
        """What Alertmanager calls it: pending, active or expired."""
        if now < self.starts_at:
            return "pending"
        return "active" if now < self.ends_at else "expired"


class SilenceError(ValueError):
    """A silence that is refused."""


class Silences:
    """All silences, by id."""

    def __init__(self, silences: Iterable[Silence] = ()) -> None:
        self.by_id: dict[str, Silence] = {}
        self._order: list[str] = []  # as they came
        # by a label and its value that a silence asks for; None: it asks for no value
        self._by_label: dict[tuple[str, str] | None, list[str]] = {}
        # by its labels: how many of that order an alert was compared with, and which match
        self._matching: dict[LabelSet, tuple[int, list[str]]] = {}
        for silence in silences:
            self._keep(silence)

    def _keep(self, silence: Silence) -> None:
        if silence.id not in self.by_id:
            asked = ((m.name, m.value) for m in silence.matchers if m.op == "=" and m.value)
            self._by_label.setdefault(next(asked, None), []).append(silence.id)
            self._order.append(silence.id)
        self.by_id[silence.id] = silence

    def put(self, wanted: Silence, now: float) -> Silence:
        """Add a silence, or change the one with its id. What can't be changed without rewriting
        the past ends, and another one begins. Raises SilenceError, and KeyError for an unknown id.
        """
        if not wanted.matchers:
            raise SilenceError("invalid silence: at least one matcher required")
        if all(m.op in ("=", "=~") and accepts_labels([m], {}) for m in wanted.matchers):
            fault = "at least one matcher must not match the empty string"
            raise SilenceError(f"invalid silence: {fault}")
        previous = self.by_id[wanted.id] if wanted.id else None
        silence = wanted._replace(updated_at=now)
        if previous is None or not self._can_become(previous, silence, now):
            self.forget_ended(now)
            if len(self.by_id) >= MAX_SILENCES:
                raise SilenceError(f"there are {MAX_SILENCES} silences already")
            if previous:
                self.expire(previous.id, now)
            silence = silence._replace(id=str(uuid.uuid4()), starts_at=max(now, silence.starts_at))
        self._keep(silence)
        return silence

    def _can_become(self, previous: Silence, wanted: Silence, now: float) -> bool:
        state = previous.state(now)
        if previous.matchers != wanted.matchers or state == "expired":
            return False
        if state == "active":
            return int(previous.starts_at) == int(wanted.starts_at) and wanted.ends_at >= now
        return wanted.starts_at >= now

    def expire(self, id: str, now: float) -> None:
        """End a silence. Raises KeyError."""
        silence = self.by_id[id]
        if silence.state(now) != "expired":
            starts_at = min(silence.starts_at, now)
            self.by_id[id] = silence._replace(starts_at=starts_at, ends_at=now, updated_at=now)

    def of(self, labels: LabelSet, now: float) -> list[str]:
        """The ids of those that silence an alert now."""
        if not self._order:
            return []
        seen, matching = self._matching.get(labels, (0, []))
        if seen < len(self._order):
            new = self._order[seen:] if seen else [
                id for label in (None, *labels.items()) for id in self._by_label.get(label, ())
            ]  # fmt: skip
            matching = matching + [
                id for id in new if accepts_labels(self.by_id[id].matchers, labels)
            ]
            if len(self._matching) >= MAX_ALERTS:
                self._matching.clear()
            self._matching[labels] = len(self._order), matching
        return sorted(id for id in matching if self.by_id[id].state(now) == "active")

    def forget_ended(self, now: float) -> None:
        """Forget those that ended long ago."""
        kept = [silence for silence in self.by_id.values() if silence.ends_at + KEPT_S > now]
        if len(kept) < len(self.by_id):
            self.by_id, self._order, self._by_label, self._matching = {}, [], {}, {}
            for silence in kept:
                self._keep(silence)


# ==================================================================================================
# 63. Notification
# ==================================================================================================
#
# The problem: each firing and each resolve is told once, although alerts come in again every
# minute, receivers are down, and this process may be killed at any moment. The idea is that of
# Alertmanager: alerts gather in groups; a group is flushed some time after its first alert and then
# at an interval; a log remembers for each receiver which alerts it knows as firing, and a flush
# tells only what differs. What it costs: news of a group wait for its interval.
#
# Nothing here waits or sends. `due` says what is to be sent now, `settle` is told how that ended,
# `state` is what a restart needs. A notification that arrived just before a crash, and was not
# settled, comes twice: the other choice would be that it may not come at all.
#
# Beyond Alertmanager: alerts and timers survive a restart and a suspended machine, during which
# nothing times out; an alert that ended while it was silenced is told as new when it fires again.
#
# Sources: Alertmanager's dispatch/dispatch.go, notify/notify.go, nflog, provider/mem, silence.

LONGEST_NAP_S = 15.0  # so often `due` wants to be called
LEAP_S = 60.0  # a longer pause between two calls was no time of this process
FIRST_RETRY_S, RETRY_FACTOR, LONGEST_RETRY_S = 0.5, 1.5, 60.0


class _LogEntry(NamedTuple):
    """What an integration was told last of a group: fingerprints, and when."""

    firing: frozenset[str]
    resolved: frozenset[str]
    at: float


@dataclasses.dataclass(slots=True)
class _Pending:
    """A notification that has not arrived yet."""

    delivery: Delivery
    entry: _LogEntry  # what the log says when it has arrived
    retry_at: float
    in_transit: bool = False
    error: str = ""


_Place = tuple[str, str]  # of a group: its receiver and its key
_Channel = tuple[str, int]  # of an integration: its kind, and its number in the receiver


class _AlertGroup:
    """Alerts of a route that share its group labels, and what its receiver knows of them."""

    __slots__ = (
        "route", "labels", "key", "members", "flush_at", "was_flushed", "log", "pending", "told",
        "failed",
    )  # fmt: skip

    def __init__(self, route: Route, labels: dict[str, str], key: str, flush_at: float):
        self.route, self.labels, self.key = route, labels, key
        self.members: set[LabelSet] = set()
        self.flush_at, self.was_flushed = flush_at, False
        self.log: dict[_Channel, _LogEntry] = {}
        self.pending: dict[_Channel, _Pending] = {}
        # of the last flush: resolved alerts with their times of update; whether somebody missed it
        self.told: list[tuple[LabelSet, float]] = []
        self.failed = False


class Notifications:
    """Alerts, their groups, what receivers know of them, and silences.

    Times are those of `clock`, in Unix seconds. `changed` is set when `state` should be saved; who
    has saved it clears it.
    """

    def __init__(
        self, config: NotifyConfig, external_url: str, clock: Callable[[], float] = time.time
    ):
        self.config, self.external_url = config, external_url
        self.silences = Silences()
        self.alerts: dict[LabelSet, Alert] = {}
        self.changed = False
        self.counts: Counter[tuple[str, str]] = Counter()  # by name of the statistic, and its label
        self._clock = clock
        self._seen_at = self.started_at = clock()
        self._groups: dict[_Place, _AlertGroup] = {}
        self._groups_of: dict[LabelSet, list[_AlertGroup]] = {}  # those that an alert is in
        # what receivers know of groups that another configuration may bring back
        self._former: dict[_Place, dict[_Channel, _LogEntry]] = {}
        self._forget_at = 0.0

    # ---- alerts come in ----

    def put(self, alerts: Iterable[Alert]) -> None:
        """Take alerts that are new, go on, or are resolved."""
        now = self.now()
        for alert in alerts:
            labels = alert.labels
            old = self.alerts.get(labels)
            if old is None and len(self.alerts) >= MAX_ALERTS:
                self.counts["alerts_limited", ""] += 1
                continue
            merged = old.merged(alert, now) if old else alert
            # that it goes on firing is no news: `restore` moves its end
            was = (old.starts_at, old.is_resolved(now)) if old else None
            self.changed |= was != (merged.starts_at, merged.is_resolved(now))
            self.alerts[labels] = merged
            if old is None or old.is_resolved(now):  # one that fires is in all of its groups
                for route in self.config.route.matching(labels):
                    self._join(_place_of(route, labels), route, labels, now)
            for group in self._groups_of[labels]:
                if not group.was_flushed and merged.starts_at + group.route.group_wait_s < now:
                    group.flush_at = min(group.flush_at, now)

    def _join(self, place: _Place, route: Route, labels: LabelSet, now: float) -> None:
        group = self._groups.get(place)
        if group is None:
            shared = route.group_labels(labels)
            group = _AlertGroup(route, shared, place[1], now + route.group_wait_s)
            group.log = self._former.pop(place, {})
            self._groups[place] = group
        if labels not in group.members:
            group.members.add(labels)
            self._groups_of.setdefault(labels, []).append(group)

    def now(self) -> float:
        """The time of the clock. Where it leapt since the last call, time-outs move with it."""
        now = self._clock()
        self._follow(self._seen_at, now)
        self._seen_at = now
        return now

    def _follow(self, before: float, now: float) -> None:
        leap = now - before
        if 0 <= leap <= LEAP_S:
            return
        for labels, alert in self.alerts.items():
            is_over = alert.is_resolved(before)
            ends_at = min(alert.ends_at, now) if is_over else alert.ends_at + leap
            updated_at = min(alert.updated_at, now)
            self.alerts[labels] = alert._replace(ends_at=ends_at, updated_at=updated_at)
        for group in self._groups.values() if leap < 0 else ():
            group.flush_at += leap
            for pending in group.pending.values():
                pending.retry_at += leap
            for channel, entry in group.log.items():
                group.log[channel] = entry._replace(at=min(entry.at, now))

    # ---- notifications go out ----

    def due(self) -> list[Delivery]:
        """What is to be sent now; each delivery is settled later, whatever becomes of it."""
        now, deliveries = self.now(), []
        for place, group in list(self._groups.items()):
            if group.flush_at <= now:
                self._flush(group, now)
                if not group.members and not group.pending:
                    del self._groups[place]
            for pending in group.pending.values():
                if pending.retry_at <= now and not pending.in_transit:
                    delivery, left_s = pending.delivery, max(1.0, group.flush_at - now)
                    pending.delivery = delivery._replace(
                        deadline_s=min(left_s, delivery.integration.timeout_s),
                        attempt=delivery.attempt + 1,
                    )
                    pending.in_transit = True
                    deliveries.append(pending.delivery)
        if now >= self._forget_at:
            self._forget(now)
        return deliveries

    def next_due(self) -> float | None:
        """When `due` wants to be called again; None: not before other calls."""
        times = [self._seen_at + LONGEST_NAP_S]
        for group in self._groups.values():
            times.append(group.flush_at)
            times += [each.retry_at for each in group.pending.values() if not each.in_transit]
        return min(times) if self._groups else None

    def _integrations(self, group: _AlertGroup) -> dict[_Channel, Webhook | Email]:
        found = self.config.receivers.get(group.route.receiver, ())
        return {(each.kind, number): each for number, each in enumerate(found)}

    def _flush(self, group: _AlertGroup, now: float) -> None:
        """Compare the group with what its receiver knows of it."""
        if any(pending.in_transit for pending in group.pending.values()):
            group.flush_at = now + 1.0
            return
        for channel in list(group.pending):
            self._give_up(group, channel)
        group.flush_at, group.was_flushed = now + group.route.group_interval_s, True
        group.failed = False
        members = sorted(group.members, key=_alert_order)
        group.told = [(labels, alert.updated_at) for labels in members
                      if (alert := self.alerts[labels]).is_resolved(now)]  # fmt: skip
        loud = [labels for labels in members if not self.silences.of(labels, now)]
        if loud:
            over = {labels for labels, _ in group.told}
            entry = _LogEntry(
                frozenset(labels.fingerprint for labels in loud if labels not in over),
                frozenset(labels.fingerprint for labels in loud if labels in over), now,
            )  # fmt: skip
            alerts = [self.alerts[labels] for labels in loud]
            for channel, integration in self._integrations(group).items():
                known = group.log.get(channel)
                if _is_news(known, entry, integration.send_resolved, group.route):
                    self._begin(group, channel, integration, entry, alerts)
        self._finish(group)

    def _begin(
        self, group: _AlertGroup, channel: _Channel, integration: Webhook | Email,
        entry: _LogEntry, alerts: list[Alert],
    ) -> None:  # fmt: skip
        if not integration.send_resolved:
            if not entry.firing:
                # nobody is told, but the next firing is new again
                group.log[channel], self.changed = entry, True
                return
            alerts = [alert for alert in alerts if not alert.is_resolved(entry.at)]
        delivery = Delivery(
            group.route.receiver, channel[1], integration, group.key, group.labels, tuple(alerts),
            entry.at, self.external_url, integration.timeout_s, 0,
        )  # fmt: skip
        group.pending[channel] = _Pending(delivery, entry, entry.at)
        self.counts["notifications", integration.kind] += 1

    def settle(self, delivery: Delivery, error: str) -> None:
        """Say how a delivery ended: "" if it arrived, else why not. What begins with FINAL is not
        tried again before the next flush of the group.
        """
        now, kind = self.now(), delivery.integration.kind
        group, channel = (
            self._groups.get((delivery.receiver, delivery.group_key)),
            (kind, delivery.number),
        )
        pending = group.pending.get(channel) if group else None
        if group is None or pending is None or pending.delivery is not delivery:
            return
        pending.in_transit = False
        self.counts["notification_requests", kind] += 1
        if not error:
            if pending.error:
                logger.info("notification to %s arrived after all", delivery.name)
            del group.pending[channel]
            group.log[channel], self.changed = pending.entry._replace(at=now), True
            self._finish(group)
            return
        self.counts["notification_requests_failed", kind] += 1
        if error != pending.error:
            logger.warning("notification to %s failed: %s", delivery.name, error)
        pending.error = error
        wait_s = min(FIRST_RETRY_S * RETRY_FACTOR ** min(delivery.attempt, 20), LONGEST_RETRY_S)
        pending.retry_at = now + wait_s
        is_configured = self._integrations(group).get(channel) is delivery.integration
        if error.startswith(FINAL) or not is_configured:
            self._give_up(group, channel)

    def _give_up(self, group: _AlertGroup, channel: _Channel) -> None:
        """Until the next flush, which compares anew."""
        del group.pending[channel]
        group.failed = True
        self.counts["notifications_failed", channel[0]] += 1

    def _finish(self, group: _AlertGroup) -> None:
        """Where the whole receiver knows what the group was at its flush, what was resolved leaves
        it.
        """
        if group.pending or group.failed:
            return
        gone = [
            labels
            for labels, updated_at in group.told
            if labels in group.members and self.alerts[labels].updated_at == updated_at
        ]
        for labels in gone:
            group.members.discard(labels)
            self._groups_of[labels].remove(group)
            if not self._groups_of[labels]:
                del self._groups_of[labels], self.alerts[labels]
        ids = {labels.fingerprint for labels in gone}
        for channel, entry in group.log.items():
            group.log[channel] = entry._replace(firing=entry.firing - ids)
        self.changed |= bool(gone)

    def _forget(self, now: float) -> None:
        """Once an hour: what is of no use any more."""
        self._forget_at = now + 3600.0
        self.silences.forget_ended(now)
        self._former = {place: log for place, log in self._former.items()
                        if any(entry.at + KEPT_S > now for entry in log.values())}  # fmt: skip

    # ---- across restarts ----

    def reload(self, config: NotifyConfig) -> None:
        """Go on with another configuration; what a route is known for goes on if it is the same."""
        self._regroup(config, self._saved_groups(), self.now())

    def _saved_groups(self) -> list[dict[str, Any]]:
        return [
            {
                "receiver": receiver, "key": key, "was_flushed": group.was_flushed,
                "members": sorted(labels.fingerprint for labels in group.members),
                # what has not arrived is tried again at once
                "flush_at": 0.0 if group.pending or group.failed else group.flush_at,
            }
            for (receiver, key), group in self._groups.items()
        ]  # fmt: skip

    def _regroup(self, config: NotifyConfig, saved: list[dict[str, Any]], now: float) -> None:
        """Sort all alerts into groups anew; those that were saved keep their times."""
        before = self._groups
        self._former |= {place: group.log for place, group in before.items() if group.log}
        self.config, self._groups, self._groups_of = config, {}, {}
        known = {(row["receiver"], row["key"]): row for row in saved}
        left = {place: set(row["members"]) for place, row in known.items()}
        for labels, alert in list(self.alerts.items()):
            for route in config.route.matching(labels):
                place = _place_of(route, labels)
                id = labels.fingerprint
                if not alert.is_resolved(now) or id in left.get(place, (id,)):
                    self._join(place, route, labels, now)
            if labels not in self._groups_of:
                del self.alerts[labels]
        for place, group in self._groups.items():
            if place in known:
                group.flush_at = known[place]["flush_at"]
                group.was_flushed = known[place]["was_flushed"]
            if place in before:
                pending = before[place].pending.items()
                group.pending = {channel: each for channel, each in pending if each.in_transit}
        self.changed = True

    def state(self) -> dict[str, Any]:
        """All that a restart needs, as values of JSON."""
        logs = self._former | {place: group.log for place, group in self._groups.items()}
        return {
            "saved_at": self.now(),
            "alerts": [alert._asdict() for alert in self.alerts.values()],
            "groups": self._saved_groups(),
            "log": [
                {
                    "receiver": receiver, "kind": kind, "number": number, "group_key": key,
                    "firing": sorted(entry.firing), "resolved": sorted(entry.resolved),
                    "at": entry.at,
                }
                for (receiver, key), log in logs.items() for (kind, number), entry in log.items()
            ],
            "silences": [
                {**silence._asdict(), "matchers": [list(m) for m in silence.matchers]}
                for silence in self.silences.by_id.values()
            ],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. While nobody ran, no alert timed out. Raises KeyError,
        TypeError or ValueError if the state is not as it was written.
        """
        now = self.now()
        alerts = [Alert(**alert) for alert in state["alerts"]]
        former = _read_log(state["log"])
        self.silences = Silences(
            Silence(**{**row, "matchers": tuple(checked_matcher(*m) for m in row["matchers"])})
            for row in state["silences"]
        )
        self.alerts = {(key := LabelSet(each.labels)): each._replace(labels=key) for each in alerts}
        self._former = former
        self._regroup(self.config, state["groups"], state["saved_at"])
        self._follow(state["saved_at"], now)


def _read_log(rows: list[dict[str, Any]]) -> dict[_Place, dict[_Channel, _LogEntry]]:
    logs: dict[_Place, dict[_Channel, _LogEntry]] = {}
    for row in rows:
        told = frozenset(row["firing"]), frozenset(row["resolved"])
        log = logs.setdefault((row["receiver"], row["group_key"]), {})
        log[row["kind"], row["number"]] = _LogEntry(*told, row["at"])
    return logs


def _is_news(
    known: _LogEntry | None, wanted: _LogEntry, sends_resolved: bool, route: Route
) -> bool:
    """Whether a receiver is told, by what it knows: the rule of Alertmanager's dedup stage."""
    if known is None:
        return bool(wanted.firing)
    if not wanted.firing <= known.firing:
        return True
    if not wanted.firing:
        return bool(known.firing)
    if sends_resolved and not wanted.resolved <= known.resolved:
        return True
    return known.at < wanted.at - route.repeat_interval_s


def _place_of(route: Route, labels: LabelSet) -> _Place:
    return route.receiver, f"{route.key}:{label_set_text(route.group_labels(labels))}"


def _alert_order(labels: LabelSet) -> tuple[str, str, list[tuple[str, str]]]:
    return labels.get("job", ""), labels.get("instance", ""), sorted(labels.items())


# ==================================================================================================
# 64. Receivers
# ==================================================================================================
#
# The problem: a notification has to reach a service that may be slow, gone or wrong about what it
# wants. The idea: one function, `deliver`, that blocks, runs in a process of its own and says in
# one line why it failed and whether another try could help. Templates see what Alertmanager's see.
# What it costs: a fork for each notification; there are few.
#
# Credentials are read here and nowhere else, and are cut out of whatever a receiver answers.
#
# Sources: Alertmanager's notify/webhook, notify/email and template packages; Prometheus's notifier;
# RFC 5321 (SMTP), RFC 3207 (STARTTLS), RFC 4954 (AUTH).

MAX_ANSWER_CHARACTERS = 200  # of what a receiver answered, in a message
ZERO_TIME = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC)  # what Go writes for no time


class DeliveryError(Exception):
    """A notification that did not arrive."""

    def __init__(self, reason: str, is_final: bool = False):
        super().__init__(reason)
        self.is_final = is_final  # whether another try would end in the same way


# ---- what templates see ----


class _Pairs(list[TemplateStruct]):
    type_name = "template.Pairs"
    methods: ClassVar[Mapping[str, TemplateFunction]] = {
        "Names": TemplateFunction("", lambda pairs: [pair.fields["Name"] for pair in pairs]),
        "Values": TemplateFunction("", lambda pairs: [pair.fields["Value"] for pair in pairs]),
    }


class _KV(dict[str, str]):
    """Labels or annotations."""

    type_name = "template.KV"

    def pairs(self) -> _Pairs:
        """All of them, `alertname` first."""
        names = sorted(self, key=lambda name: (name != "alertname", name))
        return _Pairs(
            TemplateStruct("template.Pair", {"Name": name, "Value": self[name]}) for name in names
        )

    def without(self, names: Container[str]) -> "_KV":
        return _KV((name, value) for name, value in self.items() if name not in names)

    methods: ClassVar[Mapping[str, TemplateFunction]] = {
        "SortedPairs": TemplateFunction("", pairs),
        "Remove": TemplateFunction("[]string", without),
        "Names": TemplateFunction("", lambda kv: [p.fields["Name"] for p in kv.pairs()]),
        "Values": TemplateFunction("", lambda kv: [p.fields["Value"] for p in kv.pairs()]),
    }


class _Alerts(list[TemplateStruct]):
    type_name = "template.Alerts"

    def that_are(self, status: str) -> "_Alerts":
        return _Alerts(alert for alert in self if alert.fields["Status"] == status)

    methods: ClassVar[Mapping[str, TemplateFunction]] = {
        "Firing": TemplateFunction("", lambda alerts: alerts.that_are("firing")),
        "Resolved": TemplateFunction("", lambda alerts: alerts.that_are("resolved")),
    }


def _shared(maps: Sequence[Mapping[str, str]]) -> _KV:
    """What all maps have in common."""
    items = set(maps[0].items()).intersection(*(each.items() for each in maps[1:]))
    return _KV(sorted(items))


def notification_data(delivery: Delivery, alerts: Sequence[Alert]) -> TemplateStruct:
    """What templates of a receiver see as their dot."""
    rows = _Alerts()
    fields: dict[str, Any]
    for alert in alerts:
        is_resolved = alert.is_resolved(delivery.now)
        fields = {
            "Status": "resolved" if is_resolved else "firing",
            "Labels": _KV(alert.labels), "Annotations": _KV(alert.annotations),
            "StartsAt": utc_time(alert.starts_at),
            "EndsAt": utc_time(alert.ends_at) if is_resolved else ZERO_TIME,
            "GeneratorURL": alert.generator_url, "Fingerprint": alert.labels.fingerprint,
        }  # fmt: skip
        rows.append(TemplateStruct("template.Alert", fields))
    fields = {
        "Receiver": delivery.receiver,
        "Status": "firing" if rows.that_are("firing") else "resolved",
        "Alerts": rows, "GroupLabels": _KV(delivery.group_labels),
        "CommonLabels": _shared([alert.labels for alert in alerts]),
        "CommonAnnotations": _shared([alert.annotations for alert in alerts]),
        "ExternalURL": delivery.external_url,
    }  # fmt: skip
    return TemplateStruct("*template.Data", fields)


def _expanded(template: Template, data: TemplateStruct, escapes_html: bool = False) -> str:
    try:
        return template.execute(data, NOTIFICATION_FUNCTIONS, escapes_html)
    except TemplateError as error:
        raise DeliveryError(str(error), is_final=True) from None


# ---- webhooks ----


def webhook_body(delivery: Delivery) -> tuple[str, str]:
    """The content type and the body of a webhook. Raises DeliveryError."""
    webhook: Webhook = delivery.integration
    if webhook.kind == "alertmanager":
        return "application/json", write_json([_alert_json(alert) for alert in delivery.alerts])
    shown = delivery.alerts[: webhook.max_alerts or None]
    data = notification_data(delivery, shown)
    if webhook.payload is None:
        body = json_value(data) | {
            "version": "4", "groupKey": delivery.group_key,
            "truncatedAlerts": len(delivery.alerts) - len(shown),
        }  # fmt: skip
        return "application/json", write_json(body)
    if not isinstance(webhook.payload, Template):
        return "application/json", write_json(_expanded_payload(webhook.payload, data))
    text = _expanded(webhook.payload, data)
    try:
        parse_json(text)
        return "application/json", text
    except JSONError:
        return "text/plain; charset=utf-8", text


def _alert_json(alert: Alert) -> dict[str, Any]:
    return {
        "labels": alert.labels, "annotations": alert.annotations,
        "startsAt": rfc3339(utc_time(alert.starts_at)), "endsAt": rfc3339(utc_time(alert.ends_at)),
        "generatorURL": alert.generator_url,
    }  # fmt: skip


def _expanded_payload(part: Any, data: TemplateStruct) -> Any:
    if isinstance(part, Template):
        return _expanded(part, data)
    if isinstance(part, dict):
        return {name: _expanded_payload(item, data) for name, item in part.items()}
    if isinstance(part, list):
        return [_expanded_payload(item, data) for item in part]
    return part


def _tls(options: TLSOptions) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.ca_file or None)
    if options.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if options.cert_file:
        context.load_cert_chain(options.cert_file, options.key_file or None)
    return context


def http_connection(url: str, tls: TLSOptions, timeout_s: float) -> http.client.HTTPConnection:
    """A connection to the host of a URL, not yet open."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    context = _tls(tls)
    return http.client.HTTPSConnection(host, parts.port, timeout=timeout_s, context=context)


def authorization_field(authorization: Authorization) -> str:
    """The value of the header field."""
    secret = authorization.secret.reveal()
    if authorization.scheme == "Basic":
        pair = f"{authorization.user}:{secret}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"
    return f"{authorization.scheme} {secret}"


def _post(
    target: Webhook, content_type: str, body: str, timeout_s: float, hidden: list[str]
) -> None:
    """POST a body; credentials that were used are added to `hidden`."""
    url = target.url.reveal()
    parts = urllib.parse.urlsplit(_checked_url(url))
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    hidden += [url, path if len(path) > 1 else ""]
    fields = {"Content-Type": content_type, "User-Agent": f"MetricStream/{__version__}"}
    if authorization := target.authorization or url_authorization(url):
        fields["Authorization"] = authorization_field(authorization)
        hidden += [fields["Authorization"].partition(" ")[2], authorization.secret.reveal()]
    with contextlib.closing(http_connection(url, target.tls, timeout_s)) as connection:
        connection.request("POST", path, body.encode(errors="replace"), fields)
        answer = connection.getresponse()
        if 200 <= answer.status < 300:
            return
        text = answer.read(MAX_ANSWER_CHARACTERS).decode(errors="replace")
    reason = "redirects are not followed" if 300 <= answer.status < 400 else " ".join(text.split())
    # what is wrong with the request is wrong with it the next time, too: RFC 9110, 15.5
    is_final = answer.status < 500 and answer.status != 429
    raise DeliveryError(f"{target.shown} answered {answer.status}: {reason}", is_final)


# ---- mail ----


def mail_of(delivery: Delivery) -> tuple[email.message.EmailMessage, str, list[str]]:
    """The message, its sender and its recipients. Raises DeliveryError."""
    config: Email = delivery.integration
    data = notification_data(delivery, delivery.alerts)
    message = email.message.EmailMessage(email.policy.SMTP)
    texts = {"From": config.sender, "To": config.to} | config.headers
    try:
        for name, template in texts.items():
            # a line break in a label must not begin another header
            message[name] = " ".join(_expanded(template, data).split())
    except (ValueError, LookupError) as error:
        raise DeliveryError(f"header {name}: {error}", is_final=True) from None
    now = datetime.datetime.fromtimestamp(delivery.now, datetime.UTC)
    message["Date"] = email.utils.format_datetime(now)
    message["Message-ID"] = email.utils.make_msgid(domain=config.hello)
    if config.text or not config.html:
        message.set_content(_expanded(config.text, data) if config.text else "")
    if config.html:
        html = _expanded(config.html, data, escapes_html=True)
        if config.text:
            message.add_alternative(html, subtype="html")
        else:
            message.set_content(html, subtype="html")
    senders = email.utils.getaddresses([_expanded(config.sender, data)])
    recipients = email.utils.getaddresses([_expanded(config.to, data)])
    addresses = [address for _, address in [*senders, *recipients]]
    if len(senders) != 1 or not all("@" in address for address in addresses):
        raise DeliveryError("'from' must be one address, 'to' one or more", is_final=True)
    return message, addresses[0], addresses[1:]


def _send_mail(delivery: Delivery, hidden: list[str]) -> None:
    config: Email = delivery.integration
    message, sender, recipients = mail_of(delivery)
    connect: Callable[..., smtplib.SMTP] = smtplib.SMTP
    is_encrypted = config.port == 465
    if is_encrypted:
        connect = partial(smtplib.SMTP_SSL, context=_tls(config.tls))
    with connect(
        config.host, config.port, local_hostname=config.hello, timeout=delivery.deadline_s
    ) as client:
        client.ehlo_or_helo_if_needed()
        if config.require_tls and not is_encrypted:
            if not client.has_extn("starttls"):
                raise DeliveryError(f"{config.shown} offers no STARTTLS, and require_tls is set")
            client.starttls(context=_tls(config.tls))
            client.ehlo()
            is_encrypted = True
        if config.user and client.has_extn("auth"):
            _log_in(client, config, is_encrypted, hidden)
        _accepted(client.mail(sender))
        for recipient in recipients:
            _accepted(client.rcpt(recipient))
        _accepted(client.data(message.as_bytes()))


def _accepted(reply: tuple[int, bytes]) -> None:
    code, text = reply
    if not 200 <= code < 300:
        excerpt = text.decode(errors="replace")[:MAX_ANSWER_CHARACTERS]
        raise DeliveryError(f"the mail server answered {code}: {' '.join(excerpt.split())}")


def _log_in(client: smtplib.SMTP, config: Email, is_encrypted: bool, hidden: list[str]) -> None:
    """By the first mechanism of the server for which there is a credential."""
    password, secret = config.password.reveal(), config.secret.reveal()
    plain = f"{config.identity}\0{config.user}\0{password}"
    hidden += [password, secret, base64.b64encode(plain.encode()).decode()]
    for mechanism in client.esmtp_features["auth"].upper().split():
        if mechanism == "CRAM-MD5" and secret:
            client.user, client.password = config.user, secret
            client.auth(mechanism, client.auth_cram_md5)
            return
        if mechanism in ("PLAIN", "LOGIN") and password:
            if not is_encrypted and config.host not in ("localhost", "127.0.0.1", "::1"):
                raise DeliveryError("no password is sent over a connection without encryption")
            client.user, client.password = config.user, password
            if mechanism == "PLAIN":
                client.auth(mechanism, lambda challenge=None: plain)
            else:
                client.auth(mechanism, client.auth_login)
            return
    raise DeliveryError(f"{config.shown} offers no way to log in that fits the credentials")


# ---- one way in ----


def deliver(delivery: Delivery) -> str:
    """Send a notification, and wait until it has arrived. Returns "" or why it failed; the reason
    begins with FINAL if another try would fail, too. No credential is in it.
    """
    hidden: list[str] = []
    target = delivery.integration
    is_final = False
    try:
        if isinstance(target, Email):
            _send_mail(delivery, hidden)
        else:
            _post(target, *webhook_body(delivery), delivery.deadline_s, hidden)
        return ""
    except DeliveryError as error:
        reason, is_final = str(error), error.is_final
    except (OSError, ValueError, http.client.HTTPException, smtplib.SMTPException) as error:
        reason = f"{target.shown}: {error or type(error).__name__}"
    for secret in sorted(filter(None, hidden), key=len, reverse=True):
        reason = reason.replace(secret, HIDDEN)
    # what a stranger answered goes to a log and to a terminal
    reason = "".join(letter if letter.isprintable() else " " for letter in reason)
    return (FINAL if is_final else "") + reason


def test_deliveries(config: NotifyConfig, external_url: str, now: float) -> list[Delivery]:
    """A notification for each integration of each receiver that says that it is a test."""
    labels = LabelSet(alertname="MetricStreamTest", severity="none")
    text = "This is a test of the notifications of MetricStream. Nothing is wrong."
    alert = Alert(labels, {"summary": text}, now, now + 300, now, external_url)
    group = {"alertname": labels["alertname"]}
    return [
        Delivery(
            receiver, number, integration, f"{{}}:{label_set_text(group)}", group, (alert,), now,
            external_url, integration.timeout_s, 1,
        )
        for receiver, integrations in config.receivers.items()
        for number, integration in enumerate(integrations)
    ]  # fmt: skip


# ==================================================================================================
# 65. Alertmanager client
# ==================================================================================================
#
# The problem: alerts are to go to a real Alertmanager, which may be away for a while. The idea is
# Prometheus's: a queue for each, from which the oldest are dropped where there is no room. What it
# costs: little, as whoever puts alerts in puts those that fire again every minute.
#
# Source: Prometheus's notifier.

QUEUE_CAPACITY = 10_000  # alerts that wait
MAX_ALERTS_A_REQUEST = 256


def _is_old_alphabet(alert: Alert) -> bool:
    return all(map(_LABEL_NAME.fullmatch, [*alert.labels, *alert.annotations]))


class AlertmanagerClient:
    """Sends all alerts to an Alertmanager. Raises ValueError for a URL that is none."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time):
        parts = urllib.parse.urlsplit(_checked_url(url))
        host, path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        api = f"{parts.scheme}://{host}{path}/api/v2/alerts"
        self.target = Webhook(Secret(api), api, url_authorization(url), kind="alertmanager")
        self._clock = clock
        self.alerts: deque[Alert] = deque()  # that wait
        self.in_transit: Delivery | None = None
        self._retry_at, self._failures = -math.inf, 0
        self.sent = self.errors = self.dropped = 0

    def put(self, alerts: Sequence[Alert]) -> None:
        """Queue alerts."""
        self.alerts.extend(alerts)
        while len(self.alerts) > QUEUE_CAPACITY:
            self.alerts.popleft()
            self.dropped += 1

    def due(self) -> list[Delivery]:
        """What is to be sent now: at most one request."""
        now = self._clock()
        self._retry_at = min(self._retry_at, now + LONGEST_RETRY_S)  # it may have been set back
        if not self.alerts or self.in_transit or self._retry_at > now:
            return []
        self.in_transit = Delivery(
            "alertmanager", 0, self.target, "", {}, self._batch(), now, "",
            self.target.timeout_s, self._failures + 1,
        )  # fmt: skip
        return [self.in_transit]

    def _batch(self) -> tuple[Alert, ...]:
        """The next batch. Labels that an older Alertmanager refuses are in a batch of their own, so
        that a refusal takes no other alert along.
        """
        first = [self.alerts.popleft() for _ in range(min(len(self.alerts), MAX_ALERTS_A_REQUEST))]
        batches: dict[bool, list[Alert]] = {True: [], False: []}
        for alert in first:
            batches[_is_old_alphabet(alert)].append(alert)
        kind = _is_old_alphabet(first[0])
        self.alerts.extendleft(reversed(batches[not kind]))
        return tuple(batches[kind])

    def next_due(self) -> float | None:
        """When `due` wants to be called again; None: not before `put` or `settle`."""
        waits = self.alerts and not self.in_transit
        return max(self._retry_at, self._clock()) if waits else None

    def settle(self, delivery: Delivery, error: str) -> None:
        """Say how a delivery ended: "" if it arrived, else why not."""
        self.in_transit = None
        if not error:
            self._failures = 0
            self.sent += len(delivery.alerts)
            return
        self.errors += len(delivery.alerts)
        if not self._failures or error.startswith(FINAL):
            logger.warning("%d alerts did not reach %s", len(delivery.alerts), error)
        if error.startswith(FINAL):
            self.dropped += len(delivery.alerts)
            return
        wait_s = FIRST_RETRY_S * RETRY_FACTOR ** min(self._failures, 20)
        self._retry_at = self._clock() + min(wait_s, LONGEST_RETRY_S)
        self._failures += 1
        self.alerts.extendleft(reversed(delivery.alerts))
        self.put(())

    def statistics(self) -> Iterator[StatisticRow]:
        """Rows of name, type, help, labels and value, as Prometheus names them."""
        labels = {"alertmanager": self.target.shown}
        for name, type, help, value in _CLIENT_STATISTICS:
            yield f"prometheus_notifications_{name}", type, help, labels, value(self)


_CLIENT_STATISTICS: tuple[tuple[str, str, str, Callable[[AlertmanagerClient], float]], ...] = (
    ("sent_total", "counter", "Alerts that reached an Alertmanager.", lambda c: c.sent),
    ("errors_total", "counter", "Alerts in requests that failed.", lambda c: c.errors),
    ("dropped_total", "counter", "Alerts that were never sent.", lambda c: c.dropped),
    ("queue_length", "gauge", "Alerts that wait.", lambda c: len(c.alerts)),
    ("queue_capacity", "gauge", "Alerts that may wait.", lambda c: QUEUE_CAPACITY),
)


# ==================================================================================================
# 66. Alertmanager API
# ==================================================================================================
#
# The problem: people silence alerts with amtool, look at them in Grafana, and another Prometheus
# may send its alerts here. The idea: Alertmanager's own API over the notifications above, with the
# shapes that its OpenAPI document names. What it costs: there is one of a kind, so the cluster is
# always said to be disabled; nothing inhibits anything.
#
# Source: Alertmanager's api/v2/openapi.yaml and api/v2/api.go, version 0.25.

_YES = frozenset({"true", "1", "yes", "ok", "y", "on", "selected", "checked", "t", "enabled"})
_MATCHER_OPS = {(True, False): "=", (False, False): "!=", (True, True): "=~", (False, True): "!~"}
_SILENCE_ORDER = {"active": 1, "pending": 2, "expired": 3}


_Form = dict[str, list[str]]


class _Filter(NamedTuple):
    """Which alerts are asked for."""

    matchers: tuple[Matcher, ...]
    receiver: Regex | None
    active: bool
    silenced: bool

    def wants(self, labels: Mapping[str, str], silenced_by: list[str]) -> bool:
        """Whether an alert is among them, but for its receiver."""
        is_wanted = self.silenced if silenced_by else self.active
        return is_wanted and accepts_labels(self.matchers, labels)

    def wants_any(self, receivers: Iterable[str]) -> bool:
        """Whether alerts of one of these receivers are among them."""
        return self.receiver is None or any(map(self.receiver.matches, receivers))


class Dispatcher(Notifications):
    """Notifications that answer the API of Alertmanager."""

    def answer(self, method: str, path: str, query: str, body: bytes) -> tuple[int, bytes]:
        """The status and the JSON body for a request below /api/v2/; the query is not decoded.

        A handler raises ValueError for a mistake in the request, KeyError for an unknown silence.
        """
        folder, _, id = path.rpartition("/")
        ids: tuple[str, ...] = ()
        handlers = self.ROUTES.get(path)
        if handlers is None:
            handlers, ids = self.ROUTES.get(f"{folder}/{{id}}"), (id,)
        if handlers is None:
            return 404, write_json(f"path {_clipped(path)} was not found").encode()
        if method not in handlers:
            return 405, write_json(f"method {_clipped(method)} is not allowed").encode()
        try:
            form = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=1000)
            value = handlers[method](self, form, body, *ids)
            return 200, b"" if value is None else write_json(value).encode(errors="replace")
        except KeyError:
            return 404, write_json("silence not found").encode()
        except ValueError as error:
            return 400, write_json(str(error)).encode(errors="replace")

    def _get_status(self, form: _Form, body: bytes) -> Any:
        python = f"Python {sys.version.split()[0]}"
        version = dict.fromkeys(("revision", "branch", "buildUser", "buildDate"), "")
        return {
            "cluster": {"name": "", "peers": [], "status": "disabled"},
            "config": {"original": self.config.shown},
            "uptime": api_time(self.started_at),
            "versionInfo": version | {"version": __version__, "goVersion": python},
        }

    def _get_receivers(self, form: _Form, body: bytes) -> Any:
        return [{"name": name} for name in self.config.receivers]

    # ---- alerts ----

    def _alert(self, labels: LabelSet, receivers: Iterable[str], silenced_by: list[str]) -> Any:
        alert = self.alerts[labels]
        return {
            "annotations": alert.annotations, "endsAt": api_time(alert.ends_at),
            "fingerprint": labels.fingerprint,
            "receivers": [{"name": name} for name in receivers],
            "startsAt": api_time(alert.starts_at),
            "status": {
                "inhibitedBy": [], "silencedBy": silenced_by,
                "state": "suppressed" if silenced_by else "active",
            },
            "updatedAt": api_time(alert.updated_at), "labels": labels,
            **({"generatorURL": alert.generator_url} if alert.generator_url else {}),
        }  # fmt: skip

    def _firing(self, wanted: _Filter) -> dict[LabelSet, list[str]]:
        """The alerts that are asked for, but for their receivers, and what silences each."""
        now, found = self.now(), {}
        for labels, alert in self.alerts.items():
            silenced_by = self.silences.of(labels, now)
            if not alert.is_resolved(now) and wanted.wants(labels, silenced_by):
                found[labels] = silenced_by
        return found

    def _get_alerts(self, form: _Form, body: bytes) -> Any:
        wanted, found = _filter_of(form), []
        for labels, silenced_by in self._firing(wanted).items():
            receivers = [route.receiver for route in self.config.route.matching(labels)]
            if wanted.wants_any(receivers):
                found.append(self._alert(labels, receivers, silenced_by))
        return sorted(found, key=lambda each: each["fingerprint"])

    def _get_groups(self, form: _Form, body: bytes) -> Any:
        wanted = _filter_of(form)
        firing = self._firing(wanted)
        rows = []
        receivers: dict[LabelSet, list[str]] = {}  # of the groups that are shown
        for (receiver, _), group in sorted(self._groups.items()):
            members = sorted(group.members & firing.keys(), key=_alert_order)
            if members and wanted.wants_any([receiver]):
                rows.append((group.labels, receiver, members))
                for labels in members:
                    receivers.setdefault(labels, []).append(receiver)
        rows.sort(key=lambda row: (sorted(row[0].items()), row[1]))
        return [
            {
                "alerts": [self._alert(each, receivers[each], firing[each]) for each in members],
                "labels": shared, "receiver": {"name": receiver},
            }
            for shared, receiver, members in rows
        ]  # fmt: skip

    def _post_alerts(self, form: _Form, body: bytes) -> Any:
        posted, now = parse_json(body), self.now()
        if not isinstance(posted, list):
            raise ValueError(f"expected a list of alerts, not {_kind(posted)}")
        alerts, faults = [], []
        for row in posted:
            try:
                alert = _posted_alert(row, now, self.config.resolve_timeout_s)
                alerts.append(alert)
                self.counts[
                    "alerts_received", "resolved" if alert.is_resolved(now) else "firing"
                ] += 1
            except ValueError as error:
                self.counts["alerts_invalid", ""] += 1
                faults.append(str(error))
        self.put(alerts)
        if faults:
            # those that are valid were taken all the same
            raise ValueError("; ".join(faults[:MAX_REASONS]))
        return None

    # ---- silences ----

    def _get_silences(self, form: _Form, body: bytes) -> Any:
        wanted, now = list(map(parse_matcher, form.get("filter", ()))), self.now()
        found = [
            silence for silence in self.silences.by_id.values()
            if all(matcher in silence.matchers for matcher in wanted)
        ]  # fmt: skip

        def order(silence: Silence) -> tuple[int, float]:
            state = silence.state(now)
            times = {"active": silence.ends_at, "pending": silence.starts_at}
            return _SILENCE_ORDER[state], times.get(state, -silence.ends_at)

        return [_silence_json(silence, now) for silence in sorted(found, key=order)]

    def _post_silences(self, form: _Form, body: bytes) -> Any:
        now = self.now()
        silence = _posted_silence(parse_json(body), now)
        if silence.starts_at >= silence.ends_at:
            raise ValueError("failed to create silence: start time must be before end time")
        if silence.ends_at < now:
            raise ValueError("failed to create silence: end time can't be in the past")
        kept = self.silences.put(silence, now)
        self.changed = True
        return {"silenceID": kept.id}

    def _get_silence(self, form: _Form, body: bytes, id: str) -> Any:
        return _silence_json(self.silences.by_id[id], self.now())

    def _delete_silence(self, form: _Form, body: bytes, id: str) -> Any:
        self.silences.expire(id, self.now())
        self.changed = True
        return None

    def statistics(self) -> list[StatisticRow]:
        """Rows of name, type, help, labels and value, as Alertmanager names them."""
        rows: list[StatisticRow] = []
        kinds = sorted({each.kind for row in self.config.receivers.values() for each in row})
        for name, help, label, values in _API_STATISTICS:
            for value in values or kinds:
                labels = {label: value} if label else {}
                total = float(self.counts[name, value])
                rows.append((f"alertmanager_{name}_total", "counter", help, labels, total))
        now = self.now()
        states = Counter(
            "suppressed" if self.silences.of(labels, now) else "active"
            for labels, alert in self.alerts.items() if not alert.is_resolved(now)
        )  # fmt: skip
        rows += [
            ("alertmanager_alerts", "gauge", "Alerts by state.", {"state": state}, states[state])
            for state in ("active", "suppressed")
        ]
        ages = Counter(silence.state(now) for silence in self.silences.by_id.values())
        rows += [
            ("alertmanager_silences", "gauge", "Silences by state.", {"state": state}, ages[state])
            for state in _SILENCE_ORDER
        ]
        return rows

    ROUTES: ClassVar[dict[str, dict[str, Callable[..., Any]]]] = {
        "/api/v2/status": {"GET": _get_status},
        "/api/v2/receivers": {"GET": _get_receivers},
        "/api/v2/alerts": {"GET": _get_alerts, "POST": _post_alerts},
        "/api/v2/alerts/groups": {"GET": _get_groups},
        "/api/v2/silences": {"GET": _get_silences, "POST": _post_silences},
        "/api/v2/silence/{id}": {"GET": _get_silence, "DELETE": _delete_silence},
    }


# the name, its help, its label, and the values of the label; none: the kinds of integrations
_API_STATISTICS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("notifications", "Notifications that were begun.", "integration", ()),
    ("notifications_failed", "Notifications that were given up.", "integration", ()),
    ("notification_requests", "Attempts to send.", "integration", ()),
    ("notification_requests_failed", "Attempts that failed.", "integration", ()),
    ("alerts_received", "Alerts that came by the API.", "status", ("firing", "resolved")),
    ("alerts_invalid", "Alerts that came by the API and were refused.", "", ("",)),
    ("alerts_limited", "Alerts for which there was no room.", "", ("",)),
)


def _filter_of(form: _Form) -> _Filter:
    def is_wanted(name: str) -> bool:
        return (form.get(name) or ["true"])[-1].lower() in _YES

    matchers = tuple(map(parse_matcher, form.get("filter", ())))
    receiver = form.get("receiver")
    return _Filter(
        matchers, compile_regex(receiver[-1]) if receiver else None,
        is_wanted("active"), is_wanted("silenced"),
    )  # fmt: skip


def _posted_time(row: dict[str, Any], name: str) -> float:
    """Unix seconds; 0.0: no time is given, which Go writes as the year 1."""
    text = row.get(name, "")
    if text is None or text == "" or (isinstance(text, str) and text.startswith("0001-01-01T")):
        return 0.0
    try:
        moment = read_iso_8601(text) if isinstance(text, str) else None
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if moment is None:
        raise ValueError(f"{name} must be a time as 2025-09-17T13:45:23.123Z")
    return moment[0] + moment[1] / 1e9


def _text_of(row: dict[str, Any], name: str) -> str:
    text = row.get(name, "")
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string")
    return text


def _posted_labels(row: dict[str, Any], name: str) -> dict[str, str]:
    labels = row.get(name) or {}
    if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
        raise ValueError(f"{name} must be an object of strings")
    if "" in labels:
        raise ValueError(f"invalid {name[:-1]} set: an empty name")
    return labels


def _posted_alert(row: Any, now: float, resolve_timeout_s: float) -> Alert:
    if not isinstance(row, dict):
        raise ValueError(f"an alert must be an object, not {_kind(row)}")
    starts_at, ends_at = _posted_time(row, "startsAt"), _posted_time(row, "endsAt")
    posted = _posted_labels(row, "labels")
    labels = LabelSet((label, value) for label, value in posted.items() if value)
    if not labels:
        raise ValueError("at least one label pair required")
    alert = Alert(
        labels, _posted_labels(row, "annotations"), starts_at or ends_at or now,
        ends_at or now + resolve_timeout_s, now, _text_of(row, "generatorURL"), not ends_at,
    )  # fmt: skip
    if alert.ends_at < alert.starts_at:
        raise ValueError("start time must be before end time")
    return alert


def _posted_silence(row: Any, now: float) -> Silence:
    if not isinstance(row, dict) or not isinstance(row.get("matchers"), list):
        raise ValueError("a silence must be an object with the list 'matchers'")
    matchers = []
    for each in row["matchers"]:
        if not isinstance(each, dict):
            raise ValueError(f"a matcher must be an object, not {_kind(each)}")
        name, is_equal = _text_of(each, "name"), each.get("isEqual", True)
        if not name or not isinstance(is_equal, bool) or not isinstance(each.get("isRegex"), bool):
            raise ValueError("a matcher needs 'name', 'value' and 'isRegex'")
        op = _MATCHER_OPS[is_equal, each["isRegex"]]
        matchers.append(checked_matcher(name, op, _text_of(each, "value")))
    return Silence(
        _text_of(row, "id"), tuple(matchers), _posted_time(row, "startsAt") or now,
        _posted_time(row, "endsAt"), now, _text_of(row, "createdBy"), _text_of(row, "comment"),
    )  # fmt: skip


def _silence_json(silence: Silence, now: float) -> dict[str, Any]:
    return {
        "id": silence.id, "status": {"state": silence.state(now)},
        "updatedAt": api_time(silence.updated_at), "comment": silence.comment,
        "createdBy": silence.created_by, "endsAt": api_time(silence.ends_at),
        "matchers": [
            {
                "isEqual": op in ("=", "=~"), "isRegex": op in ("=~", "!~"), "name": name,
                "value": value,
            }
            for name, op, value in silence.matchers
        ],
        "startsAt": api_time(silence.starts_at),
    }  # fmt: skip


# ==================================================================================================
# 67. Own client
# ==================================================================================================
#
# The problem: rules ask and record what other clients do, but thousands of series at once, again
# and again. The idea: a client like any other, over connections of this very server, which never
# parses or writes the same labels twice. What it costs: the texts of all series that rules meet.

OWN_CONNECTIONS = 8  # so many queries at once
RULE_QUERY_TIMEOUT_S = 120.0
RULE_GRACE_S = 10.0  # so much later than the answer should have come it is not waited for
RECORDED_A_BATCH = 200
ROWS_A_SLICE = 500  # so many of an answer are read before others get their turn
KEPT_TEXTS = 100_000  # of labels

# An answer as this server writes it. In a string these quotes would have backslashes before them.
_VECTOR_HEAD = '{"status":"success","data":{"resultType":"vector","result":[{"metric":'
_NEXT_ROW, _ROW_VALUE = '},{"metric":', ',"value":['


class OwnClient:
    """A client of this server, on connections that the front gives to this process. One whose
    answer was not read to its end is closed, and the front gives another.
    """

    def __init__(self) -> None:
        self.open = 0  # connections
        self._idle: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        self._idle = asyncio.Queue()
        self._labels: dict[str, LabelSet] = {}  # by their text in answers
        self._series: dict[LabelSet, str] = {}  # the text of what is recorded, up to its type

    async def add(self, sock: socket.socket) -> None:
        """Use one more connection."""
        sock.setblocking(False)
        self.open += 1
        self._idle.put_nowait(await asyncio.open_connection(sock=sock))

    async def request(
        self, method: str, path: str, content_type: str = "", body: bytes = b""
    ) -> tuple[int, bytes]:
        """(status, body) of an answer. Raises RuleError where there is none."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        if content_type:
            head += f"Content-Type: {content_type}\r\n"
        try:
            async with asyncio.timeout(RULE_QUERY_TIMEOUT_S + RULE_GRACE_S), self._lent() as lent:
                reader, writer = lent
                writer.write(head.encode() + b"\r\n" + body)
                await writer.drain()
                fields = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: *([0-9]+)", fields, re.IGNORECASE)
                answer = await reader.readexactly(int(length[1]) if length else 0)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            raise RuleError(
                f"this server does not answer: {error or type(error).__name__}"
            ) from None
        return int(fields[9:12]), answer

    @contextlib.asynccontextmanager
    async def _lent(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await self._idle.get()
        try:
            yield reader, writer
        except BaseException:  # also where the evaluation is cancelled
            self.open -= 1
            writer.close()
            raise
        self._idle.put_nowait((reader, writer))

    async def query(self, expression: str, time_ms: int) -> Vector:
        """What an expression gives at a time. Raises RuleError."""
        form = urllib.parse.urlencode({
            "query": expression, "time": f"{time_ms / 1000:.3f}", "timeout": RULE_QUERY_TIMEOUT_S,
        })  # fmt: skip
        status, body = await self.request("POST", f"{API_PREFIX}query", FORM_TYPE, form.encode())
        text = body.decode(errors="replace")
        if text.startswith(_VECTOR_HEAD):
            return await self.read_vector(text)
        try:
            answer = parse_json(text)
        except JSONError:
            raise RuleError(f"the answer to a query has status {status}") from None
        if status != 200:
            raise RuleError(str(answer.get("error", f"status {status}")))
        data = answer["data"]
        if data["resultType"] == "scalar":
            return [({}, read_float(data["result"][1]))]
        if data["resultType"] == "vector":
            return []
        raise RuleError(f"rule result is not a vector or scalar, but a {data['resultType']}")

    async def read_vector(self, text: str) -> Vector:
        """The samples of an answer with any: 2 µs for each instead of 20."""
        found = []
        rows = text[len(_VECTOR_HEAD) :].split(_NEXT_ROW)
        for number, row in enumerate(rows):
            if number % ROWS_A_SLICE == ROWS_A_SLICE - 1:
                await asyncio.sleep(0)
            labels_text, _, value = row.rpartition(_ROW_VALUE)
            labels = self._labels.get(labels_text)
            if labels is None:
                if len(self._labels) >= KEPT_TEXTS:
                    self._labels.clear()
                labels = self._labels[labels_text] = LabelSet(parse_json(labels_text))
            found.append((labels, read_float(value.split('"', 2)[1])))
        return found

    async def record(self, samples: list[Recorded]) -> None:
        """Store samples. JSON has no number that is not finite: such a sample is left out. Raises
        RuleError.
        """
        for body in self.bodies(samples):
            status, answer = await self.request("POST", "/metrics", "application/json", body)
            if status != 200:
                reason = answer.decode(errors="replace")[:200]
                raise RuleError(f"what it gives can't be stored: {status} {reason}")

    def bodies(self, samples: Iterable[Recorded]) -> Iterator[bytes]:
        """Bodies of POSTs with these samples, none larger than the server takes."""
        batch: list[bytes] = []
        left_bytes = 0
        for labels, value, time_ms in samples:
            if value is not None and not math.isfinite(value):
                continue
            text = f'{self._series_text(labels)},"value":{write_json(value)}'
            metric = f'{text},"timestamp":{time_ms / 1000!r}}}'.encode()
            if batch and (len(metric) >= left_bytes or len(batch) == RECORDED_A_BATCH):
                yield b'{"metrics":[%s]}' % b",".join(batch)
                batch = []
            if not batch:
                left_bytes = MAX_BODY_BYTES - 100
            batch.append(metric)
            left_bytes -= len(metric) + 1
        if batch:
            yield b'{"metrics":[%s]}' % b",".join(batch)

    def _series_text(self, labels: LabelSet) -> str:
        """A metric of these labels as JSON, but for what differs from time to time."""
        text = self._series.get(labels)
        if text is None:
            if len(self._series) >= KEPT_TEXTS:
                self._series.clear()
            tags = {name: value for name, value in labels.items() if name != NAME}
            metric = {"name": labels[NAME], "type": "gauge", "tags": tags}
            text = self._series[labels] = write_json(metric)[:-1]
        return text

    async def has_series(self, selector: str) -> bool:
        """Whether a selector matches any series at all. Raises RuleError."""
        form = urllib.parse.urlencode({"match[]": selector, "limit": "1"})
        status, body = await self.request("POST", f"{API_PREFIX}series", FORM_TYPE, form.encode())
        return status != 200 or bool(parse_json(body)["data"])


# ==================================================================================================
# 68. Outbox
# ==================================================================================================
#
# The problem: who waits for everything at once must not block, and sending over the network, making
# a file or writing out thousands of alerts does. The idea: such work is done in a fork, a snapshot
# of all that is known, made in milliseconds, which is killed when it is late. What it costs: a fork
# for each notification; there are few.

MAX_SENDING = 16  # forks at once
SENDING_GRACE_S = 2.0
DUE_LOOK_S = 15.0  # what is to be sent is looked for at least so often


async def in_fork(work: Callable[[], str], limit_s: float, keeps: Sequence[int] = ()) -> str:
    """What `work` returns where it runs in a fork, which is killed when it takes longer; `keeps`:
    descriptors that it needs. Raises OSError where no process can be made.
    """
    heard, said = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(heard)
        os.close(said)
        raise
    if pid == 0:
        _work_in_child(work, said, limit_s, keeps)
    os.close(said)
    outcome = b""
    has_ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(heard, has_ended.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await has_ended.wait()
            outcome = os.read(heard, 65_536)
    finally:
        asyncio.get_running_loop().remove_reader(heard)
        os.close(heard)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    text = outcome.decode(errors="replace")
    return text.removeprefix("ended: ") if text.startswith("ended: ") else "it took too long"


def _work_in_child(
    work: Callable[[], str], said: int, limit_s: float, keeps: Sequence[int]
) -> NoReturn:
    """In the fork: work, and say how it went. Nothing of the parent goes on in it."""
    try:
        # The lock, the socket to the front and stderr must not outlive the parent in it.
        os.dup2(1, 2)
        last = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        for low, high in itertools.pairwise(sorted([2, said, *keeps, last])):
            os.closerange(low + 1, high)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(limit_s) + 1)  # should the parent die
        logger.filters.clear()
        outcome = work()
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    try:
        os.write(said, f"ended: {outcome}".encode(errors="backslashreplace")[:4096])
    finally:
        os._exit(0)


class Outbox:
    """Sends what its sources have to send, each delivery in a fork.

    A source has `put`, `due`, `next_due`, `settle` and `statistics`. `start` begins a task,
    `settled` is called after each delivery.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        settled: Callable[[], None],
    ):
        self.sources, self._start_task, self._settled = sources, start, settled
        self.is_due = asyncio.Event()  # something may have to be sent
        self._may_fork = asyncio.Semaphore(MAX_SENDING)
        self._sending: set[asyncio.Task[None]] = set()

    def put(self, alerts: list[Alert]) -> None:
        """Take alerts that are to be told of."""
        for source in self.sources if alerts else ():
            source.put(alerts)
            self.is_due.set()

    async def keep_sending(self) -> None:
        """Send what is due, for ever."""
        while True:
            self._start()
            due = [source.next_due() for source in self.sources]
            wait_s = min((at - time.time() for at in due if at is not None), default=DUE_LOOK_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(DUE_LOOK_S, max(0.01, wait_s))):
                    await self.is_due.wait()
            self.is_due.clear()

    async def send_rest(self, limit_s: float) -> None:
        """Send what is due now, as far as that takes no longer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        while (self._start() or self._sending) and loop.time() < deadline:
            left_s = deadline - loop.time()
            await asyncio.wait(self._sending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)

    def _start(self) -> bool:
        """Begin what is due; whether any was."""
        due = [(source, delivery) for source in self.sources for delivery in source.due()]
        for source, delivery in due:
            task = self._start_task(self._send(source, delivery))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return bool(due)

    async def _send(self, source: Any, delivery: Delivery) -> None:
        async with self._may_fork:
            try:
                limit_s = delivery.deadline_s + SENDING_GRACE_S
                outcome = await in_fork(partial(deliver, delivery), limit_s)
            except OSError as error:
                outcome = f"no process: {error.strerror}"
        source.settle(delivery, outcome)
        self.is_due.set()
        self._settled()


# ==================================================================================================
# 69. Watched files
# ==================================================================================================
#
# What the watcher reads: its options, files of rules, the file that says whom to tell; and its own,
# in which its state outlives it: a small one, replaced as a whole when something has changed.

STATE_NAME = "alerts.json"
SAVE_PAUSES = 5.0  # a large state is written for a sixth of the time at most
RETRY_SAVE_S = 1.0
MAX_SAVE_S = 3600.0  # a disk may hang


class WatchOptions(NamedTuple):
    """What the watcher is told at its start."""

    folder: str
    rules: Sequence[str] = ()  # paths; may hold * and ?
    notify: str = ""  # a configuration file
    webhooks: Sequence[str] = ()
    alertmanagers: Sequence[str] = ()
    external_url: str = ""
    external_labels: Mapping[str, str] = {}
    evaluation_interval_s: float = 60.0
    version: str = ""


class WatchError(ValueError):
    """A file for the watcher that can't be used; the message has a line for each fault."""


def load_rules(path: str) -> RuleFile:
    """A rule file. Raises OSError, and FaultyFile with every fault."""
    with open(path, "rb") as file:
        return read_rules(file.read(), path, RuleTemplate)


def load_groups(options: WatchOptions) -> list[GroupState]:
    """The groups of all rule files. Raises WatchError."""
    context = RuleContext(dict(options.external_labels), options.external_url.rstrip("/"))
    groups, faults = [], []
    for pattern in options.rules:
        paths = sorted(glob.glob(pattern)) if re.search(r"[*?\[]", pattern) else [pattern]
        for path in paths:
            try:
                found = load_rules(path)
            except OSError as error:
                faults.append(f"can't read {path}: {error.strerror}")
            except FaultyFile as error:
                faults.append(str(error))
            else:
                for group in found.groups:
                    groups.append(GroupState(group, path, context, options.evaluation_interval_s))
    if faults:
        raise WatchError("\n".join(faults))
    return groups


def load_notify(options: WatchOptions) -> NotifyConfig | None:
    """Whom to tell: the configuration file, or the webhooks. Raises WatchError."""
    try:
        for url in options.alertmanagers:
            AlertmanagerClient(url)
        if not options.notify:
            return webhook_config(options.webhooks) if options.webhooks else None
    except ValueError as error:  # its text may hold a password
        raise WatchError(f"an address of --webhook or --alertmanager {error}") from None
    try:
        with open(options.notify, "rb") as file:
            return read_notify_config(file.read(), options.notify)
    except OSError as error:
        raise WatchError(f"can't read {options.notify}: {error.strerror}") from None
    except ValueError as error:
        raise WatchError(str(error)) from None


class StateFile:
    """The file with all that a restart must know, as JSON."""

    def __init__(self, path: str):
        self._path = path
        self.lock = asyncio.Lock()  # whoever writes holds it
        self.pause_s = 0.0  # before it is to be written again
        self._error = ""

    def read(self) -> dict[str, Any] | None:
        """What was written last; None where nothing was. Raises OSError and JSONError."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            state: dict[str, Any] = parse_json(file.read())
            return state
        return None

    def set_aside(self, error: Exception) -> None:
        """Keep a file that can't be used out of the way."""
        logger.error("%s can't be read, all alerts begin anew: %s", self._path, error)
        with contextlib.suppress(OSError):  # where the disk takes it
            os.replace(self._path, f"{self._path}.damaged")

    async def write(self, state: Callable[[], dict[str, Any]]) -> str:
        """Replace the file, in a fork; why that failed, if it did."""
        began = time.monotonic()
        try:
            reason = await in_fork(partial(self._write, state), MAX_SAVE_S)
        except OSError as error:
            reason = f"no process: {error.strerror}"
        self.pause_s = RETRY_SAVE_S if reason else SAVE_PAUSES * (time.monotonic() - began)
        reason = reason and f"{self._path} can't be written: {reason}"
        if reason and reason != self._error:
            logger.error("%s", reason)
        self._error = reason
        return reason

    def _write(self, state: Callable[[], dict[str, Any]]) -> str:
        text = write_json(state())
        try:
            with open(f"{self._path}.new", "wb") as file:
                file.write(text.encode(errors="surrogatepass"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{self._path}.new", self._path)
        except OSError as error:
            return error.strerror or "OSError"
        return ""


# ==================================================================================================
# 70. Watcher process
# ==================================================================================================
#
# The problem: 200 heavy rules must not slow a POST, a receiver that hangs must not hold up a rule,
# and a crash must lose neither. The idea: a process of its own, with one thread that waits for
# everything at once (asyncio). It is a client of this server like any other: on connections that
# the front gives to it, it queries the store and POSTs what rules record. What it costs: some 30
# MiB, where it is asked for.

STATE_INTERVAL_S = 30.0  # the state is written so often even if only values have changed
WATCHER_STATUS_S = 1.0
STATUS_PAUSES = 20.0  # so much longer than it takes to count is the time to the next status,
MAX_STATUS_S = 5.0  # up to this
WATCHER_STOP_S = 3.0  # for what is still to be sent
MAX_ANSWERING = 2
MAX_ANSWER_S = 60.0  # for a fork that answers
ANSWERED_AT_ONCE = 500  # who asks while there are more alerts is answered by a fork
SELECTOR_CHECK_S = 600.0  # how often selectors are looked for that match nothing

_CONNECT, _RELOAD = b"conn", b"load"  # frames: a connection to this server; read the files again


async def find_silent_selectors(client: OwnClient, group: GroupState) -> None:
    """Look for selectors that match no series at all: a misspelt name, as a rule."""
    now = time.monotonic()
    for rule in group.rules:
        if now < rule.selectors_due or rule.health != "ok":
            continue
        try:
            rule.silent_selectors = [
                selector for selector in selectors_of(rule.rule.expr)
                if not await client.has_series(selector)
            ]  # fmt: skip
        except RuleError as error:
            logger.debug("selectors of %s: %s", group.key, error)
        # what is missing may be pushed at any time
        rule.selectors_due = now + (15.0 if rule.silent_selectors else SELECTOR_CHECK_S)


class Watcher:
    """Evaluates rules, keeps their alerts, tells others, and answers what is asked of them."""

    def __init__(self, control: socket.socket, options: WatchOptions):
        self.front, self._options = Front(control), options
        self._client = OwnClient()
        self._groups: list[GroupState] = []
        self._group_tasks: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()  # the others, kept from being collected
        self._may_answer = asyncio.Semaphore(MAX_ANSWERING)
        self._stopping = asyncio.Event()
        self._has_news = asyncio.Event()  # the state may have to be written
        self._state_file = StateFile(os.path.join(options.folder, STATE_NAME))
        # What was kept of notifications: it stays where this server notifies nobody.
        self._notify_state: dict[str, Any] | None = None
        self._progress, self._error = "waiting for the store", ""
        url = options.external_url.rstrip("/")
        config = load_notify(options)
        self._dispatcher = Dispatcher(config, url) if config else None
        clients = map(AlertmanagerClient, options.alertmanagers)
        sources = [*filter(None, [self._dispatcher]), *clients]
        self._outbox = Outbox(sources, self._start_task, self._has_news.set)

    async def run(self) -> None:
        """Work until the front says stop, or is gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.front.socket, self._hear)
        self._start_task(self._keep_telling())
        self._groups = load_groups(self._options)
        self._restore()
        for work in (self._begin(), self._keep_saving(), self._outbox.keep_sending()):
            self._start_task(work)
        await self._save(force=True)  # whoever can't keep a state says so at once
        await self._stopping.wait()
        for task in self._group_tasks:
            task.cancel()
        await self._save(force=True)
        await self._outbox.send_rest(WATCHER_STOP_S - 0.5)
        await self._save()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """What ends in an unexpected error ends this process: it is begun anew from its state."""
        try:
            await work
        except Exception as error:
            log_unexpected(error)
            self._error = INTERNAL_ERROR
            self._stopping.set()

    # ---- the front speaks, and is spoken to

    def _hear(self) -> None:
        for kind, position, arrived, descriptors in self.front.frames():
            if kind == _QUESTION:
                sock = socket.socket(fileno=descriptors[0])
                self._start_task(self._answer(sock, position, arrived))
            elif kind == _CONNECT:
                self._start_task(self._client.add(socket.socket(fileno=descriptors[0])))
            elif kind == _RELOAD:
                self._reload()
            elif kind == _STOP:
                self._stopping.set()
            else:  # how far the log is: nothing here reads it
                for descriptor in descriptors:
                    os.close(descriptor)
        if self.front.is_gone:
            self._stopping.set()
            asyncio.get_running_loop().remove_reader(self.front.socket)

    def _tell_status(self) -> None:
        rows = write_json(list(self._statistics())).encode(errors="backslashreplace")
        self.front.tell(
            status={"progress": self._progress, "error": self._error},
            connections=self._client.open,
            # a text without escapes, which the front parses when somebody wants to see it
            statistics=base64.b64encode(rows).decode(),
        )

    async def _keep_telling(self) -> None:
        while True:
            began = time.monotonic()
            self._tell_status()
            pause_s = STATUS_PAUSES * (time.monotonic() - began)
            await asyncio.sleep(min(max(pause_s, WATCHER_STATUS_S), MAX_STATUS_S))

    def _statistics(self) -> Iterator[StatisticRow]:
        """What the statistics of the server show of the watcher."""
        states = Counter(
            alert.state
            for group in self._groups for rule in group.alerting for alert in rule.alerts.values()
        )  # fmt: skip
        for state in ("pending", "firing"):
            yield "alerts", "gauge", "Alerts by state.", {"state": state}, states[state]
        for name, type_, help_, number in _GROUP_STATISTICS:
            for group in self._groups:
                labels = {"rule_group": group.key}
                yield f"prometheus_rule_{name}", type_, help_, labels, number(group)
        # those of one name side by side
        rows = (row for source in self._outbox.sources for row in source.statistics())
        yield from sorted(rows, key=operator.itemgetter(0))

    # ---- rules

    async def _begin(self) -> None:
        """Wait until the store answers; then evaluate."""
        while True:
            try:
                await self._client.query("vector(1)", int(time.time() * 1000))
                break
            except RuleError as error:
                self._progress = f"waiting for the store: {error}"
                await asyncio.sleep(0.2)
        self._progress = ""
        self._tell_status()
        self._start_groups()

    def _start_groups(self) -> None:
        self._group_tasks = [self._start_task(self._run_group(group)) for group in self._groups]

    async def _run_group(self, group: GroupState) -> None:
        """Evaluate a group at its times; what is missed is counted, and not caught up."""
        at = group.next_time(time.time())
        while True:
            await asyncio.sleep(max(0.0, at - time.time()))
            now = time.time()
            if abs(now - at) > group.interval_s:  # the clock was set
                at = now
            await group.evaluate(at, self._client.query, self._client.record, self._outbox.put)
            self._has_news.set()
            await find_silent_selectors(self._client, group)
            now = time.time()
            group.missed += max(0, int((now - at) / group.interval_s))
            at = group.next_time(max(at, now) if now - at < 10 * group.interval_s else now)

    def _reload(self) -> None:
        """Read the files again; what is broken stays as it was."""
        try:
            groups, config = load_groups(self._options), load_notify(self._options)
        except WatchError as error:
            for line in str(error).splitlines():
                logger.error("SIGHUP: %s; what was in force stays in force", line)
            return
        for task in self._group_tasks:
            task.cancel()
        now = time.time()
        kept = {key: row for group in self._groups for key, row in group.state().items()}
        ended = {s.labels: s for g in self._groups for s in g.end_series(int(now * 1000))}
        self._groups = groups
        self._take_over(kept, now)
        for group in groups:
            for sample in group.end_series(0):
                ended.pop(sample.labels, None)
        if ended:
            self._start_task(self._end_series(list(ended.values())))
        if self._dispatcher and config:
            self._dispatcher.reload(config)
        if not self._progress:
            self._start_groups()
        self._has_news.set()
        logger.info("SIGHUP: %d groups of rules are read again", len(groups))

    async def _end_series(self, samples: list[Recorded]) -> None:
        """Series of rules that are gone end."""
        try:
            await self._client.record(samples)
        except RuleError as error:
            logger.warning("series of rules that are gone: %s", error)

    # ---- what survives a crash

    def _take_over(self, kept: dict[str, Any], now: float) -> None:
        """Give rules their alerts back. Alerts of a rule that is gone are resolved, and that is
        told.
        """
        for group in self._groups:
            group.restore(kept, now)
        external_labels, valid_s = dict(self._options.external_labels), 4 * RESEND_DELAY_S
        for alert in [
            ActiveAlert.from_json(each) for row in kept.values() for each in row["alerts"]
        ]:
            ended_at = alert.resolved_at or now
            if alert.fired_at is not None and ended_at > now - valid_s:
                labels = LabelSet(external_labels | alert.labels)
                self._outbox.put([Alert(labels, alert.annotations, alert.fired_at, ended_at, now)])

    def _restore(self) -> None:
        try:
            if (state := self._state_file.read()) is None:
                return
            self._notify_state = state.get("notify")
            if self._dispatcher and self._notify_state:
                self._dispatcher.restore(self._notify_state)
            self._take_over(state["rules"], time.time())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._state_file.set_aside(error)

    def _state(self) -> dict[str, Any]:
        """All that a restart must know."""
        rules = {key: row for group in self._groups for key, row in group.state().items()}
        notify = self._dispatcher.state() if self._dispatcher else self._notify_state
        return {"version": 1, "rules": rules, "notify": notify}

    async def _keep_saving(self) -> None:
        while True:
            is_forced = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATE_INTERVAL_S):
                    await self._has_news.wait()
                    is_forced = False
            await self._save(is_forced and any(rule.alerts for rule in self._alerting()))
            await asyncio.sleep(self._state_file.pause_s)

    def _alerting(self) -> Iterator[AlertingState]:
        return (rule for group in self._groups for rule in group.alerting)

    async def _save(self, force: bool = False) -> None:
        """Write the state, if something has changed that a restart must know."""
        async with self._state_file.lock:
            self._has_news.clear()
            holders: list[Any] = [*filter(None, [self._dispatcher]), *self._alerting()]
            changed = [each for each in holders if each.changed]
            if not changed and not force:
                return
            for each in changed:
                each.changed = False
            self._error = await self._state_file.write(self._state)
            if self._error:
                self._has_news.set()
                for each in changed:
                    each.changed = True

    # ---- questions

    async def _answer(self, sock: socket.socket, position: Position, arrived: float) -> None:
        with sock:
            try:
                question = Question(sock, position, arrived)
                alerts = sum(len(rule.alerts) for rule in self._alerting())
                alerts += len(self._dispatcher.alerts) if self._dispatcher else 0
                if question.path.startswith("GET ") and alerts > ANSWERED_AT_ONCE:
                    async with self._may_answer:
                        answer = partial(self._answer_in_fork, question)
                        await in_fork(answer, MAX_ANSWER_S, [sock.fileno()])
                    return
                status, body = self._answer_to(question)
                if self._dispatcher and self._dispatcher.changed:
                    await self._save()
                self._outbox.is_due.set()
                async with asyncio.timeout(SENDING_S):
                    loop = asyncio.get_running_loop()
                    await loop.sock_sendall(sock, _relayed(question, status, body))
            except (OSError, ValueError, TimeoutError) as error:
                logger.debug("a question was not whole, or its answer was not read: %s", error)

    def _answer_in_fork(self, question: Question) -> str:
        status, body = self._answer_to(question)
        question.socket.settimeout(SENDING_S)
        question.socket.sendall(_relayed(question, status, body))
        return ""

    def _answer_to(self, question: Question) -> tuple[int, bytes]:
        method, _, target = question.path.partition(" ")
        path, _, query = target.partition("?")
        if not path.startswith("/api/v2/"):
            return _answer_v1(self._groups, path, query)
        if self._dispatcher is None:
            reason = "alerts go to --alertmanager: ask there"
            return 404, write_json({"error": reason}).encode()
        return self._dispatcher.answer(method, path, query, question.form.encode())


def _answer_v1(groups: list[GroupState], path: str, query: str) -> tuple[int, bytes]:
    try:
        form = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=1_000)
        if path == f"{API_PREFIX}rules":
            found: dict[str, Any] = rules_json(groups, form)
        else:
            found = {"alerts": alerts_json(groups)}
        return 200, write_json({"status": "success", "data": found}).encode()
    except ValueError as error:
        return QueryAPI.error("bad_data", str(error))


_GROUP_STATISTICS: tuple[tuple[str, str, str, Callable[[GroupState], float]], ...] = (
    ("evaluations_total", "counter", "Evaluations of rules.", lambda g: g.evaluations),
    ("evaluation_failures_total", "counter", "Evaluations that failed.", lambda g: g.failures),
    ("group_iterations_missed_total", "counter", "Missed evaluations of groups.",
     lambda g: g.missed),
    ("group_last_duration_seconds", "gauge", "Duration of the last evaluation of a group.",
     lambda g: g.duration_s),
)  # fmt: skip


def watch_main(arguments: list[str]) -> int:
    """The watcher process: its argument is the descriptor of its socket to the front."""
    sys.setrecursionlimit(MAX_RECURSION)
    # With 20,000 alerts the collector took a third of an evaluation, and found nothing.
    gc.set_threshold(100_000)
    control, told = begin_following(arguments)
    options = WatchOptions(**told)

    async def run() -> None:
        watcher = Watcher(control, options)
        logger.addFilter(watcher.front.log)
        logger.setLevel(logging.INFO)
        await watcher.run()

    with only_one(os.path.join(options.folder, "alerts.lock"), os.O_RDWR | os.O_CREAT):
        asyncio.run(run())
    return 0


# ==================================================================================================
# 71. Watcher client
# ==================================================================================================
#
# The front's end of the watcher: it gives the watcher connections to this server, hands over what
# is asked of rules, alerts and silences, and shows the watcher's numbers.


class WatcherClient:
    """The front's end of the watcher. `begin` is called when the server exists, before it runs."""

    def __init__(self, service: Service, options: WatchOptions):
        self._service = service
        self._options = options._asdict()
        self.follower = Follower(service.log, "watch", "the watcher", self._options, self._hear)
        self.follower.stop_s = WATCHER_STOP_S
        self._adopt: Callable[[socket.socket, str], None] | None = None
        self.status: dict[str, Any] = {"progress": "starting", "error": ""}
        self._rows = base64.b64encode(b"[]").decode()  # parsed when somebody wants to see them
        service.statistics.add_rows(self._statistics)
        service.health_facts.append(self.health)
        service.add_routes({
            f"{API_PREFIX}rules": {"GET": self.ask},
            f"{API_PREFIX}alerts": {"GET": self.ask},
            "/api/v2/*": {"GET": self.ask, "POST": self.ask, "DELETE": self.ask},
        })  # fmt: skip

    def _statistics(self) -> Iterator[OwnMetric]:
        for name, type_, help_, labels, value in parse_json(base64.b64decode(self._rows)):
            yield OwnMetric(name, type_, help_, name, labels, value)

    def begin(self, adopt: Callable[[socket.socket, str], None], external_url: str) -> None:
        """Start the watcher: `adopt` serves a connection of it."""
        self._adopt = adopt
        self._options["external_url"] = self._options["external_url"] or external_url
        self.follower.look()

    def _connect(self, count: int) -> None:
        """Give the watcher so many connections; what fails now is tried at its next status."""
        assert self._adopt is not None  # begin() comes first
        for _ in range(count):
            try:
                mine, theirs = socket.socketpair()
                self._adopt(mine, "watcher")
                with theirs:
                    self.follower.send(_CONNECT, self._service.log.position, theirs.fileno())
            except OSError as error:
                logger.debug("the watcher got no connection: %s", error)

    def health(self) -> dict[str, Any]:
        """What `/health` says of the watcher."""
        said = {"watcher": self.status["progress"] or "running"}
        return said | ({"watcher_error": self.status["error"]} if self.status["error"] else {})

    def ask(self, request: Request, client: str) -> Answer:
        """`/api/v1/rules`, `/api/v1/alerts` and `/api/v2/…`; who writes needs what POSTs need."""
        head = request.head
        method = "GET" if head.method == "HEAD" else head.method
        if method != "GET":
            self._service.require_writer(head, client)
        body = decode_content(request)
        try:
            body.decode()
        except UnicodeDecodeError:
            raise HTTPError(400, "the body is not UTF-8") from None
        path = f"{method} {head.path}?{head.query}".encode()
        return self.follower.ask(head, path, body, len(path) + MAX_BODY_BYTES)

    def reload(self) -> None:
        """Have the files read again."""
        try:
            self.follower.send(_RELOAD, self._service.log.position)
        except OSError as error:  # one that is started anew reads them anyway
            logger.debug("the watcher was not told to read its files: %s", error)

    def _hear(self, said: dict[str, Any]) -> None:
        if "ended" in said:
            self.status = {"progress": "it died and is started anew", "error": ""}
            return
        self.status, self._rows = said["status"], said["statistics"]
        self._connect(OWN_CONNECTIONS - said["connections"])
        if not self.status["progress"]:
            self.follower.is_well()


def _always(value: Any) -> dict[str, Handler]:
    response = json_response(200, value)
    return {"GET": lambda request, client: Answer(response)}


# What is answered where no watcher runs, for Grafana and the dashboard.
EMPTY_WATCHER = {
    f"{API_PREFIX}rules": _always({"status": "success", "data": {"groups": []}}),
    f"{API_PREFIX}alerts": _always({"status": "success", "data": {"alerts": []}}),
    "/api/v2/alerts": _always([]),
    "/api/v2/silences": _always([]),
}


# ==================================================================================================
# 72. Saved dashboards
# ==================================================================================================
#
# The problem: a view that was worth arranging is worth keeping and sharing. The idea: JSON files
# in a folder, which people write, or save from the page, and keep under version control. A file is
# checked whole before the page sees it, its queries too: a broken one is named with its fault, and
# the others are drawn all the same.

MAX_DASHBOARD_BYTES = 1024 * 1024


class DashboardError(ValueError):
    """A saved dashboard that can't be drawn: which member of it, and what is wrong."""


def _is_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) for text in texts)


# What a member of an object must be, in words, and whether a value is that.
_MEMBER_KINDS: dict[str, Callable[[Any], bool]] = {
    "a string": lambda value: isinstance(value, str),
    "an array": lambda value: isinstance(value, list),
    "a string or an array of strings": _is_texts,
    "letters, digits and '_'": lambda value: (
        isinstance(value, str) and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", value) is not None
    ),
    "a whole number from 1 to 12": lambda value: type(value) is int and 1 <= value <= 12,
}
# The members of each object: what each must be, and what it is where it is missing.
_Members = dict[str, tuple[str, Any]]
_DASHBOARD: _Members = {
    "title": ("a string", None),
    "variables": ("an array", []),
    "panels": ("an array", None),
}
_VARIABLE: _Members = {
    "name": ("letters, digits and '_'", None),
    "tag": ("a string", None),
    "metric": ("a string", ""),  # whose tag it is; "": of any
}
_PANEL: _Members = {
    "title": ("a string", None),
    "query": ("a string or an array of strings", None),
    "unit": ("a string", ""),
    "legend": ("a string or an array of strings", []),  # with {{tag}}
    "width": ("a whole number from 1 to 12", 6),  # in twelfths of the page
}


def _checked(value: Any, place: str, members: _Members) -> dict[str, Any]:
    """An object with all of its members; `place` is where it stands in the document."""
    if not isinstance(value, dict):
        raise DashboardError(f"{place.rstrip('.') or 'the document'} must be an object")
    for name in value:
        if name not in members:
            known = ", ".join(members)
            raise DashboardError(f"{place}{name[:80]}: unknown member; known are {known}")
    found = {name: value.get(name, missing) for name, (_, missing) in members.items()}
    for name, (must_be, _) in members.items():
        if not _MEMBER_KINDS[must_be](found[name]):
            raise DashboardError(f"{place}{name}: must be {must_be}")
    return found


def read_dashboard(text: str | bytes) -> dict[str, Any]:
    """A saved dashboard, with what it leaves out. Raises JSONError or DashboardError.

    >>> text = '{"title": "Host", "panels": [{"title": "Load", "query": "load1"}]}'
    >>> read_dashboard(text)["panels"]
    [{'title': 'Load', 'query': ['load1'], 'unit': '', 'legend': [], 'width': 6}]
    >>> read_dashboard(text.replace('"load1"', '"load1", "width": 13'))
    Traceback (most recent call last):
    metricstream.DashboardError: panels[0].width: must be a whole number from 1 to 12
    """
    dashboard = _checked(parse_json(text), "", _DASHBOARD)
    for name, members in (("variables", _VARIABLE), ("panels", _PANEL)):
        dashboard[name] = [
            _checked(item, f"{name}[{number}].", members)
            for number, item in enumerate(dashboard[name])
        ]
    values = {"window": "5m", "step": "1m"}
    values |= {variable["name"]: "x" for variable in dashboard["variables"]}
    for number, panel in enumerate(dashboard["panels"]):
        for name in ("query", "legend"):
            if isinstance(panel[name], str):
                panel[name] = [panel[name]]
        for query in panel["query"]:
            # As the page does it.
            filled = re.sub(r"\$([A-Za-z0-9_]+)", lambda name: values.get(name[1], name[0]), query)
            try:
                parse_query(filled)
            except QueryError as error:
                raise DashboardError(f"panels[{number}].query: {error}") from None
    return dashboard


def read_dashboards(folder: str) -> dict[str, Any]:
    """The saved dashboards of a folder as it is now, and what can't be read and why."""
    dashboards, faults = [], []
    for file in sorted(file for file in os.listdir(folder) if file.endswith(".json")):
        try:
            with open(os.path.join(folder, file), "rb") as opened:
                text = opened.read(MAX_DASHBOARD_BYTES + 1)
            if len(text) > MAX_DASHBOARD_BYTES:
                raise DashboardError(f"more than {MAX_DASHBOARD_BYTES} bytes")
            dashboards.append({"file": file, **read_dashboard(text)})
        except OSError as error:
            faults.append({"file": file, "error": error.strerror or str(error)})
        except (DashboardError, JSONError) as error:
            faults.append({"file": file, "error": str(error)})
    return {"dashboards": dashboards, "faults": faults}


# ==================================================================================================
# 73. Dashboard: queries
# ==================================================================================================
#
# The problem: whoever pushed something wants to look at it without installing anything. The idea:
# one document, with its style and script in it, at `/`. It asks the query API like any client and
# has no rights of its own. What it costs: 20 KB once for a browser, and no framework that keeps
# elements and state together.
#
# The script comes in four chapters. This one is what is asked: the state, all of it in the URL;
# the metrics, each drawn without a query, since its type and name decide how; and the series of a
# panel, on a grid of times with NaN where nothing was pushed.

_QUERY_SCRIPT = r"""
"use strict";

// ---- State: what is looked at. All of it is in the URL, behind the "#". ----

const FRESH = { // what a new view begins with
  view: "metrics", name: "", search: "", all: "", by: [], only: [], q: [], variables: new Map(),
};
const DEFAULTS = {...FRESH, range: "1h", refresh: "15"};
const RANGES = {
  "5m": "5 minutes", "15m": "15 minutes", "1h": "1 hour", "6h": "6 hours", "24h": "24 hours",
  "7d": "7 days", "30d": "30 days",
};
const REFRESHES = {0: "off", 5: "5 s", 15: "15 s", 60: "1 min"};
const MAX_TIME = 8.64e12; // of a Date, in seconds
const UNIT_SECONDS = {s: 1, m: 60, h: 3600, d: 86400};

let state = readState();

function readState() {
  const fields = new URLSearchParams(location.hash.slice(1)), read = {...DEFAULTS};
  for (const name of Object.keys(DEFAULTS).filter((name) => fields.has(name))) {
    read[name] = Array.isArray(DEFAULTS[name]) ? fields.getAll(name) : fields.get(name);
  }
  const variables = [...fields].filter(([name]) => name.startsWith("$"));
  read.variables = new Map(variables.map(([name, value]) => [name.slice(1), value]));
  return read;
}

function hashOf(changes) {
  const fields = new URLSearchParams(), {variables, ...wanted} = {...state, ...changes};
  for (const name in wanted) {
    if (wanted[name] === DEFAULTS[name]) continue;
    for (const value of [wanted[name]].flat()) fields.append(name, value);
  }
  for (const [name, value] of variables) fields.set("$" + name, value);
  return "#" + fields;
}

// Another view, with nothing of this one but the time.
const linkTo = (view, changes) => hashOf({...FRESH, view, ...changes});

// A change that "back" undoes, and Escape if it is one of the time.
function go(changes) {
  history.pushState({isOfTime: "range" in changes}, "", hashOf(changes));
  dispatchEvent(new Event("popstate"));
}

// A change too small for that.
function adjust(changes) {
  history.replaceState(history.state, "", hashOf(changes));
  state = readState();
}

// First and last second of "1h", or of "1700000000-1700003600".
function timeRange() {
  const [from, to] = state.range.split("-").map(Number), now = Date.now() / 1000;
  if (to > from && to < MAX_TIME) return [from, to];
  const [, count, unit] = /^(\d{1,4})([smhd])$/.exec(state.range) ?? [null, 1, "h"];
  return [now - count * UNIT_SECONDS[unit], now];
}

// ---- Asking ----

class Refusal extends Error {}

// What may happen to a question; any other error is a fault of this script.
const isExpected = (error) => error instanceof Refusal || error.name === "AbortError";

// The answer of the API; parameters are sent as a form, and `signal` takes the question back.
function ask(path, parameters, signal) {
  const body = parameters && new URLSearchParams(parameters);
  return request(path, {method: body ? "POST" : "GET", body, signal});
}

async function request(path, options) {
  let answer, value;
  try {
    answer = await fetch("api/" + path, options);
    value = JSON.parse(await answer.text() || "{}");
  } catch (error) {
    if (error.name === "AbortError") throw error;
    setNotice("The server does not answer. Trying again …");
    throw new Refusal("no answer");
  }
  setNotice(answer.status === 503 ? value.error : "");
  if (!answer.ok) throw Object.assign(new Refusal(value.error ?? value), {status: answer.status});
  return value.data ?? value;
}

function setNotice(text) {
  const notice = document.getElementById("notice");
  if (notice.textContent !== text) notice.textContent = text;
  notice.hidden = !text;
}

const MAX_READING = 4; // panels: the first are drawn before the last are asked for
const waiting = [];
let reading = 0;

async function inTurn(read) {
  if (reading < MAX_READING) reading++;
  else await new Promise((resolve) => waiting.push(resolve));
  try {
    return await read();
  } finally {
    if (waiting.length) waiting.shift()();
    else reading--;
  }
}

// ---- Metrics: their names, types and units, and how they are drawn ----

const WORDS = %WORDS%; // of the query language
let catalogue = null;

async function readCatalogue(signal) {
  const [from, to] = timeRange(), query = 'count by (__name__) ({__name__=~".+"})';
  const [counts, types] = await Promise.all([
    ask("v1/query", {query, time: to, lookback_delta: to - from}, signal),
    ask("v1/metadata", {}, signal),
  ]);
  catalogue = new Map(counts.result.map(({metric: {__name__: name}, value}) => [
    name, {name, count: Number(value[1]), type: types[name]?.[0].type},
  ]).sort(([a], [b]) => a < b ? -1 : 1));
}

const isPlain = (name) => /^[A-Za-z_][A-Za-z0-9_]*$/.test(name);
const quoted = (text) => JSON.stringify(text).replaceAll("$", "\\u0024"); // no variable in it
const wordsOf = (text) => text.match(/[\w:]+/g) ?? [];
const tagName = (name) => isPlain(name) ? name : quoted(name);

// A name as a query has it.
function selectorOf(name) {
  const isWord = WORDS.includes(name.toLowerCase());
  return isPlain(name.replaceAll(":", "_")) && !isWord ? name : `{${quoted(name)}}`;
}

// The stored type decides, then the name.
function kindOf({name, type}) {
  if (name.endsWith("_bucket")) return "histogram";
  if (type === "gauge") return "gauge";
  return type === "counter" || /_(total|count|sum)$/.test(name) ? "counter" : "gauge";
}

function unitOf(name) {
  const [, word] = /_([a-z]+?)(_total|_sum|_bucket)?$/.exec(name) ?? [];
  return {seconds: "s", bytes: "B", ratio: "ratio", percent: "%", milliseconds: "ms"}[word] ?? "";
}

// A metric as a panel: counters as rates, histograms as quantiles, gauges as they are.
function panelOf(metric, by = []) {
  const {name, count} = metric, selector = selectorOf(name), tags = by.map(tagName);
  const panel = {title: name, metric: name, count, unit: unitOf(name)};
  const grouped = (operator, text) => by.length ? `${operator} by (${tags}) (${text})` : text;
  const rate = `rate(${selector}[$window])`, kind = kindOf(metric);
  if (kind === "histogram") {
    const buckets = `sum by (${["le", ...tags]}) (${rate})`;
    panel.query = [0.5, 0.9, 0.99].map((rank) => `histogram_quantile(${rank}, ${buckets})`);
    const values = by.map((tag) => ` {{${tag}}}`).join("");
    panel.legend = ["p50", "p90", "p99"].map((rank) => rank + values);
  } else if (kind === "counter") {
    panel.query = [grouped("sum", rate)];
    panel.unit += "/s";
  } else panel.query = [grouped("avg", selector)];
  return panel;
}

const intervals = new Map();

// The usual time between two pushes of a series, in seconds; 0 where it isn't known.
async function intervalOf(name, signal) {
  const [, time] = timeRange(), known = intervals.get(name);
  if (known?.until > time) return known.interval;
  let gaps = [];
  for (const window of ["10m", "1d"]) {
    const samples = {query: `${selectorOf(name)}[${window}]`, time, limit: 1};
    const [{values} = {values: []}] = (await ask("v1/query", samples, signal)).result;
    gaps = values.slice(1).map(([later], i) => later - values[i][0]);
    if (gaps.length > 1) break;
  }
  const interval = gaps.sort((a, b) => a - b)[gaps.length >> 1] ?? 0; // the median
  intervals.set(name, {interval, until: time + (gaps.length > 1 ? 300 : 0)});
  return interval;
}

async function lastPush(name, signal) {
  const [from, time] = timeRange(), query = `max(timestamp(${selectorOf(name)}))`;
  const latest = await ask("v1/query", {query, time, lookback_delta: time - from}, signal);
  return Number(latest.result[0]?.value[1] ?? NaN);
}

// ---- Alerts ----

let alertingRules = [], alertsRead;

async function readAlerts(signal) {
  const {groups} = await ask("v1/rules?type=alert", null, signal);
  alertingRules = groups.flatMap(({rules}) => rules);
}

// What fires, then what pends.
function activeAlerts() {
  const all = alertingRules.flatMap(({alerts}) => alerts ?? []);
  return ["firing", "pending"].flatMap((which) => all.filter(({state}) => state === which));
}

// The times in which an alert fired whose rule reads one of some metrics, as [from, to].
async function firingTimes(metrics, {start, end, step}, signal) {
  await alertsRead;
  const names = alertingRules.filter(({query}) => (
    wordsOf(query).some((word) => metrics.includes(word))))
    .map(({name}) => `ALERTS{alertname=${JSON.stringify(name)},alertstate="firing"}`);
  if (!names.length) return [];
  const asked = {query: `count(${names.join(" or ")})`, start, end, step};
  const {result: [found]} = await ask("v1/query_range", asked, signal);
  return found?.values.map(([time]) => [time - step, time]) ?? [];
}

// ---- Series of a panel ----

const MAX_SERIES = 1000; // of an answer
const MAX_DRAWN = 20;
const MAX_STEPS = 300; // of a series: fewer than a chart has columns of pixels, or nearly so
const STEPS = [
  1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400,
];

function stepFrom(least) {
  return STEPS.find((step) => step >= least) ?? Math.ceil(least / 86400) * 86400;
}

// {start, end, step, last: of the first metric, shades, series}
async function readPanel({query, metric, legend, isCard}, variables, signal) {
  const [from, to] = timeRange(), words = new Set(query.flatMap(wordsOf));
  const metrics = metric ? [metric] : [...words].filter((word) => catalogue.has(word));
  const found = await Promise.all(metrics.map((name) => intervalOf(name, signal)));
  const intervalIn = (text) => Math.max(0, ...found.filter((_, i) => (
    metric || wordsOf(text).includes(metrics[i]))));
  const least = found.length && Math.min(...query.map(intervalIn)) * 0.99;
  const step = stepFrom(Math.max(least, (to - from) / MAX_STEPS));
  // A rate needs samples up to its time; a sample is drawn at the next step behind it.
  const round = query.some((text) => text.includes("$window")) ? Math.floor : Math.ceil;
  const start = Math.floor(from / step) * step;
  const grid = {start, end: Math.max(round(to / step) * step, start + step), step};
  const seriesOf = async (text, index) => {
    const interval = intervalIn(text), isDense = interval && step > 1.5 * interval;
    const window = Math.ceil(Math.max(4 * interval, step + interval, 4)) + "s";
    const known = new Map([...variables, ["window", window], ["step", step + "s"]]);
    // Not the usual lookback of five minutes: a client that died ends its line.
    const asked = {...grid, lookback_delta: Math.max(step, 2 * interval)};
    asked.limit = isCard ? MAX_DRAWN : MAX_SERIES;
    const read = async (query) => {
      const filled = query.replace(/\$(\w+)/g, (all, name) => known.get(name) ?? all);
      const {resultType, result} = await ask("v1/query_range", {...asked, query: filled}, signal);
      return resultType !== "matrix" ? [] : result.map(({metric: tags, values}) => (
        {tags, values: onGrid(values, grid), query: text, template: legend?.[index]}));
    };
    try {
      const texts = [text, ...(isDense ? bandOf(text) : [])];
      const [series, lows = [], highs = []] = await Promise.all(texts.map(read));
      addBands(series, lows, highs);
      return series;
    } catch (error) {
      throw Object.assign(error, {query: text});
    }
  };
  const [last, shades, ...series] = await Promise.all([
    metrics.length ? lastPush(metrics[0], signal) : NaN,
    firingTimes(metrics, grid, signal),
    ...query.map(seriesOf),
  ]);
  return {...grid, last, shades, series: nameSeries(series.flat())};
}

function onGrid(values, {start, end, step}) {
  const points = new Array(Math.round((end - start) / step) + 1).fill(NaN);
  for (const [time, text] of values) {
    points[Math.round((time - start) / step)] = Number(text.replace("Inf", "Infinity"));
  }
  return points;
}

const BANDED = /^(avg by \([^()]*\) )?\(?([\w:]*(?:\{[^{}]*\})?)\)?$/;

// For a selector, or an average of one: the least and the greatest sample of each step.
function bandOf(text) {
  const [, by = "", selector = ""] = BANDED.exec(text) ?? [];
  if (!/^[A-Za-z_:{]/.test(selector) || WORDS.includes(selector.toLowerCase())) return [];
  return ["min", "max"].map((operator) => (
    by.replace("avg", operator) + `(${operator}_over_time(${selector}[$step]))`));
}

function addBands(series, lows, highs) {
  const keyOf = ({tags}) => JSON.stringify({...tags, __name__: ""});
  const [low, high] = [lows, highs].map((all) => (
    new Map(all.map((one) => [keyOf(one), one.values]))));
  for (const one of series) [one.low, one.high] = [low.get(keyOf(one)), high.get(keyOf(one))];
}

// Series differ by more than hue: the border of a legend's sample, the dashes of a canvas.
const LINES = [["solid", []], ["dashed", [7, 3]], ["dotted", [2, 2]]];

// Names by the template, else by the tags in which the series differ; lines by their order.
function nameSeries(series) {
  const isShared = ([tag, value]) => series.every(({tags}) => tags[tag] === value);
  const shared = new Map(Object.entries(series[0]?.tags ?? {}).filter(isShared));
  const seen = new Set();
  return series.map(({tags, template, query, ...rest}, index) => {
    const all = Object.entries(tags), differing = all.filter(([tag]) => !shared.has(tag));
    const texts = (differing.length ? differing : all).map(
      ([tag, value]) => tag === "__name__" ? value : `${tag}=${value}`);
    const filled = template?.replace(/\{\{(.+?)\}\}/g, (_, tag) => tags[tag] ?? "");
    const short = filled || texts.join(", ") || query;
    const name = seen.has(short) ? `${short} (${query})` : short;
    seen.add(name);
    const [border, dash] = LINES[index % LINES.length];
    return {...rest, name, color: `--series-${index % 8}`, border, dash};
  });
}
"""


# ==================================================================================================
# 74. Dashboard: charts
# ==================================================================================================
#
# A chart is a picture on a canvas, drawn anew only when its values or its size change; cursor, tip
# and selection are elements moved over it (uPlot's way), and one cursor runs over all charts. What
# a canvas lacks is added: a name that says the last values, and arrow keys whose values are read
# out.

_CHART_SCRIPT = r"""
// ---- Values and times as text ----

const TIMES = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"], [1e-6, "µs"]];
const BYTES = [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [1024, "KiB"], [1, "B"]];
const POWERS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];

function scaled(value, sizes, digits = 4) {
  const rounded = Math.abs(Number(value.toPrecision(digits))); // 999.99 ms are 1 s
  const found = sizes.find(([least]) => rounded >= least) ?? sizes.at(-1);
  const [size, name] = value ? found : sizes.find(([one]) => one === 1);
  return `${Number((value / size).toPrecision(digits))} ${name}`;
}

function format(value, unit = "") {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "–" : String(value);
  const [, base, rate = ""] = /^(.*?)(\/s)?$/.exec(unit);
  if (base === "B") return scaled(value, BYTES) + rate;
  if (base === "ratio") return format(value * 100, "%" + rate);
  if (base === "%") return Number(value.toPrecision(4)) + " %" + rate;
  if (base === "s" && !rate) return scaled(value, TIMES);
  if (base === "ms" && !rate) return scaled(value / 1000, TIMES);
  return (scaled(value, POWERS) + base).trim() + rate;
}

// A formatter is made once: that takes longer than all its uses in a picture.
const clock = (options) => new Intl.DateTimeFormat([], {hourCycle: "h23", ...options});
const EXACT = clock({dateStyle: "medium", timeStyle: "medium"});
const exactTime = (time) => EXACT.format(time * 1000);

// What local clocks are behind UTC at a time, in seconds.
const zoneAt = (time) => new Date(time * 1000).getTimezoneOffset() * 60;

// ---- Scales: where the ticks are ----

function valueTicks(low, high, unit) {
  const least = (high - low) / 4, base = 10 ** Math.floor(Math.log10(least)), ticks = [];
  let step = base * [1, 2, 5, 10].find((times) => base * times >= least);
  if (unit.startsWith("B") && least > 1) step = 2 ** Math.ceil(Math.log2(least));
  if (unit === "s" && least > 1) step = stepFrom(least);
  for (let i = Math.floor(low / step); (i - 1) * step < high; i++) ticks.push(i * step);
  return ticks;
}

// [time, text] at round times of local clocks.
function timeTicks(from, to, width) {
  const hasDate = to - from > 90000, time = {hour: "2-digit", minute: "2-digit"}, ticks = [];
  const step = stepFrom((to - from) / (width / (hasDate ? 80 : 60)));
  if (step < 60) time.second = "2-digit";
  const day = hasDate ? {day: "numeric", month: "short"} : {};
  const text = clock(step >= 86400 ? day : {...day, ...time});
  for (let local = Math.ceil((from - zoneAt(from)) / step) * step; ; local += step) {
    const at = local + zoneAt(local + zoneAt(from));
    if (at > to) return ticks;
    ticks.push([at, text.format(at * 1000)]);
  }
}

// ---- Elements ----

function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function selectOf(id, texts, chosen, onchange) {
  return el("select", {id, onchange}, ...texts.map(([value, text]) => (
    el("option", {value, selected: value === chosen}, text))));
}

let focusedId = ""; // of what had the focus when it was replaced

// Elements that are made anew get the focus back, also where they come with a later answer.
function replace(parent, ...children) {
  focusedId = document.activeElement.id || focusedId;
  parent.replaceChildren(...children);
  const again = document.getElementById(focusedId);
  if (!again) return;
  if (again !== document.activeElement) again.focus();
  focusedId = "";
}

function speak(text) {
  document.getElementById("spoken").textContent = text;
}

// A bit of the line of a series.
function sampleOf({color, border}) {
  const sample = el("i");
  sample.style.borderTopStyle = border;
  sample.style.borderTopColor = `var(${color})`;
  return sample;
}

function tableOf(name, heads, rows) {
  return el("table", {ariaLabel: name}, el("thead", {}, el("tr", {}, ...heads)),
    el("tbody", {}, ...rows));
}

// ---- Chart ----

const LEFT = 64, RIGHT = 8, TOP = 8, BOTTOM = 22; // margins, in pixels
const STYLES = getComputedStyle(document.documentElement);
// Methods of a chart; where it has none, the cursors are hidden.
const EVENTS = [
  "pointermove", "pointerdown", "pointerup", "pointercancel", "keydown", "pointerleave", "blur",
];
let cursorTime;

class Chart {
  constructor(panel, size) {
    this.panel = panel;
    this.canvas = el("canvas", {ariaHidden: "true"});
    this.cursor = el("div", {className: "cursor", hidden: true});
    this.selection = el("div", {className: "selection", hidden: true});
    this.tip = el("div", {className: "tip", hidden: true});
    this.root = el("div", {className: `chart ${size}`, tabIndex: 0, role: "application",
      ariaRoleDescription: "chart", ariaDescription: "Arrow keys move a cursor, t shows a table",
    }, this.canvas, this.selection, this.cursor, this.tip);
    for (const type of EVENTS) this.root.addEventListener(type, this);
    new ResizeObserver(([{contentRect: {width, height}}]) => {
      Object.assign(this, {width, height, floor: height - BOTTOM});
      this.draw();
    }).observe(this.root);
  }

  x(time) {
    const {start, end} = this.picture;
    return LEFT + (time - start) / (end - start) * (this.width - LEFT - RIGHT);
  }

  y(value) {
    return this.floor - (value - this.low) / (this.high - this.low) * (this.floor - TOP);
  }

  timeAt(x) {
    const {start, end} = this.picture, share = (x - LEFT) / (this.width - LEFT - RIGHT);
    return start + Math.min(1, Math.max(0, share)) * (end - start);
  }

  draw() {
    const {picture, canvas, width, height} = this, scale = devicePixelRatio;
    if (!picture || !width) return;
    Object.assign(canvas, {width: width * scale, height: height * scale});
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    this.drawScales(pen);
    pen.rect(LEFT, 0, width, height);
    pen.clip();
    pen.lineJoin = "round";
    for (const one of this.series) {
      pen.strokeStyle = pen.fillStyle = STYLES.getPropertyValue(one.color);
      if (one.low && one.high) this.drawBand(pen, one);
      this.drawLine(pen, one);
    }
  }

  drawScales(pen) {
    const ticks = this.fit(), {start, end, shades} = this.picture;
    pen.font = "11px system-ui, sans-serif";
    pen.fillStyle = STYLES.getPropertyValue("--shade");
    for (const [from, to] of shades) {
      pen.fillRect(this.x(from), TOP, this.x(to) - this.x(from), this.floor - TOP);
    }
    pen.strokeStyle = STYLES.getPropertyValue("--grid");
    pen.fillStyle = STYLES.getPropertyValue("--muted");
    pen.textAlign = "right";
    for (const value of ticks) {
      const y = Math.round(this.y(value)) + 0.5;
      pen.strokeRect(LEFT, y, this.width - LEFT - RIGHT, 0);
      pen.fillText(format(value, this.unit), LEFT - 6, y + 4);
    }
    pen.textAlign = "center";
    for (const [time, text] of timeTicks(start, end, this.width - LEFT)) {
      const x = this.x(time), half = pen.measureText(text).width / 2;
      if (x + half <= this.width) pen.fillText(text, x, this.height - 6);
    }
  }

  // Sets the scale of the values; returns its ticks.
  fit() {
    let [low, high] = extremes(this.series);
    if (low > high || low === 0 && high === 0) [low, high] = [0, 1];
    if (low > 0 && low < high / 2) low = 0;
    // What differs only in the last digits of a double has no ticks in between.
    const size = Math.abs(low) + Math.abs(high), room = high - low > size * 1e-12 ? 0 : size / 8;
    const ticks = valueTicks(low - room, high + room, this.unit);
    [this.low, this.high] = [ticks[0], ticks.at(-1)];
    return ticks;
  }

  // A gap ends a line, and a lone point is a dot.
  drawLine(pen, {values, dash}) {
    const {start, step} = this.picture, isThere = (i) => Number.isFinite(values[i]);
    pen.lineWidth = this.height < 200 ? 1.25 : 1.75;
    pen.setLineDash(dash);
    pen.beginPath();
    values.forEach((value, i) => {
      if (!isThere(i)) return;
      const x = this.x(start + i * step), y = this.y(value);
      if (isThere(i - 1)) pen.lineTo(x, y);
      else if (isThere(i + 1)) pen.moveTo(x, y);
      else pen.fillRect(x - 2, y - 2, 4, 4);
    });
    pen.stroke();
  }

  drawBand(pen, {low, high}) {
    const {start, step} = this.picture, width = this.x(start + step) - this.x(start);
    pen.globalAlpha = 0.22;
    high.forEach((value, i) => {
      const y = this.y(value), height = this.y(low[i]) - y;
      if (Number.isFinite(height)) pen.fillRect(this.x(start + (i - 1) * step), y, width, height);
    });
    pen.globalAlpha = 1;
  }

  // Moves the cursor to a time; returns the values there in words. One chart alone has the tip.
  point(time, hasTip) {
    const {start, step, end} = this.picture, index = Math.round((time - start) / step);
    const isOut = this.cursor.hidden = time < start || time > end, at = start + index * step;
    this.tip.hidden = isOut || !hasTip;
    if (isOut) return "";
    this.cursor.style.transform = `translateX(${this.x(at)}px)`;
    const found = this.series.filter(({values}) => !Number.isNaN(values[index] ?? NaN));
    const texts = found.map(({values}) => format(values[index], this.unit));
    this.panel.setValue(this.series.length === 1 ? texts[0] ?? "–" : null);
    if (hasTip) this.showTip(at, found, texts);
    const pairs = found.map(({name}, i) => `${name} ${texts[i]}`).slice(0, MAX_DRAWN);
    return `${exactTime(at)}: ${pairs.join("; ") || "no value"}`;
  }

  showTip(time, found, texts) {
    const rows = found.slice(0, 8).map((one, i) => el("div", {}, sampleOf(one),
      el("span", {}, one.name), el("b", {}, texts[i])));
    if (found.length > 8) rows.push(`and ${found.length - 8} more`);
    this.tip.replaceChildren(exactTime(time), ...(found.length ? rows : [": no value"]));
    const x = this.x(time), left = x > this.width / 2 ? x - this.tip.offsetWidth - 10 : x + 10;
    this.tip.style.transform = `translateX(${Math.max(0, left)}px)`;
  }

  handleEvent(event) {
    if (this.picture) (this[event.type] ?? hideCursors).call(this, event);
  }

  pointermove({offsetX: x}) {
    const from = this.pressedAt;
    pointAll(this.timeAt(x), this);
    if (from === undefined || Math.abs(x - from) < 5) return;
    this.selection.hidden = false;
    this.selection.style.transform = `translateX(${Math.min(x, from)}px)`;
    this.selection.style.width = `${Math.abs(x - from)}px`;
    this.selected = [from, x].sort((a, b) => a - b).map((edge) => Math.round(this.timeAt(edge)));
  }

  pointerdown(event) {
    if (event.button) return;
    this.pressedAt = event.offsetX;
    this.root.setPointerCapture(event.pointerId);
  }

  pointerup() {
    const {selected} = this;
    this.pointercancel();
    if (selected?.[1] > selected?.[0]) go({range: selected.join("-")});
  }

  pointercancel() {
    this.selection.hidden = true;
    this.pressedAt = this.selected = undefined;
  }

  keydown(event) {
    const {start, step, end} = this.picture, stride = step * (event.shiftKey ? 10 : 1);
    const now = cursorTime ?? end, times = {
      ArrowLeft: now - stride, ArrowRight: now + stride, Home: start, End: end,
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "t") this.panel.toggleTable();
    if (!(event.key in times)) return;
    event.preventDefault();
    speak(pointAll(Math.min(end, Math.max(start, times[event.key])), this));
  }
}

// The least and the greatest finite value of some series, bands included.
function extremes(series) {
  let low = Infinity, high = -Infinity;
  for (const {values, low: lows = values, high: highs = values} of series) {
    for (const list of [values, lows, highs]) {
      for (const value of list) {
        if (!Number.isFinite(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
  }
  return [low, high];
}

const panels = () => [...document.querySelectorAll(".chart")].map((root) => root.panel);

// One cursor runs over all charts; returns what stands below it on one of them.
function pointAll(time, chosen) {
  cursorTime = time;
  for (const {chart, isInView} of panels()) {
    if (isInView && chart.picture && chart !== chosen) chart.point(time, false);
  }
  return chosen.point(time, true);
}

function hideCursors() {
  cursorTime = undefined;
  for (const {chart: {cursor, tip, panel}} of panels()) {
    cursor.hidden = tip.hidden = true;
    panel.setValue(null);
  }
}
"""


# ==================================================================================================
# 75. Dashboard: panels
# ==================================================================================================
#
# A panel is a chart with its title, its current value, a legend and a table. It asks while it is
# in view, cancels when it leaves, and keeps the old picture until it has a new one.

_PANEL_SCRIPT = r"""
const sight = new IntersectionObserver((entries) => {
  for (const {target: {panel}, isIntersecting} of entries) {
    panel.isInView = isIntersecting;
    if (isIntersecting) panel.refresh();
    else panel.cancel();
  }
}, {rootMargin: "200px"});

let panelCount = 0;

class Panel {
  constructor(spec, size = "", variables = new Map()) {
    Object.assign(this, {spec, variables, current: "", sorted: "", sign: 1, id: ++panelCount});
    this.chart = new Chart(this, size);
    this.value = el("b");
    this.meta = el("p", {className: "meta"});
    this.legend = el("div", {className: "scroll"});
    this.table = el("div", {className: "scroll", hidden: true, tabIndex: 0, role: "region",
      ariaLabel: `Values of ${spec.title}`});
    this.button = el("button", {onclick: () => this.toggleTable(), ariaExpanded: "false"},
      "Table");
    const tools = [this.legend, el("div", {className: "row"}, this.button,
      el("button", {onclick: () => this.download()}, "Download CSV"))];
    this.link = el("a", {}, spec.title);
    this.root = el(spec.isCard ? "li" : "section", {className: "card"},
      el("h2", {title: spec.title}, this.link), this.value, this.chart.root, this.meta,
      ...(spec.isCard ? [] : tools), this.table);
    this.chart.root.panel = this.root.panel = this;
    this.describe("not read yet");
    sight.observe(this.root);
  }

  describe(text) {
    this.chart.root.ariaLabel = `${this.spec.title}: ${text}`;
  }

  // The value under the cursor; null: the current one.
  setValue(text) {
    this.value.textContent = text ?? this.current;
  }

  cancel() {
    this.asked?.abort();
    this.asked = null;
  }

  // The old picture stays: dimmed while a slow query runs, and after one that failed.
  async refresh() {
    if (!this.isInView || this.asked) return;
    const asked = this.asked = new AbortController(), {classList} = this.chart.canvas;
    const dim = setTimeout(() => classList.add("slow"), 400);
    try {
      const {spec, variables} = this;
      this.picture = await inTurn(() => readPanel(spec, variables, asked.signal));
      this.show();
      classList.remove("slow");
      spec.onanswer?.(null);
    } catch (error) {
      if (!isExpected(error)) throw error;
      if (error instanceof Refusal) this.showRefusal(error);
    } finally {
      clearTimeout(dim);
      if (this.asked === asked) this.asked = null;
    }
  }

  showRefusal(error) {
    this.chart.canvas.classList.add("slow");
    if (this.spec.onanswer) return this.spec.onanswer(error);
    this.meta.classList.add("error");
    this.meta.textContent = error.message;
  }

  show() {
    const {picture: {series, last}, spec} = this, {unit, isCard} = spec;
    const chosen = series.filter(({name}) => state.only.includes(name));
    const candidates = chosen.length && !isCard ? chosen : series;
    this.series = state.all && !isCard ? candidates : candidates.slice(0, MAX_DRAWN);
    Object.assign(this.chart, {picture: this.picture, series: this.series, unit: unit ?? ""});
    this.chart.draw();
    const lasts = this.series.map(({values}) => values.findLast(Number.isFinite) ?? NaN);
    const range = extremes([{values: lasts}]).map((value) => format(value, unit));
    this.current = lasts.some(Number.isFinite) ? [...new Set(range)].join(" – ") : "–";
    this.setValue(null);
    this.describe(`last value ${this.series.slice(0, 5).map(({name}, i) => (
      `${name} ${format(lasts[i], unit)}`)).join("; ") || "none"}`);
    const count = `${spec.count ?? series.length} series`;
    const facts = [series.length ? count : "no values in this time"];
    if (last) facts.push(`pushed ${scaled(Math.max(1, Date.now() / 1000 - last), TIMES, 2)} ago`);
    this.meta.classList.remove("error");
    this.meta.textContent = facts.join(" · ");
    if (!isCard) this.showLegend();
    if (!this.table.hidden) this.showTable();
  }

  showLegend() {
    const {series} = this.picture, {unit, title} = this.spec, {sorted, sign} = this;
    const listed = (state.all ? series : series.slice(0, MAX_DRAWN)).map((one) => (
      {one, series: one.name, ...summaryOf(one)}));
    if (sorted) listed.sort((a, b) => a[sorted] < b[sorted] ? -sign : sign);
    const names = ["series", "last", "min", "max", "mean"];
    const heads = names.map((name) => el("th", {scope: "col",
      ariaSort: name !== sorted ? "none" : sign > 0 ? "ascending" : "descending"},
    el("button", {id: `panel ${this.id} by ${name}`, onclick: () => this.sortBy(name)}, name)));
    const rows = listed.map((row) => el("tr", {}, el("td", {}, this.choiceOf(row.one)),
      ...names.slice(1).map((name) => el("td", {}, format(row[name], unit)))));
    const hidden = series.length - listed.length;
    const more = hidden ? [`${hidden} more series are not drawn. `,
      el("button", {onclick: () => go({all: "1"})}, "Show all")] : [];
    if (series.length >= MAX_SERIES) more.push(` Only ${MAX_SERIES} series were read.`);
    replace(this.legend, tableOf(`Series of ${title}`, heads, rows), ...more);
  }

  // A click isolates a series; further clicks add others, or take them away.
  choiceOf({name, color, border}) {
    const isChosen = state.only.includes(name);
    const only = isChosen ? state.only.filter((other) => other !== name) : [...state.only, name];
    const choose = () => {
      adjust({only});
      for (const panel of panels()) if (panel.picture) panel.show();
    };
    return el("button", {id: `panel ${this.id}: ${name}`, ariaPressed: String(isChosen),
      onclick: choose}, sampleOf({color, border}), name);
  }

  sortBy(name) {
    this.sign = this.sorted === name ? -this.sign : 1;
    this.sorted = name;
    this.showLegend();
  }

  toggleTable() {
    this.table.hidden = !this.table.hidden;
    this.button.ariaExpanded = String(!this.table.hidden);
    if (!this.table.hidden) this.showTable();
    (this.table.hidden ? this.chart.root : this.table).focus();
  }

  // [time, value of each series], where there is one.
  rows() {
    const {start, step, end} = this.picture, rows = [];
    for (let i = 0; start + i * step <= end; i++) {
      const values = this.series.map((one) => one.values[i]);
      if (!values.every(Number.isNaN)) rows.push([start + i * step, ...values]);
    }
    return rows;
  }

  showTable() {
    if (!this.picture) return;
    const heads = ["time", ...this.series.map(({name}) => name)];
    const rows = this.rows().reverse().map(([time, ...values]) => el("tr", {},
      ...[exactTime(time), ...values.map((value) => format(value, this.spec.unit))]
        .map((text) => el("td", {}, text))));
    this.table.replaceChildren(tableOf(`Values of ${this.spec.title}`,
      heads.map((name) => el("th", {scope: "col"}, name)), rows));
  }

  download() {
    if (!this.picture) return;
    // A name that a spreadsheet would compute gets an apostrophe.
    const cell = (text) => `"${text.replaceAll('"', '""').replace(/^[=+@-]/, "'$&")}"`;
    const head = ["time", ...this.series.map(({name}) => cell(name))];
    const rows = this.rows().map(([time, ...values]) => [new Date(time * 1000).toISOString(),
      ...values.map((value) => Number.isNaN(value) ? "" : value)]);
    save(`${this.spec.title}.csv`, "text/csv", [head, ...rows].join("\r\n"));
  }
}

function summaryOf(series) {
  const known = series.values.filter(Number.isFinite), [min, max] = extremes([series]);
  if (!known.length) return {last: NaN, min: NaN, max: NaN, mean: NaN};
  return {last: known.at(-1), min, max, mean: known.reduce((a, b) => a + b) / known.length};
}

function save(name, type, text) {
  const href = URL.createObjectURL(new Blob([text], {type}));
  el("a", {href, download: name.replace(/[^\w.-]+/g, "_").slice(0, 80)}).click();
  URL.revokeObjectURL(href);
}

// ---- A field for a query, with completions ----

function queryField(text, index, run) {
  const id = `query-${index}`, list = `${id}-options`;
  const field = el("textarea", {id, value: text, rows: text.split("\n").length, spellcheck: false,
    ariaAutoComplete: "list", "aria-controls": list});
  const options = el("ul", {className: "options", id: list, hidden: true, role: "listbox",
    ariaLabel: "Completions"});
  let chosen = -1, found = [], word = "";
  function choose(number) {
    options.children[chosen]?.setAttribute("aria-selected", "false");
    options.children[chosen = number]?.setAttribute("aria-selected", "true");
    options.children[number]?.scrollIntoView({block: "nearest"});
    field.setAttribute("aria-activedescendant", number < 0 ? "" : `${list}-${number}`);
  }
  function close() {
    choose(-1);
    options.hidden = true;
  }
  function take(number) {
    const at = field.selectionStart;
    field.setRangeText(found[number], at - word.length, at, "end");
    close();
  }
  async function complete() {
    const before = field.value.slice(0, field.selectionStart);
    const all = await completions(before);
    if (field.value.slice(0, field.selectionStart) !== before) return;
    word = all.word;
    found = all.names.filter((name) => name !== word && name.includes(word))
      .sort((a, b) => b.startsWith(word) - a.startsWith(word)).slice(0, 50);
    options.replaceChildren(...found.map((name, number) => el("li", {id: `${list}-${number}`,
      role: "option", ariaSelected: "false", onpointerdown: (event) => {
        event.preventDefault();
        take(number);
      }}, name)));
    choose(-1);
    options.hidden = !found.length || !word && !all.isOpen;
    if (!options.hidden) speak(`${found.length} completions`);
  }
  field.addEventListener("input", complete);
  field.addEventListener("blur", close);
  field.addEventListener("keydown", (event) => {
    const {key} = event, move = {ArrowDown: 1, ArrowUp: -1}[key];
    if (move && !options.hidden) choose((chosen + move + found.length) % found.length);
    else if ((key === "Enter" || key === "Tab") && chosen >= 0) take(chosen);
    else if (key === "Enter" && !event.shiftKey) run();
    else if (key === "Escape" && !options.hidden) close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return Object.assign(field, {options});
}

// What may stand at the end of a text: a value behind `tag="`, a tag in braces, else a name.
async function completions(before) {
  const value = /([A-Za-z_]\w*)\s*(?:=~?|!=|!~)\s*"([^"]*)$/.exec(before);
  const [word] = /[A-Za-z_:][\w:]*$/.exec(before) ?? [""];
  const [isIn, name] = /([A-Za-z_:][\w:]*)?\{[^{}]*$/.exec(before) ?? [];
  const match = name ? {"match[]": selectorOf(name)} : {};
  try {
    if (value) {
      const names = await ask(`v1/label/${value[1]}/values`, match);
      return {word: value[2], names: names.map((name) => quoted(name).slice(1, -1)), isOpen: true};
    }
    if (isIn || /\b(by|without|on|ignoring)\s*\([^()]*$/.test(before)) {
      return {word, names: (await ask("v1/labels", match)).map(tagName), isOpen: true};
    }
  } catch (error) {
    if (!isExpected(error)) throw error;
  }
  return {word, names: [...catalogue.keys()].map(selectorOf).concat(WORDS)};
}
"""


# ==================================================================================================
# 76. Dashboard: views
# ==================================================================================================
#
# A view is a function that makes its elements once and tells how they are brought up to date:
# all metrics, one metric, queries, saved dashboards, alerts. One loop asks for what is common to
# all of them, the catalogue and the alerts, then updates the view and its panels.

_VIEWS_SCRIPT = r"""
// ---- Metrics ----

const MAX_CARDS = 100; // at first; it keeps a page of 10,000 metrics small
const EXAMPLE = `curl ${new URL("metrics", location.href)} -H 'Content-Type: application/json' \\
  -d '{"metrics":[{"name":"cpu_usage","value":75.5,"tags":{"host":"web1"}}]}'`;
const isOwn = (name) => /^(metricstream_|prometheus_rule_|ALERTS(_FOR_STATE)?$)/.test(name);

function titleRow(title, ...tools) {
  const space = el("span", {className: "space"});
  return el("div", {className: "row"}, el("h1", {}, title), space, ...tools);
}

const saveButton = () => el("button", {onclick: saveDashboard}, "Save as dashboard");

// What is shown, as a file for --dashboards.
function saveDashboard() {
  const title = document.querySelector("h1").textContent, {variables = []} = shown;
  const specs = panels().map(({spec: {title, query, unit, legend, width}}) => (
    {title, query, unit, legend, width}));
  const text = JSON.stringify({title, variables, panels: specs}, null, 2);
  save(`${title}.json`, "application/json", text);
}

// All metrics, without a query.
function metricsView() {
  const cards = new Map(), lists = [0, 1].map(() => el("ul", {className: "cards"}));
  const found = el("span", {className: "meta", role: "status"});
  const own = el("h2", {}, "This server");
  const search = el("input", {type: "search", value: state.search, oninput: () => {
    adjust({search: search.value});
    update();
  }});
  const empty = el("section", {}, el("h2", {}, "No metrics yet"),
    el("p", {}, "Send the first one, and it appears here by itself:"),
    el("pre", {className: "example", tabIndex: 0}, EXAMPLE));
  let limit = MAX_CARDS;
  const more = el("button", {onclick: () => {
    limit += MAX_CARDS;
    update();
  }}, "Show more");
  function cardOf(name) {
    const metric = catalogue.get(name);
    const card = cards.get(name) ?? new Panel({...panelOf(metric), isCard: true});
    cards.set(name, card);
    card.spec.count = metric.count;
    card.link.href = linkTo("metric", {name});
    return card.root;
  }
  function update() {
    if (search.value !== state.search) search.value = state.search;
    const words = state.search.toLowerCase().split(/\s+/), names = [...catalogue.keys()];
    const matching = names.filter((name) => (
      words.every((word) => name.toLowerCase().includes(word))));
    const groups = [matching.filter((name) => !isOwn(name)), matching.filter(isOwn)];
    groups.forEach((group, i) => arrange(lists[i], group.slice(0, limit).map(cardOf)));
    found.textContent = `${matching.length} of ${names.length} metrics`;
    more.hidden = groups.every(({length}) => length <= limit);
    own.hidden = !groups[1].length;
    empty.hidden = !names.every(isOwn);
  }
  update();
  const tools = [el("label", {}, "Search ", search), found, saveButton()];
  const nodes = [titleRow("Metrics", ...tools), empty, lists[0], own, lists[1], more];
  return {nodes, update};
}

// Makes elements the children of another. Those in their place are not touched: focus stays.
function arrange(parent, wanted) {
  const kept = new Set(wanted);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  wanted.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
  });
}

// One metric, large, by the tags that are chosen.
function metricView() {
  const {name, by} = state, metric = catalogue.get(name) ?? {name};
  const panel = new Panel(panelOf(metric, by), "large");
  const tags = el("div", {className: "row", role: "group", ariaLabel: "Group by"});
  const query = el("a", {href: ""}, "Open as a query");
  let known;
  async function update(signal) {
    query.href = linkTo("query", {q: panel.spec.query}); // with the time of now
    const names = await ask("v1/labels", {"match[]": selectorOf(name)}, signal);
    if (String(names) === known) return;
    known = String(names);
    const buttons = names.filter((tag) => tag !== "__name__").map((tag) => {
      const isChosen = by.includes(tag);
      const chosen = isChosen ? by.filter((other) => other !== tag) : [...by, tag];
      return el("button", {id: `by ${tag}`, ariaPressed: String(isChosen),
        onclick: () => go({by: chosen, only: []})}, tag);
    });
    replace(tags, ...(buttons.length ? ["Group by", ...buttons] : []));
  }
  return {nodes: [titleRow(name, query, saveButton()), tags, panel.root], update};
}

// ---- Query ----

let result = null; // its picture stays until the next query is answered

// Queries that share a graph.
function queryView() {
  const q = state.q.filter((text) => text.trim()), texts = state.q.length ? state.q : [""];
  const read = () => fields.map(({value}) => value);
  const run = () => go({q: read(), only: []});
  const fields = texts.map((text, index) => queryField(text, index, run));
  const refusal = el("pre", {className: "error", role: "alert", hidden: true});
  const onanswer = (error) => {
    refusal.hidden = !error;
    refusal.textContent = error ? placeOf(error) : "";
    result.root.style.visibility = result.picture ? "" : "hidden";
  };
  result ??= new Panel({title: "Result"}, "large");
  Object.assign(result.spec, {query: q, onanswer});
  result.root.hidden = !q.length;
  const rows = fields.map((field, index) => {
    const label = el("label", {htmlFor: field.id}, index ? `Query ${index + 1}` : "Query");
    return el("div", {className: "query"}, label, field, field.options);
  });
  const tools = el("div", {className: "row"}, el("button", {onclick: run}, "Run"),
    el("button", {onclick: () => go({q: [...read(), ""]})}, "Add a query"),
    el("span", {className: "meta"}, "Enter runs, Shift+Enter begins a line"));
  return {nodes: [titleRow("Query", saveButton()), ...rows, tools, refusal, result.root]};
}

// An error, the line of the query where it is, and a mark at its column.
function placeOf({message, query}) {
  const [, line, column] = /^(\d+):(\d+):/.exec(message) ?? [];
  const text = query?.split("\n")[line - 1];
  return text === undefined ? message : `${message}\n\n${text}\n${" ".repeat(column - 1)}^`;
}

// ---- Dashboards: the files of --dashboards ----

function dashboardsView() {
  const list = el("ul"), faults = el("ul"), none = el("p", {hidden: true}, "None yet. Start the "
    + "server with --dashboards DIR, and put there what “Save as dashboard” gives.");
  async function update(signal) {
    const {dashboards, faults: found} = await ask("dashboards", null, signal);
    none.hidden = dashboards.length;
    replace(list, ...dashboards.map(({file, title}) => el("li", {},
      el("a", {id: file, href: linkTo("dashboard", {name: file})}, title),
      el("div", {className: "meta"}, file))));
    faults.replaceChildren(...found.map(({file, error}) => (
      el("li", {className: "error"}, `${file}: ${error}`))));
  }
  return {nodes: [titleRow("Dashboards"), none, list, faults], update};
}

function dashboardView() {
  const title = titleRow(state.name, saveButton()), body = el("div", {className: "panels"});
  const choices = el("div", {className: "row"}), variables = new Map();
  const view = {nodes: [title, choices, body], update};
  async function update(signal) {
    const {dashboards} = await ask("dashboards", null, signal);
    const dashboard = dashboards.find(({file}) => file === state.name);
    if (!dashboard) return body.replaceChildren("There is no such dashboard.");
    view.variables = dashboard.variables;
    const found = await Promise.all(view.variables.map((one) => variableChoice(one, signal)));
    for (const {name, value} of found) variables.set(name, quoted(value).slice(1, -1));
    const labels = found.map((choice) => el("label", {}, `${choice.name} `, choice));
    const isKnown = choices.textContent === labels.map((label) => label.textContent).join("");
    if (!isKnown) replace(choices, ...labels);
    if (body.childElementCount) return;
    title.firstChild.textContent = dashboard.title;
    for (const spec of dashboard.panels) {
      const panel = new Panel(spec, "medium", variables);
      panel.root.style.gridColumn = `span ${spec.width}`;
      body.append(panel.root);
    }
  }
  return view;
}

// A select of the values of a tag, whose own value is the one that is chosen.
async function variableChoice({name, tag, metric}, signal) {
  const match = metric ? {"match[]": selectorOf(metric)} : {};
  const values = await ask(`v1/label/${encodeURIComponent(tag)}/values`, match, signal);
  const value = state.variables.get(name) ?? values[0] ?? "";
  const texts = values.includes(value) ? values : [value, ...values];
  const choice = selectOf(`variable-${name}`, texts.map((text) => [text, text]), value, () => {
    go({variables: new Map(state.variables).set(name, choice.value)});
  });
  return Object.assign(choice, {name});
}

// ---- Alerts: what fires and what pends; silences, as Alertmanager's API has them ----

const SILENCES = {1: "1 hour", 2: "2 hours", 8: "8 hours", 24: "1 day"};

function isMatched({name, value, isRegex, isEqual = true}, labels) {
  const label = labels[name] ?? "";
  if (!isRegex) return isEqual === (label === value);
  try {
    return isEqual === new RegExp(`^(?:${value})$`, "s").test(label);
  } catch {
    return false; // RE2's syntax has flags that a browser's has not
  }
}

function alertsView() {
  const list = el("ul"), none = el("p", {}, "Nothing fires, and nothing pends.");
  const hours = selectOf("hours", Object.entries(SILENCES), "2");
  const choice = el("label", {}, "Silence for ", hours);
  let silences = []; // null: a real Alertmanager has them
  async function update(signal) {
    try {
      silences &&= await ask("v2/silences", null, signal);
    } catch (error) {
      if (error.status !== 404) throw error;
      silences = null;
    }
    const alerts = activeAlerts();
    none.hidden = alerts.length;
    choice.hidden = !silences || !alerts.length;
    replace(list, ...alerts.map((alert, index) => alertItem(alert, index, silences, hours)));
  }
  return {nodes: [titleRow("Alerts", choice), none, list], update};
}

function alertItem({labels, annotations, state: condition, activeAt}, index, silences, hours) {
  const {alertname, ...rest} = labels, date = (text) => exactTime(Date.parse(text) / 1000);
  const tags = Object.entries(rest).map((pair) => pair.join("=")).join(", ");
  const silence = silences?.find(({matchers, status}) => status.state === "active"
    && matchers.every((matcher) => isMatched(matcher, labels)));
  const [text, write] = silence
    ? ["End the silence", () => writeSilence("DELETE", `silence/${silence.id}`)]
    : ["Silence", () => writeSilence("POST", "silences", silenceOf(labels, hours.value))];
  return el("li", {className: "card row"}, el("div", {}, el("h2", {}, alertname),
    el("span", {className: condition}, condition), ` since ${date(activeAt)}`,
    silence ? `, silenced until ${date(silence.endsAt)}` : "",
    ...Object.values(annotations).map((annotation) => el("div", {}, annotation)),
    el("div", {className: "meta"}, tags)),
  silences ? el("button", {id: `silence ${index}`, className: "space", onclick: write}, text) : "");
}

function silenceOf(labels, hours) {
  const now = Date.now(), matchers = Object.entries(labels).map(([name, value]) => (
    {name, value, isRegex: false, isEqual: true}));
  return {matchers, startsAt: new Date(now), endsAt: new Date(now + hours * 3600e3),
    createdBy: "dashboard", comment: "from the dashboard"};
}

// A key, where one is needed, is kept by this tab alone.
async function writeSilence(method, path, silence) {
  const headers = {"Content-Type": "application/json"}, key = sessionStorage.getItem("key");
  const body = silence && JSON.stringify(silence);
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    await request("v2/" + path, {method, headers, body});
  } catch (error) {
    if (error.status !== 401) return alert(error.message);
    const given = prompt("The key of a listed client, kept in this tab alone:") ?? "";
    sessionStorage.setItem("key", given);
    return given && writeSilence(method, path, silence);
  }
  render();
}

// ---- The loop ----

const VIEWS = {
  metrics: metricsView, metric: metricView, query: queryView, dashboards: dashboardsView,
  dashboard: dashboardView, alerts: alertsView,
};
const NAMES = {metrics: "Metrics", query: "Query", dashboards: "Dashboards", alerts: "Alerts"};
const PARENTS = {metric: "metrics", dashboard: "dashboards"};
let shown = null; // the view
let updating = null;
let refreshedAt = 0;

function showTime() {
  const isCustom = !(state.range in RANGES), now = timeRange().map(Math.round);
  const ranges = Object.entries({...RANGES, custom: "Custom"});
  const range = selectOf("range", ranges, isCustom ? "custom" : state.range,
    () => go({range: range.value === "custom" ? now.join("-") : range.value}));
  const pace = selectOf("refresh", Object.entries(REFRESHES), state.refresh, () => {
    adjust({refresh: pace.value});
    refresh();
  });
  const [from, to] = now.map((time) => el("input", {type: "datetime-local", step: 1,
    value: new Date((time - zoneAt(time)) * 1000).toISOString().slice(0, 19)}));
  const form = document.getElementById("time");
  form.onsubmit = (event) => {
    event.preventDefault();
    go({range: [from, to].map(({value}) => Date.parse(value) / 1000).join("-")});
  };
  const label = (text, field) => el("label", {}, `${text} `, field);
  const custom = isCustom ? [label("From", from), label("To", to), el("button", {}, "Show")] : [];
  replace(form, ...custom, label("Time", range), label("Refresh", pace));
}

function showViews() {
  const current = PARENTS[state.view] ?? state.view;
  const links = Object.entries(NAMES).map(([view, name]) => el("a", {id: `to ${view}`,
    href: linkTo(view), ariaCurrent: view === current ? "page" : null}, name));
  replace(document.getElementById("views"), ...links);
  showTitle();
}

function showTitle() {
  const firing = activeAlerts().filter((alert) => alert.state === "firing").length;
  const title = `${state.name || NAMES[state.view]} · MetricStream`;
  document.title = firing ? `(${firing}) ${title}` : title;
}

const keyOfView = () => hashOf({range: "", refresh: "", search: "", only: []});

// Shows the view of the URL. Where only the time has changed, the pictures stay and ask anew.
function render() {
  state = readState();
  if (!Object.hasOwn(VIEWS, state.view)) state.view = "metrics";
  updating?.abort();
  updating = null;
  for (const panel of panels()) panel.cancel();
  showTime();
  showViews();
  build();
  refresh();
}

// Waits for the catalogue: the types of the metrics decide how they are drawn.
function build() {
  if (!catalogue || shown?.key === keyOfView()) return;
  shown = Object.assign(VIEWS[state.view](), {key: keyOfView()});
  replace(document.getElementById("main"), ...shown.nodes);
}

async function refresh() {
  if (document.hidden || updating) return;
  const {signal} = updating = new AbortController();
  refreshedAt = Date.now();
  try {
    alertsRead = readAlerts(signal).then(showTitle);
    await Promise.all([alertsRead, readCatalogue(signal).then(build)]);
    for (const panel of panels()) panel.refresh();
    await shown.update?.(signal);
  } catch (error) {
    if (!isExpected(error)) throw error;
    if (error.status) setNotice(error.message);
  } finally {
    if (!signal.aborted) updating = null;
  }
}

setInterval(() => {
  const pause = document.getElementById("notice").hidden ? Number(state.refresh) : 2;
  if (pause && Date.now() - refreshedAt > pause * 1000) refresh();
}, 500);
addEventListener("popstate", render);
document.addEventListener("visibilitychange", refresh);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && history.state?.isOfTime) history.back();
});
for (const query of ["(prefers-color-scheme: dark)", "print"]) {
  matchMedia(query).addEventListener("change", () => {
    for (const {chart} of panels()) chart.draw();
  });
}
render();

//# sourceURL=dashboard.js
"""


# ==================================================================================================
# 77. Dashboard: page
# ==================================================================================================
#
# The document that holds the script, and how it is served. Names and tags are the text of
# strangers. The page makes elements and sets their text; it never makes markup of text, and its
# Content-Security-Policy forbids the browser to do so: it runs this script alone, takes this style
# alone, and talks to this server alone.

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MetricStream</title>
<link rel="icon" href="%ICON%">
<style>%STYLE%</style>
</head>
<body>
<header>
  <a class="brand" href="#"><img src="%ICON%" alt="" width="22" height="22">MetricStream</a>
  <nav aria-label="Views" id="views"></nav>
  <form class="row space" id="time"></form>
</header>
<p class="notice" id="notice" role="alert" hidden></p>
<main id="main"><noscript>The page is drawn by a script.</noscript></main>
<div class="spoken" id="spoken" role="status"></div>
<script>%SCRIPT%</script>
</body>
</html>
"""

STYLE = r"""
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --line: #d9dde3; --grid: #e8ebef; --field: #7b8494;
  --text: #1b2230; --muted: #596273; --accent: #1d5fc4; --bad: #b42318; --warn: #8a5300;
  --shade: #d92d2026;
  --series-0: #1f6fd0; --series-1: #c2410c; --series-2: #15803d; --series-3: #9333ea;
  --series-4: #a16207; --series-5: #be185d; --series-6: #0e7490; --series-7: #4b5563;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #12151a; --card: #1a1e25; --line: #323843; --grid: #262b34; --field: #7f8999;
    --text: #e7eaf0; --muted: #a0a9b8; --accent: #8ab4f8; --bad: #ff9a8f; --warn: #f5c26b;
    --shade: #ff6b5e2e;
    --series-0: #6ea8fe; --series-1: #fb923c; --series-2: #4ade80; --series-3: #c99bff;
    --series-4: #facc15; --series-5: #f583bd; --series-6: #22d3ee; --series-7: #cbd5e1;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
body {
  margin: 0; background: var(--page); color: var(--text); overflow-y: scroll;
  font: 15px/1.5 system-ui, sans-serif;
}
header, main { max-width: 1280px; margin: 0 auto; padding: .75rem 1.25rem; }
main { min-height: 80vh; padding-bottom: 4rem; }
header, .row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; }
.row { margin: 0 0 .75rem; }
.space { margin: 0 0 0 auto; }
h1, h2 { font-weight: 600; margin: 0; min-width: 0; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1rem; }
main > h2 { margin: 2rem 0 .75rem; }
.cards h2, .meta, .tip span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
ul { list-style: none; margin: 0; padding: 0; }
a { text-decoration: none; }
a[href] { color: var(--accent); }
a[href]:hover { text-decoration: underline; }
a.brand { font-weight: 650; color: var(--text); display: flex; gap: .5rem; align-items: center; }
nav a[href] { padding: .25rem .6rem; border-radius: 6px; color: var(--muted); }
nav a[aria-current] { background: var(--card); color: var(--text); font-weight: 600; }
label, .meta { color: var(--muted); font-size: .85rem; }
button, select, input, textarea {
  font: inherit; font-size: .9rem; color: var(--text); background: var(--card);
  border: 1px solid var(--field); border-radius: 6px; padding: .25rem .6rem; max-width: 100%;
}
button { cursor: pointer; }
button:hover { border-color: var(--accent); }
textarea { width: 100%; resize: vertical; display: block; }
textarea, pre { font: .85rem/1.5 ui-monospace, monospace; padding: .5rem .75rem; }
pre { background: var(--card); border-radius: 8px; white-space: pre-wrap; }
.example { user-select: all; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(12, minmax(0, 1fr)); }
.card, .tip, .options {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0;
}
.card { padding: .75rem .9rem; }
.meta { margin: .25rem 0; min-height: 1.5em; }
.error { color: var(--bad); white-space: pre-wrap; overflow-wrap: anywhere; }
.notice { background: var(--bad); color: var(--card); margin: 0; padding: .5rem 1.25rem; }
.chart { position: relative; height: 150px; margin-top: .4rem; touch-action: pan-y; }
.medium { height: 220px; }
.large { height: 340px; }
.chart > * { position: absolute; left: 0; pointer-events: none; }
canvas { width: 100%; height: 100%; }
.slow { opacity: .45; }
.cursor, .selection { top: 8px; bottom: 22px; background: var(--accent); opacity: .2; }
.cursor { width: 1px; background: var(--muted); opacity: 1; }
.tip { top: 4px; max-width: 75%; padding: .3rem .5rem; font-size: .8rem; }
.tip div, td button { display: flex; gap: .5rem; align-items: center; }
.tip b { margin-left: auto; white-space: nowrap; }
i { flex: none; width: 24px; border-top: 3px solid; }
.scroll { overflow: auto; max-height: 26rem; margin-bottom: .75rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: right; padding: .2rem .6rem; white-space: nowrap; }
td, b { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
tr { border-bottom: 1px solid var(--grid); }
table button { border-color: transparent; background: none; padding: .1rem .3rem; }
th button { font-weight: 600; padding: 0; }
[aria-pressed=true], [aria-selected=true] { background: var(--accent); color: var(--card); }
.query { position: relative; margin-bottom: .75rem; }
.options { position: absolute; z-index: 3; width: 100%; max-height: 16rem; overflow: auto; }
.options li { padding: .2rem .75rem; cursor: pointer; overflow-wrap: anywhere; }
.firing, .pending { color: var(--warn); font-weight: 600; }
.firing { color: var(--bad); }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 700px) {
  .panels > * { grid-column: 1 / -1 !important; }
  header, main { padding: .5rem .75rem; }
  .space { margin: 0; }
}
@media (prefers-reduced-motion: no-preference) { canvas { transition: opacity .2s; } }
@media print {
  nav, form, .notice, [role=group] { display: none !important; }
  .row:not(.card) > :not(h1, label:has([id^=variable])), .card > button { display: none; }
  .card { break-inside: avoid; }
}
"""

SCRIPT = _QUERY_SCRIPT + _CHART_SCRIPT + _PANEL_SCRIPT + _VIEWS_SCRIPT

ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>"
    "<path d='M1 11 5 5l4 6 6-9' fill='none' stroke='#1f6fd0' stroke-width='2'/></svg>"
)
_QUERY_WORDS = {
    *SIGNATURES, *_AGGREGATIONS, *_SET_OPERATORS, *_NEVER_METRICS, *_NEVER_LABELS, "by", "offset",
}  # fmt: skip


def dashboard_page() -> str:
    """The page: one document, style and script within it."""
    script = SCRIPT.replace("%WORDS%", write_json(sorted(_QUERY_WORDS)))
    # Lines of comments are for the readers of this file: 1.5 KB of 20, zipped.
    script = re.sub(r"(?m)^ *// .*\n", "", script)
    page = PAGE.replace("%ICON%", f"data:image/svg+xml,{urllib.parse.quote(ICON)}")
    return page.replace("%STYLE%", STYLE).replace("%SCRIPT%", script)


def content_security_policy(page: str) -> str:
    """What a browser may do with a page: run the script within it, take the style within it, talk
    to this server. Source: Content Security Policy Level 3.
    """

    def hash_of(tag: str) -> str:
        inline = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = hashlib.sha256(inline.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


@functools.cache
def _page_responses(zipped: bool) -> tuple[str, Response, Response]:
    """The ETag of the page, the page, and the answer to a browser that has it."""
    page = dashboard_page()
    body = gzip.compress(page.encode(), mtime=0) if zipped else page.encode()
    etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    fields = [
        ("ETag", etag),
        ("Cache-Control", "no-cache"),
        ("Vary", "Accept-Encoding"),
        ("Content-Security-Policy", content_security_policy(page)),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        *([("Content-Encoding", "gzip")] if zipped else []),
    ]
    whole = Response(200, body, "text/html; charset=utf-8", fields)
    return etag, whole, Response(304, body, "text/html; charset=utf-8", fields)


def show_page(request: Request, client: str) -> Answer:
    """`GET /`: the page, or 304 where the browser has it (RFC 9110, 13.1.2)."""
    headers = request.head.headers
    etag, whole, known = _page_responses(accepts_gzip(headers))
    return Answer(known if etag in headers.get("if-none-match", "") else whole)


def show_icon(request: Request, client: str) -> Answer:
    """`GET /favicon.ico`, for those who ask for it whatever the page says."""
    return Answer(Response(200, ICON.encode(), "image/svg+xml"))


def show_graph(request: Request, client: str) -> Answer:
    """`GET /graph?g0.expr=…`, the link in a notification: to the query on the page."""
    try:
        asked = urllib.parse.parse_qs(request.head.query, max_num_fields=100).get("g0.expr", [])
    except ValueError:
        raise HTTPError(400, "too many parameters") from None
    place = "#view=query" + "".join(f"&q={urllib.parse.quote(text, safe='')}" for text in asked)
    return Answer(Response(302, b"", fields=[("Location", f"./{place}")]))


def dashboard_routes(folder: str | None) -> dict[str, dict[str, Handler]]:
    """The routes of the page, and of the dashboards in a folder, if there is one."""

    def show_dashboards(request: Request, client: str) -> Answer:
        """`GET /api/dashboards`"""
        try:
            saved = read_dashboards(folder) if folder else {"dashboards": [], "faults": []}
        except OSError as error:
            raise unavailable(f"can't read the dashboards: {error.strerror}") from None
        return Answer(json_response(200, saved))

    return {
        "/": {"GET": show_page},
        "/favicon.ico": {"GET": show_icon},
        "/graph": {"GET": show_graph},
        "/api/dashboards": {"GET": show_dashboards},
    }


# ==================================================================================================
# PART V. SCALING OUT
# ==================================================================================================


# ==================================================================================================
# 78. Remote write
# ==================================================================================================
#
# The problem: who outgrows one machine has an engine for many, and it wants samples in a protocol
# of its own. The idea: all such engines speak Prometheus's remote write, a protobuf message in a
# snappy block, over HTTP. Both formats are small when they are only written. A general compressor
# looks for repetitions at every few bytes; this encoder knows what repeats, for it has put it
# there: the name and the labels of a series become copies of their last occurrence, all else stands
# as it is. What it costs: 20 bytes a sample where a series has several in a request, 36 where it
# has one; a search for all repetitions makes 8 and, in Python, takes 12 µs a sample instead of 3.
#
# Sources: Prometheus Remote-Write 1.0; the encoding of protocol buffers; snappy's
# format_description.txt.

MAX_CACHED_TEXTS = 65_536  # of names, and of sets of labels
RECEIVER_TIMEOUT_S = 30.0  # for each step of a request
MAX_RETRY_AFTER_S = 600.0
# These tell of a wrong set-up, which somebody mends; no sample is at fault.
_SET_UP_FAULTS = (401, 403, 404, 405, 407)
# Prometheus before 2.49 answers them with 500, for ever.
_BLAMES_SAMPLE = re.compile("too old sample|invalid sample")

# ---- protocol buffers

_VARINT, _FIXED_64, _BYTES = 0, 1, 2  # wire types
_METRIC_TYPES = {"counter": 1, "gauge": 2, "histogram": 3, "summary": 5}  # of MetricMetadata


def varint(number: int) -> bytes:
    """A number in groups of seven bits, the lowest first; the last one has its top bit clear.

    >>> varint(300).hex()
    'ac02'
    """
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def field_key(number: int, wire_type: int) -> bytes:
    """What stands before the value of a field."""
    return varint(number << 3 | wire_type)


def bytes_field(number: int, content: bytes) -> bytes:
    """A field that holds bytes: a text, or a message.

    >>> bytes_field(1, b"cpu")
    b'\\n\\x03cpu'
    """
    return field_key(number, _BYTES) + varint(len(content)) + content


def label_field(name: str, value: str) -> bytes:
    """Field 1 of a TimeSeries: a Label, with its name in field 1 and its value in field 2."""
    return bytes_field(1, bytes_field(1, name.encode()) + bytes_field(2, value.encode()))


@functools.lru_cache(maxsize=1024)
def _around_value(time_text: bytes) -> tuple[bytes, bytes] | None:
    """What stands before and behind the value of a sample of this time; None: there is no such.

    A Sample is field 2 of a TimeSeries, with its value in field 1 and its time in field 2.
    """
    time_ms = _line_time_ms(time_text)
    if time_ms is None:
        return None
    behind = field_key(2, _VARINT) + varint(time_ms)
    key = field_key(1, _FIXED_64)
    return field_key(2, _BYTES) + varint(len(key) + 8 + len(behind)) + key, behind


# ---- snappy

FARTHEST_COPY = 65_535  # a copy says in two bytes how far back it looks


def literal_tag(length: int) -> bytes:
    """What comes before so many bytes that stand for themselves.

    >>> literal_tag(1).hex(), literal_tag(61).hex(), literal_tag(70_000).hex()
    ('00', 'f03c', 'fc6f110100')
    """
    rest = length - 1
    if rest < 60:
        return bytes((rest << 2,))
    size = 1 if rest < 256 else 2 if rest < 65_536 else 4
    return bytes((59 + size << 2,)) + rest.to_bytes(size, "little")


@functools.lru_cache(maxsize=4096)
def _copy_tags(length: int) -> tuple[bytes, ...]:
    sizes = [64] * (length // 64) + [length % 64] * (length % 64 > 0)
    return (*(bytes((size - 1 << 2 | 2,)) for size in sizes), b"")


class SnappyBlock:
    """Writes a snappy block, piece by piece. `add_again` adds what may have been added before.

    >>> block = SnappyBlock()
    >>> block.add_again(b"host=web1")
    >>> block.add(b";")
    >>> block.add_again(b"host=web1")
    >>> block.finish()
    b'\\x13$host=web1;"\\n\\x00'
    """

    def __init__(self) -> None:
        self.length = 0  # of what it stands for
        self._out: list[bytes] = []
        self._literal: list[bytes] = []
        self._added_at: dict[bytes, int] = {}  # where each was added last

    def add(self, piece: bytes) -> None:
        """Add bytes as they are."""
        self._literal.append(piece)
        self.length += len(piece)

    def add_again(self, piece: bytes) -> None:
        """Add bytes; if they were added this way before, and not too far back, as a copy."""
        before = self._added_at.get(piece)
        self._added_at[piece] = self.length
        if before is None or self.length - before > FARTHEST_COPY:
            self.add(piece)
        elif piece:
            self._end_literal()
            back = (self.length - before).to_bytes(2, "little")
            self._out.append(back.join(_copy_tags(len(piece))))
            self.length += len(piece)

    def _end_literal(self) -> None:
        if self._literal:
            literal = b"".join(self._literal)
            self._out += (literal_tag(len(literal)), literal)
            self._literal.clear()

    def finish(self) -> bytes:
        """The block."""
        self._end_literal()
        return varint(self.length) + b"".join(self._out)


# ---- requests

_LineOfLog = tuple[bytes, bytes, bytes, bytes]  # time, name, value, type and tags; as in the log
_STALE_VALUE = struct.pack("<Q", STALE_BITS)
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9_:]")


def underscored(name: str) -> str:
    """A name in the alphabet that Prometheus had before version 3.

    >>> underscored("cpu.usage"), underscored("95th")
    ('cpu_usage', '_95th')
    """
    name = _NOT_IN_NAME.sub("_", name)
    return f"_{name}" if name[0].isdigit() else name


class WriteRequestEncoder:
    """Makes lines of the log the body of a request.

    `external_labels` go with every series that has none of the same name. `names` is "underscore"
    or "utf8": whether names are put into the old alphabet or sent as they are.
    """

    def __init__(self, external_labels: dict[str, str], names: str = "underscore"):
        self._external, self._utf8 = external_labels, names == "utf8"
        self._name = functools.lru_cache(MAX_CACHED_TEXTS)(self._encode_name)
        self._labels = functools.lru_cache(MAX_CACHED_TEXTS)(self._encode_labels)
        self._originals: dict[str, str] = {}  # by their underscored names
        self._types: dict[bytes, bytes] = {}  # names since the last metadata; type and tags

    def _sent_name(self, text: bytes) -> str:
        name: str = parse_json(b'"' + text + b'"')
        if self._utf8:
            return name
        sent = underscored(name)
        if len(self._originals) >= MAX_CACHED_TEXTS:
            self._originals.clear()
        if self._originals.setdefault(sent, name) != name:
            logger.warning(
                "remote write sends two metrics as %s: %s and %s",
                *map(write_json_string, (sent, self._originals[sent], name)),
            )
        return sent

    def _encode_name(self, text: bytes) -> bytes:
        return label_field(NAME, self._sent_name(text))

    def _encode_labels(self, rest: bytes) -> tuple[bytes, bytes]:
        """The labels that stand before the name, and those behind it, of a line's type and tags."""
        tags = parse_json(b'{"":0' + rest).get("tags", {})
        own: dict[str, str] = {}
        for tag, value in sorted(tags.items()):
            sent = tag if self._utf8 else underscored(tag).replace(":", "_")
            if not value or sent == NAME:  # no tag; and none can hide the name
                continue
            if own.setdefault(sent, value) != value:
                logger.warning("remote write sends only one tag of a series as %s", sent)
        labels = sorted((self._external | own).items())
        before = b"".join(label_field(*label) for label in labels if label[0] < NAME)
        return before, b"".join(label_field(*label) for label in labels if label[0] > NAME)

    def _by_series(
        self, lines: Iterable[_LineOfLog]
    ) -> dict[tuple[bytes, bytes], dict[bytes, list[bytes]]]:
        """The encoded samples by labels and name, those of a series in the order of time."""
        by_labels: dict[tuple[bytes, bytes], dict[bytes, list[bytes]]] = {}
        last_time = last_rest = b""  # lines of a batch have one time, and mostly the same labels
        pack = struct.Struct("<d").pack
        # What goes back in time within a request, Prometheus leaves out and says nothing.
        for time_text, name_text, value, rest in sorted(lines, key=operator.itemgetter(0)):
            if time_text != last_time:
                around, last_time = _around_value(time_text), time_text
            if around is None:
                continue
            before, behind = around
            if rest != last_rest:
                by_name, last_rest = by_labels.setdefault(self._labels(rest), {}), rest
            sample = before + (_STALE_VALUE if value == b"null" else pack(float(value))) + behind
            name = self._name(name_text)
            if name not in by_name:
                by_name[name] = [sample]
                self._types[name_text] = rest
            elif by_name[name][-1].endswith(behind):  # of two with one time the later push wins
                by_name[name][-1] = sample
            else:
                by_name[name].append(sample)
        return by_labels

    def encode(self, lines: Iterable[_LineOfLog]) -> bytes:
        """A WriteRequest, whose field 1 are TimeSeries, as a snappy block."""
        block, key = SnappyBlock(), field_key(1, _BYTES)
        for (before, behind), by_name in self._by_series(lines).items():
            for name, samples in by_name.items():
                body = b"".join(samples)
                size = len(before) + len(name) + len(behind) + len(body)
                block.add(key + varint(size))
                block.add_again(before)
                block.add_again(name)
                block.add_again(behind)
                block.add(body)
        return block.finish()

    def encode_metadata(self) -> bytes:
        """The types of the metrics that were encoded since the last call, as a snappy block: a
        WriteRequest, whose field 3 are MetricMetadata (type in field 1, name in field 2). b"" if
        there are none.
        """
        block = SnappyBlock()
        for name_text, rest in self._types.items():
            type_ = _METRIC_TYPES[parse_json(b'{"":0' + rest)["type"]]
            name = bytes_field(2, self._sent_name(name_text).encode())
            block.add(bytes_field(3, field_key(1, _VARINT) + varint(type_) + name))
        self._types.clear()
        return block.finish() if block.length else b""


# ---- receivers


class Reply(NamedTuple):
    """What a receiver said to a request: status 0 if nothing, and -1 if it was not even reached."""

    status: int
    reason: str
    retry_after_s: float | None = None

    @property
    def is_taken(self) -> bool:
        """Whether the receiver has the samples."""
        return 200 <= self.status < 300

    @property
    def is_refused(self) -> bool:
        """Whether the request would be refused again, for what is in it."""
        if self.status == 500:
            return _BLAMES_SAMPLE.search(self.reason) is not None
        return 400 <= self.status < 500 and self.status not in (*_SET_UP_FAULTS, 408, 429)

    @property
    def needs_somebody(self) -> bool:
        """Whether it will be so until somebody mends the set-up."""
        return self.status in _SET_UP_FAULTS or 300 <= self.status < 400

    @property
    def is_uncertain(self) -> bool:
        """Whether the receiver may have the samples all the same."""
        return self.status in (0, 502, 504)


class Receiver:
    """A connection to a receiver. Its `name` is its URL without what is secret in it.

    `headers` are field lines, as "Name: value". Raises ValueError where the URL is none of http or
    https, and OSError where `ca`, a file of certificates that are trusted, can't be used.
    """

    def __init__(self, url: str, headers: Iterable[str] = (), ca: str | None = None):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be a URL of http or https")
        if re.search(r'[^!-~]|["\\]', url):
            raise ValueError("must be a URL with nothing in it that is to be escaped")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        port = f":{parts.port}" if parts.port else ""
        self.name = f"{parts.scheme}://{host}{port}{parts.path}"
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {
            "Content-Type": "application/x-protobuf",
            "Content-Encoding": "snappy",
            "X-Prometheus-Remote-Write-Version": "0.1.0",
            "User-Agent": f"MetricStream/{__version__}",
        }
        if authorization := url_authorization(url):
            self._headers["Authorization"] = authorization_field(authorization)
        for header in headers:
            name, _, value = header.partition(":")
            self._headers[name] = value.strip()
        self._connection = http_connection(url, TLSOptions(ca or ""), RECEIVER_TIMEOUT_S)

    def post(self, body: bytes) -> Reply:
        """Send a request, and wait for what the receiver says."""
        try:
            if self._connection.sock is None:
                self._connection.connect()
        except OSError as error:
            return Reply(-1, f"can't connect: {error}")
        try:
            self._connection.request("POST", self._target, body, self._headers)
            response = self._connection.getresponse()
            reason = response.read(65_536)[:300].decode("utf-8", "backslashreplace").strip()
            if not response.isclosed():  # more than anybody wants to read
                self._connection.close()
            retry_after_s = _retry_after_s(response.getheader("Retry-After", ""))
            return Reply(response.status, reason, retry_after_s)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return Reply(0, f"no answer: {error or type(error).__name__}")


def _retry_after_s(text: str) -> float | None:
    """The wait that a Retry-After field asks for, in seconds or until a date (RFC 9110, 10.2.3)."""
    try:
        if text.isdigit():
            wait_s = float(text[:9])
        else:
            wait_s = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)


# ==================================================================================================
# 79. Log reader
# ==================================================================================================
#
# The problem: every sample of the log is to reach a receiver, whatever dies in between and however
# long the receiver is away. The idea: the log is the queue. A request holds what one piece of the
# log holds, and a small file, the checkpoint, says how far the receiver has taken it. The end of a
# piece is noted before it is sent: after a crash the very same request goes out again, and a
# receiver that has it refuses it, or keeps the same samples once more. Nothing is copied into
# another queue, so a backlog costs no memory. What it costs: at least once, not exactly once; and
# parts of the log stay until they are taken.

PIECE_BYTES = 2 * 1024 * 1024  # of the log in one request: 10,000 lines of 200 bytes
CHECKED_BYTES = 256  # by so many a file is known again


class LogReader(FollowedLog):
    """The log as a receiver takes it: from its checkpoint on, of which a file at `path` tells.

    Its files are the segments behind the checkpoint, then those that the front tells of.
    `piece_bytes` is how much is read at once.
    """

    def __init__(self, folder: str, path: str, piece_bytes: int = PIECE_BYTES):
        super().__init__(piece_bytes, piece_bytes)  # what is sent again is the same request
        self._folder, self._path = folder, path
        self.checkpoint = Checkpoint.read(path)
        self._older: deque[str] = deque()  # paths of files before those that the front told of
        self._repeat_to = 0  # the end of a request that was under way when a sender ended

    def begin(self) -> None:
        """Find where to go on; the front has told of the files that it has open."""
        taken = range(1, self.checkpoint.segment + 1)
        while len(self._next) > 1 and segment_of(self._folder, self._next[0][1])[0] in taken:
            os.close(self._next.popleft()[1])
        descriptors = [descriptor for _, descriptor in list(self._next)]
        paths = self._segments_before(descriptors)
        if paths and self._is_known(paths[0]):
            pass
        elif any(map(self._is_known, descriptors)):
            paths = []
            while not self._is_known(self._next[0][1]):
                os.close(self._next.popleft()[1])
        else:
            paths = self._with_renamed(paths)
        self._read_first(paths)
        self.next_file()
        self.tail.position = self.checkpoint.offset
        if self.checkpoint.end > self.checkpoint.offset:
            self._repeat_to = self.checkpoint.end

    def _read_first(self, paths: list[str]) -> None:
        """Put older files before those that the front told of."""
        ends = [0, *(os.stat(path).st_size for path in paths)]
        first, descriptor = self._next.popleft()
        self._next.appendleft((first._replace(size_bytes=ends.pop()), descriptor))
        for number, end in enumerate(reversed(ends), 2):
            self._next.appendleft((Position(-number, end), -1))
        self._older.extend(paths)

    def next_file(self) -> int:
        if self._older:
            # Opened only now: there may be more of them than a process may have open.
            path, flags = self._older.popleft(), os.O_RDONLY | os.O_CLOEXEC
            try:
                descriptor = os.open(path, flags)
            except FileNotFoundError:
                logger.error("%s is gone before it was sent", path)
                descriptor = os.open(os.devnull, flags)
            self._next[0] = (self._next[0][0], descriptor)
        return super().next_file()

    def _segments_before(self, descriptors: list[int]) -> list[str]:
        """Segments behind the checkpoint, and before files that are open already."""
        inodes = {os.fstat(descriptor).st_ino for descriptor in descriptors}
        paths = []
        for number, path in log_segments(self._folder):
            with contextlib.suppress(FileNotFoundError):  # it was taken, and is removed
                if os.stat(path).st_ino in inodes:
                    break
                if number > self.checkpoint.segment:
                    paths.append(path)
        return paths

    def _is_known(self, file: str | int) -> bool:
        """Whether this is the file, by its path or descriptor, that was being sent."""
        try:
            with open(file, "rb", closefd=isinstance(file, str)) as opened:
                return self._check(opened.fileno(), self.checkpoint.end) == self.checkpoint.check
        except OSError:
            return False

    @staticmethod
    def _check(descriptor: int, end: int) -> int:
        size = min(end, CHECKED_BYTES)
        return zlib.crc32(os.pread(descriptor, size, end - size))

    def _with_renamed(self, paths: list[str]) -> list[str]:
        """The file that was being sent has another name now, or is gone."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                is_file = entry.is_file(follow_symlinks=False)
                is_other = entry.path not in paths and entry.name != LOG_NAME
                if is_file and is_other and self._is_known(entry.path):
                    return [entry.path, *paths]
        logger.warning("the log is not the one that was sent; it is sent from its beginning")
        self.checkpoint = Checkpoint(self.checkpoint.segment)
        return paths

    def read(self) -> bytes:
        """The next lines, which `note` is to follow; b"" where there are none for now."""
        end, self._repeat_to = self._repeat_to, 0
        lines = self.tail.read(min(end, self.limit)) or self.tail.read(self.limit)
        while not lines and self.has_next_file:
            self._leave_file()
            lines = self.tail.read(self.limit)
        return lines

    def note(self, lines: bytes, is_taken: bool) -> None:
        """Note that the lines that were read are being sent, or are taken."""
        end = self.tail.position
        offset = end if is_taken else end - len(lines)
        check = self._check(self.tail.descriptor, end)
        self._write(Checkpoint(self.checkpoint.segment, offset, end, check))

    def _write(self, checkpoint: Checkpoint) -> None:
        checkpoint.write(self._path)
        self.checkpoint = checkpoint

    def _leave_file(self) -> None:
        segment, _ = segment_of(self._folder, self.tail.descriptor)
        os.close(self.next_file())
        self._write(Checkpoint(segment or self.checkpoint.segment))

    @property
    def pending_bytes(self) -> int:
        """How much of the log the receiver has not taken."""
        return max(0, self.left_bytes - self.checkpoint.offset)

    def give_up(self) -> int:
        """Leave what is left of the oldest file behind, if it grows no more; how many lines it
        was.
        """
        if self.is_in_last_file:
            return 0
        rest, lost = LogTail(self.tail.descriptor, self.checkpoint.offset), 0
        while lines := rest.read(self.limit):
            lost += lines.count(b"\n")
        self._leave_file()
        return lost


# ==================================================================================================
# 80. Sender process
# ==================================================================================================
#
# The problem: nothing that takes batches in may wait for a receiver. The idea: a process of its
# own, the sender, follows the log as the store does, and sends what it reads. Each receiver has a
# sender of its own. What it costs: parts of the log stay until they are taken, or until the backlog
# is too long.
#
# A sender may end at any step. So an alarm, whatever the sender waits for, hears the front, says
# how it is, and ends the process when the front is gone.

GATHER_S = 1.0  # an idle sender sends what came in so long
LOOK_S = 0.25  # how often the alarm rings
# Waits between attempts: doubled, and a little random.
SENDER_FIRST_RETRY_S, SENDER_LONGEST_RETRY_S = 0.03, 5.0
SPLIT_REQUESTS = 64  # at most so many to find which samples a receiver refuses
COMPLAINT_S = 60.0  # a receiver is not complained of again before
METADATA_S = 60.0  # how often types are sent
BACKLOG_BYTES = 10 * 1024**3
KEPT_FILES = 16  # of the log, for a sender that dies
AGENT_SEGMENT_BYTES = 64 * 1024 * 1024
_NEWEST_READ = "highest_timestamp_in_seconds"
_NEWEST_TAKEN = "queue_highest_sent_timestamp_seconds"


class SenderOptions(NamedTuple):
    """What a sender process is told at its start."""

    folder: str
    url: str
    headers: Sequence[str] = ()
    ca: str | None = None
    external_labels: Sequence[tuple[str, str]] = ()
    names: str = "underscore"
    backlog_bytes: int = BACKLOG_BYTES

    @property
    def checkpoint(self) -> str:
        """The path of the receiver's checkpoint. A new password is no new receiver."""
        parts = urllib.parse.urlsplit(self.url)
        identity = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return os.path.join(self.folder, f"remote-write-{digest}.json")


class _GivenUp(Exception):
    """What was being sent is left behind: the backlog is too long."""


class _Stopped(Exception):
    """The front said stop, and there is no time for more attempts."""


class Sender:
    """The loop of a sender: reads the log, and sends it to one receiver."""

    def __init__(self, control: socket.socket, options: SenderOptions):
        self._control, self._options = control, options
        control.setblocking(False)
        self._receiver = Receiver(options.url, options.headers, options.ca)
        self._encoder = WriteRequestEncoder(dict(options.external_labels), options.names)
        self._log = LogReader(options.folder, options.checkpoint)
        self._stopping = self._has_begun = False
        self._said: deque[str] = deque()  # lines for the front; the alarm sends them
        self._unsent = b""
        self._next_status = self._next_metadata = 0.0
        self._next_complaints: dict[str, float] = {}  # by their first words
        self._maybe_taken = False  # the receiver may have what is being sent
        self._error = ""  # why the receiver takes nothing now
        self._counts: dict[str, float] = defaultdict(int)  # as in _SENDER_STATISTICS
        self._line_bytes = 150.0  # of the log, on average
        self._newest_ms = self._newest_taken_ms = 0  # times of samples

    def run(self) -> None:
        """Send until the front says stop, or is gone."""
        signal.signal(signal.SIGALRM, self._look)
        self._look()
        while not self._has_begun:
            self._pause(LOOK_S)
        self._log.begin()
        with contextlib.suppress(_Stopped):
            while True:
                size = self._send_piece()
                if not size and self._stopping:
                    return
                if size < PIECE_BYTES // 2:
                    self._pause(GATHER_S)

    def _pause(self, wait_s: float) -> None:
        """Wait so long, or until the front says stop."""
        end = time.monotonic() + wait_s
        while not self._stopping and (left_s := end - time.monotonic()) > 0:
            time.sleep(min(left_s, LOOK_S))

    # ---- the front

    def _look(self, *_: object) -> None:
        """The alarm: hear the front, and tell it how things are."""
        try:
            self._hear()
            with contextlib.suppress(BlockingIOError):
                self._tell()
        except (OSError, EOFError):  # the front is gone
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, LOOK_S)

    def _hear(self) -> None:
        for kind, position, _, descriptors in frames(self._control):
            if kind == _SWITCH:
                self._log.begin_file(position, descriptors[0])
            else:
                self._log.acknowledge(position)
                self._has_begun = True  # of all files before the first position
            self._stopping |= kind == _STOP

    def _tell(self) -> None:
        now = time.monotonic()
        if now >= self._next_status:
            self._next_status = now + STORE_STATUS_S
            self._said.append(write_json(self._status()))
        while self._said:
            self._unsent += self._said.popleft().encode(errors="backslashreplace") + b"\n"
        while self._unsent:
            self._unsent = self._unsent[self._control.send(self._unsent) :]

    def _status(self) -> dict[str, Any]:
        pending_bytes = self._log.pending_bytes
        return {
            "error": self._error,
            "file": self._log.file,
            "pending_bytes": pending_bytes,
            "samples_pending": math.ceil(pending_bytes / self._line_bytes),
            _NEWEST_READ: self._newest_ms / 1000,
            _NEWEST_TAKEN: self._newest_taken_ms / 1000,
            "counts": dict(self._counts),
        }

    def log_to_front(self, record: logging.LogRecord) -> bool:
        """A filter of the logger: the front logs for all processes."""
        if len(self._said) < 1000:
            self._said.append(write_json({"log": record.getMessage(), "level": record.levelno}))
        return False

    def _complain(self, complaint: str) -> None:
        """Log what is wrong with the receiver, each kind at most once a minute."""
        kind, now = complaint.split()[0], time.monotonic()
        if now >= self._next_complaints.get(kind, 0.0):
            self._next_complaints[kind] = now + COMPLAINT_S
            logger.warning("%s %s", self._receiver.name, complaint)

    # ---- samples are sent

    def _send_piece(self) -> int:
        """Send the next piece of the log; how many bytes it had."""
        known = self._log.checkpoint
        self._maybe_taken = known.end > known.offset  # a sender ended before it had the answer
        try:
            self._give_up_beyond_backlog()
            lines = self._log.read()
            if lines:
                self._log.note(lines, is_taken=False)
                self._deliver(lines)
                self._log.note(lines, is_taken=True)
                self._send_metadata()
        except _GivenUp:
            return PIECE_BYTES
        return len(lines)

    def _deliver(self, lines: bytes) -> None:
        """Send lines until they are taken; what is refused is halved, to find what really is."""
        samples: list[_LineOfLog] = _LOG_LINE.findall(lines)
        if not samples:
            return
        self._line_bytes = len(lines) / len(samples)
        newest_ms = _line_time_ms(max(sample[0] for sample in samples)) or 0
        self._newest_ms = max(self._newest_ms, newest_ms)
        parts, requests = [samples], 0
        while parts:
            part = parts.pop()
            reply = self._send(self._encoder.encode(part), len(part))
            requests += 1
            if reply.is_refused and len(part) > 1 and requests + len(parts) + 2 <= SPLIT_REQUESTS:
                if part is samples:  # by series: a bad one is in few parts, and none overtakes
                    part.sort(key=operator.itemgetter(3, 1, 0))
                middle = len(part) // 2
                parts += (part[middle:], part[:middle])
            elif reply.is_taken or self._maybe_taken:  # then it complains of what it has already
                self._counts["samples_total"] += len(part)
            else:
                self._counts["samples_failed_total"] += len(part)
                self._complain(f"refuses {len(part)} samples: {reply.status} {reply.reason}")
        self._newest_taken_ms = self._newest_ms

    def _send(self, body: bytes, samples: int) -> Reply:
        """Send a request until it is taken or refused."""
        wait_s = SENDER_FIRST_RETRY_S
        while True:
            began = time.monotonic()
            reply = self._receiver.post(body)
            self._counts["sent_batch_duration_seconds_sum"] += time.monotonic() - began
            self._counts["sent_batch_duration_seconds_count"] += 1
            if reply.is_taken or reply.is_refused:
                self._counts["bytes_total"] += len(body)
                self._error = ""
                return reply
            self._counts["samples_retried_total"] += samples
            self._maybe_taken |= reply.is_uncertain
            self._error = f"{reply.status if reply.status > 0 else ''} {reply.reason}".strip()
            if wait_s > SENDER_FIRST_RETRY_S:  # once is nothing: a kept connection was closed
                self._complain(f"takes nothing: {self._error}")
            if reply.needs_somebody:
                wait_s = SENDER_LONGEST_RETRY_S
            self._wait_for_receiver(reply.retry_after_s or wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, SENDER_LONGEST_RETRY_S)

    def _wait_for_receiver(self, wait_s: float) -> None:
        end = time.monotonic() + wait_s
        while (left_s := end - time.monotonic()) > 0:
            self._pause(min(left_s, GATHER_S))
            self._give_up_beyond_backlog()
            if self._stopping:
                raise _Stopped

    def _give_up_beyond_backlog(self) -> None:
        if self._log.pending_bytes <= self._options.backlog_bytes:
            return
        if lost := self._log.give_up():
            self._counts["samples_dropped_total"] += lost
            message = "%d samples are not sent to %s: the backlog is too long"
            logger.error(message, lost, self._receiver.name)
            raise _GivenUp

    def _send_metadata(self) -> None:
        """Send the types of metrics, now and then; they are sent again, so a fault is none."""
        now = time.monotonic()
        if now >= self._next_metadata and (body := self._encoder.encode_metadata()):
            self._next_metadata = now + METADATA_S
            reply = self._receiver.post(body)
            logger.debug("metadata: %d %s", reply.status, reply.reason)


def sender_main(arguments: list[str]) -> int:
    """A sender process: its argument is the descriptor of its socket to the front."""
    control, told = begin_following(arguments)
    sender = Sender(control, SenderOptions(**told))
    logger.addFilter(sender.log_to_front)
    logger.setLevel(logging.INFO)
    sender.run()
    return 0


# ---- the front's end


class SenderClient:
    """The front's end of a sender."""

    def __init__(self, log: MetricLog, options: SenderOptions):
        self.name = Receiver(options.url, options.headers, options.ca).name
        title = f"the sender to {self.name}"
        self.follower = Follower(
            log, "sender", title, options._asdict(), self._hear, kept_files=KEPT_FILES
        )
        self._status: dict[str, Any] = {"counts": {}}
        # what senders counted that have died
        self._earlier: dict[str, float] = defaultdict(int)

    def _hear(self, said: dict[str, Any]) -> None:
        if "ended" in said:
            for key, count in self._status["counts"].items():
                self._earlier[key] += count
            self._status["counts"] = {}
        else:
            self._status = said
            self.follower.has_left(said["file"])
            if "samples_total" in said["counts"]:
                self.follower.is_well()

    def number(self, key: str) -> float:
        """A number of _SENDER_STATISTICS."""
        counted = self._earlier.get(key, 0) + self._status["counts"].get(key, 0)
        number: float = self._status.get(key, counted)
        return number

    @property
    def state(self) -> str:
        """How it is, in words."""
        if "error" not in self._status:
            return "starting"
        behind = f"{self._status['pending_bytes']} bytes behind"
        return f"{behind}; {self._status['error']}" if self._status["error"] else behind


# Numbers of a sender: each has a name behind "remote_storage_", a type and a help.
_SENDER_STATISTICS = (
    ("samples_total", "counter", "Samples that the receiver has taken."),
    ("samples_failed_total", "counter", "Samples that the receiver refused."),
    ("samples_retried_total", "counter", "Samples of requests that were sent again."),
    ("samples_dropped_total", "counter", "Samples given up, as the backlog was too long."),
    ("samples_pending", "gauge", "About how many samples wait to be sent."),
    ("pending_bytes", "gauge", "How much of the log waits to be sent."),
    (_NEWEST_READ, "gauge", "The newest time of a sample that was read from the log."),
    (_NEWEST_TAKEN, "gauge", "The newest time of a sample that the receiver has taken."),
    ("bytes_total", "counter", "Bytes of requests that the receiver has answered."),
    ("sent_batch_duration_seconds_sum", "counter", "Time spent on requests."),
    ("sent_batch_duration_seconds_count", "counter", "Requests, those sent again included."),
)


def add_senders(service: Service, targets: Iterable[SenderOptions]) -> list[Follower]:
    """Have a service say how its senders are; returns the front's ends of the processes. Raises
    what Receiver raises.
    """
    clients = [SenderClient(service.log, options) for options in targets]

    def numbers(key: str) -> Callable[[], dict[str, float]]:
        return lambda: {client.name: client.number(key) for client in clients}

    for key, type_, help_ in _SENDER_STATISTICS:
        name = f"remote_storage_{key}"
        service.statistics.add(name, type_, help_, numbers(key), f"prometheus_{name}", "url")
    service.health_facts.append(
        lambda: {"remote_write": {client.name: client.state for client in clients}}
    )
    return [client.follower for client in clients]


def refuse_query(request: Request, client: str) -> NoReturn:
    """What an agent says to a query."""
    raise HTTPError(404, "this is an agent: it only sends samples on; query the receiver")


class AgentSegments:
    """Does for the log of an agent what a store does elsewhere: begins new files, and removes those
    that all receivers have taken.
    """

    def __init__(self, log: MetricLog, checkpoints: Sequence[str], segment_bytes: int):
        self._log, self._checkpoints, self._segment_bytes = log, checkpoints, segment_bytes
        self._folder = os.path.dirname(log.path)
        self._last_number = 0
        self._asked_in, self._ask_again = -1, 0.0  # for a new file: in which file, and when

    def look(self) -> None:
        """What the housekeeper does for the log, again and again."""
        taken = [Checkpoint.read(path).segment for path in self._checkpoints]
        for number, path in log_segments(self._folder):
            self._last_number = max(self._last_number, number)
            if number <= min(taken):
                os.unlink(path)
        file, size_bytes = self._log.position
        now = time.monotonic()
        may_ask = file != self._asked_in or now >= self._ask_again
        if size_bytes >= self._segment_bytes and may_ask:
            self._asked_in, self._ask_again = file, now + STORE_RETRY_S
            # a number of its own for each attempt: none is moved onto another
            self._last_number = max(self._last_number, *taken) + 1
            name = f"metrics.{self._last_number:08d}.jsonl"
            self._log.rotate(os.path.join(self._folder, name))


# ==================================================================================================
# PART VI. COMMAND LINE
# ==================================================================================================


# ==================================================================================================
# 81. Options
# ==================================================================================================
#
# What a user can choose, with its default and the sentence that `--help` prints: a part of the
# contract with users. Words become values here, and a mistake is one line and exit status 2.


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def argument_parser() -> argparse.ArgumentParser:
    """The options; their names and defaults are part of the contract with users."""
    parser = _Parser(
        prog="metricstream.py",
        description="A metrics server in one file: POST to /metrics, ask in PromQL at /api/v1. "
        "Without a server: metricstream.py query, check-rules, test-rules or test-notify; each has "
        "a --help of its own.",
    )
    add, number = parser.add_argument, _number_from
    # fmt: off
    add("port", nargs="?", type=number(0, 65535), default=8080,
        help="TCP port (default 8080; 0 takes a free one)")
    add("--host", metavar="ADDRESS", default="127.0.0.1",
        help="address to listen on (default 127.0.0.1; 0.0.0.0 or :: to be reached from elsewhere)")
    add("--data-dir", metavar="DIR", default=".",
        help=f"where {LOG_NAME} and {BLOCKS_NAME}/ live (default: the current folder)")
    add("--rate-limit", metavar="N", type=number(0), default=1000,
        help="requests per second and client (default 1000; 0 = off)")
    add("--stripes", metavar="N", type=number(1, 4096), default=STRIPES,
        help=f"locks that the clients of the rate limit share, a power of two (default {STRIPES})")
    add("--durability", choices=DURABILITY_LEVELS, default="os",
        help="what a 200 promises: memory (queued), os (default: written; survives kill -9), "
        "disk (synced; survives loss of power)")
    add("--threads", metavar="N", type=number(0, MAX_WORKERS), default=steady_threads(),
        help="steady worker threads (default: 1 with the interpreter lock, one a core without; "
        "0 = a thread a connection)")
    add("--max-connections", metavar="N", type=number(1), default=MAX_CONNECTIONS,
        help=f"open connections at most (default {MAX_CONNECTIONS})")
    add("--max-series", metavar="N", type=number(1), default=MAX_SERIES,
        help=f"series in memory at most (default {MAX_SERIES})")
    add("--retention", metavar="TIME", type=_duration, default=RETENTION_S,
        help="how long blocks are kept, as 30d or 12h (default 30d; 0 keeps all)")
    add("--retention-size", metavar="BYTES", type=_byte_size, default=0,
        help="how many bytes of blocks are kept, as 512MB or 10GB (default 0: all)")
    add("--keep-log", action="store_true",
        help="keep what blocks cover of the log, as metrics-DATE-NUMBER.jsonl.gz")
    add("--query-timeout", metavar="TIME", type=_duration, default=QUERY_TIMEOUT_S,
        help="how long a query may take (default 2m)")
    add("--query-memory", metavar="BYTES", type=_byte_size, default=QUERY_MEMORY,
        help="how much memory a query may take (default 512MB)")
    add("--self-metrics", metavar="TIME", type=_duration, default=OWN_METRICS_S,
        help="how often the server's own statistics are stored as series (default 15s; 0 = never)")
    add("--clients", metavar="FILE",
        help="only these clients may write: a line each, 'name sha256-of-key [rate]' "
        "(default: anyone may, under any id)")
    add("--new-client", metavar="NAME",
        help="print a line for that file, and its key on stderr; then end")
    add("--allowed-host", metavar="NAME", action="append", default=[],
        help="a name, beside localhost and addresses, under which browsers may write here; "
        "may be repeated")
    add("--tls-cert", metavar="FILE", help="serve HTTPS: the certificate and its chain, as PEM")
    add("--tls-key", metavar="FILE", help="its private key, as PEM")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="default info")
    add("--version", action="version", version=f"MetricStream {__version__}")
    # fmt: on
    _add_watching_options(parser)
    _add_remote_write_options(parser)
    return parser


def _add_watching_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    # fmt: off
    add("--rules", metavar="FILE", action="append", default=[],
        help="a rule file of Prometheus (YAML or JSON); may hold * and ?, may be repeated")
    add("--evaluation-interval", metavar="TIME", type=_duration, default=60.0,
        help="how often groups of rules without an interval are evaluated (default 1m)")
    add("--notify", metavar="FILE",
        help="whom to tell of alerts: a configuration file of Alertmanager")
    add("--webhook", metavar="URL", action="append", default=[],
        help="whom to tell without such a file: POSTs Alertmanager's webhook body; may be repeated")
    add("--alertmanager", metavar="URL", action="append", default=[],
        help="an Alertmanager that is told of all alerts; may be repeated")
    add("--external-url", metavar="URL", default="",
        help="how people reach this server; for the links in notifications")
    add("--external-label", metavar="NAME=VALUE", action="append", type=_external_label, default=[],
        help="a label added to what leaves this machine: alerts, and samples that are sent on; may "
        "be repeated")
    add("--dashboards", metavar="DIR",
        help="saved dashboards (JSON files), which the page offers")
    # fmt: on


def _add_remote_write_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    # fmt: off
    add("--remote-write", metavar="URL", type=_receiver_url, action="append", default=[],
        help="send every sample on to a receiver of Prometheus's remote write; may be repeated")
    add("--remote-write-header", metavar="'NAME: VALUE'", type=_header, action="append", default=[],
        help="a header field of every request to a receiver; may be repeated")
    add("--remote-write-ca", metavar="FILE",
        help="trust the receivers' certificates that these sign, as PEM (default: the system's)")
    add("--remote-write-names", choices=("underscore", "utf8"), default="underscore",
        help="send cpu.usage as cpu_usage (default) or as it is")
    add("--remote-write-backlog", metavar="BYTES", type=_byte_size, default=BACKLOG_BYTES,
        help="how much of the log may wait for a receiver; the oldest is given up (default 10GB)")
    add("--agent", action="store_true",
        help="only send samples on: no store, no queries; needs --remote-write")
    # fmt: on


def _number_from(least: int, most: int = 10**9) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {least} to {most}"
            )
        return int(text)

    return number


def _duration(text: str) -> float:
    """Seconds, of a number of them or of a duration such as 1h30m."""
    try:
        return parse_duration_ms(text) / 1000 if not text.isdigit() else float(text[:12])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _byte_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})(?:([KMGT])B|B)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MB")
    size: int = int(match[1]) << 10 * " KMGT".index(match[2] or " ")
    return size


def _receiver_url(text: str) -> str:
    try:
        Receiver(text)
    except ValueError as error:  # its text may hold a password
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _header(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~]*", text):
        raise argparse.ArgumentTypeError("is not of the form 'Name: value'")
    return text


def _external_label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name in ("", NAME) or name != underscored(name).replace(":", "_"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, value


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The options of a server; exits with status 2 where some don't go together."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    watching = options.rules or options.notify or options.webhook
    receivers = {Receiver(url).name for url in options.remote_write}
    for wrong, reason in (
        (options.stripes & (options.stripes - 1),
         f"argument --stripes: {options.stripes} is not a power of two"),
        ((options.tls_cert is None) != (options.tls_key is None),
         "--tls-cert and --tls-key go together"),
        (options.agent and watching,
         "--agent keeps no store, which --rules and notifications need"),
        (options.agent and not receivers, "--agent needs a receiver: --remote-write URL"),
        (len(receivers) < len(options.remote_write),
         "argument --remote-write: the same receiver twice"),
        (options.dashboards is not None and not os.path.isdir(options.dashboards or ""),
         f"argument --dashboards: {options.dashboards!a} is no folder"),
        (options.new_client is not None and not _CLIENT_NAME.fullmatch(options.new_client or ""),
         f"argument --new-client: {options.new_client!a} must be a letter and up to 63 letters, "
         "digits, '.', '_' or '-'"),
    ):  # fmt: skip
        if wrong:
            parser.error(reason)
    return options


# ==================================================================================================
# 82. Commands
# ==================================================================================================
#
# What is asked without a server: the store of a folder, rule files, unit tests of rules, a test
# notification. Each returns its exit status: 0, or 1 with the reasons on stderr.


def complain(reason: str) -> int:
    """Say why nothing can be done, a line each; the exit status."""
    for line in reason.splitlines():
        print(f"metricstream.py: error: {line}", file=sys.stderr)
    return 1


def _command(name: str, description: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"metricstream.py {name}", description=description)


def query_main(arguments: list[str]) -> int:
    """`query EXPRESSION`: ask the store of a folder, without a server; returns the exit status."""
    parser = _command("query", "Ask what was pushed, in PromQL.")
    parser.add_argument("expression", help="such as 'sum(rate(requests_total[5m]))'")
    parser.add_argument("--data-dir", metavar="DIR", default=".", help="default: here")
    parser.add_argument("--time", metavar="TIME", help="Unix seconds or ISO 8601 (default: now)")
    parser.add_argument("--json", action="store_true", help="as the HTTP API answers")
    options = parser.parse_args(arguments)
    sys.setrecursionlimit(MAX_RECURSION)
    try:
        time_ms = api_time_ms(options.time, "time") if options.time else int(time.time() * 1000)
        result = Engine(_stored(options.data_dir).select).instant(options.expression, time_ms)
    except (APIError, QueryError, ExecutionError, OSError) as error:
        return complain(str(error))
    if options.json:
        print(f'{{"status":"success","data":{result_json(result)}}}')
    else:
        print(_table(result), end="")
    return 0


def _stored(folder: str) -> Store:
    """The store of a folder, to be read beside the server that writes it. Raises OSError."""
    store = Store(folder)
    for _ in store.open(log=os.path.join(folder, LOG_NAME)):
        pass
    return store


def _table(result: Result) -> str:
    """A result for people: a line a sample."""
    rows: list[tuple[str, str, str]] = []
    if isinstance(result, ScalarResult):
        rows.append(("scalar", utc_timestamp(result.time_ms), format_value(result.value)))
    elif isinstance(result, StringResult):
        rows.append(("string", utc_timestamp(result.time_ms), write_json(result.value)))
    elif isinstance(result, VectorResult):
        for labels, value in result.samples:
            rows.append((_series_text(labels), utc_timestamp(result.time_ms), format_value(value)))
    else:
        for series in result.series:
            for time_ms, value in zip(series.times_ms, series.values):
                rows.append(
                    (_series_text(series.labels), utc_timestamp(time_ms), format_value(value))
                )
    width = max((len(name) for name, _, _ in rows), default=0)
    return "".join(f"{name:{width}}  {when}  {value}\n" for name, when, value in rows)


def _series_text(labels: dict[str, str]) -> str:
    """A series as one writes it in a query; what is not printable is escaped."""
    name = labels.get(NAME, "")
    if not PLAIN_NAME.fullmatch(name):
        return labels_text(labels)
    rest = _nameless(labels)
    return name + (labels_text(rest) if rest else "")


def check_rules_main(arguments: list[str]) -> int:
    """`check-rules FILE…`: say all that is wrong with rule files; returns the exit status."""
    parser = _command("check-rules", "Check rule files.")
    parser.add_argument("files", metavar="FILE", nargs="+", help="rules of Prometheus, as YAML")
    parser.add_argument("--data-dir", metavar="DIR",
                        help="say which selectors match no series that is stored here")  # fmt: skip
    options = parser.parse_args(arguments)
    sys.setrecursionlimit(MAX_RECURSION)
    status = 0
    try:
        store = _stored(options.data_dir) if options.data_dir is not None else None
    except OSError as error:
        return complain(str(error))
    for path in options.files:
        print(f"Checking {path}", flush=True)
        try:
            checked = load_rules(path)
        except (OSError, FaultyFile) as error:
            status = 1
            print(f"  FAILED:\n{_why(path, error)}\n", file=sys.stderr, flush=True)
        else:
            rules = sum(len(group.rules) for group in checked.groups)
            warnings = "".join(f"  WARNING: {warning}\n" for warning in checked.warnings)
            print(f"  SUCCESS: {rules} rules found\n{warnings}")
            for line in _silent_rules(checked, store) if store else ():
                print(f"  {line}")
    return status


def _why(path: str, error: Exception) -> str:
    """Why a file can't be used; a FaultyFile names it itself."""
    return f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _silent_rules(checked: RuleFile, store: Store) -> Iterator[str]:
    """Which selectors of rules match no series, nor what another rule records."""
    recorded = {rule.name for group in checked.groups for rule in group.rules if not rule.is_alert}
    for group in checked.groups:
        for rule in group.rules:
            for selector in selectors_of(rule.expr):
                matchers = _matchers_of(selector)
                names = {matcher.value for matcher in matchers if matcher.name == NAME}
                if not names & recorded and not any(store.select(matchers, 0, 2**62, Budget())):
                    yield f"line {rule.line}: {rule.name}: no series matches {selector}"


def test_rules_main(arguments: list[str]) -> int:
    """`test-rules FILE…`: promtool's unit tests, or rules over what is stored; the exit status."""
    parser = _command(
        "test-rules", "Run unit tests of rules, in promtool's format. With --data-dir: run rule "
        "files over what is stored, and show when each alert would have fired.",
    )  # fmt: skip
    parser.add_argument("files", metavar="FILE", nargs="+", help="tests, or rules with --data-dir")
    parser.add_argument("--run", metavar="REGEX", action="append", default=[],
                        help="only tests of such names; may be repeated")  # fmt: skip
    parser.add_argument("--data-dir", metavar="DIR", help="rules over what is stored here")
    parser.add_argument("--since", metavar="TIME", type=_duration, default=86_400.0,
                        help="how far back, as 7d (default 1d)")  # fmt: skip
    options = parser.parse_args(arguments)
    sys.setrecursionlimit(MAX_RECURSION)
    if options.data_dir is not None:
        return _backtest_files(options)
    try:
        wanted = [compile_regex(f"(?s:.*)(?:{text})(?s:.*)") for text in options.run]
    except ValueError as error:
        return complain(str(error))
    failed = False
    for path in options.files:
        print(f"Unit Testing:  {path}", flush=True)
        try:
            failures = _test_file(path, wanted)
        except (OSError, FaultyFile) as error:
            failures = _why(path, error).splitlines()
        if failures:
            failed = True
            text = "\n".join(failures).replace("\n", "\n    ")
            print(f"  FAILED:\n    {text}\n", file=sys.stderr, flush=True)
        else:
            print("  SUCCESS\n", flush=True)
    return int(failed)


def _test_file(path: str, wanted: list[Regex]) -> list[str]:
    """Run the tests of a file; what failed."""
    with open(path, "rb") as file:
        tests = read_rule_tests(file.read(), path)
    names: list[str] = []
    for pattern in tests.rule_files:
        full = os.path.normpath(os.path.join(os.path.dirname(path), pattern))
        found = sorted(glob.glob(full))
        names += found
        if not found:
            print(f"  WARNING: no file matches {full}", file=sys.stderr, flush=True)
    files = [load_rules(name) for name in dict.fromkeys(names)]
    failures = []
    for number, test in enumerate(tests.tests, 1):
        if not wanted or any(regex.matches(test.name) for regex in wanted):
            title = f"name: {test.name},\n" if test.name else f"test {number},\n"
            failures += [title + failure for failure in run_rule_test(test, tests, files)]
    return failures


def _backtest_files(options: argparse.Namespace) -> int:
    """Run rule files over a folder, and print when each alert would have fired."""
    try:
        groups = load_groups(WatchOptions(options.data_dir, options.files))
        store = _stored(options.data_dir)
    except (WatchError, OSError) as error:
        return complain(str(error))
    end_ms = int(time.time() * 1000)
    start_ms = end_ms - int(options.since * 1000)
    fired, failed = backtest(groups, store.select, start_ms, end_ms)
    print(f"{utc_timestamp(start_ms)} to {utc_timestamp(end_ms)}")
    for rule in (rule for group in groups for rule in group.alerting):
        times: dict[str, list[tuple[int, int]]] = {}
        for firing in fired:
            if firing.rule is rule:
                times.setdefault(labels_text(firing.labels), []).append(firing[2:])
        if not times:
            print(f"\n{rule.rule.name}: never fires")
        for shown, spans in sorted(times.items()):
            print(f"\n{rule.rule.name} {shown}\n  {firing_bar(spans, start_ms, end_ms)}")
            for began_ms, ended_ms in spans:
                lasted = _duration_text(ended_ms - began_ms)
                print(f"  {utc_timestamp(began_ms)} for {lasted}")
    for reason, times_failed in failed.items():
        print(f"{reason} (failed {times_failed} times)", file=sys.stderr)
    return int(bool(failed))


def test_notify_main(arguments: list[str]) -> int:
    """`test-notify FILE`: send a test to each receiver; the exit status."""
    parser = _command("test-notify", "Send one marked test notification to each receiver.")
    parser.add_argument("file", metavar="FILE", help="a configuration file of Alertmanager")
    parser.add_argument("--external-url", metavar="URL", default="http://localhost:8080",
                        help="how people reach the server")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        config = load_notify(WatchOptions("", notify=options.file))
    except WatchError as error:
        return complain(str(error))
    assert config is not None  # there is a file
    failed = 0
    for delivery in test_deliveries(config, options.external_url, time.time()):
        outcome = deliver(delivery)
        failed += bool(outcome)
        print(f"{delivery.name}: {outcome or 'it arrived'}", flush=True)
    return int(failed > 0)


# ==================================================================================================
# 83. Starting
# ==================================================================================================
#
# Options become objects, each made of those before it; one line says what is running, and a signal
# ends it. What goes wrong before that is one line on stderr.


LOG_CLOSE_S = 0.8  # so long a stop waits for the disk


class LineWriter(logging.Handler):
    """Writes lines to a file descriptor, and never waits for whoever reads it: a thread writes.

    A terminal that is stopped, a full disk or a pipe that nobody reads costs lines, which are
    counted, and nothing else.
    """

    MAX_LINES = 10_000  # that wait

    def __init__(self, descriptor: int):
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._descriptor = descriptor
        self.dropped = 0
        # To the thread that writes; None: it is to end. A SimpleQueue needs no lock.
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_lines, name="lines", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        self.say(self.format(record))

    def say(self, line: str) -> None:
        """Write a line, sooner or later."""
        if self._lines.qsize() >= self.MAX_LINES:
            self.dropped += 1
        else:
            self._lines.put(line.encode(errors="backslashreplace") + b"\n")

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:  # somebody has made it so: then it is waited for here
                select.select([], [self._descriptor], [], 1.0)
                self.dropped += 1
            except OSError:  # nobody is left to be told
                self.dropped += 1

    def finish(self, timeout_s: float) -> None:
        """Write what waits, as far as the time allows."""
        self._lines.put(None)
        self._thread.join(timeout_s)


class StartError(Exception):
    """Why a server can't start."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command, a server or a process of a server; returns the exit status."""
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments[:1] and arguments[0] in _COMMANDS:
        return _COMMANDS[arguments[0]](arguments[1:])
    options = parse_options(arguments)
    if options.new_client is not None:
        key, line = new_client(options.new_client)
        print(f"the key of {options.new_client}, shown only now: {key}", file=sys.stderr)
        print(line)
        return 0
    lines = LineWriter(1)
    logging.basicConfig(handlers=[lines], level=options.log_level.upper())
    try:
        return _run_server(options, lines)
    except (StartError, ClientListError, LogError, WatchError) as error:
        return complain(str(error))
    finally:
        lines.finish(0.5)


_COMMANDS = {
    "query": query_main, "check-rules": check_rules_main, "test-rules": test_rules_main,
    "test-notify": test_notify_main, "store": store_main, "watch": watch_main,
    "sender": sender_main,
}  # fmt: skip


def _run_server(options: argparse.Namespace, lines: LineWriter) -> int:
    """Build what a server consists of, run it, and end it; returns the exit status."""
    tls = _server_tls(options)
    clients = ClientList.read(options.clients) if options.clients else None
    watch = _watch_options(options)
    log = MetricLog(options.data_dir, options.durability)
    try:
        service = _service(options, log, clients, lines)
        _run_processes(options, service, tls, watch, lines)
    finally:
        kept = log.close(LOG_CLOSE_S)
    lines.say(f"stopped {write_json(service.statistics.snapshot())}")
    if kept:
        return 0
    unsynced = max(0, os.fstat(log.descriptor).st_size - log.position.size_bytes)
    lines.say(
        f"the disk does not answer: {log.path} is not synced, {unsynced} bytes of it are not "
        "acknowledged"
    )
    lines.finish(0.5)
    os._exit(1)  # its thread can't be ended while the disk holds it up


def _run_processes(
    options: argparse.Namespace, service: Service, tls: ssl.SSLContext | None,
    watch: WatchOptions | None, lines: LineWriter,
) -> None:  # fmt: skip
    """Serve until a signal comes, with the processes beside this one."""
    followers, jobs = _followers(options, service)
    watcher = WatcherClient(service, watch) if watch else None
    if watcher:
        followers.append(watcher.follower)
    else:
        service.add_routes(EMPTY_WATCHER)
    jobs += [(TICK_S, follower.look) for follower in followers]
    max_connections = fit_connections(options.max_connections)
    if max_connections < options.max_connections:
        message = "the limit on open files allows %d connections, not %d"
        logger.warning(message, max_connections, options.max_connections)
    try:
        server = Server(
            (options.host, options.port), service, threads=options.threads, tls=tls, jobs=jobs,
            max_connections=max_connections, reload=partial(_reload, options, watcher),
        )  # fmt: skip
    except OSError as error:
        reason = error.strerror or error
        raise StartError(f"can't listen on {options.host} port {options.port}: {reason}") from error
    with server:
        if watcher:
            # nobody can go to a wildcard
            host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
            watcher.begin(server.adopt, _url_of(host, server))
        try:
            for follower in followers:
                follower.look()
            _serve(options, server, lines)
        finally:
            for follower in followers:
                follower.stop()
            for follower in followers:
                follower.close()


def _service(
    options: argparse.Namespace, log: MetricLog, clients: ClientList | None, lines: LineWriter
) -> Service:
    statistics = Statistics()
    statistics.add(
        "log_lines_dropped", "counter", "Lines of the server's log that nobody took.",
        lambda: lines.dropped, "log_lines_dropped_total",
    )  # fmt: skip
    limiter = None
    if options.rate_limit or clients is not None:  # listed clients may have rates of their own
        limiter = SlidingWindowLimiter(options.rate_limit, stripes=options.stripes)
    hosts = [options.host, *options.allowed_host]
    service = Service(log, limiter, statistics, clients=clients, allowed_hosts=hosts)
    service.add_routes(dashboard_routes(options.dashboards))
    return service


_Jobs = list[tuple[float, Callable[[], None]]]  # what is to be done, at intervals in seconds


def _followers(options: argparse.Namespace, service: Service) -> tuple[list[Follower], _Jobs]:
    """The processes that follow the log of a service, and what is to be done for them."""
    targets = [
        SenderOptions(
            options.data_dir, url, options.remote_write_header, options.remote_write_ca,
            options.external_label, options.remote_write_names, options.remote_write_backlog,
        )
        for url in options.remote_write
    ]  # fmt: skip
    try:
        followers = add_senders(service, targets) if targets else []
    except OSError as error:
        reason = f"can't use certificates {options.remote_write_ca}: {error.strerror}"
        raise StartError(reason) from error
    checkpoints = [target.checkpoint for target in targets]
    # The backlog is given up by segments, so that it has to have some.
    most_bytes = max(1, options.remote_write_backlog // 4) if targets else SEGMENT_BYTES
    jobs: _Jobs = []
    if options.agent:
        segment_bytes = min(AGENT_SEGMENT_BYTES, most_bytes)
        jobs.append((1.0, AgentSegments(service.log, checkpoints, segment_bytes).look))
        service.add_routes({f"{API_PREFIX}*": {"GET": refuse_query, "POST": refuse_query}})
    else:
        store = _store(options, service, checkpoints, min(SEGMENT_BYTES, most_bytes))
        followers.append(store.follower)
        if options.self_metrics:
            jobs.append((options.self_metrics, store.send_own_metrics))
    return followers, jobs


def _store(
    options: argparse.Namespace, service: Service, checkpoints: list[str], segment_bytes: int
) -> StoreClient:
    """The store of a service."""
    store_options = StoreOptions(
        options.data_dir, options.max_series, options.retention, options.retention_size,
        options.keep_log, checkpoints, segment_bytes, options.query_timeout, options.query_memory,
        __version__,
    )  # fmt: skip
    store = StoreClient(service.log, service.statistics, store_options)
    service.check_batch = store.admit
    service.health_facts.append(store.health)
    service.add_routes({f"{API_PREFIX}*": {"GET": store.ask, "POST": store.ask}})
    return store


def _watch_options(options: argparse.Namespace) -> WatchOptions | None:
    """What a watcher is told, if any is asked for; its files are read once, to see whether they can
    be used. Raises WatchError.
    """
    if not (options.rules or options.notify or options.webhook or options.alertmanager):
        return None
    watch = WatchOptions(
        options.data_dir, options.rules, options.notify or "", options.webhook,
        options.alertmanager, options.external_url, dict(options.external_label),
        options.evaluation_interval, __version__,
    )  # fmt: skip
    load_groups(watch)
    load_notify(watch)
    return watch


def _server_tls(options: argparse.Namespace) -> ssl.SSLContext | None:
    if options.tls_cert is None:
        return None
    try:
        return tls_context(options.tls_cert, options.tls_key)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        pair = f"certificate {options.tls_cert} with key {options.tls_key}"
        raise StartError(f"can't use {pair}: {reason}") from error


def _serve(options: argparse.Namespace, server: Server, lines: LineWriter) -> None:
    """Say what runs, and run it until a signal ends it."""
    loopback = ipaddress.ip_address(str(server.server_address[0])).is_loopback
    if server.service.clients is None and not loopback:
        logger.warning("whoever reaches %s may write: see --clients", options.host)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop_soon())
    signal.signal(signal.SIGHUP, lambda *_: server.reload_soon())
    lines.say(_startup_line(options, server))
    # What is there now stays. A full collection, during which nobody is answered, takes 0.1 ms
    # instead of 4 when it leaves that alone.
    gc.collect()
    gc.freeze()
    server.serve_forever()
    server.log_decisions()


def _startup_line(options: argparse.Namespace, server: Server) -> str:
    log, clients = server.service.log, server.service.clients
    facts = [
        f"MetricStream {__version__} on {_url_of(str(server.server_address[0]), server)}",
        f"log {write_json_string(os.path.abspath(log.path))[1:-1]}",
        f"{options.rate_limit} requests/s a client" if options.rate_limit else "no rate limit",
        f"{server.max_connections} connections",
        f"durability {log.durability}",
    ]
    if clients is not None:
        facts.append(f"clients listed: {len(clients.rates)}")
    facts += [f"remote write to {Receiver(url).name}" for url in options.remote_write]
    if options.agent:
        facts.append("agent: no store, no queries")
    if log.cut_bytes:
        facts.append(f"cut a torn line of {log.cut_bytes} bytes off the log")
    return ", ".join(facts)


def _url_of(host: str, server: Server) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if server.tls else 'http'}://{host}:{server.server_address[1]}"


def _reload(options: argparse.Namespace, watcher: WatcherClient | None, server: Server) -> None:
    """On SIGHUP: read the files again that others may have changed; what is broken stays as it
    was.
    """

    def read_clients() -> None:
        server.service.clients = ClientList.read(options.clients)

    def read_certificate() -> None:
        server.tls = _server_tls(options)

    if watcher:
        watcher.reload()
    steps = [(LOG_NAME, server.service.log.reopen)]
    if options.clients:
        steps.append((options.clients, read_clients))
    if options.tls_cert:
        steps.append((options.tls_cert, read_certificate))
    for path, step in steps:
        try:
            step()
        except (LogError, ClientListError, StartError) as error:
            logger.error("SIGHUP: %s; what was in force stays in force", error)
        else:
            logger.info("SIGHUP: %s is opened again", path)


if __name__ == "__main__":
    sys.exit(main())
