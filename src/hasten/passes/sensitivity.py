"""What each node costs in accuracy: the error at the model's outputs when it alone is quantized.

Ranges are calibrated once. Then one float model, in which every candidate stands behind a switch, is run once for
each candidate with only its switch on: no new calibration, no new session.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hasten import registry, settings
from hasten.artifact import Json
from hasten.errors import BuildFailed
from hasten.graph.model import Graph, read_model
from hasten.isolation import report_progress
from hasten.metrics import class_axis
from hasten.passes.activations import Reference, batch_size, fixed_batch
from hasten.passes.placement import named, quantizable_nodes
from hasten.passes.qdq import Scale, Weight, quantize_weight, weight_axis
from hasten.passes.quantize_static import QuantizeStatic, calibrate
from hasten.samples import Samples
from hasten.store import Store
from hasten.tensors import Array, Feed, Pair
from hasten.transform import Context

SWITCHES = "quantized_nodes"
"""The input of the switched model: bool [nodes]."""

BATCH = 8

SAMPLES = 64
"""Samples that each node is tried on, at most: enough to order nodes, and each costs a run of the model per node."""


@dataclass(frozen=True, kw_only=True)
class NodeError:
    """What quantizing one node alone does to the outputs."""

    node: str
    error: float
    """Squared error over squared magnitude, the mean over the outputs. Errors of several nodes about add up."""
    kl: float | None
    """KL divergence of the softmax over the last axis, in nats, the mean over samples; None without such outputs."""


@dataclass
class _Difference:
    """Sums over batches, for one switch."""

    squared: float = 0.0
    magnitude: float = 0.0
    divergence: float = 0.0
    rows: int = 0


@dataclass(frozen=True)
class Candidate:
    """A node behind a switch: what becomes of its input, its weights and, where nothing else does it, its output."""

    node: str
    inputs: Mapping[str, Scale | None]
    """Scale by tensor; None: measured at run time."""
    weight: Weight | None
    outputs: Mapping[str, Scale] = field(default_factory=dict)


def sensitivities_in_child(*, source: str, store: str, samples: str, name: str, values: dict[str, Json]) -> Json:
    """Do ``sensitivities`` in a child process: everything by name, the result as plain values."""
    home = Store(Path(store))
    artifact = home.get(source)
    step = settings.build(registry.load("pass", name), values, name=name)
    with home.scratch() as folder:
        ctx = Context(folder=folder, samples=Samples.load(Path(samples)), seed=0, progress=report_progress)
        found = sensitivities(read_model(artifact), candidates(read_model(artifact), step, ctx), ctx)
    return msgspec.to_builtins(found)


def candidates(model: onnx.ModelProto, step: Any, ctx: Context) -> tuple[Candidate, ...]:
    """Give every node that a quantizing pass would quantize, with the scales it would use.

    Args:
        model: The float model.
        step: A ``QuantizeStatic``, calibrated here once, or a ``QuantizeDynamic``.
        ctx: With the calibration samples.
    """
    model = named(model)
    if isinstance(step, QuantizeStatic):
        return _static(model, step, ctx)
    graph = Graph(model)
    nodes = {node.name: node for node in model.graph.node}
    chosen = [nodes[name] for name in quantizable_nodes(model, step.operators) if name not in step.exclude]
    return tuple(
        Candidate(node.name, {node.input[0]: None}, quantize_weight(_weight(graph, node), weight_axis(node)))
        for node in chosen
    )


def sensitivities(model: onnx.ModelProto, found: Sequence[Candidate], ctx: Context) -> tuple[NodeError, ...]:
    """Measure each candidate alone, in the order given, on the context's first samples."""
    if ctx.samples is None or not found:
        return ()
    samples = ctx.samples.take(range(min(SAMPLES, len(ctx.samples))))
    switched = with_switches(named(model), found)
    size = batch_size(model) or min(BATCH, len(samples))
    sums = [_Difference() for _ in found]
    starts = range(0, len(samples), size)
    with Reference.open(switched, [value.name for value in model.graph.output], ctx) as reference:
        for number, start in enumerate(starts):
            feed = fixed_batch(samples, start, size)
            exact = _run(reference, feed, len(found), None)
            for at, total in enumerate(sums):
                _add(total, exact, _run(reference, feed, len(found), at))
                done = (number * len(found) + at + 1) / (len(starts) * len(found))
                ctx.progress(f"int8 error of {found[at].node}", done)
    return tuple(_node_error(item.node, total) for item, total in zip(found, sums, strict=True))


