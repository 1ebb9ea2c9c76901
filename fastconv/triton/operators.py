"""The launchers as registered operators ``torch.ops.fastconv_triton.<op>``: opaque nodes with a fake implementation.

torch.compile(fullgraph=True), torch.export and FakeTensorMode see these, never the launchers' Python or the kernels.
Schemas come from the launchers' annotations; what batch norm updates in place is declared. Like the compiled ones
(csrc/schemas.h) they carry no autograd registration: gradients live in fastconv.autograd.

They have a namespace of their own because torch.ops.fastconv.<op> on CUDA tensors is the CUDA C++ kernel.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from . import _MODULES, impl, interpreting

NAMESPACE = "fastconv_triton"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_MUTATED = {"batch_norm_act": _BUFFERS, "conv2d_bn_act": _BUFFERS}


@functools.cache
def register(fakes: ModuleType) -> torch.library.Library:
    """Defines all of them, once: the library object has to live as long as the operators.

    fakes: fastconv.ops.fake, which is above this package.
    """
    library = torch.library.Library(NAMESPACE, "DEF")
    key = "CPU" if interpreting() else "CUDA"
    for op in _MODULES:
        launcher = impl(op)
        schema = torch.library.infer_schema(launcher, mutates_args=_MUTATED.get(op, ()))
        library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, launcher, key)
        torch.library.register_fake(f"{NAMESPACE}::{op}", getattr(fakes, f"_{op}"), lib=library)
    return library
