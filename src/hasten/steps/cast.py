"""``cast``: a tensor to another dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np

from hasten.errors import BadRequest, SignatureMismatch
from hasten.settings import Doc
from hasten.steps.step import Around, Opened, Place, Specs, Values, found, with_new
from hasten.tensors import DTYPES, Array, Feed, TensorSpec

Number = Literal[
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
]


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Cast a tensor of numbers.

    A value that the new dtype cannot hold is refused, never wrapped; floats become integers by rounding to the nearest
    (half to even), which is not what a network's own cast does.
    """

    name: ClassVar[str] = "cast"
    places: ClassVar[frozenset[Place]] = frozenset({"pre", "post"})

    input: Annotated[str, Doc("the tensor")]
    to: Annotated[Number, Doc("its new dtype")]
    of: Annotated[Number, Doc("its dtype, where it comes from the client")] = "float32"

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read a tensor of the model's shape, in the dtype ``of``."""
        shape = wanted[self.input].shape if self.input in wanted else ("length",)
        return (TensorSpec(self.input, self.of, shape),)

    def gives(self, given: Specs) -> Specs:
        """Give it in its new dtype."""
        spec = found(given, self.input)
        if spec.dtype == "string":
            raise SignatureMismatch(f"it casts numbers, and {self.input!r} is text")
        return with_new(given, TensorSpec(spec.name, self.to, spec.shape), instead_of=(self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""

        def apply(values: Feed) -> Values:
            return {**values, self.input: self.cast(values[self.input])}

        return Opened(apply)

    def cast(self, array: Array) -> Array:
        """Give the array in the new dtype. Raises BadRequest: a value does not fit."""
        dtype = DTYPES[self.to]
        if dtype.kind in "iu" and array.dtype.kind not in "biu":
            floats = array.astype(np.float64)
            if not np.isfinite(floats).all():
                raise BadRequest(f"{self.input!r} has values that are not finite, which {self.to} cannot hold")
            array = np.rint(floats)
        if dtype.kind in "iu" and array.size:
            low, high, limits = int(array.min()), int(array.max()), np.iinfo(self.to)
            if low < limits.min or high > limits.max:
                raise BadRequest(f"{self.input!r} has values from {low} to {high}, which {self.to} cannot hold")
        with np.errstate(over="ignore"):
            made = array.astype(dtype)
        if dtype.kind not in "biu" and int(np.isinf(made.astype(np.float64)).sum()) > int(np.isinf(array).sum()):
            raise BadRequest(f"{self.input!r} has values too large for {self.to}")
        return made
