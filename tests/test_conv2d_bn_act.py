"""act(batch_norm(conv2d(input, weight) + bias) + residual): the group that ResNets are made of."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, LAYOUTS, SMALL, Conv, lay
from util import ACTIVATIONS, FLOATS, assert_format, check, execute, same_bits

import fastconv.functional as FF

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

OP = "conv2d_bn_act"
ALL = ("input", "weight", "bias", "residual", "bn_weight", "bn_bias")
# F.batch_norm, the peer, takes no unbatched input.
BATCHED = [case for case in CONVS if not case.unbatched]
TRAINING = pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))


def make(case: Conv, dtype, device, stats_dtype=None) -> dict:
    """Random tensors of FF.conv2d_bn_act."""
    stats_dtype, k = stats_dtype or dtype, case.k
    return case.tensors(dtype, device) | {
        "running_mean": torch.randn(k, device=device).to(stats_dtype) / 2,
        "running_var": (torch.rand(k, device=device) + 0.5).to(stats_dtype),
        "bn_weight": (torch.rand(k, device=device) + 0.5).to(stats_dtype),
        "bn_bias": torch.randn(k, device=device).to(stats_dtype),
    }


def present(tensors) -> list[str]:
    return [name for name in ALL if tensors[name] is not None]


def rounding(tensors, settings) -> dict[str, float]:
    """Absolute tolerances of results that are sums over all pixels, by name.

    A sum of ``count`` terms of size 1, each rounded to the dtype of the convolution's output, is off by about
    eps * sqrt(count) wherever it ends up near zero; twice another such sum's error is no bound for it. In training the
    gradient of the convolution's bias is such a sum whose true value is 0.
    """
    geometry = {n: settings[n] for n in ("stride", "padding", "dilation", "groups") if n in settings}
    out = torch.nn.functional.conv2d(tensors["input"].to("meta"), tensors["weight"].to("meta"), None, **geometry)
    count, eps = max(out.numel() // out.size(1), 1), torch.finfo(out.dtype).eps
    room = {"running_mean": 0.1 * eps / count**0.5, "running_var": 0.3 * eps / count**0.5}
    room |= {"grad of bn_weight": eps * count**0.5, "grad of bn_bias": eps * count**0.5}
    if settings.get("training"):
        room["grad of bias"] = 8 * eps * count**0.5
    return room


def one_value_per_channel(case: Conv, tensors) -> bool:
    shape = torch.nn.functional.conv2d(tensors["input"].float(), tensors["weight"].float(), None, **case.geometry).shape
    return len(shape) == 4 and shape[0] * shape[2] * shape[3] == 1


@TRAINING
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_matches_oracle(case: Conv, dtype, training, backend):
    tensors = make(case, dtype, backend.device, torch.float32)
    settings = {**case.geometry, "training": training, "activation": "relu"}
    if training and one_value_per_channel(case, tensors):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            FF.conv2d_bn_act(**tensors, **settings)
        return
    ours = check(OP, tensors, settings, present(tensors), rounding(tensors, settings))
    if backend.fused:
        assert_format("output", ours.output, tensors["input"], tensors["weight"])
        assert_format("grad of input", ours.grads["input"], tensors["input"])
        assert_format("grad of weight", ours.grads["weight"], tensors["weight"])
    moved = [not same_bits(ours.buffers[n], tensors[n]) for n in ("running_mean", "running_var")]
    assert moved == [training, training]


@TRAINING
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, training, backend):
    if dtype is torch.float64 and not backend.fp64:
        pytest.skip("this backend leaves fp64 to aten")
    tensors = make(SMALL, dtype, backend.device)
    tensors["residual"] *= 3
    settings = {**SMALL.geometry, "training": training, "activation": activation}
    check(OP, tensors, settings, ALL, rounding(tensors, settings))
    plain = {**tensors, "bias": None, "residual": None}
    check(OP, plain, settings, present(plain), rounding(plain, settings))


@TRAINING
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_is_the_same_function(activation, training, backend):
    """Without gradients (in evaluation: the fused scale and shift) the output is that of the training path."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = make(SMALL, dtype, backend.device, torch.float32)
        settings = {**SMALL.geometry, "training": training, "activation": activation}
        check(OP, tensors, settings, (), rounding(tensors, settings))
        check(OP, {**tensors, "bias": None, "residual": None}, settings, (), rounding(tensors, settings))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_inference_matches_oracle(case: Conv, dtype, backend):
    tensors = make(case, dtype, backend.device, torch.float32)
    ours = check(OP, tensors, {**case.geometry, "training": False, "activation": "relu"})
    if backend.fused:
        assert_format("output", ours.output, tensors["input"], tensors["weight"])


