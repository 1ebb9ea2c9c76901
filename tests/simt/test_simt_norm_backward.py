"""Activation backward + bias gradient and batch norm's backward in the emulator, against fp64 PyTorch."""

import ctypes

import pytest
import simt_lib
import torch
import torch.nn.functional as F
from simt_lib import ACTIVATIONS, DTYPES, SAVES_OUTPUT, assert_close, integers, library, pointer, tolerance
from simt_norm import ALL, SHAPES, SPLIT_SHAPES, SplitCall, activation, split_call, split_of, unaligned

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))


def act_backward(grad, saved, act, want=(True, True), seed=0, blocks=8, min_rows=16):
    lib = library("norm")
    rows, channels = grad.shape
    out = torch.full_like(grad, float("nan")) if want[0] else None
    bias = simt_lib.guarded(torch.full((channels,), float("nan"), dtype=grad.dtype)) if want[1] else None
    partial = torch.full((64 * channels,), float("nan")) if want[1] else None
    chunks = [lib.lib.simt_act_chunks(ctypes.c_int64(rows), channels, v, blocks, min_rows) for v in (1, 4, 8)]
    vec = 4 if grad.dtype == torch.float32 else 8
    most = lib.lib.simt_most_chunks(DTYPES[grad.dtype], ctypes.c_int64(rows), channels, blocks, min_rows)
    assert most == max(chunks[0], chunks[1 if vec == 4 else 2]) <= 64
    lib.call(
        "simt_act_backward",
        DTYPES[grad.dtype],
        ctypes.c_void_p(pointer(grad)),
        ctypes.c_void_p(pointer(saved)),
        ctypes.c_void_p(pointer(out)),
        ctypes.c_void_p(pointer(partial)),
        ctypes.c_void_p(pointer(bias)),
        ACTIVATIONS.index(act),
        ctypes.c_int64(rows),
        channels,
        blocks,
        min_rows,
        seed=seed,
    )
    return out, bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALL)
