// How the channel-wise kernels cover a [rows, channels] matrix (NHWC with n h w flattened): the mapping and its
// reduction.
//
// A block of kColumnThreads threads is tx (channel vectors) x ty (rows); tx is the power of two that covers the
// channels, at most 32, so that a warp reads whole rows or a 32-vector run of one. grid.x covers the channels, grid.y
// cuts the rows into chunks. A thread keeps its N channels and walks down its chunk, so per-channel values stay in
// registers.
#pragma once

#include "common.cuh"
#include "size_limits.h"

namespace fastconv {

constexpr int kColumnThreads = 256;

struct ColumnShape {
  int64_t rows;
  int channels;
  int64_t chunk_rows;  // rows of one chunk; chunk i holds min(chunk_rows, rows - i * chunk_rows)
  int tx_log2;
};

inline int column_chunks(const ColumnShape& s) { return static_cast<int>(ceil_div64(s.rows, s.chunk_rows)); }

// target_blocks: about how many blocks the machine can use at once; one chunk holds at least min_rows rows.
inline ColumnShape column_shape(int64_t rows, int channels, int vec, int target_blocks, int min_rows) {
  int tx_log2 = 0;
  while (tx_log2 < 5 && (vec << tx_log2) < channels) ++tx_log2;
  int64_t tiles = ceil_div(channels, vec << tx_log2);
  int64_t chunks = ceil_div64(target_blocks, tiles);
  int64_t most = ceil_div64(rows, min_rows);
  if (chunks > most) chunks = most;
  if (chunks > kMostGridYZ) chunks = kMostGridYZ;
  if (chunks < 1) chunks = 1;
  return {rows, channels, ceil_div64(rows, chunks), tx_log2};
}

template <int N>
inline dim3 column_grid(const ColumnShape& s) {
  return dim3(ceil_div(s.channels, N << s.tx_log2), column_chunks(s));
}

// Fewer channels for a block, and more blocks: for kernels whose blocks own all rows of their channels, of which there
// would be one or two. Four vectors side by side are still whole sectors of memory; of single elements (N = 1) the full
// width is.
template <int N>
inline void spread_columns(ColumnShape& s) {
  while (N > 1 && s.tx_log2 > 2 && ceil_div(s.channels, N << s.tx_log2) < 64) --s.tx_log2;
}

// One thread's part: channels [c, c + N) (none if !active), rows row, row + step, ... below end.
template <int N>
struct ColumnThread {
  int c, x, y, tx, ty;
  int64_t row, end, step;
  bool active;
  __device__ __forceinline__ explicit ColumnThread(const ColumnShape& s) {
    tx = 1 << s.tx_log2;
    ty = kColumnThreads >> s.tx_log2;
    x = threadIdx.x & (tx - 1);
    y = threadIdx.x >> s.tx_log2;
    c = (blockIdx.x * tx + x) * N;
    active = c < s.channels;  // N divides channels, or N is 1
    int64_t first = blockIdx.y * s.chunk_rows;
    row = first + y;
    end = active ? (first + s.chunk_rows < s.rows ? first + s.chunk_rows : s.rows) : 0;
    step = ty;
  }
};

// Sums of `values` over the ty rows of threads, in a fixed order; afterwards every thread of a column holds them.
// shared: kColumnThreads * N floats. Barriers inside: every thread of the block must call it.
template <int N>
__device__ __forceinline__ void column_sum(float (&values)[N], const ColumnThread<N>& t, float* shared) {
#pragma unroll
  for (int j = 0; j < N; ++j) shared[(j * t.ty + t.y) * t.tx + t.x] = values[j];
  __syncthreads();  // all values are there
  for (int half = t.ty / 2; half > 0; half /= 2) {
    if (t.y < half) {
#pragma unroll
      for (int j = 0; j < N; ++j) shared[(j * t.ty + t.y) * t.tx + t.x] += shared[(j * t.ty + t.y + half) * t.tx + t.x];
    }
    __syncthreads();  // this level is summed
  }
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = shared[j * t.ty * t.tx + t.x];
  __syncthreads();  // shared may be used again
}

// Per-channel parameters come as fp32 or in the tensor's own dtype (a bf16 model has bf16 or fp32 batch-norm weights).
struct ChannelVector {
  const void* data = nullptr;  // null: absent
  bool is_float = true;
  template <class T>
  __device__ __forceinline__ float get(int c, float absent) const {
    if (!data) return absent;
    return is_float ? static_cast<const float*>(data)[c] : to_float(static_cast<const T*>(data)[c]);
  }
  // N channels from c. The branch stands outside the loops: inside, each load waits for the one before it.
  template <class T, int N>
  __device__ __forceinline__ void get_all(float (&out)[N], int c, float absent) const {
    if (!data) {
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = absent;
    } else if (is_float) {
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = static_cast<const float*>(data)[c + j];
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = to_float(static_cast<const T*>(data)[c + j]);
    }
  }
};
struct ChannelVectorOut {
  void* data = nullptr;
  bool is_float = true;
  template <class T>
  __device__ __forceinline__ void set(int c, float x) const {
    if (!data) return;
    if (is_float) {
      static_cast<float*>(data)[c] = x;
    } else {
      static_cast<T*>(data)[c] = from_float<T>(x);
    }
  }
  template <class T>
  __device__ __forceinline__ float get(int c) const {
    return ChannelVector{data, is_float}.template get<T>(c, 0.0f);
  }
  template <class T, int N>
  __device__ __forceinline__ void get_all(float (&out)[N], int c) const {
    ChannelVector{data, is_float}.template get_all<T>(out, c, 0.0f);
  }
};

// A [rows, channels] tensor that a convolution has left as split sums: sum_s parts[s] + bias + addend, added in the
// order s = 0, 1, ... like conv_reduce.cuh, rounded to T as a tensor of its own would be.
template <class T>
struct SplitSum {
  const float* parts = nullptr;  // [splits, rows, channels]; null: the tensor itself is there
  const T* addend = nullptr;     // or null
  T* into = nullptr;             // the tensor, written on the way; may be addend
  ChannelVector bias;
  int64_t elements = 0;  // rows * channels
  int splits = 0;
};

// N channels from c, at element `at`. keep: into gets them.
template <int N, class T>
__device__ __forceinline__ void load_split(float (&x)[N], const SplitSum<T>& s, int64_t at, int c, bool keep) {
  load_floats<N>(x, s.parts + at);
  for (int i = 1; i < s.splits; ++i) {
    float y[N];
    load_floats<N>(y, s.parts + i * s.elements + at);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] += y[j];
  }
  float addend[N], bias[N];
#pragma unroll
  for (int j = 0; j < N; ++j) addend[j] = 0.0f;
  if (s.addend) load_floats<N>(addend, s.addend + at);
  s.bias.template get_all<T>(bias, c, 0.0f);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = to_float(from_float<T>(x[j] + bias[j] + addend[j]));
  if (keep) store_floats<N>(s.into + at, x);
}

// One channel's total over partial sums [chunks][channels]: 32 slices of the chunks per block of 32 channels, since
// what a slice reads comes one latency after the other, and a large map has a thousand chunks and more. Fixed order.
constexpr int kMergeChannels = 32, kMergeSlices = 32;

// The slices' values added up, valid in slice 0. shared: one for each thread. Every thread of the block must call it.
template <class V, class Add>
__device__ __forceinline__ V merge_slices(const V& mine, V* shared, Add add) {
  const int at = threadIdx.x, slice = at / kMergeChannels;
  shared[at] = mine;
  for (int half = kMergeSlices / 2; half > 0; half /= 2) {
    __syncthreads();  // the level below is there
    if (slice < half) shared[at] = add(shared[at], shared[at + half * kMergeChannels]);
  }
  return shared[at];
}

}  // namespace fastconv
