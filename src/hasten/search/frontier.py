"""The frontier: the trials that nobody beats, by time and by quality.

Speeds are put into levels from the fastest down: whoever is within 2 % of a level's fastest stands on it too, and
within 5 % where their intervals overlap; plans that run the same operators on the same shapes have one speed. On one
level the lower loss decides, then the simpler plan. So a twin that happens to be measured 0.5 % faster takes nobody's
place, and two searches that measured the same plans choose alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hasten.measurement import WIN
from hasten.search.result import Goal, Trial

TWIN = 1.05
"""The most that two plans may differ by and still be called equal, however wide their intervals are."""


def frontier(trials: Iterable[Trial], goal: Goal, *, original: str) -> tuple[str, ...]:
    """Give the keys of the measured trials that no other beats, best objective first, the original last if beaten.

    A trial is beaten by one that is at least as good by objective (in levels), by loss of quality and by
    simplicity, and better by one of them. The order of ``trials`` does not matter.
    """
    measured = [trial for trial in trials if trial.outcome == "measured"]
    level = levels(measured, goal)
    ranks = {t.key: (level[t.key], loss(t), simplicity(t, original=original)) for t in measured}
    best = [t for t in measured if not any(_beats(ranks[o.key], ranks[t.key]) for o in measured)]
    keys = [trial.key for trial in sorted(best, key=lambda t: ranks[t.key])]
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
    """Give the trial with the best objective; of those on the same level, the simplest."""
    level = levels(trials, goal)
    return min(trials, key=lambda t: (level[t.key], simplicity(t, original=original)), default=None)


def levels(trials: Iterable[Trial], goal: Goal) -> dict[str, int]:
    """Give each trial's level by the objective, by key; 0 is the best. Trials on one level are not told apart."""
    found: dict[str, int] = {}
    level, best = -1, (math.inf, math.inf, math.inf)
    spans = _spans(list(trials), goal)
    for key, span in sorted(spans.items(), key=lambda item: (-item[1][0], item[0])):
        value, _, high = span
        if level < 0 or value * (TWIN if high >= best[1] else WIN) < best[0]:
            level, best = level + 1, span
        found[key] = level
    return found


_Rank = tuple[int, float, tuple[bool, bool, int, int, str]]


def _spans(trials: Sequence[Trial], goal: Goal) -> dict[str, tuple[float, float, float]]:
    """Give each trial's span; those with one skeleton share that of the one that was measured most precisely."""
    spans = {trial.key: _span(trial, goal) for trial in trials}
    if goal.objective != "latency":
        return spans
    sharpest: dict[str, tuple[float, float, float]] = {}
    for trial in trials:
        value, low, high = spans[trial.key]
        known = sharpest.get(trial.skeleton or trial.key)
        if known is None or ((high - low) / value, -value) < ((known[2] - known[1]) / known[0], -known[0]):
            sharpest[trial.skeleton or trial.key] = (value, low, high)
    return {trial.key: sharpest[trial.skeleton or trial.key] for trial in trials}


def _span(trial: Trial, goal: Goal) -> tuple[float, float, float]:
    """Give what the goal wants large, with its interval. What no interval tells from the original is the original."""
    speed = trial.measurement.speedup if trial.measurement else None
    if goal.objective != "latency" or speed is None:
        value = 1.0 / max(cost(trial, goal), 1e-12)
        return value, value, value
    return (speed.value, speed.low, speed.high) if speed.wins or speed.loses else (1.0, 1.0, 1.0)


def _beats(a: _Rank, b: _Rank) -> bool:
    """Say whether ``a`` is at least as good in speed and loss, and better in one, or equal in both and simpler."""
    if a[0] > b[0] or a[1] > b[1]:
        return False
    return a[:2] != b[:2] or a[2] < b[2]
