// Batch normalisation backward, with the activation and the residual.
//
// With z = xhat weight + bias + residual, y = act(z), xhat = (x - mean) invstd, and g = dy act'(z):
//   dresidual = g,   dbias = sum g,   dweight = sum g xhat                     (sums over the rows)
//   training:  mean and invstd depend on x, so
//              dx = weight invstd (g - sum(g) / rows - xhat sum(g xhat) / rows)
//   eval:      dx = weight invstd g
// act' comes from the saved output, or where there is none from z, recomputed from x as the forward computed it.
//
// Mapping: column_tile.cuh. Many rows: (1) partial sums per chunk and dresidual, (2) merge, (3) dx, which reads g back
// from dresidual where that was written (one tensor less). Few rows: one launch, a block owns its channels. Where the
// data gradient that makes dy has made g of it and summed in its epilogue, (2) and (3) are left: g and x are read once.
// Sums fp32, in a fixed order. Bytes: dy, x, output read twice, dx and dresidual written once.
#pragma once

#include "batch_norm.cuh"

namespace fastconv {

template <class T>
struct BatchNormBackwardParams {
  const T* dy;
  const T* x;
  const T* output;    // null where z is recomputed or act is identity
  const T* residual;  // only to recompute z; or null
  ChannelVector weight, bias;
  const float* mean;
  const float* invstd;
  T* dx;                            // null: not wanted
  T* dresidual;                     // null: not wanted
  ChannelVectorOut dweight, dbias;  // data null: not wanted
  float* part_g;                    // [chunks, channels] workspaces
  float* part_gx;
  float* sum_g;  // [channels]
  float* sum_gx;
  SplitSum<T> split;  // parts null: dy is there; else dy = split.into, for few rows only
  bool training;
  Activation act;
  ColumnShape shape;
};

template <class T, int N>
struct BackwardChannels {  // what a thread keeps of its channels
  float mean[N], invstd[N], weight[N], bias[N];
  __device__ __forceinline__ BackwardChannels(const BatchNormBackwardParams<T>& p, const ColumnThread<N>& t) {
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = invstd[j] = weight[j] = bias[j] = 0.0f;
    if (!t.active) return;
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = p.mean[t.c + j], invstd[j] = p.invstd[t.c + j];
    p.weight.template get_all<T>(weight, t.c, 1.0f);
    p.bias.template get_all<T>(bias, t.c, 0.0f);
  }
  // g and xhat of one row. Split: dy comes as split sums, and is written for the next time.
  template <bool Split>
  __device__ __forceinline__ void row(const BatchNormBackwardParams<T>& p, const ColumnThread<N>& t, int64_t at,
                                      float (&g)[N], float (&xhat)[N]) const {
    if (Split) {
      load_split<N>(g, p.split, at, t.c, true);
    } else {
      load_floats<N>(g, p.dy + at);
    }
    load_floats<N>(xhat, p.x + at);
    float saved[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      xhat[j] -= mean[j];
      saved[j] = fmaf(xhat[j], invstd[j] * weight[j], bias[j]);
      xhat[j] *= invstd[j];
    }
    if (p.act == Activation::kIdentity) return;
    if (p.output) {
      load_floats<N>(saved, p.output + at);
    } else if (p.residual) {
      float r[N];
      load_floats<N>(r, p.residual + at);
#pragma unroll
      for (int j = 0; j < N; ++j) saved[j] += r[j];
    }
    activation_grad_all<N>(p.act, saved);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] *= saved[j];
  }
};

