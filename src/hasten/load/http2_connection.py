"""One HTTP/2 connection of a client, and its calls: frames in and out, both windows, everything bounded."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from hasten.load.recorder import OK, Recorder
from hasten.load.target import GRPC_STREAMS
from hasten.protocol import http2_frames as h2
from hasten.protocol.http2_frames import Broken, Code

FRAME_BYTES = 1 << 20
WINDOW = h2.LARGEST_WINDOW
TOP_UP = WINDOW // 2
LARGEST_BLOCK_BYTES = 1 << 16
LARGEST_NUMBER = 2**31 - 3
"""Of a stream: then a connection is used up."""
HEADER_TABLE_ID = 1


class Pool(Protocol):
    """What a connection belongs to, and tells what becomes of its calls."""

    recorder: Recorder
    loop: asyncio.AbstractEventLoop
    wire: Sequence[bytes]
    """Each payload's message, with its prefix."""
    block: bytes
    """The headers of a call."""
    open_connections: set[Connection]

    def ended(self, index: int) -> None:
        """A call is over."""

    def fail(self, index: int, reason: str, *, unreached: bool = False) -> None:
        """A call has no answer."""

    def refuse(self, index: int, payload: int | None = None) -> None:
        """A call was turned away before it was looked at."""

    def again(self, index: int, payload: int) -> None:
        """A call was never looked at, and may go elsewhere."""

    def lost(self, connection: Connection) -> None:
        """A connection takes no more calls."""


class Stream:
    """One call."""

    __slots__ = ("index", "payload", "received", "rest", "window")

    def __init__(self, index: int, payload: int, window: int) -> None:
        self.index = index
        self.payload = payload
        self.received = 0
        self.window = window
        self.rest: memoryview | None = None
        """What of its message has not gone out yet."""


