// Entry points of the cross-entropy kernels.
#include "api.h"
#include "kernels/cross_entropy_backward.cuh"
#include "launch_dtype.cuh"

namespace fastconv {
namespace {

LossShape loss_shape(const LossCall& c) {
  return {c.rows,         c.classes,   c.d,
          c.stride_n,     c.stride_c,  c.stride_d,
          c.ignore_index, c.smoothing, static_cast<Reduction>(c.reduction)};
}

template <class T>
LossParams<T> loss_params(const LossCall& c) {
  return {static_cast<const T*>(c.input),
          static_cast<const int64_t*>(c.target),
          static_cast<const uint8_t*>(c.target_u8),
          static_cast<const T*>(c.probabilities),
          c.weight,
          static_cast<T*>(c.loss),
          c.lse,
          c.normalizer,
          c.part_loss,
          c.part_weight,
          loss_shape(c)};
}

}  // namespace

int64_t loss_block_count(const LossCall& c) { return loss_blocks(loss_shape(c)); }

std::string cross_entropy(const LossCall& c, LaunchStream stream) {
  return for_dtype(
      c.dtype, [&](auto t) { return launch_cross_entropy(loss_params<decltype(t)>(c), static_cast<Stream>(stream)); });
}

std::string cross_entropy_backward(const LossCall& c, LaunchStream stream) {
  return for_dtype(c.dtype, [&](auto t) {
    using T = decltype(t);
    const LossBackwardParams<T> p{loss_params<T>(c), static_cast<const T*>(c.grad_loss), static_cast<T*>(c.grad_input),
                                  static_cast<T*>(c.grad_probabilities)};
    return launch_cross_entropy_backward(p, static_cast<Stream>(stream));
  });
}

}  // namespace fastconv
