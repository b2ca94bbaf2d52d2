from pathlib import Path

import msgspec
import pytest

from hasten.errors import StoreError
from hasten.search.compression import Cell, Compression, Curve, CurvePoint, Prediction
from hasten.search.result import Goal, Result, Verdict, read_result

from .trials import CONDITIONS, ORIGINAL, certificate, trial

FOUND = Compression(
    cells=(Cell(group="conv", units=8, size=16, kl=0.25, metric=None, ns=1.5e6),),
    predictions=(Prediction(plan="ab", first_ns=2e6, refitted_ns=None, measured_ns=1.9e6, sensitivity=0.1),),
    curves=(
        Curve(plan="ab", step="finetune 2", epochs=(CurvePoint(number=1, loss=0.5, held=None),), stopped="no better"),
    ),
)


def made(run, compression):
    chosen = trial(2.0, 0.001, passes=1)
    return Result(
        id="a", run=run, source="s", source_name="m.onnx", goal=Goal(), metric="accuracy", trials=(ORIGINAL, chosen),
        frontier=(chosen.key, ORIGINAL.key), original=ORIGINAL.key, best_lossless=ORIGINAL.key, chosen=chosen.key,
        certificates=(certificate(chosen.key, 2.0),), verdict=Verdict(word="MEETS", sentence="Faster."), twin=None,
        splits={}, deployment=run / "deployment.toml", seconds=1.0, conditions=CONDITIONS, compression=compression,
    )  # fmt: skip


@pytest.mark.parametrize("compression", [None, Compression(), FOUND])
def test_a_result_comes_back_from_its_file_as_it_was(tmp_path: Path, compression) -> None:
    result = made(tmp_path, compression)
    (tmp_path / "result.json").write_bytes(result.json)
    assert read_result(tmp_path / "result.json").compression == compression


def test_a_result_from_before_there_was_compression_still_loads(tmp_path: Path) -> None:
    result = made(tmp_path, FOUND)
    old = msgspec.json.decode(result.json)
    del old["compression"]
    (tmp_path / "result.json").write_bytes(msgspec.json.encode(old))
    again = read_result(tmp_path / "result.json")
    assert again.compression is None
    assert again.chosen == result.chosen


def test_a_curve_without_a_loss_is_no_result(tmp_path: Path) -> None:
    old = msgspec.json.decode(made(tmp_path, FOUND).json)
    del old["compression"]["curves"][0]["epochs"][0]["loss"]
    (tmp_path / "result.json").write_bytes(msgspec.json.encode(old))
    with pytest.raises(StoreError, match="loss"):
        read_result(tmp_path / "result.json")
