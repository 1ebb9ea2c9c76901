"""What the tests of the choice share besides conftest's own_cache and measured: made-up measurements, small calls."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
import fastconv.functional as FF
from fastconv.ops import choice
from fastconv.ops import measure as measuring

_NEEDS_CPU = pytest.mark.skipif(
    not fastconv.backends()["cpu"], reason=f"backend cpu: {fastconv.backends()['cpu'].reason}"
)
# Of each file: measured at first use, into a folder of the test's own.
CHOICE_TESTS = [_NEEDS_CPU, pytest.mark.usefixtures("own_cache")]


def favour(monkeypatch, name: str) -> None:
    """Measurements that end with ``name`` as the winner, without the noise of a clock."""

    def pretend(op, names, run, tensors, settings, seconds=None):
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return measuring.Result({n: [1.0 if n == name else 2.0] * (1 + grad) for n in names})

    monkeypatch.setattr(choice, "measure", pretend)


def image(*shape, grad=False):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_(grad)


def net_call(grad=True):
    x, w = image(4, 8, 6, 6, grad=grad), torch.randn(8, 8, 3, 3, requires_grad=grad)
    return lambda: FF.conv2d_bias_act(x, w, padding=1)


class Namespaces(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(func.namespace)
        return func(*args, **(kwargs or {}))
