// Every raw operator's schema, in one place.
//
// The implementations are registered per device: csrc/cpu/<op>.cpp for CPU. No autograd formula is registered here:
// gradients live in fastconv/autograd, outside the operators, so that each raw operator is a plain function of its
// arguments (autograd.cpp makes asking for one an error).
//
// Layout of 4-d results ("CL" = torch.channels_last, decided by Tensor.suggest_memory_format()):
// - output, preact, conv_output: of convolutions, CL if the input or the weight is CL; of other operators, as the
// input.
// - offsets: as output.
// - grad_input: as the input (the pooling backwards, which see no input, are told by channels_last).
// - grad_weight: as the weight. grad_residual: as the input. grad_preact: as saved.
// dtypes: "accumulate type" is fp32, and fp64 for fp64 tensors; save_mean, save_invstd, lse and normalizer have it.
// A gradient that output_mask does not ask for, and preact/conv_output/offsets that are not asked for, are empty
// tensors of size [0].

#pragma once

#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <vector>

namespace fastconv {

inline void define_operators(torch::Library& m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // output = act(conv2d(input, weight) + bias + residual). On a CPU a float32 weight may go with bfloat16 input, here
  // and in the two other convolutions; its gradient is float32 then.
  m.def(
      "conv2d_bias_act(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[2] stride, SymInt[2] "
      "padding, "
      "SymInt[2] dilation, SymInt groups, str activation, bool save_preact) -> (Tensor output, Tensor preact)",
      tags);
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, SymInt groups, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_weight)",
      tags);
  // saved: the output (relu relu6 leaky_relu sigmoid tanh) or the pre-activation (silu gelu hardswish); None for
  // identity.
  m.def(
      "act_bias_backward(Tensor grad_output, Tensor? saved, str activation, bool[2] output_mask) "
      "-> (Tensor grad_preact, Tensor grad_bias)",
      tags);

  // output = act(batch_norm(input) + residual)
  m.def(
      "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, str "
      "activation) "
      "-> (Tensor output, Tensor save_mean, Tensor save_invstd)",
      tags);
  // output: of relu, relu6, leaky_relu, sigmoid and tanh. None: of the first three the derivative is told from the
  // pre-activation, recomputed from input and residual, as it is of silu, gelu and hardswish.
  m.def(
      "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? residual, Tensor? weight, "
      "Tensor? bias, "
      "Tensor mean, Tensor invstd, bool training, str activation, bool[4] output_mask) "
      "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
      tags);

  // output = act(batch_norm(conv2d(input, weight) + bias) + residual)
  m.def(
      "conv2d_bn_act(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, SymInt[2] stride, SymInt[2] "
      "padding, "
      "SymInt[2] dilation, SymInt groups, bool training, float? momentum, float eps, str activation, bool "
      "save_for_backward) "
      "-> (Tensor output, Tensor conv_output, Tensor save_mean, Tensor save_invstd)",
      tags);

  // offsets: uint8, r * S + s of the maximum inside its window
  m.def(
      "max_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool "
      "ceil_mode, "
      "bool save_offsets) -> (Tensor output, Tensor offsets)",
      tags);
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor offsets, SymInt[2] input_size, SymInt[2] kernel_size, SymInt[2] "
      "stride, "
      "SymInt[2] padding, SymInt[2] dilation, bool channels_last) -> Tensor",
      tags);
  m.def(
      "avg_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, bool ceil_mode, "
      "bool count_include_pad, SymInt? divisor_override) -> Tensor",
      tags);
  m.def(
      "avg_pool2d_backward(Tensor grad_output, SymInt[2] input_size, SymInt[2] kernel_size, SymInt[2] stride, "
      "SymInt[2] padding, "
      "bool ceil_mode, bool count_include_pad, SymInt? divisor_override, bool channels_last) -> Tensor",
      tags);
  m.def("adaptive_avg_pool2d(Tensor input, SymInt[2] output_size) -> Tensor", tags);
  m.def("adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[2] input_size, bool channels_last) -> Tensor", tags);

  // reduction: 0 none, 1 mean, 2 sum
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, float "
      "label_smoothing) "
      "-> (Tensor loss, Tensor lse, Tensor normalizer)",
      tags);
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor "
      "normalizer, "
      "int reduction, SymInt ignore_index, float label_smoothing, bool[2] output_mask) -> (Tensor grad_input, Tensor "
      "grad_target)",
      tags);
}

