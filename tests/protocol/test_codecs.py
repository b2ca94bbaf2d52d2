"""What is written is read again: requests and answers, as JSON, as binary tensors, over gRPC."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google.protobuf")

from hasten.errors import BadRequest, InvalidSetting, ServeError
from hasten.protocol import grpc, rest
from hasten.protocol.messages import DATATYPES, InferRequest, InferResponse, RequestedOutput, Tensor
from hasten.tensors import DTYPES

JSON_ABLE = sorted(set(DATATYPES) - {"FP16", "BF16"})
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def filled(datatype, shape, seed):
    """Make a tensor's data, seeded."""
    random = np.random.default_rng(seed)
    if datatype == "BYTES":
        held = np.empty(int(np.prod(shape)), object)
        held[:] = [f"text {n} ä".encode() for n in random.integers(0, 9, held.size)]
        return held.reshape(shape)
    dtype = DTYPES[DATATYPES[datatype]]
    if datatype == "BOOL":
        return random.random(shape) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return random.integers(info.min, info.max, shape, dtype, endpoint=True)
    return (random.standard_normal(shape) * 100).astype(dtype)


@st.composite
def tensors(draw, datatypes):
    names = draw(st.lists(st.text(max_size=6), min_size=1, max_size=3, unique=True))
    return tuple(
        Tensor(name=name, datatype=kind, data=filled(kind, draw(SHAPES), draw(st.integers(0, 99))))
        for name, kind in ((name, draw(st.sampled_from(datatypes))) for name in names)
    )


def same(a, b):
    assert [(t.name, t.datatype, t.shape) for t in a] == [(t.name, t.datatype, t.shape) for t in b]
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.data, other.data)


def body_of(parts):
    return b"".join(parts)


def no_metadata():
    raise AssertionError("only raw requests ask for metadata")


def read(body, header_bytes=None):
    return rest.decode_request(body, header_bytes=header_bytes, model="m", version=None, metadata=no_metadata)


@settings(max_examples=60, deadline=None)
@given(tensors(JSON_ABLE), st.text(max_size=5), st.integers(0, 9), st.integers(0, 10**9))
def test_a_request_as_json_is_read_as_it_was_written(inputs, name, priority, timeout_us) -> None:
    request = InferRequest(model="m", id=name, inputs=inputs, priority=priority, timeout_us=timeout_us)
    parts, header_bytes = rest.encode_request(request, binary=False)
    assert header_bytes is None
    got = read(body_of(parts))
    same(got.inputs, inputs)
    assert (got.id, got.priority, got.timeout_us) == (name, priority, timeout_us)


@settings(max_examples=60, deadline=None)
@given(tensors(sorted(DATATYPES)), st.booleans())
def test_a_binary_request_is_read_as_it_was_written(inputs, binary) -> None:
    asked = (RequestedOutput(name="y", binary=binary),)
    parts, header_bytes = rest.encode_request(InferRequest(model="m", inputs=inputs, outputs=asked), binary=True)
    got = read(body_of(parts), header_bytes)
    same(got.inputs, inputs)
    assert [(o.name, o.binary) for o in got.outputs] == [("y", binary)]


@settings(max_examples=60, deadline=None)
@given(tensors(sorted(DATATYPES)))
def test_a_binary_answer_is_read_as_it_was_written(outputs) -> None:
    request = InferRequest(model="m", inputs=(), parameters={"binary_data_output": True})
    response = InferResponse(model="m", version="3", id="7", outputs=outputs)
    parts, header_bytes = rest.encode_response(response, request)
    got = rest.decode_response(body_of(parts), header_bytes=header_bytes)
    same(got.outputs, outputs)
    assert (got.model, got.version, got.id) == ("m", "3", "7")


@settings(max_examples=60, deadline=None)
@given(tensors(sorted(DATATYPES)))
def test_a_grpc_request_and_its_raw_answer_are_read_as_they_were_written(inputs) -> None:
    request = InferRequest(
        model="m", version="2", id="x", inputs=inputs, priority=1, timeout_us=5, parameters={"a": 1.5, "b": True}
    )
    got = grpc.decode_infer(grpc.encode_infer_request(request))
    same(got.inputs, inputs)
    assert (got.model, got.version, got.id, got.priority, got.timeout_us) == ("m", "2", "x", 1, 5)
    assert got.parameters["a"] == 1.5
    assert got.parameters["b"] is True
    response = InferResponse(model="m", version="2", outputs=inputs)
    same(grpc.decode_infer_response(grpc.encode_infer(response, got)).outputs, inputs)


