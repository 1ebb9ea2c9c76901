"""The convolution kernels, run on the CPU by the emulator, against fp64 PyTorch.

Inputs are small integers wherever the result is then exact, so that most comparisons are for equality.
"""

import pytest
import simt_lib
import torch
from simt_conv import Case, expected, operands, run
from simt_lib import assert_close, conv_dtypes, integers, tolerance

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))

HALF = conv_dtypes(torch.float16, torch.bfloat16)
needs_fp32 = pytest.mark.skipif(not conv_dtypes(torch.float32), reason="the quick library has no fp32 convolutions")
KINDS = ["fprop", "dgrad", "wgrad"]
ENGINES = [(d, True) for d in conv_dtypes(torch.bfloat16, torch.float16, torch.float32)]
ENGINES += [(d, False) for d in conv_dtypes(torch.float32)]  # exact fp32

# ResNet50's kinds of layer first, then the hostile ones.
CASES = [
    Case(2, 64, 4, 4, 64),
    Case(4, 64, 2, 2, 128),  # 4 of 9 taps live
    Case(5, 128, 1, 1, 64),  # 1 of 9 taps live
    Case(4, 128, 1, 1, 72, 1, 1, padding=(0, 0)),
    Case(2, 32, 8, 8, 64, stride=(2, 2)),
    Case(3, 64, 7, 5, 40, 1, 1, stride=(2, 2), padding=(0, 0)),
    Case(2, 3, 16, 16, 64, 7, 7, stride=(2, 2), padding=(3, 3)),  # the stem
    Case(1, 16, 9, 7, 24, 3, 5, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    Case(2, 8, 10, 10, 8, stride=(3, 2), padding=(2, 0), dilation=(2, 3)),
    Case(1, 8, 9, 9, 8, stride=(2, 4), padding=(2, 2), dilation=(2, 2)),  # stride and dilation share a factor
    Case(2, 8, 7, 7, 16, 2, 2, stride=(4, 3), padding=(0, 0)),  # stride > kernel: some inputs are never read
    Case(1, 7, 5, 6, 11, padding=(1, 2)),  # odd channels
    Case(2, 16, 4, 5, 12),  # channels that fit 16 bytes on one side only
    Case(2, 12, 4, 5, 16),
    Case(2, 13, 3, 3, 8, 3, 3, padding=(4, 4)),  # padding wider than the filter
    Case(3, 48, 6, 6, 32, groups=2),
    Case(2, 12, 5, 5, 6, groups=3),
    Case(2, 32, 4, 4, 64, 4, 4, stride=(2, 2), padding=(1, 1), dilation=(1, 1)),
]


def exact_inputs(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, dtype: integers(shape, dtype, generator)


def check_exact(kind, case, dtype, seed=0, **options):
    a, b = operands(kind, case, dtype, exact_inputs(seed + 1))
    got, info = run(kind, case, a, b, seed=seed, **options)
    want = expected(kind, case, a, b).to(dtype)
    assert torch.equal(got, want), f"{(got != want).sum()} of {got.numel()} values differ"
    return info["counters"]


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


DEPTHWISE = [
    Case(2, 16, 6, 5, 16, groups=16),
    Case(3, 40, 9, 7, 40, 5, 3, stride=(2, 1), padding=(2, 0), dilation=(1, 2), groups=40),
    Case(2, 7, 5, 5, 7, 2, 2, stride=(3, 3), padding=(0, 0), groups=7),
    Case(2, 8, 1, 1, 8, groups=8),
]


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


def test_depthwise_fusions():
    case = DEPTHWISE[0]
    make = exact_inputs(4)
    x, w = operands("fprop", case, torch.bfloat16, make)
    bias, residual = make((16,), torch.bfloat16), make(case.y_shape(), torch.bfloat16)
    inner = torch.relu(x.double() + 1).bfloat16()
    want = expected("fprop", case, inner, w) + bias.double().view(1, -1, 1, 1) + residual.double()
    got, _ = run(
        "fprop",
        case,
        x,
        w,
        bias=bias,
        residual=residual,
        act="relu",
        pro_scale=torch.ones(16),
        pro_shift=torch.ones(16),
        pro_act="relu",
        depthwise=True,
    )
    assert torch.equal(got, torch.relu(want).bfloat16())
    with pytest.raises(RuntimeError, match="groups = c = k"):
        run("fprop", CASES[0], *operands("fprop", CASES[0], torch.bfloat16, make), depthwise=True)


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


@pytest.mark.parametrize("dtype", conv_dtypes(torch.float32, torch.float16, torch.bfloat16))
def test_epilogue(dtype):
    case = Case(2, 16, 5, 5, 24)
    make = exact_inputs(5)
    x, w = operands("fprop", case, dtype, make)
    bias, residual = make((24,), dtype), make(case.y_shape(), dtype)
    raw = expected("fprop", case, x, w)
    got, _ = run("fprop", case, x, w, bias=bias, residual=residual, act="relu")
    assert torch.equal(got, torch.relu(raw + bias.double().view(1, -1, 1, 1) + residual.double()).to(dtype))
    scale, shift = torch.tensor([0.5, 2.0, -1.0]).repeat(8), torch.arange(24.0)
    want = torch.relu(raw * scale.double().view(1, -1, 1, 1) + shift.double().view(1, -1, 1, 1) + residual.double())
    for splits in (1, 3):
        got, _ = run("fprop", case, x, w, scale=scale, shift=shift, residual=residual, act="relu", splits=splits)
        assert torch.equal(got, want.to(dtype))


@needs_fp32
@pytest.mark.parametrize("act", simt_lib.ACTIVATIONS)
def test_activations_and_preact(act):
    generator = torch.Generator().manual_seed(11)
    case = Case(2, 16, 3, 3, 16)
    x, w = (torch.randn(s, generator=generator) for s in (case.x_shape(), case.w_shape()))
    bias = torch.randn(16, generator=generator)
    want = expected("fprop", case, x, w) + bias.double().view(1, -1, 1, 1)
    preact = simt_lib.dense_nhwc(case.y_shape(), torch.float32)
    got, _ = run("fprop", case, x, w, bias=bias, act=act, preact=preact, tensor=False)
    reference = (
        {"identity": lambda t: t, "gelu": torch.nn.functional.gelu}.get(act)
        or getattr(torch, act, None)
        or getattr(torch.nn.functional, act)
    )
    assert_close(preact, want, 1e-5, 1e-5)
    assert_close(got, reference(want), 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], CASES[10], CASES[13]], ids=str)
