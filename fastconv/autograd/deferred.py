"""Results that the backward recomputes instead of keeping: y = act(bn(z) + r) from the convolution's raw output z.

Without this a group of convolution + batch norm + activation keeps z for batch norm's backward, and y for the next
convolution's weight gradient and for act'. A deferred group keeps z alone; whoever needs y in the backward gets it from
the batch-norm operator of the forward, run again on z: the same kernel on the same values. A residual r that is itself
a deferred result is not kept either but recomputed, down to the first one that is kept. A recomputed y stays until the
backward of its own group, which comes last, so that each is computed once.

A reader finds the group through ``y.grad_fn``, which is the group's own context: a view, a detached or an in-place
changed y has another one, or another version, and is kept as it is. Nothing hangs on the tensor itself. The tensors of
a group are read through ``saved_tensors``, so that autograd's checks for in-place changes, saved-tensor hooks and
activation checkpointing see them; once, because under checkpointing a second read is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import impl


def may_defer() -> bool:
    """Not while a compiler traces: it plans what is kept and what is recomputed by itself."""
    return not torch.compiler.is_compiling()


def mark(ctx: Any, output: Tensor) -> None:
    """Makes ``output`` the deferred result of ctx."""
    ctx.deferred_version = output._version
    ctx.kept = ctx.value = None


def source(tensor: Tensor | None) -> Any:
    """The context of the group that can recompute the tensor; None where it has to be kept."""
    if tensor is None or not may_defer():
        return None
    node = tensor.grad_fn
    version = getattr(node, "deferred_version", None)
    return node if version is not None and version == tensor._version else None


def saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """ctx.saved_tensors; of a deferred group read once, until its own backward is over."""
    if getattr(ctx, "deferred_version", None) is None or not may_defer():
        return ctx.saved_tensors
    if ctx.kept is None:
        ctx.kept = ctx.saved_tensors
    return ctx.kept


def release(ctx: Any) -> None:
    """After the group's backward: nobody needs its result any more."""
    if getattr(ctx, "deferred_version", None) is not None and may_defer():
        ctx.kept = ctx.value = None


def value(ctx: Any) -> Tensor:
    """The deferred result of ctx, and on the way there those of its residuals."""
    chain, node = [], ctx
    while node is not None and node.value is None:
        chain.append(node)
        node = node.residual_source
    with torch.no_grad():
        for node in reversed(chain):
            node.value = _recompute(node)
    return ctx.value


def _recompute(ctx: Any) -> Tensor:
    conv_output, _, residual, weight, bias, *_ = saved(ctx)
    if ctx.residual_source is not None:
        residual = ctx.residual_source.value
    # Without running statistics: the batch's own are what the forward used, and the momentum has nothing to update.
    return impl(ctx.backend, "batch_norm_act")(
        conv_output, residual, weight, bias, None, None, None, True, 0.0, ctx.eps, ctx.activation
    )[0]


def input_of(ctx: Any, kept: Tensor | None) -> Tensor:
    """The input of a reader: what it kept, or its source's result."""
    return kept if ctx.source is None else value(ctx.source)
