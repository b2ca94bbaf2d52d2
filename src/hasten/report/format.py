"""Numbers as people read them: three significant digits, a unit, an interval."""

from __future__ import annotations

import math

from hasten.measure import statistics
from hasten.measurement import Estimate, Latency

NONE = "–"
"""Stands for what was not measured."""


def duration(ns: float | None) -> str:
    """Write nanoseconds as ns, µs, ms or s."""
    if ns is None:
        return NONE
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if abs(ns) >= size * 0.9995:
            return f"{digits(ns / size)} {unit}"
    return f"{digits(ns)} ns"


def size(count: float | None) -> str:
    """Write bytes as B, kB, MB or GB (powers of 1000)."""
    if count is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale * 0.9995:
            return f"{digits(count / scale)} {unit}"
    return f"{count:.0f} B"


def count(value: float) -> str:
    """Write a number of operations as K, M, G or T."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= scale * 0.9995:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f}"


def times(ratio: Estimate | None, decimals: int = 2) -> str:
    """Write a speed-up with its interval: ``2.31x [2.25, 2.37]``."""
    if ratio is None:
        return NONE
    value, low, high = (f"{number:.{decimals}f}" for number in (ratio.value, ratio.low, ratio.high))
    return f"{value}x [{low}, {high}]"


def twin(ratio: Estimate) -> str:
    """Write what the untouched model against itself gave, and whether that is as it should be."""
    covers = ratio.low <= 1 <= ratio.high
    end = "covers 1, as it should" if covers else "does not cover 1: distrust differences of this size"
    return f"{times(ratio, 3)}, which {end}"


def percent(share: float | None, decimals: int = 0) -> str:
    """Write a share as per cent."""
    return NONE if share is None else f"{share * 100:.{decimals}f} %"


def drop(estimate: Estimate | None) -> str:
    """Write a loss of quality with its interval, in per cent: ``0.30 % [-0.10, 0.70]``."""
    if estimate is None:
        return NONE
    value, low, high = (number * 100 + 0.0 for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.2f} % [{low:.2f}, {high:.2f}]"


def seconds(value: float) -> str:
    """Write a wait: ``0.4 s``, ``42 s``, ``3 min 20 s``, ``1 h 5 min``."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def roughly(value: float) -> str:
    """Write a wait that is only guessed: ``20 s``, ``3 min``, ``1 h 10 min``."""
    if value < 57.5:
        return f"{max(5, round(value / 5) * 5)} s"
    minutes = max(1, round(value / 60))
    if minutes < 60:
        return f"{minutes} min"
    tens = round(minutes / 10) * 10
    return f"{tens // 60} h {tens % 60} min" if tens % 60 else f"{tens // 60} h"


def digits(value: float) -> str:
    """Write three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")  # first: 0.9999 becomes 1.00, not 1.000
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded)) + 1e-9))
    return f"{rounded:.{decimals}f}"


def median_interval(latency: Latency) -> tuple[float, float] | None:
    """Give the 95 % interval of a latency's median, in ns, from its slices (``measure.statistics.median_interval``).

    It is widened to the median where that lies outside. None: there are fewer than six slices.
    """
    bounds = statistics.median_interval(latency.slices_ns)
    return None if bounds is None else (min(bounds[0], latency.median_ns), max(bounds[1], latency.median_ns))


def interval(latency: Latency) -> str:
    """Write a latency with its interval: ``1.23 ms [1.21, 1.26]``."""
    bounds = median_interval(latency)
    text = duration(latency.median_ns)
    if bounds is None:
        return text
    unit = {"s": 1e9, "ms": 1e6, "µs": 1e3, "ns": 1.0}[text.split()[-1]]
    return f"{text} [{digits(bounds[0] / unit)}, {digits(bounds[1] / unit)}]"
