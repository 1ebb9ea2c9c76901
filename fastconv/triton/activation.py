"""Activations and their derivatives, fp32 in and out, chosen at compile time by name.

    act(x)        identity | max(x, 0) | min(max(x, 0), 6) | x or 0.01 x | 1/(1+e^-x) | tanh x | x s(x) | x Phi(x) |
                  x min(max(x+3, 0), 6) / 6
    act'(saved)   relu, relu6, leaky_relu, sigmoid, tanh: from y = act(x), which the next layer keeps anyway;
                  silu, gelu, hardswish: from x.

NaN passes through every one of them as in PyTorch: comparisons are written so that a NaN takes the branch that keeps x.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) with e = exp(-2|x|) cannot overflow, but cancels for small |x|; there the odd Taylor polynomial
    # up to x^9 is exact to fp32 (the next term is 9e-3 x^11: 8e-9 of x at x = 0.25). libdevice's tanh is not used
    # because the interpreter does not have it.
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    q = x * x
    poly = 1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835))))
    return tl.where(a < 0.25, x * poly, tl.where(x < 0, -large, large))


@triton.jit
def act(x, ACT: tl.constexpr):
    if ACT == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACT == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACT == "leaky_relu":
        x = tl.where(x < 0, 0.01 * x, x)
    elif ACT == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    elif ACT == "tanh":
        x = _tanh(x)
    elif ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "hardswish":
        gate = x + 3.0
        x = x * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) * (1.0 / 6.0)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
    return x


@triton.jit
def act_backward(grad, saved, ACT: tl.constexpr):
    """grad * act', ``saved`` the output or the pre-activation as the module's table says."""
    if ACT == "relu":
        grad = tl.where(saved <= 0, 0.0, grad)
    elif ACT == "relu6":
        grad = tl.where((saved <= 0) | (saved >= 6), 0.0, grad)
    elif ACT == "leaky_relu":
        grad = tl.where(saved > 0, grad, 0.01 * grad)
    elif ACT == "sigmoid":
        grad = grad * (1.0 - saved) * saved
    elif ACT == "tanh":
        grad = grad * (1.0 - saved * saved)
    elif ACT == "silu":  # d(x s) = s + x s (1 - s)
        s = 1.0 / (1.0 + tl.exp(-saved))
        grad = grad * s * (1.0 + saved * (1.0 - s))
    elif ACT == "gelu":  # d(x Phi) = Phi + x phi,  phi = exp(-x^2/2) / sqrt(2 pi)
        cdf = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        grad = grad * (cdf + saved * tl.exp(-0.5 * saved * saved) * 0.3989422804014327)
    elif ACT == "hardswish":
        grad = tl.where(saved <= -3, 0.0, tl.where(saved < 3, grad * (saved * (1.0 / 3.0) + 0.5), grad))
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
    return grad


def needs_preact(activation: str) -> bool:
    """Whether act' is computed from the pre-activation (see the module's table)."""
    return activation in ("silu", "gelu", "hardswish")
