"""What the rewritten graphs call: each group as one operator, and, where that is not exact, as its own modules.

A group reads its modules' weights, flags and hooks at every call. It takes the fused operator only if its members are
still plain Conv2d, BatchNorm2d and activations without hooks, and the input is a plain 4-d floating tensor; otherwise
it calls the members one by one, as the stock forward does, so that a hook registered or a module replaced after fuse()
counts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.profiler as profiler
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FF

# Exact types: a subclass may compute something else. The attributes are what the fused kernels have built in.
ACTIVATION_MODULES: dict[type, tuple[str, dict[str, Any]]] = {
    nn.ReLU: ("relu", {}),
    nn.ReLU6: ("relu6", {"min_val": 0.0, "max_val": 6.0}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.Tanh: ("tanh", {}),
    nn.SiLU: ("silu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
    nn.Hardswish: ("hardswish", {}),
}
ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}
# Batch norms that call an activation of their own, as timm's: by name, since the package need not be there.
NORM_ACT_CLASSES = {"timm.layers.norm_act.BatchNormAct2d"}
INNER = "(inner)"  # in a graph: the activation that the norm calls itself
ADDITIONS = {"add": operator.add, "iadd": operator.iadd}


# Types of the stand-ins for plain tensors while fastconv._dynamo has a compiler run a graph to trace it.
TRACED: set[type] = set()


def plain_type(x: Any) -> bool:
    """Whether x is a tensor without rules of its own, or a compiler's stand-in for one."""
    kind = type(x)
    return kind is Tensor or kind is nn.Parameter or kind in TRACED or _exported(kind)


def _exported(kind: type) -> bool:
    # Non-strict torch.export runs the forward on these; strict export has Dynamo read it, where types are plain.
    return torch.compiler._is_exporting_flag and kind.__name__ in ("FakeTensor", "FunctionalTensor")


# Called with (module, inputs, result) by every group that ran fused: fastconv._fuse.kept listens here.
OBSERVERS: list[Any] = []


def _seen(module: nn.Module, inputs: tuple[Any, ...], result: Any) -> Any:
    for observer in OBSERVERS:
        observer(module, inputs, result)
    return result


# What has_hooks() looks at; it spells them out, since Dynamo cannot trace operator.attrgetter.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, or its forward was replaced on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def activation_name(act: Any) -> str:
    """The kernels' name for a module, a name itself or None; an empty string for what they do not have."""
    if act is None:
        return "identity"
    if isinstance(act, str):
        return act
    name, attributes = ACTIVATION_MODULES.get(type(act), ("", {}))
    for key, value in attributes.items():
        if getattr(act, key) != value:
            return ""
    return "" if not name or has_hooks(act) else name


def profiling() -> bool:
    """Whether a profiler wants ranges now: torch.profiler, or autograd.profiler.emit_nvtx."""
    return profiler._is_profiler_enabled and not torch.compiler.is_compiling()


def named(function: Callable) -> Callable:
    """A group's function with a keyword argument ``label``: the name of its range in a profile."""

    @functools.wraps(function)
    def call(*args: Any, label: str = "") -> Any:
        if not profiling():
            return function(*args)
        with profiler.record_function(label or function.__name__):
            return function(*args)

    return call


def is_norm_act(module: Any) -> bool:
    """Whether the module is a batch norm with ``drop`` and ``act`` inside; a subclass may compute something else."""
    kind = type(module)
    return kind is not nn.BatchNorm2d and f"{kind.__module__}.{kind.__qualname__}" in NORM_ACT_CLASSES


def _inner_activation(bn: Any) -> Any:
    """What the norm calls behind itself: None for nothing, as a plain one does."""
    act = bn.act if is_norm_act(bn) else None
    return None if type(act) is nn.Identity and not has_hooks(act) else act


def plain_input(x: Any) -> bool:
    # Subclasses (tensors with metadata, distributed and functional tensors) bring their own rules for stock operators.
    return plain_type(x) and x.dim() == 4 and x.is_floating_point() and x.layout is torch.strided


def fits(residual: Any, x: Tensor, shape: tuple[int, ...], cast: bool) -> bool:
    """Whether residual has the shape, dtype and device that the sum has without broadcasting or promotion."""
    dtype, kind = x.dtype, x.device.type
    if cast and dtype is not torch.float64 and not x.is_meta and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return plain_input(residual) and residual.dtype is dtype and residual.device == x.device and residual.shape == shape


