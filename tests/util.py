"""What the equality tests share: running an operator three times over, and the tolerance rule.

Every check runs the same call as fastconv, as stock PyTorch in the same dtype, and as the oracle (fastconv.reference
in float64). fastconv's error against the oracle may be twice stock's, plus a small absolute term (design, section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastconv.functional as FF
from fastconv import _ext, reference

ACTIVATIONS = ("identity", "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "hardswish")
STOCK_ACTIVATION = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.01),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
}
# Where the derivative jumps: two right answers lie far apart there, so gradients are compared beside these points
# (and exactly on them, against stock, in tests of their own).
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
# Written by the operator itself: each run gets its own copy.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The absolute term, in units of eps * max |oracle|: room for one more rounding of the result in half precision, and
# for another order of summation in full precision.
SLACK = {torch.float32: 8.0, torch.float64: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}


class Stock:
    """The operators as a user of stock PyTorch writes them: one torch call per step, signatures of FF."""

    @staticmethod
    def conv2d_bias_act(
        input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, activation="relu", residual=None
    ):
        out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return STOCK_ACTIVATION[activation](out if residual is None else out + residual)

    @staticmethod
    def batch_norm_act(
        input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
        *, activation="relu", residual=None, num_batches_tracked=None,
    ):  # fmt: skip
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            momentum = 1.0 / num_batches_tracked.item() if momentum is None else momentum
        out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
        return STOCK_ACTIVATION[activation](out if residual is None else out + residual)

    @staticmethod
    def conv2d_bn_act(
        input, weight, bias, running_mean, running_var, bn_weight, bn_bias, *, stride=1, padding=0, dilation=1, groups=1,
        **norm,
    ):  # fmt: skip
        out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return Stock.batch_norm_act(out, running_mean, running_var, bn_weight, bn_bias, **norm)

    max_pool2d = staticmethod(F.max_pool2d)
    avg_pool2d = staticmethod(F.avg_pool2d)
    adaptive_avg_pool2d = staticmethod(F.adaptive_avg_pool2d)
    cross_entropy = staticmethod(F.cross_entropy)


@dataclass
class Outcome:
    """What one run of an operator left behind."""

    output: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and values, NaN equal to NaN, wherever the elements lie in memory."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def execute(
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    settings: dict[str, Any],
    wanted: Iterable[str] = (),
    grad_output: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """Runs ``function(**tensors, **settings)``; gradients of ``wanted`` for ``grad_output``, in ``dtype`` if given.

    Also proves that the call writes nothing but its running statistics.
    """
    local, before = {}, {}
    for name, t in tensors.items():
        if t is None:
            local[name] = None
            continue
        t = t.detach()
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        if name in BUFFERS:
            t = t.clone()
        else:
            before[name] = (t.clone(), t._version)
        local[name] = t.requires_grad_() if name in wanted else t
    output = function(**local, **settings)
    grads = {}
    if wanted:
        upstream = None if grad_output is None else grad_output.to(output.dtype)
        kept = None if upstream is None else upstream.clone()
        found = torch.autograd.grad(output, [local[name] for name in wanted], upstream)
        grads = dict(zip(wanted, found, strict=True))
        assert kept is None or same_bits(kept, upstream), "grad_output was overwritten"
    for name, (value, version) in before.items():
        assert same_bits(value, local[name].detach()), f"{name} was overwritten"
        assert local[name]._version == version, f"{name} was written in place"
    return Outcome(output.detach(), grads, {n: local[n] for n in BUFFERS if local.get(n) is not None})


def assert_close_2x(
    what: str, ours: Tensor, stock: Tensor, oracle: Tensor, atol: float = 0.0, slack: float = 1.0
) -> None:
    """``ours`` is no further from ``oracle`` than twice ``stock``, by the largest and by the RMS error.

    ``slack``: a factor on the absolute term. ``atol``: the least absolute term, for results that are small sums of
    large terms. Where stock is NaN or infinite, ours is the same, or what the oracle gives (stock's BN folds inf into
    inf - inf; its fp16 loss overflows).
    """
    assert ours.shape == stock.shape == oracle.shape, f"{what}: {ours.shape}, stock {stock.shape}, {oracle.shape}"
    assert ours.dtype == stock.dtype, f"{what}: dtype {ours.dtype}, stock {stock.dtype}"
    assert ours.device == stock.device, f"{what}: on {ours.device}, stock on {stock.device}"
    assert ours.layout is torch.strided
    if ours.numel() == 0:
        return
    if not ours.is_floating_point():
        assert torch.equal(ours, stock), f"{what}: {ours} is not {stock}"
        return
    slack = slack * SLACK[ours.dtype] * torch.finfo(ours.dtype).eps
    ours, stock, oracle = (t.detach().double().reshape(-1) for t in (ours, stock, oracle))
    special = ~stock.isfinite()
    as_stock = (ours == stock) | (ours.isnan() & stock.isnan()) | (ours == oracle) | (ours.isnan() & oracle.isnan())
    as_stock |= (ours - oracle).abs() <= slack * oracle.abs()
    assert as_stock[special].all(), (
        f"{what}: of {int(special.sum())} NaN or infinite elements of stock PyTorch are {ours[special][:8].tolist()}, "
        f"expected {stock[special][:8].tolist()}"
    )
    finite = ~special & oracle.isfinite()
    ours, stock, oracle = ours[finite], stock[finite], oracle[finite]
    if ours.numel() == 0:
        return
    error, stock_error = (ours - oracle).abs(), (stock - oracle).abs()
    room = max(slack * oracle.abs().max().item(), atol)
    rms_room = max(slack * oracle.square().mean().sqrt().item(), atol)
    largest, rms = error.max().item(), error.square().mean().sqrt().item()
    bound = 2 * stock_error.max().item() + room
    rms_bound = 2 * stock_error.square().mean().sqrt().item() + rms_room
    at = int(error.nan_to_num(nan=float("inf")).argmax())
    assert largest <= bound and rms <= rms_bound, (
        f"{what}: error max {largest:.3g} (allowed {bound:.3g}), rms {rms:.3g} (allowed {rms_bound:.3g}) over "
        f"{error.numel()} elements; worst at [{at}]: got {ours[at]:.9g}, stock {stock[at]:.9g}, oracle {oracle[at]:.9g}"
    )


def beside_kinks(activation: str, preact: Tensor, grad_output: Tensor) -> Tensor:
    """``grad_output``, zero where ``preact`` is so near a kink of the activation that rounding decides the side."""
    near = torch.zeros_like(preact, dtype=torch.bool)
    eps = torch.finfo(grad_output.dtype).eps
    reach = preact[preact.isfinite()].abs().max().item() if preact.isfinite().any() else 0.0
    for kink in KINKS.get(activation, ()):
        near |= (preact - kink).abs() <= 4 * eps * max(reach, abs(kink))
    return torch.where(near, torch.zeros_like(grad_output), grad_output)


def check(
    op: str,
    tensors: dict[str, Tensor | None],
    settings: dict[str, Any] | None = None,
    wanted: Iterable[str] = (),
    atol: dict[str, float] | None = None,
    shape_grad: Callable[[Tensor], Tensor] = lambda g: g,
    slack: float = 1.0,
) -> Outcome:
    """FF.<op> against stock and the oracle: output, gradients of ``wanted``, running statistics. Returns ours.

    shape_grad: turns the random contiguous grad_output into one of another memory layout.
    slack, atol: as assert_close_2x, the latter by result name ("output", "grad of input", ...).
    """
    settings, atol = settings or {}, atol or {}
    oracle_of, stock_of, ours_of = getattr(reference, op), getattr(Stock, op), getattr(FF, op)
    grad_output = None
    if wanted:
        smooth = dict(settings, activation="identity") if "activation" in settings else settings
        preact = execute(oracle_of, tensors, smooth, dtype=torch.float64).output
        first = next(t for t in tensors.values() if t is not None)
        noise = torch.randn(preact.shape, device=first.device).to(first.dtype)
        grad_output = shape_grad(beside_kinks(settings.get("activation", "identity"), preact, noise))
    oracle = execute(oracle_of, tensors, settings, wanted, grad_output, torch.float64)
    stock = execute(stock_of, tensors, settings, wanted, grad_output)
    ours = execute(ours_of, tensors, settings, wanted, grad_output)
    assert_close_2x(f"{op} output", ours.output, stock.output, oracle.output, atol.get("output", 0.0), slack)
    for name in wanted:
        what = f"grad of {name}"
        assert_close_2x(
            f"{op} {what}", ours.grads[name], stock.grads[name], oracle.grads[name], atol.get(what, 0.0), slack
        )
    for name, value in ours.buffers.items():
        assert_close_2x(f"{op} {name}", value, stock.buffers[name], oracle.buffers[name], atol.get(name, 0.0), slack)
    return ours


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """The layout rule: channels_last if one of the tensors is (as Tensor::suggest_memory_format sees it)."""
    for t in tensors:
        if t.dim() == 4 and torch._prims_common.suggest_memory_format(t) is torch.channels_last:
            return torch.channels_last
    return torch.contiguous_format


def assert_format(what: str, result: Tensor, *sources: Tensor) -> None:
    expected = memory_format(*sources)
    assert result.is_contiguous(memory_format=expected), (
        f"{what}: strides {result.stride()} of shape {tuple(result.shape)}, expected {expected} like "
        f"{[(tuple(t.shape), t.stride()) for t in sources]}"
    )


def needs_vectors() -> None:
    """Skips a module of tests where the CPU has no convolution engine of its own."""
    if not _ext.HAS_EXT:
        pytest.skip(_ext.EXT_REASON, allow_module_level=True)
    if _ext.build_info()["cpu_isa"] == "portable":
        pytest.skip("stock convolves where there are no vector instructions", allow_module_level=True)


def check_sums(got: Tensor, oracle: Tensor, magnitude: Tensor) -> None:
    """Sums of products against fp64. magnitude: the sum of absolute values, which fp32's rounding is relative to."""
    rounding = torch.finfo(got.dtype).eps / 2 if got.dtype is torch.bfloat16 else 0
    error = (got.double() - oracle).abs()
    assert bool((error <= 1.01 * rounding * oracle.abs() + 2**-19 * magnitude).all()), (error / magnitude).max()
