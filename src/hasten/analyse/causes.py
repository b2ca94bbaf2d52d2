"""Why the slow requests were slow: each is compared with the usual one, part by part, and looked at in its company.

What a request lost is its excess: each part's time over the part's median. The part that lost most says where, and
what went on there says why. A long run is cold, held back, shared with a large request, or just long. A long wait for
an instance is the fault of what kept the instances: the runs of the stretch of waiting that it belongs to are looked
at in the same way, and only where none of them went wrong was there simply too much to do. Time is called lost to a
lack of processor where the samples of the host say so, or where a run and the network stood still together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from hasten.analyse.host_samples import HostSamples
from hasten.analyse.phases import PARTS, Joined, join_phases
from hasten.analyse.server_runs import ServerRuns, infer_ended_ns, server_runs
from hasten.errors import InvalidSetting
from hasten.load.run import Ints, LoadRun
from hasten.measurement import Estimate

CAUSES: Mapping[str, str] = {
    "client_late": "the generator itself was late",
    "network": "the way there or back took long",
    "waited_for_batch": "an instance was free, and the batch was held open for more rows",
    "waited_for_instance": "every instance was busy: more came in than they could take",
    "large_batch_mate": "ran with, or waited behind, a much larger request",
    "own_rows": "had many rows itself",
    "cold_shape": "the first run of a batch size, or waited behind one",
    "throttled": "the server's processes were held back: no processor time while they had work",
    "slow_run": "a run took longer than its size explains, and nothing seen here says why",
    "server_overhead": "decoding, joining or encoding in the server took long",
    "untold": "the server does not tell what it did with the time",
}
"""Every cause that is named, and what it means."""

PART_OF: Mapping[str, str] = {
    "issue_delay": "client",
    "transfer": "network",
    "receive": "network",
    "send": "network",
    "transfer_back": "network",
    "decode": "overhead",
    "pre": "overhead",
    "post": "overhead",
    "encode": "overhead",
    "queue": "queue",
    "batch_wait": "batch_wait",
    "infer": "infer",
}

EXPLAINS = 0.4
"""What accounts for this share of an excess is its cause; the rest is then what follows from it."""

LARGE = 4
"""A request of so many times the usual rows is large."""

SLOWEST = 0.05
"""Where no limit is given, the slowest requests of this share are explained."""

MOST_EXPLAINED = 4000
"""Of more slow requests, so many are looked at, evenly spread."""

EXAMPLES = 3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Slow:
    """One slow request: its place in the run, what it took, what it lost against the usual one, and why."""

    row: int
    response_ns: int
    excess_ns: float
    cause: str
    because: str


@dataclass(frozen=True, kw_only=True)
class CauseShare:
    """One cause: how many of the slow requests it holds with the 95 % interval of that share, and of the time lost."""

    cause: str
    requests: int
    share: Estimate
    lost_share: float
    examples: tuple[Slow, ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why the ``slow`` of ``answered`` requests beyond ``threshold_ns`` were slow, the heaviest cause first."""

    threshold_ns: float
    typical_ns: float
    answered: int
    slow: int
    explained: int
    causes: tuple[CauseShare, ...]
    host_seen: bool
    """The server's host was sampled: what throttled it would have been seen."""

    @property
    def main(self) -> str | None:
        """The cause that lost most time."""
        return self.causes[0].cause if self.causes else None


def explain(run: LoadRun, *, limit_ns: float | None = None, host: HostSamples | None = None) -> Explanation:
    """Explain the requests of a run that took longer than ``limit_ns``, by default the slowest twentieth.

    Raises:
        BadInput: no request was answered. InvalidSetting: the limit is not above 0.
    """
    if limit_ns is not None and limit_ns <= 0:
        raise InvalidSetting(f"a limit of {limit_ns:g} ns is none; every response takes longer than nothing")
    joined = join_phases(run)
    scene = _Scene(run, joined, host)
    response = joined.response_ns
    threshold = float(np.quantile(response, 1 - SLOWEST, method="inverted_cdf")) if limit_ns is None else limit_ns
    slow = np.flatnonzero(response > threshold)
    spread = np.unique(np.linspace(0, max(len(slow) - 1, 0), min(len(slow), MOST_EXPLAINED)).astype(int))
    looked = slow[spread]
    return Explanation(
        threshold_ns=threshold,
        typical_ns=float(np.median(response)),
        answered=len(response),
        slow=len(slow),
        explained=len(looked),
        causes=_by_cause([scene.why(int(i)) for i in looked]),
        host_seen=host is not None,
    )


