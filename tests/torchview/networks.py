"""Small torch networks of every usual kind, and their graphs as the PyTorch frontend exports them. Needs torch."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable

import onnx
import onnx_ir
import torch
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor, nn


class Residual(nn.Module):
    """A block of ResNet."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)),
        )
        same = stride == 1 and width == out
        self.side = nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.side(x))


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(width, 2, 1), nn.SiLU(), nn.Conv2d(2, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.pool(x))


class Inverted(nn.Module):
    """A block of MobileNetV2, or with an activation and a gate of MobileNetV3 and EfficientNet."""

    def __init__(self, width: int, out: int, stride: int, act: Callable[[], nn.Module], gated: bool = False) -> None:
        super().__init__()
        wide = 2 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), act()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), act()),
            Squeeze(wide) if gated else nn.Identity(),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def images(*blocks: nn.Module, act: Callable[[], nn.Module], out: int) -> nn.Module:
    """Make a classifier of images [batch, 3, 16, 16]."""
    stem = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), act())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(out, 5))


class UNet(nn.Module):
    """x [batch, 3, 16, 16] -> [batch, 2, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList((self.block(3, 6), self.block(6, 8), self.block(8, 10)))
        self.up = nn.ModuleList((nn.ConvTranspose2d(10, 8, 2, 2), nn.Upsample(scale_factor=2, mode="bilinear")))
        self.join = nn.ModuleList((self.block(16, 8), self.block(14, 6)))
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(6, 2, 1)

    def block(self, width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(2, out), nn.LeakyReLU(0.1))

    def forward(self, x: Tensor) -> Tensor:
        one = self.down[0](x)
        two = self.down[1](self.pool(one))
        x = self.down[2](self.pool(two))
        x = self.join[0](torch.cat((self.up[0](x), two), 1))
        return self.head(self.join[1](torch.cat((self.up[1](x), one), 1)))


def encoder(width: int, *, before: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=before
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Vit(nn.Module):
    """x [batch, 3, 16, 16] -> [batch, 5]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 5)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.body, self.norm = encoder(width, before=True), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.places
        return self.head(self.norm(self.body(x))[:, 0])


class Bert(nn.Module):
    """ids, mask [batch, 8] -> [batch, 4]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Embedding(64, width)
        self.norm, self.body, self.head = nn.LayerNorm(width), encoder(width), nn.Linear(width, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return self.head(torch.tanh(self.body(x, src_key_padding_mask=mask == 0)[:, 0]))


class Recurrent(nn.Module):
    """ids [batch, 8] -> [batch, 4]."""

    def __init__(self, kind: type[nn.RNNBase], *, both: bool, layers: int = 1) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 12)
        self.body = kind(12, 10, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(20 if both else 10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.words(ids))[0].mean(1))


def _image(random: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(3, 3, 16, 16, generator=random),)


def _ids(random: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (3, 8), generator=random),)


def _ids_and_mask(random: torch.Generator) -> tuple[Tensor, ...]:
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return (*_ids(random), mask)


def _features(random: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(3, 12, generator=random),)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], tuple[Tensor, ...]]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)),
        _features,
    ),
    "resnet": (lambda: images(Residual(8, 8, 1), Residual(8, 12, 2), act=nn.ReLU, out=12), _image),
    "mobilenet-v2": (
        lambda: images(Inverted(8, 8, 1, nn.ReLU6), Inverted(8, 12, 2, nn.ReLU6), act=nn.ReLU6, out=12),
        _image,
    ),
    "mobilenet-v3": (lambda: images(Inverted(8, 8, 1, nn.Hardswish, gated=True), act=nn.Hardswish, out=8), _image),
    "efficientnet": (
        lambda: images(
            Inverted(8, 8, 1, nn.SiLU, gated=True), Inverted(8, 12, 2, nn.SiLU, gated=True), act=nn.SiLU, out=12
        ),
        _image,
    ),
    "unet": (UNet, _image),
    "vit": (Vit, _image),
    "bert": (Bert, _ids_and_mask),
    "lstm": (lambda: Recurrent(nn.LSTM, both=True), _ids),
    "lstm-stacked": (lambda: Recurrent(nn.LSTM, both=False, layers=2), _ids),
    "gru": (lambda: Recurrent(nn.GRU, both=True), _ids),
    "rnn": (lambda: Recurrent(nn.RNN, both=False), _ids),
}
"""The networks by name, each with how to draw its inputs, three samples."""


def network(name: str) -> nn.Module:
    """Make a network in evaluation mode, with random statistics."""
    torch.manual_seed(0)
    net = NETWORKS[name][0]().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return net


def inputs(name: str, seed: int = 1) -> tuple[Tensor, ...]:
    """Draw inputs of a network."""
    return NETWORKS[name][1](torch.Generator().manual_seed(seed))


def graph(name: str) -> onnx.ModelProto:
    """Export a network with a symbolic batch axis, as the PyTorch frontend does."""
    return copy.deepcopy(_graph(name, folded=True))


def raw_graph(name: str) -> onnx.ModelProto:
    """Export a network as it comes: all the exporter's clutter, and every parameter as it is in the module."""
    return copy.deepcopy(_graph(name, folded=False))


@functools.cache
def _graph(name: str, *, folded: bool) -> onnx.ModelProto:
    program = _exported(name)
    if not folded:
        return program.model_proto
    model = program.model.clone()
    fold_constants(model)
    remove_unused_nodes(model)
    return onnx_ir.to_proto(model)


@functools.cache
def _exported(name: str) -> torch.onnx.ONNXProgram:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    arguments = inputs(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            *(network(name), arguments),
            dynamo=True,
            optimize=False,
            opset_version=20,
            verbose=False,
            dynamic_shapes=tuple({0: batch} for _ in arguments),
        )
