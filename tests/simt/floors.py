"""What each kernel must do in one ResNet50 training step on 32 x 32 images, and the least time an H100 needs.

    python tests/simt/floors.py        writes floors.md

bf16 activations and weights, fp32 accumulation. Bytes count every tensor once per pass that has to read or write it;
FLOPs count live filter taps only (taps that see padding at every position of a map are skipped by the kernels). Rates:
3.0 TB/s, 600 TFLOP/s for bf16 mma.sync (a dense GEMM's practical share of 989), 2.5 us per kernel inside a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BYTES_PER_SECOND, FLOPS_PER_SECOND, LAUNCH_SECONDS = 3.0e12, 600e12, 2.5e-6


@dataclass
class Conv:
    c: int
    k: int
    r: int
    stride: int
    h: int  # input map, square
    residual: bool = False  # the batch-norm after it adds a residual

    @property
    def p(self) -> int:
        return (self.h + 2 * (self.r // 2) - self.r) // self.stride + 1

    def live(self) -> int:
        """(position, tap) pairs that see data."""
        line = sum(0 <= p * self.stride - self.r // 2 + r < self.h for p in range(self.p) for r in range(self.r))
        return line * line


def resnet50(size: int = 32) -> tuple[list[Conv], int, int]:
    """Its convolutions in order, and the maps before and after the max-pool."""
    convs = [Conv(3, 64, 7, 2, size)]
    before = convs[0].p
    h, c = (before - 1) // 2 + 1, 64
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for i in range(blocks):
            s = stride if i == 0 else 1
            convs += [Conv(c, width, 1, 1, h), Conv(width, width, 3, s, h)]
            out = convs[-1].p
            convs.append(Conv(width, 4 * width, 1, 1, out, residual=True))
            if i == 0:
                convs.append(Conv(c, 4 * width, 1, s, h))
            h, c = out, 4 * width
    return convs, before, h


def rows(n: int) -> list[tuple[str, int, float, float]]:
    """(kernel, launches, FLOPs, bytes) of one step at batch n."""
    convs, before, last = resnet50()
    x = [n * v.h * v.h * v.c for v in convs]
    y = [n * v.p * v.p * v.k for v in convs]
    w = [v.k * v.c * v.r * v.r for v in convs]
    flops = sum(2.0 * n * v.live() * v.c * v.k for v in convs)
    stem = 2.0 * n * convs[0].live() * 3 * 64
    res = sum(a for a, v in zip(y, convs, strict=True) if v.residual)
    pool = n * before * before * 64
    count = len(convs)
    small = sum(n * v.p * v.p <= 256 for v in convs)  # kBatchNormSmallRows: one launch does all
    return [
        ("conv fprop (+ statistics)", count, flops, 2.0 * (sum(x) + sum(w) + sum(y))),
        ("conv dgrad", count - 1, flops - stem, 2.0 * (sum(x[1:]) + sum(w[1:]) + sum(y[1:]))),
        ("conv wgrad", count, flops, 2.0 * (sum(x) + sum(w) + sum(y))),
        ("batch-norm merge + apply", 2 * count - small, 8.0 * sum(y), 2.0 * (2 * sum(y) + res)),
        ("batch-norm backward", 3 * count - 2 * small, 20.0 * sum(y), 2.0 * (3 * sum(y) + 3 * sum(y) + res)),
        ("max-pool, average pool", 4, 10.0 * pool, 2.0 * 2.75 * pool + 4.0 * n * last * last * 2048),
        ("cross-entropy (10 classes)", 3, 100.0 * n, 4.0 * n * 10),
    ]


def main() -> None:
    out = [
        "# Floors of one ResNet50 training step, 32 x 32 images, bf16, H100",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
    ]
    for n in (4, 512):
        out += [
            f"## Batch {n}",
            "",
            "| kernel | launches | GFLOP | MB | FLOP time us | byte time us | launch time us | bound by |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        total = [0.0, 0.0, 0.0, 0.0]
        for name, launches, flops, size in rows(n):
            times = {
                "FLOPs": flops / FLOPS_PER_SECOND,
                "bytes": size / BYTES_PER_SECOND,
                "launches": launches * LAUNCH_SECONDS,
            }
            if "conv" not in name:
                times["FLOPs"] = flops / 30e12  # fp32 lanes, not tensor cores
            bound = max(times, key=times.__getitem__)
            out.append(
                f"| {name} | {launches} | {flops / 1e9:.3g} | {size / 1e6:.3g} | "
                + " | ".join(f"{t * 1e6:.3g}" for t in times.values())
                + f" | {bound} |"
            )
            total = [total[0] + launches, total[1] + flops, total[2] + size, total[3] + max(times.values())]
        out += [
            f"| all | {total[0]:.0f} | {total[1] / 1e9:.3g} | {total[2] / 1e6:.3g} | | | {total[3] * 1e6:.3g} | |",
            "",
        ]
    out += [
        "At batch 4 every kernel is bound by its launch: one-launch batch-norm (rows <= 256) and few kernels matter.",
        "At batch 512 the convolutions and batch-norms are bound by activation bytes: what pays is fusing passes",
        "over the maps (statistics in the epilogue, apply in the next prologue), not more FLOPs.",
    ]
    (Path(__file__).resolve().parent / "floors.md").write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
