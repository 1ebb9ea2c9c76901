"""Drop-in layers: subclasses of torch.nn's, with the same arguments and the same state_dict.

``import fastconv.nn as fnn``; each layer calls the function of :mod:`fastconv.functional` with its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks as check
from . import functional as FF

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNormAct2d",
    "Conv2dBiasAct",
    "Conv2dBiasReLU",
    "CrossEntropyLoss",
    "MaxPool2d",
]


class Conv2dBiasAct(nn.Conv2d):
    """act(conv2d(input) + bias + residual): :class:`torch.nn.Conv2d`, its arguments, and ``activation``.

    activation: identity, relu, relu6, leaky_relu (slope 0.01), sigmoid, tanh, silu, gelu or hardswish.

    Shapes: input [N, C, H, W] or [C, H, W], residual (optional) as the output [N, K, P, Q].

    >>> layer = fnn.Conv2dBiasAct(64, 128, 3, padding=1, activation="silu")
    >>> y = layer(torch.randn(8, 64, 32, 32))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
    ) -> None:
        check.activation(type(self).__name__, activation)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return FF.conv2d_bias_act(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class Conv2dBiasReLU(Conv2dBiasAct):
    """relu(conv2d(input) + bias + residual): :class:`Conv2dBiasAct` with its default activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class BatchNormAct2d(nn.BatchNorm2d):
    """act(batch_norm(input) + residual): :class:`torch.nn.BatchNorm2d`, its arguments, and ``activation``.

    Shapes: input and residual (optional) [N, C, H, W].

    >>> layer = fnn.BatchNormAct2d(64)
    >>> y = layer(x, residual=shortcut)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
    ) -> None:
        check.activation(type(self).__name__, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        # As torch.nn.BatchNorm2d: without running statistics evaluation uses the batch's own, too, and statistics
        # that are not tracked are neither read nor written in training.
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        return FF.batch_norm_act(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            batch_statistics,
            self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            num_batches_tracked=self.num_batches_tracked if self.training and self.track_running_stats else None,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` through :func:`fastconv.functional.max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return FF.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` through :func:`fastconv.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return FF.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` through :func:`fastconv.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return FF.adaptive_avg_pool2d(input, self.output_size)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` through :func:`fastconv.functional.cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return FF.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
