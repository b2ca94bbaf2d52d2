"""gRPC: health, metadata and inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.conformance.check import NotOffered, Skipped, check, some_rows
from hasten.conformance.inputs import CONTENTS, Tensor, unpacked
from hasten.conformance.outputs import check_outputs
from hasten.conformance.rest_health import UNKNOWN, versions_of
from hasten.conformance.server import GrpcAnswer, GrpcCalls, Model, Server
from hasten.conformance.wire import met

GROUP, INFERENCE = "gRPC health and metadata", "gRPC inference"
HEALTH, REFLECTION = "/grpc.health.v1.Health/Check", "ServerReflection/ServerReflectionInfo"
UNIMPLEMENTED = 12
SERVING = b"\x08\x01"
"""A HealthCheckResponse, serialized: status 1."""


def grpc_of(server: Server) -> GrpcCalls:
    """Give the gRPC side. Raises NotOffered: no address was given."""
    if server.grpc is None:
        raise NotOffered("no gRPC address was given; --grpc HOST:PORT")
    return server.grpc


def ok(answer: GrpcAnswer) -> Any:
    """Give the message of a call that went well. Raises NotMet."""
    met(answer.code == 0, f"{answer.said} ended with status {answer.code}: {answer.details[:200]}")
    return answer.message


def raw_request(server: Server, tensors: Sequence[Tensor], **more: Any) -> dict[str, Any]:
    """Make the fields of a ModelInferRequest with raw contents."""
    inputs = [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in tensors]
    raw = [tensor.raw() for tensor in tensors]
    return {"model_name": server.model_name, "inputs": inputs, "raw_input_contents": raw, **more}


def typed_request(server: Server, tensors: Sequence[Tensor], **more: Any) -> dict[str, Any]:
    """Make the fields of a ModelInferRequest with typed contents. Raises Skipped: a datatype has none."""
    if out := [tensor for tensor in tensors if tensor.datatype not in CONTENTS]:
        raise Skipped(f"input {out[0].name!r} is {out[0].datatype}, which has no typed contents")
    inputs = [
        {"name": t.name, "datatype": t.datatype, "shape": t.shape, "contents": {CONTENTS[t.datatype]: t.values}}
        for t in tensors
    ]
    return {"model_name": server.model_name, "inputs": inputs, **more}


def grpc_outputs(response: Any, model: Model, *, asked: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Read the outputs of a ModelInferResponse, raw or typed. Raises NotMet."""
    met(response.model_name == model.name, f"model_name is {response.model_name!r}; asked was {model.name!r}")
    raw = list(response.raw_output_contents)
    met(not raw or len(raw) == len(response.outputs), f"{len(response.outputs)} outputs have {len(raw)} raw contents")
    found = {}
    for at, item in enumerate(response.outputs):
        shape = tuple(item.shape)
        if raw:
            met(not item.contents.ListFields(), f"output {item.name!r} has typed contents beside raw ones")
            values = unpacked(item.name, item.datatype, shape, raw[at])
        else:
            field = CONTENTS.get(item.datatype)
            met(field is not None, f"output {item.name!r} is {item.datatype}, and is not raw")
            values = tuple(getattr(item.contents, str(field)))
            count = 1
            for length in shape:
                count *= length
            met(len(values) == count, f"output {item.name!r} has {len(values)} elements; its shape has {count}")
        found[item.name] = Tensor(name=item.name, datatype=item.datatype, shape=shape, values=values)
    check_outputs(found, model, asked=asked)
    return found


@check(GROUP, "gRPC: Server Live")
def grpc_server_live(server: Server) -> None:
    """ServerLive says true."""
    met(ok(grpc_of(server).call("ServerLive")).live, "live is false, and the server answers")


@check(GROUP, "gRPC: Server Ready")
def grpc_server_ready(server: Server) -> None:
    """ServerReady says true while every model is ready."""
    met(ok(grpc_of(server).call("ServerReady")).ready, "ready is false")


@check(GROUP, "gRPC: Model Ready")
def grpc_model_ready(server: Server) -> None:
    """ModelReady says true for a model that is ready."""
    met(ok(grpc_of(server).call("ModelReady", name=server.model_name)).ready, "ready is false")


@check(GROUP, "gRPC: Model Ready")
def grpc_unknown_model_is_not_ready(server: Server) -> None:
    """ModelReady of a model that the server does not have is an error, or says false."""
    answer = grpc_of(server).call("ModelReady", name=UNKNOWN)
    met(answer.code != 0 or not answer.message.ready, "a model that is not there is said to be ready")


@check(GROUP, "gRPC: Server Metadata")
def grpc_server_metadata(server: Server) -> None:
    """ServerMetadata has a name and a version."""
    said = ok(grpc_of(server).call("ServerMetadata"))
    met(bool(said.name), "name is empty")
    met(bool(said.version), "version is empty")


