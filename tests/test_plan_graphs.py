"""Plans in CUDA graphs, without a GPU: what the host does around capture and replay, over a graph that replays calls.

The stand-in runs nothing while it captures and runs the plan's calls at every replay, as a CUDA graph does with their
kernels; the calls themselves are the emulator's. Streams, events and memory pools do nothing here."""

from __future__ import annotations

import contextlib
import copy
import types

import pytest
import torch
import torch.nn.functional as F
from plan_util import small_net
from torch import nn

import fastconv
from fastconv import _ext, train
from fastconv._plan import inference
from fastconv._plan.inference import GraphedPlan, InferencePlan
from fastconv._plan.kernels import kernels
from fastconv._plan.training import TrainingPlan

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)

pytestmark = pytest.mark.parametrize("planner", ("simt",), indirect=True)


class Graph:
    """A CUDA graph's part in a program: what was called inside ``torch.cuda.graph`` runs at replay()."""

    capturing: Graph | None = None

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for call in self.calls:
            call()


@contextlib.contextmanager
def capture(graph, pool, stream):
    assert Graph.capturing is None
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


def captured(real):
    """The method, run at replay where it is called in a capture; its result then is a tensor that replays fill."""

    def method(self, *args):
        graph = Graph.capturing
        if graph is None:
            return real(self, *args)
        out = []

        def call():
            result = real(self, *args)
            out[0].set_(result.clone()) if out[0].numel() == 0 else out[0].copy_(result)

        with torch.inference_mode(False):  # a replay writes to it in any mode
            out.append(torch.empty(0))
        graph.calls.append(call)
        return out[0]

    return method


def captured_pair(real):
    """TrainStep.prepared, likewise: its tensors are filled at every replay."""

    def method(self, x, y):
        graph = Graph.capturing
        if graph is None or self.prepare is None:
            return real(self, x, y)
        state = torch.get_rng_state()
        pair = [t.clone() for t in real(self, x, y)]
        torch.set_rng_state(state)
        graph.calls.append(lambda: [place.copy_(new) for place, new in zip(pair, real(self, x, y), strict=True)])
        return pair

    return method


