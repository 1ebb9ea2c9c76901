"""Every way through the convolution kernels that a tile can ask for, and the choice of tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_triton_tolerance import DEVICE, check, image, leaves, require_triton

from fastconv.triton import impl

require_triton()

SHAPES = {
    "3x3": ((5, 24, 3, 2), 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride_2": ((3, 16, 5, 4), 17, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "pointwise": ((4, 20, 3, 3), 24, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "image": ((3, 3, 6, 6), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "groups": ((3, 12, 4, 4), 8, (3, 3), (1, 1), (1, 1), (1, 1), 2),
}


def setup(name):
    from fastconv.triton import conv2d

    shape, k, filter_, *how = SHAPES[name]
    x, w = image(*shape, torch.float32), image(k, shape[1] // how[-1], *filter_, torch.float32, 1)
    a = conv2d.problem_of(x.shape, w.shape, *how, torch.float32)
    x64, w64 = leaves(x, w)
    xs, ws = (t.clone().requires_grad_() for t in (x, w))
    y64, ys = F.conv2d(x64, w64, None, *how), F.conv2d(xs, ws, None, *how)
    g = image(*y64.shape, torch.float32, 2)
    oracle = (y64, *torch.autograd.grad(y64, (x64, w64), g.cpu().double()))
    stock = (ys, *torch.autograd.grad(ys, (xs, ws), g))
    return conv2d, a, x, w, g, oracle, stock


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_tile_orders(name, positions):
    from fastconv.triton.conv_config import Tile

    conv2d, a, x, w, g, oracle, stock = setup(name)
    tile = Tile(32, 32, 16, 2, 1, positions)
    y, dx = torch.full_like(g, torch.nan), torch.full_like(x, torch.nan)
    conv2d.fprop(x, w, y, a, tile)
    check(y, oracle[0], stock[0], "output")
    conv2d.dgrad(g, w, dx, a, tile)
    check(dx, oracle[1], stock[1], "grad_input")


@pytest.mark.parametrize("name", ["3x3", "image"])
def test_wide_offsets(name, monkeypatch):
    """The 64-bit offsets that tensors beyond 2^31 elements get."""
    conv2d, a, x, w, g, oracle, stock = setup(name)
    monkeypatch.setattr(conv2d, "INT32_ELEMENTS", 0)
    how = (a.stride, a.padding, a.dilation, a.groups)
    y, _ = impl("conv2d_bias_act")(x, w, None, None, *how, "identity", False)
    grads = impl("conv2d_backward")(g, x, w, *how, [True, True])
    for what, got, want, peer in zip(("output", "grad_input", "grad_weight"), (y, *grads), oracle, stock, strict=True):
        check(got, want, peer, what)


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_weight_gradient_splits(name, splits):
    from fastconv.triton.conv_config import Tile

    conv2d, a, x, w, g, oracle, stock = setup(name)
    dw = torch.full_like(w, torch.nan)
    conv2d.wgrad(g, x, dw, a, Tile(64, 32, 16, 2, splits))
    check(dw, oracle[2], stock[2], "grad_weight")


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("name", ["3x3", "image", "groups"])
def test_prologue_and_statistics(name, positions):
    """relu(x * scale + shift) in front of the convolution: padding stays zero; statistics of what was written."""
    from fastconv.triton import batch_norm_stats
    from fastconv.triton.conv_config import Tile

    conv2d, a, x, w, _, oracle, _ = setup(name)
    if positions and a.flat:
        positions = False
    tile = Tile(16, 64, 32, 2, 1, positions)
    scale, shift = torch.linspace(0.5, 1.5, a.c, device=DEVICE), torch.linspace(0.1, 1, a.c, device=DEVICE)
    y = torch.empty(oracle[0].shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    parts = batch_norm_stats.partials(conv2d.row_tiles(a, tile, a.p * a.q), a.k, x.device)
    conv2d.fprop(x, w, y, a, tile, prologue=(scale, shift, "relu"), statistics=parts)

    def expected(t):
        t = F.relu(t * scale.to(t.dtype).cpu().view(1, -1, 1, 1) + shift.to(t.dtype).cpu().view(1, -1, 1, 1))
        return F.conv2d(t, w.cpu().to(t.dtype), None, a.stride, a.padding, a.dilation, a.groups)

    check(y, expected(x.cpu().double()), expected(x.cpu()), "output")
    rows = a.n * a.p * a.q
    mean, invstd = batch_norm_stats.finish_statistics(parts, rows, None, None, None, 0.1, 1e-5)
    y64 = y.double().cpu()
    size = y64.abs().max().item()
    check(mean, y64.mean((0, 2, 3)), y.float().cpu().mean((0, 2, 3)), "mean", scale=size)
    check(invstd, 1 / torch.sqrt(y64.var((0, 2, 3), correction=0) + 1e-5), 1 / torch.sqrt(
        y.float().cpu().var((0, 2, 3), correction=0) + 1e-5), "invstd", scale=1.0)  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 24, 3, 2, 40), (3, 64, 5, 5, 16), (1, 8, 1, 1, 136)])
def test_pointwise_by_descriptors(shape, monkeypatch):
    """The TMA kernel: forward with its whole epilogue and statistics, data gradient, and edges in every dimension."""
    from fastconv.triton import batch_norm_stats, conv2d
    from fastconv.triton.conv_config import Tile

    n, c, h, w_, k = shape
    dtype = torch.float16
    x, w, r, g = (
        image(*s, dtype, i) for i, s in enumerate(((n, c, h, w_), (k, c, 1, 1), (n, k, h, w_), (n, k, h, w_)))
    )
    a = conv2d.problem_of(x.shape, w.shape, (1, 1), (0, 0), (1, 1), 1, dtype)
    tile = Tile(32, 32, 16, 2, 1, False, True)
    launched, real = [], conv2d.launch

    def note(kernel, *args, **meta):
        launched.append(kernel)
        real(kernel, *args, **meta)

    monkeypatch.setattr(conv2d, "launch", note)
    v = [torch.linspace(0.5, 1.5, k, device=DEVICE), torch.linspace(-1, 1, k, device=DEVICE)]
    y, preact, dx = torch.full_like(g, torch.nan), torch.full_like(g, torch.nan), torch.full_like(x, torch.nan)
    parts = batch_norm_stats.partials(conv2d.row_tiles(a, tile, a.p * a.q), k, x.device)
    conv2d.fprop(
        x, w, y, a, tile, scale=v[0], shift=v[1], residual=r, preact=preact, activation="silu", statistics=parts
    )
    conv2d.dgrad(g, w, dx, a, tile)
    assert launched == [conv2d.conv_pointwise_kernel] * 2

    def expected(x, w, r, g):
        x = x.detach().cpu().requires_grad_()
        z = F.conv2d(x, w.cpu())
        (dx,) = torch.autograd.grad(z, x, g.cpu())
        z = z * v[0].cpu().to(z.dtype).view(1, -1, 1, 1) + v[1].cpu().to(z.dtype).view(1, -1, 1, 1) + r.cpu()
        return z.detach(), F.silu(z.detach()), dx

    oracle, stock = expected(*(t.double() for t in (x, w, r, g))), expected(x, w, r, g)
    for what, got, want, peer in zip(("preact", "output", "dx"), (preact, y, dx), oracle, stock, strict=True):
        check(got, want, peer, what)
    mean, _ = batch_norm_stats.finish_statistics(parts, n * h * w_, None, None, None, 0.1, 1e-5)
    torch.testing.assert_close(mean.cpu(), y.float().cpu().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_residual_halves_the_largest_tiles(monkeypatch):
    """Its values and a 128x128 accumulator do not fit a thread's registers together; the result is the same."""
    from fastconv.triton.conv_config import Tile

    conv2d, a, x, w, g, *_ = setup("pointwise")
    columns, real = [], conv2d.launch
    monkeypatch.setattr(conv2d, "launch", lambda *args, **how: columns.append(how["BLOCK_N"]) or real(*args, **how))
    y, plain = torch.empty_like(g), torch.empty_like(g)
    for tile, width in ((Tile(128, 128, 16, 2), 64), (Tile(128, 64, 16, 2), 64)):
        conv2d.fprop(x, w, plain, a, tile)
        conv2d.fprop(x, w, y, a, tile, residual=g)
        assert columns == [tile.columns, width]
        torch.testing.assert_close(y, plain + g)
        columns.clear()