template <bool Split, class T, int N>
__device__ __forceinline__ void backward_sums(const BatchNormBackwardParams<T>& p, const ColumnThread<N>& t,
                                              const BackwardChannels<T, N>& k, float (&sum_g)[N], float (&sum_gx)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) sum_g[j] = sum_gx[j] = 0.0f;
  for (int64_t row = t.row; row < t.end; row += t.step) {
    int64_t at = row * p.shape.channels + t.c;
    float g[N], xhat[N];
    k.template row<Split>(p, t, at, g, xhat);
    if (p.dresidual) store_floats<N>(p.dresidual + at, g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum_g[j] += g[j];
      sum_gx[j] = fmaf(g[j], xhat[j], sum_gx[j]);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void backward_dx(const BatchNormBackwardParams<T>& p, const ColumnThread<N>& t,
                                            const BackwardChannels<T, N>& k, const float (&sum_g)[N],
                                            const float (&sum_gx)[N]) {
  const float share = p.training ? 1.0f / static_cast<float>(p.shape.rows) : 0.0f;
  for (int64_t row = t.row; row < t.end; row += t.step) {
    int64_t at = row * p.shape.channels + t.c;
    float g[N], xhat[N];
    k.template row<false>(p, t, at, g, xhat);
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] = k.weight[j] * k.invstd[j] * (g[j] - (sum_g[j] + xhat[j] * sum_gx[j]) * share);
    store_floats<N>(p.dx + at, g);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) bn_backward_sums_kernel(BatchNormBackwardParams<T> p) {
  SMEM_ARRAY(float, shared, kColumnThreads* N);
  ptx::pdl_wait();
  ColumnThread<N> t(p.shape);
  BackwardChannels<T, N> k(p, t);
  float sum_g[N], sum_gx[N];
  backward_sums<false>(p, t, k, sum_g, sum_gx);
  column_sum<N>(sum_g, t, shared);
  column_sum<N>(sum_gx, t, shared);
  if (t.y == 0 && t.active) {
    int64_t at = static_cast<int64_t>(blockIdx.y) * p.shape.channels + t.c;
    store_floats<N>(p.part_g + at, sum_g);
    store_floats<N>(p.part_gx + at, sum_gx);
  }
}

template <class T>
__global__ void __launch_bounds__(kMergeChannels* kMergeSlices)
    bn_backward_merge_kernel(BatchNormBackwardParams<T> p, int chunks) {
  SMEM_ARRAY(float2, shared, kMergeChannels * kMergeSlices);
  ptx::pdl_wait();
  const int lane = threadIdx.x % kMergeChannels, slice = threadIdx.x / kMergeChannels;
  const int c = blockIdx.x * kMergeChannels + lane;
  float2 sum = make_float2(0.0f, 0.0f);
  if (c < p.shape.channels)
    for (int i = slice; i < chunks; i += kMergeSlices) {
      sum.x += p.part_g[static_cast<int64_t>(i) * p.shape.channels + c];
      sum.y += p.part_gx[static_cast<int64_t>(i) * p.shape.channels + c];
    }
  sum = merge_slices(sum, shared, [](const float2& a, const float2& b) { return make_float2(a.x + b.x, a.y + b.y); });
  if (slice != 0 || c >= p.shape.channels) return;
  p.sum_g[c] = sum.x;
  p.sum_gx[c] = sum.y;
  p.dbias.template set<T>(c, sum.x);
  p.dweight.template set<T>(c, sum.y);
}

template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) bn_backward_dx_kernel(BatchNormBackwardParams<T> p) {
  ptx::pdl_wait();
  ColumnThread<N> t(p.shape);
  if (!t.active) return;
  BackwardChannels<T, N> k(p, t);
  float sum_g[N], sum_gx[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    sum_g[j] = p.training ? p.sum_g[t.c + j] : 0.0f;
    sum_gx[j] = p.training ? p.sum_gx[t.c + j] : 0.0f;
  }
  backward_dx<T, N>(p, t, k, sum_g, sum_gx);
}

// One launch: shape.chunk_rows = rows.
template <class T, int N, bool Split>
__global__ void __launch_bounds__(kColumnThreads) bn_backward_small_kernel(BatchNormBackwardParams<T> p) {
  SMEM_ARRAY(float, shared, kColumnThreads* N);
  ptx::pdl_wait();
  ColumnThread<N> t(p.shape);
  BackwardChannels<T, N> k(p, t);
  float sum_g[N], sum_gx[N];
  backward_sums<Split>(p, t, k, sum_g, sum_gx);
  column_sum<N>(sum_g, t, shared);
  column_sum<N>(sum_gx, t, shared);
  if (t.y == 0 && t.active) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      p.dbias.template set<T>(t.c + j, sum_g[j]);
      p.dweight.template set<T>(t.c + j, sum_gx[j]);
    }
  }
  if (p.dx) backward_dx<T, N>(p, t, k, sum_g, sum_gx);
}

