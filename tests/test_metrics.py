"""Quality metrics: against brute force and scikit-learn, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn import metrics as sk

from hasten.errors import BadInput, UnknownName
from hasten.metrics import METRICS, default_metric, load_metric


def value(name: str, outputs: np.ndarray, target: np.ndarray) -> float:
    return METRICS[name].value({"y": outputs}, target)


def scores_and_labels(seed: int = 0, n: int = 60, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((n, classes)).astype(np.float32), random.integers(0, classes, n)


@given(seed=st.integers(0, 50))
def test_f1_and_auc_are_those_of_scikit_learn(seed: int) -> None:
    scores, labels = scores_and_labels(seed)
    labels[:5] = range(5)
    assert value("f1", scores, labels) == pytest.approx(sk.f1_score(labels, scores.argmax(1), average="macro"))
    exact = np.mean([sk.roc_auc_score(labels == k, scores[:, k]) for k in range(5)])
    assert value("auc", scores, labels) == pytest.approx(exact)


def test_auc_of_a_binary_classifier_counts_ties_half() -> None:
    scores, labels = np.array([0.1, 0.5, 0.5, 0.9], np.float32), np.array([0, 0, 1, 1])
    assert value("auc", scores, labels) == pytest.approx(sk.roc_auc_score(labels, scores)) == 0.875


@given(seed=st.integers(0, 30))
def test_a_statistic_with_weights_is_that_of_repeated_samples(seed: int) -> None:
    scores, labels = scores_and_labels(seed)
    weights = np.random.default_rng(seed).integers(0, 4, len(labels))
    rows = np.repeat(np.arange(len(labels)), weights)
    for name in ("f1", "auc", "mean-iou"):
        statistic = METRICS[name].statistic
        assert statistic is not None
        weighted = statistic({"y": scores}, labels)(weights.astype(np.float64))
        assert weighted == pytest.approx(value(name, scores[rows], labels[rows]))


def test_spearman_is_one_for_any_growing_function_and_weighted_as_repeated() -> None:
    x = np.random.default_rng(0).standard_normal(30)
    assert value("spearman", np.exp(x)[:, None], x) == pytest.approx(1.0)
    rows = np.array([0, 0, 3, 4, 5, 5, 5, 9])
    noisy = x + np.random.default_rng(1).standard_normal(30)
    statistic = METRICS["spearman"].statistic
    assert statistic is not None
    weights = np.bincount(rows, minlength=30).astype(np.float64)
    assert statistic({"y": noisy}, x)(weights) == pytest.approx(value("spearman", noisy[rows], x[rows]))


@given(seed=st.integers(0, 30))
def test_spearman_is_that_of_scipy_also_with_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 6, 40).astype(np.float64), random.integers(0, 4, 40).astype(np.float64)
    assert value("spearman", a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_mean_iou_ignores_marked_pixels() -> None:
    outputs = np.zeros((1, 2, 2, 2), np.float32)
    outputs[0, 1, 0] = 1  # upper row is class 1
    labels = np.array([[[1, 0], [0, 255]]])
    assert value("mean-iou", outputs, labels) == pytest.approx((1 / 2 + 1 / 2) / 2)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("logits", [True, False])
def test_accuracy_reads_a_single_output_as_a_binary_classifier(shape: tuple[int, ...], logits: bool) -> None:
    outputs = np.array([-2.0, 0.3, 1.5, -0.1] if logits else [0.1, 0.6, 0.9, 0.49], np.float32).reshape(shape)
    assert value("accuracy", outputs, np.array([0, 1, 0, 0])) == 0.75
    assert value("accuracy", outputs, np.array([-1, 1, -1, -1])) == 0.75


def test_accuracy_takes_ids_one_hot_rows_tokens_and_pixels() -> None:
    scores, labels = scores_and_labels()
    by_id = value("accuracy", scores, labels)
    assert by_id == pytest.approx(np.mean(scores.argmax(1) == labels))
    assert value("accuracy", scores, np.eye(5)[labels]) == by_id
    assert value("accuracy", scores, labels[:, None].astype(np.float32)) == by_id
    assert value("accuracy", scores.argmax(1), labels) == by_id
    tokens = scores.reshape(6, 10, 5)
    assert value("accuracy", tokens, labels.reshape(6, 10)) == pytest.approx(by_id)
    assert value("accuracy", tokens.transpose(0, 2, 1), labels.reshape(6, 10)) == pytest.approx(by_id)


def test_top5_looks_at_five_classes() -> None:
    scores = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    assert value("top5-accuracy", scores, np.arange(8)) == 5 / 8


def test_errors_of_regression_are_plain_means() -> None:
    outputs, labels = np.array([[1.0], [3.0]], np.float32), np.array([2.0, 5.0])
    assert value("mse", outputs, labels) == 2.5
    assert value("mae", outputs, labels) == 1.5
    with pytest.raises(BadInput, match=r"\[2, 2\].*\[2, 1\]"):
        value("mse", outputs, np.ones((2, 2)))


def test_a_model_agrees_with_itself_exactly() -> None:
    scores, _ = scores_and_labels()
    assert value("cosine", scores, scores) == value("agreement", scores, scores) == 1.0
    assert value("relative-error", scores, scores) == 0.0


def test_relative_error_and_cosine_see_a_scaled_output_differently() -> None:
    scores, _ = scores_and_labels()
    assert value("cosine", 2 * scores, scores) == pytest.approx(1.0)
    assert 0.9 < value("relative-error", 2 * scores, scores) <= 1.0


def test_labels_that_are_no_class_are_refused() -> None:
    scores, labels = scores_and_labels()
    labels[3] = 7
    with pytest.raises(BadInput, match=r"label 7 is no class.*0 to 4"):
        value("accuracy", scores, labels)
    with pytest.raises(BadInput, match="whole numbers"):
        value("accuracy", scores, labels + 0.5)


@pytest.mark.parametrize("row", [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [2, -1, 0, 0, 0]])
@pytest.mark.parametrize("name", ["accuracy", "top5-accuracy", "f1", "auc", "mean-iou"])
def test_a_row_that_marks_several_classes_or_none_is_taken_for_no_class(name: str, row: list[int]) -> None:
    scores, labels = scores_and_labels()
    marks = np.eye(5)[labels]
    marks[7] = row
    with pytest.raises(BadInput, match=r"mark several classes of a row, or none; use the metric mse, mae, or a func"):
        value(name, scores, marks)


def test_soft_labels_are_the_class_that_has_most_of_the_row() -> None:
    scores, labels = scores_and_labels()
    soft = (0.9 * np.eye(5)[labels] + 0.02).astype(np.float16)
    assert value("accuracy", scores, soft) == value("accuracy", scores, labels)


N, K = 40, 4
IDS = np.arange(N) % K
MARKS = np.eye(K)[IDS]
SEVERAL = np.stack([IDS % 2, IDS // 2, np.ones(N), np.zeros(N)], axis=1)

DEFAULTS = {
    "class ids": (IDS, (K,), "accuracy"),
    "class ids as floats": (IDS.astype(np.float32), (K,), "accuracy"),
    "class ids in a column": (IDS[:, None], (K,), "accuracy"),
    "one-hot rows": (MARKS.astype(np.int64), (K,), "accuracy"),
    "one-hot rows of floats": (MARKS.astype(np.float32), (K,), "accuracy"),
    "several classes a row": (SEVERAL.astype(np.float32), (K,), "mse"),
    "several classes a row as whole numbers": (SEVERAL.astype(np.int64), (K,), "mse"),
    "whole numbers to predict": (np.tile(IDS[:, None] * 10.0, (1, K)).astype(np.float32), (K,), "mse"),
    "counts to predict": (np.tile(IDS[:, None], (1, K)), (K,), "mse"),
    "fractions to predict": (np.linspace(0, 1, N * K).reshape(N, K), (K,), "mse"),
    "yes or no": (IDS % 2, (1,), "accuracy"),
    "a count to predict": (IDS, (1,), "mse"),
    "tokens": (np.tile(IDS[:, None], (1, 3)), (3, K), "accuracy"),
    "tokens whose classes come first": (np.tile(IDS[:, None], (1, 3)), (K, 3), "accuracy"),
    "an image to predict": (
        np.zeros((N, 3, 6, 6), np.uint8) + IDS[:, None, None, None].astype(np.uint8),
        (3, 6, 6),
        "mse",
    ),
}


@pytest.mark.parametrize("rows", [N, 2])
@pytest.mark.parametrize("case", DEFAULTS)
def test_the_default_metric_is_told_by_labels_and_the_shape_of_an_output_of_any_number_of_rows(
    case: str, rows: int
) -> None:
    labels, shape, wanted = DEFAULTS[case]
    assert default_metric(labels, {"y": np.zeros((rows, *shape), np.float32)}) == wanted


def test_an_unknown_metric_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'accuracy'"):
        load_metric("acuracy")


def test_a_users_function_sees_every_output(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def margin(outputs, labels):\n    return outputs['a'] - outputs['b']\n\ndef short(o, l):\n    return [1]\n"
    )
    metric = load_metric(f"{file}:margin")
    outputs = {"a": np.array([3.0, 2.0]), "b": np.array([1.0, 1.0])}
    assert metric.value(outputs, np.zeros(2)) == 1.5
    with pytest.raises(BadInput, match=r"must give scores \[2\]"):
        load_metric(f"{file}:short").value(outputs, np.zeros(2))
    with pytest.raises(BadInput, match="KeyError"):
        metric.value({"a": outputs["a"]}, np.zeros(2))
    with pytest.raises(UnknownName, match="did you mean 'margin'"):
        load_metric(f"{file}:margins")
    with pytest.raises(BadInput, match="cannot be imported"):
        load_metric(f"{tmp_path / 'gone.py'}:f")


@pytest.mark.parametrize(
    ("labels", "output", "name"),
    [
        (np.arange(4), np.zeros((4, 10)), "accuracy"),
        (np.arange(4.0), np.zeros((4, 10)), "accuracy"),
        (np.array([0, 1, 1, 0]), np.zeros((4, 1)), "accuracy"),
        (np.array([0.0, 1.0, 1.0, 0.0]), np.zeros(4), "accuracy"),
        (np.array([17, 3, 250, 4]), np.zeros((4, 1)), "mse"),
        (np.array([0.5, 1, 2, 3]), np.zeros(4), "mse"),
        (None, np.zeros((4, 10)), "agreement"),
        (None, np.zeros((4, 10, 16)), "relative-error"),
        (None, np.zeros((4, 1)), "relative-error"),
    ],
)
def test_the_default_metric_follows_labels_and_output(labels, output, name) -> None:
    assert default_metric(labels, {"y": output}) == name


def tokens(classes: int, n: int = 8, length: int = 6, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, token, class] of which the likeliest class is known, and those classes [n, token]."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, (n, length))
    noise = random.uniform(0, 0.5, (n, length, classes))
    return (noise + np.eye(classes)[labels]).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5, 6])
def test_a_token_classifier_has_its_classes_on_the_last_axis(classes: int) -> None:
    scores, labels = tokens(classes)  # with 6 classes of 6 tokens, the labels' shape fits either axis
    wrong = labels.copy()
    wrong[0, :3] = (wrong[0, :3] + 1) % classes
    other = np.eye(classes, dtype=np.float32)[wrong]
    assert value("accuracy", scores, labels) == 1.0
    assert value("accuracy", scores, wrong) == pytest.approx(1 - 3 / labels.size)
    assert value("agreement", other, scores) == pytest.approx(1 - 3 / labels.size)
    assert value("f1", scores, labels) == value("mean-iou", scores, labels) == 1.0


def test_one_token_is_no_binary_classifier() -> None:
    scores, labels = tokens(5, length=1)
    assert value("accuracy", scores, labels) == 1.0
    assert value("accuracy", scores, (labels + 1) % 5) == 0.0
    assert value("agreement", scores, scores[::-1]) == np.mean(labels == labels[::-1])


def test_a_binary_token_classifier_may_have_one_number_a_token() -> None:
    _, labels = tokens(2)
    scores = np.where(labels == 1, 3.0, -2.0).astype(np.float32)[:, :, None]
    assert value("accuracy", scores, labels) == value("accuracy", scores, labels[:, :, None]) == 1.0
    assert value("agreement", scores, -scores) == 0.0


def test_a_segmentation_has_its_classes_on_axis_one() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (4, 3, 3))  # the shape of the labels fits either axis
    maps = np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, 1)  # [n, class, height, width]
    assert value("accuracy", maps, labels) == 1.0
    assert value("accuracy", maps, labels[:, None]) == 1.0
    assert value("agreement", maps, maps) == 1.0
    shifted = np.moveaxis(np.eye(3, dtype=np.float32)[(labels + 1) % 3], -1, 1)
    assert value("agreement", shifted, maps) == 0.0
    one = maps[:, :1] * 2 - 1  # [n, 1, height, width]: class 0 or not
    assert value("accuracy", one, labels == 0) == 1.0


def test_ids_of_tokens_are_compared_as_they_are() -> None:
    scores, labels = tokens(5)
    assert value("accuracy", scores.argmax(-1), labels) == 1.0
    assert value("agreement", scores.argmax(-1), labels) == 1.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{file}:f", "NameError: name 'undefined' is not defined"),
        (":f", "'' names no module"),
        (".x:f", "'.x' names no module"),
    ],
)
def test_a_module_of_the_users_that_fails_in_any_way_is_one_clear_error(tmp_path, name: str, said: str) -> None:
    (tmp_path / "bad.py").write_text("undefined\n")
    with pytest.raises(BadInput, match=said):
        load_metric(name.format(file=tmp_path / "bad.py"))
