"""Pooling kernels in the emulator, against PyTorch in fp64."""

import ctypes

import pytest
import simt_lib
import torch
import torch.nn.functional as F
from simt_lib import DTYPES, assert_close, dense_nhwc, library, pointer, to_nhwc, tolerance

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))

ALL = [torch.float32, torch.float16, torch.bfloat16]
KINDS = {"max": 0, "avg": 1, "adaptive": 2}


class PoolCall(ctypes.Structure):
    _fields_ = [(f, ctypes.c_void_p) for f in ("in_", "out", "offsets")]
    _fields_ += [
        (f, ctypes.c_int)
        for f in [
            "n",
            "h",
            "w",
            "c",
            "p",
            "q",
            "r",
            "s",
            "stride_h",
            "stride_w",
            "pad_h",
            "pad_w",
            "dil_h",
            "dil_w",
            "count_include_pad",
            "divisor_override",
            "dtype",
            "kind",
            "backward",
        ]
    ]


def pool(
    kind,
    x,
    out_shape,
    *,
    image,
    out_map,
    kernel=(1, 1),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    include_pad=True,
    divisor=0,
    offsets=None,
    backward=False,
    seed=0,
    offset=0,
):
    """image = (h, w) and out_map = (p, q) of the forward; x is dy in the backward."""
    held, out = to_nhwc(x, offset), dense_nhwc(out_shape, x.dtype)
    call = PoolCall(
        pointer(held),
        pointer(out),
        pointer(offsets),
        x.shape[0],
        *image,
        x.shape[1],
        *out_map,
        *kernel,
        *stride,
        *padding,
        *dilation,
        int(include_pad),
        divisor,
        DTYPES[x.dtype],
        KINDS[kind],
        int(backward),
    )
    library("pool").call("simt_pool", ctypes.byref(call), seed=seed)
    return out


MAX = [  # n, c, h, w, then F.max_pool2d's arguments
    ((2, 64, 8, 8), (3, 3), (2, 2), (1, 1), (1, 1), False),
    ((1, 7, 9, 6), (2, 3), (1, 2), (0, 1), (2, 1), True),
    ((2, 8, 5, 5), (2, 2), (2, 2), (0, 0), (1, 1), True),
    ((3, 24, 4, 4), (4, 4), (4, 4), (0, 0), (1, 1), False),
    ((1, 16, 6, 7), (1, 1), (3, 2), (0, 0), (1, 1), False),
]


@pytest.mark.parametrize("case", MAX)
@pytest.mark.parametrize("dtype", ALL)
def test_max_pool(case, dtype):
    shape, kernel, stride, padding, dilation, ceil_mode = case
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, shape, generator=generator).to(dtype)  # ties: the first maximum must win
    x.view(-1)[::37] = float("nan")
    x.view(-1)[5::41] = float("-inf")
    want, index = F.max_pool2d(x.double(), kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    n, c, h, w = shape
    p, q = want.shape[2:]
    options = {
        "image": (h, w),
        "out_map": (p, q),
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    for seed, start, bytes_start in ((0, 0, 0), (3, 1, 0), (4, 0, 1)):
        offsets = dense_nhwc((n, c, p, q), torch.uint8, 255, bytes_start)
        got = pool("max", x, tuple(want.shape), offsets=offsets, seed=seed, offset=start, **options)
        assert torch.equal(got.nan_to_num(77), want.to(dtype).nan_to_num(77))
        r, s = offsets.long() // kernel[1], offsets.long() % kernel[1]
        hh = torch.arange(p).view(1, 1, p, 1) * stride[0] - padding[0] + r * dilation[0]
        ww = torch.arange(q).view(1, 1, 1, q) * stride[1] - padding[1] + s * dilation[1]
        assert torch.equal(hh * w + ww, index)
        dy = torch.randint(-3, 4, want.shape, generator=generator).to(dtype)
        grad = torch.zeros(n, c, h * w).scatter_add_(2, index.flatten(2), dy.float().flatten(2)).view(shape)
        got = pool("max", dy, shape, offsets=offsets, backward=True, seed=seed, offset=start, **options)
        assert torch.equal(got, grad.to(dtype))
    got = pool("max", x, tuple(want.shape), **options)
    assert torch.equal(got.nan_to_num(77), want.to(dtype).nan_to_num(77))


AVG = [
    ((2, 64, 8, 8), (3, 3), (2, 2), (1, 1), False, True, 0),
    ((2, 16, 8, 8), (3, 3), (2, 2), (1, 1), True, False, 0),
    ((1, 7, 9, 6), (2, 3), (1, 2), (1, 1), True, True, 0),
    ((1, 5, 6, 9), (3, 2), (2, 1), (1, 1), True, True, 0),  # the last window leaves the padded image below
    ((1, 5, 7, 7), (3, 2), (3, 3), (1, 1), True, True, 5),
    ((1, 8, 5, 5), (2, 2), (3, 3), (0, 0), False, True, 0),
]


@pytest.mark.parametrize("case", AVG)
@pytest.mark.parametrize("dtype", ALL)
def test_avg_pool(case, dtype):
    shape, kernel, stride, padding, ceil_mode, include, divisor = case
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).to(dtype)
    leaf = x.double().requires_grad_()
    want = F.avg_pool2d(leaf, kernel, stride, padding, ceil_mode, include, divisor or None)
    dy = torch.randn(want.shape, generator=generator).to(dtype)
    want.backward(dy.double())
    options = {
        "image": shape[2:],
        "out_map": want.shape[2:],
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "include_pad": include,
        "divisor": divisor,
    }
    for seed, start in ((0, 0), (3, 1)):
        got = pool("avg", x, tuple(want.shape), seed=seed, offset=start, **options)
        assert_close(got, want.detach(), tolerance(dtype), 1e-6)
        got = pool("avg", dy, shape, backward=True, seed=seed, offset=start, **options)
        assert_close(got, leaf.grad, tolerance(dtype), 1e-6)


@pytest.mark.parametrize(
    "sizes", [((7, 7), (1, 1)), ((8, 6), (3, 4)), ((3, 5), (7, 5)), ((4, 4), (4, 4)), ((10, 1), (3, 2))]
)
@pytest.mark.parametrize("dtype", ALL)
def test_adaptive_avg_pool(sizes, dtype):
    image, out_map = sizes
    generator = torch.Generator().manual_seed(3)
    for channels in (32, 5):
        x = torch.randn(2, channels, *image, generator=generator).to(dtype)
        leaf = x.double().requires_grad_()
        want = F.adaptive_avg_pool2d(leaf, out_map)
        dy = torch.randn(want.shape, generator=generator).to(dtype)
        want.backward(dy.double())
        got = pool("adaptive", x, tuple(want.shape), image=image, out_map=out_map, seed=channels)
        assert_close(got, want.detach(), tolerance(dtype), 1e-6)
        got = pool("adaptive", dy, tuple(x.shape), image=image, out_map=out_map, backward=True)
        assert_close(got, leaf.grad, tolerance(dtype), 1e-6)


def test_bad_calls_are_refused():
    x = torch.zeros(1, 1, 20, 20)
    with pytest.raises(RuntimeError, match="at most 256"):
        pool(
            "max",
            x,
            (1, 1, 1, 1),
            image=(20, 20),
            out_map=(1, 1),
            kernel=(20, 20),
            offsets=torch.zeros(1, dtype=torch.uint8),
        )
    with pytest.raises(RuntimeError, match="needs the offsets"):
        pool("max", x, (1, 1, 20, 20), image=(20, 20), out_map=(20, 20), backward=True)
