"""The loss part of fastconv.functional: torch.nn.functional's signatures and semantics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _autocast as autocast
from . import _checks as check
from . import ops
from .autograd import CrossEntropyFunction
from .autograd.common import needs_grad

_REDUCTION = {"none": 0, "mean": 1, "sum": 2}  # torch.nn._reduction's enum


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`torch.nn.functional.cross_entropy`, arguments, results and errors alike, in one pass over the logits.

    Shapes: input [C], [N, C] or [N, C, d1, ...]; target class indices [], [N] or [N, d1, ...] (int64, uint8) or
    probabilities of input's shape; weight [C]. The log-sum-exp is kept for the backward (float32; float64 for float64),
    which recomputes the probabilities; the logits are never overwritten. The softmax is the online one of
    Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867

    Autocast: runs and returns in float32; half-precision logits, probability targets and class weights are cast.

    Raises ValueError where the batch sizes differ, IndexError on a class index out of range (on a CPU), RuntimeError
    on other shapes and dtypes.
    """
    op = "cross_entropy"
    if size_average is not None or reduce is not None:
        reduction = F._Reduction.legacy_get_string(size_average, reduce)
    if isinstance(input, Tensor) and autocast.enabled(input):
        # Stock autocast runs the loss in float32: logits, probabilities and class weights alike.
        input, target, weight = (t.float() if _is_low(t) else t for t in (input, target, weight))
    tensors = (input, target, weight)
    call = ops.recall(op, tensors, (reduction, ignore_index, label_smoothing))
    if call.settings is not None:
        return _cross_entropy(call.backend, *tensors, *call.settings)
    check.tensor(op, "input", input)
    check.tensor(op, "target", target)
    check.tensor(op, "weight", weight, optional=True)
    if reduction not in _REDUCTION:
        raise ValueError(f"{op}: reduction expected one of none, mean, sum; got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"{op}: label_smoothing expected between 0.0 and 1.0, got {label_smoothing}")
    limit = _check_shapes(op, input, target, weight, ignore_index)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        limit = limit or "weight requires a gradient"
    elif weight is not None and weight.dtype != input.dtype:
        limit = limit or f"weight has dtype {weight.dtype}, input {input.dtype}"
    settings = (reduction, ignore_index, float(label_smoothing))
    return _cross_entropy(ops.select(call, tensors, settings, limit, _cross_entropy), *tensors, *settings)


def _cross_entropy(backend, input, target, weight, reduction, ignore_index, label_smoothing):
    if backend == "aten":
        return ops.aten.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    one_row = input.dim() == 1
    if one_row:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    args = (input, target, weight, _REDUCTION[reduction], ignore_index, label_smoothing)
    grad = needs_grad(input, target)
    loss = CrossEntropyFunction.apply(*args, backend) if grad else ops.impl(backend, "cross_entropy")(*args)[0]
    return loss.squeeze(0) if one_row and reduction == "none" else loss


def _is_low(t: Tensor | None) -> bool:
    return isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16)


def _check_shapes(op: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> str:
    """Raises on what no backend can compute; returns the reason where only ``aten`` can ("" where all can)."""
    if input.dim() == 0:
        raise RuntimeError(f"{op}: input expected at least 1 dimension [C], got a 0-dimensional tensor")
    channel = min(input.dim() - 1, 1)
    classes, rows = input.size(channel), [*input.shape[:channel], *input.shape[channel + 1 :]]
    if target.is_floating_point():
        if ignore_index >= 0:
            raise RuntimeError(f"{op}: ignore_index is not supported for probability targets, got {ignore_index}")
        expected = list(input.shape)
    else:
        if target.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(f"{op}: target expected dtype int64 (class indices), got {target.dtype}")
        expected = rows
    if list(target.shape) != expected:
        # F.cross_entropy raises ValueError for the batch size alone and RuntimeError for any other shape.
        wrong_batch = input.dim() > 1 and (target.dim() == 0 or target.size(0) != input.size(0))
        raise (ValueError if wrong_batch and target.dim() in (0, len(expected)) else RuntimeError)(
            f"{op}: target expected shape {expected} for input {list(input.shape)}, got {list(target.shape)}"
        )
    check.vector(op, "weight", weight, classes)
    if not input.is_floating_point():
        return f"dtype {input.dtype} is not supported"
    if target.is_floating_point() and target.dtype != input.dtype:
        return f"target has dtype {target.dtype}, input {input.dtype}"
    return "there are no classes" if classes == 0 else ""
