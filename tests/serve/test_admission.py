"""Who is refused, why, and when to come again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hasten.errors import DeadlineExceeded, Overloaded
from hasten.protocol.messages import InferRequest
from hasten.serve.admission import LARGEST_FACTOR, WITHIN, Asked, Inside, Limits, Margin, queued_ns, refusal
from hasten.serve.batching import NEVER, Batcher, Entry
from hasten.serve.call import Call
from hasten.serve.costs import CostCurve
from hasten.serve.gate import Gate
from hasten.serve.intake import TakenIn
from hasten.serve.line import Line
from hasten.serve.ticket import Marks
from hasten.serve.turns import Turns

MS = 1_000_000
ROOMY = Limits(rows=1000, n_bytes=1 << 30, concurrency=1000)


def queue(rows: int, *, priority: int = 8) -> Batcher[Entry]:
    curve = CostCurve((1, 4))
    curve.update(1, 1 * MS)
    curve.update(4, 2 * MS)
    batcher: Batcher[Entry] = Batcher(curve)
    for _ in range(rows):
        feed = {"x": np.zeros((1, 4), np.float32)}
        batcher.put(Entry(feed, 1, key=0, arrived_ns=0, priority=priority, n_bytes=16), 0)
    return batcher


def asked(rows: int = 1, **more: int) -> Asked:
    return Asked(**{"rows": rows, "n_bytes": 16 * rows, "priority": 8, **more})


def judged(batcher: Batcher[Entry], wanted: Asked, *, factor: float = 1.0, **more: Any) -> object:
    inside = more["inside"]
    wait_ns = int((inside.free_ns + queued_ns(batcher, wanted.rows, wanted.priority, inside.instances)) * factor)
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
    assert queued_ns(queue(8), 1, 8, 1) == 2 * 2 * MS + MS
    assert queued_ns(queue(8), 1, 8, 2) == 2 * MS + MS, "over two instances"


def test_those_behind_do_not_count() -> None:
    assert queued_ns(queue(8), 1, 1, 1) == MS


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


def test_what_is_learnt_is_the_time_from_admission_to_the_last_piece() -> None:
    """A request that steps have prepared for long came to its model late: that says nothing of the model's queue."""
    now_ns = 100 * MS
    line: Line = Line(Batcher(CostCurve((1, 2))), lambda: now_ns)
    line.batcher.costs.update(2, 5 * MS)
    gate = Gate(line, limits=Limits(rows=99, n_bytes=1 << 20, concurrency=99, wait_ns=10 * MS), turns=Turns())
    marks = Marks()
    marks.ns[2] = 1  # it arrived long before it was prepared
    call = Call(InferRequest(model="net", inputs=()), marks, done=lambda _: None, priority=1, finish=lambda *_: None)
    feed = {"x": np.zeros((4, 1), np.float32)}
    call.rows = 4
    assert gate.admit(Runs(calls=0, ready=1), call, 16, NEVER, now_ns) is None
    assert call.expected_ns == 10 * MS
    call.divide(TakenIn(feed, 4, "k", 16), 2)
    now_ns += 9 * MS
    for index, factor in ((0, 1.0), (1, 1.0)):
        call.part(index, {"y": np.zeros((2, 1), np.float32)})
        gate.answered(call)
        assert gate.margin.factor == factor
    late = Call(InferRequest(model="net", inputs=()), Marks(), done=lambda _: None, priority=1, finish=lambda *_: None)
    late.rows = 4
    gate.admit(Runs(calls=0, ready=1), late, 16, NEVER, now_ns)
    late.divide(TakenIn(feed, 4, "k", 16), 2)
    now_ns += 11 * MS
    late.part(0, {"y": np.zeros((2, 1), np.float32)})
    gate.answered(late)
    assert gate.margin.factor == 1.0, "it is not answered yet"
    late.part(1, {"y": np.zeros((2, 1), np.float32)})
    gate.answered(late)
    assert gate.margin.factor > 1.0


