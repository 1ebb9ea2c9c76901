"""Batch norm in evaluation as one scale and one shift per channel, for the convolution's epilogue.

    scale = weight / sqrt(running_var + eps)        shift = (bias_conv - running_mean) * scale + bias_bn

[K] vectors, fp32 out; save_mean and save_invstd come along. A few KB: one launch in place of six of PyTorch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_act import affine
from .common import WARPS, cdiv, channel_pair, launch


@triton.jit
def fold_kernel(
    out_ptr, mean_ptr, invstd_ptr, conv_bias_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, K, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [2, K]: scale, shift."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(running_mean_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    invstd = 1.0 / tl.sqrt(tl.load(running_var_ptr + k, mask=k < K, other=1.0).to(tl.float32) + eps)
    scale, shift = affine(weight_ptr, bias_ptr, invstd, k, K)
    centre = -mean
    if conv_bias_ptr is not None:
        centre += tl.load(conv_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + k, scale, mask=k < K)
    tl.store(out_ptr + K + k, centre * scale + shift, mask=k < K)
    tl.store(mean_ptr + k, mean, mask=k < K)
    tl.store(invstd_ptr + k, invstd, mask=k < K)


def fold_statistics(
    conv_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(scale, shift, save_mean, save_invstd), each [K] fp32."""
    k = running_mean.numel()
    out = torch.empty(2, k, dtype=torch.float32, device=running_mean.device)
    mean, invstd = channel_pair(running_mean, k)
    launch(
        fold_kernel, (cdiv(k, 256),), out, mean, invstd, conv_bias, weight, bias, running_mean, running_var, k, eps,
        BLOCK=256, num_warps=WARPS,
    )  # fmt: skip
    return *out.unbind(0), mean, invstd
