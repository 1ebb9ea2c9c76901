"""The small models that several files test fuse() on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """conv -> bn -> add -> act, the addition and the activation as given."""

    def __init__(self, add, act, bn: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=not bn)
        self.bn = nn.BatchNorm2d(4) if bn else None
        self.act = act if isinstance(act, nn.Module) else None
        self.add, self.function = add, act

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.bn is not None:
            y = self.bn(y)
        y = self.add(y, x)
        return self.act(y) if self.act is not None else self.function(y)


def iadd(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


def add_right(y: Tensor, x: Tensor) -> Tensor:
    return x + y


ACTS = {
    "relu": nn.ReLU(inplace=True), "relu6": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(), "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(), "silu": nn.SiLU(inplace=True), "gelu": nn.GELU(), "hardswish": nn.Hardswish(),
}  # fmt: skip


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.tail = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        for block in self.tail:
            x = block(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


X = (2, 3, 9, 8)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Layers(nn.Module):
    """Two convolutions, two batch norms and an activation for the forwards of this file."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=inplace)


def model_of(forward, inplace: bool = True, **attributes) -> nn.Module:
    model = type("Model", (Layers,), {"forward": forward})(inplace)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model.double()


def tiny_vgg(batch_norm: bool) -> nn.Module:
    from torchvision import models

    layers = models.vgg.make_layers([8, "M", 16, 16, "M", 16, "M"], batch_norm=batch_norm)
    model = models.VGG(layers, num_classes=5)
    model.classifier = nn.Sequential(nn.Linear(16 * 49, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 5))
    return model
