// Entry points of the channel-wise kernels: activation backward, batch norm forward and backward.
#include "api.h"
#include "kernels/act_backward.cuh"
#include "kernels/batch_norm_backward.cuh"
#include "kernels/batch_norm_fold.cuh"
#include "launch_dtype.cuh"

namespace fastconv {

int most_column_chunks(int dtype, int64_t rows, int channels, int blocks, int min_rows) {
  const int vec = dtype == 0 ? kVec16<float> : kVec16<__half>;
  return max_int(column_chunks(column_shape(rows, channels, vec, blocks, min_rows)),
                 column_chunks(column_shape(rows, channels, 1, blocks, min_rows)));
}

std::string act_backward(const ActBackwardCall& c, LaunchStream stream) {
  return for_dtype(c.dtype, [&](auto t) {
    using T = decltype(t);
    ActBackwardParams<T> p{static_cast<const T*>(c.grad_output),
                           static_cast<const T*>(c.saved),
                           static_cast<T*>(c.grad_preact),
                           c.partial,
                           static_cast<T*>(c.grad_bias),
                           static_cast<Activation>(c.act),
                           {}};
    const int vec = act_backward_vec(p, c.channels) ? kVec16<T> : 1;
    p.shape = column_shape(c.rows, c.channels, vec, c.blocks, c.min_rows);
    return launch_act_backward(p, static_cast<Stream>(stream));
  });
}

namespace {

template <class T>
SplitSum<T> split_sum(const SplitCall& c, const void* into, int64_t rows, int channels) {
  return {c.parts,
          static_cast<const T*>(c.addend),
          static_cast<T*>(const_cast<void*>(into)),
          {c.bias, c.bias_float != 0},
          rows * channels,
          c.splits};
}

}  // namespace

std::string batch_norm(const NormCall& c, LaunchStream stream) {
  return for_dtype(c.dtype, [&](auto t) {
    using T = decltype(t);
    const bool params = c.params_float != 0, running = c.running_float != 0;
    BatchNormParams<T> p{static_cast<const T*>(c.x),
                         static_cast<const T*>(c.residual),
                         static_cast<T*>(c.y),
                         {c.weight, params},
                         {c.bias, params},
                         {c.running_mean, running},
                         {c.running_var, running},
                         static_cast<int64_t*>(c.batches),
                         c.save_mean,
                         c.save_invstd,
                         c.part_mean,
                         c.part_m2,
                         split_sum<T>(c.split, c.x, c.rows, c.channels),
                         false,
                         c.training != 0,
                         c.momentum,
                         c.eps,
                         static_cast<Activation>(c.act),
                         {}};
    const int vec = batch_norm_vec(p, c.channels) ? kVec16<T> : 1;
    p.shape = column_shape(c.rows, c.channels, vec, c.blocks, c.min_rows);
    return launch_batch_norm(p, c.part_rows, static_cast<Stream>(stream));
  });
}

std::string batch_norm_fold(const NormFoldCall& c, LaunchStream stream) {
  return for_dtype(c.dtype, [&](auto t) {
    const bool params = c.params_float != 0, running = c.running_float != 0;
    const BatchNormFold p{{c.weight, params},
                          {c.bias, params},
                          {c.running_mean, running},
                          {c.running_var, running},
                          {c.conv_bias, c.conv_bias_float != 0},
                          c.scale,
                          c.shift,
                          c.mean,
                          c.invstd,
                          c.channels,
                          c.eps};
    return launch_batch_norm_fold<decltype(t)>(p, static_cast<Stream>(stream));
  });
}

std::string batch_norm_backward(const NormBackwardCall& c, LaunchStream stream) {
  return for_dtype(c.dtype, [&](auto t) {
    using T = decltype(t);
    const bool params = c.params_float != 0;
    BatchNormBackwardParams<T> p{static_cast<const T*>(c.dy),
                                 static_cast<const T*>(c.x),
                                 static_cast<const T*>(c.output),
                                 static_cast<const T*>(c.residual),
                                 {c.weight, params},
                                 {c.bias, params},
                                 c.mean,
                                 c.invstd,
                                 static_cast<T*>(c.dx),
                                 static_cast<T*>(c.dresidual),
                                 {c.dweight, params},
                                 {c.dbias, params},
                                 c.part_g,
                                 c.part_gx,
                                 c.sum_g,
                                 c.sum_gx,
                                 split_sum<T>(c.split, c.dy, c.rows, c.channels),
                                 c.training != 0,
                                 static_cast<Activation>(c.act),
                                 {}};
    const int vec = batch_norm_backward_vec(p, c.channels) ? kVec16<T> : 1;
    p.shape = column_shape(c.rows, c.channels, vec, c.blocks, c.min_rows);
    return launch_batch_norm_backward(p, c.part_sums, static_cast<Stream>(stream));
  });
}

}  // namespace fastconv
