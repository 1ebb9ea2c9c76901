// Arguments of act_bias_backward, checked once for every device.
#pragma once

#include <array>
#include <utility>

#include "tensor.h"

namespace fastconv {

// The activation, and the format of grad_preact.
inline std::pair<Act, at::MemoryFormat> check_act_bias_backward(const char* op, const at::Tensor& grad_output,
                                                                const OptTensor& saved, c10::string_view activation,
                                                                std::array<bool, 2> output_mask) {
  check_float(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4);
  const Act act = parse_act(op, {activation.data(), activation.size()});
  at::MemoryFormat format = grad_output.suggest_memory_format();
  if (act == Act::identity) {
    TORCH_CHECK(!output_mask[0], op,
                ": output_mask[0] expected False for activation 'identity' (grad_preact is grad_output), got True");
  } else {
    TORCH_CHECK(given(saved), op, ": saved expected a tensor for activation '", activation, "', got None");
    check_device(op, "saved", *saved, grad_output);
    check_dtype(op, "saved", *saved, grad_output.scalar_type());
    check_sizes(op, "saved", *saved, grad_output.sizes());
    // A gradient may arrive expanded; the output it belongs to has the layout that counts.
    format = saved->suggest_memory_format();
  }
  return {act, format};
}

}  // namespace fastconv
