"""optimize_for_inference(model, example): a CNN as a static plan for serving."""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ._plan import Refused
from ._plan.inference import GraphedPlan, InferencePlan
from ._plan.kernels import kernels
from .fuse import fuse
from .ops import current_backend

log = logging.getLogger("fastconv")

_DTYPES = (torch.float32, torch.bfloat16)
_KEPT = 16  # plans, one per input shape


def optimize_for_inference(
    model: nn.Module, example_input: Tensor, *, dtype: torch.dtype | None = None, plan: bool | str = "auto"
) -> OptimizedModule:
    """A copy of the model for inference: batch norm inside the convolutions, weights packed, one static plan.

    model: any CNN, stock or from :func:`fastconv.fuse`; it is copied, in evaluation mode, and not changed. Later
    changes to its weights are not seen.
    example_input: a floating tensor of the shape that will be used most, on the model's device; its plan is made now.
    Other shapes get a plan each at their first call.
    dtype: what the convolutions multiply, torch.float32 or torch.bfloat16 (sums are fp32 either way); by default the
    model's own. Results have the dtype of the input.
    plan: "auto" makes plans where they were measured to be faster: on a CPU. True makes them on a GPU too, each in a
    CUDA graph, of the ``cuda`` kernels (no GPU has run one yet), and raises RuntimeError, with the reason, where there
    can be none; False makes none.

    The result is called like the model, never records gradients, and returns a tensor of the caller's own. What the
    plan cannot hold (several outputs, a module without a step) runs as
    ``fastconv.fuse(model)`` instead, and ``.plan_reason`` says why; it is "" where the plan runs.

    Raises TypeError if model or example_input is none, ValueError on another dtype or plan.

    >>> fast = fastconv.optimize_for_inference(model, torch.randn(1, 3, 224, 224))
    >>> logits = fast(images)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_for_inference: model expected torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"optimize_for_inference: example_input expected Tensor, got {type(example_input).__name__}")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"optimize_for_inference: dtype expected None, float32 or bfloat16, got {dtype}")
    if plan not in ("auto", True, False):
        raise ValueError(f'optimize_for_inference: plan expected "auto", True or False, got {plan!r}')
    optimized = OptimizedModule(model, dtype, plan)
    with torch.no_grad():
        optimized(example_input)
    return optimized


class OptimizedModule(nn.Module):
    """What :func:`optimize_for_inference` returns.

    ``plan_reason`` is why the last call ran without a plan, or "". ``model`` is the fused copy that such calls run.
    ``.to()``, ``load_state_dict()`` and unpickling make the plans anew; in-place changes to single weights do not.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, plan: bool | str = "auto") -> None:
        super().__init__()
        self.plan = plan
        model = copy.deepcopy(model).eval().requires_grad_(False)
        first = _first_float(model)
        self.dtype = dtype or (first.dtype if first is not None else torch.float32)
        # Batch norm is folded from the model as it came: rounding it to bf16 first would cost accuracy.
        self.model = fuse(model, inplace=True)
        self.plan_reason = ""
        self._fresh()
        super().train(False)

    def _fresh(self) -> None:
        self._plans: OrderedDict[Any, InferencePlan | GraphedPlan | str] = OrderedDict()
        self._lower: list[nn.Module] = []  # the copy in self.dtype that calls without a plan run
        self._lock = threading.Lock()  # the buffers belong to one call at a time

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_plans", "_lower", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._fresh()
        first = _first_float(self.model)
        if first is not None and first.dtype is not torch.float32:
            self.dtype = first.dtype  # .half(), .double(), .bfloat16()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._fresh()  # a plan is made at the first call after
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> OptimizedModule:
        if mode:
            raise RuntimeError("optimize_for_inference: the module is for inference; train the model it was made from")
        return super().train(mode)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"optimize_for_inference: input expected Tensor, got {type(x).__name__}")
        if torch.compiler.is_compiling():
            return self._without(x)
        with self._lock:
            plan = self._plan(x)
            if not isinstance(plan, str):
                self.plan_reason = ""
                out = plan.run(x if x.dtype is self.dtype else x.to(self.dtype))
        if isinstance(plan, str):
            if self.plan is True:
                raise RuntimeError(f"optimize_for_inference: plan=True expected what a plan can hold: {plan}")
            if plan != self.plan_reason:
                log.info("optimize_for_inference: no plan: %s", plan)
            self.plan_reason = plan
            return self._without(x)
        if out.dim() == 4 and x.dim() == 4 and not _only_channels_last(x):
            out = out.contiguous()  # as the model itself does: its results have the layout of its input
        return out.to(x.dtype)

    def _plan(self, x: Tensor) -> InferencePlan | GraphedPlan | str:
        autocast = torch.is_autocast_enabled(x.device.type)
        key = (tuple(x.shape), x.device, x.is_floating_point(), autocast, current_backend())
        plan = self._plans.get(key)
        if plan is None and x.is_cuda and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured, and this shape has no plan yet"
        if plan is None:
            plan = self._plans[key] = self._make(x)
            if len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _make(self, x: Tensor) -> InferencePlan | GraphedPlan | str:
        devices = {p.device for p in self.model.parameters()} | {x.device}
        if len(devices) > 1:
            return f"model and input are on several devices: {', '.join(sorted(map(str, devices)))}"
        if self.plan is False or (self.plan == "auto" and x.device.type != "cpu"):
            return f"no plan is wanted on {x.device}: plan=True asks for one"
        chosen = kernels(x.device)
        if isinstance(chosen, str):
            return chosen
        if self.dtype not in _DTYPES or not x.is_floating_point():
            return f"plans take float32 and bfloat16, not {self.dtype} on an input of {x.dtype}"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on: choose the plan's dtype with dtype= instead"
        if x.numel() == 0 or type(x) is not Tensor:
            return "the input is empty, or a tensor subclass"
        try:
            plan = InferencePlan(self.model, tuple(x.shape), self.dtype, chosen)
            return GraphedPlan(plan, x.to(self.dtype)) if x.is_cuda else plan
        except Refused as error:
            return str(error)

    def _without(self, x: Tensor) -> Tensor:
        first = _first_float(self.model)
        if first is None or first.dtype is self.dtype or not x.is_floating_point():
            return self.model(x)
        if not self._lower:
            self._lower.append(copy.deepcopy(self.model).to(self.dtype))
        out = self._lower[0](x.to(self.dtype))
        return out.to(x.dtype) if isinstance(out, Tensor) else out


def _first_float(model: nn.Module) -> Tensor | None:
    """The parameter whose dtype stands for the model's."""
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def _only_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


__all__ = ["OptimizedModule", "optimize_for_inference"]
