"""What inference and training plans lower alike: the calls that compute one node's output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Kernels
from .network import Node, Refused, Value
from .program import Buffer, Builder, Slot

ATEN_ACTIVATIONS: dict[str, tuple[str, list[Any]]] = {
    "relu": ("aten::relu", []),
    "relu6": ("aten::hardtanh", [0.0, 6.0]),
    "leaky_relu": ("aten::leaky_relu", [0.01]),
    "sigmoid": ("aten::sigmoid", []),
    "tanh": ("aten::tanh", []),
    "silu": ("aten::silu", []),
    "gelu": ("aten::gelu", ["none"]),
    "hardswish": ("aten::hardswish", []),
    "hardsigmoid": ("aten::hardsigmoid", []),
}
_CHANNELS_LAST = 2  # torch.channels_last as operators take it


def geometry(node: Node) -> list[int]:
    conv = node.module
    return [*conv.stride, *conv.padding, *conv.dilation, conv.groups]


def nhwc(build: Builder, value: Any) -> Slot:
    """The tensor in channels_last, itself where it is so."""
    return build.returning("aten::contiguous", [value, _CHANNELS_LAST])


PIXEL = [1, 1, 0, 0, 1, 1, 1]  # the geometry of a linear layer as a convolution
_LEAST_LINEAR = 1 << 16  # weights; below, a call of ATen costs less than the views around a convolution


def is_pixelwise(layer: nn.Linear) -> bool:
    """Whether a linear layer is lowered as a 1x1 convolution on one pixel: weights packed, updated as they come."""
    return layer.weight.numel() >= _LEAST_LINEAR and min(layer.weight.shape) >= 32 and layer.weight.is_contiguous()


def as_filter(matrix: Tensor) -> Tensor:
    """[out, in] as [out, in, 1, 1]; a filter as it is."""
    return matrix.view(*matrix.shape, 1, 1) if matrix.dim() == 2 else matrix


def as_pixel(build: Builder, x: Any, shape: tuple[int, ...]) -> Slot:
    """[n, features] as [n, features, 1, 1]."""
    return nhwc(build, build.returning("aten::reshape", [x, [*shape, 1, 1]]))


def nhwc_weight(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


class Lowering:
    """The calls of a network's nodes. ``at`` has the place of every value: a buffer or a slot."""

    def __init__(self, dtype: torch.dtype, kernels: Kernels) -> None:
        self.dtype, self.kernels = dtype, kernels
        self.build = Builder(kernels)
        self.at: dict[Value, Any] = {}

    def lower(self, node: Node) -> None:
        method = getattr(self, "_" + node.op, None)
        if method is None:
            raise Refused(f"no step for {node.op} in this kind of plan")
        limit = self.kernels.limit(node)
        if limit:
            raise Refused(limit)
        self.at[node.output] = method(node, *(self.at[v] for v in node.inputs))

    def residual(self, node: Node) -> Any:
        return None if node.residual is None else self.at[node.residual]

    def library(self, node: Node) -> str:
        """Whose pools: those that PyTorch has too take the same arguments there."""
        return "fastconv"

    def own(self, value: Value) -> Buffer:
        return self.build.buffer(value.shape, self.dtype)

    def pixelwise(self, node: Node, x: Any, filters: Tensor, packed: Tensor | None) -> tuple[Slot, Slot]:
        """Emits a linear layer as a convolution; its input as pixels, and its output. Filters beyond the layer's own
        outputs, if there are any, are left out of it."""
        build, bias = self.build, node.module.bias
        (batch, outputs), rows = node.output.shape, filters.shape[0]
        pixels, out = as_pixel(build, x, node.inputs[0].shape), build.buffer((batch, rows, 1, 1), self.dtype)
        shift = None if bias is None else bias.detach().float()  # the parameter's own memory, which a step changes
        if shift is not None and rows > outputs:
            shift = F.pad(shift, (0, rows - outputs))
        build.call(
            "fastconv_plan::conv2d", [pixels, filters, packed, None, None, shift, None, PIXEL, "identity", None, out]
        )
        own = out if rows == outputs else build.returning("aten::narrow", [out, 1, 0, outputs])
        return pixels, build.returning("aten::reshape", [own, list(node.output.shape)])

    def _act(self, node: Node, x: Any) -> Any:
        op, options = ATEN_ACTIVATIONS[node.act]
        return self.build.returning(op, [x, *options])

    def _add(self, node: Node, a: Any, b: Any) -> Any:
        return self.build.returning("aten::add.Tensor", [a, b, 1])

    def _mul(self, node: Node, a: Any, b: Any) -> Any:
        return self.build.returning("aten::mul.Tensor", [a, b])

    def _cat(self, node: Node, *values: Any) -> Any:
        return nhwc(self.build, self.build.returning("aten::cat", [list(values), 1]))

    def _reshape(self, node: Node, x: Any) -> Any:
        out = self.build.returning("aten::reshape", [x, list(node.output.shape)])
        return nhwc(self.build, out) if len(node.output.shape) == 4 else out

    def _transpose(self, node: Node, x: Any) -> Any:
        return self.build.returning("aten::transpose.int", [x, *node.options["dims"]])

    def _narrow(self, node: Node, x: Any) -> Any:
        return nhwc(self.build, self.build.returning("aten::narrow", [x, 1, *node.options["part"]]))

    def _avg_pool(self, node: Node, x: Any) -> Any:
        o = node.options
        return self.build.returning(
            f"{self.library(node)}::avg_pool2d",
            [x, list(o["kernel_size"]), list(o["stride"]), list(o["padding"]), o["ceil_mode"], o["count_include_pad"],
             o["divisor_override"]],
        )  # fmt: skip

    def _adaptive_avg_pool(self, node: Node, x: Any) -> Any:
        op = f"{self.library(node)}::adaptive_avg_pool2d"
        return self.build.returning(op, [x, list(node.options["output_size"])])

    def max_pool(self, node: Node, x: Any, offsets: Slot | None) -> Slot:
        o, out = node.options, self.build.slot()
        self.build.call(
            "fastconv::max_pool2d",
            [x, list(o["kernel_size"]), list(o["stride"]), list(o["padding"]), list(o["dilation"]), o["ceil_mode"],
             offsets is not None],
            [out, offsets],
        )  # fmt: skip
        return out
