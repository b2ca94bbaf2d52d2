"""How an ensemble's votes are counted, and how sure a cascade's member is: as their definitions have it."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.composition import Ensemble
from hasten.serve.asking import combined
from hasten.steps.confidence import confidence
from hasten.steps.top_k import best

VOTE = Ensemble(members=("a", "b", "c"), scores="y", combine="vote")
SOME = st.tuples(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6))


@settings(max_examples=200, deadline=None)
@given(SOME)
def test_each_member_has_a_vote_for_its_best_class(drawn: tuple[int, int, int]) -> None:
    seed, rows, classes = drawn
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (3, rows, classes)).astype(np.float32)  # ties are frequent
    scores[random.random(scores.shape) < 0.1] = np.nan
    wanted = np.eye(classes)[best(scores, 1)[..., 0]].mean(axis=0)
    got = combined(VOTE, list(scores))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-6)  # float32 has 24 bits


@settings(max_examples=200, deadline=None)
@given(SOME, st.booleans())
def test_confidence_is_the_best_probability_or_its_lead(drawn: tuple[int, int, int], logits: bool) -> None:
    seed, rows, classes = drawn
    random = np.random.default_rng(seed)
    scores = random.integers(0, 4, (rows, classes)).astype(np.float32)
    scores[random.random((rows, classes)) < 0.1] = np.nan
    shares = scores.astype(np.float64)
    if logits:
        grown = np.exp(shares - shares.max(axis=1, keepdims=True))
        shares = grown / grown.sum(axis=1, keepdims=True)
    ordered = np.sort(shares, axis=1)
    lead = ordered[:, -1] - (ordered[:, -2] if classes > 1 else 0)
    for kind, wanted in (("top-1", ordered[:, -1]), ("margin", lead)):
        got = confidence(scores, kind, logits=logits)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, np.nan_to_num(wanted, nan=-1.0), rtol=1e-12)


def test_votes_take_memory_by_the_classes_and_not_by_their_square() -> None:
    classes = 20_000
    scores = np.random.default_rng(0).random((3, 1, classes), np.float32)
    tracemalloc.start()
    try:
        combined(VOTE, list(scores))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 * 3 * classes, "a table of classes by classes takes 3.2 GB"
