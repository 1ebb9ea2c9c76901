"""Average pooling, fixed windows and adaptive, forward and backward, NHWC.

    y[n,p,q,c] = sum of x over the window of (p, q) / divisor        dx[n,h,w,c] = sum of dy / divisor over its windows

    fixed      rows [p*sh - ph, p*sh - ph + R), cut to the image. divisor: divisor_override, or the window's area cut to
               the padded image (count_include_pad), or cut to the image.
    adaptive   rows [floor(p*H/P), ceil((p+1)*H/P)), divisor its area. Row h lies in the windows
               floor(h*P/H) <= p < ceil((h+1)*P/H).

Both directions gather: a program owns [BLOCK_M positions, BLOCK_C channels] of what it writes and adds up what it
reads, in fp32, in a fixed order, with no atomics. Windows are computed per position before the loops; inside them
there is no division but by compile-time strides and, in the adaptive backward, the one per window of its divisor.
Bytes: what is read once (overlaps hit L1/L2) and what is written once; one addition per element read.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .common import WARPS, cdiv, empty_gradient, empty_nhwc, format_of, launch, layout_of, nhwc
from .pooling import address, pool_output_size, rows_of_image, tile


@triton.jit
def _window(p, SIZE, OUT, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, ADAPTIVE: tl.constexpr):
    """(first row, end, extent with padding) of window ``p`` along one side of SIZE rows and OUT windows."""
    if ADAPTIVE:
        first = (p * SIZE) // OUT
        end = ((p + 1) * SIZE + OUT - 1) // OUT
        extent = end - first
    else:
        first = p * STRIDE - PAD
        end = tl.minimum(first + R, SIZE + PAD)
        extent = end - first
        first = tl.maximum(first, 0)
        end = tl.minimum(end, SIZE)
    return first, end, extent


@triton.jit
def _divisor(high, wide, high_padded, wide_padded, OVERRIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr):
    if OVERRIDE != 0:
        area = tl.zeros_like(high) + OVERRIDE
    elif INCLUDE_PAD:
        area = high_padded * wide_padded
    else:
        area = high * wide
    return area.to(tl.float32)


@triton.jit
def avg_pool2d_kernel(
    x_ptr, y_ptr, rows, C, H, W, P, Q, REACH_H, REACH_W,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    OVERRIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, live, n, p, q = rows_of_image(tl.program_id(0) * BLOCK_M, rows, P, Q, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top, bottom, high_padded = _window(p, H, P, R, SH, PH, ADAPTIVE)
    left, right, wide_padded = _window(q, W, Q, S, SW, PW, ADAPTIVE)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(REACH_H):
        h = top + i
        for j in range(REACH_W):
            w = left + j
            mask = (live & (h < bottom) & (w < right))[:, None] & (c[None, :] < C)
            total += tl.load(x_ptr + address((n * H + h) * W + w, c, C), mask=mask, other=0.0).to(tl.float32)
    area = _divisor(bottom - top, right - left, high_padded, wide_padded, OVERRIDE, INCLUDE_PAD)
    empty = (bottom <= top) | (right <= left)
    y = tl.where(empty[:, None], 0.0, total / tl.where(empty, 1.0, area)[:, None])
    mask = live[:, None] & (c[None, :] < C)
    tl.store(y_ptr + address(m, c, C), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def avg_pool2d_backward_kernel(
    dy_ptr, dx_ptr, rows, C, H, W, P, Q, REACH_H, REACH_W,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    OVERRIDE: tl.constexpr, INCLUDE_PAD: tl.constexpr, ADAPTIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, live, n, h, w = rows_of_image(tl.program_id(0) * BLOCK_M, rows, H, W, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if ADAPTIVE:
        p_last = ((h + 1) * P + H - 1) // H - 1
        q_last = ((w + 1) * Q + W - 1) // W - 1
    else:
        p_last = (h + PH) // SH
        q_last = (w + PW) // SW
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(REACH_H):
        p = p_last - i
        top, bottom, high_padded = _window(p, H, P, R, SH, PH, ADAPTIVE)
        rows_in = live & (p >= 0) & (p < P) & (h >= top) & (h < bottom)
        for j in range(REACH_W):
            q = q_last - j
            left, right, wide_padded = _window(q, W, Q, S, SW, PW, ADAPTIVE)
            inside = rows_in & (q >= 0) & (q < Q) & (w >= left) & (w < right)
            area = _divisor(bottom - top, right - left, high_padded, wide_padded, OVERRIDE, INCLUDE_PAD)
            mask = inside[:, None] & (c[None, :] < C)
            dy = tl.load(dy_ptr + address((n * P + p) * Q + q, c, C), mask=mask, other=0.0).to(tl.float32)
            total += dy / tl.where(inside, area, 1.0)[:, None]
    mask = live[:, None] & (c[None, :] < C)
    tl.store(dx_ptr + address(m, c, C), total.to(dx_ptr.dtype.element_ty), mask=mask)


# (R, S, SH, SW, PH, PW, OVERRIDE, INCLUDE_PAD, ADAPTIVE): the compile-time description of the windows
_ADAPTIVE = (1, 1, 1, 1, 0, 0, 0, False, True)


def _fixed(kernel_size, stride, padding, count_include_pad, divisor_override) -> tuple:
    return (*kernel_size, *stride, *padding, divisor_override or 0, count_include_pad, False)


def _forward(x: Tensor, p: int, q: int, reach: tuple[int, int], how: tuple) -> Tensor:
    n, c, h, w = x.shape
    y = empty_nhwc(x, (n, c, p, q))
    if y.numel():
        grid, block_m, block_c = tile(n * p * q, c)
        launch(
            avg_pool2d_kernel, grid, nhwc(x), y, n * p * q, c, h, w, p, q, *reach, *how,
            BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
    return y.contiguous(memory_format=format_of(x))


def _backward(dy: Tensor, input_size: Sequence[int], reach: tuple[int, int], how: tuple, channels_last: bool) -> Tensor:
    n, c, p, q = dy.shape
    h, w = input_size
    dx = empty_gradient(dy, (n, c, h, w), channels_last)
    if dx.numel():
        grid, block_m, block_c = tile(n * h * w, c)
        launch(
            avg_pool2d_backward_kernel, grid, nhwc(dy), dx, n * h * w, c, h, w, p, q, *reach, *how,
            BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
    return dx.contiguous(memory_format=layout_of(channels_last))


def avg_pool2d(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    """Output [N, C, P, Q] in input's memory format."""
    p, q = (pool_output_size(input.size(2 + i), kernel_size[i], stride[i], padding[i], 1, ceil_mode) for i in (0, 1))
    how = _fixed(kernel_size, stride, padding, count_include_pad, divisor_override)
    return _forward(input, p, q, tuple(kernel_size), how)


