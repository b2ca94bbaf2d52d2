"""From a model, samples and a goal to a verdict: the main job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from hasten.deployment import FILE as DEPLOYMENT
from hasten.deployment import Deployment, write_deployment
from hasten.golden import GOLDEN, encode_golden
from hasten.host import this_host, ticks, versions
from hasten.metrics import default_metric, load_metric
from hasten.plan import Part, Plan
from hasten.samples import Samples
from hasten.samples.split import apart, split
from hasten.search import space
from hasten.search.bench import Bench, BudgetSpent
from hasten.search.compress import compress
from hasten.search.curves import compression_of
from hasten.search.deploy import golden_answers, with_steps
from hasten.search.events import Listener
from hasten.search.finals import FINALS, Finals, as_certified, finals
from hasten.search.frontier import frontier
from hasten.search.journal import Journal
from hasten.search.prepare import (
    Data,
    chosen_engines,
    chosen_threads,
    imported,
    metric_code,
    output_shapes,
    read_data,
    read_training,
    with_preprocess,
)
from hasten.search.result import Certificate, Goal, Result, Verdict, read_result
from hasten.search.stages import Limits, in_order, int8, lossless, machine_limits, sweep
from hasten.search.task import TRAIN, Effort, Task, alone, task_id
from hasten.search.train import training_device
from hasten.search.verdict import choose
from hasten.settings import values_of
from hasten.store import Store, write_atomically

RESULT = "result.json"
JOURNAL = "journal.sqlite"
LAST = "last"
BEST = "best"
CUT = "cut by the budget"
"""The journal's record of the budget, in seconds, that ended the trials before they were all done."""


def optimize(
    model: Any,
    samples: str | Path | Samples,
    goal: Goal | None = None,
    *,
    training: str | Path | Samples | None = None,
    data: Data | None = None,
    engines: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    effort: Effort | None = None,
    home: Path = Path(".hasten"),
    seed: int = 0,
    example: Any = None,
    state: Path | None = None,
    fresh: bool = False,
    on_event: Listener | None = None,
) -> Result:
    """Find the fastest form of a model that keeps the goal, prove it, and write it down ready to deploy.

    The same call finds its own journal and goes on where it was interrupted; a finished one gives its result again.

    Args:
        model: An ONNX file, an ExportedProgram ``.pt2``, ``module.py:factory``, a ``torch.nn.Module``, or an artifact.
        samples: A file or folder that ``read_samples`` takes, or samples. They are split into calibrate, search
            and certify; the search never sees the last.
        goal: What to reach; by default the lowest latency, any loss shown.
        training: More samples, to train on: with them pruning, fine-tuning and quantization-aware training are tried.
            Labels are of use but not needed. Rows that are among ``samples`` are left out.
        data: How to read ``samples`` where it is a file.
        engines: Names of engines; by default all that are installed here.
        threads: Thread counts to try; by default powers of two up to the cores that this process may use.
        effort: Time and memory for the whole and its parts.
        home: Folder of the store and of all runs.
        seed: Of splits, calibration and the order of measurements.
        example: For a PyTorch module: a tuple of example inputs; by default one of ``samples``, where they are arrays.
        state: For ``module.py:factory``: a safetensors or weights-only file.
        fresh: Lay an earlier search of the same question aside and begin anew.
        on_event: Called with every piece of news, in this thread.

    Raises:
        UsageError: something that was given cannot be used; the message says what and why.
        BuildFailed: the untouched model does not run in its reference engine.
    """
    goal, effort, data = goal or Goal(), effort or Effort(), data or Data()
    home = Path(home).absolute()
    store = Store(home)
    names, counts = chosen_engines(engines), chosen_threads(threads)
    shown = samples if isinstance(samples, Samples) else None
    source, name = imported(model, store, data=data, samples=shown, example=example, state=state)
    loaded, preprocess = read_data(samples, source, data)
    if preprocess is not None and dict(source.preprocess or {}) != values_of(preprocess):
        source = with_preprocess(source, preprocess, store)
    loaded.check(source.signature)
    taught = None if training is None else read_training(training, source, data, preprocess)
    if taught is not None:
        effort = replace(effort, device=training_device(effort.device))
    choices = {
        "engines": names,
        "threads": counts,
        "seed": seed,
        "metric code": metric_code(goal.metric),
        **({"training": [taught.digest, effort.epochs]} if taught else {}),
    }
    run = home / "runs" / task_id(source, loaded, goal, choices=choices)
    with alone(run):
        if fresh and run.exists():
            run.rename(_next_free(run))
        write_atomically(home / LAST, run.name.encode())
        if not _goes_on(run, effort) and (run / RESULT).exists():
            return replace(read_result(run / RESULT), run=run, deployment=run / BEST / DEPLOYMENT)
        parts = split(loaded, seed=seed)
        parts.save(run / "splits")
        sizes = parts.sizes
        if taught is not None and (learnt := apart(taught, *parts.parts.values())) is not None:
            learnt.save(run / "splits" / TRAIN)
            sizes[TRAIN] = len(learnt)
        task = Task(
            source=source,
            name=name,
            goal=goal,
            metric=load_metric(goal.metric or default_metric(loaded.labels, output_shapes(source))),
            engines=names,
            threads=counts,
            original=space.original_plan(names, counts),
            store=store,
            run=run,
            seed=seed,
            effort=effort,
            splits=sizes,
            classes=loaded.classes,
        )
        return search(task, on_event or (lambda event: None))


