"""Max, average and global average pooling, forward and forward with backward, on ResNet50's and VGG16's maps.

Peers: eager PyTorch in both layouts. Bytes of the forward: input and output (and one byte per output for the
maximum's place where a backward follows); of the backward: the output's gradient, the places, the input's gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import DTYPES, Bench, Case, arguments

import fastconv.functional as FF

# op, arguments, channels, width: the stem's pool at 32 and 224 px, VGG16's pools at 32 px, the global average
MAPS = (
    ("max_pool2d", (3, 2, 1), 64, 16),
    ("max_pool2d", (3, 2, 1), 64, 112),
    ("max_pool2d", (2, 2), 64, 32),
    ("max_pool2d", (2, 2), 256, 8),
    ("avg_pool2d", (2, 2), 256, 16),
    ("adaptive_avg_pool2d", (1,), 2048, 7),
)


def main() -> None:
    args = arguments(__doc__.split("\n")[0], batch={"type": int})
    bench = Bench("pooling", args.out, args.device, args.seconds)
    n = args.batch or (16 if args.device.type == "cpu" else 256)
    for op, settings, c, h in MAPS[: 2 if args.quick else None]:
        for dtype in args.dtype:
            for backward in (False, True):
                _measure(bench, op, settings, (n, c, h, h), dtype, backward)


def _measure(bench: Bench, op: str, settings: tuple, shape: tuple, dtype: str, backward: bool) -> None:
    n, c, h, _ = shape
    x = torch.randn(shape, device=bench.device).to(DTYPES[dtype])
    expected = getattr(F, op)(x.double(), *settings)
    g = torch.randn(expected.shape, device=bench.device).to(DTYPES[dtype])

    def call(function, form, backward):
        leaf, grad = x.contiguous(memory_format=form), g.contiguous(memory_format=form)
        if not backward:

            def forward():
                with torch.no_grad():
                    return function(leaf, *settings)

            return forward
        leaf = leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        return lambda: torch.autograd.grad(function(leaf, *settings), leaf, grad)

    def calls(backward):
        stock, last = getattr(F, op), torch.channels_last
        return {
            "eager nchw": call(stock, torch.contiguous_format, backward),
            "eager nhwc": call(stock, last, backward),
            "fastconv": call(getattr(FF, op), last, backward),
        }

    size, places = DTYPES[dtype].itemsize, g.numel() if op == "max_pool2d" else 0
    moved = (x.numel() + g.numel()) * size
    moved = 2 * (moved + places) if backward else moved
    name = op + (" fwd+bwd" if backward else "")
    case = Case(name, f"{n}x{h}x{h}x{c} {'/'.join(map(str, settings))}", dtype, 0.0, moved, calls(False))
    case.check(expected)
    if backward:
        case.competitors = calls(True)
    bench.run(case)


if __name__ == "__main__":
    main()
