"""Backward of y = act(x + bias): grad_x and grad_bias in one pass over grad_y.

    grad_x[m, k] = grad_y[m, k] * act'(saved[m, k])        grad_bias[k] = sum_m grad_x[m, k]

Shapes: NHWC seen as [M, K], M = N*P*Q rows, K channels contiguous.
Mapping: program (i, j) walks ROWS consecutive rows of BLOCK_K channels in tiles [BLOCK_M, BLOCK_K] and keeps one fp32
sum per tile element, folded over the rows at the end; it writes the sum of its rows to partial[i, j tile]. A second
kernel adds the partials in a fixed order: deterministic, no atomics. With one row program the first kernel writes
grad_bias itself and the second one is not started.
Accumulation: fp32, of grad_x before it is rounded to the tensor's dtype.
Bytes: reads grad_y and saved, writes grad_x: 3 M K elements (1 for the bias gradient of the identity); about 2 FLOPs
per element: bound by memory. The partials are at most _ROW_PROGRAMS * K * 4 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import act_backward
from .common import WARPS, cdiv, empty_nhwc, format_of, launch, next_power_of_2, nhwc, not_asked, rows_and_channels

_TILE = 2048  # elements: 16 per thread at 4 warps, two or four 16-byte loads in flight per tensor
_ROW_PROGRAMS = 512  # two waves of an H100's 132 SMs at two blocks each; more would only lengthen the second kernel


@triton.jit
def act_bias_backward_kernel(
    grad_ptr, saved_ptr, out_ptr, sum_ptr, M, K, ROWS,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_M)
    start = pid_m * ROWS
    end = tl.minimum(start + ROWS, M)
    # The 64-bit part of an offset is one scalar per tile; inside a tile 32 bits are enough.
    inside = rows[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for m in range(start, end, BLOCK_M):
        base = tl.cast(m, tl.int64) * K
        mask = (rows[:, None] < end - m) & (k[None, :] < K)
        grad = tl.load(grad_ptr + base + inside, mask=mask, other=0.0).to(tl.float32)
        if saved_ptr is not None:
            saved = tl.load(saved_ptr + base + inside, mask=mask, other=0.0).to(tl.float32)
            grad = act_backward(grad, saved, ACT)
        if out_ptr is not None:
            tl.store(out_ptr + base + inside, grad.to(out_ptr.dtype.element_ty), mask=mask)
        if sum_ptr is not None:
            total += tl.where(mask, grad, 0.0)  # act' of the masked zeros need not be finite times zero
    if sum_ptr is not None:
        column = tl.sum(total, axis=0)
        tl.store(sum_ptr + pid_m * K + k, column.to(sum_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def sum_partials_kernel(partial_ptr, out_ptr, PARTS, K, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[k] = sum_i partial[i, k], i in a fixed order."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    parts = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for p in range(0, PARTS, BLOCK_P):
        mask = (parts[:, None] < PARTS - p) & (k[None, :] < K)
        total += tl.load(partial_ptr + (p + parts[:, None]) * K + k[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + k, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=k < K)


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """out[k] = sum_i partial[i, k] for a contiguous fp32 ``partial`` [parts, K]."""
    parts, k = partial.shape
    launch(
        sum_partials_kernel, (cdiv(k, 32),), partial, out, parts, k,
        BLOCK_P=min(64, next_power_of_2(parts)), BLOCK_K=32, num_warps=WARPS,
    )  # fmt: skip


def row_split(rows: int, channels: int, block_m: int, block_k: int) -> tuple[int, int]:
    """(row programs, rows of each): enough programs to fill a GPU, few enough partials to add up cheaply."""
    wanted = max(1, _ROW_PROGRAMS // cdiv(channels, block_k))
    each = cdiv(cdiv(rows, block_m), wanted) * block_m
    return cdiv(rows, each), each


def tile(channels: int) -> tuple[int, int]:
    """[BLOCK_M, BLOCK_K]: 64 channels are 128 bytes of fp16, one full memory transaction per row."""
    block_k = min(64, next_power_of_2(channels))
    return _TILE // block_k, block_k


def act_bias_backward(
    grad_output: Tensor, saved: Tensor | None, activation: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """(grad_preact, grad_bias) by the formula of this module; what is not wanted is an empty [0] tensor."""
    want_grad, want_bias = output_mask
    layout = format_of(grad_output if saved is None else saved)
    m, k = rows_and_channels(grad_output)
    # The kernels write every element; only a sum over no rows at all has to be set here.
    allocate = torch.empty if m else torch.zeros
    grad_bias = allocate(k, dtype=grad_output.dtype, device=grad_output.device) if want_bias else None
    out = empty_nhwc(grad_output, grad_output.shape) if want_grad else None
    if m * k and (want_grad or want_bias):
        grad_output = nhwc(grad_output)
        saved = None if saved is None else nhwc(saved)
        block_m, block_k = tile(k)
        parts, each = row_split(m, k, block_m, block_k)
        sums = grad_bias
        if want_bias and parts > 1:
            sums = torch.empty(parts, k, dtype=torch.float32, device=grad_output.device)
        launch(
            act_bias_backward_kernel, (parts, cdiv(k, block_k)), grad_output, saved, out, sums, m, k, each,
            ACT=activation, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=WARPS,
        )  # fmt: skip
        if sums is not grad_bias:
            sum_partials(sums, grad_bias)
    grad_preact = not_asked(grad_output) if out is None else out.contiguous(memory_format=layout)
    return grad_preact, not_asked(grad_output) if grad_bias is None else grad_bias
