"""The report of a run: report.json for programs, report.md with its two pictures for people."""

from __future__ import annotations

import json
import resource
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from machine import device_facts, git_facts, versions

from . import compare, plots
from .checkpoint import binding_settings, write_atomically
from .data import Dataset
from .settings import RECIPES
from .trainee import Trainee

BUSY_SPREAD = 1.3  # a quiet machine's steps keep well within; see _how
TITLES = {"cifar10": "CIFAR-10", "digits": "handwritten digits", "synthetic": "synthetic patterns"}


def collect(args, dataset: Dataset, trainees: list[Trainee], weights: str, notes: list[str], ranks, seconds) -> dict:
    """Everything that the report says, as plain data. `seconds`: of the whole run, set-up and testing included."""
    batch = args.batch_size * ranks.count
    probe = [dataset.train.images[: args.batch_size], dataset.train.labels[: args.batch_size]]
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *_arguments()]),
        "recipe": args.recipe,
        "backend": args.backend,
        "settings": {
            **binding_settings(args, dataset.name),
            "epochs": args.epochs,
            "max_steps": args.max_steps,
            "loader": args.loader,
            "processes": ranks.count,
        },
        "dataset": {
            "asked_for": args.dataset,
            "name": dataset.name,
            "origin": dataset.origin,
            "train_images": len(dataset.train),
            "test_images": len(dataset.test),
            "classes": list(dataset.classes),
            "crc32": dataset.fingerprint(),
        },
        "model": {
            "name": args.model,
            "stem": args.stem,
            "parameters": sum(p.numel() for p in trainees[0].model.parameters()),
            "trained_parameters": sum(p.numel() for p in trainees[0].model.parameters() if p.requires_grad),
            "weights": weights,
        },
        "steps": len(trainees[0].losses),
        "seconds": seconds,
        "device": device_facts(args.device),
        "versions": versions(),
        "git": git_facts(),
        "fastconv_backends": _fastconv_backends(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        "notes": notes,
        "backends": {t.name: _backend_facts(t, batch, args, probe) for t in trainees},
    }
    if len(trainees) == 2:
        facts["comparison"] = _comparison(trainees, dataset, batch)
    return facts


def _backend_facts(trainee: Trainee, batch: int, args, probe) -> dict:
    from .data import enlarge, normalize

    images, labels = normalize(probe[0].to(args.device)), probe[1].to(args.device)
    fusion = trainee.fusion
    return {
        "ms_per_step": asdict(compare.Timing.of(trainee.blocks, batch)),
        "accuracy": trainee.accuracy,
        "final_loss": trainee.losses[-1],
        "setup_seconds": trainee.setup_seconds,
        "first_step_seconds": trainee.first_step_seconds,
        "peak_gpu_bytes": trainee.peak_bytes(),
        "saved_for_backward_bytes": trainee.saved_bytes(enlarge(images, args.image_size), labels),
        "optimizer": type(trainee.optimizer).__name__,
        "fused_groups": getattr(fusion, "fused", None),
        "fusion_report": None if fusion is None else str(fusion),
        "losses": trainee.losses,
    }


def _comparison(trainees: list[Trainee], dataset: Dataset, batch: int) -> dict:
    stock, fastconv = trainees
    result = compare.Comparison.of(stock.blocks, fastconv.blocks)
    times = [compare.Timing.of(trainee.blocks, batch) for trainee in trainees]
    return {
        **asdict(result),
        "winner": result.winner,
        "verdict": result.verdict(*times),
        "accuracy": compare.accuracy_words(stock.accuracy, fastconv.accuracy, len(dataset.test)),
        "loss": compare.loss_words(stock.losses, fastconv.losses),
    }


# ------------------------------------------------------------------------------------------------------- writing it


def write(directory: Path, facts: dict, trainees: list[Trainee], batch: int) -> list[Path]:
    """Writes the four files. Returns their paths."""
    title = f"{facts['model']['name']} on {TITLES[facts['dataset']['name']]}, batch {batch}"
    paths = [directory / name for name in ("report.md", "report.json", "loss.png", "throughput.png")]
    plots.loss_picture(paths[2], trainees, title)
    plots.throughput_picture(paths[3], trainees, batch, title)
    text = json.dumps(facts, indent=1, allow_nan=False)
    write_atomically(paths[1], lambda file: file.write(text.encode()))
    write_atomically(paths[0], lambda file: file.write(markdown(facts).encode()))
    return paths


