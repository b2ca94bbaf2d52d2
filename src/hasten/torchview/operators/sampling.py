"""Padding and resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.convolution import flat_pads
from hasten.torchview.operators.operator import Function, Operator, Site, Tensor

PAD_MODES = ("constant", "reflect", "edge", "wrap")


def pad(x: Tensor, pairs: Sequence[tuple[int, int]], value: Any, *, mode: str) -> Tensor:
    """Pad each axis before and after; negative numbers cut off."""
    if mode == "constant":
        if isinstance(value, tuple):
            (value,) = value
        return F.pad(x, flat_pads(pairs), value=0 if value is None else value)
    for axis, (before, after) in enumerate(pairs):
        if before or after:
            x = x.index_select(axis, _places(x.shape[axis], before, after, mode, x.device))
    return x


def _places(length: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Give for each place of a padded axis the place that it copies."""
    places = torch.arange(-before, length + after, device=device)
    if mode == "edge":
        return places.clamp(0, length - 1)
    if mode == "wrap":
        return places % length
    period = max(2 * (length - 1), 1)
    return (length - 1) - ((places % period) - (length - 1)).abs()


def _bind_pad(site: Site) -> Function:
    mode, fixed, number = site.get("mode", "constant"), site.get("pads"), site.get("value", 0.0)
    if mode not in PAD_MODES:
        raise site.refuse(f"has mode = {mode!r}; known: {', '.join(PAD_MODES)}")

    def run(x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
        given = fixed if pads is None else pads
        half = len(given) // 2
        chosen = [axis % x.ndim for axis in axes] if axes is not None else range(half)
        pairs = [(0, 0)] * x.ndim
        for i, axis in enumerate(chosen):
            pairs[axis] = (given[i], given[half + i])
        return pad(x, pairs, number if fixed is not None else value, mode=mode)

    return run


Weigh = Callable[[Tensor], Tensor]
"""From distances (in samples of the input) to weights."""


def _scaled(length: int, scale: float) -> int:
    """Give a scaled length, multiplied in float32 as ONNX Runtime does: 10 by 0.7 are 7, and not 6."""
    return math.floor(float(np.float32(length) * np.float32(scale)))


@dataclass(frozen=True)
class Resize:
    """The settings of a Resize node."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    antialias: bool
    exclude_outside: bool
    policy: str
    axes: tuple[int, ...] | None

    def __call__(self, x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
        """Resize to ``sizes``, or by ``scales``."""
        if sizes is None and not scales:
            return x
        axes, factors, targets = self._targets(x, scales, sizes)
        work = [i for i, axis in enumerate(axes) if targets[i] != x.shape[axis] or factors[i] != 1.0]
        by = [factors[i] for i in work] if scales else None
        fast = self._interpolate(x, [axes[i] for i in work], [targets[i] for i in work], by)
        if fast is not None:
            return fast
        for i in work:
            x = self._along(x, axes[i], factors[i], targets[i])
        return x

    def _targets(self, x: Tensor, scales: Any, sizes: Any) -> tuple[list[int], list[float], list[int]]:
        axes = [axis % x.ndim for axis in self.axes] if self.axes is not None else list(range(x.ndim))
        lengths = [x.shape[axis] for axis in axes]
        if scales:
            return axes, list(scales), [_scaled(n, s) for n, s in zip(lengths, scales, strict=True)]
        factors = [size / n for size, n in zip(sizes, lengths, strict=True)]
        if self.policy == "stretch":
            return axes, factors, list(sizes)
        one = min(factors) if self.policy == "not_larger" else max(factors)
        return axes, [one] * len(axes), [math.floor(n * one + 0.5) for n in lengths]

    def _interpolate(
        self, x: Tensor, axes: list[int], targets: list[int], factors: list[float] | None
    ) -> Tensor | None:
        """Use PyTorch's kernel where it does the same: images, and factors or sizes that are whole.

        Its factor is the ratio of the lengths, which one that is given need not be: 10 by 2.05 are 20.
        """
        if x.ndim != 4 or axes != [2, 3] or self.antialias or self.exclude_outside or self.policy != "stretch":
            return None
        lengths = [x.shape[axis] for axis in axes]
        whole = all(target % length == 0 for length, target in zip(lengths, targets, strict=True))
        if factors is not None:
            ratios = [target / length for length, target in zip(lengths, targets, strict=True)]
            if not whole or ratios != factors:
                return None
        if self.mode == "nearest" and (self.coordinates, self.nearest) == ("asymmetric", "floor") and whole:
            return F.interpolate(x, tuple(targets), mode="nearest")
        if self.mode == "linear" and self.coordinates in ("half_pixel", "align_corners"):
            corners = self.coordinates == "align_corners"
            return F.interpolate(x, tuple(targets), mode="bilinear", align_corners=corners)
        if self.mode == "cubic" and self.coordinates in ("half_pixel", "align_corners") and self.cubic == -0.75:
            corners = self.coordinates == "align_corners"
            return F.interpolate(x, tuple(targets), mode="bicubic", align_corners=corners)
        return None

    def _along(self, x: Tensor, axis: int, factor: float, target: int) -> Tensor:
        """Resize one axis: every mode is a product with a matrix [target, length]."""
        length = x.shape[axis]
        centres = self._centres(length, factor, target).to(x.device)
        if self.mode == "nearest":
            return x.index_select(axis, self._nearest(centres).clamp(0, length - 1))
        matrix = self._matrix(centres, length, factor).to(x.dtype)
        return torch.movedim(torch.movedim(x, axis, -1) @ matrix.t(), -1, axis)

    def _centres(self, length: int, factor: float, target: int) -> Tensor:
        """Give where each place of the output lies in the input, in float32 as ONNX Runtime computes it."""
        places = torch.arange(target, dtype=torch.float32)
        if self.coordinates == "align_corners":
            return places * ((length - 1) / (target - 1)) if target > 1 else torch.zeros(target)
        if self.coordinates == "asymmetric":
            return places / factor
        if self.coordinates == "pytorch_half_pixel" and target == 1:
            return torch.zeros(1)
        if self.coordinates == "half_pixel_symmetric":
            adjusted = target / (factor * length)
            return length / 2 * (1 - adjusted) + (places + 0.5) / factor - 0.5
        return (places + 0.5) / factor - 0.5

    def _nearest(self, centres: Tensor) -> Tensor:
        rounded = {
            "floor": torch.floor,
            "ceil": torch.ceil,
            "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
            "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
        }[self.nearest](centres)
        return rounded.to(torch.int64)

    def _matrix(self, centres: Tensor, length: int, factor: float) -> Tensor:
        """Give the weight of each input place for each output place; what reaches outside is the border's."""
        stretch = min(factor, 1.0) if self.antialias else 1.0
        reach = math.ceil((2 if self.mode == "cubic" else 1) / stretch) + 1
        first = torch.floor(centres).to(torch.int64)
        taps = first[:, None] + torch.arange(-reach, reach + 1, device=centres.device)
        weights = self._weights((taps - centres[:, None]).abs() * stretch)
        if self.exclude_outside:
            weights = torch.where((taps >= 0) & (taps < length), weights, 0.0)
        if self.exclude_outside or self.antialias:
            weights = weights / weights.sum(1, keepdim=True)
        matrix = torch.zeros(len(centres), length, device=centres.device)
        return matrix.scatter_add(1, taps.clamp(0, length - 1), weights)

    def _weights(self, distance: Tensor) -> Tensor:
        if self.mode == "linear":
            return (1.0 - distance).clamp_min(0.0)
        a = self.cubic  # R. Keys, "Cubic convolution interpolation", 1981
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def _bind_resize(site: Site) -> Function:
    old = site.opset < 11  # and Upsample: asymmetric, the place below, scales as the second input
    axes = site.get("axes")
    resize = Resize(
        mode=site.get("mode", "nearest"),
        coordinates=site.get("coordinate_transformation_mode", "asymmetric" if old else "half_pixel"),
        nearest=site.get("nearest_mode", "floor" if old else "round_prefer_floor"),
        cubic=site.get("cubic_coeff_a", -0.75),
        antialias=bool(site.get("antialias", 0)),
        exclude_outside=bool(site.get("exclude_outside", 0)),
        policy=site.get("keep_aspect_ratio_policy", "stretch"),
        axes=None if axes is None else tuple(axes),
    )
    for what, value, allowed in (
        ("mode", resize.mode, ("nearest", "linear", "cubic")),
        ("coordinate_transformation_mode", resize.coordinates, COORDINATES),
        ("nearest_mode", resize.nearest, NEAREST),
    ):
        if value not in allowed:
            raise site.refuse(f"has {what} = {value!r}; known: {', '.join(allowed)}")
    fixed = site.get("scales")
    return (lambda x, scales=None: resize(x, None, scales or fixed)) if old else resize


_RESIZE = frozenset(
    (
        *("antialias", "axes", "coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside"),
        *("extrapolation_value", "keep_aspect_ratio_policy", "mode", "nearest_mode"),
    )
)

TABLE: Mapping[str, Operator] = {
    "Pad": Operator(bind=_bind_pad, attributes=frozenset(("mode", "pads", "value")), host=(1, 2, 3), fixed=(2,)),
    "Upsample": Operator(bind=_bind_resize, attributes=frozenset(("mode", "scales")), host=(1,), fixed=(1,)),
    "Resize": Operator(bind=_bind_resize, attributes=_RESIZE, host=(1, 2, 3), fixed=(1, 2)),
}
