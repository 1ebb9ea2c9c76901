"""Backward of y = act(z), z = xhat * weight + bias + residual, xhat = (x - mean) * invstd, M = N*H*W samples.

    dz = dy * act'                act' from y, or where there is none from z, recomputed from x and the residual
    grad_residual = dz            grad_bias = sum_m dz            grad_weight = sum_m dz * xhat
    training:    dx = weight * invstd * (dz - grad_bias / M - xhat * grad_weight / M)      (Ioffe & Szegedy 2015)
    evaluation:  dx = weight * invstd * dz

Shapes: NHWC seen as [M, C]. Accumulation fp32, row partials added in a fixed order: deterministic.

Two ways, as in the forward:
- M <= FUSED_ROWS: one program owns BLOCK_C channels, sums over its rows, then walks them again to write dx.
- larger M: the reduce kernel (row programs x channel tiles; it writes grad_residual when wanted), the sum of the
  partials, the apply kernel. Where grad_residual was written the apply kernel reads it instead of dy and y:
  3 reads + 1 write, then 2 reads + 1 write of x's size; without it 3 reads, then 3 reads + 1 write.
- evaluation with frozen affine parameters needs no sums: the apply kernel alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .act_bias_backward import row_split, tile
from .activation import act_backward, needs_preact
from .batch_norm_act import FUSED_ROWS, affine, fused_tile, preact
from .common import WARPS, cdiv, empty_nhwc, format_of, launch, nhwc, not_asked, rows_and_channels, vector


@triton.jit
def _load_tile(
    dy_ptr, x_ptr, y_ptr, residual_ptr, m, end, c, C, mean, scale, shift, ACT: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(offsets, mask, x - mean, dz) of one tile; dz is zero where the mask is."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    at = tl.cast(m, tl.int64) * C + (rows * C + c[None, :])
    mask = (rows < end - m) & (c[None, :] < C)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ACT == "identity":
        dz = dy
    elif y_ptr is not None:
        dz = act_backward(dy, tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32), ACT)
    else:
        dz = act_backward(dy, preact(x, residual_ptr, at, mask, mean, scale, shift), ACT)
    return at, mask, x - mean[None, :], tl.where(mask, dz, 0.0)


@triton.jit
def _sums(
    dy_ptr, x_ptr, y_ptr, residual_ptr, dz_ptr, start, end, c, C, mean, invstd, scale, shift,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(sum dz, sum dz * xhat) over rows [start, end); writes dz where grad_residual is wanted."""
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m in range(start, end, BLOCK_M):
        at, mask, centred, dz = _load_tile(
            dy_ptr, x_ptr, y_ptr, residual_ptr, m, end, c, C, mean, scale, shift, ACT, BLOCK_M
        )
        sum_dz += dz
        sum_dz_x += dz * centred
        if dz_ptr is not None:
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    return tl.sum(sum_dz, axis=0), tl.sum(sum_dz_x, axis=0) * invstd


