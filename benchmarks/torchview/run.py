"""Time a training step of the trainable view beside the same network written in PyTorch: python run.py [--threads 1].

Both do what the loop does: forward, cross-entropy, backward, one step of SGD with momentum, in training mode. They take
turns in random order. Needs the extra ``train``. Writes results.json and README's table.
"""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar10"))
from models import NETWORKS

import hasten
from hasten.graph.model import read_model
from hasten.host import load_since, this_host, ticks, versions
from hasten.measure.statistics import bootstrap_ratio
from hasten.torchview.view import View

HERE = Path(__file__).parent

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
CLAIM = 1.15


def step(forward, parameters, images, labels):
    """Give a function that does one training step."""
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)

    def once() -> int:
        start = time.perf_counter_ns()
        loss = torch.nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter_ns() - start

    return once


def one(name: str, batch: int, blocks: int, steps: int) -> dict:
    """Compare one network in both forms."""
    torch.manual_seed(0)
    module = NETWORKS[name]()
    with tempfile.TemporaryDirectory() as scratch:
        source = hasten.import_model(module.eval(), hasten.Store(Path(scratch)), example=(torch.randn(2, 3, 32, 32),))
        view = View.of(read_model(source)).train()
    module.train()
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    sides = {
        "PyTorch": step(module, list(module.parameters()), images, labels),
        "view": step(lambda x: view(x)[0], list(view.parameters()), images, labels),
    }
    for once in sides.values():
        for _ in range(5):
            once()
    medians: dict[str, list[float]] = {label: [] for label in sides}
    order = np.random.default_rng(0)
    gc.disable()
    for _ in range(blocks):
        for label in order.permutation(list(sides)):
            medians[str(label)].append(float(np.median([sides[str(label)]() for _ in range(steps)])))
        gc.collect()
    view_ns, torch_ns = np.array(medians["view"]), np.array(medians["PyTorch"])
    return {
        "network": name,
        "batch": batch,
        "ratio": msgspec.to_builtins(bootstrap_ratio(np.log(view_ns / torch_ns), seed=0, asked=0.01)),
        "medians_ms": {label: float(np.median(values)) / 1e6 for label, values in medians.items()},
        "slices_ns": medians,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    since = ticks()
    rows = [one(name, asked.batch, asked.blocks, asked.steps) for name in sorted(NETWORKS)]
    record = {
        "threads": asked.threads,
        "networks": rows,
        "host": this_host(),
        "load": load_since(since),
        "versions": {**versions(), "torch": str(torch.__version__)},
    }
    (HERE / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    lines = [
        "| network | PyTorch, ms a step | view, ms a step | view over PyTorch | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        r, ms = row["ratio"], row["medians_ms"]
        lines.append(
            f"| {row['network']} | {ms['PyTorch']:.1f} | {ms['view']:.1f} "
            f"| {r['value']:.3f} | {r['low']:.3f} to {r['high']:.3f} |"
        )
    lines.append(f"\nBatch {asked.batch}, {asked.threads} thread(s).\n")
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + "\n" + "\n".join(lines) + END + rest.partition(END)[2])
    print("\n".join(lines))
    worst = max(row["ratio"]["value"] for row in rows)
    print(f"{'holds' if worst <= CLAIM else 'MISSED'}: at most {worst:.3f} times PyTorch")
    return 0 if worst <= CLAIM else 1


if __name__ == "__main__":
    raise SystemExit(main())
