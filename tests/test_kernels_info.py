"""python -m fastconv info --kernels: registers and stack of every compiled CUDA kernel."""

from __future__ import annotations

import re

import pytest

from fastconv import __main__ as program
from fastconv import _ext, _kernels

DUMP = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN8fastconv15max_pool_kernelI6__halfLi8EEEvNS_10PoolParamsIT_EE:
  REG:47 STACK:8 SHARED:2048 LOCAL:0 CONSTANT[0]:1096 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def compiled() -> list[_kernels.Kernel]:
    try:
        return _kernels.kernels()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_dump_is_read():
    name = "max_pool_kernel<fp16, 8>" if _kernels.shutil.which("c++filt") else DUMP.split("Function ")[1].split(":")[0]
    (kernel,) = _kernels.parse(DUMP, {name: (128, 4096)})
    assert (kernel.arch, kernel.registers, kernel.stack, kernel.static_shared) == ("sm_90a", 47, 8, 1024)
    assert (kernel.name, kernel.threads, kernel.dynamic_shared) == (name, 128, 4096)
    assert kernel.blocks == 65536 // (48 * 128)
    row = _kernels.table([kernel]).splitlines()[-1]
    assert row.split() == ["47", "+8", "/", "10", "128", "1024", "4096", *name.split()]


def test_resident_blocks_by_what_runs_out_first():
    assert _kernels.resident_blocks("sm_90a", 32, 256, 0) == 8, "threads"
    assert _kernels.resident_blocks("sm_90a", 32, 32, 0) == 32, "blocks"
    assert _kernels.resident_blocks("sm_120", 32, 32, 0) == 24
    assert _kernels.resident_blocks("sm_80", 255, 256, 0) == 1, "registers"
    assert _kernels.resident_blocks("sm_80", 32, 128, 40 * 1024) == 4, "shared memory: 164 KiB, 41 each"
    assert _kernels.resident_blocks("sm_30", 32, 128, 0) is None


def test_every_kernel_is_launched_as_the_table_says():
    """Threads and dynamic shared memory of every compiled kernel, and no row that stands for none of them."""
    found = compiled()
    launches = _kernels.launch_table(_ext.MODULE.kernel_launches())
    names = {k.name for k in found}
    assert {
        name for name in launches if name not in names and name not in {n.partition("<")[0] for n in names}
    } == set()
    for k in found:
        assert k.threads % 32 == 0 and 32 <= k.threads <= 1024
        assert k.blocks is None or k.blocks >= 1, f"{k.name} does not fit {k.arch}"
        # the convolutions live in dynamic shared memory, the others in static
        assert (k.dynamic_shared > 0) == k.name.startswith(("conv_gemm_kernel", "conv_wgrad_kernel")), k.name


def test_every_operator_has_its_kernels_for_every_architecture():
    found = compiled()
    names = {k.name.partition("<")[0] for k in found}
    wanted = {"conv_gemm_kernel", "conv_wgrad_kernel", "depthwise_kernel", "conv_reduce_kernel", "act_backward_kernel"}
    wanted |= {"bn_apply_kernel", "bn_backward_dx_kernel", "batch_norm_fold_kernel", "max_pool_kernel"}
    wanted |= {"avg_pool_kernel", "cross_entropy_kernel", "cross_entropy_backward_kernel"}
    assert wanted <= names
    archs = {k.arch for k in found}
    assert len(archs) == len(re.split(r"[;\s]+", _ext.build_info()["archs"]))
    for name in {k.name for k in found}:
        assert {k.arch for k in found if k.name == name} == archs


def test_no_convolution_in_16_bits_spills():
    """The tensor-core kernels that a network spends its time in keep everything in registers."""
    spilled = [
        k for k in compiled() if k.stack and "gemm" in k.name and "TensorTile" in k.name and "fp32" not in k.name
    ]
    assert not spilled, _kernels.table(spilled)


def test_the_command_prints_the_table_or_the_reason(capsys):
    status = program.main(["info", "--kernels"])
    text = capsys.readouterr().out
    assert ("kernels. By architecture: registers per thread" in text) if status == 0 else ("CUDA kernels: " in text)