def conv_shape(x: Tensor, channels: int, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    """The shape of a convolution's output; the settings are pairs, padding may be 'same' or 'valid'."""
    if isinstance(padding, str):
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = [t if padding == "same" else 0 for t in total]
    else:
        padding = [2 * p for p in padding]
    size = [(x.size(2 + i) + padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return (x.size(0), channels, *size)


def _conv_shape(conv: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    return conv_shape(x, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)


def _conv_ready(conv: Any, x: Any) -> bool:
    return type(conv) is nn.Conv2d and not has_hooks(conv) and plain_input(x)


def norm_arguments(bn: Any) -> dict[str, Any] | None:
    """What nn.BatchNorm2d.forward passes on, and num_batches_tracked where it would count; None if bn is not plain."""
    if is_norm_act(bn):
        if type(bn.drop) is not nn.Identity or has_hooks(bn.drop) or has_hooks(bn):
            return None
    elif type(bn) is not nn.BatchNorm2d or has_hooks(bn):
        return None
    mean, var, count, momentum = bn.running_mean, bn.running_var, None, bn.momentum
    if (mean is None) != (var is None):
        return None
    training = bn.training or mean is None
    if bn.training:
        if bn.track_running_stats:
            count = bn.num_batches_tracked
        else:
            mean = var = None
    if momentum is None and count is None:
        momentum = 0.0
    return {
        "running_mean": mean,
        "running_var": var,
        "training": training,
        "momentum": momentum,
        "eps": bn.eps,
        "num_batches_tracked": count,
    }


def _padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Any]:
    if conv.padding_mode == "zeros":
        return x, conv.padding
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


def _stock(x: Any, modules: list[Any], act: Any, add: str, residual: Any) -> Any:
    """The group as the stock forward runs it: its members, called."""
    for module in modules:
        x = module(x)
    if add:
        x = ADDITIONS[add](x, residual)
    if act is None:
        return x
    return ACTIVATIONS[act](x) if isinstance(act, str) else act(x)


@named
def conv_bn_act(
    x: Tensor, conv: nn.Module, bn: nn.Module, act: Any, nhwc: bool, add: str = "", residual: Any = None,
    recompute: bool = False,
):  # fmt: skip
    """act(bn(conv(x)) + residual); act is a module, a name or None, add "", "add" or "iadd"."""
    inner = _inner_activation(bn)
    act, own = (None, inner) if act == INNER else (act, act)
    name, norm = activation_name(own), norm_arguments(bn)
    if (
        not name
        or norm is None
        or not _conv_ready(conv, x)
        or (add and not fits(residual, x, _conv_shape(conv, x), True))
    ):
        return _stock(x, [conv, bn], act, add, residual)
    x, padding = _padded(conv, channels_last(x) if nhwc else x)
    out = FF.conv2d_bn_act(
        x, conv.weight, conv.bias, bn_weight=bn.weight, bn_bias=bn.bias, stride=conv.stride, padding=padding,
        dilation=conv.dilation, groups=conv.groups, activation=name, residual=residual,
        recompute=recompute, **norm,
    )  # fmt: skip
    return _seen(conv, (x, residual), out)


@named
def conv_act(x: Tensor, conv: nn.Module, act: Any, nhwc: bool, add: str = "", residual: Any = None):
    """act(conv(x) + residual)."""
    name = activation_name(act)
    if not name or not _conv_ready(conv, x) or (add and not fits(residual, x, _conv_shape(conv, x), True)):
        return _stock(x, [conv], act, add, residual)
    x, padding = _padded(conv, channels_last(x) if nhwc else x)
    out = FF.conv2d_bias_act(
        x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups, activation=name, residual=residual
    )
    return _seen(conv, (x, residual), out)


@named
def bn_act(x: Tensor, bn: nn.Module, act: Any, nhwc: bool, add: str = "", residual: Any = None):
    """act(bn(x) + residual)."""
    inner = _inner_activation(bn)
    act, own = (None, inner) if act == INNER else (act, act)
    name, norm = activation_name(own), norm_arguments(bn)
    if not name or norm is None or not plain_input(x) or (add and not fits(residual, x, tuple(x.shape), False)):
        return _stock(x, [bn], act, add, residual)
    x = channels_last(x) if nhwc else x
    out = FF.batch_norm_act(x, weight=bn.weight, bias=bn.bias, activation=name, residual=residual, **norm)
    return _seen(bn, (x, residual), out)


@named
def pool(x: Tensor, module: nn.Module, nhwc: bool):
    """MaxPool2d, AvgPool2d or AdaptiveAvgPool2d."""
    kind = type(module)
    if kind not in POOL_MODULES or has_hooks(module) or not plain_input(x):
        return module(x)
    x = channels_last(x) if nhwc else x
    if kind is nn.AdaptiveAvgPool2d:
        return _seen(module, (x,), FF.adaptive_avg_pool2d(x, module.output_size))
    if kind is nn.AvgPool2d:
        out = FF.avg_pool2d(
            x, module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            module.divisor_override,
        )  # fmt: skip
        return _seen(module, (x,), out)
    out = FF.max_pool2d(
        x, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, module.return_indices
    )
    return _seen(module, (x,), out)


POOL_MODULES = {nn.MaxPool2d: "max_pool2d", nn.AvgPool2d: "avg_pool2d", nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d"}


def max_pool2d(input: Tensor, *args: Any, **kwargs: Any):
    return (FF if plain_input(input) else F).max_pool2d(input, *args, **kwargs)


def avg_pool2d(input: Tensor, *args: Any, **kwargs: Any):
    return (FF if plain_input(input) else F).avg_pool2d(input, *args, **kwargs)


def adaptive_avg_pool2d(input: Tensor, *args: Any, **kwargs: Any):
    return (FF if plain_input(input) else F).adaptive_avg_pool2d(input, *args, **kwargs)


POOL_FUNCTIONS = {
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
}


# Layout: inside, 4-d tensors are channels_last; a fused container gives its caller the layout that it was given. Inside
# torch.func's transforms layouts stay as they are: vmap's tensors have none that could be asked for.


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def channels_last(x: Any) -> Any:
    """A 4-d tensor in channels_last, copied if need be; anything else as it is."""
    if not plain_type(x) or type(x) is nn.Parameter or x.dim() != 4 or _transformed():
        return x
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous(memory_format=torch.channels_last)


def contiguous(x: Any) -> Any:
    """The value with every channels_last tensor in it made contiguous; tuples, lists and dicts keep their types."""
    if _transformed():
        return x
    if plain_type(x) and type(x) is not nn.Parameter:
        nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return x.contiguous() if nhwc else x
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(contiguous(v) for v in x))
    if type(x) in (tuple, list):
        return type(x)(contiguous(v) for v in x)
    if isinstance(x, dict) and any(plain_type(v) and v.dim() == 4 for v in x.values()):
        return type(x)((k, contiguous(v)) for k, v in x.items())
    return x


def came_contiguous(*values: Any) -> bool:
    """Whether none of the arguments is a channels_last tensor: the caller then expects contiguous ones back."""
    if _transformed():
        return False
    for x in values:
        if isinstance(x, (list, tuple)) and x:
            x = x[0]
        if isinstance(x, Tensor) and x.dim() == 4:
            stride = x.stride()
            # The strides of a 1x1 or one-channel map fit both layouts: take channels_last only from its own strides.
            if stride[1] == 1 and stride[3] == x.size(1) and x.is_contiguous(memory_format=torch.channels_last):
                return False
    return True


def give_back(x: Any, was_contiguous: bool) -> Any:
    return contiguous(x) if was_contiguous else x


# Dropout draws its mask in memory order: a contiguous copy gets the mask that the stock model's tensor gets.

DROPOUT_MODULES = (nn.Dropout, nn.AlphaDropout)


def drop(x: Any, module: nn.Module) -> Any:
    """module(x), with the stock mask."""
    return _drop(module, x, module.training, getattr(module, "inplace", True))


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """F.dropout, likewise."""
    return _drop(lambda x: F.dropout(x, p, training, inplace), input, training, inplace)


def alpha_dropout(input: Any, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
    """F.alpha_dropout, likewise."""
    return _drop(lambda x: F.alpha_dropout(x, p, training, inplace), input, training, inplace)


DROPOUT_FUNCTIONS = {F.dropout: dropout, F.alpha_dropout: alpha_dropout}


def _drop(call: Any, x: Any, training: bool, inplace: bool) -> Any:
    copy = contiguous(x) if training else x
    if copy is x or not inplace:
        return call(copy)
    return x.copy_(call(copy))  # others may read x, and expect what was dropped


def view(x: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    """x.view(...), or a copy where the strides of a channels_last tensor allow no view."""
    if kwargs or (shape and not isinstance(shape[0], (int, tuple, list, torch.SymInt))):
        return x.view(*shape, **kwargs)
    return x.reshape(*shape)


def view_as(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape)
