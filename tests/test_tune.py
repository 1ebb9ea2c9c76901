"""fastconv.explain and fastconv.tune, the command, the cost of a cached choice, and ranks that agree."""

from __future__ import annotations

import subprocess
import sys
import timeit

import pytest
import torch
from choice_util import CHOICE_TESTS, favour, image, net_call
from util import same_bits

import fastconv
import fastconv.functional as FF
from fastconv.ops import choice

pytestmark = CHOICE_TESTS


def test_explain_tells_and_changes_nothing(monkeypatch):
    favour(monkeypatch, "aten")
    norm = (torch.zeros(8), torch.ones(8))
    x, counter = image(4, 8, 6, 6), torch.tensor(0)
    found = fastconv.explain("batch_norm_act", x, *norm, training=True, num_batches_tracked=counter)
    assert found.backend == "cpu" and counter == 0 and same_bits(norm[0], torch.zeros(8))
    FF.batch_norm_act(x, *norm, training=True, num_batches_tracked=counter)
    found = fastconv.explain(FF.batch_norm_act, x, *norm, training=True, num_batches_tracked=counter)
    assert found.backend == "aten" and found.ms == {"cpu": [2.0], "aten": [1.0]} and counter == 1
    text = str(found)
    assert "batch_norm_act runs on aten: the fastest of 2 measured" in text
    assert "cpu     forward 2.000 ms" in text and "batch_norm_act float32[4,8,6,6]cl" in text
    refused = fastconv.explain("max_pool2d", torch.ones(1, 1, 4, 4, dtype=torch.int32), 2)
    assert refused.backend == "aten" and "int32" in refused.refused["cpu"] and "int32" in str(refused)
    with fastconv.use_backend("cpu"):
        assert "use_backend('cpu')" in fastconv.explain("max_pool2d", x, 2).reason
        with pytest.raises(RuntimeError, match="cannot run this call"):
            fastconv.explain("max_pool2d", torch.ones(1, 1, 4, 4, dtype=torch.int32), 2)
    assert fastconv.explain("conv2d_bias_relu", x, torch.randn(8, 8, 1, 1)).backend == "cpu"
    assert fastconv.explain("avg_pool2d", x[0], 2).backend == "cpu"
    for wrong in ("conv3d", "torch", torch.relu, torch.nn.functional.max_pool2d):
        with pytest.raises(ValueError, match="explain: op expected a function of fastconv.functional"):
            fastconv.explain(wrong, x)
    with pytest.raises(RuntimeError, match="weight"):
        fastconv.explain("conv2d_bias_act", x, torch.randn(8, 3, 1, 1))


def test_the_measuring_context(measured, monkeypatch):
    monkeypatch.delenv("FASTCONV_TUNE")
    call = net_call()
    with fastconv.tune.measuring(seconds=0.0) as tuning:
        call(), call()
    assert len(measured) == 1 and list(tuning.results) == measured and tuning.seconds > 0
    assert "| winner |" in tuning.table(torch.device("cpu"))
    call()
    with fastconv.tune.measuring(seconds=0.0) as tuning:
        call()
    assert len(measured) == 1 and not tuning.results
    with fastconv.tune.measuring(seconds=0.0, again=True) as tuning:
        call(), call()
    assert len(measured) == 2 and len(tuning.results) == 1


def test_tuning_a_model_leaves_it_as_it_was(measured):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(72, 5),
    ).eval()  # fmt: skip
    model[6].bias.grad = torch.ones(5)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state, totals = torch.get_rng_state(), []
    tuning = fastconv.tune.tune(
        model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 5, dtypes=("fp32", "bf16"), seconds=0.0,
        progress=lambda total: totals.append(total) or (lambda: totals.append(1)),
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model[6].bias.grad, torch.ones(5)) and model[0].weight.grad is None
    assert totals == [len(measured), *[1] * len(measured)] and len(tuning.results) == len(measured) == 9
    assert (
        sum(tuning.calls.values()) == 2 * (2 + 2) + 2
    )  # conv+bn+relu and pool, in two modes and dtypes; the loss twice


def test_the_choice_costs_less_than_2_microseconds():
    """Four tensors, a cached decision: what a call pays for "auto". Other programs can only add to the least time."""
    x, w, b, r = image(4, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8), image(4, 8, 6, 6)
    settings = (1, 1, 1, 1, "relu")
    FF.conv2d_bias_act(x, w, b, 1, 1, residual=r)

    def look_up():
        return choice.recall("conv2d_bias_act", (x, w, b, r), settings)

    assert look_up().backend in ("cpu", "aten")
    assert min(timeit.repeat(look_up, number=1000, repeat=50)) / 1000 < 2e-6


TUNE = ["-m", "fastconv", "tune", "--model", "squeezenet1_1", "--batch-size", "2", "--image-size", "32", "--seconds", "0"]  # fmt: skip


def test_the_tune_command(tmp_path):
    pytest.importorskip("torchvision")
    table = tmp_path / "table.md"
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *TUNE, "--output", str(table)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "Measured now:" in outputs[0] and "Measured now:" not in outputs[1], "the second run finds it all there"
    assert f"Kept in {tmp_path / 'measurements.json'}" in outputs[0]
    text = table.read_text()
    assert "squeezenet1_1, batch 2, 32 px, fp32, train, inference" in text and "Winners of" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "class of calls" not in line]
    assert {row.split("|")[4 + 1].strip() for row in rows} <= {"cpu", "aten"} and len(rows) > 20
    wrong = subprocess.run([sys.executable, *TUNE[:4], "resnet5000"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode != 0 and "resnet5000" in wrong.stderr and "Traceback" not in wrong.stderr
    if not torch.cuda.is_available():
        wrong = subprocess.run([sys.executable, *TUNE, "--device", "cuda"], capture_output=True, text=True, timeout=120)
        assert wrong.returncode != 0 and "torch sees none" in wrong.stderr and "Traceback" not in wrong.stderr


RANK = """
import os, sys, torch, torch.distributed as dist
import fastconv, fastconv.functional as FF
from fastconv.ops import choice
from fastconv.ops import measure as measuring
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
favourite = ("cpu", "aten")[rank]  # each rank's clock says something else
choice.measure = lambda op, names, run, tensors, settings, seconds=None: measuring.Result(
    {n: [1.0 if n == favourite else 2.0] for n in names})
w = torch.randn(8, 8, 3, 3)
names = []
for size in (6, 7, 8, 9):
    x = torch.randn(4, 8, size, size)
    FF.conv2d_bias_act(x, w)
    names.append(choice.recall("conv2d_bias_act", (x, w, None, None), (1, 0, 1, 1, "relu")).backend)
if rank == 1:  # a shape that the other rank never sees, as in a last, smaller batch
    names.append("alone")
    FF.conv2d_bias_act(torch.randn(1, 8, 5, 5), w)
dist.barrier()
print(names[:4])
"""


def test_ranks_agree(tmp_path, monkeypatch):
    """Two gloo ranks, each with a cache and a winner of its own: both take what the first of them chose."""
    ranks = []
    for rank in range(2):
        monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / str(rank)))
        command = [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meeting")]
        ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [r.communicate(timeout=120) for r in ranks]
    assert all(r.returncode == 0 for r in ranks), outputs
    assert outputs[0][0] == outputs[1][0] and outputs[0][0].count("'") == 8
