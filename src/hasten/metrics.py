"""The field's quality metrics by name: how well outputs fit labels, or another model's outputs.

A built-in metric looks at the model's **first output**; a function of the user's sees them all. Where a metric is
a mean over samples it gives one score a sample, so that two models can be compared pair by pair; where it is not
(F1, AUC, ...) it gives a statistic of weighted samples, which is what a bootstrap over samples needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from hasten.errors import BadInput, UnknownName
from hasten.tensors import Array, Feed

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Score = Callable[[Feed, Array], Floats]
"""(outputs, target [n, ...]) -> a score for each sample [n]."""
Statistic = Callable[[Floats], float]
"""(weight of each sample [n]) -> the metric; NaN where the weighted samples do not define it."""

IGNORED_LABEL = 255
"""In dense labels, this one and every negative one mark positions that do not count (Pascal VOC, Cityscapes)."""

SUM_TOLERANCE = 1e-3
"""How far the sum of a row of probabilities may be from one: float16 has 11 bits."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to say how good outputs are. Either ``score`` or ``statistic`` is there.

    ``needs`` says what they are held against: labels, or the original's first output.
    """

    name: str
    doc: str
    higher_is_better: bool = True
    bounded: bool | None = True
    """Lies within 1 in magnitude, so a drop is absolute; else it is a share of the original's value.
    None: bounded if the original's scores all lie in 0..1 (a user's function does not say)."""
    needs: Literal["labels", "reference"] = "labels"
    classes: bool = False
    """The outputs are read as classes: predictions can flip."""
    score: Score | None = None
    statistic: Callable[[Feed, Array], Statistic] | None = None

    @property
    def per_sample(self) -> bool:
        """It is a mean over samples; if not, intervals come from a bootstrap of the whole."""
        return self.score is not None

    def value(self, outputs: Feed, target: Array) -> float:
        """Give the metric over all samples."""
        if self.statistic is not None:
            return self.statistic(outputs, target)(np.ones(len(target)))
        return float(self.score(outputs, target).mean()) if self.score is not None else float("nan")


def load_metric(name: str) -> Metric:
    """Find a metric by its name, or import a function: ``module:function`` or ``path/to/file.py:function``.

    The function takes ``(outputs: dict of arrays [n, ...], labels [n, ...])`` and gives a score for each sample [n];
    higher is better. It is the user's own code, run because he named it.

    Raises:
        UnknownName: no metric is called so, or the module has no such function.
        BadInput: the module cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    where, colon, function_name = name.rpartition(":")
    if not colon:
        raise UnknownName("metric", name, METRICS)
    module = _import(where)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownName(f"function of {where}", function_name, known)
    return Metric(name=name, doc=f"the function {name}", bounded=None, score=_checked(name, function))


def default_metric(labels: Array | None, outputs: Feed) -> str:
    """Choose a metric: accuracy for class labels, mse for other labels; agreement or relative-error without.

    Labels are classes where they are whole numbers and the first output can name a class: it holds class ids, has a
    class axis, or is a single number and there are at most two labels. A label for each score names a class only as a
    one-hot row. Of the outputs nothing but dtype and shape is looked at, and there may be fewer of them than labels.
    """
    y = first(outputs)
    if labels is None:
        return "agreement" if y.dtype.kind in "iub" or (y.ndim == 2 and y.shape[1] >= 2) else "relative-error"
    y = np.broadcast_to(np.zeros((), y.dtype), (len(labels), *y.shape[1:]))
    two = len(np.unique(labels)) <= 2
    ids = y.dtype.kind in "iub"
    single = _is_single(y, class_axis(y, labels))
    if labels.shape == y.shape and not ids and not single and not _names_classes(labels, y.shape):
        return "mse"
    whole = labels.dtype.kind in "iub" or ((two or labels.shape != y.shape) and _whole(labels))
    return "accuracy" if whole and (ids or not single or two) else "mse"


def first(outputs: Feed) -> Array:
    """Give the first output."""
    return next(iter(outputs.values()))


