// Batch norm as batch_norm_act and conv2d_bn_act share it.
#pragma once

#include <algorithm>

#include "host.h"

namespace fastconv::cpu {

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

struct BatchNormStats {
  at::Tensor mean, invstd;  // [C], accumulate type
};

// out = act(batch_norm(x) + residual), running statistics and num_batches_tracked updated. x, out, residual (or
// undefined): NHWC; out may be x.
BatchNormStats batch_norm_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& out,
                                  const BatchNormArgs& args, Act act);

// Fresh mean and invstd from the running statistics.
BatchNormStats eval_stats(const at::Tensor& like, int64_t channels, const BatchNormArgs& args);

}  // namespace fastconv::cpu
