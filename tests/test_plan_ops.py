"""The steps of a plan one by one, and the program that runs them."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from plan_ops_util import LAST, OPTIMIZERS, SHAPES, backward, close, problem

from fastconv import _ext
from fastconv._plan.program import Buffer, Builder, lay_out

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


PLAN = torch.ops.fastconv_plan


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_conv2d(name, dtype):
    x, w, settings, geometry = problem(name, dtype)
    mean, scale, shift = torch.randn(3, w.shape[0])
    out = F.conv2d(x, w, **settings)
    residual = torch.randn_like(out).contiguous(memory_format=LAST)
    output, preact = torch.empty_like(residual), torch.empty_like(residual)
    packed = PLAN.conv2d_pack(x, w, geometry)
    PLAN.conv2d(x, w, packed, mean, scale, shift, residual, geometry, "relu", preact, output)

    def formula(x, w, residual, to):
        y = F.conv2d(x.to(to), w.to(to), **settings)
        mean_, scale_, shift_ = (v.to(to)[:, None, None] for v in (mean, scale, shift))
        return (y - mean_) * scale_ + shift_ + residual.to(to)

    oracle, stock = formula(x, w, residual, torch.double), formula(x, w, residual, dtype)
    close(preact, stock, oracle)
    close(output, stock.relu(), oracle.relu())
    again = torch.empty_like(output)
    PLAN.conv2d(x, w, None, mean, scale, shift, residual, geometry, "relu", None, again)
    close(again, stock.relu(), oracle.relu())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_conv2d_gradients(name, dtype):
    x, w, settings, geometry = problem(name, dtype)
    g = torch.randn_like(F.conv2d(x, w, **settings)).contiguous(memory_format=LAST)
    stock = backward(x, w, g, settings)
    oracle = backward(x.double(), w.double(), g.double(), settings)
    dx = torch.empty_like(x)
    PLAN.conv2d_input_grad(g, w, None, geometry, dx)
    close(dx, stock[0], oracle[0])
    dx.copy_(x)
    PLAN.conv2d_input_grad(g, w, dx, geometry, dx)
    close(dx, stock[0] + x, oracle[0] + x.double())
    dw = torch.full_like(w, torch.nan, dtype=torch.float32)
    PLAN.conv2d_weight_grad(g, x, w, geometry, dw)
    close(dw, stock[1].float(), oracle[1])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_grad_update_is_the_gradient_and_the_optimizer(optimizer, name):
    from fastconv._plan.optim import PlannedOptimizer

    kind, options = OPTIMIZERS[optimizer]
    x, w, _, geometry = problem(name)
    mine, stock = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.clone())
    ours, theirs = kind([mine], **options), kind([stock], **options)
    planned = PlannedOptimizer(ours, [mine])
    half = torch.empty_like(mine, dtype=torch.bfloat16)
    for _ in range(3):
        g = torch.randn(F.conv2d(x, w, None, geometry[0:2], geometry[2:4], geometry[4:6], geometry[6]).shape)
        g = g.contiguous(memory_format=LAST)
        stock.grad = torch.empty_like(stock)
        PLAN.conv2d_weight_grad(g, x, w, geometry, stock.grad)
        theirs.step()
        planned.prepare()
        before = mine._version
        state, hyper = planned.state[id(mine)], planned.groups[0][2]
        PLAN.conv2d_weight_grad_update(g, x, w, geometry, mine.detach(), state, half, hyper, planned.kind, False)
        assert mine._version > before
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-6)
        assert torch.equal(half, mine.to(torch.bfloat16))
    for key, value in ours.state_dict()["state"].get(0, {}).items():
        torch.testing.assert_close(value, theirs.state_dict()["state"][0][key], rtol=1e-4, atol=1e-5)


def test_skipping_dead_taps_changes_nothing_without_decay_and_state():
    x, w, _, geometry = problem("one pixel")
    hyper, g = torch.tensor([0.1, 0.9, 0.0, 0.0]).double(), torch.randn(4, 64, 1, 1).contiguous(memory_format=LAST)
    results = []
    for skip in (False, True):
        mine, buffer = w.clone(memory_format=torch.preserve_format), torch.zeros_like(w)
        for _ in range(2):
            PLAN.conv2d_weight_grad_update(g, x, mine, geometry, mine, [buffer], None, hyper, "sgd", skip)
        results.append((mine, buffer))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], w)
    if _ext.build_info()["cpu_isa"] in ("portable", "avx2"):
        return  # this shape's gradient is stock's, and updated whole
    buffer = torch.ones_like(w)  # and with state it does: so the plan has to look
    PLAN.conv2d_weight_grad_update(g, x, mine, geometry, mine, [buffer], None, hyper, "sgd", True)
    assert torch.equal(buffer[:, :, 0, 0], torch.ones(64, 64)) and not torch.equal(
        buffer[:, :, 1, 1], torch.ones(64, 64)
    )


def test_update_takes_gradients_in_any_layout_and_dtype():
    p = torch.randn(4, 8, 3, 3).contiguous(memory_format=LAST)
    expected = p - 0.5 * torch.ones_like(p)
    PLAN.update(
        [p], [torch.ones(4, 8, 3, 3, dtype=torch.bfloat16)], [], 0, [], torch.tensor([0.5, 0, 0, 0]).double(), "sgd", []
    )
    assert torch.equal(p, expected)


def test_bad_arguments_name_themselves():
    x, w, _, geometry = problem("3x3")
    out = torch.empty(2, 64, 6, 6).contiguous(memory_format=LAST)
    call = [x, w, None, None, None, None, None, geometry, "relu", None, out]

    def message(error, position, value):
        with pytest.raises(error) as caught:
            PLAN.conv2d(*call[:position], value, *call[position + 1 :])
        return str(caught.value)

    assert "input expected a channels_last" in message(RuntimeError, 0, torch.randn(2, 32, 6, 6))
    assert "packed expected" in message(RuntimeError, 2, torch.zeros(3, dtype=torch.uint8))
    assert "geometry expected 7" in message(RuntimeError, 7, geometry[:6])
    assert "activation expected" in message(ValueError, 8, "mish")
    assert "output expected size" in message(RuntimeError, 10, x)
    hyper = torch.zeros(4, dtype=torch.double)
    with pytest.raises(RuntimeError, match="state expected"):
        PLAN.update([w], [w], [w, w], 2, [], hyper, "sgd", [])
    with pytest.raises(ValueError, match="optimizer expected sgd or adam"):
        PLAN.update([w], [w], [], 0, [], hyper, "lion", [])
    with pytest.raises(RuntimeError, match="like the weight"):
        PLAN.update([w], [w], [w.contiguous()], 1, [], hyper, "sgd", [])


def test_program_binds_values_slots_and_lists():
    build = Builder()
    entry = build.slot()
    doubled = build.returning("aten::add.Tensor", [entry, entry, 1])
    both = build.returning("aten::cat", [[entry, doubled], 0])
    program = build.finish()
    for value in (torch.ones(2), torch.full((3,), 5.0)):
        program.put(entry.index, value)
        program.run()
        assert torch.equal(program.get(both.index), torch.cat([value, 2 * value]))
    assert program.size() == 2


def test_program_runs_in_parts_and_lets_go_of_what_it_was_given():
    build = Builder()
    entry, grad = build.slot(), build.slot()
    both = build.returning("aten::cat", [[entry, entry], 0])
    cut = len(build.calls)
    last = build.returning("aten::mul.Tensor", [both, grad])
    program = build.finish()
    value = torch.ones(2)
    program.put_all([entry.index], [value])
    program.run_part(0, cut)
    with pytest.raises(RuntimeError):
        program.get(last.index)  # the second part has not run
    (kept,) = program.get_all([both.index])
    program.clear()
    end = weakref.ref(value.untyped_storage())
    del value
    assert end() is None  # nor does a list that a call is bound to hold it
    program.put_all([both.index, grad.index], [kept, torch.full((4,), 3.0)])
    program.run_part(cut, 2)
    assert torch.equal(program.get_all([last.index])[0], torch.full((4,), 3.0))


def test_program_refuses_what_does_not_fit():
    program = torch.classes.fastconv.Program(1)
    with pytest.raises(RuntimeError, match="expected 1 arguments, got 2"):
        program.call("aten::relu", "", [torch.ones(1), 1], [], [])
    with pytest.raises(IndexError, match="slot expected below 1, got 7"):
        program.put(7, torch.ones(1))
    with pytest.raises(IndexError):
        program.call("aten::relu", "", [None], [3, -1, 0], [0])
    with pytest.raises(RuntimeError):
        program.call("aten::no_such_operator", "", [], [], [])
    with pytest.raises(IndexError, match="slot expected below 1, got 1"):
        program.put_all([0, 1], [torch.ones(1)] * 2)
    with pytest.raises(RuntimeError, match="values expected 1, got 0"):
        program.put_all([0], [])
    with pytest.raises(IndexError, match="slot expected below 1, got -1"):
        program.get_all([-1])
    for first, end in ((0, 1), (-1, 0), (1, 0)):
        with pytest.raises(IndexError, match=f"calls expected within 0, got {first} to {end}"):
            program.run_part(first, end)


def test_buffers_that_live_together_share_no_memory():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        buffers = []
        for _ in range(30):
            first, life, size = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(3))
            buffers.append(Buffer((16 * size,), torch.float32, first, first + life))
        arena = lay_out(copy.copy(buffers))
        for i, a in enumerate(buffers):
            assert a.offset % 64 == 0 and a.offset + a.nbytes <= arena
            for b in buffers[:i]:
                apart = a.last < b.first or b.last < a.first
                assert apart or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
        assert arena < sum(b.nbytes for b in buffers), "nothing was shared"
