// What the kernels cannot run: sizes past their 32-bit offsets and the device's grids. Plain C++, written here once:
// the launches refuse by it, the operators raise by it, and the choice of a backend asks it before
// (csrc/cuda_limit.cpp).
//
// Every function returns an empty text, or the limit that is passed and by what. Shapes: ConvParams or ConvShape,
// PoolParams or PoolShape; the arithmetic is in 64 bits, a product that could pass even these saturates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "shapes.h"

namespace fastconv {

constexpr int64_t kMostInt = 0x7fffffff;  // offsets inside one image, sizes, and the x dimension of a grid
constexpr int64_t kMostGridYZ = 65535;    // the y and z dimensions of a grid
// What an index may run ahead of its end before it is compared with it: the longest k-tile, the widest tile, a block's
// columns of 256 channels, a block's 8 x 256 classes.
constexpr int64_t kAhead = 2048;
constexpr int64_t kMostOffsetArea = 256;  // positions of a max-pool window whose offset is kept in one byte

inline int64_t product(std::initializer_list<int64_t> factors) {
  constexpr int64_t kSaturated = INT64_MAX;
  int64_t all = 1;
  for (const int64_t f : factors) {
    if (f <= 0) return 0;
    all = all > kSaturated / f ? kSaturated : all * f;
  }
  return all;
}

inline std::string past(const char* what, int64_t value, int64_t most) {
  if (value <= most) return {};
  return std::string(what) + ": at most " + std::to_string(most) + " in the CUDA kernels, got " + std::to_string(value);
}

// The first that is not empty.
inline std::string first_of(std::initializer_list<std::string> reasons) {
  for (const std::string& r : reasons)
    if (!r.empty()) return r;
  return {};
}

inline std::string channel_limit(int64_t channels) { return past("channels", channels, kMostInt - kAhead); }

// One axis: positions and taps are int, and so is everything between them.
inline std::string axis_limit(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t dil) {
  const int64_t most = std::max({in, out, taps, stride, pad, dil});
  if (most > kMostInt) return past("size, stride, padding or dilation of an axis", most, kMostInt);
  // a k-tile may start 64 taps behind the last
  return past("padded axis with the filter's reach and a stride", in + 2 * pad + product({dil, taps + 64}) + stride,
              kMostInt);
}

template <class Shape>
std::string conv_limit(const Shape& g, ConvKind kind) {
  const int64_t n = g.n, h = g.h, w = g.w, c = g.c, k = g.k, r = g.r, s = g.s, p = g.p, q = g.q, groups = g.groups;
  const int64_t taps = product({r, s}), cg = c / std::max<int64_t>(groups, 1), kg = k / std::max<int64_t>(groups, 1);
  std::string reason =
      first_of({past("batch", n, kMostInt), channel_limit(c), channel_limit(k),
                axis_limit(h, p, r, g.stride_h, g.pad_h, g.dil_h), axis_limit(w, q, s, g.stride_w, g.pad_w, g.dil_w),
                past("elements of one input image", product({h, w, c}), kMostInt),
                past("elements of one output image", product({p, q, k}), kMostInt)});
  if (!reason.empty()) return reason;
  if (kind >= kDepthwiseFprop) {
    reason = past("elements of the weight of a depthwise convolution", product({c, taps}), kMostInt);
    // its grid has a y for every tap
    return reason.empty() && kind == kDepthwiseWgrad ? past("taps of a depthwise filter", taps, kMostGridYZ) : reason;
  }
  reason = past("elements of one group's filter", product({taps, std::max(cg, kg)}), kMostInt - kAhead);
  if (!reason.empty()) return reason;
  const auto tiles = [](int64_t rows, int64_t columns, const ConvTileSize& t) {
    return product({rows / t.bm + 1, columns / t.bn + 1});
  };
  if (kind == kWgrad) {
    return first_of({past("output positions of the batch in a weight gradient", product({n, p, q}), kMostInt - kAhead),
                     past("groups", groups, kMostGridYZ),
                     past("tiles of a weight gradient", tiles(kg, taps * cg, kWgradTiles[0]), kMostInt)});
  }
  if (kind == kFprop) {
    return first_of({past("groups", groups, kMostGridYZ),
                     past("tiles of a convolution", tiles(product({n, p, q}), kg, kConvTiles[0]), kMostInt)});
  }
  const int64_t classes = product({std::min<int64_t>(g.stride_h, h), std::min<int64_t>(g.stride_w, w)});
  // the distance of two taps of one class times the dilation
  const auto multiple = [](int64_t stride, int64_t dil) {
    int64_t a = stride, b = dil;
    while (b) std::swap(a %= b, b);
    return product({stride / std::max<int64_t>(a, 1), dil});
  };
  const int64_t step = std::max(multiple(g.stride_h, g.dil_h), multiple(g.stride_w, g.dil_w));
  return first_of({past("groups times stride classes of a data gradient", product({groups, classes}), kMostGridYZ),
                   past("least common multiple of stride and dilation", step, kMostInt),
                   past("tiles of a data gradient", tiles(product({n, h, w}), cg, kConvTiles[0]), kMostInt)});
}

// offsets: whether a max-pool keeps them.
template <class Shape>
std::string pool_limit(const Shape& g, PoolKind kind, bool offsets, int64_t divisor_override = 0) {
  const int64_t n = g.n, h = g.h, w = g.w, c = g.c, p = g.p, q = g.q;
  std::string reason = first_of({past("batch", n, kMostInt), channel_limit(c)});
  if (!reason.empty()) return reason;
  int64_t area = product({g.r, g.s});
  if (kind == PoolKind::kAdaptiveAvg) {
    // from floor(i h / p) to ceil((i + 1) h / p): two elements more than h / p, or the whole axis
    const auto longest = [](int64_t in, int64_t out) {
      return out < 1 ? in : (in % out ? std::min(in, in / out + 2) : in / out);
    };
    area = product({longest(h, p), longest(w, q)});
    reason = past("side of an input or output", std::max({h, w, p, q}), kMostInt - 1);
  } else {
    reason = first_of(
        {axis_limit(h, p, g.r, g.stride_h, g.pad_h, g.dil_h), axis_limit(w, q, g.s, g.stride_w, g.pad_w, g.dil_w)});
  }
  if (reason.empty() && kind == PoolKind::kMax && offsets)
    reason = past("positions of a window with kept offsets", area, kMostOffsetArea);
  if (!reason.empty()) return reason;
  reason = past("positions of a window", area, kMostInt);
  if (reason.empty() && (divisor_override > kMostInt || divisor_override < -kMostInt))
    reason = "divisor_override: less than 2^31 in the CUDA kernels, got " + std::to_string(divisor_override);
  return reason;
}

// rows = positions with a loss of their own, d of them per sample.
inline std::string loss_limit(int64_t rows, int64_t classes, int64_t d) {
  const int64_t per_block = kLossThreads / loss_lanes(classes, false);  // the fewest: classes apart take one lane
  return first_of({past("classes", classes, kMostInt - kAhead), past("positions of one sample", d, kMostInt),
                   past("blocks of a loss", rows / per_block + 1, kMostInt)});
}

}  // namespace fastconv
