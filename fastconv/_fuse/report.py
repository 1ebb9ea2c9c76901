"""What fuse() did to a model: an 80-column table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from .analysis import Analysis, opaque
from .kept import measure
from .module import PROGRAMS_OF, FusedMixin, refresh
from .plan import CHANNELS_LAST, Group, Plan, Planner
from .runtime import POOL_MODULES

CANDIDATES = (_ConvNd, _NormBase, _AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd)
WIDTH = 80


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]


@dataclass
class FusionReport:
    """The groups of a model that run as one operator each, and what was left to stock PyTorch.

    fused: number of groups. groups: list of :class:`Group`. left: (module name, reason) of every convolution, batch
    norm and pool in no group, and of every container that could not be rewritten. programs: (call, reason) of the
    model's calls on a CPU so far; no reason where they run as one program.
    """

    model: str
    groups: list[Group] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    layers: int = 0  # convolutions, batch norms and pools in the model
    layers_fused: int = 0
    kept: int | None = None  # bytes that a training step on the example input keeps for its backward
    stock_kept: int | None = None  # the same of the stock model
    programs: list[tuple[str, str]] = field(default_factory=list)

    @property
    def fused(self) -> int:
        return len(self.groups)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as a JSON object: model, fused, layers, layers_fused, kept, stock_kept, patterns, groups, left,
        programs."""
        body = {
            "model": self.model, "fused": self.fused, "layers": self.layers, "layers_fused": self.layers_fused,
            "kept": self.kept, "stock_kept": self.stock_kept, "patterns": self.patterns(),
            "groups": [asdict(g) for g in self.groups],
            "left": [{"name": name, "reason": reason} for name, reason in self.left],
            "programs": [{"call": call, "reason": reason} for call, reason in self.programs],
        }  # fmt: skip
        return json.dumps(body, indent=indent)

    def patterns(self) -> dict[str, int]:
        """Number of groups by pattern, most frequent first."""
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.pattern] = counts.get(group.pattern, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        rule = "-" * WIDTH
        lines = [
            f"{self.model}: {self.fused} groups, {self.layers_fused} of {self.layers} layers fused, "
            f"{len(self.left)} left",
            rule,
            f"{'container':<22} {'pattern':<20} modules",
            rule,
        ]
        measured = self.kept is not None
        if measured:
            lines[2] = f"{'container':<17} {'pattern':<19} {'backend':<7} {'KiB':>7} {'stock':>7} modules"
        for g in self.groups:
            prefix = f"{g.container}." if g.container else ""
            members = " ".join(m.removeprefix(prefix) for m in g.members) or "(function)"
            if len(g.modes) == 1:
                members += f" ({g.modes[0]} only)"
            pattern = g.pattern + (" *" if g.deferred else "")
            if measured:
                sizes = " ".join(f"{'-' if n is None else f'{n / 1024:.0f}':>7}" for n in (g.kept, g.stock_kept))
                row = f"{_cut(g.container or '(model)', 17):<17} {pattern:<19} {g.backend or '-':<7} {sizes} {members}"
            else:
                row = f"{_cut(g.container or '(model)', 22):<22} {pattern:<20} {members}"
            lines.append(row[:WIDTH])
        if self.left:
            lines += [rule, f"{'left':<30} why", rule]
            for name, reason in self.left:
                first, *rest = _wrap(reason, WIDTH - 31)
                lines.append(f"{_cut(name or '(model)', 30):<30} {first}")
                lines += [" " * 31 + text for text in rest]
        if self.programs:
            lines += [rule, *(f"{call}: {reason or 'one program'}" for call, reason in self.programs)]
        lines += [rule, "total: " + (", ".join(f"{n} {p}" for p, n in self.patterns().items()) or "nothing fused")]
        if measured:
            sizes = f"{self.kept / 2**20:.1f} MiB, stock {self.stock_kept / 2**20:.1f} MiB"
            lines.append(f"kept by a training step for its backward: {sizes}")
        if any(g.deferred for g in self.groups):
            lines.append("* the result is recomputed in the backward, not kept (defer_bn)")
        return "\n".join(line for text in lines for line in _wrap(text, WIDTH))

    __repr__ = __str__


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, broken at spaces; text that fits is kept as it is, spaces and all."""
    lines = []
    while len(text) > width:
        at = text.rfind(" ", 1, width + 1)
        at = at if at > 0 else width
        lines.append(text[:at])
        text = text[at:].lstrip()
    return [*lines, text]


def report(model: nn.Module, inputs: Sequence[Any] | None = None) -> FusionReport:
    """The model's report; with ``inputs``, of a training step on them too."""
    result = _report(model)
    if inputs is None:
        return result
    fused, stock = measure(model, inputs, [g.members for g in result.groups])
    result.kept, result.stock_kept = fused.total, stock.total
    for i, g in enumerate(result.groups):
        if g.members and g.members[0] in fused.backends:
            name = g.members[0]
            result.groups[i] = replace(
                g, backend=fused.backends[name], kept=fused.groups[name], stock_kept=stock.groups[name]
            )
    return result


def _report(model: nn.Module) -> FusionReport:
    analysis = Analysis(model)
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names.setdefault(id(module), name)
    order = {key: i for i, key in enumerate(names)}
    result = FusionReport(getattr(type(model), "_fastconv_base", type(model)).__name__)
    held = model.__dict__.get(PROGRAMS_OF)
    result.programs = [] if held is None else held.describe()
    reasons: dict[int, str] = {}
    fused: set[int] = set()
    planner = Planner(analysis, CHANNELS_LAST)
    failed = []
    for module in sorted(analysis.order, key=lambda m: order[id(m)]):
        mine = isinstance(module, FusedMixin)
        plan: Plan = (module.__dict__.get("_fastconv_plan") or refresh(module)) if mine else planner.plan(module, False)
        prefix = f"{names[id(module)]}." if names[id(module)] else ""
        below = analysis.paths(module)
        if mine:
            for group in plan.groups:
                members = tuple(prefix + m for m in group.members)
                result.groups.append(replace(group, container=names[id(module)], members=members))
                fused.update(id(below[m]) for m in group.members)
        else:
            for group in plan.groups:
                for member in group.members:
                    reasons.setdefault(id(below[member]), "not fused: fuse() was not called on it")
        for path, reason in plan.left:
            reasons.setdefault(id(below[path]), reason)
        sealed = opaque(module)
        reason = plan.reason or sealed
        holds = any(isinstance(m, CANDIDATES) for m in module.modules()) or sealed.startswith("is a")
        if reason and holds and not isinstance(module, CANDIDATES):
            failed.append((module, reason))
    for module in analysis.order:
        if isinstance(module, CANDIDATES):
            reason = opaque(module)
            if reason:
                reasons[id(module)] = reason
    candidates = [(n, m) for n, m in model.named_modules() if isinstance(m, CANDIDATES)]
    inside = {
        id(m): f"inside {names[id(c)] or 'the model'}, which was left: {r}"
        for c, r in reversed(failed)
        for m in c.modules()
    }
    result.layers = len(candidates)
    result.layers_fused = sum(id(m) in fused for _, m in candidates)
    result.left = [(names[id(c)], r) for c, r in failed]
    for name, module in candidates:
        if id(module) not in fused:
            default = inside.get(id(module), "not called by any forward that could be traced")
            if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, *POOL_MODULES)):
                default = f"is a {type(module).__name__}, which fuse() has no group for"
            result.left.append((name, reasons.get(id(module), default)))
    return result
