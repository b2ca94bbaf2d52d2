"""Activations, softmax, dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor, plain, with_attributes


def hard_sigmoid(x: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Give max(0, min(1, alpha * x + beta))."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def selu(x: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Give gamma * (x if x > 0 else alpha * (exp(x) - 1))."""
    return gamma * F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float) -> Tensor:
    """Give max(0, x) + min(0, alpha * (exp(x / alpha) - 1))."""
    return F.celu(x, alpha)


def thresholded_relu(x: Tensor, *, alpha: float) -> Tensor:
    """Give x where it is above alpha, else 0."""
    return torch.where(x > alpha, x, 0.0)


def shrink(x: Tensor, *, bias: float, lambd: float) -> Tensor:
    """Give x + bias below -lambd, x - bias above lambd, else 0."""
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0.0))


def swish(x: Tensor, *, alpha: float) -> Tensor:
    """Give x * sigmoid(alpha * x)."""
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Give x where it is positive, else slope * x; the slope broadcasts to x."""
    if x.ndim > 1 and slope.ndim == x.ndim - 1 and slope.shape[0] in (1, x.shape[1]) and slope[0].numel() == 1:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x >= 0, x, slope * x)


def clip(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Keep x within bounds; the high one wins where they cross."""
    if low is None and high is None:
        return x
    if x.is_floating_point() and low is not None and high is not None and low <= high:
        return F.hardtanh(x, low, high)  # one kernel backwards, where clamp has four
    return torch.clamp(x, low, high)


def dropout(training: bool, x: Tensor, ratio: float | None = None, mode: bool | None = None, *, p: float) -> Tensor:
    """Drop values at random and scale the rest, while training."""
    return F.dropout(x, p if ratio is None else ratio) if training else x


def _bind_leaky_relu(site: Site) -> Function:
    return partial(F.leaky_relu, negative_slope=site.get("alpha", 0.01))


def _bind_elu(site: Site) -> Function:
    return partial(F.elu, alpha=site.get("alpha", 1.0))


def _bind_gelu(site: Site) -> Function:
    return partial(F.gelu, approximate=site.get("approximate", "none"))


def _bind_clip(site: Site) -> Function:
    if site.opset >= 11:
        return clip
    low, high = site.get("min"), site.get("max")
    return lambda x: clip(x, low, high)


def _bind_softmax(site: Site, function: Function) -> Function:
    if site.opset >= 13:
        return partial(function, dim=site.get("axis", -1))
    axis = site.get("axis", 1)

    def flattened(x: Tensor) -> Tensor:
        at = axis % x.ndim if x.ndim else 0
        rows = x.reshape(math.prod(x.shape[:at]), -1)
        return function(rows, dim=1).reshape(x.shape)

    return flattened


def _hardmax(x: Tensor, dim: int) -> Tensor:
    return torch.zeros_like(x).scatter(dim, x.argmax(dim, keepdim=True), 1.0)


def _bind_dropout(site: Site) -> Function:
    if site.wants(1):
        raise site.refuse("gives its mask, which the view does not make")
    return partial(dropout, p=site.get("ratio", 0.5))


TABLE: Mapping[str, Operator] = {
    "Relu": plain(torch.relu),
    "Sigmoid": plain(torch.sigmoid),
    "Tanh": plain(torch.tanh),
    "HardSwish": plain(F.hardswish),
    "Softplus": plain(F.softplus),
    "Softsign": plain(F.softsign),
    "Mish": plain(F.mish),
    "PRelu": plain(prelu),
    "LeakyRelu": Operator(bind=_bind_leaky_relu, attributes=frozenset(("alpha",))),
    "Elu": Operator(bind=_bind_elu, attributes=frozenset(("alpha",))),
    "Gelu": Operator(bind=_bind_gelu, attributes=frozenset(("approximate",))),
    "Celu": with_attributes(celu, {"alpha": 1.0}),
    "Selu": with_attributes(selu, {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}),
    "HardSigmoid": with_attributes(hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
    "ThresholdedRelu": with_attributes(thresholded_relu, {"alpha": 1.0}),
    "Shrink": with_attributes(shrink, {"bias": 0.0, "lambd": 0.5}),
    "Swish": with_attributes(swish, {"alpha": 1.0}),
    "Clip": Operator(bind=_bind_clip, attributes=frozenset(("min", "max")), host=(1, 2), fixed=(1, 2)),
    "Softmax": Operator(bind=partial(_bind_softmax, function=torch.softmax), attributes=frozenset(("axis",))),
    "LogSoftmax": Operator(bind=partial(_bind_softmax, function=torch.log_softmax), attributes=frozenset(("axis",))),
    "Hardmax": Operator(bind=partial(_bind_softmax, function=_hardmax), attributes=frozenset(("axis",))),
    "Dropout": Operator(
        bind=_bind_dropout, attributes=frozenset(("ratio", "seed")), host=(1, 2), fixed=(1,), first="training"
    ),
}
