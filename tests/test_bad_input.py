"""Misuse: each raises the exception type of stock PyTorch's own operator, with a text that names operator and argument.

Stock is called in the test with the same wrong arguments, so that a change in PyTorch shows here.
"""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F

import fastconv.functional as FF

X = torch.randn(2, 4, 6, 6)
W = torch.randn(8, 4, 3, 3)
B = torch.randn(8)
MEAN, VAR = torch.zeros(4), torch.ones(4)
LOGITS, LABELS = torch.randn(6, 5), torch.randint(5, (6,))

# name, the arguments, the text. Called as F.conv2d(*args, **kwargs) and FF.conv2d_bias_act(*args, **kwargs).
CONV = (
    ("input_not_a_tensor", ([1.0], W), {}, "input expected Tensor, got list"),
    ("weight_not_a_tensor", (X, None), {}, "weight expected Tensor, got NoneType"),
    ("bias_not_a_tensor", (X, W, 1.0), {}, "bias expected Tensor or None, got float"),
    ("input_of_2_dimensions", (X[0, 0], W), {}, r"input expected 3 or 4 dimensions.*\[6, 6\]"),
    ("input_of_5_dimensions", (X[None], W), {}, r"input expected 3 or 4 dimensions.*\[1, 2, 4, 6, 6\]"),
    ("weight_of_3_dimensions", (X, W[0]), {}, r"weight expected 4 dimensions.*\[4, 3, 3\]"),
    ("channels", (X, W[:, :3]), {}, r"weight has 3 input channels per group, input has 4 \(groups=1\)"),
    ("channels_of_groups", (X, W), {"groups": 2}, r"weight has 4 input channels per group, input has 4 \(groups=2\)"),
    ("groups_do_not_divide", (X, W[:7, :2]), {"groups": 2}, "weight expected K divisible by groups=2"),
    ("groups_zero", (X, W), {"groups": 0}, "groups expected >= 1, got 0"),
    ("groups_negative", (X, W), {"groups": -1}, "groups expected >= 1, got -1"),
    ("bias_too_long", (X, W, torch.randn(9)), {}, r"bias expected shape \[8\], got \[9\]"),
    ("bias_of_2_dimensions", (X, W, torch.randn(8, 1)), {}, r"bias expected shape \[8\], got \[8, 1\]"),
    ("weight_dtype", (X, W.double()), {}, "weight expected dtype torch.float32 like input, got torch.float64"),
    ("bias_dtype", (X, W, B.half()), {}, "bias expected dtype torch.float32 like input, got torch.float16"),
    ("stride_zero", (X, W), {"stride": 0}, r"stride expected values >= 1, got \(0, 0\)"),
    ("stride_negative", (X, W), {"stride": (1, -1)}, r"stride expected values >= 1, got \(1, -1\)"),
    ("stride_float", (X, W), {"stride": 1.5}, "stride expected an int or a tuple of 2 ints, got 1.5"),
    ("stride_of_3", (X, W), {"stride": (1, 1, 1)}, r"stride.*\(1, 1, 1\)"),
    ("padding_negative", (X, W), {"padding": -1}, r"padding expected values >= 0, got \(-1, -1\)"),
    ("padding_of_3", (X, W), {"padding": (1, 1, 1)}, r"padding.*\(1, 1, 1\)"),
    ("padding_unknown", (X, W), {"padding": "full"}, "padding expected int, tuple, 'same' or 'valid', got 'full'"),
    ("same_with_stride", (X, W), {"padding": "same", "stride": 2}, "padding='same' expected stride 1"),
    ("dilation_zero", (X, W), {"dilation": 0}, r"dilation expected values >= 1, got \(0, 0\)"),
    ("kernel_too_large", (X, torch.randn(8, 4, 7, 3)), {}, "weight's height 7 .*expected to fit the padded input, got input height 6"),
    ("dilated_kernel_too_large", (X, W), {"dilation": (1, 3)}, "weight's width 3 with dilation 3"),
    ("empty_kernel", (X, torch.randn(8, 4, 0, 3)), {}, "weight's height 0"),
    ("stride_text", (X, W), {"stride": "a"}, "stride expected an int or a tuple of 2 ints, got 'a'"),
    ("stride_bool", (X, W), {"stride": True}, "stride expected an int or a tuple of 2 ints, got True"),
    ("groups_float", (X, W), {"groups": 1.0}, "groups expected an int, got 1.0"),
)  # fmt: skip


