"""Reductions along axes, sorting, running sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor

Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(x.sum(axes, keep), count, rounding_mode="trunc").to(x.dtype)


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


_REDUCE: Mapping[str, Reduce] = {
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "ReduceProd": _product,
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: _sum(x, axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
}


def _bind_reduce(site: Site, function: Reduce) -> Function:
    keep, none = bool(site.get("keepdims", 1)), bool(site.get("noop_with_empty_axes", 0))
    fixed = site.get("axes")

    def run(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        chosen = tuple(axes if axes is not None else fixed or ())
        if not chosen:
            if none:
                return function(x.unsqueeze(0), (0,), False)
            chosen = tuple(range(x.ndim))
        return function(x, chosen, keep) if chosen else function(x.reshape(1), (0,), False)

    return run


def _bind_extreme(site: Site, largest: bool) -> Function:
    axis, keep = site.get("axis", 0), bool(site.get("keepdims", 1))
    last = bool(site.get("select_last_index", 0))
    find = torch.argmax if largest else torch.argmin

    def run(x: Tensor) -> Tensor:
        if not last:
            return find(x, axis, keep)
        return x.shape[axis] - 1 - find(x.flip(axis), axis, keep)

    return run


def _bind_top_k(site: Site) -> Function:
    axis, largest = site.get("axis", -1), bool(site.get("largest", 1))
    fixed = site.get("k")

    def run(x: Tensor, k: Any = None) -> tuple[Tensor, Tensor]:
        count = fixed if k is None else k[0] if isinstance(k, tuple) else k
        # Not torch.topk: among equal values ONNX takes the first, as only a stable sort does.
        values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), places.narrow(axis, 0, count)

    return run


def _bind_cumulative(site: Site) -> Function:
    exclusive, reverse = bool(site.get("exclusive", 0)), bool(site.get("reverse", 0))
    fixed = site.get("axis")

    def run(x: Tensor, axis: Any = None) -> Tensor:
        along = fixed if axis is None else axis[0] if isinstance(axis, tuple) else axis
        x = x.flip(along) if reverse else x
        if exclusive:
            first = torch.zeros_like(x.narrow(along, 0, 1))
            x = torch.cat((first, x.narrow(along, 0, x.shape[along] - 1)), along)
        y = torch.cumsum(x, along, dtype=x.dtype)
        return y.flip(along) if reverse else y

    return run


def _bind_trilu(site: Site) -> Function:
    cut = torch.triu if site.get("upper", 1) else torch.tril

    def run(x: Tensor, k: Any = None) -> Tensor:
        return cut(x, 0 if k is None else k[0] if isinstance(k, tuple) else k)

    return run


_AXES = frozenset(("axes", "keepdims", "noop_with_empty_axes"))
_ARG = frozenset(("axis", "keepdims", "select_last_index"))
_CUMULATIVE = frozenset(("axis", "exclusive", "reverse"))

TABLE: Mapping[str, Operator] = {
    **{
        kind: Operator(bind=partial(_bind_reduce, function=function), attributes=_AXES, host=(1,))
        for kind, function in _REDUCE.items()
    },
    "ArgMax": Operator(bind=partial(_bind_extreme, largest=True), attributes=_ARG),
    "ArgMin": Operator(bind=partial(_bind_extreme, largest=False), attributes=_ARG),
    "TopK": Operator(bind=_bind_top_k, attributes=frozenset(("axis", "largest", "sorted", "k")), host=(1,), many=True),
    "CumSum": Operator(bind=_bind_cumulative, attributes=_CUMULATIVE, host=(1,)),
    "Trilu": Operator(bind=_bind_trilu, attributes=frozenset(("upper",)), host=(1,)),
}
