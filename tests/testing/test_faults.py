"""The engines that fail on purpose fail as they say, in a child process, and the parent lives on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hasten.artifact import Artifact
from hasten.errors import ChildCrashed, ChildHung, OutOfMemory
from hasten.isolation import Limits
from hasten.plan import Inputs, Part, Plan, run_plan, run_plan_isolated
from hasten.registry import load
from hasten.store import Store
from hasten.testing.contracts import check_engine
from hasten.testing.faults import SlowEngine, TwinEngine
from hasten.testing.models import mlp, random_samples, stored

pytestmark = pytest.mark.usefixtures("faulty_engines")

BRIEF = Limits(seconds=3.0)


@pytest.fixture
def source(store: Store) -> Artifact:
    return stored(mlp(), store)


def build(name: str, source: Artifact, store: Store, limits: Limits, **settings: object) -> Artifact:
    return run_plan_isolated(Plan(engine=Part(name, settings)), source, Inputs(store=store), limits=limits)


def test_a_crash_while_building_is_told_with_its_signal(source: Artifact, store: Store) -> None:
    with pytest.raises(ChildCrashed, match="SIGABRT"):
        build("crashing", source, store, Limits(seconds=30), when="apply")


def test_a_build_that_hangs_is_stopped(source: Artifact, store: Store) -> None:
    with pytest.raises(ChildHung):
        build("hanging", source, store, BRIEF, when="apply")


def test_a_build_that_takes_too_much_memory_is_stopped(source: Artifact, store: Store) -> None:
    with pytest.raises((OutOfMemory, ChildCrashed)):
        build("leaking", source, store, Limits(seconds=30, memory_bytes=300 << 20), when="apply", mebibytes=4096)


@pytest.mark.parametrize("name", ["crashing", "hanging", "leaking"])
def test_a_fault_in_runs_spares_the_build(name: str, source: Artifact, store: Store) -> None:
    assert build(name, source, store, Limits(seconds=30)).lineage[-1].name == name


def test_nan_fills_every_output(source: Artifact, store: Store) -> None:
    plan = Plan(engine=Part("nan"))
    session = plan.load_engine().open(run_plan(plan, source, Inputs(store=store)))
    assert np.isnan(session.run(random_samples(source, n=2).feed(slice(0, 2)))["y"]).all()


def test_the_twin_keeps_the_contract_of_an_engine(tmp_path: Path) -> None:
    assert load("engine", "twin") is TwinEngine
    check_engine(TwinEngine, tmp_path=tmp_path, models={"mlp": mlp})


def test_the_slow_engine_is_right(tmp_path: Path) -> None:
    check_engine(SlowEngine, tmp_path=tmp_path, models={"mlp": mlp})
