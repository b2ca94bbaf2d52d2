import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from hasten import registry
from hasten.cli.app import run
from hasten.cli.doctor import store_finding
from hasten.cli.models import is_digest
from hasten.serve.compiled import is_compiled
from hasten.testing.models import convnet, encoder, mlp, write


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all, so that this machine's peaks are measured once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(mlp(), tmp_path / "model.onnx")


def document(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert run([*words, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_import_gives_a_digest_that_stands_for_the_model(
    model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = document(["import", str(model), "--home", str(home)], capsys)
    again = document(["import", made["digest"][:12], "--home", str(home)], capsys)
    assert again["digest"] == made["digest"]
    assert made["signature"]["inputs"][0]["shape"] == ["batch", 16]
    assert [step["name"] for step in made["lineage"]] == ["import"]


def test_inspect_adds_up_what_the_operators_cost(model: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(["inspect", str(model), "--batch", "2", "--home", str(home)], capsys)
    products = 2 * 2 * (16 * 32 + 32 * 32 + 32 * 4)
    assert sum(found["totals"]["operations"].values()) >= products
    assert found["bound_ns"] == pytest.approx(sum(item["bound_ns"] for item in found["operators"]))
    assert {item["kind"] for item in found["operators"]} == {"Gemm", "Relu"}
    assert found["dims"] == {"batch": 2}


def test_inspect_shows_kinds_and_with_nodes_every_operator(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(convnet(), tmp_path / "net.onnx"))
    assert run(["inspect", path, "--home", str(home)]) == 0
    kinds = capsys.readouterr().out
    assert run(["inspect", path, "--nodes", "--home", str(home)]) == 0
    nodes = capsys.readouterr().out
    assert "BatchNormalization" in kinds
    assert nodes.count("BatchNormalization") > kinds.count("BatchNormalization")
    assert "lineage\n  import" in kinds


def test_apply_writes_a_model_with_the_passes_done(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(convnet(), tmp_path / "net.onnx"), tmp_path / "folded.onnx"
    made = document(["apply", "fold", str(path), "-o", str(out), "--home", str(home)], capsys)
    assert [step["name"] for step in made["lineage"]] == ["import", "fold"]
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds


def test_apply_list_shows_every_pass_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    passes = document(["apply", "--list"], capsys)["passes"]
    assert {"fold", "fuse", "cast", "quantize-static", "quantize-dynamic"} <= set(passes)
    settings = {setting["name"]: setting for setting in passes["quantize-static"]["settings"]}
    assert settings["observer"]["doc"]


def test_measure_compares_engines_and_its_operators_add_up(
    model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = ["--engine", "onnxruntime:threads=1", "--engine", "onnxruntime:threads=1,precision=float32"]
    found = document(["measure", str(model), *engines, "--budget", "1s", "--home", str(home)], capsys)
    first, second = found["measured"]
    assert first["over_first"] is None
    assert second["over_first"]["low"] <= second["over_first"]["value"] <= second["over_first"]["high"]
    bound = first["bound"]
    total = sum(op["time_ns"] or 0.0 for op in bound["operators"]) + bound["outside_ns"]
    assert total == pytest.approx(bound["measured_ns"])


def test_measure_tells_no_limit_of_this_processor_for_what_runs_on_a_gpu(
    model: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._registered["engine"], "elsewhere", registry.Entry("serve.test_gpu:Elsewhere"))
    words = ["measure", str(model), "--engine", "elsewhere", "--operators", "--budget", "1s", "--home", str(home)]
    (found,) = document(words, capsys)["measured"]
    assert found["bound"] is None
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert "on a GPU: its limit is not measured" in " ".join(shown.split())
    assert "outside operators" not in shown


def test_measure_asks_for_data_where_an_axis_has_any_length(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = encoder()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    path = tmp_path / "any.onnx"
    onnx.save_model(model, path)
    assert run(["measure", str(path), "--home", str(home)]) == 1
    assert "--data" in capsys.readouterr().err


def test_doctor_runs_every_engine_that_is_here(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(["doctor", "--home", str(home)], capsys)
    by_name = {item["name"]: item for item in found["findings"]}
    assert by_name["onnxruntime"]["works"]
    assert by_name["onnxruntime"]["says"].startswith("runs")
    assert by_name["serve"]["works"]
    assert (by_name["serve"]["says"] == "machine code") == is_compiled(), "and says what the server is made of"
    assert all(item["works"] or item["fix"] for item in found["findings"] if item["kind"] == "frontend")


def test_doctor_counts_the_folders_of_runs_and_not_their_locks(tmp_path: Path) -> None:
    for name in ("3f2a91c04d", "77aa91c04d"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / f"{name}.lock").touch()
    assert ": 0 models, 2 runs, " in store_finding(tmp_path).says


def test_names_with_brackets_are_shown_as_they_are(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mlp()
    node = next(node for node in model.graph.node if "x" in node.input)
    node.input[list(node.input).index("x")] = model.graph.input[0].name = "tokens[ids][/b]"
    path = write(model, tmp_path / "model.onnx")
    assert run(["inspect", str(path), "--home", str(home)]) == 0
    assert "tokens[ids][/b]" in capsys.readouterr().out


PROGRAMS = {
    "import": ["import", "{model}"],
    "inspect": ["inspect", "{model}", "--batch", "2"],
    "apply": ["apply", "fold", "quantize-dynamic", "{model}", "-o", "{folder}/out.onnx"],
    "deploy": ["deploy", "{model}", "-o", "{folder}/net", "--serving", "instances=1"],
    "measure": ["measure", "{model}", "--engine", "onnxruntime:threads=1", "--budget", "1s"],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("verb", PROGRAMS)
def test_the_python_that_a_verb_shows_runs(
    verb: str, model: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(model=model, folder=tmp_path) for word in PROGRAMS[verb]]
    assert run([*words, "--show-python", "--home", str(home)]) == 0
    lines = capsys.readouterr().out
    exec(compile(lines, "shown", "exec"), {})  # noqa: S102 - the point of the test
    assert capsys.readouterr().out.strip()


def test_the_python_of_optimize_names_every_option_that_was_given(
    model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--max-drop", "1%", "--p99", "5ms", "--budget", "20m", "--engines", "onnxruntime", "--threads", "1,2"]
    words += ["--max-size", "5MB", "--label", "y", "--inputs", "x=features", "--preprocess", "color=gray"]
    assert run(["optimize", str(model), "--data", "v.npz", *words, "--home", str(home), "--show-python"]) == 0
    lines = capsys.readouterr().out
    compile(lines, "shown", "exec")
    for piece in (
        "max_drop=0.01",
        "p99_ns=5000000.0",
        "max_file_bytes=5000000",
        "budget_s=1200.0",
        "engines=['onnxruntime']",
        "threads=[1, 2]",
        "label='y'",
        "inputs={'x': 'features'}",
        "color='gray'",
    ):
        assert piece in lines


def test_the_python_of_optimize_takes_a_digest_out_of_the_store(
    model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = document(["import", str(model), "--home", str(home)], capsys)["digest"][:16]
    assert run(["optimize", digest, "--data", "v.npz", "--home", str(home), "--show-python"]) == 0
    assert f"hasten.Store(Path({str(home)!r})).get({digest!r})," in capsys.readouterr().out


def test_optimize_says_of_a_digest_that_is_not_there_in_one_line(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["optimize", "00000000", "--data", "v.npz", "--home", str(home)]) == 1
    said = capsys.readouterr().err
    assert "begin with '00000000'" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("verb", ["import", "optimize"])
def test_weights_for_a_model_that_is_in_the_store_are_refused(
    verb: str, model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = document(["import", str(model), "--home", str(home)], capsys)["digest"]
    more = ["--data", "v.npz"] if verb == "optimize" else []
    assert run([verb, digest, *more, "--state", "net.safetensors", "--home", str(home)]) == 1
    assert "--state is for module.py:factory" in capsys.readouterr().err


def test_a_word_that_is_both_a_file_and_a_digest_is_the_file(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_digest("abcdef12")
    (tmp_path / "abcdef12").write_bytes(b"")
    assert not is_digest("abcdef12")


def test_measure_says_what_its_memory_column_means(model: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--engine", "onnxruntime:threads=1", "--budget", "1s", "--home", str(home)]
    assert run(["measure", str(model), *words]) == 0
    assert "over the bare process of its engine" in " ".join(capsys.readouterr().out.split())
