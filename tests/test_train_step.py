"""TrainStep against the loop that a user writes by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
import fastconv.nn as fnn


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        fnn.Conv2dBiasReLU(3, 8, 3, padding=1), fnn.BatchNormAct2d(8, activation="silu"), fnn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), fnn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def batches(count: int, size: int = 6):
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 10, 10), torch.randint(5, (size,))) for _ in range(count)]


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


def good(**change):
    model = change.pop("model", net())
    args = {"loss_fn": nn.CrossEntropyLoss(), "optimizer": torch.optim.SGD(net().parameters(), 0.1)} | change
    return fastconv.TrainStep(model, args.pop("loss_fn"), args.pop("optimizer"), **args)


def two_devices():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    (
        ({"model": torch.relu}, TypeError, "model expected torch.nn.Module, got builtin_function_or_method"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn expected a callable, got str"),
        ({"optimizer": 0.1}, TypeError, "optimizer expected torch.optim.Optimizer, got float"),
        (
            {"autocast_dtype": torch.float64},
            ValueError,
            "autocast_dtype expected None, bfloat16 or float16, got torch.float64",
        ),
        ({"autocast_dtype": "bf16"}, ValueError, "autocast_dtype expected None, bfloat16 or float16, got bf16"),
        ({"cuda_graph": "yes"}, ValueError, "cuda_graph expected \"auto\", True or False, got 'yes'"),
        ({"cuda_graph": True}, RuntimeError, "cuda_graph=True expected a model on a CUDA device, got cpu"),
        ({"model": two_devices()}, RuntimeError, "model expected all parameters on one device"),
        ({"model": nn.ReLU()}, RuntimeError, "model expected"),
    ),
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_argument_errors(change, error, text):
    with pytest.raises(error, match=f"TrainStep: {text}"):
        good(**change)


def test_call_errors():
    model = net()
    step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match="TrainStep: x expected Tensor, got list"):
        step(x.tolist(), y)
    with pytest.raises(TypeError, match="TrainStep: y expected Tensor, got int"):
        step(x, 3)
    with pytest.raises(RuntimeError, match="TrainStep: x expected on cpu like the model, got meta"):
        step(x.to("meta"), y)
    bad = fastconv.TrainStep(model, nn.CrossEntropyLoss(reduction="none"), torch.optim.SGD(model.parameters(), 0.1))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"TrainStep: loss_fn expected to return a scalar, got shape \[6\]"):
        bad(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("fused", (False, True))
def test_prepare_makes_the_batch(fused):
    """The same losses and weights, bit for bit, as when the batches are made before the step."""
    images, labels = torch.randint(256, (30, 3, 10, 10), dtype=torch.uint8), torch.randint(3, (30,))
    scale = torch.ones(1, requires_grad=True)

    def prepare(index, labels):
        x = images[index].float() / 255 * scale
        assert not x.requires_grad
        return x, labels[index]

    def model() -> nn.Module:
        if not fused:
            return net()
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        stock = nn.Sequential(*layers, nn.Linear(8, 3)).to(memory_format=torch.channels_last)
        return fastconv.fuse(stock, inplace=True)

    models = [model() for _ in range(2)]
    steps = [
        fastconv.TrainStep(m, nn.CrossEntropyLoss(), torch.optim.SGD(m.parameters(), 0.1), prepare=p)
        for m, p in zip(models, (prepare, None), strict=True)
    ]
    for i in range(3):
        index = torch.arange(6 * i, 6 * i + 6)
        with torch.no_grad():
            batch = prepare(index, labels)
        assert torch.equal(steps[0](index, labels), steps[1](*batch))
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))
    if fused and fastconv.backends()["cpu"]:
        assert steps[0].plan_reason == ""


def test_what_prepare_returns_is_checked():
    model, (x, y) = net(), batches(1)[0]
    sgd = torch.optim.SGD(model.parameters(), 0.1)

    def call(prepare):
        fastconv.TrainStep(model, nn.CrossEntropyLoss(), sgd, prepare=prepare)(x, y)

    with pytest.raises(TypeError, match="TrainStep: prepare expected a callable or None, got int"):
        call(3)
    with pytest.raises(TypeError, match="TrainStep: prepare expected to return a pair of tensors, got Tensor"):
        call(lambda x, y: x)
    with pytest.raises(TypeError, match="TrainStep: prepare expected to return a pair of tensors, got 3 of them"):
        call(lambda x, y: (x, y, y))
    with pytest.raises(TypeError, match="TrainStep: prepare's y expected Tensor, got list"):
        call(lambda x, y: (x, y.tolist()))
    with pytest.raises(RuntimeError, match="TrainStep: prepare's x expected on cpu like the model, got meta"):
        call(lambda x, y: (x.to("meta"), y))


def test_errors_of_the_model_come_through():
    model = net()
    step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="weight has 3 input channels per group, input has 4"):
        step(torch.randn(2, 4, 10, 10), torch.tensor([0, 1]))


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
