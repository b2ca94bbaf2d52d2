"""Channels cut out of a network, the least important first; the layers become smaller, on any engine."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
import onnx
from msgspec import Meta

from hasten.artifact import Artifact
from hasten.errors import MissingDependency, Unsupported, Untrusted
from hasten.graph.cut import cut
from hasten.graph.groups import Group, channel_groups, refusals
from hasten.graph.importance import largest, unit_norms
from hasten.graph.model import ENTRY, read_model, write_model
from hasten.isolation import Progress
from hasten.passes.recalibrate import recalibrated
from hasten.passes.widths import (
    Scores,
    Stairs,
    check_widths,
    macs,
    open_lengths,
    products_of,
    scheduled,
    widths_for,
)
from hasten.settings import Choice, Doc
from hasten.store import write_atomically, writing
from hasten.torchview.history import Epoch, History
from hasten.torchview.recipe import HALF_PRECISION, Recipe
from hasten.transform import HISTORY, Context

SCORED = 0.2
"""About the share of a round that is over once its units are weighed."""


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Recipe):
    """Cut the least important channels, attention heads and hidden units, and train what is left, in rounds.

    What must be cut together is (``hasten.graph.groups``); inputs and outputs keep their shapes. Without gradients and
    epochs it needs no samples and no torch.
    """

    name: ClassVar[str] = "prune-channels"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = True

    widths: Annotated[Mapping[str, int], Doc("units to keep by group, taken as they are; none: by ratio")] = field(
        default_factory=dict
    )
    ratio: Annotated[
        float,
        Doc("share of multiply-accumulates to keep, where widths are not given"),
        Choice((0.75, 0.5, 0.35)),
        Meta(gt=0, le=1),
    ] = 0.5
    importance: Annotated[
        Literal["l1", "l2", "taylor"],
        Doc("what makes a unit important: the norm of its weights, or the loss that goes with it (needs samples)"),
        Choice(("l2", "taylor")),
    ] = "l2"
    steps: Annotated[int, Doc("rounds, in which widths fall in equal ratios"), Meta(ge=1)] = 1
    grid: Annotated[int, Doc("channels are kept in multiples of this, as vector units like it"), Meta(ge=1)] = 8
    recalibrate: Annotated[
        bool, Doc("take the statistics of batch-norm anew where samples are there and nothing is trained")
    ] = True
    epochs: Annotated[float, Doc("times that every sample is seen after each round; 0: no training"), Meta(ge=0)] = 0.0

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why nothing in ``source`` can be cut, or None. Reads the graph, no external weights."""
        if source.format != "onnx":
            return f"it cuts ONNX graphs, not {source.format!r}"
        if "int8" in source.traits:
            return "the model is quantized: prune first, then quantize"
        if self.epochs and (low := sorted(source.traits & HALF_PRECISION)):
            return f"small steps vanish in {low[0]} weights; prune and train before the cast"
        if "pruned" in source.traits and not self.widths:
            return (
                "the model is pruned already: a ratio means that of the whole one; ask for less there, or give widths"
            )
        model = onnx.load(source.entry, load_external_data=False)
        if channel_groups(model):
            return None
        reasons = refusals(model)
        return next(iter(reasons.values()), "it has no layer whose channels only other layers of it read")

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Cut and train in rounds. Gives ``source`` where the widths are those that it has.

        Raises:
            UnknownName: ``widths`` names a group that is not there.
            InvalidSetting: a width does not fit its group.
            Unsupported: ``ratio`` is out of reach, or samples are needed and there are none.
            MissingDependency: gradients are needed, and torch is not installed.
        """
        self._check_needs(source, ctx)
        rounds = _Rounds.of(self, source, ctx)
        model, done = read_model(source), []
        for number in range(1, self.steps + 1):
            ctx.progress(f"round {number} of {self.steps}", (number - 1) / self.steps)
            model, result = rounds.run(number, model)
            done += [result] if result else []
        if not done:
            return source
        if self.epochs:
            write_atomically(ctx.folder / HISTORY, msgspec.json.format(msgspec.json.encode(joined(done))))
        return write_model(model, ctx.folder, source, add={"pruned"})

    def scores(self, model: onnx.ModelProto, groups: Sequence[Group], ctx: Context) -> dict[str, Scores]:
        """Give the importance of each unit by group.

        Raises:
            Untrusted: one is not finite.
        """
        if self.importance == "taylor":
            # The one place besides training where torch is needed: not at the top, for norms do without it.
            from hasten.passes.importance import taylor_scores

            assert ctx.training is not None  # noqa: S101 - ``_check_needs`` has seen to it
            return taylor_scores(model, groups, ctx.training, seed=ctx.seed, device=self.device, progress=ctx.progress)
        order: Literal[1, 2] = 1 if self.importance == "l1" else 2
        found = {group.name: unit_norms(model, group, order) for group in groups}
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise Untrusted(f"the weights of group {name!r} are not finite; repair the model before pruning it")
        return found

    def _check_needs(self, source: Artifact, ctx: Context) -> None:
        if ctx.training is not None:
            ctx.training.check(source.signature)
        if self.importance != "taylor" and not self.epochs:
            return
        if ctx.training is None:
            raise Unsupported(self.name, "it needs samples to train on; give some with --train")
        if importlib.util.find_spec("torch") is None:
            needs = f"pass {self.name!r} with epochs or importance 'taylor' needs torch, which"
            raise MissingDependency(needs, "pip install 'hasten[train]'")


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a round did."""

    widths: dict[str, int]
    """Units that are left, of the groups that were cut."""
    history: History | None
    """Of its training, or None."""


