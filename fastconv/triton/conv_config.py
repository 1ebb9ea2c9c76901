"""Convolution problems and the choice of their tiles.

A tile is chosen from a short table by a cost model; :func:`candidates` gives the best of them (at most 12) to a tuner,
and its first entry is what runs without one (conv_tune.py measures them). Triton's own autotuner is not used: it would
time inside whatever call comes first, a graph capture included.

The model: a tile's main loop takes max(FLOPs / tensor-core rate, bytes loaded / L2 rate) of one SM, plus a start and an
epilogue; the launch takes as many rounds as its programs need on all SMs. It knows nothing of bank conflicts or
pipelining depth, it only has to put the dozen plausible tiles first.

Every tile has 4 warps: convolution templates with 8 and more gave wrong numbers on some versions of Triton, so a larger
count may enter the table only by way of conv_tune.py's equality check. 4 warps are one warpgroup, one wgmma of sm_90.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from . import interpreting
from .common import cdiv, next_power_of_2

MOST_CANDIDATES = 12
_TWINS = 4
FLAT_CHANNELS = 8  # up to here the taps are folded into the reduction: a tap's own chunk of 16 would be half empty
# Estimates for one H100, not measured: the model needs ratios, and the device's own SMs and shared memory.
_FLOPS_PER_SM = {2: 6.0e12, 4: 3.0e12}  # by bytes per element, dense; fp32 through TF32
_EXACT_FLOPS_PER_SM = 0.4e12
_L2_BYTES_PER_SM = 4.0e10
_TILE_SECONDS = 1.5e-6  # start of a program, first loads, epilogue
_SHARED_DEFAULT, _SMS_DEFAULT = 227 * 1024, 132


@dataclass(frozen=True)
class Problem:
    """One convolution: output [n, k, p, q] = input [n, c, h, w] * weight [k, c / groups, r, s]."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    itemsize: int = 2
    exact: bool = False  # fp32 without TF32: fused multiply-adds, no tensor cores

    @property
    def p(self) -> int:
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def cg(self) -> int:
        return self.c // self.groups

    @property
    def kg(self) -> int:
        return self.k // self.groups

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c and self.groups > 1

    @property
    def flat(self) -> bool:
        return self.cg <= FLAT_CHANNELS and self.r * self.s > 1

    @property
    def pointwise(self) -> bool:
        return self.r == self.s == 1 and self.padding == (0, 0)


@dataclass(frozen=True)
class Tile:
    """rows x columns of the result per program, chunk of the reduction, pipeline stages, split of the reduction.

    positions: rows are the images of one output position (fprop, dgrad), so that taps outside the image cost nothing.
    descriptors: operands come by TMA (conv_pointwise.py), where :func:`fits_descriptors` allows it.
    """

    rows: int
    columns: int
    chunk: int
    stages: int
    splits: int = 1
    positions: bool = False
    descriptors: bool = False


def fits_descriptors(op: str, a: Problem, shared: int) -> bool:
    """Whether both operands are matrices that a TMA descriptor can describe, on an architecture that has TMA.

    The shared memory tells sm_90 and sm_100; sm_120 has TMA too, but no wgmma for it to feed.
    """
    matrix = a.pointwise and a.stride == (1, 1) and a.groups == 1 and a.itemsize == 2
    return op != "wgrad" and matrix and a.c % 8 == 0 and a.k % 8 == 0 and shared >= 200 * 1024


# (rows, columns, chunk, stages) for 2-byte elements; 4-byte ones take half the chunk. 128x128 is the largest whose fp32
# accumulator (128 registers per thread at 4 warps) leaves room for addresses; 3 stages of 64 should hide an L2
# latency behind wgmma (to be measured) and let two blocks of 64x64 share an SM; 16 rows are for batch 4 on 1x1 maps.
_TABLE = (
    (128, 128, 64, 3),
    (128, 128, 32, 4),
    (128, 64, 64, 3),
    (128, 64, 32, 4),
    (64, 128, 64, 3),
    (64, 64, 64, 4),
    (64, 64, 32, 4),
    (128, 32, 64, 3),
    (64, 32, 64, 4),
    (32, 64, 64, 4),
    (32, 128, 64, 4),
    (32, 32, 64, 5),
    (16, 64, 64, 5),
    (16, 128, 64, 4),
    (16, 32, 64, 5),
    (64, 16, 64, 4),
    (128, 16, 32, 4),
    (16, 16, 64, 5),
)


