"""When requests leave: arrival plans, in one line of text each, with every due time fixed before the run.

poisson:rate=200                        independent arrivals, 200 each second
constant:rate=200                       one every 5 ms
burst:rate=50,size=20,every=2s          Poisson arrivals at 50/s, and 20 at once every 2 s
ramp:from=10,to=500                     Poisson arrivals whose rate rises evenly over the run
trace:times.txt                         the times of a file, seconds from its start, or those of a recorded run
closed:concurrency=8                    a closed loop: 8 requests under way, each answer lets the next one go
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hasten.errors import BadInput, InvalidSetting, UnknownName
from hasten.load.record import RUN, read_run
from hasten.load.run import Ints

MOST_REQUESTS = 20_000_000
"""Of one run: its columns take 160 bytes for each."""

LARGEST_TRACE_BYTES = 1 << 28
NS = 1e9
Floats = npt.NDArray[np.float64]


class Arrivals(Protocol):
    """An arrival plan. ``str`` gives its line."""

    kind: ClassVar[str]

    def due_ns(self, duration_s: float, seed: int) -> Ints:
        """Give every due time below ``duration_s``, ascending, in nanoseconds since the run begins.

        Raises:
            InvalidSetting: there would be more than ``MOST_REQUESTS``.
        """


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Independent arrivals."""

    kind: ClassVar[str] = "poisson"
    rate: float

    def __str__(self) -> str:
        return f"{self.kind}:rate={self.rate:g}"

    def due_ns(self, duration_s: float, seed: int) -> Ints:
        """Give the due times."""
        return _ns(_unit_poisson(self.rate * duration_s, np.random.default_rng(seed)) / self.rate)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Arrivals with equal gaps; the first at 0."""

    kind: ClassVar[str] = "constant"
    rate: float

    def __str__(self) -> str:
        return f"{self.kind}:rate={self.rate:g}"

    def due_ns(self, duration_s: float, seed: int) -> Ints:
        """Give the due times."""
        count = math.ceil(_few(self.rate * duration_s) * (1 - 1e-12))  # 3 s at 0.1 s is 30, however it is rounded
        return _ns(np.arange(count) / self.rate)


@dataclass(frozen=True, kw_only=True)
class Burst:
    """Poisson arrivals, and every so often ``size`` requests at one instant; the first burst after one interval."""

    kind: ClassVar[str] = "burst"
    rate: float
    size: int
    every_s: float

    def __str__(self) -> str:
        return f"{self.kind}:rate={self.rate:g},size={self.size},every={self.every_s:g}s"

    def due_ns(self, duration_s: float, seed: int) -> Ints:
        """Give the due times."""
        _few((self.rate + self.size / self.every_s) * duration_s)
        between = _unit_poisson(self.rate * duration_s, np.random.default_rng(seed)) / self.rate
        starts = np.arange(1, math.ceil(duration_s / self.every_s)) * self.every_s
        return _ns(np.sort(np.concatenate([between, np.repeat(starts, self.size)]), kind="stable"))


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Poisson arrivals whose rate goes evenly from one value to another over the run."""

    kind: ClassVar[str] = "ramp"
    from_rate: float
    to_rate: float

    def __str__(self) -> str:
        return f"{self.kind}:from={self.from_rate:g},to={self.to_rate:g}"

    def due_ns(self, duration_s: float, seed: int) -> Ints:
        """Give the due times: those of a process of rate 1, through the inverse of the rate's integral."""
        mass = (self.from_rate + self.to_rate) / 2 * duration_s
        marks = _unit_poisson(mass, np.random.default_rng(seed))
        slope = (self.to_rate - self.from_rate) / duration_s
        # from t + slope t²/2 = mark, solved in the form that has no difference of nearly equal numbers
        root = np.sqrt(np.maximum(self.from_rate**2 + 2 * slope * marks, 0.0))
        return _ns(np.minimum(2 * marks / (self.from_rate + root), np.nextafter(duration_s, 0)))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Recorded arrivals: a text file with a time in seconds on each line, or the folder of a recorded run."""

    kind: ClassVar[str] = "trace"
    path: Path

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    def times_s(self) -> Floats:
        """Read all its times. Raises BadInput or StoreError: the file cannot be used, and where."""
        if (self.path / RUN).is_file():
            return read_run(self.path).requests.scheduled_ns / NS
        try:
            if self.path.stat().st_size > LARGEST_TRACE_BYTES:
                raise BadInput(f"{self.path} is larger than the {LARGEST_TRACE_BYTES} bytes that are read of a trace")
            lines = self.path.read_text().split()
            found = np.array(lines, dtype=np.float64)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the trace {self.path} cannot be read: {error}") from error
        except ValueError as error:
            raise BadInput(f"the trace {self.path} needs one time in seconds on each line: {error}") from error
        if not len(found):
            raise BadInput(f"the trace {self.path} is empty")
        if not np.isfinite(found).all() or (found < 0).any() or (np.diff(found) < 0).any():
            raise BadInput(f"the times in the trace {self.path} must be finite, 0 or more, and ascending")
        return found

    def due_ns(self, duration_s: float, seed: int) -> Ints:
        """Give the due times."""
        times = self.times_s()
        found = times[times < duration_s]
        _few(len(found))
        if not len(found):
            raise BadInput(f"the trace {self.path} begins at {times[0]:g} s, after the {duration_s:g} s of this run")
        return _ns(found)


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A closed loop, for the highest throughput: no due times; each answer lets the next request go."""

    kind: ClassVar[str] = "closed"
    concurrency: int

    def __str__(self) -> str:
        return f"{self.kind}:concurrency={self.concurrency}"

    def due_ns(self, duration_s: float, seed: int) -> Ints:
        """Give none."""
        return np.zeros(0, np.int64)


