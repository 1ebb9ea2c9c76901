// Batch norm as batch_norm_act and conv2d_bn_act share it.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>

#include "../host/batch_norm_check.h"
#include "host.h"

namespace fastconv::cpu {

struct BatchNormStats {
  at::Tensor mean, invstd;  // [C], accumulate type
  at::Tensor scale;         // in evaluation: invstd * weight
};

// out = act(batch_norm(x) + residual), running statistics and num_batches_tracked updated. x, out, residual (or
// undefined): NHWC; out may be x.
BatchNormStats batch_norm_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& out,
                                  const BatchNormArgs& args, Act act);

// Gradients of act(batch_norm(x) + residual): into dx and dresidual, where they are defined. y, or residual, is what
// the activation's derivative comes from. Returns the gradients of weight and bias, [C] in the accumulate type, where
// they are wanted. All NHWC; dresidual may be g, and so may dx where dresidual is undefined.
std::tuple<at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& g, const at::Tensor& x, const at::Tensor& y,
                                                       const at::Tensor& residual, const OptTensor& weight,
                                                       const OptTensor& bias, const at::Tensor& mean,
                                                       const at::Tensor& invstd, bool training, Act act,
                                                       const at::Tensor& dx, const at::Tensor& dresidual,
                                                       std::array<bool, 2> weight_bias);

// Fresh mean and invstd from the running statistics.
BatchNormStats eval_stats(const at::Tensor& like, int64_t channels, const BatchNormArgs& args);

}  // namespace fastconv::cpu
