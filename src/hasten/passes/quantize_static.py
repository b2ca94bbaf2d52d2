"""int8 with ranges measured ahead of time: QuantizeLinear/DequantizeLinear pairs that the runtimes fuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx
from msgspec import Meta

from hasten.artifact import Artifact
from hasten.errors import UnknownName, Unsupported
from hasten.graph.model import Graph, read_model, write_model
from hasten.host import Host, this_host
from hasten.passes.activations import observe
from hasten.passes.bias_correction import corrected, mean_errors
from hasten.passes.observers import OBSERVERS, Histogram, Range, min_max, percentile
from hasten.passes.placement import ANCHORS, Placement, named, place, quantizable_nodes
from hasten.passes.qdq import (
    ActivationType,
    Scale,
    Weight,
    insert,
    least_scales,
    quantize_weight,
    scale_for,
    weight_axis,
)
from hasten.samples import Samples
from hasten.settings import Choice, Doc
from hasten.transform import Context

FLOWS = (
    *("Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "MaxPool", "Sigmoid", "LeakyRelu"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Resize", "Split", "Slice", "DepthToSpace"),
)

LEAST_OPSET = 13
"""From here on QuantizeLinear takes a scale for each channel."""


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic:
    """Compute convolutions and matrix products in int8, with the ranges that calibration samples show."""

    name: ClassVar[str] = "quantize-static"
    uses_samples: ClassVar[bool] = True
    uses_training: ClassVar[bool] = False

    observer: Annotated[
        Literal["min-max", "percentile", "entropy", "mse"],
        Doc("how a range is chosen from the activations seen"),
        Choice(("min-max", "percentile", "entropy", "mse")),
    ] = "min-max"
    percentile: Annotated[float, Doc("share of values inside the range, for that observer"), Meta(gt=50, le=100)] = (
        99.99
    )
    samples: Annotated[int, Doc("calibration samples to look at, at most"), Meta(ge=1)] = 256
    operators: Annotated[tuple[str, ...], Doc("kinds of nodes that compute in int8")] = ("Conv", "Gemm", "MatMul")
    flows: Annotated[tuple[str, ...], Doc("kinds of nodes that carry 8 bits between int8 convolutions")] = FLOWS
    attention: Annotated[bool, Doc("also quantize products of two activations; rarely faster")] = False
    through: Annotated[
        bool, Doc("8 bits also through attention, residual sums and between Gemm and MatMul, as OpenVINO likes it")
    ] = False
    exclude: Annotated[tuple[str, ...], Doc("names of nodes to leave in float")] = ()
    activations: Annotated[
        Literal["uint8", "int8"], Doc("uint8 with a zero point; int8 symmetric only for accelerators: slow on x86")
    ] = "uint8"
    per_channel: Annotated[bool, Doc("one weight scale for each output channel")] = True
    reduce_range: Annotated[
        bool | None, Doc("7-bit weights, for processors that saturate; none: as this host needs")
    ] = None
    bias_correction: Annotated[bool, Doc("take the mean error of each channel off the bias")] = True

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        return why_not_int8(source, self.operators, attention=self.attention or self.through)

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Calibrate, quantize, correct the biases, and write the graph.

        Raises:
            UnknownName: ``exclude`` names a node that is not there.
            Untrusted: an activation is not finite on a calibration sample.
        """
        if ctx.samples is None:
            raise Unsupported(self.name, "it needs calibration samples; give some with --data")
        samples = ctx.samples.take(range(min(self.samples, len(ctx.samples))))
        model = named(read_model(source))
        check_excluded(model, self.exclude)
        placement = self.placement(model)
        scales = self.scales(placement, calibrate(model, placement, self.observe_with(), samples, ctx))
        weights = self.weights(model, placement, scales)
        biases: dict[str, npt.NDArray[np.float32]] = {}
        if self.bias_correction:
            model, biases, _ = corrected(model, mean_errors(model, scales, weights, samples, ctx))
            weights = self.weights(model, placement, scales, biases)
        return write_model(insert(model, placement, scales, weights, biases), ctx.folder, source, add={"int8"})

    def placement(self, model: onnx.ModelProto) -> Placement:
        """Decide which nodes and tensors are quantized. Nodes must be ``named``."""
        nodes = quantizable_nodes(model, self.operators, attention=self.attention or self.through)
        flows = (*self.flows, "Gather") if self.through else self.flows
        return place(model, nodes, flows=flows, float_nodes=self.exclude, through=self.through)

    def observe_with(self) -> Any:
        """Give the function from a histogram to a range."""
        return partial(percentile, value=self.percentile) if self.observer == "percentile" else OBSERVERS[self.observer]

    def scales(self, placement: Placement, ranges: Mapping[str, Range]) -> dict[str, Scale]:
        """Give each tensor's scale.

        Weights are multiplied with uint8, whose zero point goes into the bias; with ``through`` all else that may be
        negative is symmetric, because a sum or an attention has no bias to take a zero point.
        """

        def dtype(name: str, low: float) -> ActivationType:
            return "int8" if self.through and low < 0 and name not in placement.weighed else self.activations

        return {name: scale_for(range_, dtype(name, range_[0])) for name, range_ in ranges.items()}

    def weights(
        self,
        model: onnx.ModelProto,
        placement: Placement,
        scales: Mapping[str, Scale],
        biases: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> dict[str, Weight]:
        """Quantize the weights of every anchor that has some."""
        saturates = needs_reduced_range(this_host()) if self.reduce_range is None else self.reduce_range
        bits = 7 if saturates and self.activations == "uint8" else 8
        graph = Graph(model)
        made = {}
        for node in model.graph.node:
            if node.name not in placement.anchors or (weight := graph.constant(node.input[1])) is None:
                continue
            bias: npt.NDArray[Any] | None = (biases or {}).get(node.name)
            if bias is None and len(node.input) > 2:
                bias = graph.constant(node.input[2])
            axis = weight_axis(node)
            if bias is not None and bias.size > weight.shape[axis]:  # a grouped ConvTranspose
                bias = np.abs(bias).reshape(-1, weight.shape[axis]).max(axis=0)
            least = least_scales(bias, scales[node.input[0]].scale)
            made[node.name] = quantize_weight(weight, axis, bits=bits, per_channel=self.per_channel, least=least)
        return made


def why_not_int8(source: Artifact, operators: Sequence[str], *, attention: bool = False) -> str | None:
    """Say in a sentence why nothing in ``source`` can be quantized, or None. Reads the graph, no external weights."""
    if source.format != "onnx":
        return f"it changes ONNX graphs, not {source.format!r}"
    if "int8" in source.traits:
        return "the model is quantized already"
    if kinds := sorted(set(operators) - set(ANCHORS)):
        return f"{kinds[0]!r} cannot compute in int8; operators that can: {', '.join(ANCHORS)}"
    model = onnx.load(source.entry, load_external_data=False)
    opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
    if opset < LEAST_OPSET:
        return f"the model's opset is {opset}, and int8 by channel needs {LEAST_OPSET}; export it with a newer one"
    graph = Graph(model)
    for node in model.graph.node:
        made_by = graph.producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if made_by is not None and made_by.op_type in ("Conv", "ConvTranspose"):
            return f"node {node.name!r} is a batch-norm behind a convolution: fold batch-norm first (pass 'fold')"
    if not quantizable_nodes(named(model), operators, attention=attention):
        return f"it has no {' or '.join(operators)} with constant float32 weights"
    return None


def check_excluded(model: onnx.ModelProto, exclude: Sequence[str]) -> None:
    """Check that every name is a node's.

    Raises:
        UnknownName: names the first that is not.
    """
    names = {node.name for node in model.graph.node}
    for name in exclude:
        if name not in names:
            raise UnknownName("node", name, names)


def calibrate(
    model: onnx.ModelProto, placement: Placement, observer: Any, samples: Samples, ctx: Context
) -> dict[str, Range]:
    """Give the range of each tensor of the placement. Those that share a scale share the union of their ranges."""
    histograms = {name: Histogram(ends_only=observer is min_max) for name in placement.tensors}
    quiet = replace(ctx, progress=lambda text, share: None)
    for values, done in observe(model, placement.tensors, samples, quiet):
        for name, array in values.items():
            histograms[name].update(array, name=name)
        ctx.progress("calibrating", done)
    ranges: dict[str, Range] = {}
    for name, histogram in histograms.items():
        low, high = observer(histogram)
        first = placement.scale_of[name]
        known = ranges.get(first, (0.0, 0.0))
        ranges[first] = (min(known[0], low), max(known[1], high))
    return {name: ranges[first] for name, first in placement.scale_of.items()}


def needs_reduced_range(host: Host) -> bool:
    """Say whether u8 times s8 saturates: x86 sums pairs of products in 16 bits unless it has VNNI or AMX."""
    flags = set(host.flags)
    return bool(flags & {"avx2", "avx512f"}) and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}
