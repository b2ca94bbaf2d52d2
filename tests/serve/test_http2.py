"""HTTP/2 by raw frames: what is no protocol, what floods, windows, and grpcio's own client with large messages."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

pytest.importorskip("hpack", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc.aio
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.protocol import http2_frames as h2
from hasten.protocol.http2_frames import Code, frame
from hasten.serve.http2 import Http2Server
from hasten.serve.http2_connection import CONNECTION_WINDOW, CONTINUATIONS, STREAMS, Route
from hasten.serve.http2_guards import CREDIT, HeaderBlocks
from hasten.serve.http2_messages import DEADLINE_EXCEEDED, LARGEST_STREAMED_BYTES
from hasten.serve.http2_stream import MOST_UNREAD_BYTES, RESOURCE_EXHAUSTED, Call
from hasten.serve.limits import Limits
from hasten.serve.wheel import TICK_S
from serve.wire import Clock, run, within

LIMITS = Limits(body_bytes=40_000_000, header_bytes=4096)
HELLO = h2.PREFACE + h2.settings({})
PATH = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/s/m"), (b":authority", b"h")]
KIND = (b"content-type", b"application/grpc")


def block(*more: tuple[bytes, bytes]) -> bytes:
    return b"".join(h2.literal(name, value) for name, value in (*PATH, KIND, *more))


def opening(number: int, *more: tuple[bytes, bytes], flags: int = h2.END_HEADERS) -> bytes:
    return frame(h2.HEADERS, flags, number, block(*more))


def message(body: bytes) -> bytes:
    return b"\x00" + len(body).to_bytes(4, "big") + body


def request(number: int, body: bytes = b"hi") -> bytes:
    return opening(number) + frame(h2.DATA, h2.END_STREAM, number, message(body))


def test_a_header_block_means_what_the_table_makes_of_it_each_time() -> None:
    blocks, newest = HeaderBlocks(4096), b"\xbe"
    for name in (b"x", b"y"):
        assert blocks.decode(b"\x40\x01" + name + b"\x011") == {name: b"1"}
        assert blocks.decode(newest) == {name: b"1"}
        assert blocks.decode(newest) is blocks.decode(newest)
    assert blocks.decode(b"\x20" + b"\x3f\xe1\x1f" + b"\x82") == {b":method": b"GET"}  # empties the table
    with pytest.raises(h2.Broken):
        blocks.decode(newest)


class Peer:
    """A raw client that reads frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the server may have closed already
            self.writer.write(data)
            await self.writer.drain()

    async def frame(self) -> tuple[int, int, int, bytes]:
        """Read one frame: type, flags, stream, payload."""
        high, low, kind, flags, number = h2.HEAD.unpack(await within(self.reader.readexactly(9)))
        return kind, flags, number, await within(self.reader.readexactly(high << 16 | low))

    async def until(self, kind: int) -> tuple[int, int, bytes]:
        """Read up to the next frame of a type: flags, stream, payload."""
        while True:
            got, flags, number, payload = await self.frame()
            if got == kind:
                return flags, number, payload

    async def status(self, number: int) -> int:
        """Read up to the end of a call: its gRPC status."""
        while True:
            flags, of, payload = await self.until(h2.HEADERS)
            if of == number and flags & h2.END_STREAM:
                text = payload.split(b"grpc-status")[1]
                return int(text[1 : 1 + text[0]])

    async def ended_with(self) -> Code:
        """Read up to GOAWAY, and see the connection closed."""
        _, _, payload = await self.until(h2.GOAWAY)
        with contextlib.suppress(ConnectionError):
            await within(self.reader.read(-1))
        return Code(struct.unpack(">LL", payload[:8])[1])


