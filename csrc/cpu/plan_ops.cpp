// The steps of a plan (fastconv/_plan): operators that write into tensors which the plan owns,
// torch.ops.fastconv_plan.*.
//
// Same kernels and argument checks as the operators of fastconv; what differs is where results go, that weights may
// come packed, and that a weight gradient may be consumed by the optimizer while it lies in cache.

#include <torch/library.h>

#include <vector>

#include "../host/plan_check.h"
#include "batch_norm_act.h"
#include "conv2d.h"
#include "optimizer.h"

namespace fastconv::cpu {
namespace {

// output = act((conv2d(input, weight) - mean) * scale + shift + residual)
void conv2d(const at::Tensor& input, const at::Tensor& weight, const OptTensor& packed, const OptTensor& mean,
            const OptTensor& scale, const OptTensor& shift, const OptTensor& residual, at::IntArrayRef geometry,
            c10::string_view act, const OptTensor& preact, const at::Tensor& output) {
  constexpr const char* op = "fastconv_plan::conv2d";
  const ConvParams p = check_plan_conv2d(op, input, weight, residual, geometry, preact, output);
  ConvEpilogue e;
  const auto vector = [&](const char* name, const OptTensor& t, double fill) {
    check_channels(op, name, t, input, p.k);
    return given(t) ? channel_vector(t, input, p.k, fill) : at::Tensor();
  };
  e.mean = vector("mean", mean, 0), e.scale = vector("scale", scale, 1), e.shift = vector("shift", shift, 0);
  e.residual = or_none(residual), e.pre = or_none(preact);
  e.act = plan_act(op, act);
  e.out = output;
  if (given(packed) && packed->numel() > 0) {
    const bool rows = conv_engine(p, input, ConvPass::forward) == ConvEngine::rows;
    const int64_t bytes = rows ? rows_packed_bytes(p, input.element_size(), ConvPass::forward) : 0;
    TORCH_CHECK(packed->numel() == bytes, op, ": packed expected ", bytes, " bytes, got ", packed->numel());
    e.packed = packed->const_data_ptr();
  }
  conv_forward(p, input, weight, e, kNhwc);
}

// The weights as conv2d above reads them for an input of this size; empty where it reads them as they are.
at::Tensor conv2d_pack(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef geometry) {
  constexpr const char* op = "fastconv_plan::conv2d_pack";
  const ConvParams p = plan_conv_params(op, input, weight, geometry);
  const auto bytes = weight.options().dtype(at::kByte);
  at::Tensor out = at::empty({0}, bytes);
  if (conv_engine(p, input, ConvPass::forward) != ConvEngine::rows) return out;
  with_type(input, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (rows_in_place<T>(p)) return;
    out = at::zeros({rows_packed_bytes(p, input.element_size(), ConvPass::forward)}, bytes);
    rows_pack<T>(p, const_data<T>(weight), ConvPass::forward, out.data_ptr());
  });
  return out;
}

// grad_input = the gradient + addend
void conv2d_input_grad(const at::Tensor& grad_output, const at::Tensor& weight, const OptTensor& addend,
                       at::IntArrayRef geometry, const at::Tensor& grad_input) {
  constexpr const char* op = "fastconv_plan::conv2d_input_grad";
  const ConvParams p = check_plan_input_grad(op, grad_output, weight, addend, geometry, grad_input);
  conv_input_grad(p, grad_output, weight, or_none(addend), grad_input);
}

at::Tensor conv2d_backward_into(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                int64_t groups, bool input_grad, const at::Tensor& grad_weight) {
  constexpr const char* op = "fastconv_plan::conv2d_backward_into";
  const ConvParams p = conv_backward_params(op, grad_output, input, weight, stride, padding, dilation, groups, true);
  check_nhwc(op, "grad_weight", grad_weight);
  check_dtype(op, "grad_weight", grad_weight, weight.scalar_type());
  check_sizes(op, "grad_weight", grad_weight, weight.sizes());
  TORCH_CHECK(input.numel() > 0 && grad_output.numel() > 0, op, ": input expected with elements, got ", input.sizes());
  const at::Tensor dx = std::get<0>(conv_backward(p, grad_output, input, weight, {input_grad, true}, grad_weight));
  return input_grad ? dx : no_tensor(input.options());
}

// weight: as the forward pass took it, of the input's dtype. grad_weight: fp32.
void conv2d_weight_grad(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                        at::IntArrayRef geometry, const at::Tensor& grad_weight) {
  constexpr const char* op = "fastconv_plan::conv2d_weight_grad";
  const ConvParams p = plan_weight_grad_params(op, grad_output, input, weight, geometry);
  check_nhwc(op, "grad_weight", grad_weight);
  check_dtype(op, "grad_weight", grad_weight, at::kFloat);
  check_sizes(op, "grad_weight", grad_weight, weight.sizes());
  conv_weight_grad_into(p, grad_output, input, weight, grad_weight);
}

// The same gradient, consumed by the optimizer at once: parameter (fp32) and its state are updated. weight may be the
// parameter, or half, which then holds the new values in bf16. skip_dead: taps that read no input are left alone, which
// is the same where neither their state nor a weight decay would move them.
void conv2d_weight_grad_update(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                               at::IntArrayRef geometry, const at::Tensor& parameter, at::TensorList state,
                               const OptTensor& half, const at::Tensor& hyper, c10::string_view optimizer,
                               bool skip_dead) {
  constexpr const char* op = "fastconv_plan::conv2d_weight_grad_update";
  const ConvParams p = plan_weight_grad_params(op, grad_output, input, weight, geometry);
  check_nhwc(op, "parameter", parameter);
  check_sizes(op, "parameter", parameter, weight.sizes());
  const WeightUpdate update(op, parameter, state, half, hyper, optimizer);
  if (conv_engine(p, input, ConvPass::weight_grad) == ConvEngine::rows) {
    with_type(input, [&](auto tag) {
      using T = typename decltype(tag)::type;
      rows_weight_grad_blocks<T>(
          p, const_data<T>(grad_output), const_data<T>(input), skip_dead,
          [&](int64_t first, int64_t count, const float* grad) { update.apply(first, count, grad); });
    });
    return;
  }
  // All taps, the dead ones with a gradient of zero, which skip_dead promises to move nothing.
  const at::Tensor grad = at::empty(weight.sizes(), parameter.options(), kNhwc);
  conv_weight_grad_into(p, grad_output, input, weight, grad);
  update.apply_all(grad);
}

// The taps that one pass over the weights steps on the way to both gradients; none where it takes two.
std::vector<FewRowsTap> stepped_taps(const ConvParams& p, const at::Tensor& input, bool dead) {
  const at::ScalarType type = input.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16) return {};
  return few_rows_taps(p, input.element_size(), true, dead);
}

