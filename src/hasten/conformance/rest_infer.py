"""REST: inference with JSON tensors."""

from __future__ import annotations

from typing import Any

from hasten.conformance.check import Skipped, check, some_rows
from hasten.conformance.inputs import NO_JSON, Tensor
from hasten.conformance.outputs import rest_outputs
from hasten.conformance.rest_health import versions_of
from hasten.conformance.server import Server, encoded
from hasten.conformance.wire import met, status_is, typed

INFERENCE = "REST inference"


def json_rows(server: Server, rows: int = 1, *, fill: str = "zeros") -> tuple[Tensor, ...]:
    """Make inputs that JSON can carry, and whose answer it can. Raises Skipped, NotMet."""
    if out := [spec for spec in (*server.model.inputs, *server.model.outputs) if spec.datatype in NO_JSON]:
        raise Skipped(f"{out[0].name!r} is {out[0].datatype}, which JSON does not carry")
    return some_rows(server, rows, fill=fill)


def asking(tensors: tuple[Tensor, ...], **more: Any) -> dict[str, Any]:
    """Make a JSON request."""
    return {"inputs": [tensor.json() for tensor in tensors], **more}


@check(INFERENCE, "Inference Response JSON Object")
def rest_infer(server: Server) -> None:
    """POST infer with flat JSON answers 200 with ``model_name`` and every output, each of its datatype and shape."""
    rest_outputs(server.infer(asking(json_rows(server))), server.model)


@check(INFERENCE, "Tensor Data", level="recommended")
def rest_infer_nested(server: Server) -> None:
    """Data may be nested as the shape says instead of flat."""
    tensors = json_rows(server)
    nested = {"inputs": [tensor.json(nested=True) for tensor in tensors]}
    rest_outputs(server.infer(nested), server.model)


@check(INFERENCE, "Request Input: shape")
def rest_infer_two_rows(server: Server) -> None:
    """Where the first length of every input is -1, two rows are taken, and outputs keep to the metadata's shapes."""
    if any(not spec.shape or spec.shape[0] != -1 for spec in server.model.inputs):
        raise Skipped("the model takes a fixed number of rows")
    rest_outputs(server.infer(asking(json_rows(server, 2, fill="random"))), server.model)


@check(INFERENCE, "Tensor Data")
def rest_infer_ones_and_random_values(server: Server) -> None:
    """Other values are taken as well as zeros: ones, and seeded random numbers."""
    for fill in ("ones", "random"):
        rest_outputs(server.infer(asking(json_rows(server, fill=fill))), server.model)


@check(INFERENCE, "Inference Request JSON Object: id")
def rest_infer_id(server: Server) -> None:
    """An ``id`` that came in goes out."""
    answer = status_is(server.infer(asking(json_rows(server), id="conformance 42")), 200)
    said = typed(answer.object().get("id"), str, "id")
    met(said == "conformance 42", f"id is {said!r}; 'conformance 42' was sent")


@check(INFERENCE, "Inference Request JSON Object: outputs")
def rest_infer_named_outputs(server: Server) -> None:
    """Outputs that are asked for by name are given, and no others."""
    tensors = json_rows(server)
    for spec in server.model.outputs:
        answer = server.infer(asking(tensors, outputs=[{"name": spec.name}]))
        rest_outputs(answer, server.model, asked=[spec.name])


@check(INFERENCE, "Parameters")
def rest_infer_empty_parameters(server: Server) -> None:
    """Empty ``parameters``, on the request and on every tensor, change nothing."""
    inputs = [{**tensor.json(), "parameters": {}} for tensor in json_rows(server)]
    outputs = [{"name": spec.name, "parameters": {}} for spec in server.model.outputs]
    rest_outputs(server.infer({"parameters": {}, "inputs": inputs, "outputs": outputs}), server.model)


@check(INFERENCE, "Inference")
def rest_infer_version(server: Server) -> None:
    """A version that the metadata lists is asked for by its path, and answers as itself."""
    body = encoded(asking(json_rows(server)))
    for version in versions_of(server):
        answer = status_is(server.http.post(f"{server.version_path(version)}/infer", body), 200)
        said = answer.object().get("model_version", version)
        met(said == version, f"model_version is {said!r}; asked was {version!r}")


@check(INFERENCE, "Inference Request Examples", level="recommended")
def rest_infer_content_type(server: Server) -> None:
    """The answer's Content-Type is application/json."""
    answer = status_is(server.infer(asking(json_rows(server))), 200)
    kind = answer.headers.get("content-type", "")
    met(kind.partition(";")[0].strip() == "application/json", f"Content-Type is {kind!r}")


@check(INFERENCE, "Inference Request JSON Object: inputs", level="recommended")
def rest_infer_inputs_in_any_order(server: Server) -> None:
    """Inputs are told apart by their names, not by their order."""
    tensors = json_rows(server)
    if len(tensors) < 2:
        raise Skipped("the model has one input")
    rest_outputs(server.infer(asking(tensors[::-1])), server.model)
