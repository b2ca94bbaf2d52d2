"""Ranges of activations from what calibration samples show: min-max, percentile, entropy, mean squared error.

A ``Histogram`` takes arrays as they come; an observer is a plain function from a histogram to ``(low, high)``.
Every range contains zero, so that zero (padding, ReLU) is exact after quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import Untrusted
from hasten.tensors import Array

Floats = npt.NDArray[np.floating[Any]]
Range = tuple[float, float]

HALF = 4096
"""Bins on each side of zero. At least half of one side is in use, ten times the levels of an 8-bit scale."""

COARSE = 1024
"""Bins that the searches look at on each side: four times the levels is enough to tell ranges apart."""


@dataclass
class Histogram:
    """A streaming histogram whose bins are ``width`` wide, a power of two, with an edge at zero.

    When a value falls outside, neighbours are merged and the width doubles: counts stay exact, memory constant.
    """

    low: float = 0.0
    high: float = 0.0
    """Smallest and largest value so far, and zero."""
    width: float = 0.0
    """Width of a bin; 0 until a value other than zero has come."""
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * HALF, np.int64))
    """Values in [(i - HALF) width, (i + 1 - HALF) width)."""
    ends_only: bool = False
    """Keep ``low`` and ``high`` only: all that min-max needs, at a tenth of the time."""

    def update(self, array: Array, *, name: str = "tensor") -> None:
        """Add every value of ``array``.

        Raises:
            Untrusted: a value is NaN or infinite.
        """
        values = np.asarray(array, np.float32).reshape(-1)
        if not values.size:
            return
        least, most = float(values.min()), float(values.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise Untrusted(f"{name!r} is NaN or infinite on a calibration sample; leave its node in float")
        self.low, self.high = min(self.low, least), max(self.high, most)
        if self.ends_only:
            return
        self._widen(max(-least, most))
        if not self.width:
            self.counts[HALF] += values.size  # all of them zero
        else:
            # In float32, as wide a value / width may be rounded up to HALF itself: the last bin takes it.
            index = np.floor(values * np.float32(1 / self.width)).astype(np.int32) + HALF
            self.counts += np.bincount(np.clip(index, 0, 2 * HALF - 1), minlength=2 * HALF)

    def _widen(self, magnitude: float) -> None:
        if magnitude == 0.0:
            return
        # Not below float32's normal numbers, where 1 / width would overflow.
        wanted = max(2.0 ** math.ceil(math.log2(magnitude / HALF)), 2.0**-120)
        if not self.width:
            self.width = wanted
        while self.width < wanted:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([np.zeros(HALF // 2, np.int64), merged, np.zeros(HALF // 2, np.int64)])
            self.width *= 2

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The middle of each bin [2 * HALF]."""
        return np.asarray((np.arange(-HALF, HALF) + 0.5) * self.width, np.float64)


