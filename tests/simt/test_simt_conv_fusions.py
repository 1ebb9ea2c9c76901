"""What the convolution kernels do besides convolving: prologue, epilogue, statistics and sums of gradients."""

import pytest
import simt_lib
import torch
from simt_conv import CASES, DEPTHWISE, HALF, Case, exact_inputs, expected, needs_fp32, operands, run
from simt_lib import assert_close, conv_dtypes, to_nhwc

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))


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


def check_sums(case, dtype, act="relu", addend=True, from_x=False, affine=True, apart="", **options):
    """Data gradient, times act', as without the sums; the tiles' sums are those of what was written.

    from_x: the slope from the input, with weight and bias if affine. apart: this tensor is not at a multiple of 16 bytes,
    so that all goes element by element, two columns for a lane where a warp has 64."""
    make = exact_inputs(23)
    dy, w = operands("dgrad", case, dtype, make)
    generator = torch.Generator().manual_seed(24)
    x, saved = (torch.randn(case.x_shape(), generator=generator).to(dtype) for _ in range(2))
    mean, invstd = torch.randn(case.c, generator=generator), torch.rand(case.c, generator=generator) + 0.5
    given = {"residual": make(case.x_shape(), dtype) if addend else None}
    weight, bias = torch.randn(2, case.c, generator=generator)
    if not affine:
        weight, bias = torch.ones(case.c), torch.zeros(case.c)
    if from_x:  # as the forward computes what the activation sees
        saved = torch.addcmul(bias[:, None, None], x.float() - mean[:, None, None], (invstd * weight)[:, None, None])
        saved = saved.to(dtype)
    given["grad_saved"] = None if act == "identity" else saved
    options = {"act": act, **options}
    plain, _ = run("dgrad", case, dy, w, **given, **options)
    norm = {"norm_x": x, "norm_mean": mean, "norm_invstd": invstd}
    if from_x:
        given["grad_saved"] = None
        norm |= {"norm_weight": weight, "norm_bias": bias} if affine else {}
    if apart:
        flat = to_nhwc(norm[apart]).permute(0, 2, 3, 1).flatten() if apart == "norm_x" else norm[apart]
        norm[apart] = torch.cat([flat[:1], flat])[1:]
    got, info = run("dgrad", case, dy, w, **given, **norm, **options)
    if act in SMOOTH:  # their slope is of the pre-activation before it was rounded
        smooth = saved.abs() != 3 if act == "hardswish" else ...  # rounded to a kink from either side of it
        assert_close(got[smooth], plain[smooth], 4e-2, 1e-2 * plain.abs().max().item())
    else:
        assert torch.equal(got, plain)
    g, xhat = got.double(), (x.double() - mean[:, None, None]) * invstd[:, None, None]
    for found, terms in zip(info["sums"], (g, g * xhat), strict=True):
        error = (found.double().sum(0) - terms.sum((0, 2, 3))).abs()
        assert (error <= 1e-5 * terms.abs().sum((0, 2, 3)) + 1e-6).all(), error.max()
    return info["sums"].shape[1]


@pytest.mark.parametrize("case", [*CASES, Case(2, 8, 2, 7, 8, 1, 1, stride=(3, 4), padding=(0, 0))], ids=str)
def test_dgrad_sums_for_the_batch_norm_before(case):
    """Every shape, stride classes that are empty or smaller among them: all tiles are written."""
    for dtype in conv_dtypes(torch.bfloat16, torch.float16, torch.float32):
        for from_x in (False, True):
            check_sums(case, dtype, from_x=from_x)


@pytest.mark.parametrize("tile", range(6))
def test_dgrad_sums_of_every_tile(tile):
    tiles = check_sums(Case(5, 72, 9, 5, 32), torch.bfloat16, tile=tile, seed=tile)
    assert tiles == -(-5 * 9 * 5 // [16, 32, 64, 128, 128, 256][tile])
    check_sums(Case(3, 72, 9, 7, 16, stride=(2, 3)), torch.bfloat16, tile=tile, seed=tile)  # 45 to 24 rows of a class
    check_sums(Case(2, 16, 9, 5, 12), torch.bfloat16, tile=tile, seed=tile)  # 64 rows whatever the tile


@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "leaky_relu", "sigmoid", "tanh"])
def test_dgrad_sums_with_and_without(act):
    for addend in (False, True):
        check_sums(Case(2, 24, 6, 6, 16), HALF[0], act=act, addend=addend)


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu", *SMOOTH])
def test_dgrad_sums_with_the_slope_from_the_input(act):
    check_sums(Case(2, 24, 6, 6, 16), HALF[0], act=act, from_x=True)
    check_sums(Case(2, 13, 6, 6, 16), HALF[0], act=act, from_x=True)
    check_sums(Case(2, 24, 6, 6, 16), HALF[0], act=act, from_x=True, affine=False)


@pytest.mark.parametrize("apart", ["norm_x", "norm_mean", "norm_invstd", "norm_weight", "norm_bias"])
def test_dgrad_sums_of_unaligned_tensors(apart):
    check_sums(Case(2, 24, 6, 6, 16), HALF[0], from_x=True, apart=apart)


@needs_fp32
def test_dgrad_sums_of_exact_fp32():
    for tile in range(6):
        check_sums(Case(3, 72, 6, 5, 32), torch.float32, tensor=False, tile=tile)
        check_sums(Case(3, 72, 6, 5, 32), torch.float32, tensor=False, tile=tile, apart="norm_mean")


def test_depthwise_prologue_rounds_as_a_stored_tensor():
    """Differences of neighbours of nearly the same size: only values that were rounded to bf16 before give these."""
    case = Case(1, 8, 1, 9, 8, 1, 2, padding=(0, 0), groups=8)
    x = (torch.rand(case.x_shape(), generator=torch.Generator().manual_seed(2)) + 1).bfloat16()
    w = torch.tensor([1.0, -1.0]).expand(8, 1, 1, 2).contiguous().bfloat16()
    scale, shift = torch.full((8,), 1 / 3), torch.full((8,), 0.1)
    inner = (x.float() * scale[0] + shift[0]).bfloat16()
    got, _ = run("fprop", case, x, w, pro_scale=scale, pro_shift=shift, depthwise=True)
    assert torch.equal(got, expected("fprop", case, inner, w).bfloat16())
