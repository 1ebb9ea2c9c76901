"""Fused models through PyTorch's own machinery: compile, export, checkpointing, profiler, autocast.

Equal to the stock model under the same machinery, or a clear error. tests/test_dynamo_backend.py has the backend of
torch.compile, tests/test_through_func.py torch.func, tests/test_distributed.py what takes several processes.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from fuse_models import Net
from fuse_util import CPU, assert_close, image, one_thread  # noqa: F401
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastconv
import fastconv.functional as FF

X = (4, 3, 9, 8)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_step(fused: nn.Module, stock: nn.Module, x: Tensor, call=lambda m: m, rtol: float = 1e-9) -> None:
    """One forward and backward: outputs, gradients, buffers. ``call(module)`` is what is called for it."""
    results = []
    for m in (fused, stock):
        m.zero_grad()
        y = x.clone().requires_grad_()
        out = call(m)(y)
        out.square().sum().backward()
        results.append([out, y.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol)


# torch.compile of a fused model.


def test_compile_recompiles_once_for_other_batch_sizes(pair):
    fused, stock = pair
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(fused, backend=counter, fullgraph=True)
    for n in (5, 4, 6, 3, 7):
        assert_step(fused, stock, image(n, *X[1:]), lambda m: step if m is fused else m)
    assert counter.frame_count == 2, "one graph for the first size, one for all others"


def test_compile_of_functions_recompiles_once():
    def call(x, w, g, b):
        y = FF.conv2d_bn_act(x, w, None, None, None, g, b, training=True, padding=1, activation="silu")
        return FF.cross_entropy(FF.adaptive_avg_pool2d(FF.max_pool2d(y, 2), 1).flatten(1), x[:, 0, 0, 0].abs().long())

    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(call, backend=counter, fullgraph=True)
    w, g, b = (torch.randn(*shape).double().requires_grad_() for shape in ((9, 3, 3, 3), (9,), (9,)))
    for n in (5, 4, 6, 7):
        x = image(n, 3, 8, 8)
        got, wanted = (torch.autograd.grad(f(x, w, g, b), (w, g, b)) for f in (step, call))
        assert_close(got, wanted, 1e-9)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    torch.manual_seed(3)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(168, 3)).double()
    fused = fastconv.fuse(copy.deepcopy(stock))
    step = torch.compile(fused, fullgraph=True)
    assert_step(fused, stock, image(*X), lambda m: step if m is fused else m)


def test_second_derivatives_in_compiled_code_are_refused(pair):
    fused, _ = pair
    step, x = torch.compile(fused, backend="aot_eager"), image(*X).requires_grad_()
    (first,) = torch.autograd.grad(step(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.square().sum().backward()


IMPORTS_IN_FORWARD = """
import sys, torch, fastconv, fastconv.functional as FF
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.act(self.conv(x)), x, use_reentrant=False)

assert "torch._dynamo" not in sys.modules
fastconv.fuse(Model())
assert "torch._dynamo" in sys.modules, "the case is none: the trace imports it no longer"
x, w = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 3, 3)
torch.compile(lambda: FF.conv2d_bias_act(x, w), fullgraph=True, backend="eager")()
"""


def test_fuse_does_not_spoil_modules_that_a_forward_imports():
    """torch._dynamo, first imported while a forward is traced, must not keep the tracer's isinstance."""
    done = subprocess.run([sys.executable, "-c", IMPORTS_IN_FORWARD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# torch.export.


@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
@pytest.mark.parametrize("strict", (True, False), ids=("strict", "non-strict"))
def test_export_save_load(pair, strict, training, tmp_path):
    """The program holds fastconv's operators, and its batch is dynamic."""
    fused, stock = (m.train(training) for m in pair)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fused, (image(*X),), strict=strict, dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for n in (4, 7):
        assert_close(loaded(image(n, *X[1:])), stock(image(n, *X[1:])), 1e-9)
    for name, value in stock.named_buffers():
        if training:
            assert_close(loaded.get_buffer(name), value, 1e-9)
    names = [str(node.target) for node in program.graph.nodes]
    if fastconv.backends()["cpu"]:
        assert any("fastconv.conv2d_bn_act" in name for name in names)
        assert not any("batch_norm.default" in name for name in names)
    assert not any("set_grad_enabled" in name for name in names)


@CPU
@pytest.mark.parametrize("strict", (True, False), ids=("strict", "non-strict"))
def test_an_exported_program_refuses_a_backward(pair, strict):
    fused, _ = pair
    program = torch.export.export(fused, (image(*X),), strict=strict).module()
    with pytest.raises(RuntimeError, match="derivative for fastconv::.* is not implemented"):
        program(image(*X)).sum().backward()


# Activation checkpointing.


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint_sequential(self.blocks, 2, self.stem(x), use_reentrant=self.reentrant)
        for block in self.tail:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@pytest.mark.parametrize("inside", (True, False), ids=("in its forward", "around it"))
@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "non-reentrant"))
def test_checkpointing(reentrant, inside):
    """Running statistics move once in the forward and once in the recomputation, as the stock model's do."""
    torch.manual_seed(3)
    stock = (Checkpointed if inside else Net)().double()
    stock.reentrant = reentrant
    fused = fastconv.fuse(copy.deepcopy(stock))
    assert fastconv.fusion_report(fused).fused >= 8
    for _ in range(2):
        call = (lambda m: m) if inside else (lambda m: lambda x: checkpoint(m, x, use_reentrant=reentrant))
        assert_step(fused, stock, image(*X), call)
    assert stock.tail[0].bn1.num_batches_tracked == 4


