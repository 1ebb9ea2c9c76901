"""Any torchvision classifier, with the head, stem, activation and dropout asked for, and the loss it trains with."""

from __future__ import annotations

import copy
import difflib
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .cifar import socket_timeout
from .errors import ProgramError, UsageError

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "silu": lambda: nn.SiLU(inplace=True),
}
IMAGENET_CLASSES = 1000
DOWNLOAD_STALL_SECONDS = 10


def classifiers() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def check_model(name: str) -> None:
    if name not in classifiers():
        near = difflib.get_close_matches(name, classifiers(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()"
        raise UsageError(f"--model {name}: torchvision has no such classifier; {hint}")


def build_model(args, classes: int, log) -> tuple[nn.Module, str]:
    """The model on the CPU with `classes` outputs, and where its weights came from, in words."""
    model, origin = _base_model(args, log)
    file = None if args.weights is None else _read_weights(args.weights)
    if file is not None and _fits(model, file):  # ImageNet weights, with their own head
        model.load_state_dict(file)
        file, origin = None, f"{args.weights} (its head replaced)"
    head = replace_head(model, classes, args.dropout)
    if args.stem == "cifar":
        _use_cifar_stem(model, args.model)
    if args.activation is not None:
        _replace_activations(model, args)
    if file is not None:
        if not _fits(model, file):
            raise ProgramError(f"--weights {args.weights} does not fit {args.model}: {_difference(model, file)}")
        model.load_state_dict(file)
        origin = str(args.weights)
    if args.freeze_backbone:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(head + "."))
    _check_input(model, args)
    return model, origin


def _base_model(args, log) -> tuple[nn.Module, str]:
    """The torchvision model with its 1000 ImageNet classes: pretrained if asked for, else freshly initialised."""
    if args.pretrained != "no":
        try:
            return _pretrained(args.model), "ImageNet weights of torchvision (IMAGENET1K)"
        except (OSError, RuntimeError) as error:  # no network, or a download with a wrong checksum
            reason = f"the ImageNet weights of {args.model} could not be fetched: {error}"
            if args.pretrained == "required":
                raise ProgramError(
                    f"--pretrained: {reason}. Load a local state_dict with --weights FILE, or leave --pretrained out."
                ) from error
            log(f"note: {reason}; training starts from random weights")
            return _fresh(args), f"random, because {reason}"
    return _fresh(args), "random"


def _pretrained(name: str) -> nn.Module:
    choices = torchvision.models.get_model_weights(name)
    weights = getattr(choices, "IMAGENET1K_V1", None) or choices.DEFAULT  # V1 is what `pretrained=True` used to load
    with socket_timeout(DOWNLOAD_STALL_SECONDS):
        model = torchvision.models.get_model(name, weights=weights)
    if getattr(model, "aux_logits", False):  # the second heads of GoogLeNet and Inception have no target here
        model.aux_logits = False
        model.AuxLogits = None
    return model


def _fresh(args) -> nn.Module:
    options = {}
    if args.model in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif args.model.startswith("vit_"):
        options = {"image_size": args.image_size}
    return torchvision.models.get_model(args.model, weights=None, **options)


def replace_head(model: nn.Module, classes: int, dropout: float | None) -> str:
    """Gives the last layer (linear, or SqueezeNet's 1x1 convolution) `classes` outputs, with dropout before it.

    Returns the name of the new head in the model.
    """
    name, old = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and IMAGENET_CLASSES in module.weight.shape[:1]
    ][-1]
    has_bias = old.bias is not None
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, classes, bias=has_bias)
    else:
        new = nn.Conv2d(old.in_channels, classes, old.kernel_size, old.stride, old.padding, bias=has_bias)
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if dropout is not None:
        own = [module for module in parent.children() if isinstance(module, nn.Dropout)] if parent_name else []
        if own:  # VGG, SqueezeNet, MobileNet, ... have a dropout layer there: set its rate
            for module in own:
                module.p = dropout
        else:
            new = nn.Sequential(nn.Dropout(dropout), new)
    setattr(parent, leaf, new)
    if hasattr(model, "num_classes"):
        model.num_classes = classes
    return name


def _use_cifar_stem(model: nn.Module, name: str) -> None:
    """He et al. 2016, section 4.2: at 32 pixels a 3x3 stride-1 convolution and no max-pooling come first."""
    if not isinstance(model, torchvision.models.ResNet):
        raise UsageError(f"--stem cifar is for ResNets (conv1 and maxpool are replaced); --model is {name}")
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _replace_activations(model: nn.Module, args) -> None:
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(parent, name, ACTIVATIONS[args.activation]())
                found += 1
    if not found:
        raise UsageError(
            f"--activation {args.activation}: {args.model} has no nn.ReLU layers to replace "
            f"(it calls the activation as a function, or uses another)"
        )


def _check_input(model: nn.Module, args) -> None:
    """One forward pass on the meta device: shapes without arithmetic. Finds models that cannot take small images."""
    probe = copy.deepcopy(model).to("meta").train()
    batch = min(args.batch_size, 2)
    images = torch.empty(batch, 3, args.image_size, args.image_size, device="meta")
    try:
        with torch.no_grad():
            probe(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        size = args.image_size
        hint = "try --image-size 224" if batch > 1 else "try --batch-size 2 or more, or --image-size 224"
        raise UsageError(
            f"{args.model} cannot train on batches of {args.batch_size} images of {size}x{size} pixels: "
            f"{first_line}; {hint}"
        ) from error


# ------------------------------------------------------------------------------------------------------ weight files


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProgramError(f"--weights {path} cannot be read as a state_dict: {first_line}") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ProgramError(f"--weights {path} is no state_dict (a dictionary of tensors by name)")
    return state


def _fits(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(own[name].shape == state[name].shape for name in own)


def _difference(model: nn.Module, state: dict[str, Tensor]) -> str:
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    parts = []
    for label, items in (("missing", missing), ("unknown", unknown), ("shape", shapes)):
        if items:
            more = f" and {len(items) - 3} more" if len(items) > 3 else ""
            parts.append(f"{label}: {', '.join(items[:3])}{more}")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------------------------ losses


class OneHotLoss(nn.Module):
    """mse or kl between the logits [N, C] and the (smoothed) one-hot code of class indices [N]. Returns a scalar.

    mse: mean squared error of the logits themselves, as Hui & Belkin 2021 ("Evaluation of Neural Architectures Trained
         with Square Loss vs Cross-Entropy") train classifiers; through a softmax its gradient would vanish.
    kl:  KL(target || softmax(logits)), summed over classes, mean over the batch. Without label smoothing this is the
         cross-entropy; with it, the cross-entropy less the constant entropy of the target.
    """

    def __init__(self, kind: str, label_smoothing: float) -> None:
        super().__init__()
        self.kind, self.label_smoothing = kind, label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        classes = logits.shape[1]
        target = F.one_hot(labels, classes).float()
        target = target * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.kind == "mse":
            return F.mse_loss(logits.float(), target)
        return F.kl_div(F.log_softmax(logits.float(), dim=1), target, reduction="batchmean")


def build_loss(args, backend: str) -> nn.Module:
    if args.loss != "cross_entropy":
        return OneHotLoss(args.loss, args.label_smoothing)
    if backend == "fastconv":
        import fastconv.nn

        return fastconv.nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    return nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
