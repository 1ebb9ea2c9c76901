// Optimizer steps over n elements: weights w, gradients g, state m (and v), all fp32 and contiguous, in one pass.
//
//   SGD    d = g + decay w;  m = momentum m + d;  w -= lr (nesterov ? d + momentum m : m)      (no m: w -= lr d)
//   Adam   d = g + l2 w;  w *= keep;  m += (1 - beta1)(d - m);  v = beta2 v + (1 - beta2) d^2
//          w -= rate m / (sqrt(v) / root + eps)
// with rate = lr / (1 - beta1^t), root = sqrt(1 - beta2^t), keep = 1 - lr decay (AdamW) and l2 = decay (Adam). Formulas
// and their order are torch.optim's. half: the new weights once more in bf16, for the next forward pass; or null.
// Bytes: w, m (and v) once in and out, g once in; half once out.

namespace fastconv::cpu::FASTCONV_ISA_NS {

template <bool MOMENTUM>
void sgd_step(float* w, float* m, bf16* half, const float* g, int64_t n, const SgdStep* step) {
  using V = Vec<float>;
  const SgdStep s = *step;
  for (int64_t i = 0; i < n; i += V::N) {
    const bool full = i + V::N <= n;
    const int rest = (int)(n - i);
    V::V x = load(w + i, full, rest), d = load(g + i, full, rest);
    d += x * s.decay;
    if (MOMENTUM) {
      const V::V buf = load(m + i, full, rest) * s.momentum + d;
      store(m + i, buf, full, rest);
      d = s.nesterov ? d + buf * s.momentum : buf;
    }
    x -= d * s.lr;
    store(w + i, x, full, rest);
    if (half) store(half + i, x, full, rest);
  }
}

inline f32v square_root(f32v x) {
#if FASTCONV_VEC_BYTES == 64
  return (f32v)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < FASTCONV_VEC_BYTES / 4; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

inline void adam_step(float* w, float* m, float* v, bf16* half, const float* g, int64_t n, const AdamStep* step) {
  using V = Vec<float>;
  const AdamStep s = *step;
  for (int64_t i = 0; i < n; i += V::N) {
    const bool full = i + V::N <= n;
    const int rest = (int)(n - i);
    V::V x = load(w + i, full, rest), d = load(g + i, full, rest);
    V::V first = load(m + i, full, rest), second = load(v + i, full, rest);
    d += x * s.l2;
    x *= s.keep;
    first += (d - first) * s.gain1;
    second = second * s.beta2 + d * d * s.gain2;
    x -= first / (square_root(second) / s.root + s.eps) * s.rate;
    store(m + i, first, full, rest);
    store(v + i, second, full, rest);
    store(w + i, x, full, rest);
    if (half) store(half + i, x, full, rest);
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
