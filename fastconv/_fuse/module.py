"""The fused container: the stock module's class, attributes and children, with a rewritten forward."""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .analysis import Analysis, children
from .plan import CHANNELS_LAST, Plan, Planner
from .runtime import profiling
from .trace import base_class

_classes: dict[type, type] = {}
# fastconv._plan.programs's, which is above this module: (container, input, eager forward) -> result.
PROGRAMS: list[Callable[..., Any]] = []
PROGRAMS_OF = "_fastconv_programs"  # the attribute of a container that holds its own


class FusedMixin:
    """First base of every fused class; the second, ``_fastconv_base``, is the stock class.

    The plan is dropped when a submodule is assigned, or an attribute that the traced forward has read, and derived
    again at the next call.
    """

    _fastconv_base: type

    def __setattr__(self, name: str, value: Any) -> None:
        plan, state = self.__dict__.get("_fastconv_plan"), self.__dict__
        if plan is not None and name != "training" and state.get(name, _classes) is not value:
            module = isinstance(value, nn.Module) or name in state["_modules"]
            weight = isinstance(value, nn.Parameter) and state["_parameters"].get(name) is not None
            if module or (plan.depends_on(name) and not weight):
                self._drop_plan()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._drop_plan()
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._drop_plan()
        super().add_module(name, module)

    def register_module(self, name: str, module: nn.Module | None) -> None:
        self._drop_plan()
        super().register_module(name, module)

    def _drop_plan(self) -> None:
        # A replica of nn.DataParallel gets its tensors by assignment, at every call and in a thread of its own.
        if not self.__dict__.get("_is_replica"):
            self.__dict__["_fastconv_plan"] = None

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_fastconv_plan"] = self.__dict__.get("_fastconv_plan")
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.__dict__.get("_fastconv_plan") is None:
            refresh(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):
            # The fused class cannot be imported by name: it is made from the stock class again.
            return (_rebuild, (self._fastconv_base,), *reduced[2:])
        return reduced


def _rebuild(base: type) -> nn.Module:
    return object.__new__(fused_class(base))


def refresh(module: nn.Module) -> Plan:
    """Derives the container's plan from its present state."""
    layout, written, defer_bn = module.__dict__.get("_fastconv_options", ("channels_last", False, False))
    memory_format = CHANNELS_LAST if layout == "channels_last" else torch.preserve_format
    planner = Planner(Analysis(module), memory_format, defer_bn)
    for child in module.modules():
        if isinstance(child, FusedMixin) and child is not module:
            planner.planned.add(id(child))
    plan = planner.plan(module, written)
    module.__dict__["_fastconv_plan"] = plan
    return plan


def fused_class(base: type) -> type:
    """The subclass of ``base`` that runs plans; one for each base, so that type(a) is type(b) stays true."""
    if base not in _classes:

        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            usual = not torch.compiler.is_compiling() and self.training == torch.is_grad_enabled() and not kwargs
            if usual and len(args) == 1 and PROGRAMS and not _has_global_hooks():
                return PROGRAMS[0](self, args[0], eager)
            return eager(self, *args, **kwargs)

        def eager(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if _has_global_hooks():
                return base.forward(self, *args, **kwargs)  # they want to see every module called
            plan = self.__dict__.get("_fastconv_plan")
            if plan is None or plan.outdated(self):
                if torch.compiler.is_compiling():
                    return base.forward(self, *args, **kwargs)  # no tracer inside another
                plan = refresh(self)
            if kwargs and kwargs.keys() == set(plan.names[len(args) :]):
                args, kwargs = (*args, *(kwargs[name] for name in plan.names[len(args) :])), {}
            run = None if kwargs else plan.select(self, args)
            if run is None:
                return base.forward(self, *args, **kwargs)
            if not profiling():
                return run(self, *args)
            with torch.autograd.profiler.record_function(base.__name__):
                return run(self, *args)

        def fill(namespace: dict[str, Any]) -> None:
            namespace.update(forward=forward, _fastconv_base=base, __module__="fastconv.fuse", __doc__=base.__doc__)

        _classes[base] = types.new_class(f"Fused{base.__name__}", (FusedMixin, base), {}, fill)
    return _classes[base]


def _has_global_hooks() -> bool:
    m = torch.nn.modules.module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )


