"""What a batch costs: t(n), the time of one run by its allowed size, measured at warm-up and followed live."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

WEIGHT: Final = 0.1
"""Share of a new time in the running average: about twenty runs forget a change of load."""

STALE: Final = 32
"""A size that none of so many runs had follows the others: what slows one down, or no longer does, is the machine's
doing."""

OUTLIER: Final = 4.0
"""A run that took longer than this many averages (the scheduler's doing) counts as this many."""


class CostCurve:
    """t(n) in nanoseconds for each allowed size; other row counts cost what the next allowed size costs.

    One thread learns (``update``); any may ask (``ns``), once every size is known.

    Fewer rows never cost more than more of them: they could run as those, with padding.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sorted(set(sizes)))
        self._padded = [self.sizes[bisect_left(self.sizes, rows)] for rows in range(self.sizes[-1] + 1)]
        self._ns: dict[int, float] = {}
        self._runs = 0
        self._latest = 0
        """The size of the run that was learnt last; 0: none."""
        self._settled = True
        """What follows from the last runs was worked out: for those of one size that is done once they are over."""
        self._last: dict[int, tuple[int, dict[int, float]]] = {}
        """For each size but the latest, the number of its last run, and what all of them took then."""
        self._by_rows = [0] * (self.sizes[-1] + 1)
        """t(n) for every row count: asked several times for each request, and changed once a run."""

    @property
    def largest(self) -> int:
        """The most rows of one run."""
        return self.sizes[-1]

    def padded(self, rows: int) -> int:
        """Give the smallest allowed size that holds ``rows``, or the largest there is."""
        try:
            return self._padded[rows]
        except IndexError:
            return self.sizes[-1]

    def ns(self, rows: int) -> int:
        """Estimate the time of a run of ``rows``; where its size was never run, in proportion to the nearest that was.

        0 where nothing was measured yet; more rows than the largest size count as the largest.
        """
        if not self._settled:
            self._work_out()
        try:
            return self._by_rows[rows]
        except IndexError:
            return self._by_rows[-1]

    def update(self, size: int, ns: int) -> None:
        """Learn that a run of ``size`` rows took ``ns``."""
        if size != self._latest:
            self._settle()
            if self._latest:
                self._last[self._latest] = self._runs, self._ns.copy()
            self._latest = size
        known = self._ns.get(size)
        if known is None:
            self._ns[size] = float(ns)
        else:
            self._ns[size] = known + WEIGHT * (min(float(ns), OUTLIER * known) - known)
        self._runs += 1
        self._settled = False

    def _work_out(self) -> None:
        """Work out what follows from the runs. Where an instance asks while the event loop learns, it is done anew."""
        self._settle()
        self._fill()

    def _settle(self) -> None:
        """Let the sizes that are stale follow the one that ran last."""
        latest = self._latest
        if not latest or self._settled:
            return
        self._settled = True
        for other, (run, then) in [*self._last.items()]:
            if other != latest and self._runs - run > STALE and then.get(latest):
                self._ns[other] = then[other] * self._ns[latest] / then[latest]

    def _fill(self) -> None:
        by_rows, least = self._by_rows, (1 << 62) - 1
        for at in range(len(self.sizes) - 1, -1, -1):
            size, first = self.sizes[at], self.sizes[at - 1] + 1 if at else 1
            least = min(least, self._own(size))
            if by_rows[size] != least:
                by_rows[first : size + 1] = [least] * (size + 1 - first)

    def _own(self, size: int) -> int:
        known = self._ns.get(size)
        if known is not None:
            return int(known)
        near = min(self._ns, key=lambda other: abs(other - size))
        return int(self._ns[near] * size / near)
