"""When a run is said to hang, and that a process which stood still is not."""

from __future__ import annotations

from hasten.serve.patience import LAST_LOOK_NS, Patience

LIMIT_NS = 30 * 10**9
BEGAN_NS = 5


def left_ns(patience: Patience, after_ns: int, began_ns: int = BEGAN_NS) -> int:
    return patience.left_ns(began_ns, LIMIT_NS, began_ns + after_ns)


def test_a_run_in_time_is_looked_at_when_its_time_is_over() -> None:
    patience = Patience()
    assert left_ns(patience, 0) == LIMIT_NS
    assert left_ns(patience, LIMIT_NS - 1) == 1


def test_a_run_over_its_time_hangs_a_second_after_that_was_seen_however_often_it_is_looked_at() -> None:
    patience = Patience()
    stopped_ns = 100 * LIMIT_NS
    assert left_ns(patience, stopped_ns) == LAST_LOOK_NS
    assert left_ns(patience, stopped_ns) == LAST_LOOK_NS
    assert left_ns(patience, stopped_ns + LAST_LOOK_NS - 1) == 1
    assert left_ns(patience, stopped_ns + LAST_LOOK_NS) == 0
    assert left_ns(patience, stopped_ns + 2 * LAST_LOOK_NS) < 0


def test_each_run_is_given_its_own_second() -> None:
    patience = Patience()
    assert left_ns(patience, LIMIT_NS) == LAST_LOOK_NS
    later_ns = BEGAN_NS + LIMIT_NS + LAST_LOOK_NS // 2
    assert left_ns(patience, 1, later_ns) == LIMIT_NS - 1
    assert left_ns(patience, 7 * LIMIT_NS, later_ns) == LAST_LOOK_NS
