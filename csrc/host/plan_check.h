// Arguments of a plan's operators (fastconv_plan), checked once for every device. 4-d tensors are dense NHWC; geometry:
// stride, padding, dilation (h and w of each) and groups.
#pragma once

#include <array>

#include "batch_norm_check.h"
#include "conv2d_check.h"

namespace fastconv {

constexpr auto kNhwc = at::MemoryFormat::ChannelsLast;

inline at::Tensor or_none(const OptTensor& t) { return given(t) ? *t : at::Tensor(); }

inline Act plan_act(const char* op, c10::string_view name) { return parse_act(op, {name.data(), name.size()}); }

inline void check_nhwc(const char* op, const char* name, const at::Tensor& t) {
  check_dim(op, name, t, 4);
  TORCH_CHECK(t.is_contiguous(kNhwc), op, ": ", name, " expected a channels_last tensor, got strides ", t.strides());
}

inline ConvParams plan_conv_params(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                   at::IntArrayRef geometry) {
  TORCH_CHECK(geometry.size() == 7, op, ": geometry expected 7 integers, got ", geometry.size());
  check_nhwc(op, "input", input);
  check_nhwc(op, "weight", weight);
  return conv_params(op, input, weight, {}, geometry.slice(0, 2), geometry.slice(2, 2), geometry.slice(4, 2),
                     geometry[6]);
}

// A tensor to write, of this size, in the dtype and on the device of `like`.
inline void check_output(const char* op, const char* name, const at::Tensor& t, const at::Tensor& like,
                         at::IntArrayRef size) {
  check_nhwc(op, name, t);
  check_dtype(op, name, t, like.scalar_type());
  check_device(op, name, t, like);
  check_sizes(op, name, t, size);
}

inline void check_nhwc_residual(const char* op, const OptTensor& residual, const at::Tensor& like,
                                at::IntArrayRef size) {
  check_residual(op, residual, like, size);
  if (given(residual)) check_nhwc(op, "residual", *residual);
}

// Of fastconv_plan::conv2d.
inline ConvParams check_plan_conv2d(const char* op, const at::Tensor& input, const at::Tensor& weight,
                                    const OptTensor& residual, at::IntArrayRef geometry, const OptTensor& preact,
                                    const at::Tensor& output) {
  const ConvParams p = plan_conv_params(op, input, weight, geometry);
  const std::array<int64_t, 4> sizes{p.n, p.k, p.p, p.q};
  check_output(op, "output", output, input, sizes);
  check_nhwc_residual(op, residual, input, sizes);
  if (given(preact)) check_output(op, "preact", *preact, input, sizes);
  return p;
}

// Of fastconv_plan::conv2d_input_grad.
inline ConvParams check_plan_input_grad(const char* op, const at::Tensor& grad_output, const at::Tensor& weight,
                                        const OptTensor& addend, at::IntArrayRef geometry,
                                        const at::Tensor& grad_input) {
  const ConvParams p = plan_conv_params(op, grad_input, weight, geometry);
  check_output(op, "grad_output", grad_output, grad_input, {p.n, p.k, p.p, p.q});
  if (given(addend)) check_output(op, "addend", *addend, grad_input, grad_input.sizes());
  return p;
}

// Of fastconv_plan::batch_norm.
inline void check_plan_batch_norm(const char* op, const at::Tensor& input, const OptTensor& residual,
                                  const BatchNormArgs& args, const at::Tensor& output) {
  check_float(op, "input", input);
  check_nhwc(op, "input", input);
  check_output(op, "output", output, input, input.sizes());
  check_nhwc_residual(op, residual, input, input.sizes());
  check_batch_norm(op, input.sizes(), input, args);
}

// Of fastconv_plan::batch_norm_backward.
inline BatchNormSaved check_plan_batch_norm_backward(const char* op, const at::Tensor& grad_output,
                                                     const at::Tensor& input, const OptTensor& output,
                                                     const OptTensor& residual, const OptTensor& weight,
                                                     const OptTensor& bias, const at::Tensor& mean,
                                                     const at::Tensor& invstd, c10::string_view act,
                                                     const at::Tensor& grad_input, const OptTensor& grad_residual) {
  const BatchNormSaved saved =
      check_batch_norm_backward(op, grad_output, input, output, residual, weight, bias, mean, invstd, act,
                                {true, given(grad_residual), given(weight), given(bias)});
  check_nhwc(op, "grad_output", grad_output);
  check_nhwc(op, "input", input);
  check_output(op, "grad_input", grad_input, input, input.sizes());
  if (given(grad_residual)) check_output(op, "grad_residual", *grad_residual, input, input.sizes());
  return saved;
}

inline ConvParams plan_weight_grad_params(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                                          const at::Tensor& weight, at::IntArrayRef geometry) {
  const ConvParams p = plan_conv_params(op, input, weight, geometry);
  check_output(op, "grad_output", grad_output, input, {p.n, p.k, p.p, p.q});
  return p;
}

// A tensor that shares the weight's sizes and strides, so that one index means the same element in all.
inline void check_like(const char* op, const char* name, const at::Tensor& t, const at::Tensor& weight,
                       at::ScalarType type) {
  check_dtype(op, name, t, type);
  check_device(op, name, t, weight);
  TORCH_CHECK(t.sizes() == weight.sizes() && t.strides() == weight.strides(), op, ": ", name, " expected size ",
              weight.sizes(), " and strides ", weight.strides(), " like the weight, got ", t.sizes(), " and ",
              t.strides());
}

// Of an optimizer's step on one weight; returns whether it is Adam's. hyper, float64: SGD's lr, momentum, decay,
// nesterov; Adam's lr / (1 - beta1^t), beta1, beta2, sqrt(1 - beta2^t), eps, factor on the weight, L2 term.
inline bool check_weight_update(const char* op, const at::Tensor& weight, at::TensorList state, const OptTensor& half,
                                const at::Tensor& hyper, c10::string_view optimizer) {
  const std::string_view kind(optimizer.data(), optimizer.size());
  check_dtype(op, "weight", weight, at::kFloat);
  TORCH_CHECK(weight.is_non_overlapping_and_dense(), op, ": weight expected a dense tensor, got strides ",
              weight.strides());
  const bool adam = same_text(kind, "adam");
  TORCH_CHECK_VALUE(adam || same_text(kind, "sgd"), op, ": optimizer expected sgd or adam, got '", kind, "'");
  TORCH_CHECK(adam ? state.size() == 2 : state.size() <= 1, op, ": state expected ", adam ? "2" : "at most 1",
              " tensors for ", kind, ", got ", state.size());
  for (const at::Tensor& t : state) check_like(op, "state", t, weight, at::kFloat);
  check_dtype(op, "hyper", hyper, at::kDouble);
  check_device(op, "hyper", hyper, weight);
  check_sizes(op, "hyper", hyper, {adam ? 7 : 4});
  if (given(half)) check_like(op, "half", *half, weight, at::kBFloat16);
  return adam;
}

// Autograd's notice that a step has written to its weight and state.
inline void bump_versions(const at::Tensor& weight, at::TensorList state) {
  if (!weight.is_inference()) weight.unsafeGetTensorImpl()->bump_version();
  for (const at::Tensor& t : state) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

// Of fastconv_plan::update. takes_parts: a gradient may be the sum over a leading dimension.
inline void check_update_lists(const char* op, at::TensorList parameters, at::TensorList grads, at::TensorList state,
                               int64_t per, at::TensorList halves, at::IntArrayRef live, bool takes_parts = false) {
  const auto count = static_cast<int64_t>(parameters.size());
  TORCH_CHECK(static_cast<int64_t>(grads.size()) == count, op, ": grads expected ", count, " tensors, got ",
              grads.size());
  TORCH_CHECK(per >= 0 && static_cast<int64_t>(state.size()) == per * count, op, ": state expected ", per,
              " tensors for each of ", count, ", got ", state.size());
  TORCH_CHECK(halves.empty() || static_cast<int64_t>(halves.size()) == count, op, ": halves expected none or ", count,
              " tensors, got ", halves.size());
  TORCH_CHECK(live.empty() || static_cast<int64_t>(live.size()) == count, op, ": live expected none or ", count,
              " integers, got ", live.size());
  for (int64_t i = 0; i < count; ++i) {
    const bool parts = takes_parts && grads[i].dim() == parameters[i].dim() + 1;
    check_sizes(op, "grads", parts ? grads[i][0] : grads[i], parameters[i].sizes());
  }
}

}  // namespace fastconv
