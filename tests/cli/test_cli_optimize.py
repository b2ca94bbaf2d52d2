import json
from pathlib import Path

import numpy as np
import pytest

from hasten.cli.app import run
from hasten.testing.models import mlp, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command for a small model in one engine on one thread, with labels drawn at random."""
    folder = tmp_path_factory.mktemp("optimize")
    model = write(mlp(), folder / "model.onnx")
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 16)).astype(np.float32)
    np.savez(folder / "val.npz", x=x, label=random.integers(0, 4, 200))
    options = ["--engines", "onnxruntime", "--threads", "1", "--budget", "10s", "--home", str(folder / "home")]
    return ["optimize", str(model), "--data", str(folder / "val.npz"), *options]


def test_the_answer_is_one_document_and_the_exit_code_says_whether_the_goal_is_met(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = run([*words, "--max-size", "10B", "--json"])
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["verdict"]["word"] != "MEETS"
    assert code == 3
    assert "[sweep]" in said.err
    assert Path(document["report"]).read_text().startswith("<!DOCTYPE html>")
    assert Path(document["deployment"]).is_file()


def test_the_same_command_again_gives_the_same_answer_at_once(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--max-size", "10B"]) == 3
    said = capsys.readouterr()
    assert "[sweep]" not in said.err
    assert "Deployment  " in said.out


def test_the_digest_that_import_printed_stands_for_the_model(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    home = words[words.index("--home") + 1]
    assert run(["import", words[1], "--home", home]) == 0
    digest = capsys.readouterr().out.split()[0]
    assert run([words[0], digest, *words[2:], "--max-size", "10B", "--json"]) == 3
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert document["source"].startswith(digest)
    assert document["source_name"] == "model.onnx"
