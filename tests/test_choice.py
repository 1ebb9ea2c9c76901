"""The choice under "auto": measured when it may be, remembered, explained; never disturbing the call that it is made for."""

from __future__ import annotations

import logging

import pytest
import torch
from choice_util import CHOICE_TESTS, image, net_call
from util import same_bits

import fastconv
import fastconv.functional as FF
from fastconv.ops import choice, keys, registry
from fastconv.ops import measure as measuring

pytestmark = CHOICE_TESTS


def test_measured_once_and_read_from_disk_by_the_next_process(measured):
    call = net_call()
    first = fastconv.explain("conv2d_bias_act", image(4, 8, 6, 6, grad=True), torch.randn(8, 8, 3, 3, requires_grad=True),
                             padding=1)  # fmt: skip
    assert first.ms == {} and "measured at its first use" in first.reason and measured == []
    call(), call()
    assert len(measured) == 1 and measured[0].startswith("conv2d_bias_act float32[4,8,6,6]cl* float32[8,8,3,3]*")
    choice.forget()  # as a new process
    call()
    assert len(measured) == 1
    after = fastconv.explain("conv2d_bias_act", image(4, 8, 6, 6, grad=True), torch.randn(8, 8, 3, 3, requires_grad=True),
                             padding=1)  # fmt: skip
    assert set(after.ms) == {"cpu", "aten"} and all(len(t) == 2 and min(t) > 0 for t in after.ms.values())
    assert after.backend == choice.winner(after.ms) and after.call == measured[0]


def test_a_later_run_takes_the_same_kernels_bit_for_bit(monkeypatch):
    """A training run that measures, and one that finds its measurements on disk as a resumed run does."""

    def train():
        torch.manual_seed(1)
        net = fastconv.fuse(
            torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            )
        )  # fmt: skip
        step = fastconv.TrainStep(net, fastconv.nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1, 0.9))
        losses = [step.eager(torch.randn(8, 3, 12, 12), torch.randint(16, (8,))) for _ in range(4)]
        return torch.stack([*losses, *(p.detach().double().sum().float() for p in net.parameters())])

    winners = []

    def pretend(op, names, run, tensors, settings, seconds=None):
        winners.append("cpu" if len(winners) % 2 else "aten")
        return measuring.Result({n: [1.0 if n == winners[-1] else 2.0] for n in names})

    monkeypatch.setattr(choice, "measure", pretend)
    first = train()
    assert len(winners) >= 5, "the classes of this net: both backends took part"

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(choice, "measure", never)
    choice.forget()  # as a new process
    assert same_bits(train(), first)


def test_what_makes_a_class(measured):
    x, w = image(4, 8, 6, 6), torch.randn(8, 8, 3, 3)
    FF.conv2d_bias_act(x, w)
    FF.conv2d_bias_act(image(3, 8, 6, 6), w)  # the batch rounded up is the same
    assert len(measured) == 1
    for call in (
        lambda: FF.conv2d_bias_act(image(5, 8, 6, 6), w),
        lambda: FF.conv2d_bias_act(x.contiguous(), w),
        lambda: FF.conv2d_bias_act(x.bfloat16(), w.bfloat16()),
        lambda: FF.conv2d_bias_act(x, w, torch.randn(8)),
        lambda: FF.conv2d_bias_act(x, w, padding=1),
        lambda: FF.conv2d_bias_act(x, w, activation="gelu"),
        lambda: FF.conv2d_bias_act(x, w.clone().requires_grad_()),
    ):
        before = len(measured)
        call(), call()
        assert len(measured) == before + 1, measured[-1]
    with torch.no_grad():
        FF.conv2d_bias_act(x, w.clone().requires_grad_())
    assert len(set(measured)) == len(measured) == 8


def test_sides_of_large_maps_are_rounded():
    name = keys.class_of("max_pool2d", [keys.Spec((5, 3, 33, 224), (0,) * 4, "float32", False)], ())
    assert "[8,3,40,224]" in name
    assert keys.class_of("max_pool2d", [keys.Spec((1, 3, 31, 250), (0,) * 4, "float32", False)], ()).split("[")[1] == (
        "1,3,31,256]strided"
    )


