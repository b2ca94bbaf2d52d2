"""The HTTP/1.1 server over real loopback sockets, with raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

pytest.importorskip("httptools", reason="needs the extra serve")
pytest.importorskip("uvloop", reason="needs the extra serve")

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.serve.http1_connection import SCRATCH_BYTES
from hasten.serve.http1_request import Request
from hasten.serve.limits import Limits
from serve.wire import run, wire

LIMITS = Limits(body_bytes=1_000_000, header_bytes=4096, header_count=20, pipelined=4, header_s=10, body_s=10)


def get(path: str = "/", *lines: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: here", *lines, "", ""]).encode()


def post(body: bytes, *lines: str, length: int | None = None) -> bytes:
    size = f"Content-Length: {len(body) if length is None else length}"
    return "\r\n".join(["POST / HTTP/1.1", "Host: here", size, *lines, "", ""]).encode() + body


def echo(request: Request) -> None:
    request.respond(200, bytes(request.target) + b" " + bytes(request.body), kind=b"text/plain")


class Held:
    """A route that keeps its requests until the test answers them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.left: list[bytes] = []

    def __call__(self, request: Request) -> None:
        request.leave = lambda: self.left.append(request.target)
        self.requests.append(request)


def test_pipelined_requests_are_answered_in_their_order_even_if_they_finish_in_another() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            await client.send(get("/1") + get("/2") + get("/3"))
            await server.until(lambda: len(route.requests) == 3)
            for request in reversed(route.requests):
                echo(request)
            assert [(await client.answer())[2] for _ in range(3)] == [b"/1 ", b"/2 ", b"/3 "]

    run(test)


def test_a_connection_with_many_requests_in_work_is_not_read_until_some_are_answered() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            for number in range(4):
                await client.send(get(f"/{number}"))
                await server.until(lambda number=number: len(route.requests) == number + 1)
            await client.send(get("/4"))
            for _ in range(50):
                await server.until(lambda: True)
            assert len(route.requests) == 4
            echo(route.requests[0])
            await server.until(lambda: len(route.requests) == 5)

    run(test)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=12), st.binary(max_size=400), st.booleans())
def test_a_request_means_the_same_however_its_bytes_are_cut(cuts: list[int], body: bytes, chunked: bool) -> None:
    if chunked:
        half = len(body) // 2
        pieces = [piece for piece in (body[:half], body[half:]) if piece]
        data = b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        data += b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        data = post(body).replace(b"POST /", b"POST /a")
    stream = data + get("/after")

    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            at = 0
            for cut in [*cuts, len(stream)]:
                await client.send(stream[at : at + cut])
                at += cut
                for _ in range(3):
                    await server.until(lambda: True)
            await client.send(stream[at:])
            assert (await client.answer())[2] == b"/a " + body
            assert (await client.answer())[2] == b"/after "

    run(test)


