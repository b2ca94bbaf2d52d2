"""A discrete-event simulation of our server: the real batcher and the real admission, on a clock that is made up.

``serve.batching`` and ``serve.admission`` decide; what stands here is what they decide about: arrivals, the event
loop, instances that are woken, run and slow each other, and clients that wait. It follows ``serve.line.Line`` and
``serve.pool.Pool`` step by step: the idle instance that came last is rung first, an instance that ends a run takes the
next batch at once, and one that took a batch rings another where rows are left.

A run takes t(n) of its size, times a residual that was measured. Where instances share cores, each run goes on at the
rate that t(n) with so many busy instances says, and work of the event loop takes its time from a run that is going on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hasten.analyse.batch_costs import BatchCosts
from hasten.deployment import Serving
from hasten.errors import InvalidSetting
from hasten.load.run import Ints
from hasten.serve.admission import Asked, Inside, Limits, queued_ns, refusal
from hasten.serve.batching import NEVER, Batch, Batcher, Entry
from hasten.serve.costs import CostCurve

ROW_BYTES = 4
"""Bytes of a row as the queue's bound in bytes sees it where nothing else is known."""

STRETCH = 16
"""Measured values are drawn in stretches of so many."""

OK, REFUSED, LATE = 0, 1, 2
"""How a simulated request ended: places in ``load.run.OUTCOMES``."""

Disturb = Callable[[int, int, int], float]
"""(size, start in ns, instance): nanoseconds that a run takes longer, for the sake of what-if questions."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A service to be simulated. ``cores`` are those that its instances and its event loop share."""

    costs: BatchCosts
    instances: int
    cores: int
    sizes: tuple[int, ...]
    threads: int = 1
    serving: Serving = field(default_factory=Serving)

    def __post_init__(self) -> None:
        if self.instances < 1 or self.cores < 1 or self.threads < 1 or not self.sizes or min(self.sizes) < 1:
            raise InvalidSetting(f"a service needs instances, cores, threads and batch sizes of 1 or more: {self}")


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When requests come, [n] in nanoseconds, ascending, and how many rows each has, [n].

    ``concurrency`` above 0 makes it a closed loop: so many clients, each sending its next request, in this order, when
    its last one is answered; then only the first times are used.
    """

    due_ns: Ints
    rows: Ints
    concurrency: int = 0


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What came of each request, [n] each; times in nanoseconds, -1: it never came."""

    due_ns: Ints
    done_ns: Ints
    outcome: Ints
    rows: Ints
    queue_ns: Ints
    batch_wait_ns: Ints
    infer_ns: Ints
    batch_rows: Ints
    instance: Ints

    @property
    def response_ns(self) -> npt.NDArray[np.float64]:
        """[n]; infinite where there was no answer, as ``load.figures.times_of`` has it."""
        return np.where(self.outcome == OK, self.done_ns - self.due_ns, np.inf)


def poisson(rate: float, count: int, *, seed: int, rows: Sequence[int] = (1,)) -> Arrivals:
    """Give ``count`` requests at ``rate`` a second, as independent clients send them; rows drawn from ``rows``."""
    if rate <= 0 or count < 1:
        raise InvalidSetting(f"arrivals need a rate above 0 and 1 request or more; got {rate:g}/s and {count}")
    random = np.random.default_rng(seed)
    due = np.cumsum(random.exponential(1e9 / rate, count)).astype(np.int64)
    return Arrivals(due_ns=due, rows=random.choice(np.asarray(rows, np.int64), count))


def closed(concurrency: int, count: int, *, rows: Sequence[int] = (1,), seed: int = 0) -> Arrivals:
    """Give ``count`` requests of ``concurrency`` clients that wait for their answers."""
    if not 1 <= concurrency <= count:
        raise InvalidSetting(f"a closed loop needs 1 client or more, and a request for each; got {concurrency}")
    random = np.random.default_rng(seed)
    due = np.zeros(count, np.int64)
    return Arrivals(due_ns=due, rows=random.choice(np.asarray(rows, np.int64), count), concurrency=concurrency)


