"""Max pooling forward and backward, NHWC.

    y[n,p,q,c] = max over (r, s) of x[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c]     taps outside the image do not count
    offset     = r * S + s of that maximum, one byte (R * S <= 256); the first of equals wins, NaN wins over all (the
                 last NaN of a window, as in PyTorch)
    dx[n,h,w,c] = sum of dy[n,p,q,c] over the windows whose offset points at (h, w)

The backward gathers: an input element looks at the ceil(span / stride) windows per side that can contain it, with
p = floor((h + ph) / sh) - i and r = (h + ph - p*sh) / dh where that divides. No atomics, so deterministic; every dx is
written once, zeros included. Stride and dilation are compile-time constants: no division by a run-time size in a loop.
Mapping: a program owns [BLOCK_M positions, BLOCK_C channels]; positions are decoded once. fp32 sums.
Bytes: forward reads x about once (overlapping windows hit L1/L2), writes y and one byte each; backward reads dy and the
bytes, writes dx.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import WARPS, cdiv, empty_gradient, empty_nhwc, format_of, launch, layout_of, nhwc, not_asked
from .pooling import address, pool_output_size, rows_of_image, tile


@triton.jit
def max_pool2d_kernel(
    x_ptr, y_ptr, offset_ptr, rows, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, live, n, p, q = rows_of_image(tl.program_id(0) * BLOCK_M, rows, P, Q, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    where = tl.full((BLOCK_M, BLOCK_C), -1, tl.int32)
    for r in range(R):
        h = p * SH - PH + r * DH
        for s in range(S):
            w = q * SW - PW + s * DW
            inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask = inside[:, None] & (c[None, :] < C)
            x = tl.load(x_ptr + address((n * H + h) * W + w, c, C), mask=mask, other=0.0).to(tl.float32)
            take = mask & ((x > best) | (x != x) | (where < 0))  # where < 0: a window of -inf still has an arg max
            best = tl.where(take, x, best)
            where = tl.where(take, r * S + s, where)
    at = address(m, c, C)
    mask = live[:, None] & (c[None, :] < C)
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=mask)
    if offset_ptr is not None:
        tl.store(offset_ptr + at, where.to(tl.uint8), mask=mask)


@triton.jit
def max_pool2d_backward_kernel(
    dy_ptr, offset_ptr, dx_ptr, rows, C, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, COVER_H: tl.constexpr, COVER_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, live, n, h, w = rows_of_image(tl.program_id(0) * BLOCK_M, rows, H, W, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in range(COVER_H):
        p = (h + PH) // SH - i
        down = h + PH - p * SH
        for j in range(COVER_W):
            q = (w + PW) // SW - j
            right = w + PW - q * SW
            tap = (down // DH) * S + right // DW
            inside = live & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
            inside = inside & (down <= (R - 1) * DH) & (down % DH == 0)
            inside = inside & (right <= (S - 1) * DW) & (right % DW == 0)
            mask = inside[:, None] & (c[None, :] < C)
            at = address((n * P + p) * Q + q, c, C)
            chosen = tl.load(offset_ptr + at, mask=mask, other=0).to(tl.int32)
            # The gradient is read only where it counts.
            total += tl.load(dy_ptr + at, mask=mask & (chosen == tap[:, None]), other=0.0).to(tl.float32)
    mask = live[:, None] & (c[None, :] < C)
    tl.store(dx_ptr + address(m, c, C), total.to(dx_ptr.dtype.element_ty), mask=mask)


def max_pool2d(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool, save_offsets: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, offsets); offsets uint8 of output's shape, empty [0] if not wanted."""
    n, c, h, w = input.shape
    p, q = (
        pool_output_size(size, kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i, size in enumerate((h, w))
    )
    layout = format_of(input)
    y = empty_nhwc(input, (n, c, p, q))
    offsets = empty_nhwc(input, (n, c, p, q), torch.uint8) if save_offsets else None
    if y.numel():
        grid, block_m, block_c = tile(n * p * q, c)
        launch(
            max_pool2d_kernel, grid, nhwc(input), y, offsets, n * p * q, c, h, w, p, q, *kernel_size, *stride,
            *padding, *dilation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
    kept = not_asked(input, torch.uint8) if offsets is None else offsets.contiguous(memory_format=layout)
    return y.contiguous(memory_format=layout), kept


def max_pool2d_backward(
    grad_output: Tensor, offsets: Tensor, input_size: Sequence[int], kernel_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    """grad_input [N, C, *input_size]."""
    n, c, p, q = grad_output.shape
    h, w = input_size
    dx = empty_gradient(grad_output, (n, c, h, w), channels_last)
    if dx.numel():
        grid, block_m, block_c = tile(n * h * w, c)
        cover = [cdiv(dilation[i] * (kernel_size[i] - 1) + 1, stride[i]) for i in (0, 1)]
        launch(
            max_pool2d_backward_kernel, grid, nhwc(grad_output), nhwc(offsets), dx, n * h * w, c, h, w, p, q,
            *kernel_size, *stride, *padding, *dilation, *cover, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
    return dx.contiguous(memory_format=layout_of(channels_last))
