// What the host side of an operator calls: the kernels' launch functions behind plain structs, free of torch and of
// CUDA's own headers, so that ATen's and the kernels' headers never meet in one translation unit.
//
// Every function returns an empty text, or what went wrong. Pointers are device memory; null where a comment allows it.
// dtype: 0 fp32, 1 fp16, 2 bf16 (of every void pointer unless said otherwise). act: params.h's Act as an int. Sizes and
// layouts: see the kernels' headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/shapes.h"

namespace fastconv {

using LaunchStream = void*;  // a cudaStream_t

// Lines "kernel|threads per block|dynamic shared memory" of everything that is launched (launch_table.cuh).
std::string kernel_launches();

struct ConvCall {
  const void *a, *b;  // fprop: x, w   dgrad: dy, w   wgrad: dy, x
  const void *bias, *residual, *grad_saved;
  const float *scale, *shift, *pro_scale, *pro_shift;
  void *out, *preact;
  float *stat_mean, *stat_m2, *partial;
  ConvShape shape;
  int dtype, act, pro_act, tile, splits, tensor, kind;
  int keep_parts;  // splits > 1: leave the sums in partial for whoever adds them up; not of depthwise kinds
  // dgrad: the sums that the backward of the batch norm before the convolution needs (kernels/conv_params.cuh)
  const void* norm_x;
  const float *norm_mean, *norm_invstd, *norm_weight, *norm_bias;  // the last two or null
  float *sum_g, *sum_gx;
};
std::string conv(const ConvCall& call, LaunchStream stream);
// Rows of the tile that will run: statistics partials are [ceil(n p q / rows), k], a data gradient's sums
// [dgrad_classes * ceil(dgrad_class_rows / rows), c].
int conv_tile_rows(const ConvCall& call);

// Chunks that the channel-wise kernels cut [rows, channels] into at most: the size of their workspaces.
int most_column_chunks(int dtype, int64_t rows, int channels, int blocks, int min_rows);

struct ActBackwardCall {
  const void *grad_output, *saved;
  void* grad_preact;  // null: not wanted
  float* partial;     // [chunks, channels]; null: no bias gradient wanted
  void* grad_bias;
  int64_t rows;
  int dtype, act, channels, blocks, min_rows;
};
std::string act_backward(const ActBackwardCall& call, LaunchStream stream);

// A tensor that a convolution left as split sums (kernels/column_tile.cuh): few rows only. parts null: it is there.
struct SplitCall {
  const float* parts;
  const void *addend, *bias;
  int splits, bias_float;
};

struct NormCall {
  const void *x, *residual, *weight, *bias;
  void *y, *running_mean, *running_var, *batches;
  float *save_mean, *save_invstd, *part_mean, *part_m2;
  int64_t rows, part_rows;  // part_rows > 0: part_mean and part_m2 come from a convolution's epilogue
  // params_float: weight and bias are fp32, else of dtype; running_float: likewise the running statistics
  int dtype, params_float, running_float, channels, training, act, blocks, min_rows;
  float momentum, eps;  // momentum < 0: cumulative average
  SplitCall split;      // of x, which is written then
};
std::string batch_norm(const NormCall& call, LaunchStream stream);

// scale = weight / sqrt(var + eps), shift = bias + (conv_bias - mean) * scale, for a convolution's epilogue.
struct NormFoldCall {
  const void *weight, *bias, *running_mean, *running_var, *conv_bias;  // fp32, or of dtype where !..._float
  float *scale, *shift, *mean, *invstd;
  int dtype, params_float, running_float, conv_bias_float, channels;
  float eps;
};
std::string batch_norm_fold(const NormFoldCall& call, LaunchStream stream);

struct NormBackwardCall {
  const void *dy, *x, *output, *residual, *weight, *bias;
  const float *mean, *invstd;
  void *dx, *dresidual, *dweight, *dbias;
  float *part_g, *part_gx, *sum_g, *sum_gx;
  int64_t rows;
  int dtype, params_float, channels, training, act, blocks, min_rows;
  SplitCall split;    // of dy, which is written then
  int64_t part_sums;  // > 0: part_g and part_gx have so many rows, from a data gradient's epilogue; act is in dy then
};
std::string batch_norm_backward(const NormBackwardCall& call, LaunchStream stream);

struct PoolCall {
  const void* in;
  void* out;
  uint8_t* offsets;
  PoolShape shape;
  int dtype;
  PoolKind kind;
  int backward;
};
std::string pool(const PoolCall& call, LaunchStream stream);

struct LossCall {
  const void *input, *target, *target_u8, *probabilities, *grad_loss;
  const float* weight;
  void *loss, *grad_input, *grad_probabilities;
  float *lse, *normalizer, *part_loss, *part_weight;
  int64_t rows, stride_n, stride_c, stride_d, ignore_index;
  int classes, d, reduction, dtype;
  float smoothing;
};
int64_t loss_block_count(const LossCall& call);
std::string cross_entropy(const LossCall& call, LaunchStream stream);
std::string cross_entropy_backward(const LossCall& call, LaunchStream stream);

// Optimizer steps (kernels/update.cuh). All of one rule: adam (momentum and variance), SGD with momentum, or plain SGD.
struct UpdateCall {
  std::vector<UpdateTensor> tensors;
  const double* hyper;  // device memory
  bool adam, momentum;
};
std::string update(const UpdateCall& call, LaunchStream stream);

}  // namespace fastconv