// The steps of a plan (fastconv/_plan): they write into tensors that the plan owns. 4-d tensors are dense NHWC;
// geometry: stride, padding, dilation (h and w of each) and groups. The library is fastconv_plan.
inline void define_plan_operators(torch::Library& m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? packed, Tensor? mean, Tensor? scale, Tensor? shift, Tensor? "
      "residual, int[] geometry, str activation, Tensor(a!)? preact, Tensor(b!) output) -> ()");
  m.def("conv2d_pack(Tensor input, Tensor weight, int[] geometry) -> Tensor");
  m.def(
      "conv2d_input_grad(Tensor grad_output, Tensor weight, Tensor? addend, int[] geometry, Tensor(a!) grad_input) -> "
      "()");
  // Both gradients as fastconv::conv2d_backward gives them, the weight's into a tensor; the other has size [0] where
  // not asked for. A CPU's alone.
  m.def(
      "conv2d_backward_into(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] "
      "dilation, int groups, bool input_grad, Tensor(a!) grad_weight) -> Tensor");
  m.def(
      "conv2d_weight_grad(Tensor grad_output, Tensor input, Tensor weight, int[] geometry, Tensor(a!) grad_weight) -> "
      "()");
  m.def(
      "conv2d_weight_grad_update(Tensor grad_output, Tensor input, Tensor weight, int[] geometry, Tensor(a!) "
      "parameter, Tensor(b!)[] state, Tensor(c!)? half, Tensor hyper, str optimizer, bool skip_dead) -> ()");
  // Both gradients of a convolution, the weight's consumed as above. Worth a call of its own where
  // conv2d_steps_in_place.
  m.def(
      "conv2d_backward_update(Tensor grad_output, Tensor input, Tensor weight, Tensor? addend, int[] geometry, "
      "Tensor(a!) grad_input, Tensor(b!) parameter, Tensor(c!)[] state, Tensor(d!)? half, Tensor hyper, str optimizer, "
      "bool skip_dead) -> ()");
  m.def("conv2d_steps_in_place(Tensor input, Tensor weight, int[] geometry) -> bool");
  m.def(
      "update(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] state, int per, Tensor(c!)[] halves, Tensor hyper, "
      "str optimizer, int[] live) -> ()");
  // The next three are GPUs' alone.
  // raw = conv2d(input, weight) + bias, output = act(batch_norm(raw) + residual), the statistics on the way.
  m.def(
      "conv2d_bn(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, int[] geometry, float? "
      "momentum, float eps, str activation, Tensor(d!) raw, Tensor(e!) output) -> (Tensor, Tensor)");
  // grad = the gradient + addend, then batch_norm_backward of it. grad is a workspace: what it holds afterwards is not
  // said.
  m.def(
      "conv2d_input_grad_bn(Tensor grad_output, Tensor weight, Tensor? addend, int[] geometry, Tensor(a!) grad, Tensor "
      "input, Tensor? output, Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, Tensor mean, Tensor invstd, str "
      "activation, Tensor(b!) grad_input, Tensor(c!)? grad_residual) -> (Tensor, Tensor)");
  // The gradient in the input's dtype, or fp32 [splits, k, c, r, s] of which it is the sum: `update` takes either.
  m.def("conv2d_weight_grad_parts(Tensor grad_output, Tensor input, Tensor weight, int[] geometry) -> Tensor");
  m.def(
      "batch_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? "
      "running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str activation, Tensor(d!) output) "
      "-> (Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor? residual, Tensor? weight, Tensor? "
      "bias, Tensor mean, Tensor invstd, str activation, Tensor(a!) grad_input, Tensor(b!)? grad_residual) -> (Tensor, "
      "Tensor)");
}

}  // namespace fastconv
