"""act(batch_norm(input) + residual): values, gradients, running statistics, small and ill-conditioned batches."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, lay
from util import ACTIVATIONS, FLOATS, Stock, assert_close_2x, assert_format, check, execute, same_bits

import fastconv.functional as FF

OP = "batch_norm_act"
AFFINE = ("weight", "bias")
ALL = ("input", "residual", "weight", "bias")
# (n, c, h, w): ResNet50's maps at a reduced batch, then odd ones; down to two samples per channel.
SHAPES = (
    (2, 64, 16, 16), (2, 256, 8, 8), (4, 512, 2, 2), (4, 2048, 1, 1), (2, 1, 5, 7), (3, 13, 5, 3), (1, 33, 4, 4),
    (7, 5, 3, 1), (2, 65, 1, 1), (1, 3, 1, 2), (1, 1, 1, 40), (5, 257, 3, 3),
)  # fmt: skip


def make(shape, dtype, device, stats_dtype=None, layout="nhwc", residual=True):
    """Random tensors of FF.batch_norm_act, in the order of its arguments."""
    c, stats_dtype = shape[1], stats_dtype or dtype
    lays = (lambda t: lay(t, layout)) if len(shape) == 4 else (lambda t: t)
    return {
        "input": lays((torch.randn(shape, device=device) * 2 + torch.randn(c, *[1] * (len(shape) - 2), device=device)).to(dtype)),
        "running_mean": torch.randn(c, device=device).to(stats_dtype),
        "running_var": (torch.rand(c, device=device) + 0.5).to(stats_dtype),
        "weight": (torch.rand(c, device=device) + 0.5).to(stats_dtype),
        "bias": torch.randn(c, device=device).to(stats_dtype),
        "residual": lays(torch.randn(shape, device=device).to(dtype)) if residual else None,
    }  # fmt: skip


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(shape, dtype, training, backend):
    tensors = make(shape, dtype, backend.device, torch.float32)
    # With two samples per channel the gradient of the input is zero but for eps: rounding of terms of size 1.
    atol = {"grad of input": 4 * torch.finfo(dtype).eps} if shape == (1, 3, 1, 2) else {}
    ours = check(OP, tensors, {"training": training, "activation": "relu"}, ALL, atol)
    if backend.fused:
        assert_format("output", ours.output, tensors["input"])
        assert_format("grad of input", ours.grads["input"], tensors["input"])
    moved = [not same_bits(ours.buffers[n], tensors[n]) for n in ("running_mean", "running_var")]
    assert moved == [training, training], "running statistics change in training, and only there"


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, training, backend):
    if dtype is torch.float64 and not backend.fp64:
        pytest.skip("this backend leaves fp64 to aten")
    tensors = make((3, 10, 5, 7), dtype, backend.device)
    tensors["residual"] *= 3
    settings = {"training": training, "activation": activation}
    # Sums over 105 pixels of terms that a rounded output or pre-activation decides: eps * sqrt(105) wherever they end.
    atol = {f"grad of {n}": 2 * torch.finfo(dtype).eps * 105**0.5 for n in AFFINE}
    check(OP, tensors, settings, ALL, atol)
    check(OP, {**tensors, "residual": None}, settings, ("input", *AFFINE), atol)


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("stats_dtype", (torch.float32, None), ids=("fp32_stats", "same_stats"))
@pytest.mark.parametrize("affine", ("both", "weight", "bias", "none"))
def test_mixed_dtypes_and_affine(affine, stats_dtype, dtype, training, backend):
    tensors = make((4, 6, 3, 5), dtype, backend.device, stats_dtype)
    for name in AFFINE:
        if affine not in ("both", name):
            tensors[name] = None
    wanted = [n for n in ALL if tensors[n] is not None]
    ours = check(OP, tensors, {"training": training, "activation": "silu"}, wanted)
    for name in set(wanted) & set(AFFINE):
        assert ours.grads[name].dtype == tensors[name].dtype


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, training, backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device, layout=layout)
    # An expanded batch has one image's spread: the variance is that of the image.
    ours = check(OP, tensors, {"training": training, "activation": "gelu"}, ALL)
    if backend.fused:
        assert_format("output", ours.output, tensors["input"])
        assert_format("grad of input", ours.grads["input"], tensors["input"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ("relu", "hardswish", "identity"))
def test_residual_and_grad_output_layouts(layout, activation, backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    tensors["residual"] = lay(tensors["residual"], layout)
    settings = {"training": True, "activation": activation}
    check(OP, tensors, settings, ALL, shape_grad=lambda g: lay(g, layout))


def test_strided_vectors(backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensors[name] = torch.stack((tensors[name], tensors[name]), 1)[:, 0]
    check(OP, tensors, {"training": True}, ALL)
    check(OP, tensors, {"training": False}, ALL)


@pytest.mark.parametrize("shape", ((8, 5), (4, 5, 6), (2, 3, 4, 5, 6), (9, 1), (2, 7, 1)), ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
def test_other_dimensions(shape, training, backend):
    """[N, C], [N, C, L] and [N, C, D, H, W], as F.batch_norm takes them."""
    tensors = make(shape, torch.float32, backend.device)
    check(OP, tensors, {"training": training}, ALL)


@pytest.mark.parametrize("activation", ("relu", "silu", "identity"))
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("wanted", [(n,) for n in ALL] + [("weight", "bias"), ("input", "residual")], ids="-".join)
def test_gradients_only_where_asked(wanted, training, activation, backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    settings = {"training": training, "activation": activation}
    grad_output = torch.randn(3, 6, 5, 7, device=backend.device)
    full = execute(FF.batch_norm_act, tensors, settings, ALL, grad_output)
    some = execute(FF.batch_norm_act, tensors, settings, wanted, grad_output)
    for name in wanted:
        assert same_bits(some.grads[name], full.grads[name]), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
def test_gradcheck(training, activation, backend):
    if not backend.fp64:
        pytest.skip("gradcheck needs fp64, which this backend leaves to aten")
    tensors = make((2, 3, 2, 3), torch.float64, "cpu")
    inputs = [tensors[n].detach().clone().requires_grad_() for n in ALL]

    def call(*args):
        buffers = {n: tensors[n].clone() for n in ("running_mean", "running_var")}
        return FF.batch_norm_act(
            **dict(zip(ALL, args, strict=True)), **buffers, training=training, activation=activation
        )

    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-5, fast_mode=activation != "relu")


def test_running_statistics_over_steps(backend):
    """Five batches against nn.BatchNorm2d: fixed momentum, and momentum None (cumulative average)."""
    for momentum in (0.1, 0.5, 1.0, 0.0, None):
        norm = torch.nn.BatchNorm2d(6, momentum=momentum, device=backend.device)
        mean, var = torch.zeros(6, device=backend.device), torch.ones(6, device=backend.device)
        count = torch.zeros((), dtype=torch.int64, device=backend.device)
        for step in range(5):
            x = torch.randn(4, 6, 3, 3, device=backend.device) + step
            norm(x)
            FF.batch_norm_act(x, mean, var, training=True, momentum=momentum, num_batches_tracked=count)
            assert count.item() == step + 1 == norm.num_batches_tracked.item()
            torch.testing.assert_close(mean, norm.running_mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(var, norm.running_var, rtol=1e-5, atol=1e-6)


def test_num_batches_tracked_stays_in_evaluation(backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    count = torch.tensor(7, device=backend.device)
    FF.batch_norm_act(**tensors, training=False, num_batches_tracked=count)
    assert count.item() == 7
    FF.batch_norm_act(**tensors, training=True, num_batches_tracked=count)
    assert count.item() == 8


def test_without_running_statistics(backend):
    """track_running_stats=False: batch statistics, nothing to update; momentum may be anything."""
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    tensors.update(running_mean=None, running_var=None)
    for momentum in (0.1, 0.0):
        check(OP, tensors, {"training": True, "momentum": momentum}, ALL)


def test_statistics_are_not_part_of_the_graph(backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    FF.batch_norm_act(**{**tensors, "input": tensors["input"].requires_grad_()}, training=True)
    assert not tensors["running_mean"].requires_grad and not tensors["running_var"].requires_grad


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("offset", (1e2, 1e4, -3e5))
def test_mean_far_from_zero(offset, layout, backend):
    """A variance computed as E[x^2] - E[x]^2 loses all its digits here."""
    tensors = make((4, 9, 8, 8), torch.float32, backend.device, layout=layout)
    tensors["input"] = tensors["input"] + offset
    # The rounding of the inputs is shared; what remains is the statistics' own error, relative to the spread.
    check(OP, tensors, {"training": True, "activation": "identity"}, ("weight", "bias"))
    out = FF.batch_norm_act(tensors["input"], None, None, training=True, activation="identity")
    if backend.fused:  # stock's channels_last kernel misses this at -3e5
        assert abs(out.var(dim=(0, 2, 3), unbiased=False) - 1).max() < 1e-3


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_constant_channel(dtype, backend):
    """Variance 0: eps alone normalises; the output is the bias."""
    tensors = make((3, 6, 5, 7), dtype, backend.device, torch.float32, residual=False)
    tensors["input"][:, 2] = 3.0
    ours = check(OP, tensors, {"training": True, "activation": "identity"}, ("input", *AFFINE))
    bias = tensors["bias"][2].to(dtype).float()
    torch.testing.assert_close(ours.output[:, 2].float(), bias.expand(3, 5, 7), rtol=1e-2, atol=1e-3)


def test_large_half_values(backend):
    """Sums and squares of float16 values pass 65504: statistics are float32."""
    tensors = make((4, 3, 8, 8), torch.float16, backend.device, torch.float32)
    tensors["input"] = tensors["input"] * 3000
    ours = check(OP, tensors, {"training": True}, ALL)
    assert ours.output.isfinite().all() and ours.buffers["running_var"].isfinite().all()


@pytest.mark.parametrize("eps", (1e-3, 1e-12, 1.0))
def test_eps(eps, backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    check(OP, tensors, {"training": True, "eps": eps}, ALL)
    check(OP, tensors, {"training": False, "eps": eps}, ALL)


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_infinity_spread_as_in_stock(value, training, backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    tensors["input"][1, 2, 3, 4] = value
    settings = {"training": training, "activation": "relu"}
    ours, stock = (execute(f, tensors, settings) for f in (FF.batch_norm_act, Stock.batch_norm_act))
    others = [c for c in range(6) if c != 2]
    torch.testing.assert_close(ours.output, stock.output, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ours.output[:, others].isfinite().all()
    for name in ("running_mean", "running_var"):
        # Which of inf and NaN poisons a channel's statistics depends on the order of the sum; that it does, does not.
        assert torch.equal(ours.buffers[name].isfinite(), stock.buffers[name].isfinite())
        assert bool(ours.buffers[name][2].isfinite()) is not training
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    tensors["residual"][1, 2, 3, 4] = value
    check(OP, tensors, settings, AFFINE)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_deterministic(dtype, backend):
    tensors = make((4, 33, 7, 9), dtype, backend.device, torch.float32)
    grad_output = torch.randn(4, 33, 7, 9, device=backend.device).to(dtype)
    first = execute(FF.batch_norm_act, tensors, {"training": True}, ALL, grad_output)
    for _ in range(3):
        again = execute(FF.batch_norm_act, tensors, {"training": True}, ALL, grad_output)
        assert same_bits(first.output, again.output)
        assert all(same_bits(first.grads[n], again.grads[n]) for n in ALL)
        assert all(same_bits(first.buffers[n], again.buffers[n]) for n in first.buffers)


def test_one_thread_or_more(backend):
    """The CPU kernels cut the batch into spans by its size alone, so the number of threads does not reach the sums."""
    if backend.name != "cpu":
        pytest.skip("about the threads of the C++ CPU kernels")
    for shape in ((16, 64, 16, 16), (64, 3, 8, 8), (4, 2048, 1, 1)):
        tensors, grad_output, runs = make(shape, torch.float32, "cpu"), torch.randn(shape), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(execute(FF.batch_norm_act, tensors, {"training": True}, ALL, grad_output))
        for run in runs[1:]:
            assert same_bits(run.output, runs[0].output)
            assert all(same_bits(run.grads[n], runs[0].grads[n]) for n in ALL)
            assert all(same_bits(run.buffers[n], runs[0].buffers[n]) for n in run.buffers)


def test_layout_does_not_change_the_statistics_much(backend):
    """NCHW and channels_last copies of one batch agree to rounding, in value and running statistics."""
    runs = []
    tensors = make((4, 33, 7, 9), torch.float32, backend.device)
    for layout in ("nchw", "nhwc"):
        moved = {n: lay(t, layout) if t.dim() == 4 else t for n, t in tensors.items()}
        runs.append(execute(FF.batch_norm_act, moved, {"training": True}))
    torch.testing.assert_close(runs[0].output, runs[1].output, rtol=1e-5, atol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(runs[0].buffers[name], runs[1].buffers[name], rtol=1e-6, atol=1e-6)


def test_double_backward(backend):
    tensors = make((3, 6, 5, 7), torch.float32, backend.device, residual=False)
    x = tensors["input"].requires_grad_()
    out = FF.batch_norm_act(**tensors, training=True, activation="tanh")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    if backend.fused:
        with pytest.raises(RuntimeError, match="is differentiable once: .*use_backend"):
            grad.sum().backward()
    else:
        grad.square().sum().backward()
        assert x.grad.abs().sum() > 0


def test_empty_batch_runs_on_aten_as_stock():
    """Statistics of nothing: whatever F.batch_norm does, fastconv does."""
    tensors = make((0, 3, 4, 4), torch.float32, "cpu")
    for training in (True, False):
        results = []
        for call in (FF.batch_norm_act, Stock.batch_norm_act):
            try:
                results.append(execute(call, tensors, {"training": training}).output.shape)
            except Exception as error:  # noqa: BLE001
                results.append(type(error))
        assert results[0] == results[1]


def test_eval_equals_the_folded_formula(backend):
    """Evaluation is one scale and shift per channel, the same for every batch."""
    tensors = make((3, 6, 5, 7), torch.float32, backend.device)
    together = FF.batch_norm_act(**tensors, activation="sigmoid")
    alone = [FF.batch_norm_act(**{n: t[i : i + 1] if t.dim() == 4 else t for n, t in tensors.items()}, activation="sigmoid")
             for i in range(3)]  # fmt: skip
    oracle = torch.cat(alone).double()
    assert_close_2x("one image or three", together, torch.cat(alone), oracle)
