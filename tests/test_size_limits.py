"""Calls past a kernel's limits of size: "auto" takes the next backend, a named one raises and says which limit.

No memory is needed: fake tensors on a GPU that is not there, and backends that are told to be available.
"""

from __future__ import annotations

import pytest
import simt_backend
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv
import fastconv.functional as FF
from fastconv import _ext
from fastconv.ops import choice, registry
from fastconv.triton import limits

pytestmark = pytest.mark.skipif(not _ext.HAS_EXT, reason=f"no compiled extension: {_ext.EXT_REASON}")
BIG = 1 << 31


@pytest.fixture
def gpu(monkeypatch):
    """Both GPU backends available for fake CUDA tensors, with every operator compiled in."""
    yes = registry.Availability(True, "pretended")
    monkeypatch.setitem(registry._known, "cuda", yes)
    monkeypatch.setitem(registry._known, "triton", yes)
    monkeypatch.setitem(registry._COMPILED, "cuda", frozenset(registry.fake.OPERATORS))
    monkeypatch.setitem(registry._CANNOT_RUN, "triton", lambda op, tensors: "")
    monkeypatch.setitem(registry._LIBRARIES, "triton", "fastconv")
    choice.forget()
    with FakeTensorMode():
        yield
    choice.forget()


def empty(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def conv(x, w, grad_x=False, grad_w=False, **how):
    x, w = empty(*x, grad=grad_x), empty(*w, grad=grad_w)
    return lambda: FF.conv2d_bias_act(x, w, **how)


def norm(channels, rows=2):
    x, mean, var = empty(rows, channels, 1, 1), empty(channels), empty(channels)
    return lambda: FF.batch_norm_act(x, mean, var)


def loss(n, c, *d):
    x, target = empty(n, c, *d), empty(n, *d, dtype=torch.int64)
    return lambda: FF.cross_entropy(x, target)


def pooled(name, shape, *args, grad=False, **kwargs):
    x = empty(*shape, grad=grad)
    return lambda: getattr(FF, name)(x, *args, **kwargs)


# (the call, a part of CUDA's reason, a part of Triton's: "" where it can run)
PAST = {
    "input image": (lambda: conv((1, 64, 8192, 4096), (8, 64, 3, 3)), "elements of one input image", "one padded image"),
    "output image": (
        lambda: conv((1, 4, 4096, 4096), (128, 4, 1, 1)), "elements of one output image", "one output image",
    ),
    "groups": (lambda: conv((1, 140_000, 2, 2), (140_000, 2, 1, 1), groups=70_000), "groups", "groups"),
    "stride classes": (
        lambda: conv((1, 8192, 64, 64), (8192, 2, 1, 1), groups=4096, stride=8, grad_x=True),
        "groups times stride classes", "",
    ),
    "stride and dilation": (
        lambda: conv((1, 1, 65537, 65537), (1, 1, 2, 2), stride=65536, dilation=65535, grad_x=True),
        "one input image", "rows",
    ),
    "wgrad positions": (
        lambda: conv((1 << 15, 8, 256, 256), (8, 8, 1, 1), grad_w=True), "weight gradient", "rows",
    ),
    "depthwise weight": (
        lambda: conv((1, 1 << 21, 32, 32), (1 << 21, 1, 32, 32), groups=1 << 21), "input image", "one padded image",
    ),
    "depthwise taps": (
        lambda: conv((1, 2, 300, 300), (2, 1, 300, 300), groups=2, grad_w=True), "taps of a depthwise", "taps of a depth",
    ),
    "a far padding": (lambda: conv((1, 1, 4, 1), (1, 1, 1, 1), padding=((1 << 30) - 10, 0)), "padded axis", "rows"),
    "channels of a norm": (lambda: norm(BIG), "channels", "channels"),
    "classes": (lambda: loss(1, BIG), "classes", "classes"),
    "rows of a loss": (lambda: loss(BIG, 8192), "blocks of a loss", "rows"),
    "channels of a pool": (lambda: pooled("max_pool2d", (1, BIG, 2, 2), 2), "channels", "channels"),
    "positions of a window": (
        lambda: pooled("avg_pool2d", (1, 1, 1 << 16, 1 << 16), 1 << 16), "positions of a window", "rows",
    ),
    "a window over the map": (
        lambda: pooled("adaptive_avg_pool2d", (1, 1, 1 << 16, 1 << 16), 1), "positions of a window", "rows",
    ),
    "divisor": (
        lambda: pooled("avg_pool2d", (1, 1, 4, 4), 2, divisor_override=1 << 40), "divisor_override", "",
    ),
    "negative divisor": (
        lambda: pooled("avg_pool2d", (1, 1, 4, 4), 2, divisor_override=-(1 << 40)), "divisor_override", "",
    ),
}  # fmt: skip

# Just inside, or past 2^31 elements where that is no limit.
WITHIN = {
    "many images": lambda: conv((1 << 12, 64, 128, 128), (64, 64, 3, 3), padding=1, grad_x=True, grad_w=True),
    "the largest image": lambda: conv((1, 32, 8192, 8191), (8, 32, 1, 1)),
    "as many groups": lambda: conv((1, 65535 * 2, 1, 1), (65535 * 2, 2, 1, 1), groups=65535),
    "forward alone": lambda: conv((1, 8192, 64, 64), (8192, 2, 1, 1), groups=4096, stride=8),
    "rows of a norm": lambda: norm(4, rows=1 << 33),
    "rows of a loss": lambda: loss(1 << 33, 10),
    "a segmentation": lambda: loss(64, 150, 2048, 2048),
    "many pooled images": lambda: pooled("max_pool2d", (1 << 14, 64, 64, 64), 3, 2, 1, grad=True),
    "a global pool": lambda: pooled("adaptive_avg_pool2d", (1, 8, 1 << 15, (1 << 16) - 1), 1),
}


@pytest.mark.parametrize("name", PAST)
def test_past_a_limit_the_next_backend_takes_the_call(gpu, name):
    make, cuda, triton = PAST[name]
    call = make()
    found = fastconv.ops.choice.explain(call)
    assert found.backend == ("aten" if triton else "triton")
    assert cuda in found.refused["cuda"] and "CUDA kernels" in found.refused["cuda"]
    if triton:
        assert triton in found.refused["triton"] and "Triton kernels" in found.refused["triton"]


@pytest.mark.parametrize("name", PAST)
def test_a_named_backend_says_which_limit(gpu, name):
    make, *reasons = PAST[name]
    call = make()
    for backend, reason in zip(("cuda", "triton"), reasons, strict=True):
        if reason:
            with fastconv.use_backend(backend), pytest.raises(RuntimeError) as error:
                call()
            assert f"backend {backend!r} cannot run this call: " in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("name", WITHIN)
def test_within_the_limits_cuda_keeps_the_call(gpu, name):
    found = fastconv.ops.choice.explain(WITHIN[name]())
    assert (found.backend, found.refused.get("cuda")) == ("cuda", None)


def test_auto_runs_the_call_on_stock_pytorch(gpu, caplog):
    with caplog.at_level("INFO", logger="fastconv"):
        out = conv((1, 64, 8192, 4096), (8, 64, 3, 3))()
    assert out.shape == (1, 8, 8190, 4094) and "runs on aten" in caplog.text


def test_the_limit_of_a_gradient_counts_only_where_it_is_wanted(gpu):
    call = PAST["stride classes"][0]()
    with torch.no_grad():
        assert fastconv.ops.choice.explain(call).backend == "cuda"


def test_every_limit_of_a_convolution_by_itself():
    """The limits that no tensor reaches before another one, by their own numbers."""

    def conv_limit(x, w, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, grads=(True, True)):
        return _ext.MODULE.cuda_limit("conv2d_bias_act", (x, w), (stride, padding, dilation, groups), grads)

    assert conv_limit((1, 8, 4, 4), (8, 8, 3, 3)) == ""
    assert "batch" in conv_limit((BIG, 8, 1, 1), (8, 8, 1, 1))
    assert "channels" in conv_limit((1, BIG, 1, 1), (8, BIG, 1, 1))
    assert "one group's filter" in conv_limit((1, 65536, 128, 128), (8, 65536, 256, 256), padding=(64, 64))
    assert "of an axis" in conv_limit((1, 1, 4, 4), (1, 1, 1, 1), stride=(BIG, 1))
    assert "multiple of stride" in conv_limit((1, 1, 4, 4), (1, 1, 1, 1), stride=(65537, 1), dilation=(65536, 1))
    depthwise = conv_limit((1, 65536, 8, 8), (65536, 1, 512, 512), padding=(256, 256), groups=65536)
    assert "weight of a depthwise" in depthwise
    assert "tiles of a convolution" in conv_limit((BIG - 1, 8, 64, 64), (8, 8, 1, 1), grads=(False, False))
    assert "tiles of a data gradient" in conv_limit((BIG - 1, 8, 64, 64), (8, 8, 1, 1), (64, 64), grads=(True, False))
    with pytest.raises(ValueError, match="public operator, got conv3d"):
        _ext.MODULE.cuda_limit("conv3d", ((1,),), (), ())


@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
def test_pool_windows(op):
    def pool_limit(kernel, grad):
        settings = (kernel, (1, 1), (0, 0), *([(1, 1)] if op == "max_pool2d" else []), False, False, None)
        return _ext.MODULE.cuda_limit(op, ((1, 1, 1 << 17, 1 << 17),), settings, (grad,))

    assert pool_limit((16, 16), True) == ""
    assert ("kept offsets" in pool_limit((17, 16), True)) == (op == "max_pool2d")
    assert pool_limit((17, 16), False) == ""
    assert "positions of a window" in pool_limit((1 << 16, 1 << 16), False)


def test_symbolic_sizes_are_left_to_the_launch():
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(x):
        assert any(isinstance(size, torch.SymInt) for size in x.shape)
        assert registry._size_limit("cuda", "max_pool2d", (x,), ((2, 2), (2, 2), (0, 0), (1, 1), False, False)) == ""
        return x + 1

    make_fx(call, tracing_mode="symbolic")(torch.randn(4, 8, 5, 5))


def test_limits_are_asked_while_tracing(monkeypatch):
    """torch.compile: the answer is a constant of the graph, the reason that of the eager call."""
    monkeypatch.setitem(registry._LIMITS, "cpu", lambda op, shapes, *_: "too many" if shapes[0][0] > 3 else "")
    choice.forget()

    def call(x):
        return FF.avg_pool2d(x, 2)

    torch._dynamo.reset()
    traced = torch.compile(call, backend="eager", fullgraph=True, dynamic=False)
    with fastconv.use_backend("cpu"):
        small, large = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 6, 6)
        assert torch.equal(traced(small), call(small))
        with pytest.raises(Exception, match="too many"):
            traced(large)
        with pytest.raises(RuntimeError, match="cannot run this call: too many"):
            call(large)
    torch._dynamo.reset()


