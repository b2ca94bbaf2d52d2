"""Who is refused, why, and when to come again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hasten.errors import DeadlineExceeded, Overloaded
from hasten.serve.admission import LARGEST_FACTOR, WITHIN, Asked, Inside, Limits, Margin, predicted_ns, refusal
from hasten.serve.batching import Batcher, Entry
from hasten.serve.costs import CostCurve

MS = 1_000_000
ROOMY = Limits(rows=1000, n_bytes=1 << 30, concurrency=1000)


def queue(rows: int, *, priority: int = 8) -> Batcher[Entry]:
    curve = CostCurve((1, 4))
    curve.update(1, 1 * MS)
    curve.update(4, 2 * MS)
    batcher: Batcher[Entry] = Batcher(curve)
    for _ in range(rows):
        batcher.put(Entry({"x": np.zeros((1, 4), np.float32)}, 1, key=0, arrived_ns=0, priority=priority), 0)
    return batcher


def asked(rows: int = 1, **more: int) -> Asked:
    return Asked(**{"rows": rows, "n_bytes": 16 * rows, "priority": 8, **more})


def judged(batcher: Batcher[Entry], wanted: Asked, *, factor: float = 1.0, **more: Any) -> object:
    wait_ns = int(predicted_ns(batcher, wanted, more["inside"]) * factor)
    return refusal(batcher, wanted, wait_ns=wait_ns, **more)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(rows=8, n_bytes=1 << 30, concurrency=1000), "queue_full"),
        (Limits(rows=1000, n_bytes=128, concurrency=1000), "queue_full"),
        (Limits(rows=1000, n_bytes=1 << 30, concurrency=8), "concurrency"),
        (Limits(rows=1000, n_bytes=1 << 30, concurrency=1000, wait_ns=4 * MS), "predicted_wait"),
    ],
)
def test_every_bound_refuses_with_its_own_reason(limits: Limits, reason: str) -> None:
    error = judged(queue(8), asked(), limits=limits, inside=Inside(calls=8, instances=1, free_ns=1), now_ns=0)
    assert isinstance(error, Overloaded)
    assert error.reason == reason
    assert error.retry_after_s > 0


def test_the_predicted_time_counts_batches_not_requests() -> None:
    inside = Inside(calls=8, instances=1, free_ns=MS)
    assert predicted_ns(queue(8), asked(), inside) == MS + 2 * 2 * MS + MS


def test_those_behind_do_not_count() -> None:
    inside = Inside(calls=8, instances=1, free_ns=MS)
    assert predicted_ns(queue(8), asked(priority=1), inside) == MS + MS


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    inside = Inside(calls=8, instances=1, free_ns=MS)
    error = judged(queue(8), asked(deadline_ns=2 * MS), limits=ROOMY, inside=inside, now_ns=0)
    assert isinstance(error, Overloaded)
    assert error.reason == "deadline"
    over = judged(queue(0), asked(deadline_ns=5), limits=ROOMY, inside=inside, now_ns=5)
    assert isinstance(over, DeadlineExceeded)


def test_an_idle_server_refuses_nobody_for_the_wait() -> None:
    limits = Limits(rows=1, n_bytes=1, concurrency=10, wait_ns=1)
    assert judged(queue(0), asked(9), limits=limits, inside=Inside(calls=0, instances=1), now_ns=0) is None


def test_the_margin_settles_where_most_answers_stay_below_it() -> None:
    margin, draw = Margin(), np.random.default_rng(0)
    took = draw.uniform(1.0, 2.0, 6000)  # times as long as predicted
    for times in took:
        margin.learn(int(times * 1000), 1000)
    assert 1.9 < margin.factor < 2.0
    assert abs(float(np.mean(took <= margin.factor)) - WITHIN) < 0.03


def test_answers_as_predicted_need_no_margin() -> None:
    margin = Margin()
    for _ in range(1000):
        margin.learn(900, 1000)
    assert margin.factor == 1.0


def test_a_margin_that_has_grown_falls_again_once_answers_come_as_predicted() -> None:
    """What is let in under a large margin is expected far below the limit: that must not keep it from being learnt."""
    margin, limit_ns = Margin(), 1000
    while margin.factor < LARGEST_FACTOR:
        margin.learn(5000, 1000)
    for _ in range(10_000):
        expected_ns = int(limit_ns / margin.factor)  # the longest that is let in
        if margin.concerns(expected_ns, limit_ns):
            margin.learn(expected_ns, expected_ns)
    assert margin.factor == 1.0
    assert not margin.concerns(100, limit_ns)


def test_a_request_that_the_margin_makes_late_is_refused() -> None:
    limits, inside = Limits(rows=1000, n_bytes=1 << 30, concurrency=1000, wait_ns=7 * MS), Inside(calls=8, instances=1)
    assert judged(queue(8), asked(), limits=limits, inside=inside, now_ns=0) is None
    error = judged(queue(8), asked(), limits=limits, inside=inside, now_ns=0, factor=1.5)
    assert isinstance(error, Overloaded)
    assert error.reason == "predicted_wait"


def test_what_waited_to_be_read_counts_against_the_objective() -> None:
    limits = Limits(rows=1000, n_bytes=1 << 30, concurrency=1000, wait_ns=10 * MS)
    inside = Inside(calls=8, instances=1, free_ns=1)
    assert judged(queue(8), asked(), limits=limits, inside=inside, now_ns=0, waited_ns=4 * MS) is None
    error = judged(queue(8), asked(), limits=limits, inside=inside, now_ns=0, waited_ns=6 * MS)
    assert isinstance(error, Overloaded)
    assert error.reason == "predicted_wait"
    assert "11.0 ms" in str(error)
