// Host side of max_pool2d and its backward: check -> allocate -> split over threads -> kernels/max_pool2d.h.

#include <torch/library.h>

#include <vector>

#include "pool_shape.h"

#define FASTCONV_KERNELS "kernels/max_pool2d.h"
#include "foreach_isa.h"

namespace fastconv::cpu {
namespace {

// The tables of PoolTaps: position i = window * stride - pad + tap * dil.
struct Taps {
  std::vector<int64_t> first, window, tap;

  Taps(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t dil) {
    for (int64_t i = 0; i < in; ++i) {
      first.push_back(static_cast<int64_t>(window.size()));
      for (int64_t t = taps - 1; t >= 0; --t) {  // descending taps: windows in memory order
        const int64_t start = i + pad - t * dil;
        if (start < 0 || start % stride != 0 || start / stride >= out) continue;
        window.push_back(start / stride);
        tap.push_back(t);
      }
    }
    first.push_back(static_cast<int64_t>(window.size()));
  }
  PoolTaps view() const { return {first.data(), window.data(), tap.data()}; }
};

std::tuple<at::Tensor, at::Tensor> max_pool2d_op(const at::Tensor& input, at::IntArrayRef kernel_size,
                                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                                 at::IntArrayRef dilation, bool ceil_mode, bool save_offsets) {
  constexpr const char* op = "max_pool2d";
  const PlainDispatch guard;
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  const PoolParams a = pool_params(op, input.sizes(), kernel_size, stride, padding, dilation, ceil_mode);
  if (save_offsets) check_area(op, a);
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = nhwc(input);
  const at::Tensor y = empty_nhwc({a.n, a.c, a.p, a.q}, x.options(), format);
  const auto bytes = x.options().dtype(at::kByte);
  const at::Tensor offsets = save_offsets ? empty_nhwc(y.sizes(), bytes, format) : no_tensor(bytes);
  if (y.numel() > 0) {
    dispatch_float(op, x.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto kernel = FASTCONV_PICK(max_pool2d<T>);
      const T* px = const_data<T>(x);
      T* py = data<T>(y);
      uint8_t* po = data<uint8_t>(offsets);
      parallel_positions(
          a.n * a.p * a.q, a.c, y.numel() * a.r * a.s,
          [&](int64_t begin, int64_t end, int64_t c0, int64_t c1) { kernel(px, py, po, &a, begin, end, c0, c1); });
    });
  }
  return {to_format(y, format), save_offsets ? to_format(offsets, format) : offsets};
}

at::Tensor max_pool2d_backward_op(const at::Tensor& grad_output, const at::Tensor& offsets, at::IntArrayRef input_size,
                                  at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, bool channels_last) {
  constexpr const char* op = "max_pool2d_backward";
  const PlainDispatch guard;
  const PoolParams a =
      max_pool_backward_params(op, grad_output, offsets, input_size, kernel_size, stride, padding, dilation);
  const at::MemoryFormat format = memory_format(channels_last);
  const at::Tensor g = nhwc(grad_output), o = nhwc(offsets);
  const at::Tensor dx = empty_nhwc({a.n, a.c, a.h, a.w}, g.options(), format);
  const Taps rows(a.h, a.p, a.r, a.stride_h, a.pad_h, a.dil_h), columns(a.w, a.q, a.s, a.stride_w, a.pad_w, a.dil_w);
  const PoolTaps in_h = rows.view(), in_w = columns.view();
  if (dx.numel() > 0) {
    dispatch_float(op, g.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto kernel = FASTCONV_PICK(max_pool2d_backward<T>);
      const T* pg = const_data<T>(g);
      const uint8_t* po = const_data<uint8_t>(o);
      T* pd = data<T>(dx);
      parallel_positions(a.n * a.h * a.w, a.c, dx.numel() + g.numel(),
                         [&](int64_t begin, int64_t end, int64_t c0, int64_t c1) {
                           kernel(pg, po, pd, &a, &in_h, &in_w, begin, end, c0, c1);
                         });
    });
  }
  return to_format(dx, format);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("max_pool2d", &max_pool2d_op);
  m.impl("max_pool2d_backward", &max_pool2d_backward_op);
}

}  // namespace fastconv::cpu