def _by_cause(slow: list[Slow]) -> tuple[CauseShare, ...]:
    lost = sum(max(one.excess_ns, 0.0) for one in slow)
    found = []
    for cause in {one.cause: None for one in slow}:
        mine = sorted((one for one in slow if one.cause == cause), key=lambda one: -one.excess_ns)
        interval = stats.binomtest(len(mine), len(slow)).proportion_ci(0.95, method="wilson")
        share = Estimate(value=len(mine) / len(slow), low=float(interval.low), high=float(interval.high), n=len(slow))
        found.append(
            CauseShare(
                cause=cause,
                requests=len(mine),
                share=share,
                lost_share=sum(max(one.excess_ns, 0.0) for one in mine) / lost if lost else 0.0,
                examples=tuple(mine[:EXAMPLES]),
            )
        )
    return tuple(sorted(found, key=lambda one: (-one.lost_share, -one.requests)))


class _Scene:
    """A run with all that can be known of it: usual times, the server's runs, stretches of waiting, the host."""

    def __init__(self, run: LoadRun, joined: Joined, host: HostSamples | None) -> None:
        self.run, self.joined, self.host = run, joined, host
        self.rows = run.requests.rows[joined.row]
        self.usual_rows = float(np.median(self.rows))
        self.usual = np.median(joined.parts_ns, axis=0)
        self.runs = server_runs(run, joined)
        self.sent = run.requests.sent_ns[joined.row]
        self.done = run.requests.done_ns[joined.row]
        self.issue = joined.part("issue_delay")
        self.told = {name: joined.part(name) for name in joined.told}
        self.waits = _Stretches(run, joined)
        self.usual_pace = _pace(run, self.runs, host) if self.runs is not None and host is not None else None

        self.faults: dict[int, tuple[str, float, str] | None] = {}
        self.usual_run_ns = 0.0
        self.suspicious = np.zeros(0, bool)
        if self.runs is not None:
            runs, small = self.runs, self.runs.largest_request < LARGE * self.usual_rows
            self.usual_run_ns = float(np.median(runs.expected_ns[small])) if small.any() else np.inf
            self.suspicious = (runs.infer_ns > (1 + EXPLAINS) * runs.expected_ns) | ~small

    def why(self, i: int) -> Slow:
        """Explain one answered request, by its place among them."""
        lost: dict[str, float] = {}
        for name, times in self.told.items():
            group = PART_OF[name]
            usual = float(self.usual[PARTS.index(name)])
            lost[group] = lost.get(group, 0.0) + float(times[i]) - usual
        excess = sum(lost.values())
        where = max(lost, key=lambda group: lost[group])
        cause, because = self._cause(i, where, lost[where])
        return Slow(
            row=int(self.joined.row[i]),
            response_ns=int(self.joined.response_ns[i]),
            excess_ns=excess,
            cause=cause,
            because=because,
        )

    def _cause(self, i: int, where: str, lost_ns: float) -> tuple[str, str]:
        if where == "client":
            return "client_late", f"it left {_ms(float(self.issue[i]))} after its time"
        if where == "batch_wait":
            return "waited_for_batch", f"its batch was held open for {_ms(float(self.told['batch_wait'][i]))}"
        if self.runs is None:
            return self._untold(i, where, lost_ns)
        if where == "infer":
            return self._of_run(self.runs, int(self.runs.run_of[i]), own=int(self.rows[i]))
        if where == "queue":
            return self._of_wait(self.runs, i, lost_ns)
        return self._between(self.runs, i, where, lost_ns)

    def _untold(self, i: int, where: str, lost_ns: float) -> tuple[str, str]:
        if self._client_stalled(i, lost_ns):
            return "client_late", "the generator was late with other requests while it waited"
        if where == "network" and len(self.joined.told) > 3:  # the server tells phases, and lost nothing in them
            return "network", f"{_ms(lost_ns)} were lost outside the phases that the server tells"
        return "untold", f"{_ms(lost_ns)} were lost in the server or on the way"

    def _of_run(self, runs: ServerRuns, r: int, *, own: int) -> tuple[str, str]:
        """Say what was wrong with a run, where something was."""
        found = self._fault(runs, r)
        if found is not None:
            cause, _, text = found
            if cause == "large_batch_mate" and own >= runs.largest_request[r]:
                return "own_rows", f"it has {own} rows, the usual request {self.usual_rows:g}"
            return cause, text
        rows, usual = int(runs.batch_rows[r]), float(np.median(runs.batch_rows))
        if rows > usual:
            return "waited_for_instance", f"it ran in a batch of {rows} rows (usually {usual:g}): many had waited"
        return "slow_run", f"its run of {rows} rows took {_ms(float(runs.infer_ns[r]))}"

    def _fault(self, runs: ServerRuns, r: int) -> tuple[str, float, str] | None:
        """Give the cause, the nanoseconds lost and the words for a run that went wrong; None where it did not."""
        if not self.suspicious[r]:
            return None
        if r not in self.faults:
            self.faults[r] = self._found_fault(runs, r)
        return self.faults[r]

    def _found_fault(self, runs: ServerRuns, r: int) -> tuple[str, float, str] | None:
        infer, expected = float(runs.infer_ns[r]), float(runs.expected_ns[r])
        over, rows = infer - expected, int(runs.batch_rows[r])
        if over > EXPLAINS * expected:
            starved = self._starved(float(runs.start_ns[r]), float(runs.end_ns[r]))
            if starved is not None and starved >= EXPLAINS * over:
                return "throttled", over, f"a run of {_ms(infer)} got no processor for {_ms(starved)} of it"
            if runs.first_of_size[r]:
                return "cold_shape", over, f"the first run of {rows} rows took {_ms(infer)}, usual are {_ms(expected)}"
        large = self._large_ns(runs, r)
        if large > max(over, 0.0) and large > 0:
            text = f"a request of {int(runs.largest_request[r])} rows took the run to {rows} rows and {_ms(infer)}"
            return "large_batch_mate", large, text
        if over > EXPLAINS * expected:
            if self._stood_still(runs, r, over):
                return "throttled", over, f"a run took {_ms(infer)} instead of {_ms(expected)}, and nothing else moved"
            return "slow_run", over, f"a run of {rows} rows took {_ms(infer)}, usual are {_ms(expected)}"
        return None

    def _large_ns(self, runs: ServerRuns, r: int) -> float:
        """Give what a run lost to a large request in it."""
        largest = float(runs.largest_request[r])
        if largest < LARGE * self.usual_rows or largest < runs.batch_rows[r] / 2:
            return 0.0
        return max(float(runs.expected_ns[r]) - self.usual_run_ns, 0.0)

    def _of_wait(self, runs: ServerRuns, i: int, lost_ns: float) -> tuple[str, str]:
        """Say what kept the instances while a request waited, or before, in the same stretch of waiting."""
        first, last = self.waits.before(i)
        faults: dict[str, tuple[float, str]] = {}
        for r in np.flatnonzero(self.suspicious & (runs.start_ns < last) & (runs.end_ns > first)):
            found = self._fault(runs, int(r))
            if found is not None:
                lost, text = faults.get(found[0], (0.0, found[2]))
                faults[found[0]] = (lost + found[1], text)
        if faults:
            cause, (lost, text) = max(faults.items(), key=lambda item: item[1][0])
            if lost >= EXPLAINS * lost_ns:
                return cause, f"it waited {_ms(float(self.told['queue'][i]))} for an instance: {text}"
        starved = self._starved(first, last)
        if starved is not None and starved >= EXPLAINS * lost_ns:
            return "throttled", f"it waited while the server got no processor for {_ms(starved)}"
        stalled = self._client_stalled(i, lost_ns)
        if stalled:
            return "client_late", "the generator was late, and then sent many at once"
        return "waited_for_instance", f"it waited {_ms(float(self.told['queue'][i]))}, and every run was as usual"

    def _between(self, runs: ServerRuns, i: int, where: str, lost_ns: float) -> tuple[str, str]:
        """Explain time that was lost outside queue and run."""
        if self._client_stalled(i, lost_ns):
            return "client_late", "the generator was late with other requests while this one was on its way"
        first, last = float(self.sent[i]), float(self.done[i])
        starved = self._starved(first, last)
        if starved is not None and starved >= EXPLAINS * lost_ns:
            return "throttled", f"the server got no processor for {_ms(starved)} while it was on its way"
        for r in runs.overlapping(first, last):
            over = float(runs.infer_ns[r] - runs.expected_ns[r])
            if over >= EXPLAINS * lost_ns and not runs.first_of_size[r]:
                return "throttled", f"a run stood still at the same time, for {_ms(over)}"
        if where == "network":
            return "network", f"{_ms(lost_ns)} were lost on the way, and the server had no part in it"
        return "server_overhead", f"{_ms(lost_ns)} were lost beside the run"

    def _client_stalled(self, i: int, lost_ns: float) -> bool:
        """Say whether requests that were due while this one was under way left late by as much as it lost."""
        scheduled = self.run.requests.scheduled_ns[self.joined.row]
        window = (scheduled >= self.sent[i] - lost_ns) & (scheduled <= self.done[i])
        late = self.issue[window]
        return bool(len(late)) and float(late.max()) >= max(EXPLAINS * lost_ns, 1e6)

    def _stood_still(self, runs: ServerRuns, r: int, over_ns: float) -> bool:
        """Say whether requests that came during a run reached the server only after it: so all of it stood still."""
        transfer = self.joined.part("transfer")
        came = (self.sent > runs.start_ns[r]) & (self.sent < runs.start_ns[r] + over_ns / 2)
        usual = float(np.median(transfer))
        return bool(came.any()) and float(np.median(transfer[came])) - usual >= EXPLAINS * over_ns / 2

    def _starved(self, first_ns: float, last_ns: float) -> float | None:
        """Give for how long the server got no processor between two times of the run; None: its host was not seen."""
        if self.host is None or self.usual_pace is None:
            return None
        began = self.run.began_unix_ns
        ends = (began + int(first_ns), began + int(last_ns))
        passed = last_ns - first_ns
        throttled = self.host.spent("throttled_ns", *ends) or 0.0
        waiting = self.host.held_back(*ends) or 0.0
        worked = self.host.spent("cpu_ns", *ends)
        idle = 0.0
        if worked is not None and self.usual_pace > 0.2:
            idle = max(passed - worked / self.usual_pace, 0.0)
        return min(max(throttled, waiting, idle), passed)


