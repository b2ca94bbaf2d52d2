"""Percentiles of response times under load, each with its count, its interval and its reason where there is none.

A request that got no answer counts as slower than every other: who leaves failures out praises a server that refuses.
The interval is of order statistics: the l-th and the u-th smallest of n enclose the quantile q with a probability that
the binomial distribution B(n, q) gives, whatever the distribution of the times (H. A. David, H. N. Nagaraja, "Order
Statistics", 3rd ed., 7.1). That holds for independent times. In a queue neighbours are slow together, so n is first
divided by how much more the share of slow requests varies between stretches of the run than it would if they were
independent (the method of batch means: A. M. Law, "Simulation Modeling and Analysis", 5th ed., 9.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from hasten.errors import BadInput
from hasten.measure.statistics import runs_needed

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
"""What is always told."""

STRETCHES = 30
"""Into so many a run is cut to see how much its neighbours resemble each other."""

FEWEST_IN_STRETCH = 8
"""Shorter stretches see nothing of what lies between them."""

_TAIL = 0.025

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """The ``q`` quantile in nanoseconds with its 95 % interval; ``n`` requests stand behind it.

    ``value_ns`` None: ``why`` says the reason. ``high_ns`` None: the interval reaches into what got no answer, or
    beyond the slowest that was seen.
    """

    q: float
    n: int
    effective_n: int
    """``n``, divided by how much neighbours resemble each other."""
    value_ns: float | None
    low_ns: float | None
    high_ns: float | None
    why: str = ""

    @property
    def name(self) -> str:
        """The way it is written: p50, p99.9."""
        return f"p{self.q * 100:.6g}"


def percentiles(times_ns: Floats | Ints, quantiles: Sequence[float] = QUANTILES) -> tuple[Percentile, ...]:
    """Give the percentiles of times [n], in the order of arrival; infinite ones got no answer.

    Raises:
        BadInput: there is none.
    """
    if not len(times_ns):
        raise BadInput("no request was due in this run, so there is nothing to tell of its response times")
    times = np.asarray(times_ns, dtype=np.float64)
    ordered = np.sort(times)
    return tuple(_percentile(times, ordered, q) for q in quantiles)


def percentile(times_ns: Floats | Ints, q: float) -> Percentile:
    """Give one percentile; see ``percentiles``."""
    return percentiles(times_ns, (q,))[0]


def effective_count(slow: npt.NDArray[np.bool_], share: float) -> int:
    """Give how many independent requests tell as much of ``share`` as those of ``slow`` [n], in order of arrival."""
    n = len(slow)
    size = n // STRETCHES
    if size < FEWEST_IN_STRETCH or not 0 < share < 1:
        return n
    means = slow[: size * STRETCHES].reshape(STRETCHES, size).mean(axis=1)  # [STRETCHES]
    alone = share * (1 - share) / size
    inflation = float(means.var(ddof=1)) / alone
    return n if inflation <= _chance() else max(1, int(n / inflation))


def independent(over: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Give (requests, misses) that prove as much if independent as ``over`` [n], in order of arrival, does.

    In a queue slow responses come in crowds, and a binomial test takes each for a fact of its own.
    """
    n, misses = len(over), int(over.sum())
    if not misses:
        return n, 0
    share = min(max(misses / n, 1 / n), 1 - 1 / n) if n > 1 else 0.5
    kept = effective_count(over, share) / n
    fewer = max(int(n * kept), 1)
    return fewer, min(math.ceil(misses * kept), fewer)


def quantile_interval(n: int, q: float) -> tuple[int, int | None] | None:
    """Give the places l and u (from 1) of the order statistics that enclose the quantile with 95 %.

    None: too few for any lower place; ``u`` None: too few for an upper one.
    """
    low = int(stats.binom.ppf(_TAIL, n, q))
    high = int(stats.binom.ppf(1 - _TAIL, n, q)) + 1
    if low < 1:
        return None
    return low, high if high <= n else None


def _percentile(times: Floats, ordered: Floats, q: float) -> Percentile:
    n = len(ordered)
    needed = runs_needed(q, 0)
    if n < needed:
        why = f"{n} requests; {needed} are needed to claim it"
        return Percentile(q=q, n=n, effective_n=n, value_ns=None, low_ns=None, high_ns=None, why=why)
    value = float(ordered[max(math.ceil(q * n) - 1, 0)])
    if math.isinf(value):
        lost = int(np.isinf(ordered).sum())
        why = f"{lost} of {n} requests got no answer"
        return Percentile(q=q, n=n, effective_n=n, value_ns=None, low_ns=None, high_ns=None, why=why)
    effective = effective_count(times > value, 1 - q)
    low, high = _ends(ordered, q, effective)
    return Percentile(q=q, n=n, effective_n=effective, value_ns=value, low_ns=low, high_ns=high)


def _ends(ordered: Floats, q: float, effective: int) -> tuple[float | None, float | None]:
    """Give the interval's ends: the places for ``effective`` requests, as shares of the ``n`` that there are."""
    places = quantile_interval(effective, q)
    if places is None:
        return None, None
    n = len(ordered)
    low = ordered[max(math.floor(places[0] / effective * n) - 1, 0)]
    if places[1] is None:
        return float(low), None
    high = float(ordered[min(math.ceil(places[1] / effective * n) - 1, n - 1)])
    return float(low), None if math.isinf(high) else high


def _chance() -> float:
    """Give the inflation that independent requests reach once in twenty runs: less says nothing."""
    return float(stats.chi2.ppf(0.95, STRETCHES - 1)) / (STRETCHES - 1)
