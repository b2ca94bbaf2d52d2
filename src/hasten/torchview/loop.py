"""The loop inside ``train``: what it works on, what changes from step to step, and one step of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from hasten.errors import BuildFailed, InvalidSetting, Unsupported
from hasten.isolation import Progress
from hasten.samples import Samples
from hasten.settings import values_of
from hasten.tensors import Array
from hasten.torchview.augment import Augment
from hasten.torchview.batches import Rows, Split, as_array, epoch_order, generator_of, in_turn, inputs_of
from hasten.torchview.checkpoint import Checkpoints, question_of
from hasten.torchview.checks import is_quantized, step_sizes_of
from hasten.torchview.history import Epoch
from hasten.torchview.losses import Objective, Regressors, settle
from hasten.torchview.machine import laid_out
from hasten.torchview.optimizer import average_into, make_optimizer, rate, set_rate
from hasten.torchview.view import View

if TYPE_CHECKING:
    from hasten.torchview.training import Training

HALVES = (torch.float16, torch.bfloat16)
"""Dtypes of weights that are not trained."""

SETTLED_SHARE = 0.8
"""In the last fifth of a quantization-aware training batch-norm keeps its statistics and dropout rests: what the
integers round to then changes by the weights alone (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2)."""

SEEN_LABELS = 1024
"""Labels that are looked at to tell classes from values, and how far values vary."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often a training says where it is, and keeps it on disk, besides the end of each epoch."""

    progress_s: float = 0.5
    checkpoint_s: float = 30.0
    clock: Callable[[], float] = time.monotonic


