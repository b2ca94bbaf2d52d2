"""How sure a classifier is of a row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hasten.composition import Confidence
from hasten.steps.softmax import softmax
from hasten.tensors import Array

Floats = npt.NDArray[np.float64]


def confidence(scores: Array, kind: Confidence, *, logits: bool) -> Floats:
    """Give for each row of scores [rows, classes] the best probability, or its margin over the second.

    A row that holds what is not a number is not sure at all: it gets -1.
    """
    each = shares(scores, logits=logits)
    if kind == "margin" and each.shape[1] > 1:
        two = np.partition(each, -2, axis=1)[:, -2:]  # [rows, second and best]; what is no number counts as the best
        found = two[:, 1] - two[:, 0]
    else:
        found = each.max(axis=1)
    return np.nan_to_num(found, nan=-1.0)


def shares(scores: Array, *, logits: bool) -> Floats:
    """Give scores as float64, as probabilities where they are logits."""
    values = scores.astype(np.float64)
    return softmax(values).astype(np.float64) if logits else values


def are_shares(scores: Array) -> bool:
    """Say whether scores [rows, classes] are probabilities already."""
    values = scores.astype(np.float64)
    return bool((values >= 0).all() and np.allclose(values.sum(axis=-1), 1, atol=1e-2))
