"""Import an ONNX file: nothing in it is trusted, everything that later stages need is made certain here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import version_converter
from onnx.inliner import inline_local_functions

from hasten.artifact import Json
from hasten.errors import BadInput, BuildFailed, Unsupported
from hasten.frontends.external import check_external_data, tensors_of
from hasten.frontends.frontend import Imported, ImportRequest
from hasten.frontends.ml_operators import open_zipmaps, type_ml_outputs
from hasten.frontends.reference import random_feed, run_reference
from hasten.frontends.rows import name_rows
from hasten.graph.model import EXTERNAL_FROM_BYTES, SHAPE_DATA_LENGTH, spec_of, weight_bytes, write_model
from hasten.host import this_host
from hasten.tensors import DTYPES, Array

OLDEST_OPSET = 13
"""From here on axes are inputs and QuantizeLinear has channels: what the passes are written for."""

CONVERTED_OPSET = 17
"""What an older model is converted to: the newest that the converter's adapters reach without gaps."""

OLDEST_IR = 8
"""Before version 4, every initializer had to be a graph input, which any caller could override."""

CHECK_ROWS = 8
"""Samples that source and artifact are compared on."""

PROTOBUF_MAX_BYTES = 2**31 - 1


@dataclass(frozen=True)
class OnnxFrontend:
    """Take an ``.onnx`` file as it is, once it is checked."""

    name: ClassVar[str] = "onnx"

    def convert(self, request: ImportRequest, folder: Path) -> Imported:
        """Check the file, make its shapes and dimension names explicit, and write it into ``folder``.

        Local functions are inlined; opsets before ``OLDEST_OPSET`` are converted. Nodes stay as they are: a
        BatchNormalization is needed by later fine-tuning, and folding it is a pass.

        Raises:
            BadInput: the file is missing, damaged, points outside its folder, or holds what hasten cannot take.
        """
        if request.state is not None or request.example is not None:
            raise BadInput("an .onnx file has its own weights and input shapes; leave out the state and the example")
        original, zipped = read_onnx(Path(request.model))
        _check_rewritable(original)
        model = name_dims(convert_opset(inline(original)))
        renamed = name_rows(model, request.samples, folder)
        artifact = write_model(model, folder)
        before = opset_of(original)
        settings: dict[str, Json] = {"rows of outputs": ", ".join(renamed)} if renamed else {}
        if zipped:
            settings["tensors instead of dictionaries"] = "; ".join(zipped)
        if opset_of(model) == before and not original.functions:
            return Imported(artifact=artifact, settings=settings)
        if opset_of(model) != before:
            settings["opset"] = f"{before} to {opset_of(model)}"
        feed = random_feed(artifact.signature)
        if request.samples is not None:
            request.samples.check(artifact.signature)
            feed = request.samples.feed(slice(0, CHECK_ROWS))
        expected, why = _run_original(original, feed, folder)
        return Imported(artifact=artifact, settings=settings, feed=feed, expected=expected, unchecked=why)


