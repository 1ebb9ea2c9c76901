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
    norm = (v, v, v, v)
    count = torch.tensor(0)
    calls = {
        "conv2d_bias_act": (
            lambda: FF.conv2d_bias_act(x, w, b, padding=1, residual=x),
            (x, w, b, x), (1, 1, 1, 1, "relu"),
        ),
        "conv2d_bn_act": (
            lambda: FF.conv2d_bn_act(
                x, w, None, *norm, padding=1, training=True, residual=x, num_batches_tracked=count
            ),
            (x, w, None, x, *norm, count), (1, 1, 1, 1, True, 0.1, 1e-5, "relu"),
        ),
        "batch_norm_act": (
            lambda: FF.batch_norm_act(x, *norm, training=True, residual=x, num_batches_tracked=count),
            (x, x, *norm, count), (True, 0.1, 1e-5, "relu"),
        ),
        "cross_entropy": (lambda: FF.cross_entropy(logits, target), (logits, target, None), ("mean", -100, 0.0)),
    }  # fmt: skip
    print("| operator | tensors | checks and choice, ns per call | of it the signature |\n|---|---:|---:|---:|")
    for op, (call, tensors, arguments) in calls.items():
        call()

        def look_up(op=op, tensors=tensors, arguments=arguments):
            return choice.recall(op, tensors, arguments)

        assert look_up().settings is not None, f"{op} is not remembered"
        signature = nanoseconds(lambda op=op, t=tensors, a=arguments: choice._signature(op, t, a))
        present = sum(t is not None for t in tensors)
        print(f"| {op} | {present} | {nanoseconds(look_up):.0f} | {signature:.0f} |")
    small = torch.randn(1, 4, 4, 4)
    whole = nanoseconds(lambda: FF.avg_pool2d(small, 2))
    print(f"\nA whole call for comparison, FF.avg_pool2d on 64 elements: {whole:.0f} ns")
    print(f"fastconv {fastconv.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
