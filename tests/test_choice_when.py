"""When the choice under "auto" measures, and when it takes what is stored or the fixed order instead."""

from __future__ import annotations

import logging

import pytest
import torch
from choice_util import CHOICE_TESTS, Namespaces, favour, image, net_call
from torch.utils.checkpoint import checkpoint

import fastconv
import fastconv.functional as FF
from fastconv.ops import choice
from fastconv.ops import measure as measuring

pytestmark = CHOICE_TESTS


def test_settings_that_turn_it_off(measured, monkeypatch):
    monkeypatch.setenv("FASTCONV_TUNE", "0")
    net_call()()
    x, w = image(4, 8, 6, 6), torch.randn(8, 8, 3, 3)
    assert "FASTCONV_TUNE=0" in fastconv.explain("conv2d_bias_act", x, w).reason
    monkeypatch.delenv("FASTCONV_TUNE")
    choice.forget()
    net_call()()
    why = fastconv.explain("conv2d_bias_act", x, w).reason
    assert "was not measured" in why and "python -m fastconv tune" in why, "a CPU is measured only where asked"
    monkeypatch.setenv("FASTCONV_TUNE", "yes")
    choice.forget()
    with pytest.raises(ValueError, match="FASTCONV_TUNE: expected 0 .* got 'yes'"):
        net_call()()
    assert measured == []


def test_deterministic_algorithms_take_the_fixed_order(monkeypatch, measured):
    favour(monkeypatch, "aten")
    x, w = image(4, 8, 6, 6), torch.randn(8, 8, 3, 3)
    FF.conv2d_bias_act(x, w)
    assert fastconv.explain("conv2d_bias_act", x, w).backend == "aten"
    torch.use_deterministic_algorithms(True)
    try:
        found = fastconv.explain("conv2d_bias_act", x, w)
        assert found.backend == "cpu" and "deterministic" in found.reason, "measurements on disk do not count either"
        with Namespaces() as seen:
            FF.conv2d_bias_act(x, w)
        assert "fastconv" in seen.ran
    finally:
        torch.use_deterministic_algorithms(False)
    with Namespaces() as seen:
        FF.conv2d_bias_act(x, w)
    assert "fastconv" not in seen.ran


def in_checkpoint(call):
    return checkpoint(call, use_reentrant=False)


def in_backward(call):
    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                call()
            return grad

    Calls.apply(torch.ones(1, requires_grad=True)).backward()


def in_dispatch_mode(call):
    with Namespaces():
        call()


def on_fake_tensors(call):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        net_call()()


def in_make_fx(call):
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = image(4, 8, 6, 6), torch.randn(8, 8, 3, 3)
    for mode in ("real", "fake", "symbolic"):
        make_fx(lambda a, b: FF.conv2d_bias_act(a, b, padding=1), tracing_mode=mode)(x, w)


def compiled(call):
    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend="eager")()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", [in_checkpoint, in_backward, in_dispatch_mode, on_fake_tensors, in_make_fx, compiled])
def test_never_measured_where_timing_would_disturb(state, measured):
    call = net_call()
    state(call)
    assert measured == []
    call()
    assert len(measured) == 1, "the next call in an ordinary state is measured"
    state(call)
    assert len(measured) == 1


def test_waiting_for_a_measurement_is_cheap(measured):
    """A model that always runs under activation checkpointing does not go the long way at every call."""
    decided, real = [], choice._decide
    x, w = image(4, 8, 6, 6, grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "_decide", lambda *args: decided.append(args[0]) or real(*args))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            for _ in range(3):
                FF.conv2d_bias_act(x, w)
        assert decided == ["conv2d_bias_act"] and measured == []
        FF.conv2d_bias_act(x, w)
        FF.conv2d_bias_act(x, w)
        assert len(decided) == 2 and len(measured) == 1


def test_a_measurement_that_fails_is_not_tried_again(monkeypatch, caplog):
    tried = []

    def fail(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(choice, "measure", fail)
    call = net_call()
    for _ in range(3):
        call()
    assert len(tried) == 1
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "conv2d_bias_act: measuring it failed: CUDA out of memory"
    ]


def test_a_capture_is_not_measured(monkeypatch):
    """Without a GPU: the question that the choice asks of CUDA."""

    class OnGpu:
        is_cuda = True

    assert measuring.unsettled((torch.ones(1), None)) == ""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(measuring, "Tensor", OnGpu)
    assert "CUDA graph capture" in measuring.unsettled((OnGpu(), None))


def test_a_trace_takes_what_is_stored(monkeypatch):
    favour(monkeypatch, "aten")
    x, w = image(4, 8, 6, 6), torch.randn(8, 8, 3, 3)

    def call(x, w):
        return FF.conv2d_bias_act(x, w, padding=1)

    def operators():
        nodes = []

        def look(module, example):
            nodes.extend(str(n.target) for n in module.graph.nodes)
            return module

        torch._dynamo.reset()
        torch.compile(call, fullgraph=True, backend=look)(x, w)
        return " ".join(nodes)

    assert "fastconv" in operators(), "nothing is stored: the fixed order"
    call(x, w)
    assert "fastconv" not in operators()
    with fastconv.use_backend("cpu"):
        assert "fastconv" in operators()
