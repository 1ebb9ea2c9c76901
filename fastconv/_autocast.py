"""Autocast's rules of the public functions, applied before the operators, so that autograd sees the casts."""

from __future__ import annotations

import torch
from torch import Tensor

# Read once: torch.compile cannot trace the question.
_KINDS = frozenset(k for k in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(k))


def enabled(like: Tensor) -> bool:
    """Whether autocast is on for this tensor's device."""
    return like.device.type in _KINDS and torch.is_autocast_enabled(like.device.type)


def lower_precision(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast's lower-precision operators see them; float64 and integers stay, as in stock autocast."""
    if not enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )
