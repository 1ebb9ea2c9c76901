"""The convolutions of a torchvision network at an image size, and the work they cannot avoid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torchvision
from torch import nn


@dataclass(frozen=True)
class Conv:
    """A square convolution on a square map: n h w c -> n p q k."""

    n: int
    h: int
    c: int
    k: int
    r: int
    stride: int
    padding: int
    groups: int

    def __str__(self) -> str:
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.n}x{self.h}x{self.h}x{self.c} {self.r}x{self.r}/{self.stride} {self.k}{groups}"

    @property
    def p(self) -> int:
        return (self.h + 2 * self.padding - self.r) // self.stride + 1

    @property
    def flops(self) -> float:
        """Of one pass (forward, data gradient and weight gradient cost the same): taps over padding do no work."""
        taps = range(self.r)
        live = sum(0 <= p * self.stride - self.padding + t < self.h for p in range(self.p) for t in taps)
        return 2.0 * self.n * self.k * (self.c // self.groups) * live**2

    @property
    def elements(self) -> tuple[int, int, int]:
        """Of input, weight and output."""
        weight = self.k * self.c // self.groups * self.r**2
        return self.n * self.h**2 * self.c, weight, self.n * self.p**2 * self.k

    def tensors(self, dtype: torch.dtype, device: torch.device, channels_last: bool = True):
        """Input, weight, output gradient; values as in a freshly initialised network."""
        form = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.randn(self.n, self.c, self.h, self.h, device=device)
        fan = self.c // self.groups * self.r**2
        w = torch.randn(self.k, self.c // self.groups, self.r, self.r, device=device) / fan**0.5
        g = torch.randn(self.n, self.k, self.p, self.p, device=device)
        return tuple(t.to(dtype).contiguous(memory_format=form) for t in (x, w, g))


def network_work(model: str, batch: int, size: int) -> tuple[float, int]:
    """FLOPs of one forward pass over a torchvision classifier's convolutions, and the elements of their outputs."""
    convs = convolutions(model, batch, size).items()
    return sum(c.flops * count for c, count in convs), sum(c.elements[2] * count for c, count in convs)


def convolutions(model: str, batch: int, size: int) -> dict[Conv, int]:
    """Every distinct convolution of a torchvision classifier and how often it occurs, in order of appearance."""
    net = getattr(torchvision.models, model)().eval().to("meta")
    found: Counter[Conv] = Counter()

    def note(module: nn.Conv2d, inputs, _output) -> None:
        x = inputs[0]
        shape = (batch, x.shape[2], module.in_channels, module.out_channels, module.kernel_size[0])
        found[Conv(*shape, module.stride[0], module.padding[0], module.groups)] += 1

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    net(torch.empty(1, 3, size, size, device="meta"))
    return dict(found)
