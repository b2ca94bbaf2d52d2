"""Two servers behind one port, ended and started in turns under load: no request is lost, each is answered rightly."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")

from hasten.testing.models import mlp
from serve.bundles import bundle
from serve.served import infer_body, rows_of, serving

OPTIONS = ("--reuse-port", "--drain", "100ms")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ask_until(over: threading.Event, port: int, seed: int) -> tuple[int, int]:
    """Ask over a kept connection; gives the requests and those sent again because it had been closed before."""
    x = rows_of(2, seed)
    session = onnxruntime.InferenceSession(mlp().SerializeToString(), providers=["CPUExecutionProvider"])
    (right,) = session.run(["y"], {"x": x})
    connection, fresh, asked, again = http.client.HTTPConnection("127.0.0.1", port, timeout=30), True, 0, 0
    body = infer_body(x)
    while not over.is_set():
        asked += 1
        try:
            connection.request("POST", "/v2/models/net/infer", body)
            answer = connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):
            assert not fresh, "a connection of its own was not answered"
            again += 1
            connection.close()
            connection.request("POST", "/v2/models/net/infer", body)
            answer = connection.getresponse()
        document = json.loads(answer.read())
        assert answer.status == 200, document
        np.testing.assert_allclose(document["outputs"][0]["data"], right.ravel(), rtol=1e-4, atol=1e-5)
        fresh = answer.getheader("Connection") == "close"
        if fresh:
            connection.close()
    connection.close()
    return asked, again


@pytest.mark.slow
def test_restarts_behind_one_port_lose_nothing(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")
    port, over = free_port(), threading.Event()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(6) as pool:

        def started() -> subprocess.Popen[bytes]:
            return stack.enter_context(serving(path, *OPTIONS, port=port, grpc_port=-1))[0]

        servers = [started(), started()]
        clients = [pool.submit(ask_until, over, port, seed) for seed in range(6)]
        try:
            for turn in range(2):
                servers[turn].send_signal(signal.SIGTERM)
                assert servers[turn].wait(60) == 0
                servers[turn] = started()
        finally:
            over.set()
        told = [client.result(60) for client in clients]
        for server in servers:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
    assert sum(asked for asked, _ in told) > 12
