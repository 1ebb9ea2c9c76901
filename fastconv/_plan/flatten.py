"""A model's traced forwards, fused groups included, as one flat list of nodes for one input shape."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from .._fuse import runtime
from .._fuse.analysis import Analysis, has_forward
from .._fuse.module import FusedMixin, refresh
from .._fuse.runtime import has_hooks
from ..ops.fake import conv_output_size, pool_output_size
from . import steps
from .network import MODULE_STATE, READ, Network, Node, Refused, Value, plain


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
        self._stock = False  # whether the step at hand is PyTorch's own

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
        leaf = steps.LEAVES.get(type(module))
        if leaf is not None:
            if kwargs or len(args) != 1:
                raise Refused(f"a {type(module).__name__} is called with {len(args)} arguments")
            self._stock = True
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
            if name not in module.__dict__ or name in MODULE_STATE:
                continue  # of the class, or in state() anyway
            if not plain(getattr(module, name, self)):
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
                table = steps.FUNCTIONS if node.op == "call_function" else steps.METHODS
                step = table.get(node.target) or steps.foreign(node.target)
                if step is None:
                    name = getattr(node.target, "__name__", node.target)
                    raise Refused(f"no step for {name}()")
                self._stock = getattr(node.target, "__module__", "") != runtime.__name__
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
        self.nodes.append(Node(op, inputs, out, stock=self._stock, **fields))
        return out

    def note(self, *members: Any) -> None:
        """Remembers a group's modules: the plan rests on their state. Names and None are no modules."""
        self.modules.update((id(m), m) for m in members if isinstance(m, nn.Module))

    def conv(self, x: Value, conv: Any, bn: Any, act: Any, residual: Any = None) -> Value:
        name = runtime.activation_name(act)
        self.note(conv, bn, act)
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
        self.note(bn, act)
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
        out = self.pool("adaptive_avg_pool", x, output_size=(1, 1), mean=True)  # mean: the function that it was
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
        return self.pool(op, x, **{name: getattr(module, name) for name in READ[type(module)]})