def class_axis(outputs: Array, labels: Array | None = None) -> int:
    """Say on which axis float outputs have their classes.

    Up to two dimensions it is axis 1. Beyond, the labels decide by their shape, which is the output's without that
    axis (or with a length of 1 there). Where both or neither fit, and without labels, three dimensions are [n, token,
    class], a token classifier's, and four or more are [n, class, height, width], a segmentation's.
    """
    last = outputs.ndim - 1
    if last < 2:
        return 1
    if labels is not None and (_fits(labels, outputs, 1) != _fits(labels, outputs, last)):
        return 1 if _fits(labels, outputs, 1) else last
    return last if last == 2 else 1


def predicted(outputs: Array, *, axis: int | None = None) -> Ints:
    """Read classes from an output, whose classes are on ``axis`` (``class_axis`` if None).

    Integers are class ids already. A single number a sample ([n], or a class axis of length 1) is a binary
    classifier's: a probability if all lie in 0..1 (threshold 0.5), else a logit (threshold 0).
    """
    if outputs.dtype.kind in "iub":
        return _squeezed(outputs).astype(np.int64)
    axis = class_axis(outputs) if axis is None else axis
    if _is_single(outputs, axis):
        values = _squeezed(outputs, axis).astype(np.float64)
        probability = bool(values.size) and values.min() >= -1e-3 and values.max() <= 1 + 1e-3
        return (values > (0.5 if probability else 0.0)).astype(np.int64)
    return np.asarray(outputs.argmax(axis=axis), dtype=np.int64)


def classified(outputs: Array, labels: Array) -> tuple[Ints, Ints, int]:
    """Give predicted and true classes [n, ...] of one shape, and how many classes there are.

    ``labels`` hold class ids, shaped as the output without its class axis (``class_axis``); or one-hot rows, or soft
    ones, of which the largest counts; or -1 and 1 for a binary classifier.

    Raises:
        BadInput: the shapes do not fit, a label is no class, or a row of labels marks several or none.
    """
    ids = outputs.dtype.kind in "iub"
    axis = 1 if ids else class_axis(outputs, labels)
    marked = None if ids else marked_classes(labels, outputs.shape)
    told = _squeezed(labels, axis) if ids or labels.ndim >= outputs.ndim else labels
    if marked is None and told.dtype.kind == "f" and not _whole(told):
        raise BadInput("labels must be whole numbers to be classes; for other labels use the metric mse or mae")
    truth = told.astype(np.int64) if marked is None else marked
    guess = predicted(outputs, axis=axis)
    if guess.shape != truth.shape:
        raise BadInput(f"labels have shape {list(labels.shape)}, which does not fit outputs {list(outputs.shape)}")
    if ids:
        return guess, truth, int(max(guess.max(initial=0), truth.max(initial=0))) + 1
    if _is_single(outputs, axis):
        return guess, np.where(truth == -1, 0, truth), 2
    return guess, truth, outputs.shape[axis]


def marked_classes(labels: Array, shape: Sequence[int]) -> Ints | None:
    """Give the class that each row of labels [n, classes] marks; None where they are not one for each score.

    Args:
        labels: One-hot rows or soft ones: not negative, and each row adds up to 1.
        shape: The outputs', [n, classes].

    Raises:
        BadInput: a row marks several classes, or none: no class of it can be told.
    """
    if not _one_a_score(labels, shape):
        return None
    if not sums_to_one(labels, 1):
        raise BadInput(
            "labels mark several classes of a row, or none; use the metric mse, mae, or a function of your own: "
            "--metric module.py:function"
        )
    return np.asarray(labels.argmax(axis=1), dtype=np.int64)


def _one_a_score(labels: Array, shape: Sequence[int]) -> bool:
    return labels.ndim == 2 and labels.shape[1] > 1 and labels.shape == tuple(shape)


def _names_classes(labels: Array, shape: Sequence[int]) -> bool:
    return _one_a_score(labels, shape) and sums_to_one(labels, 1)


