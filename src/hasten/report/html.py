"""One self-contained HTML page about a result: it opens offline, fetches nothing, and its numbers need no script."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from hasten.artifact import Artifact, Json
from hasten.errors import StoreError
from hasten.measurement import Bound
from hasten.report import format as fmt
from hasten.report.charts import Figure, frontier_figure, operators_figure, shorten
from hasten.report.charts_compression import curves_figure, prediction_figure, sensitivity_figure
from hasten.report.charts_path import waterfall_figure
from hasten.report.compression import (
    best_held,
    called,
    compression_of,
    errors_sentence,
    number,
    plan_text,
    sensitivity_sentence,
)
from hasten.report.path import change, path_of
from hasten.report.remarks import MEMORY, limit_remarks, profile_remarks, timing_remarks, winograd_limit
from hasten.report.rows import certified_rows, counts, frontier_rows, roles_of, row_of
from hasten.report.tables import LOW_EFFICIENCY
from hasten.search.journal import Journal
from hasten.search.optimize import JOURNAL
from hasten.search.result import Result
from hasten.store import write_atomically

ASSETS = resources.files("hasten.report") / "assets"
TOP_OPERATORS = 25


def write_html(result: Result, path: Path, *, chosen: Artifact | None = None) -> Path:
    """Write the page and give its path.

    Args:
        result: The finished search.
        path: Where to; a file already there is replaced whole.
        chosen: What was built for the chosen plan, for its lineage; None: the page leaves the lineage out.

    Raises:
        StoreError: it cannot be written.
    """
    write_atomically(path, render_html(result, chosen=chosen).encode())
    return path


def render_html(result: Result, *, chosen: Artifact | None = None) -> str:
    """Give the page's text. Its content security policy lets only the page's own two scripts run."""
    scripts = {name: asset(name) for name in ("plotly-basic.min.js", "report.js")}
    rows, finalists = frontier_rows(result), certified_rows(result)
    limits = [row for row in finalists if row.measurement.bound]
    template = environment().get_template("report.html.j2")
    return template.render(
        result=result,
        chosen=row_of(result, result.trial(result.chosen)),
        rows=rows,
        finalists=finalists,
        limits=limits,
        second_limits=any(winograd_limit(row.measurement.bound) for row in limits),
        operators=_operators(result),
        trials=[_trial_cells(result, i) for i in range(len(result.trials))],
        counts=counts(result),
        lineage=chosen.lineage if chosen else (),
        artifact=chosen,
        baseline=rows[0].baseline_efficiency if rows else None,
        low_efficiency=LOW_EFFICIENCY,
        constraints=constraints(result),
        deployment=_deployment(result),
        notes=journal_notes(result),
        policy=policy(scripts),
        style=asset("report.css"),
        plotly=scripts["plotly-basic.min.js"],
        script=scripts["report.js"],
        figures=script_json(figures_of(result)),
        **_of_compression(result),
    )


def figures_of(result: Result) -> dict[str, Figure]:
    """Give the page's figures by name; those of compression only where there is something to show."""
    found = compression_of(result)
    figures = {"frontier": frontier_figure(result), "operators": operators_figure(result)}
    if path := path_of(result):
        figures["path"] = waterfall_figure(path, result.metric)
    if found.cells:
        figures["sensitivity"] = sensitivity_figure(found.cells, result)
    if found.predictions:
        figures["predictions"] = prediction_figure(found.predictions, result)
    if found.curves:
        figures["curves"] = curves_figure(found.curves, result)
    return figures


def constraints(result: Result) -> list[tuple[str, str]]:
    """Say what the user asked for, one pair of words each."""
    goal = result.goal
    found = [("objective", f"smallest {goal.objective}"), ("batch", str(goal.batch))]
    if goal.max_drop is not None:
        found.append(("largest drop", fmt.percent(goal.max_drop, 2)))
    if goal.p99_ns is not None:
        found.append(("p99 under", fmt.duration(goal.p99_ns)))
    if goal.min_throughput is not None:
        found.append(("throughput over", f"{fmt.digits(goal.min_throughput)} samples/s"))
    if goal.max_file_bytes is not None:
        found.append(("file under", fmt.size(goal.max_file_bytes)))
    if goal.max_memory_bytes is not None:
        found.append(("memory under", fmt.size(goal.max_memory_bytes)))
    return found


def bound_remarks(bound: Bound) -> list[str]:
    """Say what has to be known of a limit, and of the operators beside it."""
    return [*limit_remarks(bound), *profile_remarks(bound)]


def journal_notes(result: Result) -> tuple[str, ...]:
    """Give what the search noted while it ran, oldest first; nothing where its journal is not beside the result."""
    path = result.run / JOURNAL
    try:
        return Journal(path).notes() if path.is_file() else ()
    except StoreError as error:
        return (str(error),)


def _of_compression(result: Result) -> dict[str, Any]:
    found = compression_of(result)
    return {
        "path": path_of(result),
        "certified": result.certificate(result.chosen),
        "compression": found,
        "sensitivity": sensitivity_sentence(found.cells),
        "errors": errors_sentence(found.predictions),
        "built": any(item.measured_ns for item in found.predictions),
    }


def environment() -> jinja2.Environment:
    """Give what pages are rendered with: everything escaped, nothing undefined passed over."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(fmt=fmt, shorten=shorten, MEMORY=MEMORY, winograd_limit=winograd_limit)
    environment.globals.update(timing_remarks=timing_remarks, bound_remarks=bound_remarks, change=change)
    environment.globals.update(called=called, plan_text=plan_text, number=number, best_held=best_held)
    return environment


def _operators(result: Result) -> list[Any]:
    row = row_of(result, result.trial(result.chosen))
    if row is None or row.measurement.bound is None:
        return []
    return sorted(row.measurement.bound.operators, key=lambda op: -(op.time_ns or 0.0))[:TOP_OPERATORS]


def _trial_cells(result: Result, index: int) -> dict[str, Json]:
    """Give one trial as the page's table shows it: each cell's text, and the number it is sorted by."""
    trial = result.trials[index]
    measured = trial.measurement
    quality = measured.quality if measured else None
    row = row_of(result, trial)
    return {
        "number": index + 1,
        "plan": str(trial.plan),
        "roles": ", ".join(roles_of(result, trial.key)),
        "stage": trial.stage,
        "outcome": trial.outcome,
        "reason": trial.reason or "",
        "latency_ns": measured.latency.median_ns if measured else None,
        "speedup": measured.speedup if measured else None,
        "drop": quality.drop if quality else None,
        "size": measured.resources.file_bytes if measured else None,
        "efficiency": row.efficiency if row else None,
        "seconds": trial.seconds,
    }


def _deployment(result: Result) -> str | None:
    return result.deployment.read_text() if result.deployment.is_file() else None


def asset(name: str) -> str:
    """Read one of the report's files."""
    return (ASSETS / name).read_text(encoding="utf-8")


def policy(scripts: dict[str, str]) -> str:
    """Give the content security policy that lets only ``scripts`` run."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts.values()]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    rules = [
        "default-src 'none'",
        f"script-src {allowed}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return "; ".join(rules)


def script_json(value: Json) -> str:
    """Encode JSON that can stand inside a script element: nothing in it can end the element."""
    text = msgspec.json.encode(value).decode()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
