"""The access log's writer: who does not read holds up nobody, and a disk that is nearly full tears no two lines."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")

from hasten.errors import BadInput
from hasten.serve import access
from hasten.serve.access import AccessLog
from hasten.serve.http1_request import Request
from serve.bundles import bundle

LONG_S = 60


class Nowhere:
    def replied(self, request: Request) -> None:
        return


def note(log: AccessLog, *names: bytes) -> None:
    for name in names:
        request = Request(Nowhere(), b"GET", b"/v2", {b"x-request-id": name})
        request.respond(200, b"abc")
        log.log(request)


def ids(data: bytes) -> list[str]:
    return [json.loads(line)["id"] for line in data.splitlines()]


class Gate(io.BytesIO):
    """A stream that takes nothing before it is opened, and keeps what it took."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.open = threading.Event(), threading.Event()

    def write(self, data: object) -> int:
        self.asked.set()
        assert self.open.wait(LONG_S)
        return super().write(data)  # type: ignore[arg-type]


class Disk(io.BytesIO):
    """Takes as many bytes of each write as the next size says; without one it is full, and after those it has room."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = list(sizes)

    def write(self, data: object) -> int:
        assert isinstance(data, memoryview | bytes)
        size = self.sizes.pop(0) if self.sizes else len(data)
        if size == 0:
            raise OSError(28, "No space left on device")
        return super().write(bytes(data)[:size])


def test_a_standard_output_that_nobody_reads_stops_neither_the_answers_nor_the_end(tmp_path: Path) -> None:
    ports = ("--port", "0", "--grpc-port", "-1", "--drain", "1ms")
    command = [sys.executable, "-m", "hasten", "serve", str(bundle(tmp_path / "net")), *ports, "--access-log=-"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout is not None
        place = urlsplit(server.stdout.readline().split()[1].decode())
        with socket.create_connection((str(place.hostname), int(place.port or 0)), LONG_S) as client:
            for _ in range(12):  # 3,600 lines, far more than a pipe takes
                client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n" * 300)
                got = b""
                while got.count(b"HTTP/1.1 200") < 300:
                    piece = client.recv(65_536)
                    assert piece, "the server has left"
                    got += piece
        server.send_signal(signal.SIGTERM)
        assert server.wait(LONG_S) == 0
    finally:
        server.kill()
        server.communicate()


def test_what_a_writer_that_stands_still_cannot_take_is_dropped_and_counted_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "KEPT_BYTES", 1)
    monkeypatch.setattr(access, "WAITING_BYTES", 1_000)
    stream = Gate()
    log = AccessLog(stream, time_s=lambda: 0.0)
    note(log, *(b"%d" % number for number in range(100)))
    assert len(caplog.records) == 1
    stream.open.set()
    log.flush()
    note(log, b"later")
    log.flush()
    got = ids(stream.getvalue())
    assert got == [*(str(number) for number in range(len(got) - 1)), "later"]
    assert 1 < len(got) < 10
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"lacks {101 - len(got)} lines" in caplog.text


def test_lines_before_a_reopen_go_to_the_old_file_however_late_they_are_written(tmp_path: Path) -> None:
    path, old = tmp_path / "log", Gate()
    taken: list[bytes] = []
    closing: Callable[[], None] = old.close

    def close() -> None:
        taken.append(old.getvalue())
        closing()

    old.close = close  # type: ignore[method-assign]
    log = AccessLog(old, time_s=lambda: 0.0, path=path)
    note(log, b"1", b"2")
    log.reopen()
    note(log, b"3")
    assert old.asked.wait(LONG_S)
    old.open.set()
    log.close()
    assert ids(taken[0]) == ["1", "2"]
    assert ids(path.read_bytes()) == ["3"]


def test_closing_waits_for_a_moment_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(access, "WAIT_S", 0.01)
    stream = Gate()
    log = AccessLog(stream, time_s=lambda: 0.0)
    note(log, b"1")
    log.close()
    log.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    stream.open.set()


def test_a_pipe_without_a_reader_is_told_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="nobody reads"):
        AccessLog.at(tmp_path / "pipe", time_s=lambda: 0.0)


def test_a_pipe_that_is_full_and_does_not_wait_gets_every_line() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    stream: IO[bytes] = io.FileIO(write, "w")
    log = AccessLog(stream, time_s=lambda: 0.0)
    names = [b"%d" % number for number in range(2_000)]
    note(log, *names)
    got = bytearray()

    def take() -> None:
        while piece := os.read(read, 65_536):
            got.extend(piece)

    reader = threading.Thread(target=take)
    reader.start()
    log.close()
    reader.join(LONG_S)
    os.close(read)
    assert ids(bytes(got)) == [name.decode() for name in names]


def test_a_disk_that_takes_a_part_gets_the_rest() -> None:
    disk = Disk(5, 7)
    log = AccessLog(disk, time_s=lambda: 0.0)
    note(log, b"1")
    log.flush()
    assert ids(disk.getvalue()) == ["1"]


def test_after_a_failure_within_a_line_the_next_begins_on_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk(5, 0, 0)
    log = AccessLog(disk, time_s=lambda: 0.0)
    for name in (b"1", b"2", b"3", b"4"):
        note(log, name)
        log.flush()
    torn, _, whole = disk.getvalue().partition(b"\n")
    assert (len(torn), ids(whole)) == (5, ["3", "4"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
