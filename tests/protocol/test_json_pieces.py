"""Large requests in JSON, read in pieces: what is read, and what is refused, is what reading them whole says."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("simdjson", reason="needs the extra 'serve'")

from hasten.errors import BadRequest
from hasten.protocol import json_pieces, rest
from hasten.protocol.json_pieces import PIECE_BYTES, PIECE_ELEMENTS, decode_in_pieces, encode_in_pieces
from hasten.protocol.messages import InferRequest, InferResponse, ModelMetadata, RequestedOutput, Tensor

T = TypeVar("T")


def no_metadata() -> ModelMetadata:
    raise AssertionError("only raw requests ask for it")


def whole(body: bytes) -> InferRequest:
    return rest.decode_request(body, header_bytes=None, model="m", version=None, metadata=no_metadata)


def in_pieces(body: bytes) -> tuple[InferRequest, int]:
    """Read a request; gives it, and how often others could be seen to."""
    return ended(decode_in_pieces(body, model="m", version=None, metadata=no_metadata, regions=None))


def ended(steps: Generator[None, None, T]) -> tuple[T, int]:
    """Go through all steps; gives what they made, and how many they were."""
    pauses = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, pauses
        pauses += 1


def outcome(read: Any, body: bytes) -> Any:
    """Say what comes of a body: its request in comparable form, or that it is refused."""
    try:
        found = read(body)
    except BadRequest:
        return "refused"
    request = found if isinstance(found, InferRequest) else found[0]
    return (
        (request.id, request.parameters, request.outputs, request.priority, request.timeout_us),
        [(t.name, t.datatype, t.data.dtype, t.data.shape, t.data.tolist(), t.parameters) for t in request.inputs],
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_pieces, "PIECE_BYTES", 7)
    monkeypatch.setattr(json_pieces, "PIECE_ELEMENTS", 3)


NUMBERS = {
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
    "INT8": st.integers(-130, 130),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "UINT64": st.integers(0, 2**64 - 1),
    "BOOL": st.booleans(),
    "BYTES": st.text(max_size=5),
}


@st.composite
def tensors(draw: st.DrawFn, name: str) -> dict[str, Any]:
    datatype = draw(st.sampled_from(sorted(NUMBERS)))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    count = int(np.prod(shape))
    flat = draw(st.lists(NUMBERS[datatype], min_size=count, max_size=count))
    data: Any = flat
    if draw(st.booleans()):
        for length in reversed(shape[1:]):
            data = [data[at : at + length] for at in range(0, len(data), length)] if length else [[]] * shape[0]
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


@pytest.mark.usefixtures("small_pieces")
@given(st.data(), st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
def test_what_is_read_in_pieces_is_what_is_read_at_once(data: st.DataObject, marks: tuple[str, str]) -> None:
    names = data.draw(st.lists(st.sampled_from(["x", "data", "y"]), min_size=1, max_size=3))
    said = {"id": "7", "inputs": [data.draw(tensors(name)) for name in names], "parameters": {"priority": 3}}
    body = json.dumps(said, separators=marks).encode()
    body = body.replace(*data.draw(st.sampled_from([(b"", b""), (b"]", b" ]"), (b"[", b"[ "), (b"]", b"\n]\t")])))
    assert outcome(in_pieces, body) == outcome(whole, body)


@pytest.mark.usefixtures("small_pieces")
@given(st.data())
def test_a_body_of_which_some_bytes_are_wrong_is_refused_in_pieces_as_at_once(data: st.DataObject) -> None:
    body = bytearray(json.dumps({"inputs": [data.draw(tensors("x")), data.draw(tensors("y"))]}).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from(
                [b"", b",", b"[", b"]", b"],[", b"1", b"1,", b",1", b" ", b"-", b"e", b'"', b"null", b"true", b"{}"]
            )
        )
    assert outcome(in_pieces, bytes(body)) == outcome(whole, bytes(body))


@st.composite
def responses(draw: st.DrawFn) -> InferResponse:
    outputs = []
    for name in draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)):
        dtype = draw(st.sampled_from(["float32", "float64", "int8", "uint64", "bool", "float16", "object"]))
        values = [float("nan"), float("inf")] if dtype.startswith("float") and draw(st.booleans()) else [0, 1, 0, 7]
        data = np.resize(np.array(values, "float64"), draw(st.integers(0, 11))).astype(dtype)
        if dtype == "object":
            data[:] = [draw(st.sampled_from([b"", b"a,b", '\u00fc"['.encode(), b"\xff"])) for _ in data]
        outputs.append(Tensor.of(name, data.reshape(draw(st.sampled_from([(-1,), (1, -1)])))))
    return InferResponse(model="m", version="2", id=draw(st.sampled_from(["", "7"])), outputs=tuple(outputs))


@pytest.mark.usefixtures("small_pieces")
@given(responses(), st.sampled_from([None, True, False]), st.booleans())
def test_what_is_written_in_pieces_is_what_is_written_at_once(
    response: InferResponse, binary: bool | None, usual: bool
) -> None:
    asked = tuple(RequestedOutput(name=tensor.name, binary=binary) for tensor in response.outputs[:1])
    request = InferRequest(model="m", inputs=(), outputs=asked, parameters={rest.ALL: True} if usual else {})
    told = []
    for write in (
        lambda: ended(encode_in_pieces(response, request, regions=None))[0],
        lambda: rest.encode_response(response, request),
    ):
        try:
            parts, header_bytes = write()
            told.append((b"".join(parts), header_bytes))
        except BadRequest as error:
            told.append(str(error))
    assert told[0] == told[1]


def test_others_are_seen_to_after_every_piece_that_is_written() -> None:
    y = Tensor.of("y", np.zeros(10 * PIECE_ELEMENTS, np.float32))
    response = InferResponse(model="m", version="1", outputs=(y,))
    _, pauses = ended(encode_in_pieces(response, InferRequest(model="m", inputs=()), regions=None))
    assert pauses == 10


HEAD = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2,2],'


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "body",
    [
        HEAD + b'"data":[[1,2],[3,4] ]},{"name":"y","datatype":"FP32","shape":[2,1],"data":[[3],[4]]}]}',
        HEAD + b'"data":[[1,2],[3,4] ],"meta":[[0]]}]}',
        HEAD + b'"data":[[1,]2,[3,4]]}]}',
        HEAD + b'"data":[[1,2],3[,4]]}]}',
        HEAD + b'"data":[[1,2],[3,4,]]}]}',
        HEAD + b'"data":[[true,]false,[true,true]]}]}'.replace(b"FP32", b"BOOL"),
        HEAD.replace(b"FP32", b"BOOL") + b'"data":[[true,]false,[true,true]]}]}',
        HEAD.replace(b"FP32", b"BOOL") + b'"data":[[true,false],[true,true]]}]}',
        HEAD.replace(b"FP32", b"UINT64") + b'"data":[[18446744073709551615,1],[2,3]]}]}',
        HEAD.replace(b"FP32", b"UINT64") + b'"data":[[18446744073709551615,]1,[2,3]]}]}',
        HEAD.replace(b"2,2", b"4") + b'"data":[1,[2,3,4]}]}',
        HEAD.replace(b"2,2", b"3") + b'"data":[true,[true,true]}]}'.replace(b"FP32", b"BOOL"),
        b'{"data":[9,9],' + HEAD[1:].replace(b"2,2", b"2") + b'"d\\u0061ta":[]}]}',
        HEAD + b'"data":[[1,2],[3,4]],"data":[[5,6],[7,8]]}]}',
        HEAD + b'"data":[]}]}',
        HEAD + b'"data":[[[1,2],[3,4]]]}]}',
    ],
)
def test_lists_that_are_cut_or_nested_in_unusual_ways_are_read_as_at_once(body: bytes) -> None:
    assert outcome(in_pieces, body) == outcome(whole, body)


def large(rows: int, *, nested: bool = False, **more: Any) -> tuple[bytes, np.ndarray[Any, Any]]:
    """Write a request of random rows [rows, 50]; ``more``: what is said otherwise of the tensor."""
    x = np.random.default_rng(0).standard_normal((rows, 50)).astype(np.float32)
    data = x.tolist() if nested else x.ravel().tolist()
    tensor = {"name": "x", "shape": [*x.shape], "datatype": "FP32", "data": data} | more
    return json.dumps({"inputs": [tensor]}).encode(), x


@pytest.mark.parametrize("nested", [False, True])
def test_others_are_seen_to_after_every_piece(nested: bool) -> None:
    body, x = large(2000, nested=nested)
    request, pauses = in_pieces(body)
    np.testing.assert_array_equal(request.inputs[0].data, x)
    assert pauses > len(body) // (PIECE_BYTES + 100)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"data": [0.5] * 100_001}, "tensor 'x' has 100001 elements"),
        ({"data": [0.5] * 99_999 + ["1"]}, "the data of tensor 'x' is not FP32"),
        ({"data": [0.5] * 99_999 + [1e50]}, "the data of tensor 'x' is out of the range of FP32"),
        ({"data": [3] * 99_999 + [-1], "datatype": "UINT8"}, "the data of tensor 'x' is out of the range of UINT8"),
        ({"datatype": "FP16"}, "which JSON cannot carry"),
        ({"shape": [-1, 50]}, "no length may be negative"),
        ({"shape": [100_001]}, "tensor 'x' has 100000 elements; shape [100001] wants 100001"),
        ({"data": [[0.5] * 50] * 1998 + [[0.5] * 51, [0.5] * 49]}, "the data of tensor 'x' is not nested as its shape"),
    ],
)
def test_what_is_wrong_is_told_as_precisely(more: dict[str, Any], says: str) -> None:
    body, _ = large(2000, **more)
    with pytest.raises(BadRequest) as told:
        in_pieces(body)
    assert says in str(told.value)
    assert outcome(whole, body) == "refused"


def test_lists_that_are_nested_otherwise_than_the_shape_are_refused_before_their_pattern_is_made() -> None:
    body, _ = large(2000, nested=True)
    with pytest.raises(BadRequest, match=r"not nested as its shape \[50, 2000\] says"):
        in_pieces(body.replace(b"[2000, 50]", b"[50, 2000]"))
    deep = b"[" * 30 + b",".join([b"1"] * 9000) + b"]" * 30
    shape = json.dumps([9000, *[1] * 29]).encode()
    with pytest.raises(BadRequest, match="not nested as its shape"):
        in_pieces(b'{"inputs":[{"name":"x","datatype":"INT8","shape":%b,"data":%b}]}' % (shape, deep))
