"""Loads the compiled extension ``fastconv._C``, which registers the operators ``torch.ops.fastconv.*``.

Where it is missing, fastconv still imports: every call then runs on the ``aten`` backend (stock PyTorch), and
``EXT_REASON`` says in one sentence what to do. Where it is there but cannot be loaded (another torch, say), a warning
says so once at import: that is a broken installation, not a choice.
"""

from __future__ import annotations

import importlib.machinery
import warnings
from pathlib import Path
from types import ModuleType

import torch

MODULE: ModuleType | None = None
EXT_REASON = ""


def _load() -> tuple[ModuleType | None, str]:
    here = str(Path(__file__).parent)
    if importlib.machinery.PathFinder.find_spec("_C", [here]) is None:
        return None, (
            "fastconv was installed without its compiled extension (no C++ compiler or no torch at build time): "
            "install g++ and torch, then run pip install --no-build-isolation . again"
        )
    try:
        from fastconv import _C
    except ImportError as error:
        reason = (
            f"the compiled extension cannot be loaded with torch {torch.__version__} ({error}): "
            "reinstall fastconv in this environment"
        )
        warnings.warn(f"fastconv: {reason}", UserWarning, stacklevel=3)
        return None, reason
    return _C, ""


MODULE, EXT_REASON = _load()
HAS_EXT = MODULE is not None


def build_info() -> dict[str, str]:
    """How the extension was compiled: compiler, torch and CUDA versions, architectures, instruction sets."""
    return {} if MODULE is None else dict(MODULE.build_info())
