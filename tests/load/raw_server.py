"""A small HTTP server that misbehaves as it is told: for what no good server does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class RawServer:
    """Counts requests; ``answer`` gives the bytes for the k-th (from 1), b"" to say nothing, None to close."""

    answer: Callable[[int], bytes | None]
    dies_after: int | None = None
    """Requests after which its port and all connections close."""
    closes: bool = False
    """Close after every answer."""
    requests: int = 0
    port: int = 0
    connections: int = 0
    seen: list[bytes] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line[:15] == b"Content-Length:"), 0)
                self.seen.append(await reader.readexactly(length))
                self.requests += 1
                if self.dies_after is not None and self.requests > self.dies_after:
                    self.die()
                    return
                said = self.answer(self.requests)
                if said is None:
                    return
                writer.write(said)
                if self.closes:
                    writer.close()
                    await writer.wait_closed()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    def die(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()


@contextmanager
def raw_server(answer: Callable[[int], bytes | None] = lambda k: ANSWER, **more: Any) -> Iterator[RawServer]:
    """Run one in a thread of its own until the block ends."""
    made = RawServer(answer, **more)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        made._server = await asyncio.start_server(made.take, "127.0.0.1", 0, backlog=1000)
        made.port = made._server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        made.die()
        while made._open:
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # what was cut last is closed then

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
