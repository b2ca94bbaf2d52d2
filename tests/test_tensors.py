from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import SignatureMismatch, Untrusted
from hasten.tensors import DTYPES, Signature, TensorSpec, assert_agrees, relative_error

IDS = TensorSpec("ids", "int64", ("batch", "length"))
MASK = TensorSpec("mask", "float32", ("batch", 4))
SIGNATURE = Signature((IDS, MASK), (TensorSpec("y", "float32", ("batch",)),))


def feed(**changes):
    return {"ids": np.zeros((2, 3), np.int64), "mask": np.zeros((2, 4), np.float32), **changes}


def test_a_feed_that_fits_is_accepted_and_tells_its_dimensions():
    SIGNATURE.check(feed())
    assert SIGNATURE.dims(feed()) == {"batch": 2, "length": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.zeros((2, 3), np.int32)}, "'ids' wants dtype int64, got int32"),
        ({"ids": np.zeros(2, np.int64)}, "'ids' wants 2 dimensions"),
        ({"mask": np.zeros((2, 5), np.float32)}, "'mask' wants length 4 on axis 1"),
        ({"mask": np.zeros((5, 4), np.float32)}, "'mask' has batch = 5, but 'ids' has batch = 2"),
        ({"other": np.zeros(1)}, "no input 'other'"),
    ],
)
def test_a_feed_that_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(SignatureMismatch, match=message):
        SIGNATURE.check(feed(**changes))


def test_a_missing_input_is_named():
    with pytest.raises(SignatureMismatch, match="'mask' is missing"):
        SIGNATURE.check({"ids": feed()["ids"]})


def test_strings_may_come_as_objects_or_fixed_width():
    spec = TensorSpec("text", "string", ("n",))
    assert spec.mismatch(np.array(["a", "bc"])) is None
    assert spec.mismatch(np.array(["a", "bc"], object)) is None
    assert spec.mismatch(np.array([1, 2])) is not None


def test_symbolic_dimensions_become_concrete_and_unknown_ones_one():
    assert TensorSpec("x", "float32", ("batch", 3, "other")).concrete({"batch": 7}) == (7, 3, 1)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_a_tensor_agrees_with_itself(values):
    array = np.array(values, np.float32)
    assert relative_error(array, array) == 0.0


def test_the_error_is_relative_to_the_largest_value():
    assert relative_error(np.array([0.0, 10.0]), np.array([1.0, 10.0])) == pytest.approx(0.1)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_agrees_only_with_its_like_in_the_same_place(strange):
    reference = np.array([1.0, strange])
    assert relative_error(reference, reference.copy()) == 0.0
    assert relative_error(reference, np.array([1.0, 2.0])) == np.inf
    assert relative_error(np.array([1.0, 2.0]), reference) == np.inf


def test_another_shape_is_no_agreement():
    assert relative_error(np.zeros(3), np.zeros((3, 1))) == np.inf


def test_the_worst_output_is_named():
    reference = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    got = {"a": np.full(2, 1.001, np.float32), "b": np.full(2, 1.1, np.float32)}
    with pytest.raises(Untrusted, match=r"'b' is off by 0\.1"):
        assert_agrees(reference, got)


def test_a_lower_precision_is_judged_by_its_own_tolerance():
    reference, got = {"a": np.ones(2, np.float32)}, {"a": np.full(2, 1.001, np.float32)}
    assert_agrees(reference, got, dtype="float16")
    with pytest.raises(Untrusted):
        assert_agrees(reference, got)


def test_integers_must_be_equal_at_any_precision():
    with pytest.raises(Untrusted, match="'class'"):
        assert_agrees({"class": np.array([1000])}, {"class": np.array([1001])}, dtype="float16")


def test_a_missing_output_is_named():
    with pytest.raises(Untrusted, match="'b' is missing"):
        assert_agrees({"b": np.ones(1)}, {})


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "string"])
def test_every_dtype_is_called_by_its_numpy_name(name):
    assert DTYPES[name].name == name
