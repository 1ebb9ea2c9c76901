"""fuse(): equality with the stock model, group by group, and the report."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from fuse_models import ACTS, Residual, add_right, iadd
from fuse_util import assert_close, assert_same, image, left, one_thread, patterns  # noqa: F401
from torch import Tensor, nn

import fastconv

CALLS = {
    "relu": [F.relu, torch.relu, F.relu_, lambda x: F.relu(x, True), lambda x: x.relu(), lambda x: x.relu_()],
    "relu6": [F.relu6, lambda x: F.relu6(x, inplace=True)],
    "leaky_relu": [F.leaky_relu, lambda x: F.leaky_relu(x, 0.01)],
    "sigmoid": [F.sigmoid, torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [F.tanh, torch.tanh, lambda x: x.tanh_()],
    "silu": [F.silu],
    "gelu": [F.gelu, lambda x: F.gelu(x, approximate="none")],
    "hardswish": [F.hardswish],
}
FUNCTIONS = [(name, call) for name, calls in CALLS.items() for call in calls]


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("bn", [True, False])
def test_activation_modules(name: str, bn: bool) -> None:
    layers = [nn.Conv2d(3, 5, 3, stride=2, padding=1), *([nn.BatchNorm2d(5)] if bn else []), ACTS[name]]
    model = nn.Sequential(*layers).double()
    fused = assert_same(model, image(2, 3, 9, 7))
    assert patterns(fused) == [f"conv+bn+{name}" if bn else f"conv+{name}"]
    assert left(fused) == {}


@pytest.mark.parametrize(("name", "call"), FUNCTIONS)
def test_activation_functions(name: str, call) -> None:
    fused = assert_same(Residual(add_right, call).double(), image(2, 4, 6, 5))
    assert patterns(fused) == [f"conv+bn+add+{name}"]


@pytest.mark.parametrize(
    "act",
    [nn.LeakyReLU(0.2), nn.GELU(approximate="tanh"), nn.ELU(), lambda x: F.leaky_relu(x, 0.2),
     lambda x: F.gelu(x, approximate="tanh")],
)  # fmt: skip
def test_other_activations_stay_outside(act) -> None:
    fused = assert_same(Residual(add_right, act).double(), image(2, 4, 6, 5))
    assert patterns(fused) == ["conv+bn+add"]


ADDS = [
    add_right, iadd, lambda y, x: y + x, lambda y, x: torch.add(y, x), lambda y, x: torch.add(x, y),
    lambda y, x: y.add(x), lambda y, x: y.add_(x),
]  # fmt: skip


@pytest.mark.parametrize("add", ADDS)
@pytest.mark.parametrize("bn", [True, False])
def test_additions(add, bn: bool) -> None:
    fused = assert_same(Residual(add, nn.ReLU(), bn).double(), image(2, 4, 6, 5))
    assert patterns(fused) == ["conv+bn+add+relu" if bn else "conv+add+relu"]


@pytest.mark.parametrize(
    "add",
    [lambda y, x: torch.add(y, x, alpha=2), lambda y, x: y + y, lambda y, x: y + 1, lambda y, x: y - x],
)  # fmt: skip
def test_other_additions_stay_outside(add) -> None:
    fused = assert_same(Residual(add, nn.ReLU()).double(), image(2, 4, 6, 5))
    assert patterns(fused) == ["conv+bn"]


def test_batch_norm_groups() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.alone = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(self.second(F.relu(self.first(x))) + x)
            return self.alone((self.third(y) + x) * 2)

    fused = assert_same(Model().double(), image(3, 4, 5, 5))
    assert patterns(fused) == ["bn+relu", "bn+add+silu", "bn+add", "bn"]
    assert left(fused) == {}


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.5, "eps": 1e-2},
     {"affine": False, "track_running_stats": False, "momentum": None}],
)  # fmt: skip
def test_batch_norm_options(options: dict) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.BatchNorm2d(4, **options), nn.Tanh()
    )
    fused = assert_same(model.double(), image(2, 3, 8, 8))
    assert patterns(fused) == ["conv+bn+relu", "bn+tanh"]


def test_frozen_batch_norm_and_parameters() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    ).double()
    model[0].weight.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    fused = assert_same(model, image(2, 3, 8, 8))
    stock = copy.deepcopy(model)
    for m in (fused, stock):
        m.train()
        m[1].eval()  # the usual way to fine-tune: its statistics stay
        m(image(4, 3, 8, 8))
    assert_close(fused[1].running_mean, stock[1].running_mean, 0)
    assert fused[1].num_batches_tracked == stock[1].num_batches_tracked == 2
    assert fused[4].num_batches_tracked == stock[4].num_batches_tracked == 3
    # A batch norm without a counter, as old checkpoints have it, keeps its statistics when momentum is None.
    for m in (fused, stock):
        m[1].train()
        m[1].momentum, m[1].num_batches_tracked = None, None
    assert_close(fused(image(4, 3, 8, 8)), stock(image(4, 3, 8, 8)), 1e-9)
    assert_close(fused[1].running_var, stock[1].running_var, 0)
    # The flag that decides whether statistics are kept is read at every call, too.
    for m in (fused, stock):
        m.train()
        m[1].track_running_stats = False
    assert_close(fused(image(4, 3, 8, 8)), stock(image(4, 3, 8, 8)), 1e-9)
    assert_close(fused[1].running_var, stock[1].running_var, 0)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "geometry",
    [{"padding": 1}, {"padding": (2, 0), "dilation": (1, 2)}, {"padding": "same", "dilation": 2},
     {"padding": "valid", "stride": 2}, {"padding": 1, "groups": 4}],
)  # fmt: skip
def test_convolution_geometry(mode: str, geometry: dict) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding_mode=mode, **geometry)
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + residual)

    x, model = image(2, 4, 9, 8), Model().double()
    fused = assert_same(model, x, image(*model.conv(x).shape))
    assert patterns(fused) == ["conv+bn+add+relu"]


def test_pools() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.max = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
            self.avg = nn.AvgPool2d(2, 1, count_include_pad=False)
            self.adaptive = nn.AdaptiveAvgPool2d((3, None))
            self.indices = nn.MaxPool2d(2, return_indices=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.avg(self.max(x))
            x = F.max_pool2d(F.avg_pool2d(x, 2, stride=1), kernel_size=2, stride=1) + F.adaptive_avg_pool2d(x, 1)
            y, at = self.indices(self.max(x))
            return torch.cat([self.adaptive(x).flatten(1), y.flatten(1), at.flatten(1)], 1)

    fused = assert_same(Model().double(), image(2, 3, 20, 16))
    names = ["max_pool2d", "avg_pool2d", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "max_pool2d", "max_pool2d"]
    assert patterns(fused) == [*names, "adaptive_avg_pool2d"]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.preserve_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_residual_network(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Residual(iadd, nn.ReLU(inplace=True)), Residual(iadd, nn.ReLU(inplace=True)), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5),
    ).to(dtype)  # fmt: skip
    rtol = 1e-9 if dtype is torch.float64 else 1e-4
    fused = assert_same(model, image(4, 3, 32, 32, dtype=dtype), rtol=rtol, memory_format=memory_format)
    assert fastconv.fusion_report(fused).fused == 5
    layout = torch.channels_last if memory_format == torch.channels_last else torch.contiguous_format
    assert fused[4].conv.weight.is_contiguous(memory_format=layout)


def test_state_dict_both_ways() -> None:
    def make() -> nn.Module:
        return nn.Sequential(Residual(iadd, nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).double()

    stock, fused = make(), fastconv.fuse(make())
    for source, target in ((stock, fused), (fused, stock)):
        source(image(2, 4, 8, 8))
        target.load_state_dict(source.state_dict(), strict=True)
        assert_close(target.eval()(image(2, 4, 8, 8)), source.eval()(image(2, 4, 8, 8)), 1e-9)
        for m in (source, target):
            m.train()


def test_report() -> None:
    model = nn.Sequential(Residual(iadd, nn.ReLU()), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1))
    before = fastconv.fusion_report(model)
    assert before.fused == 0 and before.layers == 5
    assert dict(before.left)["0.conv"] == "not fused: fuse() was not called on it"
    report = fastconv.fusion_report(fastconv.fuse(model))
    assert report.fused == len(report.groups) == 3
    assert [(g.container, g.members, g.pattern, g.modes) for g in report.groups] == [
        ("", ("1",), "max_pool2d", ("train", "eval")),
        ("", ("2",), "conv", ("train", "eval")),
        ("0", ("0.conv", "0.bn", "0.act"), "conv+bn+add+relu", ("train", "eval")),
    ]
    assert [name for name, _ in report.left] == ["3"]
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "conv+bn+add+relu     conv bn act" in text and "4 of 5 layers fused, 1 left" in text
    data = json.loads(report.to_json())
    assert data["fused"] == 3 and data["groups"][2]["members"] == ["0.conv", "0.bn", "0.act"]
    assert data["left"][0]["name"] == "3"
    assert data["patterns"] == {"max_pool2d": 1, "conv": 1, "conv+bn+add+relu": 1}


def test_report_breaks_long_lines() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))
    for _ in range(3):
        inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), inner)
        inner = nn.ModuleDict({"a_rather_long_module_name_as_people_write_them": inner})
    text = str(fastconv.fusion_report(fastconv.fuse(nn.ModuleDict({"backbone_of_the_detector": inner}))))
    assert max(map(len, text.splitlines())) <= 80


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"fuse: model expected torch\.nn\.Module, got Tensor"):
        fastconv.fuse(torch.zeros(1))
    with pytest.raises(TypeError, match=r"fusion_report: model expected torch\.nn\.Module, got str"):
        fastconv.fusion_report("resnet50")
    with pytest.raises(ValueError, match=r"fuse: memory_format expected torch\.channels_last or"):
        fastconv.fuse(nn.Conv2d(1, 1, 1), memory_format=torch.channels_last_3d)


def test_nothing_to_fuse() -> None:
    for model in (nn.Conv2d(3, 3, 1), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Identity(), nn.ModuleList()):
        assert fastconv.fuse(model) is model
        assert fastconv.fuse(model, inplace=True) is model
        assert fastconv.fusion_report(model).fused == 0
    report = fastconv.fusion_report(nn.Conv2d(3, 3, 1))
    assert report.left == [("", "not called by any forward that could be traced")]
    assert "nothing fused" in str(report)
