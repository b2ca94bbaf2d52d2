"""The batcher, driven by a clock of the test: nothing here sleeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hasten.serve.batching import NEVER, Batch, Batcher, Entry
from hasten.serve.costs import CostCurve
from hasten.serve.joining import Reused, cut, glue, join, split

MS = 1_000_000


def costs(*sizes: int, fixed_ms: float = 1.0, row_ms: float = 0.1) -> CostCurve:
    curve = CostCurve(sizes or (1, 2, 4, 8))
    for size in curve.sizes:
        curve.update(size, int((fixed_ms + row_ms * size) * MS))
    return curve


def entry(
    rows: int = 1, *, at: int = 0, due: int = NEVER, deadline: int = NEVER, priority: int = 1, width: int = 3
) -> Entry:
    x = np.full((rows, width), at, np.float32)
    made = Entry({"x": x}, rows, key=width, arrived_ns=at, priority=priority, n_bytes=x.nbytes)
    made.due_ns, made.deadline_ns = due, deadline
    return made


def filled(batcher: Batcher[Entry], entries: Sequence[Entry], *, now: int = 0) -> Batcher[Entry]:
    for one in entries:
        batcher.put(one, now)
    return batcher


def emptied(batcher: Batcher[Entry], now: int = 0) -> tuple[list[Batch[Entry]], list[Entry]]:
    """Take until nothing is left; gives the batches and what was dropped."""
    batches, dropped = [], []
    while True:
        taken = batcher.take(now)
        dropped += taken.dropped
        if taken.batch is None:
            if taken.again_ns == NEVER:
                return batches, dropped
            now = taken.again_ns
        else:
            batches.append(taken.batch)


requests = st.builds(
    entry,
    st.integers(1, 8),
    at=st.integers(0, 5 * MS),
    due=st.one_of(st.just(NEVER), st.integers(0, 40 * MS)),
    deadline=st.one_of(st.just(NEVER), st.integers(0, 40 * MS)),
    priority=st.integers(1, 3),
    width=st.sampled_from((2, 3)),
)


@given(st.lists(requests, max_size=40), st.booleans(), st.sets(st.integers(0, 39)))
def test_every_request_is_run_dropped_or_removed_exactly_once(
    entries: list[Entry], waits: bool, removed: set[int]
) -> None:
    batcher = filled(Batcher(costs(), waits=waits), entries)
    gone = [e for i, e in enumerate(entries) if i in removed and batcher.remove(e)]
    batches, dropped = emptied(batcher)
    ended = [e for batch in batches for e in batch.entries] + dropped + gone
    assert sorted(map(id, ended)) == sorted(map(id, entries))
    assert (batcher.rows, batcher.n_bytes) == (0, 0)


@given(st.lists(requests, max_size=40), st.booleans())
def test_batches_have_allowed_sizes_and_one_shape(entries: list[Entry], waits: bool) -> None:
    batches, _ = emptied(filled(Batcher(costs(), waits=waits), entries))
    for batch in batches:
        assert batch.size in (1, 2, 4, 8)
        assert batch.rows == sum(e.rows for e in batch.entries) <= batch.size
        assert len({e.key for e in batch.entries}) == 1


@given(st.lists(requests, max_size=40), st.booleans())
def test_no_request_overtakes_one_that_is_due_earlier_at_the_same_priority(entries: list[Entry], waits: bool) -> None:
    batches, _ = emptied(filled(Batcher(costs(), waits=waits), entries))
    for width in (2, 3):
        for priority in (1, 2, 3):
            due = [
                min(e.due_ns, e.deadline_ns)
                for batch in batches
                for e in batch.entries
                if (e.key, e.priority) == (width, priority)
            ]
            assert due == sorted(due)


@given(st.lists(requests, min_size=1, max_size=40))
def test_a_batch_begins_with_the_most_urgent_of_all_shapes(entries: list[Entry]) -> None:
    batcher = filled(Batcher(costs()), entries)
    taken = batcher.take(0)
    left = [e for e in entries if e not in taken.dropped]
    if taken.batch is not None:
        first = taken.batch.entries[0]
        assert min((e.priority, min(e.due_ns, e.deadline_ns)) for e in left) == (
            first.priority,
            min(first.due_ns, first.deadline_ns),
        )


@given(st.lists(requests, min_size=1, max_size=40), st.integers(0, 50 * MS))
def test_only_those_are_dropped_that_could_not_be_met_even_if_they_ran_next(entries: list[Entry], now: int) -> None:
    batcher = filled(Batcher(costs()), entries)
    taken = batcher.take(now)
    hopeless = [e for e in entries if e.deadline_ns < now + batcher.costs.ns(e.rows)]
    for late in taken.dropped:
        assert late in hopeless
    if taken.batch is not None and len(hopeless) < len(entries):
        assert not any(e in hopeless for e in taken.batch.entries)
    elif taken.batch is not None:
        (chosen,) = taken.batch.entries
        assert chosen.deadline_ns > now
        assert chosen.deadline_ns == max(e.deadline_ns for e in entries), "the one with the most time left"


@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.integers(0, 3))
def test_split_after_join_is_the_identity(lengths: list[int], padding: int) -> None:
    random = np.random.default_rng(0)
    feeds = [
        {"x": random.standard_normal((n, 3)).astype(np.float32), "y": random.integers(0, 9, (n, 2, 2))} for n in lengths
    ]
    rows = sum(lengths)
    entries = [Entry(feed, n, key=0, arrived_ns=0) for feed, n in zip(feeds, lengths, strict=True)]
    batch = Batch(entries, rows, rows + padding, 0)
    joined = join(batch, Reused())
    assert all(len(array) == rows + padding for array in joined.values())
    for feed, part in zip(feeds, split(joined, batch), strict=True):
        for name, array in feed.items():
            np.testing.assert_array_equal(part[name], array)


@given(st.integers(1, 50), st.integers(1, 9))
def test_a_large_request_is_cut_into_pieces_and_glued_again(rows: int, largest: int) -> None:
    feed = {"x": np.arange(rows * 2).reshape(rows, 2)}
    pieces = cut(feed, rows, largest)
    assert all(n == len(part["x"]) <= largest for part, n in pieces)
    np.testing.assert_array_equal(glue([part for part, _ in pieces])["x"], feed["x"])


def test_unaligned_rows_are_copied_before_an_engine_sees_them() -> None:
    body = b"?" + np.ones(3, np.float32).tobytes()
    x = np.frombuffer(body, np.float32, offset=1).reshape(1, 3)
    joined = join(Batch([Entry({"x": x}, 1, key=0, arrived_ns=0)], 1, 1, 0), Reused())
    assert joined["x"].flags.aligned


def test_without_an_objective_it_takes_what_is_there_at_once() -> None:
    batcher = filled(Batcher(costs()), [entry(), entry(), entry()])
    batch = batcher.take(0).batch
    assert batch is not None
    assert (batch.rows, batch.size) == (3, 4)


def test_a_lone_request_waits_for_another_that_is_expected_soon() -> None:
    batcher: Batcher[Entry] = Batcher(costs(), waits=True)
    now = 0
    for _ in range(60):  # arrivals 0.1 ms apart, taken one by one
        now += MS // 10
        batcher.put(entry(at=now, due=now + 50 * MS), now)
        batcher.empty()
    batcher.put(entry(at=now, due=now + 50 * MS), now + MS // 10)
    taken = batcher.take(now + MS // 10)
    assert taken.batch is None
    assert now < taken.again_ns < now + MS
    assert batcher.take(taken.again_ns).batch is not None, "the hope is given up"


def test_a_lone_request_does_not_wait_when_arrivals_are_rare() -> None:
    batcher = filled(Batcher(costs(), waits=True), [entry(due=50 * MS)])
    assert batcher.take(0).batch is not None


def test_waiting_never_makes_the_earliest_request_late() -> None:
    batcher: Batcher[Entry] = Batcher(costs(), waits=True)
    now = 0
    for _ in range(60):
        now += MS // 10
        batcher.put(entry(at=now), now)
        batcher.empty()
    due = now + batcher.costs.ns(2) + MS // 20
    batcher.put(entry(at=now, due=due), now)
    taken = batcher.take(now)
    assert taken.batch is None
    assert taken.again_ns + batcher.costs.ns(1) <= due


def test_a_full_batch_closes_at_once() -> None:
    batcher = filled(Batcher(costs(), waits=True), [entry(due=50 * MS) for _ in range(9)])
    batch = batcher.take(0).batch
    assert batch is not None
    assert batch.rows == 8


def test_a_batch_is_no_larger_than_its_most_urgent_request_can_wait_for() -> None:
    batcher = filled(Batcher(costs(row_ms=1.0)), [entry(due=int(3.5 * MS)), *[entry(due=90 * MS) for _ in range(7)]])
    batch = batcher.take(0).batch
    assert batch is not None
    assert batch.size == 2


def test_padding_that_costs_more_than_it_gains_is_not_taken() -> None:
    curve = CostCurve((1, 4, 8))
    for size, ms in ((1, 1.0), (4, 2.0), (8, 8.0)):
        curve.update(size, int(ms * MS))
    batch = filled(Batcher(curve), [entry() for _ in range(5)]).take(0).batch
    assert batch is not None
    assert batch.size == 4, "five rows padded to eight would take 8 ms; four take 2 and the fifth 1"


def served(batcher: Batcher[Entry], batch: Batch[Entry], true_ms: dict[int, float], slower: float = 1.0) -> None:
    batcher.costs.update(batch.size, int(slower * true_ms[batch.size] * MS))


def test_after_a_slowdown_requests_with_a_timeout_are_answered_again() -> None:
    batcher: Batcher[Entry] = Batcher(costs(1, fixed_ms=5.0, row_ms=0.0))
    for _ in range(20):  # the machine was busy
        batcher.costs.update(1, 100 * MS)
    assert batcher.costs.ns(1) > 60 * MS
    now, answered = 0, 0
    for _ in range(40):  # one at a time, on an idle instance
        now += 100 * MS
        batcher.put(entry(at=now, deadline=now + 60 * MS), now)
        taken = batcher.take(now)
        assert taken.batch is not None
        served(batcher, taken.batch, {1: 5.0})
        answered += not taken.dropped
    assert answered == 40
    assert batcher.costs.ns(1) < 10 * MS


def test_a_hopeless_request_is_not_run_while_another_has_hope() -> None:
    hopeless, hopeful = entry(deadline=MS), entry(deadline=50 * MS)
    taken = filled(Batcher(costs(1, fixed_ms=5.0)), [hopeless, hopeful]).take(0)
    assert taken.batch is not None
    assert (list(taken.batch.entries), list(taken.dropped)) == ([hopeful], [hopeless])


@given(st.integers(1, 60), st.sampled_from(((2.0, 3.0, 5.0, 8.0), (1.0, 1.9, 3.6, 6.8))), st.floats(1.5, 4.0))
def test_after_a_slowdown_the_cheapest_size_comes_back(slow_runs: int, times_ms: tuple[float, ...], by: float) -> None:
    true_ms = dict(zip((1, 2, 4, 8), times_ms, strict=True))
    curve = CostCurve(tuple(true_ms))
    for size, ms in true_ms.items():
        curve.update(size, int(ms * MS))
    batcher: Batcher[Entry] = Batcher(curve)
    for number in range(slow_runs + 600):  # saturated: there are always eight that wait
        filled(batcher, [entry() for _ in range(8 - batcher.rows)])
        batch = batcher.take(0).batch
        assert batch is not None
        served(batcher, batch, true_ms, slower=by if number < slow_runs else 1.0)
    sizes = []
    for _ in range(32):
        filled(batcher, [entry() for _ in range(8 - batcher.rows)])
        batch = batcher.take(0).batch
        assert batch is not None
        served(batcher, batch, true_ms)
        sizes.append(batch.size)
    assert sizes.count(8) >= 30


def test_a_full_batch_that_costs_more_is_tried_now_and_then() -> None:
    curve = CostCurve((4, 8))
    for size, ms in ((4, 4.0), (8, 9.0)):
        curve.update(size, int(ms * MS))
    batcher, sizes = Batcher[Entry](curve), []
    for _ in range(160):
        filled(batcher, [entry() for _ in range(8 - batcher.rows)])
        batch = batcher.take(0).batch
        assert batch is not None
        sizes.append(batch.size)
    assert 5 <= sizes.count(8) <= 20


def test_sizes_that_have_not_run_for_long_follow_a_change_of_the_machine() -> None:
    curve = costs(1, 4)
    one, four = curve.ns(1), curve.ns(4)
    for _ in range(200):
        curve.update(1, 3 * one)
    assert 2 * four < curve.ns(4) < 3.3 * four
    for _ in range(200):
        curve.update(1, one)
    assert abs(curve.ns(4) - four) < 0.1 * four, "nothing is left of it"


def test_fewer_rows_never_cost_more_than_more_of_them() -> None:
    curve = costs(1, 2, 4)
    for _ in range(20):
        curve.update(1, 100 * MS)
    assert curve.ns(1) == curve.ns(2) < curve.ns(4)


def test_expired_requests_are_found_wherever_they_wait() -> None:
    late = entry(deadline=MS, priority=3)
    batcher = filled(Batcher(costs()), [entry(), late, entry(width=2)])
    assert batcher.next_deadline_ns() == MS
    assert batcher.expire(MS) == [late]
    assert batcher.rows == 2


def test_removed_requests_hold_no_memory() -> None:
    batcher: Batcher[Entry] = Batcher(costs())
    batcher.put(entry(priority=1), 0)
    for _ in range(1000):
        one = entry(priority=2)
        batcher.put(one, 0)
        batcher.remove(one)
    assert sum(map(len, batcher._heaps.values())) < 200


stretches = st.tuples(st.sampled_from((1, 2, 4, 8)), st.integers(1, 1000), st.integers(1, 50))
"""So many runs of one size, each of so many microseconds: some sizes are stale meanwhile."""


@given(st.lists(stretches, min_size=1, max_size=12))
def test_it_makes_no_difference_whether_somebody_asks_between_the_runs(found: list[tuple[int, int, int]]) -> None:
    asked, silent = CostCurve((1, 2, 4, 8)), CostCurve((1, 2, 4, 8))
    for size, us, count in found:
        for _ in range(count):
            asked.update(size, us * 1000)
            asked.ns(1)
            silent.update(size, us * 1000)
    assert [asked.ns(rows) for rows in range(9)] == [silent.ns(rows) for rows in range(9)]


def test_the_cost_curve_follows_the_load_and_forgives_one_outlier() -> None:
    curve = costs(1)
    before = curve.ns(1)
    curve.update(1, 1000 * before)
    assert curve.ns(1) < 1.5 * before
    for _ in range(100):
        curve.update(1, 2 * before)
    assert abs(curve.ns(1) - 2 * before) < 0.05 * before


def test_sizes_that_never_ran_cost_in_proportion_to_the_nearest_that_did() -> None:
    curve = CostCurve((1, 4, 8))
    assert curve.ns(3) == 0
    curve.update(4, 4 * MS)
    assert [curve.ns(rows) for rows in (1, 2, 4, 5, 8, 99)] == [MS, 4 * MS, 4 * MS, 8 * MS, 8 * MS, 8 * MS]


def test_buffers_of_many_shapes_hold_bounded_memory() -> None:
    buffers, kind = Reused(), np.dtype(np.uint8)
    for length in range(200):
        buffers("x", (1 << 20, length % 7 + 1), kind)
        buffers("y", (length + 1, 1000), kind)
        assert sum(array.nbytes for array in buffers._kept.values()) <= Reused.LIMIT_BYTES
    assert buffers("z", (2, 3), kind) is buffers("z", (2, 3), kind)
    large = (Reused.LIMIT_BYTES + 1,)
    assert buffers("x", large, kind) is not buffers("x", large, kind)
