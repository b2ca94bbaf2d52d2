"""What each single change costs in quality: the options of a model, and a table of their sensitivities.

Each row is one option of one site with everything else untouched, measured on the graph really cut, its batch-norms
with statistics of what they now receive: how far its outputs are from the original's on samples, and what it loses by
the metric where there is something to hold it against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx

from hasten.artifact import Artifact, Json
from hasten.errors import BadInput, HastenError, StoreError, Untrusted
from hasten.graph.cut import cut
from hasten.graph.groups import Group, channel_groups
from hasten.graph.importance import Order, largest, unit_norms
from hasten.graph.model import read_model
from hasten.isolation import Child, Limits, Progress
from hasten.metrics import Metric, class_axis, first, load_metric
from hasten.passes.activations import Reference, batch_size, fixed_batch
from hasten.passes.recalibrate import recalibrated
from hasten.passes.widths import Scores, Stairs
from hasten.samples import Samples
from hasten.search.exclusions import NodeSensitivity
from hasten.search.knapsack import Choice
from hasten.store import Store
from hasten.tensors import Array, Feed, Pair
from hasten.transform import Context

SHARES = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Widths to try, as shares of a group's units."""

GRID = 8
"""Channels that vector instructions take at once, at least."""

SAMPLES = 256
"""Samples that an option is run on, at most: enough to order options."""

BATCH = 32

FLOAT, INT8 = 32, 8
"""The options of a precision site, in bits."""

SiteKind = Literal["width", "bits"]
Loss = Literal["kl", "error", "drop"]


@dataclass(frozen=True)
class Site:
    """A place where there is a choice: a channel group, or a node's precision. Option 0 leaves it untouched."""

    name: str
    """The group's, or the node's."""
    kind: SiteKind
    options: tuple[int, ...]
    """Units kept, falling; or bits."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a choice does to a model."""

    widths: Mapping[str, int]
    """Units kept by group, for those that are cut."""
    int8: tuple[str, ...]
    """Nodes that compute in int8."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one option of one site loses, everything else untouched."""

    site: str
    kind: SiteKind
    option: int
    error: float
    """Squared error of the outputs over their squared magnitude, the mean over outputs."""
    kl: float | None
    """KL divergence of the class probabilities in nats, the mean over samples; None where outputs are no classes."""
    drop: float | None
    """Loss by the metric, positive is worse; None where there is nothing to hold it against."""


@dataclass(frozen=True, kw_only=True)
class Sensitivities:
    """The table. What is not in it was not measured in time, or failed."""

    rows: tuple[Row, ...]
    failures: Mapping[str, str]
    """Why an option has no row, by "site=option"."""

    def row(self, site: Site, option: int) -> Row | None:
        """Give an option's row, or None."""
        return next((r for r in self.rows if (r.site, r.kind, r.option) == (site.name, site.kind, option)), None)


def width_sites(groups: Sequence[Group], *, shares: Sequence[float] = SHARES, grid: int = GRID) -> tuple[Site, ...]:
    """Give the widths to try of each channel group: all its units, then the shares, on the grid.

    A group that is too small to be cut on the grid has no site.
    """
    found = []
    for group in groups:
        stairs = Stairs.of(group, grid)
        widths = sorted({stairs.nearest(share * group.size) for share in shares} - {group.size}, reverse=True)
        if widths:
            found.append(Site(group.name, "width", (group.size, *widths)))
    return tuple(found)


def precision_sites(nodes: Sequence[str]) -> tuple[Site, ...]:
    """Give a choice between float and int8 for each node."""
    return tuple(Site(name, "bits", (FLOAT, INT8)) for name in nodes)


def change_of(sites: Sequence[Site], choice: Choice) -> Change:
    """Say what a choice does."""
    taken = [(site, site.options[at]) for site, at in zip(sites, choice, strict=True)]
    return Change(
        widths={s.name: option for s, option in taken if s.kind == "width" and option != s.options[0]},
        int8=tuple(s.name for s, option in taken if s.kind == "bits" and option == INT8),
    )


def keep_of(
    model: onnx.ModelProto,
    widths: Mapping[str, int],
    *,
    scores: Mapping[str, Scores] | None = None,
    order: Order = 2,
) -> dict[str, tuple[int, ...]]:
    """Give the units that each group of ``widths`` keeps: the most important ones.

    Args:
        model: The uncut graph.
        widths: Units kept by group.
        scores: Importance of each unit by group; where a group has none, the norm of its weights.
        order: Of that norm; as ``prune-channels`` has it by default.
    """
    groups = {group.name: group for group in channel_groups(model)}
    known = scores or {}
    return {
        name: largest(known[name] if name in known else unit_norms(model, groups[name], order), width)
        for name, width in widths.items()
    }


