"""The ``triton`` backend: every raw operator as Triton kernels, with the signatures of ``torch.ops.fastconv.*``.

Importing this package costs nothing and needs no Triton; the kernels are imported at the first :func:`impl`. They run
on NVIDIA GPUs from compute capability 8.0 on, and with TRITON_INTERPRET=1 (set before the first import of triton) on
CPU tensors in Triton's interpreter, which is slow and there to prove the arithmetic.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

_MODULES = {
    "act_bias_backward": "act_bias_backward",
    "batch_norm_act": "batch_norm_act",
    "batch_norm_act_backward": "batch_norm_act_backward",
    "cross_entropy": "cross_entropy",
    "cross_entropy_backward": "cross_entropy",
    "max_pool2d": "max_pool2d",
    "max_pool2d_backward": "max_pool2d",
    "avg_pool2d": "avg_pool2d",
    "avg_pool2d_backward": "avg_pool2d",
    "adaptive_avg_pool2d": "avg_pool2d",
    "adaptive_avg_pool2d_backward": "avg_pool2d",
    "conv2d_bias_act": "conv2d",
    "conv2d_backward": "conv2d",
    "conv2d_bn_act": "conv2d",
}
_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


interpreting._dynamo_marked_constant = True  # an environment variable is none of a traced graph's guards


@functools.cache
def available() -> tuple[bool, str]:
    """(whether the kernels can run in this process, the reason or the place in words)."""
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:  # a triton that does not fit the machine's Python or C library
        return False, f"import triton failed: {error}"
    if interpreting():
        return True, f"Triton {version} interpreter on CPU tensors"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors)"
    if torch.version.hip is not None:
        return False, "the kernels are written for NVIDIA GPUs, torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return False, f"compute capability 8.0 or higher is needed, {torch.cuda.get_device_name()} has {major}.{minor}"
    return True, f"Triton {version} on {torch.cuda.get_device_name()}"


def cannot_run(op: str, tensors: tuple[Tensor | None, ...]) -> str:
    """Why this backend cannot run ``op`` on these tensors; "" where it can."""
    if op not in _MODULES:
        return f"there is no Triton kernel of {op}"
    device = "cpu" if interpreting() else "cuda"
    first = None
    for t in tensors:
        if t is None:
            continue
        if t.device.type != device:
            return f"a tensor is on {t.device.type}, the kernels run on {device}"
        if first is None:
            first = t.device
        if t.device != first:
            return f"tensors are on {first} and {t.device}"
        if t.is_floating_point() and t.dtype not in _DTYPES:
            return f"dtype {str(t.dtype).removeprefix('torch.')} is not supported"
        if t.layout is not torch.strided:
            return f"layout {t.layout} is not supported"
        if device == "cpu" and t.dtype == torch.bfloat16 and op.startswith("conv2d"):
            return "tl.dot in bfloat16 is wrong in Triton's interpreter"
    return ""


@functools.cache
def impl(op: str) -> Callable:
    """The launcher of ``op``: arguments and results of ``torch.ops.fastconv.<op>``. KeyError for another name."""
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[op]}"), op)
