"""``center-crop``: the middle of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hasten.errors import BadRequest, SignatureMismatch
from hasten.settings import Doc
from hasten.steps.pixels import found_image, image_spec
from hasten.steps.resize import Length
from hasten.steps.step import Around, Opened, Place, Specs, Values, with_new
from hasten.tensors import Array, Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Cut height times width out of the middle of pixels [height, width, channels].

    Of an odd rest less is cut off above and left. A smaller image is refused: put a resize before.
    """

    name: ClassVar[str] = "center-crop"
    places: ClassVar[frozenset[Place]] = frozenset({"pre"})

    input: Annotated[str, Doc("the pixels")] = "image"
    height: Annotated[Length, Doc("rows that come out")]
    width: Annotated[Length, Doc("columns that come out")]

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read pixels of any size, in colour."""
        return (image_spec(self.input),)

    def gives(self, given: Specs) -> Specs:
        """Make pixels of that size."""
        spec = found_image(given, self.input)
        for have, wanted in zip(spec.shape, (self.height, self.width), strict=False):
            if isinstance(have, int) and have < wanted:
                raise SignatureMismatch(f"it cuts out {self.height} x {self.width}, and {self.input!r} is {spec}")
        made = image_spec(self.input, self.height, self.width, int(spec.shape[2]))
        return with_new(given, made, instead_of=(self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""

        def apply(values: Feed) -> Values:
            return {**values, self.input: self.cropped(values[self.input])}

        return Opened(apply)

    def cropped(self, pixels: Array) -> Array:
        """Give the middle, as a view. Raises BadRequest: the image is too small."""
        height, width = pixels.shape[:2]
        if height < self.height or width < self.width:
            raise BadRequest(
                f"an image of {height} x {width} (height x width) cannot be cropped to {self.height} x {self.width}"
            )
        top, left = (height - self.height) // 2, (width - self.width) // 2
        return pixels[top : top + self.height, left : left + self.width]