def sums_to_one(values: Array, axis: int) -> bool:
    """Tell whether values along ``axis`` are shares: none is negative, and each row of them adds up to 1."""
    numbers = values.astype(np.float64)
    return bool((numbers >= 0).all() and np.abs(numbers.sum(axis=axis) - 1).max(initial=0.0) < SUM_TOLERANCE)


def _accuracy(outputs: Feed, labels: Array) -> Floats:
    guess, truth, classes = classified(first(outputs), labels)
    _check_classes(truth, classes)
    return _per_sample(guess == truth)


def _top5(outputs: Feed, labels: Array) -> Floats:
    scores = first(outputs)
    if scores.ndim != 2 or scores.shape[1] < 2 or scores.dtype.kind in "iub":
        raise BadInput(f"top5-accuracy needs class scores [n, classes], the first output is {list(scores.shape)}")
    _, truth, classes = classified(scores, labels)
    _check_classes(truth, classes)
    own = np.take_along_axis(scores, truth[:, None], axis=1)  # [n, 1]
    better = np.greater(scores, own).sum(axis=1)
    return np.asarray(better < 5, dtype=np.float64)


def _squared_error(outputs: Feed, labels: Array) -> Floats:
    return _per_sample(_difference(outputs, labels) ** 2)


def _absolute_error(outputs: Feed, labels: Array) -> Floats:
    return _per_sample(np.abs(_difference(outputs, labels)))


def _cosine(outputs: Feed, reference: Array) -> Floats:
    got, wanted = _rows(outputs, reference)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    both_zero = ~got.any(axis=1) & ~wanted.any(axis=1)
    cosines = (got * wanted).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    # Equal rows are exactly alike: rounding must not make a model differ from itself.
    return np.where(both_zero | (got == wanted).all(axis=1), 1.0, np.clip(cosines, -1.0, 1.0))


def _agreement(outputs: Feed, reference: Array) -> Floats:
    return _per_sample(predicted(first(outputs)) == predicted(reference))


def _relative_error(outputs: Feed, reference: Array) -> Floats:
    """Norm of each sample's error over the root mean square norm of the reference's samples.

    One denominator for all: a sample whose reference happens to be near zero would else decide the mean.
    """
    got, wanted = _rows(outputs, reference)
    typical = float(np.sqrt(np.mean(np.sum(wanted**2, axis=1))))
    return np.asarray(np.linalg.norm(got - wanted, axis=1) / max(typical, 1e-12), dtype=np.float64)


def _f1(outputs: Feed, labels: Array) -> Statistic:
    hits, guessed, true = _overlaps(outputs, labels)

    def macro(weights: Floats) -> float:
        both = guessed @ weights + true @ weights
        return _mean_over(2 * (hits @ weights), both)

    return macro


def _mean_iou(outputs: Feed, labels: Array) -> Statistic:
    hits, guessed, true = _overlaps(outputs, labels)

    def mean(weights: Floats) -> float:
        inside = hits @ weights
        return _mean_over(inside, guessed @ weights + true @ weights - inside)

    return mean


def _auc(outputs: Feed, labels: Array) -> Statistic:
    """Area under the ROC curve; several classes: each against the rest, averaged over classes that occur."""
    scores = first(outputs)
    _, truth, classes = classified(scores, labels)
    if truth.ndim != 1 or scores.dtype.kind in "iub":
        raise BadInput(f"auc needs one label and float class scores a sample, the first output is {list(scores.shape)}")
    _check_classes(truth, classes)
    if classes == 2:
        margin = _squeezed(scores) if _is_single(scores) else np.diff(scores.astype(np.float64), axis=1)[:, 0]
        parts = [(_ranking(margin), truth == 1)]
    else:
        parts = [(_ranking(scores[:, k]), truth == k) for k in range(classes)]

    def area(weights: Floats) -> float:
        areas = [_area(groups, count, positive, weights) for (groups, count), positive in parts]
        known = [a for a in areas if not np.isnan(a)]
        return float(np.mean(known)) if known else float("nan")

    return area


