// Convolution by row classes (kernels/conv_rows.h): the entry points. Raw pointers; at::Parallel for the threads and
// nothing else of torch.
//
// Tensors are dense NHWC, weights [k][r][s][c] (channels_last OIHW). T is float or bf16; sums are fp32. Every call may
// run inside any thread; buffers belong to the thread that uses them. Results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/conv_rows_types.h"

namespace fastconv::cpu {

enum class ConvPass { forward, input_grad, weight_grad };

// Whether tap `tap` of one axis reads inside the input at output position o, and whether it does at any of them.
inline bool tap_touches(int64_t in, int64_t stride, int64_t pad, int64_t dil, int64_t o, int64_t tap) {
  const int64_t i = o * stride - pad + tap * dil;
  return i >= 0 && i < in;
}
inline bool tap_is_live(int64_t in, int64_t out, int64_t stride, int64_t pad, int64_t dil, int64_t tap) {
  for (int64_t o = 0; o < out; ++o) {
    if (tap_touches(in, stride, pad, dil, o, tap)) return true;
  }
  return false;
}

// Whether the engine computes this convolution; if not, the reason. element: 4 for fp32, 2 for bf16.
const char* rows_refusal(const ConvParams& p, int64_t element);

// The measured rule: whether the engine is faster than oneDNN (through ATen) here. packed: the caller keeps packed
// weights.
bool rows_worthwhile(const ConvParams& p, int64_t element, ConvPass pass, bool packed = false);

// Weights packed once, for callers that use them more than once (ConvPass::forward or input_grad). The size depends on
// the active instruction set; 64-byte aligned memory. Taps that no row reads at this map size are left out, so the
// sizes belong to the packing.
int64_t rows_packed_bytes(const ConvParams& p, int64_t element, ConvPass pass);
template <class T>
void rows_pack(const ConvParams& p, const T* weight, ConvPass pass, void* packed);
// Whether the forward pass reads weights where they lie as fast as packed ones: few rows.
template <class T>
bool rows_in_place(const ConvParams& p);

// y[n,p,q,k] = act((conv(x, w) - mean) * scale + shift + residual); e.out and what else e names. `packed` (or null:
// `weight` is packed on the way).
// W: T, or float where T is bf16: then every weight is rounded as it is packed, and no bf16 copy of them is needed.
template <class T, class W>
void rows_forward(const ConvParams& p, const T* x, const W* weight, const void* packed, const RowsEpilogue<T>& e);

// dx[n,h,w,c], every element written; e as above, for an addition to the gradient (residual) or a scale.
template <class T, class W>
void rows_input_grad(const ConvParams& p, const T* dz, const W* weight, const void* packed, const RowsEpilogue<T>& e);

// The same from the weights where they lie, where every tap joins a few rows only (kernels/conv_few_rows.h). And the
// step of an optimizer by the weight gradient on the way, where step.w is the fp32 weight: with bf16 dx is that of its
// rounded values. The weights of the taps in the list are stepped, others left alone.
template <class T, class W>
void few_rows_input_grad(const ConvParams& p, const std::vector<FewRowsTap>& taps, const T* dz, const W* weight,
                         const RowsEpilogue<T>& e);
template <class T>
void few_rows_step(const ConvParams& p, const std::vector<FewRowsTap>& taps, const T* dz, const T* x,
                   const RowsEpilogue<T>& e, const WeightStep& step);
// For either: the live taps, with `dead` those that read no input too; empty where it is not faster, or cannot be done.
std::vector<FewRowsTap> few_rows_taps(const ConvParams& p, int64_t element, bool step, bool dead);

// dw[k,r,s,c] (D: T, or float), every element written; exactly zero for taps that read no input.
template <class T, class D>
void rows_weight_grad(const ConvParams& p, const T* dz, const T* x, D* dw);

// The weight gradient in blocks of whole filters, each handed on while it lies in cache: elements [first, first +
// count) in the order [k][r][s][c]. Called from several threads at once, each with filters of its own.
using GradTaker = std::function<void(int64_t first, int64_t count, const float* grad)>;
template <class T>
void rows_weight_grad_blocks(const ConvParams& p, const T* dz, const T* x, bool skip_dead, const GradTaker& take);

}  // namespace fastconv::cpu
