"""torch.compile(model, backend="fastconv"): the groups of Dynamo's graphs, equal to the stock model that runs eagerly."""

from __future__ import annotations

import copy
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from dynamo_util import assert_compiled, fresh_dynamo, groups  # noqa: F401
from fuse_models import Net, tiny_vgg
from fuse_util import assert_close, image, one_thread  # noqa: F401
from torch import nn
from torch._dynamo.utils import counters

import fastconv
from fastconv import _dynamo


def test_the_entry_point_names_the_backend():
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="fastconv")
    assert entry.load() is _dynamo.fastconv
    assert "fastconv" in torch._dynamo.list_backends()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(torch.compile(model, backend="fastconv")(x), model(x), rtol=1e-4, atol=1e-5)
    assert counters["fastconv"]["conv+relu"] == 1


def test_residual_net_and_changing_batch():
    """A second batch size makes one dynamic graph; more sizes make none."""
    batches = [[image(n, 3, 9, 8)] for n in (5, 4, 6, 3)]
    counts = assert_compiled(Net().double(), batches, fullgraph=True)
    assert counts["graphs"] == 3  # training: static, dynamic; evaluation: dynamic at once
    assert groups(counts) == {
        "conv+bn+relu": 3 * 5, "conv+bn+add+relu": 3 * 4, "adaptive_avg_pool2d": 3,
    }  # fmt: skip


def test_everything_dynamic():
    """mark_dynamic sizes, and floats (momentum, eps, dropout's p) that Dynamo lifts into the graph."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.MaxPool2d(2)).double()
    counts = assert_compiled(model, [[image(2, 3, 9, 8)], [image(5, 3, 13, 12)]], fullgraph=True, dynamic=True)
    assert groups(counts) == {"conv+bn+relu": 2, "max_pool2d": 2}


@pytest.mark.parametrize("name", ("resnet", "vgg", "mobilenet_v3_small"))
def test_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    if name == "resnet":
        model = models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 5, width_per_group=8)
        wanted = {"conv+bn+relu": 9, "conv+bn+add+relu": 4, "conv+bn": 4, "max_pool2d": 1, "adaptive_avg_pool2d": 1}
    elif name == "vgg":
        model, wanted = tiny_vgg(True), {"conv+bn+relu": 4, "max_pool2d": 3, "adaptive_avg_pool2d": 1}
    else:
        model = models.mobilenet_v3_small(num_classes=5)
        wanted = {
            "conv+bn+hardswish": 18, "conv+bn+relu": 5, "conv+relu": 9, "conv+bn": 5, "conv+bn+add": 6, "conv": 9,
            "adaptive_avg_pool2d": 10,
        }  # fmt: skip
    counts = assert_compiled(model.double(), [[image(4, 3, 32, 32)]], rtol=1e-6, fullgraph=True)
    assert groups(counts) == {k: 2 * n for k, n in wanted.items()}


def test_channels_last_in_channels_last_out():
    x = image(2, 3, 9, 8).contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(Net().double().stem, nn.MaxPool2d(2))
    assert_compiled(model, [[x]])
    assert_compiled(model.to(memory_format=torch.channels_last), [[image(2, 3, 9, 8)]])


def test_memory_format_option():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    assert_compiled(model, [[image(2, 3, 9, 8)]], options={"memory_format": torch.preserve_format})


def test_hooks_count():
    """Dynamo inlines hooks that it can trace: what they do is in the graph."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    counts = assert_compiled(model, [[image(2, 4, 5, 5)]])
    assert groups(counts) == {"conv": 2, "bn+relu": 2}


def test_inside_autocast():
    model = Net().eval()
    step, x = torch.compile(model, backend=_dynamo.fastconv), image(2, 3, 9, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = step(x), model(x)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
    assert counters["fastconv"]["conv+bn+relu"] == 5


def test_a_fused_model_through_the_second_door():
    model = Net().double()
    stock, step = copy.deepcopy(model), torch.compile(fastconv.fuse(model), backend=_dynamo.fastconv)
    assert_close(step(image(2, 3, 9, 8)), stock(image(2, 3, 9, 8)), 1e-9)


@pytest.mark.parametrize("fused", (False, True), ids=("stock model", "fused model"))
def test_second_derivatives_are_refused(fused):
    """Where the first backward is called with create_graph=True, or where the second one reaches a fused operator."""
    if not fastconv.backends()["cpu"]:
        pytest.skip("no fused operators here: stock PyTorch is twice differentiable")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).double()
    step = torch.compile(fastconv.fuse(model) if fused else model, backend=_dynamo.fastconv)
    x = image(2, 3, 9, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="is differentiable once"):
        (first,) = torch.autograd.grad(step(x).sum(), x, create_graph=True)
        (first.square().sum() + x.sum()).backward()
    step(x).sum().backward()


@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "non-reentrant"))
def test_checkpointed_regions(reentrant):
    """Their bodies are graphs of their own, rewritten too.

    Compared with the stock model compiled: what Dynamo runs operator by operator is not recomputed, so running
    statistics move once where they move twice without torch.compile.
    """

    class Model(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in (*self.blocks, *self.tail):
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    stock = lambda m: torch.compile(m, backend="eager")  # noqa: E731
    counts = assert_compiled(Model().double(), [[image(2, 3, 9, 8)]], modes=(True,), reference=stock)
    assert groups(counts) == {"conv+bn+relu": 5, "conv+bn+add+relu": 4, "adaptive_avg_pool2d": 1}


def test_inner_backend():
    """The rewritten graph goes on to another compiler, which traces through the fused operators."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def look(module, example):
        seen.extend(f"{n.target} {n.args}" for n in module.graph.nodes)
        return module

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).double()
    batches = [[image(n, 3, 9, 8)] for n in (2, 5, 7)]
    counts = assert_compiled(model, batches, options={"inner_backend": aot_autograd(fw_compiler=look)})
    assert counts["conv+bn+relu"] >= 2
    if fastconv.backends()["cpu"]:
        for op in ("conv2d_bn_act", "batch_norm_act_backward", "conv2d_backward", "max_pool2d_backward"):
            assert any(f"fastconv.{op}" in s for s in seen), op


@pytest.mark.parametrize("options", ({"inner": "eager"}, {"memory_format": torch.contiguous_format}))
def test_bad_options(options):
    step = torch.compile(nn.ReLU(), backend=_dynamo.fastconv, options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="backend fastconv: .*expected"):
        step(torch.randn(2, 3, 4, 4))
