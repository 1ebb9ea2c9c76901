"""Convolution, batch norm and large linear layers in a training plan.

A convolution's weight gradient is consumed by the optimizer while it lies in cache, after the data gradient has read
the old weights; on a few rows both gradients and the update are one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd.batch_norm_act import slope_from_input
from ..autograd.common import saves_output
from .backward import BackwardLowering, Pending
from .forward import PIXEL, as_filter, as_pixel, geometry, is_pixelwise
from .network import Node, Refused
from .program import Buffer


def live_taps(node: Node) -> Tensor:
    """[r, s]: which taps of a convolution read the input at any output position."""
    conv, axes = node.module, []
    for i in (0, 1):
        outputs = torch.arange(node.output.shape[2 + i], device="cpu")[None, :] * conv.stride[i] - conv.padding[i]
        reads = outputs + torch.arange(conv.kernel_size[i], device="cpu")[:, None] * conv.dilation[i]
        axes.append(((reads >= 0) & (reads < node.inputs[0].shape[2 + i])).any(1))
    return axes[0][:, None] & axes[1][None, :]


class TrainingLowering(BackwardLowering):
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
            preact = None if saves_output(node.act) or node.act == "identity" else self.own(node.output)
            self.build.call("fastconv_plan::conv2d", [*common, residual, geometry(node), node.act, preact, out])

            def backward(grad: Any) -> None:
                self._act_bias(node, grad, out if preact is None else preact, x, bias)
        else:
            raw = self.own(node.output)
            if not self.kernels.gpu:
                self.build.call("fastconv_plan::conv2d", [*common, None, geometry(node), "identity", None, raw])
            finish = self._normalise(node, raw, out, residual, [x, weight, shift] if self.kernels.gpu else None)

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
        skip = weight.requires_grad and self.updates(weight) and self._skips_dead(node)
        if self.wants(value):
            before = self.resolve(self.grad_at.get(value))
            own = isinstance(before, Buffer) and id(before) not in self.shared
            into = before if own else self.own(value)
            if self._step_in_place(weight, dz, x, used, before, shape, into, skip):
                self.grad_at[value] = into
                return
            pending = Pending(into, [dz, used, before, shape])
            self.grad_at[value] = pending if self.kernels.gpu else self.resolve(pending)
        self._weight_gradient(weight, dz, x, used, shape, skip)

    def _step_in_place(
        self, weight: Tensor, dz: Any, x: Any, used: Tensor, before: Any, shape: list[int], into: Buffer, skip: bool
    ) -> bool:
        """Emits both gradients and the update as one call, where one pass over the weights does it all."""
        if self.kernels.gpu or not weight.requires_grad or self.optimizer is None or not self.updates(weight):
            return False
        example = torch.empty(into.shape, dtype=self.dtype, device="cpu", memory_format=torch.channels_last)
        if not torch.ops.fastconv_plan.conv2d_steps_in_place(example, used, shape):
            return False
        self.build.call("fastconv_plan::conv2d_backward_update",
                        [dz, x, used, before, shape, into, *self._updated(weight, used), skip])  # fmt: skip
        return True

    def _linear(self, node: Node, x: Any) -> Any:
        layer, build = node.module, self.build
        if self.kernels.gpu or not is_pixelwise(layer):
            return super()._linear(node, x)
        filters = as_filter(self.half(layer.weight))
        pixels, out = self.pixelwise(node, x, filters, None)

        def backward(grad: Any) -> None:
            dz = as_pixel(build, grad, node.output.shape)
            stepped = False
            if self.wants(node.inputs[0]):
                into = build.buffer((*node.inputs[0].shape, 1, 1), self.dtype)
                stepped = self._step_in_place(layer.weight, dz, pixels, filters, None, PIXEL, into, False)
                if not stepped:
                    build.call("fastconv_plan::conv2d_input_grad", [dz, filters, None, PIXEL, into])
                self.give(node.inputs[0], build.returning("aten::reshape", [into, list(node.inputs[0].shape)]))
            if not stepped:
                self._weight_gradient(layer.weight, dz, pixels, filters, PIXEL, False)
            self.linear_bias(layer, grad)

        self.tape.append((node, backward))
        return out

    def _weight_gradient(self, weight: Tensor, dz: Any, x: Any, used: Tensor, shape: list[int], skip: bool) -> None:
        """Emits the gradient of a parameter, into p.grad or with its update; ``used`` has the sizes of a filter."""
        if not weight.requires_grad:
            return
        if self.optimizer is None:
            kept = as_filter(self.kept(weight))
            self.build.call("fastconv_plan::conv2d_weight_grad", [dz, x, used, shape, kept], aside=self.kernels.aside)
        elif self.updates(weight) and self.kernels.gpu:
            parts = self.build.returning(
                "fastconv_plan::conv2d_weight_grad_parts", [dz, x, used, shape], aside=self.kernels.aside
            )
            self.gradient(weight, parts)
        elif self.updates(weight):
            self.build.call("fastconv_plan::conv2d_weight_grad_update",
                            [dz, x, used, shape, *self._updated(weight, used), skip])  # fmt: skip

    def _updated(self, weight: Tensor, used: Tensor) -> list[Any]:
        """Parameter, state, bf16 copy, hyper-parameters and optimizer, as the operators that update it take them."""
        state, index = self.optimizer.state[id(weight)], self.optimizer.of[id(weight)]
        half = used if id(weight) in self.halves else None
        return [as_filter(weight.detach()), [as_filter(t) for t in state], half, self.optimizer.hyper[index],
                self.optimizer.kind]  # fmt: skip

    def _skips_dead(self, node: Node) -> bool:
        """Whether the update may leave out the taps that read padding alone, and notes the state that this rests on."""
        weight, live = node.module.weight, live_taps(node)
        maskable = not self.kernels.gpu or live.numel() < 64  # a GPU's update takes the taps as bits of an integer
        if bool(live.all()) or not maskable or self.optimizer.moves_without_gradient(weight, ~live):
            return False
        self.skips[id(weight)] = live, self.optimizer.state[id(weight)]
        return True

    def _normalise(
        self, node: Node, raw: Any, out: Buffer, residual: Any, convolution: list[Any] | None = None
    ) -> Callable[[Any], Any]:
        """Emits out = act(bn(raw) + residual); returns what emits its backward and gives the gradient of raw.

        convolution: input, filters and bias of the one that makes raw, in the same call; None: raw is there.
        """
        bn, build = node.bn, self.build
        track = bn.track_running_stats and bn.running_mean is not None
        running = (bn.running_mean, bn.running_var, bn.num_batches_tracked) if track else (None, None, None)
        weight, bias = (None if v is None else v.detach() for v in (bn.weight, bn.bias))
        mean, invstd = build.slot(), build.slot()
        momentum = bn.momentum if bn.momentum is None or track else 0.0
        norm = [residual, weight, bias, *running]
        if convolution is None:
            name, arguments = "batch_norm", [raw, *norm, momentum, bn.eps, node.act, out]
        else:
            name, arguments = "conv2d_bn", [*convolution, *norm, geometry(node), momentum, bn.eps, node.act, raw, out]
        build.call(f"fastconv_plan::{name}", arguments, [mean, invstd])
        recompute = slope_from_input(node.act, True, node.residual is not None)
        from_output = saves_output(node.act) and not recompute

        def backward(found: Any) -> Any:
            shares = self.wants(node.residual) and node.act == "identity"
            if shares:  # somebody else reads it, maybe before the batch norm does
                found = self.resolve(found)
            grad = found.into if isinstance(found, Pending) else found
            dz, dweight, dbias = self.own(node.output), build.slot(), build.slot()
            dres = None
            if shares:
                self.give(node.residual, self.share(grad))  # the sum hands its gradient on as it is
            elif self.wants(node.residual):
                # In place of the gradient that it comes from, where nothing else reads that; a 16-bit gradient through
                # another activation is read once more, and a GPU's is.
                plain = node.act == "relu" or (self.dtype is torch.float32 and not self.kernels.gpu)
                own = plain and isinstance(grad, Buffer) and id(grad) not in self.shared
                dres = grad if own else self.own(node.output)
            name, before = "batch_norm_backward", [grad]
            if isinstance(found, Pending):  # the data gradient that makes grad, in the same call
                name, before = "conv2d_input_grad_bn", [*found.arguments, grad]
            build.call(
                f"fastconv_plan::{name}",
                [*before, raw, out if from_output else None, residual if recompute else None, weight, bias, mean,
                 invstd, node.act, dz, dres],
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
