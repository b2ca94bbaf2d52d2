"""Records of load with one thing gone wrong in each, made by the simulation of the service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hasten.analyse.batch_costs import BatchCosts
from hasten.analyse.host_samples import HostSamples
from hasten.analyse.simulate import Arrivals, Disturb, Setup, Simulated, poisson, simulate
from hasten.deployment import Serving
from hasten.load.run import OUTCOMES, PHASES, LoadRun, Requests

Ints = npt.NDArray[np.int64]

MS = 1_000_000
BEGAN = 1_700_000_000 * 1_000_000_000
COUNT = 3000


def costs(*, spread: float = 0.03, largest: int = 8, seed: int = 0) -> BatchCosts:
    """A model of 1 ms for a row and 0.4 ms for each further one."""
    random = np.random.default_rng(seed)
    sizes = tuple(2**k for k in range(largest.bit_length()))
    return BatchCosts(
        sizes=sizes,
        busy_ns=(tuple(0.6 * MS + 0.4 * MS * size for size in sizes),),
        residuals=np.exp(random.normal(0, spread, 500)),
        outside_ns=0.2 * MS * np.exp(random.normal(0, 0.1, 500)),
        wake_ns=20_000.0,
    )


def service(*, instances: int = 1, largest: int = 8, serving: Serving | None = None, seed: int = 0) -> Setup:
    found = costs(largest=largest, seed=seed)
    more = {} if serving is None else {"serving": serving}
    return Setup(costs=found, instances=instances, cores=instances + 1, sizes=found.sizes, **more)


def record(
    simulated: Simulated,
    *,
    scheduled_ns: Ints | None = None,
    away_ns: Ints | None = None,
    phases: bool = True,
) -> LoadRun:
    """Make the record that the generator would have written of what was simulated.

    ``scheduled_ns``: when the plan had each leave, where that was before it did. ``away_ns``: more time on the way.
    """
    n = len(simulated.due_ns)
    answered = simulated.outcome == 0
    more = np.zeros(n, np.int64) if away_ns is None else away_ns
    done = np.where(answered, simulated.done_ns + more, -1)
    table = np.zeros((n, len(PHASES)), np.int64)
    table[:, PHASES.index("send")] = -1
    table[:, PHASES.index("decode")] = 30_000
    table[:, PHASES.index("encode")] = 30_000
    for name, column in (
        ("queue", simulated.queue_ns),
        ("batch_wait", simulated.batch_wait_ns),
        ("infer", simulated.infer_ns),
    ):
        table[:, PHASES.index(name)] = column
    if not phases:
        table[:] = -1
    requests = Requests(
        scheduled_ns=simulated.due_ns if scheduled_ns is None else scheduled_ns,
        sent_ns=simulated.due_ns,
        first_ns=np.where(answered, done - 5_000, -1),
        done_ns=done,
        outcome=np.where(answered, OUTCOMES.index("ok"), simulated.outcome),
        status=np.where(answered, 200, 503),
        rows=simulated.rows,
        sample=np.zeros(n, np.int64),
        sent_bytes=np.full(n, 100),
        received_bytes=np.full(n, 100),
        phases_ns=table,
        batch_rows=simulated.batch_rows if phases else np.full(n, -1),
        instance=simulated.instance if phases else np.full(n, -1),
    )
    return LoadRun(
        url="http://127.0.0.1:8000",
        protocol="rest-binary",
        model="net",
        version="1",
        arrivals="poisson:rate=300",
        seed=0,
        duration_s=float(simulated.due_ns[-1] / 1e9),
        timeout_s=10.0,
        began_unix_ns=BEGAN,
        requests=requests,
    )


def host(
    stops: list[tuple[int, int]], until_ns: int, *, busy: float = 0.9, waits: float = 0.0, cores: int = 1
) -> HostSamples:
    """What the host tells of a server that works at ``busy`` of a core, save in ``stops`` (first, last), in ns.

    ``waits``: threads that wait for a core at any time.
    """
    at = np.arange(-20 * MS, until_ns + 40 * MS, 20 * MS)
    inside = np.zeros(len(at))
    for first, last in stops:
        inside += np.clip(at, first, last) - first
    cpu = busy * (at - at[0] - inside)
    none = np.full(len(at), -1, np.int64)
    return HostSamples(
        at_unix_ns=BEGAN + at,
        cpu_ns=cpu.astype(np.int64),
        waiting_ns=(waits * (at - at[0])).astype(np.int64),
        throttled_ns=none,
        steal_ns=none,
        rss_bytes=none,
        cores=np.full(len(at), cores, np.int64),
    )


Case = tuple[LoadRun, HostSamples | None]


def crowded(seed: int) -> Case:
    """More comes in, in bursts, than one instance takes."""
    random = np.random.default_rng(seed)
    due = np.sort(np.concatenate([poisson(150, COUNT, seed=seed).due_ns, *(_burst(random, 60) for _ in range(12))]))
    setup = service(largest=4, seed=seed)
    return record(simulate(setup, Arrivals(due_ns=due, rows=np.ones(len(due), np.int64)), seed=seed)), None


def _burst(random: np.random.Generator, n: int) -> Ints:
    start = random.integers(1, 19) * 1_000 * MS + random.integers(0, 900 * MS)
    return np.full(n, start) + np.arange(n) * 50_000


def held_open(seed: int) -> Case:
    """A batcher with a fixed delay, unlike ours, holds one batch in ten open for 20 ms."""
    random = np.random.default_rng(seed)
    simulated = simulate(service(instances=2, seed=seed), poisson(150, COUNT, seed=seed), seed=seed)
    held = np.where(random.random(COUNT) < 0.1, 20 * MS, 0).astype(np.int64)
    return record(
        replace(simulated, done_ns=simulated.done_ns + held, batch_wait_ns=simulated.batch_wait_ns + held)
    ), None


def large_mates(seed: int) -> Case:
    """One request in fifty has as many rows as a batch may."""
    setup = service(largest=32, seed=seed)
    rows = (1,) * 49 + (28,)
    return record(simulate(setup, poisson(250, COUNT, seed=seed, rows=rows), seed=seed)), None


def own_rows(seed: int) -> Case:
    """One request in fifteen is large, at so little load that the others seldom meet it."""
    setup = service(largest=32, instances=4, seed=seed)
    rows = (1,) * 14 + (24,)
    return record(simulate(setup, poisson(40, COUNT, seed=seed, rows=rows), seed=seed)), None


def cold(seed: int) -> Case:
    """The first run of each size above one takes much longer than the next."""
    seen: set[int] = {1}

    def disturb(size: int, start_ns: int, instance: int) -> float:
        if size in seen:
            return 0.0
        seen.add(size)
        return 400.0 * MS

    return _disturbed(seed, disturb), host([], 60_000 * MS)


def throttled(seed: int) -> Case:
    """The server gets no processor for 80 ms, again and again."""
    random = np.random.default_rng(seed)
    starts = [int(s) for s in np.sort(random.integers(200, 9_500, 8)) * MS]
    stops = [(first, first + 80 * MS) for first in starts]

    def disturb(size: int, start_ns: int, instance: int) -> float:
        end = start_ns + 0.6 * MS + 0.4 * MS * size
        return sum((last - max(first, start_ns) for first, last in stops if first < end and last > start_ns), 0.0)

    run = _disturbed(seed, disturb)
    return run, host(stops, int(run.requests.done_ns.max()))


def stopped(seed: int) -> Case:
    """As ``throttled``, and the event loop stood still as well: what came meanwhile was read only afterwards."""
    run, seen = throttled(seed)
    random = np.random.default_rng(seed)
    starts = [int(s) for s in np.sort(random.integers(200, 9_500, 8)) * MS]
    requests = run.requests
    for first in starts:
        inside = (requests.sent_ns > first) & (requests.sent_ns < first + 80 * MS)
        queue = PHASES.index("queue")
        moved = np.minimum(first + 80 * MS - requests.sent_ns[inside], requests.phases_ns[inside, queue])
        requests.phases_ns[inside, queue] -= moved
    return run, seen


def late_client(seed: int) -> Case:
    """The generator stands still for 60 ms, again and again, and then sends what was due."""
    random = np.random.default_rng(seed)
    plan = poisson(300, COUNT, seed=seed)
    sent = plan.due_ns.copy()
    for start in random.integers(200, 9_500, 12) * MS:
        inside = (plan.due_ns >= start) & (plan.due_ns < start + 60 * MS)
        sent[inside] = start + 60 * MS
    simulated = simulate(service(seed=seed), Arrivals(due_ns=sent, rows=plan.rows), seed=seed)
    return record(simulated, scheduled_ns=plan.due_ns), None


def slow_network(seed: int) -> Case:
    """One request in twelve is on its way for 25 ms more."""
    random = np.random.default_rng(seed)
    away = np.where(random.random(COUNT) < 1 / 12, 25 * MS, 0).astype(np.int64)
    simulated = simulate(service(seed=seed), poisson(200, COUNT, seed=seed), seed=seed)
    return record(simulated, away_ns=away), host([], 60_000 * MS)


def _disturbed(seed: int, disturb: Disturb) -> LoadRun:
    return record(simulate(service(seed=seed), poisson(300, COUNT, seed=seed), seed=seed, disturb=disturb))


PLANTED: dict[str, Callable[[int], Case]] = {
    "waited_for_instance": crowded,
    "waited_for_batch": held_open,
    "large_batch_mate": large_mates,
    "own_rows": own_rows,
    "cold_shape": cold,
    "throttled": throttled,
    "client_late": late_client,
    "network": slow_network,
}
"""By the cause that was planted; called with a seed."""