@functools.cache
def device_limits(index: int | None) -> tuple[int, int]:
    """(SMs, bytes of shared memory per block) of a CUDA device; an H100's where there is none.

    The interpreter runs programs one after another: one SM, so that it gets few and large tiles.
    """
    if interpreting():
        return 1, _SHARED_DEFAULT
    if index is None or not torch.cuda.is_available():
        return _SMS_DEFAULT, _SHARED_DEFAULT
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def live_taps(out: int, size: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """(sum over output positions of the taps inside the image, taps inside for some position) along one side."""
    inside = [[0 <= o * stride - padding + t * dilation < size for t in range(taps)] for o in range(out)]
    return sum(map(sum, inside)), sum(map(any, zip(*inside, strict=True))) if inside else 0


def _work(op: str, problem: Problem, rows_tile: int, positions: bool) -> tuple[int, int, int, float]:
    """(row tiles, columns, groups, reduction length of one tile on average)"""
    a = problem
    if op == "wgrad":
        live = _live(a)
        fraction = live[0] * live[2] / max(1, a.p * a.q * a.r * a.s)
        taps = 1 if a.flat else a.r * a.s
        columns = a.cg * a.r * a.s if a.flat else a.cg
        return cdiv(a.kg, rows_tile) * taps, columns, a.groups, a.n * a.p * a.q * (1.0 if a.flat else fraction)
    high, union_high, wide, union_wide = _live(a)
    if op == "fprop":
        places, columns, reduction = a.p * a.q, a.kg, a.cg
        phases = 1
    else:
        phases = a.stride[0] * a.stride[1]
        places, columns, reduction = cdiv(a.h, a.stride[0]) * cdiv(a.w, a.stride[1]), a.cg, a.kg
    if positions:
        tiles = cdiv(a.n, rows_tile) * places * phases
        taps = high * wide / max(1, places * phases)
    else:
        tiles = cdiv(a.n * places, rows_tile) * phases
        taps = union_high * union_wide / phases
    return tiles, columns, a.groups, taps * reduction


@functools.lru_cache(maxsize=4096)
def _live(a: Problem) -> tuple[int, int, int, int]:
    # Maps wider than 64 waste too little on their border to count it.
    sides = []
    for out, size, taps, i in ((a.p, a.h, a.r, 0), (a.q, a.w, a.s, 1)):
        if out > 64:
            sides += [out * taps, taps]
        else:
            sides += live_taps(out, size, taps, a.stride[i], a.padding[i], a.dilation[i])
    return tuple(sides)


def _splits(op: str, problem: Problem, tile: tuple, sms: int) -> int:
    """wgrad: enough slices of the reduction for two programs per SM, each with 4 chunks or more of its own."""
    if op != "wgrad":
        return 1
    tiles, columns, groups, reduction = _work(op, problem, tile[0], False)
    programs = tiles * cdiv(columns, tile[1]) * groups
    return max(1, min(2 * sms // max(1, programs), int(reduction) // (4 * tile[2]), 64))


def _seconds(op: str, problem: Problem, tile: Tile, sms: int) -> float:
    tiles, columns, groups, reduction = _work(op, problem, tile.rows, tile.positions)
    if op != "wgrad" and problem.flat and op == "fprop":
        reduction = problem.r * problem.s * problem.cg
    chunks = cdiv(max(1, int(reduction / tile.splits)), tile.chunk)
    flops = 2.0 * tile.rows * tile.columns * tile.chunk
    loaded = (tile.rows + tile.columns) * tile.chunk * problem.itemsize
    rate = _EXACT_FLOPS_PER_SM if problem.exact else _FLOPS_PER_SM[problem.itemsize]
    loop = chunks * max(flops / rate, loaded / _L2_BYTES_PER_SM)
    programs = tiles * cdiv(columns, tile.columns) * groups * tile.splits
    partials = tile.splits * problem.k * problem.cg * problem.r * problem.s * 8 / 2.5e12 if tile.splits > 1 else 0.0
    # Two programs share an SM where shared memory and registers allow it; rounds are counted in halves, then.
    share = 2 if tile.rows * tile.columns <= 64 * 128 else 1
    rounds = cdiv(programs, sms * share) * (1.0 if share == 1 else max(1.0, min(2.0, programs / sms)))
    return rounds * (loop + _TILE_SECONDS / share) + partials


def _spills(area: int, chunk_bytes: int, problem: Problem, shared: int) -> bool:
    """What the compile table (tests/triton_resources.md) shows to need more than 255 registers, or nearly so."""
    if problem.exact:  # the operands of fused multiply-adds sit in registers beside the accumulator
        return area > 64 * 64 or (area == 64 * 64 and chunk_bytes > 64)
    # TF32 spills 300 bytes per thread; mma.sync (architectures without wgmma: less shared memory) up to 200.
    return area >= 128 * 128 and (problem.itemsize == 4 or shared < 200 * 1024)


@functools.lru_cache(maxsize=4096)
def candidates(op: str, problem: Problem, sms: int = _SMS_DEFAULT, shared: int = _SHARED_DEFAULT) -> tuple[Tile, ...]:
    """The most promising tiles of ``op`` ("fprop", "dgrad" or "wgrad"), best first, at most 12."""
    found: dict[Tile, float] = {}
    widest = max(16, next_power_of_2(_work(op, problem, 16, False)[1]))
    longest = max(16, next_power_of_2({"fprop": problem.cg, "dgrad": problem.kg}.get(op, 64)))
    if problem.flat and op == "fprop":
        longest = next_power_of_2(problem.r * problem.s * problem.cg)
    for rows, columns, chunk, stages in _TABLE:
        chunk = chunk * 2 // problem.itemsize
        while (rows + columns) * chunk * problem.itemsize * stages > shared - 4096 and stages > 2:
            stages -= 1
        if _spills(rows * columns, chunk * problem.itemsize, problem, shared):
            continue
        if problem.flat and op != "dgrad":
            # The gathered side holds a 64-bit address and a mask per element: 2048 of them are 16 per thread.
            chunk = min(chunk, 16 if problem.exact else 32)
            if (rows if op == "fprop" else columns) * chunk > 2048 or rows * columns > 64 * 64:
                continue
        shape = (rows, min(columns, widest), max(16, min(chunk, longest)), stages)
        places = (False,) if op == "wgrad" or problem.pointwise or (problem.flat and op == "fprop") else (False, True)
        for positions in places:
            if positions and (problem.p > 64 or problem.q > 64):
                continue
            tile = Tile(*shape, _splits(op, problem, shape, sms), positions)
            found[tile] = _seconds(op, problem, tile, sms)
    best = sorted(found, key=found.__getitem__)
    if fits_descriptors(op, problem, shared):
        # The model knows no difference: the twins of its first four stand behind them, for a tuner to find out.
        best = best[:_TWINS] + [replace(t, descriptors=True) for t in best[:_TWINS]] + best[_TWINS:]
    return tuple(best[:MOST_CANDIDATES])


_chosen: dict[tuple, Tile] = {}
_tuned: set[tuple] = set()  # keys of _chosen that a tuning run decided: it need not look again
_thread = threading.local()


@contextlib.contextmanager
def tuning(wanted: bool) -> Iterator[None]:
    """Inside, in this thread, :func:`choose` measures the candidates of a convolution that has no measurement yet."""
    before, _thread.tuning = getattr(_thread, "tuning", False), wanted
    try:
        yield
    finally:
        _thread.tuning = before


def forget() -> None:
    """Drops the tiles chosen so far: what decides them has changed."""
    _chosen.clear()
    _tuned.clear()


def choose(op: str, problem: Problem, like: torch.Tensor) -> Tile:
    """The tile that runs: the fastest measured one, without a measurement the cost model's first.

    The cost model's first also with FASTCONV_TUNE=0 and with deterministic algorithms, as in the choice of the backend.
    """
    key = (op, problem, like.dtype, like.device.index, torch.are_deterministic_algorithms_enabled())
    wanted = getattr(_thread, "tuning", False)
    tile = _chosen.get(key)
    if tile is not None and (not wanted or key in _tuned):
        return tile
    from .. import _measured as measured
    from . import conv_tune

    tile = None
    if not measured.fixed() and like.device.type != "meta":
        if not (wanted and measured.again(conv_tune.class_of(op, problem, like.dtype))):
            tile = conv_tune.stored(op, problem, like)
        if tile is None and wanted:
            tile = conv_tune.tune(op, problem, like)
    tile = tile or candidates(op, problem, *device_limits(like.device.index))[0]
    _chosen[key] = tile
    if wanted:
        _tuned.add(key)
    return tile
