"""Raising the version of the default operator set that a model imports."""

from __future__ import annotations

import onnx
from onnx import version_converter

from hasten.graph.model import EXTERNAL_FROM_BYTES, is_standard, opset_of, subgraphs, weight_bytes

MIN_IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""The IR version that came with each operator set; a model that imports a newer set must say at least so."""


def raise_opset(model: onnx.ModelProto, version: int) -> bool:
    """Let ``model`` import at least ``version``, in place. False: that is not safe here, and nothing was changed.

    Where every operator in use has the same inputs, outputs and attributes in both versions, only the number changes;
    else ``onnx.version_converter`` rewrites the operators that differ.
    """
    now = opset_of(model)
    if now >= version:
        return True
    if model.functions:
        return False  # their bodies import versions of their own
    if all(_same_schema(node, now, version) for node in _all_nodes(model.graph)):
        _import(model, version)
        return True
    return _convert(model, version)


def _convert(model: onnx.ModelProto, version: int) -> bool:
    if weight_bytes(model) >= EXTERNAL_FROM_BYTES or not all(is_standard(node) for node in _all_nodes(model.graph)):
        return False
    try:
        converted = version_converter.convert_version(model, version)
        onnx.checker.check_model(converted)
    except (RuntimeError, ValueError, onnx.checker.ValidationError):
        return False  # the converter has no rule for an operator here
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    if [value.name for value in (*converted.graph.input, *converted.graph.output)] != names:
        return False
    for before, after in zip(model.graph.output, converted.graph.output, strict=True):
        after.CopyFrom(before)
    model.CopyFrom(converted)
    _import(model, version)
    return True


def _import(model: onnx.ModelProto, version: int) -> None:
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = version
    model.ir_version = max(model.ir_version, MIN_IR.get(version, model.ir_version))


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [node for item in graph.node for body in subgraphs(item) for node in _all_nodes(body)]
    return [*graph.node, *inner]


def _same_schema(node: onnx.NodeProto, before: int, after: int) -> bool:
    if not is_standard(node):
        return True
    old, new = (onnx.defs.get_schema(node.op_type, version, "") for version in (before, after))
    if old.since_version == new.since_version:
        return True
    return not new.deprecated and _shape_of(old) == _shape_of(new)


def _shape_of(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    attributes = sorted(
        (name, str(item.type), item.required, item.default_value.SerializeToString(deterministic=True))
        for name, item in schema.attributes.items()
    )
    inputs, outputs = ([(p.name, str(p.option)) for p in side] for side in (schema.inputs, schema.outputs))
    return (attributes, inputs, outputs)
