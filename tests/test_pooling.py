"""max_pool2d, avg_pool2d, adaptive_avg_pool2d: torch.nn.functional's results, ties, NaN and paddings included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DILATED_POOLS, LAYOUTS, POOLS, Pool, lay
from util import FLOATS, assert_format, check, execute, same_bits

import fastconv.functional as FF

BF16_FP32 = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
ADAPTIVE = (
    ((2, 64, 8, 8), 1), ((2, 2048, 1, 1), 1), ((2, 33, 7, 7), 7), ((1, 13, 7, 5), (3, 2)), ((2, 5, 4, 4), (7, 9)),
    ((2, 1, 9, 9), (None, 3)), ((3, 3, 1, 11), (1, 4)), ((2, 6, 13, 13), (6, 6)), ((7, 3, 5, 4), (5, None)),
)  # fmt: skip


def max_settings(case: Pool) -> dict:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return {name: getattr(case, name) for name in names}


def avg_settings(case: Pool, **more) -> dict:
    return {n: getattr(case, n) for n in ("kernel_size", "stride", "padding", "ceil_mode")} | more


def check_pool(op, x, settings, backend):
    ours = check(op, {"input": x}, settings, ("input",))
    if backend.fused:
        assert_format("output", ours.output, x)
        assert_format("grad of input", ours.grads["input"], x)
    return ours


@BF16_FP32
@pytest.mark.parametrize("case", POOLS + DILATED_POOLS, ids=str)
def test_max_matches_oracle(case: Pool, dtype, backend):
    x = case.input(dtype, backend.device)
    ours = check_pool("max_pool2d", x, max_settings(case), backend)
    assert same_bits(ours.output, F.max_pool2d(x, **max_settings(case)))
    assert same_bits(FF.max_pool2d(x, **max_settings(case)), ours.output), "with and without gradients"


@BF16_FP32
@pytest.mark.parametrize("count_include_pad", (True, False))
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_avg_matches_oracle(case: Pool, count_include_pad, dtype, backend):
    settings = avg_settings(case, count_include_pad=count_include_pad)
    check_pool("avg_pool2d", case.input(dtype, backend.device), settings, backend)


@pytest.mark.parametrize("divisor", (1, 7, -3))
@pytest.mark.parametrize("case", [c for c in POOLS if c.padding or c.ceil_mode], ids=str)
def test_avg_divisor_override(case: Pool, divisor, backend):
    settings = avg_settings(case, divisor_override=divisor)
    check_pool("avg_pool2d", case.input(torch.float32, backend.device), settings, backend)


@BF16_FP32
@pytest.mark.parametrize("layout", ("nhwc", "nchw"))
@pytest.mark.parametrize(("shape", "size"), ADAPTIVE, ids=str)
def test_adaptive_avg_matches_oracle(shape, size, layout, dtype, backend):
    x = lay(torch.randn(shape, device=backend.device).to(dtype), layout)
    check_pool("adaptive_avg_pool2d", x, {"output_size": size}, backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype, backend):
    if dtype is torch.float64 and not backend.fp64:
        pytest.skip("this backend leaves fp64 to aten")
    x = torch.randn(2, 9, 7, 7, device=backend.device).to(dtype)
    check_pool("max_pool2d", x, {"kernel_size": 3, "stride": 2, "padding": 1}, backend)
    check_pool("avg_pool2d", x, {"kernel_size": 3, "stride": 2, "padding": 1}, backend)
    check_pool("adaptive_avg_pool2d", x, {"output_size": (3, 2)}, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(layout, grad_layout, backend):
    x = lay(torch.randn(3, 5, 6, 7, device=backend.device), layout)
    for op, settings in (
        ("max_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("avg_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("adaptive_avg_pool2d", {"output_size": (4, 2)}),
    ):
        ours = check(op, {"input": x}, settings, ("input",), shape_grad=lambda g: lay(g, grad_layout))
        if backend.fused:
            assert_format(f"{op} output", ours.output, x)
            assert_format(f"{op} grad of input", ours.grads["input"], x)


def test_scalar_grad_output(backend):
    x = torch.randn(2, 5, 6, 6, device=backend.device)
    spread = lambda g: torch.ones((), device=g.device).expand(g.shape)  # noqa: E731
    check("max_pool2d", {"input": x}, {"kernel_size": 2}, ("input",), shape_grad=spread)
    check("avg_pool2d", {"input": x}, {"kernel_size": 2}, ("input",), shape_grad=spread)
    check("adaptive_avg_pool2d", {"input": x}, {"output_size": 1}, ("input",), shape_grad=spread)


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("stride", (1, 2, 3))
def test_max_ties_go_to_the_first(stride, layout, backend):
    """After a ReLU whole windows are 0: the gradient goes where stock PyTorch sends it."""
    x = lay(torch.randint(0, 2, (2, 19, 9, 9), device=backend.device).float(), layout)
    grad = torch.randn_like(F.max_pool2d(x, 3, stride, 1))
    settings = {"kernel_size": 3, "stride": stride, "padding": 1}
    ours = execute(FF.max_pool2d, {"input": x}, settings, ("input",), grad)
    stock = execute(F.max_pool2d, {"input": x}, settings, ("input",), grad)
    torch.testing.assert_close(ours.grads["input"], stock.grads["input"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_max_nan_and_infinity(layout, backend):
    """NaN wins over everything, -inf may be the maximum; gradients as stock's."""
    x = torch.randn(2, 19, 8, 8, device=backend.device)
    x[0, :, 2, 2], x[1, 3, 5, 5], x[1, 4, 5, 5] = float("nan"), float("inf"), -float("inf")
    x[1, 5] = -float("inf")
    x[0, 6, 3, 2] = float("nan")  # two NaN in one window
    x = lay(x, layout)
    for settings in (
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1},
    ):
        grad = torch.randn_like(F.max_pool2d(x, **settings))
        ours = execute(FF.max_pool2d, {"input": x}, settings, ("input",), grad)
        stock = execute(F.max_pool2d, {"input": x}, settings, ("input",), grad)
        assert same_bits(ours.output, stock.output)
        torch.testing.assert_close(ours.grads["input"], stock.grads["input"], rtol=1e-6, atol=1e-6)


