"""What the steps on images share: their specification, and the way between arrays and Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from hasten.errors import SignatureMismatch
from hasten.samples.preprocess import Pixels
from hasten.steps.step import Specs, found
from hasten.tensors import Array, TensorSpec


def image_spec(name: str, height: int | str = "height", width: int | str = "width", channels: int = 3) -> TensorSpec:
    """Give the specification of an image as steps pass it on: uint8 [height, width, channels]."""
    return TensorSpec(name, "uint8", (height, width, channels))


def found_image(given: Specs, name: str) -> TensorSpec:
    """Give the specification of an image. Raises SignatureMismatch: there is none, or it is something else."""
    spec = found(given, name)
    if spec.dtype != "uint8" or len(spec.shape) != 3 or spec.shape[2] not in (1, 3):
        raise SignatureMismatch(f"it wants pixels uint8[height, width, 1 or 3], and {name!r} is {spec}")
    return spec


def to_pillow(pixels: Array) -> Image.Image:
    """Give an image of Pillow's for pixels uint8 [H, W, 1 or 3]."""
    return Image.fromarray(np.asarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, np.uint8))


def to_pixels(image: Image.Image) -> Pixels:
    """Give the pixels [H, W, C] of a gray or RGB image of Pillow's."""
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, len(image.getbands()))
