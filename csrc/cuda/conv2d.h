// The convolution as conv2d_bias_act, conv2d_bn_act and conv2d_backward share it on the GPU.
#pragma once

#include "../host/conv2d_check.h"
#include "host.h"

namespace fastconv::cuda {

// out = act((conv(x, w)) * scale + shift + bias + residual), pre = the same before act; undefined tensors are absent.
// scale and shift: [K] fp32. residual, pre and out: NHWC. out: where the result goes; undefined: a new tensor.
struct ConvEpilogueTensors {
  at::Tensor bias, scale, shift, residual, pre, out;
  Act act = Act::identity;
};

// Statistics of the result in pieces of part_rows rows: [ceil(n p q / part_rows), k] each. Undefined where the kernel
// that ran cannot give them.
struct ConvStatistics {
  at::Tensor mean, m2;
  int64_t part_rows = 0;
};

// input and weight in any layout; the result is dense NHWC in memory, in `format`'s strides where that is the same
// bytes. stats: wanted (or null).
at::Tensor conv_forward(const char* op, const Device& device, const ConvParams& p, const at::Tensor& input,
                        const at::Tensor& weight, const ConvEpilogueTensors& epilogue, at::MemoryFormat format,
                        ConvStatistics* stats);

// dx = the data gradient + addend (undefined: nothing; dx itself: added to). dy, addend and dx: NHWC.
void conv_input_grad(const char* op, const Device& device, const ConvParams& p, const at::Tensor& dy,
                     const at::Tensor& weight, const at::Tensor& addend, const at::Tensor& dx);

// dw = the weight gradient. dy, x and dw: NHWC, of one dtype.
void conv_weight_grad(const char* op, const Device& device, const ConvParams& p, const at::Tensor& dy,
                      const at::Tensor& x, const at::Tensor& dw);

}  // namespace fastconv::cuda
