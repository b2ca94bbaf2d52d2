"""An analysis of a service in words: rows that the terminal, Markdown and the page show alike, and its CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from hasten.analyse.analysis import Analysis, LoadPoint
from hasten.analyse.causes import CAUSES
from hasten.measure.percentiles import Percentile
from hasten.measurement import Estimate
from hasten.report import format as fmt

PART_NAMES = {
    "issue_delay": "issue delay",
    "transfer": "transfer",
    "receive": "receive",
    "decode": "decode",
    "queue": "queue",
    "batch_wait": "batch wait",
    "pre": "pre",
    "infer": "inference",
    "post": "post",
    "encode": "encode",
    "send": "send",
    "transfer_back": "transfer back",
}
"""The words for each part of a response."""


@dataclass(frozen=True)
class Table:
    """A table as texts: the columns' names, rows, and a line about what it holds. ``key`` names it."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    about: str = ""


def tables_of(analysis: Analysis) -> tuple[Table, ...]:
    """Give every table that has something to show, in order."""
    made = (
        percentile_table(analysis),
        phase_table(analysis),
        causes_table(analysis),
        curve_table(analysis),
        found_table(analysis),
        capacity_table(analysis),
        batch_table(analysis),
        host_table(analysis),
    )
    return tuple(table for table in made if table.rows)


def summary(analysis: Analysis) -> list[str]:
    """Say the main things in sentences."""
    asked, counts = analysis.asked, analysis.counts
    misses = sum(n for name, n in counts.items() if name not in ("ok", "unsent"))
    lines = [
        f"{asked.url} {asked.model}: {asked.arrivals} for {asked.duration_s:g} s over {asked.protocol}",
        f"{fmt.digits(analysis.offered)} requests/s came, {rate(analysis.throughput)} were answered: "
        f"{rate(analysis.rows, 'samples/s')}; {misses} of {sum(counts.values())} had no answer",
    ]
    if analysis.invalid is not None:
        lines.append(f"INVALID: {analysis.invalid}")
    if analysis.verdict is not None and analysis.objective is not None:
        lines.append(f"{analysis.verdict.state}: {analysis.objective} at this load; {analysis.verdict.why}")
    if analysis.explanation is not None and analysis.explanation.main is not None:
        first = analysis.explanation.causes[0]
        lines.append(
            f"Why the slow ones were slow: {CAUSES[first.cause]} ({fmt.percent(first.lost_share)} of the time lost)"
        )
    lines += _limits(analysis)
    lines += analysis.notes
    return lines


def _limits(analysis: Analysis) -> list[str]:
    lines = []
    found, capacity = analysis.found, analysis.capacity
    if found is not None:
        sure = "confirmed by three runs with other arrivals" if found.settled else f"not confirmed: {found.why}"
        lines.append(f"Highest rate with {found.objective}: {fmt.digits(found.rate)} requests/s, {sure}")
    if capacity is not None:
        error = f", {signed(capacity.error_saturated)} off" if capacity.error_saturated is not None else ""
        lines.append(f"Saturates at {fmt.digits(capacity.saturated)} requests/s by the model{error}")
        lines += [
            f"{fmt.digits(wanted)} requests/s: "
            + ("no number of replicas holds the objective" if count is None else f"{count} replicas by the model")
            for wanted, count in capacity.replicas
        ]
    return lines


def percentile_table(analysis: Analysis) -> Table:
    """Give response times."""
    rows = [(p.name, *_percentile(p)) for p in analysis.percentiles]
    rows += [(f"issue delay {p.name}", *_percentile(p)) for p in analysis.issue_delay]
    return Table(
        "percentiles",
        "Response time",
        ("", "time", "95 % interval", "requests", "worth"),
        tuple(rows),
        "From the scheduled time. No answer counts as slower than any; worth: as many independent ones say as much.",
    )


def phase_table(analysis: Analysis) -> Table:
    """Give the parts of a response at p50 and at p99, or where the server tells none, its means."""
    columns = [""]
    for band in analysis.bands:
        columns += [f"mean at p{band.q * 100:g}", "share"]
    rows = []
    names = [share.part for share in analysis.bands[0].shares] if analysis.bands else []
    for k, name in enumerate(names):
        cells = [PART_NAMES[name]]
        for band in analysis.bands:
            share = band.shares[k]
            mean = share.mean_ns
            cells += [spread(mean), fmt.percent(share.share, 1)]
        rows.append(tuple(cells))
    if rows:
        total = ["sum"]
        for band in analysis.bands:
            total += [f"{fmt.duration(band.response_ns)}, {band.n} requests", "100 %"]
        rows.append(tuple(total))
    rows += [
        (f"{one.part} (mean)", *_blanks(analysis, f"{fmt.duration(one.mean_ns)}, n {one.n}"))
        for one in (() if "infer" in names else analysis.means)
    ]
    return Table(
        "phases",
        "Where the time goes",
        tuple(columns) if analysis.bands else ("", "mean"),
        tuple(rows),
        "Means over the requests around each quantile, so that they add up. Client's and server's clocks are not "
        f"compared, only durations; they contradict each other by at most {fmt.percent(analysis.unfitting, 2)}.",
    )


