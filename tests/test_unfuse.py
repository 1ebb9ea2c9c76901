"""unfuse(): the stock model back, and what PyTorch's own tools do to a fused one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from fuse_models import Block, Net, X
from fuse_util import assert_close, image, one_thread  # noqa: F401
from torch import nn

import fastconv
from fastconv._fuse.module import FusedMixin


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in model.named_modules()}


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(m.__dict__) for name, m in model.named_modules()}


def is_stock(model: nn.Module, like: nn.Module) -> bool:
    return classes(model) == classes(like) and attributes(model) == attributes(like)


@pytest.mark.parametrize("inplace", [False, True])
def test_stock_again(net: nn.Module, inplace: bool) -> None:
    like = copy.deepcopy(net)
    fused = fastconv.fuse(net)
    fused(image(*X)).sum().backward()  # a step of its running statistics stays
    tensors = dict(fused.state_dict(keep_vars=True))
    stock = fastconv.unfuse(fused, inplace)
    assert (stock is fused) == inplace and is_stock(stock, like)
    assert isinstance(fused.blocks[0], FusedMixin) != inplace
    for name, tensor in stock.state_dict(keep_vars=True).items():
        assert tensor is tensors[name]
    assert stock.stem[1].num_batches_tracked == 1
    assert fastconv.fusion_report(stock).fused == 0
    like.load_state_dict(stock.state_dict())
    for mode in (True, False):
        assert torch.equal(stock.train(mode)(image(*X)), like.train(mode)(image(*X)))
    again = fastconv.fuse(stock)
    assert fastconv.fusion_report(again).fused == fastconv.fusion_report(fastconv.fuse(net)).fused


def test_runs_no_fused_operator(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = fastconv.unfuse(fastconv.fuse(net))
    for name in ("conv2d_bn_act", "conv2d_bias_act", "batch_norm_act", "adaptive_avg_pool2d"):
        monkeypatch.setattr(fastconv.functional, name, None)
    stock(image(*X))


def through_bytes(model: nn.Module, save, load) -> nn.Module:
    buffer = io.BytesIO()
    save(model, buffer)
    buffer.seek(0)
    return load(buffer)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": lambda m: through_bytes(m, torch.save, lambda b: torch.load(b, weights_only=False)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(net: nn.Module, how: str) -> None:
    fused = fastconv.fuse(net)
    stock = fastconv.unfuse(COPIES[how](fused))
    assert is_stock(stock, net)
    assert_close(stock(image(*X)), net(image(*X)), 1e-9)


def test_parts_and_wrappers(net: nn.Module) -> None:
    fused = fastconv.fuse(net)
    block = fastconv.unfuse(fused.blocks[0])
    assert type(block) is Block and block.conv1 is fused.blocks[0].conv1 and isinstance(fused.blocks[0], FusedMixin)
    wrapped = nn.Sequential(nn.Identity(), nn.ModuleDict({"net": fused}))
    assert is_stock(fastconv.unfuse(wrapped)[1]["net"], net)
    shared = fastconv.fuse(nn.Sequential(net.blocks[0], nn.Sequential(net.blocks[0])))
    stock = fastconv.unfuse(shared)
    assert stock[0] is stock[1][0] and type(stock[0]) is Block
    # What was registered on a fused container is kept.
    fired = []
    fused.blocks[1].register_forward_hook(lambda *_: fired.append(1))
    fastconv.unfuse(fused)(image(*X))
    assert fired == [1]


def test_models_never_fused(net: nn.Module) -> None:
    for model in (net, nn.Linear(2, 2), nn.Conv2d(1, 1, 1), torch.jit.script(nn.Sequential(nn.ReLU()))):
        assert fastconv.unfuse(model) is model and fastconv.unfuse(model, inplace=True) is model
    with pytest.raises(TypeError, match=r"unfuse: model expected torch\.nn\.Module, got str"):
        fastconv.unfuse("resnet")


class Viewed(Net):
    def forward(self, x):
        y = self.blocks(self.stem(x))
        return y.view(y.size(0), -1)


def test_weights_get_their_layout_back() -> None:
    """A stock model that calls view() does not run on channels_last weights."""
    model = Viewed().double()
    wanted = model(image(*X))
    fastconv.fuse(model, inplace=True)
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    copied = copy.deepcopy(model)  # what was converted is known to copies as well
    for m in (model, copied):
        fastconv.unfuse(m, inplace=True)
        assert m.stem[0].weight.is_contiguous()
        assert_close(m(image(*X)), wanted, 1e-9)
    # Weights that were channels_last before stay so.
    mine = Net().double().to(memory_format=torch.channels_last)
    fastconv.unfuse(fastconv.fuse(mine, inplace=True), inplace=True)
    assert mine.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    # A layer that was taken out of the model since, or has no weight any more, is passed over.
    fused = fastconv.fuse(Net().double())
    fused.stem[0], fused.blocks[0].conv1 = nn.Identity(), nn.Identity()
    del fused.tail[1]
    assert type(fastconv.unfuse(fused)) is Net


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.scale = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))) * self.scale


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def test_container_parametrized_after_fuse() -> None:
    stock = Scaled().double()
    fused = fastconv.fuse(stock, inplace=True)
    nn.utils.parametrize.register_parametrization(fused, "scale", Doubling())
    wanted = fused(image(*X))
    fastconv.unfuse(fused, inplace=True)
    assert isinstance(fused, Scaled) and not isinstance(fused, FusedMixin)
    assert_close(fused(image(*X)), wanted, 1e-9)
    assert torch.equal(fused.scale, torch.full((4, 1, 1), 2.0, dtype=torch.float64))
    nn.utils.parametrize.remove_parametrizations(fused, "scale")
    assert type(fused) is Scaled


def test_saved_stock_model_loads_without_fastconv(tmp_path) -> None:
    import torchvision

    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 2).eval()
    torch.save(fastconv.unfuse(fastconv.fuse(model)), tmp_path / "model.pt")
    code = f"""
