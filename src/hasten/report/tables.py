"""A result in the terminal: the frontier, the verdict, and what did not work."""

from __future__ import annotations

from collections.abc import Sequence

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


def frontier_table(result: Result) -> RenderableType:
    """Draw the frontier, fastest first: each plan's name over its numbers."""
    return blocks(
        ("latency", "over\nuntouched", "over\nlossless", "of\nlimit", result.metric, "size", "memory"),
        [(_name(row), _cells(row)) for row in frontier_rows(result)],
    )


def blocks(names: Sequence[str], rows: Sequence[tuple[Text, Sequence[str]]]) -> RenderableType:
    """Draw rows whose first cell is too long for a column: it stands over its numbers, which stay aligned.

    Eighty columns are enough for eight numbers with their intervals. Second lines of cells step back.
    """
    widths = [
        max(len(line) for text in (name, *(cells[i] for _, cells in rows)) for line in text.split("\n"))
        for i, name in enumerate(names)
    ]

    def line_of(cells: Sequence[Text]) -> Table:
        table = Table.grid(padding=(0, 1))
        for width in widths:
            table.add_column(justify="right", min_width=width, no_wrap=True)
        table.add_row(*cells)
        return table

    drawn: list[RenderableType] = [line_of([Text(name, style="dim") for name in names])]
    for title, cells in rows:
        drawn += [title, line_of([_two_tone(cell) for cell in cells])]
    return Group(*drawn)


def notes(result: Result) -> list[str]:
    """Give the lines under the table: baseline, twin, splits, and the trials that came to nothing."""
    lines = []
    base = next((row.baseline_efficiency for row in frontier_rows(result)), None)
    if base is not None:
        advice = "; tune it first" if base < LOW_EFFICIENCY else ""
        lines.append(f"The untouched model reaches {fmt.percent(base)} of this machine's limit{advice}.")
    if result.twin:
        lines.append(f"The untouched model against itself: {fmt.twin(result.twin)}.")
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


def _name(row: Row) -> Text:
    name = Text(row.plan, style="bold" if "chosen" in row.roles else "")
    return name.append(f"  {', '.join(row.roles)}", style="cyan") if row.roles else name


def _cells(row: Row) -> tuple[str, ...]:
    resources = row.measurement.resources
    return (
        over_interval(fmt.interval(row.measurement.latency)),
        over_interval(fmt.times(row.over_original)),
        over_interval(fmt.times(row.over_lossless)),
        fmt.percent(row.efficiency),
        _quality(row),
        fmt.size(resources.file_bytes),
        fmt.size(resources.rss_bytes),
    )


def _quality(row: Row) -> str:
    """Write a quality over its drop, the drop's interval, and the split that it was taken on."""
    if row.quality is None:
        return "unchanged"
    drop = over_interval(fmt.drop(row.quality.drop))
    return f"{row.quality.value:.4f}\ndrop {drop}\non {row.split}"


def over_interval(text: str) -> str:
    """Put an interval under its value."""
    return text.replace(" [", "\n[", 1)


def _two_tone(text: str) -> Text:
    value, newline, rest = text.partition("\n")
    return Text(value).append(newline + rest, style="dim")
