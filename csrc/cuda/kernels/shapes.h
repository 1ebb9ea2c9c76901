// Shapes that the host side hands to the kernels: plain C++, for compilers that know no CUDA.
#pragma once

#include <cstdint>

namespace fastconv {

enum ConvKind : int { kFprop, kDgrad, kWgrad, kDepthwiseFprop, kDepthwiseDgrad, kDepthwiseWgrad };

struct ConvShape {
  int n, h, w, c, k, r, s, p, q;  // c and k count all groups
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
};

// A data gradient's stride classes, and the GEMM rows of the first, which is the largest.
constexpr int dgrad_classes(const ConvShape& g) {
  return (g.stride_h < g.h ? g.stride_h : g.h) * (g.stride_w < g.w ? g.stride_w : g.w);
}
constexpr int64_t dgrad_class_rows(const ConvShape& g) {
  return static_cast<int64_t>(g.n) * ((g.h + g.stride_h - 1) / g.stride_h) * ((g.w + g.stride_w - 1) / g.stride_w);
}

struct ConvTileSize {
  int bm, bn;
};
// Rows from 16 (batch 4 on a 1x1 map must not pay for 128) to 256 (the stem and other narrow layers: few columns, so A
// is read once). 16-row tiles take 128-byte k-tiles: they live on latency, and half the barriers help more than
// occupancy.
constexpr ConvTileSize kConvTiles[] = {{16, 64}, {32, 64}, {64, 64}, {128, 64}, {128, 128}, {256, 64}};
constexpr int kConvTileCount = 6;
constexpr ConvTileSize kWgradTiles[] = {{64, 64}, {128, 128}};
constexpr int kWgradTileCount = 2;

enum class PoolKind : int { kMax, kAvg, kAdaptiveAvg };

struct PoolShape {
  int n, h, w, c, p, q;                                      // input h w, output p q
  int r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;  // window; unused by adaptive
  bool count_include_pad;
  int divisor_override;  // 0: none
};

enum class Reduction : int { kNone, kMean, kSum };

struct LossShape {
  int64_t rows;  // n * d
  int classes, d;
  int64_t stride_n, stride_c, stride_d;  // of input, and of its gradient and probability targets, in elements
  int64_t ignore_index;
  float smoothing;
  Reduction reduction;
};

constexpr int kLossThreads = 256;  // of a block of the cross-entropy kernels

// Threads that share a row. Threads of one warp should read neighbouring addresses and have about 8 or more classes
// each. apart: the classes of a row do not lie side by side in memory, neighbouring rows do.
constexpr int loss_lanes(int64_t classes, bool apart) {
  return apart || classes <= 16 ? 1 : (classes <= 4096 ? 32 : kLossThreads);
}

// Rows of a batch norm up to which one block owns all rows of its channels, and one launch does everything: its rows
// stay in L1 / L2, and its blocks still fill the machine about as well as chunks would. Such a batch norm can also take
// a convolution's split sums, so the convolution may split its own and needs no statistics.
constexpr int64_t kBatchNormSmallRows = 256;

constexpr uint64_t kAllLive = ~uint64_t{0};

// One tensor of the optimizer's step (update.cuh): device memory, the same order in all.
struct UpdateTensor {
  float *w, *m, *v;  // m and v null where the rule has none
  void* half;        // the new weights once more; null: not wanted
  const void* g;
  int64_t elements;
  uint64_t live;                  // kAllLive, or bit t: tap t of [k, taps, inner] is updated
  int inner, taps;                // 1 where all are
  int splits;                     // more than 1: g is the sum of so many fp32 tensors, one behind the other
  int8_t grad_dtype, half_dtype;  // 0 fp32, 1 fp16, 2 bf16
  bool vec;  // accesses of kUpdateVector elements are aligned, and stay inside one tap: the launch's
};

}  // namespace fastconv
