"""Train a model's weights further, on labels and on the original's outputs; those of a quantized graph as integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from hasten.artifact import Artifact
from hasten.errors import BuildFailed, SignatureMismatch, Unsupported
from hasten.graph.model import read_model
from hasten.samples import Samples
from hasten.settings import Choice, Doc
from hasten.store import write_atomically
from hasten.tensors import Signature, TensorSpec
from hasten.torchview.checks import check_rows_independent
from hasten.torchview.recipe import HALF_PRECISION
from hasten.torchview.training import History, Training, train
from hasten.torchview.view import View
from hasten.transform import HISTORY, Context


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Train the weights further. The teacher is the original model; a quantized graph is trained as the integers are.

    It repairs what pruning or quantization lost. Where the labels are missing, the teacher alone is learned from;
    where the source is the original itself, the labels alone are. The structure stays: what is quantized stays so.
    """

    name: ClassVar[str] = "finetune"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = True

    epochs: Annotated[
        float, Doc("times that every sample is seen; 0.5: half of them once"), Meta(gt=0), Choice((1.0, 3.0, 10.0))
    ] = 3.0

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        return why_not_trained(source)

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Train, and write the graph with its new weights, ``training.json`` beside it.

        Raises:
            Unsupported: there are no samples to train on, nothing to learn from, or nothing was gained.
            SignatureMismatch: the teacher has other outputs. BuildFailed: the training went wrong.
        """
        samples = samples_of(self.name, source, ctx)
        teacher = ctx.teacher if ctx.teacher is not None and ctx.teacher.content != source.content else None
        if teacher is None and samples.labels is None:
            raise Unsupported(self.name, "there are no labels, and the only teacher is the model itself")
        if teacher is not None:
            check_alike(source.signature, teacher.signature, called="teacher")
        view = View.of(read_model(source))
        learned(self, view, samples, ctx, teacher=None if teacher is None else View.of(read_model(teacher)))
        return view.save(ctx.folder, source, add={"finetuned"})


def why_not_trained(source: Artifact) -> str | None:
    """Say in a sentence why a model cannot be trained, or None. Reads nothing."""
    if source.format != "onnx":
        return f"it trains ONNX graphs, not {source.format!r}"
    if low := sorted(source.traits & HALF_PRECISION):
        return f"small steps vanish in {low[0]} weights; train before the cast"
    return None


def samples_of(who: str, source: Artifact, ctx: Context) -> Samples:
    """Give the train split.

    Raises:
        Unsupported: there is none. SignatureMismatch: it does not fit the model.
    """
    if ctx.training is None:
        raise Unsupported(who, "it needs samples to train on; give some with --train")
    ctx.training.check(source.signature)
    return ctx.training


def check_alike(model: Signature, other: Signature, *, called: str) -> None:
    """Check that two models have the same inputs and outputs; the names of open dimensions are free.

    Args:
        model: What is trained from or taken the place of.
        other: The second one.
        called: What messages call the second one.

    Raises:
        SignatureMismatch: names the first tensor that differs, in both.
    """
    for kind in ("inputs", "outputs"):
        own, theirs = getattr(model, kind), getattr(other, kind)
        if len(own) != len(theirs):
            raise SignatureMismatch(
                f"the {called} has {len(theirs)} {kind}, the model {len(own)}; they must be the same"
            )
        for mine, its in zip(own, theirs, strict=True):
            if (mine.name, mine.dtype, _lengths(mine)) != (its.name, its.dtype, _lengths(its)):
                raise SignatureMismatch(
                    f"among the {kind} the {called} has {its}, the model {mine}; they must be alike"
                )


def _lengths(spec: TensorSpec) -> tuple[int | None, ...]:
    return tuple(dim if isinstance(dim, int) else None for dim in spec.shape)


def learned(training: Training, view: View, samples: Samples, ctx: Context, *, teacher: View | None) -> History:
    """Train a view within a pass: check it first, then that it gained, and leave ``training.json`` in ``ctx.folder``.

    Args:
        training: The pass itself, whose fields say how; its seed is added to the run's.
        view: Trained in place.
        samples: The train split.
        ctx: The pass's.
        teacher: Or None.

    Raises:
        Unsupported: a sample's output depends on those beside it, or no epoch was better than the start.
        BuildFailed: no weight changed.
    """
    who = str(getattr(training, "name", "train"))
    for module in (view, teacher):
        if module is not None:
            check_rows_independent(module, samples, ctx.seed)
    before = {name: value.detach().clone() for name, value in view.named_parameters()}
    history = train(
        view,
        samples,
        replace(training, seed=training.seed + ctx.seed),
        teacher=teacher,
        checkpoints=ctx.checkpoints,
        progress=ctx.progress,
    )
    if history.best == 0 and history.start is not None:
        best = min((epoch.held for epoch in history.epochs if epoch.held is not None), default=float("nan"))
        raise Unsupported(
            who,
            f"nothing was gained: on held-out rows the loss was {history.start.loss:.4g} before and {best:.4g} at best "
            f"after; try a lower lr than {training.lr:g}, or more samples",
        )
    if all(bool((value == before[name]).all()) for name, value in view.named_parameters()):
        raise BuildFailed(
            who, f"no weight changed in {len(history.epochs)} epochs; try a higher lr than {training.lr:g}"
        )
    write_atomically(ctx.folder / HISTORY, msgspec.json.format(msgspec.json.encode(history)))
    return history
