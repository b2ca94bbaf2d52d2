"""The runs of a model, as the requests of a record tell of them: which requests ran together, when, and for how long.

All requests of a batch carry the same infer time, batch rows and instance. Times are on the client's clock, less sure
than durations: a request's run ended as long before its first byte as encoding and half a usual transfer take.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten.analyse.phases import Joined
from hasten.load.run import Ints, LoadRun

Floats = npt.NDArray[np.float64]

TOGETHER_NS = 20_000_000
"""Requests of one batch whose answers come further apart than this count as two batches."""

MOST_SHAPES = 64
"""With more lengths of requests than this, each is its own: numbers written as text."""

FEWEST_RUNS = 5
"""From so many runs of a size on, their median is its typical time."""


@dataclass(frozen=True, kw_only=True)
class ServerRuns:
    """Columns [runs], ascending by start, and for each request in ``Joined`` the run it was in, [answered].

    Times in nanoseconds since the load began.
    """

    start_ns: Ints
    end_ns: Ints
    infer_ns: Ints
    batch_rows: Ints
    instance: Ints
    largest_request: Ints
    """Rows of its largest request."""
    expected_ns: Floats
    """The typical time of a run of so many rows."""
    first_of_size: npt.NDArray[np.bool_]
    """No run of this size, of requests of this length, came before it on its instance in this record."""
    run_of: Ints

    def overlapping(self, first_ns: float, last_ns: float) -> Ints:
        """Give the runs that went on at some time between two times."""
        return np.flatnonzero((self.start_ns < last_ns) & (self.end_ns > first_ns))


def server_runs(run: LoadRun, joined: Joined) -> ServerRuns | None:
    """Find the runs; None where the server tells no infer times or no batch rows."""
    batch = run.requests.batch_rows[joined.row]
    if "infer" not in joined.told or not len(batch) or batch.max() <= 0:
        return None
    infer, instance, rows = joined.part("infer"), run.requests.instance[joined.row], run.requests.rows[joined.row]
    ended = infer_ended_ns(run, joined)
    order = np.lexsort((ended, infer, batch, instance))
    fresh = np.ones(len(order), bool)
    same = np.ones(len(order) - 1, bool)
    for column in (instance, batch, infer):
        same &= np.diff(column[order]) == 0
    fresh[1:] = ~same | (np.diff(ended[order]) > TOGETHER_NS)
    # No run holds more rows than its batch: what is alike in everything else is cut where a batch is full.
    head = np.flatnonzero(fresh)[np.cumsum(fresh) - 1]
    before = np.cumsum(rows[order]) - rows[order]
    piece = (before - before[head]) // np.maximum(batch[order], 1)
    fresh[1:] |= np.diff(piece) > 0
    number = np.cumsum(fresh) - 1  # [answered], in sorted order
    count = int(number[-1]) + 1
    end_ns = np.zeros(count, np.int64)
    largest = np.zeros(count, np.int64)
    end_ns[number] = ended[order]  # the last one written is the latest: they are sorted by end
    np.maximum.at(largest, number, rows[order])
    heads = order[fresh]
    start = end_ns - infer[heads]
    by_start = np.argsort(start, kind="stable")
    place = np.empty(count, np.int64)
    place[by_start] = np.arange(count)
    run_of = np.empty(len(order), np.int64)
    run_of[order] = place[number]
    heads = heads[by_start]
    size = np.maximum(batch[heads], largest[by_start])  # a request beyond the largest size runs in pieces
    return ServerRuns(
        start_ns=start[by_start],
        end_ns=end_ns[by_start],
        infer_ns=infer[heads],
        batch_rows=size,
        instance=instance[heads],
        largest_request=largest[by_start],
        expected_ns=expected_ns(size, infer[heads]),
        first_of_size=_firsts(size, instance[heads], _shapes(run, joined)[heads]),
        run_of=run_of,
    )


def infer_ended_ns(run: LoadRun, joined: Joined) -> Ints:
    """Estimate when each request's run ended, on the client's clock, [answered]."""
    requests, transfer = run.requests, joined.part("transfer")
    first = np.where(requests.first_ns[joined.row] >= 0, requests.first_ns[joined.row], requests.done_ns[joined.row])
    usual = np.minimum(transfer, int(np.median(transfer)))
    back = sum((joined.part(name) for name in ("post", "encode", "send")), np.maximum(usual, 0) // 2)
    return np.asarray(first - back, np.int64)


def expected_ns(size: Ints, infer_ns: Ints) -> Floats:
    """Give the typical infer time of each run's size [runs]: its median, or where there are few, its neighbours."""
    known = [
        (int(s), float(np.median(infer_ns[size == s]))) for s in np.unique(size) if (size == s).sum() >= FEWEST_RUNS
    ]
    if not known:
        known = [(int(np.median(size)), float(np.median(infer_ns)))]
    sizes, times = np.array([s for s, _ in known], float), np.array([t for _, t in known])
    beyond = times[-1] * size / sizes[-1]  # in proportion: an upper bound for a batch that gains by its size
    found: Floats = np.where(size > sizes[-1], beyond, np.interp(size, sizes, times))
    return found


def _firsts(size: Ints, instance: Ints, shape: Ints) -> npt.NDArray[np.bool_]:
    first = np.zeros(len(size), bool)
    _, places = np.unique(np.column_stack([size, instance, shape]), axis=0, return_index=True)
    first[places] = True
    return first


def _shapes(run: LoadRun, joined: Joined) -> Ints:
    """Tell requests of other shapes apart by their bytes, [answered]; 0 for all where bytes say nothing of shapes."""
    requests = run.requests
    each = requests.sent_bytes[joined.row] // np.maximum(requests.rows[joined.row], 1)
    return each if len(np.unique(each)) <= MOST_SHAPES else np.zeros_like(each)
