"""Under torch.autocast each operator gives the dtypes and values that stock PyTorch gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from util import Stock

import fastconv.functional as FF
import fastconv.nn as fnn

DTYPE = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
INPUT = pytest.mark.parametrize("input_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


def both(op, dtype, device, tensors, settings, wanted=()):
    """(ours, stock): output and gradients of one call under autocast."""
    results = []
    for namespace in (FF, Stock):
        local = {n: t.clone().requires_grad_(n in wanted) if t is not None else None for n, t in tensors.items()}
        with torch.autocast(device, dtype=dtype):
            out = getattr(namespace, op)(**local, **settings)
        grads = torch.autograd.grad(out.float().square().sum(), [local[n] for n in wanted]) if wanted else ()
        results.append((out, *grads))
    return results


def agree(results, tolerance=0.03):
    ours, stock = results
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        size = b.float().abs().max().clamp_min(1)
        torch.testing.assert_close(a.float() / size, b.float() / size, rtol=tolerance, atol=tolerance)


@DTYPE
@INPUT
def test_convolution_runs_in_the_autocast_dtype(input_dtype, dtype, backend):
    tensors = {
        "input": torch.randn(2, 4, 6, 6, device=backend.device).to(input_dtype),
        "weight": torch.randn(8, 4, 3, 3, device=backend.device) / 6,
        "bias": torch.randn(8, device=backend.device),
    }
    wanted = ("input", "weight", "bias")
    results = both("conv2d_bias_act", dtype, backend.device, tensors, {"activation": "relu"}, wanted)
    assert results[0][0].dtype == dtype
    assert [g.dtype for g in results[0][1:]] == [tensors[n].dtype for n in wanted], "gradients in the leaf's dtype"
    agree(results)


@DTYPE
def test_residual_of_another_dtype(dtype, backend):
    """The residual stream is in the autocast dtype or float32: the sum is computed, in one of the two."""
    tensors = {
        "input": torch.randn(2, 4, 6, 6, device=backend.device),
        "weight": torch.randn(8, 4, 1, 1, device=backend.device) / 2,
        "residual": torch.randn(2, 8, 6, 6, device=backend.device),
    }
    with torch.autocast(backend.device, dtype=dtype):
        ours = FF.conv2d_bias_act(**tensors)
        same = FF.conv2d_bias_act(**{**tensors, "residual": tensors["residual"].to(dtype)})
        stock = Stock.conv2d_bias_act(**tensors)
    assert ours.dtype == same.dtype == dtype, "the convolution and what is fused to it run in the autocast dtype"
    torch.testing.assert_close(ours.float(), stock.float(), rtol=0.03, atol=0.03)


@DTYPE
@INPUT
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
def test_batch_norm_keeps_its_inputs_dtype(training, input_dtype, dtype, backend):
    device = backend.device
    tensors = {
        "input": torch.randn(4, 6, 5, 5, device=device).to(input_dtype),
        "running_mean": torch.zeros(6, device=device),
        "running_var": torch.ones(6, device=device),
        "weight": torch.rand(6, device=device),
        "bias": torch.randn(6, device=device),
    }
    results = both("batch_norm_act", dtype, device, tensors, {"training": training}, ("input", "weight", "bias"))
    assert results[0][0].dtype == input_dtype
    agree(results)


@DTYPE
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
def test_conv_bn(training, dtype, backend):
    device = backend.device
    tensors = {
        "input": torch.randn(4, 4, 6, 6, device=device),
        "weight": torch.randn(6, 4, 3, 3, device=device) / 6,
        "bias": None,
        "running_mean": torch.zeros(6, device=device),
        "running_var": torch.ones(6, device=device),
        "bn_weight": torch.rand(6, device=device),
        "bn_bias": torch.randn(6, device=device),
    }
    wanted = ("input", "weight", "bn_weight", "bn_bias")
    results = both("conv2d_bn_act", dtype, device, tensors, {"training": training}, wanted)
    assert results[0][0].dtype == dtype
    assert all(g.dtype is torch.float32 for g in results[0][1:])
    agree(results, 0.05)


@DTYPE
@INPUT
def test_pools_keep_their_inputs_dtype(input_dtype, dtype, backend):
    x = torch.randn(2, 4, 8, 8, device=backend.device).to(input_dtype)
    for op, settings in (("max_pool2d", {"kernel_size": 2}), ("avg_pool2d", {"kernel_size": 2}),
                         ("adaptive_avg_pool2d", {"output_size": 3})):  # fmt: skip
        agree(both(op, dtype, backend.device, {"input": x}, settings, ("input",)))


@DTYPE
@INPUT
@pytest.mark.parametrize("probabilities", (False, True), ids=("indices", "probabilities"))
def test_cross_entropy_runs_in_float32(probabilities, input_dtype, dtype, backend):
    device = backend.device
    tensors = {
        "input": torch.randn(6, 5, device=device).to(input_dtype),
        "target": torch.randint(5, (6,), device=device),
    }
    if probabilities:
        tensors["target"] = torch.randn(6, 5, device=device).softmax(1)
    results = both("cross_entropy", dtype, device, tensors, {"label_smoothing": 0.1}, ("input",))
    assert results[0][0].dtype is torch.float32 and results[0][1].dtype is input_dtype
    agree(results, 1e-2 if input_dtype is not torch.float32 else 1e-5)


def test_cross_entropy_with_half_targets_as_stock():
    """Probability targets and class weights of another dtype are cast along by autocast (under auto: on aten)."""
    x, t, w = torch.randn(6, 5).bfloat16(), torch.rand(6, 5).bfloat16(), torch.rand(5).bfloat16()
    agree(both("cross_entropy", torch.bfloat16, "cpu", {"input": x, "target": t, "weight": w}, {}), 1e-4)


def test_float64_is_left_alone(backend):
    if not backend.fp64:
        pytest.skip("this backend leaves fp64 to aten")
    x, w = torch.randn(2, 4, 6, 6).double(), torch.randn(8, 4, 3, 3).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, stock = FF.conv2d_bias_relu(x, w), nn.functional.conv2d(x, w).relu()
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock)


def test_disabled_region_runs_in_full_precision(backend):
    x, w = torch.randn(2, 4, 6, 6, device=backend.device), torch.randn(8, 4, 3, 3, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16), torch.autocast(backend.device, enabled=False):
        assert FF.conv2d_bias_relu(x, w).dtype is torch.float32


def test_a_net_of_layers(backend):
    """Conv, norm with residual, pools and loss in one autocast region; gradients reach float32 parameters."""
    device = backend.device
    conv = fnn.Conv2dBiasReLU(3, 8, 3, padding=1, device=device)
    norm, head = fnn.BatchNormAct2d(8, device=device), nn.Linear(8, 4, device=device)
    x, t = torch.randn(4, 3, 8, 8, device=device), torch.randint(4, (4,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        features = conv(x)
        features = norm(features, residual=features)
        pooled = fnn.AdaptiveAvgPool2d(1)(fnn.MaxPool2d(2)(features)).flatten(1)
        loss = fnn.CrossEntropyLoss()(head(pooled), t)
    assert features.dtype is torch.bfloat16 and loss.dtype is torch.float32
    loss.backward()
    for p in (*conv.parameters(), *norm.parameters(), *head.parameters()):
        assert p.grad.dtype is torch.float32 and p.grad.isfinite().all()


def test_residual_in_float32_after_a_half_norm(backend):
    """A float32 residual is cast to the norm's input dtype under autocast; without autocast that is an error."""
    norm = fnn.BatchNormAct2d(4, device=backend.device)
    x, r = torch.randn(2, 4, 3, 3, device=backend.device).bfloat16(), torch.randn(2, 4, 3, 3, device=backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert norm(x, r).dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="residual expected dtype torch.bfloat16 like input, got torch.float32"):
        norm(x, r)
