"""Real image files, made with Pillow, and the steps of a deployment that takes them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from hasten.protocol.messages import InferRequest, Tensor
from hasten.tensors import Array

SIZE = 16
CLASSES = ("ant", "bee", "cat", "dog")

DECODE: dict[str, Any] = {"step": "decode-image"}
RESIZE: dict[str, Any] = {"step": "resize", "height": SIZE, "width": SIZE}
NORMALISE: dict[str, Any] = {"step": "normalise", "output": "x", "mean": [0.5], "std": [0.25]}
SOFTMAX: dict[str, Any] = {"step": "softmax", "input": "y"}
BEST: dict[str, Any] = {"step": "top-k", "input": "y", "k": 2}

PRE = (DECODE, RESIZE, NORMALISE)
POST = (SOFTMAX, BEST)


def pixels(seed: int = 0, height: int = 40, width: int = 30) -> np.ndarray[Any, Any]:
    """Draw a smooth image [height, width, 3], as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def photo(seed: int = 0, *, form: str = "JPEG", height: int = 40, width: int = 30, **more: Any) -> bytes:
    """Give the bytes of an image file."""
    held = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(held, form, **more)
    return held.getvalue()


def files(*data: bytes) -> Array:
    """Give files as BYTES [n]."""
    held = np.empty(len(data), object)
    held[:] = data
    return held


def asking(*data: bytes, model: str = "net", **more: Any) -> InferRequest:
    """Ask what a model says of image files."""
    return InferRequest(model=model, inputs=(Tensor(name="image", datatype="BYTES", data=files(*data)),), **more)