@pytest.fixture
def gpu(monkeypatch):
    nothing = types.SimpleNamespace(
        wait_stream=lambda s: None, wait_event=lambda e: None, record=lambda s=None: None, record_event=lambda: None
    )
    for name, value in {
        "Stream": lambda *a, **k: nothing, "Event": lambda *a, **k: nothing, "current_stream": lambda *a: nothing,
        "stream": lambda s: contextlib.nullcontext(), "graph_pool_handle": lambda: None, "CUDAGraph": Graph,
        "is_current_stream_capturing": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (train, inference):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(TrainingPlan, "launch", captured(TrainingPlan.launch))
    monkeypatch.setattr(InferencePlan, "run", captured(InferencePlan.run))
    monkeypatch.setattr(fastconv.TrainStep, "prepared", captured_pair(fastconv.TrainStep.prepared))


def step_of(model: nn.Module, graphs: bool, **options) -> fastconv.TrainStep:
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step = fastconv.TrainStep(model, F.cross_entropy, sgd, plan=True, **options)
    if graphs:
        step._graphs = train._StepGraphs(step, required=True)
    return step


def batch(size: int = 2):
    return torch.randn(size, 3, 8, 8), torch.randint(5, (size,))


@pytest.mark.parametrize("options", ({}, {"keep_grads": True}, {"autocast_dtype": torch.bfloat16}), ids=str)
def test_replays_train_as_the_plan_does(options, gpu, planner):
    """A scheduler, weights written by hand, a second shape and a replaced layer on the way: all of them count."""
    models = [fastconv.fuse(small_net(), inplace=True) for _ in range(2)]
    steps = [step_of(m, graphs, **options) for m, graphs in zip(models, (True, False), strict=True)]
    schedules = [torch.optim.lr_scheduler.StepLR(s.optimizer, 2, 0.5) for s in steps]

    def both(size: int = 2) -> None:
        pair = batch(size)
        losses = [step(*pair) for step in steps]
        assert torch.equal(*losses), losses
        for schedule in schedules:
            schedule.step()
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            assert torch.equal(p, q) and (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)

    for _ in range(6):
        both()
    graphs = steps[0]._graphs
    assert steps[0].captured == 1 and next(iter(graphs.cache.values())).graph.replays == 3
    with torch.no_grad():
        for m in models:
            m[0].weight.mul_(0.5)
    both()
    for size in (3, 2, 3, 2):  # each shape has 16-bit weights of its own
        both(size)
    assert steps[0].captured == 2
    before = list(graphs.cache.values())
    for m in models:
        m[2] = nn.SiLU()
    both()
    both()
    assert not set(map(id, graphs.cache.values())) & {id(before[0])} and graphs.recaptures == 0


class Crops:
    """Batches by index, from images that stay where they are: shifted by random numbers."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.images, self.labels, self.calls = torch.randn(20, 3, 8, 8), torch.randint(5, (20,)), 0

    def __call__(self, index: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        assert not torch.is_grad_enabled()
        return self.images[index] + torch.rand(len(index), 1, 1, 1), labels[index]


def test_replays_prepare_their_batches(gpu, planner):
    """Each replay its own, with new random numbers; a new shape is prepared once before it is captured."""
    models = [fastconv.fuse(small_net(), inplace=True) for _ in range(2)]
    makes = [Crops(), Crops()]
    ours, plain = (
        step_of(m, graphs, **options)
        for m, graphs, options in zip(models, (True, False), ({"prepare": makes[0]}, {}), strict=True)
    )
    states = [torch.get_rng_state()] * 2

    def both(size: int) -> None:
        index = torch.randperm(20)[:size]
        losses = []
        for i, step in enumerate((ours, plain)):
            before = torch.get_rng_state()
            torch.set_rng_state(states[i])
            with torch.no_grad():
                batch = (index, makes[0].labels) if i == 0 else makes[1](index, makes[1].labels)
            losses.append(step(*batch))
            states[i] = torch.get_rng_state()
            torch.set_rng_state(before)
        assert torch.equal(*losses), losses

    for _ in range(6):
        both(2)
    assert ours.captured == 1 and next(iter(ours._graphs.cache.values())).graph.replays == 3
    both(3)
    assert ours.captured == 1  # not known before
    both(3)
    both(2)
    assert ours.captured == 2
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


def test_prepared_sizes_may_not_change_under_a_graph(gpu, planner):
    model, sizes = fastconv.fuse(small_net(), inplace=True), [2]
    step = step_of(model, True, prepare=lambda x, y: tuple(t[: sizes[0]] for t in (x, y)))
    pair = batch(4)
    for _ in range(3):
        step(*pair)
    sizes[0] = 3
    with pytest.raises(
        RuntimeError, match=r"prepare expected to return the sizes of before, \[\[2, 3, 8, 8\], \[2\]\]"
    ):
        step(*pair)


def test_a_step_that_no_plan_holds_is_refused_or_captured_as_it_is(gpu, planner):
    model = fastconv.fuse(small_net(), inplace=True)
    step = step_of(model, True)
    step.loss_fn = nn.MultiMarginLoss()
    with pytest.raises(RuntimeError, match="plan=True expected"):
        step(*batch())


@torch.no_grad()
def test_inference_replays_and_keeps_its_results_apart(gpu, planner):
    model = fastconv.fuse(small_net().eval(), inplace=True)
    plan = InferencePlan(model, (2, 3, 8, 8), torch.float32, kernels(torch.device("cpu")))
    first = batch()[0]
    graphed = GraphedPlan(plan, first)
    inputs = [batch()[0] for _ in range(3)]
    outs = [graphed.run(x) for x in inputs]
    stock = fastconv.unfuse(copy.deepcopy(model))
    for x, out in zip(inputs, outs, strict=True):
        torch.testing.assert_close(out, stock(x), rtol=1e-4, atol=1e-5)
    assert graphed.graph.replays == 3


@pytest.mark.parametrize(
    "make, inside",
    (
        (torch.optim.SGD, True),
        (torch.optim.Adam, False),
        (lambda p: torch.optim.Adam(p, capturable=True), True),
        (torch.optim.Adagrad, False),
        (torch.optim.Adafactor, False),
    ),
)
def test_optimizers_that_count_on_the_host_step_outside_the_graph(make, inside, gpu, planner):
    model = small_net()
    step = fastconv.TrainStep(model, F.cross_entropy, make(model.parameters()), plan=False)
    assert train._StepGraphs(step, required=True).update_inside is inside


@pytest.mark.parametrize(
    "change",
    (
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: model[1].eval(),
        lambda model: model.__setitem__(2, nn.SiLU()),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
    ),
    ids=("frozen", "eval", "replaced", "parameter"),
)
def test_a_changed_model_is_captured_anew(change, gpu, planner):
    model = small_net()
    step = step_of(model, False)
    step._plans, step.plan_required, step._graphs = None, False, train._StepGraphs(step, required=True)
    pair = batch()
    for _ in range(5):
        step(*pair)
    (first,) = step._graphs.cache.values()
    step(*pair)
    assert first in step._graphs.cache.values()
    change(model)
    step(*pair)
    (second,) = step._graphs.cache.values()
    assert second is not first and step._graphs.recaptures == 0


def test_inference_captured_in_inference_mode_serves_other_calls(gpu, planner):
    model = fastconv.fuse(small_net().eval(), inplace=True)
    plan = InferencePlan(model, (2, 3, 8, 8), torch.float32, kernels(torch.device("cpu")))
    with torch.inference_mode():
        graphed = GraphedPlan(plan, batch()[0])
    x = batch()[0]
    with torch.no_grad():
        torch.testing.assert_close(graphed.run(x), fastconv.unfuse(copy.deepcopy(model))(x), rtol=1e-4, atol=1e-5)
