"""The pooling part of fastconv.functional: torch.nn.functional's signatures and semantics."""

from __future__ import annotations

from torch import Tensor

from . import _checks as check
from . import ops
from .autograd import AdaptiveAvgPool2dFunction, AvgPool2dFunction, MaxPool2dFunction
from .autograd.common import needs_grad
from .ops.fake import pool_output_size

_MAX_WINDOW = 256  # the arg max is kept as one byte inside the window


def _window(op, input, kernel_size, stride, padding, dilation, ceil_mode):
    """(kernel, stride, padding, dilation) as pairs, checked against each other and against the input."""
    check.tensor(op, "input", input)
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise RuntimeError(f"{op}: input expected non-empty [N, C, H, W] or [C, H, W], got {list(input.shape)}")
    kernel = check.pair(op, "kernel_size", kernel_size)
    empty = isinstance(stride, (tuple, list)) and len(stride) == 0
    stride = kernel if stride is None or empty else check.pair(op, "stride", stride)
    padding = check.pair(op, "padding", padding)
    dilation = check.pair(op, "dilation", dilation)
    for name, value, least in (("kernel_size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        check.at_least(op, name, value, least)
    check.at_least(op, "dilation", dilation, 1)
    for i, name in enumerate(("height", "width")):
        span = dilation[i] * (kernel[i] - 1) + 1
        if padding[i] > span // 2:
            raise RuntimeError(f"{op}: padding expected at most half of the kernel's {name} {span}, got {padding[i]}")
        size = input.size(i - 2)
        if pool_output_size(size, kernel[i], stride[i], padding[i], dilation[i], ceil_mode) < 1:
            raise RuntimeError(
                f"{op}: kernel_size expected to fit the padded input, got {name} {span} for input {name} {size} "
                f"and padding {padding[i]}"
            )
    return kernel, stride, padding, dilation


def _limit(input: Tensor) -> str:
    return "" if input.is_floating_point() else f"dtype {input.dtype} is not supported"


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`torch.nn.functional.max_pool2d`, arguments, results and errors alike.

    Input [N, C, H, W] or [C, H, W]. The fused kernels keep the arg max as one byte per output element for the
    backward; windows of more than 256 elements, integer inputs and ``return_indices=True`` run on ``aten``.
    Autocast: runs in the input's dtype.
    """
    op, tensors = "max_pool2d", (input,)
    call = ops.recall(op, tensors, (kernel_size, stride, padding, dilation, ceil_mode, return_indices))
    if call.settings is not None:
        return _max_pool2d(call.backend, input, *call.settings)
    kernel, stride, padding, dilation = _window(op, input, kernel_size, stride, padding, dilation, ceil_mode)
    limit = _limit(input)
    if return_indices:
        limit = "return_indices=True asks for flat int64 indices"
    elif kernel[0] * kernel[1] > _MAX_WINDOW:
        limit = f"a window of {kernel[0]}x{kernel[1]} has more than {_MAX_WINDOW} elements"
    settings = (kernel, stride, padding, dilation, ceil_mode, return_indices)
    return _max_pool2d(ops.select(call, tensors, settings, limit, _max_pool2d), input, *settings)


def _max_pool2d(backend, input, kernel, stride, padding, dilation, ceil_mode, return_indices):
    if backend == "aten":
        return ops.aten.max_pool2d(input, kernel, stride, padding, dilation, ceil_mode, return_indices)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    args = (batch, kernel, stride, padding, dilation, ceil_mode)
    grad = needs_grad(input)
    out = MaxPool2dFunction.apply(*args, backend) if grad else ops.impl(backend, "max_pool2d")(*args, False)[0]
    return out if input.dim() == 4 else out.squeeze(0)


def avg_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.avg_pool2d`, arguments, results and errors alike. Input [N, C, H, W] or [C, H, W].

    Autocast: runs in the input's dtype.
    """
    op, tensors = "avg_pool2d", (input,)
    call = ops.recall(op, tensors, (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override))
    if call.settings is not None:
        return _avg_pool2d(call.backend, input, *call.settings)
    kernel, stride, padding, _ = _window(op, input, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override is not None and divisor_override == 0:
        raise RuntimeError(f"{op}: divisor_override expected a non-zero int or None, got 0")
    settings = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _avg_pool2d(ops.select(call, tensors, settings, _limit(input), _avg_pool2d), input, *settings)


def _avg_pool2d(backend, input, *settings):
    if backend == "aten":
        return ops.aten.avg_pool2d(input, *settings)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    if needs_grad(input):
        out = AvgPool2dFunction.apply(batch, *settings, backend)
    else:
        out = ops.impl(backend, "avg_pool2d")(batch, *settings)
    return out if input.dim() == 4 else out.squeeze(0)


def adaptive_avg_pool2d(input: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """:func:`torch.nn.functional.adaptive_avg_pool2d`: None keeps that side. Input [N, C, H, W] or [C, H, W].

    Autocast: runs in the input's dtype.
    """
    op, tensors = "adaptive_avg_pool2d", (input,)
    call = ops.recall(op, tensors, (output_size,))
    if call.settings is not None:
        return _adaptive_avg_pool2d(call.backend, input, *call.settings)
    check.tensor(op, "input", input)
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise RuntimeError(f"{op}: input expected non-empty [N, C, H, W] or [C, H, W], got {list(input.shape)}")
    if isinstance(output_size, (tuple, list)):
        if len(output_size) != 2:
            raise RuntimeError(f"{op}: output_size expected an int or 2 values, got {output_size!r}")
        output_size = tuple(input.size(i - 2) if v is None else v for i, v in enumerate(output_size))
    size = check.pair(op, "output_size", output_size)
    check.at_least(op, "output_size", size, 0)
    limit = _limit(input) or ("the output is empty" if 0 in size else "")
    return _adaptive_avg_pool2d(ops.select(call, tensors, (size,), limit, _adaptive_avg_pool2d), input, size)


def _adaptive_avg_pool2d(backend, input, size):
    if backend == "aten":
        return ops.aten.adaptive_avg_pool2d(input, size)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    if needs_grad(input):
        out = AdaptiveAvgPool2dFunction.apply(batch, size, backend)
    else:
        out = ops.impl(backend, "adaptive_avg_pool2d")(batch, size)
    return out if input.dim() == 4 else out.squeeze(0)
