"""Proves the net: breaks the kernels on purpose, one fault at a time, and expects the emulator's tests to turn red.

    python tests/simt/mutate.py [--only SUBSTRING ...] [--minutes M] [--part I/N] [--again] [--write]

Two kinds of fault. Every barrier, warp barrier, cp.async wait and commit of the kernels is skipped in turn, at run
time (FASTCONV_SIMT_SKIP, no rebuild). Then the edits of edits.py, each in a copy of the kernels: a dropped bound, a wrong
swizzle, ...
Verdicts are kept in build/simt by the content of the kernels and tests that they were made with, so that a run which
stops (--minutes) is taken up by the next one, and parts (--part 1/2, 2/2) can run side by side.
Prints one line per fault and the score; exits 1 if a fault survives that is not listed, with its reason, in EQUIVALENT,
3 where faults are left for another run. --write: mutation.md, with what is judged so far.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

import pytest
import simt_lib
import torch
from edits import EDITS, EQUIVALENT

FAMILY_OF = {
    "act_backward": "norm",
    "batch_norm": "norm",
    "batch_norm_backward": "norm",
    "batch_norm_fold": "norm",
    "norm": "norm",  # csrc/cuda/norm.cu and its neighbours
    "column_tile": "norm",
    "pool": "pool",
    "cross_entropy": "loss",
    "cross_entropy_backward": "loss",
    "loss": "loss",
    "update": "update",
}  # everything else: conv
# CPU seconds for one family's tests, which take less than a minute and a half: a fault may hang them. Not of the clock,
# which on a busy machine would call a slow build red; the compiler's time does not count.
TIMEOUT = 240
torch.set_num_threads(1)  # a fork must not inherit a pool of threads
SITE = re.compile(r"__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^>]*>\(\)|cp_async_commit\(\)")


def family_of(file: str) -> str:
    return FAMILY_OF.get(Path(file).stem, "conv")


def fork_tests(family: str, env: dict[str, str], output: IO[str]) -> tuple[int, str]:
    """Runs the family's tests in a fork, so that torch is imported once; returns exit status and output."""
    child = os.fork()
    if child == 0:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.update(env)
        signal.setitimer(signal.ITIMER_PROF, TIMEOUT)  # a fault may hang the kernel: the signal's death is red too
        for name in ("simt_lib", "simt_conv", "simt_norm"):  # they read the environment when imported
            sys.modules.pop(name, None)
        code = 3
        try:
            options = ["-x", "-q", "-p", "no:cacheprovider", "--noconftest", "--no-header", "--tb=line"]
            files = map(str, sorted(simt_lib.HERE.glob(f"test_simt_{family}*.py")))
            code = int(pytest.main([*options, *files]))
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


class Fault(NamedTuple):
    """One fault: its description, the tests that look for it, and the edit (old, new), or none for a site skipped."""

    name: str
    family: str
    file: str
    skip: str = ""
    old: str = ""
    new: str = ""
    full: bool = False

    def survives(self) -> bool:
        if self.skip:
            return run_tests(self.family, {"FASTCONV_SIMT_SKIP": self.skip})
        with tempfile.TemporaryDirectory(prefix="fastconv-mutant-") as folder:
            # with the launch files beside the kernels: they include them by relative paths
            shutil.copytree(simt_lib.LAUNCH, Path(folder) / "cuda")
            kernels = Path(folder) / "cuda" / "kernels"
            (kernels / self.file).write_text(self.edited((kernels / self.file).read_text()))
            env = {"FASTCONV_SIMT_KERNELS": str(kernels)} | ({} if self.full else {"FASTCONV_SIMT_QUICK": "1"})
            return run_tests(self.family, env)

    def edited(self, text: str) -> str:
        pattern = r"\s*".join(re.escape(word) for word in self.old.split())  # however clang-format breaks the line
        text, count = re.subn(pattern, lambda _: self.new, text, count=1)
        if not count:
            raise SystemExit(f"edits.py is out of date: {self.file} no longer holds {self.old!r}")
        return text


def faults() -> list[Fault]:
    """All of them; raises SystemExit where an edit no longer fits its file."""
    found = []
    for file, line, what in sites():
        place = f"{file}:{line}"
        found.append(Fault(f"{place} without {what}", family_of(file), file, skip=place))
    for file, old, new, *how in EDITS:
        name = f"{file}: {' '.join(old.split())} -> {' '.join(new.split()) or 'nothing'}"
        full = how == ["full"]
        found.append(Fault(name, family_of(file) if full or not how else how[0], file, "", old, new, full))
        found[-1].edited((simt_lib.KERNELS / file).read_text())
    return found


