"""One training step of ResNet50 at 32 px (or another torchvision classifier): forward, loss, backward, SGD.

Peers: eager PyTorch in both layouts with its fused optimizer, under autocast for bf16; with --compile also
torch.compile in the modes named (compile times are printed apart), on a GPU eager PyTorch in a CUDA graph. Ours:
fuse(model) with ordinary autograd and the same optimizer, and fastconv.TrainStep around it. Every competitor starts
from the same weights, and their first losses are compared before anything is timed. On a CPU each takes its turn with
one step untimed and two timed: in training a network finds its own weights in the caches, not another's.

FLOPs: three passes over the convolutions, taps over padding not counted. Least bytes: every convolution's output
written and read forward, read again and its gradient written and read backward; weights and momentum read and written.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from harness import COMPILE, DTYPES, Bench, Case, arguments, compiled_name, modes, of_models
from shapes import network_work

import fastconv

LR = 1e-4  # small: hundreds of steps on one batch must not run away


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=True)


def stepper(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype, run=None) -> Callable:
    optimizer, call = optimizer_of(model), model if run is None else run
    half = None if dtype is torch.float32 else dtype

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, half, enabled=half is not None):
            loss = F.cross_entropy(call(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def competitors(
    name: str, batch: int, size: int, dtype: torch.dtype, device: torch.device, compiled: list[str]
) -> dict:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the first losses are compared
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    half = None if dtype is torch.float32 else dtype

    def own(nhwc: bool = True) -> torch.nn.Module:
        twin = copy.deepcopy(model)
        return twin.to(memory_format=torch.channels_last) if nhwc else twin

    found = {"eager nchw": stepper(own(False), x, y, dtype), "eager nhwc": stepper(own(), last, y, dtype)}
    if device.type == "cuda":
        stock = own()
        graphed = fastconv.TrainStep(stock, F.cross_entropy, optimizer_of(stock), autocast_dtype=half)
        found["eager nhwc, graph"] = lambda: graphed(last, y)
    for mode in compiled:
        stock = own()
        found[compiled_name(mode, "nhwc")] = stepper(stock, last, y, dtype, torch.compile(stock, mode=mode))
    found["fastconv fuse"] = stepper(fastconv.fuse(own(), inplace=True), last, y, dtype)
    # On a GPU the eager path's operators in a CUDA graph, each on its fastest measured backend, and the plan.
    gpu = {"fastconv TrainStep": False, "fastconv TrainStep, plan": True}
    for name, plan in ({"fastconv TrainStep": True} if device.type == "cpu" else gpu).items():
        ours = fastconv.fuse(own(), inplace=True)
        step = fastconv.TrainStep(ours, F.cross_entropy, optimizer_of(ours), autocast_dtype=half, plan=plan)
        found[name] = functools.partial(step, last, y)
    return found


def check_losses(found: dict[str, Callable], dtype: torch.dtype) -> None:
    """The first loss of each, against the first competitor's. A whole net at its start multiplies rounding."""
    losses = {}
    for name, step in found.items():
        begin = time.perf_counter()
        losses[name] = float(step())
        if name.startswith("torch.compile"):
            print(f"{name}: {time.perf_counter() - begin:.1f} s for the first step", flush=True)
    first = next(iter(losses.values()))
    limit = 1e-3 if dtype is torch.float32 else 0.3
    for name, loss in losses.items():
        if not abs(loss - first) <= limit * abs(first):
            raise AssertionError(f"first loss of {name} is {loss}, of {next(iter(losses))} {first}")


def main() -> None:
    args = arguments(
        __doc__.split("\n")[0],
        model={"nargs": "*", "default": ["resnet50"]},
        batch={"type": int, "nargs": "*"},
        size={"type": int, "default": 32},
        compile=COMPILE,
    )
    bench = Bench(
        of_models("train_step", args.model, args.size), args.out, args.device,
        max(args.seconds, 12.0) if not args.quick else 1.0, turn=2,
    )  # fmt: skip
    batches = args.batch or ([4] if args.quick else [4, 64] if args.device.type == "cpu" else [4, 128, 512, 1024])
    for model, dtype, batch in itertools.product(args.model, [d for d in args.dtype if d != "fp16"], batches):
        parameters = sum(p.numel() for p in torchvision.models.get_model(model, num_classes=10).parameters())
        flops, outputs = network_work(model, batch, args.size)
        found = competitors(model, batch, args.size, DTYPES[dtype], args.device, modes(args.compile))
        check_losses(found, DTYPES[dtype])
        moved = 5 * outputs * DTYPES[dtype].itemsize + 16 * parameters
        bench.run(Case(model, f"{batch}x{args.size}px", dtype, 3 * flops, moved, found))


if __name__ == "__main__":
    main()
