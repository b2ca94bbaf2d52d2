"""Long work of the event loop: in slices, one after the other, and others are seen to in between."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Generator
from typing import Any

import pytest

from hasten.serve import slices
from hasten.serve.slices import Slices, at_once


@pytest.fixture(autouse=True)
def one_step_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_NS", 0)


class Told:
    """What happened, in order."""

    def __init__(self) -> None:
        self.happened: list[Any] = []

    def work(self, name: str, steps: int, fails: bool = False) -> Generator[None, None, str]:
        for step in range(steps):
            self.happened.append(f"{name}{step}")
            yield
        if fails:
            raise ValueError(name)
        return name

    def done(self, outcome: str | Exception) -> None:
        self.happened.append(outcome if isinstance(outcome, str) else f"{type(outcome).__name__} {outcome}")

    async def turns(self, n: int) -> None:
        for _ in range(n):
            await asyncio.sleep(0)
            self.happened.append("others")


def test_work_is_done_one_after_the_other_with_others_in_between() -> None:
    told = Told()

    async def work() -> None:
        made = Slices()
        jobs = [
            made.do(told.work("a", 2), told.done, size=2),
            made.do(told.work("b", 1, fails=True), told.done, size=3),
        ]
        assert told.happened == ["a0"], "the first slice at once"
        await told.turns(5)
        assert all(job.over for job in jobs)
        assert made.do(told.work("c", 0), told.done, size=1).over, "nothing waits: it is done at once"

    asyncio.run(work())
    assert [each for each in told.happened if each != "others"] == ["a0", "a1", "a", "b0", "ValueError b", "c"]
    assert told.happened[:4] == ["a0", "a1", "others", "a"]


def test_what_is_small_is_done_before_the_next_slice_of_what_is_large() -> None:
    told = Told()

    async def work() -> None:
        made = Slices()
        made.do(told.work("large", 3), told.done, size=60_000_000)
        made.do(told.work("middle", 1), told.done, size=300_000)
        made.do(told.work("small", 1), told.done, size=200)
        made.do(told.work("also", 1), told.done, size=200)
        await told.turns(12)

    asyncio.run(work())
    each = ["large0", "small0", "small", "also0", "also", "middle0", "middle", "large1", "large2", "large"]
    assert [happened for happened in told.happened if happened != "others"] == each


def test_who_leaves_is_told_nothing_and_lets_go_of_what_it_held() -> None:
    told = Told()
    held = []

    def holds() -> Generator[None, None, None]:
        held.append("body")
        try:
            while True:
                yield
        finally:
            held.clear()

    async def work() -> None:
        made = Slices()
        first = made.do(holds(), told.done, size=1)
        second = made.do(told.work("b", 1), told.done, size=2)
        third = made.do(told.work("c", 1), told.done, size=3)
        assert held == ["body"]
        first.leave()
        assert held == []
        request = Told()
        kept = weakref.ref(request)
        made.do(told.work("d", 1), request.done, size=4).leave()
        del request
        assert kept() is None, "who would have been told is let go of too"
        second.leave()
        await told.turns(6)
        assert third.over

    asyncio.run(work())
    assert [each for each in told.happened if each != "others"] == ["c0", "c"]


def test_work_that_is_taken_on_by_who_is_told_waits_for_its_turn() -> None:
    told = Told()

    async def work() -> None:
        made = Slices()

        def more(outcome: str | Exception) -> None:
            told.done(outcome)
            made.do(told.work("c", 1), told.done, size=9)

        made.do(told.work("a", 1), more, size=1)
        made.do(told.work("b", 1), told.done, size=2)
        await told.turns(6)

    asyncio.run(work())
    assert [each for each in told.happened if each != "others"] == ["a0", "a", "b0", "b", "c0", "c"]


def test_a_defect_of_who_is_told_does_not_end_the_work_of_others() -> None:
    told = Told()

    def defect(outcome: str | Exception) -> None:
        raise RuntimeError("a defect")

    async def work() -> None:
        loop, seen = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))
        made = Slices()
        made.do(told.work("a", 1), defect, size=1)
        made.do(told.work("b", 1), told.done, size=2)
        await told.turns(6)
        assert [str(error) for error in seen] == ["a defect"]

    asyncio.run(work())
    assert "b" in told.happened


def test_work_at_once_gives_what_it_makes_and_raises_what_it_raises() -> None:
    told = Told()
    assert at_once(told.work("a", 3)) == "a"
    with pytest.raises(ValueError, match="b"):
        at_once(told.work("b", 3, fails=True))
