// Batch norm as batch_norm_act and conv2d_bn_act share it on the GPU.
#pragma once

#include "../host/batch_norm_check.h"
#include "conv2d.h"
#include "host.h"

namespace fastconv::cuda {

struct BatchNormStats {
  at::Tensor mean, invstd;  // [C] fp32
};

// out = act(batch_norm(x) + residual), running statistics and num_batches_tracked updated in the same launches. x, out,
// residual (or undefined): NHWC; out may be x. rest: what x's convolution left, or empty; of split sums and conv_bias
// (or undefined) x is written here.
BatchNormStats batch_norm_forward(const char* op, const Device& device, const at::Tensor& x, const at::Tensor& residual,
                                  const at::Tensor& out, const BatchNormArgs& args, Act act, const ConvRest& rest,
                                  const at::Tensor& conv_bias = {});

// Whether the batch norm behind a convolution of `rows` output positions takes its split sums.
inline bool takes_parts(int64_t rows, const BatchNormArgs& args) {
  const bool cumulative = !args.momentum.has_value() && (given(args.running_mean) || given(args.running_var));
  return args.training && rows > 1 && rows <= kBatchNormSmallRows && !cumulative;
}

// What batch_norm_backward reads (NHWC; output and residual undefined where the activation does not need them) and
// writes: each result undefined where it is not wanted. dweight and dbias have the dtype of bn_vectors(). rest: dy as a
// data gradient's split sums, of which and of addend (or undefined) dy is written here. sums: what a data gradient
// found when it wrote dy, or null.
struct BatchNormGrads {
  at::Tensor dx, dresidual, dweight, dbias;
};
void batch_norm_backward(const char* op, const Device& device, const at::Tensor& dy, const at::Tensor& x,
                         const at::Tensor& output, const at::Tensor& residual, const OptTensor& weight,
                         const OptTensor& bias, const at::Tensor& mean, const at::Tensor& invstd, bool training,
                         Act act, const BatchNormGrads& grads, const ConvRest& rest = {}, const at::Tensor& addend = {},
                         const ConvNormSums* sums = nullptr);
// The dtype in which the kernels read weight and bias, and write their gradients.
at::ScalarType bn_vectors(const at::Tensor& x, const OptTensor& weight, const OptTensor& bias);

// Evaluation as scale and shift of the convolution's epilogue; conv_bias may be undefined.
struct BatchNormScale {
  at::Tensor scale, shift;
  BatchNormStats stats;
};
BatchNormScale fold_batch_norm(const char* op, const Device& device, const at::Tensor& like, int64_t channels,
                               const BatchNormArgs& args, const OptTensor& conv_bias);

}  // namespace fastconv::cuda