def sensitivities(
    source: Artifact,
    sites: Sequence[Site],
    store: Store,
    samples: Path,
    *,
    limits: Limits,
    calibrate: Path | None = None,
    metric: str | None = None,
    scores: Mapping[str, Scores] | None = None,
    order: Order = 2,
    deadline: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    known: Sensitivities | None = None,
    keep: Callable[[Sensitivities], None] = lambda table: None,
) -> Sensitivities:
    """Measure every width of every site alone, in a child process; an option that fails there has no row.

    All sites are done at one option before any at the next, the narrowest first: cut short, the table still knows the
    ends of most sites.

    Args:
        source: The ``onnx`` artifact whose groups the sites are.
        sites: Those of kind "width"; others are passed over (``node_rows`` gives theirs).
        store: Where the child finds the source.
        samples: Folder of samples (``Samples.save``), with labels if the metric needs them.
        limits: Of the child.
        calibrate: Folder of samples that batch-norm takes its statistics on anew after each cut, as ``prune-channels``
            does; None: those of the whole network stay.
        metric: Name in ``hasten.metrics``; None: no drop is measured.
        scores: Importance by group (``keep_of``).
        order: Of the norms of groups without scores.
        deadline: Asked before each option; True ends it with what is known.
        progress: Told which option is at work.
        known: What was measured, or failed, before: it is not measured again.
        keep: Told what is known after each option.

    Raises:
        StoreError: source or samples cannot be read. SignatureMismatch: the samples do not fit the source.
        HastenError: the untouched model does not run.
    """
    known = known or Sensitivities(rows=(), failures={})
    rows, failures = list(known.rows), dict(known.failures)
    listed = _narrowest_first([site for site in sites if site.kind == "width"])
    child: Child | None = None
    try:
        for number, (site, option) in enumerate(listed):
            if known.row(site, option) is not None or f"{site.name}={option}" in known.failures:
                continue
            if deadline():
                break
            if progress:
                progress(f"sensitivity of {site.name} at {option} of {site.options[0]}", number / len(listed))
            if child is None:
                child = _start(source, store, samples, calibrate, metric, limits)
            given = {"scores": scores[site.name]} if scores and site.name in scores else {}
            try:
                found = child.call("probe", arrays=given, group=site.name, width=option, order=order).value
            except StoreError:
                raise
            except HastenError as error:
                failures[f"{site.name}={option}"] = f"{type(error).__name__}: {error}"
                child.close()
                child = None  # it may be gone, and a new one is cheap
            else:
                rows.append(msgspec.convert(found, Row))
            keep(Sensitivities(rows=tuple(rows), failures=dict(failures)))
    finally:
        if child is not None:
            child.close()
    return Sensitivities(rows=tuple(rows), failures=failures)


def node_rows(found: Sequence[NodeSensitivity]) -> tuple[Row, ...]:
    """Give the rows of precision sites: what ``exclusions.sensitivity`` measured of int8 nodes."""
    return tuple(
        Row(site=item.node, kind="bits", option=INT8, error=item.error, kl=item.kl, drop=None) for item in found
    )


def measured_sites(sites: Sequence[Site], table: Sensitivities) -> tuple[Site, ...]:
    """Give the sites with the options that the table has a row for; one with only the untouched left is dropped."""
    found = []
    for site in sites:
        known = tuple(option for option in site.options[1:] if table.row(site, option) is not None)
        if known:
            found.append(Site(site.name, site.kind, (site.options[0], *known)))
    return tuple(found)


def losses(sites: Sequence[Site], table: Sensitivities, *, by: Loss) -> tuple[tuple[float, ...], ...]:
    """Give the losses of each site's options for a knapsack: never negative, never falling as more is taken away.

    A narrower width that measures better than a wider one does so by chance: it counts as much as the wider one.

    Raises:
        BadInput: an option has no such loss, or one that is not finite.
    """
    found = []
    for site in sites:
        line = [0.0]
        for option in site.options[1:]:
            row = table.row(site, option)
            value: float | None = getattr(row, by) if row is not None else None
            if value is None or not np.isfinite(value):
                raise BadInput(f"{site.name}={option} has {value} for its {by}; leave it out, or choose another loss")
            line.append(max(line[-1], float(value)))
        found.append(tuple(line))
    return tuple(found)


def divergence(reference: Feed, got: Feed) -> tuple[float, float | None]:
    """Give the relative squared error of outputs and the KL divergence of their classes, each the mean over outputs.

    Classes are on ``metrics.class_axis`` of a float output of two dimensions or more. Where every row is a
    distribution already it is taken as it is; else the softmax of it is.

    Returns:
        The error, infinite where a value is not finite in one of them alone; and the divergence in nats, None where no
        output has classes.
    """
    errors, divergences = [], []
    for name, array in reference.items():
        if array.dtype.kind != "f":
            continue
        pair = Pair.of(array, got[name])
        a, b = pair.reference, pair.got
        has_classes = a.ndim >= 2 and a.shape[class_axis(a)] >= 2
        if not pair.finite:
            return float("inf"), float("inf") if has_classes else None
        difference, whole = pair.squares()
        errors.append(difference / max(whole, 1e-30))
        if has_classes:
            a, b = (np.moveaxis(each, class_axis(each), -1) for each in (a, b))
            shares = _is_distribution(a)
            p, q = _log_probabilities(a, shares), _log_probabilities(b, shares)
            divergences.append(float((np.exp(p) * (p - q)).sum(axis=-1).mean()))
    return (
        float(np.mean(errors)) if errors else 0.0,
        max(float(np.mean(divergences)), 0.0) if divergences else None,
    )


