"""int8 with ranges measured at run time: no calibration, at the price of reading every activation twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hasten.artifact import Artifact
from hasten.graph.model import Graph, attribute, read_model, write_model
from hasten.host import this_host
from hasten.passes.placement import named, quantizable_nodes
from hasten.passes.qdq import Weight, quantize_weight
from hasten.passes.quantize_static import check_excluded, needs_reduced_range, why_not_int8
from hasten.settings import Doc
from hasten.transform import Context

PRODUCTS = ("Gemm", "MatMul")
"""The operators that this pass can turn into integer products; ConvInteger runs slower than float convolutions."""


@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic:
    """Compute matrix products in int8, each activation's range measured as it comes."""

    name: ClassVar[str] = "quantize-dynamic"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    operators: Annotated[tuple[str, ...], Doc("kinds of nodes that compute in int8")] = PRODUCTS
    exclude: Annotated[tuple[str, ...], Doc("names of nodes to leave in float")] = ()
    per_channel: Annotated[bool, Doc("one weight scale for each output channel")] = True
    reduce_range: Annotated[
        bool | None, Doc("7-bit weights, for processors that saturate; none: as this host needs")
    ] = None

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        if kinds := sorted(set(self.operators) - set(PRODUCTS)):
            return f"{kinds[0]!r} cannot be quantized at run time; operators that can: {', '.join(PRODUCTS)}"
        return why_not_int8(source, self.operators)

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Quantize the weights and write the graph.

        Raises:
            UnknownName: ``exclude`` names a node that is not there.
        """
        model = named(read_model(source))
        check_excluded(model, self.exclude)
        chosen = set(quantizable_nodes(model, self.operators)) - set(self.exclude)
        saturates = needs_reduced_range(this_host()) if self.reduce_range is None else self.reduce_range
        made = integer_products(model, chosen, bits=7 if saturates else 8, per_channel=self.per_channel)
        return write_model(made, ctx.folder, source, add={"int8", "dynamic"})


def integer_products(model: onnx.ModelProto, chosen: set[str], *, bits: int, per_channel: bool) -> onnx.ModelProto:
    """Give a copy in which the chosen Gemm and MatMul nodes are written as ONNX Runtime fuses them.

    x [..., K] @ W [K, N] + b [N] becomes
    ``DynamicQuantizeLinear(x)``, ``MatMulInteger``, ``Cast``, ``Mul`` by x's scale times W's [N], ``Add`` b.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    rewriter = _Rewriter(copy)
    for node in copy.graph.node:
        if node.name not in chosen:
            rewriter.nodes.append(node)
            continue
        weight = np.asarray(graph.constant(node.input[1]), np.float32)
        transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
        quantized = quantize_weight(weight.T if transposed else weight, 1, bits=bits, per_channel=per_channel)
        rewriter.product(node, quantized)
    nodes = rewriter.nodes
    del copy.graph.node[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    used = Graph(copy)
    kept = [t for t in copy.graph.initializer if t.name in used.consumers or t.name in used.outputs]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return copy


class _Rewriter:
    """Collects the nodes of the new graph, in order. Inputs that several products share are quantized once."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self._quantized: dict[str, list[str]] = {}

    def product(self, node: onnx.NodeProto, weight: Weight) -> None:
        """Write one product."""
        x, x_scale, x_zero = self._input(node.input[0])
        w = self._constant(f"{node.name}_weight_quantized", weight.values)
        w_scale = self._constant(f"{node.name}_weight_scale", weight.scales)
        w_zero = self._constant(f"{node.name}_weight_zero_point", np.zeros(weight.scales.shape, np.int8))
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        integer = self._add("MatMulInteger", node, [x, w, x_zero, w_zero])
        real = self._add("Cast", node, [integer], to=TensorProto.FLOAT)
        scale = self._add("Mul", node, [x_scale, w_scale], suffix="scale")
        scaled = self._add("Mul", node, [real, scale], out="" if bias else node.output[0])
        if bias:
            self._add("Add", node, [scaled, bias], out=node.output[0])

    def _input(self, name: str) -> list[str]:
        if name not in self._quantized:
            outputs = [f"{name}_{part}" for part in ("dynamic", "dynamic_scale", "dynamic_zero_point")]
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [name], outputs, name=f"{name}_dynamic"))
            self._quantized[name] = outputs
        return self._quantized[name]

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _add(
        self, kind: str, node: onnx.NodeProto, inputs: list[str], *, out: str = "", suffix: str = "", **attributes: Any
    ) -> str:
        name = f"{node.name}_{suffix or kind}"
        made = helper.make_node(kind, inputs, [out or f"{name}_output"], name=name, **attributes)
        self.nodes.append(made)
        return str(made.output[0])
