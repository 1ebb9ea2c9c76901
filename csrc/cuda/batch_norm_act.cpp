// Host side of batch_norm_act and conv2d_bn_act: check -> allocate -> launch.
//
// In training conv2d_bn_act takes the statistics from the convolution's epilogue; in evaluation without saving, batch
// norm is that epilogue's scale and shift.

#include "batch_norm_act.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace fastconv::cuda {
namespace {

// The running statistics as the kernels write them: contiguous, of one dtype out of fp32 and the input's. Others are
// copied for the launch and written back behind it.
class Running {
 public:
  Running(const BatchNormArgs& args, at::ScalarType own) : mean_(args.running_mean), var_(args.running_var) {
    mean = vector_or_none(mean_), var = vector_or_none(var_);
    fp32 = same_precision(mean, var, own);
  }
  void write_back() const {
    finish(mean_, mean);
    finish(var_, var);
  }
  at::Tensor mean, var;
  bool fp32;

 private:
  static void finish(const OptTensor& original, const at::Tensor& work) {
    if (!given(original)) return;
    if (!work.is_same(*original)) original->copy_(work);
    if (!original->is_inference()) original->unsafeGetTensorImpl()->bump_version();
  }
  const OptTensor &mean_, &var_;
};

}  // namespace

BatchNormStats batch_norm_forward(const char* op, const Device& device, const at::Tensor& x, const at::Tensor& residual,
                                  const at::Tensor& out, const BatchNormArgs& args, Act act, const ConvRest& rest,
                                  const at::Tensor& conv_bias) {
  const int64_t channels = x.size(1);
  const auto options = acc_options(x);
  BatchNormStats stats{at::empty({channels}, options), at::empty({channels}, options)};
  NormCall call{};
  call.dtype = dtype_number(op, x);
  const OptTensor& count = args.num_batches_tracked;
  const bool counts = args.training && given(count);
  if (counts && !count->is_inference()) count->unsafeGetTensorImpl()->bump_version();
  if (x.numel() == 0) {  // nothing to launch on; the batch counts all the same
    if (counts) count->add_(1);
    stats.mean.zero_(), stats.invstd.zero_();
    return stats;
  }
  at::Tensor weight = vector_or_none(args.weight), bias = vector_or_none(args.bias);
  call.params_float = same_precision(weight, bias, x.scalar_type());
  Running running(args, x.scalar_type());
  call.running_float = running.fp32;
  call.x = raw(x), call.residual = raw(residual), call.y = raw(out);
  call.weight = raw(weight), call.bias = raw(bias);
  call.running_mean = raw(running.mean), call.running_var = raw(running.var);
  call.batches = counts ? count->data_ptr() : nullptr;
  call.save_mean = data<float>(stats.mean), call.save_invstd = data<float>(stats.invstd);
  call.channels = checked_channels(op, channels);
  call.rows = x.numel() / channels;
  call.training = args.training;
  call.act = static_cast<int>(act);
  call.blocks = column_blocks(device), call.min_rows = kMinRows;
  call.eps = static_cast<float>(args.eps);
  const bool tracks = running.mean.defined() || running.var.defined();
  call.momentum = args.momentum.has_value() ? static_cast<float>(*args.momentum) : (tracks ? -1.0f : 0.0f);
  at::Tensor workspace;
  const at::Tensor extra = conv_bias.defined() ? conv_bias.contiguous() : conv_bias;
  if (args.training && rest.part_rows > 0) {
    call.part_rows = rest.part_rows;
    call.part_mean = data<float>(rest.mean), call.part_m2 = data<float>(rest.m2);
  } else if (rest.splits > 0) {
    call.split = {const_data<float>(rest.parts), nullptr, raw(extra), rest.splits, is_fp32(extra)};
  } else if (args.training) {
    const int chunks = most_column_chunks(call.dtype, call.rows, call.channels, call.blocks, call.min_rows);
    workspace = at::empty({2, chunks, channels}, options);
    call.part_mean = data<float>(workspace), call.part_m2 = call.part_mean + chunks * channels;
  }
  check_launch(op, batch_norm(call, device.stream()));
  if (args.training) running.write_back();
  return stats;
}

