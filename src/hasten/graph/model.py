"""Reading and writing a model's ONNX graph, and who makes and who uses each tensor."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from hasten.artifact import Artifact
from hasten.errors import BadInput
from hasten.tensors import Array, Dim, Signature, TensorSpec

EXTERNAL_FROM_BYTES = 1 << 30
"""From this size on, weights go into ``model.onnx.data``: a protobuf file ends at 2 GiB."""

ENTRY = "model.onnx"

STANDARD = ("", "ai.onnx")
"""The two spellings of ONNX's own domain."""

SHAPE_DATA_LENGTH = 1024
"""Constants longer than this hold no shapes, so shape inference need not see their values."""


def read_model(source: Artifact) -> onnx.ModelProto:
    """Read an ``onnx`` artifact with all its weights."""
    return onnx.load(source.entry)


def write_model(
    model: onnx.ModelProto,
    folder: Path,
    source: Artifact | None = None,
    *,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
) -> Artifact:
    """Write a model into ``folder`` and describe it, with the traits of ``source`` changed as told.

    The graph is checked (``onnx.checker``) and its inner shapes are inferred anew.
    """
    inferred = infer_shapes(model)
    external = weight_bytes(inferred) >= EXTERNAL_FROM_BYTES
    onnx.save_model(
        inferred,
        folder / ENTRY,
        save_as_external_data=external,
        location=f"{ENTRY}.data" if external else None,
    )
    onnx.checker.check_model(str(folder / ENTRY))
    return Artifact.of(
        folder,
        ENTRY,
        format="onnx",
        signature=signature_of(inferred),
        traits=((source.traits if source else frozenset()) | set(add)) - set(remove),
        preprocess=source.preprocess if source else None,
    )


def weight_bytes(model: onnx.ModelProto) -> int:
    """Give the bytes of a model's initializers. ``ByteSize`` of a whole model fails from 2 GiB on."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in model.graph.initializer)


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a copy of the model with ``value_info`` made anew. Tensors that inference cannot type are left out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    refresh_shapes(copy)
    return copy


def refresh_shapes(model: onnx.ModelProto) -> None:
    """Make ``value_info`` anew, in place; a model of any size will do.

    The graph's outputs keep the dimensions that they declare; those that they do not are filled in.
    """
    inferred = onnx.shape_inference.infer_shapes(_skeleton(model), data_prop=True).graph
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.value_info)
    found = {value.name: value for value in inferred.output}
    for value in model.graph.output:
        if value.type.WhichOneof("value") in (None, "tensor_type"):
            _fill_dims(value, found[value.name])


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model without the bytes of its weights, and without value_info but where inference does not reach."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = bare.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    for node in graph.node:
        if is_standard(node) and node.op_type == "GroupNormalization":  # inference has no rule for it
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    beyond = {name for node in model.graph.node if is_beyond_inference(node) for name in node.output}
    graph.value_info.extend(value for value in model.graph.value_info if value.name in beyond)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SHAPE_DATA_LENGTH:
            graph.initializer.append(tensor)
        else:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return bare


def _fill_dims(value: onnx.ValueInfoProto, inferred: onnx.ValueInfoProto) -> None:
    declared, found = value.type.tensor_type, inferred.type.tensor_type
    if not declared.elem_type:
        declared.elem_type = found.elem_type
    if not declared.HasField("shape"):
        if found.HasField("shape"):
            declared.shape.CopyFrom(found.shape)
        return
    for mine, other in zip(declared.shape.dim, found.shape.dim, strict=False):
        if mine.WhichOneof("value") is None:
            mine.CopyFrom(other)


def signature_of(model: onnx.ModelProto) -> Signature:
    """Read inputs (without those that are initializers) and outputs. A dimension without a name gets one.

    Raises:
        BadInput: an input or output is not a tensor, or its rank is unknown.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    return Signature(
        tuple(spec_of(value) for value in model.graph.input if value.name not in constant),
        tuple(spec_of(value) for value in model.graph.output),
    )


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """Read one tensor's name, dtype and shape."""
    if value.type.WhichOneof("value") != "tensor_type" or not value.type.tensor_type.HasField("shape"):
        raise BadInput(f"{value.name!r} is not a tensor of known rank, and hasten takes only those")
    tensor = value.type.tensor_type
    dims: list[Dim] = [
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_dim{axis}"
        for axis, d in enumerate(tensor.shape.dim)
    ]
    return TensorSpec(value.name, dtype_name(tensor.elem_type), tuple(dims))


