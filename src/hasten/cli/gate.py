"""``hasten gate``: limits for a service in CI, from a recorded run or on a live one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, Shown, python_answer
from hasten.cli.load import STATE_CODES, STATE_STYLES
from hasten.cli.load_target import TARGET, TargetOptions, default_folder, payloads_for, target_of
from hasten.cli.models import DATA, DataOptions
from hasten.cli.progress import telling
from hasten.errors import InvalidSetting
from hasten.load.arrivals import read_arrivals
from hasten.load.gate import Check, Limits, checks_of, state_of
from hasten.load.generate import generate
from hasten.load.objective import Objective, read_objective
from hasten.load.record import RUN, read_run, write_run
from hasten.load.run import LoadRun
from hasten.load.target import LoadPlan


@Parameter(name="*", group="Limits")
@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What must hold."""

    max_p50: Annotated[float | None, units.read_by(units.nanoseconds)] = None
    """The median response time, as 5ms."""
    max_p99: Annotated[float | None, units.read_by(units.nanoseconds)] = None
    """The 99th percentile, as 20ms."""
    slo: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = ()
    """An objective, as "p99.9 <= 50ms"; repeat it for more."""
    min_throughput: Annotated[float | None, units.read_by(units.positive)] = None
    """Good answers a second. Over an open loop it needs arrivals at a higher rate."""
    max_errors: Annotated[float | None, units.read_by(units.share)] = None
    """Share of requests without a good answer, as 0.1%; 0: none at all."""

    def read(self) -> Limits:
        """Give the limits. Raises InvalidSetting: there are none."""
        told = [Objective(q=q, limit_ns=ns) for q, ns in ((0.5, self.max_p50), (0.99, self.max_p99)) if ns is not None]
        return Limits(
            objectives=(*told, *map(read_objective, self.slo)),
            min_throughput=self.min_throughput,
            max_errors=self.max_errors,
        )


LIMITS = LimitOptions()


def gate(
    what: str,
    model: str | None = None,
    /,
    *,
    limits: LimitOptions = LIMITS,
    data: str | None = None,
    arrivals: str = "poisson:rate=100",
    duration: Annotated[float, units.read_by(units.seconds)] = 30.0,
    seed: Annotated[int, units.read_by(units.seed)] = 0,
    samples: DataOptions = DATA,
    target: TargetOptions = TARGET,
    common: Common = COMMON,
) -> Answer:
    r"""Judge a service by limits: by a recorded run, or under load that is put on it now.

    .. code-block:: console

        hasten gate runs/x --max-p99 20ms --max-errors 0.1%
        hasten gate http://127.0.0.1:8000 net --data val.parquet \
            --arrivals poisson:rate=600 --min-throughput 500

    Exit codes: 0 where every limit is met; 3 where one is missed; 4 where one cannot be told (INCONCLUSIVE: too few
    requests; INVALID: the generator was too late to be believed) and none is missed.

    Args:
        what: The folder of a recorded run, or an address as ``hasten load`` takes it.
        model: The model's name on the server.
        limits: What must hold.
        data: Samples, where load is put on now.
        arrivals: The arrival plan of that load.
        duration: How long it lasts.
        seed: Of the arrivals.
        samples: How samples are read.
        target: How the server is called.
        common: The options of every verb.
    """
    wanted = limits.read()
    if common.show_python:
        return python_answer(*_python(what, limits))
    folder = Path(what)
    if (folder / RUN).is_file():
        run = read_run(folder)
    elif "://" not in what and not folder.exists():
        raise InvalidSetting(f"{what} is neither a recorded run (a folder with {RUN}) nor an address of a server")
    else:
        goal = target_of(what, model, target)
        plan = LoadPlan(arrivals=read_arrivals(arrivals), duration_s=duration, seed=seed, timeout_s=target.timeout)
        payloads = payloads_for(goal, data, samples, target)
        with telling(f"load on {what}") as tell:
            told = lambda ok, missed, share: tell(f"{ok} answered, {missed} missed", share)  # noqa: E731
            run = generate(goal, plan, payloads, processes=target.processes, progress=told)
        folder = default_folder(common.home, run)
        write_run(run, folder)
    return answer_of(run, checks_of(run, wanted), folder)


def answer_of(run: LoadRun, checks: tuple[Check, ...], folder: Path) -> Answer:
    """Answer with every check, and with the worst as the exit code."""
    state = state_of(checks)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("limit", "", "measured"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(Text(check.limit), Text(check.state, style=STATE_STYLES[check.state]), Text(check.why))
    shown: list[Shown] = [table, Text(f"\n{state}: {run.url} under {run.arrivals}; the run is in {folder}.")]
    document = {
        "state": state,
        "checks": [msgspec.to_builtins(check) for check in checks],
        "url": run.url,
        "arrivals": run.arrivals,
        "record": str(folder),
    }
    return Answer(document=document, shown=shown, code=STATE_CODES[state])


def _python(what: str, limits: LimitOptions) -> list[str]:
    told = ", ".join(f"{name}={value!r}" for name, value in vars(limits).items() if value not in (None, ()))
    return [
        "from pathlib import Path",
        "from hasten.cli.gate import LimitOptions",
        "from hasten.load.gate import checks_of, state_of",
        "from hasten.load.record import read_run",
        "",
        f"checks = checks_of(read_run(Path({what!r})), LimitOptions({told}).read())",
        "print(state_of(checks), checks)",
    ]