@TRAINING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, training, backend):
    tensors = make(SMALL, torch.float32, backend.device)
    tensors["input"], tensors["residual"] = lay(tensors["input"], layout), lay(tensors["residual"], layout)
    settings = {**SMALL.geometry, "training": training, "activation": "relu"}
    if layout == "expanded" and training:
        # All images alike: the interior of the gradients cancels, errors are relative to the terms.
        settings["activation"] = "identity"
    ours = check(OP, tensors, settings, ALL, rounding(tensors, settings))
    check(OP, tensors, settings, (), rounding(tensors, settings))
    if backend.fused:
        assert_format("output", ours.output, tensors["input"], tensors["weight"])
        assert_format("grad of input", ours.grads["input"], tensors["input"])


@pytest.mark.parametrize("layout", ("nchw", "strided", "offset", "expanded", "transposed"))
@pytest.mark.parametrize("activation", ("relu", "silu", "identity"))
def test_grad_output_layouts(layout, activation, backend):
    tensors = make(SMALL, torch.float32, backend.device)
    settings = {**SMALL.geometry, "training": True, "activation": activation}
    check(OP, tensors, settings, ALL, rounding(tensors, settings), shape_grad=lambda g: lay(g, layout))


@TRAINING
@pytest.mark.parametrize("activation", ("relu", "gelu", "identity"))
@pytest.mark.parametrize(
    "wanted", [(n,) for n in ALL] + [("input", "weight"), ("weight", "bn_weight", "bn_bias")], ids="-".join
)
def test_gradients_only_where_asked(wanted, activation, training, backend):
    tensors = make(SMALL, torch.float32, backend.device)
    settings = {**SMALL.geometry, "training": training, "activation": activation}
    grad_output = torch.randn(SMALL.n, SMALL.k, SMALL.h, SMALL.w, device=backend.device)
    full = execute(FF.conv2d_bn_act, tensors, settings, ALL, grad_output)
    some = execute(FF.conv2d_bn_act, tensors, settings, wanted, grad_output)
    for name in wanted:
        assert same_bits(some.grads[name], full.grads[name]), name


@TRAINING
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, training, backend):
    if not backend.fp64:
        pytest.skip("gradcheck needs fp64, which this backend leaves to aten")
    case = Conv("tiny", 2, 2, 3, 3, 3, padding=1, residual=True)
    tensors = make(case, torch.float64, "cpu")
    inputs = [tensors[n].detach().clone().requires_grad_() for n in ALL]

    def call(*args):
        buffers = {n: tensors[n].clone() for n in ("running_mean", "running_var")}
        named = dict(zip(ALL, args, strict=True))
        return FF.conv2d_bn_act(**named, **buffers, **case.geometry, training=training, activation=activation)

    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


@TRAINING
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", (SMALL, Conv("many", 3, 8, 11, 9, 16, padding=1)), ids=str)
def test_the_slope_is_that_of_the_output(case, dtype, training, backend):
    """A ReLU lets the gradient through exactly where the output is positive, also where it is told from the input."""
    tensors = {**make(case, dtype, backend.device, torch.float32), "bias": None, "residual": None}
    ours = execute(
        FF.conv2d_bn_act, tensors, {**case.geometry, "training": training, "activation": "relu"}, present(tensors),
        torch.ones(case.n, case.k, case.h, case.w, device=backend.device, dtype=dtype),
    )  # fmt: skip
    assert torch.equal(ours.grads["bn_bias"], (ours.output > 0).sum((0, 2, 3)).float())


@TRAINING
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_mixed_dtypes(dtype, training, backend):
    """Low-precision convolution, float32 statistics: gradients come in the dtype of their parameter."""
    tensors = make(SMALL, dtype, backend.device, torch.float32)
    settings = {**SMALL.geometry, "training": training, "activation": "relu"}
    ours = check(OP, tensors, settings, ALL, rounding(tensors, settings))
    assert all(ours.grads[n].dtype == tensors[n].dtype for n in ALL)


@TRAINING
def test_without_affine_and_without_running_statistics(training, backend):
    tensors = make(SMALL, torch.float32, backend.device) | {"bn_weight": None, "bn_bias": None}
    if training:
        tensors.update(running_mean=None, running_var=None)
    settings = {**SMALL.geometry, "training": training, "activation": "relu"}
    check(OP, tensors, settings, present(tensors), rounding(tensors, settings))
    check(OP, tensors, settings)


