"""What the pooling kernels share: output sizes, the row decode, the launch shape."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cdiv, next_power_of_2


@triton.jit
def rows_of_image(first, rows, HEIGHT, WIDTH, BLOCK_M: tl.constexpr):
    """(row numbers, row mask, n, i, j) of BLOCK_M rows of an [N, HEIGHT, WIDTH] map; a program divides only here."""
    m = first + tl.arange(0, BLOCK_M)
    j = m % WIDTH
    rest = m // WIDTH
    return m, m < rows, rest // HEIGHT, rest % HEIGHT, j


@triton.jit
def address(row, c, C):
    """Element offsets [rows, channels], 64 bits: a row number times C can pass 2^31."""
    return tl.cast(row, tl.int64)[:, None] * C + c[None, :]


def pool_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """With ceil_mode the last window must start inside the input or the left padding."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = cdiv(span, stride) + 1
    return out - 1 if (out - 1) * stride >= size + padding else out


def tile(rows: int, channels: int) -> tuple[tuple[int, int], int, int]:
    """(grid, BLOCK_M, BLOCK_C): 2048 elements per program, 16 per thread: the gathers need threads, not registers."""
    block_c = min(64, next_power_of_2(channels))
    block_m = min(2048 // block_c, next_power_of_2(rows))
    return (cdiv(rows, block_m), cdiv(channels, block_c)), block_m, block_c
