"""fuse() and what a forward does besides layers: optional arguments, control flow, Python that no graph stands for."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from fuse_models import Layers, model_of
from fuse_util import assert_close, assert_same, image, left, one_thread, patterns  # noqa: F401
from torch import Tensor, nn

import fastconv

X = (2, 4, 6, 5)


# Control flow and arguments.


def test_optional_argument() -> None:
    def forward(self, x, skip=None, twice=False):
        y = self.bn(self.conv(x))
        y = y if skip is None else y * skip
        y = self.act(y)
        return y * 2 if twice else y

    model = model_of(forward)
    stock, fused = copy.deepcopy(model), fastconv.fuse(model)
    x = image(*X)
    for args, kwargs in (((x,), {}), ((x, x), {}), ((x,), {"twice": True}), ((), {"x": x}), ((), {"skip": x, "x": x})):
        assert_close(fused(*args, **kwargs), stock(*args, **kwargs), 1e-9)
    for call in (lambda m: m(), lambda m: m(x, x, True, 1), lambda m: m(x, other=1)):
        with pytest.raises(TypeError) as ours:
            call(fused)
        with pytest.raises(TypeError) as theirs:
            call(stock)
        assert str(ours.value) == str(theirs.value)


def test_keyword_call_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, calls = fastconv.fuse(model_of(lambda self, x, skip: self.act(self.bn(self.conv(x)) + skip))), []
    stock_call = fastconv.functional.conv2d_bn_act
    monkeypatch.setattr(
        fastconv.functional, "conv2d_bn_act", lambda *args, **kwargs: calls.append(1) or stock_call(*args, **kwargs)
    )
    x, skip = image(*X), image(*X) * 2
    for call in (lambda: fused(x, skip), lambda: fused(x, skip=skip), lambda: fused(skip=skip, x=x)):
        calls.clear()
        assert_close(call(), fused.act(fused.bn(fused.conv(x)) + skip), 1e-9)
        assert calls == [1]


def test_none_for_a_required_argument() -> None:
    def forward(self, x, skip):
        y = self.bn(self.conv(x))
        return self.act(y if skip is None else y + skip)

    model = model_of(forward)
    stock, fused = copy.deepcopy(model), fastconv.fuse(model)
    for skip in (None, image(*X), image(1, 4, 1, 1), image(4, 1, 5), torch.tensor(2.0), 3.0):
        assert_close(fused(image(*X), skip), stock(image(*X), skip), 1e-9)
    assert patterns(fused) == ["conv+bn+add+relu"]


def test_tensor_or_list() -> None:
    """As torchvision's DenseNet layers: the forward asks whether its input is a tensor."""

    def forward(self, x):
        parts = [x] if isinstance(x, Tensor) else x
        return self.act(self.bn(self.conv(torch.cat(parts, 1))))

    model = model_of(forward)
    stock, fused = copy.deepcopy(model), fastconv.fuse(model)
    a, b = image(2, 1, 6, 5), image(2, 3, 6, 5)
    for x in (image(*X), [a, b], (a, b)):
        assert_close(fused(x), stock(x), 1e-9)
    assert patterns(fused) == ["conv+bn+relu"]


def test_train_and_evaluation_graphs() -> None:
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        if self.training:
            return y, F.dropout(self.bn2(self.conv2(y)), 0.5, self.training)
        return y

    fused = assert_same(model_of(forward), image(*X))
    report = fastconv.fusion_report(fused)
    assert [(g.pattern, g.modes) for g in report.groups] == [
        ("conv+bn+relu", ("train", "eval")),
        ("conv+bn", ("train",)),
    ]


def test_inlined_method_of_a_child_in_another_mode() -> None:
    class Child(Layers):
        def features(self, x):
            return F.dropout(self.act(self.bn(self.conv(x))), 0.5, self.training)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def forward(self, x):
            return self.child.features(x)

    model = Model().double()
    stock, fused = copy.deepcopy(model), fastconv.fuse(model)
    for m in (stock, fused):
        m.train()
        m.child.eval()
    assert_close(fused(image(*X)), stock(image(*X)), 1e-9)
    assert patterns(assert_same(Model().double(), image(*X))) == ["conv+bn+relu"]


def test_broadcast_residual() -> None:
    class Model(Layers):
        def forward(self, x, skip):
            return self.act(self.bn(self.conv(x)) + skip)

    for shape in ((2, 4, 1, 1), (1, 4, 6, 5), (2, 1, 6, 5), (5,), (1,), (3, 2, 4, 6, 5)):
        assert patterns(assert_same(Model().double(), image(*X), image(*shape))) == ["conv+bn+add+relu"]
    # One that has another dtype is promoted, as in stock PyTorch.
    assert_same(Model().float(), image(*X).float(), image(*X), rtol=1e-5)


