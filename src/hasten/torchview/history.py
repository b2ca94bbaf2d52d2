"""How a training went: a plain record, which is read without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One time over the training rows, the last one maybe cut short."""

    number: int
    """From 1."""
    loss: float
    """Mean over its steps."""
    held: float | None
    """Loss on the held-out rows behind it; None where there are too few rows to hold some out."""
    agreement: float | None
    """Share of held-out positions given the teacher's class; None without classes or teacher."""


@dataclass(frozen=True, kw_only=True)
class History:
    """How a training went."""

    epochs: tuple[Epoch, ...]
    stopped: str | None
    """Why it ended early, or None."""
    start: Epoch | None
    """Before the first step, on the held-out rows: number 0; None where no row is held out."""
    best: int
    """The number of the epoch whose parameters were kept; 0: none was better than the start."""
