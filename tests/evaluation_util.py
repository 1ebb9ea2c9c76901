"""What the tests of evaluation as a program share: a network with every kind of step, and its programs."""

from __future__ import annotations

import torch
from torch import nn

import fastconv
from fastconv._plan import evaluation


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32, affine=False), nn.SiLU(),
        nn.Conv2d(32, 48, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(48, 5),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 8, 8))
    return fastconv.fuse(model, inplace=True).eval()


def programs(model: nn.Module) -> list:
    found = evaluation.Programs.of(model).found.values()
    return [p for p in found if isinstance(p, evaluation.EvaluationPlan)]


def reason(model: nn.Module) -> str:
    found = evaluation.Programs.of(model).found.values()
    return " ".join(p.reason for p in found if isinstance(p, evaluation.Refusal))


def eager(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The fused model's own path: an observer wants to see the groups run."""
    from fastconv._fuse import runtime

    runtime.OBSERVERS.append(lambda *seen: None)
    try:
        return model(x)
    finally:
        runtime.OBSERVERS.pop()