@triton.jit
def _apply(
    dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr, m, end, c, C, M, mean, invstd, scale, shift, sum_dz, sum_dz_x,
    TRAINING: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    at, mask, centred, dz = _load_tile(
        dy_ptr, x_ptr, y_ptr, residual_ptr, m, end, c, C, mean, scale, shift, ACT, BLOCK_M
    )
    if dz_ptr is not None:
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        if TRAINING:
            dz -= (sum_dz[None, :] + centred * (invstd * sum_dz_x)[None, :]) / (M * 1.0)
        tl.store(dx_ptr + at, (dz * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _channel(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C):
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    invstd = tl.load(invstd_ptr + c, mask=c < C, other=0.0)
    scale, shift = affine(weight_ptr, bias_ptr, invstd, c, C)
    return mean, invstd, scale, shift


@triton.jit
def _store_affine(sum_dz, sum_dz_x, dweight_ptr, dbias_ptr, c, C):
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, sum_dz_x.to(dweight_ptr.dtype.element_ty), mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_dz.to(dbias_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def fused_backward_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, dx_ptr, dz_ptr, dweight_ptr,
    dbias_ptr, M, C,
    TRAINING: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, invstd, scale, shift = _channel(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    sum_dz, sum_dz_x = _sums(
        dy_ptr, x_ptr, y_ptr, residual_ptr, dz_ptr, 0, M, c, C, mean, invstd, scale, shift, ACT, BLOCK_M, BLOCK_C
    )
    _store_affine(sum_dz, sum_dz_x, dweight_ptr, dbias_ptr, c, C)
    if dx_ptr is not None:
        for m in range(0, M, BLOCK_M):
            _apply(
                dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, None, m, M, c, C, M, mean, invstd, scale, shift, sum_dz,
                sum_dz_x, TRAINING, ACT, BLOCK_M,
            )  # fmt: skip


@triton.jit
def reduce_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, dz_ptr, partial_ptr, M, C, ROWS,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, invstd, scale, shift = _channel(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    start = pid * ROWS
    sum_dz, sum_dz_x = _sums(
        dy_ptr, x_ptr, y_ptr, residual_ptr, dz_ptr, start, tl.minimum(start + ROWS, M), c, C, mean, invstd, scale,
        shift, ACT, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    tl.store(partial_ptr + pid * 2 * C + c, sum_dz, mask=c < C)
    tl.store(partial_ptr + pid * 2 * C + C + c, sum_dz_x, mask=c < C)


@triton.jit
def finish_kernel(
    partial_ptr, sums_ptr, dweight_ptr, dbias_ptr, PARTS, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """partial [PARTS, 2, C] -> sums [2, C] fp32, grad_weight, grad_bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.arange(0, BLOCK_P)[:, None]
    sum_dz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p in range(0, PARTS, BLOCK_P):
        mask = (parts < PARTS - p) & (c[None, :] < C)
        at = (p + parts) * 2 * C + c[None, :]
        sum_dz += tl.load(partial_ptr + at, mask=mask, other=0.0)
        sum_dz_x += tl.load(partial_ptr + at + C, mask=mask, other=0.0)
    total, total_x = tl.sum(sum_dz, axis=0), tl.sum(sum_dz_x, axis=0)
    tl.store(sums_ptr + c, total, mask=c < C)
    tl.store(sums_ptr + C + c, total_x, mask=c < C)
    _store_affine(total, total_x, dweight_ptr, dbias_ptr, c, C)


@triton.jit
def apply_backward_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, sums_ptr, dx_ptr, dz_ptr, M, C,
    TRAINING: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, invstd, scale, shift = _channel(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    sum_dz = tl.zeros((BLOCK_C,), tl.float32)
    sum_dz_x = sum_dz
    if sums_ptr is not None:  # else nobody wants dx, or nothing is subtracted from it
        sum_dz = tl.load(sums_ptr + c, mask=c < C, other=0.0)
        sum_dz_x = tl.load(sums_ptr + C + c, mask=c < C, other=0.0)
    _apply(
        dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr, tl.program_id(0) * BLOCK_M, M, c, C, M, mean, invstd,
        scale, shift, sum_dz, sum_dz_x, TRAINING, ACT, BLOCK_M,
    )  # fmt: skip


def batch_norm_act_backward(
    grad_output: Tensor, input: Tensor, output: Tensor | None, residual: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, mean: Tensor, invstd: Tensor, training: bool, activation: str, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_input, grad_residual, grad_weight, grad_bias); what is not wanted is an empty [0] tensor."""
    want_input, want_residual, want_weight, want_bias = output_mask
    layout = format_of(input)
    m, c = rows_and_channels(input)
    affine_like = mean if weight is None else weight
    allocate = torch.empty if m else torch.zeros
    dweight = allocate(c, dtype=affine_like.dtype, device=input.device) if want_weight else None
    dbias = allocate(c, dtype=affine_like.dtype, device=input.device) if want_bias else None
    dx = empty_nhwc(input, input.shape) if want_input else None
    dz = empty_nhwc(input, input.shape) if want_residual else None
    if m * c and any(output_mask):
        from_input = needs_preact(activation) or output is None
        y = None if from_input or activation == "identity" else nhwc(output)
        residual = nhwc(residual) if from_input and residual is not None else None
        tensors = (nhwc(grad_output), nhwc(input), y, residual, *map(vector, (weight, bias, mean, invstd)))
        _run(tensors, dx, dz, dweight, dbias, m, c, training, activation)
    grads = [not_asked(input) if g is None else g.contiguous(memory_format=layout) for g in (dx, dz)]
    return (*grads, *(not_asked(input) if g is None else g for g in (dweight, dbias)))


def _run(tensors, dx, dz, dweight, dbias, m, c, training, activation) -> None:
    need_sums = dweight is not None or dbias is not None or (training and dx is not None)
    if need_sums and m <= FUSED_ROWS:
        block_m, block_c = fused_tile(m, c)
        launch(
            fused_backward_kernel, (cdiv(c, block_c),), *tensors, dx, dz, dweight, dbias, m, c,
            TRAINING=training, ACT=activation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
        return
    block_m, block_c = tile(c)
    sums = None
    if need_sums:
        parts, each = row_split(m, c, block_m, block_c)
        partial = torch.empty(parts, 2, c, dtype=torch.float32, device=tensors[0].device)
        sums = torch.empty(2, c, dtype=torch.float32, device=partial.device)
        launch(
            reduce_kernel, (parts, cdiv(c, block_c)), *tensors, dz, partial, m, c, each,
            ACT=activation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
        launch(
            finish_kernel, (cdiv(c, 32),), partial, sums, dweight, dbias, parts, c,
            BLOCK_P=32, BLOCK_C=32, num_warps=WARPS,
        )  # fmt: skip
        if dz is not None:
            # From here on dz is the gradient that comes in, and the activation is behind us.
            tensors = (dz, tensors[1], None, None, *tensors[4:])
            activation, dz = "identity", None
    if dx is not None or dz is not None:
        launch(
            apply_backward_kernel, (cdiv(m, block_m), cdiv(c, block_c)), *tensors, sums, dx, dz, m, c,
            TRAINING=training, ACT=activation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
        )  # fmt: skip
