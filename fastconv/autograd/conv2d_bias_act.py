"""y = act(z), z = conv2d(x, w) + b + r.

dz = dy * act'(z);  dx = conv2d_transpose(dz, w);  dw = x (*) dz;  db = sum_npq dz;  dr = dz.
The activation's gradient and the bias gradient are one pass over dy. For silu, gelu and hardswish z is kept beside y;
the other activations take act' from y.
"""

from __future__ import annotations

import torch

from .._checks import PREACT_ACTIVATIONS
from ..ops import impl
from . import deferred
from .common import bias_gradient, conv_backward, differentiable_once, saves_output


class Conv2dBiasActFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, residual, stride, padding, dilation, groups, activation, backend):
        ctx.activation, ctx.backend = activation, backend
        ctx.geometry = (stride, padding, dilation, groups)
        keep_preact = activation in PREACT_ACTIVATIONS
        output, preact = impl(backend, "conv2d_bias_act")(
            input, weight, bias, residual, *ctx.geometry, activation, keep_preact
        )
        saved = preact if keep_preact else output if saves_output(activation) else None
        ctx.source = deferred.source(input)
        ctx.save_for_backward(input if ctx.source is None else None, weight, saved)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx, saved_tensors, grad_output):
        input, weight, saved = saved_tensors
        need_bias = ctx.needs_input_grad[2]
        grad_bias = None
        if saved is None:
            grad_preact = grad_output
            if need_bias:
                grad_bias = bias_gradient(ctx, grad_output)
        else:
            grad_preact, summed = impl(ctx.backend, "act_bias_backward")(
                grad_output, saved, ctx.activation, [True, need_bias]
            )
            grad_bias = summed if need_bias else None
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_input, grad_weight = conv_backward(ctx, grad_preact, deferred.input_of(ctx, input), weight)
        grad_residual = grad_preact if ctx.needs_input_grad[3] else None
        return grad_input, grad_weight, grad_bias, grad_residual, None, None, None, None, None, None