def test_descriptors_give_way_where_they_do_not_fit(monkeypatch):
    """A map that does not begin at 16 bytes, and a prologue, go to the gathering kernel and are right."""
    from fastconv.triton import conv2d
    from fastconv.triton.conv_config import Tile, fits_descriptors

    x, w = image(3, 16, 4, 4, torch.float16), image(8, 16, 1, 1, torch.float16, 1)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:]
    odd = memory.view(3, 4, 4, 16).permute(0, 3, 1, 2).copy_(x)
    a = conv2d.problem_of(x.shape, w.shape, (1, 1), (0, 0), (1, 1), 1, x.dtype)
    plain, tma = Tile(32, 16, 16, 2), Tile(32, 16, 16, 2, 1, False, True)
    vectors = (torch.ones(16, device=DEVICE), torch.ones(16, device=DEVICE), "relu")
    for data, how in ((odd, {}), (x, {"prologue": vectors})):
        results = [torch.full((3, 8, 4, 4), torch.nan, dtype=x.dtype, device=DEVICE) for _ in range(2)]
        results = [t.contiguous(memory_format=torch.channels_last) for t in results]
        for tile, y in zip((plain, tma), results, strict=True):
            conv2d.fprop(data, w, y, a, tile, **how)
        assert torch.equal(*results)
    assert fits_descriptors("fprop", a, 227 * 1024) and not fits_descriptors("fprop", a, 163 * 1024)
    assert not fits_descriptors("wgrad", a, 227 * 1024)
    for shape, k, r, stride, groups, dtype in (
        ((1, 12, 4, 4), 8, 1, 1, 1, torch.float16), ((1, 16, 4, 4), 8, 3, 1, 1, torch.float16),
        ((1, 16, 4, 4), 8, 1, 2, 1, torch.float16), ((1, 16, 4, 4), 8, 1, 1, 2, torch.float16),
        ((1, 16, 4, 4), 8, 1, 1, 1, torch.float32),
    ):  # fmt: skip
        b = conv2d.problem_of(
            shape, (k, shape[1] // groups, r, r), (stride, stride), (r // 2,) * 2, (1, 1), groups, dtype
        )
        assert not fits_descriptors("fprop", b, 227 * 1024)


def problems():
    from fastconv.triton.conv_config import Problem

    for n in (1, 4, 128, 1024):
        shapes = ((3, 32, 64, 7, 2), (64, 8, 64, 3, 1), (256, 4, 1024, 1, 1), (512, 1, 512, 3, 1))
        for c, size, k, taps, stride in shapes:
            for itemsize in (2, 4):
                pad = taps // 2
                yield Problem(n, c, size, size, k, taps, taps, (stride,) * 2, (pad,) * 2, (1, 1), 1, itemsize)


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_candidates(op):
    from fastconv.triton.conv_config import candidates

    for a in problems():
        for shared in (227 * 1024, 163 * 1024, 99 * 1024):
            found = candidates(op, a, 132, shared)
            assert 1 <= len(found) <= 12 and len(set(found)) == len(found)
            for t in found:
                assert min(t.rows, t.columns, t.chunk) >= 16 and t.splits >= 1
                assert (t.rows + t.columns) * t.chunk * a.itemsize * t.stages <= shared
                assert op == "wgrad" or t.splits == 1


def test_small_maps_walk_live_taps_only():
    """A padded 3x3 filter on a 1x1 map has one live tap, on a 2x2 map 4 of 9; the batch fills a position's rows."""
    from fastconv.triton.conv_config import candidates, live_taps

    assert live_taps(1, 1, 3, 1, 1, 1) == (1, 1)
    assert live_taps(2, 2, 3, 1, 1, 1) == (4, 3)
    a = [p for p in problems() if p.n == 1024 and p.itemsize == 2]
    small = next(p for p in a if p.h == 8 and p.r == 3)
    assert candidates("fprop", small)[0].positions


@pytest.mark.parametrize("name", ["depthwise_kernel", "grouped"])
def test_weight_gradient_is_deterministic(name):
    groups = 8 if name == "depthwise_kernel" else 2
    x, w = image(3, 8, 9, 9, torch.float32), image(8, 8 // groups, 3, 3, torch.float32, 1)
    how = ((1, 1), (1, 1), (1, 1), groups)
    g = image(3, 8, 9, 9, torch.float32, 2)
    first, again = (impl("conv2d_backward")(g, x, w, *how, [False, True])[1] for _ in range(2))
    assert torch.equal(first, again)


def test_depthwise_epilogue_and_many_rows():
    """scale, shift, residual and activation of the depthwise kernel; its weight gradient needs several row programs."""
    from fastconv.triton import act_bias_backward, conv2d, depthwise

    x, w = image(2, 40, 9, 9, torch.float32), image(40, 1, 3, 3, torch.float32, 1)
    how = ((1, 1), (1, 1), (1, 1), 40)
    a = conv2d.problem_of(x.shape, w.shape, *how, torch.float32)
    scale, shift = torch.linspace(1, 2, 40, device=DEVICE), torch.linspace(-1, 1, 40, device=DEVICE)
    y = torch.empty_like(x)
    depthwise.depthwise_fprop(x, w, y, a, scale=scale, shift=shift, residual=x, activation="relu6")

    def expected(x, w):
        v = [t.to(x.dtype).cpu().view(1, -1, 1, 1) for t in (scale, shift)]
        return F.relu6(F.conv2d(x, w, None, *how) * v[0] + v[1] + x)

    check(y, expected(x.cpu().double(), w.cpu().double()), expected(x.cpu(), w.cpu()), "output")
    rows = a.n * a.p * a.q
    parts, each = act_bias_backward.row_split(rows, 40 * 9, 2048 // 64, 64)
    assert parts > 1 and parts * each >= rows