// Whether one pass over the weights computes both gradients and steps them: few rows.
bool conv2d_steps_in_place(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef geometry) {
  const ConvParams p = plan_conv_params("fastconv_plan::conv2d_steps_in_place", input, weight, geometry);
  return !stepped_taps(p, input, false).empty();
}

// grad_input = the gradient + addend, of the weights as they are; then the update above.
void conv2d_backward_update(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                            const OptTensor& addend, at::IntArrayRef geometry, const at::Tensor& grad_input,
                            const at::Tensor& parameter, at::TensorList state, const OptTensor& half,
                            const at::Tensor& hyper, c10::string_view optimizer, bool skip_dead) {
  constexpr const char* op = "fastconv_plan::conv2d_backward_update";
  const ConvParams p = check_plan_input_grad(op, grad_output, weight, addend, geometry, grad_input);
  check_output(op, "input", input, grad_input, grad_input.sizes());
  check_nhwc(op, "parameter", parameter);
  check_sizes(op, "parameter", parameter, weight.sizes());
  // The kernel reads the parameter alone: `weight` has to be it, or its bf16 copy.
  const void* same = input.scalar_type() == at::kFloat ? parameter.const_data_ptr()
                     : given(half)                     ? half->const_data_ptr()
                                                       : nullptr;
  const auto taps = weight.const_data_ptr() == same ? stepped_taps(p, input, !skip_dead) : std::vector<FewRowsTap>();
  if (taps.empty()) {
    conv2d_input_grad(grad_output, weight, addend, geometry, grad_input);
    conv2d_weight_grad_update(grad_output, input, weight, geometry, parameter, state, half, hyper, optimizer,
                              skip_dead);
    return;
  }
  const WeightUpdate update(op, parameter, state, half, hyper, optimizer);
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::type;
    few_rows_step<T>(p, taps, const_data<T>(grad_output), const_data<T>(input),
                     {data<T>(grad_input), nullptr, const_data<T>(or_none(addend)), nullptr, nullptr, Act::identity},
                     update.step());
  };
  input.scalar_type() == at::kFloat ? run(TypeTag<float>{}) : run(TypeTag<bf16>{});
}

