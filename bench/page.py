"""bench/results/<device>/README.md and its pictures, from the JSON files that the subjects left there."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import draw
from harness import OURS, geomean

HEAD = """| operation | dtype | shapes | geometric mean x best peer | worst | best | lost |
|---|---|---|---|---|---|---|
"""


def write(out: Path) -> None:
    """Reads OUT/*.json, writes OUT/README.md and the pictures that there is data for."""
    subjects = {}
    for path in sorted(out.glob("*.json")):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and "subject" in data and "rows" in data:
            subjects[data["subject"]] = data
    if not subjects:
        return
    facts = next(iter(subjects.values()))["environment"]
    at = {name: (s["environment"]["git"]["commit"] or "unknown")[:7] for name, s in subjects.items()}
    commits = sorted(set(at.values()))
    device, versions = facts["device"], facts["versions"]
    text = [
        f"# {device['name']}\n",
        f"{device['detail']}; torch {versions['torch']}, Python {versions['python']}; commit {', '.join(commits)}. "
        "Made by `make bench`; every number is in the CSV and JSON files beside this page.\n",
    ]
    rates = [s["environment"]["rates"] for s in subjects.values() if "rates" in s["environment"]]
    best = {name: max(r[name] for r in rates if name in r) for name in rates[0]} if rates else {}
    if best:
        words = [f"copy {best['copy']:.0f} GB/s"]
        words += [f"{name} matrix product {rate:.2f} TFLOP/s" for name, rate in best.items() if name != "copy"]
        text.append("Measured rates of the machine: " + ", ".join(words) + ".\n")
    networks = {}  # script and title, by subject
    for script, title, others in (
        ("train_step", "Training step", "Training step of other models"),
        ("inference", "Inference", "Inference with other models"),
    ):
        networks |= {script: (script, title), f"{script}_models": (script, others)}
        for name in sorted(s for s in subjects if s.startswith(f"{script}_") and s.endswith("px")):
            size = name.removeprefix(f"{script}_").removesuffix("px")
            networks[name] = script, f"{title}, images of {size} px"
    operators = {name: s for name, s in subjects.items() if name not in ("memory", "seeds", *networks)}
    if operators:
        scripts = ", ".join(f"`bench/{name}.py` at {at[name]}" for name in operators)
        text += ["## Operators\n", f"{scripts}.\n", _operators(operators), _pictures(out, operators, best)]
    for name, (script, title) in networks.items():
        if name in subjects:
            text += [f"## {title}\n", f"`bench/{script}.py` at {at[name]}.\n", _steps(subjects[name]["rows"])]
            if name == script:
                draw.steps(out / f"{name}.png", subjects[name]["rows"], title)
                text.append(f"![{title}]({name}.png)\n")
    if "memory" in subjects:
        made = f"`bench/memory.py` at {at['memory']}.\n"
        text += ["## Memory kept for the backward pass\n", made, _memory(subjects["memory"]["rows"])]
    if "seeds" in subjects:
        made = f"`bench/seeds.py` at {at['seeds']}.\n"
        text += ["## Training from several seeds\n", made, _seeds(subjects["seeds"]["rows"])]
    (out / "README.md").write_text("\n".join(text))


def _operators(subjects: dict) -> str:
    lines = []
    for data in subjects.values():
        ours = [r for r in data["rows"] if r["competitor"] == "fastconv"]
        for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in ours):
            rows = [r for r in ours if (r["op"], r["dtype"]) == (op, dtype)]
            worst, best = (f(rows, key=lambda r: r["speedup"]) for f in (min, max))
            lost = sum(r["speedup"] < 1 for r in rows)
            lines.append(
                f"| {op} | {dtype} | {len(rows)} | {geomean(r['speedup'] for r in rows):.2f} "
                f"| {worst['speedup']:.2f} ({worst['shape']}) | {best['speedup']:.2f} ({best['shape']}) | {lost} |"
            )
    noisy = sum(not r["quiet"] for d in subjects.values() for r in d["rows"])
    total = sum(len(d["rows"]) for d in subjects.values())
    note = f"\n\nAbove 1 fastconv is faster than every peer. {noisy} of {total} rows were taken on a busy machine.\n"
    return HEAD + "\n".join(lines) + note


def _pictures(out: Path, subjects: dict, rates: dict) -> str:
    rows = [r for d in subjects.values() for r in d["rows"]]
    draw.peers(out / "peers.png", rows)
    text = "![Speed against the best peer](peers.png)\n"
    if draw.roofline(out / "roofline.png", rows, rates):
        text += "\n![Roofline](roofline.png)\n"
    return text


def _steps(rows: list[dict]) -> str:
    lines = ["| what | dtype | competitor | ms | images/s | x best peer |", "|---|---|---|---|---|---|"]
    for r in rows:
        mark = "**" if r["competitor"].startswith(OURS) else ""
        batch = int(r["shape"].split("x")[0])
        lines.append(
            f"| {r['op']} {r['shape']} | {r['dtype']} | {mark}{r['competitor']}{mark} | {r['us'] / 1e3:.2f} "
            f"| {batch / r['us'] * 1e6:,.0f} | {r['speedup']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _memory(rows: list[dict]) -> str:
    lines = [
        "| model | batch x px | dtype | stock | fastconv | ratio | defer_bn | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["model"], f"{r['batch']} x {r['size']}", r["dtype"], f"{r['stock_saved'] / 2**20:.1f} MiB"]
        for who, ratio in (("fastconv", "saved_ratio"), ("deferred", "deferred_ratio")):
            known = ratio in r
            cells += [f"{r[f'{who}_saved'] / 2**20:.1f} MiB" if known else "", f"{r[ratio]:.2f}" if known else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _seeds(rows: list[dict]) -> str:
    lines = [
        "ResNet50, stock and fastconv on the same batches (`bench/seeds.py`): mean loss of the last tenth of the "
        "steps, test accuracy.\n",
        "| dtype | seed | batch x steps | data | stock | fastconv | stock | fastconv |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        s, f = r["stock"], r["fastconv"]
        lines.append(
            f"| {r['dtype']} | {r['seed']} | {r['batch']} x {r['steps']} | {r['data']} | {s['end_loss']:.4f} "
            f"| {f['end_loss']:.4f} | {s['accuracy']:.1%} | {f['accuracy']:.1%} |"
        )
    lines.append("")
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        mine = [r for r in rows if r["dtype"] == dtype]
        if len(mine) < 2:
            continue
        for what, scale, unit in (("end_loss", 1, ""), ("accuracy", 100, " points")):
            off = [scale * (r["fastconv"][what] - r["stock"][what]) for r in mine]
            name = "loss" if what == "end_loss" else "accuracy"
            lines.append(
                f"- {dtype}, fastconv - stock, {name}: {statistics.fmean(off):+.4f}{unit} over {len(mine)} seeds, "
                f"standard error {statistics.stdev(off) / len(off) ** 0.5:.4f}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
