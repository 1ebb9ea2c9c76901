"""The CUDA kernels in the compiled extension and what the compiler gave them: ``python -m fastconv info --kernels``.

Read from the machine code in the extension itself with cuobjdump (the CUDA toolkit's, or the one in Triton's package),
so that it works where there is no GPU.
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


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture; shared memory without what a launch asks for on top."""

    name: str
    arch: str
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers and local arrays
    shared: int  # bytes per block


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
    return parse(text)


def parse(text: str) -> list[Kernel]:
    """Kernels from the output of ``cuobjdump --dump-resource-usage``."""
    arch, name, rows = "", "", []
    for line in text.splitlines():
        if m := re.match(r"arch = (\S+)", line.strip()):
            arch = m[1]
        elif m := re.match(r"Function (\S+):", line.strip()):
            name = m[1]
        elif name and "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            rows.append((name, arch, values.get("REG", 0), values.get("STACK", 0), values.get("SHARED", 0)))
            name = ""
    names = readable([row[0] for row in rows])
    found = [Kernel(short, *row[1:]) for short, row in zip(names, rows, strict=True)]
    return sorted(found, key=lambda k: (k.name, int(re.sub(r"\D", "", k.arch))))


def table(found: Iterable[Kernel]) -> str:
    """One line per kernel: registers per thread (+ bytes of stack) by architecture, and shared memory."""
    found = list(found)
    archs = sorted({k.arch for k in found}, key=lambda a: int(re.sub(r"\D", "", a)))
    by_name: dict[str, dict[str, Kernel]] = {}
    for k in found:
        by_name.setdefault(k.name, {})[k.arch] = k
    lines = [f"{len(by_name)} kernels; registers per thread, + bytes of stack, by architecture; static shared memory"]
    lines.append("".join(f"{a:>11}" for a in archs) + f"{'shared':>8}  kernel")
    for name, row in by_name.items():
        cells = []
        for arch in archs:
            k = row.get(arch)
            cells.append("-" if k is None else f"{k.registers}" + (f" +{k.stack}" if k.stack else ""))
        shared = max(k.shared for k in row.values())
        lines.append("".join(f"{c:>11}" for c in cells) + f"{shared:>8}  {name}")
    return "\n".join(lines)
