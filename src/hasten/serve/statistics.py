"""What a model did: counts and times as Triton's statistics extension has them, and histograms of every phase.

The sums of that extension grow with each answer. For the histograms the event loop's thread only keeps the marks, and
the times of runs: they are added up many at a time, or when someone asks.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from hasten.artifact import Json
from hasten.errors import ServeError
from hasten.protocol.phases import PHASES
from hasten.serve.ticket import Marks

BOUNDS_NS = tuple(int(step * 10**power) for power in range(4, 11) for step in (1, 1.5, 2, 3, 5, 7))
"""Upper bounds of the histograms' buckets: 10 us to 70 s, at most half again as large as the one before."""


_BOUNDS = np.array(BOUNDS_NS, np.int64)

TOGETHER: Final = 512
"""Requests whose marks are kept until they are added up, all at once: a microsecond each instead of ten."""

MARKS: Final = len(PHASES) + 1

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
        self._answers = 0
        self._success_ns = self._queue_ns = self._input_ns = self._infer_ns = self._output_ns = 0
        """Sums over the answers."""
        self._sent = array("q")
        """Their marks one after the other: copied, so that a request's own memory is free for the next one."""
        self._ran = array("q")
        """The size and three times of each run."""
        self._sizes: dict[int, BatchTimes] = {}
        self._failed = Duration()

    def ran(self, rows: int, size: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count a run, and how long it took to join its inputs, to run it, and to tell its outputs."""
        self.runs += 1
        self.padded_rows += size - rows
        self._ran.fromlist([size, input_ns, infer_ns, output_ns])
        if len(self._ran) >= 4 * TOGETHER:
            self._add_up_ran()

    def answered(self, marks: Marks, rows: int) -> None:
        """Count an answer, whose marks are set up to the end of ``post``."""
        ns = marks.ns
        decoded_ns, closed_ns, joined_ns, ran_ns, ended_ns = ns[2], ns[4], ns[5], ns[6], ns[7]
        self.rows += rows
        self._answered_s = time()
        marks.counts = self
        self._answers += 1
        self._success_ns += ended_ns - decoded_ns
        self._queue_ns += closed_ns - decoded_ns
        self._input_ns += joined_ns - closed_ns
        self._infer_ns += ran_ns - joined_ns
        self._output_ns += ended_ns - ran_ns

    def failed(self, error: ServeError, *, spent_ns: int) -> None:
        """Count a request without an answer."""
        self.refused[error.reason] = self.refused.get(error.reason, 0) + 1
        self._failed.add(spent_ns)

    def sent(self, marks: Marks) -> None:
        """Count the phases of an answer that has gone out, all marks set: their sum is the total by construction."""
        self._sent.fromlist(marks.ns)
        if len(self._sent) >= MARKS * TOGETHER:
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
        count = self._answers
        return {
            "success": Duration(count, self._success_ns),
            "fail": self._failed,
            "queue": Duration(count, self._queue_ns),
            "compute_input": Duration(count, self._input_ns),
            "compute_infer": Duration(count, self._infer_ns),
            "compute_output": Duration(count, self._output_ns),
        }

    def _add_up_ran(self) -> None:
        if not self._ran:
            return
        runs = np.maximum(_taken(self._ran, 4), 0)  # [runs, size and three times]
        self._ran = array("q")
        for size in np.unique(runs[:, 0]).tolist():
            those = runs[runs[:, 0] == size]
            times = self._sizes.setdefault(size, BatchTimes())
            every = (times.compute_input, times.compute_infer, times.compute_output)
            for duration, ns in zip(every, those.sum(axis=0).tolist()[1:], strict=True):
                duration.count += len(those)
                duration.ns += ns

    def _add_up_sent(self) -> None:
        if not self._sent:
            return
        # A mark that is missing counts as the one before it: its phase has length 0.
        at = np.maximum.accumulate(_taken(self._sent, MARKS), axis=1)  # [answers, marks]
        self._sent = array("q")
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


def _taken(held: array[int], columns: int) -> Ints:
    """Give what was collected as rows: a view."""
    return np.frombuffer(held, np.int64).reshape(-1, columns)


def _batch_json(size: int, times: BatchTimes) -> Mapping[str, Json]:
    return {
        "batch_size": size,
        "compute_input": times.compute_input.json(),
        "compute_infer": times.compute_infer.json(),
        "compute_output": times.compute_output.json(),
    }
