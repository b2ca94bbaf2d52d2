"""A result in the terminal: the frontier, the verdict, and what did not work."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from hasten.report import format as fmt
from hasten.report.blocks import Blocks, over_interval
from hasten.report.compression import compression_lines
from hasten.report.path import Step, change, path_of
from hasten.report.remarks import MEMORY, grouped, limit_remarks, timing_remarks, winograd_remarks
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

LONGEST_METRIC = 16
"""A longer name is only in the lines under the table."""


def result_table(result: Result) -> RenderableType:
    """Draw the whole result: frontier, conditions, what was left out, verdict."""
    return Group(
        Text.assemble((result.source_name, "bold"), f"  batch {result.conditions.batch}, {result.conditions.host.cpu}"),
        Text(),
        frontier_table(result),
        Text(),
        *_path(result),
        *(Padding(Text(line, style="dim"), (0, 1)) for line in notes(result)),
        Text(),
        verdict_line(result.verdict),
    )


def frontier_table(result: Result) -> RenderableType:
    """Draw the frontier, fastest first: each plan's name over its numbers."""
    quality = result.metric if len(result.metric) <= LONGEST_METRIC else "quality"
    return Blocks(
        ("latency", "over\nuntouched", "over\nlossless", "of\nlimit", quality, "size", "memory"),
        [(_name(row), _cells(row)) for row in frontier_rows(result)],
    )


def path_table(result: Result) -> RenderableType | None:
    """Draw the path from the untouched model to the chosen plan; None: there is none to show."""
    steps = path_of(result)
    if not steps:
        return None
    quality = result.metric if len(result.metric) <= LONGEST_METRIC else "quality"
    return Blocks(
        ("latency", "change", "over\nuntouched", quality, "size"), [(_step_name(s), _step_cells(s)) for s in steps]
    )


def notes(result: Result) -> list[str]:
    """Give the lines under the table: baseline, twin, splits, what numbers do not hold, trials without a result."""
    lines = []
    rows = frontier_rows(result)
    base = next((row.baseline_efficiency for row in rows), None)
    if base is not None:
        advice = "; tune it first" if base < LOW_EFFICIENCY else ""
        lines.append(f"The untouched model reaches {fmt.percent(base)} of this machine's limit{advice}.")
    lines += [line for row in rows if "chosen" in row.roles for line in _chosen(row)]
    if result.twin:
        lines.append(f"The untouched model against itself: {fmt.twin(result.twin)}.")
    used = ", ".join(f"{name} {n}" for name, n in result.splits.items())
    lines.append(f"Quality is {result.metric}; samples: {used}. Square brackets are 95 % intervals. {MEMORY}")
    lines += grouped((_called(row), timing_remarks(row.measurement.latency)) for row in rows)
    lines += grouped((_called(row), limit_remarks(row.measurement.bound)) for row in rows)
    lines += compression_lines(result)
    lines += [f"Fell out of the finals: {result.trial(key).plan}: {reason}." for key, reason in result.fallen.items()]
    tried = ", ".join(f"{n} {outcome}" for outcome, n in counts(result).items())
    lines.append(f"{len(result.trials)} trials in {fmt.seconds(result.seconds)}: {tried}.")
    return lines


def verdict_line(verdict: Verdict) -> Text:
    """Draw the verdict's word and sentence."""
    line = Text.assemble((verdict.word, COLOURS[verdict.word]), "  ", verdict.sentence)
    if verdict.more_samples:
        line.append(f" About {verdict.more_samples:,} more samples would decide.")
    return line


def _path(result: Result) -> list[RenderableType]:
    table = path_table(result)
    title = Text("From the untouched model to the chosen plan", style="bold")
    said = Text("Numbers of the search; a line has what the one above has, and what it names.", style="dim")
    return [] if table is None else [title, Padding(said, (0, 1)), Text(), table, Text()]


def _step_name(step: Step) -> Text:
    name = Text(step.name if step.change_ns is not None else f"{step.name}: {step.parts[0]}")
    return name.append("  measured only together", style="dim") if len(step.parts) > 1 else name


def _step_cells(step: Step) -> tuple[str, ...]:
    judged = step.quality
    return (
        over_interval(fmt.interval(step.latency)),
        change(step) or fmt.NONE,
        over_interval(fmt.times(step.over_original)),
        f"{judged.value:.4f}, drop {over_interval(fmt.drop(judged.drop))}" if judged else "not judged",
        fmt.size(step.file_bytes),
    )


def _chosen(row: Row) -> list[str]:
    """Say of the chosen plan what has no column."""
    load, first = row.measurement.resources.load_ns, row.measurement.latency.first_run_ns
    return [
        f"The chosen plan loads in {fmt.duration(load)}; its first run takes {fmt.duration(first)}.",
        *grouped([(_called(row), winograd_remarks(row.measurement.bound))]),
    ]


def _called(row: Row) -> str:
    return ", ".join(row.roles) or row.plan


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
