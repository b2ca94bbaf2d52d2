"""Every malformed request is one clear line."""

import json

import numpy as np
import pytest

from hasten.errors import BadRequest
from hasten.protocol import json_tensors, rest
from hasten.protocol.messages import InferRequest, InferResponse, ModelMetadata, Tensor, TensorMetadata

NET = ModelMetadata(
    name="net",
    versions=("1",),
    platform="onnxruntime",
    inputs=(TensorMetadata(name="x", datatype="FP32", shape=(-1, 4)),),
    outputs=(TensorMetadata(name="y", datatype="FP32", shape=(-1, 2)),),
)


def read(body, header_bytes=None, metadata=NET):
    return rest.decode_request(body, header_bytes=header_bytes, model="net", version=None, metadata=lambda: metadata)


def asked(**changed):
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]} | changed
    return json.dumps({"inputs": [{k: v for k, v in tensor.items() if v is not None}]}).encode()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"shape": [1, -4]}, "negative"),
        ({"shape": [2**40, 2**40]}, "the limit is"),
        ({"shape": [1] * 40}, "40 dimensions"),
        ({"shape": [1, 5]}, "wants 5"),
        ({"datatype": "FP31"}, "known"),
        ({"datatype": "FP16"}, "binary"),
        ({"datatype": "INT32", "data": [1, 2, 3, "4"]}, "not INT32"),
        ({"datatype": "INT8", "data": [1, 2, 3, 300]}, "range of INT8"),
        ({"datatype": "UINT64", "data": [1, 2, 3, -1]}, "range of UINT64"),
        ({"data": [1, 2, 3, 1e39]}, "range of FP32"),
        ({"data": [[1, 2], [3, 4]]}, "not nested"),
        ({"data": [[[1, 2, 3, 4]]]}, "nested 3 deep"),
        ({"data": 1.0, "shape": []}, "nested 0 deep"),
        ({"data": [], "shape": [0, 2**48, 2**48]}, "the limit is"),
        ({"data": None}, "neither data"),
        ({"parameters": {"binary_data_size": 16}, "data": None}, "Inference-Header-Content-Length is missing"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory"),
    ],
)
def test_a_tensor_that_does_not_fit_is_told(changed, told) -> None:
    with pytest.raises(BadRequest, match=told):
        read(asked(**changed))


@pytest.mark.parametrize("data", [b"1," * 99_999 + b"1", b"[]," * 99_999 + b"[]"])
def test_what_is_far_too_much_is_told_before_it_is_made(data, monkeypatch) -> None:
    monkeypatch.setattr(json_tensors, "_decoder", lambda element, depth: pytest.fail("it was made"))
    body = b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [%s]}]}' % data
    with pytest.raises(BadRequest, match="100000 elements or more"):
        read(body)


@pytest.mark.parametrize("shape", [[300, 100], [30_000, 1], [1, 1, 30_000]])
def test_what_is_large_and_right_is_read_flat_and_nested(shape) -> None:
    values = np.arange(30_000, dtype=np.float32).reshape(shape)
    for data in (values.tolist(), values.ravel().tolist()):
        (tensor,) = read(asked(shape=shape, data=data)).inputs
        np.testing.assert_array_equal(tensor.data, values)


def test_nan_and_infinity_are_no_json() -> None:
    for value in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(BadRequest):
            read(b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [%s]}]}' % value.encode())


def test_text_that_is_no_utf8_is_told() -> None:
    with pytest.raises(BadRequest):
        read(b'{"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["\xff\xfe"]}]}')


def test_an_empty_binary_tensor_of_huge_dimensions_is_told() -> None:
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": [0, 2**48, 2**48],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": 0},
                }
            ]
        }
    ).encode()
    with pytest.raises(BadRequest, match="the limit is"):
        read(head, len(head))


def test_a_parameter_that_json_cannot_carry_is_not_sent() -> None:
    asks = InferRequest(model="n", inputs=(), parameters={"scale": np.nan})
    with pytest.raises(BadRequest, match="scale"):
        rest.encode_request(asks, binary=True)


