"""What the tests of planned training steps share: small networks, optimizers, and the loop written by hand."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

import fastconv


class Residual(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.a, self.na, self.b, self.nb = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)  # fmt: skip
        self.act = act()

    def forward(self, x):
        return self.act(self.nb(self.b(self.act(self.na(self.a(x))))) + x)


def net(seed: int = 0, act: type[nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Module:
    """Every kind of step, well conditioned: few layers, several positions per channel."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), act(), nn.MaxPool2d(3, 2, 1), Residual(act),
        nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32, affine=False), nn.AvgPool2d(2), nn.Conv2d(32, 24, 1), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def batches(count: int, size: int = 6):
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 14, 14), torch.randint(5, (size,))) for _ in range(count)]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-4, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, eps=1e-4, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-4, eps=1e-4),
}
FUSED = {"sgd", "momentum", "nesterov", "adam", "adamw"}


def by_hand(model, loss_fn, optimizer, data, dtype=None):
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def planned(model, loss_fn, optimizer, data, **options):
    step = fastconv.TrainStep(model, loss_fn, optimizer, **options)
    losses = [step(x, y) for x, y in data]
    assert step.plan_reason == ""
    return losses


def assert_near(a: nn.Module, b: nn.Module, tolerance: float = 2e-4) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        left, right = left.double(), right.double()
        assert (left - right).norm() <= tolerance * (right.norm() + 1e-2), (name, left, right)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    block = torchvision.models.resnet.Bottleneck
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        block(16, 8, downsample=shortcut), block(32, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip
