"""Which backend is faster, by how much, and whether the difference is more than noise: numbers and words."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from .trainee import Block

LEAST_PAIRS = 6  # below, even six wins out of six would leave more than 3% to chance: 2 * 0.5**6
LEAST_DIFFERENCE = 0.02  # a smaller one is of no use to anybody, however certain


def quantile(values: list[float], share: float) -> float:
    """Linear interpolation between the order statistics, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def timed(blocks: list[Block]) -> list[Block]:
    """The blocks after the warm-up; all of them where the run was too short to have any."""
    return [block for block in blocks if block.warm] or blocks


@dataclass(frozen=True)
class Timing:
    """Milliseconds per step over the timed blocks."""

    median: float
    p20: float
    p80: float
    steps: int
    images_per_second: float  # at the median

    @staticmethod
    def of(blocks: list[Block], batch: int) -> Timing:
        values = [block.ms_per_step for block in timed(blocks)]
        median = statistics.median(values)
        steps = sum(block.steps for block in timed(blocks))
        return Timing(median, quantile(values, 0.2), quantile(values, 0.8), steps, 1000 * batch / median)


@dataclass(frozen=True)
class Comparison:
    """Stock's time over fastconv's, pair by pair: each pair is the same batches, one backend right after the other."""

    ratio: float  # median; above 1 fastconv is faster
    p20: float
    p80: float
    low: float  # 95% confidence interval of the median
    high: float
    pairs: int

    @staticmethod
    def of(stock: list[Block], fastconv: list[Block]) -> Comparison:
        pairs = zip(timed(stock), timed(fastconv), strict=True)
        ratios = [s.ms_per_step / f.ms_per_step for s, f in pairs]
        low, high = median_interval(ratios)
        return Comparison(
            statistics.median(ratios), quantile(ratios, 0.2), quantile(ratios, 0.8), low, high, len(ratios)
        )

    @property
    def certain(self) -> bool:
        return self.pairs >= LEAST_PAIRS and not self.low <= 1 <= self.high and abs(self.ratio - 1) >= LEAST_DIFFERENCE

    @property
    def winner(self) -> str | None:
        """stock, fastconv, or None when the difference is within the noise."""
        if not self.certain:
            return None
        return "fastconv" if self.ratio > 1 else "stock"

    def verdict(self, stock: Timing, fastconv: Timing) -> str:
        interval = f"95% interval {self.low:.2f} to {self.high:.2f}, from {self.pairs} pairs of steps"
        times = f"a step takes {ms(fastconv.median)} ms with fastconv and {ms(stock.median)} ms with stock PyTorch"
        if self.winner == "fastconv":
            return f"fastconv is faster: {self.ratio:.2f} times the speed of stock PyTorch ({interval}); {times}."
        if self.winner == "stock":
            return (
                f"Stock PyTorch is faster: {1 / self.ratio:.2f} times the speed of fastconv "
                f"(ratio {self.ratio:.2f}, {interval}); {times}."
            )
        if self.pairs < LEAST_PAIRS:
            return f"Too few steps were timed ({self.pairs}) to say which is faster; {times}."
        return f"Neither is faster: the difference is within the noise (ratio {self.ratio:.2f}, {interval}); {times}."


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95% confidence interval of the median that assumes no distribution: two order statistics (the sign test's)."""
    ordered = sorted(values)
    count = len(ordered)
    rank, below = 0, 0.5**count  # below: the chance that at most `rank` of `count` fair coins fall heads
    while rank + 1 < count // 2:
        below_next = below + math.comb(count, rank + 1) / 2**count
        if below_next > 0.025:
            break
        rank, below = rank + 1, below_next
    return ordered[rank], ordered[count - 1 - rank]


def accuracy_words(stock: float, fastconv: float, images: int) -> str:
    """Are two accuracies on the same test images the same? The spread is that of two independent draws of images."""
    mean = (stock + fastconv) / 2
    spread = 2 * math.sqrt(max(2 * mean * (1 - mean) / images, 1e-12))
    both = f"stock {stock:.2%}, fastconv {fastconv:.2%}"
    if abs(stock - fastconv) <= spread:
        return f"Both classify equally well, within the noise of {images:,} test images (±{spread:.2%}): {both}."
    better = "stock" if stock > fastconv else "fastconv"
    noise = f"the noise of {images:,} test images (±{spread:.2%})"
    return f"The accuracies differ by more than {noise}, {better} is better: {both}."


def end_loss(losses: list[float]) -> float:
    """Where training ended: the mean loss of the last tenth of the steps."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def loss_words(stock: list[float], fastconv: list[float]) -> str:
    first = max(abs(a - b) for a, b in zip(stock[:10], fastconv[:10], strict=True))
    count = max(1, len(stock) // 10)
    shown = "step" if len(stock) == 1 else f"{min(10, len(stock))} steps"
    return (
        f"Over the first {shown} the two losses differ by at most {first:.2g}; "
        f"over the last {count} they average {end_loss(stock):.4f} (stock) and {end_loss(fastconv):.4f} (fastconv)."
    )
