"""Runs the Triton tests in the interpreter, in a process of its own: triton reads TRITON_INTERPRET when imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastconv import triton as backend

HERE = Path(__file__).parent
FILES = [
    HERE / f"test_triton_{name}.py"
    for name in ("tolerance", "norm", "loss", "pooling", "conv", "conv_tiles", "operators")
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.skipif(backend.interpreting(), reason="this process is the interpreter already")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU in this process")
def test_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *map(str, FILES)]
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    counts = dict((word, int(number)) for number, word in re.findall(r"(\d+) (passed|skipped|failed)", run.stdout))
    assert counts.get("passed", 0) > 200 and "skipped" not in counts, run.stdout[-500:]
