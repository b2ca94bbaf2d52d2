import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hasten.errors import Untrusted
from hasten.passes.observers import OBSERVERS, Histogram, entropy, mean_squared_error, min_max, percentile
from hasten.passes.qdq import scale_for

VALUES = arrays.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


def seen(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(np.asarray(batch, np.float32))
    return histogram


def normal(n=200_000, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


@pytest.mark.parametrize("observer", OBSERVERS)
@settings(max_examples=40, deadline=None)
@given(values=VALUES)
def test_a_range_contains_zero_and_stays_inside_what_was_seen(observer, values):
    low, high = OBSERVERS[observer](seen(values))
    assert min(0.0, float(values.min())) <= low <= 0.0 <= high <= max(0.0, float(values.max()))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@settings(max_examples=60, deadline=None)
@given(values=VALUES)
def test_a_value_inside_the_range_comes_back_within_half_a_step(dtype, values):
    scale = scale_for(min_max(seen(values)), dtype)
    back = scale.dequantize(scale.quantize(values))
    assert scale.scale > 0
    # A zero point that is itself rounded moves the ends by half a step more.
    slack = 1.0 if dtype == "uint8" else 0.5
    assert np.abs(back - values).max() <= slack * scale.scale * (1 + 1e-3) + 1e-30 or np.abs(values).max() < 1e-25


@settings(max_examples=40, deadline=None)
@given(values=VALUES, cut=st.integers(0, 300))
def test_batches_give_the_same_histogram_as_one_array(values, cut):
    whole, parts = seen(values), seen(values[:cut], values[cut:])
    assert (whole.low, whole.high, whole.width) == (parts.low, parts.high, parts.width)
    np.testing.assert_array_equal(whole.counts, parts.counts)


def test_zero_is_exact_after_quantization():
    scale = scale_for((-0.37, 1.91))
    assert scale.dequantize(scale.quantize(np.zeros(1)))[0] == 0.0


def test_what_is_never_negative_has_zero_point_zero():
    assert scale_for((0.0, 6.0)).zero_point == 0


def test_percentile_leaves_out_the_asked_share():
    low, high = percentile(seen(normal()), 99.0)
    assert low == pytest.approx(-2.576, abs=0.05)
    assert high == pytest.approx(2.576, abs=0.05)


def test_percentile_of_what_is_never_negative_cuts_one_end_only():
    low, high = percentile(seen(np.linspace(0, 1, 10_001)), 90.0)
    assert low == 0.0
    assert high == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("observer", [entropy, mean_squared_error])
def test_tails_are_cut_but_not_the_bulk(observer):
    low, high = observer(seen(normal(500_000), [12.0, -12.0]))
    assert 2.5 < high < 9
    assert -9 < low < -2.5


@pytest.mark.parametrize("observer", [entropy, mean_squared_error])
def test_a_uniform_distribution_is_kept_whole(observer):
    low, high = observer(seen(np.random.default_rng(0).uniform(0, 1, 100_000)))
    assert low == 0.0
    assert high > 0.95


def test_mean_squared_error_beats_min_max_on_outliers():
    values = np.concatenate([normal(500_000), [12.0, -12.0]]).astype(np.float32)
    histogram = seen(values)

    def error(range_):
        scale = scale_for(range_)
        return float(np.mean((scale.dequantize(scale.quantize(values)) - values) ** 2))

    assert error(mean_squared_error(histogram)) < 0.8 * error(min_max(histogram))


def test_entropy_ignores_how_many_exact_zeros_a_relu_gives():
    positive = np.abs(normal(50_000))
    few, many = seen(positive), seen(positive, np.zeros(500_000))
    assert entropy(many)[1] == pytest.approx(entropy(few)[1], rel=0.15)


def test_a_tensor_that_is_always_zero_has_a_usable_scale():
    for observer in OBSERVERS.values():
        assert observer(seen(np.zeros(8))) == (0.0, 0.0)
    assert scale_for((0.0, 0.0)).scale == 1.0


def test_a_value_that_is_not_finite_is_an_error_that_names_the_tensor():
    with pytest.raises(Untrusted, match="'scores'"):
        Histogram().update(np.array([1.0, np.inf]), name="scores")
