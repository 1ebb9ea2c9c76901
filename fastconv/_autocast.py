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


def lower_precision(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast's lower-precision operators see them; float64 and integers stay, as in stock autocast.

    What is not a tensor stays too: the functions' checks come later.
    """
    if not isinstance(tensors[0], Tensor) or not enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple([_lower(t, dtype) for t in tensors])


def _lower(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    floating = isinstance(t, Tensor) and t.is_floating_point() and t.dtype is not torch.float64
    return t.to(dtype) if floating else t


def convolution(input: Tensor, weight: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same for a convolution, whose float32 weight stays as it is where the ``cpu`` kernels round it to bfloat16.

    They do so as they read it, and give its gradient in float32: no copy of the weights, no cast of their gradients.
    The other backends need :func:`like`.
    """
    if not isinstance(input, Tensor) or not enabled(input):
        return input, weight, *others
    lowered = lower_precision(input, *others)
    if isinstance(weight, Tensor) and weight.device == input.device and wide(lowered[0], weight):
        return lowered[0], weight, *lowered[1:]
    return lowered[0], _lower(weight, torch.get_autocast_dtype(input.device.type)), *lowered[1:]


def wide(input: Tensor, weight: Tensor) -> bool:
    """Whether the weight is what :func:`convolution` left in float32."""
    return weight.dtype is torch.float32 and input.dtype is torch.bfloat16 and input.device.type == "cpu"


def like(input: Tensor, weight: Tensor) -> Tensor:
    """The weight in the input's dtype."""
    return weight if weight.dtype is input.dtype else weight.to(input.dtype)
