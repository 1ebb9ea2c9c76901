"""The options of bench/train_cifar10.py, the recipes (sets of defaults), and the checks on both."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch

from .errors import UsageError
from .models import ACTIVATIONS, check_model

DEFAULTS = {
    "backend": "compare",
    "model": "resnet50",
    "stem": "imagenet",
    "pretrained": "no",
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "batch_size": 64,
    "epochs": None,  # 1, or as many as --max-steps needs
    "max_steps": None,
    "dataset": "auto",
    "data": "data",
    "log_every": 50,
}
RECIPES = {
    # The script that this project grew from, and PyTorch's CIFAR-10 tutorial with a torchvision model in it.
    "origin": {
        "backend": "stock",
        "dataset": "cifar10",
        "batch_size": 4,
        "lr": 0.001,
        "epochs": 2,
        "log_every": 2000,
        "pretrained": "preferred",  # random weights, said in the log and the report, where they cannot be fetched
    },
    # A first look in a minute or two on two CPU cores: short, and yet it learns (about 90% of the digits).
    "demo": {"lr": 0.005, "max_steps": 80, "log_every": 10},
}
# What must not change when a run is resumed: everything that the losses depend on.
BINDING = (
    *("backend", "model", "stem", "activation", "dropout", "image_size", "freeze_backbone"),
    *("optimizer", "lr", "momentum", "weight_decay", "loss", "label_smoothing"),
    *("batch_size", "precision", "dataset", "augment", "seed"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_cifar10.py",
        allow_abbrev=False,
        description="Trains a torchvision classifier on CIFAR-10: with stock PyTorch, fastconv, or both side by side.",
        epilog="On several GPUs or machines: torchrun --nproc-per-node=N bench/train_cifar10.py ...",
    )
    add = parser.add_argument
    add("--recipe", choices=RECIPES, help="a set of defaults; every option given beside it wins")
    add(
        "--backend",
        choices=("stock", "fastconv", "compare"),
        help="compare trains both, step by step (default)",
    )

    add("--model", metavar="NAME", help="any torchvision classifier (default resnet50)")
    add(
        "--stem",
        choices=("imagenet", "cifar"),
        help="cifar: 3x3 stride-1 conv1 and no max-pooling, for ResNets",
    )
    add(
        "--image-size",
        type=_whole(1),
        default=32,
        metavar="PIXELS",
        help="enlarge the 32x32 images on the device",
    )
    add(
        "--pretrained",
        action="store_const",
        const="required",
        help="start from torchvision's ImageNet weights; it is an error if they cannot be fetched",
    )
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="start from a local state_dict (10 classes, or ImageNet's 1000)",
    )
    add(
        "--freeze-backbone",
        action="store_true",
        help="transfer learning: train the head alone (BatchNorm's running statistics go on adapting)",
    )
    add("--activation", choices=ACTIVATIONS, help="replaces the model's ReLU layers")
    add(
        "--dropout",
        type=_real(0, 1),
        metavar="RATE",
        help="dropout before the head (default: as the model has it)",
    )

    add("--optimizer", choices=("sgd", "adam", "adagrad"))
    add("--lr", type=_real(0, low_open=True), metavar="RATE", help="learning rate, constant")
    add("--momentum", type=_real(0, 1), help="sgd only (default 0.9)")
    add("--weight-decay", type=_real(0), metavar="RATE")
    add(
        "--loss",
        choices=("cross_entropy", "mse", "kl"),
        default="cross_entropy",
        help="mse, kl: against one-hot codes",
    )
    add("--label-smoothing", type=_real(0, 1), default=0.0, metavar="SHARE")
    add("--epochs", type=_whole(1))
    add("--max-steps", type=_whole(1), metavar="N", help="stop after N steps at the latest")
    add("--batch-size", type=_whole(1), metavar="N", help="images per step and process")
    add("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32", help="bf16, fp16: autocast")
    add("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    add("--seed", type=_whole(0), default=0, metavar="N")

    add(
        "--dataset",
        choices=("cifar10", "digits", "synthetic", "auto"),
        help="auto: CIFAR-10 if to be had, else digits",
    )
    add("--data", type=Path, metavar="DIR", help="where CIFAR-10 lies or is downloaded to (default ./data)")
    add("--no-download", action="store_true", help="use no network for the data set")
    add(
        "--loader",
        choices=("device", "torch"),
        default="device",
        help="images on the device, or a DataLoader",
    )
    add(
        "--augment",
        action="store_true",
        help="random crops, and flips where a mirrored image keeps its class",
    )

    add(
        "--report",
        type=Path,
        default=Path("out/train"),
        metavar="DIR",
        help="report and checkpoint (default out/train)",
    )
    add("--resume", action="store_true", help="go on from checkpoint.pt in the report directory")
    add("--checkpoint-every", type=_whole(0), default=500, metavar="N", help="steps; 0: at the end only")
    add("--log-every", type=_whole(1), metavar="N", help="steps between two lines of the log")
    add("--tensorboard", action="store_true", help="write event files to DIR/tensorboard")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked settings. Exits with code 2 and a message for an argument that cannot be used."""
    parser = build_parser()
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe.add_argument("--recipe")
    name = recipe.parse_known_args(argv)[0].recipe
    parser.set_defaults(**{**DEFAULTS, **RECIPES.get(name, {})})
    args = parser.parse_args(argv)
    try:
        _check(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    check_model(args.model)
    args.device = _device(args.device)
    if args.precision == "tf32" and args.device.type != "cuda":
        raise UsageError("--precision tf32 is a format of NVIDIA GPUs; on the CPU take fp32 or bf16")
    if args.weights is not None:
        if args.pretrained == "required":
            raise UsageError("--weights and --pretrained exclude each other")
        if not args.weights.is_file():
            raise UsageError(f"--weights {args.weights}: there is no such file")
        args.pretrained = "no"
    args.data = Path(args.data)
    if args.data != Path(DEFAULTS["data"]) and not args.data.is_dir():
        raise UsageError(f"--data {args.data}: there is no such directory")
    if args.optimizer != "sgd":
        args.momentum = None
    if args.epochs is None and args.max_steps is None:
        args.epochs = 1
    try:
        args.report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--report {args.report}: cannot be made: {error.strerror}") from error
    if not os.access(args.report, os.W_OK):
        raise UsageError(f"--report {args.report}: cannot be written to")
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UsageError("--tensorboard needs the tensorboard package: pip install tensorboard") from error


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs here"
        )
    return device


def total_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    limits = []
    if args.epochs is not None:
        limits.append(args.epochs * steps_per_epoch)
    if args.max_steps is not None:
        limits.append(args.max_steps)
    return min(limits)


def _whole(low: int):
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return read


def _real(low: float, high: float = math.inf, low_open: bool = False):
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (low <= value < high) or (low_open and value == low):
            bounds = f"{'more than' if low_open else 'at least'} {low}"
            bounds += "" if math.isinf(high) else f" and below {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return read
