"""What the tests of a plan's operators share: convolutions by name, and the tolerance rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LAST = torch.channels_last


# (input, filters, kernel, stride, padding, dilation, groups): the engine's shapes, few channels, depthwise, odd ones.
SHAPES = {
    "3x3": ((2, 32, 6, 6), 64, 3, 1, 1, 1, 1),
    "strided": ((3, 64, 7, 5), 32, 3, 2, 1, 1, 1),
    "1x1": ((4, 64, 3, 3), 96, 1, 1, 0, 1, 1),
    "one pixel": ((4, 64, 1, 1), 64, 3, 1, 1, 1, 1),
    "stem": ((2, 3, 16, 16), 64, 7, 2, 3, 1, 1),
    "depthwise": ((2, 32, 6, 6), 32, 3, 1, 1, 1, 32),
    "odd": ((2, 5, 7, 6), 9, 3, 1, 2, 2, 1),
    # from 1 MiB on, a weight gradient is written past the caches
    "large": ((3, 256, 2, 2), 256, 3, 1, 1, 1, 1),
    "large, one pixel": ((2, 256, 1, 1), 256, 3, 1, 1, 1, 1),
}


def problem(name: str, dtype: torch.dtype = torch.float32):
    size, k, r, stride, pad, dil, groups = SHAPES[name]
    x = torch.randn(size).to(dtype).contiguous(memory_format=LAST)
    w = (torch.randn(k, size[1] // groups, r, r) / 8).to(dtype).contiguous(memory_format=LAST)
    settings = {"stride": stride, "padding": pad, "dilation": dil, "groups": groups}
    geometry = [stride, stride, pad, pad, dil, dil, groups]
    return x, w, settings, geometry


def close(got: Tensor, stock: Tensor, oracle: Tensor) -> None:
    scale = oracle.abs().max()
    slack = (8 if got.dtype is torch.float32 else 1) * torch.finfo(got.dtype).eps * scale
    mine, theirs = (got.double() - oracle).abs().max(), (stock.double() - oracle).abs().max()
    assert mine <= 2 * theirs + slack, (mine, theirs)


def backward(x: Tensor, w: Tensor, g: Tensor, settings: dict) -> tuple[Tensor, Tensor]:
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w, **settings), (x, w), g)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
