"""Launchers of the convolutions: shapes, layouts, tiles, grids. Kernels: conv_gather.py, conv_wgrad.py, depthwise.py.

Weights are read as KRSC, the memory of a channels_last weight; another layout is copied first. fp32 runs exactly, or as
TF32 where ``torch.backends.cudnn.conv`` allows it, as stock convolutions do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import batch_norm_act as norm
from .act_bias_backward import sum_partials
from .batch_norm_stats import finish_statistics, partials
from .bn_fold import fold_statistics
from .common import (
    INT32_ELEMENTS,
    WARPS,
    cdiv,
    empty_nhwc,
    format_of,
    launch,
    nhwc,
    not_asked,
    rows_and_channels,
    vector,
    write_back,
)
from .conv_config import Problem, Tile, choose
from .conv_gather import conv_gather_kernel
from .conv_pointwise import conv_pointwise_kernel
from .conv_wgrad import conv_wgrad_kernel
from .depthwise import depthwise_dgrad, depthwise_fprop, depthwise_wgrad


def problem_of(
    input_shape: Sequence[int], weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, dtype: torch.dtype,
) -> Problem:  # fmt: skip
    n, c, h, w = input_shape
    k, _, r, s = weight_shape
    exact = dtype == torch.float32 and precision(dtype) == "ieee"
    return Problem(n, c, h, w, k, r, s, tuple(stride), tuple(padding), tuple(dilation), groups, dtype.itemsize, exact)


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input precision: TF32 only for fp32 and only where PyTorch's own convolutions may use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _steps(a: Problem) -> tuple[int, int]:
    """Distance between the filter rows (columns) that one phase of the data gradient uses."""
    return tuple(a.stride[i] // math.gcd(a.stride[i], a.dilation[i]) for i in (0, 1))


def _geometry(a: Problem) -> dict[str, int]:
    names = ("R", "S", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (a.r, a.s, *a.stride, *a.padding, *a.dilation), strict=True))


def _eights(a: Problem) -> bool:
    """Whether the kernels have to be told that channels come in eights; of sixteens the compiler knows itself."""
    return a.cg % 8 == 0 and a.kg % 8 == 0 and (a.cg % 16 != 0 or a.kg % 16 != 0)


def row_tiles(a: Problem, tile: Tile, places: int) -> int:
    return cdiv(a.n, tile.rows) * places if tile.positions else cdiv(a.n * places, tile.rows)


def _pointwise(
    x: Tensor, weight: Tensor, y: Tensor, tile: Tile, dgrad: bool, preact: Tensor | None = None,
    residual: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    activation: str = "identity", statistics: tuple[Tensor, Tensor, Tensor] | None = None,
) -> bool:  # fmt: skip
    """conv_pointwise_kernel on the matrices behind dense NHWC tensors; False where an address is not a descriptor's."""
    if any(t.data_ptr() % 16 for t in (x, weight)) or x.numel() == 0:
        return False
    (rows, reduction), columns = rows_and_channels(x), y.size(1)
    n, k, c = tile.rows, tile.columns, tile.chunk
    a = TensorDescriptor(x, [rows, reduction], [reduction, 1], [n, c])
    matrix = list(weight.shape[:2])
    b = TensorDescriptor(weight, matrix, [matrix[1], 1], [c, k] if dgrad else [k, c])
    launch(
        conv_pointwise_kernel, (cdiv(rows, n) * cdiv(columns, k),),
        y, a, b, preact, residual, scale, shift, *(statistics or (None, None, None)), rows, columns, reduction,
        DGRAD=dgrad, WIDE=y.numel() > INT32_ELEMENTS, ACT=activation,
        BLOCK_M=n, BLOCK_N=k, BLOCK_K=c, num_warps=WARPS, num_stages=tile.stages,
    )  # fmt: skip
    return True


