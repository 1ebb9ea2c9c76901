"""y = act(batch_norm(z) + r), z = conv2d(x, w) + b.

The backward of batch norm and activation gives dz (see batch_norm_act.py), then dx and dw are the convolution's and
db = sum_npq dz, which is zero up to rounding in training: the batch mean removes b again.

recompute: y is not kept; see deferred.py.
"""

from __future__ import annotations

import torch

from ..ops import impl
from . import deferred
from .batch_norm_act import norm_backward, save_norm, slope_from_input
from .common import bias_gradient, conv_backward, differentiable_once, saves_output


class Conv2dBnActFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, stride,
        padding, dilation, groups, training, momentum, eps, activation, recompute, backend,
    ):  # fmt: skip
        ctx.training, ctx.activation, ctx.backend = training, activation, backend
        ctx.geometry = (stride, padding, dilation, groups)
        output, conv_output, mean, invstd = impl(backend, "conv2d_bn_act")(
            input, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked,
            *ctx.geometry, training, momentum, eps, activation, True,
        )  # fmt: skip
        ctx.source, ctx.recompute = deferred.source(input), recompute
        kept_input = input if ctx.source is None else None
        if recompute:
            ctx.eps, ctx.residual_source = eps, deferred.source(residual)
            ctx.from_input = slope_from_input(activation, training, residual is not None)
            kept_residual = residual if ctx.residual_source is None else None
            ctx.save_for_backward(
                conv_output, None, kept_residual, bn_weight, bn_bias, mean, invstd, kept_input, weight
            )
            deferred.mark(ctx, output)
        else:
            save_norm(ctx, conv_output, output, residual, bn_weight, bn_bias, mean, invstd, kept_input, weight)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx, saved_tensors, grad_output):
        *saved, input, weight = saved_tensors
        need = ctx.needs_input_grad
        if ctx.recompute:
            saved = _norm_tensors(ctx, saved)
        need_conv = need[0] or need[1] or need[2]
        grad_conv, grad_residual, grad_bn_weight, grad_bn_bias = norm_backward(
            ctx, grad_output, saved, need_conv, need[3], need[4], need[5]
        )
        grad_input = grad_weight = grad_bias = None
        if need[0] or need[1]:
            grad_input, grad_weight = conv_backward(ctx, grad_conv, deferred.input_of(ctx, input), weight)
        if need[2]:
            grad_bias = bias_gradient(ctx, grad_conv)
        return grad_input, grad_weight, grad_bias, grad_residual, grad_bn_weight, grad_bn_bias, *[None] * 13


def _norm_tensors(ctx, saved):
    """The tensors of save_norm(), with those that were not kept."""
    conv_output, _, residual, bn_weight, bn_bias, mean, invstd = saved
    output = deferred.value(ctx) if saves_output(ctx.activation) and not ctx.from_input else None
    if not ctx.from_input:
        residual = bn_bias = None
    elif ctx.residual_source is not None:
        residual = deferred.value(ctx.residual_source)
    return [conv_output, output, residual, bn_weight, bn_bias, mean, invstd]
