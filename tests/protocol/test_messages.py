"""What others send beside the letter of the protocol, and text in tensors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hasten.errors import BadRequest, Overloaded, TooLarge
from hasten.protocol.codes import Said, error_of_grpc
from hasten.protocol.messages import Tensor
from hasten.protocol.rest import decode_model_metadata


@pytest.mark.parametrize("said", [{}, {"versions": None}])
def test_metadata_may_leave_out_the_versions(said: dict[str, Any]) -> None:
    body = json.dumps({"name": "m", "platform": "", "inputs": [], "outputs": [], **said}).encode()
    assert decode_model_metadata(body).versions == ()


@pytest.mark.parametrize("body", [b"[]", b'{"versions": 5}', b'{"name": 1}', b"null"])
def test_what_is_no_metadata_is_still_told(body: bytes) -> None:
    with pytest.raises(BadRequest, match="no model metadata"):
        decode_model_metadata(body)


@pytest.mark.parametrize("item", [None, float("nan"), 1, [b"a"], "\udc80"])
def test_an_element_that_is_neither_bytes_nor_text_is_told(item: object) -> None:
    data = np.empty(1, object)
    data[0] = item
    with pytest.raises(BadRequest, match="'x'"):
        Tensor.of("x", data)


@pytest.mark.parametrize("item", [b"a\x00", bytearray(b"a\x00"), memoryview(b"a\x00"), "a\x00"])
def test_every_kind_of_bytes_is_an_element(item: object) -> None:
    data = np.empty(1, object)
    data[0] = item
    assert Tensor.of("x", data).data.tolist() == [b"a\x00"]


@pytest.mark.parametrize(
    "text",
    [
        "SERVER: Received message larger than max (5 vs. 4)",
        "grpc: received message after decompression larger than max 4",
        "gRPC message exceeds maximum size 4: 5",
        "Received message exceeds the maximum configured message size.",
    ],
)
def test_an_exhausted_resource_that_is_a_messages_size_is_too_large(text: str) -> None:
    assert type(error_of_grpc(8, Said(text=text))) is TooLarge


def test_any_other_exhausted_resource_is_overload() -> None:
    assert type(error_of_grpc(8, Said(text="the message queue is full"))) is Overloaded
    assert type(error_of_grpc(8, Said(text="message larger than max", reason="queue_full"))) is Overloaded
