"""What a model did: counts and times as Triton's statistics extension has them, and histograms of every phase.

Everything is added up on the event loop's thread with a few integer additions; who asks pays for the formatting.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from hasten.artifact import Json
from hasten.errors import ServeError
from hasten.serve.ticket import PHASES, Marks

BOUNDS_NS = tuple(int(step * 10**power) for power in range(4, 11) for step in (1, 1.5, 2, 3, 5, 7))
"""Upper bounds of the histograms' buckets: 10 us to 70 s, at most half again as large as the one before."""


class Histogram:
    """Times by bucket: ``counts[i]`` are those up to ``BOUNDS_NS[i]``, the last one is what is longer."""

    __slots__ = ("counts", "total_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.total_ns = 0

    def add(self, ns: int) -> None:
        """Count one time."""
        self.counts[bisect_left(BOUNDS_NS, ns)] += 1
        self.total_ns += ns

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts)


@dataclass
class Duration:
    """How often, and how long all together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one."""
        self.count += 1
        self.ns += max(ns, 0)

    def json(self) -> dict[str, Json]:
        """Give it as the extension has it."""
        return {"count": self.count, "ns": self.ns}


@dataclass
class BatchTimes:
    """Runs of one size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


class Statistics:
    """One version's figures since it was loaded."""

    def __init__(self) -> None:
        self.rows = 0
        self.runs = 0
        self.restarts = 0
        self.last_ms = 0
        """Wall time of the last answer, in milliseconds since 1970."""
        self.padded_rows = 0
        self.refused: dict[str, int] = {}
        """Requests without an answer, by reason."""
        self.phases = {name: Histogram() for name in PHASES}
        self.total = Histogram()
        self.sizes: dict[int, BatchTimes] = {}
        self._spans = {
            name: Duration()
            for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        }

    def ran(self, rows: int, size: int, *, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count a run."""
        self.runs += 1
        self.padded_rows += size - rows
        times = self.sizes.get(size)
        if times is None:
            times = self.sizes[size] = BatchTimes()
        times.compute_input.add(input_ns)
        times.compute_infer.add(infer_ns)
        times.compute_output.add(output_ns)

    def answered(self, marks: Marks, *, rows: int, wall_ms: int) -> None:
        """Count an answer, whose marks are set up to the end of ``post``."""
        ns, spans = marks.ns, self._spans
        self.rows += rows
        self.last_ms = wall_ms
        spans["success"].add(ns[7] - ns[2])
        spans["queue"].add(ns[4] - ns[2])
        spans["compute_input"].add(ns[5] - ns[4])
        spans["compute_infer"].add(ns[6] - ns[5])
        spans["compute_output"].add(ns[7] - ns[6])

    def failed(self, error: ServeError, *, spent_ns: int) -> None:
        """Count a request without an answer."""
        self.refused[error.reason] = self.refused.get(error.reason, 0) + 1
        self._spans["fail"].add(spent_ns)

    def sent(self, marks: Marks) -> None:
        """Count the phases of an answer that has gone out: their sum is the total by construction."""
        total = 0
        for name, ns in marks.phases_ns().items():
            self.phases[name].add(ns)
            total += ns
        self.total.add(total)

    def json(self, name: str, version: str) -> dict[str, Json]:
        """Give one entry of ``model_stats``."""
        spans = {key: value.json() for key, value in self._spans.items()}
        empty = Duration().json()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.rows,
            "execution_count": self.runs,
            "inference_stats": {**spans, "cache_hit": empty, "cache_miss": empty},
            "batch_stats": [_batch_json(size, times) for size, times in sorted(self.sizes.items())],
        }


def _batch_json(size: int, times: BatchTimes) -> Mapping[str, Json]:
    return {
        "batch_size": size,
        "compute_input": times.compute_input.json(),
        "compute_infer": times.compute_infer.json(),
        "compute_output": times.compute_output.json(),
    }
