"""The fused model as a module: structure, sharing, copies, what is left alone, autocast and torch.fx."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from fuse_models import Block, Doubled, Net, Residual, X
from fuse_util import assert_close, assert_same, image, left, one_thread, patterns  # noqa: F401
from torch import nn

import fastconv
from fastconv._fuse.module import FusedMixin


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


LEFT = {
    "subclass": ([Subclass(4), nn.ReLU()], {"0": "is a Subclass, not a plain BatchNorm2d"}),
    "convolution subclass": ([Doubled(4, 4, 1), nn.ReLU()], {"0": "is a Doubled, not a plain Conv2d"}),
    "transposed": ([nn.ConvTranspose2d(4, 4, 2), nn.ReLU()], {"0": "is a ConvTranspose2d, not a plain Conv2d"}),
    "parametrized": ([weight_normed, nn.ReLU()], {"0": "has parametrizations"}),
    "old weight norm": ([old_weight_normed, nn.ReLU()], {"0": "has hooks"}),
    "instance norm": ([nn.InstanceNorm2d(4), nn.ReLU()], {"0": "is a InstanceNorm2d, which fuse() has no group for"}),
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


# A layer that nothing follows is a group too: the kernel is the layer's, gradients included.
ALONE = {
    "convolution": ([nn.Conv2d(4, 4, 3, padding=1), nn.Flatten()], ["conv"]),
    "depthwise convolution": ([nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.GroupNorm(2, 4)], ["conv"]),
    "other activation": ([nn.Conv2d(4, 4, 1, bias=False), nn.Softplus()], ["conv"]),
    "other norm": ([nn.Conv2d(4, 4, 1), Subclass(4), nn.ReLU()], ["conv"]),
    "batch norm": ([nn.BatchNorm2d(4), nn.Softplus(), nn.BatchNorm2d(4, affine=False)], ["bn", "bn"]),
    "written to": ([nn.Conv2d(4, 4, 1), nn.ELU(inplace=True), nn.BatchNorm2d(4), nn.ELU(inplace=True)], ["conv", "bn"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
def test_layers_alone(case: str) -> None:
    layers, wanted = ALONE[case]
    model = nn.Sequential(nn.Sequential(*map(copy.deepcopy, layers))).double()
    assert patterns(assert_same(model, image(3, 4, 6, 5))) == wanted


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
    assert patterns(fused) == ["conv"]


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
