#pragma once

#include <pybind11/pybind11.h>

namespace fastconv {

// Everything about a call that decides whether its arguments are right, which backend can run it and how fast: the
// operator's name, sizes, strides, dtype, device, layout, requires_grad, class and dispatch keys of each tensor, the
// other arguments with their types, and of this thread grad mode, inference, dispatch modes and transforms, determinism
// and the number of threads. As bytes, for use as a dict's key; None where a size is symbolic, or where an argument is
// neither None nor a plain bool, int, float, str, nor a tuple or list of these.
//
// Looked up on every call: made in Python it costs 4.6 us for four tensors, here 0.3 us (2 cores of an AMD EPYC).
pybind11::object signature(const pybind11::str& op, const pybind11::tuple& tensors, const pybind11::tuple& arguments);

}  // namespace fastconv
