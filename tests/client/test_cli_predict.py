"""``hasten predict``: a real deployment over a real file, whole, interrupted and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arro3.core import Array, DataType, RecordBatch, Table, fixed_size_list_array
from arro3.io import read_parquet, write_parquet

from hasten.cli import predict as verb
from hasten.cli.app import run
from hasten.cli.predict_output import WRITERS, check_alike, write_npz_whole
from hasten.deployment import Serving, read_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BadInput
from hasten.samples.arrow import parquet_pieces
from serve.bundles import FEATURES, bundle, rows

ROWS = 700


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("predict") / "net")


@pytest.fixture
def data(tmp_path: Path) -> str:
    x = fixed_size_list_array(Array.from_numpy(rows(ROWS).ravel()), FEATURES)
    write_parquet(Table.from_batches([RecordBatch.from_pydict({"x": x})]), tmp_path / "data.parquet")
    return str(tmp_path / "data.parquet")


@pytest.fixture(scope="module")
def wanted(deployment: Path) -> Any:
    _, artifact = read_deployment(deployment)
    session = OnnxRuntime().open(artifact)
    try:
        (found,) = session.run({"x": rows(ROWS)}).values()
        return np.array(found)
    finally:
        session.close()


def read_output(path: Path) -> Any:
    if path.suffix == ".npz":
        with np.load(path) as held:
            (found,) = held.values()
            return found
    (columns,) = parquet_pieces(path, ROWS)
    (found,) = columns.by_name.values()
    return found


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_every_row_of_the_file_is_in_the_output_in_its_order(
    deployment: Path, data: str, tmp_path: Path, wanted: Any, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"out.{ending}"
    assert run(["predict", str(deployment), "--data", data, "-o", str(out), "--piece", "300", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == ROWS
    np.testing.assert_allclose(read_output(out), wanted, rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", out.name]


def test_an_interrupted_run_goes_on_and_computes_no_finished_piece_again(
    deployment: Path,
    data: str,
    tmp_path: Path,
    wanted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, real, ran = tmp_path / "out.npz", verb._run, list[int]()

    async def stopped_at_the_third(service: Any, model: str, samples: Any) -> Any:
        ran.append(len(samples))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return await real(service, model, samples)

    words = ["predict", str(deployment), "--data", data, "-o", str(out), "--piece", "200", "--json"]
    monkeypatch.setattr(verb, "_run", stopped_at_the_third)
    assert run(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    assert run(words) == 0
    assert ran == [200, 200, 200, 200, 100], "two pieces, the one that was stopped, and then only what was left"
    assert json.loads(capsys.readouterr().out)["pieces_kept_from_before"] == 2
    np.testing.assert_allclose(read_output(out), wanted, rtol=1e-4, atol=1e-5)


def test_pieces_of_another_run_are_not_taken_for_ones_own(deployment: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    key = verb.key_of(read_deployment(deployment)[0], data, verb.DATA, 200)
    parts = verb.open_parts(out, key)
    parts.place(0).write_bytes(b"an old piece")
    assert verb.open_parts(out, key).finished() == [parts.place(0)]
    assert verb.open_parts(out, verb.key_of(read_deployment(deployment)[0], data, verb.DATA, 100)).finished() == []


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ("load.py:rows", "load.py"),
        ("data.parquet#train", "data.parquet"),
        ("odd#1.parquet", "odd#1.parquet"),
        ("plain.npz", "plain.npz"),
    ],
)
def test_pieces_of_data_that_changed_are_not_taken_for_those_of_now(
    data: str, source: str, deployment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    what = read_deployment(deployment)[0]
    Path(source).write_text("one")
    before = verb.key_of(what, data, verb.DATA, 200)
    Path(source).write_text("another")
    assert verb.key_of(what, data, verb.DATA, 200) != before


def test_pieces_behind_the_last_one_are_not_written(deployment: Path, data: str, tmp_path: Path, wanted: Any) -> None:
    out = tmp_path / "out.npz"
    parts = verb.open_parts(out, verb.key_of(read_deployment(deployment)[0], data, verb.DATA, 200))
    for number in range(6):  # of a run over more rows
        verb.write_part(
            parts.place(number), {"y": wanted[200 * number : 200 * number + 200] if number < 4 else wanted[:9]}
        )
    assert run(["predict", str(deployment), "--data", data, "-o", str(out), "--piece", "200"]) == 0
    np.testing.assert_allclose(read_output(out), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["parquet", "npz"])
@pytest.mark.parametrize("widths", [(3, 5), (5, 3)])
def test_pieces_that_differ_in_shape_make_no_file(ending: str, widths: tuple[int, int], tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npz" for number in range(2)]
    for path, width in zip(paths, widths, strict=True):
        verb.write_part(path, {"y": np.ones((4, width), np.float32)})
    out = tmp_path / f"out.{ending}"
    with pytest.raises(BadInput, match=f"'y' differs in shape between rows .*{widths[0]}.*{widths[1]}"):
        WRITERS[out.suffix](out, paths, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "1.npz"]


def test_an_output_without_rows_makes_no_file() -> None:
    with pytest.raises(BadInput, match="'y' is a lone number"):
        check_alike({"y": np.float32(1).reshape(())}, {"y": np.float32(1).reshape(())})


@pytest.mark.parametrize(("dtype", "labelled"), [(np.float32, True), (np.bool_, False), (np.int64, False)])
def test_only_scores_are_given_the_name_of_their_class(dtype: Any, labelled: bool, tmp_path: Path) -> None:
    verb.write_part(tmp_path / "0.npz", {"above": np.array([[0, 1, 1]], dtype)})
    write_npz_whole(tmp_path / "out.npz", [tmp_path / "0.npz"], ["a", "b", "c"])
    with np.load(tmp_path / "out.npz") as held:
        assert ("label" in held.files) == labelled
        assert not labelled or held["label"].tolist() == ["b"]


def test_a_limit_ends_within_a_piece(
    deployment: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", data, "-o", str(tmp_path / "out.npz"), "--piece", "100", "--limit", "250"]
    assert run(["predict", str(deployment.parent), *words]) == 0
    assert "250 rows" in capsys.readouterr().out
    assert len(read_output(tmp_path / "out.npz")) == 250


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--data", "none.parquet", "-o", "out.npz"], 1, "none.parquet"),
        (["--data", "data", "-o", "out.csv"], 1, "written as .parquet or .npz"),
        (["--data", "data", "-o", "out.npz", "--piece", "0"], 2, "--piece is 0"),
    ],
)
def test_what_is_wrong_is_one_line(
    deployment: Path,
    tmp_path: Path,
    words: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["predict", str(deployment), *words]) == code
    assert said in capsys.readouterr().err


def test_a_parquet_file_comes_in_pieces_of_any_size(data: str) -> None:
    for size in (1, 256, 300, ROWS, ROWS + 1):
        lengths = [len(next(iter(piece.by_name.values()))) for piece in parquet_pieces(Path(data), size)]
        assert sum(lengths) == ROWS
        assert set(lengths[:-1]) <= {size}
    assert len(read_parquet(data).read_all()) == ROWS


@pytest.mark.parametrize("name", ["label", "target", "y", "class"])
@pytest.mark.parametrize("values", [[None] * 6, [-1, 0, 3, 0, 1, 2]])
def test_labels_are_not_looked_at(deployment: Path, tmp_path: Path, name: str, values: list[Any], wanted: Any) -> None:
    x = fixed_size_list_array(Array.from_numpy(rows(ROWS)[:6].ravel()), FEATURES)
    labels = Array(values, type=DataType.int64())
    write_parquet(Table.from_batches([RecordBatch.from_pydict({"x": x, name: labels})]), tmp_path / "data.parquet")
    out = tmp_path / "out.npz"
    assert run(["predict", str(deployment), "--data", str(tmp_path / "data.parquet"), "-o", str(out)]) == 0
    np.testing.assert_allclose(read_output(out), wanted[:6], rtol=1e-4, atol=1e-5)


def test_labels_of_a_function_are_not_looked_at(deployment: Path, tmp_path: Path, wanted: Any) -> None:
    np.save(tmp_path / "x.npy", rows(ROWS)[:6])
    (tmp_path / "data.py").write_text(
        "import numpy as np\nfrom pathlib import Path\nfrom hasten import Samples\n\n"
        "def f():\n    x = np.load(Path(__file__).with_name('x.npy'))\n"
        "    return Samples({'x': x}, np.array(list('abcabc')))\n"
    )
    out = tmp_path / "out.npz"
    assert run(["predict", str(deployment), "--data", f"{tmp_path / 'data.py'}:f", "-o", str(out)]) == 0
    np.testing.assert_allclose(read_output(out), wanted[:6], rtol=1e-4, atol=1e-5)


LIMITS = {
    "a timeout": Serving(instances=1, timeout_ms=0.001),
    "one request at once": Serving(instances=1, concurrency=1),
    "one row that waits": Serving(instances=1, queue_rows=1, queue_bytes=1),
    "an objective": Serving(instances=1, objective_ms=0.001),
}


@pytest.mark.parametrize("isolation", ["auto", "thread"])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_that_are_for_clients_do_not_hold_offline(
    limit: str, isolation: Any, data: str, tmp_path: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "TRIES", 0)
    path = bundle(tmp_path / "net", serving=replace(LIMITS[limit], isolation=isolation))
    out = tmp_path / "out.npz"
    assert run(["predict", str(path), "--data", data, "-o", str(out)]) == 0
    np.testing.assert_allclose(read_output(out), wanted, rtol=1e-4, atol=1e-5)


def test_the_objective_of_the_goal_does_not_hold_offline(data: str, tmp_path: Path, wanted: Any) -> None:
    path, out = bundle(tmp_path / "net", p99_ms=0.001), tmp_path / "out.npz"
    assert run(["predict", str(path), "--data", data, "-o", str(out)]) == 0
    np.testing.assert_allclose(read_output(out), wanted, rtol=1e-4, atol=1e-5)


def test_an_output_among_the_data_is_none_of_it(
    deployment: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    Path(data).rename(folder / "data.parquet")
    out, real, ran = folder / "out.npz", verb._run, list[int]()

    async def stopped_at_the_third(service: Any, model: str, samples: Any) -> Any:
        ran.append(len(samples))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return await real(service, model, samples)

    monkeypatch.setattr(verb, "_run", stopped_at_the_third)
    words = ["predict", str(deployment), "--data", str(folder), "-o", str(out), "--piece", "200", "--json"]
    assert run(words) == 130
    (folder / ".out.npz.fresh").write_bytes(b"half an output")
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["pieces_kept_from_before"] == 2
    assert ran == [200, 200, 200, 200, 100]


def test_two_runs_do_not_write_one_output(
    deployment: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npz"
    with verb.alone(out):
        assert run(["predict", str(deployment), "--data", data, "-o", str(out)]) == 1
        assert "another hasten predict writes" in capsys.readouterr().err
        assert not out.exists()
    assert run(["predict", str(deployment), "--data", data, "-o", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", "out.npz"]


@pytest.mark.parametrize("name", ["data.parquet", "link.parquet", "out.parquet", "folder.npz"])
def test_what_is_read_is_not_written_over_nor_read_the_next_time(
    deployment: Path, data: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.parquet").symlink_to(data)
    (tmp_path / "folder.npz").mkdir()
    before = Path(data).read_bytes()
    source = str(tmp_path) if name == "out.parquet" else data
    assert run(["predict", str(deployment), "--data", source, "-o", str(tmp_path / name)]) == 1
    told = capsys.readouterr().err
    assert any(word in told for word in ("is what is read", "would be read as data", "is a folder"))
    assert Path(data).read_bytes() == before
    assert not (tmp_path / "out.parquet").exists()


def test_a_disk_that_is_full_at_the_end_is_one_line_and_costs_no_piece(
    deployment: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writer's runtime raises what is no Exception."""

    class PanicException(BaseException):
        pass

    def full(*given: Any, **more: Any) -> None:
        raise PanicException("called `Result::unwrap()` on an `Err` value: Os { code: 28, kind: StorageFull }")

    out = tmp_path / "out.parquet"
    words = ["predict", str(deployment), "--data", data, "-o", str(out), "--piece", "300", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr("hasten.cli.predict_output.write_parquet", full)
        assert run(words) == 1
    assert "the disk is full; what is done is kept" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["pieces_kept_from_before"] == 3


def test_rows_without_values_make_no_column(tmp_path: Path) -> None:
    verb.write_part(tmp_path / "part.npz", {"y": np.zeros((3, 0), np.float32)})
    with pytest.raises(BadInput, match=r"has rows of shape \[0\]: no column; write it as .npz"):
        WRITERS[".parquet"](tmp_path / "out.parquet", [tmp_path / "part.npz"], None)


def test_another_file_among_the_data_is_a_change_of_it(deployment: Path, tmp_path: Path) -> None:
    what, output = read_deployment(deployment)[0], tmp_path / "out.npz"
    (tmp_path / "one.parquet").write_bytes(b"one")
    keys = [verb.key_of(what, str(tmp_path), verb.DATA, 200, output=output)]
    for name in ("out.npz", ".out.npz.parts/part-00000000.npz", "two.parquet", "below/out.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"more")
        keys.append(verb.key_of(what, str(tmp_path), verb.DATA, 200, output=output))
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys[2:])) == 3
