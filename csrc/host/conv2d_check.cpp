// Argument checks and output sizes of the convolutions; rules and texts follow PyTorch's.

#include "conv2d_check.h"

namespace fastconv {

ConvParams conv_params(const char* op, const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       bool wide_weight) {
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  check_dim(op, "weight", weight, 4);
  check_device(op, "weight", weight, input);
  if (!wide_weight || input.scalar_type() != at::kBFloat16 || weight.scalar_type() != at::kFloat)
    check_dtype(op, "weight", weight, input.scalar_type());
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  TORCH_CHECK(groups >= 1, op, ": groups expected at least 1, got ", groups);

  ConvParams p{};
  p.n = input.size(0), p.c = input.size(1), p.h = input.size(2), p.w = input.size(3);
  p.k = weight.size(0), p.r = weight.size(2), p.s = weight.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.dil_h = dilation[0], p.dil_w = dilation[1];
  p.groups = groups;
  TORCH_CHECK(p.k >= 1 && p.r >= 1 && p.s >= 1, op, ": weight expected at least one filter and one tap, got size ",
              weight.sizes());
  TORCH_CHECK(p.k % groups == 0, op, ": weight expected a number of filters that groups=", groups, " divides, got ",
              p.k);
  TORCH_CHECK(weight.size(1) * groups == p.c, op, ": weight has ", weight.size(1),
              " input channels per group, input has ", p.c, " (groups=", groups, ")");
  const int64_t padded_h = p.h + 2 * p.pad_h, padded_w = p.w + 2 * p.pad_w;
  const int64_t extent_h = p.dil_h * (p.r - 1) + 1, extent_w = p.dil_w * (p.s - 1) + 1;
  TORCH_CHECK(padded_h >= extent_h && padded_w >= extent_w, op, ": Calculated padded input size per channel: (",
              padded_h, " x ", padded_w, "). Kernel size: (", extent_h, " x ", extent_w,
              "). Kernel size can't be greater than actual input size");
  p.p = (padded_h - extent_h) / p.stride_h + 1;
  p.q = (padded_w - extent_w) / p.stride_w + 1;
  if (given(bias)) {
    check_device(op, "bias", *bias, input);
    check_strided(op, "bias", *bias);
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.k, op, ": bias expected size [", p.k, "], got ", bias->sizes());
    const auto type = bias->scalar_type();
    TORCH_CHECK(type == input.scalar_type() || type == acc_type(input.scalar_type()), op, ": bias expected dtype ",
                input.scalar_type(), ", got ", type);
  }
  return p;
}

ConvParams conv_backward_params(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                                const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                                at::IntArrayRef dilation, int64_t groups, bool wide_weight) {
  const ConvParams p = conv_params(op, input, weight, {}, stride, padding, dilation, groups, wide_weight);
  check_device(op, "grad_output", grad_output, input);
  check_dtype(op, "grad_output", grad_output, input.scalar_type());
  check_sizes(op, "grad_output", grad_output, {p.n, p.k, p.p, p.q});
  return p;
}

at::MemoryFormat conv_format(const at::Tensor& input, const at::Tensor& weight) {
  const auto last = at::MemoryFormat::ChannelsLast;
  return input.suggest_memory_format() == last || weight.suggest_memory_format() == last ? last
                                                                                         : at::MemoryFormat::Contiguous;
}

}  // namespace fastconv
