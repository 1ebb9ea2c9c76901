"""Where a training program's gradients lie: memory that is used again, and never while somebody holds it."""

from __future__ import annotations

import weakref

import pytest
import torch
from programs_util import batch, eager, in_threads, same, step
from torch import nn

import fastconv
from fastconv import _ext
from fastconv._plan import gradient_lowering

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


def large_net() -> nn.Module:
    """With a convolution of ATen's, one of the engine's and a linear layer whose gradients' memory is used again."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(),
        nn.Conv2d(128, 128, 5, groups=2, padding=2), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(512, 96), nn.ReLU(), nn.Linear(96, 5),
    )  # fmt: skip
    return fastconv.fuse(model, inplace=True)


@pytest.mark.parametrize("low", (False, True), ids=("fp32", "autocast"))
def test_gradients_that_nobody_holds_give_their_memory_to_the_next(low, trained):
    model = large_net()
    (x, y), (other, labels) = batch(), batch(2)
    weights = [p for p in model.parameters() if p.numel() >= gradient_lowering._LARGE]
    assert len(weights) == 3
    want = step(model, x, y, eager, low)[1]
    for _ in range(2):
        step(model, x, y, low=low)
        step(model, other, labels, low=low)
    first = [p.grad.data_ptr() for p in weights]
    for size in (4, 2, 4):  # of whatever shape
        got = step(model, x[:size], y[:size], low=low)[1]
        assert [p.grad.data_ptr() for p in weights] == first
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    held = [weights[0].grad, weights[1].grad[3:], weights[2].grad.numpy()]
    copies = [torch.as_tensor(h).clone() for h in held]
    step(model, x * 2, y, low=low)
    assert all(p.grad.data_ptr() != before for p, before in zip(weights, first, strict=True))
    assert all(torch.equal(torch.as_tensor(h), c) for h, c in zip(held, copies, strict=True))
    places = [weakref.ref(p.grad.untyped_storage()) for p in weights]
    del held
    model.zero_grad()
    assert all(place() is not None for place in places)
    model.eval()
    with torch.no_grad():
        model(x)  # between the epochs it is the system's
    assert all(place() is None for place in places)


def test_a_rounded_copy_of_a_weight_is_as_old_as_the_weight(trained):
    """Two forwards share it: the first one's backward is refused if the weight was changed between them."""
    model, x = large_net(), batch()[0]
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(x)
        first, second = model(x), model(x)
        twin = eager(model, x)
    grads = [torch.autograd.grad(out.float().sum(), list(model.parameters())) for out in (first, second, twin)]
    assert all(same(a, c) and same(b, c) for a, b, c in zip(*grads, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x)
        with torch.no_grad():
            model[10].weight.mul_(2.0)
        second = model(x)
    second.float().sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.float().sum().backward()
    assert len(trained) == 5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("groups, stride, size", ((1, 1, 4), (1, 2, 9), (2, 1, 8), (32, 1, 8)))
def test_conv2d_backward_into(groups, stride, size, dtype):
    x = torch.randn(4, 32, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(64, 32 // groups, 3, 3).to(memory_format=torch.channels_last)
    out = (size - 1) // stride + 1
    dy = torch.randn(4, 64, out, out, dtype=dtype).to(memory_format=torch.channels_last)
    where = [[stride] * 2, [1, 1], [1, 1], groups]
    dx, dw = torch.ops.fastconv.conv2d_backward(dy, x, w, *where, [True, True])
    for input_grad in (True, False):
        into = torch.full_like(w, float("nan"))
        got = torch.ops.fastconv_plan.conv2d_backward_into(dy, x, w, *where, input_grad, into)
        assert torch.equal(into, dw)
        assert torch.equal(got, dx) if input_grad else got.shape == (0,)
    run = torch.ops.fastconv_plan.conv2d_backward_into
    for wrong, message in (
        (torch.empty_like(w[:32]), "grad_weight expected"), (torch.empty_like(w).transpose(2, 3), "grad_weight"),
        (torch.empty_like(w, dtype=torch.float64), "grad_weight"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            run(dy, x, w, *where, True, wrong)
    with pytest.raises(RuntimeError, match="input expected with elements"):
        run(dy[:0], x[:0], w, *where, True, torch.empty_like(w))


def test_memory_that_is_used_again():
    like = [torch.empty(3, 4), torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    reused = torch.classes.fastconv.Reused(like)
    first = reused.take()
    assert [t.stride() for t in first] == [t.stride() for t in like]
    places = [t.data_ptr() for t in first]
    second = reused.take()
    assert not {t.data_ptr() for t in second} & set(places)
    del first
    held, places = second[0].view(12)[2:], [t.data_ptr() for t in second]
    del second
    third = [t.data_ptr() for t in reused.take()]
    assert third[0] != places[0] and third[1] == places[1] and held.numel() == 10
    shared = reused.take()[0].fill_(7.0)
    shared.share_memory_()  # as a queue between processes does: the other one may hold it longer
    place = shared.data_ptr()
    del shared
    assert reused.take()[0].data_ptr() != place
    weak = weakref.ref(reused.take()[0].untyped_storage())
    assert weak() is not None
    reused.clear()
    assert weak() is None


def test_threads_share_it(trained):
    """Each has data of its own, and gets the gradients of that."""
    model, pairs = large_net(), [batch(size) for size in (2, 3, 4, 5)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False  # or the order of the threads would count
            module.running_mean = module.running_var = module.num_batches_tracked = None
    weights = list(model.parameters())

    def gradients_of(call, x, y):
        return torch.autograd.grad(nn.functional.cross_entropy(call(x), y), weights)

    want = [gradients_of(lambda x: eager(model, x), *pair) for pair in pairs]
    for x, _ in pairs:
        model(x)
    wrong = []

    def work(pair, expected):
        for _ in range(20):
            got = gradients_of(model, *pair)
            if not all(same(a, b) for a, b in zip(got, expected, strict=True)):
                wrong.append(1)

    in_threads(work, *zip(pairs, want, strict=True))
    assert not wrong and len(trained) > 20
