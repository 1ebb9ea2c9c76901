"""What the tests of fuse() share: the comparison with a stock copy of the model, and what the report says.

``assert_same`` is what they stand on: outputs, gradients of inputs and parameters, running statistics and state_dict
against a deep copy of the stock model, over training steps and evaluation.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastconv

CPU = pytest.mark.skipif(not fastconv.backends()["cpu"], reason=f"backend cpu: {fastconv.backends()['cpu'].reason}")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The tensors are tiny: threads only wait for each other. The suite's own fixture restores the number."""
    torch.set_num_threads(1)


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in tensors_of(v)]


def assert_close(got, wanted, rtol: float) -> None:
    """Equal structure, and values within rtol of the wanted tensor's largest magnitude."""
    assert type(got) is type(wanted)
    got, wanted = tensors_of(got), tensors_of(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = b.detach().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(scale, 1e-3), equal_nan=True)


def run(model: nn.Module, inputs, seed: int):
    torch.manual_seed(seed)
    inputs = [copy.deepcopy(x) for x in inputs]
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    model.zero_grad()
    # Times one: a leaf cannot be written to in place, and some of the models do write to their input.
    out = model(*(x * 1 if isinstance(x, Tensor) else x for x in inputs))
    loss = sum((t.double() * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in tensors_of(out))
    loss.backward()
    grads = {f"input {i}": x.grad for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    grads |= {name: p.grad for name, p in model.named_parameters()}
    return out, grads


def assert_same(model: nn.Module, *inputs, rtol: float = 1e-9, modes=(True, True, False), **options) -> nn.Module:
    """Fuses the model and compares it with a stock copy; returns the fused model."""
    stock = copy.deepcopy(model)
    fused = fastconv.fuse(model, **options)
    assert list(fused.state_dict()) == list(stock.state_dict())
    for seed, mode in enumerate(modes):
        stock.train(mode)
        fused.train(mode)
        wanted, wanted_grads = run(stock, inputs, seed)
        got, got_grads = run(fused, inputs, seed)
        assert_close(got, wanted, rtol)
        assert got_grads.keys() == wanted_grads.keys()
        # A gradient that is zero but for rounding (a bias before batch norm) is measured against the others.
        largest = max(g.abs().max().item() for g in wanted_grads.values() if g is not None)
        for name, grad in wanted_grads.items():
            if grad is None:
                assert got_grads[name] is None, name
            else:
                error = (got_grads[name] - grad).abs().max().item()
                assert error <= rtol * max(grad.abs().max().item(), 0.1 * largest), name
        for (name, a), b in zip(fused.named_buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=name)
    return fused


def assert_same_evaluation(model: nn.Module, *inputs, layouts: int = 2, **options) -> nn.Module:
    """Without gradients: for writes in place that stock PyTorch's backward refuses. Inputs are compared too."""
    stock = copy.deepcopy(model).eval()
    fused = fastconv.fuse(model, **options).eval()
    for x in (inputs, [x.to(memory_format=torch.channels_last) for x in inputs])[:layouts]:
        ours, theirs = [x.clone() for x in x], [x.clone() for x in x]
        with torch.no_grad():
            assert_close(fused(*ours), stock(*theirs), 1e-9)
        assert_close(ours, theirs, 1e-9)
    return fused


def patterns(model: nn.Module) -> list[str]:
    return [g.pattern for g in fastconv.fusion_report(model).groups]


def left(model: nn.Module) -> dict[str, str]:
    return dict(fastconv.fusion_report(model).left)


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))
