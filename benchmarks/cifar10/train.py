"""Train one of the networks on CIFAR-10: python train.py resnet20 --data TRAIN.parquet --test TEST.parquet.

Plain PyTorch, apart from hasten: this is the model that a user arrives with. Interrupted, it goes on from its last
epoch. ``export.py`` makes the ONNX file.

Three things make it fit into hours on two cores: pictures start small and grow (progressive resizing, Tan and Le 2021,
arXiv:2104.00298), convolutions are trained by Muon (K. Jordan et al. 2024, kellerjordan.github.io/posts/muon), and a
small network may learn from others (``train.py wide`` first, then ``--teacher wide.pt resnet20.pt``): Hinton et al.
2015, arXiv:1503.02531, on a few views of each picture, the teachers' answers to which are computed once.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from models import NETWORKS
from PIL import Image
from torch import nn

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of the training pictures, in steps of 0 to 255."""

AVERAGED = 0.02
"""Share of the steps over which weights are averaged: a longer memory lags behind where training is short."""

PIECE_PIXELS = 64 * 32 * 32
"""Pixels in one pass over a piece of a step, at most: a piece stays in the processor's cache."""


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


@cache
def scales(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Give mean and deviation, [1, 3, 1, 1] each, on the device: made once, as a CUDA graph may not copy them there."""
    mean, std = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (MEAN, STD))
    return mean, std


def normal(pictures: torch.Tensor) -> torch.Tensor:
    mean, std = scales(pictures.device)
    return (pictures.float() - mean) / std


def augmented(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to 4 pixels and mirror, each picture by draws of its own; they are the same on every device."""
    padded = nn.functional.pad(pictures, (4, 4, 4, 4))
    n, device = len(pictures), pictures.device
    dy, dx = torch.randint(9, (n,), generator=generator), torch.randint(9, (n,), generator=generator)
    rows = (dy[:, None] + torch.arange(32))[:, None, :, None].to(device)
    columns = (dx[:, None] + torch.arange(32))[:, None, None, :]
    mirrored = torch.rand(n, generator=generator)[:, None, None, None] < 0.5
    columns = torch.where(mirrored, columns.flip(3), columns).to(device)
    places = torch.arange(n, device=device)[:, None, None, None], torch.arange(3, device=device)[None, :, None, None]
    return padded[(*places, rows, columns)]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal: a filter bank [out, ...] moves equally far in each of its directions."""

    def __init__(self, parameters, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                moved = state.setdefault("momentum", torch.zeros_like(weight))
                moved.mul_(group["momentum"]).add_(weight.grad)
                direction = weight.grad.add(moved, alpha=group["momentum"])
                flat = orthogonal(direction.reshape(len(weight), -1))  # [out, in * height * width]
                scale = max(1.0, flat.shape[0] / flat.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(flat.reshape(weight.shape), alpha=-group["lr"] * scale)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring all singular values near 1 by Newton-Schulz iterations of fifth order."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def size_at(share: float, sizes: list[int]) -> int:
    """Give the side of the pictures after this share of the training: the sizes take equal parts of it."""
    return sizes[min(int(share * len(sizes)), len(sizes) - 1)]


def resized(pictures: torch.Tensor, size: int) -> torch.Tensor:
    if size == pictures.shape[-1]:
        return pictures
    return nn.functional.interpolate(pictures, size=(size, size), mode="bilinear", antialias=True)


@torch.inference_mode()
def accuracy(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    right = sum(
        int((model(normal(pictures[i : i + 500])).argmax(1) == labels[i : i + 500]).sum())
        for i in range(0, len(labels), 500)
    )
    return right / len(labels)


@torch.inference_mode()
def answers(teachers: list[nn.Module], pictures: torch.Tensor, views: int, seed: int) -> list[torch.Tensor]:
    """Give the teachers' mean logits, float16 [n, classes], for each view: the pictures augmented by draws of its own.

    Half of what is given is that of the view itself, the other half the mean of all views, which is right more often.
    """
    found = []
    for view in range(views):
        whole = augmented(pictures, torch.Generator().manual_seed(seed * 1000 + view))
        parts = [
            torch.stack([teacher.eval()(normal(part)) for teacher in teachers]).mean(0) for part in whole.split(500)
        ]
        found.append(torch.cat(parts))
        print(f"teachers: view {view + 1}/{views}", flush=True)
    mean = torch.stack(found).mean(0)
    return [((own + mean) / 2).half() for own in found]


def distilled(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Give the loss against the teacher's softened answer, scaled as Hinton et al. do."""
    wanted = (teacher.float() / temperature).softmax(1)
    return nn.functional.cross_entropy(logits / temperature, wanted) * temperature**2


def taught(args: argparse.Namespace, pictures: torch.Tensor) -> list[torch.Tensor]:
    """Give the teachers' answers, from beside the checkpoint where an interrupted training left them."""
    kept = args.out / f"{args.network}.answers.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True, map_location=args.device)
    teachers = []
    for path in args.teacher:
        teacher = NETWORKS[path.stem]()
        teacher.load_state_dict(torch.load(path, weights_only=True))
        teachers.append(teacher.to(args.device, memory_format=torch.channels_last))
    found = answers(teachers, pictures, args.views, args.seed)
    torch.save(found, kept)
    return found


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Give what trains the filters, and what trains the rest."""
    filters = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1]
    chosen = {id(p) for p in filters} if args.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": args.decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(groups, lr=args.lr)]
    plain = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    return [Muon(filters, lr=args.muon_lr, weight_decay=args.muon_decay), plain] if chosen else [plain]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 20, 24, 28, 32], help="of the pictures, in turn")
    parser.add_argument("--optimizer", choices=["sgd", "muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, default=0.1, help="peak; of AdamW 0.002")
    parser.add_argument("--decay", type=float, default=5e-4, help="of the weights; of AdamW 0.05")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak, of the filters")
    parser.add_argument("--muon-decay", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.0, help="of the labels")
    parser.add_argument("--warm", type=float, default=0.1, help="share of the steps in which rates rise")
    parser.add_argument("--start", type=Path, help="weights to go on from (.pt of a training before)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--teacher", type=Path, nargs="+", help="NETWORK.pt to learn from; of several, from their mean")
    parser.add_argument("--views", type=int, default=5, help="of each picture, that the teachers answer")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.9, help="share of the teacher in the loss")
    parser.add_argument("--device", default="cpu", help="cuda: on a GPU 200 epochs take minutes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=int, help="train on so many only: to try things out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@dataclass
class Training:
    """What an epoch needs. ``views``: a teacher's answers to each view of the pictures; none without a teacher."""

    args: argparse.Namespace
    model: nn.Module
    runs: Callable[[torch.Tensor], torch.Tensor]
    chosen: list[torch.optim.Optimizer]
    schedules: list[torch.optim.lr_scheduler.LambdaLR]
    average: torch.optim.swa_utils.AveragedModel
    views: list[torch.Tensor]

    def epoch(self, number: int, size: int, pictures: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on every picture once, at a side of ``size``; give the mean loss."""
        args, total = self.args, 0.0
        generator = torch.Generator().manual_seed(args.seed * 1000 + number)
        order = torch.randperm(len(labels), generator=generator)
        lessons = self.views[number % len(self.views)] if self.views else None
        if lessons is not None:
            view = torch.Generator().manual_seed(args.seed * 1000 + number % len(self.views))
            pictures = augmented(pictures, view)
        self.model.train()
        for start in range(0, len(labels) - args.batch + 1, args.batch):
            rows = order[start : start + args.batch].to(args.device)
            x = normal(pictures[rows])
            if lessons is None:
                x = augmented(x, generator)
            total += self.step(resized(x, size), labels[rows], None if lessons is None else lessons[rows])
        return total / (len(labels) // args.batch)

    def step(self, x: torch.Tensor, labels: torch.Tensor, lessons: torch.Tensor | None) -> float:
        """Go one step, its gradient gathered piece by piece; give the loss."""
        args, total = self.args, 0.0
        piece = next(n for n in (128, 64, 32, 16) if n * x.shape[-1] ** 2 <= PIECE_PIXELS or n == 16)
        piece = args.batch if args.device != "cpu" else piece
        for each in self.chosen:
            each.zero_grad()
        for start in range(0, len(x), piece):
            part = slice(start, start + piece)
            logits = self.runs(x[part].contiguous(memory_format=torch.channels_last))
            value = nn.functional.cross_entropy(logits, labels[part], label_smoothing=args.smoothing)
            if lessons is not None:
                lesson = distilled(logits, lessons[part], args.temperature)
                value = (1 - args.alpha) * value + args.alpha * lesson
            share = len(logits) / len(x)
            (value * share).backward()
            total += float(value.detach()) * share
        for each in (*self.chosen, *self.schedules):
            each.step()
        self.average.update_parameters(self.model)
        return total


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = NETWORKS[args.network]()
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True))
    model.to(args.device, memory_format=torch.channels_last)
    pictures, labels = (part[: args.rows].to(args.device) for part in load(args.data))
    test = tuple(part.to(args.device) for part in load(args.test))
    steps = args.epochs * (len(labels) // args.batch)
    warm = max(steps * args.warm, 1)
    chosen = optimizers(model, args)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm)))
        for each in chosen
    ]
    remembered = 1 - 1 / max(AVERAGED * steps, 1)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(remembered), use_buffers=True
    )
    parts = {"model": model, "average": average}
    parts |= {f"optimizer {i}": each for i, each in enumerate(chosen)}
    parts |= {f"schedule {i}": each for i, each in enumerate(schedules)}
    checkpoint = args.out / f"{args.network}.checkpoint.pt"
    first = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True, map_location=args.device)
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        first = kept["epoch"]
    views = taught(args, pictures) if args.teacher else []
    training = Training(args, model, torch.compile(model, dynamic=False), chosen, schedules, average, views)
    for epoch in range(first, args.epochs):
        began, size = time.perf_counter(), size_at(epoch / args.epochs, args.sizes)
        loss = training.epoch(epoch, size, pictures, labels)
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "epoch": epoch + 1}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        told = f"epoch {epoch + 1}/{args.epochs}: {size} pixels, loss {loss:.3f}"
        if (epoch + 1) % 4 == 0 or epoch + 1 == args.epochs:
            told += f", test {accuracy(average.module, resized(test[0].float(), size), test[1]):.4f}"
        print(f"{told}, {time.perf_counter() - began:.0f} s", flush=True)
    weights = {name: value.cpu() for name, value in average.module.state_dict().items()}
    torch.save(weights, args.out / f"{args.network}.pt")


if __name__ == "__main__":
    main()
