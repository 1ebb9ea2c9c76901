"""explain(op, ...): which backend a call takes, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import functional
from .ops import choice, registry


class Explanation:
    """The answer of :func:`explain`; ``str()`` of it is a table.

    op: the operator's name. backend: the name of the backend that runs the call. reason: why, in words.
    refused: backend -> why it cannot run the call, for those that were asked. call: the class of calls that a
    measurement stands for ("" where none was needed). ms: backend -> measured milliseconds, [forward] or
    [forward, backward].
    """

    def __init__(self, op: str, decision: choice.Decision) -> None:
        self.op, self.backend, self.reason = op, decision.backend, decision.reason
        self.refused, self.call, self.ms = dict(decision.refused), decision.call, dict(decision.ms)

    def __repr__(self) -> str:
        return f"Explanation(op={self.op!r}, backend={self.backend!r}, reason={self.reason!r})"

    def __str__(self) -> str:
        lines = [f"{self.op} runs on {self.backend}: {self.reason}"]
        if self.call:
            lines.append(f"  class of calls: {self.call}")
        for name in registry.NAMES:
            if name in self.ms:
                parts = zip(("forward", "backward"), self.ms[name], strict=False)
                lines.append(f"  {name:<7} {', '.join(f'{part} {ms:.3f} ms' for part, ms in parts)}")
            elif name in self.refused:
                lines.append(f"  {name:<7} {self.refused[name]}")
        return "\n".join(lines)


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend ``fastconv.functional.<op>(*args, **kwargs)`` takes here and now, and why.

    op: the name of a function of fastconv.functional, or the function. The call's arguments are checked as in the call
    itself; no kernel runs, nothing is measured, no running statistic moves. Grad mode, autocast, ``use_backend`` and
    FASTCONV_TUNE count as they are.

    Raises ValueError for another name, and whatever the call itself raises.

    >>> print(fastconv.explain("conv2d_bias_act", x, weight, bias, padding=1))
    conv2d_bias_act runs on cpu: the fastest of 2 measured
      class of calls: conv2d_bias_act float32[128,64,8,8]cl* float32[64,64,3,3]* - - 1x1 1x1 1x1 1 relu
      cpu     forward 1.402 ms, backward 2.911 ms
      aten    forward 1.913 ms, backward 4.215 ms
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in functional.__all__ or not (isinstance(op, str) or op is getattr(functional, name)):
        raise ValueError(f"explain: op expected a function of fastconv.functional or its name, got {op!r}")
    decision = choice.explain(lambda: getattr(functional, name)(*args, **kwargs))
    return Explanation(name, decision)
