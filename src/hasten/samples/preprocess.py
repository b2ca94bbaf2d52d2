"""From an encoded image to a model's input: declared once, kept with the artifact, done the same way everywhere."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from hasten.artifact import Json
from hasten.errors import BadInput, InvalidSetting
from hasten.settings import Doc, build, values_of
from hasten.tensors import DTYPES, Array, TensorSpec

MAX_PIXELS = 50_000_000
"""An image of more is refused before it is decoded: a small file can unfold into gigabytes."""

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""The image formats that are decoded; Pillow's rarer decoders are left alone."""

MAX_SCANS = 100
"""A JPEG of more is refused before it is decoded: each goes over the whole image, and takes a few bytes of the file.
Photos that load progressively have about ten."""

MAX_SEGMENTS = 10_000
"""A JPEG's segments that are looked at to count its scans; of more, nobody says that they are few."""

MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The next marker of a JPEG, but for those that stand within a scan's data."""

START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN, TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01
"""Markers. After all others, and the third of these, come a length of two bytes and what it counts, itself included."""

CHANNELS = {"gray": 1, "rgb": 3}

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What is done to an image, in this order: colour, resize, centre crop, ``(x * scale - mean) / std``, layout.

    The image is turned by no EXIF flag and an alpha channel is dropped, as training loaders do.

    Raises:
        InvalidSetting: a size, a deviation or a combination that cannot be.
    """

    resize: Annotated[tuple[int, int] | None, Doc("height and width to resize to, bilinear; none: keep the size")] = (
        None
    )
    crop: Annotated[tuple[int, int] | None, Doc("height and width to cut from the centre, after resizing")] = None
    color: Annotated[Literal["rgb", "gray"], Doc("colour channels: three, or one")] = "rgb"
    scale: Annotated[float, Doc("factor on pixels of 0 to 255")] = 1 / 255
    mean: Annotated[tuple[float, ...], Doc("subtracted after scaling: one value, or one a channel")] = ()
    std: Annotated[tuple[float, ...], Doc("divided by after the mean: one value, or one a channel")] = ()
    layout: Annotated[Literal["nchw", "nhwc"], Doc("where the channels are")] = "nchw"
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64", "uint8"], Doc("of the tensor that comes out")
    ] = "float32"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            size: tuple[int, int] | None = getattr(self, name)
            if size is not None and (min(size) < 1 or size[0] * size[1] > MAX_PIXELS):
                raise InvalidSetting(f"preprocess: {name} = {list(size)}: both must be positive, and not that large")
        for name in ("mean", "std"):
            values: tuple[float, ...] = getattr(self, name)
            if len(values) not in (0, 1, self.channels) or not np.isfinite(values).all():
                raise InvalidSetting(
                    f"preprocess: {name} = {list(values)}: give one finite value, or {self.channels} for {self.color}"
                )
        if any(value == 0 for value in self.std):
            raise InvalidSetting(f"preprocess: std = {list(self.std)}: a deviation cannot be 0")
        if self.dtype == "uint8" and (self.scale != 1 or self.mean or self.std):
            raise InvalidSetting("preprocess: dtype = 'uint8' keeps pixels as they are: set scale = 1, no mean, no std")

    @property
    def channels(self) -> int:
        """Channels that come out."""
        return CHANNELS[self.color]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that come out, or None where they are the image's own."""
        return self.crop or self.resize

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Give the shape of one image that comes out, where one of ``height`` and ``width`` goes in."""
        h, w = self.size or (height, width)
        return (self.channels, h, w) if self.layout == "nchw" else (h, w, self.channels)

    def apply_image(self, data: bytes) -> Array:
        """Decode an image and prepare it: [C, H, W], or [H, W, C] for the layout nhwc.

        Raises:
            BadInput: it is no image that can be read, or one of more than ``MAX_PIXELS`` pixels.
        """
        with open_image(data) as image:
            try:
                return self._prepare(image)
            except (BadInput, MemoryError):
                raise
            except Exception as error:  # as in ``open_image``
                raise BadInput(f"the image cannot be decoded: {error}") from error

    def apply_pixels(self, pixels: Pixels) -> Array:
        """Prepare pixels [H, W], [H, W, 1] or [H, W, 3] that are decoded already."""
        return self._prepare(Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels))

    def _prepare(self, image: Image.Image) -> Array:
        eight_bits(image)
        ready = image.convert("RGB" if self.color == "rgb" else "L")
        if self.resize is not None and ready.size != (self.resize[1], self.resize[0]):
            ready = ready.resize((self.resize[1], self.resize[0]), Image.Resampling.BILINEAR)
        if self.crop is not None:
            ready = centre(ready, *self.crop)
        pixels = np.asarray(ready, dtype=np.uint8).reshape(ready.height, ready.width, self.channels)  # [H, W, C]
        laid = pixels.transpose(2, 0, 1) if self.layout == "nchw" else pixels
        return np.ascontiguousarray(self.normalize(laid))

    def normalize(self, laid: Array) -> Array:
        """Give pixels that are laid out, of any number of axes before the last three, as the model takes them."""
        if self.dtype == "uint8":
            return laid
        values = laid.astype(np.float32) * np.float32(self.scale)
        along = (-1, 1, 1) if self.layout == "nchw" else (-1,)
        if self.mean:
            values = values - np.asarray(self.mean, np.float32).reshape(along)
        if self.std:
            values = values / np.asarray(self.std, np.float32).reshape(along)
        return values.astype(DTYPES[self.dtype])

    @property
    def values(self) -> dict[str, Json]:
        """Every setting as plain values, as an artifact keeps them."""
        return values_of(self)

    @classmethod
    def of(cls, values: Mapping[str, Json]) -> Preprocess:
        """Make one from plain values. Raises as ``settings.build`` does."""
        return build(cls, values, name="preprocess")


def open_image(data: bytes) -> Image.Image:
    """Open an image without decoding it: ``.size`` is known, no pixel is in memory.

    Raises:
        BadInput: it is none of ``FORMATS``, it has more than ``MAX_PIXELS`` pixels, or it is a JPEG of more than
            ``MAX_SCANS`` scans.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the check below is stricter
        raise BadInput(f"the image is too large to decode: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow lets out whatever its parsers meet in a file that is made to break them
        raise BadInput(f"this is no image ({', '.join(FORMATS)}) that can be read") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadInput(f"the image has {image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are refused")
    if image.format in ("JPEG", "MPO") and has_more_scans(data, MAX_SCANS):
        raise BadInput(f"the image is a JPEG of more than {MAX_SCANS} scans; save it again with fewer")
    return image


def has_more_scans(data: bytes, limit: int) -> bool:
    """Say whether a JPEG has more than ``limit`` scans; those of a preview among its metadata are not its own."""
    if data.count(b"\xff\xda") <= limit:  # as good as always, and quick
        return False
    at, scans = 2, 0
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(data, at)
        if found is None or data[found.end() - 1] in (START_OF_IMAGE, END_OF_IMAGE):  # decoders go no further either
            return False
        at, marker = found.end(), data[found.end() - 1]
        scans += marker == START_OF_SCAN
        if scans > limit:
            return True
        if marker != TEMPORARY:
            at += max(2, int.from_bytes(data[at : at + 2]))
    return True


def preprocess_for(spec: TensorSpec, declared: Preprocess | None = None) -> Preprocess:
    """Give the preprocessing that makes images fit an input.

    Nothing declared: layout, colour and size are those of the input's shape [N, C, H, W] or [N, H, W, C] with one or
    three channels; pixels are scaled by 1/255 for a float input, and left alone for a uint8 one. What was declared
    is kept; only the size is taken from the input where neither ``resize`` nor ``crop`` was given.

    Raises:
        BadInput: the input's shape or dtype is none that images fit by themselves.
    """
    if declared is not None:
        if declared.size is None and len(spec.shape) == 4:
            return replace(declared, resize=_static(spec.shape[2:4] if declared.layout == "nchw" else spec.shape[1:3]))
        return declared
    laid = {axis: spec.shape[axis] for axis in (1, 3)} if len(spec.shape) == 4 else {}
    axis = next((axis for axis, length in laid.items() if length in CHANNELS.values()), None)
    if axis is None or spec.dtype not in ("float32", "float16", "bfloat16", "float64", "uint8"):
        raise BadInput(f"images do not fit the input {spec} by themselves; declare their preprocessing")
    color: Literal["rgb", "gray"] = "rgb" if laid[axis] == 3 else "gray"
    return build(
        Preprocess,
        {
            "resize": _static(spec.shape[2:4] if axis == 1 else spec.shape[1:3]),
            "color": color,
            "scale": 1.0 if spec.dtype == "uint8" else 1 / 255,
            "layout": "nchw" if axis == 1 else "nhwc",
            "dtype": spec.dtype,
        },
    )


def _static(dims: tuple[int | str, ...]) -> tuple[int, int] | None:
    height, width = dims
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def eight_bits(image: Image.Image) -> None:
    """Check that an image has pixels of 8 bits. Raises BadInput."""
    packed = [str(part[3]) for part in getattr(image, "tile", ())]  # colours of 16 bits have the mode of 8
    deep = [each for each in packed if ";16" in each and "BGR;16" not in each]  # a BMP's BGR;16 has 16 for all three
    if image.mode.startswith(("I", "F")) or deep:
        raise BadInput(f"the image has pixels of mode {', '.join([image.mode, *packed])}; hasten reads those of 8 bits")


def centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the centre out; of an odd rest, the smaller half is above and left. Raises BadInput: it is too small."""
    if image.height < height or image.width < width:
        raise BadInput(f"an image of {image.height} x {image.width} cannot be cropped to {height} x {width}; resize it")
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))
