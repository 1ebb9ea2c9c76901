// Optimizer steps of many tensors in one launch: weights w, gradients g, state m (and v).
//
//   SGD    d = g + decay w;  m = momentum m + d;  w -= lr (nesterov ? d + momentum m : m)      (no m: w -= lr d)
//   Adam   d = g + l2 w;  w *= keep;  m += (1 - beta1)(d - m);  v = beta2 v + (1 - beta2) d^2
//          w -= rate m / (sqrt(v) / root + eps)
// with rate = lr / (1 - beta1^t), root = sqrt(1 - beta2^t), keep = 1 - lr decay (AdamW) and l2 = decay (Adam): formulas
// and their order are torch.optim's, and those of csrc/cpu/kernels/optimizer.h. w, m and v are fp32, g is fp32, fp16 or
// bf16; half takes the new weights once more in 16 bits, for the next forward pass. All lie in the same order.
//
// Mapping: a block owns kUpdateChunk elements of one tensor, which it finds by bisection in the table of first blocks;
// the table comes as a kernel argument, so nothing has to be copied to the device before. hyper lies on the device: a
// captured step reads the learning rate of its own replay.
// live: filter taps that read input (bit r * S + s, of filters [k, r, s, c]). Others have a zero gradient; where
// neither decay nor state would move them the caller leaves them out, and their bytes with them. Bytes per element: w,
// m (and v) in and out, g in, half out: 22 for SGD with momentum and bf16. Limits: none but 2^31 blocks.
#pragma once

#include "common.cuh"
#include "launch.cuh"
#include "shapes.h"

namespace fastconv {

constexpr int kUpdateThreads = 256;
constexpr int kUpdateVector = 4;  // elements of one fp32 access of 16 bytes
// Four accesses per thread and tensor keep enough bytes in flight; a smaller chunk would bisect more often.
constexpr int kUpdateChunk = kUpdateThreads * kUpdateVector * 4;
// A kernel's arguments may have 4 KiB on every toolkit and 32 KiB since CUDA 12.1; this table takes 11. ResNet50 has 54
// tensors with a 16-bit copy and 107 without.
constexpr int kUpdateTensors = 128;

enum class UpdateRule { kPlainSgd, kSgd, kAdam };

struct UpdateParams {
  const double* hyper;
  int count;
  int first_block[kUpdateTensors + 1];  // of each tensor; first_block[count] = all blocks
  UpdateTensor tensors[kUpdateTensors];
};

struct UpdateRates {
  float lr, momentum, decay, nesterov;                   // SGD
  float rate, gain1, beta2, gain2, root, eps, keep, l2;  // Adam
};

template <UpdateRule Rule>
__device__ __forceinline__ UpdateRates update_rates(const double* h) {
  UpdateRates r{};
  if (Rule == UpdateRule::kAdam) {
    r.rate = static_cast<float>(h[0]), r.gain1 = static_cast<float>(1.0 - h[1]);
    r.beta2 = static_cast<float>(h[2]), r.gain2 = static_cast<float>(1.0 - h[2]);
    r.root = static_cast<float>(h[3]), r.eps = static_cast<float>(h[4]);
    r.keep = static_cast<float>(h[5]), r.l2 = static_cast<float>(h[6]);
  } else {
    r.lr = static_cast<float>(h[0]), r.momentum = static_cast<float>(h[1]);
    r.decay = static_cast<float>(h[2]), r.nesterov = static_cast<float>(h[3]);
  }
  return r;
}

template <int N>
__device__ __forceinline__ void load_any(float (&out)[N], const void* p, int dtype, int64_t at) {
  if (dtype == 0) {
    load_floats<N>(out, static_cast<const float*>(p) + at);
  } else if (dtype == 1) {
    load_floats<N>(out, static_cast<const __half*>(p) + at);
  } else {
    load_floats<N>(out, static_cast<const __nv_bfloat16*>(p) + at);
  }
}

template <UpdateRule Rule, int N>
__device__ __forceinline__ void update_elements(const UpdateTensor& t, const UpdateRates& r, int64_t at) {
  float w[N], d[N], m[N], v[N];
  load_floats<N>(w, t.w + at);
  load_any<N>(d, t.g, t.grad_dtype, at);
  for (int s = 1; s < t.splits; ++s) {  // as conv_reduce.cuh adds them
    float more[N];
    load_floats<N>(more, static_cast<const float*>(t.g) + s * t.elements + at);
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] += more[i];
  }
  if (Rule != UpdateRule::kPlainSgd) load_floats<N>(m, t.m + at);
  if (Rule == UpdateRule::kAdam) {
    load_floats<N>(v, t.v + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      d[i] += w[i] * r.l2;
      w[i] *= r.keep;
      m[i] += (d[i] - m[i]) * r.gain1;
      v[i] = v[i] * r.beta2 + d[i] * d[i] * r.gain2;
      w[i] -= m[i] / (sqrtf(v[i]) / r.root + r.eps) * r.rate;
    }
    store_floats<N>(t.v + at, v);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      d[i] += w[i] * r.decay;
      if (Rule == UpdateRule::kSgd) {
        m[i] = m[i] * r.momentum + d[i];
        d[i] = r.nesterov != 0.0f ? d[i] + m[i] * r.momentum : m[i];
      }
      w[i] -= d[i] * r.lr;
    }
  }
  if (Rule != UpdateRule::kPlainSgd) store_floats<N>(t.m + at, m);
  store_floats<N>(t.w + at, w);
  if (t.half == nullptr) return;
  if (t.half_dtype == 1) {
    store_floats<N>(static_cast<__half*>(t.half) + at, w);
  } else {
    store_floats<N>(static_cast<__nv_bfloat16*>(t.half) + at, w);
  }
}

