"""torchrun: as many processes as it started, each with its share of every batch. Alone, everything here is a no-op."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Ranks:
    """This process among all: `rank` of `count`. Without torchrun: 0 of 1."""

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.host_group = None
        if self.count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            # host-side news (losses, signals, random states) go over gloo, without a detour through the GPU
            self.host_group = dist.new_group(backend="gloo")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """The element-wise sums over all processes."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.host_group)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """Every process's `value`, by rank."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    @contextmanager
    def main_first(self):
        """The others wait until the main process is through (downloads). They do not wait for one that failed."""
        if not self.main:
            self._wait_for_main()
        try:
            yield
        except BaseException:
            self._tell_others(failed=True)
            raise
        self._tell_others(failed=False)

    def _wait_for_main(self) -> None:
        if self.sum([0.0])[0]:
            raise SystemExit(1)  # the main process has printed why

    def _tell_others(self, failed: bool) -> None:
        if self.main:
            self.sum([1.0 if failed else 0.0])


def local_device(device: torch.device) -> torch.device:
    """Under torchrun each process takes its own GPU."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: torch.device):
    """The process group, left in order at the end."""
    ranks = Ranks(device)
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
