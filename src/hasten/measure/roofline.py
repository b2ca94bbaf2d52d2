"""The machine's limit for a model, and how near each operator of an engine comes to it.

The roofline (S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model", CACM 2009):
an operator takes at least its operations over the peak, and its bytes over the bandwidth, whichever is longer. For
this to be a bound and not a guess, every byte is charged at the fastest place where it can be:

* activations were made a moment ago, so they may lie in the smallest cache that holds them: the rate measured for as
  many bytes as the operator's activations take;
* weights were last used one run ago, and all others since: the rate for as many bytes as all weights take;
* what is measured for an amount of data bounds every larger amount, so between two measured amounts the smaller's
  rate holds.

Operators run one after another, so their bounds add up. Times come from a profiled run, and ``measured_ns`` from runs
that were not profiled: what operators do not account for is the engine's own (``outside_ns``); where they account for
more, profiling has slowed them, and their times are scaled to the measured total (``profile_scale``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hasten.errors import BadInput
from hasten.graph.costs import Cost, kind_of, model_totals, price, width
from hasten.graph.products import PRODUCTS
from hasten.measurement import Bound, Limit, Operator, OperatorBound, Peaks

OVERHEAD = 4.0
"""An operator that takes more than this many times its bound is held by neither arithmetic nor memory."""

FLOOR_SLACK = 0.9
"""What ``floor_ns`` is lowered by: a peak measured beside other work may be some per cent under the true one."""


@dataclass(frozen=True)
class _Times:
    """Lower bounds of one operator, in nanoseconds."""

    cost: Cost
    arithmetic: float
    memory: float
    winograd: float
    """The bound at Winograd's cost."""

    @property
    def bound(self) -> float:
        return max(self.arithmetic, self.memory)


def bound(operators: Sequence[Operator], peaks: Peaks, measured_ns: float) -> Bound:
    """Hold a measured run against the machine's limit.

    Args:
        operators: What the engine runs, with its profiled times; one with a time of exactly 0 was optimized away.
        peaks: Of this host, for the run's thread count.
        measured_ns: Median time of a run that was not profiled.

    Raises:
        BadInput: ``measured_ns`` is not a positive number.
    """
    if not (math.isfinite(measured_ns) and measured_ns > 0):
        raise BadInput(f"a bound needs the measured time of a run, got {measured_ns} ns")
    weights = model_totals(operators).weight_bytes
    times = [_times(operator, peaks, weights) for operator in operators]
    profiled = math.fsum(operator.time_ns or 0.0 for operator in operators)
    scale = min(1.0, measured_ns / profiled) if profiled else 1.0
    parts = tuple(_part(op, of, scale) for op, of in zip(operators, times, strict=True))
    strict = _strict_ns(operators, times, peaks)
    return Bound(
        strict_ns=strict,
        grouped_ns=max(strict, math.fsum(of.bound for of in times)),
        winograd_ns=_winograd_ns(operators, times, peaks),
        measured_ns=measured_ns,
        outside_ns=max(0.0, measured_ns - math.fsum(part.time_ns or 0.0 for part in parts)),
        operators=parts,
        unpriced=tuple(
            dict.fromkeys(op.kind for op, of in zip(operators, times, strict=True) if of.cost.operations is None)
        ),
        profile_scale=scale,
    )


def floor_ns(operators: Sequence[Operator], peaks: Peaks, *, precision: str) -> float:
    """Give a time that no plan of a precision can beat at the peaks' thread count: such a plan need not be built.

    Counted is only what no fusion removes: products (convolutions at Winograd's cost, in floating point) and the
    model's inputs, outputs and weights once, these at the precision's width; less ``FLOOR_SLACK``.

    Args:
        operators: The untouched model's (``hasten.graph.costs.operators_of``), at the batch in question.
        peaks: Of this host.
        precision: "float32", "bfloat16", "float16" or "int8".
    """
    products = [price(operator) for operator in operators if kind_of(operator) in PRODUCTS]
    integer = precision == "int8"
    operations = math.fsum((c.operations if integer or c.winograd is None else c.winograd) or 0.0 for c in products)
    totals = model_totals(operators)
    narrow = min(1.0, width(precision) / 4)
    kept = totals.input_bytes + totals.output_bytes + totals.weight_bytes * narrow
    arithmetic = operations / operations_per_s(peaks, precision)
    return FLOOR_SLACK * 1e9 * max(arithmetic, kept / bytes_per_s(peaks, kept))


