"""Where a request ends, and what comes behind it: nothing that a client sends is taken for another request of it."""

from __future__ import annotations

import pytest

pytest.importorskip("httptools", reason="needs the extra serve")
pytest.importorskip("uvloop", reason="needs the extra serve")

from serve.test_http1 import LIMITS, Held, echo, get, post
from serve.wire import run, wire

OFFER = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
"""What Java's own client sends with its first request over http://."""
SMUGGLED = b"POST /unload HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"


def chunked(body: bytes, *lines: str) -> bytes:
    head = "\r\n".join(["POST / HTTP/1.1", "Host: here", "Transfer-Encoding: chunked", *lines, "", ""]).encode()
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize("asked", [post, chunked])
@pytest.mark.parametrize("body", [b"x" * 300, SMUGGLED])
@pytest.mark.parametrize("cut", [-1000, 0, 4, 60])
def test_a_request_that_offers_another_protocol_keeps_its_body_however_it_is_cut(asked, body: bytes, cut: int) -> None:  # type: ignore[no-untyped-def]
    data = asked(body, *OFFER) + get("/2")
    at = max(0, data.index(b"\r\n\r\n") + 4 + cut)

    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(data[:at])
            for _ in range(20):
                await server.until(lambda: True)
            await client.send(data[at:])
            assert [(await client.answer())[2] for _ in range(2)] == [b"/ " + body, b"/2 "]
            assert server.server.buffered_bytes == 0

    run(test)


def test_a_body_of_an_offer_that_does_not_come_whole_is_waited_for_and_forgotten_with_its_client() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            await client.send(post(b"abc", *OFFER, length=1000))
            await server.until(lambda: server.server.buffered_bytes == 3)
            client.close()
            await server.until(lambda: not server.server.connections)
            assert (route.requests, server.server.buffered_bytes) == ([], 0)

    run(test)


@pytest.mark.parametrize("lines", [("Connection: close",), ("Connection: close, Upgrade", "Upgrade: h2c")])
@pytest.mark.parametrize("came", [0, 5, 10, None])
def test_what_follows_a_request_that_closes_is_not_run_however_its_body_comes(
    lines: tuple[str, ...], came: int | None
) -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            last = post(b"0123456789", *lines)
            at = len(last) - 10 + (came or 0)
            pieces = [last + SMUGGLED] if came is None else [last[:at], last[at:], SMUGGLED]
            for piece in pieces:
                await client.send(piece)
                for _ in range(30):
                    await server.until(lambda: True)
            assert [request.target for request in route.requests] == [b"/"]
            echo(route.requests[0])
            assert (await client.answer())[2] == b"/ 0123456789"
            assert await client.rest() == b""

    run(test)


def test_of_requests_that_come_together_while_it_drains_only_the_one_that_is_answered_is_run() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            server.server.draining = True
            client = await server.client()
            await client.send(get("/1") + get("/2"))
            await server.until(lambda: bool(route.requests))
            for _ in range(30):
                await server.until(lambda: True)
            assert [request.target for request in route.requests] == [b"/1"]
            echo(route.requests[0])
            assert (await client.answer())[2] == b"/1 "
            assert await client.rest() == b""

    run(test)


@pytest.mark.parametrize("cut", [0, 1, 3, 20])
def test_a_chunked_message_of_http_1_0_is_the_last_of_its_connection(cut: int) -> None:
    data = chunked(b"hi", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    at = len(data) - cut

    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            for piece in (data[:at], data[at:] + get("/2")):
                await client.send(piece)
                for _ in range(30):
                    await server.until(lambda: True)
            (request,) = route.requests
            echo(request)
            _, headers, body = await client.answer()
            assert (headers["connection"], body) == ("close", b"/ hi")
            assert await client.rest() == b""

    run(test)
