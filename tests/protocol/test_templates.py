"""Heads that are known by their bytes: what is read and written is what the codecs themselves read and write."""

from __future__ import annotations

import itertools
import re
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import BadRequest
from hasten.protocol import grpc, grpc_templates, rest, rest_templates
from hasten.protocol.messages import InferRequest, InferResponse, ModelMetadata, RequestedOutput, Tensor
from hasten.tensors import DTYPES

DTYPE = st.sampled_from([name for name in DTYPES if name not in ("string", "bfloat16")])
IDS = st.one_of(st.just(""), st.text(max_size=6), st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True))
VERSIONS = st.sampled_from(["", "1"])


def array_of(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).integers(0, 2, shape)).astype(DTYPES[dtype])


TENSORS = st.lists(st.tuples(DTYPE, st.lists(st.integers(0, 3), max_size=3).map(tuple)), min_size=1, max_size=3)
PARAMETERS = st.dictionaries(st.sampled_from(["a", "id", "priority"]), st.integers(0, 9), max_size=2)


@st.composite
def requests(draw: st.DrawFn) -> list[InferRequest]:
    """Give requests that differ in ids and data, and now and then in more."""
    found = []
    tensors, parameters = draw(TENSORS), draw(PARAMETERS)
    for seed in range(draw(st.integers(1, 5))):
        if draw(st.integers(0, 4)) == 0:
            tensors, parameters = draw(TENSORS), draw(PARAMETERS)
        inputs = tuple(Tensor.of(f"x{at}", array_of(dtype, shape, seed)) for at, (dtype, shape) in enumerate(tensors))
        asked = (RequestedOutput(name="y"),) if draw(st.booleans()) else ()
        more = {name: value for name, value in parameters.items() if name != "priority"}
        found.append(
            InferRequest(
                model="net",
                id=draw(IDS),
                inputs=inputs,
                outputs=asked,
                parameters=more,
                priority=parameters.get("priority", 0),
            )
        )
    return found


def nothing(model: str, version: str | None) -> ModelMetadata:
    raise AssertionError("only raw requests ask for metadata")


def assert_same(got: InferRequest, wanted: InferRequest) -> None:
    assert msgspec.structs.replace(got, inputs=(), form=None) == msgspec.structs.replace(wanted, inputs=())
    assert [(t.name, t.datatype, t.parameters) for t in got.inputs] == [
        (t.name, t.datatype, t.parameters) for t in wanted.inputs
    ]
    for one, other in zip(got.inputs, wanted.inputs, strict=True):
        assert (one.data.dtype, one.data.shape) == (other.data.dtype, other.data.shape)
        np.testing.assert_array_equal(one.data, other.data)


@given(requests())
def test_requests_over_http_are_read_as_if_each_were_the_first(asked: list[InferRequest]) -> None:
    templates = rest_templates.RequestTemplates("net", None)
    for request in [*asked, *asked]:
        parts, header_bytes = rest.encode_request(request, binary=True)
        body = b"".join(parts)
        got = templates.decode(body, header_bytes=header_bytes, metadata=nothing)
        assert_same(
            got,
            rest.decode_request(
                body,
                header_bytes=header_bytes,
                model="net",
                version=None,
                metadata=lambda: nothing("net", None),
            ),
        )


@given(requests())
def test_requests_over_grpc_are_read_as_if_each_were_the_first(asked: list[InferRequest]) -> None:
    templates = grpc_templates.RequestTemplates()
    for request in [*asked, *asked]:
        data = grpc.encode_infer_request(request)
        assert_same(templates.decode(data), grpc.decode_infer(data))


@given(requests(), st.data())
def test_a_damaged_message_is_told_as_the_library_tells_it(asked: list[InferRequest], data: st.DataObject) -> None:
    templates = grpc_templates.RequestTemplates()
    whole = grpc.encode_infer_request(asked[0])
    templates.decode(whole)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for message in (bytes(damaged), cut):
        try:
            wanted = grpc.decode_infer(message)
        except BadRequest as error:
            with pytest.raises(BadRequest) as told:
                templates.decode(message)
            assert str(told.value) == str(error)
        else:
            got = templates.decode(message)
            assert msgspec.structs.replace(got, inputs=(), form=None) == msgspec.structs.replace(wanted, inputs=())