def test_running_statistics_over_steps(backend):
    """Five batches against nn.Conv2d and nn.BatchNorm2d: fixed momentum, and momentum None (cumulative average)."""
    for momentum in (0.1, None):
        conv = torch.nn.Conv2d(3, 6, 3, bias=False, device=backend.device)
        norm = torch.nn.BatchNorm2d(6, momentum=momentum, device=backend.device)
        mean, var = torch.zeros(6, device=backend.device), torch.ones(6, device=backend.device)
        count = torch.zeros((), dtype=torch.int64, device=backend.device)
        for step in range(5):
            x = torch.randn(4, 3, 5, 5, device=backend.device) + step
            norm(conv(x))
            FF.conv2d_bn_act(x, conv.weight, None, mean, var, norm.weight, norm.bias, training=True, momentum=momentum,
                             num_batches_tracked=count)  # fmt: skip
            assert count.item() == step + 1 == norm.num_batches_tracked.item()
            torch.testing.assert_close(mean, norm.running_mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(var, norm.running_var, rtol=1e-5, atol=1e-5)


def test_statistics_are_updated_without_gradients_too(backend):
    """Training under no_grad (recalibration of statistics) updates them as stock does."""
    tensors = make(SMALL, torch.float32, backend.device)
    with torch.no_grad():
        check(OP, tensors, {**SMALL.geometry, "training": True})
        count = torch.tensor(4, device=backend.device)
        FF.conv2d_bn_act(**tensors, **SMALL.geometry, training=True, num_batches_tracked=count)
        assert count.item() == 5


def test_unbatched(backend):
    """[C, H, W] stands for a batch of one."""
    tensors = make(Conv("one", 1, 4, 6, 6, 5, padding=1, residual=True), torch.float32, backend.device)
    expected = FF.conv2d_bn_act(**tensors, padding=1)
    single = {n: t.squeeze(0) if n in ("input", "residual") else t for n, t in tensors.items()}
    assert same_bits(FF.conv2d_bn_act(**single, padding=1), expected.squeeze(0))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("running_mean", "running_var", "bn_weight", "bn_bias", "residual", "bias"))
def test_nan_and_infinity_spread_as_in_stock(where, value, backend):
    """In evaluation, where scale and shift are folded: inf * 0 and x / inf must come out as in the plain formula."""
    tensors = make(SMALL, torch.float32, backend.device)
    tensors[where][(3,) if tensors[where].dim() == 1 else (1, 3, 2, 2)] = value
    ours = FF.conv2d_bn_act(**tensors, **SMALL.geometry)
    others = [k for k in range(SMALL.k) if k != 3]
    assert ours[:, others].isfinite().all()
    if value != value:
        assert ours[1, 3, 2, 2].isnan()
    check(OP, tensors, {**SMALL.geometry, "training": False, "activation": "relu"}, ("bn_bias",))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_deterministic(dtype, backend):
    case = next(c for c in CONVS if c.name == "layer4_3x3_at_1x1")
    tensors = make(case, dtype, backend.device, torch.float32)
    settings = {**case.geometry, "training": True}
    grad_output = torch.randn(4, 512, 1, 1, device=backend.device).to(dtype)
    wanted = present(tensors)
    first, again = (execute(FF.conv2d_bn_act, tensors, settings, wanted, grad_output) for _ in range(2))
    assert same_bits(first.output, again.output)
    assert all(same_bits(first.grads[n], again.grads[n]) for n in wanted)
    assert all(same_bits(first.buffers[n], again.buffers[n]) for n in first.buffers)


def test_dead_taps_get_no_gradient(backend):
    """A padded 3x3 on a 1x1 map touches data with its centre tap alone: the other taps' gradient is exactly 0."""
    case = next(c for c in CONVS if c.name == "padded_3x3_on_1x1")
    tensors = make(case, torch.float32, backend.device)
    ours = check(OP, tensors, {**case.geometry, "training": True, "activation": "relu"}, ("weight",))
    grad = ours.grads["weight"].clone()
    assert grad[:, :, 1, 1].abs().min() > 0
    grad[:, :, 1, 1] = 0
    assert not grad.any()


def test_double_backward(backend):
    tensors = make(SMALL, torch.float32, backend.device)
    weight = tensors["weight"].requires_grad_()
    out = FF.conv2d_bn_act(**tensors, **SMALL.geometry, training=True, activation="tanh")
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    if backend.fused:
        with pytest.raises(RuntimeError, match="is differentiable once: .*use_backend"):
            grad.sum().backward()
    else:
        grad.square().sum().backward()
        assert weight.grad.abs().sum() > 0


@TRAINING
def test_empty_batch_runs_on_aten_as_stock(training):
    """Under auto: statistics of nothing are whatever F.batch_norm makes of them."""
    tensors = make(Conv("empty", 0, 4, 6, 6, 5, padding=1), torch.float32, "cpu")
    norm = torch.nn.BatchNorm2d(5).train(training)
    try:
        stock = norm(torch.nn.functional.conv2d(tensors["input"], tensors["weight"], padding=1)).shape
    except ValueError as error:
        stock = str(error)
    if isinstance(stock, str):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            FF.conv2d_bn_act(**tensors, padding=1, training=training)
    else:
        assert FF.conv2d_bn_act(**tensors, padding=1, training=training).shape == stock
