"""What a model gives becomes what people want: probabilities, names, boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import BadRequest, InvalidSetting, SignatureMismatch, StoreError
from hasten.steps.argmax import Argmax
from hasten.steps.cast import Cast
from hasten.steps.non_maximum_suppression import NonMaximumSuppression
from hasten.steps.rename import Rename
from hasten.steps.softmax import Softmax
from hasten.steps.step import Around
from hasten.steps.threshold import Threshold
from hasten.steps.top_k import TopK
from hasten.tensors import Array, TensorSpec

AROUND = Around(folder=Path())


def after(step: Any, around: Around = AROUND, **values: Array) -> dict[str, Array]:
    """Run a step, and check that what comes out is what it says comes out."""
    given_ = {name: TensorSpec(name, array.dtype.name, array.shape[1:]) for name, array in values.items()}
    got = step.open(around, given_).apply(values)
    specs = step.gives(given_)
    assert got.keys() == specs.keys()
    for name, spec in specs.items():
        assert got[name].shape[1:] == spec.shape, name
        assert got[name].dtype.name == {"string": "object"}.get(spec.dtype, spec.dtype), name
    return got


def scores(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


def test_softmax_neither_overflows_nor_forgets_the_temperature() -> None:
    got = after(Softmax(input="y"), y=scores([1000.0, 999.0], [-1000.0, -1000.0]))["y"]
    np.testing.assert_allclose(got, [[0.7310586, 0.26894143], [0.5, 0.5]], rtol=1e-6)
    cooler = after(Softmax(input="y", output="p", temperature=2.0), y=scores([2.0, 0.0]))["p"]
    np.testing.assert_allclose(cooler, [[0.7310586, 0.26894143]], rtol=1e-6)


def test_the_best_classes_come_first_by_name_and_of_equals_the_lower_number() -> None:
    around = Around(folder=Path(), classes=("ant", "bee", "cat"))
    got = after(TopK(input="y", k=2, index="number", keep=True), around, y=scores([1, 3, 3], [5, 1, 2]))
    assert got["label"].tolist() == [[b"bee", b"cat"], [b"ant", b"cat"]]
    assert got["score"].tolist() == [[3, 3], [5, 2]]
    assert got["number"].tolist() == [[1, 2], [0, 2]]
    assert "y" in got


def test_a_score_that_is_no_number_is_not_the_best() -> None:
    around = Around(folder=Path(), classes=("ant", "bee", "cat"))
    got = after(Argmax(input="y"), around, y=scores([0.1, np.nan, 5.0], [2.0, 2.0, 1.0]))
    assert got["class"].tolist() == [2, 0]


def test_names_come_from_a_file_or_are_numbers_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Ameise\nBär\n", encoding="utf-8")
    around = Around(folder=tmp_path)
    assert after(TopK(input="y", labels="names.txt"), around, y=scores([0, 1]))["label"].tolist() == [["Bär".encode()]]
    assert after(TopK(input="y"), around, y=scores([0, 1]))["label"].tolist() == [[b"1"]]
    (tmp_path / "names.txt").write_bytes(b"\xff\n")
    with pytest.raises(StoreError, match="cannot be read as names"):
        after(TopK(input="y", labels="names.txt"), around, y=scores([0, 1]))


def test_the_mark_that_editors_write_first_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\n")
    got = after(TopK(input="y", labels="names.txt"), Around(folder=tmp_path), y=scores([1, 0]))
    assert got["label"].tolist() == [[b"ant"]]


def test_an_open_axis_of_classes_may_have_fewer_than_k_and_the_answer_says_so() -> None:
    given_ = {"y": TensorSpec("y", "float32", ("classes",))}
    step = TopK(input="y", k=5)
    got = step.open(AROUND, given_).apply({"y": scores([1, 3, 2])})
    assert got["label"].tolist() == [[b"1", b"2", b"0"]]
    assert [spec.mismatch(got[name][0]) for name, spec in step.gives(given_).items()] == [None, None]
    assert TopK(input="y", k=1).gives(given_)["label"].shape == (1,), "there is always a best one"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 30))
def test_top_k_is_a_stable_sort_cut_off(seed: int, rows: int, classes: int) -> None:
    y = np.random.default_rng(seed).integers(0, 5, (rows, classes)).astype(np.float32)
    k = min(3, classes)
    got = after(TopK(input="y", k=k, index="at"), y=y)
    for row, chosen in zip(y, got["at"], strict=True):
        assert chosen.tolist() == sorted(range(classes), key=lambda at: (-row[at], at))[:k]


def test_argmax_threshold_and_rename() -> None:
    y = scores([0.1, 0.7], [2.0, -2.0])
    assert after(Argmax(input="y"), y=y)["class"].tolist() == [1, 0]
    assert after(Threshold(input="y", at=0.5), y=y)["above"].tolist() == [[False, True], [True, False]]
    assert after(Threshold(input="y", at=0.6, sigmoid=True), y=y)["above"].tolist() == [[False, True], [True, False]]
    assert after(Rename(input="y", to="logits"), y=y)["logits"] is y
    with pytest.raises(InvalidSetting, match="another name"):
        Rename(input="y", to="y")


def test_a_cast_refuses_what_the_new_dtype_cannot_hold() -> None:
    assert after(Cast(input="y", to="int8"), y=scores([1.5, 2.5, -3.2]))["y"].tolist() == [[2, 2, -3]]
    for value, says in ((300.0, "from 0 to 300, which int8 cannot hold"), (np.nan, "not finite")):
        with pytest.raises(BadRequest, match=says):
            after(Cast(input="y", to="int8"), y=scores([0.0, value]))


def test_a_value_that_a_half_cannot_hold_is_refused_and_infinity_stays() -> None:
    with pytest.raises(BadRequest, match="too large for float16"):
        after(Cast(input="y", to="float16"), y=scores([1e6, 1.0]))
    assert after(Cast(input="y", to="float16"), y=scores([np.inf, 1.0]))["y"].tolist() == [[np.inf, 1.0]]


def naive(boxes: Array, marks: Array, step: NonMaximumSuppression) -> list[tuple[int, int]]:
    """Suppress as the definition has it, pair by pair, in Python's own numbers."""

    def iou(a: list[float], b: list[float]) -> float:
        wide = min(a[2], b[2]) - max(a[0], b[0])
        high = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(wide, 0.0) * max(high, 0.0)
        together = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        return shared / together if together > 0 else 0.0

    found = [
        (box, kind) for box in range(len(boxes)) for kind in range(marks.shape[1]) if marks[box, kind] >= step.score
    ]
    found.sort(key=lambda pair: -float(marks[pair]))
    kept: list[tuple[int, int]] = []
    for box, kind in found[: step.candidates]:
        rivals = [other for other, its in kept if its == kind or not step.by_class]
        if all(iou(boxes[box].tolist(), boxes[other].tolist()) <= step.iou for other in rivals):
            kept.append((box, kind))
    return kept[: step.limit]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(0, 30), st.integers(1, 3), st.booleans(), st.integers(1, 12), st.integers(1, 40)
)
def test_suppression_agrees_with_the_definition(
    seed: int, n: int, classes: int, by_class: bool, limit: int, candidates: int
) -> None:
    random = np.random.default_rng(seed)
    low = random.integers(0, 12, (1, n, 2))
    boxes = np.concatenate([low, low + random.integers(0, 8, (1, n, 2))], axis=2).astype(np.float32)
    marks = (random.integers(0, 8, (1, n, classes)) / 8).astype(np.float32)
    step = NonMaximumSuppression(
        boxes="b", scores="s", by_class=by_class, limit=limit, candidates=candidates, iou=0.4, score=0.3
    )
    got = after(step, b=boxes, s=marks)
    wanted = naive(boxes[0], marks[0], step)
    assert got["count"].tolist() == [len(wanted)]
    assert got["boxes"][0, : len(wanted)].tolist() == [boxes[0, box].tolist() for box, _ in wanted]
    assert got["classes"][0, : len(wanted)].tolist() == [kind for _, kind in wanted]
    assert got["scores"][0, : len(wanted)].tolist() == [marks[0, box, kind] for box, kind in wanted]
    assert not got["boxes"][0, len(wanted) :].any()


