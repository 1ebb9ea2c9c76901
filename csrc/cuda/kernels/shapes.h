// Shapes that the host side hands to the kernels: plain C++, for compilers that know no CUDA.
#pragma once

namespace fastconv {

struct ConvShape {
  int n, h, w, c, k, r, s, p, q;  // c and k count all groups
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
};

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

}  // namespace fastconv
