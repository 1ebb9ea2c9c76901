"""What the tests of the norm kernels share: shapes, activations, and sums that are still split."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from simt_lib import pointer

ALL = [torch.float32, torch.float16, torch.bfloat16]
# rows, channels: below and above the one-launch limit, fewer channels than a warp, odd, more than 32 vectors
SHAPES = [(4, 64), (37, 16), (300, 24), (700, 264), (530, 7), (257, 1), (2, 33)]
SPLIT_SHAPES = [(2, 8, 1), (4, 512, 7), (16, 24, 2), (33, 13, 3), (256, 64, 4)]  # rows, channels, splits


def activation(name):
    return {"identity": lambda t: t, "gelu": F.gelu}.get(name) or getattr(torch, name, None) or getattr(F, name)


def unaligned(t):
    """The same values one element into a buffer."""
    out = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    out.copy_(t)
    return out


class SplitCall(ctypes.Structure):
    _fields_ = [(f, ctypes.c_void_p) for f in ("parts", "addend", "bias")]
    _fields_ += [(f, ctypes.c_int) for f in ("splits", "bias_float")]


def split_call(split) -> SplitCall:
    """split: (parts [splits, rows, channels] fp32, addend or None, bias or None); None: no split sums."""
    if split is None:
        return SplitCall()
    parts, addend, bias = split
    is_float = bias is None or bias.dtype is torch.float32
    return SplitCall(pointer(parts), pointer(addend), pointer(bias), len(parts), int(is_float))


def split_of(rows, channels, splits, dtype, generator):
    """Split sums, what is added to them, and the tensor that they stand for."""
    parts = torch.randn(splits, rows, channels, generator=generator)
    addend = torch.randn(rows, channels, generator=generator).to(dtype)
    bias = torch.randn(channels, generator=generator)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return parts, addend, bias, total
