"""Small torch networks, and what torch's exporter makes of them without its own optimizer. Needs torch."""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn


class Block(nn.Module):
    """An inverted residual, as in MobileNetV2 and V3."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 2 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Mobile(nn.Module):
    """x [batch, 3, 16, 16] -> [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.features = nn.Sequential(*stem, Block(8, 8, 1), Block(8, 16, 2))
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x).mean((2, 3))))


class Layer(nn.Module):
    """One layer of BERT: attention spelled out or by torch's own function."""

    def __init__(self, width: int, heads: int, spelled: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.spelled = heads, spelled

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.spelled:
            scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5 + mask
            y = torch.softmax(scores, -1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm1(x + self.o(y.transpose(1, 2).reshape(batch, length, width)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Bert(nn.Module):
    """ids, mask [batch, length] -> [batch, 4]."""

    def __init__(self, spelled: bool = True, width: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList(Layer(width, 2, spelled) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        bias = (1.0 - mask.float())[:, None, None, :] * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x[:, 0])


class Packed(nn.Module):
    """torch's own encoder, whose attention has one weight for Q, K and V, and the batch on the second axis."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, activation="gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.body(self.words(ids), src_key_padding_mask=mask == 0).mean(1)


def export(name: str) -> onnx.ModelProto:
    """Export a network by its name in ``graphs.EXPORTED``, with random weights and statistics."""
    torch.manual_seed(0)
    kind, _, dynamic = name.partition("-")
    make = {"mobile": Mobile, "bert": Bert, "sdpa": lambda: Bert(spelled=False), "packed": Packed}[kind]
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    ids = torch.randint(0, 2, (2, 8))
    arguments = {"x": torch.randn(2, 3, 16, 16)} if kind == "mobile" else {"ids": ids, "mask": torch.ones_like(ids)}
    axes = {0: torch.export.Dim("batch", min=1, max=64)} if dynamic else {}
    if dynamic == "length":
        axes[1] = torch.export.Dim("length", min=1, max=64)
    program = torch.onnx.export(
        *(net, tuple(arguments.values())),
        dynamo=True,
        optimize=False,
        verbose=False,
        dynamic_shapes=dict.fromkeys(arguments, axes) if axes else None,
    )
    return program.model_proto
