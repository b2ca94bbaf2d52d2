"""The bench: builds one plan, measures it beside the original, judges its outputs, and records what came of it."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

import msgspec
import numpy as np

from hasten.artifact import Artifact
from hasten.errors import BuildFailed, ChildHung, HastenError, MissingDependency, StoreError, Unsupported
from hasten.graph.model import read_model, skeleton_of
from hasten.host import Ticks, load_since, this_host, ticks, versions
from hasten.isolation import TRAINING_S
from hasten.measure.compare import Comparison, compare
from hasten.measure.latency import WarmUp
from hasten.measure.quality import quality
from hasten.measure.worker import IsolatedSession, open_isolated
from hasten.measurement import Conditions, Measurement, Quality
from hasten.plan import Plan, run_plan_isolated
from hasten.search import space
from hasten.search.events import Event, Kind, Listener
from hasten.search.frontier import cost, loss
from hasten.search.journal import Journal
from hasten.search.result import Outcome, Trial
from hasten.search.task import Task
from hasten.tensors import Array

T = TypeVar("T")

FINALISTS = 4
"""Plans that come into the finals beside the original and the best lossless one."""

SPEND_S = 5.0
"""The time taken is written down at least this often, where work tells of its progress."""

OUTPUT_ROWS = 64
"""Rows that are asked for in one call; they go through the model in the goal's batch, as they will when it serves."""


def usual_trials(task: Task) -> int:
    """Guess how many trials a search has: to say how long it takes, not to plan it."""
    engines, threads = len(task.engines), len(task.threads)
    sweep = engines + sum(threads + len(space.precisions(engine)) - 1 for engine in task.engines)
    return sweep + 2 * engines + len(space.observers()) + (engines - 1) + engines + engines * (threads - 1)


ANCHOR = "original"
"""What the original's session is called in a comparison."""

TRIAL_WARM_UP = WarmUp(min_s=0.3, max_s=5.0)
"""A trial is a screening; the finals warm up by the full rule."""


