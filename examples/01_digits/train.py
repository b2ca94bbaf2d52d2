"""Train the network of ``hasten demo``: handwritten digits, a residual network, float32, seeded, on the CPU.

Writes ``digits.onnx`` (with its batch-norm nodes, dynamic batch) and ``digits.parquet`` (the images that were held
out, as PNG, and their labels) into the folder given, by default the one that the demo reads::

    pip install 'hasten[train]' scikit-learn
    python examples/01_digits/train.py
"""

from __future__ import annotations

import argparse
import io
import math
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from arro3.core import Array, DataType, Table
from arro3.io import write_parquet
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

SEED = 0
SIZE = 32
HELD_OUT = 1000
EPOCHS = 30
BATCH = 50
WIDTHS = (24, 48, 96)
DEPTH = 3
DEMO = Path(__file__).parents[2] / "src" / "hasten" / "cli" / "demo"


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm and a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        same = into == out and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


class Digits(nn.Module):
    """image [batch, 1, 32, 32] in 0..1 -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        blocks = []
        into = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for index in range(DEPTH):
                blocks.append(Block(into, width, 2 if stage and not index else 1))
                into = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(into, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Give the images, uint8 [n, 8, 8], and the labels [n]."""
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def prepare(images: np.ndarray) -> torch.Tensor:
    """Do what hasten's preprocessing does for this input: images [n, 8, 8] -> [n, 1, 32, 32] in 0..1."""
    big = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(big)).float().div(255).unsqueeze(1)


def augment(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Turn, scale and shift each image [n, 1, h, w] a little."""
    n = len(images)
    angle = (torch.rand(n, generator=random) - 0.5) * math.radians(30)
    scale = 1 + (torch.rand(n, generator=random) - 0.5) * 0.3
    shift = (torch.rand(n, 2, generator=random) - 0.5) * 0.3
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(n, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(images: torch.Tensor, labels: torch.Tensor) -> Digits:
    """Train on images [n, 1, 32, 32] in 0..1 and labels [n]."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    net = Digits().to(memory_format=torch.channels_last)
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.25)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=random)
        for start in range(0, len(images) // BATCH * BATCH, BATCH):
            rows = order[start : start + BATCH]
            loss = functional.cross_entropy(net(augment(images[rows], random)), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{EPOCHS}  loss {loss.item():.3f}", flush=True)
    return net.eval()


def export(net: Digits, path: Path) -> None:
    """Write ONNX with the batch-norm nodes kept (folding them is a pass) and any batch."""
    program = torch.onnx.export(
        net.to(memory_format=torch.contiguous_format),
        (torch.zeros(2, 1, SIZE, SIZE),),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    fold_constants(program.model)  # as hasten's own frontend: zero biases that are computed would hinder fusions
    remove_unused_nodes(program.model)
    onnx.save_model(without_notes(program.model_proto), path)


def without_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what the exporter notes about the source: it holds paths of the machine, and is a tenth of the file."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def write_samples(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Write images [n, 8, 8] as PNG and labels [n] into a Parquet file."""
    encoded = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        encoded.append(file.getvalue())
    columns = {"image": Array(encoded, DataType.binary()), "label": Array.from_numpy(labels)}
    write_parquet(Table.from_pydict(columns), path)


def main() -> None:
    """Train, judge on what was held out, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="folder of digits.onnx and digits.parquet")
    out: Path = parser.parse_args().out
    images, labels = read_digits()
    order = np.random.default_rng(SEED).permutation(len(images))
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    start = time.perf_counter()
    net = train(prepare(images[kept]), torch.from_numpy(labels[kept]))
    with torch.inference_mode():
        right = net(prepare(images[held])).argmax(1).numpy() == labels[held]
    print(f"held out: {right.mean():.2%} of {len(held)} are right; training took {time.perf_counter() - start:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    export(net, out / "digits.onnx")
    write_samples(images[held], labels[held], out / "digits.parquet")
    for path in (out / "digits.onnx", out / "digits.parquet"):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
