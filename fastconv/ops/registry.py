"""The backends: which there are, which calls each can run, and the name that the user chose.

A backend is a name, an answer to "can it run this call?" (a reason where it cannot) and, for all but ``aten``, one
callable per raw operator with the signature of ``torch.ops.fastconv.<op>``. ``cpu`` and ``cuda`` are the compiled
kernels; PyTorch's dispatcher tells them apart by the tensors' device. ``aten`` is stock PyTorch with its own autograd
and can run everything.

``auto`` leaves it to :mod:`fastconv.ops.choice`. A fallback to ``aten`` is logged once per operator and reason (logger
"fastconv", level INFO).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _ext, triton
from ..triton import limits
from . import fake

log = logging.getLogger("fastconv")

NAMES = ("cuda", "triton", "cpu", "aten")
# The fixed order by device type, which decides without measurements: the compiled kernels first, for they start without
# Triton's launch code in Python and without compiling anything at the first call.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_CUDA_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_DTYPES = {"cpu": _CUDA_DTYPES | {torch.float64}, "cuda": _CUDA_DTYPES}


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used in this process, and the reason in words."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def _kernels(key: str) -> frozenset[str]:
    """The raw operators that have a kernel for the dispatch key "CPU" or "CUDA" in this build."""
    if not _ext.HAS_EXT:
        return frozenset()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(op for op in fake.OPERATORS if has(f"fastconv::{op}", key))


# Read once: a set look-up can be traced by torch.compile, a question to the dispatcher cannot.
_COMPILED = {"cpu": _kernels("CPU"), "cuda": _kernels("CUDA")}


def _ask(name: str) -> Availability:
    if name == "aten":
        return Availability(True, f"stock PyTorch {torch.__version__}")
    if name == "triton":
        state = Availability(*triton.available())
        if state:
            from ..triton import operators  # imports every kernel: only where they can run

            operators.register(fake)
        return state
    if not _ext.HAS_EXT:
        return Availability(False, _ext.EXT_REASON)
    built = _ext.build_info()
    if name == "cpu":
        return Availability(True, f"C++ kernels, {built['cpu_isa']}")
    if built["cuda_reason"]:
        return Availability(False, f"built without CUDA kernels: {built['cuda_reason']}")
    if not torch.cuda.is_available():
        return Availability(False, "compiled in, but torch sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return Availability(False, f"compute capability 8.0 or higher is needed, {name} has {major}.{minor}")
    return Availability(True, f"CUDA kernels on {torch.cuda.get_device_name()}")


# Backends whose operators are a library of their own, torch.ops.<library>, and what these cannot run. The others are
# torch.ops.fastconv, whose kernels PyTorch's dispatcher tells apart by device.
_LIBRARIES = {"triton": "fastconv_triton"}
_CANNOT_RUN = {"triton": triton.cannot_run}


def _cuda_limit(op: str, shapes: Sequence, settings: Sequence, grads: Sequence[bool]) -> str:
    return _ext.MODULE.cuda_limit(op, shapes, settings, grads)


# Backends whose kernels have limits of size: why they cannot run a public operator on tensors of these shapes, and the
# gradients that are wanted of it, or "".
_LIMITS = {"cuda": _cuda_limit, "triton": limits.limit}


def add_backend(name: str, library: str, cannot_run: Callable, availability: Availability) -> None:
    """Makes ``use_backend(name)`` run another implementation of the raw operators; "auto" never takes it.

    For tests, and for kernels that somebody else brings. library: ``torch.ops.<library>`` has fastconv's schemas.
    ``cannot_run(op, tensors)`` gives the reason why it cannot run a call, or "".
    Raises ValueError if there is a backend of that name.
    """
    if name in NAMES or name in _LIBRARIES:
        raise ValueError(f"add_backend: name expected a new one, got {name!r}")
    _LIBRARIES[name], _CANNOT_RUN[name], _known[name] = library, cannot_run, availability


# The answers for the GPU backends are asked for at the first use: they import Triton and start CUDA in this process.
_known = {name: _ask(name) for name in ("cpu", "aten")}


def availability(name: str) -> Availability:
    """Whether this backend can be used in this process."""
    if name not in _known:
        _known[name] = _ask(name)
    return _known[name]


def _unavailable(name: str) -> str:
    return "" if availability(name) else availability(name).reason


# torch.compiler.assume_constant_result without importing the compiler: asking a GPU backend cannot be traced.
_unavailable._dynamo_marked_constant = True

_choice = "auto"
_told: set[tuple[str, str]] = set()


def backends() -> dict[str, Availability]:
    """Every backend's availability in this process: ``{"cpu": Availability(available=True, reason="..."), ...}``."""
    return {name: availability(name) for name in NAMES}


