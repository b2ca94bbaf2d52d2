"""A port that closes loses nobody who had reached it: connections in the kernel's queue, and those that just came."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc.aio

from hasten.serve.app import Listening, open_app
from hasten.serve.http1 import Http1Server
from hasten.serve.http1_request import Request
from hasten.serve.limits import Limits
from hasten.serve.listen import HttpListener, Spot, bind
from serve.bundles import bundle
from serve.wire import run, within

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


def answer(request: Request) -> None:
    request.respond(200, b"{}")


async def listening(route: Callable[[Request], None] = answer, tls: ssl.SSLContext | None = None) -> HttpListener:
    clock_s = asyncio.get_running_loop().time
    made = HttpListener(Http1Server(route, limits=Limits(), clock_s=clock_s), Spot("127.0.0.1", 0), tls=tls)
    await made.open()
    return made


def place(listener: HttpListener) -> tuple[str, int]:
    host, _, port = listener.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def test_the_kernel_asks_silent_clients_whether_they_are_there_even_at_an_inherited_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        for spot in (Spot("127.0.0.1", 0), Spot("", 0, fd=given.fileno())):
            with bind(spot) as port, socket.create_connection(port.getsockname()):
                port.settimeout(10)
                accepted, _ = port.accept()
                with accepted:
                    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_those_who_wait_at_the_port_when_it_closes_are_answered() -> None:
    async def test() -> None:
        listener = await listening()
        waiting = [socket.create_connection(place(listener)) for _ in range(20)]  # the loop has not turned since
        for client in waiting:
            client.sendall(GET)
        await within(listener.close(10))
        for client in waiting:
            with client:
                client.settimeout(10)
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place(listener))

    run(test)


def test_a_connection_that_was_just_made_may_still_bring_its_request() -> None:
    async def test() -> None:
        listener = await listening()
        reader, writer = await asyncio.open_connection(*place(listener))
        while not listener._server.connections:
            await asyncio.sleep(0)
        closing = asyncio.create_task(listener.close(10))
        while listener._listening is not None and listener._listening.is_serving():
            await asyncio.sleep(0)
        writer.write(GET)
        head = await within(reader.readuntil(b"\r\n\r\n"))
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"Connection: close" in head
        await within(closing)
        writer.close()

    run(test)


def test_one_that_says_nothing_does_not_hold_up_the_end() -> None:
    async def test() -> None:
        listener = await listening()
        reader, writer = await asyncio.open_connection(*place(listener))
        while not listener._server.connections:
            await asyncio.sleep(0)
        await within(listener.close(60))
        assert await within(reader.read()) == b""
        writer.close()

    run(test)


def test_a_grpc_call_made_while_the_port_closes_is_answered_or_safe_to_send_again(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")
    outcomes: list[str] = []

    async def test() -> None:
        stop = asyncio.Event()

        async def client(place: str) -> None:
            async with grpc.aio.insecure_channel(place) as channel:
                call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                while not stop.is_set():
                    try:
                        outcomes.append("ok" if await call(b"", timeout=10) == b"\x08\x01" else "wrong")
                    except grpc.aio.AioRpcError as error:
                        outcomes.append(error.details() or "")
                        return

        async with open_app(path, Listening(port=0, grpc_port=0)) as opened:
            assert opened.grpc is not None
            clients = [asyncio.create_task(client(opened.grpc)) for _ in range(8)]
            while len(outcomes) < 200:
                await asyncio.sleep(0.001)
        stop.set()
        await within(gathered(clients))
        others = {outcome for outcome in outcomes if outcome != "ok"}
        assert all("refused" in text.lower() for text in others), others

    run(test)


async def gathered(work: list[asyncio.Task[None]]) -> None:
    waits: list[Awaitable[None]] = list(work)
    await asyncio.gather(*waits)


def test_a_connection_whose_requests_were_all_known_is_not_a_fresh_one() -> None:
    async def test() -> None:
        listener = await listening()
        streams = [await asyncio.open_connection(*place(listener)) for _ in range(2)]
        for reader, writer in streams:  # the second one's head was seen before: llhttp never looks at it
            writer.write(GET)
            await within(reader.readuntil(b"\r\n\r\n{}"))
        assert [connection.fresh for connection in listener._server.connections] == [False, False]
        await within(listener.close(10))
        for _, writer in streams:
            writer.close()

    run(test)
