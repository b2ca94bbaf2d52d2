"""What a result says of compression, as people read it: sensitivity, predicted times, training runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from hasten.plan import Plan
from hasten.report import format as fmt
from hasten.report.rows import roles_of
from hasten.search.compression import Cell, Compression, Curve, CurvePoint, Prediction
from hasten.search.result import Result

PRUNING = "prune-channels"
NAMED = 3
"""Groups that a sentence names from each end."""


@dataclass(frozen=True)
class Placed:
    """A cell with the piece of its group's row that it fills: shares of the units kept, between 0 and 1."""

    cell: Cell
    left: float
    right: float


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far predicted times are from measured ones: the mean of ``|predicted - measured| / measured``."""

    built: int
    """Plans that were predicted and measured."""
    first: float
    """Before the refit, over all of them."""
    refitted: float | None
    """After it, over those that have such a prediction; None: none has."""
    refitted_n: int


def compression_of(result: Result) -> Compression:
    """Give the result's compression; an empty one where there is none."""
    return result.compression or Compression()


def placed_cells(cells: Sequence[Cell]) -> dict[str, tuple[Placed, ...]]:
    """Lay each group's widths beside each other, narrowest first; groups in the order of their first cell.

    A cell reaches halfway to its neighbours, and the outermost as far outwards, but not out of the row.
    """
    groups: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, {})[cell.units] = cell
    return {name: _place([found[units] for units in sorted(found)]) for name, found in groups.items()}


def kept_units(plan: Plan) -> dict[str, int]:
    """Give the widths that a plan's pruning passes name; where two name one group, the last."""
    widths: dict[str, int] = {}
    for part in plan.passes:
        named = part.settings.get("widths") if part.name == PRUNING else None
        if isinstance(named, dict):
            widths |= {str(group): int(units) for group, units in named.items() if isinstance(units, int)}
    return widths


def half_cells(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Give each group's cell that is nearest to half its units, the costliest first: what groups are compared by.

    A group none of whose widths keeps between a quarter and three quarters of its units is left out.
    """
    nearest = [
        min((placed.cell for placed in row), key=lambda cell: abs(cell.units / cell.size - 0.5))
        for row in placed_cells(cells).values()
    ]
    comparable = [cell for cell in nearest if 0.25 <= cell.units / cell.size <= 0.75]
    return tuple(sorted(comparable, key=lambda cell: -cell.kl))


def prediction_errors(predictions: Sequence[Prediction]) -> Errors | None:
    """Compare predicted with measured times; None: no predicted plan was measured."""
    first = [abs(p.first_ns / p.measured_ns - 1) for p in predictions if p.measured_ns]
    after = [abs(p.refitted_ns / p.measured_ns - 1) for p in predictions if p.measured_ns and p.refitted_ns is not None]
    if not first:
        return None
    return Errors(built=len(first), first=fmean(first), refitted=fmean(after) if after else None, refitted_n=len(after))


def best_held(curve: Curve) -> CurvePoint | None:
    """Give the epoch with the lowest loss on held-out rows; None: none were held out."""
    judged = [(point.held, point) for point in curve.epochs if point.held is not None]
    return min(judged, key=lambda pair: pair[0])[1] if judged else None


def called(result: Result, key: str) -> str:
    """Call a plan as short as the page can: by its roles, else by its number among all trials, else by its key."""
    if roles := roles_of(result, key):
        return ", ".join(roles)
    number = next((i for i, trial in enumerate(result.trials, 1) if trial.key == key), None)
    return key if number is None else f"trial {number}"


def plan_text(result: Result, key: str) -> str:
    """Write a plan out; its key where no trial has it."""
    return next((str(trial.plan) for trial in result.trials if trial.key == key), key)


def sensitivity_sentence(cells: Sequence[Cell]) -> str | None:
    """Name the groups that cost most and least, at about half their units; None: no two can be compared."""
    ranked = half_cells(cells)
    if len(ranked) < 2:
        return None
    most, least = ranked[: min(NAMED, len(ranked) // 2)], ranked[-min(NAMED, len(ranked) // 2) :][::-1]
    return (
        f"Cut to about half, these groups change the outputs most: {'; '.join(map(_cost, most))}. "
        f"These change them least: {'; '.join(map(_cost, least))}. In brackets: KL divergence in nats, units kept."
    )


def errors_sentence(predictions: Sequence[Prediction]) -> str | None:
    """State the mean absolute error before and after the refit; None: nothing was predicted."""
    if not predictions:
        return None
    errors = prediction_errors(predictions)
    predicted = f"{len(predictions)} {'plan was' if len(predictions) == 1 else 'plans were'} predicted"
    if errors is None:
        return f"{predicted}, none of them measured."
    said = f"{predicted}, {errors.built} measured; mean absolute error of the time {fmt.percent(errors.first, 1)}"
    if errors.refitted is None:
        return f"{said}; there was no refit."
    over = "" if errors.refitted_n == errors.built else f" (over {errors.refitted_n})"
    return f"{said} before the refit, {fmt.percent(errors.refitted, 1)} after it{over}."


def curve_sentence(curve: Curve) -> str:
    """Say what one training pass did."""
    if not curve.epochs:
        return f"{curve.step}: no epoch was finished{_ending(curve)}."
    first, last, best = curve.epochs[0], curve.epochs[-1], best_held(curve)
    held = f", held out {number(best.held)} at best (epoch {best.number})" if best else ""
    many = f"{len(curve.epochs)} {'epoch' if len(curve.epochs) == 1 else 'epochs'}"
    return f"{curve.step}: loss {number(first.loss)} to {number(last.loss)} in {many}{held}{_ending(curve)}."


def compression_lines(result: Result) -> list[str]:
    """Give the lines that stand in the terminal for the page's pictures."""
    found = compression_of(result)
    lines = [sensitivity_sentence(found.cells), errors_sentence(found.predictions)]
    training = [curve_sentence(curve) for curve in found.curves if curve.plan == result.chosen]
    return [*(line for line in lines if line), *(f"Training of the chosen plan, {line}" for line in training)]


def number(value: float | None) -> str:
    """Write a loss or a divergence: three digits, with an exponent where it is tiny."""
    if value is None:
        return fmt.NONE
    return fmt.digits(value) if value == 0 or abs(value) >= 1e-3 else f"{value:.2g}"


def _place(row: Sequence[Cell]) -> tuple[Placed, ...]:
    shares = [cell.units / cell.size for cell in row]
    middles = [(a + b) / 2 for a, b in pairwise(shares)]
    if not middles:
        return (Placed(row[0], 0.0, 1.0),)
    edges = [max(0.0, 2 * shares[0] - middles[0]), *middles, min(1.0, 2 * shares[-1] - middles[-1])]
    return tuple(Placed(cell, left, right) for cell, (left, right) in zip(row, pairwise(edges), strict=True))


def _cost(cell: Cell) -> str:
    return f"{cell.group} ({number(cell.kl)}, {cell.units} of {cell.size})"


def _ending(curve: Curve) -> str:
    return f"; ended early: {curve.stopped}" if curve.stopped else ""
