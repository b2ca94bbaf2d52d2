"""What OpenVINO's compiled model tells: each layer that runs, with its shapes, its dtype and its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.errors import BuildFailed
from hasten.measurement import Operator
from hasten.tensors import Feed, TensorSpec

WARM_UP = 5
"""Runs whose time is taken off the sum: the first ones compile kernels for the shapes at hand."""

CUT_US = 0.5
"""The counters give a mean cut to whole microseconds: half of one is what is lost on average."""

KERNELS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "int8", "f64": "float64"}
"""Precision of a kernel by the last part of its name (``brgconv_avx512_I8``), or of its data."""

ELEMENTS = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "boolean": "bool",
    **{
        f"{letter}{bits}": f"{word}{bits}" for letter, word in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
    },
}
"""Names in ``DTYPES`` of OpenVINO's element types."""

NO_WORK = frozenset({"Input", "Output", "Const"})


@dataclass(frozen=True)
class Layer:
    """A node of the compiled graph: ``node`` is OpenVINO's own."""

    name: str
    kind: str
    dtype: str
    node: Any


def executed(compiled: Any) -> list[Layer]:
    """List the layers of a compiled model in the order they run, without inputs, outputs and constants."""
    layers = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = _info(node)
        if info["layerType"] not in NO_WORK:
            layers.append(Layer(node.get_friendly_name(), info["layerType"], _kernel_dtype(info), node))
    return layers


def read_operators(compiled: Any, plain: Any, feed: Feed, runs: int) -> tuple[Operator, ...]:
    """Run a model and describe the layers that took part, in the order they run.

    The counters hold the mean of all runs so far; that of the ``runs`` that count is computed from two readings.
    A mean holds the disturbances of the machine too, and counting takes time itself: where all layers together
    take longer than the median of plain runs, each is shortened by the same share.

    Args:
        compiled: The model, compiled with ``PERF_COUNT``.
        plain: The same without it.
        feed: What to run it on.
        runs: How many runs count.
    """
    request = compiled.create_infer_request()
    for _ in range(WARM_UP):
        request.infer(feed)
    before = _mean_us(request)
    for _ in range(runs):
        request.infer(feed)
    after = _mean_us(request)
    layers = [layer for layer in executed(compiled) if layer.name in before and layer.name in after]
    times_ns = [_between_ns(before[layer.name], after[layer.name], runs) for layer in layers]
    share = min(1.0, _plain_run_ns(plain.create_infer_request(), feed, runs) / max(sum(times_ns), 1.0))
    return tuple(_operator(layer, time_ns * share) for layer, time_ns in zip(layers, times_ns, strict=True))


def _plain_run_ns(request: Any, feed: Feed, runs: int) -> float:
    durations = []
    for _ in range(WARM_UP + runs):
        start = time.perf_counter_ns()
        request.infer(feed)
        durations.append(time.perf_counter_ns() - start)
    return statistics.median(durations[WARM_UP:])


def _mean_us(request: Any) -> Mapping[str, float]:
    executed_status = "EXECUTED"
    return {
        item.node_name: item.real_time.total_seconds() * 1e6
        for item in request.profiling_info
        if item.status.name == executed_status
    }


def _between_ns(before_us: float, after_us: float, runs: int) -> float:
    """Give the mean of the later runs, in nanoseconds; what the cut leaves under half a microsecond counts as that."""
    total_us = (after_us + CUT_US) * (WARM_UP + runs) - (before_us + CUT_US) * WARM_UP
    return max(total_us / runs, CUT_US) * 1e3


def _operator(layer: Layer, time_ns: float) -> Operator:
    info = _info(layer.node)
    inputs, weights = [], []
    for port in layer.node.inputs():
        spec = _spec(port.get_source_output().get_node().get_friendly_name(), port)
        if 0 in spec.shape:  # how the compiled graph writes an input that a layer could have, but has not
            continue
        inputs.append(spec)
        if _is_constant(port.get_source_output().get_node()):
            weights.append(spec.name)
    return Operator(
        name=layer.name,
        kind=layer.kind,
        dtype=layer.dtype,
        inputs=tuple(inputs),
        outputs=tuple(_spec(layer.name, port) for port in layer.node.outputs()),
        weights=tuple(weights),
        time_ns=time_ns,
        sources=tuple(name for name in info["originalLayersNames"].split(",") if name),
    )


def _spec(name: str, port: Any) -> TensorSpec:
    shape = port.get_partial_shape()
    if shape.is_dynamic:
        raise BuildFailed("openvino", f"the compiled graph has no concrete shape for {name!r}: {shape}")
    element = port.get_element_type().get_type_name()
    return TensorSpec(name, ELEMENTS.get(element, element), tuple(dim.get_length() for dim in shape))


def _is_constant(node: Any) -> bool:
    """Say whether a node's value never changes: a constant, or what was made of constants when compiling."""
    if _info(node)["layerType"] == "Const":
        return True
    sources = [port.get_source_output().get_node() for port in node.inputs()]
    return bool(sources) and all(map(_is_constant, sources))


def _kernel_dtype(info: Mapping[str, str]) -> str:
    for word in (info["primitiveType"].rpartition("_")[2].lower(), info["runtimePrecision"]):
        if found := KERNELS.get(word) or ELEMENTS.get(word):
            return found
    return info["runtimePrecision"]


def _info(node: Any) -> Mapping[str, str]:
    return {key: str(value.value) for key, value in node.get_rt_info().items()}
