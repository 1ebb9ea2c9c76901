"""One rank of tests/test_distributed.py: trains fused and stock models side by side, raises where they differ.

python distributed_worker.py RANK WORLD FILE: the ranks meet through FILE (gloo). Rank 0 prints what passed.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from fuse_models import Net
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastconv
import fastconv.functional as FF


class Branches(Net):
    """Every other step leaves one of the two branches unused."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        x = self.blocks(self.stem(x))
        x = self.other(x) if self.step % 2 else self.tail[0](x)
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def whole(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if isinstance(t, DTensor) else t


def train(model: nn.Module, wrapped: nn.Module, rank: int, steps: int = 3) -> list:
    """Everything that a few steps of SGD leave behind on this rank."""
    sgd = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    found = []
    for step in range(steps):
        x = torch.randn(2 + rank, 3, 9, 8, generator=torch.Generator().manual_seed(10 * rank + step)).double()
        sgd.zero_grad()
        out = wrapped(x)
        out.square().mean().backward()
        found += [out.detach(), *(whole(p.grad) for p in model.parameters())]
        sgd.step()
    return [*found, *(whole(p.detach()) for p in model.parameters()), *(b.clone() for b in model.buffers())]


calls: list[int] = []  # one entry for each run of the fused operator
_plain = FF.conv2d_bn_act
FF.conv2d_bn_act = lambda *args, **kwargs: calls.append(1) or _plain(*args, **kwargs)


def compare(name: str, make, wrap, rank: int, change=fastconv.fuse, wrap_stock=None) -> None:
    results, counts = [], []
    for wrapped, changed in ((wrap, change), (wrap_stock or wrap, lambda m: m)):
        torch.manual_seed(0)
        model = changed(make().double())
        calls.clear()
        results.append(train(model, wrapped(model), rank))
        counts.append(len(calls))
    ours, stock = results
    assert counts[0] >= 3 * 6 and counts[1] == 0, f"{name}: the fused operator ran {counts} times"
    assert len(ours) == len(stock)
    for a, b in zip(ours, stock, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}, rank {rank}: {text}")
    dist.barrier()
    if rank == 0:
        print(f"{name}: {len(ours)} tensors as stock", flush=True)


def shard(model: nn.Module) -> nn.Module:
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no others, and fuse() makes weights channels_last
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.blocks, *model.tail):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sync_batch_norm(rank: int) -> None:
    """Statistics across processes need a GPU: on a CPU a fused model raises what the stock model raises."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    for model in (convert(Net()), convert(fastconv.fuse(Net())), fastconv.fuse(convert(Net()))):
        try:
            model(torch.randn(2, 3, 9, 8))
        except ValueError as error:
            assert "SyncBatchNorm expected input tensor to be on GPU" in str(error)
        else:
            raise AssertionError("synchronised batch norm ran on a CPU")
    if rank == 0:
        print("sync batch norm: the same error", flush=True)


def main(rank: int, world: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    pair = dist.new_group([0, 1])
    compare(f"ddp {world}", Net, DistributedDataParallel, rank)
    if rank < 2:
        results = []
        for change in (fastconv.fuse, copy.deepcopy):
            torch.manual_seed(0)
            model = change(Net().double())
            results.append(train(model, DistributedDataParallel(model, process_group=pair), rank))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        if rank == 0:
            print(f"ddp 2: {len(results[0])} tensors as stock", flush=True)
    dist.barrier()
    compare("static_graph", Net, lambda m: DistributedDataParallel(m, static_graph=True), rank)
    unused = lambda m: DistributedDataParallel(m, find_unused_parameters=True)  # noqa: E731
    compare("find_unused_parameters", Branches, unused, rank)
    buckets = lambda m: DistributedDataParallel(m, bucket_cap_mb=0.001, gradient_as_bucket_view=True)  # noqa: E731
    compare("small buckets", Net, buckets, rank)
    door = lambda m: torch.compile(DistributedDataParallel(m), backend="fastconv")  # noqa: E731
    compare("compiled ddp", Net, door, rank, change=lambda m: m, wrap_stock=DistributedDataParallel)
    compare("fsdp2", Net, shard, rank)
    sync_batch_norm(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
