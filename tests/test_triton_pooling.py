"""Pooling in Triton against the fp64 oracle; forward, offsets, backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_triton_tolerance import DEVICE, DTYPES, check, image, leaves, require_triton

from fastconv.triton import impl, limits

require_triton()

# (N, C, H, W), kernel, stride, padding, dilation, ceil_mode
MAX_CASES = [
    ((2, 5, 16, 16), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((1, 3, 7, 9), (2, 3), (3, 1), (0, 1), (1, 1), True),
    ((2, 70, 5, 5), (3, 3), (1, 1), (1, 1), (2, 2), False),
    ((1, 1, 16, 17), (8, 8), (4, 4), (0, 0), (1, 1), False),
    ((3, 8, 9, 8), (3, 2), (2, 3), (1, 1), (2, 1), True),
    ((1, 4, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1), False),
]
AVG_CASES = [
    ((2, 5, 16, 16), (2, 2), (2, 2), (0, 0), False, True, None),
    ((1, 3, 7, 9), (3, 3), (2, 2), (1, 1), True, True, None),
    ((2, 70, 5, 5), (3, 2), (1, 3), (1, 0), True, False, None),
    ((1, 8, 6, 6), (3, 3), (2, 1), (1, 1), False, True, 5),
    ((1, 2, 5, 5), (2, 2), (3, 3), (0, 0), True, False, -2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", MAX_CASES)
def test_max_pool2d(case, layout, dtype):
    shape, *window, ceil_mode = case
    x = image(*shape, dtype, layout=layout)
    xs = x.clone().requires_grad_()
    ys, index = F.max_pool2d(xs, *window, ceil_mode, return_indices=True)
    y, offsets = impl("max_pool2d")(x, *window, ceil_mode, True)
    assert torch.equal(y, ys) and y.is_contiguous(memory_format=layout)
    assert offsets.dtype == torch.uint8 and offsets.is_contiguous(memory_format=layout)
    # The flat index of the arg max, rebuilt from the byte.
    kernel, stride, padding, dilation = window
    p = torch.arange(y.size(2), device=DEVICE).view(-1, 1)
    q = torch.arange(y.size(3), device=DEVICE).view(1, -1)
    r, s = offsets.long() // kernel[1], offsets.long() % kernel[1]
    h = p * stride[0] - padding[0] + r * dilation[0]
    w = q * stride[1] - padding[1] + s * dilation[1]
    assert torch.equal(h * shape[3] + w, index)
    g = image(*y.shape, dtype, 1, layout)
    (x64,) = leaves(x)
    y64 = F.max_pool2d(x64, *window, ceil_mode)
    (d64,) = torch.autograd.grad(y64, x64, g.cpu().double())
    (ds,) = torch.autograd.grad(ys, xs, g)
    dx = impl("max_pool2d_backward")(g, offsets, shape[2:], *window, layout is torch.channels_last)
    check(dx, d64, ds, "grad_input")
    assert dx.is_contiguous(memory_format=layout)
    y, none = impl("max_pool2d")(x, *window, ceil_mode, False)
    assert torch.equal(y, ys) and none.shape == (0,) and none.dtype == torch.uint8


def test_max_pool2d_ties_nan_and_infinity():
    x = torch.zeros(1, 6, 4, 4)
    x[0, 1, 1, 1] = x[0, 1, 0, 1] = torch.nan
    x[0, 2] = -torch.inf
    x[0, 3, 2, 2] = torch.inf
    x[0, 4] = -3
    x = x.to(DEVICE)
    ys, index = F.max_pool2d(x, 2, 2, return_indices=True)
    y, offsets = impl("max_pool2d")(x, (2, 2), (2, 2), (0, 0), (1, 1), False, True)
    assert torch.equal(y.nan_to_num(9), ys.nan_to_num(9))
    h = torch.arange(2, device=DEVICE).view(2, 1) * 2 + offsets.long() // 2
    w = torch.arange(2, device=DEVICE).view(1, 2) * 2 + offsets.long() % 2
    assert torch.equal(h * 4 + w, index)


def average_case(shape, dtype, layout, stock_function, forward, backward):
    x = image(*shape, dtype, layout=layout)
    (x64,) = leaves(x)
    xs = x.clone().requires_grad_()
    y64, ys = stock_function(x64), stock_function(xs)
    y = forward(x)
    check(y, y64, ys, "output")
    assert y.is_contiguous(memory_format=layout)
    g = image(*y.shape, dtype, 1, layout)
    (d64,) = torch.autograd.grad(y64, x64, g.cpu().double())
    (ds,) = torch.autograd.grad(ys, xs, g)
    dx = backward(g)
    check(dx, d64, ds, "grad_input")
    assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", AVG_CASES)
def test_avg_pool2d(case, layout, dtype):
    shape, *how = case
    average_case(
        shape, dtype, layout, lambda t: F.avg_pool2d(t, *how), lambda t: impl("avg_pool2d")(t, *how),
        lambda g: impl("avg_pool2d_backward")(g, shape[2:], *how, layout is torch.channels_last),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,size", [
    ((2, 70, 4, 4), (1, 1)), ((1, 3, 7, 5), (3, 2)), ((2, 4, 2, 3), (5, 7)), ((1, 2, 6, 6), (6, 3)),
    ((1, 2, 10, 7), (4, 5)),
])  # fmt: skip
def test_adaptive_avg_pool2d(shape, size, dtype):
    average_case(
        shape, dtype, torch.channels_last, lambda t: F.adaptive_avg_pool2d(t, size),
        lambda t: impl("adaptive_avg_pool2d")(t, size),
        lambda g: impl("adaptive_avg_pool2d_backward")(g, shape[2:], True),
    )  # fmt: skip


def test_every_adaptive_window_is_summed_whole():
    """The loop bound covers the longest window of every pair of sizes."""
    for size in range(1, 7):
        x = torch.arange(size, dtype=torch.float32, device=DEVICE).view(1, 1, size, 1)
        for windows in range(1, 8):
            y = impl("adaptive_avg_pool2d")(x, (windows, 1))
            torch.testing.assert_close(y, F.adaptive_avg_pool2d(x, (windows, 1)))
            g = torch.ones_like(y)
            dx = impl("adaptive_avg_pool2d_backward")(g, (size, 1), True)
            torch.testing.assert_close(dx, torch.ops.aten._adaptive_avg_pool2d_backward(g, x))


def test_adaptive_windows_past_32_bits_are_refused():
    """The ends of a window are position * size / windows."""
    for shape, windows in (((1, 1, 70000, 1), (35001, 1)), ((1, 1, 1, 70000), (1, 35001))):
        assert "rows times windows" in limits.limit("adaptive_avg_pool2d", (shape,), (windows,), (True,))
    assert limits.limit("adaptive_avg_pool2d", ((1, 1, 30000, 40000),), ((50000, 40000),), (True,)) == ""


def test_pools_of_an_empty_batch():
    x = torch.empty(0, 3, 8, 8, device=DEVICE)
    y, offsets = impl("max_pool2d")(x, (2, 2), (2, 2), (0, 0), (1, 1), False, True)
    assert y.shape == offsets.shape == (0, 3, 4, 4)
    assert impl("max_pool2d_backward")(y, offsets, (8, 8), (2, 2), (2, 2), (0, 0), (1, 1), False).shape == x.shape
    assert impl("avg_pool2d")(x, (2, 2), (2, 2), (0, 0), False, True, None).shape == (0, 3, 4, 4)
    assert impl("adaptive_avg_pool2d")(x, (1, 1)).shape == (0, 3, 1, 1)
    assert impl("adaptive_avg_pool2d_backward")(x, (9, 9), False).shape == (0, 3, 9, 9)
