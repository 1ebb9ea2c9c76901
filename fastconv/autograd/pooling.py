"""Pooling: the gradient of an output element goes to its window's arg max (max), or in equal parts to its window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..ops import impl
from .common import differentiable_once


def keep_input(ctx, input: Tensor, backend: str) -> None:
    """What the backward needs of the input: its size and its layout, which grad_output need not share."""
    ctx.backend, ctx.input_size = backend, input.shape[2:]
    ctx.channels_last = input.is_contiguous(memory_format=torch.channels_last)
    if ctx.channels_last == input.is_contiguous():  # neither, or both
        ctx.channels_last = suggest_memory_format(input) is torch.channels_last


class MaxPool2dFunction(torch.autograd.Function):
    """Keeps one byte per output element: the offset r * S + s of the arg max inside its window."""

    @staticmethod
    def forward(ctx, input, kernel_size, stride, padding, dilation, ceil_mode, backend):
        keep_input(ctx, input, backend)
        ctx.window = (kernel_size, stride, padding, dilation)
        output, offsets = impl(backend, "max_pool2d")(input, *ctx.window, ceil_mode, True)
        ctx.save_for_backward(offsets)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        (offsets,) = saved
        grad = impl(ctx.backend, "max_pool2d_backward")(
            grad_output, offsets, ctx.input_size, *ctx.window, ctx.channels_last
        )
        return grad, *[None] * 6


class AvgPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, backend):
        keep_input(ctx, input, backend)
        ctx.window = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return impl(backend, "avg_pool2d")(input, *ctx.window)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        grad = impl(ctx.backend, "avg_pool2d_backward")(grad_output, ctx.input_size, *ctx.window, ctx.channels_last)
        return grad, *[None] * 7


class AdaptiveAvgPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, output_size, backend):
        keep_input(ctx, input, backend)
        return impl(backend, "adaptive_avg_pool2d")(input, output_size)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        grad = impl(ctx.backend, "adaptive_avg_pool2d_backward")(grad_output, ctx.input_size, ctx.channels_last)
        return grad, None, None
