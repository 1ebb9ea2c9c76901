// Host side of avg_pool2d, adaptive_avg_pool2d and their backwards: check -> window tables -> kernels/avg_pool2d.h.

#include <torch/library.h>

#include <vector>

#include "pool_shape.h"

#define FASTCONV_KERNELS "kernels/avg_pool2d.h"
#include "foreach_isa.h"

namespace fastconv::cpu {
namespace {

// One axis of PoolWindows.
struct Axis {
  std::vector<int64_t> begin, end, count;  // per window
  std::vector<int64_t> first, last;        // per input position: windows [first, last)

  Axis(int64_t in, int64_t out) : begin(out), end(out), count(out), first(in, 0), last(in, 0) {}

  // Begins and ends do not fall, so the windows over one position are neighbours.
  void index_positions() {
    const int64_t in = static_cast<int64_t>(first.size()), out = static_cast<int64_t>(begin.size());
    int64_t from = 0, to = 0;
    for (int64_t i = 0; i < in; ++i) {
      while (from < out && end[from] <= i) ++from;
      while (to < out && begin[to] <= i) ++to;
      first[i] = from, last[i] = std::max(from, to);
    }
  }
};

Axis fixed_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, bool count_include_pad) {
  Axis a(in, out);
  for (int64_t p = 0; p < out; ++p) {
    const int64_t begin = p * stride - pad,
                  end = std::min(begin + kernel, in + pad);  // ceil_mode: at most the padding counts
    a.begin[p] = std::max<int64_t>(begin, 0), a.end[p] = std::min(end, in);
    a.count[p] = count_include_pad ? end - begin : a.end[p] - a.begin[p];
  }
  a.index_positions();
  return a;
}

Axis adaptive_axis(int64_t in, int64_t out) {
  Axis a(in, out);
  for (int64_t p = 0; p < out; ++p) {
    a.begin[p] = p * in / out, a.end[p] = ((p + 1) * in + out - 1) / out;
    a.count[p] = a.end[p] - a.begin[p];
  }
  a.index_positions();
  return a;
}

PoolWindows windows(int64_t n, int64_t c, const Axis& h, const Axis& w) {
  PoolWindows a{};
  a.n = n, a.c = c;
  a.h = static_cast<int64_t>(h.first.size()), a.w = static_cast<int64_t>(w.first.size());
  a.p = static_cast<int64_t>(h.begin.size()), a.q = static_cast<int64_t>(w.begin.size());
  a.h_begin = h.begin.data(), a.h_end = h.end.data(), a.h_count = h.count.data(), a.p_begin = h.first.data(),
  a.p_end = h.last.data();
  a.w_begin = w.begin.data(), a.w_end = w.end.data(), a.w_count = w.count.data(), a.q_begin = w.first.data(),
  a.q_end = w.last.data();
  return a;
}

at::Tensor forward(const char* op, const at::Tensor& input, const PoolWindows& a) {
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = nhwc(input);
  const at::Tensor y = empty_nhwc({a.n, a.c, a.p, a.q}, x.options(), format);
  if (y.numel() > 0) {
    dispatch_float(op, x.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto kernel = FASTCONV_PICK(avg_pool2d<T>);
      const T* px = const_data<T>(x);
      T* py = data<T>(y);
      parallel_positions(
          a.n * a.p * a.q, a.c, std::max(x.numel(), y.numel()),
          [&](int64_t begin, int64_t end, int64_t c0, int64_t c1) { kernel(px, py, &a, begin, end, c0, c1); });
    });
  }
  return to_format(y, format);
}