def _spearman(outputs: Feed, labels: Array) -> Statistic:
    """Correlation of ranks (ties share theirs) over samples, averaged over the output's columns."""
    got, wanted = _rows(outputs, _fitted(labels, first(outputs)))
    pairs = [(_ranking(got[:, k]), _ranking(wanted[:, k])) for k in range(got.shape[1])]

    def mean(weights: Floats) -> float:
        return float(np.mean([_correlation(_ranks(*a, weights), _ranks(*b, weights), weights) for a, b in pairs]))

    return mean


_LABELLED = (
    Metric(name="accuracy", doc="share of samples whose class is right", classes=True, score=_accuracy),
    Metric(name="top5-accuracy", doc="share whose class is among the five likeliest", classes=True, score=_top5),
    Metric(name="f1", doc="harmonic mean of precision and recall, averaged over classes", classes=True, statistic=_f1),
    Metric(name="auc", doc="area under the ROC curve, averaged over classes", classes=True, statistic=_auc),
    Metric(name="mean-iou", doc="intersection over union, averaged over classes", classes=True, statistic=_mean_iou),
    Metric(name="spearman", doc="correlation of the ranks of outputs and labels", statistic=_spearman),
    Metric(name="mse", doc="mean squared error", higher_is_better=False, bounded=False, score=_squared_error),
    Metric(name="mae", doc="mean absolute error", higher_is_better=False, bounded=False, score=_absolute_error),
)

_REFERENCED = (
    Metric(
        name="agreement",
        doc="share of samples given the original's class",
        classes=True,
        score=_agreement,
        needs="reference",
    ),
    Metric(
        name="cosine",
        doc="cosine between the output and the original's, mean over samples",
        score=_cosine,
        needs="reference",
    ),
    Metric(
        name="relative-error",
        doc="norm of the error over the typical norm of the original's output",
        higher_is_better=False,
        score=_relative_error,
        needs="reference",
    ),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*_LABELLED, *_REFERENCED)}
"""Every metric by its name. Those that need a reference say how alike two models are, not how good one is."""


def _whole(labels: Array) -> bool:
    values = labels.astype(np.float64)
    return bool(np.all(values == np.round(values)))


def _is_single(outputs: Array, axis: int = 1) -> bool:
    return outputs.ndim == 1 or outputs.shape[axis] == 1


def _squeezed(array: Array, axis: int = 1) -> Array:
    return array.squeeze(axis) if array.ndim > axis and array.shape[axis] == 1 else array


def _fits(labels: Array, outputs: Array, axis: int) -> bool:
    """Tell whether labels are shaped as the outputs without ``axis``, or with a length of 1 there."""
    before, after = outputs.shape[:axis], outputs.shape[axis + 1 :]
    return labels.shape in ((*before, *after), (*before, 1, *after))


def _per_sample(values: npt.NDArray[np.bool_] | Floats) -> Floats:
    return np.asarray(values.reshape(len(values), -1).mean(axis=1), dtype=np.float64)


def _fitted(labels: Array, outputs: Array) -> Array:
    """Give labels in the shape of outputs: [n] fits [n, 1] and the reverse, nothing is broadcast."""
    if labels.size != outputs.size or _squeezed(labels).shape != _squeezed(outputs).shape:
        raise BadInput(f"labels have shape {list(labels.shape)}, which does not fit outputs {list(outputs.shape)}")
    return labels.reshape(outputs.shape)


def _difference(outputs: Feed, labels: Array) -> Floats:
    got, wanted = _rows(outputs, _fitted(labels, first(outputs)))
    return got - wanted


def _rows(outputs: Feed, reference: Array) -> tuple[Floats, Floats]:
    """Give both as float64 [n, k]. Infinities that both have at one place (masked scores) count as alike there."""
    got = first(outputs).astype(np.float64).reshape(len(reference), -1)
    wanted = reference.astype(np.float64).reshape(len(reference), -1)
    masked = np.isinf(got) & (got == wanted)
    return (np.where(masked, 0.0, got), np.where(masked, 0.0, wanted)) if masked.any() else (got, wanted)


