"""The convolution kernels, run on the CPU by the emulator, against fp64 PyTorch.

Inputs are small integers wherever the result is then exact, so that most comparisons are for equality.
"""

import pytest
import simt_lib
import torch
from simt_conv import (
    CASES,
    DEPTHWISE,
    HALF,
    KINDS,
    Case,
    check_exact,
    exact_inputs,
    expected,
    needs_fp32,
    operands,
    run,
)
from simt_lib import assert_close, conv_dtypes, tolerance

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))


ENGINES = [(d, True) for d in conv_dtypes(torch.bfloat16, torch.float16, torch.float32)]
ENGINES += [(d, False) for d in conv_dtypes(torch.float32)]  # exact fp32


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape(kind, case):
    for seed, dtype in enumerate(conv_dtypes(torch.bfloat16, torch.float16, torch.float32)):
        check_exact(kind, case, dtype, seed=seed)
    for dtype in conv_dtypes(torch.float32):
        check_exact(kind, case, dtype, seed=3, tensor=False)


@pytest.mark.parametrize("tile", range(6))
@pytest.mark.parametrize("kind", ["fprop", "dgrad"])
def test_every_tile(kind, tile):
    case = Case(5, 72, 6, 6, 136)  # a partial tile in each direction
    for dtype, tensor in ENGINES:
        for seed in (0, 7):
            counters = check_exact(kind, case, dtype, seed=seed, tile=tile, tensor=tensor)
        assert counters["ldmatrix_conflicts"] == 0
        assert counters["cp_async16"] > 0 and counters["cp_async_small"] == 0
        assert (counters["mma"] > 0) == tensor


