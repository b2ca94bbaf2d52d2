"""Everything wrong that a user may bring to ``hasten optimize``: one clear line each, and exit code 1 or 2."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hasten.cli.app import run
from hasten.testing import models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model and good data, to make bad ones of."""
    models.write(models.mlp(), tmp_path / "model.onnx")
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((120, 16)).astype(np.float32), random.integers(0, 4, 120)
    np.savez(tmp_path / "val.npz", x=x, label=labels)
    np.savez(tmp_path / "other_length.npz", x=x, label=labels[:-1])
    np.savez(tmp_path / "misfit.npz", x=x[:, :7], label=labels)
    return tmp_path


def truncated(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "bad.onnx").write_bytes(data[: len(data) // 2])


def outside(folder: Path) -> None:
    model = models.mlp()
    onnx.save_model(model, folder / "bad.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    bare = onnx.load(folder / "bad.onnx", load_external_data=False)
    for tensor in bare.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    (folder / "bad.onnx").write_bytes(bare.SerializeToString())


def no_inference(folder: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="strange_node", domain="com.example")
    save(folder, [node], TensorProto.FLOAT, [helper.make_opsetid("com.example", 1)])


def lacking_dtype(folder: Path) -> None:
    """Acosh of float64 is standard, and ONNX Runtime has no kernel for it."""
    save(folder, [helper.make_node("Acosh", ["x"], ["y"], name="acosh")], TensorProto.DOUBLE, [])
    np.savez(folder / "val.npz", x=np.arange(1, 481, dtype=np.float64).reshape(120, 4))


def save(folder: Path, nodes: list[onnx.NodeProto], dtype: int, domains: list[onnx.OperatorSetIdProto]) -> None:
    x, y = (helper.make_tensor_value_info(name, dtype, ["batch", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "net", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), *domains], ir_version=10)
    onnx.save_model(model, folder / "bad.onnx")


CASES = {
    "a missing file": (None, "none.onnx", "val.npz", [], 1, "none.onnx"),
    "a truncated model": (truncated, "bad.onnx", "val.npz", [], 1, "bad.onnx"),
    "external data outside the folder": (outside, "bad.onnx", "val.npz", [], 1, "../w.bin"),
    "an operator without shape inference": (no_inference, "bad.onnx", "val.npz", [], 1, "strange_node"),
    "a dtype that the engine lacks": (lacking_dtype, "bad.onnx", "val.npz", [], 1, "Acosh"),
    "labels of another length": (None, "model.onnx", "other_length.npz", [], 1, "119"),
    "samples that do not fit": (None, "model.onnx", "misfit.npz", [], 2, "wants"),
    "missing data": (None, "model.onnx", "none.npz", [], 1, "none.npz"),
    "an unknown engine": (None, "model.onnx", "val.npz", ["--engines", "onnxruntim"], 2, "did you mean 'onnxruntime'"),
    "an unknown metric": (None, "model.onnx", "val.npz", ["--metric", "acuracy"], 2, "did you mean 'accuracy'"),
    "an unknown label column": (None, "model.onnx", "val.npz", ["--label", "lable"], 2, "did you mean 'label'"),
    "more threads than cores": (None, "model.onnx", "val.npz", ["--threads", "4096"], 2, "cores"),
    "fewer samples than splits": (None, "model.onnx", "val.npz", ["--limit", "2"], 1, "samples"),
}


@pytest.mark.parametrize("case", CASES)
def test_optimize_says_in_one_line_what_is_wrong(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, model, data, options, wanted_code, wanted = CASES[case]
    if spoil is not None:
        spoil(folder)
    words = ["optimize", str(folder / model), "--data", str(folder / data), "--home", str(folder / "home"), *options]
    code = run([*words, *([] if "--engines" in options else ["--engines", "onnxruntime"])])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("hasten: error: ")]
    assert code == wanted_code
    assert len(errors) == 1
    assert wanted in errors[0]
    assert "Traceback" not in said.err


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(folder: Path) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs to mount a small file system, which only root may")
    full = folder / "full"
    full.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        models.write(models.convnet(width=64), folder / "large.onnx")
        command = [sys.executable, "-m", "hasten", "import", str(folder / "large.onnx"), "--home", str(full / "home")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("hasten: error: the disk is full while writing")
        assert done.stderr.count("\n") == 1
        left = [path for path in full.rglob("*") if path.is_file()]
        assert left == []
    finally:
        subprocess.run(["umount", str(full)], check=True)
