"""loss.png and throughput.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from .compare import quantile, timed  # noqa: E402
from .trainee import Trainee  # noqa: E402

COLORS = {"stock": "#d55e00", "fastconv": "#0072b2"}  # Okabe & Ito 2008: told apart by colour-blind readers too
STYLES = {"stock": "-", "fastconv": "--"}  # where the curves lie on each other, both still show
MOST_POINTS = 2000


def loss_picture(path: Path, trainees: list[Trainee], title: str) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for trainee in trainees:
        losses = trainee.losses
        window = max(1, len(losses) // 50)
        every = max(1, len(losses) // MOST_POINTS)
        steps = range(1, len(losses) + 1)
        if window > 1:
            axes.plot(steps[::every], losses[::every], color=COLORS[trainee.name], alpha=0.25, linewidth=0.8)
        smooth = _running_mean(losses, window)
        style = {"color": COLORS[trainee.name], "linestyle": STYLES[trainee.name], "linewidth": 2}
        marker = "o" if len(losses) == 1 else None
        axes.plot(steps[window - 1 :: every], smooth[::every], label=trainee.name, marker=marker, **style)
    mean = f", mean of {window} steps" if window > 1 else ""
    axes.set(xlabel="training step", ylabel=f"training loss{mean}", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def throughput_picture(path: Path, trainees: list[Trainee], batch: int, title: str) -> None:
    """Left: images per second over the run. Right: the median, with the middle 60% of the steps as a whisker."""
    figure, (over_time, medians) = plt.subplots(
        1, 2, figsize=(10, 4.5), layout="constrained", gridspec_kw={"width_ratios": [3, 1.3]}
    )
    for place, trainee in enumerate(trainees):
        color = COLORS[trainee.name]
        rates = [1000 * batch / block.ms_per_step for block in timed(trainee.blocks)]
        every = max(1, len(rates) // MOST_POINTS)
        steps = [block.first_step + block.steps for block in timed(trainee.blocks)]
        over_time.plot(steps[::every], rates[::every], ".-", color=color, linewidth=1, markersize=3, label=trainee.name)
        low, middle, high = (quantile(rates, share) for share in (0.2, 0.5, 0.8))
        medians.bar(place, middle, color=color, yerr=[[middle - low], [high - middle]], capsize=6, width=0.6)
        text = {"ha": "center", "va": "bottom", "color": "white", "fontweight": "bold"}
        medians.annotate(f"{middle:,.0f}", (place, 0), (0, 6), textcoords="offset points", **text)
    over_time.set(xlabel="training step", ylabel="images per second", title=title, ylim=(0, None))
    over_time.xaxis.get_major_locator().set_params(integer=True)
    over_time.grid(alpha=0.3)
    over_time.legend()
    medians.set_xticks(range(len(trainees)), [trainee.name for trainee in trainees])
    medians.set(title="median, p20 to p80", ylim=(0, None))
    _save(figure, path)


def _running_mean(values: list[float], window: int) -> list[float]:
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value
        if place >= window:
            total -= values[place - window]
        if place >= window - 1:
            means.append(total / window)
    return means


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
