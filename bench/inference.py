"""One inference of ResNet50 at 32 px (or another torchvision classifier).

Peers: eager PyTorch in both layouts (converted to bf16 for bf16), torch.jit's frozen graph, and with --compile
torch.compile with freezing (its compile time is printed apart). Ours: fuse(model) in evaluation mode, and
fastconv.optimize_for_inference. Outputs are compared before anything is timed. On a CPU each takes its
turn with one call untimed and four timed: in service a network finds its own weights in the caches, not another's.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable

import torch
import torchvision
from harness import COMPILE, DTYPES, Bench, Case, add_if_it_runs, arguments, compiled_name, modes, of_models
from shapes import network_work

import fastconv


def without_gradients(model: Callable, x: torch.Tensor) -> Callable:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def trained_enough(name: str, size: int) -> torch.nn.Module:
    """Random weights, and running statistics that fit them: without these the activations of a deep net explode."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, size, size))
    return model.eval()


def competitors(
    model: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype, compiled: list[str]
) -> dict[str, Callable]:
    x = x.to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)

    def own(nhwc: bool = True) -> torch.nn.Module:
        twin = copy.deepcopy(model).to(dtype)
        return twin.to(memory_format=torch.channels_last) if nhwc else twin

    found = {"eager nchw": without_gradients(own(False), x), "eager nhwc": without_gradients(own(), last)}

    def frozen() -> Callable:
        with torch.no_grad():
            return without_gradients(torch.jit.freeze(torch.jit.trace(own(), last)), last)

    add_if_it_runs(found, "jit frozen nhwc", frozen, f"batch {x.size(0)} {dtype}")
    for mode in compiled:
        from torch._inductor import config

        config.freezing = True
        run, begin = without_gradients(torch.compile(own(), mode=mode), last), time.perf_counter()
        run()
        name = compiled_name(mode, "frozen")
        print(f"{name}: {time.perf_counter() - begin:.1f} s for the first call", flush=True)
        found[name] = run
    found["fastconv fuse"] = without_gradients(fastconv.fuse(own(), inplace=True), last)
    if dtype is not torch.float16:
        # From the fp32 model, as a user has it: batch norm is folded before anything is rounded.
        cpu = x.device.type == "cpu"
        found["fastconv optimized"] = without_gradients(
            fastconv.optimize_for_inference(model, last, dtype=dtype, plan=True if cpu else "auto"), last
        )
        if not cpu:  # the cuda kernels in a CUDA graph, whatever was measured
            found["fastconv optimized, plan"] = without_gradients(
                fastconv.optimize_for_inference(model, last, dtype=dtype, plan=True), last
            )
    return found


def main() -> None:
    args = arguments(
        __doc__.split("\n")[0],
        model={"nargs": "*", "default": ["resnet50"]},
        batch={"type": int, "nargs": "*"},
        size={"type": int, "default": 32},
        compile=COMPILE,
    )
    bench = Bench(
        of_models("inference", args.model, args.size), args.out, args.device,
        max(args.seconds, 8.0) if not args.quick else 1.0, turn=4,
    )  # fmt: skip
    batches = args.batch or ([1] if args.quick else [1, 64] if args.device.type == "cpu" else [1, 64, 512])
    for name in args.model:
        model = trained_enough(name, args.size).to(args.device)
        parameters = sum(p.numel() for p in model.parameters())
        for dtype, batch in itertools.product([d for d in args.dtype if d != "fp16"], batches):
            flops, outputs = network_work(name, batch, args.size)
            x = torch.randn(batch, 3, args.size, args.size, device=args.device)
            found = competitors(model, x, DTYPES[dtype], modes(args.compile))
            moved = (2 * outputs + parameters) * DTYPES[dtype].itemsize
            case = Case(name, f"{batch}x{args.size}px", dtype, flops, moved, found)
            with torch.inference_mode():
                oracle = copy.deepcopy(model).double()(x.double())
            case.check(oracle, limit=2e-3 if dtype == "fp32" else 0.25)  # bf16: fifty layers' rounding
            bench.run(case)


if __name__ == "__main__":
    main()
