"""Training plans: forward, loss, backward and the optimizer's update as one program.

Backward calls are emitted in the reverse order of the nodes. A convolution's weight gradient is consumed by the
optimizer while it lies in cache, after the data gradient has read the old weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF
from .. import nn as fnn
from .forward import ATEN_ACTIVATIONS, Lowering, geometry, nhwc
from .graph import Flattener, Network, Node, Refused, Value, same_state
from .optim import PlannedOptimizer
from .program import Buffer, Slot

SCALAR_TYPES = {torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType, as operators take it
_FLOAT32, _BFLOAT16 = 6, 15
_REDUCTION = {"mean": 1, "sum": 2}
_SAVES_OUTPUT = {"relu", "relu6", "leaky_relu", "sigmoid", "tanh"}


def loss_arguments(loss_fn: Callable[..., Any]) -> list[Any]:
    """weight, reduction, ignore_index and label_smoothing of a cross-entropy; Refused for another loss."""
    if loss_fn in (F.cross_entropy, FF.cross_entropy):
        return [None, 1, -100, 0.0]
    if type(loss_fn) in (nn.CrossEntropyLoss, fnn.CrossEntropyLoss) and not loss_fn._forward_hooks:
        if loss_fn.reduction not in _REDUCTION:
            raise Refused(f"the loss has reduction={loss_fn.reduction!r}")
        if loss_fn.weight is not None and loss_fn.weight.requires_grad:
            raise Refused("the loss trains its class weights")
        smoothing = float(loss_fn.label_smoothing)
        return [loss_fn.weight, _REDUCTION[loss_fn.reduction], loss_fn.ignore_index, smoothing]
    raise Refused(f"the loss is {getattr(loss_fn, '__name__', type(loss_fn).__name__)}, a plan has cross-entropy")


class TrainingLowering(Lowering):
    """optimizer None: gradients are left in ``grads``, by parameter."""

    def __init__(self, network: Network, dtype: torch.dtype, optimizer: PlannedOptimizer | None) -> None:
        super().__init__(dtype)
        self.network, self.optimizer = network, optimizer
        self.halves: dict[int, tuple[Tensor, Tensor]] = {}  # parameter, its copy in self.dtype
        self.grads: dict[int, tuple[Tensor, Tensor]] = {}  # parameter, its gradient
        self.small: list[tuple[Tensor, Any]] = []  # parameters whose gradients are updated together at the end
        self.tape: list[tuple[Node, Callable[[Any], None]]] = []
        self.needs: dict[Value, bool] = {network.input: False}
        self.grad_at: dict[Value, Any] = {}
        self.shared: set[int] = set()  # gradients that two values read: nothing may be written over them
        self.seen: set[int] = set()

    # --- parameters ---

    def use(self, *parameters: Tensor | None) -> bool:
        """Notes parameters of a node; whether one of them is trained. Each may be used once."""
        for p in parameters:
            if p is None:
                continue
            if id(p) in self.seen:
                raise Refused("a parameter is used by several layers")
            self.seen.add(id(p))
            if p.requires_grad and p.dtype is not torch.float32:
                raise Refused(f"a trained parameter is {p.dtype}")
        return any(p is not None and p.requires_grad for p in parameters)

    def half(self, parameter: Tensor) -> Tensor:
        """What the kernels multiply by: the parameter itself in fp32, else its copy."""
        if parameter.dtype is self.dtype:
            return parameter.detach()
        if id(parameter) not in self.halves:
            made = torch.empty_like(parameter, dtype=self.dtype, memory_format=torch.preserve_format)
            self.halves[id(parameter)] = parameter, made
        return self.halves[id(parameter)][1]

    def updates(self, parameter: Tensor) -> bool:
        return self.optimizer is not None and id(parameter) in self.optimizer.of

    def gradient(self, parameter: Tensor | None, place: Any) -> None:
        """Hands a small gradient on: to the optimizer's last call, or to p.grad."""
        if parameter is None or not parameter.requires_grad:
            return
        if self.optimizer is None:
            self.build.call("aten::copy_", [self.kept(parameter), place, False], [None])
        elif self.updates(parameter):
            self.small.append((parameter, place))

    def kept(self, parameter: Tensor) -> Tensor:
        grad = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        self.grads[id(parameter)] = parameter, grad
        return grad

    # --- gradients of values ---

    def wants(self, value: Value | None) -> bool:
        return value is not None and self.needs[value]

    def give(self, value: Value, place: Any) -> None:
        if not self.wants(value):
            return
        if value in self.grad_at:
            place = self.build.returning("aten::add.Tensor", [self.grad_at[value], place, 1])
        self.grad_at[value] = place

    def share(self, place: Any) -> Any:
        self.shared.add(id(place))
        return place

    # --- the program ---

    def program(self, target: Any, loss: list[Any]) -> Slot:
        """Emits everything after the entry; returns the loss."""
        for node in self.network.nodes:
            self.lower(node)
        logits = self.at[self.network.output]
        low = self.dtype is not torch.float32
        if low:
            logits = self.build.returning("aten::to.dtype", [logits, _FLOAT32, False, False, None])
        result, lse, normalizer, grad = (self.build.slot() for _ in range(4))
        weight = None if loss[0] is None else loss[0].float()
        self.build.call("fastconv::cross_entropy", [logits, target, weight, *loss[1:]], [result, lse, normalizer])
        self.build.call(
            "fastconv::cross_entropy_backward",
            [torch.ones(()), logits, target, weight, lse, normalizer, *loss[1:], [True, False]], [grad, None],
        )  # fmt: skip
        if low:
            grad = self.build.returning("aten::to.dtype", [grad, _BFLOAT16, False, False, None])
        if len(self.network.output.shape) == 4:
            grad = nhwc(self.build, grad)
        self.give(self.network.output, grad)
        for node, backward in reversed(self.tape):
            if node.output in self.grad_at:
                backward(self.grad_at.pop(node.output))
        self._finish_small()
        return result

    def _finish_small(self) -> None:
        by_group: dict[int, list[tuple[Tensor, Any]]] = {}
        for parameter, place in self.small:
            by_group.setdefault(self.optimizer.of[id(parameter)], []).append((parameter, place))
        for index, pairs in by_group.items():
            for low in (False, True):  # a list of halves is for all or for none
                mine = [(p, g) for p, g in pairs if (id(p) in self.halves) == low]
                if not mine:
                    continue
                state = [t for p, _ in mine for t in self.optimizer.state[id(p)]]
                self.build.call(
                    "fastconv_plan::update",
                    [
                        [p.detach() for p, _ in mine], [g for _, g in mine], state,
                        len(state) // len(mine), [self.halves[id(p)][1] for p, _ in mine if low],
                        self.optimizer.groups[index][2], self.optimizer.kind,
                    ],
                )  # fmt: skip

    def lower(self, node: Node) -> None:
        super().lower(node)
        trained = False
        if node.module is not None and not isinstance(node.module, (nn.MaxPool2d, nn.AvgPool2d)):
            trained |= self.use(node.module.weight, node.module.bias)
        if node.bn is not None:
            trained |= self.use(node.bn.weight, node.bn.bias)
        read = (*node.inputs, *([] if node.residual is None else [node.residual]))
        self.needs[node.output] = trained or any(self.needs[v] for v in read)

    # --- convolution and batch norm ---

    def _conv(self, node: Node, x: Any) -> Any:
        conv, bn = node.module, node.bn
        if not conv.weight.is_contiguous(memory_format=torch.channels_last):
            hint = "model.to(memory_format=torch.channels_last) makes it so"
            raise Refused(f"a convolution's weight is not channels_last: {hint}")
        weight, bias = self.half(conv.weight), conv.bias
        out = self.own(node.output)
        residual = self.residual(node)
        shift = None if bias is None else bias.detach()
        common = [x, weight, None, None, None, shift]
        if bn is None:
            preact = None if node.act in _SAVES_OUTPUT or node.act == "identity" else self.own(node.output)
            self.build.call("fastconv_plan::conv2d", [*common, residual, geometry(node), node.act, preact, out])

            def backward(grad: Any) -> None:
                self._act_bias(node, grad, out if preact is None else preact, x, bias)
        else:
            raw = self.own(node.output)
            self.build.call("fastconv_plan::conv2d", [*common, None, geometry(node), "identity", None, raw])
            finish = self._normalise(node, raw, out, residual)

            def backward(grad: Any) -> None:
                dz = finish(grad)
                if bias is not None and bias.requires_grad:
                    bias_grad = self.build.slot()
                    self.build.call(
                        "fastconv::act_bias_backward", [dz, None, "identity", [False, True]], [None, bias_grad]
                    )
                    self.gradient(bias, bias_grad)
                self._conv_backward(node, dz, x)

        self.tape.append((node, backward))
        return out

    def _act_bias(self, node: Node, grad: Any, saved: Any, x: Any, bias: Tensor | None) -> None:
        dz, bias_grad = grad, self.build.slot()
        identity = node.act == "identity"
        wants_bias = bias is not None and bias.requires_grad
        if not identity:
            dz = self.build.slot()
        if not identity or wants_bias:
            self.build.call(
                "fastconv::act_bias_backward",
                [grad, None if identity else saved, node.act, [not identity, wants_bias]],
                [None if identity else dz, bias_grad],
            )
        if wants_bias:
            self.gradient(bias, bias_grad)
        if self.wants(node.residual):
            self.give(node.residual, self.share(dz))
        self._conv_backward(node, dz, x)

    def _conv_backward(self, node: Node, dz: Any, x: Any) -> None:
        value, weight, shape = node.inputs[0], node.module.weight, geometry(node)
        used = self.half(weight)
        if self.wants(value):
            before = self.grad_at.get(value)
            own = isinstance(before, Buffer) and id(before) not in self.shared
            into = before if own else self.own(value)
            self.build.call("fastconv_plan::conv2d_input_grad", [dz, used, before, shape, into])
            self.grad_at[value] = into
        if not weight.requires_grad:
            return
        if self.optimizer is None:
            self.build.call("fastconv_plan::conv2d_weight_grad", [dz, x, used, shape, self.kept(weight)])
        elif self.updates(weight):
            state, index = self.optimizer.state[id(weight)], self.optimizer.of[id(weight)]
            half = used if id(weight) in self.halves else None
            self.build.call(
                "fastconv_plan::conv2d_weight_grad_update",
                [dz, x, used, shape, weight.detach(), state, half, self.optimizer.groups[index][2],
                 self.optimizer.kind],
            )  # fmt: skip

    def _normalise(self, node: Node, raw: Any, out: Buffer, residual: Any) -> Callable[[Any], Any]:
        """Emits out = act(bn(raw) + residual); returns what emits its backward and gives the gradient of raw."""
        bn, build = node.bn, self.build
        track = bn.track_running_stats and bn.running_mean is not None
        running = (bn.running_mean, bn.running_var, bn.num_batches_tracked) if track else (None, None, None)
        weight, bias = (None if v is None else v.detach() for v in (bn.weight, bn.bias))
        mean, invstd = build.slot(), build.slot()
        momentum = bn.momentum if bn.momentum is None or track else 0.0
        build.call(
            "fastconv_plan::batch_norm",
            [raw, residual, weight, bias, *running, momentum, bn.eps, node.act, out], [mean, invstd],
        )  # fmt: skip
        from_output = node.act in _SAVES_OUTPUT
        recompute = not from_output and node.act != "identity"

        def backward(grad: Any) -> Any:
            dz, dweight, dbias = self.own(node.output), build.slot(), build.slot()
            dres = None
            if self.wants(node.residual) and node.act == "identity":
                self.give(node.residual, self.share(grad))  # the sum hands its gradient on as it is
            elif self.wants(node.residual):
                # In place of the gradient that it comes from, where nothing else reads that; a 16-bit gradient through
                # another activation is read once more.
                plain = self.dtype is torch.float32 or node.act == "relu"
                own = plain and isinstance(grad, Buffer) and id(grad) not in self.shared
                dres = grad if own else self.own(node.output)
            build.call(
                "fastconv_plan::batch_norm_backward",
                [grad, raw, out if from_output else None, residual if recompute else None, weight, bias, mean, invstd,
                 node.act, dz, dres],
                [dweight, dbias],
            )  # fmt: skip
            self.gradient(bn.weight, dweight)
            self.gradient(bn.bias, dbias)
            if dres is not None:
                self.give(node.residual, dres)
            return dz

        return backward

    def _norm(self, node: Node, x: Any) -> Any:
        out = self.own(node.output)
        finish = self._normalise(node, x, out, self.residual(node))
        self.tape.append((node, lambda grad: self.give(node.inputs[0], finish(grad))))
        return out

    # --- the rest ---

    def _linear(self, node: Node, x: Any) -> Any:
        layer, build = node.module, self.build
        weight, bias = self.half(layer.weight), None if layer.bias is None else self.half(layer.bias)

        def backward(grad: Any) -> None:
            if self.wants(node.inputs[0]):
                self.give(node.inputs[0], build.returning("aten::mm", [grad, weight]))
            if layer.weight.requires_grad:
                turned = build.returning("aten::t", [grad])
                self.gradient(layer.weight, build.returning("aten::mm", [turned, x]))
            if layer.bias is not None and layer.bias.requires_grad:
                total = build.returning("aten::sum.dim_IntList", [grad, [0], False, _FLOAT32])
                self.gradient(layer.bias, total)

        self.tape.append((node, backward))
        return build.returning("aten::linear", [x, weight, bias])

    def _max_pool(self, node: Node, x: Any) -> Any:
        o, offsets = node.options, self.build.slot()
        window = [list(o[key]) for key in ("kernel_size", "stride", "padding", "dilation")]
        size = list(node.inputs[0].shape)[2:]
        self._taped(node, "fastconv::max_pool2d_backward", lambda g: [g, offsets, size, *window, True])
        return self.max_pool(node, x, offsets)

    def _avg_pool(self, node: Node, x: Any) -> Any:
        o = node.options
        window = [list(o[key]) for key in ("kernel_size", "stride", "padding")]
        rest = [o["ceil_mode"], o["count_include_pad"], o["divisor_override"], True]
        size = list(node.inputs[0].shape)[2:]
        self._taped(node, "fastconv::avg_pool2d_backward", lambda g: [g, size, *window, *rest])
        return super()._avg_pool(node, x)

    def _adaptive_avg_pool(self, node: Node, x: Any) -> Any:
        size = list(node.inputs[0].shape)[2:]
        self._taped(node, "fastconv::adaptive_avg_pool2d_backward", lambda g: [g, size, True])
        return super()._adaptive_avg_pool(node, x)

    def _taped(self, node: Node, op: str, arguments: Callable[[Any], list[Any]]) -> None:
        self.tape.append((node, lambda grad: self.give(node.inputs[0], self.build.returning(op, arguments(grad)))))

    def _reshape(self, node: Node, x: Any) -> Any:
        def backward(grad: Any) -> None:
            shape = list(node.inputs[0].shape)
            back = self.build.returning("aten::reshape", [grad, shape])
            self.give(node.inputs[0], nhwc(self.build, back) if len(shape) == 4 else back)

        self.tape.append((node, backward))
        return super()._reshape(node, x)

    def _act(self, node: Node, x: Any) -> Any:
        out = super()._act(node, x)
        name, options = node.act, ATEN_ACTIVATIONS[node.act][1]
        by_output = {"relu": ("aten::threshold_backward", [0.0]), "sigmoid": ("aten::sigmoid_backward", []),
                     "tanh": ("aten::tanh_backward", [])}  # fmt: skip
        if name in by_output:
            op, rest = by_output[name]
            self._taped(node, op, lambda g: [g, out, *rest])
        else:
            op = ATEN_ACTIVATIONS[name][0] + "_backward"
            rest = [*options, False] if name == "leaky_relu" else options
            self._taped(node, op, lambda g: [g, x, *rest])
        return out

    def _add(self, node: Node, a: Any, b: Any) -> Any:
        def backward(grad: Any) -> None:
            for value in node.inputs:
                self.give(value, self.share(grad))

        self.tape.append((node, backward))
        return super()._add(node, a, b)

    def _mul(self, node: Node, a: Any, b: Any) -> Any:
        def backward(grad: Any) -> None:
            for value, other in ((node.inputs[0], b), (node.inputs[1], a)):
                if not self.wants(value):
                    continue
                part = self.build.returning("aten::mul.Tensor", [grad, other])
                wide = [d for d, (i, o) in enumerate(zip(value.shape, node.output.shape, strict=True)) if i != o]
                if wide:
                    part = self.build.returning("aten::sum.dim_IntList", [part, wide, True, None])
                self.give(value, nhwc(self.build, part) if len(value.shape) == 4 else part)

        if len(node.inputs[0].shape) != len(node.inputs[1].shape):
            raise Refused("a product of tensors of different dimensions")
        self.tape.append((node, backward))
        return super()._mul(node, a, b)

    def _cat(self, node: Node, *values: Any) -> Any:
        def backward(grad: Any) -> None:
            at = 0
            for value in node.inputs:
                if self.wants(value):
                    part = self.build.returning("aten::narrow", [grad, 1, at, value.shape[1]])
                    self.give(value, nhwc(self.build, part))
                at += value.shape[1]

        self.tape.append((node, backward))
        return super()._cat(node, *values)

    def _narrow(self, node: Node, x: Any) -> Any:
        at, count = node.options["part"]
        size = list(node.inputs[0].shape)

        def backward(grad: Any) -> None:
            whole = self.build.returning("aten::slice_backward", [grad, size, 1, at, at + count, 1])
            self.give(node.inputs[0], nhwc(self.build, whole))

        self.tape.append((node, backward))
        return super()._narrow(node, x)

    def _transpose(self, node: Node, x: Any) -> Any:
        self._taped(node, "aten::transpose.int", lambda g: [g, *node.options["dims"]])
        return super()._transpose(node, x)

    def _dropout(self, node: Node, x: Any) -> Any:
        out, mask, p = self.build.slot(), self.build.slot(), node.options["p"]
        self.build.call("aten::native_dropout", [x, p, True], [out, mask])
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        self._taped(node, "aten::native_dropout_backward", lambda g: [g, mask, scale])
        return out


