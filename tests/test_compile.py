"""torch.compile(fullgraph=True) and torch.export through fastconv's operators: no graph break, same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from util import ACTIVATIONS, same_bits

import fastconv
import fastconv.functional as FF
import fastconv.nn as fnn

FUSED = pytest.mark.skipif(not fastconv.backends()["cpu"], reason=f"backend cpu: {fastconv.backends()['cpu'].reason}")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def data(dtype=torch.float32):
    return {
        "x": torch.randn(2, 4, 7, 6).to(dtype).contiguous(memory_format=torch.channels_last),
        "w": torch.randn(6, 4, 3, 3).to(dtype) / 6,
        "b": torch.randn(6).to(dtype),
        "r": torch.randn(2, 6, 7, 6).to(dtype),
        "g": torch.rand(6) + 0.5,
    }


CALLS = {
    "conv2d_bias_act": (lambda x, w, b, r, g: FF.conv2d_bias_act(x, w, b, 1, 1, activation="silu", residual=r), "xwbr"),
    "conv2d_bias_relu": (lambda x, w, b, r, g: FF.conv2d_bias_relu(x, w, b, 2, "valid", 1), "xwb"),
    "same": (lambda x, w, b, r, g: FF.conv2d_bias_relu(x, w[..., :2], b, padding="same"), "xwb"),
    "batch_norm_act": (
        lambda x, w, b, r, g: FF.batch_norm_act(r, None, None, g, b, True, residual=r * 2, activation="relu"), "rgb"),
    "batch_norm_eval": (
        lambda x, w, b, r, g: FF.batch_norm_act(r, b.detach(), g.detach(), g, b, activation="tanh"), "rgb"),
    "conv2d_bn_act": (
        lambda x, w, b, r, g: FF.conv2d_bn_act(x, w, None, None, None, g, b, padding=1, training=True, residual=r), "xwrgb"),
    "max_pool2d": (lambda x, w, b, r, g: FF.max_pool2d(x, 3, 2, 1), "x"),
    "avg_pool2d": (lambda x, w, b, r, g: FF.avg_pool2d(x, 3, 2, 1, count_include_pad=False), "x"),
    "adaptive_avg_pool2d": (lambda x, w, b, r, g: FF.adaptive_avg_pool2d(x, (3, None)), "x"),
    "cross_entropy": (lambda x, w, b, r, g: FF.cross_entropy(x[:, :, 0, 0], torch.tensor([1, 2]), label_smoothing=0.1), "x"),
    "cross_entropy_probabilities": (lambda x, w, b, r, g: FF.cross_entropy(x, x.detach().softmax(1), reduction="none"), "x"),
}  # fmt: skip


@pytest.mark.parametrize("backend_name", ("auto", "aten"))
@pytest.mark.parametrize("name", CALLS)
def test_functional_with_backward(name, backend_name):
    call, wanted = CALLS[name]
    with fastconv.use_backend(backend_name):
        results = []
        for function in (call, compiled(call)):
            tensors = {n: t.clone().requires_grad_() for n, t in data_once().items()}
            out = function(**tensors)
            results.append((out, *torch.autograd.grad(out.square().sum(), [tensors[n] for n in wanted])))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
        assert traced.stride() == eager.stride()


def data_once():
    torch.manual_seed(0)
    return data()


@FUSED
@pytest.mark.parametrize("name", CALLS)
def test_the_graph_holds_fastconvs_operators(name):
    """What is traced is the fused operator, not a fallback."""
    call, _ = CALLS[name]
    seen = []

    def look(module, example):
        seen.extend(f"{n.target} {n.args}" for n in module.graph.nodes)  # mutable ones are arguments of a wrapper
        return module

    from torch._dynamo.backends.common import aot_autograd

    tensors = {n: t.clone().requires_grad_() for n, t in data_once().items()}
    torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=look))(**tensors)
    assert any("fastconv." in s for s in seen), seen


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    def call(x, w, b):
        return FF.conv2d_bias_act(x, w, b, padding=1, activation=activation)

    t = data_once()
    args = [t[n].requires_grad_() for n in ("x", "w", "b")]
    eager = torch.autograd.grad(call(*args).sum(), args)
    traced = torch.autograd.grad(compiled(call)(*args).sum(), args)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = fnn.Conv2dBiasReLU(3, 8, 3, padding=1)
        self.pool = fnn.MaxPool2d(2)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = fnn.BatchNormAct2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = self.norm(self.conv(x), x)
        return self.head(fnn.AdaptiveAvgPool2d(1)(x).flatten(1))


def trained(step, steps=3):
    """Losses and the final state of a few SGD steps; running statistics are mutated inside the compiled graph."""
    torch.manual_seed(0)
    net = Net()
    sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    forward, losses = step(net), []
    for _ in range(steps):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
        sgd.zero_grad()
        loss = fnn.CrossEntropyLoss()(forward(x), y)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses, net.state_dict()


def test_training_a_net_with_running_statistics():
    eager, compiled_run = trained(lambda net: net), trained(compiled)
    assert eager[0] == pytest.approx(compiled_run[0], rel=1e-4)
    for name, value in eager[1].items():
        torch.testing.assert_close(compiled_run[1][name], value, rtol=1e-4, atol=1e-5)
    assert compiled_run[1]["norm.num_batches_tracked"] == 3


def test_fused_model_compiles():
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)
    )
    fused = fastconv.fuse(stock)
    x = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        stock.train(training), fused.train(training)
        torch.testing.assert_close(compiled(fused)(x), stock(x), rtol=1e-4, atol=1e-5)


def test_autocast_inside_compile():
    def call(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return FF.conv2d_bias_relu(x, w)

    t = data_once()
    out = compiled(call)(t["x"], t["w"])
    assert out.dtype is torch.bfloat16 and same_bits(out, call(t["x"], t["w"]))


def test_dynamic_batch():
    """One graph for every batch size: no recompilation after the first."""
    count = 0

    def counting(module, example):
        nonlocal count
        count += 1
        return module

    net = Net().eval()
    step = torch.compile(net, fullgraph=True, dynamic=True, backend=counting)
    for n in (5, 6, 9):  # none of the net's own sizes: dynamo gives equal sizes one symbol
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(step(x), net(x), rtol=1e-5, atol=1e-5)
    assert count == 1


@pytest.mark.parametrize(
    "layer",
    (
        lambda: fnn.Conv2dBiasAct(4, 6, 3, padding=1, activation="gelu"),
        lambda: fnn.Conv2dBiasReLU(4, 6, 3, padding="same", groups=2),
        lambda: fnn.BatchNormAct2d(4, activation="hardswish"),
        lambda: fnn.MaxPool2d(3, 2, 1),
        lambda: fnn.AvgPool2d(2),
        lambda: fnn.AdaptiveAvgPool2d((2, 3)),
    ),
    ids=("conv", "conv_same", "norm", "max", "avg", "adaptive"),
)
def test_export_in_evaluation(layer):
    layer = layer().eval()
    x = torch.randn(3, 4, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    for n in (3, 7):
        x = torch.randn(n, 4, 8, 8)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
    if fastconv.backends()["cpu"]:
        assert any("fastconv." in str(node.target) for node in program.graph.nodes)


def test_export_of_a_net_in_evaluation(tmp_path):
    """Saved and loaded again, the program gives the same numbers."""
    net = Net().eval()
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (x,)), path)
    torch.testing.assert_close(torch.export.load(path).module()(x), net(x), rtol=1e-5, atol=1e-5)


@FUSED
def test_meta_and_fake_tensors():
    """Shape inference without data, as torch.compile and model-size tools do it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = FF.conv2d_bias_relu(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), stride=2)
        assert out.shape == (2, 4, 3, 3)
        assert FF.cross_entropy(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)).shape == ()


@pytest.mark.parametrize("op", ["conv2d_bias_act", "batch_norm_act", "conv2d_bn_act"])
def test_input_that_is_its_own_residual(op: str) -> None:
    """One tensor in two places of an operator gets the gradients of both, as in relu(bn(conv(x)) + x)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64, generator=generator)

    def call(x: torch.Tensor) -> torch.Tensor:
        if op == "conv2d_bias_act":
            return FF.conv2d_bias_act(x, weight, padding=1, residual=x)
        if op == "batch_norm_act":
            return FF.batch_norm_act(x, None, None, training=True, residual=x)
        return FF.conv2d_bn_act(x, weight, None, None, None, None, None, padding=1, training=True, residual=x)

    grads = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(run(leaf).square().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
