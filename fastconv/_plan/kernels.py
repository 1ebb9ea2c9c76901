"""Which operators a plan calls, and where its memory lies."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .. import _ext
from ..ops import registry
from .network import Node


@dataclass(frozen=True)
class Kernels:
    """torch.ops.<library> and torch.ops.<library>_plan, on a device.

    A CPU's plan consumes each weight gradient inside the optimizer's step while it lies in cache. A GPU's is made for
    few launches: the statistics of a batch norm come out of its convolution, and one launch updates every parameter.
    """

    device: torch.device
    library: str = "fastconv"

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda" or self.library != "fastconv"

    @property
    def aside(self) -> bool:
        """Whether weight gradients run aside: nothing waits for them before the update."""
        return self.gpu and os.environ.get("FASTCONV_STREAMS", "2") != "1"

    def operator(self, op: str) -> str:
        """The operator's name in this library: ``fastconv::`` and ``fastconv_plan::`` stand for it, others stay."""
        namespace, _, name = op.partition("::")
        if namespace in ("fastconv", "fastconv_plan"):
            return f"{self.library}{namespace.removeprefix('fastconv')}::{name}"
        return op

    def limit(self, node: Node) -> str:
        """Why a GPU's kernels cannot run a node of this size; "" if they can."""
        if not self.gpu or node.op not in _LIMITED:
            return ""
        op, options = _LIMITED[node.op]
        settings = tuple(getattr(node.module, name) if node.op == "conv" else node.options[name] for name in options)
        shapes = [tuple(v.shape) for v in node.inputs]
        if node.op == "conv":
            shapes.append(tuple(node.module.weight.shape))
        return _ext.MODULE.cuda_limit(op, tuple(shapes), settings, (True, True))


_WINDOW = ("kernel_size", "stride", "padding")
_LIMITED = {  # node: operator, its settings
    "conv": ("conv2d_bias_act", ("stride", "padding", "dilation", "groups")),
    "norm": ("batch_norm_act", ()),
    "max_pool": ("max_pool2d", (*_WINDOW, "dilation", "ceil_mode")),
    "avg_pool": ("avg_pool2d", (*_WINDOW, "ceil_mode", "count_include_pad", "divisor_override")),
    "adaptive_avg_pool": ("adaptive_avg_pool2d", ("output_size",)),
}


def kernels(device: torch.device) -> Kernels | str:
    """The kernels of a plan on this device under the chosen backend, or the reason why there are none."""
    own, chosen = device.type, registry.current_backend()
    if own not in ("cpu", "cuda"):
        return f"plans run on a CPU or a CUDA device, the model is on {device}"
    if chosen in ("auto", own):
        state = registry.availability(own)
        return Kernels(device) if state else state.reason
    library = registry.library(chosen)
    if library == "fastconv" or not torch._C._dispatch_has_kernel(f"{library}_plan::update"):
        return f"the backend {chosen} was chosen, plans run {own}'s kernels"
    return Kernels(device, library)