def raises_alike(ours, stock, text):
    """Both raise, the types are equal, ours says ``text``."""
    with pytest.raises(Exception) as theirs:
        stock()
    with pytest.raises(type(theirs.value), match=text or None) as mine:
        ours()
    assert type(mine.value) is type(theirs.value), f"{type(mine.value)}, stock {type(theirs.value)}: {theirs.value}"


@pytest.mark.parametrize(("args", "kwargs", "text"), [c[1:] for c in CONV], ids=[c[0] for c in CONV])
def test_convolution(args, kwargs, text, backend):
    raises_alike(
        lambda: FF.conv2d_bias_act(*args, **kwargs), lambda: F.conv2d(*args, **kwargs), f"conv2d_bias_act: {text}"
    )


@pytest.mark.parametrize(("args", "kwargs", "text"), [c[1:] for c in CONV], ids=[c[0] for c in CONV])
def test_convolution_before_batch_norm(args, kwargs, text):
    args = (*args, None)[:3]
    norm = (torch.zeros(8), torch.ones(8), None, None)
    raises_alike(
        lambda: FF.conv2d_bn_act(*args, *norm, **kwargs), lambda: F.conv2d(*args, **kwargs), f"conv2d_bn_act: {text}"
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    (
        ({"activation": "swish"}, ValueError, "activation expected one of identity, relu.*; got 'swish'"),
        ({"activation": None}, ValueError, "activation expected one of .*; got None"),
        ({"activation": torch.relu}, ValueError, "activation expected one of"),
        ({"activation": ["relu"]}, ValueError, "activation expected one of"),
        ({"residual": 1.0}, TypeError, "residual expected Tensor or None, got float"),
        (
            {"residual": torch.randn(2, 8, 6, 6)},
            RuntimeError,
            r"residual expected the output's shape \[2, 8, 4, 4\], got \[2, 8, 6, 6\]",
        ),
        ({"residual": torch.randn(8, 1, 1)}, RuntimeError, "residual expected the output's shape"),
        (
            {"residual": torch.randn(2, 8, 4, 4).half()},
            RuntimeError,
            "residual expected dtype torch.float32 like input",
        ),
        ({"weight": W.to("meta")}, RuntimeError, "weight expected on cpu like input, got meta"),
        (
            {"residual": torch.randn(2, 8, 4, 4, device="meta")},
            RuntimeError,
            "residual expected on cpu like input, got meta",
        ),
    ),
    ids=str,
)
def test_what_stock_does_not_have(kwargs, error, text, backend):
    with pytest.raises(error, match=f"conv2d_bias_act: {text}"):
        FF.conv2d_bias_act(X, **{"weight": W, **kwargs})
    with pytest.raises(error, match=f"conv2d_bn_act: {text}"):
        call = {"weight": W, "bias": None, "running_mean": torch.zeros(8), "running_var": torch.ones(8), **kwargs}
        FF.conv2d_bn_act(X, bn_weight=None, bn_bias=None, **call)


