// What every host file of the GPU operators needs besides host/tensor.h.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <initializer_list>
#include <string>

#include "../host/tensor.h"
#include "device.h"
#include "kernels/size_limits.h"

namespace fastconv::cuda {

inline int dtype_number(const char* op, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return 0;
    case at::kHalf:
      return 1;
    case at::kBFloat16:
      return 2;
    default:
      TORCH_CHECK(false, op, ": input expected dtype float32, float16 or bfloat16 on this device, got ",
                  t.scalar_type());
  }
}

// A launch's result.
inline void check_launch(const char* op, const std::string& message) {
  TORCH_CHECK(message.empty(), op, ": ", message);
}

// What kernels/size_limits.h says of a call.
inline void check_limit(const char* op, const std::string& limit) { TORCH_CHECK(limit.empty(), op, ": ", limit); }

inline int checked_channels(const char* op, int64_t channels) {
  check_limit(op, channel_limit(channels));
  return static_cast<int>(channels);
}

inline void* raw(const at::Tensor& t) { return data<void>(t); }

// A per-channel vector as the kernels read it: contiguous, fp32 or the tensor's own dtype. Undefined where absent.
inline at::Tensor vector_or_none(const OptTensor& t) { return given(t) ? t->contiguous() : at::Tensor(); }
inline bool is_fp32(const at::Tensor& t) { return !t.defined() || t.scalar_type() == at::kFloat; }

// Two vectors that share one flag "is fp32": both widened where their dtypes differ.
inline bool same_precision(at::Tensor& a, at::Tensor& b, at::ScalarType own) {
  if (a.defined() && b.defined() && a.scalar_type() != b.scalar_type()) {
    a = a.to(at::kFloat);
    b = b.to(at::kFloat);
  }
  const at::Tensor& one = a.defined() ? a : b;
  return !one.defined() || one.scalar_type() != own || own == at::kFloat;
}

// The channel-wise kernels cut [rows, channels] into chunks: eight blocks of 256 threads fill a multiprocessor, and two
// waves of them even out what is left over; below 32 rows a chunk's partial sums cost as much as the rows.
constexpr int kMinRows = 32;
inline int column_blocks(const Device& device) { return 16 * device.multiprocessors(); }

}  // namespace fastconv::cuda
