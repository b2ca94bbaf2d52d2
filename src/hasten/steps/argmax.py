"""``argmax``: the number of the best class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hasten.settings import Doc
from hasten.steps.softmax import scores_spec
from hasten.steps.step import Around, Opened, Place, Specs, Values, with_new
from hasten.steps.top_k import best
from hasten.tensors import Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Argmax:
    """Give the number of the largest score along the last axis, as int64; of equal ones the lowest."""

    name: ClassVar[str] = "argmax"
    places: ClassVar[frozenset[Place]] = frozenset({"post"})

    input: Annotated[str, Doc("the scores, one for each class")]
    output: Annotated[str, Doc("what the number is called")] = "class"
    keep: Annotated[bool, Doc("give the scores too")] = False

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read what the model gives."""
        return ()

    def gives(self, given: Specs) -> Specs:
        """Make a number in place of the classes."""
        spec = scores_spec(given, self.input)
        made = TensorSpec(self.output, "int64", spec.shape[:-1])
        return with_new(given, made, instead_of=() if self.keep else (self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""

        def apply(values: Feed) -> Values:
            left = {name: value for name, value in values.items() if self.keep or name != self.input}
            return {**left, self.output: best(values[self.input], 1)[..., 0]}

        return Opened(apply)
