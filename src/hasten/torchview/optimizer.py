"""The optimizer, its groups of parameters, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

MOMENTUM = 0.9
"""Of SGD, with Nesterov's look ahead."""

STEP_SIZE_SHARE = 0.1
"""Step sizes of a quantized graph learn at a share of the rate: one of them moves every value of a tensor."""


def make_optimizer(
    kind: Literal["adamw", "sgd"],
    parameters: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    weight_decay: float,
    step_sizes: Collection[str] = (),
) -> Any:
    """Make the optimizer of a model's parameters.

    Weight decay is for weights alone: biases, norms and step sizes, whose shape has at most one axis longer than 1,
    would only be pulled off what they mean.

    Args:
        kind: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), or SGD with Nesterov momentum.
        parameters: With their names.
        lr: The peak; ``set_rate`` sets each step's.
        weight_decay: Of weights.
        step_sizes: The names of those that are scales of a quantized graph.
    """
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    scales: list[Tensor] = []
    for name, parameter in parameters:
        if name in step_sizes:
            scales.append(parameter)
        else:
            (decayed if sum(length > 1 for length in parameter.shape) > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "share": 1.0},
        {"params": plain, "weight_decay": 0.0, "share": 1.0},
        {"params": scales, "weight_decay": 0.0, "share": STEP_SIZE_SHARE},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=lr)


def set_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every group, each by its share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]


def rate(step: int, steps: int, *, warm_up: float) -> float:
    """Give the share of the peak learning rate at a step (from 0): a linear warm-up, then half a cosine down to 0.

    Args:
        step: The step about to be made.
        steps: How many there are.
        warm_up: Share of the steps, 0 to 1, that the rate rises in.
    """
    warm = round(steps * warm_up)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def average_into(averaged: dict[str, Tensor], now: dict[str, Tensor], decay: float) -> None:
    """Move a running average of a model's state towards its state now, in place.

    What is not a float (counters) is taken as it is.
    """
    for name, value in now.items():
        if value.is_floating_point():
            averaged[name].lerp_(value, 1 - decay)
        else:
            averaged[name].copy_(value)
