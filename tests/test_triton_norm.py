"""Activations, the activation + bias backward and batch norm in Triton against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_triton_tolerance import DEVICE, DTYPES, check, image, leaves, require_triton

from fastconv import reference
from fastconv._checks import ACTIVATIONS, PREACT_ACTIVATIONS
from fastconv.ops.aten import ACTIVATIONS as STOCK
from fastconv.triton import impl

require_triton()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_forward_and_backward(name, dtype):
    """Forward: batch norm in evaluation with mean 0 and variance 1. Backward: act_bias_backward."""
    x = (torch.linspace(-8, 8, 2 * 5 * 7 * 3).view(2, 5, 7, 3) + 1e-3).to(DEVICE, dtype)
    x = x.to(memory_format=torch.channels_last)
    zero, one = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    y, _, _ = impl("batch_norm_act")(x, None, None, None, zero, one, None, False, 0.1, 0.0, name)
    (x64,) = leaves(x)
    y64 = reference.activation(name, x64)
    xs = x.clone().requires_grad_()
    ys = STOCK[name](xs)
    check(y, y64, ys, name)
    if name == "identity":
        return
    g = image(2, 5, 7, 3, dtype, 1)
    (g64,) = torch.autograd.grad(y64, x64, g.cpu().double())
    (gs,) = torch.autograd.grad(ys, xs, g)
    saved = x if name in PREACT_ACTIVATIONS else ys.detach()
    grad, bias = impl("act_bias_backward")(g, saved, name, [True, True])
    check(grad, g64, gs, name)
    check(bias, g64.sum((0, 2, 3)), gs.sum((0, 2, 3)), name)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_activation_keeps_nan_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).view(1, 4, 1, 1).to(DEVICE)
    zero, one = torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)
    for name in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh", "hardswish"):
        y, _, _ = impl("batch_norm_act")(x, None, None, None, zero, one, None, False, 0.1, 0.0, name)
        assert torch.equal(y.nan_to_num(77), STOCK[name](x).nan_to_num(77)), name


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (3, 70, 3, 2), (1, 1, 9, 9), (40, 33, 8, 8)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bias_backward_of_the_identity(shape, layout):
    g = image(*shape, torch.float32, layout=layout)
    none, bias = impl("act_bias_backward")(g, None, "identity", [False, True])
    assert none.shape == (0,)
    check(bias, g.double().sum((0, 2, 3)), g.sum((0, 2, 3)))
    _, none = impl("act_bias_backward")(g, g, "relu", [True, False])
    assert none.shape == (0,)


def norm_case(shape, dtype, activation, residual, training, affine=torch.float32, momentum=0.1, offset=0.0, big=None):
    n, c, h, w = shape
    layout = torch.channels_last if big is None else big
    x, r, g = (image(*shape, dtype, seed, layout) for seed in (0, 1, 2))
    x = x + offset
    r = r if residual else None
    gen = torch.Generator().manual_seed(3)
    weight, bias, mean = (torch.randn(c, generator=gen).to(DEVICE, affine) for _ in range(3))
    var = torch.rand(c, generator=gen).add(0.5).to(DEVICE, affine)
    if affine is None:
        weight = bias = None
    counter = torch.tensor(3, device=DEVICE)

    # Oracle and stock, each with its own running statistics.
    x64, r64, w64, b64 = leaves(x, r, weight, bias)
    mean64, var64, count64 = mean.cpu().double(), var.cpu().double(), torch.tensor(3)
    y64 = reference.batch_norm_act(
        x64, mean64, var64, w64, b64, training, momentum, 1e-5,
        activation=activation, residual=r64, num_batches_tracked=count64,
    )  # fmt: skip
    grads64 = torch.autograd.grad(y64, [t for t in (x64, r64, w64, b64) if t is not None], g.cpu().double())
    xs, rs, ws, bs = (None if t is None else t.detach().clone().requires_grad_() for t in (x, r, weight, bias))
    mean_s, var_s = mean.clone(), var.clone()
    z = F.batch_norm(xs, mean_s, var_s, ws, bs, training, 0.25 if momentum is None else momentum, 1e-5)
    ys = STOCK[activation](z if rs is None else z + rs)
    grads_s = torch.autograd.grad(ys, [t for t in (xs, rs, ws, bs) if t is not None], g)

    y, save_mean, invstd = impl("batch_norm_act")(
        x, r, weight, bias, mean, var, counter, training, momentum, 1e-5, activation
    )
    check(y, y64, ys, "output")
    assert y.is_contiguous(memory_format=layout)
    if training:
        check(mean, mean64, mean_s, "running_mean")
        check(var, var64, var_s, "running_var")
        assert counter.item() == count64.item() == 4
        m64 = x64.detach().mean((0, 2, 3))
        check(save_mean, m64, m64.float(), "save_mean", scale=x.abs().max().item())
    mask = [True, residual and activation != "identity", True, True]
    grads = impl("batch_norm_act_backward")(
        g, x, None if activation in PREACT_ACTIVATIONS else y, r if activation in PREACT_ACTIVATIONS else None,
        weight, bias, save_mean, invstd, training, activation, mask,
    )  # fmt: skip
    kept = [got for got, wanted in zip(grads, mask, strict=True) if wanted]
    if residual and activation == "identity":
        grads64, grads_s = (grads64[0], *grads64[2:]), (grads_s[0], *grads_s[2:])
    for i, (got, want, stock) in enumerate(zip(kept, grads64, grads_s, strict=True)):
        check(got, want, stock, f"gradient {i}")
    if activation in ("relu", "relu6", "leaky_relu"):  # without an output the slope is told from the input
        again = impl("batch_norm_act_backward")(
            g, x, None, r, weight, bias, save_mean, invstd, training, activation, mask
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation,residual", [("relu", True), ("identity", False), ("silu", True), ("gelu", False)])
def test_batch_norm(activation, residual, training, dtype):
    norm_case((4, 37, 3, 3), dtype, activation, residual, training)


@pytest.mark.parametrize("activation,residual", [("relu", True), ("hardswish", True), ("relu", False)])
def test_batch_norm_of_many_rows(activation, residual):
    """More rows than FUSED_ROWS: statistics, merge, apply; reduce, merge, apply."""
    norm_case((9, 5, 16, 17), torch.float32, activation, residual, True)


def test_batch_norm_same_dtype_parameters():
    norm_case((4, 16, 2, 2), torch.float16, "relu", False, True, affine=torch.float16)


def test_batch_norm_cumulative_average():
    norm_case((4, 16, 2, 2), torch.float32, "relu", False, True, momentum=None)


def test_batch_norm_nchw():
    norm_case((4, 6, 3, 5), torch.float32, "relu", True, True, big=torch.contiguous_format)


def test_batch_norm_far_from_zero():
    """Mean 1000 times the deviation: E[x^2] - E[x]^2 in fp32 would have no digit left."""
    norm_case((4, 8, 1, 1), torch.float32, "relu", False, True, offset=1000.0)
    norm_case((9, 5, 16, 17), torch.float32, "relu", False, True, offset=1000.0)


def test_strided_parameters():
    """Every [C] tensor with stride 2; the running statistics are updated where they lie."""
    x = image(4, 6, 3, 3, torch.float32)
    rows = [torch.rand(6, 2, device=DEVICE) for _ in range(4)]
    weight, bias, mean, var = (t[:, 0] for t in rows)
    untouched = [t[:, 1].clone() for t in rows]
    want_mean, want_var = mean.clone(), var.clone()
    want = F.relu(F.batch_norm(x, want_mean, want_var, weight, bias, True, 0.1, 1e-5))
    y, *_ = impl("batch_norm_act")(x, None, weight, bias, mean, var, None, True, 0.1, 1e-5, "relu")
    for got, expected in ((y, want), (mean, want_mean), (var, want_var)):
        torch.testing.assert_close(got, expected)
    assert all(torch.equal(t[:, 1], before) for t, before in zip(rows, untouched, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [4, 900])
def test_batch_norm_residual_gradient_alone(rows, training):
    """Nothing has to be summed for it."""
    x, out, g = (image(rows, 5, 1, 1, torch.float32, seed, torch.channels_last) for seed in range(3))
    vector = torch.ones(5, device=DEVICE)
    found = impl("batch_norm_act_backward")(
        g, x, out, None, vector, None, vector, vector, training, "relu", [False, True, False, False]
    )
    assert torch.equal(found[1], torch.where(out > 0, g, torch.zeros_like(g)))


def test_batch_norm_empty_batch():
    x = torch.empty(0, 4, 3, 3, device=DEVICE)
    stat = torch.ones(4, device=DEVICE)
    y, mean, _ = impl("batch_norm_act")(x, None, None, None, stat, stat, None, False, 0.1, 1e-5, "relu")
    assert y.shape == x.shape and mean.shape == (4,)
    dx, dr, dw, db = impl("batch_norm_act_backward")(
        x, x, x, None, stat, None, stat, stat, False, "relu", [True, False, True, False]
    )
    assert dx.shape == x.shape and dr.shape == (0,) and torch.equal(dw, torch.zeros_like(dw)) and db.shape == (0,)