def test_contents_that_are_there_and_empty_beside_raw_ones_are_none() -> None:
    """KServe's server writes such answers."""
    made = grpc.message("ModelInferResponse")(model_name="m")
    item = made.outputs.add(name="y", datatype="FP32", shape=[2])
    item.contents.SetInParent()
    made.raw_output_contents.append(np.float32([1, 2]).tobytes())
    assert grpc.decode_infer_response(made.SerializeToString()).outputs[0].data.tolist() == [1, 2]
    item.contents.fp32_contents.append(1)
    with pytest.raises(BadRequest, match="give one kind"):
        grpc.decode_infer_response(made.SerializeToString())


@settings(max_examples=40, deadline=None)
@given(tensors(JSON_ABLE))
def test_typed_contents_are_answered_typed(inputs) -> None:
    made = grpc.message("ModelInferRequest")(model_name="m")
    for tensor in inputs:
        item = made.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        item.contents.SetInParent()
        field = grpc._CONTENTS[tensor.datatype]
        getattr(item.contents, field).extend(tensor.data.ravel().tolist())
    got = grpc.decode_infer(made.SerializeToString())
    same(got.inputs, inputs)
    answer = grpc.encode_infer(InferResponse(model="m", version="1", outputs=inputs), got)
    said = grpc.message("ModelInferResponse").FromString(answer)
    assert not said.raw_output_contents
    same(grpc.decode_infer_response(answer).outputs, inputs)


def test_binary_tensors_are_views_of_the_body() -> None:
    request = InferRequest(model="m", inputs=(Tensor.of("x", np.arange(6, dtype=np.float32)),))
    parts, header_bytes = rest.encode_request(request, binary=True)
    body = bytearray(body_of(parts))
    got = read(body, header_bytes)
    body[-4:] = np.float32(42).tobytes()
    assert got.inputs[0].data[-1] == 42


def test_arrays_of_the_other_byte_order_arrive_with_their_values() -> None:
    sent = InferRequest(model="m", inputs=(Tensor.of("x", np.array([1, 2, 3], ">f4")),))
    parts, header_bytes = rest.encode_request(sent, binary=True)
    assert read(body_of(parts), header_bytes).inputs[0].data.tolist() == [1, 2, 3]
    assert grpc.decode_infer(grpc.encode_infer_request(sent)).inputs[0].data.tolist() == [1, 2, 3]


def test_a_dtype_that_the_protocol_lacks_is_told() -> None:
    with pytest.raises(InvalidSetting, match="complex128"):
        Tensor.of("x", np.zeros(2, complex))


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_whole_numbers_of_64_bits_travel_as_parameters(value) -> None:
    sent = InferRequest(model="m", inputs=(), parameters={"n": value})
    assert grpc.decode_infer(grpc.encode_infer_request(sent)).parameters["n"] == value
    with pytest.raises(BadRequest, match="64 bits"):
        grpc.encode_infer_request(InferRequest(model="m", inputs=(), parameters={"n": 2**64}))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 300)))
def test_random_bytes_are_a_bad_request_and_nothing_else(body, header_bytes) -> None:
    if header_bytes == 0:
        header_bytes = 1
    try:
        read(body, header_bytes)
    except ServeError as error:
        assert isinstance(error, BadRequest)


@settings(max_examples=200, deadline=None)
@given(tensors(JSON_ABLE), st.data())
def test_a_damaged_request_is_a_bad_request_or_another_request(inputs, data) -> None:
    request = InferRequest(model="m", inputs=inputs)
    for parts, header_bytes in (rest.encode_request(request, binary=True), rest.encode_request(request, binary=False)):
        body = bytearray(body_of(parts))
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        try:
            read(bytes(body), header_bytes)
        except BadRequest:
            continue


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), tensors(JSON_ABLE), st.data())
def test_damaged_grpc_messages_are_bad_requests_or_other_requests(noise, inputs, data) -> None:
    body = bytearray(grpc.encode_infer_request(InferRequest(model="m", inputs=inputs)))
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    for message in (noise, bytes(body)):
        try:
            grpc.decode_infer(message)
        except BadRequest:
            continue
