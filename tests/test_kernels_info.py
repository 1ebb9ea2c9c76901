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
  REG:47 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:1096 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def compiled() -> list[_kernels.Kernel]:
    try:
        return _kernels.kernels()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_dump_is_read():
    (kernel,) = _kernels.parse(DUMP)
    assert (kernel.arch, kernel.registers, kernel.stack, kernel.shared) == ("sm_90a", 47, 8, 1024)
    assert "max_pool_kernel" in kernel.name
    assert "47 +8" in _kernels.table([kernel])


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
    assert ("kernels; registers per thread" in text) if status == 0 else ("CUDA kernels: " in text)
