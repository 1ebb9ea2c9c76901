// grad_preact = g * act'(saved) and grad_bias = sum over rows of it, in one pass.
//
// g, saved, grad_preact: [rows, channels] row-major (NHWC). sums: [channels] in the accumulate type, of rows [r0, r1).
// Fused: activation gradient and bias gradient. Accumulation: fp32 (fp64 for double), 64 rows in registers, then in
// order. Bytes: g and saved once in, grad_preact once out; either output may be null and is then not computed.

namespace fastconv::cpu::FASTCONV_ISA_NS {

template <class T, int KIND>
void act_bias_backward(const T* g, const T* saved, T* grad_preact, acc_t<T>* sums, int64_t channels, int64_t r0,
                       int64_t r1, int64_t c0, int64_t c1, Act act) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  constexpr int64_t kRows = 64;
  if (sums) {
    for (int64_t c = c0; c < c1; ++c) sums[c] = 0;
  }
  for (int64_t r = r0; r < r1; r += kRows) {
    const int64_t rows = r + kRows < r1 ? kRows : r1 - r;
    for (int64_t c = c0; c < c1; c += N) {
      const bool full = c + N <= c1;
      const int n = (int)(c1 - c);
      V sum{};
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (r + i) * channels + c;
        V d = load(g + at, full, n);
        if (KIND != kActIdentity) d = apply_act_grad<A, KIND>(d, load(saved + at, full, n), act);
        if (grad_preact) store(grad_preact + at, d, full, n);
        sum += d;
      }
      if (sums) store(sums + c, load(sums + c, full, n) + sum, full, n);
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
