"""What a fused container runs: its graphs, rewritten and compiled.

A plan names its members by path and holds no module, so one plan serves every copy of the container.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .analysis import Analysis, children, has_forward
from .defer import mark_deferred
from .patterns import Match
from .rewrite import Rewriter
from .trace import base_class

CHANNELS_LAST = torch.channels_last
_serial = itertools.count()


@dataclass(frozen=True)
class Group:
    """Layers that run as one operator.

    container: name of the module whose forward calls them ("" for the model itself). members: the layers' full names,
    in order; functional calls have none. pattern: "conv+bn+relu", "conv+bn+add+relu", "bn+relu", "max_pool2d", ...
    modes: "train", "eval" or both. deferred: its result is recomputed in the backward instead of kept.

    With an example input, of a training step on it: backend: the one that ran the group. kept: bytes that the group's
    results hold for the backward. stock_kept: those of the same layers in the stock model.
    """

    container: str
    members: tuple[str, ...]
    pattern: str
    modes: tuple[str, ...]
    deferred: bool = False
    backend: str = ""
    kept: int | None = None
    stock_kept: int | None = None


@dataclass(eq=False)
class Plan:
    """Compiled forwards by (kind of input, training), and what they were derived from.

    Empty ``functions``: the stock forward runs. ``watch``: the submodules by container path that the graph was unrolled
    over. ``reads``: the container's own attributes that the graphs depend on. ``flags``: paths of modules whose code is
    inlined in graphs that depend on the mode. ``converted``: paths of the convolutions whose weights fuse() made
    channels_last. ``written``: a caller writes in place to the results.
    """

    names: list[str] = field(default_factory=list)
    functions: dict[tuple[str, bool], Callable[..., Any]] = field(default_factory=dict)
    graphs: dict[tuple[str, bool], fx.Graph] = field(default_factory=dict)  # what ``functions`` were compiled from
    sources: tuple[Any, ...] = ()
    probed: frozenset[int] = frozenset()
    watch: tuple[tuple[str, tuple[str, ...]], ...] = ()
    flags: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    groups: list[Group] = field(default_factory=list)
    convs: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    reason: str = ""
    views: bool = False
    written: bool = False
    memory_format: torch.memory_format = CHANNELS_LAST
    defer_bn: bool | str = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_plan, ()  # compiled code does not travel: it is derived anew where it arrives

    def same_as(self, other: Plan | None) -> bool:
        return other is not None and (self.sources, self.memory_format) == (other.sources, other.memory_format)

    def depends_on(self, name: str) -> bool:
        """Whether assigning this attribute of the container may change its graphs."""
        return bool(self.reason) or name in self.reads or "__dict__" in self.reads

    def outdated(self, owner: nn.Module) -> bool:
        """Whether submodules were added, removed or renamed since."""
        for path, names in self.watch:
            module = owner
            for name in path.split(".") if path else ():
                module = module._modules.get(name)
                if module is None:
                    return True
            if tuple(module._modules) != names:
                return True
        return False

    def select(self, owner: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The compiled forward for this call, or None where the graph was not traced for such arguments."""
        if len(args) != len(self.names):
            return None
        if any(value is None for value in args):
            return None  # forward may test for it, and the trace has taken the other branch
        kind = "tensor"
        if not all(isinstance(args[i], Tensor) for i in self.probed):
            kind = "list" if all(isinstance(args[i], list) for i in self.probed) else ""
        for path in self.flags:
            if owner.get_submodule(path).training != owner.training:
                return None
        return self.functions.get((kind, owner.training))


def _no_plan() -> None:
    return None


