"""A graph cut into blocks, each what an engine runs as one kernel: a product with what follows it element by element.

A block stands for its shapes and attributes, not for its weights: two layers of equal shapes are equal blocks, and
``block_model`` makes a graph of its own out of one, to be timed. DequantizeLinear in front of a node and QuantizeLinear
behind it belong to its block: that is the form which engines compute in int8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

from hasten.errors import Unsupported
from hasten.graph.costs import FREE, QUANTIZABLE, bind
from hasten.graph.model import SHAPE_DATA_LENGTH, Graph, subgraphs
from hasten.tensors import DTYPES, Array

FOLLOWERS = frozenset(
    (
        *("BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh"),
        *("Elu", "Gelu", "Erf", "Mish", "Swish", "Softplus", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Cast"),
    )
)
"""Operators that engines compute while they write the result of the one before."""

LONGEST = 12
"""Followers that are looked at to close a region: GELU takes five, written out by tanh eight."""


@dataclass(frozen=True)
class Value:
    """A tensor of a block. ``entries`` are a constant's values where they decide what is computed: shapes, limits."""

    dtype: str
    shape: tuple[int, ...]
    constant: bool = False
    entries: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Op:
    """A node of a block, its tensors by their names in the block. Attributes: whole numbers as such, others encoded."""

    kind: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, tuple[int, ...] | str], ...]