def test_boxes_are_read_in_every_format() -> None:
    corner = np.array([[[1, 2, 5, 8]]], np.float32)
    center = np.array([[[3, 5, 4, 6]]], np.float32)
    one = np.ones((1, 1), np.float32)
    for form, boxes in (("corners", corner), ("center", center), ("yx-corners", corner[..., [1, 0, 3, 2]])):
        step = NonMaximumSuppression(boxes="b", scores="s", format=form, limit=1)  # type: ignore[arg-type]
        assert after(step, b=boxes, s=one)["boxes"].tolist() == [[[1, 2, 5, 8]]]
    turned = NonMaximumSuppression(boxes="b", scores="s", transposed=True, limit=1)
    got = after(turned, b=corner.transpose(0, 2, 1), s=one[:, None])
    assert got["boxes"].tolist() == [[[1, 2, 5, 8]]]


def test_scores_that_are_no_numbers_find_nothing() -> None:
    step = NonMaximumSuppression(boxes="b", scores="s", limit=2)
    got = after(step, b=np.full((1, 3, 4), np.nan, np.float32), s=np.full((1, 3), np.nan, np.float32))
    assert got["count"].tolist() == [0]


@pytest.mark.parametrize(
    ("boxes", "marks", "says"),
    [((3, 5), (3,), "wants boxes"), ((3, 4), (4,), "scores for each box"), ((3, 4), (3, 2, 1), "scores for each box")],
)
def test_boxes_and_scores_that_do_not_fit_are_told(boxes: Any, marks: Any, says: str) -> None:
    given_ = {"b": TensorSpec("b", "float32", boxes), "s": TensorSpec("s", "float32", marks)}
    with pytest.raises(SignatureMismatch, match=says):
        NonMaximumSuppression(boxes="b", scores="s").gives(given_)
