"""What is quantized in a graph, how the view runs it, and how trained floats become integers again.

Weights are floats behind ``DequantizeLinear(int8 initializer)``, rounded in every forward pass; biases too, to the
product of the scales of input and weight, as kernels want them. Scales learn (``fake_quantization``), zero points
stay. A scale's parameter is its share of what the scale was at first: one learning rate fits large and small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from hasten.graph.model import Graph, attribute, dtype_name, is_standard
from hasten.torchview.operators.fake_quantization import (
    LEAST_SHARE,
    Settings,
    dequantize,
    dequantize_by,
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_by,
    fake_quantize_weight,
    quantize,
    quantize_by,
)
from hasten.torchview.operators.operator import Function, refusal

Numbers = npt.NDArray[Any]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

SAME_RANGE = (
    *("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Gather"),
    *("DepthToSpace", "SpaceToDepth", "Identity", "Resize", "Pad", "Expand"),
)
"""Operators that give only values they were given: engines keep 8 bits through them while the scales are equal."""

LIMITS: Mapping[str, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
    "int32": (-(2**31 - 1), 2**31 - 1),
}

SEVEN_BITS = 63
"""Weights that go no further were made for processors that saturate beyond, and stay within."""

AGREES = 1e-3
"""A bias's scale this close to the product of input and weight scale is that product."""

ATTRIBUTES = frozenset(("axis", "saturate", "block_size", "output_dtype", "precision"))


def start_of(scale: str) -> str:
    """Give the name under which the view keeps what a scale was at first."""
    return f"{scale}@start"


@dataclass(frozen=True)
class Step:
    """One node, or a pair, of a quantized graph as the view runs it."""

    run: Function
    reads: tuple[str, ...]
    makes: str


@dataclass(frozen=True)
class Values:
    """An integer initializer that is a float parameter in the view."""

    scale: str
    zero_point: Numbers
    axis: int | None
    low: int
    high: int
    factors: tuple[str, str] | None = None
    """Of a bias: the scales of input and weight, whose product its own is."""

    def along(self, vector: Numbers, like: Numbers) -> Numbers:
        """Give scales or zero points the shape in which they broadcast over the values."""
        if vector.size == 1:
            return vector.reshape(())
        return vector.reshape([-1 if axis == self.axis else 1 for axis in range(like.ndim)])


