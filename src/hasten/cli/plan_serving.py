"""``hasten plan-serving``: how to serve for an objective, chosen by simulation, measured, and written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import tomli_w
from cyclopts import Parameter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hasten.analyse.capacity import Replicas
from hasten.analyse.highest_rate import Rules
from hasten.analyse.plan_serving import SIZES, Option, ServingPlan, Wanted, read_candidate
from hasten.analyse.plan_serving import plan_serving as plan
from hasten.artifact import Json
from hasten.cli import units
from hasten.cli.answer import COMMON, GOAL_NOT_MET, Answer, Common, Verbatim, python_answer
from hasten.cli.models import DATA, DataOptions
from hasten.cli.progress import telling
from hasten.deployment import FILE, read_deployment, write_deployment
from hasten.errors import BadInput, InvalidSetting
from hasten.host import this_host
from hasten.load.objective import read_objective
from hasten.report import format as fmt
from hasten.report.service import signed
from hasten.steps.bundle_files import check_replaceable, files_beside


def plan_serving(
    deployments: tuple[Path, ...],
    /,
    *,
    data: str,
    slo: str,
    rate: Annotated[float | None, units.read_by(units.positive)] = None,
    cores: int | None = None,
    batch_sizes: Annotated[tuple[int, ...], units.read_by(units.numbers)] = SIZES,
    search: Annotated[float, units.read_by(units.seconds)] = 45.0,
    measured: int = 3,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    seed: Annotated[int, units.read_by(units.seed)] = 0,
    samples: DataOptions = DATA,
    common: Common = COMMON,
) -> Answer:
    r"""Choose deployment, threads, instances and batch sizes for a service's objective, and write the deployment.

    Runs of every batch size are timed in sessions, a server is up for a moment to learn what it adds, every way to
    serve is simulated, and the best are served and measured. The simulation's error stands beside each.

    .. code-block:: console

        hasten plan-serving best/deployment.toml --data val.parquet \
            --slo "p99 <= 20ms"
        hasten plan-serving a/ b/ --data val.parquet --slo "p99 <= 20ms" \
            --rate 2000 -o out

    Exit codes: 0; 3 where nothing holds the objective.

    Args:
        deployments: One deployment.toml, or several of the same model that are to be compared.
        data: Samples, as every verb reads them.
        slo: The objective, as "p99 <= 20ms".
        rate: Requests a second that have to be carried: how many replicas that takes.
        cores: Cores that the service may use; by default all of this machine's.
        batch_sizes: Batch sizes that may be allowed, as 1,2,4,8.
        search: How long each measured one may be searched for its highest rate.
        measured: How many of the best are measured.
        output: Folder for the chosen bundle; without it the section is printed.
        seed: Of arrivals.
        samples: How samples are read.
        common: The options of every verb.
    """
    objective = read_objective(slo)
    if not deployments:
        raise InvalidSetting("plan-serving needs a deployment.toml to plan for")
    if measured < 1 or (cores is not None and cores < 1):
        raise InvalidSetting(f"--measured is {measured} and --cores {cores}; both must be 1 or more")
    paths = [path / FILE if path.is_dir() else path for path in deployments]
    if output is not None:
        _check_output(output, paths)
    if common.show_python:
        return python_answer(*_python(paths, data, slo))
    wanted = Wanted(
        objective=objective,
        rate=rate,
        cores=cores or this_host().usable_cores,
        sizes=batch_sizes,
        rules=Rules(budget_s=search, seed=seed),
        measured=measured,
        seed=seed,
    )
    candidates = [read_candidate(path, lambda artifact: samples.read(data, artifact)) for path in paths]
    with telling("planning") as tell:
        found = plan(candidates, wanted, progress=tell)
    written = None if output is None else write_plan(found, output)
    return Answer(
        document={**msgspec.to_builtins(found), "written": None if written is None else str(written)},
        shown=(shown(found, rate), *_section(found, written)),
        code=0 if found.holds else GOAL_NOT_MET,
    )


def write_plan(found: ServingPlan, folder: Path) -> Path:
    """Write the chosen deployment as a new bundle, with the files beside its model.

    Raises:
        BadInput: the folder holds something else than a bundle. StoreError: a file cannot be read or written.
    """
    check_replaceable(folder)
    path = Path(found.chosen.path)
    deployment, artifact = read_deployment(path)
    changed = replace(deployment, serving=found.serving, settings=found.settings)
    return write_deployment(changed, artifact, folder, files=files_beside(path, deployment))


def shown(found: ServingPlan, rate: float | None) -> RenderableType:
    """Draw what was looked at, best first, with the model's error on what was measured."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("engine", "threads", "instances", "batch sizes", "predicted/s", "measured/s", "error", ""):
        table.add_column(name, justify="left" if name in ("engine", "batch sizes", "") else "right")
    for option in found.options:
        table.add_row(*_cells(option, chosen=option == found.chosen))
    lines: list[RenderableType] = [Text(f"Highest rate with {found.objective}:", style="bold"), table]
    if found.replicas is not None and rate is not None:
        lines.append(Text(_replicas(found.replicas, rate)))
    lines += [Text(f"left out: {line}", style="dim") for line in found.left_out]
    if not found.holds:
        lines.append(Text(f"Nothing that was measured holds {found.objective}.", style="bold red"))
    return Group(*lines)


def _check_output(folder: Path, paths: list[Path]) -> None:
    """Check where the chosen bundle goes before anything is done. Raises BadInput."""
    if any(path.parent.resolve() == folder.resolve() for path in paths):
        raise BadInput(f"{folder} is one of the bundles that are compared; give another folder for the chosen one")
    check_replaceable(folder)


def _cells(option: Option, *, chosen: bool) -> tuple[str | Text, ...]:
    found = option.found
    measured = fmt.NONE if found is None else f"{fmt.digits(found.rate)} ({found.confirmed} of 3 confirmed)"
    return (
        Text(option.engine),
        str(option.threads),
        str(option.instances),
        ",".join(str(size) for size in option.sizes),
        fmt.digits(option.predicted),
        measured,
        signed(option.error),
        "chosen" if chosen else "",
    )


def _replicas(found: Replicas, rate: float) -> str:
    count, cores = found.count, found.cores
    if count is None:
        return f"{fmt.digits(rate)} requests/s: no number of replicas holds the objective, by the model."
    return f"{fmt.digits(rate)} requests/s: {count} replicas, {cores} cores in all, by the model."


def _section(found: ServingPlan, written: Path | None) -> tuple[Text | Verbatim, ...]:
    if written is not None:
        return (Text(f"Written to {written}.", style="dim"),)
    serving: dict[str, Json] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in msgspec.to_builtins(found.serving).items()
        if value is not None
    }
    return (Verbatim("\n" + tomli_w.dumps({"settings": found.settings, "serving": serving}).rstrip()),)


def _python(paths: list[Path], data: str, slo: str) -> list[str]:
    return [
        "from pathlib import Path",
        "from hasten.analyse.plan_serving import Wanted, plan_serving, read_candidate",
        "from hasten.cli.models import DATA",
        "from hasten.load.objective import read_objective",
        "",
        f"paths = {[str(path) for path in paths]!r}",
        f"candidates = [read_candidate(Path(path), lambda a: DATA.read({data!r}, a)) for path in paths]",
        f"print(plan_serving(candidates, Wanted(objective=read_objective({slo!r})), progress=print).chosen)",
    ]