def operations_per_s(peaks: Peaks, dtype: str) -> float:
    """Give the peak of a dtype. Where it was not measured: that of float32 for float64, else the highest there is."""
    name = {"uint8": "int8", "float64": "float32"}.get(dtype, dtype)
    rates: Mapping[str, float] = peaks.operations_per_s
    return rates.get(name) or max(rates.values())


def bytes_per_s(peaks: Peaks, amount: float) -> float:
    """Give the highest rate at which ``amount`` bytes can be gone over again and again.

    It is that of the largest measured amount which is not larger; memory's, from four times the last of them on.
    """
    cached = peaks.cached_bytes_per_s
    if not cached or amount >= 4 * max(cached):
        return peaks.bytes_per_s
    fitting = [size for size in cached if size <= amount]
    return max(cached[max(fitting) if fitting else min(cached)], peaks.bytes_per_s)


def _times(operator: Operator, peaks: Peaks, all_weights: float) -> _Times:
    if operator.time_ns == 0:
        return _Times(Cost(operations=0.0, bytes=0.0, weights=0.0, dtype=operator.dtype), 0.0, 0.0, 0.0)
    cost = price(operator)
    rate = operations_per_s(peaks, cost.dtype)
    activations = cost.bytes - cost.weights
    memory = max(
        1e9 * activations / bytes_per_s(peaks, activations), 1e9 * cost.weights / bytes_per_s(peaks, all_weights)
    )
    arithmetic = 1e9 * (cost.operations or 0.0) / rate
    winograd = arithmetic if cost.winograd is None else 1e9 * cost.winograd / rate
    return _Times(cost, arithmetic, memory, max(winograd, memory))


def _part(operator: Operator, of: _Times, scale: float) -> OperatorBound:
    time_ns = None if operator.time_ns is None else operator.time_ns * scale
    return OperatorBound(
        name=operator.name,
        kind=operator.kind,
        dtype=operator.dtype,
        operations=of.cost.operations or 0.0,
        bytes=of.cost.bytes,
        bound_ns=of.bound,
        time_ns=time_ns,
        limit=_limit(of, time_ns),
    )


def _limit(of: _Times, time_ns: float | None) -> Limit:
    if time_ns is not None and time_ns > OVERHEAD * of.bound:
        return "overhead"
    return "compute" if of.arithmetic > of.memory else "memory"


def _strict_ns(operators: Sequence[Operator], times: Sequence[_Times], peaks: Peaks) -> float:
    """Give the larger of all arithmetic and all traffic that no fusion can save."""
    return max(math.fsum(of.arithmetic for of in times), _compulsory_ns(operators, peaks))


def _compulsory_ns(operators: Sequence[Operator], peaks: Peaks) -> float:
    """Give the time to move inputs, outputs and weights once, each from where a run before may have left it."""
    totals = model_totals(operators)
    crossing = totals.input_bytes + totals.output_bytes
    return max(
        1e9 * crossing / bytes_per_s(peaks, crossing),
        1e9 * totals.weight_bytes / bytes_per_s(peaks, totals.weight_bytes),
    )


def _winograd_ns(operators: Sequence[Operator], times: Sequence[_Times], peaks: Peaks) -> float | None:
    if all(of.cost.winograd is None for of in times):
        return None
    return max(math.fsum(of.winograd for of in times), _compulsory_ns(operators, peaks))
