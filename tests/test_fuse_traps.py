"""fuse() where a rewrite could be silently wrong: aliases, in-place writes, control flow, layouts, foreign forwards."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from test_fuse import Residual, assert_close, assert_same, iadd, image, left, one_thread, patterns  # noqa: F401
from torch import Tensor, nn

import fastconv


class Layers(nn.Module):
    """Two convolutions, two batch norms and an activation for the forwards of this file."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=inplace)


def model_of(forward, inplace: bool = True, **attributes) -> nn.Module:
    model = type("Model", (Layers,), {"forward": forward})(inplace)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model.double()


X = (2, 4, 6, 5)


def assert_same_evaluation(model: nn.Module, *inputs, layouts: int = 2, **options) -> nn.Module:
    """Without gradients: for writes in place that stock PyTorch's backward refuses. Inputs are compared too."""
    stock = copy.deepcopy(model).eval()
    fused = fastconv.fuse(model, **options).eval()
    for x in (inputs, [x.to(memory_format=torch.channels_last) for x in inputs])[:layouts]:
        ours, theirs = [x.clone() for x in x], [x.clone() for x in x]
        with torch.no_grad():
            assert_close(fused(*ours), stock(*theirs), 1e-9)
        assert_close(ours, theirs, 1e-9)
    return fused


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

    assert patterns(assert_same_evaluation(model_of(forward), image(*X))) == ["conv+bn"]


def test_input_written_before_the_activation() -> None:
    """The convolution may not move behind the write."""

    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        self.act(x)
        return torch.sigmoid(y) + x

    fused = assert_same_evaluation(model_of(forward), image(*X))
    assert patterns(fused) == []

    def forward_of_a_view(self, x):
        x = x * 1
        y = self.conv(x)
        x[:, 1:].mul_(2)
        return torch.sigmoid(y) + x

    assert patterns(assert_same_evaluation(model_of(forward_of_a_view), image(*X))) == []


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
    assert "conv+sigmoid" not in patterns(fused)
    assert left(fused)["conv"] == "side may write to its inputs"
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
    assert left(fused)["conv"] == "mul_ may write to its inputs"


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
