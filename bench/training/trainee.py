"""A trainee: one backend's model, optimizer, training step and random numbers, and what was measured of it."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import ProgramError
from .models import build_loss

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision(precision: str) -> None:
    """fp32 means fp32: cuDNN would take TF32 unasked. The same for every backend."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def build_optimizer(args, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """PyTorch's fused (one-kernel) optimizers, the fastest stock ones, for every backend."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=args.momentum, fused=True, **common)
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, fused=True, capturable=device.type == "cuda", **common)
    return torch.optim.Adagrad(parameters, fused=device.type == "cpu", **common)  # it has no fused CUDA kernel


class StockStep:
    """The training step as PyTorch's documentation writes it, eager, with autocast and loss scaling where asked for."""

    def __init__(self, model: nn.Module, loss_fn: nn.Module, optimizer, autocast_dtype, device: torch.device) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.dtype, self.device_type = autocast_dtype, device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype == torch.float16)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device_type, self.dtype):
            loss = self.loss_fn(self.model(images), labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def autocast(device_type: str, dtype: torch.dtype | None):
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)


class RandomStream:
    """A trainee's own random numbers (dropout): `with stream:` makes them the default ones, and keeps where they stand.

    So each trainee of a comparison draws the same numbers, and a checkpoint holds where it was.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.states = [torch.Generator().manual_seed(seed).get_state()]
        if device.type == "cuda":
            self.states.append(torch.Generator(device).manual_seed(seed).get_state())

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)

    def __enter__(self) -> None:
        self.outer = self._read()
        self._write(self.states)

    def __exit__(self, *_) -> None:
        self.states = self._read()
        self._write(self.outer)


def prepares(name: str, args, ranks) -> bool:
    """Whether this backend's batches are made in its CUDA graph: some 20 kernels that the host need not launch."""
    return name == "fastconv" and args.device.type == "cuda" and args.loader != "torch" and ranks.count == 1


@dataclass
class Block:
    """Some steps that were timed as one: a single step on the CPU, more on a GPU (see loop.py)."""

    first_step: int
    steps: int
    seconds: float
    warm: bool  # past the warm-up

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds / self.steps


class Trainee:
    def __init__(self, name: str, model: nn.Module, args, ranks, state: dict | None = None, prepare=None) -> None:
        """Takes `model` over. `state`: what `state_dict` gave; loaded before anything derives from the weights.

        `prepare`: makes a batch of what `run` is given, inside the step, where the step can take it in (`prepares`).
        """
        start = time.perf_counter()
        self.name, self.args, self.device = name, args, args.device
        allocated = self._allocated()
        self.dtype = AUTOCAST[args.precision]
        if state is not None:
            model.load_state_dict(state["model"])
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.fusion = None
        if name == "fastconv":
            self._fuse()
        self.optimizer = build_optimizer(args, self.model, self.device)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.loss_fn = build_loss(args, name)
        self.prepare = prepare if prepares(name, args, ranks) else None
        self.step = self._build_step(ranks)
        self.random = RandomStream(args.seed + ranks.rank, self.device)
        self.losses: list[float] = []  # by step, over the whole training
        self.blocks: list[Block] = []
        if state is not None:
            self._load(state, ranks.rank)
        self.model.train()
        self.setup_seconds = time.perf_counter() - start
        self.first_step_seconds: float | None = None
        self.resident_bytes = self._allocated() - allocated
        self.step_peak_bytes = 0
        self.accuracy: float | None = None

    def _fuse(self) -> None:
        try:
            import fastconv
        except ImportError as error:
            raise ProgramError(
                f"the fastconv backend cannot be imported ({error}); install it with: pip install -e ."
            ) from error
        self.model = fastconv.fuse(self.model)
        self.fusion = fastconv.fusion_report(self.model)

    def _build_step(self, ranks):
        model = self.model
        if ranks.count > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        if self.name == "stock":
            return StockStep(model, self.loss_fn, self.optimizer, self.dtype, self.device)
        import fastconv

        # DDP's all-reduces hang on hooks that a captured graph does not run
        graph = {"cuda_graph": False} if ranks.count > 1 else {}
        return fastconv.TrainStep(
            model, self.loss_fn, self.optimizer, autocast_dtype=self.dtype, prepare=self.prepare, **graph
        )

    def run(self, batches: list[tuple[Tensor, Tensor]], first_step: int, warm: bool) -> list[float]:
        """Trains on these batches (what `prepare` takes, if there is one) and times them together. Returns the losses.

        The one host sync is after the last step.
        """
        cuda = self.device.type == "cuda"
        losses = torch.empty(len(batches), device=self.device)
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        allocated = self._allocated()
        with self.random:
            start = time.perf_counter()
            for index, (images, labels) in enumerate(batches):
                losses[index].copy_(self.step(images, labels))
            values = losses.tolist()
            seconds = time.perf_counter() - start
        if self.first_step_seconds is None:
            self.first_step_seconds = seconds
        self.resident_bytes += self._allocated() - allocated
        if cuda and warm:
            peak = torch.cuda.max_memory_allocated(self.device) - allocated
            self.step_peak_bytes = max(self.step_peak_bytes, peak)
        self.blocks.append(Block(first_step, len(batches), seconds, warm))
        return values

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak_bytes(self) -> int | None:
        """GPU memory at its fullest during a step: what stays between steps and what a step adds. None on the CPU.

        A replayed graph allocates nothing that could be seen: what its private pool holds in reserve counts instead.
        """
        if self.device.type != "cuda":
            return None
        pooled = 0
        if getattr(self.step, "captured", 0):
            private = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
            pooled = sum(segment["total_size"] - segment["allocated_size"] for segment in private)
        return self.resident_bytes + max(self.step_peak_bytes, pooled)

    def poisoned(self) -> str | None:
        """The name of a weight or statistic that is not finite, if there is one."""
        tensors = {name: value for name, value in self.model.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
        return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)

    def saved_bytes(self, images: Tensor, labels: Tensor) -> int:
        """Bytes that one forward pass keeps for the backward pass, weights not counted. Changes nothing."""
        state = {name: value.clone() for name, value in self.model.named_buffers()}
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with self.random, hooks, autocast(self.device.type, self.dtype):
            loss = self.loss_fn(self.model(images), labels)
        del loss  # until here it held every saved tensor, so that no address was counted for two of them
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state[name])
        return sum(kept.values())

    # -------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, ranks) -> dict:
        """Everything to go on from, in types that torch.load(weights_only=True) accepts. Every rank calls it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": ranks.gather(self.random.states),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "blocks": torch.tensor(
                [[b.first_step, b.steps, b.seconds, b.warm] for b in self.blocks], dtype=torch.float64
            ).reshape(-1, 4),
        }
        scaler = getattr(self.step, "scaler", None)
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        return state

    def _load(self, state: dict, rank: int) -> None:
        self.random.states = list(state["random"][rank])
        self.losses = state["losses"].tolist()
        self.blocks = [Block(int(f), int(n), s, bool(w)) for f, n, s, w in state["blocks"].tolist()]
        scaler = getattr(self.step, "scaler", None)
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
