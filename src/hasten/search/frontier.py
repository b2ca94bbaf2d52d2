"""The frontier: the trials that nobody beats, by time and by quality.

Two speeds within 2 % of each other are the same speed: between them the lower loss decides, then the simpler plan.
So a twin that happens to be measured 0.5 % faster takes nobody's place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hasten.measurement import WIN
from hasten.search.result import Goal, Trial


def frontier(trials: Iterable[Trial], goal: Goal, *, original: str) -> tuple[str, ...]:
    """Give the keys of the measured trials that no other beats, best objective first, the original last if beaten.

    A trial is beaten by one that is at least as good by objective (in steps of 2 %), by loss of quality and by
    simplicity, and better by one of them. The order of ``trials`` does not matter.
    """
    measured = [trial for trial in trials if trial.outcome == "measured"]
    ranks = {trial.key: _rank(trial, goal, original) for trial in measured}
    best = [t for t in measured if not any(_beats(ranks[o.key], ranks[t.key]) for o in measured)]
    keys = [trial.key for trial in sorted(best, key=lambda t: (cost(t, goal), ranks[t.key][2]))]
    return tuple(keys) if original in keys or original not in ranks else (*keys, original)


def cost(trial: Trial, goal: Goal) -> float:
    """Give what the goal wants small: nanoseconds (from the ratio to the baseline, so drift cancels), or bytes."""
    measured = trial.measurement
    if measured is None:
        return math.inf
    if goal.objective == "size":
        return float(measured.resources.file_bytes)
    if goal.objective == "memory":
        return float(measured.resources.rss_bytes)
    return 1.0 / measured.speedup.value


def loss(trial: Trial) -> float:
    """Give the loss of quality on the search split; 0 where it was not judged, and never less than 0.

    A candidate that scores better than the original by chance is not preferred for it.
    """
    quality = trial.measurement.quality if trial.measurement else None
    return 0.0 if quality is None else max(0.0, quality.drop.value)


def simplicity(trial: Trial, *, original: str) -> tuple[bool, bool, int, int, str]:
    """Give a sort key, smaller is simpler: the original, then lossless, few passes, few threads, then the name."""
    plan = trial.plan
    return (trial.key != original, bool(trial.traits), len(plan.passes), plan.threads, plan.json)


def best_of(trials: Sequence[Trial], goal: Goal, *, original: str) -> Trial | None:
    """Give the trial with the best objective; of those in the same step of 2 %, the simplest."""
    return min(trials, key=lambda t: (step(t, goal), simplicity(t, original=original)), default=None)


_Rank = tuple[int, float, tuple[bool, bool, int, int, str]]


def _rank(trial: Trial, goal: Goal, original: str) -> _Rank:
    return step(trial, goal), loss(trial), simplicity(trial, original=original)


def step(trial: Trial, goal: Goal) -> int:
    """Give the objective in steps of 2 %. What no interval tells from the original's speed is in its step, 0."""
    speed = trial.measurement.speedup if trial.measurement else None
    if goal.objective == "latency" and speed is not None and not speed.wins and not speed.loses:
        return 0
    return round(math.log(max(cost(trial, goal), 1e-12)) / math.log(WIN))


def _beats(a: _Rank, b: _Rank) -> bool:
    """Say whether ``a`` is at least as good in speed and loss, and better in one, or equal in both and simpler."""
    if a[0] > b[0] or a[1] > b[1]:
        return False
    return a[:2] != b[:2] or a[2] < b[2]
