"""What the Triton kernels cannot run: sizes past their 32-bit row numbers and offsets and past a grid's dimensions.

Tensors may pass 2^31 elements (the WIDE kernels, and 64-bit row offsets elsewhere); the number of rows, one padded
image and one weight may not. Bounds are rounded up to whole tiles, so a call just below one may be refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .common import cdiv

_MOST = 2**31 - 1 - 4096  # the last tile may end past the last row
_GRID = 65535  # y and z
_BLOCK_C = 64  # channels of one program of the channel-wise kernels
_TILE_ROWS, _TILE_COLUMNS = 16, 16  # the smallest tile of a convolution


def _first(*bounds: tuple[str, int, int]) -> str:
    for what, value, most in bounds:
        if value > most:
            return f"{what}: at most {most} in the Triton kernels, got {value}"
    return ""


def _channels(c: int) -> tuple[str, int, int]:
    return "channels", c, _GRID * _BLOCK_C


def limit(op: str, shapes: Sequence[Sequence[int]], settings: Sequence, grads: Sequence[bool]) -> str:
    """Why a call of a public operator cannot run here; "" where it can.

    shapes, grads: of the operator's tensors in order, () for None. settings: those of the choice of the backend.
    """
    x = shapes[0]
    if op == "cross_entropy":
        n, c = (1, x[0]) if len(x) == 1 else x[:2]
        d = math.prod(x[2:])
        # Where classes lie apart a tile holds 16 of them, d elements from one to the next.
        return _first(("rows", n * d, _MOST), ("classes", c, _GRID * 16), ("positions of one sample", d, _MOST // 16))
    if op == "batch_norm_act":
        return _first(("rows", math.prod(x) // max(x[1], 1), _MOST), _channels(x[1]))
    if "pool" in op:
        n, c, h, w = x if len(x) == 4 else (1, *x)
        windows = 0
        if op == "adaptive_avg_pool2d":
            p, q = settings[0]
            windows = max((h + 1) * (p + 1), (w + 1) * (q + 1))  # a window's ends are position * size / windows
        else:
            (sh, sw), (ph, pw) = settings[1:3]
            p, q = (h + 2 * ph) // sh + 1, (w + 2 * pw) // sw + 1
        return _first(("rows", n * max(h * w, p * q), _MOST), ("rows times windows", windows, _MOST), _channels(c))
    return _conv2d(x, shapes[1], settings, grads)


def _conv2d(x: Sequence[int], weight: Sequence[int], settings: Sequence, grads: Sequence[bool]) -> str:
    (n, c, h, w), (k, cg, r, s) = x, weight
    (sh, sw), (ph, pw), (dh, dw), groups = settings[:4]
    p, q = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1, (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
    depthwise = groups == c and groups > 1
    bounds = [
        ("rows", n * max(h * w, p * q), _MOST),
        ("elements of one padded image", (h + 2 * ph) * (w + 2 * pw) * c, _MOST),
        ("elements of one output image", p * q * k, _MOST),
        ("elements of the weight", k * cg * r * s, _MOST),
        ("statistics of an epilogue", cdiv(n * p * q, _TILE_ROWS) * k, _MOST),
        _channels(c),
        _channels(k),
    ]
    if depthwise:
        bounds.append(("taps of a depthwise filter", r * s, _GRID))
        return _first(*bounds)
    columns = cdiv(max(cg, k // groups), _TILE_COLUMNS)
    bounds += [
        ("groups", groups, _GRID),
        ("tiles of a convolution", cdiv(n * max(h * w, p * q), _TILE_ROWS) * columns, _MOST),
    ]
    if grads[0]:
        bounds.append(("stride classes of a data gradient", sh * sw, _GRID))
    if grads[1]:
        # 64 shares of the positions at most
        bounds += [("taps of a weight gradient", r * s, _GRID), ("groups of a weight gradient", groups, _GRID // 64)]
    return _first(*bounds)
