"""Inference over gRPC: between serialized messages and ``InferRequest`` and ``InferResponse``.

Raw and typed contents exclude each other for a whole message. Raw contents are views of the message's bytes; FP16 and
BF16 have no typed form. An answer is raw where the request was, and also where the request had no inputs to tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from hasten.errors import BadRequest
from hasten.protocol import binary_tensors, json_tensors
from hasten.protocol.grpc_messages import FILE, message
from hasten.protocol.messages import (
    DATATYPES,
    InferRequest,
    InferResponse,
    Parameter,
    Parameters,
    RequestedOutput,
    Tensor,
)
from hasten.protocol.rest import check_parameters, check_unique, number_of
from hasten.protocol.shared_memory import Regions, places_of, put_outputs, read_tensor
from hasten.tensors import DTYPES, Array

__all__ = ["FILE", "decode_infer", "decode_infer_response", "encode_infer", "encode_infer_request", "message"]

TYPED = "typed_contents"
"""A parameter of ours on a decoded request: its answer is typed, not raw. It never travels."""

_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of ``InferTensorContents`` for each datatype that has one."""

_REQUEST, _RESPONSE = message("ModelInferRequest"), message("ModelInferResponse")


def decode_infer(data: bytes, *, regions: Regions | None = None) -> InferRequest:
    """Read a serialized ModelInferRequest; ``regions`` are where inputs may lie in shared memory.

    Raises:
        BadRequest: it is malformed; says where. TooLarge: more is asked of shared memory than may be.
    """
    said = _parsed(_REQUEST, data)
    inputs, typed = _tensors(said.inputs, said.raw_input_contents, "input", regions=regions)
    parameters = _parameters(said.parameters, "the request")
    asked = tuple(
        RequestedOutput(
            name=item.name,
            parameters=_parameters(item.parameters, f"output {item.name!r}", shared=regions is not None),
        )
        for item in said.outputs
    )
    check_unique([output.name for output in asked], "output")
    priority, timeout_us = (number_of(parameters, name) for name in ("priority", "timeout"))
    return InferRequest(
        model=said.model_name,
        version=said.model_version or None,
        id=said.id,
        inputs=inputs,
        outputs=asked,
        parameters={**parameters, TYPED: True} if typed else parameters,
        priority=priority,
        timeout_us=timeout_us,
    )


def encode_infer(response: InferResponse, request: InferRequest, *, regions: Regions | None = None) -> bytes:
    """Write a serialized ModelInferResponse: typed where the request was, else raw.

    Raises:
        BadRequest: a typed answer was asked for, and an output is FP16 or BF16; a place in shared memory is too small.
    """
    elsewhere = {} if regions is None else put_outputs(response, request, regions)
    made: Any = _RESPONSE(model_name=response.model, model_version=response.version, id=response.id)
    _put(made.parameters, response.parameters)
    typed = TYPED in request.parameters
    _put_tensors(response.outputs, made.outputs, made.raw_output_contents, typed=typed, elsewhere=elsewhere)
    done: bytes = made.SerializeToString()
    return done


def encode_infer_request(request: InferRequest) -> bytes:
    """Write a serialized ModelInferRequest, its inputs raw."""
    made: Any = _REQUEST(model_name=request.model, model_version=request.version or "", id=request.id)
    numbers = {"priority": request.priority, "timeout": request.timeout_us}
    _put(made.parameters, {**request.parameters, **{name: value for name, value in numbers.items() if value}})
    _put_tensors(request.inputs, made.inputs, made.raw_input_contents, typed=False)
    for output in request.outputs:
        _put(made.outputs.add(name=output.name).parameters, output.parameters)
    done: bytes = made.SerializeToString()
    return done


def decode_infer_response(data: bytes) -> InferResponse:
    """Read a serialized ModelInferResponse.

    Raises:
        BadRequest: it is malformed.
    """
    said = _parsed(_RESPONSE, data)
    outputs, _ = _tensors(said.outputs, said.raw_output_contents, "output")
    return InferResponse(
        model=said.model_name,
        version=said.model_version,
        id=said.id,
        outputs=outputs,
        parameters=_parameters(said.parameters, "the response"),
    )


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise BadRequest(f"the message is no {kind.DESCRIPTOR.name}: {error}") from error