class AnchorLost(Exception):
    """The original's session could not be opened, or died twice."""

    def __init__(self, cause: HastenError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class BudgetSpent(Exception):
    """The time for trials is over."""


class Bench:
    """A search's workplace; use as a context manager. Keeps one session of the original open beside every trial."""

    def __init__(self, task: Task, journal: Journal, listener: Listener, *, sitting: int) -> None:
        self.task = task
        self.journal = journal
        self._listener = listener
        self._sitting = sitting
        self._start = self._written = time.monotonic()
        self._spent_before = journal.spent()
        self._anchor: IsolatedSession | None = None
        self._references: dict[str, dict[str, Array]] = {}
        self.trials: dict[str, Trial] = {trial.key: trial for trial in journal.trials()}
        self.stage = "start"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.drop_anchor()
        self.spend()

    # What it tells

    def tell(self, kind: Kind, text: str, *, share: float | None = None, trial: Trial | None = None) -> None:
        """Tell the listener."""
        event = Event(
            kind=kind, stage=self.stage, text=text, share=share, trial=trial, best=self.best(), left_s=self.left_s()
        )
        self._listener(event)

    def note(self, text: str) -> None:
        """Tell a sentence and keep it in the journal."""
        self.journal.note(text)
        self.tell("note", text)

    def progress(self, text: str, share: float | None) -> None:
        """Pass on what a long piece of work says of itself; the time that it has taken outlives a kill."""
        if time.monotonic() - self._written >= SPEND_S:
            self.spend()
        self.tell("progress", text, share=share)

    # Its time

    def elapsed(self) -> float:
        """Seconds that the search has taken, earlier sittings with it."""
        return self._spent_before + time.monotonic() - self._start

    def spend(self) -> None:
        """Write the time taken by now into the journal."""
        self._written = time.monotonic()
        self.journal.spend(self._sitting, time.monotonic() - self._start)

    def budget_left_s(self) -> float | None:
        """Seconds of budget that are left, or None without a budget."""
        budget = self.task.effort.budget_s
        return None if budget is None else max(0.0, budget - self.elapsed())

    def left_s(self) -> float | None:
        """Seconds until the end: as many trials as usual, as long as those so far, but no more than the budget."""
        times = [trial.seconds for trial in self.trials.values() if trial.outcome == "measured"]
        budget = self.budget_left_s()
        if not times:
            return budget
        trials = 0 if self.stage == "finals" else max(0, usual_trials(self.task) - len(self.trials))
        guess = trials * sum(times) / len(times) + self.reserve_s()
        return guess if budget is None else min(guess, budget)

    def finals_s(self) -> float:
        """Seconds to keep for the finals: a quarter of the budget, within what they can use."""
        budget = self.task.effort.budget_s
        return self.task.effort.finals_s if budget is None else min(self.task.effort.finals_s, max(budget / 4, 3.0))

    def reserve_s(self) -> float:
        """Seconds to keep for the end: the finals, and what their certificates take, as far as that is known.

        The finalists, the best lossless plan and the original are judged on the whole certify split, and timed for long
        where a claim about p99 is to be made.
        """
        budget, splits = self.task.effort.budget_s, self.task.splits
        judged = [trial.steps["quality"] for trial in self.trials.values() if "quality" in trial.steps]
        each_s = float(np.median(judged)) * splits["certify"] / max(splits["search"], 1) if judged else 0.0
        p99_s = self.finals_s() / 3 if self.task.goal.p99_ns is not None else 0.0
        whole = self.finals_s() + (FINALISTS + 2) * each_s + FINALISTS * p99_s
        return whole if budget is None else min(whole, max(budget / 2, self.finals_s()))

    def check_budget(self) -> None:
        """Raise ``BudgetSpent`` when another trial would eat into the finals' time."""
        left = self.budget_left_s()
        times = [trial.seconds for trial in self.trials.values() if trial.outcome == "measured"]
        usual = float(np.median(times)) if times else 0.0
        if left is not None and left < self.reserve_s() + usual:
            raise BudgetSpent

    # What it knows

    def meets(self, trial: Trial) -> bool:
        """Say whether a measured trial keeps the allowed drop, by its estimate on the search split."""
        limit = self.task.goal.max_drop
        return trial.outcome == "measured" and (limit is None or loss(trial) <= limit)

    def fits(self, trial: Trial) -> bool:
        """Say whether a trial that meets the drop is within the limits that need no certificate, by its estimates."""
        goal, measured = self.task.goal, trial.measurement
        if measured is None or not self.meets(trial):
            return False
        return (
            (goal.max_file_bytes is None or measured.resources.file_bytes <= goal.max_file_bytes)
            and (goal.max_memory_bytes is None or measured.resources.peak_rss_bytes <= goal.max_memory_bytes)
            and (goal.min_throughput is None or goal.batch * 1e9 / measured.latency.median_ns >= goal.min_throughput)
        )

    def best(self) -> Trial | None:
        """The best measured trial that meets the goal on the search split; where none does, that meets the drop."""
        fitting = [trial for trial in self.trials.values() if self.meets(trial)]
        inside = [trial for trial in fitting if self.fits(trial)]
        return min(inside or fitting, key=lambda trial: cost(trial, self.task.goal), default=None)

    def original(self) -> Trial:
        """The original's trial, which is the first."""
        return self.trials[self.task.original.key]

    # What it does

    def run(self, plan: Plan) -> Trial:
        """Build, judge and measure a plan, unless the journal has it already. A failure is an outcome.

        Raises:
            BudgetSpent: there is no time left for it.
        BuildFailed: the untouched model itself does not run; that is not recorded, so the next try may.
            StoreError: the disk fails; that is not the plan's fault.
        """
        if (found := self.trials.get(plan.key)) is not None:
            return found
        if plan.key != self.task.original.key:
            self.check_budget()
        self.tell("trial-start", str(plan))
        start = time.monotonic()
        trial = Trial(plan=plan, stage=self.stage, outcome="failed", seconds=0.0)
        try:
            trial = self._attempt(trial)
        except (Unsupported, MissingDependency) as error:
            trial = replace(trial, outcome="unsupported", reason=str(error))
        except StoreError:
            raise
        except AnchorLost as error:
            raise error.cause from error
        except HastenError as error:
            trial = replace(trial, outcome="failed", reason=f"{type(error).__name__}: {error}")
        if plan.key == self.task.original.key and trial.outcome != "measured":
            raise BuildFailed("the untouched model", f"{plan} does not run: {trial.reason}")
        return self.keep(replace(trial, seconds=time.monotonic() - start))

    def skip(self, plan: Plan, reason: str) -> Trial:
        """Record that a plan was not tried, and why."""
        if (found := self.trials.get(plan.key)) is not None:
            return found
        self.journal.note(f"skipped {plan}: {reason}")
        return self.keep(Trial(plan=plan, stage=self.stage, outcome="skipped", seconds=0.0, reason=reason))

    def keep(self, trial: Trial) -> Trial:
        """Record a finished trial."""
        self.journal.add(trial)
        self.trials[trial.key] = trial
        self.spend()
        self.tell("trial-end", _summary(trial), trial=trial)
        return trial

    def build(self, plan: Plan) -> Artifact:
        """Run a plan's passes and its engine's build in a child. One that trains may use what the budget leaves.

        Raises:
            BudgetSpent: it was still training then; a larger budget goes on from its last checkpoint.
        """
        limits, left = self.task.build_limits, self.budget_left_s()
        trains = any(step.uses_training for step in plan.load_passes())
        if trains:
            limits = replace(limits, seconds=TRAINING_S if left is None else max(left - self.reserve_s(), 1.0))
        try:
            return run_plan_isolated(plan, self.task.source, self.task.inputs, limits=limits, progress=self.progress)
        except ChildHung as error:
            if trains:
                raise BudgetSpent from error
            raise

    def session(
        self, plan: Plan, built: Artifact, *, name: str, split: str = "search", warm_up: WarmUp = TRIAL_WARM_UP
    ) -> IsolatedSession:
        """Open what was built in a child of its own. Close it, or use it as a context manager."""
        return open_isolated(
            plan.engine,
            built,
            self.task.store,
            self.task.samples(split),
            batch=self.task.goal.batch,
            limits=self.task.limits(plan.threads),
            seed=self.task.seed,
            name=name,
            warm_up=warm_up,
        )

    def anchor(self) -> IsolatedSession:
        """The original's session, opened when it is first needed, and again when it has died."""
        if self._anchor is None:
            plan = self.task.original
            self._anchor = self.session(plan, self.build(plan), name=ANCHOR)
        return self._anchor

    def drop_anchor(self) -> None:
        """Close the original's session."""
        if self._anchor is not None:
            self._anchor.close()
            self._anchor = None

    def reference(self, split: str) -> dict[str, Array]:
        """Give the original's outputs on a split, computed once."""
        if split not in self._references:
            plan = self.task.original
            with self.session(plan, self.build(plan), name=ANCHOR, split=split) as session:
                self._references[split] = self.outputs(session, split)
        return self._references[split]

    def outputs(self, session: IsolatedSession, split: str) -> dict[str, Array]:
        """Run a whole split through a session opened on it."""
        n = self.task.splits[split]
        parts: list[dict[str, Array]] = []
        for start in range(0, n, OUTPUT_ROWS):
            parts.append(session.outputs(start, min(start + OUTPUT_ROWS, n), self.task.goal.batch))
            self.progress(f"outputs on the {split} split", min(1.0, (start + OUTPUT_ROWS) / n))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def judge(self, session: IsolatedSession, split: str) -> Quality:
        """Compare a session's outputs on a split with the original's."""
        return quality(
            self.task.metric,
            reference=self.reference(split),
            candidate=self.outputs(session, split),
            labels=self.task.load(split).labels,
            classes=self.task.classes,
            seed=self.task.seed,
        )

    def conditions(self, since: Ticks, *, threads: int) -> Conditions:
        """Describe the circumstances of numbers taken since then."""
        return Conditions(
            host=this_host(),
            load=load_since(since),
            threads=threads,
            batch=self.task.goal.batch,
            versions=versions(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _attempt(self, trial: Trial) -> Trial:
        plan, since, steps = trial.plan, ticks(), {}
        built, steps["build"] = _timed(lambda: self.build(plan))
        precision = str(plan.load_engine().precision)
        traits = tuple(sorted((built.traits | {precision}) & LOSSY))
        trial = replace(trial, artifact=built.digest, traits=traits, skeleton=self._skeleton(plan, built))
        if (twin := self._same_bytes(plan, built)) is not None:
            reason = f"its passes change nothing: the result is, byte for byte, that of {twin.plan}"
            return replace(trial, outcome="unchanged", reason=reason)
        with self.session(plan, built, name=plan.key) as session:
            judged, steps["quality"] = _timed(lambda: self.judge(session, "search"))
            measured, steps["measure"] = _timed(lambda: self._measure(plan, session, judged, since))
        return replace(trial, outcome="measured", measurement=measured, steps=steps)

    def _skeleton(self, plan: Plan, built: Artifact) -> str:
        """Digest what decides a plan's speed: its engine, and the graph that it was given, without its numbers."""
        model = read_model(self.before_engine(built))
        told = f"{msgspec.json.encode(plan.engine, order='deterministic').decode()} {skeleton_of(model)}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def before_engine(self, built: Artifact) -> Artifact:
        """Give the ONNX model that an engine was given. Raises StoreError where it has gone from the store."""
        return self.task.store.get(built.lineage[-1].source or "")

    def _same_bytes(self, plan: Plan, built: Artifact) -> Trial | None:
        for trial in self.trials.values():
            same_engine = trial.plan.engine == plan.engine and trial.outcome == "measured"
            if same_engine and self.built(trial).content == built.content:
                return trial
        return None

    def built(self, trial: Trial) -> Artifact:
        """Give what a trial's engine built; built again where it has gone from the store.

        Raises:
            StoreError: another build gives other bytes.
        """
        with contextlib.suppress(StoreError):
            return self.task.store.get(trial.artifact or "")
        again = self.build(trial.plan)
        if again.digest != trial.artifact:
            raise StoreError(
                f"{trial.plan}: its files are gone from the store, and built again they are others; --fresh"
            )
        return again

    def _measure(self, plan: Plan, session: IsolatedSession, judged: Quality, since: Ticks) -> Measurement:
        result = self._beside_anchor(session)
        limit = self.task.goal.p99_ns
        return Measurement(
            latency=result.latency(session.name, limit_ns=limit),
            speedup=result.ratio(ANCHOR, session.name),
            resources=session.resources(),
            conditions=self.conditions(since, threads=plan.threads),
            signature=session.signature,
            quality=judged,
        )

    def _beside_anchor(self, session: IsolatedSession) -> Comparison:
        """Compare with the original; where that has died in the meantime, once more with a new one."""
        effort = self.task.effort
        for last in (False, True):
            try:
                anchor = self.anchor()
            except HastenError as error:
                raise AnchorLost(error) from error
            result = compare(
                [anchor, session],
                precision=effort.precision,
                budget_s=effort.measuring_s,
                min_blocks=effort.min_blocks,
                slice_s=effort.slice_s,
                seed=self.task.seed,
                decide=True,
                progress=self.progress,
            )
            if session.name in result.failures:
                raise result.failures[session.name]
            if anchor.name not in result.failures:
                break
            self.drop_anchor()
            if last:
                raise AnchorLost(result.failures[anchor.name])
        return result


TRAINED: frozenset[str] = frozenset({"pruned", "finetuned", "distilled"})
"""Traits of what came of cutting and training."""

LOSSY: frozenset[str] = TRAINED | {"int8", "dynamic", "float16", "bfloat16"}
"""Traits that say that a model computes something else than the original in float32."""

_SIGN: Mapping[Outcome, str] = {
    "measured": "",
    "unsupported": "not possible: ",
    "failed": "failed: ",
    "skipped": "skipped: ",
    "unchanged": "",
}


def _summary(trial: Trial) -> str:
    if trial.measurement is None:
        return f"{trial.plan}: {_SIGN[trial.outcome]}{trial.reason}"
    speed = trial.measurement.speedup
    judged = trial.measurement.quality
    lost = f", drop {judged.drop.value * 100:.2f} %" if judged else ""
    return f"{trial.plan}: {speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}]{lost}"


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    start = time.monotonic()
    return work(), time.monotonic() - start