def test_act_backward_exact(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    grad, saved = integers(shape, dtype, generator), integers(shape, dtype, generator)
    want = grad * (saved > 0)
    for seed, (g, s, blocks) in enumerate([(grad, saved, 8), (unaligned(grad), saved, 8), (grad, saved, 200)]):
        got, bias = act_backward(g, s, "relu", seed=seed, blocks=blocks)
        assert torch.equal(got, want)
        assert torch.equal(bias, want.double().sum(0).to(dtype))
    only, none = act_backward(grad, saved, "relu", want=(True, False))
    assert none is None and torch.equal(only, want)
    none, bias = act_backward(grad, None, "identity", want=(False, True))
    assert none is None and torch.equal(bias, grad.double().sum(0).to(dtype))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_act_backward_formulas(act):
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(40, 24, generator=generator)
    x = torch.randn(40, 24, generator=generator) * 3
    x[0, :6] = torch.tensor([0.0, 3.0, -3.0, 6.0, 30.0, -30.0])
    leaf = x.double().requires_grad_()
    out = activation(act)(leaf)
    out.backward(grad.double())
    saved = out.detach().float() if act in SAVES_OUTPUT else x
    got, _ = act_backward(grad, saved, act)
    skip = torch.zeros(40, 24, dtype=torch.bool)
    if act == "hardswish":  # at the kinks at +-3 either one-sided derivative is a subgradient
        skip[0, 1:3] = True
    assert_close(got[~skip], leaf.grad[~skip], 1e-5, 1e-5)


def test_act_backward_nan_as_pytorch():
    saved = torch.tensor([[float("nan"), 1.0, -1.0, 0.0]])
    grad = torch.ones(1, 4)
    for act, op in (("relu", torch.ops.aten.threshold_backward),):
        got, _ = act_backward(grad, saved, act)
        assert torch.equal(got, op(grad, saved, 0))


class NormBackwardCall(ctypes.Structure):
    _fields_ = [
        (f, ctypes.c_void_p)
        for f in [
            "dy",
            "x",
            "output",
            "residual",
            "weight",
            "bias",
            "mean",
            "invstd",
            "dx",
            "dresidual",
            "dweight",
            "dbias",
            "part_g",
            "part_gx",
            "sum_g",
            "sum_gx",
        ]
    ]
    _fields_ += [("rows", ctypes.c_int64)]
    _fields_ += [
        (f, ctypes.c_int) for f in ["dtype", "params_float", "channels", "training", "act", "blocks", "min_rows"]
    ]
    _fields_ += [("split", SplitCall), ("part_sums", ctypes.c_int64)]


def norm_backward(
    dy,
    x,
    output,
    residual,
    weight,
    bias,
    mean,
    invstd,
    training,
    act,
    want=(1, 1, 1, 1),
    seed=0,
    split=None,
    dres=None,
    sums=None,
):
    rows, channels = x.shape
    dx, fresh = (torch.full_like(x, float("nan")) if w else None for w in want[:2])
    dres = fresh if dres is None else dres
    dweight, dbias = (
        simt_lib.guarded(
            torch.full((channels,), float("nan"), dtype=weight.dtype if weight is not None else torch.float32)
        )
        if w
        else None
        for w in want[2:]
    )
    work = [torch.full((64 * channels,), float("nan")) for _ in range(4)]
    work[:2] = sums or work[:2]  # [tiles, channels] of g and of g xhat
    call = NormBackwardCall(
        *(pointer(t) for t in (dy, x, output, residual, weight, bias, mean, invstd, dx, dres, dweight, dbias, *work))
    )
    call.rows, call.dtype, call.channels = rows, DTYPES[x.dtype], channels
    call.split = split_call(split)
    call.part_sums = len(sums[0]) if sums else 0
    call.params_float = int(weight is None or weight.dtype == torch.float32)
    call.training, call.act, call.blocks, call.min_rows = int(training), ACTIVATIONS.index(act), 8, 32
    library("norm").call("simt_batch_norm_backward", ctypes.byref(call), seed=seed)
    return dx, dres, dweight, dbias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_batch_norm_backward(shape, training, act):
    generator = torch.Generator().manual_seed(7)
    rows, channels = shape
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        weight, bias, mean = (torch.randn(channels, generator=generator) for _ in range(3))
        var = torch.rand(channels, generator=generator) + 0.5
        leaves = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
        z = F.batch_norm(leaves[0], mean.double(), var.double(), leaves[2], leaves[3], training, 0.0, 1e-5) + leaves[1]
        y = activation(act)(z)
        y.backward(dy.double())
        if training:
            mean, var = x.double().mean(0), x.double().var(0, unbiased=False)
        output = y.detach().to(dtype) if act in SAVES_OUTPUT and act != "identity" else None
        if dtype == torch.bfloat16 and act not in ("identity", "relu", "leaky_relu"):
            continue  # the gradient at a rounded output differs from the gradient before rounding
        args = (
            dy,
            x,
            output,
            residual,
            weight,
            bias,
            mean.float(),
            (1 / torch.sqrt(var.double() + 1e-5)).float(),
            training,
            act,
        )
        got = norm_backward(*args, seed=rows % 3)
        loose = 1e-4 if dtype == torch.float32 else 1e-2
        scale = max(1.0, rows**0.5)
        for name, g, leaf, size in zip(
            ["dx", "dresidual", "dweight", "dbias"], got, leaves, [1, 1, scale, scale], strict=True
        ):
            peak = leaf.grad.abs().max().item()
            assert_close(g, leaf.grad, loose, loose * max(1e-2 * peak, 0.1 * size)), name
        # what is not asked for is not needed by the rest
        only = norm_backward(*args, want=(1, 0, 0, 0))
        assert_close(only[0], got[0], loose, loose)
        assert torch.equal(norm_backward(*args, want=(0, 0, 1, 1))[2], got[2])


@pytest.mark.parametrize("rows,channels,splits", SPLIT_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
def test_batch_norm_backward_of_split_sums(rows, channels, splits, dtype, act):
    """dy as split sums, added to what lies where dy will be; for a ReLU the residual's gradient goes there too."""
    generator = torch.Generator().manual_seed(rows + 1)
    parts, addend, bias, total = split_of(rows, channels, splits, dtype, generator)
    x, residual = (torch.randn(rows, channels, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(channels, generator=generator)
    mean, invstd = x.float().mean(0), (x.float().var(0, unbiased=False) + 1e-5).rsqrt()
    output = torch.randn(rows, channels, generator=generator).relu().to(dtype) if act == "relu" else None
    dy = (total + addend.float()).to(dtype)
    args = (x, output, residual, weight, bias, mean, invstd, True, act)
    want = norm_backward(dy.clone(), *args, want=(1, act != "identity", 1, 1))
    into = addend.clone()
    in_place = {"dres": into, "want": (1, 0, 1, 1)} if act == "relu" else {"want": (1, act != "identity", 1, 1)}
    got = norm_backward(into, *args, split=(parts, into, None), **in_place)
    for i in (0, 2, 3):
        assert_close(got[i], want[i], 2 * tolerance(got[i].dtype), 1e-4)
    assert torch.equal(into, dy) if act == "identity" else torch.equal(got[1], want[1])


@pytest.mark.parametrize("tiles", [1, 3, 70])  # 70: more than a block merges in one round
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(37, 16), (700, 264), (530, 7)])
def test_batch_norm_backward_of_a_data_gradients_sums(shape, training, tiles):
    """dy has the activation's slope already, and its sums by tile are there: as an identity's backward."""
    generator = torch.Generator().manual_seed(tiles)
    for dtype in (torch.float32, torch.bfloat16):
        x, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        weight, bias, mean = (torch.randn(shape[1], generator=generator) for _ in range(3))
        invstd = torch.rand(shape[1], generator=generator) + 0.5
        tile = torch.arange(shape[0]) % tiles
        zero = torch.zeros(tiles, shape[1])
        sums = [zero.index_add(0, tile, v) for v in (g.float(), g.float() * (x.float() - mean) * invstd)]
        args = (g, x, None, None, weight, bias, mean, invstd, training)
        want = norm_backward(*args, "identity", want=(1, 0, 1, 1))
        got = norm_backward(*args, "relu", want=(1, 0, 1, 1), seed=tiles, sums=sums)
        assert_close(got[0], want[0], 2 * tolerance(dtype), 1e-5)
        for i in (2, 3):
            assert_close(got[i], want[i], 1e-5, 1e-4)


def test_sums_of_a_data_gradient_need_dx():
    ones = torch.ones(4, 8)
    args = (ones, ones, None, None, None, None, ones[0], ones[0], True, "identity")
    with pytest.raises(RuntimeError, match="go with dx"):
        norm_backward(*args, want=(0, 0, 1, 1), sums=[ones, ones])
