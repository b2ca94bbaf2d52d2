import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.measurement import Estimate, Latency
from hasten.report import format as fmt


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (None, "–"),
        (0.5, "0.500 ns"),
        (999.0, "999 ns"),
        (999.9e3, "1.00 ms"),
        (820e3, "820 µs"),
        (1.234e6, "1.23 ms"),
        (2e9, "2.00 s"),
    ],
)
def test_a_duration_has_three_digits_and_its_unit(ns: float | None, text: str) -> None:
    assert fmt.duration(ns) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (2_481_801, "2.48 MB"), (999_900, "1.00 MB")])
def test_a_size_has_three_digits_and_its_unit(count: int, text: str) -> None:
    assert fmt.size(count) == text


@given(st.floats(min_value=1e-3, max_value=1e12))
def test_a_written_duration_is_within_half_a_per_cent_of_the_number(ns: float) -> None:
    value, unit = fmt.duration(ns).split()
    assert float(value) * {"s": 1e9, "ms": 1e6, "µs": 1e3, "ns": 1.0}[unit] == pytest.approx(ns, rel=5.01e-3)


def test_a_drop_of_nothing_has_no_minus_sign() -> None:
    assert fmt.drop(Estimate(value=-0.0, low=-0.0, high=0.0, n=5)) == "0.00 % [0.00, 0.00]"


@pytest.mark.parametrize(
    ("s", "text"), [(0.42, "0.4 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")]
)
def test_a_wait_is_written_as_people_say_it(s: float, text: str) -> None:
    assert fmt.seconds(s) == text


def latency(slices: tuple[float, ...]) -> Latency:
    return Latency(
        median_ns=sorted(slices)[len(slices) // 2] if slices else 1.0,
        p90_ns=None,
        p99_ns=None,
        runs=len(slices),
        slices_ns=slices,
        first_run_ns=1.0,
        settled=True,
    )


def test_six_slices_are_the_fewest_that_enclose_a_median() -> None:
    assert fmt.median_interval(latency((1.0, 2.0, 3.0, 4.0, 5.0))) is None
    assert fmt.median_interval(latency((1.0, 2.0, 3.0, 4.0, 5.0, 6.0))) == (1.0, 6.0)


def test_the_interval_of_a_median_covers_at_least_95_per_cent_by_counting_coins() -> None:
    n = 41
    low, high = fmt.median_interval(latency(tuple(float(i) for i in range(1, n + 1)))) or (0.0, 0.0)
    k = int(low)
    assert high == n + 1 - k
    coverage = sum(math.comb(n, i) for i in range(k, n - k + 1)) / 2**n
    assert coverage >= 0.95
    assert sum(math.comb(n, i) for i in range(k + 1, n - k)) / 2**n < 0.95


def test_the_interval_always_holds_the_median_that_it_stands_beside() -> None:
    slow_slices = tuple(float(i) for i in range(10, 30))
    drifted = dataclasses.replace(latency(slow_slices), median_ns=7.0)
    assert (fmt.median_interval(drifted) or (0.0, 0.0))[0] == 7.0


def test_a_twin_that_does_not_cover_1_says_so() -> None:
    assert "does not cover 1" in fmt.twin(Estimate(value=0.97, low=0.94, high=0.998, n=20))
    assert "as it should" in fmt.twin(Estimate(value=0.99, low=0.94, high=1.001, n=20))


@pytest.mark.parametrize(
    ("s", "text"),
    [(0.4, "5 s"), (42, "40 s"), (57, "55 s"), (58, "1 min"), (131, "2 min"), (3570, "1 h"), (4300, "1 h 10 min")],
)
def test_a_wait_that_is_guessed_is_written_no_finer_than_it_is_known(s: float, text: str) -> None:
    assert fmt.roughly(s) == text
