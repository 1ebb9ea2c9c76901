"""CUDA graph capture for training steps and inference plans: torch.cuda.graph without what breaks long-lived programs.

Seen in PyTorch 2.11 (torch/cuda/graphs.py, and its CUDAGraph): another thread's allocation of pinned memory, a
DataLoader's say, invalidates a capture in the default mode; so does the destruction of an old graph, which the garbage
collector may choose this moment for; and a capture that fails leaves its stream current, its memory pool open and the
random generator in capture mode, so that the step after it fails too.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Records what the body launches into ``graph``, on ``stream``, with memory of ``pool``.

    The body's exceptions are passed on. A capture that could not be ended (the body synchronised, for example) raises
    RuntimeError, and leaves streams, memory and random numbers usable.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        torch.cuda.synchronize(stream.device)
        torch.cuda.empty_cache()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                try:
                    graph.capture_end()
                except RuntimeError:
                    _recover(pool, stream)
                    raise
    finally:
        if collects:
            gc.enable()


def _recover(pool: Any, stream: torch.cuda.Stream) -> None:
    """Undoes what capture_end() has not reached."""
    for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):
            undo(stream.device.index, pool)
    # The end of any capture takes the device's random generator out of capture mode.
    fresh = torch.cuda.Stream(stream.device)
    with contextlib.suppress(RuntimeError), torch.cuda.stream(fresh):
        empty = torch.cuda.CUDAGraph()
        empty.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=stream.device)  # a graph of nothing is warned about
        empty.capture_end()
