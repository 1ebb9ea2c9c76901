"""Where a planned training step's time goes: microseconds of each operator call, the least of many runs.

    python bench/plan_times.py --model resnet50 --batch 4 --dtype fp32

The least of many runs is what a call costs undisturbed, with the caches as the rest of the step leaves them; the sum is
therefore a little below the step's own time. Guards: what looking for a valid plan costs at every step.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
import torchvision

import fastconv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--runs", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, num_classes=10).to(memory_format=torch.channels_last)
    model = fastconv.fuse(model, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    half = torch.bfloat16 if args.dtype == "bf16" else None
    step = fastconv.TrainStep(model, F.cross_entropy, optimizer, autocast_dtype=half)
    x, y = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))
    step(x, y)
    if step.plan_reason:
        raise SystemExit(f"no plan: {step.plan_reason}")
    plan = step._plans.find(x, y)
    begin = time.perf_counter()
    for _ in range(args.runs):
        plan.outdated()
    guards = (time.perf_counter() - begin) / args.runs * 1e6
    times = plan.program.times(args.runs)
    by_label: dict[str, list[float]] = defaultdict(list)
    by_operator: dict[str, list[float]] = defaultdict(list)
    for label, us in zip(plan.labels, times, strict=True):
        by_label[label].append(us)
        by_operator[label.split(" ")[0]].append(us)
    print(
        f"{len(times)} calls, {sum(times) / 1e3:.2f} ms; guards {guards:.0f} us; "
        f"arena {plan.arena_bytes / 2**20:.1f} MiB"
    )
    for title, table in (("operator", by_operator), ("call, with the sizes of its static tensors", by_label)):
        print(f"\n{title}")
        for label, each in sorted(table.items(), key=lambda item: -sum(item[1]))[:20]:
            print(f"{sum(each) / 1e3:8.2f} ms {len(each):4d} x {sum(each) / len(each):7.0f} us  {label}")


if __name__ == "__main__":
    main()
