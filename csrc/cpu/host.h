// What every CPU host file needs: dispatch guards, layout, per-channel vectors in the accumulate type.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/strides.h>

#include "../check.h"
#include "../dispatch.h"
#include "../params.h"
#include "types.h"

namespace fastconv::cpu {

// Gradients live outside the operators and the caller has chosen the dtypes: ATen must neither record nor cast below
// this point.
struct PlainDispatch {
  c10::impl::ExcludeDispatchKeyGuard autograd{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

template <class T>
T* data(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<T*>(t.data_ptr()) : nullptr;
}
template <class T>
const T* const_data(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}

inline at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// 4-d, dense NHWC in memory. A copy where it is not so already.
inline at::Tensor nhwc(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// A new 4-d tensor, dense NHWC in memory, that will be handed out in `format`: where both formats are the same bytes
// (one channel, or one position) it already has `format`'s strides.
inline at::Tensor empty_nhwc(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const bool same_bytes = sizes[1] == 1 || sizes[2] * sizes[3] == 1;
  return at::empty(sizes, options, same_bytes ? format : at::MemoryFormat::ChannelsLast);
}

// The visible copy back, for callers with NCHW tensors. Where both formats are the same bytes only the strides change,
// so that suggest_memory_format() of the result is `format`.
inline at::Tensor to_format(const at::Tensor& t, at::MemoryFormat format) {
  if (t.suggest_memory_format() == format && t.is_contiguous(format)) return t;
  if (!t.is_contiguous(format)) return t.contiguous(format);
  if (format == at::MemoryFormat::ChannelsLast)
    return t.as_strided(t.sizes(), c10::get_channels_last_strides_2d(t.sizes()));
  return t.as_strided(t.sizes(), c10::contiguous_strides(t.sizes()));
}

inline at::Tensor no_tensor(const at::TensorOptions& options) { return at::empty({0}, options); }

inline at::TensorOptions acc_options(const at::Tensor& t) { return t.options().dtype(acc_type(t.scalar_type())); }

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
