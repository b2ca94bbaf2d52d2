"""One row a plan: what both the terminal's table and the page show, read out of a result once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from hasten.measurement import Estimate, Measurement, Quality, Ratio
from hasten.search.result import Result, Trial

ROLES = ("chosen", "best lossless", "untouched")
"""The plans that are always shown, by what they are."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured plan beside the run's baselines. What was not measured is None."""

    key: str
    plan: str
    roles: tuple[str, ...]
    traits: tuple[str, ...]
    measurement: Measurement
    over_original: Ratio
    over_lossless: Ratio | None
    """None: it was no finalist, so it was not measured against the best lossless plan."""
    quality: Quality | None
    split: str | None
    """Which samples ``quality`` is from: "certify" for finalists, else "search"."""
    baseline_efficiency: float | None
    """Share of the machine's limit that the untouched model reaches: a baseline under 30 % is to be tuned first."""

    @property
    def efficiency(self) -> float | None:
        """Share of the machine's limit that this plan reaches."""
        return self.measurement.bound.efficiency if self.measurement.bound else None


def frontier_rows(result: Result) -> tuple[Row, ...]:
    """Give the frontier with the chosen plan, the best lossless and the untouched one, fastest first."""
    keys = {*result.frontier, result.chosen, result.best_lossless, result.original}
    rows = [row for trial in result.trials if trial.key in keys and (row := row_of(result, trial))]
    return tuple(sorted(rows, key=lambda row: row.measurement.latency.median_ns))


def certified_rows(result: Result) -> tuple[Row, ...]:
    """Give the finalists, in the order of their certificates."""
    return tuple(row for item in result.certificates if (row := row_of(result, result.trial(item.plan))))


def measured_rows(result: Result) -> tuple[Row, ...]:
    """Give every plan that was measured, fastest first."""
    rows = [row for trial in result.trials if (row := row_of(result, trial))]
    return tuple(sorted(rows, key=lambda row: row.measurement.latency.median_ns))


def row_of(result: Result, trial: Trial) -> Row | None:
    """Read one trial, with its certificate's numbers where it has one. None: it was not measured."""
    if trial.measurement is None:
        return None
    certificate = result.certificate(trial.key)
    measurement = certificate.measurement if certificate else trial.measurement
    quality, split = trial.measurement.quality, "search"
    if certificate and certificate.quality:
        quality, split = certificate.quality, "certify"
    if trial.key == result.original:
        quality, split = _reference(result, quality)
    return Row(
        key=trial.key,
        plan=str(trial.plan),
        roles=roles_of(result, trial.key),
        traits=trial.traits,
        measurement=measurement,
        over_original=certificate.over_original if certificate else trial.measurement.speedup,
        over_lossless=certificate.over_lossless if certificate else None,
        quality=quality,
        split=split if quality else None,
        baseline_efficiency=_baseline_efficiency(result),
    )


def roles_of(result: Result, key: str) -> tuple[str, ...]:
    """Say what a plan is in this result: none, one or several of ``ROLES``."""
    keys = (result.chosen, result.best_lossless, result.original)
    return tuple(role for role, owner in zip(ROLES, keys, strict=True) if owner == key)


def counts(result: Result) -> dict[str, int]:
    """Count the trials by outcome, the commonest first."""
    return dict(Counter(trial.outcome for trial in result.trials).most_common())


def _reference(result: Result, own: Quality | None) -> tuple[Quality | None, str]:
    """Give the untouched model's quality: on the certify samples where they were used. It has lost nothing."""
    certified = next((item.quality for item in result.certificates if item.quality), None)
    source = certified or own
    if source is None:
        return None, "search"
    # Of agreement with the original, which has no reference, the original itself has all there is.
    value = source.reference if source.reference is not None else (own or source).value
    nothing = Estimate(value=0.0, low=0.0, high=0.0, n=source.drop.n)
    none_changed = replace(source, value=value, drop=nothing, flip_rate=0.0, disagreement=0.0, worst_class=None)
    return none_changed, "certify" if certified else "search"


def _baseline_efficiency(result: Result) -> float | None:
    certificate = result.certificate(result.original)
    measurement = certificate.measurement if certificate else result.trial(result.original).measurement
    return measurement.bound.efficiency if measurement and measurement.bound else None
