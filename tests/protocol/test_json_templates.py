"""Requests that are JSON alone: read by their known head or anew, they are the same, and wrong in the same words."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import BadRequest
from hasten.protocol import json_templates, rest, rest_templates
from hasten.protocol.messages import InferRequest, ModelMetadata

pytest.importorskip("simdjson")

SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=3)
NUMBERS = st.one_of(
    st.integers(-300, 300),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 2**31, 2**63, 2**64, -(2**63), 2**80, 1e39, -0.0, 1.0]),
)
ODD = st.one_of(NUMBERS, st.booleans(), st.none(), st.text(max_size=3), st.just([1]), st.just(float("nan")))
DATATYPES = st.sampled_from(["FP32", "FP64", "INT8", "INT32", "INT64", "UINT8", "UINT64", "BOOL", "BYTES", "FP16"])
STYLES = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 1}, {"separators": (" , ", " :\t")}])


def nest(values: list[Any], shape: list[int]) -> list[Any]:
    for length in reversed(shape[1:]):
        values = [values[at : at + length] for at in range(0, len(values), length)] if length else values
    return values


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Any]:
    shape = draw(SHAPES)
    count = int(np.prod(shape))
    right = draw(st.integers(0, 3)) > 0
    values = draw(st.lists(NUMBERS if right else ODD, min_size=count, max_size=count + (0 if right else 2)))
    if draw(st.booleans()):
        values = [value if isinstance(value, float) else draw(st.integers(0, 100)) for value in values]
    data = nest(values, shape) if draw(st.booleans()) else values
    return {"name": draw(st.sampled_from(["x", "data"])), "shape": shape, "datatype": draw(DATATYPES), "data": data}


@st.composite
def bodies(draw: st.DrawFn) -> list[bytes]:
    """Give bodies with the same head, or nearly, and other elements."""
    inputs, style, found = [draw(tensors()) for _ in range(draw(st.integers(1, 2)))], draw(STYLES), []
    for at, tensor in enumerate(inputs):
        tensor["name"] += str(at) if at else ""
    for _ in range(draw(st.integers(1, 4))):
        document: dict[str, Any] = {"inputs": inputs}
        if draw(st.booleans()):
            document = {"id": draw(st.text(max_size=3)), **document}
        if draw(st.integers(0, 5)) == 0:
            document["parameters"] = {"data": draw(st.sampled_from([1, "data", '"data":[', [1]]))}
        found.append(json.dumps(document, **style).encode())
        inputs = [{**tensor, "data": [draw(NUMBERS) for _ in _flat(tensor["data"])]} for tensor in inputs]
    return found


def _flat(data: Any) -> list[Any]:
    return [value for item in data for value in _flat(item)] if isinstance(data, list) else [data]


def nothing(model: str, version: str | None) -> ModelMetadata:
    raise AssertionError("only raw requests ask for metadata")


def anew(body: bytes) -> InferRequest:
    return rest.decode_request(
        body, header_bytes=None, model="net", version=None, metadata=lambda: nothing("net", None)
    )


def known(templates: rest_templates.RequestTemplates, body: bytes) -> InferRequest:
    return templates.decode(body, header_bytes=None, metadata=nothing)


def assert_same(templates: rest_templates.RequestTemplates, body: bytes) -> None:
    try:
        wanted = anew(body)
    except BadRequest as error:
        with pytest.raises(BadRequest) as told:
            known(templates, body)
        assert str(told.value) == str(error)
        return
    got = known(templates, body)
    assert msgspec.structs.replace(got, inputs=(), form=None) == msgspec.structs.replace(wanted, inputs=())
    for one, other in zip(got.inputs, wanted.inputs, strict=True):
        assert (one.name, one.datatype, one.parameters) == (other.name, other.datatype, other.parameters)
        assert (one.data.dtype, one.data.shape) == (other.data.dtype, other.data.shape)
        assert one.data.tolist() == other.data.tolist()  # to the last bit: -0.0 below, too
        if one.data.dtype.kind == "f":
            np.testing.assert_array_equal(np.signbit(one.data), np.signbit(other.data))


@given(bodies())
def test_a_body_is_read_as_if_it_were_the_first(sent: list[bytes]) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    for body in [*sent, *sent]:
        assert_same(templates, body)


@given(bodies(), st.data())
def test_a_damaged_body_is_told_as_if_it_were_the_first(sent: list[bytes], data: st.DataObject) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    for body in sent:
        assert_same(templates, body)
    damaged = bytearray(sent[-1])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 1))] = data.draw(
            st.sampled_from([b"[", b"]", b'"', b"\\", b",", b"9", b"-", b"e", b'"data":[', b"]]", b" ", b"{", b"\xff"])
        )
    assert_same(templates, bytes(damaged))


FLAT = b'{"inputs":[{"name":"x","shape":[2,2],"datatype":"FP32","data":[1,2.5,3,4]}]}'
NESTED = b'{"id": "a", "inputs": [{"name": "x", "shape": [2, 2], "datatype": "INT64", "data": [[1, 2], [3, 4]]}]}'


@pytest.mark.parametrize("body", [FLAT, NESTED])
def test_the_second_body_with_a_head_is_not_read_anew(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    known(templates, body)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("read anew")

    monkeypatch.setattr(rest, "decode_request", never)
    got = known(templates, body.replace(b'"a"', b'"b c"').replace(b"4]", b"-7]"))
    assert got.id == ("b c" if b'"id"' in body else "")
    assert got.inputs[0].data.reshape(-1)[3] == -7
    with pytest.raises(AssertionError, match="read anew"):
        known(templates, body.replace(b"4]", b"4, 5]"))  # what does not fit is for others to tell


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[{"name":"x","shape":[0],"datatype":"FP32","d\\u0061ta":[],"x\\"data":[5]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1],"data":[2]}]}',
        b'{"inputs":[{"name":"data","shape":[1],"datatype":"FP32","parameters":{"k":"data"},"data":[2]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"k":"\\"data\\":["},"data":[2]}]}',
        b'{"inputs":[{"name":"x","shape":[2,1],"datatype":"FP32","data":[[1],[2]]}],"id":"\\"id\\""}',
        b'{"inputs":[{"name":"x","shape":[2,2],"datatype":"FP32","data":[[1],[2,3,4]]}]}',
    ],
)
def test_what_only_looks_like_a_list_of_elements_is_not_taken_for_one(body: bytes) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    for sent in (body, body, body.replace(b"[2]", b"[3]"), body.replace(b"[5]", b"[6]")):
        assert_same(templates, sent)


@pytest.mark.parametrize("data", ["[[1],[2,3,4]]", "[[1,2,3,4]]", "[[1,2],[3],[4]]", "[[[1,2],[3,4]]]", "[1,2,3,4]"])
def test_elements_of_a_known_head_that_are_nested_otherwise_are_told_as_if_they_were_the_first(data: str) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    known(templates, NESTED)
    assert_same(templates, NESTED.replace(b"[[1, 2], [3, 4]]", data.encode()))


@pytest.mark.parametrize("shape", [[2**28, 0], [0, 2**28], [2**45, 0]])
@pytest.mark.parametrize("nested", [b"[[]]", b"[[],[]]"])
def test_a_shape_without_elements_whose_other_axis_is_huge_takes_no_memory(shape: list[int], nested: bytes) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    head = b'{"inputs":[{"name":"x","shape":%b,"datatype":"FP32","data":' % json.dumps(shape).encode()
    known(templates, head + b"[]}]}")
    tracemalloc.start()
    try:
        assert_same(templates, head + nested + b"}]}")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_more_elements_than_the_shape_wants_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    known(templates, FLAT)

    def never(*_: object) -> None:
        raise AssertionError("elements were made")

    monkeypatch.setattr(json_templates.Numbers, "_buffer", never)
    with pytest.raises(BadRequest, match="elements or more"):
        known(templates, FLAT.replace(b"1,", b"1," * 100_000))


def test_heads_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_templates, "KEPT_BYTES", 1000)
    templates = rest_templates.RequestTemplates("net", None)
    for at in range(100):
        known(templates, FLAT.replace(b'"x"', b'"x%d"' % at))
        assert 0 < sum(map(len, templates._plain)) <= 1000
