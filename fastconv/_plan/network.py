"""A network as a plan sees it: values with known shapes, nodes in order, and what they were read from."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._fuse.module import FusedMixin
from .._fuse.runtime import has_hooks


class Refused(Exception):
    """What keeps a model, or a call, out of a plan; str() is the reason."""


@dataclass(eq=False)
class Value:
    """A tensor of the network: its shape, and how many nodes read it."""

    shape: tuple[int, ...]
    readers: int = 0


@dataclass(eq=False)
class Node:
    """One step: ``op`` is conv, norm, max_pool, avg_pool, adaptive_avg_pool, linear, act, add, mul, cat, narrow,
    reshape, transpose or dropout; the rest of the fields are what that step needs. stock: the model calls PyTorch's own
    layer or function there, outside of a fused group."""

    op: str
    inputs: list[Value]
    output: Value
    module: nn.Module | None = None
    bn: nn.Module | None = None
    act: str = "identity"
    residual: Value | None = None
    options: dict[str, Any] = field(default_factory=dict)
    stock: bool = False


@dataclass
class Network:
    """nodes in order, with the modules whose state the flattening has relied on."""

    input: Value
    nodes: list[Node]
    output: Value
    modules: list[nn.Module]
    reads: list[tuple[nn.Module, str]]

    def state(self) -> list[Any]:
        """What must stay as it was for the nodes to stay true; compare with an earlier one."""
        found: list[Any] = [getattr(module, name, None) for module, name in self.reads]
        for m in self.modules:
            kind = type(m)
            if isinstance(m, FusedMixin):
                found += (m.__dict__.get("_fastconv_plan"), m.training, has_hooks(m))
                continue
            found += (kind, m.training, has_hooks(m), *m._parameters.values(), *m._buffers.values())
            found += m._modules.values()
            for name in READ.get(kind, ()):
                found.append(getattr(m, name))
        return found


READ: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "momentum", "track_running_stats"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Dropout: ("p", "inplace"),
    nn.Flatten: ("start_dim", "end_dim"),
}


MODULE_STATE = frozenset(nn.Module().__dict__)


def same_state(a: list[Any], b: list[Any]) -> bool:
    """Identity, or equality of plain values: tensors and plans are compared by identity only."""
    if len(a) != len(b):
        return False
    # A step's guard: nearly always all are the same objects, and then no line of Python runs for each.
    return all(map(operator.is_, a, b)) or all(
        x is y or (not isinstance(x, (Tensor, nn.Module)) and plain(x) and x == y) for x, y in zip(a, b, strict=True)
    )


def plain(x: Any) -> bool:
    return isinstance(x, (int, float, str, tuple, type(None), type))
