"""Launchers of the cross-entropy kernels; formulas and mapping in cross_entropy_kernels.py. No host synchronisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import WARPS, cdiv, empty_as, is_channels_last, launch, next_power_of_2, not_asked
from .cross_entropy_kernels import backward_kernel, backward_probabilities_kernel, finish_kernel, forward_kernel

_CHUNK = 4096  # classes of one row at a time: 32 elements per thread at 4 warps
# Elements of a tile of many rows, which needs an address per element: twice as many spill (tests/triton_resources.md).
_TILE, _TILE_PROBABILITIES = 2048, 1024


@dataclass(frozen=True)
class _Rows:
    """How the kernels walk the logits: N blocks of D rows, element (n, d, c) at n * SN + d * SD + c * SC."""

    n: int
    d: int
    c: int
    sn: int
    sd: int
    sc: int

    def tile(self, probabilities: bool) -> tuple[int, int, int]:
        """(BLOCK_R, BLOCK_C, warps): the contiguous dimension gets the long side of the tile."""
        tile = _TILE_PROBABILITIES if probabilities else _TILE
        if self.sc == 1:
            block_c = min(_CHUNK, next_power_of_2(self.c))
            block_r = min(max(1, tile // block_c), next_power_of_2(self.d))
        else:
            block_r = min(128, next_power_of_2(self.d))
            block_c = min(tile // block_r, next_power_of_2(self.c))
        # One row per program: more threads shorten its chain of chunks.
        return block_r, block_c, 8 if self.c > block_c == _CHUNK else WARPS

    def sizes(self, block_r: int) -> tuple[int, ...]:
        return self.d, self.c, self.sn, self.sd, self.sc, cdiv(self.d, block_r)


def _layout(x: Tensor) -> tuple[_Rows, torch.memory_format]:
    """The rows of ``x`` once it is dense in the memory format that comes with them."""
    n, c = x.shape[:2]
    inner = math.prod(x.shape[2:])
    if inner == 1 or is_channels_last(x):
        form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        return _Rows(1, n * inner, c, n * inner * c, c, 1), form
    return _Rows(n, inner, c, c * inner, 1, inner), torch.contiguous_format


def _dense(t: Tensor, form: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=form)


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, normalizer); reduction 0 none, 1 mean, 2 sum."""
    rows, form = _layout(input)
    shape = (input.size(0), *input.shape[2:])
    lse = torch.empty(shape, dtype=torch.float32, device=input.device)
    normalizer = torch.empty((), dtype=torch.float32, device=input.device)
    loss = torch.empty(shape if reduction == 0 else (), dtype=input.dtype, device=input.device)
    count = rows.n * rows.d
    if count == 0:
        return loss.fill_(math.nan if reduction == 1 else 0.0), lse, normalizer.zero_()
    probabilities = target.is_floating_point()
    x = _dense(input, form)
    target = _dense(target, form if probabilities else torch.contiguous_format)
    weight = None if weight is None else weight.contiguous()
    block_r, block_c, warps = rows.tile(probabilities)
    programs = rows.n * cdiv(rows.d, block_r)
    parts = torch.empty(2, programs, dtype=torch.float32, device=input.device)
    part_loss = None if reduction == 0 else parts[0]
    part_norm = None if probabilities else parts[1]
    launch(
        forward_kernel, (programs,), x, target, weight, loss if reduction == 0 else None, lse, part_loss, part_norm,
        *rows.sizes(block_r), ignore_index, label_smoothing, label_smoothing / rows.c,
        PROBABILITIES=probabilities, SMOOTH=label_smoothing > 0, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=warps,
    )  # fmt: skip
    launch(
        finish_kernel, (1,), normalizer, part_loss, part_norm, loss, programs,
        float(count), MEAN=reduction == 1, BLOCK=1024, num_warps=WARPS,
    )  # fmt: skip
    return loss, lse, normalizer


def cross_entropy_backward(
    grad_loss: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, normalizer: Tensor,
    reduction: int, ignore_index: int, label_smoothing: float, output_mask: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grad_input, grad_target); grad_target for probability targets only, else (and if not wanted) empty [0]."""
    probabilities = target.is_floating_point()
    rows, form = _layout(input)
    dx = empty_as(input, input.shape, form) if output_mask[0] else None
    dt = empty_as(input, input.shape, form) if output_mask[1] and probabilities else None
    if rows.n * rows.d and (dx is not None or dt is not None):
        x = _dense(input, form)
        given = target
        target = _dense(target, form if probabilities else torch.contiguous_format)
        weight = None if weight is None else weight.contiguous()
        grad_loss = grad_loss.contiguous()
        block_r, block_c, warps = rows.tile(probabilities)
        programs = rows.n * cdiv(rows.d, block_r)
        how = {"NONE": reduction == 0, "MEAN": reduction == 1, "BLOCK_R": block_r, "BLOCK_C": block_c}
        smooth = (label_smoothing, label_smoothing / rows.c)
        if probabilities:
            launch(
                backward_probabilities_kernel, (programs,), grad_loss, x, target, weight, lse, normalizer, dx, dt,
                *rows.sizes(block_r), *smooth, **how, num_warps=warps,
            )  # fmt: skip
        else:
            smoothed = label_smoothing > 0 and weight is not None
            weight_sum = weight.sum(dtype=torch.float32) if smoothed else None
            launch(
                backward_kernel, (programs, cdiv(rows.c, block_c)), grad_loss, x, target, weight, weight_sum, lse,
                normalizer, dx, *rows.sizes(block_r), ignore_index, *smooth, SMOOTH=label_smoothing > 0, **how,
                num_warps=warps,
            )  # fmt: skip
        if dt is not None and target is not given:
            dt = torch.empty_like(given).copy_(dt)  # the target's layout is its gradient's
    return tuple(not_asked(input) if g is None else g for g in (dx, dt))