def test_a_body_larger_than_any_read_arrives_whole_and_the_connection_goes_on() -> None:
    body = bytes(range(256)) * (3 * SCRATCH_BYTES // 256 + 1)

    async def test() -> None:
        async with wire(echo, replace(LIMITS, body_bytes=len(body))) as server:
            client = await server.client()
            await client.send(post(body) + get("/next"))
            assert (await client.answer())[2] == b"/ " + body
            assert (await client.answer())[2] == b"/next "

    run(test)


BAD: dict[str, tuple[bytes, int]] = {
    "no HTTP at all": (b"\x16\x03\x01 nonsense\r\n\r\n", 400),
    "a length that is no number": (post(b"", "X: y").replace(b"Length: 0", b"Length: ten"), 400),
    "a negative length": (post(b"", length=-5), 400),
    "a length beyond 64 bits": (post(b"", length=10**30), 400),
    "two lengths": (post(b"abc", "Content-Length: 4"), 400),
    "a length and chunks": (post(b"", "Transfer-Encoding: chunked"), 400),
    "a chunk size that is no number": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        400,
    ),
    "a transfer encoding that is not known": (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: rot13\r\n\r\n", 400),
    "a space before the colon": (b"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400),
    "a NUL in a header": (b"GET / HTTP/1.1\r\nHost: h\x00\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get("/", "Host: there"), 400),
    "two hosts, one of them empty": (get("/", "Host:"), 400),
    "what only proxies do": (b"CONNECT a:1 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello", 501),
    "chunks of something compressed": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        501,
    ),
    "HTTP/3.7": (b"GET / HTTP/3.7\r\nHost: h\r\n\r\n", 400),
    "a body over the limit": (post(b"", length=1_000_001), 413),
    "chunks over the limit": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n" + b"x" * 0xFFFFF + b"\r\n",
        413,
    ),
    "too many headers": (get("/", *(f"X-{number}: y" for number in range(40))), 431),
    "a header that is too long": (get("/", f"X: {'y' * 5000}"), 431),
    "a header that never ends": (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"y" * 5000, 431),
    "a target that is too long": (get("/" + "y" * 5000), 431),
    "an expectation that is not known": (post(b"", "Expect: a miracle"), 417),
    "trailers that never end": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"y" * 20_000,
        431,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_malformed_or_too_large_is_refused_as_json_and_closed(case: str) -> None:
    data, wanted = BAD[case]

    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(data)
            status, headers, body = await client.answer()
            assert status == wanted
            assert json.loads(body)["error"]
            assert headers["connection"] == "close"
            assert await client.rest() == b""

    run(test)


def test_a_refusal_comes_after_the_answers_before_it() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(get("/good") + b"\x00\x01\x02\r\n\r\n")
            assert (await client.answer())[2] == b"/good "
            assert (await client.answer())[0] == 400

    run(test)


def test_a_client_that_is_refused_while_it_still_sends_gets_to_read_why() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            client.writer.write(post(b"", length=50_000_000) + b"x" * 5_000_000)
            assert (await client.answer())[0] == 413

    run(test)


def test_one_that_expects_to_be_asked_is_asked_before_its_body_and_not_if_the_body_is_too_large() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(post(b"", "Expect: 100-continue", length=3))
            assert (await client.answer())[0] == 100
            await client.send(b"abc")
            assert (await client.answer())[2] == b"/ abc"
            assert (await server.ask(post(b"", "Expect: 100-continue", length=2_000_000)))[0] == 413

    run(test)


def test_an_offer_of_another_protocol_is_passed_over() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(get("/1", "Connection: Upgrade", "Upgrade: h2c") + get("/2"))
            assert [(await client.answer())[2] for _ in range(2)] == [b"/1 ", b"/2 "]

    run(test)


def test_http_1_0_closes_unless_it_asks_to_stay() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(b"GET /a HTTP/1.0\r\n\r\n")
            status, headers, body = await client.answer()
            assert (status, headers["connection"], body) == (200, "close", b"/a ")
            assert headers["date"].endswith("GMT")
            assert await client.rest() == b""
            client = await server.client()
            for _ in range(2):
                await client.send(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                assert (await client.answer())[1]["connection"] == "keep-alive"

    run(test)


def slow_headers(number: int) -> bytes:
    return b"GET / HTTP/1.1\r\n" if number == 0 else b"X-%d: y\r\n" % number


def slow_body(number: int) -> bytes:
    return post(b"", length=100_000) if number == 0 else b"z"


@pytest.mark.parametrize("drip", [slow_headers, slow_body])
def test_a_client_that_drips_its_request_is_timed_out(drip: Callable[[int], bytes]) -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            for number in range(4):
                await client.send(drip(number))
                for _ in range(20):
                    await server.until(lambda: True)
                server.advance(4.0)
            status, _, body = await client.answer()
            assert (status, "error" in json.loads(body)) == (408, True)

    run(test)


def test_a_body_that_keeps_the_least_rate_is_waited_for() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(post(b"", length=800_000))
            connection = await _only(server)
            for number in range(8):
                await client.send(b"z" * 100_000)
                wanted = 100_000 * (number + 1)
                await server.until(lambda wanted=wanted: connection._filled in (wanted, 0))
                server.advance(5.0)
            assert (await client.answer())[0] == 200

    run(test)


def test_a_body_that_comes_well_and_then_stops_is_timed_out_when_its_bytes_are_used_up() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            await client.send(post(b"z" * 200_000, length=800_000))
            connection = await _only(server)
            await server.until(lambda: connection._filled == 200_000)
            server.advance(LIMITS.body_s + 1)
            assert not connection._deaf
            server.advance(200_000 / LIMITS.body_rate)
            assert (await client.answer())[0] == 408

    run(test)


def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            fresh, used = await server.client(), await server.client()
            await used.send(get())
            assert (await used.answer())[0] == 200
            await server.until(lambda: len(server.server.connections) == 2)
            server.advance(LIMITS.header_s + 1)
            assert await fresh.rest() == b""
            assert len(server.server.connections) == 1
            server.advance(LIMITS.idle_s + 1)
            assert await used.rest() == b""

    run(test)


def test_a_request_that_takes_long_to_answer_is_not_timed_out() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            await client.send(get("/long"))
            await server.until(lambda: len(route.requests) == 1)
            server.advance(10_000)
            echo(route.requests[0])
            assert (await client.answer())[2] == b"/long "

    run(test)


def test_what_a_client_asked_for_is_cancelled_when_it_leaves() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            client = await server.client()
            await client.send(get("/1") + get("/2"))
            await server.until(lambda: len(route.requests) == 2)
            client.close()
            await server.until(lambda: len(route.left) == 2)
            echo(route.requests[0])  # too late: it goes nowhere
            assert route.left == [b"/1", b"/2"]

    run(test)


def test_a_client_that_reads_nothing_is_not_read_from_and_is_cut_in_the_end() -> None:
    large = b"x" * 8_000_000
    calls: list[bytes] = []

    def route(request: Request) -> None:
        calls.append(request.target)
        request.respond(200, large)

    async def test() -> None:
        async with wire(route, LIMITS) as server:
            raw = socket.create_connection(("127.0.0.1", server.port))
            raw.sendall(get("/1"))
            connection = await _only(server)
            await server.until(lambda: connection._paused)
            raw.sendall(get("/2") * 3)
            for _ in range(50):
                await server.until(lambda: True)
            assert calls == [b"/1"]
            server.advance(LIMITS.write_s + 1)
            await server.until(lambda: not server.server.connections)
            raw.close()

    run(test)


def test_an_answer_that_stays_unread_holds_its_connection_no_longer_than_an_idle_one() -> None:
    """Less than would stop the reading of requests: nothing but time tells that its client is gone."""

    async def test() -> None:
        async with wire(lambda request: request.respond(200, b"x" * 8_000_000), LIMITS) as server:
            raw = socket.create_connection(("127.0.0.1", server.port))
            raw.sendall(get("/1"))
            connection = await _only(server)
            await server.until(lambda: connection._paused)
            connection.resume_writing()  # as with an answer that the socket takes but for its last bytes
            server.advance(LIMITS.idle_s + 1)
            await server.until(lambda: not server.server.connections)
            raw.close()

    run(test)


@pytest.mark.parametrize("behind", [b"\x00", b"", get("/known")])
def test_what_follows_a_request_that_closes_is_not_run_and_nothing_of_it_is_kept(behind: bytes) -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, LIMITS) as server:
            first = await server.client()
            await first.send(get("/known"))
            await server.until(lambda: len(route.requests) == 1)
            echo(route.requests[0])
            assert (await first.answer())[2] == b"/known "
            client = await server.client()
            await client.send(get("/last", "Connection: close"))
            await server.until(lambda: len(route.requests) == 2)
            await client.send(get("/known") + behind)
            for _ in range(50):
                await server.until(lambda: True)
            echo(route.requests[1])
            assert (await client.answer())[2] == b"/last "
            assert await client.rest() == b""
            assert [request.target for request in route.requests] == [b"/known", b"/last"]
            client.close()
            await server.until(lambda: len(server.server.connections) == 1)
            assert server.server.requests == 0

    run(test)


def test_one_connection_more_than_allowed_is_told_so_and_closed() -> None:
    async def test() -> None:
        async with wire(echo, replace(LIMITS, connections=1)) as server:
            first = await server.client()
            await server.until(lambda: len(server.server.connections) == 1)
            status, headers, _ = await (await server.client()).answer()
            assert (status, headers["retry-after"], headers["x-reason"]) == (503, "1", "server_full")
            await first.send(get("/mine"))
            assert (await first.answer())[2] == b"/mine "

    run(test)


@pytest.mark.parametrize("surplus", [1, 0])
def test_one_connection_more_than_allowed_may_read_why_whatever_it_sent(surplus: int) -> None:
    async def test() -> None:
        async with wire(echo, replace(LIMITS, connections=1, surplus=surplus)) as server:
            first = await server.client()
            await server.until(lambda: len(server.server.connections) == 1)
            second = await server.client()
            if surplus:  # else it may be reset as it sends
                await second.send(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000))
            assert (await second.answer())[0] == 503
            if surplus:
                assert await second.rest() == b"", "no reset"
                assert len(server.server.connections) == 2
                third = await server.client()
                assert (await third.answer())[0] == 503
                await server.until(lambda: len(server.server.connections) == 2)
                first.close()
                await server.until(lambda: len(server.server.connections) == 1)
                fourth = await server.client()
                await fourth.send(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
                assert (await fourth.answer())[0] == 200, "who only reads why takes nobody's place"
                second.close()
            await server.until(lambda: len(server.server.connections) == 1)
            await server.until(lambda: not server.server.surplus)

    run(test)


@pytest.mark.usefixtures("gone_at_the_end")
def test_a_client_that_resets_its_connection_just_before_its_end_is_let_go() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route) as server:
            client = await server.client()
            await client.send(get("/first") + b"nonsense\r\n\r\n")
            await server.until(lambda: server.server.requests == 2)
            echo(route.requests[0])
            assert [(await client.answer())[0] for _ in range(2)] == [200, 400]
            await server.until(lambda: not server.server.connections)

    asyncio.run(test())  # uvloop says nothing there


def test_a_connection_whose_descriptor_is_kept_for_others_is_told_so_and_closed() -> None:
    async def test() -> None:
        async with wire(echo, replace(LIMITS, descriptors=0, surplus=0)) as server:
            told: list[Request] = []
            server.server.log = told.append
            client = await server.client()
            status, headers, body = await client.answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert b"the server has 0 open connections, its limit" in body
            assert await client.rest() == b""
            assert [request.peer for request in told] == ["127.0.0.1"]
            assert told[0].began_ns > 0, "or its duration would be the machine's age"

    run(test)


def test_one_request_more_than_allowed_is_refused_and_the_connection_stays() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, replace(LIMITS, requests=1)) as server:
            first, second = await server.client(), await server.client()
            await first.send(get("/1"))
            await server.until(lambda: len(route.requests) == 1)
            await second.send(get("/2"))
            status, headers, _ = await second.answer()
            assert (status, headers["retry-after"], headers["x-reason"]) == (503, "1", "server_full")
            echo(route.requests[0])
            assert (await first.answer())[0] == 200
            await second.send(get("/3"))
            await server.until(lambda: len(route.requests) == 2)

    run(test)


