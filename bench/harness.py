"""Times competitors against each other: correctness first, then interleaved rounds, then rows, a table and a file.

One round calls every competitor once, in an order that rotates. On a GPU each call lies between two events, behind a
write that empties the L2 cache, and nothing waits for the GPU until the round's end. On a CPU only rounds during which
other programs took less than `BUSY` of the cores count, as long as enough are left; a row says how many rounds it has
and whether they were quiet. Inputs are random: zeros take less power and less time.

The floor of a row is the larger of FLOPs over the machine's matrix rate and least bytes over its copy rate, both
measured in the same process (bench/machine.py). An operation whose tensors stay in a cache can pass it.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import machine
import torch
from torch import Tensor

BUSY = 0.10
LEAST_ROUNDS = 7
L2_BYTES = 128 << 20  # more than any GPU's L2 (50 MB on an H100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = ("fastconv", "triton", "cuda", "plan")  # a competitor whose name begins so is not a peer


@dataclass
class Case:
    """One operation on one shape: what it must do at least, and who does it."""

    op: str
    shape: str
    dtype: str
    flops: float
    bytes: float
    competitors: dict[str, Callable[[], object]]
    # competitor -> largest error against the oracle, relative to its largest value; filled in by check()
    errors: dict[str, float] = field(default_factory=dict)
    count: int = 1  # how often the shape occurs in its network

    def check(
        self, oracle: Tensor, result: Callable[[object], Tensor] = lambda out: out, limit: float | None = None
    ) -> None:
        """Fills in `errors`; a competitor that is off by more than its dtype excuses is an error, not a row.

        limit: of the error relative to the largest value; default: what one operation may lose in its dtype.
        """
        scale = float(oracle.abs().max()) or 1.0
        if limit is None:
            limit = 0.05 if self.dtype in ("bf16", "fp16") else 2e-3
        for name, run in self.competitors.items():
            error = float((result(run()).double() - oracle).abs().max()) / scale
            if not error <= limit:
                raise AssertionError(f"{self.op} {self.shape} {self.dtype}: {name} is off by {error:.3g}")
            self.errors[name] = error


@dataclass
class Row:
    op: str
    shape: str
    dtype: str
    competitor: str
    us: float
    p20: float
    p80: float
    tflops: float
    gb_s: float
    floor_share: float
    best_peer: str
    speedup: float  # the best peer's time over this one's
    error: float | None
    rounds: int
    quiet: bool
    count: int


def keep_freed_memory() -> None:
    """glibc's malloc hands a freed tensor's pages back and takes them again, a page fault for every 4 KiB: up to two
    thirds of a small operation's time, and for whichever competitor comes next. This keeps them (mallopt(3))."""
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((trim_threshold, 2**31 - 1), (mmap_threshold, 2**25), (top_pad, 2**28)):
            libc.mallopt(option, value)


class Bench:
    """The sampling of one process: a device, its rates, and the rows so far, which are on the disk after every case."""

    def __init__(self, subject: str, out: Path, device: torch.device, seconds: float = 1.0, turn: int = 0) -> None:
        """out: the folder of the results. turn: see :func:`interleave`."""
        self.subject, self.out, self.device, self.seconds, self.turn = subject, out, device, seconds, turn
        keep_freed_memory()
        self.environment = machine.environment(device)
        self.rows: list[Row] = []
        self._flush = torch.empty(L2_BYTES // 4, device=device) if device.type == "cuda" else None

    def run(self, case: Case) -> list[Row]:
        """Times the case's competitors, appends their rows and saves them all."""
        rounds, quiet = interleave(case.competitors, self.device, self.seconds, self._flush, turn=self.turn)
        floor = max(self._seconds_of(case.flops, case.dtype), case.bytes / self.environment["rates"]["copy"] / 1e9)
        medians = {name: _quantile([r[name] for r in rounds], 0.5) for name in case.competitors}
        peers = {name: t for name, t in medians.items() if not name.startswith(OURS)} or medians
        best = min(peers, key=peers.get)
        rows = []
        for name, middle in medians.items():
            low, high = (_quantile([r[name] for r in rounds], q) for q in (0.2, 0.8))
            rows.append(
                Row(
                    case.op, case.shape, case.dtype, name, middle * 1e6, low * 1e6, high * 1e6,
                    case.flops / middle / 1e12, case.bytes / middle / 1e9, floor / middle, best, peers[best] / middle,
                    case.errors.get(name), len(rounds), quiet, case.count,
                )
            )  # fmt: skip
        self.rows += rows
        self._save()
        for row in rows:
            print(line(row), flush=True)
        return rows

    def _seconds_of(self, flops: float, dtype: str) -> float:
        known = self.environment["rates"]
        return flops / known.get(dtype, known["fp32"]) / 1e12

    def _save(self) -> None:
        """OUT/<subject>.json (with the environment) and OUT/<subject>.csv."""
        rows = [vars(row) for row in self.rows]
        save_rows(self.out, self.subject, self.environment, rows)
        with io.StringIO(newline="") as text:
            writer = csv.DictWriter(text, rows[0])
            writer.writeheader()
            writer.writerows(rows)
            _replace(self.out / f"{self.subject}.csv", text.getvalue())


def save_rows(out: Path, subject: str, environment: dict, rows: list[dict]) -> None:
    """OUT/<subject>.json, as bench/page.py reads it; a row is a line, for Python indents slowly."""
    out.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"subject": subject, "environment": environment}, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    _replace(out / f"{subject}.json", f'{head},\n "rows": [\n{lines}\n ]\n}}\n')


