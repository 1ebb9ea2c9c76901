"""The layers: subclasses of torch.nn's with the same arguments, the same state_dict and the same behaviour."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from util import ACTIVATIONS, STOCK_ACTIVATION, same_bits

import fastconv.nn as fnn

PAIRS = (
    (fnn.Conv2dBiasAct, nn.Conv2d, (6, 10, 3)),
    (fnn.Conv2dBiasReLU, nn.Conv2d, (6, 10, 3)),
    (fnn.BatchNormAct2d, nn.BatchNorm2d, (6,)),
    (fnn.MaxPool2d, nn.MaxPool2d, (2,)),
    (fnn.AvgPool2d, nn.AvgPool2d, (2,)),
    (fnn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, (3,)),
    (fnn.CrossEntropyLoss, nn.CrossEntropyLoss, ()),
)
PAIR = pytest.mark.parametrize(("ours", "stock", "args"), PAIRS, ids=lambda v: getattr(v, "__name__", ""))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@PAIR
def test_takes_torch_nns_arguments(ours, stock, args):
    """Same names, order and defaults; what fastconv adds is keyword-only."""
    theirs = list(inspect.signature(stock.__init__).parameters.values())
    mine = list(inspect.signature(ours.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in mine[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.name == "activation" for p in mine[len(theirs) :])
    assert issubclass(ours, stock) and isinstance(ours(*args), stock)


@PAIR
def test_state_dict_both_ways(ours, stock, args):
    mine, theirs = ours(*args), stock(*args)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    for name, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


@PAIR
def test_same_initial_values(ours, stock, args):
    torch.manual_seed(3)
    mine = ours(*args).state_dict()
    torch.manual_seed(3)
    theirs = stock(*args).state_dict()
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


@PAIR
def test_copies_pickles_and_prints(ours, stock, args):
    layer = ours(*args)
    again = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (again, loaded):
        assert type(other) is ours and repr(other) == repr(layer)
        assert getattr(other, "activation", None) == getattr(layer, "activation", None)
    assert ours.__name__ in repr(layer)
    if hasattr(layer, "activation"):
        assert "activation=relu" in repr(layer)


@pytest.mark.parametrize("layer", (fnn.Conv2dBiasAct, fnn.BatchNormAct2d), ids=lambda v: v.__name__)
def test_unknown_activation(layer):
    args = (6, 10, 3) if layer is fnn.Conv2dBiasAct else (6,)
    with pytest.raises(ValueError, match=f"{layer.__name__}: activation expected one of identity, relu.*got 'swish'"):
        layer(*args, activation="swish")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "settings",
    (
        {"padding": 1},
        {"bias": False, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"groups": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
        {"padding": "same", "padding_mode": "replicate"},
    ),
    ids=str,
)
def test_conv_layer(settings, activation, backend):
    ours = fnn.Conv2dBiasAct(6, 10, 3, **settings, activation=activation, device=backend.device)
    stock = nn.Conv2d(6, 10, 3, **settings, device=backend.device)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 8, 9, device=backend.device)
    expected = stock(x)
    residual = torch.randn_like(expected)
    close(ours(x), STOCK_ACTIVATION[activation](expected))
    close(ours(x, residual), STOCK_ACTIVATION[activation](expected + residual))
    close(ours(x, residual=residual), STOCK_ACTIVATION[activation](expected + residual))
    ours(x, residual).sum().backward()
    STOCK_ACTIVATION[activation](stock(x) + residual).sum().backward()
    close(ours.weight.grad, stock.weight.grad, 1e-4)


def test_conv_relu_layer(backend):
    layer = fnn.Conv2dBiasReLU(6, 10, 3, padding=1, device=backend.device)
    x = torch.randn(2, 6, 8, 9, device=backend.device)
    assert layer.activation == "relu"
    close(layer(x), nn.Conv2d.forward(layer, x).relu())


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"momentum": None},
        {"momentum": 0.5, "eps": 1e-3},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ),
    ids=str,
)
@pytest.mark.parametrize("activation", ("relu", "silu", "identity"))
def test_batch_norm_layer(activation, settings, training, backend):
    """Several steps: outputs, parameter gradients and every buffer follow nn.BatchNorm2d."""
    ours = fnn.BatchNormAct2d(6, **settings, activation=activation, device=backend.device).train(training)
    stock = nn.BatchNorm2d(6, **settings, device=backend.device).train(training)
    for step in range(3):
        x = torch.randn(4, 6, 5, 5, device=backend.device) + step
        residual = torch.randn_like(x)
        out, expected = ours(x, residual), STOCK_ACTIVATION[activation](stock(x) + residual)
        close(out, expected)
        if settings.get("affine", True):
            out.square().sum().backward()
            expected.square().sum().backward()
            close(ours.weight.grad, stock.weight.grad, 1e-4)
            close(ours.bias.grad, stock.bias.grad, 1e-4)
        assert list(ours.state_dict()) == list(stock.state_dict())
        for name, value in stock.state_dict().items():
            close(ours.state_dict()[name], value)


def test_batch_norm_layer_with_statistics_it_does_not_track(backend):
    """track_running_stats switched off later: training neither reads nor writes the buffers, evaluation reads them."""
    layer = fnn.BatchNormAct2d(4, device=backend.device)
    layer.track_running_stats = False
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    x = torch.randn(3, 4, 5, 5, device=backend.device) + 2
    close(layer(x), nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True).relu())
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items())
    close(layer.eval()(x), (x / (1 + 1e-5) ** 0.5).relu())


def test_batch_norm_layer_refuses_other_dimensions():
    for layer in (fnn.BatchNormAct2d(4), nn.BatchNorm2d(4)):
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.randn(3, 4))


@pytest.mark.parametrize("settings", ({}, {"stride": 1, "padding": 1}, {"ceil_mode": True, "stride": 2}), ids=str)
def test_pool_layers(settings, backend):
    x = torch.randn(2, 5, 9, 9, device=backend.device)
    for name in ("MaxPool2d", "AvgPool2d"):
        close(getattr(fnn, name)(3, **settings)(x), getattr(nn, name)(3, **settings)(x))
    close(fnn.AvgPool2d(3, count_include_pad=False, padding=1, divisor_override=2)(x),
          nn.AvgPool2d(3, count_include_pad=False, padding=1, divisor_override=2)(x))  # fmt: skip
    close(fnn.MaxPool2d(3, dilation=2)(x), nn.MaxPool2d(3, dilation=2)(x))
    for size in (1, (3, 2), (None, 4)):
        close(fnn.AdaptiveAvgPool2d(size)(x), nn.AdaptiveAvgPool2d(size)(x))


def test_max_pool_layer_with_indices():
    x = torch.randn(2, 5, 9, 9)
    ours, stock = fnn.MaxPool2d(3, return_indices=True)(x), nn.MaxPool2d(3, return_indices=True)(x)
    assert torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[1])


@pytest.mark.parametrize(
    "settings", ({}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 2, "reduction": "none"}), ids=str
)
def test_cross_entropy_layer(settings, backend):
    x = torch.randn(7, 5, device=backend.device, requires_grad=True)
    t = torch.randint(5, (7,), device=backend.device)
    for weight in (None, torch.rand(5, device=backend.device)):
        close(fnn.CrossEntropyLoss(weight, **settings)(x, t), nn.CrossEntropyLoss(weight, **settings)(x, t))


def test_layers_follow_device_and_dtype_changes(backend):
    net = nn.Sequential(fnn.Conv2dBiasReLU(3, 8, 3), fnn.BatchNormAct2d(8), fnn.MaxPool2d(2)).to(backend.device)
    x = torch.randn(2, 3, 8, 8, device=backend.device)
    assert net.bfloat16()(x.bfloat16()).dtype is torch.bfloat16
    net.float().to(memory_format=torch.channels_last)
    out = net(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_layer_in_a_training_step(backend):
    """Two SGD steps of a small net equal stock's to rounding: parameters, buffers, loss."""

    def net(lib, act):
        torch.manual_seed(1)
        conv = (lambda *a: fnn.Conv2dBiasReLU(*a)) if act else (lambda *a: nn.Sequential(nn.Conv2d(*a), nn.ReLU()))
        return nn.Sequential(
            conv(3, 8, 3), lib.MaxPool2d(2), conv(8, 8, 3), lib.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )

    x, t = torch.randn(6, 3, 12, 12, device=backend.device), torch.randint(4, (6,), device=backend.device)
    losses = []
    for lib, act in ((fnn, True), (nn, False)):
        model = net(lib, act).to(backend.device)
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            sgd.zero_grad()
            loss = lib.CrossEntropyLoss()(model(x), t)
            loss.backward()
            sgd.step()
        losses.append((loss.detach(), [p.detach() for p in model.parameters()]))
    close(losses[0][0], losses[1][0])
    for ours, stock in zip(losses[0][1], losses[1][1], strict=True):
        close(ours, stock)


