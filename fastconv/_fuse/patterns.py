"""The groups in a graph: conv -> (bn) -> (add) -> (act), bn -> (add) -> (act), and pools. A layer alone is one too.

A chain goes on only while the value has one reader, and while running it at the place of its last node reads the same
inputs as running it node by node: no write in place between the two may touch them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .effects import Flow, is_inplace_call
from .runtime import (
    ACTIVATION_MODULES,
    INNER,
    POOL_FUNCTIONS,
    POOL_MODULES,
    activation_name,
    has_hooks,
    is_norm_act,
)

ADD_FUNCTIONS = {operator.add: "add", operator.iadd: "iadd", torch.add: "add"}
ADD_METHODS = {"add": "add", "add_": "iadd", "__add__": "add", "__radd__": "add", "__iadd__": "iadd"}
ACT_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", F.leaky_relu: "leaky_relu",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid", F.tanh: "tanh", torch.tanh: "tanh",
    torch.tanh_: "tanh", F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
}  # fmt: skip
ACT_METHODS = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}
ACT_ARGUMENTS = {"inplace": None, "negative_slope": 0.01, "approximate": "none"}  # None: any value
# What stock PyTorch's backward keeps of these is their input, the fused kernels' their output; or, last, the residual.
SAVE_OUTPUT_INSTEAD = {"relu6", "leaky_relu"}
SAVE_RESIDUAL = {"silu", "gelu", "hardswish"}


@dataclass
class Match:
    """One group: its nodes from first to last, and what the fused call needs."""

    nodes: list[fx.Node]
    conv: str | None = None
    bn: str | None = None
    pool: str | None = None
    add: str = ""
    residual: fx.Node | None = None
    act: str | None = None  # a module's path, or an activation's name
    act_is_module: bool = False
    deferred: bool = False
    words: list[str] = field(default_factory=list)

    @property
    def pattern(self) -> str:
        return "+".join(self.words)

    @property
    def members(self) -> list[str]:
        paths = [self.conv, self.bn, self.pool, self.act if self.act_is_module else None]
        return [p for p in paths if p is not None]


def describe(module: nn.Module, wanted: type) -> str:
    """Why a module is not a plain ``wanted`` that a group can hold; empty if it is."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "has parametrizations"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "is lazy and not initialised yet"
    if wanted is nn.BatchNorm2d and is_norm_act(module):
        if type(module.drop) is not nn.Identity:
            return f"has a {type(module.drop).__name__} between norm and activation"
        if type(module.act) is not nn.Identity and not activation_name(module.act):
            return f"has the activation {type(module.act).__name__}, which no group has"
    elif type(module) is not wanted:
        return f"is a {type(module).__name__}, not a plain {wanted.__name__}"
    if has_hooks(module):
        return "has hooks" if "forward" not in module.__dict__ else "has its forward replaced"
    return ""


