"""The class of calls that a measurement stands for; the environment that it holds in is in fastconv/_measured.py.

A class is an operator with everything that moves its time: dtypes, layouts, shapes, which tensors there are and want a
gradient, and the settings. Shapes are exact but for the batch (rounded up to a power of two) and for maps wider than 32
(rounded up to three significant bits): one measurement serves a last, smaller batch and images of any size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The tensors, by position, whose first dimension is the batch; the first one alone for the other operators.
_BATCHED = {
    "conv2d_bias_act": (0, 3),
    "conv2d_bn_act": (0, 3),
    "batch_norm_act": (0, 1),
    "cross_entropy": (0, 1),
}
_EXACT_SIDE = 32


class Spec(NamedTuple):
    """What a class keeps of one tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    grad: bool


def spec(t: Tensor | None) -> Spec | None:
    if t is None:
        return None
    grad = t.requires_grad and torch.is_grad_enabled()
    return Spec(tuple(t.shape), tuple(t.stride()), str(t.dtype).removeprefix("torch."), grad)


def _up(size: int, bits: int) -> int:
    """``size`` rounded up to ``bits`` significant bits."""
    step = 1 << max(0, size.bit_length() - bits)
    return -(-size // step) * step


def _layout(shape: Sequence[int], stride: Sequence[int]) -> str:
    """ "" contiguous, "cl" channels_last, "strided" anything else; sides of 1 count for neither."""

    def dense(order: Sequence[int]) -> bool:
        expected = 1
        for d in order:
            if shape[d] != 1:
                if stride[d] != expected:
                    return False
                expected *= shape[d]
        return True

    if dense(range(len(shape) - 1, -1, -1)):
        return ""
    return "cl" if len(shape) == 4 and dense((1, 3, 2, 0)) else "strided"


def _text(t: Spec | None, batched: bool) -> str:
    if t is None:
        return "-"
    shape = list(t.shape)
    if batched and shape:
        shape[0] = _up(shape[0], 1)
        shape[2:] = [side if side <= _EXACT_SIDE else _up(side, 3) for side in shape[2:]]
    return f"{t.dtype}[{','.join(map(str, shape))}]{_layout(t.shape, t.stride)}{'*' if t.grad else ''}"


def _setting(value: object) -> str:
    if isinstance(value, (tuple, list, torch.Size)):
        return "x".join(map(str, value))
    if isinstance(value, float):  # no float's value moves a time, but label smoothing's being there does
        return "real" if value else "0"
    return str(value)


def class_of(op: str, specs: Sequence[Spec | None], settings: Sequence[object]) -> str:
    """The class's name, readable: "conv2d_bias_act float32[128,64,8,8]cl* float32[64,64,3,3]cl* - - 1x1 1x1 ..."."""
    batched = _BATCHED.get(op, (0,))
    words = [op, *(_text(t, i in batched) for i, t in enumerate(specs)), *map(_setting, settings)]
    return " ".join(words)


def short(call: str) -> str:
    """A class's name without what its neighbours in a table share: vectors, absent tensors, unnamed numbers."""
    words = call.split(" ")
    return " ".join(w for w in words if w not in ("-", "real") and not re.fullmatch(r"\w+\[\d*\]\*?", w))
