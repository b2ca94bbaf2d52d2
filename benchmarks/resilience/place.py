"""What is served, and by whom: two versions of a network that answer differently, and ``hasten serve`` processes."""

import asyncio
import contextlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
from traffic import FEATURES, TOLERANCE, Bank

from hasten.deployment import Serving
from hasten.testing.deployments import deployed
from hasten.testing.models import mlp

BANK_ROWS = 512


def make_bundles(home: Path, serving: Serving) -> Bank:
    """Write the bundles ``home/a`` and ``home/b``, and give rows with what ONNX Runtime itself says of them."""
    rows = np.random.default_rng(0).standard_normal((BANK_ROWS, FEATURES)).astype(np.float32)
    answers = []
    for seed, name in enumerate("ab"):
        model = mlp(seed=seed)
        deployed(model, home / name, serving=serving)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers.append(session.run(["y"], {"x": rows})[0])
    apart = np.abs(answers[0] - answers[1]).max(axis=1)
    assert apart.min() > 10 * TOLERANCE, "the versions' answers must tell them apart on every row"
    return Bank(rows, (answers[0], answers[1]))


def stage(home: Path, version: int) -> None:
    """Make ready to publish a version: odd numbers are ``a``, even ones ``b``."""
    shutil.copytree(home / ("a" if version % 2 else "b"), home / "staged" / str(version))


def publish(home: Path, version: int) -> None:
    """Put a version into the repository ``home/models`` whole, by renaming; it was staged, or is now."""
    staged = home / "staged" / str(version)
    if not staged.exists():
        stage(home, version)
    staged.rename(home / "models" / "net" / str(version))


def withdraw(home: Path, version: int) -> None:
    (home / "models" / "net" / str(version)).rename(home / "staged" / f"old-{version}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def post(place: tuple[str, int], path: str, document: dict) -> tuple[int, str]:
    """Make one call over a connection of its own."""
    connection = http.client.HTTPConnection(*place, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(document))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


async def post_here(place: tuple[str, int], path: str, document: dict) -> tuple[int, str]:
    """Make one call over a connection of its own, on the running event loop: a thread would hold up the load."""
    body = json.dumps(document).encode()
    reader, writer = await asyncio.open_connection(*place)
    with contextlib.closing(writer):
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head, _, said = (await reader.read()).partition(b"\r\n\r\n")
    return int(head.split()[1]), said.decode()


@dataclass(frozen=True)
class Server:
    """A ``hasten serve`` process that answers."""

    process: subprocess.Popen
    place: tuple[str, int]
    said: Path
    began_s: float

    @classmethod
    async def start(cls, what: Path, scratch: Path, *options: str, fds: tuple[int, ...] = ()) -> "Server":
        """Start the command, and wait for its line of JSON: from then on it answers."""
        said = Path(tempfile.mkstemp(dir=scratch, suffix=".log")[1])
        command = [sys.executable, "-m", "hasten", "serve", str(what), "--json", "--grpc-port", "-1", *options]
        began_s = time.monotonic()
        with said.open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, pass_fds=fds)
        line = await asyncio.to_thread(process.stdout.readline)
        assert line, f"the server did not start: {said.read_text()}"
        host, _, port = json.loads(line)["http"].removeprefix("http://").rpartition(":")
        return cls(process, (host, int(port)), said, time.monotonic() - began_s)

    async def stop(self, limit_s: float = 60.0) -> int:
        """Send SIGTERM and give the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.ended(limit_s)

    async def ended(self, limit_s: float = 60.0) -> int:
        try:
            return await asyncio.to_thread(self.process.wait, limit_s)
        finally:
            self.process.stdout.close()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def workers(self) -> list[int]:
        """Give the process ids of its workers."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def ready_workers(self) -> int:
        """Ask how many workers take batches."""
        connection = http.client.HTTPConnection(*self.place, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("hasten_workers{"))

    def rss_bytes(self) -> int:
        """Give the resident memory of the server and its workers."""
        whole = psutil.Process(self.process.pid)
        total = whole.memory_info().rss
        for child in whole.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += child.memory_info().rss
        return total

    def open_files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())
