"""The operators that a fused model's Functions and autograd call in training, forward and backward, on the modules' own
tensors and in the order of the eager path: the same bits."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import PREACT_ACTIVATIONS
from .._fuse import runtime
from ..autograd.batch_norm_act import slope_from_input
from ..autograd.common import saves_output
from .backward import BFLOAT16, FLOAT32, BackwardLowering
from .forward import nhwc
from .kernels import Kernels
from .live import LiveTensors, settings
from .network import Network, Node, Refused
from .program import Slot

_CONTIGUOUS = 0  # torch.contiguous_format as operators take it
_LARGE = 1 << 15  # elements, 128 KiB: malloc gives blocks from there on back to the system


def _trained(layer: nn.Module) -> list[bool]:
    """Whether the weight is, and the bias."""
    return [p is not None and p.requires_grad for p in (layer.weight, layer.bias)]


class Memory:
    """What a model's programs of several shapes share, one call at a time. It holds as much between steps as the large
    gradients, and under autocast the large linear layers' weights and gradients in bfloat16, take in them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # By id, with the parameters themselves, so that the ids stay theirs.
        self.halves: dict[int, tuple[Tensor, Tensor]] = {}
        self.gradients: dict[tuple[int, ...], tuple[list[Tensor], Any]] = {}
        self.products: dict[torch.Size, Tensor] = {}

    def half(self, parameter: Tensor) -> Tensor:
        """Memory for a bfloat16 copy, which every forward writes."""
        if id(parameter) not in self.halves:
            made = torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
            self.halves[id(parameter)] = parameter, made
        return self.halves[id(parameter)][1]

    def product(self, shape: torch.Size) -> Tensor:
        """Memory for a bfloat16 gradient on its way to a float32 one."""
        if shape not in self.products:
            self.products[shape] = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
        return self.products[shape]

    def reused(self, parameters: list[Tensor]) -> Any:
        """The ``torch.classes.fastconv.Reused`` of the gradients of these parameters."""
        key = tuple(map(id, parameters))
        if key not in self.gradients:
            self.gradients[key] = parameters, torch.classes.fastconv.Reused([p.detach() for p in parameters])
        return self.gradients[key][1]

    def let_go(self) -> None:
        """Gives the gradients' memory back, unless a step is under way."""
        if self.gradients and self.lock.acquire(blocking=False):
            try:
                for _, held in self.gradients.values():
                    held.clear()
            finally:
                self.lock.release()


