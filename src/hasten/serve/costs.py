"""What a batch costs: t(n), the time of one run by its allowed size, measured at warm-up and followed live."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

WEIGHT = 0.1
"""Share of a new time in the running average: about twenty runs forget a change of load."""

OUTLIER = 4.0
"""A run that took longer than this many averages (the scheduler's doing) counts as this many."""


class CostCurve:
    """t(n) in nanoseconds for each allowed size; other row counts cost what the next allowed size costs."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sorted(set(sizes)))
        self._ns: dict[int, float] = {}

    @property
    def largest(self) -> int:
        """The most rows of one run."""
        return self.sizes[-1]

    def padded(self, rows: int) -> int:
        """Give the smallest allowed size that holds ``rows``, or the largest there is."""
        at = bisect_left(self.sizes, rows)
        return self.sizes[min(at, len(self.sizes) - 1)]

    def ns(self, rows: int) -> int:
        """Estimate the time of a run of ``rows``; where its size was never run, in proportion to the nearest that was.

        0 where nothing was measured yet.
        """
        size = self.padded(rows)
        known = self._ns.get(size)
        if known is not None:
            return int(known)
        if not self._ns:
            return 0
        near = min(self._ns, key=lambda other: abs(other - size))
        return int(self._ns[near] * size / near)

    def update(self, size: int, ns: int) -> None:
        """Learn that a run of ``size`` rows took ``ns``."""
        known = self._ns.get(size)
        if known is None:
            self._ns[size] = float(ns)
        else:
            self._ns[size] = known + WEIGHT * (min(float(ns), OUTLIER * known) - known)
