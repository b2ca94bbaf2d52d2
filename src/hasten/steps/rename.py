"""``rename``: a tensor under another name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from hasten.errors import InvalidSetting
from hasten.settings import Doc
from hasten.steps.step import Around, Opened, Place, Specs, Values, found, with_new
from hasten.tensors import Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Rename:
    """Call a tensor something else.

    Raises:
        InvalidSetting: both names are one.
    """

    name: ClassVar[str] = "rename"
    places: ClassVar[frozenset[Place]] = frozenset({"pre", "post"})

    input: Annotated[str, Doc("the tensor")]
    to: Annotated[str, Doc("its new name")]

    def __post_init__(self) -> None:
        if self.input == self.to or not self.to:
            raise InvalidSetting(f"{self.name}: to = {self.to!r} must be another name than the input's")

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read what the model takes under the new name."""
        spec = wanted.get(self.to)
        return () if spec is None else (replace(spec, name=self.input),)

    def gives(self, given: Specs) -> Specs:
        """Give it under its new name."""
        spec = found(given, self.input)
        return with_new(given, replace(spec, name=self.to), instead_of=(self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""

        def apply(values: Feed) -> Values:
            left = {name: value for name, value in values.items() if name != self.input}
            return {**left, self.to: values[self.input]}

        return Opened(apply, renamed={self.input: self.to})
