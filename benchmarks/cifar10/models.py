"""Three small networks for 32 x 32 pictures, written here so that the benchmark needs no model hub."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CLASSES = 10


class Residual(nn.Module):
    """The basic block of He et al. 2016 (arXiv:1512.03385), with a projection where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet20(base: int = 16) -> nn.Module:
    """ResNet-20: three stages of three blocks, 16, 32 and 64 channels, 0.27 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, base, 3, 1, 1, bias=False), nn.BatchNorm2d(base), nn.ReLU()]
    channels = base
    for width, first in ((base, 1), (2 * base, 2), (4 * base, 2)):
        for stride in (first, 1, 1):
            layers.append(Residual(channels, width, stride))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def resnet20x4() -> nn.Module:
    """ResNet-20 with four times the channels, 4.3 million parameters: a teacher, not an entrant."""
    return resnet20(64)


class Inverted(nn.Module):
    """The inverted residual of MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, channels: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = channels * expand
        self.same = stride == 1 and channels == width
        wide = [] if expand == 1 else [nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        self.body = nn.Sequential(
            *wide,
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet() -> nn.Module:
    """A MobileNetV2 for 32 x 32 pictures: strides 1, 2, 2; 0.2 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    channels = 16
    for width, count, first, expand in ((16, 1, 1, 1), (24, 2, 2, 4), (32, 3, 2, 4), (64, 2, 1, 4)):
        for number in range(count):
            layers.append(Inverted(channels, width, first if number == 0 else 1, expand))
            channels = width
    layers += [nn.Conv2d(channels, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, CLASSES))


class Attention(nn.Module):
    """Self-attention with heads, written out so that the exported graph shows its parts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length, width = x.shape[1], x.shape[2]
        parts = [
            t.reshape(-1, length, self.heads, width // self.heads).transpose(1, 2) for t in self.qkv(x).chunk(3, 2)
        ]
        query, key, value = parts
        scores = (query @ key.transpose(2, 3)) * (width // self.heads) ** -0.5
        mixed = scores.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(-1, length, width))


class Encoder(nn.Module):
    """One pre-norm block of a vision transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A compact transformer (Hassani et al. 2021, arXiv:2104.05704): two convolutions, then blocks over 64 places."""

    def __init__(self, width: int = 96, heads: int = 3, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 3, 2, 1), nn.ReLU()
        )
        self.places = nn.Parameter(torch.zeros(1, 64, width))
        self.blocks = nn.Sequential(*[Encoder(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit() -> nn.Module:
    """A compact vision transformer: four blocks of width 96 over 64 places, 0.4 million parameters."""
    return Vit()


class Pooled(nn.Module):
    """Two convolutions, with a pooling after the first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def wide() -> nn.Module:
    """The network of airbench (K. Jordan 2024, arXiv:2404.00498), 2 million parameters: a teacher, not an entrant."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 2, 1, 0),
        nn.GELU(),
        Pooled(24, 64),
        Pooled(64, 256),
        Pooled(256, 256),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "mobilenet": mobilenet,
    "vit": vit,
    "wide": wide,
    "resnet20x4": resnet20x4,
}
