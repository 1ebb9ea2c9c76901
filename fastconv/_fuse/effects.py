"""Which values of a graph may share storage, and which nodes write in place.

Conservative: an operation that is not known to return a fresh tensor may return a view of any of its arguments, and a
function from outside PyTorch may write to all of them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from .runtime import is_norm_act
from .trace import AUGMENTED

# Modules that return a tensor of their own. Activations with inplace=True are told apart by that attribute.
FRESH_MODULES = (
    _ConvNd, _NormBase, _AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, nn.Linear, nn.LayerNorm,
    nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid,
    nn.ELU, nn.PReLU, nn.Softmax, nn.Embedding,
)  # fmt: skip
FRESH_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.matmul, operator.pow, torch.cat,
    torch.add, torch.sub, torch.mul, torch.div, torch.stack, torch.mean, torch.sum, torch.matmul, torch.relu,
    torch.sigmoid, torch.tanh, torch.clone, torch.exp, torch.softmax, F.conv2d, F.linear, F.relu, F.relu6, F.leaky_relu,
    F.silu, F.gelu, F.hardswish, F.sigmoid, F.tanh, F.softmax, F.log_softmax, F.interpolate, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.batch_norm, F.layer_norm, torch.max_pool2d, torch.adaptive_avg_pool1d,
}  # fmt: skip
FRESH_METHODS = {
    "add", "sub", "mul", "div", "neg", "mean", "sum", "relu", "sigmoid", "tanh", "clone", "matmul", "softmax", "exp",
}  # fmt: skip
PLAIN_METHODS = {"size", "dim", "numel", "ndimension", "stride", "is_floating_point", "is_contiguous", "item"}
PLAIN_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad"}
STATISTICS_WRITERS = {F.batch_norm, F.instance_norm}
INPLACE_OPERATORS = {getattr(operator, f"i{name}") for name in AUGMENTED} | {operator.setitem}
PURE_ORIGINS = ("torch", "_operator", "operator", "builtins", "math")


@dataclass(frozen=True)
class Effect:
    """What calling a module may do with its arguments."""

    writes: bool
    returns_view: bool


@dataclass
class Flow:
    """The storage of every value of a graph, as the set of nodes that may own it, and the writes in place."""

    owners: dict[fx.Node, frozenset[fx.Node]]
    writes: dict[fx.Node, frozenset[fx.Node]]

    def touched_between(self, chain: list[fx.Node]) -> bool:
        """Whether a node among those of ``chain`` keeps them from running together, at the place of the last.

        It may write to what they read (or to a parameter or buffer), read what they write, or change the state of the
        thread (gradients, autocast).
        """
        inside = set(chain)
        read = frozenset().union(*(self.owners[i] for n in chain for i in n.all_input_nodes if i not in inside))
        stats = frozenset().union(*(self.writes.get(n, ()) for n in chain)) - inside
        node = chain[0]
        while node is not chain[-1]:
            hit = self.writes.get(node, frozenset())
            if node not in inside and (
                hit & read
                or any(n.op == "get_attr" for n in hit)
                or any(self.owners[i] & stats for i in node.all_input_nodes)
                or changes_state(node)
            ):
                return True
            node = node.next
        return False

    def returned(self, graph: fx.Graph) -> frozenset[fx.Node]:
        """The owners of what the graph returns."""
        output = next(iter(reversed(graph.nodes)))
        return frozenset().union(*(self.owners[n] for n in output.all_input_nodes))

    def ever_written(self, value: fx.Node) -> bool:
        return any(hit & self.owners[value] for hit in self.writes.values())


def is_inplace_call(node: fx.Node) -> bool:
    """Whether a call_function or call_method node writes to its first argument by name, or by inplace=True."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__") or node.target == "__setitem__"
    if node.target in INPLACE_OPERATORS or node.kwargs.get("inplace") is True:
        return True
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if len(node.args) > 1 and True in [a for a in node.args[1:] if isinstance(a, bool)]:
        try:
            return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace") is True
        except (TypeError, ValueError):  # builtins have no signature, and none of them takes inplace
            return False
    return False


