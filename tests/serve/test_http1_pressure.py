"""Clients that announce much, send much or read slowly: what they hold is bounded, and who keeps the pace is served."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("httptools", reason="needs the extra serve")
pytest.importorskip("uvloop", reason="needs the extra serve")

from hasten.serve.http1_bodies import FIRST_BYTES, HUGE_BYTES, room
from hasten.serve.http1_request import Request
from hasten.serve.limits import Limits
from serve.test_http1 import LIMITS, Held, echo, get, post
from serve.wire import Wire, run, wire, within

ANSWER_BYTES = 20_000_000
STATM = Path("/proc/self/statm")


async def settle(server: Wire) -> None:
    for _ in range(50):
        await server.until(lambda: True)


def test_bodies_that_are_only_announced_shut_nobody_out() -> None:
    async def test() -> None:
        limits = Limits()
        async with wire(echo, limits) as server:
            for _ in range(limits.buffered_bytes // limits.body_bytes):
                client = await server.client()
                await client.send(post(b"", length=limits.body_bytes))
            await server.until(lambda: all(found._direct for found in server.server.connections))
            assert len(server.server.connections) == 16
            assert (await server.ask(post(b"hi")))[2] == b"/ hi"

    run(test)


def test_a_body_that_would_be_too_much_beside_the_others_is_refused_when_it_comes() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, replace(LIMITS, buffered_bytes=300_000)) as server:
            slow, quick = await server.client(), await server.client()
            await slow.send(post(b"x" * 150_000, length=200_000))
            await server.until(lambda: server.server.buffered_bytes == 150_000)
            await quick.send(post(b"y" * 120_000))
            await server.until(lambda: len(route.requests) == 1)
            await slow.send(b"x" * 50_000)
            status, headers, _ = await slow.answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert server.server.buffered_bytes == 120_000
            echo(route.requests[0])
            assert (await quick.answer())[0] == 200

    run(test)


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
@pytest.mark.parametrize("length", [64 * 2**20, HUGE_BYTES - 1])
def test_room_for_a_body_takes_no_memory_before_the_body_comes(length: int) -> None:
    def resident_bytes() -> int:
        return int(STATM.read_text().split()[1]) * 4096

    before = resident_bytes()
    rooms = [room(length) for _ in range(32)]
    assert resident_bytes() - before < 16 * 2**20
    assert len(rooms[0]) == min(length, FIRST_BYTES if length >= HUGE_BYTES else length)


@pytest.mark.parametrize("length", [FIRST_BYTES, HUGE_BYTES - 1, HUGE_BYTES, HUGE_BYTES + FIRST_BYTES + 1])
def test_a_large_body_comes_whole_though_its_room_grows(length: int) -> None:
    body = random.Random(0).randbytes(length)

    async def test() -> None:
        route = Held()
        async with wire(route, replace(LIMITS, body_bytes=length)) as server:
            client = await server.client()
            client.writer.write(post(body) + get("/next"))
            await server.until(lambda: len(route.requests) == 2)
            assert bytes(route.requests[0].body) == body
            assert server.server.buffered_bytes == length
            for request in route.requests:
                request.respond(200)

    run(test)


def same(number: int) -> bytes:
    return get("/same")


def different(number: int) -> bytes:
    return get(f"/{number}")


def with_bodies(number: int) -> bytes:
    return post(b"%d" % number)


def in_chunks(number: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"


@pytest.mark.parametrize("asked", [same, different, with_bodies, in_chunks])
def test_of_requests_that_come_in_one_read_no_more_are_in_work_than_of_those_that_come_in_many(
    asked: Callable[[int], bytes],
) -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            await client.send(b"".join(map(asked, range(100))))
            for number in range(100):
                await server.until(lambda number=number: len(route.requests) > number)  # type: ignore[misc]
                await settle(server)
                assert len(route.requests) == min(100, number + LIMITS.pipelined)
                echo(route.requests[number])
            wanted = [bytes(request.target) + b" " + bytes(request.body) for request in route.requests]
            assert [(await client.answer())[2] for _ in range(100)] == wanted

    run(test)


@pytest.mark.parametrize("asked", [same, different])
def test_requests_that_come_in_one_read_wait_until_the_answers_before_them_are_read(
    asked: Callable[[int], bytes],
) -> None:
    async def test() -> None:
        async with wire(lambda request: request.respond(200, b"y" * 15_000), LIMITS) as server:
            client = await server.client()
            await client.send(b"".join(map(asked, range(2000))))
            await server.until(lambda: len(server.server.connections) == 1)
            (connection,) = server.server.connections
            await server.until(lambda: connection._paused)
            await settle(server)
            assert connection._transport.get_write_buffer_size() < 200_000  # type: ignore[union-attr]
            for _ in range(2000):
                assert len((await client.answer())[2]) == 15_000

    run(test)


def test_a_client_that_pipelines_and_reads_nothing_is_cut_in_the_end() -> None:
    def route(request: Request) -> None:
        request.respond(200, b"y" * 8_000_000 if request.target == b"/large" else b"z")

    async def test() -> None:
        async with wire(route, LIMITS) as server:
            raw = socket.create_connection(("127.0.0.1", server.port))
            raw.sendall(get("/large") + get("/2"))
            await server.until(lambda: any(found._paused for found in server.server.connections))
            await settle(server)
            server.advance(LIMITS.write_s + 1)
            await server.until(lambda: not server.server.connections)
            raw.close()

    run(test)


async def read(raw: socket.socket, n_bytes: int) -> int:
    """Read so much, or up to the end."""
    found = 0
    while found < n_bytes:
        data = await within(asyncio.get_running_loop().sock_recv(raw, n_bytes - found))
        if not data:
            break
        found += len(data)
    return found


async def slow_reader(server: Wire, route: Held, asked: bytes) -> socket.socket:
    """Ask for an answer of ``ANSWER_BYTES`` that fills the socket."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(asked)
    raw.setblocking(False)
    await server.until(lambda: len(route.requests) == 1)
    await settle(server)
    route.requests[0].respond(200, b"z" * ANSWER_BYTES)
    (connection,) = server.server.connections
    assert connection._paused
    return raw