class GradientLowering(LiveTensors, BackwardLowering):
    """dtype: of the groups; bfloat16 under autocast, where the entry and the parameters are float32."""

    def __init__(self, network: Network, dtype: torch.dtype, memory: Memory) -> None:
        super().__init__(network, dtype, Kernels(torch.device("cpu")), None)
        self.low = dtype is not torch.float32
        self.wide = network.input if self.low else None
        self.memory = memory
        self.read_where: dict[int, Tensor] = {}  # a bound tensor: the module's own
        self.rounded: list[Tensor] = []  # parameters whose copies the backward reads
        self.reused: list[tuple[Tensor, Slot]] = []  # parameters, the slots that their gradients' memory is put in
        self.cut = 0  # calls of the forward

    def split(self, grad: Any) -> None:
        """Emits the forward, then the backward from the result's gradient on."""
        for node in self.network.nodes:
            self.lower(node)
        self.cut = len(self.build.calls)
        self.walk(grad)

    def kept(self) -> list[int]:
        """The slots that the backward reads and the forward fills."""
        calls = self.build.calls
        made = {s.index for c in calls[: self.cut] for s in c.results if s is not None}
        return sorted(made & {s.index for c in calls[self.cut :] for s in c.slots_read()})

    def parameters_read(self) -> list[Tensor]:
        """The modules' own tensors that the backward reads: nobody may change them before it."""
        read = [t for c in self.build.calls[self.cut :] for t in c.arguments if isinstance(t, Tensor)]
        own = [self.read_where[id(t)] for t in read if id(t) in self.read_where]
        return list({id(t): t for t in (*own, *self.rounded)}.values())

    # --- parameters ---

    def live(self, t: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
        alias = super().live(t, *dtypes)
        if alias is not None:
            self.read_where[id(alias)] = t
        return alias

    def reuse(self, parameter: Tensor) -> Slot:
        """A slot with memory for the parameter's gradient, which is the gradient then."""
        slot = self.build.slot()
        self.reused.append((parameter, slot))
        self.grads[id(parameter)] = parameter, slot
        return slot

    def gradient(self, parameter: Tensor | None, place: Any) -> None:
        if parameter is not None and parameter.requires_grad:
            self.grads[id(parameter)] = parameter, self.cast(place, FLOAT32) if self.low else place

    def linear_bias(self, layer: nn.Linear, grad: Any) -> None:
        if layer.bias is not None and layer.bias.requires_grad:
            self.gradient(layer.bias, self.build.returning("aten::sum.dim_IntList", [grad, [0], False, None]))

    # --- nodes ---

    def lower(self, node: Node) -> None:
        if node.stock and node.op.endswith("pool") and not node.options.get("mean"):
            raise Refused(f"PyTorch's own {node.op} runs outside of the groups")
        if node.bn is not None and math.prod(node.output.shape) == node.output.shape[1]:
            raise Refused("a batch norm of one value per channel")
        super().lower(node)

    def _stock_conv(self, node: Node, x: Any, bias: Any, where: list[Any]) -> Any:
        conv, build = node.module, self.build
        weight = self.half(conv.weight)

        def backward(grad: Any) -> None:
            mask = [self.wants(node.inputs[0]), *_trained(conv)]
            slots = [build.slot() if wanted else None for wanted in mask]
            sizes = None if bias is None else [conv.out_channels]
            build.call(
                "aten::convolution_backward",
                [grad, x, weight, sizes, *where[:3], False, [0, 0], where[3], mask], slots,
            )  # fmt: skip
            if mask[0]:
                self.give(node.inputs[0], slots[0])
            self.gradient(conv.weight, slots[1])
            self.gradient(conv.bias, slots[2])

        self.tape.append((node, backward))
        return build.returning("aten::conv2d", [x, weight, bias, *where])

    def _conv(self, node: Node, x: Any) -> Any:
        conv, bn, build = node.module, node.bn, self.build
        shape = settings(node)
        x, bias = self.multiplied(node, x), self.half(conv.bias)
        if node.stock:
            return self._stock_conv(node, x, bias, shape)
        weight, residual, out = self.live(conv.weight), self.residual(node), build.slot()
        saved: Any = None
        finish: Any = None
        if bn is None:
            keeps = node.act in PREACT_ACTIVATIONS
            preact = build.slot() if keeps else None
            saved = preact if keeps else out if saves_output(node.act) else None
            build.call("fastconv::conv2d_bias_act", [x, weight, bias, residual, *shape, node.act, keeps], [out, preact])
        else:
            raw, norm, finish = self._norm_of(node, out)
            build.call(
                "fastconv::conv2d_bn_act",
                [x, weight, bias, residual, *norm[0], *shape, *norm[1], node.act, True],
                [out, raw, *norm[2]],
            )

        def backward(grad: Any) -> None:
            trains, biased = _trained(conv)
            needs = [self.wants(node.inputs[0]), trains]
            dz = grad
            if finish is not None:
                dz = finish(grad, any(needs) or biased)
            elif saved is not None:
                dz, bias_grad = build.slot(), build.slot()
                build.call("fastconv::act_bias_backward", [grad, saved, node.act, [True, biased]], [dz, bias_grad])
            if biased and (finish is not None or saved is None):
                bias_grad = build.slot()
                build.call("fastconv::act_bias_backward", [dz, None, "identity", [False, True]], [None, bias_grad])
            if biased:
                self.gradient(conv.bias, self.cast(bias_grad, BFLOAT16) if self.low else bias_grad)
            dx = build.slot() if needs[0] else None
            large = conv.weight.numel() >= _LARGE and conv.weight.is_contiguous(memory_format=torch.channels_last)
            if needs[1] and large:
                into = self.reuse(conv.weight)
                build.call("fastconv_plan::conv2d_backward_into", [dz, x, weight, *shape, needs[0], into], [dx])
            elif any(needs):
                dw = build.slot() if needs[1] else None
                if needs[1]:
                    self.grads[id(conv.weight)] = conv.weight, dw
                build.call("fastconv::conv2d_backward", [dz, x, weight, *shape, needs], [dx, dw])
            # As the Function hands them on: the input's gradient, then the residual's.
            if needs[0]:
                self.give(node.inputs[0], dx)
            if self.wants(node.residual) and bn is None:
                self.give(node.residual, dz)

        self.tape.append((node, backward))
        return out

    def _norm_tensors(self, bn: nn.BatchNorm2d) -> tuple[dict[str, Any], list[Tensor | None]]:
        """What the layer passes on, and of it weight, bias, running mean, variance and count."""
        given = runtime.norm_arguments(bn)
        tensors = [bn.weight, bn.bias, given["running_mean"], given["running_var"]]
        return given, [*map(self.live, tensors), self.live(given["num_batches_tracked"], torch.int64)]

    def _norm_of(self, node: Node, out: Slot, raw: Slot | None = None) -> tuple[Slot, list[list[Any]], Any]:
        """Of a group's batch norm: the slot that it normalises, its arguments (tensors, then settings) and results, and
        what emits its backward, which gives the gradient of that slot."""
        bn, build = node.bn, self.build
        given, (weight, bias, *stats, count) = self._norm_tensors(bn)
        residual, mean, invstd = self.residual(node), build.slot(), build.slot()
        raw = raw or build.slot()
        recompute = slope_from_input(node.act, True, residual is not None)
        kept = [
            raw, out if saves_output(node.act) and not recompute else None, residual if recompute else None,
            weight, bias if recompute else None, mean, invstd,
        ]  # fmt: skip

        def backward(grad: Any, need: bool) -> Any:
            trained = _trained(bn)
            passed_on = node.act == "identity" and self.wants(node.residual)
            mask = [need, self.wants(node.residual) and not passed_on, *trained]
            slots = [build.slot() if wanted else None for wanted in mask]
            if any(mask):
                build.call("fastconv::batch_norm_act_backward", [grad, *kept, True, node.act, mask], slots)
            if self.wants(node.residual):
                self.give(node.residual, grad if passed_on else slots[1])
            for p, slot, wanted in zip((bn.weight, bn.bias), slots[2:], trained, strict=True):
                if wanted:
                    self.grads[id(p)] = p, slot
            return slots[0]

        settings = [given["training"], given["momentum"], given["eps"]]
        return raw, [[weight, bias, *stats, count], settings, [mean, invstd]], backward

    def _stock_norm(self, node: Node, x: Any) -> Any:
        """As nn.BatchNorm2d and autograd call it."""
        bn, build = node.bn, self.build
        if bn.momentum is None:
            raise Refused("PyTorch's own batch norm with momentum=None")
        _, (weight, bias, *stats, count) = self._norm_tensors(bn)
        out, mean, invstd = (build.slot() for _ in range(3))
        if count is not None:
            build.call("aten::add_.Scalar", [count, 1, 1], [None])
        settings = [True, bn.momentum, bn.eps]
        build.call("aten::native_batch_norm", [x, weight, bias, *stats, *settings], [out, mean, invstd])

        def backward(grad: Any) -> None:
            mask = [self.wants(node.inputs[0]), *_trained(bn)]
            slots = [build.slot() if wanted else None for wanted in mask]
            saved = [x, weight, None, None, mean, invstd]  # the running statistics are for evaluation
            build.call("aten::native_batch_norm_backward", [grad, *saved, True, bn.eps, mask], slots)
            if mask[0]:
                self.give(node.inputs[0], slots[0])
            self.grads.update({id(p): (p, s) for p, s in zip((bn.weight, bn.bias), slots[1:], strict=True) if s})

        self.tape.append((node, backward))
        return out

    def _norm(self, node: Node, x: Any) -> Any:
        if node.stock:
            return self._stock_norm(node, x)
        out = self.build.slot()
        _, (tensors, settings, results), finish = self._norm_of(node, out, x)
        self.build.call(
            "fastconv::batch_norm_act", [x, self.residual(node), *tensors, *settings, node.act], [out, *results]
        )

        def backward(grad: Any) -> None:
            dx = finish(grad, self.wants(node.inputs[0]))
            if dx is not None:
                self.give(node.inputs[0], dx)

        self.tape.append((node, backward))
        return out

    def _linear(self, node: Node, x: Any) -> Any:
        layer, build = node.module, self.build
        if layer.weight.numel() < _LARGE or not layer.weight.is_contiguous():
            return super()._linear(node, x)
        weight, bias = self.live(layer.weight), self.half(layer.bias)
        if self.low:
            half = self.memory.half(layer.weight)
            build.call("aten::copy_", [half, weight, False], [None])
            weight = half

        def backward(grad: Any) -> None:
            if self.wants(node.inputs[0]):
                self.give(node.inputs[0], build.returning("aten::mm", [grad, weight]))
                self.rounded.append(layer.weight)
            if layer.weight.requires_grad:
                turned, into = build.returning("aten::t", [grad]), self.reuse(layer.weight)
                product = self.memory.product(layer.weight.shape) if self.low else into
                build.call("aten::mm.out", [turned, x, product], [None])
                if self.low:
                    build.call("aten::copy_", [into, product, False], [None])
            self.linear_bias(layer, grad)

        self.tape.append((node, backward))
        return build.returning("aten::linear", [x, weight, bias])

    def _adaptive_avg_pool(self, node: Node, x: Any) -> Any:
        if not node.options.get("mean"):
            return super()._adaptive_avg_pool(node, x)
        size = list(node.inputs[0].shape)

        def backward(grad: Any) -> None:
            wide = self.build.returning("aten::expand", [grad, size, False])
            part = self.build.returning("aten::div.Scalar", [wide, size[2] * size[3]])
            self.give(node.inputs[0], nhwc(self.build, part))

        self.tape.append((node, backward))
        return self.build.returning("aten::mean.dim", [x, [2, 3], True, None])

    def _dropout(self, node: Node, x: Any) -> Any:
        """As aten::dropout makes it of other operators in training, of maps on the eager path's contiguous copy."""
        build, p, maps = self.build, node.options["p"], len(node.output.shape) == 4
        if p == 1.0:
            raise Refused("dropout of everything")
        if maps:
            x = build.returning("aten::contiguous", [x, _CONTIGUOUS])
        noise = build.returning("aten::empty_like", [x, None, None, None, None, None])
        out = self.dropped(node, x, noise, 1.0 - p)
        return nhwc(build, out) if maps else out
