// The convolution itself: chooses the algorithm by shape.
//
// fastconv's own engines (conv_rows.h, conv_grouped.h) run where they were measured to be faster than oneDNN; what is
// left goes to ATen, that is oneDNN or ATen's own loops, after the taps that read padding alone are cut off the filter.

#include "conv2d.h"

#include <ATen/ops/add.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "conv_rows.h"

namespace fastconv::cpu {
namespace {

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// The part of one axis of a filter that can touch the input: taps [first, first + taps) and the padding that is left
// for them.
struct LiveTaps {
  int64_t first, taps, pad;
};

// Whether some output position reads padding alone.
bool has_empty_position(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t dil) {
  for (int64_t p = 0; p < out; ++p) {
    bool any = false;
    for (int64_t t = 0; t < taps && !any; ++t) any = tap_touches(in, stride, pad, dil, p, t);
    if (!any) return true;
  }
  return false;
}

// All taps, where the same output size cannot be had with symmetric padding.
LiveTaps live_taps(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t dil) {
  int64_t first = taps, last = -1;
  for (int64_t t = 0; t < taps; ++t) {
    if (tap_is_live(in, out, stride, pad, dil, t)) first = std::min(first, t), last = t;
  }
  const LiveTaps all{0, taps, pad}, live{first, last - first + 1, pad - first * dil};
  if (last < 0 || live.pad < 0) return all;
  const int64_t span = in + 2 * live.pad - dil * (live.taps - 1) - 1;
  return span >= 0 && span / stride + 1 == out ? live : all;
}

// A padded 3x3 filter over a 1x1 map is a 1x1 filter: 9 times less work, and oneDNN does not see it (measured 0.43 ms
// against 0.04).
struct Cropped {
  LiveTaps h, w;
  at::Tensor weight;

  Cropped(const ConvParams& p, const at::Tensor& full)
      : h(live_taps(p.h, p.p, p.r, p.stride_h, p.pad_h, p.dil_h)),
        w(live_taps(p.w, p.q, p.s, p.stride_w, p.pad_w, p.dil_w)) {
    weight = all(p) ? full : crop(full).contiguous(kLast);
  }
  // Dilation means nothing where one tap is left, and oneDNN 3.10 crashes on some such calls (1x1, dilated, padded,
  // with a bias).
  std::array<int64_t, 2> dilation(const ConvParams& p) const {
    return {h.taps == 1 ? 1 : p.dil_h, w.taps == 1 ? 1 : p.dil_w};
  }
  bool all(const ConvParams& p) const { return h.taps == p.r && w.taps == p.s; }
  at::Tensor crop(const at::Tensor& t) const { return t.narrow(2, h.first, h.taps).narrow(3, w.first, w.taps); }
};

// With a bias, which oneDNN adds before its one rounding.
at::Tensor aten_forward(const ConvParams& p, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const Cropped live(p, weight);
  at::Tensor input = x;
  int64_t stride_w = p.stride_w, pad_w = live.w.pad;
  // Of one position per row, with a stride, oneDNN 3.10's bf16 kernels for AMX multiply memory that nobody wrote (a 5x4
  // filter, stride (1, 4), on 8x7: NaN in 299 of 300 calls). The same position without a stride, on what it reads.
  if (p.q == 1 && stride_w > 1 && x.scalar_type() == at::kBFloat16) {
    const int64_t width = (live.w.taps - 1) * p.dil_w + 1;
    const std::array<int64_t, 2> pad{pad_w, std::max<int64_t>(0, width - pad_w - p.w)};
    input = nhwc(at::constant_pad_nd(x, pad).narrow(3, 0, width));
    stride_w = 1, pad_w = 0;
  }
  const auto convolve = [&](const at::Tensor& from, const at::Tensor& filters) {
    return nhwc(at::convolution(from, filters, bias, {p.stride_h, stride_w}, {live.h.pad, pad_w}, live.dilation(p),
                                false, {0, 0}, p.groups));
  };
  // oneDNN 3.10's channels_last kernels crash on a dilated filter where a position reads padding alone; its NCHW
  // kernels do not.
  const bool dilated = p.dil_h > 1 || p.dil_w > 1;
  if (dilated && (has_empty_position(p.h, p.p, p.r, p.stride_h, p.pad_h, p.dil_h) ||
                  has_empty_position(p.w, p.q, p.s, p.stride_w, p.pad_w, p.dil_w)))
    return convolve(input.contiguous(), live.weight.contiguous());
  return convolve(input, live.weight);
}

std::tuple<at::Tensor, at::Tensor> aten_backward(const ConvParams& p, const at::Tensor& dy, const at::Tensor& x,
                                                 const at::Tensor& weight, std::array<bool, 2> mask) {
  const Cropped live(p, weight);
  // Without AVX-512, oneDNN 3.10's channels_last weight gradient of a 1x1 filter with a stride on 2 to 7 channels
  // writes out of bounds (fp32, 3 channels of 64x64: the process aborts in free()); its NCHW kernels do not.
  const bool nchw = mask[1] && live.h.taps * live.w.taps == 1 && std::max(p.stride_h, p.stride_w) > 1 && p.c < 8;
  // A copy with NCHW's own strides: those of a 1x1 map or of one channel can mean either layout.
  const auto given = [&](const at::Tensor& t) { return nchw ? t.clone(at::MemoryFormat::Contiguous) : t; };
  auto [dx, dw, db] = at::convolution_backward(given(dy), given(x), given(live.weight), std::nullopt,
                                               {p.stride_h, p.stride_w}, {live.h.pad, live.w.pad}, live.dilation(p),
                                               false, {0, 0}, p.groups, {mask[0], mask[1], false});
  if (!mask[1]) return {dx, dw};
  if (!live.all(p)) {
    const at::Tensor full = at::zeros_like(weight, {}, kLast);
    live.crop(full).copy_(dw);
    dw = full;
  }
  // A tap that touches no input has gradient zero; oneDNN 3.10's bf16 kernel leaves it unwritten.
  for (int64_t r = 0; r < p.r; ++r) {
    if (!tap_is_live(p.h, p.p, p.stride_h, p.pad_h, p.dil_h, r)) dw.select(2, r).zero_();
  }
  for (int64_t s = 0; s < p.s; ++s) {
    if (!tap_is_live(p.w, p.q, p.stride_w, p.pad_w, p.dil_w, s)) dw.select(3, s).zero_();
  }
  return {dx, dw};
}

}  // namespace

ConvEngine conv_engine(const ConvParams& p, const at::Tensor& x, ConvPass pass) {
  const at::ScalarType type = x.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16) return ConvEngine::aten;
  if (grouped_worthwhile(p, pass)) return ConvEngine::grouped;
  return rows_worthwhile(p, x.element_size(), pass) ? ConvEngine::rows : ConvEngine::aten;
}

