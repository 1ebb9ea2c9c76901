"""Traces, effects and groups of every module of a model, each worked out once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from . import effects
from .patterns import Match, Matcher
from .runtime import has_hooks, is_norm_act
from .trace import Untraceable, base_class, required_arguments, trace

# Wrappers and containers of these origins keep their own forward; their children are handled.
FOREIGN = ("torch.", "fastconv.nn")
OPAQUE = ("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantizable")


def opaque(module: nn.Module) -> str:
    """Why a module and everything below it stays as it is; empty if it need not."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule"
    if isinstance(module, fx.GraphModule):
        return "is a torch.fx.GraphModule, whose forward is generated from its own graph"
    if type(module).__module__.startswith(OPAQUE):
        return "is a quantised module"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "has parametrizations"
    return ""


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The named children to go into: none of an opaque module."""
    return [] if opaque(module) else [(k, m) for k, m in module._modules.items() if m is not None]


def walk(model: nn.Module) -> list[nn.Module]:
    """Every module once, children before parents, without what is inside opaque ones."""
    seen: set[int] = set()
    order: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            for _, child in children(module):
                visit(child)
            order.append(module)

    visit(model)
    return order


def has_forward(module: nn.Module) -> bool:
    """Whether the module is one whose forward fuse() may rewrite; PyTorch's own need no rewriting, Sequential apart."""
    base = base_class(module)
    if base is nn.Sequential:
        return True
    if is_norm_act(module):
        return False  # a leaf, as PyTorch's own batch norm
    if base.__module__.startswith(FOREIGN) or base.forward is nn.Module.forward:
        return False
    return getattr(base.forward, "__name__", "") != "_forward_unimplemented"


@dataclass
class Traces:
    """Graphs of one module by (kind of input, training); ``reason`` instead where there are none.

    names: the required arguments. probed: indices of those whose type was tested. reads: the module's own attributes
    that the forward reads.
    """

    names: list[str] = field(default_factory=list)
    graphs: dict[tuple[str, bool], fx.Graph] = field(default_factory=dict)
    probed: frozenset[int] = frozenset()
    reads: frozenset[str] = frozenset()
    reason: str = ""


class Analysis:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.order = walk(model)
        self._traces: dict[int, Traces] = {}
        self._effects: dict[int, effects.Effect] = {}
        self._modules: dict[int, dict[str, nn.Module]] = {}
        self._keep = self.order  # ids stay valid while the modules live
        self.shared = self._shared()
        self._written: set[int] | None = None

    def _shared(self) -> dict[int, str]:
        """Reasons for the modules that are registered in several places, by id."""
        places: dict[int, int] = {}
        for module in self.order:
            for _, child in children(module):
                places[id(child)] = places.get(id(child), 0) + 1
        return {key: f"is registered in {count} places" for key, count in places.items() if count > 1}

    def paths(self, module: nn.Module) -> dict[str, nn.Module]:
        """The module's descendants by path, shared ones under each of their paths."""
        if id(module) not in self._modules:
            self._modules[id(module)] = dict(module.named_modules(remove_duplicate=False))
        return self._modules[id(module)]

    def traces(self, module: nn.Module) -> Traces:
        found = self._traces.get(id(module))
        if found is None:
            found = self._traces[id(module)] = self._trace(module)
        return found

    def _trace(self, module: nn.Module) -> Traces:
        reason = opaque(module)
        if reason:
            return Traces(reason=reason)
        if "forward" in module.__dict__:
            return Traces(reason="its forward was replaced on the instance")
        try:
            names = required_arguments(module)
            graphs, reads = {}, set()
            graphs["tensor", True], probed = trace(module, names, True, reads)
            graphs["tensor", False], again = trace(module, names, False, reads)
            probed = probed | again
        except Untraceable as error:
            return Traces(reason=str(error))
        except ValueError as error:  # inspect.signature of a forward written in C
            return Traces(reason=str(error))
        if probed:
            # The forward tells tensors from lists: a second pair of graphs for lists, if it has that door at all.
            try:
                graphs |= {("list", mode): trace(module, names, mode, reads, "list")[0] for mode in (True, False)}
            except Untraceable:
                graphs = {key: graph for key, graph in graphs.items() if key[0] == "tensor"}
        return Traces(names, graphs, frozenset(names.index(p) for p in probed), frozenset(reads))

    def flow(self, module: nn.Module, graph: fx.Graph) -> effects.Flow:
        below = self.paths(module)
        return effects.analyse(graph, lambda path: self.effect(below[path]))

    def effect(self, module: nn.Module) -> effects.Effect:
        """What calling the module may do to its arguments. Hooks may do anything."""
        key = id(module)
        if key not in self._effects:
            self._effects[key] = effects.Effect(True, True)  # while it is worked out, and for what has no graph
            self._effects[key] = self._effect(module)
        return self._effects[key]

    def _effect(self, module: nn.Module) -> effects.Effect:
        anything = effects.Effect(writes=True, returns_view=True)
        if has_hooks(module):
            return anything
        known = effects.leaf_effect(module)
        if known is not None:
            return known
        graphs = self.traces(module).graphs.values() if has_forward(module) else ()
        parts = [effects.graph_effect(g, self.flow(module, g)) for g in graphs]
        if not parts:
            return anything
        return effects.Effect(any(p.writes for p in parts), any(p.returns_view for p in parts))

    def result_written(self, module: nn.Module) -> bool:
        """Whether a forward of the model writes in place to what calling this module returns."""
        if self._written is None:
            written: set[int] = set()
            for parent in reversed(self.order):
                for graph in self.traces(parent).graphs.values() if has_forward(parent) else ():
                    flow, below = self.flow(parent, graph), self.paths(parent)
                    nodes = set().union(*flow.writes.values())
                    if id(parent) in written:
                        nodes |= flow.returned(graph)
                    written.update(id(below[n.target]) for n in nodes if n.op == "call_module")
            self._written = written
        return id(module) in self._written

    def matches(
        self, module: nn.Module, graph: fx.Graph, flow: effects.Flow, result_written: bool
    ) -> tuple[list[Match], list[tuple[str, str]]]:
        matcher = Matcher(graph, self.paths(module), flow, self.shared)
        if result_written:
            matcher.exposed = flow.returned(graph)
        return matcher.matches(), matcher.left