def simulate(setup: Setup, arrivals: Arrivals, *, seed: int, disturb: Disturb | None = None) -> Simulated:
    """Simulate a service under load. The same arguments give the same answer."""
    machine = _Machine(setup, arrivals, seed, disturb)
    machine.go()
    return machine.result()


@dataclass(eq=False)
class _Instance:
    place: int
    idle_ns: int = 0
    batch: Batch[Entry] | None = None
    began_ns: int = 0
    left_ns: float = 0.0
    """Work of the run that is left, in nanoseconds alone on the machine."""
    slowed: float = 1.0
    seen_ns: int = 0
    turn: int = 0
    """Counts what it was told to do, so that what was planned before is known to be over."""


class _Machine:
    def __init__(self, setup: Setup, arrivals: Arrivals, seed: int, disturb: Disturb | None) -> None:
        n, costs = len(arrivals.due_ns), setup.costs
        serving = setup.serving
        self.setup, self.arrivals, self.disturb = setup, arrivals, disturb
        curve = CostCurve(setup.sizes)
        for size in curve.sizes:
            curve.update(size, int(costs.ns(size)))
        objective_ms = serving.objective_ms
        self.objective_ns = None if objective_ms is None else int(objective_ms * 1e6)
        self.timeout_ns = None if serving.timeout_ms is None else int(serving.timeout_ms * 1e6)
        self.limits = Limits(
            rows=serving.queue_rows,
            n_bytes=serving.queue_bytes,
            concurrency=serving.concurrency,
            wait_ns=self.objective_ns,
        )
        self.batcher: Batcher[Entry] = Batcher(curve, waits=objective_ms is not None)
        self.whose: dict[Entry, int] = {}
        """The requests of the pieces that wait or run."""
        self.instances = [_Instance(place) for place in range(setup.instances)]
        self.idle = list(self.instances)
        self.busy = 0
        self.inside = 0
        random = np.random.default_rng(seed)
        self.residuals = _drawn(costs.residuals, n + 16, random).tolist()
        away = np.maximum(_drawn(costs.outside_ns, n, random) - costs.loop_ns, 0.0)
        self.away_ns: list[int] = (away / 2).astype(np.int64).tolist()
        self.drawn = 0
        self.loop_free_ns = 0
        self.between_ns = int(costs.between_ns)
        self.half_loop_ns = int(costs.loop_ns / 2)
        self.alone_ns = {size: costs.ns(size) for size in setup.sizes}
        busy = range(1, setup.instances + 1)
        self.slowdown = {(size, k): costs.slowdown(size, k) for size in setup.sizes for k in busy}
        self.events: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self.planned = 0
        self.now_ns = 0
        self.sent = 0
        self.due = arrivals.due_ns.tolist()
        self.rows = arrivals.rows.tolist()
        self.left = [0] * n
        self.done = [-1] * n
        self.outcome = [OK] * n
        self.marks: list[tuple[int, int, int, int, int]] = [(-1, -1, -1, -1, -1)] * n
        self.queued = [0] * n

    def go(self) -> None:
        for _ in range(self.arrivals.concurrency or 1):
            self.send_next()
        while self.events:
            self.now_ns, _, do, what = heapq.heappop(self.events)
            do(*what)

    def result(self) -> Simulated:
        marks = np.array(self.marks, np.int64)
        return Simulated(
            due_ns=np.array(self.due, np.int64),
            done_ns=np.array(self.done, np.int64),
            outcome=np.array(self.outcome, np.int64),
            rows=self.arrivals.rows,
            queue_ns=marks[:, 0],
            batch_wait_ns=marks[:, 1],
            infer_ns=marks[:, 2],
            batch_rows=marks[:, 3],
            instance=marks[:, 4],
        )

    def at(self, when_ns: int, do: Callable[..., None], *what: object) -> None:
        self.planned += 1
        heapq.heappush(self.events, (max(when_ns, self.now_ns), self.planned, do, what))

    def send_next(self) -> None:
        """Let the next request leave its client: one plans the next, so the heap stays small."""
        if self.sent >= len(self.due):
            return
        i, self.sent = self.sent, self.sent + 1
        if self.arrivals.concurrency:
            self.due[i] = self.now_ns
        self.at(self.due[i] + self.away_ns[i], self.arrive, i)

    def arrive(self, i: int) -> None:
        if not self.arrivals.concurrency:
            self.send_next()
        self.at(self.on_loop(), self.enter, i)

    def on_loop(self) -> int:
        """Let the event loop do its part of a request; gives when that is done."""
        work = self.half_loop_ns
        self.loop_free_ns = max(self.now_ns, self.loop_free_ns) + work
        if work and self.busy * self.setup.threads >= self.setup.cores:
            self.hold_up(work)
        return self.loop_free_ns

    def hold_up(self, work_ns: int) -> None:
        """Take time from a run that goes on: there is no core left for the event loop."""
        running = [one for one in self.instances if one.batch is not None]
        one = running[self.planned % len(running)]
        self.settle(one)
        one.left_ns += work_ns / one.slowed
        self.plan_end(one)

    def enter(self, i: int) -> None:
        rows, serving = self.rows[i], self.setup.serving
        deadline_ns = NEVER if self.timeout_ns is None else self.now_ns + self.timeout_ns
        if self.refused(rows, deadline_ns):
            self.finish(i, REFUSED)
            return
        self.inside += 1
        self.queued[i] = self.now_ns
        largest = self.setup.sizes[-1]
        for first in range(0, rows, largest):
            n = min(largest, rows - first)
            piece = Entry({}, n, None, self.now_ns, serving.priority, n * ROW_BYTES)
            self.whose[piece] = i
            piece.due_ns = NEVER if self.objective_ns is None else self.now_ns + self.objective_ns
            piece.deadline_ns = deadline_ns
            self.left[i] += 1
            self.batcher.put(piece, self.now_ns)
        if deadline_ns != NEVER:
            self.at(deadline_ns, self.look, i)
        self.ring()

    def refused(self, rows: int, deadline_ns: int) -> bool:
        limits, batcher = self.limits, self.batcher
        if (
            self.inside < limits.concurrency
            and batcher.rows + rows <= limits.rows
            and deadline_ns == NEVER
            and limits.wait_ns is None
        ):
            return False
        free = 0
        if not self.idle:
            curve = batcher.costs
            ends = [o.began_ns + curve.ns(o.batch.size) - self.now_ns for o in self.instances if o.batch is not None]
            free = max(min(ends, default=0), 1) if ends else 0
        inside = Inside(calls=self.inside, instances=len(self.instances), free_ns=free)
        asked = Asked(
            rows=rows, n_bytes=rows * ROW_BYTES, priority=self.setup.serving.priority, deadline_ns=deadline_ns
        )
        wait_ns = free + queued_ns(batcher, rows, asked.priority, inside.instances)
        return refusal(batcher, asked, limits=limits, inside=inside, now_ns=self.now_ns, wait_ns=wait_ns) is not None

    def look(self, i: int) -> None:
        """End a request whose time is over."""
        for piece in self.batcher.expire(self.now_ns):
            late = self.whose.pop(piece)
            if self.left[late]:
                self.end(late, LATE)
        if self.left[i]:
            self.end(i, LATE)

    def ring(self) -> None:
        if self.idle:
            one = self.idle.pop()
            one.turn += 1
            self.at(self.now_ns + int(self.setup.costs.wake_ns), self.take, one, one.turn)

    def take(self, one: _Instance, turn: int) -> None:
        if turn != one.turn:
            return
        taken = self.batcher.take(self.now_ns)
        for piece in taken.dropped:
            late = self.whose.pop(piece)
            if self.left[late]:
                self.end(late, LATE)
        if taken.batch is not None:
            self.begin(one, taken.batch)
            if self.batcher.rows:
                self.ring()
            return
        one.turn += 1
        if one not in self.idle:
            self.idle.append(one)
        if taken.again_ns < NEVER:
            self.at(taken.again_ns, self.take_again, one, one.turn)

    def take_again(self, one: _Instance, turn: int) -> None:
        if turn == one.turn and one in self.idle:
            self.idle.remove(one)
            self.take(one, turn)

    def begin(self, one: _Instance, batch: Batch[Entry]) -> None:
        extra = self.disturb(batch.size, self.now_ns, one.place) if self.disturb else 0.0
        one.batch, one.began_ns, one.seen_ns = batch, self.now_ns, self.now_ns
        one.left_ns = self.alone_ns[batch.size] * self.residuals[self.drawn % len(self.residuals)] + extra
        self.drawn += 1
        self.busy += 1
        self.share_cores()

    def share_cores(self) -> None:
        """So many run now: let each go on at the rate that belongs to it."""
        for one in self.instances:
            if one.batch is not None:
                self.settle(one)
                one.slowed = self.slowdown[one.batch.size, self.busy]
                self.plan_end(one)

    def settle(self, one: _Instance) -> None:
        one.left_ns -= (self.now_ns - one.seen_ns) / one.slowed
        one.seen_ns = self.now_ns

    def plan_end(self, one: _Instance) -> None:
        one.turn += 1
        self.at(self.now_ns + max(int(one.left_ns * one.slowed), 0), self.ended, one, one.turn)

    def ended(self, one: _Instance, turn: int) -> None:
        if turn != one.turn or one.batch is None:
            return
        batch, one.batch = one.batch, None
        self.busy -= 1
        infer_ns = self.now_ns - one.began_ns
        self.batcher.costs.update(batch.size, infer_ns)
        answered = []
        for piece in batch.entries:
            i = self.whose.pop(piece)
            if not self.left[i]:
                continue  # its time was over while it ran
            idle_ns = min(max(one.idle_ns, self.queued[i]), one.began_ns)
            self.marks[i] = (idle_ns - self.queued[i], one.began_ns - idle_ns, infer_ns, batch.size, one.place)
            self.left[i] -= 1
            if not self.left[i]:
                self.inside -= 1
                answered.append(i)
        self.share_cores()
        if self.between_ns:
            one.turn += 1
            self.at(self.now_ns + self.between_ns, self.take_next, one, one.turn)
        else:
            self.take_next(one, one.turn)
        for i in answered:  # the event loop writes them while the instance is at its next run
            self.finish(i, OK)

    def take_next(self, one: _Instance, turn: int) -> None:
        one.idle_ns = self.now_ns
        self.take(one, turn)

    def end(self, i: int, outcome: int) -> None:
        self.left[i] = 0
        self.inside -= 1
        self.finish(i, outcome)

    def finish(self, i: int, outcome: int) -> None:
        self.outcome[i] = outcome
        answered = self.on_loop() + self.away_ns[i]
        self.done[i] = answered
        if self.arrivals.concurrency:
            self.at(answered, self.send_next)


def _drawn(values: npt.NDArray[np.float64], n: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw ``n`` values in stretches, as they came: what disturbs a machine lasts for more than one run.

    The moving-block bootstrap (H. R. Kuensch, "The Jackknife and the Bootstrap for General Stationary Observations",
    The Annals of Statistics 17, 1989).
    """
    length = max(1, min(STRETCH, len(values) // 4))
    starts = random.integers(0, len(values) - length + 1, -(-n // length))
    found: npt.NDArray[np.float64] = values[(starts[:, None] + np.arange(length)).reshape(-1)[:n]]
    return found
