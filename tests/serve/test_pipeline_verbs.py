"""The verbs over deployments with steps: serve, infer and predict with files of images and with text."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arro3.core import Array, DataType, Table
from arro3.io import write_parquet
from rich.text import Text

from hasten.cli.app import run as run_verb
from hasten.cli.files_of import Rows, file_pieces
from hasten.cli.infer import outputs_table
from hasten.cli.models import DATA
from hasten.cli.predict import key_of, read_by_steps
from hasten.client.client import Client
from hasten.deployment import Serving, read_deployment
from hasten.errors import BadInput, BadRequest
from hasten.serve.app import Listening
from hasten.serve.sample_calls import Caller, curl_line, python_line
from hasten.tensors import Signature, TensorSpec
from hasten.testing.models import convnet
from serve.bundles import bundle
from serve.photos import CLASSES, POST, PRE, SIZE, files, photo
from serve.served import served

ANY = Listening(port=0, grpc_port=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return bundle(folder / "net", model=convnet(size=SIZE), pre=PRE, post=POST, classes=list(CLASSES), raw=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(20):
        (folder / f"{seed:02}.jpg").write_bytes(photo(seed, height=20 + seed))
    return folder


def answer_of(capsys: pytest.CaptureFixture[str], *words: Any) -> Any:
    assert run_verb([*map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_infer_sends_a_photo_over_both_protocols_and_shows_labels(
    path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(path, ANY) as opened:
        told = []
        for url in (opened.http, f"grpc://{opened.grpc}"):
            two = ("--image", photos / "03.jpg", "--image", photos / "04.jpg")
            told.append(answer_of(capsys, "infer", url, "net", *two)["outputs"])
        assert told[0] == told[1]
        assert len(told[0]["label"]) == 2
        assert set(told[0]["label"][0]) <= set(CLASSES)
        assert run_verb(["infer", opened.http, "net", "--text", "a"]) == 1
        assert "this is no image" in capsys.readouterr().err
        assert run_verb(["infer", opened.http, "net.raw", "--image", str(photos / "03.jpg")]) == 1
        assert "takes x FP32[-1, 3, 16, 16], not one file or text" in capsys.readouterr().err
        assert run_verb(["infer", opened.http, "net"]) == 2
        assert "give one of --data, --image and --text" in capsys.readouterr().err


def test_infer_sends_the_files_that_rows_and_limit_name(
    path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [word for row in range(5) for word in ("--image", photos / f"{row:02}.jpg")]
    with served(path, ANY) as opened:
        every = answer_of(capsys, "infer", opened.http, "net", *images)["outputs"]["score"]
        for words, wanted in (
            (("--rows", "1:3"), every[1:3]),
            (("--rows", "4"), every[4:]),
            (("--limit", "2"), every[:2]),
            (("--limit", "4", "--rows", "3:"), every[3:4]),
        ):
            got = answer_of(capsys, "infer", opened.http, "net", *images, *words)["outputs"]["score"]
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
        for words, said in (
            (("--rows", "7:"), "--image has 5 rows; there is no row 7"),
            (("--limit", "0"), "limit of 0"),
        ):
            assert run_verb([*map(str, ("infer", opened.http, "net", *images, *words))]) == 1
            assert said in capsys.readouterr().err


def test_infer_counts_the_rows_of_a_folder_of_images_by_class_as_they_lie(
    path: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "by_class"
    for row in range(9):
        place = folder / ("ant", "bee", "cat")[row // 3] / f"{row}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"{row:02}.jpg", place)
    words = ("net.raw", "--data", folder, "--preprocess", f"resize=[{SIZE},{SIZE}]")
    with served(path, ANY) as opened:
        (every,) = answer_of(capsys, "infer", opened.http, *words)["outputs"].values()
        (got,) = answer_of(capsys, "infer", opened.http, *words, "--rows", "1:4")["outputs"].values()
    np.testing.assert_allclose(got, every[1:4], rtol=1e-5)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_infer_and_load_send_the_images_of_a_file_of_samples_as_they_are(
    path: Path, photos: Path, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = sorted(photos.iterdir())
    data = photos
    if kind == "parquet":
        data = tmp_path / "photos.parquet"
        column = Array([name.read_bytes() for name in names], type=DataType.binary())
        write_parquet(Table.from_pydict({"image": column}), data)
    with served(path, ANY) as opened:
        found = answer_of(capsys, "infer", opened.http, "net", "--data", data, "--rows", "2:5")["outputs"]
        three = [word for name in names[2:5] for word in ("--image", name)]
        assert found == answer_of(capsys, "infer", opened.http, "net", *three)["outputs"]
        words = ("--arrivals", "closed:concurrency=2", "--duration", "200ms", "--home", tmp_path / "home")
        figures = answer_of(capsys, "load", opened.http, "net", "--data", data, *words)["figures"]
        assert figures["ok"] == figures["sent"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--limit", "0"), "a limit of 0 leaves no samples"),
        (("--preprocess", "resize=[8,8]"), "rows of shape [3, 8, 8]"),
    ],
)
def test_no_images_or_prepared_ones_are_not_sent_as_files(
    path: Path, photos: Path, words: tuple[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(path, ANY) as opened:
        assert run_verb(["infer", opened.http, "net", "--data", str(photos), *words]) in (1, 2)
    assert told in " ".join(capsys.readouterr().err.split())


def test_scores_beside_labels_are_shown_as_theirs_and_bare_ones_with_the_best_class() -> None:
    def cells(outputs: dict[str, Any]) -> list[str]:
        table = outputs_table(outputs, Rows({"x": np.zeros(1)}), 0)
        return [str(cell) for column in table.columns[1:] for cell in column.cells]

    scores = np.array([[0.7, 0.2]], np.float32)
    assert cells({"label": np.array([[b"cat", b"dog"]], object), "score": scores}) == ["cat dog", "0.7 0.2"]
    assert cells({"score": scores}) == ["class 0 (0.7)"]
    assert cells({"score": np.array([[np.nan, 0.2]], np.float32)}) == ["nan 0.2"], "nobody wins"


def test_whole_numbers_are_shown_to_their_last_digit() -> None:
    table = outputs_table({"ids": np.array([[5, 123456789, -(2**63)]])}, Rows({"x": np.zeros(1)}), 0)
    assert list(table.columns[1].cells) == [Text("5 123456789 -9223372036854775808")]


def test_predict_over_a_folder_of_photos_writes_what_serving_says(
    path: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npz"
    assert answer_of(capsys, "predict", path, "--data", photos, "-o", out, "--piece", 6)["rows"] == 20
    with np.load(out) as held, served(path, ANY) as opened, Client(opened.http) as client:
        every = files(*(each.read_bytes() for each in sorted(photos.iterdir())))
        got = client.infer("net", {"image": every}).outputs
        assert held["label"].tolist() == [[word.decode() for word in row] for row in got["label"].tolist()]
        np.testing.assert_allclose(held["score"], got["score"], rtol=1e-5)


def test_limits_that_are_for_clients_do_not_hold_offline_for_steps(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hasten.cli.predict.TRIES", 0)
    serving = Serving(instances=1, timeout_ms=0.001, objective_ms=0.001, concurrency=1, queue_rows=1, queue_bytes=1)
    more = {"pre": PRE, "post": POST, "classes": list(CLASSES)}
    path = bundle(tmp_path / "net", model=convnet(size=SIZE), serving=serving, **more)
    assert answer_of(capsys, "predict", path, "--data", photos, "-o", tmp_path / "out.npz")["rows"] == 20


def test_predict_reads_images_itself_where_steps_come_after_the_model_alone(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = bundle(tmp_path / "net", model=convnet(size=SIZE), post=POST, classes=list(CLASSES))
    out = tmp_path / "out.npz"
    words = ("--data", photos, "-o", out, "--preprocess", "scale=0.01")
    assert answer_of(capsys, "predict", after, *words)["rows"] == 20
    with np.load(out) as held:
        assert held["label"].shape == (20, 2)
        assert set(held["label"].ravel().tolist()) <= set(CLASSES)


def test_predict_refuses_preprocessing_beside_a_deployments_own_steps(
    path: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(photos), "-o", str(tmp_path / "out.npz"), "--preprocess", "layout=nhwc"]
    assert run_verb(["predict", str(path), *words]) == 2
    assert "by steps of its own; leave --preprocess out" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "name"), [({"tokenizer": "words.json"}, "words.json"), ({}, "tokenizer.json")])
def test_a_file_that_steps_read_tells_one_run_from_another(
    path: Path, tmp_path: Path, setting: dict[str, str], name: str
) -> None:
    deployment, _ = read_deployment(path)
    named = replace(deployment, pre=({"step": "tokenise", **setting},))
    words = path.parent / name
    keys = []
    for text in ("one", "another"):
        words.write_text(text)
        keys.append(key_of(named, "data.npz", DATA, 8, beside=read_by_steps(path, named, None)))
    words.unlink()
    assert keys[0] != keys[1]
    (tmp_path / "own.py").write_text("")
    assert read_by_steps(path, named, tmp_path) == [tmp_path / "own.py"]


def test_columns_of_different_length_are_refused_and_numbers_are_put_together(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("a", "float32", ("b", 2)), TensorSpec("b", "float32", ("b",))), ())
    np.savez(tmp_path / "odd.npz", a=np.zeros((5, 2), np.float32), b=np.zeros(4, np.float32))
    with pytest.raises(BadInput, match=r"differ in length \(a: 5, b: 4\)"):
        list(file_pieces(str(tmp_path / "odd.npz"), signature, rows=2, limit=None, inputs={}, label=None))
    (tmp_path / "plain.csv").write_text("f1,f2,f3\n1,2,3\n4,5,6\n")
    wide = Signature((TensorSpec("x", "float32", ("b", 3)),), ())
    (piece,) = file_pieces(str(tmp_path / "plain.csv"), wide, rows=8, limit=None, inputs={}, label=None)
    assert piece.inputs["x"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_the_lines_that_serve_prints_for_images_work_when_pasted(path: Path) -> None:
    with served(path, ANY) as opened:
        assert opened.service.takes_image("net")
        caller = Caller(url=opened.http, takes_image=True)
        metadata = opened.service.model_metadata("net")
        for line in (curl_line(caller, metadata), python_line(caller, metadata)):
            assert line is not None
            if line.startswith("python3") or shutil.which("curl"):
                done = subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=60)
                assert b'"label"' in done.stdout, done


def test_a_bad_photo_is_a_400_over_http_with_its_row_and_reason(path: Path) -> None:

    with served(path, ANY) as opened:
        for url in (opened.http, f"grpc://{opened.grpc}"):
            with Client(url) as client, pytest.raises(BadRequest, match=r"row 1: this is no image \(BMP, JPEG, PNG"):
                client.infer("net", {"image": files(photo(1), b"junk")})


def test_steps_survive_writing_and_reading_the_deployment(path: Path) -> None:
    deployment, _ = read_deployment(path)
    assert [dict(step) for step in deployment.pre] == [dict(step) for step in PRE]
    assert [dict(step) for step in deployment.post] == [dict(step) for step in POST]
