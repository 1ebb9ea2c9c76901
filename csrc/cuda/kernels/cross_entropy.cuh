// Cross-entropy forward: online softmax, class indices or probabilities, class weights, ignore_index, label smoothing.
//
// Row = one (n, d) of input [n, classes, d]; lse = log sum_c exp x_c; logp_c = x_c - lse; e = label_smoothing, V =
// classes.
//   indices        loss = w_t (1 - e) (-logp_t) + e / V sum_c w_c (-logp_c);  0 where t = ignore_index
//   probabilities  loss = sum_c w_c p'_c (-logp_c),  p'_c = p_c (1 - e) + e / V
//   mean           sum of losses / normalizer;  normalizer = sum of w_t over kept rows (indices) or number of rows
//
// Mapping: Lanes threads share a row. 1 where classes are few or lie apart in memory with d contiguous (neighbouring
// threads take neighbouring d); 32 up to a few thousand classes; the whole block beyond. A thread keeps a running
// maximum and a sum rescaled when the maximum moves, so the row is read once. A block adds its rows' losses and weights
// in a fixed order into part_loss / part_weight, which cross_entropy_finish adds in a fixed order: no atomics, no host
// read. fp32. lse is kept, so that the backward recomputes probabilities instead of storing them. A target outside [0,
// V) other than ignore_index makes its loss NaN and is never used as an address. Bytes: input once (probabilities too),
// lse once.
#pragma once

#include "common.cuh"
#include "launch.cuh"
#include "size_limits.h"

namespace fastconv {

template <class T>
struct LossParams {
  const T* input;
  const int64_t* target;     // class indices [n, d]; null: probabilities
  const uint8_t* target_u8;  // class indices as bytes, instead of target
  const T* probabilities;    // strides of input
  const float* weight;       // [classes] or null
  T* loss;                   // [rows] (none) or one value
  float* lse;                // [rows]
  float* normalizer;         // one value
  float* part_loss;          // [blocks] workspaces
  float* part_weight;
  LossShape shape;
};

inline int loss_lanes(const LossShape& s) { return loss_lanes(s.classes, s.stride_c != 1 && s.d > 1); }
inline int64_t loss_blocks(const LossShape& s) { return ceil_div64(s.rows, kLossThreads / loss_lanes(s)); }

struct RunningLse {
  float max, sum;  // sum of exp(x - max)
  __device__ __forceinline__ void add(float x) {
    if (x <= max) {
      sum += x == max ? 1.0f : expf(x - max);  // equal also covers -inf against -inf, where the difference is NaN
    } else {
      sum = (max == -INFINITY ? 0.0f : sum * expf(max - x)) + 1.0f;  // also taken for NaN, which stays
      max = x;
    }
  }
  __device__ __forceinline__ void merge(float other_max, float other_sum) {
    float m = fmaxf(max, other_max);
    float a = max == m ? sum : (sum == 0.0f ? 0.0f : sum * expf(max - m));
    float b = other_max == m ? other_sum : (other_sum == 0.0f ? 0.0f : other_sum * expf(other_max - m));
    sum = a + b;
    max = m;
  }
  __device__ __forceinline__ float value() const { return max == INFINITY ? NAN : max + logf(sum); }  // as PyTorch
};

// sum_c w_c (x_c - max) follows a maximum that moves: from `before` to `now`. Where all was -inf so far the sum is 0,
// or no longer finite: then it stays.
__device__ __forceinline__ float shift_sum(float sum_wx, float sum_w, float before, float now) {
  return before == now || before == -INFINITY ? sum_wx : sum_wx - (now - before) * sum_w;
}
__device__ __forceinline__ float below_max(float x, float max) { return max == -INFINITY ? x : x - max; }

// Sum over the Lanes threads of a row, the same in each. shared: one float per warp (block-wide rows only).
template <int Lanes>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  if constexpr (Lanes > 1) x = warp_sum(x);
  if constexpr (Lanes > kWarp) {
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
    __syncthreads();  // one value per warp
    x = shared[0];
    for (int i = 1; i < Lanes / kWarp; ++i) x += shared[i];
    __syncthreads();  // shared may be used again
  }
  return x;
}

