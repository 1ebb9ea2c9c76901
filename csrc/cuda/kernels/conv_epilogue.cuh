// From accumulators to the output: scale, shift, bias, residual, activation, and the statistics of what was written.
//
// Each warp passes its tile through a slab of 16 rows in shared memory, so that global accesses are rows of 16-byte
// vectors whatever the fragment layout. Only __syncwarp is needed: slabs are private to a warp.
#pragma once

#include "conv_params.cuh"

namespace fastconv {

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
  if (e.residual) {
    float r[N];
    load_floats<N>(r, e.residual + at);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += r[i];
  }
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

template <class Engine, class T, int BN>
struct Epilogue {
  static constexpr int kLd = Engine::WN + 4;  // 4: keeps float4 alignment and spreads the rows over the banks
  static constexpr int kSlabFloats = 16 * kLd;
  static constexpr int kVec = kVec16<T>;

  template <int N>
  __device__ __forceinline__ static void write(const ConvEpilogue<T>& e, const TileOutput& o, float* staged,
                                               int64_t row, int col, bool keep) {
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = staged[i];
    int64_t at = row + col;
    if (e.partial) {
      store_floats<N>(e.partial + o.split_offset + at, x);
      return;
    }
    epilogue_values<N>(e, x, o.channel + col, at);
    store_floats<N>(e.out + at, x);
    if (keep) {  // statistics are of the values as stored, which is what the normalisation will read
#pragma unroll
      for (int i = 0; i < N; ++i) staged[i] = to_float(from_float<T>(x[i]));
    }
  }

  // stage: this warp's slab. stats: [warps_m][BN] moments, or null. Every thread of the warp takes part.
  __device__ __forceinline__ static void run(const Engine& engine, const ConvEpilogue<T>& e, const TileOutput& o,
                                             float* stage, Moments* stats, int warp_row, int warp_col, int lane) {
    constexpr int kColsPerLane = (Engine::WN + kWarp - 1) / kWarp;
    Moments sums[kColsPerLane];
#pragma unroll
    for (int j = 0; j < kColsPerLane; ++j) sums[j] = {0.0f, 0.0f, 0.0f};
#pragma unroll 1  // four copies of all that follows would cost more instruction cache than the branch in store_slab
    for (int slab = 0; slab < Engine::WM / 16; ++slab) {
      engine.store_slab(slab, stage, kLd, lane);
      __syncwarp();
      if (o.vec) {
        constexpr int kPerRow = Engine::WN / kVec;
        for (int item = lane; item < 16 * kPerRow; item += kWarp) {
          int r = item / kPerRow, c = item % kPerRow * kVec;
          int64_t row = o.row_out[warp_row + slab * 16 + r];
          int col = o.col0 + warp_col + c;
          if (row >= 0 && col < o.cols) write<kVec>(e, o, stage + r * kLd + c, row, col, stats != nullptr);
        }
      } else {
        for (int item = lane; item < 16 * Engine::WN; item += kWarp) {
          int r = item / Engine::WN, c = item % Engine::WN;
          int64_t row = o.row_out[warp_row + slab * 16 + r];
          int col = o.col0 + warp_col + c;
          if (row >= 0 && col < o.cols) write<1>(e, o, stage + r * kLd + c, row, col, stats != nullptr);
        }
      }
      __syncwarp();
      if (stats) {
#pragma unroll
        for (int j = 0; j < kColsPerLane; ++j) {
          int c = lane + j * kWarp;
          if (Engine::WN % kWarp != 0 && c >= Engine::WN) break;
          Moments m{0.0f, 0.0f, 0.0f};
          for (int r = 0; r < 16; ++r)
            if (o.row_out[warp_row + slab * 16 + r] >= 0) m.mean += stage[r * kLd + c], m.count += 1.0f;
          if (m.count > 0.0f) m.mean /= m.count;
          for (int r = 0; r < 16; ++r)
            if (o.row_out[warp_row + slab * 16 + r] >= 0) {
              float d = stage[r * kLd + c] - m.mean;
              m.m2 += d * d;
            }
          sums[j] = merge(sums[j], m);
        }
        __syncwarp();
      }
    }
    if (stats) {
#pragma unroll
      for (int j = 0; j < kColsPerLane; ++j) {
        int c = lane + j * kWarp;
        if (c < Engine::WN) stats[warp_row / Engine::WM * BN + warp_col + c] = sums[j];
      }
    }
  }
};

}  // namespace fastconv
