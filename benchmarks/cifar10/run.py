"""Optimize a network trained on CIFAR-10, then time what was chosen beside every row that others reach.

    python benchmarks/cifar10/run.py --train TRAIN.parquet --data TEST.parquet [--network resnet20] [--keep FOLDER]

Needs the extras ``train`` and ``openvino``, and ``nncf`` for its row. Writes results-NETWORK.json and README's tables.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "networks"))
from peers import Peer, build_peers, open_onnxruntime, open_openvino

import hasten
from hasten.host import load_since, this_host, ticks, versions
from hasten.isolation import Child, Limits
from hasten.measure.compare import compare
from hasten.measure.latency import WarmUp
from hasten.measure.peaks import measure_peaks
from hasten.measure.roofline import bound
from hasten.measure.worker import cpus_for, open_isolated
from hasten.plan import Part, Plan, run_plan_isolated
from hasten.search.result import Goal, Result
from hasten.search.task import Effort

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
BASE, OURS, EAGER = "ONNX Runtime fp32", "hasten", "PyTorch eager"
STATIC, NNCF = "ONNX Runtime static int8 (its own quantizer)", "OpenVINO int8 (NNCF's default PTQ)"
PREPROCESS = hasten.Preprocess(mean=(125.3 / 255, 123.0 / 255, 113.9 / 255), std=(63.0 / 255, 62.1 / 255, 66.7 / 255))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--data", type=Path, required=True, help="the test file: calibrate, search and certify")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=float, default=Effort().epochs)
    parser.add_argument("--budget", type=float, help="seconds of the search")
    parser.add_argument("--seconds", type=float, default=60, help="of each comparison")
    parser.add_argument("--keep", type=Path, help="folder for the search; the same folder resumes it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = (asked.keep or Path(scratch)).absolute()
        return one(asked, home)


def one(asked, home: Path) -> int:
    """Search once, at batch 8 and one thread, then compare all rows in every setting."""
    source = hasten.import_model(HERE / f"{asked.network}.onnx", hasten.Store(home))
    result = hasten.optimize(
        source,
        asked.data,
        Goal(max_drop=0.01, batch=8),
        training=asked.train,
        data=hasten.Data(preprocess=PREPROCESS),
        threads=[1],
        effort=Effort(epochs=asked.epochs, budget_s=asked.budget),
        home=home,
        on_event=lambda event: print(f"  {event.text}", flush=True) if event.kind in ("trial-end", "note") else None,
    )
    trial = result.trial(result.chosen)
    print(f"{asked.network}: {result.verdict.word}: {result.verdict.sentence}\n  {trial.plan}")
    bench = Bench(asked.network, home, result)
    records = [bench.measure(batch, threads, asked.seconds) for batch in asked.batches for threads in asked.threads]
    record = {
        "network": asked.network,
        "plan": str(trial.plan),
        "verdict": result.verdict,
        "certificate": next(c for c in result.certificates if c.plan == result.chosen).quality,
        "search_seconds": result.seconds,
        "accuracy": bench.accuracies(),
        "settings": records,
        "host": this_host(),
        "versions": versions(),
    }
    path = HERE / f"results-{asked.network}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    write_tables()
    print(table(msgspec.json.decode(path.read_bytes())))
    return 0 if result.verdict.word == "MEETS" else 1


class Bench:
    """One search's result, and all rows to hold it against."""

    def __init__(self, network: str, home: Path, result: Result) -> None:
        self.network, self.home, self.result = network, home, result
        self.store = hasten.Store(home)
        self.source = self.store.get(result.source)
        self.samples = hasten.Samples.load(result.run / "splits" / "certify")
        calibrate = hasten.Samples.load(result.run / "splits" / "calibrate")
        self.peers = build_peers(self.source.entry, dict(calibrate.inputs), home / "peers")
        self.chosen = result.trial(result.chosen).plan

    def plans(self, batch: int, threads: int) -> dict[str, Plan]:
        """Give the rows that hasten builds: what was chosen, and every lossless plan, in this setting."""
        fold, fuse = Part("fold"), Part("fuse", {"target": "onnxruntime"})
        ort = Part("onnxruntime", {"threads": threads})
        openvino = Part("openvino", {"threads": threads, "batch": batch})
        engine = self.chosen.engine
        settings = {**engine.settings, "threads": threads, **({"batch": batch} if "batch" in engine.settings else {})}
        return {
            OURS: Plan(Part(engine.name, settings), self.chosen.passes),
            "lossless: ONNX Runtime": Plan(ort, (fold, fuse)),
            "lossless: ONNX Runtime, fixed batch": Plan(
                Part("onnxruntime", {"threads": threads, "batch": batch}), (fold, fuse)
            ),
            "lossless: OpenVINO": Plan(openvino, (fold,)),
        }

    @contextlib.contextmanager
    def contenders(self, batch: int, threads: int) -> Iterator[list]:
        """Open every row in a process of its own."""
        limits = Limits(cpus=cpus_for(threads))
        feed = self.home / "feed.npz"
        np.savez(feed, **self.samples.feed(slice(0, batch)))
        rows = {name: (runtime, str(path)) for name, (runtime, path) in self.peers.items()}
        rows[EAGER] = ("eager", self.network)
        with contextlib.ExitStack() as stack:
            found = []
            for label, (runtime, path) in rows.items():
                settings = {"runtime": runtime, "path": path, "threads": threads, "feed": str(feed)}
                target = "eager:EagerWorker" if runtime == "eager" else "peers:PeerWorker"
                found.append(Peer(label, Child.start(target, limits=limits, **settings)))
                stack.callback(found[-1].close)
            for label, plan in self.plans(batch, threads).items():
                inputs = hasten.plan.Inputs(
                    store=self.store,
                    samples=self.result.run / "splits" / "calibrate",
                    training=self.result.run / "splits" / "train",
                )
                built = run_plan_isolated(plan, self.source, inputs, limits=Limits(seconds=86400))
                session = open_isolated(
                    plan.engine,
                    built,
                    self.store,
                    self.result.run / "splits" / "certify",
                    batch=batch,
                    limits=limits,
                    seed=0,
                    name=label,
                    warm_up=WarmUp(max_s=10),
                )
                found.append(stack.enter_context(session))
            yield found

    def measure(self, batch: int, threads: int, seconds: float) -> dict:
        """Compare all rows in one run."""
        peaks = measure_peaks(threads, home=self.home)
        since = ticks()
        with self.contenders(batch, threads) as rows:
            outcome = compare(rows, budget_s=seconds, precision=0.01)
            latency = {row.name: outcome.latency(row.name).median_ns for row in rows}
            efficiency = {
                row.name: bound(row.operators(20), peaks, latency[row.name]).efficiency
                for row in rows
                if row.name == OURS or row.name.startswith("lossless")
            }
        lossless = min((name for name in latency if name.startswith("lossless")), key=lambda name: latency[name])
        print(f"batch {batch}, {threads} thread(s): {outcome.ratio(BASE, OURS).value:.2f}x over {BASE}", flush=True)
        return {
            "batch": batch,
            "threads": threads,
            "ratios": {name: outcome.ratio(BASE, name) for name in latency},
            "ours_over": {name: outcome.ratio(name, OURS) for name in (EAGER, BASE, lossless, STATIC, NNCF)},
            "best_lossless": lossless,
            "medians_ms": {name: ns / 1e6 for name, ns in latency.items()},
            "efficiency": efficiency,
            "load": load_since(since),
            "slices_ns": {name: outcome.medians_ns(name) for name in latency},
        }

    def accuracies(self) -> dict[str, float]:
        """Give the accuracy of the rows on the certify split: all the same samples."""
        open_with = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}
        found = {}
        for name, (runtime, path) in self.peers.items():
            right, size = 0, 50
            feed = {key: np.array(value) for key, value in self.samples.feed(slice(0, size)).items()}
            run = open_with[runtime](str(path), 2, feed)
            for start in range(0, len(self.samples) - size + 1, size):
                for key, value in self.samples.feed(slice(start, start + size)).items():
                    feed[key][...] = value
                scores = run()
                scores = next(iter(scores.values())) if hasattr(scores, "values") else scores[0]
                right += int((np.asarray(scores).argmax(1) == self.samples.labels[start : start + size]).sum())
            found[name] = right / (len(self.samples) // size * size)
        return found


def write_tables() -> None:
    """Write every recorded table into the README, between its markers."""
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    records = [msgspec.json.decode(path.read_bytes()) for path in sorted(HERE.glob("results-*.json"))]
    page.write_text(before + BEGIN + "\n" + "\n".join(table(record) for record in records) + END + after)


def table(record) -> str:
    """Write the rows as Markdown."""
    quality = record["certificate"] or {}
    drop = quality.get("drop", {"value": 0, "low": 0, "high": 0})
    lines = [
        f"### {record['network']}: {record['verdict']['word']}",
        "",
        f"`{record['plan']}`",
        "",
        f"{record['verdict']['sentence']}. Accuracy {quality.get('reference') or 0:.2%} before, "
        f"{quality.get('value') or 0:.2%} after, drop {drop['value']:.2%} [{drop['low']:.2%}, {drop['high']:.2%}]. "
        f"The search took {record['search_seconds'] / 60:.0f} minutes.",
        "",
        "| accuracy of others on the same split | |",
        "|---|---|",
        *(f"| {name} | {value:.2%} |" for name, value in record["accuracy"].items()),
    ]
    for item in record["settings"]:
        lines += [
            "",
            f"Batch {item['batch']}, {item['threads']} thread(s):",
            "",
            "| | median ms | over ONNX Runtime fp32 | efficiency |",
            "|---|---|---|---|",
        ]
        for name, ratio in sorted(item["ratios"].items(), key=lambda pair: pair[1]["value"]):
            known = item["efficiency"].get(name)
            shown = f"**{name}**" if name == OURS else name
            lines.append(
                f"| {shown} | {item['medians_ms'][name]:.3f} | {ratio['value']:.2f} "
                f"[{ratio['low']:.2f}, {ratio['high']:.2f}] | {'' if known is None else f'{known:.0%}'} |"
            )
        over = (f"{r['value']:.2f}x [{r['low']:.2f}, {r['high']:.2f}] over {n}" for n, r in item["ours_over"].items())
        lines += ["", f"hasten: {'; '.join(over)}."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    raise SystemExit(main())
