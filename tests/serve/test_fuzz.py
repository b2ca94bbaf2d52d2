"""Fuzz of a server process: no bytes bring out a 500 or INTERNAL, end it, or make it take memory over a bound."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

import grpc

from hasten.protocol.grpc_messages import CALLS, message
from serve.bundles import bundle
from serve.process import Process, process
from serve.served import FEATURES

BODY_BYTES = 2**20
BOUND_BYTES = {"fast": 12 * 2**20, "library": 40 * 2**20}
"""What a server may grow by while it is sent nonsense of at most ``BODY_BYTES`` at a time, one after the other: a few
bodies, and what allocators keep. Numbers that were made before they are counted take sixteen times their text; a shape
that were believed would be gigabytes."""

CLIENTS_FAULT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED)
FUZZ = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

ROW = struct.pack(f"<{FEATURES}f", *([0.5] * FEATURES))
HEAD: dict[str, Any] = {
    "id": "1",
    "parameters": {"binary_data_output": True},
    "inputs": [
        {
            "name": "x",
            "shape": [1, FEATURES],
            "datatype": "FP32",
            "parameters": {"binary_data_size": 4 * FEATURES},
        }
    ],
}
INFER = message("ModelInferRequest")(
    model_name="net",
    id="1",
    inputs=[{"name": "x", "datatype": "FP32", "shape": [1, FEATURES]}],
    outputs=[{"name": "y"}],
    parameters={"priority": {"int64_param": 1}},
    raw_input_contents=[ROW],
).SerializeToString()
TYPED = message("ModelInferRequest")(
    model_name="net",
    inputs=[{"name": "x", "datatype": "FP32", "shape": [1, FEATURES], "contents": {"fp32_contents": [0.5] * FEATURES}}],
).SerializeToString()


class Target:
    """A server with what it took before the fuzz began, and one connection of each kind."""

    def __init__(self, server: Process) -> None:
        self.server = server
        self.channel = grpc.insecure_channel(server.grpc)
        for _ in range(50):
            assert self.rest(*binary(HEAD, ROW)) == 200
            assert self.grpc("ModelInfer", INFER) is None
        self.before_bytes = server.highest_rss_bytes()

    def rest(self, body: bytes, length: str | None = None) -> int:
        """Send an inference; give the status. An error must be told in JSON."""
        connection = HTTPConnection(*self.server.http, timeout=30)
        try:
            headers = {} if length is None else {"Inference-Header-Content-Length": length}
            connection.request("POST", "/v2/models/net/infer", body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            assert list(json.loads(data)) == ["error"]
        return answer.status

    def grpc(self, call: str, data: bytes) -> grpc.StatusCode | None:
        """Call; give the status, None for OK."""
        try:
            self.channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(data, timeout=30)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            code: grpc.StatusCode = error.code()
            return code
        return None


@pytest.fixture(scope="module", params=["fast", "library"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    models = tmp_path_factory.mktemp("fuzz") / "models"
    bundle(models / "net")
    with process(models, "--transport", request.param, "--max-body", "1MiB") as server:
        made = Target(server)
        yield made
        made.channel.close()
        assert server.alive
        grown = server.highest_rss_bytes() - made.before_bytes
        assert grown < BOUND_BYTES[request.param], f"it grew by {grown / 2**20:.1f} MiB"


def binary(head: dict[str, Any], rest: bytes) -> tuple[bytes, str]:
    text = json.dumps(head).encode()
    return text + rest, str(len(text))


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A message with pieces cut out, doubled, overwritten, or cut short."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 5))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["overwrite", "remove", "double", "cut"]))
        if kind == "overwrite":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "double":
            data[at:at] = data[at : at + size] * draw(st.sampled_from([1, 50]))
        else:
            del data[at:]
    return bytes(data)


@FUZZ
@given(st.one_of(st.binary(max_size=300), damaged(INFER), damaged(TYPED)))
def test_no_inference_message_brings_out_an_internal_error(target: Target, data: bytes) -> None:
    assert target.grpc("ModelInfer", data) in (None, *CLIENTS_FAULT, grpc.StatusCode.DEADLINE_EXCEEDED)


@FUZZ
@given(st.sampled_from([call for call in CALLS if "Load" not in call and "Unload" not in call]), st.binary(max_size=60))
def test_no_message_of_a_small_call_brings_out_an_internal_error(target: Target, call: str, data: bytes) -> None:
    assert target.grpc(call, data) in (None, *CLIENTS_FAULT)


HUGE = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 16, 2**31, 2**32, 2**47, 2**62]))


@FUZZ
@given(st.lists(HUGE, max_size=6), st.sampled_from(["FP32", "BYTES", "BOOL", "FP16", "INT64"]), st.booleans())
def test_no_shape_is_believed_before_its_bytes_are_counted(
    target: Target, shape: list[int], datatype: str, raw: bool
) -> None:
    given = {"name": "x", "datatype": datatype, "shape": shape}
    contents = {"raw_input_contents": [ROW]} if raw else {}
    data = message("ModelInferRequest")(model_name="net", inputs=[given], **contents).SerializeToString()
    assert target.grpc("ModelInfer", data) in (None, *CLIENTS_FAULT)
    head = {"inputs": [{**given, "parameters": {"binary_data_size": len(ROW)}}]}
    assert target.rest(*binary(head, ROW)) in (200, 400)
    if not raw:
        assert target.rest(json.dumps({"inputs": [{**given, "data": [0.5] * FEATURES}]}).encode()) in (200, 400)


@FUZZ
@given(st.data())
def test_no_binary_framing_brings_out_a_500(target: Target, data: st.DataObject) -> None:
    body, length = binary(HEAD, ROW)
    kind = data.draw(st.sampled_from(["damaged", "length", "size", "noise"]))
    if kind == "damaged":
        body = data.draw(damaged(body))
    elif kind == "length":
        length = data.draw(st.one_of(st.integers(-10, 2 * len(body)).map(str), st.integers().map(str), TOKENS))
    elif kind == "size":
        tensor = {**HEAD["inputs"][0], "parameters": {"binary_data_size": data.draw(st.one_of(HUGE, st.none()))}}
        body, length = binary({"inputs": [tensor]}, data.draw(st.one_of(st.just(ROW), st.binary(max_size=90))))
    else:
        body, length = data.draw(st.binary(max_size=300)), data.draw(st.integers(0, 300).map(str))
    assert target.rest(body, length) in (200, 400, 504)


TOKENS = st.text("0123456789abcdef+-_.,; ", min_size=1, max_size=30).filter(lambda text: text == text.strip())


@pytest.mark.parametrize("size", [BODY_BYTES - 1000, BODY_BYTES + 1000])
def test_many_large_bodies_of_nonsense_take_no_more_than_the_bound(target: Target, size: int) -> None:
    """JSON of many small numbers is where a parser takes most for each byte."""
    rows = b'{"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": ['
    numbers = rows + b"1," * ((size - len(rows) - 5) // 2) + b"1]}]}"
    nested = b"[" * size
    for _ in range(20):
        assert target.rest(numbers) in (400, 413)
        assert target.rest(nested) in (400, 413)
        assert target.rest(b"\0" * size, "0") in (400, 413)
        assert target.grpc("ModelInfer", b"\x3a" + b"\xff" * size) in CLIENTS_FAULT
