"""What the launchers share: layouts, launches, sizes.

Every kernel reads and writes NHWC, seen as a matrix of M = N*H*W rows and C channels. A 4-d tensor in another layout
is copied first, and a result that has to be NCHW is copied last: those copies are visible in a profile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INT32_ELEMENTS = 2**31 - 1  # from here on a kernel gets 64-bit element offsets
WARPS = 4  # convolution templates with 8 and more gave wrong numbers on some versions of Triton; see conv_config.py


def launch(kernel, grid: Sequence[int], first: Tensor, *args, **meta) -> None:
    """kernel[grid](first, *args, **meta) on ``first``'s device. Grids with a zero extent are not started."""
    if 0 in grid:
        return
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[tuple(grid)](first, *args, **meta)
    else:
        kernel[tuple(grid)](first, *args, **meta)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def is_channels_last(t: Tensor) -> bool:
    """Tensor.suggest_memory_format() == channels_last, PyTorch's rule for ambiguous strides (sizes of 1) included."""
    if t.dim() != 4:
        return False
    sizes, strides = t.shape, t.stride()
    least = 0
    if strides[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False
        least = strides[d] * max(sizes[d], 1)
    return True


def format_of(*tensors: Tensor) -> torch.memory_format:
    """The layout rule for a 4-d result: channels_last if one of these tensors is."""
    return torch.channels_last if any(is_channels_last(t) for t in tensors) else torch.contiguous_format


def nhwc(t: Tensor) -> Tensor:
    """``t`` itself where its memory is dense NHWC, else a copy."""
    return t.contiguous(memory_format=torch.channels_last)


def vector(t: Tensor | None) -> Tensor | None:
    """A [C] parameter with stride 1: ``t`` itself or a copy."""
    return t if t is None else t.contiguous()


def write_back(original: Tensor | None, dense: Tensor | None) -> None:
    """``dense``, which :func:`vector` made of ``original``, was updated in place."""
    if dense is not original:
        original.copy_(dense)


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_gradient(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Dense NHWC memory; where NCHW is the same bytes (one channel or one position), with the strides asked for."""
    same_bytes = shape[1] == 1 or shape[2] * shape[3] == 1
    layout = torch.contiguous_format if same_bytes and not channels_last else torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def layout_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_as(like: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def not_asked(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The empty [0] tensor that stands for an output nobody asked for."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)


def channel_pair(like: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """save_mean and save_invstd, [C] fp32 each: two tensors, for results of an operator must not share memory."""
    return tuple(torch.empty(channels, dtype=torch.float32, device=like.device) for _ in range(2))


def rows_and_channels(t: Tensor) -> tuple[int, int]:
    n, c, h, w = t.shape
    return n * h * w, c
