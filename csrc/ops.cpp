// Every raw operator's schema, in one place, and the Python module fastconv._C.
//
// The implementations are registered per device: csrc/cpu/<op>.cpp for CPU. No autograd formula is registered here:
// gradients live in fastconv/autograd, outside the operators, so that each raw operator is a plain function of its
// arguments.
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

#include <ATen/core/enum_tag.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/isa.h"
#include "signature.h"

#ifdef FASTCONV_WITH_CUDA
#include <cuda.h>
#endif

TORCH_LIBRARY(fastconv, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // output = act(conv2d(input, weight) + bias + residual)
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

namespace {

// setup.py passes these.
#ifndef FASTCONV_CUDA_ARCHS
#define FASTCONV_CUDA_ARCHS ""
#endif
#ifndef FASTCONV_CUDA_REASON
#define FASTCONV_CUDA_REASON "not asked for at build time"
#endif

std::string cuda_version() {
#ifdef FASTCONV_WITH_CUDA
  return std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
#else
  return "";
#endif
}

std::string build_flags() {
  std::string text = "c++" + std::to_string(__cplusplus / 100 % 100);
#ifdef _OPENMP
  text += ", OpenMP " + std::to_string(_OPENMP);
#endif
#ifdef __OPTIMIZE__
  text += ", optimised";
#endif
  return text;
}

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  return {
      {"compiler", compiler},
      {"torch", TORCH_VERSION},
      {"cuda", cuda_version()},
      {"cuda_reason", FASTCONV_CUDA_REASON},
      {"archs", FASTCONV_CUDA_ARCHS},
      {"flags", build_flags()},
      {"cpu_isa_compiled", fastconv::cpu::isa_compiled()},
      {"cpu_isa", fastconv::cpu::isa_name(fastconv::cpu::active_isa())},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastconv's compiled operators; importing this module registers torch.ops.fastconv";
  m.def("build_info", &build_info, "How this module was built: name -> text (empty where it does not apply).");
  m.def("signature", &fastconv::signature, "What decides the backend of a call on a tuple of tensors, as bytes.");
}
