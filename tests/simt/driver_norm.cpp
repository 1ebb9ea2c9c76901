// Entry points of the activation backward and batch-norm kernels for ctypes.
#include "act_backward.cuh"
#include "batch_norm_backward.cuh"
#include "driver.h"

using namespace fastconv;

// vec says which shape to build; the launchers decide again from addresses, so both must agree.
extern "C" int simt_act_chunks(int64_t rows, int channels, int vec, int blocks, int min_rows) {
  return column_chunks(column_shape(rows, channels, vec, blocks, min_rows));
}

extern "C" int simt_act_backward(int dtype, const void* grad_output, const void* saved, void* grad_preact,
                                 float* partial, void* grad_bias, int act, int64_t rows, int channels, int blocks,
                                 int min_rows) {
  return for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    ActBackwardParams<T> p{static_cast<const T*>(grad_output),
                           static_cast<const T*>(saved),
                           static_cast<T*>(grad_preact),
                           partial,
                           static_cast<T*>(grad_bias),
                           static_cast<Activation>(act),
                           {}};
    p.shape = column_shape(rows, channels, act_backward_vec(p, channels) ? kVec16<T> : 1, blocks, min_rows);
    return launch_act_backward(p, nullptr);
  });
}

struct NormCall {
  const void *x, *residual, *weight, *bias;
  void *y, *running_mean, *running_var, *batches;
  float *save_mean, *save_invstd, *part_mean, *part_m2;
  int64_t rows, part_rows;
  int dtype, params_float, channels, training, act, blocks, min_rows;
  float momentum, eps;
};

extern "C" int simt_batch_norm(const NormCall* c) {
  return for_dtype(c->dtype, [&](auto t) {
    using T = decltype(t);
    bool f = c->params_float != 0;
    BatchNormParams<T> p{static_cast<const T*>(c->x),
                         static_cast<const T*>(c->residual),
                         static_cast<T*>(c->y),
                         {c->weight, f},
                         {c->bias, f},
                         {c->running_mean, f},
                         {c->running_var, f},
                         static_cast<int64_t*>(c->batches),
                         c->save_mean,
                         c->save_invstd,
                         c->part_mean,
                         c->part_m2,
                         c->training != 0,
                         c->momentum,
                         c->eps,
                         static_cast<Activation>(c->act),
                         {}};
    p.shape =
        column_shape(c->rows, c->channels, batch_norm_vec(p, c->channels) ? kVec16<T> : 1, c->blocks, c->min_rows);
    return launch_batch_norm(p, c->part_rows, nullptr);
  });
}

struct NormBackwardCall {
  const void *dy, *x, *output, *residual, *weight, *bias;
  const float *mean, *invstd;
  void *dx, *dresidual, *dweight, *dbias;
  float *part_g, *part_gx, *sum_g, *sum_gx;
  int64_t rows;
  int dtype, params_float, channels, training, act, blocks, min_rows;
};

extern "C" int simt_batch_norm_backward(const NormBackwardCall* c) {
  return for_dtype(c->dtype, [&](auto t) {
    using T = decltype(t);
    bool f = c->params_float != 0;
    BatchNormBackwardParams<T> p{static_cast<const T*>(c->dy),
                                 static_cast<const T*>(c->x),
                                 static_cast<const T*>(c->output),
                                 static_cast<const T*>(c->residual),
                                 {c->weight, f},
                                 {c->bias, f},
                                 c->mean,
                                 c->invstd,
                                 static_cast<T*>(c->dx),
                                 static_cast<T*>(c->dresidual),
                                 {c->dweight, f},
                                 {c->dbias, f},
                                 c->part_g,
                                 c->part_gx,
                                 c->sum_g,
                                 c->sum_gx,
                                 c->training != 0,
                                 static_cast<Activation>(c->act),
                                 {}};
    p.shape = column_shape(c->rows, c->channels, batch_norm_backward_vec(p, c->channels) ? kVec16<T> : 1, c->blocks,
                           c->min_rows);
    return launch_batch_norm_backward(p, nullptr);
  });
}
