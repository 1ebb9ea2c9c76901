"""A fused model's evaluation without gradients as a program: the operators that its groups call, without the Python
between them.

The weights are read where they lie, at every call, and the operators are those of the eager path, so results are the
same bits and what is changed in place takes effect at once; what else the program rests on (modules, modes, hooks,
which tensors there are and where) is compared at every call. Anything unusual about a call runs eagerly.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Lowering, nhwc
from .kernels import Kernels
from .live import LiveFlattener, LiveTensors, settings
from .network import Node, Refused, Value, Watch
from .program import Slot


class EvaluationLowering(LiveTensors, Lowering):
    """The raw operators that fastconv.functional calls, on the modules' own tensors."""

    def __init__(self, dtype: torch.dtype, wide: Value | None) -> None:
        super().__init__(dtype, Kernels(torch.device("cpu")))
        self.wide = wide

    def norm(self, bn: nn.BatchNorm2d) -> list[Any]:
        """weight, bias and the running statistics; the count of batches, which evaluation leaves alone."""
        return [self.live(t, torch.float32) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)] + [None]

    def _conv(self, node: Node, x: Any) -> Any:
        conv, bn, out = node.module, node.bn, self.build.slot()
        where = settings(node)
        x, bias = self.multiplied(node, x), self.half(conv.bias)
        if node.stock:
            return self.build.returning("aten::conv2d", [x, self.half(conv.weight), bias, *where])
        given = [x, self.live(conv.weight), bias, self.residual(node)]
        if bn is None:
            self.build.call("fastconv::conv2d_bias_act", [*given, *where, node.act, False], [out, None])
        else:
            momentum = 0.0 if bn.momentum is None else bn.momentum
            self.build.call(
                "fastconv::conv2d_bn_act",
                [*given, *self.norm(bn), *where, False, momentum, bn.eps, node.act, False], [out, None, None, None],
            )  # fmt: skip
        return out

    def _norm(self, node: Node, x: Any) -> Any:
        bn, out = node.bn, self.build.slot()
        momentum = 0.0 if bn.momentum is None else bn.momentum
        if node.stock:
            cudnn = torch.backends.cudnn.enabled
            return self.build.returning("aten::batch_norm", [x, *self.norm(bn)[:4], False, momentum, bn.eps, cudnn])
        self.build.call(
            "fastconv::batch_norm_act",
            [x, self.residual(node), *self.norm(bn), False, momentum, bn.eps, node.act], [out, None, None],
        )  # fmt: skip
        return out

    def _linear(self, node: Node, x: Any) -> Any:
        layer = node.module
        return self.build.returning("aten::linear", [x, self.half(layer.weight), self.half(layer.bias)])

    def library(self, node: Node) -> str:
        return "aten" if node.stock else super().library(node)

    def _max_pool(self, node: Node, x: Any) -> Any:
        o = node.options
        if node.stock:
            window = [list(o[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
            return self.build.returning("aten::max_pool2d", [x, *window, o["ceil_mode"]])
        return self.max_pool(node, x, None)

    def _adaptive_avg_pool(self, node: Node, x: Any) -> Any:
        if node.options.get("mean"):  # x.mean((2, 3)) in the model: the same operator, for the same bits
            return self.build.returning("aten::mean.dim", [x, [2, 3], True, None])
        return super()._adaptive_avg_pool(node, x)


class EvaluationPlan:
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        network = LiveFlattener(model, False).network(tuple(x.shape))
        low = torch.is_autocast_enabled("cpu")
        lowering = EvaluationLowering(torch.bfloat16 if low else x.dtype, network.input if low else None)
        build = lowering.build
        self.entry = build.slot()
        lowering.at[network.input] = nhwc(build, self.entry)
        for node in network.nodes:
            lowering.lower(node)
        self.exit = lowering.at[network.output]
        if not isinstance(self.exit, Slot) or self.exit is self.entry:
            raise Refused("the model computes nothing")
        self.program, self.slots = build.finish(), build.slots
        for call, slots in build.last_uses(self.exit).items():
            self.program.release(call, slots)
        self.watch = Watch(network, lowering.tensors)
        self.calls = 0
        self.lock = threading.Lock()  # the slots belong to one call at a time

    def outdated(self) -> bool:
        return self.watch.changed()

    def run(self, x: Tensor) -> Tensor:
        self.program.put(self.entry.index, x)
        self.program.run()
        return self.program.take(self.exit.index)
