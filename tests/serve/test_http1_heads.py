"""Heads of requests that are known by their bytes mean what they meant when they were parsed, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("httptools", reason="needs the extra serve")
pytest.importorskip("uvloop", reason="needs the extra serve")

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.serve.http1_heads import KEPT_HEADS
from hasten.serve.limits import Limits
from serve.test_http1 import LIMITS, Held, echo, get, post
from serve.wire import Wire, run, wire

WHOLE = post(b"body")
MESSAGES = {
    "get": get("/1"),
    "post": post(b"four"),
    "post of another length": post(b"fives"),
    "of no body": post(b""),
    "chunked": b"POST /c HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "after empty lines": b"\r\n\r\n" + get("/2"),
    "upgrade": get("/3", "Connection: Upgrade", "Upgrade: other"),
    "expecting": post(b"e", "Expect: 100-continue"),
}


async def answers(server: Wire, pieces: list[bytes], count: int) -> list[bytes]:
    client = await server.client()
    for piece in pieces:
        await client.send(piece)
    found = []
    while len(found) < count:
        status, _, body = await client.answer()
        if status != 100:
            found.append(body)
    client.close()
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(MESSAGES)), min_size=1, max_size=6), st.data())
def test_whatever_was_sent_before_and_however_it_was_cut_each_request_gets_its_answer(
    names: list[str], data: st.DataObject
) -> None:
    wanted = {
        "get": b"/1 ",
        "post": b"/ four",
        "post of another length": b"/ fives",
        "of no body": b"/ ",
        "chunked": b"/c abc",
        "after empty lines": b"/2 ",
        "upgrade": b"/3 ",
        "expecting": b"/ e",
    }
    sent = b"".join(MESSAGES[name] for name in names)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=3)))
    pieces = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]

    async def test() -> None:
        async with wire(echo, replace(LIMITS, pipelined=16)) as server:
            for parts in ([sent], pieces, [sent], pieces):
                assert await answers(server, parts, len(names)) == [wanted[name] for name in names]

    run(test)


def test_a_head_is_known_the_second_time_and_its_body_is_the_new_one() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            assert await answers(server, [WHOLE], 1) == [b"/ body"]
            assert [head.length for head in server.server.heads.values()] == [4]
            server.server.heads.update(
                {head: replace(known, target=b"/known") for head, known in server.server.heads.items()}
            )
            assert await answers(server, [post(b"next")], 1) == [b"/known next"]

    run(test)


@pytest.mark.parametrize("size", [4, 70_000])
def test_a_body_stays_what_it_was_while_others_are_read(size: int) -> None:
    async def test() -> None:
        route, bodies = Held(), [b"%d" % number * size for number in range(1, 5)]
        async with wire(route, LIMITS) as server:
            for count, body in enumerate(bodies, 1):  # the first one's head is not known yet
                client = await server.client()
                await client.send(post(body))
                await server.until(lambda count=count: len(route.requests) == count)
            assert [bytes(request.body) for request in route.requests] == bodies
            for request in route.requests:
                echo(request)

    run(test)


@pytest.mark.parametrize(
    "head",
    [
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: here\r\n\r\n",
        get("/", "Connection: close"),
        get("/", "X: " + "x" * 5000),
        MESSAGES["chunked"],
        MESSAGES["upgrade"],
    ],
)
def test_a_head_that_is_not_plain_is_not_kept(head: bytes) -> None:
    async def test() -> None:
        async with wire(echo, replace(LIMITS, header_bytes=8192)) as server:
            await server.ask(head)
            assert not server.server.heads

    run(test)


def test_the_bounds_hold_for_heads_that_are_known() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, Limits(buffered_bytes=10, requests=3)) as server:
            client = await server.client()
            await client.send(WHOLE)
            await server.until(lambda: len(route.requests) == 1)
            echo(route.requests.pop())
            assert (await client.answer())[0] == 200
            await client.send(WHOLE)
            await server.until(lambda: len(route.requests) == 1)
            await client.send(WHOLE)
            await server.until(lambda: len(route.requests) == 2)
            await client.send(WHOLE)
            await server.until(lambda: server.server.requests == 3)
            for request in route.requests:
                echo(request)
            assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 503]

    run(test)


def test_heads_that_are_kept_are_bounded() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            for number in range(KEPT_HEADS + 10):
                await client.send(get(f"/{number}"))
                await client.answer()
            assert len(server.server.heads) == 10

    run(test)


def test_a_server_that_drains_closes_connections_whose_heads_it_knows() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            await answers(server, [WHOLE], 1)
            server.server.draining = True
            client = await server.client()
            await client.send(WHOLE)
            assert (await client.answer())[1]["connection"] == "close"
            assert await client.rest() == b""

    run(test)
