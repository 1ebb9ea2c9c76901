"""bench/harness.py and page.py: how the competitors are counted and rotated, and what the page makes of their rows."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import harness  # noqa: E402


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_turn_is_one_untimed_call_and_then_the_timed_ones(turn):
    calls = []
    competitors = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    harness.interleave(competitors, torch.device("cpu"), seconds=0, most_rounds=harness.LEAST_ROUNDS, turn=turn)
    warm_up, rounds = calls[:9], calls[9:]
    assert warm_up == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    run = 1 + turn if turn else 1
    per_round = 3 * run
    assert len(rounds) % per_round == 0 and len(rounds) >= harness.LEAST_ROUNDS * per_round
    order = ["abc", "bca", "cab"]
    for i in range(len(rounds) // per_round):
        mine = rounds[i * per_round : (i + 1) * per_round]
        assert mine == [name for name in order[i % 3] for _ in range(run)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.machine, "environment", lambda device: {"rates": {"copy": 10.0, "fp32": 0.1}})
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)
    return harness.Bench("subject", tmp_path / "out", torch.device("cpu"), seconds=0.0)


def test_rows_are_on_the_disk_after_every_case(bench, monkeypatch):
    """So that a subject out of time leaves those it had; a file is the former one until it is whole."""
    competitors = {name: lambda: None for name in ("eager", "fastconv")}
    for count in (1, 2):
        bench.run(harness.Case("op", f"shape {count}", "fp32", 1.0, 1.0, competitors))
        assert sorted(path.name for path in bench.out.iterdir()) == ["subject.csv", "subject.json"]
        kept = json.loads((bench.out / "subject.json").read_text())
        assert kept["subject"] == "subject" and kept["environment"] == bench.environment
        assert kept["rows"] == [vars(row) for row in bench.rows] and len(kept["rows"]) == 2 * count
        assert len((bench.out / "subject.csv").read_text().splitlines()) == 1 + 2 * count

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        bench.run(harness.Case("op", "shape 3", "fp32", 1.0, 1.0, competitors))
    assert len(json.loads((bench.out / "subject.json").read_text())["rows"]) == 4


def test_a_peer_without_a_kernel_is_left_out(capsys):
    found, calls = {"eager": list}, []

    def refuses():
        raise RuntimeError("GET was unable to find an engine to execute this computation\nand more")

    def compiles():  # as torch.jit: in the second call
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("no such type")

    makers = {"cudnn": lambda: refuses, "traced": refuses, "jit": lambda: compiles, "peer": lambda: list}
    for name, make in makers.items():
        harness.add_if_it_runs(found, name, make, "4x8")
    assert list(found) == ["eager", "peer"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4x8: left out of this case: cudnn: GET was unable to find an engine to execute this computation"
    assert len(lines) == 3


def test_what_a_subject_may_take():
    limits = pytest.importorskip("all", reason="bench/all.py draws with matplotlib", exc_type=ImportError)
    names, left = list(limits.SUBJECTS), 900.0
    for i, (name, (_, share)) in enumerate(limits.SUBJECTS.items()):
        limit = limits.limit_of(name, names[i + 1 :], left)
        assert limit == pytest.approx(900 * share), "time enough: by the shares alone"
        left -= limit
    few = ["pooling", "cross_entropy", "batch_norm", "conv"]
    assert [limits.limit_of(name, few[i + 1 :], 105 - 25 * i) for i, name in enumerate(few)] == [25, 25, 25, 30]
    assert limits.limit_of("conv", few[:3], 120) == 45, "its share is more than half, the others need theirs"
    assert limits.limit_of("conv", [], 80) == 80, "what the others left"
    assert limits.limit_of("conv", few[:3], 40) == 10, "not enough for anybody"


def test_modes_of_torch_compile():
    def parse(*words):
        parser = argparse.ArgumentParser()
        parser.add_argument("--compile", **harness.COMPILE)
        return harness.modes(parser.parse_args(words).compile)

    assert parse() == [] and parse("--compile") == ["default"]
    assert parse("--compile", "default", "max-autotune") == ["default", "max-autotune"]
    with pytest.raises(SystemExit):
        parse("--compile", "fast")
    assert harness.compiled_name("default", "nhwc") == "torch.compile nhwc"
    assert harness.compiled_name("max-autotune", "nhwc") == "torch.compile max-autotune nhwc"
    assert not harness.compiled_name("default", "nhwc").startswith(harness.OURS), "it counts as a peer"


def test_the_page_has_a_section_for_each_file(tmp_path):
    """Operators with different peers, networks, other networks in a file of their own."""
    page = pytest.importorskip("page", reason="bench/page.py draws with matplotlib", exc_type=ImportError)

    def row(op, shape, competitor, speedup):
        return {
            "op": op, "shape": shape, "dtype": "fp32", "competitor": competitor, "us": 1e3 / speedup, "p20": 1.0, "p80": 1.0,
            "tflops": 1.0, "gb_s": 2.0, "floor_share": 0.5, "best_peer": "eager", "speedup": speedup, "error": 0.0,
            "rounds": 9, "quiet": True, "count": 1,
        }  # fmt: skip

    environment = {
        "device": {"name": "A machine", "detail": "2 threads"},
        "versions": {"torch": "2", "python": "3"},
        "git": {"commit": "0123456789", "dirty": False},
        "rates": {"copy": 10.0, "fp32": 0.1},
    }
    files = {
        "conv": [row("conv", "s", "eager nchw", 0.5), row("conv", "s", "eager nhwc", 1.0), row("conv", "s", "fastconv", 2.0)],
        "loss": [row("loss", "s", "eager", 1.0), row("loss", "s", "fastconv", 0.8)],
        "train_step": [row("resnet50", f"{b}x32px", c, s) for b in (4, 64) for c, s in (("eager", 1.0), ("fastconv", 3.0))],
        harness.of_models("train_step", ["vgg16"]): [row("vgg16", "16x32px", "fastconv fuse", 1.25)],
        harness.of_models("train_step", ["resnet50"], 224): [row("resnet50", "8x224px", "fastconv fuse", 1.5)],
    }  # fmt: skip
    assert harness.of_models("train_step", ["resnet50"]) == "train_step" and "train_step_models" in files
    for subject, rows in files.items():
        harness.save_rows(tmp_path, subject, environment, rows)
    page.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "commit 0123456" in text and "| conv | fp32 | 1 | 2.00 | 2.00 (s) | 2.00 (s) | 0 |" in text
    assert "| loss | fp32 | 1 | 0.80 | 0.80 (s) | 0.80 (s) | 1 |" in text, "a defeat is counted"
    assert "| resnet50 64x32px | fp32 | **fastconv** | 0.33 |" in text
    other, large = text.split("## Training step of other models")[1].split("## Training step, images of 224 px")
    assert "`bench/train_step.py` at 0123456" in large and "| resnet50 8x224px |" in large
    assert "| vgg16 16x32px | fp32 | **fastconv fuse** | 0.80 | 20,000 | 1.25 |" in other and ".png" not in other
    for picture in ("peers", "roofline", "train_step"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1000 and f"({picture}.png)" in text
