"""Optimize two networks with agreement as the metric, then measure the best beside what each runtime's tools reach.

    python benchmarks/networks/run.py [--network mobilenet|encoder] [--threads 1] [--batch 1] [--keep FOLDER]

Needs the extras ``train`` and ``openvino``, and ``nncf`` for its row. Writes results-*.json and README's tables.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from networks import encoder, mobilenet
from peers import Peer, build_peers

import hasten
from hasten.host import load_since, this_host, ticks, versions
from hasten.isolation import Child, Limits
from hasten.measure.compare import compare
from hasten.measure.latency import WarmUp
from hasten.measure.worker import cpus_for, open_isolated
from hasten.search.result import Goal

HERE = Path(__file__).parent
SAMPLES = {"mobilenet": 400, "encoder": 1600}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
CLAIM = 0.95
"""The best found must be within 5 % of the best row."""


def inputs(name: str, artifact) -> dict[str, np.ndarray]:
    """Draw seeded samples: smooth images or word numbers."""
    random, n = np.random.default_rng(0), SAMPLES[name]
    (spec,) = artifact.signature.inputs
    if name == "encoder":
        return {spec.name: random.integers(0, 1000, (n, 128))}
    coarse = random.random((n, 3, 14, 14), dtype=np.float32)
    return {spec.name: np.kron(coarse, np.ones((1, 1, 16, 16), np.float32))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(SAMPLES), action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=90, help="of the final comparison")
    parser.add_argument("--keep", type=Path, help="folder for the search; the same folder resumes it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = asked.keep or Path(scratch)
        return max(one(name, home / name, asked) for name in asked.network or sorted(SAMPLES))


def one(name: str, home: Path, asked) -> int:
    """Optimize one network, build the peers, compare all of them in one run."""
    module, example = {"mobilenet": mobilenet, "encoder": encoder}[name]()
    store = hasten.Store(home)
    source = hasten.import_model(module, store, example=example)
    samples = hasten.Samples(inputs(name, source))
    result = hasten.optimize(
        source,
        samples,
        Goal(metric="agreement", batch=asked.batch),
        threads=[asked.threads],
        home=home,
        on_event=lambda event: print(f"  {event.text}", flush=True) if event.kind in ("trial-end", "note") else None,
    )
    best = min(result.certificates, key=lambda item: 1 / item.over_original.value)
    trial = result.trial(best.plan)
    print(f"{name}: {result.verdict.word}: {result.verdict.sentence}\n  fastest: {trial.plan}")
    feed = home / "feed.npz"
    np.savez(feed, **samples.feed(slice(0, asked.batch)))
    rows = build_peers(source.entry, dict(samples.inputs), home / "peers")
    limits = Limits(cpus=cpus_for(asked.threads))
    since = ticks()
    with contextlib.ExitStack() as stack:
        contenders = []
        for label, (runtime, path) in rows.items():
            settings = {"runtime": runtime, "path": str(path), "threads": asked.threads, "feed": str(feed)}
            peer = Peer(label, Child.start("peers:PeerWorker", limits=limits, **settings))
            stack.callback(peer.close)
            contenders.append(peer)
        ours = open_isolated(
            trial.plan.engine,
            store.get(trial.artifact),
            store,
            result.run / "splits" / "certify",
            batch=asked.batch,
            limits=limits,
            seed=0,
            name="hasten",
            warm_up=WarmUp(max_s=10),
        )
        contenders.append(stack.enter_context(ours))
        outcome = compare(contenders, budget_s=asked.seconds, precision=0.01)
    base = "ONNX Runtime fp32"
    ratios = {c.name: outcome.ratio(base, c.name) for c in contenders}
    best_row = max(rows, key=lambda label: ratios[label].value)
    against = outcome.ratio(best_row, "hasten")
    bound = best.measurement.bound
    measured = sum(op.time_ns or 0.0 for op in bound.operators) + bound.outside_ns
    record = {
        "network": name,
        "threads": asked.threads,
        "batch": asked.batch,
        "plan": str(trial.plan),
        "agreement": best.quality,
        "ratios": ratios,
        "medians_ms": {c.name: outcome.latency(c.name).median_ns / 1e6 for c in contenders},
        "best_row": best_row,
        "hasten_over_best_row": against,
        "efficiency": bound.efficiency,
        "parts_over_total": measured / bound.measured_ns,
        "host": this_host(),
        "load": load_since(since),
        "versions": versions(),
        "slices_ns": {c.name: outcome.medians_ns(c.name) for c in contenders},
    }
    path = HERE / f"results-{name}-t{asked.threads}-b{asked.batch}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    record = msgspec.json.decode(path.read_bytes())
    print(table(record))
    write_tables()
    held = against.value >= CLAIM and abs(record["parts_over_total"] - 1) < 0.01
    print(f"{name}: {'holds' if held else 'MISSED'}: {against.value:.3f}x of the best row ({best_row})\n")
    return 0 if held else 1


def write_tables() -> None:
    """Write every recorded table into the README, between its markers."""
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    records = [msgspec.json.decode(path.read_bytes()) for path in sorted(HERE.glob("results-*.json"))]
    page.write_text(before + BEGIN + "\n" + "\n".join(table(record) for record in records) + END + after)


def table(record) -> str:
    """Write the rows as Markdown."""
    lines = [
        f"### {record['network']}, {record['threads']} thread(s), batch {record['batch']}",
        "",
        "| | median ms | over ONNX Runtime fp32 | 95 % interval |",
        "|---|---|---|---|",
    ]
    for label, ratio in sorted(record["ratios"].items(), key=lambda item: item[1]["value"]):
        shown = f"**hasten**: {record['plan']}" if label == "hasten" else label
        median = record["medians_ms"][label]
        lines.append(f"| {shown} | {median:.3f} | {ratio['value']:.2f} | {ratio['low']:.2f} to {ratio['high']:.2f} |")
    against = record["hasten_over_best_row"]
    lines += [
        "",
        f"hasten over the best row ({record['best_row']}): {against['value']:.3f} "
        f"[{against['low']:.3f}, {against['high']:.3f}]; efficiency {record['efficiency']:.0%}; operators and what is "
        f"outside them add up to {record['parts_over_total']:.4f} of the measured time.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
