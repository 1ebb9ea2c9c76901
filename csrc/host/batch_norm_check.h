// Arguments of batch norm, checked once for every device.
#pragma once

#include <array>

#include "tensor.h"

namespace fastconv {

struct BatchNormArgs {
  const OptTensor& weight;
  const OptTensor& bias;
  const OptTensor& running_mean;
  const OptTensor& running_var;
  const OptTensor& num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
};

// Checks everything about args against a 4-d batch norm input of `sizes` (and the dtype and device of `like`). The
// names are those of the arguments in op's schema.
void check_batch_norm(const char* op, at::IntArrayRef sizes, const at::Tensor& like, const BatchNormArgs& args,
                      const char* weight_name = "weight", const char* bias_name = "bias");

// What the backward takes the activation's derivative from: the saved output, or the pre-activation, recomputed (for
// relu, relu6 and leaky_relu where no output is given).
struct BatchNormSaved {
  Act act;
  bool recompute, from_output;
};
BatchNormSaved check_batch_norm_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                                         const OptTensor& output, const OptTensor& residual, const OptTensor& weight,
                                         const OptTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
                                         c10::string_view activation, std::array<bool, 4> output_mask);

}  // namespace fastconv
