"""float32 weights with bfloat16 input: what autocast leaves to the CPU kernels, and what it does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import lay
from util import same_bits

import fastconv
import fastconv.functional as FF

pytestmark = pytest.mark.skipif(
    not fastconv.backends()["cpu"], reason=f"backend cpu: {fastconv.backends()['cpu'].reason}"
)

# n, c, size, k, taps, stride, padding, dilation, groups: the engine's paths (gathered stem, live taps, odd channels,
# columns that fill no tile), what it leaves to ATen, and groups
SHAPES = {
    "3x3": (2, 64, 8, 64, 3, 1, 1, 1, 1),
    "1x1": (2, 64, 7, 256, 1, 1, 0, 1, 1),
    "1x1 strided": (2, 64, 8, 128, 1, 2, 0, 1, 1),
    "3x3 on one pixel": (3, 128, 1, 128, 3, 1, 1, 1, 1),
    "stem": (2, 3, 20, 64, 7, 2, 3, 1, 1),
    "odd channels": (2, 33, 5, 64, 3, 1, 1, 1, 1),
    "an odd 1x1": (2, 33, 5, 64, 1, 1, 0, 1, 1),
    "few filters": (2, 16, 6, 5, 3, 1, 1, 1, 1),
    "dilated": (2, 32, 9, 32, 3, 1, 2, 2, 1),
    "groups": (2, 32, 6, 64, 3, 1, 1, 1, 4),
}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def tensors(shape, layout="nhwc"):
    n, c, size, k, taps, stride, padding, dilation, groups = shape
    x = lay(torch.randn(n, c, size, size).bfloat16(), layout)
    w = lay(torch.randn(k, c // groups, taps, taps) / (c // groups * taps * taps) ** 0.5, layout)
    return x, w, ((stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


@SHAPE
@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
def test_results_are_those_of_rounded_weights(shape, layout):
    """Output and data gradient bit for bit; the weight gradient before its rounding."""
    x, w, geometry = tensors(shape, layout)
    op, backward = torch.ops.fastconv.conv2d_bias_act.default, torch.ops.fastconv.conv2d_backward.default
    out = op(x, w, None, None, *geometry, "relu", False)[0]
    assert out.dtype is torch.bfloat16
    assert same_bits(out, op(x, w.bfloat16(), None, None, *geometry, "relu", False)[0])
    g = torch.randn_like(out)
    dx, dw = backward(g, x, w, *geometry, [True, True])
    dx_rounded, dw_rounded = backward(g, x, w.bfloat16(), *geometry, [True, True])
    assert same_bits(dx, dx_rounded) and dw.dtype is torch.float32 and dw.stride() == w.stride()
    exact = torch.ops.aten.convolution_backward(
        g.double(), x.double(), w.double(), None, *geometry[:3], False, (0, 0), geometry[3], [False, True, False]
    )[1]
    scale = exact.abs().max()
    assert (dw - exact).abs().max() <= (dw_rounded.double() - exact).abs().max() + 1e-6 * scale


def test_extreme_weights_round_as_a_cast_does():
    """Ties to even, overflow to infinity, NaN: as weight.to(bfloat16)."""
    values = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, -3.4e38, 1e-30, float("inf")]
    )
    w = torch.zeros(32, 32, 1, 1)
    w[torch.arange(8), torch.arange(8), 0, 0] = values
    w[8, 8] = float("nan")
    x = lay(torch.eye(32).reshape(32, 32, 1, 1).bfloat16(), "nhwc")
    op = torch.ops.fastconv.conv2d_bias_act.default
    settings = (None, None, (1, 1), (0, 0), (1, 1), 1, "identity", False)
    ours, cast = op(x, w, *settings)[0], op(x, w.bfloat16(), *settings)[0]
    torch.testing.assert_close(ours, cast, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.diagonal()[0, 0, :8], values.bfloat16())


@SHAPE
def test_opcheck(shape):
    x, w, geometry = tensors(shape)
    call = (x, w, None, None, *geometry, "relu", False)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastconv.conv2d_bias_act.default, call, test_utils=tests)
    g = torch.randn_like(torch.ops.fastconv.conv2d_bias_act.default(*call)[0])
    torch.library.opcheck(
        torch.ops.fastconv.conv2d_backward.default, (g, x, w, *geometry, [True, True]), test_utils=tests
    )


@pytest.mark.parametrize("name", ("auto", "cpu", "aten"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("frozen", (False, True), ids=("", "frozen"))
def test_autocast_with_every_backend(name, dtype, frozen):
    """Whoever rounds the weight, the gradient that reaches it is float32, and the numbers are autocast's."""
    torch.manual_seed(0)
    x, w, _ = tensors(SHAPES["3x3"])
    x, w, b = x.float().requires_grad_(), w.requires_grad_(not frozen), torch.randn(64).requires_grad_()
    with fastconv.use_backend(name), torch.autocast("cpu", dtype=dtype):
        ours = FF.conv2d_bias_act(x, w, b, padding=1, activation="identity")
    with torch.autocast("cpu", dtype=dtype):
        stock = F.conv2d(x, w, b, padding=1)
    assert ours.dtype is stock.dtype is dtype
    wanted = [x, b] if frozen else [x, w, b]
    g = torch.randn_like(stock)
    for mine, theirs in zip(
        (ours, *torch.autograd.grad(ours, wanted, g)), (stock, *torch.autograd.grad(stock, wanted, g)), strict=True
    ):
        assert mine.dtype is theirs.dtype
        size = theirs.float().abs().max()
        torch.testing.assert_close(mine.float() / size, theirs.float() / size, rtol=0.02, atol=0.02)


def test_no_copy_of_the_weights_is_kept():
    """The graph holds the parameter itself."""
    conv = fastconv.nn.Conv2dBiasReLU(64, 64, 3, padding=1)
    with fastconv.use_backend("cpu"), torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(torch.randn(2, 64, 4, 4, requires_grad=True))
    kept = out.grad_fn.saved_tensors
    assert any(t is conv.weight for t in kept) and not any(t.shape == conv.weight.shape and t.dtype is torch.bfloat16
                                                           for t in kept if t is not None)  # fmt: skip


def test_outside_autocast_it_is_an_error_before_and_after():
    """An equal call under autocast, which was remembered, changes nothing."""
    x, w, _ = tensors(SHAPES["3x3"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="weight expected dtype torch.bfloat16 like input, got torch.float32"):
            FF.conv2d_bias_act(x, w, padding=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert FF.conv2d_bias_act(x, w, padding=1).dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert FF.conv2d_bias_act(x, w, padding=1).dtype is torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="weight expected dtype"):
        FF.conv2d_bias_act(x, w.double(), padding=1)


def test_a_weight_that_is_no_leaf_gets_its_gradient():
    x, w, _ = tensors(SHAPES["1x1"])
    v = w.clone().requires_grad_()
    with fastconv.use_backend("cpu"), torch.autocast("cpu", dtype=torch.bfloat16):
        FF.conv2d_bias_act(x, v * 2, activation="identity").float().sum().backward()
    expected = 2 * x.float().sum((0, 2, 3)).reshape(1, -1, 1, 1).expand_as(w)
    torch.testing.assert_close(v.grad, expected, rtol=1e-2, atol=2e-2)