@dataclass(frozen=True, kw_only=True)
class RoundTold:
    """A round in ``training.json``."""

    widths: dict[str, int]
    """Units that were left, of the groups that it cut."""
    epochs: int
    start: Epoch | None
    """Behind the cut, before the first step."""


@dataclass(frozen=True, kw_only=True)
class RoundsHistory(History):
    """How the training of all rounds went: epochs are numbered through."""

    rounds: tuple[RoundTold, ...]


@dataclass(frozen=True, kw_only=True)
class _Rounds:
    """The rounds of one pass over one source, and what they have in common."""

    step: PruneChannels
    source: Artifact
    ctx: Context
    dims: dict[str, int]
    sizes: dict[str, int]
    stairs: dict[str, Stairs]
    macs: float

    @classmethod
    def of(cls, step: PruneChannels, source: Artifact, ctx: Context) -> _Rounds:
        """Look at the source, and whether the end is within reach."""
        model = read_model(source)
        groups = channel_groups(model)
        check_widths(step.widths, groups)
        known = source.signature.dims(ctx.training.feed(slice(0, 1))) if ctx.training else {}
        dims = {**open_lengths(source.signature), **known}
        stairs = {group.name: Stairs.of(group, step.grid) for group in groups}
        sizes = {group.name: group.size for group in groups}
        total = macs(model, dims)
        if not step.widths:
            level = {name: np.ones(size) for name, size in sizes.items()}
            widths_for(products_of(model, groups, dims), stairs, level, target=step.ratio * total)
        return cls(step=step, source=source, ctx=ctx, dims=dims, sizes=sizes, stairs=stairs, macs=total)

    def run(self, number: int, model: onnx.ModelProto) -> tuple[onnx.ModelProto, Pruned | None]:
        """Do one round, or what an interruption left of it. Gives None where there was nothing to cut."""
        kept = self.ctx.checkpoints / f"round-{number}" if self.ctx.checkpoints and self.step.epochs else None
        if kept and (kept / "done").exists():
            return _read(kept / "done")
        begun = _read(kept / "cut") if kept and (kept / "cut").exists() else self._cut(number, model)
        if begun is None:
            return model, None
        smaller, result = begun
        if kept:
            _keep(smaller, result, kept / "cut")
        if self.step.epochs:
            smaller, history = self._trained(number, smaller, kept)
            result = Pruned(widths=result.widths, history=history)
        elif self.step.recalibrate and self.ctx.training:
            ctx = replace(self.ctx, progress=self._progress(number, SCORED, 1.0))
            smaller = recalibrated(smaller, self.ctx.training, ctx)
        if kept:
            _keep(smaller, result, kept / "done")
        return smaller, result

    def _cut(self, number: int, model: onnx.ModelProto) -> tuple[onnx.ModelProto, Pruned] | None:
        groups = [group for group in channel_groups(model) if not self.step.widths or group.name in self.step.widths]
        scores = self.step.scores(model, groups, replace(self.ctx, progress=self._progress(number, 0.0, SCORED)))
        widths = self._widths(number, model, groups, scores)
        narrower = {group.name: widths[group.name] for group in groups if widths[group.name] < group.size}
        if not narrower:
            return None
        keep = {name: largest(scores[name], width) for name, width in narrower.items()}
        return cut(model, keep), Pruned(widths=narrower, history=None)

    def _widths(
        self, number: int, model: onnx.ModelProto, groups: Sequence[Group], scores: Mapping[str, Scores]
    ) -> dict[str, int]:
        share = number / self.step.steps
        if not self.step.widths:
            target = self.macs * self.step.ratio**share
            products = products_of(model, groups, self.dims)
            return widths_for(products, self.stairs, scores, target=target)
        found = {}
        for group in groups:
            end = self.step.widths[group.name]
            on_the_way = self.stairs[group.name].nearest(scheduled(self.sizes[group.name], end, share=share))
            found[group.name] = end if share == 1 else min(group.size, max(end, on_the_way))
        return found

    def _trained(self, number: int, model: onnx.ModelProto, kept: Path | None) -> tuple[onnx.ModelProto, History]:
        # Not at the top: only training needs torch, and the pass belongs to the base install.
        from hasten.torchview.checks import check_rows_independent
        from hasten.torchview.training import Training, train
        from hasten.torchview.view import View

        settings: dict[str, Any] = {item.name: getattr(self.step, item.name) for item in fields(Recipe)}
        samples = self.ctx.training
        assert samples is not None  # noqa: S101 - ``_check_needs`` has seen to it
        view = View.of(model)
        check_rows_independent(view, samples, self.ctx.seed)
        history = train(
            view,
            samples,
            Training(**settings, epochs=self.step.epochs, seed=self.ctx.seed),
            teacher=View.of(read_model(self.ctx.teacher or self.source)),
            checkpoints=kept and kept / "training",
            progress=self._progress(number, SCORED, 1.0),
        )
        return view.model(), history

    def _progress(self, number: int, begin: float, end: float) -> Progress:
        """Give the progress of a part of a round, ``begin`` to ``end``, as that of all."""

        def told(text: str, share: float | None) -> None:
            whole = None if share is None else (number - 1 + begin + share * (end - begin)) / self.step.steps
            self.ctx.progress(f"round {number} of {self.step.steps}: {text}", whole)

        return told


