"""Times of single runs: when a model is warm, and what may be said of its latency."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.errors import InvalidSetting, Untrusted
from hasten.measure.statistics import percentile_or_none
from hasten.measurement import Latency

Nanoseconds = npt.NDArray[np.int64]

NS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """When a model counts as warm: the medians of two successive windows agree within ``agree``.

    Each window is half of ``min_runs`` and half of ``min_s`` at least; after ``max_s`` of runs warm-up gives up.
    """

    min_runs: int = 10
    min_s: float = 1.0
    max_s: float = 30.0
    agree: float = 0.02

    def __post_init__(self) -> None:
        if self.min_runs < 2 or not 0 <= self.min_s <= self.max_s:
            raise InvalidSetting(f"{self}: warm-up needs at least 2 runs, and 0 <= min_s <= max_s")


def warm_up(run_ns: Callable[[], int], rule: WarmUp) -> bool:
    """Run until the model is warm. ``run_ns`` runs it once and gives the time it took, in nanoseconds.

    Gives False where the time was over before two successive windows agreed: the model never settled.
    """
    left_ns = rule.max_s * NS
    before: float | None = None
    while True:
        window: list[int] = []
        window_ns = 0
        while len(window) < (rule.min_runs + 1) // 2 or window_ns < rule.min_s * NS / 2:
            if left_ns <= 0:
                return False
            window.append(run_ns())
            window_ns += window[-1]
            left_ns -= window[-1]
        now = float(np.median(window))
        if before is not None and abs(now - before) < rule.agree * before:
            return True
        before = now


def timed_runs(run: Callable[[], object], seconds: float) -> Nanoseconds:
    """Run for ``seconds``, at least once, without garbage collection, and give the time of each run, [runs]."""
    now = time.perf_counter_ns
    taken: list[int] = []
    with without_gc():
        deadline = now() + int(seconds * NS)
        while True:
            start = now()
            run()
            end = now()
            taken.append(end - start)
            if end >= deadline:
                return np.array(taken, dtype=np.int64)


@contextmanager
def without_gc() -> Iterator[None]:
    """Keep the garbage collector still."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def latency_of(
    slices: Sequence[Nanoseconds], *, first_run_ns: float, settled: bool, limit_ns: float | None = None
) -> Latency:
    """Describe the times of single runs, given slice by slice, each [runs].

    Args:
        slices: Times in nanoseconds, in the order they were taken.
        first_run_ns: Time of the very first run after loading.
        settled: Whether warm-up ended because two windows agreed.
        limit_ns: The goal's p99 limit; runs over it are counted as misses.

    Raises:
        Untrusted: there is no run.
    """
    filled = [one for one in slices if len(one)]
    if not filled:
        raise Untrusted("no run was timed, so there is no latency; allow more time to measure")
    every = np.concatenate(filled)
    medians = medians_of(filled)
    return Latency(
        median_ns=float(np.median(medians)),  # of slices, as the ratios: pooled runs would favour the fast ones
        p90_ns=percentile_or_none(every, 0.9),
        p99_ns=percentile_or_none(every, 0.99),
        runs=len(every),
        slices_ns=medians,
        first_run_ns=float(first_run_ns),
        settled=settled,
        misses=None if limit_ns is None else int((every > limit_ns).sum()),
    )


def medians_of(slices: Iterable[Nanoseconds]) -> tuple[float, ...]:
    """Give the median of each slice."""
    return tuple(float(np.median(one)) for one in slices)
