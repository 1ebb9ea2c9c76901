"""The raw operators torch.ops.fastconv.*: opcheck, fakes against the real thing, honest schemas."""

from __future__ import annotations

import pytest
import torch
from raw_ops_samples import SAMPLES, image, vectors
from torch._subclasses.fake_tensor import FakeTensorMode
from util import memory_format, same_bits

OP = pytest.mark.parametrize("op", SAMPLES)


def overload(op):
    return getattr(torch.ops.fastconv, op).default


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def copied(args):
    return tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)


def test_every_operator_has_samples(kernels):
    registered = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastconv::")}
    assert registered == set(SAMPLES)


@OP
def test_opcheck(op, kernels):
    for i, args in enumerate(SAMPLES[op]("nhwc", torch.float32, kernels.device)):
        more = ("test_autograd_registration", "test_aot_dispatch_dynamic") if i < 2 else ()  # slow: on two samples each
        torch.library.opcheck(overload(op), args, test_utils=("test_schema", "test_faketensor", *more))


@pytest.mark.sanitize
@OP
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", ("nchw", "nhwc", "strided", "channel_slice", "expanded"))
def test_fake_agrees_with_real(layout, dtype, op, kernels):
    """Shapes, strides, dtypes and devices of the fake results are those of the real ones."""
    for args in SAMPLES[op](layout, dtype, kernels.device):
        real = as_list(overload(op)(*copied_buffers(args)))
        with FakeTensorMode() as mode:
            fake = as_list(overload(op)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)))
        for i, (r, f) in enumerate(zip(real, fake, strict=True)):
            assert (r.shape, r.dtype, r.device) == (f.shape, f.dtype, f.device), f"result {i} of {op}{args[-4:]}"
            if r.numel():  # the stride of a dimension of size 1 means nothing
                strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (r, f)]
                assert strides[0] == strides[1], f"result {i} of {op}: strides {r.stride()}, fake {f.stride()}"


def copied_buffers(args):
    """The same views; only what an operator may write (vectors and scalars) is copied."""
    return tuple(a.clone() if isinstance(a, torch.Tensor) and a.dim() < 2 else a for a in args)


@OP
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_schema_is_honest(layout, op, kernels):
    """Nothing is written but the arguments the schema marks, those are, and no result shares memory with an argument."""
    schema = overload(op)._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    ever_written = [False] * len(written)
    for args in SAMPLES[op](layout, torch.float32, kernels.device):
        args = copied(args)
        before = copied(args)
        results = as_list(overload(op)(*args))
        for i, (a, b) in enumerate(zip(args, before, strict=True)):
            if not isinstance(a, torch.Tensor):
                continue
            changed = not same_bits(a, b)
            assert not changed or written[i], f"{op} writes {schema.arguments[i].name}"
            ever_written[i] |= changed
            for r in results:
                assert r.numel() == 0 or r.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()
    assert ever_written == written, f"{op} never writes what its schema marks"


@OP
def test_a_backward_is_refused(op, kernels):
    """Gradients live in the Functions alone: the raw operators have an autograd kernel that says so."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"fastconv::{op}", "Autograd") and not has(f"fastconv::{op}", "CompositeImplicitAutograd")
    assert torch.Tag.pt2_compliant_tag in overload(op).tags
    args = copied(next(iter(SAMPLES[op]("nchw", torch.float32, kernels.device))))
    leaf = next(a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
    leaf.requires_grad_()
    out = next(r for r in as_list(overload(op)(*args)) if r.numel() and r.is_floating_point())
    with pytest.raises(RuntimeError, match=f"derivative for fastconv::{op} is not implemented"):
        out.sum().backward()


@OP
def test_same_result_from_every_layout(op, kernels):
    """The memory layout of the arguments does not reach the values."""
    torch.manual_seed(5)
    dense = [as_list(overload(op)(*copied(a))) for a in SAMPLES[op]("nchw", torch.float32, kernels.device)]
    for layout in ("nhwc", "strided", "channel_slice", "offset"):
        torch.manual_seed(5)
        for i, args in enumerate(SAMPLES[op](layout, torch.float32, kernels.device)):
            for a, b in zip(dense[i], as_list(overload(op)(*copied_buffers(args))), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_offsets_and_skipped_results_are_what_the_schema_says(kernels):
    x = image((2, 5, 7, 6), device=kernels.device)
    out, offsets = overload("max_pool2d")(x, [3, 3], [2, 2], [1, 1], [1, 1], False, True)
    assert offsets.dtype is torch.uint8 and offsets.shape == out.shape and offsets.max() < 9
    assert memory_format(out) is memory_format(offsets) is torch.channels_last
    rows = torch.arange(4, device=x.device).view(-1, 1) * 2 - 1 + offsets // 3
    columns = torch.arange(3, device=x.device) * 2 - 1 + offsets % 3
    picked = x.flatten(2).gather(2, (rows * 6 + columns).flatten(2).long()).view_as(out)
    assert same_bits(picked, out), "offset r * S + s points at the maximum"
    assert overload("max_pool2d")(x, [3, 3], [2, 2], [1, 1], [1, 1], False, False)[1].shape == (0,)


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
def test_saved_statistics(training, kernels):
    """save_mean and save_invstd: fresh [C] tensors of the accumulate dtype, in both modes."""
    for dtype, acc in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        x = image((4, 5, 4, 3), dtype=dtype, device=kernels.device)
        w, b, mean, var, count = vectors(5, torch.float32, kernels.device)
        kept_mean, kept_var = mean.clone(), var.clone()
        _, save_mean, invstd = overload("batch_norm_act")(x, None, w, b, mean, var, count, training, 0.1, 1e-3, "relu")
        assert save_mean.dtype == invstd.dtype == acc and save_mean.shape == (5,)
        assert save_mean.data_ptr() != mean.data_ptr()
        used = x.float()
        expected = used.mean((0, 2, 3)) if training else kept_mean
        spread = used.var((0, 2, 3), unbiased=False) if training else kept_var
        torch.testing.assert_close(save_mean, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(invstd, (spread + 1e-3).rsqrt(), rtol=1e-5, atol=1e-6)


def test_cross_entropy_saves_the_log_sum_exp(kernels):
    x, t = (
        torch.randn(7, 5, device=kernels.device).bfloat16(),
        torch.tensor([0, 1, 2, 3, 4, -100, 1], device=kernels.device),
    )
    w = torch.rand(5, device=kernels.device).bfloat16()
    loss, lse, normalizer = overload("cross_entropy")(x, t, w, 1, -100, 0.0)
    assert loss.dtype is torch.bfloat16 and lse.dtype is normalizer.dtype is torch.float32
    torch.testing.assert_close(lse, x.float().logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalizer, w.float()[t[t >= 0]].sum(), rtol=1e-5, atol=1e-5)


def misuse(op, change, device):
    """The arguments of ``op``'s first sample with the ones in ``change`` replaced by a function of themselves."""
    args = list(next(SAMPLES[op]("nhwc", torch.float32, device)))
    names = [a.name for a in overload(op)._schema.arguments]
    for name, function in change.items():
        args[names.index(name)] = function(args[names.index(name)])
    return args


