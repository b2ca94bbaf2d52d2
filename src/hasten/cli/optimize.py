"""``hasten optimize``: the main job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from hasten.cli import units
from hasten.cli.answer import COMMON, GOAL_NOT_MET, Answer, Common, Verbatim, python_answer
from hasten.cli.models import DATA, DataOptions, find_stored, is_digest, name_of
from hasten.cli.progress import showing
from hasten.report.html import write_html
from hasten.report.path import path_of
from hasten.report.tables import result_table
from hasten.search.optimize import optimize as search
from hasten.search.prepare import Data
from hasten.search.result import Goal, Objective, Result
from hasten.search.task import Effort
from hasten.store import Store

PAGE = "report.html"
TARGETS = ("cpu", "host")


def read_target(text: str) -> str:
    """Read which hardware is meant. Raises ValueError for what this machine cannot measure."""
    if text not in TARGETS:
        raise ValueError(
            f"hasten measures on the machine it runs on, and has no engine for {text!r}; "
            "run it on the hardware that will serve, with --target cpu or host"
        )
    return text


@Parameter(name="*", group="Goal")
@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """What to reach."""

    max_drop: Annotated[float | None, units.read_by(units.share)] = None
    """Quality that may be lost, as 1% or 0.01."""
    p99: Annotated[float | None, units.read_by(units.nanoseconds)] = None
    """Limit of the 99th percentile of latency, as 5ms."""
    min_throughput: Annotated[float | None, units.read_by(units.positive)] = None
    """Samples per second, at least."""
    max_size: Annotated[int | None, units.read_by(units.size)] = None
    """Limit of the model's files, as 5MB."""
    max_memory: Annotated[int | None, units.read_by(units.size)] = None
    """Limit of the resident memory, as 200MB."""
    objective: Objective = "latency"
    """What to make small."""
    metric: str | None = None
    """Name of a quality metric, or module:function; by default accuracy with labels that are classes, mse with others,
    agreement or relative-error without."""
    batch: int = 1
    """Samples in one run."""

    @property
    def goal(self) -> Goal:
        """The same as the search takes it."""
        return Goal(
            objective=self.objective,
            max_drop=self.max_drop,
            metric=self.metric,
            p99_ns=self.p99,
            min_throughput=self.min_throughput,
            max_file_bytes=self.max_size,
            max_memory_bytes=self.max_memory,
            batch=self.batch,
        )


