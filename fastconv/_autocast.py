"""Autocast's rules of the public functions, applied before the operators, so that autograd sees the casts."""

from __future__ import annotations

import torch
from torch import Tensor

# Read once: torch.compile cannot trace the question.
_KINDS = frozenset(k for k in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(k))


def enabled(like: Tensor) -> bool:
    """Whether autocast is on for this tensor's device."""
    kind = like.device.type
    return kind in _KINDS and torch.is_autocast_enabled(kind)


def convolution(input: Tensor, weight: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast's lower-precision operators see them; float64 and integers stay, as in stock autocast.

    A float32 weight stays too where the ``cpu`` kernels round it to bfloat16: they do so as they read it, and give its
    gradient in float32, without a copy of the weight or a cast of its gradient. The other backends need :func:`like`.
    What is not a tensor stays: the functions' checks come later.
    """
    if not isinstance(input, Tensor) or not enabled(input):
        return input, weight, *others
    dtype = torch.get_autocast_dtype(input.device.type)
    input, *others = [_lower(t, dtype) for t in (input, *others)]
    kept = isinstance(weight, Tensor) and weight.device == input.device and wide(input, weight)
    return input, weight if kept else _lower(weight, dtype), *others


def _lower(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    floating = isinstance(t, Tensor) and t.is_floating_point() and t.dtype is not torch.float64
    return t.to(dtype) if floating else t


def wide(input: Tensor, weight: Tensor) -> bool:
    """Whether the weight is what :func:`convolution` left in float32."""
    return weight.dtype is torch.float32 and input.dtype is torch.bfloat16 and input.device.type == "cpu"


def like(input: Tensor, weight: Tensor) -> Tensor:
    """The weight in the input's dtype."""
    return weight if weight.dtype is input.dtype else weight.to(input.dtype)
