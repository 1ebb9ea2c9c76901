"""Kernel launches of one training step of ResNet50 at 32 px, bf16: what a CUDA graph of it would hold.

    python tests/simt/launches.py        writes launches.md

The step runs on the CPU: fastconv's launches are counted by the emulator, with an H100's 132 multiprocessors (which
decide where sums are split), PyTorch's own operators as one launch each, but for those that only make views or
allocate (what fastconv's host code calls inside an operator is not seen), and for the optimizer: torch's fused SGD
takes at most 48 tensors of three lists a launch on a GPU (MultiTensorApply.cuh). Aside: on the second stream.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
import fastconv.nn as fnn
from fastconv._kernels import readable

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import simt_backend  # noqa: E402
import simt_host  # noqa: E402
import simt_lib  # noqa: E402

NO_KERNEL = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "permute",
    "reshape", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view", "contiguous", "is_same_size",
}  # fmt: skip
FUSED_SGD_TENSORS = 48


class Calls(TorchDispatchMode):
    """PyTorch's operators that start a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")
        if name[0] == "aten" and name[1] not in NO_KERNEL:
            self.seen[name[1]] += -(-len(args[0]) // FUSED_SGD_TENSORS) if name[1] == "_fused_sgd_" else 1
        return func(*args, **(kwargs or {}))


def launches() -> Counter[str]:
    """fastconv's launches since the last call, by kernel."""
    found: Counter[str] = Counter()
    for family in simt_host.FAMILIES:
        symbols = simt_lib.library(family).launches()
        for symbol, name in zip(symbols, readable(list(symbols)), strict=True):
            found[name.split("<")[0]] += symbols[symbol]
    return found


def step_of(kind: str, batch: int) -> tuple[Counter[str], int]:
    """The launches of a step, and how many of its calls run aside."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10).to(memory_format=torch.channels_last)
    model = fastconv.fuse(model, inplace=True)
    sgd = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
    plan = kind == "plan"
    step = fastconv.TrainStep(model, fnn.CrossEntropyLoss(), sgd, autocast_dtype=torch.bfloat16, plan=plan)
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,))
    step(x, y)  # state, copies, plan
    launches()
    with Calls() as calls:
        step(x, y)
    found = launches()
    torch_calls, aside = calls.seen, 0
    if plan:  # its calls go past the dispatch modes
        (held,) = step._plans.cache.values()
        aside = len(held.joins)
        names = [label.split()[0].split(".")[0] for label in held.labels]
        torch_calls = Counter(n.split("::")[1] for n in names if n.startswith("aten::"))
        torch_calls = Counter({n: c for n, c in torch_calls.items() if n not in NO_KERNEL})
    return found + Counter({f"aten::{name}": count for name, count in torch_calls.items()}), aside


def main() -> None:
    os.environ["FASTCONV_SIMT_MULTIPROCESSORS"] = "132"
    simt_backend._MOST_MULTIPLY_ADDS = simt_backend._MOST_ELEMENTS = 1 << 62
    missing = simt_backend.add()
    if missing:
        sys.exit(missing)
    lines = ["# Kernel launches of a training step", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += ["| | batch | launches | calls aside | by kind |", "| --- | --- | --- | --- | --- |"]
    with fastconv.use_backend("simt"):
        for kind, batch in (("fuse(model), autograd and torch's fused SGD", 4), ("plan", 4), ("plan", 32)):
            found, aside = step_of(kind, batch)
            parts = ", ".join(f"{name} {count}" for name, count in found.most_common())
            lines.append(f"| {kind} | {batch} | {sum(found.values())} | {aside} | {parts} |")
            print(lines[-1], flush=True)
    (Path(__file__).parent / "launches.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
