"""python -m fastconv info: versions, device, how fastconv was built, and each backend with its availability.
python -m fastconv tune: measures the backends on the calls of a model, ahead of their first use.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

from . import _ext
from ._measured import cpu_model, store_of
from ._version import __version__
from .ops import backends


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> str:
    """The text of ``python -m fastconv info``, in the style of torch.utils.collect_env."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = [
        ("fastconv version", __version__),
        ("PyTorch version", torch.__version__),
        ("torchvision version", _version_of("torchvision")),
        ("Triton version", _version_of("triton")),
        ("Python version", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("OS", platform.platform()),
        ("CPU", f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("CUDA used to build PyTorch", torch.version.cuda or "none"),
        ("cuDNN version", torch.backends.cudnn.version() if torch.cuda.is_available() else "not in use"),
        ("GPU", ", ".join(gpus) if gpus else "none"),
    ]
    lines = [f"{name}: {value}" for name, value in rows]
    lines += ["", "Compiled extension:"]
    if _ext.HAS_EXT:
        lines += [f"  {name}: {value}" for name, value in sorted(_ext.build_info().items()) if value]
    else:
        lines.append(f"  {_ext.EXT_REASON}")
    lines += ["", "Backends:"]
    for name, state in backends().items():
        lines.append(f"  {name:<7} {'available    ' if state else 'not available'}  {state.reason}")
    store = store_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines += ["", f"Measurements: {len(store)} for this device and these versions in {store.path}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastconv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, device, build and backends")
    about.add_argument("--kernels", action="store_true", help="also every compiled CUDA kernel with its registers")
    _add_tune(commands.add_parser("tune", help="measure the backends on a model's calls, and keep the times"))
    options = parser.parse_args(argv)
    if options.command == "tune":
        from .tune import main as tune

        return tune(options)
    print(info())
    if options.kernels:
        from ._kernels import kernels, table

        try:
            print(f"\nCUDA kernels:\n{table(kernels())}")
        except RuntimeError as error:
            print(f"\nCUDA kernels: {error}")
            return 1
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", help="a classifier of torchvision.models")
    parser.add_argument("--batch-size", type=_positive, default=128)
    parser.add_argument("--image-size", type=_positive, default=32)
    parser.add_argument("--classes", type=_positive, default=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda or cpu; default: cuda where there is one")
    parser.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: bf16 on cuda, fp32 on cpu"
    )
    parser.add_argument("--mode", choices=("train", "inference", "both"), default="both")
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument("--seconds", type=float, help="timed rounds per call; default: 0.2 on a CPU, 0.05 on a GPU")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--output", help="write the table to this file too")


if __name__ == "__main__":
    sys.exit(main())