__device__ __forceinline__ bool update_is_live(const UpdateTensor& t, int64_t at) {
  return t.live == kAllLive || (t.live >> (at / t.inner % t.taps) & 1) != 0;
}

template <UpdateRule Rule>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(const __grid_constant__ UpdateParams p) {
  ptx::pdl_wait();
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = p.count;  // the last tensor whose first block is not behind this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  // A copy in registers: through a reference nvcc takes the pointers from the table at every access, and splits the
  // 16-byte stores into single words (seen in the machine code).
  const UpdateTensor t = p.tensors[low];
  const UpdateRates rates = update_rates<Rule>(p.hyper);
  const int64_t begin = static_cast<int64_t>(block - p.first_block[low]) * kUpdateChunk;
  const int64_t end = begin + kUpdateChunk < t.elements ? begin + kUpdateChunk : t.elements;
  const int64_t whole = t.vec ? begin + (end - begin) / kUpdateVector * kUpdateVector : begin;
  for (int64_t at = begin + threadIdx.x * kUpdateVector; at < whole; at += kUpdateThreads * kUpdateVector)
    if (update_is_live(t, at)) update_elements<Rule, kUpdateVector>(t, rates, at);
  for (int64_t at = whole + threadIdx.x; at < end; at += kUpdateThreads)
    if (update_is_live(t, at)) update_elements<Rule, 1>(t, rates, at);
}

// tensors: any number; they go in as many launches as their table needs. vec is filled in here.
template <UpdateRule Rule>
Status launch_update(const double* hyper, const UpdateTensor* tensors, int count, Stream stream) {
  for (int at = 0; at < count;) {
    UpdateParams p{};
    p.hyper = hyper;
    int64_t blocks = 0;
    for (; at < count && p.count < kUpdateTensors; ++at) {
      UpdateTensor t = tensors[at];
      if (t.elements == 0) continue;
      const uintptr_t words =
          reinterpret_cast<uintptr_t>(t.w) | reinterpret_cast<uintptr_t>(t.m) | reinterpret_cast<uintptr_t>(t.v);
      const uintptr_t grad = reinterpret_cast<uintptr_t>(t.g) % (t.grad_dtype == 0 ? 16 : 8);
      t.vec = words % 16 == 0 && grad == 0 && reinterpret_cast<uintptr_t>(t.half) % 8 == 0 &&
              (t.live == kAllLive || t.inner % kUpdateVector == 0) &&
              (t.splits == 1 || t.elements % kUpdateVector == 0);
      const int64_t more = ceil_div64(t.elements, kUpdateChunk);
      if (blocks + more > 0x7fffffff) {
        if (p.count == 0) return {"update: more than 2^31 blocks for one tensor"};
        break;
      }
      p.first_block[p.count] = static_cast<int>(blocks);
      p.tensors[p.count++] = t;
      blocks += more;
    }
    if (p.count == 0) return {};
    p.first_block[p.count] = static_cast<int>(blocks);
    const Status status =
        launch(update_kernel<Rule>, dim3(static_cast<unsigned>(blocks)), dim3(kUpdateThreads), 0, stream, p);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace fastconv
