"""Which backend runs a call: the one that was named, or under "auto" the fastest measured one that can.

:func:`recall` answers every call from a dict, by the signature of the call and of the thread, before its arguments are
checked: what an equal call before was found to be needs no second look. What is not in it goes the long way once,
through the function's checks and then :func:`select`:

1. The backends of the device's fixed order that can run the call; ``aten`` always can.
2. FASTCONV_TUNE=0, deterministic algorithms, or nothing to choose from: the first of them.
3. A measurement of this class of calls (ops/keys.py) in memory or on disk (fastconv/_cache.py): the fastest.
4. Else it is measured now (ops/measure.py): on a GPU by default, on a CPU only where asked for (FASTCONV_TUNE=1,
   ``python -m fastconv tune``): there the fixed order is right nearly everywhere, see bench/results. Never inside a
   trace, a graph capture or another state that timing would disturb: such a call takes the first of the fixed order,
   and the next one outside is measured.

Ranks of torch.distributed agree: whoever comes first puts the name of its choice into the default group's key-value
store, the others take it from there. No collective, so ranks with other shapes wait for nobody.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ext
from .. import _measured as measured
from .._measured import Policy, again, agreed, fixed, store_of
from ..triton import conv_config
from . import keys, registry
from .measure import measure, unsettled

log = logging.getLogger("fastconv")

TIE = 1.03  # times nearer than this are noise: the first of the fixed order wins, and stays the winner next time
_MOST_KNOWN = 1 << 16  # calls remembered per name; beyond that the shapes never repeat and remembering them is a leak


@dataclass(frozen=True)
class Decision:
    """The backend of one call and the reason in words."""

    backend: str
    reason: str
    call: str = ""  # the class of calls that a measurement stands for
    refused: dict[str, str] = field(default_factory=dict)  # backend -> why it cannot run this call
    ms: dict[str, list[float]] = field(default_factory=dict)  # backend -> [forward] or [forward, backward]
    settled: bool = True  # whether the next call like this one gets the same answer


class Explained(BaseException):
    """Carries the decision out of a call that :func:`fastconv.explain` makes: nothing of it runs."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision


class Call(NamedTuple):
    """A call as :func:`recall` finds it; settings (None: not known) and backend are those of an equal call before."""

    op: str
    key: Any  # None: not remembered
    settings: tuple | None = None
    backend: str = ""


# name given to use_backend -> key of a call -> the call
_known: defaultdict[str, dict[Any, Call]] = defaultdict(dict)
# Backends of calls that have to be measured and could not be yet: asked again, but only for the state they are in.
_waiting: dict[Any, str] = {}
_measuring = threading.RLock()


def forget() -> None:
    """Drops every decision and measurement of this process; the disk is read again at the next call."""
    _known.clear()
    _waiting.clear()
    measured.forget()
    conv_config.forget()


def set_policy(new: Policy | None) -> Policy | None:
    """Installs ``new``, returns the former one; decisions made under another policy are dropped."""
    before, measured.policy = measured.policy, new
    _known.clear()
    _waiting.clear()
    conv_config.forget()
    return before


def _typed(value: Any) -> Any:
    """value as a part of a key: 1, True and 1.0 are three. TypeError where csrc/signature.cpp gives None."""
    if type(value) in (tuple, list, torch.Size):
        return tuple([_typed(v) for v in value])
    if type(value) not in (bool, int, float, str, type(None)):
        raise TypeError(type(value))
    return type(value), value


