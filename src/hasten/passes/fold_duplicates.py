"""Rules of ``fold`` that keep one of what is there twice."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper

from hasten.graph.constants import NEVER
from hasten.graph.model import Graph, is_standard, subgraphs
from hasten.graph.rewrite import Edit


def merge_constants(model: onnx.ModelProto) -> int:
    """Keep one of each group of equal initializers (dtype, shape, bytes). Gives the number of changes."""
    graph = Graph(model)
    edit = Edit(graph)
    kinds = Counter((tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer)
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    for tensor in model.graph.initializer:
        kind = (tensor.data_type, tuple(tensor.dims))
        if kinds[kind] == 1 or tensor.name in graph.outputs or tensor.name not in graph.consumers:
            continue
        first = kept.setdefault((*kind, _digest(tensor)), tensor.name)
        if first != tensor.name:
            edit.alias(tensor.name, first)
    return edit.commit()


def merge_duplicates(model: onnx.ModelProto) -> int:
    """Keep one of the standard nodes with equal operator, attributes and inputs. Gives the number of changes."""
    graph = Graph(model)
    edit = Edit(graph)
    kept: dict[tuple[object, ...], onnx.NodeProto] = {}
    same: dict[str, str] = {}
    for node in graph.nodes:
        if (
            not is_standard(node)
            or node.op_type in NEVER
            or any(subgraphs(node))
            or any(name in graph.outputs for name in node.output)
        ):
            continue
        attributes = sorted((item.name, item.SerializeToString(deterministic=True)) for item in node.attribute)
        inputs = tuple(same.get(name, name) for name in node.input)
        shape_of_outputs = tuple(bool(name) for name in node.output)
        first = kept.setdefault((node.domain, node.op_type, tuple(attributes), inputs, shape_of_outputs), node)
        if first is node:
            continue
        for mine, other in zip(node.output, first.output, strict=True):
            if mine:
                edit.alias(mine, other)
                same[mine] = other
        edit.remove(node)
    return edit.commit()


def _digest(tensor: onnx.TensorProto) -> bytes:
    if tensor.data_type == onnx.TensorProto.STRING:
        return hashlib.sha256(tensor.SerializeToString(deterministic=True)).digest()
    return hashlib.sha256(np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes()).digest()
