"""SIGHUP: keys, certificates and log files are exchanged under a server that answers; what is no good stays away."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import pty
import shutil
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from hasten.errors import BadInput
from hasten.serve.access import AccessLog
from hasten.serve.app import Listening, open_app
from hasten.serve.certificate import Certificate
from hasten.serve.keys import read_keys
from hasten.serve.manager import READY, reloading, tell_manager
from hasten.serve.renewal import Renewal
from serve.bundles import bundle, run
from serve.certificates import certificate
from serve.process import Process, process

OLD, NEW = "the-old-key-of-the-server", "the-new-key-of-the-server"
LONG_S = 30.0


@contextmanager
def manager(path: Path) -> Iterator[socket.socket]:
    """A socket that listens as systemd's does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind(str(path))
        door.settimeout(LONG_S)
        yield door


def heard(door: socket.socket) -> list[str]:
    return door.recv(4096).decode().splitlines()


def status(server: Process, key: str) -> int:
    connection = http.client.HTTPConnection(*server.http, timeout=LONG_S)
    connection.request("GET", "/v2/models/net", headers={"X-Api-Key": key})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_a_hangup_exchanges_keys_and_log_and_looks_at_the_models_while_the_manager_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle(tmp_path / "models" / "net")
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"{OLD}\n")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "manager"))
    options = ("--api-keys", str(keys), "--access-log", str(log))
    with manager(tmp_path / "manager") as door, process(tmp_path / "models", *options) as server:
        assert heard(door) == ["READY=1"]
        assert (status(server, OLD), status(server, NEW)) == (200, 401)
        keys.write_text(f"{NEW}\n")
        log.rename(tmp_path / "log.1")
        bundle(tmp_path / "models" / "other")
        server.popen.send_signal(signal.SIGHUP)
        begun = heard(door)
        assert begun[0] == "RELOADING=1"
        assert begun[1].removeprefix("MONOTONIC_USEC=").isdecimal()
        assert heard(door) == ["READY=1"]
        assert (status(server, OLD), status(server, NEW)) == (401, 200)
        server.popen.send_signal(signal.SIGTERM)
        assert heard(door) == ["STOPPING=1"]
        assert server.popen.stderr is not None
        told = server.popen.stderr.read().decode()
        assert server.popen.wait(LONG_S) == 0
    assert "read again: API keys, access log, repository" in told
    before, after = (
        [json.loads(line)["status"] for line in (tmp_path / name).read_text().splitlines()] for name in ("log.1", "log")
    )
    assert (before, after) == ([200, 401], [401, 200])


def test_of_a_terminal_that_goes_a_hangup_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setattr("serve.process.STDIN", theirs)
    with process(bundle(tmp_path / "net")) as server:
        server.popen.send_signal(signal.SIGHUP)
        assert server.popen.wait(LONG_S) == 0
    os.close(ours)
    os.close(theirs)


def test_under_nohup_a_hangup_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(tmp_path / "net")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a child begins with it
    try:
        with process(path) as server:
            server.popen.send_signal(signal.SIGHUP)
            assert status(server, "") == 200
            server.popen.send_signal(signal.SIGTERM)
            assert server.popen.stderr is not None
            assert "read again" not in server.popen.stderr.read().decode()
    finally:
        signal.signal(signal.SIGHUP, before)


def fingerprint(port: int, *, speaks: str) -> bytes:
    """Give the certificate that a server shows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([speaks])
    with socket.create_connection(("127.0.0.1", port), LONG_S) as plain, context.wrap_socket(plain) as door:
        found = door.getpeercert(binary_form=True)
    assert found
    return found


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


@pytest.mark.parametrize("transport", ["fast", "library"])
def test_a_new_certificate_is_shown_from_the_next_handshake_on(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path / "net")
    cert, key = certificate(tmp_path)
    (tmp_path / "next").mkdir()
    fresh = certificate(tmp_path / "next")
    made: list[Certificate] = []
    monkeypatch.setattr("hasten.serve.app.Certificate", lambda *paths: made.append(Certificate(*paths)) or made[-1])

    async def work() -> None:
        listening = Listening(port=0, grpc_port=0, tls_cert=cert, tls_key=key, transport=transport)  # type: ignore[arg-type]
        async with open_app(path, listening) as server:
            assert server.grpc is not None
            ports = {
                "http/1.1": int(server.http.rpartition(":")[2]),
                "h2": int(server.grpc.rpartition(":")[2]),
            }

            async def shown() -> set[bytes]:
                return {await asyncio.to_thread(fingerprint, port, speaks=name) for name, port in ports.items()}

            old = der(cert)
            assert await shown() == {old}
            channel = grpc.aio.secure_channel(server.grpc, grpc.ssl_channel_credentials(cert.read_bytes()))
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            assert await live(b"") == b"\x08\x01"
            for there, here in zip(fresh, (cert, key), strict=True):
                shutil.copyfile(there, here)
            made[0].renew()
            assert await shown() == {der(fresh[0])} != {old}
            assert await live(b"") == b"\x08\x01", "a connection that is open stays"
            await channel.close()

    run(work())


def test_a_key_that_is_not_the_certificates_leaves_both_as_they_were(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other_cert, other_key = certificate(tmp_path / "other")
    ours = Certificate(cert, key)
    context, pem = ours.context(speaks="h2"), ours.pem
    before = context.get_ca_certs(), context.cert_store_stats()
    shutil.copyfile(other_key, key)
    with pytest.raises(BadInput, match="cannot be used"):
        ours.renew()
    assert ours.pem is pem
    assert (context.get_ca_certs(), context.cert_store_stats()) == before
    shutil.copyfile(other_cert, cert)
    ours.renew()
    assert ours.pem == (other_key.read_bytes(), other_cert.read_bytes())


def test_what_cannot_be_used_is_told_and_the_rest_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = tmp_path / "keys", tmp_path / "logs"
    path.write_text(OLD)
    folder.mkdir()
    keys, access = read_keys(path), AccessLog.at(folder / "log", time_s=lambda: 0.0)
    renewal = Renewal(keys=(path, keys), access=access)
    path.write_text("short")
    assert renewal.renew() == ["access log"]
    assert "the API keys stay as they were" in caplog.text
    keys.check({b"x-api-key": OLD.encode()})
    path.write_text(NEW)
    shutil.rmtree(folder)
    assert renewal.renew() == ["API keys"]
    assert "the access log stay as they were" in caplog.text
    keys.check({b"x-api-key": NEW.encode()})
    access.close()


def test_without_files_nothing_is_read_again() -> None:
    assert Renewal().renew() == []
    assert Renewal(access=AccessLog(io.BytesIO(), time_s=lambda: 0.0)).renew() == [], "standard output has no name"


def test_a_manager_of_an_abstract_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind(b"\0hasten-test-%d" % os.getpid())
        monkeypatch.setenv("NOTIFY_SOCKET", f"@hasten-test-{os.getpid()}")
        assert tell_manager(READY)
        assert heard(door) == ["READY=1"]
        assert tell_manager(*reloading())
        assert heard(door)[0] == "RELOADING=1"


def test_a_manager_that_is_gone_is_logged_and_none_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not tell_manager(READY)
    assert "cannot be told" in caplog.text
    for name in ("", "relative"):
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert not tell_manager(READY)
    assert len(caplog.records) == 1
