"""Convolutions on a few rows, whose weights are read where they lie: forward, data gradient, and both gradients with the
optimizer's step in one pass. Held to fp64, and the step to the same step taken from gradients in memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from util import check_sums, needs_vectors

import fastconv
from fastconv._plan.optim import PlannedOptimizer

needs_vectors()

PLAN = torch.ops.fastconv_plan
LAST = torch.channels_last
# images, height, width, channels, filters, kernel, stride, padding
FEW = {
    **{f"{n} rows": (n, 1, 1, 64, 128, 1, 1, 0) for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16)},
    "3x3 on one pixel": (4, 1, 1, 64, 64, 3, 1, 1),
    "3x3 on 2x2": (4, 2, 2, 32, 64, 3, 1, 1),  # taps of 16, 8 and 4 pairs
    "3x3 on 2x3": (2, 2, 3, 64, 32, 3, 1, 1),
    "3x3, strided": (3, 4, 4, 64, 32, 3, 2, 1),
    "1x1, strided": (4, 4, 4, 32, 64, 1, 2, 0),  # rows of the input that no tap reads
    "2x3 kernel": (2, 2, 3, 64, 32, (2, 3), 1, (1, 1)),
    "several blocks of columns": (13, 1, 1, 480, 68, 1, 1, 0),
    "many parts": (2, 1, 1, 64, 2052, 1, 1, 0),
    "past the caches": (3, 1, 1, 1024, 260, 1, 1, 0),
}
MANY = {
    "17 rows": (17, 1, 1, 64, 128, 1, 1, 0),
    "channels that fill no panel": (4, 1, 1, 48 - 8, 64, 1, 1, 0),
    "filters that fill no group": (4, 1, 1, 64, 62, 1, 1, 0),
    "taps of 18 pairs": (2, 3, 3, 64, 64, 3, 1, 1),
    "a large map": (1, 64, 64, 64, 64, 1, 16, 0),
}
EDGES = {**FEW, **MANY}
EDGE = pytest.mark.parametrize("edge", EDGES)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
WEIGHTS = pytest.mark.parametrize("weight_dtype", (None, torch.float32), ids=("the input's", "fp32"))
# a larger eps: else tiny gradients are stepped by their sign, which rounding decides
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "eps": 0.1, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 0.1, "weight_decay": 0.1}),
}


class Problem:
    def __init__(self, edge: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> None:
        n, h, w, c, k, size, stride, pad = EDGES[edge]
        size, pad = ((v, v) if isinstance(v, int) else v for v in (size, pad))
        self.dtype, self.settings = dtype, {"stride": stride, "padding": pad}
        self.geometry = [stride, stride, *pad, 1, 1, 1]
        self.lists = [stride] * 2, list(pad), [1, 1], 1  # stride, padding, dilation, groups
        self.x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=LAST)
        weight = torch.randn(k, c, *size) / (c * size[0] * size[1]) ** 0.5
        self.w = weight.to(weight_dtype or dtype).contiguous(memory_format=LAST)
        self.g = self.random_grad()

    def random_grad(self) -> Tensor:
        y = F.conv2d(self.x.float(), self.w.float(), **self.settings)
        return torch.randn_like(y).to(self.dtype).contiguous(memory_format=LAST)

    def gradients(self, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = x.double().requires_grad_(), w.double().requires_grad_()
        return torch.autograd.grad(F.conv2d(x, w, **self.settings), (x, w), g.double())


@DTYPES
def test_which_ones_are_stepped_in_place(dtype):
    for edge in EDGES:
        p = Problem(edge, dtype)
        assert PLAN.conv2d_steps_in_place(p.x, p.w, p.geometry) == (edge in FEW), edge


@DTYPES
def test_weights_that_are_read_where_they_lie_are_not_packed(dtype):
    for edge, packed in (("8 rows", False), ("17 rows", True)):
        p = Problem(edge, dtype)
        assert (PLAN.conv2d_pack(p.x, p.w, p.geometry).numel() > 0) == packed, edge


@WEIGHTS
@DTYPES
@EDGE
def test_forward(edge, dtype, weight_dtype):
    p = Problem(edge, dtype, weight_dtype)
    used = p.w.to(dtype)
    oracle = F.conv2d(p.x.double(), used.double(), **p.settings)
    magnitude = F.conv2d(p.x.double().abs(), used.double().abs(), **p.settings)
    out, _ = torch.ops.fastconv.conv2d_bias_act(p.x, p.w, None, None, *p.lists, "identity", False)
    check_sums(out, oracle, magnitude)


@WEIGHTS
@DTYPES
@EDGE
def test_data_gradient(edge, dtype, weight_dtype):
    p = Problem(edge, dtype, weight_dtype)
    used = p.w.to(dtype)
    oracle, magnitude = p.gradients(p.x, used, p.g), p.gradients(p.x.abs(), used.abs(), p.g.abs())
    dx = torch.full_like(p.x, torch.nan)
    PLAN.conv2d_input_grad(p.g, p.w if dtype is torch.float32 else used, None, p.geometry, dx)
    check_sums(dx, oracle[0], magnitude[0])
    again, _ = torch.ops.fastconv.conv2d_backward(p.g, p.x, p.w, *p.lists, [True, False])
    check_sums(again, oracle[0], magnitude[0])


def stepped(p: Problem, kind: type, options: dict, together: bool, steps: int) -> list[Tensor]:
    """dx of every step, then weight, state and bf16 copy."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(p.w.float().clone(memory_format=torch.preserve_format))
    optimizer = kind([weight], **options)
    planned = PlannedOptimizer(optimizer, [weight])
    copy = weight.detach().to(torch.bfloat16) if p.dtype is torch.bfloat16 else None
    used = weight.detach() if p.dtype is torch.float32 else copy
    out = []
    for _ in range(steps):
        g, dx = p.random_grad(), torch.randn(p.x.shape).to(p.dtype).contiguous(memory_format=LAST)
        planned.prepare()
        update = [weight.detach(), planned.state[id(weight)], copy, planned.groups[0][2], planned.kind, False]
        version = weight._version
        if together:
            PLAN.conv2d_backward_update(g, p.x, used, dx, p.geometry, dx, *update)
        else:
            PLAN.conv2d_input_grad(g, used, dx, p.geometry, dx)
            PLAN.conv2d_weight_grad_update(g, p.x, used, p.geometry, *update)
        assert weight._version > version
        out.append(dx)
    return [*out, weight.detach(), *planned.state[id(weight)], *([] if copy is None else [copy])]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@DTYPES
