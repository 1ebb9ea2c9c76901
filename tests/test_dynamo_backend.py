"""torch.compile(model, backend="fastconv"): the groups of Dynamo's graphs, equal to the stock model that runs eagerly."""

from __future__ import annotations

import copy
from collections import Counter
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from test_fuse import Residual, assert_close, iadd, image, one_thread, run, tensors_of  # noqa: F401
from test_fuse_module import Block, Net
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastconv
from fastconv import _dynamo


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def assert_compiled(
    model: nn.Module, batches, modes=(True, False), rtol: float = 1e-9, reference=lambda m: m, **options
) -> Counter:
    """Outputs (values and strides), gradients and buffers as the stock copy's; returns the counts of the groups."""
    stock, step = copy.deepcopy(model), torch.compile(model, backend=_dynamo.fastconv, **options)
    plain = reference(stock)
    for mode in modes:
        stock.train(mode)
        model.train(mode)
        for seed, inputs in enumerate(batches):
            stock.zero_grad()
            model.zero_grad()
            wanted, wanted_grads = run(plain, inputs, seed)
            got, got_grads = run(step, inputs, seed)
            got_grads = {name.removeprefix("_orig_mod."): grad for name, grad in got_grads.items()}
            wanted_grads = {name.removeprefix("_orig_mod."): grad for name, grad in wanted_grads.items()}
            assert_close(got, wanted, rtol)
            assert [t.stride() for t in tensors_of(got)] == [t.stride() for t in tensors_of(wanted)]
            assert got_grads.keys() == wanted_grads.keys()
            largest = max(g.abs().max().item() for g in wanted_grads.values() if g is not None)
            for name, grad in wanted_grads.items():
                assert (grad is None) == (got_grads[name] is None), name
                if grad is not None:
                    error = (got_grads[name] - grad).abs().max().item()
                    assert error <= rtol * max(grad.abs().max().item(), 0.1 * largest), name
            for (name, a), b in zip(model.named_buffers(), stock.buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=name)
    return Counter(counters["fastconv"])


def groups(counts: Counter) -> dict[str, int]:
    return {k: n for k, n in counts.items() if k != "graphs"}


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
        from test_fuse_zoo import tiny_vgg

        model, wanted = tiny_vgg(True), {"conv+bn+relu": 4, "max_pool2d": 3, "adaptive_avg_pool2d": 1}
    else:
        model = models.mobilenet_v3_small(num_classes=5)
        wanted = {
            "conv+bn+hardswish": 18, "conv+bn+relu": 5, "conv+relu": 9, "conv+bn": 5, "conv+bn+add": 6,
            "adaptive_avg_pool2d": 10,
        }  # fmt: skip
    counts = assert_compiled(model.double(), [[image(4, 3, 32, 32)]], rtol=1e-6, fullgraph=True)
    assert groups(counts) == {k: 2 * n for k, n in wanted.items()}


# Where a group would not be exact: each of these would give other numbers if it were fused all the same.


class Trap(Block):
    """A block whose forward is the case's."""

    def __init__(self, case) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor):
        return self.case(self, x)


def read_between(m, x):
    y = m.bn1(m.conv1(x))
    seen = m.bn1.running_mean * 2  # of this step, not of the last
    return m.relu(y) + seen.view(1, -1, 1, 1)


def write_between(m, x):
    y = m.conv1(x)
    x.add_(1)
    return m.relu(m.bn1(y)) + x


def weight_written_between(m, x):
    y = m.conv1(x)
    with torch.no_grad():
        m.conv1.weight.mul_(1.5)
    return m.relu(y)


def weight_that_is_computed(m, x):
    w = m.conv1.weight / m.conv1.weight.norm()
    return F.relu(F.conv2d(x, w, padding=1))


def weight_that_is_an_output(m, x):
    w = m.conv1(x)[:, :, :3, :3]
    return F.relu(w).sum() + F.relu(F.conv2d(x, w))


def two_readers(m, x):
    y = m.bn1(m.conv1(x))
    return m.relu(y), y  # the relu writes to y


def no_grad_between(m, x):
    y = m.conv1(x)
    with torch.no_grad():
        z = F.relu(y)
    return z + m.conv2(x)


def autocast_between(m, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=True):
        y = m.conv1(x)
    return m.relu(m.bn1(y))


def the_same_norm_twice(m, x):
    return m.relu(m.bn1(m.conv2(m.relu(m.bn1(m.conv1(x))))))


