"""Numbers with their units, intervals and conditions: what a trial leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hasten.host import Host, Load
from hasten.tensors import Signature, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval, and how many independent observations stand behind it."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width, in the value's unit."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Ratio(Estimate):
    """Time of a baseline over time of a candidate: above 1, the candidate is faster. ``n`` counts blocks."""

    settled: bool
    """The interval is as narrow as asked; if not, the comparison is INCONCLUSIVE unless it wins all the same."""

    @property
    def wins(self) -> bool:
        """Faster beyond doubt: the whole interval above 1.02."""
        return self.low > WIN

    @property
    def loses(self) -> bool:
        """Slower beyond doubt: the whole interval below 1 / 1.02."""
        return self.high < 1 / WIN


WIN = 1.02
"""A difference under 2 % is called none: it is less than what two runs of one binary may differ by."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which circumstances a number was taken. ``started`` is ISO 8601, UTC."""

    host: Host
    load: Load
    threads: int
    batch: int
    versions: Mapping[str, str]
    started: str


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of single runs, in nanoseconds, after warm-up."""

    median_ns: float
    """The median of the slices' medians."""
    p90_ns: float | None
    """None: too few runs to claim it (44 at least)."""
    p99_ns: float | None
    """None: too few runs to claim it (459 at least)."""
    runs: int
    slices_ns: tuple[float, ...]
    """The median of each slice, in the order they were run: the raw material of the intervals."""
    first_run_ns: float
    settled: bool
    """Warm-up ended because two successive windows agreed, not because its time was over."""
    misses: int | None = None
    """Runs over the goal's p99 limit, where there is such a goal."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How a candidate's outputs compare with the original's on the same samples."""

    metric: str
    higher_is_better: bool
    reference: float | None
    """The original's score; None for a metric of agreement with it."""
    value: float
    drop: Estimate
    """What was lost, positive is worse: original minus candidate, or the reverse where lower is better.
    Absolute for metrics bounded by 1, else a share of the original's score. ``n`` counts samples."""
    flip_rate: float | None
    """Share of samples whose predicted class changed; None where outputs are no classes."""
    disagreement: float
    """Share of samples whose score changed: what decides how many samples a proof needs."""
    worst_class: tuple[str, float] | None = None
    """The class that lost most, and its drop."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a loaded model takes. ``rss_bytes``: resident memory over an empty process of the same engine."""

    file_bytes: int
    load_ns: float
    rss_bytes: int
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One node of the graph that an engine really runs, with concrete shapes, as the engine tells it.

    ``inputs`` hold activations and weights alike; ``weights`` names those that are constant. ``time_ns`` is the
    median over profiled runs (None: the engine does not tell), ``sources`` the nodes of the original graph that
    it stands for, as far as the engine tells. ``dtype`` is the precision in which it computes.
    """

    name: str
    kind: str
    dtype: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...] = ()
    time_ns: float | None = None
    sources: tuple[str, ...] = ()


Limit = Literal["compute", "memory", "overhead"]


@dataclass(frozen=True, kw_only=True)
class OperatorBound:
    """An operator beside the machine's limit."""

    name: str
    kind: str
    dtype: str
    operations: float
    bytes: float
    bound_ns: float
    """max(operations / peak, bytes / bandwidth)."""
    time_ns: float | None
    limit: Limit
    """What holds it: arithmetic, memory, or neither (then it runs at under a quarter of its bound)."""

    @property
    def efficiency(self) -> float | None:
        """Bound over time, at most 1 for an honest bound; None where the engine gave no time."""
        return self.bound_ns / self.time_ns if self.time_ns else None


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The machine's physical limit for one model at one precision, batch and thread count.

    ``strict_ns`` is the larger of all arithmetic and all compulsory traffic; ``grouped_ns`` the sum over operators;
    ``winograd_ns`` the latter with 3x3 stride-1 convolutions counted at Winograd's cost. The times of ``operators``
    and ``outside_ns`` add up to ``measured_ns``.
    """

    strict_ns: float
    grouped_ns: float
    winograd_ns: float | None
    measured_ns: float
    outside_ns: float
    """Time that no operator accounts for: the engine's own dispatch, copies in and out."""
    operators: tuple[OperatorBound, ...]
    unpriced: tuple[str, ...]
    """Kinds of operators whose arithmetic is not counted; their bytes are."""
    profile_scale: float = 1.0
    """What the profiled times of ``operators`` were multiplied by: under 1, they summed up to more than
    ``measured_ns``, because profiling takes time itself."""

    @property
    def efficiency(self) -> float:
        """``grouped_ns`` over ``measured_ns``."""
        return self.grouped_ns / self.measured_ns


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What this host can do, measured, by thread count: operations and bytes per second."""

    threads: int
    operations_per_s: Mapping[str, float]
    """By dtype: float32, int8, and bfloat16 or float16 where the host computes in them."""
    bytes_per_s: float
    """Of memory: more than the caches hold is in use."""
    fingerprint: str
    cached_bytes_per_s: Mapping[int, float] = field(default_factory=dict)
    """Bytes per second by how many bytes are in use, over and over: the caches' bandwidth, falling with the size."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything that was measured of one built plan. What was not measured is None."""

    latency: Latency
    speedup: Ratio
    """Over the run's baseline, interleaved with it block by block."""
    resources: Resources
    conditions: Conditions
    signature: Signature
    quality: Quality | None = None
    bound: Bound | None = None