class Wire:
    def __init__(self, server: Http2Server, clock: Clock, port: int) -> None:
        self.server = server
        self.clock = clock
        self.port = port
        self.peers: list[Peer] = []

    async def peer(self, hello: bytes = HELLO) -> Peer:
        made = Peer(*await asyncio.open_connection("127.0.0.1", self.port))
        self.peers.append(made)
        await made.send(hello)
        return made

    async def until(self, happened: Callable[[], bool]) -> None:
        async def turn() -> None:
            while not happened():
                await asyncio.sleep(0)

        await within(turn())

    def advance(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.server.tick()


class Ignores:
    """A connection that sends nothing."""

    def pump(self, call: Call) -> None:
        """It does not."""


def test_a_call_ends_once_whatever_it_is_told_later() -> None:
    call = Call(Ignores(), 1, {b":path": b"/x"})
    call.fail(5, "first")
    ended = call.trailers
    call.fail(14, "second")
    call.respond(b"third")
    assert (call.status, call.trailers, call.out) == (5, ended, [])
    assert ended is not None
    assert b"first" in ended


@asynccontextmanager
async def wire(route: Route, limits: Limits = LIMITS) -> AsyncIterator[Wire]:
    """Open a server on a free port; at the end it holds nothing any more."""
    clock = Clock()
    server = Http2Server(opened=lambda call: None, route=route, limits=limits, clock_s=clock)
    listening = await asyncio.get_running_loop().create_server(server.protocol, "127.0.0.1", 0)
    made = Wire(server, clock, listening.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        listening.close()
        server.abort()
        for peer in made.peers:
            peer.writer.close()
            with contextlib.suppress(OSError):
                await peer.writer.wait_closed()
        await made.until(lambda: not server.connections)
        assert (server.calls, server.buffered_bytes) == (0, 0)


def echo(call: Call) -> None:
    call.respond(call.message)


class Held:
    """A route that keeps its calls until the test answers them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.left: list[int] = []

    def __call__(self, call: Call) -> None:
        number = call.id
        call.leave = lambda: self.left.append(number)
        self.calls.append(call)


def test_a_call_is_answered_with_headers_a_message_and_trailers() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            await peer.send(request(1))
            assert (await peer.until(h2.HEADERS))[:2] == (h2.END_HEADERS, 1)
            assert (await peer.until(h2.DATA))[2] == message(b"hi")
            flags, number, trailers = await peer.until(h2.HEADERS)
            assert (flags, number) == (h2.END_HEADERS | h2.END_STREAM, 1)
            assert b"grpc-status\x010" in trailers

    run(test)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=30), st.binary(max_size=300))
def test_a_call_means_the_same_however_its_bytes_are_cut(cuts: list[int], body: bytes) -> None:
    pieces = [message(body)[at : at + 50] for at in range(0, len(body) + 5, 50)]
    data = opening(1, flags=0)[:-20]
    whole = block()
    data = frame(h2.HEADERS, 0, 1, whole[:30]) + frame(h2.CONTINUATION, h2.END_HEADERS, 1, whole[30:])
    data += b"".join(frame(h2.DATA, 0, 1, piece) for piece in pieces) + frame(h2.DATA, h2.END_STREAM, 1)
    stream = HELLO + data

    async def test() -> None:
        async with wire(echo) as server:
            peer, at = await server.peer(b""), 0
            for cut in cuts:
                await peer.send(stream[at : at + cut])
                await server.until(lambda: True)
                at += cut
            await peer.send(stream[at:])
            assert (await peer.until(h2.DATA))[2] == message(body)

    run(test)


BROKEN: dict[str, tuple[bytes, Code]] = {
    "HTTP/1.1": (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", Code.PROTOCOL_ERROR),
    "a frame that is too large": (HELLO + h2.HEAD.pack(1, 1, h2.DATA, 0, 1), Code.FRAME_SIZE_ERROR),
    "data of a stream that is not open": (HELLO + frame(h2.DATA, 0, 1, b"x"), Code.PROTOCOL_ERROR),
    "a reset of a stream that was never open": (HELLO + h2.reset(5, Code.CANCEL), Code.PROTOCOL_ERROR),
    "an even stream": (HELLO + opening(2), Code.PROTOCOL_ERROR),
    "a promise": (HELLO + frame(h2.PUSH_PROMISE, 0, 1, b"\x00" * 4), Code.PROTOCOL_ERROR),
    "a continuation of nothing": (HELLO + frame(h2.CONTINUATION, 0, 1, b""), Code.PROTOCOL_ERROR),
    "a frame within a header block": (
        HELLO + opening(1, flags=0) + frame(h2.PING, 0, 0, b"\x00" * 8),
        Code.PROTOCOL_ERROR,
    ),
    "a ping of the wrong size": (HELLO + frame(h2.PING, 0, 0, b"abc"), Code.FRAME_SIZE_ERROR),
    "a ping of a stream": (HELLO + frame(h2.PING, 0, 1, b"\x00" * 8), Code.PROTOCOL_ERROR),
    "settings of a stream": (HELLO + frame(h2.SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "a first frame that is none of settings": (h2.PREFACE + frame(h2.PING, 0, 0, b"\x00" * 8), Code.PROTOCOL_ERROR),
    "settings that acknowledge and set": (HELLO + frame(h2.SETTINGS, h2.ACK, 0, b"\x00" * 6), Code.FRAME_SIZE_ERROR),
    "a goaway that is too short": (HELLO + frame(h2.GOAWAY, 0, 0, b"\x00" * 7), Code.FRAME_SIZE_ERROR),
    "a goaway of a stream": (HELLO + frame(h2.GOAWAY, 0, 1, b"\x00" * 8), Code.PROTOCOL_ERROR),
    "a priority of the wrong size": (HELLO + frame(h2.PRIORITY, 0, 1, b"\x00" * 4), Code.FRAME_SIZE_ERROR),
    "a priority of no stream": (HELLO + frame(h2.PRIORITY, 0, 0, b"\x00" * 5), Code.PROTOCOL_ERROR),
    "settings of the wrong size": (HELLO + frame(h2.SETTINGS, 0, 0, b"abc"), Code.FRAME_SIZE_ERROR),
    "a window that is too large": (HELLO + h2.window_update(0, h2.LARGEST_WINDOW), Code.FLOW_CONTROL_ERROR),
    "settings of a window that is too large": (HELLO + h2.settings({h2.WINDOW_ID: 2**31}), Code.FLOW_CONTROL_ERROR),
    "a window update of nothing": (HELLO + h2.window_update(0, 0), Code.PROTOCOL_ERROR),
    "padding longer than its frame": (
        HELLO + opening(1) + frame(h2.DATA, h2.PADDED, 1, b"\x09abc"),
        Code.PROTOCOL_ERROR,
    ),
    "headers that cannot be decoded": (
        HELLO + frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff"),
        Code.COMPRESSION_ERROR,
    ),
    "headers that are too large": (HELLO + opening(1, (b"x", b"y" * 5000)), Code.ENHANCE_YOUR_CALM),
    "headers that grow too large": (
        # One entry of the table, named a thousand times: the block is small, the list is not.
        HELLO + frame(h2.HEADERS, h2.END_HEADERS, 1, b"\x40\x01x\x7f\x01" + b"y" * 128 + b"\xbe" * 1000),
        Code.COMPRESSION_ERROR,
    ),
    "continuations without end": (
        HELLO + opening(1, flags=0) + frame(h2.CONTINUATION, 0, 1, b"") * (CONTINUATIONS + 1),
        Code.ENHANCE_YOUR_CALM,
    ),
    "pings without end": (HELLO + frame(h2.PING, 0, 0, b"\x00" * 8) * int(CREDIT + 10), Code.ENHANCE_YOUR_CALM),
    "settings without end": (HELLO + h2.settings({}) * int(CREDIT + 10), Code.ENHANCE_YOUR_CALM),
    "priorities without end": (
        HELLO + frame(h2.PRIORITY, 0, 1, b"\x00" * 5) * int(CREDIT + 10),
        Code.ENHANCE_YOUR_CALM,
    ),
    "window updates without end": (HELLO + h2.window_update(0, 1) * int(CREDIT + 10), Code.ENHANCE_YOUR_CALM),
    "empty data without end": (
        HELLO + opening(1) + frame(h2.DATA, 0, 1) * int(CREDIT + 10),
        Code.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_the_protocol_or_floods_ends_the_connection_with_its_code(case: str) -> None:
    data, wanted = BROKEN[case]

    def hold(call: Call) -> None:
        return

    async def test() -> None:
        async with wire(hold) as server:
            peer = await server.peer(data)
            assert await peer.ended_with() == wanted

    run(test)


def test_calls_that_are_opened_and_reset_at_once_use_up_the_credit() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer = await server.peer()
            for number in range(1, 2 * int(CREDIT) + 50, 2):
                await peer.send(request(number) + h2.reset(number, Code.CANCEL))
            assert await peer.ended_with() == Code.ENHANCE_YOUR_CALM

    run(test)


def test_cancelling_now_and_then_is_no_flood() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            for number in range(1, 6 * int(CREDIT), 2):
                data = request(number)
                await peer.send(data if number % 4 == 1 else opening(number) + h2.reset(number, Code.CANCEL))
                if number % 4 == 1:
                    await peer.until(h2.DATA)
                    await peer.send(h2.window_update(0, 7))
            assert len(server.server.connections) == 1

    run(test)


def test_one_stream_more_than_allowed_is_refused_and_the_others_go_on() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer = await server.peer()
            await peer.send(b"".join(request(2 * n + 1) for n in range(STREAMS + 1)))
            _, number, payload = await peer.until(h2.RST_STREAM)
            assert (number, int.from_bytes(payload, "big")) == (2 * STREAMS + 1, Code.REFUSED_STREAM)
            assert len(route.calls) == STREAMS
            route.calls[0].respond(b"done")
            assert (await peer.until(h2.DATA))[2] == message(b"done")

    run(test)


def test_a_reset_and_a_closed_connection_cancel_what_was_asked_for() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer = await server.peer()
            await peer.send(request(1) + request(3) + request(5))
            await server.until(lambda: len(route.calls) == 3)
            await peer.send(h2.reset(3, Code.CANCEL))
            await server.until(lambda: route.left == [3])
            route.calls[1].respond(b"too late")
            peer.writer.close()
            await server.until(lambda: sorted(route.left) == [1, 3, 5])

    run(test)


def test_an_answer_waits_for_the_clients_windows() -> None:
    body = bytes(range(256)) * 400

    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer(h2.PREFACE + h2.settings({h2.WINDOW_ID: 1000}))
            head = opening(1)
            parts = [message(body)[at : at + 16_000] for at in range(0, len(body) + 5, 16_000)]
            await peer.send(head + b"".join(frame(h2.DATA, 0, 1, part) for part in parts))
            await peer.send(frame(h2.DATA, h2.END_STREAM, 1))
            got = (await peer.until(h2.DATA))[2]
            assert len(got) == 1000
            await peer.send(h2.settings({h2.WINDOW_ID: 5000}))
            got += (await peer.until(h2.DATA))[2]
            assert len(got) == 5000
            await peer.send(h2.window_update(1, 200_000) + h2.window_update(0, 200_000))
            while len(got) < len(body) + 5:
                got += (await peer.until(h2.DATA))[2]
            assert got == message(body)
            assert (await peer.until(h2.HEADERS))[0] & h2.END_STREAM

    run(test)


def test_an_answer_that_is_not_read_for_long_is_given_up_and_others_go_on() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer = await server.peer(h2.PREFACE + h2.settings({h2.WINDOW_ID: 8}))
            await peer.send(request(1) + request(3) + request(5))
            await server.until(lambda: len(route.calls) == 3)
            route.calls[0].respond(b"longer than the window")
            server.advance(LIMITS.write_s / 2)
            route.calls[1].respond(b"longer than the window, too")
            assert (await peer.until(h2.DATA))[1:] == (1, message(b"longer than the window")[:8])
            server.advance(LIMITS.write_s / 2 + 1)
            assert (await peer.until(h2.RST_STREAM))[1:] == (1, struct.pack(">L", Code.CANCEL))
            await peer.send(h2.window_update(3, 100))
            await server.until(lambda: server.server.calls == 1)
            server.advance(LIMITS.write_s + 1)
            route.calls[2].respond(b"in time")
            await server.until(lambda: route.calls[2].started)
            assert server.server.calls == 1
            server.advance(LIMITS.write_s + 1)
            await server.until(lambda: not server.server.calls)

    run(test)


def test_answers_that_wait_behind_others_of_a_client_that_reads_are_not_given_up() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer = await server.peer(h2.PREFACE + h2.settings({h2.WINDOW_ID: 2**20}))
            await peer.send(request(1) + request(3))
            await server.until(lambda: len(route.calls) == 2)
            for call in route.calls:
                call.respond(b"x" * 300_000)  # the connection's window lets 65,535 bytes through
            got = 0
            while got < 2 * 300_005:
                data = (await peer.until(h2.DATA))[2]
                got += len(data)
                if got % 65_535 == 0 or got == 2 * 300_005:
                    server.advance(LIMITS.write_s * 0.7)
                    await peer.send(h2.window_update(0, 65_535))
            await server.until(lambda: not server.server.calls)
            assert not route.left

    run(test)


def test_an_upload_behind_an_unread_answer_has_its_own_time_and_is_watched_to_the_end() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer = await server.peer(h2.PREFACE + h2.settings({h2.WINDOW_ID: 8}))
            await peer.send(request(1))
            await server.until(lambda: len(route.calls) == 1)
            route.calls[0].respond(b"longer than the window")
            server.advance(LIMITS.write_s - 5)
            (connection,) = server.server.connections
            half = message(b"y" * 1_000_000)[:200_000]
            parts = [frame(h2.DATA, 0, 3, half[at : at + 10_000]) for at in range(0, len(half), 10_000)]
            await peer.send(opening(3) + b"".join(parts))
            await server.until(lambda: len(connection.calls[3].body) == 200_000)
            server.advance(LIMITS.body_s + 1)  # fast enough; the answer, unread, goes
            assert set(connection.calls) == {3}
            server.advance(LIMITS.body_s + 1)  # and now it stalls
            assert await peer.status(3) == DEADLINE_EXCEEDED
            assert not connection.calls

    run(test)


def test_a_client_that_sends_more_than_its_window_is_told_so() -> None:
    async def test() -> None:
        async with wire(Held()) as server:
            peer = await server.peer()
            server.server.opened = lambda call: setattr(call, "on_message", lambda message: None)
            await peer.send(opening(1))
            await server.until(lambda: bool(server.server.calls))
            (connection,) = server.server.connections
            connection._calls[1].receive_left = 10  # nothing gives it back before half of it is used
            await peer.send(frame(h2.DATA, 0, 1, message(b"twelve bytes")))
            assert await peer.ended_with() is Code.FLOW_CONTROL_ERROR

    run(test)


def test_a_stream_whose_answers_are_not_read_is_ended() -> None:
    """A short question may have an answer a thousand times as long, and nobody may ask for all of memory."""

    async def test() -> None:
        asked: list[Call] = []

        def opened(call: Call) -> None:
            asked.append(call)
            call.on_message = lambda message: call.send(b"x" * 10_000)

        async with wire(Held()) as server:
            server.server.opened = opened
            peer = await server.peer(h2.PREFACE + h2.settings({h2.WINDOW_ID: 0}))
            await peer.send(opening(1) + frame(h2.DATA, 0, 1, message(b"?") * 500))
            await server.until(lambda: bool(asked) and asked[0].trailers is not None)
            for _ in range(100):
                await peer.send(frame(h2.DATA, 0, 1, message(b"?") * 500))
            assert asked[0].status == RESOURCE_EXHAUSTED
            assert sum(map(len, asked[0].out)) < MOST_UNREAD_BYTES + 20_000
            await peer.send(h2.settings({h2.WINDOW_ID: 2**20}) + h2.window_update(0, 2**20))
            flags, _, _ = await peer.until(h2.HEADERS)
            assert not flags & h2.END_STREAM
            assert (await peer.until(h2.HEADERS))[0] & h2.END_STREAM

    run(test)


WRONG = {
    "a message cut short": (message(b"abc")[:-1], 3),
    "no message": (b"", 3),
    "two messages": (message(b"a") * 2, 3),
    "a compressed message": (b"\x01\x00\x00\x00\x01x", 12),
    "a message over the limit": (b"\x00\xff\xff\xff\xff", 8),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_message_that_cannot_be_taken_ends_its_call_alone(case: str) -> None:
    data, wanted = WRONG[case]

    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            await peer.send(opening(1) + frame(h2.DATA, h2.END_STREAM, 1, data) + request(3))
            trailers = b""
            while b"grpc-status" not in trailers:
                trailers = (await peer.until(h2.HEADERS))[2]
            status = trailers.split(b"grpc-status")[1]
            assert int(status[1 : 1 + status[0]]) == wanted
            while (await peer.until(h2.DATA))[1] != 3:
                continue

    run(test)


@pytest.mark.parametrize("hello", [b"", h2.PREFACE[:10], HELLO])
def test_a_client_that_says_nothing_is_let_go(hello: bytes) -> None:
    async def test() -> None:
        async with wire(echo) as server:
            await server.peer(hello)
            await server.until(lambda: len(server.server.connections) == 1)
            for _ in range(20):
                await server.until(lambda: True)
            server.advance(LIMITS.idle_s + LIMITS.header_s)
            server.advance(LIMITS.linger_s + TICK_S)  # for one that does not close when it is told
            await server.until(lambda: not server.server.connections)

    run(test)


def test_a_client_that_drips_its_message_is_timed_out() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            await peer.send(opening(1))
            await server.until(lambda: server.server.calls == 1)
            for _ in range(3):
                await peer.send(frame(h2.DATA, 0, 1, b"\x00"))
                for _ in range(20):
                    await server.until(lambda: True)
                server.advance(4.0)
            assert await peer.status(1) == DEADLINE_EXCEEDED

    run(test)


@pytest.mark.usefixtures("gone_at_the_end")
def test_a_client_that_resets_its_connection_just_before_its_end_is_let_go() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            await server.peer()
            await server.until(lambda: len(server.server.connections) == 1)
            server.server.drain()
            await server.until(lambda: not server.server.connections)

    asyncio.run(test())  # uvloop says nothing there


def test_a_connection_whose_descriptor_is_kept_for_others_is_told_so() -> None:
    async def test() -> None:
        async with wire(echo, replace(LIMITS, descriptors=0)) as server:
            assert await (await server.peer()).ended_with() == Code.ENHANCE_YOUR_CALM

    run(test)


def test_a_client_that_drips_a_frame_is_let_go() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            await peer.send(opening(1))
            await server.until(lambda: server.server.calls == 1)
            for byte in h2.HEAD.pack(0, 3, h2.DATA, 0, 1)[:3]:
                await peer.send(bytes([byte]))
                for _ in range(20):
                    await server.until(lambda: True)
                server.advance(4.0)
            assert await peer.ended_with() == Code.ENHANCE_YOUR_CALM

    run(test)


def test_a_call_that_stalls_ends_alone() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer = await server.peer()
            await peer.send(request(1) + opening(3))
            await server.until(lambda: server.server.calls == 2)
            server.advance(LIMITS.body_s + 1)
            assert await peer.status(3) == DEADLINE_EXCEEDED
            assert not route.left
            route.calls[0].respond(b"in its time")
            assert (await peer.until(h2.DATA))[1:] == (1, message(b"in its time"))

    run(test)


def test_a_call_that_stalls_beside_others_that_do_not_ends_too_and_one_that_is_slow_goes_on() -> None:
    fast = b"".join(frame(h2.DATA, 0, 5, b"\x00" * 60_000) for _ in range(3))
    slow = frame(h2.DATA, 0, 3, b"\x00" * 1000)  # who shares a connection that is fast has to bring 64 bytes a second

    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            await peer.send(opening(1) + opening(3) + opening(5))
            await peer.send(b"".join(frame(h2.DATA, 0, number, message(bytes(500_000))[:5]) for number in (3, 5)))
            await server.until(lambda: server.server.calls == 3)
            (connection,) = server.server.connections
            for size in (180_005, 360_005):
                await peer.send(slow + fast)
                await server.until(lambda size=size: len(connection.calls[5].body) == size)
                server.advance(LIMITS.body_s + 0.5)
                assert set(connection.calls) == {3, 5}
            assert await peer.status(1) == DEADLINE_EXCEEDED

    run(test)


def test_a_call_that_begins_between_two_looks_has_its_own_time() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            await peer.send(opening(1))
            await server.until(lambda: server.server.calls == 1)
            server.advance(LIMITS.body_s - 1)
            await peer.send(opening(3))
            await server.until(lambda: server.server.calls == 2)
            server.advance(2.0)
            assert await peer.status(1) == DEADLINE_EXCEEDED
            assert server.server.calls == 1
            server.advance(LIMITS.body_s + 1)
            assert await peer.status(3) == DEADLINE_EXCEEDED

    run(test)


def streaming(call: Call) -> None:
    call.on_message = lambda message: None


def test_a_streams_message_that_stalls_ends_its_call_and_is_let_go() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            server.server.opened = lambda call: streaming(call) if call.id == 3 else None
            peer = await server.peer()
            await peer.send(request(1) + opening(3) + frame(h2.DATA, 0, 3, message(b"x" * 50_000)[:40_000]))
            await server.until(lambda: server.server.buffered_bytes > 40_000)
            server.advance(LIMITS.body_s + 1)
            assert await peer.status(3) == DEADLINE_EXCEEDED
            assert server.server.buffered_bytes == len(message(b"hi"))
            assert not route.left

    run(test)


def test_a_streams_message_is_no_longer_than_a_question() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            server.server.opened = streaming
            peer = await server.peer()
            long = (LARGEST_STREAMED_BYTES + 1).to_bytes(4, "big")
            await peer.send(opening(1) + frame(h2.DATA, 0, 1, b"\x00" + long))
            assert await peer.status(1) == RESOURCE_EXHAUSTED
            assert server.server.buffered_bytes == 0

    run(test)


def test_a_stream_may_be_silent_between_its_messages_and_is_not_ended_for_many_that_come_in_pieces() -> None:
    half, rest = message(b"question")[:6], message(b"question")[6:]

    async def test() -> None:
        async with wire(echo) as server:
            server.server.opened = streaming
            peer = await server.peer()
            await peer.send(opening(1) + frame(h2.DATA, 0, 1, half))
            await server.until(lambda: server.server.buffered_bytes == len(half))
            for _ in range(5):  # each time another message is not whole when the connection is looked at
                await peer.send(frame(h2.DATA, 0, 1, rest + half))
                for _ in range(20):
                    await server.until(lambda: True)
                server.advance(LIMITS.body_s + 1)
            await peer.send(frame(h2.DATA, 0, 1, rest))
            await server.until(lambda: server.server.buffered_bytes == 0)
            for _ in range(5):
                server.advance(LIMITS.body_s + 1)
            assert server.server.calls == 1

    run(test)


def test_a_client_whose_calls_are_answered_may_rest_for_the_idle_time_and_is_told_when_it_is_over() -> None:
    async def test() -> None:
        async with wire(echo) as server:
            peer = await server.peer()
            await peer.send(opening(1))
            await server.until(lambda: server.server.calls == 1)
            await peer.send(frame(h2.DATA, h2.END_STREAM, 1, message(b"hi")))
            await peer.until(h2.DATA)
            server.advance(LIMITS.body_s * 2)
            assert len(server.server.connections) == 1
            server.advance(LIMITS.idle_s)
            assert await peer.ended_with() == Code.NO_ERROR

    run(test)


def test_draining_answers_what_is_open_and_refuses_the_rest() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            peer, idle = await server.peer(), await server.peer()
            await peer.send(request(1))
            await server.until(lambda: len(route.calls) == 1 and len(server.server.connections) == 2)
            for _ in range(20):
                await server.until(lambda: True)
            server.server.drain()
            await idle.send(request(1))  # on its way before the client could know
            assert await idle.ended_with() == Code.NO_ERROR
            await peer.until(h2.GOAWAY)
            await peer.send(request(3))
            assert (await peer.until(h2.RST_STREAM))[1] == 3
            route.calls[0].respond(b"done")
            assert (await peer.until(h2.DATA))[2] == message(b"done")
            assert len(server.server.connections) == 2, "what is still on its way is read, so that nothing is reset"
            server.advance(LIMITS.linger_s + TICK_S)
            await server.until(lambda: not server.server.connections)

    run(test)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(frame, st.integers(0, 11), st.integers(0, 255), st.integers(0, 5), st.binary(max_size=30)),
            st.sampled_from([request(1), request(3), opening(5), h2.settings({h2.WINDOW_ID: 0})]),
        ),
        max_size=12,
    )
)
def test_no_frames_at_all_bring_the_server_down_or_leave_anything_behind(frames: list[bytes]) -> None:
    async def test() -> None:
        problems: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        async with wire(echo) as server:
            peer = await server.peer()
            for data in frames:
                await peer.send(data)
                await server.until(lambda: True)
            with contextlib.suppress(OSError, RuntimeError):  # the server may have closed already
                peer.writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await within(peer.reader.read(-1))
        assert problems == []

    run(test)


@pytest.fixture
def large() -> Iterator[bytes]:
    yield bytes(range(256)) * 80_000


def test_grpcios_own_client_sends_and_reads_large_messages_many_at_once(large: bytes) -> None:
    async def test() -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        async with (
            wire(echo, replace(LIMITS, body_bytes=len(large))) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel,
        ):
            assert len(large) > CONNECTION_WINDOW
            call = channel.unary_unary("/s/m")
            small = [call(b"%d" % number, timeout=30) for number in range(300)]
            assert await call(large, timeout=60) == large
            assert [await each for each in small] == [b"%d" % number for number in range(300)]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(large + b"x", timeout=60)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert caught.value.trailing_metadata()["reason"] == "too_large", "coming again would not help"

    run(test)


def test_grpcios_own_client_cancels_and_gives_up_by_its_deadline() -> None:
    async def test() -> None:
        route = Held()
        async with (
            wire(route) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            waiting = channel.unary_unary("/s/m")(b"1")
            await server.until(lambda: len(route.calls) == 1)
            waiting.cancel()
            await server.until(lambda: len(route.left) == 1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/s/m")(b"2", timeout=0.05)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await server.until(lambda: len(route.left) == 2)

    run(test)


def test_one_connection_too_many_is_greeted_before_it_is_told_so() -> None:
    async def test() -> None:
        async with wire(echo, replace(LIMITS, connections=1)) as server:
            first = await server.peer()
            await first.until(h2.SETTINGS)
            second = await server.peer()
            assert (await second.frame())[0] == h2.SETTINGS
            assert await second.ended_with() is Code.ENHANCE_YOUR_CALM

    run(test)
