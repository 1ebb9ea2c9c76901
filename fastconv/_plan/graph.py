"""A model's traced forwards, fused groups included, as one flat list of nodes for one input shape."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._fuse import runtime
from .._fuse.analysis import Analysis, has_forward
from .._fuse.module import FusedMixin, refresh
from .._fuse.patterns import ACT_FUNCTIONS, ACT_METHODS
from .._fuse.runtime import has_hooks
from ..ops.fake import conv_output_size, pool_output_size


class Refused(Exception):
    """What keeps a model, or a call, out of a plan; str() is the reason."""


@dataclass(eq=False)
class Value:
    """A tensor of the network: its shape, and how many nodes read it."""

    shape: tuple[int, ...]
    readers: int = 0


@dataclass(eq=False)
class Node:
    """One step: ``op`` is conv, norm, max_pool, avg_pool, adaptive_avg_pool, linear, act, add, mul, cat, reshape, mean
    or dropout; the rest of the fields are what that step needs."""

    op: str
    inputs: list[Value]
    output: Value
    module: nn.Module | None = None
    bn: nn.Module | None = None
    act: str = "identity"
    residual: Value | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Network:
    """nodes in order, with the modules whose state the flattening has relied on."""

    input: Value
    nodes: list[Node]
    output: Value
    modules: list[nn.Module]
    reads: list[tuple[nn.Module, str]]

    def state(self) -> list[Any]:
        """What must stay as it was for the nodes to stay true; compare with an earlier one."""
        found: list[Any] = [getattr(module, name, None) for module, name in self.reads]
        for m in self.modules:
            kind = type(m)
            if isinstance(m, FusedMixin):
                found += (m.__dict__.get("_fastconv_plan"), m.training, has_hooks(m))
                continue
            found += (kind, m.training, has_hooks(m), *m._parameters.values(), *m._buffers.values())
            found += m._modules.values()
            for name in _READ.get(kind, ()):
                found.append(getattr(m, name))
        return found


_READ: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "momentum", "track_running_stats"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Dropout: ("p", "inplace"),
    nn.Flatten: ("start_dim", "end_dim"),
}


_MODULE = frozenset(nn.Module().__dict__)


def same_state(a: list[Any], b: list[Any]) -> bool:
    """Identity, or equality of plain values: tensors and plans are compared by identity only."""
    if len(a) != len(b):
        return False
    return all(
        x is y or (not isinstance(x, (Tensor, nn.Module)) and _plain(x) and x == y) for x, y in zip(a, b, strict=True)
    )


def _plain(x: Any) -> bool:
    return isinstance(x, (int, float, str, tuple, type(None), type))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class Flattener:
    """Walks the rewritten graphs of a fused model with symbolic values."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.model, self.training = model, training
        self.nodes: list[Node] = []
        self.modules: dict[int, nn.Module] = {}
        self.reads: list[tuple[nn.Module, str]] = []  # plain attributes that a forward without a fused plan reads
        self.overwritten: list[Value] = []  # by steps that work in place
        self._analysis: Analysis | None = None

    def network(self, shape: tuple[int, ...]) -> Network:
        entry = Value(shape)
        result = self.call(self.model, (entry,), {})
        if not isinstance(result, Value):
            raise Refused(f"the model returns a {type(result).__name__}, a plan one tensor")
        result.readers += 1
        for value in self.overwritten:
            if value.readers > 1:
                raise Refused("a step works in place on a tensor that other steps read")
        return Network(entry, self.nodes, result, list(self.modules.values()), self.reads)

    # --- modules ---

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.modules[id(module)] = module
        if has_hooks(module):
            raise Refused(f"a {type(module).__name__} has hooks")
        if isinstance(module, FusedMixin):
            plan = module.__dict__.get("_fastconv_plan")
            if plan is None or plan.outdated(module):
                plan = refresh(module)
            kind = "tensor"
            if plan.probed and all(isinstance(args[i], list) for i in plan.probed):
                kind = "list"
            graph = plan.graphs.get((kind, module.training))
            if kwargs or len(args) != len(plan.names) or graph is None:
                raise Refused(f"{type(module).__name__} runs its stock forward for such arguments")
            return self.run(module, graph, args)
        leaf = _LEAVES.get(type(module))
        if leaf is not None:
            if kwargs or len(args) != 1:
                raise Refused(f"a {type(module).__name__} is called with {len(args)} arguments")
            return leaf(self, module, args[0])
        if has_forward(module):
            return self.stock(module, args, kwargs)
        raise Refused(f"no step for a {type(module).__name__}")

    def stock(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A container with nothing to fuse in it: its own traced graph."""
        if self._analysis is None:
            self._analysis = Analysis(self.model)
        traces = self._analysis.traces(module)
        if traces.reason:
            raise Refused(f"{type(module).__name__} cannot be traced: {traces.reason}")
        if traces.probed or kwargs or len(args) != len(traces.names):
            raise Refused(f"{type(module).__name__} takes its arguments in a way that no plan follows")
        for name in sorted(traces.reads):
            if name not in module.__dict__ or name in _MODULE:
                continue  # of the class, or in state() anyway
            if not _plain(getattr(module, name, self)):
                raise Refused(f"{type(module).__name__} reads self.{name}")
            self.reads.append((module, name))
        return self.run(module, traces.graphs["tensor", module.training], args)

    def run(self, module: nn.Module, graph: fx.Graph, args: tuple[Any, ...]) -> Any:
        env: dict[fx.Node, Any] = {}
        given = iter(args)
        for node in graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            if node.op == "placeholder":
                env[node] = next(given)
                continue
            a = fx.node.map_arg(node.args, env.__getitem__)
            k = fx.node.map_arg(node.kwargs, env.__getitem__)
            if node.op == "get_attr":
                env[node] = operator.attrgetter(node.target)(module)
            elif node.op == "call_module":
                env[node] = self.call(module.get_submodule(node.target), tuple(a), dict(k))
            else:
                table = _FUNCTIONS if node.op == "call_function" else _METHODS
                step = table.get(node.target) or _FOREIGN.get(_qualified(node.target))
                if step is None:
                    name = getattr(node.target, "__name__", node.target)
                    raise Refused(f"no step for {name}()")
                try:
                    env[node] = step(self, *a, **k)
                except TypeError as error:
                    raise Refused(f"{getattr(node.target, '__name__', node.target)}(): {error}") from error
        raise Refused("a graph without an output")

    # --- steps ---

    def add(self, op: str, inputs: list[Value], shape: tuple[int, ...], **fields: Any) -> Value:
        for value in (*inputs, fields.get("residual")):
            if isinstance(value, Value):
                value.readers += 1
            elif value is not None:
                raise Refused(f"{op} reads a {type(value).__name__}")
        out = Value(tuple(shape))
        self.nodes.append(Node(op, inputs, out, **fields))
        return out

    def conv(self, x: Value, conv: Any, bn: Any, act: Any, residual: Any = None) -> Value:
        name = runtime.activation_name(act)
        for module in (conv, bn, act):
            if isinstance(module, nn.Module):
                self.modules[id(module)] = module
        self.plain(conv, nn.Conv2d)
        if not name:
            raise Refused("a group's activation is no plain layer any more")
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise Refused(f"a convolution with padding={conv.padding!r}, padding_mode={conv.padding_mode!r}")
        if bn is not None:
            self.norm_ready(bn)
        if len(x.shape) != 4:
            raise Refused(f"a convolution of a {len(x.shape)}-d tensor")
        sizes = zip(x.shape[2:], conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True)
        shape = (x.shape[0], conv.out_channels, *(conv_output_size(*size) for size in sizes))
        if residual is not None and (not isinstance(residual, Value) or residual.shape != tuple(shape)):
            raise Refused("an addition with broadcasting")
        return self.add("conv", [x], shape, module=conv, bn=bn, act=name, residual=residual)

    def plain(self, module: Any, kind: type) -> None:
        if has_hooks(module):
            raise Refused(f"a {type(module).__name__} has hooks")
        if type(module) is not kind:
            raise Refused(f"a group's {type(module).__name__} is no plain {kind.__name__}")

    def norm_ready(self, bn: Any) -> None:
        self.plain(bn, nn.BatchNorm2d)
        if bn.training != self.training:
            raise Refused("a batch norm whose mode is not the model's")
        if (bn.running_mean is None) != (bn.running_var is None) or not (
            bn.track_running_stats or bn.running_mean is None
        ):
            raise Refused("a batch norm with part of its running statistics")
        if not self.training and bn.running_mean is None:
            raise Refused("a batch norm without running statistics")
        if self.training and bn.momentum is None and not bn.track_running_stats:
            raise Refused("a batch norm with momentum=None and no statistics")

    def norm(self, x: Value, bn: Any, act: Any, residual: Any = None) -> Value:
        name = runtime.activation_name(act)
        for module in (bn, act):
            if isinstance(module, nn.Module):
                self.modules[id(module)] = module
        self.norm_ready(bn)
        if not name or len(x.shape) != 4 or (residual is not None and residual.shape != x.shape):
            raise Refused("a batch norm group that does not run fused")
        return self.add("norm", [x], x.shape, bn=bn, act=name, residual=residual)

    def pool(self, op: str, x: Value, **options: Any) -> Value:
        if len(x.shape) != 4:
            raise Refused(f"{op} of a {len(x.shape)}-d tensor")
        for key in ("kernel_size", "stride", "padding", "dilation", "output_size"):
            if key in options:
                value = options[key]
                if value is None and key == "stride":
                    value = options["kernel_size"]
                if key == "output_size" and (value is None or (isinstance(value, (tuple, list)) and None in value)):
                    raise Refused("an adaptive pool that keeps a size")
                options[key] = _pair(value)
        if options.pop("return_indices", False):
            raise Refused("a max-pool that returns indices")
        if op == "adaptive_avg_pool":
            size = options["output_size"]
        else:
            dilation = options.get("dilation", (1, 1))
            window = (options["kernel_size"], options["stride"], options["padding"], dilation)
            size = [pool_output_size(*s, options["ceil_mode"]) for s in zip(x.shape[2:], *window, strict=True)]
        return self.add(op, [x], (*x.shape[:2], *size), options=options)

    def activation(self, x: Value, name: str, inplace: bool = False) -> Value:
        if inplace:
            self.overwritten.append(x)
        return self.add("act", [x], x.shape, act=name)

    def binary(self, op: str, a: Any, b: Any, inplace: bool = False) -> Value:
        if not isinstance(a, Value) or not isinstance(b, Value):
            raise Refused(f"{op} of a tensor and a {type(b if isinstance(a, Value) else a).__name__}")
        if inplace:
            self.overwritten.append(a)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if op == "add" and (a.shape != b.shape):
            raise Refused("an addition with broadcasting")
        return self.add(op, [a, b], shape)

    def reshape(self, x: Value, *shape: Any) -> Value:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        if not all(isinstance(s, int) for s in shape):
            raise Refused("a view() whose sizes are no integers")
        rest = math.prod(s for s in shape if s != -1)
        shape = tuple(math.prod(x.shape) // max(rest, 1) if s == -1 else s for s in shape)
        if math.prod(shape) != math.prod(x.shape):
            raise Refused(f"a view() of {x.shape} as {shape}")
        return self.add("reshape", [x], shape)

    def flatten(self, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
        n = len(x.shape)
        first, last = start_dim % n, end_dim % n
        return self.reshape(x, *x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])

    def transpose(self, x: Value, dim0: int, dim1: int) -> Value:
        shape = list(x.shape)
        shape[dim0], shape[dim1] = shape[dim1], shape[dim0]
        if len(shape) == 4:
            raise Refused("transpose() of a 4-d tensor")
        return self.add("transpose", [x], shape, options={"dims": (dim0, dim1)})

    def chunk(self, x: Value, chunks: int, dim: int) -> tuple[Value, ...]:
        size = -(-x.shape[dim] // chunks)
        if dim != 1 or len(x.shape) != 4:
            raise Refused(f"chunk() along dimension {dim}")
        starts = range(0, x.shape[1], size)
        parts = [(at, min(size, x.shape[1] - at)) for at in starts]
        n, _, h, w = x.shape
        return tuple(self.add("narrow", [x], (n, count, h, w), options={"part": (at, count)}) for at, count in parts)

    def cat(self, tensors: list[Value], dim: int = 0) -> Value:
        values = list(tensors)
        if dim % len(values[0].shape) != 1 or len(values[0].shape) != 4:
            raise Refused(f"cat() along dimension {dim}")
        n, _, *rest = values[0].shape
        return self.add("cat", values, (n, sum(v.shape[1] for v in values), *rest))

    def mean(self, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        if len(x.shape) != 4 or dim is None or sorted(d % 4 for d in dim) != [2, 3]:
            raise Refused(f"mean() over dimensions {dim}")
        out = self.pool("adaptive_avg_pool", x, output_size=(1, 1))
        return out if keepdim else self.reshape(out, *x.shape[:2])

    def linear(self, x: Value, module: nn.Linear) -> Value:
        self.modules[id(module)] = module
        if len(x.shape) != 2:
            raise Refused(f"a Linear of a {len(x.shape)}-d tensor")
        return self.add("linear", [x], (x.shape[0], module.out_features), module=module)

    def dropout(self, x: Value, p: float, training: bool, inplace: bool) -> Value:
        if not training or p == 0.0:
            return x
        if inplace:
            self.overwritten.append(x)
        return self.add("dropout", [x], x.shape, options={"p": p})

    def pooling(self, x: Value, module: nn.Module) -> Value:
        self.modules[id(module)] = module
        if has_hooks(module) or type(module) not in runtime.POOL_MODULES:
            raise Refused(f"a group's {type(module).__name__} is no plain pool any more")
        op = runtime.POOL_MODULES[type(module)].removesuffix("2d")
        return self.pool(op, x, **{name: getattr(module, name) for name in _READ[type(module)]})


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
    return x  # layout alone: values are channels_last throughout


def _act_method(name: str, inplace: bool) -> Callable[..., Any]:
    return lambda f, x: f.activation(x, name, inplace)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    runtime.conv_bn_act: lambda f, x, conv, bn, act, nhwc, add="", residual=None: f.conv(x, conv, bn, act, residual),
    runtime.conv_act: lambda f, x, conv, act, nhwc, add="", residual=None: f.conv(x, conv, None, act, residual),
    runtime.bn_act: lambda f, x, bn, act, nhwc, add="", residual=None: f.norm(x, bn, act, residual),
    runtime.pool: lambda f, x, module, nhwc: f.pooling(x, module),
    runtime.max_pool2d: _max_pool, F.max_pool2d: _max_pool, torch.max_pool2d: _max_pool,
    runtime.avg_pool2d: _avg_pool, F.avg_pool2d: _avg_pool,
    runtime.adaptive_avg_pool2d: lambda f, input, output_size: f.pool("adaptive_avg_pool", input, output_size=output_size),
    F.adaptive_avg_pool2d: lambda f, input, output_size: f.pool("adaptive_avg_pool", input, output_size=output_size),
    runtime.channels_last: _alias, runtime.contiguous: _alias, runtime.give_back: _alias,
    runtime.came_contiguous: lambda f, *values: False,
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
_METHODS: dict[str, Callable[..., Any]] = {
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


def _qualified(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"


def _stochastic_depth(f: Flattener, input: Value, p: float, mode: str, training: bool = True) -> Value:
    return input if not training or p == 0.0 else _refuse("stochastic depth in training")


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


_LEAVES: dict[type, Callable[[Flattener, Any, Any], Any]] = {
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
