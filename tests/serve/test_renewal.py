"""SIGHUP: keys, certificates and log files are exchanged under a server that answers; what is no good stays away."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import pty
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from hasten.client.client import Client
from hasten.deployment import Serving
from hasten.errors import BadInput, StoreError
from hasten.serve import app
from hasten.serve.access import AccessLog
from hasten.serve.app import Listening, open_app
from hasten.serve.certificate import Certificate
from hasten.serve.keys import read_keys
from hasten.serve.manager import READY, reloading, tell_manager
from hasten.serve.renewal import Renewal
from hasten.serve.repository import Bundle, Repository, open_repository
from hasten.serve.service import Service
from serve.bundles import bundle, rows, run
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


def test_however_many_hangups_come_among_requests_none_fails_and_what_the_last_is_about_is_taken(
    tmp_path: Path,
) -> None:
    bundle(tmp_path / "models" / "net")
    keys, hangups, seen = tmp_path / "keys", 40, set()
    keys.write_text(f"{OLD}\n")
    with process(tmp_path / "models", "--api-keys", str(keys)) as server:
        for number in range(hangups):
            (tmp_path / "new").write_text(f"{OLD}\n{NEW}-{number}\n")
            (tmp_path / "new").rename(keys)
            server.popen.send_signal(signal.SIGHUP)
            if number % 4 == 0:
                seen.add(status(server, OLD))
        while status(server, f"{NEW}-{hangups - 1}") != 200:
            seen.add(status(server, OLD))
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(LONG_S) == 0
    assert seen == {200}


def test_hangups_that_come_while_one_waits_for_its_turn_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # whoever runs the tests may ignore it
    told: list[str] = []

    async def work() -> None:
        begun, goes_on, ready = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def renew() -> None:
            told.append("begun")
            begun.set()
            await goes_on.wait()
            told.append("ended")

        with contextlib.ExitStack() as stack:
            app._on_hangup(stack, asyncio.Event(), ready, renew)
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            assert not told, "a server that is not ready yet reads nothing again"
            ready.set()
            await begun.wait()
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.to_thread(int)  # the loop has heard of it once it has heard of this
            goes_on.set()
            while len(told) < 4:
                await asyncio.sleep(0)

    run(work())
    assert told == ["begun", "ended"] * 2


def test_a_terminal_that_goes_ends_the_server_and_one_that_is_there_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setattr("serve.process.STDIN", theirs)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "manager"))
    with manager(tmp_path / "manager") as door, process(bundle(tmp_path / "net")) as server:
        assert heard(door) == ["READY=1"]
        server.popen.send_signal(signal.SIGHUP)
        assert heard(door)[0] == "RELOADING=1"
        assert heard(door) == ["READY=1"]
        os.close(ours)
        os.close(theirs)
        server.popen.send_signal(signal.SIGHUP)
        assert heard(door) == ["STOPPING=1"]
        assert server.popen.wait(LONG_S) == 0


def test_models_that_are_all_gone_stay_loaded_and_one_that_is_gone_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "models"
    bundle(home / "net")
    bundle(home / "other")

    async def work() -> None:
        service = Service(open_repository(home))
        await service.start()
        (home / "other").rename(tmp_path / "other")
        await service.refresh()
        assert "the model other is gone from the repository, and is unloaded" in caplog.text
        (home / "net").rename(tmp_path / "net")
        for _ in range(2):
            with pytest.raises(StoreError, match="holds no deployment any more"):
                await service.refresh()
        assert [entry["name"] for entry in service.index(ready=True)] == ["net"]
        (tmp_path / "other").rename(home / "other")
        (tmp_path / "net").rename(home / "net")
        await service.refresh()
        assert [entry["name"] for entry in service.index(ready=True)] == ["net", "other"]
        await service.stop()

    run(work())


def test_a_bundle_that_is_away_for_a_moment_is_not_unloaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models"
    bundle(home / "net")
    bundle(home / "other")
    scan = Repository.scan

    def away(repository: Repository, known: Any = None) -> dict[str, dict[str, Bundle]]:
        found = scan(repository, known)
        monkeypatch.setattr(Repository, "scan", scan)
        return {"other": found["other"]}

    async def work() -> None:
        service = Service(open_repository(home))
        await service.start()
        monkeypatch.setattr(Repository, "scan", away)
        await service.refresh()
        assert Repository.scan is scan
        assert [entry["name"] for entry in service.index(ready=True)] == ["net", "other"]
        assert "unloaded" not in caplog.text
        await service.stop()

    run(work())


def test_a_worker_hears_no_signal_that_is_for_its_server(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, isolation="process"))
    with process(path) as server:
        (worker,) = psutil.Process(server.popen.pid).children()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            worker.send_signal(number)
        with Client(f"http://{server.http[0]}:{server.http[1]}") as client:
            client.infer("net", {"x": rows(1)})
        assert worker.is_running()
        assert psutil.Process(server.popen.pid).children() == [worker]
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(LONG_S) == 0
        psutil.wait_procs([worker], LONG_S)
        assert not worker.is_running()


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


@pytest.mark.parametrize("kinds", [("ec", "ec"), ("rsa", "ec"), ("ec", "rsa")], ids="-".join)
@pytest.mark.parametrize("transport", ["fast", "library"])
def test_a_new_certificate_is_shown_from_the_next_handshake_on_whatever_its_key(
    transport: str, kinds: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path / "net")
    cert, key = certificate(tmp_path, kinds[0])
    (tmp_path / "next").mkdir()
    fresh = certificate(tmp_path / "next", kinds[1])
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


def shaken(context: ssl.SSLContext, *, speaks: str) -> tuple[bytes, str | None]:
    """Shake hands with a context in memory; gives its certificate, and what is spoken."""
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_alpn_protocols([speaks])
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks, answers = client.wrap_bio(back, there), context.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (asks, answers):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    found = asks.getpeercert(binary_form=True)
    assert found
    return found, asks.selected_alpn_protocol()


def test_files_that_do_not_fit_leave_all_that_is_spoken_as_it_was(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other_cert, other_key = certificate(tmp_path / "other", "rsa")
    ours = Certificate(cert, key)
    contexts = {name: ours.context(speaks=name) for name in ("http/1.1", "h2")}
    old, pem = der(cert), ours.pem
    shutil.copyfile(other_cert, cert)  # its key is still on the way
    with pytest.raises(BadInput, match="cannot be used"):
        ours.renew()
    assert ours.pem is pem
    assert [shaken(context, speaks=name) for name, context in contexts.items()] == [(old, n) for n in contexts]
    shutil.copyfile(other_key, key)
    ours.renew()
    assert ours.pem == (other_key.read_bytes(), other_cert.read_bytes())
    assert [shaken(context, speaks=name) for name, context in contexts.items()] == [(der(cert), n) for n in contexts]


def test_a_key_that_is_locked_is_told_and_nobody_is_asked(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    locked = [
        "openssl",
        "pkey",
        "-in",
        str(key),
        "-aes256",
        "-passout",
        "pass:secret",
        "-out",
        str(tmp_path / "locked"),
    ]
    subprocess.run(locked, check=True, capture_output=True)
    with pytest.raises(BadInput, match="cannot be used"):
        Certificate(cert, tmp_path / "locked").context(speaks="h2")


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


def test_a_manager_that_reads_nothing_holds_the_server_up_for_a_moment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hasten.serve.manager.PATIENCE_S", 0.01)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "manager"))
    with manager(tmp_path / "manager"):
        while tell_manager(READY):
            continue
    assert "cannot be told: timed out" in caplog.text


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
