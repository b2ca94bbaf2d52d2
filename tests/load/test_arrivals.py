"""Arrival plans: read from a line, fixed by their seed, and of the rate that they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import BadInput, InvalidSetting, UnknownName
from hasten.load.arrivals import Burst, Closed, Constant, Poisson, Ramp, Trace, read_arrivals
from hasten.load.record import write_run
from load.runs import run_of

RATES = st.floats(0.5, 5000)
OPEN = st.one_of(
    st.builds(Poisson, rate=RATES),
    st.builds(Constant, rate=RATES),
    st.builds(Burst, rate=RATES, size=st.integers(1, 100), every_s=st.floats(0.01, 5)),
    st.builds(Ramp, from_rate=RATES, to_rate=RATES),
)


@given(plan=OPEN, duration_s=st.floats(0.01, 5), seed=st.integers(0, 2**31))
def test_due_times_ascend_within_the_run_and_are_those_of_the_seed(plan, duration_s: float, seed: int) -> None:
    due = plan.due_ns(duration_s, seed)
    assert due.dtype == np.int64
    assert (np.diff(due) >= 0).all()
    assert ((due >= 0) & (due <= duration_s * 1e9)).all()
    np.testing.assert_array_equal(due, plan.due_ns(duration_s, seed))


@given(plan=st.one_of(OPEN, st.builds(Closed, concurrency=st.integers(1, 1000))))
def test_a_plan_is_read_back_from_its_line(plan) -> None:
    assert str(read_arrivals(str(plan))) == str(plan)


@given(rate=st.floats(1, 2000), duration_s=st.integers(1, 20), seed=st.integers(0, 1000))
def test_poisson_arrivals_are_as_many_as_their_rate_says(rate: float, duration_s: int, seed: int) -> None:
    mean = rate * duration_s
    count = len(Poisson(rate=rate).due_ns(duration_s, seed))
    assert abs(count - mean) <= 6 * np.sqrt(mean) + 6  # six standard deviations: about 1 in 10^9


def test_the_gaps_of_poisson_arrivals_are_exponential() -> None:
    gaps = np.diff(Poisson(rate=1000).due_ns(20, seed=3)) / 1e9
    assert np.mean(gaps) == pytest.approx(1e-3, rel=0.03)
    assert np.std(gaps) == pytest.approx(1e-3, rel=0.03)
    assert np.mean(gaps > 2e-3) == pytest.approx(np.exp(-2), rel=0.06)


@pytest.mark.parametrize(("rate", "duration_s", "count"), [(10, 3.0, 30), (10, 0.1, 1), (1000, 0.3, 300), (3, 1.0, 3)])
def test_constant_arrivals_are_counted_out(rate: float, duration_s: float, count: int) -> None:
    due = Constant(rate=rate).due_ns(duration_s, seed=0)
    assert len(due) == count
    assert due[0] == 0


def test_bursts_come_at_one_instant_each() -> None:
    due = Burst(rate=1, size=20, every_s=0.5).due_ns(2.0, seed=0)
    times, counts = np.unique(due, return_counts=True)
    assert times[counts == 20].tolist() == [500_000_000, 1_000_000_000, 1_500_000_000]


@pytest.mark.parametrize(("first", "last"), [(100, 900), (900, 100), (500, 500)])
def test_a_ramp_has_the_rate_of_each_moment(first: float, last: float) -> None:
    due = Ramp(from_rate=first, to_rate=last).due_ns(40.0, seed=1) / 1e9
    for start in (0, 10, 20, 30):
        wanted = 10 * (first + (last - first) * (start + 5) / 40)
        assert abs(np.sum((due >= start) & (due < start + 10)) - wanted) < 6 * np.sqrt(wanted)


def test_a_trace_is_the_times_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "times.txt").write_text("0\n0.25\n0.25\n1.5\n")
    plan = read_arrivals(f"trace:{tmp_path / 'times.txt'}")
    assert plan.due_ns(1.0, 0).tolist() == [0, 250_000_000, 250_000_000]


def test_a_recorded_run_is_a_trace(tmp_path: Path) -> None:
    run = run_of([1e6] * 5)
    write_run(run, tmp_path / "run")
    due = Trace(path=tmp_path / "run").due_ns(100.0, 0)
    np.testing.assert_array_equal(due, run.requests.scheduled_ns)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no time in seconds|is empty"),
        ("0\nsoon\n", "one time in seconds on each line"),
        ("1\n0.5\n", "ascending"),
        ("nan\n", "finite"),
        ("-1\n", "0 or more"),
        ("7\n", "after the 1 s of this run"),
    ],
)
def test_a_bad_trace_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "times.txt").write_text(text)
    with pytest.raises(BadInput, match=said):
        Trace(path=tmp_path / "times.txt").due_ns(1.0, 0)


def test_a_trace_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_arrivals(f"trace:{tmp_path / 'none'}").due_ns(1.0, 0)


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("poison:rate=3", UnknownName, "did you mean 'poisson'"),
        ("poisson", InvalidSetting, "write it as poisson:rate=200"),
        ("poisson:rate=0", InvalidSetting, "above 0"),
        ("poisson:rate=nan", InvalidSetting, "above 0"),
        ("poisson:rate=inf", InvalidSetting, "above 0"),
        ("poisson:rate=5,seed=3", InvalidSetting, "needs rate and nothing else"),
        ("poisson:rate=5,rate=6", InvalidSetting, "cannot be read"),
        ("burst:rate=5,size=2.5,every=2s", InvalidSetting, "write it as burst"),
        ("burst:rate=5,size=2,every=2", InvalidSetting, "time with its unit"),
        ("closed:concurrency=0", InvalidSetting, "1 or more"),
        ("trace:", InvalidSetting, "trace:times.txt"),
    ],
)
def test_a_bad_line_says_how_it_is_written(line: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        read_arrivals(line)


@pytest.mark.parametrize("line", ["poisson:rate=1e9", "constant:rate=1e9", "burst:rate=1,size=20000000,every=1ms"])
def test_a_plan_of_too_many_requests_takes_no_memory(line: str) -> None:
    with pytest.raises(InvalidSetting, match="at most"):
        read_arrivals(line).due_ns(3600.0, 0)
