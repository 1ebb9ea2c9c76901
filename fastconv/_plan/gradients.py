"""A fused model's training forward and its backward as two parts of one program, behind one autograd Function: the
operators that the groups' own Functions call, without the Python between them.

The operators are those of the eager path, on the modules' own tensors, in the order in which autograd would run them:
results, running statistics and gradients are the same bits. What the backward reads is kept by autograd
(save_for_backward), so a second forward before the backward, retain_graph, and the error for a weight that was changed
in between are what they are for any Function. The optimizer and p.grad know nothing of it.
"""

from __future__ import annotations

import math
from operator import attrgetter

import torch
from torch import Tensor, nn

from ..autograd.common import differentiable_once
from .forward import nhwc
from .gradient_lowering import GradientLowering, Memory
from .live import LiveFlattener
from .network import Refused, Watch

# Bytes of a network's tensors. What is kept for the backward is held until its end; long steps have little Python.
_MOST_KEPT = 256 << 20
_requires_grad = attrgetter("requires_grad")


class GradientPlan:
    """One input shape's program for a model in training."""

    def __init__(self, model: nn.Module, x: Tensor, memory: Memory) -> None:
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
            raise Refused("a parameter has gradient hooks, which may rest on its gradient's coming alone")
        network = LiveFlattener(model, True).network(tuple(x.shape))
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        tensors = sum(math.prod(n.output.shape) * (1 if n.bn is None else 2) for n in network.nodes)
        if tensors * dtype.itemsize > _MOST_KEPT:
            raise Refused("the tensors of a step are large, and the eager path frees them one by one")
        lowering = GradientLowering(network, dtype, memory)
        build = lowering.build
        self.entry, self.grad = build.slot(), build.slot()
        lowering.at[network.input] = nhwc(build, self.entry)
        lowering.split(self.grad)
        if not lowering.grads:
            raise Refused("the model trains nothing")
        self.exit = lowering.at[network.output]
        self.program, self.slots, self.cut = build.finish(), build.slots, lowering.cut
        results = [slot for _, slot in lowering.grads.values()]
        for call, slots in build.last_uses(self.exit, *results).items():
            self.program.release(call, slots)
        self.kept = lowering.kept()
        self.read = lowering.parameters_read()
        self.trained = [p for p, _ in lowering.grads.values()]
        self.results = [slot.index for slot in results]
        self.reused = [slot.index for _, slot in lowering.reused]
        self.gradients = memory.reused([p for p, _ in lowering.reused])
        self.parameters = list(model.parameters())
        self.flags = list(map(_requires_grad, self.parameters))
        self.watch = Watch(network, lowering.tensors)
        self.calls = 0
        self.lock = memory.lock  # slots and memory belong to one call at a time

    def outdated(self) -> bool:
        return self.watch.changed() or list(map(_requires_grad, self.parameters)) != self.flags

    def run(self, x: Tensor) -> Tensor:
        return FusedModelFunction.apply(self, x, *self.trained)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The result, and what the backward reads of the forward."""
        program = self.program
        try:
            program.put(self.entry.index, x)
            program.run_part(0, self.cut)
            output, *kept = program.get_all([self.exit.index, *self.kept])
        finally:
            program.clear()
        return output, kept

    def backward(self, kept: list[Tensor], grad: Tensor) -> list[Tensor]:
        """The gradients of ``trained``."""
        program = self.program
        with self.lock:
            try:
                program.put_all([*self.kept, self.grad.index], [*kept, grad])
                program.put_all(self.reused, self.gradients.take())
                program.run_part(self.cut, program.size())
                return program.get_all(self.results)
            finally:
                program.clear()


class FusedModelFunction(torch.autograd.Function):
    """A GradientPlan's forward and backward. As every Function of fastconv, differentiable once."""

    @staticmethod
    def forward(ctx, plan, x, *trained):
        ctx.plan = plan
        output, kept = plan.forward(x)
        ctx.save_for_backward(*plan.read, *kept)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        plan = ctx.plan
        return None, None, *plan.backward(saved[len(plan.read) :], grad_output)