def min_max(histogram: Histogram) -> Range:
    """Give the smallest and the largest value seen."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, value: float = 99.99) -> Range:
    """Give the range that leaves out (100 - value) / 2 percent of the values at each end.

    Where nothing is negative (or nothing positive), all that is left out is at the other end.
    """
    total = histogram.counts.sum()
    if not total:
        return min_max(histogram)
    two_sided = histogram.low < 0 < histogram.high
    tail = (100 - value) / 100 * total / (2 if two_sided else 1)
    cumulated = np.cumsum(histogram.counts)
    first = int(np.searchsorted(cumulated, tail, side="right"))
    last = int(np.searchsorted(cumulated, total - tail, side="left"))
    low = (first - HALF) * histogram.width
    high = (last + 1 - HALF) * histogram.width
    return max(histogram.low, min(low, 0.0)), min(histogram.high, max(high, 0.0))


def entropy(histogram: Histogram, levels: int = 256) -> Range:
    """Give the range whose quantized distribution tells most about the real one: the smallest KL divergence.

    The calibrator of TensorRT (S. Migacz, "8-bit inference with TensorRT", GTC 2017): for each candidate threshold,
    the reference P holds all that lies beyond in its last bin, and Q is P's inside, spread evenly over the
    non-empty bins of each quantized level. One threshold for both signs.
    """
    folded = _magnitudes(histogram)
    if folded is None:
        return min_max(histogram)
    counts, width = folded
    per_side = levels if histogram.low == 0 or histogram.high == 0 else levels // 2
    stops = np.unique(np.linspace(min(per_side, counts.size), counts.size, 257).astype(int))
    threshold = float(stops[int(np.argmin([_divergence(counts, int(stop), per_side) for stop in stops]))]) * width
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def mean_squared_error(histogram: Histogram, levels: int = 256) -> Range:
    """Give the range with the smallest expected squared error of quantization, rounding and clipping together.

    Both ends are scaled down together first, then each alone.
    """
    if not histogram.counts.any():
        return min_max(histogram)
    values, weights = _coarse(histogram)
    ratios = np.linspace(0.02, 1.0, 99)
    low, high = histogram.low * ratios, histogram.high * ratios
    best_low, best_high = _least_error(values, weights, low, high, levels)
    with_best = np.append(low, best_low)
    best_low, _ = _least_error(values, weights, with_best, np.full_like(with_best, best_high), levels)
    with_best = np.append(high, best_high)
    return _least_error(values, weights, np.full_like(with_best, best_low), with_best, levels)


OBSERVERS: dict[str, Callable[[Histogram], Range]] = {
    "min-max": min_max,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mean_squared_error,
}
"""By the name that a setting gives them."""


def _magnitudes(histogram: Histogram) -> tuple[npt.NDArray[np.float64], float] | None:
    """Give the counts of |x| without the empty end, at most 2048 bins, and the width; None where all is zero."""
    folded = (histogram.counts[HALF:] + histogram.counts[:HALF][::-1]).astype(np.float64)
    used = np.flatnonzero(folded)
    if not used.size:
        return None
    pairs = folded.reshape(-1, 2).sum(axis=1)
    # Zeros after a ReLU are exact at any scale; counted, they would ask for ever finer steps. TensorRT does this too.
    pairs[0] = min(pairs[0], pairs[1])
    if not pairs.any():
        return None
    return pairs[: used[-1] // 2 + 1], histogram.width * 2


def _divergence(counts: npt.NDArray[np.float64], stop: int, levels: int) -> float:
    """KL(P || Q) for the threshold after ``stop`` bins."""
    inside = counts[:stop]
    reference = inside.copy()
    reference[-1] += counts[stop:].sum()
    filled = reference > 0
    starts = np.unique(np.arange(min(levels, stop)) * stop // min(levels, stop))
    sums = np.add.reduceat(inside, starts)
    occupied = np.add.reduceat(filled.astype(np.float64), starts)
    spread = np.repeat(sums / np.maximum(occupied, 1), np.diff(np.append(starts, stop)))
    p = reference[filled] / reference.sum()
    # Where all of a level's mass lies beyond the threshold, Q is empty: a small share keeps the logarithm finite.
    q = np.maximum(spread[filled] / max(spread[filled].sum(), 1e-12), 1e-9)
    return float(np.sum(p * np.log(p / q)))


def _coarse(histogram: Histogram) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Give centres and shares of about 2 * COARSE bins, the empty ones left out."""
    step = HALF // COARSE
    counts = histogram.counts.reshape(-1, step).sum(axis=1)
    centres = (np.arange(-COARSE, COARSE) + 0.5) * histogram.width * step
    used = counts > 0
    return np.clip(centres[used], histogram.low, histogram.high), counts[used] / counts.sum()


def _least_error(
    values: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    levels: int,
) -> Range:
    """Give the candidate range with the least expected squared error: clipping as counted, rounding as step²/12."""
    clipped = np.clip(values[None, :], low[:, None], high[:, None])  # [candidates, bins]
    error = ((values[None, :] - clipped) ** 2) @ weights + ((high - low) / (levels - 1)) ** 2 / 12
    at = int(np.argmin(error))
    return float(low[at]), float(high[at])
