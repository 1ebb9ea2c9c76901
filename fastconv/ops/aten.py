"""The ``aten`` backend: the same operators as compositions of stock PyTorch, with stock autograd.

Fallback for every call that no fused kernel covers, and the competitor that each kernel has to beat.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


def _finish(out: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    if residual is not None:
        out = out + residual
    return ACTIVATIONS[activation](out)


def conv2d_bias_act(input, weight, bias, residual, stride, padding, dilation, groups, activation):
    return _finish(F.conv2d(input, weight, bias, stride, padding, dilation, groups), residual, activation)


def batch_norm_act(
    input,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches_tracked,
    training,
    momentum,
    eps,
    activation,
):
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    # Without statistics to update F.batch_norm does not read the momentum.
    momentum = 0.0 if momentum is None else momentum
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _finish(out, residual, activation)


max_pool2d = F.max_pool2d
avg_pool2d = F.avg_pool2d
adaptive_avg_pool2d = F.adaptive_avg_pool2d
cross_entropy = F.cross_entropy
