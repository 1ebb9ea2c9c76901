"""fuse() over torchvision's classifiers: equality in float64 on small images, complete fusion where it is promised."""

from __future__ import annotations

import pytest
import torch
from fuse_models import tiny_vgg
from fuse_util import assert_same, image, left, one_thread, patterns  # noqa: F401
from torch import nn

import fastconv

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")


def tiny_alexnet() -> nn.Module:
    model = models.alexnet(num_classes=5)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 5))
    return model


def tiny_vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=5
    )


def tiny_convnext() -> nn.Module:
    setting = models.convnext.CNBlockConfig
    return models.ConvNeXt([setting(8, 16, 1), setting(16, None, 1)], num_classes=5)


# name: (constructor, image size, number of groups, number of layers left)
ZOO = {
    "resnet (basic)": (lambda: models.ResNet(models.resnet.BasicBlock, [1, 2, 1, 1], 5), 32, 16, 0),
    "resnet (bottleneck)": (
        lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 5, width_per_group=8),
        32,
        19,
        0,
    ),
    "resnext": (
        lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 5, groups=4, width_per_group=4),
        32,
        19,
        0,
    ),
    "vgg": (lambda: tiny_vgg(False), 32, 8, 0),
    "vgg_bn": (lambda: tiny_vgg(True), 32, 8, 0),
    "alexnet": (tiny_alexnet, 64, 9, 0),
    "squeezenet1_0": (lambda: models.squeezenet1_0(num_classes=5), 40, 30, 0),
    "squeezenet1_1": (lambda: models.squeezenet1_1(num_classes=5), 40, 30, 0),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25), 32, 53, 0),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=5), 32, 62, 0),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=5), 32, 98, 0),
    "densenet": (lambda: models.DenseNet(4, (2, 3), 8, num_classes=5), 32, 22, 0),
    "googlenet": (lambda: models.googlenet(num_classes=5, init_weights=False), 64, 75, 0),
    "shufflenet_v2_x0_5": (lambda: models.shufflenet_v2_x0_5(num_classes=5), 32, 57, 0),
    "mnasnet0_5": (lambda: models.mnasnet0_5(num_classes=5), 32, 52, 0),
    "regnet_y_400mf": (lambda: models.regnet_y_400mf(num_classes=5), 32, 102, 0),
    "convnext": (tiny_convnext, 32, 5, 0),
    "vit": (tiny_vit, 32, 1, 0),
}


@pytest.mark.parametrize("name", ZOO)
def test_equality(name: str) -> None:
    make, size, groups, left_over = ZOO[name]
    model = make().double()
    for module in model.modules():
        # Random statistics and scales: an untrained batch norm hides a wrong one in evaluation.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    # Few values per channel in the last maps: batch norm's backward amplifies rounding there.
    fused = assert_same(model, image(4, 3, size, size), rtol=1e-6, modes=(True, False))
    report = fastconv.fusion_report(fused)
    assert (report.fused, len(report.left)) == (groups, left_over)


COMPLETE = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2", "vgg11", "vgg13_bn", "vgg16",
    "vgg16_bn", "vgg19_bn", "alexnet", "squeezenet1_0", "squeezenet1_1", "inception_v3", "googlenet",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE)
def test_complete(name: str) -> None:
    """Every convolution, batch norm and pool is in a group; at full size, without memory for the weights."""
    with torch.device("meta"):
        options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        fused = fastconv.fuse(models.get_model(name, weights=None, **options))
    assert left(fused) == {}
    convs = {n for n, m in fused.named_modules() if isinstance(m, nn.Conv2d)}
    members = {m for g in fastconv.fusion_report(fused).groups for m in g.members}
    assert convs <= members
    for module in fused.modules():
        if isinstance(module, nn.Conv2d) and module.weight.size(1) > 1 and module.weight.size(3) > 1:
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_resnet50_groups() -> None:
    with torch.device("meta"):
        fused = fastconv.fuse(models.resnet50())
    counts = {p: patterns(fused).count(p) for p in set(patterns(fused))}
    assert counts == {
        "conv+bn+relu": 33, "conv+bn+add+relu": 16, "conv+bn": 4, "max_pool2d": 1, "adaptive_avg_pool2d": 1,
    }  # fmt: skip


def test_half_precision_and_autocast_stay_close() -> None:
    model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], 5).eval()
    fused, x = fastconv.fuse(model), image(2, 3, 32, 32).float()
    wanted = model(x)
    torch.testing.assert_close(fused(x), wanted, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused(x).float(), wanted, rtol=0.05, atol=0.05)
