"""A plan: passes in order, then an engine with its settings. One line of JSON, one key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from hasten import registry, settings
from hasten.artifact import Artifact, Json
from hasten.engine import Engine
from hasten.errors import BadInput
from hasten.isolation import Limits, Progress, report_progress, run_isolated
from hasten.samples import Samples
from hasten.store import Store
from hasten.transform import Context, Pass, run_pass


@dataclass(frozen=True)
class Part:
    """A pass or an engine by name, with the settings that differ from its defaults."""

    name: str
    settings: dict[str, Json] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={_short(value)}" for key, value in sorted(self.settings.items()))
        return f"{self.name}({shown})" if shown else self.name


@dataclass(frozen=True)
class Plan:
    """What to do to a model, and what to run it on."""

    engine: Part
    passes: tuple[Part, ...] = ()

    @property
    def json(self) -> str:
        """One line of JSON; ``Plan.parse`` reads it."""
        return msgspec.json.encode(self, order="deterministic").decode()

    @property
    def key(self) -> str:
        """Sixteen hex digits, equal for equal plans."""
        return hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @property
    def threads(self) -> int:
        """The engine's threads."""
        return int(self.load_engine().threads)

    def __str__(self) -> str:
        return " > ".join(str(part) for part in (*self.passes, self.engine))

    def with_passes(self, *passes: Part) -> Plan:
        """Give this plan with other passes."""
        return replace(self, passes=passes)

    @classmethod
    def parse(cls, text: str | bytes) -> Plan:
        """Read a plan's JSON.

        Raises:
            BadInput: it is no plan. UnknownName, InvalidSetting: it names what is not there.
        """
        try:
            plan = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise BadInput(f"this is no plan: {error}") from error
        plan.load_engine()
        plan.load_passes()
        return plan

    def load_engine(self) -> Engine:
        """Make the engine.

        Raises:
            UnknownName, InvalidSetting, MissingDependency: from the registry and the settings.
        """
        engine: Engine = load_part("engine", self.engine)
        return engine

    def load_passes(self) -> tuple[Pass, ...]:
        """Make the passes, in order. Raises as ``load_engine`` does."""
        return tuple(load_part("pass", part) for part in self.passes)


def load_part(kind: registry.Kind, part: Part) -> Any:
    """Make the pass or engine that a part names."""
    return settings.build(registry.load(kind, part.name), part.settings, name=part.name)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What ``run_plan`` needs besides the plan: where artifacts live, and what to calibrate with."""

    store: Store
    samples: Path | None = None
    """Folder of the calibrate split (``Samples.save``)."""
    training: Path | None = None
    """Folder of the train split."""
    seed: int = 0


def run_plan(plan: Plan, source: Artifact, inputs: Inputs, progress: Progress | None = None) -> Artifact:
    """Run every pass, then build with the engine, in this process. Gives what ``engine.open`` takes.

    ``source`` is the teacher of passes that distill.

    Raises:
        Unsupported, BuildFailed, StoreError: as ``run_pass`` does.
    """
    samples = Samples.load(inputs.samples) if inputs.samples else None
    ctx = Context(
        folder=inputs.store.root,
        samples=samples,
        seed=inputs.seed,
        progress=progress or (lambda text, share: None),
        training=Samples.load(inputs.training) if inputs.training else None,
        teacher=source,
    )
    artifact = source
    for step in (*plan.load_passes(), plan.load_engine()):
        artifact = run_pass(step, artifact, inputs.store, ctx)
    return artifact


def run_plan_isolated(
    plan: Plan, source: Artifact, inputs: Inputs, *, limits: Limits, progress: Progress | None = None
) -> Artifact:
    """Do ``run_plan`` in a child process with limits. Raises as it does, and as ``Child.call`` does."""
    digest = run_isolated(
        "hasten.plan:_in_child",
        limits=limits,
        progress=progress,
        plan=plan.json,
        source=source.digest,
        store=str(inputs.store.root),
        samples=str(inputs.samples) if inputs.samples else None,
        training=str(inputs.training) if inputs.training else None,
        seed=inputs.seed,
    )
    return inputs.store.get(str(digest))


def _in_child(*, plan: str, source: str, store: str, samples: str | None, training: str | None, seed: int) -> str:
    home = Store(Path(store))
    inputs = Inputs(
        store=home,
        samples=Path(samples) if samples else None,
        training=Path(training) if training else None,
        seed=seed,
    )
    return run_plan(Plan.parse(plan), home.get(source), inputs, report_progress).digest


def _short(value: Json) -> str:
    if isinstance(value, dict) and len(value) > 2:
        numbers = [number for number in value.values() if isinstance(number, int | float)]
        return f"{len(value)} names" + (f" adding up to {sum(numbers):g}" if len(numbers) == len(value) else "")
    if isinstance(value, dict):
        return "+".join(f"{name}: {item}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return f"{len(value)} names" if len(value) > 2 else "+".join(str(item) for item in value)
    return str(value)
