"""What a search was asked, what it tried, and what it found: everything a report needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from hasten.errors import StoreError
from hasten.measurement import Conditions, Measurement, Quality, Ratio
from hasten.plan import Plan
from hasten.search.compression import Compression

Outcome = Literal["measured", "unsupported", "failed", "skipped", "unchanged"]
Word = Literal["MEETS", "BEST_EFFORT", "REGRESSION", "UNPROVEN", "INCONCLUSIVE", "INFEASIBLE"]
Objective = Literal["latency", "size", "memory"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the user wants: an objective to make small, and constraints. None: no such constraint."""

    objective: Objective = "latency"
    max_drop: float | None = None
    """Quality that may be lost: absolute for metrics bounded by 1 (0.01 is one point), else a share."""
    metric: str | None = None
    """Name in ``hasten.metrics``, or ``module:function``; None: accuracy with class labels, else agreement."""
    p99_ns: float | None = None
    min_throughput: float | None = None
    """Samples per second: batch over median latency."""
    max_file_bytes: int | None = None
    max_memory_bytes: int | None = None
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A plan and what came of it. ``reason`` is a sentence wherever ``outcome`` is not "measured"."""

    plan: Plan
    stage: str
    outcome: Outcome
    seconds: float
    reason: str | None = None
    artifact: str | None = None
    """Digest of what the engine built."""
    measurement: Measurement | None = None
    """Its quality is on the search split."""
    traits: tuple[str, ...] = ()
    """Of what was built: "int8", "float16", ...; empty for a lossless plan."""
    skeleton: str | None = None
    """Digest of engine, settings and graph without its numbers: trials with one skeleton are as fast as each other."""
    steps: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each part of the trial: build, measure, quality."""

    @property
    def key(self) -> str:
        """The plan's key."""
        return self.plan.key


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The final claim about one finalist, on data and in a comparison of its own."""

    plan: str
    """The plan's key."""
    quality: Quality | None
    """On the certify split; None where nothing may differ (the untouched model on its own engine)."""
    over_original: Ratio
    over_lossless: Ratio
    measurement: Measurement
    """From the final comparison of all finalists, block by block."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One word, and the sentence that says why."""

    word: Word
    sentence: str
    more_samples: int | None = None
    """For UNPROVEN: about how many more certify samples would decide."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished search. ``run`` is its folder: journal, report, deployment."""

    id: str
    run: Path
    source: str
    """Digest of the imported model."""
    source_name: str
    goal: Goal
    metric: str
    trials: tuple[Trial, ...]
    frontier: tuple[str, ...]
    """Keys of the plans that nobody beats, fastest first; the untouched model is always among them."""
    original: str
    """Key of the baseline: the untouched model in its reference engine, on all cores."""
    best_lossless: str
    chosen: str
    certificates: tuple[Certificate, ...]
    verdict: Verdict
    twin: Ratio | None
    """The original against itself, through the same comparison: the interval should cover 1."""
    fallen: Mapping[str, str] = field(default_factory=dict)
    """Finalists that failed in the finals, by the plan's key, and why."""
    splits: Mapping[str, int]
    """How many samples each of calibrate, search and certify has."""
    deployment: Path
    """The chosen artifact's ``deployment.toml``."""
    seconds: float
    conditions: Conditions
    compression: Compression | None = None
    """None: the search compressed nothing that needs a sensitivity table or training."""

    def trial(self, key: str) -> Trial:
        """Give the trial of a plan's key."""
        return next(trial for trial in self.trials if trial.key == key)

    def certificate(self, key: str) -> Certificate | None:
        """Give a finalist's certificate, or None."""
        return next((item for item in self.certificates if item.plan == key), None)

    @property
    def json(self) -> bytes:
        """The whole result."""
        return msgspec.json.encode(self, enc_hook=_encode)


def read_result(path: Path) -> Result:
    """Read a ``result.json``.

    Raises:
        StoreError: it is not there, or cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result, dec_hook=_decode)
    except (OSError, msgspec.DecodeError) as error:
        raise StoreError(f"{path} holds no result that can be read: {error}") from error


def _encode(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result holds no {type(value).__name__}")


def _decode(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise TypeError(f"a result holds no {kind.__name__}")
