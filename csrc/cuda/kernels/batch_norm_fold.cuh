// Batch norm in evaluation as the scale and shift of a convolution's epilogue.
//
//   invstd = 1 / sqrt(var + eps), scale = weight * invstd, shift = bias + (conv_bias - mean) * scale      per channel
//
// One thread per channel, fp32; a few KB in and out: bound by its launch.
#pragma once

#include "column_tile.cuh"
#include "launch.cuh"

namespace fastconv {

constexpr int kFoldThreads = 128;

struct BatchNormFold {
  ChannelVector weight, bias, running_mean, running_var, conv_bias;
  float *scale, *shift, *mean, *invstd;  // [channels] out
  int channels;
  float eps;
};

template <class T>
__global__ void __launch_bounds__(kFoldThreads) batch_norm_fold_kernel(BatchNormFold p) {
  ptx::pdl_wait();
  const int c = blockIdx.x * kFoldThreads + threadIdx.x;
  if (c >= p.channels) return;
  const float mean = p.running_mean.get<T>(c, 0.0f);
  const float invstd = 1.0f / sqrtf(p.running_var.get<T>(c, 1.0f) + p.eps);
  const float scale = p.weight.get<T>(c, 1.0f) * invstd;
  p.mean[c] = mean;
  p.invstd[c] = invstd;
  p.scale[c] = scale;
  p.shift[c] = fmaf(p.conv_bias.get<T>(c, 0.0f) - mean, scale, p.bias.get<T>(c, 0.0f));
}

template <class T>
Status launch_batch_norm_fold(const BatchNormFold& p, Stream stream) {
  return launch(batch_norm_fold_kernel<T>, dim3(ceil_div(p.channels, kFoldThreads)), dim3(kFoldThreads), 0, stream, p);
}

}  // namespace fastconv
