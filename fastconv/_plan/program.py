"""Operator calls over static buffers: collected, laid out in one arena, bound and run by one call into C++.

A buffer is a dense tensor that lives from the first call that names it to the last; buffers that are never alive
together share memory. A slot holds what an operator returns, or what the caller puts in, for one run.

A call may run aside, on a GPU's second stream: from its place in the list to its join, the call before which the main
stream waits for it. What it names lives until then, and nothing on the way conflicts with what it reads and writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .kernels import Kernels

_ALIGNMENT = 256  # bytes: a GPU's widest access, and a multiple of a CPU's cache line
_ASIDE = 16  # calls on their way aside at a time: ResNet50 needs 0.7% more memory than with one, 7% more without an end
# Operators whose result may be their input's memory.
_MAY_BE_VIEWS = {
    "aten::contiguous", "aten::narrow", "aten::reshape", "aten::t", "aten::to.dtype", "aten::transpose.int",
}  # fmt: skip


@dataclass(eq=False)
class Buffer:
    """A tensor of the arena, channels_last where it is 4-d."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int = -1  # index of the first and the last call that names it
    last: int = -1
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(eq=False)
class Slot:
    index: int
    views: tuple[Buffer, ...] = ()  # buffers that the tensor may lie in: they live as long as it does


@dataclass
class Call:
    op: str
    overload: str
    arguments: list[Any]
    results: list[Slot | None] = field(default_factory=list)
    aside: bool = False

    def slots_read(self) -> list[Slot]:
        parts = [part for value in self.arguments for part in (value if isinstance(value, list) else (value,))]
        return [part for part in parts if isinstance(part, Slot)]

    def touched(self) -> tuple[set[Any], set[Any]]:
        """What the call reads and what it writes, by the schema: slots, buffers, and the memory of other tensors."""
        reads: set[Any] = set()
        writes: set[Any] = {r.index for r in self.results if r is not None}
        schema = torch._C._get_schema(self.op, self.overload)
        for declared, value in zip(schema.arguments, self.arguments, strict=True):
            info = declared.alias_info
            (writes if info is not None and info.is_write else reads).update(_memory(value))
        return reads, writes