class Verdicts:
    """What was judged so far with these very kernels and this emulator: one line of JSON each, appended by any process.

    The tests are left out of the key, so that a new one does not undo what the others have caught: --again judges those
    that survived. Where tests were taken away or loosened, the file has to go.
    """

    def __init__(self) -> None:
        digest = hashlib.sha256()
        files = [p for p in simt_lib.LAUNCH.rglob("*") if p.suffix in (".cuh", ".h", ".cu")]
        files += [p for p in simt_lib.HERE.glob("*.*") if p.suffix in (".h", ".cuh") or p.name.startswith("driver_")]
        # conv2d_config.h picks tiles: no test of a kernel asks it.
        for path in sorted(p for p in files if p.name != "conv2d_config.h"):
            digest.update(path.read_bytes())
        self.path = simt_lib.BUILD / f"mutation-{digest.hexdigest()[:16]}.jsonl"

    def read(self) -> dict[str, bool]:
        """name -> whether it survived (a baseline: whether the tests passed)."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return dict(json.loads(line) for line in lines)

    def add(self, name: str, survived: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps([name, survived]) + "\n")


def check_baseline(families: set[str], verdicts: Verdicts, until: float) -> bool:
    """Whether the unbroken kernels have passed; False where the time is over. SystemExit where they fail."""
    for family in sorted(families):
        for env in ({}, {"FASTCONV_SIMT_QUICK": "1"}):
            name = f"unbroken {family}{' quick' if env else ''}"
            if name in verdicts.read():
                continue
            if time.monotonic() > until:
                return False
            if not run_tests(family, env):
                raise SystemExit(f"the {family} tests fail before any fault is made ({env})")
            verdicts.add(name, True)
    return True


HISTORY = """\
Three barriers and waits that survived the first run proved to be needless, and so did one bound that no tile could reach:
they are gone from the kernels. Gaps that became tests: NaN behind a partial k-tile, reads past the end of an operand (guard
pages), stride and dilation with a common factor, a window that leaves the padded image, channels that fit 16 bytes on one
side only, odd sides under a strided data gradient, a workspace that is not needed, unaligned depthwise operands, rounding
between layers in the depthwise prologue, means and logits far from zero, rows of infinite logits, parameters and running
statistics of different dtypes, the folded batch norm, a data gradient's sums in batch norm's backward, more chunks than a
merge has slices, empty tiles of stride classes, writes past a vector of channels, a slope from the input without weight,
the second of a lane's columns.
"""


def page(all_faults: list[Fault], judged: dict[str, bool]) -> str:
    """mutation.md."""
    rows = []
    for title, kind in (
        ("barrier, warp barrier, cp.async wait or commit left out", [f for f in all_faults if f.skip]),
        ("edits of the kernels", [f for f in all_faults if not f.skip and not f.file.startswith("../")]),
        ("edits of the launches (csrc/cuda/*.cu, *.cuh)", [f for f in all_faults if f.file.startswith("../")]),
    ):
        done = [f for f in kind if f.name in judged]
        survived = [f for f in done if judged[f.name]]
        invisible = [f for f in survived if f.name in EQUIVALENT]
        counts = len(done) - len(survived), len(invisible), len(survived) - len(invisible), len(kind) - len(done)
        rows.append(f"| {title} | {len(kind)} | {' | '.join(map(str, counts))} |")
    head = ["| faults | listed | caught | invisible by nature | survived | not judged |"]
    head += ["| --- " * 6 + "|"]
    seen = [f"- `{name}`: {why}" for name, why in EQUIVALENT.items() if judged.get(name)]
    return "\n".join(
        [
            "# Mutation score",
            "",
            "Written by `python tests/simt/mutate.py --write`: faults made in the kernels and their launches on purpose, and",
            "whether the emulator's tests turned red.",
            "",
            *head,
            *rows,
            "",
            "Invisible by nature:",
            "",
            *seen,
            "",
            HISTORY,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="run only the faults whose description holds one of these"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fault after so many minutes")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th fault, from the I-th")
    parser.add_argument("--again", action="store_true", help="judge the survivors again")
    parser.add_argument("--write", action="store_true", help="write mutation.md from what is judged so far")
    args = parser.parse_args()
    until = time.monotonic() + args.minutes * 60
    everything, verdicts = faults(), Verdicts()
    first, step = map(int, args.part.split("/"))
    work = [f for f in everything if any(o in f.name for o in args.only)][first - 1 :: step]
    if check_baseline({f.family for f in work}, verdicts, until):
        for fault in work:
            known = verdicts.read().get(fault.name)
            if known is not None and not (known and args.again and fault.name not in EQUIVALENT):
                continue
            if time.monotonic() > until:
                break
            verdicts.add(fault.name, fault.survives())
            print(("SURVIVED " if verdicts.read()[fault.name] else "caught   ") + fault.name, flush=True)
    judged = verdicts.read()
    done = [f for f in work if f.name in judged]
    survivors = [f.name for f in done if judged[f.name] and f.name not in EQUIVALENT]
    caught = sum(not judged[f.name] for f in done)
    print(
        f"{caught} of {len(done)} faults caught, {len(done) - caught - len(survivors)} known to be invisible, "
        f"{len(survivors)} survived, {len(work) - len(done)} left"
    )
    for name in survivors:
        print("SURVIVED " + name)
    if args.write:
        (simt_lib.HERE / "mutation.md").write_text(page(everything, judged))
    sys.exit(1 if survivors else 3 * (len(done) < len(work)))


if __name__ == "__main__":
    main()
