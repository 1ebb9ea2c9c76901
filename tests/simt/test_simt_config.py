"""The host side's tile choice for ResNet50's shapes on a machine the size of an H100."""

from __future__ import annotations

import ctypes

import pytest
from simt_conv import _SHAPE, Case
from simt_lib import library

ROWS = [16, 32, 64, 128, 128, 256]
FPROP, DGRAD, WGRAD = 0, 1, 2


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in _SHAPE]


def choose(case: Case, kind: int, *, element: int = 2, multiprocessors: int = 132, stats: bool = False):
    p, q = case.out_size()
    values = (case.n, case.h, case.w, case.c, case.k, case.r, case.s, p, q)
    shape = Shape(*values, *case.stride, *case.padding, *case.dilation, case.groups)
    found = library("conv").lib.simt_choose_conv(ctypes.byref(shape), kind, element, multiprocessors, int(stats))
    return found // 1000, found % 1000


def test_few_rows_take_the_smallest_tile_and_split_sums():
    """Batch 4 on a 1x1 map: 4 rows."""
    tile, splits = choose(Case(4, 2048, 1, 1, 512, 1, 1, padding=(0, 0)), FPROP)
    assert ROWS[tile] == 16 and splits > 1


def test_many_rows_take_large_tiles_and_no_split():
    tile, splits = choose(Case(512, 256, 14, 14, 256), FPROP)
    assert ROWS[tile] >= 128 and splits == 1


@pytest.mark.parametrize("batch", (1, 4, 128))
def test_statistics_forbid_split_sums(batch):
    assert choose(Case(batch, 512, 2, 2, 512), FPROP, stats=True)[1] == 1


def test_weight_gradients_split_long_sums_over_few_tiles():
    tile, splits = choose(Case(512, 64, 8, 8, 64), WGRAD)
    assert splits > 8


def test_partial_sums_stay_in_their_limit():
    for kind in (FPROP, DGRAD, WGRAD):
        for case in (
            Case(512, 2048, 7, 7, 512, 1, 1, padding=(0, 0)),
            Case(1, 4096, 4, 4, 4096),
            Case(64, 64, 56, 56, 64),
        ):
            _, splits = choose(case, kind)
            p, q = case.out_size()
            result = [case.n * p * q * case.k, case.n * case.h * case.w * case.c, case.k * case.c * case.r * case.s][
                kind
            ]
            assert splits == 1 or 4 * splits * result <= 64 << 20
