"""``hasten measure``: time a model in one engine, or in several side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hasten.artifact import Artifact
from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, Shown, Verbatim, python_answer
from hasten.cli.models import DATA, DataOptions, find_model, import_lines, stand_in_samples
from hasten.engine import CPU, Engine, device_of
from hasten.errors import HastenError, InvalidSetting
from hasten.host import load_since, this_host, ticks, versions
from hasten.isolation import Limits
from hasten.measure.compare import Comparison, compare
from hasten.measure.peaks import measure_peaks
from hasten.measure.roofline import bound
from hasten.measure.worker import IsolatedSession, cpus_for, open_isolated
from hasten.measurement import Bound, Conditions, Latency, Ratio, Resources
from hasten.plan import Inputs, Part, Plan, run_plan_isolated
from hasten.report import format as fmt
from hasten.report.blocks import Blocks, over_interval
from hasten.report.remarks import (
    MEMORY,
    grouped,
    limit_remarks,
    profile_remarks,
    timing_remarks,
    winograd_remarks,
)
from hasten.samples import Samples
from hasten.store import Store

PROFILED_RUNS = 50


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One engine's figures. ``over_first``: the first engine's time over this one's; None for the first itself.

    ``bound`` is None on a GPU, whose limits are not measured.
    """

    engine: str
    latency: Latency
    over_first: Ratio | None
    resources: Resources
    bound: Bound | None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All engines, compared block by block, and those that failed, by name with the reason."""

    measured: tuple[Measured, ...]
    failures: dict[str, str]
    conditions: Conditions


def measure(
    model: str,
    /,
    *,
    engine: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = ("onnxruntime",),
    data: str | None = None,
    samples: DataOptions = DATA,
    batch: int = 1,
    budget: Annotated[float, units.read_by(units.seconds)] = 15.0,
    precision: Annotated[float, units.read_by(units.share)] = 0.01,
    operators: bool = False,
    state: Path | None = None,
    seed: Annotated[int, units.read_by(units.seed)] = 0,
    common: Common = COMMON,
) -> Answer:
    r"""Time a model in one engine, or in several side by side, each in a process of its own with pinned threads.

    Several engines take turns in random order, so what drifts on the machine drifts for all of them. Every latency
    and every ratio comes with its 95 % interval; the limit is this machine's own, from measured peaks.

    .. code-block:: console

        hasten measure model.onnx
        hasten measure model.onnx --engine onnxruntime:threads=1 \
            --engine openvino:threads=1
        hasten measure model.onnx --data val.parquet --batch 8 --operators

    Args:
        model: An ONNX file, an exported program (.pt2), module.py:factory, or a digest in the store.
        engine: An engine, with settings after a colon; repeat it to compare. The first one is the baseline.
        data: Samples to run; without them, random ones that fit the inputs.
        batch: Samples in one run.
        budget: Time for the comparison, as 15s; it ends sooner where the precision is reached.
        precision: Half-width of the ratios' intervals that is asked for, as 1%.
        operators: List the operators that each engine really runs.
        state: Weights for module.py:factory.
        seed: Of the order, and of random samples.
        samples: How samples are read.
        common: The options of every verb.
    """
    parts = [units.part(text) for text in engine]
    if len({str(part) for part in parts}) < len(parts):
        raise InvalidSetting("the same engine with the same settings is named twice; give each other settings")
    for part in parts:
        Plan(part).load_engine()
    if common.show_python:
        return python_answer(*_python(parts, model, data, samples, state, common, batch, budget, precision, seed))
    store = Store(common.home)
    source = find_model(model, store, state=state)
    rows = samples.read(data, source) if data else stand_in_samples(source, rows=max(64, batch), seed=seed)
    found = measure_engines(source, rows, parts, store, batch=batch, budget_s=budget, precision=precision, seed=seed)
    shown: list[Shown] = [figures_table(found), conditions_line(found.conditions, real=data is not None)]
    shown += [operators_table(item.engine, item.bound) for item in found.measured if operators and item.bound]
    return Answer(document=msgspec.to_builtins(found), shown=shown, code=0 if found.measured else 1)


def measure_engines(
    source: Artifact,
    samples: Samples,
    engines: Sequence[Part],
    store: Store,
    *,
    batch: int = 1,
    budget_s: float = 15.0,
    precision: float = 0.01,
    seed: int = 0,
) -> Figures:
    """Build a model for each engine, compare them interleaved, and put each beside this machine's limit.

    An engine that fails is left out and named with its reason, unless it is the only one.

    Raises:
        HastenError: no engine could be measured; the first one's error.
    """
    since, started = ticks(), datetime.now(UTC).isoformat(timespec="seconds")
    failures: dict[str, HastenError] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(store.scratch())
        samples.save(folder)
        sessions: list[IsolatedSession] = []
        for part in engines:
            try:
                sessions.append(stack.enter_context(_open(part, source, store, folder, batch=batch, seed=seed)))
            except HastenError as error:
                failures[str(part)] = error
        if not sessions:
            raise next(iter(failures.values()))
        result = compare(sessions, budget_s=budget_s, precision=precision, seed=seed)
        failures |= result.failures
        loaded = {str(part): Plan(part).load_engine() for part in engines}
        threads = {name: int(engine.threads) for name, engine in loaded.items()}
        measured = []
        for session in (session for session in sessions if session.name not in result.failures):
            try:
                measured.append(_figures(session, result, loaded[session.name], store.root))
            except HastenError as error:
                failures[session.name] = error
    if not measured:
        raise next(iter(failures.values()))
    conditions = Conditions(
        host=this_host(),
        load=load_since(since),
        threads=max(threads.values()),
        batch=batch,
        versions=versions(),
        started=started,
    )
    reasons = {name: str(error) for name, error in failures.items()}
    return Figures(measured=tuple(measured), failures=reasons, conditions=conditions)


def _open(part: Part, source: Artifact, store: Store, folder: Path, *, batch: int, seed: int) -> IsolatedSession:
    plan = Plan(part)
    built = run_plan_isolated(plan, source, Inputs(store=store, samples=folder, seed=seed), limits=Limits())
    limits = Limits(cpus=cpus_for(plan.threads))
    return open_isolated(part, built, store, folder, batch=batch, limits=limits, seed=seed, name=str(part))


def _figures(session: IsolatedSession, result: Comparison, engine: Engine, home: Path) -> Measured:
    latency = result.latency(session.name)
    first = result.names[0]
    compared = session.name != first and first not in result.failures
    return Measured(
        engine=session.name,
        latency=latency,
        over_first=result.ratio(first, session.name) if compared else None,
        resources=session.resources(),
        bound=_limit(session, engine, latency, home) if device_of(engine) == CPU else None,
    )


def _limit(session: IsolatedSession, engine: Engine, latency: Latency, home: Path) -> Bound:
    return bound(session.operators(PROFILED_RUNS), measure_peaks(engine.threads, home=home), latency.median_ns)


def figures_table(found: Figures) -> RenderableType:
    """Draw the engines, each with its numbers under its name, and under them what numbers alone do not say."""
    names = ("latency", "p99", "over the\nfirst", "of\nlimit", "load", "first\nrun", "file", "memory")
    rows = [(Text(item.engine, style="bold"), _cells(item)) for item in found.measured]
    failed = [Text.assemble((name, "bold"), (f"\n{reason}", "red")) for name, reason in found.failures.items()]
    return Group(Blocks(names, rows), *failed, *(Text(line, style="dim") for line in remark_lines(found)))


def remark_lines(found: Figures) -> list[str]:
    """Give what must be known of the figures: warm-ups that never settled, the second limit, what was scaled."""
    said = []
    for item in found.measured:
        if item.bound is None:
            of_limit = ["runs on a GPU: its limit is not measured, and its memory is not this process's"]
        else:
            of_limit = [*winograd_remarks(item.bound), *limit_remarks(item.bound), *profile_remarks(item.bound)]
        said.append((item.engine, [*timing_remarks(item.latency), *of_limit]))
    return grouped(said)


def _cells(item: Measured) -> tuple[str, ...]:
    return (
        over_interval(fmt.interval(item.latency)),
        fmt.duration(item.latency.p99_ns),
        over_interval(fmt.times(item.over_first)),
        "" if item.bound is None else fmt.percent(item.bound.efficiency),
        fmt.duration(item.resources.load_ns),
        fmt.duration(item.latency.first_run_ns),
        fmt.size(item.resources.file_bytes),
        fmt.size(item.resources.rss_bytes),
    )


def operators_table(engine: str, limit: Bound) -> Table:
    """Draw the operators of one engine, the slowest first; with the time outside them they add up to the latency."""
    title = Text(engine, style="table.title")
    table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    table.add_column("operator", overflow="fold")
    for name in ("kind", "dtype", "time", "limit", "of limit", "held by"):
        table.add_column(name, justify="right" if name in ("time", "limit", "of limit") else "left")
    for op in sorted(limit.operators, key=lambda op: -(op.time_ns or 0.0)):
        times = (fmt.duration(op.time_ns), fmt.duration(op.bound_ns), fmt.percent(op.efficiency))
        table.add_row(Text(op.name), Text(op.kind), Text(op.dtype), *times, op.limit)
    table.add_row("outside operators", "", "", fmt.duration(limit.outside_ns))
    table.add_row("all", "", "", fmt.duration(limit.measured_ns), style="bold")
    return table


def conditions_line(conditions: Conditions, *, real: bool) -> Verbatim:
    """Write what the figures hold for."""
    load = conditions.load
    steal = "" if load.steal_share is None else f", {fmt.percent(load.steal_share, 1)} stolen"
    source = "the samples given" if real else "random samples"
    return Verbatim(
        f"\nBatch {conditions.batch}, {source}; {conditions.host.cpu}, load {load.load_average:.2f}{steal}. "
        f"Square brackets are 95 % intervals. {MEMORY}"
    )


def _python(
    parts: Sequence[Part],
    model: str,
    data: str | None,
    samples: DataOptions,
    state: Path | None,
    common: Common,
    batch: int,
    budget: float,
    precision: float,
    seed: int,
) -> list[str]:
    told = ", ".join(f"hasten.Part({part.name!r}, {part.settings!r})" for part in parts)
    lines = [*import_lines(model, common.home, state), "from hasten.cli.measure import measure_engines"]
    if data is None:
        lines += [
            "from hasten.cli.models import stand_in_samples",
            "",
            f"samples = stand_in_samples(model, rows={max(64, batch)}, seed={seed})",
        ]
    else:
        more = "".join(f", {line}" for line in samples.python())
        lines += ["", f"samples = hasten.read_samples({data!r}, model.signature{more}).samples"]
    return [
        *lines,
        "found = measure_engines(",
        f"    model, samples, [{told}], store,",
        f"    batch={batch}, budget_s={budget!r}, precision={precision!r}, seed={seed},",
        ")",
        "for item in found.measured:",
        "    print(item.engine, item.latency.median_ns, item.bound and item.bound.efficiency)",
    ]
