// Depthwise convolution (kernels/conv_depthwise.h): the entry points. As conv_rows.h: raw pointers, dense NHWC, weights
// [c][r][s]; T is float or bf16, W as T or float; sums are fp32 and do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "kernels/conv_depthwise_types.h"

namespace fastconv::cpu {

// Whether the kernels compute this convolution. element: 4 for fp32, 2 for bf16.
bool depthwise_takes(const ConvParams& p, int64_t element);

// y[n,p,q,c] = act((conv(x, w) - mean) * scale + shift + residual); e.out and what else e names.
template <class T, class W>
void depthwise_forward(const ConvParams& p, const T* x, const W* weight, const RowsEpilogue<T>& e);

// dx[n,h,w,c], every element written; e as above.
template <class T, class W>
void depthwise_input_grad(const ConvParams& p, const T* dz, const W* weight, const RowsEpilogue<T>& e);

// dw[c,r,s] (D: T, or float), every element written; exactly zero for taps that read no input.
template <class T, class D>
void depthwise_weight_grad(const ConvParams& p, const T* dz, const T* x, D* dw);

}  // namespace fastconv::cpu
