// Entry point of the pooling kernels for ctypes.
#include "driver.h"
#include "pool.cuh"

using namespace fastconv;

struct PoolCall {
  const void* in;
  void* out;
  uint8_t* offsets;
  int n, h, w, c, p, q, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, count_include_pad, divisor_override;
  int dtype, kind, backward;
};

extern "C" int simt_pool(const PoolCall* c) {
  return for_dtype(c->dtype, [&](auto t) {
    using T = decltype(t);
    PoolParams<T> p{static_cast<const T*>(c->in),
                    static_cast<T*>(c->out),
                    c->offsets,
                    {c->n, c->h, c->w, c->c, c->p, c->q, c->r, c->s, c->stride_h, c->stride_w, c->pad_h, c->pad_w,
                     c->dil_h, c->dil_w, c->count_include_pad != 0, c->divisor_override}};
    return launch_pool(static_cast<PoolKind>(c->kind), c->backward != 0, p, nullptr);
  });
}
