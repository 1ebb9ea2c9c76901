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

// What a convolution leaves to the batch norm that reads its result next: split sums, which that adds up (few rows), or
// statistics of the result in pieces of part_rows rows, [ceil(n p q / part_rows), k] each. Nothing where the kernel
// that ran can give neither.
struct ConvRest {
  bool takes_parts = false;  // said by the caller
  at::Tensor parts;          // [splits, n p q k] fp32: the result itself is not written
  int splits = 0;
  at::Tensor mean, m2;
  int64_t part_rows = 0;
};

// input and weight in any layout; the result is dense NHWC in memory, in `format`'s strides where that is the same
// bytes. rest: wanted (or null). Where it has parts, the epilogue's bias is left to who adds them up too.
at::Tensor conv_forward(const char* op, const Device& device, const ConvParams& p, const at::Tensor& input,
                        const at::Tensor& weight, const ConvEpilogueTensors& epilogue, at::MemoryFormat format,
                        ConvRest* rest);

// The batch norm whose result is a convolution's input, as the data gradient's epilogue may begin its backward: dx is
// multiplied by the activation's derivative then, and summed. Where the kernel that runs cannot, tiles stays 0.
struct ConvNormSums {
  at::Tensor x, mean, invstd;  // what it normalised (NHWC), and by what: [C] fp32, contiguous
  at::Tensor weight, bias;     // likewise, or undefined
  at::Tensor output;           // undefined: the derivative is computed from x, to which nothing was added then
  Act act = Act::identity;
  at::Tensor parts;  // found: [2, tiles, C] fp32, of dx and of dx * (x - mean) * invstd
  int64_t tiles = 0;
};

// dx = the data gradient + addend (undefined: nothing; dx itself: added to). dy, addend and dx: NHWC. takes_parts:
// where the sums are split, they are returned as in ConvRest, and neither dx is written nor addend added. norm: wanted
// (or null).
ConvRest conv_input_grad(const char* op, const Device& device, const ConvParams& p, const at::Tensor& dy,
                         const at::Tensor& weight, const at::Tensor& addend, const at::Tensor& dx,
                         bool takes_parts = false, ConvNormSums* norm = nullptr);

// dw = the weight gradient. dy, x and dw: NHWC, of one dtype. takes_parts: as above, with dw undefined: where the sums
// are not split, rest.parts is the gradient itself, in the dtype of x.
ConvRest conv_weight_grad(const char* op, const Device& device, const ConvParams& p, const at::Tensor& dy,
                          const at::Tensor& x, const at::Tensor& dw, bool takes_parts = false);

}  // namespace fastconv::cuda
