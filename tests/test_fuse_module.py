"""The fused model as a module: structure, sharing, hooks, changes after fuse(), copies, and what is left alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_fuse import Residual, assert_close, assert_same, iadd, image, left, one_thread, patterns  # noqa: F401
from torch import Tensor, nn

import fastconv
from fastconv._fuse.module import FusedMixin


class Block(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.tail = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        for block in self.tail:
            x = block(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


X = (2, 3, 9, 8)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().double()


def test_structure(net: nn.Module) -> None:
    layers = {name: m for name, m in net.named_modules() if not list(m.children())}
    fused = fastconv.fuse(net)
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in net.named_modules()]
    for name, module in fused.named_modules():
        twin = net.get_submodule(name)
        assert isinstance(module, type(twin))
        if name in layers:
            assert module is layers[name]
    for got, wanted in (
        (fused.named_parameters(), net.named_parameters()),
        (fused.named_buffers(), net.named_buffers()),
    ):
        for (a, p), (b, q) in zip(got, wanted, strict=True):
            assert a == b and p is q
    assert isinstance(fused.blocks[1], Block) and type(fused.blocks[0]) is type(fused.blocks[1])
    assert type(fused).__name__ == "FusedNet" and "FusedBlock" in repr(fused)
    assert isinstance(fused.blocks[0], FusedMixin) and not isinstance(net.blocks[0], FusedMixin)
    assert_same(net, image(*X))


def test_blocks_are_callable_alone(net: nn.Module) -> None:
    stock, fused = copy.deepcopy(net), fastconv.fuse(net)
    x = image(2, 4, 6, 6)
    for get in (lambda m: m.blocks, lambda m: m.blocks[0], lambda m: m.tail[1], lambda m: m.blocks[1:]):
        assert_close(get(fused)(x), get(stock)(x), 1e-9)
    assert len(fused.blocks[1:]) == 1 and fused.blocks[1:][0] is fused.blocks[1]


def test_inplace(net: nn.Module) -> None:
    stock, block = copy.deepcopy(net), net.blocks[0]
    assert fastconv.fuse(net, inplace=True) is net
    assert net.blocks[0] is block and isinstance(block, FusedMixin)
    assert_close(net(image(*X)), stock(image(*X)), 1e-9)


def test_original_stays_stock(net: nn.Module) -> None:
    types = {name: type(m) for name, m in net.named_modules()}
    dicts = {name: set(m.__dict__) for name, m in net.named_modules()}
    fused = fastconv.fuse(net)
    assert {name: type(m) for name, m in net.named_modules()} == types
    assert {name: set(m.__dict__) for name, m in net.named_modules()} == dicts
    # Dtype, weights and statistics are one and the same.
    fused.float()
    assert net.head.weight.dtype is torch.float32 and net.stem[1].running_mean.dtype is torch.float32
    with torch.no_grad():
        net.stem[0].weight.zero_()
    assert fused.stem[0].weight.sum() == 0


def test_idempotent(net: nn.Module) -> None:
    fused = fastconv.fuse(net)
    before = str(fastconv.fusion_report(fused))
    assert fastconv.fuse(fused) is fused
    assert fastconv.fuse(fused, inplace=True) is fused
    assert str(fastconv.fusion_report(fused)) == before
    other = fastconv.fuse(fused, memory_format=torch.preserve_format)
    assert other is not fused and str(fastconv.fusion_report(other)) == before
    # A stock block put in later is fused by the next call; the rest stays.
    fused.blocks[0] = Block().double()
    again = fastconv.fuse(fused)
    assert isinstance(again.blocks[0], FusedMixin) and not isinstance(fused.blocks[0], FusedMixin)
    assert again.blocks[1] is fused.blocks[1]


def test_containers_without_groups_are_shared() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    fused = fastconv.fuse(model)
    assert fused[0] is not model[0] and fused[1] is model[1]


def test_shared_containers_stay_shared() -> None:
    block = Block()
    model = nn.Sequential(block, nn.Sequential(block)).double()
    fused = assert_same(model, image(2, 4, 5, 5))
    assert fused[0] is fused[1][0] and isinstance(fused[0], FusedMixin)
    assert patterns(fused) == ["conv+bn+relu", "conv+bn+add+relu"]


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


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


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
    assert reasons == {
        "blocks.0.conv1": "has hooks",
        "blocks.1.conv2": "nothing to fuse: bn2 has hooks",
        "blocks.1.bn2": "has hooks",
    }
    assert "bn+relu" in patterns(fused)


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


# Copies.


def round_trip(fused: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(fused)
    if how == "pickle":
        return pickle.loads(pickle.dumps(fused))
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.preserve_format])
def test_copies(net: nn.Module, how: str, memory_format: torch.memory_format) -> None:
    fused = fastconv.fuse(net, memory_format=memory_format)
    twin = round_trip(fused, how)
    assert type(twin) is type(fused) and str(fastconv.fusion_report(twin)) == str(fastconv.fusion_report(fused))
    assert twin.blocks[0].conv1 is not fused.blocks[0].conv1
    assert_close(twin(image(*X)), fused(image(*X)), 0)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert fused.head.weight.abs().sum() > 0
    assert fastconv.fuse(twin, memory_format=memory_format) is twin
    assert type(copy.copy(fused)) is type(fused)


def test_pickle_holds_no_generated_code(net: nn.Module) -> None:
    data = pickle.dumps(fastconv.fuse(net))
    assert b"conv_bn_act" not in data and b"Plan" not in data


def test_averaged_model_and_functional_call(net: nn.Module) -> None:
    fused = fastconv.fuse(net).eval()
    average = torch.optim.swa_utils.AveragedModel(fused)
    average.update_parameters(fused)
    assert_close(average(image(*X)), fused(image(*X)), 1e-12)
    halved = {k: v * 0.5 if v.is_floating_point() else v for k, v in fused.state_dict().items()}
    stock = Net().double().eval()
    stock.load_state_dict(halved)
    assert_close(torch.func.functional_call(fused, halved, (image(*X),)), stock(image(*X)), 1e-9)


def test_to_dtype_and_layout(net: nn.Module) -> None:
    stock, fused = copy.deepcopy(net), fastconv.fuse(net)
    for change in (lambda m: m.float(), lambda m: m.to(memory_format=torch.contiguous_format), lambda m: m.bfloat16()):
        change(stock)
        change(fused)
        x = image(*X).to(stock.head.weight.dtype)
        assert_close(fused(x), stock(x), 1e-5 if x.dtype is torch.float32 else 5e-2)


# What is left alone, and why.


class Subclass(nn.BatchNorm2d):
    pass


def weight_normed() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))


def old_weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))


NOTHING = "nothing to fuse: no norm or activation follows"
LEFT = {
    "subclass": ([nn.Conv2d(4, 4, 1), Subclass(4), nn.ReLU()], {
        "0": "nothing to fuse: 1 is a Subclass, not a plain BatchNorm2d",
        "1": "is a Subclass, not a plain BatchNorm2d"}),
    "convolution subclass": ([Doubled(4, 4, 1), nn.ReLU()], {"0": "is a Doubled, not a plain Conv2d"}),
    "transposed": ([nn.ConvTranspose2d(4, 4, 2), nn.ReLU()], {"0": "is a ConvTranspose2d, not a plain Conv2d"}),
    "parametrized": ([weight_normed, nn.ReLU()], {"0": "has parametrizations"}),
    "old weight norm": ([old_weight_normed, nn.ReLU()], {"0": "has hooks"}),
    "instance norm": ([nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4), nn.ReLU()], {
        "0": NOTHING, "1": "is a InstanceNorm2d, which fuse() has no group for"}),
    "alone": ([nn.Conv2d(4, 4, 1), nn.Flatten()], {"0": NOTHING}),
    "other activation": ([nn.Conv2d(4, 4, 1), nn.Softplus()], {"0": NOTHING}),
    "scripted": ([scripted], {"0": "is a ScriptModule"}),
    "graph module": ([traced], {"0": "is a torch.fx.GraphModule, whose forward is generated from its own graph"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    layers, reasons = LEFT[case]
    layers = [layer() if not isinstance(layer, nn.Module) else copy.deepcopy(layer) for layer in layers]
    model = nn.Sequential(nn.Sequential(*layers)).double()
    assert fastconv.fuse(model) is model
    found = {name.removeprefix("0."): reason for name, reason in left(model).items()}
    assert {k: found[k] for k in reasons} == reasons
    # The same layers beside some that are fused: equal to stock.
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(*layers)).double()
    stock, fused = model, fastconv.fuse(model)
    assert patterns(fused) == ["conv+bn+relu"]
    assert_close(fused.eval()(image(2, 4, 6, 6)), stock.eval()(image(2, 4, 6, 6)), 1e-9)


def test_sync_batch_norm(net: nn.Module) -> None:
    fused = fastconv.fuse(net).eval()
    wanted = fused(image(*X))
    before = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net).eval())
    assert left(fastconv.fuse(before))["stem.1"] == "is a SyncBatchNorm, not a plain BatchNorm2d"
    after = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert type(after.blocks[0].bn1) is nn.SyncBatchNorm
    for model in (fastconv.fuse(before), after):
        assert_close(model(image(*X)), wanted, 1e-9)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    assert fastconv.fuse(model) is model
    assert left(model)["0"] == "is lazy and not initialised yet"
    model(image(2, 3, 4, 4).float())
    assert patterns(assert_same(model.double(), image(2, 3, 4, 4))) == ["conv+bn+relu"]


def test_shared_layers() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
            self.twice, self.again = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.alias = self.again

        def forward(self, x):
            x = self.relu(self.bn(self.conv(x)))
            x = self.relu(self.bn(self.conv(x)))
            return self.relu(self.again(x)) + self.relu(self.twice(x))

    fused = assert_same(Model().double(), image(2, 4, 5, 5))
    assert patterns(fused) == ["bn+relu"]
    assert left(fused) == {
        "conv": "is called more than once",
        "bn": "is called more than once",
        "again": "is registered in 2 places",
    }


def test_calls_with_keywords() -> None:
    class Model(Block):
        def forward(self, x):
            return self.relu(self.bn1(input=self.conv1(x))) + F.relu(self.conv2(input=x))

    fused = assert_same(Model().double(), image(2, 4, 5, 5))
    assert left(fused)["conv2"] == "is called with other arguments than one input"
    assert patterns(fused) == []


# Through PyTorch.


def test_autocast(net: nn.Module) -> None:
    net.float()
    stock, fused = copy.deepcopy(net), fastconv.fuse(net)
    x = image(*X).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(fused(x), stock(x), 5e-2)
        # A residual that autocast does not cast: the sum is float32 in stock PyTorch, and here.
        model = Residual(lambda y, x: x + y, torch.tanh)
        assert fastconv.fuse(model)(image(2, 4, 5, 5).float()).dtype is torch.float32


def test_fx_and_jit_see_the_fused_model(net: nn.Module) -> None:
    fused = fastconv.fuse(net).eval()
    assert_close(torch.fx.symbolic_trace(fused)(image(*X)), fused(image(*X)), 1e-9)


def test_requires_grad_and_checkpointing(net: nn.Module) -> None:
    stock, fused = copy.deepcopy(net), fastconv.fuse(net)
    for m in (stock, fused):
        m.eval()
        m.stem.requires_grad_(False)
        torch.utils.checkpoint.checkpoint(m, image(*X), use_reentrant=False).sum().backward()
    for p, q in zip(fused.parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
