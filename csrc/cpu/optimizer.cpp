// Host side of the optimizer steps: checks, hyper-parameters, threads.

#include "optimizer.h"

#include <ATen/ops/empty_strided.h>

#include "parallel.h"

#define FASTCONV_KERNELS "kernels/optimizer.h"
#include "foreach_isa.h"

namespace fastconv::cpu {

WeightUpdate::WeightUpdate(const char* op, const at::Tensor& weight, at::TensorList state, const OptTensor& half,
                           const at::Tensor& hyper, c10::string_view optimizer)
    : weight_(weight) {
  step_.adam = check_weight_update(op, weight, state, half, hyper, optimizer);
  step_.w = data<float>(weight);
  step_.n = weight.numel();
  if (!state.empty()) step_.m = data<float>(state[0]);
  if (state.size() > 1) step_.v = data<float>(state[1]);
  if (given(half)) step_.half = data<bf16>(*half);
  const bool large = static_cast<int64_t>(weight.nbytes()) >= kPastCacheBytes;
  const double* h = const_data<double>(hyper);
  if (step_.adam) {
    step_.averages = {static_cast<float>(h[0]),     static_cast<float>(1 - h[1]), static_cast<float>(h[2]),
                      static_cast<float>(1 - h[2]), static_cast<float>(h[3]),     static_cast<float>(h[4]),
                      static_cast<float>(h[5]),     static_cast<float>(h[6]),     large};
  } else {
    step_.sgd = {static_cast<float>(h[0]), static_cast<float>(h[1]), static_cast<float>(h[2]), h[3] != 0, large};
  }
  bump_versions(weight, state);
}

void WeightUpdate::apply(int64_t first, int64_t count, const float* grad) const {
  FASTCONV_PICK(weight_step)(step_, first, count, grad);
}

void WeightUpdate::apply_all(const at::Tensor& grad) const {
  // In the weight's order of memory, and fp32: a copy where it is not.
  at::Tensor g = grad;
  if (g.scalar_type() != at::kFloat || g.strides() != weight_.strides()) {
    g = at::empty_strided(weight_.sizes(), weight_.strides(), weight_.options()).copy_(grad);
  }
  const float* from = const_data<float>(g);
  constexpr int64_t kBlock = 16384;
  const int64_t n = weight_.numel();
  parallel_tasks((n + kBlock - 1) / kBlock, n, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = std::min(n, end * kBlock);
    apply(first, last - first, from + first);
  });
}

}  // namespace fastconv::cpu
