"""Convolutions, and padding as convolutions and pooling write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}

AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


def same_pads(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], *, upper: bool
) -> list[tuple[int, int]]:
    """Give (before, after) of each axis so that the output has ceil(size / stride) values."""
    pads = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        out = -(-size // stride)
        total = max((out - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        pads.append((total // 2, total - total // 2) if upper else (total - total // 2, total // 2))
    return pads


def flat_pads(pads: Sequence[tuple[int, int]]) -> list[int]:
    """Give pads in the order of ``F.pad``: the last axis first."""
    return [side for pair in reversed(pads) for side in pair]


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: tuple[int, ...] | int,
    padding: tuple[int, ...] | int,
    dilations: tuple[int, ...] | int,
    group: int,
) -> Tensor:
    """Convolve x [n, c, ...] with weight [m, c / group, ...]; the same padding on both sides."""
    return _CONV[weight.ndim](x, weight, bias, strides, padding, dilations, group)


def _bind_conv(site: Site) -> Function:
    strides, dilations = _numbers(site, "strides"), _numbers(site, "dilations")
    group, auto = site.get("group", 1), site.get("auto_pad", "NOTSET")
    _check_auto_pad(site, auto)
    plain = partial(convolve, strides=strides, padding=0, dilations=dilations, group=group)
    pads = pairs(site)
    if auto == "VALID" or (auto == "NOTSET" and all(pair == (0, 0) for pair in pads)):
        return plain
    if auto == "NOTSET":
        if all(before == after for before, after in pads):
            padding = tuple(before for before, _ in pads)
            return partial(convolve, strides=strides, padding=padding, dilations=dilations, group=group)
        amounts = flat_pads(pads)
        return lambda x, weight, bias=None: plain(F.pad(x, amounts), weight, bias)
    upper = auto == "SAME_UPPER"

    def same(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = x.ndim - 2
        amounts = same_pads(x.shape[2:], weight.shape[2:], spread(strides, n), spread(dilations, n), upper=upper)
        return plain(F.pad(x, flat_pads(amounts)), weight, bias)

    return same


def _bind_conv_transpose(site: Site) -> Function:
    strides, dilations = _numbers(site, "strides"), _numbers(site, "dilations")
    extra, group, auto = site.get("output_padding"), site.get("group", 1), site.get("auto_pad", "NOTSET")
    _check_auto_pad(site, auto)
    pads, wanted = pairs(site), site.get("output_shape")

    def transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = x.ndim - 2
        steps, gaps, more = spread(strides, n), spread(dilations, n), spread(extra or 0, n)
        given = pads or [(0, 0)] * n
        full = [
            (size - 1) * step + (width - 1) * gap + 1 + end
            for size, step, width, gap, end in zip(x.shape[2:], steps, weight.shape[2:], gaps, more, strict=True)
        ]
        target = wanted
        if target is None and auto.startswith("SAME"):
            target = [size * step for size, step in zip(x.shape[2:], steps, strict=True)]
        if target is not None:
            given = [_halves(whole - end, auto) for whole, end in zip(full, target[-n:], strict=True)]
        run = _CONV_TRANSPOSE[weight.ndim]
        if all(before == after and before >= 0 for before, after in given) and all(
            end < max(step, gap) for end, step, gap in zip(more, steps, gaps, strict=True)
        ):
            padding = tuple(before for before, _ in given)
            return run(x, weight, bias, steps, padding, more, group, gaps)
        y = run(x, weight, bias if not any(more) else None, steps, 0, 0, group, gaps)
        cut = [(-before, end - after) for (before, after), end in zip(given, more, strict=True)]
        y = F.pad(y, flat_pads(cut))
        return y if bias is None or not any(more) else y + bias.reshape(-1, *[1] * n)

    return transposed


def _halves(total: int, auto: str) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def pairs(site: Site) -> list[tuple[int, int]]:
    """Give a node's ``pads`` as (before, after) of each axis; empty where it has none."""
    pads = site.get("pads") or []
    half = len(pads) // 2
    return list(zip(pads[:half], pads[half:], strict=True))


def spread(value: tuple[int, ...] | int, n: int) -> tuple[int, ...]:
    """Give one number for each of ``n`` axes."""
    return (value,) * n if isinstance(value, int) else tuple(value)


def _numbers(site: Site, name: str) -> tuple[int, ...] | int:
    return tuple(site.get(name) or ()) or 1


def _check_auto_pad(site: Site, auto: str) -> None:
    if auto not in AUTO_PADS:
        raise site.refuse(f"has auto_pad = {auto!r}; known: {', '.join(AUTO_PADS)}")


_ATTRIBUTES = frozenset(("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"))

TABLE: Mapping[str, Operator] = {
    "Conv": Operator(bind=_bind_conv, attributes=_ATTRIBUTES),
    "ConvTranspose": Operator(bind=_bind_conv_transpose, attributes=_ATTRIBUTES | {"output_padding", "output_shape"}),
}
