"""Plotly figures as plain values: what ``Plotly.newPlot`` takes. Colours are CSS variables that the page resolves.

A colour is written ``var(--name)``; the page's script puts in the colour of the reader's theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hasten.artifact import Json
from hasten.measurement import OperatorBound
from hasten.report import format as fmt
from hasten.report.remarks import winograd_limit
from hasten.report.rows import Row, certified_rows, measured_rows
from hasten.search.result import Result

Figure = dict[str, Json]

LIMITS: dict[str, tuple[str, str]] = {
    "compute": ("arithmetic", "var(--compute)"),
    "memory": ("memory", "var(--memory)"),
    "overhead": ("overhead", "var(--overhead)"),
}
"""What holds an operator: its word in the legend, and its colour."""

MARKS = {
    "chosen": ("star", 17, "var(--chosen)"),
    "best lossless": ("square", 11, "var(--lossless)"),
    "untouched": ("diamond", 13, "var(--original)"),
}
"""Symbol, size in pixels and colour of the plans that are always marked."""

FAINT = {"var(--muted)": "var(--line)"}
"""Intervals of the many beaten plans step back behind the points."""

LANE_PX = 17
"""Height of a line of labels above the plot."""

MAX_BARS = 6

FLAT = 0.5
"""A spread of quality under this many points is drawn as the little that it is."""


def frontier_figure(result: Result) -> Figure:
    """Draw latency against quality: every measured plan, intervals as bars, the three marked plans labelled.

    Labels stand in lanes above the plot, one a plan, so that they cannot cover each other or a point.
    """
    rows = measured_rows(result)
    special = [row for row in rows if row.roles]
    plain = [row for row in rows if not row.roles]
    on = [row for row in plain if row.key in result.frontier]
    off = [row for row in plain if row.key not in result.frontier]
    traces = [
        _points("other plans", off, symbol="circle", size=7, colour="var(--muted)"),
        _points("frontier", on, symbol="circle", size=9, colour="var(--accent)"),
        _steps([row for row in rows if row.key in result.frontier]),
        *(_points(", ".join(row.roles), [row], *MARKS[row.roles[0]]) for row in special),
    ]
    title = f"{escape(shorten(result.metric, 40))}, %:<br>better (+) or worse (−) than untouched"
    axis: Json = {
        "title": {"text": title, "font": {"size": 13}},
        "tickformat": "+~g",
        "zeroline": True,
        "zerolinecolor": "var(--muted)",
    }
    layout = blank_layout(height=440 + LANE_PX * len(special))
    layout["margin"] = {"l": 88, "r": 24, "t": 16 + LANE_PX * len(special), "b": 96}
    layout["xaxis"] |= {"type": "log", "title": {"text": "latency, ms (log scale)"}, "tickangle": 0, "tickformat": "~g"}
    layout["yaxis"] |= axis | _range(rows)
    layout["legend"] = {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0}
    layout["annotations"], layout["shapes"] = _labels(special)
    return {"data": [trace for trace in traces if trace["x"]], "layout": layout}


def operators_figure(result: Result) -> Figure:
    """Draw where the time of each finalist goes: a piece an operator, coloured by what holds it, and the rest.

    The pieces of a bar add up to the measured time, which stands beside it; the marks on it are the machine's limits.
    """
    rows = [row for row in certified_rows(result) or measured_rows(result) if row.measurement.bound][:MAX_BARS]
    pieces = [*(_operator_trace(limit, rows) for limit in LIMITS), _outside_trace(rows)]
    traces = [*pieces, _limit_trace(rows), _winograd_trace(rows)]
    layout = blank_layout(height=116 + 62 * max(1, len(rows)))
    layout |= {"barmode": "stack", "bargap": 0.6, "margin": {"l": 12, "r": 24, "t": 8, "b": 100}}
    longest = max((row.measurement.latency.median_ns for row in rows), default=1.0) / 1e6
    layout["xaxis"] |= {"title": {"text": "time of one run, ms"}, "range": [0, longest * 1.04]}
    layout["yaxis"] |= {"visible": False, "range": [len(rows) - 0.4, -0.85]}
    layout["legend"] = {
        "traceorder": "normal",
        "orientation": "h",
        "y": -68 / max(62 * len(rows), 62),
        "yanchor": "top",
        "x": 0,
    }
    layout["annotations"] = [_bar_label(i, row) for i, row in enumerate(rows)]
    return {"data": [trace for trace in traces if trace["x"]], "layout": layout}


def shorten(plan: str, limit: int = 72) -> str:
    """Cut a plan's text in its middle: the passes' names come first, the engine last."""
    if len(plan) <= limit:
        return plan
    half = (limit - 3) // 2
    return f"{plan[:half]} … {plan[-half:]}"


def blank_layout(*, height: int) -> Figure:
    """Give the layout that all figures begin with; ``height`` in pixels."""
    axis = {"gridcolor": "var(--line)", "zeroline": False, "linecolor": "var(--line)", "ticks": ""}
    return {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--ink)"},
        "hoverlabel": {"align": "left", "bgcolor": "var(--surface)", "bordercolor": "var(--line)"},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--ink)"},
        "dragmode": "zoom",
        "xaxis": {**axis},
        "yaxis": {**axis},
    }


def _points(name: str, rows: Sequence[Row], symbol: str, size: int, colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [row.measurement.latency.median_ns / 1e6 for row in rows],
        "y": [_height(row) for row in rows],
        "text": [_hover(row) for row in rows],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": symbol, "size": size, "color": colour, "line": {"width": 1, "color": "var(--surface)"}},
        "error_x": _bars([_latency_arms(row) for row in rows], FAINT.get(colour, colour)),
        "error_y": _bars([_quality_arms(row) for row in rows], FAINT.get(colour, colour)),
    }


def _steps(rows: Sequence[Row]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "showlegend": False,
        "hoverinfo": "skip",
        "x": [row.measurement.latency.median_ns / 1e6 for row in rows],
        "y": [_height(row) for row in rows],
        "line": {"width": 1, "dash": "dot", "color": "var(--accent)"},
    }


def _height(row: Row) -> float:
    """Give what a plan changes the quality by, in per cent: up is better.

    Not the quality itself: finalists are judged on other samples than the rest, and only paired differences from
    the untouched model can be compared across two splits.
    """
    return 0.0 if row.quality is None else 0.0 - row.quality.drop.value * 100


def _bars(arms: Sequence[tuple[float, float]], colour: str) -> Figure:
    return {
        "type": "data",
        "symmetric": False,
        "array": [plus for plus, _ in arms],
        "arrayminus": [minus for _, minus in arms],
        "thickness": 1,
        "width": 3,
        "color": colour,
    }


def _latency_arms(row: Row) -> tuple[float, float]:
    latency = row.measurement.latency
    low, high = fmt.median_interval(latency) or (latency.median_ns, latency.median_ns)
    return max(0.0, high - latency.median_ns) / 1e6, max(0.0, latency.median_ns - low) / 1e6


def _quality_arms(row: Row) -> tuple[float, float]:
    if row.quality is None:
        return 0.0, 0.0
    drop = row.quality.drop
    return (drop.value - drop.low) * 100, (drop.high - drop.value) * 100


def _range(rows: Sequence[Row]) -> Figure:
    """Fix the range where nothing differs: the automatic one would magnify nothing into a slope."""
    ends = [_height(row) + arm for row in rows for arm in (_quality_arms(row)[0], -_quality_arms(row)[1])]
    if not ends or max(ends) - min(ends) > FLAT:
        return {}
    middle = (max(ends) + min(ends)) / 2
    return {"range": [middle - FLAT, middle + FLAT]}


def _labels(special: Sequence[Row]) -> tuple[list[Figure], list[Figure]]:
    notes, lines = [], []
    xs = sorted(row.measurement.latency.median_ns for row in special)
    middle = (xs[0] * xs[-1]) ** 0.5 if xs else 0.0
    for lane, row in enumerate(special):
        x_ms = row.measurement.latency.median_ns / 1e6
        colour = MARKS[row.roles[0]][2]
        lines.append(
            {
                "type": "line",
                "x0": x_ms,
                "x1": x_ms,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "layer": "below",
                "line": {"width": 1, "dash": "dot", "color": colour},
            }
        )
        left = row.measurement.latency.median_ns <= middle
        notes.append(
            {
                "xref": "x",
                "x": _log10(x_ms),
                "yref": "paper",
                "y": 1,
                "yshift": LANE_PX * (len(special) - 1 - lane) + 12,
                "xanchor": "left" if left else "right",
                "xshift": -4 if left else 4,
                "showarrow": False,
                "text": f"<b>{', '.join(row.roles)}</b>  {fmt.duration(row.measurement.latency.median_ns)}",
                "font": {"size": 12, "color": colour},
            }
        )
    return notes, lines


def _log10(value: float) -> float:
    """Annotations on a log axis are placed by exponent; shapes by value."""
    return math.log10(value)


def _hover(row: Row) -> str:
    quality = row.quality
    lines = [
        *([f"<b>{', '.join(row.roles)}</b>"] if row.roles else []),
        escape(shorten(row.plan)),
        f"latency {fmt.interval(row.measurement.latency)}",
        f"over untouched {fmt.times(row.over_original)}",
        f"of the machine's limit {fmt.percent(row.efficiency)}",
        *([f"{quality.metric} {quality.value:.4f}, drop {fmt.drop(quality.drop)} on {row.split}"] if quality else []),
        f"file {fmt.size(row.measurement.resources.file_bytes)}",
    ]
    return "<br>".join(lines)


def escape(text: str) -> str:
    """Make a text safe for Plotly, which reads a little HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _operator_trace(limit: str, rows: Sequence[Row]) -> Figure:
    word, colour = LIMITS[limit]
    pieces = [
        (i, op)
        for i, row in enumerate(rows)
        if row.measurement.bound
        for op in sorted(row.measurement.bound.operators, key=lambda op: -(op.time_ns or 0.0))
        if op.limit == limit and op.time_ns
    ]
    texts = [_operator_hover(op) for _, op in pieces]
    return _bar(
        f"held by {word}", colour, [(i, op.time_ns or 0.0, t) for (i, op), t in zip(pieces, texts, strict=True)]
    )


