// Host side of batch_norm_act_backward: check -> allocate -> launch.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../host/batch_norm_check.h"
#include "host.h"

namespace fastconv::cuda {
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
  NormBackwardCall call{};
  call.dtype = dtype_number(op, input);
  const at::Tensor x = nhwc(input), g = nhwc(grad_output);
  const at::Tensor y = saved.from_output ? nhwc(*output) : at::Tensor();
  const at::Tensor res = saved.recompute && given(residual) ? nhwc(*residual) : at::Tensor();
  // Several of them may be asked for: each is a tensor of its own, results must not alias.
  const auto none = [&] { return no_tensor(input.options()); };
  const at::Tensor dx = output_mask[0] ? empty_nhwc(input.sizes(), input.options(), format) : none();
  const at::Tensor dres = output_mask[1] ? empty_nhwc(input.sizes(), input.options(), format) : none();
  const at::ScalarType type = given(weight) ? weight->scalar_type() : acc_type(input.scalar_type());
  at::Tensor w = vector_or_none(weight), b = vector_or_none(bias);
  const bool fp32 = same_precision(w, b, input.scalar_type());
  const auto vectors = input.options().dtype(fp32 ? at::kFloat : input.scalar_type());
  const at::Tensor dweight = output_mask[2] ? at::zeros({channels}, vectors) : none();
  const at::Tensor dbias = output_mask[3] ? at::zeros({channels}, vectors) : none();
  if (input.numel() > 0 && (output_mask[0] || output_mask[1] || output_mask[2] || output_mask[3])) {
    const Device device(input);
    const at::Tensor mu = mean.contiguous(), inv = invstd.contiguous();
    call.dy = raw(g), call.x = raw(x), call.output = raw(y), call.residual = raw(res);
    call.weight = raw(w), call.bias = raw(b);
    call.mean = const_data<float>(mu), call.invstd = const_data<float>(inv);
    call.dx = raw(dx), call.dresidual = raw(dres), call.dweight = raw(dweight), call.dbias = raw(dbias);
    call.rows = input.numel() / channels, call.channels = checked_channels(op, channels);
    call.params_float = fp32, call.training = training, call.act = static_cast<int>(saved.act);
    call.blocks = column_blocks(device), call.min_rows = kMinRows;
    const int64_t chunks = most_column_chunks(call.dtype, call.rows, call.channels, call.blocks, call.min_rows);
    const at::Tensor workspace = at::empty({2 * chunks + 2, channels}, acc_options(input));
    call.part_g = data<float>(workspace), call.part_gx = call.part_g + chunks * channels;
    call.sum_g = call.part_gx + chunks * channels, call.sum_gx = call.sum_g + channels;
    check_launch(op, batch_norm_backward(call, device.stream()));
  }
  return {output_mask[0] ? to_format(dx, format) : dx, output_mask[1] ? to_format(dres, format) : dres,
          output_mask[2] ? dweight.to(type) : dweight, output_mask[3] ? dbias.to(type) : dbias};
}

}  // namespace

FASTCONV_GPU_OPERATORS(m) { m.impl("batch_norm_act_backward", &batch_norm_act_backward); }

}  // namespace fastconv::cuda
