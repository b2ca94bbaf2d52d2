"""What has to be said beside a measurement's numbers, so that nobody reads more into them than they hold."""

from __future__ import annotations

from collections.abc import Iterable

from hasten.measurement import Bound, Latency
from hasten.report import format as fmt

MEMORY = "Memory is what the loaded model takes over the bare process of its engine."
"""What the column of that name means."""


def timing_remarks(latency: Latency) -> list[str]:
    """Say what is doubtful about a latency."""
    return [] if latency.settled else ["never settled while warming up"]


def limit_remarks(bound: Bound | None) -> list[str]:
    """Say what a limit leaves out."""
    if bound is None or not bound.unpriced:
        return []
    return [f"its limit counts no arithmetic for {', '.join(sorted(bound.unpriced))}, only bytes"]


def profile_remarks(bound: Bound | None) -> list[str]:
    """Say what was done to the times of single operators."""
    if bound is None or bound.profile_scale >= 1:
        return []
    share = fmt.percent(bound.profile_scale)
    return [f"operator times were scaled to {share} of what the profiler gave, because profiling takes time itself"]


def winograd_limit(bound: Bound | None) -> tuple[float, float] | None:
    """Give the second limit in ns, where there is one under the first, and the share of it that is reached.

    It counts 3x3 convolutions of stride 1 at the cost of Winograd's algorithm (Lavin and Gray, CVPR 2016), which an
    engine may use: then the first limit is none for it.
    """
    if bound is None or bound.winograd_ns is None or bound.winograd_ns >= bound.grouped_ns:
        return None
    return bound.winograd_ns, bound.winograd_ns / bound.measured_ns


def winograd_remarks(bound: Bound | None) -> list[str]:
    """Say the second limit."""
    if (second := winograd_limit(bound)) is None:
        return []
    limit, reached = fmt.duration(second[0]), fmt.percent(second[1])
    return [f"with 3x3 convolutions at Winograd's cost its limit is {limit}, of which it reaches {reached}"]


def grouped(remarks: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Write each remark once, with everyone that it is about: ``chosen, untouched: never settled ...``."""
    about: dict[str, list[str]] = {}
    asked = 0
    for name, texts in remarks:
        asked += 1
        for text in texts:
            about.setdefault(text, []).append(name)
    return [f"{'all' if 1 < len(names) == asked else ', '.join(names)}: {text}." for text, names in about.items()]
