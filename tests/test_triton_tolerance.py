"""What the Triton tests share: where they run, and the tolerance rule; with the tests of that rule."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastconv import triton as backend

AVAILABLE, REASON = backend.available()
DEVICE = "cpu" if backend.interpreting() else "cuda"
# tl.dot in bf16 is wrong in the interpreter of Triton 3.6.
DTYPES = [torch.float32, torch.float16] + ([] if backend.interpreting() else [torch.bfloat16])


def require_triton() -> None:
    """Skips the module that calls this where no kernel can run; test_triton_interpreter.py runs it all the same."""
    if not AVAILABLE:
        pytest.skip(REASON, allow_module_level=True)


def check(actual, oracle, stock, what="", scale=0.0):
    """Against the fp64 oracle the error is at most twice stock PyTorch's in the same dtype, plus one unit in the last
    place of the largest value; in the maximum and in the root mean square. ``scale``: the size of the summands where a
    sum cancels."""
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == stock.dtype, f"{what}: dtype {actual.dtype}, expected {stock.dtype}"
    if not actual.numel():
        return
    eps = torch.finfo(stock.dtype).eps
    actual, stock, oracle = (t.detach().cpu().double() for t in (actual, stock, oracle))
    assert torch.equal(actual.isnan(), oracle.isnan()), f"{what}: NaN in other places"
    finite = oracle.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), oracle[~finite].nan_to_num()), f"{what}: infinities differ"
    if not finite.any():
        return
    oracle, error, allowed = oracle[finite], (actual - oracle)[finite], (stock - oracle)[finite]
    unit = eps * max(scale, oracle.abs().max().item())
    for name, norm in (("max", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        got, limit = norm(error).item(), 2 * norm(allowed).item() + unit
        assert got <= limit, f"{what}: {name} error {got:.3e} > {limit:.3e} (2 x stock's + one unit)"


def leaves(*tensors):
    """fp64 copies that take gradients, for the oracle."""
    return [None if t is None else t.detach().cpu().double().requires_grad_(t.is_floating_point()) for t in tensors]


def image(n, c, h, w, dtype, seed=0, layout=torch.channels_last):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(n, c, h, w, generator=generator)
    return t.to(device=DEVICE, dtype=dtype, memory_format=layout)


def test_tolerance_sees_a_wrong_value():
    oracle = torch.linspace(-1, 1, 100, dtype=torch.float64)
    stock = oracle.half()
    check(stock.clone(), oracle, stock)
    wrong = stock.clone()
    wrong[17] += 0.01
    with pytest.raises(AssertionError, match="max error"):
        check(wrong, oracle, stock)
    with pytest.raises(AssertionError, match="NaN"):
        check(stock.log(), oracle, stock)
    with pytest.raises(AssertionError, match="dtype"):
        check(stock.float(), oracle, stock)


def test_backend_says_why():
    ok, reason = backend.available()
    assert reason and isinstance(ok, bool)
    assert "no Triton kernel" in backend.cannot_run("conv3d", ())
    here = torch.zeros(1, dtype=torch.float64)
    elsewhere = "a tensor is on cpu, the kernels run on cuda"
    assert backend.cannot_run("avg_pool2d", (here,)) in ("dtype float64 is not supported", elsewhere)
    if ok:
        fine = torch.zeros(1, device=DEVICE)
        assert backend.cannot_run("avg_pool2d", (fine, None)) == ""
        assert backend.cannot_run("avg_pool2d", (fine.double(),)) == "dtype float64 is not supported"
        assert backend.cannot_run("avg_pool2d", (fine.to_sparse(),)) == "layout torch.sparse_coo is not supported"
    with pytest.raises(KeyError):
        backend.impl("conv3d")


def test_tensors_of_two_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    with FakeTensorMode():
        x, w = torch.empty(1, 8, 4, 4, device="cuda:0"), torch.empty(8, device="cuda:1")
        assert backend.cannot_run("conv2d_bias_act", (x, None, w)) == "tensors are on cuda:0 and cuda:1"
        assert backend.cannot_run("conv2d_bias_act", (x, None, x)) == ""
