"""Calls are checked once and remembered by their signature: what must not be taken for an equal call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from choice_util import CHOICE_TESTS, image

import fastconv
import fastconv.functional as FF
from fastconv.ops import choice

pytestmark = CHOICE_TESTS


@pytest.fixture(autouse=True)
def not_measured(own_cache, monkeypatch):
    monkeypatch.setenv("FASTCONV_TUNE", "0")
    choice.forget()


@pytest.fixture
def checked(monkeypatch):
    """The decisions taken: one per call that was not remembered."""
    seen, real = [], choice._decide
    monkeypatch.setattr(choice, "_decide", lambda *args: seen.append(args[0]) or real(*args))
    return seen


def conv(**kwargs):
    return FF.conv2d_bias_act(image(2, 8, 6, 6), torch.randn(8, 8, 3, 3), **kwargs)


CALLS = {
    "conv2d_bias_act": lambda: conv(padding=1),
    "conv2d_bn_act": lambda: FF.conv2d_bn_act(
        image(2, 8, 6, 6), torch.randn(8, 8, 3, 3), None, torch.zeros(8), torch.ones(8), None, None, training=True
    ),
    "batch_norm_act": lambda: FF.batch_norm_act(image(2, 8, 6, 6), torch.zeros(8), torch.ones(8)),
    "max_pool2d": lambda: FF.max_pool2d(image(2, 8, 6, 6), 2),
    "avg_pool2d": lambda: FF.avg_pool2d(image(2, 8, 6, 6), 2),
    "adaptive_avg_pool2d": lambda: FF.adaptive_avg_pool2d(image(2, 8, 6, 6), (None, 2)),
    "cross_entropy": lambda: FF.cross_entropy(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])),
}


@pytest.mark.parametrize("op", CALLS)
def test_an_equal_call_is_not_checked_again(op, checked):
    shapes = {CALLS[op]().shape for _ in range(3)}
    assert checked == [op] and len(shapes) == 1


def test_true_and_floats_are_no_ints():
    """1 == True == 1.0 in Python, and in a dict."""
    assert conv(stride=1, groups=1).shape == (2, 8, 4, 4)
    for wrong in ({"stride": True}, {"stride": 1.0}, {"stride": (1, True)}, {"padding": False}, {"groups": True},
                  {"dilation": 1.0}):  # fmt: skip
        with pytest.raises(TypeError, match=next(iter(wrong))):
            conv(**wrong)


def test_lists_tuples_and_numpy_numbers(checked):
    outputs = [conv(padding=p).shape for p in ((1, 1), [1, 1], np.int64(1), (np.int64(1), 1), torch.tensor(1))]
    assert set(outputs) == {(2, 8, 6, 6)}
    before = len(checked)
    for p in ((1, 1), [1, 1], np.int64(1), (np.int64(1), 1)):
        conv(padding=p)
    assert len(checked) == before, "numbers of other libraries are remembered by their checked form"


def test_every_tensor_counts():
    """After a right call, each wrong one still gets its message."""
    x, w, b, r = image(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8), image(2, 8, 4, 4)
    FF.conv2d_bias_act(x, w, b, residual=r)
    for wrong, words in (
        ({"input": x[:, :7]}, "input channels"), ({"weight": w[:, :, :, 0]}, "weight expected 4 dimensions"),
        ({"bias": b[:7]}, "bias expected shape"), ({"residual": r[:1]}, "residual expected the output's shape"),
        ({"bias": b.double()}, "bias expected dtype"), ({"weight": w.double()}, "weight expected dtype"),
        ({"weight": None}, "weight expected Tensor"), ({"input": 3}, "input expected Tensor"),
        ({"residual": "r"}, "residual expected Tensor or None"), ({"activation": "swish"}, "activation expected one of"),
        ({"activation": None}, "activation expected one of"),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError, ValueError), match=words):
            FF.conv2d_bias_act(**{"input": x, "weight": w, "bias": b, "residual": r, **wrong})


def test_the_norms_rules_count():
    """One value per channel, a momentum of None without a counter, eps: checked although the shapes were seen before."""
    x, v = image(2, 8, 1, 1), torch.ones(8)
    FF.batch_norm_act(x, v.clone(), v.clone(), training=True)
    FF.batch_norm_act(x[:1], v, v)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FF.batch_norm_act(x[:1], v, v, training=True)
    with pytest.raises(ValueError, match="momentum=None"):
        FF.batch_norm_act(x, v, v, training=True, momentum=None)
    with pytest.raises(ValueError, match="eps expected a positive number"):
        FF.batch_norm_act(x, v, v, training=True, eps=0.0)
    with pytest.raises(RuntimeError, match="running_mean expected in evaluation mode"):
        FF.batch_norm_act(x, None, None)


def test_the_backend_in_force_counts():
    call = CALLS["conv2d_bias_act"]
    assert "Function" in type(conv_with_grad().grad_fn).__name__
    with fastconv.use_backend("aten"):
        assert "Function" not in type(conv_with_grad().grad_fn).__name__
        call()
    assert "Function" in type(conv_with_grad().grad_fn).__name__


def conv_with_grad():
    return FF.conv2d_bias_act(image(2, 8, 6, 6, grad=True), torch.randn(8, 8, 3, 3))


def test_signature_and_its_twin_in_python_tell_the_same_calls_apart():
    """An installation without the extension keeps the same books."""
    x = image(2, 8, 6, 6)
    calls = [
        ("op", (x,), ((1, 1), 2)), ("op2", (x,), ((1, 1), 2)), ("op", (x, None), ((1, 1), 2)), ("op", (x,), ((1, 1), 2.0)),
        ("op", (x,), ((1, True), 2)), ("op", (x,), (1, 1, 2)), ("op", (x,), ((1, 1), "2")), ("op", (x,), ((1, 1), None)),
        ("op", (x.contiguous(),), ((1, 1), 2)), ("op", (x[:1],), ((1, 1), 2)), ("op", (x.double(),), ((1, 1), 2)),
        ("op", (x.clone().requires_grad_(),), ((1, 1), 2)), ("op", (x,), ((1, 1), False)), ("op", (x,), ((1, 1), 0)),
        ("op", (x,), ((1, 1), "")), ("op", (x,), ((1, 1), ())), ("op", (x,), ((1,), 1, 2)), ("op", (x,), ((1, 1), 0.5)),
    ]  # fmt: skip
    for signature in (choice._signature, choice._signature_in_python):
        keys = [signature(*call) for call in calls]
        assert len(set(keys)) == len(keys) and None not in keys
        assert keys == [signature(*call) for call in calls]
        assert signature("op", (x,), ([1, 1], 2)) == keys[0], "a list counts as a tuple"
        with torch.no_grad():
            assert signature(*calls[0]) != keys[0]
    big = ("op", (x,), (1 << 80,))
    assert choice._signature(*big) is None and choice._signature("op", (x,), (object(),)) is None
    assert choice._signature("op", ("x",), ()) is None and choice._signature_in_python("op", ("x",), ()) is None
    with pytest.raises(TypeError):
        choice._signature_in_python("op", (x,), (object(),))
