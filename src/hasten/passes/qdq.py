"""QuantizeLinear/DequantizeLinear written into a graph: 8-bit activations, int8 weights per channel, int32 bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from hasten.graph.model import Graph, attribute
from hasten.passes.observers import Range
from hasten.passes.placement import Placement

ActivationType = Literal["uint8", "int8"]
LIMITS: Mapping[str, tuple[int, int]] = {"uint8": (0, 255), "int8": (-128, 127)}
BIAS_LIMIT = 2**31 - 1
SMALLEST_SCALE = float(np.finfo(np.float32).tiny) * 2**24
"""Below it a scale's product with another one would leave float32's normal numbers."""


@dataclass(frozen=True)
class Scale:
    """real = (quantized - zero_point) * scale."""

    scale: float
    zero_point: int
    dtype: ActivationType = "uint8"

    def quantize(self, values: npt.NDArray[Any]) -> npt.NDArray[np.integer[Any]]:
        """Quantize as QuantizeLinear does: round half to even, saturate."""
        low, high = LIMITS[self.dtype]
        rounded = np.rint(values / np.float32(self.scale)) + self.zero_point
        return np.asarray(np.clip(rounded, low, high).astype(self.dtype))

    def dequantize(self, values: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """Give the real values."""
        return (values.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


def scale_for(range_: Range, dtype: ActivationType = "uint8") -> Scale:
    """Give the scale that covers a range, which is first widened to contain zero.

    uint8 is asymmetric, with zero point 0 where nothing is negative; int8 is symmetric, with zero point 0.
    """
    low, high = min(0.0, range_[0]), max(0.0, range_[1])
    if dtype == "int8":
        return Scale(_usable(max(-low, high) / 127), 0, dtype)
    scale = _usable((high - low) / 255)
    return Scale(scale, int(np.clip(round(-low / scale), 0, 255)), dtype)


def _usable(scale: float) -> float:
    """Give a positive float32; a tensor that was always zero gets 1."""
    return float(np.float32(scale)) if scale > SMALLEST_SCALE else 1.0


@dataclass(frozen=True)
class Weight:
    """int8 weights with one scale for each output channel, which lies along ``axis``."""

    values: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    axis: int

    @property
    def real(self) -> npt.NDArray[np.float32]:
        """The weights that the int8 ones stand for."""
        return self.values.astype(np.float32) * self._along(self.scales)

    def _along(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return vector.reshape([-1 if axis == self.axis else 1 for axis in range(self.values.ndim)])


def quantize_weight(
    weight: npt.NDArray[Any],
    axis: int,
    *,
    bits: int = 8,
    per_channel: bool = True,
    least: npt.NDArray[np.float64] | float = 0.0,
) -> Weight:
    """Quantize weights symmetrically: the largest magnitude of a channel becomes 2**(bits - 1) - 1.

    Args:
        weight: Of any rank.
        axis: The output channels.
        bits: 8, or 7 where a processor's 16-bit sums would saturate.
        per_channel: One scale for each channel, else one for all (given to each all the same).
        least: Smallest scale allowed, for each channel or for all.
    """
    limit = 2 ** (bits - 1) - 1
    others = tuple(a for a in range(weight.ndim) if a != axis)
    magnitude = np.abs(weight).max(axis=others, initial=0.0).astype(np.float64)
    if not per_channel:
        magnitude = np.full_like(magnitude, magnitude.max(initial=0.0))
    scales = np.maximum(magnitude / limit, least)
    scales = np.where(scales > SMALLEST_SCALE, scales, 1.0).astype(np.float32)
    quantized = Weight(np.zeros(weight.shape, np.int8), scales, axis)
    values = np.clip(np.rint(weight / quantized._along(scales)), -limit, limit).astype(np.int8)
    return Weight(values, scales, axis)


def weight_axis(node: onnx.NodeProto) -> int:
    """Give the axis of an anchor's weights along which its output channels lie."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[node.op_type]


