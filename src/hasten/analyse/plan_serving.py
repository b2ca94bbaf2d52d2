"""How to serve, for an objective: deployment, threads, instances and batch sizes chosen by simulation, then measured.

t(n) of every deployment and thread count is timed in sessions; what a server adds to that is learnt from one that is
up for a moment; every way to run them is simulated; the best are served and searched for their highest rate. What is
chosen is the best of the measured, and the model's error on each is part of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hasten.analyse.batch_costs import BatchCosts, costs_of
from hasten.analyse.capacity import Choice, Load, Replicas, best_choices, choices, replicas_for
from hasten.analyse.costs_worker import cores_for, measure_costs, sizes_for, threads_for
from hasten.analyse.highest_rate import Found, Rules, Seen, check_objective, find_highest_rate
from hasten.analyse.live import fitted, undisturbed
from hasten.analyse.served import served
from hasten.analyse.simulate import Setup
from hasten.artifact import Artifact, Json
from hasten.deployment import Deployment, Serving, read_deployment
from hasten.errors import BadInput, HastenError
from hasten.isolation import Progress
from hasten.load.arrivals import Closed, Poisson
from hasten.load.figures import rate_of, times_of, why_invalid
from hasten.load.generate import open_load
from hasten.load.objective import Objective
from hasten.load.payloads import payloads_of
from hasten.load.run import LoadRun
from hasten.load.target import LoadPlan, Target
from hasten.samples import Samples
from hasten.steps.bundle_files import files_beside

SIZES = (1, 2, 4, 8, 16, 32)
MEASURED = 3

ANCHOR_S = 2.5
ALONE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the service is for. ``rate`` None: as much as it carries."""

    objective: Objective
    rate: float | None = None
    cores: int = 1
    sizes: tuple[int, ...] = SIZES
    rules: Rules = Rules(budget_s=45.0)  # noqa: RUF009 - a frozen value
    measured: int = MEASURED
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A deployment with its samples; ``path`` is its TOML file.

    What is planned is its model: ``deployment`` is without steps, and ``steps`` says that it has some.
    """

    path: Path
    deployment: Deployment
    steps: bool
    artifact: Artifact
    samples: Samples


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to serve: predicted highest rate, and where it was measured, what was found."""

    path: str
    engine: str
    threads: int
    instances: int
    sizes: tuple[int, ...]
    predicted: float
    found: Found | None = None

    @property
    def error(self) -> float | None:
        """Relative error of the prediction."""
        if self.found is None or not self.found.rate:
            return None
        return (self.predicted - self.found.rate) / self.found.rate

    @property
    def name(self) -> str:
        """What it is, in a line."""
        sizes = ",".join(str(size) for size in self.sizes)
        return f"{self.engine}:threads={self.threads} instances={self.instances} batch_sizes={sizes} of {self.path}"


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What was chosen: the ``[serving]`` section and the engine's settings, and all that was looked at, best first."""

    objective: Objective
    chosen: Option
    serving: Serving
    settings: dict[str, Json]
    options: tuple[Option, ...]
    replicas: Replicas | None
    left_out: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """The chosen way was seen to carry something under the objective."""
        return self.chosen.found is not None and self.chosen.found.rate > 0


def read_candidate(path: Path, read: Callable[[Artifact], Samples]) -> Candidate:
    """Read a deployment and the samples for it. Raises StoreError; HastenError: the samples do not fit."""
    deployment, artifact = read_deployment(path)
    steps = bool(deployment.pre or deployment.post)
    bare = replace(deployment, pre=(), post=(), raw=False)
    return Candidate(path=path, deployment=bare, steps=steps, artifact=artifact, samples=read(artifact))