def install(module: nn.Module, plan: Plan) -> None:
    """Makes a module run the plan; it stays the same object, with the same attributes."""
    if not isinstance(module, FusedMixin):
        module.__class__ = fused_class(base_class(module))
    module.__dict__["_fastconv_plan"] = plan
    layout = "channels_last" if plan.memory_format == CHANNELS_LAST else "preserve"
    module.__dict__["_fastconv_options"] = layout, plan.written, plan.defer_bn
    converted = (*module.__dict__.get("_fastconv_converted", ()), *plan.converted)
    module.__dict__["_fastconv_converted"] = tuple(dict.fromkeys(converted))


def uninstall(module: nn.Module) -> None:
    """Makes a fused container an instance of its stock class again, without what install() has left on it."""
    for path in module.__dict__.get("_fastconv_converted", ()):
        _restore_layout(module, path)
    fused, base = type(module), base_class(module)
    if _classes.get(base) is not fused:
        # torch.nn.utils.parametrize derives a class of its own for each instance: the same one, over the stock class.
        own = {k: v for k, v in fused.__dict__.items() if k not in ("__dict__", "__weakref__")}
        base = type(fused.__name__.replace("ParametrizedFused", "Parametrized"), (base,), own)
    module.__class__ = base
    for key in [k for k in module.__dict__ if k.startswith("_fastconv")]:
        del module.__dict__[key]


def _restore_layout(container: nn.Module, path: str) -> None:
    """A weight that fuse() has converted to channels_last, contiguous again; the Parameter stays the same."""
    try:
        weight = container.get_submodule(path)._parameters.get("weight")
    except AttributeError:  # the layer was replaced or removed since
        return
    if weight is not None and weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight.data = weight.data.contiguous()


def shallow_clone(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A module of the same class with children of its own choice.

    Parameters and buffers are shared down to the dictionaries that hold them, so that .to() on either is seen by both;
    hooks are copied, so that one registered later on the copy is the copy's alone.
    """
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = {**module._modules, **replaced}
    for key, value in module.__dict__.items():
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
            clone.__dict__[key] = value.copy()
    return clone


class _Remaker:
    """A model made anew from the leaves up, each module once: in place, or as a copy that shares every leaf."""

    def __init__(self, inplace: bool) -> None:
        self.inplace = inplace
        self.done: dict[int, nn.Module] = {}

    def remake(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.done:
            self.done[id(module)] = module  # for modules that contain themselves
            self.done[id(module)] = self._remake(module)
        return self.done[id(module)]

    def _remake(self, module: nn.Module) -> nn.Module:
        raise NotImplementedError


class Restorer(_Remaker):
    """The model with every fused container stock again."""

    def _remake(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        fresh = {name: self.remake(child) for name, child in module._modules.items() if child is not None}
        replaced = {name: child for name, child in fresh.items() if child is not module._modules[name]}
        mine = isinstance(module, FusedMixin)
        if not mine and not replaced:
            return module
        if not self.inplace:
            module = shallow_clone(module, replaced)
        if mine:
            uninstall(module)
        return module


class Rebuilder(_Remaker):
    """The model with planned containers fused."""

    def __init__(self, plans: dict[int, Plan], inplace: bool) -> None:
        super().__init__(inplace)
        self.plans = plans

    def _remake(self, module: nn.Module) -> nn.Module:
        fresh = {name: self.remake(child) for name, child in children(module)}
        replaced = {name: child for name, child in fresh.items() if child is not module._modules[name]}
        plan = self.plans.get(id(module))
        if plan is not None and plan.same_as(module.__dict__.get("_fastconv_plan")):
            plan = None
        if plan is None and not replaced:
            return module
        if not self.inplace:
            module = shallow_clone(module, replaced)
        if plan is not None:
            install(module, plan)
        return module
