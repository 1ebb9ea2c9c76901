"""A graph rewritten around its groups, in a copy.

Beside the groups: 4-d inputs become channels_last at the door and results go back to the caller's layout, view() may
copy, dropout draws the stock mask, and modules that keep a forward of their own get contiguous tensors.
"""

from __future__ import annotations

from torch import fx, nn

from . import runtime
from .analysis import Analysis, has_forward
from .effects import Flow
from .patterns import Match


class Rewriter:
    """One graph's copy, rewritten."""

    def __init__(
        self, analysis: Analysis, module: nn.Module, graph: fx.Graph, flow: Flow, matches: list[Match], kind: str
    ) -> None:
        self.analysis, self.modules, self.kind = analysis, analysis.paths(module), kind
        self._copy(graph, flow, matches)

    def _copy(self, graph: fx.Graph, flow: Flow, matches: list[Match]) -> None:
        self.original, self.flow, self.matches = graph, flow, matches
        self.graph = fx.Graph()
        self.copy: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(graph, self.copy))

    def run(self, nhwc: bool, planned: set[int]) -> bool:
        """Rewrites; returns whether the result has to replace the stock forward.

        nhwc: whether to keep 4-d tensors in channels_last. planned: ids of the modules that do so already.
        """
        for match in self.matches:
            self._group(match, nhwc)
        if not nhwc:
            return bool(self.matches)
        views = self._views()
        inside = any(n.op == "call_module" and id(self.modules[n.target]) in planned for n in self.original.nodes)
        if self.matches or inside:
            self._dropout()
            self._foreign()
            self._layout()
        return bool(self.matches or inside or views)

    def _group(self, match: Match, nhwc: bool) -> None:
        nodes = [self.copy[n] for n in match.nodes]
        last = nodes[-1]
        if not match.conv and not match.bn and not match.pool:
            last.target = runtime.POOL_FUNCTIONS[last.target]
            return
        with self.graph.inserting_before(last):
            layers = [self.graph.get_attr(p) for p in (match.conv, match.bn, match.pool) if p]
            args = [nodes[0].args[0], *layers]
            if not match.pool:
                args.append(self.graph.get_attr(match.act) if match.act_is_module else match.act)
            args.append(nhwc)
            if match.add:
                args += [match.add, self.copy[match.residual]]
            if match.deferred:
                args += [True] if match.add else ["", None, True]
            if match.pool:
                function = runtime.pool
            elif match.conv:
                function = runtime.conv_bn_act if match.bn else runtime.conv_act
            else:
                function = runtime.bn_act
            fused = self.graph.call_function(function, tuple(args))
        self._put(match, fused)

    def _put(self, match: Match, fused: fx.Node) -> None:
        """``fused`` in place of the group's nodes."""
        nodes = [self.copy[n] for n in match.nodes]
        fused.kwargs = {"label": f"{match.pattern}: {' '.join(match.members)}"}
        nodes[-1].replace_all_uses_with(fused)
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.copy[match.nodes[-1]] = fused

    def _views(self) -> bool:
        """Lets view() copy where a channels_last tensor has no such view, unless something writes through it."""
        found = False
        for node in self.original.nodes:
            if node.op != "call_method" or node.target not in ("view", "view_as") or self._written_through(node):
                continue
            copy = self.copy[node]
            copy.op, copy.target = "call_function", getattr(runtime, node.target)
            found = True
        return found

    def _written_through(self, view: fx.Node) -> bool:
        """Whether a write to one side of a view is seen through the other: then it has to stay a view."""
        owned = self.flow.owners[view]
        outside = any(n.op in ("placeholder", "get_attr") for n in owned)
        node = view.next
        written = {True: False, False: False}  # through the view; through what it views
        while node.op != "root":
            for value in node.all_input_nodes:
                of_view = view in self.flow.owners[value]
                if self.flow.owners[value] & owned and written[not of_view]:
                    return True
            hit = self.flow.writes.get(node)
            if hit and hit & owned:
                written[view in hit] = True
            node = node.next
        return written[True] and outside

    def _dropout(self) -> None:
        """Dropout draws its mask in memory order: contiguous values get the mask that the stock model gives them."""
        for node in self.original.nodes:
            if node.op == "call_function" and node.target in runtime.DROPOUT_FUNCTIONS:
                self.copy[node].target = runtime.DROPOUT_FUNCTIONS[node.target]
                continue
            kind = type(self.modules[node.target]) if node.op == "call_module" else None
            if kind in runtime.DROPOUT_MODULES and len(node.args) == 1:
                copy = self.copy[node]
                with self.graph.inserting_before(copy):
                    layer = self.graph.get_attr(node.target)
                copy.op, copy.target, copy.args = "call_function", runtime.drop, (*copy.args, layer)

    def _foreign(self) -> None:
        """Modules whose forward could not be rewritten get contiguous tensors: they may call view()."""
        for node in self.original.nodes:
            if node.op != "call_module" or not has_forward(self.modules[node.target]):
                continue
            if self.analysis.traces(self.modules[node.target]).reason:
                copy = self.copy[node]
                with self.graph.inserting_before(copy):
                    copy.args, copy.kwargs = fx.node.map_arg(
                        (copy.args, copy.kwargs), lambda n: self.graph.call_function(runtime.contiguous, (n,))
                    )

    def _layout(self) -> None:
        """Inputs to channels_last at the door, results back to the caller's layout; no copy where nothing changes."""
        inputs = [n for n in self.original.nodes if n.op == "placeholder"]
        output = next(iter(reversed(self.graph.nodes)))
        if not output.all_input_nodes:
            return
        returned = next(iter(reversed(self.original.nodes))).all_input_nodes
        with self.graph.inserting_after(self.copy[inputs[-1]]):
            flag = self.graph.call_function(runtime.came_contiguous, tuple(self.copy[p] for p in inputs))
        for p in inputs:
            # One that is written to, or handed back, has to stay the caller's own tensor.
            if (
                self.kind == "tensor"
                and not self.flow.ever_written(p)
                and not any(p in self.flow.owners[r] for r in returned)
            ):
                copy = self.copy[p]
                with self.graph.inserting_after(flag):
                    inside = self.graph.call_function(runtime.channels_last, (copy,))
                copy.replace_all_uses_with(inside, lambda user: user not in (inside, flag))  # noqa: B023
        with self.graph.inserting_before(output):
            output.args = (self.graph.call_function(runtime.give_back, (output.args[0], flag)),)
