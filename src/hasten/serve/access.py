"""The access log: a line of JSON for each request, written in batches by a thread: a pipe or a disk may stand still."""

from __future__ import annotations

import asyncio
import atexit
import errno
import itertools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from time import perf_counter_ns
from typing import IO

import msgspec

from hasten.errors import BadInput
from hasten.serve.http1_request import Request
from hasten.serve.http2_stream import Call

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**18
"""Of lines held until the next flush; at more they are handed to the writer at once."""

WAITING_BYTES = 2**22
"""Of lines that wait for the writer, some 20,000; what does not fit is dropped."""

WAIT_S = 1.0
"""How long closing waits for what is left."""


class Writer:
    """Writes lines to a stream in a thread of its own, in order; handing them over never waits."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        """The thread's own, once there is one."""
        self._changed = threading.Condition()
        self._work: deque[bytes | IO[bytes] | None] = deque()
        """What is to be written; a stream to go on in; None: the end. The first is in work."""
        self._waiting_bytes = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failing = False
        self._torn = False
        """What was written last ends within a line."""

    def hand(self, lines: list[bytes]) -> None:
        """Take lines, or drop them where the writer is behind."""
        data = b"\n".join(lines) + b"\n"
        with self._changed:
            # Who has begun to drop goes on until there is room for more than a moment: each change is logged.
            room = WAITING_BYTES // 2 if self._dropped else WAITING_BYTES
            fits = self._waiting_bytes + len(data) <= room
            ended, begun = (self._dropped if fits else 0), not fits and not self._dropped
            self._dropped = 0 if fits else self._dropped + len(lines)
            if fits:
                self._waiting_bytes += len(data)
                self._put(data)
        if begun:
            logger.warning("the access log is not taken as fast as it comes: lines are dropped until it is")
        _told(ended)

    def turn_to(self, stream: IO[bytes]) -> None:
        """Go on in another stream once what was handed over is written, and close the one before."""
        with self._changed:
            self._put(stream)

    def wait(self, at_most_s: float) -> bool:
        """Wait until all is written; says whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._work, at_most_s)

    def close(self) -> None:
        """Wait a moment for what is left, and close the stream. Closing twice is fine."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            thread, dropped = self._thread, self._dropped
            if thread is not None:
                self._put(None)
        _told(dropped)
        if thread is None:
            _closed(self._stream)
            return
        atexit.unregister(self.close)
        if not self.wait(WAIT_S):  # the thread ends with the process
            logger.warning("the access log lacks its last lines: nobody takes them")

    def _put(self, work: bytes | IO[bytes] | None) -> None:
        self._work.append(work)
        self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # a daemon ends in the middle of its work

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._work))
                work = self._work[0]
            if isinstance(work, bytes):
                self._write(work)
            else:
                _closed(self._stream)
            if work is not None and not isinstance(work, bytes):
                self._stream, self._failing, self._torn = work, False, False
            with self._changed:
                self._work.popleft()
                self._waiting_bytes -= len(work) if isinstance(work, bytes) else 0
                self._changed.notify_all()
            if work is None:
                return

    def _write(self, data: bytes) -> None:
        left = memoryview(b"\n" + data if self._torn else data)
        try:
            while left:
                count = self._stream.write(left)
                if count:
                    self._torn = left[count - 1] != ord("\n")
                    left = left[count:]  # a disk that is nearly full takes a part
                else:  # whoever shares the pipe has made it one that does not wait
                    poll = select.poll()
                    poll.register(self._stream, select.POLLOUT)
                    poll.poll()
            self._stream.flush()
        except OSError as error:  # a full disk, a reader that has gone: requests go on
            if not self._failing:
                logger.warning("the access log cannot be written, and its lines are lost until it can: %s", error)
            self._failing = True
        else:
            self._failing = False


class AccessLog:
    """Collects lines, and hands them to the writer when ``flush`` is called."""

    def __init__(self, stream: IO[bytes], *, time_s: Callable[[], float], path: Path | None = None) -> None:
        self._writer = Writer(stream)
        self._path = path
        self._time_s = time_s
        self._lines: list[bytes] = []
        self._bytes = 0
        self._numbers = itertools.count(1)

    @classmethod
    def at(cls, path: Path, *, time_s: Callable[[], float]) -> AccessLog:
        """Append to a file. Raises BadInput where it cannot be written."""
        return cls(_appended(path), time_s=time_s, path=path)

    @property
    def has_file(self) -> bool:
        """Whether it is a file that may be moved away, and not standard output."""
        return self._path is not None

    def reopen(self) -> None:
        """Write what was noted, and go on in the file that has the name now: the one before was moved away.

        Raises:
            BadInput: there is none that can be written; the one before stays.
        """
        if self._path is not None:
            fresh = _appended(self._path)
            self._hand()
            self._writer.turn_to(fresh)

    def close(self) -> None:
        """Write what was noted, for a moment at most, and close the file. Closing twice is fine."""
        self._hand()
        self._writer.close()

    def log(self, request: Request) -> None:
        """Note an HTTP request that was answered."""
        told: dict[str, str | int] = {
            "method": request.method.decode("latin-1"),
            "target": request.target[:512].decode("latin-1"),
            "status": request.status,
        }
        self._note(request.headers, request.peer, told, (len(request.body), request.reply_bytes), request.began_ns)

    def log_call(self, call: Call, peer: str) -> None:
        """Note a gRPC call that was answered."""
        told: dict[str, str | int] = {
            "method": "POST",
            "target": call.path[:512].decode("latin-1"),
            "status": 200,
            "grpc_status": call.status,
        }
        received = len(call.body if call.whole is None else call.whole)
        self._note(call.headers, peer, told, (received, call.sent_bytes), call.began_ns)

    def _note(
        self,
        headers: Mapping[bytes, bytes],
        peer: str,
        told: dict[str, str | int],
        n_bytes: tuple[int, int],
        began_ns: int,
    ) -> None:
        line = {
            "time": round(self._time_s(), 6),
            "id": headers.get(b"x-request-id", b"").decode("latin-1")[:128] or f"{next(self._numbers):x}",
            "peer": peer,
            **told,
            "received_bytes": n_bytes[0],
            "sent_bytes": n_bytes[1],
            "duration_ms": round((perf_counter_ns() - began_ns) / 1e6, 3),
        }
        encoded = msgspec.json.encode(line)
        self._lines.append(encoded)
        self._bytes += len(encoded)
        if self._bytes >= KEPT_BYTES:
            self._hand()

    def flush(self) -> None:
        """Let what was noted be written; elsewhere than on an event loop, wait a moment until it is."""
        self._hand()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._writer.wait(WAIT_S)

    def _hand(self) -> None:
        lines, self._lines, self._bytes = self._lines, [], 0
        if lines:
            self._writer.hand(lines)


def _appended(path: Path) -> IO[bytes]:
    try:  # without a buffer: what could not be written must not come again when it is closed
        stream = FileIO(path, "ab", opener=_at_once)
        os.set_blocking(stream.fileno(), True)
    except OSError as error:
        why = "it is a pipe that nobody reads" if error.errno == errno.ENXIO else str(error)
        raise BadInput(f"the access log {path} cannot be written: {why}") from error
    return stream


def _at_once(path: str, flags: int) -> int:
    """Open what may be a pipe without waiting for its reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _told(dropped: int) -> None:
    if dropped:
        logger.warning("the access log lacks %d lines that were dropped", dropped)


def _closed(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except OSError as error:  # some file systems tell only now what could not be written
        logger.warning("the access log may lack its last lines: %s", error)
