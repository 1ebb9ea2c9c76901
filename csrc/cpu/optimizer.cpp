// Host side of the optimizer steps: checks, hyper-parameters, threads.

#include "optimizer.h"

#include <ATen/ops/empty_strided.h>

#include "parallel.h"

#define FASTCONV_KERNELS "kernels/optimizer.h"
#include "foreach_isa.h"

namespace fastconv::cpu {

WeightUpdate::WeightUpdate(const char* op, const at::Tensor& weight, at::TensorList state, const OptTensor& half,
                           const at::Tensor& hyper, c10::string_view optimizer)
    : weight_(weight), adam_(check_weight_update(op, weight, state, half, hyper, optimizer)) {
  w_ = data<float>(weight);
  if (!state.empty()) m_ = data<float>(state[0]);
  if (state.size() > 1) v_ = data<float>(state[1]);
  if (given(half)) half_ = data<bf16>(*half);
  const bool large = static_cast<int64_t>(weight.nbytes()) >= kPastCacheBytes;
  const double* h = const_data<double>(hyper);
  if (adam_) {
    step_ = {static_cast<float>(h[0]),     static_cast<float>(1 - h[1]), static_cast<float>(h[2]),
             static_cast<float>(1 - h[2]), static_cast<float>(h[3]),     static_cast<float>(h[4]),
             static_cast<float>(h[5]),     static_cast<float>(h[6]),     large};
  } else {
    sgd_ = {static_cast<float>(h[0]), static_cast<float>(h[1]), static_cast<float>(h[2]), h[3] != 0, large};
  }
  bump_versions(weight, state);
}

void WeightUpdate::apply(int64_t first, int64_t count, const float* grad) const {
  float* m = m_ == nullptr ? nullptr : m_ + first;
  bf16* half = half_ == nullptr ? nullptr : half_ + first;
  if (adam_) {
    FASTCONV_PICK(adam_step)(w_ + first, m, v_ + first, half, grad, count, &step_);
  } else if (m != nullptr) {
    FASTCONV_PICK(sgd_step<true>)(w_ + first, m, half, grad, count, &sgd_);
  } else {
    FASTCONV_PICK(sgd_step<false>)(w_ + first, m, half, grad, count, &sgd_);
  }
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
