"""Ten thousand connections that say nothing more leave room for one that asks, over HTTP/1.1 and over HTTP/2."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc

from hasten.protocol.grpc_messages import message
from serve.bundles import bundle
from serve.process import Process, process
from serve.served import call

IDLE = 10_000
EACH_BYTES = 12 * 2**10
"""What one idle connection may cost the server: its protocol object, its parser, and asyncio's own."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
ASK = b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 500
    if hard < wanted:
        pytest.skip(f"this machine allows {hard} open files to a process; {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        models = tmp_path_factory.mktemp("idle") / "models"
        bundle(models / "net")
        with process(models) as made:
            yield made
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def idle(place: tuple[str, int], hello: bytes, answer: bytes) -> Iterator[list[socket.socket]]:
    """Open connections, each of which is taken in by the server: it has answered."""
    opened = []
    try:
        for _ in range(IDLE):
            opened.append(socket.create_connection(place, 30))
            opened[-1].sendall(hello)
            assert opened[-1].recv(4096).startswith(answer)
        yield opened
    finally:
        for each in opened:
            each.close()


@pytest.mark.slow
def test_ten_thousand_idle_connections_of_http_leave_room_for_one_that_asks(server: Process) -> None:
    before = server.rss_bytes()
    with idle(server.http, ASK, b"HTTP/1.1 200 OK") as opened:
        status, _, _ = call(f"http://{server.http[0]}:{server.http[1]}", "GET", "/v2/models/net/ready")
        assert status == 200
        assert (server.rss_bytes() - before) / IDLE < EACH_BYTES
        opened[0].sendall(ASK)  # and an idle one may ask again
        assert opened[0].recv(4096).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.slow
def test_ten_thousand_idle_connections_of_grpc_leave_room_for_one_that_asks(server: Process) -> None:
    host, _, port = server.grpc.rpartition(":")
    before = server.rss_bytes()
    with idle((host, int(port)), PREFACE, b"\0\0"), grpc.insecure_channel(server.grpc) as channel:
        data = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"", timeout=30)
        assert message("ServerReadyResponse").FromString(data).ready
        assert (server.rss_bytes() - before) / IDLE < EACH_BYTES
