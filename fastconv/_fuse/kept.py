"""What a training step keeps for its backward, group by group, fused and stock: a forward pass of copies of the model.

Every storage that autograd holds after the forward counts once, parameters and buffers apart, and belongs to the group
that made it: a group's own result is its, though the next convolution keeps it as its input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import runtime
from .module import Restorer

SHARED = "(shared)"  # an activation that several groups call: its result belongs to the group of its input


@dataclass
class Kept:
    """Bytes in all and by group (its first member's name), and the backends that ran the groups."""

    total: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)


def measure(model: nn.Module, inputs: Sequence[Any], groups: Sequence[tuple[str, ...]]) -> tuple[Kept, Kept]:
    """(fused, stock) of a step in training mode on ``inputs``. groups: the members' names of each.

    The model, its running statistics and the random state stay as they are. Takes the memory of a copy of the model
    and of the results of all its layers.
    """
    twin = copy.deepcopy(model).train()
    result = []
    for run in (twin, Restorer(inplace=True)):
        stock = isinstance(run, Restorer)
        if stock:
            twin = run.remake(twin)
        owner: dict[int, str] = {}
        for names in groups:
            for key in {id(twin.get_submodule(m)) for m in names}:
                owner[key] = SHARED if key in owner else names[0]
        devices = sorted({p.device.index for p in twin.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices), torch.enable_grad():
            result.append(_step(twin, inputs, owner, stock))
    return result[0], result[1]


def _step(model: nn.Module, inputs: Sequence[Any], owner: Mapping[int, str], stock: bool) -> Kept:
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}
    label: dict[int, str] = {}
    backends: dict[str, str] = {}
    alive: list[Any] = []  # what has a label, so that nothing else comes to lie at its address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage
        return tensor

    def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        name = owner.get(id(module))
        if name == SHARED:
            name = label.get(inputs[0].untyped_storage().data_ptr())
        if name is None:
            return
        results = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
        function = results[0].grad_fn
        backends.setdefault(name, getattr(function, "backend", "aten"))
        # The last to write to a storage is its owner; a group's inputs have theirs.
        if hasattr(function, "backend"):
            foreign = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
            saved = [t for t in function.saved_tensors if t is not None]
            results += [t for t in saved if t.untyped_storage().data_ptr() not in foreign]
        for tensor in results:
            label[tensor.untyped_storage().data_ptr()] = name
            alive.append(tensor.untyped_storage())

    # Stock layers are seen by hooks; a fused group that finds a hook would run layer by layer.
    handles = [m.register_forward_hook(seen) for m in model.modules() if id(m) in owner] if stock else []
    runtime.OBSERVERS.append(seen)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(*inputs)
    finally:
        runtime.OBSERVERS.remove(seen)
        for handle in handles:
            handle.remove()
    found = Kept(sum(s.nbytes() for s in kept.values()), dict.fromkeys(set(owner.values()), 0), backends)
    for pointer, storage in kept.items():
        if pointer in label:
            found.groups[label[pointer]] += storage.nbytes()
    del out
    return found