def test_max_of_signed_zeros_and_lowest_values(backend):
    lowest = torch.finfo(torch.float32).min
    x = torch.full((1, 3, 4, 4), lowest, device=backend.device)
    x[0, 1], x[0, 1, ::2] = -0.0, 0.0
    x[0, 2] = -float("inf")
    settings = {"kernel_size": 2, "stride": 1, "padding": 1}
    ours, stock = FF.max_pool2d(x, **settings), F.max_pool2d(x, **settings)
    assert same_bits(ours, stock), "padding must never win over a value"


def test_max_window_without_an_element(backend):
    """Dilation can put every tap of a window into the padding: -inf, as in stock, and a gradient for nobody.

    Stock PyTorch 2.11's own backward writes outside the gradient here, so it is not called.
    """
    if not backend.fused:
        pytest.skip("stock PyTorch's backward corrupts memory")
    x = torch.randn(2, 19, 1, 3, device=backend.device)
    settings = {"kernel_size": (2, 1), "stride": 1, "padding": (1, 0), "dilation": (2, 1)}
    ours = execute(FF.max_pool2d, {"input": x}, settings, ("input",), torch.ones(2, 19, 1, 3, device=backend.device))
    assert same_bits(ours.output, F.max_pool2d(x, **settings)) and (ours.output == -float("inf")).all()
    assert not ours.grads["input"].any()


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_avg_nan_and_infinity(value, backend):
    x = torch.randn(2, 9, 6, 6, device=backend.device)
    x[1, 2, 3, 3] = value
    check("avg_pool2d", {"input": x}, {"kernel_size": 3, "stride": 2, "padding": 1})
    check("adaptive_avg_pool2d", {"input": x}, {"output_size": 2})


