"""Intervals for ratios, and what a percentile needs before it may be claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from hasten.errors import InvalidSetting, Untrusted
from hasten.measurement import Ratio
from hasten.tensors import Array

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
"""Bootstrap resamples: they place the ends of a 95 % interval to within about a tenth of its standard error."""

FEWEST_FOR_BOOTSTRAP = 6
"""With five blocks, even the whole range of the data covers the median in only 93.75 % of repeats."""

LARGEST_AUTOCORRELATION = 0.8
"""Beyond it so few blocks tell nothing about the spread; the widening stops at three times."""

NO_SPREAD = 1e-9
"""Logarithms of ratios closer together than this are equal: no clock tells a nanosecond in a second."""

LAUNCH_SD = 0.004
"""Standard deviation of one binary's speed between launches, as a share: 0.1 to 0.5 % seen (decision 4)."""

_TAIL = 0.025


def bootstrap_ratio(log_ratios: Array | list[float], *, seed: int, asked: float) -> Ratio:
    """Estimate a ratio and its 95 % interval from the logarithms of block ratios, in the order they were taken.

    The estimate is exp(median). The interval is the percentile bootstrap over blocks, never over single runs,
    with two corrections, because with few blocks it covers too little. Its percentiles are expanded as Student's t
    asks (T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015, 3.3);
    and it is stretched about the median by sqrt((1 + r) / (1 - r)), where blocks follow one another with the
    autocorrelation r > 0 (r corrected for its bias: M. G. Kendall, "Note on bias in the estimation of
    autocorrelation", Biometrika 41, 1954). Below ``FEWEST_FOR_BOOTSTRAP`` blocks it is Student's t interval.

    It tells how the ratio of these two processes varies. That two processes of one binary differ by themselves (by 0.1
    to 0.5 %, seen with aligned memory) is not in it: ``across_launches`` adds that.

    Args:
        log_ratios: log(time of the baseline / time of the candidate), one a block.
        seed: Of the resampling.
        asked: Half-width, as a share of the ratio, at which it counts as settled.

    Raises:
        Untrusted: fewer than two blocks, or one that is not finite.
    """
    logs = np.asarray(log_ratios, dtype=np.float64)
    if len(logs) < 2:
        raise Untrusted(f"a ratio needs two blocks at least, and there are {len(logs)}; allow more time to measure")
    if not np.isfinite(logs).all():
        raise Untrusted(f"block {int(np.argmin(np.isfinite(logs)))} has a ratio that is not finite: a time of zero?")
    middle = float(np.median(logs))
    low, high = _interval(logs, seed)
    stretch = math.sqrt((1 + (r := autocorrelation(logs))) / (1 - r))
    low, high = (math.exp(middle + (end - middle) * stretch) for end in (min(low, middle), max(high, middle)))
    settled = (high - low) / 2 <= asked * math.exp(middle)
    return Ratio(value=math.exp(middle), low=low, high=high, n=len(logs), settled=settled)


def across_launches(ratio: Ratio) -> Ratio:
    """Widen the interval of a ratio of two processes to one of the two plans.

    Each launch draws page placement and memory layout anew, which no block within it shows. The blocks' half-widths
    and 1.96 sqrt(2) ``LAUNCH_SD`` are added in quadrature, in logarithms: an uncertainty of type B, known from
    elsewhere (JCGM 100:2008, "Guide to the expression of uncertainty in measurement", 4.3 and 5.1). ``settled`` stays
    what the blocks say: more of them would not narrow this part.
    """
    launch = 1.96 * math.sqrt(2) * LAUNCH_SD
    down = math.hypot(math.log(ratio.value / ratio.low), launch)
    up = math.hypot(math.log(ratio.high / ratio.value), launch)
    return replace(ratio, low=ratio.value * math.exp(-down), high=ratio.value * math.exp(up))


def autocorrelation(values: Floats) -> float:
    """Estimate how much each value resembles the one before it: 0 (or less) to ``LARGEST_AUTOCORRELATION``.

    Values beyond three median deviations are drawn in first, lest one outlier hide what the others do.
    """
    n = len(values)
    if n < FEWEST_FOR_BOOTSTRAP:
        return 0.0
    centred = values - np.median(values)
    reach = 3 * float(np.median(np.abs(centred)))
    kept = np.clip(centred, -reach, reach)
    if reach < NO_SPREAD:
        return 0.0
    seen = float(kept[1:] @ kept[:-1]) / float(kept @ kept)
    return min(max(seen + (1 + 3 * seen) / n, 0.0), LARGEST_AUTOCORRELATION)


