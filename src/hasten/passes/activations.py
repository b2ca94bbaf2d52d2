"""What flows through a model on calibration samples: its inner tensors, batch by batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import onnx

from hasten import registry, settings
from hasten.engine import Engine, Session
from hasten.errors import SignatureMismatch, Unsupported
from hasten.graph.model import Graph, infer_shapes, signature_of, write_model
from hasten.host import this_host
from hasten.samples import Samples
from hasten.tensors import DTYPES, Array
from hasten.transform import Context

BATCH_BYTES = 256 << 20
"""Largest sum of the tensors that one run gives back."""

LARGEST_BATCH = 32

SHAPE_ELEMENTS = 1024
"""Constants up to this size may say a shape; larger ones are weights."""


@dataclass(frozen=True)
class Group:
    """Tensors that are read in the same run, and how many samples a run takes."""

    names: tuple[str, ...]
    batch: int


def observe(
    model: onnx.ModelProto, names: Sequence[str], samples: Samples, ctx: Context
) -> Iterator[tuple[dict[str, Array], float]]:
    """Run ``model`` over all samples in the reference engine; give the named tensors batch by batch.

    Tensors are read in groups, so that what is in memory at once stays under ``BATCH_BYTES``; each group goes
    over all samples. With each batch comes the share of the work that is done (0 to 1).

    Args:
        model: A float model. It is not changed.
        names: Inner tensors, inputs or outputs; inputs come from the samples themselves.
        samples: Inputs that fit the model.
        ctx: Its folder holds a scratch file meanwhile.

    Raises:
        Unsupported: a tensor's shape cannot be inferred, or the engine cannot run the model.
    """
    samples.check(signature_of(model))
    inputs = [name for name in dict.fromkeys(names) if name in samples.inputs]
    inner = [name for name in dict.fromkeys(names) if name not in samples.inputs]
    groups = _groups(model, inner, samples, ctx) if inner else []
    for number, group in enumerate(groups):
        with Reference.open(model, group.names, ctx) as reference:
            for start in range(0, len(samples), group.batch):
                feed = fixed_batch(samples, start, group.batch)
                done = (number + min(1.0, (start + group.batch) / len(samples))) / len(groups)
                yield reference.run(feed), done
    for name in inputs:
        for start in range(0, len(samples), LARGEST_BATCH):
            yield {name: samples.inputs[name][start : start + LARGEST_BATCH]}, 1.0


def fixed_batch(samples: Samples, start: int, size: int) -> dict[str, Array]:
    """Give ``size`` samples from ``start``. Past the end it begins again, for models that take one batch size only."""
    return samples.take([row % len(samples) for row in range(start, start + size)]).feed(slice(None))


def batch_size(model: onnx.ModelProto) -> int | None:
    """Give the batch size that the model's inputs are fixed to, or None where any fits.

    Raises:
        SignatureMismatch: two inputs are fixed to different sizes.
    """
    fixed = {spec.shape[0] for spec in signature_of(model).inputs if spec.shape and isinstance(spec.shape[0], int)}
    if len(fixed) > 1:
        raise SignatureMismatch(f"the inputs are fixed to different batch sizes: {sorted(fixed)}")
    return next(iter(fixed), None)


class Reference:
    """A session of the reference engine on a scratch copy of a model, with inner tensors as its outputs."""

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder

    @classmethod
    def open(cls, model: onnx.ModelProto, names: Sequence[str], ctx: Context) -> Reference:
        """Build and load. Use it as a context manager: closing removes the scratch files."""
        folder = ctx.folder / "observed"
        (folder / "graph").mkdir(parents=True)
        (folder / "built").mkdir()
        source = write_model(_exposing(model, names), folder / "graph")
        engine: Engine = settings.build(
            registry.load("engine", "onnxruntime"), {"threads": this_host().usable_cores, "precision": "float32"}
        )
        built = engine.apply(source, replace(ctx, folder=folder / "built", samples=None))
        return cls(engine.open(built), folder)

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Give the named tensors."""
        return self._session.run(feed)

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()
        shutil.rmtree(self._folder)


def _static_sizes(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, int]:
    """Give the bytes of the tensors that have a fixed shape: all at once they may be more than there is memory."""
    specs = Graph(infer_shapes(model)).specs
    found: dict[str, int] = {}
    for name in names:
        lengths = [dim for dim in specs[name].shape if isinstance(dim, int)] if name in specs else []
        if name in specs and len(lengths) == len(specs[name].shape):
            found[name] = max(1, prod(lengths) * DTYPES[specs[name].dtype].itemsize)
    return found


def _groups(model: onnx.ModelProto, names: list[str], samples: Samples, ctx: Context) -> list[Group]:
    """Lay the tensors into groups by their size: where it is written down; else their real one, known from one run."""
    fixed = batch_size(model)
    sizes = _static_sizes(model, names)
    if unknown := [name for name in names if name not in sizes]:
        with Reference.open(model, unknown, ctx) as reference:
            values = reference.run(fixed_batch(samples, 0, fixed or 1))
        sizes |= {name: max(1, prod(value.shape) * value.itemsize) for name, value in values.items()}
    largest = fixed or min(LARGEST_BATCH, len(samples))
    # One session over all tensors with small batches beats many sessions, each of which runs the whole model.
    batch = fixed or max(1, min(largest, BATCH_BYTES // sum(sizes.values())))
    per_run = batch // fixed if fixed else batch
    groups: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = sizes[name] * per_run
        if groups[-1] and filled + size > BATCH_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return [Group(tuple(group), batch) for group in groups]


def _exposing(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Give a copy whose outputs are the named tensors, without the nodes that they do not need."""
    producers = {name: i for i, node in enumerate(model.graph.node) for name in node.output if name}
    needed: set[int] = set()
    open_names = list(names)
    while open_names:
        at = producers.get(open_names.pop())
        if at is not None and at not in needed:
            needed.add(at)
            open_names += _all_inputs(model.graph.node[at])
    typed = _types(model)
    if unknown := [name for name in names if name not in typed]:
        maker = model.graph.node[producers[unknown[0]]]
        raise Unsupported(
            "calibration",
            f"the shape of {unknown[0]!r} cannot be inferred (node {maker.name!r}, operator {maker.op_type}); "
            "exclude the nodes that read it",
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:], copy.graph.output[:], copy.graph.value_info[:]
    copy.graph.node.extend(model.graph.node[i] for i in sorted(needed))
    copy.graph.output.extend(typed[name] for name in names)
    return copy


def _all_inputs(node: onnx.NodeProto) -> list[str]:
    names = list(node.input)
    for item in node.attribute:
        for graph in (*item.graphs, *([item.g] if item.HasField("g") else ())):
            names += [name for inner in graph.node for name in _all_inputs(inner)]
    return names


def _types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Infer the type of every tensor that is made in the graph. Large weights are left out of the work."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= SHAPE_ELEMENTS:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    return {
        value.name: value
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }
