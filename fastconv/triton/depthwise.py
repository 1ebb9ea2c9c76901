"""Depthwise convolution (groups = C, J outputs per channel): forward, data gradient, weight gradient, without tl.dot.

    y[n,p,q,cJ+j]  = sum_{r,s} x[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c] * w[cJ+j, r, s]
    dx[n,h,w,c]    = sum_{j,r,s} dy[n, (h + ph - r*dh)/sh, (w + pw - s*dw)/sw, cJ+j] * w[cJ+j, r, s]  where both divide
    dw[cJ+j, r, s] = sum_{n,p,q} dy[n,p,q,cJ+j] * x[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c]

An output has R*S products and nothing to share between channels: bound by memory, so tensor cores (which would run at
1/16 of their columns) are left out. NHWC keeps channels on neighbouring lanes: all accesses are contiguous.
Mapping: forward and data gradient: a program owns [BLOCK_M positions, BLOCK_C channels] and loops over the taps, the
same rows being read from L1; positions are decoded once. Weight gradient: program (rows, channels, tap) sums its rows;
row programs are added in a fixed order: deterministic. Stride, dilation and J are compile-time constants.
Accumulation fp32. Epilogue of the forward: scale, shift, residual, preact, activation, as in conv_gather.py.
Bytes: x and y once from memory, R*S times from L1/L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .act_bias_backward import row_split, sum_partials
from .activation import act
from .common import WARPS, cdiv, launch, next_power_of_2
from .conv_config import Problem
from .pooling import address, rows_of_image, tile


@triton.jit
def depthwise_kernel(
    x_ptr, w_ptr, y_ptr, preact_ptr, residual_ptr, scale_ptr, shift_ptr, rows, C, K, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, J: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, live, n, p, q = rows_of_image(tl.program_id(0) * BLOCK_M, rows, P, Q, BLOCK_M)
    k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = k // J
    k_mask = k < K
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in range(R):
        h = p * SH - PH + r * DH
        for s in range(S):
            w = q * SW - PW + s * DW
            inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            mask = inside[:, None] & k_mask[None, :]
            x = tl.load(x_ptr + address((n * H + h) * W + w, c, C), mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(w_ptr + k * (R * S) + (r * S + s), mask=k_mask, other=0.0).to(tl.float32)
            acc += x * weight[None, :]
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    at = address(m, k, K)
    mask = live[:, None] & k_mask[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if preact_ptr is not None:
        tl.store(preact_ptr + at, acc.to(preact_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + at, act(acc, ACT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_dgrad_kernel(
    dy_ptr, w_ptr, dx_ptr, rows, C, K, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m, live, n, h, w = rows_of_image(tl.program_id(0) * BLOCK_M, rows, H, W, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in range(R):
        down = h + PH - r * DH
        for s in range(S):
            right = w + PW - s * DW
            p, q = down // SH, right // SW
            inside = live & (down >= 0) & (down % SH == 0) & (p < P) & (right >= 0) & (right % SW == 0) & (q < Q)
            mask = inside[:, None] & (c < C)[None, :]
            for j in range(J):
                k = c * J + j
                dy = tl.load(dy_ptr + address((n * P + p) * Q + q, k, K), mask=mask, other=0.0).to(tl.float32)
                weight = tl.load(w_ptr + k * (R * S) + (r * S + s), mask=c < C, other=0.0).to(tl.float32)
                acc += dy * weight[None, :]
    mask = live[:, None] & (c < C)[None, :]
    tl.store(dx_ptr + address(m, c, C), acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_wgrad_kernel(
    dy_ptr, x_ptr, dw_ptr, rows, ROWS, C, K, H, W, P, Q,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows [i * ROWS, (i + 1) * ROWS) of one tap; the decode divides once per BLOCK_M rows, beside 2 loads per row."""
    k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(2) // S
    s = tl.program_id(2) % S
    start = tl.program_id(0) * ROWS
    end = tl.minimum(start + ROWS, rows)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m0 in range(start, end, BLOCK_M):
        m, live, n, p, q = rows_of_image(m0, end, P, Q, BLOCK_M)
        h = p * SH - PH + r * DH
        w = q * SW - PW + s * DW
        inside = live & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        mask = inside[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + address((n * H + h) * W + w, k // J, C), mask=mask, other=0.0).to(tl.float32)
        acc += x * tl.load(dy_ptr + address(m, k, K), mask=mask, other=0.0).to(tl.float32)
    at = (tl.program_id(0) * K + k) * (R * S) + tl.program_id(2)
    tl.store(dw_ptr + at, tl.sum(acc, axis=0).to(dw_ptr.dtype.element_ty), mask=k < K)


def _geometry(a: Problem) -> tuple[int, ...]:
    return (a.r, a.s, *a.stride, *a.padding, *a.dilation, a.kg)


def depthwise_fprop(
    x: Tensor, weight: Tensor, y: Tensor, a: Problem, *, scale: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None, preact: Tensor | None = None, activation: str = "identity",
) -> None:  # fmt: skip
    """y = act(conv(x) * scale + shift + residual) on dense NHWC tensors; weight memory [K, R, S]."""
    grid, block_m, block_c = tile(a.n * a.p * a.q, a.k)
    launch(
        depthwise_kernel, grid, x, weight, y, preact, residual, scale, shift, a.n * a.p * a.q, a.c, a.k, a.h, a.w,
        a.p, a.q, *_geometry(a), activation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip


def depthwise_dgrad(dy: Tensor, weight: Tensor, dx: Tensor, a: Problem) -> None:
    grid, block_m, block_c = tile(a.n * a.h * a.w, a.c)
    launch(
        depthwise_dgrad_kernel, grid, dy, weight, dx, a.n * a.h * a.w, a.c, a.k, a.h, a.w, a.p, a.q, *_geometry(a),
        BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip


def depthwise_wgrad(dy: Tensor, x: Tensor, dw: Tensor, a: Problem) -> None:
    rows, taps = a.n * a.p * a.q, a.r * a.s
    block_c = min(64, next_power_of_2(a.k))
    block_m = 2048 // block_c
    parts, each = row_split(rows, a.k * taps, block_m, block_c)
    out = dw if parts == 1 else torch.empty(parts, dw.numel(), dtype=torch.float32, device=dw.device)
    launch(
        depthwise_wgrad_kernel, (parts, cdiv(a.k, block_c), taps), dy, x, out, rows, each, a.c, a.k, a.h, a.w,
        a.p, a.q, *_geometry(a), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    if parts > 1:
        sum_partials(out, dw)
