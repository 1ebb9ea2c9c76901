"""A fused model's evaluation without gradients as a program: the operators that its groups call, without the Python
between them.

The weights are read where they lie, at every call, and the operators are those of the eager path, so results are the
same bits and what is changed in place takes effect at once; what else the program rests on (modules, modes, hooks,
which tensors there are and where) is compared at every call. Anything unusual about a call runs eagerly.
"""

from __future__ import annotations

import dis
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _ext, _measured
from .._fuse import runtime
from .._fuse.module import EVALUATORS
from ..ops import current_backend
from .flatten import Flattener
from .forward import Lowering, geometry, nhwc
from .kernels import Kernels
from .network import Node, Refused, Value, Watch
from .program import Slot

_DTYPES = (torch.float32, torch.bfloat16)
_GROUPS = {"conv", "norm", "max_pool", "avg_pool", "adaptive_avg_pool"}
_KEEP_LAYOUT = _GROUPS | {"act", "add", "mul", "cat"}
_KEPT = 4  # programs of a model, by input shape
_REBUILT = 8  # programs that a shape may lose to changes of the model before it is left to the eager path


class EvaluationLowering(Lowering):
    """The raw operators that fastconv.functional calls, on the modules' own tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, Kernels(torch.device("cpu")))
        self.tensors: list[Tensor] = []  # what the calls are bound to
        self.channels_last: set[Value] = set()  # what the eager path has in this layout for certain

    def live(self, t: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
        if t is None:
            return None
        plain = type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout is torch.strided
        if not plain or t.dtype not in (self.dtype, *dtypes):
            raise Refused(f"a {type(t).__name__} of {t.dtype} on {t.device} beside an input of {self.dtype}")
        self.tensors.append(t)
        return t.detach()

    def norm(self, bn: nn.BatchNorm2d) -> list[Any]:
        """weight, bias and the running statistics; the count of batches, which evaluation leaves alone."""
        return [self.live(t, torch.float32) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)] + [None]

    def lower(self, node: Node) -> None:
        # PyTorch's own layers round by layout: theirs is channels_last behind a group, and unknown elsewhere.
        known = all(v in self.channels_last and not v.relaid for v in node.inputs)
        if node.stock and node.op in ("conv", "norm") and not known:
            raise Refused(f"PyTorch's own {node.op} runs before the first group, in a layout that is the eager path's")
        super().lower(node)
        if (known and node.op in _KEEP_LAYOUT) or (not node.stock and node.op in _GROUPS):
            self.channels_last.add(node.output)

    def _conv(self, node: Node, x: Any) -> Any:
        conv, bn, out = node.module, node.bn, self.build.slot()
        shape = geometry(node)
        where = [shape[0:2], shape[2:4], shape[4:6], shape[6]]
        given = [x, self.live(conv.weight), self.live(conv.bias), self.residual(node)]
        if node.stock:
            return self.build.returning("aten::conv2d", [*given[:3], *where])
        if bn is None:
            self.build.call("fastconv::conv2d_bias_act", [*given, *where, node.act, False], [out, None])
        else:
            momentum = 0.0 if bn.momentum is None else bn.momentum
            self.build.call(
                "fastconv::conv2d_bn_act",
                [*given, *self.norm(bn), *where, False, momentum, bn.eps, node.act, False], [out, None, None, None],
            )  # fmt: skip
        return out

    def _norm(self, node: Node, x: Any) -> Any:
        bn, out = node.bn, self.build.slot()
        momentum = 0.0 if bn.momentum is None else bn.momentum
        if node.stock:
            cudnn = torch.backends.cudnn.enabled
            return self.build.returning("aten::batch_norm", [x, *self.norm(bn)[:4], False, momentum, bn.eps, cudnn])
        self.build.call(
            "fastconv::batch_norm_act",
            [x, self.residual(node), *self.norm(bn), False, momentum, bn.eps, node.act], [out, None, None],
        )  # fmt: skip
        return out

    def _linear(self, node: Node, x: Any) -> Any:
        layer = node.module
        return self.build.returning("aten::linear", [x, self.live(layer.weight), self.live(layer.bias)])

    def library(self, node: Node) -> str:
        return "aten" if node.stock else super().library(node)

    def _max_pool(self, node: Node, x: Any) -> Any:
        o = node.options
        if node.stock:
            window = [list(o[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
            return self.build.returning("aten::max_pool2d", [x, *window, o["ceil_mode"]])
        if o["kernel_size"][0] * o["kernel_size"][1] > 256:
            raise Refused("a max-pool whose windows the eager path leaves to aten")
        return self.max_pool(node, x, None)

    def _adaptive_avg_pool(self, node: Node, x: Any) -> Any:
        if node.options.get("mean"):  # x.mean((2, 3)) in the model: the same operator, for the same bits
            return self.build.returning("aten::mean.dim", [x, [2, 3], True, None])
        return super()._adaptive_avg_pool(node, x)


class EvaluationFlattener(Flattener):
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


class EvaluationPlan:
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        network = EvaluationFlattener(model, False).network(tuple(x.shape))
        for m in network.modules:
            if m.__dict__.get("_fastconv_options", ("channels_last",))[0] != "channels_last":
                raise Refused("the model was fused in its own layouts")
        if len(network.output.shape) == 4:
            raise Refused("the result is a feature map, whose layout is the eager path's")
        lowering = EvaluationLowering(x.dtype)
        build = lowering.build
        self.entry = build.slot()
        lowering.at[network.input] = nhwc(build, self.entry)
        for node in network.nodes:
            lowering.lower(node)
        self.exit = lowering.at[network.output]
        if not isinstance(self.exit, Slot) or self.exit is self.entry:
            raise Refused("the model computes nothing")
        self.program, self.slots = build.finish(), build.slots
        for call, slots in build.last_uses(self.exit).items():
            self.program.release(call, slots)
        self.watch = Watch(network, lowering.tensors)
        self.lock = threading.Lock()  # the slots belong to one call at a time

    def run(self, x: Tensor) -> Tensor:
        self.program.put(self.entry.index, x)
        self.program.run()
        return self.program.take(self.exit.index)


@dataclass
class Refusal:
    """Why there is no program. What kept one away may go, so it is tried again, ever more seldom."""

    reason: str
    calls: int = 0
    until: int = 16


class Programs:
    """A model's programs by input shape and dtype: None after a shape's first call.

    They lie on the model, and belong to that one: copies of it start without any.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = None if model is None else weakref.ref(model)
        self.found: OrderedDict[Any, EvaluationPlan | Refusal | None] = OrderedDict()
        self.rebuilt = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Programs, ()

    @staticmethod
    def of(model: nn.Module) -> Programs:
        held = model.__dict__.get(_ATTRIBUTE)
        if held is None or held.model is None or held.model() is not model:
            held = model.__dict__[_ATTRIBUTE] = Programs(model)
        return held

    def plan(self, model: nn.Module, x: Tensor) -> EvaluationPlan | None:
        key = (x.shape, x.dtype)
        if key not in self.found:
            self.found[key] = None  # a shape that comes once is not worth a program
            if len(self.found) > _KEPT:
                self.found.popitem(last=False)
            return None
        self.found.move_to_end(key)
        plan = self.found[key]
        if isinstance(plan, EvaluationPlan):
            if not plan.watch.changed():
                return plan
            self.rebuilt += 1
            self.found[key] = None  # the eager path brings its own plans up to date
            return None
        if isinstance(plan, Refusal):
            plan.calls += 1
            if plan.calls < plan.until:
                return None
        if self.rebuilt >= _REBUILT:
            return None
        try:
            self.found[key] = made = EvaluationPlan(model, x)
            return made
        except Refused as error:
            self.found[key] = Refusal(str(error), 0, 4 * plan.until if isinstance(plan, Refusal) else 16)
            return None


