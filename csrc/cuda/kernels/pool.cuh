// Max, average and adaptive average pooling, forward and backward, NHWC.
//
//   max   y[n,p,q,c] = max over the window of x;   offset = r * S + s of the winner (one byte)
//   avg   y[n,p,q,c] = sum over the window / divisor;   adaptive: window p = [floor(p H / P), ceil((p + 1) H / P))
// As in PyTorch: the first maximum wins, a NaN wins over everything; the average's divisor is divisor_override, or the
// window clipped to the padded image (count_include_pad), or clipped to the image.
//
// One thread makes one position x N channels (16 bytes, or 1 channel where unaligned), channels fastest, so that every
// access is a run of consecutive vectors. The backwards gather: the thread of an input position visits the windows that
// cover it. No atomics, so results do not depend on timing. fp32 sums. Bytes: input (L2 serves window overlap) + output
// + offsets, once.
#pragma once

#include "common.cuh"
#include "launch.cuh"
#include "size_limits.h"

namespace fastconv {

constexpr int kPoolThreads = 128;

template <class T>
struct PoolParams {
  const T* in;       // x, or dy in the backward
  T* out;            // y, or dx
  uint8_t* offsets;  // max: written by the forward (or null), read by the backward
  PoolShape shape;
};

__device__ __forceinline__ int adaptive_begin(int i, int in, int out) {
  return static_cast<int>(static_cast<int64_t>(i) * in / out);
}
__device__ __forceinline__ int adaptive_end(int i, int in, int out) {
  return static_cast<int>((static_cast<int64_t>(i + 1) * in + out - 1) / out);
}

// The window [h0, h1) x [w0, w1) of output (p, q), clipped to the image, and 1 / divisor.
struct PoolWindow {
  int h0, h1, w0, w1;
  float scale;
};
template <PoolKind Kind>
__device__ __forceinline__ PoolWindow pool_window(const PoolShape& g, int p, int q) {
  PoolWindow v;
  if constexpr (Kind == PoolKind::kAdaptiveAvg) {
    v.h0 = adaptive_begin(p, g.h, g.p), v.h1 = adaptive_end(p, g.h, g.p);
    v.w0 = adaptive_begin(q, g.w, g.q), v.w1 = adaptive_end(q, g.w, g.q);
    v.scale = 1.0f / static_cast<float>((v.h1 - v.h0) * (v.w1 - v.w0));
  } else {
    v.h0 = p * g.stride_h - g.pad_h, v.w0 = q * g.stride_w - g.pad_w;
    v.h1 = min_int(v.h0 + g.r, g.h + g.pad_h), v.w1 = min_int(v.w0 + g.s, g.w + g.pad_w);
    int area = (v.h1 - v.h0) * (v.w1 - v.w0);
    v.h0 = max_int(v.h0, 0), v.w0 = max_int(v.w0, 0);
    v.h1 = min_int(v.h1, g.h), v.w1 = min_int(v.w1, g.w);
    if (!g.count_include_pad) area = (v.h1 - v.h0) * (v.w1 - v.w0);
    v.scale = 1.0f / static_cast<float>(g.divisor_override ? g.divisor_override : area);
  }
  return v;
}

// Position of work item i: image, row, column (of an oh x ow map), first channel.
template <int N>
__device__ __forceinline__ void pool_item(int64_t i, int vecs, int oh, int ow, int64_t& n, int& y, int& x, int& c) {
  c = static_cast<int>(i % vecs) * N;
  int64_t pixel = i / vecs;
  x = static_cast<int>(pixel % ow);
  y = static_cast<int>(pixel / ow % oh);
  n = pixel / (static_cast<int64_t>(oh) * ow);
}

template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads) max_pool_kernel(PoolParams<T> k) {
  ptx::pdl_wait();
  const PoolShape& g = k.shape;
  const int vecs = g.c / N;
  const int64_t total = static_cast<int64_t>(g.n) * g.p * g.q * vecs,
                step = static_cast<int64_t>(gridDim.x) * kPoolThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x; i < total; i += step) {
    int64_t n;
    int p, q, c;
    pool_item<N>(i, vecs, g.p, g.q, n, p, q, c);
    const T* image = k.in + n * g.h * g.w * g.c + c;
    float best[N];
    int where[N];
#pragma unroll
    for (int j = 0; j < N; ++j) best[j] = -INFINITY, where[j] = -1;
    for (int r = 0; r < g.r; ++r) {
      int h = p * g.stride_h - g.pad_h + r * g.dil_h;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(g.h)) continue;
      for (int s = 0; s < g.s; ++s) {
        int w = q * g.stride_w - g.pad_w + s * g.dil_w;
        if (static_cast<unsigned>(w) >= static_cast<unsigned>(g.w)) continue;
        float x[N];
        load_floats<N>(x, image + (static_cast<int64_t>(h) * g.w + w) * g.c);
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (where[j] < 0 || x[j] > best[j] || x[j] != x[j]) best[j] = x[j], where[j] = r * g.s + s;
      }
    }
    const int64_t at = ((n * g.p + p) * g.q + q) * g.c + c;
    store_floats<N>(k.out + at, best);
    if (k.offsets) {
      Vec<uint8_t, N> v;
#pragma unroll
      for (int j = 0; j < N; ++j) v.v[j] = static_cast<uint8_t>(where[j]);
      VECTOR_ACCESS(k.offsets + at, sizeof(v));
      *reinterpret_cast<Vec<uint8_t, N>*>(k.offsets + at) = v;
    }
  }
}

