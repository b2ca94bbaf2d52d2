"""Train one of the networks on CIFAR-10: python train.py resnet20 --data TRAIN.parquet --test TEST.parquet.

Plain PyTorch, apart from hasten: this is the model that a user arrives with. Interrupted, it goes on from its last
epoch. ``export.py`` makes the ONNX file.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from models import NETWORKS
from PIL import Image
from torch import nn

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of the training pictures, in steps of 0 to 255."""

BATCH = 128


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Give pictures, uint8 [n, 3, 32, 32], and labels, int64 [n]."""
    table = pq.read_table(path, columns=["image", "label"])
    column = table.column("image").to_pylist()
    pictures = [
        np.asarray(Image.open(io.BytesIO(i["bytes"] if isinstance(i, dict) else i)).convert("RGB")) for i in column
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        table.column("label").to_pylist()
    )


def normal(pictures: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return (pictures.float() - mean) / std


def augmented(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 4 pixels and mirror, one draw a batch for the shift and one a picture for the mirror."""
    padded = nn.functional.pad(pictures, (4, 4, 4, 4))
    n = len(pictures)
    dy, dx = torch.randint(9, (n,), generator=generator), torch.randint(9, (n,), generator=generator)
    rows = (dy[:, None] + torch.arange(32))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(32))[:, None, None, :]
    mirrored = torch.rand(n, generator=generator)[:, None, None, None] < 0.5
    columns = torch.where(mirrored, columns.flip(3), columns)
    return padded[torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    right = sum(
        int(
            (
                model(normal(pictures[i : i + 500]).contiguous(memory_format=torch.channels_last)).argmax(1)
                == labels[i : i + 500]
            ).sum()
        )
        for i in range(0, len(labels), 500)
    )
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.2, help="peak; for the transformer, of AdamW: 0.002")
    parser.add_argument("--decay", type=float, default=5e-4, help="of the weights; for the transformer 0.05")
    parser.add_argument("--smoothing", type=float, default=0.05, help="of the labels")
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = NETWORKS[args.network]().to(memory_format=torch.channels_last)
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True))
    pictures, labels = load(args.data)
    test = load(args.test)
    transformer = args.network == "vit"
    plain = [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=args.lr)
        if transformer
        else torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    )
    steps = args.epochs * (len(labels) // BATCH)
    warm = steps * 0.2

    def rate(step: int) -> float:
        return step / warm if step < warm else max(0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))), 1e-3)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    checkpoint = args.out / f"{args.network}.checkpoint.pt"
    first = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule"), (average, "average")):
            part.load_state_dict(kept[name])
        first = kept["epoch"]
    for epoch in range(first, args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        order, began, total = torch.randperm(len(labels), generator=generator), time.perf_counter(), 0.0
        model.train()
        for start in range(0, len(labels) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            x = augmented(normal(pictures[rows]), generator).contiguous(memory_format=torch.channels_last)
            value = nn.functional.cross_entropy(model(x), labels[rows], label_smoothing=args.smoothing)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            total += value.item()
        state = {
            n: p.state_dict()
            for n, p in (("model", model), ("optimizer", optimizer), ("schedule", schedule), ("average", average))
        }
        torch.save({**state, "epoch": epoch + 1}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {total / (len(labels) // BATCH):.3f}, "
            f"test {accuracy(average.module, *test):.4f}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    torch.save(average.module.state_dict(), args.out / f"{args.network}.pt")


if __name__ == "__main__":
    main()
