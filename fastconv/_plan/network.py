"""A network as a plan sees it: values with known shapes, nodes in order, and what they were read from."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import _ext
from .._fuse.module import FusedMixin
from .._fuse.runtime import HOOKS


class Refused(Exception):
    """What keeps a model, or a call, out of a plan; str() is the reason."""


@dataclass(eq=False)
class Value:
    """A tensor of the network: its shape, how many nodes read it, and whether the model asks for another layout of it
    somewhere."""

    shape: tuple[int, ...]
    readers: int = 0
    relaid: bool = False


@dataclass(eq=False)
class Node:
    """One step: ``op`` is conv, norm, max_pool, avg_pool, adaptive_avg_pool, linear, act, add, mul, cat, narrow,
    reshape, transpose, dropout or drop_path; the rest of the fields are what that step needs. stock: the model calls
    PyTorch's own layer or function there, outside of a fused group."""

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


class Watch:
    """Whether a network's state, and the memory of some tensors, stay as they are now; asked before every run."""

    def __init__(self, network: Network, tensors: Sequence[Tensor] = ()) -> None:
        self.network, self.tensors = network, list(tensors)
        self.pointers = [t.data_ptr() for t in self.tensors]
        self._take()

    def _take(self) -> None:
        kept = self.kept = _Objects(self.network)  # the guard borrows them
        self.guard = _ext.MODULE.Guard(kept.entries, kept.sizes, kept.types, self.tensors)

    def changed(self) -> bool:
        if self.guard.holds():
            return False
        # Not the same objects, but maybe equal ones.
        moved = [t.data_ptr() for t in self.tensors] != self.pointers
        if moved or not _Objects(self.network).same_as(self.kept):
            return True
        self._take()
        return False


class _Objects:
    """What must stay as it was for a network's nodes to stay true, as dicts, their keys and values: lists for the
    extension's Guard."""

    def __init__(self, network: Network) -> None:
        self.entries: list[Any] = []
        self.sizes: list[Any] = []
        self.types: list[Any] = []
        for m in network.modules:
            self.module(m)
        for module, name in network.reads:
            self.entry(module.__dict__, name)

    def same_as(self, other: _Objects) -> bool:
        mine, theirs = (o.entries + o.sizes + o.types for o in (self, other))
        return same_state(mine, theirs)

    def entry(self, holder: dict[str, Any], name: str) -> None:
        self.entries += (holder, name, holder.get(name, _ext.MODULE.Guard))

    def module(self, m: nn.Module) -> None:
        d = m.__dict__
        self.types += (m, type(m))
        for name in ("training", "forward"):
            self.entry(d, name)
        for name in HOOKS:
            self.entry(d, name)
            self.sizes += (d[name], len(d[name]))
        if isinstance(m, FusedMixin):
            self.entry(d, "_fastconv_plan")
            return
        for name in ("_parameters", "_buffers", "_modules"):
            self.entry(d, name)
            self.sizes += (d[name], len(d[name]))
            for key in d[name]:
                self.entry(d[name], key)
        for name in READ.get(type(m), ()):
            self.entry(d, name)


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