def dtype_name(elem_type: int) -> str:
    """Give the name in ``DTYPES`` of an ONNX element type."""
    if elem_type == onnx.TensorProto.STRING:
        return "string"
    return onnx.helper.tensor_dtype_to_np_dtype(elem_type).name


@dataclass(frozen=True)
class Graph:
    """An index over a model's main graph. It does not follow changes: make a new one after editing."""

    model: onnx.ModelProto

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes in order. While this list lives, a node's ``id`` tells it from others."""
        return list(self.model.graph.node)

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that use each tensor, with those that use it inside a subgraph."""
        users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(_reads(node)):
                users[name].append(node)
        return dict(users)

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """The constant tensors by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def outputs(self) -> frozenset[str]:
        """The names of the graph's outputs."""
        return frozenset(value.name for value in self.model.graph.output)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor that has one, also where its shape is unknown."""
        graph = self.model.graph
        found = {
            value.name: dtype_name(value.type.tensor_type.elem_type)
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.elem_type
        }
        return found | {tensor.name: dtype_name(tensor.data_type) for tensor in graph.initializer}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor that has them: inputs, inner values, outputs, initializers."""
        graph = self.model.graph
        found = {
            value.name: spec_of(value)
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.HasField("shape")
        }
        for tensor in graph.initializer:
            found[tensor.name] = TensorSpec(tensor.name, dtype_name(tensor.data_type), tuple(tensor.dims))
        return found

    @cached_property
    def opset(self) -> int:
        """The version of the default operator set."""
        return opset_of(self.model)

    def constant(self, name: str) -> Array | None:
        """Give a tensor's value where it is an initializer, else None."""
        tensor = self.initializers.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def producer(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """Give the node that makes a tensor if it is one of these standard operators, else None."""
        node = self.producers.get(name)
        return node if node is not None and is_standard(node) and node.op_type in kinds else None

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Give the one node that uses a tensor, or None if there are more, none, or it is an output."""
        users = self.consumers.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None


def skeleton_of(model: onnx.ModelProto) -> str:
    """Give a SHA-256 of what a graph computes but for its numbers: equal skeletons do the same work in the same time.

    Nodes with their attributes, tensors with their dtypes and shapes, and the values of small integer constants, which
    are shapes; not those of weights, scales and zero points.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if math.prod(tensor.dims) > SHAPE_DATA_LENGTH or tensor.data_type not in (
            onnx.TensorProto.INT64,
            onnx.TensorProto.BOOL,
        ):
            for field in ("raw_data", "float_data", "int32_data", "double_data", "uint64_data", "external_data"):
                tensor.ClearField(field)
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def opset_of(model: onnx.ModelProto) -> int:
    """Give the version of the default operator set that a model imports."""
    return next((item.version for item in model.opset_import if item.domain in STANDARD), 1)


def is_standard(node: onnx.NodeProto) -> bool:
    """Tell whether a node's operator is one of ONNX's own."""
    return node.domain in STANDARD


def is_beyond_inference(node: onnx.NodeProto) -> bool:
    """Tell whether shape inference may know less of a node's outputs than ``value_info`` says.

    It knows no operators but ONNX's own, and not that a Range up to a named dimension is as long.
    """
    return not is_standard(node) or node.op_type == "Range"


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Give an attribute's value, or ``default`` where the node has none. Strings come as ``str``.

    Its type is the operator's definition's business, which ``onnx.checker`` has seen to.
    """
    for item in node.attribute:
        if item.name == name:
            value = onnx.helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Give the graphs in a node's attributes: the branches of an If, the body of a Loop or a Scan."""
    for item in node.attribute:
        yield from item.graphs
        if item.HasField("g"):
            yield item.g


def made_in(graph: onnx.GraphProto) -> set[str]:
    """Give every name that a graph itself brings in: inputs, initializers, and what its nodes make."""
    return {
        *(value.name for value in graph.input),
        *(tensor.name for tensor in graph.initializer),
        *(name for node in graph.node for name in node.output),
    }


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        made = made_in(graph)
        inner = (*(name for item in graph.node for name in _reads(item)), *(value.name for value in graph.output))
        yield from (name for name in inner if name not in made)
