"""``hasten load``: put load on a service by a plan that is fixed before, and say what came back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hasten.artifact import Json
from hasten.cli import units
from hasten.cli.answer import COMMON, GOAL_NOT_MET, Answer, Common, Shown, python_answer
from hasten.cli.load_target import (
    CANNOT_TELL,
    TARGET,
    TargetOptions,
    check_long_enough,
    default_folder,
    payloads_for,
    python_lines,
    samples_of,
    target_of,
)
from hasten.cli.models import DATA, DataOptions
from hasten.cli.progress import telling
from hasten.errors import InvalidSetting
from hasten.load.accuracy import measure_accuracy, meets
from hasten.load.arrivals import Closed, Poisson, read_arrivals
from hasten.load.figures import Figures, figures_of
from hasten.load.generate import open_load
from hasten.load.objective import read_objective
from hasten.load.record import write_run
from hasten.load.run import LoadRun
from hasten.load.scenarios import (
    Name,
    ScenarioResult,
    arrivals_for,
    batch_for,
    check_objective,
    judge,
    scenario_of,
)
from hasten.load.target import LoadPlan, Target
from hasten.measure.percentiles import Percentile
from hasten.measure.statistics import runs_needed
from hasten.report import format as fmt

USUAL_RATE = 100.0
"""Requests a second where no arrivals are named."""

STATE_CODES = {"MEETS": 0, "MISSES": GOAL_NOT_MET, "INCONCLUSIVE": CANNOT_TELL, "INVALID": CANNOT_TELL}
STATE_STYLES = {"MEETS": "bold green", "MISSES": "bold red", "INCONCLUSIVE": "bold yellow", "INVALID": "bold red"}


def load(
    url: str,
    model: str | None = None,
    /,
    *,
    data: str | None = None,
    arrivals: str | None = None,
    duration: Annotated[float, units.read_by(units.seconds)] = 30.0,
    slo: str | None = None,
    scenario: Name | None = None,
    accuracy: bool = False,
    metric: str | None = None,
    target_quality: float | None = None,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    seed: Annotated[int, units.read_by(units.seed)] = 0,
    samples: DataOptions = DATA,
    target: TargetOptions = TARGET,
    common: Common = COMMON,
) -> Answer:
    r"""Put load on a service: an open loop whose every request is scheduled before the run, or a closed one.

    Response times count from the scheduled time, so a server that stalls is charged for every request that was due
    meanwhile. Refusals, timeouts and errors are counted as misses and end nothing. The record of the run is kept, for
    compare and gate.

    .. code-block:: console

        hasten load http://127.0.0.1:8000 net --data val.parquet \
            --arrivals poisson:rate=200 --slo "p99 <= 20ms"
        hasten load grpc://127.0.0.1:8001 net --data val.parquet \
            --arrivals closed:concurrency=8 -o runs/closed
        hasten load http://127.0.0.1:9000/score --protocol http --data bodies/ \
            --arrivals ramp:from=10,to=500
        hasten load http://127.0.0.1:8000 net --data val.parquet \
            --scenario single-stream --duration 600s
        hasten load http://127.0.0.1:8000 net --data val.parquet \
            --accuracy --target-quality 0.91

    Exit codes: 0; 1 where the run was cut short; with --slo 3 where it misses; 4 where the run cannot tell, because it
    is too short, the generator was too late to be believed, or a rule of its scenario is not kept. With --accuracy 3
    where the target quality is missed, 4 where the samples are too few to tell.

    Args:
        url: http://HOST:PORT, grpc://HOST:PORT; the whole URL of any HTTP endpoint with --protocol http; or the folder
            of a deployment, whose session then runs in the generator's own process.
        model: The model's name on the server.
        data: Samples, as every verb reads them; with --protocol http a file, or a folder of files, with bodies.
        arrivals: poisson:rate=200, constant:rate=, burst:rate=,size=,every=2s, ramp:from=,to=, trace:FILE (a time in
            seconds on each line, or a recorded run), closed:concurrency=8; by default poisson:rate=100.
        duration: How long requests leave, as 30s.
        slo: An objective, as "p99 <= 20ms".
        scenario: One of MLPerf's: it says how requests arrive, and its rules say whether the figure is valid.
        accuracy: MLPerf's accuracy mode, in place of load: every sample is sent once, over the same protocol, and the
            answers are judged by the labels of the samples.
        metric: With --accuracy: a metric's name, or module:function; by default what suits the labels.
        target_quality: With --accuracy: what the metric must reach, as 0.91.
        output: Folder for the record; by default one below --home.
        seed: Of the arrivals, and of the order of samples.
        samples: How samples are read.
        target: How the server is called.
        common: The options of every verb.
    """
    objective = None if slo is None else read_objective(slo)
    rules = None if scenario is None else scenario_of(scenario)
    told = None if arrivals is None else read_arrivals(arrivals)
    if rules is None:
        how = told or Poisson(rate=USUAL_RATE)
    else:
        how, target = arrivals_for(rules, told), replace(target, batch=batch_for(rules, target.batch))
        check_objective(rules, objective)
    plan = LoadPlan(arrivals=how, duration_s=duration, seed=seed, timeout_s=target.timeout)
    goal = target_of(url, model, target)
    if accuracy:
        return _accuracy(goal, data, metric, target_quality, samples=samples, options=target, common=common)
    if metric is not None or target_quality is not None:
        raise InvalidSetting("--metric and --target-quality judge answers; add --accuracy")
    if objective is not None and not isinstance(plan.arrivals, Closed):
        due = len(plan.arrivals.due_ns(duration, seed))
        check_long_enough(due, duration, runs_needed(objective.q, 0), objective.q)
    if common.show_python:
        return python_answer(*_python(url, model, data, target, plan))
    payloads = payloads_for(goal, data, samples, target)
    with open_load(goal, payloads, processes=target.processes) as opened, telling(f"load on {url}") as tell:
        run = opened.run(plan, progress=lambda ok, missed, share: tell(f"{ok} answered, {missed} missed", share))
    folder = output or default_folder(common.home, run)
    write_run(run, folder)
    figures = figures_of(run, objective)
    judged = None if rules is None else judge(run, rules, objective)
    document = document_of(run, figures, folder)
    shown: list[Shown] = [figures_table(figures), remarks(run, figures, folder)]
    code = code_of(run, figures)
    if judged is not None:
        document["scenario"] = msgspec.to_builtins(judged)
        shown.insert(1, scenario_lines(judged))
        code = code or (0 if judged.valid else CANNOT_TELL)
    return Answer(document=document, shown=shown, code=code)


def _accuracy(
    target: Target,
    data: str | None,
    metric: str | None,
    wanted: float | None,
    *,
    samples: DataOptions,
    options: TargetOptions,
    common: Common,
) -> Answer:
    """Send every sample once, and judge the answers."""
    if data is None:
        raise InvalidSetting("accuracy needs samples with labels; give them with --data")
    if common.show_python:
        told = f"target, samples, metric={metric!r}, batch={options.batch}, timeout_s={options.timeout!r}"
        return python_answer(
            *python_lines(target.url, target.model, data, options)[:-1],
            "from hasten.cli.load_target import samples_of",
            "from hasten.load.accuracy import measure_accuracy",
            f"samples = samples_of(target, {data!r}, DATA)",
            f"print(measure_accuracy({told}))",
        )
    read = samples_of(target, data, samples)
    with telling(f"accuracy of {target.url}") as tell:
        found = measure_accuracy(
            target, read, metric=metric, batch=options.batch, timeout_s=options.timeout, progress=tell
        )
    value = found.value
    line = Text.assemble(
        (f"{found.metric} {value.value:.4f}", "bold"),
        f"  95 % interval {value.low:.4f} to {value.high:.4f}, {value.n} samples in {fmt.seconds(found.seconds)}",
    )
    document: dict[str, Json] = {"url": target.url, "model": target.model, "accuracy": msgspec.to_builtins(found)}
    if wanted is None:
        return Answer(document=document, shown=[line], code=0)
    word = meets(found, wanted)
    document |= {"target_quality": wanted, "state": word}
    reached = "at least" if found.higher_is_better else "at most"
    verdict = Text.assemble((word, STATE_STYLES[word]), f"  {found.metric} is to be {reached} {wanted:g}")
    if word == "INCONCLUSIVE":
        verdict.append("; more samples narrow the interval")
    return Answer(document=document, shown=[line, verdict], code=STATE_CODES[word])


def code_of(run: LoadRun, figures: Figures) -> int:
    """Give the exit code of a run."""
    if run.cut_short is not None:
        return 1
    if figures.verdict is not None:
        return STATE_CODES[figures.verdict.state]
    return CANNOT_TELL if figures.invalid else 0


def document_of(run: LoadRun, figures: Figures, folder: Path) -> dict[str, Json]:
    """Give a run as a document, without its columns."""
    asked = {
        name: getattr(run, name)
        for name in ("url", "protocol", "model", "version", "arrivals", "seed", "duration_s", "timeout_s", "cut_short")
    }
    return {
        **asked,
        "record": str(folder),
        "figures": msgspec.to_builtins(figures),
        "conditions": dict(run.conditions),
    }


def figures_table(figures: Figures) -> RenderableType:
    """Draw a run: what became of its requests, its rates, and its percentiles with what stands behind each."""
    counts = Table(box=None, header_style="dim", pad_edge=False)
    cells = [
        ("sent", str(figures.sent)),
        ("ok", str(figures.ok)),
        ("refused", str(figures.refused)),
        ("timeouts", str(figures.timeouts)),
        ("errors", str(figures.errors)),
        ("sent/s", fmt.digits(figures.sent_rate)),
        ("answered/s", fmt.digits(figures.ok_rate)),
        ("samples/s", fmt.digits(figures.rows_rate)),
    ]
    for name, _ in cells:
        counts.add_column(name, justify="right")
    counts.add_row(*(cell for _, cell in cells))
    times = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("response", "time", "95 % interval", "requests"):
        times.add_column(name, justify="left" if name == "response" else "right")
    for found in figures.percentiles:
        times.add_row(*(Text(cell) for cell in (found.name, *_cells(found))))
    return Group(counts, Text(), times)


def scenario_lines(judged: ScenarioResult) -> RenderableType:
    """Write a scenario's figure, whether it is valid, and every rule that is not kept."""
    value = fmt.NONE
    if judged.value is not None:
        value = fmt.duration(judged.value) if "latency" in judged.metric else f"{fmt.digits(judged.value)}/s"
    state = ("VALID", "bold green") if judged.valid else ("INVALID", "bold red")
    broken = [f"{rule.rule} (here: {rule.found})" for rule in judged.rules if not rule.kept]
    text = Text.assemble("\n", (f"MLPerf {judged.scenario}: ", "bold"), f"{judged.metric} {value}  ", state)
    return text.append(f"\nNot to be put beside published figures: {'; '.join(broken)}." if broken else "")


