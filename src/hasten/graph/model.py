"""Reading and writing a model's ONNX graph, and who makes and who uses each tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from hasten.artifact import Artifact
from hasten.errors import BadInput
from hasten.tensors import Array, Dim, Signature, TensorSpec

EXTERNAL_FROM_BYTES = 1 << 30
"""From this size on, weights go into ``model.onnx.data``: a protobuf file ends at 2 GiB."""

ENTRY = "model.onnx"


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
    external = inferred.ByteSize() >= EXTERNAL_FROM_BYTES
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


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model with ``value_info`` made anew. Tensors that inference cannot type are left out."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    if bare.ByteSize() >= EXTERNAL_FROM_BYTES:
        return bare
    return onnx.shape_inference.infer_shapes(bare, data_prop=True)


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
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each tensor."""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that use each tensor, with those that use it inside a subgraph."""
        users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for name in _reads(node):
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

    def constant(self, name: str) -> Array | None:
        """Give a tensor's value where it is an initializer, else None."""
        tensor = self.initializers.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Give the one node that uses a tensor, or None if there are more, none, or it is an output."""
        users = self.consumers.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """Give an attribute's value, or ``default`` where the node has none. Strings come as ``str``."""
    for item in node.attribute:
        if item.name == name:
            value = onnx.helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for item in node.attribute:
        for graph in (*item.graphs, *([item.g] if item.HasField("g") else ())):
            made = {name for inner in graph.node for name in inner.output}
            yield from (name for inner in graph.node for name in _reads(inner) if name not in made)
