"""Successive halving: the budget is kept, the good survive, failures end nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import BuildFailed, InvalidSetting, StoreError
from hasten.search.halving import rungs, successive_halving
from hasten.search.journal import Journal


class Trainer:
    """Scores candidates by a table, the better known the longer they are trained; remembers what it was asked."""

    def __init__(self, scores, *, failing=()) -> None:
        self.scores = scores
        self.failing = failing
        self.asked = []

    def __call__(self, candidate: str, epochs: float) -> float:
        self.asked.append((candidate, epochs))
        if candidate in self.failing:
            raise BuildFailed("finetune", "the loss is not finite at step 3")
        return self.scores[candidate] * (1 - 0.5 / epochs)


FOUR = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.6}


@given(st.integers(1, 40), st.floats(1, 200), st.integers(2, 4))
def test_rungs_never_take_more_epochs_than_the_budget(candidates, budget, eta) -> None:
    plan = rungs(candidates, budget_epochs=budget, eta=eta)
    assert sum(rung.candidates * rung.epochs for rung in plan) <= budget * (1 + 1e-9)
    assert plan[-1].candidates == 1
    assert all(rung.epochs >= 1 or len(plan) == 1 for rung in plan)


@given(st.permutations(list(FOUR)))
def test_the_best_candidate_wins_wherever_it_stands(order) -> None:
    found = successive_halving(order, Trainer(FOUR), budget_epochs=24)
    assert found.best == "b"
    assert found.ranking[:2] == ("b", "c")
    assert found.epochs <= 24
    assert not found.unfinished


def test_better_candidates_are_trained_for_longer() -> None:
    trainer = Trainer(FOUR)
    successive_halving("abcd", trainer, budget_epochs=24)
    longest = {name: max(epochs for asked, epochs in trainer.asked if asked == name) for name in "abcd"}
    assert longest["b"] > longest["c"] > longest["a"] == longest["d"]


def test_of_equal_scores_the_earlier_candidate_goes_on() -> None:
    assert successive_halving("xyz", Trainer(dict.fromkeys("xyz", 0.5)), budget_epochs=9).best == "x"


def test_a_failure_drops_out_with_its_reason_and_the_others_go_on() -> None:
    found = successive_halving("abcd", Trainer(FOUR, failing=("b",)), budget_epochs=24)
    assert found.best == "c"
    assert "b" not in found.ranking
    (lost,) = (item for item in found.tries if item.score is None)
    assert (lost.candidate, lost.reason) == ("b", "BuildFailed: finetune: the loss is not finite at step 3")


def test_a_score_that_is_no_number_is_a_failure() -> None:
    found = successive_halving("ab", Trainer({"a": float("nan"), "b": 0.1}), budget_epochs=8)
    assert found.best == "b"


def test_where_everything_fails_there_is_no_winner() -> None:
    found = successive_halving("ab", Trainer(FOUR, failing=("a", "b")), budget_epochs=8)
    assert found.best is None
    assert len(found.tries) == 2


def test_a_candidate_that_fails_later_is_no_winner() -> None:
    def evaluate(candidate: str, epochs: float) -> float:
        if candidate == "b" and epochs > 3:
            raise BuildFailed("finetune", "out of time")
        return FOUR[candidate]

    found = successive_halving("abcd", evaluate, budget_epochs=24)
    assert found.best == "c"


def test_a_full_disk_ends_it() -> None:
    def evaluate(candidate: str, epochs: float) -> float:
        raise StoreError("the disk is full")

    with pytest.raises(StoreError):
        successive_halving("ab", evaluate, budget_epochs=8)


def test_what_the_journal_holds_is_not_trained_again(tmp_path) -> None:
    journal = Journal.open(tmp_path / "journal.sqlite")
    first, calls = Trainer(FOUR), iter(range(100))
    cut = successive_halving("abcd", first, budget_epochs=24, memory=journal, deadline=lambda: next(calls) >= 3)
    assert cut.unfinished
    assert len(first.asked) == 3
    second = Trainer(FOUR)
    whole = successive_halving("abcd", second, budget_epochs=24, memory=journal)
    assert not set(first.asked) & set(second.asked)
    alone = successive_halving("abcd", Trainer(FOUR), budget_epochs=24)
    assert whole == alone


def test_too_small_a_budget_leaves_the_last_candidates_out() -> None:
    found = successive_halving("dcba", Trainer(FOUR), budget_epochs=3)
    assert {item.candidate for item in found.tries} < set("abcd")
    assert found.tries[0].candidate == "d"
    assert found.epochs <= 3


@pytest.mark.parametrize("bad", [{"budget_epochs": 0.5}, {"budget_epochs": 8, "eta": 1}])
def test_a_halving_that_cannot_be_is_refused(bad) -> None:
    with pytest.raises(InvalidSetting):
        successive_halving("ab", Trainer(FOUR), **bad)


def test_two_candidates_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="names of their own"):
        successive_halving("aa", Trainer(FOUR), budget_epochs=8)
