"""Knobs of a training are found by short trainings: the usual first, the best of all taken, failures survived."""

import math

import pytest

pytest.importorskip("optuna")

from hasten.errors import BuildFailed, StoreError
from hasten.search.knobs import ALPHA, LR, TEMPERATURE, Knobs, tune


def bowl(knobs):
    """Lose least at lr = 3e-4."""
    return abs(math.log(knobs.lr / 3e-4)) + 0.1 * knobs.alpha


def test_the_usual_settings_are_tried_first() -> None:
    tried = []
    tune(lambda knobs: tried.append(knobs) or 0.0, tries=1)
    assert tried == [Knobs()]


def test_what_lost_least_is_taken() -> None:
    found = tune(bowl, tries=12)
    assert found.loss == bowl(found.knobs) < bowl(Knobs())


def test_every_question_is_within_its_range() -> None:
    tried = []
    tune(lambda knobs: tried.append(knobs) or bowl(knobs), tries=12)
    for name, (low, high) in {"lr": LR, "temperature": TEMPERATURE, "alpha": ALPHA}.items():
        assert all(low * 0.95 <= getattr(knobs, name) <= high * 1.05 for knobs in tried)


def test_the_same_losses_lead_to_the_same_questions_in_the_same_order() -> None:
    first, again = [], []
    tune(lambda knobs: first.append(knobs) or bowl(knobs), tries=8, seed=3)
    tune(lambda knobs: again.append(knobs) or bowl(knobs), tries=8, seed=3)
    assert first == again


def test_of_equals_the_usual_settings_are_kept() -> None:
    assert tune(lambda knobs: 0.0, tries=6).knobs == Knobs()


def test_a_training_that_fails_is_out_and_the_others_go_on() -> None:
    def evaluate(knobs):
        if knobs == Knobs():
            raise BuildFailed("train", "the loss is nan")
        return math.nan if knobs.lr > 2e-3 else bowl(knobs)

    found = tune(evaluate, tries=10)
    assert found.knobs != Knobs()
    assert found.knobs.lr <= 2e-3
    assert "the loss is nan" in found.fallen[0]


def test_a_full_disk_is_nobodys_outcome() -> None:
    def evaluate(knobs):
        raise StoreError("the disk is full")

    with pytest.raises(StoreError):
        tune(evaluate, tries=3)
