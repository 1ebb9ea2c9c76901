// Arguments and layouts of cross-entropy, for every device.
#pragma once

#include <array>
#include <vector>

#include "tensor.h"

namespace fastconv {

enum LossReduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct LossTarget {
  std::vector<int64_t> position_sizes;  // [N, d..]: input's sizes without the classes
  int64_t d;                            // positions of one sample
  bool probabilities;                   // else class indices
};

LossTarget check_cross_entropy(const char* op, const at::Tensor& input, const at::Tensor& target,
                               const OptTensor& weight, int64_t reduction, int64_t ignore_index,
                               double label_smoothing);

void check_cross_entropy_backward(const char* op, const at::Tensor& grad_loss, const at::Tensor& input,
                                  const at::Tensor& lse, const at::Tensor& normalizer, int64_t reduction,
                                  const LossTarget& target, std::array<bool, 2> output_mask);

// Whether the logits are read as rows [N, d.., C]: dense channels-last logits are that already; everything else is read
// as contiguous [N, C, d..], which is rows where d is 1.
bool classes_last(const at::Tensor& input, int64_t d);

// Logits or probabilities, dense in that layout.
at::Tensor arrange_classes(const at::Tensor& t, bool rows);

// A gradient back in [N, C, d..] from that layout: a view where it can be, with at::empty_like(like)'s strides and
// dtype.
at::Tensor restore_classes(const at::Tensor& t, const at::Tensor& like, bool rows);

}  // namespace fastconv
