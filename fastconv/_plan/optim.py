"""torch.optim's SGD, Adam and AdamW as a plan's own steps: their state stays in the optimizer, in its own format."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .network import Refused

_STATE = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


def refusal(optimizer: torch.optim.Optimizer) -> str:
    """Why a plan leaves the update to the optimizer itself; "" if it need not."""
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return f"the optimizer is a {kind.__name__}"
    if any(
        (
            optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks, _global_optimizer_pre_hooks,
            _global_optimizer_post_hooks,
        )
    ):  # fmt: skip
        return "the optimizer has step hooks"
    if "step" in optimizer.__dict__ and not hasattr(optimizer.step, "__wrapped__"):
        return "the optimizer's step was replaced"
    for group in optimizer.param_groups:
        for flag in ("maximize", "differentiable", "amsgrad"):
            if group.get(flag):
                return f"the optimizer has {flag}=True"
        if group.get("dampening"):
            return "SGD has a dampening"
        if kind is not torch.optim.SGD and any(p.device.type != "cpu" for p in group["params"]):
            for flag in ("fused", "capturable"):
                if group.get(flag):
                    return f"the optimizer counts its steps on the device ({flag}=True)"
    return ""


class PlannedOptimizer:
    """The state tensors and hyper-parameters that a plan's update calls are bound to."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: list[Tensor], device: torch.device | None = None
    ) -> None:
        self.optimizer = optimizer
        self.kind = "sgd" if type(optimizer) is torch.optim.SGD else "adam"
        wanted = {id(p) for p in parameters}
        self.groups: list[tuple[dict[str, Any], list[Tensor], Tensor]] = []
        self.of: dict[int, int] = {}
        for group in optimizer.param_groups:
            mine = [p for p in group["params"] if id(p) in wanted]
            for p in mine:
                dense = p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
                if p.dtype is not torch.float32 or not dense:
                    raise Refused("a parameter is not a dense float32 tensor")
                self.of[id(p)] = len(self.groups)
            self.groups.append(
                (group, mine, torch.zeros(7 if self.kind == "adam" else 4, dtype=torch.float64, device="cpu"))
            )
        # By group, what the calls are bound to: a device reads them while it works, so a captured step sees changes.
        away = device is not None and device.type != "cpu"
        self.hyper = [values.to(device) if away else values for _, _, values in self.groups]
        self.state: dict[int, list[Tensor]] = {}
        self.steps: list[Tensor] = []
        for group, mine, _ in self.groups:
            for p in mine:
                self.state[id(p)] = self._state(p, group)
        # What a step changes in place.
        self.written = [t for _, mine, _ in self.groups for p in mine for t in (p, *self.state[id(p)])]
        self.kinds = [self._kind_of(group) for group, _, _ in self.groups]
        self.own = [(p, optimizer.state[p]) for _, mine, _ in self.groups for p in mine]
        self.holders = list(optimizer.state.values())
        self.held = [
            (optimizer.state[p], name, tensor)
            for _, mine, _ in self.groups
            for p in mine
            for name, tensor in zip(_STATE[self.kind], self.state[id(p)], strict=False)
        ]

    def _kind_of(self, group: dict[str, Any]) -> tuple[bool, bool]:
        """What of a group's settings the calls depend on: whether there is state, and whether weights decay."""
        return self._keeps(group), bool(group["weight_decay"])

    def moves_without_gradient(self, parameter: Tensor, region: Tensor) -> bool:
        """Whether a step changes weights whose gradient is zero: by decay, or by state left in that region (a mask)."""
        if self.kinds[self.of[id(parameter)]][1]:
            return True
        return any(bool(state[..., region].any()) for state in self.state[id(parameter)])

    def _keeps(self, group: dict[str, Any]) -> bool:
        return self.kind == "adam" or bool(group["momentum"])

    def _state(self, p: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """The parameter's state, created as the optimizer would, in the parameter's own strides."""
        state = self.optimizer.state[p]
        if not self._keeps(group):
            return []
        for name in _STATE[self.kind]:
            held = state.get(name)
            if held is None:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            elif held.stride() != p.stride() or held.dtype is not torch.float32:
                state[name] = torch.empty_like(p, memory_format=torch.preserve_format).copy_(held)
        if self.kind == "adam":
            if not isinstance(state.get("step"), Tensor):
                state["step"] = torch.tensor(float(state.get("step", 0)), device="cpu")
            self.steps.append(state["step"])
        return [state[name] for name in _STATE[self.kind]]

    def outdated(self) -> bool:
        """Whether state or structure is no longer what the calls are bound to (a load_state_dict, a new group)."""
        optimizer = self.optimizer
        if len(optimizer.param_groups) != len(self.groups):
            return True
        for (group, _, _), now, kind in zip(self.groups, optimizer.param_groups, self.kinds, strict=True):
            if group is not now or self._kind_of(group) != kind:
                return True
        # The dicts are compared without looking each parameter up: a guard of every step.
        now = optimizer.state.values()
        if len(now) != len(self.holders) or not all(map(operator.is_, now, self.holders)):
            if any(optimizer.state.get(p) is not holder for p, holder in self.own):
                return True
            self.holders = list(now)  # of parameters that are not the plan's
        return any(holder.get(name) is not tensor for holder, name, tensor in self.held)

    def prepare(self) -> None:
        """Counts the step and writes the hyper-parameters of this step, schedulers' changes included."""
        if self.steps:
            torch._foreach_add_(self.steps, 1)
        for (group, mine, hyper), bound in zip(self.groups, self.hyper, strict=True):
            if not mine:
                continue
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            if self.kind == "sgd":
                values = [lr, float(group["momentum"]), decay, float(group["nesterov"])]
            else:
                beta1, beta2 = (float(b) for b in group["betas"])
                step = float(self.optimizer.state[mine[0]]["step"])
                decoupled = type(self.optimizer) is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
                keep, l2 = (1.0 - lr * decay, 0.0) if decoupled else (1.0, decay)
                values = [
                    lr / (1.0 - beta1**step), beta1, beta2, math.sqrt(1.0 - beta2**step), float(group["eps"]), keep, l2,
                ]  # fmt: skip
            if values == hyper.tolist():
                continue
            hyper.copy_(torch.tensor(values, dtype=torch.float64, device="cpu"))
            if bound is not hyper:
                # Pageable memory: the driver has read it when the call returns, and does not wait for the device.
                bound.copy_(hyper, non_blocking=True)

    def finished(self) -> None:
        """What a scheduler looks at to tell that the optimizer has stepped."""
        self.optimizer._opt_called = True

    def check_steps(self) -> None:
        """Parameters of one group share their bias corrections, and so must have taken as many steps."""
        for _, mine, _ in self.groups:
            if self.kind == "adam" and len({float(self.optimizer.state[p]["step"]) for p in mine}) > 1:
                raise Refused("the parameters of a group have taken different numbers of steps")
