import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import BadInput, InvalidSetting
from hasten.samples import Samples
from hasten.samples.split import CALIBRATE_MAX, Splits, apart, split


def of(values, labels=None) -> Samples:
    return Samples({"x": np.asarray(values, np.float32).reshape(-1, 1)}, None if labels is None else np.asarray(labels))


def contents(samples: Samples) -> set[float]:
    return set(samples.inputs["x"][:, 0].tolist())


rows = st.lists(st.integers(0, 12), min_size=3, max_size=60).filter(lambda values: len(set(values)) >= 3)


@given(rows, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_content_is_in_two_splits_and_no_row_is_lost(values, seed) -> None:
    parts = split(of(values), seed=seed)
    found = [contents(part) for part in parts.parts.values()]
    assert all(found)
    assert sum(map(len, found)) == len(set(values))
    assert sum(parts.sizes.values()) == len(values)


@given(rows, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_rows_does_not_matter(values, random) -> None:
    labelled = list(enumerate(values))
    shuffled = random.sample(labelled, len(labelled))
    one = split(of(values, [i for i, _ in labelled]), seed=3)
    other = split(of([value for _, value in shuffled], [i for i, _ in shuffled]), seed=3)
    assert [p.digest for p in one.parts.values()] == [p.digest for p in other.parts.values()]


def test_equal_inputs_with_different_labels_stay_together() -> None:
    parts = split(of([1, 1, 1, 2, 3], [0, 1, 2, 0, 0]), seed=0)
    assert sum(1.0 in contents(part) for part in parts.parts.values()) == 1


def test_shares_are_met_and_another_seed_splits_otherwise() -> None:
    samples = of(range(100))
    parts = split(samples, seed=0)
    assert parts.sizes == {"calibrate": 20, "search": 30, "certify": 50}
    assert contents(parts.certify) != contents(split(samples, seed=1).certify)
    assert split(samples, seed=0).certify.digest == parts.certify.digest


def test_calibrate_is_capped_and_the_rest_serves_the_other_splits() -> None:
    parts = split(of(range(10_512)), seed=0)
    assert parts.sizes == {"calibrate": CALIBRATE_MAX, "search": 3_750, "certify": 6_250}


def test_three_different_samples_are_enough_and_two_are_not() -> None:
    assert split(of([1, 2, 3]), seed=0).sizes == {"calibrate": 1, "search": 1, "certify": 1}
    with pytest.raises(BadInput, match="at least 3 different samples, and there are 2"):
        split(of([1, 2, 2, 2]), seed=0)


def test_shares_that_leave_a_split_empty_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="shares"):
        split(of(range(10)), seed=0, shares=(0.5, 0.5, 0.0))


def test_saved_splits_load_as_they_were(tmp_path) -> None:
    parts = split(of(range(20), range(20)), seed=0)
    parts.save(tmp_path)
    loaded = Splits.load(tmp_path)
    assert [p.digest for p in loaded.parts.values()] == [p.digest for p in parts.parts.values()]
    np.testing.assert_array_equal(loaded.certify.labels, parts.certify.labels)


def test_rows_that_a_model_is_judged_by_are_not_trained_on() -> None:
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    judged = Samples({"x": rows[5:9]}, labels=np.zeros(4, np.int64))
    left = apart(Samples({"x": rows}, labels=np.ones(20, np.int64)), judged)
    assert left is not None
    assert len(left) == 16
    assert not {tuple(row) for row in left.inputs["x"]} & {tuple(row) for row in judged.inputs["x"]}


def test_where_nothing_is_left_to_train_on_there_is_no_train_split() -> None:
    rows = Samples({"x": np.arange(8, dtype=np.float32).reshape(4, 2)})
    assert apart(rows, rows) is None
