"""Normalizations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from hasten.torchview.operators.operator import Function, Operator, Site, Tensor


def batch_norm(
    training: bool,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    momentum: float,
    epsilon: float,
) -> Tensor:
    """Normalize over all axes but 1: by the running statistics, or while training by the batch's.

    Training also moves the running statistics, in place, by 1 - momentum of ONNX; the variance that they get is the
    unbiased one, as in ``torch.nn.BatchNorm2d``. One value a channel has no variance: the running statistics stay.
    """
    several = x.numel() > x.shape[1]
    return F.batch_norm(x, mean, variance, scale, bias, training and several, 1.0 - momentum, epsilon)


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int, epsilon: float, several: bool
) -> Tensor | tuple[Tensor, ...]:
    """Normalize over the axes from ``axis`` on; with ``several`` give mean and inverse deviation too."""
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        y = F.layer_norm(x, shape, scale, bias, epsilon)
    else:
        y = F.layer_norm(x, shape, None, None, epsilon) * scale
        y = y if bias is None else y + bias
    if not several:
        return y
    axes = tuple(range(axis % x.ndim, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


def rms_norm(x: Tensor, scale: Tensor, *, axis: int, epsilon: float) -> Tensor:
    """Divide by the root of the mean square over the axes from ``axis`` on."""
    if scale.shape == x.shape[axis:]:
        return F.rms_norm(x, scale.shape, scale, epsilon)
    return F.rms_norm(x, x.shape[axis:], None, epsilon) * scale


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Normalize over the axes from 2 on."""
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


def group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, groups: int, epsilon: float) -> Tensor:
    """Normalize groups of channels; scale and bias by channel, or by group before opset 21."""
    channels = x.shape[1]
    if scale.shape[0] != channels:
        scale, bias = (v.repeat_interleave(channels // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, epsilon)


def lp_norm(x: Tensor, *, axis: int, p: int) -> Tensor:
    """Divide by the p-norm along an axis; where it is 0, give 0."""
    size = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(size == 0, 0.0, x / torch.where(size == 0, 1.0, size))


def local_response(x: Tensor, *, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """Divide by (bias + alpha / size * sum of squares of ``size`` channels around) ** beta."""
    before = (size - 1) // 2
    squares = (x * x).reshape(x.shape[0], 1, x.shape[1], -1)
    padded = F.pad(squares, (0, 0, before, size - 1 - before))
    around = F.avg_pool2d(padded, (size, 1), 1).reshape(x.shape)
    return x / torch.pow(bias + alpha * around, beta)


def mean_variance(x: Tensor, *, axes: tuple[int, ...]) -> Tensor:
    """Give (x - mean) / (deviation + 1e-9) over some axes."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


def _bind_batch_norm(site: Site) -> Function:
    if site.get("training_mode", 0) or any(site.wants(i) for i in range(1, len(site.node.output))):
        raise site.refuse("gives running statistics as outputs; export the model in evaluation mode")
    return partial(batch_norm, momentum=site.get("momentum", 0.9), epsilon=site.get("epsilon", 1e-5))


def _bind_layer_norm(site: Site) -> Function:
    several = site.wants(1) or site.wants(2)
    axis, epsilon = site.get("axis", -1), site.get("epsilon", 1e-5)
    if several:
        return partial(layer_norm, axis=axis, epsilon=epsilon, several=True)
    return lambda x, scale, bias=None: (layer_norm(x, scale, bias, axis=axis, epsilon=epsilon, several=False),)


def _bind_rms_norm(site: Site) -> Function:
    return partial(rms_norm, axis=site.get("axis", -1), epsilon=site.get("epsilon", 1e-5))


def _bind_instance_norm(site: Site) -> Function:
    return partial(instance_norm, epsilon=site.get("epsilon", 1e-5))


def _bind_group_norm(site: Site) -> Function:
    return partial(group_norm, groups=site.get("num_groups"), epsilon=site.get("epsilon", 1e-5))


def _bind_lp_norm(site: Site) -> Function:
    return partial(lp_norm, axis=site.get("axis", -1), p=site.get("p", 2))


def _bind_local_response(site: Site) -> Function:
    return partial(
        local_response,
        size=site.get("size"),
        alpha=site.get("alpha", 1e-4),
        beta=site.get("beta", 0.75),
        bias=site.get("bias", 1.0),
    )


def _bind_mean_variance(site: Site) -> Function:
    return partial(mean_variance, axes=tuple(site.get("axes", (0, 2, 3))))


TABLE: Mapping[str, Operator] = {
    "BatchNormalization": Operator(
        bind=_bind_batch_norm, attributes=frozenset(("epsilon", "momentum", "training_mode")), first="training"
    ),
    "LayerNormalization": Operator(
        bind=_bind_layer_norm, attributes=frozenset(("axis", "epsilon", "stash_type")), many=True
    ),
    "RMSNormalization": Operator(bind=_bind_rms_norm, attributes=frozenset(("axis", "epsilon", "stash_type"))),
    "InstanceNormalization": Operator(bind=_bind_instance_norm, attributes=frozenset(("epsilon",))),
    "GroupNormalization": Operator(
        bind=_bind_group_norm, attributes=frozenset(("num_groups", "epsilon", "stash_type"))
    ),
    "LpNormalization": Operator(bind=_bind_lp_norm, attributes=frozenset(("axis", "p"))),
    "LRN": Operator(bind=_bind_local_response, attributes=frozenset(("size", "alpha", "beta", "bias"))),
    "MeanVarianceNormalization": Operator(bind=_bind_mean_variance, attributes=frozenset(("axes",))),
}
