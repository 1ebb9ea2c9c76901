"""Runs every subject that this machine can run, then redraws the pictures and the results page.

    python bench/all.py [--out DIR] [--device cuda] [--quick] [--only conv pooling] [--dtype bf16] [--minutes 15]

Each subject is a process of its own: a fresh allocator, fresh rates of the machine. What one leaves of its time goes to
those after it, in the order of --only. A subject that fails or runs out of time is named at the end, its rows so far
are on the page, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import machine
import page
import torch
from harness import DTYPES

BENCH = Path(__file__).parent
LEAST = 25  # seconds of a subject where there are so many: ten go by before its first row, for imports and the rates
# subject -> its arguments and its share of the time; a script that is not there is an error, not a silence
SUBJECTS = {
    "conv": (["--seconds", "0.3"], 0.30),
    "batch_norm": (["--seconds", "0.3"], 0.10),
    "pooling": (["--seconds", "0.3"], 0.05),
    "cross_entropy": (["--seconds", "0.3"], 0.05),
    "memory": ([], 0.05),
    "train_step": ([], 0.25),
    "inference": ([], 0.20),
}


def limit_of(subject: str, after: list[str], seconds: float) -> float:
    """Seconds for a subject with others after it: its share of what is left, but LEAST at least for each of them."""
    share = {name: SUBJECTS[name][1] for name in (subject, *after)}
    least = min(LEAST, seconds / len(share))
    while True:
        total = sum(share.values())
        short = [name for name in share if seconds * share[name] < least * total]
        if subject in short:
            return least
        if not short:
            return seconds * share[subject] / total
        seconds -= least * len(short)
        share = {name: part for name, part in share.items() if name not in short}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, type=torch.device)
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--only", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, help="default: all that this device is for")
    parser.add_argument("--quick", action="store_true", help="a few shapes of each subject")
    parser.add_argument("--minutes", type=float, default=15.0, help="for all subjects together (default 15)")
    args = parser.parse_args()
    out = args.out or BENCH / "results" / machine.slug(args.device)

    failed, end = [], time.perf_counter() + 60 * args.minutes
    for i, subject in enumerate(args.only):
        command = [sys.executable, str(BENCH / f"{subject}.py"), "--device", str(args.device), "--out", str(out)]
        command += [*SUBJECTS[subject][0], *(["--quick"] if args.quick else [])]
        command += ["--dtype", *args.dtype] if args.dtype else []
        begin = time.perf_counter()
        limit = limit_of(subject, args.only[i + 1 :], max(end - begin, 1.0))
        print(f"== {subject} (at most {limit:.0f} s)", flush=True)
        try:
            status = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        if status != 0:
            failed.append(f"{subject} ({status})")
        print(f"== {subject}: {time.perf_counter() - begin:.0f} s", flush=True)
    page.write(out)
    print(f"{out}/README.md")
    if failed:
        print("failed: " + ", ".join(failed))
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
