"""Recurrent weights that an exporter put together from whole parameters: found again, so that nothing is put together.

PyTorch's exporter cuts each weight of an LSTM or GRU into gates and joins them in ONNX's order; the kernel wants them
in PyTorch's. Doing both in every step would cost more than a small layer itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from hasten.graph.constants import evaluate
from hasten.graph.model import Graph, is_standard
from hasten.tensors import Array
from hasten.torchview.operators.operator import Site
from hasten.torchview.operators.recurrent import TORCH_ORDER, Layer

MOVES = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity", "Split")
"""Operators that only move values."""


def whole_parameters(
    graph: Graph, site: Site, layer: Layer, trained: Collection[str], known: Mapping[str, Array]
) -> tuple[str, ...] | None:
    """Name the parameters that are a node's w and r, as ``run_fused`` takes them.

    None where the kernel cannot be used, or where a weight is not one parameter with its gates moved.
    """
    node = site.node
    if not layer.fused or site.has(4) or site.has(7):
        return None
    traces = _Traces(graph, site.opset, trained, known)
    count, found = len(layer.directions), []
    parts = [traces.of(node.input[i]) for i in (1, 2)]
    for d in range(count):
        for part in parts:
            gates = np.split(part[d], len(TORCH_ORDER[layer.kind])) if part is not None else None
            name = traces.name_of([gates[gate] for gate in TORCH_ORDER[layer.kind]]) if gates is not None else None
            if name is None:
                return None
            found.append(name)
    return tuple(found)


class _Traces:
    """Follows where each value of a tensor comes from: every value of every parameter has a number."""

    def __init__(self, graph: Graph, opset: int, trained: Collection[str], known: Mapping[str, Array]) -> None:
        self.graph, self.opset, self.known = graph, opset, known
        self.trained = frozenset(trained)
        self.numbers: dict[str, Array | None] = {}
        self.next = 0

    def of(self, name: str) -> Array | None:
        """Give the numbers of a tensor's values; None where it holds others than parameters'."""
        if name not in self.numbers:
            self.numbers[name] = self._trace(name)
        return self.numbers[name]

    def name_of(self, parts: Sequence[Array]) -> str | None:
        """Give the parameter that these numbers, joined, are whole and in order."""
        joined = np.concatenate(parts)
        for name, numbers in self.numbers.items():
            if name in self.trained and numbers is not None and np.array_equal(numbers, joined):
                return name
        return None

    def _trace(self, name: str) -> Array | None:
        if name in self.trained:
            dims = tuple(self.graph.initializers[name].dims)
            first, self.next = self.next, self.next + int(np.prod(dims))
            return np.arange(first, self.next, dtype=np.int64).reshape(dims)
        node = self.graph.producers.get(name)
        if node is None or not is_standard(node) or node.op_type not in MOVES:
            return None
        every = node.op_type == "Concat"
        inputs = [self._input(item, data=every or i == 0) for i, item in enumerate(node.input)]
        if any(value is None and item for value, item in zip(inputs, node.input, strict=True)):
            return None
        return evaluate(node, inputs, self.opset)[list(node.output).index(name)]

    def _input(self, name: str, *, data: bool) -> Array | None:
        return self.of(name) if data else self.known.get(name)
