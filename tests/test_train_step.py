"""TrainStep against the loop that a user writes by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_step_util import batches, net

import fastconv
import fastconv.nn as fnn

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "sgd_plain": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}


def by_hand(model, loss_fn, optimizer, data, dtype=None, scaler=None):
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = loss_fn(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach())
    return losses


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
def test_equals_the_loop_bitwise(dtype, optimizer):
    ours, stock, data, loss_fn = net(), net(), batches(4), fnn.CrossEntropyLoss(label_smoothing=0.1)
    step = fastconv.TrainStep(ours, loss_fn, OPTIMIZERS[optimizer](ours.parameters()), autocast_dtype=dtype)
    losses = [step(x, y) for x, y in data]
    expected = by_hand(stock, loss_fn, OPTIMIZERS[optimizer](stock.parameters()), data, dtype)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert_same_state(ours, stock)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), "p.grad holds the step's gradients after the call"


def test_float16_scales_the_loss():
    ours, stock, data, loss_fn = net(), net(), batches(3), nn.CrossEntropyLoss()
    step = fastconv.TrainStep(ours, loss_fn, torch.optim.SGD(ours.parameters(), 0.1), autocast_dtype=torch.float16)
    losses = [step(x, y) for x, y in data]
    scaler = torch.amp.GradScaler("cpu")
    expected = by_hand(stock, loss_fn, torch.optim.SGD(stock.parameters(), 0.1), data, torch.float16, scaler)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True)), "the loss comes back unscaled"
    assert_same_state(ours, stock)
    assert isinstance(step.scaler, torch.amp.GradScaler) and step.scaler.get_scale() == scaler.get_scale()


def test_float16_overflow_skips_the_update():
    model = net()
    step = fastconv.TrainStep(model, lambda out, y: out.sum() * 1e30, torch.optim.SGD(model.parameters(), 0.1),
                              autocast_dtype=torch.float16)  # fmt: skip
    before, scale = [p.clone() for p in model.parameters()], step.scaler.get_scale()
    step(*batches(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert step.scaler.get_scale() < scale


def test_only_float16_has_a_scaler():
    for dtype in (None, torch.bfloat16):
        model = net()
        step = fastconv.TrainStep(
            model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), autocast_dtype=dtype
        )
        assert step.scaler is None


def test_scheduler_and_changed_hyper_parameters():
    ours, stock, data, loss_fn = net(), net(), batches(6), nn.CrossEntropyLoss()
    results = []
    for model in (ours, stock):
        sgd = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 2, 0.1)
        step = fastconv.TrainStep(model, loss_fn, sgd) if model is ours else None
        for pair in data:
            results.append(step(*pair) if step else by_hand(model, loss_fn, sgd, [pair])[0])
            schedule.step()
        assert sgd.param_groups[0]["lr"] < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(results[:6], results[6:], strict=True))
    assert_same_state(ours, stock)


def test_optimizer_state_dict_resumes_bitwise():
    data, loss_fn = batches(4), nn.CrossEntropyLoss()
    straight, first, second = net(), net(), net(seed=9)
    adam = torch.optim.Adam(straight.parameters(), 1e-2)
    expected = [fastconv.TrainStep(straight, loss_fn, adam)(x, y) for x, y in data][2:]
    adam = torch.optim.Adam(first.parameters(), 1e-2)
    for pair in data[:2]:
        fastconv.TrainStep(first, loss_fn, adam)(*pair)
    second.load_state_dict(first.state_dict())
    resumed = torch.optim.Adam(second.parameters(), 1e-2)
    resumed.load_state_dict(adam.state_dict())
    step = fastconv.TrainStep(second, loss_fn, resumed)
    assert all(torch.equal(a, step(x, y)) for a, (x, y) in zip(expected, data[2:], strict=True))


class NoHostSync(TorchDispatchMode):
    """Fails on every operator that copies a value to the host: .item(), bool(tensor), nonzero, tolist."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"), (
            f"{name} waits for the device"
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
def test_no_host_sync(dtype):
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        torch.ones(()).item()
    model = fastconv.fuse(net())
    for loss_fn in (fnn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss()):
        step = fastconv.TrainStep(
            model, loss_fn, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), autocast_dtype=dtype
        )
        x, y = batches(1)[0]
        with NoHostSync():
            for _ in range(3):
                loss = step(x, y)
        assert loss.isfinite()