def _tensors(
    said: Sequence[Any], raw: Sequence[bytes], kind: str, *, regions: Regions | None = None
) -> tuple[tuple[Tensor, ...], bool]:
    """Make tensors of raw or of typed contents, or of shared memory; says whether they were typed."""
    typed = [item.name for item in said if item.HasField("contents") and (not raw or item.contents.ByteSize())]
    if raw and typed:
        raise BadRequest(f"{kind} {typed[0]!r} has typed contents, and the message has raw ones; give one kind")
    known = [_parameters(item.parameters, f"{kind} {item.name!r}", shared=regions is not None) for item in said]
    names = [item.name for item in said]
    places = {} if regions is None else places_of(zip(names, known, strict=True), kind, regions)
    contents, found = iter(raw), list[Tensor]()
    if raw and len(raw) != len(said) - len(places):
        raise BadRequest(
            f"the message has {len(said) - len(places)} {kind}s and {len(raw)} raw contents; each wants one"
        )
    for item, parameters in zip(said, known, strict=True):
        json_tensors.check_datatype(item.name, item.datatype)
        shape = list(item.shape)
        if regions is not None and (place := places.get(item.name)) is not None:
            if item.HasField("contents"):
                raise BadRequest(f"{kind} {item.name!r} has both contents and a region of shared memory; give one")
            data = read_tensor(item.name, (item.datatype, shape), place, regions)
        elif raw:
            data = binary_tensors.decode(item.name, item.datatype, shape, memoryview(next(contents)))
        else:
            data = _typed(item.name, item.datatype, shape, item.contents)
        found.append(Tensor(name=item.name, datatype=item.datatype, data=data, parameters=parameters))
    check_unique(names, kind)
    return tuple(found), bool(typed)


def _typed(name: str, datatype: str, shape: list[int], contents: Any) -> Array:
    """Read typed contents; the other fields must be empty."""
    field = _CONTENTS.get(datatype)
    if field is None:
        raise BadRequest(f"tensor {name!r} is {datatype}, which has no typed contents; send it raw")
    if other := [known.name for known, _ in contents.ListFields() if known.name != field]:
        raise BadRequest(f"tensor {name!r} is {datatype}, and has {other[0]}; its field is {field}")
    values, count = getattr(contents, field), json_tensors.count_of(name, shape)
    if len(values) != count:
        raise BadRequest(f"tensor {name!r} has {len(values)} elements; shape {shape} wants {count}")
    if datatype == "BYTES":
        held = np.empty(count, object)
        held[:] = list(values)
        return held.reshape(shape)
    try:
        return np.array(values, DTYPES[DATATYPES[datatype]]).reshape(shape)
    except OverflowError as error:
        raise BadRequest(f"tensor {name!r} is out of the range of {datatype}: {error}") from error


def _put_tensors(
    tensors: Sequence[Tensor],
    there: Any,
    raw: Any,
    *,
    typed: bool,
    elsewhere: Mapping[str, Parameters] = MappingProxyType({}),
) -> None:
    for tensor in tensors:
        item = there.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        _put(item.parameters, tensor.parameters)
        if tensor.name in elsewhere:
            _put(item.parameters, elsewhere[tensor.name])
            if not typed:
                raw.append(b"")  # so that the others keep the place that their output has
        elif not typed:
            raw.append(bytes(binary_tensors.encode(tensor.data, tensor.datatype)))
        elif (field := _CONTENTS.get(tensor.datatype)) is None:
            raise BadRequest(
                f"output {tensor.name!r} is {tensor.datatype}, which has no typed contents; send raw inputs"
            )
        else:
            item.contents.SetInParent()
            getattr(item.contents, field).extend(tensor.data.ravel().tolist())


def _parameters(said: Any, where: str, *, shared: bool = False) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for name, value in said.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise BadRequest(f"{where} has the parameter {name!r} without a value")
        found[name] = getattr(value, kind)
    if TYPED in found:
        raise BadRequest(f"{where} has the parameter {TYPED!r}, which is reserved")
    check_parameters(found, where, shared=shared)
    return found


def _put(there: Any, parameters: Mapping[str, Parameter]) -> None:
    for name, value in parameters.items():
        if name == TYPED:
            continue
        entry = there[name]
        if isinstance(value, bool):
            entry.bool_param = value
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**64:
                raise BadRequest(f"the parameter {name!r} is {value}; whole numbers have 64 bits")
            if value < 2**63:
                entry.int64_param = value
            else:
                entry.uint64_param = value
        elif isinstance(value, float):
            entry.double_param = value
        else:
            entry.string_param = value
