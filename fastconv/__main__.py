"""python -m fastconv info: versions, device, how fastconv was built, and each backend with its availability."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

from . import _ext
from ._version import __version__
from .ops import backends


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows less, but something
    return platform.processor() or platform.machine()


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
        ("CPU", f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
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
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastconv", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, device, build and backends")
    parser.parse_args(argv)
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