def least_scales(bias: npt.NDArray[Any] | None, input_scale: float) -> npt.NDArray[np.float64] | float:
    """Give the weight scales below which the bias, at input scale times weight scale, would leave int32."""
    if bias is None:
        return 0.0
    return np.asarray(np.abs(bias).astype(np.float64) / (input_scale * (BIAS_LIMIT // 2)))


def insert(
    model: onnx.ModelProto,
    placement: Placement,
    scales: Mapping[str, Scale],
    weights: Mapping[str, Weight],
    biases: Mapping[str, npt.NDArray[np.float32]],
) -> onnx.ModelProto:
    """Give a copy of ``model`` with the pairs written in.

    Args:
        model: A float model with ``named`` nodes.
        placement: What is quantized.
        scales: Of each of the placement's tensors.
        weights: Of each anchor that has weights, by its name.
        biases: New float biases by anchor, where they differ from the model's (or it has none).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    writer = _Writer(copy, placement, scales)
    for node in copy.graph.node:
        if node.name in weights:
            writer.weights(node, weights[node.name], biases.get(node.name))
    writer.activations()
    writer.finish()
    return copy


class _Writer:
    """Edits one graph in place."""

    def __init__(self, model: onnx.ModelProto, placement: Placement, scales: Mapping[str, Scale]) -> None:
        self.model = model
        self.graph = Graph(model)
        self.old = dict(self.graph.initializers)
        self.placement = placement
        self.scales = scales
        self.taken = {name for node in model.graph.node for name in (*node.input, *node.output)} | self.old.keys()
        self.before: dict[str, list[onnx.NodeProto]] = {}
        self.after: dict[str, list[onnx.NodeProto]] = {}
        self.head: list[onnx.NodeProto] = []

    def weights(self, node: onnx.NodeProto, weight: Weight, bias: npt.NDArray[np.float32] | None) -> None:
        """Let an anchor read int8 weights and an int32 bias."""
        name = node.input[1]
        self.before[node.name] = []
        node.input[1] = self._dequantized(node, name, weight.values, weight.scales, weight.axis)
        if bias is None and len(node.input) > 2 and node.input[2]:
            bias = np.asarray(numpy_helper.to_array(self.old[node.input[2]]))
        if bias is None:
            return
        # A grouped ConvTranspose has the channels of all groups share the scales of one.
        channels = np.tile(weight.scales, max(1, bias.size // weight.scales.size))
        scale = np.float32(self.scales[node.input[0]].scale) * channels
        values = np.clip(np.rint(bias.astype(np.float64) / scale), -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32)
        old = node.input[2] if len(node.input) > 2 and node.input[2] else f"{node.name}_bias"
        made = self._dequantized(node, old, values, scale, 0)
        if len(node.input) > 2:
            node.input[2] = made
        else:
            node.input.append(made)

    def activations(self) -> None:
        """Put a pair behind every quantized tensor and let its readers read the result."""
        renamed: dict[str, str] = {}
        for name in self.placement.tensors:
            if name in self.placement.copies:
                continue
            target = name
            if name in self.graph.outputs and name in self.placement.whole:
                # The graph's output keeps its name, now for the dequantized value.
                target = self._fresh(f"{name}_float")
                renamed[name] = target
            out = name if target != name else self._fresh(f"{name}_dequantized")
            self._pair(name, target, out)
            if out != name:
                self._reroute(name, out)
        for node in self.model.graph.node:
            for i, made in enumerate(node.output):
                if made in renamed:
                    node.output[i] = renamed[made]

    def finish(self) -> None:
        """Put the new nodes in their places and drop the constants that nothing reads any more."""
        nodes: list[onnx.NodeProto] = []
        for value in self.model.graph.input:
            nodes += self.after.get(value.name, [])
        for node in self.model.graph.node:
            nodes += [*self.before.get(node.name, []), node]
            for name in node.output:
                nodes += self.after.get(name, [])
        del self.model.graph.node[:], self.model.graph.value_info[:]
        self.model.graph.node.extend(nodes)
        used = Graph(self.model)
        kept = [t for t in self.model.graph.initializer if t.name in used.consumers or t.name in used.outputs]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)

    def _reroute(self, name: str, out: str) -> None:
        for user in self.graph.consumers.get(name, []):
            if name in self.placement.whole or user.name in self.placement.readers:
                for i, read in enumerate(user.input):
                    if read == name:
                        user.input[i] = out

    def _pair(self, name: str, source: str, out: str) -> None:
        scale = self.scales[name]
        parameters = [
            self._constant(f"{name}_scale", np.float32(scale.scale)),
            self._constant(f"{name}_zero_point", np.array(scale.zero_point, scale.dtype)),
        ]
        quantized = self._fresh(f"{name}_quantized")
        self.after[source] = [
            helper.make_node("QuantizeLinear", [source, *parameters], [quantized], name=f"{name}_QuantizeLinear"),
            helper.make_node("DequantizeLinear", [quantized, *parameters], [out], name=f"{name}_DequantizeLinear"),
        ]

    def _dequantized(
        self, node: onnx.NodeProto, name: str, values: npt.NDArray[Any], scales: npt.NDArray[np.float32], axis: int
    ) -> str:
        inputs = [
            self._constant(f"{name}_quantized", values),
            self._constant(f"{name}_scale", scales),
            self._constant(f"{name}_zero_point", np.zeros(scales.shape, values.dtype)),
        ]
        out = self._fresh(f"{name}_dequantized")
        self.before[node.name].append(
            helper.make_node("DequantizeLinear", inputs, [out], name=f"{out}_DequantizeLinear", axis=axis)
        )
        return out

    def _constant(self, name: str, value: npt.NDArray[Any] | np.float32) -> str:
        fresh = self._fresh(name)
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), fresh))
        return fresh

    def _fresh(self, name: str) -> str:
        made, number = name, 1
        while made in self.taken:
            made, number = f"{name}_{number}", number + 1
        self.taken.add(made)
        return made
