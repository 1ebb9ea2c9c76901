"""Ahead-of-time compilation of the Triton convolutions without a GPU: instructions, pipelining, spills.

The full table, every kernel and architecture, is tests/triton_resources.md, written by tests/triton_resources.py.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from fastconv import triton as backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
if backend.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton_resources as tool


def recorded(dtype, precision="ieee"):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        with tool.recording() as (label, found):
            tool.record_convolutions(label, dtype)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    return {f"{v.kernel.__name__}: {v.label}": (v, archs) for v, archs in found.items()}


def pick(variants, arch, *words):
    (found,) = [
        v for name, (v, archs) in variants.items()
        if arch in archs and all(w in name for w in words) and "sum_partials" not in name
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_sm_90_convolution_is_pipelined_wgmma(op, dtype):
    name = str(dtype).removeprefix("torch.")
    compiled = pick(recorded(dtype), 90, op, f" 3x3 {name} ").compile(90)
    ptx, ir = compiled.asm["ptx"], compiled.asm["ttgir"]
    kind = "f16" if dtype == torch.float16 else "bf16"
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.{kind}", ptx)
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx), "16-byte asynchronous copies"
    loop = ir[ir.find("scf.for") :]
    loop = loop[: loop.find("scf.yield")]
    assert "ttng.warp_group_dot" in loop and "async_copy_global_to_local" in loop
    assert not re.search(r"arith\.(div|rem)", loop), "no integer division in the main loop"
    # Loads of later chunks are in flight while this one is multiplied.
    assert int(re.search(r"async_wait .*num = (\d+)", loop).group(1)) >= 2
    assert tool.resources(compiled).local == 0, "spills"


@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_sm_90_pointwise_convolution_is_pipelined_tma_and_wgmma(op):
    with tool.recording() as (label, found):
        tool.record_convolutions(label, torch.bfloat16, "all")
    by_name = [v for v, archs in found.items() if v.kernel.__name__ == "conv_pointwise_kernel" and 90 in archs]
    (variant, *_) = [v for v in by_name if v.label.startswith(op)]
    compiled = variant.compile(90)
    ptx, ir = compiled.asm["ptx"], compiled.asm["ttgir"]
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16", ptx)
    assert "cp.async.bulk.tensor.2d.shared" in ptx and "mbarrier.try_wait" in ptx
    before, loop = ir[: ir.find("scf.for")], ir[ir.find("scf.for") :]
    # Tiles of two chunks or more are on their way before the loop begins: both operands each.
    assert before.count("async_tma_copy_global_to_local") >= 4
    assert loop.count("async_tma_copy_global_to_local") == 2 and "ttng.warp_group_dot" in loop
    assert tool.resources(compiled).local == 0


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_channels_in_eights_are_copied_16_bytes_at_a_time(op):
    compiled = pick(recorded(torch.bfloat16), 90, op, " 1x1 of eights bfloat16 ").compile(90)
    ptx = compiled.asm["ptx"]
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10", ptx) and "ld.global.b16" not in ptx
    assert tool.resources(compiled).local == 0, "spills"


def test_prologue_and_epilogue_do_not_spill():
    variants = recorded(torch.float16)
    for words in ("prologue", "residual"):
        found = tool.resources(pick(variants, 90, words).compile(90))
        assert found.local == 0 and found.tensor_core == "wgmma" and found.asynchronous == "cp.async"


def test_fp32_is_exact_unless_tf32_is_allowed():
    for precision, tensor_core in (("ieee", False), ("tf32", True)):
        found = pick(recorded(torch.float32, precision), 90, "fprop", " 3x3 float32 ", f" {precision} ")
        ptx = found.compile(90).asm["ptx"]
        assert bool(re.search(r"(wgmma|mma\.sync).*tf32", ptx)) == tensor_core
        assert tensor_core or "fma.rn.f32" in ptx


@pytest.mark.parametrize("arch", [80, 100, 120])
def test_other_architectures(arch):
    found = tool.resources(pick(recorded(torch.bfloat16), arch, "fprop", " 3x3 bfloat16 ").compile(arch))
    assert found.local == 0 and found.tensor_core in ("mma.sync", "tcgen05.mma") and found.asynchronous == "cp.async"
    assert found.shared <= tool._SHARED[arch]


def test_the_table_knows_every_kernel():
    """The tool that writes triton_resources.md still calls every launcher, and the page names every kernel."""
    from pathlib import Path

    with tool.recording() as (label, found):
        tool.record_the_rest(label, torch.bfloat16)
        tool.record_convolutions(label, torch.bfloat16, "all")
    recorded_names = {v.kernel.__name__ for v in found}
    sources = "".join(p.read_text() for p in (Path(backend.__file__).parent).glob("*.py"))
    kernels = set(re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", sources))
    assert kernels and recorded_names == kernels
    page = Path(tool.__file__).with_suffix(".md").read_text()
    assert all(f"| {name} |" in page for name in kernels)
