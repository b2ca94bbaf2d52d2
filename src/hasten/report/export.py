"""An analysis of a service as flat numbers, and where they can go: each writer in a file of its own, an extra each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.analyse.analysis import Analysis
from hasten.errors import MissingDependency, UnknownName

EXPORTERS: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("hasten.report.export_tensorboard", "pip install 'hasten[tensorboard]'"),
    "wandb": ("hasten.report.export_wandb", "pip install 'hasten[wandb]'"),
    "mlflow": ("hasten.report.export_mlflow", "pip install 'hasten[mlflow]'"),
}
"""By name: the module, whose ``write(analysis, folder)`` is called, and what installs what it needs."""


def export(name: str, analysis: Analysis, folder: Path) -> Path:
    """Write an analysis for another tool, into ``folder``; nothing is sent anywhere.

    Raises:
        UnknownName: there is no such exporter. MissingDependency: the tool's library is not installed.
    """
    if name not in EXPORTERS:
        raise UnknownName("exporter", name, EXPORTERS)
    module, command = EXPORTERS[name]
    try:
        write: Callable[..., Any] = importlib.import_module(module).write
    except ImportError as error:
        raise MissingDependency(f"what the exporter {name} needs ({error.name or error})", command) from error
    folder.mkdir(parents=True, exist_ok=True)
    write(analysis, folder)
    return folder


def scalars(analysis: Analysis) -> dict[str, float]:
    """Give every number of an analysis by a name that all tools take; times in milliseconds."""
    found = {
        "throughput/requests_per_s": analysis.throughput.value,
        "throughput/samples_per_s": analysis.rows.value,
        "throughput/offered_per_s": analysis.offered,
        **{f"requests/{name}": float(n) for name, n in analysis.counts.items()},
    }
    for one in analysis.percentiles:
        for name, ns in (("", one.value_ns), ("_low", one.low_ns), ("_high", one.high_ns)):
            if ns is not None:
                found[f"response_ms/{one.name}{name}"] = ns / 1e6
    for band in analysis.bands:
        for share in band.shares:
            found[f"phase_ms_p{band.q * 100:g}/{share.part}"] = share.mean_ns.value / 1e6
    if analysis.explanation is not None:
        found |= {f"slow_by/{cause.cause}": cause.share.value for cause in analysis.explanation.causes}
    if analysis.found is not None:
        found["highest_rate/requests_per_s"] = analysis.found.rate
    return found


def curve_points(analysis: Analysis) -> list[tuple[int, dict[str, float]]]:
    """Give the curve's points as (requests a second, numbers), slowest first: a step each in other tools."""
    points = []
    for point in sorted(analysis.curve, key=lambda one: one.offered):
        told = {f"curve_ms/{one.name}": one.value_ns / 1e6 for one in point.percentiles if one.value_ns is not None}
        points.append((round(point.offered), {**told, "curve/answered_per_s": point.throughput.value}))
    return points


def settings(analysis: Analysis) -> dict[str, str | float]:
    """Give what was asked."""
    asked = analysis.asked
    return {
        "url": asked.url,
        "protocol": asked.protocol,
        "model": asked.model,
        "arrivals": asked.arrivals,
        "duration_s": asked.duration_s,
        "seed": asked.seed,
        "objective": str(analysis.objective or "none"),
    }
