// Element types of the CPU kernels (torch-free): the 16-bit ones are bit patterns, converted by kernels/vec.h.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastconv::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccType<T>::type;

// Operands of the batch norm backward: [rows, channels] row-major, per-channel vectors in the accumulate type.
template <class T>
struct BatchNormGrad {
  using A = acc_t<T>;
  const T* g;
  const T* x;
  const T* y;         // the output, where the activation's derivative comes from it
  const T* residual;  // where the pre-activation is recomputed; or null
  const A* mean;
  const A* scale;  // weight * invstd
  const A* shift;  // bias, 0 if absent
  int64_t channels;
  Act act;
};

// Operands of cross-entropy. Exactly one of target and probs is given.
template <class T>
struct CrossEntropyArgs {
  using A = acc_t<T>;
  const T* x;
  const int64_t* target;  // [positions]
  const A* probs;         // x's shape and layout
  const A* weight;        // [c], 1 if absent
  A weight_sum;
};

// From here on a weight or its gradient is written past the caches (kernels/vec.h, stream()): a core's L2.
constexpr int64_t kPastCacheBytes = 1 << 20;

// Hyper-parameters of one optimizer step (kernels/optimizer.h). large: the parameter is, see there.
struct SgdStep {
  float lr, momentum, decay;
  bool nesterov, large;
};
struct AdamStep {
  float rate, gain1, beta2, gain2, root, eps, keep, l2;
  bool large;
};

// One optimizer step of a parameter: n elements, dense. m, v: SGD's momentum buffer or null, or Adam's averages; half:
// where the new weights go in bf16, or null.
struct WeightStep {
  float *w = nullptr, *m = nullptr, *v = nullptr;
  bf16* half = nullptr;
  int64_t n = 0;
  bool adam = false;
  SgdStep sgd{};
  AdamStep averages{};
};

}  // namespace fastconv::cpu
