"""Cast: store weights and compute in half precision, where that is safe node by node."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx

from hasten.artifact import Artifact
from hasten.errors import Unsupported
from hasten.graph.model import (
    Graph,
    is_beyond_inference,
    is_standard,
    read_model,
    refresh_shapes,
    subgraphs,
    write_model,
)
from hasten.graph.opset import raise_opset
from hasten.graph.rewrite import all_names, copied, fresh_name, remove_dead, rename_uses
from hasten.passes.cast_rules import Low, Sides, constant_of_shape, converted, sides_of, why_float32
from hasten.settings import Choice, Doc
from hasten.tensors import DTYPES
from hasten.transform import Context

BFLOAT16_OPSET = 22
"""Convolution, pooling and many others take bfloat16 from this version on."""


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Turn float32 weights and arithmetic into float16 or bfloat16.

    A node stays in float32 if its operator is one of ``cast_rules.KEEP`` or does not take the dtype, if it holds
    graphs (If, Loop, Scan), is outside ONNX's own operators, or has a constant that the dtype cannot hold: one
    beyond its largest number, or one that would become zero. ONNX Runtime's CPU provider computes float16
    in float32 between casts where it has no kernel, and refuses bfloat16; OpenVINO takes both.
    """

    name: ClassVar[str] = "cast"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    to: Annotated[Low, Doc("the dtype to compute in"), Choice(("float16", "bfloat16"))] = "float16"
    keep_io: Annotated[bool, Doc("leave the model's inputs and outputs in float32")] = True
    exclude: Annotated[tuple[str, ...], Doc("nodes (by name) or operators that stay in float32")] = ()

    def why_not(self, source: Artifact) -> str | None:
        """It takes ONNX models that are not quantized, nor in another half precision."""
        if source.format != "onnx":
            return f"it takes ONNX models, not {source.format}"
        if other := sorted(source.traits & ({"int8", "int4", "float16", "bfloat16"} - {self.to})):
            return f"the model is {other[0]} already"
        return None

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Write the model in ``to``, or give ``source`` where there is nothing to cast.

        Raises:
            UnknownName: ``exclude`` names neither a node nor an operator of the model.
        """
        ctx.progress(f"casting to {self.to}", None)
        model = read_model(source)
        if not cast(model, self.to, keep_io=self.keep_io, exclude=self.exclude):
            return source
        return write_model(model, ctx.folder, source, add={self.to})


def cast(model: onnx.ModelProto, to: Low, *, keep_io: bool = True, exclude: tuple[str, ...] = ()) -> int:
    """Cast a model in place. Gives the number of nodes that now compute in ``to``.

    Raises:
        Unsupported: the model has functions of its own. UnknownName: ``exclude`` names what is not there.
    """
    if model.functions:
        raise Unsupported(
            "cast", f"the model has functions of its own ({model.functions[0].name!r}); inline them first"
        )
    if to == "bfloat16" and not _all_take(model, to):
        raise_opset(model, BFLOAT16_OPSET)
    refresh_shapes(model)
    casting = Casting(Graph(model), to, keep_io, why_float32(Graph(model), to, exclude))
    return casting.run()


def _all_take(model: onnx.ModelProto, to: Low) -> bool:
    refresh_shapes(model)
    graph = Graph(model)
    return all(sides_of(graph, node, to).whole for node in graph.nodes if is_standard(node))


class Casting:
    """One run of ``cast``: a tensor lives in one dtype, and gets a twin in the other when that is first asked for."""

    def __init__(self, graph: Graph, to: Low, keep_io: bool, kept: list[str | None]) -> None:
        self._graph = graph
        self._to = to
        self._keep_io = keep_io
        self._kept = kept
        self._low: set[str] = set()
        self._taken = all_names(graph.model.graph)
        self._twins: dict[tuple[str, bool], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._element = onnx.helper.np_dtype_to_tensor_dtype(DTYPES[to])

    def run(self) -> int:
        """Change the model. Gives the number of nodes that compute in the low dtype."""
        graph = self._graph.model.graph
        changed = 0
        if not self._keep_io:
            changed += self._retype(graph.input, self._graph.initializers)
        for node, reason in zip(self._graph.nodes, self._kept, strict=True):
            sides = Sides.none(node) if reason else sides_of(self._graph, node, self._to)
            changed += sides.any
            self._add(node, sides)
        if not changed:
            return 0
        if not self._keep_io:
            self._retype(graph.output, {})
        kept = [copied(node) for node in self._nodes]
        del graph.node[:]
        graph.node.extend(kept)
        beyond = {name for node in kept if is_beyond_inference(node) for name in node.output}
        for i in reversed([i for i, value in enumerate(graph.value_info) if value.name not in beyond]):
            del graph.value_info[i]
        remove_dead(self._graph.model)
        return changed

    def _add(self, node: onnx.NodeProto, sides: Sides) -> None:
        new = copied(node)
        if any(subgraphs(node)):
            reads = [name for name, users in self._graph.consumers.items() if any(user is node for user in users)]
            rename_uses(new, {name: self._named(name, low=False) for name in reads if self._is_float(name)})
        for i, name in enumerate(node.input):
            if self._is_float(name):
                low = name in self._low if node.op_type == "Cast" and is_standard(node) else sides.inputs[i]
                new.input[i] = self._named(name, low=low)
        if any(sides.outputs):
            self._retarget(new)
        self._nodes.append(new)
        for i, name in enumerate(node.output):
            if sides.outputs[i]:
                self._low.add(name)
                if name in self._graph.outputs and self._keep_io:
                    self._border(new, i)
            elif not self._keep_io and name in self._graph.outputs and self._is_float(name):
                self._lower(new, i)

    def _border(self, node: onnx.NodeProto, i: int) -> None:
        """Let a node make an output's twin, and a Cast the output, which keeps name and dtype."""
        name = node.output[i]
        twin = self._twins[name, True] = self._new(f"{name}_{self._to}")
        self._twins[name, False] = name
        node.output[i] = twin
        self._nodes.append(
            onnx.helper.make_node("Cast", [twin], [name], name=self._new(f"{name}/Cast"), to=onnx.TensorProto.FLOAT)
        )

    def _lower(self, node: onnx.NodeProto, i: int) -> None:
        """Let a node that stays in float32 make an output's twin, and a Cast the output, in the low dtype."""
        name = node.output[i]
        twin = self._twins[name, False] = self._new(f"{name}_float32")
        self._twins[name, True] = name
        node.output[i] = twin
        cast = onnx.helper.make_node("Cast", [twin], [name], name=self._new(f"{name}/Cast"), to=self._element)
        self._nodes.append(cast)

    def _new(self, hint: str) -> str:
        """Give a name that the graph does not have."""
        name = fresh_name(hint, self._taken)
        self._taken.add(name)
        return name

    def _is_float(self, name: str) -> bool:
        return self._graph.dtypes.get(name) == "float32"

    def _named(self, name: str, *, low: bool) -> str:
        """Give the name under which a float32 tensor of the old graph is found in the asked-for dtype."""
        if (name, low) in self._twins:
            return self._twins[name, low]
        if low == (name in self._low):
            return name
        twin = self._new(f"{name}_{self._to if low else 'float32'}")
        self._twins[name, low] = twin
        value = self._graph.constant(name)
        if value is not None:
            self._graph.model.graph.initializer.append(converted(value, self._to, twin))
        else:
            element = self._element if low else onnx.TensorProto.FLOAT
            named = self._new(f"{twin}/Cast")
            self._nodes.append(onnx.helper.make_node("Cast", [name], [twin], name=named, to=element))
        return twin

    def _retarget(self, node: onnx.NodeProto) -> None:
        """Make the few operators that name their output's dtype name the low one."""
        if node.op_type == "ConstantOfShape":
            value = constant_of_shape(node)
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("value", converted(value, self._to, "value")))
        for item in node.attribute:
            if node.op_type == "Cast" and item.name == "to":
                item.i = self._element

    def _retype(self, values: Iterable[onnx.ValueInfoProto], constant: Container[str]) -> int:
        changed = 0
        for value in values:
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name not in constant:
                value.type.tensor_type.elem_type = self._element
                self._low.add(value.name)
                changed += 1
        return changed
