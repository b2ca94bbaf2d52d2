"""What training minimises: labels, a teacher's outputs, a teacher's inner tensors.

Everything about classes follows ``hasten.metrics``: which axis holds them, what a single number a sample means, which
labels do not count. So training drives what certification judges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten.errors import BadInput, SignatureMismatch, Unsupported
from hasten.metrics import IGNORED_LABEL, class_axis, classified, default_metric, marked_classes, sums_to_one
from hasten.tensors import Array

Kind = Literal["cross-entropy", "mse"]

IGNORED = -100
"""The target of a position that does not count, as ``torch.nn.functional.cross_entropy`` has it."""

LEAST_PROBABILITY = 1e-12
"""What a probability of zero counts as: its logarithm must stay finite."""

LARGEST_LOGIT = 1e30
"""What a logit counts as that is infinite in both, as of a class that is masked out: their difference is none."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, settled once on the first rows (``settle``), so that it stays the same thing.

    ``alpha`` is the teacher's share of the loss, the rest is the labels'. Squared errors are divided by the variance
    of what is aimed at, so that a loss of 1 is that of a constant guess, whatever the units.
    """

    kind: Kind
    main: int
    """The output that has the classes, or that labels speak of: the first of floats."""
    floats: tuple[int, ...]
    """The outputs that a gradient can come through."""
    axis: int
    single: bool
    """The main output is one number a sample: a binary classifier's, where ``kind`` is cross-entropy."""
    probabilities: tuple[bool, bool]
    """Whether the main output holds probabilities, not logits: the student's, the teacher's."""
    variances: tuple[float, ...]
    """Of the teacher's outputs in ``floats``."""
    label_variance: float
    alpha: float
    temperature: float

    def loss(self, outputs: Sequence[Tensor], labels: Tensor | None, taught: Sequence[Tensor] | None) -> Tensor:
        """Give the loss of a batch, a float32 scalar.

        Args:
            outputs: The student's, all of them.
            labels: From ``targets``; None: ``alpha`` is 1.
            taught: The teacher's outputs on the same batch; None: ``alpha`` is 0.
        """
        total = torch.zeros((), device=outputs[self.main].device)
        if taught is not None:
            total = total + self.alpha * self._from_teacher(outputs, taught)
        if labels is not None:
            total = total + (1 - self.alpha) * self._from_labels(outputs[self.main], labels)
        return total

    def _from_teacher(self, outputs: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=outputs[self.main].device)
        for index, variance in zip(self.floats, self.variances, strict=True):
            if index == self.main and self.kind == "cross-entropy":
                pair = _bounded(self.logits(outputs[index], 0), self.logits(taught[index], 1), LARGEST_LOGIT)
                total = total + distillation(*pair, temperature=self.temperature)
            else:
                own, other = _bounded(outputs[index].float(), taught[index].float(), 0.0)
                total = total + functional.mse_loss(own, other) / variance
        return total

    def _from_labels(self, output: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "mse":
            return functional.mse_loss(output.float(), labels) / self.label_variance
        counted = (labels != IGNORED).sum().clamp_min(1)  # a batch of ignored positions alone has the loss 0, not NaN
        return functional.cross_entropy(self.logits(output, 0), labels, ignore_index=IGNORED, reduction="sum") / counted

    def logits(self, output: Tensor, of: Literal[0, 1]) -> Tensor:
        """Give logits [n, classes, ...] of the main output of the student (0) or the teacher (1)."""
        return class_logits(output, self.axis, single=self.single, probabilities=self.probabilities[of])

    def targets(self, labels: Array, shape: Sequence[int]) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
        """Give labels as the loss wants them: classes [n, ...] with ``IGNORED``, or values of the output's ``shape``.

        Args:
            labels: Of some rows, in any form that ``hasten.metrics`` reads.
            shape: The main output's, for these rows.

        Raises:
            BadInput: a label is no class; names it.
        """
        if self.kind == "mse":
            return labels.astype(np.float32).reshape(shape)
        values = labels
        marked = None if self.single else marked_classes(labels, shape)
        if marked is not None:
            values = marked
        elif labels.ndim > 1 and labels.ndim >= len(shape) and labels.shape[self.axis] == 1:
            values = labels.squeeze(self.axis)
        found = values.astype(np.int64)
        if self.single:
            return _checked(np.where(found == -1, 0, found), classes=2)
        return _checked(found, classes=shape[self.axis])

    def agreement(self, outputs: Sequence[Tensor], taught: Sequence[Tensor]) -> float | None:
        """Give the share of positions to which student and teacher give one class; None where there are no classes."""
        if self.kind != "cross-entropy":
            return None
        own, other = self.logits(outputs[self.main], 0).argmax(1), self.logits(taught[self.main], 1).argmax(1)
        return float((own == other).float().mean())


def class_logits(output: Tensor, axis: int, *, single: bool = False, probabilities: bool = False) -> Tensor:
    """Give logits [n, classes, ...] in float32, from an output whose classes are on ``axis``.

    The logarithm of probabilities are logits. A single number a sample becomes two classes, 0 and itself.
    """
    values = output.float()
    if single:
        values = values.squeeze(axis) if values.ndim > axis else values
        if probabilities:
            values = _log(values) - _log(1 - values)
        return torch.stack((torch.zeros_like(values), values), dim=1)
    return (_log(values) if probabilities else values).movedim(axis, 1)


def _bounded(own: Tensor, other: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Bound what is infinite in both alike. An infinity of one alone stays: that training has diverged."""
    alike = own.isinf() & (own == other)
    bounds = torch.where(own > 0, bound, -bound)
    return torch.where(alike, bounds, own), torch.where(alike, bounds, other)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(LEAST_PROBABILITY).log()


def distillation(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Give T² KL(softmax(teacher / T) | softmax(student / T)), the mean over samples and positions.

    Hinton et al. 2015, arXiv:1503.02531. T² keeps the gradient's size independent of T.

    Args:
        student: Logits [n, classes, ...].
        teacher: Logits of the same shape.
        temperature: T, above 0.
    """
    own = functional.log_softmax(student / temperature, dim=1)
    other = functional.log_softmax(teacher / temperature, dim=1)
    return functional.kl_div(own, other, reduction="none", log_target=True).sum(1).mean() * temperature**2


class Regressors(nn.Module):  # type: ignore[misc]
    """Feature matching: squared error of inner tensors, the student's through a learned linear map to the teacher's.

    FitNets, Romero et al. 2015, arXiv:1412.6550. Where both have one shape the map is the identity and has no
    parameters. Where they differ in one axis alone, the map goes along it and begins as a least squares fit would be
    scaled: entries of variance 1 / width. Each error is divided by the variance of the teacher's tensor on the first
    batch.
    """

    def __init__(self, match: Mapping[str, str], own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        """Settle shapes on a first batch.

        Args:
            match: The student's tensor to the teacher's.
            own: The student's tensors of a batch.
            other: The teacher's tensors of the same batch.

        Raises:
            SignatureMismatch: two tensors differ in more than one axis.
        """
        super().__init__()
        self.match = dict(match)
        self.axes: dict[str, int] = {}
        self.maps = nn.ParameterList()
        self.variances = [max(float(other[name].float().var()), _tiny()) for name in match.values()]
        for mine, theirs in match.items():
            a, b = own[mine].shape, other[theirs].shape
            differing = [axis for axis, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
            if len(a) != len(b) or len(differing) > 1 or differing == [0]:
                raise SignatureMismatch(
                    f"the student's {mine!r} is {list(a)} and the teacher's {theirs!r} {list(b)}; to be matched they "
                    "may differ in one axis"
                )
            if differing:
                axis = differing[0]
                self.axes[mine] = axis
                self.maps.append(nn.Parameter(torch.randn(b[axis], a[axis]) / a[axis] ** 0.5))

    def forward(self, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
        """Give the mean over the matched tensors of the squared error."""
        weights = iter(self.maps)
        total = torch.zeros((), device=next(iter(other.values())).device)
        for (mine, theirs), variance in zip(self.match.items(), self.variances, strict=True):
            value = own[mine].float()
            if mine in self.axes:
                axis = self.axes[mine]
                value = functional.linear(value.movedim(axis, -1), next(weights)).movedim(-1, axis)
            total = total + functional.mse_loss(value, other[theirs].float()) / variance
        return total / len(self.match)


def settle(
    outputs: Mapping[str, Array],
    labels: Array | None,
    taught: Mapping[str, Array] | None,
    *,
    many: Array | None = None,
    loss: Literal["auto", "cross-entropy", "mse"],
    alpha: float,
    temperature: float,
) -> Objective:
    """Settle what is minimised, from what the first rows show.

    Args:
        outputs: The student's on some rows, by name.
        labels: Of these rows, or None.
        taught: The teacher's outputs on these rows, or None.
        many: Labels of more rows, which tell better than a few whether they are classes; None: ``labels``.
        loss: "auto": as ``hasten.metrics`` would judge, cross-entropy for accuracy and agreement, else mse.
        alpha: The teacher's share where there are labels too.
        temperature: Of the distillation.

    Raises:
        Unsupported: there is neither, or no output that a gradient can come through.
        SignatureMismatch: the teacher's outputs have other shapes.
        BadInput: the labels do not fit.
    """
    if labels is None and taught is None:
        raise Unsupported("train", "there are neither labels nor a teacher, so there is nothing to learn from")
    names = list(outputs)
    floats = tuple(i for i, name in enumerate(names) if outputs[name].dtype.kind == "f")
    if not floats:
        raise Unsupported("train", f"output {names[0]!r} is {outputs[names[0]].dtype}: no gradient comes through it")
    if taught is not None:
        check_teacher(outputs, taught)
    main = floats[0]
    own = outputs[names[main]]
    many = labels if many is None else many
    kind = loss if loss != "auto" else _kind(own, many)
    axis = class_axis(own, labels)
    single = own.ndim <= axis or own.shape[axis] == 1
    if labels is not None:
        check_labels(own, labels, kind)
    other = None if taught is None else list(taught.values())[main]
    return Objective(
        kind=kind,
        main=main,
        floats=floats,
        axis=axis,
        single=single,
        probabilities=_probabilities(own, other, axis, single=single),
        variances=() if taught is None else tuple(_variance(list(taught.values())[i]) for i in floats),
        label_variance=_variance(many) if many is not None and kind == "mse" else 1.0,
        alpha=alpha if labels is not None and taught is not None else float(taught is not None),
        temperature=temperature,
    )


def check_teacher(outputs: Mapping[str, Array], taught: Mapping[str, Array]) -> None:
    """Check that a teacher's outputs have the shapes of the student's.

    Raises:
        SignatureMismatch: names the output and both shapes.
    """
    if len(outputs) != len(taught):
        raise SignatureMismatch(
            f"the teacher has {len(taught)} outputs, the model {len(outputs)}; give one with the same"
        )
    for name, mine, theirs in zip(outputs, outputs.values(), taught.values(), strict=True):
        if mine.shape[1:] != theirs.shape[1:]:
            raise SignatureMismatch(
                f"output {name!r} of the teacher is [n, {', '.join(map(str, theirs.shape[1:]))}], the model's is "
                f"[n, {', '.join(map(str, mine.shape[1:]))}]; give a teacher with the same classes"
            )


def check_labels(output: Array, labels: Array, kind: Kind) -> None:
    """Check that some rows' labels fit the main output of these rows.

    Raises:
        BadInput: they do not; says which shapes.
    """
    if kind == "mse":
        if labels.size != output.size:
            raise BadInput(f"labels have shape {list(labels.shape)}, which does not fit outputs {list(output.shape)}")
        return
    classified(output, labels)


def _checked(labels: npt.NDArray[np.int64], *, classes: int) -> npt.NDArray[np.int64]:
    """Mark the positions of dense labels that do not count, and refuse what is no class."""
    dropped = (labels < 0) | ((labels == IGNORED_LABEL) & (classes <= IGNORED_LABEL))
    found = np.where(dropped, IGNORED, labels) if labels.ndim > 1 else labels
    wrong = found[((found < 0) & (found != IGNORED)) | (found >= classes) | ((labels.ndim == 1) & (found < 0))]
    if wrong.size:
        raise BadInput(f"label {wrong[0]} is no class: the output has classes 0 to {classes - 1}")
    return found


def _kind(output: Array, labels: Array | None) -> Kind:
    return "cross-entropy" if default_metric(labels, {"main": output}) in ("accuracy", "agreement") else "mse"


def _probabilities(own: Array, other: Array | None, axis: int, *, single: bool) -> tuple[bool, bool]:
    """Tell whether outputs are probabilities. Of a single number a trained teacher tells more than a student."""
    if single:
        judged = own if other is None else other
        within = bool(judged.size) and float(judged.min()) >= 0 and float(judged.max()) <= 1
        return within, within
    return sums_to_one(own, axis), other is not None and sums_to_one(other, axis)


def _variance(values: Array) -> float:
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    found = float(finite.var()) if finite.size else 0.0
    return found if found > _tiny() else 1.0


def _tiny() -> float:
    return float(np.finfo(np.float32).tiny)
