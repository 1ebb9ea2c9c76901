"""One module's forward as torch.fx graphs.

Every submodule is a leaf, so that a container is traced on its own and one that cannot be traced costs nothing but
itself. torch.fx specialises silently on what it cannot see; a rewrite that must never be wrong closes those doors:

- ``x += y`` on a proxy is recorded as ``operator.iadd`` (stock torch.fx records ``x + y`` and loses the write);
- optional arguments keep their defaults, and a call that passes one runs the stock forward (see plan.py);
- ``isinstance`` answers for the inputs as for a tensor, or, in a second trace, as for a list, and is remembered; asked
  of an intermediate value of unknown type it ends the trace;
- tensors and random numbers made during the trace would become constants, and blocks such as ``with torch.no_grad()``
  or ``autocast``, checkpointing and print() would be lost: they end the trace;
- attributes assigned in forward end the trace: it runs on a shallow copy, so the module itself never holds a proxy.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import inspect
import operator
import pickle
import random
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, TraceError

CLAIMS = {"tensor": Tensor, "list": list}
AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul")


class Untraceable(Exception):
    """Why a module's forward has no graph; one clause, without a full stop."""


def base_class(module: nn.Module) -> type:
    """The stock class of a module: its own, or the one that a fused class was derived from."""
    return getattr(type(module), "_fastconv_base", type(module))


def stock_state(module: nn.Module) -> dict[str, Any]:
    """The module's attributes without those that fuse() added."""
    return {k: v for k, v in module.__dict__.items() if not k.startswith("_fastconv")}


def required_arguments(module: nn.Module) -> list[str]:
    """Names of the arguments without which forward cannot be called; the traced graph takes these alone."""
    names = []
    for p in list(inspect.signature(base_class(module).forward).parameters.values())[1:]:
        if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.kind is p.KEYWORD_ONLY:
            raise Untraceable(f"its forward requires the keyword argument {p.name}")
        names.append(p.name)
    if not names:
        raise Untraceable("its forward requires no argument")
    return names


def _context() -> tuple[Any, ...]:
    """What a with-block in forward may change, and a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(f(kind) for f in (torch.is_autocast_enabled, torch.get_autocast_dtype) for kind in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


class _InPlace:
    """Records augmented assignments, which plain proxies turn into out-of-place operations."""


def _recorder(function):
    def record(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in AUGMENTED:
    setattr(_InPlace, f"__i{_name}__", _recorder(getattr(operator, f"i{_name}")))


class _Value(_InPlace, fx.Proxy):
    def __getattr__(self, name: str) -> Any:
        claim = self.tracer.claim(self)
        if claim is not None and not hasattr(claim, name):
            raise AttributeError(f"{claim.__name__} has no attribute {name}")  # what hasattr() has to hear
        return _ValueAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            self.tracer.refuse(f"it assigns the attribute {name} of a value")
        super().__setattr__(name, value)


class _ValueAttribute(_InPlace, Attribute):
    pass


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer read in forward stays a read, and is not computed with here

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.probed: set[str] = set()
        self.context = _context()
        self.refusal = ""

    def refuse(self, reason: str) -> NoReturn:
        # Kept as well as raised: a forward may catch what is raised in it.
        self.refusal = self.refusal or reason
        raise TraceError(reason)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            self.refuse("it switches gradients, autocast or checkpointing in its forward")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def claim(self, value: fx.Proxy) -> type | None:
        return CLAIMS[self.kind] if value.node.op == "placeholder" else None

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            self.refuse("it makes a tensor that does not depend on its inputs")
        return super().create_arg(a)

    def isinstance(self, value: fx.Proxy, classes: Any) -> bool:
        """What isinstance(value, classes) says in the traced forward."""
        if type(value) is _Value and value.node.op == "placeholder":
            self.probed.add(value.node.target)
            return issubclass(CLAIMS[self.kind], classes)
        self.refuse("it tests the type of an intermediate value")


def _foreign_caller() -> bool:
    """Whether the function that calls this one was called by a forward, and not by PyTorch's own code."""
    name = sys._getframe(2).f_globals.get("__name__") or ""
    return name != __name__ and name.partition(".")[0] not in ("torch", "inspect")