namespace {

// Not of ATen's. Dense NHWC tensors, addend undefined or one.
void engine_input_grad(ConvEngine engine, const ConvParams& p, const at::Tensor& dy, const at::Tensor& weight,
                       const at::Tensor& addend, const at::Tensor& dx) {
  with_types(dx, weight, [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using W = typename decltype(wide)::type;
    const RowsEpilogue<T> e{data<T>(dx), nullptr, const_data<T>(addend), nullptr, nullptr, Act::identity, nullptr};
    if (engine == ConvEngine::grouped) {
      grouped_input_grad<T>(p, const_data<T>(dy), const_data<W>(weight), e);
    } else {
      rows_input_grad<T>(p, const_data<T>(dy), const_data<W>(weight), nullptr, e);
    }
  });
}

// Likewise. dw: of the input's dtype, or fp32.
void engine_weight_grad(ConvEngine engine, const ConvParams& p, const at::Tensor& dy, const at::Tensor& x,
                        const at::Tensor& dw) {
  with_types(x, dw, [&](auto tag, auto wide) {
    using T = typename decltype(tag)::type;
    using D = typename decltype(wide)::type;
    if (engine == ConvEngine::grouped) {
      grouped_weight_grad<T, D>(p, const_data<T>(dy), const_data<T>(x), data<D>(dw));
    } else {
      rows_weight_grad<T, D>(p, const_data<T>(dy), const_data<T>(x), data<D>(dw));
    }
  });
}

}  // namespace

void conv_weight_grad_into(const ConvParams& p, const at::Tensor& grad_output, const at::Tensor& input,
                           const at::Tensor& weight, const at::Tensor& grad_weight) {
  const ConvEngine engine = conv_engine(p, input, ConvPass::weight_grad);
  if (engine != ConvEngine::aten) {
    engine_weight_grad(engine, p, grad_output, input, grad_weight);
  } else {
    grad_weight.copy_(std::get<1>(aten_backward(p, grad_output, input, weight, {false, true})));
  }
}

void conv_input_grad(const ConvParams& p, const at::Tensor& grad_output, const at::Tensor& weight,
                     const at::Tensor& addend, const at::Tensor& grad_input) {
  const ConvEngine engine = conv_engine(p, grad_input, ConvPass::input_grad);
  if (engine != ConvEngine::aten) {
    engine_input_grad(engine, p, grad_output, weight, addend, grad_input);
    return;
  }
  auto [dx, dw] = aten_backward(p, grad_output, grad_input, weight, {true, false});
  if (addend.defined()) {
    at::add_out(const_cast<at::Tensor&>(grad_input), dx, addend);
  } else {
    grad_input.copy_(dx);
  }
}

