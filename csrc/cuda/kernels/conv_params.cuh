// Typed parameters of the convolution kernels and the geometry that they share.
//
// Letters: input n h w c, filter k r s c (c = channels of one group), output n p q k. All tensors are dense and
// channels-last. Whole tensors may pass 2^31 elements (64-bit offsets), one image may not (limits.h).
#pragma once

#include "activation.cuh"
#include "common.cuh"
#include "shapes.h"

namespace fastconv {

// out = act(acc * scale[k] + shift[k] + bias[k] + residual); each pointer may be null.
template <class T>
struct ConvEpilogue {
  T* out;
  const T* bias;
  const float* scale;
  const float* shift;
  const T* residual;    // layout of out
  T* preact;            // the value before the activation, for silu, gelu and hardswish in training
  const T* grad_saved;  // dgrad: out = acc * act'(grad_saved), fused backward of the activation before this convolution
  float* stat_mean;     // [m_tiles, k] mean of out over the rows of one tile ...
  float* stat_m2;       // ... and its sum of squared deviations; merged by batch_norm.cuh
  float* partial;       // split-K: fp32 sums in out's layout, one copy per split; nothing above is applied then
  const T* norm_x;      // dgrad: the batch norm whose result x is; what it normalised, in the layout of out ...
  const float *norm_mean, *norm_invstd;  // ... its channels' mean and inverse deviation ...
  const float *norm_weight, *norm_bias;  // ... and weight and bias, or null: for an act' without grad_saved
  float* sum_g;                          // dgrad: [tiles, c] sums of out over the rows of one tile ...
  float* sum_gx;                         // ... and of out * (norm_x - mean) * invstd; merged by batch_norm_backward.cuh
  Activation act;
};

// The input is used as act(x * scale[c] + shift[c]); padding is zero after that (the previous layer's batch-norm).
struct ConvPrologue {
  const float* scale;
  const float* shift;
  Activation act;
};

// One spatial axis of an implicit GEMM over taps: row i of the GEMM with tap number j reads in = i * mul + off + j *
// step and stands for the filter row tap0 + j * tap_step; it writes out0 + i * out_stride.
struct ConvAxis {
  int rows, mul, off, step, taps, tap0, tap_step, in_size, out0, out_stride;

  // The taps that any row in [i0, i1] can use, as a half-open interval; taps that only ever see padding are left out.
  __host__ __device__ void live(int i0, int i1, int& j0, int& j1) const {
    int low = i0 * mul + off, high = i1 * mul + off;
    int first, last;
    if (step > 0) {
      first = -floor_div(high, step);
      last = floor_div(in_size - 1 - low, step);
    } else {
      first = -floor_div(in_size - 1 - low, -step);
      last = floor_div(high, -step);
    }
    j0 = max_int(first, 0);
    j1 = max_int(min_int(last + 1, taps), j0);
  }
};

// fprop: h = p * stride - pad + r * dil.
__host__ __device__ inline ConvAxis fprop_axis(int in, int out, int taps, int stride, int pad, int dil) {
  return {out, stride, -pad, dil, taps, 0, 1, in, 0, 1};
}

__host__ __device__ inline int gcd_int(int a, int b) {
  while (b) {
    int t = a % b;
    a = b;
    b = t;
  }
  return a;
}

// dgrad: dx[h] = sum over r with (h + pad - r dil) divisible by stride of w[r] * dy[(h + pad - r dil) / stride].
// Rows h = cls + stride * i share the same set of taps r = r0 + j * tap_step, tap_step = stride / gcd(stride, dil), and
// read p = i + (cls + pad - r0 dil) / stride - j * tap_step * dil / stride: no work is spent on the holes of the
// stride.
__host__ __device__ inline ConvAxis dgrad_axis(int in, int out, int taps, int stride, int pad, int dil, int cls) {
  int tap_step = stride / gcd_int(stride, dil);
  int r0 = 0;
  while (r0 < taps && r0 < tap_step && (cls + pad - r0 * dil) % stride != 0) ++r0;
  bool any = r0 < taps && r0 < tap_step;
  int count = any ? (taps - 1 - r0) / tap_step + 1 : 0;
  int rows = in > cls ? (in - 1 - cls) / stride + 1 : 0;
  return {rows, 1,     any ? (cls + pad - r0 * dil) / stride : 0, -(tap_step * dil / stride), count, r0, tap_step, out,
          cls,  stride};
}

// Position-major rows put the batch innermost, so that on small maps a tile covers one or few positions and skips the
// taps that are padding there (4 of 9 live at 2x2, 1 of 9 at 1x1). Large maps keep the image order, which is kinder to
// DRAM pages.
constexpr int kPositionMajorMax = 64;

}  // namespace fastconv
