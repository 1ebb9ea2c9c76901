// Batch normalisation forward: statistics, running statistics, apply + residual + activation.
//
//   training: mean, var over rows (biased);  y = act((x - mean) * invstd * weight + bias + residual), invstd =
//   rsqrt(var + eps)
//             running = (1 - f) running + f (mean, var * rows / (rows - 1)),  f = momentum, or 1 / batches seen if
//             cumulative
//   eval:     mean = running_mean, var = running_var
//
// x is [rows, channels] (NHWC, n h w flattened); mapping: column_tile.cuh. Statistics: Welford per thread, merged by
// Chan's formula, never E[x^2] - E[x]^2. Large maps take three launches: partial moments per chunk (or those of the
// convolution's epilogue, which have the same form), merge + running statistics, apply. Where a block can own all rows
// of its channels (few rows: batch 4), one launch does everything. fp32 throughout. Bytes: x read twice (once from L2
// when small), residual, y once.
#pragma once

#include "activation.cuh"
#include "column_tile.cuh"
#include "launch.cuh"

namespace fastconv {

template <class T>
struct BatchNormParams {
  const T* x;
  const T* residual;  // or null
  T* y;
  ChannelVector weight, bias;
  ChannelVectorOut running_mean, running_var;  // data null: not tracked (training); required in eval
  int64_t* batches_tracked;                    // incremented in training; or null
  float* save_mean;                            // [channels] out
  float* save_invstd;                          // [channels] out
  float* part_mean;                            // [chunks, channels] in / out
  float* part_m2;
  SplitSum<T> split;  // parts null: x is there; else x = split.into, for few rows only
  bool pivoted;       // part_mean is of x - x[0]; set by the launch
  bool training;
  float momentum;  // negative: cumulative average
  float eps;
  Activation act;
  ColumnShape shape;
};

template <int N>
__device__ __forceinline__ void welford(float (&mean)[N], float (&m2)[N], const float (&x)[N], float inv_count) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float d = x[j] - mean[j];
    mean[j] = fmaf(d, inv_count, mean[j]);
    m2[j] = fmaf(d, x[j] - mean[j], m2[j]);
  }
}

// Moments of this block's rows, for each of its channels, in every thread of the column. `mine` = rows of this thread.
template <int N>
__device__ __forceinline__ void column_moments(float (&mean)[N], float (&m2)[N], float mine, float total,
                                               const ColumnThread<N>& t, float* shared) {
  float all[N], dev[N];
#pragma unroll
  for (int j = 0; j < N; ++j) all[j] = mean[j] * mine;
  column_sum<N>(all, t, shared);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    all[j] /= total;
    float d = mean[j] - all[j];
    dev[j] = m2[j] + d * d * mine;  // this thread's deviations about the common mean
  }
  column_sum<N>(dev, t, shared);
#pragma unroll
  for (int j = 0; j < N; ++j) mean[j] = all[j], m2[j] = dev[j];
}

// The channels' first values: moments are taken of x - pivot, for where the mean is large against the deviations a mean
// in fp32 has no digits left for them.
template <bool Split, class T, int N>
__device__ __forceinline__ void load_pivot(float (&pivot)[N], const BatchNormParams<T>& p, const ColumnThread<N>& t) {
#pragma unroll
  for (int j = 0; j < N; ++j) pivot[j] = 0.0f;
  if (!t.active) return;
  if (Split) {
    load_split<N>(pivot, p.split, t.c, t.c, false);
  } else {
    load_floats<N>(pivot, p.x + t.c);
  }
}

template <bool Split, class T, int N>
__device__ __forceinline__ float thread_moments(float (&mean)[N], float (&m2)[N], const float (&pivot)[N],
                                                const BatchNormParams<T>& p, const ColumnThread<N>& t) {
#pragma unroll
  for (int j = 0; j < N; ++j) mean[j] = m2[j] = 0.0f;
  float count = 0.0f;
  for (int64_t row = t.row; row < t.end; row += t.step) {
    const int64_t at = row * p.shape.channels + t.c;
    float x[N];
    if (Split) {
      load_split<N>(x, p.split, at, t.c, true);  // apply_rows reads it back, in the same thread
    } else {
      load_floats<N>(x, p.x + at);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] -= pivot[j];
    count += 1.0f;
    welford<N>(mean, m2, x, 1.0f / count);
  }
  return count;
}