def _signature_in_python(op: str, tensors: Sequence[Tensor | None], arguments: tuple) -> tuple | None:
    """csrc/signature.cpp for an installation without the compiled extension."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if any(t is not None and (not isinstance(t, Tensor) or t.layout is not torch.strided) for t in tensors):
        return None
    return (
        op,
        _typed(arguments),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch._C._len_torch_dispatch_stack(),
        *[None if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors],
    )


_signature = _ext.MODULE.signature if hasattr(_ext.MODULE, "signature") else _signature_in_python


def _key(op: str, tensors: tuple[Tensor | None, ...], arguments: tuple) -> Any:
    # Forward-mode AD is a state of Python alone: the signature does not see it.
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return None
    try:
        return _signature(op, tensors, arguments)
    except (TypeError, RuntimeError):  # symbolic sizes, or a layout without strides
        return None


def recall(op: str, tensors: tuple[Tensor | None, ...], arguments: tuple) -> Call:
    """What was found out about an equal call before, which then needs no checks; else the call, for :func:`select`.

    tensors, arguments: what the public function was given, autocast's casts made; nothing of it checked yet.
    """
    key = _key(op, tensors, arguments)
    if key is None:
        return Call(op, None)
    found = _known[registry._choice].get(key)
    return Call(op, key) if found is None else found


def select(call: Call, tensors: tuple[Tensor | None, ...], settings: tuple, limit: str, run: Callable) -> str:
    """The backend that runs this call, whose arguments are checked: "aten" where no other can.

    tensors, settings: the arguments in the order of ``run(backend, *tensors, *settings)``, which makes the call. The
    tensors are those that :func:`recall` was asked about.
    limit: a reason, found by the caller, why no fused kernel of this operator covers the call ("" if none).
    """
    op = call.op
    if torch.compiler.is_compiling():
        return _traced(op, tensors, settings, limit)
    # None: by the checked settings then, for the caller's may have been numbers of another library.
    key = call.key if call.key is not None else _key(op, tensors, settings)
    explaining = getattr(measured.thread, "explaining", False)
    if key is None or explaining or measured.policy is not None:
        decision = _decide(op, tensors, settings, limit, run)
        if explaining:
            raise Explained(decision)
        return decision.backend
    found = _known[registry._choice].get(key)
    if found is not None:
        return found.backend
    waiting = _waiting.get(key) if registry._choice == "auto" else None
    if waiting is not None and unsettled(tensors):
        return waiting
    decision = _decide(op, tensors, settings, limit, run)
    if len(_known[registry._choice]) + len(_waiting) >= _MOST_KNOWN:
        _known[registry._choice].clear()
        _waiting.clear()
    if decision.settled:
        _known[registry._choice][key] = Call(op, key, settings, decision.backend)
    else:
        _waiting[key] = decision.backend
    return decision.backend


def explain(call: Callable[[], object]) -> Decision | None:
    """The decision that ``call`` would get, without running or measuring anything; None if it made no choice."""
    kept, measured.thread.explaining = dict(_known), True
    _known.clear()
    try:
        call()
    except Explained as found:
        return found.decision
    finally:
        measured.thread.explaining = False
        _known.update(kept)
    return None


def _able(
    op: str, tensors: Sequence[Tensor | None], settings: tuple, limit: str
) -> tuple[list[str], dict[str, str], str]:
    """(backends that can run the call in the fixed order, the others' reasons, the last of these)"""
    able, refused = [], {}
    reason = f"no kernels for device type {tensors[0].device.type}"
    for name in registry._PREFERENCE.get(tensors[0].device.type, ()):
        cannot = registry._cannot_run(name, op, tensors, settings, limit)
        if cannot:
            refused[name] = reason = cannot
        else:
            able.append(name)
    return able, refused, reason


def _named(op: str, tensors: Sequence[Tensor | None], settings: tuple, limit: str) -> str:
    name = registry._choice
    reason = registry._cannot_run(name, op, tensors, settings, limit)
    if reason:
        raise RuntimeError(f"{op}: backend {name!r} cannot run this call: {reason}")
    return name


def _decide(op: str, tensors: tuple[Tensor | None, ...], settings: tuple, limit: str, run: Callable) -> Decision:
    if registry._choice != "auto":
        return Decision(_named(op, tensors, settings, limit), f"fastconv.use_backend({registry._choice!r})")
    able, refused, reason = _able(op, tensors, settings, limit)
    if not able:
        registry.tell(op, reason)
        return Decision("aten", reason, refused=refused)
    order = f"the fixed order {', '.join([*registry._PREFERENCE[tensors[0].device.type], 'aten'])}"
    wish = measured.wish()
    if measured.policy is None and wish == "0":
        return Decision(able[0], f"first of {order} that can run the call: FASTCONV_TUNE=0", refused=refused)
    if torch.are_deterministic_algorithms_enabled():
        why = "deterministic algorithms are on, times differ from run to run"
        return Decision(able[0], f"first of {order} that can run the call: {why}", refused=refused)
    if any(t is not None and t.numel() == 0 for t in tensors):
        return Decision(able[0], f"first of {order} that can run the call: a tensor is empty", refused=refused)
    try:
        specs = [keys.spec(t) for t in tensors]
        call = keys.class_of(op, specs, settings)
        hash(call)
    except (TypeError, RuntimeError):
        return Decision(able[0], f"first of {order} that can run the call: it has symbolic sizes", refused=refused)
    names = [*able, "aten"]
    device = tensors[0].device
    if measured.policy is not None and not getattr(measured.thread, "explaining", False):
        measured.policy.visit(op, call, names)
    entry = store_of(device).get(call)
    tuning = measured.policy is not None and measured.policy.measure
    if entry is None or again(call) or not covers(call, entry, names, tuning):
        wanted = measured.policy.measure if measured.policy is not None else wish == "1" or device.type == "cuda"
        why = unsettled(tensors) if wanted else ""
        if wanted and not why and getattr(measured.thread, "explaining", False):
            why = "it is measured at its first use, which has not been yet"
        settled = not wanted
        if wanted and not why:
            entry, why = _measured(op, call, names, run, tensors, settings)
            settled = True
        if entry is None or not covers(call, entry, names):
            backend = agreed(device, call, able[0], names) if settled else able[0]
            told = why or "this class of calls was not measured (python -m fastconv tune, or FASTCONV_TUNE=1)"
            return Decision(
                backend, f"first of {order} that can run the call: {told}", call, refused, settled=settled
            )  # fmt: skip
    refused = refused | {name: text for name, text in entry.get("failed", {}).items() if name in names}
    ms = {name: entry["ms"][name] for name in names if name in entry["ms"]}
    best = winner(ms)
    backend = agreed(device, call, best, names)
    if backend != best:
        return Decision(backend, "another rank of torch.distributed chose it first", call, refused, ms)
    return Decision(backend, f"the fastest of {len(ms)} measured", call, refused, ms)


def winner(ms: dict[str, list[float]]) -> str:
    """The first name, in the fixed order, whose time is within TIE of the least."""
    order = [name for name in registry.NAMES if name in ms]
    least = min(sum(times) for times in ms.values())
    return next(name for name in order if sum(ms[name]) <= TIE * least)


def covers(call: str, entry: dict, names: Sequence[str], tuning: bool = False) -> bool:
    """Whether ``entry`` has a time of ``call``, and a time or a reason for each of ``names``.

    tuning: also whether the tiles of a Triton convolution were measured for it, as at a call's first use they are not.
    """
    if tuning and call.startswith("conv2d") and "triton" in names and not entry.get("tuned"):
        return False
    return set(names) <= set(entry["ms"]) | set(entry.get("failed", {})) and bool(entry["ms"])


def _measured(
    op: str, call: str, names: Sequence[str], run: Callable, tensors: Sequence[Tensor | None], settings: tuple
) -> tuple[dict | None, str]:
    """(the entry, "") of a measurement made now, or (None, the reason why there is none)."""
    with _measuring:  # one at a time: two would time each other
        store = store_of(tensors[0].device)
        tuning = measured.policy is not None
        entry = None if again(call) else store.get(call)  # another thread may have been first
        if entry is not None and covers(call, entry, names, tuning):
            return entry, ""
        try:
            # On CUDA a backward would run in the device's own thread, which the tiles' flag does not reach.
            with conv_config.tuning(tuning), torch.autograd.set_multithreading_enabled(False):
                result = measure(op, names, run, tensors, settings, measured.policy.seconds if tuning else None)
        except RuntimeError as error:  # stock PyTorch itself cannot run the copies: out of memory, most likely
            why = f"measuring it failed: {error}".splitlines()[0]
            log.warning("%s: %s", op, why)
            return None, why
        log.info("measured in %.2f s: %s: %s", result.seconds, call, result.ms)
        more = {"failed": result.failed, "tuned": tuning}
        entry = {"ms": result.ms, **{key: value for key, value in more.items() if value}}
        # What stands there was asked for again, or may be from before the tiles were tuned: times of other kernels.
        entry = store.put(call, entry, replace=tuning)
        if tuning:
            measured.policy.fresh.add(call)
            measured.policy.done(call, result)
        return entry, ""


def _pick(op: str, device: str, index: int | None, able: tuple, specs: tuple | None, settings: tuple) -> str:
    """The decision of a traced call, made from constants while the graph is built: it becomes one itself."""
    first = able[0]
    if specs is None or measured.policy is not None or fixed():
        return first
    place = torch.device(device, index)
    specs = [None if s is None else keys.Spec(s[0], s[1], str(s[2]).removeprefix("torch."), s[3]) for s in specs]
    call = keys.class_of(op, specs, settings)
    entry = store_of(place).get(call)
    names = [*able, "aten"]
    if entry is None or not covers(call, entry, names):
        return first
    return agreed(place, call, winner({n: entry["ms"][n] for n in names if n in entry["ms"]}), names)


# torch.compiler.assume_constant_result(_pick), without importing the compiler.
_pick._dynamo_marked_constant = True


def _traced(op: str, tensors: tuple[Tensor | None, ...], settings: tuple, limit: str) -> str:
    """select() as torch.compile and torch.export trace it: stored measurements count, none is taken."""
    if registry._choice != "auto":
        return _named(op, tensors, settings, limit)
    able, _, _ = _able(op, tensors, settings, limit)
    if not able:
        return "aten"
    first = tensors[0]
    constant = all([registry.static(s) for s in settings if not isinstance(s, float)])
    for t in tensors:
        constant = constant and (t is None or registry.static(tuple(t.shape)))
    specs = None
    if constant:
        grad = torch.is_grad_enabled()
        specs = []
        for t in tensors:
            specs.append(
                None if t is None else (tuple(t.shape), tuple(t.stride()), t.dtype, grad and t.requires_grad)
            )  # fmt: skip
        specs = tuple(specs)
    plain = tuple([0.0 if isinstance(s, float) else s for s in settings]) if constant else ()
    return _pick(op, first.device.type, first.device.index, tuple(able), specs, plain)
