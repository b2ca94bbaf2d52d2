"""A deployment served in a child process on loopback, for as long as it is measured."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

import msgspec

from hasten.artifact import Artifact, Json
from hasten.deployment import Deployment, Serving, write_deployment
from hasten.errors import BuildFailed
from hasten.isolation import PYTHON, python_path

START_S = 120.0
END_S = 20.0


@contextlib.contextmanager
def served(
    deployment: Deployment,
    artifact: Artifact,
    *,
    serving: Serving,
    settings: dict[str, Json] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Iterator[str]:
    """Serve a deployment with other ``serving`` and engine settings; gives the server's URL.

    ``files`` are those beside its model, as of its steps (``bundle_files``).

    Raises:
        BuildFailed: it did not come up, and what it said.
    """
    changed = replace(deployment, serving=serving, settings=deployment.settings if settings is None else settings)
    with tempfile.TemporaryDirectory(prefix="hasten-") as folder, tempfile.TemporaryFile() as said:
        path = write_deployment(changed, artifact, Path(folder) / "bundle", files=files)
        command = [*PYTHON, "hasten", "serve", str(path), "--port", "0", "--grpc-port", "-1", "--json"]
        process = subprocess.Popen(
            [*command, "--drain", "1ms"],
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "PYTHONPATH": python_path()},
        )
        out = cast(IO[bytes], process.stdout)
        try:
            yield _address(process, out, said)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            out.close()


def _address(process: subprocess.Popen[bytes], out: IO[bytes], said: IO[bytes]) -> str:
    """Wait for the line that a server prints once it answers."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if not select.select([out], [], [], 0.2)[0] and process.poll() is None:
            continue
        told = _decoded(out.readline())
        if "http" in told:
            return str(told["http"])
        said.seek(0)
        text = " ".join(said.read().decode(errors="replace").split()) or "it ended without a word"
        raise BuildFailed("serving it", text[-400:])
    raise BuildFailed("serving it", f"it did not answer within {START_S:g} s")


def _decoded(line: bytes) -> dict[str, Json]:
    try:
        found = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}
