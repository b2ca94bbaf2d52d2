"""Operators of ``ai.onnx.ml``, in which exported models of scikit-learn end: forests, boosted trees, scaled inputs.

ONNX's own inference has no rule for many of them. The rules here follow their definitions
(https://github.com/onnx/onnx/blob/main/docs/Operators-ml.md), for inputs [rows, features].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

from hasten.errors import BadInput
from hasten.graph.model import STANDARD, attribute

DOMAIN = "ai.onnx.ml"

STANDARD_OPSET = 17
"""Of ONNX's own operators, where a model has none of them until now."""

MOST_ROUNDS = 32
"""Times that inference is asked anew: once for each stretch of such operators between ONNX's own."""

LARGEST = 1 << 31
"""A length or a number of classes is less."""

LONGEST_NOTE = 500
"""Characters of what the lineage says of an output."""

Dims = list[int | str]


@dataclass(frozen=True)
class Given:
    """A tensor's element type and shape."""

    kind: int
    dims: Dims


def open_zipmaps(model: onnx.ModelProto) -> list[str]:
    """Give the tensor of probabilities, in place, where the model gives a list of dictionaries made of it (ZipMap).

    Returns:
        For each such output, its name and the classes of its columns.
    """
    graph, told, own = model.graph, [], _own(model)
    outputs = {value.name: value for value in graph.output}
    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, "ZipMap") or "ZipMap" in own:
            continue
        if len(node.input) != 1 or len(node.output) != 1:
            continue
        value = outputs.get(node.output[0])
        if value is None:
            continue
        labels = _items(node, "classlabels_strings") or _items(node, "classlabels_int64s")
        classes = [label.decode(errors="replace") if isinstance(label, bytes) else str(label) for label in labels]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [None, len(classes)]))
        node.CopyFrom(onnx.helper.make_node("Identity", node.input, node.output, name=node.name))
        if not any(opset.domain in STANDARD for opset in model.opset_import):
            model.opset_import.add(domain="", version=STANDARD_OPSET)
        told.append(f"{value.name}: columns {', '.join(classes)}"[:LONGEST_NOTE])
    return told


def type_ml_outputs(model: onnx.ModelProto) -> None:
    """Write down, in place, what is known of such outputs, from the graph's inputs on.

    The model was checked. Nothing is done for one without such operators, and what is not known stays so.

    Raises:
        BadInput: an attribute that a shape follows from is out of range; names the node and the attribute.
        onnx.shape_inference.InferenceError: inference does not take the graph.
    """
    graph, known = model.graph, RULES.keys() - _own(model)
    untyped = [node for node in graph.node if node.domain == DOMAIN and node.op_type in known]
    for _ in range(MOST_ROUNDS if untyped else 0):
        found = _known(onnx.shape_inference.infer_shapes(model, data_prop=True))
        before = len(untyped)
        for node in untyped:
            first = found.get(node.input[0]) if node.input else None
            if first is None or len(first.dims) != 2:
                continue
            for name, given in zip(node.output, RULES[node.op_type](node, first), strict=False):
                if name and name not in found:
                    _write(graph, name, given)
                    found[name] = given
        untyped = [node for node in untyped if any(name and name not in found for name in node.output)]
        if len(untyped) in (0, before):
            return


def _own(model: onnx.ModelProto) -> set[str]:
    """Give the names in this domain that the model defines itself, as functions."""
    return {function.name for function in model.functions if function.domain == DOMAIN}


def _known(model: onnx.ModelProto) -> dict[str, Given]:
    """Give the tensors whose element type and every length, or its name, is known."""
    graph, found = model.graph, {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
        if tensor.elem_type and tensor.HasField("shape") and "" not in dims:
            found[value.name] = Given(tensor.elem_type, dims)
    return found


def _write(graph: onnx.GraphProto, name: str, given: Given) -> None:
    """Write what is given of a tensor; of an output what it does not say itself."""
    made = onnx.helper.make_tensor_value_info(name, given.kind, given.dims)
    shape = made.type.tensor_type.shape
    for value in graph.output:
        if value.name == name:
            for dim, other in zip(value.type.tensor_type.shape.dim, shape.dim, strict=False):
                if dim.WhichOneof("value") is None:
                    dim.CopyFrom(other)
            return
    graph.value_info.append(made)


Rule = Callable[[onnx.NodeProto, Given], Iterator[Given]]


def _same_floats(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, first.dims)


def _same(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield first


def _columns(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, [first.dims[0], sum(_numbers(node, "inputdimensions"))])


def _targets(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, [first.dims[0], _number(node, "targets", 1)])


def _one_target(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, [first.dims[0], 1])


def _tree_targets(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    usual = max(_numbers(node, "target_ids"), default=0) + 1
    yield Given(TensorProto.FLOAT, [first.dims[0], _number(node, "n_targets", usual)])


def _tree_classes(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    texts = _items(node, "classlabels_strings")
    yield Given(TensorProto.STRING if texts else TensorProto.INT64, [first.dims[0]])
    yield Given(TensorProto.FLOAT, [first.dims[0], len(texts or _items(node, "classlabels_int64s"))])


def _vector_classes(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.STRING if _items(node, "classlabels_strings") else TensorProto.INT64, first.dims[:1])
    if len(node.output) > 1:
        yield Given(TensorProto.FLOAT, [first.dims[0], f"{node.output[1]}_dim1"])  # of pairs of classes, or of classes


def _items(node: onnx.NodeProto, name: str) -> list[Any]:
    """Give a list, empty where there is none. Raises BadInput where it is something else."""
    try:
        found = attribute(node, name, [])
    except ValueError:  # a text that is no UTF-8, or a reference to what is not there
        found = None
    if not isinstance(found, list):
        raise BadInput(f"attribute {name!r} of node {node.name!r} ({node.op_type}) must be a list")
    return found


def _numbers(node: onnx.NodeProto, name: str) -> list[int]:
    """Give a list of numbers. Raises BadInput where one is none, or negative."""
    found = _items(node, name)
    if not all(isinstance(item, int) and 0 <= item < LARGEST for item in found):
        raise BadInput(f"attribute {name!r} of node {node.name!r} ({node.op_type}) must be whole numbers from 0 on")
    return found


def _number(node: onnx.NodeProto, name: str, usual: int) -> int:
    """Give a number from 1 on, or ``usual`` where there is none. Raises BadInput where it is not one."""
    found = attribute(node, name, usual)
    if not isinstance(found, int) or not 0 < found < LARGEST:
        raise BadInput(f"attribute {name!r} of node {node.name!r} ({node.op_type}) must be a whole number from 1 on")
    return found


RULES: dict[str, Rule] = {
    "FeatureVectorizer": _columns,
    "Imputer": _same,
    "LinearRegressor": _targets,
    "Normalizer": _same_floats,
    "SVMClassifier": _vector_classes,
    "SVMRegressor": _one_target,
    "Scaler": _same_floats,
    "TreeEnsembleClassifier": _tree_classes,
    "TreeEnsembleRegressor": _tree_targets,
}
