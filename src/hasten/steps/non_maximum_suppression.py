"""``non-maximum-suppression``: of many boxes around the same thing, the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from hasten.errors import InvalidSetting, SignatureMismatch
from hasten.settings import Doc
from hasten.steps.step import Around, Opened, Place, Specs, Values, found, with_new
from hasten.tensors import Feed, TensorSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class NonMaximumSuppression:
    """Keep the boxes that no better box of the same class overlaps by more than ``iou``, the best first.

    Boxes [n, 4] and scores [n, classes], or [n] where there is one class. What comes out is of fixed length: boxes
    [limit, 4] as corners x1, y1, x2, y2, scores [limit] and classes int64 [limit], filled up with zeros, and how many
    count, int64 []. Of equal scores the box with the lower number is first. Greedy, as Felzenszwalb et al. (TPAMI 2010)
    have it: a box that is dropped drops none itself.

    Raises:
        InvalidSetting: two outputs have one name.
    """

    name: ClassVar[str] = "non-maximum-suppression"
    places: ClassVar[frozenset[Place]] = frozenset({"post"})

    boxes: Annotated[str, Doc("the boxes, [n, 4]")]
    scores: Annotated[str, Doc("their scores, [n, classes] or [n]")]
    format: Annotated[
        Literal["corners", "center", "yx-corners"],
        Doc("x1 y1 x2 y2; or centre x, y, width, height; or y1 x1 y2 x2"),
    ] = "corners"
    transposed: Annotated[bool, Doc("boxes are [4, n] and scores [classes, n]")] = False
    score: Annotated[float, Doc("boxes with less are dropped")] = 0.25
    iou: Annotated[Share, Doc("shared area over area together, above which the worse box is dropped")] = 0.45
    by_class: Annotated[bool, Doc("boxes of different classes do not drop each other")] = True
    limit: Annotated[Annotated[int, Meta(ge=1, le=10_000)], Doc("boxes that are given at most")] = 100
    candidates: Annotated[
        Annotated[int, Meta(ge=1, le=30_000)], Doc("the best boxes that are looked at; others are dropped")
    ] = 1000
    outputs: Annotated[tuple[str, str, str, str], Doc("names of boxes, scores, classes and count")] = (
        *("boxes", "scores"),
        *("classes", "count"),
    )

    def __post_init__(self) -> None:
        if len(set(self.outputs)) < len(self.outputs):
            raise InvalidSetting(f"{self.name}: outputs = {list(self.outputs)}: names must differ")

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read what the model gives."""
        return ()

    def gives(self, given: Specs) -> Specs:
        """Make boxes of a fixed number."""
        boxes, scores = found(given, self.boxes), found(given, self.scores)
        for spec in (boxes, scores):
            if not spec.dtype.startswith(("float", "bfloat")):
                raise SignatureMismatch(f"it wants floats, and {spec.name!r} is {spec}")
        side, number = (0, 1) if self.transposed else (1, 0)
        if len(boxes.shape) != 2 or boxes.shape[side] != 4:
            raise SignatureMismatch(f"it wants boxes [{'4, n' if self.transposed else 'n, 4'}], and has {boxes}")
        lengths = (boxes.shape[number], scores.shape[-1 if self.transposed else 0] if scores.shape else None)
        if len(scores.shape) not in (1, 2) or (all(isinstance(n, int) for n in lengths) and lengths[0] != lengths[1]):
            raise SignatureMismatch(f"it wants scores for each box of {boxes}, and has {scores}")
        names, limit = self.outputs, self.limit
        made = (
            TensorSpec(names[0], "float32", (limit, 4)),
            TensorSpec(names[1], "float32", (limit,)),
            TensorSpec(names[2], "int64", (limit,)),
            TensorSpec(names[3], "int64", ()),
        )
        return with_new(given, *made, instead_of=(self.boxes, self.scores))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""

        def apply(values: Feed) -> Values:
            left = {name: value for name, value in values.items() if name not in (self.boxes, self.scores)}
            boxes, scores = values[self.boxes].astype(np.float32), values[self.scores].astype(np.float32)
            return {**left, **self._all(boxes, scores)}

        return Opened(apply)

    def _all(self, boxes: Floats, scores: Floats) -> Values:
        n, names = len(boxes), self.outputs
        kept_boxes = np.zeros((n, self.limit, 4), np.float32)
        kept_scores = np.zeros((n, self.limit), np.float32)
        kept_classes = np.zeros((n, self.limit), np.int64)
        counts = np.zeros(n, np.int64)
        for row in range(n):
            each, marks = (boxes[row].T, scores[row].T) if self.transposed else (boxes[row], scores[row])
            chosen = self.of_one(corners(each, self.format), marks if marks.ndim == 2 else marks[:, None])
            counts[row] = count = len(chosen[0])
            kept_boxes[row, :count], kept_scores[row, :count], kept_classes[row, :count] = chosen
        return {names[0]: kept_boxes, names[1]: kept_scores, names[2]: kept_classes, names[3]: counts}

    def of_one(self, boxes: Floats, scores: Floats) -> tuple[Floats, Floats, Ints]:
        """Give the boxes [k, 4], scores [k] and classes [k] that stay, of boxes [n, 4] and scores [n, classes]."""
        which, classes = np.nonzero(scores >= self.score)  # NaN is no score that counts
        marks = scores[which, classes]
        order = np.argsort(-marks, kind="stable")[: self.candidates]
        which, classes, marks = which[order], classes[order].astype(np.int64), marks[order]
        kept = self._greedy(boxes[which], classes)
        return boxes[which][kept], marks[kept], classes[kept]

    def _greedy(self, boxes: Floats, classes: Ints) -> list[int]:
        """Walk from the best down; each kept box strikes out what it overlaps, all at once."""
        alive = np.ones(len(boxes), bool)
        areas = area(boxes)
        kept: list[int] = []
        for at in range(len(boxes)):
            if not alive[at]:
                continue
            kept.append(at)
            if len(kept) == self.limit:
                break
            later = slice(at + 1, None)
            struck = overlap(boxes[at], boxes[later], areas[at], areas[later]) > self.iou
            if self.by_class:
                struck &= classes[later] == classes[at]
            alive[later] &= ~struck
        return kept


def corners(boxes: Floats, form: str) -> Floats:
    """Give boxes [n, 4] as x1, y1, x2, y2, the smaller corner first."""
    if form == "center":
        half = boxes[:, 2:] / 2
        both = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
    else:
        both = boxes[:, [1, 0, 3, 2]] if form == "yx-corners" else boxes
    low, high = np.minimum(both[:, :2], both[:, 2:]), np.maximum(both[:, :2], both[:, 2:])
    return np.concatenate([low, high], axis=1)


def area(boxes: Floats) -> Floats:
    """Give the areas [n] of boxes [n, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def overlap(box: Floats, others: Floats, own: np.float32, areas: Floats) -> Floats:
    """Give the shared area over the area together of a box [4] with others [n, 4]; 0 where neither has any."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    sides = np.maximum(high - low, 0)
    shared = sides[:, 0] * sides[:, 1]
    together = own + areas - shared
    shares: Floats = np.divide(shared, together, out=np.zeros_like(shared), where=together > 0)
    return shares