@Parameter(name="*", group="Search")
@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search."""

    budget: Annotated[float | None, units.read_by(units.seconds)] = None
    """Time for the whole, as 20m; without it the search ends when it has tried what it knows."""
    target: Annotated[str, units.read_by(read_target)] = "cpu"
    """Hardware to optimize for: cpu, or host (whatever this machine has)."""
    engines: Annotated[tuple[str, ...] | None, units.read_by(units.words)] = None
    """Engines to try, as onnxruntime,openvino; by default all that are here."""
    threads: Annotated[tuple[int, ...] | None, units.read_by(units.numbers)] = None
    """Thread counts to try, as 1,2; by default powers of two up to the cores here."""
    seed: Annotated[int, units.read_by(units.seed)] = 0
    """Of the splits, the calibration and the order of measurements."""
    fresh: bool = False
    """Forget an earlier search of the same question, instead of going on with it."""
    state: Path | None = None
    """Weights for module.py:factory: a safetensors or weights-only file."""
    train: str | None = None
    """Samples to train on: with them, pruning, fine-tuning and quantization-aware training are tried too."""
    epochs: Annotated[float, units.read_by(units.positive)] = Effort().epochs
    """Of training, all candidates together."""
    device: str = Effort().device
    """Where is trained, as PyTorch names it: cpu, cuda or cuda:1; auto is cuda where PyTorch finds a GPU."""


GOAL, SEARCH = GoalOptions(), SearchOptions()


def optimize(
    model: str,
    /,
    *,
    data: str,
    goal: GoalOptions = GOAL,
    samples: DataOptions = DATA,
    search_options: SearchOptions = SEARCH,
    common: Common = COMMON,
) -> Answer:
    r"""Find the fastest form of a model that keeps the goal, prove it, and make it ready to deploy.

    The untouched model runs first, in every engine and thread setting that is here; then lossless passes, then
    int8; with --train also pruning, fine-tuning and quantization-aware training. The final claim is made on samples
    that the search never saw. The same command goes on where an interrupted one stopped. The exit code is 0 where
    the goal is met, else 3.

    .. code-block:: console

        hasten optimize model.onnx --data val.parquet --max-drop 1% --p99 5ms
        hasten optimize net.py:make --state net.safetensors --data images/ \
            --budget 20m
        hasten optimize model.onnx --data val.parquet --train train.parquet \
            --max-drop 1%
        hasten optimize model.onnx --data val.npz --engines onnxruntime \
            --threads 1,2 --json

    Args:
        model: An ONNX file, an exported program (.pt2), module.py:factory, or a digest in the store.
        data: Samples: Parquet, NPZ, CSV, a folder of images by class, a datasets folder, or module.py:function.
        goal: What to reach.
        samples: How samples are read.
        search_options: How to search.
        common: The options of every verb.
    """
    if common.show_python:
        return python_answer(*_python(model, data, goal.goal, samples, search_options, common))
    options, store = search_options, Store(common.home)
    stored = find_stored(model, store, state=options.state)
    name = name_of(stored) if stored else Path(model).name
    with showing(f"{name} with {Path(data).name}", budget_s=options.budget) as listener:
        result = search(
            stored or model,
            data,
            goal.goal,
            data=Data(inputs=samples.inputs, label=samples.label, limit=samples.limit, preprocess=samples.preprocess),
            engines=options.engines,
            threads=options.threads,
            training=options.train,
            effort=Effort(budget_s=options.budget, epochs=options.epochs, device=options.device),
            home=common.home,
            seed=options.seed,
            state=options.state,
            fresh=options.fresh,
            on_event=listener,
        )
    return answer_of(result, write_page(result, store))


def write_page(result: Result, store: Store | None, path: Path | None = None) -> Path:
    """Write a result's page, beside it by default, and give its path; without a store it leaves the lineage out."""
    built = result.trial(result.chosen).artifact
    return write_html(result, path or result.run / PAGE, chosen=store.get(built) if built and store else None)


def answer_of(result: Result, page: Path, *, code: int | None = None) -> Answer:
    """Answer with a finished search and its page."""
    document = msgspec.json.decode(result.json) | {"path": msgspec.to_builtins(path_of(result)), "report": str(page)}
    lines = [f"\nReport      {page}", f"Deployment  {result.deployment}"]
    met = 0 if result.verdict.word == "MEETS" else GOAL_NOT_MET
    return Answer(
        document=document,
        shown=(result_table(result), Verbatim("\n".join(lines))),
        code=met if code is None else code,
    )


def _python(
    model: str, data: str, goal: Goal, samples: DataOptions, options: SearchOptions, common: Common
) -> list[str]:
    asked = ", ".join(f"{k}={v!r}" for k, v in vars(goal).items() if v != getattr(Goal(), k))
    source = f"hasten.Store(Path({str(common.home)!r})).get({model!r})" if is_digest(model) else repr(model)
    told = {"budget_s": options.budget, "epochs": options.epochs, "device": options.device}
    effort = [f"{name}={value!r}" for name, value in told.items() if value != getattr(Effort(), name)]
    more = {
        "data": f"hasten.Data({', '.join(read)})" if (read := samples.python()) else None,
        "engines": repr(list(options.engines)) if options.engines else None,
        "threads": repr(list(options.threads)) if options.threads else None,
        "training": repr(options.train) if options.train else None,
        "effort": f"hasten.Effort({', '.join(effort)})" if effort else None,
        "home": f"Path({str(common.home)!r})",
        "seed": repr(options.seed) if options.seed else None,
        "state": f"Path({str(options.state)!r})" if options.state else None,
        "fresh": "True" if options.fresh else None,
    }
    return [
        "from pathlib import Path",
        "import hasten",
        "",
        "result = hasten.optimize(",
        f"    {source},",
        f"    {data!r},",
        f"    hasten.Goal({asked}),",
        *(f"    {name}={value}," for name, value in more.items() if value is not None),
        ")",
        "print(result.verdict.word, result.verdict.sentence)",
        "print(result.deployment)",
    ]
