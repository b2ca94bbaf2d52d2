"""gRPC: requests that are wrong. Each is a status other than OK with a text, and by choice the one that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hasten.conformance.check import Check, Skipped, name_of, some_rows, text_of
from hasten.conformance.grpc_infer import grpc_of, ok, raw_request, typed_request
from hasten.conformance.rest_health import UNKNOWN, versions_of
from hasten.conformance.server import GrpcAnswer, Server
from hasten.conformance.wire import met

ERRORS = "gRPC errors"
NAMES = {3: "INVALID_ARGUMENT", 5: "NOT_FOUND"}

Bad = Callable[[Server], GrpcAnswer]


def refused(source: str, *, code: int = 3) -> Callable[[Bad], tuple[Check, Check]]:
    """Make two checks of a function that sends what is wrong: that an error is told, and that it is ``code``."""

    def made(function: Bad) -> tuple[Check, Check]:
        def told(server: Server) -> None:
            answer = function(server)
            met(answer.code != 0, f"{answer.said} ended with OK")
            met(bool(answer.details.strip()), f"{answer.said} ended with status {answer.code} and no text")
            ok(grpc_of(server).call("ServerLive"))

        def by_choice(server: Server) -> None:
            answer = function(server)
            met(
                answer.code == code,
                f"{answer.said} ended with status {answer.code}, not {code} ({NAMES[code]}): {answer.details[:120]}",
            )

        name, text = name_of(function), text_of(function)
        word = NAMES[code].lower().replace("_", "-")
        return (
            Check(
                name=name,
                group=ERRORS,
                level="required",
                source=f"gRPC: {source}",
                text=f"{text} ends with a status other than OK and a text, and the server goes on.",
                run=told,
            ),
            Check(
                name=f"{name}-{word}",
                group=ERRORS,
                level="recommended",
                source=f"Error codes, by choice: {NAMES[code]}",
                text=f"{text} is {NAMES[code]}.",
                run=by_choice,
            ),
        )

    return made


def infer(server: Server, fields: dict[str, Any]) -> GrpcAnswer:
    """Call ModelInfer."""
    return grpc_of(server).call("ModelInfer", **fields)


def changed(server: Server, **fields: Any) -> dict[str, Any]:
    """Make a good raw request, with fields of its first input changed."""
    request = raw_request(server, some_rows(server))
    request["inputs"][0] = {**request["inputs"][0], **fields}
    return request


@refused("Model Metadata", code=5)
def grpc_error_unknown_model_metadata(server: Server) -> GrpcAnswer:
    """ModelMetadata of a model that the server does not have"""
    return grpc_of(server).call("ModelMetadata", name=UNKNOWN)


@refused("Inference", code=5)
def grpc_error_unknown_model(server: Server) -> GrpcAnswer:
    """ModelInfer by a model that the server does not have"""
    return infer(server, {**raw_request(server, some_rows(server)), "model_name": UNKNOWN})


@refused("Inference", code=5)
def grpc_error_unknown_version(server: Server) -> GrpcAnswer:
    """ModelInfer by a version that the model does not have"""
    versions_of(server)
    return infer(server, raw_request(server, some_rows(server), model_version="987654321"))


@refused("Inference")
def grpc_error_missing_inputs(server: Server) -> GrpcAnswer:
    """ModelInfer without inputs, by a model that has some"""
    some_rows(server)
    return infer(server, {"model_name": server.model_name})


@refused("Inference")
def grpc_error_unknown_input(server: Server) -> GrpcAnswer:
    """An input of another name instead of the model's"""
    return infer(server, changed(server, name=UNKNOWN))


@refused("Inference")
def grpc_error_unknown_output(server: Server) -> GrpcAnswer:
    """A request for an output that the model does not have"""
    return infer(server, raw_request(server, some_rows(server), outputs=[{"name": UNKNOWN}]))


@refused("Tensor Data Types")
def grpc_error_unknown_datatype(server: Server) -> GrpcAnswer:
    """An input of an unknown datatype"""
    return infer(server, changed(server, datatype="FP33"))


@refused("Inference, shape")
def grpc_error_negative_length(server: Server) -> GrpcAnswer:
    """An input whose shape has a negative length"""
    return infer(server, changed(server, shape=[-1, *some_rows(server)[0].shape[1:]]))


@refused("Inference, shape")
def grpc_error_huge_length(server: Server) -> GrpcAnswer:
    """An input whose shape has more elements than any memory"""
    return infer(server, changed(server, shape=[2**62, 2**62]))


@refused("Inference, raw_input_contents")
def grpc_error_too_few_bytes(server: Server) -> GrpcAnswer:
    """Raw contents with fewer bytes than shape and datatype say"""
    request = raw_request(server, some_rows(server))
    request["raw_input_contents"][0] = request["raw_input_contents"][0][:-1]
    return infer(server, request)


@refused("Inference, raw_input_contents")
def grpc_error_missing_raw_contents(server: Server) -> GrpcAnswer:
    """Inputs with neither raw nor typed contents"""
    return infer(server, {**raw_request(server, some_rows(server)), "raw_input_contents": []})


@refused("Inference, raw_input_contents")
def grpc_error_more_raw_contents_than_inputs(server: Server) -> GrpcAnswer:
    """More raw contents than inputs"""
    request = raw_request(server, some_rows(server))
    request["raw_input_contents"].append(b"\0\0\0\0")
    return infer(server, request)


@refused("Inference, contents")
def grpc_error_raw_and_typed_contents(server: Server) -> GrpcAnswer:
    """Raw and typed contents in one message"""
    tensors = some_rows(server)
    raw = raw_request(server, tensors)["raw_input_contents"]
    return infer(server, typed_request(server, tensors, raw_input_contents=raw))


@refused("Tensor Data")
def grpc_error_too_few_typed_contents(server: Server) -> GrpcAnswer:
    """Typed contents with fewer elements than the shape says"""
    request = typed_request(server, some_rows(server))
    contents = request["inputs"][0]["contents"]
    ((field, values),) = contents.items()
    if not values:
        raise Skipped("the first input has no elements")
    request["inputs"][0] = {**request["inputs"][0], "contents": {field: values[:-1]}}
    return infer(server, request)


@refused("Inference")
def grpc_error_bytes_that_are_no_message(server: Server) -> GrpcAnswer:
    """Bytes that are no ModelInferRequest"""
    code, details, _ = grpc_of(server).call_raw("/inference.GRPCInferenceService/ModelInfer", b"\xff" * 32)
    return GrpcAnswer(said="ModelInfer", code=code, details=details, message=None)
