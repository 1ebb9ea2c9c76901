"""Compiles every CUDA kernel for every architecture, without a GPU, and writes resources.md: registers, shared memory,
spills, resident blocks, and the instructions that the design promises (HMMA, LDSM, LDGSTS, 128-bit accesses).

    python tests/simt/resources.py [--family depthwise ...] [--jobs 2]

--family: only these are compiled, the other rows of resources.md stay as they are.

Needs nvcc; the instruction counts also need cuobjdump (the toolkit's, or the one that comes with triton). The cubins
are kept under build/simt/cubin by content, so a second run only compiles what changed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simt_lib

from fastconv._kernels import cuobjdump, launch_of, launch_table, readable, resident_blocks

ARCHS = ["sm_80", "sm_90a", "sm_100", "sm_120"]
FAMILIES = ["conv", "depthwise", "norm", "pool", "loss", "update"]
DTYPES = {"fp32": "float", "fp16": "__half", "bf16": "__nv_bfloat16"}
PATTERNS = {
    "HMMA": r"\bHMMA",
    "LDSM": r"\bLDSM",
    "LDGSTS": r"\bLDGSTS",
    "LDG128": r"\bLDG\S*\.128",
    "STG128": r"\bSTG\S*\.128",
    "FFMA": r"\bFFMA",
}
COUNTED = "sm_90a"  # whose instructions are counted
CUBINS = simt_lib.BUILD / "cubin"


def compile_one(family: str, dtype: str, arch: str) -> tuple[Path, str]:
    """The cubin of one family and dtype, and ptxas's report."""
    source = simt_lib.HERE / "compile" / f"{family}.cu"
    command = ["nvcc", "-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-DFASTCONV_DTYPE={DTYPES[dtype]}"]
    digest = hashlib.sha256("\0".join(command).encode() + source.read_bytes())
    for header in sorted([*simt_lib.KERNELS.glob("*.cuh"), *simt_lib.KERNELS.glob("*.h")]):
        digest.update(header.read_bytes())
    cubin = CUBINS / f"{family}-{dtype}-{arch}-{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [*command, f"-I{simt_lib.KERNELS}", str(source), "-o", str(cubin)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{family}.cu does not compile for {arch}:\n{done.stderr[:4000]}")
        log.write_text(done.stderr)
    return cubin, log.read_text()


def parse_log(log: str) -> dict[str, dict]:
    """Mangled name -> registers, spill bytes, static shared memory."""
    kernels, name = {}, None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            name = m[1]
            kernels[name] = {"registers": 0, "spill": 0, "smem": 0}
        elif name and (m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            kernels[name]["spill"] = int(m[1]) + int(m[2])
        elif name and (m := re.search(r"Used (\d+) registers", line)):
            kernels[name]["registers"] = int(m[1])
            if m := re.search(r"(\d+) bytes smem", line):
                kernels[name]["smem"] = int(m[1])
    return kernels


def parse_sass(cubin: Path) -> dict[str, dict[str, int]]:
    """Mangled name -> counts of the PATTERNS; empty without cuobjdump."""
    tool = cuobjdump()
    if tool is None:
        return {}
    cached = cubin.with_suffix(".sass.json")
    if not cached.exists():
        text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        counts: dict[str, dict[str, int]] = {}
        for part in text.split("Function : ")[1:]:
            name, body = part.split("\n", 1)
            counts[name.strip()] = {key: len(re.findall(pattern, body)) for key, pattern in PATTERNS.items()}
        cached.write_text(json.dumps(counts))
    return json.loads(cached.read_text())


def launches() -> dict[str, tuple[int, int]]:
    """csrc/cuda/launch_table.cuh: kernel -> threads per block, dynamic shared memory."""
    lib = simt_lib.library("conv").lib
    lib.simt_launch_table.restype = ctypes.c_char_p
    return launch_table(lib.simt_launch_table().decode())


def gather(archs: list[str], families: list[str], dtypes: list[str], jobs: int = 2) -> dict[str, dict[str, dict]]:
    """kernel -> arch -> its numbers."""
    work = [(f, d, a) for a in archs for f in families for d in dtypes]
    with ThreadPoolExecutor(jobs) as pool:
        built = list(pool.map(lambda w: compile_one(*w), work))
    launched = launches()
    table: dict[str, dict[str, dict]] = {}
    for (_, _, arch), (cubin, log) in zip(work, built, strict=True):
        numbers, sass = parse_log(log), parse_sass(cubin)
        for mangled, name in zip(numbers, readable(list(numbers)), strict=True):
            entry = dict(numbers[mangled], **sass.get(mangled, {}))
            entry["threads"], extra = launch_of(name, launched)
            entry["smem"] += extra
            entry["blocks"] = resident_blocks(arch, entry["registers"], entry["threads"], entry["smem"])
            table.setdefault(name, {})[arch] = entry
    return table


def rows_of(table: dict[str, dict[str, dict]], archs: list[str]) -> dict[str, str]:
    """kernel -> its line of resources.md."""
    lines = {}
    for name, row in table.items():
        any_arch = next(iter(row.values()))
        cells = [f"`{name}`", str(any_arch["threads"]), str(any_arch["smem"])]
        for arch in archs:
            e = row.get(arch)
            cells.append(
                "" if e is None else f"{e['registers']} / {e['blocks']}" + (f" !{e['spill']}" if e["spill"] else "")
            )
        cells += [str(row.get(COUNTED, {}).get(p, "")) for p in PATTERNS]
        lines[name] = "| " + " | ".join(cells) + " |"
    return lines


def render(rows: dict[str, str]) -> str:
    """resources.md."""
    lines = [
        "# Resources of the CUDA kernels",
        "",
        "Written by `python tests/simt/resources.py` (nvcc, no GPU). Per architecture:",
        "registers / resident blocks per SM, `!n` = n bytes spilled. Shared memory in bytes, dynamic included.",
        f"Instruction counts are static, of {COUNTED}.",
        "",
    ]
    head = ["kernel", "threads", "smem", *ARCHS, *PATTERNS]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += [rows[name] for name in sorted(rows)]
    spills = []
    for name in sorted(rows):
        cells = [cell.strip() for cell in rows[name].split("|")[1:-1]]
        spills += [f"{name} ({arch})" for arch in ARCHS if "!" in cells[head.index(arch)]]
    lines += [
        "",
        f"{len(rows)} kernels, {len(rows) * len(ARCHS)} compilations, {len(spills)} with spills"
        + (": " + ", ".join(spills) if spills else "."),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=simt_lib.HERE / "resources.md")
    args = parser.parse_args()
    rows = {}
    if set(args.family) != set(FAMILIES):
        rows = {line.split("`")[1]: line for line in args.out.read_text().splitlines() if line.startswith("| `")}
    text = render(rows | rows_of(gather(ARCHS, args.family, list(DTYPES), args.jobs), ARCHS))
    args.out.write_text(text)
    print(text.splitlines()[-1])


if __name__ == "__main__":
    main()
