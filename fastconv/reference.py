"""The oracle: what every operator computes, in plain PyTorch, readable, differentiable, for any floating dtype.

Tests run it in fp64. Convolution and the window walk of the pools are torch's own; everything that fastconv's kernels
do around them (statistics, normalisation, activation, residual, log-softmax, smoothing) is written out from its
formula, so that the ``aten`` backend is tested against it as well.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(name: str, x: Tensor) -> Tensor:
    """act(x), elementwise; the formulas are those of the torch.nn modules of the same names."""
    if name == "identity":
        return x
    if name == "relu":
        return torch.where(x.isnan(), x, x.clamp_min(0))
    if name == "relu6":
        return torch.where(x.isnan(), x, x.clamp(0, 6))
    if name == "leaky_relu":
        return torch.where(x > 0, x, 0.01 * x)
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    if name == "tanh":
        return torch.tanh(x)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "hardswish":
        return x * (x + 3).clamp(0, 6) / 6
    raise ValueError(f"activation: unknown name {name!r}")


def conv2d_bias_act(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation="relu", residual=None
):
    """act(conv2d(input, weight) + bias + residual)"""
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        out = out + residual
    return globals()["activation"](activation, out)


def conv2d_bias_relu(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return conv2d_bias_act(input, weight, bias, stride, padding, dilation, groups, activation="relu")


def batch_norm_act(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    *,
    activation="relu",
    residual=None,
    num_batches_tracked=None,
):
    """act((input - mean) / sqrt(var + eps) * weight + bias + residual); running statistics updated when training.

    Ioffe & Szegedy 2015: the biased variance normalises, the unbiased one goes into running_var.
    """
    dims = [d for d in range(input.dim()) if d != 1]
    shape = [1, -1] + [1] * (input.dim() - 2)
    if training:
        mean = input.mean(dims)
        var = (input - mean.view(shape)).square().mean(dims)
        count = input.numel() // input.size(1)
        if num_batches_tracked is not None:
            num_batches_tracked += 1
            if momentum is None:
                momentum = 1.0 / num_batches_tracked.item()
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
    else:
        mean, var = running_mean.to(input.dtype), running_var.to(input.dtype)
    out = (input - mean.view(shape)) / torch.sqrt(var + eps).view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    if residual is not None:
        out = out + residual
    return globals()["activation"](activation, out)


def conv2d_bn_act(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    bn_weight,
    bn_bias,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    training=False,
    momentum=0.1,
    eps=1e-5,
    activation="relu",
    residual=None,
    num_batches_tracked=None,
):
    """act(batch_norm(conv2d(input, weight) + bias) + residual)"""
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return batch_norm_act(
        out,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        momentum,
        eps,
        activation=activation,
        residual=residual,
        num_batches_tracked=num_batches_tracked,
    )


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool2d(input, output_size):
    return F.adaptive_avg_pool2d(input, output_size)


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """-sum_c t_c w_c log_softmax(input)_c with t = (1 - s) onehot(target) + s / C, or the smoothed probabilities.

    "mean" divides by the sum of the targets' own weights (class indices) or by the number of rows (probabilities).
    """
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    dim = 1 if input.dim() > 1 else 0
    classes = input.size(dim)
    shape = [-1 if d == dim else 1 for d in range(input.dim())]
    shifted = input - input.detach().amax(dim, keepdim=True)
    logp = shifted - shifted.exp().sum(dim, keepdim=True).log()
    w = torch.ones(classes, dtype=input.dtype) if weight is None else weight
    w = w.to(input.device).view(shape)
    if target.is_floating_point():
        t = target * (1 - label_smoothing) + label_smoothing / classes
        loss = -(t * w * logp).sum(dim)
        rows = loss.numel()
    else:
        keep = target != ignore_index
        safe = torch.where(keep, target, torch.zeros_like(target)).long().unsqueeze(dim)
        own = w.expand_as(input).gather(dim, safe).squeeze(dim)
        picked = -(logp.gather(dim, safe).squeeze(dim) * own)
        smooth = -(w * logp).sum(dim) / classes
        loss = torch.where(keep, (1 - label_smoothing) * picked + label_smoothing * smooth, torch.zeros_like(picked))
        rows = torch.where(keep, own, torch.zeros_like(own)).sum()
    if reduction == "none":
        return loss
    return loss.sum() / rows if reduction == "mean" else loss.sum()
