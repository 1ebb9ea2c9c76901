"""fuse() where memory is shared: writes in place, views, and the layouts of what comes out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fuse_models import Residual, iadd, model_of
from fuse_util import assert_close, assert_same, assert_same_evaluation, image, left, one_thread, patterns  # noqa: F401
from torch import nn

import fastconv

X = (2, 4, 6, 5)


# In-place writes.


def test_inplace_activation_of_a_value_with_two_readers() -> None:
    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.act(y)  # writes to y
        return self.conv2(y) + z

    fused = assert_same(model_of(forward), image(*X))
    assert patterns(fused) == ["conv+bn", "conv+add"]


def test_inplace_activation_whose_result_is_dropped() -> None:
    def forward(self, x):
        y = self.bn(self.conv(x))
        self.act(y)
        return y * 2

    assert patterns(assert_same(model_of(forward), image(*X))) == ["conv+bn"]


def test_addition_into_the_residual() -> None:
    def forward(self, x):
        skip = self.conv2(x)
        y = skip
        y += self.bn(self.conv(x))
        return self.act(y) + skip

    assert patterns(assert_same_evaluation(model_of(forward), image(*X))) == ["conv", "conv+bn"]


def test_input_written_before_the_activation() -> None:
    """The convolution may not move behind the write."""

    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        self.act(x)
        return torch.sigmoid(y) + x

    fused = assert_same_evaluation(model_of(forward), image(*X))
    assert patterns(fused) == ["conv"]

    def forward_of_a_view(self, x):
        x = x * 1
        y = self.conv(x)
        x[:, 1:].mul_(2)
        return torch.sigmoid(y) + x

    assert patterns(assert_same_evaluation(model_of(forward_of_a_view), image(*X))) == ["conv"]


def test_write_between_the_pair_and_the_activation() -> None:
    def forward(self, x):
        x = x * 1
        y = self.bn(self.conv(x))
        x.mul_(2)
        z = self.bn2(self.conv2(x))
        return torch.sigmoid(y) + z

    fused = assert_same_evaluation(model_of(forward), image(*X))
    assert patterns(fused) == ["conv+bn", "conv+bn+add"]  # the sigmoid is behind the write


def test_residual_written_between() -> None:
    def forward(self, x):
        x = x * 1
        y = self.bn(self.conv(x)) + x
        x.mul_(2)
        return F.relu(y) + x

    fused = assert_same_evaluation(model_of(forward), image(*X))
    assert patterns(fused) == ["conv+bn+add"]


def test_submodule_that_writes_to_its_input() -> None:
    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        z = self.side(x)
        return torch.sigmoid(y) + z

    model = model_of(forward, side=nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)))
    fused = assert_same_evaluation(model, image(*X))
    assert patterns(fused) == ["conv", "conv"]  # the side's convolution too
    harmless = model_of(forward, side=nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))
    assert "conv+sigmoid" in patterns(assert_same_evaluation(harmless, image(*X)))


def test_written_parameter() -> None:
    def forward(self, x):
        y = self.conv(x)
        self.scale.mul_(0.5)
        return torch.sigmoid(y) * self.scale

    model = model_of(forward)
    model.register_buffer("scale", torch.full((1,), 8.0, dtype=torch.float64))
    stock, fused = copy.deepcopy(model), fastconv.fuse(model)
    for _ in range(3):
        assert_close(fused(image(*X)), stock(image(*X)), 1e-9)
    assert fused.scale == stock.scale == 1.0
    assert patterns(fused) == ["conv"]


def test_container_that_writes_to_its_input() -> None:
    """The caller's tensor is written to, also where the container works in another layout."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    fused = assert_same_evaluation(model, image(*X))
    assert patterns(fused) == ["conv+bn"]

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.Conv2d(4, 4, 1), model

        def forward(self, x):
            x = self.conv(x)
            return self.inner(x) + x  # x after the write

    assert_same(Caller().double(), image(*X))


def test_augmented_assignment_stays_in_place() -> None:
    """torch.fx alone records x += 1 as x + 1."""

    def forward(self, x):
        alias = x
        x += 1
        y = self.act(self.bn(self.conv(x)))
        y *= alias
        return y

    assert patterns(assert_same_evaluation(model_of(forward), image(*X))) == ["conv+bn+relu"]


def test_output_written_after_an_activation() -> None:
    """Legal in stock PyTorch where the activation's backward reads its input; the fused one reads its output."""
    for act, fits in ((F.relu6, False), (F.leaky_relu, False), (F.silu, True), (F.hardswish, True)):

        def forward(self, x, act=act):
            y = act(self.bn(self.conv(x)))
            y.mul_(2)
            return y

        fused = assert_same(model_of(forward), image(*X))
        assert patterns(fused) == [f"conv+bn+{act.__name__}" if fits else "conv+bn"]


