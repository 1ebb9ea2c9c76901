"""Convolution forward (fprop) and data gradient (dgrad): one implicit GEMM, NHWC, tensor cores, no im2col buffer.

    fprop  y[n,p,q,k]  = sum_{r,s,c} x[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c] * w[k,r,s,c]
    dgrad  dx[n,h,w,c] = sum_{r,s,k} dy[n, (h + ph - r*dh)/sh, (w + pw - s*dw)/sw, k] * w[k,r,s,c]   where both divide

Both gather: a row of the result (a position of a map) sums, over taps and channels, rows of another map times weights.
The GEMM view is M = N*P*Q rows, N = K columns, reduction K = R*S*C (dgrad: N*H*W, C, R*S*K).

dgrad with stride: positions with h = a (mod sh), w = b (mod sw) form a phase (a, b). Inside a phase only the taps
r = r0 (mod sh / gcd(sh, dh)) divide, so the phase is a stride-1 gather over those taps: row hh + f - t*step with
h = hh*sh + a, r = r0 + t*rstep. No tap falls into a hole; a phase without taps writes zeros. Phases are a grid axis.

Mapping: program = (row tile, column tile) of one group and phase, column tiles fastest so that neighbours share the
gathered rows in L2; 4 warps. The reduction is one flat loop over (tap row, tap column, channel chunk): the three
counters are carried and wrapped by compare and select, never divided; Triton pipelines the loads with cp.async.
Row-tile orders: (n, p, q) in general; POSITIONS: the tile is BLOCK_M images of one position, so the taps inside the
image are a range known before the loop and a padded 3x3 filter on a 1x1 map costs 1 tap, on a 2x2 map 4 of 9.
FLAT (few channels: an image's 3): the reduction index is tap * C + c, decoded by compile-time divisors.

Prologue (room for the previous layer's batch norm): x' = act_in(x * in_scale[c] + in_shift[c]), padding stays zero.
Epilogue: v = acc * scale[k] + shift[k] + residual; preact <- v; y <- act(v). Statistics: the tile's mean and M2 per
channel of v as rounded to y's dtype, merged later (batch_norm_stats.py).
Accumulation fp32; operands fp16, bf16, fp32 as TF32 or exact (PRECISION). 2*M*N*K FLOPs on live taps; bytes: every
gathered element once per column tile and tap from L2, once from memory, plus the result.
Not used here: TMA. Its im2col mode is not reachable from Triton; the 1x1 stride-1 case, which a tiled descriptor fits,
is conv_pointwise.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import act


@triton.jit
def _phase(a, SIZE, GATHERED, R: tl.constexpr, ST: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
           RSTEP: tl.constexpr, DGRAD: tl.constexpr):  # fmt: skip
    """(positions, taps, first filter row, gathered row of position 0 at tap 0) of phase ``a`` along one side."""
    if DGRAD:
        positions = (SIZE - a + ST - 1) // ST
        first = tl.full((), R, tl.int32)
        for t in tl.static_range(RSTEP):
            # The smallest t wins: the search runs downwards.
            hit = (a + PAD - (RSTEP - 1 - t) * DIL) % ST == 0
            first = tl.where(hit, RSTEP - 1 - t, first)
        taps = tl.where(first < R, (R - first + RSTEP - 1) // RSTEP, 0)
        base = (a + PAD - first * DIL) // ST
    else:
        positions = SIZE
        first = tl.full((), 0, tl.int32)
        taps = tl.full((), R, tl.int32)
        base = tl.full((), -PAD, tl.int32)
    return positions, taps, first, base


@triton.jit
def _live(low, high, taps, SIZE, STEP: tl.constexpr):
    """[first, end) of the taps for which rows low + t*STEP .. high + t*STEP meet [0, SIZE)."""
    if STEP > 0:
        first = (tl.maximum(-high, 0) + STEP - 1) // STEP
        room = SIZE - 1 - low
        end = tl.where(room < 0, 0, room // STEP + 1)
    else:
        first = (tl.maximum(low - SIZE + 1, 0) - STEP - 1) // (-STEP)
        end = tl.where(high < 0, 0, high // (-STEP) + 1)
    end = tl.minimum(end, taps)
    return tl.minimum(first, end), end


@triton.jit
def write_result(
    acc, at, channel, col_mask, live, pid_m, K, out_ptr, preact_ptr, residual_ptr, scale_ptr, shift_ptr, mean_ptr,
    m2_ptr, count_ptr, ACT: tl.constexpr,
):  # fmt: skip
    """The epilogue: acc [rows, columns] to the places ``at``; statistics of this row tile into their row ``pid_m``."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channel, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channel, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    mask = live[:, None] & col_mask[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if preact_ptr is not None:
        tl.store(preact_ptr + at, acc.to(preact_ptr.dtype.element_ty), mask=mask)
    y = act(acc, ACT).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y, mask=mask)
    if mean_ptr is not None:
        count = tl.sum(live.to(tl.float32), axis=0)
        v32 = y.to(tl.float32)
        mean = tl.sum(tl.where(live[:, None], v32, 0.0), axis=0) / count
        apart = tl.where(live[:, None], v32 - mean[None, :], 0.0)
        tl.store(mean_ptr + pid_m * K + channel, mean, mask=col_mask)
        tl.store(m2_ptr + pid_m * K + channel, tl.sum(apart * apart, axis=0), mask=col_mask)
        tl.store(count_ptr + pid_m, count)


