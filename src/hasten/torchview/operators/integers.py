"""What dynamically quantized graphs compute with: integers, which the view carries as floats that are whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hasten.torchview.operators.convolution import TABLE as CONVOLUTIONS
from hasten.torchview.operators.fake_quantization import round_straight
from hasten.torchview.operators.operator import Function, Operator, Site, Tensor, plain

SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)
"""Of a tensor that is all zeros."""


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give levels 0 to 255, their scale and zero point, from the range of x; gradients go straight through."""
    with torch.no_grad():
        low, high = x.amin().clamp_max(0.0), x.amax().clamp_min(0.0)
        scale = ((high - low) / 255.0).clamp_min(SMALLEST_SCALE)
        zero = torch.round(torch.clamp(-low / scale, 0.0, 255.0))
    return torch.clamp(round_straight(x / scale) + zero, 0.0, 255.0), scale, zero


def _centred(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    x = x if x.is_floating_point() else x.to(torch.float32)
    if zero is None:
        return x
    zero = zero.to(x.dtype)
    if zero.numel() == 1:
        return x - zero.reshape(())
    return x - zero.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Multiply matrices of integers, each less its zero point (a's by row, b's by column)."""
    return _centred(a, a_zero, -2) @ _centred(b, b_zero, -1)


def _bind_conv_integer(site: Site) -> Function:
    convolve = CONVOLUTIONS["Conv"].bind(site)

    def run(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
        return convolve(_centred(x, x_zero, 1), _centred(w, w_zero, 0))

    return run


TABLE: Mapping[str, Operator] = {
    "DynamicQuantizeLinear": Operator(bind=lambda site: dynamic_quantize, many=True),
    "MatMulInteger": plain(matmul_integer),
    "ConvInteger": Operator(bind=_bind_conv_integer, attributes=CONVOLUTIONS["Conv"].attributes),
}
