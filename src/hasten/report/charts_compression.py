"""Plotly figures about compression: a heat map of sensitivity, the predicted front, the curves of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

from hasten.artifact import Json
from hasten.report import format as fmt
from hasten.report.charts import Figure, blank_layout, escape, shorten
from hasten.report.compression import called, kept_units, number, placed_cells, plan_text
from hasten.search.compression import Cell, Curve, Prediction
from hasten.search.result import Result

HEAT: list[Json] = [[0.0, "var(--heatlow)"], [0.35, "var(--heatmid)"], [1.0, "var(--heathigh)"]]
DECADES = 4
"""Powers of ten that the heat map tells apart under its largest value: less is as good as nothing."""

CHOSEN, OTHERS = ("chosen", "accent", "lossless"), ("original", "muted", "memory", "overhead", "bad")
"""Colours of the training passes of the chosen plan, and of those of the others, in turn."""

GROUP_PX = 18
LOGARITHMIC = 8.0
"""Where the largest value is so many times the smallest, an axis is logarithmic."""


def sensitivity_figure(cells: Sequence[Cell], result: Result) -> Figure:
    """Draw a row a group, a piece a width, its colour the KL divergence; a point marks what the chosen plan keeps."""
    rows = placed_cells(cells)
    pieces = [(i, placed) for i, row in enumerate(rows.values()) for placed in row]
    low, high = _heat_range(cells)
    bars = {
        "type": "bar",
        "orientation": "h",
        "showlegend": False,
        "width": 0.88,
        "y": [i for i, _ in pieces],
        "base": [placed.left * 100 for _, placed in pieces],
        "x": [(placed.right - placed.left) * 100 for _, placed in pieces],
        "text": [_cell_hover(placed.cell, result.metric) for _, placed in pieces],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "color": [math.log10(max(placed.cell.kl, 10**low)) for _, placed in pieces],
            "cmin": low,
            "cmax": high,
            "colorscale": HEAT,
            "line": {"width": 0.5, "color": "var(--surface)"},
            "colorbar": _colour_bar(low, high),
        },
    }
    sizes = {cell.group: cell.size for cell in cells}
    layout = blank_layout(height=150 + GROUP_PX * max(4, len(rows)))
    layout |= {"margin": {"l": 24, "r": 24, "t": 64, "b": 76}, "bargap": 0}
    layout["xaxis"] |= {
        "title": {"text": "units kept, %", "font": {"size": 13}, "standoff": 28},
        "range": [0, 101],
        "showgrid": False,
    }
    layout["yaxis"] |= {
        "range": [len(rows) - 0.45, -0.55],
        "showgrid": False,
        "automargin": True,
        "tickvals": list(range(len(rows))),
        "ticktext": [f"{escape(shorten(group, 40))} ({sizes[group]}) " for group in rows],
        "tickfont": {"size": 11},
    }
    layout["legend"] = {"orientation": "h", "x": 0, "y": -56 / (GROUP_PX * max(4, len(rows))), "yanchor": "top"}
    traces = [bars, _kept_trace(kept_units(result.trial(result.chosen).plan), list(rows), sizes)]
    return {"data": [trace for trace in traces if trace["x"]], "layout": layout}


def prediction_figure(predictions: Sequence[Prediction], result: Result) -> Figure:
    """Draw predicted against measured time beside the diagonal, and the front: time against predicted cost."""
    built = [p for p in predictions if p.measured_ns]
    refitted = [p for p in built if p.refitted_ns is not None]
    before = {"symbol": "circle-open", "size": 9, "color": "var(--overhead)", "line": {"width": 2}}
    after = {"symbol": "circle", "size": 9, "color": "var(--accent)"}
    texts = {p.plan: _prediction_hover(p, result) for p in predictions}
    front = sorted(predictions, key=_predicted_ns)
    measured = sorted(built, key=lambda p: p.measured_ns or 0.0)
    line = {"width": 1.5, "color": "var(--accent)", "dash": "dot"}
    traces = [
        _dots("before the refit", [(_ms(p.first_ns), _ms(p.measured_ns), texts[p.plan]) for p in built], before),
        _dots("after the refit", [(_ms(p.refitted_ns), _ms(p.measured_ns), texts[p.plan]) for p in refitted], after),
        _dots("predicted front", [(_ms(_predicted_ns(p)), p.sensitivity, texts[p.plan]) for p in front], after)
        | {"mode": "lines", "line": line, "xaxis": "x2", "yaxis": "y2"},
        _dots(
            "measured",
            [(_ms(p.measured_ns), p.sensitivity, texts[p.plan]) for p in measured],
            {"symbol": "diamond", "size": 9, "color": "var(--chosen)"},
        )
        | {"xaxis": "x2", "yaxis": "y2"},
    ]
    return {"data": [trace for trace in traces if trace["x"]], "layout": _prediction_layout(predictions)}


def curves_figure(curves: Sequence[Curve], result: Result) -> Figure:
    """Draw a line a training pass: its loss, and dotted below the same colour that on held-out rows."""
    layout = blank_layout(height=400 + 22 * (len(curves) // 4))
    layout["margin"] = {"l": 72, "r": 24, "t": 36, "b": 96}
    losses = [loss for curve in curves for p in curve.epochs for loss in (p.loss, p.held) if loss is not None]
    layout["xaxis"] |= {"title": {"text": "epoch", "font": {"size": 13}}, "tickformat": "d"}
    layout["yaxis"] |= {"title": {"text": "loss", "font": {"size": 13}}, **_scale(losses), "tickformat": "~g"}
    layout["legend"] = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    colours = {True: cycle(CHOSEN), False: cycle(OTHERS)}
    traces = []
    for curve in curves:
        mine = curve.plan == result.chosen
        colour = f"var(--{next(colours[mine])})"
        traces += _curve_traces(curve, f"{called(result, curve.plan)}, {curve.step}", colour, width=3 if mine else 1.5)
    return {"data": [trace for trace in traces if trace["x"]], "layout": layout}


def _heat_range(cells: Sequence[Cell]) -> tuple[float, float]:
    """Give the ends of the colours as powers of ten."""
    largest = max((cell.kl for cell in cells if cell.kl > 0), default=1.0)
    smallest = min((cell.kl for cell in cells if cell.kl > 0), default=largest)
    high = math.log10(largest)
    return min(max(math.log10(smallest), high - DECADES), high - 0.5), high


def _colour_bar(low: float, high: float) -> Figure:
    ticks = [power for power in range(math.floor(low), math.ceil(high) + 1) if low <= power <= high]
    marks = [float(power) for power in ticks] if len(ticks) > 1 else [low, high]
    return {
        "orientation": "h",
        "x": 1,
        "xanchor": "right",
        "y": 1,
        "yanchor": "bottom",
        "len": 0.4,
        "thickness": 10,
        "outlinewidth": 0,
        "title": {"text": "KL divergence, nats", "side": "top", "font": {"size": 12}},
        "tickvals": list(marks),
        "ticktext": [f"{10**mark:.2g}" for mark in marks],
    }


def _kept_trace(kept: Mapping[str, int], groups: Sequence[str], sizes: Mapping[str, int]) -> Figure:
    marked = [(i, group) for i, group in enumerate(groups) if group in kept]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "kept by the chosen plan",
        "showlegend": True,
        "x": [100 * kept[group] / sizes[group] for _, group in marked],
        "y": [i for i, _ in marked],
        "hoverinfo": "skip",
        "marker": {"size": 9, "color": "var(--ink)", "line": {"width": 2, "color": "var(--surface)"}},
    }


def _cell_hover(cell: Cell, metric: str) -> str:
    lines = [
        f"<b>{escape(shorten(cell.group))}</b>",
        f"{cell.units} of {cell.size} units kept",
        f"KL divergence {number(cell.kl)} nats",
        *([f"{escape(metric)} {cell.metric:.4f}"] if cell.metric is not None else []),
        *([f"predicted {fmt.duration(cell.ns)}"] if cell.ns is not None else []),
    ]
    return "<br>".join(lines)


def _predicted_ns(prediction: Prediction) -> float:
    return prediction.first_ns if prediction.refitted_ns is None else prediction.refitted_ns


def _ms(ns: float | None) -> float | None:
    return None if ns is None else ns / 1e6


def _dots(name: str, points: Sequence[tuple[Json, Json, str]], marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for x, _, _ in points],
        "y": [y for _, y, _ in points],
        "text": [text for _, _, text in points],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": marker,
    }


def _prediction_layout(predictions: Sequence[Prediction]) -> Figure:
    layout = blank_layout(height=430)
    layout["margin"] = {"l": 72, "r": 24, "t": 36, "b": 96}
    layout["legend"] = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    times = [ns / 1e6 for p in predictions if p.measured_ns for ns in (p.first_ns, p.refitted_ns, p.measured_ns) if ns]
    axis = {"tickformat": "~g"}
    second: Figure = {"domain": [0.56, 1.0] if times else [0.0, 1.0]}
    layout["xaxis2"] = {
        **layout["xaxis"],
        **axis,
        **second,
        "anchor": "y2",
        "title": {"text": "time of one run, ms", "font": {"size": 13}},
    }
    costs = [p.sensitivity for p in predictions]
    layout["yaxis2"] = {
        **layout["yaxis"],
        **axis,
        **_scale(costs),
        "anchor": "x2",
        "title": {"text": "predicted cost: KL divergence, nats", "font": {"size": 13}},
    }
    layout["xaxis"] |= {
        **axis,
        "domain": [0.0, 0.44],
        "title": {"text": "predicted, ms", "font": {"size": 13}},
        "visible": bool(times),
    }
    layout["yaxis"] |= {**axis, "title": {"text": "measured, ms", "font": {"size": 13}}, "visible": bool(times)}
    if times:
        ends = [min(times) * 0.92, max(times) * 1.08]
        layout["xaxis"]["range"] = layout["yaxis"]["range"] = ends
        line = {"width": 1, "color": "var(--muted)"}
        corners = {"x0": ends[0], "y0": ends[0], "x1": ends[1], "y1": ends[1]}
        layout["shapes"] = [{"type": "line", "layer": "below", "line": line, **corners}]
    return layout


def _prediction_hover(prediction: Prediction, result: Result) -> str:
    lines = [
        f"<b>{escape(called(result, prediction.plan))}</b>",
        escape(shorten(plan_text(result, prediction.plan))),
        f"predicted {fmt.duration(prediction.first_ns)}, after the refit {fmt.duration(prediction.refitted_ns)}",
        f"measured {fmt.duration(prediction.measured_ns)}",
        f"predicted cost {number(prediction.sensitivity)} nats",
    ]
    return "<br>".join(lines)


def _curve_traces(curve: Curve, name: str, colour: str, *, width: float) -> list[Figure]:
    held = [(point.number, point.held) for point in curve.epochs if point.held is not None]
    ending = f"<br>ended early: {escape(curve.stopped)}" if curve.stopped else ""
    lines = [("loss", [(p.number, p.loss) for p in curve.epochs], "solid"), ("held out", held, "dot")]
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(name),
            "legendgroup": f"{curve.plan} {curve.step}",
            "showlegend": word == "loss",
            "x": [epoch for epoch, _ in points],
            "y": [loss for _, loss in points],
            "text": [
                f"<b>{escape(name)}</b><br>epoch {epoch}, {word} {number(loss)}{ending}" for epoch, loss in points
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": colour, "width": width, "dash": dash},
            "marker": {"size": 5, "color": colour},
        }
        for word, points, dash in lines
    ]


def _scale(values: Sequence[float]) -> Figure:
    """Choose a logarithmic axis for what spans a wide range above nothing; its labels are few enough to be read."""
    if not values or not max(values) > LOGARITHMIC * min(values) > 0:
        return {}
    return {"type": "log", "dtick": 1 if max(values) > 100 * min(values) else "D2"}