@triton.jit
def conv_gather_kernel(
    in_ptr, w_ptr, out_ptr, preact_ptr, residual_ptr, scale_ptr, shift_ptr, in_scale_ptr, in_shift_ptr,
    mean_ptr, m2_ptr, count_ptr,
    N, H, W, C, OH, OW, K,  # gathered map [N, H, W, C], written map [N, OH, OW, K]
    CG, KG, W_RED, W_OUT, W_TAP, W_GROUP,  # channels per group: gathered, written; strides of the weight
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, RSTEP: tl.constexpr, SSTEP: tl.constexpr,
    DGRAD: tl.constexpr, POSITIONS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, EIGHTS: tl.constexpr,
    ACT: tl.constexpr, IN_ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if EIGHTS:
        # Multiples of 8, which the compiler sees here: of an argument it knows no more than divisibility by 16, and
        # without any it loads 2-byte elements one by one and spills their addresses.
        C, CG, K, KG = C // 8 * 8, CG // 8 * 8, K // 8 * 8, KG // 8 * 8
        W_TAP = W_TAP // 8 * 8
        W_GROUP = W_GROUP // 8 * 8
        if DGRAD:
            W_RED = W_RED // 8 * 8
        else:
            W_OUT = W_OUT // 8 * 8
    column_tiles = tl.cdiv(KG, BLOCK_N)
    pid_m = tl.program_id(0) // column_tiles
    cols = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(2)
    phase_h = tl.program_id(1) // SW
    phase_w = tl.program_id(1) % SW
    # How a gathered row moves with the position (MOVE) and with the tap (STEP).
    MOVE_H: tl.constexpr = 1 if DGRAD else SH
    MOVE_W: tl.constexpr = 1 if DGRAD else SW
    STEP_H: tl.constexpr = -(RSTEP * DH // SH) if DGRAD else DH
    STEP_W: tl.constexpr = -(SSTEP * DW // SW) if DGRAD else DW
    NO_BORDER: tl.constexpr = R == 1 and S == 1 and PH == 0 and PW == 0 and not DGRAD
    high, taps_h, r0, base_h = _phase(phase_h, OH, H, R, SH, PH, DH, RSTEP, DGRAD)
    wide, taps_w, s0, base_w = _phase(phase_w, OW, W, S, SW, PW, DW, SSTEP, DGRAD)

    # The rows of this tile: image n, position (i, j) of the phase.
    lanes = tl.arange(0, BLOCK_M)
    if POSITIONS:
        image_tiles = tl.cdiv(N, BLOCK_M)
        place = pid_m // image_tiles
        n = (pid_m % image_tiles) * BLOCK_M + lanes
        i = place // tl.maximum(wide, 1)
        j = place % tl.maximum(wide, 1)
        if i >= high:
            return
        live = n < N
        u_first, u_end = _live(base_h + i * MOVE_H, base_h + i * MOVE_H, taps_h, H, STEP_H)
        v_first, v_end = _live(base_w + j * MOVE_W, base_w + j * MOVE_W, taps_w, W, STEP_W)
    else:
        m = pid_m * BLOCK_M + lanes
        rows = N * high * wide
        if pid_m * BLOCK_M >= rows:
            return
        live = m < rows
        j = m % wide
        i = (m // wide) % high
        n = m // (wide * high)
        u_first, u_end = _live(base_h, base_h + (high - 1) * MOVE_H, taps_h, H, STEP_H)
        v_first, v_end = _live(base_w, base_w + (wide - 1) * MOVE_W, taps_w, W, STEP_W)
    row_h = i * MOVE_H + base_h
    row_w = j * MOVE_W + base_w
    n_wide = n.to(tl.int64) if WIDE else n
    at_row = ((n_wide * H + row_h) * W + row_w) * C + group * CG
    w_ptr += group * W_GROUP
    chunk = tl.arange(0, BLOCK_K)
    col_mask = cols < KG
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    if FLAT:
        # W_RED is 1 and W_TAP is CG here, so the weight's column is the reduction index itself.
        for k0 in range(0, R * S * CG, BLOCK_K):
            kk = k0 + chunk
            tap = kk // CG
            c = kk % CG
            th = (tap // S) * DH
            tw = (tap % S) * DW
            rh = row_h[:, None] + th[None, :]
            rw = row_w[:, None] + tw[None, :]
            mask = live[:, None] & (kk < R * S * CG)[None, :] & (rh >= 0) & (rh < H) & (rw >= 0) & (rw < W)
            a = tl.load(in_ptr + at_row[:, None] + ((th * W + tw) * C + c)[None, :], mask=mask, other=0.0)
            if in_scale_ptr is not None:
                in_scale = tl.load(in_scale_ptr + group * CG + c)
                in_shift = tl.load(in_shift_ptr + group * CG + c)
                x = act(a.to(tl.float32) * in_scale[None, :] + in_shift[None, :], IN_ACT)
                a = tl.where(mask, x, 0.0).to(a.dtype)
            w_mask = (kk < R * S * CG)[:, None] & col_mask[None, :]
            b = tl.load(w_ptr + kk[:, None] + (cols * W_OUT)[None, :], mask=w_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        w_at = (chunk * W_RED)[:, None] + (cols * W_OUT)[None, :]
        u = u_first
        v = v_first
        c0 = tl.full((), 0, tl.int32)
        for _ in range(0, (u_end - u_first) * (v_end - v_first) * tl.cdiv(CG, BLOCK_K)):
            c = c0 + chunk
            inside = live
            if not (POSITIONS or NO_BORDER):
                rh = row_h + u * STEP_H
                rw = row_w + v * STEP_W
                inside = live & (rh >= 0) & (rh < H) & (rw >= 0) & (rw < W)
            mask = inside[:, None] & (c < CG)[None, :]
            moved = (u * STEP_H * W + v * STEP_W) * C + c0
            a = tl.load(in_ptr + (at_row + moved)[:, None] + chunk[None, :], mask=mask, other=0.0)
            if in_scale_ptr is not None:
                in_scale = tl.load(in_scale_ptr + group * CG + c, mask=c < CG, other=0.0)
                in_shift = tl.load(in_shift_ptr + group * CG + c, mask=c < CG, other=0.0)
                x = act(a.to(tl.float32) * in_scale[None, :] + in_shift[None, :], IN_ACT)
                a = tl.where(mask, x, 0.0).to(a.dtype)
            tap = (r0 + u * RSTEP) * S + s0 + v * SSTEP
            w_mask = (c < CG)[:, None] & col_mask[None, :]
            b = tl.load(w_ptr + tap * W_TAP + c0 * W_RED + w_at, mask=w_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            c0 += BLOCK_K
            wrap = c0 >= CG
            c0 = tl.where(wrap, 0, c0)
            v = tl.where(wrap, v + 1, v)
            wrap = v >= v_end
            v = tl.where(wrap, v_first, v)
            u = tl.where(wrap, u + 1, u)

    # Epilogue. A phase's position (i, j) is position (i*SH + a, j*SW + b) of the written map.
    if DGRAD:
        i = i * SH + phase_h
        j = j * SW + phase_w
    channel = group * KG + cols
    at = ((n_wide * OH + i) * OW + j)[:, None] * K + channel[None, :]
    write_result(
        acc, at, channel, col_mask, live, pid_m, K, out_ptr, preact_ptr, residual_ptr, scale_ptr, shift_ptr, mean_ptr,
        m2_ptr, count_ptr, ACT,
    )  # fmt: skip