def test_weight_changed_in_place_takes_effect(backend):
    layer = fnn.Conv2dBiasAct(3, 4, 1, bias=False, activation="identity", device=backend.device)
    x = torch.randn(1, 3, 4, 4, device=backend.device)
    first = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    close(layer(x), first * 2)
    assert not same_bits(layer(x), first)


def test_under_activation_checkpointing_and_offloading(backend):
    """Recomputed or offloaded activations give the same gradients: what is saved goes through autograd's own hooks."""
    conv = fnn.Conv2dBiasAct(3, 8, 3, padding=1, activation="silu", device=backend.device)
    norm = fnn.BatchNormAct2d(8, momentum=0.0, device=backend.device)
    net = nn.Sequential(conv, norm, fnn.MaxPool2d(2), fnn.AvgPool2d(2)).to(backend.device)
    x, grads = torch.randn(2, 3, 8, 8, device=backend.device, requires_grad=True), []
    for run in ("plain", "checkpoint", "offload"):
        if run == "checkpoint":
            out = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        elif run == "offload":
            with torch.autograd.graph.save_on_cpu():
                out = net(x)
        else:
            out = net(x)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *net.parameters()]))
    for other in grads[1:]:
        assert all(same_bits(a, b) for a, b in zip(grads[0], other, strict=True))


def test_under_deterministic_algorithms(backend):
    """torch.use_deterministic_algorithms(True) refuses nothing of fastconv's own and changes no value."""
    net = nn.Sequential(
        fnn.Conv2dBiasReLU(3, 8, 3), fnn.BatchNormAct2d(8), fnn.MaxPool2d(3, 2), fnn.AdaptiveAvgPool2d(1)
    )
    net = net.to(backend.device)
    x = torch.randn(2, 3, 10, 10, device=backend.device)
    torch.use_deterministic_algorithms(backend.fused)
    try:
        loss = fnn.CrossEntropyLoss()(net(x).flatten(1), torch.tensor([1, 2], device=backend.device))
        grads = torch.autograd.grad(loss, list(net.parameters()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
