"""Which groups hand on their result deferred (fastconv/autograd/deferred.py): recomputed in the backward, not kept.

Any group of convolution and batch norm may be: a reader that keeps its input by itself still gets it right, only then
nothing is saved. "auto" leaves those out where such a reader shows in the graph. What a forward returns is taken to go
to another convolution, as it does from block to block.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx, nn

from .patterns import Match

# Their backward reads shapes alone, so the value is not kept for their sake.
KEEP_NOTHING = {torch.cat, torch.add, operator.add, operator.sub, torch.mean, getattr}
KEEP_NOTHING_METHODS = {"size", "mean", "dim"}


def mark_deferred(
    matches: list[Match], modules: Mapping[str, nn.Module], planned: set[int], option: bool | str
) -> None:
    """Sets ``deferred`` of the matches. planned: ids of the fused containers."""
    inside = {node: match for match in matches for node in match.nodes}
    for match in matches:
        if option and match.conv and match.bn:
            last = match.nodes[-1]
            match.deferred = option is True or not any(_keeps(r, inside, modules, planned) for r in last.users)


def _keeps(
    reader: fx.Node, inside: Mapping[fx.Node, Match], modules: Mapping[str, nn.Module], planned: set[int]
) -> bool:
    """Whether the reader keeps what it reads for its backward."""
    match = inside.get(reader)
    if match is not None:
        # A convolution, or an addition or pool; a batch norm without convolution keeps its input.
        return match.conv is None and match.bn is not None and reader is match.nodes[0]
    if reader.op == "output":
        return False
    if reader.op == "call_module":
        return id(modules[reader.target]) not in planned
    if reader.op == "call_method":
        return reader.target not in KEEP_NOTHING_METHODS
    return reader.target not in KEEP_NOTHING
