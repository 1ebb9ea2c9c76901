"""The group rewrite of a graph that torch.compile has made: functional calls, parameters as inputs, fake values known.

The patterns, the effects and the rewriting are those of fuse(). What differs is that a layer is a call of torch.conv2d
or F.batch_norm over tensors that the graph has in hand, and that the layout which stock PyTorch would give each value
is known from its fake: what leaves the graph, or depends on the layout, gets that one back.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import calls, runtime
from .effects import Effect, analyse
from .patterns import Match, Matcher
from .rewrite import Rewriter

# What a call of these counts as for the matcher; only the types matter.
CONV, NORM = nn.Conv2d(1, 1, 1, device="meta"), nn.BatchNorm2d(1, device="meta")
CONV_DEFAULTS = {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
NORM_DEFAULTS = {
    p.name: None if p.default is p.empty else p.default
    for p in list(inspect.signature(F.batch_norm).parameters.values())[1:]
}
LAYERS = {torch.conv2d: (CONV, CONV_DEFAULTS), F.batch_norm: (NORM, NORM_DEFAULTS)}
FOREIGN = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
# Calls that read the memory itself, or whose results depend on strides that Dynamo has put into the graph as numbers.
LAYOUT_BOUND = {
    "as_strided", "as_strided_", "resize_", "resize_as_", "set_", "untyped_storage", "storage", "data_ptr",
    "view_as_real", "view_as_complex", "stride", "storage_offset", "is_contiguous",
}  # fmt: skip

# Calls that draw random numbers in the order of the memory of what they are given. Dropout, the frequent one, gets
# stock's layout back instead.
RANDOM = {
    "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "normal_", "uniform_", "exponential_",
    "random_", "cauchy_", "geometric_", "log_normal_", "rrelu", "rrelu_", "alpha_dropout", "gumbel_softmax",
}  # fmt: skip


def arguments(node: fx.Node, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """The call's arguments behind its input, by name; None where they are not those of the signature."""
    names = list(defaults)
    given = dict(zip(names, node.args[1:], strict=False))
    if len(node.args) - 1 > len(names) or node.kwargs.keys() - (defaults.keys() - given.keys()):
        return None
    return {**defaults, **given, **node.kwargs}


def find_layers(graph: fx.Graph) -> dict[fx.Node, nn.Module]:
    """The calls that a group can hold."""
    found = {}
    for node in graph.nodes:
        layer, defaults = LAYERS.get(node.target, (None, None)) if node.op == "call_function" else (None, None)
        if layer is None or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        settings = arguments(node, defaults)
        if settings is None or (layer is CONV and not isinstance(settings["weight"], fx.Node)):
            continue
        fake = node.args[0].meta.get("example_value")
        if isinstance(fake, Tensor) and fake.dim() == 4:
            found[node] = layer
    return found


def nhwc_of(node: fx.Node) -> bool | None:
    """Whether stock PyTorch's value is 4-d and channels_last (True) or contiguous (False); None for any other.

    What is both, a map of one pixel or one channel, counts as contiguous: those are the strides to give back.
    """
    fake = node.meta.get("example_value")
    if not isinstance(fake, Tensor) or fake.layout is not torch.strided or fake.dim() != 4:
        return None
    if fake.is_contiguous():
        return False
    return True if fake.is_contiguous(memory_format=torch.channels_last) else None


def nchw_only(node: fx.Node) -> bool:
    """Whether stock PyTorch's value is 4-d and contiguous, and would lie otherwise in channels_last."""
    contiguous = nhwc_of(node) is False
    return contiguous and not node.meta["example_value"].is_contiguous(memory_format=torch.channels_last)


def needs_stock_layout(node: fx.Node) -> bool:
    """Whether it is dropout, whose mask is drawn in memory order, or an operator that may look at the memory."""
    return node.target is F.dropout or isinstance(node.target, FOREIGN)


