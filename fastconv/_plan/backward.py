"""The backward pass of a plan: emitted in the reverse order of the nodes, gradients of values added where they meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forward import ATEN_ACTIVATIONS, Lowering, nhwc
from .kernels import Kernels
from .network import Network, Node, Refused, Value
from .optim import PlannedOptimizer
from .program import Buffer, Slot

SCALAR_TYPES = {torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType, as operators take it
FLOAT32, BFLOAT16 = SCALAR_TYPES.values()


@dataclass(eq=False)
class Pending:
    """A data gradient that is not emitted yet: a GPU's batch norm, if it is what comes next, takes it along."""

    into: Buffer
    arguments: list[Any]  # of fastconv_plan::conv2d_input_grad, but for the last


class BackwardLowering(Lowering):
    """optimizer None: gradients are left in ``grads``, by parameter."""

    def __init__(
        self, network: Network, dtype: torch.dtype, kernels: Kernels, optimizer: PlannedOptimizer | None
    ) -> None:
        super().__init__(dtype, kernels)
        self.network, self.optimizer = network, optimizer
        self.halves: dict[int, tuple[Tensor, Tensor]] = {}  # parameter, its copy in self.dtype
        self.grads: dict[int, tuple[Tensor, Tensor]] = {}  # parameter, its gradient
        self.small: list[tuple[Tensor, Any]] = []  # parameters whose gradients are updated together at the end
        self.tape: list[tuple[Node, Callable[[Any], None]]] = []
        self.needs: dict[Value, bool] = {network.input: False}
        self.grad_at: dict[Value, Any] = {}
        self.shared: set[int] = set()  # gradients that two values read: nothing may be written over them
        self.parts: set[int] = set()  # gradients that are a part of a concatenation's, where they lie
        self.seen: set[int] = set()
        self.skips: dict[int, tuple[Tensor, list[Tensor]]] = {}  # parameters updated in live taps only: taps, state

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
            before = self.grad_at[value]
            if isinstance(before, Pending):
                before = self.resolve(before)
            place = self.build.returning("aten::add.Tensor", [before, place, 1])
        self.grad_at[value] = place

    def resolve(self, place: Any) -> Any:
        """Emits the gradient if it is pending, or copies it out of another's; where it is."""
        if id(place) in self.parts:
            return nhwc(self.build, place)
        if not isinstance(place, Pending):
            return place
        self.build.call("fastconv_plan::conv2d_input_grad", [*place.arguments, place.into])
        return place.into

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
            logits = self.build.returning("aten::to.dtype", [logits, FLOAT32, False, False, None])
        result, lse, normalizer, grad = (self.build.slot() for _ in range(4))
        weight, one = None if loss[0] is None else loss[0].float(), torch.ones((), device=self.kernels.device)
        self.build.call("fastconv::cross_entropy", [logits, target, weight, *loss[1:]], [result, lse, normalizer])
        self.build.call(
            "fastconv::cross_entropy_backward",
            [one, logits, target, weight, lse, normalizer, *loss[1:], [True, False]], [grad, None],
        )  # fmt: skip
        if low:
            grad = self.build.returning("aten::to.dtype", [grad, BFLOAT16, False, False, None])
        if len(self.network.output.shape) == 4:
            grad = nhwc(self.build, grad)
        self.walk(grad)
        self._finish_small()
        return result

    def walk(self, grad: Any) -> None:
        """Emits the backward of every node, from the result's gradient on."""
        self.give(self.network.output, grad)
        for node, backward in reversed(self.tape):
            if node.output in self.grad_at:
                grad = self.grad_at.pop(node.output)
                takes_along = node.bn is not None and isinstance(grad, Pending)
                backward(grad if takes_along else self.resolve(grad))

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
                        self.optimizer.hyper[index], self.optimizer.kind, [self._live_mask(p) for p, _ in mine],
                    ],
                )  # fmt: skip

    def _live_mask(self, parameter: Tensor) -> int:
        """Bit r * S + s for each tap of a filter that is updated; -1 for all."""
        if id(parameter) not in self.skips:
            return -1
        return sum(1 << i for i, live in enumerate(self.skips[id(parameter)][0].flatten().tolist()) if live)

    def lower(self, node: Node) -> None:
        super().lower(node)
        trained = False
        if node.module is not None:
            trained |= self.use(node.module.weight, node.module.bias)
        if node.bn is not None:
            trained |= self.use(node.bn.weight, node.bn.bias)
        read = (*node.inputs, *([] if node.residual is None else [node.residual]))
        self.needs[node.output] = trained or any(self.needs[v] for v in read)

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
            self.linear_bias(layer, grad)

        self.tape.append((node, backward))
        return build.returning("aten::linear", [x, weight, bias])

    def linear_bias(self, layer: nn.Linear, grad: Any) -> None:
        if layer.bias is not None and layer.bias.requires_grad:
            self.gradient(layer.bias, self.build.returning("aten::sum.dim_IntList", [grad, [0], False, FLOAT32]))

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
                    self.parts.add(id(part))  # most are added to others, which reads them where they lie
                    self.give(value, part)
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

    def _drop_path(self, node: Node, x: Any) -> Any:
        """torchvision.ops.stochastic_depth, of the same random numbers: one for each image, or for the batch."""
        build, keep = self.build, 1.0 - node.options["p"]
        rows = node.output.shape[0] if node.options["mode"] == "row" else 1
        size = [rows, *[1] * (len(node.output.shape) - 1)]
        return self.dropped(node, x, build.returning("aten::new_empty", [x, size, None, None, None, None]), keep)

    def dropped(self, node: Node, x: Any, noise: Slot, keep: float) -> Slot:
        """x times noise of zeros and 1 / keep."""
        self.build.call("aten::bernoulli_.float", [noise, keep, None], [None])
        self.build.call("aten::div_.Scalar", [noise, keep], [None])
        self._taped(node, "aten::mul.Tensor", lambda grad: [grad, noise])
        return self.build.returning("aten::mul.Tensor", [x, noise])
