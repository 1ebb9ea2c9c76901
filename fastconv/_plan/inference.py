"""Inference plans: batch norm in the convolutions' epilogues, weights packed ahead, activations in one arena."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._graphs import capture
from .flatten import Flattener
from .forward import PIXEL, Lowering, as_filter, geometry, is_pixelwise, nhwc, nhwc_weight
from .kernels import Kernels
from .network import Node

_PANEL = 32  # outputs that the convolution engine multiplies side by side


def is_narrow(layer: nn.Linear) -> bool:
    """Whether a linear layer with few outputs is lowered as a convolution with some more, of zeros: ResNet50's for 10
    classes and one image takes ATen 58 us in bf16 and 19 in fp32, on 2 cores of an AMD EPYC."""
    return layer.out_features < _PANEL and layer.in_features >= 256 and layer.weight.is_contiguous()


class InferenceLowering(Lowering):
    """Weights are read once, here: later changes to them are not seen."""

    def __init__(self, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__(dtype, kernels)
        self.weights: dict[int, Tensor] = {}

    def weight(self, parameter: Tensor) -> Tensor:
        if id(parameter) not in self.weights:
            made = parameter.detach().to(self.dtype)
            self.weights[id(parameter)] = nhwc_weight(made) if made.dim() == 4 else made.contiguous()
        return self.weights[id(parameter)]

    def _conv(self, node: Node, x: Any) -> Any:
        weight = self.weight(node.module.weight)
        bias = node.module.bias
        mean = scale = None
        shift = None if bias is None else bias.detach().float()
        if node.bn is not None:
            # act((conv + b - mean) * weight / sqrt(var + eps) + bias): the kernel's (conv - mean) * scale + shift
            mean, scale, offset = folded(node.bn)
            mean, shift = (mean if shift is None else mean - shift), offset
        packed = None
        if self.kernels.gpu:
            mean, shift = None, affine(mean, scale, shift)
        else:
            form = {"dtype": self.dtype, "device": "cpu", "memory_format": torch.channels_last}
            example = torch.empty(node.inputs[0].shape, **form)
            packed = torch.ops.fastconv_plan.conv2d_pack(example, weight, geometry(node))
        vectors = (mean, scale, shift)
        out = self.own(node.output)
        self.build.call(
            "fastconv_plan::conv2d",
            [x, weight, packed, *vectors, self.residual(node), geometry(node), node.act, None, out],
        )
        return out

    def _norm(self, node: Node, x: Any) -> Any:
        bn, build = node.bn, self.build
        vectors = [None if v is None else v.detach().float() for v in (bn.weight, bn.bias)]
        running = [v.detach().float().clone() for v in (bn.running_mean, bn.running_var)]
        out = build.slot()
        build.call(
            "fastconv::batch_norm_act",
            [x, self.residual(node), *vectors, *running, None, False, 0.0, bn.eps, node.act], [out, None, None],
        )  # fmt: skip
        return out

    def _linear(self, node: Node, x: Any) -> Any:
        weight, bias = node.module.weight, node.module.bias
        if not self.kernels.gpu and (is_pixelwise(node.module) or is_narrow(node.module)):
            filters = as_filter(self.weight(weight))
            filters = F.pad(filters, (0, 0, 0, 0, 0, 0, 0, max(_PANEL - len(filters), 0)))
            example = torch.empty((*node.inputs[0].shape, 1, 1), dtype=self.dtype, device="cpu")
            packed = torch.ops.fastconv_plan.conv2d_pack(example, filters, PIXEL)
            return self.pixelwise(node, x, filters, packed)[1]
        return self.build.returning(
            "aten::linear", [x, self.weight(weight), None if bias is None else self.weight(bias)]
        )

    def _max_pool(self, node: Node, x: Any) -> Any:
        return self.max_pool(node, x, None)


def folded(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor | None]:
    """(mean, scale, shift) of a batch norm in evaluation mode, fp32; the square root in fp64."""
    scale = (bn.running_var.detach().double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = None if bn.bias is None else bn.bias.detach().float().clone()
    return bn.running_mean.detach().float().clone(), scale.float(), shift


def affine(mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The shift of x * scale + shift that equals (x - mean) * scale + shift, computed in fp64."""
    if mean is None:
        return shift
    moved = -mean.double() * scale.double()
    return (moved if shift is None else moved + shift.double()).float()


class InferencePlan:
    """One input shape's program."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, kernels: Kernels) -> None:
        network = Flattener(model, False).network(shape)
        lowering = InferenceLowering(dtype, kernels)
        build = lowering.build
        self.entry = build.slot()
        x: Any = self.entry
        lowering.at[network.input] = nhwc(build, x) if len(shape) == 4 else x
        for node in network.nodes:
            lowering.lower(node)
        # A copy: what the caller keeps must not change at the next run.
        out = build.returning("aten::clone", [lowering.at[network.output], None])
        self.exit, self.labels = out, build.labels()
        self.program = build.finish()
        self.arena_bytes = build.arena_bytes

    def run(self, x: Tensor) -> Tensor:
        self.program.put(self.entry.index, x)
        self.program.run()
        return self.program.get(self.exit.index)


class GraphedPlan:
    """A plan in a CUDA graph. Its buffers belong to one replay at a time: a call waits for those from other streams."""

    def __init__(self, plan: InferencePlan, x: Tensor) -> None:
        with torch.inference_mode(False):  # else calls outside that mode could not write to it
            self.x = x.clone()
        self.plan, self.graph, self.pool = plan, torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream, current = torch.cuda.Stream(x.device), torch.cuda.current_stream(x.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            plan.run(self.x)  # library handles are made outside the capture
        current.wait_stream(stream)
        with capture(self.graph, self.pool, stream):
            self.out = plan.run(self.x)
        self.done = torch.cuda.Event()
        self.done.record(current)

    def run(self, x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            return self.plan.run(x)
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self.done)
        self.x.copy_(x, non_blocking=True)
        self.graph.replay()
        out = self.out.clone()
        self.done.record(stream)
        return out
