"""What a candidate lost, and what that proves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import multinomial

from hasten.errors import BadInput, Untrusted
from hasten.measure.quality import Z, paired_interval, proves, quality, refutes, samples_needed
from hasten.measurement import Quality
from hasten.metrics import METRICS, Metric, first, load_metric


def one_hot(classes: np.ndarray, count: int = 4) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def judged(lost: int, gained: int, n: int, *, metric: str = "accuracy") -> Quality:
    """The original is right but on the last ``gained``; the candidate is wrong on the first ``lost``."""
    labels = np.arange(n) % 4
    before, after = labels.copy(), labels.copy()
    if gained:
        before[-gained:] = (labels[-gained:] + 1) % 4
    after[:lost] = (labels[:lost] + 1) % 4
    return quality(METRICS[metric], reference={"y": one_hot(before)}, candidate={"y": one_hot(after)}, labels=labels)


def noisy(n: int, noise: float, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, n)
    scores = one_hot(labels) + random.normal(0, 0.6, (n, 4)).astype(np.float32)
    return {"y": scores}, {"y": scores + random.normal(0, noise, (n, 4)).astype(np.float32)}, labels


def test_the_drop_is_original_minus_candidate() -> None:
    q = judged(lost=6, gained=2, n=200)
    assert q.reference == pytest.approx(0.99)
    assert q.value == pytest.approx(0.97)
    assert q.drop.value == pytest.approx(0.02)
    assert q.drop.n == 200
    assert q.disagreement == pytest.approx(8 / 200)
    assert q.flip_rate == pytest.approx(8 / 200)


def test_no_disagreement_does_not_give_a_zero_interval() -> None:
    q = judged(lost=0, gained=0, n=40)
    assert q.drop.high == pytest.approx(Z**2 / (40 + Z**2))
    assert q.drop.low == pytest.approx(-q.drop.high)


def test_forty_samples_cannot_prove_a_thousandth() -> None:
    q = judged(lost=0, gained=0, n=40)
    assert not proves(q, 0.001)
    assert not refutes(q, 0.001)
    more = samples_needed(q, 0.001)
    assert more is not None
    assert 3000 < more < 5000
    enough = judged(lost=0, gained=0, n=40 + more)
    assert proves(enough, 0.001)
    assert samples_needed(enough, 0.001) is None


def test_a_wrong_candidate_is_refuted() -> None:
    q = judged(lost=30, gained=0, n=200)
    assert refutes(q, 0.05)
    assert not proves(q, 0.05)


def test_the_half_width_is_about_that_of_the_rule_of_thumb() -> None:
    q = judged(lost=8, gained=7, n=500)  # d = 3 %: 1.5 points
    assert q.drop.half_width == pytest.approx(1.96 * np.sqrt(0.03 / 500), rel=0.12)


@given(lost=st.integers(0, 30), gained=st.integers(0, 30), rest=st.integers(1, 300))
def test_the_score_interval_holds_the_drop_and_is_symmetric(lost: int, gained: int, rest: int) -> None:
    n = lost + gained + rest
    low, high = paired_interval(lost, gained, n)
    assert -1 <= low <= (lost - gained) / n <= high <= 1
    assert low < high
    mirrored = paired_interval(gained, lost, n)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 2, 50), (3, 0, 40), (0, 5, 200), (40, 40, 100)])
def test_the_score_test_is_just_significant_at_the_ends_of_the_interval(lost: int, gained: int, n: int) -> None:
    for delta in paired_interval(lost, gained, n):

        def against(p: float, delta: float = delta) -> float:
            cells = (p + delta, p, 1 - 2 * p - delta)
            return -float(np.sum(xlogy((lost, gained, n - lost - gained), cells)))

        low, high = max(0.0, -delta), (1 - delta) / 2
        p = minimize_scalar(against, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        z = (lost - gained - n * delta) / np.sqrt(n * (2 * p + delta * (1 - delta)))
        assert abs(z) == pytest.approx(Z, abs=1e-3)


def test_the_score_interval_covers_the_truth_as_often_as_it_says() -> None:
    shares, n = (0.05, 0.03, 0.92), 60
    covered = sum(
        multinomial.pmf([lost, gained, n - lost - gained], n, shares)
        for lost in range(15)
        for gained in range(12)
        if (ends := paired_interval(lost, gained, n))[0] <= 0.02 <= ends[1]
    )
    assert 0.93 < covered < 0.98


@settings(deadline=None, max_examples=20)
@given(lost=st.integers(0, 5), gained=st.integers(0, 5), n=st.integers(40, 400), limit=st.floats(0.001, 0.2))
def test_as_many_samples_as_asked_for_decide(lost: int, gained: int, n: int, limit: float) -> None:
    q = judged(lost, gained, n)
    more = samples_needed(q, limit)
    if proves(q, limit) or refutes(q, limit):
        assert more is None
    elif more is not None:
        total = n + more
        low, high = paired_interval(lost / n * total, gained / n * total, total)
        assert high <= limit or low > limit


def test_agreement_needs_no_labels_and_names_no_original_score() -> None:
    before = np.arange(100) % 4
    after = before.copy()
    after[:5] = (after[:5] + 1) % 4
    q = quality(METRICS["agreement"], reference={"y": one_hot(before)}, candidate={"y": one_hot(after)})
    assert q.reference is None
    assert q.value == pytest.approx(0.95)
    assert q.drop.value == pytest.approx(0.05)
    assert q.flip_rate == pytest.approx(0.05)


def test_the_worst_class_is_the_one_that_lost_most() -> None:
    labels = np.arange(80) % 4
    after = labels.copy()
    after[labels == 2] = np.where(np.arange(20) < 5, 0, 2)
    q = quality(
        METRICS["accuracy"],
        reference={"y": one_hot(labels)},
        candidate={"y": one_hot(after)},
        labels=labels,
        classes=("ant", "bee", "cat", "dog"),
    )
    assert q.worst_class == ("cat", 0.25)
    same = quality(
        METRICS["accuracy"], reference={"y": one_hot(labels)}, candidate={"y": one_hot(labels)}, labels=labels
    )
    assert same.worst_class is None


@pytest.mark.parametrize("name", ["f1", "auc", "mean-iou"])
def test_a_statistic_has_a_paired_interval_that_never_vanishes(name: str) -> None:
    before, after, labels = noisy(300, 0.3)
    q = quality(METRICS[name], reference=before, candidate=after, labels=labels)
    assert q.drop.low < q.drop.value < q.drop.high
    assert q.drop.half_width < 0.1
    twin = quality(METRICS[name], reference=before, candidate=before, labels=labels)
    assert twin.drop.value == 0
    assert twin.drop.high == pytest.approx(Z**2 / (300 + Z**2))


def test_an_error_drops_as_a_share_of_the_originals() -> None:
    random = np.random.default_rng(0)
    labels = random.standard_normal((200, 1))
    error = random.standard_normal((200, 1))
    q = quality(METRICS["mse"], reference={"y": labels + error}, candidate={"y": labels + 1.1 * error}, labels=labels)
    assert not q.higher_is_better
    assert q.drop.value == pytest.approx(0.21)
    assert (q.drop.low, q.drop.high) == pytest.approx((0.21, 0.21))  # every sample lost the same share
    assert q.flip_rate is None


def test_no_share_of_nothing_is_reported() -> None:
    labels = np.ones((10, 1))
    with pytest.raises(Untrusted, match="mse is 0"):
        quality(METRICS["mse"], reference={"y": labels}, candidate={"y": labels + 1}, labels=labels)


@pytest.mark.parametrize("n", [50, 1000])
def test_continuous_scores_have_a_bootstrap_interval_that_repeats(n: int) -> None:
    before, after, _ = noisy(n, 0.1)
    first, again = (quality(METRICS["cosine"], reference=before, candidate=after, seed=3) for _ in range(2))
    assert first == again
    assert 0 < first.drop.low < first.drop.value < first.drop.high
    assert first.drop.value == pytest.approx(1 - first.value)


def test_one_pixel_that_changed_proves_no_more_than_none(tmp_path) -> None:
    """Of a hundred samples one may well show nothing of two in a hundred that fail wholly."""
    file = tmp_path / "mine.py"
    file.write_text("def share(o, l):\n    return o['y'][:, 0]\n")
    before = {"y": np.full((100, 1), 0.75)}
    after = {"y": before["y"].copy()}
    after["y"][7] -= 1e-6
    one, none = (
        quality(load_metric(f"{file}:share"), reference=before, candidate=y, labels=np.zeros(100))
        for y in (after, before)
    )
    assert one.drop.high >= none.drop.high == pytest.approx(Z**2 / (100 + Z**2))


def test_a_users_scores_within_one_drop_absolutely_and_others_as_a_share(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def small(o, l):\n    return o['y'][:, 0]\ndef large(o, l):\n    return 100 * o['y'][:, 0]\n")
    before, after = {"y": np.full((30, 1), 0.8)}, {"y": np.full((30, 1), 0.6)}
    labels = np.zeros(30)
    small, large = (
        quality(load_metric(f"{file}:{name}"), reference=before, candidate=after, labels=labels)
        for name in ("small", "large")
    )
    assert small.drop.value == pytest.approx(0.2)
    assert large.drop.value == pytest.approx(0.25)


def test_labels_of_another_length_are_refused_with_both_lengths() -> None:
    outputs = {"y": one_hot(np.zeros(40, int))}
    with pytest.raises(BadInput, match=r"39 labels.*40 samples"):
        quality(METRICS["accuracy"], reference=outputs, candidate=outputs, labels=np.zeros(39, int))
    with pytest.raises(BadInput, match="needs labels"):
        quality(METRICS["accuracy"], reference=outputs, candidate=outputs)


def test_values_that_are_not_finite_are_not_judged() -> None:
    before = {"y": one_hot(np.arange(8) % 4)}
    broken = {"y": before["y"].copy()}
    broken["y"][2, :2] = np.nan
    broken["y"][5, 0] = np.inf
    with pytest.raises(Untrusted, match="candidate's output 'y' has 3 values that are not finite, in 2 of 8 samples"):
        quality(METRICS["agreement"], reference=before, candidate=broken)


def test_scores_masked_with_infinity_in_both_are_alike() -> None:
    before = {"y": one_hot(np.arange(8) % 4)}
    before["y"][:, 3] = -np.inf
    q = quality(METRICS["cosine"], reference=before, candidate=before)
    assert q.value == 1.0


def test_outputs_of_another_shape_are_not_judged() -> None:
    with pytest.raises(Untrusted, match=r"shape \[8, 3\].*\[8, 4\]"):
        quality(METRICS["agreement"], reference={"y": np.zeros((8, 4))}, candidate={"y": np.zeros((8, 3))})


@pytest.mark.parametrize("name", ["agreement", "accuracy"])
def test_flips_and_the_worst_class_of_tokens_are_read_on_the_last_axis(name: str) -> None:
    labels = np.tile(np.arange(4), (50, 2))  # [n, token]: more tokens than classes
    after = labels.copy()
    after[:10, 2] = 0  # one of two tokens of class 2, in a fifth of the samples
    q = quality(
        METRICS[name],
        reference={"y": one_hot(labels)},
        candidate={"y": one_hot(after)},
        labels=labels,
        classes=("ant", "bee", "cat", "dog"),
    )
    assert q.value == pytest.approx(1 - 10 / labels.size)
    assert q.flip_rate == pytest.approx(10 / labels.size)
    assert q.worst_class == ("cat", pytest.approx(0.1))


def test_flips_of_a_segmentation_are_read_on_axis_one() -> None:
    labels = np.random.default_rng(0).integers(0, 4, (20, 4, 4))
    after = labels.copy()
    after[:, 0, 0] = (after[:, 0, 0] + 1) % 4
    maps, other = (np.moveaxis(one_hot(ids), -1, 1) for ids in (labels, after))
    for name in ("agreement", "accuracy"):
        q = quality(METRICS[name], reference={"y": maps}, candidate={"y": other}, labels=labels)
        assert q.flip_rate == pytest.approx(1 / 16)


def test_a_label_that_is_not_finite_is_no_loss_of_nothing() -> None:
    labels = np.linspace(0, 1, 20)
    labels[3] = np.nan
    outputs = {"y": np.linspace(0, 1, 20, dtype=np.float32)[:, None]}
    with pytest.raises(BadInput, match=r"1 of 20 samples are NaN or infinite, the first in row 3"):
        quality(METRICS["mse"], reference=outputs, candidate=outputs, labels=labels)


def test_a_drop_that_is_not_finite_is_not_trusted() -> None:
    """A share of next to nothing is too large for a number."""
    huge = Metric(name="huge", doc="", bounded=False, score=lambda outputs, labels: first(outputs).astype(np.float64))
    before, after = np.full(6, 1e-300), np.full(6, 1e300)
    with (
        pytest.raises(Untrusted, match=r"huge is 1e-300 for the original and 1e\+300.*not finite"),
        np.errstate(over="ignore"),
    ):
        quality(huge, reference={"y": before}, candidate={"y": after}, labels=np.zeros(6))
