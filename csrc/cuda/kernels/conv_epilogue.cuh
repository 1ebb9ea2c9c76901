// From accumulators to the output: scale, shift, bias, residual, activation, and sums over the rows of what was
// written: in fprop the moments that a batch norm behind it needs, in dgrad those of the batch norm before it in its
// backward.
//
// Each warp passes its tile through a slab of 16 rows in shared memory, so that global accesses are rows of 16-byte
// vectors whatever the fragment layout. Only __syncwarp is needed: slabs are private to a warp.
#pragma once

#include "conv_params.cuh"

namespace fastconv {

template <int N, class T>
__device__ __forceinline__ void add_residual(const ConvEpilogue<T>& e, float (&x)[N], int64_t at) {
  if (!e.residual) return;
  float r[N];
  load_floats<N>(r, e.residual + at);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] += r[i];
}

// y = epilogue(x) for N consecutive channels starting at k, at element offset `at` of the output.
template <int N, class T>
__device__ __forceinline__ void epilogue_values(const ConvEpilogue<T>& e, float (&x)[N], int k, int64_t at) {
  if (e.scale) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= e.scale[k + i];
  }
  if (e.shift) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += e.shift[k + i];
  }
  if (e.bias) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += to_float(e.bias[k + i]);
  }
  add_residual<N>(e, x, at);
  if (e.preact) store_floats<N>(e.preact + at, x);
  if (e.grad_saved) {
    float s[N];
    load_floats<N>(s, e.grad_saved + at);
    activation_grad_all<N>(e.act, s);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= s[i];
  } else {
    activate_all<N>(e.act, x);
  }
}

// What a block knows about its tile. row_out[r] = element offset of output row r (-1: no such row); columns [col0,
// cols) of it are this tile's; channel = group offset of column 0.
struct TileOutput {
  const int64_t* row_out;
  int col0, cols, channel;
  int64_t split_offset;  // of this split's partial sums
  bool vec;              // 16-byte output accesses are aligned
};

enum class ColumnSums { kNone, kMoments, kGradient };

// What a tile knows of one column, [warps_m][BN] of it in shared memory.
template <ColumnSums Kind>
struct ColumnState {};

template <>
struct ColumnState<ColumnSums::kMoments> {
  Moments m{0.0f, 0.0f, 0.0f};

  __device__ __forceinline__ void add(const ColumnState& other) { m = merge(m, other.m); }
  template <class T>
  __device__ __forceinline__ static bool wanted(const ConvEpilogue<T>& e) {
    return e.stat_mean != nullptr;
  }
  template <class T>
  __device__ __forceinline__ void store(const ConvEpilogue<T>& e, int64_t at) const {
    e.stat_mean[at] = m.mean;
    e.stat_m2[at] = m.m2;
  }
};

template <>
struct ColumnState<ColumnSums::kGradient> {
  float g = 0.0f, gx = 0.0f;

  __device__ __forceinline__ void add(const ColumnState& other) { g += other.g, gx += other.gx; }
  template <class T>
  __device__ __forceinline__ static bool wanted(const ConvEpilogue<T>& e) {
    return e.sum_g != nullptr;
  }
  template <class T>
  __device__ __forceinline__ void store(const ConvEpilogue<T>& e, int64_t at) const {
    e.sum_g[at] = g;
    e.sum_gx[at] = gx;
  }
};

// The batch norm before a data gradient: xhat of what it normalised, and of its result's activation the derivative.
template <int N, class T>
__device__ __forceinline__ void norm_values(const ConvEpilogue<T>& e, int k, int64_t at, float (&xhat)[N],
                                            float (&slope)[N]) {
  float mean[N], invstd[N], weight[N], bias[N];
  load_floats<N>(xhat, e.norm_x + at);
  load_floats<N>(mean, e.norm_mean + k);
  load_floats<N>(invstd, e.norm_invstd + k);
  const bool from_output = e.grad_saved != nullptr;
#pragma unroll
  for (int i = 0; i < N; ++i) weight[i] = 1.0f, bias[i] = 0.0f;
  if (e.norm_weight && !from_output) load_floats<N>(weight, e.norm_weight + k);
  if (e.norm_bias && !from_output) load_floats<N>(bias, e.norm_bias + k);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    xhat[i] -= mean[i];
    slope[i] = fmaf(xhat[i], invstd[i] * weight[i], bias[i]);  // as batch_norm.cuh: the same sign to the last bit
    xhat[i] *= invstd[i];
  }
  if (from_output) load_floats<N>(slope, e.grad_saved + at);
  activation_grad_all<N>(e.act, slope);
}

template <class Engine, class T, int BN, ColumnSums Kind>
struct Epilogue {
  using State = ColumnState<Kind>;
  static constexpr int kLd = Engine::WN + 4;  // 4: keeps float4 alignment and spreads the rows over the banks
  static constexpr int kSlabFloats = 16 * kLd;
  static constexpr int kVec = kVec16<T>;
  // Columns whose sums a lane keeps: those of a vector, or of one row where a warp does not span it.
  static constexpr int kKept = kVec > Engine::WN / kWarp ? kVec : Engine::WN / kWarp;
  static constexpr bool kGradient = Kind == ColumnSums::kGradient;

