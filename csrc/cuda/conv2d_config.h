// Which tile, and how many split sums, a convolution runs with. Plain C++, no device.
//
// The choice minimises a model of the time, in multiply-adds of one multiprocessor at full rate:
//   waves of blocks * (k-tiles of one block * their cost + a block's fixed cost) + the reduction of split sums.
// A tile's rate is bound by the bytes that its fragments read from shared memory: bm bn / (bm + bn) multiply-adds per
// element read, full rate from 64 on (128 x 128). The model orders tiles; its times are no predictions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "api.h"

namespace fastconv::cuda {

struct ConvChoice {
  int tile, splits;
};

constexpr int64_t kMaxSplitBytes = 64 << 20;  // of fp32 partial sums: more would leave L2 and cost what it saves

// Taps of one axis that touch data, averaged over the output positions.
inline double live_taps(int in, int out, int taps, int stride, int pad, int dil) {
  if (out > 64) return taps;  // the border hardly counts
  int64_t live = 0;
  for (int t = 0; t < taps; ++t) {  // the positions p with 0 <= p stride + from < in
    const int from = t * dil - pad;
    const int first = from >= 0 ? 0 : (-from + stride - 1) / stride;
    const int last = in - 1 < from ? -1 : std::min((in - 1 - from) / stride, out - 1);
    live += std::max(last - first + 1, 0);
  }
  return std::max(static_cast<double>(live) / out, 1.0);
}

// The GEMM of one group: rows, columns, length of the sum.
struct GemmView {
  int64_t m, n;
  double k;
  int64_t batches;  // groups x stride classes
  int64_t result;   // elements of the result, for the workspace
};

inline GemmView gemm_view(const ConvShape& g, ConvKind kind) {
  const int64_t cg = g.c / g.groups, kg = g.k / g.groups, positions = static_cast<int64_t>(g.n) * g.p * g.q;
  if (kind == kWgrad)
    return {kg, static_cast<int64_t>(g.r) * g.s * cg, static_cast<double>(positions), g.groups,
            static_cast<int64_t>(g.k) * g.r * g.s * cg};
  const double taps =
      live_taps(g.h, g.p, g.r, g.stride_h, g.pad_h, g.dil_h) * live_taps(g.w, g.q, g.s, g.stride_w, g.pad_w, g.dil_w);
  if (kind == kFprop) return {positions, kg, taps * cg, g.groups, positions * g.k};
  const int64_t classes = static_cast<int64_t>(std::min(g.stride_h, g.h)) * std::min(g.stride_w, g.w);
  const int64_t pixels = static_cast<int64_t>(g.n) * g.h * g.w;
  return {(pixels + classes - 1) / classes, cg, std::max(taps * kg / classes, 1.0), g.groups * classes, pixels * g.c};
}

// element: bytes of one element (a k-tile is 64 bytes of it; 128 for 16-row tiles). stats: per-channel statistics are
// wanted from the epilogue, which split sums cannot give.
inline ConvChoice choose_conv(const ConvShape& g, ConvKind kind, int element, int multiprocessors, bool stats) {
  const GemmView v = gemm_view(g, kind);
  const ConvTileSize* tiles = kind == kWgrad ? kWgradTiles : kConvTiles;
  const int count = kind == kWgrad ? kWgradTileCount : kConvTileCount;
  ConvChoice best{0, 1};
  double best_cost = 0;
  for (int t = 0; t < count; ++t) {
    const double bm = tiles[t].bm, bn = tiles[t].bn;
    const double blocks = ((v.m + tiles[t].bm - 1) / tiles[t].bm) * ((v.n + tiles[t].bn - 1) / tiles[t].bn) *
                          static_cast<double>(v.batches);
    const double bk = (tiles[t].bm == 16 ? 128.0 : 64.0) / element;
    const double k_tiles = std::max(1.0, v.k / bk);
    const double rate = std::min(1.0, bm * bn / (bm + bn) / 64);
    const double per_tile = bm * bn * bk / rate;
    const double fixed = bm * bn * 64 + 65536;  // the epilogue's bytes; filling the pipeline and the launch
    for (int splits = 1; splits <= 64; splits *= 2) {
      if (splits > 1 && (stats || splits > k_tiles / 2 || v.result * splits * 4 > kMaxSplitBytes)) break;
      const double waves = std::max(1.0, blocks * splits / multiprocessors);
      // a second launch, and the partial sums written and read again: bytes at about 1/64 of the multiply-add rate
      const double reduce = splits == 1 ? 0 : 131072 + 64.0 * v.result * (splits + 1) / multiprocessors;
      const double cost = waves * (k_tiles / splits * per_tile + fixed) + reduce;
      if (best_cost == 0 || cost < best_cost) best_cost = cost, best = {t, splits};
    }
  }
  return best;
}

// Depthwise weight gradient: shares of the positions until the blocks (32 channels x one tap each) fill the machine
// twice; a share of fewer than 64 rows of the output would be all overhead.
inline int depthwise_wgrad_splits(const ConvShape& g, int multiprocessors) {
  const int64_t blocks = static_cast<int64_t>((g.c + 31) / 32) * g.r * g.s;
  const int64_t rows = static_cast<int64_t>(g.n) * g.p;
  return static_cast<int>(
      std::clamp<int64_t>(2 * multiprocessors / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(rows / 64, 1)));
}

}  // namespace fastconv::cuda