@dataclass
class Teller:
    """Tells of the progress, not too often: what it is told to say in between goes unsaid."""

    progress: Progress
    pace: Pace
    last: float = -math.inf

    def tell(self, text: Callable[[], str], share: float, *, anyway: bool = False) -> None:
        """Say ``text`` and the share that is done, if it is time or ``anyway``."""
        now = self.pace.clock()
        if anyway or now - self.last >= self.pace.progress_s:
            self.last = now
            self.progress(text(), share)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What stays the same from the first step to the last."""

    view: View
    teacher: View | None
    samples: Samples
    split: Split
    training: Training
    objective: Objective
    regressors: Regressors | None
    augment: Augment | None
    quantized: bool
    per_epoch: int
    steps: int

    @property
    def settled_from(self) -> float:
        """The step from which on the view is trained in evaluation mode."""
        return self.steps * SETTLED_SHARE if self.quantized else math.inf


@dataclass(kw_only=True)
class State:
    """What changes: all that a checkpoint holds. What is random has its seed from the step, so it has no state."""

    optimizer: Any
    averaged: dict[str, Tensor] | None
    best: dict[str, Tensor]
    step: int = 0
    summed: float = 0.0
    """Of the losses in this epoch."""
    epochs: list[Epoch] = field(default_factory=list)
    start: Epoch | None = None
    best_epoch: int = 0
    best_held: float = math.inf
    on_disk: int | None = None
    """The step of the newest checkpoint."""

    @classmethod
    def begin(cls, task: Task) -> State:
        """Give the state before the first step."""
        training = task.training
        named = [(name, value) for name, value in task.view.named_parameters() if value.requires_grad]
        if not named:
            raise Unsupported("train", "the model has no float weights to train")
        if low := next((value.dtype for _, value in named if value.dtype in HALVES), None):
            raise Unsupported("train", f"small steps vanish in weights of {low}; train the float32 model, then cast it")
        if task.regressors is not None:
            named += task.regressors.named_parameters()
        optimizer = make_optimizer(
            training.optimizer,
            named,
            lr=training.lr,
            weight_decay=training.weight_decay,
            step_sizes=step_sizes_of(task.view) if task.quantized else (),
        )
        averaged = _copied(task.view) if training.average else None
        return cls(optimizer=optimizer, averaged=averaged, best=_copied(task.view))

    def begin_from(self, held: float | None, agreement: float | None) -> None:
        """Note what the parameters before the first step are worth on held-out rows."""
        if held is not None:
            self.start = Epoch(number=0, loss=held, held=held, agreement=agreement)
            self.best_held = held

    def keep_if_best(self, task: Task, epoch: Epoch) -> None:
        """Keep the parameters if they are the best on held-out rows; where there are none, the newest are."""
        if epoch.held is not None and epoch.held >= self.best_held:
            return
        self.best_held = math.inf if epoch.held is None else epoch.held
        self.best_epoch = epoch.number
        self.best = _cloned(self.averaged) if self.averaged is not None else _copied(task.view)

    def saved(self, task: Task) -> dict[str, Any]:
        """Give it as tensors and plain values."""
        return {
            "view": task.view.state_dict(),
            "regressors": None if task.regressors is None else task.regressors.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged,
            "best": self.best,
            "plain": msgspec.json.encode(
                (self.step, self.summed, self.epochs, self.start, self.best_epoch, self.best_held)
            ).decode(),
        }

    def restore(self, saved: dict[str, Any], task: Task) -> None:
        """Take on what ``saved`` gave."""
        task.view.load_state_dict(saved["view"])
        if task.regressors is not None:
            task.regressors.load_state_dict(saved["regressors"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.averaged is not None:
            for name, value in saved["averaged"].items():
                self.averaged[name].copy_(value)
        self.best = saved["best"]
        plain = msgspec.json.decode(
            saved["plain"], type=tuple[int, float, list[Epoch], Epoch | None, int, float | None]
        )
        self.step, self.summed, self.epochs, self.start, self.best_epoch, held = plain
        self.best_held = math.inf if held is None else held  # JSON has no infinity
        self.on_disk = self.step


def prepare(view: View, samples: Samples, training: Training, teacher: View | None, augment: Augment | None) -> Task:
    """Settle everything on the first batch, and refuse what cannot be trained. Raises as ``train`` does."""
    split = Split.of(len(samples), training.seed)
    _check_settings(samples, training, split, taught=teacher is not None, augmented=augment is not None)
    first = epoch_order(split.train, training.batch, seed=training.seed, epoch=0)
    rows, labels = first[0], samples.labels
    with torch.no_grad():
        inputs = inputs_of(samples, rows, view.inputs, training.device)
        own, inner = _seen(view, inputs, list(training.match))
        other, theirs = (None, {}) if teacher is None else _seen(teacher, inputs, list(training.match.values()))
    objective = settle(
        _named(view, own),
        None if labels is None else labels[rows],
        None if teacher is None or other is None else _named(teacher, other),
        many=None if labels is None else labels[:: math.ceil(len(labels) / SEEN_LABELS)],
        loss=training.loss,
        alpha=training.alpha,
        temperature=training.temperature,
    )
    if labels is not None and labels.ndim == 1:  # a wrong one is found before the first step
        objective.targets(labels, (len(labels), *own[objective.main].shape[1:]))
    return Task(
        view=view,
        teacher=teacher,
        samples=samples,
        split=split,
        training=training,
        objective=objective,
        regressors=Regressors(training.match, inner, theirs).to(training.device) if training.match else None,
        augment=augment,
        quantized=is_quantized(view),
        per_epoch=len(first),
        steps=max(1, round(training.epochs * len(first))),
    )


def _check_settings(samples: Samples, training: Training, split: Split, *, taught: bool, augmented: bool) -> None:
    if training.patience is not None and not len(split.held):
        raise InvalidSetting(f"patience = {training.patience} needs rows to hold out, of {len(samples)} there are none")
    if augmented and samples.labels is not None and samples.labels.ndim > 2:
        raise Unsupported(
            "train", f"labels {list(samples.labels.shape)} lie on the image, and would not move along with augment"
        )
    if training.match and not taught:
        raise Unsupported("train", "match needs a teacher whose inner tensors are matched")


def _named(view: View, outputs: Sequence[Tensor]) -> dict[str, Array]:
    return {name: as_array(value) for name, value in zip(view.outputs, outputs, strict=True)}


def _seen(view: View, inputs: Mapping[str, Tensor], taps: Sequence[str]) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """Run a view on inputs by name; gives outputs and the inner tensors asked for."""
    values = [inputs[name] for name in view.inputs]
    return view.with_taps(values, taps) if taps else (view(*values), {})


def run(task: Task, state: State, kept: Checkpoints | None, teller: Teller) -> None:
    """Make the steps that are left."""
    clock, first = teller.pace.clock, state.step
    saved = began = clock()
    order: list[Rows] = []
    while state.step < task.steps and stopped(task, state) is None:
        epoch, index = divmod(state.step, task.per_epoch)
        if not order or index == 0:
            order = epoch_order(task.split.train, task.training.batch, seed=task.training.seed, epoch=epoch)
        _step(task, state, order[index])
        ends = state.step % task.per_epoch == 0 or state.step == task.steps
        if ends:
            _end_epoch(task, state, epoch + 1, index + 1, teller)
        if kept is not None and (ends or clock() - saved >= teller.pace.checkpoint_s):
            kept.save(state.step, state.saved(task))
            state.on_disk, saved = state.step, clock()
        text = partial(_told, task, state, state.step - first, clock() - began)
        teller.tell(text, state.step / task.steps, anyway=ends)


def question(modules: Sequence[View], task: Task) -> str:
    """Give the key of the training: threads are no part of it, they change the last bits alone."""
    hook = getattr(task.augment, "__qualname__", type(task.augment).__qualname__)
    graphs = [hashlib.sha256(view.model().SerializeToString(deterministic=True)).hexdigest() for view in modules]
    more = {"threads": None, "augment": hook, "graphs": graphs}  # a graph is more than its parameters
    return question_of(modules, task.samples, {**values_of(task.training), **more})


def _step(task: Task, state: State, rows: Rows) -> None:
    """Make one step of the optimizer on the samples at ``rows``."""
    training = task.training
    task.view.train(state.step < task.settled_from)
    torch.manual_seed(generator_of(training.seed, 2 * state.step).initial_seed())
    inputs = inputs_of(task.samples, rows, task.view.inputs, training.device)
    if task.augment is not None:
        inputs = task.augment(inputs, generator_of(training.seed, 2 * state.step + 1))
    loss, _ = _loss(task, laid_out(inputs), rows, judged=False)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _not_finite(task, state, rows, f"the loss is {value}")
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    learned = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(learned, math.inf if training.clip is None else training.clip)
    if not math.isfinite(float(norm)):
        raise _not_finite(task, state, rows, f"the gradient's norm is {float(norm)}")
    set_rate(state.optimizer, training.lr * rate(state.step, task.steps, warm_up=training.warm_up))
    state.optimizer.step()
    if state.averaged is not None:
        average_into(state.averaged, task.view.state_dict(), training.average)
    state.step += 1
    state.summed += value


def _loss(task: Task, inputs: Mapping[str, Tensor], rows: Rows, *, judged: bool) -> tuple[Tensor, float | None]:
    """Give the loss of a batch and, where it is ``judged``, the share of classes that the teacher gives too."""
    training, objective = task.training, task.objective
    taught: Sequence[Tensor] | None = None
    theirs: dict[str, Tensor] = {}
    with torch.autocast(training.device.partition(":")[0], torch.bfloat16, training.precision == "bfloat16"):
        if task.teacher is not None:
            with torch.no_grad():
                taught, theirs = _seen(task.teacher, inputs, list(training.match.values()))
        outputs, inner = _seen(task.view, inputs, list(training.match))
    labels = None
    if task.samples.labels is not None:
        targets = objective.targets(task.samples.labels[rows], outputs[objective.main].shape)
        labels = torch.from_numpy(targets).to(training.device)
    loss = objective.loss(outputs, labels, taught)
    if task.regressors is not None:
        loss = loss + training.match_weight * task.regressors(inner, theirs)
    return loss, objective.agreement(outputs, taught) if judged and taught is not None else None


def _end_epoch(task: Task, state: State, number: int, steps: int, teller: Teller) -> None:
    held, agreement = evaluate(task, state, teller)
    epoch = Epoch(number=number, loss=state.summed / steps, held=held, agreement=agreement)
    state.epochs.append(epoch)
    state.keep_if_best(task, epoch)
    state.summed = 0.0


def evaluate(task: Task, state: State, teller: Teller) -> tuple[float | None, float | None]:
    """Give loss and agreement on the held-out rows, in evaluation mode, of the parameters that would be kept."""
    held = task.split.held
    if not len(held):
        return None, None
    now = _copied(task.view) if state.averaged is not None else {}
    if state.averaged is not None:
        task.view.load_state_dict(state.averaged)
    task.view.eval()
    found: list[tuple[int, float, float | None]] = []
    with torch.no_grad():
        for rows in in_turn(held, task.training.batch):
            inputs = inputs_of(task.samples, rows, task.view.inputs, task.training.device)
            loss, agreement = _loss(task, laid_out(inputs), rows, judged=True)
            if not math.isfinite(float(loss)):
                raise _not_finite(task, state, rows, f"the loss on held-out rows is {float(loss)}")
            found.append((len(rows), float(loss), agreement))
            teller.tell(lambda: "looking at held-out rows", state.step / task.steps)
    if now:
        task.view.load_state_dict(now)
    agreed = [n * share for n, _, share in found if share is not None]
    return sum(n * loss for n, loss, _ in found) / len(held), sum(agreed) / len(held) if agreed else None


def stopped(task: Task, state: State) -> str | None:
    """Say why the training ends before its time, or None."""
    patience = task.training.patience
    if patience is None or len(state.epochs) - state.best_epoch < patience or state.step == task.steps:
        return None
    return f"no gain on held-out rows for {patience} epochs, the best was epoch {state.best_epoch}"


def _not_finite(task: Task, state: State, rows: Rows, what: str) -> BuildFailed:
    """Make the error that names the step, and the sample that is to blame, if one is."""
    place = f"{what} in epoch {state.step // task.per_epoch + 1}, step {state.step + 1} of {task.steps}"
    for name in task.view.inputs:
        values = np.asarray(task.samples.inputs[name][rows])
        if values.dtype.kind == "f" and not (finite := np.isfinite(values).reshape(len(rows), -1).all(axis=1)).all():
            row = int(rows[~finite][0])
            return BuildFailed("train", f"{place}: input {name!r} of sample {row} is not finite; take that sample out")
    clip = "" if task.training.clip is not None else ", or set clip"
    kept = "" if state.on_disk is None else f"; the checkpoint of step {state.on_disk} stays"
    return BuildFailed("train", f"{place}; try a lower lr than {task.training.lr:g}{clip}{kept}")


def _told(task: Task, state: State, made: int, seconds: float) -> str:
    """Say where the training is. ``made`` steps took ``seconds``."""
    speed = made / max(seconds, 1e-9)
    left = round((task.steps - state.step) / speed)
    epoch, index = divmod(state.step - 1, task.per_epoch)
    ended = state.epochs and (state.step % task.per_epoch == 0 or state.step == task.steps)
    loss = state.epochs[-1].loss if ended else state.summed / (index + 1)
    return (
        f"epoch {epoch + 1}/{math.ceil(task.training.epochs)}: loss {loss:.4g}, "
        f"{speed * min(task.training.batch, len(task.split.train)):.0f} samples/s, {left // 60}:{left % 60:02d} left"
    )


def _copied(view: View) -> dict[str, Tensor]:
    return _cloned(view.state_dict())


def _cloned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
