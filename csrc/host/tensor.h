// What every host file needs, whatever its device: dispatch guards, raw pointers, layouts.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/strides.h>

#include "../check.h"
#include "../params.h"

namespace fastconv {

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

}  // namespace fastconv
