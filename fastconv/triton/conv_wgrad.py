"""Convolution weight gradient: dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] * x[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c].

A GEMM per tap: rows K, columns C, reduction over the positions (n, p, q). For a tap only the positions whose input lies
inside the image are walked (a rectangle per tap, found before the loop): nothing is masked for the border, and a tap
that never meets the image (8 of 9 on a 1x1 map) writes zeros and is done.

Mapping: program = (K tile x C tile, tap, split x group), 4 warps. The reduction walks BLOCK_R positions at a time; each
lane carries its (n, p, q) and moves on by compare and subtract, never by division. FLAT (few channels): the columns are
tap * C + c, decoded once, over all positions with masks; dy is then read once and not once per tap.
Split-K: split i sums its share of the positions into partial[i] in fp32; the partials are added in a fixed order:
deterministic, no atomics. One split writes dw itself.
Accumulation fp32. 2*N*P*Q*K*C FLOPs per live tap; bytes: dy and x once per tap and tile from L2, dw, and
8 * splits * |w| bytes of partials.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _positions(tap, SIZE, OUT, ST: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr):
    """[first, end) of the output positions whose input at ``tap`` lies in [0, SIZE)."""
    first = (tl.maximum(PAD - tap * DIL, 0) + ST - 1) // ST
    room = SIZE - 1 + PAD - tap * DIL
    end = tl.minimum(tl.where(room < 0, 0, room // ST + 1), OUT)
    return tl.minimum(first, end), end


@triton.jit
def conv_wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr, N, H, W, C, P, Q, K, CG, KG, SPLITS, WEIGHTS,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    if EIGHTS:  # as in conv_gather.py
        C, CG, K, KG = C // 8 * 8, CG // 8 * 8, K // 8 * 8, KG // 8 * 8
    columns = R * S * CG if FLAT else CG
    column_tiles = tl.cdiv(columns, BLOCK_N)
    k = (tl.program_id(0) // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2) % SPLITS
    group = tl.program_id(2) // SPLITS
    k_mask, col_mask = k < KG, col < columns

    if FLAT:
        tap = col // CG
        c = col % CG
        tap_h, tap_w = (tap // S) * DH, (tap % S) * DW
        p_first = tl.full((), 0, tl.int32)
        q_first = p_first
        high, wide = p_first + P, p_first + Q
        moved = (tap_h * W + tap_w) * C + c
    else:
        tap = tl.program_id(1)
        r, s = tap // S, tap % S
        p_first, p_end = _positions(r, H, P, SH, PH, DH)
        q_first, q_end = _positions(s, W, Q, SW, PW, DW)
        high, wide = p_end - p_first, q_end - q_first
        moved = (r * DH * W + s * DW) * C + col

    # This split's share of the N * high * wide positions, in whole chunks.
    total = N * high * wide
    share = tl.cdiv(tl.cdiv(total, BLOCK_R), SPLITS) * BLOCK_R
    begin = split * share
    end = tl.minimum(begin + share, total)
    m = begin + tl.arange(0, BLOCK_R)
    per_row, per_image = tl.maximum(wide, 1), tl.maximum(high * wide, 1)
    q = m % per_row
    p = (m // per_row) % tl.maximum(high, 1)
    n = m // per_image
    next_q = BLOCK_R % per_row
    next_p = (BLOCK_R // per_row) % tl.maximum(high, 1)
    next_n = BLOCK_R // per_image

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m0 in range(begin, end, BLOCK_R):
        live = tl.arange(0, BLOCK_R) < end - m0
        n_wide = n.to(tl.int64) if WIDE else n
        at_dy = ((n_wide * P + p + p_first) * Q + q + q_first) * K + group * KG
        h0 = (p + p_first) * SH - PH
        w0 = (q + q_first) * SW - PW
        at_x = ((n_wide * H + h0) * W + w0) * C + group * CG
        mask = live[:, None] & col_mask[None, :]
        if FLAT:
            rh = h0[:, None] + tap_h[None, :]
            rw = w0[:, None] + tap_w[None, :]
            mask = mask & (rh >= 0) & (rh < H) & (rw >= 0) & (rw < W)
        dy = tl.load(dy_ptr + at_dy[:, None] + k[None, :], mask=live[:, None] & k_mask[None, :], other=0.0)
        x = tl.load(x_ptr + at_x[:, None] + moved[None, :], mask=mask, other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
        q += next_q
        carry = q >= wide
        q = tl.where(carry, q - wide, q)
        p = tl.where(carry, p + next_p + 1, p + next_p)
        carry = p >= high
        p = tl.where(carry, p - high, p)
        n = tl.where(carry, n + next_n + 1, n + next_n)

    # dw is [K, R, S, CG] with the group's rows together.
    if FLAT:
        at = (group * KG + k)[:, None] * columns + col[None, :]
    else:
        at = ((group * KG + k)[:, None] * (R * S) + tap) * CG + col[None, :]
    dw_ptr += tl.cast(split, tl.int64) * WEIGHTS
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=k_mask[:, None] & col_mask[None, :])
