"""Import a PyTorch model through ``torch.export``: a live module, ``module.py:factory``, or a ``.pt2`` file."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from onnx.inliner import inline_local_functions
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch.utils import _pytree as pytree

from hasten.artifact import Json
from hasten.errors import BadInput, BuildFailed, SignatureMismatch, UnknownName
from hasten.frontends.frontend import Imported, ImportRequest
from hasten.frontends.pytorch_files import load_program, load_state, one_line, quiet
from hasten.graph.model import write_model
from hasten.samples import Samples
from hasten.samples.files import call, load_function
from hasten.tensors import DTYPES, Array

OPSET = 20
"""The exporter's newest that every engine reads; from here GELU and LayerNormalization are operators."""

CHECK_ROWS = 8
"""Samples that the module and the artifact are compared on."""

SYMBOL = "batch"


@dataclass(frozen=True)
class Source:
    """A module ready for export: what to run, and inputs by argument name in the order of ``forward``."""

    module: Any
    """The ``torch.nn.Module`` to run for reference."""
    example: dict[str, torch.Tensor]
    program: Any = None
    """The ExportedProgram, where the model is one: its batch axis is as it was exported."""
    settings: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class PytorchFrontend:
    """Export with ``torch.onnx.export(dynamo=True, optimize=False)``, constants folded: BatchNormalization stays."""

    name: ClassVar[str] = "pytorch"

    def convert(self, request: ImportRequest, folder: Path) -> Imported:
        """Export in evaluation mode, first with a symbolic batch axis, else with a fixed one (the lineage says so).

        The user's module is as before afterwards. Inputs have the names of ``forward``'s arguments, outputs those of
        the dictionary that comes back, or ``y``, or ``output_0``, ``output_1``, ....

        Raises:
            BadInput: the file, factory, state or example cannot be used. BuildFailed: the exporter failed.
        """
        source = _source(request)
        with _evaluating(source.module), quiet():
            outputs = _named_outputs(_run(source.module, source.example), source.example)
            model, batch = _export(source, list(outputs), dynamic=request.dynamic_batch)
            if len(model.graph.output) != len(outputs):
                raise BuildFailed("import", f"the exporter made {len(model.graph.output)} outputs of {len(outputs)}")
            feed = _check_feed(source, request.samples, symbolic=batch == "symbolic")
            expected = _named_outputs(_run(source.module, feed), source.example)
        return Imported(
            artifact=write_model(model, folder),
            settings={**source.settings, "batch": batch},
            feed={name: _to_numpy(tensor) for name, tensor in feed.items()},
            expected={name: _to_numpy(tensor) for name, tensor in expected.items()},
        )


def _source(request: ImportRequest) -> Source:
    model = request.model
    settings: dict[str, Json] = {}
    if isinstance(model, str | Path) and ".py:" not in str(model):
        model = load_program(Path(model))
    if isinstance(model, torch.export.ExportedProgram):
        if request.state is not None:
            raise BadInput("an exported program has its own weights; leave out the state")
        module = model.module()
        return Source(module, _example(module, _program_example(model, request), request.samples), model, settings)
    example = request.example
    if isinstance(model, str | Path):
        made = call(load_function(str(model)), str(model))
        model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        example = given if example is None else example
    if not isinstance(model, torch.nn.Module):
        raise BadInput(
            f"{request.model} gave a {type(model).__name__}; it must give a torch.nn.Module, or (it, example)"
        )
    if request.state is not None:
        load_state(model, request.state)
        settings["state"] = request.state.name
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        raise BadInput("the model's weights are not on the CPU; call model.cpu() first")
    return Source(model, _example(model, example, request.samples), None, settings)


def _program_example(program: Any, request: ImportRequest) -> Any:
    if request.example is not None or request.samples is not None or program.example_inputs is None:
        return request.example
    args, kwargs = program.example_inputs
    return kwargs if kwargs and not args else tuple(args) if not kwargs else (*args, *kwargs.values())


def _example(module: Any, example: Any, samples: Samples | None) -> dict[str, torch.Tensor]:
    """Give example inputs by argument, in the order of ``forward``."""
    signature = inspect.signature(module.forward)
    if example is None and samples is not None:
        rows = samples.feed(slice(0, 2))
        example = dict(rows) if rows.keys() <= signature.parameters.keys() else tuple(rows.values())
    if example is None:
        raise BadInput("a PyTorch model needs example inputs: pass some, or let the factory return (model, example)")
    given = example if isinstance(example, Mapping | tuple | list) else (example,)
    if isinstance(given, Mapping) and (unknown := [key for key in given if key not in signature.parameters]):
        raise UnknownName("argument of forward", str(unknown[0]), signature.parameters)
    try:
        bound = signature.bind(**given) if isinstance(given, Mapping) else signature.bind(*given)
    except TypeError as error:
        raise BadInput(f"the example does not fit forward{signature}: {error}") from error
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        several = signature.parameters[name].kind
        if several is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif several is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif value is not None:
            named[name] = value
    return {name: _to_torch(name, value) for name, value in named.items()}