NORM = (
    ("input_not_a_tensor", (None, MEAN, VAR), {}, "input expected Tensor, got NoneType"),
    ("one_value_per_channel", (X[:1, :, :1, :1], MEAN, VAR, None, None, True), {}, r"Expected more than 1 value per channel.*\[1, 4, 1, 1\]"),
    ("no_statistics_in_evaluation", (X, None, None), {}, "running_mean expected in evaluation mode"),
    ("mean_too_long", (X, torch.zeros(5), VAR), {}, r"running_mean expected shape \[4\], got \[5\]"),
    ("var_too_long", (X, MEAN, torch.ones(5)), {}, r"running_var expected shape \[4\], got \[5\]"),
    ("weight_too_long", (X, MEAN, VAR, torch.ones(5)), {}, r"weight expected shape \[4\], got \[5\]"),
    ("bias_too_long", (X, MEAN, VAR, None, torch.ones(5)), {}, r"bias expected shape \[4\], got \[5\]"),
    ("eps_zero", (X, MEAN, VAR), {"eps": 0.0}, "eps .*positive.*0.0"),
    ("eps_negative", (X, MEAN, VAR, None, None, True), {"eps": -1e-3}, "eps .*positive.*-0.001"),
)  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "text"), [c[1:] for c in NORM], ids=[c[0] for c in NORM])
def test_batch_norm(args, kwargs, text, backend):
    raises_alike(
        lambda: FF.batch_norm_act(*args, **kwargs), lambda: F.batch_norm(*args, **kwargs), f"batch_norm_act: {text}"
    )


def test_batch_norm_input_of_1_dimension(backend):
    with pytest.raises(RuntimeError, match=r"batch_norm_act: input expected at least 2 dimensions.*\[4\]"):
        FF.batch_norm_act(torch.randn(4), MEAN, VAR)


def test_batch_norm_with_half_of_the_statistics(backend):
    for args in ((X, MEAN, None), (X, None, VAR)):
        with pytest.raises(RuntimeError, match="batch_norm_act: running_mean"):
            FF.batch_norm_act(*args, training=True)


def test_cumulative_average_without_a_counter(backend):
    with pytest.raises(ValueError, match=r"batch_norm_act: momentum=None .*expected num_batches_tracked, got None"):
        FF.batch_norm_act(X, MEAN.clone(), VAR.clone(), training=True, momentum=None)
    with pytest.raises(ValueError, match=r"conv2d_bn_act: momentum=None .*expected num_batches_tracked, got None"):
        FF.conv2d_bn_act(X, W, None, torch.zeros(8), torch.ones(8), None, None, training=True, momentum=None)


def test_refused_calls_leave_the_buffers_alone(backend):
    """The checks come first: a call that raises has not moved the running statistics."""
    mean, var, count = MEAN.clone(), VAR.clone(), torch.tensor(0)
    for wrong in ({"residual": X[:1]}, {"weight": torch.ones(3)}, {"activation": "swish"}):
        with pytest.raises((RuntimeError, ValueError)):
            FF.batch_norm_act(X, mean, var, training=True, num_batches_tracked=count, **wrong)
    with pytest.raises(ValueError):
        FF.batch_norm_act(X[:1, :, :1, :1], mean, var, training=True, num_batches_tracked=count)
    assert torch.equal(mean, MEAN) and torch.equal(var, VAR) and count == 0


def test_conv_bn_vectors(backend):
    norm = {"running_mean": torch.zeros(8), "running_var": torch.ones(8), "bn_weight": None, "bn_bias": None}
    for name in norm:
        with pytest.raises(RuntimeError, match=rf"conv2d_bn_act: {name} expected shape \[8\], got \[7\]"):
            FF.conv2d_bn_act(X, W, None, **{**norm, name: torch.ones(7)})
    with pytest.raises(RuntimeError, match="conv2d_bn_act: running_mean expected in evaluation mode"):
        FF.conv2d_bn_act(X, W, None, None, None, None, None)
    with pytest.raises(ValueError, match="conv2d_bn_act: .*more than 1 value per channel"):
        FF.conv2d_bn_act(X[:1, :, :3, :3], W, None, **norm, training=True)
    with pytest.raises(ValueError, match="conv2d_bn_act: eps .*positive"):
        FF.conv2d_bn_act(X, W, None, **norm, eps=0.0)


