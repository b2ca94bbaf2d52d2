"""One HTTP/2 connection for gRPC, framed by hand, behind a ``doors.Door``: one call stack per call, no tasks.

Windows are kept both ways. A peer that floods (resets as in CVE-2023-44487, pings, settings, empty frames, window
updates, continuations) uses up its credit, which calls that are answered and time give back, and is then told
ENHANCE_YOUR_CALM. Header blocks are bounded before they are decoded, and messages before they are kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from math import inf
from time import perf_counter_ns
from typing import Final

from hasten.protocol import http2_frames as h2
from hasten.protocol.http2_frames import Broken, Code
from hasten.serve.codes import DEFECT
from hasten.serve.cork import Cork
from hasten.serve.http2_guards import Arrivals, Credit, HeaderBlocks
from hasten.serve.http2_messages import (
    DEADLINE_EXCEEDED,
    FULL,
    INTERNAL,
    INVALID_ARGUMENT,
    UNAVAILABLE,
    grow,
    is_cut_short,
    take_whole,
)
from hasten.serve.http2_sending import NO_CALLS, Sending
from hasten.serve.http2_stream import Call
from hasten.serve.limits import Limits, one_too_many
from hasten.serve.turns import Turns
from hasten.serve.wheel import TICK_S, Wheel

logger = logging.getLogger(__name__)

Route = Callable[[Call], None]

STREAMS: Final = 256
"""Calls of one connection at once."""
FRAME_BYTES: Final = 65_536
STREAM_WINDOW: Final = 2**20
CONNECTION_WINDOW: Final = 2**24
CONTINUATIONS: Final = 8


class Common:
    """What the connections of one event loop share; ``Http2Server`` is it.

    ``opened`` is called with each call once its headers are there, and may set ``on_message``; ``route`` with each
    unary call once its message is there; ``log`` with each call that was answered, and who had sent it.
    """

    def __init__(
        self,
        *,
        opened: Route,
        route: Route,
        limits: Limits,
        clock_s: Callable[[], float],
        cork: Cork | None = None,
        turns: Turns | None = None,
        log: Callable[[Call, str], None] | None = None,
    ) -> None:
        self.cork = cork or Cork()
        self.turns = turns or Turns()
        self.log = log
        self.opened = opened
        self.route = route
        self.limits = limits
        self.clock_s = clock_s
        self.connections: set[Connection] = set()
        self.wheel: Wheel[Connection] = Wheel(TICK_S, clock_s())
        self.calls = 0
        self.buffered_bytes = 0


class Connection:
    """One client."""

    def __init__(self, server: Common) -> None:
        self.deadline_s = inf
        self.slot = 0
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._blocks = HeaderBlocks(server.limits.header_bytes)
        self._calls: dict[int, Call] = {}
        self._rest = b""
        self._greeted = False
        self._last = 0
        self._block: tuple[int, int, bytearray, int] | None = None
        """A header block that goes on: stream, flags, bytes, continuations."""
        self._receive_left = h2.FIRST_WINDOW
        self._peer_window = h2.FIRST_WINDOW
        self._credit = Credit(server.clock_s())
        self._sending = Sending(self, cork=server.cork, credit=self._credit, write=self._write, clock_s=server.clock_s)
        self.pump = self._sending.pump
        self._came_bytes = 0
        self._looked_s = server.clock_s()
        self._looking = False
        """The deadline is that of bytes that are to come."""
        self._receiving = 0
        """Unary calls whose message has not come whole, and streams in the middle of one."""
        self._arrivals = Arrivals()
        self._draining = False
        self._over = False
        self._peer = ""

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet: our settings, and a window for bodies."""
        server = self._server
        self._transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if peer else ""
        if one_too_many(len(server.connections), server.limits, transport):
            self._sending.write(h2.settings({}))  # whatever is to be said, they come first
            self._end(Code.ENHANCE_YOUR_CALM, "too many connections")
            return
        server.connections.add(self)
        ours = {
            h2.MAX_STREAMS_ID: STREAMS,
            h2.WINDOW_ID: STREAM_WINDOW,
            h2.FRAME_ID: FRAME_BYTES,
            h2.LIST_ID: server.limits.header_bytes,
        }
        more = CONNECTION_WINDOW - self._receive_left
        self._receive_left = CONNECTION_WINDOW
        self._sending.write(h2.settings(ours) + h2.window_update(0, more))
        self._arm(server.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and what it asked for with it."""
        self._server.connections.discard(self)
        self._server.wheel.forget(self)
        self._transport, self._over = None, True
        for call in list(self._calls.values()):
            self._leave(call)
        self._sending.forget()

    def eof_received(self) -> bool:
        """A client that closes has left."""
        return False

    def pause_writing(self) -> None:
        """The client does not read: take nothing from it."""
        self._sending.paused = True
        if self._transport is not None:
            self._transport.pause_reading()
        self._looking = False
        self._arm(self._server.limits.write_s)

    def resume_writing(self) -> None:
        """It reads again."""
        self._sending.paused = False
        if self._transport is not None and not self._over:
            self._transport.resume_reading()
            self._sending.resume()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        if self._over:
            return
        self._came_bytes = self._came_bytes + len(data) if self._looking else len(data)
        self._server.turns.reads(perf_counter_ns())
        try:
            self._frames(self._rest + data if self._rest else data)
        except Broken as error:
            self._end(error.code, str(error))
        else:
            self._watch()

    # frames

    def _frames(self, data: bytes) -> None:
        at, end = 0, len(data)
        if not self._greeted:
            start = data[: len(h2.PREFACE)]
            if not h2.PREFACE.startswith(start):
                raise Broken(Code.PROTOCOL_ERROR, "this is no HTTP/2")
            if end < len(h2.PREFACE) + h2.HEAD_BYTES:
                self._rest = data
                return
            self._greeted, at = True, len(h2.PREFACE)
            if h2.HEAD.unpack_from(data, at)[2] != h2.SETTINGS:
                raise Broken(Code.PROTOCOL_ERROR, "the first frame is none of settings")
        view = memoryview(data)
        while end - at >= h2.HEAD_BYTES and not self._over:
            high, low, kind, flags, number = h2.HEAD.unpack_from(data, at)
            length = high << 16 | low
            if length > FRAME_BYTES:
                raise Broken(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes; the limit is {FRAME_BYTES}")
            if end - at - h2.HEAD_BYTES < length:
                break
            at += h2.HEAD_BYTES
            if self._block is not None and kind != h2.CONTINUATION:
                raise Broken(Code.PROTOCOL_ERROR, "a frame within a header block")
            take = FRAMES.get(kind)
            if take is None:
                self._credit.pay(self._server.clock_s)
            else:
                take(self, flags, number & 0x7FFFFFFF, view[at : at + length])
            at += length
        self._rest = data[at:]

    def _headers(self, flags: int, number: int, payload: memoryview) -> None:
        payload = h2.unpadded(flags, payload)
        if flags & h2.WITH_PRIORITY:
            payload = payload[5:]
        self._take_block(number, flags, bytearray(payload), 0)

    def _continuation(self, flags: int, number: int, payload: memoryview) -> None:
        if self._block is None or self._block[0] != number:
            raise Broken(Code.PROTOCOL_ERROR, "a continuation of nothing")
        _, first, block, count = self._block
        block += payload
        if count >= CONTINUATIONS:
            raise Broken(Code.ENHANCE_YOUR_CALM, f"more than {CONTINUATIONS} continuations")
        self._block = None
        self._take_block(number, first | flags & h2.END_HEADERS, block, count + 1)

    def _take_block(self, number: int, flags: int, block: bytearray, count: int) -> None:
        if len(block) > self._server.limits.header_bytes:
            raise Broken(Code.ENHANCE_YOUR_CALM, f"headers over {self._server.limits.header_bytes} bytes")
        if not flags & h2.END_HEADERS:
            self._block = (number, flags, block, count)
            return
        headers = self._blocks.decode(bytes(block))
        if number % 2 == 0:
            raise Broken(Code.PROTOCOL_ERROR, f"stream {number} is none of a client's")
        if number <= self._last:
            call = self._calls.get(number)
            if call is None or call.ended:
                self._credit.pay(self._server.clock_s)  # trailers of a call that we have ended
            elif not flags & h2.END_STREAM:
                raise Broken(Code.PROTOCOL_ERROR, "trailers that do not end their stream")
            else:
                self._ended(call)
            return
        self._last = number
        self._open(number, headers, ended=bool(flags & h2.END_STREAM))

    def _open(self, number: int, headers: dict[bytes, bytes], *, ended: bool) -> None:
        server = self._server
        if b":path" not in headers or headers.get(b":method") != b"POST":
            self._credit.pay(self._server.clock_s)
            self._sending.write(h2.reset(number, Code.PROTOCOL_ERROR))
            return
        if self._draining or len(self._calls) >= STREAMS:
            self._credit.pay(self._server.clock_s)
            self._sending.write(h2.reset(number, Code.REFUSED_STREAM))
            return
        call = Call(self, number, headers)
        call.began_ns = perf_counter_ns()
        call.receive_left, call.send_window = STREAM_WINDOW, self._peer_window
        self._calls[number] = call
        server.calls += 1
        if server.calls > server.limits.requests:
            text = f"{server.limits.requests} calls are in work, the server's limit; try again"
            call.fail(UNAVAILABLE, text, FULL)
        elif not headers.get(b"content-type", b"").startswith(b"application/grpc"):
            call.fail(INVALID_ARGUMENT, "this server speaks gRPC: the content type is application/grpc")
        else:
            self._pass_on(server.opened, call)
            if call.on_message is None and call.trailers is None:
                call.counted = True
                self._receiving += 1
            if ended:
                self._ended(call)

    def _data(self, flags: int, number: int, payload: memoryview) -> None:
        self._receive_left -= len(payload)
        if self._receive_left < CONNECTION_WINDOW // 2:
            self._sending.write(h2.window_update(0, CONNECTION_WINDOW - self._receive_left))
            self._receive_left = CONNECTION_WINDOW
        if number == 0 or number > self._last:
            raise Broken(Code.PROTOCOL_ERROR, f"data of stream {number}, which is not open")
        call = self._calls.get(number)
        ended = bool(flags & h2.END_STREAM)
        if call is None or call.ended or call.trailers is not None:
            self._credit.pay(self._server.clock_s)
            if call is not None and ended and not call.ended:
                self._ended(call)
            return
        call.receive_left -= len(payload)
        if call.receive_left < 0:
            raise Broken(Code.FLOW_CONTROL_ERROR, f"more than the window of stream {number} lets through")
        if not payload and not ended:
            self._credit.pay(self._server.clock_s)
        if ended and not call.body and take_whole(self._server, call, flags, payload):
            self._ended(call)
            return
        payload, before = h2.unpadded(flags, payload), len(call.body)
        if not grow(self._server, call, payload):
            return
        if call.on_message is not None:
            self._streamed(call, begins=not before or len(call.body) < before + len(payload))
        if ended:
            self._ended(call)
        elif call.receive_left < STREAM_WINDOW // 2:
            self._sending.write(h2.window_update(number, STREAM_WINDOW - call.receive_left))
            call.receive_left = STREAM_WINDOW

    def _streamed(self, call: Call, *, begins: bool) -> None:
        """A piece of a stream came: what it leaves of a message is waited for; ``begins``: the message is another."""
        counted = bool(call.body)
        self._receiving += counted - call.counted
        call.counted = counted
        if counted and begins:
            self._arrivals.renew(call.id)

    def _ended(self, call: Call) -> None:
        """The client has sent all of a call."""
        call.ended = True
        self._receiving -= call.counted
        call.counted = False
        if call.trailers is not None:
            return
        if call.on_message is not None:
            call.finish()
        elif is_cut_short(call):
            call.fail(INVALID_ARGUMENT, f"the message is cut short after {len(call.body)} bytes")
        else:
            self._pass_on(self._server.route, call)

    def _pass_on(self, route: Route, call: Call) -> None:
        try:
            route(call)
        except Exception:
            logger.exception("a route failed")
            call.fail(INTERNAL, DEFECT)

    def _reset(self, flags: int, number: int, payload: memoryview) -> None:
        if len(payload) != 4:
            raise Broken(Code.FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes")
        if number == 0 or number > self._last:
            raise Broken(Code.PROTOCOL_ERROR, f"a reset of stream {number}, which was never open")
        self._credit.pay(self._server.clock_s)
        call = self._calls.get(number)
        if call is not None:
            self._leave(call)

    def _settings(self, flags: int, number: int, payload: memoryview) -> None:
        h2.of_connection("SETTINGS", number)
        self._credit.pay(self._server.clock_s)
        if flags & h2.ACK:
            if payload:
                raise Broken(Code.FRAME_SIZE_ERROR, "SETTINGS that acknowledge have 0 bytes")
            return
        found = h2.read_settings(payload)
        if h2.FRAME_ID in found:
            self._sending.limit_frames(found[h2.FRAME_ID])
        if h2.WINDOW_ID in found:
            more = found[h2.WINDOW_ID] - self._peer_window
            self._peer_window += more
            for call in list(self._calls.values()):
                self._sending.widen_call(call, more)
        self._sending.write(h2.frame(h2.SETTINGS, h2.ACK, 0))

    def _ping(self, flags: int, number: int, payload: memoryview) -> None:
        if len(payload) != 8:
            raise Broken(Code.FRAME_SIZE_ERROR, "PING has 8 bytes")
        h2.of_connection("PING", number)
        self._credit.pay(self._server.clock_s)
        if not flags & h2.ACK:
            self._sending.write(h2.frame(h2.PING, h2.ACK, 0, bytes(payload)))

    def _window_update(self, flags: int, number: int, payload: memoryview) -> None:
        if len(payload) != 4:
            raise Broken(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes")
        more = int.from_bytes(payload, "big") & 0x7FFFFFFF
        self._credit.pay(self._server.clock_s)
        if more == 0:
            raise Broken(Code.PROTOCOL_ERROR, "a window update of nothing")
        if number == 0:
            self._sending.widen(more)
        elif number > self._last:
            raise Broken(Code.PROTOCOL_ERROR, f"a window of stream {number}, which was never open")
        elif number in self._calls:
            self._sending.widen_call(self._calls[number], more)

    def _refused(self, flags: int, number: int, payload: memoryview) -> None:
        raise Broken(Code.PROTOCOL_ERROR, "a client promises nothing")

    def _priority(self, flags: int, number: int, payload: memoryview) -> None:
        if len(payload) != 5:
            raise Broken(Code.FRAME_SIZE_ERROR, "PRIORITY has 5 bytes")
        if number == 0:
            raise Broken(Code.PROTOCOL_ERROR, "a priority of no stream")
        self._credit.pay(self._server.clock_s)

    def _goaway(self, flags: int, number: int, payload: memoryview) -> None:
        if len(payload) < 8:
            raise Broken(Code.FRAME_SIZE_ERROR, "GOAWAY has 8 bytes or more")
        h2.of_connection("GOAWAY", number)
        self._credit.pay(self._server.clock_s)

    # a call's end

    @property
    def calls(self) -> Mapping[int, Call]:
        """Those that are open; none where the connection is over."""
        return NO_CALLS if self._over else self._calls

    def blocked(self) -> None:
        """The windows hold back what a call has to send: it is unread from now on."""
        self._watch()

    def flushed(self) -> None:
        """What was gathered has been written."""
        if self._draining and not self._calls and self._transport is not None:
            self._let_go()

    def done(self, call: Call) -> None:
        """All of a call was sent."""
        waiter = call.waiter
        self._forget(call)
        if waiter is not None:
            waiter.sent()
        if self._server.log is not None:
            self._server.log(call, self._peer)
        self._watch()

    def _leave(self, call: Call) -> None:
        leave = call.leave
        self._forget(call)
        if leave is not None:
            leave()

    def _forget(self, call: Call) -> None:
        if self._calls.pop(call.id, None) is not None:
            self._server.calls -= 1
            self._server.buffered_bytes -= len(call.body if call.whole is None else call.whole)
            self._receiving -= call.counted
            call.counted = False
            self._sending.unread_s.pop(call.id, None)
        call.connection = call.leave = call.waiter = call.on_message = None
        if not self._sending.gathers:  # else what was gathered is written first
            self.flushed()

    # the end

    def drain(self) -> None:
        """Say that no more calls are taken here, and close once those that are open are answered."""
        if self._draining or self._transport is None:
            return
        self._draining = True
        self._sending.write(h2.goaway(self._last, Code.NO_ERROR))
        for call in list(self._calls.values()):
            if call.on_message is not None:  # such a call ends when its client likes
                call.fail(UNAVAILABLE, "the server is ending")
        if not self._calls:
            self._let_go()

    def _let_go(self) -> None:
        """Close our side, and read on for a while: a call on its way would bring a reset that eats the last answer."""
        transport = self._transport
        if transport is None:
            return
        self._over = True
        if transport.can_write_eof() and not self._sending.paused:
            try:
                transport.write_eof()
            except OSError:  # the client has reset it: asyncio's own loop says so here
                transport.abort()
                return
            self._arm(self._server.limits.linger_s)
        else:
            transport.close()
            self._arm(self._server.limits.write_s)

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _end(self, code: Code, text: str) -> None:
        """Tell the client what it did, and close."""
        if self._transport is not None:
            self._sending.write(h2.goaway(self._last, code, text))
            self._over = True
            self._transport.close()
            self._arm(self._server.limits.write_s)
        for call in list(self._calls.values()):
            self._leave(call)

    def timed_out(self) -> None:
        """The deadline is over: of a greeting, of bytes that were to come, of an answer unread, or of idleness."""
        server, now_s = self._server, self._server.clock_s()
        self.deadline_s = inf  # it is used up
        if self._sending.paused or not self._greeted or self._over:
            self.abort()
            return
        for number, since_s in list(self._sending.unread_s.items()):
            if now_s - since_s >= server.limits.write_s:
                self._sending.write(h2.reset(number, Code.CANCEL))
                self._leave(self._calls[number])
        if self._incomplete():
            self._end_stalled(now_s)
            self._watch()
        elif self._sending.unread_s:
            self._watch()
        elif not self._calls:
            self.drain()

    def _end_stalled(self, now_s: float) -> None:
        """End the calls whose messages stall; the connection, where a frame or a header block does."""
        rate = self._server.limits.body_rate
        enough, came = rate * (now_s - self._looked_s), self._came_bytes
        self._came_bytes, self._looked_s = 0, now_s
        text = f"less than {rate:.0f} bytes per second"
        if came < enough and (self._rest or self._block is not None):
            self._end(Code.ENHANCE_YOUR_CALM, text)
            return
        # Who shares a connection that is fast enough has to bring a share, however many share it.
        for number in self._arrivals.stalled(self._calls, self._last, enough if came < enough else enough / STREAMS):
            self._calls[number].fail(DEADLINE_EXCEEDED, f"the message stalls: {text}")

    def _incomplete(self) -> bool:
        if self._block is not None or self._rest:
            return True
        return self._receiving > 0

    def _watch(self) -> None:
        """Set the deadline by what the connection waits for."""
        limits = self._server.limits
        if self._over or self._sending.paused or not self._greeted:
            return
        if self._incomplete():
            if not self._looking:
                self._looking, self._looked_s = True, self._server.clock_s()
                self._arrivals.begin(self._last)
                self._arm(limits.body_s)
            elif self.deadline_s == inf:  # it was looked at
                self._arm(limits.body_s)
            return
        self._looking = False
        if self._sending.unread_s:
            self._server.wheel.arm(self, min(self._sending.unread_s.values()) + limits.write_s)
        elif self._calls:
            self._server.wheel.arm(self, inf)
        else:
            self._arm(limits.idle_s)

    def _arm(self, after_s: float) -> None:
        self._server.wheel.arm(self, self._server.clock_s() + after_s)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._over:
            self._transport.write(data)


Take = Callable[[Connection, int, int, memoryview], None]
FRAMES: dict[int, Take] = {
    h2.DATA: Connection._data,
    h2.HEADERS: Connection._headers,
    h2.PRIORITY: Connection._priority,
    h2.RST_STREAM: Connection._reset,
    h2.SETTINGS: Connection._settings,
    h2.PUSH_PROMISE: Connection._refused,
    h2.PING: Connection._ping,
    h2.GOAWAY: Connection._goaway,
    h2.WINDOW_UPDATE: Connection._window_update,
    h2.CONTINUATION: Connection._continuation,
}
