"""loss_n = w_t (1 - s) (lse - x_t) + s / C * sum_c w_c (lse - x_c), or with probabilities t: sum_c t_c w_c (lse - x_c).

With softmax p = exp(x - lse) and the effective target u_c = w_c t_c (smoothed), dx_c = (p_c * sum u - u_c) * g, where
g is the row's share of the incoming gradient. p is recomputed from the logits and the saved log-sum-exp.
"""

from __future__ import annotations

import torch

from ..ops import impl
from .common import differentiable_once


class CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, weight, reduction, ignore_index, label_smoothing, backend):
        ctx.backend, ctx.settings = backend, (reduction, ignore_index, label_smoothing)
        loss, lse, normalizer = impl(backend, "cross_entropy")(input, target, weight, *ctx.settings)
        ctx.save_for_backward(input, target, weight, lse, normalizer)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_loss):
        wanted = list(ctx.needs_input_grad[:2])
        grads = impl(ctx.backend, "cross_entropy_backward")(grad_loss, *saved, *ctx.settings, wanted)
        grad_input, grad_target = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return grad_input, grad_target, *[None] * 5
