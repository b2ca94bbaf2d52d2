"""A cascade's threshold: as low as the data prove, and no lower."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hasten.errors import BadInput, InvalidSetting
from hasten.measure.cascade import choose_threshold
from hasten.steps.confidence import confidence

Array = np.ndarray[Any, Any]


def world(n: int, seed: int) -> tuple[Array, Array, Array]:
    """Draw labels, and scores of a model that knows when it does not know, and of one that is nearly always right."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 5, n)
    hard = random.uniform(size=n)
    small = random.standard_normal((n, 5)) + 6 * (1 - hard[:, None]) * np.eye(5)[labels]
    large = random.standard_normal((n, 5)) + 6 * np.eye(5)[labels]
    return small, large, labels


def cascade_right(small: Array, large: Array, labels: Array, threshold: float) -> float:
    stays = confidence(small, "top-1", logits=True) >= threshold
    return float((np.where(stays, small.argmax(1), large.argmax(1)) == labels).mean())


@pytest.mark.parametrize("max_drop", [0.005, 0.01, 0.03])
def test_the_drop_holds_on_rows_that_were_not_seen_and_work_is_saved(max_drop: float) -> None:
    broken = 0
    fresh = world(20_000, 999)
    for seed in range(20):
        chosen = choose_threshold(*world(3000, seed), max_drop=max_drop, logits=True)
        large_right = float((fresh[1].argmax(1) == fresh[2]).mean())
        broken += large_right - cascade_right(*fresh, chosen.threshold) > max_drop
        assert chosen.drop <= chosen.drop_high <= max_drop
        assert chosen.asked < 0.9
    assert broken <= 2, "one in forty, and the noise of the fresh rows"


def test_more_may_be_lost_then_fewer_rows_go_on() -> None:
    asked = [choose_threshold(*world(3000, 0), max_drop=drop, logits=True).asked for drop in (0.004, 0.01, 0.05, 0.3)]
    assert asked == sorted(asked, reverse=True)
    assert asked[0] > asked[-1]


def test_where_nothing_can_be_proven_every_row_goes_on() -> None:
    small, large, labels = world(40, 0)
    chosen = choose_threshold(small, large, labels, max_drop=0.001, logits=True)
    assert (chosen.threshold, chosen.asked) == (1.0, 1.0)


def test_rows_that_are_as_sure_as_can_be_and_wrong_are_not_left_with_the_small_model() -> None:
    """A row stays where it is as sure as the threshold, and none can be surer than 1: there is no threshold then."""
    _, large, labels = world(2000, 0)
    wrong = 100.0 * np.eye(5)[(labels + 1) % 5]
    with pytest.raises(BadInput, match=r"no threshold is proven to lose at most 0\.01"):
        choose_threshold(wrong, large, labels, max_drop=0.01, logits=True)


def test_a_small_model_that_is_as_good_needs_nobody() -> None:
    _, large, labels = world(3000, 0)
    chosen = choose_threshold(large, large, labels, max_drop=0.01, logits=True)
    assert chosen.asked == 0.0


def test_what_cannot_be_chosen_by_is_told() -> None:
    small, large, labels = world(100, 0)
    with pytest.raises(InvalidSetting, match="max_drop is 0"):
        choose_threshold(small, large, labels, max_drop=0.0, logits=True)
    with pytest.raises(BadInput, match="do not fit"):
        choose_threshold(small[:50], large, labels, max_drop=0.1, logits=True)
    with pytest.raises(BadInput, match="20 rows are too few"):
        choose_threshold(small[:20], large[:20], labels[:20], max_drop=0.1, logits=True)


def test_a_row_that_is_no_number_is_never_sure() -> None:
    scores = np.array([[np.nan, 1.0], [0.0, 1.0]])
    assert confidence(scores, "top-1", logits=False).tolist() == [-1.0, 1.0]
    assert confidence(scores, "margin", logits=False).tolist() == [-1.0, 1.0]