def test_prologue(case, dtype):
    make = exact_inputs(9)
    x, w = operands("fprop", case, dtype, make)
    scale = torch.tensor([1.0, -2.0, 0.5, 4.0]).repeat(case.c)[: case.c].contiguous()
    shift = torch.arange(case.c) % 3 + 1.0  # positive: relu(shift) != 0, so padding that is touched shows
    inner = torch.relu(x.double() * scale.double().view(1, -1, 1, 1) + shift.double().view(1, -1, 1, 1)).to(dtype)
    for tile in (0, 2, 4):
        got, _ = run("fprop", case, x, w, pro_scale=scale, pro_shift=shift, pro_act="relu", tile=tile, seed=tile)
        assert torch.equal(got, expected("fprop", case, inner, w).to(dtype))


@pytest.mark.parametrize("tile", range(6))
@pytest.mark.parametrize("case", [Case(5, 32, 6, 5, 72), Case(3, 7, 4, 5, 10), Case(7, 24, 2, 2, 40)], ids=str)
def test_statistics(case, tile):
    generator = torch.Generator().manual_seed(tile)
    dtype = torch.bfloat16
    x, w = (torch.randn(s, generator=generator).to(dtype) for s in (case.x_shape(), case.w_shape()))
    bias = (torch.randn(case.k, generator=generator) * 50).to(
        dtype
    )  # a large mean: E[x^2] - E[x]^2 would lose the variance
    out, info = run("fprop", case, x, w, bias=bias, stats=True, tile=tile, seed=tile)
    p, q = case.out_size()
    total = case.n * p * q
    counts = torch.tensor(
        [min(info["rows"], total - i * info["rows"]) for i in range(info["mean"].shape[0])], dtype=torch.float64
    )
    mean = (info["mean"].double() * counts[:, None]).sum(0) / total
    m2 = (info["m2"].double() + counts[:, None] * (info["mean"].double() - mean) ** 2).sum(0)
    values = out.double()
    assert_close(mean, values.mean((0, 2, 3)), 1e-6, 1e-6)
    assert_close(m2 / total, values.var((0, 2, 3), unbiased=False), 1e-4, 1e-6)


def test_dgrad_with_activation_gradient():
    case = Case(2, 24, 6, 6, 16, stride=(2, 2))
    make = exact_inputs(21)
    dy, w = operands("dgrad", case, torch.bfloat16, make)
    saved = make(case.x_shape(), torch.bfloat16)
    got, _ = run("dgrad", case, dy, w, grad_saved=saved, act="relu")
    assert torch.equal(got, (expected("dgrad", case, dy, w) * (saved > 0)).to(torch.bfloat16))


SMOOTH = ("silu", "gelu", "hardswish")


