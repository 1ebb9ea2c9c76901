"""fuse() over timm's layers and models: batch norms that call an activation of their own, Conv-BN-SiLU blocks."""

from __future__ import annotations

import pytest
import torch
from fuse_util import assert_close, assert_same, image, left, one_thread, patterns  # noqa: F401
from torch import nn

import fastconv

timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.layers import BatchNormAct2d, ConvNormAct, DropBlock2d, convert_sync_batchnorm  # noqa: E402


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.ReLU6, nn.LeakyReLU, None])
def test_norm_with_activation(act) -> None:
    name = {nn.ReLU: "relu", nn.SiLU: "silu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", None: ""}[act]
    norm = BatchNormAct2d(4, act_layer=act) if act else BatchNormAct2d(4, apply_act=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, BatchNormAct2d(4, act_layer=nn.SiLU)).double()
    fused = assert_same(model, image(2, 3, 8, 7))
    assert patterns(fused) == ["conv+bn+" + name if name else "conv+bn", "bn+silu"]
    assert left(fused) == {}
    assert_same(model, image(2, 3, 8, 7), defer_bn=True)


def test_plain_activation_behind_a_norm_without_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, apply_act=False), nn.Tanh()).double()
    assert patterns(assert_same(model, image(2, 3, 8, 7))) == ["conv+bn+tanh"]


def test_norms_that_are_left() -> None:
    for norm, reason in (
        (BatchNormAct2d(4, drop_layer=DropBlock2d), "has a DropBlock2d between norm and activation"),
        (BatchNormAct2d(4, act_layer=nn.Softplus, inplace=False), "has the activation Softplus, which no group has"),
    ):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).double()
        assert left(fastconv.fuse(model))["1"] == reason


def test_changes_after_fuse_take_effect() -> None:
    model = ConvNormAct(3, 4, 3).double().eval()
    fused, x = fastconv.fuse(model), image(2, 3, 8, 7)
    before = fused(x)
    fused.bn.act = nn.Sigmoid()
    assert_close(fused(x), torch.sigmoid(fused.bn.drop(nn.functional.batch_norm(
        fused.conv(x), fused.bn.running_mean, fused.bn.running_var, fused.bn.weight, fused.bn.bias))), 1e-9)  # fmt: skip
    fused.bn.act = nn.ReLU()
    assert_close(fused(x), before, 1e-9)
    seen = []
    handle = fused.bn.act.register_forward_hook(lambda *_: seen.append(1))
    fused(x)
    assert seen == [1]
    handle.remove()
    synced = convert_sync_batchnorm(fused)
    assert_close(synced(x), before, 1e-9)


MODELS = {"resnet10t": 64, "efficientnet_lite0": 32, "regnetz_005": 64, "mobilenetv4_conv_small": 64}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, num_classes=3).double()
    fused = assert_same(model, image(2, 3, MODELS[name], MODELS[name]), rtol=1e-6, modes=(True, False))
    # Convolutions may be left: those of squeeze-excite have an nn.Identity before their activation, and a deep stem's
    # last one is in another module than its norm.
    assert [n for n in left(fused) if isinstance(fused.get_submodule(n), nn.BatchNorm2d)] == []
