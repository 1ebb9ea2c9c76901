// Arguments of the convolutions, checked once for every device.
#pragma once

#include "tensor.h"

namespace fastconv {

// Checks input, weight, bias and the geometry; returns the sizes of everything. wide_weight: float32 weights may go
// with bfloat16 input.
ConvParams conv_params(const char* op, const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                       bool wide_weight = false);

// Of conv2d_backward: the same, and grad_output.
ConvParams conv_backward_params(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                                const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                                at::IntArrayRef dilation, int64_t groups, bool wide_weight = false);

// channels_last if the input or the weight is, else contiguous.
at::MemoryFormat conv_format(const at::Tensor& input, const at::Tensor& weight);

}  // namespace fastconv
