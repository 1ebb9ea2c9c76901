"""cross_entropy: everything that F.cross_entropy takes, with its values, gradients and special cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from util import FLOATS, assert_close_2x, check, execute, same_bits

import fastconv.functional as FF

OP = "cross_entropy"
REDUCTION = pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
SHAPES = (
    (4, 10),
    (128, 10),
    (7, 1000),
    (3, 1),
    (1, 13),
    (5, 1009),
    (2, 6, 5),
    (2, 3, 4, 5),
    (2, 19, 3, 2, 2),
    (10,),
    (300, 3),
)


def make(shape, dtype=torch.float32, device="cpu", probabilities=False, weight=False) -> dict:
    c = shape[0] if len(shape) == 1 else shape[1]
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    dim = min(len(shape) - 1, 1)
    target = torch.randn(shape, device=device).softmax(dim).to(dtype)
    return {
        "input": (torch.randn(shape, device=device) * 3).to(dtype),
        "target": target if probabilities else torch.randint(c, rows, device=device),
        "weight": (torch.rand(c, device=device) + 0.1).to(dtype) if weight else None,
    }


@REDUCTION
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_indices(shape, dtype, reduction, backend):
    check(OP, make(shape, dtype, backend.device), {"reduction": reduction}, ("input",))
    check(
        OP,
        make(shape, dtype, backend.device, weight=True),
        {"reduction": reduction, "label_smoothing": 0.1},
        ("input",),
    )


@REDUCTION
@pytest.mark.parametrize("smoothing", (0.0, 0.2, 1.0))
@pytest.mark.parametrize("weight", (False, True), ids=("plain", "weighted"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_probabilities(shape, weight, smoothing, reduction, backend):
    tensors = make(shape, torch.float32, backend.device, True, weight)
    # p * sum(t) - t: the sum over up to 1009 classes and the exponential (its AVX2 version) each add an ulp to stock's.
    check(OP, tensors, {"reduction": reduction, "label_smoothing": smoothing}, ("input", "target"), slack=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("probabilities", (False, True), ids=("indices", "probabilities"))
def test_dtypes(probabilities, dtype, backend):
    if dtype is torch.float64 and not backend.fp64:
        pytest.skip("this backend leaves fp64 to aten")
    for shape in ((16, 10), (3, 7, 4)):
        tensors = make(shape, dtype, backend.device, probabilities, True)
        wanted = ("input", "target") if probabilities else ("input",)
        for reduction in ("mean", "none"):
            check(OP, tensors, {"label_smoothing": 0.1, "reduction": reduction}, wanted)


@REDUCTION
@pytest.mark.parametrize("smoothing", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("weight", (False, True), ids=("plain", "weighted"))
@pytest.mark.parametrize("ignore_index", (-100, 2, -1, 255))
def test_ignore_index(ignore_index, weight, smoothing, reduction, backend):
    tensors = make((9, 5), torch.float32, backend.device, weight=weight)
    tensors["target"][::3] = ignore_index
    settings = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    ours = check(OP, tensors, settings, ("input",))
    assert not ours.grads["input"][::3].any(), "ignored rows get no gradient"


@REDUCTION
def test_all_ignored(reduction, backend):
    """mean over nothing is NaN, as in stock PyTorch; sum and none are 0."""
    tensors = make((4, 5), torch.float32, backend.device)
    tensors["target"].fill_(-100)
    ours = check(OP, tensors, {"reduction": reduction}, ("input",))
    assert bool(ours.output.isnan().any()) is (reduction == "mean")


def test_uint8_targets(backend):
    tensors = make((9, 5), torch.float32, backend.device)
    tensors["target"] = tensors["target"].to(torch.uint8)
    check(OP, tensors, {"label_smoothing": 0.1}, ("input",))


@pytest.mark.parametrize("shift", (0.0, 1e3, -1e4, 1e30))
def test_large_logits(shift, backend):
    """exp of the logits overflows; the loss does not."""
    tensors = make((6, 11), torch.float32, backend.device)
    tensors["input"] = tensors["input"] * 10 + shift
    ours = check(OP, tensors, {"reduction": "none"}, ("input",))
    assert ours.output.isfinite().all()


def test_confident_rows(backend):
    """The loss of a sure and right row is tiny, positive and exact; its gradient p - 1 loses the digits of p."""
    x = torch.zeros(3, 4, device=backend.device)
    x[:, 1] = torch.tensor([5.0, 12.0, 40.0])
    tensors = {"input": x, "target": torch.ones(3, dtype=torch.int64, device=backend.device), "weight": None}
    ours = check(OP, tensors, {"reduction": "none"}, ("input",), {"grad of input": 4 * torch.finfo(torch.float32).eps})
    assert (ours.output >= 0).all() and ours.output[1] > 0


@REDUCTION
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("what", ("nan", "inf", "-inf", "all -inf", "-inf target"))
def test_nan_and_infinity_as_stock(what, smoothing, reduction, backend):
    tensors = make((5, 7), torch.float32, backend.device)
    x, t = tensors["input"], tensors["target"]
    t[2] = 3
    if what == "all -inf":
        x[2] = -float("inf")
    elif what == "-inf target":
        x[2, 3] = -float("inf")
    else:
        x[2, 4] = float(what)
    settings = {"reduction": reduction, "label_smoothing": smoothing}
    grad = torch.ones(5 if reduction == "none" else (), device=backend.device)
    ours = execute(FF.cross_entropy, tensors, settings, ("input",), grad)
    stock = execute(F.cross_entropy, tensors, settings, ("input",), grad)
    torch.testing.assert_close(ours.output, stock.output, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ours.grads["input"], stock.grads["input"], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_zero_weight_hides_an_infinite_logit_as_in_stock(backend):
    tensors = make((5, 4), torch.float32, backend.device, weight=True)
    tensors["weight"][1] = 0
    tensors["target"][:] = torch.tensor([0, 1, 2, 3, 1])
    check(OP, tensors, {"label_smoothing": 0.1}, ("input",))
    check(OP, {**tensors, "target": torch.ones_like(tensors["target"])}, {}, ("input",))  # weights sum to 0


@REDUCTION
@pytest.mark.parametrize("probabilities", (False, True), ids=("indices", "probabilities"))
def test_empty_batch(probabilities, reduction, backend):
    tensors = make((0, 5), torch.float32, backend.device, probabilities)
    ours = check(OP, tensors, {"reduction": reduction}, ("input",))
    assert ours.grads["input"].shape == (0, 5)


@REDUCTION
@pytest.mark.parametrize("probabilities", (False, True), ids=("indices", "probabilities"))
def test_layouts(probabilities, reduction, backend):
    """Strided rows, transposed logits, channels_last maps, expanded rows and strided targets."""
    device = backend.device
    base = make((6, 5, 4, 3), torch.float32, device, probabilities, True)
    views = [
        base["input"].contiguous(memory_format=torch.channels_last),
        torch.randn(12, 10, 8, 6, device=device)[::2, ::2, ::2, ::2],
        torch.randn(3, 4, 5, 6, device=device).permute(3, 2, 1, 0),
        base["input"][:1].expand(6, 5, 4, 3),
    ]
    for x in views:
        check(OP, {**base, "input": x}, {"reduction": reduction}, ("input",))
    target = torch.stack((base["target"], base["target"]), -1)[..., 0]
    weight = torch.stack((base["weight"], base["weight"]), -1)[..., 0]
    check(OP, {**base, "target": target, "weight": weight}, {"reduction": reduction}, ("input",))
    flat = make((6, 5), torch.float32, device, probabilities)
    check(OP, {**flat, "input": torch.randn(5, 6, device=device).t()}, {"reduction": reduction}, ("input",))


def test_grad_layout_is_the_inputs(backend):
    x = torch.randn(2, 5, 4, 3, device=backend.device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(5, (2, 4, 3), device=backend.device)
    grads = execute(FF.cross_entropy, {"input": x, "target": target}, {}, ("input",)).grads
    if backend.fused:
        assert grads["input"].stride() == x.stride()


def test_grad_output_layouts(backend):
    """reduction none: one upstream gradient per row, of any strides."""
    tensors = make((6, 5, 4, 3), torch.float32, backend.device)
    for layout in (lambda g: g[:1].expand_as(g), lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
                   lambda g: torch.stack((g, g), -1)[..., 0]):  # fmt: skip
        check(OP, tensors, {"reduction": "none"}, ("input",), shape_grad=layout)


@pytest.mark.parametrize("factor", (0.0, 65536.0, -2.0))
def test_scaled_loss(factor, backend):
    """Loss scaling reaches the gradient (GradScaler multiplies the loss by 65536)."""
    x = torch.randn(8, 10, device=backend.device, requires_grad=True)
    t = torch.randint(10, (8,), device=backend.device)
    (grad,) = torch.autograd.grad(FF.cross_entropy(x, t) * factor, x)
    (stock,) = torch.autograd.grad(F.cross_entropy(x, t) * factor, x)
    torch.testing.assert_close(grad, stock, rtol=1e-5, atol=1e-6 * abs(factor))


@REDUCTION
@pytest.mark.parametrize("weight", (False, True), ids=("plain", "weighted"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("probabilities", (False, True), ids=("indices", "probabilities"))
def test_gradcheck(probabilities, smoothing, weight, reduction, backend):
    if not backend.fp64:
        pytest.skip("gradcheck needs fp64, which this backend leaves to aten")
    tensors = make((3, 4, 2), torch.float64, "cpu", probabilities, weight)
    if not probabilities:
        tensors["target"][0, 0] = -100
    names = ("input", "target") if probabilities else ("input",)
    inputs = [tensors[n].requires_grad_() for n in names]

    def call(*args):
        named = {**tensors, **dict(zip(names, args, strict=True))}
        return FF.cross_entropy(**named, reduction=reduction, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", (("input",), ("target",)), ids=str)
def test_gradients_only_where_asked(wanted, backend):
    tensors = make((6, 5), torch.float32, backend.device, True)
    full = execute(FF.cross_entropy, tensors, {}, ("input", "target"))
    some = execute(FF.cross_entropy, tensors, {}, wanted)
    assert same_bits(full.grads[wanted[0]], some.grads[wanted[0]])


def test_class_weight_with_a_gradient_as_stock():
    """Stock PyTorch differentiates class weights for probability targets and refuses to for class indices."""
    tensors = make((6, 5), torch.float64, "cpu", True, True)
    weight = tensors["weight"].requires_grad_()
    (ours,) = torch.autograd.grad(FF.cross_entropy(**tensors), weight)
    (stock,) = torch.autograd.grad(F.cross_entropy(**tensors), weight)
    torch.testing.assert_close(ours, stock)
    tensors["target"] = torch.randint(5, (6,))
    for call in (F.cross_entropy, FF.cross_entropy):
        with pytest.raises(RuntimeError, match="weight"):
            call(**tensors)


def test_mixed_dtypes_as_stock():
    """Half logits with float32 class weights or targets: as stock, result or exception."""
    tensors = make((6, 5), torch.float32, "cpu", weight=True)
    half = tensors["input"].bfloat16()
    for target in (tensors["target"], torch.randn(6, 5).softmax(1)):
        results = []
        for call in (FF.cross_entropy, F.cross_entropy):
            try:
                out = call(half, target, tensors["weight"])
                results.append((out.dtype, round(out.item(), 4)))
            except Exception as error:  # noqa: BLE001
                results.append(type(error))
        assert results[0] == results[1]


def test_legacy_reduction_arguments(backend):
    tensors = make((6, 5), torch.float32, backend.device)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        assert same_bits(FF.cross_entropy(**tensors, size_average=False), FF.cross_entropy(**tensors, reduction="sum"))
    with pytest.warns(UserWarning, match="size_average and reduce"):
        assert FF.cross_entropy(**tensors, reduce=False).shape == (6,)


@pytest.mark.parametrize("target", (5, -1, 1000, -101))
def test_class_index_out_of_range(target, backend):
    if backend.name not in ("aten", "cpu"):
        pytest.skip("on a GPU this is a device-side assertion, as in stock PyTorch")
    tensors = make((6, 5), torch.float32, "cpu")
    tensors["target"][3] = target
    with pytest.raises(IndexError) as stock:
        F.cross_entropy(**tensors)
    with pytest.raises(IndexError, match=str(target)) as ours:
        FF.cross_entropy(**tensors)
    assert type(ours.value) is type(stock.value)


def test_deterministic_and_thread_independent(backend):
    tensors = make((257, 33), torch.float32, backend.device)
    runs = [execute(FF.cross_entropy, tensors, {}, ("input",)) for _ in range(3)]
    if backend.name == "cpu":
        torch.set_num_threads(1)
        runs.append(execute(FF.cross_entropy, tensors, {}, ("input",)))
    for run in runs[1:]:
        assert_close_2x("loss", run.output, runs[0].output, runs[0].output.double())
        assert same_bits(run.grads["input"], runs[0].grads["input"])
    assert same_bits(runs[0].output, runs[1].output) and same_bits(runs[0].output, runs[2].output)


def test_many_rows_accumulate_accurately(backend):
    """The sum over 50,000 rows is not left to one running float32 sum."""
    tensors = make((50_000, 3), torch.float32, backend.device)
    check(OP, tensors, {"reduction": "sum"})
    check(OP, tensors, {"reduction": "mean"})


def test_double_backward(backend):
    tensors = make((6, 5), torch.float32, backend.device)
    x = tensors["input"].requires_grad_()
    (grad,) = torch.autograd.grad(FF.cross_entropy(**tensors), x, create_graph=True)
    if backend.fused:
        with pytest.raises(RuntimeError, match="is differentiable once: .*use_backend"):
            grad.square().sum().backward()
    else:
        grad.square().sum().backward()
        assert x.grad.abs().sum() > 0
