// Sum of split-K partials, then the epilogue: out[i] = epilogue(sum_s partial[s][i]), in the order s = 0, 1, ...
//
// One thread per 4 elements (or 1 where unaligned), grid-stride. fp32 sums. Bytes: splits * 4 * n read, n * sizeof(T)
// written.
#pragma once

#include "conv_epilogue.cuh"
#include "launch.cuh"

namespace fastconv {

constexpr int kReduceThreads = 256;

template <class T, int N>
__global__ void __launch_bounds__(kReduceThreads)
    conv_reduce_kernel(ConvEpilogue<T> e, const float* partial, int splits, int64_t elems, int channels) {
  ptx::pdl_wait();
  int64_t step = static_cast<int64_t>(gridDim.x) * kReduceThreads * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x) * N; i < elems; i += step) {
    float sum[N];
    load_floats<N>(sum, partial + i);
    for (int s = 1; s < splits; ++s) {
      float x[N];
      load_floats<N>(x, partial + s * elems + i);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += x[j];
    }
    epilogue_values<N>(e, sum, static_cast<int>(i % channels), i);
    store_floats<N>(e.out + i, sum);
  }
}

// channels: length of the innermost axis. e.partial is the source here.
template <class T>
Status run_conv_reduce(ConvEpilogue<T> e, int splits, int64_t elems, int channels, bool vec, Stream stream) {
  const float* partial = e.partial;
  e.partial = nullptr;
  int n = vec ? 4 : 1;
  int64_t blocks = ceil_div64(elems, static_cast<int64_t>(kReduceThreads) * n);
  dim3 grid(static_cast<unsigned>(blocks < 4096 ? blocks : 4096));
  return vec ? launch(conv_reduce_kernel<T, 4>, grid, dim3(kReduceThreads), 0, stream, e, partial, splits, elems,
                      channels)
             : launch(conv_reduce_kernel<T, 1>, grid, dim3(kReduceThreads), 0, stream, e, partial, splits, elems,
                      channels);
}

}  // namespace fastconv
