"""fp32 convolutions with TF32 allowed, torch's default, and not allowed, which is what the rest of the suite runs.

TF32 keeps 10 bits of a mantissa: an operand loses up to 2^-10 of itself where it is cut off, half of that where it is
rounded. Over many products whose signs are random the two operands' losses come to 0.77e-3 of the result's norm, or
0.30e-3; with bf16's 7 bits, rounded, it would be 2.4e-3. The bound lies between. It does not ask what stock does: whether
a convolution of cuDNN takes TF32 is its own choice, shape by shape.
"""

from __future__ import annotations

import pytest
import torch
from cases import HOSTILE, RESNET50, SMALL, Conv
from plan_util import OPTIMIZERS, assert_near, batches, by_hand, net, planned
from util import execute

import fastconv
import fastconv.functional as FF
from fastconv import _ext, reference

TF32 = 1.5 * 2**-10
NAMES = ("input", "weight", "bias", "residual")
# Not the depthwise ones, which know no TF32, and no results of a few numbers, whose losses would not average.
SOME = ("nchw", "prime_channels", "channels_past_a_vector", "stride2_on_odd", "asymmetric", "dilated", "groups")
CASES = (*RESNET50, *(case for case in HOSTILE if case.name in SOME))
GPU_KERNELS = pytest.mark.parametrize("backend", ("cuda", "triton", "simt"), indirect=True)


def allowed():
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=True)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the norm."""
    return ((got.double() - want).norm() / want.norm()).item()


def losses(op: str, case: Conv, more: dict, settings: dict, device: str) -> tuple[dict, dict]:
    """(without TF32, with it): distance from the fp64 oracle of the output and of the input's and weight's gradients."""
    tensors = {**case.tensors(torch.float32, device), **more}
    wanted = [name for name in NAMES if tensors[name] is not None]
    how = {**case.geometry, "activation": "identity", **settings}
    grad = torch.randn_like(execute(getattr(reference, op), tensors, how, dtype=torch.float64).output).float()
    want = execute(getattr(reference, op), tensors, how, wanted, grad, torch.float64)
    runs = [execute(getattr(FF, op), tensors, how, wanted, grad)]
    with allowed():
        runs.append(execute(getattr(FF, op), tensors, how, wanted, grad))
    found = []
    for got in runs:
        found.append({name: distance(got.grads[name], want.grads[name]) for name in wanted[:2]})
        found[-1]["output"] = distance(got.output, want.output)
    return tuple(found)


def check(exact: dict, tf32: dict, backend) -> None:
    for name, error in exact.items():
        assert error < 2e-6, f"{name}: {error:.1e} without TF32"
        assert tf32[name] < TF32, f"{name}: {tf32[name]:.1e} with TF32"
        # Triton's interpreter multiplies exactly whatever it is told.
        if backend.name != "triton" or backend.device == "cuda":
            assert tf32[name] > 100 * error, f"{name}: {tf32[name]:.1e} with TF32, {error:.1e} without: it was not used"


@GPU_KERNELS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case: Conv, backend):
    check(*losses("conv2d_bias_act", case, {}, {}, backend.device), backend)


@GPU_KERNELS
@pytest.mark.parametrize("case", [c for c in CASES if c.h > 4], ids=str)
def test_convolution_and_batch_norm(case: Conv, backend):
    """The statistics come out of the convolution; enough rows that a channel's variance is nowhere near 0."""
    vectors = {"running_mean": torch.zeros, "running_var": torch.ones, "bn_weight": torch.ones, "bn_bias": torch.zeros}
    norm = {name: make(case.k, device=backend.device) for name, make in vectors.items()}
    check(*losses("conv2d_bn_act", case, norm, {"training": True}, backend.device), backend)


def test_fp32_is_exact_where_tf32_is_not_allowed(backend):
    """By a bound of its own: the other tests compare with stock's error."""
    tensors = SMALL.tensors(torch.float32, backend.device)
    grad, how = torch.randn_like(tensors["residual"]), {**SMALL.geometry, "activation": "identity"}
    got = execute(FF.conv2d_bias_act, tensors, how, NAMES, grad)
    want = execute(reference.conv2d_bias_act, tensors, how, NAMES, grad, torch.float64)
    for name, one, other in [("output", got.output, want.output), *((n, got.grads[n], want.grads[n]) for n in NAMES)]:
        assert distance(one, other) < 1e-6, name


@pytest.mark.skipif(not _ext.HAS_EXT, reason=_ext.EXT_REASON)
@pytest.mark.parametrize("planner", ("simt", "cuda"), indirect=True)
def test_planned_steps(planner):
    """A plan's convolutions, whose epilogues are not those of the operators, against exact steps by hand."""
    exact, data = net(), batches(2)
    ours = fastconv.fuse(net(), inplace=True)
    loss_fn, sgd = torch.nn.functional.cross_entropy, OPTIMIZERS["sgd"]
    with allowed():
        mine = torch.stack(planned(ours, loss_fn, sgd(ours.parameters()), data, **planner.options))
    theirs = torch.stack(by_hand(exact, loss_fn, sgd(exact.parameters()), data))
    torch.testing.assert_close(mine, theirs, rtol=4 * TF32, atol=0)
    assert_near(ours, exact, 0.02)
    assert distance(ours[0].weight.detach(), exact[0].weight.detach()) > 1e-6, "TF32 was not used"
