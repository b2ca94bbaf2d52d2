"""Load over gRPC: HTTP/2 framed by hand, many calls on one connection; messages of answers are counted, not kept.

We tell the server that our header table has no room (RFC 7541, section 4.2), so that each block of headers can be read
by itself: trailers are kept as they came, and read once the run is over.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from hpack import Decoder, HPACKError

from hasten.client.http import trusted
from hasten.errors import NoAnswer
from hasten.load.connect import OPEN_S, Place, connect_failure, connection_limit, find_place
from hasten.load.payloads import Payload
from hasten.load.recorder import ERROR, OK, REFUSED, TIMEOUT, Recorder
from hasten.load.target import GRPC_STREAMS, Target
from hasten.protocol import http2_frames as h2
from hasten.protocol.http2_frames import Broken, Code, literal

FRAME_BYTES = 1 << 20
WINDOW = h2.LARGEST_WINDOW
TOP_UP = WINDOW // 2
LARGEST_BLOCK_BYTES = 1 << 16
LARGEST_NUMBER = 2**31 - 3
"""Of a stream: then a connection is used up."""
HEADER_TABLE_ID = 1
OUTCOME_OF = {b"0": OK, b"8": REFUSED, b"14": REFUSED, b"4": TIMEOUT}
METHOD = b"/inference.GRPCInferenceService/ModelInfer"


class Http2Sender:
    """A pool of connections to one server: a new one is opened where all that there are carry all they may."""

    def __init__(self, target: Target, payloads: Sequence[Payload], loop: asyncio.AbstractEventLoop) -> None:
        self.recorder = Recorder(began_ns=0, ended=lambda index: None)
        self.loop = loop
        self.address = target.address
        self.wire = [payload.data for payload in payloads if isinstance(payload.data, bytes)]
        self.block = _request_block(target)
        self.context = trusted(self.address)
        if self.context is not None:
            self.context.set_alpn_protocols(["h2"])
        self._limit = connection_limit(target.connections)
        self.open_connections: set[Connection] = set()
        self._connections: list[Connection] = []
        """Those that take calls."""
        self._carriers: dict[int, Connection] = {}
        self._waiting: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._place: Place | None = None

    async def open(self) -> None:
        """Find the server and open a first connection. Raises NoAnswer: nobody is there, or it speaks no HTTP/2."""
        self._place = await find_place(self.address, self.loop)
        first = Connection(self)
        try:
            async with asyncio.timeout(OPEN_S):
                await self._reach(first)
        except OSError as error:  # a TimeoutError is one
            raise NoAnswer(f"{self.address.url} gives no answer: {connect_failure(error)}") from error
        try:
            await asyncio.wait_for(first.greeted, OPEN_S)
        except TimeoutError as error:
            raise NoAnswer(f"{self.address.url} does not greet as HTTP/2 does; is it a gRPC port?") from error
        except OSError as error:
            raise NoAnswer(f"{self.address.url} gives no answer: {connect_failure(error)}") from error
        self._connections.append(first)

    def begin(self, recorder: Recorder) -> None:
        """Tell this recorder from now on."""
        for index, connection in list(self._carriers.items()):
            connection.withdraw(index)
        self._carriers.clear()
        self._waiting.clear()
        self.recorder = recorder

    def send(self, index: int, payload: int) -> None:
        """Let a call go over the first connection that has room."""
        connection = self._with_room()
        if connection is None:
            self._waiting[index] = payload
            return
        self._carriers[index] = connection
        self.recorder.let_go(index)
        connection.call(index, payload)

    def withdraw(self, index: int) -> None:
        """Tell the server that nobody waits any more."""
        connection = self._carriers.pop(index, None)
        if connection is not None:
            connection.withdraw(index)
        self._waiting.pop(index, None)

    def settle(self, recorder: Recorder) -> None:
        """Read the trailers that were kept."""
        read: dict[bytes, dict[bytes, bytes]] = {}
        for index, block in enumerate(recorder.told):
            if block is None:
                continue
            if block not in read:
                read[block] = _headers(block)
            headers = read[block]
            status = headers.get(b"grpc-status", b"")
            recorder.outcome[index] = OUTCOME_OF.get(status, ERROR)
            recorder.status[index] = int(status) if status.isdigit() and len(status) < 4 else -1
            recorder.told[index] = headers.get(b"server-timing")

    def close(self) -> None:
        """Cut every connection."""
        for connection in list(self.open_connections):
            connection.abort()
        for task in self._tasks:
            task.cancel()

    # what connections tell

    def ended(self, index: int) -> None:
        """A call is over; what waits may take its place."""
        self._carriers.pop(index, None)
        self._next_waiting()

    def fail(self, index: int, reason: str, *, unreached: bool = False) -> None:
        """A call has no answer."""
        self._carriers.pop(index, None)
        self.recorder.fail(index, reason, unreached=unreached)
        self._next_waiting()

    def refuse(self, index: int) -> None:
        """A call was turned away before it was looked at (REFUSED_STREAM, ENHANCE_YOUR_CALM)."""
        self._carriers.pop(index, None)
        self.recorder.answer(index, REFUSED, -1, 0)
        self._next_waiting()

    def again(self, index: int, payload: int) -> None:
        """Send a call once more that the server said it never looked at (RFC 9113, 6.8)."""
        connection = self._with_room()
        if connection is None:
            self.refuse(index)
        else:
            self._carriers[index] = connection
            connection.call(index, payload)

    def lost(self, connection: Connection) -> None:
        """A connection takes no more calls."""
        if connection in self._connections:
            self._connections.remove(connection)

    def _next_waiting(self) -> None:
        if self._waiting:
            first = next(iter(self._waiting))
            self.send(first, self._waiting.pop(first))

    # connecting

    def _with_room(self) -> Connection | None:
        """Give the first connection that takes a call, a new one where none does; None: there are too many."""
        for connection in self._connections:
            if connection.room > 0:
                return connection
        return self._connect() if len(self._connections) < self._limit else None

    def _connect(self) -> Connection:
        connection = Connection(self)
        self._connections.append(connection)

        async def reach() -> None:
            try:
                await self._reach(connection)
            except OSError as error:
                self.lost(connection)
                connection.fail_all(connect_failure(error), unreached=True)

        task = self.loop.create_task(reach())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return connection

    async def _reach(self, connection: Connection) -> None:
        assert self._place is not None  # noqa: S101 - open() comes first
        place = self._place
        await self.loop.create_connection(
            lambda: connection,
            host=place.host,
            port=place.port,
            family=place.family,
            ssl=self.context,
            server_hostname=self.address.host if self.context else None,
        )


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

    def __init__(self, sender: Http2Sender) -> None:
        self.room = GRPC_STREAMS
        """Calls that it takes beside those it has."""
        self.greeted = sender.loop.create_future()
        self._sender = sender
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Stream] = {}
        self._numbers: dict[int, int] = {}
        self._early: dict[int, int] = {}
        """Calls that wait for the connection to be open."""
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
        if self._transport is None:
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
        early, self._early = self._early, {}
        for index, payload in early.items():
            self._start(index, payload)

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
        if code in (Code.REFUSED_STREAM, Code.ENHANCE_YOUR_CALM):
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
        self._pump_all()

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


def _request_block(target: Target) -> bytes:
    """Write the headers of a call, the same bytes for every one."""
    address = target.address
    pairs = [
        (b":method", b"POST"),
        (b":scheme", b"https" if address.secure else b"http"),
        (b":path", METHOD),
        (b":authority", address.authority.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"hasten-load"),
    ]
    if address.api_key is not None:
        pairs.append((b"authorization", f"Bearer {address.api_key}".encode()))
    return b"".join(literal(name, value) for name, value in pairs)


def _data_head(size: int, flags: int, number: int) -> bytes:
    return h2.HEAD.pack(size >> 16, size & 0xFFFF, h2.DATA, flags, number)


def _headers(block: bytes) -> dict[bytes, bytes]:
    """Read a block by itself; what cannot be read says nothing, and its call counts as an error."""
    try:
        return dict(Decoder(max_header_list_size=LARGEST_BLOCK_BYTES).decode(block, raw=True))
    except (HPACKError, UnicodeDecodeError):
        return {}
