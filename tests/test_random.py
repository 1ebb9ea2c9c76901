"""Random geometry, layout and dtype against the oracle (hypothesis; derandomised, so every run tries the same)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Conv, lay
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from util import ACTIVATIONS, check

BOUNDS = settings(max_examples=60, derandomize=True, deadline=None, database=None,
                  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def pair(lowest, highest):
    return st.tuples(st.integers(lowest, highest), st.integers(lowest, highest))


def reads_data_everywhere(size, kernel, stride, padding, dilation):
    """Whether every output position of one axis has a filter tap on the input."""
    last = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride
    taps = range(0, dilation * kernel, dilation)
    return all(any(0 <= p * stride - padding + t < size for t in taps) for p in range(last + 1))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    kernel, dilation, padding, stride = draw(pair(1, 5)), draw(pair(1, 2)), draw(pair(0, 3)), draw(pair(1, 4))
    # The dilation of a filter of one means nothing, but oneDNN 3.10 (channels_last, with a bias) crashes on some.
    dilation = tuple(d if k > 1 else 1 for d, k in zip(dilation, kernel, strict=True))
    h, w = draw(pair(1, 9))
    assume(all(s + 2 * p >= d * (k - 1) + 1 for s, p, d, k in zip((h, w), padding, dilation, kernel, strict=True)))
    # oneDNN 3.10 (channels_last) also crashes where a dilated filter reads padding alone at some position; ours does not
    # (test_conv2d_bias_act.py), but stock has to run here to be compared with.
    if max(dilation) > 1:
        assume(all(map(reads_data_everywhere, (h, w), kernel, stride, padding, dilation)))
    return Conv(
        "random", draw(st.integers(1, 4)), groups * draw(st.integers(1, 9)), h, w, groups * draw(st.integers(1, 11)),
        kernel, stride, padding, dilation, groups, draw(st.sampled_from(LAYOUTS)), draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip


def stock_is_defined(case, dtype):
    """False where stock's bf16 forward multiplies memory that nobody wrote, on AMX (test_tiles.py)."""
    span = case.w + 2 * case.padding[1] - case.dilation[1] * (case.kernel[1] - 1) - 1
    return dtype is not torch.bfloat16 or case.stride[1] == 1 or case.kernel[1] == 1 or span >= case.stride[1]


def sums_room(dtype, count, size=1.0):
    """Absolute tolerance of a sum over ``count`` terms of about ``size``, each rounded to ``dtype``."""
    return 2 * torch.finfo(dtype).eps * size * count**0.5


@given(case=convolutions(), dtype=DTYPES, activation=st.sampled_from(ACTIVATIONS), seed=st.integers(0, 9))
@BOUNDS
def test_conv2d_bias_act(backend, case, dtype, activation, seed):
    if dtype is torch.float64 and not backend.fp64:
        dtype = torch.float32
    assume(stock_is_defined(case, dtype))
    torch.manual_seed(seed)
    tensors = case.tensors(dtype, backend.device)
    wanted = [n for n, t in tensors.items() if t is not None]
    count = case.n * case.h * case.w * 9
    room = {f"grad of {n}": sums_room(dtype, count) for n in ("weight", "bias")}
    room["grad of input"] = sums_room(dtype, case.k)
    check("conv2d_bias_act", tensors, {**case.geometry, "activation": activation}, wanted, room)


@given(
    case=convolutions(),
    dtype=DTYPES,
    activation=st.sampled_from(ACTIVATIONS),
    training=st.booleans(),
    seed=st.integers(0, 9),
)
@BOUNDS
def test_conv2d_bn_act(backend, case, dtype, activation, training, seed):
    if dtype is torch.float64 and not backend.fp64:
        dtype = torch.float32
    assume(stock_is_defined(case, dtype))
    torch.manual_seed(seed)
    tensors = case.tensors(dtype, backend.device)
    out = torch.nn.functional.conv2d(tensors["input"].to("meta"), tensors["weight"].to("meta"), None, **case.geometry)
    count = out.numel() // case.k
    # Few samples per channel make 1 / std, and with it every error, as large as it likes.
    assume(not training or count >= 8)
    # One sample among zeros has a gradient of zero, but for epsilon: nothing is left of the terms that cancel.
    axes = ((case.h, case.w), case.kernel, case.stride, case.padding, case.dilation)
    assume(not training or all(map(reads_data_everywhere, *axes)))
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    tensors |= {
        "running_mean": torch.randn(case.k, device=backend.device).to(acc),
        "running_var": torch.rand(case.k, device=backend.device).to(acc) + 0.5,
        "bn_weight": torch.rand(case.k, device=backend.device).to(acc) + 0.5,
        "bn_bias": torch.randn(case.k, device=backend.device).to(acc),
    }
    wanted = [n for n, t in tensors.items() if t is not None and not n.startswith("running")]
    room = {f"grad of {n}": sums_room(dtype, count, 4) for n in ("weight", "bias", "bn_weight", "bn_bias")}
    if training and dtype is torch.float32:
        # Zero, but for the rounding of what all samples share (statistics, sums), which does not average out.
        room["grad of bias"] = sums_room(dtype, count * count, 4)
    # The batch's own statistics amplify by 1 / std, and an output row that is mostly padding has a small one.
    room["grad of input"] = sums_room(dtype, case.k, 2 if dtype.itemsize == 2 else 16)
    room |= {
        "running_mean": torch.finfo(dtype).eps,
        "running_var": torch.finfo(dtype).eps,
        "output": 4 * torch.finfo(dtype).eps,
    }
    settings_ = {**case.geometry, "activation": activation, "training": training}
    check("conv2d_bn_act", tensors, settings_, wanted, room)


