"""The edges of the matrix tiles: numbers of rows, columns and summed channels around 16 and 32, long sums, rows that lie
evenly in memory and rows that do not, few rows that meet the weights in place, and values that a tile must not touch.
Whatever instruction set runs (AMX has tiles of 32 x 32 x 32 in bf16, AVX-512 of 8 x 32), the results are held to fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from util import check_sums, needs_vectors

import fastconv

needs_vectors()

PLAN = torch.ops.fastconv_plan
LAST = torch.channels_last
# (images, height, width, channels, filters, kernel, stride, padding)
EDGES = [(n, 1, 1, c, k, 1, 1, 0) for n in (1, 15, 16, 17, 31, 32, 33, 70) for c, k in ((64, 64), (34, 27), (2, 59))]
EDGES += [(2, 3, 3, c, 32, 1, 1, 0) for c in (1, 30, 31, 32, 33, 62, 96, 100)]
# Classes of a padded map. Few multiply-adds: else gradients of 16 filters are left to oneDNN.
EDGES += [(1, 5, 6, c, 59, 3, 1, 1) for c in (16, 32, 48, 66)]
EDGES += [
    (3, 7, 5, 64, 32, 3, 2, 1),
    (3, 8, 8, 64, 96, 1, 2, 0),
    (20, 2, 2, 64, 64, 3, 1, 1),
    (2, 16, 16, 3, 64, 7, 2, 3),
]
EDGES += [(2, 3, 3, 512, 32, 3, 1, 1), (33, 1, 1, 2100, 64, 1, 1, 0), (17, 1, 1, 2100, 32, 1, 1, 0)]  # folded sums
# Sums over filters give columns of channels: the edges with both swapped; gradients of narrow columns are stock's.
GRADIENT_EDGES = [(n, h, w, k, c, *rest) if c != 3 else (n, h, w, c, k, *rest) for n, h, w, c, k, *rest in EDGES]
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


def problem(edge: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict, list[int]]:
    n, h, w, c, k, r, stride, pad = edge
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(k, c, r, r).to(dtype).contiguous(memory_format=LAST)
    return x, weight, {"stride": stride, "padding": pad}, [stride, stride, pad, pad, 1, 1, 1]


def forward(x: Tensor, weight: Tensor, settings: dict, geometry: list[int], packed: Tensor | None = None) -> Tensor:
    size = F.conv2d(x.float(), weight.float(), **settings).shape
    out = torch.full(size, torch.nan, dtype=x.dtype).contiguous(memory_format=LAST)
    PLAN.conv2d(x, weight, packed, None, None, None, None, geometry, "identity", None, out)
    return out


@DTYPES
@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_forward(edge, dtype):
    x, weight, settings, geometry = problem(edge, dtype)
    oracle = F.conv2d(x.double(), weight.double(), **settings)
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), **settings)
    check_sums(forward(x, weight, settings, geometry), oracle, magnitude)
    check_sums(forward(x, weight, settings, geometry, PLAN.conv2d_pack(x, weight, geometry)), oracle, magnitude)


@DTYPES
@pytest.mark.parametrize("edge", GRADIENT_EDGES, ids=str)
def test_gradients(edge, dtype):
    x, weight, settings, geometry = problem(edge, dtype)

    def gradients(x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        return torch.autograd.grad(F.conv2d(x, weight, **settings), (x, weight), g.double())

    g = torch.randn_like(F.conv2d(x, weight, **settings)).contiguous(memory_format=LAST)
    oracle, magnitude = gradients(x, weight, g), gradients(x.abs(), weight.abs(), g.abs())
    grad_x, grad_weight = torch.full_like(x, torch.nan), torch.full_like(weight, torch.nan, dtype=torch.float32)
    PLAN.conv2d_input_grad(g, weight, None, geometry, grad_x)
    PLAN.conv2d_weight_grad(g, x, weight, geometry, grad_weight)
    check_sums(grad_x, oracle[0], magnitude[0])
    check_sums(grad_weight, oracle[1], magnitude[1])


@pytest.mark.parametrize("channels", (34, 64))
def test_a_value_reaches_its_own_outputs_only(channels):
    """NaN and infinity next to a tile's rows, columns and units: a product with a zero beside them would spread them."""
    x = torch.ones(3, channels, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    weight = torch.ones(64, channels, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    x[1, :, 2, 1] = torch.nan
    out = forward(x, weight[:, :, :1, :1].contiguous(memory_format=LAST), {}, [1, 1, 0, 0, 1, 1, 1])
    hit = torch.zeros(3, 4, 4, dtype=torch.bool)
    hit[1, 2, 1] = True
    assert torch.equal(out.isnan(), hit[:, None].expand_as(out))
    weight[5, 0, 0, 2] = torch.inf
    out = forward(torch.ones_like(x), weight, {}, [1, 1, 0, 0, 1, 1, 1])
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[:, 5] = True
    assert torch.equal(out.isinf(), hit) and not out.isnan().any()


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("padding", (0, 1))
def test_one_wide_position_with_a_stride(groups, padding):
    """oneDNN 3.10's bf16 kernels for AMX read memory here that nobody wrote; stock PyTorch gives NaN now and then."""
    x, weight = torch.randn(2, 12, 8, 7).bfloat16(), torch.randn(8, 12 // groups, 5, 4 + 2 * padding).bfloat16()
    oracle = F.conv2d(x.double(), weight.double(), None, (1, 4), (2, padding), 1, groups)
    assert oracle.shape[3] == 1
    magnitude = F.conv2d(x.double().abs(), weight.double().abs(), None, (1, 4), (2, padding), 1, groups)
    for _ in range(20):
        left = [torch.full((size,), torch.nan) for size in (64, 256, 1024, 4096, 16384)]
        del left
        check_sums(fastconv.functional.conv2d_bias_act(x, weight, stride=(1, 4), padding=(2, padding), groups=groups,
                                                  activation="identity"), oracle, magnitude)  # fmt: skip


@pytest.mark.parametrize("channels", (1, 3, 7))
def test_strided_pixels_of_few_channels(channels):
    """On processors without AVX-512, oneDNN 3.10 writes out of bounds here, and stock PyTorch aborts in free()."""
    x = torch.randn(2, channels, 64, 64).to(memory_format=LAST)
    grad = torch.randn(2, 16, 32, 32).to(memory_format=LAST)
    oracle = torch.einsum("nkhw,nchw->kc", grad.double(), x[:, :, ::2, ::2].double())
    magnitude = torch.einsum("nkhw,nchw->kc", grad.double().abs(), x[:, :, ::2, ::2].double().abs())
    for _ in range(20):
        _, out = torch.ops.fastconv.conv2d_backward(
            grad, x, torch.empty(16, channels, 1, 1).to(memory_format=LAST), [2, 2], [0, 0], [1, 1], 1, [False, True]
        )
        check_sums(out.view_as(oracle), oracle, magnitude)
