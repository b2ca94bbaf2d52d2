"""What a model did: counts and times as Triton's statistics extension has them, and histograms of every phase.

The event loop's thread only keeps the marks; they are added up many at a time, or when someone asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hasten.artifact import Json
from hasten.errors import ServeError
from hasten.protocol.phases import PHASES
from hasten.serve.ticket import Marks

BOUNDS_NS = tuple(int(step * 10**power) for power in range(4, 11) for step in (1, 1.5, 2, 3, 5, 7))
"""Upper bounds of the histograms' buckets: 10 us to 70 s, at most half again as large as the one before."""


_BOUNDS = np.array(BOUNDS_NS, np.int64)

TOGETHER = 512
"""Requests whose marks are kept until they are added up, all at once: a microsecond each instead of ten."""

Ints: TypeAlias = npt.NDArray[np.int64]


class Histogram:
    """Times by bucket: ``counts[i]`` are those up to ``BOUNDS_NS[i]``, the last one is what is longer."""

    __slots__ = ("counts", "total_ns")

    def __init__(self) -> None:
        self.counts: Ints = np.zeros(len(BOUNDS_NS) + 1, np.int64)
        self.total_ns = 0

    def add(self, ns: Ints) -> None:
        """Count times [n]."""
        self.counts += np.bincount(np.searchsorted(_BOUNDS, ns), minlength=len(BOUNDS_NS) + 1)
        self.total_ns += int(ns.sum())

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.counts.sum())


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
        self._answered_s = 0.0
        self.padded_rows = 0
        self.refused: dict[str, int] = {}
        """Requests without an answer, by reason."""
        self._phases = {name: Histogram() for name in PHASES}
        self._total = Histogram()
        self._answered: list[list[int]] = []
        self._sent: list[list[int]] = []
        self._ran: list[tuple[int, int, int, int]] = []
        self._sizes: dict[int, BatchTimes] = {}
        self._spans = {
            name: Duration()
            for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        }

    def ran(self, rows: int, size: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count a run, and how long it took to join its inputs, to run it, and to tell its outputs."""
        self.runs += 1
        self.padded_rows += size - rows
        self._ran.append((size, input_ns, infer_ns, output_ns))
        if len(self._ran) >= TOGETHER:
            self._add_up_ran()

    def answered(self, marks: Marks, rows: int) -> None:
        """Count an answer, whose marks are set up to the end of ``post``."""
        self.rows += rows
        self._answered_s = time()
        marks.counts = self
        self._answered.append(marks.ns)
        if len(self._answered) >= TOGETHER:
            self._add_up_answered()

    def failed(self, error: ServeError, *, spent_ns: int) -> None:
        """Count a request without an answer."""
        self.refused[error.reason] = self.refused.get(error.reason, 0) + 1
        self._spans["fail"].add(spent_ns)

    def sent(self, marks: Marks) -> None:
        """Count the phases of an answer that has gone out, all marks set: their sum is the total by construction."""
        self._sent.append(marks.ns)
        if len(self._sent) >= TOGETHER:
            self._add_up_sent()

    @property
    def last_ms(self) -> int:
        """Wall time of the last answer, in milliseconds since 1970; 0: there was none."""
        return int(self._answered_s * 1000)

    @property
    def phases(self) -> dict[str, Histogram]:
        """The times of each phase, of all answers that went out."""
        self._add_up_sent()
        return self._phases

    @property
    def total(self) -> Histogram:
        """The times of all answers that went out."""
        self._add_up_sent()
        return self._total

    @property
    def sizes(self) -> Mapping[int, BatchTimes]:
        """The runs by their size."""
        self._add_up_ran()
        return self._sizes

    @property
    def spans(self) -> dict[str, Duration]:
        """Counts and times by the extension's names."""
        self._add_up_answered()
        return self._spans

    def _add_up_ran(self) -> None:
        if not self._ran:
            return
        runs = np.maximum(np.array(self._ran, np.int64), 0)  # [runs, size and three times]
        self._ran = []
        for size in np.unique(runs[:, 0]).tolist():
            those = runs[runs[:, 0] == size]
            times = self._sizes.setdefault(size, BatchTimes())
            every = (times.compute_input, times.compute_infer, times.compute_output)
            for duration, ns in zip(every, those.sum(axis=0).tolist()[1:], strict=True):
                duration.count += len(those)
                duration.ns += ns

    def _add_up_answered(self) -> None:
        if not self._answered:
            return
        at = np.array(self._answered, np.int64)  # [answers, marks]
        self._answered = []
        spans = {"success": (2, 7), "queue": (2, 4), "compute_input": (4, 5), "compute_infer": (5, 6)}
        for name, (first, last) in {**spans, "compute_output": (6, 7)}.items():
            self._spans[name].count += len(at)
            self._spans[name].ns += int((at[:, last] - at[:, first]).sum())

    def _add_up_sent(self) -> None:
        if not self._sent:
            return
        # A mark that is missing counts as the one before it: its phase has length 0.
        at = np.maximum.accumulate(np.array(self._sent, np.int64), axis=1)  # [answers, marks]
        self._sent = []
        lengths = np.diff(at, axis=1)
        for phase, ns in zip(self._phases.values(), lengths.T, strict=True):
            phase.add(ns)
        self._total.add(at[:, -1] - at[:, 0])

    def json(self, name: str, version: str) -> dict[str, Json]:
        """Give one entry of ``model_stats``."""
        spans = {key: value.json() for key, value in self.spans.items()}
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
