"""A result in the terminal: the frontier, the verdict, and what did not work."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hasten.report import format as fmt
from hasten.report.rows import Row, counts, frontier_rows
from hasten.search.result import Result, Verdict

COLOURS = {
    "MEETS": "bold green",
    "BEST_EFFORT": "bold yellow",
    "UNPROVEN": "bold yellow",
    "INCONCLUSIVE": "bold yellow",
    "REGRESSION": "bold red",
    "INFEASIBLE": "bold red",
}
LOW_EFFICIENCY = 0.3
"""A baseline that reaches less of the machine's limit is to be tuned before its speed-ups mean anything."""


def result_table(result: Result) -> RenderableType:
    """Draw the whole result: frontier, conditions, what was left out, verdict."""
    return Group(
        Text.assemble((result.source_name, "bold"), f"  batch {result.conditions.batch}, {result.conditions.host.cpu}"),
        frontier_table(result),
        *(Padding(Text(line, style="dim"), (0, 1)) for line in notes(result)),
        Text(),
        verdict_line(result.verdict),
    )


def frontier_table(result: Result) -> Table:
    """Draw the frontier, fastest first, two lines a plan: its numbers under what it is."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column("plan", overflow="fold", ratio=1)
    for name in ("latency", "over untouched", "over lossless", "of limit", "quality", "size", "memory"):
        table.add_column(name, justify="right", no_wrap=False)
    for row in frontier_rows(result):
        table.add_row(*_cells(row), style="bold" if "chosen" in row.roles else "")
    return table


def notes(result: Result) -> list[str]:
    """Give the lines under the table: baseline, twin, splits, and the trials that came to nothing."""
    lines = []
    base = next((row.baseline_efficiency for row in frontier_rows(result)), None)
    if base is not None:
        advice = "; tune it first" if base < LOW_EFFICIENCY else ""
        lines.append(f"The untouched model reaches {fmt.percent(base)} of this machine's limit{advice}.")
    if result.twin:
        lines.append(f"The untouched model against itself: {fmt.times(result.twin)} (should cover 1).")
    used = ", ".join(f"{name} {n}" for name, n in result.splits.items())
    lines.append(f"Quality is {result.metric}; samples: {used}. Square brackets are 95 % intervals.")
    tried = ", ".join(f"{n} {outcome}" for outcome, n in counts(result).items())
    lines.append(f"{len(result.trials)} trials in {fmt.seconds(result.seconds)}: {tried}.")
    return lines


def verdict_line(verdict: Verdict) -> Text:
    """Draw the verdict's word and sentence."""
    line = Text.assemble((verdict.word, COLOURS[verdict.word]), "  ", verdict.sentence)
    if verdict.more_samples:
        line.append(f" About {verdict.more_samples:,} more samples would decide.")
    return line


def _cells(row: Row) -> tuple[RenderableType, ...]:
    name = Text(row.plan)
    if row.roles:
        name.append(f"\n{', '.join(row.roles)}", style="cyan")
    resources = row.measurement.resources
    return (
        name,
        _two_lines(fmt.interval(row.measurement.latency)),
        _two_lines(fmt.times(row.over_original)),
        _two_lines(fmt.times(row.over_lossless)),
        fmt.percent(row.efficiency),
        quality_cell(row),
        fmt.size(resources.file_bytes),
        fmt.size(resources.rss_bytes),
    )


def quality_cell(row: Row) -> Text:
    """Draw a quality over its drop and the split that it was taken on."""
    if row.quality is None:
        return Text("unchanged")
    text = Text(f"{row.quality.value:.4f}")
    return text.append(f"\ndrop {fmt.drop(row.quality.drop)}\non {row.split}", style="dim")


def _two_lines(text: str) -> Text:
    value, bracket, rest = text.partition(" [")
    found = Text(value)
    return found.append(f"\n[{rest}", style="dim") if bracket else found
