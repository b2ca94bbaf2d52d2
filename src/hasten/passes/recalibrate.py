"""The statistics of batch-norm, taken anew: after pruning, those of the whole network are no longer true.

What a layer receives has changed, and a batch-norm that subtracts the old mean is wrong by a constant. Re-estimating
mean and variance needs neither labels nor gradients and brings back much of the accuracy: B. Li et al., "EagleEye:
fast sub-net evaluation for efficient neural network pruning", ECCV 2020 (arXiv 2007.02491).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from hasten.errors import Unsupported
from hasten.graph.model import Graph, attribute, infer_shapes, is_standard, opset_of
from hasten.graph.rewrite import Edit
from hasten.passes.activations import batch_size, observe
from hasten.samples import Samples
from hasten.transform import Context

ROWS = 512
"""Samples that the statistics are taken on, at most: a mean over these and all positions is as good as exact."""

LEAST_VALUES = 16
"""Of a channel in a batch, for statistics that others may be taken behind."""

AXES_AS_INPUT = 18
"""From this opset on ReduceMean takes its axes as an input."""

Sums = dict[str, npt.NDArray[np.float64]]


def recalibrated(model: onnx.ModelProto, samples: Samples, ctx: Context) -> onnx.ModelProto:
    """Give a copy whose batch-norms have the mean and variance of what they receive on ``samples``.

    As "precise batch-norm" does (Y. Wu and J. Johnson, "Rethinking 'batch' in BatchNorm", arXiv 2105.07576, section
    3.1): every batch-norm takes the statistics of its batch, so that one pass settles all of them, and the moments of
    all batches are averaged. Where the model fixes a batch of so few rows that they have no statistics, such a
    batch-norm has a pass of its own, behind those that are settled, and what lies behind it another.

    Args:
        model: A float model; without batch-norms, with constant statistics, the copy is equal.
        samples: Inputs that fit it; the first ``ROWS`` of them are run, labels are not looked at.
        ctx: Its folder holds a scratch file meanwhile.

    Raises:
        Unsupported: the shape of what a batch-norm receives is not known, or the engine cannot run the model.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    norms = _norms(Graph(model))
    few = samples.take(range(min(ROWS, len(samples))))
    scarce = _with_few_values(model, norms)
    for alike, run in itertools.groupby(norms, lambda norm: norm.output[0] in scarce):
        for part in [[norm] for norm in run] if alike else [list(run)]:
            _settle(copy, part, few, ctx)
    return copy


def _with_few_values(model: onnx.ModelProto, norms: Iterable[onnx.NodeProto]) -> set[str]:
    """Give the outputs of batch-norms to which the model's own batch brings too few values: one row of a vector, say.

    Normalised by statistics of its own, what follows one would receive next to nothing but a constant.
    """
    rows, specs = batch_size(model), Graph(infer_shapes(model)).specs
    if rows is None:
        return set()
    shapes = {node.output[0]: specs[node.input[0]].shape for node in norms if node.input[0] in specs}
    counts = {
        name: math.prod(dim for dim in (rows, *shape[2:]) if isinstance(dim, int)) for name, shape in shapes.items()
    }
    return {name for name, count in counts.items() if count < LEAST_VALUES}


def _settle(model: onnx.ModelProto, norms: Sequence[onnx.NodeProto], samples: Samples, ctx: Context) -> None:
    """Give these batch-norms, in place, the mean and variance of what they receive, all in one pass."""
    scratch, outputs = _with_batch_statistics(model, norms)
    names = [name for pair in outputs for name in pair]
    sums: Sums = {}
    counts: dict[str, int] = {}
    quiet = replace(ctx, progress=lambda text, share: None)
    for values, done in observe(scratch, names, samples, quiet):
        for mean, variance in outputs:
            if mean in values:
                moments = _moments(values[mean], values[variance])
                sums[mean] = sums[mean] + moments if mean in sums else moments
                counts[mean] = counts.get(mean, 0) + 1
        ctx.progress("taking the statistics of batch-norm anew", done)
    _write(model, norms, [sums[mean] / counts[mean] for mean, _ in outputs])


def _norms(graph: Graph) -> list[onnx.NodeProto]:
    """List the batch-norms that have statistics of their own."""
    return [
        node
        for node in graph.nodes
        if node.op_type == "BatchNormalization"
        and is_standard(node)
        and not attribute(node, "training_mode", 0)
        and all(name in graph.initializers and graph.only_consumer(name) is node for name in node.input[3:5])
    ]


def _moments(mean: npt.ArrayLike, variance: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Give the first and second moment of a batch [2, channels]: unlike variances, these may be averaged."""
    first = np.asarray(mean, np.float64)
    return np.stack([first, np.asarray(variance, np.float64) + first**2])


def _with_batch_statistics(
    model: onnx.ModelProto, norms: Iterable[onnx.NodeProto]
) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """Give a copy in which these batch-norms read statistics that the graph computes, and the names of those."""
    copy = infer_shapes(model)
    graph = Graph(copy)
    edit = Edit(graph)
    by_output = {node.output[0]: node for node in graph.nodes if node.op_type == "BatchNormalization"}
    outputs = []
    for old in norms:
        node = by_output[old.output[0]]
        spec = graph.specs.get(node.input[0])
        if spec is None:
            raise Unsupported(
                "prune-channels",
                f"the shape of what batch-norm {node.name!r} receives is not known; set recalibrate to false",
            )
        fresh = [axis for axis in range(len(spec.shape)) if axis != 1]
        mean, variance = (edit.name(f"{node.output[0]}/{what}") for what in ("mean", "variance"))
        edit.insert(*_statistics(edit, node.input[0], fresh, mean, variance), before=node)
        node.input[3], node.input[4] = mean, variance
        outputs.append((mean, variance))
    edit.commit()
    return copy, outputs


def _statistics(edit: Edit, x: str, axes: list[int], mean: str, variance: str) -> list[onnx.NodeProto]:
    """Make the nodes from x [n, channels, ...] to its mean and (biased) variance over ``axes``, each [channels]."""
    flat = edit.constant(np.array([-1], np.int64), f"{mean}/flat")
    by_input = opset_of(edit.graph.model) >= AXES_AS_INPUT
    inputs = [edit.constant(np.array(axes, np.int64), f"{mean}/axes")] if by_input else []
    told: dict[str, Any] = {"keepdims": 1} if by_input else {"keepdims": 1, "axes": axes}
    wide, centred, square, spread = (edit.name(f"{mean}/{what}") for what in ("wide", "centred", "square", "spread"))
    return [
        helper.make_node("ReduceMean", [x, *inputs], [wide], **told),
        helper.make_node("Sub", [x, wide], [centred]),
        helper.make_node("Mul", [centred, centred], [square]),
        helper.make_node("ReduceMean", [square, *inputs], [spread], **told),
        helper.make_node("Reshape", [wide, flat], [mean]),
        helper.make_node("Reshape", [spread, flat], [variance]),
    ]


def _write(model: onnx.ModelProto, norms: Iterable[onnx.NodeProto], moments: Iterable[npt.NDArray[np.float64]]) -> None:
    """Put mean and variance of each batch-norm into the initializers that it reads."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node, (mean, second) in zip(norms, moments, strict=True):
        for name, value in ((node.input[3], mean), (node.input[4], np.maximum(second - mean**2, 0.0))):
            dtype = numpy_helper.to_array(tensors[name]).dtype
            tensors[name].CopyFrom(numpy_helper.from_array(value.astype(dtype), name))
