"""torch.compile(model, backend="fastconv") where a group would not be exact, or random numbers or layouts would differ."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from dynamo_util import assert_compiled, fresh_dynamo, groups  # noqa: F401
from fuse_models import Block
from fuse_util import assert_close, image, one_thread  # noqa: F401
from torch import Tensor
from torch._dynamo.utils import counters

from fastconv import _dynamo

# Where a group would not be exact: each of these would give other numbers if it were fused all the same.


class Trap(Block):
    """A block whose forward is the case's."""

    def __init__(self, case) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor):
        return self.case(self, x)


def read_between(m, x):
    y = m.bn1(m.conv1(x))
    seen = m.bn1.running_mean * 2  # of this step, not of the last
    return m.relu(y) + seen.view(1, -1, 1, 1)


def write_between(m, x):
    y = m.conv1(x)
    x.add_(1)
    return m.relu(m.bn1(y)) + x


def weight_written_between(m, x):
    y = m.conv1(x)
    with torch.no_grad():
        m.conv1.weight.mul_(1.5)
    return m.relu(y)


def weight_that_is_computed(m, x):
    w = m.conv1.weight / m.conv1.weight.norm()
    return F.relu(F.conv2d(x, w, padding=1))


def weight_that_is_an_output(m, x):
    w = m.conv1(x)[:, :, :3, :3]
    return F.relu(w).sum() + F.relu(F.conv2d(x, w))


def two_readers(m, x):
    y = m.bn1(m.conv1(x))
    return m.relu(y), y  # the relu writes to y


def no_grad_between(m, x):
    y = m.conv1(x)
    with torch.no_grad():
        z = F.relu(y)
    return z + m.conv2(x)


def autocast_between(m, x):
    with torch.autocast("cpu", torch.bfloat16, enabled=True):
        y = m.conv1(x)
    return m.relu(m.bn1(y))


def the_same_norm_twice(m, x):
    return m.relu(m.bn1(m.conv2(m.relu(m.bn1(m.conv1(x))))))