def causes_table(analysis: Analysis) -> Table:
    """Give why the slow ones were slow."""
    found = analysis.explanation
    if found is None:
        return Table("causes", "", (), ())
    rows = tuple(
        (
            one.cause.replace("_", " "),
            str(one.requests),
            f"{fmt.percent(one.share.value)} [{fmt.percent(one.share.low)}, {fmt.percent(one.share.high)}]",
            fmt.percent(one.lost_share),
            one.examples[0].because,
        )
        for one in found.causes
    )
    return Table(
        "causes",
        "Why the slow ones were slow",
        ("cause", "requests", "of slow ones", "of time lost", "for example"),
        rows,
        f"{found.slow} of {found.answered} answers took over {fmt.duration(found.threshold_ns)}; "
        f"the usual one takes {fmt.duration(found.typical_ns)}. "
        + " ".join(f"{one.cause.replace('_', ' ').capitalize()}: {CAUSES[one.cause]}." for one in found.causes),
    )


def curve_table(analysis: Analysis) -> Table:
    """Give throughput against latency."""
    rows = tuple(
        (
            point.arrivals,
            fmt.digits(point.offered),
            rate(point.throughput, ""),
            *(_value(point, q) for q in (0.5, 0.9, 0.99)),
            str(point.misses),
            str(point.throughput.n),
            "" if point.invalid is None else "generator late",
        )
        for point in analysis.curve
    )
    return Table(
        "curve",
        "Throughput against latency",
        ("load", "offered/s", "answered/s", "p50", "p90", "p99", "missed", "answers", ""),
        rows,
    )


def found_table(analysis: Analysis) -> Table:
    """Give the steps of the search for the highest rate."""
    found = analysis.found
    if found is None:
        return Table("search", "", (), ())
    rows = tuple(
        (
            fmt.digits(step.rate),
            fmt.seconds(step.seconds),
            str(step.n),
            str(step.misses),
            fmt.duration(step.value_ns),
            step.word,
        )
        for step in found.steps
    )
    about = f"{found.objective} at {fmt.digits(found.rate)} requests/s, confirmed {found.confirmed} of 3 times"
    about += "" if found.fails_at is None else f"; the lowest rate that did not hold is {fmt.digits(found.fails_at)}"
    quantile = f"p{found.objective.q * 100:g}"
    columns = ("requests/s", "time", "requests", "over the limit", quantile, "it")
    return Table("search", "The highest rate under the objective", columns, rows, about)


def capacity_table(analysis: Analysis) -> Table:
    """Give the model beside the measurement."""
    capacity = analysis.capacity
    if capacity is None:
        return Table("capacity", "", (), ())
    rows = [
        (
            fmt.digits(point.rate),
            fmt.duration(point.p50_ns),
            fmt.duration(point.measured_p50_ns),
            signed(point.error_p50),
            fmt.duration(point.p99_ns),
            fmt.duration(point.measured_p99_ns),
            signed(point.error_p99),
        )
        for point in capacity.points
    ]
    about = [f"t(n) from {capacity.source}."]
    for name, model, measured, error in (
        ("Saturates at", capacity.saturated, capacity.measured_saturated, capacity.error_saturated),
        ("Highest rate under the objective", capacity.highest, capacity.measured_highest, capacity.error_highest),
    ):
        if model is not None:
            beside = "" if measured is None else f", measured {fmt.digits(measured)}, error {signed(error)}"
            about.append(f"{name}: {fmt.digits(model)} requests/s by the model{beside}.")
    columns = ("requests/s", "p50, model", "measured", "error", "p99, model", "measured", "error")
    if not rows:
        rows = [(fmt.digits(capacity.saturated), *(fmt.NONE,) * 6)]
    return Table("capacity", "The capacity model, and its error", columns, tuple(rows), " ".join(about))


def batch_table(analysis: Analysis) -> Table:
    """Give the distribution of batch sizes."""
    total = sum(one.requests for one in analysis.batches)
    rows = tuple(
        (str(b.rows), str(b.runs), str(b.requests), fmt.percent(b.requests / total), fmt.duration(b.infer_ns))
        for b in analysis.batches
    )
    return Table("batches", "Batch sizes", ("rows", "runs", "requests", "share", "a run takes (median)"), rows)


