"""What a candidate loses against the original on the same samples, and whether that proves anything.

Intervals are two-sided 95 % and paired. Where every score is 0 or 1, the interval is Tango's score interval for a
difference of paired proportions (T. Tango, "Equivalence test and confidence interval for the difference in
proportions for the paired-sample design", Statistics in Medicine 17, 1998): unlike a bootstrap it does not shrink to
nothing where the two models happen to agree on every sample. Everything else is a bootstrap over samples (BCa for
few samples, percentiles for many; B. Efron, 1987).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from hasten.errors import BadInput, Untrusted
from hasten.measurement import Estimate, Quality
from hasten.metrics import Floats, Metric, classified, first, predicted
from hasten.samples.samples import check_labels
from hasten.tensors import Array, Feed

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""

RESAMPLES = 2000
FEW_SAMPLES = 500
"""Up to here BCa intervals are affordable (their jackknife is quadratic) and their correction matters."""

MOST_SAMPLES = 10**10
"""More than anybody has: a search for a sample count ends here."""


def quality(
    metric: Metric,
    *,
    reference: Feed,
    candidate: Feed,
    labels: Array | None = None,
    classes: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Quality:
    """Compare a candidate's outputs with the original's, sample by sample.

    Args:
        metric: What to judge by (``hasten.metrics``).
        reference: The original's outputs by name, each [n, ...].
        candidate: The candidate's, for the same samples in the same order.
        labels: [n, ...]; needed by metrics that need labels.
        classes: The name of each class index.
        seed: Of the bootstrap.

    Raises:
        BadInput: labels are missing, of another length, not finite, or do not fit the outputs.
        Untrusted: the outputs differ in shape, or hold values that are not finite; or the metric gives such a value.
    """
    _check(reference, candidate)
    target = _target(metric, reference, labels)
    if metric.score is not None:
        before, after = metric.score(reference, target), metric.score(candidate, target)
        pair = _compare_scores(metric, before, after, seed)
    else:
        pair = _compare_statistics(metric, reference, candidate, target, seed)
    if not all(map(math.isfinite, (pair.before, pair.after, pair.drop.value, pair.drop.low, pair.drop.high))):
        raise Untrusted(
            f"{metric.name} is {pair.before:g} for the original and {pair.after:g} for the candidate, its drop "
            f"{pair.drop.value:g} [{pair.drop.low:g}, {pair.drop.high:g}]: a number that is not finite proves nothing"
        )
    flips = _flips(reference, candidate, target) if metric.classes else None
    return Quality(
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        reference=pair.before if metric.needs == "labels" else None,
        value=pair.after,
        drop=pair.drop,
        flip_rate=None if flips is None else float(flips.mean()),
        disagreement=pair.disagreement if flips is None or metric.per_sample else float((flips > 0).mean()),
        worst_class=_worst_class(reference, candidate, target, classes) if metric.classes else None,
    )


def proves(quality: Quality, max_drop: float) -> bool:
    """Tell if the drop is within ``max_drop`` beyond doubt: the interval's bad end is inside."""
    return quality.drop.high <= max_drop


def refutes(quality: Quality, max_drop: float) -> bool:
    """Tell if the drop is over ``max_drop`` beyond doubt: the interval's good end is outside."""
    return quality.drop.low > max_drop


