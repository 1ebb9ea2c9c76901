"""Cross-entropy kernels: online softmax forward, recomputing backward. Launchers: cross_entropy.py.

    lse_n = log sum_c exp(x_nc)
    class indices t:   loss_n = (1-s) w_t (lse - x_t) + s/C sum_c w_c (lse - x_c);  0 where t = ignore_index
                       dx_nc = g_n (p_nc S_n - u_nc),  u_nc = (1-s) w_t [c = t] + s/C w_c,  S_n = sum_c u_nc
    probabilities t:   u_nc = w_c ((1-s) t_nc + s/C),  loss_n = sum_c u_nc (lse - x_nc),  dx the same,
                       dt_nc = g_n (1-s) w_c (lse - x_nc)
    p = exp(x - lse); g_n = grad (none), grad (sum), grad / normalizer (mean); s = label smoothing, w = class weights.

Shapes: logits with N outer blocks of D rows and C classes, element (n, d, c) at n*SN + d*SD + c*SC: [rows, C] and
channels_last have N = 1, D = rows, SD = C, SC = 1; contiguous [N, C, d1..] has D = d1*.., SD = 1, SC = D.
Row arrays (target, loss, lse) have n*D + d.
Mapping: a program owns BLOCK_R rows of one n (many where C is small: 128 rows of 10 classes) and walks the classes in
chunks of BLOCK_C with the running maximum m and sum of exp(x - m) (Milakov & Gimelshein 2018); sums of u * x are kept
as sum u (x - m) and moved along with m, so that large logits cancel nothing. The backward for class indices needs
nothing but lse: its grid is rows x class chunks.
Reductions: per-program partials of the loss and of the weights, added by one program in a fixed order: deterministic.
Accumulation fp32. A target outside [0, C) that is not ignore_index gives NaN (PyTorch asserts on the device).
Bytes: forward reads the logits once (probabilities: and the targets), backward reads them and writes as many.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(D, BLOCKS_D, SN, SD, BLOCK_R: tl.constexpr):
    """(row numbers, row mask, scalar 64-bit base of the tile, 32-bit row offsets inside it) of this program."""
    pid = tl.program_id(0)
    n = pid // BLOCKS_D
    first = (pid % BLOCKS_D) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    base = tl.cast(n, tl.int64) * SN + tl.cast(first, tl.int64) * SD
    return tl.cast(n, tl.int64) * D + first + r, r < D - first, base, r * SD


@triton.jit
def _class_weight(weight_ptr, c, C):
    if weight_ptr is not None:
        w = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    else:
        w = tl.where(c < C, 1.0, 0.0)
    return w


@triton.jit
def _target(target_ptr, weight_ptr, row, live, IGNORE, C):
    """(t, keep, weight of t): t safe to index with; the weight is NaN where t is out of range."""
    t = tl.load(target_ptr + row, mask=live, other=0).to(tl.int64)
    keep = live & (t != IGNORE)
    inside = (t >= 0) & (t < C)
    t = tl.where(keep & inside, t, 0).to(tl.int32)
    own = tl.full(t.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        own = tl.load(weight_ptr + t, mask=keep, other=0.0).to(tl.float32)
    return t, keep, tl.where(inside | (not keep), own, float("nan"))


@triton.jit
def forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, lse_ptr, part_loss_ptr, part_norm_ptr,
    D, C, SN, SD, SC, BLOCKS_D, IGNORE, smoothing, smoothing_each,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, live, base, row_at = _rows(D, BLOCKS_D, SN, SD, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    high = tl.full((BLOCK_R,), float("-inf"), tl.float32)  # m
    total = tl.zeros((BLOCK_R,), tl.float32)  # sum exp(x - m)
    sum_u = tl.zeros((BLOCK_R,), tl.float32)
    sum_ux = tl.zeros((BLOCK_R,), tl.float32)  # sum u (x - m)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + cols
        at = base + tl.cast(c0, tl.int64) * SC + (row_at[:, None] + (cols * SC)[None, :])
        mask = live[:, None] & (c[None, :] < C)
        x = tl.load(x_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
        new = tl.maximum(high, tl.max(x, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row of -inf so far: exp(-inf - 0) = 0, not NaN
        total = total * tl.exp(high - safe) + tl.sum(tl.exp(x - safe[:, None]), axis=1)
        if PROBABILITIES or SMOOTH:
            u = _class_weight(weight_ptr, c, C)[None, :]
            if PROBABILITIES:
                t = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
                u = u * (t * (1.0 - smoothing) + smoothing_each)
            sum_ux += tl.where(sum_u == 0.0, 0.0, sum_u * (high - safe))
            sum_ux += tl.sum(tl.where(mask, u * (x - safe[:, None]), 0.0), axis=1)
            sum_u += tl.sum(tl.where(mask, u, 0.0), axis=1)
        high = safe
    log_total = tl.log(total)
    tl.store(lse_ptr + row, high + log_total, mask=live)
    if PROBABILITIES:
        loss = sum_u * log_total - sum_ux
    else:
        t, keep, own = _target(target_ptr, weight_ptr, row, live, IGNORE, C)
        picked = tl.load(x_ptr + base + row_at + tl.cast(t, tl.int64) * SC, mask=keep, other=0.0).to(tl.float32)
        loss = (1.0 - smoothing) * own * (log_total - (picked - high))
        if SMOOTH:
            loss += smoothing_each * (sum_u * log_total - sum_ux)
        loss = tl.where(keep, loss, 0.0)
        tl.store(part_norm_ptr + tl.program_id(0), tl.sum(tl.where(keep, own, 0.0), axis=0))
    if loss_ptr is not None:
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=live)
    else:
        tl.store(part_loss_ptr + tl.program_id(0), tl.sum(tl.where(live, loss, 0.0), axis=0))


@triton.jit
def finish_kernel(
    norm_ptr, part_loss_ptr, part_norm_ptr, loss_ptr, PARTS, rows, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: normalizer = sum of the partial weights (``rows`` without them), loss = sum or sum / normalizer."""
    i = tl.arange(0, BLOCK)
    norm = tl.zeros((BLOCK,), tl.float32)
    loss = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, PARTS, BLOCK):
        if part_norm_ptr is not None:
            norm += tl.load(part_norm_ptr + p + i, mask=i < PARTS - p, other=0.0)
        if part_loss_ptr is not None:
            loss += tl.load(part_loss_ptr + p + i, mask=i < PARTS - p, other=0.0)
    divisor = tl.sum(norm, axis=0)
    if part_norm_ptr is None:
        divisor = rows
    tl.store(norm_ptr, divisor)
    if part_loss_ptr is not None:
        value = tl.sum(loss, axis=0)
        if MEAN:
            value = value / divisor
        tl.store(loss_ptr, value.to(loss_ptr.dtype.element_ty))


