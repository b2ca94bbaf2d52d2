"""The frontier: what nobody beats, and nothing that only seems ahead."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.search.frontier import frontier, levels
from hasten.search.result import Goal

from .trials import ORIGINAL, trial

GOAL = Goal()

trials = st.lists(
    st.tuples(st.integers(1, 400), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=12, unique=True
).map(lambda rows: [trial(speed / 100, drop / 100, passes=n, mark=i) for i, (speed, drop, n) in enumerate(rows)])


def test_a_faster_lossless_plan_stands_before_the_original() -> None:
    fast = trial(2.0, 0.0, mark=1)
    assert frontier([ORIGINAL, fast], GOAL, original=ORIGINAL.key) == (fast.key, ORIGINAL.key)


def test_a_twin_that_measures_a_hair_faster_takes_nobodys_place() -> None:
    twin = trial(1.012, 0.0, passes=1)
    assert frontier([ORIGINAL, twin], GOAL, original=ORIGINAL.key) == (ORIGINAL.key,)


def test_speed_bought_with_quality_stands_beside_speed_without() -> None:
    lossy, plain = trial(3.0, 0.02, mark=1), trial(2.0, 0.0, mark=2)
    assert frontier([plain, lossy], GOAL, original=ORIGINAL.key) == (lossy.key, plain.key)


def test_what_is_slower_and_worse_is_not_shown() -> None:
    lossy, plain = trial(1.5, 0.02, mark=1), trial(2.0, 0.0, mark=2)
    assert lossy.key not in frontier([ORIGINAL, plain, lossy], GOAL, original=ORIGINAL.key)


def test_failed_and_skipped_trials_are_not_on_the_frontier() -> None:
    failed = replace(trial(9.0, 0.0, mark=1), outcome="failed", reason="it crashed", measurement=None)
    assert frontier([ORIGINAL, failed], GOAL, original=ORIGINAL.key) == (ORIGINAL.key,)


def test_a_candidate_that_scores_better_by_chance_is_not_preferred_for_it() -> None:
    lucky, plain = trial(2.0, -0.01, passes=3), trial(2.0, 0.0, passes=1)
    assert frontier([plain, lucky], GOAL, original=ORIGINAL.key) == (plain.key,)


@given(trials, st.randoms(use_true_random=False))
def test_the_order_of_trials_does_not_matter(found, random) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    assert frontier(found, GOAL, original=ORIGINAL.key) == frontier(shuffled, GOAL, original=ORIGINAL.key)


@given(trials)
def test_there_is_always_someone_on_the_frontier_and_nobody_clearly_ahead_of_it(found) -> None:
    keys = frontier(found, GOAL, original=ORIGINAL.key)
    by_key = {item.key: item for item in found}
    assert keys
    best = max((by_key[key].measurement.speedup for key in keys), key=lambda speed: speed.value)
    assert max(item.measurement.speedup.value for item in found) <= best.value * 1.0501
    least = min(max(0.0, by_key[key].measurement.quality.drop.value) for key in keys)
    assert min(max(0.0, item.measurement.quality.drop.value) for item in found) == pytest.approx(least)


@given(st.lists(st.floats(0.991, 1.009), min_size=2, max_size=6), st.floats(1.2, 20.0))
def test_twins_measured_anew_give_the_same_frontier(noise, speed) -> None:
    twins = [trial(speed * factor, 0.0, passes=3, mark=i + 1) for i, factor in enumerate(noise)]
    found = frontier([ORIGINAL, *twins], GOAL, original=ORIGINAL.key)
    again = [trial(speed / factor, 0.0, passes=3, mark=i + 1) for i, factor in enumerate(noise)]
    assert found == frontier([ORIGINAL, *again], GOAL, original=ORIGINAL.key)


def test_what_is_faster_beyond_doubt_stands_on_a_level_of_its_own() -> None:
    slow, middle, fast = (trial(s, 0.0, passes=1, mark=i) for i, s in enumerate((2.0, 2.1, 2.2)))
    assert levels([slow, middle, fast], GOAL) == {fast.key: 0, middle.key: 1, slow.key: 2}


def test_a_noisy_leader_does_not_pull_much_slower_plans_up_to_its_level() -> None:
    noisy, slower = trial(2.84, 0.0, mark=1), trial(2.5, 0.0, mark=2)
    wide = replace(noisy.measurement.speedup, low=2.1, high=3.1)
    noisy = replace(noisy, measurement=replace(noisy.measurement, speedup=wide))
    assert levels([noisy, slower], GOAL) == {noisy.key: 0, slower.key: 1}


def test_plans_that_run_the_same_operators_share_the_speed_that_was_measured_most_precisely() -> None:
    lucky, sure = trial(3.9, 0.0, mark=1, skeleton="s"), trial(3.2, 0.0, mark=2, skeleton="s")
    wide = replace(lucky.measurement.speedup, low=2.0, high=4.4)
    lucky = replace(lucky, measurement=replace(lucky.measurement, speedup=wide))
    other = trial(3.5, 0.0, mark=3)
    assert levels([lucky, sure, other], GOAL) == {other.key: 0, lucky.key: 1, sure.key: 1}
