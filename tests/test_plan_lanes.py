"""Calls of a plan that run aside: on two streams of a GPU, and on a CPU as late as the program allows."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from plan_util import small_net
from torch.utils import cpp_extension

import fastconv
from fastconv import _ext
from fastconv._plan import program as programs
from fastconv._plan.program import Builder

if not _ext.HAS_EXT:
    pytest.skip(_ext.EXT_REASON, allow_module_level=True)

F32 = torch.float32


def test_streams_and_events(tmp_path):
    """lanes.h over a device that knows what each stream has waited for."""
    source, target = Path(__file__).with_name("lanes.cpp"), tmp_path / "lanes"
    library = Path(torch.__file__).parent / "lib"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = ["g++", "-std=c++17", "-Wall", abi, *includes, str(source), "-o", str(target)]
    command += [f"-L{library}", f"-Wl,-rpath,{library}", "-lc10"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([str(target)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stdout + ran.stderr


def assign(build: Builder, to, source, aside: bool = False) -> None:
    build.call("aten::copy_", [to, source, False], [None], aside)


def test_a_call_aside_is_done_before_what_it_conflicts_with():
    """Read after write, write after read, write after write, through a view, through a tensor of the caller's."""
    kept = torch.zeros(4)
    for conflict in ("reads", "overwrites what it reads", "overwrites", "reads a view", "reads a tensor", "no"):
        build = Builder()
        entry = build.slot()
        a, b, c = (build.buffer((4,), F32) for _ in range(3))
        assign(build, a, entry)
        view = build.returning("aten::reshape", [b, [4]])
        assign(build, kept if conflict == "reads a tensor" else b, a, aside=True)  # call 2
        assign(build, c, entry)  # reads what calls aside only read
        if conflict == "reads":
            assign(build, c, b)
        elif conflict == "overwrites what it reads":
            assign(build, a, entry)
        elif conflict == "overwrites":
            assign(build, b, entry)
        elif conflict == "reads a view":
            assign(build, c, view)
        elif conflict == "reads a tensor":
            assign(build, c, kept.view(2, 2).flatten())
        assign(build, c, entry)
        assert build.joins() == {2: 5 if conflict == "no" else 4}, conflict


def test_what_a_call_aside_returns_is_waited_for():
    build = Builder()
    entry = build.slot()
    twice = build.returning("aten::add.Tensor", [entry, entry, 1], aside=True)
    build.returning("aten::relu", [entry])
    both = build.returning("aten::cat", [[entry, twice], 0])
    assert build.joins() == {0: 2}
    program = build.finish()
    for value in (torch.ones(2), torch.full((3,), 5.0)):
        program.put(entry.index, value)
        program.run()
        assert torch.equal(program.get(both.index), torch.cat([value, 2 * value]))


def test_so_many_are_on_their_way_and_their_memory_is_theirs(monkeypatch):
    """The oldest is waited for when another sets out; memory that it reads is given to nobody before."""
    monkeypatch.setattr(programs, "_ASIDE", 2)
    build, results = Builder(), [torch.zeros(8) for _ in range(5)]
    entry, buffers = build.slot(), []
    for i, result in enumerate(results):
        buffers.append(build.buffer((8,), F32))
        build.call("aten::add.out", [entry, entry, i, buffers[-1]], [None])
        assign(build, result, buffers[-1], aside=True)
    assert build.joins() == {1: 5, 3: 7, 5: 9, 7: 10, 9: 10}
    program = build.finish()
    assert build.arena_bytes == 3 * 256 - 224, "three buffers live together: two on their way, and the next"
    value = torch.randn(8)
    program.put(entry.index, value)
    program.run()  # a CPU's calls aside run as late as they may
    for i, result in enumerate(results):
        assert torch.equal(result, torch.add(value, value, alpha=i))


def test_a_program_that_failed_keeps_nothing_for_later():
    program = torch.classes.fastconv.Program(1)
    seen = torch.zeros(1)
    program.call("aten::copy_", "", [seen, torch.ones(1), False], [], [])
    program.call("aten::relu", "", [torch.ones(1)], [0, -1, 0], [-1])  # its slot is empty
    program.aside(0, 2, torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            program.run()
        assert seen == 0
    program.put(0, torch.ones(1))
    program.run()
    assert seen == 1


def test_refuses_what_does_not_fit():
    program = torch.classes.fastconv.Program(0)
    program.call("aten::relu", "", [torch.ones(1)], [], [-1])
    cpu = torch.device("cpu")
    with pytest.raises(IndexError, match="call expected below 1, got 1"):
        program.aside(1, 1, cpu)
    for join in (0, 2):
        with pytest.raises(IndexError, match=f"join expected above 0 and at most 1, got {join}"):
            program.aside(0, join, cpu)
    program.aside(0, 1, cpu)
    with pytest.raises(RuntimeError, match="run_part expected a program without calls aside"):
        program.run_part(0, 1)


@pytest.mark.parametrize("planner", ("simt", "cuda"), indirect=True)
@pytest.mark.parametrize("keep_grads", (False, True), ids=("updated", "keep_grads"))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("small", "resnet"))
def test_a_step_is_the_same_on_one_stream_and_on_two(name, dtype, keep_grads, planner, monkeypatch):
    """In the emulator the second stream is as late as it may be, so that a join too late shows as another result."""
    torch.manual_seed(0)
    block, layers = torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]
    net = small_net() if name == "small" else torchvision.models.ResNet(block, layers, num_classes=5, width_per_group=8)
    losses, weights = {}, {}
    batch = torch.randn(3, 3, 16, 16), torch.randint(5, (3,))
    for streams in ("1", "2"):
        monkeypatch.setenv("FASTCONV_STREAMS", streams)
        model = fastconv.fuse(copy.deepcopy(net), inplace=True).to(memory_format=torch.channels_last)
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        step = fastconv.TrainStep(
            model, F.cross_entropy, sgd, autocast_dtype=dtype, keep_grads=keep_grads, plan=True, cuda_graph=False
        )
        losses[streams] = torch.stack([step(*batch) for _ in range(3)])
        weights[streams] = [p.detach().clone() for p in model.parameters()]
        (plan,) = step._plans.cache.values()
        joins = plan.joins
        assert (streams == "2") == bool(joins)
    assert all(join - call > 1 for call, join in list(joins.items())[:-1]), "next to something"
    assert torch.equal(losses["1"], losses["2"])
    for p, q in zip(*weights.values(), strict=True):
        assert torch.equal(p, q)