at::Tensor backward(const char* op, const at::Tensor& grad_output, const PoolWindows& a, bool channels_last) {
  const at::MemoryFormat format = memory_format(channels_last);
  const at::Tensor g = nhwc(grad_output);
  const at::Tensor dx = empty_nhwc({a.n, a.c, a.h, a.w}, g.options(), format);
  if (dx.numel() > 0) {
    dispatch_float(op, g.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto kernel = FASTCONV_PICK(avg_pool2d_backward<T>);
      const T* pg = const_data<T>(g);
      T* pd = data<T>(dx);
      parallel_positions(
          a.n * a.h * a.w, a.c, std::max(dx.numel(), g.numel()),
          [&](int64_t begin, int64_t end, int64_t c0, int64_t c1) { kernel(pg, pd, &a, begin, end, c0, c1); });
    });
  }
  return to_format(dx, format);
}

struct FixedWindows {
  PoolParams params;
  Axis h, w;
};

FixedWindows fixed_windows(const char* op, at::IntArrayRef sizes, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef pad, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override) {
  const PoolParams a = avg_pool_params(op, sizes, kernel, stride, pad, ceil_mode, divisor_override);
  FixedWindows f{a, fixed_axis(a.h, a.p, a.r, a.stride_h, a.pad_h, count_include_pad),
                 fixed_axis(a.w, a.q, a.s, a.stride_w, a.pad_w, count_include_pad)};
  if (divisor_override.has_value()) {
    std::fill(f.h.count.begin(), f.h.count.end(), *divisor_override);
    std::fill(f.w.count.begin(), f.w.count.end(), 1);
  }
  return f;
}

at::Tensor avg_pool2d_op(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                         at::IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                         std::optional<int64_t> divisor_override) {
  constexpr const char* op = "avg_pool2d";
  const PlainDispatch guard;
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  const FixedWindows f =
      fixed_windows(op, input.sizes(), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override);
  return forward(op, input, windows(f.params.n, f.params.c, f.h, f.w));
}

at::Tensor avg_pool2d_backward_op(const at::Tensor& grad_output, at::IntArrayRef input_size,
                                  at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                                  bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override,
                                  bool channels_last) {
  constexpr const char* op = "avg_pool2d_backward";
  const PlainDispatch guard;
  check_float(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4);
  check_pair(op, "input_size", input_size, 1);
  const int64_t sizes[4] = {grad_output.size(0), grad_output.size(1), input_size[0], input_size[1]};
  const FixedWindows f =
      fixed_windows(op, sizes, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override);
  check_sizes(op, "grad_output", grad_output, {f.params.n, f.params.c, f.params.p, f.params.q});
  return backward(op, grad_output, windows(f.params.n, f.params.c, f.h, f.w), channels_last);
}

at::Tensor adaptive_avg_pool2d_op(const at::Tensor& input, at::IntArrayRef output_size) {
  constexpr const char* op = "adaptive_avg_pool2d";
  const PlainDispatch guard;
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  check_pair(op, "output_size", output_size, 0);
  check_positions(op, input.sizes().slice(1));
  const Axis h = adaptive_axis(input.size(2), output_size[0]), w = adaptive_axis(input.size(3), output_size[1]);
  return forward(op, input, windows(input.size(0), input.size(1), h, w));
}

at::Tensor adaptive_avg_pool2d_backward_op(const at::Tensor& grad_output, at::IntArrayRef input_size,
                                           bool channels_last) {
  constexpr const char* op = "adaptive_avg_pool2d_backward";
  const PlainDispatch guard;
  check_float(op, "grad_output", grad_output);
  check_dim(op, "grad_output", grad_output, 4);
  check_pair(op, "input_size", input_size, 1);
  const Axis h = adaptive_axis(input_size[0], grad_output.size(2)),
             w = adaptive_axis(input_size[1], grad_output.size(3));
  return backward(op, grad_output, windows(grad_output.size(0), grad_output.size(1), h, w), channels_last);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("avg_pool2d", &avg_pool2d_op);
  m.impl("avg_pool2d_backward", &avg_pool2d_backward_op);
  m.impl("adaptive_avg_pool2d", &adaptive_avg_pool2d_op);
  m.impl("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward_op);
}

}  // namespace fastconv::cpu
