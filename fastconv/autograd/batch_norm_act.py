"""y = act(z), z = xhat * gamma + beta + r, xhat = (x - mean) * invstd  over M = N*H*W samples per channel.

dz = dy * act'(z);  dbeta = sum dz;  dgamma = sum dz * xhat;  dr = dz;
training: dx = gamma * invstd * (dz - dbeta / M - xhat * dgamma / M);  evaluation: dx = gamma * invstd * dz.
(Ioffe & Szegedy 2015, section 3.) act' comes from y, or from z, recomputed from x and r: of silu, gelu and hardswish
always, of relu, relu6 and leaky_relu where that reads one tensor less.
"""

from __future__ import annotations

import torch

from ..ops import impl
from .common import differentiable_once, saves_output


def slope_from_input(activation: str, training: bool, residual: bool) -> bool:
    """Whether act' is that of z = xhat * gamma + beta (+ r), recomputed, not of the output.

    In evaluation the output may come from a convolution before it was rounded: relu's sign is the output's then.
    """
    if activation in ("relu", "relu6", "leaky_relu"):
        return training and not residual
    return not saves_output(activation) and activation != "identity"


def save_norm(ctx, input, output, residual, weight, bias, mean, invstd, *more) -> None:
    """What :func:`norm_backward` reads, and behind it ``more``."""
    recompute = slope_from_input(ctx.activation, ctx.training, residual is not None)
    ctx.save_for_backward(
        input,
        output if saves_output(ctx.activation) and not recompute else None,
        residual if recompute else None,
        weight,
        bias if recompute else None,
        mean,
        invstd,
        *more,
    )


def norm_backward(ctx, grad_output, saved, need_input, need_residual, need_weight, need_bias):
    """(dx, dresidual, dgamma, dbeta), None where not needed, from the tensors of :func:`save_norm`."""
    wanted = [need_input, need_residual, need_weight, need_bias]
    passed_on = ctx.activation == "identity" and need_residual
    mask = [need_input, need_residual and not passed_on, need_weight, need_bias]
    if any(mask):
        grads = impl(ctx.backend, "batch_norm_act_backward")(grad_output, *saved, ctx.training, ctx.activation, mask)
        grads = [g if w else None for g, w in zip(grads, wanted, strict=True)]
    else:
        grads = [None] * 4
    if passed_on:
        grads[1] = grad_output
    return grads


class BatchNormActFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
        activation, backend,
    ):  # fmt: skip
        ctx.training, ctx.activation, ctx.backend = training, activation, backend
        output, mean, invstd = impl(backend, "batch_norm_act")(
            input, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
            activation,
        )  # fmt: skip
        save_norm(ctx, input, output, residual, weight, bias, mean, invstd)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_output):
        grads = norm_backward(ctx, grad_output, saved, *ctx.needs_input_grad[:4])
        return (*grads, *[None] * 8)
