"""The machine's limit: parts that add up, and a bound that is one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import BadInput
from hasten.graph.costs import operators_of, price
from hasten.measure.roofline import bound, bytes_per_s, floor_ns, operations_per_s
from hasten.measurement import Operator, Peaks
from hasten.tensors import TensorSpec
from hasten.testing.models import convnet, encoder, mlp

PEAKS = Peaks(
    threads=1,
    operations_per_s={"float32": 1e11, "int8": 4e11},
    bytes_per_s=1e10,
    fingerprint="test",
    cached_bytes_per_s={1 << 14: 1e11, 1 << 20: 5e10, 1 << 24: 2e10},
)

KINDS = ("Relu", "Add", "Softmax", "Reshape", "Transpose", "MaxPool", "SomethingNew")


@st.composite
def profiles(draw: st.DrawFn) -> tuple[Operator, ...]:
    """Draw a chain of operators with times, some of them unknown."""
    listed = []
    for i in range(draw(st.integers(1, 12))):
        shape = tuple(draw(st.lists(st.integers(1, 300), min_size=1, max_size=3)))
        x, w, y = (TensorSpec(name, "float32", shape) for name in (f"t{i}", f"w{i}", f"t{i + 1}"))
        listed.append(
            Operator(
                name=f"op{i}",
                kind=draw(st.sampled_from(KINDS)),
                dtype=draw(st.sampled_from(["float32", "int8", "int64", "bfloat16"])),
                inputs=(x, w),
                outputs=(y,),
                weights=(w.name,) if draw(st.booleans()) else (),
                time_ns=draw(st.none() | st.floats(0, 1e7)),
            )
        )
    return tuple(listed)


@given(operators=profiles(), measured=st.floats(1, 1e9))
def test_the_parts_add_up_to_the_whole(operators: tuple[Operator, ...], measured: float) -> None:
    found = bound(operators, PEAKS, measured)
    parts = math.fsum(part.time_ns or 0.0 for part in found.operators)
    assert parts + found.outside_ns == pytest.approx(measured, rel=1e-12)
    assert found.outside_ns >= 0
    assert len(found.operators) == len(operators)
    profiled = math.fsum(op.time_ns or 0.0 for op in operators)
    assert (found.profile_scale < 1) == (profiled > measured)
    assert found.grouped_ns >= found.strict_ns > 0 or found.strict_ns == 0


@given(operators=profiles(), faster=st.floats(1, 100), which=st.sampled_from(["operations", "memory", "caches"]))
def test_a_faster_machine_never_has_a_higher_bound(operators, faster: float, which: str) -> None:
    quick = {
        "operations": replace(PEAKS, operations_per_s={k: v * faster for k, v in PEAKS.operations_per_s.items()}),
        "memory": replace(PEAKS, bytes_per_s=PEAKS.bytes_per_s * faster),
        "caches": replace(PEAKS, cached_bytes_per_s={k: v * faster for k, v in PEAKS.cached_bytes_per_s.items()}),
    }[which]
    slow, fast = bound(operators, PEAKS, 1e6), bound(operators, quick, 1e6)
    assert fast.grouped_ns <= slow.grouped_ns * (1 + 1e-12)
    assert fast.strict_ns <= slow.strict_ns * (1 + 1e-12)
    for a, b in zip(fast.operators, slow.operators, strict=True):
        assert a.bound_ns <= b.bound_ns * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 16), slowdown=st.floats(1, 10), make=st.sampled_from([mlp, convnet, encoder]))
def test_no_operator_of_a_machine_at_its_peaks_is_over_its_bound(batch: int, slowdown: float, make) -> None:
    """Run a model on a simulated machine that moves bytes and computes at its peaks, or slower, one after another."""
    operators = operators_of(make(), {"batch": batch})
    timed = []
    for operator in operators:
        cost = price(operator)
        arithmetic = (cost.operations or 0) / PEAKS.operations_per_s["float32"]
        memory = (cost.bytes - cost.weights) / 1e11 + cost.weights / 5e10
        timed.append(replace(operator, time_ns=1e9 * slowdown * max(arithmetic, memory) * 1.0001 + 1))
    found = bound(timed, PEAKS, sum(op.time_ns or 0 for op in timed))
    assert found.efficiency <= 1
    assert all(part.efficiency is not None and part.efficiency <= 1 for part in found.operators)


def matmul(size: int, **changes) -> Operator:
    a, b, y = (TensorSpec(name, "float32", (size, size)) for name in "aby")
    made = Operator(name="m", kind="MatMul", dtype="float32", inputs=(a, b), outputs=(y,), weights=("b",))
    return replace(made, **changes)


def test_each_operator_is_labelled_by_what_holds_it() -> None:
    x, y = (TensorSpec(name, "float32", (1 << 22,)) for name in "xy")
    copy = Operator(name="c", kind="Transpose", dtype="float32", inputs=(x,), outputs=(y,))
    compute = 2e9 * 512**3 / 1e11
    operators = (matmul(512, time_ns=1.2 * compute), replace(copy, time_ns=3e6), matmul(8, time_ns=5e3))
    found = bound(operators, PEAKS, 1e7)
    assert [part.limit for part in found.operators] == ["compute", "memory", "overhead"]
    assert found.operators[0].efficiency == pytest.approx(1 / 1.2)


def test_an_operator_that_was_optimized_away_has_no_bound() -> None:
    found = bound((matmul(512, time_ns=0.0), matmul(64, time_ns=1e5)), PEAKS, 1e6)
    assert found.operators[0].bound_ns == 0
    assert found.operators[0].efficiency is None


def test_weights_that_overflow_the_caches_come_from_memory() -> None:
    big = matmul(8192, inputs=(TensorSpec("a", "float32", (1, 8192)), TensorSpec("b", "float32", (8192, 8192))))
    big = replace(big, outputs=(TensorSpec("y", "float32", (1, 8192)),))
    found = bound((big,), PEAKS, 1e9)
    assert found.strict_ns == pytest.approx(1e9 * 4 * 8192**2 / 1e10)


def test_winograd_is_a_second_and_lower_number() -> None:
    operators = operators_of(convnet(size=32, width=64), {"batch": 1})
    found = bound(operators, PEAKS, 1e9)
    assert found.winograd_ns is not None
    assert found.winograd_ns < found.grouped_ns
    assert bound(operators_of(mlp(), {}), PEAKS, 1e9).winograd_ns is None


def test_what_is_not_priced_is_named() -> None:
    operators = (matmul(8, kind="Mystery"), matmul(8, kind="Mystery"), matmul(8))
    assert bound(operators, PEAKS, 1e6).unpriced == ("Mystery",)


def test_a_bound_needs_a_time() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(BadInput, match="measured time"):
            bound((), PEAKS, wrong)


@given(amounts=st.lists(st.floats(1, 1e10), min_size=2, max_size=2))
def test_bandwidth_falls_with_the_amount_of_data(amounts: list[float]) -> None:
    less, more = sorted(amounts)
    assert bytes_per_s(PEAKS, less) >= bytes_per_s(PEAKS, more) >= PEAKS.bytes_per_s


def test_a_dtype_without_a_peak_gets_one_that_keeps_the_bound_a_bound() -> None:
    assert operations_per_s(PEAKS, "uint8") == 4e11
    assert operations_per_s(PEAKS, "float64") == 1e11
    assert operations_per_s(PEAKS, "bfloat16") == 4e11


@pytest.mark.parametrize("make", [mlp, convnet, encoder])
def test_the_floor_lies_under_the_bound_and_falls_with_precision(make) -> None:
    operators = operators_of(make(), {"batch": 4})
    floor = floor_ns(operators, PEAKS, precision="float32")
    assert 0 < floor < bound(operators, PEAKS, 1e9).grouped_ns
    assert floor_ns(operators, PEAKS, precision="int8") <= floor


def test_the_floor_of_a_large_product_is_its_arithmetic() -> None:
    floor = floor_ns((matmul(1024),), PEAKS, precision="int8")
    assert floor == pytest.approx(0.9 * 1e9 * 2 * 1024**3 / 4e11)
    assert np.isfinite(floor)