BatchNormScale fold_batch_norm(const char* op, const Device& device, const at::Tensor& like, int64_t channels,
                               const BatchNormArgs& args, const OptTensor& conv_bias) {
  const at::Tensor all = at::empty({4, channels}, acc_options(like));
  BatchNormScale fold{all[0], all[1], {at::empty({channels}, all.options()), at::empty({channels}, all.options())}};
  at::Tensor weight = vector_or_none(args.weight), bias = vector_or_none(args.bias);
  at::Tensor mean = vector_or_none(args.running_mean), var = vector_or_none(args.running_var);
  const at::Tensor extra = vector_or_none(conv_bias);
  NormFoldCall call{};
  call.dtype = dtype_number(op, like);
  call.params_float = same_precision(weight, bias, like.scalar_type());
  call.running_float = same_precision(mean, var, like.scalar_type());
  call.conv_bias_float = is_fp32(extra);
  call.weight = raw(weight), call.bias = raw(bias), call.running_mean = raw(mean), call.running_var = raw(var);
  call.conv_bias = raw(extra);
  call.scale = data<float>(fold.scale), call.shift = data<float>(fold.shift);
  call.mean = data<float>(fold.stats.mean), call.invstd = data<float>(fold.stats.invstd);
  call.channels = checked_channels(op, channels);
  call.eps = static_cast<float>(args.eps);
  check_launch(op, batch_norm_fold(call, device.stream()));
  return fold;
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_act(
    const at::Tensor& input, const OptTensor& residual, const OptTensor& weight, const OptTensor& bias,
    const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& num_batches_tracked, bool training,
    std::optional<double> momentum, double eps, c10::string_view activation) {
  constexpr const char* op = "batch_norm_act";
  const PlainDispatch guard;
  const BatchNormArgs args{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  const Act act = parse_act(op, {activation.data(), activation.size()});
  check_residual(op, residual, input, input.sizes());
  check_batch_norm(op, input.sizes(), input, args);
  checked_channels(op, input.size(1));  // before anything is copied
  const Device device(input);
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = nhwc(input), out = empty_nhwc(input.sizes(), input.options(), format);
  const at::Tensor res = given(residual) ? nhwc(*residual) : at::Tensor();
  BatchNormStats stats = batch_norm_forward(op, device, x, res, out, args, act, {});
  return {to_format(out, format), stats.mean, stats.invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv2d_bn_act(
    const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias, const OptTensor& residual,
    const OptTensor& bn_weight, const OptTensor& bn_bias, const OptTensor& running_mean, const OptTensor& running_var,
    const OptTensor& num_batches_tracked, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t groups, bool training, std::optional<double> momentum, double eps, c10::string_view activation,
    bool save_for_backward) {
  constexpr const char* op = "conv2d_bn_act";
  const PlainDispatch guard;
  const ConvParams p = conv_params(op, input, weight, bias, stride, padding, dilation, groups);
  const Act act = parse_act(op, {activation.data(), activation.size()});
  const std::array<int64_t, 4> sizes{p.n, p.k, p.p, p.q};
  check_residual(op, residual, input, sizes);
  const BatchNormArgs args{bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_batch_norm(op, sizes, input, args, "bn_weight", "bn_bias");
  const Device device(input);
  const at::MemoryFormat format = conv_format(input, weight);
  const at::Tensor res = given(residual) ? nhwc(*residual) : at::Tensor();

  ConvEpilogueTensors epilogue;
  if (!training && !save_for_backward) {
    const BatchNormScale fold = fold_batch_norm(op, device, input, p.k, args, bias);
    epilogue.scale = fold.scale, epilogue.shift = fold.shift;
    epilogue.residual = res;
    epilogue.act = act;
    const at::Tensor out = conv_forward(op, device, p, input, weight, epilogue, format, nullptr);
    return {to_format(out, format), no_tensor(input.options()), fold.stats.mean, fold.stats.invstd};
  }
  if (given(bias)) epilogue.bias = *bias;
  ConvRest rest;
  rest.takes_parts = takes_parts(p.gemm_m(), args);
  const at::Tensor conv =
      conv_forward(op, device, p, input, weight, epilogue, format, training && p.n > 0 ? &rest : nullptr);
  const at::Tensor out = save_for_backward ? empty_nhwc(sizes, input.options(), format) : conv;
  BatchNormStats stats = batch_norm_forward(op, device, conv, res, out, args, act, rest, epilogue.bias);
  return {to_format(out, format), save_for_backward ? to_format(conv, format) : no_tensor(input.options()), stats.mean,
          stats.invstd};
}

}  // namespace

FASTCONV_GPU_OPERATORS(m) {
  m.impl("batch_norm_act", &batch_norm_act);
  m.impl("conv2d_bn_act", &conv2d_bn_act);
}

}  // namespace fastconv::cuda
