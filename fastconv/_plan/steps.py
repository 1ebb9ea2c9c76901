"""What functions, methods and layers mean to the flattening: each takes the Flattener and the call's arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .._fuse import runtime
from .._fuse.patterns import ACT_FUNCTIONS, ACT_METHODS
from .network import Refused, Value

if TYPE_CHECKING:
    from .flatten import Flattener


def _conv_bn_act(f, x, conv, bn, act, nhwc, add="", residual=None, recompute=False, label=""):
    if recompute and f.training:
        raise Refused("fuse() was asked to recompute batch norms (defer_bn), a plan keeps them")
    return f.conv(x, conv, bn, act, residual)


def _conv_act(f, x, conv, act, nhwc, add="", residual=None, label=""):
    return f.conv(x, conv, None, act, residual)


def _bn_act(f, x, bn, act, nhwc, add="", residual=None, label=""):
    return f.norm(x, bn, act, residual)


def _pool(f, x, module, nhwc, label=""):
    return f.pooling(x, module)


def _max_pool(f, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return f.pool(
        "max_pool", input, kernel_size=kernel_size, stride=stride or None, padding=padding, dilation=dilation,
        ceil_mode=ceil_mode, return_indices=return_indices,
    )  # fmt: skip


def _avg_pool(
    f, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    return f.pool(
        "avg_pool", input, kernel_size=kernel_size, stride=stride or None, padding=padding, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad, divisor_override=divisor_override,
    )  # fmt: skip


def _adaptive_pool(f, input, output_size):
    return f.pool("adaptive_avg_pool", input, output_size=output_size)


def _size(f, x: Value, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def _getattr(f, x: Any, name: str) -> Any:
    if isinstance(x, Value) and name == "shape":
        return x.shape
    raise Refused(f"a tensor's .{name}")


def _activations() -> dict[Any, Callable[..., Any]]:
    def step(name: str, own: bool) -> Callable[..., Any]:
        def run(f, input, inplace=False, negative_slope=0.01, approximate="none"):
            if negative_slope != 0.01 or approximate != "none":
                raise Refused(f"{name} with other parameters than the kernels'")
            return f.activation(input, name, inplace or own)

        return run

    extra = {F.hardsigmoid: "hardsigmoid"}
    named = {**ACT_FUNCTIONS, **extra}
    return {function: step(name, function.__name__.endswith("_")) for function, name in named.items()}


def _alias(f: Flattener, x: Any, *_: Any) -> Any:
    if isinstance(x, Value):
        x.relaid = True
    return x  # layout alone: values are channels_last throughout


def _act_method(name: str, inplace: bool) -> Callable[..., Any]:
    return lambda f, x: f.activation(x, name, inplace)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    runtime.conv_bn_act: _conv_bn_act, runtime.conv_act: _conv_act, runtime.bn_act: _bn_act, runtime.pool: _pool,
    runtime.max_pool2d: _max_pool, F.max_pool2d: _max_pool, torch.max_pool2d: _max_pool,
    runtime.avg_pool2d: _avg_pool, F.avg_pool2d: _avg_pool,
    runtime.adaptive_avg_pool2d: _adaptive_pool,
    F.adaptive_avg_pool2d: _adaptive_pool,
    runtime.channels_last: lambda f, x, *_: x, runtime.contiguous: _alias,
    # Inner containers are given channels_last; the outermost one's result is the plan's.
    runtime.came_contiguous: lambda f, *values: False, runtime.give_back: lambda f, x, *_: x,
    runtime.drop: lambda f, x, module: f.call(module, (x,), {}),
    runtime.dropout: lambda f, input, p=0.5, training=True, inplace=False: f.dropout(input, p, training, inplace),
    F.dropout: lambda f, input, p=0.5, training=True, inplace=False: f.dropout(input, p, training, inplace),
    runtime.view: lambda f, x, *shape: f.reshape(x, *shape),
    torch.flatten: lambda f, input, start_dim=0, end_dim=-1: f.flatten(input, start_dim, end_dim),
    torch.cat: lambda f, tensors, dim=0: f.cat(tensors, dim),
    torch.mean: lambda f, input, dim=None, keepdim=False: f.mean(input, dim, keepdim),
    operator.add: lambda f, a, b: f.binary("add", a, b), operator.iadd: lambda f, a, b: f.binary("add", a, b, True),
    torch.add: lambda f, a, b: f.binary("add", a, b), operator.mul: lambda f, a, b: f.binary("mul", a, b),
    torch.mul: lambda f, a, b: f.binary("mul", a, b),
    operator.floordiv: lambda f, a, b: a // b if isinstance(a, int) and isinstance(b, int) else _refuse("floordiv"),
    torch.transpose: lambda f, input, dim0, dim1: f.transpose(input, dim0, dim1),
    torch.chunk: lambda f, input, chunks, dim=0: f.chunk(input, chunks, dim),
    operator.getitem: lambda f, x, i: x[i] if isinstance(x, (tuple, list)) else _refuse("indexing a tensor"),
    getattr: _getattr,
    **_activations(),
}  # fmt: skip
METHODS: dict[str, Callable[..., Any]] = {
    "view": lambda f, x, *shape: f.reshape(x, *shape),
    "reshape": lambda f, x, *shape: f.reshape(x, *shape),
    "flatten": lambda f, x, start_dim=0, end_dim=-1: f.flatten(x, start_dim, end_dim),
    "mean": lambda f, x, dim=None, keepdim=False: f.mean(x, dim, keepdim),
    "size": _size,
    "transpose": lambda f, x, dim0, dim1: f.transpose(x, dim0, dim1),
    "chunk": lambda f, x, chunks, dim=0: f.chunk(x, chunks, dim),
    "contiguous": _alias,
    **{name: _act_method(act, name.endswith("_")) for name, act in ACT_METHODS.items()},
}


def foreign(function: Any) -> Callable[..., Any] | None:
    """The step for a function of a package that need not be installed."""
    return _FOREIGN.get(f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}")


def _stochastic_depth(f: Flattener, input: Value, p: float, mode: str, training: bool = True) -> Value:
    if not training or p == 0.0:
        return input
    if p == 1.0:
        _refuse("stochastic depth that drops everything")
    return f.add("drop_path", [input], input.shape, options={"p": p, "mode": mode})


# Functions of packages that need not be installed, by name.
_FOREIGN = {"torchvision.ops.stochastic_depth.stochastic_depth": _stochastic_depth}


def _refuse(reason: str) -> Any:
    raise Refused(reason)


def _module_activation(f: Flattener, module: nn.Module, x: Value) -> Value:
    name = runtime.activation_name(module)
    if type(module) is nn.Hardsigmoid:
        name = "hardsigmoid"
    if not name:
        raise Refused(f"a {type(module).__name__} with parameters of its own")
    return f.activation(x, name, getattr(module, "inplace", False))


LEAVES: dict[type, Callable[[Flattener, Any, Any], Any]] = {
    nn.Identity: lambda f, m, x: x,
    nn.Linear: lambda f, m, x: f.linear(x, m),
    nn.Flatten: lambda f, m, x: f.flatten(x, m.start_dim, m.end_dim),
    nn.Dropout: lambda f, m, x: f.dropout(x, m.p, m.training, m.inplace),
    nn.Conv2d: lambda f, m, x: f.conv(x, m, None, None),
    nn.BatchNorm2d: lambda f, m, x: f.norm(x, m, None),
    nn.Hardsigmoid: _module_activation,
    **{kind: _module_activation for kind in runtime.ACTIVATION_MODULES},
    **{kind: (lambda f, m, x: f.pooling(x, m)) for kind in runtime.POOL_MODULES},
}
