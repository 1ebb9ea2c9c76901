"""1x1 convolutions of stride 1, forward and data gradient, as a plain GEMM whose tiles come by TMA (sm_90 and later).

    fprop  y[m,k]  = sum_c x[m,c] * w[k,c]        dgrad  dx[m,c] = sum_k dy[m,k] * w[k,c]        m = (n, h, w)

33 of ResNet50's 53 convolutions. NHWC makes the gathered map a matrix [M, C], so a tiled descriptor fits it and the
weight alike: one thread asks for a whole tile, no address or mask per element is computed, what lies outside is zero.
16-bit dtypes, channels in multiples of 8 (a row of the descriptor begins at 16 bytes), one group.

Mapping: program = (row tile, column tile), column tiles fastest; 4 warps, one warpgroup. The reduction is one loop over
channel chunks, loads of later chunks in flight (num_stages). Epilogue and statistics are conv_gather's; there is no
prologue: what TMA brings goes to wgmma without passing through registers.
Accumulation fp32. 2*M*N*K FLOPs; bytes: both matrices once per tile of the other side from L2, the result once.
Not run on a GPU yet, so a tile of this kernel is a candidate for the tuner and never the default.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_gather import write_result


@triton.jit
def conv_pointwise_kernel(
    out_ptr, in_desc, w_desc, preact_ptr, residual_ptr, scale_ptr, shift_ptr, mean_ptr, m2_ptr, count_ptr,
    M, N, K,  # rows, columns of the result, reduction
    DGRAD: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """in: [M, K] in blocks [BLOCK_M, BLOCK_K]; w: [N, K] in [BLOCK_N, BLOCK_K], DGRAD: [K, N] in [BLOCK_K, BLOCK_N]."""
    column_tiles = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // column_tiles
    row0 = pid_m * BLOCK_M
    col0 = (tl.program_id(0) % column_tiles) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = in_desc.load([row0, k0])
        b = w_desc.load([k0, col0]) if DGRAD else w_desc.load([col0, k0]).T
        acc = tl.dot(a, b, acc)
    rows = row0 + tl.arange(0, BLOCK_M)
    channel = col0 + tl.arange(0, BLOCK_N)
    live, col_mask = rows < M, channel < N
    wide = rows.to(tl.int64) if WIDE else rows
    write_result(
        acc, wide[:, None] * N + channel[None, :], channel, col_mask, live, pid_m, N, out_ptr, preact_ptr, residual_ptr,
        scale_ptr, shift_ptr, mean_ptr, m2_ptr, count_ptr, ACT,
    )  # fmt: skip
