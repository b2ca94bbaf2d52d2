"""Nobody is told what runs here: libraries that would tell their makers are told not to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hasten
from hasten.testing.models import mlp, write

RUN = "import numpy, onnxruntime; onnxruntime.InferenceSession({model!r}).run(None, {{'x': numpy.zeros((1, 16), 'f')}})"


def traces(code: str, home: Path, **more: str) -> list[str]:
    """Run code as a user whose home is empty, and name the files that it left there."""
    home.mkdir()
    known = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    env = {**known, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **more}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_onnxruntime_keeps_no_number_of_this_machine_to_send(tmp_path: Path) -> None:
    run = RUN.format(model=str(write(mlp(), tmp_path / "model.onnx")))
    if not traces(run, tmp_path / "alone"):
        pytest.skip("this ONNX Runtime leaves nothing behind by itself")
    assert traces(f"import hasten; {run}", tmp_path / "with") == []
    assert traces(f"import hasten; {run}", tmp_path / "asked", ORT_DISABLE_TELEMETRY="0")


def test_who_wants_it_otherwise_is_left_alone() -> None:
    code = "import hasten, os; print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['ORT_DISABLE_TELEMETRY'])"
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "false"}
    env.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["false", "1"]


def test_each_variable_is_set_by_the_import() -> None:
    assert all(name in os.environ for name in hasten.SILENCED)
