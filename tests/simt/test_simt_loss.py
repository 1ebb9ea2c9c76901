"""Cross-entropy kernels in the emulator, against torch.nn.functional.cross_entropy in fp64."""

import ctypes

import pytest
import simt_lib
import torch
import torch.nn.functional as F
from simt_lib import DTYPES, assert_close, library, pointer, tolerance

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))

ALL = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "mean", "sum"]


class LossCall(ctypes.Structure):
    _fields_ = [
        (f, ctypes.c_void_p)
        for f in [
            "input",
            "target",
            "target_u8",
            "probabilities",
            "grad_loss",
            "weight",
            "loss",
            "grad_input",
            "grad_probabilities",
            "lse",
            "normalizer",
            "part_loss",
            "part_weight",
        ]
    ]
    _fields_ += [(f, ctypes.c_int64) for f in ["rows", "stride_n", "stride_c", "stride_d", "ignore_index"]]
    _fields_ += [(f, ctypes.c_int) for f in ["classes", "d", "reduction", "dtype"]] + [("smoothing", ctypes.c_float)]


def cross_entropy(
    x, target, *, weight=None, reduction="mean", ignore_index=-100, smoothing=0.0, grad_loss=None, seed=0
):
    """x [n, classes, d] of any dense layout; returns loss, lse, normalizer, grad_input, grad_target.

    Class indices and the gradient of the losses end where mapped memory ends: idle threads must not read them."""
    lib = library("loss")
    if not target.is_floating_point():
        target = simt_lib.guarded(target)
    n, classes, d = x.shape
    soft = target.is_floating_point()
    loss = torch.full((n, d) if reduction == "none" else (), float("nan"), dtype=x.dtype)
    lse, normalizer = torch.full((n, d), float("nan")), torch.full((), float("nan"))
    grad_x = torch.empty_like(x).fill_(float("nan"))
    grad_t = torch.empty_like(x).fill_(float("nan")) if soft else None
    call = LossCall(
        input=pointer(x),
        weight=pointer(weight),
        loss=pointer(loss),
        lse=pointer(lse),
        normalizer=pointer(normalizer),
        grad_input=pointer(grad_x),
        grad_probabilities=pointer(grad_t),
    )
    if soft:
        assert target.stride() == x.stride()
        call.probabilities = pointer(target)
    elif target.dtype == torch.uint8:
        call.target_u8 = pointer(target)
    else:
        call.target = pointer(target)
    call.rows, call.classes, call.d = n * d, classes, d
    call.stride_n, call.stride_c, call.stride_d = x.stride()
    call.ignore_index, call.smoothing = ignore_index, smoothing
    call.reduction, call.dtype = REDUCTIONS.index(reduction), DTYPES[x.dtype]
    blocks_of = lib.lib.simt_loss_blocks
    blocks_of.restype = ctypes.c_int64
    parts = [torch.full((blocks_of(ctypes.byref(call)),), float("nan")) for _ in range(2)]
    call.part_loss, call.part_weight = map(pointer, parts)
    lib.call("simt_loss", ctypes.byref(call), 0, seed=seed)
    grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss
    guarded = simt_lib.guarded(grad_loss)
    call.grad_loss = pointer(guarded)
    lib.call("simt_loss", ctypes.byref(call), 1, seed=seed)
    return loss, lse, normalizer, grad_x, grad_t


def layout(t, channels_last):
    """[n, classes, d] with classes, or d, innermost."""
    return t.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else t.contiguous()