def plan_serving(candidates: Sequence[Candidate], wanted: Wanted, *, progress: Progress) -> ServingPlan:
    """Choose how to serve.

    Raises:
        InvalidSetting: no candidate's single run is within the objective: said before any load.
        BadInput: there is no candidate, or none can be timed.
    """
    if not candidates:
        raise BadInput("there is no deployment to plan for")
    timed, left_out = _timed(candidates, wanted, progress)
    least_ns = min(cost.ns(cost.sizes[0]) for _, by_threads in timed for _, cost in by_threads)
    check_objective(wanted.objective, least_ns)
    anchor, (threads, costs) = _quickest(timed)
    overheads = _overheads(anchor, threads, costs, wanted=wanted, progress=progress)
    load = Load(seed=wanted.seed)
    setups: dict[int, Candidate] = {}
    every: list[Setup] = []
    for candidate, by_threads in timed:
        more = [(threads, in_server(cost, timed=costs, seen=overheads)) for threads, cost in by_threads]
        for setup in choices(more, cores=cores_for(candidate.deployment, wanted.cores)):
            setups[id(setup)] = candidate
            every.append(setup)
    progress(f"simulating {len(every)} ways to serve", None)
    ranked = best_choices(every, wanted.objective, load, keep=wanted.measured)
    options = [_option(choice, setups[id(choice.setup)]) for choice in ranked]
    measured = []
    for option, choice in zip(options[: wanted.measured], ranked, strict=False):
        candidate = setups[id(choice.setup)]
        measured.append(replace(option, found=_measured(option, candidate, wanted, progress)))
    best = max(range(len(measured)), key=lambda k: (measured[k].found or _NOTHING).rate)
    chosen, candidate = measured[best], setups[id(ranked[best].setup)]
    replicas = None
    if wanted.rate is not None:
        replicas = replicas_for(wanted.rate, ranked[best].setup, wanted.objective, load)
    return ServingPlan(
        objective=wanted.objective,
        chosen=chosen,
        serving=_serving(chosen, candidate.deployment),
        settings=_settings(chosen, candidate.deployment),
        options=(*measured, *options[wanted.measured :]),
        replicas=replicas,
        left_out=tuple(left_out),
    )


Timed = list[tuple[Candidate, list[tuple[int, BatchCosts]]]]


def _timed(candidates: Sequence[Candidate], wanted: Wanted, progress: Progress) -> tuple[Timed, list[str]]:
    """Time every deployment with every thread count; what cannot be timed is left out, and why."""
    timed: Timed = []
    left_out = []
    for candidate in candidates:
        row = {name: np.ascontiguousarray(array[:1]) for name, array in candidate.samples.inputs.items()}
        by_threads = []
        cores = cores_for(candidate.deployment, wanted.cores)
        for threads in threads_for(candidate.deployment, cores):
            try:
                sizes = sizes_for(candidate.deployment, candidate.path, wanted.sizes)
                cost = measure_costs(candidate.path, row, threads=threads, cores=cores, sizes=sizes, progress=progress)
            except HastenError as error:
                left_out.append(f"{candidate.path} with {threads} threads: {error}")
                continue
            by_threads.append((threads, cost))
        if by_threads:
            timed.append((candidate, by_threads))
        if candidate.steps:
            left_out.append(f"the steps of {candidate.path}: what is planned is its model; they take time beside it")
    if not timed:
        raise BadInput(f"no deployment could be timed: {'; '.join(left_out)}")
    return timed, left_out


def _quickest(timed: Timed) -> tuple[Candidate, tuple[int, BatchCosts]]:
    """Give the deployment with the quickest single run, with the fewest threads that could be timed, and its t(n)."""
    pairs = [(candidate, by_threads[0]) for candidate, by_threads in timed]
    return min(pairs, key=lambda pair: pair[1][1].ns(pair[1][1].sizes[0]))


