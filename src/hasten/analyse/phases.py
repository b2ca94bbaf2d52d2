"""Where a response's time goes, from the client's clock to the client's clock.

Client and server run on clocks of their own, so only durations are joined. Of the time between sending and the first
byte of the answer, what the server's own phases do not account for is the transfer: the way there, the way back, and
the two kernels. It cannot be divided without a common clock, and it is kept as it comes out, negative or not, so that
the parts add up to the response to the nanosecond; how far it is negative is told, for that is what does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from hasten.errors import BadInput
from hasten.load.run import OUTCOMES, PHASES, Ints, LoadRun
from hasten.measurement import Estimate

PARTS = ("issue_delay", "transfer", *PHASES, "transfer_back")
"""What a response is made of, in order. ``issue_delay`` is the generator's own; ``transfer_back`` begins with the
answer's first byte."""

BANDS = ((0.5, 0.05), (0.99, 0.005))
"""Quantiles whose requests are looked at, and how far to each side, in shares of the requests."""

FEWEST_IN_BAND = 5
"""The mean of fewer requests is an anecdote."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The parts of each answered request, [answered, len(PARTS)] in nanoseconds; each row's sum is its response time.

    ``row`` [answered] is its place in the run. ``told`` are the parts that this server makes known; the others are
    part of ``transfer``.
    """

    parts_ns: Ints
    row: Ints
    told: tuple[str, ...]

    @property
    def response_ns(self) -> Ints:
        """[answered]."""
        found: Ints = self.parts_ns.sum(axis=1)
        return found

    def part(self, name: str) -> Ints:
        """Give one part, [answered]."""
        return self.parts_ns[:, PARTS.index(name)]

    @property
    def unfitting(self) -> float:
        """The largest share of a response by which the server's phases are longer than the client's wait."""
        transfer, response = self.part("transfer"), self.response_ns
        if not len(response):
            return 0.0
        return float((np.maximum(-transfer, 0) / np.maximum(response, 1)).max())


@dataclass(frozen=True, kw_only=True)
class Share:
    """One part at a quantile: its mean over the band with a 95 % interval, and its share of the band's response."""

    part: str
    mean_ns: Estimate
    share: float


@dataclass(frozen=True, kw_only=True)
class Band:
    """The requests around the ``q`` quantile of the response time; the shares add up to 1."""

    q: float
    n: int
    response_ns: float
    """Their mean response time."""
    shares: tuple[Share, ...]


def join_phases(run: LoadRun) -> Joined:
    """Join client and server durations of every answered request.

    Raises:
        BadInput: no request was answered.
    """
    requests = run.requests
    row = np.flatnonzero((requests.outcome == OUTCOMES.index("ok")) & (requests.done_ns >= 0) & (requests.sent_ns >= 0))
    if not len(row):
        raise BadInput(f"none of the {len(requests.outcome)} requests of this run was answered: it has no phases")
    phases = requests.phases_ns[row]
    known = [bool((column >= 0).any()) for column in phases.T]
    phases = np.maximum(phases, 0)
    scheduled, sent, done = requests.scheduled_ns[row], requests.sent_ns[row], requests.done_ns[row]
    first = np.where(requests.first_ns[row] >= 0, requests.first_ns[row], done)
    transfer = first - sent - phases.sum(axis=1)
    parts = np.column_stack([sent - scheduled, transfer, phases, done - first])
    told = tuple(name for name, there in zip(PHASES, known, strict=True) if there)
    return Joined(parts_ns=parts, row=row, told=("issue_delay", "transfer", *told, "transfer_back"))


def bands(joined: Joined) -> tuple[Band, ...]:
    """Give the parts at p50 and p99; a quantile with too few requests around it is left out."""
    found = [band(joined, q, width) for q, width in BANDS]
    return tuple(one for one in found if one is not None)


def band(joined: Joined, q: float, width: float) -> Band | None:
    """Give the parts of the requests whose response lies within ``width`` of the ``q`` quantile, by rank."""
    response = joined.response_ns
    n = len(response)
    order = np.argsort(response, kind="stable")
    chosen = order[int(np.floor((q - width) * n)) : max(int(np.ceil((q + width) * n)), 1)]
    if len(chosen) < FEWEST_IN_BAND:
        return None
    places = [PARTS.index(name) for name in joined.told]
    parts = joined.parts_ns[chosen][:, places].astype(np.float64)  # [chosen, told]
    total = float(parts.sum(axis=1).mean())
    mean = parts.mean(axis=0)  # [told]
    half = stats.t.ppf(0.975, len(chosen) - 1) * parts.std(axis=0, ddof=1) / np.sqrt(len(chosen))
    low = np.maximum(mean - half, np.minimum(parts.min(axis=0), 0.0))  # only a transfer may come out negative
    shares = tuple(
        Share(
            part=name,
            mean_ns=Estimate(value=float(mean[k]), low=float(low[k]), high=float(mean[k] + half[k]), n=len(chosen)),
            share=float(mean[k]) / total if total else 0.0,
        )
        for k, name in enumerate(joined.told)
    )
    return Band(q=q, n=len(chosen), response_ns=total, shares=shares)
