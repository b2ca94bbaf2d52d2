"""A loop with one HTTP server on a loopback socket, and raw bytes to and from it, for the tests of transports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from hasten.serve.http1 import Http1Server
from hasten.serve.http1_connection import Route
from hasten.serve.limits import Limits


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Client:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer: status, headers, body."""
        head = (await within(self.reader.readuntil(b"\r\n\r\n"))).decode()
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        body = await within(self.reader.readexactly(int(headers.get("content-length", "0"))))
        return int(first.split()[1]), headers, body

    async def rest(self) -> bytes:
        """Read until the server closes."""
        return await within(self.reader.read(-1))

    def close(self) -> None:
        self.writer.close()


class Wire:
    """A server and its port."""

    def __init__(self, server: Http1Server, clock: Clock, port: int) -> None:
        self.server = server
        self.clock = clock
        self.port = port
        self.clients: list[Client] = []

    async def client(self) -> Client:
        made = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(made)
        return made

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send bytes over a connection of their own and read one answer."""
        client = await self.client()
        await client.send(data)
        try:
            return await client.answer()
        finally:
            client.close()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Turn the loop until the server has seen what was sent."""

        async def turn() -> None:
            while not happened():
                await asyncio.sleep(0)

        await within(turn())

    def advance(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.server.tick()


async def within(work: Awaitable[Any], seconds: float = 10.0) -> Any:
    """Wait, but not for ever: a test that hangs fails."""
    return await asyncio.wait_for(work, seconds)


@asynccontextmanager
async def wire(route: Route, limits: Limits = Limits()) -> AsyncIterator[Wire]:  # noqa: B008 - frozen
    """Open a server on a free port; at the end it holds nothing any more."""
    clock = Clock()
    server = Http1Server(route, limits=limits, clock_s=clock)
    listening = await asyncio.get_running_loop().create_server(server.protocol, "127.0.0.1", 0)
    made = Wire(server, clock, listening.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        listening.close()
        server.abort()
        for client in made.clients:
            client.close()
            with contextlib.suppress(ConnectionError):
                await client.writer.wait_closed()
        await made.until(lambda: not server.connections)
        assert (server.requests, server.buffered_bytes) == (0, 0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run one test's coroutine on uvloop."""

    async def main() -> None:
        await test()

    uvloop.run(main())