def host_table(analysis: Analysis) -> Table:
    """Give what the server took of its host."""
    host = analysis.on_host
    if host is None:
        return Table("host", "", (), ())
    rows = (
        ("cores kept busy (mean)", fmt.NONE if host.cores_used is None else f"{host.cores_used:.2f}"),
        ("threads waited for a core", fmt.percent(host.waiting_share, 1)),
        ("held back for the cgroup's quota", fmt.percent(host.throttled_share, 1)),
        ("memory, at most", fmt.size(host.peak_rss_bytes)),
    )
    return Table("host", "The server on this host", ("", "value"), rows, f"{host.samples} samples.")


def markdown_of(analysis: Analysis) -> str:
    """Write the analysis for a pull request."""
    first, *lines = summary(analysis)
    parts = [f"### {_escaped(first)}", *(f"* {_escaped(line)}" for line in lines), ""]
    for table in tables_of(analysis):
        parts += [f"**{table.title}**", "", _row(table.columns), _row(["---"] * len(table.columns))]
        parts += [_row(row) for row in table.rows]
        parts += ["", *([_escaped(table.about), ""] if table.about else [])]
    return "\n".join(parts)


def csv_of(analysis: Analysis) -> str:
    """Write the numbers, one a line: what, at which rate, value, 95 % interval, count."""
    held = io.StringIO()
    out = csv.writer(held, lineterminator="\n")
    out.writerow(("figure", "arrivals", "value", "low", "high", "n", "unit"))
    arrivals = analysis.asked.arrivals
    for name, estimate, unit in (
        ("throughput", analysis.throughput, "requests/s"),
        ("rows", analysis.rows, "samples/s"),
    ):
        out.writerow((name, arrivals, estimate.value, estimate.low, estimate.high, estimate.n, unit))
    for load, told in [(arrivals, analysis.percentiles), *((p.arrivals, p.percentiles) for p in analysis.curve)]:
        for one in told:
            out.writerow((one.name, load, _blank(one.value_ns), _blank(one.low_ns), _blank(one.high_ns), one.n, "ns"))
    for band in analysis.bands:
        for share in band.shares:
            mean = share.mean_ns
            name = f"{share.part} at p{band.q * 100:g}"
            out.writerow((name, arrivals, mean.value, mean.low, mean.high, mean.n, "ns"))
    if analysis.explanation is not None:
        for cause in analysis.explanation.causes:
            one_share = cause.share
            row = (f"slow by {cause.cause}", arrivals, one_share.value, one_share.low, one_share.high, one_share.n)
            out.writerow((*row, "share"))
    if analysis.found is not None:
        found = analysis.found
        out.writerow((f"highest rate {found.objective}", "poisson", found.rate, "", "", found.confirmed, "requests/s"))
    return held.getvalue()


def rate(estimate: Estimate, unit: str = "requests/s") -> str:
    """Write a rate with its interval."""
    text = f"{fmt.digits(estimate.value)} [{fmt.digits(estimate.low)}, {fmt.digits(estimate.high)}]"
    return f"{text} {unit}".rstrip()


def spread(mean: Estimate) -> str:
    """Write a time with its interval in one unit: ``145 µs [143, 147]``."""
    text = fmt.duration(mean.value)
    unit = {"s": 1e9, "ms": 1e6, "µs": 1e3, "ns": 1.0}[text.split()[-1]]
    return f"{text} [{fmt.digits(mean.low / unit)}, {fmt.digits(mean.high / unit)}]"


def signed(error: float | None) -> str:
    """Write a relative error."""
    return fmt.NONE if error is None else f"{error * 100:+.1f} %"


def _percentile(one: Percentile) -> tuple[str, str, str, str]:
    if one.value_ns is None:
        return fmt.NONE, one.why, str(one.n), ""
    high = "beyond the slowest" if one.high_ns is None else fmt.duration(one.high_ns)
    low = fmt.NONE if one.low_ns is None else fmt.duration(one.low_ns)
    return fmt.duration(one.value_ns), f"{low} to {high}", str(one.n), str(one.effective_n)


def _blanks(analysis: Analysis, text: str) -> tuple[str, ...]:
    """Give a cell and empty ones, as many as the phases' table has columns beside its first."""
    return (text, *("",) * max(2 * len(analysis.bands) - 1, 0))


def _value(point: LoadPoint, q: float) -> str:
    return next((fmt.duration(one.value_ns) for one in point.percentiles if one.q == q), fmt.NONE)


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) or " " for cell in cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
