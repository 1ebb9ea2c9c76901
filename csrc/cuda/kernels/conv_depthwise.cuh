// Depthwise convolution (groups = c, k = c): direct kernels, no GEMM.
//
//   fprop   y[n,p,q,c]  = sum_{r,s} x[n,h,w,c] w[c,r,s]
//   dgrad   dx[n,h,w,c] = sum_{r,s} dy[n,p,q,c] w[c,r,s]       (p = (h + pad - r dil) / stride where it divides)
//   wgrad   dw[c,r,s]   = sum_{n,p,q} dy[n,p,q,c] x[n,h,w,c]
//
// A tensor core would work on 1 of 16 columns; the bytes bound these kernels anyway. fprop and dgrad: one thread makes
// one position x N channels (N = 16 bytes, or 1 where unaligned), neighbouring threads take neighbouring channels. The
// filter is read through L1 as [c][r][s]. wgrad: a block takes kChannels channels of one tap and a share of the
// positions; threads (channel, slice) sum in fp32, slices are added through shared memory in a fixed order, shares by
// conv_reduce (as split-K). FLOPs 2 n p q c r s; least bytes: x, y, w once. Limits: size_limits.h.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_reduce.cuh"
#include "launch.cuh"
#include "size_limits.h"

namespace fastconv {

constexpr int kDepthwiseThreads = 128;

template <class T>
struct DepthwiseParams {
  const T* a;  // x (fprop), dy (dgrad, wgrad)
  const T* b;  // w (fprop, dgrad), x (wgrad)
  ConvShape shape;
  ConvPrologue prologue;  // fprop only
  ConvEpilogue<T> epilogue;
  int splits;  // wgrad only
};

template <class T, int N, bool Dgrad>
__global__ void __launch_bounds__(kDepthwiseThreads) depthwise_kernel(DepthwiseParams<T> p) {
  ptx::pdl_wait();
  const ConvShape& g = p.shape;
  const int vecs = g.c / N;
  const int out_h = Dgrad ? g.h : g.p, out_w = Dgrad ? g.w : g.q, in_h = Dgrad ? g.p : g.h, in_w = Dgrad ? g.q : g.w;
  const int64_t total = static_cast<int64_t>(g.n) * out_h * out_w * vecs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kDepthwiseThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x; i < total; i += step) {
    const int c = static_cast<int>(i % vecs) * N;
    const int64_t pixel = i / vecs;
    const int ow = static_cast<int>(pixel % out_w);
    const int oh = static_cast<int>(pixel / out_w % out_h);
    const T* image = p.a + pixel / (static_cast<int64_t>(out_w) * out_h) * in_h * in_w * g.c + c;
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = 0.0f;
    for (int r = 0; r < g.r; ++r) {
      int ih = Dgrad ? oh + g.pad_h - r * g.dil_h : oh * g.stride_h - g.pad_h + r * g.dil_h;
      if (Dgrad) {
        if (ih % g.stride_h) continue;
        ih /= g.stride_h;
      }
      if (static_cast<unsigned>(ih) >= static_cast<unsigned>(in_h)) continue;
      for (int s = 0; s < g.s; ++s) {
        int iw = Dgrad ? ow + g.pad_w - s * g.dil_w : ow * g.stride_w - g.pad_w + s * g.dil_w;
        if (Dgrad) {
          if (iw % g.stride_w) continue;
          iw /= g.stride_w;
        }
        if (static_cast<unsigned>(iw) >= static_cast<unsigned>(in_w)) continue;
        float x[N];
        load_floats<N>(x, image + (static_cast<int64_t>(ih) * in_w + iw) * g.c);
        if (!Dgrad && p.prologue.scale) {
#pragma unroll
          for (int j = 0; j < N; ++j) x[j] = x[j] * p.prologue.scale[c + j] + p.prologue.shift[c + j];
          activate_all<N>(p.prologue.act, x);
#pragma unroll
          for (int j = 0; j < N; ++j) x[j] = to_float(from_float<T>(x[j]));  // as if the layer before had stored it
        }
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = fmaf(x[j], to_float(p.b[(c + j) * g.r * g.s + r * g.s + s]), sum[j]);
      }
    }
    const int64_t at = pixel * g.c + c;
    epilogue_values<N>(p.epilogue, sum, c, at);
    store_floats<N>(p.epilogue.out + at, sum);
  }
}

// Block: 32 channels x 8 slices of the positions; grid: channels / 32, taps, splits.
constexpr int kWgradChannels = 32, kWgradSlices = 8;

