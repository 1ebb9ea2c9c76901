// From a call's dtype number to a template argument.
#pragma once

#include "kernels/launch.cuh"

namespace fastconv {

// f(T{}) -> Status for dtype 0 fp32, 1 fp16, 2 bf16.
template <class F>
std::string for_dtype(int dtype, F f) {
  switch (dtype) {
    case 0:
      return f(float{}).message;
    case 1:
      return f(__half{}).message;
    case 2:
      return f(__nv_bfloat16{}).message;
    default:
      return "unknown dtype " + std::to_string(dtype);
  }
}

}  // namespace fastconv
