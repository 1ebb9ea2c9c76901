"""Convolutions in narrow groups on the CPU, depthwise ones among them: forward, both gradients, what a plan asks of them.

Held to fp64 and to twice stock's error. The geometries are those where the kernels change their way: maps of one and of
four images' outputs side by side, runs of one to five outputs, channels that fill blocks, vectors, and neither, taps that
read padding alone, strides larger than the filter, more taps than one pass of the weight gradient takes, every width."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plan_ops_util import close
from torch import Tensor
from util import needs_vectors

from fastconv import _ext

needs_vectors()

PLAN, RAW = torch.ops.fastconv_plan, torch.ops.fastconv
LAST = torch.channels_last
# images, channels, height, width, kernel, stride, padding, dilation, channels of a group (if not 1)
SHAPES = {
    "mobilenet 3x3": (5, 96, 8, 8, (3, 3), 1, (1, 1), 1),
    "mobilenet 3x3, strided": (2, 144, 9, 8, (3, 3), 2, (1, 1), 1),
    "one pixel": (6, 64, 1, 1, (3, 3), 1, (1, 1), 1),
    "2x2": (7, 33, 2, 2, (3, 3), 1, (1, 1), 1),
    "one image, a wide row": (1, 40, 3, 37, (3, 3), 1, (1, 1), 1),
    "a map wider than images are taken together": (3, 16, 5, 23, (3, 3), 1, (1, 1), 1),
    "5x5": (4, 31, 7, 6, (5, 5), 1, (2, 2), 1),
    "7x7": (2, 32, 8, 8, (7, 7), 1, (3, 3), 1),
    "1x1": (2, 48, 4, 5, (1, 1), 1, (0, 0), 1),
    "1x7": (2, 17, 5, 9, (1, 7), 1, (0, 3), 1),
    "2x4, no padding": (3, 50, 6, 7, (2, 4), 1, (0, 0), 1),
    "dilated": (2, 65, 9, 10, (3, 3), 1, (2, 2), 2),
    "dilated and strided": (3, 24, 11, 9, (3, 3), 2, (3, 3), 3),
    "a stride beyond the filter": (2, 130, 10, 11, (2, 2), 3, (0, 0), 1),
    "padding beyond the filter": (2, 20, 3, 3, (2, 2), 1, (3, 3), 1),
    "a stride beyond the map": (5, 32, 2, 3, (3, 3), 4, (1, 1), 1),
    "two channels": (2, 2, 6, 6, (3, 3), 1, (1, 1), 1),
    "3x3, strided, a wide row": (2, 24, 9, 45, (3, 3), 2, (1, 1), 1),
    "3x3, strided as dilated": (2, 16, 9, 50, (3, 3), 2, (2, 2), 2),
    "four rows of a filter": (1, 20, 8, 24, (4, 3), 1, (1, 1), 1),
    "5x5, a wide row": (2, 40, 6, 13, (5, 5), 1, (2, 2), 1),
    "5x5, strided": (2, 17, 7, 21, (5, 5), 2, (2, 2), 1),
    "7x7, a wide row": (2, 33, 9, 14, (7, 7), 1, (3, 3), 1),
    "7x7, block by block": (2, 200, 5, 15, (7, 7), 1, (3, 3), 1),
    "groups of 2": (2, 38, 5, 6, (3, 3), 1, (1, 1), 1, 2),
    "groups of 4": (5, 68, 4, 4, (3, 3), 2, (1, 1), 1, 4),
    "groups of 8": (4, 104, 4, 4, (3, 3), 1, (1, 1), 1, 8),
    "groups of 8, one pixel": (6, 440, 1, 1, (3, 3), 1, (1, 1), 1, 8),
    "groups of 16": (2, 112, 7, 6, (3, 3), 1, (1, 1), 1, 16),
    "two groups of 4, 5x5": (2, 8, 6, 6, (5, 5), 1, (2, 2), 1, 4),
    "groups of 16 channels, 1x1": (3, 48, 4, 3, (1, 1), 2, (0, 0), 1, 16),
    "groups of 3": (2, 12, 5, 5, (3, 3), 1, (1, 1), 1, 3),  # stock's
}
SHAPE = pytest.mark.parametrize("shape", SHAPES)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
WEIGHTS = pytest.mark.parametrize("wide", (False, True), ids=("weight as input", "fp32 weight"))


class Problem:
    def __init__(self, shape: str, dtype: torch.dtype, wide: bool = False) -> None:
        n, self.c, h, w, kernel, stride, padding, dilation, *width = SHAPES[shape]
        group = width[0] if width else 1
        self.dtype, groups = dtype, self.c // group
        self.settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        self.lists = [stride] * 2, list(padding), [dilation] * 2, groups
        self.geometry = [stride, stride, *padding, dilation, dilation, groups]
        self.x = self.random(n, self.c, h, w)
        weight = torch.randn(self.c, group, *kernel) / (group * kernel[0] * kernel[1]) ** 0.5
        self.w = weight.to(torch.float32 if wide else dtype).contiguous(memory_format=LAST)
        self.g = self.random(*F.conv2d(self.x.float(), self.w.float(), **self.settings).shape)

    def random(self, *size: int) -> Tensor:
        return torch.randn(size).to(self.dtype).contiguous(memory_format=LAST)

    def conv(self, dtype: torch.dtype) -> Tensor:
        """With the weight as the kernels multiply by it: rounded to the input's dtype."""
        return F.conv2d(self.x.to(dtype), self.w.to(self.dtype).to(dtype), **self.settings)

    def gradients(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, w = (t.to(self.dtype).to(dtype).requires_grad_() for t in (self.x, self.w))
        return torch.autograd.grad(F.conv2d(x, w, **self.settings), (x, w), self.g.to(dtype))


@SHAPE
@DTYPES
@WEIGHTS
def test_forward(shape, dtype, wide):
    p = Problem(shape, dtype, wide)
    out = RAW.conv2d_bias_act(p.x, p.w, None, None, *p.lists, "identity", False)[0]
    close(out, p.conv(dtype), p.conv(torch.float64))
    assert out.dtype is dtype and out.is_contiguous(memory_format=LAST)


@SHAPE
@DTYPES
@WEIGHTS
def test_gradients(shape, dtype, wide):
    p = Problem(shape, dtype, wide)
    stock, exact = p.gradients(dtype), p.gradients(torch.float64)
    got = RAW.conv2d_backward(p.g, p.x, p.w, *p.lists, [True, True])
    for mine, theirs, oracle in zip(got, stock, exact, strict=True):
        # oneDNN 3.10 leaves the gradient of bf16 taps that read padding alone unwritten: it may be NaN.
        close(mine, torch.where(oracle == 0, 0.0, theirs), oracle)
    assert got[1].dtype is p.w.dtype
    for i in (0, 1):
        alone = RAW.conv2d_backward(p.g, p.x, p.w, *p.lists, [i == 0, i == 1])[i]
        assert torch.equal(alone, got[i])


@DTYPES
@pytest.mark.parametrize(
    "shape", ("mobilenet 3x3", "2x2", "5x5", "two channels", "a stride beyond the filter", "groups of 8")
)
@pytest.mark.parametrize("act", ("identity", "relu6", "hardswish"))
def test_epilogue(shape, act, dtype):
    """(conv - mean) * scale + shift + residual, the value before the activation kept, all in one pass."""
    p = Problem(shape, dtype)
    mean, scale, shift = torch.randn(3, p.c)
    residual, preact, out = (p.random(*p.g.shape) for _ in range(3))
    PLAN.conv2d(p.x, p.w, None, mean, scale, shift, residual, p.geometry, act, preact, out)
    vectors = [v.double()[None, :, None, None] for v in (mean, scale, shift)]
    before = (p.conv(torch.float64) - vectors[0]) * vectors[1] + vectors[2] + residual.double()
    function = {"identity": lambda t: t, "relu6": F.relu6, "hardswish": F.hardswish}[act]
    close(preact, before.to(dtype), before)
    close(out, function(before).to(dtype), function(before))


@DTYPES
@pytest.mark.parametrize("shape", ("mobilenet 3x3, strided", "2x2", "one image, a wide row", "7x7", "groups of 4"))
def test_the_gradient_is_added_where_it_lies(shape, dtype):
    p = Problem(shape, dtype)
    before = p.random(*p.x.shape)
    into = before.clone(memory_format=torch.preserve_format)
    PLAN.conv2d_input_grad(p.g, p.w, into, p.geometry, into)
    exact = p.gradients(torch.float64)[0] + before.double()
    close(into, exact.to(dtype), exact)


@SHAPE
def test_a_plan_gets_weight_gradients_in_fp32(shape):
    """Of bf16 tensors too: they are summed in fp32, and not rounded on the way to the optimizer."""
    p = Problem(shape, torch.bfloat16)
    grad = torch.full_like(p.w, 7.0, dtype=torch.float32)
    PLAN.conv2d_weight_grad(p.g, p.x, p.w, p.geometry, grad)
    exact = p.gradients(torch.float64)[1]
    if shape != "groups of 3" and ("groups of 16" not in shape or _ext.build_info()["cpu_isa"] != "avx2"):
        assert (grad - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-6
    weight, hyper = torch.randn_like(grad), torch.tensor([0.5, 0, 0, 0], dtype=torch.float64)
    half, before = weight.bfloat16(), weight.clone()
    PLAN.conv2d_weight_grad_update(p.g, p.x, half, p.geometry, weight, [], half, hyper, "sgd", False)
    torch.testing.assert_close(weight, before - 0.5 * grad)
    assert torch.equal(half, weight.bfloat16())


@DTYPES
def test_what_no_output_reads_has_no_part_in_it(dtype):
    """A tap over padding alone gets a gradient of zero, and infinities stay where they are read."""
    p = Problem("one pixel", dtype)
    p.x[0, 3], p.g[1, 5] = float("inf"), float("nan")
    grad = RAW.conv2d_backward(p.g, p.x, p.w, *p.lists, [False, True])[1]
    centre = grad[:, 0, 1, 1].clone()
    grad[:, 0, 1, 1] = 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.isfinite(centre).sum() == p.c - 2


@SHAPE
@DTYPES
def test_results_do_not_depend_on_the_number_of_threads(shape, dtype):
    p = Problem(shape, dtype)
    p.x, p.g = (t.repeat(8, 1, 1, 1).contiguous(memory_format=LAST) for t in (p.x, p.g))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((
                RAW.conv2d_bias_act(p.x, p.w, None, None, *p.lists, "relu", False)[0],
                *RAW.conv2d_backward(p.g, p.x, p.w, *p.lists, [True, True]),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_geometries_than_a_thread_keeps():
    """Tables are kept by geometry, 1024 of them: what is made again, and what only differs in one number, stays right."""
    weight, x = torch.randn(16, 1, 3, 3), torch.randn(1, 16, 3, 1100).contiguous(memory_format=LAST)
    for width in [*range(1, 1101), 5, 6]:
        part = x[..., :width].contiguous(memory_format=LAST)
        out = RAW.conv2d_bias_act(part, weight, None, None, [1, 1], [1, 1], [1, 1], 16, "identity", False)[0]
        if width < 10 or width % 100 in (0, 23, 24, 25):
            torch.testing.assert_close(out, F.conv2d(part, weight, padding=1, groups=16), rtol=1e-4, atol=1e-4)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        out, part, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 16, [True, True, False]
    )
    got = RAW.conv2d_backward(out, part, weight, [1, 1], [1, 1], [1, 1], 16, [True, True])
    for a, b in zip(got, (dx, dw), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