def test_bodies_in_work_together_are_bounded() -> None:
    async def test() -> None:
        route = Held()
        async with wire(route, replace(LIMITS, buffered_bytes=1500)) as server:
            client = await server.client()
            await client.send(post(b"x" * 1000))
            await server.until(lambda: len(route.requests) == 1)
            assert (await server.ask(post(b"x" * 1000)))[0] == 503

    run(test)


def test_a_defect_of_a_route_is_a_500_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def route(request: Request) -> None:
        raise ZeroDivisionError(request.target.decode())

    async def test() -> None:
        async with wire(route, LIMITS) as server:
            client = await server.client()
            for _ in range(2):
                await client.send(get())
                status, _, body = await client.answer()
                assert (status, list(json.loads(body))) == (500, ["error"])

    run(test)
    assert "a route failed" in caplog.text


def test_while_it_drains_requests_are_taken_and_their_connections_closed() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            idle = await server.client()
            await server.until(lambda: len(server.server.connections) == 1)
            server.server.draining = True
            status, headers, _ = await server.ask(get())
            assert (status, headers["connection"]) == (200, "close")
            server.server.close_idle()
            assert await idle.rest() == b""

    run(test)


def test_pythons_own_client_keeps_its_connection_and_sees_no_body_after_head() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            found: list[tuple[int, bytes]] = []

            def talk() -> None:
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
                for verb, body in (("HEAD", None), ("POST", b"abc"), ("GET", None)):
                    connection.request(verb, "/x", body)
                    answer = connection.getresponse()
                    found.append((answer.status, answer.read()))
                connection.request("POST", "/x", iter([b"a", b"b"]), encode_chunked=True)
                found.append((200, connection.getresponse().read()))
                connection.close()

            thread = threading.Thread(target=talk)
            thread.start()
            await server.until(lambda: not thread.is_alive())
            assert found == [(200, b""), (200, b"/x abc"), (200, b"/x "), (200, b"/x ab")]

    run(test)


