// Shapes that the host side hands to the kernels: plain C++, for compilers that know no CUDA.
#pragma once

namespace fastconv {

struct ConvShape {
  int n, h, w, c, k, r, s, p, q;  // c and k count all groups
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
};

enum class PoolKind : int { kMax, kAvg, kAdaptiveAvg };

struct PoolShape {
  int n, h, w, c, p, q;                                      // input h w, output p q
  int r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;  // window; unused by adaptive
  bool count_include_pad;
  int divisor_override;  // 0: none
};

}  // namespace fastconv