def markdown(facts: dict) -> str:
    data, model, settings = facts["dataset"], facts["model"], facts["settings"]
    backends, comparison = facts["backends"], facts.get("comparison")
    who = " and ".join(backends)
    lines = [f"# {model['name']} on {TITLES[data['name']]}: {who}", ""]
    if comparison:
        lines += [f"**{comparison['verdict']}**", "", comparison["accuracy"], comparison["loss"], ""]
    else:
        name, only = next(iter(backends.items()))
        times = only["ms_per_step"]
        lines += [
            f"**{name} trains {times['images_per_second']:,.0f} images per second "
            f"({compare.ms(times['median'])} ms per step) "
            f"and then classifies {only['accuracy']:.2%} of the {data['test_images']:,} test images rightly.**",
            "",
        ]
    lines += [*_table(backends), ""]
    lines += ["![Training loss over the steps](loss.png)", "", "![Images per second](throughput.png)", ""]
    lines += ["## What was trained", "", *_what(facts), "", "## How it was measured", "", *_how(facts), ""]
    lines += ["## Where", "", *[f"- {key}: {value}" for key, value in _where(facts).items()], ""]
    for name, one in backends.items():
        if one["fusion_report"]:
            lines += [f"## What {name} did to the model", "", "```", one["fusion_report"], "```", ""]
    if facts["fastconv_backends"]:
        kernels = facts["fastconv_backends"].items()
        lines += ["fastconv's kernels on this machine:", ""]
        lines += [f"- {name}: {'' if one['available'] else 'not '}available: {one['reason']}" for name, one in kernels]
        lines += [""]
    if facts["notes"]:
        lines += ["## Notes", "", *[f"- {note}" for note in facts["notes"]], ""]
    lines += ["## Again", "", "```", facts["command"], "```", ""]
    lines += ["All settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()) + "."]
    lines += ["Every loss and number: report.json.", ""]
    return "\n".join(lines)


def _table(backends: dict) -> list[str]:
    rows = {
        "ms per step, median": lambda b: f"{b['ms_per_step']['median']:.2f}",
        "ms per step, p20 to p80": lambda b: f"{b['ms_per_step']['p20']:.2f} to {b['ms_per_step']['p80']:.2f}",
        "images per second": lambda b: f"{b['ms_per_step']['images_per_second']:,.0f}",
        "accuracy on the test images": lambda b: f"{b['accuracy']:.2%}",
        "loss of the last step": lambda b: f"{b['final_loss']:.4f}",
        "time to set up": lambda b: _seconds(b["setup_seconds"]),
        "first step (or block of steps)": lambda b: _seconds(b["first_step_seconds"]),
        "peak GPU memory": lambda b: _megabytes(b["peak_gpu_bytes"]),
        "kept for the backward pass": lambda b: _megabytes(b["saved_for_backward_bytes"]),
    }
    if all(one["peak_gpu_bytes"] is None for one in backends.values()):
        del rows["peak GPU memory"]
    lines = ["| | " + " | ".join(backends) + " |", "|---|" + "---:|" * len(backends)]
    return lines + [
        f"| {label} | " + " | ".join(show(b) for b in backends.values()) + " |" for label, show in rows.items()
    ]


def _what(facts: dict) -> list[str]:
    data, model, s = facts["dataset"], facts["model"], facts["settings"]
    recipe = f"Recipe `{facts['recipe']}`" if facts["recipe"] in RECIPES else "No recipe"
    optimizer = f"{s['optimizer']}, learning rate {s['lr']:g}"
    optimizer += f", momentum {s['momentum']:g}" if s["momentum"] is not None else ""
    optimizer += f", weight decay {s['weight_decay']:g}" if s["weight_decay"] else ""
    loss = s["loss"] + (f" with label smoothing {s['label_smoothing']:g}" if s["label_smoothing"] else "")
    extras = [f"the model's ReLUs replaced by {s['activation']}"] if s["activation"] else []
    extras += [f"dropout {s['dropout']:g} before the head"] if s["dropout"] is not None else []
    extras += ["backbone frozen"] if s["freeze_backbone"] else []
    extras += ["random crops (and flips, where a mirrored image keeps its class)"] if s["augment"] else []
    return [
        f"- Data: {TITLES[data['name']]}, {data['train_images']:,} training and {data['test_images']:,} test images of "
        f"32x32 pixels, 10 classes, {data['origin']}. Asked for: `--dataset {data['asked_for']}`.",
        f"- Model: torchvision's {model['name']} with a 10-class head, {model['stem']} stem, "
        f"{model['parameters'] / 1e6:.1f} million parameters ({model['trained_parameters'] / 1e6:.1f} trained), "
        f"images fed at {s['image_size']} pixels. Starting weights: {model['weights']}.",
        f"- {recipe}: batches of {s['batch_size']} on {s['processes']} process(es), {optimizer}, {loss}, "
        f"{s['precision']}, seed {s['seed']}; {facts['steps']:,} steps"
        + "".join(f"; {extra}" for extra in extras)
        + ".",
    ]


def _how(facts: dict) -> list[str]:
    cuda = facts["device"]["type"] == "cuda"
    unit = "block of up to 20 steps" if cuda else "step"
    lines = [
        "- Timed: the training step alone (forward, loss, backward, optimizer), batches made beforehand, "
        f"{unit} by {unit}, without the warm-up at the start of the run."
        + (" fastconv on one GPU makes its batches inside its CUDA graph: that is timed too." if cuda else ""),
        "- Stock is eager PyTorch at its best without a compiler: channels_last, the fused optimizer, cudnn.benchmark, "
        "autocast where the precision asks for it. fastconv trains in the same layout and precision, with the same "
        "optimizer.",
        "- Kept for the backward pass: bytes of every tensor that autograd saves in one forward pass, weights not "
        f"counted. The whole process peaked at {_megabytes(facts['peak_rss_bytes'])} of host memory, all backends "
        "together.",
    ]
    if cuda:
        lines.append(
            "- Peak GPU memory: what the backend holds between steps plus the most that one step adds to it (or what "
            "its captured graphs keep in reserve)."
        )
    spread = max(b["ms_per_step"]["p80"] / b["ms_per_step"]["p20"] for b in facts["backends"].values())
    if spread > BUSY_SPREAD:
        lines.append(
            f"- The times spread widely (p80 is {spread:.1f} times p20): other programs were running beside this one. "
            "Its milliseconds are no measure of the machine."
        )
    if "comparison" in facts:
        c = facts["comparison"]
        lines.append(
            f"- Compared: both start from the same weights and see the same batches; each {unit} of one is followed by "
            "the other's, and who goes first alternates. The ratio is the median of stock's time over fastconv's, pair "
            f"by pair: {c['ratio']:.3f}, p20 {c['p20']:.3f}, p80 {c['p80']:.3f}."
        )
        lines.append(
            "- The two losses start equal but for rounding and then part: training multiplies the last bits, in which "
            "any two kernels differ. The level of the curves and the accuracies are what should agree."
        )
    return lines


def _where(facts: dict) -> dict[str, str]:
    device, git = facts["device"], facts["git"]
    dirty = " with uncommitted changes" if git["dirty"] else ""
    return {
        "device": f"{device['name']} ({device['detail']})",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version),
        "commit": f"{git['commit']}{dirty}" if git["commit"] else "unknown (no git checkout)",
        "date": f"{facts['date']}, {facts['seconds']:.0f} s in all",
    }


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


# --------------------------------------------------------------------------------------------------- the surroundings


def _fastconv_backends() -> dict | None:
    """Which kernels fastconv could choose from here: name -> available, reason."""
    fastconv = sys.modules.get("fastconv")
    if fastconv is None:
        return None
    return {name: {"available": bool(one), "reason": one.reason} for name, one in fastconv.backends().items()}


def _arguments() -> list[str]:
    program = Path(sys.argv[0])
    return [f"bench/{program.name}" if program.parent.name == "bench" else program.name, *sys.argv[1:]]
