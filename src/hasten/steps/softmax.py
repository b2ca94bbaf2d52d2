"""``softmax``: scores become probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from hasten.errors import SignatureMismatch
from hasten.settings import Doc
from hasten.steps.step import Around, Opened, Place, Specs, Values, found, with_new
from hasten.tensors import Array, Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Give exp(x / temperature) over its sum along the last axis, in float32 (float64 stays what it is).

    The largest score is subtracted first, so that nothing overflows. A temperature is what calibration fits (Guo et
    al., On Calibration of Modern Neural Networks, ICML 2017).
    """

    name: ClassVar[str] = "softmax"
    places: ClassVar[frozenset[Place]] = frozenset({"post"})

    input: Annotated[str, Doc("the scores")]
    output: Annotated[str | None, Doc("what the probabilities are called; none: as the input")] = None
    temperature: Annotated[Annotated[float, Meta(gt=0)], Doc("scores are divided by it")] = 1.0

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read what the model gives."""
        return ()

    def gives(self, given: Specs) -> Specs:
        """Make probabilities in the same shape."""
        spec = scores_spec(given, self.input)
        made = replace(spec, name=self.output or self.input, dtype=_dtype(spec.dtype))
        return with_new(given, made, instead_of=(self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""
        target, dtype = self.output or self.input, _dtype(given[self.input].dtype)

        def apply(values: Feed) -> Values:
            left = {name: value for name, value in values.items() if name != self.input}
            return {**left, target: softmax(values[self.input].astype(dtype) / self.temperature).astype(dtype)}

        return Opened(apply)


def softmax(scores: Array) -> Array:
    """Give probabilities along the last axis of floats."""
    grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Array = grown / grown.sum(axis=-1, keepdims=True)
    return shares


def scores_spec(given: Specs, name: str) -> TensorSpec:
    """Give the specification of scores. Raises SignatureMismatch: they are no floats, or have no axis of classes."""
    spec = found(given, name)
    if not spec.dtype.startswith(("float", "bfloat")) or not spec.shape:
        raise SignatureMismatch(f"it wants a float for each class, and {name!r} is {spec}")
    return spec


def _dtype(of: str) -> str:
    return "float64" if of == "float64" else "float32"
