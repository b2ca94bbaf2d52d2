"""What ONNX Runtime's profile tells: each node that ran, with its shapes, its dtype and its time."""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from hasten.errors import BuildFailed
from hasten.graph.model import attribute, dtype_name
from hasten.measurement import Operator
from hasten.tensors import Feed, TensorSpec

WARM_UP = 5
"""Runs before those that count: the first ones allocate."""

CUT_NS = 500.0
"""The profile cuts times to whole microseconds: half of one is what is lost on average."""

ELEMENTS = {"float": "float32", "double": "float64"}
"""The profile's words for dtypes, where they are not NumPy's: those of ``tensor(float)``."""

INT8_KINDS = frozenset(
    {
        *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"),
        *("QGemm", "QAttention", "QEmbedLayerNormalization", "QOrderedMatMul"),
    }
)
"""Operators whose arithmetic is in integers although they take or give floats; so has every ``QLinear...``."""

COATS = re.compile(r"^fused |^InsertedPrecisionFreeCast_|_nchwc$|_quant$|/\w+Fusion/$|_token_\d+$")
"""What ONNX Runtime adds to the name of a node that it rewrites."""

ACCURACY_INT8 = 4
"""``accuracy_level`` of MatMulNBits that quantizes its activations too."""


class _Event(msgspec.Struct, frozen=True):
    """One entry of the profile, in ONNX Runtime's own names; ``dur`` is in microseconds."""

    cat: str
    name: str
    dur: float = 0.0
    args: dict[str, Any] = {}


def read_operators(load: Callable[[Any], Any], options: Any, path: Path, feed: Feed, runs: int) -> tuple[Operator, ...]:
    """Run a model in profiling mode and describe its nodes, in the order they ran.

    The profile makes each node a few microseconds slower. What all nodes together take longer than a plain run is
    therefore taken off them in equal parts.

    Args:
        load: Makes an ``InferenceSession`` with the options that it is given.
        options: ``SessionOptions``; profiling is turned on in them.
        path: The model that ``load`` opens: node names, weights and tensor names are read from it.
        feed: What to run it on.
        runs: How many runs count.
    """
    plain_ns = _plain_run_ns(load(options), feed, runs)
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = load(options)
        for _ in range(WARM_UP + runs):
            session.run(None, feed)
        profile = Path(session.end_profiling()).read_bytes()
    model = onnx.load(path, load_external_data=False)
    events = _by_node(msgspec.json.decode(profile, type=list[_Event]), model)
    times = {index: _typical_ns(found) for index, found in events.items()}
    excess_ns = max(0.0, sum(times.values()) - plain_ns) / max(1, len(times))
    return tuple(_operators(model, feed, events, {i: max(t - excess_ns, CUT_NS) for i, t in times.items()}))


def _plain_run_ns(session: Any, feed: Feed, runs: int) -> float:
    durations = []
    for _ in range(WARM_UP + runs):
        start = time.perf_counter_ns()
        session.run(None, feed)
        durations.append(time.perf_counter_ns() - start)
    return float(np.median(durations[WARM_UP:]))


def _by_node(events: Iterable[_Event], model: onnx.ModelProto) -> dict[int, list[_Event]]:
    """Collect the kernel events of each node of the main graph; its subgraphs' time is in the node that holds them."""
    nodes = model.graph.node
    found: dict[int, list[_Event]] = defaultdict(list)
    for event in events:
        if event.cat != "Node" or not event.name.endswith("_kernel_time"):
            continue
        index = int(event.args["node_index"])
        if index < len(nodes) and _belongs(event, nodes[index]):
            found[index].append(event)
    return dict(found)


def _belongs(event: _Event, node: onnx.NodeProto) -> bool:
    name = event.name.removesuffix("_kernel_time")
    return event.args["op_name"] == node.op_type and (name == node.name or not node.name)


def _operators(
    model: onnx.ModelProto, feed: Feed, events: Mapping[int, list[_Event]], times_ns: Mapping[int, float]
) -> Iterable[Operator]:
    specs = {name: TensorSpec(name, array.dtype.name, array.shape) for name, array in feed.items()}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in weights.values():
        specs[tensor.name] = TensorSpec(tensor.name, dtype_name(tensor.data_type), tuple(tensor.dims))
    for index, node in enumerate(model.graph.node):
        if index not in events:
            raise BuildFailed("onnxruntime", f"its profile says nothing about node {node.name!r} ({node.op_type})")
        outputs = _outputs(node, events[index][-1])
        specs.update({spec.name: spec for spec in outputs})
        inputs = tuple(specs[name] for name in node.input if name in specs)
        yield Operator(
            name=node.name or f"{node.op_type}_{index}",
            kind=node.op_type,
            dtype=_dtype(node, inputs, outputs),
            inputs=inputs,
            outputs=outputs,
            weights=tuple(name for name in node.input if name in weights),
            time_ns=times_ns[index],
            sources=_sources(node),
        )


def _sources(node: onnx.NodeProto) -> tuple[str, ...]:
    """Give the original node that a name still tells of: fusions keep the first one's, in a new coat."""
    name = COATS.sub("", node.name)
    return (name,) if name else ()


def _outputs(node: onnx.NodeProto, event: _Event) -> tuple[TensorSpec, ...]:
    named = [name for name in node.output if name]
    specs = []
    for name, described in zip(named, event.args["output_type_shape"], strict=False):
        ((element, shape),) = described.items()
        specs.append(TensorSpec(name, ELEMENTS.get(element, element), tuple(shape)))
    return tuple(specs)


def _typical_ns(events: list[_Event]) -> float:
    """Give the mean of the middle half, in nanoseconds: a median of whole microseconds would be too coarse."""
    ordered = np.sort([event.dur for event in events[WARM_UP:]])
    quarter = len(ordered) // 4
    return float(ordered[quarter : len(ordered) - quarter].mean()) * 1e3 + CUT_NS


def _dtype(node: onnx.NodeProto, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> str:
    """Give the precision in which a node computes."""
    if node.op_type in INT8_KINDS or node.op_type.startswith("QLinear"):
        return "int8"
    if node.op_type == "MatMulNBits" and attribute(node, "accuracy_level", 0) == ACCURACY_INT8:
        return "int8"
    if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return inputs[0].dtype
    specs = (*outputs, *inputs)
    floats = [spec.dtype for spec in specs if spec.dtype.startswith(("float", "bfloat"))]
    return floats[0] if floats else specs[0].dtype
