// Activations and their derivatives, fp32, one switch for every kernel.
//
// relu6, leaky_relu, sigmoid, tanh and relu find their derivative in the output; silu, gelu and hardswish need the
// pre-activation, which tells relu, relu6 and leaky_relu as much. NaN passes through relu, relu6 and hardswish as in
// PyTorch.
#pragma once

#include <cmath>
#include <cstring>

#include "ptx.cuh"

namespace fastconv {

enum class Activation : int { kIdentity, kRelu, kRelu6, kLeakyRelu, kSigmoid, kTanh, kSilu, kGelu, kHardswish, kCount };

constexpr float kLeakySlope = 0.01f;  // torch.nn.functional.leaky_relu's default

// Returns kCount for a name that is not known.
inline Activation activation_from_name(const char* name) {
  constexpr const char* kNames[] = {"identity", "relu", "relu6", "leaky_relu", "sigmoid",
                                    "tanh",     "silu", "gelu",  "hardswish"};
  for (int i = 0; i < static_cast<int>(Activation::kCount); ++i)
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Activation>(i);
  return Activation::kCount;
}

constexpr bool needs_output(Activation a) { return a == Activation::kSigmoid || a == Activation::kTanh; }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float activate(Activation a, float x) {
  switch (a) {
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;  // a NaN compares false and stays
    case Activation::kRelu6:
      return x < 0.0f ? 0.0f : (x > 6.0f ? 6.0f : x);
    case Activation::kLeakyRelu:
      return x < 0.0f ? kLeakySlope * x : x;
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kTanh:
      return tanhf(x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kGelu:  // x * Phi(x), the exact form
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::kHardswish: {
      float gate = x + 3.0f;
      gate = gate < 0.0f ? 0.0f : (gate > 6.0f ? 6.0f : gate);
      return x * gate * (1.0f / 6.0f);
    }
    default:
      return x;
  }
}

// d activate / dx; saved = the output or the pre-activation, as said above.
__device__ __forceinline__ float activation_grad(Activation a, float saved) {
  switch (a) {
    case Activation::kRelu:
      return saved <= 0.0f ? 0.0f : 1.0f;  // a NaN lets the gradient through, as in PyTorch
    case Activation::kRelu6:
      return saved <= 0.0f || saved >= 6.0f ? 0.0f : 1.0f;
    case Activation::kLeakyRelu:  // y has the sign of x
      return saved > 0.0f ? 1.0f : kLeakySlope;
    case Activation::kSigmoid:  // y' = y (1 - y)
      return saved * (1.0f - saved);
    case Activation::kTanh:  // y' = 1 - y^2
      return 1.0f - saved * saved;
    case Activation::kSilu: {  // (x s)' = s + x s (1 - s)
      float s = sigmoid(saved);
      return s * (1.0f + saved * (1.0f - s));
    }
    case Activation::kGelu: {  // (x Phi)' = Phi + x phi
      float cdf = 0.5f * (1.0f + erff(saved * 0.70710678118654752f));
      return cdf + saved * 0.39894228040143268f * expf(-0.5f * saved * saved);
    }
    case Activation::kHardswish:  // 0 below -3, 1 above 3, (2 x + 3) / 6 between
      return saved <= -3.0f ? 0.0f : (saved < 3.0f ? saved * (1.0f / 3.0f) + 0.5f : 1.0f);
    default:
      return 1.0f;
  }
}

// The same for N values at once: the switch is taken once, not N times.
template <int N, class F>
__device__ __forceinline__ void map_values(float (&x)[N], F f) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = f(x[i]);
}

template <int N>
__device__ __forceinline__ void activate_all(Activation a, float (&x)[N]) {
  switch (a) {
    case Activation::kIdentity:
      return;
#define FASTCONV_CASE(A) \
  case Activation::A:    \
    return map_values<N>(x, [](float v) { return activate(Activation::A, v); });
      FASTCONV_CASE(kRelu)
      FASTCONV_CASE(kRelu6)
      FASTCONV_CASE(kLeakyRelu)
      FASTCONV_CASE(kSigmoid)
      FASTCONV_CASE(kTanh)
      FASTCONV_CASE(kSilu)
      FASTCONV_CASE(kGelu)
      FASTCONV_CASE(kHardswish)
#undef FASTCONV_CASE
    default:
      return;
  }
}

// saved -> derivative, in place.
template <int N>
__device__ __forceinline__ void activation_grad_all(Activation a, float (&saved)[N]) {
  switch (a) {
#define FASTCONV_CASE(A) \
  case Activation::A:    \
    return map_values<N>(saved, [](float v) { return activation_grad(Activation::A, v); });
    FASTCONV_CASE(kRelu)
    FASTCONV_CASE(kRelu6)
    FASTCONV_CASE(kLeakyRelu)
    FASTCONV_CASE(kSigmoid)
    FASTCONV_CASE(kTanh)
    FASTCONV_CASE(kSilu)
    FASTCONV_CASE(kGelu)
    FASTCONV_CASE(kHardswish)
#undef FASTCONV_CASE
    default:
      return map_values<N>(saved, [](float) { return 1.0f; });
  }
}

}  // namespace fastconv
