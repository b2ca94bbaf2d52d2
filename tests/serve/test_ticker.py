"""What is done twice a second, and what a loop that stood still does not do at once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("uvloop", reason="needs the extra 'serve'")

from hasten.serve.ticker import Ticker
from hasten.serve.wheel import TICK_S


class Jumping(asyncio.SelectorEventLoop):
    """A loop whose clock can be put forward."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s

    async def jump(self, seconds: float) -> None:
        self.ahead_s += seconds
        for _ in range(3):  # to see what is due, to call it, and to come back
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("jumps", "ticks"),
    [
        ([1.1] * 3, [1, 2, 3]),
        ([1.9] * 3, [1, 2, 3]),
        ([20, 1.1, 1.1], [0, 1, 2]),
        ([20, 20, 1.1], [0, 0, 1]),
        ([20] * 10, [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]),
        ([1.1, 2.1, 1.1, 2.1, 1.1], [1, 1, 2, 2, 3]),
    ],
    ids=["in time", "a little late", "stood still once", "twice", "always late", "now and then late"],
)
def test_a_tick_that_comes_late_is_let_pass(jumps: list[float], ticks: list[int]) -> None:
    called: list[str] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Jumping)
        ticker = Ticker(lambda: called.append("first"), lambda: called.append("second"))
        for jump, wanted in zip(jumps, ticks, strict=True):
            await loop.jump(jump * TICK_S)
            assert called == ["first", "second"] * wanted
        ticker.stop()
        called.clear()
        await loop.jump(1.1 * TICK_S)
        assert called == []

    loop = Jumping()
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()


STOPPED_S = 1.0 + 2.5 * TICK_S

SERVER = """
import asyncio, uvloop
from hasten.serve.http1 import Http1Server
from hasten.serve.limits import Limits
from hasten.serve.listen import HttpListener, Spot

async def main():
    limits, clock_s = Limits(header_s=1.0, idle_s=1.0), asyncio.get_running_loop().time
    server = Http1Server(lambda request: request.respond(200, b"{}"), limits=limits, clock_s=clock_s)
    listener = HttpListener(server, Spot("127.0.0.1", 0), tls=None)
    await listener.open()
    print(listener.url.rpartition(":")[2], flush=True)
    while True:
        while not server.connections:
            await asyncio.sleep(0.001)
        print("taken in", flush=True)
        await asyncio.Event().wait()

uvloop.run(main())
"""


@contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever comes: it does not outlive the test, which would wait for its end."""
    try:
        yield
    finally:
        process.kill()


def test_a_request_that_came_while_the_process_was_stopped_is_answered_whatever_the_clock_says() -> None:
    """As ``docker pause`` does, and a machine that sleeps: the loop's wait is cut short, and timers come first."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    with server, killed(server):
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            assert server.stdout.readline() == "taken in\n"
            for asked in ("the first of its connection", "one over a connection that is kept"):
                os.kill(server.pid, signal.SIGSTOP)
                os.waitpid(server.pid, os.WUNTRACED)
                client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
                until_s = time.monotonic() + STOPPED_S
                while time.monotonic() < until_s:  # the time is what is tested
                    continue
                os.kill(server.pid, signal.SIGCONT)
                assert client.recv(1000).startswith(b"HTTP/1.1 200 "), asked
            assert client.recv(1000) == b"", "one that asks nothing is closed all the same"
