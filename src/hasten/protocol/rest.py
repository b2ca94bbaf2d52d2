"""Inference over HTTP: a JSON head, and with the binary tensor extension the tensors' bytes behind it.

The server's side (``decode_request``, ``encode_response``) and the client's (``encode_request``, ``decode_response``)
are written over the same heads. Nothing here knows a socket. The protocol: KServe's Open Inference Protocol; the
extension: Triton's "binary tensor data".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

import msgspec
import numpy as np

from hasten.errors import BadRequest
from hasten.protocol import binary_tensors, json_tensors
from hasten.protocol.binary_tensors import Buffer
from hasten.protocol.messages import (
    ITEM_BYTES,
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameter,
    Parameters,
    RequestedOutput,
    ServerMetadata,
    Tensor,
)
from hasten.protocol.shared_memory import REGION, Regions, places_of, put_outputs, read_tensor
from hasten.tensors import Array

LARGEST_NUMBER = 2**63 - 1
"""Of ``priority`` and ``timeout``."""

SIZE, ASKED, ALL = "binary_data_size", "binary_data", "binary_data_output"
UNSUPPORTED = {
    REGION: "shared memory is not enabled on this server",
    "classification": "classification is no part of this server; ask for the scores",
    "sequence_id": "this server keeps no state between requests",
}
"""Parameters whose meaning would be lost if they were ignored."""


class _Tensor(msgspec.Struct, omit_defaults=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Parameter] | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct, omit_defaults=True):
    name: str
    parameters: dict[str, Parameter] | None = None


class _Request(msgspec.Struct, omit_defaults=True):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: dict[str, Parameter] | None = None
    outputs: list[_Output] | None = None


class _Response(msgspec.Struct, omit_defaults=True):
    model_name: str
    outputs: list[_Tensor]
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Parameter] | None = None


T = TypeVar("T", _Request, _Response)
_REQUESTS = msgspec.json.Decoder(_Request)
_RESPONSES = msgspec.json.Decoder(_Response)
_JSON = msgspec.json.Encoder()


# the server's side


def decode_request(
    body: Buffer,
    *,
    header_bytes: int | None,
    model: str,
    version: str | None,
    metadata: Callable[[], ModelMetadata],
    regions: Regions | None = None,
    elements: Sequence[Array] = (),
) -> InferRequest:
    """Read a request. Binary tensors are views of ``body``.

    Args:
        body: All of it, decompressed.
        header_bytes: ``Inference-Header-Content-Length``: bytes of the JSON head; 0: the body is the only input's
            bytes; None: the header is absent, all is JSON.
        model: The model's name, from the path.
        version: Its version, from the path.
        metadata: Gives the model's metadata; asked for raw requests only.
        regions: Where inputs may lie in shared memory. None: nowhere.
        elements: What was read of the data of every input already (``json_pieces``), which is ``[]`` in the body.

    Raises:
        BadRequest: the body is malformed; says where. TooLarge: more is asked of shared memory than may be.
    """
    view = memoryview(body)
    if header_bytes == 0:
        return _raw_request(view, model, version, metadata())
    head, rest = _parted(view, header_bytes)
    said = _read(head, _REQUESTS, "request")
    parameters = said.parameters or {}
    check_parameters(parameters, "the request")
    inputs = _tensors(said.inputs, (rest, header_bytes is not None), "input", regions=regions, elements=elements)
    asked = []
    for output in said.outputs or ():
        check_parameters(output.parameters or {}, f"output {output.name!r}", shared=regions is not None)
        binary = _flag(output.parameters or {}, ASKED, f"output {output.name!r}")
        asked.append(RequestedOutput(name=output.name, binary=binary, parameters=output.parameters or {}))
    check_unique([output.name for output in asked], "output")
    _flag(parameters, ALL, "the request")
    return InferRequest(
        model=model,
        version=version,
        id=said.id or "",
        inputs=inputs,
        outputs=tuple(asked),
        parameters=parameters,
        priority=number_of(parameters, "priority"),
        timeout_us=number_of(parameters, "timeout"),
    )


def encode_response(
    response: InferResponse,
    request: InferRequest,
    *,
    regions: Regions | None = None,
    texts: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[list[bytes | memoryview], int | None]:
    """Write an answer as the request wants it: the body in parts, and the bytes of JSON where tensors follow it.

    ``texts``: the data of outputs by their names, where it was written as JSON already (``json_pieces``).

    Raises:
        BadRequest: an output was asked for as JSON that JSON cannot hold, or its place in shared memory is too small.
    """
    elsewhere = {} if regions is None else put_outputs(response, request, regions)
    return _written(
        response.outputs,
        binary_outputs(request),
        lambda listed: _Response(
            model_name=response.model,
            model_version=response.version or None,
            id=response.id or None,
            parameters=dict(response.parameters) or None,
            outputs=listed,
        ),
        elsewhere,
        texts,
    )


def binary_outputs(request: InferRequest) -> Callable[[Tensor], bool]:
    """Give what says of an output whether the request wants it as bytes behind the JSON."""
    wanted = {output.name: output.binary for output in request.outputs}
    usual = request.parameters.get(ALL) is True
    return lambda tensor: usual if (own := wanted.get(tensor.name)) is None else own


def encode_server_metadata(metadata: ServerMetadata) -> bytes:
    """Write what a server says of itself."""
    return _JSON.encode({"name": metadata.name, "version": metadata.version, "extensions": metadata.extensions})


def encode_model_metadata(metadata: ModelMetadata) -> bytes:
    """Write what a server says of a model."""
    return _JSON.encode(metadata)


# the client's side


def encode_request(request: InferRequest, *, binary: bool) -> tuple[list[bytes | memoryview], int | None]:
    """Write a request: its inputs as bytes, or as JSON; the answer is asked for likewise.

    Raises:
        BadRequest: JSON cannot hold an input.
    """
    parameters = dict(request.parameters)
    if bad := [name for name, value in parameters.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise BadRequest(f"the parameter {bad[0]!r} is {parameters[bad[0]]}, which JSON cannot carry")
    if binary:
        parameters.setdefault(ALL, True)
    numbers = {"priority": request.priority, "timeout": request.timeout_us}
    parameters |= {name: value for name, value in numbers.items() if value}
    outputs = [
        _Output(output.name, {**output.parameters, **({} if output.binary is None else {ASKED: output.binary})} or None)
        for output in request.outputs
    ]
    return _written(
        request.inputs,
        lambda tensor: binary,
        lambda listed: _Request(
            inputs=listed, id=request.id or None, parameters=parameters or None, outputs=outputs or None
        ),
    )


def decode_response(body: Buffer, *, header_bytes: int | None) -> InferResponse:
    """Read an answer. Binary tensors are views of ``body``.

    Raises:
        BadRequest: it is malformed.
    """
    head, rest = _parted(memoryview(body), header_bytes)
    said = _read(head, _RESPONSES, "response")
    return InferResponse(
        model=said.model_name,
        version=said.model_version or "",
        id=said.id or "",
        parameters=said.parameters or {},
        outputs=_tensors(said.outputs, (rest, header_bytes is not None), "output"),
    )


def decode_model_metadata(body: Buffer) -> ModelMetadata:
    """Read what a server says of a model; ``versions`` may be absent, or null. Raises BadRequest."""
    try:
        told = msgspec.json.decode(body)
        if isinstance(told, dict) and told.get("versions") is None:
            told["versions"] = ()
        return msgspec.convert(told, ModelMetadata)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"this is no model metadata: {error}") from error


# both sides


def said_of(head: bytes) -> list[tuple[str, list[int], str, bytes]]:
    """Give name, shape, datatype and the text of the data of each input of a request in JSON; none where it is none."""
    try:
        inputs = _REQUESTS.decode(head).inputs
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return []
    return [(item.name, item.shape, item.datatype, bytes(item.data)) for item in inputs]


def _parted(view: memoryview, header_bytes: int | None) -> tuple[memoryview, memoryview]:
    """Give the JSON head and what follows it."""
    if header_bytes is None:
        return view, view[len(view) :]
    if not 0 < header_bytes <= len(view):
        raise BadRequest(f"Inference-Header-Content-Length is {header_bytes}; the body has {len(view)} bytes")
    return view[:header_bytes], view[header_bytes:]


def _read(head: memoryview, decoder: msgspec.json.Decoder[T], what: str) -> T:
    try:
        return decoder.decode(head)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is no inference {what}: {error}") from error


def _tensors(
    said: Sequence[_Tensor],
    behind: tuple[memoryview, bool],
    kind: str,
    *,
    regions: Regions | None = None,
    elements: Sequence[Array] = (),
) -> tuple[Tensor, ...]:
    """Make the tensors of a head; those that are bytes take theirs from ``behind``, in order, if it may have any."""
    rest, binary = behind
    found, at = list[Tensor](), 0
    places = {} if regions is None else places_of([(item.name, item.parameters or {}) for item in said], kind, regions)
    for item in said:
        parameters = item.parameters or {}
        check_parameters(parameters, f"{kind} {item.name!r}", shared=regions is not None)
        json_tensors.check_datatype(item.name, item.datatype)
        size = parameters.get(SIZE)
        text = memoryview(item.data)
        if regions is not None and (place := places.get(item.name)) is not None:
            if len(text) or size is not None:
                raise BadRequest(f"{kind} {item.name!r} has both data and a region of shared memory; give one")
            data = read_tensor(item.name, (item.datatype, item.shape), place, regions)
        elif size is None:
            if not len(text):
                raise BadRequest(f"{kind} {item.name!r} has neither data nor {SIZE}")
            read = elements[len(found)] if elements else None
            data = json_tensors.decode(item.name, item.datatype, item.shape, text) if read is None else read
        else:
            if not binary:
                raise BadRequest(f"{kind} {item.name!r} has {SIZE}, but Inference-Header-Content-Length is missing")
            if len(text):
                raise BadRequest(f"{kind} {item.name!r} has both data and {SIZE}; give one")
            if type(size) is not int or not 0 <= size <= len(rest) - at:
                raise BadRequest(f"{kind} {item.name!r} has {SIZE} = {size!r}; {len(rest) - at} bytes are left")
            data = binary_tensors.decode(item.name, item.datatype, item.shape, rest[at : at + size])
            at += size
        found.append(Tensor(name=item.name, datatype=item.datatype, data=data, parameters=parameters))
    if at != len(rest):
        raise BadRequest(f"the body has {len(rest) - at} bytes more than its tensors")
    check_unique([tensor.name for tensor in found], kind)
    return tuple(found)


def _written(
    tensors: Sequence[Tensor],
    is_binary: Callable[[Tensor], bool],
    head: Callable[[list[_Tensor]], _Request | _Response],
    elsewhere: Mapping[str, Parameters] = MappingProxyType({}),
    texts: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[list[bytes | memoryview], int | None]:
    listed, parts, any_binary = [], list[bytes | memoryview](), False
    for tensor in tensors:
        parameters = {name: value for name, value in tensor.parameters.items() if name != SIZE}
        item = _Tensor(tensor.name, list(tensor.shape), tensor.datatype, parameters or None)
        if tensor.name in elsewhere:
            item.parameters = {**parameters, **elsewhere[tensor.name]}
        elif is_binary(tensor):
            any_binary = True
            part = binary_tensors.encode(tensor.data, tensor.datatype)
            item.parameters = {**parameters, SIZE: len(part)}
            if len(part):
                parts.append(part if isinstance(part, memoryview) else bytes(part))
        else:
            item.data = msgspec.Raw(
                texts.get(tensor.name) or json_tensors.text(tensor.name, tensor.datatype, tensor.data)
            )
        listed.append(item)
    text = _JSON.encode(head(listed))
    return [text, *parts], len(text) if any_binary else None


def _raw_request(view: memoryview, model: str, version: str | None, metadata: ModelMetadata) -> InferRequest:
    """Read a body that is the bytes of the only input: one row, at most one variable dimension besides the rows."""
    if len(metadata.inputs) != 1:
        raise BadRequest(f"a raw request is for models with one input; {model!r} has {len(metadata.inputs)}")
    spec = metadata.inputs[0]
    shape = [1 if axis == 0 and length < 0 else length for axis, length in enumerate(spec.shape)]
    open_axes = [axis for axis, length in enumerate(shape) if length < 0]
    if len(open_axes) > 1:
        raise BadRequest(f"a raw request cannot say {len(open_axes)} variable dimensions of {list(spec.shape)}")
    if spec.datatype == "BYTES":
        if any(length not in (1, -1) for length in shape):
            raise BadRequest(f"a raw request of BYTES is one element; input {spec.name!r} is {list(spec.shape)}")
        data: Array = np.array([bytes(view)], object).reshape([1] * len(shape))
    else:
        item = ITEM_BYTES[spec.datatype]
        for axis in open_axes:
            others = item * json_tensors.count_of(spec.name, [n for at, n in enumerate(shape) if at != axis])
            shape[axis] = len(view) // others if others else 0
        data = binary_tensors.decode(spec.name, spec.datatype, shape, view)
    tensor = Tensor(name=spec.name, datatype=spec.datatype, data=data)
    return InferRequest(model=model, version=version, inputs=(tensor,), parameters={ALL: True})


def check_parameters(parameters: Parameters, where: str, *, shared: bool = False) -> None:
    """Refuse parameters whose meaning would be lost; ``shared``: shared memory is understood. Raises BadRequest."""
    for name in parameters:
        if name in UNSUPPORTED and parameters[name] and not (shared and name == REGION):
            raise BadRequest(f"{where} has the parameter {name!r}: {UNSUPPORTED[name]}")


def check_unique(names: Sequence[str], kind: str) -> None:
    """Refuse a name that is there twice. Raises BadRequest."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"{kind} {twice!r} is there twice")


def _flag(parameters: Mapping[str, Parameter], name: str, where: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{where} has {name} = {value!r}; it is true or false")
    return value


def number_of(parameters: Mapping[str, Parameter], name: str) -> int:
    """Give a whole number among the parameters, 0 where it is absent. Raises BadRequest."""
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value <= LARGEST_NUMBER:
        raise BadRequest(f"the request has {name} = {value!r}; it is a whole number from 0")
    return value
