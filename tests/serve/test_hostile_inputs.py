"""The list of hostile inputs: a clear error for each, on both protocols, by both transports; the server goes on."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc

from hasten.protocol.grpc_messages import message
from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import FEATURES, call, infer_body, rows_of, served

INFER = "/v2/models/net/infer"
METHOD = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("hostile") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=0, transport=request.param)) as found:
        yield found


def tensor(**changed: Any) -> dict[str, Any]:
    given = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": [0.5] * FEATURES} | changed
    return {name: value for name, value in given.items() if value is not None}


def body(*tensors: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(tensors or (tensor(),)), **more}).encode()


def head(**changed: Any) -> bytes:
    return body(tensor(data=None, parameters={"binary_data_size": 4 * FEATURES} | changed.pop("parameters", {})))


ROW = struct.pack(f"<{FEATURES}f", *([0.5] * FEATURES))


@dataclass(frozen=True)
class Rest:
    """A body that is refused with 400, and what the error says."""

    body: bytes
    says: str
    header: str | None = None


REST = {
    "NaN as JSON": Rest(body(tensor(data=[math.nan] * FEATURES)), "the body is no inference request"),
    "infinity as JSON": Rest(body(tensor(data=[math.inf] * FEATURES)), "the body is no inference request"),
    "a number beyond the datatype": Rest(body(tensor(data=[1e300] * FEATURES)), "out of the range of FP32"),
    "a negative dimension": Rest(body(tensor(shape=[-1, FEATURES])), "negative"),
    "dimensions of 2**62": Rest(body(tensor(shape=[2**62, 2**62])), "the limit is"),
    "a dimension of 2**64": Rest(body(tensor(shape=[2**64, 1])), "the limit is"),
    "forty dimensions": Rest(body(tensor(shape=[1] * 40)), "40 dimensions"),
    "a huge dimension beside an empty one": Rest(body(tensor(shape=[0, 2**48, 2**48], data=[])), "the limit is"),
    "a header length beyond the body": Rest(head() + ROW, "Inference-Header-Content-Length is 9999", "9999"),
    "a header length of 20 digits": Rest(head() + ROW, "must be a number", "9" * 20),
    "a negative header length": Rest(head() + ROW, "must be a number", "-5"),
    "a header length that is a word": Rest(head() + ROW, "must be a number", "all"),
    "a header length within the head": Rest(head() + ROW, "the body is no inference request", "10"),
    "JSON nested 100,000 deep": Rest(
        body(tensor(data="HERE")).replace(b'"HERE"', b"[" * 100_000 + b"]" * 100_000), "the body is no inference"
    ),
    "an output twice": Rest(body(outputs=[{"name": "y"}, {"name": "y"}]), "'y' is there twice"),
    "an input twice": Rest(body(tensor(), tensor()), "'x' is there twice"),
    "an output that is not there": Rest(body(outputs=[{"name": "z"}]), "no output 'z'"),
    "a wrong dtype": Rest(body(tensor(datatype="FP64")), "'x'"),
    "an unknown dtype": Rest(body(tensor(datatype="FP31")), "known"),
    "16 bits as JSON": Rest(body(tensor(datatype="FP16")), "binary"),
    "an empty batch": Rest(body(tensor(shape=[0, FEATURES], data=[])), "is empty"),
    "no inputs": Rest(b'{"inputs": []}', "'x'"),
    "a size beyond the bytes": Rest(head(parameters={"binary_data_size": 2**62}) + ROW, "bytes are left", "HEAD"),
    "a negative size": Rest(head(parameters={"binary_data_size": -1}) + ROW, "bytes are left", "HEAD"),
    "bytes behind the tensors": Rest(head() + ROW + b"\0", "1 bytes more", "HEAD"),
}


@pytest.mark.parametrize("case", REST)
def test_over_rest_it_is_a_400_that_says_what_is_wrong(opened: Open, case: str) -> None:
    hostile = REST[case]
    length = hostile.header
    if length == "HEAD":
        length = str(hostile.body.rindex(b"}") + 1)
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    status, _, data = call(opened.http, "POST", INFER, hostile.body, headers)
    said = json.loads(data)
    assert (status, list(said)) == (400, ["error"])
    assert hostile.says in said["error"]
    assert "\n" not in said["error"]
    assert len(said["error"]) < 600
    assert call(opened.http, "POST", INFER, infer_body(rows_of(1)))[0] == 200


@pytest.mark.parametrize("path", ["index", "models/net/load", "models/net/unload"])
@pytest.mark.parametrize(
    "body", [b'{"parameters":{"version":"\xff"}}', b'{"\xff":1}', b'{"ready":"\xff"}', b'{"x":' + b"[" * 100_000]
)
def test_a_body_of_a_repository_call_that_is_no_text_or_nested_deep_is_a_400(
    opened: Open, path: str, body: bytes
) -> None:
    status, _, data = call(opened.http, "POST", f"/v2/repository/{path}", body)
    assert (status, "the body is not what this call takes" in json.loads(data)["error"]) == (400, True)
    assert call(opened.http, "POST", INFER, infer_body(rows_of(1)))[0] == 200


def asked(**changed: Any) -> dict[str, Any]:
    given = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES]} | changed.pop("tensor", {})
    return {"model_name": "net", "inputs": [given], "raw_input_contents": [ROW]} | changed


def typed(**contents: Any) -> dict[str, Any]:
    return asked(tensor={"contents": contents}, raw_input_contents=[])


GRPC: dict[str, tuple[dict[str, Any], str]] = {
    "a negative dimension": (asked(tensor={"shape": [-1, FEATURES]}), "negative"),
    "dimensions of 2**62": (asked(tensor={"shape": [2**62, 2**62]}), "the limit is"),
    "forty dimensions": (asked(tensor={"shape": [1] * 40}), "40 dimensions"),
    "a huge dimension beside an empty one": (
        asked(tensor={"shape": [0, 2**48, 2**48]}, raw_input_contents=[b""]),
        "the limit is",
    ),
    "an output twice": (asked(outputs=[{"name": "y"}, {"name": "y"}]), "'y' is there twice"),
    "an input twice": (asked(inputs=[asked()["inputs"][0]] * 2, raw_input_contents=[ROW] * 2), "'x' is there twice"),
    "an output that is not there": (asked(outputs=[{"name": "z"}]), "no output 'z'"),
    "a wrong dtype": (asked(tensor={"datatype": "INT32"}), "'x'"),
    "an unknown dtype": (asked(tensor={"datatype": "FP31"}), "known"),
    "an empty batch": (asked(tensor={"shape": [0, FEATURES]}, raw_input_contents=[b""]), "is empty"),
    "no inputs": ({"model_name": "net"}, "'x'"),
    "too few bytes": (asked(raw_input_contents=[ROW[:-1]]), "63 bytes"),
    "too many bytes": (asked(raw_input_contents=[ROW + b"\0"]), "65 bytes"),
    "raw contents without an input": (asked(raw_input_contents=[ROW, ROW]), "2 raw contents"),
    "typed and raw contents": (typed(fp32_contents=[0.5] * FEATURES) | {"raw_input_contents": [ROW]}, "give one kind"),
    "contents of another field": (typed(int_contents=[1] * FEATURES), "its field is fp32_contents"),
    "contents that are too short": (typed(fp32_contents=[0.5]), "1 elements"),
    "a priority that is no number": (asked(parameters={"priority": {"string_param": "a"}}), "priority"),
    "a parameter without a value": (asked(parameters={"priority": {}}), "without a value"),
}


@pytest.mark.parametrize("case", GRPC)
def test_over_grpc_it_is_invalid_argument_that_says_what_is_wrong(opened: Open, case: str) -> None:
    fields, says = GRPC[case]
    with grpc.insecure_channel(str(opened.grpc)) as channel:
        send = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            send(message("ModelInferRequest")(**fields).SerializeToString(), timeout=30)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert says in caught.value.details()
        assert "\n" not in caught.value.details()
        send(message("ModelInferRequest")(**asked()).SerializeToString(), timeout=30)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_go_through_as_bytes_and_harm_no_neighbour(opened: Open, value: float) -> None:
    """The model's own arithmetic says what they give; an answer that JSON cannot hold says how to get it."""
    row = struct.pack(f"<{FEATURES}f", *([value] * FEATURES))
    with grpc.insecure_channel(str(opened.grpc)) as channel:
        data = channel.unary_unary(METHOD)(
            message("ModelInferRequest")(**asked(raw_input_contents=[row])).SerializeToString(), timeout=30
        )
    (out,) = message("ModelInferResponse").FromString(data).raw_output_contents
    assert len(out) == 16
    first = head()
    status, _, told = call(
        opened.http, "POST", INFER, first + row, {"Inference-Header-Content-Length": str(len(first))}
    )
    finite = all(math.isfinite(number) for number in struct.unpack("<4f", out))
    assert status == (200 if finite else 400)
    assert finite or "binary" in json.loads(told)["error"]
    assert call(opened.http, "POST", INFER, infer_body(rows_of(1)))[0] == 200


def test_a_text_of_the_client_is_shortened_in_errors(opened: Open) -> None:
    for path in (f"/v2/models/{'n' * 250}", f"/v2/{'p' * 9000}"):
        _, _, data = call(opened.http, "GET", path)
        assert len(json.loads(data)["error"]) < 600


def test_a_name_of_a_megabyte_is_no_megabyte_of_error(opened: Open) -> None:
    for asked_of in (
        body(tensor(name="n" * 2**20)),
        body(tensor(datatype="F" * 2**20)),
        body(outputs=[{"name": "n" * 2**20}]),
        body(parameters={"priority": "p" * 2**20}),
    ):
        status, _, data = call(opened.http, "POST", INFER, asked_of)
        assert (status, len(data) < 2000) == (400, True), len(data)


def test_a_name_of_a_megabyte_is_a_short_status_over_grpc(opened: Open) -> None:
    with grpc.insecure_channel(str(opened.grpc)) as channel, pytest.raises(grpc.RpcError) as caught:
        fields = asked(outputs=[{"name": "n" * 2**20}])
        channel.unary_unary(METHOD)(message("ModelInferRequest")(**fields).SerializeToString(), timeout=30)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert len(caught.value.details()) <= 1000