@pytest.mark.parametrize("op", ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"))
def test_unbatched_and_empty(op, backend):
    settings = {"output_size": 2} if op == "adaptive_avg_pool2d" else {"kernel_size": 3, "stride": 2, "padding": 1}
    check(op, {"input": torch.randn(5, 7, 6, device=backend.device)}, settings, ("input",))
    ours = check(op, {"input": torch.randn(0, 5, 7, 6, device=backend.device)}, settings, ("input",))
    assert ours.grads["input"].shape == (0, 5, 7, 6)


@pytest.mark.parametrize("op", ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_gradcheck(op, layout, backend):
    if not backend.fp64:
        pytest.skip("gradcheck needs fp64, which this backend leaves to aten")
    # Distinct values half apart: no finite difference changes an arg max.
    x = lay((torch.randperm(2 * 3 * 36).double() / 2).view(2, 3, 6, 6), layout).requires_grad_()
    cases = {
        "max_pool2d": [{"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}, {"kernel_size": 2, "dilation": 2}],
        "avg_pool2d": [{"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}, {"kernel_size": 2, "divisor_override": 3}],
        "adaptive_avg_pool2d": [{"output_size": (4, 2)}, {"output_size": 8}],
    }[op]  # fmt: skip
    for settings in cases:
        assert torch.autograd.gradcheck(lambda t, s=settings: getattr(FF, op)(t, **s), (x,), fast_mode=True)


def test_return_indices():
    """Flat int64 indices are aten's business: under auto they come as F.max_pool2d returns them."""
    x = torch.randn(2, 3, 7, 7, requires_grad=True)
    out, indices = FF.max_pool2d(x, 3, 2, 1, return_indices=True)
    expected, expected_indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert same_bits(out, expected) and torch.equal(indices, expected_indices)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.sum() == out.numel()


def test_window_over_256_elements():
    x = torch.randn(1, 2, 40, 40, requires_grad=True)
    out = FF.max_pool2d(x, (17, 16), 1)
    assert same_bits(out, F.max_pool2d(x, (17, 16), 1))
    out.sum().backward()
    assert x.grad.sum() == out.numel()


def test_last_offset_of_a_full_byte(backend):
    """A 16x16 window with its maximum in the last corner: offset 255 must survive as one byte."""
    x = torch.zeros(1, 3, 16, 16, device=backend.device)
    x[:, :, 15, 15] = 1
    ours = execute(
        FF.max_pool2d, {"input": x}, {"kernel_size": 16}, ("input",), torch.ones(1, 3, 1, 1, device=x.device)
    )
    assert same_bits(ours.grads["input"], x)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64, torch.uint8, torch.int8))
def test_integer_max_pooling_as_stock(dtype):
    x = torch.randint(0, 100, (2, 3, 6, 6)).to(dtype)
    assert torch.equal(FF.max_pool2d(x, 2), F.max_pool2d(x, 2))


def test_default_stride_is_the_kernel(backend):
    x = torch.randn(2, 3, 12, 12, device=backend.device)
    for stride in (None, (), []):
        assert FF.max_pool2d(x, (3, 4), stride).shape == (2, 3, 4, 3)
        assert FF.avg_pool2d(x, (3, 4), stride).shape == (2, 3, 4, 3)


def test_empty_adaptive_output():
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    out = FF.adaptive_avg_pool2d(x, (0, 2))
    assert out.shape == F.adaptive_avg_pool2d(x, (0, 2)).shape == (2, 3, 0, 2)


def test_deterministic(backend):
    x = torch.randn(4, 33, 9, 9, device=backend.device)
    for op, settings in (("max_pool2d", {"kernel_size": 3, "stride": 1}), ("avg_pool2d", {"kernel_size": 3, "stride": 1}),
                         ("adaptive_avg_pool2d", {"output_size": 5})):  # fmt: skip
        function = getattr(FF, op)
        grad = torch.randn_like(function(x, **settings))
        runs = [execute(function, {"input": x}, settings, ("input",), grad) for _ in range(3)]
        assert all(same_bits(runs[0].grads["input"], r.grads["input"]) for r in runs[1:])
        if backend.name == "cpu":
            torch.set_num_threads(1)
            alone = execute(function, {"input": x}, settings, ("input",), grad)
            torch.set_num_threads(2)
            assert same_bits(alone.output, runs[0].output) and same_bits(alone.grads["input"], runs[0].grads["input"])


def test_double_backward(backend):
    x = torch.randn(2, 3, 6, 6, device=backend.device, requires_grad=True)
    for out in (FF.max_pool2d(x, 2), FF.avg_pool2d(x, 2), FF.adaptive_avg_pool2d(x, 2)):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if backend.fused:
            with pytest.raises(RuntimeError, match="is differentiable once: .*use_backend"):
                grad.sum().backward()
        else:
            (second,) = torch.autograd.grad(grad.sum(), x)
            assert second.abs().sum() > 0


def test_max_pool_of_a_changed_input_is_fine(backend):
    """The backward needs the offsets alone: an in-place change of the input after the pool is no error."""
    if not backend.fused:
        pytest.skip("stock PyTorch keeps the input")
    x = torch.randn(2, 3, 6, 6, device=backend.device, requires_grad=True)
    y = x * 1
    out = FF.max_pool2d(y, 2)
    y.zero_()
    out.sum().backward()
    assert x.grad is not None


def test_matches_modules_used_by_torchvision(backend):
    x = torch.randn(2, 8, 16, 16, device=backend.device)
    assert same_bits(FF.max_pool2d(x, 3, 2, 1, 1, False, False), torch.nn.MaxPool2d(3, 2, 1)(x))