# Profiler.


def names_of(profile) -> set[str]:
    return {event.name for event in profile.events()}


@CPU
def test_profiler_names(pair):
    fused, _ = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Kineto about devices that are not there
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            fused(image(*X)).sum().backward()
    names = names_of(profile)
    assert {"Net", "Sequential", "Block", "conv+bn+relu: conv1 bn1 relu", "conv+bn+add+relu: conv2 bn2 relu"} <= names
    assert {"Conv2dBnActFunction", "Conv2dBnActFunctionBackward", "AdaptiveAvgPool2dFunctionBackward"} <= names
    for op in ("conv2d_bn_act", "batch_norm_act_backward", "conv2d_backward", "adaptive_avg_pool2d"):
        assert f"fastconv::{op}" in names


def test_profiler_ranges_of_dynamos_graphs_and_of_autograds_profiler():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    step = torch.compile(model, backend="fastconv")
    step(torch.randn(2, 3, 6, 6))
    with torch.autograd.profiler.profile() as profile:
        step(torch.randn(2, 3, 6, 6))
    names = {event.name for event in profile.function_events}
    assert any(name.startswith("conv+relu: ") for name in names), names


def test_no_ranges_without_a_profiler(pair, monkeypatch):
    fused, _ = pair

    def never(name):
        raise AssertionError("a range was opened")

    monkeypatch.setattr(torch.autograd.profiler, "record_function", never)
    fused(image(*X))


# Autocast.


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_training(dtype):
    """Three steps under autocast, with a GradScaler for fp16: as near to fp32 as the stock model under autocast is."""
    torch.manual_seed(3)
    stock = Net()
    models = {"fused": fastconv.fuse(copy.deepcopy(stock)), "exact": copy.deepcopy(stock).double(), "stock": stock}
    results = {}
    for name, m in models.items():
        scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16 and name != "exact", init_scale=2.0**10)
        sgd = torch.optim.SGD(m.parameters(), 0.05)
        for seed in range(3):
            x = image(16, 3, 9, 8) + seed / 8
            sgd.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=name != "exact"):
                out = m(x if name == "exact" else x.float())
                loss = F.cross_entropy(out, torch.arange(16) % 3)
            assert name == "exact" or (out.dtype is dtype and loss.dtype is torch.float32)
            scaler.scale(loss).backward()
            scaler.step(sgd)
            scaler.update()
            assert all(p.grad.dtype is p.dtype and p.grad.isfinite().all() for p in m.parameters())
        assert not scaler.is_enabled() or scaler.get_scale() == 2.0**10, "no step was skipped"
        results[name] = [loss.detach(), *(p.detach() for p in m.parameters()), *m.buffers()]
    for ours, stocks, exact in zip(results["fused"], results["stock"], results["exact"], strict=True):
        ours, stocks, exact = ours.double(), stocks.double(), exact.double()
        error, allowed = (ours - exact).abs().max(), (stocks - exact).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.abs().max().clamp_min(0.1)


def test_grad_scaler_skips_a_step_that_overflows():
    torch.manual_seed(3)
    model = fastconv.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    sgd, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(image(4, 3, 9, 8).float()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(sgd)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
