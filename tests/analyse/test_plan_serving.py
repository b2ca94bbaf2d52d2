"""How to serve is chosen for an objective, measured on a real server, and written as a deployment that serves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hasten.analyse.batch_costs import BatchCosts
from hasten.analyse.costs_worker import sizes_for, threads_for
from hasten.analyse.highest_rate import Rules
from hasten.analyse.plan_serving import Wanted, in_server, plan_serving, read_candidate
from hasten.cli import app
from hasten.deployment import read_deployment
from hasten.errors import BadInput, InvalidSetting
from hasten.load.objective import read_objective
from hasten.samples import Samples
from serve.bundles import bundle

ROWS = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)


def silent(text: str, share: float | None) -> None:
    """Take what is told of progress."""


def costs(each_ns: float, **more: float) -> BatchCosts:
    return BatchCosts(
        sizes=(1, 2), busy_ns=((each_ns, 1.5 * each_ns),), residuals=np.ones(1), outside_ns=np.ones(1), **more
    )


def test_runs_take_longer_in_a_server_by_the_share_that_was_seen() -> None:
    found = in_server(costs(4e6), timed=costs(1e6), seen=costs(1.2e6, loop_ns=5.0, between_ns=7.0))
    assert found.ns(1) == pytest.approx(4.8e6)
    assert found.loop_ns == 5.0
    assert found.between_ns == 7.0


def test_threads_are_powers_of_two_within_the_cores(tmp_path: Path) -> None:
    deployment, _ = read_deployment(bundle(tmp_path / "net"))
    assert threads_for(deployment, 6) == (1, 2, 4, 6)
    assert threads_for(deployment, 1) == (1,)


def test_a_model_of_a_fixed_batch_has_one_size(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", batch=4)
    deployment, _ = read_deployment(path)
    assert sizes_for(deployment, path, (1, 2, 4, 8)) == (4,)


def test_an_objective_below_a_single_run_is_refused_before_any_server_is_up(tmp_path: Path) -> None:
    candidate = read_candidate(bundle(tmp_path / "net"), lambda artifact: Samples({"x": ROWS}))
    with pytest.raises(InvalidSetting, match="cannot be met"):
        plan_serving([candidate], Wanted(objective=read_objective("p99 <= 1us"), sizes=(1,)), progress=silent)


def test_planning_for_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="no deployment"):
        plan_serving([], Wanted(objective=read_objective("p99 <= 1s")), progress=silent)


@pytest.mark.slow
def test_the_best_way_is_measured_with_the_models_error_beside_it(tmp_path: Path) -> None:
    candidate = read_candidate(bundle(tmp_path / "net"), lambda artifact: Samples({"x": ROWS}))
    wanted = Wanted(
        objective=read_objective("p90 <= 900ms"),
        rate=100.0,
        sizes=(1, 2),
        rules=Rules(budget_s=3.0, least_s=0.5, most_s=1.0),
        measured=1,
    )
    found = plan_serving([candidate], wanted, progress=silent)
    assert found.chosen.found is not None
    assert found.chosen.found.steps
    assert found.serving.instances == found.chosen.instances == 1
    assert found.serving.batch_sizes == found.chosen.sizes
    assert found.settings["threads"] == 1
    assert found.replicas is not None


@pytest.mark.slow
def test_the_verb_writes_a_bundle_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", x=ROWS)
    path = bundle(tmp_path / "net")
    words = ["plan-serving", str(path), "--data", str(tmp_path / "data.npz"), "--slo", "p90 <= 900ms", "--cores", "1"]
    limits = ["--batch-sizes", "1,2", "--search", "2s", "--measured", "1"]
    assert app.run([*words, *limits, "-o", str(tmp_path / "chosen"), "--json"]) in (0, 3)
    document = json.loads(capsys.readouterr().out)
    deployment, _ = read_deployment(tmp_path / "chosen" / "deployment.toml")
    assert deployment.serving.instances == document["serving"]["instances"]
    assert list(deployment.serving.batch_sizes) == document["serving"]["batch_sizes"]


def test_the_chosen_bundle_may_not_replace_a_compared_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(tmp_path / "net")
    words = ["plan-serving", str(path), "--data", "x.npz", "--slo", "p99 <= 1s", "-o", str(tmp_path / "net")]
    assert app.run(words) == 1
    assert "another folder" in capsys.readouterr().err
