"""Proves the net: breaks the kernels on purpose, one fault at a time, and expects the emulator's tests to turn red.

    python tests/simt/mutate.py [--only SUBSTRING ...]

Two kinds of fault. Every barrier, warp barrier, cp.async wait and commit of the kernels is skipped in turn, at run
time (FASTCONV_SIMT_SKIP, no rebuild). Then the edits of EDITS, each in a copy of the kernels: a dropped bound, a wrong
swizzle, ...
Prints one line per fault and the score; exits 1 if a fault survives that is not listed, with its reason, in EQUIVALENT.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest
import simt_lib
import torch

FAMILY_OF = {
    "act_backward": "norm",
    "batch_norm": "norm",
    "batch_norm_backward": "norm",
    "column_tile": "norm",
    "pool": "pool",
    "cross_entropy": "loss",
    "cross_entropy_backward": "loss",
}  # everything else: conv
TIMEOUT = 900  # seconds for one family's tests
torch.set_num_threads(1)  # a fork must not inherit a pool of threads
SITE = re.compile(r"__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^>]*>\(\)|cp_async_commit\(\)")

# (file, text, replacement): each must occur in the file; the first occurrence is replaced. "full": only fp32 can see it
EDITS = [
    ("conv_tile.cuh", "if constexpr (kChunks >= 8) return row & 7;", "if constexpr (kChunks >= 8) return 0;"),
    ("conv_tile.cuh", "return (row >> 1) & 3;", "return row & 3;"),
    (
        "conv_tile.cuh",
        "ptx::cp_async<VecBytes>(at(tile, row, col), p, ok)",
        "ptx::cp_async<VecBytes>(at(tile, row, col), p, true)",
    ),
    ("conv_tile.cuh", "if (valid >> i & 1) transform(held[i]);", "transform(held[i]);"),
    ("conv_tile.cuh", "          valid |= 1u << i;", ""),
    ("conv_gemm.cuh", "ok = k_ok && r.image >= 0 &&", "ok = r.image >= 0 &&"),
    ("conv_gemm.cuh", "ok = k_ok && r.image >= 0 &&", "ok = k_ok &&"),
    ("conv_gemm.cuh", "static_cast<unsigned>(h) < static_cast<unsigned>(ah.in_size) &&", ""),
    ("conv_gemm.cuh", "static_cast<unsigned>(w) < static_cast<unsigned>(aw.in_size);", "true;"),
    ("conv_gemm.cuh", "ok = k_ok && n < cols;", "ok = k_ok;"),
    ("conv_gemm.cuh", "ok = k < k_total && n < cols;", "ok = k < k_total;"),
    ("conv_gemm.cuh", "ok = k < k_total && n < cols;", "ok = n < cols;"),
    ("conv_gemm.cuh", "if (m < m_total) {", "if (true) {"),
    ("conv_gemm.cuh", "if (m0 >= m_total) return;", ""),
    ("conv_gemm.cuh", "Tr::kStages - 2>()", "Tr::kStages - 1>()"),
    ("conv_gemm.cuh", "const int next = kt + Tr::kStages - 1;", "const int next = kt + Tr::kStages;"),
    ("conv_gemm.cuh", "const int kt1 = min_int(kt0 + per_split, k_tiles);", "const int kt1 = kt0 + per_split;"),
    ("conv_gemm.cuh", "if (i0 == i1) j0", "j0"),
    ("conv_gemm.cuh", "m = merge(m, stats[i * Tr::BN + c]);", "m = stats[i * Tr::BN + c];"),
    ("conv_gemm.cuh", "if (next < kt1) commit(next);", "commit(next);"),
    ("conv_wgrad.cuh", "Tr::kStages - 2>()", "Tr::kStages - 1>()"),
    ("conv_wgrad.cuh", "ok = a_ok && k < k_total;", "ok = a_ok;"),
    ("conv_wgrad.cuh", "ok = a_ok && k < k_total;", "ok = k < k_total;"),
    ("conv_wgrad.cuh", "ok = b_ok && k < k_total &&", "ok = b_ok &&"),
    ("conv_wgrad.cuh", "static_cast<unsigned>(w) < static_cast<unsigned>(g.w);", "true;"),
    ("conv_wgrad.cuh", "m0 + r < kg ?", "true ?"),
    ("conv_params.cuh", "j0 = max_int(first, 0);", "j0 = max_int(first + 1, 0);"),
    ("conv_params.cuh", "min_int(last + 1, taps)", "min_int(last, taps)"),
    ("conv_params.cuh", "stride / gcd_int(stride, dil)", "stride"),
    ("conv_epilogue.cuh", "if (row >= 0 && col < o.cols) write<kVec>", "if (row >= 0) write<kVec>"),
    ("conv_epilogue.cuh", "if (row >= 0 && col < o.cols) write<1>", "if (row >= 0) write<1>"),
    ("conv_epilogue.cuh", "staged[i] = to_float(from_float<T>(x[i]));", "staged[i] = x[i];"),
    (
        "conv_epilogue.cuh",
        "m.mean += stage[r * kLd + c], m.count += 1.0f;",
        "m.mean += stage[r * kLd + c], m.count = 16.0f;",
    ),
    ("conv_engine.cuh", "r[i] = ptx::to_tf32(x);", "", "full"),
    ("conv_engine.cuh", "(mn & 3) * 4);", "(mn & 2) * 4);", "full"),
    ("conv_engine.cuh", "i * lanes + l;", "i * lanes;", "full"),
    ("conv_engine.cuh", "(m + (lane & 15), kk * 2 + (lane >> 4))", "(m + (lane & 15), kk * 2)"),
    ("conv_reduce.cuh", "for (int s = 1; s < splits; ++s)", "for (int s = 2; s < splits; ++s)"),
    ("conv_depthwise.cuh", "if (ih % g.stride_h) continue;", ""),
    ("conv_depthwise.cuh", "if (c >= g.c || ", "if ("),
    ("column_tile.cuh", "end = active ?", "end = true ?"),
    ("act_backward.cuh", "if (c < channels)", "if (true)"),
    ("batch_norm.cuh", "dev[j] = m2[j] + d * d * mine;", "dev[j] = m2[j];"),
    (
        "batch_norm.cuh",
        "float count = static_cast<float>(left < p.shape.chunk_rows ? left : p.shape.chunk_rows);",
        "float count = static_cast<float>(p.shape.chunk_rows);",
    ),
    ("batch_norm.cuh", "factor * m2 / (rows - 1.0f)", "factor * m2 / rows"),
    ("batch_norm_backward.cuh", "const float share = p.training ?", "const float share = true ?"),
    ("batch_norm_backward.cuh", "p.act = Activation::kIdentity;\n", "\n"),
    ("pool.cuh", "x[j] > best[j] ||", "x[j] >= best[j] ||"),
    ("pool.cuh", "|| x[j] != x[j])", ")"),
    ("pool.cuh", "where[j] < 0 || ", ""),
    ("pool.cuh", "min_int(v.h0 + g.r, g.h + g.pad_h)", "v.h0 + g.r"),
    ("pool.cuh", "if (ph < 0 || ph % g.stride_h ||", "if (ph < 0 ||"),
    ("cross_entropy.cuh", "sum * expf(max - x)", "sum"),
    ("cross_entropy.cuh", "const int classes = real ? s.classes : 0;", "const int classes = s.classes;"),
    ("cross_entropy.cuh", "if (t != s.ignore_index) {", "if (true) {"),
    ("cross_entropy.cuh", "if (t < 0 || t >= s.classes) {", "if (false) {"),
    ("cross_entropy_backward.cuh", "x[j] = ignored ? 0.0f", "x[j] = false ? 0.0f"),
]

# fault -> why no test can see it
EQUIVALENT = {
    "act_backward.cuh: if (c < channels) -> if (true)": "reads sums of other chunks, which are then not stored",
    "cross_entropy.cuh: const int classes = real ? s.classes : 0; -> const int classes = s.classes;": (
        "saves work only: idle lanes read row 0 and store nothing"
    ),
    "conv_gemm.cuh: if (m0 >= m_total) return; -> nothing": "saves work only: every row of such a tile is masked",
    "conv_gemm.cuh: const int kt1 = min_int(kt0 + per_split, k_tiles); "
    "-> const int kt1 = kt0 + per_split;": "saves work only: k beyond the total is masked to zero",
    "conv_gemm.cuh: if (next < kt1) commit(next); -> commit(next);": "saves work only: that stage is not read again",
}


def family_of(file: str) -> str:
    return FAMILY_OF.get(Path(file).stem, "conv")


def fork_tests(family: str, env: dict[str, str], output: IO[str]) -> tuple[int, str]:
    """Runs the family's tests in a fork, so that torch is imported once; returns exit status and output."""
    child = os.fork()
    if child == 0:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.update(env)
        signal.alarm(TIMEOUT)  # a fault may hang the kernel: the signal's death is red too
        for name in ("simt_lib", "simt_conv"):  # they read the environment when imported
            sys.modules.pop(name, None)
        code = 3
        try:
            options = ["-x", "-q", "-p", "no:cacheprovider", "--noconftest", "--no-header", "--tb=line"]
            code = int(pytest.main([*options, str(simt_lib.HERE / f"test_simt_{family}.py")]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output.seek(0)
    return status, output.read()


def run_tests(family: str, env: dict[str, str]) -> bool:
    """Whether the family's tests pass under env."""
    with tempfile.TemporaryFile("w+") as output:
        status, text = fork_tests(family, env, output)
    if "does not compile" in text or status in (2, 3, 4, 5):  # no verdict: pytest itself, or the edit, went wrong
        raise SystemExit(f"cannot judge a fault ({env}):\n{text[-3000:]}")
    return status == 0  # 1: failed tests; negative: a crash, which is red as well


def sites() -> list[tuple[str, int, str]]:
    found = []
    for path in sorted(simt_lib.KERNELS.glob("*.cuh")):
        if path.name in ("ptx.cuh", "launch.cuh"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if SITE.search(code):
                found.append((path.name, number, SITE.search(code)[0]))
    return found


def skip_fault(file: str, line: int, what: str) -> tuple[str, bool]:
    return f"{file}:{line} without {what}", run_tests(family_of(file), {"FASTCONV_SIMT_SKIP": f"{file}:{line}"})


def edit_fault(file: str, old: str, new: str, full: str = "") -> tuple[str, bool]:
    name = f"{file}: {' '.join(old.split())} -> {' '.join(new.split()) or 'nothing'}"
    with tempfile.TemporaryDirectory(prefix="fastconv-mutant-") as folder:
        # with the launch files beside the kernels: they include them by relative paths
        shutil.copytree(simt_lib.LAUNCH, Path(folder) / "cuda")
        copy = Path(folder) / "cuda" / "kernels"
        text = (copy / file).read_text()
        pattern = r"\s*".join(re.escape(word) for word in old.split())  # however clang-format breaks the line
        text, count = re.subn(pattern, lambda _: new, text, count=1)
        if not count:
            raise SystemExit(f"mutate.py is out of date: {file} no longer holds {old!r}")
        (copy / file).write_text(text)
        env = {"FASTCONV_SIMT_KERNELS": str(copy)} | ({} if full else {"FASTCONV_SIMT_QUICK": "1"})
        return name, run_tests(family_of(file), env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="run only the faults whose description holds one of these"
    )
    parser.add_argument("--no-baseline", action="store_true", help="do not first check that the unbroken kernels pass")
    args = parser.parse_args()
    work = [(skip_fault, s) for s in sites()] + [(edit_fault, e) for e in EDITS]
    work = [(f, a) for f, a in work if any(o in " ".join(map(str, a)) for o in args.only)]
    for family in sorted({family_of(a[0]) for _, a in work} if not args.no_baseline else ()):
        for env in ({}, {"FASTCONV_SIMT_QUICK": "1"}):
            if not run_tests(family, env):
                raise SystemExit(f"the {family} tests fail before any fault is made ({env})")
    caught, survivors = 0, []
    for fault, arguments in work:
        name, passed = fault(*arguments)
        caught += not passed
        print(("SURVIVED " if passed else "caught   ") + name, flush=True)
        if passed and name not in EQUIVALENT:
            survivors.append(name)
    print(
        f"{caught} of {len(work)} faults caught, {len(work) - caught - len(survivors)} known to be invisible, "
        f"{len(survivors)} survived"
    )
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
