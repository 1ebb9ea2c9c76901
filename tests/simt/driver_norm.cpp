// The activation backward and batch norm kernels and their entry points (csrc/cuda), for ctypes and for the host side
// (host.cpp).
#include "driver.h"
#include "norm.cu"

using namespace fastconv;

// vec says which shape to build; the launchers decide again from addresses, so both must agree.
extern "C" int simt_act_chunks(int64_t rows, int channels, int vec, int blocks, int min_rows) {
  return column_chunks(column_shape(rows, channels, vec, blocks, min_rows));
}

extern "C" int simt_act_backward(int dtype, const void* grad_output, const void* saved, void* grad_preact,
                                 float* partial, void* grad_bias, int act, int64_t rows, int channels, int blocks,
                                 int min_rows) {
  const ActBackwardCall call{grad_output, saved, grad_preact, partial, grad_bias, rows,
                             dtype,       act,   channels,    blocks,  min_rows};
  return report(act_backward(call, nullptr));
}

extern "C" int simt_most_chunks(int dtype, int64_t rows, int channels, int blocks, int min_rows) {
  return most_column_chunks(dtype, rows, channels, blocks, min_rows);
}

extern "C" int simt_batch_norm_fold(const NormFoldCall* c) { return report(batch_norm_fold(*c, nullptr)); }

extern "C" int simt_batch_norm(const NormCall* c) { return report(batch_norm(*c, nullptr)); }

extern "C" int simt_batch_norm_backward(const NormBackwardCall* c) { return report(batch_norm_backward(*c, nullptr)); }
