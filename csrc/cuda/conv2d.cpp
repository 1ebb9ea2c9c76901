// Host side of the convolution: check -> allocate -> choose tile -> launch; conv2d_bias_act and conv2d_backward.
//
// Fast path: channels_last input and weight. Other layouts are copied to it first and the result copied back.

#include "conv2d.h"

#include <ATen/Context.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>

#include "conv2d_config.h"

namespace fastconv::cuda {
namespace {

// The kernel for kFprop, kDgrad or kWgrad of this convolution.
ConvKind conv_kind(const ConvParams& p, ConvKind kind) {
  return is_depthwise(p) ? static_cast<ConvKind>(kind + kDepthwiseFprop) : kind;
}

// One dtype-independent call: everything but the operands. kind: of kFprop, kDgrad, kWgrad.
ConvCall make_call(const char* op, const ConvParams& p, const at::Tensor& like, ConvKind kind) {
  kind = conv_kind(p, kind);
  check_limit(op, conv_limit(p, kind));
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  ConvCall call{};
  call.shape = {i(p.n), i(p.h),        i(p.w),        i(p.c),     i(p.k),     i(p.r),     i(p.s),     i(p.p),
                i(p.q), i(p.stride_h), i(p.stride_w), i(p.pad_h), i(p.pad_w), i(p.dil_h), i(p.dil_w), i(p.groups)};
  call.dtype = dtype_number(op, like);
  call.kind = kind;
  call.splits = 1;
  call.tensor = call.dtype != 0 || at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  return call;
}

// Fills in tile and splits, and allocates the partial sums.
at::Tensor choose(ConvCall& call, const at::Tensor& like, const Device& device, bool stats) {
  const ConvShape& g = call.shape;
  const auto kind = static_cast<ConvKind>(call.kind);
  int64_t result = 0;
  if (kind == kDepthwiseWgrad) {
    call.splits = depthwise_wgrad_splits(g, device.multiprocessors());
    result = static_cast<int64_t>(g.c) * g.r * g.s;
  } else if (kind < kDepthwiseFprop) {
    const ConvChoice choice =
        choose_conv(g, kind, static_cast<int>(like.element_size()), device.multiprocessors(), stats);
    call.tile = choice.tile;
    call.splits = choice.splits;
    result = gemm_view(g, kind).result;
  }
  if (call.splits == 1) return {};
  const at::Tensor partial = at::empty({call.splits, result}, like.options().dtype(at::kFloat));
  call.partial = data<float>(partial);
  return partial;
}

// The call leaves its split sums to rest; depthwise kernels add theirs up themselves.
void keep_parts(ConvCall& call, const at::Tensor& partial, ConvRest& rest) {
  if (call.splits == 1 || call.kind >= kDepthwiseFprop) return;
  call.keep_parts = 1;
  rest.parts = partial, rest.splits = call.splits;
}

}  // namespace

at::Tensor conv_forward(const char* op, const Device& device, const ConvParams& p, const at::Tensor& input,
                        const at::Tensor& weight, const ConvEpilogueTensors& epilogue, at::MemoryFormat format,
                        ConvRest* rest) {
  ConvCall call = make_call(op, p, input, kFprop);
  const at::Tensor out =
      epilogue.out.defined() ? epilogue.out : empty_nhwc({p.n, p.k, p.p, p.q}, input.options(), format);
  if (p.n == 0) return out;
  const at::Tensor x = nhwc(input), w = weight.contiguous(at::MemoryFormat::ChannelsLast);
  call.a = raw(x), call.b = raw(w), call.out = raw(out);
  call.scale = const_data<float>(epilogue.scale), call.shift = const_data<float>(epilogue.shift);
  const at::Tensor bias = epilogue.bias.defined() ? epilogue.bias.contiguous() : at::Tensor();
  if (bias.defined() && bias.scalar_type() != x.scalar_type()) {
    call.shift = const_data<float>(bias);  // an fp32 bias beside 16-bit tensors is a shift; there is no other then
  } else {
    call.bias = raw(bias);
  }
  call.residual = raw(epilogue.residual), call.preact = raw(epilogue.pre);
  call.act = static_cast<int>(epilogue.act);
  const bool want_stats = rest != nullptr && !rest->takes_parts && call.kind == kFprop;
  const at::Tensor partial = choose(call, x, device, want_stats);
  if (rest != nullptr && rest->takes_parts) keep_parts(call, partial, *rest);
  if (want_stats) {
    rest->part_rows = conv_tile_rows(call);
    const int64_t parts = (p.gemm_m() + rest->part_rows - 1) / rest->part_rows;
    rest->mean = at::empty({parts, p.k}, acc_options(x));
    rest->m2 = at::empty({parts, p.k}, acc_options(x));
    call.stat_mean = data<float>(rest->mean), call.stat_m2 = data<float>(rest->m2);
  }
  check_launch(op, conv(call, device.stream()));
  return out;
}

ConvRest conv_input_grad(const char* op, const Device& device, const ConvParams& p, const at::Tensor& dy,
                         const at::Tensor& weight, const at::Tensor& addend, const at::Tensor& dx, bool takes_parts,
                         ConvNormSums* norm) {
  const at::Tensor w = weight.contiguous(at::MemoryFormat::ChannelsLast);
  ConvCall call = make_call(op, p, dy, kDgrad);
  call.a = raw(dy), call.b = raw(w), call.out = raw(dx), call.residual = raw(addend);
  const at::Tensor partial = choose(call, dy, device, false);
  ConvRest rest;
  if (takes_parts) keep_parts(call, partial, rest);
  if (norm != nullptr && call.kind == kDgrad && call.splits == 1) {
    const int64_t rows = conv_tile_rows(call);
    norm->tiles = dgrad_classes(call.shape) * ((dgrad_class_rows(call.shape) + rows - 1) / rows);
    norm->parts = at::empty({2, norm->tiles, p.c}, acc_options(dx));
    call.norm_x = raw(norm->x);
    call.norm_mean = const_data<float>(norm->mean), call.norm_invstd = const_data<float>(norm->invstd);
    call.norm_weight = const_data<float>(norm->weight), call.norm_bias = const_data<float>(norm->bias);
    call.grad_saved = raw(norm->output), call.act = static_cast<int>(norm->act);
    call.sum_g = data<float>(norm->parts), call.sum_gx = call.sum_g + norm->tiles * p.c;
  }
  check_launch(op, conv(call, device.stream()));
  return rest;
}

ConvRest conv_weight_grad(const char* op, const Device& device, const ConvParams& p, const at::Tensor& dy,
                          const at::Tensor& x, const at::Tensor& dw, bool takes_parts) {
  ConvCall call = make_call(op, p, dy, kWgrad);
  const at::Tensor partial = choose(call, dy, device, false);
  ConvRest rest;
  // The optimizer reads them at the end of the step: a few layers' sums lie in L2 until then, more would not.
  constexpr int64_t kMostPartBytes = 8 << 20;
  if (takes_parts && partial.defined() && static_cast<int64_t>(partial.nbytes()) <= kMostPartBytes)
    keep_parts(call, partial, rest);
  const std::array<int64_t, 4> sizes{p.k, p.c / p.groups, p.r, p.s};
  const bool own = takes_parts && rest.splits == 0;
  const at::Tensor out = own ? at::empty(sizes, x.options(), at::MemoryFormat::ChannelsLast) : dw;
  call.a = raw(dy), call.b = raw(x), call.out = raw(out);
  if (own) rest.parts = out;
  check_launch(op, conv(call, device.stream()));
  return rest;
}

namespace {

std::tuple<at::Tensor, at::Tensor> conv2d_bias_act(const at::Tensor& input, const at::Tensor& weight,
                                                   const OptTensor& bias, const OptTensor& residual,
                                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                                   at::IntArrayRef dilation, int64_t groups,
                                                   c10::string_view activation, bool save_preact) {
  constexpr const char* op = "conv2d_bias_act";
  const PlainDispatch guard;
  const ConvParams p = conv_params(op, input, weight, bias, stride, padding, dilation, groups);
  const std::array<int64_t, 4> sizes{p.n, p.k, p.p, p.q};
  check_residual(op, residual, input, sizes);
  const Device device(input);
  const at::MemoryFormat format = conv_format(input, weight);
  ConvEpilogueTensors epilogue;
  epilogue.act = parse_act(op, {activation.data(), activation.size()});
  if (given(bias)) epilogue.bias = *bias;
  if (given(residual)) epilogue.residual = nhwc(*residual);
  if (save_preact) epilogue.pre = empty_nhwc(sizes, input.options(), format);
  const at::Tensor out = conv_forward(op, device, p, input, weight, epilogue, format, nullptr);
  return {to_format(out, format), save_preact ? to_format(epilogue.pre, format) : no_tensor(input.options())};
}

std::tuple<at::Tensor, at::Tensor> conv2d_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                   const at::Tensor& weight, at::IntArrayRef stride,
                                                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                                   std::array<bool, 2> output_mask) {
  constexpr const char* op = "conv2d_backward";
  const PlainDispatch guard;
  const ConvParams p = conv_backward_params(op, grad_output, input, weight, stride, padding, dilation, groups);
  dtype_number(op, input);
  const auto format_x = input.suggest_memory_format(), format_w = weight.suggest_memory_format();
  at::Tensor dx = no_tensor(input.options()), dw = no_tensor(weight.options());
  if (input.numel() == 0 || grad_output.numel() == 0) {
    if (output_mask[0]) dx = at::zeros_like(input, {}, format_x);
    if (output_mask[1]) dw = at::zeros_like(weight, {}, format_w);
    return {dx, dw};
  }
  const Device device(input);
  if (output_mask[0]) check_limit(op, conv_limit(p, conv_kind(p, kDgrad)));  // before anything is copied
  if (output_mask[1]) check_limit(op, conv_limit(p, conv_kind(p, kWgrad)));
  const at::Tensor dy = nhwc(grad_output);
  if (output_mask[0]) {
    dx = empty_nhwc(input.sizes(), input.options(), format_x);
    conv_input_grad(op, device, p, dy, weight, {}, dx);
    dx = to_format(dx, format_x);
  }
  if (output_mask[1]) {
    dw = at::empty(weight.sizes(), weight.options(), at::MemoryFormat::ChannelsLast);
    conv_weight_grad(op, device, p, dy, nhwc(input), dw);
    dw = to_format(dw, format_w);
  }
  return {dx, dw};
}

}  // namespace

FASTCONV_GPU_OPERATORS(m) {
  m.impl("conv2d_bias_act", &conv2d_bias_act);
  m.impl("conv2d_backward", &conv2d_backward);
}

}  // namespace fastconv::cuda
