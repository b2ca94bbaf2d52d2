"""The loop that trains a view: on labels, on a teacher, or both; interrupted, it goes on to the same bits.

For what it does not do, write your own loop: a view is a ``torch.nn.Module``. ::

    view = View.of(read_model(artifact))
    optimizer = torch.optim.AdamW(view.parameters(), lr=1e-4)
    view.train()
    for images, labels in batches:
        (logits,) = view(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    view.eval()
    trained = view.save(folder, artifact, add={"finetuned"})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from msgspec import Meta

from hasten.isolation import Progress
from hasten.samples import Samples
from hasten.settings import Doc
from hasten.torchview.augment import Augment, mirror_shift
from hasten.torchview.checkpoint import Checkpoints
from hasten.torchview.history import Epoch, History
from hasten.torchview.loop import Pace, State, Teller, evaluate, prepare, question, run, stopped
from hasten.torchview.machine import computing
from hasten.torchview.recipe import Recipe
from hasten.torchview.view import View

__all__ = ["Epoch", "History", "Pace", "Training", "train"]

USUAL = Pace()

AUGMENTS: Mapping[str, Augment | None] = {"none": None, "mirror-shift": mirror_shift}


@dataclass(frozen=True, kw_only=True)
class Training(Recipe):
    """How a view is trained."""

    epochs: Annotated[float, Doc("times that every sample is seen; 0.5: half of them once"), Meta(gt=0)] = 10.0
    match: Annotated[
        Mapping[str, str], Doc("inner tensors to bring near the teacher's (FitNets): own name to the teacher's")
    ] = field(default_factory=dict)
    match_weight: Annotated[float, Doc("of the matched tensors in the loss"), Meta(ge=0)] = 1.0
    seed: Annotated[int, Doc("of order, augmentation and dropout"), Meta(ge=0)] = 0


def train(
    view: View,
    samples: Samples,
    training: Training,
    *,
    teacher: View | None = None,
    checkpoints: Path | None = None,
    progress: Progress = lambda text, share: None,
    augment: Augment | None = None,
    pace: Pace = USUAL,
) -> History:
    """Train a view's parameters; at the end it has those that were best on held-out rows.

    One row in twenty, at most 2000, is held out by seed. What is minimised is ``hasten.torchview.losses``: the labels'
    loss, the teacher's, or both by ``training.alpha``. The parameters before the first step count as a candidate.
    The same samples, settings and threads give the same bits, also where checkpoints were gone on from.

    Args:
        view: The model; trained in place, back on the CPU in evaluation mode when this returns or raises.
        samples: The train split; may be mapped from disk, batches are copied one by one.
        training: How.
        teacher: A view with outputs of the same shapes, on the same inputs; it stays as it is.
        checkpoints: A folder to go on from, and to leave checkpoints in: after each epoch and every 30 seconds.
        progress: Told of loss, speed and time left, twice a second.
        augment: A change of batches of the user's own, instead of ``training.augment``.
        pace: How often for progress and checkpoints.

    Raises:
        Unsupported: there is nothing to learn from, nothing to train, or the labels cannot follow an augmentation.
        SignatureMismatch: the teacher's outputs have other shapes.
        BadInput: the labels do not fit. InvalidSetting: a setting does not fit this machine or these samples.
        BuildFailed: the loss or a gradient is not finite; names epoch and step. The last checkpoint stays.
        StoreError: a checkpoint cannot be written.
    """
    modules = (view,) if teacher is None else (view, teacher)
    with computing(training.device, training.threads, modules):
        torch.manual_seed(training.seed)
        task = prepare(view, samples, training, teacher, augment or AUGMENTS[training.augment])
        state = State.begin(task)
        kept = None if checkpoints is None else Checkpoints(checkpoints, question(modules, task))
        found = None if kept is None else kept.load()
        teller = Teller(progress, pace)
        if found is None:
            state.begin_from(*evaluate(task, state, teller))
        else:
            state.restore(found[1], task)
        run(task, state, kept, teller)
        view.load_state_dict(state.best)
    return History(epochs=tuple(state.epochs), stopped=stopped(task, state), start=state.start, best=state.best_epoch)