@EDGE
def test_backward_and_update_in_one_pass(edge, dtype, optimizer):
    kind, options = OPTIMIZERS[optimizer]
    p = Problem(edge, dtype)
    one, two = (stepped(p, kind, options, together, 3) for together in (True, False))
    for got, wanted in zip(one, two, strict=True):
        # bf16 weights of two orders of summation round apart now and then, which the later gradients show
        loose = got.dtype is torch.bfloat16 or dtype is torch.bfloat16
        torch.testing.assert_close(got, wanted, rtol=2e-2 if loose else 2e-4, atol=2e-2 if loose else 2e-5)
    if dtype is torch.bfloat16:
        assert torch.equal(one[-1], one[3].to(torch.bfloat16))


@DTYPES
@pytest.mark.parametrize("edge", FEW)
def test_one_pass_against_fp64(edge, dtype):
    """One step of plain SGD tells both gradients exactly: the data gradient is that of the weights before it."""
    p = Problem(edge, dtype)
    weight = p.w.float().clone(memory_format=torch.preserve_format)
    half = weight.to(torch.bfloat16) if dtype is torch.bfloat16 else None
    oracle, magnitude = p.gradients(p.x, p.w, p.g), p.gradients(p.x.abs(), p.w.abs(), p.g.abs())
    dx, hyper = torch.full_like(p.x, torch.nan), torch.tensor([1.0, 0, 0, 0]).double()
    used = weight if half is None else half
    PLAN.conv2d_backward_update(p.g, p.x, used, None, p.geometry, dx, weight, [], half, hyper, "sgd", False)
    check_sums(dx, oracle[0], magnitude[0])
    check_sums(weight, p.w.double() - oracle[1], p.w.double().abs() + magnitude[1])


@pytest.mark.parametrize("edge", ("3x3 on one pixel", "2x3 kernel", "3x3, strided"))
def test_dead_taps(edge):
    """Left alone with skip_dead; without, decayed like the rest."""
    p = Problem(edge, torch.float32)
    _, dw = p.gradients(p.x, p.w, torch.ones_like(p.g))
    touched = p.gradients(torch.ones_like(p.x), p.w, torch.ones_like(p.g))[1] != 0
    hyper = torch.tensor([0.5, 0, 0.25, 0]).double()
    for skip in (True, False):
        weight, dx = p.w.clone(memory_format=torch.preserve_format), torch.empty_like(p.x)
        g = torch.ones_like(p.g)
        PLAN.conv2d_backward_update(g, p.x, weight, None, p.geometry, dx, weight, [], None, hyper, "sgd", skip)
        wanted = p.w - 0.5 * (dw.float() + 0.25 * p.w)
        torch.testing.assert_close(weight, torch.where(touched, wanted, p.w) if skip else wanted, rtol=1e-4, atol=1e-4)


