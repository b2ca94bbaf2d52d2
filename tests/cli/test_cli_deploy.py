"""``hasten deploy``: what the bundle holds, what is checked, and what is refused before anything is written."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from hasten import registry
from hasten.cli.app import run
from hasten.deployment import FILE, read_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BadInput
from hasten.golden import read_golden
from hasten.plan import Part
from hasten.protocol.messages import InferRequest, Tensor
from hasten.samples import Samples
from hasten.search.as_is import deploy
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.store import Store
from hasten.testing.faults import FAULTS
from hasten.testing.models import convnet, encoder, mlp, random_samples, stored, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(mlp(), tmp_path / "model.onnx")


def deployed(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    assert run(["deploy", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_bundle_has_the_model_its_golden_answers_and_how_it_is_to_be_served(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "net"
    words = [str(model), "-o", str(folder), "--home", str(tmp_path / "home"), "--engine", "onnxruntime:threads=2"]
    made = deployed([*words, "--serving", "instances=1,batch_sizes=[1,4],objective_ms=20"], capsys)
    assert made["path"] == str(folder / "deployment.toml")
    deployment, artifact = read_deployment(folder / FILE)
    assert (deployment.name, deployment.engine, deployment.settings) == ("net", "onnxruntime", {"threads": 2})
    assert deployment.verdict == "UNPROVEN"
    assert (deployment.serving.instances, deployment.serving.batch_sizes) == (1, (1, 4))
    assert deployment.serving.objective_ms == 20
    golden = read_golden(folder)
    assert golden is not None
    assert len(golden.inputs["x"]) == made["golden_rows"] == 16
    golden.check(OnnxRuntime(threads=2).open(artifact).run({"x": golden.inputs["x"]}))


def test_images_and_their_classes_become_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(convnet(), tmp_path / "net.onnx")
    side = convnet().graph.input[0].type.tensor_type.shape.dim[2].dim_value
    random = np.random.default_rng(0)
    for name in ("cat", "cow", "dog", "elk"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(3):
            picture = random.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / name / f"{n}.png")
    words = [str(model), "-o", str(tmp_path / "net"), "--home", str(tmp_path / "home"), "--name", "animals"]
    deployed([*words, "--data", str(tmp_path / "images")], capsys)
    deployment, _ = read_deployment(tmp_path / "net" / FILE)
    assert deployment.name == "animals"
    assert deployment.pre[0]["step"] == "decode-image"
    assert deployment.raw


def test_the_call_itself_loses_nothing_either(tmp_path: Path, store: Store) -> None:
    source = stored(mlp(), store)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="is no bundle"):
        deploy(source, Part("onnxruntime"), random_samples(source, n=2), store, tmp_path / "net", name="net")
    deploy(source, Part("onnxruntime"), random_samples(source, n=2), store, tmp_path / "other", name="net")
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="would be lost"):
        deploy(source, Part("onnxruntime"), random_samples(source, n=2), store, tmp_path / "other", name="net")


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_of_a_fixed_batch_is_asked_in_its_own(batch: int, tmp_path: Path, store: Store) -> None:
    graph = mlp()
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    source = stored(graph, store)
    made = deploy(source, Part("onnxruntime"), random_samples(source, n=6), store, tmp_path / "net", name="net")
    assert (made.deployment.batch, made.golden_rows) == (batch, 6)
    assert made.agreement == {"y": 0.0}


def test_outputs_without_rows_are_told_and_nothing_is_kept_of_them(tmp_path: Path, store: Store) -> None:
    graph = encoder()
    graph.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "others"
    source = stored(graph, store)
    made = deploy(source, Part("onnxruntime"), random_samples(source, n=4), store, tmp_path / "net", name="net")
    assert (made.golden_rows, made.agreement) == (0, {})
    assert "no axis of samples in common" in str(made.note)
    assert read_golden(tmp_path / "net") is None


def test_an_engine_that_says_something_else_is_not_deployed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(registry._registered["engine"], "nan", FAULTS["nan"])
    words = [str(model), "-o", str(tmp_path / "net"), "--home", str(tmp_path / "home"), "--engine", "nan"]
    told = deployed(words, capsys, code=1)["error"]
    assert told["kind"] == "Untrusted"
    assert "'y' is off by" in told["message"]
    assert not (tmp_path / "net").exists()


def test_a_bundle_that_is_there_is_replaced_and_nothing_else_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model), "--home", str(tmp_path / "home")]
    for name in ("one", "two"):
        deployed([*words, "-o", str(tmp_path / "net"), "--name", name], capsys)
    assert read_deployment(tmp_path / "net" / FILE)[0].name == "two"
    for name in (".DS_Store", ".nfs0000000012"):
        (tmp_path / "net" / "model" / name).write_text("the system's")
    deployed([*words, "-o", str(tmp_path / "net"), "--name", "three"], capsys)
    (tmp_path / "net" / "notes.txt").write_text("mine")
    told = deployed([*words, "-o", str(tmp_path / "net")], capsys, code=1)["error"]
    assert "would be lost" in told["message"]
    assert (tmp_path / "net" / "notes.txt").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    told = deployed([*words, "-o", str(tmp_path / "mine")], capsys, code=1)["error"]
    assert "is no bundle" in told["message"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_is_in_the_way_is_told_before_the_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    words = [str(tmp_path / "missing.onnx"), "-o", str(tmp_path / "mine"), "--home", str(tmp_path / "home")]
    assert "is no bundle" in deployed(words, capsys, code=1)["error"]["message"]


WRONG = {
    "an unknown setting of serving": (["--serving", "instance=2"], "did you mean 'instances'"),
    "a setting of serving out of range": (["--serving", "instances=0"], "instances"),
    "no settings of serving": (["--serving", "fast"], "'fast' is no key=value"),
    "an unknown engine": (["--engine", "onxruntime"], "did you mean 'onnxruntime'"),
    "a name that no client can write": (["--name", "a/b"], "'a/b' cannot be a model's name"),
    "more threads than there are": (["--engine", "onnxruntime:threads=999"], "cannot be pinned"),
    "graphs without a GPU": (["--engine", "onnxruntime:graphs=true"], "set provider=cuda"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = WRONG[case]
    assert run(["deploy", str(model), "-o", str(tmp_path / "net"), "--home", str(tmp_path / "home"), *words]) in (1, 2)
    told = capsys.readouterr().err
    assert expected in " ".join(told.split())
    assert "Traceback" not in told
    assert not (tmp_path / "net").exists()


def test_open_lengths_need_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = encoder()
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    onnx.save(graph, tmp_path / "text.onnx")
    words = [str(tmp_path / "text.onnx"), "-o", str(tmp_path / "net"), "--home", str(tmp_path / "home")]
    told = deployed(words, capsys, code=1)["error"]
    assert "give real samples with --data" in told["message"]


@pytest.mark.parametrize(("place", "name"), [("net", "net"), ("net/3", "net"), ("v1.5", "v1.5"), ("7", "models")])
def test_a_model_is_called_as_its_folder_is(
    place: str, name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / place
    assert (
        deployed([str(model), "-o", str(folder), "--home", str(tmp_path / "home")], capsys)["deployment"]["name"]
        == name
    )


@pytest.mark.parametrize("place", ["net/2", "net/model/2"])
def test_no_bundle_is_put_into_another(
    place: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(model), "--home", str(tmp_path / "home"), "-o"]
    deployed([*words, str(tmp_path / "net")], capsys)
    told = deployed([*words, str(tmp_path / place)], capsys, code=1)["error"]
    assert "lies in the bundle" in told["message"]


def labels() -> onnx.ModelProto:
    """x [n, 4] -> the name of the largest of each row, as a classifier of scikit-learn gives it."""
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["x"], ["place"], axis=1, keepdims=0),
            helper.make_node("Gather", ["names", "place"], ["label"]),
        ],
        "labels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("label", TensorProto.STRING, ["n"])],
        [helper.make_tensor("names", TensorProto.STRING, [4], [b"ape", b"cat", b"dog", b"elk"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_a_model_that_gives_text_is_checked_and_served(tmp_path: Path, store: Store) -> None:
    source = stored(labels(), store)
    made = deploy(source, Part("onnxruntime"), random_samples(source, n=6), store, tmp_path / "net", name="net")
    assert (made.golden_rows, made.agreement) == (6, {"label": 0.0})

    async def work() -> None:
        service = Service(open_repository(tmp_path / "net"))
        await service.start()
        assert service.ready(), service.index()
        x = np.eye(4, dtype=np.float32)[[2, 0]]
        answer = await service.infer(InferRequest(model="net", inputs=(Tensor.of("x", x),)))
        assert [bytes(text) if isinstance(text, bytes) else text.encode() for text in answer.outputs[0].data] == [
            b"dog",
            b"ape",
        ]
        await service.stop()

    asyncio.run(work())


def test_inputs_of_different_first_axes_are_not_compared_and_that_is_told(tmp_path: Path, store: Store) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "two",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [5, 2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )
    source = stored(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), store)
    samples = Samples({"x": np.zeros((5, 5), np.float32), "w": np.zeros((5, 2), np.float32)})
    made = deploy(source, Part("onnxruntime"), samples, store, tmp_path / "net", name="net")
    assert (made.deployment.batch, made.golden_rows) == (1, 0)
    assert "no axis of samples in common" in str(made.note)
