// Sizes and checks that max and average pooling share; the rules and texts are PyTorch's.
#pragma once

#include "host.h"
#include "parallel.h"

namespace fastconv::cpu {

// With ceil_mode, the last window must start inside the input or the left padding.
inline int64_t pool_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dil, bool ceil_mode) {
  const int64_t span = in + 2 * pad - dil * (kernel - 1) - 1 + (ceil_mode ? stride - 1 : 0);
  int64_t out = (span >= 0 ? span / stride : -((-span + stride - 1) / stride)) + 1;  // rounds down
  if (ceil_mode && (out - 1) * stride >= in + pad) --out;
  return out;
}

inline PoolParams pool_params(const char* op, at::IntArrayRef input, at::IntArrayRef kernel, at::IntArrayRef stride,
                              at::IntArrayRef pad, at::IntArrayRef dil, bool ceil_mode) {
  check_pair(op, "kernel_size", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", pad, 0);
  check_pair(op, "dilation", dil, 1);
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(pad[i] <= ((kernel[i] - 1) * dil[i] + 1) / 2, op,
                ": pad should be at most half of effective kernel size, but got pad=", pad[i],
                ", kernel_size=", kernel[i], " and dilation=", dil[i]);
  }
  TORCH_CHECK(input[1] > 0 && input[2] > 0 && input[3] > 0, op,
              ": input expected non-zero size in all dimensions but the batch, got ", input);
  PoolParams a{};
  a.n = input[0], a.c = input[1], a.h = input[2], a.w = input[3];
  a.r = kernel[0], a.s = kernel[1];
  a.stride_h = stride[0], a.stride_w = stride[1];
  a.pad_h = pad[0], a.pad_w = pad[1];
  a.dil_h = dil[0], a.dil_w = dil[1];
  a.p = pool_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h, ceil_mode);
  a.q = pool_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w, ceil_mode);
  TORCH_CHECK(a.p >= 1 && a.q >= 1, op, ": Given input size: (", a.c, "x", a.h, "x", a.w,
              "). Calculated output size: (", a.c, "x", a.p, "x", a.q, "). Output size is too small");
  return a;
}

// f(begin, end, c0, c1) over positions, and over channels too where there are few positions (a global pool of a small
// batch).
template <class F>
void parallel_positions(int64_t positions, int64_t channels, int64_t elements, const F& f) {
  constexpr int64_t width = 2 * kChannelBlock;
  const int64_t parts = positions >= 4 * at::get_num_threads() ? 1 : (channels + width - 1) / width;
  if (parts <= 1) {
    parallel_tasks(positions, elements, [&](int64_t begin, int64_t end) { f(begin, end, int64_t{0}, channels); });
    return;
  }
  parallel_tasks(positions * parts, elements, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t o = t / parts, c0 = t % parts * width;
      f(o, o + 1, c0, std::min(channels, c0 + width));
    }
  });
}

}  // namespace fastconv::cpu
