"""``hasten infer`` against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import hasten
from hasten.cli.app import run
from hasten.cli.infer import read_rows
from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import CLASSES, rows_of, served


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with served(bundle(tmp_path_factory.mktemp("infer") / "net"), Listening(port=0, grpc_port=0)) as found:
        yield found


@pytest.fixture
def data(tmp_path: Path) -> str:
    np.savez(tmp_path / "data.npz", x=rows_of(20), label=np.arange(20) % CLASSES)
    return str(tmp_path / "data.npz")


@pytest.mark.parametrize("kind", ["http", "grpc", "text"])
def test_rows_that_are_asked_for_are_answered(
    opened: Open, data: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"grpc://{str(opened.grpc).rpartition('//')[2]}" if kind == "grpc" else opened.http
    more = ["--as-text"] if kind == "text" else []
    assert run(["infer", url, "net", "--data", data, "--rows", "3:14", "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    (values,) = found["outputs"].values()
    assert (found["model"], len(values), len(found["phases_ns"])) == ("net", 11, 2)
    with hasten.Client(opened.http) as client:
        (wanted,) = client.infer("net", {"x": rows_of(20)[3:4]}).outputs.values()
    np.testing.assert_allclose(values[:1], wanted, rtol=1e-4, atol=1e-5)


def test_a_table_names_the_best_class_of_each_row(
    opened: Open, data: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "out.npz"
    assert run(["infer", opened.http, "net", "--data", data, "--rows", "5", "--output", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "class " in shown
    assert "1 rows in 1 requests" in shown
    with np.load(path) as held:
        assert [array.shape for array in held.values()] == [(1, CLASSES)]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["net", "--rows", "30:40"], 1, "there is no row 30"),
        (["other"], 1, "no model is called 'other'"),
        (["net", "--output", "out.csv"], 1, "no .npz file"),
        (["net", "--batch", "0"], 2, "--batch is 0"),
        (["net", "--rows", "8:3"], 2, "no row at all"),
    ],
)
def test_what_is_wrong_is_one_line(
    opened: Open, data: str, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["infer", opened.http, *words, "--data", data]) == code
    assert said in capsys.readouterr().err


def test_rows_are_written_as_slices() -> None:
    assert [read_rows(text) for text in ("0:8", "8:", ":3", "4")] == [
        slice(0, 8),
        slice(8, None),
        slice(0, 3),
        slice(4, 5),
    ]
    for text in ("", ":", "-1:3", "a", "3:3"):
        with pytest.raises(ValueError, match="row"):
            read_rows(text)


@pytest.mark.parametrize(("label", "shown"), [(np.arange(20) % CLASSES, True), (np.full(20, np.nan), False)])
def test_labels_stand_beside_the_answers_where_they_can_be_used(
    opened: Open, tmp_path: Path, label: np.ndarray, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", x=rows_of(20), label=label)
    assert run(["infer", opened.http, "net", "--data", str(tmp_path / "data.npz"), "--rows", "0:2"]) == 0
    said = capsys.readouterr().out
    assert ("label" in said.splitlines()[0]) == shown
    assert ("No labels are shown: the labels of 2 of 2 samples are NaN" in " ".join(said.split())) != shown