// live: what may be left out has a gradient of zero, which the CPU does not look at here: it leaves dead taps out in
// conv2d_weight_grad_update.
void update(at::TensorList parameters, at::TensorList grads, at::TensorList state, int64_t per, at::TensorList halves,
            const at::Tensor& hyper, c10::string_view optimizer, at::IntArrayRef live) {
  constexpr const char* op = "fastconv_plan::update";
  check_update_lists(op, parameters, grads, state, per, halves, live);
  for (size_t i = 0; i < parameters.size(); ++i) {
    const OptTensor half = halves.empty() ? OptTensor() : OptTensor(halves[i]);
    WeightUpdate(op, parameters[i], state.slice(i * per, per), half, hyper, optimizer).apply_all(grads[i]);
  }
}

// output = act(batch_norm(input) + residual), with the batch's statistics; the running ones are updated.
std::tuple<at::Tensor, at::Tensor> batch_norm(const at::Tensor& input, const OptTensor& residual,
                                              const OptTensor& weight, const OptTensor& bias,
                                              const OptTensor& running_mean, const OptTensor& running_var,
                                              const OptTensor& num_batches_tracked, std::optional<double> momentum,
                                              double eps, c10::string_view act, const at::Tensor& output) {
  constexpr const char* op = "fastconv_plan::batch_norm";
  const BatchNormArgs args{weight, bias, running_mean, running_var, num_batches_tracked, true, momentum, eps};
  check_plan_batch_norm(op, input, residual, args, output);
  BatchNormStats stats = batch_norm_forward(input, or_none(residual), output, args, plan_act(op, act));
  return {stats.mean, stats.invstd};
}

// Into grad_input, and into grad_residual where one is given; returns the gradients of weight and bias.
std::tuple<at::Tensor, at::Tensor> batch_norm_backward_into(const at::Tensor& grad_output, const at::Tensor& input,
                                                            const OptTensor& output, const OptTensor& residual,
                                                            const OptTensor& weight, const OptTensor& bias,
                                                            const at::Tensor& mean, const at::Tensor& invstd,
                                                            c10::string_view act, const at::Tensor& grad_input,
                                                            const OptTensor& grad_residual) {
  constexpr const char* op = "fastconv_plan::batch_norm_backward";
  const BatchNormSaved saved = check_plan_batch_norm_backward(op, grad_output, input, output, residual, weight, bias,
                                                              mean, invstd, act, grad_input, grad_residual);
  const at::Tensor none;
  return batch_norm_backward(grad_output, input, saved.from_output ? *output : none,
                             saved.recompute ? or_none(residual) : none, weight, bias, mean, invstd, true, saved.act,
                             grad_input, or_none(grad_residual), {true, true});
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv_plan, CPU, m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_pack", &conv2d_pack);
  m.impl("conv2d_input_grad", &conv2d_input_grad);
  m.impl("conv2d_backward_into", &conv2d_backward_into);
  m.impl("conv2d_weight_grad", &conv2d_weight_grad);
  m.impl("conv2d_weight_grad_update", &conv2d_weight_grad_update);
  m.impl("conv2d_backward_update", &conv2d_backward_update);
  m.impl("conv2d_steps_in_place", &conv2d_steps_in_place);
  m.impl("update", &update);
  m.impl("batch_norm", &batch_norm);
  m.impl("batch_norm_backward", &batch_norm_backward_into);
}

}  // namespace fastconv::cpu
