"""What rewritten graphs of Dynamo call: each group as one operator over the tensors that the graph has in hand.

The counterpart of runtime.py, whose groups read their modules. Where the fused operator is not exact (a tensor that is
not plain, an addition that broadcasts or promotes) the group runs call by call, as the traced code does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from .runtime import ACTIVATIONS, ADDITIONS, channels_last, conv_shape, fits, named, plain_input


def _ready(x: Any, weight: Any) -> bool:
    return plain_input(x) and plain_input(weight)


def _pairs(stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    """The settings as pairs: the graph has what its author wrote, an int, or a tuple of one or two."""

    def pair(value: Any) -> Any:
        value = (value,) if isinstance(value, int) else tuple(value)
        return (value[0], value[-1])

    return pair(stride), padding if isinstance(padding, str) else pair(padding), pair(dilation)


def _finish(x: Tensor, act: str | None, add: str, residual: Any) -> Any:
    if add:
        x = ADDITIONS[add](x, residual)
    return x if act is None else ACTIVATIONS[act](x)


def _exact(x: Tensor, weight: Tensor, settings: tuple[Any, ...], add: str, residual: Any) -> bool:
    if not add:
        return True
    stride, padding, dilation = _pairs(*settings[:3])
    shape = conv_shape(x, weight.size(0), weight.shape[2:], stride, padding, dilation)
    return fits(residual, x, shape, True)


@named
def conv_bn_act(
    x: Tensor, weight: Tensor, bias: Any, conv: tuple[Any, ...], norm: tuple[Any, ...], act: str | None, nhwc: bool,
    add: str = "", residual: Any = None,
):  # fmt: skip
    """act(batch_norm(conv2d(x)) + residual).

    conv: stride, padding, dilation, groups. norm: F.batch_norm's arguments behind the input. act: a name or None. add:
    "", "add" or "iadd".
    """
    if not _ready(x, weight) or not _exact(x, weight, conv, add, residual):
        return _finish(F.batch_norm(torch.conv2d(x, weight, bias, *conv), *norm), act, add, residual)
    mean, var, bn_weight, bn_bias, training, momentum, eps = norm
    stride, padding, dilation, groups = conv
    return FF.conv2d_bn_act(
        channels_last(x) if nhwc else x, weight, bias, mean, var, bn_weight, bn_bias, stride=stride, padding=padding,
        dilation=dilation, groups=groups, training=training, momentum=momentum, eps=eps, activation=act or "identity",
        residual=residual,
    )  # fmt: skip


@named
def conv_act(
    x: Tensor, weight: Tensor, bias: Any, conv: tuple[Any, ...], act: str | None, nhwc: bool, add: str = "",
    residual: Any = None,
):  # fmt: skip
    """act(conv2d(x) + residual)."""
    if not _ready(x, weight) or not _exact(x, weight, conv, add, residual):
        return _finish(torch.conv2d(x, weight, bias, *conv), act, add, residual)
    x = channels_last(x) if nhwc else x
    return FF.conv2d_bias_act(x, weight, bias, *conv, activation=act or "identity", residual=residual)


@named
def bn_act(x: Tensor, norm: tuple[Any, ...], act: str | None, nhwc: bool, add: str = "", residual: Any = None):
    """act(batch_norm(x) + residual)."""
    if not plain_input(x) or (add and not fits(residual, x, tuple(x.shape), False)):
        return _finish(F.batch_norm(x, *norm), act, add, residual)
    x = channels_last(x) if nhwc else x
    return FF.batch_norm_act(x, *norm, activation=act or "identity", residual=residual)


def contiguous(x: Tensor) -> Tensor:
    """What is contiguous in stock PyTorch, made so."""
    return x.contiguous()
