"""A plan's operators on a GPU, one by one: in the emulator, and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plan_ops_util import LAST, OPTIMIZERS, SHAPES, backward, close, problem
from torch import nn

from fastconv import _ext
from fastconv._plan.optim import PlannedOptimizer

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [name for name in SHAPES if not name.startswith("large")]  # what the emulator does in a second
pytestmark = pytest.mark.parametrize("planner", ("simt", "cuda"), indirect=True)


def operators(planner):
    return torch.ops.fastconv_simt_plan if planner.name == "simt" else torch.ops.fastconv_plan


def launched(planner) -> str:
    """The emulator's kernels since the last call."""
    if planner.name != "simt":
        return ""
    import simt_lib  # in tests/simt, which the fixture has put on the path

    return " ".join(simt_lib.library("norm").launches())


def like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(x, memory_format=LAST)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_conv2d(name, dtype, planner):
    x, w, settings, geometry = problem(name, dtype)
    scale, shift = torch.randn(2, w.shape[0])
    residual = like(F.conv2d(x, w, **settings))
    output, preact = torch.empty_like(residual), torch.empty_like(residual)
    operators(planner).conv2d(x, w, None, None, scale, shift, residual, geometry, "silu", preact, output)

    def formula(to):
        y = F.conv2d(x.to(to), w.to(to), **settings)
        scale_, shift_ = (v.to(to)[:, None, None] for v in (scale, shift))
        return y * scale_ + shift_ + residual.to(to)

    oracle, stock = formula(torch.double), formula(dtype)
    close(preact, stock, oracle)
    close(output, F.silu(stock), F.silu(oracle))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_conv2d_gradients(name, dtype, planner):
    x, w, settings, geometry = problem(name, dtype)
    g, plan = like(F.conv2d(x, w, **settings)), operators(planner)
    stock = backward(x, w, g, settings)
    oracle = backward(x.double(), w.double(), g.double(), settings)
    dx = torch.full_like(x, torch.nan)
    plan.conv2d_input_grad(g, w, None, geometry, dx)
    close(dx, stock[0], oracle[0])
    dx.copy_(x)
    plan.conv2d_input_grad(g, w, dx, geometry, dx)  # added to what is there
    close(dx, stock[0] + x, oracle[0] + x.double())
    for kept in {dtype, torch.float32}:
        dw = torch.full_like(w, torch.nan, dtype=kept)
        plan.conv2d_weight_grad(g, x, w, geometry, dw)
        close(dw, stock[1].to(kept), oracle[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("3x3", "strided", "stem", "depthwise", "odd"))
@pytest.mark.parametrize("act", ("identity", "relu", "silu"))
def test_conv2d_bn_and_its_backward(name, act, dtype, planner):
    """raw, output, statistics, running statistics, and the gradients; a ReLU's residual gradient in place."""
    x, w, settings, geometry = problem(name, dtype)
    channels, plan = w.shape[0], operators(planner)
    bias, weight, shift = torch.randn(3, channels)
    residual = like(F.conv2d(x, w, **settings))
    raw, out = (torch.full_like(residual, torch.nan) for _ in range(2))
    running = torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.long)
    mean, invstd = plan.conv2d_bn(
        x, w, bias, residual, weight, shift, *running, geometry, 0.1, 1e-5, act, raw, out
    )  # fmt: skip
    activate = {"identity": lambda t: t, "relu": torch.relu, "silu": F.silu}[act]

    def formula(to):
        z = F.conv2d(x.to(to), w.to(to), **settings) + bias.to(to)[:, None, None]
        return z, norm(z, to)

    def norm(z, to, r=residual, gain=weight, offset=shift):
        return activate(F.batch_norm(z.to(to), None, None, gain.to(to), offset.to(to), True) + r.to(to))

    (z, y), (stock_z, stock_y) = formula(torch.double), formula(dtype)
    close(raw, stock_z, z)
    close(out, stock_y, y)
    torch.testing.assert_close(mean.double(), raw.double().mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(running[0], 0.1 * mean)
    assert running[2] == 1

    g, grads = like(out), {}
    for to in (torch.double, dtype):
        leaves = [t.detach().to(to).requires_grad_() for t in (raw, residual, weight, shift)]
        grads[to] = torch.autograd.grad(norm(leaves[0], to, *leaves[1:]), leaves, g.to(to))
    dz = torch.full_like(out, torch.nan)
    into = {"identity": None, "relu": g, "silu": torch.empty_like(out)}[act]
    dweight, dshift = plan.batch_norm_backward(
        g, raw, out if act == "relu" else None, residual if act == "silu" else None, weight, shift, mean, invstd, act,
        dz, into,
    )  # fmt: skip
    for mine, stock, oracle in zip((dz, into, dweight, dshift), grads[dtype], grads[torch.double], strict=True):
        if mine is not None:
            close(mine.to(dtype), stock, oracle)


MANY = {  # rows: size, filters, filter, stride, padding, dilation, groups
    "many rows": ((3, 16, 12, 10), 24, 3, 1, 1, 1, 1),
    "many rows, strided": ((3, 8, 13, 11), 16, 3, 2, 1, 1, 1),
    "many rows, odd": ((2, 7, 12, 12), 5, 1, 1, 0, 1, 1),
    "many rows, groups": ((2, 16, 12, 12), 16, 3, 1, 1, 1, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", (*SMALL, *MANY))
@pytest.mark.parametrize("added", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("act", ("relu", "silu", "leaky_relu", "sigmoid", "identity"))
def test_a_data_gradient_with_the_batch_norm_behind_it(name, act, added, dtype, planner, monkeypatch):
    """As the two calls; few rows, where the sums may stay split, and many, which its epilogue sums up.

    added: to what the batch norm gave; the slope is then the output's, or of a pre-activation that takes all three."""
    monkeypatch.setitem(SHAPES, name, {**SHAPES, **MANY}[name])
    x, w, settings, geometry = problem(name, dtype)
    assert x.numel() // x.shape[1] > 256 or name not in MANY
    channels, plan = x.shape[1], operators(planner)
    dz, addend, raw = like(F.conv2d(x, w, **settings)), like(x), like(x)
    weight, bias, mean = torch.randn(3, channels)
    invstd = torch.rand(channels) + 0.5
    z = (raw.float() - mean[:, None, None]) * (invstd * weight)[:, None, None] + bias[:, None, None]
    residual = like(x) if added else None
    activate = {"relu": F.relu, "silu": F.silu, "leaky_relu": F.leaky_relu, "sigmoid": F.sigmoid}.get(act, lambda t: t)
    out = activate(z + residual.float() if added else z).to(dtype)
    out = out if act == "sigmoid" or (added and act in ("relu", "leaky_relu")) else None
    norm = [raw, out, residual if out is None else None, weight, bias, mean, invstd, act]
    grad = addend.clone()
    plan.conv2d_input_grad(dz, w, grad, geometry, grad)
    expected = {}
    for wanted in (False, True):  # whether the residual's gradient is asked for; then dz is rounded on the way
        places = [torch.full_like(x, torch.nan) for _ in range(1 + (wanted and act != "identity"))] + [None]
        expected[wanted] = [*places[:2], *plan.batch_norm_backward(grad, *norm, *places[:2])]
    for given, wanted in ((True, True), (False, True), (False, False)):
        into = addend.clone() if given else torch.full_like(x, torch.nan)
        dres = into if act == "relu" else torch.full_like(x, torch.nan)
        found = [torch.full_like(x, torch.nan), dres if wanted and act != "identity" else None]
        launched(planner)
        found += plan.conv2d_input_grad_bn(dz, w, into if given else addend, geometry, into, *norm, *found)
        if planner.name == "simt" and name in MANY:
            kernels = launched(planner)
            assert "bn_backward_dx" in kernels and ("bn_backward_sums" in kernels) == (act == "silu" and added), kernels
        for mine, theirs in zip(found, expected[wanted], strict=True):
            if mine is not None:
                room = (1e-4 if dtype is torch.float32 else 2e-2) * theirs.abs().max()
                torch.testing.assert_close(mine, theirs, rtol=0, atol=float(room))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", (*SMALL, "many rows"))
def test_weight_gradients_in_parts(name, dtype, planner):
    """Their sum is the gradient, and `update` takes either form."""
    if name == "many rows":
        x, w, geometry = (
            like(torch.empty(8, 8, 16, 16)).to(dtype),
            like(torch.empty(8, 8, 1, 1)).to(dtype),
            [1, 1, 0, 0, 1, 1, 1],
        )
        settings = {}
    else:
        x, w, settings, geometry = problem(name, dtype)
    g, plan = like(F.conv2d(x, w, **settings)), operators(planner)
    parts = plan.conv2d_weight_grad_parts(g, x, w, geometry)
    if parts.dim() == 5:
        assert parts.dtype is torch.float32 and parts.shape[0] > 1
    elif name == "many rows" and planner.name == "simt":
        raise AssertionError("the sums were not split")
    dw = parts.float().sum(0) if parts.dim() == 5 else parts
    close(dw.to(dtype), backward(x, w, g, settings)[1], backward(x.double(), w.double(), g.double(), settings)[1])
    hyper = torch.tensor([0.5, 0.9, 0.0, 0.0], dtype=torch.float64)
    weights = [w.float(), w.float()]
    buffers = [torch.zeros_like(v) for v in weights]
    plan.update(weights[:1], [parts], buffers[:1], 1, [], hyper, "sgd", [])
    plan.update(weights[1:], [dw.float()], buffers[1:], 1, [], hyper, "sgd", [])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-5)


def test_batch_norm_alone(planner):
    x = like(torch.empty(3, 8, 5, 4))
    weight, bias = torch.randn(2, 8)
    out, mine = torch.empty_like(x), [torch.zeros(8), torch.ones(8)]
    stock = [t.clone() for t in mine]
    operators(planner).batch_norm(x, None, weight, bias, *mine, None, 0.3, 1e-5, "relu", out)
    torch.testing.assert_close(out, F.batch_norm(x, *stock, weight, bias, True, 0.3).relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine, stock)


SIZES = [(1,), (3,), (4096,), (4097,), (8192,), (7, 5, 3, 3), (16, 8, 3, 3), (64, 33), (2, 8, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("apart", (False, True), ids=("aligned", "apart"))
def test_update(optimizer, dtype, apart, planner):
    """Many tensors, ragged ends, one launch: as torch.optim. apart: every tensor starts one element off alignment."""
    kind, options = OPTIMIZERS[optimizer]

    def parameter(size):
        count = torch.Size(size).numel()
        return nn.Parameter(torch.randn(count + 1)[1:].view(size) if apart else torch.randn(size))

    mine = [parameter(size) for size in SIZES]
    stock = [nn.Parameter(p.detach().clone()) for p in mine]
    ours, theirs = kind(mine, **options), kind(stock, **options, foreach=False)
    planned = PlannedOptimizer(ours, mine, mine[0].device)
    halves = [] if dtype is torch.float32 else [torch.empty_like(p, dtype=torch.bfloat16) for p in mine]
    state = [t for p in mine for t in planned.state[id(p)]]
    for _ in range(3):
        grads = [parameter(size).detach().to(dtype) for size in SIZES]
        for p, g in zip(stock, grads, strict=True):
            p.grad = g.float()
        theirs.step()
        planned.prepare()
        versions = [p._version for p in mine]
        operators(planner).update(
            [p.detach() for p in mine], grads, state, len(state) // len(mine), halves, planned.hyper[0], planned.kind, []
        )  # fmt: skip
        assert all(p._version > v for p, v in zip(mine, versions, strict=True))
        torch.testing.assert_close([p.detach() for p in mine], [p.detach() for p in stock], rtol=1e-5, atol=1e-6)
        for p, half in zip(mine, halves, strict=False):
            assert torch.equal(half, p.to(torch.bfloat16))
    for index, held in theirs.state_dict()["state"].items():
        for key, value in held.items():
            if value is not None:
                mine_now = ours.state_dict()["state"][index][key]
                torch.testing.assert_close(mine_now, value, rtol=1e-4, atol=1e-5)


def test_update_takes_more_tensors_than_one_launch(planner):
    weights = [torch.full((i % 5,), float(i)) for i in range(300)]  # 60 of them empty
    grads = [torch.full_like(w, 2.0) for w in weights]
    hyper = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    operators(planner).update(weights, grads, [], 0, [], hyper, "sgd", [])
    for i, w in enumerate(weights):
        assert (w == i - 1.0).all(), i
    operators(planner).update([], [], [], 0, [], hyper, "sgd", [])


@pytest.mark.parametrize("channels", (8, 6, 3))
def test_update_leaves_dead_taps_alone(channels, planner):
    """Filters whose taps are masked one by one, with 16-byte accesses and without; the mask is the plan's."""
    weight = torch.randn(16, channels, 3, 3).contiguous(memory_format=LAST)
    before, buffer = weight.clone(), torch.zeros_like(weight)
    live = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    mask = sum(1 << i for i, bit in enumerate(live.flatten().tolist()) if bit)
    hyper = torch.tensor([0.5, 0.9, 0.1, 0.0], dtype=torch.float64)
    operators(planner).update([weight], [torch.ones_like(weight)], [buffer], 1, [], hyper, "sgd", [mask])
    moved = 1 + 0.1 * before
    torch.testing.assert_close(buffer, torch.where(live, moved, torch.zeros_like(moved)))
    torch.testing.assert_close(weight, torch.where(live, before - 0.5 * moved, before))


def test_gradients_in_another_order_or_dtype(planner):
    weight = torch.randn(4, 6, 3, 3).contiguous(memory_format=LAST)
    grad = torch.randn(4, 6, 3, 3).half()
    expected = weight - 0.5 * grad.float()
    hyper = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    operators(planner).update([weight], [grad], [], 0, [], hyper, "sgd", [])
    torch.testing.assert_close(weight, expected)


def test_bad_arguments_name_themselves(planner):
    plan = operators(planner)
    x, w, _, geometry = problem("3x3")
    out = like(F.conv2d(x, w, padding=1))
    with pytest.raises(RuntimeError, match="mean expected None on this device"):
        plan.conv2d(x, w, None, torch.zeros(64), None, None, None, geometry, "relu", None, out)
    with pytest.raises(RuntimeError, match="packed expected None on this device"):
        plan.conv2d(x, w, torch.zeros(1), None, None, None, None, geometry, "relu", None, out)
    with pytest.raises(RuntimeError, match="output expected a channels_last"):
        plan.conv2d(x, w, None, None, None, None, None, geometry, "relu", None, out.contiguous())
    with pytest.raises(RuntimeError, match="geometry expected 7 integers"):
        plan.conv2d_input_grad(out, w, None, geometry[:4], x)
    with pytest.raises(RuntimeError, match="grad_weight expected dtype"):
        plan.conv2d_weight_grad(out, x, w, geometry, w.half())
    hyper = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="live expected none or 1 integers, got 2"):
        plan.update([w], [w], [], 0, [], hyper, "sgd", [1, 2])
    with pytest.raises(RuntimeError, match="grads expected 1 tensors, got 0"):
        plan.update([w], [], [], 0, [], hyper, "sgd", [])
    with pytest.raises(RuntimeError, match="halves expected none or 1"):
        plan.update([w], [w], [], 0, [w, w], hyper, "sgd", [])
    with pytest.raises(RuntimeError, match="less than 64 taps"):
        wide = torch.zeros(2, 2, 8, 8).contiguous(memory_format=LAST)
        plan.update([wide], [wide.clone()], [], 0, [], hyper, "sgd", [1])
    with pytest.raises(RuntimeError, match="expected dtype float32, float16 or bfloat16"):
        plan.update([w], [w.double()], [], 0, [], hyper, "sgd", [])