at::Tensor conv_forward(const ConvParams& p, const at::Tensor& input, const at::Tensor& weight,
                        const ConvEpilogue& epilogue, at::MemoryFormat format) {
  const auto made = [&] {
    return epilogue.out.defined() ? epilogue.out : empty_nhwc({p.n, p.k, p.p, p.q}, input.options(), format);
  };
  if (p.n == 0) return made();
  const at::Tensor x = nhwc(input), w = weight.contiguous(kLast);
  at::Tensor out;
  const ConvEngine engine = conv_engine(p, x, ConvPass::forward);
  if (engine != ConvEngine::aten) {
    out = made();
    with_types(x, w, [&](auto tag, auto wide) {
      using T = typename decltype(tag)::type;
      using W = typename decltype(wide)::type;
      const ConvEpilogue& e = epilogue;
      const RowsEpilogue<T> to{data<T>(out),
                               data<T>(e.pre),
                               const_data<T>(e.residual),
                               const_data<float>(e.scale),
                               const_data<float>(e.shift),
                               e.act,
                               const_data<float>(e.mean)};
      if (engine == ConvEngine::grouped) {
        grouped_forward<T>(p, const_data<T>(x), const_data<W>(w), to);
      } else {
        rows_forward<T>(p, const_data<T>(x), const_data<W>(w), e.packed, to);
      }
    });
    return out;
  }
  ConvEpilogue rest = epilogue;
  at::Tensor bias;
  // A dilated convolution's bias stays out of oneDNN: see Cropped::dilation.
  const bool dilated = p.dil_h > 1 || p.dil_w > 1;
  if (!dilated && !rest.mean.defined() && !rest.scale.defined() && rest.shift.defined()) {
    bias = rest.shift.to(x.scalar_type());
    rest.shift = at::Tensor();
  }
  out = aten_forward(p, x, w.to(x.scalar_type()), bias);
  const at::Tensor to = rest.out.defined() ? rest.out : out;
  if (rest.empty()) {
    if (!to.is_same(out)) to.copy_(out);
  } else {
    const auto vec = [&](const at::Tensor& t, double fill) { return channel_vector(t, out, p.k, fill); };
    channel_affine(out, to, rest.pre, rest.residual, vec(rest.mean, 0), vec(rest.scale, 1), vec(rest.shift, 0),
                   rest.act);
  }
  return to;
}

std::tuple<at::Tensor, at::Tensor> conv_backward(const ConvParams& p, const at::Tensor& grad_output,
                                                 const at::Tensor& input, const at::Tensor& weight,
                                                 std::array<bool, 2> output_mask, const at::Tensor& into) {
  const auto format_x = input.suggest_memory_format(), format_w = weight.suggest_memory_format();
  if (input.numel() == 0 || grad_output.numel() == 0) {
    return {output_mask[0] ? at::zeros_like(input, {}, format_x) : at::Tensor(),
            output_mask[1] ? at::zeros_like(weight, {}, format_w) : at::Tensor()};
  }
  const at::Tensor dy = nhwc(grad_output), x = nhwc(input), w = weight.contiguous(kLast);
  at::Tensor dx, dw;
  const ConvEngine for_dx = output_mask[0] ? conv_engine(p, x, ConvPass::input_grad) : ConvEngine::aten;
  const ConvEngine for_dw = output_mask[1] ? conv_engine(p, x, ConvPass::weight_grad) : ConvEngine::aten;
  if (for_dx != ConvEngine::aten) {
    dx = empty_nhwc(x.sizes(), x.options(), format_x);
    engine_input_grad(for_dx, p, dy, w, {}, dx);
    output_mask[0] = false;
  }
  if (for_dw != ConvEngine::aten) {
    dw = into.defined() ? into : at::empty(w.sizes(), w.options(), kLast);
    engine_weight_grad(for_dw, p, dy, x, dw);
    output_mask[1] = false;
  }
  if (output_mask[0] || output_mask[1]) {
    auto [aten_dx, aten_dw] = aten_backward(p, dy, x, w.to(x.scalar_type()), output_mask);
    if (output_mask[0]) dx = aten_dx;
    if (output_mask[1]) dw = into.defined() ? into.copy_(aten_dw) : aten_dw.to(w.scalar_type());
  }
  return {dx.defined() ? to_format(dx, format_x) : dx, dw.defined() ? to_format(dw, format_w) : dw};
}

}  // namespace fastconv::cpu
