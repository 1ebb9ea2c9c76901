// Batch norm as batch_norm_act and conv2d_bn_act share it.
#pragma once

#include <algorithm>

#include "../host/batch_norm_check.h"
#include "host.h"

namespace fastconv::cpu {

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