@check(GROUP, "gRPC: Model Metadata")
def grpc_model_metadata(server: Server) -> None:
    """ModelMetadata says what the REST side says: name, inputs and outputs."""
    said = ok(grpc_of(server).call("ModelMetadata", name=server.model_name))
    met(said.name == server.model_name, f"name is {said.name!r}; asked was {server.model_name!r}")
    for kind, specs in (("inputs", server.model.inputs), ("outputs", server.model.outputs)):
        here = [(item.name, item.datatype, tuple(item.shape)) for item in getattr(said, kind)]
        there = [(spec.name, spec.datatype, spec.shape) for spec in specs]
        met(here == there, f"{kind} are {here} over gRPC and {there} over REST")


@check(INFERENCE, "gRPC: Inference, raw_input_contents")
def grpc_infer_raw(server: Server) -> None:
    """ModelInfer with raw contents gives every output of its datatype and shape."""
    fields = raw_request(server, some_rows(server))
    grpc_outputs(ok(grpc_of(server).call("ModelInfer", **fields)), server.model)


@check(INFERENCE, "gRPC: Inference, raw_output_contents", level="recommended")
def grpc_infer_raw_is_answered_raw(server: Server) -> None:
    """A request with raw contents is answered with raw contents, which is what Triton's clients read."""
    said = ok(grpc_of(server).call("ModelInfer", **raw_request(server, some_rows(server))))
    met(len(said.raw_output_contents) == len(said.outputs), "the outputs are typed, not raw")


@check(INFERENCE, "gRPC: Tensor Data, InferTensorContents")
def grpc_infer_typed(server: Server) -> None:
    """ModelInfer with typed contents gives every output of its datatype and shape."""
    fields = typed_request(server, some_rows(server, fill="random"))
    grpc_outputs(ok(grpc_of(server).call("ModelInfer", **fields)), server.model)


@check(INFERENCE, "gRPC: Inference")
def grpc_infer_two_rows(server: Server) -> None:
    """Where the first length of every input is -1, two rows are taken."""
    if any(not spec.shape or spec.shape[0] != -1 for spec in server.model.inputs):
        raise Skipped("the model takes a fixed number of rows")
    fields = raw_request(server, some_rows(server, 2, fill="random"))
    grpc_outputs(ok(grpc_of(server).call("ModelInfer", **fields)), server.model)


@check(INFERENCE, "gRPC: Inference, id")
def grpc_infer_id(server: Server) -> None:
    """An ``id`` that came in goes out."""
    fields = raw_request(server, some_rows(server), id="conformance 42")
    said = ok(grpc_of(server).call("ModelInfer", **fields)).id
    met(said == "conformance 42", f"id is {said!r}; 'conformance 42' was sent")


@check(INFERENCE, "gRPC: Inference, outputs")
def grpc_infer_named_outputs(server: Server) -> None:
    """Outputs that are asked for by name are given, and no others."""
    tensors = some_rows(server)
    for spec in server.model.outputs:
        fields = raw_request(server, tensors, outputs=[{"name": spec.name}])
        grpc_outputs(ok(grpc_of(server).call("ModelInfer", **fields)), server.model, asked=[spec.name])


@check(INFERENCE, "gRPC: Inference, model_version")
def grpc_infer_version(server: Server) -> None:
    """A version that the metadata lists is asked for by its name, and answers as itself."""
    for version in versions_of(server):
        fields = raw_request(server, some_rows(server), model_version=version)
        said = ok(grpc_of(server).call("ModelInfer", **fields)).model_version
        met(said in ("", version), f"model_version is {said!r}; asked was {version!r}")


@check("gRPC health service", "grpc.health.v1", level="extension")
def grpc_health_check(server: Server) -> None:
    """grpc.health.v1.Health/Check says SERVING for the whole server."""
    code, details, data = grpc_of(server).call_raw(HEALTH, b"")
    if code == UNIMPLEMENTED:
        raise NotOffered("grpc.health.v1.Health is not there")
    met(code == 0, f"Check ended with status {code}: {details[:200]}")
    met(data == SERVING, f"Check answered {data!r}; SERVING is {SERVING!r}")


@check("gRPC health service", "grpc.health.v1", level="extension")
def grpc_health_of_an_unknown_service(server: Server) -> None:
    """grpc.health.v1.Health/Check of a service that is not there is NOT_FOUND."""
    code, _, _ = grpc_of(server).call_raw(HEALTH, b"\x0a\x04nope")
    if code == UNIMPLEMENTED:
        raise NotOffered("grpc.health.v1.Health is not there")
    met(code == 5, f"Check of an unknown service ended with status {code}, not 5 (NOT_FOUND)")


@check("gRPC reflection", "grpc.reflection.v1, v1alpha", level="extension")
def grpc_reflection_lists_the_service(server: Server) -> None:
    """Reflection lists ``inference.GRPCInferenceService``, so that tools like grpcurl work without its file."""
    for package in ("grpc.reflection.v1", "grpc.reflection.v1alpha"):
        code, _, data = grpc_of(server).call_raw(f"/{package}.{REFLECTION}", b"\x3a\x00", streams=True)
        if code == 0:
            met(b"inference.GRPCInferenceService" in data, "the list of services lacks inference.GRPCInferenceService")
            return
    raise NotOffered("grpc.reflection is not there")