template <class T>
__global__ void __launch_bounds__(kWgradChannels* kWgradSlices) depthwise_wgrad_kernel(DepthwiseParams<T> p) {
  SMEM_ARRAY(float, sums, kWgradChannels* kWgradSlices);
  ptx::pdl_wait();
  const ConvShape& g = p.shape;
  const int lane = threadIdx.x % kWgradChannels, slice = threadIdx.x / kWgradChannels;
  const int c = blockIdx.x * kWgradChannels + lane;
  const int r = blockIdx.y / g.s, s = blockIdx.y % g.s;
  const int h0 = r * g.dil_h - g.pad_h, w0 = s * g.dil_w - g.pad_w;
  // rows (n, p) are dealt to slices of all splits in turn
  const int64_t rows = static_cast<int64_t>(g.n) * g.p;
  float sum = 0.0f;
  for (int64_t row = static_cast<int64_t>(blockIdx.z) * kWgradSlices + slice; row < rows;
       row += static_cast<int64_t>(p.splits) * kWgradSlices) {
    const int64_t n = row / g.p;
    const int h = static_cast<int>(row % g.p) * g.stride_h + h0;
    if (c >= g.c || static_cast<unsigned>(h) >= static_cast<unsigned>(g.h)) continue;
    const T* dy = p.a + row * g.q * g.c + c;
    const T* x = p.b + (n * g.h + h) * g.w * g.c + c;
    for (int q = 0; q < g.q; ++q) {
      int w = q * g.stride_w + w0;
      if (static_cast<unsigned>(w) < static_cast<unsigned>(g.w))
        sum = fmaf(to_float(dy[static_cast<int64_t>(q) * g.c]), to_float(x[static_cast<int64_t>(w) * g.c]), sum);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();  // sums
  if (slice == 0 && c < g.c) {
    for (int i = 1; i < kWgradSlices; ++i) sum += sums[i * kWgradChannels + lane];
    const int taps = g.r * g.s;
    const int64_t at = static_cast<int64_t>(c) * taps + blockIdx.y;
    if (p.epilogue.partial) {
      p.epilogue.partial[static_cast<int64_t>(blockIdx.z) * g.c * taps + at] = sum;
    } else {
      p.epilogue.out[at] = from_float<T>(sum);
    }
  }
}

template <class T, bool Dgrad>
Status launch_depthwise(const DepthwiseParams<T>& p, Stream stream) {
  const ConvShape& g = p.shape;
  if (g.c != g.groups || g.k != g.c) return {"depthwise: needs groups = c = k"};
  if (p.epilogue.stat_mean) return {"depthwise: statistics are not fused"};
  if (Status status{conv_limit(g, Dgrad ? kDepthwiseDgrad : kDepthwiseFprop)}; !status.ok()) return status;
  const ConvEpilogue<T>& e = p.epilogue;
  bool vec = g.c % kVec16<T> == 0;
  const void* operands[] = {p.a, e.out, e.residual, e.preact, e.grad_saved};
  for (const void* q : operands) vec = vec && reinterpret_cast<uintptr_t>(q) % 16 == 0;
  const int n = vec ? kVec16<T> : 1;
  const int64_t items = static_cast<int64_t>(g.n) *
                        (Dgrad ? static_cast<int64_t>(g.h) * g.w : static_cast<int64_t>(g.p) * g.q) * (g.c / n);
  const int64_t blocks = ceil_div64(items, kDepthwiseThreads);
  dim3 grid(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20));
  return vec ? launch(depthwise_kernel<T, kVec16<T>, Dgrad>, grid, dim3(kDepthwiseThreads), 0, stream, p)
             : launch(depthwise_kernel<T, 1, Dgrad>, grid, dim3(kDepthwiseThreads), 0, stream, p);
}

// splits > 1 needs epilogue.partial: splits * c * r * s floats.
template <class T>
Status launch_depthwise_wgrad(DepthwiseParams<T> p, Stream stream) {
  const ConvShape& g = p.shape;
  if (g.c != g.groups || g.k != g.c) return {"depthwise: needs groups = c = k"};
  if (p.splits < 1 || p.splits > kMostGridYZ) return {"depthwise_wgrad: splits must be in [1, 65535]"};
  if (Status status{conv_limit(g, kDepthwiseWgrad)}; !status.ok()) return status;
  if (p.splits > 1 && !p.epilogue.partial) return {"depthwise_wgrad: a split sum needs a workspace"};
  if (p.splits == 1) p.epilogue.partial = nullptr;
  dim3 grid(ceil_div(g.c, kWgradChannels), g.r * g.s, p.splits);
  Status status = launch(depthwise_wgrad_kernel<T>, grid, dim3(kWgradChannels * kWgradSlices), 0, stream, p);
  if (!status.ok() || p.splits == 1) return status;
  return run_conv_reduce(p.epilogue, p.splits, static_cast<int64_t>(g.c) * g.r * g.s, 1, false, stream);
}

}  // namespace fastconv
