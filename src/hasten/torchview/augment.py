"""Changed copies of samples, made anew for each batch. The teacher sees the same ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.errors import Unsupported

Augment = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
"""Changes a batch, inputs by name, each [n, ...]. All that is random comes from the generator (of the CPU), which is
seeded for each step: so an interrupted training goes on as if it had not been."""

SHIFT_SHARE = 8
"""An image is shifted by at most a share of one in this many of its side: 4 of CIFAR's 32 pixels."""


def mirror_shift(inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Shift each image by up to an eighth of its side and mirror every second one, left to right.

    Images are the inputs of four dimensions, [n, c, h, w] or [n, h, w, c]: see ``channels_first``. The images of one
    sample get the same draw. What comes in at the border repeats the edge, which is right for any
    range of pixels; zero would be for centred ones alone.

    Raises:
        Unsupported: no input has four dimensions.
    """
    images = [name for name, value in inputs.items() if value.ndim == 4]
    if not images:
        shapes = ", ".join(f"{name!r} {list(value.shape)}" for name, value in inputs.items())
        raise Unsupported("mirror-shift", f"it takes images [n, c, h, w] or [n, h, w, c], and the inputs are {shapes}")
    n = len(inputs[images[0]])
    shift = torch.rand(2, n, generator=generator) * 2 - 1  # of the largest one
    mirrored = torch.rand(n, generator=generator) < 0.5
    return {**inputs, **{name: _moved(inputs[name], shift, mirrored) for name in images}}


def _moved(image: Tensor, shift: Tensor, mirrored: Tensor) -> Tensor:
    """Gather shifted rows and columns of [n, c, h, w] or [n, h, w, c]."""
    n, first = len(image), channels_first(tuple(image.shape))
    h, w = image.shape[2:] if first else image.shape[1:3]
    rows = _places(shift[0], h)  # [n, h]
    columns = _places(shift[1], w)  # [n, w]
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    each, rows, columns = (index.to(image.device) for index in (torch.arange(n), rows, columns))
    if first:
        channels = torch.arange(image.shape[1], device=image.device)
        return image[each[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None]]
    return image[each[:, None, None], rows[:, :, None], columns[:, None, :]]


def _places(shift: Tensor, length: int) -> Tensor:
    """Give the source of each place [n, length]; beyond the border, the border."""
    largest = length // SHIFT_SHARE
    whole = (shift * (largest + 0.5)).round().clamp(-largest, largest).long()
    return (whole[:, None] + torch.arange(length)).clamp(0, length - 1)


def channels_first(shape: tuple[int, ...]) -> bool:
    """Tell [n, c, h, w] from [n, h, w, c]: a square shows its sides; else channels are fewer, first in a tie."""
    _, a, b, c = shape
    if (a == b) != (b == c):
        return b == c
    return a <= c
