"""Importance of units by gradients: how much the loss would change without each.

P. Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019 (arXiv 1906.10771): the squared
first-order change (sum of gradient x weight)² of the loss when the weights of a unit become zero. The weights that are
summed are those that *read* the unit: with these at zero the unit is cut off from all that uses it, exactly, whatever
stands between. Behind convolution, batch-norm and ReLU this equals the paper's gate behind the batch-norm, because
both are the sum of activation x gradient over the unit's positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import Unsupported, Untrusted
from hasten.graph.groups import Group, Slot
from hasten.isolation import Progress
from hasten.passes.activations import batch_size
from hasten.samples import Samples
from hasten.torchview.batches import Rows, as_array, generator_of, in_turn, inputs_of
from hasten.torchview.losses import Objective, settle
from hasten.torchview.view import View

Scores = npt.NDArray[np.float64]

ROWS = 512
"""Samples that are looked at, at most."""

FIRST = 32
"""Samples that settle what the loss is: what outputs hold, and how they vary."""

LARGEST_CHUNK = 16
"""Samples a gradient. The changes of samples add up before they are squared, as in the paper: few at a time, so that
opposite ones do not cancel."""

SQUARES = 32
"""Gradients at least, where there are so many samples: what is drawn makes each of them noisy."""


def taylor_scores(
    model: onnx.ModelProto, groups: Sequence[Group], samples: Samples, *, seed: int, device: str, progress: Progress
) -> dict[str, Scores]:
    """Give the importance of each unit by group [size], on one scale over all groups.

    With labels the loss is theirs. Without, it is the model's own: classes are drawn from its outputs, other outputs
    are held against themselves with unit noise. The expected square is then the unit's diagonal of the Fisher
    information, the second-order change of the outputs' distribution (L. Theis et al., "Faster gaze prediction with
    dense networks and Fisher pruning", arXiv 1801.05787; that the classes must be the model's own: F. Kunstner et al.,
    "Limitations of the empirical Fisher approximation", arXiv 1905.12558).

    Args:
        model: The graph that the groups are of; a float model.
        groups: Of ``channel_groups(model)``.
        samples: Up to ``ROWS`` of them are looked at, drawn by seed.
        seed: Of the rows and of what is drawn.
        device: Where PyTorch computes.
        progress: Told of each chunk.

    Raises:
        Unsupported: the view lacks an operator, or no gradient comes through the outputs.
        Untrusted: a gradient is not finite.
    """
    view = View.of(model).to(device).eval()
    rows = np.sort(np.random.default_rng([seed, 4]).permutation(len(samples))[:ROWS])
    fixed = batch_size(model)
    size = fixed or max(1, min(LARGEST_CHUNK, len(rows) // SQUARES))
    criterion = _Criterion.of(view, samples, rows[: fixed or FIRST], device)
    slots = {group.name: _slots(group, view) for group in groups}
    tensors = {slot.tensor: view.tensor(slot.tensor) for found in slots.values() for slot in found}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    scores = {group.name: np.zeros(group.size) for group in groups}
    chunks = [chunk for chunk in in_turn(rows, size) if not fixed or len(chunk) == fixed]
    if not chunks:
        raise Unsupported(
            "prune-channels", f"the model takes batches of {fixed}, and there are only {len(rows)} samples to weigh by"
        )
    for step, chunk in enumerate(chunks):
        loss = criterion.loss(view, samples, chunk, generator_of(seed, step))
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        changes = {
            name: _detached(weight * gradient)
            for (name, weight), gradient in zip(tensors.items(), gradients, strict=True)
            if gradient is not None
        }
        for group in groups:
            change = sum(_by_unit(changes[s.tensor], s, group.size) for s in slots[group.name] if s.tensor in changes)
            scores[group.name] += np.square(change)
        progress("weighing units by their gradients", (step + 1) / len(chunks))
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise Untrusted(f"the importance of group {name!r} is not finite: a gradient overflows on a sample")
    return scores


@dataclass(frozen=True, kw_only=True)
class _Criterion:
    """What the gradients are of."""

    objective: Objective
    labelled: bool
    device: str

    @classmethod
    def of(cls, view: View, samples: Samples, rows: Rows, device: str) -> _Criterion:
        with torch.no_grad():
            made = view(*inputs_of(samples, rows, view.inputs, device).values())
        outputs = {name: as_array(value) for name, value in zip(view.outputs, made, strict=True)}
        labels = None if samples.labels is None else samples.labels[rows]
        taught = outputs if labels is None else None
        objective = settle(outputs, labels, taught, loss="auto", alpha=1.0, temperature=1.0)
        return cls(objective=objective, labelled=labels is not None, device=device)

    def loss(self, view: View, samples: Samples, rows: Rows, generator: torch.Generator) -> Tensor:
        """Give the loss of these rows, summed over them."""
        outputs = view(*inputs_of(samples, rows, view.inputs, self.device).values())
        if self.labelled:
            assert samples.labels is not None  # noqa: S101 - as ``of`` saw
            shape = tuple(outputs[self.objective.main].shape)
            targets = self.objective.targets(np.asarray(samples.labels[rows]), shape)
            return self.objective.loss(outputs, torch.from_numpy(targets).to(self.device), None) * len(rows)
        return self._own(outputs, generator)

    def _own(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Give minus the log-likelihood of what is drawn from the outputs' own distribution."""
        objective = self.objective
        total = torch.zeros((), device=self.device)
        for index, variance in zip(objective.floats, objective.variances, strict=True):
            output = outputs[index]
            if index == objective.main and objective.kind == "cross-entropy":
                logits = objective.logits(output, 0).movedim(1, -1).flatten(0, -2)  # [n * positions, classes]
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
                total = total + functional.cross_entropy(logits, drawn.to(self.device), reduction="sum")
            else:
                # Signs in place of Gaussian noise: the same expectation, less variance (M. Hutchinson, 1990).
                signs = torch.randint(0, 2, output.shape, generator=generator).to(self.device) * 2.0 - 1.0
                total = total + (signs * output.float()).sum() / variance**0.5
        return total


def _slots(group: Group, view: View) -> list[Slot]:
    """Give the weights whose zeros cut a unit off: those that read it; where nothing does, those that make it."""
    reading = [slot for slot in group.slots if slot.role == "reads"]
    return reading or [slot for slot in group.slots if slot.role == "makes"]


def _detached(tensor: Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return found


def _by_unit(change: npt.NDArray[np.float64], slot: Slot, size: int) -> Scores:
    """Add up along all axes but the slot's, then the entries of each unit: [size]."""
    entries = np.moveaxis(change, slot.axis, 0).reshape(change.shape[slot.axis], -1).sum(axis=1)
    units = np.asarray(slot.units)
    owned = units >= 0
    return np.bincount(units[owned], weights=entries[owned], minlength=size).astype(np.float64)