template <class T>
bool batch_norm_backward_vec(const BatchNormBackwardParams<T>& p, int channels) {
  uintptr_t bits = 0;
  for (const void* q :
       {static_cast<const void*>(p.dy), static_cast<const void*>(p.x), static_cast<const void*>(p.output),
        static_cast<const void*>(p.residual), static_cast<const void*>(p.dx), static_cast<const void*>(p.dresidual),
        static_cast<const void*>(p.part_g), static_cast<const void*>(p.part_gx),
        static_cast<const void*>(p.split.parts), static_cast<const void*>(p.split.addend)})
    bits |= reinterpret_cast<uintptr_t>(q);
  return bits % 16 == 0 && channels % kVec16<T> == 0;
}

// part_sums > 0: dy is g, and part_g and part_gx hold [part_sums, channels] sums from the data gradient's epilogue.
template <class T, int N>
Status run_batch_norm_backward(BatchNormBackwardParams<T> p, int64_t part_sums, Stream stream) {
  const dim3 block(kColumnThreads);
  const auto merge = [&](int64_t chunks) {
    return launch(bn_backward_merge_kernel<T>, dim3(ceil_div(p.shape.channels, kMergeChannels)),
                  dim3(kMergeChannels * kMergeSlices), 0, stream, p, static_cast<int>(chunks));
  };
  if (part_sums > 0) {
    if (!p.dx || p.split.parts) return {"batch_norm_backward: sums of a data gradient go with dx and a whole dy"};
    p.act = Activation::kIdentity;
    const Status status = merge(part_sums);
    return status.ok() ? launch(bn_backward_dx_kernel<T, N>, column_grid<N>(p.shape), block, 0, stream, p) : status;
  }
  if (needs_output(p.act) && !p.output) return {"batch_norm_backward: this activation needs output"};
  if (p.shape.rows <= kBatchNormSmallRows) {
    p.shape.chunk_rows = p.shape.rows;
    spread_columns<N>(p.shape);
    if (p.split.parts)
      return launch(bn_backward_small_kernel<T, N, true>, column_grid<N>(p.shape), block, 0, stream, p);
    return launch(bn_backward_small_kernel<T, N, false>, column_grid<N>(p.shape), block, 0, stream, p);
  }
  if (p.split.parts) return {"batch_norm_backward: split sums go with few rows"};
  // eval's dx needs no sums: the first pass then runs only for what else was asked
  bool sums = p.dweight.data || p.dbias.data || p.dresidual || (p.training && p.dx);
  if (sums) {
    Status status = launch(bn_backward_sums_kernel<T, N>, column_grid<N>(p.shape), block, 0, stream, p);
    if (!status.ok()) return status;
    status = merge(column_chunks(p.shape));
    if (!status.ok()) return status;
  }
  if (!p.dx) return {};
  if (p.dresidual) {  // holds g, rounded to T as PyTorch's unfused chain rounds it
    p.dy = p.dresidual;
    p.act = Activation::kIdentity;
  }
  return launch(bn_backward_dx_kernel<T, N>, column_grid<N>(p.shape), block, 0, stream, p);
}

// Workspaces part_g, part_gx, sum_g, sum_gx are needed when rows > kBatchNormSmallRows or part_sums > 0.
template <class T>
Status launch_batch_norm_backward(const BatchNormBackwardParams<T>& p, int64_t part_sums, Stream stream) {
  return batch_norm_backward_vec(p, p.shape.channels) ? run_batch_norm_backward<T, kVec16<T>>(p, part_sums, stream)
                                                      : run_batch_norm_backward<T, 1>(p, part_sums, stream);
}

}  // namespace fastconv
