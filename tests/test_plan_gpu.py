"""The program that a GPU's plan is: in the emulator, and on a GPU.

What a planned step computes is in test_plan_training.py, for every kind of kernel."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from plan_util import small_net
from torch import nn

import fastconv
from fastconv import _ext
from fastconv._plan.optim import PlannedOptimizer

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)

pytestmark = pytest.mark.parametrize("planner", ("simt", "cuda"), indirect=True)


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
def test_a_step_has_no_casts_no_fills_and_one_update(dtype, planner):
    """What the program of a residual network consists of: per layer one call forward, and three backward."""
    model = fastconv.fuse(small_net(), inplace=True)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step = fastconv.TrainStep(model, F.cross_entropy, sgd, autocast_dtype=dtype, plan=True)
    step(torch.randn(2, 3, 8, 8), torch.randint(5, (2,)))
    (plan,) = step._plans.cache.values()
    calls = Counter(label.split()[0].split("::")[1] for label in plan.labels)
    layers = 8
    assert calls["conv2d_bn"] == calls["conv2d_weight_grad_parts"] == layers
    # The last norms of the blocks and of their shortcuts get their gradient from elsewhere, or from several places.
    assert calls["conv2d_input_grad_bn"] + calls["batch_norm_backward"] == layers
    assert calls["conv2d_input_grad_bn"] + calls["conv2d_input_grad"] == layers - 1
    assert calls["conv2d_input_grad_bn"] >= 5
    assert calls["update"] == (1 if dtype is None else 2)  # with a bf16 copy, and without
    # The sums of gradients at the two residuals lie in the data gradients' epilogues; the casts are those of input,
    # logits and their gradient.
    assert calls["add"] == calls["copy_"] == 0 and calls["to"] == (0 if dtype is None else 3), calls


def test_two_shapes_share_the_weights_not_their_copies(planner):
    """Each plan has 16-bit weights of its own: a step of one, replayed or not, is seen by the other."""
    model = fastconv.fuse(small_net(), inplace=True)
    twin = copy.deepcopy(model)
    steps = [
        fastconv.TrainStep(
            m, F.cross_entropy, torch.optim.SGD(m.parameters(), 0.5), autocast_dtype=torch.bfloat16, plan=True
        )
        for m in (model, twin)
    ]
    data = [(torch.randn(n, 3, 8, 8), torch.randint(5, (n,))) for n in (2, 3, 2, 3, 2)]
    for x, y in data:
        fresh = fastconv.TrainStep(twin, F.cross_entropy, steps[1].optimizer, autocast_dtype=torch.bfloat16, plan=True)
        assert torch.equal(steps[0](x, y), fresh(x, y))


def test_after_a_replay_versions_have_moved(planner):
    """The graph runs kernels, not operators: what watches the weights' versions must see the step all the same."""
    model = fastconv.fuse(small_net(), inplace=True)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step = fastconv.TrainStep(model, F.cross_entropy, sgd, autocast_dtype=torch.bfloat16, plan=True)
    x, y = torch.randn(2, 3, 8, 8), torch.randint(5, (2,))
    step(x, y)
    (plan,) = step._plans.cache.values()
    buffers = [sgd.state[p]["momentum_buffer"] for p in model.parameters()]
    before = [t._version for t in (*model.parameters(), *buffers)]
    plan.before()
    plan.after(replayed=True)
    assert all(t._version > v for t, v in zip((*model.parameters(), *buffers), before, strict=True))
    assert plan.versions == [p._version for p, _ in plan.halves]


def test_hyper_parameters_are_sent_to_the_device_when_they_change(planner):
    """What the calls read lies apart from what the host writes, on a GPU; elsewhere as if it did."""
    p = nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([p], 0.1, momentum=0.9)
    planned = PlannedOptimizer(sgd, [p], p.device)
    if planner.name == "simt":
        planned.hyper = [planned.hyper[0].clone()]
    bound = planned.hyper[0]
    assert bound is not planned.groups[0][2]
    planned.prepare()
    assert bound.tolist() == [0.1, 0.9, 0.0, 0.0]
    version = bound._version
    planned.prepare()
    assert bound._version == version  # nothing to send
    sgd.param_groups[0]["lr"] = 0.05
    planned.prepare()
    assert bound.tolist() == [0.05, 0.9, 0.0, 0.0]


@pytest.mark.parametrize("options", ({"fused": True}, {"capturable": True}), ids=("fused", "capturable"))
def test_an_adam_that_counts_on_the_device_steps_by_itself(options, planner):
    if planner.name == "simt":
        pytest.skip("the count lies on a GPU only")
    model = fastconv.fuse(small_net(), inplace=True)
    twin = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), 1e-3, **options)
    step = fastconv.TrainStep(model, F.cross_entropy, adam, plan=True)
    x, y = torch.randn(2, 3, 8, 8), torch.randint(5, (2,))
    step(x, y)
    other = torch.optim.Adam(twin.parameters(), 1e-3)
    F.cross_entropy(twin(x), y).backward()
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-3)