PIECES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            *(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"POST / HTTP/1.1\r\n", b"Host: h\r\n", b"\r\n", b"0\r\n\r\n"),
            *(
                b"Content-Length: 5\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"3\r\nabc\r\n",
                b"Expect: 100-continue\r\n",
            ),
            *(
                b"Connection: close\r\n",
                b"Upgrade: h2c\r\nConnection: upgrade\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            ),
        ]
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES, max_size=12))
def test_no_bytes_at_all_bring_out_a_500_or_leave_anything_behind(pieces: list[bytes]) -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            client = await server.client()
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    await client.send(piece)
                    await server.until(lambda: True)
                client.writer.write_eof()
                assert b"HTTP/1.1 500" not in await client.rest()

    run(test)


def test_a_thousand_idle_connections_leave_room_for_one_that_asks() -> None:
    async def test() -> None:
        async with wire(echo, LIMITS) as server:
            idle = [await server.client() for _ in range(1000)]
            await server.until(lambda: len(server.server.connections) == 1000)
            assert (await server.ask(get("/busy")))[2] == b"/busy "
            server.advance(LIMITS.header_s + 1)
            assert [await client.rest() for client in idle] == [b""] * 1000

    run(test)


async def _only(server):  # type: ignore[no-untyped-def]
    await server.until(lambda: len(server.server.connections) == 1)
    return next(iter(server.server.connections))
