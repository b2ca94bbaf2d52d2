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

from hasten.cli.app import run
from hasten.testing.models import mlp
from serve.bundles import bundle
from serve.served import infer_body, rows_of, serving

DRAIN = ("--drain", "100ms")


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
@pytest.mark.parametrize("shared", ["port", "socket"])
def test_restarts_behind_one_port_lose_nothing(tmp_path: Path, shared: str) -> None:
    path = bundle(tmp_path / "net")
    over = threading.Event()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        held = stack.enter_context(socket.create_server(("127.0.0.1", 0))) if shared == "socket" else None
        port = free_port() if held is None else int(held.getsockname()[1])
        fds = () if held is None else (held.fileno(),)
        options = ("--reuse-port",) if held is None else ("--fd", str(held.fileno()))

        def started() -> subprocess.Popen[bytes]:
            again = serving(path, *options, *DRAIN, port=port, grpc_port=-1, pass_fds=fds)
            return stack.enter_context(again)[0]

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


def test_who_comes_while_no_server_is_there_is_answered_by_the_next(tmp_path: Path) -> None:
    path, body = bundle(tmp_path / "net"), infer_body(rows_of(1))
    message = b"POST /v2/models/net/infer HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def early(port: int) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", port), timeout=30)
        client.sendall(message)
        return client

    with socket.create_server(("127.0.0.1", 0)) as held:
        port, fd = int(held.getsockname()[1]), held.fileno()
        for _ in range(2):
            with (
                contextlib.closing(early(port)) as first,
                serving(path, "--fd", str(fd), *DRAIN, grpc_port=-1, pass_fds=(fd,)) as (server, said),
            ):
                assert said["http"] == f"http://127.0.0.1:{port}"
                assert first.recv(15) == b"HTTP/1.1 200 OK"
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0


@pytest.mark.parametrize(("kind", "says"), [("file", "is no socket"), ("unbound", "is no TCP socket that listens")])
def test_what_is_inherited_and_cannot_be_listened_on_is_told(
    tmp_path: Path, kind: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle(tmp_path / "net")
    with (tmp_path / "file").open("wb") as file, socket.socket() as unbound:
        fd = file.fileno() if kind == "file" else unbound.fileno()
        assert run(["serve", str(path), "--fd", str(fd), "--grpc-port", "-1"]) == 1
    assert f"file descriptor {fd} {says}" in capsys.readouterr().err


def test_an_inherited_socket_wants_the_fast_transport(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", str(bundle(tmp_path / "net")), "--fd", "3", "--transport", "library"]
    assert run(words) == 2
    assert "an inherited socket takes the transport 'fast'" in capsys.readouterr().err