@pytest.mark.parametrize("tile", range(2))
def test_wgrad_tiles(tile):
    case = Case(3, 40, 5, 6, 136)
    for dtype, tensor in ENGINES:
        for seed in (0, 5):
            counters = check_exact("wgrad", case, dtype, seed=seed, tile=tile, tensor=tensor)
        assert counters["ldmatrix_conflicts"] == 0
        assert counters["cp_async16"] > 0 and counters["cp_async_small"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_split_k(kind, splits):
    for case in (Case(4, 64, 3, 3, 64), Case(3, 5, 4, 4, 9)):
        check_exact(kind, case, torch.bfloat16, seed=splits, splits=splits)


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_depthwise(kind, case):
    for seed, dtype in enumerate(conv_dtypes(torch.float32, torch.float16, torch.bfloat16)):
        check_exact(kind, case, dtype, seed=seed, depthwise=True)
    if kind == "wgrad":
        check_exact(kind, case, torch.bfloat16, depthwise=True, splits=3)


@pytest.mark.parametrize("kind", KINDS)
def test_depthwise_reads_nothing_past_the_end(kind):
    case = DEPTHWISE[1]
    a, b = operands(kind, case, torch.bfloat16, exact_inputs(2))
    got, _ = run(kind, case, a, b, depthwise=True, guard=True)
    assert torch.equal(got, expected(kind, case, a, b).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_unaligned_address(kind):
    counters = check_exact(kind, Case(2, 16, 4, 4, 16), torch.bfloat16, offset=1)
    assert counters["mma"] > 0


def test_dead_taps_cost_nothing_and_get_zero():
    case = Case(16, 64, 1, 1, 64)
    one = Case(16, 64, 1, 1, 64, 1, 1, padding=(0, 0))
    for kind in ("fprop", "dgrad"):
        full = check_exact(kind, case, torch.bfloat16, tile=0)
        assert full["mma"] == check_exact(kind, one, torch.bfloat16, tile=0)["mma"]
    a, b = operands("wgrad", case, torch.bfloat16, exact_inputs(3))
    dw, info = run("wgrad", case, a, b)
    dead = torch.ones(3, 3, dtype=torch.bool)
    dead[1, 1] = False
    assert torch.equal(dw[:, :, dead], torch.zeros_like(dw[:, :, dead]))
    assert info["counters"]["mma"] == check_exact("wgrad", one, torch.bfloat16)["mma"]


def test_position_major_skips_taps_at_2x2():
    # 64 images: a tile of 64 rows is one position, which sees 4 of the 9 taps
    work = check_exact("fprop", Case(64, 32, 2, 2, 64), torch.bfloat16, tile=2)["mma"]
    per_tap = check_exact("fprop", Case(64, 32, 2, 2, 64, 1, 1, padding=(0, 0)), torch.bfloat16, tile=2)["mma"]
    assert work == 4 * per_tap


def test_strided_dgrad_does_no_work_on_holes():
    # stride 2, 3x3: each input pixel has (1 or 2) x (1 or 2) taps, 9 over the four classes, not 36
    case = Case(16, 64, 8, 8, 64, stride=(2, 2))
    work = check_exact("dgrad", case, torch.bfloat16)["mma"]
    one = check_exact("dgrad", Case(16, 64, 8, 8, 64, 1, 1, padding=(0, 0)), torch.bfloat16)["mma"]
    assert work <= 9 * one // 4  # less where a tile of border positions drops a tap


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_random_values_round_once(kind, dtype):
    generator = torch.Generator().manual_seed(2)
    case = Case(2, 64, 6, 6, 64)
    a, b = operands(kind, case, dtype, lambda s, d: torch.randn(s, generator=generator).to(d))
    got, _ = run(kind, case, a, b)
    assert_close(got, expected(kind, case, a, b), tolerance(dtype), 1e-4)


@needs_fp32
def test_tf32_rounds_to_nearest():
    generator = torch.Generator().manual_seed(2)
    case = Case(2, 64, 6, 6, 64)
    for kind in KINDS:
        a, b = operands(kind, case, torch.float32, lambda s, d: torch.randn(s, generator=generator))
        want = expected(kind, case, a, b)
        rms = want.pow(2).mean().sqrt()
        tf32, _ = run(kind, case, a, b)
        exact, _ = run(kind, case, a, b, tensor=False)
        assert (exact - want).abs().max() < 6e-6 * rms
        # rounding both operands to 11 bits, at random: about 2^-11 / sqrt(3) each, 2.9e-4 together; truncation: 7.6e-4
        assert (tf32 - want).pow(2).mean().sqrt() < 4e-4 * rms


def test_nan_and_infinity_pass():
    case = Case(1, 16, 3, 3, 16)
    x, w = operands("fprop", case, torch.bfloat16, exact_inputs(1))
    x[0, 3, 1, 1], x[0, 4, 0, 0] = float("nan"), float("inf")
    got, _ = run("fprop", case, x, w, act="relu")
    want = torch.relu(expected("fprop", case, x, w))
    assert torch.equal(torch.isnan(got), torch.isnan(want))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_where_it_is(kind):
    """Channels that fill no whole k-tile: what lies behind them in memory must not be touched, not even times zero."""
    case = Case(2, 40, 4, 4, 40, 1, 1, padding=(0, 0))
    a, b = operands(kind, case, torch.bfloat16, exact_inputs(6))
    clean, _ = run(kind, case, a, b)
    if kind == "wgrad":
        a[:, 3], b[:, 5] = float("nan"), float("nan")
        got, _ = run(kind, case, a, b)
        clean[3], clean[:, 5] = float("nan"), float("nan")
    else:
        a[1, :, 2, 1] = float("nan")
        got, _ = run(kind, case, a, b)
        clean[1, :, 2, 1] = float("nan")
    assert torch.equal(got.nan_to_num(99), clean.nan_to_num(99))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [0, 1])
def test_nothing_is_read_past_the_end(kind, tile):
    for case in (Case(3, 40, 5, 5, 40), Case(3, 5, 3, 3, 7), Case(2, 72, 3, 3, 24, 1, 1, padding=(0, 0))):
        a, b = operands(kind, case, torch.bfloat16, exact_inputs(8))
        got, _ = run(kind, case, a, b, tile=tile, guard=True)
        assert torch.equal(got, expected(kind, case, a, b).to(torch.bfloat16))


@pytest.mark.parametrize("seed", range(1, 5))
def test_schedules(seed):
    """Other orders of blocks, warps and lanes give the very same bits."""
    generator = torch.Generator().manual_seed(0)
    case = Case(3, 40, 5, 5, 72)
    for kind in KINDS:
        a, b = operands(kind, case, torch.bfloat16, lambda s, d: torch.randn(s, generator=generator).to(d))
        first, _ = run(kind, case, a, b, splits=2)
        again, _ = run(kind, case, a, b, splits=2, seed=seed)
        assert torch.equal(first, again)


@pytest.mark.parametrize("tile", [0, 2])
def test_strided_dgrad_covers_odd_maps(tile):
    """The first stride class of an odd side has one row more than the last: more tiles of 16 rows."""
    check_exact("dgrad", Case(3, 16, 9, 9, 16, stride=(2, 2)), torch.bfloat16, tile=tile)


@pytest.mark.parametrize("kind", KINDS)
def test_a_workspace_that_is_not_needed_stays_unused(kind):
    for case, depthwise in ((Case(2, 16, 4, 4, 16), False), (DEPTHWISE[0], True)):
        a, b = operands(kind, case, torch.bfloat16, exact_inputs(3))
        partial = torch.full((4096,), float("nan"))
        got, _ = run(kind, case, a, b, partial=partial, depthwise=depthwise)
        assert torch.equal(got, expected(kind, case, a, b).to(torch.bfloat16)) and partial.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_unaligned_depthwise(kind):
    check_exact(kind, DEPTHWISE[0], torch.bfloat16, depthwise=True, offset=1)


def test_bad_calls_are_refused():
    case = Case(1, 8, 4, 4, 8)
    x, w = operands("fprop", case, torch.bfloat16, exact_inputs(1))
    with pytest.raises(RuntimeError, match="tile must be"):
        run("fprop", case, x, w, tile=9)
    with pytest.raises(RuntimeError, match="statistics are not available"):
        run("fprop", case, x, w, splits=2, stat_mean=torch.zeros(8))
    norm = {"norm_x": x, "norm_mean": torch.zeros(8), "norm_invstd": torch.ones(8)}
    with pytest.raises(RuntimeError, match="statistics are not available"):
        run("dgrad", case, x, w, splits=2, **norm)
    with pytest.raises(RuntimeError, match="needs its output"):
        run("dgrad", case, x, w, act="sigmoid", **norm)
    with pytest.raises(RuntimeError, match="sums of gradients are of a data gradient"):
        run("fprop", case, x, w, **norm)
