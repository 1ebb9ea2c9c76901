"""Tiles of the convolutions by measurement: every candidate of conv_config, checked for equality, then timed.

Tiles are measured inside tuning runs only (``python -m fastconv tune``, ``fastconv.tune.measuring()``): a dozen kernels
have to be compiled per convolution and direction, which is no price for a first call. What they measured is kept beside
the measurements of the backends (fastconv/_cache.py) and counts in every later process of the same environment.

The check: each candidate's result on random tensors, written over NaN, against the convolution in float32 by stock
PyTorch. A candidate that is wrong anywhere, or cannot run, gets a reason and no time.
"""

from __future__ import annotations

import logging
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _measured as measured
from .common import empty_nhwc
from .conv_config import Problem, Tile, candidates, device_limits

log = logging.getLogger("fastconv")

_ROUNDS, _REPEATS = 5, 10
_HEAD_START = 4_000_000  # cycles, some 2 ms: longer than it takes the host to launch a round
# Relative RMS error of a right result: its rounding to the dtype (half a unit: 2^-11 / sqrt(3) in fp16), with room for
# fp32 sums in any order; TF32 multiplies with 11 bits. The largest error may be this much times 16.
_RIGHT = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 3e-3}
_EXACT = 3e-5


def name_of(tile: Tile) -> str:
    """Without the splits: they follow from the shape and the exact batch, which :func:`class_of` rounds."""
    order = " positions" if tile.positions else ""
    tma = " tma" if tile.descriptors else ""
    return f"{tile.rows}x{tile.columns}x{tile.chunk} s{tile.stages}{order}{tma}"


def class_of(op: str, a: Problem, dtype: torch.dtype) -> str:
    """The name that a measurement is kept under: the batch rounded up to a power of two, the rest exact."""
    batch = 1 << (a.n - 1).bit_length() if a.n else 0
    how = " ".join("x".join(map(str, pair)) for pair in (a.stride, a.padding, a.dilation))
    kind = "exact" if a.exact else str(dtype).removeprefix("torch.")
    return f"tile {op} {kind} [{batch},{a.c},{a.h},{a.w}] [{a.k},{a.cg},{a.r},{a.s}] {how} {a.groups}"


def stored(op: str, a: Problem, like: Tensor) -> Tile | None:
    """The fastest measured candidate, here and now or by an earlier process; None without a measurement."""
    key = class_of(op, a, like.dtype)
    entry = measured.store_of(like.device).get(key)
    if entry is None:
        return None
    by_name = {name_of(t): t for t in candidates(op, a, *device_limits(like.device.index))}
    known = {name: times for name, times in entry["ms"].items() if name in by_name}
    if not known:
        return None
    best = min(known, key=lambda name: sum(known[name]))
    return by_name[measured.agreed(like.device, key, best, list(by_name))]


class _Trial:
    """One direction of one convolution on random tensors: run with a tile, check, time."""

    def __init__(self, op: str, a: Problem, like: Tensor) -> None:
        from . import conv2d

        self.device, self.dtype, self.exact = like.device, like.dtype, a.exact
        generator = torch.Generator(like.device).manual_seed(0)

        def image(*shape: int) -> Tensor:
            return empty_nhwc(like, shape).normal_(generator=generator)

        x, w, dy = image(a.n, a.c, a.h, a.w), image(a.k, a.cg, a.r, a.s), image(a.n, a.k, a.p, a.q)
        how = (a.stride, a.padding, a.dilation, a.groups)
        tf32 = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        try:
            x32, w32 = x.float().requires_grad_(), w.float().requires_grad_()
            with torch.enable_grad():
                y32 = F.conv2d(x32, w32, None, *how)
            dx32, dw32 = torch.autograd.grad(y32, (x32, w32), dy.float())
        finally:
            torch.backends.cudnn.conv.fp32_precision = tf32
        self.expected = {"fprop": y32.detach(), "dgrad": dx32, "wgrad": dw32}[op]
        self.out = empty_nhwc(like, self.expected.shape)
        self.run = {
            "fprop": lambda tile: conv2d.fprop(x, w, self.out, a, tile),
            "dgrad": lambda tile: conv2d.dgrad(dy, w, self.out, a, tile),
            "wgrad": lambda tile: conv2d.wgrad(dy, x, self.out, a, tile),
        }[op]

    def defect(self, tile: Tile) -> str:
        """Runs once; how the result is wrong, "" where it is right."""
        self.out.fill_(torch.nan)
        self.run(tile)
        error = (self.out.float() - self.expected).abs()
        limit = _EXACT if self.exact else _RIGHT[self.dtype]
        rms = (error.square().mean().sqrt() / self.expected.square().mean().sqrt()).item()
        largest = (error.max() / self.expected.abs().max()).item()
        if rms <= limit and largest <= 16 * limit:
            return ""
        return f"wrong numbers: relative error {rms:.2g} (RMS), {largest:.2g} (largest)"

    def milliseconds(self, tile: Tile) -> float:
        if self.device.type != "cuda":  # the interpreter: one round proves the machinery
            start = time.perf_counter()
            self.run(tile)
            return (time.perf_counter() - start) * 1e3
        least = float("inf")
        for _ in range(_ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The device waits until the whole round is in its queue: a small kernel takes less than its launch, and
            # the time between the events would be the host's.
            torch.cuda._sleep(_HEAD_START)
            start.record()
            for _ in range(_REPEATS):
                self.run(tile)
            end.record()
            end.synchronize()
            least = min(least, start.elapsed_time(end) / _REPEATS)
        return least


def tune(op: str, a: Problem, like: Tensor) -> Tile:
    """Measures all candidates of ``op`` ("fprop", "dgrad", "wgrad") in ``like``'s dtype and on its device, keeps the
    times and returns the fastest. Raises RuntimeError where none is right."""
    # Normal tensors, whatever the call's are: the check takes gradients, which inference tensors cannot have.
    with measured.on(like.device), torch.inference_mode(False):
        entry = _times(op, a, like)
    key = class_of(op, a, like.dtype)
    measured.store_of(like.device).put(key, entry, replace=True)
    if measured.policy is not None:
        measured.policy.fresh.add(key)
    return stored(op, a, like)


def _times(op: str, a: Problem, like: Tensor) -> dict[str, dict]:
    began, trial = time.perf_counter(), _Trial(op, a, like)
    ms: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for tile in candidates(op, a, *device_limits(like.device.index)):
        name = name_of(tile)
        try:
            defect = trial.defect(tile)
        except Exception as error:  # whatever the compiler or the launch raises: the others are still there
            defect = f"{type(error).__name__}: {error}".splitlines()[0]
        if defect:
            failed[name] = defect
            log.warning("%s: tile %s is left out: %s", class_of(op, a, like.dtype), name, defect)
        else:
            ms[name] = [round(trial.milliseconds(tile), 5)]
    if not ms:
        raise RuntimeError(f"conv2d {op}: no tile gives right numbers: {failed}")
    log.info("measured in %.2f s: %s: %s", time.perf_counter() - began, class_of(op, a, like.dtype), ms)
    return {"ms": ms, **({"failed": failed} if failed else {})}
