"""The gRPC sender against servers that say what no good server says: each is an outcome, none ends the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import perf_counter_ns

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("hpack", reason="needs the extra 'serve'")

from hpack import Encoder

from hasten.errors import NoAnswer
from hasten.load.clock import precise_loop
from hasten.load.http2 import Http2Sender
from hasten.load.http2_connection import FRAME_BYTES
from hasten.load.pace import Course, Pace
from hasten.load.payloads import Payload
from hasten.load.recorder import phases_told
from hasten.load.target import Target
from hasten.protocol import http2_frames as h2
from hasten.protocol.http2_frames import Code, literal

OK, REFUSED, TIMEOUT, ERROR, UNSENT = range(5)
OPENING = literal(b":status", b"200") + literal(b"content-type", b"application/grpc")
MESSAGE = b"\0\0\0\0\5hello"
Says = Callable[[int], Iterable[bytes]]


def trailers(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"".join(literal(name, value) for name, value in pairs)


def answer(number: int, last: bytes) -> list[bytes]:
    return [
        h2.frame(h2.HEADERS, h2.END_HEADERS, number, OPENING),
        h2.frame(h2.DATA, 0, number, MESSAGE),
        h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number, last),
    ]


GOOD = trailers((b"grpc-status", b"0"))


class Server(asyncio.Protocol):
    """Answers each whole call with what ``says`` gives for its number on the connection (1, 3, 5, ...)."""

    def __init__(self, says: Says, greeting: bytes, window: int, delay_s: float) -> None:
        self.says, self.greeting, self.window, self.delay_s = says, greeting, window, delay_s
        self.rest, self.greeted = b"", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(self.greeting)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        if not self.greeted:
            assert data.startswith(h2.PREFACE)
            data, self.greeted = data[len(h2.PREFACE) :], True
        while len(data) >= h2.HEAD_BYTES:
            high, low, kind, flags, number = h2.HEAD.unpack_from(data)
            length = high << 16 | low
            if len(data) < h2.HEAD_BYTES + length:
                break
            data = data[h2.HEAD_BYTES + length :]
            if kind == h2.DATA and length and self.window:
                update = h2.window_update(number, length) + h2.window_update(0, length)
                self.transport.write(update)  # type: ignore[attr-defined]
            if kind == h2.DATA and flags & h2.END_STREAM:
                said = b"".join(self.says(number))
                if self.delay_s:
                    asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, said)  # type: ignore[attr-defined]
                else:
                    self.transport.write(said)  # type: ignore[attr-defined]
        self.rest = data


def played(
    says: Says,
    *,
    calls: int = 5,
    message: bytes = b"\0\0\0\0\3abc",
    window: int = 0,
    timeout_s: float = 20.0,
    one_by_one: bool = False,
    limit: int | None = None,
    at_once: bool = False,
    delay_s: float = 0.0,
) -> Pace:
    """Send ``calls`` calls to such a server, at once or each after the one before, and give what came of them."""
    asked = {h2.WINDOW_ID: window or None, h2.MAX_STREAMS_ID: limit}
    greeting = h2.settings({name: value for name, value in asked.items() if value is not None})
    loop = precise_loop()

    async def work() -> Pace:
        servers: list[Server] = []

        def served() -> Server:
            servers.append(Server(says, greeting, window, delay_s))
            return servers[-1]

        listening = await loop.create_server(served, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        target = Target(url=f"grpc://127.0.0.1:{port}", protocol="grpc", model="net")
        sender = Http2Sender(target, [Payload(message, 1)], loop)
        await sender.open()
        course = Course(
            due_ns=np.arange(0 if one_by_one else calls, dtype=np.int64) * (0 if at_once else 1_000_000),
            samples=np.zeros(calls, np.int64),
            concurrency=int(one_by_one),
            duration_ns=calls * (50_000_000 if one_by_one else 1_000_000),
            timeout_ns=int(timeout_s * 1e9),
            began_ns=perf_counter_ns(),
        )
        pace = Pace(course, sender, loop, lambda *args: None)
        await asyncio.wait_for(pace.go(), 60)
        sender.close()
        listening.close()
        for server in servers:
            server.transport.abort()  # type: ignore[attr-defined]
        while sender.open_connections:
            await asyncio.sleep(0)
        return pace

    try:
        return loop.run_until_complete(work())
    finally:
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def outcomes(pace: Pace) -> list[int]:
    return pace.recorder.outcome.tolist()[: len(pace.scheduled)]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(b"0", OK), (b"8", REFUSED), (b"14", REFUSED), (b"4", TIMEOUT), (b"13", ERROR), (b"x", ERROR)],
)
def test_the_status_in_the_trailers_is_the_outcome(status: bytes, outcome: int) -> None:
    pace = played(lambda number: answer(number, trailers((b"grpc-status", status))))
    assert outcomes(pace) == [outcome] * 5
    assert set(pace.recorder.status[:5]) == {int(status) if status.isdigit() else -1}


def test_trailers_may_be_all_that_comes() -> None:
    block = literal(b":status", b"200") + trailers((b"grpc-status", b"14"))
    pace = played(lambda number: [h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number, block)])
    assert outcomes(pace) == [REFUSED] * 5


def test_the_servers_timing_is_read_from_the_trailers() -> None:
    said = b'queue;dur=1.5, infer;dur=0.25, rows;desc="8", instance;desc="2"'
    pace = played(lambda number: answer(number, trailers((b"grpc-status", b"0"), (b"server-timing", said))))
    phases, rows, instance = phases_told(pace.recorder.told[:5])
    assert phases[0].tolist() == [-1, -1, 1_500_000, -1, -1, 250_000, -1, -1, -1]
    assert (rows.tolist(), instance.tolist()) == ([8] * 5, [2] * 5)


def test_trailers_that_a_library_packs_are_read() -> None:
    """Huffman codes, and the resizing of a table that we asked for."""
    encoder = Encoder()
    encoder.header_table_size = 0
    block = encoder.encode([("grpc-status", "0"), ("server-timing", "infer;dur=2.0")], huffman=True)
    pace = played(lambda number: answer(number, block))
    assert outcomes(pace) == [OK] * 5
    assert phases_told(pace.recorder.told[:1])[0][0, 5] == 2_000_000


def test_headers_in_pieces_are_one_block() -> None:
    def says(number: int) -> list[bytes]:
        return [
            h2.frame(h2.HEADERS, h2.END_STREAM, number, GOOD[:4]),
            h2.frame(h2.CONTINUATION, h2.END_HEADERS, number, GOOD[4:]),
        ]

    assert outcomes(played(says)) == [OK] * 5


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(Code.ENHANCE_YOUR_CALM, REFUSED), (Code.CANCEL, ERROR), (Code.NO_ERROR, ERROR)],
)
def test_a_reset_is_an_outcome_of_its_call_alone(code: Code, outcome: int) -> None:
    pace = played(lambda number: [h2.reset(number, code)] if number == 5 else answer(number, GOOD))
    assert outcomes(pace) == [OK, OK, outcome, OK, OK]


def test_a_call_that_was_never_looked_at_goes_once_more_and_not_twice() -> None:
    """RFC 9113, 8.7: a refused stream was not processed."""
    once = played(lambda number: [h2.reset(number, Code.REFUSED_STREAM)] if number == 5 else answer(number, GOOD))
    assert outcomes(once) == [OK] * 5
    always = played(lambda number: [h2.reset(number, Code.REFUSED_STREAM)])
    assert outcomes(always) == [REFUSED] * 5


def test_calls_beyond_what_a_server_takes_on_a_connection_go_over_others() -> None:
    """Its first SETTINGS say how many they are; none goes before."""

    def says(number: int) -> list[bytes]:
        return [h2.reset(number, Code.REFUSED_STREAM)] if number > 2 * 4 else answer(number, GOOD)

    pace = played(says, calls=20, limit=4, at_once=True, delay_s=0.2)
    assert outcomes(pace) == [OK] * 20


def test_a_call_that_ends_without_a_status_is_an_error() -> None:
    pace = played(lambda number: [h2.frame(h2.DATA, h2.END_STREAM, number, MESSAGE)])
    assert outcomes(pace) == [ERROR] * 5
    assert list(pace.recorder.reasons) == ["ended a call without a status"]


def test_a_server_that_goes_away_has_the_next_calls_on_another_connection() -> None:
    def says(number: int) -> list[bytes]:
        return [*answer(number, GOOD), h2.goaway(number, Code.NO_ERROR)]

    found = outcomes(played(says, one_by_one=True))
    assert found == [OK] * len(found)
    assert len(found) > 1


@pytest.mark.parametrize(
    "rubbish",
    [
        h2.HEAD.pack(0xFF, 0xFFFF, h2.DATA, 0, 1),
        h2.frame(h2.SETTINGS, 0, 0, b"odd"),
        h2.frame(h2.CONTINUATION, h2.END_HEADERS, 1, b""),
        h2.frame(h2.HEADERS, h2.END_HEADERS | h2.PADDED, 1, b"\xff"),
    ],
)
def test_what_is_no_http2_is_an_error_and_the_next_calls_go_on(rubbish: bytes) -> None:
    calls = iter(range(10**6))
    pace = played(lambda number: [rubbish] if next(calls) == 0 else answer(number, GOOD), one_by_one=True)
    found = outcomes(pace)
    assert found == [ERROR] + [OK] * (len(found) - 1)
    assert len(found) > 1
    assert any("no HTTP/2" in reason for reason in pace.recorder.reasons)


def test_headers_without_end_are_bounded() -> None:
    def says(number: int) -> list[bytes]:
        head = h2.frame(h2.HEADERS, 0, number, b"")
        return [head, *(h2.frame(h2.CONTINUATION, 0, number, bytes(16_000)) for _ in range(8))]

    pace = played(says, calls=1)
    assert outcomes(pace) == [ERROR]


def test_a_call_that_is_not_answered_times_out_and_is_withdrawn() -> None:
    pace = played(lambda number: [] if number == 3 else answer(number, GOOD), timeout_s=0.2)
    assert outcomes(pace) == [OK, TIMEOUT, OK, OK, OK]


@settings(max_examples=15, deadline=None)
@given(size=st.integers(0, 300_000), window=st.integers(1, 70_000))
def test_a_message_of_any_size_goes_through_any_window(size: int, window: int) -> None:
    message = b"\0" + size.to_bytes(4, "big") + bytes(size)
    pace = played(lambda number: answer(number, GOOD), calls=2, message=message, window=max(window, 1000))
    assert outcomes(pace) == [OK, OK]


def test_a_ping_is_answered_and_unknown_frames_mean_nothing() -> None:
    def says(number: int) -> list[bytes]:
        return [h2.frame(h2.PING, 0, 0, bytes(8)), h2.frame(0x77, 0, number, b"?"), *answer(number, GOOD)]

    assert outcomes(played(says)) == [OK] * 5
    assert FRAME_BYTES <= 2**24 - 1


def test_a_port_that_never_greets_is_said_not_to_be_grpc(free_port: int) -> None:
    loop = precise_loop()
    sender = Http2Sender(
        Target(url=f"grpc://127.0.0.1:{free_port}", protocol="grpc", model="n"), [Payload(b"", 1)], loop
    )
    with pytest.raises(NoAnswer, match="nobody listens there"):
        loop.run_until_complete(sender.open())
    loop.close()