def avg_pool2d_backward(
    grad_output: Tensor, input_size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
    channels_last: bool,
) -> Tensor:  # fmt: skip
    """grad_input [N, C, *input_size]; ceil_mode shows in grad_output's size already."""
    how = _fixed(kernel_size, stride, padding, count_include_pad, divisor_override)
    reach = tuple(cdiv(kernel_size[i], stride[i]) for i in (0, 1))
    return _backward(grad_output, input_size, reach, how, channels_last)


def adaptive_avg_pool2d(input: Tensor, output_size: Sequence[int]) -> Tensor:
    """Output [N, C, *output_size] in input's memory format."""
    reach = tuple(_longest(input.size(2 + i), output_size[i]) for i in (0, 1))
    return _forward(input, *output_size, reach, _ADAPTIVE)


def adaptive_avg_pool2d_backward(grad_output: Tensor, input_size: Sequence[int], channels_last: bool) -> Tensor:
    """grad_input [N, C, *input_size]."""
    reach = tuple(_longest(grad_output.size(2 + i), input_size[i]) for i in (0, 1))
    return _backward(grad_output, input_size, reach, _ADAPTIVE, channels_last)


def _longest(size: int, windows: int) -> int:
    """A bound on the adaptive windows over ``size``: they touch one row more at each end where it does not divide."""
    return max(1, size // max(windows, 1) if size % max(windows, 1) == 0 else size // windows + 2)
