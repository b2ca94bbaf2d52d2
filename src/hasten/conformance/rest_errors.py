"""REST: requests that are wrong. Each is an error told as the specification says, and by choice a 400 or 404."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hasten.conformance.check import Check, Skipped, name_of, text_of
from hasten.conformance.inputs import Tensor
from hasten.conformance.rest_health import UNKNOWN, versions_of
from hasten.conformance.rest_infer import asking, json_rows
from hasten.conformance.server import Server, encoded
from hasten.conformance.wire import Answer, error_told, status_is

ERRORS = "REST errors"
ERROR_OBJECT = "Inference Response JSON Error Object"

Bad = Callable[[Server], Answer]


def refused(source: str, *, status: int = 400) -> Callable[[Bad], tuple[Check, Check]]:
    """Make two checks of a function that sends what is wrong: that an error is told, and that it is ``status``."""

    def made(function: Bad) -> tuple[Check, Check]:
        def told(server: Server) -> None:
            error_told(function(server))
            status_is(server.http.get("/v2/health/live"), 200)

        def by_choice(server: Server) -> None:
            status_is(function(server), status)

        name, text = name_of(function), text_of(function)
        return (
            Check(
                name=name,
                group=ERRORS,
                level="required",
                source=f"{ERROR_OBJECT}; {source}",
                text=f'{text} is an error status with ``{{"error": text}}``, and the server goes on.',
                run=told,
            ),
            Check(
                name=f"{name}-{status}",
                group=ERRORS,
                level="recommended",
                source=f"Error codes, by choice: {status}",
                text=f"{text} is a {status}.",
                run=by_choice,
            ),
        )

    return made


def changed(server: Server, **fields: Any) -> dict[str, Any]:
    """Make a good request, with fields of its first input changed."""
    first, *others = json_rows(server)
    return {"inputs": [{**first.json(), **fields}, *[tensor.json() for tensor in others]]}


def first(server: Server) -> Tensor:
    """Give the first input."""
    return json_rows(server)[0]


@refused("Inference", status=404)
def rest_error_unknown_model(server: Server) -> Answer:
    """An inference by a model that the server does not have"""
    return server.http.post(f"/v2/models/{UNKNOWN}/infer", encoded(asking(json_rows(server))))


@refused("Inference", status=404)
def rest_error_unknown_version(server: Server) -> Answer:
    """An inference by a version that the model does not have"""
    versions_of(server)
    return server.http.post(f"{server.version_path('987654321')}/infer", encoded(asking(json_rows(server))))


@refused("Inference Request JSON Object")
def rest_error_malformed_json(server: Server) -> Answer:
    """A body that is no JSON"""
    return server.infer(b'{"inputs": [')


@refused("Inference Request JSON Object")
def rest_error_empty_body(server: Server) -> Answer:
    """An empty body"""
    return server.infer(b"")


@refused("Inference Request JSON Object")
def rest_error_no_object(server: Server) -> Answer:
    """A body that is a JSON array"""
    return server.infer(b"[]")


@refused("Inference Request JSON Object: inputs")
def rest_error_missing_inputs(server: Server) -> Answer:
    """A request without ``inputs``"""
    return server.infer({"id": "1"})


@refused("Inference Request JSON Object: inputs")
def rest_error_empty_inputs(server: Server) -> Answer:
    """A request whose ``inputs`` are empty, to a model that has some"""
    json_rows(server)
    return server.infer({"inputs": []})


@refused("Inference Request JSON Object: inputs")
def rest_error_missing_input(server: Server) -> Answer:
    """A request without one of the model's inputs"""
    tensors = json_rows(server)
    if len(tensors) < 2:
        raise Skipped("the model has one input")
    return server.infer(asking(tensors[1:]))


@refused("Request Input: name")
def rest_error_unknown_input(server: Server) -> Answer:
    """A request with an input of another name instead of the model's"""
    return server.infer(changed(server, name=UNKNOWN))


@refused("Request Output: name")
def rest_error_unknown_output(server: Server) -> Answer:
    """A request for an output that the model does not have"""
    return server.infer(asking(json_rows(server), outputs=[{"name": UNKNOWN}]))


@refused("Tensor Data Types")
def rest_error_unknown_datatype(server: Server) -> Answer:
    """An input of an unknown datatype"""
    return server.infer(changed(server, datatype="FP33"))


@refused("Tensor Data Types")
def rest_error_wrong_datatype(server: Server) -> Answer:
    """An input of another datatype than the model's"""
    tensor = first(server)
    other = "INT64" if tensor.datatype != "INT64" else "FP64"
    data = [1 if other == "INT64" else 1.0] * len(tensor.values)
    return server.infer(changed(server, datatype=other, data=data))


@refused("Request Input: data")
def rest_error_missing_data(server: Server) -> Answer:
    """An input without ``data``"""
    request = changed(server)
    del request["inputs"][0]["data"]
    return server.infer(request)


@refused("Tensor Data")
def rest_error_too_little_data(server: Server) -> Answer:
    """An input with fewer elements than its shape says"""
    data = first(server).json()["data"]
    if not data:
        raise Skipped("the first input has no elements")
    return server.infer(changed(server, data=data[:-1]))


@refused("Tensor Data")
def rest_error_too_much_data(server: Server) -> Answer:
    """An input with more elements than its shape says"""
    data = first(server).json()["data"]
    return server.infer(changed(server, data=[*data, *(data or [0])[:1]]))


@refused("Tensor Data")
def rest_error_data_of_another_type(server: Server) -> Answer:
    """Data of another type than the datatype: objects among the elements"""
    data = first(server).json()["data"]
    return server.infer(changed(server, data=[{"no": "element"} for _ in data] or [{}]))


@refused("Request Input: shape")
def rest_error_negative_length(server: Server) -> Answer:
    """An input whose shape has a negative length"""
    return server.infer(changed(server, shape=[-1, *first(server).shape[1:]]))


@refused("Request Input: shape")
def rest_error_huge_length(server: Server) -> Answer:
    """An input whose shape has more elements than any memory"""
    return server.infer(changed(server, shape=[2**62, 2**62]))


@refused("Request Input: shape")
def rest_error_length_that_is_no_number(server: Server) -> Answer:
    """An input whose shape has a length that is no whole number"""
    return server.infer(changed(server, shape=[1.5, *first(server).shape[1:]]))


@refused("Model Metadata: shape")
def rest_error_wrong_width(server: Server) -> Answer:
    """An input whose shape is not the model's"""
    spec, tensor = server.model.inputs[0], first(server)
    fixed = [axis for axis, length in enumerate(spec.shape) if length > 0]
    if not fixed:
        raise Skipped("the model's first input has no fixed length")
    shape = list(tensor.shape)
    shape[fixed[-1]] += 1
    data = (tensor.json()["data"] or [0])[:1]
    count = 1
    for length in shape:
        count *= length
    return server.infer(changed(server, shape=shape, data=data * count))


@refused("Tensor Data")
def rest_error_deep_json(server: Server) -> Answer:
    """Data nested 100,000 deep"""
    return server.infer(encoded(changed(server, data=["HERE"])).replace(b'["HERE"]', b"[" * 100_000 + b"]" * 100_000))


@refused("Tensor Data")
def rest_error_nan(server: Server) -> Answer:
    """The word NaN, which JSON has not, among the data"""
    return server.infer(encoded(changed(server, data=["HERE"])).replace(b'"HERE"', b"NaN"))
