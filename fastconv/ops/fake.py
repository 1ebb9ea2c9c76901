"""Fake (meta) implementations: the shapes, dtypes and memory formats of every raw operator, without data.

torch.compile, torch.export and FakeTensorMode call these. They follow the layout rule of the kernels: a result is
channels_last if the input (or, for convolutions, the weight) is, else contiguous; a result that was not asked for is
an empty one-dimensional tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import _ext


def conv_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pool_output_size(size, kernel, stride, padding, dilation, ceil_mode):
    """Pooled size; with ceil_mode the last window must start inside the input or the left padding."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = -(-span // stride) + 1
    return out - 1 if (out - 1) * stride >= size + padding else out


def _format(*tensors: Tensor) -> torch.memory_format:
    found = [suggest_memory_format(t) for t in tensors if t.dim() == 4]
    return torch.channels_last if torch.channels_last in found else torch.contiguous_format


def _like(t: Tensor, wanted: bool = True) -> Tensor:
    return t.new_empty(t.shape).to(memory_format=_format(t)) if wanted else t.new_empty(0)


def _channels(t: Tensor, count) -> Tensor:
    return t.new_empty(count, dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)


def _conv_out(input, weight, stride, padding, dilation) -> Tensor:
    p, q = (conv_output_size(input.size(2 + i), weight.size(2 + i), stride[i], padding[i], dilation[i]) for i in (0, 1))
    return input.new_empty(input.size(0), weight.size(0), p, q).to(memory_format=_format(input, weight))


def _conv2d_bias_act(input, weight, bias, residual, stride, padding, dilation, groups, activation, save_preact):
    out = _conv_out(input, weight, stride, padding, dilation)
    return out, _like(out, save_preact)


def _conv2d_backward(grad_output, input, weight, stride, padding, dilation, groups, output_mask):
    return _like(input, output_mask[0]), _like(weight, output_mask[1])


def _act_bias_backward(grad_output, saved, activation, output_mask):
    preact = _like(grad_output if saved is None else saved, output_mask[0])
    return preact, grad_output.new_empty(grad_output.size(1) if output_mask[1] else 0)


def _batch_norm_act(
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
    return _like(input), _channels(input, input.size(1)), _channels(input, input.size(1))


def _batch_norm_act_backward(
    grad_output, input, output, residual, weight, bias, mean, invstd, training, activation, output_mask
):
    affine = mean if weight is None else weight
    return (
        _like(input, output_mask[0]),
        _like(input, output_mask[1]),
        affine.new_empty(input.size(1)) if output_mask[2] else input.new_empty(0),
        affine.new_empty(input.size(1)) if output_mask[3] else input.new_empty(0),
    )


def _conv2d_bn_act(
    input,
    weight,
    bias,
    residual,
    bn_weight,
    bn_bias,
    running_mean,
    running_var,
    num_batches_tracked,
    stride,
    padding,
    dilation,
    groups,
    training,
    momentum,
    eps,
    activation,
    save_for_backward,
):
    out = _conv_out(input, weight, stride, padding, dilation)
    return (
        out,
        _like(out, save_for_backward),
        _channels(input, weight.size(0)),
        _channels(input, weight.size(0)),
    )


def _pool_out(input, kernel_size, stride, padding, dilation, ceil_mode, dtype=None) -> Tensor:
    p, q = (
        pool_output_size(input.size(2 + i), kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    )
    out = input.new_empty(input.size(0), input.size(1), p, q, dtype=dtype or input.dtype)
    return out.to(memory_format=_format(input))


def _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, save_offsets):
    args = (input, kernel_size, stride, padding, dilation, ceil_mode)
    return _pool_out(*args), _pool_out(*args, torch.uint8) if save_offsets else input.new_empty(0, dtype=torch.uint8)


def _pool_backward(grad_output, input_size, channels_last):
    grad = grad_output.new_empty(grad_output.size(0), grad_output.size(1), *input_size)
    return grad.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _max_pool2d_backward(grad_output, offsets, input_size, kernel_size, stride, padding, dilation, channels_last):
    return _pool_backward(grad_output, input_size, channels_last)


def _avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    return _pool_out(input, kernel_size, stride, padding, (1, 1), ceil_mode)


def _avg_pool2d_backward(
    grad_output, input_size, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, channels_last
):
    return _pool_backward(grad_output, input_size, channels_last)


def _adaptive_avg_pool2d(input, output_size):
    return input.new_empty(input.size(0), input.size(1), *output_size).to(memory_format=_format(input))


def _adaptive_avg_pool2d_backward(grad_output, input_size, channels_last):
    return _pool_backward(grad_output, input_size, channels_last)


def _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing):
    rows = (input.size(0), *input.shape[2:])
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    loss = input.new_empty(rows if reduction == 0 else ())
    return loss, input.new_empty(rows, dtype=accumulate), input.new_empty((), dtype=accumulate)


def _cross_entropy_backward(
    grad_loss, input, target, weight, lse, normalizer, reduction, ignore_index, label_smoothing, output_mask
):
    grad_input = torch.empty_like(input) if output_mask[0] else input.new_empty(0)
    return grad_input, torch.empty_like(target) if output_mask[1] else input.new_empty(0)


_FAKES = (
    _conv2d_bias_act,
    _conv2d_backward,
    _act_bias_backward,
    _batch_norm_act,
    _batch_norm_act_backward,
    _conv2d_bn_act,
    _max_pool2d,
    _max_pool2d_backward,
    _avg_pool2d,
    _avg_pool2d_backward,
    _adaptive_avg_pool2d,
    _adaptive_avg_pool2d_backward,
    _cross_entropy,
    _cross_entropy_backward,
)

OPERATORS = tuple(function.__name__[1:] for function in _FAKES)

if _ext.HAS_EXT:
    for _function in _FAKES:
        torch.library.register_fake(f"fastconv::{_function.__name__[1:]}", _function)
