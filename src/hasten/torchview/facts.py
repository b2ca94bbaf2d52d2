"""What is known of a model before it runs: which of its constants are trained, and what the others hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import onnx
from onnx import numpy_helper

from hasten.graph.model import STANDARD, Graph, attribute, infer_shapes, is_standard, subgraphs
from hasten.graph.rewrite import Edit, all_names, copied
from hasten.tensors import Array
from hasten.torchview.operators import find_operator
from hasten.torchview.operators.operator import TORCH_DTYPES, refusal
from hasten.torchview.quantization import Quantization, find_quantization

MASK = -1e4
"""What is added to scores and has a value this low is a mask for softmax, not something to train."""

LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
WEIGHTED = frozenset(
    (
        *(*LAYERS, "PRelu", "LSTM", "GRU", "RNN", "Gather"),
        *("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization"),
        *("RMSNormalization", "QuantizeLinear"),
    )
)
"""Operators of which even a single value may be a weight; elsewhere it is a factor, an exponent or an epsilon."""


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it runs: which initializers are trained, and what the others hold."""

    model: onnx.ModelProto
    opsets: Mapping[str, int]
    graph: Graph
    """Its index, with shapes."""

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Facts:
        """Look at a model; it is copied."""
        own = onnx.ModelProto()
        own.CopyFrom(model)
        _name_weights(own)
        _separate(own)
        opsets = {"" if item.domain in STANDARD else item.domain: item.version for item in own.opset_import}
        return cls(own, opsets, Graph(infer_shapes(own)))

    @cached_property
    def names(self) -> frozenset[str]:
        """Every tensor of the graph."""
        made = (name for node in self.nodes for name in node.output)
        return frozenset((*made, *self.inputs, *self.graph.initializers)) - {""} - self.quantization.hidden

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The graph's inputs, without those that are initializers."""
        return tuple(v.name for v in self.model.graph.input if v.name not in self.graph.initializers)

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes, without the names of optional outputs that nobody reads.

        Raises:
            Unsupported: names the first node that the table cannot run.
        """
        used = {name for node in self.graph.nodes for name in node.input} | self.graph.outputs
        kept = []
        for node in self.graph.nodes:
            if any(subgraphs(node)):
                raise refusal(node, "holds a graph of its own; fold it first, or leave this model untrained")
            norm = node.op_type == "BatchNormalization" and is_standard(node)
            if norm and any(name not in self.graph.initializers for name in node.input[3:5]):
                raise refusal(
                    node, "computes its running statistics in the graph, so that nothing can be learned of them"
                )
            node = copied(node)
            for i in range(1, len(node.output)):
                if node.output[i] not in used:
                    node.output[i] = ""
            kept.append(node)
        return kept

    @cached_property
    def quantization(self) -> Quantization:
        """The quantized tensors."""
        return find_quantization(self.graph)

    @cached_property
    def statistics(self) -> frozenset[str]:
        """The running means and variances."""
        norms = (node for node in self.graph.nodes if node.op_type == "BatchNormalization")
        return frozenset(name for node in norms for name in node.input[3:5] if name in self.graph.initializers)

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The initializers that are parameters, in the order of the file."""
        quantized = self.quantization
        special = quantized.values.keys() | set(quantized.scales.values())
        fixed = self._settings | self.statistics | quantized.fixed | quantized.scales.keys()
        return tuple(
            name
            for name, tensor in self.graph.initializers.items()
            if name in special or (name not in fixed and self._is_weight(tensor) and not self._is_idle(name))
        )

    @cached_property
    def known(self) -> dict[str, Array]:
        """The values of the initializers that are never trained."""
        apart = {*self.trained, *self.statistics}
        return {name: self.value(name) for name in self.graph.initializers.keys() - apart}

    def value(self, name: str) -> Array:
        """Give the value of an initializer, as it is in the file."""
        return np.asarray(numpy_helper.to_array(self.graph.initializers[name]))

    @cached_property
    def _settings(self) -> set[str]:
        """Initializers of which every use is a setting, as a Clip's bounds are."""
        uses: Counter[str] = Counter()
        settings: Counter[str] = Counter()
        for node in self.graph.nodes:
            entry = find_operator(node)
            for i, name in enumerate(node.input):
                uses[name] += 1
                settings[name] += bool(entry and (i in entry.fixed or i in entry.host or -1 in entry.host))
        return {name for name, count in settings.items() if count == uses[name]}

    def _is_weight(self, tensor: onnx.TensorProto) -> bool:
        """Tell whether an initializer is to be trained: float, not a number, not a mask."""
        dtype = TORCH_DTYPES.get(tensor.data_type)
        if dtype is None or not dtype.is_floating_point or not tensor.dims or 0 in tensor.dims:
            return False
        value, users = self.value(tensor.name), self._users(tensor.name)
        if value.size == 1 and not any(self._takes_weight(user, tensor.name) for user in users):
            return False
        low, high = float(value.min()), float(value.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        return not (low <= MASK and value.ndim > 1 and all(user.op_type in ("Add", "Where") for user in users))

    def _takes_weight(self, node: onnx.NodeProto, name: str) -> bool:
        """Tell whether a single value is a weight where a node reads it: not if it is, say, a factor or an epsilon."""
        if node.op_type == "Add":
            other = [item for item in node.input if item != name]
            return bool(other) and self.graph.producer(other[0], *LAYERS) is not None
        return node.op_type in WEIGHTED

    def _is_idle(self, name: str) -> bool:
        """Tell whether an initializer is but zeros that an exporter gave convolutions before batch-norm as a bias."""
        users = self._users(name)
        behind = [self.graph.only_consumer(user.output[0]) for user in users]
        before_norm = all(node is not None and node.op_type == "BatchNormalization" for node in behind)
        biases = all(user.op_type == "Conv" and list(user.input).index(name) == 2 for user in users)
        return bool(users) and biases and before_norm and not self.value(name).any()

    def _users(self, name: str) -> list[onnx.NodeProto]:
        return self.graph.consumers.get(name, [])


def _name_weights(model: onnx.ModelProto) -> None:
    """Make initializers of the float tensors that some converters write as Constant nodes. In place."""
    edit = Edit(Graph(model))
    for node in edit.graph.nodes:
        value = attribute(node, "value") if node.op_type == "Constant" and is_standard(node) else None
        if value is None or node.output[0] in edit.graph.outputs:
            continue
        dtype = TORCH_DTYPES.get(value.data_type)
        if dtype is not None and dtype.is_floating_point and math.prod(value.dims) > 1:
            edit.set_constant(node.output[0], np.asarray(numpy_helper.to_array(value)))
            edit.remove(node)
    edit.commit()


def _own_inputs(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...]:
    """Give the inputs of a node that no other may share: running statistics, and the scales of biases."""
    if node.op_type == "BatchNormalization":
        return (3, 4)
    return (1,) if node.op_type == "DequantizeLinear" and graph.dtypes.get(node.input[0]) == "int32" else ()


def _separate(model: onnx.ModelProto) -> None:
    """Give each node constants of its own where training moves those of different nodes apart. In place."""
    graph = Graph(model)
    uses = Counter(name for node in graph.nodes for name in node.input)
    taken = all_names(model.graph)
    for node in model.graph.node:
        for i in _own_inputs(graph, node):
            name = node.input[i]
            if uses[name] > 1 and name in graph.initializers:
                uses[name] -= 1
                fresh = next(made for n in count(1) if (made := f"{name}_{n}") not in taken)
                taken.add(fresh)
                node.input[i] = fresh
                model.graph.initializer.add().CopyFrom(graph.initializers[name])
                model.graph.initializer[-1].name = fresh
