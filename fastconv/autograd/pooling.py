"""Pooling: the gradient of an output element goes to its window's arg max (max), or in equal parts to its window."""

from __future__ import annotations

import torch

from ..ops import impl
from .common import differentiable_once


class MaxPool2dFunction(torch.autograd.Function):
    """Keeps one byte per output element: the offset r * S + s of the arg max inside its window."""

    @staticmethod
    def forward(ctx, input, kernel_size, stride, padding, dilation, ceil_mode, backend):
        ctx.backend, ctx.input_size = backend, input.shape[2:]
        ctx.window = (kernel_size, stride, padding, dilation)
        output, offsets = impl(backend, "max_pool2d")(input, *ctx.window, ceil_mode, True)
        ctx.save_for_backward(offsets)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        (offsets,) = saved
        grad = impl(ctx.backend, "max_pool2d_backward")(grad_output, offsets, ctx.input_size, *ctx.window)
        return grad, *[None] * 6


class AvgPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, backend):
        ctx.backend, ctx.input_size = backend, input.shape[2:]
        ctx.window = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return impl(backend, "avg_pool2d")(input, *ctx.window)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        grad = impl(ctx.backend, "avg_pool2d_backward")(grad_output, ctx.input_size, *ctx.window)
        return grad, *[None] * 7


class AdaptiveAvgPool2dFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, output_size, backend):
        ctx.backend, ctx.input_size = backend, input.shape[2:]
        return impl(backend, "adaptive_avg_pool2d")(input, output_size)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        grad = impl(ctx.backend, "adaptive_avg_pool2d_backward")(grad_output, ctx.input_size)
        return grad, None, None
