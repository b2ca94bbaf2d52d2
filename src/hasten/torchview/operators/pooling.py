"""Pooling: one value from a window, or from a whole plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.convolution import flat_pads, pairs, same_pads, spread
from hasten.torchview.operators.operator import Function, Operator, Site, Tensor, plain

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

Pads = list[tuple[int, int]]


class Window:
    """The windows of a pooling node: read once, laid over an input of any size."""

    def __init__(self, site: Site) -> None:
        self.kernel = tuple(site.get("kernel_shape"))
        n = len(self.kernel)
        self.strides = spread(tuple(site.get("strides") or ()) or 1, n)
        self.dilations = spread(tuple(site.get("dilations") or ()) or 1, n)
        self.auto = site.get("auto_pad", "NOTSET")
        if self.auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            raise site.refuse(f"has auto_pad = {self.auto!r}, which ONNX does not know")
        self.ceil = bool(site.get("ceil_mode", 0))
        self.given: Pads = (pairs(site) if self.auto == "NOTSET" else []) or [(0, 0)] * n

    @property
    def simple(self) -> bool:
        """Tell whether PyTorch's own pooling does the same: equal pads of at most half a window, floor."""
        fits = all(a == b and 2 * a <= k for (a, b), k in zip(self.given, self.kernel, strict=True))
        return fits and not self.ceil and not self.auto.startswith("SAME")

    def pads(self, sizes: Sequence[int]) -> Pads:
        """Give what is padded around an input of these sizes."""
        if not self.auto.startswith("SAME"):
            return self.given
        upper = self.auto == "SAME_UPPER"
        return same_pads(sizes, self.kernel, self.strides, self.dilations, upper=upper)

    def overhang(self, sizes: Sequence[int]) -> list[int]:
        """Give how far the last window reaches beyond the padded input on each axis; below 0: not at all.

        With ``ceil_mode`` a window that would start in the padding behind the input is left out.
        """
        found = []
        for size, (before, after), k, step, gap in zip(
            sizes, self.pads(sizes), self.kernel, self.strides, self.dilations, strict=True
        ):
            whole = size + before + after
            width = (k - 1) * gap + 1
            count = (-((width - whole) // step) if self.ceil else (whole - width) // step) + 1
            if self.ceil and (count - 1) * step >= size + before:
                count -= 1
            found.append((count - 1) * step + width - whole)
        return found

    def padded(self, sizes: Sequence[int]) -> Pads:
        """Give the pads, with the overhang behind."""
        pads, more = self.pads(sizes), self.overhang(sizes)
        return [(before, after + max(0, extra)) for (before, after), extra in zip(pads, more, strict=True)]


def max_pool(x: Tensor, window: Window) -> Tensor:
    """Give the largest value of each window."""
    run = _MAX[len(window.kernel)]
    if window.simple:
        padding = tuple(before for before, _ in window.given)
        return run(x, window.kernel, window.strides, padding, window.dilations)
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    wide = F.pad(x, flat_pads(window.padded(x.shape[2:])), value=lowest)
    return run(wide, window.kernel, window.strides, 0, window.dilations)


def max_pool_places(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Give the largest value of each window, and where in the whole flat tensor it stands."""
    n, sizes = len(window.kernel), x.shape[2:]
    pads = window.padded(sizes)
    wide = F.pad(x, flat_pads(pads), value=-math.inf)
    y, places = _MAX[n](wide, window.kernel, window.strides, 0, window.dilations, return_indices=True)
    index = torch.zeros_like(places)
    stride = 1
    for axis in reversed(range(n)):
        length = wide.shape[2 + axis]
        index = index + (places % length - pads[axis][0]) * stride
        places = places // length
        stride *= sizes[axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * n)
    return y, index + planes * stride


def average_pool(x: Tensor, window: Window, *, count_pads: bool) -> Tensor:
    """Give the mean of each window, over the padding too or not."""
    n = len(window.kernel)
    if window.simple and all(gap == 1 for gap in window.dilations):
        padding = tuple(before for before, _ in window.given)
        return _AVERAGE[n](x, window.kernel, window.strides, padding, False, count_pads)
    sizes = x.shape[2:]
    ones = x.new_ones((1, 1, *sizes))
    if count_pads:
        ones = F.pad(ones, flat_pads(window.pads(sizes)), value=1.0)
        ones = F.pad(ones, flat_pads([(0, max(0, extra)) for extra in window.overhang(sizes)]))
    else:
        ones = F.pad(ones, flat_pads(window.padded(sizes)))
    return _sums(F.pad(x, flat_pads(window.padded(sizes))), window) / _sums(ones, window)


def _sums(x: Tensor, window: Window) -> Tensor:
    """Give the sum of each window, of each channel by itself."""
    n = len(window.kernel)
    flat = x.reshape(-1, 1, *x.shape[2:])
    y = _CONV[n](flat, x.new_ones((1, 1, *window.kernel)), None, window.strides, 0, window.dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


def lp_pool(x: Tensor, window: Window, *, p: int) -> Tensor:
    """Give the p-norm of each window."""
    return _sums(F.pad(x.abs() ** p, flat_pads(window.padded(x.shape[2:]))), window) ** (1.0 / p)


def global_average(x: Tensor) -> Tensor:
    """Give the mean of each plane."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def global_max(x: Tensor) -> Tensor:
    """Give the largest value of each plane."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def global_lp(x: Tensor, *, p: int) -> Tensor:
    """Give the p-norm of each plane."""
    return torch.linalg.vector_norm(x, p, tuple(range(2, x.ndim)), keepdim=True)


def _bind_max_pool(site: Site) -> Function:
    if site.wants(1):
        if site.get("storage_order", 0):
            raise site.refuse("gives places in column-major order (storage_order = 1)")
        return partial(max_pool_places, window=Window(site))
    window = Window(site)
    return lambda x: (max_pool(x, window),)


def _bind_average_pool(site: Site) -> Function:
    return partial(average_pool, window=Window(site), count_pads=bool(site.get("count_include_pad", 0)))


def _bind_lp_pool(site: Site) -> Function:
    return partial(lp_pool, window=Window(site), p=site.get("p", 2))


_ATTRIBUTES = frozenset(("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides"))

TABLE: Mapping[str, Operator] = {
    "MaxPool": Operator(bind=_bind_max_pool, attributes=_ATTRIBUTES | {"storage_order"}, many=True),
    "AveragePool": Operator(bind=_bind_average_pool, attributes=_ATTRIBUTES | {"count_include_pad"}),
    "LpPool": Operator(bind=_bind_lp_pool, attributes=_ATTRIBUTES | {"p"}),
    "GlobalAveragePool": plain(global_average),
    "GlobalMaxPool": plain(global_max),
    "GlobalLpPool": Operator(bind=lambda site: partial(global_lp, p=site.get("p", 2)), attributes=frozenset(("p",))),
}
