"""Argument checks of fastconv.functional: each names the operator, the argument, what was expected and what came.

The exception types are those of the torch.nn.functional function of the same name.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "hardswish")
# d act/dx cannot be computed from act(x) for these: the pre-activation is kept (or recomputed) instead.
PREACT_ACTIVATIONS = frozenset({"silu", "gelu", "hardswish"})


def tensor(op: str, name: str, value: Any, optional: bool = False) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        wanted = "Tensor or None" if optional else "Tensor"
        raise TypeError(f"{op}: {name} expected {wanted}, got {type(value).__name__}")


def activation(op: str, value: Any) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"{op}: activation expected one of {', '.join(ACTIVATIONS)}; got {value!r}")


def _index(value: Any) -> int | torch.SymInt | None:
    """value as an int, numpy's and 0-dim tensors' included; None for anything else (bools, floats, strings)."""
    if isinstance(value, torch.SymInt) or type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    """(height, width) from an int or a sequence of one or two ints, as torch.nn.functional takes them."""
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = [_index(v) for v in value] if listed else [_index(value)]
    if None in numbers:
        raise TypeError(f"{op}: {name} expected an int or a tuple of 2 ints, got {value!r}")
    if len(numbers) not in (1, 2):
        raise RuntimeError(f"{op}: {name} expected an int or 2 ints, got {value!r}")
    return (numbers[0], numbers[-1])


def at_least(op: str, name: str, value: tuple[int, int], least: int) -> None:
    if value[0] < least or value[1] < least:
        raise RuntimeError(f"{op}: {name} expected values >= {least}, got {value}")


def same_device_and_dtype(op: str, **tensors: Tensor | None) -> None:
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        if t is None:
            continue
        if t.device != first.device:
            raise RuntimeError(f"{op}: {name} expected on {first.device} like {first_name}, got {t.device}")
        if t.dtype != first.dtype:
            raise RuntimeError(f"{op}: {name} expected dtype {first.dtype} like {first_name}, got {t.dtype}")


def conv_shapes(op: str, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.dim() not in (3, 4):
        raise RuntimeError(f"{op}: input expected 3 or 4 dimensions [N, C, H, W], got {list(input.shape)}")
    if weight.dim() != 4:
        raise RuntimeError(f"{op}: weight expected 4 dimensions [K, C/groups, R, S], got {list(weight.shape)}")
    if _index(groups) is None:
        raise TypeError(f"{op}: groups expected an int, got {groups!r}")
    if groups < 1:
        raise RuntimeError(f"{op}: groups expected >= 1, got {groups}")
    channels, per_group = input.size(-3), weight.size(1)
    if channels != per_group * groups:
        raise RuntimeError(
            f"{op}: weight has {per_group} input channels per group, input has {channels} (groups={groups})"
        )
    if weight.size(0) % groups != 0 or weight.size(0) < groups:
        raise RuntimeError(f"{op}: weight expected K divisible by groups={groups}, got {list(weight.shape)}")
    vector(op, "bias", bias, weight.size(0))


def vector(op: str, name: str, value: Tensor | None, length: int) -> None:
    if value is not None and (value.dim() != 1 or value.size(0) != length):
        raise RuntimeError(f"{op}: {name} expected shape [{length}], got {list(value.shape)}")


def residual_shape(op: str, residual: Tensor | None, shape: Sequence[int]) -> None:
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise RuntimeError(f"{op}: residual expected the output's shape {list(shape)}, got {list(residual.shape)}")
