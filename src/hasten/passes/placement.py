"""Where QuantizeLinear/DequantizeLinear pairs go: which nodes compute in int8, which tensors carry 8 bits.

The shape that runtimes fuse: each *anchor* (Conv, Gemm, MatMul with constant weights) reads quantized inputs. A
convolution also gives a quantized output, because no kernel takes 8 bits and gives float; a Gemm or MatMul does so
only where the next one asks for it, so that the float parts of an encoder (layer-norm, softmax, GELU, residual sums)
stay float. *Flows* (Add, pooling, Concat, ...) between quantized convolutions keep the 8 bits flowing.

With ``through`` a Gemm or MatMul does as a convolution does: what it gives (after its bias) is quantized wherever a
flow or another anchor reads it, so that residual sums, transposes and layer-norms of an encoder move 8 bits too; and
one pair stands where a value begins, none behind what only moves it, since a runtime that likes this carries it on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from hasten.graph.model import Graph, attribute

WEIGHT_INPUT = 1
CONVOLUTIONS = ("Conv", "ConvTranspose")
ANCHORS = (*CONVOLUTIONS, "Gemm", "MatMul")
"""The operators that gain from int8: all their weight is arithmetic."""

SAME_RANGE = (
    *("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Gather"),
    *("DepthToSpace", "SpaceToDepth", "Identity", "Resize", "Pad", "Expand"),
)
"""Flows that give only values they were given: one scale for what goes in and out, so the 8 bits are copied."""

OWN_RANGE = ("Add", "Mul", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
"""Flows that compute on 8 bits and need a scale of their own."""

BINARY = ("Add", "Mul")
SHAPED_BY_INPUT = ("Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Resize", "Pad", "Expand")
"""Flows of which only input 0 is data; the others say where or how."""

SWALLOWS = (*ANCHORS, "Add")
"""Operators behind which a ReLU or a Clip from zero costs nothing: saturation to the range does it."""


@dataclass(frozen=True)
class Placement:
    """What is quantized. ``scale_of`` gives for each quantized tensor the one whose scale it shares (or itself)."""

    anchors: tuple[str, ...]
    """Nodes by name, in the order of the graph."""
    scale_of: dict[str, str]
    whole: frozenset[str]
    """Quantized tensors whose every reader gets the quantized value; of the others, only anchors and flows."""
    readers: frozenset[str]
    """The nodes that read quantized values where they can: anchors and flows."""
    copies: frozenset[str]
    """Quantized tensors without a pair of their own: moved copies of others that have one."""
    weighed: frozenset[str]
    """Quantized tensors that are multiplied with weights, or share the scale of one that is."""
    outputs: dict[str, str]
    """The quantized output of each anchor that has one (convolutions always have), by the node's name."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The quantized tensors."""
        return tuple(self.scale_of)


def quantizable_nodes(
    model: onnx.ModelProto, operators: Collection[str] = ("Conv", "Gemm", "MatMul"), *, attention: bool = False
) -> tuple[str, ...]:
    """Name the nodes that can compute in int8, in the order of the graph; ``named`` must have named them.

    They have float32 constant weights, or with ``attention`` are products of two activations.
    """
    graph = Graph(model)
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type in operators and (_has_weights(graph, node) or (attention and _is_product(graph, node)))
    )


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a copy in which every node has a name of its own: settings and profiles speak of nodes by name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    taken = {node.name for node in copy.graph.node}
    seen: set[str] = set()
    for number, node in enumerate(copy.graph.node):
        if not node.name or node.name in seen:
            base = f"{node.name or node.op_type}_{number}"
            while base in taken:
                base += "_"
            node.name = base
            taken.add(base)
        seen.add(node.name)
    return copy


def place(
    model: onnx.ModelProto,
    anchors: Collection[str],
    *,
    flows: Collection[str],
    float_nodes: Collection[str] = (),
    through: bool = False,
) -> Placement:
    """Decide what is quantized.

    Args:
        model: Its nodes are ``named``.
        anchors: Names from ``quantizable_nodes`` that shall compute in int8. A convolution among them whose output a
            float node must get in float stays in float too.
        flows: Operators that may carry 8 bits on between convolutions.
        float_nodes: Names of nodes around which nothing is quantized.
        through: 8 bits also flow out of Gemm and MatMul, not only out of convolutions.
    """
    return _Placer(Graph(model), frozenset(anchors), frozenset(flows), frozenset(float_nodes), through).place()


class _Placer:
    """The state of one ``place``: sets of node names and tensors that grow and shrink until they agree."""

    def __init__(
        self, graph: Graph, anchors: frozenset[str], flows: frozenset[str], excluded: frozenset[str], through: bool
    ) -> None:
        self.graph = graph
        self.nodes = [*graph.model.graph.node]
        self.kinds = flows
        self.through = through
        self.excluded = self._with_passages(excluded)
        self.anchors = {name for name in anchors if name not in excluded}

    def place(self) -> Placement:
        while True:
            flows = self._flows()
            hidden = {node.name for node in self._convolutions() if self._must_be_float(self.tail(node))}
            if not hidden:
                break
            self.anchors -= hidden
        outputs = {n.name: self.tail(n) for n in self._sources() if self._gives_8_bits(n, flows)}
        whole = set(outputs.values())
        whole |= {self.tail(n, i) for n in self.nodes if n.name in flows for i in data_outputs(n)}
        readers = self.anchors | flows
        tensors = whole | {x for n in self.nodes if n.name in readers for x in self.data_inputs(n)}
        scale_of = self._shared(tensors, flows)
        heads = {scale_of[n.input[0]] for n in self.nodes if n.name in self.anchors and _has_weights(self.graph, n)}
        return Placement(
            anchors=tuple(node.name for node in self.nodes if node.name in self.anchors),
            scale_of=scale_of,
            copies=frozenset(self._copies(tensors, flows)) if self.through else frozenset(),
            weighed=frozenset(name for name in tensors if scale_of[name] in heads),
            whole=frozenset(whole),
            readers=frozenset(readers),
            outputs=outputs,
        )

    def _convolutions(self) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.name in self.anchors and node.op_type in CONVOLUTIONS]

    def _sources(self) -> list[onnx.NodeProto]:
        """Give the anchors from which 8 bits may flow on."""
        return [n for n in self.nodes if n.name in self.anchors] if self.through else self._convolutions()

    def _gives_8_bits(self, anchor: onnx.NodeProto, flows: set[str]) -> bool:
        """A convolution does; a Gemm or MatMul where someone computes with it, and none must have it in float."""
        if anchor.op_type in CONVOLUTIONS:
            return True
        name = self.tail(anchor)
        return self._is_wanted(name, self.anchors | flows) and not self._must_be_float(name)

    def _is_wanted(self, name: str, readers: set[str]) -> bool:
        return any(u.name in readers and name in self.data_inputs(u) for u in self.graph.consumers.get(name, []))

    def _with_passages(self, excluded: frozenset[str]) -> frozenset[str]:
        """Add pooling and reshaping that leads to excluded nodes only: what is quantized before it reaches them too."""
        found = set(excluded)
        for node in reversed(self.nodes):
            if node.op_type in self.kinds and node.op_type not in BINARY and len(self.data_inputs(node)) == 1:
                users = [user for name in node.output for user in self.graph.consumers.get(name, [])]
                if users and all(user.name in found for user in users):
                    found.add(node.name)
        return frozenset(found)

    def tail(self, node: onnx.NodeProto, output: int = 0) -> str:
        """Give the tensor behind a node where it is quantized: after its bias and a ReLU or Clip from zero."""
        name = node.output[output]
        if self.through and (bias := self._bias_add(node)) is not None:
            node, name = bias, bias.output[0]
        follower = self.graph.only_consumer(name)
        swallowed = follower is not None and (
            follower.op_type == "Relu" or (follower.op_type == "Clip" and self._from_zero(follower))
        )
        if follower is not None and swallowed and node.op_type in SWALLOWS and follower.name not in self.excluded:
            return str(follower.output[0])
        return str(name)

    def data_inputs(self, node: onnx.NodeProto) -> list[str]:
        """Give the inputs of an anchor or a flow that carry activations."""
        if node.op_type in ANCHORS:
            names = [node.input[0]] if _has_weights(self.graph, node) else list(node.input[:2])
        else:
            names = [node.input[0]] if node.op_type in SHAPED_BY_INPUT else list(node.input)
        return [name for name in names if name and name not in self.graph.initializers]

    def _bias_add(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Give the Add of a constant that alone reads a MatMul."""
        add = self.graph.only_consumer(node.output[0]) if node.op_type == "MatMul" else None
        if add is None or add.op_type != "Add" or add.name in self.excluded:
            return None
        return add if any(name in self.graph.initializers for name in add.input) else None

    def _flows(self) -> set[str]:
        """Give the flows that have a quantized value coming in and a quantized reader going out."""
        carried = {self.tail(node) for node in self._sources()}
        found: list[onnx.NodeProto] = []
        for node in self.nodes:
            if node.op_type in self.kinds and node.name not in self.excluded and self._can_flow(node, carried):
                found.append(node)
                carried |= {self.tail(node, i) for i in data_outputs(node)}
        kept: set[str] = set()
        for node in reversed(found):
            tails = [self.tail(node, i) for i in data_outputs(node)]
            wanted = any(self._is_wanted(name, self.anchors | kept) for name in tails)
            if self.through and not wanted:  # a layer-norm reads 8 bits as well
                readers = [user for name in tails for user in self.graph.consumers.get(name, [])]
                wanted = any(user.op_type == "LayerNormalization" for user in readers)
            if wanted and not any(self._must_be_float(name) for name in tails):
                kept.add(node.name)
        # Without a flow that was dropped for its readers, what came after it may have no quantized input left.
        return self._reached(kept)

    def _reached(self, flows: set[str]) -> set[str]:
        carried = {self.tail(node) for node in self._sources()}
        reached: set[str] = set()
        for node in self.nodes:
            if node.name in flows and any(name in carried for name in self.data_inputs(node)):
                reached.add(node.name)
                carried |= {self.tail(node, i) for i in data_outputs(node)}
        return reached

    def _can_flow(self, node: onnx.NodeProto, carried: set[str]) -> bool:
        data = self.data_inputs(node)
        if node.op_type in BINARY and len(data) != 2:
            return False  # a constant operand: no kernel gains from it, and its scale would be lost
        if any(getattr(self.graph.producers.get(name), "name", None) in self.excluded for name in data):
            return False
        return any(name in carried for name in data)

    def _must_be_float(self, name: str) -> bool:
        return any(user.name in self.excluded for user in self.graph.consumers.get(name, []))

    def _from_zero(self, clip: onnx.NodeProto) -> bool:
        low = self.graph.constant(clip.input[1]) if len(clip.input) > 1 and clip.input[1] else None
        return low is not None and float(low.reshape(-1)[0]) == 0.0

    def _copies(self, tensors: set[str], flows: set[str]) -> set[str]:
        moved = [node for node in self.nodes if node.name in flows and node.op_type in SAME_RANGE]
        return {name for node in moved for i in data_outputs(node) if (name := node.output[i]) in tensors}

    def _shared(self, tensors: set[str], flows: set[str]) -> dict[str, str]:
        """Join the tensors around each value-preserving flow (union-find)."""
        parent = {name: name for name in sorted(tensors)}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for node in self.nodes:
            if node.name in flows and node.op_type in SAME_RANGE:
                made = [node.output[i] for i in data_outputs(node)]
                joined = [n for n in (*self.data_inputs(node), *made) if n in parent]
                for name in joined[1:]:
                    parent[root(name)] = root(joined[0])
        return {name: root(name) for name in parent}


def data_outputs(node: onnx.NodeProto) -> list[int]:
    """Give the outputs of a node that carry activations: of a MaxPool not the places of its maxima."""
    return [i for i, name in enumerate(node.output) if name and (i == 0 or node.op_type == "Split")]


def _has_weights(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type not in ANCHORS or len(node.input) <= WEIGHT_INPUT:
        return False
    weight = graph.initializers.get(node.input[WEIGHT_INPUT])
    if weight is None or weight.data_type != TensorProto.FLOAT or node.input[0] in graph.initializers:
        return False
    if node.op_type == "Gemm" and not _is_plain(node):
        return False
    if len(node.input) > 2 and node.input[2] and not _is_bias(graph, node):
        return False
    return len(weight.dims) == 2 if node.op_type in ("Gemm", "MatMul") else len(weight.dims) >= 3


def _is_plain(gemm: onnx.NodeProto) -> bool:
    return attribute(gemm, "alpha", 1.0) == 1.0 == attribute(gemm, "beta", 1.0) and not attribute(gemm, "transA", 0)


def _is_bias(graph: Graph, node: onnx.NodeProto) -> bool:
    bias = graph.initializers.get(node.input[2])
    return bias is not None and bias.data_type == TensorProto.FLOAT and len(bias.dims) == 1


def _is_product(graph: Graph, node: onnx.NodeProto) -> bool:
    return node.op_type == "MatMul" and not any(name in graph.initializers for name in node.input)