class Connection(asyncio.Protocol):
    """One HTTP/2 connection and its calls."""

    def __init__(self, sender: Pool) -> None:
        self.room = GRPC_STREAMS
        """Calls that it takes beside those it has."""
        self.greeted = sender.loop.create_future()
        self._sender = sender
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Stream] = {}
        self._numbers: dict[int, int] = {}
        self._early: dict[int, int] = {}
        """Calls that wait for the server's first SETTINGS: it may take fewer than there are."""
        self._next = 1
        self._streams_allowed = GRPC_STREAMS
        self._window = h2.FIRST_WINDOW
        self._first_window = h2.FIRST_WINDOW
        self._frame = h2.FIRST_FRAME_BYTES
        self._receive_left = WINDOW
        self._rest = b""
        self._block: tuple[int, int, bytearray] | None = None
        self._retired = False
        """It takes no more calls, and closes once those that it has are over."""

    # calls

    def call(self, index: int, payload: int) -> None:
        """Let a call go."""
        self.room -= 1
        if not self.greeted.done():
            self._early[index] = payload
        else:
            self._start(index, payload)

    def _start(self, index: int, payload: int) -> None:
        number, self._next = self._next, self._next + 2
        block, message = self._sender.block, self._sender.wire[payload]
        stream = Stream(index, payload, self._first_window)
        self._streams[number], self._numbers[index] = stream, number
        head = h2.frame(h2.HEADERS, h2.END_HEADERS, number, block)
        size = len(message)
        if size <= self._window and size <= stream.window and size <= self._frame:
            self._window -= size
            stream.window -= size
            self._write(b"".join((head, _data_head(size, h2.END_STREAM, number), message)))
        else:
            stream.rest = memoryview(message)
            self._write(head)
            self._pump(number, stream)
        if self._next > LARGEST_NUMBER:
            self._retire()

    def _pump(self, number: int, stream: Stream) -> None:
        """Send what the windows let through."""
        while stream.rest is not None:
            size = min(len(stream.rest), self._window, stream.window, self._frame)
            if size <= 0:
                return
            piece, rest = stream.rest[:size], stream.rest[size:]
            self._window -= size
            stream.window -= size
            stream.rest = rest if len(rest) else None
            flags = 0 if len(rest) else h2.END_STREAM
            self._write(b"".join((_data_head(size, flags, number), piece)))

    def withdraw(self, index: int) -> None:
        """Drop a call."""
        self.room += 1
        self._early.pop(index, None)
        number = self._numbers.pop(index, None)
        if number is not None:
            self._streams.pop(number, None)
            self._write(h2.reset(number, Code.CANCEL))
        self._close_if_over()

    def abort(self) -> None:
        """Cut it."""
        if self._transport is not None:
            self._transport.abort()

    def fail_all(self, reason: str, *, unreached: bool) -> None:
        """No call of this connection has an answer."""
        indexes = [*self._early, *(stream.index for stream in self._streams.values())]
        self._early.clear()
        self._streams.clear()
        self._numbers.clear()
        for index in indexes:
            self._sender.fail(index, reason, unreached=unreached)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet, and start what waited."""
        self._transport = transport  # type: ignore[assignment]
        self._sender.open_connections.add(self)
        held = transport.get_extra_info("socket")
        if held is not None:
            held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours = {HEADER_TABLE_ID: 0, h2.WINDOW_ID: WINDOW, h2.FRAME_ID: FRAME_BYTES, h2.LIST_ID: LARGEST_BLOCK_BYTES}
        self._write(h2.PREFACE + h2.settings(ours) + h2.window_update(0, WINDOW - h2.FIRST_WINDOW))
        self._sender.recorder.reached()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone, and its calls with it."""
        self._transport = None
        self._sender.open_connections.discard(self)
        self._sender.lost(self)
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionResetError("it closed the connection; is it a gRPC port?"))
            self.greeted.exception()  # seen: where nobody waits for it, that is no fault
        self.fail_all("closed the connection", unreached=False)

    def data_received(self, data: bytes) -> None:
        """Take frames."""
        try:
            self._frames(self._rest + data if self._rest else data)
        except Broken as error:
            self._sender.lost(self)
            self.fail_all(f"answered what is no HTTP/2: {error}", unreached=False)
            self.abort()

    # frames

    def _frames(self, data: bytes) -> None:
        at, end = 0, len(data)
        while end - at >= h2.HEAD_BYTES:
            high, low, kind, flags, number = h2.HEAD.unpack_from(data, at)
            length = high << 16 | low
            if length > FRAME_BYTES:
                raise Broken(Code.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            if end - at - h2.HEAD_BYTES < length:
                break
            at += h2.HEAD_BYTES
            take = FRAMES.get(kind)
            if take is not None:
                take(self, flags, number & 0x7FFFFFFF, data[at : at + length])
            at += length
        self._rest = data[at:]

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        view = h2.unpadded(flags, memoryview(payload))
        if flags & h2.WITH_PRIORITY:
            view = view[5:]
        self._take_block(number, flags, bytearray(view))

    def _continuation(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != number:
            raise Broken(Code.PROTOCOL_ERROR, "a continuation of nothing")
        _, first, block = self._block
        self._take_block(number, first | flags & h2.END_HEADERS, block + payload)

    def _take_block(self, number: int, flags: int, block: bytearray) -> None:
        if len(block) > LARGEST_BLOCK_BYTES:
            raise Broken(Code.ENHANCE_YOUR_CALM, f"headers over {LARGEST_BLOCK_BYTES} bytes")
        self._block = None if flags & h2.END_HEADERS else (number, flags, block)
        stream = self._streams.get(number)
        if self._block is not None or stream is None:
            return
        if not stream.received:
            self._sender.recorder.began(stream.index)
        stream.received += len(block) + h2.HEAD_BYTES
        if flags & h2.END_STREAM:
            self._end(number, stream, bytes(block))

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_left -= size
        if self._receive_left < TOP_UP:
            self._write(h2.window_update(0, WINDOW - self._receive_left))
            self._receive_left = WINDOW
        stream = self._streams.get(number)
        if stream is None:
            return
        if not stream.received:
            self._sender.recorder.began(stream.index)
        stream.received += size + h2.HEAD_BYTES
        if stream.received > TOP_UP:
            raise Broken(Code.FLOW_CONTROL_ERROR, f"an answer of more than {TOP_UP} bytes")
        if flags & h2.END_STREAM:
            self._forget(number, stream)
            self._sender.fail(stream.index, "ended a call without a status")

    def _end(self, number: int, stream: Stream, block: bytes) -> None:
        self._forget(number, stream)
        if stream.rest is not None:
            self._write(h2.reset(number, Code.NO_ERROR))
        recorder = self._sender.recorder
        recorder.told[stream.index] = block
        self._sender.ended(stream.index)
        recorder.answer(stream.index, OK, -1, stream.received)  # ``settle`` reads what it really is

    def _forget(self, number: int, stream: Stream) -> None:
        del self._streams[number]
        self._numbers.pop(stream.index, None)
        self.room += 1
        if self._retired:
            self._close_if_over()

    def _reset(self, flags: int, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None:
            return
        self._forget(number, stream)
        code = int.from_bytes(payload, "big")
        if code == Code.REFUSED_STREAM:
            self._sender.refuse(stream.index, stream.payload)
        elif code == Code.ENHANCE_YOUR_CALM:
            self._sender.refuse(stream.index)
        else:
            self._sender.fail(stream.index, f"reset the call (HTTP/2 code {code})")

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if flags & h2.ACK:
            return
        found = h2.read_settings(memoryview(payload))
        self._frame = min(found.get(h2.FRAME_ID, self._frame), FRAME_BYTES)
        if h2.MAX_STREAMS_ID in found:
            allowed = min(found[h2.MAX_STREAMS_ID], GRPC_STREAMS)
            self.room += allowed - self._streams_allowed
            self._streams_allowed = allowed
        if h2.WINDOW_ID in found:
            more = found[h2.WINDOW_ID] - self._first_window
            self._first_window += more
            for stream in self._streams.values():
                stream.window += more
        self._write(h2.frame(h2.SETTINGS, h2.ACK, 0))
        if not self.greeted.done():
            self.greeted.set_result(None)
            self._start_early()
        self._pump_all()

    def _start_early(self) -> None:
        """Start what waited, as far as the server takes it; the rest goes elsewhere."""
        early, self._early = self._early, {}
        for place, (index, payload) in enumerate(early.items()):
            if place < self._streams_allowed:
                self._start(index, payload)
            else:
                self.room += 1
                self._sender.again(index, payload)

    def _window_update(self, flags: int, number: int, payload: bytes) -> None:
        more = int.from_bytes(payload, "big") & 0x7FFFFFFF
        if number == 0:
            self._window += more
            self._pump_all()
        elif number in self._streams:
            stream = self._streams[number]
            stream.window += more
            self._pump(number, stream)

    def _pump_all(self) -> None:
        for number, stream in list(self._streams.items()):
            if stream.rest is not None:
                self._pump(number, stream)

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if not flags & h2.ACK:
            self._write(h2.frame(h2.PING, h2.ACK, 0, payload))

    def _goaway(self, flags: int, number: int, payload: bytes) -> None:
        """Take no more calls here; those that the server never looked at go over another connection."""
        self._retire()
        last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
        for later in [found for found in self._streams if found > last]:
            stream = self._streams[later]
            self._forget(later, stream)
            self._sender.again(stream.index, stream.payload)
        self._close_if_over()

    def _retire(self) -> None:
        self._retired = True
        self._sender.lost(self)

    def _close_if_over(self) -> None:
        if self._retired and not self._streams and self._transport is not None:
            self._transport.close()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


Take = Callable[[Connection, int, int, bytes], None]
FRAMES: dict[int, Take] = {
    h2.DATA: Connection._data,
    h2.HEADERS: Connection._headers,
    h2.CONTINUATION: Connection._continuation,
    h2.RST_STREAM: Connection._reset,
    h2.SETTINGS: Connection._settings,
    h2.WINDOW_UPDATE: Connection._window_update,
    h2.PING: Connection._ping,
    h2.GOAWAY: Connection._goaway,
}
"""PRIORITY and unknown frames mean nothing to a client; PUSH_PROMISE never comes, for gRPC has none."""


def _data_head(size: int, flags: int, number: int) -> bytes:
    return h2.HEAD.pack(size >> 16, size & 0xFFFF, h2.DATA, flags, number)
