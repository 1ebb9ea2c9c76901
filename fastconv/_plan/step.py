"""The plans of a TrainStep: one per input shape, made anew when model or optimizer change under them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._fuse.module import FusedMixin
from . import optim
from .backward import SCALAR_TYPES
from .conv_backward import live_taps
from .kernels import Kernels, kernels
from .network import Refused
from .training import TrainingPlan, hooked, loss_arguments

if TYPE_CHECKING:
    from ..train import TrainStep

log = logging.getLogger("fastconv")

_KEPT = 8  # plans: each holds a step's activations


class StepPlans:
    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.cache: OrderedDict[Any, TrainingPlan | str] = OrderedDict()
        self.reason = ""
        self.outline: list[Any] = []
        self.versions: dict[int, int] = {}  # of the state that plans leave out in part, after the last step

    def find(self, x: Tensor, y: Tensor) -> TrainingPlan | None:
        """The plan for this call; None, with the reason noted, where it has to run as the plain loop."""
        chosen = kernels(self.step.device)
        plan = chosen if isinstance(chosen, str) else self._usable(x) or self._find(x, y, chosen)
        if isinstance(plan, str):
            if plan != self.reason:
                log.info("TrainStep runs without a plan: %s", plan)
            self.reason = plan
            return None
        self.reason = ""
        return plan

    def run(self, plan: TrainingPlan, x: Tensor, y: Tensor) -> Tensor:
        loss = plan.run(x, y)
        self.ran(plan)
        return loss

    def ran(self, plan: TrainingPlan) -> None:
        """To be told after each step of a plan."""
        self.versions = {id(t): t._version for _, state in plan.skips.values() for t in state}

    def _touched(self, plan: TrainingPlan) -> bool:
        """Whether someone else wrote to the state of taps that the plan leaves out since the last step."""
        state = [t for _, tensors in plan.skips.values() for t in tensors]
        return any(self.versions.get(id(t), t._version) != t._version for t in state)

    def _usable(self, x: Tensor) -> str:
        """Reasons that may come and go between calls."""
        step = self.step
        if not isinstance(step.model, FusedMixin):
            return "the model is not fused: fastconv.fuse(model, inplace=True) makes it so"
        if not step.model.training:
            return "the model is in evaluation mode"
        if step.scaler is not None:
            return "float16 needs a loss scale"
        if torch.is_autocast_enabled(step.device.type):
            return "autocast is on around the step: use autocast_dtype"
        if type(x) is not Tensor or x.requires_grad or x.dtype is not torch.float32 or x.numel() == 0:
            return f"the input is no plain float32 tensor without gradient, but {type(x).__name__} of {x.dtype}"
        if torch.is_anomaly_enabled():
            return "anomaly detection is on"
        return ""

    def _find(self, x: Tensor, y: Tensor, kernels: Kernels) -> TrainingPlan | str:
        step = self.step
        fused = not step.keep_grads and not optim.refusal(step.optimizer)
        key = (tuple(x.shape), tuple(y.shape), y.dtype, fused, kernels.library)
        plan = self.cache.get(key)
        if isinstance(plan, TrainingPlan):
            stale = plan.outdated() or self._touched(plan)
        else:
            stale = plan is not None and self._changed()
        if stale:
            self.cache.clear()
            plan = None
        if plan is None:
            plan = self.cache[key] = self._make(x, y, fused, kernels)
            if len(self.cache) > _KEPT:
                self.cache.popitem(last=False)
        else:
            self.cache.move_to_end(key)
        return plan

    def _changed(self) -> bool:
        """Whether a model that had no plan is worth another look: its modules or their hooks are not the same."""
        now = self._outline()
        changed, self.outline = now != self.outline, now
        return changed

    def _outline(self) -> list[Any]:
        model = self.step.model
        hooks = [hooked(p) for p in model.parameters()]
        return [*((id(m), m.training, len(m._forward_hooks)) for m in model.modules()), *hooks]

    def _make(self, x: Tensor, y: Tensor, fused: bool, kernels: Kernels) -> TrainingPlan | str:
        step = self.step
        dtype = step.autocast_dtype or torch.float32
        try:
            loss = loss_arguments(step.loss_fn)
            if dtype not in SCALAR_TYPES:
                raise Refused(f"plans train in float32 and bfloat16, not {dtype}")
            plan = TrainingPlan(step.model, loss, step.optimizer, dtype, fused, x, y, kernels)
            self._forget_narrower(plan)
            return plan
        except Refused as error:
            self.outline = self._outline()
            return str(error)

    def _forget_narrower(self, plan: TrainingPlan) -> None:
        """Drops plans that leave out taps which this one trains."""
        taps = {id(node.module.weight): live_taps(node) for node in plan.network.nodes if node.op == "conv"}
        for key, other in list(self.cache.items()):
            skips = other.skips.items() if isinstance(other, TrainingPlan) else ()
            if any(bool((taps[p] & ~live).any()) for p, (live, _) in skips if p in taps):
                del self.cache[key]
