"""fuse() around the layers that people put into CNNs: gates, stochastic depth, reparametrised, frozen, quantised ones."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from fuse_util import assert_close, assert_same, image, left, one_thread, patterns  # noqa: F401
from torch import Tensor, nn

import fastconv

X = (4, 4, 6, 5)


class ConvBnAct(nn.Module):
    """As in the YOLO and timm families: convolution, batch norm and an activation that is given or the default one."""

    default_act = nn.SiLU()

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = self.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C2f(nn.Module):
    """A cross-stage block: chunk, a growing list, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBnAct(4, 8), ConvBnAct(16, 4, act=False)
        self.m = nn.ModuleList(nn.Sequential(ConvBnAct(4, 4, 3), ConvBnAct(4, 4, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


def test_conv_bn_silu_blocks() -> None:
    """One SiLU object serves every block: an activation has no state, so sharing it costs nothing."""
    fused = assert_same(C2f().double(), image(*X))
    assert sorted(patterns(fused)) == ["conv+bn", *["conv+bn+silu"] * 5]
    # list(...) over a value of unknown length is what torch.fx cannot record; the blocks are fused all the same.
    assert list(left(fused)) == [""] and "cannot be iterated" in left(fused)[""]
    assert_same(C2f().double(), image(*X), defer_bn=True)


class Gated(nn.Module):
    def __init__(self, gate) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn(self.conv(x)))
        return x + y * self.gate(self.fc2(F.relu(self.fc1(self.pool(y)))))


@pytest.mark.parametrize(
    ("gate", "pattern"),
    [(nn.Sigmoid(), "conv+sigmoid"), (torch.sigmoid, "conv+sigmoid"), (nn.Hardsigmoid(), "conv"),
     (F.hardsigmoid, "conv"), (lambda x: x.add(3).clamp(0, 6).div(6), "conv"), (nn.Softmax(1), "conv")],
)  # fmt: skip
def test_squeeze_excite_gates(gate, pattern: str) -> None:
    fused = assert_same(Gated(gate).double(), image(*X))
    # A gate that no kernel has stays outside.
    assert patterns(fused) == ["conv+bn+relu6", "adaptive_avg_pool2d", "conv+relu", pattern]
    assert left(fused) == {}


def test_hardsigmoid_alone() -> None:
    for act in (nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True)):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), act, nn.Conv2d(4, 3, 1), nn.Hardsigmoid())
        fused = assert_same(model.double(), image(*X))
        assert patterns(fused) == ["conv+bn", "conv"] and left(fused) == {}


class DropPath(nn.Module):
    """timm's stochastic depth."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * mask.div_(1 - self.p)


class WithDrop(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), drop

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.bn(self.conv(x))) + x)


def drops() -> list[nn.Module]:
    found = [DropPath(0.5), nn.Dropout2d(0.5), nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), nn.AlphaDropout(0.3),
             nn.AlphaDropout(0.3, inplace=True)]  # fmt: skip
    try:
        from torchvision.ops import StochasticDepth

        found += [StochasticDepth(0.5, "row"), StochasticDepth(0.5, "batch")]
    except ImportError:
        pass
    return found


@pytest.mark.parametrize("drop", drops(), ids=lambda d: type(d).__name__)
def test_stochastic_depth_and_dropout(drop: nn.Module) -> None:
    """The same random state drops the same in both."""
    fused = assert_same(nn.Sequential(WithDrop(drop), WithDrop(copy.deepcopy(drop))).double(), image(*X))
    assert patterns(fused) == ["conv+bn", "conv+bn"]


@pytest.mark.parametrize("drop", [F.dropout, F.alpha_dropout])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_functions(drop, inplace: bool) -> None:
    class Model(WithDrop):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            z = drop(y, 0.4, self.training, inplace)
            return y + z * 2  # y was dropped as well if z is

    assert patterns(assert_same(Model(nn.Identity()).double(), image(*X))) == ["conv+bn"]


class AuxHead(nn.Module):
    """Another structure of results in training than in evaluation, and the loss in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = ConvBnAct(4, 4, 3), ConvBnAct(4, 4, 3)
        self.aux, self.head = nn.Conv2d(4, 3, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor, target: Tensor):
        y = self.stem(x)
        out = {"out": self.head(self.body(y).mean((2, 3)))}
        if self.training:
            out["aux"] = F.relu(self.aux(y)).mean((2, 3))
            out["loss"] = sum(F.cross_entropy(v, target, label_smoothing=0.1) for v in list(out.values()))
        return out


