// Host side of the pools and their backwards: check -> allocate -> launch.

#include <torch/library.h>

#include "../host/pool_check.h"
#include "host.h"

namespace fastconv::cuda {
namespace {

PoolShape pool_shape(const char* op, const PoolParams& a, PoolKind kind, bool offsets, int64_t divisor_override = 0) {
  check_limit(op, pool_limit(a, kind, offsets, divisor_override));
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  PoolShape g{};
  g.n = i(a.n), g.h = i(a.h), g.w = i(a.w), g.c = i(a.c), g.p = i(a.p), g.q = i(a.q), g.r = i(a.r), g.s = i(a.s);
  g.stride_h = i(a.stride_h), g.stride_w = i(a.stride_w), g.pad_h = i(a.pad_h), g.pad_w = i(a.pad_w);
  g.dil_h = i(a.dil_h), g.dil_w = i(a.dil_w);
  g.divisor_override = i(divisor_override);
  return g;
}

// in -> a new tensor of `sizes` in `format`; offsets as the kernel of `kind` needs them.
at::Tensor run(const char* op, PoolKind kind, bool backward, const at::Tensor& in, at::IntArrayRef sizes,
               at::MemoryFormat format, const at::Tensor& offsets, const PoolShape& shape) {
  const at::Tensor out = empty_nhwc(sizes, in.options(), format);
  PoolCall call{};
  call.dtype = dtype_number(op, in);
  if (out.numel() == 0) return to_format(out, format);
  if (in.numel() == 0) return to_format(out.zero_(), format);  // the gradient of an empty output
  const Device device(in);
  const at::Tensor dense = nhwc(in);
  call.in = raw(dense), call.out = raw(out), call.offsets = data<uint8_t>(offsets);
  call.shape = shape, call.kind = kind, call.backward = backward;
  check_launch(op, pool(call, device.stream()));
  return to_format(out, format);
}

std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                              bool ceil_mode, bool save_offsets) {
  constexpr const char* op = "max_pool2d";
  const PlainDispatch guard;
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  const PoolParams a = pool_params(op, input.sizes(), kernel_size, stride, padding, dilation, ceil_mode);
  if (save_offsets) check_area(op, a);
  const PoolShape shape = pool_shape(op, a, PoolKind::kMax, save_offsets);
  const at::MemoryFormat format = input.suggest_memory_format();
  const std::array<int64_t, 4> sizes{a.n, a.c, a.p, a.q};
  const auto bytes = input.options().dtype(at::kByte);
  const at::Tensor offsets = save_offsets ? empty_nhwc(sizes, bytes, format) : no_tensor(bytes);
  const at::Tensor out = run(op, PoolKind::kMax, false, input, sizes, format, offsets, shape);
  return {out, save_offsets ? to_format(offsets, format) : offsets};
}

at::Tensor max_pool2d_backward(const at::Tensor& grad_output, const at::Tensor& offsets, at::IntArrayRef input_size,
                               at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool channels_last) {
  constexpr const char* op = "max_pool2d_backward";
  const PlainDispatch guard;
  const PoolParams a =
      max_pool_backward_params(op, grad_output, offsets, input_size, kernel_size, stride, padding, dilation);
  const std::array<int64_t, 4> sizes{a.n, a.c, a.h, a.w};
  return run(op, PoolKind::kMax, true, grad_output, sizes, memory_format(channels_last), nhwc(offsets),
             pool_shape(op, a, PoolKind::kMax, true));
}

PoolShape average_shape(const char* op, at::IntArrayRef sizes, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                        at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                        std::optional<int64_t> divisor_override) {
  PoolShape g = pool_shape(op, avg_pool_params(op, sizes, kernel_size, stride, padding, ceil_mode, divisor_override),
                           PoolKind::kAvg, false, divisor_override.value_or(0));
  g.count_include_pad = count_include_pad;
  return g;
}

at::Tensor avg_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                      std::optional<int64_t> divisor_override) {
  constexpr const char* op = "avg_pool2d";
  const PlainDispatch guard;
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  const PoolShape g =
      average_shape(op, input.sizes(), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override);
  return run(op, PoolKind::kAvg, false, input, {g.n, g.c, g.p, g.q}, input.suggest_memory_format(), {}, g);
}

at::Tensor avg_pool2d_backward(const at::Tensor& grad_output, at::IntArrayRef input_size, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                               std::optional<int64_t> divisor_override, bool channels_last) {
  constexpr const char* op = "avg_pool2d_backward";
  const PlainDispatch guard;
  check_float(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4);
  check_pair(op, "input_size", input_size, 1);
  const int64_t sizes[4] = {grad_output.size(0), grad_output.size(1), input_size[0], input_size[1]};
  const PoolShape g =
      average_shape(op, sizes, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override);
  check_sizes(op, "grad_output", grad_output, {g.n, g.c, g.p, g.q});
  return run(op, PoolKind::kAvg, true, grad_output, sizes, memory_format(channels_last), {}, g);
}

PoolShape adaptive_shape(const char* op, int64_t n, int64_t c, int64_t h, int64_t w, int64_t p, int64_t q) {
  PoolParams a{};
  a.n = n, a.c = c, a.h = h, a.w = w, a.p = p, a.q = q;
  return pool_shape(op, a, PoolKind::kAdaptiveAvg, false);
}

at::Tensor adaptive_avg_pool2d(const at::Tensor& input, at::IntArrayRef output_size) {
  constexpr const char* op = "adaptive_avg_pool2d";
  const PlainDispatch guard;
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  check_pair(op, "output_size", output_size, 0);
  check_positions(op, input.sizes().slice(1));
  const std::array<int64_t, 4> sizes{input.size(0), input.size(1), output_size[0], output_size[1]};
  return run(op, PoolKind::kAdaptiveAvg, false, input, sizes, input.suggest_memory_format(), {},
             adaptive_shape(op, sizes[0], sizes[1], input.size(2), input.size(3), sizes[2], sizes[3]));
}

at::Tensor adaptive_avg_pool2d_backward(const at::Tensor& grad_output, at::IntArrayRef input_size, bool channels_last) {
  constexpr const char* op = "adaptive_avg_pool2d_backward";
  const PlainDispatch guard;
  check_float(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4);
  check_pair(op, "input_size", input_size, 1);
  const std::array<int64_t, 4> sizes{grad_output.size(0), grad_output.size(1), input_size[0], input_size[1]};
  return run(op, PoolKind::kAdaptiveAvg, true, grad_output, sizes, memory_format(channels_last), {},
             adaptive_shape(op, sizes[0], sizes[1], sizes[2], sizes[3], grad_output.size(2), grad_output.size(3)));
}

}  // namespace

FASTCONV_GPU_OPERATORS(m) {
  m.impl("max_pool2d", &max_pool2d);
  m.impl("max_pool2d_backward", &max_pool2d_backward);
  m.impl("avg_pool2d", &avg_pool2d);
  m.impl("avg_pool2d_backward", &avg_pool2d_backward);
  m.impl("adaptive_avg_pool2d", &adaptive_avg_pool2d);
  m.impl("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward);
}

}  // namespace fastconv::cuda
