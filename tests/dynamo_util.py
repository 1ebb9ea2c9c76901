"""What the tests of torch.compile(backend="fastconv") share: the comparison with the stock model, and the counts."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from fuse_util import assert_close, run, tensors_of
from torch import nn
from torch._dynamo.utils import counters

from fastconv import _dynamo


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def assert_compiled(
    model: nn.Module, batches, modes=(True, False), rtol: float = 1e-9, reference=lambda m: m, **options
) -> Counter:
    """Outputs (values and strides), gradients and buffers as the stock copy's; returns the counts of the groups."""
    stock, step = copy.deepcopy(model), torch.compile(model, backend=_dynamo.fastconv, **options)
    plain = reference(stock)
    for mode in modes:
        stock.train(mode)
        model.train(mode)
        for seed, inputs in enumerate(batches):
            stock.zero_grad()
            model.zero_grad()
            wanted, wanted_grads = run(plain, inputs, seed)
            got, got_grads = run(step, inputs, seed)
            got_grads = {name.removeprefix("_orig_mod."): grad for name, grad in got_grads.items()}
            wanted_grads = {name.removeprefix("_orig_mod."): grad for name, grad in wanted_grads.items()}
            assert_close(got, wanted, rtol)
            assert [t.stride() for t in tensors_of(got)] == [t.stride() for t in tensors_of(wanted)]
            assert got_grads.keys() == wanted_grads.keys()
            largest = max(g.abs().max().item() for g in wanted_grads.values() if g is not None)
            for name, grad in wanted_grads.items():
                assert (grad is None) == (got_grads[name] is None), name
                if grad is not None:
                    error = (got_grads[name] - grad).abs().max().item()
                    assert error <= rtol * max(grad.abs().max().item(), 0.1 * largest), name
            for (name, a), b in zip(model.named_buffers(), stock.buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=name)
    return Counter(counters["fastconv"])


def groups(counts: Counter) -> dict[str, int]:
    return {k: n for k, n in counts.items() if k != "graphs"}
