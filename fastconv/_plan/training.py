"""Training plans: forward, loss, backward and the optimizer's update as one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF
from .. import nn as fnn
from .backward import SCALAR_TYPES
from .conv_backward import TrainingLowering
from .flatten import Flattener
from .forward import nhwc
from .kernels import Kernels
from .network import Refused, Watch
from .optim import PlannedOptimizer

_REDUCTION = {"mean": 1, "sum": 2}


def loss_arguments(loss_fn: Callable[..., Any]) -> list[Any]:
    """weight, reduction, ignore_index and label_smoothing of a cross-entropy; Refused for another loss."""
    if loss_fn in (F.cross_entropy, FF.cross_entropy):
        return [None, 1, -100, 0.0]
    if type(loss_fn) in (nn.CrossEntropyLoss, fnn.CrossEntropyLoss) and not loss_fn._forward_hooks:
        if loss_fn.reduction not in _REDUCTION:
            raise Refused(f"the loss has reduction={loss_fn.reduction!r}")
        if loss_fn.weight is not None and loss_fn.weight.requires_grad:
            raise Refused("the loss trains its class weights")
        smoothing = float(loss_fn.label_smoothing)
        return [loss_fn.weight, _REDUCTION[loss_fn.reduction], loss_fn.ignore_index, smoothing]
    raise Refused(f"the loss is {getattr(loss_fn, '__name__', type(loss_fn).__name__)}, a plan has cross-entropy")


class TrainingPlan:
    """One input shape's program for a model, a loss and an optimizer.

    fused: the optimizer's update is part of the program; else gradients land in p.grad and the optimizer steps.
    """

    def __init__(
        self, model: nn.Module, loss: list[Any], optimizer: torch.optim.Optimizer, dtype: torch.dtype, fused: bool,
        x: Tensor, y: Tensor, kernels: Kernels,
    ) -> None:  # fmt: skip
        network = Flattener(model, True).network(tuple(x.shape))
        self.network, self.torch_optimizer = network, optimizer
        self.parameters = list(model.parameters())
        if any(hooked(p) for p in self.parameters):
            raise Refused("a parameter has gradient hooks")
        self.fused = PlannedOptimizer(optimizer, self.parameters, kernels.device) if fused else None
        if self.fused is not None:
            self.fused.check_steps()
        lowering = TrainingLowering(network, dtype, kernels, self.fused)
        build = lowering.build
        self.entry, self.target = build.slot(), build.slot()
        entry: Any = self.entry
        if x.dtype is not dtype:
            entry = build.returning("aten::to.dtype", [entry, SCALAR_TYPES[dtype], False, False, None])
        lowering.at[network.input] = nhwc(build, entry) if x.dim() == 4 else entry
        self.loss = lowering.program(self.target, loss)
        self.program = build.finish()
        self.arena_bytes, self.labels, self.joins = build.arena_bytes, build.labels(), build.joined
        self.halves = list(lowering.halves.values())
        self.grads = list(lowering.grads.values())
        self.skips = lowering.skips
        self.watch = Watch(network)
        self.pointers = self._pointers()
        self.versions: list[int] = []

    def _pointers(self) -> list[tuple[int, bool, bool]]:
        return [(p.data_ptr(), p.requires_grad, hooked(p)) for p in self.parameters]

    def outdated(self) -> bool:
        """Whether the model or the optimizer is no longer what the program was made for."""
        return (
            self.watch.changed()
            or self._pointers() != self.pointers
            or (self.fused is not None and self.fused.outdated())
        )

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        """One step. It is three parts, of which a CUDA graph holds the second."""
        self.before()
        loss = self.launch(x, y)
        self.after()
        return loss

    def before(self) -> None:
        for p in self.parameters:
            p.grad = None
        if self.halves and self.versions != [p._version for p, _ in self.halves]:
            for p, half in self.halves:  # at the first step, and after someone else's change to the weights
                half.copy_(p.detach())
        if self.fused is not None:
            self.fused.prepare()

    def launch(self, x: Tensor, y: Tensor) -> Tensor:
        self.program.put(self.entry.index, x)
        self.program.put(self.target.index, y)
        self.program.run()
        return self.program.get(self.loss.index)

    def after(self, replayed: bool = False) -> None:
        """replayed: the kernels ran without the operators that count the tensors' versions."""
        if replayed and self.fused is not None:
            torch.autograd.graph.increment_version(self.fused.written)
        if self.fused is not None:
            self.fused.finished()
        else:
            for p, grad in self.grads:
                p.grad = grad
            self.torch_optimizer.step()
        self.versions = [p._version for p, _ in self.halves] if self.fused is not None else []


def hooked(p: Tensor) -> bool:
    """Whether someone wants to see, or change, the parameter's gradient before the optimizer does."""
    return bool(p._backward_hooks) or bool(p._post_accumulate_grad_hooks)