def test_deep_json_is_refused_not_followed() -> None:
    deep = b"[" * 100_000
    for body in (deep, b'{"inputs": ' + deep, b'{"inputs": [], "other": ' + deep):
        with pytest.raises(BadRequest):
            read(body)
    with pytest.raises(BadRequest, match="deep"):
        read(b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ' + b"[" * 90 + b"]" * 90 + b"}]}")


@pytest.mark.parametrize("header_bytes", [-1, 10**9])
def test_a_header_length_out_of_range_is_told(header_bytes) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length"):
        read(asked(), header_bytes)


def test_what_is_there_twice_is_told() -> None:
    tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
    with pytest.raises(BadRequest, match="input 'x' is there twice"):
        read(json.dumps({"inputs": [tensor, tensor]}).encode())
    with pytest.raises(BadRequest, match="output 'y' is there twice"):
        read(json.dumps({"inputs": [tensor], "outputs": [{"name": "y"}, {"name": "y"}]}).encode())


def test_bytes_behind_the_last_tensor_are_told() -> None:
    parts, header_bytes = rest.encode_request(
        InferRequest(model="net", inputs=(Tensor.of("x", np.zeros((1, 4), np.float32)),)), binary=True
    )
    with pytest.raises(BadRequest, match="1 bytes more"):
        read(b"".join(parts) + b"!", header_bytes)


@pytest.mark.parametrize("parameters", [{"priority": -1}, {"timeout": True}, {"timeout": "5"}, {"priority": 1.5}])
def test_priority_and_timeout_are_whole_numbers(parameters) -> None:
    with pytest.raises(BadRequest, match="whole number"):
        read(json.dumps({"inputs": [], "parameters": parameters}).encode())


def test_a_raw_body_is_the_only_input_and_its_answer_is_binary() -> None:
    got = read(np.arange(4, dtype=np.float32).tobytes(), 0)
    assert got.inputs[0].shape == (1, 4)
    assert got.parameters["binary_data_output"] is True
    with pytest.raises(BadRequest, match="wants 16"):
        read(b"123", 0)
    two = ModelMetadata(name="n", versions=(), platform="", inputs=NET.inputs * 2, outputs=())
    with pytest.raises(BadRequest, match="one input"):
        read(b"", 0, two)


def test_a_raw_body_may_leave_one_dimension_open() -> None:
    spec = (TensorMetadata(name="x", datatype="INT8", shape=(-1, 2, -1)),)
    open_ = ModelMetadata(name="n", versions=(), platform="", inputs=spec, outputs=())
    assert read(bytes(6), 0, open_).inputs[0].shape == (1, 2, 3)


def test_a_raw_body_for_text_is_one_element_as_it_came() -> None:
    spec = (TensorMetadata(name="text", datatype="BYTES", shape=(-1, 1)),)
    words = ModelMetadata(name="n", versions=(), platform="", inputs=spec, outputs=())
    got = read(b"\xff any bytes", 0, words).inputs[0]
    assert got.shape == (1, 1)
    assert got.data[0, 0] == b"\xff any bytes"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_json_cannot_hold_says_to_ask_for_binary(value) -> None:
    response = InferResponse(model="n", version="1", outputs=(Tensor.of("y", np.full((1, 2), value, np.float32)),))
    with pytest.raises(BadRequest, match="binary"):
        rest.encode_response(response, InferRequest(model="n", inputs=()))


def test_an_output_of_no_elements_has_its_size_told() -> None:
    response = InferResponse(model="n", version="1", outputs=(Tensor.of("y", np.zeros((0, 3), np.float32)),))
    asks = InferRequest(model="n", inputs=(), parameters={"binary_data_output": True})
    parts, header_bytes = rest.encode_response(response, asks)
    assert header_bytes == len(parts[0])
    assert json.loads(parts[0])["outputs"][0]["parameters"] == {"binary_data_size": 0}


@pytest.mark.parametrize("body", [b'{"name":"\xff"}', b'{"\xff":1}', b'{"x":' + b"[" * 100_000])
def test_metadata_of_a_model_that_is_no_text_or_nested_deep_is_told_as_bad(body):
    with pytest.raises(BadRequest, match="this is no model metadata"):
        rest.decode_model_metadata(body)
