"""fuse(model): a stock PyTorch CNN with its groups of layers run as fused operators.

    model = fastconv.fuse(torchvision.models.resnet50())
    print(fastconv.fusion_report(model))

Every module's forward is traced with torch.fx on its own (its children are leaves), groups such as convolution + batch
norm + addition + activation are replaced by one call of :mod:`fastconv.functional`, and the module runs the rewritten
forward from then on. A module that cannot be traced keeps its forward; those below it are handled all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._fuse.analysis import Analysis
from ._fuse.module import Rebuilder, Restorer
from ._fuse.plan import CHANNELS_LAST, Group, Plan, Planner
from ._fuse.report import FusionReport, report

__all__ = ["FusionReport", "Group", "fuse", "fusion_report", "unfuse"]


def fuse(
    model: nn.Module,
    inplace: bool = False,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    defer_bn: bool | str = False,
) -> nn.Module:
    """The model with groups of layers run as fused operators.

    The result has the model's structure: the same module names, the same Conv2d and BatchNorm2d objects, the same
    Parameters and buffers, the same state_dict keys. Containers become instances of a subclass of their class; they can
    be called alone, indexed and hooked. Weights, modes, flags, hooks and replaced modules take effect at the next call:
    a group whose members are no longer plain layers runs them one by one.

    The groups are convolution -> (batch norm) -> (addition) -> (activation), batch norm -> (addition) -> (activation),
    and pools; what is in parentheses may be missing, so a layer alone is a group too.

    model: any module. Layers in no group, modules that torch.fx cannot trace, scripted, quantised and parametrised ones
    are left as they are; :func:`fusion_report` names them with the reason.

    inplace: False returns a model of its own whose containers are copies and whose layers, parameters and buffers are
    shared with ``model`` (containers with nothing to fuse below them are shared too; a model with nothing to fuse is
    returned itself). True changes the containers of ``model`` and returns it.

    memory_format: torch.channels_last runs 4-d tensors in channels_last from the outermost fused module on, whose
    results have the layout of its input, and keeps the weights of fused convolutions in channels_last.
    torch.preserve_format leaves layouts alone. With inplace=False the weights, which ``model`` shares, stay as they
    are where some forward calls view() or could not be read: view() fails on the channels_last results that stock
    PyTorch makes of such weights. inplace=True, or model.to(memory_format=torch.channels_last), converts them.

    defer_bn: whether a training step keeps less for its backward: of a group with convolution and batch norm the
    convolution's raw output alone. What the next convolutions read, normalised, activated and with the residual added,
    is computed again in the backward by the same kernel, one pass over the tensor for each group; the gradients are the
    same. True: every such group. "auto": those whose result nothing in sight keeps anyway. No effect in evaluation,
    under torch.compile and where stock PyTorch runs the group.

    On a CPU a fused module with one 4-d input and a result that is no feature map runs from the second call with an
    input shape on as one program of the operators that it would call, on the live weights: the same bits, without
    Python between the layers. So it does in evaluation without gradients, and in training with them, in float32 or
    under bfloat16 autocast (evaluation in bfloat16 too). In training forward and backward are one autograd Function,
    and the memory of large gradients that nobody holds any more is used again. Whatever a program cannot follow (module
    hooks, a profiler, checkpointing, an input that requires a gradient, forwards with effects of their own, steps with
    more than 256 MiB of tensors) runs as before; :func:`fusion_report` says why.

    Raises TypeError if model is no module, ValueError on another memory_format or defer_bn.

    >>> model = fastconv.fuse(torchvision.models.resnet18())
    >>> loss = model(images).sum()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model expected torch.nn.Module, got {type(model).__name__}")
    if memory_format not in (torch.channels_last, torch.preserve_format):
        raise ValueError(
            f"fuse: memory_format expected torch.channels_last or torch.preserve_format, got {memory_format}"
        )
    if defer_bn not in (False, True, "auto"):
        raise ValueError(f"fuse: defer_bn expected False, True or 'auto', got {defer_bn!r}")
    analysis = Analysis(model)
    planner = Planner(analysis, memory_format, defer_bn)
    plans = {id(module): planner.plan(module) for module in analysis.order}
    if not any(plan.groups for plan in plans.values()):
        return model
    if memory_format == CHANNELS_LAST and (inplace or _twin_is_safe(plans)):
        _convert_weights(analysis, plans)
    return Rebuilder({key: plan for key, plan in plans.items() if plan.functions}, inplace).remake(model)


def _twin_is_safe(plans: dict[int, Plan]) -> bool:
    """Whether the stock model, which shares the weights, works on the channels_last results that they would give it."""
    return not any(plan.views or plan.reason for plan in plans.values())


def _convert_weights(analysis: Analysis, plans: dict[int, Plan]) -> None:
    """Fused convolutions' weights to channels_last, as Module.to(memory_format=) does; the Parameters stay the same."""
    for module in analysis.order:
        for path in plans[id(module)].convs:
            weight = analysis.paths(module)[path].weight
            if weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last):
                plans[id(module)].converted.append(path)
                weight.data = weight.data.to(memory_format=torch.channels_last)


def unfuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The stock model again: what fuse() made of it, undone.

    Every fused container of ``model`` becomes an instance of its stock class; modules, Parameters, buffers, modes,
    hooks and state_dict stay, and so does what was trained. Weights that fuse() put into channels_last become
    contiguous.
    Works on whatever holds fused containers: copies, unpickled models, submodules, wrappers. Without any, the model is
    returned as it is.

    inplace: False returns a model of its own whose containers are copies and whose layers, parameters and buffers are
    shared with ``model``, which stays fused. True changes the containers of ``model`` and returns it.

    Raises TypeError if model is no module.

    >>> stock = fastconv.unfuse(fused)
    >>> torch.save(stock, "model.pt")  # loads where fastconv is not installed
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model expected torch.nn.Module, got {type(model).__name__}")
    return Restorer(inplace).remake(model)


def fusion_report(model: nn.Module, example_input: Any = None) -> FusionReport:
    """Which layers of the model run fused, and which were left and why.

    ``.fused`` is the number of groups, ``.groups`` lists them, ``.left`` lists (name, reason); str() gives a table of
    80 columns and ``.to_json()`` the same as JSON. For a model that fuse() was not called on, everything is left.
    ``.programs`` lists (call, reason) of the calls that the model has had on a CPU, by mode and input: reason is ""
    where they run as one program (see :func:`fuse`).

    example_input: a tensor, or a tuple of the forward's arguments. A copy of the model then runs a training forward on
    it, fused and stock, and the report tells which backend ran each group and how many bytes are kept for the backward.

    Raises TypeError if model is no module, and what the forward raises on the example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report: model expected torch.nn.Module, got {type(model).__name__}")
    if example_input is None:
        return report(model)
    return report(model, example_input if isinstance(example_input, tuple) else (example_input,))
