// Backward of an activation and the bias gradient, in one pass.
//
//   grad_preact[i] = grad_output[i] * act'(saved[i]);   grad_bias[c] = sum over rows of grad_preact[:, c]
//
// [rows, channels] = n h w flattened, NHWC; saved is the output or the pre-activation (activation.cuh). Mapping:
// column_tile.cuh; a chunk's sums go to partial[chunk][channel] (fp32) and act_bias_merge adds the chunks in a fixed
// order. Either result may be left out. Bytes: two tensors read, one written; without grad_preact one or two read.
#pragma once

#include "activation.cuh"
#include "column_tile.cuh"
#include "launch.cuh"

namespace fastconv {

template <class T>
struct ActBackwardParams {
  const T* grad_output;
  const T* saved;  // null for identity
  T* grad_preact;  // null: not wanted
  float* partial;  // [chunks, channels] workspace; null: grad_bias not wanted
  T* grad_bias;    // [channels]
  Activation act;
  ColumnShape shape;  // column_shape(rows, channels, kVec16<T> if act_backward_vec, ...)
};

template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) act_backward_kernel(ActBackwardParams<T> p) {
  SMEM_ARRAY(float, shared, kColumnThreads* N);
  ptx::pdl_wait();
  ColumnThread<N> t(p.shape);
  float sum[N];
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = 0.0f;
  for (int64_t row = t.row; row < t.end; row += t.step) {
    int64_t at = row * p.shape.channels + t.c;
    float g[N];
    load_floats<N>(g, p.grad_output + at);
    if (p.saved) {
      float s[N];
      load_floats<N>(s, p.saved + at);
      activation_grad_all<N>(p.act, s);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] *= s[j];
    }
    if (p.grad_preact) store_floats<N>(p.grad_preact + at, g);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += g[j];
  }
  if (!p.partial) return;  // the same for every thread
  column_sum<N>(sum, t, shared);
  if (t.y == 0 && t.active) store_floats<N>(p.partial + static_cast<int64_t>(blockIdx.y) * p.shape.channels + t.c, sum);
}

template <class T>
__global__ void __launch_bounds__(kMergeChannels* kMergeSlices)
    act_bias_merge_kernel(const float* partial, T* grad_bias, int chunks, int channels) {
  SMEM_ARRAY(float, shared, kMergeChannels* kMergeSlices);
  ptx::pdl_wait();
  const int lane = threadIdx.x % kMergeChannels, slice = threadIdx.x / kMergeChannels;
  const int c = blockIdx.x * kMergeChannels + lane;
  float sum = 0.0f;
  if (c < channels)
    for (int i = slice; i < chunks; i += kMergeSlices) sum += partial[static_cast<int64_t>(i) * channels + c];
  sum = merge_slices(sum, shared, [](float a, float b) { return a + b; });
  if (slice == 0 && c < channels) grad_bias[c] = from_float<T>(sum);
}

// Whether 16-byte accesses fit; the shape must be made with the same answer.
template <class T>
bool act_backward_vec(const ActBackwardParams<T>& p, int channels) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.grad_output) | reinterpret_cast<uintptr_t>(p.saved) |
                   reinterpret_cast<uintptr_t>(p.grad_preact) | reinterpret_cast<uintptr_t>(p.partial);
  return bits % 16 == 0 && channels % kVec16<T> == 0;
}

template <class T>
Status launch_act_backward(const ActBackwardParams<T>& p, Stream stream) {
  constexpr int kN = kVec16<T>;
  Status status = act_backward_vec(p, p.shape.channels)
                      ? launch(act_backward_kernel<T, kN>, column_grid<kN>(p.shape), dim3(kColumnThreads), 0, stream, p)
                      : launch(act_backward_kernel<T, 1>, column_grid<1>(p.shape), dim3(kColumnThreads), 0, stream, p);
  if (!status.ok() || !p.partial) return status;
  return launch(act_bias_merge_kernel<T>, dim3(ceil_div(p.shape.channels, kMergeChannels)),
                dim3(kMergeChannels * kMergeSlices), 0, stream, p.partial, p.grad_bias, column_chunks(p.shape),
                p.shape.channels);
}

}  // namespace fastconv
