"""A client that gives up leaves nothing behind: what it asked for and still waits is withdrawn."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")
pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")

import tritonclient.grpc as over_grpc
import tritonclient.grpc.aio as over_grpc_aio
import tritonclient.http.aio as over_http_aio
from tritonclient.utils import InferenceServerException

from hasten.deployment import Serving
from hasten.serve.app import Listening, Open
from serve import faulty
from serve.bundles import bundle, rows
from serve.faulty import HANGS
from serve.served import call, infer_body, served


@pytest.fixture(params=["fast", "library"])
def busy(
    request: pytest.FixtureRequest, tmp_path: Path, faulty_engine: None
) -> Iterator[tuple[Open, threading.Thread]]:
    """A server whose only worker is in a run that ends when it is told to: what comes now, waits."""
    serving = Serving(instances=1, isolation="thread")
    path = bundle(tmp_path / "models" / "net", engine="faulty", serving=serving)
    x = rows(1)
    x[0, 0] = HANGS
    try:
        with served(path.parent.parent, Listening(port=0, grpc_port=0, transport=request.param)) as opened:
            first = threading.Thread(
                target=call, args=(opened.http, "POST", "/v2/models/net/infer", infer_body(x)), daemon=True
            )
            first.start()
            assert faulty.hanging.wait(30)
            yield opened, first
            faulty.release.set()
            first.join(30)
    finally:
        faulty.release.set()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(opened: Open) -> int:
    return int(opened.service.models()[0].line.batcher.rows)


def given(module: Any) -> list[Any]:
    tensor = module.InferInput("x", [3, 16], "FP32")
    tensor.set_data_from_numpy(rows(3))
    return [tensor]


def withdrawn(opened: Open) -> bool:
    model = opened.service.models()[0]
    return waiting(opened) == 0 and model.pool.calls == 1 and model.statistics.refused["cancelled"] > 0


@pytest.mark.parametrize("module", [over_http_aio, over_grpc_aio], ids=["http.aio", "grpc.aio"])
def test_a_task_that_is_cancelled(busy: tuple[Open, threading.Thread], module: Any) -> None:
    opened, _ = busy
    place = opened.http.removeprefix("http://") if module is over_http_aio else opened.grpc

    async def work() -> None:
        async with module.InferenceServerClient(place) as client:
            asking = asyncio.create_task(client.infer("net", given(module)))
            while waiting(opened) != 3:
                await asyncio.sleep(0.001)
            asking.cancel()
            await asyncio.wait({asking})
            while not withdrawn(opened):
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(work(), 30))


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_a_connection_that_is_closed(busy: tuple[Open, threading.Thread], coding: str) -> None:
    opened, _ = busy
    client = http.client.HTTPConnection(opened.http.removeprefix("http://"), timeout=30)
    body = infer_body(rows(3)) if coding == "identity" else gzip.compress(infer_body(rows(3)))
    client.request("POST", "/v2/models/net/infer", body, {"Content-Encoding": coding})
    until(lambda: waiting(opened) == 3)
    client.close()
    until(lambda: withdrawn(opened))


def test_a_grpc_call_that_is_cancelled(busy: tuple[Open, threading.Thread]) -> None:
    opened, _ = busy
    told = threading.Event()
    with over_grpc.InferenceServerClient(opened.grpc) as client:
        asking = client.async_infer("net", given(over_grpc), callback=lambda result, error: told.set())
        until(lambda: waiting(opened) == 3)
        asking.cancel()
        assert told.wait(30)
        until(lambda: withdrawn(opened))


def test_a_grpc_call_whose_client_waits_no_longer(busy: tuple[Open, threading.Thread]) -> None:
    opened, _ = busy
    with over_grpc.InferenceServerClient(opened.grpc) as client, pytest.raises(InferenceServerException):
        client.infer("net", given(over_grpc), client_timeout=0.2)
    until(lambda: waiting(opened) == 0 and opened.service.models()[0].pool.calls == 1)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_curl_that_is_ended(busy: tuple[Open, threading.Thread], how: signal.Signals, tmp_path: Path) -> None:
    opened, _ = busy
    (tmp_path / "body").write_bytes(infer_body(rows(3)))
    command = ["curl", "-sS", f"{opened.http}/v2/models/net/infer", "--data-binary", f"@{tmp_path / 'body'}"]
    asking = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until(lambda: waiting(opened) == 3)
    asking.send_signal(how)
    asking.wait(30)
    until(lambda: withdrawn(opened))