def test_what_was_refused_once_is_refused_again_without_a_look_for_as_long_as_it_would_be() -> None:
    line: Line = Line(queue(8), lambda: 0)  # 4 ms of work
    limits = Limits(rows=99, n_bytes=1 << 20, concurrency=99, wait_ns=6 * MS)
    gate = Gate(line, limits=limits, turns=Turns())
    runs = Runs(calls=8, ready=1, free=3 * MS)
    assert gate.shut(8, 0) is None
    first = gate.refused(runs, asked(), 0)  # in 3 + 4 + 1 ms, and 6 are allowed
    assert isinstance(first, Overloaded)
    line.batcher.empty()
    again = gate.refused(runs, asked(), int(1.9 * MS))
    assert isinstance(again, Overloaded), "nobody looked at the queue"
    assert again is not first, "what one request is told holds on to nothing of another"
    assert (str(again), again.reason, again.retry_after_s) == (str(first), first.reason, first.retry_after_s)
    assert gate.shut(9, 0) is not None, "nor is who is less urgent let in"
    assert gate.shut(7, 0) is None, "of who is more urgent nothing is known"
    assert gate.shut(8, 2 * MS) is None, "by now it would be in time"


def test_once_something_has_ended_the_queue_is_looked_at_again() -> None:
    line: Line = Line(queue(8), lambda: 0)
    gate = Gate(line, limits=Limits(rows=99, n_bytes=1 << 20, concurrency=99, wait_ns=6 * MS), turns=Turns())
    runs = Runs(calls=8, ready=1, free=3 * MS)
    assert gate.refused(runs, asked(), 0) is not None
    line.batcher.empty()
    gate.open()
    assert gate.refused(runs, asked(), 1) is None


def test_what_only_a_large_request_was_refused_for_is_not_held_against_a_small_one() -> None:
    line: Line = Line(queue(4), lambda: 0)
    gate = Gate(line, limits=Limits(rows=99, n_bytes=1 << 20, concurrency=99, wait_ns=6 * MS), turns=Turns())
    runs = Runs(calls=8, ready=1, free=2 * MS)
    assert gate.refused(runs, asked(rows=8), 0) is not None  # in 2 + 2 + 4 ms
    assert gate.shut(8, 1) is None
    assert gate.refused(runs, asked(), 1) is None  # in 2 + 2 + 1 ms


def test_what_one_turn_has_waited_to_be_read_is_not_held_against_the_next() -> None:
    turns = Turns()
    turns.watch(Loop())  # type: ignore[arg-type]
    line: Line = Line(queue(4), lambda: 0)
    gate = Gate(line, limits=Limits(rows=99, n_bytes=1 << 20, concurrency=99, wait_ns=6 * MS), turns=turns)
    runs = Runs(calls=8, ready=1, free=1 * MS)
    turns.reads(0)
    turns.reads(10 * MS)  # the loop was held up between the two
    assert gate.refused(runs, asked(), 10 * MS) is not None  # in 1 + 2 + 1 ms, after 10
    assert gate.shut(8, 10 * MS + 1) is not None, "of the same turn"
    turns.since_ns = 11 * MS
    assert gate.shut(8, 11 * MS) is None


def test_what_comes_to_the_model_only_after_its_steps_shuts_it_for_nobody() -> None:
    line: Line = Line(queue(8), lambda: 0)
    gate = Gate(line, limits=Limits(rows=99, n_bytes=1 << 20, concurrency=99, wait_ns=6 * MS), turns=Turns())
    runs = Runs(calls=8, ready=1, free=3 * MS)
    assert gate.refused(runs, asked(), 1000 * MS, keeps=False) is not None
    assert gate.shut(8, 0) is None


def test_a_wait_that_nobody_saw_counts_for_a_part_of_a_short_objective_at_most() -> None:
    turns = Turns()
    turns.watch(Loop())  # type: ignore[arg-type]
    turns.unseen_ns = 4 * MS
    line: Line = Line(queue(4), lambda: 0)
    runs = Runs(calls=8, ready=1, free=1 * MS)
    turns.reads(100 * MS)
    for limit_ms, refused in ((4.0, True), (5.4, False), (7.9, False)):  # in 1 + 2 + 1 ms, and a quarter at most
        limits = Limits(rows=99, n_bytes=1 << 20, concurrency=99, wait_ns=int(limit_ms * MS))
        gate = Gate(line, limits=limits, turns=turns)
        assert (gate.refused(runs, asked(), 100 * MS) is not None) == refused


class Loop:
    """One whose turn does not end."""

    def call_soon(self, function: object) -> None:
        """It is called later."""


@dataclass(frozen=True)
class Runs:
    calls: int
    ready: int
    free: int = 0

    def free_ns(self, now_ns: int) -> int:
        return self.free
