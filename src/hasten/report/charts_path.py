"""The waterfall: time, quality and file size after each step from the untouched model to the chosen plan."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.artifact import Json
from hasten.report import format as fmt
from hasten.report.charts import Figure, blank_layout, escape, shorten
from hasten.report.path import Step, change

ROW_PX = 56
LABEL_PX = 21
"""From a bar's middle up to the middle of its label."""

PANELS: tuple[tuple[float, float], ...] = ((0.0, 0.54), (0.6, 0.79), (0.85, 1.0))
"""Shares of the width for time, quality and size."""

LONGEST_NAME = 46
BAR = 0.3
FULL = 1.06
"""A panel's range over its largest value."""


def waterfall_figure(steps: Sequence[Step], metric: str) -> Figure:
    """Draw the path: a row a step; what it saved or cost hangs between the row's time and the one's above."""
    layout = blank_layout(height=112 + ROW_PX * len(steps))
    layout |= {"barmode": "overlay", "showlegend": False, "margin": {"l": 12, "r": 16, "t": 36, "b": 56}}
    axis = layout["xaxis"]
    longest_ms = max((step.latency.median_ns for step in steps), default=1.0) / 1e6
    largest = max((step.file_bytes for step in steps), default=1)
    unit, scale = _unit(largest)
    zero = {"zeroline": True, "zerolinecolor": "var(--muted)"}
    layout["xaxis"] = {**axis, **_panel(0, "time of one run, ms"), "range": [0, longest_ms * FULL]}
    layout["xaxis2"] = {**axis, **zero, **_panel(1, f"{escape(shorten(metric, 18))}, change in %"), **_changes(steps)}
    layout["xaxis3"] = {**axis, **_panel(2, f"file, {unit}"), "range": [0, largest / scale * FULL]}
    layout["yaxis"] |= {"visible": False, "range": [len(steps) - 0.5, -0.75]}
    layout["annotations"] = [note for i, step in enumerate(steps) for note in _labels(i, step)]
    layout["shapes"] = [_connector(i, step) for i, step in enumerate(steps[:-1])]
    data = [_times(steps), _differences(steps), _qualities(steps), _sizes(steps, scale)]
    return {"data": [trace for trace in data if trace["x"]], "layout": layout}


def _times(steps: Sequence[Step]) -> Figure:
    colours = ["var(--line)"] * len(steps)
    if steps:
        colours[0], colours[-1] = "var(--original)", "var(--chosen)"
    return {
        **_bar("time", steps),
        "x": [step.latency.median_ns / 1e6 for step in steps],
        "marker": {"color": list(colours)},
    }


def _differences(steps: Sequence[Step]) -> Figure:
    """Hang each change between the two times that it joins: green where time was saved, red where it was lost."""
    changed = [(i, step, step.change_ns) for i, step in enumerate(steps) if step.change_ns is not None]
    return {
        **_bar("change", [step for _, step, _ in changed]),
        "x": [-ns / 1e6 for _, _, ns in changed],
        "base": [step.latency.median_ns / 1e6 for _, step, _ in changed],
        "y": [i for i, _, _ in changed],
        "marker": {"color": ["var(--saved)" if ns <= 0 else "var(--bad)" for _, _, ns in changed]},
    }


def _qualities(steps: Sequence[Step]) -> Figure:
    judged = [(i, step, step.quality.drop) for i, step in enumerate(steps) if step.quality]
    return {
        "type": "scatter",
        "mode": "markers",
        "xaxis": "x2",
        "x": [0.0 - drop.value * 100 for _, _, drop in judged],
        "y": [i for i, _, _ in judged],
        "text": [_hover(step) for _, step, _ in judged],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"size": 9, "color": "var(--accent)"},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [(drop.value - drop.low) * 100 for _, _, drop in judged],
            "arrayminus": [(drop.high - drop.value) * 100 for _, _, drop in judged],
            "thickness": 1.5,
            "width": 4,
            "color": "var(--accent)",
        },
    }


def _sizes(steps: Sequence[Step], scale: float) -> Figure:
    return {
        **_bar("file", steps),
        "xaxis": "x3",
        "x": [step.file_bytes / scale for step in steps],
        "marker": {"color": "var(--outside)"},
    }


def _bar(name: str, steps: Sequence[Step]) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "width": BAR,
        "y": list(range(len(steps))),
        "text": [_hover(step) for step in steps],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
    }


def _labels(row: int, step: Step) -> list[Figure]:
    time = f"<b>{fmt.duration(step.latency.median_ns)}</b>"
    delta = f"  {change(step)}" if step.change_ns is not None else ""
    quality = "not judged" if step.quality is None else f"<b>{step.quality.value:.4f}</b>"
    texts = (
        f"{escape(shorten(step.name, LONGEST_NAME))}  {time}{delta}",
        quality,
        f"<b>{fmt.size(step.file_bytes)}</b>",
    )
    return [
        {
            "xref": "paper",
            "x": PANELS[panel][0],
            "xanchor": "left",
            "y": row,
            "yshift": LABEL_PX,
            "showarrow": False,
            "align": "left",
            "bgcolor": "var(--surface)",
            "text": text,
            "font": {"size": 12, "color": "var(--ink)"},
        }
        for panel, text in enumerate(texts)
    ]


def _connector(row: int, step: Step) -> Figure:
    x_ms = step.latency.median_ns / 1e6
    line = {"width": 1, "dash": "dot", "color": "var(--muted)"}
    ends = {"x0": x_ms, "x1": x_ms, "y0": row + BAR / 2, "y1": row + 1 - BAR / 2}
    return {"type": "line", "layer": "below", "line": line, **ends}


def _panel(index: int, title: str) -> Figure:
    first, last = PANELS[index]
    return {"title": {"text": title, "font": {"size": 12}}, "domain": [first, last], "nticks": 3 if index else 7}


def _changes(steps: Sequence[Step]) -> Figure:
    """Fix the range of the quality's panel: around nothing, a tenth of a point at least."""
    ends = [end * -100 for step in steps if step.quality for end in (step.quality.drop.low, step.quality.drop.high)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = max(0.05, (high - low) * 0.08)
    return {"range": [low - room, high + room]}


def _unit(largest: float) -> tuple[str, float]:
    return next(
        (unit, scale)
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
        if largest >= scale or scale == 1.0
    )


def _hover(step: Step) -> str:
    together = ["measured only together:"] if len(step.parts) > 1 else []
    quality: Json = (
        step.quality and f"{escape(step.quality.metric)} {step.quality.value:.4f}, drop {fmt.drop(step.quality.drop)}"
    )
    lines = [
        *together,
        *(escape(shorten(part)) for part in step.parts),
        f"latency {fmt.interval(step.latency)}",
        f"over untouched {fmt.times(step.over_original)}",
        *([quality] if quality else []),
        f"file {fmt.size(step.file_bytes)}",
    ]
    return "<br>".join(lines)