template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) bn_stats_kernel(BatchNormParams<T> p) {
  SMEM_ARRAY(float, shared, kColumnThreads* N);
  ptx::pdl_wait();
  ColumnThread<N> t(p.shape);
  float mean[N], m2[N], pivot[N];
  load_pivot<false>(pivot, p, t);
  float count = thread_moments<false>(mean, m2, pivot, p, t);
  int64_t first = blockIdx.y * p.shape.chunk_rows;
  int64_t rows = p.shape.rows - first < p.shape.chunk_rows ? p.shape.rows - first : p.shape.chunk_rows;
  column_moments<N>(mean, m2, count, static_cast<float>(rows), t, shared);
  if (t.y == 0 && t.active) {
    int64_t at = static_cast<int64_t>(blockIdx.y) * p.shape.channels + t.c;
    store_floats<N>(p.part_mean + at, mean);
    store_floats<N>(p.part_m2 + at, m2);
  }
}

template <class T>
__device__ __forceinline__ void update_running(const BatchNormParams<T>& p, int c, float mean, float m2, float factor) {
  float rows = static_cast<float>(p.shape.rows);
  if (p.running_mean.data) {
    float old = p.running_mean.template get<T>(c);
    p.running_mean.template set<T>(c, (1.0f - factor) * old + factor * mean);
  }
  if (p.running_var.data) {
    float old = p.running_var.template get<T>(c);
    p.running_var.template set<T>(c, (1.0f - factor) * old + factor * m2 / (rows - 1.0f));
  }
}

// Merges [chunks, channels] moments. The batch count is only read here; bn_apply increments it, so blocks cannot race.
template <class T>
__global__ void __launch_bounds__(kMergeChannels* kMergeSlices) bn_merge_kernel(BatchNormParams<T> p, int chunks) {
  SMEM_ARRAY(Moments, shared, kMergeChannels * kMergeSlices);
  ptx::pdl_wait();
  const int lane = threadIdx.x % kMergeChannels, slice = threadIdx.x / kMergeChannels;
  const int c = blockIdx.x * kMergeChannels + lane;
  Moments m{0.0f, 0.0f, 0.0f};
  constexpr int kAtOnce = 8;  // loads on their way together: between merges, which branch, each would wait for itself
  for (int first = slice; first < chunks && c < p.shape.channels; first += kAtOnce * kMergeSlices) {
    float mean[kAtOnce], m2[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + u * kMergeSlices;
      const int64_t at = static_cast<int64_t>(i) * p.shape.channels + c;
      mean[u] = i < chunks ? p.part_mean[at] : 0.0f;
      m2[u] = i < chunks ? p.part_m2[at] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t left = p.shape.rows - (first + u * kMergeSlices) * p.shape.chunk_rows;
      if (left > 0)
        m = merge(m, {static_cast<float>(left < p.shape.chunk_rows ? left : p.shape.chunk_rows), mean[u], m2[u]});
    }
  }
  m = merge_slices(m, shared, [](const Moments& a, const Moments& b) { return merge(a, b); });
  if (slice != 0 || c >= p.shape.channels) return;
  if (p.pivoted) m.mean += to_float(p.x[c]);
  p.save_mean[c] = m.mean;
  p.save_invstd[c] = rsqrtf(m.m2 / static_cast<float>(p.shape.rows) + p.eps);
  float factor = p.momentum >= 0.0f ? p.momentum : 1.0f / static_cast<float>(*p.batches_tracked + 1);
  update_running(p, c, m.mean, m.m2, factor);
}

template <class T, int N>
__device__ __forceinline__ void apply_rows(const BatchNormParams<T>& p, const ColumnThread<N>& t,
                                           const float (&mean)[N], const float (&invstd)[N]) {
  if (!t.active) return;
  float scale[N], bias[N];
  p.weight.template get_all<T>(scale, t.c, 1.0f);
  p.bias.template get_all<T>(bias, t.c, 0.0f);
#pragma unroll
  for (int j = 0; j < N; ++j) scale[j] *= invstd[j];
  for (int64_t row = t.row; row < t.end; row += t.step) {
    int64_t at = row * p.shape.channels + t.c;
    float x[N];
    load_floats<N>(x, p.x + at);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = fmaf(x[j] - mean[j], scale[j], bias[j]);
    if (p.residual) {
      float r[N];
      load_floats<N>(r, p.residual + at);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] += r[j];
    }
    activate_all<N>(p.act, x);
    store_floats<N>(p.y + at, x);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) bn_apply_kernel(BatchNormParams<T> p) {
  ptx::pdl_wait();
  ColumnThread<N> t(p.shape);
  if (p.training && p.batches_tracked && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ++*p.batches_tracked;
  if (!t.active) return;
  float mean[N], invstd[N];
  if (p.training) {
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = p.save_mean[t.c + j], invstd[j] = p.save_invstd[t.c + j];
  } else {
    p.running_mean.template get_all<T>(mean, t.c);
    p.running_var.template get_all<T>(invstd, t.c);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      invstd[j] = rsqrtf(invstd[j] + p.eps);
      if (blockIdx.y == 0 && t.y == 0) {
        p.save_mean[t.c + j] = mean[j];
        p.save_invstd[t.c + j] = invstd[j];
      }
    }
  }
  apply_rows<T, N>(p, t, mean, invstd);
}

