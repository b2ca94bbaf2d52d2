"""The operator table: how the view runs each ONNX operator with PyTorch. One file a topic, one entry an operator."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from hasten.graph.model import is_standard
from hasten.torchview.operators import (
    activations,
    attention,
    convolution,
    elementwise,
    indexing,
    integers,
    ml,
    normalization,
    pooling,
    products,
    recurrent,
    reduction,
    sampling,
    shape,
)
from hasten.torchview.operators.operator import Operator

OPERATORS: Mapping[str, Operator] = {
    **activations.TABLE,
    **attention.TABLE,
    **convolution.TABLE,
    **elementwise.TABLE,
    **indexing.TABLE,
    **integers.TABLE,
    **normalization.TABLE,
    **pooling.TABLE,
    **products.TABLE,
    **recurrent.TABLE,
    **reduction.TABLE,
    **sampling.TABLE,
    **shape.TABLE,
}
"""By ``op_type`` of ONNX's own domain."""

OTHERS: Mapping[str, Mapping[str, Operator]] = {"com.microsoft": attention.MICROSOFT, "ai.onnx.ml": ml.TABLE}
"""The tables of other domains."""


def find_operator(node: onnx.NodeProto) -> Operator | None:
    """Give how a node is run; None where the table lacks its operator."""
    table = OPERATORS if is_standard(node) else OTHERS.get(node.domain, {})
    return table.get(node.op_type)