def current_backend() -> str:
    """The name given to :func:`use_backend` last; "auto" at the start."""
    return _choice


class use_backend:  # noqa: N801  (named like torch.set_grad_enabled: a function that is a context manager too)
    """Chooses the backend of every fastconv call of this process: "auto", "cuda", "triton", "cpu" or "aten".

    Takes effect at once; as a context manager the former choice comes back at the end. With an explicit name a call
    that this backend cannot run raises RuntimeError and says why, where "auto" falls back to "aten".

    Raises ValueError for an unknown name, RuntimeError where the backend is not available here.
    """

    def __init__(self, name: str) -> None:
        global _choice
        if name != "auto" and name not in NAMES and name not in _LIBRARIES:
            raise ValueError(f"use_backend: name expected one of auto, {', '.join(NAMES)}; got {name!r}")
        if name != "auto" and not availability(name):
            raise RuntimeError(f"use_backend: backend {name!r} is not available: {availability(name).reason}")
        self._before, _choice = _choice, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc) -> None:
        global _choice
        _choice = self._before


def _compiled_cannot_run(device: str, op: str, tensors: tuple[Tensor | None, ...]) -> str:
    if op not in _COMPILED[device]:
        return f"this build has no {device} kernel of {op}"
    for t in tensors:
        if t is None:
            continue
        if t.device.type != device:
            return f"a tensor is on {t.device.type}"
        if t.is_floating_point() and t.dtype not in _DTYPES[device]:
            return f"dtype {str(t.dtype).removeprefix('torch.')} is not supported"
        if t.layout is not torch.strided:
            return f"layout {t.layout} is not supported"
    return ""


_DISABLED = torch._C._disabled_torch_function_impl  # of Parameter, and of the tensors that compilers trace with


def _transformed(tensors: tuple[Tensor | None, ...]) -> str:
    """Calls that need PyTorch's own derivative rules: torch.func, forward-mode AD, tensor subclasses."""
    if torch.compiler.is_compiling():
        return ""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "inside forward-mode AD"
    # Not torch.overrides.has_torch_function: it says yes to every tensor under a mode (torch.set_default_device).
    for t in tensors:
        if t is not None and type(t) is not Tensor and type(t).__torch_function__ is not _DISABLED:
            return "a tensor subclass overrides __torch_function__"
    return ""


def static(value: object) -> bool:
    """Whether a trace holds this size or setting as a constant."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a second's import, which a trace has made

    if isinstance(value, (tuple, list)):
        return all([static(v) for v in value])
    return isinstance(value, str) or value is None or has_static_value(value)


def _within(name: str, op: str, shapes: tuple, settings: tuple, grads: tuple) -> str:
    return _LIMITS[name](op, shapes, settings, grads)


_within._dynamo_marked_constant = True


def _size_limit(name: str, op: str, tensors: tuple[Tensor | None, ...], settings: tuple) -> str:
    """What the backend's limits say; nothing of symbolic sizes, which the kernels' launches check when they run."""
    if name not in _LIMITS:
        return ""
    shapes = tuple([() if t is None else tuple(t.shape) for t in tensors])
    grad = torch.is_grad_enabled()
    grads = tuple([t is not None and grad and t.requires_grad for t in tensors])
    if torch.compiler.is_compiling():
        settings = tuple([0.0 if isinstance(s, float) else s for s in settings])  # no limit asks for these
        if not static(shapes) or not static(settings):
            return ""
    elif any(isinstance(size, torch.SymInt) for shape in shapes for size in shape):
        return ""
    return _within(name, op, shapes, settings, grads)


def _cannot_run(name: str, op: str, tensors: tuple[Tensor | None, ...], settings: tuple, limit: str) -> str:
    if name == "aten":
        return ""
    missing = _unavailable(name)
    if missing:
        return missing
    own = _CANNOT_RUN[name](op, tensors) if name in _CANNOT_RUN else _compiled_cannot_run(name, op, tensors)
    return limit or own or _transformed(tensors) or _size_limit(name, op, tensors, settings)


def tell(op: str, reason: str) -> None:
    """Logs an automatic fallback to ``aten``, once per operator and reason."""
    if (op, reason) not in _told:
        _told.add((op, reason))
        log.info("%s runs on aten: %s", op, reason)


def impl(backend: str, op: str) -> Callable:
    """The callable with the signature of ``torch.ops.fastconv.<op>`` that ``backend`` runs."""
    return getattr(getattr(torch.ops, library(backend)), op).default


def library(backend: str) -> str:
    """The namespace under torch.ops that the backend's raw operators are in."""
    return _LIBRARIES.get(backend, "fastconv")
