"""What operators of ``ai.onnx.ml`` give, where ONNX's own inference has no rule for them.

Exporters of scikit-learn's models end in them: forests, boosted trees, scaled inputs. The rules follow the operators'
definitions (https://github.com/onnx/onnx/blob/main/docs/Operators-ml.md), for inputs [rows, features].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from hasten.graph.model import attribute

DOMAIN = "ai.onnx.ml"

Dims = list[int | str]


@dataclass(frozen=True)
class Given:
    """A tensor's element type and shape."""

    kind: int
    dims: Dims


def type_ml_outputs(model: onnx.ModelProto) -> None:
    """Write down, in place, what is known of such outputs, from the graph's inputs on.

    Nothing is done for a model without such operators, and what is not known stays so.
    """
    while True:
        unknown = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in RULES]
        if not unknown:
            return
        found = _known(onnx.shape_inference.infer_shapes(model, data_prop=True))
        news = [
            (name, given)
            for node in unknown
            if node.input and (first := found.get(node.input[0])) is not None and len(first.dims) == 2
            for name, given in zip(node.output, RULES[node.op_type](node, first), strict=False)
            if name and name not in found
        ]
        if not [name for name, given in news if _write(model.graph, name, given)]:
            return


def _known(model: onnx.ModelProto) -> dict[str, Given]:
    """Give the tensors whose element type and every length, or its name, is known."""
    graph, found = model.graph, {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
        if tensor.elem_type and tensor.HasField("shape") and "" not in dims:
            found[value.name] = Given(tensor.elem_type, dims)
    return found


def _write(graph: onnx.GraphProto, name: str, given: Given) -> bool:
    """Write what is given of a tensor; of an output what it does not say itself. False where that is nothing."""
    made = onnx.helper.make_tensor_value_info(name, given.kind, given.dims)
    shape = made.type.tensor_type.shape
    for value in graph.output:
        if value.name == name:
            mine = value.type.tensor_type.shape
            open_dims = [dim for dim in mine.dim if dim.WhichOneof("value") is None]
            if len(mine.dim) != len(shape.dim) or not open_dims:
                return False
            for dim, other in zip(mine.dim, shape.dim, strict=True):
                if dim.WhichOneof("value") is None:
                    dim.CopyFrom(other)
            return True
    graph.value_info.append(made)
    return True


Rule = Callable[[onnx.NodeProto, Given], Iterator[Given]]


def _same_floats(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, first.dims)


def _same(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield first


def _columns(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, [first.dims[0], sum(attribute(node, "inputdimensions", []))])


def _targets(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, [first.dims[0], attribute(node, "targets", 1)])


def _one_target(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.FLOAT, [first.dims[0], 1])


def _tree_targets(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    targets = attribute(node, "n_targets", 0) or max(attribute(node, "target_ids", [0]), default=0) + 1
    yield Given(TensorProto.FLOAT, [first.dims[0], targets])


def _tree_classes(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    texts = attribute(node, "classlabels_strings", [])
    yield Given(TensorProto.STRING if texts else TensorProto.INT64, [first.dims[0]])
    yield Given(TensorProto.FLOAT, [first.dims[0], len(texts or attribute(node, "classlabels_int64s", []))])


def _vector_classes(node: onnx.NodeProto, first: Given) -> Iterator[Given]:
    yield Given(TensorProto.STRING if attribute(node, "classlabels_strings", []) else TensorProto.INT64, first.dims[:1])
    yield Given(TensorProto.FLOAT, [first.dims[0], f"{node.output[1]}_dim1"])  # of pairs of classes, or of classes


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
