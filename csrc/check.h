// Argument checks that every raw operator shares. The texts read `op: name expected X, got Y`; exception types are
// PyTorch's own.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string_view>

#include "params.h"

namespace fastconv {

using OptTensor = std::optional<at::Tensor>;

inline bool given(const OptTensor& t) { return t.has_value() && t->defined(); }

inline bool same_text(std::string_view a, const char* b) { return a.size() == std::strlen(b) && a == b; }

inline Act parse_act(const char* op, std::string_view name) {
  static constexpr const char* names[] = {"identity", "relu", "relu6", "leaky_relu", "sigmoid",
                                          "tanh",     "silu", "gelu",  "hardswish"};
  for (int i = 0; i < 9; ++i) {
    if (same_text(name, names[i])) return static_cast<Act>(i);
  }
  TORCH_CHECK_VALUE(
      false, op,
      ": activation expected one of identity, relu, relu6, leaky_relu, sigmoid, tanh, silu, gelu, hardswish, ", "got '",
      name, "'");
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK(t.dim() == dim, op, ": ", name, " expected ", dim, " dimensions, got ", t.dim(), " (size ", t.sizes(),
              ")");
}

inline void check_strided(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.layout() == at::kStrided, op, ": ", name, " expected a strided (dense) tensor, got layout ",
              t.layout());
}

inline void check_float(const char* op, const char* name, const at::Tensor& t) {
  check_strided(op, name, t);
  const auto type = t.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op, ": ", name,
              " expected dtype float32, float64, bfloat16 or float16, got ", type);
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& t, at::ScalarType want) {
  check_strided(op, name, t);
  TORCH_CHECK(t.scalar_type() == want, op, ": ", name, " expected dtype ", want, ", got ", t.scalar_type());
}

inline void check_device(const char* op, const char* name, const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK(t.device() == like.device(), op, ": ", name, " expected device ", like.device(), ", got ", t.device());
}

inline void check_sizes(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef want) {
  TORCH_CHECK(t.sizes() == want, op, ": ", name, " expected size ", want, ", got ", t.sizes());
}

inline void check_pair(const char* op, const char* name, at::IntArrayRef v, int64_t least) {
  TORCH_CHECK(v.size() == 2, op, ": ", name, " expected 2 integers, got ", v.size());
  TORCH_CHECK(v[0] >= least && v[1] >= least, op, ": ", name, " expected at least ", least, ", got ", v);
}

// fp32, and fp64 for fp64: the dtype of sums and statistics.
inline at::ScalarType acc_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

// A per-channel vector of the operator: [channels], dtype either the input's or its accumulate type.
inline void check_channels(const char* op, const char* name, const OptTensor& t, const at::Tensor& input,
                           int64_t channels) {
  if (!given(t)) return;
  check_device(op, name, *t, input);
  check_strided(op, name, *t);
  TORCH_CHECK(t->dim() == 1 && t->size(0) == channels, op, ": ", name, " expected size [", channels, "], got ",
              t->sizes());
  const auto type = t->scalar_type();
  TORCH_CHECK(type == input.scalar_type() || type == acc_type(input.scalar_type()), op, ": ", name, " expected dtype ",
              input.scalar_type(), " or ", acc_type(input.scalar_type()), ", got ", type);
}

// What is added before the activation: size and dtype of the output.
inline void check_residual(const char* op, const OptTensor& t, const at::Tensor& like, at::IntArrayRef sizes) {
  if (!given(t)) return;
  check_device(op, "residual", *t, like);
  check_dtype(op, "residual", *t, like.scalar_type());
  check_sizes(op, "residual", *t, sizes);
}

}  // namespace fastconv