class Planner:
    """Makes the plans of a model's modules; children have to be planned before their parents."""

    def __init__(self, analysis: Analysis, memory_format: torch.memory_format, defer_bn: bool | str = False) -> None:
        self.analysis, self.defer_bn = analysis, defer_bn
        self.memory_format = memory_format
        self.nhwc = memory_format == CHANNELS_LAST
        self.planned: set[int] = set()
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def plan(self, module: nn.Module, written: bool | None = None) -> Plan:
        """The module's plan; without functions where nothing is to be rewritten.

        written: whether its callers write to its results; by default, what the analysed model says.
        """
        if not has_forward(module):
            return Plan(memory_format=self.memory_format)
        traces = self.analysis.traces(module)
        plan = Plan(
            traces.names, probed=traces.probed, reads=traces.reads, reason=traces.reason,
            memory_format=self.memory_format, defer_bn=self.defer_bn,
            watch=(("", tuple(module._modules)),),
        )  # fmt: skip
        plan.written = self.analysis.result_written(module) if written is None else written
        sources, compiled, rewritten = [], {}, False
        for (kind, training), graph in traces.graphs.items():
            flow = self.analysis.flow(module, graph)
            matches, left = self.analysis.matches(module, graph, flow, plan.written)
            mark_deferred(matches, self.analysis.paths(module), self.planned, self.defer_bn)
            self._note(plan, matches, left, kind, "train" if training else "eval")
            rewriter = Rewriter(self.analysis, module, graph, flow, matches, kind)
            rewritten |= rewriter.run(self.nhwc, self.planned)
            plan.views |= any(n.op == "call_method" and n.target in ("view", "view_as") for n in graph.nodes)
            plan.graphs[kind, training] = rewriter.graph
            code = rewriter.graph.python_code("self")
            key = (code.src, tuple(sorted((k, id(v)) for k, v in code.globals.items())))
            compiled[kind, training] = (key, code)
            sources.append((kind, training, code.src))
        plan.sources = tuple(sources)
        if not rewritten:
            plan.graphs.clear()
        else:
            plan.functions = {k: self._compile(module, *v) for k, v in compiled.items()}
            self._watch(plan, module, traces.graphs)
            self.planned.add(id(module))
        return plan

    def _note(self, plan: Plan, matches: list[Match], left: list[tuple[str, str]], kind: str, mode: str) -> None:
        for match in matches:
            members = tuple(match.members)
            if match.conv and match.conv not in plan.convs:
                plan.convs.append(match.conv)
            same = [g for g in plan.groups if (g.members, g.pattern) == (members, match.pattern)]
            seen = [g for g in same if mode not in g.modes]
            if same and kind == "list":
                continue  # the graph for lists has the groups of the one for tensors
            if seen:
                plan.groups[plan.groups.index(seen[0])] = Group(
                    "", members, match.pattern, (*seen[0].modes, mode), match.deferred
                )
            else:
                plan.groups.append(Group("", members, match.pattern, (mode,), match.deferred))
        plan.left += [entry for entry in left if entry not in plan.left]

    def _watch(self, plan: Plan, module: nn.Module, graphs: dict[Any, fx.Graph]) -> None:
        called = {n.target for g in graphs.values() for n in g.nodes if n.op == "call_module"}
        prefixes = {".".join(t.split(".")[:i]) for t in called for i in range(1, t.count(".") + 1)}
        inlined = []

        def visit(prefix: str, parent: nn.Module) -> None:
            for name, child in children(parent):
                path = prefix + name
                if path in called:
                    continue
                inlined.append(path)
                if path in prefixes or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                    plan.watch += ((path, tuple(child._modules)),)
                    visit(path + ".", child)

        visit("", module)
        by_mode = {kind: plan.functions[kind, True] is not plan.functions[kind, False] for kind, _ in plan.functions}
        plan.flags = tuple(inlined) if any(by_mode.values()) else ()

    def _compile(self, module: nn.Module, key: Any, code: Any) -> Callable[..., Any]:
        if key not in self._compiled:
            name = f"<fastconv.fuse {base_class(module).__name__} {next(_serial)}>"
            scope = dict(code.globals)
            exec(compile(code.src, name, "exec"), scope)
            # Tracebacks and debuggers show the generated lines.
            linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
            self._compiled[key] = scope["forward"]
        return self._compiled[key]
