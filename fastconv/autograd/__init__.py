"""torch.autograd.Functions over the raw operators: what is saved, what is called, which gradients return.

Each takes the backend's name as its last argument, chosen once in fastconv.functional, and keeps it for the backward.
They are differentiable once: a second backward raises RuntimeError (use ``fastconv.use_backend("aten")`` for it).
"""

from .batch_norm_act import BatchNormActFunction
from .conv2d_bias_act import Conv2dBiasActFunction
from .conv2d_bn_act import Conv2dBnActFunction
from .cross_entropy import CrossEntropyFunction
from .pooling import AdaptiveAvgPool2dFunction, AvgPool2dFunction, MaxPool2dFunction

__all__ = [
    "AdaptiveAvgPool2dFunction",
    "AvgPool2dFunction",
    "BatchNormActFunction",
    "Conv2dBiasActFunction",
    "Conv2dBnActFunction",
    "CrossEntropyFunction",
    "MaxPool2dFunction",
]
