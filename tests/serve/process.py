"""``hasten serve`` as a process of its own on free ports, and what the kernel says of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

STDIN = subprocess.DEVNULL
"""What a server has for its standard input."""


@dataclass(frozen=True)
class Process:
    """A server that answers."""

    popen: subprocess.Popen[bytes]
    http: tuple[str, int]
    grpc: str

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def highest_rss_bytes(self) -> int:
        """Give the most memory that was ever resident in the process."""
        return self._status("VmHWM")

    def rss_bytes(self) -> int:
        """Give the memory that is resident now."""
        return self._status("VmRSS")

    def _status(self, word: str) -> int:
        lines = Path(f"/proc/{self.popen.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{word}:"))


@contextmanager
def process(path: Path, *options: str, files: int | None = None) -> Iterator[Process]:
    """Serve until the block ends, with so many open files at most."""
    ports = ("--port", "0", "--grpc-port", "0", "--drain", "1ms")
    command = [sys.executable, "-m", "hasten", "serve", str(path), "--json", *ports, *options]
    if files is not None:
        command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
    popen = subprocess.Popen(command, stdin=STDIN, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert line, popen.communicate(timeout=60)[1].decode()
        told = json.loads(line)
        place = urlsplit(told["http"])
        yield Process(popen, (str(place.hostname), int(place.port or 0)), told["grpc"])
    finally:
        popen.kill()
        popen.communicate()
