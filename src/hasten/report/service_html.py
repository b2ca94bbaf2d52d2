"""One self-contained HTML page about a service: it opens offline, fetches nothing, and its numbers need no script."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hasten.analyse.analysis import Analysis
from hasten.report.charts_service import service_figures
from hasten.report.html import asset, environment, policy, script_json
from hasten.report.service import summary, tables_of
from hasten.store import write_atomically


def write_service_html(analysis: Analysis, path: Path) -> Path:
    """Write the page and give its path. Raises StoreError: it cannot be written."""
    write_atomically(path, render_service_html(analysis).encode())
    return path


def render_service_html(analysis: Analysis) -> str:
    """Give the page's text. Its content security policy lets only the page's own two scripts run."""
    scripts = {name: asset(name) for name in ("plotly-basic.min.js", "report.js")}
    figures = service_figures(analysis)
    first, *lines = summary(analysis)
    return (
        environment()
        .get_template("service.html.j2")
        .render(
            analysis=analysis,
            title=first,
            lines=lines,
            tables={table.key: table for table in tables_of(analysis)},
            began=datetime.fromtimestamp(analysis.asked.began_unix_ns / 1e9, UTC).isoformat(timespec="seconds"),
            policy=policy(scripts),
            style=asset("report.css"),
            plotly=scripts["plotly-basic.min.js"],
            script=scripts["report.js"],
            figures=script_json(figures),
            drawn=set(figures),
        )
    )
