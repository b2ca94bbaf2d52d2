"""How QuantizeLinear and DequantizeLinear run where nothing is trained: as the specification says, or in int8 kernels.

Inductor knows quantization by the operators ``quantized_decomposed.*``: where a product takes a dequantized
activation and dequantized int8 weights, it packs the weights and calls oneDNN.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed

from hasten.engines.torch_graph import BOUNDS, one_scale
from hasten.graph.model import Graph
from hasten.torchview.facts import Facts
from hasten.torchview.operators.operator import Function
from hasten.torchview.quantization import Quantization, Step

DTYPES = {"uint8": torch.uint8, "int8": torch.int8}


def quantize(x: torch.Tensor, *, scale: float, zero_point: int, dtype: str) -> torch.Tensor:
    """Compute QuantizeLinear: divide, round half to even, saturate."""
    return torch.clamp(torch.round(x / scale) + zero_point, *BOUNDS[dtype]).to(DTYPES[dtype])


def dequantize(x: torch.Tensor, *, scale: float, zero_point: int, dtype: str) -> torch.Tensor:
    """Compute DequantizeLinear."""
    return (x.to(torch.float32) - zero_point) * scale


def quantize_decomposed(x: torch.Tensor, *, scale: float, zero_point: int, dtype: str) -> torch.Tensor:
    """Compute QuantizeLinear so that Inductor sees it; it multiplies by 1 / scale."""
    run = torch.ops.quantized_decomposed.quantize_per_tensor.default
    return run(x, scale, zero_point, *BOUNDS[dtype], DTYPES[dtype])


def dequantize_decomposed(x: torch.Tensor, *, scale: float, zero_point: int, dtype: str) -> torch.Tensor:
    """Compute DequantizeLinear so that Inductor sees it."""
    run = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    return run(x, scale, zero_point, *BOUNDS[dtype], DTYPES[dtype])


def dequantize_rows(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Give int8 weights [out, ...] with one scale for each ``out``, so that Inductor sees them."""
    run = torch.ops.quantized_decomposed.dequantize_per_channel.default
    return run(weight, scales, zeros.to(torch.int64), 0, *BOUNDS["int8"], torch.int8)


class EagerFacts(Facts):
    """What is known of a model of ``with_float_constants``."""

    @cached_property
    def quantization(self) -> Quantization:
        """The quantized tensors, computed as the specification says."""
        return Quantization(self.graph, steps=steps_of(self.graph, quantize, dequantize))


class CompiledFacts(Facts):
    """What is known of a model of ``with_int8_weights``."""

    @cached_property
    def quantization(self) -> Quantization:
        """The quantized tensors, as Inductor looks for them."""
        steps = steps_of(self.graph, quantize_decomposed, dequantize_decomposed)
        rows = {
            node.output[0]: Step(dequantize_rows, tuple(node.input), node.output[0])
            for node in self.graph.nodes
            if node.op_type == "DequantizeLinear" and node.input[0] in self.graph.initializers
        }
        return Quantization(self.graph, steps={**steps, **rows})


def steps_of(graph: Graph, quantizing: Function, dequantizing: Function) -> dict[str, Step]:
    """Give what runs each node that quantizes or dequantizes an activation with one scale, by its output."""
    steps = {}
    for node in graph.nodes:
        if (found := one_scale(node, graph)) is not None:
            scale, zero_point, dtype = found
            function = quantizing if node.op_type == "QuantizeLinear" else dequantizing
            run = partial(function, scale=scale, zero_point=zero_point, dtype=dtype)
            steps[node.output[0]] = Step(run, (node.input[0],), node.output[0])
    return steps