def test_loss_is_a_detached_scalar_that_later_steps_do_not_change():
    model = net()
    step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.5))
    (x, y), (x2, y2) = batches(2)
    loss = step(x, y)
    kept = loss.clone()
    assert loss.dim() == 0 and not loss.requires_grad and loss.grad_fn is None
    step(x2, y2)
    assert torch.equal(loss, kept)


def test_frozen_and_unused_parameters():
    """A frozen backbone, and a parameter that the forward never touches: their .grad stays None."""
    model = net()
    model[0].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    frozen = model[0].weight.clone()
    step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1))
    step(*batches(1)[0])
    assert torch.equal(model[0].weight, frozen) and model[0].weight.grad is None
    assert model.unused.grad is None and torch.equal(model.unused, torch.ones(3))


def test_gradients_do_not_accumulate_over_steps():
    model = net()
    step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.0))
    model.eval()  # no running statistics move: equal batches give equal gradients
    x, y = batches(1)[0]
    step(x, y)
    first = [p.grad.clone() for p in model.parameters()]
    step(x, y)
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True))


def test_dropout_follows_the_seed():
    losses = []
    for by in ("step", "hand"):
        model = nn.Sequential(net(), nn.Dropout(0.5))
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), sgd)
        data = batches(3)
        torch.manual_seed(7)
        losses.append([step(*b) for b in data] if by == "step" else by_hand(model, nn.CrossEntropyLoss(), sgd, data))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_other_losses_and_shapes():
    """A regression target, a changing batch size, and a loss that is a plain function."""
    model = net()
    step = fastconv.TrainStep(
        model, lambda out, y: (out - y).square().mean(), torch.optim.Adam(model.parameters(), 1e-2)
    )
    for size in (6, 3, 8, 2):
        assert step(torch.randn(size, 3, 10, 10), torch.randn(size, 5)).isfinite()


def test_an_empty_gpu_cache_on_the_cpu():
    model = net()
    step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), cuda_graph=False)
    step(*batches(1)[0])
    assert step.captured == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_equals_the_loop(caplog):
    """Warm-up, capture and replay train on every batch once; the parameters follow the loop's."""
    caplog.set_level(logging.WARNING, "fastconv")
    ours, stock, loss_fn = net().cuda(), net().cuda(), fnn.CrossEntropyLoss()
    data = [(x.cuda(), y.cuda()) for x, y in batches(8)]
    step = fastconv.TrainStep(ours, loss_fn, torch.optim.SGD(ours.parameters(), 0.1, momentum=0.9))
    losses = [step(x, y) for x, y in data]
    assert step.captured == 1 and not caplog.records
    sgd = torch.optim.SGD(stock.parameters(), 0.1, momentum=0.9)
    for (x, y), loss in zip(data, losses, strict=True):
        sgd.zero_grad()
        expected = loss_fn(stock(x), y)
        expected.backward()
        sgd.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-4)
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_failed_capture_leaves_streams_and_random_numbers_usable(caplog):
    """A loss that reads the device cannot be captured: the steps go on without a graph, dropout included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).cuda()

    def loss_fn(out, y):
        loss = nn.functional.cross_entropy(out, y)
        assert loss.item() >= 0
        return loss

    step = fastconv.TrainStep(model, loss_fn, torch.optim.SGD(model.parameters(), 0.1))
    x, y = torch.randn(32, 8, device="cuda"), torch.randint(4, (32,), device="cuda")
    stream = torch.cuda.current_stream()
    before = model[0].weight.detach().clone()
    for _ in range(6):
        step(x, y)
        assert torch.cuda.current_stream() == stream
    assert step.captured == 0 and "without a CUDA graph" in caplog.text
    assert not torch.equal(model[0].weight, before)
    other = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1), cuda_graph=True)
    for _ in range(6):
        other(x, y)
    assert other.captured == 1
