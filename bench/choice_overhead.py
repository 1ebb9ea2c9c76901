"""What the choice of a backend costs per call, once it is cached: least time of many repeats, in nanoseconds.

python bench/choice_overhead.py
"""

from __future__ import annotations

import timeit

import torch

import fastconv
import fastconv.functional as FF
from fastconv.ops import choice


def nanoseconds(call, number: int = 20_000, repeats: int = 15) -> float:
    return min(timeit.repeat(call, number=number, repeat=repeats)) / number * 1e9


def main() -> None:
    x = torch.randn(8, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    w, b, v = torch.randn(64, 64, 3, 3), torch.randn(64), torch.ones(64)
    logits, target = torch.randn(8, 10), torch.arange(8)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    norm = (True, 0.1, 1e-5, "relu")
    calls = {
        "conv2d_bias_act": ((x, w, b, x), (*geometry, "relu"), FF._conv2d_bias_act),
        "conv2d_bn_act": ((x, w, None, x, v, v, v, v, torch.tensor(0)), (*geometry, *norm), FF._conv2d_bn_act),
        "batch_norm_act": ((x, x, v, v, v, v, torch.tensor(0)), norm, FF._batch_norm_act),
        "cross_entropy": ((logits, target, None), ("mean", -100, 0.0), None),
    }
    print("| operator | tensors | choice, ns per call | of it the signature |\n|---|---:|---:|---:|")
    for op, (tensors, settings, run) in calls.items():

        def look_up(op=op, tensors=tensors, settings=settings, run=run):
            return choice.select(op, tensors, settings, "", run)

        look_up()
        signature = nanoseconds(lambda tensors=tensors: choice._signature(tensors))
        present = sum(t is not None for t in tensors)
        print(f"| {op} | {present} | {nanoseconds(look_up):.0f} | {signature:.0f} |")
    small = torch.randn(1, 4, 4, 4)
    whole = nanoseconds(lambda: FF.avg_pool2d(small, 2))
    print(f"\nA whole call for comparison, FF.avg_pool2d on 64 elements: {whole:.0f} ns")
    print(f"fastconv {fastconv.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