def fprop(
    x: Tensor, weight: Tensor, y: Tensor, a: Problem, tile: Tile, *, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, preact: Tensor | None = None,
    activation: str = "identity", prologue: tuple[Tensor, Tensor, str] | None = None,
    statistics: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """y = act(conv(prologue(x)) * scale + shift + residual) on dense NHWC tensors and a KRSC weight.

    scale, shift: [K]. prologue: (scale [C], shift [C], activation) applied to x. statistics: partials with
    ``row_tiles(a, tile, p * q)`` parts, filled with those of y.
    """
    if residual is not None and tile.rows * tile.columns >= 128 * 128:
        # Its values need registers beside the accumulator's: a tile that size spills up to 208 bytes per thread.
        tile = replace(tile, columns=tile.columns // 2)
    if tile.descriptors and prologue is None:
        epilogue = (preact, residual, scale, shift, activation, statistics)
        if _pointwise(x, weight, y, tile, False, *epilogue):
            return
    in_scale, in_shift, in_act = prologue or (None, None, "identity")
    taps = a.r * a.s
    launch(
        conv_gather_kernel, (row_tiles(a, tile, a.p * a.q) * cdiv(a.kg, tile.columns), 1, a.groups),
        x, weight, y, preact, residual, scale, shift, in_scale, in_shift, *(statistics or (None, None, None)),
        a.n, a.h, a.w, a.c, a.p, a.q, a.k, a.cg, a.kg, 1, taps * a.cg, a.cg, a.kg * taps * a.cg,
        **_geometry(a), RSTEP=1, SSTEP=1, DGRAD=False, POSITIONS=tile.positions, FLAT=a.flat, EIGHTS=_eights(a),
        WIDE=max(x.numel(), y.numel()) > INT32_ELEMENTS, ACT=activation, IN_ACT=in_act, PRECISION=precision(x.dtype),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.chunk, num_warps=WARPS, num_stages=tile.stages,
    )  # fmt: skip


def dgrad(dy: Tensor, weight: Tensor, dx: Tensor, a: Problem, tile: Tile) -> None:
    """dx of dense NHWC tensors and a KRSC weight; every element is written."""
    if tile.descriptors and _pointwise(dy, weight, dx, tile, True):
        return
    taps = a.r * a.s
    places = cdiv(a.h, a.stride[0]) * cdiv(a.w, a.stride[1])
    rstep, sstep = _steps(a)
    launch(
        conv_gather_kernel,
        (row_tiles(a, tile, places) * cdiv(a.cg, tile.columns), a.stride[0] * a.stride[1], a.groups),
        dy, weight, dx, *[None] * 9,
        a.n, a.p, a.q, a.k, a.h, a.w, a.c, a.kg, a.cg, taps * a.cg, 1, a.cg, a.kg * taps * a.cg,
        **_geometry(a), RSTEP=rstep, SSTEP=sstep, DGRAD=True, POSITIONS=tile.positions, FLAT=False, EIGHTS=_eights(a),
        WIDE=max(dy.numel(), dx.numel()) > INT32_ELEMENTS, ACT="identity", IN_ACT="identity",
        PRECISION=precision(dy.dtype),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.chunk, num_warps=WARPS, num_stages=tile.stages,
    )  # fmt: skip


def wgrad(dy: Tensor, x: Tensor, dw: Tensor, a: Problem, tile: Tile) -> None:
    """dw (KRSC memory) of dense NHWC tensors; split sums are added in a fixed order."""
    out = dw
    if tile.splits > 1:
        out = torch.empty(tile.splits, dw.numel(), dtype=torch.float32, device=dw.device)
    taps = a.r * a.s
    columns = taps * a.cg if a.flat else a.cg
    launch(
        conv_wgrad_kernel,
        (cdiv(a.kg, tile.rows) * cdiv(columns, tile.columns), 1 if a.flat else taps, tile.splits * a.groups),
        dy, x, out, a.n, a.h, a.w, a.c, a.p, a.q, a.k, a.cg, a.kg, tile.splits, dw.numel(),
        **_geometry(a), FLAT=a.flat, WIDE=max(dy.numel(), x.numel()) > INT32_ELEMENTS, EIGHTS=_eights(a),
        PRECISION=precision(dy.dtype),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=tile.chunk, num_warps=WARPS, num_stages=tile.stages,
    )  # fmt: skip
    if tile.splits > 1:
        sum_partials(out, dw)


def _forward(x: Tensor, w: Tensor, y: Tensor, a: Problem, **epilogue) -> None:
    if a.depthwise:
        depthwise_fprop(x, w, y, a, **epilogue)
    else:
        fprop(x, w, y, a, choose("fprop", a, x), **epilogue)


def _dense(input: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return nhwc(input), nhwc(weight), None if residual is None else nhwc(residual)


def conv2d_bias_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, activation: str, save_preact: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, preact) of act(conv2d(input, weight) + bias + residual); preact empty [0] if not wanted."""
    a = problem_of(input.shape, weight.shape, stride, padding, dilation, groups, input.dtype)
    layout = format_of(input, weight)
    y = empty_nhwc(input, (a.n, a.k, a.p, a.q))
    preact = torch.empty_like(y) if save_preact else None
    if y.numel():
        x, w, residual = _dense(input, weight, residual)
        _forward(x, w, y, a, shift=vector(bias), residual=residual, preact=preact, activation=activation)
    kept = not_asked(input) if preact is None else preact.contiguous(memory_format=layout)
    return y.contiguous(memory_format=layout), kept


def conv2d_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grad_input, grad_weight), each in its tensor's memory format; what is not wanted is an empty [0] tensor."""
    a = problem_of(input.shape, weight.shape, stride, padding, dilation, groups, input.dtype)
    dx = empty_nhwc(input, input.shape) if output_mask[0] else None
    dw = empty_nhwc(weight, weight.shape) if output_mask[1] else None
    if grad_output.numel() and input.numel():
        x, w, dy = _dense(input, weight, grad_output)
        if dx is not None and a.depthwise:
            depthwise_dgrad(dy, w, dx, a)
        elif dx is not None:
            dgrad(dy, w, dx, a, choose("dgrad", a, dy))
        if dw is not None and a.depthwise:
            depthwise_wgrad(dy, x, dw, a)
        elif dw is not None:
            wgrad(dy, x, dw, a, choose("wgrad", a, dy))
    else:
        for grad in (dx, dw):
            if grad is not None:
                grad.zero_()
    return tuple(
        not_asked(like) if grad is None else grad.contiguous(memory_format=format_of(like))
        for grad, like in ((dx, input), (dw, weight))
    )


def conv2d_bn_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, training: bool, momentum: float | None, eps: float, activation: str, save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(output, conv_output, save_mean, save_invstd) of act(batch_norm(conv2d(input, weight) + bias) + residual).

    Training: the convolution's epilogue takes the statistics of what it writes, one small kernel merges them, the apply
    kernel normalises: the convolution's output is read once. With few rows the one-launch batch norm follows instead.
    Evaluation without a backward: one convolution with scale, shift, residual and activation in its epilogue.
    """
    a = problem_of(input.shape, weight.shape, stride, padding, dilation, groups, input.dtype)
    layout = format_of(input, weight)
    z = empty_nhwc(input, (a.n, a.k, a.p, a.q))
    rows = a.n * a.p * a.q
    bn = (running_mean, running_var, num_batches_tracked)
    if z.numel() == 0:
        y, mean, invstd = norm.batch_norm_act(z, None, bn_weight, bn_bias, *bn, training, momentum, eps, activation)
        return y, z if save_for_backward else not_asked(input), mean, invstd
    x, w, residual = _dense(input, weight, residual)
    bias, bn_weight, bn_bias = vector(bias), vector(bn_weight), vector(bn_bias)
    if not training and not save_for_backward:
        statistics = vector(running_mean), vector(running_var)
        scale, shift, mean, invstd = fold_statistics(bias, bn_weight, bn_bias, *statistics, eps)
        _forward(x, w, z, a, scale=scale, shift=shift, residual=residual, activation=activation)
        return z.contiguous(memory_format=layout), not_asked(input), mean, invstd
    if training and rows > norm.FUSED_ROWS and not a.depthwise:
        tile = choose("fprop", a, input)
        parts = partials(row_tiles(a, tile, a.p * a.q), a.k, input.device)
        fprop(x, w, z, a, tile, shift=bias, statistics=parts)
        dense = vector(running_mean), vector(running_var)
        mean, invstd = finish_statistics(parts, rows, *dense, num_batches_tracked, momentum, eps)
        write_back(running_mean, dense[0])
        write_back(running_var, dense[1])
        y = norm.normalise(z, residual, bn_weight, bn_bias, mean, invstd, None, None, eps, activation)
    else:
        _forward(x, w, z, a, shift=bias)
        y, mean, invstd = norm.batch_norm_act(z, residual, bn_weight, bn_bias, *bn, training, momentum, eps, activation)
    kept = z.contiguous(memory_format=layout) if save_for_backward else not_asked(input)
    return y.contiguous(memory_format=layout), kept, mean, invstd
