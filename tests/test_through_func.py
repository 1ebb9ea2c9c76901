"""Fused models and layers through torch.func, forward mode and second derivatives: right through aten, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fuse_util import CPU, assert_close, image, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import fastconv
import fastconv.functional as FF
import fastconv.nn as fnn

X = (4, 3, 9, 8)


# torch.func, forward mode, second derivatives.


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        {k: v.detach().clone() for k, v in model.named_parameters()},
        {k: v.detach().clone() for k, v in model.named_buffers()},
    )


def loss_of(model: nn.Module):
    return lambda params, buffers, x: functional_call(model, (params, buffers), (x,)).square().sum()


@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
def test_func_grad(pair, training):
    found = []
    for m in pair:
        params, buffers = state(m.train(training))
        found.append((grad(loss_of(m))(params, buffers, image(*X)), buffers))
    assert_close(*found, 1e-9)


def test_func_per_sample_gradients(pair):
    fused, stock = (m.eval() for m in pair)
    found = []
    for m in (fused, stock):
        one = grad(lambda p, b, x, m=m: loss_of(m)(p, b, x[None]))
        found.append(vmap(one, (None, None, 0))(*state(m), image(*X)))
    assert_close(*found, 1e-9)


def test_func_ensemble(pair):
    """One fused model run with the stacked state of three."""
    fused, stock = (m.eval() for m in pair)
    models = [stock, *(copy.deepcopy(stock) for _ in range(2))]
    for scale, m in enumerate(models, 1):
        m.load_state_dict({k: v / scale if v.is_floating_point() else v for k, v in stock.state_dict().items()})
    state_of_all = stack_module_state(models)
    x = image(*X)
    got = vmap(lambda p, b: functional_call(fused, (p, b), (x,)))(*state_of_all)
    assert_close(got, torch.stack([m(x) for m in models]), 1e-9)


@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
def test_forward_mode(pair, training):
    """torch.func.jvp over the parameters, dual tensors over the input."""
    found = []
    for m in pair:
        params, buffers = state(m.train(training))
        tangents = {k: torch.ones_like(v) for k, v in params.items()}

        def call(p, m=m, buffers=buffers):
            # Copies made inside: a transform does not let a function write to what it captures.
            return functional_call(m, (p, {k: v.clone() for k, v in buffers.items()}), (image(*X),))

        results = list(jvp(call, (params,), (tangents,)))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(image(*X), torch.ones(X).double())
            results += list(torch.autograd.forward_ad.unpack_dual(m(dual)))
        found.append([*results, *m.buffers()])
    assert_close(*found, 1e-9)


LAYERS = {
    "conv": lambda: fnn.Conv2dBiasAct(3, 4, 3, padding=1, activation="tanh"),
    "norm": lambda: fnn.BatchNormAct2d(3, activation="silu"),
    "norm without statistics": lambda: fnn.BatchNormAct2d(3, track_running_stats=False, activation="sigmoid"),
    "max": lambda: fnn.MaxPool2d(2),
    "avg": lambda: fnn.AvgPool2d(2),
    "adaptive": lambda: fnn.AdaptiveAvgPool2d(2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_func_of_layers(name):
    """Jacobians by both modes and a Hessian against PyTorch's own: transforms run on aten, whose rules these are."""
    layer = LAYERS[name]().double().eval()
    x = image(1, 3, 4, 4)
    with fastconv.use_backend("aten"):
        wanted = torch.autograd.functional.jacobian(layer, x)
        second = torch.autograd.functional.hessian(lambda x: layer(x).square().sum(), x)
    assert_close(jacrev(layer)(x), wanted, 1e-9)
    assert_close(jacfwd(layer)(x), wanted, 1e-9)
    assert_close(hessian(lambda x: layer(x).square().sum())(x), second, 1e-9)


def test_func_of_cross_entropy():
    x, t = torch.randn(4, 5).double(), torch.tensor([0, 4, 2, 1])
    ours, stock = (lambda x, f=f: f(x, t, label_smoothing=0.1) for f in (FF.cross_entropy, F.cross_entropy))
    for transform in (grad, jacfwd, hessian):
        assert_close(transform(ours)(x), transform(stock)(x), 1e-9)


@CPU
def test_second_derivatives(pair):
    """Refused by the fused operators, with the way out in the message, which leads to the stock model's numbers."""
    fused, stock = pair
    found = []
    for m in (fused, fused, stock):
        with fastconv.use_backend("aten" if found else "cpu"):
            x = image(*X).requires_grad_()
            (first,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
            if not found:
                with pytest.raises(RuntimeError, match='is differentiable once.*use_backend."aten".'):
                    first.square().sum().backward()
                m.load_state_dict(stock.state_dict())
                found.append(None)
            else:
                found.append(torch.autograd.grad(first.square().sum(), [x, *m.parameters()], allow_unused=True))
    got, wanted = ([g for g in grads if g is not None] for grads in found[1:])
    assert_close(got, wanted, 1e-7)


@CPU
def test_an_explicit_backend_refuses_transforms():
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with fastconv.use_backend("cpu"):
        with pytest.raises(RuntimeError, match="cannot run this call: inside a torch.func transform"):
            vmap(lambda t: FF.conv2d_bias_act(t[None], w))(x)
        with (
            pytest.raises(RuntimeError, match="cannot run this call: inside forward-mode AD"),
            torch.autograd.forward_ad.dual_level(),
        ):
            FF.conv2d_bias_act(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), w)


@CPU
def test_a_default_device_does_not_send_calls_to_aten():
    """torch.set_default_device is a torch-function mode; a mode is no tensor subclass."""
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    with torch.device("cpu"):
        assert fastconv.explain("conv2d_bias_act", x, w).backend == "cpu"
