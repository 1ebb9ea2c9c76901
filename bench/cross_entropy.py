"""Cross-entropy with class indices, forward and forward with backward, from 10 to 131,072 classes.

Peers: eager PyTorch, and on a GPU Liger-Kernel's and flash-attn's where they are installed. Bytes: the logits once
forward; logits read and gradient written backward.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from harness import DTYPES, Bench, Case, arguments

import fastconv.functional as FF

CLASSES = (10, 100, 1000, 32768, 131072)
ELEMENTS = {"cpu": 2**22, "cuda": 2**28}  # rows x classes, about; at most 4096 rows for small class counts on a CPU


def liger(logits, target):
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def flash_attn(logits, target):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(logits, target)[0].mean()


def peers(device: torch.device) -> dict:
    found = {"eager": F.cross_entropy, "fastconv": FF.cross_entropy}
    if device.type == "cuda":
        installed = {"liger_kernel": liger, "flash_attn": flash_attn}
        found |= {name: run for name, run in installed.items() if importlib.util.find_spec(name)}
    return found


def main() -> None:
    args = arguments(__doc__.split("\n")[0])
    bench = Bench("cross_entropy", args.out, args.device, args.seconds)
    for classes in CLASSES[: 2 if args.quick else None]:
        for dtype in args.dtype:
            for backward in (False, True):
                _measure(bench, classes, dtype, backward)


def _measure(bench: Bench, classes: int, dtype: str, backward: bool) -> None:
    device = bench.device
    most = 4096 if device.type == "cpu" else 2**18
    rows = max(1, min(most, ELEMENTS[device.type] // classes))
    logits = 3 * torch.randn(rows, classes, device=device)
    logits = logits.to(DTYPES[dtype])
    target = torch.randint(classes, (rows,), device=device)

    def call(function, backward):
        if not backward:

            def forward():
                with torch.no_grad():
                    return function(logits, target)

            return forward
        # A copy for each: Liger's writes its gradient over the logits.
        leaf = logits.clone().requires_grad_()
        return lambda: torch.autograd.grad(function(leaf, target), leaf)

    moved = rows * classes * DTYPES[dtype].itemsize * (3 if backward else 1)
    name = "cross_entropy" + (" fwd+bwd" if backward else "")
    forward = {n: call(f, False) for n, f in peers(device).items() if n not in ("liger_kernel",)}
    case = Case(name, f"{rows}x{classes}", dtype, 0.0, moved, forward)
    case.check(F.cross_entropy(logits.double(), target))
    if backward:
        case.competitors = {n: call(f, True) for n, f in peers(device).items()}
    bench.run(case)


if __name__ == "__main__":
    main()
