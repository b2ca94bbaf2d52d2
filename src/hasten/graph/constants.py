"""Computing a node whose inputs are all known, within bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from hasten.graph.model import Graph, attribute, dtype_name, is_standard, subgraphs
from hasten.tensors import DTYPES, Array

NEVER: Mapping[str, str] = {
    "RandomNormal": "random",
    "RandomNormalLike": "random",
    "RandomUniform": "random",
    "RandomUniformLike": "random",
    "Multinomial": "random",
    "Bernoulli": "random",
    "Dropout": "random in training; in inference it is a no-op",
    "QuantizeLinear": "part of the quantization that engines look for",
    "DequantizeLinear": "weights would be stored as float again, and engines would not find the quantization",
    "DynamicQuantizeLinear": "part of the quantization that engines look for",
}
"""Operators that are never computed ahead, and why."""

NO_LARGER = frozenset(
    (
        *("Cast", "CastLike", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Shape", "Size"),
        *("Concat", "Slice", "Split", "Sqrt", "Neg", "Abs", "Floor", "Ceil", "Round", "Exp", "Log", "Erf", "Not"),
        *("Gather", "Unique", "Compress", "ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean"),
    )
)
"""Operators whose result is bounded by their inputs, so that it need not be known before."""

GROWTH_BYTES = 1 << 16
"""A result may be this much larger than the inputs together; beyond, computing it ahead only fattens the file."""


def evaluate(node: onnx.NodeProto, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """Compute a standard node's outputs (None: an optional input that is absent).

    Raises:
        RuntimeError, ValueError, TypeError, ...: what the reference implementation raises on a node it cannot compute.
    """
    if node.op_type in _TABLE and all(array is not None for array in inputs):
        return [_TABLE[node.op_type](node, [array for array in inputs if array is not None])]
    named = {name: array for name, array in zip(node.input, inputs, strict=True) if array is not None}
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in named.items()
    ]
    results = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name]
    graph = helper.make_graph([node], "one", values, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made = dict(zip((r.name for r in results), ReferenceEvaluator(model).run(None, named), strict=True))
    return [np.asarray(made[name]) if name else np.empty(0) for name in node.output]


def known_inputs(graph: Graph, node: onnx.NodeProto) -> list[Array | None] | None:
    """Give the values of a node's inputs (None for one that is absent), or None unless all are constant."""
    if not all(not name or name in graph.initializers for name in node.input):
        return None
    return [graph.constant(name) if name else None for name in node.input]


def may_fold(graph: Graph, node: onnx.NodeProto, max_bytes: int) -> bool:
    """Tell whether a node is of a kind and of a size that may be computed ahead. Looks at no weights."""
    if not is_standard(node) or node.op_type in NEVER or any(subgraphs(node)):
        return False
    by_scales = node.op_type == "Resize" and (len(node.input) < 4 or not node.input[3])
    if by_scales and attribute(node, "coordinate_transformation_mode", "") == "align_corners":
        return False  # the reference counts from another last pixel than the runtimes do
    if any(name in graph.outputs for name in node.output):
        return False  # an output that is an initializer is refused by some engines
    given = sum(_tensor_bytes(graph.initializers[name]) for name in node.input if name in graph.initializers)
    limit = min(max_bytes, given + GROWTH_BYTES)
    sizes = [_result_bytes(graph, name) for name in node.output if name]
    if any(size is None for size in sizes):
        return node.op_type in NO_LARGER and given <= limit
    return sum(size for size in sizes if size is not None) <= limit


def _result_bytes(graph: Graph, name: str) -> int | None:
    spec = graph.specs.get(name)
    if spec is None or not all(isinstance(dim, int) for dim in spec.shape) or spec.dtype == "string":
        return None
    width = DTYPES[spec.dtype].itemsize if spec.dtype in DTYPES else 1
    return int(math.prod(dim for dim in spec.shape if isinstance(dim, int))) * width


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    name = dtype_name(tensor.data_type)
    return int(math.prod(tensor.dims)) * (DTYPES[name].itemsize if name in DTYPES and name != "string" else 1)


def _transpose(node: onnx.NodeProto, inputs: list[Array]) -> Array:
    return np.asarray(np.transpose(inputs[0], attribute(node, "perm")))


def _cast_like(node: onnx.NodeProto, inputs: list[Array]) -> Array:
    return inputs[0].astype(inputs[1].dtype)


_TABLE: Mapping[str, Callable[[onnx.NodeProto, list[Array]], Array]] = {
    "Transpose": _transpose,
    "CastLike": _cast_like,
}
"""Operators that NumPy computes at once, where setting up the reference implementation costs far more."""
