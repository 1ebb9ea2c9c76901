"""The backend "simt" of the suite: the CUDA operators, host side and kernels, run on CPU tensors by tests/simt."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from fastconv.ops import registry

TOO_LARGE = "too large for the emulator (a GPU runs it)"
# The emulator does about 1.5 GFLOP/s in tensor-core kernels, 0.1 in scalar ones: a test stays near a second.
_MOST_MULTIPLY_ADDS = 12_000_000
_MOST_ELEMENTS = 800_000
_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


@functools.cache
def add() -> str:
    """Builds and registers the backend once; the reason why it cannot be had, or ""."""
    sys.path.insert(0, str(Path(__file__).parent / "simt"))
    import simt_host
    import simt_lib

    missing = simt_lib.missing()
    if missing:
        return missing
    simt_host.load()
    here = registry.Availability(True, "the emulator of tests/simt")
    registry.add_backend("simt", "fastconv_simt", cannot_run, here)
    return ""


def cannot_run(op: str, tensors: tuple[torch.Tensor | None, ...]) -> str:
    for t in tensors:
        if t is None:
            continue
        if t.is_floating_point() and t.dtype not in _DTYPES:
            return f"dtype {str(t.dtype).removeprefix('torch.')} is not supported"
        if t.layout is not torch.strided:
            return f"layout {t.layout} is not supported"
        if t.numel() > _MOST_ELEMENTS:
            return TOO_LARGE
    if op.startswith("conv2d"):
        x, w = tensors[:2]
        if x.numel() * (w.numel() // max(w.size(1), 1)) > _MOST_MULTIPLY_ADDS * (1 if x.dtype == torch.float32 else 4):
            return TOO_LARGE
    return ""