class GraphRewriter(Rewriter):
    """A Dynamo graph's copy, rewritten around its groups."""

    def __init__(self, graph: fx.Graph) -> None:
        self.layers = find_layers(graph)
        flow = analyse(graph, lambda path: Effect(True, True))
        matcher = Matcher(graph, {}, flow, {}, self.layers)
        self._copy(graph, flow, matcher.matches())

    def run(self, nhwc: bool) -> list[Match]:
        """Rewrites; returns the groups. nhwc: keep 4-d tensors in channels_last between them where that is exact."""
        nhwc = nhwc and bool(self.matches) and self._layout_is_free()
        for match in self.matches:
            self._group(match, nhwc)
        if nhwc:
            self._views()
            self._restore()
            self._doors()
        return self.matches

    def _group(self, match: Match, nhwc: bool) -> None:
        nodes = [self.copy[n] for n in match.nodes]
        if not match.conv and not match.bn:
            nodes[-1].target = runtime.POOL_FUNCTIONS[nodes[-1].target]
            return
        args: list[Any] = [nodes[0].args[0]]
        if match.conv:
            weight, bias, *settings = arguments(nodes[0], CONV_DEFAULTS).values()
            args += [weight, bias, tuple(settings)]
        if match.bn:
            args.append(tuple(arguments(nodes[1 if match.conv else 0], NORM_DEFAULTS).values()))
        args += [match.act, nhwc]
        if match.add:
            args += [match.add, self.copy[match.residual]]
        function = (calls.conv_bn_act if match.bn else calls.conv_act) if match.conv else calls.bn_act
        with self.graph.inserting_before(nodes[-1]):
            fused = self.graph.call_function(function, tuple(args))
        fused.meta = dict(nodes[-1].meta)
        self._put(match, fused)

    def _layout_is_free(self) -> bool:
        """Whether nobody can tell that values inside are channels_last, once results have their own layout again."""
        for node in self.original.nodes:
            name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
            viewed_as = name == "view" and any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
            if node.op in ("call_method", "call_function") and (name in LAYOUT_BOUND or viewed_as):
                return False
            # What may write to its inputs has to get them, not copies in another layout.
            bound = name in RANDOM or (needs_stock_layout(node) and node in self.flow.writes)
            if bound and any(nchw_only(value) for value in node.all_input_nodes):
                return False
            if node.op == "call_method" and name in ("view", "view_as") and self._written_through(node):
                return False  # it has to be a view, which there may be none of a channels_last value
        seen: set[fx.Node] = set()
        for value in self._output().all_input_nodes:
            fake, owners = value.meta.get("example_value"), self.flow.owners[value]
            if fake is None or owners & seen:
                return False  # results that share memory would no longer do so after a copy
            inside = value.op not in ("placeholder", "get_attr") and isinstance(fake, Tensor)
            if inside and not fake.is_contiguous() and nhwc_of(value) is None:
                return False  # strides that are neither layout's come from views of stock's layout
            seen |= owners
        return True

    def _output(self) -> fx.Node:
        return next(iter(reversed(self.original.nodes)))

    def _restore(self) -> None:
        """Stock PyTorch's layout for results, and for the calls that need it."""
        for node in self.original.nodes:
            if node.op != "output" and not needs_stock_layout(node):
                continue
            copy = self.copy[node] if node.op != "output" else next(iter(reversed(self.graph.nodes)))
            for value in node.all_input_nodes:
                fake = value.meta.get("example_value")
                if value.op in ("placeholder", "get_attr") or not isinstance(fake, Tensor):
                    continue
                if fake.is_contiguous():
                    function = calls.contiguous
                elif nhwc_of(value):
                    function = runtime.channels_last
                else:
                    continue
                inside = self.copy[value]
                with self.graph.inserting_before(copy):
                    copy.replace_input_with(inside, self.graph.call_function(function, (inside,)))

    def _doors(self) -> None:
        """Inputs in channels_last from here on, but for weights and for what is written to or handed back."""
        returned = self._output().all_input_nodes
        inputs = [n for n in self.original.nodes if n.op == "placeholder"]
        last = self.copy[inputs[-1]]
        for node in reversed(inputs):
            used = self.flow.ever_written(node) or any(node in self.flow.owners[r] for r in returned)
            reads = [user.args[:1] == (node,) and user in self.layers for user in node.users]
            if nhwc_of(node) is not False or used or not any(reads):
                continue
            with self.graph.inserting_after(last):
                inside = self.graph.call_function(runtime.channels_last, (self.copy[node],))
            self.copy[node].replace_all_uses_with(inside, lambda user, inside=inside: user is not inside)


def rewrite(module: fx.GraphModule, nhwc: bool) -> tuple[fx.GraphModule, list[Match]]:
    """(the graph module with its groups fused, the groups); bodies of checkpointed regions are rewritten in place."""
    inner = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is CHECKPOINT and node.args[0].op == "get_attr":
            body, found = rewrite(getattr(module, node.args[0].target), nhwc)
            setattr(module, node.args[0].target, body)
            inner += found
    rewriter = GraphRewriter(module.graph)
    found = rewriter.run(nhwc)
    if not found:
        return module, inner
    fused = fx.GraphModule(module, rewriter.graph)
    fused.meta = dict(module.meta)
    return fused, inner + found
