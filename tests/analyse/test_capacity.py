"""The capacity model: its highest rate is where the objective breaks, more cores carry more, its sources are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import planted
import pytest

from hasten.analyse.batch_costs import costs_from_statistics, costs_of
from hasten.analyse.capacity import (
    Load,
    best_choices,
    choices,
    curve,
    highest_rate,
    point_at,
    replicas_for,
    saturated_rate,
)
from hasten.analyse.live import fitted
from hasten.analyse.simulate import Setup, closed, poisson, simulate
from hasten.errors import BadInput, InvalidSetting
from hasten.load.objective import Objective

LOAD = Load(requests=2500)
LIMIT = Objective(q=0.99, limit_ns=10e6)


def test_the_objective_holds_at_the_highest_rate_and_breaks_a_tenth_above() -> None:
    found = highest_rate(planted.service(), LIMIT, LOAD)
    at, above = (point_at(planted.service(), found.rate * k, LOAD, limit_ns=LIMIT.limit_ns) for k in (1.0, 1.1))
    assert (at.value_ns(0.99) or np.inf) <= LIMIT.limit_ns < (above.value_ns(0.99) or np.inf)
    assert 0 < found.rate < found.saturated


@pytest.mark.parametrize("q", [0.75, 0.98, 0.995, 0.999])
def test_any_percentile_may_be_the_objectives(q: float) -> None:
    few = replace(LOAD, requests=1000)
    found = highest_rate(planted.service(), Objective(q=q, limit_ns=20 * LIMIT.limit_ns), few)
    assert 0.5 * found.saturated < found.rate <= 1.05 * found.saturated
    asked = Objective(q=q, limit_ns=20 * LIMIT.limit_ns)
    assert replicas_for(2.5 * found.rate, planted.service(), asked, few).count is not None


def test_an_objective_below_the_bare_time_is_held_by_no_rate() -> None:
    assert highest_rate(planted.service(), Objective(q=0.99, limit_ns=0.5e6), LOAD).rate == 0.0


def test_latency_rises_along_the_curve_and_goodput_falls_behind_throughput() -> None:
    points = curve(planted.service(), LOAD, limit_ns=LIMIT.limit_ns)
    medians = [point.value_ns(0.5) or 0.0 for point in points]
    assert medians == sorted(medians)
    assert points[0].goodput == pytest.approx(points[0].throughput)
    assert points[-1].goodput < 0.9 * points[-1].throughput


def test_the_saturated_rate_is_what_the_largest_batches_give() -> None:
    setup = planted.service()
    assert saturated_rate(setup, LOAD) == pytest.approx(8 / (setup.costs.ns(8) / 1e9), rel=0.05)


def test_the_best_choice_uses_every_core_and_large_batches() -> None:
    costs = planted.costs()
    ranked = best_choices(choices([(1, costs)], cores=2), LIMIT, LOAD, keep=2)
    assert ranked[0].setup.instances == 2
    assert ranked[0].setup.sizes[-1] == 8
    assert [one.highest.rate for one in ranked[:2]] == sorted((one.highest.rate for one in ranked[:2]), reverse=True)


def test_choosing_from_nothing_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="no way"):
        best_choices([], LIMIT, LOAD)


def test_replicas_carry_what_one_cannot() -> None:
    one = highest_rate(planted.service(), LIMIT, LOAD).rate
    found = replicas_for(2.5 * one, planted.service(), LIMIT, LOAD)
    assert found.count == 3
    assert found.cores == 3 * planted.service().cores


def test_no_number_of_replicas_makes_a_model_quicker_than_itself() -> None:
    assert replicas_for(100.0, planted.service(), Objective(q=0.99, limit_ns=0.5e6), LOAD).count is None


def test_costs_read_from_records_are_those_that_were_simulated() -> None:
    setup = planted.service()
    runs = [planted.record(simulate(setup, poisson(rate, 4000, seed=1), seed=1)) for rate in (600, 1500)]
    saturated = planted.record(simulate(setup, closed(32, 3000), seed=2))
    alone = planted.record(simulate(setup, closed(1, 500), seed=3))
    found = costs_of(runs, alone=alone, saturated=saturated)
    assert set(found.sizes) == {1, 2, 4, 8}
    for size in found.sizes:
        assert found.ns(size) == pytest.approx(setup.costs.ns(size), rel=0.03)
    assert float(np.median(found.outside_ns)) == pytest.approx(float(np.median(setup.costs.outside_ns)), rel=0.15)


@pytest.mark.parametrize("largest", [1, 8])
def test_runs_of_tens_of_microseconds_told_in_whole_ones_are_not_taken_for_one_another(largest: int) -> None:
    quick = planted.costs(largest=largest)
    busy = (tuple(0.08 * ns for ns in quick.busy_ns[0]),)  # 80 us for a row
    costs = replace(quick, busy_ns=busy, between_ns=50_000.0)
    setup = Setup(costs=costs, instances=1, cores=2, sizes=costs.sizes)
    run = planted.record(simulate(setup, closed(32, 6000), seed=2))
    told = np.where(run.requests.phases_ns > 0, run.requests.phases_ns // 1000 * 1000, run.requests.phases_ns)
    found = costs_of([], saturated=replace(run, requests=replace(run.requests, phases_ns=told)))
    assert found.between_ns == pytest.approx(50_000, rel=0.1)


def test_a_model_read_from_records_predicts_the_service_that_made_them() -> None:
    setup = planted.service()
    runs = [planted.record(simulate(setup, poisson(rate, 4000, seed=1), seed=1)) for rate in (600, 1500)]
    costs = costs_of(runs, saturated=planted.record(simulate(setup, closed(32, 3000), seed=2)))
    model = replace(setup, costs=costs)
    assert highest_rate(model, LIMIT, LOAD).rate == pytest.approx(highest_rate(setup, LIMIT, LOAD).rate, rel=0.05)


def test_fitting_the_event_loop_brings_the_saturated_rate_to_what_was_measured() -> None:
    costs = planted.costs()

    def setup(with_costs: object) -> Setup:
        return Setup(costs=with_costs, instances=1, cores=1, sizes=costs.sizes)  # type: ignore[arg-type]

    before = saturated_rate(setup(costs), LOAD)
    fit = fitted(costs, 0.8 * before, load=Load(requests=2000), setup=setup)
    assert saturated_rate(setup(fit), LOAD) == pytest.approx(0.8 * before, rel=0.02)


def test_costs_from_a_servers_statistics_are_means_between_two_looks() -> None:
    def told(count: int, ns: int) -> dict[str, object]:
        batches = [{"batch_size": 2, "compute_infer": {"count": count, "ns": ns}}]
        return {"batch_stats": batches}

    found = costs_from_statistics(told(10, 1000), told(30, 61_000), outside_ns=5.0)
    assert found.sizes == (2,)
    assert found.ns(2) == 3000.0
    assert found.runs == 20
    with pytest.raises(BadInput, match="no runs"):
        costs_from_statistics(told(10, 1000), told(10, 1000), outside_ns=5.0)


def test_records_of_a_server_that_tells_nothing_give_no_costs() -> None:
    run = planted.record(simulate(planted.service(), poisson(300, 500, seed=0), seed=0), phases=False)
    with pytest.raises(BadInput, match="does not tell"):
        costs_of([run])
