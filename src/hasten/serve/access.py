"""The access log: a line of JSON for each request, written in batches between ticks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from time import perf_counter_ns
from typing import IO

import msgspec

from hasten.serve.http1_request import Request

KEPT_LINES = 10_000
"""Lines held until the next flush; at more they are written at once."""


class AccessLog:
    """Collects lines and writes them when ``flush`` is called."""

    def __init__(self, stream: IO[bytes], *, time_s: Callable[[], float]) -> None:
        self._stream = stream
        self._time_s = time_s
        self._lines: list[bytes] = []
        self._numbers = itertools.count(1)

    def log(self, request: Request) -> None:
        """Note a request that was answered."""
        line = {
            "time": round(self._time_s(), 6),
            "id": request.headers.get(b"x-request-id", b"").decode("latin-1")[:128] or f"{next(self._numbers):x}",
            "peer": request.peer,
            "method": request.method.decode("latin-1"),
            "target": request.target[:512].decode("latin-1"),
            "status": request.status,
            "received_bytes": len(request.body),
            "sent_bytes": request.reply_bytes,
            "duration_ms": round((perf_counter_ns() - request.began_ns) / 1e6, 3),
        }
        self._lines.append(msgspec.json.encode(line))
        if len(self._lines) >= KEPT_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        if self._lines:
            self._stream.write(b"\n".join(self._lines) + b"\n")
            self._stream.flush()
            self._lines.clear()
