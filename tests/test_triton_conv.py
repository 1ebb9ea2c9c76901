"""Convolutions in Triton against the fp64 oracle: forward with its epilogue, data and weight gradient, batch norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_triton_tolerance import DEVICE, DTYPES, check, image, leaves, require_triton

from fastconv import reference
from fastconv.triton import impl

require_triton()

# name: input shape, K, filter, stride, padding, dilation, groups
CASES = {
    "pointwise": ((2, 32, 5, 5), 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise_stride_2": ((2, 17, 6, 5), 33, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3x3": ((2, 20, 6, 7), 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3_stride_2": ((2, 16, 8, 7), 16, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stem_7x7": ((1, 3, 16, 15), 16, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "image_3x3": ((2, 3, 8, 8), 19, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "one_channel": ((2, 1, 7, 7), 1, (3, 2), (1, 2), (1, 0), (1, 1), 1),
    "map_1x1": ((40, 32, 1, 1), 32, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "map_2x2": ((20, 16, 2, 2), 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "map_2x2_to_1x1": ((20, 16, 2, 2), 16, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "dilated": ((1, 16, 9, 9), 16, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "dilation_2_stride_2": ((1, 16, 9, 10), 8, (3, 3), (2, 2), (2, 1), (2, 2), 1),
    "dilation_2_stride_3": ((1, 16, 11, 10), 8, (3, 2), (3, 3), (2, 1), (2, 2), 1),
    "dilation_3_stride_2": ((1, 16, 11, 10), 8, (3, 2), (2, 3), (1, 0), (3, 1), 1),
    "stride_beyond_filter": ((2, 16, 10, 9), 8, (2, 1), (3, 4), (0, 0), (1, 1), 1),
    "padding_beyond_filter": ((1, 16, 3, 3), 8, (3, 3), (1, 1), (4, 3), (1, 1), 1),
    "prime": ((3, 13, 5, 7), 29, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "groups": ((2, 24, 5, 6), 36, (3, 3), (2, 1), (1, 1), (1, 1), 3),
    "groups_wide": ((2, 64, 4, 4), 32, (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "depthwise": ((2, 37, 6, 7), 37, (3, 3), (1, 1), (1, 1), (1, 1), 37),
    "depthwise_stride_2_multiplied": ((2, 6, 9, 8), 18, (5, 3), (2, 2), (2, 1), (1, 1), 6),
    "filter_of_the_map": ((3, 16, 4, 4), 16, (4, 4), (1, 1), (0, 0), (1, 1), 1),
}


def tensors(case, dtype, layout=torch.channels_last):
    shape, k, filter_, stride, padding, dilation, groups = case
    x = image(*shape, dtype, 0, layout)
    area = filter_[0] * filter_[1] * shape[1] // groups
    w = image(k, shape[1] // groups, *filter_, torch.float32, 1) / area**0.5
    w = w.to(dtype).contiguous(memory_format=layout)
    return x, w, (stride, padding, dilation, groups)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_convolution(name, dtype):
    x, w, how = tensors(CASES[name], dtype)
    x64, w64 = leaves(x, w)
    xs, ws = (t.clone().requires_grad_() for t in (x, w))
    y64, ys = F.conv2d(x64, w64, None, *how), F.conv2d(xs, ws, None, *how)
    y, none = impl("conv2d_bias_act")(x, w, None, None, *how, "identity", False)
    check(y, y64, ys, "output")
    assert none.shape == (0,) and y.is_contiguous(memory_format=torch.channels_last)
    g = image(*y.shape, dtype, 2)
    grads64 = torch.autograd.grad(y64, (x64, w64), g.cpu().double())
    stock = torch.autograd.grad(ys, (xs, ws), g)
    dx, dw = impl("conv2d_backward")(g, x, w, *how, [True, True])
    check(dx, grads64[0], stock[0], "grad_input")
    check(dw, grads64[1], stock[1], "grad_weight")
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert dw.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_asked_for(wanted):
    x, w, how = tensors(CASES["3x3"], torch.float32)
    g = image(*F.conv2d(x, w, None, *how).shape, torch.float32)
    grads = impl("conv2d_backward")(g, x, w, *how, list(wanted))
    assert [t.numel() > 0 for t in grads] == list(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_epilogue(activation, dtype):
    x, w, how = tensors(CASES["3x3"], dtype)
    bias = torch.linspace(-1, 1, w.size(0)).to(DEVICE, dtype)
    residual = image(*F.conv2d(x, w, None, *how).shape, dtype, 5)
    x64, w64, b64, r64 = leaves(x, w, bias, residual)
    oracle = reference.conv2d_bias_act(x64, w64, b64, *how, activation=activation, residual=r64)
    stock = reference.conv2d_bias_act(x, w, bias, *how, activation=activation, residual=residual)
    y, preact = impl("conv2d_bias_act")(x, w, bias, residual, *how, activation, True)
    check(y, oracle, stock, "output")
    z64 = F.conv2d(x64, w64, b64, *how) + r64
    check(preact, z64, F.conv2d(x, w, bias, *how) + residual, "preact")


def test_nchw_and_strided_views():
    x, w, how = tensors(CASES["3x3"], torch.float32, torch.contiguous_format)
    y, _ = impl("conv2d_bias_act")(x, w, None, None, *how, "relu", False)
    torch.testing.assert_close(y, F.relu(F.conv2d(x, w, None, *how)), rtol=1e-4, atol=1e-4)
    assert y.is_contiguous()
    dx, dw = impl("conv2d_backward")(y, x, w, *how, [True, True])
    assert dx.is_contiguous() and dw.is_contiguous()
    part = image(4, 40, 6, 7, torch.float32)[::2, ::2]
    y, _ = impl("conv2d_bias_act")(part, w, None, None, *how, "identity", False)
    torch.testing.assert_close(y, F.conv2d(part, w, None, *how), rtol=1e-4, atol=1e-4)
    one = image(1, 20, 1, 1, torch.float32).expand(2, 20, 6, 7)
    y, _ = impl("conv2d_bias_act")(one, w, None, None, *how, "identity", False)
    torch.testing.assert_close(y, F.conv2d(one, w, None, *how), rtol=1e-4, atol=1e-4)


def test_empty_batch():
    x, w, how = tensors(CASES["3x3"], torch.float32)
    y, preact = impl("conv2d_bias_act")(x[:0], w, None, None, *how, "relu", True)
    assert y.shape == preact.shape == (0, 40, 6, 7)
    dx, dw = impl("conv2d_backward")(y, x[:0], w, *how, [True, True])
    assert dx.shape == (0, 20, 6, 7) and torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training,save", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("rows", ["few", "many"])
def test_conv2d_bn_act(rows, training, save, dtype):
    case = ((3, 8, 5, 4), 20, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    if rows == "many":  # beyond FUSED_ROWS: statistics in the convolution's epilogue
        case = ((9, 8, 16, 15), 20, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    x, w, how = tensors(case, dtype)
    k = w.size(0)
    gen = torch.Generator().manual_seed(3)
    bias, weight, shift, mean = (torch.randn(k, generator=gen).to(DEVICE) for _ in range(4))
    var = torch.rand(k, generator=gen).add(0.5).to(DEVICE)
    bias = bias.to(dtype)
    residual = image(*F.conv2d(x, w, None, *how).shape, dtype, 4)
    x64, w64, b64, r64, g64, s64 = leaves(x, w, bias, residual, weight, shift)
    mean64, var64 = mean.cpu().double(), var.cpu().double()
    mean_s, var_s = mean.clone(), var.clone()
    z64 = F.conv2d(x64, w64, b64, *how)
    oracle = reference.batch_norm_act(
        z64, mean64, var64, g64, s64, training, 0.1, 1e-5, activation="relu", residual=r64
    )
    zs = F.conv2d(x, w, bias, *how)
    stock = F.relu(F.batch_norm(zs, mean_s, var_s, weight, shift, training, 0.1, 1e-5) + residual)
    counter = torch.tensor(0, device=DEVICE)
    y, z, save_mean, invstd = impl("conv2d_bn_act")(
        x, w, bias, residual, weight, shift, mean, var, counter, *how, training, 0.1, 1e-5, "relu", save
    )
    check(y, oracle, stock, "output")
    if save:
        check(z, z64, zs, "conv_output")
    else:
        assert z.shape == (0,)
    check(mean, mean64, mean_s, "running_mean", scale=zs.abs().max().item())
    check(var, var64, var_s, "running_var", scale=zs.abs().max().item())
    assert counter.item() == int(training)
    assert save_mean.shape == invstd.shape == (k,)
