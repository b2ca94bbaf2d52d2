"""The settings that everything that trains has: declared once, read without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from hasten.settings import Choice, Doc

HALF_PRECISION = frozenset({"float16", "bfloat16"})
"""Traits of models that are not trained: small steps vanish in their weights."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How steps are taken. How many there are is each trainer's own setting."""

    batch: Annotated[int, Doc("samples a step"), Meta(ge=1)] = 64
    lr: Annotated[float, Doc("learning rate at its peak"), Meta(gt=0), Choice((1e-4, 3e-4, 1e-3))] = 1e-3
    optimizer: Annotated[Literal["adamw", "sgd"], Doc("adamw, or sgd with Nesterov momentum 0.9")] = "adamw"
    weight_decay: Annotated[float, Doc("of weights; norms, biases and scales have none"), Meta(ge=0)] = 0.0
    warm_up: Annotated[
        float, Doc("share of the steps in which the rate rises; then it falls to 0"), Meta(ge=0, le=1)
    ] = 0.1
    clip: Annotated[Annotated[float, Meta(gt=0)] | None, Doc("largest norm of the gradient; none: any")] = 5.0
    temperature: Annotated[
        float, Doc("softness of the teacher's classes in the distillation"), Meta(gt=0), Choice((1.0, 2.0, 4.0))
    ] = 2.0
    alpha: Annotated[
        float,
        Doc("the teacher's share of the loss; the rest is the labels'"),
        Meta(ge=0, le=1),
        Choice((0.5, 0.9, 1.0)),
    ] = 0.9
    loss: Annotated[
        Literal["auto", "cross-entropy", "mse"], Doc("auto: cross-entropy where outputs are classes, else mse")
    ] = "auto"
    augment: Annotated[
        Literal["none", "mirror-shift"], Doc("change images as they are drawn: mirror and shift by up to an eighth")
    ] = "none"
    average: Annotated[
        float, Doc("decay of a running average of the parameters, which is kept; 0: none"), Meta(ge=0, lt=1)
    ] = 0.0
    patience: Annotated[
        Annotated[int, Meta(ge=1)] | None, Doc("epochs without gain on held-out rows, then it ends; none: never")
    ] = None
    precision: Annotated[Literal["float32", "bfloat16"], Doc("bfloat16: mixed precision by autocast")] = "float32"
    device: Annotated[str, Doc("where PyTorch computes: cpu, cuda, cuda:1, ...")] = "cpu"
    threads: Annotated[Annotated[int, Meta(ge=1)] | None, Doc("processor threads; none: as PyTorch is set")] = None