def _cells(found: Percentile) -> tuple[str, str, str]:
    if found.value_ns is None:
        return fmt.NONE, found.why, str(found.n)
    high = "beyond the slowest" if found.high_ns is None else fmt.duration(found.high_ns)
    return fmt.duration(found.value_ns), f"{fmt.duration(found.low_ns)} to {high}", str(found.n)


def remarks(run: LoadRun, figures: Figures, folder: Path) -> RenderableType:
    """Write what numbers alone do not say: the generator's own delay, failures, the verdict, where the record is."""
    lines: list[Text] = [Text()]
    if figures.issue_delay_p99_ns is not None:
        own = f"{fmt.duration(figures.issue_delay_p50_ns)} at p50, {fmt.duration(figures.issue_delay_p99_ns)} at p99"
        lines.append(Text(f"The generator's own delay: {own}.", style="dim"))
    errors = run.conditions.get("errors")
    if isinstance(errors, dict):
        lines += [Text(f"{count} x {reason}", style="yellow") for reason, count in list(errors.items())[:5]]
    if figures.unsent:
        lines.append(Text(f"{figures.unsent} requests were never sent.", style="yellow"))
    if run.cut_short is not None:
        lines.append(Text(f"CUT SHORT: {run.cut_short}; what was measured until then is kept.", style="bold red"))
    if figures.verdict is not None:
        state = figures.verdict.state
        lines.append(
            Text.assemble((state, STATE_STYLES[state]), f"  {figures.verdict.objective}: {figures.verdict.why}.")
        )
    elif figures.invalid is not None:
        lines.append(Text.assemble(("INVALID", "bold red"), f"  {figures.invalid}."))
    lines.append(Text(f"Kept in {folder}.", style="dim"))
    return Group(*lines)


def _python(url: str, model: str | None, data: str | None, options: TargetOptions, plan: LoadPlan) -> list[str]:
    told = f"duration_s={plan.duration_s!r}, seed={plan.seed}, timeout_s={plan.timeout_s!r}"
    return [
        *python_lines(url, model, data, options),
        f"plan = LoadPlan(arrivals=read_arrivals({str(plan.arrivals)!r}), {told})",
        f"with open_load(target, payloads, processes={options.processes}) as load:",
        "    print(figures_of(load.run(plan)))",
    ]


__all__ = ["code_of", "document_of", "figures_table", "load", "remarks"]
