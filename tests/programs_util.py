"""What the tests of a fused model's programs share: a network with every kind of step, its programs, its steps."""

from __future__ import annotations

import threading

import torch
from torch import nn

import fastconv
from fastconv._plan import evaluation, gradients
from fastconv._plan.programs import Programs, Refusal

MODELS = (
    "resnet18", "vgg11_bn", "squeezenet1_1", "densenet121", "googlenet", "mobilenet_v2", "mobilenet_v3_small",
    "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5", "efficientnet_b0",
)  # fmt: skip


def in_threads(work, *arguments) -> None:
    """work(*a) of all of them at a time."""
    threads = [threading.Thread(target=work, args=a) for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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
    found = Programs.of(model).found.values()
    return [p for p in found if isinstance(p, (evaluation.EvaluationPlan, gradients.GradientPlan))]


def reason(model: nn.Module) -> str:
    found = Programs.of(model).found.values()
    return " ".join(p.reason for p in found if isinstance(p, Refusal))


def eager(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The fused model's own path: an observer wants to see the groups run."""
    from fastconv._fuse import runtime

    runtime.OBSERVERS.append(lambda *seen: None)
    try:
        return model(x)
    finally:
        runtime.OBSERVERS.pop()


def same(a, b) -> bool:
    return (a is None) == (b is None) and (a is None or torch.equal(a, b) and a.stride() == b.stride())


def step(model, x, y, call=None, low=False):
    """One forward and backward from seed 5; the result, the gradients and the buffers."""
    torch.manual_seed(5)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = model(x) if call is None else call(model, x)
        loss = nn.functional.cross_entropy(out, y)
    loss.backward()
    grads = [None if p.grad is None else p.grad.clone(memory_format=torch.preserve_format) for p in model.parameters()]
    return out.detach().clone(), grads, [b.clone() for b in model.buffers()]


def assert_same_step(got, expected) -> None:
    assert torch.equal(got[0], expected[0])
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True))


def training_net(seed: int = 0) -> nn.Module:
    return net(seed).train()


def batch(size: int = 4, classes: int = 5):
    return torch.randn(size, 3, 8, 8), torch.arange(size) % classes
