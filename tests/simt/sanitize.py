"""Runs the kernels under sanitizers, in the emulator.

    python tests/simt/sanitize.py asan [--part I/N] [pytest arguments]   the tests under AddressSanitizer + UBSan
    python tests/simt/sanitize.py build                                   only compiles what they need
    python tests/simt/sanitize.py tsan                                    race.cpp under ThreadSanitizer

--part I/N: every N-th test, from the I-th. A tenth takes 10 to 20 seconds once the libraries are built (four minutes).

asan: every global access of a kernel is checked against the torch tensors it was given, every shared access against the
block's own buffer; the sanitizer's runtime has to come first in the process, hence the preload. tsan: each GPU thread
is a fiber known to the tool, and only barriers order memory, so that a missing one is a data race even where the values
come out right; a program of its own, since torch under ThreadSanitizer is too slow.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import simt_lib

HERE = Path(__file__).resolve().parent
RUNTIMES = ["libasan.so", "libubsan.so"]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def runtime(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def chosen(arguments: list[str], part: str) -> list[str]:
    """The tests of one part, by name."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "--collect-only"]
    text = subprocess.run([*command, *arguments], cwd=simt_lib.ROOT, capture_output=True, text=True, check=True).stdout
    first, step = map(int, part.split("/"))
    return [line for line in text.splitlines() if "::" in line][first - 1 :: step]


def asan(arguments: list[str]) -> int:
    env = dict(os.environ, FASTCONV_SIMT_SANITIZE="asan", LD_PRELOAD=" ".join(map(runtime, RUNTIMES)), **OPTIONS)
    part = ""
    if arguments[:1] == ["--part"]:
        part, arguments = arguments[1], arguments[2:]
    tests = arguments or [str(p) for p in sorted(HERE.glob("test_simt_*.py")) if p.stem != "test_simt_resources"]
    tests = chosen(tests, part) if part else tests
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    return subprocess.run([*command, *tests], cwd=simt_lib.ROOT, env=env).returncode


def build() -> int:
    for family in ("conv", "norm", "pool", "loss", "update", "emulator"):
        print(simt_lib.build(family, "asan").name, flush=True)
    return 0


def tsan() -> int:
    """0 if no race is found in the kernels as they are, and one is found once a barrier is left out."""
    with tempfile.TemporaryDirectory(prefix="fastconv-tsan-") as folder:
        program = Path(folder) / "race"
        command = [
            "g++",
            "-std=c++17",
            *simt_lib.SANITIZE["tsan"],
            *simt_lib.cpu_flags(),
            "-DFASTCONV_SIMT",
            "-DFASTCONV_SIMT_DTYPES=4",
        ]
        command += [
            f"-I{simt_lib.KERNELS}",
            f"-I{simt_lib.LAUNCH}",
            f"-I{HERE}",
            f"-isystem{simt_lib.cuda_include()}",
            str(HERE / "race.cpp"),
        ]
        subprocess.run([*command, "-o", str(program)], check=True)
        env = dict(os.environ, TSAN_OPTIONS="halt_on_error=1:exitcode=66:report_thread_leaks=0")
        clean = subprocess.run([str(program)], env=env)
        lines = (simt_lib.KERNELS / "conv_gemm.cuh").read_text().splitlines()
        site = next(i for i, line in enumerate(lines, 1) if "tile kt is there for all" in line)
        broken = subprocess.run(
            [str(program)], env=dict(env, FASTCONV_SIMT_SKIP=f"conv_gemm.cuh:{site}"), capture_output=True, text=True
        )
    seen = broken.returncode == 66 and "data race" in broken.stderr
    print(
        f"tsan: as written {'no race' if clean.returncode == 0 else 'FAILED'}; "
        f"without conv_gemm.cuh:{site} {'a data race' if seen else 'NOTHING SEEN'}"
    )
    return int(clean.returncode != 0 or not seen)


def main() -> None:
    if sys.argv[1:2] == ["asan"]:
        raise SystemExit(asan(sys.argv[2:]))
    if sys.argv[1:] == ["build"]:
        raise SystemExit(build())
    if sys.argv[1:] == ["tsan"]:
        raise SystemExit(tsan())
    raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
