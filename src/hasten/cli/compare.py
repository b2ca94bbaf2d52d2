"""``hasten compare``: two services side by side, live and interleaved, or two recorded runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from rich.table import Table
from rich.text import Text

from hasten.artifact import Json
from hasten.cli import units
from hasten.cli.answer import COMMON, Answer, Common, Shown, python_answer
from hasten.cli.load_target import CANNOT_TELL, TARGET, TargetOptions, payloads_for, target_of
from hasten.cli.models import DATA, DataOptions
from hasten.cli.progress import telling
from hasten.errors import InvalidSetting
from hasten.load.arrivals import read_arrivals
from hasten.load.compare import Compared, Sides, compared, recorded_sides, run_sides
from hasten.load.figures import figures_of
from hasten.load.generate import open_load
from hasten.load.record import RUN, read_run
from hasten.load.run import LoadRun
from hasten.load.target import LoadPlan
from hasten.report import format as fmt

SAID = {"A": "A does better", "B": "B does better", "EQUAL": "the same within 2 %", "INCONCLUSIVE": "cannot be told"}


def compare(
    a: str,
    b: str,
    /,
    *,
    model: str | None = None,
    model_b: str | None = None,
    data: str | None = None,
    arrivals: str = "poisson:rate=100",
    blocks: int = 12,
    block: Annotated[float, units.read_by(units.seconds)] = 2.0,
    seed: Annotated[int, units.read_by(units.seed)] = 0,
    samples: DataOptions = DATA,
    target: TargetOptions = TARGET,
    common: Common = COMMON,
) -> Answer:
    r"""Compare two live services, block by block in random order under equal arrivals, or two recorded runs.

    Every ratio comes with its 95 % interval; above 1, B does better, and only an interval that lies beyond 1.02 as a
    whole says so. Recorded runs were not interleaved: what changed on the machine between them is in no interval.

    .. code-block:: console

        hasten compare runs/before runs/after
        hasten compare http://127.0.0.1:8000 http://127.0.0.1:9000 --model net \
            --data val.parquet
        hasten compare http://127.0.0.1:8000 grpc://127.0.0.1:8001 --model net \
            --data val.npz --blocks 20

    Exit codes: 0; 4 where the generator was too late in one of them to be believed.

    Args:
        a: A recorded run's folder, or an address as ``hasten load`` takes it.
        b: The same, of the same kind.
        model: The model's name on both servers.
        model_b: Its name on B, where it is another.
        data: Samples, for live services.
        arrivals: The arrival plan of each block.
        blocks: How many pairs of blocks.
        block: How long each lasts, as 2s.
        seed: Of the arrivals and of the order.
        samples: How samples are read.
        target: How the servers are called.
        common: The options of every verb.
    """
    recorded = [(Path(word) / RUN).is_file() for word in (a, b)]
    if any(recorded) != all(recorded):
        raise InvalidSetting("compare takes two recorded runs or two addresses, not one of each")
    if common.show_python:
        return python_answer(*_python(a, b))
    if all(recorded):
        runs = [read_run(Path(a))], [read_run(Path(b))]
        sides = recorded_sides(runs[0][0], runs[1][0], seed=seed)
    else:
        for word in (a, b):
            if "://" not in word and not Path(word).exists():
                raise InvalidSetting(f"{word} is neither a recorded run (a folder with {RUN}) nor an address")
        plan = LoadPlan(arrivals=read_arrivals(arrivals), duration_s=block, seed=seed, timeout_s=target.timeout)
        sides, runs = _live((a, b), (model, model_b or model), plan, blocks, data, samples, target)
    found = compared(sides)
    invalid = sum(figures_of(run).invalid is not None for side in runs for run in side)
    spoiled = invalid > 0 if all(recorded) else invalid > len(runs[0]) // 2
    remarks = remarks_of(sides, runs, invalid)
    shown: list[Shown] = [table_of(found), *(Text(line, style="dim") for line in remarks)]
    document: dict[str, Json] = {
        "a": a,
        "b": b,
        "interleaved": sides.paired,
        "compared": [msgspec.to_builtins(item) for item in found],
        "remarks": list(remarks),
        "invalid_blocks": invalid,
    }
    return Answer(document=document, shown=shown, code=CANNOT_TELL if spoiled else 0)


def _live(
    urls: tuple[str, str],
    models: tuple[str | None, str | None],
    plan: LoadPlan,
    blocks: int,
    data: str | None,
    samples: DataOptions,
    options: TargetOptions,
) -> tuple[Sides, tuple[list[LoadRun], list[LoadRun]]]:
    goals = []
    for url, model in zip(urls, models, strict=True):
        own = options if url.startswith("http") else replace(options, protocol=None)
        goals.append(target_of(url, model, own))
    payloads = [payloads_for(goal, data, samples, options) for goal in goals]
    with (
        open_load(goals[0], payloads[0], processes=options.processes) as first,
        open_load(goals[1], payloads[1], processes=options.processes) as second,
        telling("comparing") as tell,
    ):
        return run_sides(first, second, plan, blocks=blocks, progress=tell)


def table_of(found: tuple[Compared, ...]) -> Table:
    """Draw what was compared."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "A", "B", "B over A [95 %]", ""):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for item in found:
        write = (lambda value: f"{fmt.digits(value)}/s") if item.name == "throughput" else fmt.duration
        a, b = (fmt.NONE if value is None else write(value) for value in (item.a, item.b))
        table.add_row(Text(item.name), a, b, fmt.times(item.ratio), Text(item.why or SAID[item.better]))
    return table


def remarks_of(sides: Sides, runs: tuple[list[LoadRun], list[LoadRun]], invalid: int) -> list[str]:
    """Give what must be known of the ratios."""
    said = []
    a, b = runs[0][0], runs[1][0]
    if not sides.paired:
        said.append("\nThe runs were recorded apart: what changed on the machine between them is in no interval.")
    hosts = [run.conditions.get("host") for run in (a, b)]
    if hosts[0] != hosts[1]:
        said.append("They were recorded on different machines: the ratio is of machines as well.")
    named = ("arrivals", "protocol", "model", "version", "timeout_s")
    different = [name for name in named if getattr(a, name) != getattr(b, name)]
    said += [f"They differ in {name}: {getattr(a, name)} and {getattr(b, name)}." for name in different]
    rows = [np.unique(run.requests.rows) for run in (a, b)]
    if not np.array_equal(rows[0], rows[1]):
        told = " and ".join(", ".join(map(str, each[:5])) for each in rows)
        said.append(f"Their requests have different numbers of rows ({told}): rates are of requests, not of rows.")
    if invalid:
        said.append(f"In {invalid} of {len(runs[0]) + len(runs[1])} runs the generator's own delay moved a percentile.")
    return said


def _python(a: str, b: str) -> list[str]:
    return [
        "from pathlib import Path",
        "from hasten.load.compare import compared, recorded_sides",
        "from hasten.load.record import read_run",
        "",
        f"print(compared(recorded_sides(read_run(Path({a!r})), read_run(Path({b!r})))))",
    ]
