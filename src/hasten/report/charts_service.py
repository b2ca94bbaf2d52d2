"""Figures of a service: throughput against latency, where the time goes, how response times lie, and their course."""

from __future__ import annotations

from hasten.analyse.analysis import Analysis
from hasten.report import format as fmt
from hasten.report.charts import Figure, blank_layout
from hasten.report.service import PART_NAMES

PART_COLOURS = {
    "issue_delay": "var(--bad)",
    "transfer": "var(--muted)",
    "receive": "var(--line)",
    "decode": "var(--lossless)",
    "queue": "var(--original)",
    "batch_wait": "var(--overhead)",
    "pre": "var(--saved)",
    "infer": "var(--compute)",
    "post": "var(--saved)",
    "encode": "var(--lossless)",
    "send": "var(--line)",
    "transfer_back": "var(--outside)",
}
CURVES = ((0.5, "p50", "var(--compute)"), (0.9, "p90", "var(--memory)"), (0.99, "p99", "var(--original)"))


def service_figures(analysis: Analysis) -> dict[str, Figure]:
    """Give every figure that has something to show, by name."""
    made = {
        "curve": curve_figure(analysis),
        "waterfall": waterfall_figure(analysis),
        "distribution": distribution_figure(analysis),
        "timeline": timeline_figure(analysis),
    }
    return {name: figure for name, figure in made.items() if figure["data"]}


def curve_figure(analysis: Analysis) -> Figure:
    """Draw latency over throughput as measured, with intervals, and dotted as the model has it."""
    points = sorted(
        (p for p in analysis.curve if not p.arrivals.startswith("closed")), key=lambda p: p.throughput.value
    )
    data: list[Figure] = []
    for q, name, colour in CURVES:
        known = [(p, one) for p in points for one in p.percentiles if one.q == q and one.value_ns is not None]
        values = [(one.value_ns or 0.0) / 1e6 for _, one in known]
        highs = [((one.high_ns or one.value_ns or 0.0) / 1e6) for _, one in known]
        lows = [((one.low_ns or one.value_ns or 0.0) / 1e6) for _, one in known]
        arms = {
            "type": "data",
            "symmetric": False,
            "array": [high - value for high, value in zip(highs, values, strict=True)],
            "arrayminus": [value - low for low, value in zip(lows, values, strict=True)],
            "thickness": 1,
            "color": colour,
        }
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [p.throughput.value for p, _ in known],
                "y": values,
                "error_y": arms,
                "text": [f"{p.arrivals}<br>{name} {fmt.duration(one.value_ns)}, {one.n} requests" for p, one in known],
                "hovertemplate": "%{text}<extra></extra>",
                "line": {"color": colour, "width": 2},
            }
        )
    data += _modelled(analysis)
    layout = blank_layout(height=420)
    layout["margin"] = {"l": 72, "r": 24, "t": 16, "b": 60}
    layout["xaxis"] |= {"title": {"text": "answers a second"}, "rangemode": "tozero"}
    layout["yaxis"] |= {"title": {"text": "response time, ms (log scale)"}, "type": "log", "tickformat": "~g"}
    layout["legend"] = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    if analysis.objective is not None and points:
        limit_ms = analysis.objective.limit_ns / 1e6
        line = {"width": 1.5, "dash": "dash", "color": "var(--bad)"}
        layout["shapes"] = [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit_ms, "y1": limit_ms, "line": line}
        ]
    return {"data": [trace for trace in data if trace["x"]], "layout": layout}


def _modelled(analysis: Analysis) -> list[Figure]:
    if analysis.capacity is None:
        return []
    found = []
    for name, colour, values in (
        ("p50, model", "var(--compute)", [(p.rate, p.p50_ns) for p in analysis.capacity.points]),
        ("p99, model", "var(--original)", [(p.rate, p.p99_ns) for p in analysis.capacity.points]),
    ):
        known = sorted((rate, ns) for rate, ns in values if ns is not None)
        found.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [rate for rate, _ in known],
                "y": [ns / 1e6 for _, ns in known],
                "line": {"color": colour, "width": 1.5, "dash": "dot"},
            }
        )
    return found