def check_sums(case, dtype, act="relu", addend=True, from_x=False, apart=False, **options):
    """Data gradient, times act', as without the sums; the tiles' sums are those of what was written."""
    make = exact_inputs(23)
    dy, w = operands("dgrad", case, dtype, make)
    generator = torch.Generator().manual_seed(24)
    x, saved = (torch.randn(case.x_shape(), generator=generator).to(dtype) for _ in range(2))
    mean, invstd = torch.randn(case.c, generator=generator), torch.rand(case.c, generator=generator) + 0.5
    given = {"residual": make(case.x_shape(), dtype) if addend else None}
    weight, bias = torch.randn(2, case.c, generator=generator)
    if from_x:  # as the forward computes what the activation sees
        saved = torch.addcmul(bias[:, None, None], x.float() - mean[:, None, None], (invstd * weight)[:, None, None])
        saved = saved.to(dtype)
    given["grad_saved"] = None if act == "identity" else saved
    options = {"act": act, **options}
    plain, _ = run("dgrad", case, dy, w, **given, **options)
    norm = {"norm_x": x, "norm_mean": mean, "norm_invstd": invstd}
    if apart:  # not at a multiple of 16 bytes: element by element, two columns for a lane where a warp has 64
        norm["norm_mean"] = torch.cat([torch.zeros(1), mean])[1:]
    if from_x:
        given["grad_saved"], norm["norm_weight"], norm["norm_bias"] = None, weight, bias
    got, info = run("dgrad", case, dy, w, **given, **norm, **options)
    if act in SMOOTH:  # their slope is of the pre-activation before it was rounded
        assert_close(got, plain, 4e-2, 4e-2)
    else:
        assert torch.equal(got, plain)
    g, xhat = got.double(), (x.double() - mean[:, None, None]) * invstd[:, None, None]
    for found, terms in zip(info["sums"], (g, g * xhat), strict=True):
        error = (found.double().sum(0) - terms.sum((0, 2, 3))).abs()
        assert (error <= 1e-5 * terms.abs().sum((0, 2, 3)) + 1e-6).all(), error.max()
    return info["sums"].shape[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dgrad_sums_for_the_batch_norm_before(case):
    """Every shape, stride classes that are empty or smaller among them: all tiles are written."""
    for dtype in conv_dtypes(torch.bfloat16, torch.float16, torch.float32):
        for from_x in (False, True):
            check_sums(case, dtype, from_x=from_x)


@pytest.mark.parametrize("tile", range(6))
def test_dgrad_sums_of_every_tile(tile):
    tiles = check_sums(Case(5, 72, 9, 5, 32), torch.bfloat16, tile=tile, seed=tile)
    assert tiles == -(-5 * 9 * 5 // [16, 32, 64, 128, 128, 256][tile])
    check_sums(Case(3, 40, 7, 6, 16, stride=(2, 3)), torch.bfloat16, tile=tile, seed=tile)


@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "leaky_relu", "sigmoid", "tanh"])
def test_dgrad_sums_with_and_without(act):
    for addend in (False, True):
        check_sums(Case(2, 24, 6, 6, 16), HALF[0], act=act, addend=addend)


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu", *SMOOTH])
def test_dgrad_sums_with_the_slope_from_the_input(act):
    check_sums(Case(2, 24, 6, 6, 16), HALF[0], act=act, from_x=True)
    check_sums(Case(2, 13, 6, 6, 16), HALF[0], act=act, from_x=True)


@needs_fp32
def test_dgrad_sums_of_exact_fp32():
    for tile in range(6):
        check_sums(Case(3, 20, 6, 5, 32), torch.float32, tensor=False, tile=tile)
        check_sums(Case(3, 20, 6, 5, 32), torch.float32, tensor=False, tile=tile, apart=True)


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


def test_depthwise_prologue_rounds_as_a_stored_tensor():
    """Differences of neighbours of nearly the same size: only values that were rounded to bf16 before give these."""
    case = Case(1, 8, 1, 9, 8, 1, 2, padding=(0, 0), groups=8)
    x = (torch.rand(case.x_shape(), generator=torch.Generator().manual_seed(2)) + 1).bfloat16()
    w = torch.tensor([1.0, -1.0]).expand(8, 1, 1, 2).contiguous().bfloat16()
    scale, shift = torch.full((8,), 1 / 3), torch.full((8,), 0.1)
    inner = (x.float() * scale[0] + shift[0]).bfloat16()
    got, _ = run("fprop", case, x, w, pro_scale=scale, pro_shift=shift, depthwise=True)
    assert torch.equal(got, expected("fprop", case, inner, w).bfloat16())


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
    with pytest.raises(RuntimeError, match="sums of gradients are of a data gradient"):
        run("fprop", case, x, w, **norm)