_ATTRIBUTE = "_fastconv_evaluation"
_thread = threading.local()


def _usual(x: Any) -> bool:
    """Whether nobody but the caller sees, changes or measures the operators of this call."""
    return (
        not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.dtype in _DTYPES
        and x.dim() == 4
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.numel() > 0
        and not x.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and current_backend() in ("auto", "cpu")
        and _ext.HAS_EXT
        and not runtime.OBSERVERS
        and not runtime.profiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not torch.are_deterministic_algorithms_enabled()
        and _fixed_order(x)
    )


def _fixed_order(x: Tensor) -> bool:
    """Whether the operators' backends are the fixed order's: measurements may say otherwise, call by call."""
    if current_backend() == "cpu":
        return True
    if _measured.policy is not None or getattr(_measured.thread, "explaining", False):
        return False
    wish = _measured.wish()
    return wish == "0" or (wish == "" and len(_measured.store_of(x.device)) == 0)


def evaluate(model: nn.Module, x: Any, eager: Callable[..., Any]) -> Any:
    """model(x) in evaluation mode without gradients; ``eager(model, x)`` is what the fused model does by itself."""
    if getattr(_thread, "inside", False) or not _usual(x):
        return eager(model, x)
    plan = Programs.of(model).plan(model, x)
    if plan is not None and plan.lock.acquire(blocking=False):
        try:
            return plan.run(x)
        finally:
            plan.lock.release()
    _thread.inside = True  # the model's own fused containers need no programs of their own
    try:
        return eager(model, x)
    finally:
        _thread.inside = False


EVALUATORS.append(evaluate)
