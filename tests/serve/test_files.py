"""Open files: what is kept apart from connections, and what a client is told at the end."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("uvloop", reason="needs the extra 'serve'")

from hasten.serve.app import FILES_APART, within_files
from hasten.serve.limits import Limits
from serve.bundles import bundle
from serve.process import process
from serve.served import call, infer_body, rows_of

FILES = 128
ASK = b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n"


def test_connections_leave_files_to_others(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def may_open(files: int) -> int:
        asked.append(files)
        return 100_000

    monkeypatch.setattr("hasten.serve.app.allow_files", may_open)
    limits = Limits(connections=1000, surplus=20)
    assert within_files(limits, 2).descriptors == 100_000 - FILES_APART
    assert within_files(limits, 1).surplus == 20
    assert asked == [2 * 1020 + FILES_APART, 1020 + FILES_APART]
    assert not caplog.records
    monkeypatch.setattr("hasten.serve.app.allow_files", lambda files: FILES)
    found = within_files(limits, 2)
    assert (found.connections, found.descriptors, found.surplus) == (1000, FILES // 2, FILES // 8)
    assert "may open 128 files, so at most about 64 connections are taken at once, not 1000" in caplog.text


def test_a_server_with_few_files_tells_whom_it_cannot_take_and_goes_on(tmp_path: Path) -> None:
    models = tmp_path / "models"
    bundle(models / "net")
    with process(models, files=FILES) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.http, 30)) for _ in range(FILES)]
        answers = []
        for client in clients:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(ASK)
            with contextlib.suppress(ConnectionResetError):
                answers.append(client.recv(4096)[9:12])
        taken = answers.count(b"200")
        assert FILES // 4 < taken <= FILES // 2
        assert answers[:taken] == [b"200"] * taken
        assert b"503" in answers[taken:]
        assert b"" not in answers, "nobody is closed without a word"
        url = f"http://{server.http[0]}:{server.http[1]}"
        for _ in range(3):
            clients.pop(0).close()
        bundle(models / "other")
        assert call(url, "POST", "/v2/repository/models/other/load", b"{}")[0] == 200, "a model finds files"
        assert call(url, "POST", "/v2/models/other/infer", infer_body(rows_of(2)))[0] == 200
