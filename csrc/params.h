// Typed parameters that the kernels take. Torch-free: the CPU kernels, and later the CUDA kernels, include this file.
//
// Letters: input n h w c, filter k r s c, output n p q k. All tensors are dense NHWC; sizes and offsets are 64-bit.
#pragma once

#include <cstdint>

namespace fastconv {

enum class Act : int32_t { identity, relu, relu6, leaky_relu, sigmoid, tanh, silu, gelu, hardswish };

constexpr double kLeakySlope = 0.01;  // torch's default negative slope

// The derivative of these is computed from the output; of the others from the pre-activation.
constexpr bool act_saves_output(Act act) {
  return act == Act::relu || act == Act::relu6 || act == Act::leaky_relu || act == Act::sigmoid || act == Act::tanh;
}

// Of these it can be told from the output alone; of the other outputs the sign is that of the pre-activation, or the
// output is not looked at.
constexpr bool act_needs_output(Act act) { return act == Act::sigmoid || act == Act::tanh; }

struct ConvParams {
  int64_t n, h, w, c;  // input
  int64_t k, r, s;     // filter: k x r x s x (c / groups)
  int64_t p, q;        // output: n x p x q x k
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dil_h, dil_w;
  int64_t groups;

  int64_t gemm_m() const { return n * p * q; }
  int64_t gemm_n() const { return k; }
  int64_t gemm_k() const { return r * s * (c / groups); }
};

// One filter per channel: kernels of their own.
constexpr bool is_depthwise(const ConvParams& p) { return p.groups > 1 && p.groups == p.c && p.k == p.c; }

struct PoolParams {
  int64_t n, h, w, c;  // input
  int64_t p, q;        // output: n x p x q x c
  int64_t r, s;        // window
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dil_h, dil_w;  // 1 for average pooling
};

// Max-pool backward, one axis: entries [first[i], first[i + 1]) are the windows that cover input position i, in order,
// each with the tap of the window that lies there.
struct PoolTaps {
  const int64_t *first, *window, *tap;
};

// Average pooling by tables: window p covers input rows [h_begin[p], h_end[p]) and counts h_count[p] of them in the
// divisor; input row h lies in windows [p_begin[h], p_end[h]). The same for columns.
struct PoolWindows {
  int64_t n, h, w, c, p, q;
  const int64_t *h_begin, *h_end, *h_count, *p_begin, *p_end;
  const int64_t *w_begin, *w_end, *w_count, *q_begin, *q_end;
};

// Positions are the n * d rows of logits. Rows layout: position i's logits are x[i * c + j]; columns layout (d > 1):
// position (n, l)'s are x[(n * c + j) * d + l].
struct CrossEntropyParams {
  int64_t n, c, d;
  int64_t ignore_index;
  double label_smoothing;
};

}  // namespace fastconv