  template <int N>
  __device__ __forceinline__ static void write(const ConvEpilogue<T>& e, const TileOutput& o, float* staged,
                                               int64_t row, int col, bool keep, float (&g)[N], float (&gx)[N]) {
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = staged[i];
    int64_t at = row + col;
    if (e.partial) {
      store_floats<N>(e.partial + o.split_offset + at, x);
      return;
    }
    if (kGradient && keep) {
      float xhat[N], slope[N];
      norm_values<N>(e, o.channel + col, at, xhat, slope);
      add_residual<N>(e, x, at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[i] = to_float(from_float<T>(x[i] * slope[i]));  // what is read from out: the sums are of that
        g[i] += x[i];
        gx[i] = fmaf(x[i], xhat[i], gx[i]);
      }
      store_floats<N>(e.out + at, x);
      return;
    }
    epilogue_values<N>(e, x, o.channel + col, at);
    store_floats<N>(e.out + at, x);
    if (keep) {  // statistics are of the values as stored, which is what the normalisation will read
#pragma unroll
      for (int i = 0; i < N; ++i) staged[i] = to_float(from_float<T>(x[i]));
    }
  }

  // The moments of a slab's column c, from the values as they were stored.
  __device__ __forceinline__ static Moments slab_moments(const float* stage, const int64_t* rows, int c) {
    Moments m{0.0f, 0.0f, 0.0f};
    for (int r = 0; r < 16; ++r)
      if (rows[r] >= 0) m.mean += stage[r * kLd + c], m.count += 1.0f;
    if (m.count > 0.0f) m.mean /= m.count;
    for (int r = 0; r < 16; ++r)
      if (rows[r] >= 0) {
        float d = stage[r * kLd + c] - m.mean;
        m.m2 += d * d;
      }
    return m;
  }

  // The slab's values, N at a time. A lane meets the same columns again in every slab: g and gx are theirs.
  template <int N>
  __device__ __forceinline__ static void write_slab(const ConvEpilogue<T>& e, const TileOutput& o, float* stage,
                                                    const int64_t* rows, int warp_col, int lane, bool keep,
                                                    float (&g)[kKept], float (&gx)[kKept]) {
    constexpr int kPerRow = Engine::WN / N, kWide = N == 1 && kPerRow > kWarp ? kPerRow / kWarp : 1;
    for (int item = lane; item < 16 * kPerRow; item += kWarp * kWide) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {  // more columns than lanes: a lane has several
        const int at = item + j * kWarp, r = at / kPerRow, c = at % kPerRow * N;
        const int64_t row = rows[r];
        const int col = o.col0 + warp_col + c;
        float (&mine)[N] = *reinterpret_cast<float (*)[N]>(g + j),
              (&mine_x)[N] = *reinterpret_cast<float (*)[N]>(gx + j);
        if (row >= 0 && col < o.cols) write<N>(e, o, stage + r * kLd + c, row, col, keep, mine, mine_x);
      }
    }
  }

  // The lanes that share columns add up; the first of them hand the sums over.
  template <int N>
  __device__ __forceinline__ static void reduce(State* stats, int lane, float (&g)[kKept], float (&gx)[kKept]) {
    constexpr int kPerRow = Engine::WN / N, kWide = N == 1 && kPerRow > kWarp ? kPerRow / kWarp : 1;
    constexpr int kLanes = kPerRow < kWarp ? kPerRow : kWarp, kMine = N * kWide;
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      for (int step = kWarp / 2; step >= kLanes; step /= 2) {
        g[i] += __shfl_xor_sync(kFullMask, g[i], step);
        gx[i] += __shfl_xor_sync(kFullMask, gx[i], step);
      }
    if (lane >= kLanes) return;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      State& s = stats[lane * N + (N == 1 ? i * kWarp : i)];
      s.g = g[i], s.gx = gx[i];
    }
  }

  // stage: this warp's slab. stats: [warps_m][BN] columns, or null. Every thread of the warp takes part.
  __device__ __forceinline__ static void run(const Engine& engine, const ConvEpilogue<T>& e, const TileOutput& o,
                                             float* stage, State* stats, int warp_row, int warp_col, int lane) {
    constexpr int kColsPerLane = (Engine::WN + kWarp - 1) / kWarp;
    [[maybe_unused]] Moments sums[kColsPerLane];
    float g[kKept], gx[kKept];
#pragma unroll
    for (int j = 0; j < kColsPerLane; ++j) sums[j] = {0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kKept; ++j) g[j] = gx[j] = 0.0f;
#pragma unroll 1  // four copies of all that follows would cost more instruction cache than the branch in store_slab
    for (int slab = 0; slab < Engine::WM / 16; ++slab) {
      const int64_t* rows = o.row_out + warp_row + slab * 16;
      engine.store_slab(slab, stage, kLd, lane);
      __syncwarp();
      if (o.vec) {
        write_slab<kVec>(e, o, stage, rows, warp_col, lane, stats != nullptr, g, gx);
      } else {
        write_slab<1>(e, o, stage, rows, warp_col, lane, stats != nullptr, g, gx);
      }
      __syncwarp();
      if constexpr (Kind == ColumnSums::kMoments) {
        if (stats) {
#pragma unroll
          for (int j = 0; j < kColsPerLane; ++j) {
            int c = lane + j * kWarp;
            if (Engine::WN % kWarp != 0 && c >= Engine::WN) break;
            sums[j] = merge(sums[j], slab_moments(stage, rows, c));
          }
          __syncwarp();
        }
      }
    }
    if (!stats) return;
    State* mine = stats + warp_row / Engine::WM * BN + warp_col;
    if constexpr (Kind == ColumnSums::kMoments) {
#pragma unroll
      for (int j = 0; j < kColsPerLane; ++j) {
        int c = lane + j * kWarp;
        if (c < Engine::WN) mine[c].m = sums[j];
      }
    }
    if constexpr (kGradient) {
      if (o.vec) {
        reduce<kVec>(mine, lane, g, gx);
      } else {
        reduce<1>(mine, lane, g, gx);
      }
    }
  }
};

}  // namespace fastconv