def quantile(values: Array, q: float) -> float:
    """Give the smallest of ``values`` that at least a share ``q`` of them does not exceed."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), q, method="inverted_cdf"))


def percentile_or_none(samples_ns: Array, q: float) -> float | None:
    """Give the ``q`` quantile where there are enough samples to claim it (``runs_needed(q, 0)``), else None."""
    return quantile(samples_ns, q) if len(samples_ns) >= runs_needed(q, 0) else None


LOOKS = (0, 1, 5, 10)
"""Misses that the numbers of runs allow after which a claim about p99 is looked at: no more often."""

P99_CONFIDENCE = 1 - 0.01 / len(LOOKS)
"""Of each look, so that all of them together are wrong one time in a hundred at the most."""


def percentile_holds(n: int, misses: int, q: float, confidence: float = 0.99) -> bool:
    """Say whether ``misses`` of ``n`` runs over a limit prove that the ``q`` quantile is under it.

    The exact binomial test: were a share of 1 - q or more over the limit, so few misses would turn up with a
    probability of at most 1 - ``confidence``.
    """
    _check_share(q)
    if not 0 <= misses <= n:
        raise InvalidSetting(f"{misses} misses in {n} runs: misses must lie between 0 and the runs")
    return n > 0 and float(special.bdtr(misses, n, 1 - q)) <= 1 - confidence


def percentile_fails(n: int, misses: int, q: float, confidence: float = 0.99) -> bool:
    """Say whether ``misses`` of ``n`` runs over a limit prove that the ``q`` quantile is over it.

    The test of ``percentile_holds``, turned. Where neither holds, there are too few runs to say.
    """
    _check_share(q)
    return misses > 0 and float(special.bdtrc(misses - 1, n, 1 - q)) <= 1 - confidence


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Give a 95 % interval of the median of what independent ``values`` are drawn from, whatever its distribution.

    The k-th smallest and the k-th largest of n enclose the median with a probability that the binomial distribution
    of n fair coins gives. None: fewer than six, where no such k exists.
    """
    ordered = sorted(values)
    k = int(stats.binom.ppf(_TAIL, len(ordered), 0.5)) if ordered else 0
    return (ordered[k - 1], ordered[-k]) if k >= 1 else None


def runs_needed(q: float, misses: int, confidence: float = 0.99) -> int:
    """Give the fewest runs of which ``misses`` may be over a limit with the ``q`` quantile still proven under it."""
    _check_share(q)
    enough = max(misses, 1)
    while not percentile_holds(enough, misses, q, confidence):
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        between = (enough + too_few) // 2
        if between >= misses and percentile_holds(between, misses, q, confidence):
            enough = between
        else:
            too_few = between
    return enough


def bootstrap_tail(n: int) -> float:
    """Give the share that a percentile bootstrap of ``n`` blocks leaves out at each end of a 95 % interval.

    Less than 2.5 %: expanded as Student's t asks (T. Hesterberg 2015, see ``bootstrap_ratio``).
    """
    return float(special.ndtr(-special.stdtrit(n - 1, 1 - _TAIL) * math.sqrt(n / (n - 1))))


def _interval(logs: Floats, seed: int) -> tuple[float, float]:
    n = len(logs)
    if n < FEWEST_FOR_BOOTSTRAP:
        reach = float(special.stdtrit(n - 1, 1 - _TAIL)) * float(logs.std(ddof=1)) / math.sqrt(n)
        return float(logs.mean()) - reach, float(logs.mean()) + reach
    random = np.random.default_rng(seed)
    medians = np.median(logs[random.integers(0, n, (RESAMPLES, n))], axis=1)  # [RESAMPLES]
    tail = bootstrap_tail(n)
    low, high = np.quantile(medians, (tail, 1 - tail))
    return float(low), float(high)


def _check_share(q: float) -> None:
    if not 0 < q < 1:
        raise InvalidSetting(f"a quantile lies between 0 and 1, and {q} does not; p99 is 0.99")
