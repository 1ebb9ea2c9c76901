"""The CUDA kernels in the compiled extension and what the compiler gave them: ``python -m fastconv info --kernels``.

Registers, stack and static shared memory are read from the machine code in the extension itself with cuobjdump (the
CUDA toolkit's, or the one in Triton's package), threads and dynamic shared memory come from the table that the
extension makes of its launches, and the resident blocks follow from these and the architecture's limits. No GPU needed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import _ext

# One multiprocessor: KiB of shared memory, threads, blocks (CUDA C++ Programming Guide, technical specifications per
# compute capability). All have 64 Ki registers.
_LIMITS = {
    "80": (164, 2048, 32),
    "86": (100, 1536, 16),
    "87": (164, 1536, 16),
    "89": (100, 1536, 24),
    "90": (228, 2048, 32),
    "100": (228, 2048, 32),
    "103": (228, 2048, 32),
    "120": (100, 1536, 24),
    "121": (100, 1536, 24),
}
_REGISTERS = 65536
_SYSTEM_SHARED = 1024  # bytes of each block that are not its own


def resident_blocks(arch: str, registers: int, threads: int, shared: int) -> int | None:
    """Blocks that one multiprocessor of "sm_90a" and the like holds at once; None for an unknown architecture."""
    limits = _LIMITS.get(re.sub(r"\D", "", arch))
    if limits is None:
        return None
    by_registers = _REGISTERS // (-(-max(registers, 1) // 8) * 8 * threads)  # handed out in eights per thread
    by_shared = limits[0] * 1024 // (shared + _SYSTEM_SHARED)
    return min(by_registers, by_shared, limits[1] // threads, limits[2])


def launch_table(text: str) -> dict[str, tuple[int, int]]:
    """kernel -> (threads per block, bytes of dynamic shared memory) from the lines of csrc/cuda/launch_table.cuh."""
    rows = [line.split("|") for line in text.splitlines()]
    names = readable([row[0] for row in rows])
    return {name: (int(row[1]), int(row[2])) for name, row in zip(names, rows, strict=True)}


def launch_of(name: str, launches: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """A kernel's launch: by its whole name, else by the one that its instances share. KeyError where there is none."""
    return launches[name] if name in launches else launches[name.partition("<")[0]]


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture and as it is launched."""

    name: str
    arch: str
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers and local arrays
    static_shared: int  # bytes per block
    threads: int = 0  # per block, at most
    dynamic_shared: int = 0  # bytes per block that the launch asks for

    @property
    def blocks(self) -> int | None:
        """Resident blocks per multiprocessor."""
        return resident_blocks(self.arch, self.registers, self.threads, self.static_shared + self.dynamic_shared)


def cuobjdump() -> str | None:
    """The tool's path, or None where neither a CUDA toolkit nor Triton is installed."""
    found = shutil.which("cuobjdump")
    if found is None and (spec := importlib.util.find_spec("triton")) is not None and spec.origin:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespace and parameters; mangled where there is no c++filt."""
    if not names or not shutil.which("c++filt"):
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    out = []
    for line in text.splitlines():
        name = re.sub(r"^void ", "", line).replace("fastconv::", "")
        depth = 0
        for i, char in enumerate(name):  # the parameter list begins at the first '(' outside <>
            depth += (char == "<") - (char == ">")
            if char == "(" and depth == 0:
                name = name[:i]
                break
        name = re.sub(r"\((int|bool|PoolKind)\)", "", name)
        for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32"), (" >", ">")):
            name = name.replace(long, short)
        out.append(name)
    return out


def kernels() -> list[Kernel]:
    """Every compiled kernel for every architecture, by name and architecture.

    Raises RuntimeError where there is no extension, no CUDA kernel in it, or no cuobjdump.
    """
    if not _ext.HAS_EXT:
        raise RuntimeError(_ext.EXT_REASON)
    reason = _ext.build_info()["cuda_reason"]
    if reason:
        raise RuntimeError(f"built without CUDA kernels: {reason}")
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump not found: it comes with the CUDA toolkit and with Triton (pip install triton)")
    command = [tool, "--dump-resource-usage", _ext.MODULE.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text, launch_table(_ext.MODULE.kernel_launches()))


def parse(text: str, launches: dict[str, tuple[int, int]]) -> list[Kernel]:
    """Kernels from the output of ``cuobjdump --dump-resource-usage`` and the table of their launches."""
    arch, name, rows = "", "", []
    for line in text.splitlines():
        if m := re.match(r"arch = (\S+)", line.strip()):
            arch = m[1]
        elif m := re.match(r"Function (\S+):", line.strip()):
            name = m[1]
        elif name and "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            # From sm_90 on the dump counts the system's part of a block's shared memory too.
            system = _SYSTEM_SHARED if int(re.sub(r"\D", "", arch)) >= 90 else 0
            shared = max(values.get("SHARED", 0) - system, 0)
            rows.append((name, arch, values.get("REG", 0), values.get("STACK", 0), shared))
            name = ""
    names = readable([row[0] for row in rows])
    found = [Kernel(short, *row[1:], *launch_of(short, launches)) for short, row in zip(names, rows, strict=True)]
    return sorted(found, key=lambda k: (k.name, int(re.sub(r"\D", "", k.arch))))


def table(found: Iterable[Kernel]) -> str:
    """One line per kernel: registers (+ stack) and resident blocks by architecture, threads, shared memory."""
    found = list(found)
    archs = sorted({k.arch for k in found}, key=lambda a: int(re.sub(r"\D", "", a)))
    by_name: dict[str, dict[str, Kernel]] = {}
    for k in found:
        by_name.setdefault(k.name, {})[k.arch] = k
    lines = [
        f"{len(by_name)} kernels. By architecture: registers per thread, + bytes of stack, / resident blocks per "
        "multiprocessor.",
        "Then threads per block, static and dynamic shared memory per block in bytes.",
        "".join(f"{a:>14}" for a in archs) + f"{'threads':>9}{'static':>8}{'dynamic':>9}  kernel",
    ]
    for name, row in by_name.items():
        cells = []
        for arch in archs:
            k = row.get(arch)
            stack = f" +{k.stack}" if k is not None and k.stack else ""
            cells.append("-" if k is None else f"{k.registers}{stack} / {'?' if k.blocks is None else k.blocks}")
        one = next(iter(row.values()))
        static = max(k.static_shared for k in row.values())
        cells = "".join(f"{c:>14}" for c in cells)
        lines.append(f"{cells}{one.threads:>9}{static:>8}{one.dynamic_shared:>9}  {name}")
    return "\n".join(lines)