@triton.jit
def _row_gradient(grad_ptr, norm_ptr, row, live, NONE: tl.constexpr, MEAN: tl.constexpr):
    if NONE:
        g = tl.load(grad_ptr + row, mask=live, other=0.0).to(tl.float32)
    else:
        g = tl.load(grad_ptr).to(tl.float32)
        if MEAN:
            g = g / tl.load(norm_ptr)
        g = tl.where(live, g, 0.0)
    return g


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr, norm_ptr, dx_ptr,
    D, C, SN, SD, SC, BLOCKS_D, IGNORE, smoothing, smoothing_each,
    SMOOTH: tl.constexpr, NONE: tl.constexpr, MEAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Class indices. Program (i, j): BLOCK_R rows, class chunk j."""
    row, live, base, row_at = _rows(D, BLOCKS_D, SN, SD, BLOCK_R)
    c0 = tl.program_id(1) * BLOCK_C
    cols = tl.arange(0, BLOCK_C)
    c = c0 + cols
    at = base + tl.cast(c0, tl.int64) * SC + (row_at[:, None] + (cols * SC)[None, :])
    mask = live[:, None] & (c[None, :] < C)
    x = tl.load(x_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    t, keep, own = _target(target_ptr, weight_ptr, row, live, IGNORE, C)
    g = _row_gradient(grad_ptr, norm_ptr, row, live, NONE, MEAN)
    hit = (1.0 - smoothing) * own
    sum_u = hit
    u = tl.where(c[None, :] == t[:, None], hit[:, None], 0.0)
    if SMOOTH:
        weight_sum = C * 1.0
        if weight_sum_ptr is not None:
            weight_sum = tl.load(weight_sum_ptr)
        sum_u += smoothing_each * weight_sum
        u += smoothing_each * _class_weight(weight_ptr, c, C)[None, :]
    dx = g[:, None] * (tl.exp(x - lse[:, None]) * sum_u[:, None] - u)
    dx = tl.where(keep[:, None], dx, 0.0)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_probabilities_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, lse_ptr, norm_ptr, dx_ptr, dt_ptr,
    D, C, SN, SD, SC, BLOCKS_D, smoothing, smoothing_each,
    NONE: tl.constexpr, MEAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Probabilities: sum_c u needs the whole row before dx can be written: two passes over the targets."""
    row, live, base, row_at = _rows(D, BLOCKS_D, SN, SD, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)[:, None]
    g = _row_gradient(grad_ptr, norm_ptr, row, live, NONE, MEAN)[:, None]
    sum_u = tl.zeros((BLOCK_R,), tl.float32)
    if dx_ptr is not None:
        for c0 in range(0, C, BLOCK_C):
            c = c0 + cols
            at = base + tl.cast(c0, tl.int64) * SC + (row_at[:, None] + (cols * SC)[None, :])
            mask = live[:, None] & (c[None, :] < C)
            t = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
            u = _class_weight(weight_ptr, c, C)[None, :] * (t * (1.0 - smoothing) + smoothing_each)
            sum_u += tl.sum(tl.where(mask, u, 0.0), axis=1)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + cols
        at = base + tl.cast(c0, tl.int64) * SC + (row_at[:, None] + (cols * SC)[None, :])
        mask = live[:, None] & (c[None, :] < C)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        w = _class_weight(weight_ptr, c, C)[None, :]
        if dx_ptr is not None:
            t = tl.load(target_ptr + at, mask=mask, other=0.0).to(tl.float32)
            u = w * (t * (1.0 - smoothing) + smoothing_each)
            dx = g * (tl.exp(x - lse) * sum_u[:, None] - u)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dt_ptr is not None:
            dt = g * (1.0 - smoothing) * w * (lse - x)
            tl.store(dt_ptr + at, dt.to(dt_ptr.dtype.element_ty), mask=mask)