import sys, torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(model(torch.ones(1, 3, 32, 32)).shape, "fastconv" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "torch.Size([1, 2]) False"


# What PyTorch's own tools do to a fused model.


def test_half(net: nn.Module) -> None:
    x = image(*X)
    fused = fastconv.fuse(net).eval()
    wanted = fused(x)
    for dtype, rtol in ((torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        model = copy.deepcopy(fused)
        assert (model.half() if dtype is torch.float16 else model.bfloat16()) is model
        assert {t.dtype for t in model.state_dict().values()} == {dtype, torch.int64}
        got = model(x.to(dtype))
        assert got.dtype is dtype and fastconv.fusion_report(model).fused == fastconv.fusion_report(fused).fused
        torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())


def test_device_and_layout(net: nn.Module) -> None:
    fused, x = fastconv.fuse(net).eval(), image(*X)
    wanted = fused(x)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        assert fused.to("cpu", memory_format=memory_format) is fused
        assert fused.blocks[0].conv1.weight.is_contiguous(memory_format=memory_format)
        assert_close(fused(x), wanted, 1e-9)
    empty = copy.deepcopy(fused).to("meta")
    assert empty(x.to("meta")).shape == wanted.shape
    back = empty.to_empty(device="cpu")
    back.load_state_dict(fused.state_dict())
    assert_close(back(x), wanted, 1e-9)


def test_requires_grad(net: nn.Module) -> None:
    fused, stock = fastconv.fuse(copy.deepcopy(net)), net
    for model in (fused, stock):
        model.requires_grad_(False)
        model.tail[1].bn2.requires_grad_()
        model.blocks[0].conv1.weight.requires_grad_()
        model(image(*X)).square().sum().backward()
    for (name, got), wanted in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None:
            assert_close(got.grad, wanted.grad, 1e-7)


def test_clip_grad_norm(net: nn.Module) -> None:
    norms, models = [], [fastconv.fuse(copy.deepcopy(net)), net]
    for model in models:
        (model(image(*X)).square().sum() * 100).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
    assert_close(norms[0], norms[1], 1e-9)
    for got, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (got.grad - wanted.grad).abs().max() <= 1e-9


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(net: nn.Module, use_buffers: bool) -> None:
    """An exponential moving average over SGD steps, then update_bn: equal to the stock model's."""
    averages = []
    for model in (fastconv.fuse(copy.deepcopy(net)), copy.deepcopy(net)):
        multi = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=multi, use_buffers=use_buffers)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for seed in range(3):
            optimizer.zero_grad()
            model(image(*X) + seed).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        torch.optim.swa_utils.update_bn([image(*X), image(*X) * 2], average)
        averages.append(average.eval())
    assert isinstance(averages[0].module, FusedMixin)
    assert_close(dict(averages[0].state_dict()), dict(averages[1].state_dict()), 1e-7)
    assert_close(averages[0](image(*X)), averages[1](image(*X)), 1e-7)
    assert is_stock(fastconv.unfuse(averages[0]), averages[1])


def test_optimizer_state_of_the_stock_model_continues(net: nn.Module) -> None:
    """fuse() and unfuse() in the middle of a training change no Parameter that an optimizer holds."""
    losses = {}
    for name, change in (("stock", lambda m: m), ("changed", None)):
        torch.manual_seed(1)
        model = copy.deepcopy(net)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        losses[name] = []
        for step in range(4):
            if change is None:
                model = (fastconv.fuse, fastconv.unfuse)[step % 2](model, step > 1)
            optimizer.zero_grad()
            loss = (model(image(*X)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.detach())
    assert_close(losses["changed"], losses["stock"], 1e-6)
