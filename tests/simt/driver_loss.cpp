// Entry points of the cross-entropy kernels for ctypes.
#include "cross_entropy_backward.cuh"
#include "driver.h"

using namespace fastconv;

struct LossCall {
  const void *input, *target, *target_u8, *probabilities, *grad_loss;
  const float* weight;
  void *loss, *grad_input, *grad_probabilities;
  float *lse, *normalizer, *part_loss, *part_weight;
  int64_t rows, stride_n, stride_c, stride_d, ignore_index;
  int classes, d, reduction, dtype;
  float smoothing;
};

static LossShape shape_of(const LossCall& c) {
  return {c.rows,         c.classes,   c.d,
          c.stride_n,     c.stride_c,  c.stride_d,
          c.ignore_index, c.smoothing, static_cast<Reduction>(c.reduction)};
}

extern "C" int64_t simt_loss_blocks(const LossCall* c) { return loss_blocks(shape_of(*c)); }

extern "C" int simt_loss(const LossCall* c, int backward) {
  return for_dtype(c->dtype, [&](auto t) {
    using T = decltype(t);
    LossParams<T> p{static_cast<const T*>(c->input),
                    static_cast<const int64_t*>(c->target),
                    static_cast<const uint8_t*>(c->target_u8),
                    static_cast<const T*>(c->probabilities),
                    c->weight,
                    static_cast<T*>(c->loss),
                    c->lse,
                    c->normalizer,
                    c->part_loss,
                    c->part_weight,
                    shape_of(*c)};
    if (!backward) return launch_cross_entropy(p, nullptr);
    LossBackwardParams<T> b{p, static_cast<const T*>(c->grad_loss), static_cast<T*>(c->grad_input),
                            static_cast<T*>(c->grad_probabilities)};
    return launch_cross_entropy_backward(b, nullptr);
  });
}