@dataclass(frozen=True)
class Quantization:
    """What is quantized in a graph. Names are those of initializers."""

    graph: Graph
    values: Mapping[str, Values] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    """Scales that learn, each with the one whose parameter it shares, or itself."""
    steps: Mapping[str, Step | None] = field(default_factory=dict)
    """What runs the nodes that quantize and dequantize, by their first output; None: another step does its work."""

    @property
    def fixed(self) -> frozenset[str]:
        """The scales of biases, which do not learn by themselves."""
        return frozenset(values.scale for values in self.values.values() if values.scale not in self.scales)

    @property
    def hidden(self) -> frozenset[str]:
        """Integer tensors that the view never makes: it runs quantizing and dequantizing in one step."""
        return frozenset(name for name, step in self.steps.items() if step is None)

    @property
    def starts(self) -> dict[str, Numbers]:
        """What the learned scales were at first, by ``start_of``."""
        return {start_of(name): self._initial(name) for name in self.scales.values()}

    def start(self, name: str) -> Numbers:
        """Give what a parameter is at first."""
        if name in self.values:
            values, integers = self.values[name], self._initial(name)
            scale, zero = (values.along(v, integers) for v in (self._initial(values.scale), values.zero_point))
            real = integers.astype(np.float64) - zero.astype(np.float64)
            return np.asarray(real.astype(scale.dtype) * scale)
        value = self._initial(name)
        return np.ones_like(value) if name in self.scales.values() else value

    def written(self, now: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Give the graph's initializers, where the view's tensors are ``now``. What did not change stays to the bit."""
        plain = {name: value for name, value in now.items() if name not in self.values and name not in self.scales}
        found = {name: value.astype(self._initial(name).dtype) for name, value in plain.items()}
        for name, leader in self.scales.items():
            start = self._initial(name)
            share = np.maximum(now[leader].reshape(start.shape).astype(start.dtype), start.dtype.type(LEAST_SHARE))
            found[name] = share * start
        for name, values in self.values.items():
            if values.factors:
                found[values.scale] = self._product(values, found)
            scale = found.get(values.scale, self._initial(values.scale))
            found[name] = self._integers(name, values, now[name], scale)
        return found

    def _product(self, values: Values, found: Mapping[str, Numbers]) -> Numbers:
        """Give a bias's scale, which follows those of input and weight."""
        old, names = self._initial(values.scale), values.factors or ("", "")
        if all(np.array_equal(found[name], self._initial(name)) for name in names):
            return old
        product = found[names[0]].reshape(()) * found[names[1]].reshape(-1)
        return np.asarray(np.tile(product, max(1, old.size // product.size)).reshape(old.shape).astype(old.dtype))

    def _integers(self, name: str, values: Values, now: Numbers, scale: Numbers) -> Numbers:
        before, real = self._initial(name), now.astype(scale.dtype)
        spread, zero = values.along(scale, before), values.along(values.zero_point, before).astype(np.float64)
        levels = np.rint(real / spread).astype(np.float64) + zero
        made = np.clip(levels, values.low, values.high).astype(before.dtype)
        same = (real == self.start(name)) & (spread == values.along(self._initial(values.scale), before))
        return np.where(same, before, made)

    def _initial(self, name: str) -> Numbers:
        return np.asarray(numpy_helper.to_array(self.graph.initializers[name]))


def find_quantization(graph: Graph) -> Quantization:
    """Find what is quantized in a graph.

    Raises:
        Unsupported: names a node that quantizes in a way that the view does not know.
    """
    return _Finder(graph).find()


class _Finder:
    """Collects values, scales and steps."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values: dict[str, Values] = {}
        self.parent: dict[str, str] = {}
        self.steps: dict[str, Step | None] = {}
        kinds = (QUANTIZE, DEQUANTIZE)
        self.nodes = [node for node in graph.nodes if is_standard(node) and node.op_type in kinds]

    def find(self) -> Quantization:
        for node in self.nodes:
            self._check(node)
            if node.op_type == DEQUANTIZE and node.input[0] in self.graph.initializers:
                self._value(node)
        for node in self.nodes:
            self._bias(node)
        fixed = {values.scale for name, values in self.values.items() if self._dtype(name) == "int32"}
        for node in self.nodes:
            if node.input[1] in self.graph.initializers and node.input[1] not in fixed:
                self.parent.setdefault(node.input[1], node.input[1])
        self._tie()
        for node in self.nodes:
            self._step(node)
        scales = {name: self._root(name) for name in self.parent}
        return Quantization(self.graph, self.values, scales, self.steps)

    def _check(self, node: onnx.NodeProto) -> None:
        unknown = sorted({item.name for item in node.attribute} - ATTRIBUTES)
        if unknown:
            raise refusal(node, f"has the attribute {unknown[0]!r}, which the view does not know")
        if attribute(node, "block_size", 0):
            raise refusal(node, "has a scale for each block (block_size), which the view does not run")
        if self._integer(node) not in LIMITS:
            raise refusal(node, f"quantizes to {self._integer(node)}; the view knows {', '.join(LIMITS)}")
        if len(node.input) > 2 and node.input[2] and node.input[2] not in self.graph.initializers:
            raise refusal(node, "has a zero point that is computed in the graph")

    def _integer(self, node: onnx.NodeProto) -> str:
        """Give the integer type of a node's quantized side."""
        if len(node.input) > 2 and node.input[2]:
            return self.graph.dtypes.get(node.input[2], "unknown")
        if node.op_type == DEQUANTIZE:
            return self.graph.dtypes.get(node.input[0], "unknown")
        kind = attribute(node, "output_dtype", 0)
        return dtype_name(kind) if kind else "uint8"

    def _value(self, node: onnx.NodeProto) -> None:
        name, scale = node.input[0], node.input[1]
        users = self.graph.consumers[name]
        if scale not in self.graph.initializers or any(
            user.op_type != DEQUANTIZE or list(user.input) != list(node.input) for user in users
        ):
            return
        integers = np.asarray(self.graph.constant(name))
        low, high = LIMITS[self._dtype(name)]
        zero, axis = self._zero(node), self._axis(node)
        if self._dtype(name) == "int8" and not zero.any():
            largest = int(np.abs(integers.astype(np.int64)).max(initial=0))
            high = SEVEN_BITS if largest <= SEVEN_BITS else high
            low = min(-high, -largest)
        self.values[name] = Values(scale, zero, axis, low, high)

    def _bias(self, node: onnx.NodeProto) -> None:
        """Let a bias's scale be the product of those of its layer's input and weight, if it is."""
        values = self.values.get(node.input[0])
        layer = self.graph.only_consumer(node.output[0])
        if values is None or layer is None or self._dtype(node.input[0]) != "int32":
            return
        if layer.op_type not in ("Conv", "ConvTranspose", "Gemm") or layer.input[2] != node.output[0]:
            return
        makers = [self.graph.producer(name, DEQUANTIZE) for name in layer.input[:2]]
        names = [maker.input[1] for maker in makers if maker is not None and maker.input[1] in self.graph.initializers]
        if len(names) != 2 or values.zero_point.any():
            return
        source, weight, own = (np.asarray(self.graph.constant(name)) for name in (*names, values.scale))
        if source.size != 1 or own.size % weight.size:
            return
        product = np.tile(source.reshape(()) * weight.reshape(-1), own.size // weight.size)
        if np.allclose(product, own.reshape(-1), rtol=AGREES, atol=0):
            self.values[node.input[0]] = Values(
                values.scale, values.zero_point, values.axis, values.low, values.high, (names[0], names[1])
            )

    def _tie(self) -> None:
        """Join the scales around each pair, and around each operator that only moves values, where they are equal."""
        for node in self.nodes:
            if node.op_type == QUANTIZE:
                for user in self.graph.consumers.get(node.output[0], []):
                    if user.op_type == DEQUANTIZE:
                        self._join(node, user)
        for node in self.graph.nodes:
            if node.op_type not in SAME_RANGE:
                continue
            around = [self.graph.producer(name, DEQUANTIZE) for name in node.input]
            around += [u for name in node.output for u in self.graph.consumers.get(name, []) if u.op_type == QUANTIZE]
            ends = [end for end in around if end is not None and end.input[0] not in self.values]
            for end in ends[1:]:
                self._join(ends[0], end)

    def _join(self, one: onnx.NodeProto, other: onnx.NodeProto) -> None:
        names = [one.input[1], other.input[1]]
        if not all(name in self.parent for name in names) or not np.array_equal(self._zero(one), self._zero(other)):
            return
        if np.array_equal(np.asarray(self.graph.constant(names[0])), np.asarray(self.graph.constant(names[1]))):
            self.parent[self._root(names[1])] = self._root(names[0])

    def _root(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def _step(self, node: onnx.NodeProto) -> None:
        if node.op_type == QUANTIZE:
            self._quantize(node)
        elif node.input[0] in self.values:
            self._weight(node)
        elif node.output[0] not in self.steps:
            self._generic(node, dequantize, dequantize_by, node.input[0])

    def _quantize(self, node: onnx.NodeProto) -> None:
        users = self.graph.consumers.get(node.output[0], [])
        paired = node.input[1] in self.parent and node.output[0] not in self.graph.outputs
        if paired and users and all(self._matches(node, user) for user in users):
            step = self._generic(node, fake_quantize, fake_quantize_by, node.input[0])
            self.steps |= {user.output[0]: Step(step.run, step.reads, user.output[0]) for user in users}
            self.steps[node.output[0]] = None
        else:
            self._generic(node, quantize, quantize_by, node.input[0])

    def _matches(self, node: onnx.NodeProto, user: onnx.NodeProto) -> bool:
        same = user.op_type == DEQUANTIZE and user.input[1] in self.parent
        return same and self._root(user.input[1]) == self._root(node.input[1]) and self._zeros_equal(node, user)

    def _zeros_equal(self, node: onnx.NodeProto, user: onnx.NodeProto) -> bool:
        return np.array_equal(self._zero(node), self._zero(user)) and self._axis(node) == self._axis(user)

    def _weight(self, node: onnx.NodeProto) -> None:
        name = node.input[0]
        values = self.values[name]
        if values.factors is None:
            self._generic(node, fake_quantize_weight, fake_quantize_by, name, (values.low, values.high))
            return
        scales = [part for factor in values.factors for part in (self._root(factor), start_of(self._root(factor)))]
        run = partial(fake_quantize_bias, limit=values.high)
        self.steps[node.output[0]] = Step(run, (name, *scales), node.output[0])

    def _generic(
        self,
        node: onnx.NodeProto,
        learned: Callable[..., object],
        computed: Callable[..., object],
        source: str,
        limits: tuple[int, int] | None = None,
    ) -> Step:
        low, high = limits or LIMITS[self._integer(node)]
        zero, scale = self._zero(node), node.input[1]
        uniform = zero.size == 0 or bool((zero == zero.reshape(-1)[0]).all())
        settings: Settings = (int(zero.reshape(-1)[0]) if uniform and zero.size else 0, low, high, self._axis(node))
        zeros = () if uniform else (node.input[2],)
        if scale in self.parent:
            reads: tuple[str, ...] = (source, self._root(scale), start_of(self._root(scale)), *zeros)
            step = Step(partial(learned, settings=settings), reads, node.output[0])
        else:
            step = Step(partial(computed, settings=settings), (source, scale, *zeros), node.output[0])
        self.steps[node.output[0]] = step
        return step

    def _zero(self, node: onnx.NodeProto) -> Numbers:
        if len(node.input) > 2 and node.input[2]:
            return np.asarray(self.graph.constant(node.input[2]))
        scale = self.graph.constant(node.input[1])
        return np.zeros(() if scale is None else scale.shape, np.int8)

    def _axis(self, node: onnx.NodeProto) -> int | None:
        """Give the axis of a scale by channel; None for one scale."""
        scale = self.graph.constant(node.input[1])
        if scale is not None and scale.size == 1:
            return None
        axis = int(attribute(node, "axis", 1))
        dims = self.graph.initializers[node.input[0]].dims if node.input[0] in self.graph.initializers else None
        return axis % len(dims) if dims is not None and len(dims) else axis

    def _dtype(self, name: str) -> str:
        return self.graph.dtypes[name]
