"""The named shapes of the suite: ResNet50's own first (32x32 images, reduced batch), then the hostile ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def lay(t: Tensor, layout: str) -> Tensor:
    """The values of a contiguous 4-d ``t`` in another memory layout.

    nchw, nhwc      dense
    strided         every second element of a larger NCHW tensor in h and w
    nhwc_strided    every second column of a larger channels_last tensor
    channel_slice   some channels of a wider channels_last tensor: pixels lie further apart than C
    transposed      h and w swapped in memory
    offset          dense channels_last that starts one element off, so that no vector load is aligned
    expanded        one image seen n times (stride 0)
    """
    n, c, h, w = t.shape
    if layout == "nchw":
        return t.contiguous()
    if layout == "nhwc":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        big = torch.full((n, c, 2 * h, 2 * w), 7.0, dtype=t.dtype, device=t.device)
        big[:, :, ::2, ::2] = t
        return big[:, :, ::2, ::2]
    if layout == "nhwc_strided":
        big = torch.full((n, h, 2 * w, c), 7.0, dtype=t.dtype, device=t.device)
        big[:, :, ::2] = t.permute(0, 2, 3, 1)
        return big[:, :, ::2].permute(0, 3, 1, 2)
    if layout == "channel_slice":
        big = torch.full((n, h, w, c + 3), 7.0, dtype=t.dtype, device=t.device)
        big[..., 1 : c + 1] = t.permute(0, 2, 3, 1)
        return big[..., 1 : c + 1].permute(0, 3, 1, 2)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":
        flat = torch.full((t.numel() + 1,), 7.0, dtype=t.dtype, device=t.device)
        flat[1:] = t.permute(0, 2, 3, 1).reshape(-1)
        return flat[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    if layout == "expanded":
        return t[:1].expand(n, -1, -1, -1)
    raise ValueError(layout)


LAYOUTS = ("nchw", "nhwc", "strided", "nhwc_strided", "channel_slice", "transposed", "offset", "expanded")


@dataclass(frozen=True)
class Conv:
    """A convolution: input [n, c, h, w], weight [k, c/groups, *kernel]."""

    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    layout: str = "nhwc"
    bias: bool = True
    residual: bool = False
    unbatched: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def geometry(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
        """input, weight, bias, residual: unit variance before and (about) after the convolution."""
        fan_in = self.c // self.groups * self.kernel[0] * self.kernel[1]
        input = lay(torch.randn(self.n, self.c, self.h, self.w, device=device).to(dtype), self.layout)
        weight = torch.randn(self.k, self.c // self.groups, *self.kernel, device=device) / max(fan_in, 1) ** 0.5
        if self.unbatched:
            input = input.squeeze(0)
        out = torch.nn.functional.conv2d(input[..., :1].new_empty(input.shape, device="meta"),
                                         weight.to("meta", dtype), None, **self.geometry)  # fmt: skip
        return {
            "input": input,
            "weight": lay(weight.to(dtype), "nhwc" if self.layout == "nhwc" else "nchw"),
            "bias": torch.randn(self.k, device=device).to(dtype) if self.bias else None,
            "residual": torch.randn(out.shape, device=device).to(dtype) if self.residual else None,
        }


RESNET50 = (
    Conv("stem", 2, 3, 32, 32, 64, (7, 7), 2, 3, bias=False),
    Conv("layer1_reduce", 2, 256, 8, 8, 64, (1, 1), bias=False),
    Conv("layer1_3x3", 2, 64, 8, 8, 64, padding=1, bias=False),
    Conv("layer1_expand", 2, 64, 8, 8, 256, (1, 1), bias=False, residual=True),
    Conv("layer2_3x3_stride2", 2, 128, 8, 8, 128, stride=2, padding=1, bias=False),
    Conv("layer2_downsample", 2, 256, 8, 8, 512, (1, 1), 2, bias=False),
    Conv("layer3_3x3", 2, 256, 2, 2, 256, padding=1, bias=False),
    Conv("layer3_expand", 2, 256, 2, 2, 1024, (1, 1), bias=False, residual=True),
    Conv("layer4_3x3_stride2", 4, 512, 2, 2, 512, stride=2, padding=1, bias=False),
    Conv("layer4_3x3_at_1x1", 4, 512, 1, 1, 512, padding=1, bias=False),
    Conv("layer4_expand", 4, 512, 1, 1, 2048, (1, 1), bias=False, residual=True),
    Conv("layer4_downsample", 4, 1024, 2, 2, 2048, (1, 1), 2, bias=False),
)

HOSTILE = (
    Conv("one_pixel", 1, 1, 1, 1, 1, (1, 1)),
    Conv("one_channel_in", 2, 1, 9, 7, 5, padding=1),
    Conv("one_channel_out", 2, 5, 9, 7, 1, padding=1),
    Conv("one_channel_nchw", 2, 1, 6, 6, 1, layout="nchw", padding=1, residual=True),
    Conv("few_filters", 2, 64, 17, 16, 3, padding=1, residual=True),
    Conv("few_filters_1x1", 2, 64, 17, 16, 3, (1, 1)),
    Conv("prime_channels", 3, 13, 7, 5, 17, padding=1, residual=True),
    Conv("prime_channels_1x1", 3, 31, 5, 3, 37, (1, 1), residual=True),
    Conv("channels_past_a_vector", 2, 33, 6, 6, 65, padding=1),
    Conv("nchw", 2, 6, 8, 8, 10, padding=1, layout="nchw", residual=True),
    Conv("nchw_1x1", 2, 6, 8, 8, 10, (1, 1), layout="nchw", residual=True),
    Conv("padded_3x3_on_1x1", 9, 7, 1, 1, 9, padding=1, residual=True),
    Conv("padded_5x5_on_1x1", 9, 7, 1, 1, 9, (5, 5), padding=2),
    Conv("padded_3x3_on_2x2", 3, 7, 2, 2, 9, padding=1),
    Conv("stride2_on_2x2", 3, 7, 2, 2, 9, stride=2, padding=1),
    Conv("stride2_on_odd", 2, 6, 7, 5, 8, stride=2, padding=1),
    Conv("stride_over_kernel", 2, 4, 11, 11, 6, (2, 2), stride=4),
    Conv("stride_over_kernel_1x1", 2, 4, 10, 10, 6, (1, 1), stride=3),
    Conv("padded_1x1", 2, 4, 5, 5, 6, (1, 1), padding=2),
    Conv("asymmetric", 2, 5, 11, 9, 7, (3, 5), (2, 1), (0, 2), (1, 1)),
    Conv("dilated", 2, 6, 11, 11, 7, dilation=2, padding=2),
    Conv("dilated_asymmetric", 2, 4, 13, 12, 5, (3, 2), (2, 3), (2, 1), (3, 2)),
    Conv("groups", 2, 12, 6, 6, 18, padding=1, groups=3, residual=True),
    Conv("groups_stride2", 2, 8, 7, 7, 8, stride=2, padding=1, groups=2),
    Conv("groups_nchw", 2, 8, 6, 6, 12, padding=1, groups=4, layout="nchw"),
    Conv("depthwise", 2, 11, 7, 7, 11, padding=1, groups=11),
    Conv("depthwise_multiplier", 2, 5, 7, 7, 15, stride=2, padding=1, groups=5),
    Conv("same", 2, 4, 6, 7, 5, (3, 3), padding="same"),
    Conv("same_even_kernel", 2, 4, 6, 7, 5, (2, 4), padding="same"),
    Conv("same_even_dilated", 2, 4, 8, 8, 5, (4, 3), padding="same", dilation=(3, 2)),
    Conv("valid", 2, 4, 6, 6, 5, (3, 3), padding="valid"),
    Conv("large_kernel", 2, 3, 15, 14, 4, (11, 9), padding=(5, 4)),
    Conv("kernel_is_input", 6, 6, 5, 4, 8, (5, 4)),
    Conv("padding_over_kernel", 2, 3, 4, 4, 4, (2, 2), padding=3),
    Conv("long_row", 1, 3, 1, 67, 4, (1, 5), padding=(0, 2)),
    Conv("tall_column", 1, 3, 67, 1, 4, (5, 1), stride=(2, 1), padding=(2, 0)),
    Conv("batch_one", 1, 8, 6, 6, 8, padding=1),
    Conv("batch_odd", 7, 3, 4, 4, 5, padding=1, bias=False),
    Conv("unbatched", 1, 4, 6, 6, 5, padding=1, layout="nchw", residual=True, unbatched=True),
)

EMPTY = (
    Conv("empty_batch", 0, 4, 6, 6, 5, padding=1, residual=True),
    Conv("empty_batch_nchw", 0, 4, 6, 6, 5, padding=1, layout="nchw"),
    Conv("empty_batch_1x1", 0, 4, 1, 1, 5, (1, 1)),
)

CONVS = RESNET50 + HOSTILE

# What each layout and dtype test that is not about geometry uses: small, no multiple of a vector.
SMALL = Conv("small", 2, 6, 5, 7, 10, padding=1, residual=True)


@dataclass(frozen=True)
class Pool:
    """A pooling window over input [n, c, h, w]."""

    name: str
    n: int
    c: int
    h: int
    w: int
    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int] | None = None
    padding: int | tuple[int, int] = 0
    dilation: int | tuple[int, int] = 1
    ceil_mode: bool = False
    layout: str = "nhwc"

    def __str__(self) -> str:
        return self.name

    def input(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        return lay(torch.randn(self.n, self.c, self.h, self.w, device=device).to(dtype), self.layout)


POOLS = (
    Pool("stem", 2, 64, 16, 16, 3, 2, 1),
    Pool("vgg", 2, 64, 8, 8, 2, 2),
    Pool("squeezenet", 2, 32, 15, 15, 3, 2, ceil_mode=True),
    Pool("global", 2, 65, 4, 4, 4),
    Pool("one_pixel", 1, 1, 1, 1, 1),
    Pool("one_channel", 2, 1, 6, 5, 2),
    Pool("prime_channels", 3, 13, 7, 5, 3, 1, 1),
    Pool("channels_past_a_vector", 1, 33, 5, 5, 2, 1),
    Pool("nchw", 2, 5, 9, 8, 3, 2, 1, layout="nchw"),
    Pool("asymmetric", 2, 4, 9, 12, (2, 5), (3, 1), (1, 2)),
    Pool("stride_over_kernel", 2, 4, 11, 11, 2, 5),
    Pool("overlapping", 2, 4, 8, 8, 5, 1, 2),
    Pool("ceil_drops_last", 2, 3, 5, 5, 2, 2, 1, ceil_mode=True),
    Pool("ceil_partial", 2, 3, 7, 10, (3, 4), (2, 3), (0, 1), ceil_mode=True),
    Pool("window_256", 1, 3, 17, 17, 16, 1),
    Pool("batch_odd", 7, 3, 4, 4, 2),
    Pool("strided", 2, 6, 6, 6, 3, 2, 1, layout="strided"),
    Pool("channel_slice", 2, 6, 6, 6, 3, 2, 1, layout="channel_slice"),
    Pool("offset", 2, 6, 6, 6, 3, 2, 1, layout="offset"),
    Pool("transposed", 2, 6, 6, 5, 3, 2, 1, layout="transposed"),
    Pool("expanded", 2, 6, 6, 5, 3, 2, 1, layout="expanded"),
)
# Only max pooling has a dilation.
DILATED_POOLS = (
    Pool("dilated", 2, 5, 11, 11, 3, 2, 1, 2),
    Pool("dilated_asymmetric", 2, 5, 12, 9, (2, 3), (1, 2), (1, 0), (4, 3), ceil_mode=True),
)
