"""What the tests of TrainStep share: a small net, batches for it."""

from __future__ import annotations

import torch
from torch import nn

import fastconv.nn as fnn


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        fnn.Conv2dBiasReLU(3, 8, 3, padding=1), fnn.BatchNormAct2d(8, activation="silu"), fnn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), fnn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def batches(count: int, size: int = 6):
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 10, 10), torch.randint(5, (size,))) for _ in range(count)]
