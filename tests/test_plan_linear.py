"""Large linear layers in plans, lowered as 1x1 convolutions; and buffers that outlive the views into them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plan_util import FUSED, OPTIMIZERS, assert_near, batches, by_hand, planned
from torch import nn

import fastconv
from fastconv import _ext
from fastconv._plan.program import Builder

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


def net(bias: bool = True) -> nn.Module:
    """Two layers above the size, with and without a bias, and one below."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 256, bias), nn.ReLU(),
        nn.Linear(256, 264, bias=False), nn.Tanh(), nn.Linear(264, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def labels(step: fastconv.TrainStep) -> str:
    return "\n".join(next(iter(step._plans.cache.values())).labels)


@pytest.mark.parametrize("size", (1, 6, 40))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step(name, size):
    stock, data = net(), batches(4, size)
    ours = fastconv.fuse(copy.deepcopy(stock), inplace=True)
    optimizers = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](stock.parameters())
    step = fastconv.TrainStep(ours, F.cross_entropy, optimizers[0])
    versions = [p._version for p in ours.parameters()]
    losses = [step(x, y) for x, y in data]
    assert step.plan_reason == "" and "256x512x1x1" in labels(step) and "264x256x1x1" in labels(step)
    assert "5x264x1x1" not in labels(step)
    torch.testing.assert_close(losses, by_hand(stock, F.cross_entropy, optimizers[1], data), rtol=1e-4, atol=1e-5)
    assert_near(ours, stock, 5e-4)
    assert all(p._version > before for p, before in zip(ours.parameters(), versions, strict=True))
    assert [p.shape for p in ours.parameters()] == [p.shape for p in stock.parameters()]
    assert all((p.grad is None) == (name in FUSED) for p in ours.parameters())


def test_gradients_are_kept_where_they_are_asked_for():
    stock, data = net(), batches(1)
    ours = fastconv.fuse(copy.deepcopy(stock), inplace=True)
    planned(ours, F.cross_entropy, torch.optim.SGD(ours.parameters(), 0.0), data, keep_grads=True)
    by_hand(stock, F.cross_entropy, torch.optim.SGD(stock.parameters(), 0.0), data)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_bf16_is_no_further_from_fp32_than_stock():
    """One step's change of the weights, against the step in fp32."""
    data, sgd = batches(1, 32), lambda p: torch.optim.SGD(p, 0.1)
    start, exact = net(), net()
    by_hand(exact, F.cross_entropy, sgd(exact.parameters()), data)
    stock, ours = net(), fastconv.fuse(net(), inplace=True)
    by_hand(stock, F.cross_entropy, sgd(stock.parameters()), data, torch.bfloat16)
    planned(ours, F.cross_entropy, sgd(ours.parameters()), data, autocast_dtype=torch.bfloat16)
    for s, e, t, o in zip(*(m.parameters() for m in (start, exact, stock, ours)), strict=True):
        size = (e - s).norm()
        assert (o - e).norm() <= 2 * (t - e).norm() + 1e-3 * size, (o.shape, (o - e).norm(), (t - e).norm(), size)


@pytest.mark.parametrize("frozen", ("4.weight", "4.bias", "6.weight", "0.weight"))
def test_frozen_parameters_stay(frozen):
    stock, data = net(), batches(2)
    stock.get_parameter(frozen).requires_grad_(False)
    ours = fastconv.fuse(copy.deepcopy(stock), inplace=True)
    sgd = OPTIMIZERS["momentum"]
    losses = planned(ours, F.cross_entropy, sgd(ours.parameters()), data)
    torch.testing.assert_close(
        losses, by_hand(stock, F.cross_entropy, sgd(stock.parameters()), data), rtol=1e-4, atol=1e-5
    )
    assert_near(ours, stock, 5e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("bias", ""))
@pytest.mark.parametrize("size", (1, 7))
def test_inference(size, bias, dtype):
    model = net(bias).eval()
    x = batches(1, size)[0][0]
    optimized = fastconv.optimize_for_inference(model, x, dtype=dtype)
    out = optimized(x)
    assert optimized.plan_reason == ""
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(x.double())
        stock = copy.deepcopy(model).to(dtype)(x.to(dtype))
    error, theirs = (out.double() - oracle).abs().max(), (stock.double() - oracle).abs().max()
    assert error <= 2 * theirs + 8 * torch.finfo(dtype).eps * oracle.abs().max(), (error, theirs)
    if size == 7:
        (plan,) = optimized._plans.values()  # the last layer has 5 outputs, and is multiplied as 32
        assert "32x264x1x1" in "\n".join(plan.labels) and not any(c.startswith("aten::linear") for c in plan.labels)
    kept = out.clone()
    optimized(torch.randn_like(x))
    assert torch.equal(out, kept), "a result is the caller's"


class Bottle(nn.Module):
    """A feature map of one pixel, read as rows by a linear layer and as a map by the next convolution."""

    def __init__(self):
        super().__init__()
        self.z = nn.Conv2d(3, 3, 1)
        self.a, self.b, self.c = nn.Conv2d(3, 32, 4), nn.Linear(32, 32), nn.Conv2d(32, 32, 1)
        self.d, self.e = nn.Conv2d(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x):
        x = self.b(torch.flatten(self.a(torch.relu(self.z(x))), 1))
        x = self.d(self.c(x.view(x.shape[0], 32, 1, 1)))
        return self.e(torch.flatten(x, 1))


def test_a_view_keeps_its_buffer():
    """b's weight gradient reads a's output through a view, after c and d have taken buffers of their own."""
    torch.manual_seed(0)
    stock = Bottle().to(memory_format=torch.channels_last)
    ours = fastconv.fuse(copy.deepcopy(stock), inplace=True)
    data = [(torch.randn(8, 3, 4, 4), torch.randint(5, (8,))) for _ in range(3)]
    sgd = OPTIMIZERS["momentum"]
    losses = planned(ours, F.cross_entropy, sgd(ours.parameters()), data)
    torch.testing.assert_close(
        losses, by_hand(stock, F.cross_entropy, sgd(stock.parameters()), data), rtol=1e-4, atol=1e-5
    )
    assert_near(ours, stock)


def test_views_of_views_extend_a_buffers_life():
    build = Builder()
    buffer = build.buffer((2, 4, 1, 1), torch.float32)
    build.call("aten::relu", [buffer], [None])
    rows = build.returning("aten::t", [build.returning("aten::reshape", [buffer, [2, 4]])])
    copied = build.returning("aten::relu", [rows])
    for _ in range(3):
        build.call("aten::relu", [copied], [None])
    assert (buffer.first, buffer.last) == (0, 3)
    build.returning("aten::cat", [[copied, rows], 0])
    assert buffer.last == len(build.calls) - 1, "also in a list"