class TrainingPlan:
    """One input shape's program for a model, a loss and an optimizer.

    fused: the optimizer's update is part of the program; else gradients land in p.grad and the optimizer steps.
    """

    def __init__(
        self, model: nn.Module, loss: list[Any], optimizer: torch.optim.Optimizer, dtype: torch.dtype, fused: bool,
        x: Tensor, y: Tensor,
    ) -> None:  # fmt: skip
        network = Flattener(model, True).network(tuple(x.shape))
        self.network, self.torch_optimizer = network, optimizer
        self.fused = PlannedOptimizer(optimizer, list(model.parameters())) if fused else None
        if self.fused is not None:
            self.fused.check_steps()
        lowering = TrainingLowering(network, dtype, self.fused)
        build = lowering.build
        self.entry, self.target = build.slot(), build.slot()
        entry: Any = self.entry
        if x.dtype is not dtype:
            entry = build.returning("aten::to.dtype", [entry, SCALAR_TYPES[dtype], False, False, None])
        lowering.at[network.input] = nhwc(build, entry) if x.dim() == 4 else entry
        self.loss = lowering.program(self.target, loss)
        self.program = build.finish()
        self.arena_bytes, self.calls = build.arena_bytes, len(build.calls)
        self.halves = list(lowering.halves.values())
        self.grads = list(lowering.grads.values())
        self.parameters = list(model.parameters())
        self.state = network.state()
        self.pointers = self._pointers()
        self.versions: list[int] = []

    def _pointers(self) -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in self.parameters]

    def outdated(self) -> bool:
        """Whether the model or the optimizer is no longer what the program was made for."""
        return (
            not same_state(self.network.state(), self.state)
            or self._pointers() != self.pointers
            or (self.fused is not None and self.fused.outdated())
        )

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        for p in self.parameters:
            p.grad = None
        if self.halves and self.versions != [p._version for p, _ in self.halves]:
            for p, half in self.halves:  # at the first step, and after someone else's change to the weights
                half.copy_(p.detach())
        if self.fused is not None:
            self.fused.prepare()
        self.program.put(self.entry.index, x)
        self.program.put(self.target.index, y)
        self.program.run()
        if self.fused is not None:
            self.fused.finished()
        else:
            for p, grad in self.grads:
                p.grad = grad
            self.torch_optimizer.step()
        self.versions = [p._version for p, _ in self.halves] if self.fused is not None else []
        return self.program.get(self.loss.index)
