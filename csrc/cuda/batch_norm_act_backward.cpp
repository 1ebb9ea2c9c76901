// Host side of batch_norm_act_backward: check -> allocate -> launch.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "batch_norm_act.h"

namespace fastconv::cuda {

at::ScalarType bn_vectors(const at::Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  // As same_precision() decides, without its copies.
  const auto own = [&](const OptTensor& t) { return !given(t) || t->scalar_type() == x.scalar_type(); };
  return (given(weight) || given(bias)) && own(weight) && own(bias) ? x.scalar_type() : at::kFloat;
}

void batch_norm_backward(const char* op, const Device& device, const at::Tensor& dy, const at::Tensor& x,
                         const at::Tensor& output, const at::Tensor& residual, const OptTensor& weight,
                         const OptTensor& bias, const at::Tensor& mean, const at::Tensor& invstd, bool training,
                         Act act, const BatchNormGrads& grads, const ConvRest& rest, const at::Tensor& addend,
                         const ConvNormSums* sums) {
  const int64_t channels = x.size(1);
  NormBackwardCall call{};
  call.dtype = dtype_number(op, x);
  at::Tensor w = vector_or_none(weight), b = vector_or_none(bias);
  call.params_float = same_precision(w, b, x.scalar_type());
  const at::Tensor mu = mean.contiguous(), inv = invstd.contiguous();
  call.dy = raw(dy), call.x = raw(x), call.output = raw(output), call.residual = raw(residual);
  call.weight = raw(w), call.bias = raw(b);
  call.mean = const_data<float>(mu), call.invstd = const_data<float>(inv);
  call.dx = raw(grads.dx), call.dresidual = raw(grads.dresidual);
  call.dweight = raw(grads.dweight), call.dbias = raw(grads.dbias);
  call.rows = x.numel() / channels, call.channels = checked_channels(op, channels);
  call.training = training, call.act = static_cast<int>(act);
  call.blocks = column_blocks(device), call.min_rows = kMinRows;
  const bool summed = sums != nullptr && sums->tiles > 0;
  const int64_t chunks =
      summed ? 0 : most_column_chunks(call.dtype, call.rows, call.channels, call.blocks, call.min_rows);
  const at::Tensor workspace = at::empty({2 * chunks + 2, channels}, acc_options(x));
  call.sum_g = data<float>(workspace), call.sum_gx = call.sum_g + channels;
  call.part_g = summed ? data<float>(sums->parts) : call.sum_gx + channels;
  call.part_sums = summed ? sums->tiles : 0;
  call.part_gx = call.part_g + (summed ? sums->tiles : chunks) * channels;
  if (rest.splits > 0) call.split = {const_data<float>(rest.parts), raw(addend), nullptr, rest.splits, 1};
  check_launch(op, fastconv::batch_norm_backward(call, device.stream()));
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_act_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptTensor& output, const OptTensor& residual,
    const OptTensor& weight, const OptTensor& bias, const at::Tensor& mean, const at::Tensor& invstd, bool training,
    c10::string_view activation, std::array<bool, 4> output_mask) {
  constexpr const char* op = "batch_norm_act_backward";
  const PlainDispatch guard;
  const BatchNormSaved saved = check_batch_norm_backward(op, grad_output, input, output, residual, weight, bias, mean,
                                                         invstd, activation, output_mask);
  const int64_t channels = input.size(1);
  const at::MemoryFormat format = input.suggest_memory_format();
  dtype_number(op, input);  // before anything is copied
  const at::Tensor x = nhwc(input), g = nhwc(grad_output);
  const at::Tensor y = saved.from_output ? nhwc(*output) : at::Tensor();
  const at::Tensor res = saved.recompute && given(residual) ? nhwc(*residual) : at::Tensor();
  // Several of them may be asked for: each is a tensor of its own, results must not alias.
  const auto none = [&] { return no_tensor(input.options()); };
  const bool runs = input.numel() > 0 && (output_mask[0] || output_mask[1] || output_mask[2] || output_mask[3]);
  const auto vectors = input.options().dtype(bn_vectors(input, weight, bias));
  // The kernels write every element; a launch that only fills with zeros is one more per layer.
  const auto vector = [&] { return runs ? at::empty({channels}, vectors) : at::zeros({channels}, vectors); };
  BatchNormGrads grads{output_mask[0] ? empty_nhwc(input.sizes(), input.options(), format) : none(),
                       output_mask[1] ? empty_nhwc(input.sizes(), input.options(), format) : none(),
                       output_mask[2] ? vector() : none(), output_mask[3] ? vector() : none()};
  if (runs) {
    const Device device(input);
    batch_norm_backward(op, device, g, x, y, res, weight, bias, mean, invstd, training, saved.act, grads);
  }
  const at::ScalarType type = given(weight) ? weight->scalar_type() : acc_type(input.scalar_type());
  return {output_mask[0] ? to_format(grads.dx, format) : grads.dx,
          output_mask[1] ? to_format(grads.dresidual, format) : grads.dresidual,
          output_mask[2] ? grads.dweight.to(type) : grads.dweight, output_mask[3] ? grads.dbias.to(type) : grads.dbias};
}

}  // namespace

FASTCONV_GPU_OPERATORS(m) { m.impl("batch_norm_act_backward", &batch_norm_act_backward); }

}  // namespace fastconv::cuda
