"""The same ResNet50 trained from several seeds, stock and fastconv: do they end at the same loss and accuracy?

Per seed one run of bench/train_cifar10.py, which trains both on the same batches from the same weights. A whole network
in bf16 amplifies rounding from its first step, so single losses drift apart (two stock runs with other kernels do too);
what training must keep is where it ends. The end of a run is the mean loss of its last tenth of the steps.

    python bench/seeds.py --dtype bf16 --seeds 5
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import machine
from harness import arguments, save_rows
from training.compare import end_loss

SCRIPT = Path(__file__).parent / "train_cifar10.py"
BACKENDS = ("stock", "fastconv")


def train(seed: int, dtype: str, batch: int, steps: int, device: str) -> dict:
    """The row of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(SCRIPT), "--recipe", "demo", "--backend", "compare", "--precision", dtype, "--seed",
            str(seed), "--batch-size", str(batch), "--epochs", "1000", "--max-steps", str(steps), "--device", device,
            "--no-download", "--log-every", str(steps), "--report", folder,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "report.json").read_text())
    row = {"seed": seed, "dtype": dtype, "batch": batch, "steps": report["steps"], "data": report["dataset"]["name"]}
    for who in BACKENDS:
        found = report["backends"][who]
        row[who] = {
            "first_loss": found["losses"][0],
            "end_loss": end_loss(found["losses"]),
            "accuracy": found["accuracy"],
        }
    return row


def main() -> None:
    args = arguments(
        __doc__.split("\n")[0],
        seeds={"type": int, "default": 5},
        batch={"type": int, "default": 64},
        steps={"type": int, "default": 180},
    )
    environment, rows = machine.facts(args.device), []
    for dtype in args.dtype:
        for seed in range(1 if args.quick else args.seeds):
            rows.append(train(seed, dtype, args.batch, 10 if args.quick else args.steps, args.device.type))
            ends = ", ".join(
                f"{who} {rows[-1][who]['end_loss']:.4f} ({rows[-1][who]['accuracy']:.1%})" for who in BACKENDS
            )
            print(f"{dtype} seed {seed}: mean loss at the end (test accuracy): {ends}", flush=True)
    save_rows(args.out, "seeds", environment, rows)


if __name__ == "__main__":
    main()
