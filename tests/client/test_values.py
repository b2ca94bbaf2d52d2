"""What a client makes of the arrays and lists that it is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hasten.client.values import Wanted, request_of
from hasten.errors import BadRequest


def sent(value: Any) -> np.ndarray[Any, Any]:
    (tensor,) = request_of("net", {"x": value}, Wanted()).inputs
    return tensor.data


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([b"a\x00", b"\x00\x00b"], [b"a\x00", b"\x00\x00b"]),
        (["a\x00"], [b"a\x00"]),
        ([["a\x00", b"\xff"], ["", "é"]], [[b"a\x00", b"\xff"], [b"", "é".encode()]]),
        (b"a\x00", b"a\x00"),
        (["a", bytearray(b"b\x00")], [b"a", b"b\x00"]),
        ([np.array(["a", "b"]), np.array([b"c", b"d"])], [[b"a", b"b"], [b"c", b"d"]]),
    ],
)
def test_lists_of_text_and_bytes_arrive_whole(value: Any, wanted: Any) -> None:
    assert sent(value).tolist() == wanted


@pytest.mark.parametrize(
    "value",
    [[[1, 2, 3], [1]], [["a"], ["b", "c"]], ["a", ["b"]], ["a", None], [1, "a"], ["\udc80"], {"a": 1}, [10**400]],
)
def test_what_is_no_array_is_a_bad_request(value: Any) -> None:
    with pytest.raises(BadRequest, match="'x'"):
        sent(value)


def test_lists_of_numbers_are_arrays_of_numbers() -> None:
    assert sent([[1.0, 2.0]]).dtype == np.float64
    assert sent([True]).dtype == np.bool_
    assert sent([]).shape == (0,)
