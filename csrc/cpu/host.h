// What every CPU host file needs besides host/tensor.h: per-channel vectors in the accumulate type and their kernel.
#pragma once

#include <ATen/ops/zeros.h>

#include "../dispatch.h"
#include "../host/tensor.h"
#include "types.h"

namespace fastconv::cpu {

// A per-channel vector, contiguous and in the accumulate type of `like`; `fill` where it is absent.
at::Tensor channel_vector(const OptTensor& t, const at::Tensor& like, int64_t channels, double fill);

// out = act((x - mean) * scale + shift + residual); pre = the same before act. All NHWC; out may be x; pre, residual
// may be undefined.
void channel_affine(const at::Tensor& x, const at::Tensor& out, const at::Tensor& pre, const at::Tensor& residual,
                    const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& shift, Act act);

// The loop of channel_affine over rows [r0, r1) and channels [c0, c1), for callers that do their own splitting:
// (x, out, pre, residual, mean, scale, shift, channels, r0, r1, c0, c1, act).
template <class T>
using AffineKernel = void (*)(const T*, T*, T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, int64_t,
                              int64_t, int64_t, int64_t, int64_t, Act);
template <class T>
AffineKernel<T> affine_kernel(Act act);

}  // namespace fastconv::cpu