def _overheads(
    candidate: Candidate, threads: int, costs: BatchCosts, *, wanted: Wanted, progress: Progress
) -> BatchCosts:
    """Learn what a server adds to a run: serve one way for a moment, alone and with always more to do."""
    progress("learning what a server adds to a run", None)
    instances = max(1, cores_for(candidate.deployment, wanted.cores) // threads)
    serving = replace(candidate.deployment.serving, instances=instances, batch_sizes=costs.sizes)
    settings = {**candidate.deployment.settings, "threads": threads}
    files = files_beside(candidate.path, candidate.deployment)
    with served(candidate.deployment, candidate.artifact, serving=serving, settings=settings, files=files) as url:
        target = Target(url=url, model=candidate.deployment.name)
        with open_load(target, payloads_of(target, candidate.samples)) as load:

            def run(arrivals: Closed | Poisson, seconds: float) -> LoadRun:
                def measure(seed: int) -> LoadRun:
                    return load.run(LoadPlan(arrivals=arrivals, duration_s=seconds, seed=wanted.seed + seed))

                return undisturbed(measure, wanted.objective)

            alone = run(Closed(concurrency=1), ALONE_S)
            clients = 4 * (serving.instances or 1) * costs.sizes[-1]
            saturated = run(Closed(concurrency=clients), ANCHOR_S)
            rate = rate_of(saturated).value
            if rate <= 0:
                raise BadInput(f"{candidate.path} answered nothing in {ANCHOR_S:g} s of load; a run takes too long")
            usual = run(Poisson(rate=float(f"{0.6 * rate:.3g}")), ANCHOR_S)
    seen = costs_of([usual], alone=alone, saturated=saturated)
    instances = len(seen.busy_ns)

    def setup(with_costs: BatchCosts) -> Setup:
        return Setup(costs=with_costs, instances=instances, cores=instances + 1, sizes=seen.sizes)

    return fitted(seen, rate, load=Load(requests=2000, seed=wanted.seed), setup=setup)


def in_server(cost: BatchCosts, *, timed: BatchCosts, seen: BatchCosts) -> BatchCosts:
    """Give t(n) of sessions as they are inside a server, with what it adds.

    ``seen`` is what a server showed of the deployment whose sessions took ``timed``: its runs take longer, since the
    event loop and other threads share the cores and the interpreter's lock, and that share is taken over.
    """
    busy = len(seen.busy_ns)
    shares = [seen.ns(size, busy) / timed.ns(size, busy) for size in seen.sizes]
    longer = max(float(np.median(shares)), 1.0)
    return replace(
        cost,
        busy_ns=tuple(tuple(ns * longer for ns in times) for times in cost.busy_ns),
        residuals=seen.residuals,
        outside_ns=seen.outside_ns,
        loop_ns=seen.loop_ns,
        between_ns=seen.between_ns,
        wake_ns=seen.wake_ns,
        runs=cost.runs + seen.runs,
        source=f"{cost.source}, and a server's runs of them",
    )


def _option(choice: Choice, candidate: Candidate) -> Option:
    setup = choice.setup
    return Option(
        path=str(candidate.path),
        engine=candidate.deployment.engine,
        threads=setup.threads,
        instances=setup.instances,
        sizes=setup.sizes,
        predicted=choice.highest.rate,
    )


def _measured(option: Option, candidate: Candidate, wanted: Wanted, progress: Progress) -> Found:
    """Serve one way, and search for its highest rate."""
    deployment = candidate.deployment
    serving, settings = _serving(option, deployment), _settings(option, deployment)
    files = files_beside(candidate.path, deployment)
    with served(deployment, candidate.artifact, serving=serving, settings=settings, files=files) as url:
        target = Target(url=url, model=deployment.name)
        with open_load(target, payloads_of(target, candidate.samples)) as load:
            alone = times_of(load.run(LoadPlan(arrivals=Closed(concurrency=1), duration_s=ALONE_S)))
            bare_ns = float(np.median(alone))

            def measure(rate: float, seconds: float, seed: int) -> Seen:
                progress(f"{option.name}: {rate:.4g} requests/s", None)
                run = load.run(LoadPlan(arrivals=Poisson(rate=rate), duration_s=seconds, seed=seed))
                return Seen(times_ns=times_of(run), late=why_invalid(run, wanted.objective) is not None)

            if math.isinf(bare_ns) or bare_ns > wanted.objective.limit_ns:
                return replace(_NOTHING, objective=wanted.objective, why="one request alone misses the objective")
            return find_highest_rate(
                measure, wanted.objective, bare_ns=bare_ns, rules=replace(wanted.rules, first=0.8 * option.predicted)
            )


def _serving(option: Option, deployment: Deployment) -> Serving:
    return replace(deployment.serving, instances=option.instances, batch_sizes=option.sizes)


def _settings(option: Option, deployment: Deployment) -> dict[str, Json]:
    return {**deployment.settings, "threads": option.threads}


_NOTHING = Found(
    objective=Objective(q=0.5, limit_ns=1.0),
    rate=0.0,
    fails_at=None,
    confirmed=0,
    bare_ns=0.0,
    seconds=0.0,
    steps=(),
)
