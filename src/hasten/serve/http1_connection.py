"""One HTTP/1.1 connection, behind a ``doors.BufferedDoor``: parsing by llhttp, one call stack per request, no tasks.

It knows nothing of models. A connection reads into the server's one scratch buffer; a body that does not end in the
same read gets a buffer of its own, sized from Content-Length after the limits were checked, and the socket is then read
straight into it. Each complete request goes to ``route``, which calls ``request.respond`` at once or later; answers
leave in the order of the requests. Requests that came in one read wait as they came where as many as may be are in
work, or where the client does not read. Bounds and timeouts are those of ``Limits``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from math import inf
from time import perf_counter_ns
from typing import Final

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

from hasten.serve.cork import Cork
from hasten.serve.http1_bodies import room
from hasten.serve.http1_checks import framing, problem_of, problem_of_part
from hasten.serve.http1_heads import LONGEST_HEAD, Heads, keep_head
from hasten.serve.http1_request import FULL, Buffer, Request, defective, error_body
from hasten.serve.http1_unread import Unread
from hasten.serve.limits import Limits, one_too_many
from hasten.serve.turns import Turns
from hasten.serve.wheel import TICK_S, Wheel

Route = Callable[[Request], None]

SCRATCH_BYTES: Final = 256 * 2**10
LARGEST_WHOLE: Final = 64 * 2**10
"""Reads up to this size are looked at for a head that is known."""
ONE_PIECE: Final = 4 * 2**10
"""Reads below this size are parsed as they are where at most one head ends in them."""
JOIN_BYTES: Final = 64 * 2**10
"""Answers up to this size are joined into one write; larger ones go out as they lie."""


class Common:
    """What the connections of one event loop share; ``Http1Server`` is it."""

    def __init__(
        self,
        route: Route,
        *,
        limits: Limits,
        clock_s: Callable[[], float],
        log: Callable[[Request], None] | None = None,
        cork: Cork | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.route = route
        self.cork = cork or Cork()
        self.turns = turns or Turns()
        self.limits = limits
        self.clock_s = clock_s
        self.log = log
        self.connections: set[Connection] = set()
        self.surplus: set[Connection] = set()
        """Those of them that are over the limit, and may read why."""
        self.wheel: Wheel[Connection] = Wheel(TICK_S, clock_s())
        self.scratch_bytes = bytearray(SCRATCH_BYTES)
        self.scratch = memoryview(self.scratch_bytes)
        """What every connection reads into: a read is parsed, or what is left of it kept, before the loop goes on to
        the next."""
        self.heads: Heads = {}
        """Heads that were parsed before, by their bytes: most clients send the same one again and again."""
        self.requests = 0
        self.buffered_bytes = 0
        self.date = date_line()
        self.draining = False
        """Every answer closes its connection, so that none is left when the port goes."""


def date_line() -> bytes:
    """Give the header Date of now, as a whole line."""
    return f"Date: {formatdate(usegmt=True)}\r\n".encode()


class Connection:
    """One client. All methods run on the event loop's thread."""

    __slots__ = (
        *("_body", "_body_began_s", "_chunked", "_continue", "_deaf", "_direct", "_fed", "_filled", "_head"),
        *("_header_bytes", "_headers", "_in_headers", "_in_message", "_kept", "_length", "_outstanding", "_parser"),
        *("_paused", "_peer", "_read_ns", "_reading", "_request", "_server", "_target", "_timed", "_transport"),
        *("_unread", "deadline_s", "fresh", "slot"),
    )

    def __init__(self, server: Common) -> None:
        self.deadline_s = inf
        self.slot = 0
        self.fresh = True
        """No request has come yet: one may be on its way, and nobody sends it again over a new connection."""
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = HttpRequestParser(self)
        self._outstanding: deque[Request] = deque()
        self._peer = ""
        self._deaf = False
        """What comes is thrown away: a refusal is on its way, or the connection is over."""
        self._paused = False
        self._unread: Unread | None = None
        """What the client had still to read when its reading was last looked at, where it keeps this server waiting."""
        self._reading = True
        self._kept = b""
        """Requests of the last read that wait until the client reads, or until those before them are answered."""
        self._continue = False
        self._direct = False
        self._read_ns = 0
        self._head = b""
        """The bytes of the head that is parsed, where they came in one read."""
        self._begin()

    def _begin(self) -> None:
        """Make ready for the next message."""
        self._in_message = False
        self._in_headers = False
        self._chunked = False
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._fed = 0
        self._length = 0
        self._filled = 0
        self._body: Buffer = b""
        self._body_began_s = 0.0
        self._timed = False
        self._request: Request | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a client in, or turn it away where too many are here."""
        server = self._server
        self._transport = transport  # type: ignore[assignment]
        name = transport.get_extra_info("peername")
        self._peer = str(name[0]) if isinstance(name, tuple) else ""
        held = len(server.connections) - len(server.surplus)
        if one_too_many(held, server.limits, transport):
            if len(server.surplus) < server.limits.surplus:  # what it sends unread would bring a reset, not the answer
                server.surplus.add(self)
                server.connections.add(self)
            self._read_ns = perf_counter_ns()
            self._refuse(503, f"the server has {held} open connections, its limit; try again")
            return
        server.connections.add(self)
        self._arm(server.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: nobody waits for what is in work."""
        server = self._server
        server.connections.discard(self)
        server.surplus.discard(self)
        server.wheel.forget(self)
        self._transport, self._deaf = None, True
        if self._request is not None:
            server.buffered_bytes -= self._filled
            self._request = None
        self._drop()
        self._body = self._kept = b""
        self._parser = None  # type: ignore[assignment]  # it refers back to this object

    def eof_received(self) -> bool:
        """A client that closes its side has left: what it asked for is cancelled."""
        return False

    def pause_writing(self) -> None:
        """The client does not read: take no more of its requests."""
        self._paused = True
        self._watch_reading()
        self._await_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        if not self._deaf:
            self._unread = None
        self._watch_reading()
        self._rest()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Give what the socket is read into: the body itself, or the server's scratch."""
        if self._direct:
            return memoryview(self._body)[self._filled :]
        return self._server.scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        if self._direct:
            self._fill(nbytes)
            return
        if self._deaf or (self._outstanding and not self._outstanding[-1].keep_alive):
            return  # nothing may follow a request that closes
        self._read_ns = perf_counter_ns()
        self._server.turns.reads(self._read_ns)
        if self._in_message or nbytes > LARGEST_WHOLE:
            self._take(self._server.scratch_bytes, 0, nbytes)
            return
        whole = self._server.scratch[:nbytes].tobytes()
        at = self._known(whole)
        if at < nbytes and not self._deaf:
            self._take(whole, at, nbytes)

    def _fill(self, nbytes: int) -> None:
        """Take a part of a body that was read straight into its buffer."""
        server = self._server
        problem = problem_of_part(server, nbytes, size=self._filled + nbytes)
        if problem is not None:
            self._refuse(*problem)
            return
        server.buffered_bytes += nbytes
        self._filled += nbytes
        if self._filled == self._length:
            self._direct = False
            self._parser = HttpRequestParser(self)  # the old one still waits for the body that went past it
            self._read_ns = perf_counter_ns()
            server.turns.reads(self._read_ns)
            self._dispatch()
            self._rest()
        elif self._filled == len(self._body):
            self._body = room(self._length, self._body)

    def _known(self, data: bytes) -> int:
        """Take the requests that ``data`` begins with, as far as their heads were seen before; give where they end.

        What llhttp said of the same bytes is taken over; a body must have come whole, and within the bounds.
        """
        server, at = self._server, 0
        read_ns, size = self._read_ns, len(data)
        while not server.draining:
            end = data.find(b"\r\n\r\n", at) + 4
            head = server.heads.get(data[at:end]) if end >= 4 else None
            if head is None:
                return at
            length = head.length
            rest, buffered = end + length, server.buffered_bytes + length
            if rest > size or buffered > server.limits.buffered_bytes:
                return at
            body = memoryview(data)[end:rest] if length else b""
            server.buffered_bytes = buffered
            self._hand_on(Request(self, head.method, head.target, head.headers, body, read_ns, self._peer, server.date))
            at = rest
            if at == size or self._deaf or not self._reading:
                return at
        return at

    def _take(self, held: bytes | bytearray, at: int, end: int) -> None:
        """Parse what was read from ``at`` to ``end``, as far as requests may be taken now; keep the rest."""
        # Behind others an answer would have to wait, and a large read has its time for llhttp.
        if not self._in_message and not self._outstanding and end <= LARGEST_WHOLE:
            ends = held.find(b"\r\n\r\n", at, min(end, at + LONGEST_HEAD))
            self._head = bytes(held[at : ends + 4]) if ends >= 0 else b""
        self._parse(held, at, end)
        self._head = b""
        if not self._deaf and self._in_message:
            self._after_part()

    # llhttp's side

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        if self._in_message:
            return
        self._in_message = self._in_headers = True

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target."""
        if self._in_headers:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what comes after the body (trailers) is not used."""
        if not self._in_headers or self._deaf:
            return
        name = name.lower()
        self._header_bytes += len(name) + len(value) + 4
        before = self._headers.get(name)
        self._headers[name] = value if before is None else before + b", " + value
        limits = self._server.limits
        if len(self._headers) > limits.header_count or self._header_bytes > limits.header_bytes:
            self._refuse(431, f"more than {limits.header_count} headers, or {limits.header_bytes} bytes of them")

    def on_headers_complete(self) -> None:
        """Check all that can be checked before the body."""
        if self._deaf or self._request is not None:  # the head is read: this one repeats what it says of its body
            return
        if self._outstanding and not self._outstanding[-1].keep_alive:
            self._deaf = True  # nothing may follow a request that closes
            return
        parser = self._parser
        self._in_headers = False
        headers = self._headers
        request = Request(self, parser.get_method(), self._target, headers)
        request.began_ns, request.peer = self._read_ns, self._peer
        version = parser.get_http_version()
        request.old = version == "1.0"
        self._chunked = b"transfer-encoding" in headers
        # HTTP/1.0 knows no chunks: where such a message ends is not to be trusted.
        lasting = parser.should_keep_alive() and not (request.old and self._chunked)
        request.keep_alive = lasting and not self._server.draining
        length = 0 if self._chunked else int(headers.get(b"content-length", b"0"))
        size = len(self._target) + self._header_bytes
        problem = problem_of(request, server=self._server, version=version, head_bytes=size, length=length)
        if problem is not None:
            self._refuse(*problem)
            return
        self._request, self._length = request, length
        if b"expect" in headers and not request.old:
            self._continue = True

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        if self._deaf:
            return
        if self._chunked:
            self._grow(data)
            return
        self._body = data if len(data) == self._length else room(self._length, data)
        self._filled = len(data)
        self._server.buffered_bytes += len(data)

    def on_message_complete(self) -> None:
        """Hand the request on."""
        if self._deaf or (self._parser.should_upgrade() and (self._length or self._chunked)):
            return  # llhttp takes what follows an offer of another protocol for that protocol: the body is to come
        self._dispatch()

    # a request's way

    def _parse(self, held: bytes | bytearray, at: int, end: int) -> None:
        view = memoryview(held)
        while at < end and not self._deaf:
            if not self._in_message and not self._reading:
                self._kept = bytes(view[at:end])
                return
            alone = self._request is None and end - at < ONE_PIECE
            cut = end if alone and held.count(b"\r\n\r\n", at, end) < 2 else self._cut(held, at, end)
            self._fed += cut - at
            try:
                self._parser.feed_data(view[at:cut])
            except HttpParserUpgrade as upgrade:  # an offer of another protocol is not taken up: go on with this one
                cut = at + upgrade.args[0]
                self._parser = HttpRequestParser(self)
                if self._request is not None:
                    self._parser.feed_data(framing(self._length, chunked=self._chunked))
            except HttpParserCallbackError:
                raise  # a defect of ours, not the client's
            except HttpParserError as error:
                if not self._deaf:
                    self._refuse(400, f"this is no HTTP/1.1 request: {error}")
                return
            at = cut

    def _cut(self, held: bytes | bytearray, at: int, end: int) -> int:
        """Say up to where to parse at once: behind the next place where a message may end, so that the next can wait.

        One ends with its head, with its body, whose length is known, or with the empty line behind its chunks.
        """
        if self._request is not None and not self._chunked:
            return min(end, at + self._length - self._filled)
        found = held.find(b"\r\n\r\n", at, end)
        return found + 4 if found >= 0 else end

    def _grow(self, data: bytes) -> None:
        """Append to a chunked body, whose length nobody knows beforehand."""
        server = self._server
        size = self._filled + len(data)
        problem = problem_of_part(server, len(data), size=size)
        if problem is not None:
            self._refuse(*problem)
            return
        if not isinstance(self._body, bytearray):
            self._body = bytearray()
        self._body += data
        self._filled = self._length = size
        server.buffered_bytes += len(data)

    def _after_part(self) -> None:
        """A read ended within a message: bound what is held of it, and its time."""
        limits = self._server.limits
        if self._in_headers:
            if self._fed > limits.header_bytes:
                self._refuse(431, f"the target and the headers are over {limits.header_bytes} bytes")
            elif not self._timed and not self._outstanding:
                self._timed = True  # once: later pieces of the same headers win no time
                self._arm(limits.header_s)
            return
        if self._chunked:
            # Chunk sizes and trailers are held by the parser; with chunks of one byte they are five times the body.
            if self._fed - self._filled > 2 * limits.header_bytes + 8 * self._filled:
                self._refuse(431, "the body's chunk headers or trailers are too long")
                return
        else:
            if self._filled == 0:
                self._body = room(self._length)
            self._direct = True
        if not self._body_began_s:
            self._body_began_s = self._server.clock_s()
            self._arm(limits.body_s)
        self._say_continue()

    def _say_continue(self) -> None:
        if self._continue and not self._outstanding and self._transport is not None:
            self._continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _dispatch(self) -> None:
        """Hand a complete request to the route, with its place in the order of answers."""
        request = self._request
        if request is None:
            return
        request.body = self._body
        request.date = self._server.date
        head, self._head = self._head, b""  # what follows in the same read has a head of its own
        if head and self._length == len(request.body) and not self._chunked and not self._continue:
            keep_head(self._server.heads, head, request, self._length)
        self._continue = False
        self._begin()
        self._hand_on(request)

    def _hand_on(self, request: Request) -> None:
        server = self._server
        limits, outstanding = server.limits, self._outstanding
        self.fresh = False
        outstanding.append(request)
        server.requests = requests = server.requests + 1
        if not self._paused:  # else the time to read the answers before it runs on
            self.deadline_s = inf
        if len(outstanding) >= limits.pipelined:
            self._watch_reading()
        if requests > limits.requests:
            text = f"{limits.requests} requests are in work, the server's limit; try again"
            request.refuse(503, text, FULL)
            return
        try:
            server.route(request)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is told
            defective(request, error)

    def replied(self, request: Request) -> None:
        """Write every answer whose turn it is, together with others where a batch is being answered."""
        if self._server.cork.active:
            self._server.cork.hold(self)
        else:
            self.flush()

    def flush(self) -> None:
        """Write every answer whose turn it is."""
        outstanding, server = self._outstanding, self._server
        while outstanding and (parts := outstanding[0].reply) is not None:
            transport = self._transport
            if transport is None:
                return
            done = outstanding.popleft()
            if self._unread is not None:
                self._unread.add(len(parts[0]) + (done.reply_bytes if len(parts) > 1 else 0))
            if done.reply_bytes > JOIN_BYTES and len(parts) > 1:
                transport.writelines(parts)
            else:
                transport.write(b"".join(parts))
            if done.waiter is not None:
                done.waiter.sent()
            self._release(done)
            if server.log is not None:
                server.log(done)
            if not done.keep_alive:
                self._drop()
                self._close()
                return
        if not self._reading and len(outstanding) < server.limits.pipelined:
            self._watch_reading()
        if not outstanding:
            if self._deaf or self._paused or self._continue or self._in_message:
                self._rest()
            else:
                server.wheel.arm(self, server.clock_s() + server.limits.idle_s)

    def _drop(self) -> None:
        """Let go of what is still in work: nobody will read the answers."""
        while self._outstanding:
            request = self._outstanding.popleft()
            if request.reply is None and request.leave is not None:
                request.leave()
            self._release(request)

    def _release(self, request: Request) -> None:
        request.leave = request.waiter = None  # they refer back to the request: nothing is left to the collector
        server = self._server
        server.requests -= 1
        server.buffered_bytes -= len(request.body)

    # the end

    def _refuse(self, status: int, text: str) -> None:
        """Say why what comes cannot be read, after the answers before it, and close."""
        self._deaf, self._direct = True, False
        if self._request is not None:
            self._server.buffered_bytes -= self._filled
            self._request = None
        self._body, self._filled = b"", 0
        refused = Request(self, b"", self._target, {})
        refused.began_ns, refused.peer, refused.keep_alive = self._read_ns, self._peer, False
        refused.date = self._server.date
        self._server.requests += 1
        self._outstanding.append(refused)
        refused.respond(status, error_body(text), extra=FULL if status == 503 else b"")

    def _close(self) -> None:
        """Close once all is written. After a refusal, throw away for a while what the client still sends."""
        transport = self._transport
        if transport is None:
            return
        if self._deaf and transport.can_write_eof() and self in self._server.connections:
            try:
                transport.write_eof()
            except OSError:  # the client has reset it: asyncio's own loop says so here
                transport.abort()
                return
            if not self._reading:
                self._reading = True
                transport.resume_reading()
            if not transport.get_write_buffer_size():
                self._arm(self._server.limits.linger_s)
                return
        else:
            self._deaf = True
            transport.close()
        self._await_reading()

    def close_if_idle(self) -> None:
        """Close where no request has begun and none is in work."""
        if not self._outstanding and not self._in_message and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def timed_out(self) -> None:
        """The deadline is over; which one it was follows from what the connection waits for."""
        server, transport = self._server, self._transport
        if transport is None or (self._deaf and self._outstanding and not self._paused):
            return  # what is in work has its time, whatever came behind it
        if self._deaf or self._paused:
            left_bytes, rate = transport.get_write_buffer_size(), server.limits.body_rate
            if self._unread is not None and self._unread.shrinks(left_bytes, server.clock_s(), rate):
                self._await_reading()
            else:
                transport.abort()
        elif self._in_message and not self._in_headers:
            limits = server.limits
            allowed_s = self._body_began_s + limits.body_s + self._filled / limits.body_rate
            if server.clock_s() < allowed_s:
                self.deadline_s = allowed_s
                server.wheel.arm(self, allowed_s)
            else:
                self._refuse(408, f"the body came slower than {limits.body_rate:.0f} bytes per second")
        elif self._timed:
            self._refuse(408, f"the headers took more than {server.limits.header_s:g} s")
        elif not self._outstanding and transport.get_write_buffer_size():
            transport.abort()  # the answer before has been left unread for as long
        elif not self._outstanding:
            transport.close()

    def _rest(self) -> None:
        """Set the deadline of a connection that may now wait for the next request."""
        if self._transport is None or self._deaf or self._paused:
            return
        if not self._outstanding:
            if self._continue:
                self._say_continue()
            if not self._in_message:
                self._arm(self._server.limits.idle_s)
            elif self._in_headers and not self._timed:  # a request began behind others: its time runs from now
                self._timed = True
                self._arm(self._server.limits.header_s)

    def _await_reading(self) -> None:
        """Give the client time to read what was written to it."""
        if self._transport is not None:
            self._unread = Unread(self._transport.get_write_buffer_size(), self._server.clock_s())
            self._arm(self._server.limits.write_s)

    def _arm(self, after_s: float) -> None:
        server = self._server
        server.wheel.arm(self, server.clock_s() + after_s)

    def _watch_reading(self) -> None:
        """Read on, or pause, as the client's reading and the requests in work allow."""
        wanted = not self._paused and len(self._outstanding) < self._server.limits.pipelined
        if self._transport is not None and wanted != self._reading:
            self._reading = wanted
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()
            if wanted and self._kept and not self._deaf:
                self._go_on()

    def _go_on(self) -> None:
        """Take the requests that were kept, as if they were read only now."""
        kept, self._kept = self._kept, b""
        self._read_ns = perf_counter_ns()
        at = self._known(kept)
        if at < len(kept) and not self._deaf:
            self._take(kept, at, len(kept))
