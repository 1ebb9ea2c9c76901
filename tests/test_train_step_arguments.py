"""What TrainStep takes, makes of its batches with prepare, and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_step_util import batches, net

import fastconv


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
