"""Fused operators with the signatures of torch.nn.functional.

``import fastconv.functional as FF``. Autocast's casts are made here; arguments are checked here, once: a call like one
before (:func:`fastconv.ops.recall`) needs no second look. Then the call goes to the backend that
:func:`fastconv.ops.select` names: a fused kernel behind its autograd Function, or ``aten``
(stock PyTorch), which covers every call that no kernel does.

Activations: identity, relu, relu6, leaky_relu (slope 0.01), sigmoid, tanh, silu, gelu (exact), hardswish.

Layout: channels_last (NHWC) is the fast path. A 4-d result is channels_last if the input (or, for convolutions, the
weight) is, as in stock PyTorch; other layouts work and cost a copy.

Autocast: convolutions cast floating inputs to the autocast dtype; batch norm and pooling run in the input's dtype;
cross-entropy runs and returns in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autocast as autocast
from . import _checks as check
from . import ops
from ._losses import cross_entropy
from ._pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .autograd import BatchNormActFunction, Conv2dBiasActFunction, Conv2dBnActFunction
from .autograd.common import distinct, needs_grad
from .autograd.deferred import may_defer
from .ops.fake import conv_output_size

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm_act",
    "conv2d_bias_act",
    "conv2d_bias_relu",
    "conv2d_bn_act",
    "cross_entropy",
    "max_pool2d",
]


def _conv_arguments(op, input, weight, bias, residual, stride, padding, dilation, groups):
    """(input, residual, stride, padding, dilation) checked and normalised; input padded where 'same' is lopsided."""
    check.conv_shapes(op, input, weight, bias, groups)
    kept = autocast.enabled(input) and autocast.wide(input, weight)
    check.same_device_and_dtype(op, input=input, weight=None if kept else weight, bias=bias, residual=residual)
    stride = check.pair(op, "stride", stride)
    dilation = check.pair(op, "dilation", dilation)
    check.at_least(op, "stride", stride, 1)
    check.at_least(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"{op}: padding expected int, tuple, 'same' or 'valid', got {padding!r}")
        if padding == "same" and stride != (1, 1):
            raise RuntimeError(f"{op}: padding='same' expected stride 1, got stride {stride}")
        total = [0, 0] if padding == "valid" else [dilation[i] * (weight.size(2 + i) - 1) for i in (0, 1)]
        padding = (total[0] // 2, total[1] // 2)
        if total[0] % 2 or total[1] % 2:
            # An even filter needs one more row or column at the end than at the start, as F.conv2d pads it.
            input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    else:
        padding = check.pair(op, "padding", padding)
        check.at_least(op, "padding", padding, 0)
    spatial = [
        conv_output_size(input.size(i - 2), weight.size(2 + i), stride[i], padding[i], dilation[i]) for i in (0, 1)
    ]
    for i, name in enumerate(("height", "width")):
        if weight.size(2 + i) < 1 or spatial[i] < 1:
            raise RuntimeError(
                f"{op}: weight's {name} {weight.size(2 + i)} with dilation {dilation[i]} expected to fit the padded "
                f"input, got input {name} {input.size(i - 2)} and padding {padding[i]}"
            )
    check.residual_shape(op, residual, [*input.shape[:-3], weight.size(0), *spatial])
    return input, stride, padding, dilation


def conv2d_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """act(conv2d(input, weight) + bias + residual) in one operator.

    Arguments as :func:`torch.nn.functional.conv2d`, 'same' and 'valid' padding included, and:

    activation: one of the names in this module's docstring.
    residual: [N, K, P, Q], the output's shape and dtype, added before the activation.

    Shapes: input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K]; output [N, K, P, Q].
    dtypes: float32, float16, bfloat16, float64 (all tensors alike). Autocast: all tensors are cast to its dtype, the
    output has it (F.conv2d's rule; the fused addition and activation run in it too); float64 stays. To bfloat16 the
    ``cpu`` kernels round a float32 weight as they read it: the graph keeps the weight itself and no copy, and its
    gradient is float32 from the start.
    Raises RuntimeError on shapes, dtypes or devices that do not fit, TypeError on wrong types, ValueError on
    an unknown activation.
    """
    op = "conv2d_bias_act"
    tensors = autocast.convolution(input, weight, bias, residual)
    call = ops.recall(op, tensors, (stride, padding, dilation, groups, activation))
    if call.settings is not None:
        return _conv2d_bias_act(call.backend, *tensors, *call.settings)
    input, weight, bias, residual = tensors
    check.tensor(op, "input", input)
    check.tensor(op, "weight", weight)
    check.tensor(op, "bias", bias, optional=True)
    check.tensor(op, "residual", residual, optional=True)
    check.activation(op, activation)
    padded, stride, padding, dilation = _conv_arguments(
        op, input, weight, bias, residual, stride, padding, dilation, groups
    )
    if input.dim() == 3 or padded is not input:
        single = input.dim() == 3
        out = conv2d_bias_act(
            padded.unsqueeze(0) if single else padded, weight, bias, stride, padding, dilation, groups,
            activation=activation, residual=residual.unsqueeze(0) if single and residual is not None else residual,
        )  # fmt: skip
        return out.squeeze(0) if single else out
    limit = "" if input.is_floating_point() else f"dtype {input.dtype} is not supported"
    settings = (stride, padding, dilation, groups, activation)
    return _conv2d_bias_act(ops.select(call, tensors, settings, limit, _conv2d_bias_act), *tensors, *settings)


def _conv2d_bias_act(backend, input, weight, bias, residual, *settings):
    if backend != "cpu":
        weight = autocast.like(input, weight)
    if backend == "aten":
        return ops.aten.conv2d_bias_act(input, weight, bias, residual, *settings)
    if needs_grad(input, weight, bias, residual):
        return Conv2dBiasActFunction.apply(*distinct(input, weight, bias, residual), *settings, backend)
    return ops.impl(backend, "conv2d_bias_act")(input, weight, bias, residual, *settings, False)[0]


def conv2d_bias_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """relu(conv2d(input, weight) + bias); :func:`conv2d_bias_act` with its default activation."""
    return conv2d_bias_act(input, weight, bias, stride, padding, dilation, groups)


def _norm_arguments(op, channels, count, shape, training, momentum, eps, num_batches_tracked, **vectors):
    if not eps > 0:
        raise ValueError(f"{op}: eps expected a positive number, got {eps}")
    for name, value in vectors.items():
        check.tensor(op, name, value, optional=True)
        check.vector(op, name, value, channels)
    check.tensor(op, "num_batches_tracked", num_batches_tracked, optional=True)
    mean, var = vectors["running_mean"], vectors["running_var"]
    if (mean is None) != (var is None):
        raise RuntimeError(f"{op}: running_mean and running_var expected both or neither")
    if not training and mean is None:
        raise RuntimeError(f"{op}: running_mean expected in evaluation mode (training=False), got None")
    if training and count == 1:
        raise ValueError(f"{op}: Expected more than 1 value per channel when training, got input size {shape}")
    if training and mean is not None and momentum is None and num_batches_tracked is None:
        raise ValueError(f"{op}: momentum=None (cumulative average) expected num_batches_tracked, got None")


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """act(batch_norm(input) + residual) in one operator; Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167

    Arguments as :func:`torch.nn.functional.batch_norm`, and:

    activation: one of the names in this module's docstring.
    residual: input's shape and dtype, added before the activation.
    num_batches_tracked: 0-dim int64 tensor, incremented in the same call when training; with momentum=None the running
    statistics are the cumulative average over it.

    Shapes: input [N, C, *]; running_mean, running_var, weight, bias [C]. Statistics are computed in float32 (float64
    for float64 input); float16 and bfloat16 input may come with float32 vectors. Autocast: runs in the input's dtype,
    as F.batch_norm does; the residual is cast to it.

    Raises RuntimeError on shapes, dtypes or devices that do not fit, ValueError on one value per channel in training
    or an unknown activation.
    """
    op = "batch_norm_act"
    if isinstance(residual, Tensor) and isinstance(input, Tensor) and autocast.enabled(input):
        residual = residual.to(input.dtype)
    tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
    settings = (training, momentum, eps, activation)
    call = ops.recall(op, tensors, settings)
    if call.settings is not None:
        return _batch_norm_act(call.backend, *tensors, *settings)
    check.tensor(op, "input", input)
    check.tensor(op, "residual", residual, optional=True)
    check.activation(op, activation)
    if input.dim() < 2:
        raise RuntimeError(f"{op}: input expected at least 2 dimensions [N, C, *], got {list(input.shape)}")
    check.same_device_and_dtype(op, input=input, residual=residual)
    check.residual_shape(op, residual, input.shape)
    channels = input.size(1)
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    count = input.numel() // channels if channels else 0
    _norm_arguments(op, channels, count, input.shape, training, momentum, eps, num_batches_tracked, **vectors)
    limit = _norm_limit(input, **vectors)
    return _batch_norm_act(ops.select(call, tensors, settings, limit, _batch_norm_act), *tensors, *settings)


def _batch_norm_act(backend, input, residual, weight, bias, *stats_and_settings):
    if backend == "aten":
        return ops.aten.batch_norm_act(input, residual, weight, bias, *stats_and_settings)
    shape = input.shape
    if input.dim() != 4:
        input = input.reshape(shape[0], shape[1], -1, 1)
        residual = None if residual is None else residual.reshape(input.shape)
    args = (input, residual, weight, bias, *stats_and_settings)
    if needs_grad(input, residual, weight, bias):
        out = BatchNormActFunction.apply(*distinct(*args[:4]), *args[4:], backend)
    else:
        out = ops.impl(backend, "batch_norm_act")(*args)[0]
    return out if len(shape) == 4 else out.reshape(shape)


def _norm_limit(input: Tensor, **vectors: Tensor | None) -> str:
    """Why the fused kernels do not take these dtypes: stock PyTorch has the word on them then."""
    if not input.is_floating_point():
        return f"dtype {input.dtype} is not supported"
    dtypes = {t.dtype for t in vectors.values() if t is not None}
    if len(dtypes) > 1:
        return "running statistics, weight and bias have different dtypes"
    if (
        dtypes
        and not dtypes <= {input.dtype, torch.float32}
        or (input.dtype == torch.float64 and torch.float32 in dtypes)
    ):
        return f"dtype {dtypes.pop()} of the statistics does not go with input dtype {input.dtype}"
    if input.numel() == 0:
        return "the input is empty"
    return ""


def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """act(batch_norm(conv2d(input, weight) + bias) + residual) in one operator.

    The convolution's arguments as :func:`conv2d_bias_act`, the normalisation's as :func:`batch_norm_act`, with running
    statistics, bn_weight and bn_bias of shape [K]. Autocast: input, weight, bias and residual are cast to its dtype,
    which the output has (the weight as in :func:`conv2d_bias_act`); the normalisation's vectors stay, its arithmetic is
    float32.

    In evaluation without gradients the normalisation becomes a scale and shift in the convolution's epilogue
    and the convolution's raw output is not kept.

    recompute: in training, keep the convolution's raw output alone for the backward. The result is recomputed from it
    there, for this call and for the convolutions of this module that read it; a reader that keeps its input by itself
    still does. The gradients are the same. No effect in evaluation, under torch.compile and in the ``aten`` backend.
    """
    op = "conv2d_bn_act"
    recompute = recompute and training and may_defer()
    input, weight, bias, residual = autocast.convolution(input, weight, bias, residual)
    tensors = (input, weight, bias, residual, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked)
    call = ops.recall(op, tensors, (stride, padding, dilation, groups, training, momentum, eps, activation))
    if call.settings is not None:
        return _conv2d_bn_act(call.backend, *tensors, *call.settings, recompute=recompute)
    check.tensor(op, "input", input)
    check.tensor(op, "weight", weight)
    check.tensor(op, "bias", bias, optional=True)
    check.tensor(op, "residual", residual, optional=True)
    check.activation(op, activation)
    padded, stride, padding, dilation = _conv_arguments(
        op, input, weight, bias, residual, stride, padding, dilation, groups
    )
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
    }
    spatial = [
        conv_output_size(padded.size(i - 2), weight.size(2 + i), stride[i], padding[i], dilation[i]) for i in (0, 1)
    ]
    batch = input.size(0) if input.dim() == 4 else 1
    count, shape = batch * spatial[0] * spatial[1], [batch, weight.size(0), *spatial]
    _norm_arguments(op, weight.size(0), count, shape, training, momentum, eps, num_batches_tracked, **vectors)
    if input.dim() == 3 or padded is not input:
        single = input.dim() == 3
        out = conv2d_bn_act(
            padded.unsqueeze(0) if single else padded, weight, bias, running_mean, running_var, bn_weight, bn_bias,
            stride=stride, padding=padding, dilation=dilation, groups=groups, training=training, momentum=momentum,
            eps=eps, activation=activation, num_batches_tracked=num_batches_tracked, recompute=recompute,
            residual=residual.unsqueeze(0) if single and residual is not None else residual,
        )  # fmt: skip
        return out.squeeze(0) if single else out
    limit = _norm_limit(input, **vectors)
    settings = (stride, padding, dilation, groups, training, momentum, eps, activation)
    backend = ops.select(call, tensors, settings, limit, _conv2d_bn_act)
    return _conv2d_bn_act(backend, *tensors, *settings, recompute=recompute)


def _conv2d_bn_act(backend, input, weight, *rest, recompute=False):
    if backend != "cpu":
        weight = autocast.like(input, weight)
    args = (input, weight, *rest)
    bias, residual, bn_weight, bn_bias, *stats = args[2:9]
    if backend == "aten":
        out = F.conv2d(input, weight, bias, *args[9:13])
        return ops.aten.batch_norm_act(out, residual, bn_weight, bn_bias, *stats, *args[13:])
    if needs_grad(input, weight, bias, residual, bn_weight, bn_bias):
        return Conv2dBnActFunction.apply(*distinct(*args[:6]), *args[6:], recompute, backend)
    return ops.impl(backend, "conv2d_bn_act")(*args, False)[0]