def _replace(path: Path, text: str) -> None:
    """At once: a process that is out of time and killed leaves the file of before or this one, never half of it."""
    with path.with_name(path.name + ".part").open("w", newline="") as file:
        file.write(text)
    os.replace(file.name, path)


def add_if_it_runs(found: dict[str, Callable], name: str, make: Callable[[], Callable], where: str) -> None:
    """Adds the peer that ``make()`` gives, unless making or running it raises: a library that has no kernel for a case
    is no competitor in it, and no reason to lose the other rows. Three calls: torch.jit compiles in the second."""
    try:
        run = make()
        for _ in range(3):
            run()
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"{where}: left out of this case: {name}: {reason[:100]}", flush=True)
    else:
        found[name] = run


def interleave(
    competitors: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 1.0,
    flush: Tensor | None = None,
    most_rounds: int = 1000,
    turn: int = 0,
) -> tuple[list[dict[str, float]], bool]:
    """Rounds of seconds per call by competitor, and whether the machine was quiet during them.

    seconds: about how long the rounds may take in all; at least LEAST_ROUNDS are taken. On a CPU a second helping of
    the same length is taken where too few rounds were quiet.

    turn: on a CPU, calls that a competitor makes in a row, after one that is not timed. For whole networks: each has
    the machine to itself while it trains or serves, and would pay here for weights that the others have pushed out of
    the caches. 0: one timed call in turn, whatever it finds in the caches.
    """
    for run in competitors.values():
        for _ in range(3):
            run()
    names = list(competitors)
    rounds: list[tuple[dict[str, float], bool]] = []
    others = machine.Others()
    for _helping in range(2):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rounds) < LEAST_ROUNDS:
            window_end, window = time.perf_counter() + 0.25, []
            while not window or (time.perf_counter() < window_end and len(rounds) + len(window) < most_rounds):
                first = (len(rounds) + len(window)) % len(names)
                order = names[first:] + names[:first]
                window.append(_one_round({name: competitors[name] for name in order}, device, flush, turn))
            quiet = device.type == "cuda" or others.share() < BUSY
            rounds += [(sample, quiet) for sample in window]
            if len(rounds) >= most_rounds:
                break
        good = [sample for sample, quiet in rounds if quiet]
        if len(good) >= LEAST_ROUNDS:
            return good, True
    return [sample for sample, _ in rounds], False


def _one_round(
    runs: dict[str, Callable[[], object]], device: torch.device, flush: Tensor | None, turn: int
) -> dict[str, float]:
    if device.type != "cuda":
        sample = {}
        for name, run in runs.items():
            if turn:
                run()
            begin = time.perf_counter()
            for _ in range(max(turn, 1)):
                run()
            sample[name] = (time.perf_counter() - begin) / max(turn, 1)
        return sample
    events = {}
    for name, run in runs.items():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush.zero_()
        start.record()
        run()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def line(row: Row) -> str:
    noise = "" if row.quiet else "  (busy machine)"
    return (
        f"{row.op:26} {row.shape:30} {row.dtype:5} {row.competitor:20} {row.us:10.1f} us {row.tflops:7.3f} TFLOP/s "
        f"{row.gb_s:7.1f} GB/s {row.floor_share:5.2f} of floor {row.speedup:5.2f} x {row.best_peer}{noise}"
    )


def geomean(values: Iterable[float]) -> float:
    values = list(values)
    product = torch.tensor(values, dtype=torch.float64).log().mean().exp()
    return float(product) if values else float("nan")


# The option of whole networks: torch.compile's modes, each a peer.
COMPILE = {
    "nargs": "*",
    "metavar": "MODE",
    "choices": ("default", "reduce-overhead", "max-autotune"),
    "help": "torch.compile as a peer, in each of these modes (none named: default); minutes of compiling",
}


def of_models(subject: str, models: list[str], size: int = 32) -> str:
    """The subject's name by the networks that it was run on: other ones than ResNet50, and other images than of 32 px,
    lie beside its file, not in it."""
    if size != 32:
        return f"{subject}_{size}px"
    return subject if models == ["resnet50"] else f"{subject}_models"


def modes(chosen: list[str] | None) -> list[str]:
    """The modes to measure of what `COMPILE` was given."""
    return [] if chosen is None else chosen or ["default"]


def compiled_name(mode: str, what: str) -> str:
    """The competitor's name: "torch.compile nhwc", "torch.compile max-autotune nhwc"."""
    return " ".join(["torch.compile", *([] if mode == "default" else [mode]), what])


def arguments(description: str, **more) -> argparse.Namespace:
    """--device --out --seconds --dtype --quick: the same for every subject."""
    parser = argparse.ArgumentParser(description=description)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, type=torch.device)
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results/<device>")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long one case may be sampled (default 1)")
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=None, help="default: all that this device is for")
    parser.add_argument("--quick", action="store_true", help="a few shapes only: does the script work?")
    for name, settings in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **settings)
    args = parser.parse_args()
    if args.out is None:
        args.out = Path(__file__).parent / "results" / machine.slug(args.device)
    if args.dtype is None:
        args.dtype = machine.dtypes(args.device)
    torch.manual_seed(0)
    return args
