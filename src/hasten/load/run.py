"""The record of one run of load: a row a request, in columns, and under which conditions it was taken."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hasten.artifact import Json
from hasten.protocol.phases import PHASES

OUTCOMES = ("ok", "refused", "timeout", "error", "unsent")
"""How a request ended: answered; refused by admission (503, 429, RESOURCE_EXHAUSTED, UNAVAILABLE); no answer within its
time; any other failure; never sent, because the run ended before. All but the first miss every objective."""

STOPPED = "it was stopped"
"""Why a run ended early that was interrupted."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Columns, each [n], in the order of the schedule. Times in nanoseconds since the run began; -1: it never came."""

    scheduled_ns: Ints
    """When the plan has it leave; in a closed loop, when it left. Latency counts from here."""
    sent_ns: Ints
    """When the generator let it go: its bytes were handed to a socket, or a connection was asked for to carry them.
    Minus ``scheduled_ns``: the delay that is the generator's own."""
    first_ns: Ints
    """When the first byte of the answer was read."""
    done_ns: Ints
    """When the answer was there as a whole."""
    outcome: Ints
    """Place in ``OUTCOMES``."""
    status: Ints
    """Of HTTP, or of gRPC by number; -1: none came."""
    rows: Ints
    """Samples in the request."""
    sample: Ints
    """Which of the payloads it carried."""
    sent_bytes: Ints
    received_bytes: Ints
    phases_ns: Ints
    """[n, len(PHASES)], as the server tells them; -1: it does not tell."""
    batch_rows: Ints
    """Rows of the batch that it was inferred in, padding included; -1: the server does not tell."""
    instance: Ints
    """Which instance of the model inferred it; -1: the server does not tell."""

    @property
    def latency_ns(self) -> Ints:
        """[n], from the scheduled time to the end of the answer; -1 where there was no answer."""
        return np.where(self.done_ns >= 0, self.done_ns - self.scheduled_ns, -1)


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """What was asked, what came back, and where."""

    url: str
    protocol: str
    """rest-json, rest-binary, grpc, http (any endpoint), or session (in this process)."""
    model: str
    version: str | None
    arrivals: str
    """The plan in one line, as it was asked for: ``poisson:rate=200``, ``closed:concurrency=8``."""
    seed: int
    duration_s: float
    timeout_s: float
    began_unix_ns: int
    requests: Requests
    conditions: dict[str, Json] = field(default_factory=dict)
    """Of this machine, the generator's processors, and what the server says of itself."""
    cut_short: str | None = None
    """Why it ended before its plan did; what was measured until then is kept."""


__all__ = ["OUTCOMES", "PHASES", "Ints", "LoadRun", "Requests"]
