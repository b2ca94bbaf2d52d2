"""What a search's trainings and tables leave for the report."""

from __future__ import annotations

from itertools import pairwise

import msgspec

from hasten.artifact import Artifact
from hasten.errors import StoreError
from hasten.search.bench import TRAINED, Bench
from hasten.search.compress import CELLS, PREDICTIONS
from hasten.search.compression import Cell, Compression, Curve, CurvePoint, Prediction
from hasten.search.result import Trial
from hasten.torchview.history import History
from hasten.transform import HISTORY


def compression_of(bench: Bench) -> Compression | None:
    """Gather the sensitivity table, the predicted front and the training curves; None where there is none of them."""
    cells = bench.journal.recall(CELLS, tuple[Cell, ...]) or ()
    predictions = bench.journal.recall(PREDICTIONS, tuple[Prediction, ...]) or ()
    curves = tuple(curve for trial in bench.trials.values() for curve in _curves(bench, trial))
    if not (cells or predictions or curves):
        return None
    return Compression(cells=cells, predictions=predictions, curves=curves)


def _curves(bench: Bench, trial: Trial) -> list[Curve]:
    """Read the history that each training pass of a trial left beside its model."""
    if trial.artifact is None or not TRAINED & set(trial.traits):
        return []
    try:
        lineage = bench.task.store.get(trial.artifact).lineage
    except StoreError:
        return []  # swept from the store: its trial is known all the same
    counts: dict[str, int] = {}
    found = []
    for step, after in pairwise(lineage):
        made = bench.task.store.get(after.source or "") if after.source else None
        if made is None or HISTORY not in made.files:
            continue
        if made.lineage[-1].name != step.name:
            continue
        counts[step.name] = counts.get(step.name, 0) + 1
        found.append(_curve(trial, f"{step.name} {counts[step.name]}", made))
    return found


def _curve(trial: Trial, step: str, made: Artifact) -> Curve:
    try:
        history = msgspec.json.decode((made.folder / HISTORY).read_bytes(), type=History)
    except (OSError, msgspec.DecodeError) as error:
        raise StoreError(f"{made.folder / HISTORY} is no training history: {error}") from error
    points = tuple(CurvePoint(number=e.number, loss=e.loss, held=e.held) for e in history.epochs)
    return Curve(plan=trial.key, step=step, epochs=points, stopped=history.stopped)
