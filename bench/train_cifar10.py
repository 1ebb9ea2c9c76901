"""Trains a torchvision classifier on CIFAR-10: with stock PyTorch, with fastconv, or with both side by side.

    python bench/train_cifar10.py --recipe demo                         # both, a few minutes on two CPU cores
    python bench/train_cifar10.py --recipe origin                       # ResNet50, batch 4, SGD: where it all began
    python bench/train_cifar10.py --backend fastconv --epochs 30 --batch-size 512 --precision bf16 --augment
    torchrun --nproc-per-node=8 bench/train_cifar10.py --backend fastconv --epochs 30

Writes report.md, report.json, loss.png, throughput.png and checkpoint.pt into the --report directory. Exit codes:
0 done, 1 stopped with a message, 2 an argument that cannot be used, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import copy
import sys
import time

import torch
from training import checkpoint, report
from training.data import Batches, load_dataset
from training.distributed import joined, local_device
from training.errors import ProgramError
from training.loop import Loop, evaluate
from training.models import build_model
from training.settings import parse
from training.trainee import Trainee, set_precision


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        args.device = local_device(args.device)
        with joined(args.device) as ranks:
            train(args, ranks)
        return 0
    except ProgramError as error:
        print(f"{'stopped' if error.exit_code > 2 else 'error'}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except torch.OutOfMemoryError as error:
        print(f"error: the GPU's memory is full, take a smaller --batch-size: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        kept = args.report / "checkpoint.pt"
        state = f"the last checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
        print(f"\nstopped by SIGINT; {state}", file=sys.stderr, flush=True)
        return 130


def train(args, ranks) -> None:
    start = time.perf_counter()
    notes: list[str] = []

    def log(text: str) -> None:
        if ranks.main:
            print(text, flush=True)
        if text.startswith("note: "):
            notes.append(text.removeprefix("note: "))

    set_precision(args.precision)
    with ranks.main_first():  # one process downloads, the others find it done
        dataset = load_dataset(args.dataset, args.data, ranks.main and not args.no_download, log)
    log(
        f"data: {dataset.name}, {len(dataset.train):,} training and {len(dataset.test):,} test images; {dataset.origin}"
    )

    batches = Batches(dataset.train, dataset.mirrors, args, args.device, ranks.rank, ranks.count)
    common = {"settings": checkpoint.binding_settings(args, dataset.name), "data": dataset.fingerprint()}
    saved = None
    if args.resume:
        saved = checkpoint.load(args.report / "checkpoint.pt")
        checkpoint.check_fits(args.report / "checkpoint.pt", saved, args, dataset, ranks)
        args.pretrained, args.weights = "no", None  # all weights come from the checkpoint
        epoch, step = saved["epoch"] + 1, saved["step_in_epoch"]
        log(f"resuming from {args.report / 'checkpoint.pt'} at epoch {epoch} step {step}")

    torch.manual_seed(args.seed)
    with ranks.main_first():
        model, weights = build_model(args, len(dataset.classes), log)
    common["weights"] = weights = saved["weights"] if saved else weights
    names = ("stock", "fastconv") if args.backend == "compare" else (args.backend,)
    models = [model if name == names[-1] else copy.deepcopy(model) for name in names]
    trainees = [
        Trainee(name, own, args, ranks, saved and saved["trainees"][name], batches.make)
        for name, own in zip(names, models, strict=True)
    ]
    log(f"model: {args.model} with weights {weights}; {' and '.join(names)} on {args.device}, {args.precision}")
    if "fastconv" in names and trainees[-1].fusion is not None:
        log(f"fastconv: {trainees[-1].fusion.fused} groups of layers fused")

    loop = Loop(trainees, batches, args, ranks, common, _tensorboard(args, ranks, saved))
    loop.run()
    for trainee in trainees:
        trainee.accuracy = evaluate(trainee, dataset.test, args, ranks, loop.stop)
        who = "the network" if len(names) == 1 else f"the {trainee.name} network"
        log(f"Accuracy of {who} on the {len(dataset.test)} test images: {100 * trainee.accuracy:.2f} %")
        if loop.tensorboard is not None:
            loop.tensorboard.add_scalar(f"accuracy/{trainee.name}", trainee.accuracy, loop.step)
            loop.tensorboard.flush()
    if ranks.main:
        facts = report.collect(args, dataset, trainees, weights, notes, ranks, time.perf_counter() - start)
        paths = report.write(args.report, facts, trainees, batches.global_batch)
        summary(facts, paths, loop.path)


def summary(facts: dict, paths: list, checkpoint_path) -> None:
    print()
    for name, one in facts["backends"].items():
        ms = one["ms_per_step"]
        spread = f"p20 {ms['p20']:.2f}, p80 {ms['p80']:.2f}"
        print(f"{name:>9}: {ms['median']:.2f} ms per step ({spread}), {ms['images_per_second']:,.0f} images/s")
    if "comparison" in facts:
        print(facts["comparison"]["verdict"], facts["comparison"]["accuracy"], sep="\n")
    print("report:", *paths)
    print("checkpoint:", checkpoint_path, flush=True)


def _tensorboard(args, ranks, saved):
    if not (args.tensorboard and ranks.main):
        return None
    from torch.utils.tensorboard import SummaryWriter

    # steps that a killed run wrote after its last checkpoint are dropped, not shown twice
    return SummaryWriter(str(args.report / "tensorboard"), purge_step=saved["step"] + 1 if saved else None)


if __name__ == "__main__":
    sys.exit(main())