def _call_arguments(module: Any, feed: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split inputs into positional and keyword arguments of ``forward``."""
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        return tuple(feed.values()), {}
    leading = 0
    for name, given in zip(parameters, feed, strict=False):
        if name != given or parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
            break
        leading += 1
    items = list(feed.items())
    return tuple(tensor for _, tensor in items[:leading]), dict(items[leading:])


def _run(module: Any, feed: Mapping[str, torch.Tensor]) -> Any:
    args, kwargs = _call_arguments(module, feed)
    try:
        with torch.no_grad():
            return module(*args, **kwargs)
    except Exception as error:
        raise BadInput(f"the model fails on the example inputs: {type(error).__name__}: {one_line(error)}") from error


def _export(source: Source, outputs: list[str], *, dynamic: bool) -> tuple[onnx.ModelProto, str]:
    """Export, and say what became of the batch axis: "symbolic", or "fixed" and why."""
    if source.program is not None:
        model = _exported(source.program, source, source.example, outputs, None)
        return model, "symbolic" if _name_batch(model) else "fixed: as it was exported"
    if not dynamic:
        return _exported(source.module, source, source.example, outputs, None), "fixed: as it was asked for"
    example = _with_two_rows(source.example)
    shapes = _dynamic_shapes(source.module, example)
    try:
        if shapes is None:
            raise BuildFailed("import", "the inputs have no batch axis in common")
        model = _exported(source.module, source, example, outputs, shapes)
        return model, "symbolic" if _name_batch(model) else "fixed: the model's code fixes it"
    except BuildFailed:
        return _exported(source.module, source, source.example, outputs, None), "fixed: the exporter cannot open it"


def _exported(
    model: Any, source: Source, example: Mapping[str, torch.Tensor], outputs: list[str], shapes: Any
) -> onnx.ModelProto:
    args, kwargs = _call_arguments(source.module, example)
    try:
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes=shapes,
            verbose=False,
        )
    except Exception as error:
        raise BuildFailed("import", f"torch.onnx.export: {type(error).__name__}: {one_line(error)}") from error
    # Not the exporter's whole optimizer, which folds batch-norm. But what it computes from constants alone (a zero bias
    # by Shape, CastLike and Expand) would keep a runtime from fusing, and make the untouched model look slow.
    fold_constants(program.model)
    remove_unused_nodes(program.model)
    return _tidy(program.model_proto)


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give one graph without the exporter's notes: its inner shapes are partly wrong, its traces name local files."""
    whole = inline_local_functions(model) if model.functions else model
    graph = whole.graph
    del graph.value_info[:]
    for holder in (whole, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
    return whole


def _name_batch(model: onnx.ModelProto) -> bool:
    """Call the symbol on the inputs' first axis ``batch``, wherever it stands. False where there is none."""
    first = [
        value.type.tensor_type.shape.dim[0].dim_param
        for value in model.graph.input
        if value.type.tensor_type.shape.dim and value.type.tensor_type.shape.dim[0].dim_param
    ]
    if not first:
        return False
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == first[0]:
                dim.dim_param = SYMBOL
    return True


def _with_two_rows(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the example with at least two rows: torch.export takes a length of one for a constant."""
    batch = _batch_length(example)
    return {
        name: torch.cat([tensor, tensor]) if batch == 1 and tensor.ndim and len(tensor) == 1 else tensor
        for name, tensor in example.items()
    }


def _batch_length(example: Mapping[str, torch.Tensor]) -> int | None:
    return next((len(tensor) for tensor in example.values() if tensor.ndim), None)


def _dynamic_shapes(module: Any, example: Mapping[str, torch.Tensor]) -> Any:
    """Mark the first axis of every input that is as long as the first one's; None where there is none."""
    batch = _batch_length(example)
    if not batch:
        return None
    axis = torch.export.Dim(SYMBOL)
    marked = {name: {0: axis} if t.ndim and len(t) == batch else None for name, t in example.items()}
    parameters = inspect.signature(module.forward).parameters.values()
    several = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    return {several: tuple(marked.values())} if several else marked


def _check_feed(source: Source, samples: Samples | None, *, symbolic: bool) -> dict[str, torch.Tensor]:
    """Give what both are run on: samples, else the example, in another length where the batch axis is symbolic."""
    batch = _batch_length(source.example)
    if samples is not None and batch:
        rows = samples.feed(slice(0, CHECK_ROWS if symbolic else batch))
        if len(rows) != len(source.example):
            raise SignatureMismatch(f"the samples have inputs {sorted(rows)}, the model wants {sorted(source.example)}")
        by_name = rows.keys() == source.example.keys()
        order = [rows[name] for name in source.example] if by_name else list(rows.values())
        return {name: _to_torch(name, array) for name, array in zip(source.example, order, strict=True)}
    if not symbolic:
        return source.example
    return {
        name: torch.cat([tensor, tensor[:1]]) if tensor.ndim and len(tensor) == batch else tensor
        for name, tensor in source.example.items()
    }


def _named_outputs(value: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the tensors that come back: by a dictionary's keys, or ``y``, or ``output_0``, ...."""
    if isinstance(value, torch.Tensor) and "y" not in inputs:
        return {"y": value}
    if isinstance(value, Mapping):
        flat = {str(key): item for key, item in value.items() if isinstance(item, torch.Tensor)}
        if len(flat) == len(pytree.tree_leaves(value)) and not flat.keys() & inputs.keys():
            return flat
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if not leaves:
        raise BadInput(f"the model gives a {type(value).__name__} without tensors")
    return {f"output_{i}": leaf for i, leaf in enumerate(leaves)}


@contextlib.contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Put a module into evaluation mode, and every part of it back afterwards."""
    training = [part for part in module.modules() if part.training]
    with contextlib.suppress(NotImplementedError):  # a loaded program has its mode compiled in
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _to_torch(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    try:
        return torch.from_numpy(array.copy())
    except TypeError as error:
        raise BadInput(f"the example input {name!r} is a {type(value).__name__}, not a tensor") from error


def _to_numpy(tensor: torch.Tensor) -> Array:
    whole = tensor.detach().cpu().contiguous()
    if whole.dtype is torch.bfloat16:
        return np.asarray(whole.view(torch.int16).numpy()).view(DTYPES["bfloat16"])
    array: Array = whole.numpy()
    return array
