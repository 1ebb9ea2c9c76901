"""Measurements and what decides whether they count: below the choice of a backend (ops/choice.py) and the choice of a
Triton tile (triton/conv_config.py), which both ask here.

A measurement holds in one environment: versions, device, and the switches that change what a kernel does there. The
ranks of torch.distributed agree on what they take from it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import _ext, triton
from ._cache import Measurements, folder
from ._version import __version__

log = logging.getLogger("fastconv")


@dataclass
class Policy:
    """How a tuning run (fastconv/tune.py) changes the way calls are decided."""

    measure: bool  # False: only visit
    visit: Callable[[str, str, Sequence[str]], None]  # (operator, class, names) of every call before it is decided
    done: Callable[[str, object], None]  # (class, result) of every measurement
    again: bool = False  # measure what was measured before this run too
    seconds: float | None = None
    fresh: set[str] = field(default_factory=set)


policy: Policy | None = None
thread = threading.local()  # .explaining: a decision is asked for and nothing may come of it
_stores: dict[str, Measurements] = {}  # by environment


def forget() -> None:
    """The measurements are read from the disk again."""
    _stores.clear()


def store_of(device: torch.device) -> Measurements:
    name = environment(device)
    if name not in _stores:
        _stores[name] = Measurements(folder(), name)
    return _stores[name]


def again(call: str) -> bool:
    """Whether a tuning run wants ``call`` measured although there is a measurement, and has not done so yet."""
    return policy is not None and policy.again and call not in policy.fresh


def fixed() -> bool:
    """Whether measurements do not count now, here or on any earlier day: the same call takes the same kernels."""
    return (policy is None and wish() == "0") or torch.are_deterministic_algorithms_enabled()


def wish() -> str:
    value = os.environ.get("FASTCONV_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTCONV_TUNE: expected 0 (off), 1 (measure at first use, CPUs included), got {value!r}")
    return value


def agreed(device: torch.device, call: str, mine: str, names: Sequence[str]) -> str:
    """What the first rank that got here chose, where there are ranks; ``mine`` otherwise."""
    if getattr(thread, "explaining", False) or policy is not None:
        return mine
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine
    store = torch.distributed.distributed_c10d._get_default_store()
    theirs = store.compare_set(f"fastconv/{device.type}/{call}", "", mine).decode()
    if theirs not in names:
        log.warning("%s: another rank chose backend %s, which cannot run the call here", call, theirs)
        return mine
    return theirs


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Events are recorded on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows less, but something
    return platform.processor() or platform.machine()


@functools.cache
def _software() -> str:
    """Versions, and the extension's build: kernels built from other sources have other times."""
    parts = [f"fastconv {__version__}", f"torch {torch.__version__}"]
    if _ext.HAS_EXT:
        parts.append(f"extension {_ext.build_info()['build_id'][:12]}")
    return ", ".join(parts)


@functools.cache
def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    parts = [torch.cuda.get_device_name(index), f"sm_{major}{minor}", f"CUDA {torch.version.cuda}"]
    parts += [f"cuDNN {torch.backends.cudnn.version()}", triton.available()[1].partition(" on ")[0]]
    return ", ".join(parts)


def environment(device: torch.device) -> str:
    """Versions, device and the switches that change what a backend does there."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        switches = f"conv {torch.backends.cudnn.conv.fp32_precision}, benchmark {torch.backends.cudnn.benchmark}"
        return f"{_software()}; {_gpu(index)}; {switches}"
    isa = _ext.build_info().get("cpu_isa", "")
    parts = [cpu_model(), *([isa] if isa else []), f"{torch.get_num_threads()} threads"]
    return f"{_software()}; {', '.join(parts)}"