def test_input_that_is_no_batch() -> None:
    fused = fastconv.fuse(nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.MaxPool2d(2)).double())
    assert fused(image(4, 8, 8)).shape == (3, 3, 3)
    norm = fastconv.fuse(nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)).double())
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(image(4, 8, 8))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        norm(image(1, 4, 3, 3))
    with pytest.raises(RuntimeError, match="channels"):
        norm(image(1, 3, 3, 3))


# Forwards that a graph cannot stand for.


@contextlib.contextmanager
def nothing():
    yield


def test_forwards_that_are_left() -> None:
    def grad(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return self.act(self.bn(y))

    def autocast(self, x):
        with torch.autocast("cpu", enabled=True):
            y = self.conv(x)
        return self.act(self.bn(y).double())

    def checkpointed(self, x):
        return torch.utils.checkpoint.checkpoint(lambda x: self.act(self.bn(self.conv(x))), x, use_reentrant=False)

    def assigns(self, x):
        self.seen = self.conv(x)
        return self.act(self.bn(self.seen))

    def appends(self, x):
        self.log.append(x)
        return self.act(self.bn(self.conv(x)))

    def assigns_below(self, x):
        self.bn.seen = x
        return self.act(self.bn(self.conv(x)))

    def counts(self, x):
        self.count += 1
        return self.act(self.bn(self.conv(x)))

    def random_torch(self, x):
        return self.act(self.bn(self.conv(x))) if torch.rand(()) < 2 else x

    def random_python(self, x):
        return self.act(self.bn(self.conv(x))) if random.random() < 2 else x

    def makes_tensor(self, x):
        return self.act(self.bn(self.conv(x))) + torch.ones(5, dtype=torch.float64)

    def asks(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y * 2 if isinstance(y, Tensor) else y

    def asks_grad(self, x):
        return self.act(self.bn(self.conv(x))) if torch.is_grad_enabled() else x

    def swallows(self, x):
        with contextlib.suppress(Exception):
            print(x.shape, end="")
        return self.act(self.bn(self.conv(x)))

    def variadic(self, *xs):
        return self.act(self.bn(self.conv(xs[0])))

    def sets_item(self, x):
        x = x * 1
        x[0] = 0
        return self.act(self.bn(self.conv(x)))

    reasons = {
        grad: "it switches gradients, autocast or checkpointing in its forward",
        autocast: "it switches gradients, autocast or checkpointing in its forward",
        checkpointed: "it switches gradients, autocast or checkpointing in its forward",
        assigns: "its forward assigns self.seen",
        appends: "its forward assigns self.log",
        assigns_below: "its forward assigns attributes of a submodule",
        counts: "its forward assigns self.count",
        random_torch: "its forward draws random numbers that do not depend on its inputs",
        random_python: "its forward draws random numbers that do not depend on its inputs",
        makes_tensor: "it makes a tensor that does not depend on its inputs",
        asks: "it tests the type of an intermediate value",
        asks_grad: "it asks torch.is_grad_enabled() in its forward",
        swallows: "it prints in its forward",
        variadic: "its forward requires no argument",
        sets_item: "torch.fx cannot trace its forward: TypeError: '_Value' object does not support item assignment",
    }
    for forward, reason in reasons.items():
        model = model_of(forward, log=[], count=0)
        before = {k: v for k, v in model.__dict__.items() if not k.startswith("_")}
        states = torch.get_rng_state(), random.getstate()
        assert fastconv.fuse(model) is model, forward.__name__
        assert left(model)[""] == reason, forward.__name__
        assert left(model)["conv"] == f"inside the model, which was left: {reason}"
        assert {k: v for k, v in model.__dict__.items() if not k.startswith("_")} == before and model.log == []
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
        assert not hasattr(model.bn, "seen")
        # Inside a model that is fused all the same, it is equal to stock.
        outer = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), model_of(forward, log=[], count=0)).double()
        if forward is not autocast:
            assert patterns(assert_same(outer, image(*X))) == ["conv+relu"], forward.__name__


def test_buffers_and_constants_are_read_at_run_time() -> None:
    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        return y * self.scale + self.shift + len(self.table)

    model = model_of(forward, shift=torch.ones((), dtype=torch.float64), table=[1, 2])
    model.register_buffer("scale", torch.ones((), dtype=torch.float64))
    fused = assert_same(model, image(*X))
    before = fused(image(*X))
    fused.scale.fill_(3.0)
    fused.shift.fill_(0.0)
    assert_close(fused(image(*X)), (before - 3) * 3 + 2, 1e-9)


def test_tensor_subclasses_run_unfused() -> None:
    class Labelled(Tensor):
        pass

    fused = fastconv.fuse(model_of(lambda self, x: self.act(self.bn(self.conv(x)))))
    out = fused(image(*X).as_subclass(Labelled))
    assert type(out) is Labelled
    assert_close(out.as_subclass(Tensor), fused(image(*X)), 1e-9)