def _memory(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [place for part in value for place in _memory(part)]
    if isinstance(value, Slot):
        return [value.index, *value.views]
    if isinstance(value, Tensor):
        return [("tensor", value.untyped_storage().data_ptr())]
    return [value] if isinstance(value, Buffer) else []


def lay_out(buffers: list[Buffer]) -> int:
    """Gives every buffer its offset, the largest first, each at the lowest place free while it lives; returns the size
    of the arena in bytes."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.nbytes):
        taken = sorted(
            (b.offset, b.offset + b.nbytes) for b in placed if b.first <= buffer.last and buffer.first <= b.last
        )
        at = 0
        for begin, end in taken:
            if at + buffer.nbytes <= begin:
                break
            at = max(at, -(-end // _ALIGNMENT) * _ALIGNMENT)
        buffer.offset = at
        placed.append(buffer)
    return max((b.offset + b.nbytes for b in placed), default=0)


class Builder:
    """Collects calls whose arguments are tensors, plain values, buffers and slots."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.kernels = kernels or Kernels(torch.device("cpu"))
        self.calls: list[Call] = []
        self.buffers: list[Buffer] = []
        self.slots = 0
        self.arena_bytes = 0
        self.joined: dict[int, int] = {}  # joins(), once the program is finished

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        self.buffers.append(Buffer(tuple(shape), dtype))
        return self.buffers[-1]

    def slot(self) -> Slot:
        self.slots += 1
        return Slot(self.slots - 1)

    def call(
        self, op: str, arguments: list[Any], results: list[Slot | None] | None = None, aside: bool = False
    ) -> None:
        """Appends a call of ``namespace::name`` or ``namespace::name.overload``; fastconv's own as the kernels say."""
        name, _, overload = self.kernels.operator(op).partition(".")
        for buffer in self._buffers(arguments):
            buffer.first = len(self.calls) if buffer.first < 0 else buffer.first
            buffer.last = len(self.calls)
        self.calls.append(Call(name, overload, arguments, results or [], aside))

    @staticmethod
    def _buffers(arguments: list[Any]) -> list[Buffer]:
        """The buffers among the arguments, and those that slots among them may lie in."""
        return [place for place in _memory(arguments) if isinstance(place, Buffer)]

    def returning(self, op: str, arguments: list[Any], aside: bool = False) -> Slot:
        """The same for an operator with one result, which gets a slot of its own."""
        result = self.slot()
        if op in _MAY_BE_VIEWS:
            result.views = tuple(self._buffers(arguments))
        self.call(op, arguments, [result], aside)
        return result

    def joins(self) -> dict[int, int]:
        """Call that runs aside -> the call before which it has to be done; their number: the end of the run."""
        found: dict[int, int] = {}
        on_way: dict[int, tuple[set[Any], set[Any]]] = {}
        for i, call in enumerate(self.calls):
            if not call.aside and not on_way:
                continue
            reads, writes = call.touched()
            # Calls aside are in order among themselves: who waits for one waits for those before it.
            waits = [j for j, (r, w) in on_way.items() if not call.aside and (writes & (r | w) or reads & w)]
            if call.aside and len(on_way) == _ASIDE:
                waits.append(next(iter(on_way)))
            for j in [j for j in on_way if waits and j <= max(waits)]:
                found[j] = i
                del on_way[j]
            if call.aside:
                on_way[i] = reads, writes
        return {**found, **dict.fromkeys(on_way, len(self.calls))}

    def last_uses(self, *kept: Slot) -> dict[int, list[int]]:
        """Call -> the slots that no later call reads, but for ``kept``: to be emptied behind it."""
        last: dict[int, int] = {}
        for i, call in enumerate(self.calls):
            last.update((slot.index, i) for slot in (*call.slots_read(), *call.results) if slot is not None)
        found: dict[int, list[int]] = {}
        for index, i in last.items():
            if all(index != slot.index for slot in kept):
                found.setdefault(i, []).append(index)
        return found

    def labels(self) -> list[str]:
        """A name for each call: its operator, and the sizes of the static tensors that it takes."""

        def size(value: Any) -> str:
            return "x".join(map(str, value.shape))

        return [
            " ".join([c.op, *(size(v) for v in c.arguments if isinstance(v, (Tensor, Buffer)) and len(v.shape) == 4)])
            for c in self.calls
        ]

    def finish(self) -> Any:
        """Lays out the buffers and binds the calls: a ``torch.classes.fastconv.Program``."""
        self.joined = self.joins()
        for i, join in self.joined.items():
            for buffer in self._buffers(self.calls[i].arguments):
                buffer.last = max(buffer.last, join)
        self.arena_bytes = lay_out([b for b in self.buffers if b.first >= 0])
        arena = torch.empty(self.arena_bytes + _ALIGNMENT, dtype=torch.uint8, device=self.kernels.device)
        start = -arena.data_ptr() % _ALIGNMENT
        tensors: dict[int, Tensor] = {}

        def tensor(buffer: Buffer) -> Tensor:
            if id(buffer) not in tensors:
                begin = start + buffer.offset
                flat = arena[begin : begin + buffer.nbytes].view(buffer.dtype)
                shape = buffer.shape
                if len(shape) == 4:
                    n, c, h, w = shape
                    made = flat.as_strided(shape, (h * w * c, 1, w * c, c))
                else:
                    made = flat.view(shape)
                tensors[id(buffer)] = made
            return tensors[id(buffer)]

        program = torch.classes.fastconv.Program(self.slots)
        for call in self.calls:
            arguments, inputs = [], []

            def bound(value: Any, i: int, element: int, inputs: list[int] = inputs) -> Any:
                if isinstance(value, Slot):
                    inputs += (i, element, value.index)
                    return None if element < 0 else torch.empty(0)
                return tensor(value) if isinstance(value, Buffer) else value

            for i, value in enumerate(call.arguments):
                if isinstance(value, list) and not value:
                    arguments.append(None)  # an empty list has no type here: the program takes it from the schema
                elif isinstance(value, list):
                    arguments.append([bound(part, i, j) for j, part in enumerate(value)])
                else:
                    arguments.append(bound(value, i, -1))
            results = [-1 if r is None else r.index for r in call.results]
            program.call(call.op, call.overload, arguments, inputs, results)
        for i, join in self.joined.items():
            program.aside(i, join, arena.device)
        return program