// Training in one launch: shape.chunk_rows = rows, so a block owns its channels.
template <class T, int N, bool Split>
__global__ void __launch_bounds__(kColumnThreads) bn_small_kernel(BatchNormParams<T> p) {
  SMEM_ARRAY(float, shared, kColumnThreads* N);
  ptx::pdl_wait();
  ColumnThread<N> t(p.shape);
  float mean[N], m2[N], invstd[N], pivot[N];
  load_pivot<Split>(pivot, p, t);
  float count = thread_moments<Split>(mean, m2, pivot, p, t);
  column_moments<N>(mean, m2, count, static_cast<float>(p.shape.rows), t, shared);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    mean[j] += pivot[j];
    invstd[j] = rsqrtf(m2[j] / static_cast<float>(p.shape.rows) + p.eps);
    if (t.y == 0 && t.active) {
      p.save_mean[t.c + j] = mean[j];
      p.save_invstd[t.c + j] = invstd[j];
      update_running(p, t.c + j, mean[j], m2[j], p.momentum);
    }
  }
  if (p.batches_tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*p.batches_tracked;
  apply_rows<T, N>(p, t, mean, invstd);
}

template <class T>
bool batch_norm_vec(const BatchNormParams<T>& p, int channels) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.residual) |
                   reinterpret_cast<uintptr_t>(p.y) | reinterpret_cast<uintptr_t>(p.part_mean) |
                   reinterpret_cast<uintptr_t>(p.part_m2) | reinterpret_cast<uintptr_t>(p.split.parts);
  return bits % 16 == 0 && channels % kVec16<T> == 0;
}

// part_rows > 0: part_mean and part_m2 hold [ceil(rows / part_rows), channels] moments from the convolution's epilogue.
template <class T, int N>
Status run_batch_norm(BatchNormParams<T> p, int64_t part_rows, Stream stream) {
  const dim3 block(kColumnThreads);
  if (p.training) {
    if (p.shape.rows < 2) return {"batch_norm: training needs more than one value per channel"};
    if (p.momentum < 0.0f && !p.batches_tracked) return {"batch_norm: a cumulative average needs num_batches_tracked"};
    const bool small = part_rows == 0 && p.shape.rows <= kBatchNormSmallRows && p.momentum >= 0.0f;
    if (p.split.parts && !small) return {"batch_norm: split sums go with few rows and a momentum"};
    if (small) {
      p.shape.chunk_rows = p.shape.rows;
      spread_columns<N>(p.shape);
      if (p.split.parts) return launch(bn_small_kernel<T, N, true>, column_grid<N>(p.shape), block, 0, stream, p);
      return launch(bn_small_kernel<T, N, false>, column_grid<N>(p.shape), block, 0, stream, p);
    }
    Status status;
    if (part_rows == 0) {
      status = launch(bn_stats_kernel<T, N>, column_grid<N>(p.shape), block, 0, stream, p);
      if (!status.ok()) return status;
    }
    BatchNormParams<T> merged = p;
    merged.pivoted = part_rows == 0;  // a convolution's epilogue subtracts nothing
    if (part_rows > 0) merged.shape.chunk_rows = part_rows;
    status = launch(bn_merge_kernel<T>, dim3(ceil_div(p.shape.channels, kMergeChannels)),
                    dim3(kMergeChannels * kMergeSlices), 0, stream, merged, column_chunks(merged.shape));
    if (!status.ok()) return status;
  } else if (!p.running_mean.data || !p.running_var.data) {
    return {"batch_norm: eval needs running statistics"};
  }
  return launch(bn_apply_kernel<T, N>, column_grid<N>(p.shape), block, 0, stream, p);
}

template <class T>
Status launch_batch_norm(const BatchNormParams<T>& p, int64_t part_rows, Stream stream) {
  return batch_norm_vec(p, p.shape.channels) ? run_batch_norm<T, kVec16<T>>(p, part_rows, stream)
                                             : run_batch_norm<T, 1>(p, part_rows, stream);
}

}  // namespace fastconv
