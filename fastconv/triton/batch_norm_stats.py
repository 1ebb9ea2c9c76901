"""Per-channel mean and variance of an NHWC tensor, fp32, without cancellation.

    mean = sum_m x / M      M2 = sum_m (x - mean)^2      var = M2 / M (biased, normalises), M2 / (M - 1) (running_var)

E[x^2] - E[x]^2 loses every digit where |mean| >> std, so each tile lane runs Welford's recurrence over its rows
    delta = x - mean;  mean += delta / n;  M2 += delta * (x - mean)
and lanes, then row programs, are merged by Chan's formula: M2 = sum_i M2_i + n_i (mean_i - mean)^2
(Chan, Golub & LeVeque 1983). Both work on x - pivot, the pivot being the first row: sums of numbers of the size of the
deviation, not of the mean. The order is fixed: deterministic.

Partials: mean and M2 as [parts, C], count as [parts], all fp32; written here or by the convolution's epilogue, and
finished by :func:`finish_statistics_kernel`, which also updates running_mean, running_var and num_batches_tracked on
the device. Bytes: one read of x; the finish reads 8 * parts * C bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .act_bias_backward import row_split, tile
from .common import WARPS, cdiv, channel_pair, launch


@triton.jit
def welford_rows(x_ptr, start, end, c, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """(mean, M2) over rows [start, end) of the channels ``c``; a tile of BLOCK_M rows at a time."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    inside = rows * C + c[None, :]
    pivot = tl.load(x_ptr + tl.cast(start, tl.int64) * C + c, mask=c < C, other=0.0).to(tl.float32)
    count = tl.zeros((BLOCK_M, 1), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m in range(start, end, BLOCK_M):
        live = rows < end - m
        x = tl.load(x_ptr + tl.cast(m, tl.int64) * C + inside, mask=live & (c[None, :] < C), other=0.0).to(tl.float32)
        count += tl.where(live, 1.0, 0.0)
        x -= pivot[None, :]
        delta = x - mean
        mean += delta * tl.where(live, 1.0 / tl.maximum(count, 1.0), 0.0)
        m2 += tl.where(live, delta * (x - mean), 0.0)
    total = tl.sum(count, axis=0)
    merged = tl.sum(count * mean, axis=0) / total
    apart = mean - merged[None, :]
    return pivot + merged, tl.sum(m2 + count * apart * apart, axis=0)


@triton.jit
def finish_channel(
    mean, m2, M, c, C, running_mean_ptr, running_var_ptr, counter_ptr, momentum, eps, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """invstd of the channels ``c``; the running statistics move towards the batch's by ``momentum``."""
    samples = M * 1.0
    if CUMULATIVE:  # momentum None: the average of all batches so far; the counter already includes this one
        momentum = 1.0 / tl.load(counter_ptr).to(tl.float32)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        new = old + (mean - old) * momentum
        tl.store(running_mean_ptr + c, new.to(running_mean_ptr.dtype.element_ty), mask=c < C)
        old = tl.load(running_var_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        new = old + (m2 / (samples - 1.0) - old) * momentum
        tl.store(running_var_ptr + c, new.to(running_var_ptr.dtype.element_ty), mask=c < C)
    if (counter_ptr is not None) and (not CUMULATIVE):  # noqa: SIM102  (known when compiling, then when running)
        # Nobody else reads the counter in this launch, so program 0 may write it at any time.
        if tl.program_id(0) == 0:
            tl.store(counter_ptr, tl.load(counter_ptr) + 1)
    return 1.0 / tl.sqrt(m2 / samples + eps)


@triton.jit
def statistics_kernel(x_ptr, mean_ptr, m2_ptr, count_ptr, M, C, ROWS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program (i, j): rows [i * ROWS, (i + 1) * ROWS), BLOCK_C channels -> partial i."""
    pid = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = pid * ROWS
    end = tl.minimum(start + ROWS, M)
    mean, m2 = welford_rows(x_ptr, start, end, c, C, BLOCK_M, BLOCK_C)
    tl.store(mean_ptr + pid * C + c, mean, mask=c < C)
    tl.store(m2_ptr + pid * C + c, m2, mask=c < C)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + pid, (end - start).to(tl.float32))


@triton.jit
def finish_statistics_kernel(
    mean_ptr, m2_ptr, count_ptr, save_mean_ptr, save_invstd_ptr, running_mean_ptr, running_var_ptr, counter_ptr,
    M, C, PARTS, momentum, eps, CUMULATIVE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merges the partials of BLOCK_C channels in two passes over them (they sit in L2): the mean, then M2."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.arange(0, BLOCK_P)
    pivot = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p in range(0, PARTS, BLOCK_P):
        live = parts < PARTS - p
        mask = live[:, None] & (c[None, :] < C)
        n = tl.load(count_ptr + p + parts, mask=live, other=0.0)
        mean = tl.load(mean_ptr + (p + parts[:, None]) * C + c[None, :], mask=mask, other=0.0)
        total += n[:, None] * (mean - pivot[None, :])
    mean = pivot + tl.sum(total, axis=0) / (M * 1.0)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p in range(0, PARTS, BLOCK_P):
        live = parts < PARTS - p
        mask = live[:, None] & (c[None, :] < C)
        n = tl.load(count_ptr + p + parts, mask=live, other=0.0)
        at = (p + parts[:, None]) * C + c[None, :]
        apart = tl.load(mean_ptr + at, mask=mask, other=0.0) - mean[None, :]
        total += tl.load(m2_ptr + at, mask=mask, other=0.0) + n[:, None] * apart * apart
    m2 = tl.sum(total, axis=0)
    invstd = finish_channel(
        mean, m2, M, c, C, running_mean_ptr, running_var_ptr, counter_ptr, momentum, eps, CUMULATIVE
    )
    tl.store(save_mean_ptr + c, mean, mask=c < C)
    tl.store(save_invstd_ptr + c, invstd, mask=c < C)


def partials(parts: int, channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (mean [parts, C], M2 [parts, C], count [parts]), fp32."""
    mean, m2 = torch.empty(2, parts, channels, dtype=torch.float32, device=device).unbind(0)
    return mean, m2, torch.empty(parts, dtype=torch.float32, device=device)


def statistics(x: Tensor, rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The partials of a dense NHWC tensor seen as [rows, channels]."""
    block_m, block_c = tile(channels)
    parts, each = row_split(rows, channels, block_m, block_c)
    out = partials(parts, channels, x.device)
    launch(
        statistics_kernel, (parts, cdiv(channels, block_c)), x, *out, rows, channels, each,
        BLOCK_M=block_m, BLOCK_C=block_c, num_warps=WARPS,
    )  # fmt: skip
    return out


def count_batch(counter: Tensor | None, momentum: float | None) -> tuple[float, bool]:
    """(momentum, cumulative) for the kernels; a cumulative average needs the counter raised before they start."""
    if momentum is None and counter is not None:
        counter.add_(1)
        return 0.0, True
    return 0.0 if momentum is None else momentum, False


def finish_statistics(
    parts: tuple[Tensor, Tensor, Tensor], rows: int, running_mean: Tensor | None, running_var: Tensor | None,
    counter: Tensor | None, momentum: float | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(save_mean, save_invstd) [C] fp32 from partials over ``rows`` samples; running statistics updated in place."""
    count, channels = parts[0].shape
    mean, invstd = channel_pair(parts[0], channels)
    factor, cumulative = count_batch(counter, momentum)
    launch(
        finish_statistics_kernel, (cdiv(channels, 32),), *parts, mean, invstd, running_mean, running_var, counter,
        rows, channels, count, factor, eps, CUMULATIVE=cumulative, BLOCK_P=32, BLOCK_C=32, num_warps=WARPS,
    )  # fmt: skip
    return mean, invstd