def changes_state(node: fx.Node) -> bool:
    """Whether the node switches gradients, autocast or a transform; such nodes are in graphs of Dynamo alone."""
    if node.op != "call_function" or any(n.op != "call_function" or not changes_state(n) for n in node.all_input_nodes):
        return False
    return getattr(node.target, "__module__", None) not in ("torch", "math", "operator", "_operator", "builtins")


def _mutable(target: object) -> bool:
    """Whether a registered operator writes to arguments by its schema, or runs a graph, which may do anything."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    return isinstance(target, torch._ops.HigherOrderOperator)


def _running_statistics(node: fx.Node) -> list[fx.Node]:
    """What F.batch_norm and F.instance_norm update: their running_mean and running_var."""
    if node.target not in STATISTICS_WRITERS:
        return []
    named = [node.kwargs.get(name) for name in ("running_mean", "running_var")]
    return [a for a in (*node.args[1:3], *named) if isinstance(a, fx.Node)]


def _written(node: fx.Node, effect_of: Callable[[str], Effect]) -> list[fx.Node]:
    inputs = node.all_input_nodes
    if node.op == "call_module":
        return inputs if effect_of(node.target).writes else []
    if node.op not in ("call_function", "call_method"):
        return []
    written = [node.kwargs["out"]] if isinstance(node.kwargs.get("out"), fx.Node) else []
    if is_inplace_call(node):
        written += [a for a in node.args[:1] if isinstance(a, fx.Node)] or inputs
    elif node.op == "call_function":
        written += _running_statistics(node)
        if _mutable(node.target):
            return inputs
        origin = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
        if origin not in PURE_ORIGINS:
            return inputs
    return written


def _owners(node: fx.Node, flow: Flow, effect_of: Callable[[str], Effect]) -> frozenset[fx.Node]:
    inputs = node.all_input_nodes
    fresh = frozenset((node,))
    if node.op in ("placeholder", "get_attr"):
        return fresh
    if node.op == "call_method" and node.target in PLAIN_METHODS:
        return frozenset()
    if node.op == "call_function" and node.target is getattr and node.args[1] in PLAIN_ATTRIBUTES:
        return frozenset()
    if node.op == "call_module":
        view = effect_of(node.target).returns_view
    elif node.op == "call_method":
        view = node.target not in FRESH_METHODS
    else:
        view = node.target not in FRESH_FUNCTIONS or "out" in node.kwargs or is_inplace_call(node)
    return fresh.union(*(flow.owners[i] for i in inputs)) if view else fresh


def analyse(graph: fx.Graph, effect_of: Callable[[str], Effect]) -> Flow:
    """The graph's storage and writes; ``effect_of`` tells what calling the submodule at a path may do."""
    flow = Flow({}, {})
    for node in graph.nodes:
        flow.owners[node] = _owners(node, flow, effect_of)
        written = _written(node, effect_of)
        if written:
            flow.writes[node] = frozenset().union(*(flow.owners[w] for w in written))
    return flow


def leaf_effect(module: nn.Module) -> Effect | None:
    """The effect of one of PyTorch's own modules; None for a module of another origin."""
    if is_norm_act(module):
        return Effect(writes=False, returns_view=False)  # an activation in place writes to the norm's own result
    if getattr(module, "inplace", False):
        return Effect(writes=True, returns_view=True)
    if type(module) is nn.Sequential or not type(module).__module__.startswith(("torch.nn.", "fastconv.nn")):
        return None
    return Effect(writes=False, returns_view=not isinstance(module, FRESH_MODULES))


def graph_effect(graph: fx.Graph, flow: Flow) -> Effect:
    """What calling the module that the graph was traced from may do."""
    inputs = frozenset(n for n in graph.nodes if n.op == "placeholder")
    writes = any(any(n in inputs or n.op == "get_attr" for n in hit) for hit in flow.writes.values())
    return Effect(writes, bool(flow.returned(graph) & inputs))
