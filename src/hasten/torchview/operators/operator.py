"""What the operator table is made of: an operator, and the node that it is bound to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx
import torch

from hasten.errors import Unsupported
from hasten.graph.model import attribute
from hasten.tensors import Array

WHO = "trainable view"

Function = Callable[..., Any]
"""Takes a node's inputs in order (None: an optional one that is absent), gives its output, or a tuple of them."""

Tensor = torch.Tensor

TORCH_DTYPES: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
}
"""PyTorch's dtype of each ONNX element type that it has."""


@dataclass(frozen=True)
class Site:
    """A node as an operator sees it when it is bound: its attributes, and those inputs that never change."""

    node: onnx.NodeProto
    opset: int
    """The version of the operator set that the node's domain has in this model."""
    known: Mapping[str, Array] = field(default_factory=dict)
    """The constants that are not trained, by the names of tensors."""
    dims: Mapping[str, Sequence[int | str | None]] = field(default_factory=dict)
    """The shapes that are known ahead, by the names of tensors."""

    def get(self, name: str, default: Any = None) -> Any:
        """Give an attribute's value, strings as ``str``."""
        value = attribute(self.node, name, default)
        if isinstance(value, list) and value and isinstance(value[0], bytes):
            return [item.decode() for item in value]
        return value

    def has(self, position: int) -> bool:
        """Tell whether an input is there."""
        return len(self.node.input) > position and bool(self.node.input[position])

    def wants(self, position: int) -> bool:
        """Tell whether somebody may read an output."""
        return len(self.node.output) > position and bool(self.node.output[position])

    def constant(self, position: int) -> Array | None:
        """Give an input's value where it is there and never changes."""
        return self.known.get(self.node.input[position]) if self.has(position) else None

    def rank(self, position: int) -> int | None:
        """Give an input's number of axes, where it is known ahead."""
        dims = self.dims.get(self.node.input[position]) if self.has(position) else None
        return None if dims is None else len(dims)

    def refuse(self, reason: str) -> Unsupported:
        """Make the error that names this node; ``reason`` goes on behind its name."""
        return refusal(self.node, reason)


def refusal(node: onnx.NodeProto, reason: str) -> Unsupported:
    """Make the error that says why a node cannot be run."""
    name = node.name or (node.output[0] if node.output else "?")
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Unsupported(WHO, f"node {name!r} ({kind}) {reason}")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """How the nodes of one kind are run."""

    bind: Callable[[Site], Function]
    """Reads a node's attributes once; gives the function that runs it."""
    attributes: frozenset[str] = frozenset()
    """The attributes that ``bind`` understands; any other is refused."""
    host: tuple[int, ...] = ()
    """Inputs that come as Python values: numbers, or tuples of them. -1: all."""
    scalars: bool = False
    """Constants of rank 0 come as Python numbers, while at least one input is a tensor."""
    bind_host: Callable[[Site], Function] | None = None
    """Does what ``bind`` does, for Python values: used where all inputs are such, in shape arithmetic."""
    gives_host: bool = False
    """The output is always a Python value (Shape)."""
    first: Literal["training", "device"] | None = None
    """What the function gets before its inputs: whether the view trains, or the device to make tensors on."""
    many: bool = False
    """The function gives a tuple of outputs."""
    fixed: tuple[int, ...] = ()
    """Float inputs that are settings rather than weights: never trained."""


def plain(function: Function, *, scalars: bool = False, host: Function | None = None) -> Operator:
    """Make an operator without attributes out of a function of its inputs."""
    return Operator(bind=always(function), scalars=scalars, bind_host=always(host) if host else None)


def always(function: Function) -> Callable[[Site], Function]:
    """Bind a function that has no attributes."""
    return lambda site: function


def with_attributes(function: Function, defaults: Mapping[str, Any], **rest: Any) -> Operator:
    """Make an operator whose attributes are the function's keyword arguments, with ONNX's defaults."""

    def bind(site: Site) -> Function:
        values = {name: site.get(name, default) for name, default in defaults.items()}
        return lambda *inputs: function(*inputs, **values)

    return Operator(bind=bind, attributes=frozenset(defaults), **rest)