@contextlib.contextmanager
def _replaced(tracer: _Tracer) -> Iterator[None]:
    """isinstance() asks the tracer about proxies; print() and tests of the global state end the trace."""
    plain = builtins.isinstance

    def wrapper(value: Any, classes: Any) -> bool:
        if type(value) in (_Value, _ValueAttribute) and _foreign_caller():
            return tracer.isinstance(value, classes)
        return plain(value, classes)

    def stopper(function: Any, what: str) -> Any:
        def stop(*args: Any, **kwargs: Any) -> Any:
            if _foreign_caller():
                tracer.refuse(f"it {what} in its forward")
            return function(*args, **kwargs)

        return stop

    def importer(function: Any) -> Any:
        def load(*args: Any, **kwargs: Any) -> Any:
            # A module that is first imported in a forward may keep what it finds: torch._dynamo keeps the builtins.
            put(before)
            try:
                return function(*args, **kwargs)
            finally:
                put(during)

        return load

    def put(functions: list[tuple[Any, str, Any]]) -> None:
        for owner, name, function in functions:
            setattr(owner, name, function)

    during = [
        (builtins, "isinstance", wrapper),
        (builtins, "print", stopper(print, "prints")),
        (builtins, "__import__", importer(builtins.__import__)),
        (importlib, "import_module", importer(importlib.import_module)),
    ]
    for name in ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"):
        during.append((torch, name, stopper(getattr(torch, name), f"asks torch.{name}()")))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in during]
    try:
        put(during)
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Submodules follow the module's mode; their attributes and the random state are restored, and checked first."""
    below = [(m, dict(m.__dict__)) for m in module.modules() if m is not module and "training" in m.__dict__]
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)

    def random_states() -> list[Any]:
        return [torch.get_rng_state(), random.getstate(), numpy_random.get_state() if numpy_random else None]

    states = random_states()
    try:
        for m, _ in below:
            m.__dict__["training"] = module.training
        yield
        if pickle.dumps(random_states()[1:]) != pickle.dumps(states[1:]) or not torch.equal(
            torch.get_rng_state(), states[0]
        ):
            raise Untraceable("its forward draws random numbers that do not depend on its inputs")
        for m, before in below:
            after = dict(m.__dict__, training=before["training"])
            if after.keys() != before.keys() or any(after[k] is not before[k] for k in before):
                raise Untraceable("its forward assigns attributes of a submodule")
    finally:
        for m, before in below:
            m.__dict__.clear()
            m.__dict__.update(before)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy_random:
            numpy_random.set_state(states[2])


def _shadow(module: nn.Module, names: list[str], training: bool, reads: set[str]) -> nn.Module:
    """A shallow copy to trace, whose forward takes the required arguments alone; notes what it reads of itself."""

    def __getattribute__(self: nn.Module, name: str) -> Any:
        # nn.Module itself looks into __dict__ at every turn; a forward that does may read anything there.
        if name != "__dict__" or _foreign_caller():
            reads.add(name)
        return base.__getattribute__(self, name)

    base = base_class(module)
    listing = ", ".join(names)
    scope: dict[str, Any] = {}
    # The globals are forward's own: torch.fx looks there for the functions of the math module that it records.
    code = f"def forward(self, {listing}):\n    return self._fastconv_stock({listing})\n"
    exec(code, inspect.unwrap(base.forward).__globals__, scope)
    namespace = {
        "forward": scope["forward"],
        "_fastconv_stock": base.forward,
        "__getattribute__": __getattribute__,
        "__module__": base.__module__,
    }
    shadow = object.__new__(type(base.__name__, (base,), namespace))
    for key, value in stock_state(module).items():
        shadow.__dict__[key] = value.copy() if isinstance(value, (dict, list, set)) else value
    shadow.__dict__["training"] = training
    return shadow


def _assigned(shadow: nn.Module, before: dict[str, Any]) -> str:
    """The name of an attribute that forward has set, or an empty string."""
    for key in [*before, *(k for k in shadow.__dict__ if k not in before)]:
        old, new = before.get(key), shadow.__dict__.get(key)
        if old is new:
            continue
        if type(old) is not type(new) or not isinstance(old, (dict, list, set)) or len(old) != len(new):
            return key
        pairs = zip(old.values(), new.values(), strict=True) if isinstance(old, dict) else zip(old, new, strict=True)
        if any(a is not b for a, b in pairs):
            return key
    return ""


def trace(
    module: nn.Module, names: list[str], training: bool, reads: set[str], kind: str = "tensor"
) -> tuple[fx.Graph, set[str]]:
    """(graph, arguments whose type was tested) of ``module`` in one mode.

    reads: takes the names of the module's own attributes that forward reads. kind: what isinstance() takes the
    arguments for, "tensor" or "list". Raises :class:`Untraceable`. No hook fires, no
    submodule runs, and the module is left as it was.
    """
    tracer = _Tracer(kind)
    try:
        shadow = _shadow(module, names, training, reads)
        before = {k: v.copy() if isinstance(v, (dict, list, set)) else v for k, v in shadow.__dict__.items()}
        with _restored(shadow), _replaced(tracer):
            graph = tracer.trace(shadow)
        assigned = _assigned(shadow, before)
    except Untraceable:
        raise
    except Exception as error:  # forward is foreign code: whatever it raises on proxies is the reason to leave it
        text = next(iter(str(error).splitlines()), "")
        if not tracer.refusal:
            text = f"torch.fx cannot trace its forward: {type(error).__name__}: {text}"
        raise Untraceable((tracer.refusal or text)[:200]) from error
    if tracer.refusal:
        raise Untraceable(tracer.refusal)
    if assigned:
        raise Untraceable(f"its forward assigns self.{assigned}")
    return graph, tracer.probed
