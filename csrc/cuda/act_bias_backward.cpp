// Host side of act_bias_backward: check -> allocate -> launch.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../host/act_check.h"
#include "host.h"

namespace fastconv::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> act_bias_backward(const at::Tensor& grad_output, const OptTensor& saved,
                                                     c10::string_view activation, std::array<bool, 2> output_mask) {
  constexpr const char* op = "act_bias_backward";
  const PlainDispatch guard;
  const auto [act, format] = check_act_bias_backward(op, grad_output, saved, activation, output_mask);
  const int64_t channels = grad_output.size(1);
  const at::Tensor g = nhwc(grad_output);
  const at::Tensor s = act == Act::identity ? at::Tensor() : nhwc(*saved);
  ActBackwardCall call{};
  call.dtype = dtype_number(op, g);
  const at::Tensor preact =
      output_mask[0] ? empty_nhwc(g.sizes(), g.options(), format) : no_tensor(grad_output.options());
  const at::Tensor sums = output_mask[1] ? at::zeros({channels}, g.options()) : no_tensor(grad_output.options());
  if (g.numel() > 0 && (output_mask[0] || output_mask[1])) {
    const Device device(grad_output);
    call.grad_output = raw(g), call.saved = raw(s), call.grad_preact = raw(preact), call.grad_bias = raw(sums);
    call.rows = g.numel() / channels, call.channels = checked_channels(op, channels);
    call.act = static_cast<int>(act);
    call.blocks = column_blocks(device), call.min_rows = kMinRows;
    at::Tensor partial;
    if (output_mask[1]) {
      const int chunks = most_column_chunks(call.dtype, call.rows, call.channels, call.blocks, call.min_rows);
      partial = at::empty({chunks, channels}, acc_options(g));
      call.partial = data<float>(partial);
    }
    check_launch(op, act_backward(call, device.stream()));
  }
  return {output_mask[0] ? to_format(preact, format) : preact, sums};
}

}  // namespace

FASTCONV_GPU_OPERATORS(m) { m.impl("act_bias_backward", &act_bias_backward); }

}  // namespace fastconv::cuda
