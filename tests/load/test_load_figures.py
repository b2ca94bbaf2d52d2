"""What a run says: counts, rates, percentiles; and when its own generator is not to be believed."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.errors import InvalidSetting
from hasten.load.figures import figures_of
from hasten.load.objective import Objective, read_objective
from load.runs import ERROR, OK, REFUSED, TIMEOUT, UNSENT, run_of

MS = 1e6
P99 = Objective(q=0.99, limit_ns=20 * MS)


def test_every_outcome_is_counted_and_all_but_answers_are_misses() -> None:
    outcomes = [OK] * 996 + [REFUSED, TIMEOUT, ERROR, ERROR]
    found = figures_of(run_of([MS] * 1000, outcomes=outcomes), P99)
    assert (found.ok, found.refused, found.timeouts, found.errors, found.unsent) == (996, 1, 1, 2, 0)
    assert found.verdict is not None
    assert found.verdict.misses == 4


def test_a_fast_refusal_makes_no_percentile_better() -> None:
    times = [50 * MS] * 400 + [1 * MS] * 600
    found = figures_of(run_of(times, outcomes=[OK] * 400 + [REFUSED] * 600))
    median = found.percentiles[0]
    assert median.value_ns is None
    assert "600 of 1000" in median.why


def test_rates_are_those_of_the_run() -> None:
    found = figures_of(run_of([MS] * 1000, gap_s=0.01))
    assert found.sent_rate == pytest.approx(100)
    assert found.ok_rate == pytest.approx(100, rel=0.01)
    assert found.rows_rate == pytest.approx(200, rel=0.01)


def test_what_was_never_sent_is_no_miss_and_the_rate_is_of_the_time_that_it_ran() -> None:
    outcomes = [OK] * 500 + [UNSENT] * 500
    found = figures_of(run_of([MS] * 1000, outcomes=outcomes, cut_short="the server is gone"), P99)
    assert (found.sent, found.unsent) == (500, 500)
    assert found.sent_rate == pytest.approx(100, rel=0.01)
    assert found.verdict is not None
    assert found.verdict.state == "MEETS"


def test_a_percentile_without_enough_requests_says_how_many_it_needs() -> None:
    found = figures_of(run_of([MS] * 100))
    names = {item.name: item for item in found.percentiles}
    assert names["p50"].value_ns == MS
    assert names["p99"].value_ns is None
    assert "459" in names["p99"].why


@pytest.mark.parametrize(
    ("n", "misses", "state"),
    [(459, 0, "MEETS"), (458, 0, "INCONCLUSIVE"), (662, 1, "MEETS"), (1000, 5, "INCONCLUSIVE"), (1000, 30, "MISSES")],
)
def test_an_objective_is_judged_by_the_binomial_test(n: int, misses: int, state: str) -> None:
    slow = set(np.linspace(0, n - 1, misses).astype(int).tolist())
    verdict = figures_of(run_of([30 * MS if at in slow else MS for at in range(n)]), P99).verdict
    assert verdict is not None
    assert verdict.state == state


def test_slow_requests_in_one_crowd_prove_less_than_as_many_apart() -> None:
    verdict = figures_of(run_of([30 * MS] * 30 + [MS] * 970), P99).verdict
    assert verdict is not None
    assert verdict.state == "INCONCLUSIVE"
    assert "30 of 1000 requests were over 20 ms, in crowds: they prove as much as" in verdict.why


@pytest.mark.parametrize(("late_ms", "state"), [(0.9, "MEETS"), (1.1, "INVALID")])
def test_a_generator_later_than_a_twentieth_of_the_objective_makes_the_run_invalid(late_ms: float, state: str) -> None:
    found = figures_of(run_of([5 * MS] * 1000, late_ns=late_ms * MS), P99)
    assert found.verdict is not None
    assert found.verdict.state == state
    assert (found.invalid is None) == (state == "MEETS")


@pytest.mark.parametrize(("late_ms", "believed"), [(0.4, True), (0.6, False)])
def test_without_an_objective_the_delay_may_move_no_percentile_by_a_twentieth(late_ms: float, believed: bool) -> None:
    found = figures_of(run_of([10 * MS] * 1000, late_ns=late_ms * MS))
    assert (found.invalid is None) == believed


def test_a_closed_loop_is_never_late() -> None:
    found = figures_of(run_of([MS] * 1000, late_ns=5 * MS, arrivals="closed:concurrency=4"))
    assert (found.issue_delay_p99_ns, found.invalid) == (None, None)


def test_a_closed_loop_proves_no_objective() -> None:
    """It stops asking while the server stalls (coordinated omission)."""
    found = figures_of(run_of([MS] * 5000, arrivals="closed:concurrency=1"), P99)
    assert found.verdict is not None
    assert found.verdict.state == "INVALID"
    assert "use --arrivals poisson" in found.verdict.why


def test_a_run_in_which_nothing_was_sent_has_figures() -> None:
    found = figures_of(run_of([0.0] * 3, outcomes=[UNSENT] * 3, cut_short="x"), P99)
    assert found.percentiles == ()
    assert found.verdict is not None
    assert found.verdict.state == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("text", "q", "limit_ns"),
    [
        ("p99 <= 20ms", 0.99, 2e7),
        ("p99.9<1s", 0.999, 1e9),
        (" p50 <= 500us ", 0.5, 5e5),
        ("p99.99 <= .5ms", 0.9999, 5e5),
    ],
)
def test_an_objective_is_read(text: str, q: float, limit_ns: float) -> None:
    found = read_objective(text)
    assert (found.q, found.limit_ns) == (pytest.approx(q), pytest.approx(limit_ns))
    assert read_objective(str(found)) == found


@pytest.mark.parametrize(
    "text", ["99 <= 20ms", "p99 >= 20ms", "p99 <= 20", "p0 <= 1ms", "p99 <= 0ms", "p100 <= 1ms", ""]
)
def test_what_is_no_objective_says_how_one_is_written(text: str) -> None:
    with pytest.raises(InvalidSetting, match="p99 <= 20ms"):
        read_objective(text)
