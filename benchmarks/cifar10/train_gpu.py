"""Train all networks on one GPU in minutes: python train_gpu.py --data TRAIN.parquet --test TEST.parquet.

Two teachers come first. The others learn from the mean of their answers, long and on the same views of the pictures
that the teachers saw, mixed ones among them (Beyer et al. 2022, "A good teacher is patient and consistent",
arXiv:2106.05237). Everything stays on the device; a step, forward to running average, is one CUDA graph that is
replayed, and as many epochs are run as fit the seconds that a network is given. ``export.py`` makes the ONNX files.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from models import NETWORKS
from torch import nn
from train import accuracy, augmented, distilled, load, normal

TEACHERS = ("wide", "resnet20x4")
LASTING = 0.998
"""Decay of the running average of the weights, a step."""


class Fed:
    """Views of the training pictures: [n, 3, 32, 32] uint8, labels [n, classes], and the teachers' logits if any."""

    def __init__(self, pictures: torch.Tensor, labels: torch.Tensor, batch: int) -> None:
        self.pictures, self.labels, self.batch = pictures, nn.functional.one_hot(labels).float(), batch
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def teach(self, teachers: list[nn.Module], count: int) -> None:
        """Keep so many views with the teachers' answers; of every second, half of the pictures are mixed (mixup)."""
        for number in range(count):
            generator = torch.Generator().manual_seed(1000 + number)
            shown, labels = augmented(self.pictures, generator), self.labels
            if number % 2:
                n = len(shown)
                other = torch.randperm(n, generator=generator).to(shown.device)
                share = (torch.rand(n, generator=generator) * 0.5 + 0.5).to(shown.device)
                share = torch.where((torch.rand(n, generator=generator) < 0.5).to(shown.device), share, 1.0)
                labels = share[:, None] * labels + (1 - share[:, None]) * labels[other]
                share = share[:, None, None, None]
                shown = (share * shown + (1 - share) * shown[other]).round().to(torch.uint8)
            with torch.inference_mode(), half(shown.device):
                parts = shown.split(1000)
                answers = torch.cat([sum(t(laid(part)) for t in teachers).float() for part in parts]) / len(teachers)
            self.kept.append((shown, labels, answers.clone()))

    def epoch(self, number: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give the steps of one epoch: pictures, labels and, where there are teachers, their logits."""
        generator = torch.Generator().manual_seed(number)
        parts = self.kept[number % len(self.kept)] if self.kept else (augmented(self.pictures, generator), self.labels)
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for start in range(0, len(order) - self.batch + 1, self.batch):
            rows = order[start : start + self.batch]
            yield tuple(part[rows] for part in parts)


def laid(pictures: torch.Tensor) -> torch.Tensor:
    return normal(pictures).contiguous(memory_format=torch.channels_last)


def half(device: torch.device) -> torch.autocast:
    """Give mixed precision on a GPU, none elsewhere. A graph cannot keep autocast's copies of the weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class Stepper:
    """One step of a network, a CUDA graph where there is a GPU. The rate is a tensor: it changes between steps."""

    def __init__(self, model: nn.Module, first: tuple[torch.Tensor, ...], transformer: bool) -> None:
        self.model, self.average, self.transformer = model, copy.deepcopy(model).eval(), transformer
        self.fed = [part.clone() for part in first]
        device = first[0].device
        self.rate, self.loss = torch.zeros((), device=device), torch.zeros((), device=device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.large = [p for p in self.parameters if p.ndim > 1]
        self.moved = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.count = torch.zeros((), device=device)
        self.states = [
            (there, here)
            for there, here in zip(self.average.state_dict().values(), model.state_dict().values(), strict=True)
            if here.is_floating_point()
        ]
        model.train()
        self.graph = None
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()

    def step(self) -> None:
        """Forward, loss, backward, update, running average; nothing in it waits for the device."""
        with half(self.rate.device):
            logits = self.model(laid(self.fed[0])).float()
        value = nn.functional.cross_entropy(logits, self.fed[1])
        if len(self.fed) > 2:
            value = 0.1 * value + 0.9 * distilled(logits, self.fed[2], 4.0)
        slopes = list(torch.autograd.grad(value, self.parameters))
        with torch.no_grad():
            self.loss.copy_(value)
            (self.adamw if self.transformer else self.sgd)(slopes)
            kept, now = zip(*self.states, strict=True)
            torch._foreach_lerp_(list(kept), list(now), 1 - LASTING)

    def sgd(self, slopes: list[torch.Tensor]) -> None:
        """Nesterov momentum 0.9; weights decay, norms and biases do not."""
        for slope, weight in zip(slopes, self.parameters, strict=True):
            if weight.ndim > 1:
                slope.add_(weight, alpha=5e-4)
        torch._foreach_mul_(self.moved, 0.9)
        torch._foreach_add_(self.moved, slopes)
        torch._foreach_add_(slopes, self.moved, alpha=0.9)
        torch._foreach_mul_(slopes, self.rate)
        torch._foreach_sub_(self.parameters, slopes)

    def adamw(self, slopes: list[torch.Tensor]) -> None:
        """AdamW with decay 0.05 (Loshchilov and Hutter 2019, arXiv:1711.05101), betas 0.9 and 0.99."""
        self.count.add_(1)
        torch._foreach_lerp_(self.moved, slopes, 0.1)
        torch._foreach_mul_(self.squares, 0.99)
        torch._foreach_addcmul_(self.squares, slopes, slopes, 0.01)
        below = torch._foreach_sqrt(self.squares)
        torch._foreach_div_(below, (1 - 0.99**self.count).sqrt())
        torch._foreach_add_(below, 1e-8)
        moves = torch._foreach_div(self.moved, below)
        torch._foreach_mul_(moves, self.rate / (1 - 0.9**self.count))
        keep = 1 - 0.05 * self.rate
        for weight in self.large:
            weight.mul_(keep)
        torch._foreach_sub_(self.parameters, moves)

    def run(self, parts: tuple[torch.Tensor, ...], rate: float) -> None:
        for place, part in zip(self.fed, parts, strict=True):
            place.copy_(part)
        self.rate.fill_(rate)
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def trained(name: str, seconds: float, fed: Fed, test: tuple[torch.Tensor, torch.Tensor], most: int) -> nn.Module:
    """Train for about so many seconds and give the running average of the weights."""
    device = fed.labels.device
    torch.manual_seed(0)
    model = NETWORKS[name]().to(device, memory_format=torch.channels_last)
    transformer = name == "vit"
    peak = 0.002 if transformer else 0.25 * fed.batch / 512
    began = time.perf_counter()
    stepper = Stepper(model, next(fed.epoch(0)), transformer)
    wait(device)
    probe = time.perf_counter()
    for number, parts in enumerate(fed.epoch(0)):
        stepper.run(parts, 0.0)
        if number == 29:
            break
    wait(device)
    each = (time.perf_counter() - probe) / (number + 1)
    steps = len(fed.labels) // fed.batch
    epochs = max(1, min(most, int((seconds - (time.perf_counter() - began)) / (each * steps))))
    print(f"{name}: {each * 1e3:.2f} ms a step, {epochs} epochs", flush=True)
    done, total, warm = 0, epochs * steps, max(epochs * steps * 0.05, 1)
    for epoch in range(epochs):
        for parts in fed.epoch(epoch):
            done += 1
            stepper.run(parts, peak * min(done / warm, (total - done) / (total - warm)))
        if (epoch + 1) % max(epochs // 8, 1) == 0 or epoch + 1 == epochs:
            right = accuracy(stepper.average, *test)
            spent = time.perf_counter() - began
            print(f"{name} {epoch + 1}/{epochs}: loss {stepper.loss:.4f}, test {right:.4f}, {spent:.0f} s", flush=True)
    return stepper.average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet20:240", "mobilenet:100", "vit:100"], metavar="NAME:S")
    parser.add_argument("--teachers", nargs="*", default=["wide:30", "resnet20x4:80"], metavar="NAME:S")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--views", type=int, default=32, help="of the pictures, that the teachers answer")
    parser.add_argument("--epochs", type=int, default=400, help="at most")
    parser.add_argument("--rows", type=int, help="train on so many only: to try things out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, labels = (part[: args.rows].to(args.device) for part in load(args.data))
    test = tuple(part[: args.rows].to(args.device) for part in load(args.test))
    fed, teachers = Fed(pictures, labels, args.batch), []
    for each in (*args.teachers, *args.networks):
        name, _, seconds = each.partition(":")
        if each == args.networks[0] and teachers:
            fed.teach(teachers, args.views)
        model = trained(name, float(seconds), fed, test, args.epochs)
        if each in args.teachers:
            teachers.append(model)
        weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
        torch.save(weights, args.out / f"{name}.pt")


if __name__ == "__main__":
    main()
