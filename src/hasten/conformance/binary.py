"""REST: tensors as bytes behind the JSON, the extension ``binary_tensor_data``."""

from __future__ import annotations

import json
from typing import Any

from hasten.conformance.check import Skipped, check, some_rows
from hasten.conformance.inputs import NO_JSON, Tensor, same
from hasten.conformance.outputs import HEADER, parted, rest_outputs
from hasten.conformance.rest_infer import asking
from hasten.conformance.server import Server
from hasten.conformance.wire import Answer, error_told, met, status_is, typed

BINARY, WORD = "Binary tensors", "binary_tensor_data"
SECTION = "Binary Tensor Data Extension"


def head_of(tensors: tuple[Tensor, ...], **more: Any) -> tuple[bytes, bytes]:
    """Make the JSON head of a binary request, and the bytes behind it."""
    parts = [tensor.raw() for tensor in tensors]
    inputs = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
            "parameters": {"binary_data_size": len(part)},
        }
        for tensor, part in zip(tensors, parts, strict=True)
    ]
    return json.dumps({"inputs": inputs, **more}).encode(), b"".join(parts)


def send(server: Server, head: bytes, rest: bytes, *, length: str | None = None) -> Answer:
    """Send a binary request, with the head's length or with another."""
    kind = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": length or str(len(head))}
    return server.infer(head + rest, kind)


def _json_carries_outputs(server: Server) -> None:
    if any(spec.datatype in NO_JSON for spec in server.model.outputs):
        raise Skipped("an output is of 16 bits, which JSON does not carry")


@check(BINARY, SECTION, extension=WORD)
def binary_inputs(server: Server) -> None:
    """Inputs come as bytes; outputs, for which nobody asked otherwise, are JSON."""
    _json_carries_outputs(server)
    rest_outputs(send(server, *head_of(some_rows(server))), server.model)


@check(BINARY, f"{SECTION}: binary_data_output", extension=WORD)
def binary_outputs_all(server: Server) -> None:
    """``binary_data_output`` gives every output as bytes, and the header has the length of the JSON."""
    answer = send(server, *head_of(some_rows(server), parameters={"binary_data_output": True}))
    met(HEADER in status_is(answer, 200).headers, "Inference-Header-Content-Length is missing")
    head, _ = parted(answer)
    for entry in typed(head.get("outputs"), list, "outputs"):
        has = isinstance(entry, dict) and "binary_data_size" in (entry.get("parameters") or {})
        met(has, f"an output is not binary: {str(entry)[:80]}")
    rest_outputs(answer, server.model)


@check(BINARY, f"{SECTION}: binary_data", extension=WORD)
def binary_outputs_one(server: Server) -> None:
    """``binary_data`` on an output gives that one as bytes."""
    name = server.model.outputs[0].name if server.model.outputs else ""
    wanted = [{"name": name, "parameters": {"binary_data": True}}]
    answer = send(server, *head_of(some_rows(server), outputs=wanted))
    rest_outputs(answer, server.model, asked=[name])
    head, rest = parted(answer)
    met(bool(rest) or 0 in head["outputs"][0]["shape"], "the output is not binary")


@check(BINARY, f"{SECTION}: binary_data", extension=WORD)
def binary_outputs_single_one_wins(server: Server) -> None:
    """``"binary_data": false`` on an output wins over ``binary_data_output`` on the request."""
    _json_carries_outputs(server)
    wanted = [{"name": spec.name, "parameters": {"binary_data": False}} for spec in server.model.outputs]
    more = {"parameters": {"binary_data_output": True}, "outputs": wanted}
    answer = send(server, *head_of(some_rows(server), **more))
    rest_outputs(answer, server.model)
    met(not parted(answer)[1], "bytes came back, though JSON was asked for")


@check(BINARY, SECTION, extension=WORD)
def binary_json_inputs_binary_outputs(server: Server) -> None:
    """A request that is all JSON may ask for binary outputs."""
    if any(spec.datatype in NO_JSON for spec in server.model.inputs):
        raise Skipped("an input is of 16 bits, which JSON does not carry")
    answer = server.infer(asking(some_rows(server), parameters={"binary_data_output": True}))
    met(HEADER in status_is(answer, 200).headers, "Inference-Header-Content-Length is missing")
    rest_outputs(answer, server.model)


@check(BINARY, SECTION, extension=WORD)
def binary_says_what_json_says(server: Server) -> None:
    """Random rows sent as bytes and answered as bytes give what the same rows as JSON give."""
    specs = (*server.model.inputs, *server.model.outputs)
    if any(spec.datatype in NO_JSON for spec in specs):
        raise Skipped("a tensor is of 16 bits, which JSON does not carry")
    tensors = some_rows(server, fill="random")
    one, two = (rest_outputs(server.infer(asking(tensors)), server.model) for _ in range(2))
    if any(not same(one[name].values, two[name].values) for name in one):
        raise Skipped("the model does not say the same twice")
    answer = send(server, *head_of(tensors, parameters={"binary_data_output": True}))
    for name, tensor in rest_outputs(answer, server.model).items():
        met(same(tensor.values, one[name].values), f"output {name!r} differs between JSON and bytes")


@check(BINARY, f"{SECTION}: binary_data_size", extension=WORD)
def binary_error_header_length_beyond_the_body(server: Server) -> None:
    """A header length beyond the body is an error that is told."""
    head, rest = head_of(some_rows(server))
    error_told(send(server, head, rest, length=str(len(head) + len(rest) + 1000)))


@check(BINARY, f"{SECTION}: binary_data_size", extension=WORD)
def binary_error_header_length_that_is_no_number(server: Server) -> None:
    """A header length that is no number, or negative, is an error that is told."""
    head, rest = head_of(some_rows(server))
    for length in ("many", "-1"):
        error_told(send(server, head, rest, length=length))


@check(BINARY, f"{SECTION}: binary_data_size", extension=WORD)
def binary_error_header_length_within_the_json(server: Server) -> None:
    """A header length that cuts the JSON is an error that is told."""
    head, rest = head_of(some_rows(server))
    error_told(send(server, head, rest, length=str(len(head) // 2)))


@check(BINARY, f"{SECTION}: binary_data_size", extension=WORD)
def binary_error_too_few_bytes(server: Server) -> None:
    """Fewer bytes behind the JSON than ``binary_data_size`` says is an error that is told."""
    head, rest = head_of(some_rows(server))
    error_told(send(server, head, rest[:-1]))


@check(BINARY, f"{SECTION}: binary_data_size", extension=WORD)
def binary_error_size_that_is_not_the_shapes(server: Server) -> None:
    """A ``binary_data_size`` that is not what shape and datatype say is an error that is told."""
    tensors = some_rows(server)
    head, rest = head_of(tensors)
    said = json.loads(head)
    said["inputs"][0]["parameters"]["binary_data_size"] += 1
    error_told(send(server, json.dumps(said).encode(), rest + b"\0"))


@check(BINARY, "Raw Binary Request", extension=WORD)
def binary_raw_request(server: Server) -> None:
    """With a header length of 0 the body is the bytes of the only input, one row; the answer is binary."""
    if len(server.model.inputs) != 1:
        raise Skipped(f"the model has {len(server.model.inputs)} inputs")
    spec = server.model.inputs[0]
    if spec.datatype == "BYTES" or spec.shape.count(-1) > 1:
        raise Skipped("raw requests are for one input of a fixed size, or with one variable length")
    answer = send(server, b"", some_rows(server)[0].raw(), length="0")
    met(HEADER in status_is(answer, 200).headers, "Inference-Header-Content-Length is missing")
    rest_outputs(answer, server.model)
