"""Clients that come and go by the thousand leave nothing behind: no ticket, no row in a queue, no memory."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import uvloop

from hasten.client.client import Client
from hasten.deployment import Serving
from hasten.errors import ModelNotFound
from hasten.serve.app import Listening, open_app
from hasten.serve.call import Call
from hasten.serve.http1_connection import Connection
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.ticket import Marks
from hasten.testing.models import convnet
from serve.bundles import bundle, request, rows, run
from serve.photos import CLASSES, POST, PRE, SIZE, photo
from serve.served import infer_body, rows_of, served

SLACK_BYTES = 6 << 20
"""What allocators keep, a few arenas; a leak of one request's objects would be tens of megabytes."""


CONNECTIONS = int(os.environ.get("HASTEN_CHURN", "3000"))
"""Twenty thousand take a minute; ``benchmarks/resilience`` says what they gave."""


def rss_bytes() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())  # isinstance would wake what other modules load late


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_ten_thousand_cancelled_requests_leave_no_ticket_and_no_row(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, batch_sizes=(1, 4), queue_rows=1 << 20))

    async def work() -> None:
        service = Service(open_repository(path))
        await service.start()
        model = service.models()[0]
        told: list[object] = []
        asked = request(rows(3))

        async def cancel(count: int) -> None:
            for _ in range(count // 100):
                tickets = [service.submit(asked, Marks(), told.append) for _ in range(100)]
                for ticket in tickets:
                    ticket.cancel()
                await asyncio.sleep(0)
            await model.pool.emptied()

        await cancel(2000)
        before = rss_bytes()
        await cancel(10_000)
        batcher = model.line.batcher
        assert (model.pool.calls, batcher.rows, batcher.n_bytes, batcher._rows_at) == (0, 0, 0, {})
        assert model.statistics.refused["cancelled"] + len(told) == 12_000
        await service.infer(asked)
        grown = rss_bytes() - before  # before what is alive is counted: that makes a list of all objects
        assert sum(len(heap) for heap in batcher._heaps.values()) <= 128, "what was removed is forgotten in time"
        assert alive(Call) <= 128
        assert grown < SLACK_BYTES
        await service.stop()

    run(work())


@pytest.mark.parametrize("last_words", ["reads its answer", "leaves before it", "says half of it"])
def test_thousands_of_connections_that_come_and_go_leave_nothing(tmp_path: Path, last_words: str) -> None:
    path = bundle(tmp_path / "net")
    body = infer_body(rows_of(1))
    head = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body)
    message = head + (body[:20] if last_words == "says half of it" else body)

    async def one(place: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, place)
            await loop.sock_sendall(client, message)
            if last_words == "reads its answer":
                assert (await loop.sock_recv(client, 4096)).startswith(b"HTTP/1.1 200 ")

    async def work() -> None:
        async with open_app(path, Listening(port=0, grpc_port=None)) as opened:
            host, _, port = opened.http.removeprefix("http://").rpartition(":")
            model = opened.service.models()[0]

            async def churn(count: int) -> None:
                idle = open_files()
                for _ in range(count // 50):
                    await asyncio.gather(*(one((host, int(port))) for _ in range(50)))
                while open_files() > idle or model.pool.calls:
                    await asyncio.sleep(0.01)

            await churn(500)
            before, files = rss_bytes(), open_files()
            await churn(CONNECTIONS)
            grown = rss_bytes() - before
            assert (model.pool.calls, model.line.batcher.rows, model.line.batcher.n_bytes) == (0, 0, 0)
            assert (alive(Call), alive(Connection)) == (0, 0)
            assert open_files() <= files
            assert grown < SLACK_BYTES

    uvloop.run(asyncio.wait_for(work(), 120))


def ours() -> Counter[str]:
    """Count the objects of hasten's own types that are alive or wait for the cyclic collector."""
    return Counter(str(type(thing)) for thing in gc.get_objects() if str(type(thing).__module__).startswith("hasten."))


@pytest.mark.parametrize("transport", ["fast", "library"])
@pytest.mark.parametrize("way", ["binary", "json", "grpc", "split", "refused", "photos"])
def test_an_answered_request_leaves_nothing_to_the_cyclic_collector(tmp_path: Path, way: str, transport: Any) -> None:
    if way == "photos":
        path = bundle(tmp_path / "net", model=convnet(size=SIZE), pre=PRE, post=POST, classes=list(CLASSES))
        inputs: dict[str, Any] = {"image": np.array([photo(1)], object)}
    else:
        path = bundle(tmp_path / "net", serving=Serving(batch_sizes=(1, 4)))
        inputs = {"x": rows_of({"split": 9, "binary": 2}.get(way, 1))}
    with served(path, Listening(port=0, grpc_port=0, transport=transport)) as opened:
        url = f"grpc://{opened.grpc}" if way == "grpc" else opened.http
        with Client(url, binary=way != "json") as client:

            def one() -> None:
                if way == "refused":
                    with pytest.raises(ModelNotFound):
                        client.infer("other", inputs)
                else:
                    client.infer("net", inputs)

            grown = grows(one, 60)
    assert not grown, f"60 requests left {grown}"


def grows(work: Callable[[], None], times: int) -> dict[str, int]:
    """Say of which types there are more after ``times`` calls of ``work``, while nothing is collected."""
    for _ in range(10):
        work()
    gc.collect()
    gc.disable()
    try:
        before = ours()
        for _ in range(times):
            work()
        return {kind: count for kind, count in (ours() - before).items() if count > times // 10}
    finally:
        gc.enable()