@pytest.mark.parametrize(
    ("op", "change", "error", "text"),
    (
        ("conv2d_bias_act", {"activation": lambda a: "swish"}, ValueError, "conv2d_bias_act: activation.*swish"),
        ("conv2d_bias_act", {"input": lambda t: t[0]}, RuntimeError, "conv2d_bias_act: input"),
        ("conv2d_bias_act", {"bias": lambda t: t[:2]}, RuntimeError, "conv2d_bias_act: bias"),
        ("conv2d_bias_act", {"weight": lambda t: t.double()}, RuntimeError, "conv2d_bias_act: weight"),
        ("conv2d_bias_act", {"residual": lambda t: t[:, :1]}, RuntimeError, "conv2d_bias_act: residual"),
        ("conv2d_bias_act", {"input": lambda t: t.int()}, RuntimeError, "conv2d_bias_act: input"),
        ("conv2d_backward", {"grad_output": lambda t: t[:, :1]}, RuntimeError, "conv2d_backward: grad_output"),
        ("act_bias_backward", {"saved": lambda t: t[:1]}, RuntimeError, "act_bias_backward: saved"),
        ("act_bias_backward", {"saved": lambda t: None}, RuntimeError, "act_bias_backward: saved"),
        ("batch_norm_act", {"weight": lambda t: t[:1]}, RuntimeError, "batch_norm_act: weight"),
        ("batch_norm_act", {"running_mean": lambda t: t[:1]}, RuntimeError, "batch_norm_act: running_mean"),
        ("batch_norm_act", {"residual": lambda t: t[:1]}, RuntimeError, "batch_norm_act: residual"),
        ("batch_norm_act_backward", {"mean": lambda t: t[:1]}, RuntimeError, "batch_norm_act_backward: mean"),
        ("conv2d_bn_act", {"bn_weight": lambda t: t[:1]}, RuntimeError, "conv2d_bn_act: bn_weight"),
        ("max_pool2d", {"input": lambda t: t[0]}, RuntimeError, "max_pool2d: input"),
        ("max_pool2d_backward", {"offsets": lambda t: t[:1]}, RuntimeError, "max_pool2d_backward: "),
        ("max_pool2d_backward", {"offsets": lambda t: t.int()}, RuntimeError, "max_pool2d_backward: offsets"),
        ("avg_pool2d_backward", {"input_size": lambda s: [70, 60]}, RuntimeError, "avg_pool2d_backward: "),
        ("cross_entropy", {"target": lambda t: t[:1]}, ValueError, r"cross_entropy: .*batch_size \(3\)"),
        ("cross_entropy", {"weight": lambda t: t[:1]}, RuntimeError, "cross_entropy: weight"),
        ("cross_entropy", {"target": lambda t: t + 5}, IndexError, ""),
    ),
    ids=lambda v: "-".join(v) if isinstance(v, dict) else str(v) if isinstance(v, str) and ":" not in v else "",
)  # fmt: skip
def test_raw_operators_check_their_arguments(op, change, error, text, kernels):
    """They are public through torch.ops: a wrong call must not read outside a tensor."""
    if error is IndexError and kernels.device != "cpu":
        pytest.skip("on a GPU this is a device-side assertion, as in stock PyTorch")
    with pytest.raises(error, match=text or None):
        overload(op)(*misuse(op, change, kernels.device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two devices are needed")
def test_a_scalar_on_another_device_is_refused(kernels):
    if kernels.device == "cpu":
        pytest.skip("the kernels and the scalar are on the CPU")
    with pytest.raises(RuntimeError, match="cross_entropy_backward: normalizer expected device cuda"):
        overload("cross_entropy_backward")(
            *misuse("cross_entropy_backward", {"normalizer": lambda t: t.cpu()}, kernels.device)
        )