template <int Lanes>
__device__ __forceinline__ RunningLse row_lse(RunningLse l, float* shared) {
  if constexpr (Lanes > 1) {
#pragma unroll
    for (int i = kWarp / 2; i > 0; i >>= 1) {
      float max = __shfl_xor_sync(kFullMask, l.max, i), sum = __shfl_xor_sync(kFullMask, l.sum, i);
      l.merge(max, sum);
    }
  }
  if constexpr (Lanes > kWarp) {
    constexpr int kWarps = Lanes / kWarp;
    if (threadIdx.x % kWarp == 0) {
      shared[threadIdx.x / kWarp] = l.max;
      shared[kWarps + threadIdx.x / kWarp] = l.sum;
    }
    __syncthreads();  // one pair per warp
    l = {shared[0], shared[kWarps]};
    for (int i = 1; i < kWarps; ++i) l.merge(shared[i], shared[kWarps + i]);
    __syncthreads();  // shared may be used again
  }
  return l;
}

template <class T>
__device__ __forceinline__ int64_t loss_target(const LossParams<T>& p, int64_t row) {
  return p.target ? p.target[row] : static_cast<int64_t>(p.target_u8[row]);
}
template <class T>
__device__ __forceinline__ float class_weight(const LossParams<T>& p, int c) {
  return p.weight ? p.weight[c] : 1.0f;
}

// N classes per access: 16 bytes where rows lie in one piece and aligned, else 1.
template <class T, int Lanes, int N>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_kernel(LossParams<T> p) {
  SMEM_ARRAY(float, shared, 2 * kLossThreads);
  ptx::pdl_wait();
  constexpr int kRows = kLossThreads / Lanes;
  const LossShape& s = p.shape;
  const int thread = threadIdx.x, lane = thread % Lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + thread / Lanes;
  const bool real = row < s.rows;
  const int classes = real ? s.classes : 0;  // idle lanes still meet the others at shuffles and barriers
  const int64_t base = real ? row / s.d * s.stride_n + row % s.d * s.stride_d : 0;
  const bool by_index = !p.probabilities;

  RunningLse l{-INFINITY, 0.0f};
  float sum_w = 0.0f, sum_wx = 0.0f;  // over classes: weights (or weighted probabilities), and those times x - max
  const bool need_sums = !by_index || s.smoothing > 0.0f;
  const float uniform = s.smoothing / static_cast<float>(s.classes);
  for (int c = lane * N; c < classes; c += Lanes * N) {
    float x[N], w[N];
    load_floats<N>(x, p.input + base + c * s.stride_c);
#pragma unroll
    for (int j = 0; j < N; ++j) w[j] = 0.0f;
    if (need_sums && !by_index) load_floats<N>(w, p.probabilities + base + c * s.stride_c);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float before = l.max;
      l.add(x[j]);
      if (need_sums) {
        w[j] = class_weight(p, c + j) * (by_index ? 1.0f : w[j] * (1.0f - s.smoothing) + uniform);
        sum_wx = fmaf(w[j], below_max(x[j], l.max), shift_sum(sum_wx, sum_w, before, l.max));
        sum_w += w[j];
      }
    }
  }
  const float mine = l.max;
  l = row_lse<Lanes>(l, shared);
  if (need_sums) {
    sum_wx = shift_sum(sum_wx, sum_w, mine, l.max);
    sum_w = row_sum<Lanes>(sum_w, shared);
    sum_wx = row_sum<Lanes>(sum_wx, shared);
  }

  float loss = 0.0f, kept = 0.0f;
  if (real && lane == 0) {
    // Never through lse, which rounds log s off where the logits are large.
    const float log_sum = l.max == INFINITY ? NAN : logf(l.sum);
    if (by_index) {
      const int64_t t = loss_target(p, row);
      if (t != s.ignore_index) {
        if (t < 0 || t >= s.classes) {
          loss = NAN;
        } else {
          kept = class_weight(p, static_cast<int>(t));
          loss = kept * (1.0f - s.smoothing) * (log_sum - (to_float(p.input[base + t * s.stride_c]) - l.max));
          if (s.smoothing > 0.0f) loss += uniform * (log_sum * sum_w - sum_wx);
        }
      }
    } else {
      loss = log_sum * sum_w - sum_wx;
      kept = 1.0f;
    }
    p.lse[row] = l.value();
    if (s.reduction == Reduction::kNone) p.loss[row] = from_float<T>(loss);
  }

  // This block's rows, in row order within a thread group and a fixed tree across.
  shared[thread] = loss;
  shared[kLossThreads + thread] = kept;
  __syncthreads();  // all rows are there
  for (int half = kLossThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      shared[thread] += shared[threadIdx.x + half];
      shared[kLossThreads + thread] += shared[kLossThreads + thread + half];
    }
    __syncthreads();  // this level is summed
  }
  if (thread == 0) {
    p.part_loss[blockIdx.x] = shared[0];
    p.part_weight[blockIdx.x] = shared[kLossThreads];
  }
}

