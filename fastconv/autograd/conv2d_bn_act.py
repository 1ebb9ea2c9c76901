"""y = act(batch_norm(z) + r), z = conv2d(x, w) + b.

The backward of batch norm and activation gives dz (see batch_norm_act.py), then dx and dw are the convolution's and
db = sum_npq dz, which is zero up to rounding in training: the batch mean removes b again.
"""

from __future__ import annotations

import torch

from ..ops import impl
from .batch_norm_act import norm_backward, save_norm
from .common import bias_gradient, conv_backward, differentiable_once


class Conv2dBnActFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, stride,
        padding, dilation, groups, training, momentum, eps, activation, backend,
    ):  # fmt: skip
        ctx.training, ctx.activation, ctx.backend = training, activation, backend
        ctx.geometry = (stride, padding, dilation, groups)
        output, conv_output, mean, invstd = impl(backend, "conv2d_bn_act")(
            input, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked,
            *ctx.geometry, training, momentum, eps, activation, True,
        )  # fmt: skip
        save_norm(ctx, conv_output, output, residual, bn_weight, bn_bias, mean, invstd, input, weight)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx, saved_tensors, grad_output):
        *saved, input, weight = saved_tensors
        need = ctx.needs_input_grad
        need_conv = need[0] or need[1] or need[2]
        grad_conv, grad_residual, grad_bn_weight, grad_bn_bias = norm_backward(
            ctx, grad_output, saved, need_conv, need[3], need[4], need[5]
        )
        grad_input = grad_weight = grad_bias = None
        if need_conv:
            grad_input, grad_weight = conv_backward(ctx, grad_conv, input, weight)
        if need[2]:
            grad_bias = bias_gradient(ctx, grad_conv)
        return grad_input, grad_weight, grad_bias, grad_residual, grad_bn_weight, grad_bn_bias, *[None] * 12
