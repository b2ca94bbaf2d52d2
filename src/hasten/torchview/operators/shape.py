"""Operators that move values without changing them, and shape arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from onnx import helper, numpy_helper

from hasten.torchview.operators.operator import TORCH_DTYPES, Function, Operator, Site, Tensor, always, plain

Host = Any
"""A Python number, or a tuple of them."""


def identity(x: Any) -> Any:
    """Give back what came."""
    return x


def reshape(x: Tensor, shape: Sequence[int], *, allow_zero: bool) -> Tensor:
    """Give x another shape; 0 keeps a length (unless ``allow_zero``), -1 takes what is left."""
    if not allow_zero and 0 in shape:
        shape = [x.shape[i] if length == 0 else length for i, length in enumerate(shape)]
    return x.reshape(shape)


def flatten(x: Tensor, *, axis: int) -> Tensor:
    """Make two axes of all: those before ``axis``, and the others."""
    at = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast x with a shape, both ways."""
    shape = (1,) * (x.ndim - len(shape)) + tuple(shape)
    own = (1,) * (len(shape) - x.ndim) + tuple(x.shape)
    return x.expand([mine if length == 1 else length for mine, length in zip(own, shape, strict=True)])


def squeeze(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Drop axes of length 1, all or those named."""
    return torch.squeeze(x) if axes is None else torch.squeeze(x, tuple(axes))


def unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Insert axes of length 1; ``axes`` are places in the result."""
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def slice_(
    x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None, steps: Any = None
) -> Tensor:
    """Cut along axes, as Python slices do; negative steps too."""
    picks = [slice(None)] * x.ndim
    turned = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = (axes[i] if axes is not None else i) % x.ndim
        step = steps[i] if steps is not None else 1
        if step > 0:
            picks[axis] = slice(start, end, step)
            continue
        places = range(x.shape[axis])[_backwards(start, end, step, x.shape[axis])]
        turned.append(axis)
        picks[axis] = slice(places[-1], places[0] + 1, -step) if len(places) else slice(0, 0)
    y = x[tuple(picks)]
    return y.flip(turned) if turned else y


def _backwards(start: int, end: int, step: int, length: int) -> slice:
    """Give a Python slice with ONNX's bounds: starts are clamped, an end before the first place is none at all."""
    start = max(0, min(start + length if start < 0 else start, length - 1))
    end = end + length if end < 0 else end
    return slice(start, end if end >= 0 else None, step)


def split(x: Tensor, sizes: Sequence[int] | None = None, *, axis: int, parts: int) -> tuple[Tensor, ...]:
    """Cut into pieces of given sizes, or into equal ones of which the last may be smaller."""
    pieces = -(-x.shape[axis] // parts) if sizes is None else list(sizes)
    found: tuple[Tensor, ...] = torch.split(x, pieces, axis)
    return found


def tile(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Repeat along each axis."""
    return x.repeat(*repeats) if x.ndim else x


def range_(device: torch.device, start: Host, end: Host, step: Host, *, dtype: torch.dtype) -> Tensor:
    """Give start, start + step, ... up to end."""
    return torch.arange(start, end, step, dtype=dtype, device=device)


def full(device: torch.device, shape: Sequence[int], *, value: float | int | bool, dtype: torch.dtype) -> Tensor:
    """Give a tensor of one value."""
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


def eye_like(x: Tensor, *, k: int, dtype: torch.dtype | None) -> Tensor:
    """Give ones on diagonal ``k`` of a matrix of x's shape."""
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return (columns[None, :] - rows[:, None] == k).to(dtype or x.dtype)


def depth_to_space(x: Tensor, *, block: int, mode: str) -> Tensor:
    """Move channels into blocks of height and width."""
    if mode == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


def space_to_depth(x: Tensor, *, block: int) -> Tensor:
    """Move blocks of height and width into channels."""
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * block**2, h // block, w // block)


def _bind_reshape(site: Site) -> Function:
    return partial(reshape, allow_zero=bool(site.get("allowzero", 0)))


def _reshape_host(value: Host, shape: Sequence[int]) -> Host:
    """Between a number and a tuple of one."""
    if len(shape) == 0:
        return value[0] if isinstance(value, tuple) else value
    return value if isinstance(value, tuple) else (value,)


def _bind_transpose(site: Site) -> Function:
    perm = site.get("perm")
    if perm is None:
        return lambda x: x.permute(*reversed(range(x.ndim)))
    return partial(torch.permute, dims=tuple(perm))


def _bind_axes(site: Site, function: Function) -> Function:
    """Bind Squeeze or Unsqueeze, whose axes are an input from opset 13 on."""
    axes = site.get("axes")
    return function if axes is None else (lambda x: function(x, axes))


def _squeeze_host(value: Host, axes: Sequence[int] | None = None) -> Host:
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _unsqueeze_host(value: Host, axes: Sequence[int] | None = None) -> Host:
    return value if isinstance(value, tuple) else (value,)


def _bind_slice(site: Site) -> Function:
    starts, ends, axes = site.get("starts"), site.get("ends"), site.get("axes")
    return slice_ if starts is None else (lambda x: slice_(x, starts, ends, axes))


def _bind_slice_host(site: Site) -> Function:
    fixed = [site.get(name) for name in ("starts", "ends")]

    def cut(value: Host, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Host:
        begin, end = (given if given is not None else known for given, known in zip((starts, ends), fixed, strict=True))
        step = steps[0] if steps is not None else 1
        return value[slice(begin[0], end[0], step) if step > 0 else _backwards(begin[0], end[0], step, len(value))]

    return cut


def _concat(*inputs: Tensor, axis: int) -> Tensor:
    return torch.cat(inputs, axis)


def _bind_concat(site: Site) -> Function:
    return partial(_concat, axis=site.get("axis"))


def _concat_host(*inputs: Host) -> Host:
    return tuple(item for value in inputs for item in value)


def _bind_split(site: Site) -> Function:
    axis, parts, sizes = site.get("axis", 0), len(site.node.output), site.get("split")
    if sizes is None:
        return partial(split, axis=axis, parts=parts)
    return lambda x: split(x, sizes, axis=axis, parts=parts)


def _bind_shape(site: Site) -> Function:
    start, end = site.get("start", 0), site.get("end")
    if start == 0 and end is None:
        return lambda x: tuple(x.shape)
    return lambda x: tuple(x.shape)[start:end]


def _bind_range(site: Site) -> Function:
    for i in range(3):
        if (value := site.constant(i)) is not None:
            return partial(range_, dtype=TORCH_DTYPES[_element_type(value)])
    return partial(range_, dtype=torch.int64)


def _bind_full(site: Site) -> Function:
    given = site.get("value")
    if given is None:
        return partial(full, value=0.0, dtype=torch.float32)
    value = _array(given)
    return partial(full, value=value.reshape(-1)[0].item(), dtype=TORCH_DTYPES[given.data_type])


def _bind_full_host(site: Site) -> Function:
    given = site.get("value")
    value = 0.0 if given is None else _array(given).reshape(-1)[0].item()
    return lambda shape: (value,) * shape[0] if shape else value


def _array(tensor: Any) -> np.ndarray[Any, Any]:
    return np.asarray(numpy_helper.to_array(tensor))


def _element_type(value: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(value.dtype))


def _bind_eye_like(site: Site) -> Function:
    kind = site.get("dtype")
    return partial(eye_like, k=site.get("k", 0), dtype=None if kind is None else TORCH_DTYPES[kind])


def _bind_depth_to_space(site: Site) -> Function:
    return partial(depth_to_space, block=site.get("blocksize"), mode=site.get("mode", "DCR"))


def _bind_space_to_depth(site: Site) -> Function:
    return partial(space_to_depth, block=site.get("blocksize"))


TABLE: Mapping[str, Operator] = {
    "Identity": plain(identity, host=identity),
    "Shape": Operator(bind=_bind_shape, attributes=frozenset(("start", "end")), gives_host=True),
    "Size": Operator(bind=lambda site: torch.numel, gives_host=True),
    "Reshape": Operator(
        bind=_bind_reshape, attributes=frozenset(("allowzero",)), host=(1,), bind_host=always(_reshape_host)
    ),
    "Flatten": Operator(bind=lambda site: partial(flatten, axis=site.get("axis", 1)), attributes=frozenset(("axis",))),
    "Transpose": Operator(bind=_bind_transpose, attributes=frozenset(("perm",))),
    "Squeeze": Operator(
        bind=partial(_bind_axes, function=squeeze),
        attributes=frozenset(("axes",)),
        host=(1,),
        bind_host=always(_squeeze_host),
    ),
    "Unsqueeze": Operator(
        bind=partial(_bind_axes, function=unsqueeze),
        attributes=frozenset(("axes",)),
        host=(1,),
        bind_host=always(_unsqueeze_host),
    ),
    "Expand": Operator(bind=lambda site: expand, host=(1,)),
    "Tile": Operator(bind=lambda site: tile, host=(1,)),
    "Slice": Operator(
        bind=_bind_slice,
        bind_host=_bind_slice_host,
        attributes=frozenset(("starts", "ends", "axes")),
        host=(1, 2, 3, 4),
    ),
    "Split": Operator(bind=_bind_split, attributes=frozenset(("axis", "split", "num_outputs")), host=(1,), many=True),
    "Concat": Operator(bind=_bind_concat, attributes=frozenset(("axis",)), bind_host=always(_concat_host)),
    "Range": Operator(bind=_bind_range, host=(-1,), first="device"),
    "ConstantOfShape": Operator(
        bind=_bind_full,
        bind_host=_bind_full_host,
        attributes=frozenset(("value",)),
        host=(0,),
        first="device",
    ),
    "EyeLike": Operator(bind=_bind_eye_like, attributes=frozenset(("dtype", "k"))),
    "DepthToSpace": Operator(bind=_bind_depth_to_space, attributes=frozenset(("blocksize", "mode"))),
    "SpaceToDepth": Operator(bind=_bind_space_to_depth, attributes=frozenset(("blocksize",))),
}
