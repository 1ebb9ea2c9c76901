#pragma once

#include <pybind11/pybind11.h>

namespace fastconv {

// Everything about a tuple of tensors (or None) and about this thread that decides which backend can run a call and how
// fast: sizes, strides, dtype, device, layout, requires_grad, class and dispatch keys of each tensor; grad mode,
// inference, dispatch modes and transforms, determinism and the number of threads. As bytes, for use in a dict's key;
// None where a size is symbolic.
//
// The choice is looked up on every call: the same tuple built in Python costs 2 us for four tensors, this 0.3 us.
pybind11::object signature(const pybind11::tuple& tensors);

}  // namespace fastconv