class Prober:
    """What runs in the child: the source, its outputs on the samples, and one cut copy after another.

    Raises:
        StoreError: source or samples cannot be read. SignatureMismatch: the samples do not fit the source.
        HastenError: the source does not run.
    """

    def __init__(self, *, source: str, store: str, samples: str, calibrate: str | None, metric: str | None) -> None:
        self._store = Store(Path(store))
        self._model = read_model(self._store.get(source))
        self._groups = {group.name: group for group in channel_groups(self._model)}
        loaded = Samples.load(Path(samples))
        loaded.check(self._store.get(source).signature)
        self._samples = loaded.take(range(min(SAMPLES, len(loaded))))
        self._calibrate = Samples.load(Path(calibrate)) if calibrate else None
        self._metric = load_metric(metric) if metric else None
        self._reference = self._outputs(self._model)

    def probe(self, group: str, width: int, order: Order, arrays: Mapping[str, Array] | None = None) -> Json:
        """Cut one group alone to its most important units, run it, and describe what came of it (a ``Row``)."""
        given = (arrays or {}).get("scores")
        scores = unit_norms(self._model, self._groups[group], order) if given is None else given.astype(np.float64)
        got = self._outputs(self._settled(cut(self._model, {group: largest(scores, width)})))
        error, kl = divergence(self._reference, got)
        if not np.isfinite(error) or (kl is not None and not np.isfinite(kl)):
            raise Untrusted(f"{group!r} cut to {width} gives values that are not finite")
        row = Row(site=group, kind="width", option=width, error=error, kl=kl, drop=self._drop(got))
        return msgspec.to_builtins(row)

    def _settled(self, model: onnx.ModelProto) -> onnx.ModelProto:
        if self._calibrate is None:
            return model
        with self._store.scratch() as folder:
            ctx = Context(folder=folder, samples=None, seed=0, progress=lambda text, share: None)
            return recalibrated(model, self._calibrate.take(range(min(SAMPLES, len(self._calibrate)))), ctx)

    def _outputs(self, model: onnx.ModelProto) -> dict[str, Array]:
        size = batch_size(model) or min(BATCH, len(self._samples))
        names = [value.name for value in model.graph.output]
        parts: list[dict[str, Array]] = []
        with self._store.scratch() as folder:
            ctx = Context(folder=folder, samples=None, seed=0, progress=lambda text, share: None)
            with Reference.open(model, names, ctx) as reference:
                for start in range(0, len(self._samples), size):
                    made = reference.run(fixed_batch(self._samples, start, size))
                    rows = min(size, len(self._samples) - start)
                    parts.append({name: value[:rows] for name, value in made.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _drop(self, got: Feed) -> float | None:
        metric = self._metric
        if metric is None or not all(np.isfinite(value).all() for value in got.values() if value.dtype.kind == "f"):
            return None
        target = first(self._reference) if metric.needs == "reference" else self._samples.labels
        return None if target is None else metric_drop(metric, self._reference, got, target)


def metric_drop(metric: Metric, reference: Feed, got: Feed, target: Array) -> float:
    """Give what was lost by a metric, positive is worse: absolute for metrics within 1, else a share."""
    before, after = metric.value(reference, target), metric.value(got, target)
    lost = before - after if metric.higher_is_better else after - before
    within = metric.bounded if metric.bounded is not None else 0.0 <= before <= 1.0
    return float(lost if within else lost / max(abs(before), 1e-12))


def _start(
    source: Artifact, store: Store, samples: Path, calibrate: Path | None, metric: str | None, limits: Limits
) -> Child:
    return Child.start(
        "hasten.search.table:Prober",
        limits=limits,
        source=source.digest,
        store=str(store.root),
        samples=str(samples),
        calibrate=None if calibrate is None else str(calibrate),
        metric=metric,
    )


def _narrowest_first(sites: Sequence[Site]) -> list[tuple[Site, int]]:
    """Order options by how far they are from the narrowest of their site."""
    steps = max((len(site.options) for site in sites), default=0)
    return [(site, site.options[-step]) for step in range(1, steps) for site in sites if step < len(site.options)]


def _is_distribution(rows: npt.NDArray[np.float64]) -> bool:
    return bool(rows.min() >= 0 and np.allclose(rows.sum(axis=-1), 1.0, atol=1e-3))


def _log_probabilities(rows: npt.NDArray[np.float64], whole: bool) -> npt.NDArray[np.float64]:
    logs = np.log(np.maximum(rows, 1e-12)) if whole else rows
    shifted = logs - logs.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
