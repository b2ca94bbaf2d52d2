"""Records of runs that never were, for what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hasten.load.run import PHASES, LoadRun, Requests

OK, REFUSED, TIMEOUT, ERROR, UNSENT = range(5)


def run_of(
    times_ns: Sequence[float],
    *,
    outcomes: Sequence[int] | None = None,
    late_ns: float = 0,
    gap_s: float = 0.01,
    **more: Any,
) -> LoadRun:
    """Make a run whose requests took ``times_ns`` from their schedule, and left ``late_ns`` after it."""
    n = len(times_ns)
    outcome = np.array([OK] * n if outcomes is None else outcomes, np.int64)
    scheduled = (np.arange(n) * gap_s * 1e9).astype(np.int64)
    sent = np.where(outcome == UNSENT, -1, scheduled + int(late_ns))
    done = np.where(np.isin(outcome, (OK, REFUSED)), scheduled + np.array(times_ns, np.int64), -1)
    requests = Requests(
        scheduled_ns=scheduled,
        sent_ns=sent,
        first_ns=done,
        done_ns=done,
        outcome=outcome,
        status=np.where(outcome == OK, 200, -1),
        rows=np.full(n, 2, np.int64),
        sample=np.zeros(n, np.int64),
        sent_bytes=np.full(n, 100, np.int64),
        received_bytes=np.full(n, 100, np.int64),
        phases_ns=np.full((n, len(PHASES)), -1, np.int64),
        batch_rows=np.full(n, -1, np.int64),
        instance=np.full(n, -1, np.int64),
    )
    told = {
        "url": "http://127.0.0.1:1",
        "protocol": "rest-binary",
        "model": "net",
        "version": None,
        "arrivals": f"constant:rate={1 / gap_s:g}",
        "seed": 0,
        "duration_s": n * gap_s,
        "timeout_s": 10.0,
        "began_unix_ns": 1_700_000_000_000_000_000,
    }
    return LoadRun(requests=requests, **{**told, **more})
