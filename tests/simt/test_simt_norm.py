"""Batch-norm kernels in the emulator, training and evaluation, against fp64 PyTorch."""

import ctypes

import pytest
import simt_lib
import torch
import torch.nn.functional as F
from simt_lib import ACTIVATIONS, DTYPES, assert_close, library, pointer, tolerance
from simt_norm import ALL, SHAPES, SPLIT_SHAPES, SplitCall, activation, split_call, split_of, unaligned

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))


class NormCall(ctypes.Structure):
    _fields_ = [
        (f, ctypes.c_void_p)
        for f in [
            "x",
            "residual",
            "weight",
            "bias",
            "y",
            "running_mean",
            "running_var",
            "batches",
            "save_mean",
            "save_invstd",
            "part_mean",
            "part_m2",
        ]
    ]
    _fields_ += [(f, ctypes.c_int64) for f in ["rows", "part_rows"]]
    _fields_ += [
        (f, ctypes.c_int)
        for f in ["dtype", "params_float", "running_float", "channels", "training", "act", "blocks", "min_rows"]
    ]
    _fields_ += [("momentum", ctypes.c_float), ("eps", ctypes.c_float), ("split", SplitCall)]


def norm(
    x,
    *,
    residual=None,
    weight=None,
    bias=None,
    running_mean=None,
    running_var=None,
    batches=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
    act="relu",
    seed=0,
    parts=None,
    blocks=8,
    min_rows=32,
    split=None,
):
    rows, channels = x.shape
    y = torch.full_like(x, float("nan"))
    save_mean, save_invstd = (simt_lib.guarded(torch.full((channels,), float("nan"))) for _ in range(2))
    part_mean, part_m2 = parts[1:] if parts else (torch.full((64 * channels,), float("nan")) for _ in range(2))
    call = NormCall(
        *(
            pointer(t)
            for t in (
                x,
                residual,
                weight,
                bias,
                y,
                running_mean,
                running_var,
                batches,
                save_mean,
                save_invstd,
                part_mean,
                part_m2,
            )
        )
    )
    call.split = split_call(split)
    call.rows, call.part_rows, call.dtype, call.channels = rows, parts[0] if parts else 0, DTYPES[x.dtype], channels
    typed = weight if weight is not None else bias
    call.params_float = int(typed is None or typed.dtype == torch.float32)
    call.running_float = int(running_mean is None or running_mean.dtype == torch.float32)
    call.training, call.act, call.blocks, call.min_rows = int(training), ACTIVATIONS.index(act), blocks, min_rows
    call.momentum, call.eps = -1.0 if momentum is None else momentum, eps
    library("norm").call("simt_batch_norm", ctypes.byref(call), seed=seed)
    return y, save_mean, save_invstd