def waterfall_figure(analysis: Analysis) -> Figure:
    """Draw the parts of a response at p50 and at p99 as bars that add up to it."""
    names = [share.part for share in analysis.bands[0].shares] if analysis.bands else []
    labels = [f"p{band.q * 100:g}  {fmt.duration(band.response_ns)}" for band in analysis.bands]
    data: list[Figure] = []
    for k, name in enumerate(names):
        shares = [band.shares[k] for band in analysis.bands]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": PART_NAMES[name],
                "x": [max(share.mean_ns.value, 0.0) / 1e6 for share in shares],
                "y": labels,
                "text": [
                    f"{PART_NAMES[name]}: {fmt.duration(s.mean_ns.value)}, {fmt.percent(s.share, 1)}" for s in shares
                ],
                "textposition": "none",
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {"color": PART_COLOURS[name], "line": {"width": 0.6, "color": "var(--surface)"}},
            }
        )
    drawn_px, below_px = 32 + 70 * len(labels), 130
    layout = blank_layout(height=8 + drawn_px + below_px)
    layout |= {"barmode": "stack", "bargap": 0.4, "margin": {"l": 130, "r": 24, "t": 8, "b": below_px}}
    layout["xaxis"] |= {"title": {"text": "ms"}}
    layout["yaxis"] |= {"autorange": "reversed"}
    below_title = -64 / drawn_px
    layout["legend"] = {"orientation": "h", "y": below_title, "yanchor": "top", "x": 0, "traceorder": "normal"}
    return {"data": data, "layout": layout}


def distribution_figure(analysis: Analysis) -> Figure:
    """Draw how response times lie, on a logarithmic axis."""
    bins = analysis.distribution
    layout = blank_layout(height=300)
    layout["margin"] = {"l": 72, "r": 24, "t": 8, "b": 60}
    layout["xaxis"] |= {"type": "log", "title": {"text": "response time, ms (log scale)"}, "tickformat": "~g"}
    layout["yaxis"] |= {"title": {"text": "answers"}}
    steps = {
        "type": "scatter",
        "mode": "lines",
        "line": {"shape": "hv", "color": "var(--compute)", "width": 1.5},
        "fill": "tozeroy",
        "x": [one.low_ns / 1e6 for one in bins],
        "y": [one.answers for one in bins],
        "showlegend": False,
    }
    return {"data": [steps] if bins else [], "layout": layout}


def timeline_figure(analysis: Analysis) -> Figure:
    """Draw the run's course: the median and the slowest of each stretch, and what got no answer."""
    moments = analysis.timeline
    layout = blank_layout(height=320)
    layout["margin"] = {"l": 72, "r": 24, "t": 16, "b": 60}
    layout["xaxis"] |= {"title": {"text": "seconds since the run began"}}
    layout["yaxis"] |= {"type": "log", "title": {"text": "response time, ms (log scale)"}, "tickformat": "~g"}
    layout["legend"] = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
    data: list[Figure] = []
    for name, colour, values in (
        ("slowest", "var(--original)", [(m.at_s, m.slowest_ns) for m in moments]),
        ("median", "var(--compute)", [(m.at_s, m.median_ns) for m in moments]),
    ):
        known = [(at, ns) for at, ns in values if ns]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [at for at, _ in known],
                "y": [ns / 1e6 for _, ns in known],
                "line": {"color": colour, "width": 1.5},
            }
        )
    missed = [m for m in moments if m.misses]
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "without an answer",
            "x": [m.at_s for m in missed],
            "y": [(m.slowest_ns or 1e6) / 1e6 for m in missed],
            "text": [f"{m.misses} of {m.requests} without an answer" for m in missed],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"symbol": "x", "size": 9, "color": "var(--bad)"},
        }
    )
    return {"data": [trace for trace in data if trace["x"]], "layout": layout}
