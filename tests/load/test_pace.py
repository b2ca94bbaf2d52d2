"""How requests leave: to the microsecond, whatever became of those before; with a sender that only takes notes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter_ns

import numpy as np
import pytest

from hasten.load.clock import precise_loop
from hasten.load.pace import Course, Pace
from hasten.load.recorder import MOST_REASONS, Recorder, phases_told

OK, REFUSED, TIMEOUT, ERROR, UNSENT = range(5)


class Notes:
    """A sender that does with each request what it is told."""

    def __init__(self, does: Callable[[Notes, int], None]) -> None:
        self.does = does
        self.sent: list[int] = []
        self.payloads: list[int] = []
        self.withdrawn: list[int] = []
        self.settled = False

    async def open(self) -> None:
        """Nothing to open."""

    def begin(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def send(self, index: int, payload: int) -> None:
        self.sent.append(index)
        self.payloads.append(payload)
        self.recorder.let_go(index)
        self.does(self, index)

    def withdraw(self, index: int) -> None:
        assert len(self.sent) > index + 1, "the others have left before"
        self.withdrawn.append(index)

    def settle(self, recorder: Recorder) -> None:
        self.settled = True

    def close(self) -> None:
        """Nothing to close."""


def answered(notes: Notes, index: int) -> None:
    notes.recorder.answer(index, OK, 200, 10)


def never(notes: Notes, index: int) -> None:
    """Say nothing."""


def course(due_ms: list[float], *, samples: int = 3, concurrency: int = 0, **more_ns: int) -> Course:
    told = {"duration_ns": 20_000_000, "timeout_ns": 10**10, "began_ns": 0, **more_ns}
    due = (np.array(due_ms) * 1e6).astype(np.int64)
    return Course(due_ns=due, samples=np.arange(samples, dtype=np.int64), concurrency=concurrency, **told)


def go(what: Course, notes: Notes, then: Callable[[Pace], None] = lambda pace: None) -> Pace:
    loop = precise_loop()

    async def work() -> Pace:
        pace = Pace(replace(what, began_ns=perf_counter_ns()), notes, loop, lambda *args: None)
        then(pace)
        await asyncio.wait_for(pace.go(), 30)
        return pace

    try:
        return loop.run_until_complete(work())
    finally:
        loop.close()


def test_every_request_leaves_when_it_is_due_and_none_before() -> None:
    notes = Notes(answered)
    pace = go(course([0, 0, 1, 5.5, 12]), notes)
    sent = np.array(pace.recorder.sent[:5])
    assert notes.sent == [0, 1, 2, 3, 4]
    assert (sent >= np.array(pace.scheduled)).all()
    assert notes.payloads == [0, 1, 2, 0, 1]
    assert notes.settled


@pytest.mark.parametrize("spin_s", [0.0, 0.002])
def test_a_loop_wakes_neither_early_nor_by_the_millisecond(spin_s: float) -> None:
    loop = precise_loop(spin_s=spin_s)
    late: list[float] = []

    async def wait() -> None:
        for _ in range(40):
            due = loop.time() + 0.0004
            woken = loop.create_future()
            loop.call_at(due, woken.set_result, None)
            await woken
            late.append(loop.time() - due)

    loop.run_until_complete(wait())
    loop.close()
    assert min(late) >= 0
    assert np.quantile(late, 0.1) < 0.0005  # asyncio's own: up to 1 ms, here 600 µs


def test_a_request_without_an_answer_delays_none_after_it() -> None:
    notes = Notes(lambda notes, index: None if index == 0 else answered(notes, index))
    pace = go(course([0, 1, 2, 3], timeout_ns=50_000_000), notes)
    assert pace.recorder.outcome.tolist()[:4] == [TIMEOUT, OK, OK, OK]
    assert notes.withdrawn == [0]


def test_a_run_without_requests_ends() -> None:
    assert go(course([]), Notes(answered)).cut_short is None


def test_a_run_that_is_stopped_ends_when_what_is_under_way_has() -> None:
    notes = Notes(never)
    loop_calls: list[Pace] = []

    def then(pace: Pace) -> None:
        loop_calls.append(pace)
        loop = asyncio.get_running_loop()
        loop.call_later(0.03, pace.stop, "it was stopped")
        loop.call_later(0.06, lambda: [answered(notes, index) for index in notes.sent])

    pace = go(course([0, 1, 5000], duration_ns=5 * 10**9), notes, then)
    assert pace.cut_short == "it was stopped"
    assert pace.recorder.outcome.tolist()[:3] == [OK, OK, UNSENT]


def test_a_server_that_nobody_reaches_for_a_second_ends_the_run_and_one_that_comes_back_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hasten.load.pace.DEAD_S", 0.2)
    gone = Notes(lambda notes, index: notes.recorder.fail(index, "refused", unreached=True))
    due = [at * 2.0 for at in range(400)]
    pace = go(course(due, duration_ns=8 * 10**8), gone)
    assert pace.cut_short is not None
    assert "every attempt failed: refused" in pace.cut_short
    assert len(gone.sent) < 400

    def flickers(notes: Notes, index: int) -> None:
        if index % 10 == 9:
            answered(notes, index)
        else:
            notes.recorder.fail(index, "refused", unreached=True)

    pace = go(course(due, duration_ns=8 * 10**8), Notes(flickers))
    assert pace.cut_short is None

    def slow(notes: Notes, index: int) -> None:
        if index == 0:
            notes.recorder.fail(index, "refused", unreached=True)
        else:
            asyncio.get_running_loop().call_later(0.5, answered, notes, index)

    pace = go(course(due[:200], duration_ns=4 * 10**8), Notes(slow))
    assert pace.cut_short is None, "one attempt that failed says nothing of those that still wait for their answers"


def test_a_generator_that_cannot_keep_the_rate_gives_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.load.pace.LATE_S", 0.02)

    def slowly(notes: Notes, index: int) -> None:
        until = perf_counter_ns() + 2_000_000
        while perf_counter_ns() < until:
            pass
        answered(notes, index)

    pace = go(course([at * 0.001 for at in range(5000)]), Notes(slowly))
    assert pace.cut_short is not None
    assert "too slow for this rate" in pace.cut_short
    assert pace.recorder.outcome.tolist()[4999] == UNSENT


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_closed_loop_sends_the_next_when_one_has_ended(concurrency: int) -> None:
    most = 0

    def later(notes: Notes, index: int) -> None:
        nonlocal most
        under_way = len(notes.sent) - sum(1 for at in notes.recorder.done if at >= 0)
        most = max(most, under_way)
        asyncio.get_running_loop().call_later(0.001, answered, notes, index)

    pace = go(course([], concurrency=concurrency, duration_ns=300_000_000), Notes(later))
    assert most == concurrency
    assert len(pace.scheduled) > concurrency
    assert (np.array(pace.scheduled) < 301_000_000 + 10**9).all()
    assert pace.recorder.outcome.tolist()[: len(pace.scheduled)] == [OK] * len(pace.scheduled)


def test_a_closed_loop_goes_on_after_refusals() -> None:
    pace = go(
        course([], concurrency=2, duration_ns=100_000_000),
        Notes(lambda notes, index: notes.recorder.answer(index, REFUSED, 503, 0)),
    )
    assert len(pace.scheduled) > 2


def test_garbage_is_collected_again_after_a_run() -> None:
    assert gc.isenabled()
    go(course([0]), Notes(lambda notes, index: (answered(notes, index), _assert_off())[0]))
    assert gc.isenabled()


def _assert_off() -> None:
    assert not gc.isenabled()


def test_reasons_are_counted_and_bounded() -> None:
    recorder = Recorder(began_ns=0, ended=lambda index: None)
    recorder.room(1000)
    for index in range(1000):
        recorder.fail(index, "the same" if index % 2 else f"reason {index}")
    assert recorder.reasons["the same"] == 500
    assert len(recorder.reasons) <= MOST_REASONS + 1


@pytest.mark.parametrize(
    "told",
    [None, b"", b"infer", b"infer;dur=x", b"infer;dur=-1", b"other;dur=5", b"\xff;dur=1", b"infer;dur=" + b"9" * 5000],
)
def test_timing_that_says_nothing_is_minus_one(told: bytes | None) -> None:
    phases, rows, instance = phases_told([told])
    assert (phases == -1).all()
    assert (rows.tolist(), instance.tolist()) == ([-1], [-1])
