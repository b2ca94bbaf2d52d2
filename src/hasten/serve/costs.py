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
        self._by_rows = [0] * (self.sizes[-1] + 1)
        """t(n) for every row count: asked several times for each request, and changed once a run."""

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

        0 where nothing was measured yet; more rows than the largest size count as the largest.
        """
        try:
            return self._by_rows[rows]
        except IndexError:
            return self._by_rows[-1]

    def update(self, size: int, ns: int) -> None:
        """Learn that a run of ``size`` rows took ``ns``."""
        known = self._ns.get(size)
        if known is None:
            self._ns[size] = float(ns)
            for other in self.sizes:
                self._fill(other)
        else:
            self._ns[size] = known + WEIGHT * (min(float(ns), OUTLIER * known) - known)
            self._fill(size)

    def _fill(self, size: int) -> None:
        near = size if size in self._ns else min(self._ns, key=lambda other: abs(other - size))
        ns = int(self._ns[near] * size / near)
        at = self.sizes.index(size)
        first = self.sizes[at - 1] + 1 if at else 1
        self._by_rows[first : size + 1] = [ns] * (size + 1 - first)