def outputs_that_share_memory(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    return y, y[:, :2]


def views_and_strides(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    return y.view(y.size(0), -1), torch.as_strided(y, (2, 3), (1, 5))


def broadcast_addition(m, x):
    return m.relu(m.bn1(m.conv1(x)) + x.mean((2, 3), keepdim=True))


def promoted_addition(m, x):
    return m.relu(m.bn1(m.conv1(x)) + (x > 0))


def write_through_a_view(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    y.view(y.size(0), -1)[:, 0] = 7
    return y


def other_strides(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    return y.flatten(2), (y * 2)[0], (y * 3).transpose(1, 2)


def graph_break(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    torch._dynamo.graph_break()
    return m.relu(m.bn2(m.conv2(y)) + x)


def three_dimensions(m, x):
    return F.relu(m.conv1(x[0]))


def frozen_norm(m, x):
    return F.relu(F.batch_norm(m.conv1(x), m.bn1.running_mean, m.bn1.running_var, m.bn1.weight, m.bn1.bias, False))


def own_statistics(m, x):
    return F.relu(F.batch_norm(m.conv1(x), None, None, training=True))


def keywords(m, x):
    y = torch.conv2d(x, m.conv1.weight, padding=1, stride=[2])
    return F.leaky_relu(F.batch_norm(input=y, running_mean=None, running_var=None, training=True), 0.01)


def loop(m, x):
    while x.size(1) < 4 or x.dim() < 4:
        x = x.unsqueeze(0)
    for conv, bn in ((m.conv1, m.bn1), (m.conv2, m.bn2)):
        x = F.silu(bn(conv(x)))
    return {"out": x, "size": x.shape[0]}["out"]


TRAPS = {
    read_between: {"conv+bn": 1}, write_between: {"conv": 1, "bn+relu": 1}, weight_written_between: {"conv": 1},
    weight_that_is_computed: {"conv+relu": 1}, weight_that_is_an_output: {"conv": 1, "conv+relu": 1}, two_readers: {"conv+bn": 1},
    no_grad_between: {"conv": 1, "conv+add": 1}, autocast_between: {"conv": 1, "bn+relu": 1}, the_same_norm_twice: {"conv+bn+relu": 2},
    outputs_that_share_memory: {"conv+bn+relu": 1}, views_and_strides: {"conv+bn+relu": 1},
    broadcast_addition: {"conv+bn+add+relu": 1}, promoted_addition: {"conv+bn+add+relu": 1},
    write_through_a_view: {"conv+bn+relu": 1}, other_strides: {"conv+bn+relu": 1}, graph_break: {"conv+bn+relu": 1, "conv+bn+add+relu": 1},
    three_dimensions: {}, frozen_norm: {"conv+bn+relu": 1}, own_statistics: {"conv+bn+relu": 1},
    keywords: {"conv": 1}, loop: {"conv+bn+silu": 2},
}  # fmt: skip
WRITES = {write_between, weight_written_between, write_through_a_view}  # to what stock PyTorch's backward has saved


@pytest.mark.parametrize("case", TRAPS, ids=lambda f: f.__name__)
def test_traps(case):
    model, x = Trap(case).double(), image(3, 4, 7, 6)
    if case in WRITES:
        stock = copy.deepcopy(model)
        step, inputs = torch.compile(model, backend=_dynamo.fastconv), (x.clone(), x.clone())
        with torch.no_grad():
            assert_close(step(inputs[0]), stock(inputs[1]), 1e-9)
        assert torch.equal(*inputs) and torch.equal(model.conv1.weight, stock.conv1.weight)
        counts = Counter(counters["fastconv"])
    else:
        counts = assert_compiled(model, [[x]], modes=(True,))
    assert groups(counts) == TRAPS[case]


def test_dropout_draws_the_stock_mask():
    class Model(Block):
        def forward(self, x):
            return F.dropout(self.relu(self.bn1(self.conv1(x))), 0.5, self.training)

    assert_compiled(Model().double(), [[image(2, 4, 5, 5)]])


def test_dropout_in_place_is_seen_by_other_readers():
    def forward(m, x):
        y = m.bn1(m.conv1(x)) * 2
        return F.dropout(y, 0.5, True, inplace=True) + y

    assert_compiled(Trap(forward).double(), [[image(2, 4, 5, 5)]], modes=(True,))


def test_custom_operators_get_stocks_layout():
    """One that looks at strides, and one that writes to its argument."""
    library = torch.library.Library("fastconv_tests", "FRAGMENT")
    library.define("strides(Tensor x) -> Tensor")
    library.define("fill(Tensor(a!) x) -> ()")
    library.impl("strides", lambda x: x.new_tensor(x.stride()), "CompositeExplicitAutograd")
    library.impl("fill", lambda x: (x.zero_(), None)[1], "CompositeExplicitAutograd")
    torch.library.register_fake("fastconv_tests::strides", lambda x: x.new_empty(x.dim()), lib=library)
    torch.library.register_fake("fastconv_tests::fill", lambda x: None, lib=library)

    def forward(m, x):
        y = m.relu(m.bn1(m.conv1(x)))
        return y * 2, torch.ops.fastconv_tests.strides(y)

    def writing(m, x):
        y = m.relu(m.bn1(m.conv1(x)))
        torch.ops.fastconv_tests.fill(y)
        return y + x

    for case in (forward, writing):
        model, x = Trap(case).double().eval(), image(2, 4, 5, 5)
        with torch.no_grad():
            assert_close(torch.compile(model, backend=_dynamo.fastconv)(x), model(x), 1e-9)
        assert counters["fastconv"].pop("conv+bn+relu") == 1


@pytest.mark.parametrize("draw", (torch.rand_like, torch.bernoulli, lambda y: F.dropout2d(y, 0.5, True)))
def test_random_numbers_in_memory_order(draw):
    """Drawn for stock's layout: the same numbers in the same places."""
    model = Trap(lambda m, x: m.relu(m.bn1(m.conv1(x))) * draw(m.relu(m.bn2(x)).clamp(0, 1)))
    assert_compiled(model.double(), [[image(2, 4, 5, 5)]], modes=(True,))