class _Stretches:
    """Stretches of time in which, without a break, some request waited for an instance."""

    def __init__(self, run: LoadRun, joined: Joined) -> None:
        ended = infer_ended_ns(run, joined)
        infer, queue = joined.part("infer"), joined.part("queue")
        self.until: Ints = ended - infer - joined.part("pre") - joined.part("batch_wait")
        self.since: Ints = self.until - queue
        order = np.argsort(self.since, kind="stable")
        reach = np.maximum.accumulate(self.until[order])
        slack = int(np.median(infer))  # between two runs there is a moment when nobody waits
        breaks = np.ones(len(order), bool)
        breaks[1:] = self.since[order][1:] > reach[:-1] + slack
        starts = self.since[order][np.flatnonzero(breaks)[np.cumsum(breaks) - 1]]
        self.start = np.empty(len(order), np.int64)
        self.start[order] = starts

    def before(self, i: int) -> tuple[float, float]:
        """Give the beginning of the stretch of request ``i``, and when it was taken out of the queue."""
        return float(self.start[i]), float(self.until[i])


def _pace(run: LoadRun, runs: ServerRuns, host: HostSamples) -> float:
    """Give the server's usual processor time per time of a run: how busy it is where it is busy."""
    began, paces = run.began_unix_ns, []
    for r in np.flatnonzero(runs.infer_ns >= np.median(runs.infer_ns))[:400]:
        worked = host.spent("cpu_ns", began + int(runs.start_ns[r]), began + int(runs.end_ns[r]))
        if worked is not None:
            paces.append(worked / max(int(runs.infer_ns[r]), 1))
    return float(np.median(paces)) if paces else 0.0


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.2f} ms"
