"""Rules of ``fuse`` for activations that exporters spell out: GELU and hard swish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import onnx

from hasten.graph.model import Graph, is_standard
from hasten.graph.opset import raise_opset
from hasten.graph.patterns import Polynomial, polynomial, same_polynomial, scalar, source_of, users_above
from hasten.graph.rewrite import Edit

Match = tuple[onnx.NodeProto, str, dict[str, object]]
"""The last node of a pattern, the tensor it is a function of, and the attributes of the operator that says it."""

_Finder = Callable[[Graph], Iterator[Match]]

_HALF_OF_BOTH: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_TANH = math.sqrt(2 / math.pi)


def fuse_gelu(model: onnx.ModelProto) -> int:
    """Write x (1 + erf(x / sqrt 2)) / 2, and its approximation by tanh, as Gelu (version 20). Gives the changes.

    Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415. Any order and grouping of the arithmetic.
    """
    return _fuse(model, "Gelu", 20, _gelus)


def fuse_hard_swish(model: onnx.ModelProto) -> int:
    """Write x min(max(x + 3, 0), 6) / 6 as HardSwish (version 14). Gives the number of changes.

    Howard et al., "Searching for MobileNetV3", arXiv:1905.02244, section 5.2.
    """
    return _fuse(model, "HardSwish", 14, _hard_swishes)


def _fuse(model: onnx.ModelProto, kind: str, version: int, find: _Finder) -> int:
    first = Graph(model)
    if not any(_same_rank(first, node, source) for node, source, _ in find(first)) or not raise_opset(model, version):
        return 0
    edit = Edit(Graph(model))
    done: set[int] = set()
    for node, source, attributes in find(edit.graph):
        if id(node) not in done and _same_rank(edit.graph, node, source):
            done.add(id(node))
            edit.replace(node, edit.make(kind, [source], node.output[0], **attributes))
    return edit.commit()


def _same_rank(graph: Graph, node: onnx.NodeProto, source: str) -> bool:
    """Tell whether an output has the rank of what it is made of: a constant of more axes gives it more."""
    specs = [graph.specs.get(name) for name in (node.output[0], source)]
    return len({len(spec.shape) for spec in specs if spec is not None}) < 2


def _gelus(graph: Graph) -> Iterator[Match]:
    arguments: dict[str, tuple[Polynomial, str]] = {
        "Erf": ({(1,): math.sqrt(0.5)}, "none"),
        "Tanh": ({(1,): _TANH, (3,): 0.044715 * _TANH}, "tanh"),
    }
    for inner in graph.nodes:
        if inner.op_type not in arguments or not is_standard(inner):
            continue
        argument, approximate = arguments[inner.op_type]
        for source in source_of(graph, inner.input[0]):
            if not same_polynomial(polynomial(graph, inner.input[0], (source,)), argument):
                continue
            if root := _root(graph, (source, inner.output[0]), _HALF_OF_BOTH):
                yield root, source, {"approximate": approximate}
                break


def _hard_swishes(graph: Graph) -> Iterator[Match]:
    for inner in graph.nodes:
        if inner.op_type != "Clip" or len(inner.input) < 3 or not is_standard(inner):
            continue
        if (scalar(graph, inner.input[1]), scalar(graph, inner.input[2])) != (0.0, 6.0):
            continue
        for source in source_of(graph, inner.input[0]):
            if not same_polynomial(polynomial(graph, inner.input[0], (source,)), {(1,): 1.0, (0,): 3.0}):
                continue
            if root := _root(graph, (source, inner.output[0]), {(1, 1): 1 / 6}):
                yield root, source, {}
                break


def _root(graph: Graph, atoms: tuple[str, str], wanted: Polynomial) -> onnx.NodeProto | None:
    for node in users_above(graph, atoms[1], levels=4):
        if same_polynomial(polynomial(graph, node.output[0], atoms), wanted):
            return node
    return None