def test_a_request_in_work_is_not_cut_off_because_what_came_behind_it_was_refused() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            await client.send(get("/1") + get("/2") + b"\x00")
            await server.until(lambda: len(route.requests) == 2)
            route.requests[0].respond(200, b"z" * ANSWER_BYTES)
            assert len((await client.answer())[2]) == ANSWER_BYTES
            await settle(server)
            server.advance(LIMITS.write_s + 1)
            echo(route.requests[1])
            assert (await client.answer())[2] == b"/2 "
            assert (await client.answer())[0] == 400

    run(test)


CLOSING = get("/", "Connection: close")
ASKED = {"it stays": get(), "it closes": CLOSING, "it closes, with more": CLOSING + b"\x00", "refused": get() + b"\x00"}


@pytest.mark.parametrize("case", ASKED)
def test_an_answer_that_is_read_slowly_but_steadily_comes_whole(case: str) -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            raw = await slow_reader(server, route, ASKED[case])
            found = 0
            while found < ANSWER_BYTES:
                came = await read(raw, min(300_000, ANSWER_BYTES - found))
                assert came, f"it was cut after {found} bytes"
                found += came
                server.advance(1.0)
            raw.close()

    run(test)


@pytest.mark.parametrize("case", ASKED)
def test_a_client_that_stops_reading_halfway_is_cut_in_the_end(case: str) -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            raw = await slow_reader(server, route, ASKED[case])
            assert await read(raw, 5_000_000) == 5_000_000
            server.advance(LIMITS.write_s + 1)
            await settle(server)
            assert len(server.server.connections) == 1
            server.advance(LIMITS.write_s + 1)
            await server.until(lambda: not server.server.connections)
            raw.close()

    run(test)