class Matcher:
    """Finds the groups of one graph.

    shared: reasons by id() of modules that are used in more than one place. layers: functional calls that count as
    calls of a layer of that type, under the node's name (Dynamo's graphs have no modules, see graph.py). ``left``
    collects (path, reason).
    """

    def __init__(
        self, graph: fx.Graph, modules: Mapping[str, nn.Module], flow: Flow, shared: Mapping[int, str],
        layers: Mapping[fx.Node, nn.Module] | None = None,
    ):  # fmt: skip
        self.graph, self.modules, self.flow, self.shared = graph, modules, flow, shared
        self.layers = layers or {}
        self.taken: set[fx.Node] = set()
        self.exposed: frozenset[fx.Node] = frozenset()  # values that a caller writes to in place
        self.left: list[tuple[str, str]] = []
        self.calls: dict[int, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                key = id(modules[node.target])
                self.calls[key] = self.calls.get(key, 0) + 1
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def matches(self) -> list[Match]:
        found = [m for start in (self._from_conv, self._from_norm, self._pool) for m in self._each(start)]
        return sorted(found, key=lambda m: self.order[m.nodes[-1]])

    def _each(self, start: Callable[[fx.Node], Match | None]) -> list[Match]:
        # Last chain first: of two chains that meet in an addition, the later one takes it.
        found = [start(node) for node in reversed(self.graph.nodes) if node not in self.taken]
        return [m for m in found if m]

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else self.layers.get(node)

    def _name(self, node: fx.Node) -> str:
        return node.name if node in self.layers else node.target

    def _reason(self, node: fx.Node, wanted: type) -> str:
        """Why the module called at ``node`` cannot be a member; empty if it can."""
        module = self._module(node)
        reason = describe(module, wanted) or self.shared.get(id(module), "")
        if node in self.layers:
            return reason
        if not reason and self.calls[id(module)] > 1:
            reason = "is called more than once"
        if not reason and (len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node)):
            reason = "is called with other arguments than one input"
        return reason

    def _from_conv(self, node: fx.Node) -> Match | None:
        if not isinstance(self._module(node), _ConvNd):
            return None
        reason = self._reason(node, nn.Conv2d)
        if reason:
            self.left.append((self._name(node), reason))
            return None
        steps = [Match([node], conv=self._name(node), words=["conv"])]
        reader = self._reader(node)
        normed = reader is not None and isinstance(self._module(reader), _BatchNorm) and reader.args[:1] == (node,)
        if normed and not self._reason(reader, nn.BatchNorm2d):
            match = Match([node, reader], conv=self._name(node), bn=self._name(reader), words=["conv", "bn"])
            steps.append(self._with_inner(match))
        return self._finish(steps)

    def _from_norm(self, node: fx.Node) -> Match | None:
        if not isinstance(self._module(node), _BatchNorm):
            return None
        reason = self._reason(node, nn.BatchNorm2d)
        if reason:
            self.left.append((self._name(node), reason))
            return None
        match = self._with_inner(Match([node], bn=self._name(node), words=["bn"]))
        if match.act and match.act == INNER:
            self.taken.add(node)
            return match
        return self._finish([match])

    def _with_inner(self, match: Match) -> Match:
        """The match with the activation that its norm calls itself."""
        module = self._module(match.nodes[-1])
        if is_norm_act(module) and type(module.act) is not nn.Identity:
            match.act = INNER
            match.words.append(activation_name(module.act))
        return match

    def _pool(self, node: fx.Node) -> Match | None:
        if node.op == "call_function" and node.target in POOL_FUNCTIONS:
            return Match([node], words=[POOL_FUNCTIONS[node.target].__name__])
        module = self._module(node)
        wanted = next((k for k in POOL_MODULES if isinstance(module, k)), None)
        if wanted is None:
            return None
        reason = describe(module, wanted)  # a pool has no state: one that is shared is as good as two
        if reason or len(node.args) != 1 or node.kwargs:
            self.left.append((node.target, reason or "is called with other arguments than one input"))
            return None
        return Match([node], pool=node.target, words=[POOL_MODULES[wanted]])

    def _reader(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _finish(self, steps: list[Match]) -> Match:
        """The longest exact group that goes on from ``steps`` (shorter to longer); a layer alone always is one."""
        for grow in (self._add, self._act) if steps[-1].act is None else ():
            longer = grow(steps[-1])
            if longer:
                steps.append(longer)
        match = next(m for m in reversed(steps) if not self.flow.touched_between(m.nodes))
        self.taken.update(match.nodes)
        return match

    def _add(self, match: Match) -> Match | None:
        """The match with the addition that reads it."""
        value = match.nodes[-1]
        node = self._reader(value)
        table = {"call_function": ADD_FUNCTIONS, "call_method": ADD_METHODS}.get(node.op if node else "", {})
        add = table.get(node.target) if node is not None else None
        if add is None or node in self.taken or node.kwargs or len(node.args) != 2:
            return None
        if add == "iadd" and node.args[0] is not value:
            return None  # the write goes to the residual, which others may see
        residual = node.args[1] if node.args[0] is value else node.args[0]
        if not isinstance(residual, fx.Node) or residual is value:
            return None
        return self._grown(match, node, "add", add=add, residual=residual)

    def _act(self, match: Match) -> Match | None:
        """The match with the activation that reads it."""
        value = match.nodes[-1]
        node = self._reader(value)
        if node is None or node.args[:1] != (value,) or len(node.all_input_nodes) != 1:
            return None
        name, act, inplace = "", None, False
        module = self._module(node)
        if module is not None:
            name, act, inplace = activation_name(module), node.target, getattr(module, "inplace", False)
            if type(module) not in ACTIVATION_MODULES or not name or len(node.args) != 1 or node.kwargs:
                return None
        else:
            name = act = self._act_function(node)
            inplace = is_inplace_call(node)
        if not name or node.target in ADD_FUNCTIONS:
            return None
        written = node in self.exposed or self.flow.ever_written(node)
        if name in SAVE_OUTPUT_INSTEAD and not inplace and written:
            return None  # legal in stock PyTorch, whose backward does not read the output
        if name in SAVE_RESIDUAL and match.residual is not None and self.flow.ever_written(match.residual):
            return None  # likewise for the residual
        return self._grown(match, node, name, act=act, act_is_module=module is not None)

    def _act_function(self, node: fx.Node) -> str:
        if node.op == "call_method":
            return ACT_METHODS.get(node.target, "") if len(node.args) == 1 and not node.kwargs else ""
        if node.op != "call_function":
            return ""
        name = ACT_FUNCTIONS.get(node.target, "")
        if not name:
            return ""
        if len(node.args) > 1:
            try:
                arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
            except (TypeError, ValueError):  # a builtin: its extra arguments are not worth decoding
                return ""
            extra = {k: v for k, v in arguments.items() if v is not node.args[0]}
        else:
            extra = node.kwargs
        plain = all(k in ACT_ARGUMENTS and ACT_ARGUMENTS[k] in (None, v) for k, v in extra.items())
        return name if plain else ""

    def _grown(self, match: Match, node: fx.Node, word: str, **changes: Any) -> Match:
        fields = {**match.__dict__, **changes}
        fields.update(nodes=[*match.nodes, node], words=[*match.words, word])
        return Match(**fields)
