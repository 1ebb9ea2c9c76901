// Convolution in narrow groups, depthwise ones among them (kernels/conv_grouped.h): the entry points. As conv_rows.h:
// raw pointers, dense NHWC, weights [k][r][s][c / groups]; T is float or bf16, W as T or float; sums are fp32 and do
// not depend on the number of threads.
#pragma once

#include <cstdint>

#include "conv_rows.h"
#include "kernels/conv_grouped_types.h"

namespace fastconv::cpu {

// The measured rule: whether the kernels compute this convolution, and faster than oneDNN (through ATen).
bool grouped_worthwhile(const ConvParams& p, ConvPass pass);

// y[n,p,q,c] = act((conv(x, w) - mean) * scale + shift + residual); e.out and what else e names.
template <class T, class W>
void grouped_forward(const ConvParams& p, const T* x, const W* weight, const RowsEpilogue<T>& e);

// dx[n,h,w,c], every element written; e as above.
template <class T, class W>
void grouped_input_grad(const ConvParams& p, const T* dz, const W* weight, const RowsEpilogue<T>& e);

// dw[k,r,s,c] (D: T, or float), every element written; exactly zero for taps that read no input.
template <class T, class D>
void grouped_weight_grad(const ConvParams& p, const T* dz, const T* x, D* dw);

}  // namespace fastconv::cpu
