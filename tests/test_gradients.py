"""A fused model in training: from the second call of a shape on a program behind one Function, with the same bits."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest
import torch
import torchvision
from programs_util import MODELS, assert_same_step, batch, eager, net, programs, reason, same, step, training_net
from torch import nn

import fastconv
import fastconv.functional as FF
from fastconv import _ext
from fastconv._plan import gradients

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("low", (False, True), ids=("fp32", "autocast"))
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_the_eager_path(name, low, trained):
    """Result, every gradient and its layout, running statistics; dropout and stochastic depth draw the same numbers."""
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = fastconv.fuse(torchvision.models.get_model(name, num_classes=7, **options), inplace=True)
    state = copy.deepcopy(model.state_dict())
    x, y = torch.randn(3, 3, 48, 48), torch.tensor([1, 0, 6])
    expected = step(model, x, y, eager, low)
    for layout in (torch.contiguous_format, torch.contiguous_format, torch.channels_last):
        model.load_state_dict(state)
        assert_same_step(step(model, x.contiguous(memory_format=layout), y, low=low), expected)
    assert len(trained) == 2, reason(model)


def test_training_goes_on_as_without_it(trained):
    """Steps of SGD with a last batch of another size, and evaluation between the epochs."""
    losses = []
    for call in (eager, None):
        model, out = training_net(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
        torch.manual_seed(2)
        batches = [batch(4), batch(4), batch(4), batch(3)]
        for _ in range(3):
            for x, y in batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(call(model, x) if call else model(x), y)
                loss.backward()
                optimizer.step()
                out.append(loss.item())
            model.eval()
            with torch.no_grad():
                out.append(model(x).sum().item())
            model.train()
        losses.append(out)
    assert losses[0] == losses[1] and losses[0][-2] < losses[0][0]
    assert len(trained) == 12 - 2 and len(programs(model)) == 3


def test_a_second_forward_before_the_backward(trained):
    """Each forward keeps its own tensors: gradients accumulate as they do eagerly."""
    grads = []
    for call in (eager, None):
        model = training_net()
        torch.manual_seed(3)
        pairs = [batch(), batch(), batch()]
        run = (lambda x, m=model: eager(m, x)) if call else model
        run(pairs[0][0])
        torch.manual_seed(4)
        outs = [run(x) for x, _ in pairs]
        for out, (_, y) in reversed(list(zip(outs, pairs, strict=True))):
            nn.functional.cross_entropy(out, y).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(same(a, b) for a, b in zip(*grads, strict=True)) and len(trained) == 3


def test_the_graph_is_kept_or_not(trained):
    model, (x, _) = training_net(), batch()
    model(x)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()
    assert all(same(p.grad, g) for p, g in zip(model.parameters(), first, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    (one,) = torch.autograd.grad(model(x).square().sum(), model[4].weight)
    assert one.shape == model[4].weight.shape and len(trained) == 2


def test_a_weight_that_was_changed_in_between_is_an_error(trained):
    model, (x, _) = training_net(), batch()
    model(x)
    for changed, raises in ((model[4].weight, True), (model[0].weight, True), (model[4].bias, False)):
        loss = model(x).sum()
        with torch.no_grad():
            changed.mul_(1.5)
        if raises:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
    x = x.to(memory_format=torch.channels_last)  # then it is kept as it is
    loss = model(x).sum()
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(trained) == 4


def test_frozen_parameters_and_thawed_ones(trained):
    model, (x, y) = training_net(), batch()
    for frozen in ((), (0,), (0, 4), (0, 4, 12), (4,), ()):
        for i in (0, 4, 12):
            model[i].requires_grad_(i not in frozen)
        want = step(model, x, y, eager)
        for _ in range(3):
            model.zero_grad()
            got = step(model, x, y)
            assert all(same(a, b) for a, b in zip(got[1], want[1], strict=True)), frozen
        assert [g is not None for g in got[1]] == [p.requires_grad for p in model.parameters()]
    assert len(trained) > 6
    model.requires_grad_(False)
    before = len(trained)
    assert not any(model(x).requires_grad for _ in range(3)) and len(trained) == before


def test_hooks_on_parameters_and_results_are_called(trained):
    """Registered when the program was there already."""
    model, (x, y) = training_net(), batch()
    want = step(model, x, y, eager)[1]
    model(x), model(x)
    seen = []
    model[0].weight.register_hook(lambda g: seen.append("hook") or g * 2)
    model[12].bias.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))

    def watched(model, x):
        out = model(x)
        out.register_hook(lambda g: seen.append("result"))
        return out

    got = step(model, x, y, watched)[1]
    assert sorted(seen) == ["accumulated", "hook", "result"] and len(trained) == 2
    assert torch.equal(got[0], want[0] * 2) and torch.equal(got[-1], want[-1])


def test_who_watches_sees_the_groups(trained):
    model, x = training_net(), batch()[0]
    model(x), model(x)
    assert len(trained) == 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum().backward()
    assert len(kept) > 10
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    with torch.profiler.profile() as profile:
        model(x).sum().backward()
    assert any(e.key == "Conv2dBnActFunctionBackward" for e in profile.key_averages())
    with torch.autograd.detect_anomaly(check_nan=False):
        model(x).sum().backward()
    with fastconv.use_backend("aten"):
        model(x).sum().backward()
    with torch.autocast("cpu", torch.float16):
        model(x).sum().backward()
    model(x.clone().requires_grad_()).sum().backward()
    torch.func.functional_call(model, {"0.weight": model[0].weight * 2}, x).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        model(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        model(x)
    assert len(trained) == 1
    assert "conv+bn+relu" in str(fastconv.fusion_report(model, x))
    handle = model[0].register_forward_hook(lambda m, a, out: kept.append(m))
    for _ in range(3):
        model(x)
    assert kept[-3:] == [model[0]] * 3 and len(trained) == 1
    handle.remove()


def test_differentiable_once(trained):
    model, (x, _) = training_net(), batch()
    model(x)
    (grad,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
    assert len(trained) == 1
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*functorch")
def test_transforms_and_functional_calls(trained):
    model, (x, y) = training_net(), batch()
    model(x)
    twin = {name: (p * 1.5).detach().requires_grad_() for name, p in model.named_parameters()}
    for _ in range(4):
        model.zero_grad()
        out = torch.func.functional_call(model, twin, x)
        nn.functional.cross_entropy(out, y).backward()
        assert all(p.grad is None for p in model.parameters())
        assert twin["0.weight"].grad.abs().sum() > 0
    want = step(model, x, y, eager)
    model.load_state_dict(model.state_dict())
    assert all(same(a, b) for a, b in zip(step(model, x, y)[1], want[1], strict=True))


def test_what_changes_counts_at_once(trained):
    """In place, by another storage, by another parameter, module, setting or mode."""
    model, (x, y) = training_net(), batch()
    changes = [
        lambda: None,
        lambda: model[0].weight.data.mul_(1.5),
        lambda: setattr(model[0].weight, "data", model[0].weight.data * 0.5),
        lambda: setattr(model[1], "bias", nn.Parameter(torch.ones(32))),
        lambda: model.load_state_dict(net(3).state_dict()),
        lambda: setattr(model[1], "momentum", None),
        lambda: setattr(model[1], "running_mean", torch.ones(32)),
        lambda: model.__setitem__(2, nn.LeakyReLU()),
        lambda: setattr(model[11], "p", 0.1),
        lambda: model[12].bias.data.zero_(),
    ]
    for i, change in enumerate(changes):
        change()
        state = copy.deepcopy(model.state_dict())
        want = step(model, x, y, eager)
        for _ in range(3):
            model.load_state_dict(state)
            assert_same_step(step(model, x, y), want), i
    assert len(trained) > 12, reason(model)
    model[1].eval()  # a frozen batch norm among trained ones
    before = len(trained)
    for _ in range(3):
        want = step(model, x, y, eager)
        assert all(same(a, b) for a, b in zip(step(model, x, y)[1], want[1], strict=True))
    assert len(trained) == before and "mode" in reason(model)


def test_what_it_refuses(trained, monkeypatch):
    one = fastconv.fuse(nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()), inplace=True)
    for _ in range(4):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            one(torch.randn(1, 3, 8, 8))
    assert one(torch.randn(2, 3, 8, 8)).shape == (2, 8) and "one value" in reason(one)
    maps = fastconv.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), inplace=True)
    for _ in range(3):
        maps(torch.randn(2, 3, 8, 8)).sum().backward()
    assert "feature map" in reason(maps)
    hooked = training_net()
    hooked[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    large = training_net()
    for model in (hooked, large):
        if model is large:
            monkeypatch.setattr(gradients, "_MOST_KEPT", 1000)
        for _ in range(3):
            model(batch()[0]).sum().backward()
    assert "gradient hooks" in reason(hooked) and "large" in reason(large) and not trained


def test_errors_come_through_and_leave_it_usable(trained):
    model, (x, y) = training_net(), batch()
    model(x)
    want = step(model, x, y, eager)[1]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(4, 4, 8, 8))
        with pytest.raises(RuntimeError, match="shape|size"):
            model(x).backward(torch.randn(4, 6))
    assert all(same(a, b) for a, b in zip(step(model, x, y)[1], want, strict=True))


def test_nothing_is_held_between_the_calls(trained):
    model, (x, y) = training_net(), batch()
    for _ in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
    (plan,) = programs(model)
    for slot in range(plan.slots):
        with pytest.raises(RuntimeError):
            plan.program.get(slot)
    grads = [p.grad for p in model.parameters()]
    assert all(g.untyped_storage().nbytes() == g.numel() * 4 for g in grads)
    assert len({g.data_ptr() for g in grads}) == len(grads)
    kept, before = [g.clone() for g in grads], [g.data_ptr() for g in grads]
    end = weakref.ref(plan)
    torch.manual_seed(9)
    model(x).sum().backward()  # adds to the gradients that are there
    assert before == [p.grad.data_ptr() for p in model.parameters()]
    assert not any(torch.equal(a, p.grad) for a, p in zip(kept, model.parameters(), strict=True) if a.abs().sum() > 0)
    trained.clear()
    del model, plan
    gc.collect()
    assert end() is None


def test_no_python_between_the_layers(monkeypatch):
    model, (x, y) = training_net(), batch()
    model(x), model(x)

    def never(*args, **kwargs):
        raise AssertionError("called")

    for name in ("conv2d_bn_act", "conv2d_bias_act", "max_pool2d", "adaptive_avg_pool2d"):
        monkeypatch.setattr(FF, name, never)
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_report_says_what_runs_as_a_program(trained):
    model, (x, y) = training_net(), batch()
    assert fastconv.fusion_report(model).programs == []
    step(model, x, y)
    call = "training on 4x3x8x8 float32"
    assert fastconv.fusion_report(model).programs == [(call, "called once since the model changed")]
    step(model, x, y)
    step(model, x, y, low=True)
    handle = model[1].register_forward_hook(lambda *a: None)
    step(model, x, y, low=True)
    model.eval()
    with torch.no_grad():
        model(x)
    report = fastconv.fusion_report(model)
    assert report.programs == [
        (call, ""),
        (call + " under bfloat16 autocast", "a BatchNorm2d has hooks"),
        ("evaluation on 4x3x8x8 float32", "called once since the model changed"),
    ]
    assert f"{call}: one program" in str(report) and json.loads(report.to_json())["programs"][0]["reason"] == ""
    handle.remove()
