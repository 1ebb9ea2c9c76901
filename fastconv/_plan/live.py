"""What the programs of a fused model's own calls share: they run the operators that its groups would call, on the
modules' own tensors, so what is changed in place takes effect at once."""

from __future__ import annotations

import dis
import math
from typing import Any

import torch
from torch import Tensor, nn

from .backward import BFLOAT16
from .flatten import Flattener
from .forward import geometry
from .network import Network, Node, Refused, Value

_GROUPS = {"conv", "norm", "max_pool", "avg_pool", "adaptive_avg_pool"}
_KEEP_LAYOUT = _GROUPS | {"act", "add", "mul", "cat", "drop_path"}


def settings(node: Node) -> list[Any]:
    """stride, padding, dilation and groups of a convolution, as operators take them."""
    g = geometry(node)
    return [g[0:2], g[2:4], g[4:6], g[6]]


class LiveTensors:
    """A lowering's tensors that the calls are bound to where they lie."""

    dtype: torch.dtype  # of the calls

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors: list[Tensor] = []
        self.channels_last: set[Value] = set()  # what the eager path has in this layout for certain
        self.wide: Value | None = None  # under bfloat16 autocast: the entry, in float32 as the parameters

    def half(self, parameter: Tensor | None) -> Any:
        """The parameter as the operators that autocast covers see it."""
        alias = self.live(parameter)
        return alias if self.wide is None or alias is None else self.cast(alias, BFLOAT16)

    def cast(self, value: Any, dtype: int) -> Any:
        return self.build.returning("aten::to.dtype", [value, dtype, False, False, None])

    def multiplied(self, node: Node, x: Any) -> Any:
        """The input of a convolution as it multiplies it."""
        return self.cast(x, BFLOAT16) if node.inputs[0] is self.wide else x

    def lower(self, node: Node) -> None:
        read = [*node.inputs, *([] if node.residual is None else [node.residual])]
        if self.wide is not None and self.wide in (read if node.op != "conv" else read[1:]):
            raise Refused(f"a {node.op} in float32 before the first convolution")
        if node.op == "max_pool" and not node.stock and math.prod(node.options["kernel_size"]) > 256:
            raise Refused("a max-pool whose windows the eager path leaves to aten")
        # PyTorch's own layers round by layout: theirs is channels_last behind a group, and unknown elsewhere.
        known = all(v in self.channels_last and not v.relaid for v in node.inputs)
        if node.stock and node.op in ("conv", "norm") and not known:
            raise Refused(f"PyTorch's own {node.op} runs before the first group, in a layout that is the eager path's")
        super().lower(node)
        if (known and node.op in _KEEP_LAYOUT) or (not node.stock and node.op in _GROUPS):
            self.channels_last.add(node.output)

    def live(self, t: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
        """The tensor's alias without gradient; of the calls' dtype, one of ``dtypes``, or float32 under autocast."""
        if t is None:
            return None
        plain = type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout is torch.strided
        allowed = (self.dtype, *dtypes, *(() if self.wide is None else (torch.float32,)))
        if not plain or t.dtype not in allowed:
            raise Refused(f"a {type(t).__name__} of {t.dtype} on {t.device} beside an input of {self.dtype}")
        self.tensors.append(t)
        return t.detach()


class LiveFlattener(Flattener):
    def network(self, shape: tuple[int, ...]) -> Network:
        network = super().network(shape)
        for m in network.modules:
            if m.__dict__.get("_fastconv_options", ("channels_last",))[0] != "channels_last":
                raise Refused("the model was fused in its own layouts")
        if len(network.output.shape) == 4:
            raise Refused("the result is a feature map, whose layout is the eager path's")
        return network

    def stock(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A container that fuse() has left alone runs its own Python in the eager path, which may do more."""
        if _has_effects(type(module).forward):
            raise Refused(f"{type(module).__name__}.forward may do more than compute its result")
        return super().stock(module, args, kwargs)


def _has_effects(function: Any) -> bool:
    """Whether a function's own code calls something for its effect, or stores elsewhere than in its local names."""
    before = ""
    for step in dis.get_instructions(function):
        if step.opname == "POP_TOP" and before.startswith("CALL"):
            return True
        if step.opname.startswith(("STORE_", "DELETE_")) and not step.opname.startswith(("STORE_FAST", "DELETE_FAST")):
            return True
        before = step.opname
    return False