@given(
    op=st.sampled_from(("max_pool2d", "avg_pool2d")), shape=st.tuples(*[st.integers(1, n) for n in (3, 20, 11, 11)]),
    kernel=pair(1, 5), stride=pair(1, 4), padding=pair(0, 2), dilation=pair(1, 3), ceil_mode=st.booleans(),
    include=st.booleans(), layout=st.sampled_from(LAYOUTS), dtype=DTYPES, seed=st.integers(0, 9),
)  # fmt: skip
@BOUNDS
def test_pools(backend, op, shape, kernel, stride, padding, dilation, ceil_mode, include, layout, dtype, seed):
    if dtype is torch.float64 and not backend.fp64:
        dtype = torch.float32
    dilation = dilation if op == "max_pool2d" else (1, 1)
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(s + 2 * p >= span for s, p, span in zip(shape[2:], padding, spans, strict=True)))
    if op == "max_pool2d":
        # A window that lies in the padding alone (dilation > 1): stock's backward writes outside the gradient there.
        assume(F.max_pool2d(torch.zeros(shape), kernel, stride, padding, dilation, ceil_mode).isfinite().all())
    torch.manual_seed(seed)
    x = lay(torch.randn(shape, device=backend.device).to(dtype), layout)
    more = {"dilation": dilation} if op == "max_pool2d" else {"count_include_pad": include}
    check(op, {"input": x}, {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode, **more}, ("input",),
          {"grad of input": 2 * torch.finfo(dtype).eps})  # fmt: skip


@given(
    shape=st.tuples(*[st.integers(1, n) for n in (3, 20, 9, 9)]),
    size=pair(1, 11),
    layout=st.sampled_from(LAYOUTS),
    dtype=DTYPES,
)
@BOUNDS
def test_adaptive_avg_pool2d(backend, shape, size, layout, dtype):
    if dtype is torch.float64 and not backend.fp64:
        dtype = torch.float32
    torch.manual_seed(0)
    x = lay(torch.randn(shape, device=backend.device).to(dtype), layout)
    check(
        "adaptive_avg_pool2d",
        {"input": x},
        {"output_size": size},
        ("input",),
        {"grad of input": 4 * torch.finfo(dtype).eps},
    )


@given(
    n=st.integers(1, 40), c=st.integers(1, 70), spatial=st.lists(st.integers(1, 4), max_size=2), dtype=DTYPES,
    probabilities=st.booleans(), weighted=st.booleans(), reduction=st.sampled_from(("mean", "sum", "none")),
    smoothing=st.sampled_from((0.0, 0.1, 0.9)), ignored=st.booleans(), spread=st.sampled_from((0.01, 3.0, 40.0)), seed=st.integers(0, 9),
)  # fmt: skip
@BOUNDS
def test_cross_entropy(
    backend, n, c, spatial, dtype, probabilities, weighted, reduction, smoothing, ignored, spread, seed
):
    if dtype is torch.float64 and not backend.fp64:
        dtype = torch.float32
    torch.manual_seed(seed)
    device = backend.device
    x = (torch.randn(n, c, *spatial, device=device) * spread).to(dtype)
    target = torch.randint(c, (n, *spatial), device=device)
    if ignored:
        target[::2] = -100
    if probabilities:
        target = torch.randn(x.shape, device=device).softmax(1).to(dtype)
    weight = (torch.rand(c, device=device) + 0.1).to(dtype) if weighted else None
    settings_ = {"reduction": reduction, "label_smoothing": smoothing}
    # The gradient p - t of a sure row is a difference of near-equal numbers.
    room = {"grad of input": 4 * torch.finfo(dtype).eps / (x.numel() / c if reduction == "mean" else 1)}
    check("cross_entropy", {"input": x, "target": target, "weight": weight}, settings_, ("input",), room)