def norm_reference(x, residual, weight, bias, mean, var, eps, act):
    d = [None if t is None else t.double() for t in (x, residual, weight, bias, mean, var)]
    z = F.batch_norm(d[0], d[4], d[5], d[2], d[3], training=mean is None, eps=eps)
    return activation(act)(z if residual is None else z + d[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALL)
def test_batch_norm_training(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    rows, channels = shape
    x = (torch.randn(shape, generator=generator) * 2 + 30).to(dtype)  # mean >> deviation
    residual = torch.randn(shape, generator=generator).to(dtype)
    for params, seed in ((torch.float32, 0), (dtype, 5)):
        weight, bias = (torch.randn(channels, generator=generator).to(params) for _ in range(2))
        running = [
            torch.randn(channels, generator=generator).to(params),
            torch.rand(channels, generator=generator).to(params),
        ]
        old = [t.clone().double() for t in running]
        batches = torch.tensor(6)
        y, mean, invstd = norm(
            x,
            residual=residual,
            weight=weight,
            bias=bias,
            running_mean=running[0],
            running_var=running[1],
            batches=batches,
            momentum=0.3,
            seed=seed,
        )
        xd = x.double()
        assert_close(mean, xd.mean(0), 1e-6, 1e-6)
        assert_close(invstd, 1 / torch.sqrt(xd.var(0, unbiased=False) + 1e-5), 2e-5, 0)
        assert_close(running[0], 0.7 * old[0] + 0.3 * xd.mean(0), tolerance(params) * 2, 1e-5)
        assert_close(running[1], 0.7 * old[1] + 0.3 * xd.var(0), tolerance(params) * 2, 1e-5)
        assert batches.item() == 7
        want = norm_reference(x, residual, weight, bias, None, None, 1e-5, "relu")
        assert_close(y, want, tolerance(dtype) * 1.5, 2e-4)


def test_batch_norm_cumulative_and_untracked():
    generator = torch.Generator().manual_seed(4)
    for rows in (8, 400):
        x = torch.randn(rows, 40, generator=generator)
        mean, var, batches = torch.zeros(40), torch.ones(40), torch.tensor(3)
        norm(x, running_mean=mean, running_var=var, batches=batches, momentum=None)
        assert_close(mean, x.double().mean(0) / 4, 1e-5, 1e-6)
        assert_close(var, 0.75 + x.double().var(0) / 4, 1e-5, 1e-6)
        assert batches.item() == 4
        y, _, _ = norm(unaligned(x), act="identity", seed=1)
        assert_close(y, norm_reference(x, None, None, None, None, None, 1e-5, "identity"), 1e-5, 1e-5)
    with pytest.raises(RuntimeError, match="more than one value"):
        norm(torch.ones(1, 8))


@pytest.mark.parametrize("rows", [9, 200, 1500])
def test_batch_norm_of_values_far_from_zero(rows):
    """Mean 30000, deviation 1: neither the variance nor the result may be a difference of large numbers."""
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(8)) + 30000
    y, mean, invstd = norm(x, act="identity", seed=2)
    assert_close(mean, x.double().mean(0), 1e-7, 0)  # an fp32 number's own rounding
    want = 1 / torch.sqrt(x.double().var(0, unbiased=False) + 1e-5)
    assert_close(invstd, want, 1e-5, 0)
    assert_close(y, (x.double() - mean.double()) * want, 1e-5, 1e-6)


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
def test_parameters_and_running_statistics_of_different_dtypes(params):
    generator = torch.Generator().manual_seed(9)
    other = torch.bfloat16 if params == torch.float32 else torch.float32
    x = torch.randn(40, 24, generator=generator).bfloat16()
    weight, bias = (torch.randn(24, generator=generator).to(params) for _ in range(2))
    mean, var = torch.randn(24, generator=generator).to(other), (torch.rand(24, generator=generator) + 0.5).to(other)
    for training in (False, True):
        y, _, _ = norm(x, weight=weight, bias=bias, running_mean=mean, running_var=var, training=training)
        stats = (None, None) if training else (mean, var)
        assert_close(y, norm_reference(x, None, weight, bias, *stats, 1e-5, "relu"), tolerance(x.dtype) * 1.5, 2e-4)


class NormFoldCall(ctypes.Structure):
    _fields_ = [(f, ctypes.c_void_p) for f in ["weight", "bias", "running_mean", "running_var", "conv_bias"]]
    _fields_ += [(f, ctypes.c_void_p) for f in ["scale", "shift", "mean", "invstd"]]
    _fields_ += [(f, ctypes.c_int) for f in ["dtype", "params_float", "running_float", "conv_bias_float", "channels"]]
    _fields_ += [("eps", ctypes.c_float)]


@pytest.mark.parametrize("floats", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("channels", [1, 100, 300])
def test_batch_norm_fold(channels, floats):
    """scale and shift of a convolution's epilogue; each pair of vectors in fp32 or bf16; nothing past the end."""
    generator = torch.Generator().manual_seed(channels)
    params, running, extra = (torch.float32 if f else torch.bfloat16 for f in floats)
    weight, bias = (torch.randn(channels, generator=generator).to(params) for _ in range(2))
    mean, var = torch.randn(channels, generator=generator).to(running), torch.rand(channels, generator=generator)
    var, conv_bias = (var + 0.1).to(running), torch.randn(channels, generator=generator).to(extra)
    vectors = [simt_lib.guarded(t) for t in (weight, bias, mean, var, conv_bias)]
    outs = [simt_lib.guarded(torch.full((channels,), float("nan"))) for _ in range(4)]
    call = NormFoldCall(*map(pointer, (*vectors, *outs)))
    call.dtype, call.channels, call.eps = DTYPES[torch.bfloat16], channels, 0.05
    call.params_float, call.running_float, call.conv_bias_float = floats
    library("norm").call("simt_batch_norm_fold", ctypes.byref(call), seed=1)
    invstd = 1 / torch.sqrt(var.double() + 0.05)
    scale = weight.double() * invstd
    shift = bias.double() + (conv_bias.double() - mean.double()) * scale
    for got, want in zip(outs, (scale, shift, mean.double(), invstd), strict=True):
        assert_close(got, want, 1e-6, 1e-6)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_batch_norm_eval(act):
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = (torch.randn(50, 24, generator=generator).to(dtype) for _ in range(2))
        weight, bias, mean = (torch.randn(24, generator=generator) for _ in range(3))
        var = torch.rand(24, generator=generator) + 0.1
        keep = mean.clone(), var.clone()
        y, save_mean, save_invstd = norm(
            x, residual=residual, weight=weight, bias=bias, running_mean=mean, running_var=var, training=False, act=act
        )
        assert torch.equal(mean, keep[0]) and torch.equal(var, keep[1]) and torch.equal(save_mean, mean)
        assert_close(save_invstd, 1 / torch.sqrt(var.double() + 1e-5), 1e-6, 0)
        assert_close(y, norm_reference(x, residual, weight, bias, mean, var, 1e-5, act), tolerance(dtype), 2e-5)


@pytest.mark.parametrize("rows,chunk", [(150, 64), (4500, 64), (4500, 8)])  # 3, more than slices, than one round merges
def test_batch_norm_from_convolution_partials(rows, chunk):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(rows, 24, generator=generator) + 20
    parts = [x[i : i + chunk].double() for i in range(0, rows, chunk)]
    mean = torch.stack([t.mean(0) for t in parts]).float()
    m2 = torch.stack([((t - t.mean(0)) ** 2).sum(0) for t in parts]).float()
    y, save_mean, _ = norm(x, parts=(chunk, mean, m2), act="identity")
    assert_close(save_mean, x.double().mean(0), 1e-6, 1e-6)
    assert_close(y, norm_reference(x, None, None, None, None, None, 1e-5, "identity"), 2e-5, 2e-5)


def test_norm_schedules():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(600, 72, generator=generator).bfloat16()
    first = norm(x, act="silu")
    for seed in range(1, 5):
        assert all(torch.equal(a, b) for a, b in zip(first, norm(x, act="silu", seed=seed), strict=True))


@pytest.mark.parametrize("rows,channels,splits", SPLIT_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [0, 5])
def test_batch_norm_of_split_sums(rows, channels, splits, dtype, seed):
    """As of the tensor that the sums stand for, whose very bits are written on the way; sums of rows run in another
    order, since blocks are narrower."""
    generator = torch.Generator().manual_seed(rows)
    parts, residual, bias, total = split_of(rows, channels, splits, dtype, generator)
    weight = torch.randn(channels, generator=generator)
    for extra in (None, bias, bias.to(dtype)):
        x = total if extra is None else total + extra.float()
        x = x.to(dtype)
        running = [torch.zeros(channels), torch.ones(channels)]
        options = {"residual": residual, "weight": weight, "seed": seed}
        expected = [t.clone() for t in running]
        want = norm(x, running_mean=expected[0], running_var=expected[1], **options)
        written = torch.full_like(x, float("nan"))
        got = norm(written, running_mean=running[0], running_var=running[1], split=(parts, None, extra), **options)
        assert torch.equal(written, x)
        for mine, theirs in zip((*got[:3], *running), (*want[:3], *expected), strict=True):
            assert_close(mine, theirs, 2 * tolerance(mine.dtype), 1e-5)


def test_split_sums_need_few_rows():
    parts, addend, _, _ = split_of(257, 8, 2, torch.float32, torch.Generator())
    with pytest.raises(RuntimeError, match="split sums go with few rows"):
        norm(addend, split=(parts, None, None))
