"""Batch norm (+ residual) + activation in training: forward, and forward with backward, on ResNet50's maps.

Peers: eager PyTorch in both layouts. Bytes of the forward: input twice (statistics, then normalisation), residual,
output; of the backward: two passes over the output gradient and what the forward kept, one write of each gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import DTYPES, Bench, Case, arguments

import fastconv.functional as FF

MAPS = ((64, 16), (64, 8), (256, 8), (128, 4), (512, 4), (256, 2), (1024, 2), (512, 1), (2048, 1))  # channels, width


def calls(n: int, c: int, h: int, dtype: torch.dtype, device: torch.device, residual: bool, backward: bool) -> dict:
    x, r, g = (torch.randn(n, c, h, h, device=device).to(dtype) for _ in range(3))
    weight, bias = torch.rand(c, device=device) + 0.5, torch.randn(c, device=device)
    mean, var = torch.zeros(c, device=device), torch.ones(c, device=device)

    def stock(x, weight, bias, r=None):
        y = F.batch_norm(x, mean, var, weight, bias, True)
        return F.relu(y if r is None else y + r)

    def ours(x, weight, bias, r=None):
        return FF.batch_norm_act(x, mean, var, weight, bias, True, activation="relu", residual=r)

    def call(function, form):
        leaves = [t.contiguous(memory_format=form) for t in ((x, r) if residual else (x,))]
        leaves = [leaves[0], weight, bias, *leaves[1:]]
        grad = g.contiguous(memory_format=form)
        if not backward:

            def forward():
                with torch.no_grad():
                    return function(*leaves)

            return forward
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    last, first = torch.channels_last, torch.contiguous_format
    return {"eager nchw": call(stock, first), "eager nhwc": call(stock, last), "fastconv": call(ours, last)}


def main() -> None:
    args = arguments(__doc__.split("\n")[0], batch={"type": int, "nargs": "*"})
    bench = Bench("batch_norm", args.out, args.device, args.seconds)
    batches = args.batch or ([64] if args.device.type == "cpu" else [4, 128, 512])
    for n in batches:
        for c, h in MAPS[: 2 if args.quick else None]:
            for dtype in args.dtype:
                for residual in (False, True):
                    for backward in (False, True):
                        _measure(bench, n, c, h, dtype, residual, backward)


def _measure(bench: Bench, n: int, c: int, h: int, dtype: str, residual: bool, backward: bool) -> None:
    elements, device = n * c * h * h, bench.device
    op = "batch_norm" + ("_add" if residual else "") + "_relu" + (" fwd+bwd" if backward else "")
    # Backward: dy and x twice, the output (its sign) once, dx written; with a residual its gradient written too.
    moved = 3 + residual + (6 + residual if backward else 0)
    torch.manual_seed(c + h)
    case = Case(
        op, f"{n}x{h}x{h}x{c}", dtype, 0.0, moved * elements * DTYPES[dtype].itemsize,
        calls(n, c, h, DTYPES[dtype], device, residual, False),
    )  # fmt: skip
    torch.manual_seed(c + h)
    x, r, _ = (torch.randn(n, c, h, h, device=device).to(DTYPES[dtype]).double() for _ in range(3))
    weight, bias = (torch.rand(c, device=device) + 0.5).double(), torch.randn(c, device=device).double()
    case.check(F.relu(F.batch_norm(x, None, None, weight, bias, True) + (r if residual else 0)))
    if backward:
        case.competitors = calls(n, c, h, DTYPES[dtype], device, residual, True)
    bench.run(case)


if __name__ == "__main__":
    main()