def check(x, target, dtype, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    leaf = x.double().requires_grad_()
    soft = target.is_floating_point()
    target_leaf = target.double().requires_grad_() if soft else target.long()
    weight = options.get("weight")
    want = F.cross_entropy(
        leaf,
        target_leaf,
        None if weight is None else weight.double(),
        ignore_index=options.get("ignore_index", -100),
        reduction=options.get("reduction", "mean"),
        label_smoothing=options.get("smoothing", 0.0),
    )
    grad_loss = torch.randn(want.shape, generator=generator).to(dtype) + 2
    want.backward(grad_loss.double())
    loss, lse, normalizer, grad_x, grad_t = cross_entropy(x, target, grad_loss=grad_loss, seed=seed, **options)
    rel = max(tolerance(dtype), 1e-5)
    assert_close(loss, want.detach(), rel, 2e-5)
    assert_close(lse, torch.logsumexp(x.double(), 1), 1e-5, 1e-5)
    assert_close(grad_x, leaf.grad, rel, 5e-6)
    if soft:
        assert normalizer.item() == x.shape[0] * x.shape[2]
        assert_close(grad_t, target_leaf.grad, rel, 1e-5)
    return normalizer


# n, classes, d, channels_last: one thread, a warp and a block per row; rows that do and do not fill blocks
SHAPES = [
    (300, 10, 1, False),
    (5, 2, 1, False),
    (9, 100, 1, False),
    (9, 1000, 1, False),
    (2, 5003, 1, False),
    (2, 8192, 1, False),
    (2, 20, 33, False),
    (2, 40, 7, True),
    (3, 1, 2, False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_indices(shape, reduction, smoothing, weighted):
    n, classes, d, last = shape
    generator = torch.Generator().manual_seed(n + classes)
    weight = torch.rand(classes, generator=generator) + 0.5 if weighted else None
    for seed, dtype in enumerate(ALL if classes < 4000 else [torch.bfloat16]):
        x = layout((torch.randn(n, classes, d, generator=generator) * 4).to(dtype), last)
        target = torch.randint(0, classes, (n, d), generator=generator)
        if n * d > 2:
            target[0, 0] = target[-1, -1] = -100
        normalizer = check(x, target, dtype, seed=seed, weight=weight, reduction=reduction, smoothing=smoothing)
        kept = target[target >= 0]
        assert_close(normalizer, (weight.double()[kept].sum() if weighted else torch.tensor(float(len(kept)))), 1e-5, 0)


@pytest.mark.parametrize(
    "shape", [(40, 10, 1, False), (3, 300, 1, False), (2, 4200, 1, False), (2, 12, 9, False), (2, 64, 4, True)]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities(shape, reduction, smoothing):
    n, classes, d, last = shape
    generator = torch.Generator().manual_seed(4)
    for seed, dtype in enumerate(ALL if classes < 4000 else [torch.float32]):
        x = layout((torch.randn(n, classes, d, generator=generator) * 3).to(dtype), last)
        target = layout(torch.rand(n, classes, d, generator=generator).softmax(1).to(dtype), last)
        weight = torch.rand(classes, generator=generator) + 0.5 if seed != 1 else None
        check(x, target, dtype, seed=seed, weight=weight, reduction=reduction, smoothing=smoothing)


def test_bytes_and_other_ignore_index():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20, 7, 1, generator=generator)
    target = torch.randint(0, 7, (20, 1), generator=generator)
    check(x, target.to(torch.uint8), torch.float32, ignore_index=3)
    check(x, target, torch.float32, ignore_index=3, reduction="none")


def test_all_ignored_mean_is_nan():
    x, target = torch.randn(4, 5, 1), torch.full((4, 1), -100)
    loss, _, normalizer, grad, _ = cross_entropy(x, target)
    assert torch.isnan(loss) and normalizer == 0 and torch.equal(grad, torch.zeros_like(grad))
    assert cross_entropy(x, target, reduction="sum")[0] == 0


def test_bad_target_is_nan_and_no_address():
    x = torch.randn(3, 5, 1)
    loss, _, _, grad, _ = cross_entropy(x, torch.tensor([[1], [10**9], [-7]]), reduction="none")
    assert not torch.isnan(loss[0]) and torch.isnan(loss[1:]).all()
    assert not torch.isnan(grad[0]).any() and torch.isnan(grad[1:]).all()


def test_extreme_logits():
    x = torch.tensor(
        [[3e4, -3e4, 0.0], [float("-inf"), 1.0, 2.0], [float("nan"), 1.0, 2.0], [float("inf"), 1.0, 2.0]]
    ).view(4, 3, 1)
    target = torch.tensor([[0], [2], [1], [1]])
    loss = cross_entropy(x, target, reduction="none")[0]
    assert_close(loss, F.cross_entropy(x.double(), target, reduction="none"), 1e-5)
    big = torch.full((1, 40, 1), -1e4)
    big[0, 17] = 1e4
    assert cross_entropy(big, torch.tensor([[17]]))[0] == 0


def layout_unaligned(t):
    """The same values, one element into their memory."""
    out = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride())
    return out.copy_(t)


def test_unaligned_rows():
    generator = torch.Generator().manual_seed(7)
    x = layout_unaligned(torch.randn(9, 96, 1, generator=generator).bfloat16())
    check(x, torch.randint(0, 96, (9, 1), generator=generator), torch.bfloat16)
    check(x, layout_unaligned(torch.rand(9, 96, 1, generator=generator).softmax(1).bfloat16()), torch.bfloat16)


@pytest.mark.parametrize("classes", [10, 100, 5000])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_large_logits_lose_no_digits(classes, smoothing):
    """Logits about 30000: neither the loss nor its gradient may go through an lse rounded to fp32."""
    generator = torch.Generator().manual_seed(classes)
    x = torch.randn(3, classes, 1, generator=generator) + 30000
    target = torch.randint(0, classes, (3, 1), generator=generator)
    leaf = x.double().requires_grad_()
    want = F.cross_entropy(leaf, target, label_smoothing=smoothing)
    want.backward()
    loss, _, _, grad, _ = cross_entropy(x, target, smoothing=smoothing)
    assert_close(loss, want.detach(), 1e-5, 1e-5)
    assert_close(grad, leaf.grad, 1e-5, 1e-7)
    soft = torch.rand(3, classes, 1, generator=generator).softmax(1)
    loss = cross_entropy(x, soft, smoothing=smoothing)[0]
    assert_close(loss, F.cross_entropy(x.double(), soft.double(), label_smoothing=smoothing), 1e-5, 1e-5)


@pytest.mark.parametrize("classes", [10, 100, 5000])
def test_infinite_logits(classes):
    """-inf for most classes, the first ones too; for all of them; one +inf: results and gradients as PyTorch's."""
    x = torch.full((3, classes, 1), float("-inf"))
    x[0, 4], x[0, classes - 1] = 1.0, 2.0
    x[2] = torch.linspace(-1, 1, classes).view(-1, 1)
    x[2, 7] = float("inf")
    target = torch.tensor([[4], [4], [4]])
    for smoothing in (0.0, 0.1):
        leaf = x.double().requires_grad_()
        want = F.cross_entropy(leaf, target, reduction="none", label_smoothing=smoothing)
        want.sum().backward()
        loss, lse, _, grad, _ = cross_entropy(x, target, reduction="none", smoothing=smoothing)
        assert torch.isnan(lse[2]).all()  # as log_softmax: the backward must not take it for a number
        finite = ~torch.isinf(want)
        assert torch.equal(torch.isinf(loss), ~finite)
        assert_close(loss[finite], want.detach()[finite], 1e-5, 1e-5)
        assert_close(grad[0], leaf.grad[0], 1e-5, 1e-6)
        assert torch.isnan(grad[2]).all() and torch.isnan(leaf.grad[2]).all()


def test_schedules():
    x = torch.randn(50, 40, 1, generator=torch.Generator().manual_seed(6))
    target = torch.arange(50).view(50, 1) % 40
    first = cross_entropy(x, target, smoothing=0.1)
    for seed in range(1, 5):
        again = cross_entropy(x, target, smoothing=0.1, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
