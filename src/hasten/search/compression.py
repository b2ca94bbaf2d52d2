"""What a search learned about compressing a model: the sensitivity table, the predicted front, the training runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One group of channels at one width: what it costs in accuracy, and what it takes in time."""

    group: str
    """The channel group's name (``graph.groups``)."""
    units: int
    """Units kept."""
    size: int
    """Units that the group has."""
    kl: float
    """KL divergence of the outputs from the untouched model's, in nats, when this group alone is cut; finite."""
    metric: float | None
    """The run's metric when this group alone is cut; None: not judged."""
    ns: float | None
    """Predicted time of one run when this group alone is cut; None: not predicted."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One plan of the predicted front."""

    plan: str
    """The trial's key."""
    first_ns: float
    """Its time as the sensitivity table predicted it, before any plan of the front was built."""
    refitted_ns: float | None
    """Its time after the table was refitted to what was measured; None: there was no refit."""
    measured_ns: float | None
    """None: it was not built, or failed."""
    sensitivity: float
    """What the table says it costs in accuracy: the KL divergences of its cells, summed, in nats."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One epoch."""

    number: int
    loss: float
    """Mean training loss."""
    held: float | None
    """Loss on held-out rows; None: none were held out."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training pass of one plan."""

    plan: str
    """The trial's key."""
    step: str
    """The pass's name and its number in the plan: "finetune 2"."""
    epochs: tuple[CurvePoint, ...]
    stopped: str | None
    """Why it ended early; None: it did not."""


@dataclass(frozen=True, kw_only=True)
class Compression:
    """All of it. What a search did not do is empty."""

    cells: tuple[Cell, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    curves: tuple[Curve, ...] = ()
