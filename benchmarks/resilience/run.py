"""Faults and changes under load: is a request lost, hung, doubled, or answered by the wrong version?

    python benchmarks/resilience/run.py swaps|restarts|kills|soak [--count N] [--seed N] [--isolation process]
    python benchmarks/resilience/run.py report

Each run is a piece: it starts servers of its own, measures a capacity, loads them, and adds its record to
results-NAME.json; ``report`` writes README's tables from all pieces. A piece that an interruption ended is not there.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop
from place import Server, free_port, make_bundles, post, post_here, publish, stage, withdraw
from traffic import Bank, Tally, Traffic

from hasten.deployment import Serving
from hasten.host import this_host, versions
from report import write_page

HERE = Path(__file__).parent
LOAD = "/v2/repository/models/net/load"
CLOSED_S, CLOSED_ROUNDS = 2.0, 3
OPEN_S, OPEN_TRIES, OPEN_STEP = 4.0, 2, 0.1
WITHIN_MS = 25.0
"""The capacity is the highest Poisson rate whose p99 stays within this, as ``hasten analyse`` finds one."""


@dataclass(frozen=True)
class Scene:
    """What a run has: the bundles and their answers, the folder, and what was asked."""

    asked: argparse.Namespace
    home: Path
    bank: Bank

    def traffic(self, place: tuple[str, int], *, keep: bool = True) -> Traffic:
        return Traffic(place, self.bank, seed=self.asked.seed, keep=keep)


async def capacity(scene: Scene, place: tuple[str, int]) -> float:
    """Give the highest rate of an open loop, in steps of a tenth of a closed loop's, that the place answers in time."""
    share, most = 1.0, await closed_loop(scene, place)
    while share > OPEN_STEP:
        for _ in range(OPEN_TRIES):  # a stall of the machine must not decide
            traffic, over = scene.traffic(place), asyncio.Event()
            asyncio.get_running_loop().call_later(OPEN_S, over.set)
            await traffic.poisson(share * most, over)
            await traffic.settle()
            if set(traffic.tally.outcomes) == {"ok"} and p99_ms(np.array(traffic.tally.latency_s)) <= WITHIN_MS:
                return share * most
        share -= OPEN_STEP
    raise SystemExit(f"the place answers not even {share * most:.0f} requests/s within {WITHIN_MS:g} ms")


async def closed_loop(scene: Scene, place: tuple[str, int]) -> float:
    """Give the answers a second that the place gives 16 clients which always have one request under way."""
    rates = []
    for _ in range(1 + CLOSED_ROUNDS):  # the first is warm-up
        traffic = scene.traffic(place, keep=False)
        began_s = time.monotonic()
        until_s = began_s + CLOSED_S
        await traffic.pipelined(1 << 40, connections=16, depth=1, until_s=until_s)
        rates.append(traffic.tally.outcomes["ok"] / (time.monotonic() - began_s))
        await traffic.settle()
    return float(np.median(rates[1:]))


async def under_load(
    scene: Scene, place: tuple[str, int], events: Callable[[Traffic], Awaitable[dict]], found: float | None = None
) -> tuple[Tally, dict]:
    """Send at a share of the capacity, measured unless given, while ``events`` happen; tally, and what they gave."""
    if found is None:
        found = await capacity(scene, place)
    rate = scene.asked.rate or scene.asked.share * found
    traffic = scene.traffic(place)
    over = asyncio.Event()
    began_s = time.monotonic()
    sending = asyncio.create_task(traffic.poisson(rate, over))
    try:
        told = await events(traffic)
    finally:
        over.set()
        await sending
    seconds = time.monotonic() - began_s
    await traffic.settle()
    return traffic.tally, {"capacity_per_s": found, "rate_per_s": rate, "seconds": seconds, **told}


def window(tally: Tally, spans: list[tuple[float, float]], *, apart: bool = False) -> np.ndarray:
    """Give the latencies of the requests that were due within ``spans`` (sorted), or apart from them."""
    due, latency = np.array(tally.due_s), np.array(tally.latency_s)
    edges = np.array(spans).ravel()
    inside = np.searchsorted(edges, due) % 2 == 1
    return latency[~inside if apart else inside]


def p99_ms(latency_s: np.ndarray) -> float:
    return float(np.quantile(latency_s, 0.99) * 1e3) if len(latency_s) else float("nan")