def joined(rounds: Sequence[Pruned]) -> RoundsHistory:
    """Give one history of all rounds, each of which trained."""
    epochs: list[Epoch] = []
    told, best = [], 0
    for result in rounds:
        assert result.history is not None, result  # noqa: S101 - rounds that train have one
        own = result.history
        told.append(RoundTold(widths=result.widths, epochs=len(own.epochs), start=own.start))
        best = len(epochs) + own.best
        epochs += [replace(epoch, number=len(epochs) + i) for i, epoch in enumerate(own.epochs, start=1)]
    last = rounds[-1].history
    return RoundsHistory(
        epochs=tuple(epochs),
        stopped=last.stopped if last else None,
        start=told[0].start,
        best=best,
        rounds=tuple(told),
    )


def _keep(model: onnx.ModelProto, result: Pruned, folder: Path) -> None:
    """Write a round's state, so that it is there whole or not at all; one that is there stays."""
    if folder.exists():
        return
    fresh = folder.with_name(f".{folder.name}")
    with writing(folder):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write_model(model, fresh)
        (fresh / HISTORY).write_bytes(msgspec.json.encode(result))
        fresh.replace(folder)


def _read(folder: Path) -> tuple[onnx.ModelProto, Pruned]:
    result = msgspec.json.decode((folder / HISTORY).read_bytes(), type=Pruned)
    return onnx.load(folder / ENTRY), result
