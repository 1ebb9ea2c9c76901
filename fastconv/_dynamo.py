"""torch.compile(model, backend="fastconv"): the graphs that Dynamo captures, with fuse()'s groups, run eagerly.

The second door to the rewrite, for code that torch.fx cannot trace module by module: Dynamo sees through control flow
and calls between modules, guards what it has seen and splits the graph where it cannot look. The entry point
``torch_dynamo_backends`` makes the name known to torch.compile without importing fastconv.

    step = torch.compile(model, backend="fastconv")
    step = torch.compile(model, backend="fastconv", options={"inner_backend": "inductor"})
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ._fuse import runtime
from ._fuse.graph import rewrite

log = logging.getLogger("fastconv")

OPTIONS = ("inner_backend", "memory_format")


def fastconv(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend: groups of the graph become calls of :mod:`fastconv.functional`, the rest stays.

    options, as ``torch.compile(..., options={...})``:
    inner_backend: name of the backend, or a backend, that gets the rewritten graph ("inductor", "aot_eager"). Default:
    the graph runs as it is, operator by operator.
    memory_format: torch.channels_last (default) keeps 4-d tensors in channels_last inside the graph, and gives results
    the layout that stock PyTorch gives them; torch.preserve_format leaves layouts alone. Weights are the caller's:
    ``model.to(memory_format=torch.channels_last)`` saves a copy of each at every call.

    Groups are counted in ``torch._dynamo.utils.counters["fastconv"]``, by pattern. Raises ValueError on another option
    or memory_format.
    """
    options = dict(options or {})
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"backend fastconv: options expected {' and '.join(OPTIONS)}, got {name!r}")
    layout = options.get("memory_format", torch.channels_last)
    if layout not in (torch.channels_last, torch.preserve_format):
        raise ValueError(
            "backend fastconv: memory_format expected torch.channels_last or torch.preserve_format, "
            f"got {layout}"
        )  # fmt: skip
    fused, groups = rewrite(module, layout is torch.channels_last)
    counts = torch._dynamo.utils.counters["fastconv"]
    counts["graphs"] += 1
    for group in groups:
        counts[group.pattern] += 1
    log.info("torch.compile: %d groups in a graph of %d nodes", len(groups), len(module.graph.nodes))
    inner = options.get("inner_backend", "eager")
    if inner == "eager":
        _refuse_second_derivatives(fused)
        return fused.forward
    from torch._dynamo.backends.registry import lookup_backend
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    # The inner compiler runs the calls on these to trace them.
    runtime.TRACED.update((FakeTensor, FunctionalTensor))
    try:
        return lookup_backend(inner)(fused, example_inputs)
    finally:
        runtime.TRACED.clear()


def _refuse_second_derivatives(module: fx.GraphModule) -> None:
    """For the autograd Functions in a graph that is run as it is, those of a model that was fused before.

    Dynamo traces their backward as a region without gradients, also where it is called with create_graph=True: a second
    derivative would be missing in silence.
    """
    nodes = [n for n in module.graph.nodes if n.target is torch.ops.higher_order.autograd_function_apply]
    for node in nodes:
        node.target = _differentiable_once
    if nodes:
        module.recompile()


def _differentiable_once(*args: Any, **kwargs: Any) -> Any:
    results = torch.ops.higher_order.autograd_function_apply(*args, **kwargs)
    for value in results if isinstance(results, (tuple, list)) else [results]:
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            value.grad_fn.register_prehook(_refuse)
    return results


def _refuse(grads: Any) -> None:
    if torch.is_grad_enabled():  # in a backward: it was called with create_graph=True
        raise RuntimeError(
            "a compiled autograd Function is differentiable once: backward with create_graph=True is not implemented. "
            "Run the model uncompiled for second derivatives."
        )
