import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_result import make_compressed, make_result

from hasten.cli.app import run
from hasten.search.result import Result
from hasten.store import Store
from hasten.testing.models import mlp, stored


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with two finished runs and one that was interrupted."""
    home = tmp_path / "home"
    artifact = stored(mlp(), Store(home))
    for name in ("aaa1", "aab2"):
        folder = home / "runs" / name
        folder.with_suffix(".lock").parent.mkdir(parents=True, exist_ok=True)
        folder.with_suffix(".lock").touch()  # as a search leaves it beside its folder
        (folder / "best").mkdir(parents=True)
        result = with_artifact(make_result(folder), artifact.digest)
        (folder / "result.json").write_bytes(result.json)
    (home / "runs" / "ccc3").mkdir()
    (home / "last").write_text("aab2")
    return home


def with_artifact(result: Result, digest: str) -> Result:
    trials = tuple(replace(t, artifact=digest) if t.artifact else t for t in result.trials)
    return replace(result, trials=trials, deployment=result.run / "best" / "deployment.toml")


def test_the_last_run_is_shown_and_its_page_written(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "--home", str(home)]) == 0
    shown = capsys.readouterr().out
    page = home / "runs" / "aab2" / "report.html"
    assert "MEETS" in shown
    assert str(page) in shown
    assert "How the chosen model was made" in page.read_text()


def test_a_run_is_found_by_the_beginning_of_its_id(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "aaa", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"].endswith("aaa1/report.html")


def test_a_lock_beside_a_run_is_not_listed_as_one(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "zz", "--home", str(home)]) == 1
    assert capsys.readouterr().err.endswith("there are: aaa1, aab2, ccc3\n")


@pytest.mark.parametrize("stored", [True, False])
def test_a_runs_folder_is_shown_from_anywhere(
    stored: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if not stored:
        shutil.rmtree(home / "objects")
    assert run(["report", str(home / "runs" / "aab2")]) == 0
    page = (home / "runs" / "aab2" / "report.html").read_text()
    assert ("How the chosen model was made" in page) == stored
    capsys.readouterr()
    assert run(["report", str(home / "runs" / "aab2"), "--show-python"]) == 0
    exec(compile(capsys.readouterr().out, "shown", "exec"), {})  # noqa: S102 - the point of the test
    assert capsys.readouterr().out.startswith("MEETS ")


def test_the_document_carries_the_path_and_what_was_learned_of_compression(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "runs" / "aab2"
    digest = json.loads((folder / "result.json").read_bytes())["trials"][0]["artifact"]
    result = with_artifact(make_compressed(folder), digest)
    (folder / "result.json").write_bytes(result.json)
    assert run(["report", "--home", str(home), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in document["path"]][-2:] == ["quantize-static", "quantization-aware finetune"]
    assert document["path"][-1]["latency"]["median_ns"] == 0.47e6
    assert result.compression
    for name in ("cells", "predictions", "curves"):
        assert len(document["compression"][name]) == len(getattr(result.compression, name))


@pytest.mark.parametrize(("name", "wanted"), [("aa", "2 runs"), ("zz", "0 runs"), ("ccc", "not finished")])
def test_a_run_that_cannot_be_shown_is_one_line(
    name: str, wanted: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", name, "--home", str(home)]) == 1
    said = capsys.readouterr().err
    assert wanted in said
    assert said.count("\n") == 1


def test_the_page_goes_where_it_is_told(home: Path, tmp_path: Path) -> None:
    assert run(["report", "--home", str(home), "--html", str(tmp_path / "out" / "page.html")]) == 0
    assert (tmp_path / "out" / "page.html").is_file()


def test_a_run_that_was_moved_finds_its_deployment(home: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(home, moved)
    (moved / "runs" / "aab2" / "best" / "deployment.toml").write_text('engine = "moved"\n')
    assert run(["report", "--home", str(moved)]) == 0
    assert "moved" in (moved / "runs" / "aab2" / "report.html").read_text()


def test_the_python_that_report_shows_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "--home", str(home), "--show-python"]) == 0
    exec(compile(capsys.readouterr().out, "shown", "exec"), {})  # noqa: S102 - the point of the test
    assert capsys.readouterr().out.startswith("MEETS ")