@dataclass(frozen=True)
class Block:
    """Nodes that run as one. Equal ``key``: equal time."""

    ops: tuple[Op, ...]
    values: tuple[tuple[str, Value], ...]
    outputs: tuple[str, ...]
    opsets: tuple[tuple[str, int], ...]
    name: str = field(default="", compare=False)
    """Of the node that it is built around, in the graph that it is from."""
    covers: tuple[str, ...] = field(default=(), compare=False)
    """The names of all its nodes there."""

    @property
    def key(self) -> str:
        """Sixteen hex digits: of everything but the names."""
        told = msgspec.json.encode([self.ops, self.values, self.outputs, self.opsets])
        return hashlib.sha256(told).hexdigest()[:16]

    @property
    def kind(self) -> str:
        """The operator that it is built around, with "depthwise" and "int8" where it is so; else "rest"."""
        main = next((op for op in self.ops if op.kind in QUANTIZABLE), None)
        if main is None:
            return "rest"
        values = dict(self.values)
        groups = dict(main.attributes).get("group", (1,))
        weight = values.get(main.inputs[1])
        depthwise = groups[0] != 1 and weight is not None and weight.shape[1:2] == (1,)
        in_int8 = any(op.kind == "DequantizeLinear" for op in self.ops)
        return " ".join([main.kind, *(["depthwise"] if depthwise else []), *(["int8"] if in_int8 else [])])

    @property
    def numbers(self) -> tuple[float, ...]:
        """Every number that a width may change, in a fixed order: shapes, whole attributes, constants by value."""
        return tuple(_numbers(self))

    def with_numbers(self, numbers: Sequence[float]) -> Block:
        """Give this block with other numbers, in the order of ``numbers``."""
        left = iter(numbers)
        ops = tuple(
            replace(op, attributes=tuple((name, _refilled(value, left)) for name, value in op.attributes))
            for op in self.ops
        )
        values = []
        for name, value in self.values:
            shape = tuple(int(next(left)) for _ in value.shape)
            entries = None if value.entries is None else tuple(next(left) for _ in value.entries)
            values.append((name, replace(value, shape=shape, entries=entries)))
        return replace(self, ops=ops, values=tuple(values))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors that come from outside and are not constant."""
        made = {name for op in self.ops for name in op.outputs}
        return tuple(name for name, value in self.values if name not in made and not value.constant)


def blocks_of(model: onnx.ModelProto, dims: Mapping[str, int]) -> tuple[Block, ...]:
    """Cut a graph into blocks, in order. What takes no time (views, constants, shapes) is left out.

    So is what follows an operator whose shapes nobody infers (those of ai.onnx.ml, which scikit-learn's converter puts
    behind the network for its labels): no width reaches beyond such an operator, so its time is a constant of the
    graph. A product of matrices with unknown shapes is refused instead: it would be most of the time.

    Args:
        model: Any ONNX model.
        dims: The length of each symbolic dimension of the inputs; one that is not named is 1.

    Raises:
        Unsupported: a node holds a graph of its own, or the shape of a product's tensor cannot be inferred.
    """
    splitter = _Splitter(Graph(bind(model, dims)))
    return tuple(splitter.block(nodes) for nodes in splitter.regions() if splitter.counts(nodes))


def block_model(block: Block) -> onnx.ModelProto:
    """Make the graph of one block, with seeded weights; inputs and outputs have concrete shapes."""
    random = np.random.default_rng(0)
    values, made = dict(block.values), {name for op in block.ops for name in op.outputs}
    scales, zeros = _quantizers(block)
    graph = helper.make_graph(
        [_node(op) for op in block.ops],
        "block",
        [_info(name, values[name]) for name in block.inputs],
        [_info(name, values[name]) for name in block.outputs],
        [
            numpy_helper.from_array(_fill(value, random, scale=name in scales, zero=name in zeros), name)
            for name, value in block.values
            if value.constant and name not in made
        ],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in block.opsets]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def block_feed(block: Block) -> dict[str, Array]:
    """Draw seeded inputs for ``block_model``: normal floats, small bytes, zeros for indices."""
    random = np.random.default_rng(1)
    values = dict(block.values)
    return {name: _fill(values[name], random) for name in block.inputs}


class _Splitter:
    """Lays the nodes of one bound graph into regions."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.place = {id(node): at for at, node in enumerate(self.nodes)}
        self.known = _known(graph)
        self.opsets = tuple(sorted((item.domain, item.version) for item in graph.model.opset_import))
        self.taken: set[int] = set()

    def regions(self) -> Iterator[list[onnx.NodeProto]]:
        for node in self.nodes:
            if id(node) in self.taken or self._is_free(node):
                continue
            if any(True for _ in subgraphs(node)):
                raise Unsupported("cost model", f"node {node.name!r} ({node.op_type}) holds a graph of its own")
            region = self._grown(node)
            self.taken.update(id(item) for item in region)
            yield [*self._dequantizers(region), *region]

    def block(self, nodes: Sequence[onnx.NodeProto]) -> Block:
        local: dict[str, str] = {"": ""}
        for name in (name for node in nodes for name in (*node.input, *node.output)):
            local.setdefault(name, f"t{len(local) - 1}")
        main = next((node for node in nodes if node.op_type in QUANTIZABLE), None)
        main = main or next((node for node in nodes if node.op_type != "DequantizeLinear"), nodes[0])
        inside = {id(node) for node in nodes}
        made = [name for node in nodes for name in node.output if name]
        leaving = [name for name in made if name in self.graph.outputs or self._read_outside(name, inside)]
        return Block(
            ops=tuple(_op(node, local) for node in nodes),
            values=tuple((short, self._value(name)) for name, short in local.items() if name),
            outputs=tuple(local[name] for name in leaving or made[-1:]),
            opsets=self.opsets,
            name=main.name or main.output[0],
            covers=tuple(node.name or node.output[0] for node in nodes if node.op_type != "DequantizeLinear"),
        )

    def counts(self, nodes: Sequence[onnx.NodeProto]) -> bool:
        """Whether all shapes of a region are known, or must be."""
        if any(node.op_type in QUANTIZABLE for node in nodes):
            return True
        return all(self._shape(name) is not None for node in nodes for name in (*node.input, *node.output) if name)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        spec = self.graph.specs.get(name)
        if spec is None or not all(isinstance(length, int) for length in spec.shape):
            return None
        return tuple(int(length) for length in spec.shape)

    def _is_free(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "DequantizeLinear":
            return not any(name in self.graph.outputs for name in node.output)
        return node.op_type.lower() in FREE or all(name in self.known for name in node.output if name)

    def _grown(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        region = [node]
        while region[-1].op_type != "QuantizeLinear":
            more = self._closed(region)
            if not more:
                break
            region += more
        return region

    def _closed(self, region: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Give the fewest followers behind a region that together read all that its last node makes."""
        start = self.place[id(region[-1])]
        inner = {name for name in region[-1].output if name}
        if any(name in self.graph.outputs for name in inner):
            return []
        found: list[onnx.NodeProto] = []
        own = {id(item) for item in region}
        for node in self.nodes[start + 1 :]:
            if inner.isdisjoint(node.input):
                continue
            if id(node) in self.taken or not self._follows(node, inner, self.place[id(region[0])]):
                return []
            found.append(node)
            ids = own | {id(item) for item in found}
            if not any(self._read_outside(name, ids) for name in inner):
                return found
            if len(found) == LONGEST or any(name in self.graph.outputs for name in node.output):
                return []
            inner.update(name for name in node.output if name)
        return []

    def _follows(self, node: onnx.NodeProto, inner: set[str], before: int) -> bool:
        if node.op_type not in FOLLOWERS and node.op_type != "QuantizeLinear":
            return False
        for name in node.input:
            maker = None if name in inner or name in self.known else self.graph.producers.get(name)
            if maker is not None and (maker.op_type == "DequantizeLinear" or self.place[id(maker)] > before):
                return False  # it must wait for the other operand: that one's maker is fused with it
        return True

    def _dequantizers(self, region: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
        makers = (self.graph.producers.get(name) for node in region for name in node.input)
        found = {id(node): node for node in makers if node is not None and node.op_type == "DequantizeLinear"}
        return [node for key, node in found.items() if key not in self.taken]

    def _read_outside(self, name: str, inside: set[int]) -> bool:
        return any(id(user) not in inside for user in self.graph.consumers.get(name, []))

    def _value(self, name: str) -> Value:
        shape, spec = self._shape(name), self.graph.specs.get(name)
        if shape is None or spec is None:
            raise Unsupported("cost model", f"the shape of tensor {name!r} cannot be inferred; fix the model's inputs")
        made_inside = name in self.graph.producers and self.graph.producers[name].op_type == "DequantizeLinear"
        if name not in self.known or made_inside:
            return Value(spec.dtype, shape)
        value = self.graph.constant(name)
        count = math.prod(shape)
        says = spec.dtype in ("int64", "bool") and count <= SHAPE_DATA_LENGTH
        if value is None or not (says or (spec.dtype.startswith("float") and not shape)):
            return Value(spec.dtype, shape, constant=True)
        entries = tuple(float(entry) for entry in np.asarray(value).reshape(-1).astype(np.float64))
        return Value(spec.dtype, shape, constant=True, entries=entries)


def _known(graph: Graph) -> frozenset[str]:
    """Name what is there before the run: initializers, shapes, and what follows from these alone."""
    known = {"", *graph.initializers}
    for node in graph.nodes:
        follows = any(node.input) and all(name in known for name in node.input)
        varies = node.op_type.startswith("Random") or any(True for _ in subgraphs(node))
        if node.op_type in ("Shape", "Size", "Constant") or (follows and not varies):
            known.update(node.output)
    return frozenset(known)


def _op(node: onnx.NodeProto, local: Mapping[str, str]) -> Op:
    return Op(
        kind=node.op_type,
        domain=node.domain,
        inputs=tuple(local[name] for name in node.input),
        outputs=tuple(local[name] for name in node.output),
        attributes=tuple(sorted((item.name, _encoded(item)) for item in node.attribute)),
    )


def _encoded(item: AttributeProto) -> tuple[int, ...] | str:
    """Give whole numbers as a tuple, and all else as hex digits with its type, so that it comes back the same."""
    if item.type == AttributeProto.INTS or item.type == AttributeProto.INT:
        return tuple(item.ints) if item.type == AttributeProto.INTS else (int(item.i),)
    return str(item.SerializeToString(deterministic=True).hex())


INT_LISTS = frozenset(
    ("axes", "dilations", "kernel_shape", "pads", "perm", "strides", "output_shape", "output_padding")
)
"""Attributes of whole numbers that are lists, also where they hold one."""


def _node(op: Op) -> onnx.NodeProto:
    node = helper.make_node(op.kind, op.inputs, op.outputs, domain=op.domain)
    for name, value in op.attributes:
        if isinstance(value, str):
            node.attribute.append(AttributeProto.FromString(bytes.fromhex(value)))
        else:
            whole = value if name in INT_LISTS or len(value) != 1 else value[0]
            node.attribute.append(helper.make_attribute(name, whole, attr_type=_int_type(whole)))
    return node


def _int_type(value: tuple[int, ...] | int) -> int:
    return int(AttributeProto.INT if isinstance(value, int) else AttributeProto.INTS)


def _numbers(block: Block) -> Iterator[float]:
    for op in block.ops:
        for _, value in op.attributes:
            if not isinstance(value, str):
                yield from value
    for _, tensor in block.values:
        yield from tensor.shape
        yield from tensor.entries or ()


def _refilled(value: tuple[int, ...] | str, left: Iterator[float]) -> tuple[int, ...] | str:
    return value if isinstance(value, str) else tuple(int(next(left)) for _ in value)


def _quantizers(block: Block) -> tuple[set[str], set[str]]:
    """Name the scales and the zero points: neither may be drawn at random."""
    pairs = [op for op in block.ops if op.kind in ("QuantizeLinear", "DequantizeLinear")]
    return {op.inputs[1] for op in pairs}, {op.inputs[2] for op in pairs if len(op.inputs) > 2}


def _info(name: str, value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(DTYPES[value.dtype]), value.shape)


def _fill(value: Value, random: np.random.Generator, *, scale: bool = False, zero: bool = False) -> Array:
    """Draw a tensor: weights and activations normal, vectors of statistics positive, scales small, indices zero."""
    dtype = DTYPES[value.dtype]
    if value.entries is not None:
        return np.asarray(value.entries, np.float64).reshape(value.shape).astype(dtype)
    if scale:
        return np.full(value.shape, 0.02, dtype)
    if value.dtype.startswith(("float", "bfloat")):
        if value.constant and len(value.shape) == 1:
            return random.uniform(0.5, 1.5, value.shape).astype(dtype)  # a variance among them must not be negative
        fan_in = math.prod(value.shape[1:]) if value.constant else 1
        return (random.standard_normal(value.shape) / math.sqrt(max(fan_in, 1))).astype(dtype)
    if value.dtype in ("int8", "uint8") and not zero:
        return random.integers(0, 100, value.shape).astype(dtype)
    return np.zeros(value.shape, dtype)
