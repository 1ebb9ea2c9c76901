"""The Triton launchers as registered operators: opcheck, honest schemas and fakes, torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
from raw_ops_samples import SAMPLES, losses
from test_compile import CALLS, Net, compiled, data_once
from test_raw_ops import as_list, copied, copied_buffers
from test_triton_tolerance import DEVICE, require_triton
from torch._subclasses.fake_tensor import FakeTensorMode
from util import same_bits

import fastconv
import fastconv.functional as FF

require_triton()
OP = pytest.mark.parametrize("op", SAMPLES)


@pytest.fixture(autouse=True)
def triton_backend():
    torch._dynamo.reset()
    with fastconv.use_backend("triton"):
        yield
    torch._dynamo.reset()


def overload(op):
    return getattr(torch.ops.fastconv_triton, op).default


def samples(op, layout="nhwc", dtype=torch.float32):
    if op != "cross_entropy_backward":
        yield from SAMPLES[op](layout, dtype, DEVICE)
        return
    for x, t, w in losses(layout, dtype, DEVICE):
        for reduction in (0, 1, 2):
            loss, *saved = overload("cross_entropy")(x, t, w, reduction, -100, 0.1)
            yield (torch.randn_like(loss), x, t, w, *saved, reduction, -100, 0.1, [True, t.is_floating_point()])


def test_every_raw_operator_is_registered():
    names = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastconv_triton")}
    assert names == set(SAMPLES)


@OP
def test_opcheck(op):
    for i, args in enumerate(samples(op)):
        more = ("test_autograd_registration", "test_aot_dispatch_dynamic") if i < 1 else ()
        torch.library.opcheck(overload(op), args, test_utils=("test_schema", "test_faketensor", *more))


@OP
@pytest.mark.parametrize("layout", ("nchw", "nhwc", "strided"))
def test_fake_agrees_with_real(layout, op):
    for args in samples(op, layout, torch.float16):
        real = as_list(overload(op)(*copied_buffers(args)))
        with FakeTensorMode() as mode:
            fake = as_list(overload(op)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)))
        for i, (r, f) in enumerate(zip(real, fake, strict=True)):
            assert (r.shape, r.dtype, r.device) == (f.shape, f.dtype, f.device), f"result {i} of {op}{args[-4:]}"
            if r.numel():
                strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (r, f)]
                assert strides[0] == strides[1], f"result {i} of {op}: strides {r.stride()}, fake {f.stride()}"


@OP
def test_schema_is_honest(op):
    """What the schema marks is written, nothing else is, and no result shares memory with an argument."""
    schema = overload(op)._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    ever_written = [False] * len(written)
    for args in samples(op):
        args = copied(args)
        before = copied(args)
        results = as_list(overload(op)(*args))
        for i, (a, b) in enumerate(zip(args, before, strict=True)):
            if isinstance(a, torch.Tensor):
                changed = not same_bits(a, b)
                assert not changed or written[i], f"{op} writes {schema.arguments[i].name}"
                ever_written[i] |= changed
                addresses = {r.untyped_storage().data_ptr() for r in results if r.numel()}
                assert a.untyped_storage().data_ptr() not in addresses
    assert ever_written == written, f"{op} never writes what its schema marks"


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls(name):
    """fullgraph, forward and backward: the eager results, and the Triton operators as nodes of the graph."""
    from torch._dynamo.backends.common import aot_autograd

    call, wanted = CALLS[name]
    seen = []

    def look(module, example):
        seen.extend(f"{n.target} {n.args}" for n in module.graph.nodes)
        return module

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=look))):
        tensors = {n: t.to(DEVICE).requires_grad_() for n, t in data_once().items()}
        out = function(**tensors)
        results.append((out, *torch.autograd.grad(out.square().sum(), [tensors[n] for n in wanted])))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
        assert traced.stride() == eager.stride()
    forward = name.removesuffix("_eval").removesuffix("_probabilities")
    forward = {"same": "conv2d_bias_act", "conv2d_bias_relu": "conv2d_bias_act"}.get(forward, forward)
    assert any(f"fastconv_triton.{forward}" in node for node in seen), seen


def test_a_compiled_net_trains():
    """Running statistics, mutated inside the compiled graph, included."""
    states = []
    for step in (lambda net: net, compiled):
        torch.manual_seed(0)
        net = Net().to(DEVICE)
        forward = step(net)
        for _ in range(2):
            x, y = torch.randn(4, 3, 8, 8, device=DEVICE), torch.randint(5, (4,), device=DEVICE)
            FF.cross_entropy(forward(x), y).backward()
        states.append(net.state_dict() | {n: p.grad for n, p in net.named_parameters()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_export_with_a_dynamic_batch():
    net = Net().eval().to(DEVICE)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(net, (torch.randn(3, 3, 8, 8, device=DEVICE),), dynamic_shapes=shapes)
    assert any("fastconv_triton.conv2d_bias_act" in str(n.target) for n in program.graph.nodes)
    for n in (2, 5):
        x = torch.randn(n, 3, 8, 8, device=DEVICE)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)