def ratio_interval(tally: Tally, spans: list[tuple[float, float]], seed: int) -> list[float]:
    """Give p99 within the spans over p99 apart from them, with a 95 % interval: whole events are drawn anew."""
    due, latency = np.array(tally.due_s), np.array(tally.latency_s)
    order = np.argsort(due)
    due, latency = due[order], latency[order]
    edges = np.array([*np.array(spans).ravel(), np.inf])
    bounds = np.searchsorted(due, edges)
    inside = [latency[bounds[2 * i] : bounds[2 * i + 1]] for i in range(len(spans))]
    apart = [latency[bounds[2 * i + 1] : bounds[2 * i + 2]] for i in range(len(spans))]
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(500):
        some = draw.integers(len(spans), size=len(spans))
        a, b = (np.concatenate([part[i] for i in some]) for part in (inside, apart))
        found.append(np.quantile(a, 0.99) / np.quantile(b, 0.99))
    value = np.quantile(np.concatenate(inside), 0.99) / np.quantile(np.concatenate(apart), 0.99)
    low, high = np.quantile(found, [0.025, 0.975])
    return [float(low), float(value), float(high)]


def paired_interval(tally: Tally, spans: list[tuple[float, float]], seed: int) -> list[float]:
    """Give the median over the events of p99 within one over p99 of as long a time right before it, and its interval.

    A stall of the machine spoils the pair that it falls into, and no other.
    """
    due, latency = np.array(tally.due_s), np.array(tally.latency_s)
    order = np.argsort(due)
    due, latency = due[order], latency[order]
    found = []
    for begin, end in spans:
        before, first, last = np.searchsorted(due, [begin - (end - begin), begin, end])
        if before < first < last:
            found.append(np.quantile(latency[first:last], 0.99) / np.quantile(latency[before:first], 0.99))
    draw = np.random.default_rng(seed)
    medians = np.median(draw.choice(found, size=(1000, len(found))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return [float(low), float(np.median(found)), float(high)]


async def swaps(scene: Scene) -> dict:
    """Load new versions, and go back to the one before every fourth time, by the repository API."""
    (scene.home / "models" / "net").mkdir(parents=True)
    for version in range(1, scene.asked.count + 2):
        stage(scene.home, version)
    publish(scene.home, 1)
    server = await Server.start(scene.home / "models", scene.home, "--port", "0", "--drain", "100ms")
    spans: list[tuple[float, float]] = []
    random_gaps = random.Random(scene.asked.seed)

    async def events(traffic: Traffic) -> dict:
        await asyncio.sleep(1.0)
        newest = 1
        for number in range(1, scene.asked.count + 1):
            if number % 4 == 0:
                version = newest - 1
            else:
                newest, version = newest + 1, newest + 1
                publish(scene.home, version)
            began_s = time.monotonic()
            status, said = await post_here(server.place, LOAD, {"parameters": {"version": str(version)}})
            assert status == 200, said
            spans.append((began_s, time.monotonic() + 0.02))  # and the old one's last answers
            if newest > 3 and (scene.home / "models" / "net" / str(newest - 3)).exists():
                withdraw(scene.home, newest - 3)
            await asyncio.sleep(scene.asked.gap_s * random_gaps.uniform(0.7, 1.3))
        return {"rss_bytes": server.rss_bytes(), "open_files": server.open_files()}

    try:
        tally, told = await under_load(scene, server.place, events)
        code = await server.stop()
    finally:
        server.kill()
    lasted = [end - began for began, end in spans]
    return told | outcome(tally) | {
        "exit_code": code,
        "swap_s": {"median": float(np.median(lasted)), "longest": max(lasted), "each": lasted},
        "p99_ms": {"swap": p99_ms(window(tally, spans)), "steady": p99_ms(window(tally, spans, apart=True))},
        "p50_ms": {
            "swap": float(np.median(window(tally, spans)) * 1e3),
            "steady": float(np.median(window(tally, spans, apart=True)) * 1e3),
        },
        "p99_ratio": ratio_interval(tally, spans, scene.asked.seed),
        "p99_ratio_paired": paired_interval(tally, spans, scene.asked.seed),
    }  # fmt: skip


async def restarts(scene: Scene) -> dict:
    """End one of two servers with SIGTERM, and start it again once it has ended; then the other one.

    The load is a share of what one of them answers alone: it must carry everything while the other is away.
    """
    (scene.home / "models" / "net").mkdir(parents=True)
    publish(scene.home, 1)
    options, fds = ["--drain", f"{scene.asked.drain_ms}ms"], ()
    with contextlib.ExitStack() as stack:
        if scene.asked.shared == "socket":
            held = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
            port, fds = held.getsockname()[1], (held.fileno(),)
            options += ["--fd", str(held.fileno())]
        else:
            port = free_port()
            options += ["--port", str(port), "--reuse-port"]
        return await restarted(scene, port, lambda: Server.start(scene.home / "models", scene.home, *options, fds=fds))


async def restarted(scene: Scene, port: int, start: Callable[[], Awaitable[Server]]) -> dict:
    """Do it, with two servers that ``start`` starts."""
    servers = [await start()]
    codes, stops, starts = [], [], []

    async def events(traffic: Traffic) -> dict:
        for number in range(scene.asked.count):
            await asyncio.sleep(scene.asked.gap_s)
            began_s = time.monotonic()
            codes.append(await servers[number % 2].stop())
            stops.append(time.monotonic() - began_s)
            servers[number % 2] = await start()
            starts.append(servers[number % 2].began_s)
        return {}

    try:
        alone = await capacity(scene, ("127.0.0.1", port))
        servers.append(await start())
        tally, told = await under_load(scene, ("127.0.0.1", port), events, alone)
        codes += [await server.stop() for server in servers]
    finally:
        for server in servers:
            server.kill()
    latency = np.array(tally.latency_s)
    return told | outcome(tally) | {
        "shared": scene.asked.shared,
        "exit_codes": sorted(set(codes)),
        "stop_s": {"median": float(np.median(stops)), "longest": max(stops)},
        "start_s": {"median": float(np.median(starts)), "longest": max(starts)},
        "p99_ms": {"all": p99_ms(latency)},
    }  # fmt: skip


async def kills(scene: Scene) -> dict:
    """Kill one of two worker processes with SIGKILL, and wait until another has taken its place."""
    (scene.home / "models" / "net").mkdir(parents=True)
    publish(scene.home, 1)
    server = await Server.start(scene.home / "models", scene.home, "--port", "0", "--drain", "100ms")
    moments: list[float] = []
    replaced: list[float] = []
    choose = random.Random(scene.asked.seed)

    async def events(traffic: Traffic) -> dict:
        for _ in range(scene.asked.count):
            await asyncio.sleep(scene.asked.gap_s * choose.uniform(0.7, 1.3))
            victim = choose.choice(server.workers())
            moments.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(0.02)
            while victim in server.workers() or await asyncio.to_thread(server.ready_workers) < 2:
                await asyncio.sleep(0.05)
                assert time.monotonic() - moments[-1] < 60, "the killed worker was not replaced"
            replaced.append(time.monotonic() - moments[-1])
        return {}

    try:
        tally, told = await under_load(scene, server.place, events)
        ready = await asyncio.to_thread(post, server.place, "/v2/repository/index", {"ready": True})
        code = await server.stop()
    finally:
        server.kill()
    failed = [0] * len(moments)
    for when_s, reason, _ in tally.refusals:
        if reason != "503 server_fault":
            continue
        failed[max(int(np.searchsorted(moments, when_s)) - 1, 0)] += 1
    return told | outcome(tally) | {
        "exit_code": code,
        "ready_at_the_end": ready[0] == 200 and "READY" in ready[1],
        "refused_by_kill": {"most": max(failed), "mean": float(np.mean(failed)), "none": failed.count(0)},
        "seen_replaced_s": {"median": float(np.median(replaced)), "longest": max(replaced)},
        "p99_ms": {"all": p99_ms(np.array(tally.latency_s))},
    }  # fmt: skip


async def soak(scene: Scene) -> dict:
    """Send many small requests, eight deep on eight connections, and swap versions all the while; watch the memory."""
    (scene.home / "models" / "net").mkdir(parents=True)
    publish(scene.home, 1)
    server = await Server.start(scene.home / "models", scene.home, "--port", "0", "--drain", "100ms")
    total, count = scene.asked.requests, scene.asked.count
    traffic = scene.traffic(server.place, keep=False)
    marks: list[dict] = []
    swapped = 0

    async def watch() -> None:
        nonlocal swapped
        step = total / 100
        while True:
            done = traffic.tally.asked
            if done >= len(marks) * step:
                marks.append({"requests": done, "rss_bytes": server.rss_bytes(), "open_files": server.open_files()})
            elif swapped < count * done / total:
                swapped += 1
                await asyncio.to_thread(publish, scene.home, swapped + 1)
                status, said = await asyncio.to_thread(post, server.place, LOAD, {})
                assert status == 200, said
                if swapped > 1:
                    await asyncio.to_thread(withdraw, scene.home, swapped - 1)
            else:
                await asyncio.sleep(0.01)

    began_s = time.monotonic()
    watching = asyncio.create_task(watch())
    try:
        sending = asyncio.create_task(traffic.pipelined(total, connections=8, depth=8))
        await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        await sending
        seconds = time.monotonic() - began_s
        while swapped < count:
            await asyncio.sleep(0.05)
        await traffic.settle()
        last = {"requests": traffic.tally.asked, "rss_bytes": server.rss_bytes(), "open_files": server.open_files()}
        marks.append(last)
        code = await server.stop()
    finally:
        watching.cancel()
        server.kill()
    return {"seconds": seconds, "swaps": swapped, "exit_code": code, **outcome(traffic.tally)} | {
        "requests_per_s": total / seconds,
        "marks": marks[::5] if marks[-1] in marks[::5] else [*marks[::5], marks[-1]],
        "slope_bytes_per_request": slope(marks),
    }


def slope(marks: list[dict]) -> list[float]:
    """Fit a line through the memory of the second half; 95 % interval, blocks of neighbouring marks drawn anew."""
    some = marks[len(marks) // 2 :]
    x = np.array([mark["requests"] for mark in some], float)
    y = np.array([mark["rss_bytes"] for mark in some], float)
    value, start = np.polyfit(x, y, 1)
    rest = y - (value * x + start)
    draw, width = np.random.default_rng(0), 8
    found = []
    for _ in range(1000):
        firsts = draw.integers(len(x) - width + 1, size=-(-len(x) // width))
        noise = np.concatenate([rest[at : at + width] for at in firsts])[: len(x)]
        found.append(np.polyfit(x, value * x + start + noise, 1)[0])
    low, high = np.quantile(found, [0.025, 0.975])
    return [float(low), float(value), float(high)]


def outcome(tally: Tally) -> dict:
    delay = np.array(tally.issue_delay_s)
    return {
        "asked": tally.asked,
        "outcomes": dict(sorted(tally.outcomes.items())),
        "versions": len(tally.versions),
        "resent": tally.resent,
        "faults": tally.faults,
        "refusals": sorted({f"{reason}: {said}" for _, reason, said in tally.refusals})[:10],
        "issue_delay_p99_ms": p99_ms(delay),
    }


RUNS = {"swaps": swaps, "restarts": restarts, "kills": kills, "soak": soak}
COUNTS = {"swaps": 100, "restarts": 100, "kills": 50, "soak": 200}
ALLOWED = {"kills": {"503 server_fault"}}
"""What may come besides answers: the killed worker's requests."""


def complaints(name: str, record: dict) -> list[str]:
    """Give what is not as claimed."""
    found = list(record["faults"])
    found += [
        f"{count} x {kind}" for kind, count in record["outcomes"].items() if kind not in {"ok", *ALLOWED.get(name, ())}
    ]
    if sum(record["outcomes"].values()) != record["asked"]:
        found.append(f"{record['asked']} were asked, and {sum(record['outcomes'].values())} have an outcome")
    if record.get("exit_code", 0) != 0 or record.get("exit_codes", [0]) != [0]:
        found.append("a server did not exit with 0")
    if name == "kills" and record["refused_by_kill"]["most"] > record["batch"]:
        found.append(f"a kill failed {record['refused_by_kill']['most']} requests, more than a batch")
    return found


def serving_of(asked: argparse.Namespace) -> Serving:
    isolation = asked.isolation or ("process" if asked.run == "kills" else "auto")
    instances = 2 if isolation == "process" else asked.instances
    return Serving(instances=instances, isolation=isolation, queue_rows=asked.queue_rows)


def one(asked: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        serving = serving_of(asked)
        scene = Scene(asked, home, make_bundles(home, serving))
        record = uvloop.run(RUNS[asked.run](scene))
    record = {"run": asked.run, "count": asked.count, "seed": asked.seed, "isolation": serving.isolation} | record
    record |= {"batch": 8, "code": asked.code}
    record["complaints"] = complaints(asked.run, record)
    record |= {"at": time.strftime("%Y-%m-%d %H:%M"), "host": this_host().__dict__, "versions": versions()}
    record["cores"] = sorted(os.sched_getaffinity(0))
    print(
        json.dumps({k: v for k, v in record.items() if k not in ("host", "versions", "marks")}, indent=1, default=str)
    )
    if not asked.dry:
        path = HERE / f"results-{asked.run}.json"
        pieces = json.loads(path.read_text()) if path.exists() else []
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps([*pieces, record], indent=1, default=str) + "\n")
        fresh.rename(path)
    return 1 if record["complaints"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=[*RUNS, "report"])
    parser.add_argument("--count", type=int, help="swaps, restarts or kills of this piece")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of a soak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.7, help="of the capacity, as load")
    parser.add_argument("--rate", type=float, help="requests a second, instead of a share of the capacity")
    parser.add_argument("--gap-s", type=float, default=0.8, help="between two events")
    parser.add_argument("--drain-ms", type=int, default=300, help="of a restart")
    parser.add_argument("--shared", choices=("socket", "port"), default="socket", help="what the two servers share")
    parser.add_argument("--isolation", choices=("auto", "thread", "process"))
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--queue-rows", type=int, default=16_384, help="that may wait: some seconds of such small runs")
    parser.add_argument("--code", default="", help="recorded with the piece: the commit, say")
    parser.add_argument("--dry", action="store_true", help="record nothing")
    asked = parser.parse_args()
    if asked.run == "report":
        write_page(HERE)
        return 0
    asked.count = COUNTS[asked.run] if asked.count is None else asked.count
    sys.setswitchinterval(0.0005)
    return one(asked)


if __name__ == "__main__":
    raise SystemExit(main())
