"""An objective for response times, as a person writes it: ``p99 <= 20ms``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hasten.errors import InvalidSetting

_WRITTEN = re.compile(r"\s*p([0-9]{1,2}(?:\.[0-9]{1,4})?)\s*<=?\s*([0-9]*\.?[0-9]+)\s*(us|µs|ms|s)\s*")
_UNITS_NS = {"us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """At most ``1 - q`` of all requests take longer than ``limit_ns``; one without an answer does."""

    q: float
    limit_ns: float

    def __str__(self) -> str:
        return f"p{self.q * 100:.6g} <= {self.limit_ns / 1e6:.6g}ms"


def read_objective(text: str) -> Objective:
    """Read an objective. Raises InvalidSetting: it is none, or has a percentile or a time that cannot be."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise InvalidSetting(f"{text!r} is no objective; write a percentile and a time, as 'p99 <= 20ms'")
    q, limit_ns = round(float(found[1]) / 100, 9), float(found[2]) * _UNITS_NS[found[3]]
    if not 0 < q < 1 or limit_ns <= 0:
        raise InvalidSetting(f"{text!r} has a percentile or a time of 0; write it as 'p99 <= 20ms'")
    return Objective(q=q, limit_ns=limit_ns)