def test_a_parameter_called_id_is_never_taken_for_the_requests_own() -> None:
    templates = rest_templates.RequestTemplates("net", None)

    def read(head: bytes) -> InferRequest:
        return templates.decode(head + bytes(4), header_bytes=len(head), metadata=nothing)

    tensor = b'"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":4}}]'
    for value in (b"", b"a", b"b"):
        got = read(b'{"parameters":{"id":"%b"},%b}' % (value, tensor))
        assert (got.id, got.parameters) == ("", {"id": value.decode()})
    for value in (b"", b"a", b"b", b"a", b'q\\"', b"\\u0041"):
        got = read(b'{"id":"%b",%b}' % (value, tensor))
        assert got.id == msgspec.json.decode(b'"%b"' % value)


def test_a_body_that_is_shorter_than_its_known_head_says_is_refused() -> None:
    templates = rest_templates.RequestTemplates("net", None)
    head = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{"binary_data_size":4}}]}'
    templates.decode(head + bytes(4), header_bytes=len(head), metadata=nothing)
    for more in (b"", bytes(3), bytes(5)):
        with pytest.raises(BadRequest):
            templates.decode(head + more, header_bytes=len(head), metadata=nothing)


def test_the_heads_of_many_targets_take_no_more_memory_than_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_templates, "KEPT_BYTES", 20_000)
    named = ",".join(f'{{"name":"y{n}"}}' for n in range(300))  # what was read of it is far longer than its text
    heads = rest_templates.Heads()
    targets = [rest_templates.RequestTemplates(f"net{n}", None, heads=heads) for n in range(10)]
    tracemalloc.start()
    try:
        for n in range(5):
            for templates in targets:
                head = f'{{"inputs":[],"outputs":[{named}],"parameters":{{"k":{n}}}}}'.encode()
                assert templates.decode(head, header_bytes=len(head), metadata=nothing).parameters == {"k": n}
        assert tracemalloc.get_traced_memory()[0] < 15 * 20_000
    finally:
        tracemalloc.stop()
    assert 0 < sum(len(head) for templates in targets for head in templates._known) <= 20_000


def test_a_head_that_is_read_anew_each_time_does_not_drive_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_templates, "KEPT_BYTES", 1000)
    templates = rest_templates.RequestTemplates("net", None)
    for head in (b'{"inputs":[]}', *[b'{"parameters":{"id":""},"inputs":[]}'] * 100):
        templates.decode(head, header_bytes=len(head), metadata=nothing)
    assert len(templates._known) == 2


def ways_to_ask(names: list[str]) -> list[InferRequest]:
    """Give requests that want all outputs as bytes, each alone as bytes, the last one as JSON, and all as JSON."""
    own = [RequestedOutput(name=name, binary=True, parameters={rest.ASKED: True}) for name in names]
    last = RequestedOutput(name=names[-1], binary=False, parameters={rest.ASKED: False})
    plain = tuple([RequestedOutput(name=name) for name in names])
    everything: dict[str, bool | int | str] = {rest.ALL: True}
    return [
        InferRequest(model="net", inputs=(), parameters=everything),
        InferRequest(model="net", inputs=(), outputs=tuple(own)),
        InferRequest(model="net", inputs=(), outputs=plain, parameters=everything),
        InferRequest(model="net", inputs=(), outputs=(*own[:-1], last), parameters=everything),
        InferRequest(model="net", inputs=(), outputs=plain),
    ]


@given(TENSORS, st.lists(st.tuples(IDS, VERSIONS), min_size=1, max_size=4), st.booleans())
def test_answers_are_written_as_the_codecs_write_them(
    tensors: list[tuple[str, tuple[int, ...]]], named: list[tuple[str, str]], typed: bool
) -> None:
    over_http, over_grpc = rest_templates.ResponseTemplates(), grpc_templates.ResponseTemplates()
    outputs = tuple(Tensor.of(f"y{at}", array_of(dtype, shape, 1)) for at, (dtype, shape) in enumerate(tensors))
    ways = ways_to_ask([tensor.name for tensor in outputs])
    for (name, version), binary in itertools.product([*named, *named], ways):
        response = InferResponse(model="net", version=version, outputs=outputs, id=name)
        try:
            wanted, wanted_bytes = rest.encode_response(response, binary)
        except BadRequest as error:  # float16 has no form in JSON
            with pytest.raises(BadRequest, match=re.escape(str(error))):
                over_http.encode(response, binary)
        else:
            parts, header_bytes = over_http.encode(response, binary)
            assert (b"".join(parts), header_bytes) == (b"".join(wanted), wanted_bytes)
    asked = InferRequest(model="net", inputs=(), parameters={grpc.TYPED: True} if typed else {})
    if typed and any(dtype == "float16" for dtype, _ in tensors):
        return
    for name, version in [*named, *named]:
        response = InferResponse(model="net", version=version, outputs=outputs, id=name)
        assert over_grpc.encode(response, asked) == grpc.encode_infer(response, asked)