def read_onnx(path: Path) -> tuple[onnx.ModelProto, list[str]]:
    """Read an ONNX file with its weights, and check it; gives a model with inferred shapes, and what was unzipped.

    Raises:
        BadInput: as ``OnnxFrontend.convert`` does. No file outside the model's folder is opened.
    """
    model = _parse(path)
    check_external_data(model, path.parent, memory_bytes=this_host().memory_bytes // 2)
    check_operators(model)
    check_dtypes(model)
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    _drop_initializer_inputs(model)
    zipped = open_zipmaps(model)
    _forget_negative_lengths(model)
    for value in model.graph.input:
        spec_of(value)
        _name_dims_of(value)  # before inference, so that it knows the outputs' dimensions by these names
    del model.graph.value_info[:]  # stale inner shapes contradict the graph
    model = check_and_infer(model, path)
    check_types(model)
    return name_dims(model), zipped


def check_and_infer(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Check a model against ONNX's definitions and give it with every shape inferred; its size does not matter.

    Raises:
        BadInput: it breaks a rule of ONNX's, or its shapes contradict each other.
    """
    large = weight_bytes(model) >= EXTERNAL_FROM_BYTES
    try:
        seen = _without_large_weights(model) if large else model
        onnx.checker.check_model(seen)
        type_ml_outputs(seen)
        inferred = onnx.shape_inference.infer_shapes(seen, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BadInput(f"{path} is no valid ONNX model: {_first_line(error)}") from error
    except (EncodeError, ValueError) as error:
        raise BadInput(f"{path} cannot be checked: {_first_line(error)}") from error
    if not large:
        return inferred
    del model.graph.output[:]
    model.graph.output.extend(inferred.graph.output)
    model.graph.value_info.extend(inferred.graph.value_info)
    return model


def _without_large_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with its large weights as inputs: ONNX's own code takes in a protobuf of at most 2 GiB."""
    graph = onnx.GraphProto(
        name=model.graph.name,
        node=model.graph.node,
        input=model.graph.input,
        output=model.graph.output,
        sparse_initializer=model.graph.sparse_initializer,
    )
    names = set()
    for tensor in model.graph.initializer:
        if tensor.name in names:
            raise BadInput(f"the model has two weights called {tensor.name!r}")
        names.add(tensor.name)
        if math.prod(tensor.dims) <= SHAPE_DATA_LENGTH:
            graph.initializer.append(tensor)
        else:
            _check_length(tensor)
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph
    )


def _check_length(tensor: onnx.TensorProto) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    wanted = math.prod(tensor.dims) * dtype.itemsize
    if min(tensor.dims) < 0 or (tensor.raw_data and len(tensor.raw_data) != wanted):
        raise BadInput(
            f"tensor {tensor.name!r} has {len(tensor.raw_data):,} bytes, its shape {list(tensor.dims)} wants {wanted:,}"
        )
    if not tensor.raw_data:
        onnx.checker.check_tensor(tensor)


def check_operators(model: onnx.ModelProto) -> None:
    """Check that every operator is one that ONNX defines, or a function of the model.

    Raises:
        BadInput: names node, operator and domain.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    opsets = {item.domain or "ai.onnx": item.version for item in model.opset_import}
    for node in nodes_of(model):
        domain = node.domain or "ai.onnx"
        if (node.domain, node.op_type) in functions:
            continue
        if domain not in opsets:
            raise BadInput(f"node {node.name!r} is of domain {domain!r}, and the model imports no opset of it")
        try:
            onnx.defs.get_schema(node.op_type, opsets[domain], "" if domain == "ai.onnx" else domain)
        except onnx.defs.SchemaError as error:
            raise BadInput(
                f"node {node.name!r} is {node.op_type!r} of domain {domain!r} (opset {opsets[domain]}): an operator "
                "without shape inference; export the model with standard ONNX operators"
            ) from error


def check_types(model: onnx.ModelProto) -> None:
    """Check that inference typed every tensor of the main graph.

    Raises:
        BadInput: names the node whose output has no type, its operator and domain.
    """
    graph = model.graph
    typed = {value.name for value in (*graph.value_info, *graph.output) if value.type.WhichOneof("value")}
    functions = {(function.domain, function.name) for function in model.functions}
    for node in graph.node:
        unknown = [name for name in node.output if name and name not in typed]
        if unknown and (node.domain, node.op_type) not in functions:
            raise BadInput(
                f"node {node.name!r} is {node.op_type!r} of domain {node.domain or 'ai.onnx'!r}: an operator without "
                f"shape inference, so the type of its output {unknown[0]!r} is unknown"
            )


def check_dtypes(model: onnx.ModelProto) -> None:
    """Check that hasten knows the dtype of every input, output and weight.

    Raises:
        BadInput: names the tensor and its dtype.
    """
    values = [
        (value.name, value.type.tensor_type.elem_type)
        for value in (*model.graph.input, *model.graph.output)
        if value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.elem_type
    ]
    for name, kind in (*values, *((tensor.name, tensor.data_type) for tensor in tensors_of(model))):
        if kind not in KNOWN_KINDS:
            known = onnx.TensorProto.DataType.values()
            called = onnx.TensorProto.DataType.Name(kind).lower() if kind in known else f"number {kind}"
            raise BadInput(f"tensor {name!r} has the dtype {called}, which hasten does not know: {', '.join(DTYPES)}")


KNOWN_KINDS = frozenset(
    onnx.TensorProto.STRING if name == "string" else onnx.helper.np_dtype_to_tensor_dtype(dtype)
    for name, dtype in DTYPES.items()
)
"""The ONNX element types that have a name in ``DTYPES``."""


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model without local functions, so that one graph holds every node."""
    return name_dims(inline_local_functions(model)) if model.functions else model


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model is written for."""
    return next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def convert_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model at ``CONVERTED_OPSET`` if it is older than ``OLDEST_OPSET``, else as it is.

    Raises:
        BadInput: ONNX has no way from its opset to ours.
    """
    before = opset_of(model)
    if before == 0 or before >= OLDEST_OPSET:
        return model
    try:
        return version_converter.convert_version(model, CONVERTED_OPSET)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise BadInput(
            f"the model has opset {before}, and cannot be converted to {CONVERTED_OPSET}: {_first_line(error)}; "
            "export it again with a newer opset"
        ) from error


def name_dims(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name every dimension of the inputs and outputs that has neither length nor name, in place; gives the model.

    Known names are kept.
    """
    for value in (*model.graph.input, *model.graph.output):
        _name_dims_of(value)
    return model


def _name_dims_of(value: onnx.ValueInfoProto) -> None:
    if value.type.WhichOneof("value") == "tensor_type":
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.dim_param and not dim.HasField("dim_value"):
                dim.dim_param = f"{value.name}_dim{axis}"  # the name that a signature gives it, too


def nodes_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Give every node: of the main graph, of graphs inside nodes, and of functions."""

    def below(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            yield node
            for item in node.attribute:
                for graph in (*item.graphs, *([item.g] if item.HasField("g") else ())):
                    yield from below(graph.node)

    yield from below(model.graph.node)
    for function in model.functions:
        yield from below(function.node)


def _parse(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BadInput(f"{path} is not a file")
        if size > PROTOBUF_MAX_BYTES:
            raise BadInput(f"{path} has {size:,} bytes; an ONNX file ends at 2 GiB, larger weights are external data")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"there is no file {str(path)!r}") from error
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise BadInput(f"{path} is no ONNX model, or it is cut off") from error
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise BadInput(f"{path} is no ONNX model, or it is cut off: it has no graph with nodes and outputs")
    return model


def _check_rewritable(model: onnx.ModelProto) -> None:
    """Check that ONNX's own converter and inliner, which take in one protobuf, are not needed for a larger model."""
    old = 0 < opset_of(model) < OLDEST_OPSET
    if (old or model.functions) and weight_bytes(model) >= PROTOBUF_MAX_BYTES:
        what = f"opset {opset_of(model)}" if old else "local functions"
        raise BadInput(
            f"the model has {what} and 2 GiB of weights or more, too much for ONNX to convert; export it again with "
            "a newer opset and without functions"
        )


def _drop_initializer_inputs(model: onnx.ModelProto) -> None:
    constant = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constant]
    if len(kept) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, OLDEST_IR)


def _forget_negative_lengths(model: onnx.ModelProto) -> None:
    """Some exporters write -1 where a length is unknown; inference would take it at its word."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.Clear()


def _run_original(model: onnx.ModelProto, feed: dict[str, Array], beside: Path) -> tuple[dict[str, Array] | None, str]:
    """Run the model as it came. Gives its outputs, or why there are none."""
    with tempfile.TemporaryDirectory(dir=beside.parent) as folder:
        inside = Path(folder) / "original"
        inside.mkdir()
        write_model(model, inside)
        try:
            return run_reference(inside / "model.onnx", feed), ""
        except (Unsupported, BuildFailed) as error:
            return None, f"no: the model as it came does not run: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """Give the first line of a message that says something, without the file it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
