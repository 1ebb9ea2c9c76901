// Sizes and checks of the pools, for every device; the rules and texts are PyTorch's.
#pragma once

#include "tensor.h"

namespace fastconv {

// With ceil_mode, the last window must start inside the input or the left padding.
inline int64_t pool_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dil, bool ceil_mode) {
  const int64_t span = in + 2 * pad - dil * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  int64_t out = (span >= 0 ? span / stride : -((-span + stride - 1) / stride)) + 1;  // rounds down
  if (ceil_mode && (out - 1) * stride >= in + pad) --out;
  return out;
}

inline PoolParams pool_params(const char* op, at::IntArrayRef input, at::IntArrayRef kernel, at::IntArrayRef stride,
                              at::IntArrayRef pad, at::IntArrayRef dil, bool ceil_mode) {
  check_pair(op, "kernel_size", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", pad, 0);
  check_pair(op, "dilation", dil, 1);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(pad[i] <= ((kernel[i] - 1) * dil[i] + 1) / 2, op,
                ": pad should be at most half of effective kernel size, but got pad=", pad[i],
                ", kernel_size=", kernel[i], " and dilation=", dil[i]);
  }
  TORCH_CHECK(input[1] > 0 && input[2] > 0 && input[3] > 0, op,
              ": input expected non-zero size in all dimensions but the batch, got ", input);
  PoolParams a{};
  a.n = input[0], a.c = input[1], a.h = input[2], a.w = input[3];
  a.r = kernel[0], a.s = kernel[1];
  a.stride_h = stride[0], a.stride_w = stride[1];
  a.pad_h = pad[0], a.pad_w = pad[1];
  a.dil_h = dil[0], a.dil_w = dil[1];
  a.p = pool_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h, ceil_mode);
  a.q = pool_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w, ceil_mode);
  TORCH_CHECK(a.p >= 1 && a.q >= 1, op, ": Given input size: (", a.c, "x", a.h, "x", a.w,
              "). Calculated output size: (", a.c, "x", a.p, "x", a.q, "). Output size is too small");
  return a;
}

inline PoolParams avg_pool_params(const char* op, at::IntArrayRef input, at::IntArrayRef kernel, at::IntArrayRef stride,
                                  at::IntArrayRef pad, bool ceil_mode, std::optional<int64_t> divisor_override) {
  TORCH_CHECK(divisor_override.value_or(1) != 0, op, ": divisor must be not zero");
  const int64_t ones[2] = {1, 1};
  return pool_params(op, input, kernel, stride, pad, ones, ceil_mode);
}

// Of adaptive pooling: the input's sizes but the batch.
inline void check_positions(const char* op, at::IntArrayRef channels_and_positions) {
  for (int64_t size : channels_and_positions) {
    TORCH_CHECK(size > 0, op, ": Expected input to have non-zero size for non-batch dimensions, but input has size ",
                channels_and_positions, " there");
  }
}

inline void check_area(const char* op, const PoolParams& a) {
  TORCH_CHECK(a.r * a.s <= 256, op, ": kernel_size expected an area of at most 256 (offsets are uint8), got ", a.r, "x",
              a.s);
}

// Of max_pool2d_backward: p and q are grad_output's, which may come from a forward with ceil_mode or without.
inline PoolParams max_pool_backward_params(const char* op, const at::Tensor& grad_output, const at::Tensor& offsets,
                                           at::IntArrayRef input_size, at::IntArrayRef kernel_size,
                                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_float(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4);
  check_device(op, "offsets", offsets, grad_output);
  check_dtype(op, "offsets", offsets, at::kByte);
  check_sizes(op, "offsets", offsets, grad_output.sizes());
  check_pair(op, "input_size", input_size, 1);
  const int64_t sizes[4] = {grad_output.size(0), grad_output.size(1), input_size[0], input_size[1]};
  PoolParams a = pool_params(op, sizes, kernel_size, stride, padding, dilation, false);
  check_area(op, a);
  // Whether the forward pass rounded up is seen from the output's size.
  const int64_t p = pool_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h, true),
                q = pool_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w, true);
  const int64_t got_p = grad_output.size(2), got_q = grad_output.size(3);
  TORCH_CHECK((got_p == a.p && got_q == a.q) || (got_p == p && got_q == q), op, ": grad_output expected spatial size ",
              a.p, "x", a.q, " (or ", p, "x", q, " with ceil_mode), got ", got_p, "x", got_q);
  a.p = got_p, a.q = got_q;
  return a;
}

}  // namespace fastconv
