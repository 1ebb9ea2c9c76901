"""Times the backends of one call against each other, on private copies, and checks that they agree.

Nothing of the caller's is written or read back: images and weights are random numbers from a generator of its own in
the same shapes, strides and dtypes (so the global random state stays and zeros or constants in the caller's data cannot
mislead the check), vectors and class indices are clones, and so running statistics move on the clones alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._measured import on

log = logging.getLogger("fastconv")

MOST_ROUNDS, LEAST_ROUNDS = 15, 2
# Seconds of timed rounds per call, after one untimed run of each backend (which compiles Triton kernels).
SECONDS = {"cpu": 0.2, "cuda": 0.05}
_CUDA_REPEATS = 5  # calls between two events: their own resolution is half a microsecond
# Largest relative RMS difference from stock PyTorch in the same dtype, of the output and of gradients: wrong kernels
# are off by more, another order of summation by less. float32 leaves room for TF32. Where rounding moves a value across
# an activation's kink its whole gradient changes: with bf16's unit of 2^-8 that is one element in 250, 6% in the RMS.
_TOLERANCE = {
    torch.float64: (1e-8, 1e-6),
    torch.float32: (3e-3, 3e-2),
    torch.float16: (5e-3, 8e-2),
    torch.bfloat16: (3e-2, 2e-1),
}


@dataclass
class Result:
    """Milliseconds by backend, [forward] or [forward, backward], and why a backend has none."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # that the measurement took, compilation included


def unsettled(tensors: Sequence[Tensor | None]) -> str:
    """Why nothing may be timed now; "" where it may. The next call in an ordinary state is measured instead."""
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return "inside a torch.jit trace"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "inside a dispatch mode"
    if any(t is not None and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return "on a tensor subclass"
    if torch._C._current_graph_task_id() != -1:
        return "inside a backward pass"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "under saved-tensor hooks (activation checkpointing)"
    if any(t is not None and t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return "inside a CUDA graph capture"
    return ""


def _random_like(t: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers with ``t``'s shape and strides, overlapping ones included."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    memory = torch.empty(elements, dtype=t.dtype, device=t.device).normal_(generator=generator)
    return memory.as_strided(t.shape, t.stride())


def _copies(op: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    generator = torch.Generator(tensors[0].device).manual_seed(0)
    copies = []
    for i, t in enumerate(tensors):
        if t is None:
            copies.append(None)
            continue
        # A target's rows are probabilities: the caller's own.
        drawn = t.is_floating_point() and t.dim() > 1 and not (op == "cross_entropy" and i > 0)
        copy = _random_like(t, generator) if drawn else t.detach().clone()
        copies.append(copy.requires_grad_(t.requires_grad))
    return copies


def _differs(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str:
    """How results differ from stock PyTorch's by more than ``dtype`` excuses; "" where they do not."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {a.dtype}{list(a.shape)}, stock PyTorch's {b.dtype}{list(b.shape)}"
        a, b = a.detach().double(), b.detach().double()
        size = b.square().mean().sqrt().item() if b.numel() else 0.0
        if not size < float("inf"):
            continue  # stock overflows on such numbers: nothing to compare with
        error = (a - b).square().mean().sqrt().item() if b.numel() else 0.0
        if not error <= _TOLERANCE[dtype][i > 0] * size + 1e-30:
            what = "the output" if i == 0 else f"gradient {i}"
            return f"{what} differs from stock PyTorch by {error / max(size, 1e-30):.2g} (relative RMS)"
    return ""


class _Call:
    """One backend's forward, and backward where the caller's tensors want gradients."""

    def __init__(self, op: str, run: Callable, tensors: Sequence[Tensor | None], settings: Sequence) -> None:
        self.run, self.tensors, self.settings = run, tensors, settings
        self.wanted = [t for t in tensors if t is not None and t.requires_grad] if torch.is_grad_enabled() else []
        self.checked = self.wanted
        if op == "conv2d_bn_act" and settings[4]:
            # The batch mean removes the convolution's bias: its gradient is zero up to rounding.
            self.checked = [t for t in self.wanted if t is not tensors[2]]
        self.upstream: Tensor | None = None

    def forward(self, name: str) -> Tensor:
        return self.run(name, *self.tensors, *self.settings)

    def backward(self, out: Tensor) -> dict[int, Tensor]:
        if self.upstream is None:
            generator = torch.Generator(out.device).manual_seed(1)
            self.upstream = torch.empty_like(out).detach().normal_(generator=generator)
        grads = torch.autograd.grad(out, self.wanted, self.upstream)
        return {id(t): g for t, g in zip(self.wanted, grads, strict=True)}

    def results(self, name: str) -> list[Tensor]:
        out = self.forward(name)
        grads = self.backward(out) if self.wanted else {}
        return [out.detach(), *(grads[id(t)] for t in self.checked)]

    def time(self, name: str) -> list[float]:
        """Milliseconds of one forward, and of its backward where there is one."""
        if self.tensors[0].is_cuda:
            return self._time_cuda(name)
        start = time.perf_counter()
        out = self.forward(name)
        middle = time.perf_counter()
        if not self.wanted:
            return [(middle - start) * 1e3]
        self.backward(out)
        return [(middle - start) * 1e3, (time.perf_counter() - middle) * 1e3]

    def _time_cuda(self, name: str) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        outs = [self.forward(name) for _ in range(_CUDA_REPEATS)]
        marks[1].record()
        if self.wanted:
            for out in outs:
                self.backward(out)
        marks[2].record()
        marks[2].synchronize()
        times = [a.elapsed_time(b) / _CUDA_REPEATS for a, b in zip(marks, marks[1:], strict=False)]
        return times if self.wanted else times[:1]


def measure(
    op: str, names: Sequence[str], run: Callable, tensors: Sequence[Tensor | None], settings: Sequence,
    seconds: float | None = None,
) -> Result:  # fmt: skip
    """``run(name, *tensors, *settings)`` for every name: the least time over interleaved rounds.

    A backend that raises, or whose results differ from aten's, gets no time but a reason and a warning in the log.
    """
    began = time.perf_counter()
    result = Result()
    device = tensors[0].device
    budget = SECONDS.get(device.type, 0.2) if seconds is None else seconds
    with torch.autocast(device.type, enabled=False), on(device):
        call = _Call(op, run, _copies(op, tensors), settings)
        expected = call.results("aten")
        # Batch norm's vectors are fp32 beside bf16 images: the coarsest of the dtypes sets the tolerance.
        dtypes = {t.dtype for t in tensors if t is not None and t.is_floating_point()}
        coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
        for name in names:
            try:
                reason = _differs(call.results(name), expected, coarsest) if name != "aten" else ""
            except Exception as error:  # whatever a compiler or a kernel raises: the others are still there
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if reason:
                result.failed[name] = reason
                log.warning("%s: backend %s is left out for this call: %s", op, name, reason)
        del expected
        able = [name for name in names if name not in result.failed]
        rounds: dict[str, list[list[float]]] = {name: [] for name in able}
        start = time.perf_counter()
        for i in range(MOST_ROUNDS):
            for j in range(len(able)):
                name = able[(i + j) % len(able)]
                rounds[name].append(call.time(name))
            if i + 1 >= LEAST_ROUNDS and time.perf_counter() - start > budget:
                break
    for name, times in rounds.items():
        result.ms[name] = [round(t, 5) for t in min(times, key=sum)]
    result.seconds = time.perf_counter() - began
    return result
