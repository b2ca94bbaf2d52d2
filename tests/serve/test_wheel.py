"""Coarse deadlines."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from hasten.serve.wheel import Wheel


class Thing:
    def __init__(self) -> None:
        self.deadline_s = inf
        self.slot = 0


moves = st.lists(st.tuples(st.integers(0, 3), st.one_of(st.just(inf), st.floats(0, 50)), st.floats(0, 5)), max_size=40)


@given(moves)
def test_each_deadline_is_found_once_never_early_and_at_most_a_tick_late(
    steps: list[tuple[int, float, float]],
) -> None:
    now, things = 0.0, [Thing() for _ in range(4)]
    wheel: Wheel[Thing] = Wheel(0.5, now)
    pending: dict[int, float] = {}
    for number, after, passed in steps:
        wheel.arm(things[number], now + after)
        pending[number] = now + after
        now += passed
        due = {things.index(thing) for thing in wheel.advance(now)}
        assert due <= {key for key, deadline in pending.items() if deadline <= now}
        assert due >= {key for key, deadline in pending.items() if deadline <= now - 1.0}
        pending = {key: deadline for key, deadline in pending.items() if key not in due}


def test_what_was_forgotten_is_never_due() -> None:
    wheel: Wheel[Thing] = Wheel(0.5, 0.0)
    thing = Thing()
    wheel.arm(thing, 1.0)
    wheel.forget(thing)
    assert wheel.advance(100.0) == []
