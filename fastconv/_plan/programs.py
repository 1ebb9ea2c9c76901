"""A fused model's calls as programs: from a shape's second call on, evaluation without gradients and training with them
run without the Python between the operators. Anything unusual about a call runs eagerly."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import _ext, _measured
from .._fuse import runtime
from .._fuse.module import PROGRAMS, PROGRAMS_OF
from ..ops import current_backend
from .evaluation import EvaluationPlan
from .gradient_lowering import Memory
from .gradients import GradientPlan
from .network import Refused

_EVALUATED = (torch.float32, torch.bfloat16)
_KEPT = 8  # programs of a model, by input shape and mode
_REBUILT = 8  # programs that a model may lose to its own changes before it is left to the eager path,
_WORTH = 32  # unless they have served for so many calls: making one takes as long as up to ten of them save


@dataclass
class Refusal:
    """Why there is no program. What kept one away may go, so it is tried again, ever more seldom."""

    reason: str
    calls: int = 0
    until: int = 16


class Programs:
    """A model's programs by mode, input shape and dtype: None after a shape's first call.

    They lie on the model, and belong to that one: copies of it start without any.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = None if model is None else weakref.ref(model)
        self.found: OrderedDict[Any, EvaluationPlan | GradientPlan | Refusal | None] = OrderedDict()
        self.rebuilt = 0
        self.memory = Memory()  # of the programs for training

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Programs, ()

    @staticmethod
    def of(model: nn.Module) -> Programs:
        held = model.__dict__.get(PROGRAMS_OF)
        if held is None or held.model is None or held.model() is not model:
            held = model.__dict__[PROGRAMS_OF] = Programs(model)
        return held

    def describe(self) -> list[tuple[str, str]]:
        """(call, why it has no program): no reason where it has one."""
        return [(_call(*key), self._reason(found)) for key, found in self.found.items()]

    def _reason(self, found: EvaluationPlan | GradientPlan | Refusal | None) -> str:
        if isinstance(found, (EvaluationPlan, GradientPlan)):
            return ""
        if isinstance(found, Refusal):
            return found.reason
        return "the model keeps changing" if self.rebuilt >= _REBUILT else "called once since the model changed"

    def plan(self, model: nn.Module, x: Tensor) -> EvaluationPlan | GradientPlan | None:
        if not model.training:
            self.memory.let_go()
        key = (x.shape, x.dtype, model.training, torch.is_autocast_enabled("cpu"))
        if key not in self.found:
            self.found[key] = None  # a shape that comes once is not worth a program
            if len(self.found) > _KEPT:
                self.found.popitem(last=False)
            return None
        self.found.move_to_end(key)
        plan = self.found[key]
        if isinstance(plan, (EvaluationPlan, GradientPlan)):
            if not plan.outdated():
                plan.calls += 1
                return plan
            self.rebuilt += plan.calls < _WORTH
            self.memory = Memory()
            self.found[key] = None  # the eager path brings its own plans up to date
            return None
        if isinstance(plan, Refusal):
            plan.calls += 1
            if plan.calls < plan.until:
                return None
        if self.rebuilt >= _REBUILT:
            return None
        try:
            made = GradientPlan(model, x, self.memory) if model.training else EvaluationPlan(model, x)
            self.found[key] = made
            return made
        except Refused as error:
            self.found[key] = Refusal(str(error), 0, 4 * plan.until if isinstance(plan, Refusal) else 16)
            return None


_thread = threading.local()


def _call(shape: torch.Size, dtype: torch.dtype, training: bool, lower: bool) -> str:
    mode = "training" if training else "evaluation"
    kind = f"{str(dtype).removeprefix('torch.')}{' under bfloat16 autocast' if lower else ''}"
    return f"{mode} on {'x'.join(map(str, shape))} {kind}"


def _usual(x: Any) -> bool:
    """Whether nobody but the caller sees, changes or measures the operators of this call."""
    return (
        not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.dim() == 4
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.numel() > 0
        and not x.requires_grad
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


def _rounded(x: Tensor) -> bool:
    """Whether autocast is off, or one that the programs know."""
    if not torch.is_autocast_enabled("cpu"):
        return True
    return x.dtype is torch.float32 and torch.get_autocast_dtype("cpu") is torch.bfloat16


def _evaluates(x: Tensor) -> bool:
    return x.dtype in _EVALUATED and _rounded(x)


def _trains(x: Tensor) -> bool:
    """Whether autograd would see each group's Function, and nobody asks for more: hooks on what is saved (activation
    checkpointing is such), anomaly detection, DistributedDataParallel's gradients while others are still computed."""
    return (
        x.dtype is torch.float32
        and _rounded(x)
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and torch._C._autograd._saved_tensors_hooks_is_enabled()
        and not torch.is_anomaly_enabled()
        and DistributedDataParallel._active_ddp_module is None
    )


def _fixed_order(x: Tensor) -> bool:
    """Whether the operators' backends are the fixed order's: measurements may say otherwise, call by call."""
    if current_backend() == "cpu":
        return True
    if _measured.policy is not None or getattr(_measured.thread, "explaining", False):
        return False
    wish = _measured.wish()
    return wish == "0" or (wish == "" and len(_measured.store_of(x.device)) == 0)


def run(model: nn.Module, x: Any, eager: Callable[..., Any]) -> Any:
    """model(x) in training with gradients, or in evaluation without them.

    eager: ``eager(model, x)`` is what the fused model does by itself.
    """
    if getattr(_thread, "inside", False) or not _usual(x) or not (_trains if model.training else _evaluates)(x):
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


PROGRAMS.append(run)
