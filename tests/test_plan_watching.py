"""What TrainStep's plan watches between steps, what it refuses with a reason, and what it holds in memory."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from plan_util import assert_near, batches, by_hand, net
from torch import nn

import fastconv
from fastconv import _ext

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


def test_changes_between_steps_count():
    stock, data = net(), batches(6)
    ours = fastconv.fuse(copy.deepcopy(stock), inplace=True)
    models = {"ours": ours, "stock": stock}
    optimizers = {k: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for k, m in models.items()}
    step = fastconv.TrainStep(ours, F.cross_entropy, optimizers["ours"])
    seen = []

    def one(pair):
        loss = step(*pair)
        torch.testing.assert_close(
            loss, by_hand(stock, F.cross_entropy, optimizers["stock"], [pair])[0], rtol=1e-3, atol=1e-4
        )

    one(data[0])
    for model in models.values():
        model[0].weight.requires_grad_(False)  # frozen
        model[1].momentum = 0.5
    one(data[1])
    for model in models.values():
        with torch.no_grad():
            model[8].weight.mul_(0.5)
        model[8].weight.data = model[8].weight.data.clone(memory_format=torch.preserve_format)  # another storage
    one(data[2])
    handles = [m[8].register_forward_hook(lambda module, args, out: seen.append(1)) for m in models.values()]
    one(data[3])
    assert "hooks" in step.plan_reason and len(seen) == 2
    for handle in handles:
        handle.remove()
    one(data[4])
    assert step.plan_reason == ""
    for model in models.values():
        model[2] = nn.SiLU()
    one(data[5])
    assert step.plan_reason == ""
    assert_near(ours, stock, 1e-3)


def tied() -> nn.Module:
    """Two convolutions with one weight."""
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 5, 14), nn.Flatten()
    )
    model[2].weight = model[0].weight
    return model


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gate = net(), 0.0

    def forward(self, x):
        return self.body(x) if x.sum() > self.gate else -self.body(x)


REFUSED = {
    "stock": (net, nn.CrossEntropyLoss(), {}, "not fused"),
    "loss": (lambda: fastconv.fuse(net(), inplace=True), nn.MultiMarginLoss(), {}, "MultiMarginLoss"),
    "none": (lambda: fastconv.fuse(net(), inplace=True), lambda o, y: F.cross_entropy(o, y), {}, "lambda"),
    "fp16": (lambda: fastconv.fuse(net(), inplace=True), F.cross_entropy, {"autocast_dtype": torch.float16}, "float16"),
    "evaluation": (lambda: fastconv.fuse(net(), inplace=True).eval(), F.cross_entropy, {}, "evaluation"),
    "deferred": (lambda: fastconv.fuse(net(), inplace=True, defer_bn=True), F.cross_entropy, {}, "defer_bn"),
    "shared": (lambda: fastconv.fuse(tied(), inplace=True), F.cross_entropy, {}, "several layers"),
    "data": (
        lambda: fastconv.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), DataDependent())),
        F.cross_entropy,
        {},
        "DataDependent",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plan_holds_runs_as_the_loop_with_a_reason(name):
    make, loss_fn, options, reason = REFUSED[name]
    model, data = make(), batches(2)
    twin = copy.deepcopy(model)
    step = fastconv.TrainStep(model, loss_fn, torch.optim.SGD(model.parameters(), 0.01), **options)
    for pair in data:
        step(*pair)
        assert reason in step.plan_reason, step.plan_reason
    if name != "fp16":
        by_hand(twin, loss_fn, torch.optim.SGD(twin.parameters(), 0.01), data)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
        )


def test_gradient_hooks_of_parameters_are_heard():
    """A hook changes the gradient before the optimizer sees it, whenever it comes and goes."""
    stock, data = net(), batches(4)
    ours = fastconv.fuse(copy.deepcopy(stock), inplace=True)
    step = fastconv.TrainStep(ours, F.cross_entropy, torch.optim.SGD(ours.parameters(), 0.1))
    sgd, handles = torch.optim.SGD(stock.parameters(), 0.1), []

    def double(p: nn.Parameter) -> None:
        p.grad.mul_(2)

    for i, pair in enumerate(data):
        if i == 1:
            handles = [model[0].weight.register_hook(lambda grad: 3 * grad) for model in (ours, stock)]
        if i == 2:
            handles += [model[8].weight.register_post_accumulate_grad_hook(double) for model in (ours, stock)]
        if i == 3:
            for handle in handles:
                handle.remove()
        step(*pair)
        assert ("gradient hooks" in step.plan_reason) == (i in (1, 2))
        by_hand(stock, F.cross_entropy, sgd, [pair])
        assert_near(ours, stock)


def test_a_plan_can_be_required_or_refused():
    model, pair = fastconv.fuse(net(), inplace=True), batches(1)[0]
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    without = fastconv.TrainStep(model, F.cross_entropy, sgd, plan=False)
    without(*pair)
    assert "no plan is wanted" in without.plan_reason and all(p.grad is not None for p in model.parameters())
    step = fastconv.TrainStep(model, nn.MultiMarginLoss(), sgd, plan=True)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="plan=True expected.*MultiMarginLoss"):
        step(*pair)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="plan expected"):
        fastconv.TrainStep(model, F.cross_entropy, sgd, plan="cpu")


def test_surroundings_are_respected():
    model = fastconv.fuse(net(), inplace=True)
    step = fastconv.TrainStep(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.01))
    (pair,) = batches(1)
    with fastconv.use_backend("aten"):
        step(*pair)
    assert "aten" in step.plan_reason
    with torch.autocast("cpu", torch.bfloat16):
        step(*pair)
    assert "autocast" in step.plan_reason
    with torch.autograd.set_detect_anomaly(True):
        step(*pair)
    assert "anomaly" in step.plan_reason
    step(*pair)
    assert step.plan_reason == ""


def test_errors_are_stocks_and_leave_the_step_usable():
    model = fastconv.fuse(net(), inplace=True)
    step = fastconv.TrainStep(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.01))
    ((x, y),) = batches(1)
    step(x, y)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(IndexError, match="out of bounds"):
        step(x, torch.full_like(y, 5))
    with pytest.raises(ValueError, match="batch"):
        step(x, y[:-1])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert step(x, y).isfinite() and step.plan_reason == ""


def test_buffers_share_memory():
    model = fastconv.fuse(torchvision.models.resnet18(num_classes=5), inplace=True)
    step = fastconv.TrainStep(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.01))
    step(torch.randn(2, 3, 64, 64), torch.randint(5, (2,)))
    (plan,) = step._plans.cache.values()
    convs = [node for node in plan.network.nodes if node.op == "conv"]
    read = {value for node in convs for value in node.inputs}
    # Raw outputs, those that a convolution's weight gradient reads, and those that tell a slope (after an addition).
    copies = [1 + (n.act != "identity" and (n.output in read or n.residual is not None)) for n in convs]
    assert copies.count(2) == len(convs) - 4, "not the stem's, which a pool reads, and not the shortcuts'"
    kept = sum(4 * math.prod(n.output.shape) * count for n, count in zip(convs, copies, strict=True))
    assert kept <= plan.arena_bytes < 1.5 * kept  # and a few gradients at a time


def test_the_optimizers_state_is_watched():
    """Another tensor in it, or none, makes the plan anew; an entry of somebody else's parameter does not."""
    ours, data = fastconv.fuse(net(), inplace=True), batches(1)
    other = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([*ours.parameters(), other], 0.05, momentum=0.9)
    step = fastconv.TrainStep(ours, F.cross_entropy, optimizer)

    def plan():
        step(*data[0])
        assert step.plan_reason == ""
        return next(reversed(step._plans.cache.values()))

    first = plan()
    optimizer.state[other] = {"momentum_buffer": torch.zeros(3)}
    assert plan() is first and plan() is first
    weight = ours[0].weight
    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    second = plan()
    assert second is not first and optimizer.state[weight]["momentum_buffer"].abs().sum() > 0
    optimizer.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
    third = plan()
    assert third is not second and optimizer.state[weight]["momentum_buffer"].abs().sum() > 0
    optimizer.state.clear()
    assert plan() is not third and len(optimizer.state) >= len(list(ours.parameters()))
    assert optimizer.state[weight]["momentum_buffer"].abs().sum() > 0


@pytest.mark.parametrize("optimizer", (torch.optim.SGD, torch.optim.AdamW))
def test_a_default_device_elsewhere_changes_nothing(optimizer):
    """What a plan keeps on the host stays there under torch.device("cuda") around the training loop."""
    losses = []
    for other in (False, True):
        model, data = fastconv.fuse(net(), inplace=True), batches(3)
        step = fastconv.TrainStep(model, F.cross_entropy, optimizer(model.parameters(), 0.05))
        with torch.device("meta" if other else "cpu"):
            losses.append([step(*pair) for pair in data])
        assert step.plan_reason == ""
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
