"""fusion_report(model, example_input): backends and kept bytes, group by group."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from fuse_models import Residual, iadd
from fuse_util import image, one_thread  # noqa: F401
from test_deferred import kept
from torch import nn

import fastconv

X = (2, 4, 6, 5)
MAP = 2 * 4 * 6 * 5 * 8  # bytes of one feature map in float64


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Residual(iadd, nn.ReLU()), nn.Conv2d(4, 4, 1), nn.Sigmoid(),
        nn.Dropout(0.5), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1),
    ).double()  # fmt: skip


@pytest.fixture(autouse=True)
def cpu_kernels() -> None:
    if not fastconv.backends()["cpu"]:
        pytest.skip(f"backend cpu: {fastconv.backends()['cpu'].reason}")


@pytest.mark.parametrize("defer_bn", [False, True])
def test_kept_bytes(defer_bn: bool) -> None:
    stock = network()
    fused = fastconv.fuse(stock, defer_bn=defer_bn)
    report = fastconv.fusion_report(fused, image(*X))
    total, _ = kept(lambda: copy.deepcopy(fused).train()(image(*X)), nn.Identity())
    assert report.kept <= total and report.stock_kept > MAP * 8
    by_name = {g.members[0]: g for g in report.groups}
    assert {name: g.backend for name, g in by_name.items()} == dict.fromkeys(["0", "3.conv", "4", "7", "8"], "cpu")
    for name in ("0", "3.conv"):
        group = by_name[name]
        # The raw output, and the result unless it is recomputed; statistics of 4 channels come on top.
        maps = 1 if group.deferred else 2
        assert group.deferred == defer_bn and MAP * maps <= group.kept <= MAP * maps + 200, name
        assert 2 * MAP <= group.stock_kept <= 2 * MAP + 200
    assert by_name["8"].kept == by_name["8"].stock_kept == 0  # a convolution keeps its input
    assert by_name["4"].kept == by_name["4"].stock_kept == MAP  # the sigmoid's result
    assert (report.kept < report.stock_kept) == defer_bn or report.kept <= report.stock_kept


def test_the_model_is_left_as_it_was() -> None:
    fused = fastconv.fuse(network()).eval()
    before = copy.deepcopy(fused.state_dict())
    state = torch.get_rng_state()
    fastconv.fusion_report(fused, (image(*X),))
    assert not fused.training and torch.equal(torch.get_rng_state(), state)
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, before[name]) and all(p.grad is None for p in fused.parameters())
    assert fastconv._fuse.runtime.OBSERVERS == []
    with pytest.raises(RuntimeError, match="channels"):
        fastconv.fusion_report(fused, image(2, 3, 6, 5))
    assert fastconv._fuse.runtime.OBSERVERS == []


def test_table_and_json() -> None:
    fused = fastconv.fuse(network(), defer_bn=True)
    plain, measured = fastconv.fusion_report(fused), fastconv.fusion_report(fused, image(*X))
    for report in (plain, measured):
        assert max(map(len, str(report).splitlines())) <= 80
        assert "conv+bn+add+relu *" in str(report) and "* the result is recomputed" in str(report)
    assert "backend" not in str(plain) and json.loads(plain.to_json())["kept"] is None
    assert "kept by a training step for its backward: 0.0 MiB" in str(measured)
    data = json.loads(measured.to_json())
    assert data["kept"] == measured.kept and data["stock_kept"] == measured.stock_kept
    assert data["groups"][0]["backend"] == "cpu" and data["groups"][0]["deferred"] is True
    # A model that fuse() was not called on has no groups, but keeps what it keeps.
    stock = fastconv.fusion_report(network(), image(*X))
    assert stock.fused == 0 and stock.kept == stock.stock_kept == measured.stock_kept


def test_backend_that_was_chosen() -> None:
    with fastconv.use_backend("aten"):
        report = fastconv.fusion_report(fastconv.fuse(network(), defer_bn=True), image(*X))
    assert {g.backend for g in report.groups} == {"aten"}
