"""``resize``: pixels to another size: exactly, by the shorter side, or fitted in and padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from PIL import Image

from hasten.errors import BadRequest, InvalidSetting
from hasten.samples.preprocess import MAX_PIXELS
from hasten.settings import Doc
from hasten.steps.pixels import found_image, image_spec, to_pillow, to_pixels
from hasten.steps.step import Around, Opened, Place, Specs, Values, with_new
from hasten.tensors import Feed, TensorSpec

Length = Annotated[int, Meta(ge=1, le=16_384)]

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

POINTWISE = ("nearest", "bilinear", "bicubic")
"""The filters that can read a few pixels around a point alone, which is what leaving antialiasing out means."""


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Resize pixels uint8 [height, width, channels], as Pillow does.

    ``exact`` makes height times width, whatever the image's shape. ``shorter`` makes the shorter side ``size`` and
    keeps the shape: the longer side is ``int(size * longer / shorter)``, as torchvision rounds it. ``pad`` fits the
    image into height times width, keeps its shape, puts it in the middle and fills the rest.

    Raises:
        InvalidSetting: the sizes that the mode needs are not given, or others are; or the filter has no such form.
    """

    name: ClassVar[str] = "resize"
    places: ClassVar[frozenset[Place]] = frozenset({"pre"})

    input: Annotated[str, Doc("the pixels")] = "image"
    mode: Annotated[Literal["exact", "shorter", "pad"], Doc("what is kept: nothing, or the image's shape")] = "exact"
    height: Annotated[Length | None, Doc("rows that come out, for exact and pad")] = None
    width: Annotated[Length | None, Doc("columns that come out, for exact and pad")] = None
    size: Annotated[Length | None, Doc("length of the shorter side, for shorter")] = None
    filter: Annotated[
        Literal["nearest", "box", "bilinear", "bicubic", "lanczos"], Doc("how pixels between pixels are made")
    ] = "bilinear"
    antialias: Annotated[bool, Doc("look at all pixels that fall into one when it shrinks, as Pillow does")] = True
    fill: Annotated[Annotated[int, Meta(ge=0, le=255)], Doc("value of the padding")] = 0

    def __post_init__(self) -> None:
        wanted = {"height": self.height, "width": self.width, "size": self.size}
        needed = ("size",) if self.mode == "shorter" else ("height", "width")
        for name, value in wanted.items():
            if (value is None) == (name in needed):
                what = "is needed" if name in needed else "has no meaning"
                raise InvalidSetting(f"{self.name}: {name} {what} for mode {self.mode!r}")
        if not self.antialias and self.filter not in POINTWISE:
            raise InvalidSetting(f"{self.name}: antialias = false is there for {', '.join(POINTWISE)} alone")

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read pixels of any size, in colour."""
        return (image_spec(self.input),)

    def gives(self, given: Specs) -> Specs:
        """Make pixels of the size that is asked for; by the shorter side alone they have any."""
        channels = found_image(given, self.input).shape[2]
        made = image_spec(self.input, self.height or "height", self.width or "width", int(channels))
        return with_new(given, made, instead_of=(self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""

        def apply(values: Feed) -> Values:
            image = to_pillow(values[self.input])
            return {**values, self.input: to_pixels(self.resized(image))}

        return Opened(apply)

    def resized(self, image: Image.Image) -> Image.Image:
        """Give the image in its new size. Raises BadRequest: that would be too large."""
        if self.mode == "exact":
            return self._to(image, self.width or 1, self.height or 1)
        if self.mode == "shorter":
            return self._to(image, *self._by_shorter(image))
        return self._padded(image, self.width or 1, self.height or 1)

    def _by_shorter(self, image: Image.Image) -> tuple[int, int]:
        size, shorter = self.size or 1, min(image.size)
        width, height = (size if side == shorter else int(size * side / shorter) for side in image.size)
        if width * height > MAX_PIXELS:
            raise BadRequest(
                f"an image of {image.width} x {image.height} would become one of {width} x {height}; "
                f"more than {MAX_PIXELS:,} pixels are refused"
            )
        return width, height

    def _padded(self, image: Image.Image, width: int, height: int) -> Image.Image:
        factor = min(width / image.width, height / image.height)
        inner = (
            min(width, max(1, round(image.width * factor))),
            min(height, max(1, round(image.height * factor))),
        )
        canvas = Image.new(image.mode, (width, height), (self.fill,) * len(image.getbands()))
        canvas.paste(self._to(image, *inner), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas

    def _to(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.size == (width, height):
            return image
        if self.antialias:
            return image.resize((width, height), FILTERS[self.filter])
        box = (0, 0, image.width, image.height)
        return image.transform((width, height), Image.Transform.EXTENT, box, resample=FILTERS[self.filter])
