#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fastconv {

// Why the CUDA kernels cannot run a call of a public operator, or "": what csrc/cuda/kernels/size_limits.h says of its
// forward and of the backward that `grads` asks for. Known in every build; the choice of a backend asks before a call.
//
// shapes, grads: one per tensor argument of the operator, a shape empty for None. settings: the operator's own, as
// fastconv/functional.py hands them to the choice. The arguments have passed the checks there.
std::string cuda_limit(const std::string& op, const pybind11::tuple& shapes, const pybind11::tuple& settings,
                       const pybind11::tuple& grads);

}  // namespace fastconv
