// Optimizer steps on fp32 weights, for plans: SGD with momentum, Adam and AdamW.
#pragma once

#include <vector>

#include "../host/plan_check.h"
#include "host.h"

namespace fastconv::cpu {

// One weight, its state (SGD: the momentum buffer or nothing; Adam: both averages) and its bf16 copy, raw and checked.
class WeightUpdate {
 public:
  // hyper is read now.
  WeightUpdate(const char* op, const at::Tensor& weight, at::TensorList state, const OptTensor& half,
               const at::Tensor& hyper, c10::string_view optimizer);

  // Elements [first, first + count) in memory order; grad is that of the first. Any thread.
  void apply(int64_t first, int64_t count, const float* grad) const;
  // All of them, with threads.
  void apply_all(const at::Tensor& grad) const;
  // The same as the kernels take it.
  const WeightStep& step() const { return step_; }

 private:
  at::Tensor weight_;
  WeightStep step_;
};

}  // namespace fastconv::cpu