POOL = (
    ("input_not_a_tensor", ([1.0], 2), {}, "input expected Tensor, got list"),
    ("input_of_5_dimensions", (X[None], 2), {}, r"input expected .*\[1, 2, 4, 6, 6\]"),
    ("no_channels", (X[:, :0], 2), {}, r"input expected .*\[2, 0, 6, 6\]"),
    ("no_pixels", (X[..., :0], 2), {}, r"input expected .*\[2, 4, 6, 0\]"),
    ("kernel_zero", (X, 0), {}, r"kernel_size expected values >= 1, got \(0, 0\)"),
    ("kernel_of_3", (X, (2, 2, 2)), {}, r"kernel_size .*\(2, 2, 2\)"),
    ("kernel_float", (X, 2.5), {}, "kernel_size expected an int or a tuple of 2 ints, got 2.5"),
    ("stride_zero", (X, 2, 0), {}, r"stride expected values >= 1, got \(0, 0\)"),
    ("stride_of_3", (X, 2, (2, 2, 2)), {}, r"stride .*\(2, 2, 2\)"),
    ("padding_over_half", (X, 2, 2, 2), {}, "padding expected at most half of the kernel's height 2, got 2"),
    ("padding_negative", (X, 2, 2, -1), {}, r"padding expected values >= 0, got \(-1, -1\)"),
    ("kernel_too_large", (X, 7), {}, "kernel_size expected to fit the padded input, got height 7 for input height 6"),
)  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "text"), [c[1:] for c in POOL], ids=[c[0] for c in POOL])
@pytest.mark.parametrize("op", ("max_pool2d", "avg_pool2d"))
def test_pooling(op, args, kwargs, text, backend):
    raises_alike(lambda: getattr(FF, op)(*args, **kwargs), lambda: getattr(F, op)(*args, **kwargs), f"{op}: {text}")


def test_where_stocks_exception_type_is_an_accident(backend):
    """F.avg_pool2d says IndexError of a 2-d input, F.adaptive_avg_pool2d AttributeError of a list; the rules hold here."""
    for op, arg in (("max_pool2d", 2), ("avg_pool2d", 2), ("adaptive_avg_pool2d", 2)):
        with pytest.raises(RuntimeError, match=rf"{op}: input expected .*\[6, 6\]"):
            getattr(FF, op)(X[0, 0], arg)
        with pytest.raises(TypeError, match=f"{op}: input expected Tensor, got list"):
            getattr(FF, op)([1.0], arg)
    # Stock takes a negative label_smoothing for none.
    with pytest.raises(RuntimeError, match="cross_entropy: label_smoothing expected between 0.0 and 1.0, got -0.1"):
        FF.cross_entropy(LOGITS, LABELS, label_smoothing=-0.1)


def test_max_pool_dilation(backend):
    raises_alike(lambda: FF.max_pool2d(X, 2, dilation=0), lambda: F.max_pool2d(X, 2, dilation=0),
                 r"max_pool2d: dilation expected values >= 1, got \(0, 0\)")  # fmt: skip
    raises_alike(lambda: FF.max_pool2d(X, 3, dilation=3), lambda: F.max_pool2d(X, 3, dilation=3),
                 "max_pool2d: kernel_size expected to fit the padded input, got height 7")  # fmt: skip


def test_avg_pool_divisor(backend):
    raises_alike(lambda: FF.avg_pool2d(X, 2, divisor_override=0), lambda: F.avg_pool2d(X, 2, divisor_override=0),
                 "avg_pool2d: divisor_override expected a non-zero int or None, got 0")  # fmt: skip


@pytest.mark.parametrize(
    ("x", "size", "text"),
    (
        (X[0, 0], 2, r"input expected .*\[6, 6\]"),
        (X[..., :0], 2, r"input expected .*\[2, 4, 6, 0\]"),
        (X, -1, r"output_size expected values >= 0, got \(-1, -1\)"),
        (X, 2.5, "output_size expected an int or a tuple of 2 ints, got 2.5"),
        (X, (2, 2, 2), r"output_size expected an int or 2 values, got \(2, 2, 2\)"),
    ),
    ids=("2_dimensions", "no_pixels", "negative", "float", "3_values"),
)
def test_adaptive_avg_pool(x, size, text, backend):
    raises_alike(
        lambda: FF.adaptive_avg_pool2d(x, size), lambda: F.adaptive_avg_pool2d(x, size), f"adaptive_avg_pool2d: {text}"
    )


