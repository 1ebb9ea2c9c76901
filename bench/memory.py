"""What a training step keeps between forward and backward, and what it takes at its peak: stock, fused, deferred.

Saved bytes are counted on any device: every storage that autograd holds after the forward pass, once, weights not
counted. Peak bytes are CUDA's allocator's, on a GPU only.
"""

from __future__ import annotations

import machine
import torch
import torch.nn.functional as F
import torchvision
from harness import DTYPES, arguments, save_rows

import fastconv


def saved_bytes(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes that one forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
        loss = F.cross_entropy(model(x), y)
    del loss  # until here it held every saved tensor, so that no address was counted for two of them
    return sum(kept.values())


def peak_bytes(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> int | None:
    if x.device.type != "cuda":
        return None
    for _ in range(2):  # the first allocates gradients
        torch.cuda.reset_peak_memory_stats()
        model.zero_grad(set_to_none=False)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    args = arguments(
        __doc__.split("\n")[0],
        model={"nargs": "*", "default": ["resnet50", "vgg16_bn", "mobilenet_v2", "densenet121"]},
        batch={"type": int, "default": 64},
        size={"type": int, "default": 32},
    )
    environment, rows = machine.facts(args.device), []
    for name in args.model[: 1 if args.quick else None]:
        for dtype in args.dtype:
            x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
            x = x.contiguous(memory_format=torch.channels_last)
            y = torch.randint(10, (args.batch,), device=args.device)
            stock = getattr(torchvision.models, name)(num_classes=10).to(args.device, memory_format=torch.channels_last)
            models = {
                "stock": stock, "fastconv": fastconv.fuse(stock), "deferred": fastconv.fuse(stock, defer_bn="auto")
            }  # fmt: skip
            row = {"model": name, "batch": args.batch, "size": args.size, "dtype": dtype}
            for who, model in models.items():
                row[f"{who}_saved"] = saved_bytes(model, x, y, DTYPES[dtype])
                row[f"{who}_peak"] = peak_bytes(model, x, y, DTYPES[dtype])
            for who, key in (("fastconv", "saved_ratio"), ("deferred", "deferred_ratio")):
                row[key] = row[f"{who}_saved"] / row["stock_saved"]
            rows.append(row)
            save_rows(args.out, "memory", environment, rows)
            saved = " ".join(f"{who} {row[f'{who}_saved'] / 2**20:.1f}" for who in models)
            ratios = f"{row['saved_ratio']:.2f}, deferred {row['deferred_ratio']:.2f}"
            print(f"{name:14} {args.batch}x{args.size} {dtype:5} MiB kept for the backward: {saved}; of stock {ratios}")


if __name__ == "__main__":
    main()