def search(task: Task, listener: Listener) -> Result:
    """Run every stage that the journal does not hold yet, then the finals, and write the result."""
    journal = Journal.open(task.run / JOURNAL)
    since = ticks()
    with Bench(task, journal, listener, sitting=journal.begin()) as bench:
        if bench.trials:
            bench.note(f"resumed with {len(bench.trials)} finished trials")
        limits = machine_limits(bench)
        infeasible = _infeasible(bench, limits)
        if infeasible:
            bench.note(infeasible)
        try:
            in_order(
                bench,
                [
                    ("sweep", lambda: sweep(bench)),
                    ("lossless", lambda: lossless(bench, limits)),
                    ("int8", lambda: int8(bench, limits)),
                    ("compress", lambda: compress(bench)),
                ],
            )
        except BudgetSpent:
            bench.note(f"the time for trials is over after {len(bench.trials)} of them; the finals begin")
            journal.record(CUT, task.effort.budget_s)
        bench.stage = "finals"
        bench.tell("stage", "finals")
        outcome = finals(bench, limits)
        result = _conclude(bench, outcome, infeasible, conditions=bench.conditions(since, threads=max(task.threads)))
        bench.tell("note", f"{result.verdict.word}: {result.verdict.sentence}")
    write_atomically(task.run / RESULT, msgspec.json.format(result.json))
    return result


def _conclude(bench: Bench, outcome: Finals, infeasible: str | None, *, conditions: Any) -> Result:
    task = bench.task
    chosen, verdict = choose(
        outcome.certificates,
        task.goal,
        original=task.original.key,
        faster=dict.fromkeys(outcome.faster, True),
    )
    if infeasible and verdict.word != "MEETS":
        verdict = replace(verdict, word="INFEASIBLE", sentence=f"{infeasible}. Best found: {verdict.sentence}")
    if outcome.fallen:
        names = ", ".join(str(bench.trials[key].plan) for key in outcome.fallen)
        verdict = replace(verdict, sentence=f"{verdict.sentence}. Failed in the finals: {names}")
    trials = tuple(bench.trials.values())
    best = frontier(as_certified(trials, outcome.certificates), task.goal, original=task.original.key)
    return Result(
        id=task.run.name,
        run=task.run,
        source=task.source.digest,
        source_name=task.name,
        goal=task.goal,
        metric=task.metric.name,
        trials=trials,
        frontier=best,
        original=task.original.key,
        best_lossless=outcome.best_lossless,
        chosen=chosen.plan,
        certificates=outcome.certificates,
        verdict=verdict,
        twin=outcome.twin,
        fallen=outcome.fallen,
        splits=task.splits,
        deployment=_deploy(bench, chosen, verdict),
        seconds=bench.elapsed(),
        conditions=conditions,
        compression=compression_of(bench),
    )


def _deploy(bench: Bench, chosen: Certificate, verdict: Verdict) -> Path:
    task, trial = bench.task, bench.trials[chosen.plan]
    built = task.store.get(trial.artifact or "")
    ratio, quality = chosen.over_original, chosen.quality
    claims: dict[str, Any] = {"speedup": [ratio.low, ratio.value, ratio.high], "metric": task.metric.name}
    if quality is not None:
        claims |= {"drop": [quality.drop.low, quality.drop.value, quality.drop.high], "samples": quality.drop.n}
    deployment = Deployment(
        name=Path(task.name).stem,
        artifact=built.digest,
        engine=trial.plan.engine.name,
        settings=trial.plan.engine.settings,
        source=task.source.digest,
        plan=trial.plan.json,
        verdict=verdict.word,
        host=built.host or this_host().fingerprint,
        versions=versions(),
        batch=task.goal.batch,
        p99_ms=None if task.goal.p99_ns is None else task.goal.p99_ns / 1e6,
        preprocess=None if task.source.preprocess is None else dict(task.source.preprocess),
        classes=list(task.classes) if task.classes else None,
        claims=claims,
    )
    golden = golden_answers(bench, trial, built)
    deployment = with_steps(deployment, task.source, None if golden is None else golden.outputs)
    files = {} if golden is None else {GOLDEN: encode_golden(golden)}
    return write_deployment(deployment, built, task.run / BEST, files=files)


def _infeasible(bench: Bench, limits: Limits) -> str | None:
    """Say that no plan can meet the goal's p99 on this machine, where its own limit says so."""
    wanted = bench.task.goal.p99_ns
    if wanted is None:
        return None
    part = bench.task.original.engine
    plans = [
        Plan(replace(part, settings={**part.settings, "threads": threads}), (Part("quantize-static"),))
        for threads in bench.task.threads
    ]
    floor = min(limits.floor_ns(plan) for plan in plans)
    if floor <= wanted:
        return None
    return f"this machine cannot run this model's arithmetic in under {floor / 1e6:.3f} ms, even in int8"


def _goes_on(run: Path, effort: Effort) -> bool:
    """Say whether a finished search was cut short by its budget and has a larger one now; then forget its finals."""
    if not (run / JOURNAL).exists():
        return False
    journal = Journal.open(run / JOURNAL)
    cut = journal.recall(CUT, float)
    if cut is None or (effort.budget_s is not None and effort.budget_s <= cut):
        return False
    (run / RESULT).unlink(missing_ok=True)  # first: if we are killed after this, the journal still says that it was cut
    journal.forget(FINALS)
    journal.forget(CUT)
    return True


def _next_free(run: Path) -> Path:
    """Give a folder name beside ``run`` that no search has."""
    number = 1
    while (free := run.with_name(f"{run.name}-{number}")).exists():
        number += 1
    return free
