"""Intervals of ratios, simulated, and the exact binomial test behind every percentile."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import InvalidSetting, Untrusted
from hasten.measure.statistics import (
    autocorrelation,
    bootstrap_ratio,
    percentile_holds,
    percentile_or_none,
    quantile,
    runs_needed,
)

REPEATS = 400

NOISE = {
    "normal": lambda random, n: random.standard_normal(n),
    "heavy tails": lambda random, n: random.standard_t(2, n),
    "bursts of slowness": lambda random, n: random.standard_normal(n) + 8 * (random.random(n) < 0.1),
    "skewed": lambda random, n: random.exponential(size=n) - math.log(2),
    "autocorrelated": lambda random, n: autoregressive(random, n, 0.4),
}


def autoregressive(random, n, share):
    noise = random.standard_normal(n + 50)
    for i in range(1, n + 50):
        noise[i] += share * noise[i - 1]
    return noise[50:]


def coverage(kind, n, *, spread=0.01):
    """Share of seeded repeats whose interval holds the true ratio, 1."""
    hits = 0
    for seed in range(REPEATS):
        random = np.random.default_rng([seed, n])
        ratio = bootstrap_ratio(spread * NOISE[kind](random, n), seed=seed, asked=0.01)
        hits += ratio.low <= 1 <= ratio.high
    return hits / REPEATS


@pytest.mark.parametrize("n", [6, 10, 20])
@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
def test_the_interval_of_a_thing_with_itself_covers_1_in_about_95_percent_of_repeats(kind, n):
    assert 0.93 <= coverage(kind, n) <= 0.995


def test_a_skewed_noise_is_covered_too():
    assert coverage("skewed", 15) >= 0.93


@pytest.mark.parametrize("n", [3, 5])
def test_even_a_few_blocks_are_covered(n):
    assert coverage("normal", n) >= 0.93


def test_autocorrelated_blocks_widen_the_interval_so_that_it_still_covers():
    assert coverage("autocorrelated", 20) >= 0.90  # without the stretching: 0.85


def test_identical_blocks_give_an_interval_of_no_width():
    ratio = bootstrap_ratio([math.log(2)] * 8, seed=0, asked=0.01)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert (ratio.n, ratio.settled, ratio.wins, ratio.loses) == (8, True, True, False)


@given(st.lists(st.integers(-300, 300).map(lambda n: n / 1000), min_size=2, max_size=30), st.floats(-1, 1))
def test_a_ratio_lies_in_its_interval_and_scales_with_the_candidate(logs, shift):
    one, other = (bootstrap_ratio(np.array(logs) + s, seed=0, asked=0.01) for s in (0, shift))
    assert one.low <= one.value * (1 + 1e-12)
    assert one.value <= one.high * (1 + 1e-12)
    assert (other.value, other.low, other.high) == pytest.approx(
        tuple(math.exp(shift) * v for v in (one.value, one.low, one.high)), rel=1e-6
    )


def test_a_block_hit_by_something_else_moves_neither_estimate_nor_interval_far():
    logs = 0.005 * np.random.default_rng(0).standard_normal(20)
    hit = logs.copy()
    hit[3] = 2.0
    assert bootstrap_ratio(hit, seed=0, asked=0.01).high < 1.02


def test_the_same_seed_gives_the_same_interval():
    logs = 0.01 * np.random.default_rng(0).standard_normal(12)
    assert bootstrap_ratio(logs, seed=3, asked=0.01) == bootstrap_ratio(logs, seed=3, asked=0.01)


def test_a_ratio_is_settled_when_its_half_width_is_within_the_asked_share_of_it():
    logs = math.log(4) + 0.01 * np.random.default_rng(0).standard_normal(12)
    share = bootstrap_ratio(logs, seed=0, asked=1).half_width / bootstrap_ratio(logs, seed=0, asked=1).value
    assert bootstrap_ratio(logs, seed=0, asked=share * 1.01).settled
    assert not bootstrap_ratio(logs, seed=0, asked=share * 0.99).settled


@pytest.mark.parametrize("logs", [[], [0.1], [0.0, float("inf")], [0.0, float("nan")]])
def test_what_has_no_interval_is_not_reported(logs):
    with pytest.raises(Untrusted):
        bootstrap_ratio(logs, seed=0, asked=0.01)


def test_autocorrelation_is_found_where_it_is_and_not_where_it_is_not():
    random = np.random.default_rng(0)
    assert autocorrelation(autoregressive(random, 2000, 0.5)) == pytest.approx(0.5, abs=0.06)
    assert autocorrelation(random.standard_normal(2000)) < 0.06
    assert autocorrelation(np.zeros(10)) == 0


@pytest.mark.parametrize(
    ("q", "misses", "n"),
    [
        *((0.99, 0, 459), (0.99, 1, 662), (0.99, 5, 1307), (0.99, 10, 2010), (0.99, 100, 12571)),
        *((0.9, 0, 44), (0.9, 1, 64), (0.9, 5, 127), (0.9, 10, 197)),
        (0.999, 0, 4603),
    ],
)
def test_a_percentile_needs_so_many_runs(q, misses, n):
    assert runs_needed(q, misses) == n
    assert percentile_holds(n, misses, q)
    assert not percentile_holds(n - 1, misses, q)


@given(st.integers(1, 5000), st.integers(0, 50), st.sampled_from([0.5, 0.9, 0.99]))
def test_one_more_miss_never_helps_and_one_more_run_never_hurts(n, misses, q):
    misses = min(misses, n)
    holds = percentile_holds(n, misses, q)
    assert not (holds and not percentile_holds(n + 1, misses, q))
    assert holds or not percentile_holds(n, min(misses + 1, n), q)


def test_a_percentile_that_does_not_hold_is_claimed_in_one_percent_of_repeats_at_most():
    over = np.random.default_rng(0).binomial(1307, 0.01, size=4000)  # p99 is exactly at the limit
    assert np.mean([percentile_holds(1307, int(k), 0.99) for k in over]) <= 0.015


@pytest.mark.parametrize(("n", "misses", "q"), [(10, 11, 0.9), (10, -1, 0.9), (10, 0, 1.0), (10, 0, 0.0), (10, 0, 99)])
def test_impossible_numbers_are_refused(n, misses, q):
    with pytest.raises(InvalidSetting):
        percentile_holds(n, misses, q)


def test_no_run_proves_nothing():
    assert not percentile_holds(0, 0, 0.5)


def test_a_quantile_is_a_value_that_was_seen():
    values = np.arange(1, 101)
    assert (quantile(values, 0.9), quantile(values, 0.99), quantile(values, 0.5)) == (90, 99, 50)


def test_a_percentile_of_too_few_runs_is_none():
    assert percentile_or_none(np.arange(458), 0.99) is None
    assert percentile_or_none(np.arange(1, 460), 0.99) == 455