// dx[h] = sum over windows p with h = p stride - pad + r dil for some r, and offset = that (r, s).
template <class T, int N>
__global__ void __launch_bounds__(kPoolThreads) max_pool_backward_kernel(PoolParams<T> k) {
  ptx::pdl_wait();
  const PoolShape& g = k.shape;
  const int vecs = g.c / N;
  const int64_t total = static_cast<int64_t>(g.n) * g.h * g.w * vecs,
                step = static_cast<int64_t>(gridDim.x) * kPoolThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x; i < total; i += step) {
    int64_t n;
    int h, w, c;
    pool_item<N>(i, vecs, g.h, g.w, n, h, w, c);
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = 0.0f;
    for (int r = 0; r < g.r; ++r) {
      int ph = h + g.pad_h - r * g.dil_h;
      if (ph < 0 || ph % g.stride_h || ph / g.stride_h >= g.p) continue;
      for (int s = 0; s < g.s; ++s) {
        int qw = w + g.pad_w - s * g.dil_w;
        if (qw < 0 || qw % g.stride_w || qw / g.stride_w >= g.q) continue;
        const int64_t at = ((n * g.p + ph / g.stride_h) * g.q + qw / g.stride_w) * g.c + c;
        VECTOR_ACCESS(k.offsets + at, N);
        const auto offsets = *reinterpret_cast<const Vec<uint8_t, N>*>(k.offsets + at);
        float dy[N];
        load_floats<N>(dy, k.in + at);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += offsets.v[j] == r * g.s + s ? dy[j] : 0.0f;
      }
    }
    store_floats<N>(k.out + ((n * g.h + h) * g.w + w) * g.c + c, sum);
  }
}

template <class T, int N, PoolKind Kind>
__global__ void __launch_bounds__(kPoolThreads) avg_pool_kernel(PoolParams<T> k) {
  ptx::pdl_wait();
  const PoolShape& g = k.shape;
  const int vecs = g.c / N;
  const int64_t total = static_cast<int64_t>(g.n) * g.p * g.q * vecs,
                step = static_cast<int64_t>(gridDim.x) * kPoolThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x; i < total; i += step) {
    int64_t n;
    int p, q, c;
    pool_item<N>(i, vecs, g.p, g.q, n, p, q, c);
    const PoolWindow v = pool_window<Kind>(g, p, q);
    const T* image = k.in + n * g.h * g.w * g.c + c;
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = 0.0f;
    for (int h = v.h0; h < v.h1; ++h)
      for (int w = v.w0; w < v.w1; ++w) {
        float x[N];
        load_floats<N>(x, image + (static_cast<int64_t>(h) * g.w + w) * g.c);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += x[j];
      }
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] *= v.scale;
    store_floats<N>(k.out + ((n * g.p + p) * g.q + q) * g.c + c, sum);
  }
}

