"""A small ResNet on scikit-learn's digits: same seed, same batches, stock against fastconv. The loss curves agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastconv
import fastconv.nn as fnn

STEPS = 50
BATCHES = 43  # of 32 images; the last 400 images are kept for the accuracy


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.short(x))


class FusedBlock(Block):
    """The same parameters, through fastconv's layers by hand."""

    def __init__(self, *args):
        super().__init__(*args)
        channels = self.bn1.num_features
        self.bn1, self.bn2 = fnn.BatchNormAct2d(channels), fnn.BatchNormAct2d(channels)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.short(x))


def resnet(block, pool, average):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), pool(3, 2, 1),
        block(16, 16, 1), block(16, 32, 2), average(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    x = (torch.from_numpy(images).float().view(-1, 1, 8, 8) - 8) / 8
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.from_numpy(labels)[order]


def train(model, loss_fn, digits, dtype=None, steps=STEPS):
    x, y = digits
    x = x.contiguous(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    step = fastconv.TrainStep(model, loss_fn, sgd, autocast_dtype=dtype)
    starts = [i % BATCHES * 32 for i in range(steps)]
    losses = torch.stack([step(x[i : i + 32], y[i : i + 32]) for i in starts])
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        right = (model(x[-400:]).argmax(1) == y[-400:]).float().mean()
    return losses.float(), right.item()


KINDS = {
    "layers": lambda: resnet(FusedBlock, fnn.MaxPool2d, fnn.AdaptiveAvgPool2d),
    "fuse": lambda: fastconv.fuse(resnet(Block, nn.MaxPool2d, nn.AdaptiveAvgPool2d)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=("fp32", "bf16"))
def test_loss_curves_agree(dtype, kind, digits):
    # oneDNN's bf16 weight gradient waits in a spinning barrier: on a busy machine each costs a time slice.
    torch.set_num_threads(1)
    ours, ours_right = train(KINDS[kind](), fnn.CrossEntropyLoss(), digits, dtype)
    stock, stock_right = train(resnet(Block, nn.MaxPool2d, nn.AdaptiveAvgPool2d), nn.CrossEntropyLoss(), digits, dtype)
    # The same start to rounding; every step lets it grow. Stock under another order of summation drifts as far.
    gap = (ours - stock).abs() / stock[0]
    first, early, mean, right = (1e-6, 1e-5, 5e-3, 0.02) if dtype is None else (1e-3, 2e-2, 2e-2, 0.15)
    assert gap[0] < first and gap[:10].max() < early, f"the first steps differ by {gap[:10].tolist()}"
    assert gap.mean() < mean, f"curves apart by {gap.mean():.3g} of the first loss"
    assert ours[-5:].mean() < 0.3 * ours[0] and stock[-5:].mean() < 0.3 * stock[0], "both learn"
    assert ours_right > 0.6 and abs(ours_right - stock_right) < right, (
        f"accuracy {ours_right:.3f}, stock {stock_right:.3f}"
    )


def test_first_steps_follow_float64(digits):
    """In float64 rounding plays no part: five steps agree to ten digits, parameters and statistics included."""
    x, y = digits[0].double(), digits[1]
    models = [
        KINDS["layers"]().double(),
        KINDS["fuse"]().double(),
        resnet(Block, nn.MaxPool2d, nn.AdaptiveAvgPool2d).double(),
    ]
    curves = [train(m, nn.CrossEntropyLoss(), (x, y), steps=5)[0] for m in models]
    for curve, model in zip(curves, models, strict=True):
        torch.testing.assert_close(curve, curves[-1], rtol=1e-6, atol=1e-9)
        for (name, value), stock in zip(model.state_dict().items(), models[-1].state_dict().values(), strict=True):
            torch.testing.assert_close(value, stock, rtol=1e-8, atol=1e-10, msg=name)
