"""The nodes to leave in float: those that give most accuracy back for each millisecond they cost."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from hasten.artifact import Artifact, Json, Step
from hasten.errors import BuildFailed
from hasten.graph.costs import operators_of, price
from hasten.graph.model import read_model
from hasten.isolation import Limits, Progress, run_isolated
from hasten.measurement import Operator
from hasten.plan import Inputs, Part, Plan
from hasten.search.bench import Bench

PROFILED_RUNS = 20
"""Enough to order nodes by time; the trials that follow measure for real."""

SMALLEST_SHARE = 0.01
"""A node counts as losing at least this share of the average node's loss: profiles are not finer than that."""

Harm = Literal["error", "kl"]
"""KL divergence follows a metric of classes, squared error one of values."""


@dataclass(frozen=True, kw_only=True)
class NodeSensitivity:
    """What quantizing one node alone does to the outputs, on calibration samples."""

    node: str
    error: float
    """Squared error over squared magnitude. Errors of several nodes about add up."""
    kl: float | None
    """KL divergence of the softmaxed outputs, in nats; None where they have no axis of classes."""


def find_exclusions(bench: Bench, float_plan: Plan, int8_plan: Plan) -> tuple[tuple[str, ...], ...]:
    """Rank the nodes of a measured int8 plan and give the sets worth trying, small to large.

    Each set is a prefix of the next one. Both plans must have been measured, and end in the same engine.

    Raises:
        BuildFailed: the child that measures the nodes failed.
    """
    source, step = float_source(bench, int8_plan)
    found = sensitivity(
        source,
        replace(int8_plan.passes[-1], settings=dict(step.settings)),
        bench.task.inputs,
        limits=bench.task.build_limits,
        progress=bench.progress,
    )
    nodes = [item.node for item in found]
    lost = milliseconds_lost(
        nodes, _profile(bench, float_plan), _profile(bench, int8_plan), node_operations(source, nodes)
    )
    return exclusion_sets(rank(found, lost, by="kl" if bench.task.metric.classes else "error"))


def sensitivity(
    source: Artifact, part: Part, inputs: Inputs, *, limits: Limits, progress: Progress | None = None
) -> tuple[NodeSensitivity, ...]:
    """Measure in a child process what each node of ``source`` alone loses when it is quantized as ``part`` says.

    Args:
        source: The float model, as the quantizing pass takes it.
        part: "quantize-static" or "quantize-dynamic" with its settings.
        inputs: The store, and the folder of the calibrate split.
        limits: Of the child.
        progress: Told which node is at work.

    Raises:
        BuildFailed: there are no samples, or the child failed.
    """
    if inputs.samples is None:
        raise BuildFailed("exclusions", "there are no calibration samples to measure nodes with")
    found: Json = run_isolated(
        "hasten.passes.sensitivity:sensitivities_in_child",
        limits=limits,
        progress=progress,
        source=source.digest,
        store=str(inputs.store.root),
        samples=str(inputs.samples),
        name=part.name,
        values=part.settings,
    )
    return msgspec.convert(found, tuple[NodeSensitivity, ...])


def node_times(operators: Sequence[Operator], nodes: Collection[str]) -> dict[str, float]:
    """Give the nanoseconds of each of ``nodes`` that a profile tells of.

    An operator belongs to the nodes that it names as its sources; where it names none of them, to the one whose name
    its own name contains. Several share its time equally. A node that no timed operator stands for is left out.
    """
    wanted = set(nodes)
    times: dict[str, float] = {}
    for operator in operators:
        if operator.time_ns is None:
            continue
        owners = [name for name in operator.sources if name in wanted] or _by_name(operator.name, wanted)
        for name in owners:
            times[name] = times.get(name, 0.0) + operator.time_ns / len(owners)
    return times


def milliseconds_lost(
    nodes: Sequence[str],
    float_operators: Sequence[Operator],
    int8_operators: Sequence[Operator],
    operations: Mapping[str, float],
) -> dict[str, float]:
    """Give for each node how many milliseconds longer the model runs with it in float.

    A node without a time in both profiles gets its share, by arithmetic operations, of the whole difference.
    """
    slow, fast = node_times(float_operators, nodes), node_times(int8_operators, nodes)
    whole = sum(op.time_ns or 0.0 for op in float_operators) - sum(op.time_ns or 0.0 for op in int8_operators)
    total = sum(operations.get(name, 0.0) for name in nodes)
    lost = {}
    for name in nodes:
        if name in slow and name in fast:
            lost[name] = (slow[name] - fast[name]) / 1e6
        else:
            share = operations.get(name, 0.0) / total if total else 1 / len(nodes)
            lost[name] = share * whole / 1e6
    return lost


def rank(
    sensitivities: Sequence[NodeSensitivity], ms_lost: Mapping[str, float], *, by: Harm = "error"
) -> tuple[str, ...]:
    """Order nodes by error removed for each millisecond lost, the best first.

    A node that would not get slower counts as losing a small share of the average: with so little harm in it, leaving
    it in float must not come before the node that ruins the outputs.
    """
    average = sum(max(ms_lost[item.node], 0.0) for item in sensitivities) / max(len(sensitivities), 1)
    least = average * SMALLEST_SHARE or 1.0

    def gain(item: NodeSensitivity) -> float:
        harm = item.kl if by == "kl" and item.kl is not None else item.error
        return harm / max(ms_lost[item.node], least)

    return tuple(item.node for item in sorted(sensitivities, key=gain, reverse=True))


def exclusion_sets(ranked: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Give the first 1, 2, 4, 8, ... nodes, short of all: a model wholly in float is no int8 model."""
    sizes = []
    size = 1
    while size < len(ranked):
        sizes.append(size)
        size *= 2
    return tuple(tuple(ranked[:size]) for size in sizes)


def node_operations(source: Artifact, nodes: Collection[str]) -> dict[str, float]:
    """Give the arithmetic operations of each node that can be priced, for one sample."""
    wanted = set(nodes)
    model = read_model(source)
    return {
        operator.name: operations
        for operator in operators_of(model, {})
        if operator.name in wanted and (operations := price(operator).operations) is not None
    }


def float_source(bench: Bench, plan: Plan) -> tuple[Artifact, Step]:
    """Give the float artifact that a built int8 plan quantized, and the step that did it.

    Raises:
        BuildFailed: the plan was not built, or does not quantize.
    """
    trial = bench.trials.get(plan.key)
    lineage = bench.task.store.get(trial.artifact).lineage if trial is not None and trial.artifact else ()
    for step in reversed(lineage):
        if plan.passes and step.name == plan.passes[-1].name and step.source is not None:
            return bench.task.store.get(step.source), step
    raise BuildFailed("exclusions", f"{plan} has not been built, or does not end in a quantizing pass")


def _profile(bench: Bench, plan: Plan) -> tuple[Operator, ...]:
    with bench.session(plan, bench.build(plan), name=plan.key) as session:
        return session.operators(PROFILED_RUNS)


def _by_name(name: str, nodes: set[str]) -> list[str]:
    """Give the node with the longest name that stands in an operator's name between bounds."""
    inside = [node for node in nodes if re.search(rf"(?<![0-9A-Za-z]){re.escape(node)}(?![0-9A-Za-z])", name)]
    return [max(inside, key=len)] if inside else []
