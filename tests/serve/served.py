"""A real small deployment, served in a thread of its own, and plain clients to it."""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvloop

from hasten.serve.app import Listening, Open, open_app

FEATURES, CLASSES = 16, 4


@contextmanager
def serving(
    path: Path, *options: str, port: int = 0, grpc_port: int = 0, pass_fds: tuple[int, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, object]]]:
    """Run the command, on free ports unless told; gives the process and the JSON that it prints once it answers."""
    command = [sys.executable, "-m", "hasten", "serve", str(path), "--json"]
    command += ["--port", str(port), "--grpc-port", str(grpc_port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=pass_fds)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)[1].decode()
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def served(
    path: Path, listening: Listening, new_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
) -> Iterator[Open]:
    """Serve in a thread until the block ends."""
    opened: list[Open] = []
    failed: list[BaseException] = []
    ready = threading.Event()
    loop = new_loop()
    stop = asyncio.Event()

    async def main() -> None:
        async with open_app(path, listening) as found:
            opened.append(found)
            ready.set()
            await stop.wait()

    def work() -> None:
        try:
            loop.run_until_complete(main())
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failed.append(error)
        finally:
            ready.set()
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    try:
        if failed:
            raise failed[0]
        yield opened[0]
    finally:
        if not failed:
            loop.call_soon_threadsafe(stop.set)
        thread.join(60)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def call(
    url: str, verb: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Make one call over a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(verb, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def infer_body(rows: np.ndarray[Any, Any], **more: Any) -> bytes:
    """Write a JSON request of the small network."""
    tensor = {"name": "x", "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel().tolist()}
    return json.dumps({"inputs": [tensor], **more}).encode()


def rows_of(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((n, FEATURES)).astype(np.float32)
