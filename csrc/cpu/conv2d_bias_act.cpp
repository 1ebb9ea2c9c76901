// Host side of conv2d_bias_act, conv2d_bn_act and conv2d_backward.
//
//   conv2d_bias_act   y = act(conv(x, w) + bias + residual)
//   conv2d_bn_act     y = act(batch_norm(conv(x, w) + bias) + residual)
// The weight is of the input's dtype, or float32 with bfloat16 input (autocast without a copy of the weights); its
// gradient has its dtype. In eval mode without saving, batch norm is the affine map (v - mean) * invstd * weight +
// bias' of the convolution's own epilogue.

#include <torch/library.h>

#include "batch_norm_act.h"
#include "conv2d.h"

namespace fastconv::cpu {
namespace {

std::tuple<at::Tensor, at::Tensor> conv2d_bias_act(const at::Tensor& input, const at::Tensor& weight,
                                                   const OptTensor& bias, const OptTensor& residual,
                                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                                   at::IntArrayRef dilation, int64_t groups,
                                                   c10::string_view activation, bool save_preact) {
  constexpr const char* op = "conv2d_bias_act";
  const PlainDispatch guard;
  const ConvParams p = conv_params(op, input, weight, bias, stride, padding, dilation, groups, true);
  const Act act = parse_act(op, {activation.data(), activation.size()});
  const std::array<int64_t, 4> sizes{p.n, p.k, p.p, p.q};
  check_residual(op, residual, input, sizes);
  const at::MemoryFormat format = conv_format(input, weight);
  ConvEpilogue epilogue;
  if (given(bias)) epilogue.shift = channel_vector(bias, input, p.k, 0.0);
  if (given(residual)) epilogue.residual = nhwc(*residual);
  if (save_preact) epilogue.pre = empty_nhwc(sizes, input.options(), format);
  epilogue.act = act;
  const at::Tensor out = conv_forward(p, input, weight, epilogue, format);
  return {to_format(out, format), save_preact ? to_format(epilogue.pre, format) : no_tensor(input.options())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv2d_bn_act(
    const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias, const OptTensor& residual,
    const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& running_mean, const OptTensor& running_var,
    const OptTensor& num_batches_tracked, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t groups, bool training, std::optional<double> momentum, double eps, c10::string_view activation,
    bool save_for_backward) {
  constexpr const char* op = "conv2d_bn_act";
  const PlainDispatch guard;
  const ConvParams p = conv_params(op, input, weight, bias, stride, padding, dilation, groups, true);
  const Act act = parse_act(op, {activation.data(), activation.size()});
  const std::array<int64_t, 4> sizes{p.n, p.k, p.p, p.q};
  check_residual(op, residual, input, sizes);
  const BatchNormArgs args{bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_batch_norm(op, sizes, input, args, "bn_weight", "bn_bias");
  const at::MemoryFormat format = conv_format(input, weight);
  const at::Tensor res = given(residual) ? nhwc(*residual) : at::Tensor();

  ConvEpilogue epilogue;
  if (!training && !save_for_backward) {
    BatchNormStats stats = eval_stats(input, p.k, args);
    // (conv + bias - mean) * scale + shift
    epilogue.mean = given(bias) ? stats.mean.sub(channel_vector(bias, input, p.k, 0.0)) : stats.mean;
    epilogue.scale = stats.scale;
    if (given(bn_bias)) epilogue.shift = channel_vector(bn_bias, input, p.k, 0.0);
    epilogue.residual = res;
    epilogue.act = act;
    const at::Tensor out = conv_forward(p, input, weight, epilogue, format);
    return {to_format(out, format), no_tensor(input.options()), stats.mean, stats.invstd};
  }
  if (given(bias)) epilogue.shift = channel_vector(bias, input, p.k, 0.0);
  const at::Tensor conv = conv_forward(p, input, weight, epilogue, format);
  const at::Tensor out = save_for_backward ? empty_nhwc(sizes, input.options(), format) : conv;
  BatchNormStats stats = batch_norm_forward(conv, res, out, args, act);
  return {to_format(out, format), save_for_backward ? to_format(conv, format) : no_tensor(input.options()), stats.mean,
          stats.invstd};
}

std::tuple<at::Tensor, at::Tensor> conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                   const at::Tensor& weight, at::IntArrayRef stride,
                                                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                                   std::array<bool, 2> output_mask) {
  constexpr const char* op = "conv2d_backward";
  const PlainDispatch guard;
  const ConvParams p = conv_backward_params(op, grad_output, input, weight, stride, padding, dilation, groups, true);
  auto [dx, dw] = conv_backward(p, grad_output, input, weight, output_mask);
  return {output_mask[0] ? dx : no_tensor(input.options()), output_mask[1] ? dw : no_tensor(weight.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("conv2d_bias_act", &conv2d_bias_act);
  m.impl("conv2d_bn_act", &conv2d_bn_act);
  m.impl("conv2d_backward", &conv2d_backward);
}

}  // namespace fastconv::cpu