// dx[h] = sum over windows that hold h of dy / divisor of that window.
template <class T, int N, PoolKind Kind>
__global__ void __launch_bounds__(kPoolThreads) avg_pool_backward_kernel(PoolParams<T> k) {
  ptx::pdl_wait();
  const PoolShape& g = k.shape;
  const int vecs = g.c / N;
  const int64_t total = static_cast<int64_t>(g.n) * g.h * g.w * vecs,
                step = static_cast<int64_t>(gridDim.x) * kPoolThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x; i < total; i += step) {
    int64_t n;
    int h, w, c, p0, p1, q0, q1;
    pool_item<N>(i, vecs, g.h, g.w, n, h, w, c);
    if constexpr (Kind == PoolKind::kAdaptiveAvg) {  // the windows over h are those of the inverse map
      p0 = adaptive_begin(h, g.p, g.h), p1 = adaptive_end(h, g.p, g.h);
      q0 = adaptive_begin(w, g.q, g.w), q1 = adaptive_end(w, g.q, g.w);
    } else {
      p0 = max_int(floor_div(h + g.pad_h - g.r, g.stride_h) + 1, 0), p1 = min_int((h + g.pad_h) / g.stride_h + 1, g.p);
      q0 = max_int(floor_div(w + g.pad_w - g.s, g.stride_w) + 1, 0), q1 = min_int((w + g.pad_w) / g.stride_w + 1, g.q);
    }
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = 0.0f;
    for (int p = p0; p < p1; ++p)
      for (int q = q0; q < q1; ++q) {
        const float scale = pool_window<Kind>(g, p, q).scale;
        float dy[N];
        load_floats<N>(dy, k.in + ((n * g.p + p) * g.q + q) * g.c + c);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = fmaf(dy[j], scale, sum[j]);
      }
    store_floats<N>(k.out + ((n * g.h + h) * g.w + w) * g.c + c, sum);
  }
}

template <class T, int N>
Status run_pool(PoolKind kind, bool backward, const PoolParams<T>& p, dim3 grid, Stream stream) {
  const dim3 block(kPoolThreads);
  switch (kind) {
    case PoolKind::kMax:
      return backward ? launch(max_pool_backward_kernel<T, N>, grid, block, 0, stream, p)
                      : launch(max_pool_kernel<T, N>, grid, block, 0, stream, p);
    case PoolKind::kAvg:
      return backward ? launch(avg_pool_backward_kernel<T, N, PoolKind::kAvg>, grid, block, 0, stream, p)
                      : launch(avg_pool_kernel<T, N, PoolKind::kAvg>, grid, block, 0, stream, p);
    default:
      return backward ? launch(avg_pool_backward_kernel<T, N, PoolKind::kAdaptiveAvg>, grid, block, 0, stream, p)
                      : launch(avg_pool_kernel<T, N, PoolKind::kAdaptiveAvg>, grid, block, 0, stream, p);
  }
}

template <class T>
Status launch_pool(PoolKind kind, bool backward, const PoolParams<T>& p, Stream stream) {
  const PoolShape& g = p.shape;
  if (Status status{pool_limit(g, kind, p.offsets != nullptr, g.divisor_override)}; !status.ok()) return status;
  if (kind == PoolKind::kMax && backward && !p.offsets) return {"max_pool2d_backward: needs the offsets"};
  constexpr int kN = kVec16<T>;
  const bool vec = g.c % kN == 0 &&
                   (reinterpret_cast<uintptr_t>(p.in) | reinterpret_cast<uintptr_t>(p.out)) % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(p.offsets) % kN == 0;
  const int64_t positions =
      static_cast<int64_t>(g.n) * (backward ? static_cast<int64_t>(g.h) * g.w : static_cast<int64_t>(g.p) * g.q);
  const int64_t blocks = ceil_div64(positions * (vec ? g.c / kN : g.c), kPoolThreads);
  const dim3 grid(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20));
  return vec ? run_pool<T, kN>(kind, backward, p, grid, stream) : run_pool<T, 1>(kind, backward, p, grid, stream);
}

}  // namespace fastconv
