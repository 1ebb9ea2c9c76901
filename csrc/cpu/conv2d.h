// The convolution as conv2d_bias_act, conv2d_bn_act and conv2d_backward share it.
#pragma once

#include <array>
#include <tuple>
#include <type_traits>

#include "../host/conv2d_check.h"
#include "conv_grouped.h"
#include "conv_rows.h"
#include "host.h"

namespace fastconv::cpu {

// What follows the sums: out = act((conv - mean) * scale + shift + residual), pre = the same before act. Vectors are
// [K] in the accumulate type, or undefined (0, 1, 0); residual and pre are NHWC or undefined.
struct ConvEpilogue {
  at::Tensor mean, scale, shift, residual, pre;
  Act act = Act::identity;
  at::Tensor out;                // where the result goes, dense NHWC; undefined: a new tensor
  const void* packed = nullptr;  // the weights as conv_rows.h packs them, or null

  bool empty() const {
    return !mean.defined() && !scale.defined() && !shift.defined() && !residual.defined() && !pre.defined() &&
           act == Act::identity;
  }
};

// input in any layout, weight in any layout, of the input's dtype or float32 with bfloat16 input; the result is dense
// NHWC in memory, with `format`'s strides where that is the same bytes.
at::Tensor conv_forward(const ConvParams& p, const at::Tensor& input, const at::Tensor& weight,
                        const ConvEpilogue& epilogue, at::MemoryFormat format);

// grad_input = the convolution's input gradient + addend (undefined: nothing; or grad_input itself). Dense NHWC
// tensors.
void conv_input_grad(const ConvParams& p, const at::Tensor& grad_output, const at::Tensor& weight,
                     const at::Tensor& addend, const at::Tensor& grad_input);

// Who computes a pass: ATen, conv_rows.h (which alone takes packed weights and hands gradients on in blocks), or
// conv_grouped.h. The latter two in fp32 and bf16.
enum class ConvEngine { aten, rows, grouped };
ConvEngine conv_engine(const ConvParams& p, const at::Tensor& x, ConvPass pass);

// Calls `run` with a tag of the elements' type, fp32 or bf16.
template <class F>
void with_type(const at::Tensor& x, const F& run) {
  if (x.scalar_type() == at::kFloat) {
    run(TypeTag<float>{});
  } else {
    run(TypeTag<bf16>{});
  }
}

// The same with a second tag, of the weights' type.
template <class F>
void with_types(const at::Tensor& x, const at::Tensor& weight, const F& run) {
  with_type(x, [&](auto tag) {
    if (weight.scalar_type() == at::kFloat) {
      run(tag, TypeTag<float>{});
    } else if constexpr (std::is_same_v<typename decltype(tag)::type, bf16>) {
      run(tag, tag);
    }
  });
}

// grad_weight (fp32) = the weight gradient, which ATen rounds to the weight's dtype first. Dense NHWC tensors.
void conv_weight_grad_into(const ConvParams& p, const at::Tensor& grad_output, const at::Tensor& input,
                           const at::Tensor& weight, const at::Tensor& grad_weight);

// Gradients in the layouts and dtypes of input and weight; undefined where not asked for. into: where the weight's
// goes, of a channels_last weight's layout and dtype; undefined: a new tensor. Not of empty tensors.
std::tuple<at::Tensor, at::Tensor> conv_backward(const ConvParams& p, const at::Tensor& grad_output,
                                                 const at::Tensor& input, const at::Tensor& weight,
                                                 std::array<bool, 2> output_mask, const at::Tensor& into = {});

}  // namespace fastconv::cpu
