"""The two networks: a MobileNetV2 (Sandler et al. 2018) at 224 x 224, and a BERT-like encoder (4 layers, width 256).

Weights are random (seeded). Batch-norm statistics are taken from a few batches, so that activations have the scale
that they have in a trained network.
"""

import torch
from torch import nn

SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv(inputs, outputs, kernel=3, stride=1, groups=1, act=True):
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        hidden = inputs * expand
        layers = [conv(inputs, hidden, 1)] if expand != 1 else []
        layers += [conv(hidden, hidden, 3, stride, groups=hidden), conv(hidden, outputs, 1, act=False)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        layers, width = [conv(3, 32, stride=2)], 32
        for expand, outputs, repeats, stride in SETTINGS:
            for i in range(repeats):
                layers.append(InvertedResidual(width, outputs, stride if i == 0 else 1, expand))
                width = outputs
        self.features = nn.Sequential(*layers, conv(width, 1280, 1))
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self, layers=4, width=256, heads=4, length=128, words=1000, classes=10):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(1, length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, ids):
        return self.head(self.encoder(self.words(ids) + self.places).mean(1))


def mobilenet():
    """Give the network and an example input [1, 3, 224, 224]."""
    torch.manual_seed(0)
    net = MobileNetV2()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None  # a plain average over the batches below
    nn.init.normal_(net.classifier.weight, std=0.1)
    net.train()
    with torch.no_grad():
        for _ in range(4):
            net(torch.rand(16, 3, 224, 224))
    return net.eval(), (torch.rand(1, 3, 224, 224),)


def encoder():
    """Give the network and an example input [1, 128] of word numbers."""
    torch.manual_seed(0)
    return Encoder().eval(), (torch.randint(0, 1000, (1, 128)),)