def outputs_that_share_memory(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    return y, y[:, :2]


def views_and_strides(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    return y.view(y.size(0), -1), torch.as_strided(y, (2, 3), (1, 5))


def broadcast_addition(m, x):
    return m.relu(m.bn1(m.conv1(x)) + x.mean((2, 3), keepdim=True))


def promoted_addition(m, x):
    return m.relu(m.bn1(m.conv1(x)) + (x > 0))


def write_through_a_view(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    y.view(y.size(0), -1)[:, 0] = 7
    return y


def other_strides(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    return y.flatten(2), (y * 2)[0], (y * 3).transpose(1, 2)


def graph_break(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    torch._dynamo.graph_break()
    return m.relu(m.bn2(m.conv2(y)) + x)


def three_dimensions(m, x):
    return F.relu(m.conv1(x[0]))


def frozen_norm(m, x):
    return F.relu(F.batch_norm(m.conv1(x), m.bn1.running_mean, m.bn1.running_var, m.bn1.weight, m.bn1.bias, False))


def own_statistics(m, x):
    return F.relu(F.batch_norm(m.conv1(x), None, None, training=True))


def keywords(m, x):
    y = torch.conv2d(x, m.conv1.weight, padding=1, stride=[2])
    return F.leaky_relu(F.batch_norm(input=y, running_mean=None, running_var=None, training=True), 0.01)


def loop(m, x):
    while x.size(1) < 4 or x.dim() < 4:
        x = x.unsqueeze(0)
    for conv, bn in ((m.conv1, m.bn1), (m.conv2, m.bn2)):
        x = F.silu(bn(conv(x)))
    return {"out": x, "size": x.shape[0]}["out"]


TRAPS = {
    read_between: {"conv+bn": 1}, write_between: {"bn+relu": 1}, weight_written_between: {},
    weight_that_is_computed: {"conv+relu": 1}, weight_that_is_an_output: {"conv+relu": 1}, two_readers: {"conv+bn": 1},
    no_grad_between: {"conv+add": 1}, autocast_between: {"bn+relu": 1}, the_same_norm_twice: {"conv+bn+relu": 2},
    outputs_that_share_memory: {"conv+bn+relu": 1}, views_and_strides: {"conv+bn+relu": 1},
    broadcast_addition: {"conv+bn+add+relu": 1}, promoted_addition: {"conv+bn+add+relu": 1},
    write_through_a_view: {"conv+bn+relu": 1}, other_strides: {"conv+bn+relu": 1}, graph_break: {"conv+bn+relu": 1, "conv+bn+add+relu": 1},
    three_dimensions: {}, frozen_norm: {"conv+bn+relu": 1}, own_statistics: {"conv+bn+relu": 1},
    keywords: {}, loop: {"conv+bn+silu": 2},
}  # fmt: skip


WRITES = {write_between, weight_written_between, write_through_a_view}  # to what stock PyTorch's backward has saved


@pytest.mark.parametrize("case", TRAPS, ids=lambda f: f.__name__)
def test_traps(case):
    model, x = Trap(case).double(), image(3, 4, 7, 6)
    if case in WRITES:
        stock = copy.deepcopy(model)
        step, inputs = torch.compile(model, backend=_dynamo.fastconv), (x.clone(), x.clone())
        with torch.no_grad():
            assert_close(step(inputs[0]), stock(inputs[1]), 1e-9)
        assert torch.equal(*inputs) and torch.equal(model.conv1.weight, stock.conv1.weight)
        counts = Counter(counters["fastconv"])
    else:
        counts = assert_compiled(model, [[x]], modes=(True,))
    assert groups(counts) == TRAPS[case]


def test_dropout_draws_the_stock_mask():
    class Model(Block):
        def forward(self, x):
            return F.dropout(self.relu(self.bn1(self.conv1(x))), 0.5, self.training)

    assert_compiled(Model().double(), [[image(2, 4, 5, 5)]])


def test_dropout_in_place_is_seen_by_other_readers():
    def forward(m, x):
        y = m.bn1(m.conv1(x)) * 2
        return F.dropout(y, 0.5, True, inplace=True) + y

    assert_compiled(Trap(forward).double(), [[image(2, 4, 5, 5)]], modes=(True,))


def test_custom_operators_get_stocks_layout():
    """One that looks at strides, and one that writes to its argument."""
    library = torch.library.Library("fastconv_tests", "FRAGMENT")
    library.define("strides(Tensor x) -> Tensor")
    library.define("fill(Tensor(a!) x) -> ()")
    library.impl("strides", lambda x: x.new_tensor(x.stride()), "CompositeExplicitAutograd")
    library.impl("fill", lambda x: (x.zero_(), None)[1], "CompositeExplicitAutograd")
    torch.library.register_fake("fastconv_tests::strides", lambda x: x.new_empty(x.dim()), lib=library)
    torch.library.register_fake("fastconv_tests::fill", lambda x: None, lib=library)

    def forward(m, x):
        y = m.relu(m.bn1(m.conv1(x)))
        return y * 2, torch.ops.fastconv_tests.strides(y)

    def writing(m, x):
        y = m.relu(m.bn1(m.conv1(x)))
        torch.ops.fastconv_tests.fill(y)
        return y + x

    for case in (forward, writing):
        model, x = Trap(case).double().eval(), image(2, 4, 5, 5)
        with torch.no_grad():
            assert_close(torch.compile(model, backend=_dynamo.fastconv)(x), model(x), 1e-9)
        assert counters["fastconv"].pop("conv+bn+relu") == 1


@pytest.mark.parametrize("draw", (torch.rand_like, torch.bernoulli, lambda y: F.dropout2d(y, 0.5, True)))
def test_random_numbers_in_memory_order(draw):
    """Drawn for stock's layout: the same numbers in the same places."""
    model = Trap(lambda m, x: m.relu(m.bn1(m.conv1(x))) * draw(m.relu(m.bn2(x)).clamp(0, 1)))
    assert_compiled(model.double(), [[image(2, 4, 5, 5)]], modes=(True,))


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
    assert groups(counts) == {"bn+relu": 2}


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
