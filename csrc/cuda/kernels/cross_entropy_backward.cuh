// Cross-entropy backward, recomputing the probabilities from the saved log-sum-exp.
//
// With s_c = exp(x_c - lse) and g the gradient of this row's loss (grad_loss, / normalizer for mean):
//   indices        dx_c = g ( w_t (1 - e) (s_c - [c = t]) + e / V (s_c sum_i w_i - w_c) );  0 for ignored rows
//   probabilities  dx_c = g ( s_c sum_i w_i p'_i - w_c p'_c );   dp_c = -g w_c (1 - e) (x_c - lse)
// since d(-logp_i)/dx_c = s_c - [c = i].
//
// Mapping: that of cross_entropy.cuh. With probabilities or smoothing a row takes a first pass for its sum. Bytes:
// input and target read, gradients written, once (probabilities twice).
#pragma once

#include "cross_entropy.cuh"

namespace fastconv {

constexpr float kLargeLse = 32.0f;  // beyond it an fp32 lse is off by 2^-19 and more

template <class T>
struct LossBackwardParams {
  LossParams<T> forward;  // input, targets, weight, lse, normalizer, shape
  const T* grad_loss;     // [rows] (none) or one value
  T* grad_input;          // strides of input; null: not wanted
  T* grad_probabilities;  // null: not wanted
};

template <class T, int Lanes, int N>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_backward_kernel(LossBackwardParams<T> k) {
  SMEM_ARRAY(float, shared, kLossThreads / kWarp);
  ptx::pdl_wait();
  const LossParams<T>& p = k.forward;
  const LossShape& s = p.shape;
  const int lane = threadIdx.x % Lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kLossThreads / Lanes) + threadIdx.x / Lanes;
  const bool real = row < s.rows;
  const int classes = real ? s.classes : 0;
  const int64_t base = real ? row / s.d * s.stride_n + row % s.d * s.stride_d : 0;
  const bool by_index = !p.probabilities;
  const float uniform = s.smoothing / static_cast<float>(s.classes);

  auto soft_target = [&](int c) {  // w_c p'_c
    return class_weight(p, c) * (to_float(p.probabilities[base + c * s.stride_c]) * (1.0f - s.smoothing) + uniform);
  };
  float total = 0.0f;
  if (!by_index || (s.smoothing > 0.0f && p.weight)) {
    for (int c = lane; c < classes; c += Lanes) total += by_index ? class_weight(p, c) : soft_target(c);
    total = row_sum<Lanes>(total, shared);
  } else {
    total = static_cast<float>(s.classes);
  }
  // lse = max + log s rounds log s off where it is large: then the probabilities are divided by their own sum.
  const float lse = real ? p.lse[row] : 0.0f;
  float scale = 1.0f;
  if (fabsf(lse) > kLargeLse) {  // the same for all threads of a row
    float sum = 0.0f;
    for (int c = lane; c < classes; c += Lanes) sum += expf(to_float(p.input[base + c * s.stride_c]) - lse);
    scale = 1.0f / row_sum<Lanes>(sum, shared);
  }
  if (!real) return;  // no barrier below

  float g = to_float(k.grad_loss[s.reduction == Reduction::kNone ? row : 0]);
  if (s.reduction == Reduction::kMean) g /= *p.normalizer;
  if (by_index) {
    const int64_t t = loss_target(p, row);
    const bool ignored = t == s.ignore_index, bad = !ignored && (t < 0 || t >= s.classes);
    const float wt = ignored || bad ? 0.0f : class_weight(p, static_cast<int>(t)) * (1.0f - s.smoothing);
    for (int c = lane * N; c < classes; c += Lanes * N) {
      float x[N];
      load_floats<N>(x, p.input + base + c * s.stride_c);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        float prob = expf(x[j] - lse) * scale;
        float grad = wt * (prob - (c + j == t ? 1.0f : 0.0f));
        if (s.smoothing > 0.0f) grad += uniform * (prob * total - class_weight(p, c + j));
        x[j] = ignored ? 0.0f : (bad ? NAN : g * grad);
      }
      store_floats<N>(k.grad_input + base + c * s.stride_c, x);
    }
    return;
  }
  for (int c = lane * N; c < classes; c += Lanes * N) {
    const int64_t at = base + c * s.stride_c;
    float x[N], dx[N];
    load_floats<N>(x, p.input + at);
    load_floats<N>(dx, p.probabilities + at);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float w = class_weight(p, c + j), logp = x[j] - lse;
      dx[j] = g * (expf(logp) * scale * total - w * (dx[j] * (1.0f - s.smoothing) + uniform));
      x[j] = -g * w * (1.0f - s.smoothing) * logp;
    }
    if (k.grad_input) store_floats<N>(k.grad_input + at, dx);
    if (k.grad_probabilities) store_floats<N>(k.grad_probabilities + at, x);
  }
}

template <class T>
Status launch_cross_entropy_backward(const LossBackwardParams<T>& p, Stream stream) {
  const int64_t blocks = loss_blocks(p.forward.shape);
  if (blocks < 1) return {"cross_entropy_backward: no rows"};
  if (Status status{loss_limit(p.forward.shape.rows, p.forward.shape.classes, p.forward.shape.d)}; !status.ok())
    return status;
  if (!p.forward.probabilities && !p.grad_input) return {"cross_entropy_backward: class indices have no gradient"};
  const dim3 grid(static_cast<unsigned>(blocks)), block(kLossThreads);
  constexpr int kN = kVec16<T>;
  const LossParams<T>& f = p.forward;
  uintptr_t bits = 0;
  const void* operands[] = {f.input, f.probabilities, p.grad_input, p.grad_probabilities};
  for (const void* q : operands) bits |= reinterpret_cast<uintptr_t>(q);
  const bool vec = loss_vec<T>(f.shape, bits);
  switch (loss_lanes(f.shape)) {
    case 1:
      return launch(cross_entropy_backward_kernel<T, 1, 1>, grid, block, 0, stream, p);
    case kWarp:
      return vec ? launch(cross_entropy_backward_kernel<T, kWarp, kN>, grid, block, 0, stream, p)
                 : launch(cross_entropy_backward_kernel<T, kWarp, 1>, grid, block, 0, stream, p);
    default:
      return vec ? launch(cross_entropy_backward_kernel<T, kLossThreads, kN>, grid, block, 0, stream, p)
                 : launch(cross_entropy_backward_kernel<T, kLossThreads, 1>, grid, block, 0, stream, p);
  }
}

}  // namespace fastconv
