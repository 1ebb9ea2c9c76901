"""optimize_for_inference against the model it was made from."""

from __future__ import annotations

import copy
import pickle
import re
import threading

import pytest
import torch
import torchvision
from torch import nn

import fastconv
import fastconv.functional as FF
from fastconv import _ext

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


def settled(model: nn.Module, size: int = 40) -> nn.Module:
    """Running statistics that fit the random weights: without them the activations of a deep net explode."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, size, size))
    return model.eval()


def block() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32, affine=False), nn.SiLU(),
        nn.Conv2d(32, 48, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(48, 5),
    )  # fmt: skip


def compare(model: nn.Module, optimized: nn.Module, x: torch.Tensor) -> None:
    """fastconv's error against fp64 is at most twice stock's in the same dtype, plus some rounding."""
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(x.double())
        low = optimized.dtype
        stock = copy.deepcopy(model).to(low)(x.to(low))
    out = optimized(x)
    assert out.dtype is x.dtype and out.shape == oracle.shape and not out.requires_grad
    error, theirs = (out.double() - oracle).abs().max(), (stock.double() - oracle).abs().max()
    assert error <= 2 * theirs + 8 * torch.finfo(low).eps * oracle.abs().max(), (error, theirs)


PLANNED = (
    "resnet18", "vgg11_bn", "squeezenet1_1", "densenet121", "googlenet", "mobilenet_v2", "mobilenet_v3_small",
    "shufflenet_v2_x0_5", "regnet_y_400mf", "mnasnet0_5", "efficientnet_b0",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PLANNED)
def test_torchvision_models_run_as_a_plan(name):
    model = settled(torchvision.models.get_model(name, num_classes=7))
    x = torch.randn(2, 3, 40, 40)
    optimized = fastconv.optimize_for_inference(model, x)
    assert optimized.plan_reason == ""
    compare(model, optimized, x)


@pytest.mark.parametrize("dtype", (None, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("fused", (False, True))
def test_dtypes_shapes_and_layouts(dtype, fused, planner):
    model = settled(block())
    given = fastconv.fuse(model) if fused else model
    optimized = fastconv.optimize_for_inference(given, torch.randn(2, 3, 8, 8), dtype=dtype, **planner.options)
    for size in ((2, 3, 8, 8), (1, 3, 8, 8), (5, 3, 12, 9), (2, 3, 8, 8)):
        x = torch.randn(size)
        for layout in (torch.contiguous_format, torch.channels_last):
            compare(model, optimized, x.contiguous(memory_format=layout))
            assert optimized.plan_reason == ""
        compare(model, optimized, torch.randn(*size[:3], 2 * size[3])[..., ::2])


def test_feature_maps_have_the_layout_of_the_input():
    model = settled(block()[:7])
    x = torch.randn(2, 3, 8, 8)
    optimized = fastconv.optimize_for_inference(model, x)
    assert optimized(x).is_contiguous()
    assert optimized(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    compare(model, optimized, x)


def test_a_snapshot_that_leaves_the_model_alone():
    model = settled(block())
    before = copy.deepcopy(model.state_dict())
    model.train()
    x = torch.randn(2, 3, 8, 8)
    optimized = fastconv.optimize_for_inference(model, x)
    assert model.training and all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert all(p.requires_grad for p in model.parameters())
    first = optimized(x)
    kept = first.clone()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    assert torch.equal(optimized(x), kept)
    assert not torch.equal(optimized(torch.randn(2, 3, 8, 8)), kept)
    assert torch.equal(first, kept), "a result is the caller's own"


def test_copies_pickles_and_loaded_weights():
    model, other = settled(block()), settled(block())
    x = torch.randn(2, 3, 8, 8)
    optimized = fastconv.optimize_for_inference(model, x)
    expected = optimized(x)
    for twin in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert torch.equal(twin(x), expected) and twin.plan_reason == ""
    optimized.load_state_dict({f"model.{k}": v for k, v in other.state_dict().items()})
    compare(other, optimized, x)
    assert optimized.to(torch.bfloat16).dtype is torch.bfloat16
    compare(other, optimized, x)


def test_threads_share_it():
    model = settled(block())
    inputs = [torch.randn(2, 3, 8, 8) for _ in range(8)]
    optimized = fastconv.optimize_for_inference(model, inputs[0])
    expected = [optimized(x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(optimized(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class TwoResults(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.bn(self.conv(x)).relu()
        return y, y.relu()


class InPlaceOnASharedValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 1), nn.Hardsigmoid(inplace=True)

    def forward(self, x):
        y = self.conv(x)
        z = self.act(y)
        return z + y


def hooked() -> nn.Module:
    model = block()
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    return model


REFUSED = {
    "two results": (TwoResults, "returns a tuple"),
    "in place": (InPlaceOnASharedValue, "in place"),
    "hooks": (hooked, "hooks"),
    "no step": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax2d()), "Softmax2d"),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")), "reflect"),
    "double": (lambda: block().double(), "float64"),
}


def test_a_plan_can_be_required_or_refused():
    model, x = settled(block()), torch.randn(2, 3, 8, 8)
    without = fastconv.optimize_for_inference(model, x, plan=False)
    assert "no plan is wanted" in without.plan_reason
    torch.testing.assert_close(without(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="plan=True expected.*hooks"):
        fastconv.optimize_for_inference(hooked().eval(), x, plan=True)
    with pytest.raises(ValueError, match="plan expected"):
        fastconv.optimize_for_inference(model, x, plan=1.5)
    again = pickle.loads(pickle.dumps(fastconv.optimize_for_inference(model, x, plan=True)))
    assert again.plan is True


@pytest.mark.parametrize("planner", ("simt", "cuda"), indirect=True)
@pytest.mark.parametrize("name", ("mobilenet_v3_small", "squeezenet1_1"))
def test_torchvision_models_run_as_a_gpus_plan(name, planner):
    model = settled(torchvision.models.get_model(name, num_classes=7), 32)
    x = torch.randn(1, 3, 32, 32)
    optimized = fastconv.optimize_for_inference(model, x, **planner.options)
    assert optimized.plan_reason == ""
    for _ in range(2):  # on a GPU the first call's plan is replayed
        compare(model, optimized, x)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plan_holds_runs_fused_with_a_reason(name):
    make, reason = REFUSED[name]
    model = make().eval()
    x = torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)
    optimized = fastconv.optimize_for_inference(model, x)
    assert optimized.plan_reason
    assert re.search(reason, optimized.plan_reason), optimized.plan_reason
    with torch.no_grad():
        assert re.search(reason, optimized.plan_reason), optimized.plan_reason
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)


def test_autocast_and_a_chosen_backend_are_respected():
    model = settled(block())
    x = torch.randn(2, 3, 8, 8)
    optimized = fastconv.optimize_for_inference(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert optimized(x).dtype is torch.bfloat16
    assert "autocast" in optimized.plan_reason
    with fastconv.use_backend("aten"):
        optimized(x)
    assert "aten" in optimized.plan_reason
    optimized(x)
    assert optimized.plan_reason == ""


def test_bad_input():
    model, x = block(), torch.randn(2, 3, 8, 8)
    with pytest.raises(TypeError, match="model expected torch.nn.Module, got int"):
        fastconv.optimize_for_inference(3, x)
    with pytest.raises(TypeError, match="example_input expected Tensor, got list"):
        fastconv.optimize_for_inference(model, [x])
    with pytest.raises(ValueError, match="dtype expected None, float32 or bfloat16"):
        fastconv.optimize_for_inference(model, x, dtype=torch.float16)
    optimized = fastconv.optimize_for_inference(model, x)
    with pytest.raises(TypeError, match="input expected Tensor"):
        optimized("x")
    with pytest.raises(RuntimeError, match="for inference"):
        optimized.train()
    with pytest.raises(RuntimeError, match="4 input channels|input has 4|channels"):
        optimized(torch.randn(2, 4, 8, 8))
    assert optimized(torch.randn(0, 3, 8, 8)).shape == (0, 5)


def test_no_python_between_the_layers(monkeypatch):
    """The point of a plan: a call runs no function of fastconv.functional."""
    model, x = settled(block()), torch.randn(2, 3, 8, 8)
    optimized = fastconv.optimize_for_inference(model, x)

    def never(*args, **kwargs):
        raise AssertionError("called")

    for name in ("conv2d_bn_act", "conv2d_bias_act", "max_pool2d", "adaptive_avg_pool2d"):
        monkeypatch.setattr(FF, name, never)
    compare(model, optimized, x)
