"""The machine a number was taken on: its name, what runs on it, how fast it copies and multiplies, who else is busy."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision


def device_facts(device: torch.device) -> dict:
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        detail = f"sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
        return {"type": "cuda", "name": p.name, "detail": detail}
    name, flags = _cpu_facts()
    detail = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"type": "cpu", "name": name, "detail": detail + (", AMX" if "amx_bf16" in flags else "")}


def _cpu_facts() -> tuple[str, list[str]]:
    """The processor's name and its instruction sets, as far as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    facts = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    return facts.get("model name", platform.processor() or platform.machine()), facts.get("flags", "").split()


def free_memory() -> int:
    """Bytes that a new allocation can have; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def slug(device: torch.device) -> str:
    """The folder under bench/results: nvidia-h100-80gb-hbm3, cpu-amd-epyc-2-cores, cpu-intel-xeon-amx-2-cores.

    Virtual machines name every Xeon alike, and every EPYC: those with matrix instructions are another machine to bf16,
    and those without AVX-512 (cpu-amd-epyc-avx2-2-cores) another one altogether.
    """
    facts = device_facts(device)
    name = re.sub(r"\(\w+\)|\bprocessor\b|\bcpu\b|@.*", " ", facts["name"], flags=re.IGNORECASE)
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if device.type == "cuda":
        return name
    kind = next((f"-{set_.lower()}" for set_ in ("AMX", "AVX2") if set_ in facts["detail"]), "")
    return f"cpu-{name}{kind}-{os.cpu_count()}-cores"


def versions() -> dict:
    fastconv = sys.modules.get("fastconv")
    return {
        "fastconv": getattr(fastconv, "__version__", None),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
    }


def git_facts() -> dict:
    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


class Others:
    """The share of all cores that other programs took since the last call, or since this object was made.

    From /proc/stat, which counts in steps of 10 ms: ask about windows of 0.2 s or more. 0 where there is no such file.
    """

    def __init__(self) -> None:
        self._last = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        own = os.times()
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return time.perf_counter(), 0.0, 0.0
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) / os.sysconf("SC_CLK_TCK") for x in first)
        return time.perf_counter(), user + nice + system + irq + softirq + steal, own.user + own.system

    def share(self) -> float:
        before, self._last = self._last, self._read()
        seconds, busy, own = (after - b for after, b in zip(self._last, before, strict=True))
        return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


def _best_seconds(run, device: torch.device, repeats: int) -> float:
    def once() -> float:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    run()
    return min(once() for _ in range(repeats))


def dtypes(device: torch.device) -> list[str]:
    """What a device multiplies in. A CPU without bf16 instructions leaves stock PyTorch seconds a training step."""
    if device.type == "cuda":
        return ["bf16", "fp16", "fp32"]
    return ["fp32", "bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["fp32"]


def rates(device: torch.device) -> dict[str, float]:
    """What the machine reaches at best, measured: copy in GB/s (read + write), matrix products in TFLOP/s by dtype.

    On a CPU the product is tried as a 1x1 convolution too: MKL's fp32 product uses half of an AMD processor's width.
    """
    size = 2**28 if device.type == "cuda" else 2**26
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * size / _best_seconds(lambda: target.copy_(source), device, 20) / 1e9}
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name in dtypes(device):
        found[name] = _product_rate(8192 if device.type == "cuda" else 2048, known[name], device)
    return found


def _product_rate(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of n x n x n."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = _best_seconds(lambda: a @ b, device, 10)
    if device.type == "cpu":
        x = a.view(2, n // 64, 32, n).permute(0, 3, 1, 2)  # n rows as 2 images of n/64 x 32, channels last
        w = b.view(n, n, 1, 1)
        seconds = min(seconds, _best_seconds(lambda: torch.conv2d(x, w), device, 10))
    return 2 * n**3 / seconds / 1e12


def facts(device: torch.device) -> dict:
    """What stands beside every result: device, versions, commit."""
    return {"device": device_facts(device), "versions": versions(), "git": git_facts()}


def environment(device: torch.device) -> dict:
    """The same and the machine's rates, for what is timed."""
    return facts(device) | {"rates": rates(device)}
