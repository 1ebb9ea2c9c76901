// From a run-time dtype to a template argument.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "cpu/types.h"

namespace fastconv {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) with the kernels' element type of `type`.
template <class F>
decltype(auto) dispatch_float(const char* op, at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat:
      return f(TypeTag<float>{});
    case at::kDouble:
      return f(TypeTag<double>{});
    case at::kBFloat16:
      return f(TypeTag<cpu::bf16>{});
    case at::kHalf:
      return f(TypeTag<cpu::f16>{});
    default:
      TORCH_CHECK(false, op, ": expected dtype float32, float64, bfloat16 or float16, got ", type);
  }
}

}  // namespace fastconv