def test_integers_of_other_types(backend):
    """What stock takes for an int (numpy's integers, 0-dim tensors) is one."""
    two, x, w = numpy.int64(2), X.to(backend.device), W.to(backend.device)
    how = {"stride": two, "padding": (two, 1)}
    assert FF.conv2d_bias_act(x, w, **how).shape == F.conv2d(x, w, **how).shape
    assert FF.max_pool2d(x, two).shape == FF.avg_pool2d(x, two, two).shape == (2, 4, 3, 3)
    assert FF.max_pool2d(x, torch.tensor(2)).shape == F.max_pool2d(x, torch.tensor(2)).shape


def test_integer_input_as_stock():
    """No average of integers, no convolution of booleans with floats."""
    raises_alike(lambda: FF.avg_pool2d(X.bool(), 2), lambda: F.avg_pool2d(X.bool(), 2), "")
    raises_alike(
        lambda: FF.conv2d_bias_act(X.int(), W),
        lambda: F.conv2d(X.int(), W),
        "conv2d_bias_act: weight expected dtype torch.int32",
    )


LOSS = (
    ("input_not_a_tensor", (None, LABELS), {}, "input expected Tensor, got NoneType"),
    ("target_not_a_tensor", (LOGITS, [1, 2]), {}, "target expected Tensor, got list"),
    ("weight_not_a_tensor", (LOGITS, LABELS, 1.0), {}, "weight expected Tensor or None, got float"),
    ("reduction", (LOGITS, LABELS), {"reduction": "average"}, "reduction expected one of none, mean, sum; got 'average'"),
    ("smoothing_over_1", (LOGITS, LABELS), {"label_smoothing": 1.5}, "label_smoothing expected between 0.0 and 1.0, got 1.5"),
    ("batch_size", (LOGITS, LABELS[:3]), {}, r"target expected shape \[6\] for input \[6, 5\], got \[3\]"),
    ("one_dimension_too_many", (LOGITS, LABELS[:, None]), {}, r"target expected shape \[6\] for input \[6, 5\], got \[6, 1\]"),
    ("scalar_target", (LOGITS, LABELS[0]), {}, r"target expected shape \[6\] for input \[6, 5\], got \[\]"),
    ("spatial_size", (torch.randn(2, 5, 3, 3), torch.zeros(2, 3, 4).long()), {}, r"target expected shape \[2, 3, 3\]"),
    ("spatial_batch_size", (torch.randn(2, 5, 3, 3), torch.zeros(1, 3, 3).long()), {}, r"target expected shape \[2, 3, 3\]"),
    ("probabilities_shape", (LOGITS, torch.rand(6, 4)), {}, r"target expected shape \[6, 5\] for input \[6, 5\], got \[6, 4\]"),
    ("float_labels", (LOGITS, LABELS.float()), {}, r"target expected shape \[6, 5\]"),
    ("int32_labels", (LOGITS, LABELS.int()), {}, "target expected dtype int64 .*got torch.int32"),
    ("bool_labels", (LOGITS, LABELS.bool()), {}, "target expected dtype int64 .*got torch.bool"),
    ("weight_too_long", (LOGITS, LABELS, torch.ones(6)), {}, r"weight expected shape \[5\], got \[6\]"),
    ("weight_of_2_dimensions", (LOGITS, LABELS, torch.ones(5, 1)), {}, r"weight expected shape \[5\], got \[5, 1\]"),
    ("ignored_probabilities", (LOGITS, LOGITS.softmax(1)), {"ignore_index": 1}, "ignore_index is not supported for probability targets"),
    ("scalar_input", (LOGITS[0, 0], LABELS[0]), {}, "input expected at least 1 dimension"),
    ("label_out_of_range", (LOGITS, LABELS + 5), {}, ""),
)  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "text"), [c[1:] for c in LOSS], ids=[c[0] for c in LOSS])
def test_cross_entropy(args, kwargs, text, backend):
    if not text and backend.name not in ("aten", "cpu"):
        pytest.skip("a class index out of range is a device-side assertion on a GPU, as in stock PyTorch")
    text = f"cross_entropy: {text}" if text else ""
    raises_alike(lambda: FF.cross_entropy(*args, **kwargs), lambda: F.cross_entropy(*args, **kwargs), text)
