"""Reading and writing at places that tensors name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor, always, plain


def gather(x: Tensor, indices: Any, *, axis: int) -> Tensor:
    """Read along an axis; the shape of ``indices`` takes that axis's place. Negative ones count from the end."""
    if isinstance(indices, int):
        return x.select(axis, indices)
    indices = _from_start(indices, x.shape[axis])
    if x.ndim == 2 and axis in (0, -2):
        return F.embedding(indices, x)
    if indices.ndim == 1:
        return x.index_select(axis, indices)
    at = axis % x.ndim
    found = x.index_select(at, indices.reshape(-1))
    return found.reshape((*x.shape[:at], *indices.shape, *x.shape[at + 1 :]))


def _from_start(indices: Tensor, length: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + length, indices)


def _gather_host(value: Any, index: Any) -> Any:
    return value[index] if isinstance(index, int) else tuple(value[i] for i in index)


def gather_elements(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """Read one value for each index; all other places are those of the index."""
    return torch.gather(x, axis, _from_start(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch: int) -> Tensor:
    """Read slices at the places in the last axis of ``indices``; the first ``batch`` axes are common."""
    indices = indices.to(torch.int64)
    places = tuple(indices.unbind(-1))
    if not batch:
        return x[places]
    common = x.shape[:batch]
    flat = x.reshape(-1, *x.shape[batch:])
    inner = indices.reshape(flat.shape[0], -1, indices.shape[-1])
    rows = torch.arange(flat.shape[0], device=x.device)[:, None]
    found = flat[(rows, *inner.unbind(-1))]
    return found.reshape((*common, *indices.shape[batch:-1], *x.shape[batch + indices.shape[-1] :]))


_SCATTER = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int, reduction: str) -> Tensor:
    """Write one value for each index, or combine it with what is there."""
    indices = _from_start(indices, x.shape[axis])
    updates = updates.to(x.dtype)
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _SCATTER[reduction])


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str) -> Tensor:
    """Write slices at the places in the last axis of ``indices``, or combine them with what is there."""
    depth = indices.shape[-1]
    updates = updates.to(x.dtype)
    if reduction in ("none", "add"):
        places = tuple(indices.to(torch.int64).unbind(-1))
        return x.index_put(places, updates, accumulate=reduction == "add")
    flat_index = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis in range(depth):
        flat_index = flat_index * x.shape[axis] + _from_start(indices[..., axis], x.shape[axis])
    inner = math.prod(x.shape[depth:])
    rows = flat_index.reshape(-1, 1).expand(-1, inner)
    flat = x.reshape(-1, inner).scatter_reduce(0, rows, updates.reshape(-1, inner), _SCATTER[reduction])
    return flat.reshape(x.shape)


def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int) -> Tensor:
    """Give values[1] where the place along a new axis is the index, values[0] elsewhere."""
    count = int(depth[0] if isinstance(depth, tuple) else depth)
    at = axis % (indices.ndim + 1)
    places = torch.arange(count, device=indices.device).reshape(-1, *[1] * (indices.ndim - at))
    return torch.where(_from_start(indices, count).unsqueeze(at) == places, values[1], values[0])


def nonzero(x: Tensor) -> Tensor:
    """Give the places of what is not zero, [rank, count]."""
    return torch.nonzero(x).t()


def _bind_gather(site: Site) -> Function:
    axis, index = site.get("axis", 0), site.constant(1)
    if index is not None and index.ndim == 0:
        place = int(index.item())
        return lambda x, _: x.select(axis, place)
    return partial(gather, axis=axis)


def _bind_scatter(site: Site, function: Function, **more: Any) -> Function:
    reduction = site.get("reduction", "none")
    if reduction != "none" and reduction not in _SCATTER:
        raise site.refuse(f"has reduction = {reduction!r}; known: none, {', '.join(_SCATTER)}")
    return partial(function, reduction=reduction, **more)


def _bind_scatter_elements(site: Site) -> Function:
    return _bind_scatter(site, scatter_elements, axis=site.get("axis", 0))


TABLE: Mapping[str, Operator] = {
    "Gather": Operator(bind=_bind_gather, attributes=frozenset(("axis",)), bind_host=always(_gather_host)),
    "GatherElements": Operator(
        bind=lambda site: partial(gather_elements, axis=site.get("axis", 0)), attributes=frozenset(("axis",))
    ),
    "GatherND": Operator(
        bind=lambda site: partial(gather_nd, batch=site.get("batch_dims", 0)), attributes=frozenset(("batch_dims",))
    ),
    "ScatterElements": Operator(bind=_bind_scatter_elements, attributes=frozenset(("axis", "reduction"))),
    "ScatterND": Operator(bind=partial(_bind_scatter, function=scatter_nd), attributes=frozenset(("reduction",))),
    "OneHot": Operator(
        bind=lambda site: partial(one_hot, axis=site.get("axis", -1)),
        attributes=frozenset(("axis",)),
        host=(1,),
        fixed=(2,),
    ),
    "NonZero": plain(nonzero),
}