@DTYPES
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    p = Problem("past the caches", dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(stepped(p, torch.optim.Adam, {"lr": 0.01}, True, 2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_weights_that_are_not_the_parameter_take_two_passes():
    """The data gradient is of the weights that are given, whatever the parameter holds."""
    p = Problem("4 rows", torch.float32)
    parameter, dx, wanted = torch.zeros_like(p.w), torch.empty_like(p.x), torch.empty_like(p.x)
    hyper = torch.tensor([1.0, 0, 0, 0]).double()
    PLAN.conv2d_backward_update(p.g, p.x, p.w, None, p.geometry, dx, parameter, [], None, hyper, "sgd", False)
    PLAN.conv2d_input_grad(p.g, p.w, None, p.geometry, wanted)
    assert torch.equal(dx, wanted) and parameter.abs().sum() > 0


def test_bad_arguments_name_themselves():
    p = Problem("4 rows", torch.float32)
    call = [
        p.g,
        p.x,
        p.w,
        None,
        p.geometry,
        torch.empty_like(p.x),
        p.w,
        [],
        None,
        torch.zeros(4).double(),
        "sgd",
        False,
    ]

    def message(error: type[Exception], position: int, value: object) -> str:
        kept = p.w.clone()
        with pytest.raises(error) as caught:
            PLAN.conv2d_backward_update(*call[:position], value, *call[position + 1 :])
        assert torch.equal(p.w, kept)
        return str(caught.value)

    assert "grad_output expected size" in message(RuntimeError, 0, p.x)
    assert "input expected size" in message(RuntimeError, 1, p.g)
    assert "input expected" in message(RuntimeError, 1, p.x.bfloat16())
    assert "addend expected size" in message(RuntimeError, 3, p.g)
    assert "geometry expected 7" in message(RuntimeError, 4, p.geometry[:6])
    assert "parameter expected size" in message(RuntimeError, 6, p.w[:64])
    assert "weight expected" in message(RuntimeError, 6, p.w.double())
    assert "state expected" in message(RuntimeError, 7, [p.w, p.w])
    assert "half expected" in message(RuntimeError, 8, p.w)
    assert "hyper expected" in message(RuntimeError, 9, torch.zeros(4))
    assert "optimizer expected sgd or adam" in message(ValueError, 10, "lion")
    with pytest.raises(RuntimeError, match="geometry expected 7"):
        PLAN.conv2d_steps_in_place(p.x, p.w, p.geometry[:6])


class Small(nn.Module):
    """Maps of 2x2 with a residual, whose gradient is added to the data gradient, and of 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
        self.d = nn.Sequential(nn.Conv2d(64, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        x = F.relu(self.c(self.b(x)) + x)
        return self.head(self.d(x).flatten(1))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_plan_steps_such_layers_in_one_pass(optimizer):
    kind, options = OPTIMIZERS[optimizer]
    torch.manual_seed(0)
    stock = Small().to(memory_format=LAST)
    ours = fastconv.fuse(copy.deepcopy(stock), inplace=True)
    optimizers = [kind(m.parameters(), **options) for m in (ours, stock)]
    step = fastconv.TrainStep(ours, F.cross_entropy, optimizers[0])
    for i in range(4):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4,))
        for o in optimizers:
            o.param_groups[0]["lr"] = options["lr"] / (i + 1)
        optimizers[1].zero_grad()
        loss = F.cross_entropy(stock(x), y)
        loss.backward()
        optimizers[1].step()
        torch.testing.assert_close(step(x, y), loss.detach(), rtol=1e-3, atol=1e-4)
        assert step.plan_reason == ""
    calls = [label.split(" ")[0] for label in step._plans.find(x, y).labels]
    assert calls.count("fastconv_plan::conv2d_backward_update") == 4  # b, c, d, and a: 9 taps of 16 pairs at most
    for (name, mine), theirs in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        assert (mine.double() - theirs).norm() <= 1e-3 * (theirs.double().norm() + 1e-2), name
