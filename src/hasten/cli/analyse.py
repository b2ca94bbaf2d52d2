"""``hasten analyse``: where each millisecond of a service goes, why slow requests are slow, and what it can carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.text import Text

from hasten.analyse.analysis import Analysis, analyse_run
from hasten.analyse.highest_rate import Rules
from hasten.analyse.host_samples import read_host, write_host
from hasten.analyse.live import Look, look_at
from hasten.cli import units
from hasten.cli.answer import COMMON, GOAL_NOT_MET, Answer, Common, python_answer
from hasten.cli.load_target import CANNOT_TELL, TARGET, TargetOptions, default_folder, payloads_for, target_of
from hasten.cli.models import DATA, DataOptions
from hasten.cli.progress import telling
from hasten.errors import InvalidSetting
from hasten.load.arrivals import Closed, read_arrivals
from hasten.load.generate import open_load
from hasten.load.objective import Objective, read_objective
from hasten.load.record import RUN, read_run, write_run
from hasten.report.export import export as export_to
from hasten.report.service import csv_of, markdown_of
from hasten.report.service_html import write_service_html
from hasten.report.service_table import service_table
from hasten.store import write_atomically

PAGE, DOCUMENT, MARKDOWN, NUMBERS = "analysis.html", "analysis.json", "analysis.md", "analysis.csv"


@Parameter(name="*", group="What is looked at")
@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """How long, and how far."""

    arrivals: str | None = None
    """The load that is looked at closely, as poisson:rate=200; by default 60 % of what saturates the service."""
    duration: Annotated[float, units.read_by(units.seconds)] = 20.0
    """How long that load lasts."""
    curve: Annotated[float | None, units.read_by(units.seconds)] = 3.0
    """How long each point of the throughput-latency curve takes."""
    no_curve: bool = False
    """Leave the curve out."""
    search: Annotated[float, units.read_by(units.seconds)] = 150.0
    """With --slo: how long the search for the highest rate may take."""
    for_rate: tuple[Annotated[float, units.read_by(units.positive)], ...] = ()
    """With --slo: tell how many replicas would carry so many requests a second."""
    seed: Annotated[int, units.read_by(units.seed)] = 0
    """Of arrivals."""


LOOK = LookOptions()


def analyse(
    what: str,
    model: str | None = None,
    /,
    *,
    data: str | None = None,
    slo: str | None = None,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    export: Annotated[tuple[str, ...], units.read_by(units.words)] = (),
    look: LookOptions = LOOK,
    samples: DataOptions = DATA,
    target: TargetOptions = TARGET,
    common: Common = COMMON,
) -> Answer:
    r"""Show where a service's time goes, why its slow requests are slow, and what it can carry.

    It tells response times and their parts, causes of slow requests, throughput against latency, and with --slo the
    highest rate that holds the objective, and what would carry more. A server is asked alone, saturated, and at several
    rates, about a minute in all, and two minutes more with --slo. A folder that hasten load or this verb wrote is
    analysed as it is.

    .. code-block:: console

        hasten analyse http://127.0.0.1:8000 net --data val.parquet \
            --slo "p99 <= 20ms" --for-rate 2000
        hasten analyse grpc://127.0.0.1:8001 net --data val.parquet \
            --arrivals poisson:rate=300 --duration 60s
        hasten analyse .hasten/load/net-20260101T120000 --slo "p99 <= 20ms"

    Exit codes: 0; with --slo 3 where the objective is missed; 4 where what was measured cannot tell.

    Args:
        what: http://HOST:PORT, grpc://HOST:PORT; a whole URL with --protocol http; a deployment's folder; or the folder
            of a recorded run.
        model: The model's name on the server.
        data: Samples, as every verb reads them; with --protocol http files with bodies.
        slo: An objective, as "p99 <= 20ms".
        output: Folder for the record, the page, Markdown, CSV and JSON; by default one below --home.
        export: Write it for other tools as well: tensorboard, wandb, mlflow, below the output folder.
        look: How long, and how far.
        samples: How samples are read.
        target: How the server is called.
        common: The options of every verb.
    """
    objective = None if slo is None else read_objective(slo)
    if look.for_rate and objective is None:
        raise InvalidSetting("--for-rate asks how many replicas hold an objective; give it with --slo")
    if common.show_python:
        return python_answer(*_python(what, model, data, slo))
    recorded = Path(what)
    if "://" not in what and (recorded / RUN).is_file():
        run = read_run(recorded)
        analysis = analyse_run(run, objective=objective, host=read_host(recorded))
        return _answer(analysis, output or recorded, export)
    goal = target_of(what, model, target)
    wanted = _look(look, objective, target)
    payloads = payloads_for(goal, data, samples, target)
    with open_load(goal, payloads, processes=target.processes) as load, telling(f"looking at {what}") as tell:
        looked = look_at(load, wanted, progress=tell)
    folder = output or default_folder(common.home, looked.run)
    write_run(looked.run, folder)
    if looked.host is not None:
        write_host(looked.host, folder)
    return _answer(looked.analysis, folder, export)


def _look(options: LookOptions, objective: Objective | None, target: TargetOptions) -> Look:
    arrivals = None if options.arrivals is None else read_arrivals(options.arrivals)
    if isinstance(arrivals, Closed) and objective is not None:
        raise InvalidSetting("an objective is judged in an open loop; use --arrivals poisson:rate=...")
    return Look(
        arrivals=arrivals,
        duration_s=options.duration,
        curve_s=0.0 if options.no_curve or options.curve is None else options.curve,
        objective=objective,
        rules=Rules(budget_s=options.search, seed=options.seed),
        rates=options.for_rate,
        seed=options.seed,
        timeout_s=target.timeout,
    )


def _answer(analysis: Analysis, folder: Path, exporters: tuple[str, ...]) -> Answer:
    """Write everything that the analysis is shown as, and give the answer."""
    write_service_html(analysis, folder / PAGE)
    document = msgspec.json.encode(analysis)
    write_atomically(folder / DOCUMENT, msgspec.json.format(document))
    write_atomically(folder / MARKDOWN, markdown_of(analysis).encode())
    write_atomically(folder / NUMBERS, csv_of(analysis).encode())
    for name in exporters:
        export_to(name, analysis, folder / name)
    return Answer(
        document={**msgspec.json.decode(document), "folder": str(folder)},
        shown=(service_table(analysis), Text(f"\nWritten to {folder}: {PAGE}, {MARKDOWN}, {NUMBERS}.", style="dim")),
        code=_code(analysis),
    )


def _code(analysis: Analysis) -> int:
    verdict = analysis.verdict
    if verdict is None:
        return 0
    return {"MEETS": 0, "MISSES": GOAL_NOT_MET}.get(verdict.state, CANNOT_TELL)


def _python(what: str, model: str | None, data: str | None, slo: str | None) -> list[str]:
    if "://" not in what and (Path(what) / RUN).is_file():
        return [
            "from pathlib import Path",
            "from hasten.analyse.analysis import analyse_run",
            "from hasten.load.record import read_run",
            "",
            f"print(analyse_run(read_run(Path({what!r}))))",
        ]
    objective = "" if slo is None else f"objective=read_objective({slo!r})"
    return [
        "from hasten.analyse.live import Look, look_at",
        "from hasten.cli.load_target import TARGET, payloads_for, target_of",
        "from hasten.cli.models import DATA",
        "from hasten.load.generate import open_load",
        *(["from hasten.load.objective import read_objective"] if slo else []),
        "",
        f"target = target_of({what!r}, {model!r}, TARGET)",
        f"with open_load(target, payloads_for(target, {data!r}, DATA, TARGET)) as load:",
        f"    print(look_at(load, Look({objective}), progress=print).analysis)",
    ]