def test_aux_heads_and_a_loss_inside() -> None:
    fused = assert_same(AuxHead().double(), image(*X), torch.tensor([0, 2, 1, 2]))
    report = fastconv.fusion_report(fused)
    assert [(g.pattern, g.modes) for g in report.groups] == [
        ("conv+relu", ("train",)),
        ("conv+bn+silu", ("train", "eval")),
        ("conv+bn+silu", ("train", "eval")),
    ]


# Weights that are computed.


def reparametrised(how: str, layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return {
            "weight_norm": nn.utils.parametrizations.weight_norm,
            "spectral_norm": nn.utils.parametrizations.spectral_norm,
            "orthogonal": nn.utils.parametrizations.orthogonal,
            "old weight_norm": nn.utils.weight_norm,
            "old spectral_norm": nn.utils.spectral_norm,
        }[how](layer)


def steps(model: nn.Module) -> list[Tensor]:
    """Losses and the state after two steps of SGD."""
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(image(*X)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, model.eval()(image(*X)).detach(), *model.state_dict().values()]


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_reparametrised_weights(how: str, when: str) -> None:
    """Before fuse(): left alone, with the reason. After it: the group runs its layers one by one."""
    torch.manual_seed(2)
    stock = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Tanh()).double()
    fused = copy.deepcopy(stock)
    torch.manual_seed(3)
    if when == "before":
        fused = fastconv.fuse(nn.Sequential(reparametrised(how, fused[0]), *fused[1:]), inplace=True)
        assert left(fused)["0"] == ("has hooks" if "old" in how else "has parametrizations")
        assert patterns(fused) == ["conv+tanh", "bn+relu"] or patterns(fused) == ["bn+relu", "conv+tanh"]
    else:
        fastconv.fuse(fused, inplace=True)
        assert patterns(fused) == ["conv+bn+relu", "conv+tanh"]
        reparametrised(how, fused[0])
    torch.manual_seed(3)
    reparametrised(how, stock[0])
    if "spectral" in how:  # its power iteration starts from random vectors
        fused.load_state_dict(stock.state_dict())
    for got, wanted in zip(steps(fused), steps(stock), strict=True):
        assert_close(got, wanted, 1e-7)


# Norms that do not learn.


def test_frozen_batch_norm() -> None:
    misc = pytest.importorskip("torchvision.ops.misc", reason="torchvision is not installed")
    model = nn.Sequential(nn.Conv2d(4, 4, 3), misc.FrozenBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].weight.uniform_(0.5, 2)
    fused = assert_same(model.double(), image(*X))
    assert patterns(fused) == ["conv", "conv+relu"] and left(fused) == {}


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_norm_built_with_options(track: bool, affine: bool, momentum: float | None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.bn = nn.BatchNorm2d(4, momentum=momentum, affine=affine, track_running_stats=track)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.bn(self.conv(x)) + x)

    fused = assert_same(Model().double(), image(*X))
    assert patterns(fused) == ["conv+bn+add+silu"]
    assert_same(Model().double(), image(*X), defer_bn=True)


def test_output_of_a_norm_with_two_readers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.next = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return F.relu(self.next(y)) + F.gelu(y)

    fused = assert_same(Model().double(), image(*X))
    assert patterns(fused) == ["conv+bn", "conv+relu"]
    assert_same(Model().double(), image(*X), defer_bn=True)


# What is run by another engine.


def test_scripted_and_traced_parts() -> None:
    part = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parts = {"is a ScriptModule": torch.jit.script(part), "traced": torch.jit.trace(part, image(*X))}
    for inner in parts.values():
        stock = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), inner).double()
        fused = fastconv.fuse(stock)
        assert patterns(fused) == ["conv+relu"] and left(fused)["2"] == "is a ScriptModule"
        assert fused[2] is inner
        assert_close(fused(image(*X)), stock(image(*X)), 1e-9)
        unfused = fastconv.unfuse(fused)
        assert unfused[2] is inner and type(unfused) is nn.Sequential


def test_quantised_parts() -> None:
    class Mixed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.conv, self.bn, self.inner = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(F.relu(self.bn(self.conv(x))).mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inner = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})
        except RuntimeError as error:
            pytest.skip(f"no quantised engine: {error}")
        stock = Mixed(inner).eval()
        fused = fastconv.fuse(stock)
        assert patterns(fused) == ["conv+bn+relu"]
        assert_close(fused(image(*X).float()), stock(image(*X).float()), 1e-4)
        # Prepared for quantisation-aware training: fake quantisers sit in modules of torch.ao, which stay.
        qat = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).train()
        qat.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        torch.ao.quantization.prepare_qat(qat, inplace=True)
    assert fastconv.fuse(qat) is qat
    assert "is a quantised module" in left(qat)["0"] or "is a Conv2d" in left(qat)["0"]