def test_output_written_by_the_caller() -> None:
    def block(act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act))

    class Caller(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.block, self.other = block(act), block(copy.deepcopy(act))

        def forward(self, x):
            y = self.block(x)
            y += x
            return y + self.other(x)

    for act, pattern in ((nn.ReLU6(), "conv+bn"), (nn.LeakyReLU(), "conv+bn"), (nn.SiLU(), "conv+bn+silu")):
        fused = assert_same(Caller(act).double(), image(*X))
        assert patterns(fused)[0] == pattern and patterns(fused)[1] != "conv+bn"
        assert patterns(copy.deepcopy(fused)) == patterns(fused)
        fused.block[0][0] = nn.Conv2d(4, 4, 1).double()  # its plan is derived again, without its caller
        fused(image(*X)).sum().backward()


def test_residual_written_afterwards() -> None:
    def forward(self, x):
        skip = x * 1
        y = F.silu(self.bn(self.conv(x)) + skip)
        skip.mul_(2)
        return y + skip

    assert patterns(assert_same(model_of(forward), image(*X))) == ["conv+bn+add"]


# Layouts.


class Flat(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


@pytest.mark.parametrize("inplace", [True, False])
def test_views(inplace: bool) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
            self.flat = Flat()
            self.head = nn.Linear(54, 4)

        def forward(self, x):
            x = self.body(x)
            rows = x.view(x.size(0), x.size(1), -1)
            same = x.view(rows.size(0), -1) - self.flat(x) + x.view_as(x).view(-1).view(x.shape[0], -1)
            return self.head(same) + rows.view(torch.int64).view(torch.float64).sum()

    model = Model().double()
    fused = assert_same(model, image(2, 3, 8, 8), inplace=inplace)
    assert_close(fused(image(2, 3, 8, 8).to(memory_format=torch.channels_last)), fused(image(2, 3, 8, 8)), 1e-9)
    assert patterns(fused) == ["conv+relu", "max_pool2d"]
    nhwc = fused.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert nhwc == inplace
    if not inplace:
        model(image(2, 3, 8, 8))  # the stock model shares the weights: its view() has to go on working


def test_view_that_is_written_through() -> None:
    def forward(self, x):
        y = self.act(self.conv(x))
        y.view(y.size(0), -1).mul_(2)
        return y

    model = model_of(forward)
    fused = fastconv.fuse(copy.deepcopy(model), inplace=True)
    # A copy in place of the view would lose the write: the stock error is the right answer.
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        fused(image(*X))
    assert_same_evaluation(model, image(*X), layouts=1, memory_format=torch.preserve_format)


def test_view_written_where_nobody_else_looks() -> None:
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return F.dropout(y.view(y.size(0), -1), 0.0, True, True)

    assert_same(model_of(forward), image(*X), inplace=True)


def test_results_have_the_layout_of_the_input() -> None:
    model = fastconv.fuse(nn.Sequential(*(Residual(iadd, nn.ReLU()) for _ in range(2))).double())
    x = image(*X)
    for part in (model, model[0], model[:1]):
        assert part(x).is_contiguous()
        assert part(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    preserved = fastconv.fuse(Residual(iadd, nn.ReLU()).double(), memory_format=torch.preserve_format)
    assert preserved(x).is_contiguous() and preserved.conv.weight.is_contiguous()


def test_results_in_structures_have_the_layout_of_the_input() -> None:
    def forward(self, x):
        y = self.act(self.conv(x))
        return {"a": y, "b": [y * 2, (y * 3, y.mean())], "c": torch.max(y, 1)}

    fused = assert_same(model_of(forward), image(*X))
    out = fused(image(*X))
    assert out["a"].is_contiguous() and out["b"][1][0].is_contiguous()


def test_untraceable_forward_around_a_fused_block() -> None:
    """The block gives contiguous results to a forward that calls view() and was not rewritten."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

        def forward(self, x):
            if x.sum() > 1e6:
                return x
            return self.block(x).view(x.size(0), -1)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), Model()

        def forward(self, x):
            return self.model(self.stem(x))

    fused = assert_same(Outer().double(), image(2, 3, 8, 8), inplace=True)
    assert patterns(fused) == ["conv+relu", "conv+relu"]
    assert left(fused)["model"].startswith("torch.fx cannot trace its forward: TraceError")


def test_dropout_of_a_feature_map_draws_the_stock_mask() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 1), nn.ReLU())
    assert patterns(assert_same(model.double(), image(*X))) == ["conv+relu", "conv+relu"]