def test_measuring_touches_nothing_of_the_caller():
    """Random state, running statistics, counters, inputs, .grad and autocast are as if nothing had been measured."""
    results = []
    for tune in (False, True):
        torch.manual_seed(3)
        layer = fastconv.nn.BatchNormAct2d(6)
        x = image(4, 6, 5, 5, grad=True)
        versions = x._version
        if not tune:
            with fastconv.use_backend("cpu"):
                out = layer(x)
        else:
            name = fastconv.explain(
                FF.batch_norm_act, x, layer.running_mean, layer.running_var, layer.weight, layer.bias, True,
                num_batches_tracked=layer.num_batches_tracked,
            ).call  # fmt: skip
            store = choice.store_of(x.device)
            before = torch.get_rng_state()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = layer(x)
                assert torch.is_autocast_enabled("cpu")
            assert torch.equal(torch.get_rng_state(), before)
            assert store.get(name) is not None, "it was measured"
        assert x._version == versions and x.grad is None and layer.weight.grad is None
        results.append(
            (layer.running_mean.clone(), layer.running_var.clone(), layer.num_batches_tracked, out, torch.rand(3))
        )
    assert results[1][2] == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_wrong_or_failing_backend_is_left_out(caplog):
    x, w = image(4, 8, 6, 6, grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    settings = ((1, 1), (1, 1), (1, 1), 1, "relu")

    def run(name, *args):
        if name == "cuda":
            raise RuntimeError("out of resources: shared memory\nand more")
        out = FF._conv2d_bias_act("aten", *args)
        if name == "triton":
            out = torch.cat([out[:1] * 1.2, out[1:]])  # one image of four is off by a fifth
        return out

    result = measuring.measure("conv2d_bias_act", registry.NAMES, run, (x, w, None, None), settings, 0.0)
    assert set(result.ms) == {"cpu", "aten"}
    assert result.failed["cuda"] == "RuntimeError: out of resources: shared memory"
    assert "the output differs from stock PyTorch" in result.failed["triton"]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2


def test_a_wrong_gradient_is_found():
    x, w = image(4, 8, 6, 6, grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    def run(name, x, *args):
        return FF._conv2d_bias_act("aten", Twice.apply(x) if name == "cpu" else x, *args)

    settings = ((1, 1), (1, 1), (1, 1), 1, "relu")
    result = measuring.measure("conv2d_bias_act", ("cpu", "aten"), run, (x, w, None, None), settings, 0.0)
    assert "gradient 1 differs" in result.failed["cpu"] and set(result.ms) == {"aten"}


CASES = {
    "conv": lambda: FF.conv2d_bias_act(image(2, 4, 6, 6, grad=True), torch.randn(8, 4, 3, 3, requires_grad=True), activation="silu"),
    "half": lambda: FF.conv2d_bias_act(image(2, 64, 6, 6).bfloat16(), torch.randn(8, 64, 3, 3).bfloat16(), torch.randn(8).bfloat16()),
    "conv_bn": lambda: FF.conv2d_bn_act(
        image(4, 8, 6, 6, grad=True), torch.randn(8, 8, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True),
        torch.zeros(8), torch.ones(8), torch.zeros(8, requires_grad=True), torch.randn(8, requires_grad=True), training=True),
    "conv_bn_half": lambda: FF.conv2d_bn_act(
        image(16, 64, 8, 8, grad=True).bfloat16(), torch.randn(256, 64, 1, 1, requires_grad=True).bfloat16(), None,
        torch.zeros(256), torch.ones(256), torch.ones(256, requires_grad=True), torch.zeros(256, requires_grad=True),
        training=True, residual=image(16, 256, 8, 8, grad=True).bfloat16()),  # the kink of relu moves gradients by percents
    "norm": lambda: FF.batch_norm_act(image(4, 8, 6, 6, grad=True), None, None, training=True, residual=image(4, 8, 6, 6, grad=True)),
    "norm_1d": lambda: FF.batch_norm_act(torch.randn(16, 8, requires_grad=True), torch.zeros(8), torch.ones(8)),
    "max_pool": lambda: FF.max_pool2d(image(2, 8, 7, 7, grad=True).half(), 3, 2, 1),
    "avg_pool": lambda: FF.avg_pool2d(image(2, 8, 7, 7, grad=True), 2),
    "adaptive": lambda: FF.adaptive_avg_pool2d(image(2, 8, 7, 7, grad=True), 1),
    "loss": lambda: FF.cross_entropy(torch.randn(8, 10, requires_grad=True), torch.arange(8), torch.rand(10), label_smoothing=0.1),
    "probabilities": lambda: FF.cross_entropy(
        torch.randn(8, 10, requires_grad=True), torch.randn(8, 10).softmax(1).requires_grad_(), reduction="none"),
    "expanded": lambda: FF.max_pool2d(torch.randn(1, 1, 8, 8).expand(4, 3, 8, 8), 2),
    "sliced": lambda: FF.avg_pool2d(image(4, 6, 8, 8)[:, ::2], 2),
    "zeros": lambda: FF.conv2d_bn_act(
        torch.zeros(4, 8, 6, 6), torch.zeros(8, 8, 3, 3, requires_grad=True), None, torch.zeros(8), torch.ones(8), None,
        None, training=True),
    "infinite": lambda: FF.batch_norm_act(image(4, 8, 6, 6) * torch.inf, torch.zeros(8), torch.full((8,), torch.nan), training=True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_operator_is_measured_without_a_warning(case, measured, caplog):
    """Both backends agree on every operator's copies: the check at measuring has no false alarm."""
    CASES[case]()
    assert len(measured) == 1
    entry = choice.store_of(torch.device("cpu")).get(measured[0])
    assert set(entry["ms"]) == {"cpu", "aten"} and "failed" not in entry
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_ties_go_to_the_fixed_order():
    assert choice.winner({"aten": [1.0, 1.0], "cpu": [1.0, 1.05]}) == "cpu"
    assert choice.winner({"aten": [1.0, 1.0], "cpu": [1.0, 1.1]}) == "aten"
    assert choice.winner({"aten": [2.0], "triton": [1.02], "cuda": [1.0]}) == "cuda"
    assert choice.winner({"aten": [2.0], "triton": [1.0], "cuda": [1.1]}) == "triton"