def _check_classes(truth: Ints, classes: int) -> None:
    if truth.size and not 0 <= truth.min() <= truth.max() < classes:
        wrong = truth[(truth < 0) | (truth >= classes)][0]
        raise BadInput(f"label {wrong} is no class: the first output has classes 0 to {classes - 1}")


def _overlaps(outputs: Feed, labels: Array) -> tuple[sparse.csr_array, sparse.csr_array, sparse.csr_array]:
    """Count positions by class and sample [classes, n]: rightly guessed, guessed, true. Ignored ones do not count."""
    guess, truth, classes = classified(first(outputs), labels)
    counts = np.ones(truth.shape, dtype=bool)
    if truth.ndim > 1:
        counts = (truth >= 0) & ((truth != IGNORED_LABEL) | (classes > IGNORED_LABEL))
    _check_classes(truth[counts], classes)
    rows = np.broadcast_to(np.arange(len(truth)).reshape(-1, *[1] * (truth.ndim - 1)), truth.shape)

    def count(where: npt.NDArray[np.bool_], kind: Ints) -> sparse.csr_array:
        entries = (np.ones(int(where.sum())), (kind[where], rows[where]))
        return sparse.coo_array(entries, shape=(classes, len(truth))).tocsr()

    return count(counts & (guess == truth), truth), count(counts, guess), count(counts, truth)


def _mean_over(part: Floats, whole: Floats) -> float:
    """Average part / whole over the classes that occur."""
    occurs = whole > 0
    return float(np.mean(part[occurs] / whole[occurs])) if occurs.any() else float("nan")


def _ranking(values: Array) -> tuple[Ints, int]:
    """Give each sample's place among the distinct values, smallest first, and how many those are."""
    distinct, places = np.unique(values, return_inverse=True)
    return places.astype(np.int64), len(distinct)


def _ranks(places: Ints, count: int, weights: Floats) -> Floats:
    """Give the mid-rank of each sample, where sample i stands ``weights[i]`` times."""
    mass = np.bincount(places, weights, minlength=count)
    return np.asarray((np.cumsum(mass) - mass / 2)[places], dtype=np.float64)


def _area(places: Ints, count: int, positive: npt.NDArray[np.bool_], weights: Floats) -> float:
    """Give the chance that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    above = np.bincount(places, weights * positive, minlength=count)
    below = np.bincount(places, weights, minlength=count) - above
    pairs = above.sum() * below.sum()
    return float(above @ (np.cumsum(below) - below / 2) / pairs) if pairs > 0 else float("nan")


def _correlation(a: Floats, b: Floats, weights: Floats) -> float:
    a, b = a - np.average(a, weights=weights), b - np.average(b, weights=weights)
    scale = float(np.sqrt((weights @ a**2) * (weights @ b**2)))
    return float(weights @ (a * b)) / scale if scale > 0 else float("nan")


def _import(where: str) -> ModuleType:
    path = Path(where)
    if path.suffix != ".py" and (not where or where.startswith(".")):
        raise BadInput(f"{where!r} names no module; write module:function or path/to/file.py:function")
    try:
        return _module_of_file(path) if path.suffix == ".py" else importlib.import_module(where)
    except Exception as error:  # whatever the user's own file raises
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"the metric's module {where!r} cannot be imported: {type(error).__name__}: {reason}") from error


def _module_of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hasten_metric_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses in the user's file look their module up
    spec.loader.exec_module(module)
    return module


def _checked(name: str, function: Callable[..., object]) -> Score:
    def score(outputs: Feed, labels: Array) -> Floats:
        try:
            scores = np.asarray(function(dict(outputs), labels), dtype=np.float64)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise BadInput(f"the metric {name} failed: {type(error).__name__}: {reason}") from error
        if scores.shape != (len(labels),):
            raise BadInput(f"the metric {name} must give scores [{len(labels)}], it gave {list(scores.shape)}")
        if not np.isfinite(scores).all():
            raise BadInput(f"the metric {name} gave {int((~np.isfinite(scores)).sum())} scores that are not finite")
        return scores

    return score