def _outside_trace(rows: Sequence[Row]) -> Figure:
    pieces = [
        (i, bound.outside_ns, f"outside operators<br>{fmt.duration(bound.outside_ns)}")
        for i, row in enumerate(rows)
        if (bound := row.measurement.bound) and bound.outside_ns > 0
    ]
    return _bar("outside operators", "var(--outside)", pieces)


def _bar(name: str, colour: str, pieces: Sequence[tuple[int, float, str]]) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": [ns / 1e6 for _, ns, _ in pieces],
        "y": [i for i, _, _ in pieces],
        "text": [text for _, _, text in pieces],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": colour, "line": {"width": 0.6, "color": "var(--surface)"}},
    }


def _limit_trace(rows: Sequence[Row]) -> Figure:
    limits = [(i, bound.grouped_ns) for i, row in enumerate(rows) if (bound := row.measurement.bound)]
    marker = {"symbol": "line-ns-open", "size": 15, "color": "var(--ink)", "line": {"width": 2}}
    return _limits("the machine's limit", limits, marker)


def _winograd_trace(rows: Sequence[Row]) -> Figure:
    limits = [(i, second[0]) for i, row in enumerate(rows) if (second := winograd_limit(row.measurement.bound))]
    line = {"width": 1.5, "color": "var(--ink)"}
    marker = {"symbol": "diamond", "size": 8, "color": "var(--surface)", "line": line}
    return _limits("the same with Winograd's convolutions", limits, marker)


def _limits(name: str, limits: Sequence[tuple[int, float]], marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [ns / 1e6 for _, ns in limits],
        "y": [i for i, _ in limits],
        "text": [f"{name}: {fmt.duration(ns)}" for _, ns in limits],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": marker,
    }


def _bar_label(index: int, row: Row) -> Figure:
    role = f"<b>{', '.join(row.roles)}</b>  " if row.roles else ""
    total = f"{fmt.duration(row.measurement.latency.median_ns)}, {fmt.percent(row.efficiency)} of the limit"
    return {
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        "y": index,
        "yshift": 23,
        "showarrow": False,
        "align": "left",
        "text": f"{role}{escape(shorten(row.plan, 58))}  <b>{total}</b>",
        "font": {"size": 12, "color": "var(--ink)"},
    }


def _operator_hover(op: OperatorBound) -> str:
    work = f"{fmt.count(op.operations)} operations, {fmt.size(op.bytes)}"
    reached = fmt.percent(op.efficiency)
    return f"<b>{escape(op.kind)}</b> {escape(op.name)}<br>{fmt.duration(op.time_ns)}, {reached} of its limit<br>{work}"
