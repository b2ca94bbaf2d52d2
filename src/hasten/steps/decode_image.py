"""``decode-image``: the bytes of a JPEG, PNG, WebP or BMP file become pixels."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from PIL import Image

from hasten.errors import BadInput, BadRequest, InvalidSetting, SignatureMismatch
from hasten.samples.preprocess import CHANNELS, MAX_PIXELS, Pixels, eight_bits, open_image
from hasten.settings import Doc
from hasten.steps.pixels import image_spec, to_pixels
from hasten.steps.step import Around, Opened, Place, Specs, Values, found, with_new
from hasten.tensors import Array, Feed, TensorSpec

MODES = {"rgb": "RGB", "gray": "L"}

WHITE = (255, 255, 255)

ORIENTATION = 0x0112
"""EXIF's tag."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each value of EXIF's orientation asks for; 1 and others ask for nothing."""


@dataclass(frozen=True, kw_only=True)
class DecodeImage:
    """Decode an image file (JPEG, PNG, WebP, BMP) to uint8 [height, width, channels].

    An image of more than ``max_pixels`` by its header is refused before it is decoded. Gray becomes three equal
    channels where ``color`` is rgb, colour becomes luma (ITU-R 601) where it is gray. Of an animation the first frame
    is taken; pixels of 16 bits a channel or floats are refused, and so is a JPEG of more than 100 scans.

    Raises:
        InvalidSetting: ``background`` is no colour.
    """

    name: ClassVar[str] = "decode-image"
    places: ClassVar[frozenset[Place]] = frozenset({"pre"})

    input: Annotated[str, Doc("tensor with the file's bytes; what a client sends")] = "image"
    output: Annotated[str | None, Doc("what the pixels are called; none: as the input")] = None
    color: Annotated[Literal["rgb", "gray"], Doc("colour channels: three, or one")] = "rgb"
    orientation: Annotated[
        Literal["exif", "stored"], Doc("turn it as its EXIF flag says, or leave it as it is stored, as training does")
    ] = "exif"
    alpha: Annotated[
        Literal["drop", "blend"], Doc("leave transparency out, as training does, or lay it on ``background``")
    ] = "drop"
    background: Annotated[tuple[int, int, int], Doc("colour behind what is transparent, where it is blended")] = WHITE
    max_pixels: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_PIXELS)], Doc("height times width over which an image is refused")
    ] = MAX_PIXELS

    def __post_init__(self) -> None:
        if not all(0 <= value <= 255 for value in self.background):
            raise InvalidSetting(f"{self.name}: background = {list(self.background)}: each value is 0 to 255")

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read the file's bytes."""
        return (TensorSpec(self.input, "string", ()),)

    def gives(self, given: Specs) -> Specs:
        """Make pixels of any size."""
        spec = found(given, self.input)
        if spec.dtype != "string" or spec.shape:
            raise SignatureMismatch(f"it wants a file's bytes, and {self.input!r} is {spec}")
        made = image_spec(self.output or self.input, channels=CHANNELS[self.color])
        return with_new(given, made, instead_of=(self.input,))

    def open(self, around: Around, given: Specs) -> Opened:
        """Read nothing."""
        target = self.output or self.input

        def apply(values: Feed) -> Values:
            left = {name: value for name, value in values.items() if name != self.input}
            return {**left, target: self.decode(file_of(values[self.input]))}

        return Opened(apply)

    def decode(self, data: bytes) -> Pixels:
        """Decode one file to [H, W, C].

        Raises:
            BadRequest: it is no such image, is damaged, or has too many pixels.
        """
        try:
            with self._opened(data) as image:
                return to_pixels(self._converted(image))
        except BadInput as error:
            raise BadRequest(str(error)) from error
        except (BadRequest, MemoryError):
            raise
        except Exception as error:  # Pillow lets out whatever its parsers meet in a file that is made to break them
            raise BadRequest(f"the image cannot be decoded: {error}") from error

    def count_pixels(self, data: bytes) -> int:
        """Give height times width of one file by its header, without decoding it. Raises BadRequest."""
        try:
            with self._opened(data) as image:
                return image.width * image.height
        except BadInput as error:
            raise BadRequest(str(error)) from error

    def _opened(self, data: bytes) -> Image.Image:
        image = open_image(data)
        if image.width * image.height > self.max_pixels:
            raise BadRequest(
                f"the image has {image.width} x {image.height} pixels; over {self.max_pixels:,} are refused"
            )
        return image

    def _converted(self, image: Image.Image) -> Image.Image:
        eight_bits(image)
        ready: Image.Image = image
        if self.alpha == "blend" and ("A" in image.mode or "transparency" in image.info):
            layers = image.convert("RGBA")
            ready = Image.new("RGB", image.size, self.background)
            ready.paste(layers, mask=layers.getchannel("A"))
        ready = ready.convert(MODES[self.color])
        turn = TURNS.get(_orientation(image)) if self.orientation == "exif" else None
        return ready if turn is None else ready.transpose(turn)


def file_of(value: Array) -> bytes:
    """Give the bytes of one file, []."""
    data = value.item()
    return data if isinstance(data, bytes) else str(data).encode()


def _orientation(image: Image.Image) -> int:
    """Read the flag of a decoded image; EXIF that cannot be read says nothing, as in every viewer."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, ValueError, ArithmeticError, SyntaxError, TypeError, LookupError, struct.error, UserWarning):
        return 1
