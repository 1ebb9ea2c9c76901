"""What is changed on a fused model after fuse() takes effect: weights, modules, attributes, hooks, forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from fuse_models import Block, Doubled, Net, Residual, X, iadd
from fuse_util import assert_close, assert_same, image, left, one_thread, patterns  # noqa: F401
from torch import nn

import fastconv

# Changes after fuse().


def test_weights_take_effect(net: nn.Module) -> None:
    fused = fastconv.fuse(net).eval()
    before = fused(image(*X))
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(1.5)
    fused.blocks[0].bn1.weight = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    fused.blocks[0].bn1.running_mean = torch.ones(4, dtype=torch.float64)
    stock = Net().double().eval()
    stock.load_state_dict(fused.state_dict())
    assert_close(fused(image(*X)), stock(image(*X)), 1e-9)
    assert not torch.allclose(fused(image(*X)), before)


REPLACEMENTS = {
    "conv1": [nn.Conv2d(4, 4, 5, padding=2), Doubled(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())],
    "bn1": [nn.BatchNorm2d(4, momentum=None), nn.Identity(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)],
    "relu": [nn.SiLU(), nn.ELU(), nn.LeakyReLU(0.3), nn.GELU(approximate="tanh"), nn.Hardswish()],
    "downsample": [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Identity()],
}


@pytest.mark.parametrize(("name", "module"), [(k, m) for k, ms in REPLACEMENTS.items() for m in ms])
def test_replaced_modules_take_effect(net: nn.Module, name: str, module: nn.Module) -> None:
    stock, fused = copy.deepcopy(net), fastconv.fuse(net)
    old = getattr(fused.blocks[0], name)
    for new in (module, old):
        for m in (fused, stock):
            setattr(m.blocks[0], name, copy.deepcopy(new).double() if new is not None else None)
            m.zero_grad()
        got, wanted = fused(image(*X)), stock(image(*X))
        assert_close(got, wanted, 1e-9)
        got.sum().backward()
        wanted.sum().backward()
        for p, q in zip(fused.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
        for p, q in zip(fused.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_structure_changes_take_effect(net: nn.Module) -> None:
    fused = fastconv.fuse(net).eval()
    stock = Net().double().eval()
    stock.load_state_dict(net.state_dict())
    extra = Block().double().eval()
    steps = [
        lambda m: m.tail.append(copy.deepcopy(extra)),
        lambda m: m.blocks.append(copy.deepcopy(extra)),
        lambda m: m.blocks.insert(0, copy.deepcopy(extra)),
        lambda m: m.tail.__delitem__(0),
        lambda m: m.blocks.pop(1),
        lambda m: m.blocks[0].register_module("extra", nn.Identity()),
        lambda m: m.blocks.__setitem__(0, nn.Identity()),
    ]
    for i, step in enumerate(steps):
        step(fused)
        step(stock)
        assert_close(fused(image(*X)), stock(image(*X)), 1e-9)
        assert [n for n, _ in fused.named_modules()] == [n for n, _ in stock.named_modules()], i


def test_attributes_take_effect() -> None:
    class Model(Block):
        scale = 2

        def forward(self, x):
            out = self.relu(self.bn1(self.conv1(x)))
            return out * self.scale if self.scale != 1 else out + x

    model = Model().double()
    stock, fused = copy.deepcopy(model), fastconv.fuse(model)
    for scale in (3, 1, 2.5):
        stock.scale = fused.scale = scale
        assert_close(fused(image(2, 4, 5, 5)), stock(image(2, 4, 5, 5)), 1e-9)
    assert patterns(fused) == ["conv+bn+relu"]
    del stock.scale, fused.scale
    assert_close(fused(image(2, 4, 5, 5)), stock(image(2, 4, 5, 5)), 1e-9)


def test_other_attributes_do_not_cost_a_trace(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, calls = fastconv.fuse(net), []
    plain = fastconv._fuse.module.refresh
    monkeypatch.setattr(fastconv._fuse.module, "refresh", lambda m: calls.append(type(m).__name__) or plain(m))
    fused.blocks[0].register_forward_hook(lambda m, i, o: setattr(m, "seen", o))
    fused.epoch = 3
    fused.train().eval()
    for _ in range(2):
        fused(image(*X))
    assert calls == [] and fused.blocks[0].seen.shape[0] == 2
    fused.blocks[0].relu = nn.SiLU()
    fused(image(*X))
    assert calls == ["FusedBlock"]


def test_forward_that_reads_its_own_dict() -> None:
    class Model(Block):
        def forward(self, x):
            return self.relu(self.bn1(self.conv1(x))) * self.__dict__.get("scale", 1)

    fused = fastconv.fuse(Model().double())
    before = fused(image(2, 4, 5, 5))
    fused.scale = 3
    assert_close(fused(image(2, 4, 5, 5)), 3 * before, 1e-9)


def test_layer_attributes_take_effect(net: nn.Module) -> None:
    stock, fused = copy.deepcopy(net), fastconv.fuse(net)
    for m in (stock, fused):
        block = m.blocks[0]
        block.bn1.eps, block.bn1.momentum, block.bn2.affine = 0.5, 0.7, False
        block.conv1.padding, block.conv1.dilation = (2, 2), (2, 2)
    assert_close(fused(image(*X)), stock(image(*X)), 1e-9)
    assert_close(fused.blocks[0].bn1.running_var, stock.blocks[0].bn1.running_var, 1e-9)


# Hooks.


def test_hooks_on_containers_fire(net: nn.Module) -> None:
    fused, seen = fastconv.fuse(net), []
    handles = [
        m.register_forward_hook(lambda m, i, o, n=n: seen.append(n))
        for n, m in fused.named_modules()
        if list(m.children())
    ]
    fused(image(*X))
    assert seen == ["stem", "blocks.0", "blocks.1", "blocks", "tail.0", "tail.1", ""]
    seen.clear()
    net(image(*X))
    assert seen == []  # registered on the fused model alone
    for handle in handles:
        handle.remove()
    fused(image(*X))
    assert seen == []
    pre = fused.blocks[0].register_forward_pre_hook(lambda m, i: (i[0] * 0,))
    full = fused.blocks[1].register_full_backward_hook(lambda m, gi, go: seen.append(gi[0].shape))
    fused(image(*X)).sum().backward()
    assert len(seen) == 1
    pre.remove()
    full.remove()
    assert fastconv.fusion_report(fused).left == []


def test_hooks_from_before_fuse_fire_on_both() -> None:
    model, seen = nn.Sequential(Residual(iadd, nn.ReLU())).double(), []
    handle = model[0].register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    fused = fastconv.fuse(model)
    fused(image(2, 4, 5, 5))
    model(image(2, 4, 5, 5))
    assert seen == ["FusedResidual", "Residual"]
    handle.remove()  # from the model it was registered on
    model(image(2, 4, 5, 5))
    assert len(seen) == 2


@pytest.mark.parametrize("member", ["conv1", "bn1", "relu"])
@pytest.mark.parametrize(
    "register",
    ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"],
)
def test_hooks_on_members_registered_later(net: nn.Module, member: str, register: str) -> None:
    stock = copy.deepcopy(net)
    fused, calls = fastconv.fuse(net), []
    module = getattr(fused.blocks[0], member)
    stock.blocks[0].relu.inplace = fused.blocks[0].relu.inplace = False  # backward hooks forbid writes in place
    handle = getattr(module, f"register_{register}")(lambda *args: calls.append(1))
    got = fused(image(*X))
    got.sum().backward()
    assert len(calls) == (2 if member == "relu" else 1)
    assert_close(got, stock(image(*X)), 1e-9)
    handle.remove()
    fused(image(*X)).sum().backward()
    assert len(calls) == (2 if member == "relu" else 1)
    assert fused.blocks[0].bn1.num_batches_tracked == 2


def test_hooks_on_members_registered_before(net: nn.Module) -> None:
    net.blocks[0].conv1.register_forward_hook(lambda m, i, o: o * 3)
    net.blocks[1].bn2.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    fused = assert_same(net, image(*X))
    reasons = left(fused)
    assert reasons == {"blocks.0.conv1": "has hooks", "blocks.1.bn2": "has hooks"}
    assert {"bn+relu", "conv"} <= set(patterns(fused))


def test_global_hooks_see_every_module(net: nn.Module) -> None:
    fused, seen = fastconv.fuse(net), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        fused(image(*X))
    finally:
        handle.remove()
    assert all(m in seen for m in fused.modules() if not isinstance(m, nn.ModuleList))


def test_forward_replaced_on_a_member(net: nn.Module) -> None:
    fused = fastconv.fuse(net).eval()
    conv = fused.blocks[0].conv1
    before, plain = fused(image(*X)), conv.forward
    conv.forward = lambda x: 2 * plain(x)
    changed = fused(image(*X))
    assert not torch.allclose(before, changed)
    assert left(fastconv.fuse(fused))["blocks.0.conv1"] == "has its forward replaced"
    del conv.forward
    assert_close(fused(image(*X)), before, 0)
    fused.blocks[0].forward = lambda x: x
    assert not torch.allclose(fused(image(*X)), before)
