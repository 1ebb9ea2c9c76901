"""bench/harness.py: how the competitors' calls are counted and rotated."""

from __future__ import annotations

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
