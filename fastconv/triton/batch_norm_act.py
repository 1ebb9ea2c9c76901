"""y = act(batch_norm(x) + residual), training and evaluation.

    y[m, c] = act((x[m, c] - mean[c]) * (invstd[c] * weight[c]) + bias[c] + residual[m, c]),  invstd = 1/sqrt(var + eps)

Shapes: NHWC seen as [M, C], M = N*H*W; weight, bias, running statistics [C] in their own dtype, arithmetic in fp32.
Fused: normalisation, affine map, residual, activation, running statistics, batch counter; nothing but y is written.

Three ways, by M:
- training, M <= FUSED_ROWS: one program owns BLOCK_C channels and does everything: Welford over its M rows, then the
  same rows again (from L1/L2) to write y. One launch, where launches and not bytes bind (batch 4, small maps).
- training, larger M: statistics (batch_norm_stats.py) over row programs x channel tiles, their merge, then the apply
  kernel. Bytes: 2 reads and 1 write of x's size (+ residual).
- evaluation: the apply kernel alone, from the running statistics; its first row of programs writes save_mean and
  save_invstd. Bytes: 1 read, 1 write (+ residual).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .act_bias_backward import tile
from .activation import act
from .batch_norm_stats import count_batch, finish_channel, finish_statistics, statistics, welford_rows
from .common import (
    WARPS,
    cdiv,
    channel_pair,
    empty_nhwc,
    format_of,
    launch,
    next_power_of_2,
    nhwc,
    rows_and_channels,
    vector,
    write_back,
)

# 8 rounds of a [128, 32] tile, each about a memory latency, against two launches saved; an estimate, not measured.
FUSED_ROWS = 1024


@triton.jit
def affine(weight_ptr, bias_ptr, invstd, c, C):
    """(scale, shift) of the channels ``c``: invstd * weight and bias, with 1 and 0 where they are None."""
    scale = invstd
    shift = tl.zeros_like(invstd)
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def preact(x, residual_ptr, at, mask, mean, scale, shift):
    """z = (x - mean) * scale + shift + residual, in this order everywhere: the backward recomputes the same bits."""
    z = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit
def apply_tile(
    x_ptr, residual_ptr, y_ptr, m, end, c, C, mean, scale, shift, ACT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_M)[:, None]
    at = tl.cast(m, tl.int64) * C + (rows * C + c[None, :])
    mask = (rows < end - m) & (c[None, :] < C)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    z = preact(x, residual_ptr, at, mask, mean, scale, shift)
    tl.store(y_ptr + at, act(z, ACT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fused_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, counter_ptr, y_ptr, save_mean_ptr,
    save_invstd_ptr, M, C, momentum, eps,
    CUMULATIVE: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, m2 = welford_rows(x_ptr, 0, M, c, C, BLOCK_M, BLOCK_C)
    invstd = finish_channel(
        mean, m2, M, c, C, running_mean_ptr, running_var_ptr, counter_ptr, momentum, eps, CUMULATIVE
    )
    tl.store(save_mean_ptr + c, mean, mask=c < C)
    tl.store(save_invstd_ptr + c, invstd, mask=c < C)
    scale, shift = affine(weight_ptr, bias_ptr, invstd, c, C)
    for m in range(0, M, BLOCK_M):
        apply_tile(x_ptr, residual_ptr, y_ptr, m, M, c, C, mean, scale, shift, ACT, BLOCK_M)


@triton.jit
def apply_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, running_mean_ptr, running_var_ptr, y_ptr,
    M, C, eps, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """With running statistics mean_ptr and invstd_ptr are written (evaluation), else read."""
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if running_mean_ptr is not None:
        mean = tl.load(running_mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        invstd = 1.0 / tl.sqrt(tl.load(running_var_ptr + c, mask=c < C, other=1.0).to(tl.float32) + eps)
        if pid == 0:
            tl.store(mean_ptr + c, mean, mask=c < C)
            tl.store(invstd_ptr + c, invstd, mask=c < C)
    else:
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
        invstd = tl.load(invstd_ptr + c, mask=c < C, other=0.0)
    scale, shift = affine(weight_ptr, bias_ptr, invstd, c, C)
    apply_tile(x_ptr, residual_ptr, y_ptr, pid * BLOCK_M, M, c, C, mean, scale, shift, ACT, BLOCK_M)


def normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor,
    running_mean: Tensor | None, running_var: Tensor | None, eps: float, activation: str,
) -> Tensor:  # fmt: skip
    """The apply kernel on dense NHWC tensors; with running statistics given it fills ``mean`` and ``invstd``."""
    m, c = rows_and_channels(x)
    block_m, block_c = tile(c)
    y = empty_nhwc(x, x.shape)
    launch(
        apply_kernel, (cdiv(m, block_m), cdiv(c, block_c)), x, residual, weight, bias, mean, invstd, running_mean,
        running_var, y, m, c, eps, ACT=activation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    return y


def fused_tile(rows: int, channels: int) -> tuple[int, int]:
    """[BLOCK_M, BLOCK_C] of the one-launch kernels: 32 channels, so that even 256 of them make 8 programs, and as many
    rows as registers hold (32 elements per thread): few rounds, since each of them waits for memory."""
    block_c = min(32, next_power_of_2(channels))
    return min(4096 // block_c, next_power_of_2(rows)), block_c


def batch_norm_act(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, num_batches_tracked: Tensor | None, training: bool, momentum: float | None, eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, save_mean, save_invstd) of :mod:`fastconv.triton.batch_norm_act`; momentum None = cumulative average."""
    layout = format_of(input)
    m, c = rows_and_channels(input)
    if m * c == 0:
        mean, invstd = (t.zero_() for t in channel_pair(input, c))
        if not training and c:
            mean.copy_(running_mean)
            invstd.copy_(torch.rsqrt(running_var.float() + eps))
        elif num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return torch.empty_like(input), mean, invstd
    x = nhwc(input)
    residual = None if residual is None else nhwc(residual)
    weight, bias = vector(weight), vector(bias)
    given = running_mean, running_var
    running_mean, running_var = vector(running_mean), vector(running_var)
    if training and m > FUSED_ROWS:
        parts = statistics(x, m, c)
        mean, invstd = finish_statistics(parts, m, running_mean, running_var, num_batches_tracked, momentum, eps)
        y = normalise(x, residual, weight, bias, mean, invstd, None, None, eps, activation)
    else:
        mean, invstd = channel_pair(input, c)
        if training:
            factor, cumulative = count_batch(num_batches_tracked, momentum)
            block_m, block_c = fused_tile(m, c)
            y = empty_nhwc(x, x.shape)
            launch(
                fused_kernel, (cdiv(c, block_c),), x, residual, weight, bias, running_mean, running_var,
                num_batches_tracked, y, mean, invstd, m, c, factor, eps,
                CUMULATIVE=cumulative, ACT=activation, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
            )  # fmt: skip
        else:
            y = normalise(x, residual, weight, bias, mean, invstd, running_mean, running_var, eps, activation)
    if training:
        write_back(given[0], running_mean)
        write_back(given[1], running_var)
    return y.contiguous(memory_format=layout), mean, invstd
