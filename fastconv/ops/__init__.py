"""The operators behind fastconv.functional: backend choice, the stock compositions, the fake implementations."""

from . import aten, fake
from .choice import recall, select
from .registry import backends, current_backend, impl, use_backend

__all__ = ["aten", "backends", "current_backend", "fake", "impl", "recall", "select", "use_backend"]