constexpr int kFinishThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kFinishThreads) cross_entropy_finish_kernel(LossParams<T> p, int64_t blocks) {
  SMEM_ARRAY(float, shared, 2 * kFinishThreads);
  ptx::pdl_wait();
  const int thread = threadIdx.x;
  float loss = 0.0f, weight = 0.0f;
  for (int64_t i = thread; i < blocks; i += kFinishThreads) loss += p.part_loss[i], weight += p.part_weight[i];
  shared[thread] = loss;
  shared[kFinishThreads + thread] = weight;
  __syncthreads();  // all shares are there
  for (int half = kFinishThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      shared[thread] += shared[threadIdx.x + half];
      shared[kFinishThreads + thread] += shared[kFinishThreads + thread + half];
    }
    __syncthreads();  // this level is summed
  }
  if (thread != 0) return;
  *p.normalizer = shared[kFinishThreads];
  if (p.shape.reduction == Reduction::kMean) *p.loss = from_float<T>(shared[0] / shared[kFinishThreads]);
  if (p.shape.reduction == Reduction::kSum) *p.loss = from_float<T>(shared[0]);
}

template <class T>
bool loss_vec(const LossShape& s, uintptr_t address_bits) {
  return loss_lanes(s) > 1 && s.stride_c == 1 && s.classes % kVec16<T> == 0 && s.stride_n % kVec16<T> == 0 &&
         s.stride_d % kVec16<T> == 0 && address_bits % 16 == 0;
}

// part_loss and part_weight: loss_blocks(shape) floats each.
template <class T>
Status launch_cross_entropy(const LossParams<T>& p, Stream stream) {
  const int64_t blocks = loss_blocks(p.shape);
  if (blocks < 1) return {"cross_entropy: no rows"};
  if (Status status{loss_limit(p.shape.rows, p.shape.classes, p.shape.d)}; !status.ok()) return status;
  if (!p.target && !p.target_u8 && !p.probabilities) return {"cross_entropy: no target"};
  const dim3 grid(static_cast<unsigned>(blocks)), block(kLossThreads);
  constexpr int kN = kVec16<T>;
  const bool vec =
      loss_vec<T>(p.shape, reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.probabilities));
  Status status;
  switch (loss_lanes(p.shape)) {
    case 1:
      status = launch(cross_entropy_kernel<T, 1, 1>, grid, block, 0, stream, p);
      break;
    case kWarp:
      status = vec ? launch(cross_entropy_kernel<T, kWarp, kN>, grid, block, 0, stream, p)
                   : launch(cross_entropy_kernel<T, kWarp, 1>, grid, block, 0, stream, p);
      break;
    default:
      status = vec ? launch(cross_entropy_kernel<T, kLossThreads, kN>, grid, block, 0, stream, p)
                   : launch(cross_entropy_kernel<T, kLossThreads, 1>, grid, block, 0, stream, p);
  }
  if (!status.ok()) return status;
  return launch(cross_entropy_finish_kernel<T>, dim3(1), dim3(kFinishThreads), 0, stream, p, blocks);
}

}  // namespace fastconv