def test_the_operators_refuse_too():
    """Called without the choice of a backend; nothing of these sizes is allocated or copied before."""
    missing = simt_backend.add()
    if missing:
        pytest.skip(f"backend simt: {missing}")
    ops, one = torch.ops.fastconv_simt, torch.ones(1)
    how = ((1, 1), (0, 0), (1, 1))

    with pytest.raises(RuntimeError, match="conv2d_bias_act: elements of one input image: at most"):
        ops.conv2d_bias_act(
            one.expand(1, 64, 8192, 4096), one.expand(8, 64, 1, 1), None, None, *how, 1, "relu", False
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="conv2d_backward: output positions of the batch"):
        shape = (1 << 15, 8, 256, 256)
        ops.conv2d_backward(one.expand(shape), one.expand(shape), one.expand(8, 8, 1, 1), *how, 1, (False, True))
    with pytest.raises(RuntimeError, match="avg_pool2d: divisor_override: less than"):
        ops.avg_pool2d(torch.ones(1, 1, 4, 4), (2, 2), (2, 2), (0, 0), False, True, -(1 << 40))
    with pytest.raises(RuntimeError, match="max_pool2d: positions of a window: at most"):
        kernel = (1 << 16, 1 << 16)
        ops.max_pool2d(one.expand(1, 1, 1 << 17, 1 << 17), kernel, kernel, (0, 0), (1, 1), False, False)
    with pytest.raises(RuntimeError, match="cross_entropy: classes: at most"):
        target = torch.zeros(1, dtype=torch.int64)
        ops.cross_entropy(one.expand(1, BIG), target, None, 1, -100, 0.0)


def test_triton_stride_classes():
    x, w = (1, 64, 600, 600), (64, 64, 1, 1)
    how = ((300, 300), (0, 0), (1, 1), 1)
    assert "stride classes" in limits.limit("conv2d_bias_act", (x, w), how, (True, False))
    assert limits.limit("conv2d_bias_act", (x, w), how, (False, True)) == ""
