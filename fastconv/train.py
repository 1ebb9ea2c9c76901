"""TrainStep: forward, loss, backward and optimizer step as one call that never waits for the device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._graphs import capture
from ._plan.step import StepPlans
from ._plan.training import TrainingPlan

log = logging.getLogger("fastconv")

_WARMUP = 3  # eager steps before a capture: they create .grad, optimizer state and library handles
_MAX_RECAPTURES = 3  # hyper-parameter changes after which the optimizer step stays outside the graph


class TrainStep:
    """One training step as one call: ``loss = step(x, y)``.

    model: the module to train, on one device, stock or from :func:`fastconv.fuse`.
    loss_fn: called as ``loss_fn(model(x), y)``, returns a scalar tensor.
    optimizer: any torch.optim.Optimizer over the model's parameters. Learning-rate schedulers and
    ``optimizer.state_dict()`` work as usual. Without a plan, ``p.grad`` holds the step's gradients after the call.
    autocast_dtype: None, torch.bfloat16 or torch.float16: the forward and the loss run under torch.autocast. With
    float16 the loss is scaled by a torch.amp.GradScaler (``step.scaler``); its inf check makes the optimizer wait for
    the device unless the optimizer is a fused one.
    cuda_graph: on a GPU the whole step is captured in a CUDA graph, one per input shape, and replayed. "auto" falls
    back to ordinary execution, with the reason logged, where the step cannot be captured; True raises instead; False
    never captures.
    keep_grads: False lets a plan consume each weight gradient at once, inside the optimizer's step, and leaves
    ``p.grad`` None; True leaves the step's gradients in ``p.grad``.

    plan: "auto" runs the step as a plan where plans were measured to be faster: on a CPU. True does so on a GPU too,
    inside the CUDA graph, and raises RuntimeError, with the reason, where there can be none; False never does.

    In fp32 or bf16 the step of a fused model can be a **plan**, one per input shape: its forward, cross-entropy,
    backward and SGD, Adam or AdamW as one call into C++ over static buffers. Another optimizer, or one with step hooks
    (gradient clipping, say), steps by itself after the plan, as with keep_grads=True. What a plan cannot hold (another
    loss, a module without a step, hooks) runs as the plain loop, and ``step.plan_reason`` says why; it is "" where the
    plan runs. Batch size may change, as may learning rate, weights (load_state_dict) and layers between steps. A GPU's
    plan keeps bf16 copies of the weights, which the optimizer's one launch refreshes, where autocast casts each weight
    and each gradient; it runs the ``cuda`` kernels throughout, whatever was measured. No GPU has run one yet.

    prepare: called as ``x, y = prepare(x, y)`` at the head of every step, without gradients: it turns what ``step`` is
    given into the batch, say indices into images from a data set on the device, cropped and normalised. On a GPU it is
    captured with the rest, so it must not wait for the device, and gives tensors of the same shapes wherever it is
    given such. Random numbers that it draws on the device are new ones at every replay.

    ``step(x, y)`` takes tensors on the model's device and returns the loss, detached, without a host sync: read it with
    ``.item()`` as seldom as you can. Every call trains on its own batch; capture and warm-up repeat none.

    Inside the graph the optimizer's hyper-parameters are constants: when one changes (a scheduler) the step is captured
    anew, and after three changes the optimizer runs outside the graph. SGD runs inside the graph, optimizers with a
    ``capturable`` flag only if it is set, others never. A model that is changed between steps (a layer replaced or
    frozen, a batch norm in evaluation mode) is captured anew.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture

    >>> step = fastconv.TrainStep(model, fnn.CrossEntropyLoss(), optimizer, autocast_dtype=torch.bfloat16)
    >>> for x, y in batches:
    ...     loss = step(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        autocast_dtype: torch.dtype | None = None,
        cuda_graph: bool | str = "auto",
        keep_grads: bool = False,
        plan: bool | str = "auto",
        prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"TrainStep: model expected torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"TrainStep: loss_fn expected a callable, got {type(loss_fn).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"TrainStep: optimizer expected torch.optim.Optimizer, got {type(optimizer).__name__}")
        if autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"TrainStep: autocast_dtype expected None, bfloat16 or float16, got {autocast_dtype}")
        if cuda_graph not in ("auto", True, False):
            raise ValueError(f'TrainStep: cuda_graph expected "auto", True or False, got {cuda_graph!r}')
        if plan not in ("auto", True, False):
            raise ValueError(f'TrainStep: plan expected "auto", True or False, got {plan!r}')
        if prepare is not None and not callable(prepare):
            raise TypeError(f"TrainStep: prepare expected a callable or None, got {type(prepare).__name__}")
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1:
            raise RuntimeError(
                f"TrainStep: model expected all parameters on one device, got {sorted(map(str, devices))}"
            )
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.device = devices.pop()
        if cuda_graph is True and self.device.type != "cuda":
            raise RuntimeError(f"TrainStep: cuda_graph=True expected a model on a CUDA device, got {self.device}")
        self.autocast_dtype = autocast_dtype
        self.scaler = torch.amp.GradScaler(self.device.type) if autocast_dtype is torch.float16 else None
        self.keep_grads, self.prepare = keep_grads, prepare
        self.plan_required = plan is True
        wanted = self.device.type == "cpu" if plan == "auto" else plan
        self._plans: StepPlans | None = StepPlans(self) if wanted else None
        self._graphs: _StepGraphs | None = None
        if self.device.type == "cuda" and cuda_graph is not False:
            self._graphs = _StepGraphs(self, required=cuda_graph is True)

    @property
    def captured(self) -> int:
        """How many CUDA graphs this step holds now (one per input shape; 0 on a CPU)."""
        return 0 if self._graphs is None else len(self._graphs.cache)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self._check("", x, y)
        if self._graphs is not None:
            return self._graphs(x, y)
        return self.plain(*self.prepared(x, y))

    def _check(self, whose: str, x: Any, y: Any) -> None:
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"TrainStep: {whose}{name} expected Tensor, got {type(value).__name__}")
            if value.device != self.device:
                raise RuntimeError(
                    f"TrainStep: {whose}{name} expected on {self.device} like the model, got {value.device}"
                )

    def prepared(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of what the step was given."""
        if self.prepare is None:
            return x, y
        with torch.no_grad():
            pair = self.prepare(x, y)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            got = f"{len(pair)} of them" if isinstance(pair, (tuple, list)) else type(pair).__name__
            raise TypeError(f"TrainStep: prepare expected to return a pair of tensors, got {got}")
        self._check("prepare's ", *pair)
        return pair[0], pair[1]

    @property
    def plan_reason(self) -> str:
        """Why the last step ran without a plan; "" if it ran with one."""
        if self._plans is None:
            return f"no plan is wanted on {self.device}: plan=True asks for one"
        return self._plans.reason

    def plan_of(self, x: Tensor, y: Tensor) -> TrainingPlan | None:
        """The plan for a batch of these shapes."""
        plan = None if self._plans is None else self._plans.find(x, y)
        if plan is None and self.plan_required:
            raise RuntimeError(f"TrainStep: plan=True expected a step that a plan can hold: {self.plan_reason}")
        return plan

    def plain(self, x: Tensor, y: Tensor) -> Tensor:
        """The step on a batch without a CUDA graph."""
        plan = self.plan_of(x, y)
        return self.eager(x, y) if plan is None else self._plans.run(plan, x, y)

    def eager(self, x: Tensor, y: Tensor) -> Tensor:
        """The step as a loop would make it, without graph or plan."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(x, y)
        self.update()
        return loss

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Forward, loss and backward; returns the detached loss."""
        autocast = contextlib.nullcontext()
        if self.autocast_dtype is not None:
            autocast = torch.autocast(self.device.type, dtype=self.autocast_dtype)
        with autocast:
            loss = self.loss_fn(self.model(x), y)
        if loss.dim() != 0:
            raise RuntimeError(f"TrainStep: loss_fn expected to return a scalar, got shape {list(loss.shape)}")
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def update(self) -> None:
        """The optimizer's step."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


class _StepGraphs:
    """CUDA graphs of a TrainStep, by input shape, sharing one memory pool."""

    def __init__(self, step: TrainStep, required: bool) -> None:
        self.step, self.required = step, required
        self.cache: dict[tuple, _Captured] = {}
        self.batches: dict[tuple, tuple[Tensor, Tensor] | None] = {}  # shapes seen; what prepare made of such tensors
        self.calls, self.recaptures = 0, 0
        self.stream = torch.cuda.Stream(step.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.refused = ""
        groups, plain = step.optimizer.param_groups, type(step.optimizer) is torch.optim.SGD
        # A GradScaler's step reads the inf flag on the host; an optimizer that counts its steps there would be captured
        # with the count of one step, unless it has a capturable flag that is set.
        self.update_inside = step.scaler is None and all(g.get("capturable", plain) for g in groups)
        self.hyper = self._hyper_parameters()
        self.outline = self._outline()

    def _hyper_parameters(self) -> list[tuple]:
        groups = self.step.optimizer.param_groups
        return [tuple(v for k, v in sorted(g.items()) if k != "params" and not isinstance(v, Tensor)) for g in groups]

    def _outline(self) -> list[tuple]:
        """What of the model a graph holds as it was at the capture: its layers, their modes, its parameters' memory."""
        model = self.step.model
        return [
            *((id(m), m.training) for m in model.modules()),
            *((p.data_ptr(), p.requires_grad) for p in model.parameters()),
        ]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        step = self.step
        if self.refused:
            return step.plain(*step.prepared(x, y))
        key = (x.shape, x.stride(), x.dtype, y.shape, y.dtype, step.model.training)
        # Every new shape takes one step outside a graph: it loads kernels, picks algorithms, compiles what is compiled
        # when it is first called, and shows what prepare makes of it.
        if self.calls <= _WARMUP or key not in self.batches:
            # On the side stream, so that nothing the capture reuses was first allocated for the default stream.
            self.stream.wait_stream(torch.cuda.current_stream(step.device))
            with torch.cuda.stream(self.stream):
                batch = step.prepared(x, y)
                loss = step.plain(*batch)
            torch.cuda.current_stream(step.device).wait_stream(self.stream)
            loss.record_stream(torch.cuda.current_stream(step.device))
            self.batches[key] = None if step.prepare is None else batch
            return loss
        batch = self.batches[key] or (x, y)
        plan = step.plan_of(*batch)
        if plan is None:  # a plan's optimizer reads its numbers from the device, or steps outside the graph
            self._forget_if_changed()
        if key not in self.cache or self.cache[key].plan is not plan:
            try:
                self.cache[key] = _Captured(self, x, y, plan, batch)
            except RuntimeError as error:
                # Nothing of a failed capture was executed: the batch is trained on below, outside a graph.
                if self.required:
                    raise
                self.refused = str(error)
                log.warning("TrainStep runs without a CUDA graph: %s", error)
                return step.plain(*step.prepared(x, y))
        return self.cache[key].replay(x, y)

    def _forget_if_changed(self) -> None:
        outline = self._outline()
        if outline != self.outline:
            self.outline = outline
            self.cache.clear()
        if not self.update_inside:
            return
        now = self._hyper_parameters()
        if now != self.hyper:
            self.hyper = now
            self.cache.clear()
            self.recaptures += 1
            if self.recaptures > _MAX_RECAPTURES:
                self.update_inside = False
                log.info("TrainStep: the optimizer's hyper-parameters keep changing; its step leaves the graph")


class _Captured:
    """One captured step: static inputs, the graph, its loss and its gradients.

    plan: the graph holds the plan's calls, and what the plan does on the host around them is done at every replay.
    batch: of the shapes that x and y are prepared to.
    """

    def __init__(
        self, graphs: _StepGraphs, x: Tensor, y: Tensor, plan: TrainingPlan | None, batch: tuple[Tensor, Tensor]
    ) -> None:
        step = self.step = graphs.step
        self.plan, self.update_inside = plan, graphs.update_inside
        self.x, self.y = x.clone(), y.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Gradients are allocated inside the graph's pool: the backward must find none to add to.
        step.optimizer.zero_grad(set_to_none=True)
        with capture(self.graph, graphs.pool, graphs.stream):
            pair = step.prepared(self.x, self.y)
            sizes, before = ([list(t.shape) for t in tensors] for tensors in (pair, batch))
            if sizes != before:
                raise RuntimeError(f"TrainStep: prepare expected to return the sizes of before, {before}, got {sizes}")
            if plan is not None:
                self.loss = plan.launch(*pair)
                return
            self.loss = step.backward(*pair)
            if self.update_inside:
                step.update()
        self.grads = [(p, p.grad) for p in step.model.parameters() if p.grad is not None]

    def replay(self, x: Tensor, y: Tensor) -> Tensor:
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        if self.plan is not None:
            self.plan.before()
            self.graph.replay()
            self.plan.after(replayed=True)  # an optimizer that is not the plan's own steps here, outside the graph
            self.step._plans.ran(self.plan)
            return self.loss.clone()
        self.graph.replay()
        for p, grad in self.grads:
            p.grad = grad  # another shape's graph, or the caller's zero_grad, may have put something else there
        if not self.update_inside:
            self.step.update()
        return self.loss.clone()
