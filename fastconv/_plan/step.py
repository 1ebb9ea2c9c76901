"""The plans of a TrainStep: one per input shape, made anew when model or optimizer change under them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _ext
from .._fuse.module import FusedMixin
from ..ops import current_backend
from . import optim
from .backward import SCALAR_TYPES
from .network import Refused
from .training import TrainingPlan, loss_arguments

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

    def find(self, x: Tensor, y: Tensor) -> TrainingPlan | None:
        """The plan for this call; None, with the reason noted, where it has to run as the plain loop."""
        plan = self._usable(x) or self._find(x, y)
        if isinstance(plan, str):
            if plan != self.reason:
                log.info("TrainStep runs without a plan: %s", plan)
            self.reason = plan
            return None
        self.reason = ""
        return plan

    def _usable(self, x: Tensor) -> str:
        """Reasons that may come and go between calls."""
        step = self.step
        if not _ext.HAS_EXT:
            return _ext.EXT_REASON
        if not isinstance(step.model, FusedMixin):
            return "the model is not fused: fastconv.fuse(model, inplace=True) makes it so"
        if current_backend() not in ("auto", "cpu"):
            return f"the backend {current_backend()} was chosen, plans run cpu's kernels"
        if not step.model.training:
            return "the model is in evaluation mode"
        if step.scaler is not None:
            return "float16 needs a loss scale"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on around the step: use autocast_dtype"
        if type(x) is not Tensor or x.requires_grad or x.dtype is not torch.float32 or x.numel() == 0:
            return f"the input is no plain float32 tensor without gradient, but {type(x).__name__} of {x.dtype}"
        if torch.is_anomaly_enabled():
            return "anomaly detection is on"
        return ""

    def _find(self, x: Tensor, y: Tensor) -> TrainingPlan | str:
        step = self.step
        fused = not step.keep_grads and not optim.refusal(step.optimizer)
        key = (tuple(x.shape), tuple(y.shape), y.dtype, fused)
        plan = self.cache.get(key)
        stale = plan.outdated() if isinstance(plan, TrainingPlan) else plan is not None and self._changed()
        if stale:
            self.cache.clear()
            plan = None
        if plan is None:
            plan = self.cache[key] = self._make(x, y, fused)
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
        return [(id(m), m.training, len(m._forward_hooks)) for m in self.step.model.modules()]

    def _make(self, x: Tensor, y: Tensor, fused: bool) -> TrainingPlan | str:
        step = self.step
        dtype = step.autocast_dtype or torch.float32
        try:
            loss = loss_arguments(step.loss_fn)
            if dtype not in SCALAR_TYPES:
                raise Refused(f"plans train in float32 and bfloat16, not {dtype}")
            return TrainingPlan(step.model, loss, step.optimizer, dtype, fused, x, y)
        except Refused as error:
            self.outline = self._outline()
            return str(error)
