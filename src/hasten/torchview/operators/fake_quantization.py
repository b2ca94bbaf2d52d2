"""Rounding to steps that lets gradients through, and step sizes that learn.

S. K. Esser et al., "Learned Step Size Quantization" (LSQ), ICLR 2020, arXiv:1902.08153; the straight-through gradient
of rounding is from Y. Bengio et al., arXiv:1308.3432.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hasten.torchview.operators.operator import Tensor

LEAST_SHARE = 1e-6
"""A scale stays above this share of what it was at first, whatever the training does: it must not cross zero."""

Settings = tuple[int, int, int, int | None]
"""Zero point (where it is one for all), lowest and highest integer, axis of the scales."""


def step_size(share: Tensor, start: Tensor) -> Tensor:
    """Give a scale: what it was at the start times the share of it that it is now."""
    return torch.clamp_min(share, LEAST_SHARE) * start


def along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Give a vector the shape in which it broadcasts over x from ``axis``; a lone number any."""
    if scale.ndim == 0 or axis is None or scale.numel() == 1:
        return scale.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return scale.reshape(shape)


class _FakeQuantize(torch.autograd.Function):  # type: ignore[misc]
    """Quantize and dequantize as ONNX does; the gradients are LSQ's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        share: Tensor,
        start: Tensor,
        zero_point: Any,
        low: int,
        high: int,
        axis: int | None,
        values: int,
    ) -> Tensor:
        scale = along(step_size(share, start), x, axis)
        zero = zero_point if isinstance(zero_point, int) else along(zero_point.to(scale.dtype), x, axis)
        # float32 even under autocast: in bfloat16 the quotient would have the 8 bits that are to be rounded to.
        ratio = (x.to(scale.dtype) if x.dtype in (torch.bfloat16, torch.float16) else x) / scale
        level = torch.round(ratio).add_(zero).clamp_(low, high).sub_(zero)
        ctx.save_for_backward(ratio, level, start)
        ctx.settings = (x.dtype, share.shape, axis, 1.0 / math.sqrt(max(values, 1) * max(high, 1)))
        return level * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        ratio, level, start = ctx.saved_tensors
        dtype, shape, axis, factor = ctx.settings
        inside = torch.round(ratio) == level
        for_x = torch.where(inside, gradient, 0.0).to(dtype) if ctx.needs_input_grad[0] else None
        for_share = None
        if ctx.needs_input_grad[1]:
            slope = gradient * torch.where(inside, level - ratio, level)
            if math.prod(shape) == 1:
                total = slope.sum().reshape(shape)
            else:
                total = slope.sum([i for i in range(slope.ndim) if i != axis % slope.ndim])
            # By LSQ's factor; and by the start, so that a step of SGD moves the scale as if it were the parameter.
            for_share = total * factor / start.reshape(shape)
        return for_x, for_share, None, None, None, None, None, None


def fake_quantize_weight(
    weight: Tensor, share: Tensor, start: Tensor, zero_points: Tensor | None = None, *, settings: Settings
) -> Tensor:
    """Round weights to multiples of their learned scales; N in LSQ's factor is the weights of one scale."""
    zero, low, high, axis = settings
    zero_point = zero if zero_points is None else zero_points
    values = weight.numel() // share.numel()
    return _FakeQuantize.apply(weight, share, start, zero_point, low, high, axis, values)


def fake_quantize(
    x: Tensor, share: Tensor, start: Tensor, zero_points: Tensor | None = None, *, settings: Settings
) -> Tensor:
    """Round activations to multiples of a learned scale; N in LSQ's factor is the features of one sample."""
    zero, low, high, axis = settings
    zero_point = zero if zero_points is None else zero_points
    values = x.numel() // (x.shape[0] if x.ndim > 1 else 1) if x.numel() else 1
    return _FakeQuantize.apply(x, share, start, zero_point, low, high, axis, values)


def fake_quantize_bias(
    bias: Tensor, input_share: Tensor, input_start: Tensor, weight_share: Tensor, weight_start: Tensor, *, limit: int
) -> Tensor:
    """Round a bias to multiples of input scale times weight scale; the gradient goes to the bias alone."""
    with torch.no_grad():
        scale = bias_scale(step_size(input_share, input_start), step_size(weight_share, weight_start), bias.shape[0])
    return round_to(bias, scale, limit=limit)


def bias_scale(input_scale: Tensor, weight_scale: Tensor, count: int) -> Tensor:
    """Give the scale of each of ``count`` biases.

    A grouped ConvTranspose has more biases than weight scales: the channels of all groups share those of one.
    """
    product = input_scale.reshape(()) * weight_scale.reshape(-1)
    return product.repeat(count // product.shape[0])


def round_to(x: Tensor, scale: Tensor, *, limit: int) -> Tensor:
    """Round to multiples of a fixed scale, straight through."""
    return torch.clamp(round_straight(x / scale), -limit, limit) * scale


def fake_quantize_by(x: Tensor, scale: Tensor, zero_points: Tensor | None = None, *, settings: Settings) -> Tensor:
    """Round to multiples of a scale that does not learn."""
    return dequantize_by(quantize_by(x, scale, zero_points, settings=settings), scale, zero_points, settings=settings)


class _StepSize(torch.autograd.Function):  # type: ignore[misc]
    """A learned scale by itself, with the gradient that ``_FakeQuantize`` would give its share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, start: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(start)
        ctx.factor = factor
        return step_size(share, start)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (start,) = ctx.saved_tensors
        return gradients[0] * ctx.factor / start, None, None


def quantize(
    x: Tensor, share: Tensor, start: Tensor, zero_points: Tensor | None = None, *, settings: Settings
) -> Tensor:
    """Give the integers that stand for x, as floats, straight through."""
    zero, low, high, axis = settings
    scale = _StepSize.apply(share, start, _factor(x, high))
    return quantize_by(x, scale, zero_points, settings=(zero, low, high, axis))


def quantize_by(x: Tensor, scale: Tensor, zero_points: Tensor | None = None, *, settings: Settings) -> Tensor:
    """Give the integers that stand for x, as floats, where the scale is computed in the graph."""
    zero, low, high, axis = settings
    zeros = zero if zero_points is None else along(zero_points.to(scale.dtype), x, axis)
    return torch.clamp(round_straight(x / along(scale, x, axis)) + zeros, low, high)


def dequantize(
    levels: Tensor, share: Tensor, start: Tensor, zero_points: Tensor | None = None, *, settings: Settings
) -> Tensor:
    """Give what integers (or floats that are whole numbers) stand for."""
    return dequantize_by(
        levels, _StepSize.apply(share, start, _factor(levels, settings[2])), zero_points, settings=settings
    )


def dequantize_by(levels: Tensor, scale: Tensor, zero_points: Tensor | None = None, *, settings: Settings) -> Tensor:
    """Give what integers stand for, where the scale is computed in the graph."""
    zero, _, _, axis = settings
    zeros = zero if zero_points is None else along(zero_points.to(scale.dtype), levels, axis)
    return (levels.to(scale.dtype) - zeros) * along(scale, levels, axis)


def _factor(x: Tensor, high: int) -> float:
    values = x.numel() // (x.shape[0] if x.ndim > 1 else 1) if x.numel() else 1
    return 1.0 / math.sqrt(values * max(high, 1))


class _Straight(torch.autograd.Function):  # type: ignore[misc]
    """Round, with the gradient of doing nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


def round_straight(x: Tensor) -> Tensor:
    """Round half to even, straight through."""
    return _Straight.apply(x)
