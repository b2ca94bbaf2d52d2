"""The access log: a line of JSON for each request, written in batches between ticks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import IO

import msgspec

from hasten.errors import BadInput
from hasten.serve.http1_request import Request
from hasten.serve.http2_stream import Call

logger = logging.getLogger(__name__)

KEPT_LINES = 10_000
"""Lines held until the next flush; at more they are written at once."""


class AccessLog:
    """Collects lines and writes them when ``flush`` is called."""

    def __init__(self, stream: IO[bytes], *, time_s: Callable[[], float], path: Path | None = None) -> None:
        self._stream = stream
        self._path = path
        self._time_s = time_s
        self._lines: list[bytes] = []
        self._failing = False
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
            self.flush()
            before, self._stream, self._failing = self._stream, fresh, False
            _closed(before)

    def close(self) -> None:
        """Write what was noted and close the file. Closing twice is fine."""
        if not self._stream.closed:
            self.flush()
            _closed(self._stream)

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
        self._lines.append(msgspec.json.encode(line))
        if len(self._lines) >= KEPT_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            self._stream.write(b"\n".join(lines) + b"\n")
            self._stream.flush()
        except OSError as error:  # a full disk, a reader that has gone: requests go on
            if not self._failing:
                logger.warning("the access log cannot be written, and its lines are lost until it can: %s", error)
            self._failing = True
        else:
            self._failing = False


def _appended(path: Path) -> IO[bytes]:
    try:  # without a buffer: what could not be written must not come again when it is closed
        return path.open("ab", buffering=0)
    except OSError as error:
        raise BadInput(f"the access log {path} cannot be written: {error}") from error


def _closed(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except OSError as error:  # some file systems tell only now what could not be written
        logger.warning("the access log may lack its last lines: %s", error)
