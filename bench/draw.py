"""The pictures of a results page: speed against the best peer, roofline, step time against batch size."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from harness import OURS, geomean  # noqa: E402

# Okabe & Ito 2008: told apart by colour-blind readers too
PALETTE = ("#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")
OUR_COLORS = ("#0072b2", "#000000", "#56b4e9")


def peers(path: Path, rows: list[dict]) -> None:
    """One bar per competitor and operation: geometric mean over the shapes of (best peer's time / its time)."""
    groups = list(dict.fromkeys((r["op"], r["dtype"]) for r in rows))
    names = list(dict.fromkeys(r["competitor"] for r in rows))
    of = {g: [n for n in names if any((r["op"], r["dtype"], r["competitor"]) == (*g, n) for r in rows)] for g in groups}
    height = 0.8 / max(map(len, of.values()))
    bars: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for place, group in enumerate(groups):  # a group has bars of its own competitors alone, side by side
        for i, name in enumerate(of[group]):
            mine = [r["speedup"] for r in rows if (r["op"], r["dtype"], r["competitor"]) == (*group, name)]
            bars[name][0].append(place + (i - (len(of[group]) - 1) / 2) * height)
            bars[name][1].append(geomean(mine))
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.5 * len(groups)), layout="constrained")
    for name, (at, values) in bars.items():
        axes.barh(at, values, height, label=name, color=_color(name, names))
    axes.margins(y=0.01)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(groups)), [f"{op} {dtype}" for op, dtype in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="speed, best peer of each shape = 1 (geometric mean over shapes)")
    axes.legend(fontsize=8)
    _save(figure, path)


def roofline(path: Path, rows: list[dict], rates: dict) -> bool:
    """Operations that multiply: reached TFLOP/s over FLOPs per byte, with the machine's two limits. False: no data."""
    rows = [r for r in rows if r["tflops"] > 0 and r["gb_s"] > 0]
    if not rows:
        return False
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    names = list(dict.fromkeys(r["competitor"] for r in rows))
    for name in names:
        for dtype, marker in (("fp32", "o"), ("bf16", "^"), ("fp16", "s")):
            mine = [r for r in rows if r["competitor"] == name and r["dtype"] == dtype]
            if mine:
                x, y = [1e3 * r["tflops"] / r["gb_s"] for r in mine], [r["tflops"] for r in mine]
                axes.plot(x, y, marker, color=_color(name, names), markersize=4, alpha=0.7, label=f"{name} {dtype}")
    low, high = (f(1e3 * r["tflops"] / r["gb_s"] for r in rows) for f in (min, max))
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        peak = rates.get(dtype)
        if peak:
            xs = [low, peak / rates["copy"] * 1e3, max(high, peak / rates["copy"] * 2e3)]
            axes.plot(xs, [min(peak, x * rates["copy"] / 1e3) for x in xs], color="grey", linewidth=1)
            axes.annotate(f"{dtype} {peak:.2f} TFLOP/s", (xs[-1], peak), ha="right", va="bottom", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte (least bytes)", ylabel="TFLOP/s reached")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    _save(figure, path)
    return True


def steps(path: Path, rows: list[dict], title: str) -> None:
    """Milliseconds against batch size, a line per competitor, a panel per dtype, the floor drawn in."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    names = list(dict.fromkeys(r["competitor"] for r in rows))
    figure, panels = plt.subplots(1, len(dtypes), figsize=(5.5 * len(dtypes), 4.5), layout="constrained", squeeze=False)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        for name in names:
            points = sorted(
                (int(r["shape"].split("x")[0]), r["us"] / 1e3, r["floor_share"])
                for r in rows
                if r["dtype"] == dtype and r["competitor"] == name
            )
            if points:
                batches, times, _ = zip(*points, strict=True)
                style = "-o" if name.startswith(OURS) else "--o"
                axes.plot(batches, times, style, color=_color(name, names), label=name, markersize=4)
        floors = {int(r["shape"].split("x")[0]): r["us"] * r["floor_share"] / 1e3 for r in rows if r["dtype"] == dtype}
        if any(floors.values()):
            axes.plot(sorted(floors), [floors[b] for b in sorted(floors)], ":", color="grey", label="floor")
        axes.set(
            xscale="log", yscale="log", xlabel="batch size", ylabel="ms", title=f"{title}, {rows[0]['op']}, {dtype}"
        )
        axes.set_xticks(sorted(floors), [str(batch) for batch in sorted(floors)])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
    lines: dict = {}
    for axes in panels[0]:  # a competitor may run in one dtype alone
        handles, labels = axes.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path)


def _color(name: str, names: list[str]) -> str:
    ours = [n for n in names if n.startswith(OURS)]
    if name in ours:
        return OUR_COLORS[ours.index(name) % len(OUR_COLORS)]
    others = [n for n in names if n not in ours]
    return PALETTE[others.index(name) % len(PALETTE)]


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