def with_switches(model: onnx.ModelProto, found: Sequence[Candidate]) -> onnx.ModelProto:
    """Give the float model with each candidate behind an element of a new boolean input.

    ``If(switch) { node on quantized input and weights } else { node }``; both branches read constants from outside,
    so the runtime prepares them once.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    switches = helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(found)])
    copy.graph.input.append(switches)
    editor = _Editor(copy)
    by_name = {item.node: (at, item) for at, item in enumerate(found)}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        if node.name in by_name:
            nodes += editor.switched(node, *by_name[node.name])
        else:
            nodes.append(node)
    del copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    for at, item in enumerate(found):
        for name, scale in item.outputs.items():
            editor.switch_output(name, scale, at)
    return copy


def _static(model: onnx.ModelProto, step: QuantizeStatic, ctx: Context) -> tuple[Candidate, ...]:
    if ctx.samples is None:
        return ()
    placement = step.placement(model)
    quiet = replace(ctx, progress=lambda text, share: ctx.progress(text, None))
    seen = ctx.samples.take(range(min(step.samples, len(ctx.samples))))
    scales = step.scales(placement, calibrate(model, placement, step.observe_with(), seen, quiet))
    weights = step.weights(model, placement, scales)
    anchors = [node for node in model.graph.node if node.name in placement.anchors]
    read = {name for node in anchors for name in node.input}
    found = []
    for node in anchors:
        weight = weights.get(node.name)
        inputs = {name: scales[name] for name in (node.input[:2] if weight is None else node.input[:1])}
        # What the next anchor reads in 8 bits is that anchor's error; an output that no anchor reads is this one's.
        behind = placement.outputs.get(node.name)
        outputs = {behind: scales[behind]} if behind is not None and behind not in read else {}
        found.append(Candidate(node.name, inputs, weight, outputs))
    return tuple(found)


def _weight(graph: Graph, node: onnx.NodeProto) -> Array:
    weight = graph.constant(node.input[1])
    if weight is None:
        raise BuildFailed("sensitivity", f"node {node.name!r} has no constant weights")
    return weight


class _Editor:
    """Writes switches into one graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    def switched(self, node: onnx.NodeProto, at: int, item: Candidate) -> list[onnx.NodeProto]:
        """Give the nodes that stand for ``node``: its switch, and both of its forms behind it."""
        inside: list[onnx.NodeProto] = []
        rounded = {
            name: self._round(f"{node.name}/int8/{name}", name, scale, inside) for name, scale in item.inputs.items()
        }
        twin = _copied(node, f"{node.name}/int8")
        for i, name in enumerate(twin.input):
            twin.input[i] = rounded.get(name, name)
        if item.weight is not None:
            twin.input[1] = self._constant(f"{node.name}/int8/weight", item.weight.real)
        plain = _copied(node, f"{node.name}/float")
        return self._either(f"{node.name}/switch", at, [*inside, twin], [plain], str(node.output[0]))

    def switch_output(self, name: str, scale: Scale, at: int) -> None:
        """Let all nodes that read a tensor read it quantized where the switch is on; as an output it stays float."""
        inside: list[onnx.NodeProto] = []
        rounded = self._round(f"{name}/int8/output", name, scale, inside)
        inside.append(helper.make_node("Identity", [rounded], [f"{name}/int8/chosen"]))
        plain = helper.make_node("Identity", [name], [f"{name}/float/chosen"])
        out = f"{name}/chosen"
        nodes: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            for i, read in enumerate(node.input):
                if read == name:
                    node.input[i] = out
            nodes.append(node)
            if name in node.output:
                nodes += self._either(f"{name}/switch", at, inside, [plain], out)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def _either(
        self, name: str, at: int, on: list[onnx.NodeProto], off: list[onnx.NodeProto], out: str
    ) -> list[onnx.NodeProto]:
        index = self._constant(f"{name}/index", np.array(at, np.int64))
        branches = {
            "then_branch": helper.make_graph(on, f"{name}/on", [], [_untyped(on[-1].output[0])]),
            "else_branch": helper.make_graph(off, f"{name}/off", [], [_untyped(off[-1].output[0])]),
        }
        return [
            helper.make_node("Gather", [SWITCHES, index], [f"{name}/bit"], name=f"{name}/bit", axis=0),
            helper.make_node("If", [f"{name}/bit"], [out], name=name, **branches),
        ]

    def _round(self, prefix: str, name: str, scale: Scale | None, inside: list[onnx.NodeProto]) -> str:
        quantized, back = f"{prefix}/8bit", f"{prefix}/back"
        if scale is None:
            parameters = [f"{prefix}/scale", f"{prefix}/zero"]
            inside.append(helper.make_node("DynamicQuantizeLinear", [name], [quantized, *parameters]))
        else:
            parameters = [
                self._constant(f"{prefix}/scale", np.float32(scale.scale)),
                self._constant(f"{prefix}/zero", np.array(scale.zero_point, scale.dtype)),
            ]
            inside.append(helper.make_node("QuantizeLinear", [name, *parameters], [quantized]))
        inside.append(helper.make_node("DequantizeLinear", [quantized, *parameters], [back]))
        return back

    def _constant(self, name: str, value: npt.NDArray[Any] | np.floating[Any]) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _copied(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.name = name
    twin.output[0] = f"{name}/output"
    return twin


def _untyped(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _run(reference: Reference, feed: Feed, count: int, on: int | None) -> dict[str, Array]:
    switches = np.zeros(count, np.bool_)
    if on is not None:
        switches[on] = True
    return reference.run({**feed, SWITCHES: switches})


def _add(total: _Difference, exact: Feed, got: Feed) -> None:
    for name, array in exact.items():
        if array.dtype.kind != "f":
            continue
        pair = Pair.of(array, got[name])
        a, b = pair.reference, pair.got
        squared, magnitude = pair.squares()
        total.squared += squared
        total.magnitude += magnitude
        axis = class_axis(a)
        if a.ndim >= 2 and a.shape[axis] >= 2:
            p, q = _log_softmax(a, axis), _log_softmax(b, axis)
            total.divergence += float((np.exp(p) * (p - q)).sum())
            total.rows += a.size // a.shape[axis]


def _log_softmax(values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    shifted = values - values.max(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


ENDLESS = sys.float_info.max
"""Where a node's loss is not finite: JSON has no infinity."""


def _node_error(node: str, total: _Difference) -> NodeError:
    error = total.squared / max(total.magnitude, 1e-30)
    kl = total.divergence / total.rows if total.rows else None
    return NodeError(
        node=node,
        error=error if np.isfinite(error) else ENDLESS,
        kl=kl if kl is None or np.isfinite(kl) else ENDLESS,
    )
