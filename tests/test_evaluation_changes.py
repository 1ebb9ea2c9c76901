"""What a program of a fused model's evaluation watches: weights, modules, hooks, measurements, Python in a forward."""

from __future__ import annotations

import pytest
import torch
from programs_util import eager, net, reason
from torch import nn

import fastconv
from fastconv import _ext
from fastconv._plan import programs as held

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)


@torch.no_grad()
def test_what_changes_counts_at_once(runs):
    """In place, by another storage, by another parameter, by a loaded state, by another module, mode or hook."""
    model, x = net(), torch.randn(2, 3, 8, 8)
    conv, norm = model[0], model[1]
    seen = []

    def check(used: bool, calls: int = 3) -> None:
        for _ in range(calls):
            model(x)
        before = len(runs)
        assert torch.equal(model(x), eager(model, x))
        assert (len(runs) > before) == used, reason(model)

    check(True)
    last = model(x)
    changes = [
        lambda: conv.weight.mul_(1.5),
        lambda: conv.weight.data.mul_(1.5),  # no version counts this
        lambda: norm.running_mean.add_(0.3),
        lambda: setattr(conv.weight, "data", conv.weight.data * 0.5),
        lambda: setattr(norm, "bias", nn.Parameter(torch.ones(32))),
        lambda: model.load_state_dict(net(3).state_dict()),
        lambda: setattr(norm, "eps", 0.1),
        lambda: model.__setitem__(2, nn.LeakyReLU()),
        lambda: model[12].bias.zero_(),
    ]
    for i, change in enumerate(changes):
        change()
        now = model(x)
        assert not torch.equal(now, last), i
        assert torch.equal(now, eager(model, x)), i
        last = now
    held.Programs.of(model).rebuilt = 0
    check(True)
    handle = model[7].register_forward_hook(lambda module, args, out: seen.append(out) or out * 2)
    check(False, 20)
    assert len(seen) == 22 and not torch.equal(model(x), last)
    handle.remove()
    check(True, 100)  # what kept a program away is looked at again, ever more seldom
    model[1].train()
    check(False)
    assert "mode" in reason(model)


@torch.no_grad()
def test_a_model_that_keeps_changing_is_left_alone(runs):
    model, x = net(), torch.randn(2, 3, 8, 8)
    for _ in range(3 * held._REBUILT):
        for _ in range(3):
            assert torch.equal(model(x), eager(model, x))
        model[0].weight = nn.Parameter(model[0].weight * 1.01)
    before = len(runs)
    for _ in range(4):
        model(x)
    assert len(runs) == before


@torch.no_grad()
def test_programs_that_have_served_are_made_again(runs, monkeypatch):
    model, x = net(), torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(held, "_WORTH", 3)
    for _ in range(3 * held._REBUILT):
        for _ in range(6):
            model(x)
        model[0].weight = nn.Parameter(model[0].weight * 1.01)
    before = len(runs)
    model(x), model(x)
    assert len(runs) > before


@torch.no_grad()
def test_measurements_decide_where_there_are_some(runs, own_cache, monkeypatch):
    """Under FASTCONV_TUNE=1 calls are measured, so they go one by one; a CPU's fixed order needs no look."""
    model, x = net(), torch.randn(2, 3, 8, 8)
    for _ in range(3):
        model(x)
    assert not runs
    monkeypatch.setenv("FASTCONV_TUNE", "")  # there are measurements now
    for _ in range(3):
        model(x)
    assert not runs
    monkeypatch.setenv("FASTCONV_TUNE", "0")
    for _ in range(3):
        model(x)
    assert runs


class Head(nn.Module):
    """A container with nothing to fuse in it, and a life of its own."""

    calls: list = []  # noqa: RUF012
    table: dict = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.fc, self.last = nn.Linear(48, 5), None


class Counts(Head):
    def forward(self, x):
        Head.calls.append(1)
        return self.fc(x)


class Keeps(Head):
    def forward(self, x):
        self.last = x
        return self.fc(x)


class Writes(Head):
    def forward(self, x):
        Head.table["rows"] = x.shape[0]
        return self.fc(x)


class Plain(Head):
    def forward(self, x):
        y = self.fc(x)
        return y + y


@pytest.mark.parametrize("kind", (Counts, Keeps, Writes, Plain))
@torch.no_grad()
def test_python_that_does_more_than_compute_runs(kind, runs):
    model = fastconv.unfuse(net())
    model[12] = kind()
    model, x = fastconv.fuse(model).eval(), torch.randn(2, 3, 8, 8)
    Head.calls.clear()
    Head.table.clear()
    for size in (1, 2, 2, 2, 2, 2):
        before = len(Head.calls)
        model(x[:size])
        if kind is Counts:
            assert len(Head.calls) > before
        if kind is Keeps:
            assert model[12].last.shape[0] == size
        if kind is Writes:
            assert Head.table["rows"] == size
    assert bool(runs) == (kind is Plain), reason(model)


def test_the_guard_tells_every_kind_of_change():
    guard, missing = _ext.MODULE.Guard, _ext.MODULE.Guard
    one, t = nn.Linear(2, 2), torch.zeros(3)
    d = {"a": one, "b": 5}

    def made(kept=[]):  # noqa: B006  (keeps the lists that the guard borrows from)
        kept.append(([d, "a", one, d, "c", missing], [d, len(d)], [one, nn.Linear]))
        return guard(*kept[-1], [t])

    g = made()
    assert g.holds()
    d["c"] = 1
    assert not g.holds() and not made().holds()  # it must be missing
    del d["c"]
    assert g.holds()
    d["z"] = 2
    assert not g.holds()
    del d["z"]
    d["a"] = nn.Linear(2, 2)
    assert not g.holds()
    d["a"] = one
    assert g.holds()
    one.__class__ = type("Other", (nn.Linear,), {})
    assert not g.holds()
    one.__class__ = nn.Linear
    t.set_(torch.zeros(3))
    assert not g.holds()
    for wrong, error in (
        (([1, "a", 1], [], [], []), TypeError), (([d, "a"], [], [], []), ValueError), (([], [], [], [3]), TypeError),
        (([], [d], [], []), ValueError), (([], [], [1], []), ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match="Guard"):
            guard(*wrong)
