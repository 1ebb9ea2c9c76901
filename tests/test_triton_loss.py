"""Cross-entropy in Triton against the fp64 oracle: indices, probabilities, weights, smoothing, ignored rows, K-d."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_triton_tolerance import DEVICE, DTYPES, check, require_triton

from fastconv import reference
from fastconv.triton import impl

require_triton()
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def loss_case(
    shape, dtype=torch.float32, reduction="mean", weights=False, smoothing=0.0, probabilities=False, ignore=-100,
    layout=torch.contiguous_format, target_dtype=torch.int64, scale=3.0, offset=0.0, grad_target=False,
):  # fmt: skip
    gen = torch.Generator().manual_seed(0)
    classes = shape[1]
    x = (torch.randn(shape, generator=gen) * scale + offset).to(DEVICE, dtype).contiguous(memory_format=layout)
    rows = (shape[0], *shape[2:])
    if probabilities:
        t = torch.rand(shape, generator=gen).softmax(1).to(DEVICE, dtype).contiguous(memory_format=layout)
    else:
        t = torch.randint(0, classes, rows, generator=gen).to(DEVICE, target_dtype)
        if ignore != -100:
            t.view(-1)[::3] = ignore
    w = (torch.rand(classes, generator=gen) + 0.2).to(DEVICE, dtype) if weights else None
    g = torch.randn(rows if reduction == "none" else (), generator=gen).to(DEVICE, dtype)

    def run(f, dtype):
        move = (lambda v: v.cpu().double()) if dtype is torch.float64 else (lambda v: v.clone())
        leaf = move(x).requires_grad_()
        target = move(t).requires_grad_() if probabilities else t.cpu() if dtype is torch.float64 else t
        loss = f(
            leaf, target, None if w is None else move(w),
            reduction=reduction, ignore_index=ignore, label_smoothing=smoothing,
        )  # fmt: skip
        wanted = [leaf, target] if grad_target else [leaf]
        return loss, *torch.autograd.grad(loss, wanted, move(g))

    oracle, stock = run(reference.cross_entropy, torch.float64), run(F.cross_entropy, dtype)
    settings = (REDUCTIONS[reduction], ignore, smoothing)
    loss, lse, norm = impl("cross_entropy")(x, t, w, *settings)
    before = x.clone()
    grads = impl("cross_entropy_backward")(g, x, t, w, lse, norm, *settings, [True, grad_target])
    check(loss, oracle[0], stock[0], "loss")
    # p = exp(x - lse): the rounding of the fp32 lse, one unit of its own size, is a relative error of p.
    size = oracle[1].abs().max().item() * max(1.0, lse.abs().max().item())
    check(grads[0], oracle[1], stock[1], "grad_input", scale=size if dtype is torch.float32 else 0.0)
    assert grads[0].is_contiguous(memory_format=layout)
    if grad_target:
        check(grads[1], oracle[2], stock[2], "grad_target")
    else:
        assert grads[1].shape == (0,)
    check(lse, x.cpu().double().logsumexp(1), x.float().logsumexp(1), "lse")
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7, 2), (33, 10), (3, 1000), (300, 5)])
def test_class_indices(shape, reduction, dtype):
    loss_case(shape, dtype, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "weights,smoothing,ignore", [(True, 0.0, 1), (False, 0.1, -100), (True, 0.2, 3), (True, 1.0, 0)]
)
def test_weights_smoothing_ignored_rows(weights, smoothing, ignore, reduction):
    loss_case((20, 7), torch.float32, reduction, weights, smoothing, ignore=ignore)
    loss_case((3, 6, 2, 5), torch.float16, reduction, weights, smoothing, ignore=ignore)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights,smoothing", [(False, 0.0), (True, 0.3)])
def test_probabilities(weights, smoothing, reduction, dtype):
    loss_case((9, 13), dtype, reduction, weights, smoothing, probabilities=True, grad_target=True)
    loss_case((2, 5, 3, 3), dtype, reduction, weights, smoothing, probabilities=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("probabilities", [False, True])
def test_images(layout, probabilities):
    loss_case((2, 21, 9, 17), torch.float32, "mean", True, 0.1, probabilities, layout=layout)


def test_three_spatial_dimensions():
    loss_case((2, 3, 2, 3, 4), torch.float32, "none")


def test_large_vocabulary():
    loss_case((2, 262144), torch.float32, "mean", True, 0.1)
    loss_case((2, 5000), torch.float16, "mean", probabilities=True, grad_target=True)


def test_large_logits():
    loss_case((5, 4100), torch.float32, "mean", False, 0.1, offset=2000.0)


def test_uint8_targets():
    loss_case((12, 10), torch.float32, target_dtype=torch.uint8)


def test_infinite_logits():
    x = torch.zeros(4, 6, device=DEVICE)
    x[0, 1:] = -torch.inf
    x[1] = -torch.inf
    x[2, 3] = torch.inf
    x[3, 2] = torch.nan
    t = torch.tensor([0, 0, 3, 0], device=DEVICE)
    loss, _, _ = impl("cross_entropy")(x, t, None, 0, -100, 0.0)
    assert torch.equal(loss.nan_to_num(7), F.cross_entropy(x, t, reduction="none").nan_to_num(7))


def test_all_ignored_and_no_rows():
    x = torch.randn(4, 6, device=DEVICE)
    t = torch.full((4,), 2, device=DEVICE)
    loss, lse, norm = impl("cross_entropy")(x, t, None, 1, 2, 0.0)
    assert loss.isnan() and norm.item() == 0
    grad, _ = impl("cross_entropy_backward")(loss.new_ones(()), x, t, None, lse, norm, 1, 2, 0.0, [True, False])
    assert torch.equal(grad, torch.zeros_like(x))
    loss, lse, _ = impl("cross_entropy")(x[:0], t[:0], None, 1, -100, 0.0)
    assert loss.isnan() and lse.shape == (0,)
    assert impl("cross_entropy")(x[:0], t[:0], None, 2, -100, 0.0)[0].item() == 0
    assert impl("cross_entropy")(x[:0], t[:0], None, 0, -100, 0.0)[0].shape == (0,)


def test_target_out_of_range_is_nan_not_a_stray_read():
    x = torch.randn(3, 6, device=DEVICE)
    loss, _, _ = impl("cross_entropy")(x, torch.tensor([0, 6, -1], device=DEVICE), None, 0, -100, 0.0)
    assert loss.isnan().tolist() == [False, True, True]


def test_deterministic():
    x, t = torch.randn(500, 10, device=DEVICE), torch.randint(0, 10, (500,), device=DEVICE)
    first, again = (impl("cross_entropy")(x, t, None, 1, -100, 0.1)[0] for _ in range(2))
    assert torch.equal(first, again)
