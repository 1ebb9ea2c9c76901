// out = act((x - mean) * scale + shift + residual), per channel: the epilogue of a convolution and the normalise step
// of batch norm.
//
// x, residual, out, pre: [rows, channels] row-major (NHWC); mean, scale, shift: [channels] in the accumulate type.
// Fused: bias or batch norm, residual add, activation, and the copy of the pre-activation. out may be x.
// Accumulation: fp32 (fp64 for double); one rounding, at the store.
// Bytes: x once in, out once out, residual once in if given, pre once out if asked for. The three channel vectors come
// from L1: four rows share one load of them, else their loads (3 per vector of x) would bound the loop, not the memory.
// (x - mean) * scale + shift costs one more operation than x * scale + shift' and does not cancel where |mean| >>
// sigma.

namespace fastconv::cpu::FASTCONV_ISA_NS {

template <class T, int KIND>
FASTCONV_INLINE void channel_affine_rows(const T* x, T* out, T* pre, const T* residual, const acc_t<T>* mean,
                                         const acc_t<T>* scale, const acc_t<T>* shift, int64_t channels, int64_t c0,
                                         int64_t c1, Act act, int rows) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  for (int64_t c = c0; c < c1; c += N) {
    const bool full = c + N <= c1;
    const int n = (int)(c1 - c);
    const V m = load(mean + c, full, n), a = load(scale + c, full, n), b = load(shift + c, full, n);
    for (int i = 0; i < rows; ++i) {
      const int64_t at = i * channels + c;
      V v = (load(x + at, full, n) - m) * a + b;
      if (residual) v += load(residual + at, full, n);
      if (pre) store(pre + at, v, full, n);
      store(out + at, apply_act<A, KIND>(v, act), full, n);
    }
  }
}

template <class T, int KIND>
void channel_affine(const T* x, T* out, T* pre, const T* residual, const acc_t<T>* mean, const acc_t<T>* scale,
                    const acc_t<T>* shift, int64_t channels, int64_t r0, int64_t r1, int64_t c0, int64_t c1, Act act) {
  int64_t r = r0;
  for (; r + 4 <= r1; r += 4) {
    const int64_t at = r * channels;
    channel_affine_rows<T, KIND>(x + at, out + at, pre ? pre + at : nullptr, residual ? residual + at : nullptr, mean,
                                 scale, shift, channels, c0, c1, act, 4);
  }
  for (; r < r1; ++r) {
    const int64_t at = r * channels;
    channel_affine_rows<T, KIND>(x + at, out + at, pre ? pre + at : nullptr, residual ? residual + at : nullptr, mean,
                                 scale, shift, channels, c0, c1, act, 1);
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
