"""Which nodes ``cast`` leaves in float32, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper

from hasten.errors import UnknownName
from hasten.graph.model import Graph, attribute, is_standard, subgraphs
from hasten.tensors import DTYPES, Array

Low = Literal["float16", "bfloat16"]

_LONG_SUM = "a long sum loses its small terms, and in float16 overflows"
_SQUARES = "squares overflow float16 beyond 256"

KEEP: Mapping[str, str] = {
    "Pow": _SQUARES,
    "ReduceSumSquare": _SQUARES,
    "ReduceL2": _SQUARES,
    "ReduceSum": _LONG_SUM,
    "ReduceMean": _LONG_SUM,
    "ReduceL1": _LONG_SUM,
    "ReduceLogSum": _LONG_SUM,
    "ReduceLogSumExp": _LONG_SUM,
    "ReduceProd": "a long product overflows",
    "CumSum": _LONG_SUM,
    "Exp": "overflows float16 beyond 11",
    "Range": "steps would be rounded, and the number of elements change",
    "QuantizeLinear": "part of a quantization, whose scales are float32",
    "DequantizeLinear": "part of a quantization, whose scales are float32",
    "DynamicQuantizeLinear": "part of a quantization, whose scales are float32",
    "Constant": "fold turns constants into initializers, which are cast",
}
"""Operators that stay in float32, and why. Those whose definition does not take the dtype are found by themselves."""

NAMES_ITS_DTYPE = ("Cast", "ConstantOfShape")
"""Operators whose output's dtype is an attribute."""


@dataclass(frozen=True)
class Sides:
    """For each input and output of a node: does it become low? Only float32 ones do."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]
    whole: bool = True
    """The operator's definition lets every float32 tensor of the node become low."""

    @classmethod
    def none(cls, node: onnx.NodeProto) -> Sides:
        """Nothing becomes low."""
        return cls((False,) * len(node.input), (False,) * len(node.output))

    @property
    def any(self) -> bool:
        """Something becomes low."""
        return any(self.inputs) or any(self.outputs)


def sides_of(graph: Graph, node: onnx.NodeProto, to: Low) -> Sides:
    """Read from the operator's definition which of a node's float32 tensors may become ``to``.

    Tensors that share a type variable become so together; an output whose variable no input has, only where the
    operator names its dtype (``NAMES_ITS_DTYPE``).
    """
    schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
    allowed = {item.type_param_str: f"tensor({to})" in item.allowed_type_strs for item in schema.type_constraints}
    floats = [[graph.dtypes.get(name) == "float32" for name in side] for side in (node.input, node.output)]
    types = [
        [_type_of(formal, i) for i in range(len(side))]
        for formal, side in ((schema.inputs, node.input), (schema.outputs, node.output))
    ]
    bound = {kind for kind, is_float in zip(types[0], floats[0], strict=True) if is_float and allowed.get(kind)}
    if node.op_type in NAMES_ITS_DTYPE and graph.dtypes.get((*node.input, "")[0]) != to:
        bound |= set(types[1])
    bound = {kind for kind in bound if allowed.get(kind)}
    inputs, outputs = (
        tuple(is_float and kind in bound for kind, is_float in zip(kinds, mask, strict=True))
        for kinds, mask in zip(types, floats, strict=True)
    )
    if node.op_type == "Cast":
        inputs = (False,)  # it takes whatever there is
    return Sides(inputs, outputs, whole=all(allowed.get(kind, False) for kind in _float_types(types, floats)))


def why_float32(graph: Graph, to: Low, exclude: Sequence[str] = ()) -> list[str | None]:
    """Say for each node why it stays in float32, or None where it need not.

    Raises:
        UnknownName: ``exclude`` names neither a node nor an operator of the model.
    """
    known = {word for node in graph.nodes for word in (node.name, node.op_type)}
    for word in exclude:
        if word not in known:
            raise UnknownName("node or operator", word, known)
    return [_why(graph, node, to, exclude) for node in graph.nodes]


def converted(value: Array, to: Low, name: str) -> onnx.TensorProto:
    """Give an array as an initializer in ``to``, rounded to nearest."""
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(np.asarray(value).astype(DTYPES[to]), name)


def constant_of_shape(node: onnx.NodeProto) -> Array:
    """Give the one element that a ConstantOfShape repeats."""
    value = attribute(node, "value")
    return np.zeros(1, np.float32) if value is None else np.asarray(numpy_helper.to_array(value))


def _why(graph: Graph, node: onnx.NodeProto, to: Low, exclude: Sequence[str]) -> str | None:
    if node.name in exclude or node.op_type in exclude:
        return "excluded"
    if not is_standard(node):
        return f"{node.domain}.{node.op_type} is not one of ONNX's own operators"
    if any(subgraphs(node)):
        return f"{node.op_type} holds graphs"
    if node.op_type in KEEP:
        return KEEP[node.op_type]
    if unknown := [name for name in (*node.input, *node.output) if name and name not in graph.dtypes]:
        return f"the dtype of {unknown[0]!r} is not known"
    sides = sides_of(graph, node, to)
    if not sides.any and any(graph.dtypes.get(name) == "float32" for name in node.input):
        return None if node.op_type == "Cast" else f"{node.op_type} does not take {to}"
    values = [(name, graph.constant(name)) for name, low in zip(node.input, sides.inputs, strict=True) if low]
    if node.op_type == "ConstantOfShape":
        values.append(("value", constant_of_shape(node)))
    reasons = (_why_not_held(name, value, to) for name, value in values if value is not None)
    return next((reason for reason in reasons if reason), None)


def _why_not_held(name: str, value: Array, to: Low) -> str | None:
    """Say why a constant cannot be held: a finite element overflows, or nothing but zeros would be left."""
    finite = value[np.isfinite(value)]
    with np.errstate(over="ignore", under="ignore"):
        low = finite.astype(DTYPES[to]).astype(np.float32)
    if not np.isfinite(low).all():
        return f"{name!r} has {finite[~np.isfinite(low)][0]:.3g}, which is beyond {to}"
    if finite.any() and not low.any():
        return f"{name!r} ({finite[finite != 0][0]:.3g}) would become zero in {to}"
    return None


def _type_of(formal: Sequence[onnx.defs.OpSchema.FormalParameter], i: int) -> str:
    """Give the type variable of the i-th tensor; the last parameter may be repeated."""
    return formal[min(i, len(formal) - 1)].type_str


def _float_types(types: list[list[str]], floats: list[list[bool]]) -> list[str]:
    return [k for kinds, mask in zip(types, floats, strict=True) for k, f in zip(kinds, mask, strict=True) if f]
