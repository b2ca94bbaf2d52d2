"""KServe's own Python clients, unchanged, REST and gRPC, in a process and, if told, an environment of their own.

``HASTEN_KSERVE_PYTHON`` names the interpreter of an environment with ``pip install kserve``; without it this one is
tried. In one environment with tritonclient it works too, as long as one process imports only one of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from hasten.serve.app import Listening, Transport
from serve.bundles import bundle
from serve.served import served

SCRIPT = Path(__file__).with_name("kserve_calls.py")


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("HASTEN_KSERVE_PYTHON", sys.executable)
    tried = subprocess.run([found, "-c", "import kserve"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"{found} has no kserve; HASTEN_KSERVE_PYTHON names an interpreter that has")
    return found


@pytest.mark.parametrize("transport", ["fast", "library"])
def test_every_call_of_kserves_clients_is_answered(python: str, tmp_path: Path, transport: Transport) -> None:
    bundle(tmp_path / "models" / "net")
    with served(tmp_path / "models", Listening(port=0, grpc_port=0, transport=transport)) as opened:
        assert opened.grpc is not None
        command = [python, str(SCRIPT), opened.http, opened.grpc]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "all calls answered" in done.stdout
