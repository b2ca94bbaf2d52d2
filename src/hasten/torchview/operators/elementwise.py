"""Arithmetic, comparisons, logic and casts: one value from those at the same place."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from hasten.torchview.operators.operator import TORCH_DTYPES, Function, Operator, Site, Tensor, plain

Host = Any
"""A Python number, or a tuple of them: a shape, or a part of one."""


def _over(function: Callable[..., Any]) -> Callable[..., Host]:
    """Let a function of numbers take tuples too, with broadcasting."""

    def apply(*values: Host) -> Host:
        lengths = [len(value) for value in values if isinstance(value, tuple)]
        if not lengths:
            return function(*values)
        length = max(lengths) if min(lengths) else 0
        spread = [v if isinstance(v, tuple) and len(v) == length else _repeated(v, length) for v in values]
        return tuple(function(*items) for items in zip(*spread, strict=True))

    return apply


def _repeated(value: Host, length: int) -> tuple[Any, ...]:
    return (value[0] if isinstance(value, tuple) and length else value,) * length


def divide(a: Any, b: Any) -> Any:
    """Divide; integers towards zero."""
    tensor = a if isinstance(a, torch.Tensor) else b
    if tensor.is_floating_point():
        return a / b
    return torch.div(torch.as_tensor(a, device=tensor.device), b, rounding_mode="trunc").to(tensor.dtype)


def _divide_numbers(a: Any, b: Any) -> Any:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    whole = abs(a) // abs(b)
    return whole if (a >= 0) == (b >= 0) else -whole


def power(base: Any, exponent: Any) -> Tensor:
    """Raise to a power; the result has the dtype of the base."""
    if isinstance(exponent, float | int):
        if exponent == 2:
            return base * base
        if exponent == 0.5:
            return torch.sqrt(base)
    if isinstance(base, torch.Tensor):
        return torch.pow(base, exponent).to(base.dtype)
    if isinstance(base, float) and not exponent.is_floating_point():
        exponent = exponent.to(torch.float32)
    return torch.pow(base, exponent)


def where(condition: Tensor, a: Any, b: Any) -> Tensor:
    """Choose by a condition."""
    return torch.where(condition, a, b)


def maximum(*inputs: Any) -> Any:
    """Give the largest of all inputs, with broadcasting."""
    return reduce(_extreme(torch.maximum), inputs)


def minimum(*inputs: Any) -> Any:
    """Give the smallest of all inputs, with broadcasting."""
    return reduce(_extreme(torch.minimum), inputs)


def _extreme(function: Function) -> Function:
    def pair(a: Any, b: Any) -> Tensor:
        like = a if isinstance(a, torch.Tensor) else b
        a, b = (v if isinstance(v, torch.Tensor) else torch.full_like(like, v) for v in (a, b))
        return function(a, b)

    return pair


def mean(*inputs: Tensor) -> Tensor:
    """Give the mean of all inputs, with broadcasting."""
    return reduce(operator.add, inputs) / len(inputs)


def add_all(*inputs: Tensor) -> Tensor:
    """Give the sum of all inputs, with broadcasting."""
    return reduce(operator.add, inputs)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Change the dtype; floats to integers towards zero."""
    return x if x.dtype is dtype else x.to(dtype)


def _cast_host(value: Host, dtype: torch.dtype) -> Host:
    kind = float if dtype.is_floating_point else bool if dtype is torch.bool else _whole
    return _over(kind)(value)


def _whole(value: Any) -> int:
    """Give a number of shape arithmetic as an integer, rounded to float32 before, as it would be: 30 * 0.7 are 21."""
    return int(np.float32(value)) if isinstance(value, float) else int(value)


def _bind_cast(site: Site) -> Function:
    return partial(cast, dtype=_dtype(site))


def _bind_cast_host(site: Site) -> Function:
    return partial(_cast_host, dtype=_dtype(site))


def _dtype(site: Site) -> torch.dtype:
    found = TORCH_DTYPES.get(site.get("to"))
    if found is None:
        raise site.refuse(f"casts to element type {site.get('to')}, which PyTorch cannot compute with")
    return found


def _cast_like(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _bind_mod(site: Site) -> Function:
    run: Function = torch.fmod if site.get("fmod", 0) else torch.remainder
    return run


def _bind_shift(site: Site) -> Function:
    run: Function = torch.bitwise_left_shift if site.get("direction") == "LEFT" else torch.bitwise_right_shift
    return run


def _bind_is_inf(site: Site) -> Function:
    down, up = bool(site.get("detect_negative", 1)), bool(site.get("detect_positive", 1))

    def is_inf(x: Tensor) -> Tensor:
        return (torch.isposinf(x) & up) | (torch.isneginf(x) & down)

    return is_inf


def _numbers(function: Callable[..., Any]) -> Operator:
    return plain(function, scalars=True, host=_over(function))


_UNARY: dict[str, Function] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Tan": torch.tan,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Mean": mean,
    "Sum": add_all,
}

TABLE: Mapping[str, Operator] = {
    **{kind: plain(function) for kind, function in _UNARY.items()},
    "Add": _numbers(operator.add),
    "Sub": _numbers(operator.sub),
    "Mul": _numbers(operator.mul),
    "Div": plain(divide, scalars=True, host=_over(_divide_numbers)),
    "Pow": Operator(bind=lambda site: power, scalars=True, fixed=(1,)),
    "Mod": Operator(bind=_bind_mod, attributes=frozenset(("fmod",))),
    "Neg": plain(torch.neg, host=_over(operator.neg)),
    "Sqrt": plain(torch.sqrt, host=_over(math.sqrt)),
    "Max": plain(maximum, host=_over(max)),
    "Min": plain(minimum, host=_over(min)),
    "Not": plain(torch.logical_not, host=_over(operator.not_)),
    "Equal": _numbers(operator.eq),
    "Greater": _numbers(operator.gt),
    "GreaterOrEqual": _numbers(operator.ge),
    "Less": _numbers(operator.lt),
    "LessOrEqual": _numbers(operator.le),
    "Where": plain(where, host=_over(lambda condition, a, b: a if condition else b)),
    "IsInf": Operator(bind=_bind_is_inf, attributes=frozenset(("detect_negative", "detect_positive"))),
    "BitShift": Operator(bind=_bind_shift, attributes=frozenset(("direction",))),
    "Cast": Operator(
        bind=_bind_cast, bind_host=_bind_cast_host, attributes=frozenset(("to", "saturate", "round_mode"))
    ),
    "CastLike": Operator(bind=lambda site: _cast_like, attributes=frozenset(("saturate", "round_mode"))),
}
