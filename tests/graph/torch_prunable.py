"""Small networks of every family that is pruned, as torch's exporter writes them. Needs torch."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable

import onnx
import torch
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor, nn
from torch.nn import functional


def _conv(inputs: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(inputs, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """A basic block, with a projection where shapes differ."""

    def __init__(self, inputs: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _conv(inputs, out, 3, stride), _conv(out, out)
        self.project = _conv(inputs, out, 1, stride) if inputs != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))) + self.project(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = _conv(3, 8), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 12, 2), Residual(12, 12, 1))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(functional.relu(self.stem(x))))
        return self.head(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class Excite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(functional.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """An inverted residual, with squeeze and excitation where asked."""

    def __init__(self, width: int, out: int, stride: int, excite: bool) -> None:
        super().__init__()
        wide = 2 * width
        act: Callable[[], nn.Module] = nn.Hardswish if excite else nn.ReLU6
        self.body = nn.Sequential(
            *(_conv(width, wide, 1), act(), _conv(wide, wide, 3, stride, wide), act()),
            *((Excite(wide),) if excite else ()),
            _conv(wide, out, 1),
        )
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Mobile(nn.Module):
    def __init__(self, excite: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 8, 3, 2), nn.PReLU(8) if excite else nn.ReLU6())
        self.blocks = nn.Sequential(Inverted(8, 8, 1, excite), Inverted(8, 12, 2, excite), Inverted(12, 12, 1, excite))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads what all before it made; batch-norm comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, 1, 1, bias=False) for i in range(3))
        self.head = nn.Linear(18 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(functional.relu(norm(x)))], 1)
        return self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.deep = _conv(3, 6), _conv(6, 8), _conv(8, 10)
        self.up2, self.join2 = nn.ConvTranspose2d(10, 8, 2, 2), _conv(16, 8)
        self.up1, self.join1, self.head = nn.Upsample(scale_factor=2), _conv(14, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.first(x))
        b = functional.leaky_relu(self.second(functional.max_pool2d(a, 2)))
        c = functional.relu(self.deep(functional.max_pool2d(b, 2)))
        b = functional.relu(self.join2(torch.cat([self.up2(c), b], 1)))
        return self.head(functional.relu(self.join1(torch.cat([self.up1(b), a], 1))))


class Attention(nn.Module):
    """One weight for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class ViT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 17, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.attention = nn.ModuleList(Attention(width, 4) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x[:, 0])


class Bert(nn.Module):
    """torch's own encoder layer, or attention by torch's own function."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        layer = nn.TransformerEncoderLayer(width, 4, 24, activation="gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.words(ids)).mean(1))


class Gated(nn.Module):
    """A layer split into values and gates, group-norm, and grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 8)
        self.grouped, self.mix = nn.Conv2d(8, 12, 3, 1, 1, groups=4), nn.Conv2d(12, 8, 1)
        self.shuffle, self.instance = nn.PixelShuffle(2), nn.InstanceNorm2d(2, affine=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.stem(x).chunk(2, 1)
        x = self.grouped(functional.pad(self.norm(value * torch.tanh(gate)), (1, 1, 1, 1)))
        return self.head(self.instance(self.shuffle(functional.elu(self.mix(x)))).amax((2, 3)))


class Shuffle(nn.Module):
    """Grouped convolutions with shuffled channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 1), _conv(8, 8, 1, 1, 2), _conv(8, 8, 1, 1, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(functional.relu(self.stem(x)))
        batch, width, height, side = x.shape
        x = x.reshape(batch, 2, width // 2, height, side).transpose(1, 2).reshape(batch, width, height, side)
        return self.head(functional.relu(self.second(x)).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "mobile": lambda: Mobile(excite=False),
    "excite": lambda: Mobile(excite=True),
    "dense": Dense,
    "unet": UNet,
    "vit": ViT,
    "bert": Bert,
    "gated": Gated,
    "shuffle": Shuffle,
}


def exported(name: str) -> onnx.ModelProto:
    """Export a network, unoptimized: ``name``, ``name-batch`` or ``name-open`` (images and texts of any size)."""
    return copy.deepcopy(_exported(name))


@functools.cache
def _exported(name: str) -> onnx.ModelProto:
    torch.manual_seed(0)
    kind, _, dynamic = name.partition("-")
    net = NETWORKS[kind]().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    x = torch.randint(0, 20, (2, 6)) if kind == "bert" else torch.randn(2, 3, 16, 16)
    axes = {0: torch.export.Dim("batch", min=1, max=64)} if dynamic else {}
    if dynamic == "open":
        axes |= {1: torch.export.Dim("length", min=2, max=64)} if kind == "bert" else {}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            *(net, (x,)), dynamo=True, optimize=False, verbose=False, dynamic_shapes=(axes,) if axes else None
        )
    fold_constants(program.model)  # as the frontend does
    remove_unused_nodes(program.model)
    model = program.model_proto
    del model.graph.value_info[:]
    return model
