"""What one search is about, fixed before it begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hasten.artifact import Artifact
from hasten.host import this_host, versions
from hasten.isolation import Limits
from hasten.measure.worker import cpus_for
from hasten.metrics import Metric
from hasten.plan import Inputs, Plan
from hasten.samples import Samples
from hasten.search.result import Goal
from hasten.store import Store, locked

TRAIN = "train"
"""The split that passes train on, where the user gave one."""

AUTO = "auto"
"""The device that is trained on is looked for."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long things may take, in seconds. A trial is a screening; the finals are the claim."""

    budget_s: float | None = None
    trial_s: float = 6.0
    """Of measuring, for one trial, at most; see ``measuring_s``."""
    slice_s: float = 0.1
    min_blocks: int = 8
    """Of a trial; the finals have the default of ``measure.compare``."""
    precision: float = 0.02
    """Asked half-width of a trial's speed-up, relative."""
    finals_s: float = 60.0
    final_precision: float = 0.01
    limit_s: float | None = None
    """After which a child that does not answer is killed; None: a quarter of the budget, within one and ten minutes."""
    memory_bytes: int | None = None
    """Over which a child is killed; None: four fifths of this machine's."""
    epochs: float = 24.0
    """Of training, all candidates together, where there are samples to train on."""
    device: str = AUTO
    """Where is trained, as PyTorch names it: cpu, cuda, cuda:1; auto: cuda where PyTorch finds a GPU, else cpu."""

    @property
    def measuring_s(self) -> float:
        """Seconds of measuring for one trial: of a budget a fortieth at most, so that every stage is reached."""
        return self.trial_s if self.budget_s is None else min(self.trial_s, max(self.budget_s / 40, 0.5))

    @property
    def time_limit(self) -> float:
        """The limit of a call to a child in seconds."""
        return self.limit_s or min(600.0, max(60.0, (self.budget_s or 2400.0) / 4))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that decides what a search does, but for the clock."""

    source: Artifact
    name: str
    goal: Goal
    metric: Metric
    engines: tuple[str, ...]
    threads: tuple[int, ...]
    """Thread counts to try, in rising order."""
    original: Plan
    """The untouched model in its reference engine: the baseline of every ratio."""
    store: Store
    run: Path
    """The search's own folder."""
    seed: int
    effort: Effort
    splits: Mapping[str, int]
    classes: tuple[str, ...] | None = None

    def samples(self, split: str) -> Path:
        """Give the folder of a split."""
        return self.run / "splits" / split

    def load(self, split: str) -> Samples:
        """Open a split."""
        return Samples.load(self.samples(split))

    @property
    def inputs(self) -> Inputs:
        """What a plan is run with."""
        training = self.samples(TRAIN) if TRAIN in self.splits else None
        return Inputs(store=self.store, samples=self.samples("calibrate"), training=training, seed=self.seed)

    def limits(self, threads: int) -> Limits:
        """Give the limits of a child that measures with this many threads."""
        return Limits(seconds=self.effort.time_limit, memory_bytes=self.effort.memory_bytes, cpus=cpus_for(threads))

    @property
    def build_limits(self) -> Limits:
        """The limits of a child that builds."""
        return Limits(seconds=self.effort.time_limit, memory_bytes=self.effort.memory_bytes)


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold a run's folder for this process until the block ends; a killed process lets go of it.

    Raises:
        BadInput: another process is at work on the same search.
    """
    busy = f"another process is at work on this very search ({run}); wait for it or stop it"
    with locked(run.with_suffix(".lock"), busy):
        yield


def runs_in(home: Path) -> list[Path]:
    """Give the folders of the searches below ``home``, by their names; a lock that lies beside one is none."""
    return sorted(path for path in (home / "runs").glob("*") if path.is_dir())


def task_id(source: Artifact, samples: Samples, goal: Goal, *, choices: Mapping[str, object]) -> str:
    """Give ten hex digits, the same for the same question on the same machine with the same versions.

    The same command finds its own journal by it, and a different one never does.
    """
    parts = {
        "source": source.digest,
        "samples": samples.digest,
        "goal": msgspec.to_builtins(goal),
        "choices": choices,
        "host": this_host().fingerprint,
        "versions": versions(),
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:10]
