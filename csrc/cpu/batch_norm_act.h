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

// A part of the channels is taken through both passes of an operator while its bytes stay in half of a usual 1 MB L2.
// Returns how many channels; all of them where fewer than 128 would fit: whole rows then stream better from L3 than
// narrow strips do from L2 (4096 x 256 fp32: 290 us against 620).
inline int64_t resident_channels(int64_t rows, int64_t channels, int64_t bytes_per_element, int64_t block) {
  const int64_t fit = 512 * 1024 / std::max<int64_t>(1, rows * bytes_per_element) / block * block;
  return fit < 128 ? channels : fit;
}

}  // namespace fastconv::cpu
