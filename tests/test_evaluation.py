"""A fused model's evaluation without gradients: from the second call of a shape on as a program, with the same bits."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torchvision
from programs_util import MODELS, eager, in_threads, net, programs, reason
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
import fastconv.functional as FF
from fastconv import _ext
from fastconv._plan import programs as held

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ("float32", "bfloat16", "autocast"))
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_same_bits_as_the_eager_path(name, kind, runs):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = fastconv.fuse(torchvision.models.get_model(name, num_classes=7).eval().to(dtype), inplace=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 40, 40, dtype=dtype).contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            outs = [model(x) for _ in range(3)]
            expected = eager(model, x)
        assert all(torch.equal(out, expected) for out in outs) and outs[-1].stride() == expected.stride()
    assert len(programs(model)) == 1 and len(runs) == 5, reason(model)


@torch.no_grad()
def test_a_shape_gets_its_program_at_its_second_call_and_few_are_kept(runs):
    model = net()
    for size in range(1, 8):
        model(torch.randn(size, 3, 8, 8))
    assert not runs and not programs(model)
    for size in (5, 6, 7, 5):
        x = torch.randn(size, 3, 8, 8)
        assert torch.equal(model(x), eager(model, x))
    assert len(runs) == 4 and len(programs(model)) == 3
    kept = held.Programs.of(model).found
    assert len(kept) <= held._KEPT


def test_with_gradients_it_is_the_eager_path(runs):
    model, x = net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(x), model(x)
    assert len(runs) == 1
    model(x).sum().backward()
    assert model[0].weight.grad is not None and len(runs) == 1
    with torch.inference_mode():
        out = model(x)
        assert out.is_inference() and len(runs) == 2
    model.train()
    with torch.no_grad():
        model(x), model(x), model(x)
    assert len(runs) == 2 and model[1].num_batches_tracked == 6


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_who_watches_sees_the_operators(runs):
    model, x = net(), torch.randn(2, 3, 8, 8)
    out = model(x), model(x)
    assert len(runs) == 1
    with Seen() as seen:
        assert torch.equal(model(x), out[0])
    assert "fastconv::conv2d_bn_act" in seen.names
    with torch.profiler.profile() as profile:
        model(x)
    assert any("FusedSequential" in e.key or "Sequential" in e.key for e in profile.key_averages())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is torch.bfloat16
    with fastconv.use_backend("aten"):
        model(x)
    with torch.device("cpu"):
        model(x)
    torch.func.vmap(lambda a: model(a[None])[0])(x)
    assert torch.jit.trace(model, x, check_trace=False)(x).shape == (2, 5)
    model(x.double()[:0].float())  # empty
    assert len(runs) == 1
    assert "conv+bn+relu" in str(fastconv.fusion_report(model, x))


@torch.no_grad()
def test_results_are_the_callers_and_activations_are_freed():
    model, x = net(), torch.randn(2, 3, 8, 8)
    first = [model(x) for _ in range(3)][-1]
    kept = first.clone()
    model(torch.randn_like(x))
    assert torch.equal(first, kept)
    (plan,) = programs(model)
    for slot in range(plan.slots):
        with pytest.raises(RuntimeError):  # nothing is held between the calls
            plan.program.get(slot)


@torch.no_grad()
def test_copies_pickles_and_the_models_end():
    model, x = net(), torch.randn(2, 3, 8, 8)
    out = [model(x) for _ in range(2)][-1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fastconv.fuse(model)):
        assert torch.equal(twin(x), out) and torch.equal(twin(x), out)
    stock = fastconv.unfuse(model)
    torch.testing.assert_close(stock(x), out)
    end = weakref.ref(programs(model)[0])
    del model, twin
    gc.collect()
    assert end() is None


@torch.no_grad()
def test_threads_share_it():
    model, xs = net(), [torch.randn(2, 3, 8, 8) for _ in range(4)]
    expected = [eager(model, x) for x in xs]
    model(xs[0])
    wrong = []

    def work(x, want):
        for _ in range(50):
            with torch.no_grad():
                if not torch.equal(model(x), want):
                    wrong.append(1)

    in_threads(work, *zip(xs, expected, strict=True))
    assert not wrong and programs(model)


@torch.no_grad()
def test_errors_come_through_and_leave_it_usable():
    model, x = net(), torch.randn(2, 3, 8, 8)
    out = [model(x) for _ in range(2)][-1]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="channels"):
            model(torch.randn(2, 4, 8, 8))
    assert torch.equal(model(x), out)


@torch.no_grad()
def test_a_part_of_a_model_has_programs_of_its_own(runs):
    model = fastconv.fuse(torchvision.models.resnet18(num_classes=5).eval(), inplace=True)
    x = torch.randn(1, 3, 32, 32)
    model(x), model(x)
    assert len(runs) == 1 and not programs(model.layer1)
    maps = torch.randn(1, 64, 8, 8)
    for _ in range(3):
        model.layer1(maps)
    assert len(runs) == 1 and "feature map" in reason(model.layer1)


@torch.no_grad()
def test_no_python_between_the_layers(monkeypatch):
    model, x = net(), torch.randn(2, 3, 8, 8)
    model(x), model(x)

    def never(*args, **kwargs):
        raise AssertionError("called")

    for name in ("conv2d_bn_act", "conv2d_bias_act", "max_pool2d", "adaptive_avg_pool2d"):
        monkeypatch.setattr(FF, name, never)
    model(x)


@torch.no_grad()
def test_autocast_is_another_call(runs):
    """Of the same shape: with it, without it, and with a type that the programs leave to the eager path."""
    model, x = net(), torch.randn(2, 3, 8, 8)
    for _ in range(2):
        for dtype in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                assert model(x).dtype is (dtype or torch.float32)
    assert len(runs) == 2 and len(programs(model)) == 2
    norms = fastconv.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()), inplace=True).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(norms(x).dtype is torch.float32 for _ in range(3))
    assert len(runs) == 2 and "before the first convolution" in reason(norms)


def test_windows_that_the_kernels_do_not_take(runs, trained):
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(17), nn.Flatten(), nn.Linear(4, 2)
    model = fastconv.fuse(nn.Sequential(*layers), inplace=True)
    for _ in range(3):
        model(torch.randn(2, 3, 20, 20)).sum().backward()
    with torch.no_grad():
        model.eval()
        for _ in range(3):
            model(torch.randn(2, 3, 20, 20))
    assert not runs and not trained and "windows" in reason(model)
