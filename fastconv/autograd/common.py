"""What the Functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import PREACT_ACTIVATIONS
from ..ops import impl
from . import deferred


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operator on these tensors; without it no Function is needed.

    An exported program holds the raw operators, whose backward raises: torch.export keeps of a Function its forward
    alone, as a region without gradients, and a program trained like that would miss gradients in silence.
    """
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return False
    return not torch.compiler._is_exporting_flag  # is_exporting() reads it, but in torch.compile's traces it says True


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """A Function's tensors; under torch.compile a repeated one becomes a view of itself.

    Dynamo gives an argument that occurs twice the gradient of its last place alone (seen in PyTorch 2.11): a block
    ``relu(bn(conv(x)) + x)`` lost the convolution's.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        repeated = t is not None and any(t is other for other in tensors[:i])
        found.append(t.view_as(t) if repeated else t)
    return tuple(found)


class _Refused(torch.autograd.Function):
    """Hands ``count`` gradients on, tied to the tensors that they depend on by a backward that raises."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.function = name
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.function} is differentiable once: the derivative of its backward is not implemented. "
            'Run the forward under fastconv.use_backend("aten") for second derivatives.'
        )


def differentiable_once(backward: Callable) -> Callable:
    """For a Function's backward whose own derivative is not written: asking for it raises RuntimeError.

    The decorated ``backward(ctx, saved, *grad_outputs)`` is given ``ctx.saved_tensors``.
    torch.autograd.function.once_differentiable raises only if an *incoming* gradient requires a gradient. The result
    depends on the saved tensors too, so with a constant incoming gradient (``out.sum()``) it would hand out a gradient
    that silently misses its graph.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grad_outputs: Tensor):
        saved = deferred.saved(ctx)  # once: under activation checkpointing a second read is an error
        # Grad mode is on in a backward that was called with create_graph=True, and while torch.compile traces one.
        if not torch.is_grad_enabled():
            grads = backward(ctx, saved, *grad_outputs)
            deferred.release(ctx)
            return grads
        with torch.no_grad():
            grads = backward(ctx, saved, *grad_outputs)
        deferred.release(ctx)
        if torch.compiler.is_compiling():
            return grads
        sources = [t for t in (*saved, *grad_outputs) if t is not None and t.requires_grad]
        if getattr(ctx, "source", None) is not None:
            sources.append(torch.zeros((), requires_grad=True))  # stands for an input that was not kept
        if not sources:
            return grads
        places = [i for i, g in enumerate(grads) if g is not None]
        name = type(ctx).__name__.removesuffix("Backward")
        refused = _Refused.apply(name, len(places), *[grads[i] for i in places], *sources)
        return tuple(refused[places.index(i)] if i in places else None for i in range(len(grads)))

    return wrapper


def saves_output(activation: str) -> bool:
    """Whether act'(x) is computed from act(x), which the next layer keeps alive anyway."""
    return activation != "identity" and activation not in PREACT_ACTIVATIONS


def conv_backward(ctx, grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Data and weight gradient of the convolution in ``ctx.geometry``, each only if inputs 0 and 1 ask for it."""
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    if not any(wanted):
        return None, None
    grads = impl(ctx.backend, "conv2d_backward")(grad, input, weight, *ctx.geometry, wanted)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


def bias_gradient(ctx, grad: Tensor) -> Tensor:
    """Sum over n, p and q, accumulated in float32."""
    return impl(ctx.backend, "act_bias_backward")(grad, None, "identity", [False, True])[1]
