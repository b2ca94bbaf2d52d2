"""``top-k``: the best classes of each row, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from hasten.errors import SignatureMismatch, StoreError
from hasten.settings import Doc
from hasten.steps.softmax import scores_spec
from hasten.steps.step import Around, Opened, Place, Specs, Values, with_new
from hasten.tensors import Array, Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Give the ``k`` best classes, the best first: their names, as BYTES [k], and their scores [k].

    Where the axis of classes is open there may be fewer than ``k``; then all are given. Of equal scores the class with
    the lower number is first. Names are the deployment's ``classes``, or the lines of a file beside it; where there are
    neither, the numbers of the classes are given as text.
    """

    name: ClassVar[str] = "top-k"
    places: ClassVar[frozenset[Place]] = frozenset({"post"})

    input: Annotated[str, Doc("scores or probabilities, one for each class")]
    k: Annotated[Annotated[int, Meta(ge=1)], Doc("classes that are given")] = 1
    labels: Annotated[str | None, Doc("file of the names, one a line, in the deployment's folder")] = None
    label: Annotated[str, Doc("what the names are called")] = "label"
    score: Annotated[str, Doc("what their scores are called")] = "score"
    index: Annotated[str | None, Doc("what the numbers of the classes are called; none: they are not given")] = None
    keep: Annotated[bool, Doc("give the scores of all classes too")] = False

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read what the model gives."""
        return ()

    def gives(self, given: Specs) -> Specs:
        """Make names and scores."""
        spec = scores_spec(given, self.input)
        *before, classes = spec.shape
        if isinstance(classes, int) and self.k > classes:
            raise SignatureMismatch(f"k = {self.k}, and {self.input!r} has {classes} classes")
        shape = (*before, self.k if isinstance(classes, int) or self.k == 1 else "best")
        made = [TensorSpec(self.label, "string", shape), TensorSpec(self.score, spec.dtype, shape)]
        if self.index is not None:
            made.append(TensorSpec(self.index, "int64", shape))
        return with_new(given, *made, instead_of=() if self.keep else (self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read the names."""
        classes = given[self.input].shape[-1]
        names = read_labels(around, self.labels)
        if names is not None and isinstance(classes, int) and len(names) != classes:
            where = self.labels or "the deployment"
            raise SignatureMismatch(f"{where} names {len(names)} classes, and {self.input!r} has {classes}")
        known = None if names is None else np.array([name.encode() for name in names], object)

        def apply(values: Feed) -> Values:
            scores = values[self.input]
            left = {n: value for n, value in values.items() if self.keep or n != self.input}
            chosen = best(scores, self.k)
            made: Values = {self.label: named(chosen, known), self.score: np.take_along_axis(scores, chosen, axis=-1)}
            if self.index is not None:
                made[self.index] = chosen
            return {**left, **made}

        return Opened(apply)


def best(scores: Array, k: int) -> npt.NDArray[np.int64]:
    """Give the numbers of the ``k`` largest along the last axis, the largest first, of equal ones the lower number."""
    order = np.argsort(-scores.astype(np.float64), axis=-1, kind="stable")
    return order[..., :k].astype(np.int64)


def named(numbers: npt.NDArray[np.int64], names: Array | None) -> Array:
    """Give the names [...] of classes by number, as BYTES."""
    if names is not None:
        inside = np.clip(numbers, 0, len(names) - 1)  # an open axis may have more classes than there are names
        known: Array = np.where(inside == numbers, names[inside], _texts(numbers))
        return known
    return _texts(numbers)


def _texts(numbers: npt.NDArray[np.int64]) -> Array:
    held = np.empty(numbers.size, object)
    held[:] = [b"%d" % number for number in numbers.ravel().tolist()]
    return held.reshape(numbers.shape)


def read_labels(around: Around, file: str | None) -> tuple[str, ...] | None:
    """Read names, one a line; without a file, the deployment's; None where it has none. Raises StoreError."""
    if file is None:
        return around.classes or None
    path = around.file(file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows write a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read as names, one a line: {error}") from error
    if not lines:
        raise StoreError(f"{path} holds no names; write one a line")
    return tuple(lines)
