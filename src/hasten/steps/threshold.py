"""``threshold``: which scores are high enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from hasten.settings import Doc
from hasten.steps.softmax import scores_spec
from hasten.steps.step import Around, Opened, Place, Specs, Values, with_new
from hasten.tensors import Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Give for each score whether it is at least ``at``, as booleans. With ``sigmoid``, of 1 / (1 + exp(-score))."""

    name: ClassVar[str] = "threshold"
    places: ClassVar[frozenset[Place]] = frozenset({"post"})

    input: Annotated[str, Doc("the scores")]
    at: Annotated[float, Doc("the least score that counts")] = 0.5
    sigmoid: Annotated[bool, Doc("scores are logits: compare their sigmoid")] = False
    output: Annotated[str, Doc("what the booleans are called")] = "above"
    keep: Annotated[bool, Doc("give the scores too")] = False

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read what the model gives."""
        return ()

    def gives(self, given: Specs) -> Specs:
        """Make a boolean for each score."""
        spec = scores_spec(given, self.input)
        made = TensorSpec(self.output, "bool", spec.shape)
        return with_new(given, made, instead_of=() if self.keep else (self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""

        def apply(values: Feed) -> Values:
            scores = values[self.input].astype(np.float64)
            if self.sigmoid:
                scores = 0.5 * (1 + np.tanh(0.5 * scores))  # does not overflow
            left = {name: value for name, value in values.items() if self.keep or name != self.input}
            return {**left, self.output: scores >= self.at}

        return Opened(apply)
