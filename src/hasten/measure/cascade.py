"""The threshold of a cascade, from data: as many rows as possible stay with the cheap model, as far as is proven."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.composition import Confidence
from hasten.errors import BadInput, InvalidSetting
from hasten.measure.quality import paired_interval
from hasten.steps.confidence import confidence
from hasten.tensors import Array

MOST_TRIED = 200
"""Thresholds that are tried at most, at even shares of the rows."""

FEWEST_ROWS = 30


@dataclass(frozen=True, kw_only=True)
class ChosenThreshold:
    """A threshold, and what it was on the data that it was chosen by."""

    threshold: float
    asked: float
    """Share of rows that go on to the next member."""
    drop: float
    """Accuracy of the last member less that of the cascade."""
    drop_high: float
    """The upper end of its 95 % interval: what is proven."""
    rows: int


def choose_threshold(
    first: Array, last: Array, labels: Array, *, max_drop: float, kind: Confidence = "top-1", logits: bool
) -> ChosenThreshold:
    """Choose the lowest threshold at which the drop against the last member is proven to be within ``max_drop``.

    Thresholds are tried from the top, where every row goes on and nothing can be lost, downwards, and the first that is
    not proven ends it. Testing in a fixed order keeps the chance of being wrong at that of one test however many are
    tried (Angelopoulos et al., Learn then Test, 2021; for early exits Jazbec et al., Fast yet Safe, NeurIPS 2024). The
    bound is the upper end of the paired interval of ``measure.quality``. Choose on data that no member was trained on.

    Args:
        first: Scores [rows, classes] of the cheap member.
        last: Scores [rows, classes] of the one that is asked where it is in doubt.
        labels: The right classes [rows].
        max_drop: Accuracy that may be lost, as a share of all rows.
        kind: What the confidence is.
        logits: The scores are logits.

    Raises:
        BadInput: rows are missing or too few, or nothing is proven and yet some rows have the highest confidence there
            is. InvalidSetting: ``max_drop`` is no share.
    """
    if not 0 < max_drop < 1:
        raise InvalidSetting(f"max_drop is {max_drop}, and must be above 0 and below 1")
    n = len(labels)
    if first.shape != last.shape or first.ndim != 2 or len(first) != n or labels.ndim != 1:
        raise BadInput(f"scores {list(first.shape)} and {list(last.shape)} do not fit {list(labels.shape)} labels")
    if n < FEWEST_ROWS:
        raise BadInput(f"{n} rows are too few to choose a threshold by; give {FEWEST_ROWS} or more, better thousands")
    sure = confidence(first, kind, logits=logits)
    ours, theirs = first.argmax(axis=1) == labels, last.argmax(axis=1) == labels
    chosen = ChosenThreshold(threshold=1.0, asked=1.0, drop=0.0, drop_high=0.0, rows=n)
    ordered = np.sort(sure)[::-1]
    for at in np.unique(np.linspace(0, n - 1, min(n, MOST_TRIED)).astype(int)):
        threshold = float(np.clip(ordered[at], 0.0, 1.0))
        stays = sure >= threshold
        lost, gained = int((stays & theirs & ~ours).sum()), int((stays & ours & ~theirs).sum())
        high = paired_interval(lost, gained, n)[1]
        if high > max_drop:
            break
        chosen = ChosenThreshold(
            threshold=threshold, asked=float(1 - stays.mean()), drop=(lost - gained) / n, drop_high=high, rows=n
        )
    if chosen.asked == 1.0 and (sure >= chosen.threshold).any():
        raise BadInput(
            f"no threshold is proven to lose at most {max_drop:g}: not even where the first member's confidence is "
            f"{ordered[0]:.6g}; give more rows, allow a larger drop, or serve the last member alone"
        )
    return chosen
