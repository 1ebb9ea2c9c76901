"""Calls the convolution kernels in the emulator and states what they must return, in plain PyTorch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from simt_lib import ACTIVATIONS, DTYPES, conv_dtypes, dense_nhwc, guarded, integers, library, pointer, to_nhwc

_POINTERS = ["a", "b", "bias", "residual", "grad_saved", "scale", "shift", "pro_scale", "pro_shift", "out", "preact"]
_POINTERS += ["stat_mean", "stat_m2", "partial"]
_SHAPE = [
    "n",
    "h",
    "w",
    "c",
    "k",
    "r",
    "s",
    "p",
    "q",
    "stride_h",
    "stride_w",
    "pad_h",
    "pad_w",
    "dil_h",
    "dil_w",
    "groups",
]
_INTS = ["dtype", "act", "pro_act", "tile", "splits", "tensor", "kind", "keep_parts"]
_NORM = ["norm_x", "norm_mean", "norm_invstd", "norm_weight", "norm_bias", "sum_g", "sum_gx"]


class ConvCall(ctypes.Structure):
    """Mirror of ConvCall in csrc/cuda/api.h."""

    _fields_ = [(f, ctypes.c_void_p) for f in _POINTERS] + [(f, ctypes.c_int) for f in _SHAPE + _INTS]
    _fields_ += [(f, ctypes.c_void_p) for f in _NORM]


@dataclass
class Case:
    """A convolution: batch, input channels, height, width, output channels, filter, and its options."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int = 3
    s: int = 3
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out_size(self) -> tuple[int, int]:
        sizes = []
        for size, taps, i in ((self.h, self.r, 0), (self.w, self.s, 1)):
            sizes.append((size + 2 * self.padding[i] - self.dilation[i] * (taps - 1) - 1) // self.stride[i] + 1)
        return sizes[0], sizes[1]

    def x_shape(self):
        return (self.n, self.c, self.h, self.w)

    def w_shape(self):
        return (self.k, self.c // self.groups, self.r, self.s)

    def y_shape(self):
        return (self.n, self.k, *self.out_size())

    def kwargs(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def __str__(self):
        text = f"n{self.n}c{self.c}k{self.k}-{self.h}x{self.w}-{self.r}x{self.s}"
        for name, value, default in (
            ("s", self.stride, (1, 1)),
            ("p", self.padding, (1, 1)),
            ("d", self.dilation, (1, 1)),
        ):
            text += "" if value == default else f"-{name}{value[0]}{value[1]}"
        return text + (f"-g{self.groups}" if self.groups > 1 else "")


def run(
    kind: str,
    case: Case,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    tile: int | None = None,
    splits: int = 1,
    tensor: bool = True,
    act: str = "identity",
    seed: int = 0,
    pro_act: str = "identity",
    offset: int = 0,
    stats: bool = False,
    depthwise: bool = False,
    guard: bool = False,
    **extra: torch.Tensor | None,
) -> tuple[torch.Tensor, dict]:
    """kind fprop (a = x, b = w), dgrad (a = dy, b = w) or wgrad (a = dy, b = x). Returns the result and a dict with the
    statistics partials, the tile's rows, with norm_x the sums by tile, and the emulator's counters. offset: of `a` in its
    storage (unaligned access);
    guard: the operands end where mapped memory ends."""
    lib = library("conv")
    shape = {"fprop": case.y_shape(), "dgrad": case.x_shape(), "wgrad": case.w_shape()}[kind]
    out = dense_nhwc(shape, a.dtype)
    held = [to_nhwc(a, offset), to_nhwc(b)]
    if guard:
        held = [guarded(t) for t in held]
    call = ConvCall(a=pointer(held[0]), b=pointer(held[1]), out=pointer(out))
    for name, value in extra.items():
        if value is not None:
            if value.dim() == 4 and name != "preact":
                value = to_nhwc(value)
            held.append(value)
            setattr(call, name, pointer(value))
    p, q = case.out_size()
    values = [case.n, case.h, case.w, case.c, case.k, case.r, case.s, p, q, *case.stride, *case.padding, *case.dilation]
    for name, value in zip(_SHAPE, [*values, case.groups], strict=True):
        setattr(call, name, value)
    call.dtype, call.act, call.pro_act = DTYPES[a.dtype], ACTIVATIONS.index(act), ACTIVATIONS.index(pro_act)
    tile = (0 if kind == "wgrad" else 2) if tile is None else tile
    call.tile, call.splits, call.tensor, call.kind = (
        tile,
        splits,
        int(tensor),
        ["fprop", "dgrad", "wgrad"].index(kind) + 3 * depthwise,
    )
    if splits > 1:
        partial = torch.full((splits * out.numel(),), float("nan"))
        held.append(partial)
        call.partial = pointer(partial)
    info: dict = {}
    if stats:
        rows = lib.lib.simt_conv_tile_rows(ctypes.byref(call))
        tiles = -(-case.n * p * q // rows)
        info = {
            "rows": rows,
            "mean": torch.full((tiles, case.k), float("nan")),
            "m2": torch.full((tiles, case.k), float("nan")),
        }
        call.stat_mean, call.stat_m2 = pointer(info["mean"]), pointer(info["m2"])
    if "norm_x" in extra:
        rows = lib.lib.simt_conv_tile_rows(ctypes.byref(call))
        classes = [min(stride, size) for stride, size in zip(case.stride, (case.h, case.w), strict=True)]
        largest = case.n * -(-case.h // case.stride[0]) * -(-case.w // case.stride[1])
        sums = torch.full((2, classes[0] * classes[1] * -(-largest // rows) + 1, case.c), float("nan"))
        info["sums"] = sums[:, :-1]
        call.sum_g, call.sum_gx = (pointer(part) for part in info["sums"])
    lib.call("simt_conv", ctypes.byref(call), seed=seed)
    assert "sums" not in info or sums[:, -1].isnan().all(), "written past the last tile's sums"
    info["counters"] = lib.counters
    return out, info


def expected(kind: str, case: Case, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same, by PyTorch in fp64."""
    a, b = a.double(), b.double()
    if kind == "fprop":
        return F.conv2d(a, b, **case.kwargs())
    if kind == "dgrad":
        return torch.nn.grad.conv2d_input(case.x_shape(), b, a, **case.kwargs())
    return torch.nn.grad.conv2d_weight(b, case.w_shape(), a, **case.kwargs())


def operands(kind: str, case: Case, dtype: torch.dtype, make) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = {
        "fprop": (case.x_shape(), case.w_shape()),
        "dgrad": (case.y_shape(), case.w_shape()),
        "wgrad": (case.y_shape(), case.x_shape()),
    }[kind]
    return make(shapes[0], dtype), make(shapes[1], dtype)


HALF = conv_dtypes(torch.float16, torch.bfloat16)
needs_fp32 = pytest.mark.skipif(not conv_dtypes(torch.float32), reason="the quick library has no fp32 convolutions")
KINDS = ["fprop", "dgrad", "wgrad"]

# ResNet50's kinds of layer first, then the hostile ones.
CASES = [
    Case(2, 64, 4, 4, 64),
    Case(4, 64, 2, 2, 128),  # 4 of 9 taps live
    Case(5, 128, 1, 1, 64),  # 1 of 9 taps live
    Case(4, 128, 1, 1, 72, 1, 1, padding=(0, 0)),
    Case(2, 32, 8, 8, 64, stride=(2, 2)),
    Case(3, 64, 7, 5, 40, 1, 1, stride=(2, 2), padding=(0, 0)),
    Case(2, 3, 16, 16, 64, 7, 7, stride=(2, 2), padding=(3, 3)),  # the stem
    Case(1, 16, 9, 7, 24, 3, 5, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    Case(2, 8, 10, 10, 8, stride=(3, 2), padding=(2, 0), dilation=(2, 3)),
    Case(1, 8, 9, 9, 8, stride=(2, 4), padding=(2, 2), dilation=(2, 2)),  # stride and dilation share a factor
    Case(2, 8, 7, 7, 16, 2, 2, stride=(4, 3), padding=(0, 0)),  # stride > kernel: some inputs are never read
    Case(1, 7, 5, 6, 11, padding=(1, 2)),  # odd channels
    Case(2, 16, 4, 5, 12),  # channels that fit 16 bytes on one side only
    Case(2, 12, 4, 5, 16),
    Case(2, 13, 3, 3, 8, 3, 3, padding=(4, 4)),  # padding wider than the filter
    Case(3, 48, 6, 6, 32, groups=2),
    Case(2, 12, 5, 5, 6, groups=3),
    Case(2, 32, 4, 4, 64, 4, 4, stride=(2, 2), padding=(1, 1), dilation=(1, 1)),
]
DEPTHWISE = [
    Case(2, 16, 6, 5, 16, groups=16),
    Case(3, 40, 9, 7, 40, 5, 3, stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=40),
    Case(2, 7, 5, 5, 7, 2, 2, stride=(3, 3), padding=(0, 0), groups=7),
    Case(2, 8, 1, 1, 8, groups=8),
]


def exact_inputs(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, dtype: integers(shape, dtype, generator)


def check_exact(kind, case, dtype, seed=0, **options):
    a, b = operands(kind, case, dtype, exact_inputs(seed + 1))
    got, info = run(kind, case, a, b, seed=seed, **options)
    want = expected(kind, case, a, b).to(dtype)
    assert torch.equal(got, want), f"{(got != want).sum()} of {got.numel()} values differ"
    return info["counters"]
