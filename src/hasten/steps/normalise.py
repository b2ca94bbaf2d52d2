"""``normalise``: pixels become the numbers that a network was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np

from hasten.errors import InvalidSetting, SignatureMismatch
from hasten.samples.preprocess import Preprocess
from hasten.settings import Doc
from hasten.steps.pixels import found_image, image_spec
from hasten.steps.step import Around, Opened, Place, Specs, Values, with_new
from hasten.tensors import Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Compute ``(pixel * scale - mean) / std`` in float32, lay the channels out, and cast.

    The arithmetic is that of ``hasten.samples.Preprocess``, so that serving and training see the same numbers.

    Raises:
        InvalidSetting: a deviation of 0, values that are not finite, or dtype uint8 with numbers that change pixels.
    """

    name: ClassVar[str] = "normalise"
    places: ClassVar[frozenset[Place]] = frozenset({"pre"})

    input: Annotated[str, Doc("the pixels, uint8 [height, width, channels]")] = "image"
    output: Annotated[str | None, Doc("what the result is called: the model's input; none: as the input")] = None
    scale: Annotated[float, Doc("factor on pixels of 0 to 255")] = 1 / 255
    mean: Annotated[tuple[float, ...], Doc("subtracted after scaling: one value, or one a channel")] = ()
    std: Annotated[tuple[float, ...], Doc("divided by after the mean: one value, or one a channel")] = ()
    layout: Annotated[Literal["nchw", "nhwc"], Doc("where the channels are")] = "nchw"
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64", "uint8"], Doc("of the tensor that comes out")
    ] = "float32"

    def __post_init__(self) -> None:
        if max(len(self.mean), len(self.std)) > 1 and {len(self.mean), len(self.std)} - {0, 1, 3}:
            raise InvalidSetting(f"{self.name}: mean and std have one value, or three; not {len(self.mean)}")
        if not np.isfinite(self.scale):
            raise InvalidSetting(f"{self.name}: scale = {self.scale} is not finite")
        _ = self.arithmetic  # it checks the numbers

    @cached_property
    def arithmetic(self) -> Preprocess:
        """The same numbers as samples are read with."""
        return Preprocess(
            scale=self.scale,
            mean=self.mean,
            std=self.std,
            layout=self.layout,
            dtype=self.dtype,
        )

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read pixels of any size, in colour."""
        return (image_spec(self.input),)

    def gives(self, given: Specs) -> Specs:
        """Make numbers, laid out."""
        height, width, channels = found_image(given, self.input).shape
        if channels == 1 and max(len(self.mean), len(self.std)) > 1:
            raise SignatureMismatch(f"it has {max(len(self.mean), len(self.std))} means or deviations for 1 channel")
        shape = (channels, height, width) if self.layout == "nchw" else (height, width, channels)
        made = TensorSpec(self.output or self.input, self.dtype, shape)
        return with_new(given, made, instead_of=(self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""
        target, numbers = self.output or self.input, self.arithmetic

        def apply(values: Feed) -> Values:
            pixels = values[self.input]
            left = {name: value for name, value in values.items() if name != self.input}
            laid = pixels.transpose(2, 0, 1) if self.layout == "nchw" else pixels
            return {**left, target: np.ascontiguousarray(numbers.normalize(laid))}

        return Opened(apply)