def read_arrivals(text: str) -> Arrivals:
    """Read an arrival plan from its line.

    Raises:
        UnknownName: there is no such plan. InvalidSetting: a setting is missing, not known, or out of its range.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise UnknownName("arrival plan", kind, KINDS)
    if kind == Trace.kind:
        if not rest:
            raise InvalidSetting("a trace needs its file; write it as trace:times.txt")
        return Trace(path=Path(rest))
    example, names, make = READERS[kind]
    told: dict[str, str] = {}
    for piece in rest.split(","):
        key, equals, value = piece.partition("=")
        if not equals or key.strip() in told:
            raise InvalidSetting(f"{text!r} cannot be read at {piece!r}; write it as {example}")
        told[key.strip()] = value.strip()
    if set(told) != set(names):
        raise InvalidSetting(f"{text!r} needs {' and '.join(names)} and nothing else; write it as {example}")
    try:
        return make({name: names[name](value) for name, value in told.items()})
    except ValueError as error:
        raise InvalidSetting(f"{text!r}: {error}; write it as {example}") from error


def _number(text: str) -> float:
    value = float(text.removesuffix("/s"))
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r} must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= MOST_REQUESTS:
        raise ValueError(f"{text!r} must be 1 or more, and at most {MOST_REQUESTS}")
    return value


def _seconds(text: str) -> float:
    for unit, scale in (("ms", 1e-3), ("s", 1.0)):
        if text.endswith(unit):
            return _number(text.removesuffix(unit)) * scale
    raise ValueError(f"{text!r} is no time with its unit, as 2s or 500ms")


Read = Callable[[str], float]
READERS: Mapping[str, tuple[str, Mapping[str, Read], Callable[[Mapping[str, float]], Arrivals]]] = {
    "poisson": ("poisson:rate=200", {"rate": _number}, lambda told: Poisson(rate=told["rate"])),
    "constant": ("constant:rate=200", {"rate": _number}, lambda told: Constant(rate=told["rate"])),
    "burst": (
        "burst:rate=50,size=20,every=2s",
        {"rate": _number, "size": _count, "every": _seconds},
        lambda told: Burst(rate=told["rate"], size=int(told["size"]), every_s=told["every"]),
    ),
    "ramp": (
        "ramp:from=10,to=500",
        {"from": _number, "to": _number},
        lambda told: Ramp(from_rate=told["from"], to_rate=told["to"]),
    ),
    "closed": (
        "closed:concurrency=8",
        {"concurrency": _count},
        lambda told: Closed(concurrency=int(told["concurrency"])),
    ),
}
"""Each plan of settings: how it is written, the settings, and how it is made of them."""

KINDS = (*READERS, Trace.kind)


def _few(requests: float) -> float:
    if requests > MOST_REQUESTS:
        raise InvalidSetting(f"the plan has about {requests:.0f} requests; a run has {MOST_REQUESTS} at most")
    return requests


def _unit_poisson(mass: float, random: np.random.Generator) -> Floats:
    """Draw the points of a Poisson process of rate 1 below ``mass``, ascending."""
    _few(mass)
    pieces, reached = [], 0.0
    while reached < mass:
        count = int(mass - reached + 4 * math.sqrt(mass - reached)) + 16
        points = reached + np.cumsum(random.exponential(size=count))
        pieces.append(points)
        reached = float(points[-1])
    points = np.concatenate(pieces)
    return points[points < mass]


def _ns(times_s: Floats) -> Ints:
    return np.floor(times_s * NS).astype(np.int64)