def samples_needed(quality: Quality, max_drop: float) -> int | None:
    """Say about how many more samples would decide whether the drop is within ``max_drop``.

    It supposes that more samples look like these. For 0/1 scores the score interval is solved for n, which asks
    for about 3.84 / max_drop samples even where nothing has been lost; else the half-width is scaled by 1/sqrt(n).
    None where it is decided already, or where no number of samples would (the drop is exactly ``max_drop``).
    """
    drop = quality.drop
    if proves(quality, max_drop) or refutes(quality, max_drop) or drop.value == max_drop:
        return None
    counts = _counts(quality)
    if counts is None:
        side = drop.high - drop.value if drop.value < max_drop else drop.value - drop.low
        total = drop.n * (side / abs(max_drop - drop.value)) ** 2
        return max(1, math.ceil(min(total, MOST_SAMPLES)) - drop.n)
    lost, gained = counts[0] / drop.n, counts[1] / drop.n

    def decided(n: int) -> bool:
        low, high = paired_interval(lost * n, gained * n, n)
        return high <= max_drop or low > max_drop

    few, enough = drop.n, 2 * drop.n
    while not decided(enough):
        few, enough = enough, 2 * enough
        if enough > MOST_SAMPLES:
            return None
    while enough - few > max(1, few // 1000):
        middle = (few + enough) // 2
        few, enough = (few, middle) if decided(middle) else (middle, enough)
    return enough - drop.n


def paired_interval(lost: float, gained: float, n: int) -> tuple[float, float]:
    """Give the 95 % score interval of (lost - gained) / n (Tango, 1998).

    Args:
        lost: Samples that were right and are wrong now.
        gained: Samples that were wrong and are right now.
        n: All samples.
    """
    drop = (lost - gained) / n

    def excess(delta: float) -> float:
        return abs(lost - gained - n * delta) - Z * _score_deviation(lost, gained, n, delta)

    def end(edge: float) -> float:
        # At the drop itself both terms can be zero, which is no end: step off it towards the edge.
        near = drop + math.copysign(1e-13, edge)
        far = edge - math.copysign(1e-13, edge)
        if (abs(drop) >= 1 - 1e-12 and drop * edge > 0) or excess(far) <= 0:
            return edge
        return float(optimize.brentq(excess, near, far, xtol=1e-14, rtol=1e-12))

    return end(-1.0), end(1.0)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    before: float
    after: float
    drop: Estimate
    disagreement: float


def _score_deviation(lost: float, gained: float, n: int, delta: float) -> float:
    """Give the deviation of lost - gained if the true difference is ``delta``: at its constrained likeliest."""
    b = -lost - gained + (2 * n - lost + gained) * delta
    c = -gained * delta * (1 - delta)
    likeliest = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    return math.sqrt(max(n * (2 * likeliest + delta * (1 - delta)), 0.0))


def _compare_scores(metric: Metric, a: Floats, b: Floats, seed: int) -> _Pair:
    sign = 1.0 if metric.higher_is_better else -1.0
    bounded = metric.bounded if metric.bounded is not None else bool(a.min() >= 0 and a.max() <= 1)
    loss = sign * (a - b)
    scale = 1.0 if bounded else _scale(metric, float(a.mean()), float(b.mean()))
    value = float(loss.mean()) / scale
    if bounded and np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all():
        low, high = paired_interval(float((loss > 0).sum()), float((loss < 0).sum()), len(loss))
    elif np.ptp(loss) == 0:
        # Not one score differs from the others. Of a bounded metric as much may still be lost as in samples not seen.
        low, high = _widened(value, value, value, len(loss)) if bounded else (value, value)
    else:
        low, high = _bootstrap_mean(loss, a, bounded, seed)
        if bounded and (loss == 0).mean() > 0.5:  # those that changed tell little of how much any may
            low, high = _widened(value, low, high, len(loss))
    return _Pair(
        before=float(a.mean()),
        after=float(b.mean()),
        drop=Estimate(value=value, low=low, high=high, n=len(loss)),
        disagreement=float((a != b).mean()),
    )


def _bootstrap_mean(loss: Floats, before: Floats, bounded: bool, seed: int) -> tuple[float, float]:
    """Resample pairs: the mean loss, over the mean of the original's scores where the drop is a share."""

    def drop(x: Floats, y: Floats, axis: int = -1) -> Floats:
        lost, whole = np.mean(x, axis=axis), np.abs(np.mean(y, axis=axis))
        return np.asarray(lost if bounded else lost / np.maximum(whole, np.finfo(np.float64).tiny))

    found = stats.bootstrap(
        (loss, before),
        drop,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // len(loss)),
        method="BCa" if len(loss) <= FEW_SAMPLES else "percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    value = float(drop(loss, before))
    return min(float(found.low), value), max(float(found.high), value)


def _compare_statistics(metric: Metric, reference: Feed, candidate: Feed, target: Array, seed: int) -> _Pair:
    if metric.statistic is None:
        raise BadInput(f"the metric {metric.name!r} has neither scores nor a statistic")
    n = len(target)
    before, after = metric.statistic(reference, target), metric.statistic(candidate, target)
    sign = 1.0 if metric.higher_is_better else -1.0
    whole = np.ones(n)
    was, now = before(whole), after(whole)
    if not (math.isfinite(was) and math.isfinite(now)):
        raise Untrusted(f"{metric.name} is not defined on these {n} samples: they hold too few classes or values")
    scale = 1.0 if metric.bounded else _scale(metric, was, now)
    random = np.random.default_rng(seed)
    drops = []
    for _ in range(RESAMPLES // 2):
        weights = np.bincount(random.integers(0, n, n), minlength=n).astype(np.float64)
        drops.append(sign * (before(weights) - after(weights)) / scale)
    value = sign * (was - now) / scale
    low, high = np.nanquantile(drops, (0.025, 0.975))  # NaN: the resample held a single class
    bounds = _widened(value, float(low), float(high), n)
    changed = float(np.any(_flat(first(reference)) != _flat(first(candidate)), axis=1).mean())
    return _Pair(
        before=was, after=now, drop=Estimate(value=value, low=bounds[0], high=bounds[1], n=n), disagreement=changed
    )


def _widened(value: float, low: float, high: float, n: int) -> tuple[float, float]:
    """Make an interval no narrower than the share of samples of which n may have shown none: z^2 / (n + z^2)."""
    unseen = Z * Z / (n + Z * Z)
    return min(low, value - unseen), max(high, value + unseen)


def _scale(metric: Metric, before: float, after: float) -> float:
    """Give what a drop is a share of."""
    if before == 0 and after != 0:
        raise Untrusted(f"the original's {metric.name} is 0, of which no drop is a share; use relative-error")
    return abs(before) or 1.0


def _check(reference: Feed, candidate: Feed) -> None:
    for name, wanted in reference.items():
        if name not in candidate:
            raise Untrusted(f"the candidate gives no output {name!r}; it gives {sorted(candidate)}")
        got = candidate[name]
        if got.shape != wanted.shape:
            raise Untrusted(f"output {name!r} has shape {list(got.shape)}, the original's has {list(wanted.shape)}")
        if wanted.dtype.kind not in "OSUbiu":
            _check_finite(name, wanted.astype(np.float64), got.astype(np.float64))


def _check_finite(name: str, wanted: Array, got: Array) -> None:
    """Refuse NaN anywhere, and infinities that the original does not have too (it may mask scores with them)."""
    for who, bad in (("the original's", np.isnan(wanted)), ("the candidate's", ~np.isfinite(got) & (got != wanted))):
        if count := int(bad.sum()):
            rows = int(np.any(_flat(bad), axis=1).sum())
            raise Untrusted(
                f"{who} output {name!r} has {count} values that are not finite, in {rows} of {len(bad)} samples"
            )


def _target(metric: Metric, reference: Feed, labels: Array | None) -> Array:
    output = first(reference)
    if metric.needs == "reference":
        return output
    if labels is None:
        raise BadInput(f"the metric {metric.name!r} needs labels, and the samples have none; agreement needs none")
    if len(labels) != len(output):
        raise BadInput(f"there are {len(labels)} labels, but outputs for {len(output)} samples")
    check_labels(labels)
    return labels


def _flips(reference: Feed, candidate: Feed, target: Array) -> Floats:
    """Give the share of each sample's predictions that changed [n]."""
    labels = None if target is first(reference) else target
    a, b = _guesses(first(reference), labels), _guesses(first(candidate), labels)
    return np.asarray(_flat(a != b).mean(axis=1), dtype=np.float64)


def _guesses(outputs: Array, labels: Array | None) -> npt.NDArray[np.int64]:
    """Read the classes; where there are labels, they tell on which axis."""
    return predicted(outputs) if labels is None else classified(outputs, labels)[0]


def _worst_class(
    reference: Feed, candidate: Feed, target: Array, names: tuple[str, ...] | None
) -> tuple[str, float] | None:
    """Find the class that lost the largest share of its right predictions; None if no class lost any.

    Classes are the labels', or those that the original predicts.
    """
    output = first(reference)
    if target is output:
        before = truth = predicted(output)
        after = predicted(first(candidate))
    else:
        before, truth, _ = classified(output, target)
        after, _, _ = classified(first(candidate), target)
    lost = (before == truth).astype(np.float64) - (after == truth)
    kinds, places = np.unique(truth, return_inverse=True)
    drops = np.bincount(places.ravel(), lost.ravel()) / np.bincount(places.ravel())
    worst = int(np.argmax(drops))
    if drops[worst] <= 0:
        return None
    kind = int(kinds[worst])
    return (names[kind] if names and 0 <= kind < len(names) else str(kind)), float(drops[worst])


def _counts(quality: Quality) -> tuple[float, float] | None:
    """Give how many samples were lost and gained, where the interval is that of 0/1 scores; else None."""
    drop = quality.drop
    lost = drop.n * (quality.disagreement + drop.value) / 2
    gained = drop.n * (quality.disagreement - drop.value) / 2
    if min(lost, gained) < -1e-6:
        return None
    lost, gained = max(lost, 0.0), max(gained, 0.0)
    same = np.allclose(paired_interval(lost, gained, drop.n), (drop.low, drop.high), atol=1e-9)
    return (lost, gained) if same else None


def _flat(array: Array) -> Array:
    return array.reshape(len(array), -1)
